// The child in most tests: does what it is told by name, and tells what happens to it.
'use strict';
const net = require('net');
const dgram = require('dgram');

const kept = [];
const acts = {
  echo: (m) => process.send({ echo: m.value }),
  leave: () => process.disconnect(),
  exit: (m) => process.exit(m.code),
  kill: () => process.kill(process.pid, 'SIGKILL'),
  flood: (m) => { for (let n = 0; n < m.count; n++) process.send({ n }); },
  env: (m) => process.send(Object.keys(process.env).filter((key) => key.includes('CHANNEL'))),
  argv: () => process.send({ argv: process.argv.slice(2), execArgv: process.execArgv }),
  raw: (m) => require('fs').writeSync(m.fd, Buffer.from(m.bytes)),
  big: (m) => process.send('x'.repeat(m.size)),
  say: (m) => process.send((0, eval)(`(${m.code})`)),
  ask: (m) => process.send({ polyfork: 'request', id: m.id, body: m.body }),
  // Handles that come.
  server: (m, server) => {
    kept.push(server);
    server.on('connection', (socket) => socket.end('from the child'));
    process.send('listening');
  },
  socket: (m, socket) => { socket.end('hello ' + m.name); },
  udp: (m, socket) => {
    socket.on('message', (text, from) => socket.send('got ' + text, from.port, from.address));
    kept.push(socket);
    process.send('bound');
  },
  bound: (m, socket) => {
    const server = net.createServer((connection) => connection.end('from the child'));
    server.listen(socket, () => process.send({ listening: server.address().port }));
  },
  // A port that others have, too.
  listen: (m) => {
    const server = net.createServer((socket) => socket.end(m.name));
    server.listen({ port: m.port, host: '127.0.0.1', reusePort: true }, () => process.send('listening'));
  },
  bind: (m) => {
    const socket = dgram.createSocket({ type: 'udp4', reusePort: true });
    socket.on('message', (text, from) => socket.send(m.name, from.port, from.address));
    socket.bind(m.port, '127.0.0.1', () => process.send('bound'));
  },
  // Handles that go.
  'give-bound': () => {
    const socket = new net.BoundSocket({ host: '127.0.0.1' });
    process.send({ port: socket.address().port }, socket);
  },
  'give-server': () => {
    const server = net.createServer();
    server.listen(0, '127.0.0.1', () => process.send({ port: server.address().port }, server));
  },
  'give-socket': () => {
    const server = net.createServer((socket) => {
      process.send('connection', socket);
      server.getConnections((error, count) => process.send({ connections: count }));
      server.close(() => process.send('server closed'));
    });
    server.listen(0, '127.0.0.1', () => process.send({ port: server.address().port }));
  },
  'give-udp': () => {
    const socket = dgram.createSocket('udp4');
    socket.bind(0, '127.0.0.1', () => process.send({ port: socket.address().port }, socket));
  },
};
process.on('message', (m, handle) => {
  // How a script answers the requests of a Rust program.
  if (m?.polyfork === 'request') return process.send({ ...m, polyfork: 'reply', body: m.body });
  if (m?.polyfork) return process.send({ answered: m });
  acts[m.act](m, handle);
});
process.on('disconnect', () => {
  if (!process.env.LINGER) return;
  setInterval(() => {}, 1000);
  console.log('\nthe detached child goes on');
});
