// A Node program whose child is written in Rust; see rust_worker_for_node.rs.
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { createServer } from 'node:net';

const worker = process.argv[2] ?? 'target/debug/examples/rust_worker_for_node';
const child = fork('worker', [], { execPath: worker });

child.send({ count_primes: 100000 });
console.log((await once(child, 'message'))[0]);

const server = createServer().listen(0, '127.0.0.1');
await once(server, 'listening');
child.send('serve', server);
console.log((await once(child, 'message'))[0]);
const { port } = server.address();
server.close();
console.log(await (await fetch(`http://127.0.0.1:${port}/`)).text());
child.disconnect();
