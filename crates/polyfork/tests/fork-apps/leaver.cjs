// Says what it has to say and ends by itself: no listener keeps it alive.
process.send('ready');
process.send(process.argv.slice(2));
