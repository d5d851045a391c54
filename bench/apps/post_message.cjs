// One contender of `cargo xtask bench threads`, for Node and Bun: messages between the main thread and a worker.
// Usage: post_message.cjs MODE MILLISECONDS; MODE is `oneway` (the worker posts as fast as it can and never has more than
// 16,384 messages under way), `echo` (one message there and back at a time) or `atomics` (a word in shared memory there and
// back, with Atomics.wait and notify). Prints one line of JSON: how many a second.
'use strict';
const { Worker, isMainThread, parentPort, workerData } = require('node:worker_threads');

const BATCH = 2048;
const WINDOW = 8;
// About 96 bytes.
const message = (id) => ({ id, name: 'a message of the usual kind', flags: [1, 2, 3], text: 'x'.repeat(20) });

if (isMainThread) main(...process.argv.slice(2));
else worker(workerData);

function worker({ mode, memory }) {
  if (mode === 'echo') return parentPort.on('message', (m) => parentPort.postMessage(m));
  if (mode === 'atomics') return pong(new Int32Array(memory));
  let id = 0;
  // Each message from the parent is leave for another batch.
  parentPort.on('message', () => {
    for (let i = 0; i < BATCH; i++) parentPort.postMessage(message(id++));
  });
}

function main(mode, limit) {
  const memory = new SharedArrayBuffer(8);
  const worker = new Worker(__filename, { workerData: { mode, memory } });
  const words = new Int32Array(memory);
  if (mode === 'atomics') return worker.on('online', () => ping(words, Number(limit)));
  const warmUp = mode === 'echo' ? 200 : 10_000;
  let count = 0, start;
  worker.on('message', () => {
    count++;
    if (start === undefined && count === warmUp) { count = 0; start = performance.now(); }
    if (mode === 'echo') worker.postMessage(message(count));
    else if (count % BATCH === 0) worker.postMessage(0);
    if (start !== undefined && count % 64 === 0 && performance.now() - start >= limit) tell(count, start);
  });
  for (let i = 0; i < (mode === 'echo' ? 1 : WINDOW); i++) worker.postMessage(message(0));
}

// Word 0 is the main thread's turn number, word 1 the worker's answer.
function pong(words) {
  for (let turn = 1; ; turn++) {
    while (Atomics.load(words, 0) < turn) Atomics.wait(words, 0, turn - 1);
    Atomics.store(words, 1, turn);
    Atomics.notify(words, 1);
  }
}

function ping(words, limit) {
  const warmUp = 200;
  let start;
  for (let turn = 1; ; turn++) {
    Atomics.store(words, 0, turn);
    Atomics.notify(words, 0);
    while (Atomics.load(words, 1) < turn) Atomics.wait(words, 1, turn - 1);
    if (turn === warmUp) start = performance.now();
    if (turn % 64 === 0 && turn > warmUp && performance.now() - start >= limit) return tell(turn - warmUp, start);
  }
}

function tell(count, start) {
  const seconds = (performance.now() - start) / 1000;
  console.log(JSON.stringify({ rate: Math.round(count / seconds) }));
  process.exit(0);
}
