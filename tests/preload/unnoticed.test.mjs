// What a program can see of the preload before a drain: nothing.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import test from 'node:test';
import { promisify } from 'node:util';

import { APPS, Cluster, environment, NODE, ownEnvironment, PRELOAD, within } from './lib.mjs';

const run = promisify(execFile);

/** What a worker reports about itself, its thread and its child; or which of Node's modules it loaded. */
async function look(app, options, env = {}, kind = 'report') {
  const cluster = new Cluster(app, { ...options, env });
  try {
    await cluster.start();
    return await cluster.message(kind);
  } finally {
    await cluster.stop();
  }
}

for (const app of ['report.cjs', 'report.mjs']) {
  test(`worker, thread and child look as without it (${app})`, async () => {
    const [plain, loaded] = [await look(app, { preload: false }), await look(app, {})];
    assert.deepEqual(loaded, plain);
    assert.equal('NODE_OPTIONS' in loaded.main.env, false);
  });
}

test('no module is loaded for it', async () => {
  const nothing = { NODE_OPTIONS: `--require=${path.join(APPS, 'adds.cjs')}` };
  const plain = await look('report.cjs', { preload: false }, nothing, 'modules');
  const { loaded } = await look('report.cjs', {}, {}, 'modules');
  assert.deepEqual(loaded.filter((name) => !plain.loaded.includes(name)), []);
});

for (const existing of ['', ' ', '--no-warnings', '--title="a \\" b c"', '--no-warnings ', '"--title=x y"']) {
  test(`NODE_OPTIONS of the user is put back and works: ${JSON.stringify(existing)}`, async () => {
    const plain = await look('report.cjs', { preload: false }, { NODE_OPTIONS: existing });
    const loaded = await look('report.cjs', { existing });
    assert.deepEqual(loaded, plain);
    assert.equal(loaded.main.env.NODE_OPTIONS, existing);
    assert.equal(loaded.child.env.NODE_OPTIONS, existing);
  });
}

test('path with blanks, quotes and a link works', async () => {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'preload-'));
  try {
    fs.mkdirSync(path.join(folder, 'my "own" \\ folder'));
    fs.symlinkSync(path.join(folder, 'my "own" \\ folder'), path.join(folder, 'a link'));
    fs.copyFileSync(PRELOAD, path.join(folder, 'my "own" \\ folder', 'p.cjs'));
    const plain = await look('report.cjs', { preload: false }, { NODE_OPTIONS: '--no-warnings' });
    for (const name of ['my "own" \\ folder', 'a link']) {
      const file = path.join(folder, name, 'p.cjs');
      const loaded = await look('report.cjs', { existing: '--no-warnings', file });
      assert.deepEqual(loaded, plain);
    }
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
});

test('preloads of the user before and after it keep their changes', async () => {
  const first = path.join(APPS, 'adds.cjs');
  const loaded = await look('report.cjs', { existing: `--require=${first}` }, { ADDS: ' --no-deprecation' });
  assert.equal(loaded.main.env.NODE_OPTIONS, `--require=${first} --no-deprecation`);
});

test('process that is no worker is left alone', async () => {
  const script = 'console.log(JSON.stringify([process.env.NODE_OPTIONS, process.listenerCount("internalMessage")]))';
  const marked = { ...ownEnvironment(), ...environment() };
  const { stdout } = await run(NODE, ['-e', script], { env: marked });
  assert.deepEqual(JSON.parse(stdout), [null, 0]);

  const { POLYFORK_PRELOAD, ...unmarked } = marked;
  const unmarkedRun = await run(NODE, ['-e', script], { env: unmarked });
  assert.deepEqual(JSON.parse(unmarkedRun.stdout), [unmarked.NODE_OPTIONS, 0]);
});

for (const preload of [false, true]) {
  const how = preload ? 'with the preload' : 'as stock';

  test(`worker that lets go of its channel ends by itself (${how})`, async () => {
    const cluster = new Cluster('lets-go.cjs', { preload });
    try {
      await cluster.start();
      assert.equal((await within(cluster.workers.get(1), 'worker stays')).code, 0);
    } finally {
      await cluster.stop();
    }
  });

  test(`worker whose server closed ends by itself when asked (${how})`, async () => {
    const cluster = new Cluster('closes.cjs', { preload });
    try {
      await cluster.start();
      await cluster.message('closed');
      assert.equal((await cluster.disconnect(1)).code, 0);
    } finally {
      await cluster.stop();
    }
  });

  test(`server is closed and opened again as ever (${how})`, async () => {
    const cluster = new Cluster('again.cjs', { preload, lingerMs: 50 });
    try {
      await cluster.start();
      assert.deepEqual((await cluster.message('again')).answers, ['1', '2', '3']);
      assert.equal((await cluster.disconnect(1)).code, 0);
    } finally {
      await cluster.stop();
    }
  });
}
