// What stock Node loses when workers are replaced under kept-alive clients, with and without the preload.
//
//   node tests/preload/compare.mjs [--rounds N] [NODE...]
//
// Prints a table and judges nothing. A drain that takes longer than the deadline ends with SIGKILL, as a supervisor's would.
import { execFileSync } from 'node:child_process';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const DEADLINE_MS = 3_000;
const { values, positionals } = parseArgs({
  options: { rounds: { type: 'string', default: '10' }, inside: { type: 'boolean' } },
  allowPositionals: true,
});

if (values.inside) {
  await compare();
} else {
  const nodes = positionals.length > 0 ? positionals : [process.execPath];
  console.log('node      clients       preload  requests  lost  killed at deadline  slowest drain');
  for (const node of nodes) {
    // The Node under test is read from the environment when the helpers are loaded.
    const env = { ...process.env, PRELOAD_TEST_NODE: path.resolve(node) };
    const own = [fileURLToPath(import.meta.url), '--inside', '--rounds', values.rounds];
    execFileSync(process.execPath, own, { env, stdio: 'inherit' });
  }
}

async function compare() {
  const { Cluster, delay, Load, NODE } = await import('./lib.mjs');
  const version = execFileSync(NODE, ['--version'], { encoding: 'utf8' }).trim();
  for (const [name, load] of [
    ['closed loop', { clients: 8 }],
    ['pause 100 ms', { clients: 32, pauseMs: 100 }],
  ]) {
    for (const preload of [false, true]) {
      const cluster = await new Cluster('web.cjs', { preload, workers: 2, policy: 'none' }).start();
      const clients = new Load({ port: cluster.port, host: '127.0.0.1' }, load);
      let killed = 0;
      let slowest = 0;
      for (let round = 0; round < Number(values.rounds); round += 1) {
        await clients.more(100);
        const [old] = cluster.workers.keys();
        await cluster.fork();
        const begin = performance.now();
        const left = cluster.disconnect(old);
        if ((await Promise.race([left, delay(DEADLINE_MS)])) === undefined) {
          killed += 1;
          cluster.kill(old);
          await left;
        }
        slowest = Math.max(slowest, performance.now() - begin);
      }
      const counts = await clients.stop();
      await cluster.stop();
      const cells = [
        version.padEnd(10),
        name.padEnd(14),
        (preload ? 'with' : 'without').padEnd(9),
        String(counts.ok).padEnd(10),
        String(clients.failures).padEnd(6),
        `${killed} of ${values.rounds}`.padEnd(20),
        `${Math.round(slowest)} ms`,
      ];
      console.log(cells.join(''));
    }
  }
}
