// A worker whose primary is gone, by SIGKILL or by its own wish.
import assert from 'node:assert/strict';
import dgram from 'node:dgram';
import { once } from 'node:events';
import fs from 'node:fs';
import http2 from 'node:http2';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import test from 'node:test';

import { bindAtOnce, Cluster, delay, Http1, MAJOR, within } from './lib.mjs';

async function withCluster(app, options, body) {
  const cluster = new Cluster(app, options);
  try {
    await cluster.start();
    return await body(cluster);
  } finally {
    await cluster.stop();
  }
}

/** Sends `count` requests for `path` and waits until a worker has all of them. */
async function requests(cluster, count, path, options) {
  const connections = [];
  for (let n = 0; n < count; n += 1) {
    const connection = await new Http1({ port: cluster.port, host: '127.0.0.1' }, options).connect();
    connection.write(`GET ${path} HTTP/1.1\r\nHost: a\r\n\r\n`);
    connections.push(connection);
  }
  const seen = () => cluster.messages.filter(({ message }) => message.kind === 'request').length;
  while (seen() < count) await cluster.next('message');
  return connections;
}

for (const [what, policy] of [['http', 'rr'], ['http', 'none'], ['https', 'none'], ['h2', 'none']]) {
  test(`ten requests in flight are finished and the port is free at once (${what}, ${policy})`, (t) => {
    if (what === 'h2' && MAJOR === 18) return t.skip('Node 18 does not track HTTP/1 on an HTTP/2 server');
    return withCluster('web.cjs', { policy, workers: 2, lingerMs: 100, env: { WHAT: what } }, async (cluster) => {
      const connections = await requests(cluster, 10, '/slow/1000', { secure: what !== 'http' });
      await cluster.killPrimary();
      await free(cluster.port);
      assert.ok(!cluster.lines.includes('exit 0'), 'free because the workers were gone');
      const answers = await Promise.all(connections.map((connection) => connection.answer()));
      assert.equal(answers.filter((answer) => answer?.body === 'slow').length, 10);
      assert.ok(answers.every(({ headers }) => headers.connection === 'close'));
      await within(cluster.gone, 'workers stay');
      assert.deepEqual(cluster.lines, ['exit 0', 'exit 0'], cluster.stderr);
      t.diagnostic(`${t.name}: 10 of 10`);
    });
  });
}

/** The worker hears of the end of its primary a moment after it. */
async function free(port) {
  await within(
    (async () => {
      for (;;) {
        try {
          return await bindAtOnce(port);
        } catch (error) {
          if (error.code !== 'EADDRINUSE') throw error;
          await delay(1);
        }
      }
    })(),
    'the port stays taken',
  );
}

for (const what of ['h2c', 'h2']) {
  test(`HTTP/2 streams in flight are finished (${what})`, () =>
    withCluster('web.cjs', { policy: 'none', lingerMs: 100, env: { WHAT: what } }, async (cluster) => {
      const url = `${what === 'h2' ? 'https' : 'http'}://127.0.0.1:${cluster.port}`;
      const session = http2.connect(url, { rejectUnauthorized: false });
      session.on('error', () => {});
      const bodies = Array.from({ length: 10 }, async () => {
        let body = '';
        const stream = session.request({ ':path': '/slow/800' }).setEncoding('utf8');
        stream.on('data', (text) => (body += text));
        await once(stream, 'end');
        return body;
      });
      const seen = () => cluster.messages.filter(({ message }) => message.kind === 'request').length;
      while (seen() < 10) await cluster.next('message');
      await cluster.killPrimary();
      assert.deepEqual(await within(Promise.all(bodies), 'streams hang'), Array(10).fill('slow'));
      await within(cluster.gone, 'worker stays');
      assert.deepEqual(cluster.lines, ['exit 0'], cluster.stderr);
    }));
}

test('worker with nothing in hand leaves', () =>
  withCluster('web.cjs', { workers: 2 }, async (cluster) => {
    await cluster.killPrimary();
    await within(cluster.gone, 'workers stay');
    assert.deepEqual(cluster.lines, ['exit 0', 'exit 0'], cluster.stderr);
  }));

test('idle kept-alive connection is given the linger time', () =>
  withCluster('web.cjs', { lingerMs: 1_500 }, async (cluster) => {
    const [connection] = await requests(cluster, 1, '/');
    await connection.answer();
    await cluster.killPrimary();
    await delay(200);
    connection.write();
    assert.equal((await connection.answer())?.headers.connection, 'close');
    await within(cluster.gone, 'worker stays');
    assert.deepEqual(cluster.lines, ['exit 0']);
  }));

