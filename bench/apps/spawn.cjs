// One contender of `cargo xtask bench spawn`, for Node and Bun: the same work and the same line of JSON as
// crates/polyfork-sys/examples/spawn_bench.rs. Usage: spawn.cjs SHAPE MIB MILLISECONDS
'use strict';
const { spawn } = require('node:child_process');
const [shape, mib, limit] = process.argv.slice(2);
const stdio = {
  plain: 'ignore',
  channel: ['pipe', 'pipe', 'pipe', 'ipc', 'pipe', 'pipe'],
}[shape];
if (!stdio) throw new Error(`no shape "${shape}": plain or channel`);

// Touched, so that the pages are there; in pieces, as no buffer may be larger.
const memory = [];
for (let left = Number(mib); left > 0; left -= 64) {
  memory.push(Buffer.alloc(Math.min(left, 64) << 20, 1));
}

const blocked = [];
let start;
function next() {
  if (start !== undefined && performance.now() - start >= Number(limit)) return done();
  const before = performance.now();
  const child = spawn('/bin/true', { stdio });
  const took = performance.now() - before;
  child.on('error', (error) => { throw error; });
  child.on('exit', () => {
    // The first one warms up.
    if (start === undefined) start = performance.now();
    else blocked.push(took);
    next();
  });
}
function done() {
  const seconds = (performance.now() - start) / 1000;
  blocked.sort((a, b) => a - b);
  const median = blocked.length ? blocked[blocked.length >> 1] * 1000 : 0;
  console.log(JSON.stringify({ spawns: blocked.length, seconds, blocked_us: Math.round(median) }));
  if (memory.length < 0) console.log(memory);
  process.exit(0);
}
next();
