// A parent that writes to its child what parents write. The child copies its channel to standard output;
// the texts that are meant go to standard error.
'use strict';
const child_process = require('child_process');
const net = require('net');

const values = [
  'grüße \u{1f600}\u0000\n', '\ud800', 1.5, -0, 1e21, true, null, [], {},
  { cmd: 'NODE_' }, { cmd: 'node_x' }, JSON.parse('{"__proto__":{"a":1}}'),
  { date: new Date(0), buffer: Buffer.from('ab'), map: new Map([[1, 2]]), nan: NaN, gone: undefined },
  9007199254740993, 'x'.repeat(200000),
];
const child = child_process.fork('unused', {
  execPath: '/bin/sh',
  execArgv: ['-c', 'exec cat <&3'],
  stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
});
for (const value of values) {
  child.send(value);
  process.stderr.write(JSON.stringify(value) + '\n');
}
const server = net.createServer();
server.listen(0, '127.0.0.1', () => {
  child.send({ with: 'a server' }, server, () => {
    process.stderr.write('', () => process.exit());
  });
});
