// A TCP server: one JSON line of greeting, then an echo until the client ends.
'use strict';
const cluster = require('node:cluster');
const net = require('node:net');
const { listen } = require('./answers.cjs');

let n = 0;
listen(net.createServer((socket) => {
  socket.on('error', () => {}); // a client that resets must not end the worker
  const greeting = { pid: process.pid, worker: cluster.worker?.id ?? null, n: ++n };
  socket.write(`${JSON.stringify(greeting)}\n`);
  socket.pipe(socket);
}));
