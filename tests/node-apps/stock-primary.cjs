// Node's own primary, to compare with. Forks the program it is given and does what its standard input says,
// a JSON line each: { id, do: 'fork' }, { id, do: 'js', worker, code }. Answers with { id, value } or
// { id, error }. NODE_CLUSTER_SCHED_POLICY is the policy. Ends when its input does.
'use strict';
const cluster = require('node:cluster');
const readline = require('node:readline');

cluster.setupPrimary({ exec: process.argv[2] });
const say = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);

const verbs = {
  fork({ id }) {
    const worker = cluster.fork();
    worker.on('message', ({ call, value, error }) => say({ id: call, value, error }));
    worker.once('online', () => say({ id, value: worker.id }));
  },
  js: ({ id, worker, code }) => cluster.workers[worker].send({ call: id, code }),
};

readline.createInterface({ input: process.stdin })
  .on('line', (line) => {
    const command = JSON.parse(line);
    verbs[command.do](command);
  })
  .on('close', () => process.exit());
