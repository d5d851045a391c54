// A Node program whose child is written in Rust. Runs the play named in its arguments and exits with 0, or throws.
'use strict';
const assert = require('assert');
const { fork } = require('child_process');
const net = require('net');
const dgram = require('dgram');
const { once } = require('events');

const [play, rust, serialization] = process.argv.slice(2);
function start(role) {
  const args = ['--exact', '--ignored', '--nocapture'];
  const child = fork('roles::' + role, args, {
    execPath: rust, execArgv: [], serialization, stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
  });
  child.kept = [];
  child.woken = () => {};
  child.on('message', (...pair) => { child.kept.push(pair); child.woken(); });
  return child;
}
// Several may be emitted before a promise is looked at, so they are kept.
const pair = async (child) => {
  while (child.kept.length === 0) await new Promise((resolve) => { child.woken = resolve; });
  return child.kept.shift();
};
const message = async (child) => (await pair(child))[0];
const ended = async (child) => { if (child.exitCode === null) await once(child, 'exit'); return child.exitCode; };

const plays = {
  async echo() {
    const child = start('echo');
    const values = [1, 1.5, 'text', '\u{1F600}', true, null, { a: [1, { b: null }], c: 'ü' }, []];
    for (const value of values) child.send(value);
    for (const value of values) assert.deepStrictEqual(await message(child), value);
    child.disconnect();
    assert.strictEqual(await ended(child), 0);
  },
  async large() {
    const child = start('echo');
    const value = 'x'.repeat(8 << 20);
    for (let n = 0; n < 3; n++) child.send(value + n);
    for (let n = 0; n < 3; n++) assert.ok(await message(child) === value + n);
    child.disconnect();
    assert.strictEqual(await ended(child), 0);
  },
  async flood() {
    const child = start('echo');
    let next = 0;
    const done = new Promise((resolve) => child.on('message', (m) => {
      assert.strictEqual(m.n, next++);
      if (next === 20000) resolve();
    }));
    for (let n = 0; n < 20000; n++) child.send({ n });
    await done;
    child.disconnect();
    assert.strictEqual(await ended(child), 0);
  },
  async leaves() {
    const child = start('leaves');
    const got = [];
    child.on('message', (m) => got.push(m));
    await once(child, 'disconnect');
    assert.strictEqual(child.connected, false);
    assert.strictEqual(await ended(child), 0);
    assert.deepStrictEqual(got.map((m) => m.length ?? m), [1, 2, 3, 4 << 20]);
  },
  async server() {
    const child = start('serve');
    const server = net.createServer(() => assert.fail('the parent does not accept'));
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
    const { port } = server.address();
    child.send('server', server);
    assert.strictEqual(await message(child), 'listening');
    server.close();
    const socket = net.connect(port, '127.0.0.1');
    assert.strictEqual(String((await once(socket, 'data'))[0]), 'from Rust');
    socket.end();
    child.disconnect();
    assert.strictEqual(await ended(child), 0);
  },
  async sockets() {
    const child = start('serve');
    let closed = false;
    const server = net.createServer({ pauseOnConnect: true }, (socket) => child.send('socket', socket));
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
    const clients = [];
    for (let n = 0; n < 20; n++) clients.push(net.connect(server.address().port, '127.0.0.1'));
    for (const client of clients) assert.strictEqual(String((await once(client, 'data'))[0]), 'from Rust');
    const count = () => new Promise((resolve, reject) =>
      server.getConnections((error, count) => error ? reject(error) : resolve(count)));
    // Until the last acknowledgement is read, Node counts that connection twice.
    while (await count() !== 20);
    const closing = new Promise((resolve) => server.close(() => { closed = true; resolve(); }));
    assert.ok(!closed);
    child.send('let go');
    await closing;
    for (const client of clients) client.destroy();
    child.disconnect();
    assert.strictEqual(await ended(child), 0);
  },
  async udp() {
    const child = start('serve');
    const socket = dgram.createSocket('udp4');
    socket.bind(0, '127.0.0.1');
    await once(socket, 'listening');
    const { port } = socket.address();
    child.send('udp', socket);
    assert.strictEqual(await message(child), 'bound');
    socket.close();
    const client = dgram.createSocket('udp4');
    client.send('hi', port, '127.0.0.1');
    assert.strictEqual(String((await once(client, 'message'))[0]), 'got hi');
    client.close();
    child.disconnect();
    assert.strictEqual(await ended(child), 0);
  },
  async gives() {
    const child = start('gives');
    const [address, server] = await pair(child);
    server.on('connection', (socket) => socket.end('from Node'));
    const socket = net.connect(address.port, '127.0.0.1');
    assert.strictEqual(String((await once(socket, 'data'))[0]), 'from Node');
    server.close();
    child.send('next');
    const [text, connection] = await pair(child);
    assert.strictEqual(text, 'connection');
    connection.end('to the other end');
    assert.strictEqual(await message(child), 'to the other end');
    child.send('next');
    const [, udp] = await pair(child);
    udp.once('message', (m, from) => { udp.send('got ' + m, from.port, from.address); });
    assert.strictEqual(await message(child), 'got ping');
    udp.close();
    child.disconnect();
    assert.strictEqual(await ended(child), 0);
  },
  async requests() {
    const child = start('answers');
    child.send({ polyfork: 'request', id: 7, body: 20 });
    assert.deepStrictEqual(await message(child), { polyfork: 'reply', id: 7, body: 40 });
    child.send({ polyfork: 'request', id: 8, body: 'refuse' });
    assert.deepStrictEqual(await message(child), { polyfork: 'refused', id: 8 });
    child.disconnect();
    assert.strictEqual(await ended(child), 0);
  },
  async killed() {
    const child = start('echo');
    child.send(1);
    await message(child);
    child.kill('SIGKILL');
    await once(child, 'exit');
    assert.strictEqual(child.signalCode, 'SIGKILL');
    assert.strictEqual(child.connected, false);
  },
  async environment() {
    const child = start('environment');
    assert.deepStrictEqual(await message(child), []);
    child.disconnect();
    assert.strictEqual(await ended(child), 0);
  },
};
plays[play]().catch((error) => { console.error(error); process.exit(1); });
setTimeout(() => { console.error('the play takes too long'); process.exit(2); }, 60000).unref();
