// A forked child with serialization 'advanced'. First it sends what JavaScript has to offer, then it sends back
// whatever it is sent; of a message with a socket, which port that is connected to.
'use strict';
const cyclic = { map: new Map(), list: [] };
cyclic.map.set(cyclic, cyclic.list);
cyclic.list.push(cyclic.map, cyclic);
const error = new RangeError('grüße', { cause: new Map([[1, /€/u]]) });
error.stack = 'somewhere';
const named = [1, 2];
named.name = 'x';
const gaps = [1, , 3];
const far = [];
far[1000] = 'x';
const shared = Buffer.from('shared');
const bytes = Uint8Array.from({ length: 16 }, (_, i) => i).buffer;
const views = [
  Int8Array, Uint8Array, Uint8ClampedArray, Int16Array, Uint16Array, Int32Array, Uint32Array,
  Float32Array, Float64Array, BigInt64Array, BigUint64Array, DataView,
].map((View) => new View(bytes));
if (typeof Float16Array === 'function') views.push(new Float16Array(bytes));
class Point {
  #hidden = 1;
  constructor() { this.x = 1; }
}
const samples = [
  null, true, 0, -1, 2 ** 31, 1.5, -0, NaN, Infinity, '', 'text', 'grüße', '€', '\ud800', '😀',
  [undefined, 0n, -5n, 2n ** 64n, -(2n ** 200n)],
  {}, { 1: 2, a: 3, 4294967294: 4, '€': '€', '': { deep: [[[]]] } },
  [1, 2, 3], [1.5, 2], named, gaps, far, [], [[undefined, null]],
  new Date(5), new Date(NaN), new Map([[1, 2], ['a', new Set([1, {}])]]), new Set(),
  /a+/dgimsuy, error, new TypeError('t', { cause: 'plain' }), Object.assign(new Error(''), { stack: '' }),
  [Object(true), Object(false), Object(1), Object(5n), Object('x')],
  new ArrayBuffer(3), views, shared, [shared, shared, { shared }], Buffer.alloc(100000, 'x'),
  cyclic, new Point(), { cmd: 'NODE_' }, 'x'.repeat(100000), '€'.repeat(100000),
];
process.on('message', (message, socket) => {
  if (message.last) return process.disconnect();
  if (!socket) return process.send(message);
  process.send({ message, port: socket.remotePort });
  socket.destroy();
});
for (const sample of samples) process.send(sample);
process.send('end of samples');
