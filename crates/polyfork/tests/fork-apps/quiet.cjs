// Never listens to messages: it lives as long as its standard input, and tells what happens to its channel.
'use strict';
process.on('disconnect', () => console.log('disconnected'));
process.stdin.resume();
process.send('up');
