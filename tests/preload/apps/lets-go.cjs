// Does not want to be held by its channel.
'use strict';
const server = require('http').createServer().listen({ port: 0, host: '127.0.0.1' }, () => {
  // After `listening` is told, which is sent from an earlier listener of the same event.
  setTimeout(() => {
    process.channel.unref();
    server.close();
  }, 50);
});
