// One contender of `cargo xtask bench threads`: tasks given to piscina, the worker pool of Node programs.
// Usage: piscina.cjs PISCINA WORK PRODUCERS MODE MILLISECONDS; PISCINA is the package's folder, WORK `empty` or `20us`,
// MODE `rate` (each producer has 256 tasks under way) or `latency` (one at a time). Prints one line of JSON.
// In a worker it is the task itself.
'use strict';
const { isMainThread } = require('node:worker_threads');
const { availableParallelism } = require('node:os');

// Work of a fixed amount.
const steps = (number) => {
  let state = 1;
  for (let i = 0; i < number; i++) state = (Math.imul(state, 1664525) + 1013904223) | 0;
  return state;
};

module.exports = steps;
if (isMainThread) main(...process.argv.slice(2));

// How many steps take 20 µs here, by the quickest of several tries.
function stepsOf20us() {
  let quickest = Infinity;
  for (let i = 0; i < 50; i++) {
    const begin = performance.now();
    steps(100_000);
    quickest = Math.min(quickest, performance.now() - begin);
  }
  return Math.round(100_000 * 0.02 / quickest);
}

async function main(folder, work, producers, mode, limit) {
  const { Piscina } = require(folder);
  const threads = availableParallelism();
  const pool = new Piscina({ filename: __filename, minThreads: threads, maxThreads: threads });
  const number = work === 'empty' ? 0 : stepsOf20us();
  const window = mode === 'rate' ? 256 : 1;
  const times = [];
  let tasks = 0;
  const produce = async (until) => {
    for (;;) {
      const begin = performance.now();
      if (begin >= until) return;
      if (window === 1) await pool.run(number);
      else await Promise.all(Array.from({ length: window }, () => pool.run(number)));
      tasks += window;
      if (window === 1) times.push(performance.now() - begin);
    }
  };
  const round = async (ms) => {
    const until = performance.now() + ms;
    await Promise.all(Array.from({ length: Number(producers) }, () => produce(until)));
  };
  await round(limit / 5); // warms up
  tasks = times.length = 0;
  const begin = performance.now();
  const cpu = process.cpuUsage();
  await round(Number(limit));
  const seconds = (performance.now() - begin) / 1000;
  const used = process.cpuUsage(cpu);
  times.sort((a, b) => a - b);
  const quantile = (q) => (times[Math.round((times.length - 1) * q)] ?? 0) * 1000;
  console.log(JSON.stringify({
    tasks, seconds, cpu_us: used.user + used.system, p50_us: quantile(0.5), p99_us: quantile(0.99),
  }));
  await pool.destroy();
}
