// One server by way of the primary, and one that the worker binds for itself.
'use strict';
const http = require('http');

const answer = (request, response) => response.end('ok');
const own = http.createServer(answer).listen({ port: 0, host: '127.0.0.1', exclusive: true }, () => {
  process.send({ kind: 'exclusive', port: own.address().port });
  http.createServer(answer).listen({ port: 0, host: '127.0.0.1' });
});
process.on('message', () => require('cluster').worker.disconnect());
