// HTTP in all its forms, by WHAT: http, https, h2c, h2. Paths say what to do:
//   /            answers "ok" after a moment        /slow/<ms>   after that long
//   /never       does not answer                    /stream/<ms> head at once, end after that long
//   /keep        answers with an explicit `Connection: keep-alive`, set, as object, flat or as pairs by ?how=
'use strict';
const fs = require('fs');
const path = require('path');

const what = process.env.WHAT || 'http';
const tls = path.join(__dirname, '../../apps/tls');
const pem = (name) => fs.readFileSync(path.join(tls, `test-only-${name}.pem`));

function answer(request, response) {
  process.send?.({ kind: 'request', url: request.url });
  const { pathname, searchParams } = new URL(request.url, 'http://a');
  const [, verb, number] = pathname.split('/');
  const end = (text = 'ok') => {
    response.setHeader('Content-Length', text.length);
    response.end(text);
  };
  switch (verb) {
    case 'never':
      return;
    case 'slow':
      setTimeout(end, Number(number), 'slow');
      return;
    case 'stream':
      response.write('head');
      setTimeout(() => response.end('tail'), Number(number));
      return;
    case 'keep': {
      const how = searchParams.get('how');
      if (how === 'set') {
        response.setHeader('Connection', 'keep-alive');
        return end();
      }
      if (how === 'object') response.writeHead(200, { Connection: 'Keep-Alive', 'Content-Length': 2 });
      if (how === 'message') response.writeHead(200, 'Fine', { connection: 'keep-alive', 'content-length': '2' });
      if (how === 'flat') response.writeHead(200, ['Connection', 'keep-alive', 'Content-Length', '2']);
      if (how === 'pairs') response.writeHead(200, [['Connection', 'keep-alive'], ['Content-Length', '2']]);
      return void response.end('ok');
    }
    case 'leave': // the worker's own wish
      require('cluster').worker.disconnect();
      return void setTimeout(end, 50);
    default:
      setTimeout(end, Math.floor(Math.random() * 4));
  }
}

const secure = { key: pem('key'), cert: pem('cert') };
const make = {
  http: () => require('http').createServer(answer),
  https: () => require('https').createServer(secure, answer),
  h2c: () => require('http2').createServer(answer),
  h2: () => require('http2').createSecureServer({ ...secure, allowHTTP1: true }, answer),
}[what];

const server = make();
server.on('upgrade', (request, socket) => {
  socket.write('HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n');
  socket.on('data', (data) => socket.write(data));
  socket.on('end', () => socket.end());
  socket.on('error', () => {});
});
server.listen(process.env.LISTEN ? JSON.parse(process.env.LISTEN) : { port: 0, host: '127.0.0.1' });

const { worker } = require('cluster');
const look = setInterval(() => {
  if (!worker?.exitedAfterDisconnect) return;
  clearInterval(look);
  if (process.connected) process.send({ kind: 'draining' });
}, 5).unref();
process.on('exit', (code) => fs.writeSync(1, `exit ${code}\n`));
