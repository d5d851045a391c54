// One contender of `cargo xtask bench channel`, for Node and Bun at both ends, or as the child of another parent.
// Usage: channel.cjs MODE ENCODING MILLISECONDS, MODE `oneway` (the child sends as fast as it can) or `echo` (one
// message there and back at a time). Prints one line of JSON: how many, in how many seconds, and the CPU
// time of this side alone. As a child (CHANNEL_BENCH names the mode) it sends or echoes until it is disconnected.
'use strict';
const { fork } = require('node:child_process');

// About 96 bytes as JSON.
const message = (id) => ({ id, name: 'a message of the usual kind', flags: [1, 2, 3], text: 'x'.repeat(20) });

if (process.env.CHANNEL_BENCH) child(process.env.CHANNEL_BENCH);
else parent(...process.argv.slice(2));

function child(mode) {
  process.on('disconnect', () => process.exit(0));
  if (mode === 'echo') return process.on('message', (m) => process.send(m));
  let id = 0;
  const some = () => {
    if (!process.connected) return;
    // As many as are taken at once; the last one says when there is room again.
    for (let i = 0; i < 200; i++) process.send(message(id++));
    process.send(message(id++), some);
  };
  process.on('message', () => some());
}

function parent(mode, serialization, limit) {
  const env = { ...process.env, CHANNEL_BENCH: mode };
  const child = fork(__filename, [], { serialization, env });
  let count = 0, start, cpu;
  const begin = () => { start = performance.now(); cpu = process.cpuUsage(); };
  child.on('message', () => {
    // The first ones warm up.
    if (++count === 1000 && start === undefined) { count = 0; begin(); }
    if (mode === 'echo') child.send(message(count));
    if (start !== undefined && count % 64 === 0 && performance.now() - start >= Number(limit)) {
      const seconds = (performance.now() - start) / 1000;
      const used = process.cpuUsage(cpu);
      console.log(JSON.stringify({ messages: count, seconds, cpu_us: used.user + used.system }));
      child.kill('SIGKILL');
      process.exit(0);
    }
  });
  child.send(mode === 'echo' ? message(0) : 'go');
}
