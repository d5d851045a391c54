// Closes its server and stays, as a worker does.
'use strict';
const server = require('http').createServer().listen({ port: 0, host: '127.0.0.1' }, () => {
  setTimeout(() => server.close(() => process.send({ kind: 'closed' })), 50);
});
