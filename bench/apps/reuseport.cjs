// Plain reuse-port: independent processes that bind the same port, as nginx does (Node 22.12 or later).
'use strict';
const { spawn } = require('node:child_process');
const path = require('node:path');

const program = path.join(__dirname, 'server.cjs');
for (let worker = 1; worker <= Number(process.env.WORKERS); worker++) {
  const env = { ...process.env, REUSE_PORT: '1', BENCH_WORKER: String(worker) };
  spawn(process.execPath, [program], { env, stdio: 'inherit' });
}
