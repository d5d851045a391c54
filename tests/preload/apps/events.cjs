// Says what it can see of the end.
'use strict';
const cluster = require('cluster');
const fs = require('fs');
const http = require('http');

const say = (line) => fs.writeSync(1, `${line}\n`);
cluster.worker.on('disconnect', () => {
  say(`worker disconnect ${cluster.worker.exitedAfterDisconnect}`);
  if (process.env.THROWS) throw new Error('thrown by the program');
});
process.on('disconnect', () => say('process disconnect'));
process.on('exit', (code) => say(`exit ${code}`));
process.on('message', () => process.disconnect());
if (process.env.BUSY) setInterval(() => {}, 10);

http
  .createServer((request) => process.send({ kind: 'request', url: request.url }))
  .listen({ port: 0, host: '127.0.0.1' });
