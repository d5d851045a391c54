// A worker that is asked to leave, with clients on it.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import http2 from 'node:http2';
import test from 'node:test';

import { Cluster, delay, Http1, Load, MAJOR, ROUNDS, within } from './lib.mjs';

/** Runs `body` with a cluster, and ends it whatever happens. */
async function withCluster(app, options, body) {
  const cluster = new Cluster(app, options);
  try {
    await cluster.start();
    return await body(cluster);
  } finally {
    await cluster.stop();
  }
}

async function replaceUnderLoad(t, options, load = {}) {
  await withCluster('web.cjs', { workers: 2, lingerMs: 200, ...options }, async (cluster) => {
    const clients = new Load({ port: cluster.port, host: '127.0.0.1' }, load);
    const codes = [];
    for (let round = 0; round < ROUNDS; round += 1) {
      await clients.more(50);
      codes.push((await cluster.replace()).code);
    }
    await clients.more(50);
    const counts = await clients.stop();
    t.diagnostic(`${t.name}: ${ROUNDS} replaced: ${JSON.stringify(counts)}`);
    assert.equal(clients.failures, 0, JSON.stringify(counts));
    assert.deepEqual(codes, Array(ROUNDS).fill(0));
  });
}

for (const policy of ['rr', 'none']) {
  test(`closed loop over kept-alive http loses nothing (${policy})`, (t) => replaceUnderLoad(t, { policy }));
}

test('closed loop over kept-alive https loses nothing', (t) =>
  replaceUnderLoad(t, { policy: 'none', env: { WHAT: 'https' } }, { secure: true, clients: 4 }));

test('HTTP/1 on an HTTP/2 server loses nothing', (t) =>
  replaceUnderLoad(t, { policy: 'none', env: { WHAT: 'h2' } }, { secure: true, clients: 4 }));

test('clients that pause between requests lose nothing', (t) =>
  replaceUnderLoad(t, { policy: 'none', lingerMs: 2_000 }, { clients: 16, pauseMs: 100 }));

for (const [what, secure] of [['http', false], ['https', true], ['h2', true]]) {
  test(`idle connection is closed after the linger time and the worker ends (${what})`, (t) => {
    if (what === 'h2' && MAJOR === 18) return t.skip('Node 18 does not track HTTP/1 on an HTTP/2 server');
    return withCluster('web.cjs', { lingerMs: 100, env: { WHAT: what } }, async (cluster) => {
      const used = await new Http1({ port: cluster.port }, { secure }).connect();
      used.write();
      assert.equal((await used.answer()).status, 200);
      const fresh = await new Http1({ port: cluster.port }, { secure }).connect();
      const { code } = await cluster.disconnect(1);
      assert.equal(code, 0);
      await within(Promise.all([used.ended, fresh.ended]), 'not closed');
    });
  });
}

test('thousand idle connections are closed', () =>
  withCluster('web.cjs', { lingerMs: 100 }, async (cluster) => {
    const connect = () => new Http1({ port: cluster.port, host: '127.0.0.1' }).connect();
    const connections = [];
    for (let n = 0; n < 1_000; n += 1) connections.push(await connect());
    assert.equal((await cluster.disconnect(1)).code, 0);
    await within(Promise.all(connections.map(({ ended }) => ended)), 'not closed');
  }));

test('request within the linger time is answered, with close', () =>
  withCluster('web.cjs', { lingerMs: 5_000 }, async (cluster) => {
    const used = await new Http1({ port: cluster.port }).connect();
    used.write();
    assert.doesNotMatch((await used.answer()).headers.connection, /close/i);
    const fresh = await new Http1({ port: cluster.port }).connect();
    await delay(100); // handed to the worker
    const left = cluster.disconnect(1);
    await cluster.draining();
    for (const connection of [used, fresh]) {
      connection.write();
      const answer = await connection.answer();
      assert.equal(answer?.status, 200);
      assert.match(answer.headers.connection, /close/i);
      await within(connection.ended, 'not closed');
    }
    assert.equal((await left).code, 0);
  }));

