// A server as it is written for PM2: says when it is ready, knows its number, and nothing about Polyfork.
const http = require('http');

const server = http.createServer((request, response) => {
  response.end(`shop 1, worker ${process.env.NODE_APP_INSTANCE}, ${process.env.NODE_ENV}\n`);
});

server.listen(Number(process.env.PORT), '127.0.0.1', () => {
  console.log('shop is open');
  process.send('ready');
});
