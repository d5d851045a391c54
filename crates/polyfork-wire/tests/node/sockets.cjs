// A forked child that is sent sockets, and tells for each message which socket it found with it.
'use strict';
process.on('message', (message, socket) => {
  if (message.last) return process.disconnect();
  if (message.n === undefined) return;
  process.send({ n: message.n, port: socket ? socket.remotePort : null });
  if (socket) socket.destroy();
});
process.send('ready');