test('answer in hand when the drain begins says close', () =>
  withCluster('web.cjs', {}, async (cluster) => {
    const connection = await new Http1({ port: cluster.port }).connect();
    connection.write('GET /slow/300 HTTP/1.1\r\nHost: a\r\n\r\n');
    await cluster.message('request');
    const left = cluster.disconnect(1);
    const answer = await connection.answer();
    assert.deepEqual([answer.body, answer.headers.connection], ['slow', 'close']);
    assert.equal((await left).code, 0);
  }));

test('answer that has begun is finished', () =>
  withCluster('web.cjs', { lingerMs: 50 }, async (cluster) => {
    const connection = await new Http1({ port: cluster.port }).connect();
    connection.write('GET /stream/600 HTTP/1.1\r\nHost: a\r\n\r\n');
    await cluster.message('request');
    const left = cluster.disconnect(1);
    assert.equal((await connection.answer()).body, 'headtail');
    assert.equal((await left).code, 0);
  }));

test('request that is still coming in is waited for', () =>
  withCluster('web.cjs', { lingerMs: 50 }, async (cluster) => {
    const connection = await new Http1({ port: cluster.port }).connect();
    connection.write('GET / HT');
    await delay(100);
    const left = cluster.disconnect(1);
    await cluster.draining();
    await delay(300); // longer than the linger time
    connection.write('TP/1.1\r\nHost: a\r\n\r\n');
    assert.equal((await connection.answer())?.status, 200);
    assert.equal((await left).code, 0);
  }));

test('pipelined requests are all answered', () =>
  withCluster('web.cjs', {}, async (cluster) => {
    const connection = await new Http1({ port: cluster.port }).connect();
    const get = (path) => `GET ${path} HTTP/1.1\r\nHost: a\r\n\r\n`;
    connection.write(get('/slow/300') + get('/slow/100'));
    await cluster.next('message', ({ message }) => message.url === '/slow/100');
    const left = cluster.disconnect(1);
    await cluster.draining();
    connection.write(get('/slow/1') + get('/slow/2'));
    const answers = [];
    for (let n = 0; n < 4; n += 1) answers.push((await connection.answer())?.status);
    assert.deepEqual(answers, [200, 200, 200, 200]);
    assert.equal((await left).code, 0);
  }));

for (const how of ['set', 'object', 'message', 'flat', 'pairs']) {
  test(`explicit keep-alive of the program becomes close (${how})`, (t) =>
    withCluster('web.cjs', { lingerMs: 5_000 }, async (cluster) => {
      const get = `GET /keep?how=${how} HTTP/1.1\r\nHost: a\r\n\r\n`;
      const connection = await new Http1({ port: cluster.port }).connect();
      connection.write(get);
      const before = await connection.answer();
      if (how === 'pairs' && before === undefined) return t.skip('not known to this Node');
      assert.match(before.headers.connection, /keep-alive/i);
      const left = cluster.disconnect(1);
      await cluster.draining();
      connection.write(get);
      const answer = await connection.answer();
      assert.deepEqual([answer.status, answer.headers.connection, answer.body], [200, 'close', 'ok']);
      assert.equal((await left).code, 0);
    }));
}

test('worker that leaves by itself drains the same way', () =>
  withCluster('web.cjs', { lingerMs: 100 }, async (cluster) => {
    const idle = await new Http1({ port: cluster.port }).connect();
    idle.write();
    await idle.answer();
    const connection = await new Http1({ port: cluster.port }).connect();
    connection.write('GET /leave HTTP/1.1\r\nHost: a\r\n\r\n');
    assert.equal((await connection.answer()).headers.connection, 'close');
    assert.equal((await cluster.workers.get(1)).code, 0);
  }));

test('upgraded connection is left alone', () =>
  withCluster('web.cjs', { lingerMs: 50 }, async (cluster) => {
    const connection = await new Http1({ port: cluster.port }).connect();
    connection.write('GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n');
    while (!connection.text.includes('\r\n\r\n')) await once(connection.socket, 'progress');
    const left = cluster.disconnect(1);
    await cluster.draining();
    await delay(300); // longer than the linger time
    connection.text = '';
    connection.write('still there');
    await within(once(connection.socket, 'progress'), 'cut');
    assert.equal(connection.text, 'still there');
    connection.close();
    assert.equal((await left).code, 0);
  }));