test('grace period ends what does not end', () =>
  withCluster('web.cjs', { graceMs: 500 }, async (cluster) => {
    const [connection] = await requests(cluster, 1, '/never');
    await cluster.killPrimary();
    await within(cluster.gone, 'worker stays');
    assert.deepEqual(cluster.lines, ['exit 0']);
    await connection.ended;
  }));

test('primary that dies during a drain changes nothing for the requests', () =>
  withCluster('web.cjs', { lingerMs: 100 }, async (cluster) => {
    const connections = await requests(cluster, 3, '/slow/800');
    cluster.disconnect(1).catch(() => {});
    await cluster.draining();
    await cluster.killPrimary();
    for (const connection of connections) assert.equal((await connection.answer())?.body, 'slow');
    await within(cluster.gone, 'worker stays');
    assert.deepEqual(cluster.lines, ['exit 0'], cluster.stderr);
  }));

test('work of the program after its last answer does not hold it', () =>
  withCluster('events.cjs', { env: { BUSY: '1' } }, async (cluster) => {
    await cluster.killPrimary();
    await within(cluster.gone, 'worker stays');
    assert.equal(cluster.lines.at(-1), 'exit 0');
  }));

test('listeners of the program are called', () =>
  withCluster('events.cjs', {}, async (cluster) => {
    await cluster.killPrimary();
    await within(cluster.gone, 'worker stays');
    assert.deepEqual(
      cluster.lines,
      ['worker disconnect undefined', 'process disconnect', 'exit 0'],
      cluster.stderr,
    );
  }));

for (const preload of [true, false]) {
  test(`program that disconnects itself exits at once (${preload ? 'with' : 'without'} the preload)`, () =>
    withCluster('events.cjs', { preload }, async (cluster) => {
      const connection = await new Http1({ port: cluster.port }).connect();
      connection.write('GET /never HTTP/1.1\r\nHost: a\r\n\r\n');
      await cluster.message('request');
      const left = cluster.workers.get(1);
      cluster.send(1, 'disconnect yourself');
      assert.equal((await left).code, 0);
      assert.deepEqual(cluster.lines, ['worker disconnect undefined', 'exit 0'], cluster.stderr);
      await within(connection.ended, 'not cut');
    }));
}

test('error thrown by a listener of the program is the end, as ever', () =>
  withCluster('events.cjs', { env: { THROWS: '1' } }, async (cluster) => {
    await cluster.killPrimary();
    await within(cluster.gone, 'worker stays');
    assert.equal(cluster.lines.at(-1), 'exit 1', cluster.stderr);
    assert.match(cluster.stderr, /thrown by the program/);
  }));

test('program that sends with every request is not ended by it', () =>
  withCluster('web.cjs', { lingerMs: 500, env: { ALWAYS_SENDS: '1' } }, async (cluster) => {
    const [slow] = await requests(cluster, 1, '/slow/1000');
    // Keeps the worker sending while its primary dies.
    const busy = await new Http1({ port: cluster.port }).connect();
    busy.write();
    await busy.answer();
    const killed = cluster.killPrimary();
    for (let answer; !/close/.test(answer?.headers.connection); ) {
      busy.write();
      answer = await busy.answer();
      assert.ok(answer, cluster.stderr);
    }
    await killed;
    assert.equal((await slow.answer())?.body, 'slow', cluster.stderr);
    await within(cluster.gone, 'worker stays');
    assert.deepEqual(cluster.lines, ['exit 0'], cluster.stderr);
  }));

test('UDP port and Unix path are free at once too', async () => {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'preload-'));
  const listen = path.join(folder, 'socket');
  try {
    await withCluster('udp-unix.cjs', { env: { LISTEN: listen } }, async (cluster) => {
      const { port } = await cluster.message('udp');
      const client = net.connect(listen).setEncoding('utf8');
      client.write('GET / HTTP/1.1\r\nHost: a\r\n\r\n');
      await cluster.message('request');
      await cluster.killPrimary();
      await within(
        (async () => {
          for (let bound = false; !bound; ) {
            const socket = dgram.createSocket('udp4').bind(port, '127.0.0.1');
            bound = await Promise.race([
              once(socket, 'listening').then(() => true),
              once(socket, 'error').then(() => delay(1)).then(() => false),
            ]).catch(() => false);
            if (bound) socket.close();
          }
        })(),
        'the UDP port stays taken',
      );
      const refused = net.connect(listen);
      assert.match((await once(refused, 'error'))[0].code, /ECONNREFUSED|ENOENT/);
      let text = '';
      client.on('data', (data) => (text += data));
      await within(once(client, 'end'), 'no answer');
      assert.match(text, /unix/);
      await within(cluster.gone, 'worker stays');
      assert.deepEqual(cluster.lines, ['exit 0'], cluster.stderr);
    });
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
});
