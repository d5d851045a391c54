// HTTP/2 without TLS (prior knowledge), one session per connection.
'use strict';
const http2 = require('node:http2');
const { answer, counted, listen } = require('./answers.cjs');

listen(counted(http2.createServer(answer), 'session'));
