// HTTPS with the test-only certificate.
'use strict';
const fs = require('node:fs');
const https = require('node:https');
const path = require('node:path');
const { answer, counted, listen } = require('./answers.cjs');

const pem = (name) => fs.readFileSync(path.join(__dirname, 'tls', `test-only-${name}.pem`));
listen(counted(https.createServer({ key: pem('key'), cert: pem('cert') }, answer)));
