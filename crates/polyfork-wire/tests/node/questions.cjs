// A cluster worker that asks its primary for every kind of socket, says a few things and leaves.
// The primary refuses every question, or grants it; both lead to the next one.
'use strict';
const cluster = require('cluster');
const dgram = require('dgram');
const net = require('net');
const tls = require('tls');

const tcp = (...args) => (done) => {
  const server = net.createServer();
  server.once('error', done);
  server.listen(...args, () => server.close(done));
};
const udp = (type, ...args) => (done) => {
  const socket = dgram.createSocket(type);
  socket.once('error', done);
  socket.bind(...args, () => socket.close(done));
};
const secure = (done) => {
  const server = tls.createServer();
  server.once('error', done);
  server.listen(18443, () => server.close(done));
};

const questions = [
  tcp(18000),
  tcp(0, '127.0.0.1'),
  tcp(18001, '127.0.0.1', 17),
  tcp({ port: 18002, host: '::', ipv6Only: true }),
  tcp('/tmp/polyfork-wire-questions.sock'),
  tcp({ path: '/tmp/polyfork-wire-questions.sock', readableAll: true, writableAll: true, backlog: 9 }),
  tcp({ fd: 77 }),
  udp('udp4', 18003),
  udp('udp6', { port: 18004, address: '::1' }),
  secure,
];

function ask() {
  const question = questions.shift();
  if (question) return question(() => setImmediate(ask));
  process.send('grüße \u{1f600}\u0000\n');
  process.send({ a: [1.5, null, true], cmd: 'NODE_' });
  process.send(null);
  process.send('\ud800', () => cluster.worker.disconnect());
}

ask();
