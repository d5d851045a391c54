// What a worker that may end does: the first has something to do and then nothing, the second listens, the third waits for
// a message. Nothing else holds them.
'use strict';

switch (process.env.NODE_APP_INSTANCE) {
  case '0':
    setTimeout(() => {}, 20);
    break;
  case '1':
    require('http').createServer((_, response) => response.end('here')).listen(0, '127.0.0.1');
    break;
  default:
    process.on('message', () => process.exit(5));
}
