// A plain HTTP server, CommonJS.
'use strict';
const http = require('node:http');
const { answer, counted, listen } = require('./answers.cjs');

listen(counted(http.createServer(answer)));
