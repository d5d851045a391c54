// Express, from where `cargo xtask setup` put it or from EXPRESS_PATH.
'use strict';
const http = require('node:http');
const path = require('node:path');
const { answer, counted, listen } = require('./answers.cjs');

const peers = path.join(__dirname, '../../.peers/npm-express/node_modules/express');
const express = require(process.env.EXPRESS_PATH ?? peers);
const app = express();
app.use((request, response) => answer(request, response));
listen(counted(http.createServer(app)));
