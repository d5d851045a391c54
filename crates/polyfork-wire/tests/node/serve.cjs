// A cluster worker with one server, which says who asked.
'use strict';
const net = require('net');
net.createServer((socket) => socket.end(`you are ${socket.remotePort}`)).listen(18100, '127.0.0.1');
