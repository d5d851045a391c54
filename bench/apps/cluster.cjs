// Node's own cluster as its manual shows it; NODE_CLUSTER_SCHED_POLICY picks `rr` (default) or `none`.
'use strict';
const cluster = require('node:cluster');

if (cluster.isPrimary) {
  for (let i = 0; i < Number(process.env.WORKERS); i++) cluster.fork();
} else {
  require('./server.cjs');
}
