// The child of fork_node.rs. Ends by itself when its parent disconnects.
process.on('message', (m) => {
  if (m.polyfork === 'request') {
    const sum = m.body.reduce((a, b) => a + b, 0);
    process.send({ ...m, polyfork: 'reply', body: sum });
  } else {
    process.send(`hello ${m.greet}, I am Node ${process.version}`);
  }
});
