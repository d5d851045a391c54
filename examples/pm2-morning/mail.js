// No server: it does something now and then until it is told to stop, by message as PM2 has it.
const http = require('http');

const work = setInterval(() => console.log('no new mail'), 1000);
console.log('looking for mail');

// Something to be ready with: where it can be asked how it is.
const server = http.createServer((request, response) => response.end('well\n'));
server.listen(0, '127.0.0.1');

process.on('message', (message) => {
  if (message !== 'shutdown') return;
  console.log('last mail sent');
  clearInterval(work);
  server.close();
  process.disconnect();
});
