// A program that does what it is sent: each message { call, code } is the body of an async function,
// whose result goes back as { call, value } or { call, error }. Knows nothing of who its parent is.
//
// The body sees the modules below, `keep` (an object that lives as long as the process), `handle` (what
// came with the message) and a few helpers.
'use strict';
const cluster = require('node:cluster');
const dgram = require('node:dgram');
const { once } = require('node:events');
const fs = require('node:fs');
const http = require('node:http');
const http2 = require('node:http2');
const https = require('node:https');
const net = require('node:net');
const path = require('node:path');
const tls = require('node:tls');

const AsyncFunction = (async () => {}).constructor;
const pem = (name) => fs.readFileSync(path.join(__dirname, '../apps/tls', `test-only-${name}.pem`));

const scope = {
  cluster, dgram, fs, http, http2, https, net, path, process, require, setImmediate, setTimeout, tls,
  once,
  keep: {},
  /** Key and certificate for localhost. */
  secret: () => ({ key: pem('key'), cert: pem('cert') }),
  /** Listens (or binds) and gives the server's address once it does; rejects with its error. */
  async listen(server, ...where) {
    const began = once(server, 'listening'); // `once` rejects when the server emits an error
    if (typeof server.bind === 'function') server.bind(...where);
    else server.listen(...where);
    await began;
    return server.address();
  },
  /** Closes and waits for the end of it. */
  close: (server) => new Promise((resolve) => server.close(() => resolve(true))),
  /** An HTTP request handler that counts and names its worker. */
  counter() {
    const handler = (request, response) => {
      handler.requests++;
      response.end(`${cluster.worker.id}`);
    };
    handler.requests = 0;
    return handler;
  },
  /** A TCP connection handler that greets with the worker's id and ends. */
  greeter() {
    const handler = (socket) => {
      handler.connections++;
      socket.on('error', () => {});
      socket.end(`${cluster.worker.id}`);
    };
    handler.connections = 0;
    return handler;
  },
  /** All that a socket receives, as text. */
  async text(stream) {
    let text = '';
    stream.setEncoding('utf8');
    for await (const part of stream) text += part;
    return text;
  },
};

process.on('message', async (message, handle) => {
  if (typeof message?.call !== 'number') return;
  const { call, code } = message;
  const reply = (body) => {
    if (process.connected) process.send({ call, ...body });
  };
  try {
    const names = ['handle', ...Object.keys(scope)];
    const value = await new AsyncFunction(...names, code)(handle, ...Object.values(scope));
    reply({ value: value === undefined ? null : value });
  } catch (error) {
    const { name, message: text, code: errorCode, syscall, address, port } = error;
    reply({ error: { name, text, code: errorCode, syscall, address, port } });
  }
});
