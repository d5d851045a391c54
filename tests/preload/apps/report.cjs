// Tells all that a program could notice about how it was started, here, in a thread and in a child.
'use strict';
const loaded = [...process.moduleLoadList].sort();
const { fork } = require('child_process');
const http = require('http');
const { isMainThread, parentPort, Worker } = require('worker_threads');

function look() {
  const { POLYFORK_TEST_CHILD, ...env } = process.env;
  // Different in every worker and run.
  for (const name of Object.keys(env)) if (!/^(NODE_|POLYFORK_)/.test(name)) delete env[name];
  const count = (name) => process.listenerCount(name);
  return {
    env,
    argv: process.argv.slice(2),
    execArgv: process.execArgv,
    title: process.title,
    listeners: ['message', 'disconnect', 'exit', 'error', 'uncaughtException', 'warning'].map(count),
    cache: Object.keys(require.cache).map((file) => file.replace(/.*\//, '')),
    globals: Object.getOwnPropertyNames(globalThis).length,
    worker: isMainThread && Object.keys(require('cluster').worker ?? {}).sort().join(),
    handles: process._getActiveHandles().length,
    resources: process.getActiveResourcesInfo?.().sort().join(),
  };
}

if (!isMainThread) {
  parentPort.postMessage(look());
} else if (process.env.POLYFORK_TEST_CHILD) {
  process.send(look());
  process.disconnect();
} else {
  const main = look();
  const once = (emitter) => new Promise((resolve) => emitter.once('message', resolve));
  const file = __filename;
  http.createServer().listen({ port: 0, host: '127.0.0.1' }, async () => {
    const thread = await once(new Worker(file));
    const child = await once(fork(file, { env: { ...process.env, POLYFORK_TEST_CHILD: '1' } }));
    process.send({ kind: 'report', main, thread, child });
    process.send({ kind: 'modules', loaded });
  });
}