test('server bound by the worker itself is closed too', () =>
  withCluster('exclusive.cjs', { lingerMs: 100 }, async (cluster) => {
    const { port } = await cluster.message('exclusive');
    const connection = await new Http1({ port }).connect();
    connection.write();
    assert.equal((await connection.answer()).status, 200);
    const { code } = await cluster.disconnect(1);
    assert.equal(code, 0);
  }));

test("worker that leaves by itself keeps its own server, as in stock Node", () =>
  withCluster('exclusive.cjs', { lingerMs: 50 }, async (cluster) => {
    const { port } = await cluster.message('exclusive');
    cluster.send(1, 'leave');
    await cluster.next('disconnect');
    const connection = await new Http1({ port }).connect();
    for (let n = 0; n < 3; n += 1) {
      await delay(100); // longer than the linger time
      connection.write();
      const answer = await connection.answer();
      assert.equal(answer?.status, 200);
      assert.doesNotMatch(answer.headers.connection, /close/i);
    }
  }));

// ---- HTTP/2 ----------------------------------------------------------------------------------------------

function get(session, path) {
  return new Promise((resolve, reject) => {
    const stream = session.request({ ':path': path });
    let body = '';
    stream.setEncoding('utf8').on('data', (text) => (body += text));
    stream.on('end', () => resolve(body)).on('error', reject);
  });
}

for (const what of ['h2c', 'h2']) {
  const url = (port) => `${what === 'h2' ? 'https' : 'http'}://127.0.0.1:${port}`;

  test(`streams in hand finish and idle sessions go (${what})`, () =>
    withCluster('web.cjs', { lingerMs: 200, env: { WHAT: what } }, async (cluster) => {
      const connect = async () => {
        const session = http2.connect(url(cluster.port), { rejectUnauthorized: false });
        session.on('error', () => {});
        await once(session, 'connect');
        return session;
      };
      const [idle, used] = [await connect(), await connect()];
      assert.equal(await get(idle, '/'), 'ok');
      const answers = [get(used, '/slow/400'), get(used, '/slow/600')];
      await cluster.next('message', ({ message }) => message.url === '/slow/600');
      const goaway = once(used, 'goaway');
      const ended = [once(idle, 'close'), once(used, 'close')];
      const left = cluster.disconnect(1);
      assert.equal((await within(goaway, 'no GOAWAY'))[0], 0);
      assert.deepEqual(await Promise.all(answers), ['slow', 'slow']);
      await within(Promise.all(ended), 'session not closed');
      assert.equal((await left).code, 0);
    }));

  test(`one stream after another loses nothing (${what})`, (t) =>
    withCluster('web.cjs', { workers: 2, lingerMs: 500, env: { WHAT: what } }, async (cluster) => {
      const counts = { ok: 0, failed: 0, sessions: 0 };
      let stop = false;
      const loops = Array.from({ length: 4 }, async () => {
        let session;
        while (!stop) {
          if (!session || session.closed || session.destroyed) {
            session = http2.connect(url(cluster.port), { rejectUnauthorized: false });
            session.on('error', () => {});
            await once(session, 'connect');
            counts.sessions += 1;
          }
          try {
            assert.equal(await within(get(session, '/'), 'stream hangs'), 'ok');
            counts.ok += 1;
          } catch (error) {
            counts.failed += 1;
            counts.error = error.message;
          }
        }
        session.destroy();
      });
      for (let round = 0; round < ROUNDS; round += 1) {
        const until = counts.ok + 50;
        while (counts.ok < until) await delay(5);
        assert.equal((await cluster.replace()).code, 0);
      }
      stop = true;
      await Promise.all(loops);
      t.diagnostic(`${t.name}: ${ROUNDS} replaced: ${JSON.stringify(counts)}`);
      assert.equal(counts.failed, 0, JSON.stringify(counts));
    }));
}
