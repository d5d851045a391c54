// A UDP server: answers each datagram with JSON and the text it got.
'use strict';
const cluster = require('node:cluster');
const dgram = require('node:dgram');

let n = 0;
const socket = dgram.createSocket('udp4');
socket.on('message', (text, from) => {
  const body = { pid: process.pid, worker: cluster.worker?.id ?? null, n: ++n, text: `${text}` };
  socket.send(JSON.stringify(body), from.port, from.address);
});
socket.bind(Number(process.argv[2] ?? process.env.PORT ?? 3000), process.env.HOST);
