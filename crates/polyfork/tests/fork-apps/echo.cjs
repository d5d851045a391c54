// Sends back everything it gets.
process.on('message', (m) => process.send(m));
