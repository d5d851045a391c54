// The program every Node row of the benchmark runs, unmodified: alone, under Node's cluster, PM2 and polyfork.
//
// `/` answers the fixed body that the Rust servers answer too; `/count` tells how many connections this
// process has accepted; `/hold?ms=N` keeps it busy, so that the harness can reach its siblings.
// STALL=1 lets the worker numbered 1 block its event loop for 50 ms every 500 ms.
'use strict';
const cluster = require('node:cluster');
const http = require('node:http');

const BODY = Buffer.from('hello from one of many\n');
const STALL_MS = 50;
const STALL_EVERY_MS = 500;

const worker = Number(process.env.BENCH_WORKER ?? cluster.worker?.id ?? 0);
let connections = 0;

const busy = (ms) => { for (const end = performance.now() + ms; performance.now() < end;); };

const server = http.createServer((request, response) => {
  let body = BODY;
  if (request.url === '/count') {
    body = Buffer.from(JSON.stringify({ pid: process.pid, worker, connections }));
  } else if (request.url.startsWith('/hold')) {
    busy(Number(request.url.split('=')[1]));
  }
  response.writeHead(200, { 'content-type': 'text/plain; charset=utf-8', 'content-length': body.length });
  response.end(body);
});
server.on('connection', () => { connections++; });
server.listen({
  port: Number(process.env.PORT), host: '127.0.0.1', reusePort: Boolean(process.env.REUSE_PORT),
}, () => console.log('listening'));

if (process.env.STALL && worker === 1) setInterval(busy, STALL_EVERY_MS, STALL_MS);
