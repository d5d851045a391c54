// An ordinary Node server that knows nothing of clusters. `node server.js` runs it alone; `polyfork run
// server.js` and the example node_primary.rs run it on every core, as it is.
'use strict';
const http = require('node:http');

let greeting = 'hello';
let served = 0;

const server = http.createServer((request, response) => {
  served++;
  response.end(`${greeting} from process ${process.pid}\n`);
});
server.listen(Number(process.env.PORT ?? 3000), '127.0.0.1');

// What any program that was started by `child_process.fork` may do.
process.on('message', (message) => {
  if (typeof message.greeting === 'string') greeting = message.greeting;
  if (message.question === 'served') process.send?.({ pid: process.pid, served });
});
