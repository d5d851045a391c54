// A primary made of Node's own cluster, told over its channel what to do.
'use strict';
const cluster = require('cluster');

cluster.setupPrimary({ exec: process.argv[2], args: process.argv.slice(3) });
/** Cluster forgets a worker that it asked to leave. */
const processes = new Map();
const tell = (message) => process.connected && process.send(message);

cluster.on('listening', ({ id }, { port, address }) => tell({ event: 'listening', id, port, address }));
cluster.on('exit', ({ id }, code, signal) => tell({ event: 'exit', id, code, signal }));
cluster.on('disconnect', ({ id }) => tell({ event: 'disconnect', id }));
cluster.on('message', ({ id }, message) => tell({ event: 'message', id, message }));

process.on('message', ({ command, id, env, tag, message }) => {
  if (command === 'fork') {
    const worker = cluster.fork(env);
    processes.set(worker.id, worker.process);
    tell({ event: 'forked', id: worker.id, tag });
  } else if (command === 'disconnect') {
    cluster.workers[id].disconnect();
  } else if (command === 'kill') {
    processes.get(id)?.kill('SIGKILL');
  } else if (command === 'send') {
    cluster.workers[id].send(message);
  } else if (command === 'stop') {
    for (const worker of Object.values(cluster.workers)) worker.process.kill('SIGKILL');
    process.exit();
  }
});
process.on('disconnect', () => process.exit());
