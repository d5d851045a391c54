// The paths that all Node HTTP programs here answer; see README.md for the list.
// Kept apart so that each program shows only its way of listening.
'use strict';
const cluster = require('node:cluster');

let requests = 0;
let connections = 0;

/** Counts the connections that `server` accepts, and lets `/count` tell them. */
exports.counted = (server, event = 'connection') => server.on(event, () => { connections++; });

/** Answers one request. Works for http, https, http2's compatibility API and Express alike. */
exports.answer = (request, response) => {
  const url = new URL(request.url, 'http://localhost');
  const number = (name) => Number(url.searchParams.get(name) ?? 0);
  const body = { pid: process.pid, worker: cluster.worker?.id ?? null, n: ++requests };
  const send = () => {
    response.writeHead(200, { 'content-type': 'application/json' });
    response.end(JSON.stringify(body));
  };
  switch (url.pathname) {
    case '/slow': setTimeout(send, number('ms')); return;
    case '/spin': for (const end = Date.now() + number('ms'); Date.now() < end;); break;
    case '/count': body.connections = connections; break;
    case '/crash': process.exit(number('code'));
    case '/env': body.value = process.env[url.searchParams.get('name')] ?? null; break;
  }
  send();
};

/** Listens where PORT and HOST, or the arguments, say. */
exports.listen = (server) => {
  const port = process.argv[2] ?? process.env.PORT ?? '3000';
  if (/^\d+$/.test(port)) server.listen(Number(port), process.env.HOST);
  else server.listen(port);
  return server;
};
