// A UDP port, and a Unix path that answers after a while.
'use strict';
const dgram = require('dgram');
const fs = require('fs');
const http = require('http');

const socket = dgram.createSocket('udp4').bind({ port: 0, address: '127.0.0.1' }, () => {
  process.send({ kind: 'udp', port: socket.address().port });
  http
    .createServer((request, response) => {
      process.send({ kind: 'request' });
      setTimeout(() => response.end('unix'), 800);
    })
    .listen(process.env.LISTEN);
});
process.on('exit', (code) => fs.writeSync(1, `exit ${code}\n`));
