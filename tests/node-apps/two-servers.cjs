// Two HTTP servers on ports the system chooses; the second listens a while after the first, as one that
// waits for its database does. Tells its ports by message.
'use strict';
const http = require('node:http');

const answer = (request, response) => response.end(`${process.pid}`);
const host = '127.0.0.1';
const first = http.createServer(answer).listen(0, host, () => {
  setTimeout(() => {
    const second = http.createServer(answer).listen(0, host, () => {
      process.send({ ports: [first.address().port, second.address().port] });
    });
  }, 200);
});
