// Runs the tests of the preload against each Node that is named, and prints one table.
//
//   node tests/preload/run.mjs [--rounds N] [NODE...]
//
// Without a name it tests the Node that it runs on. Needs Node 20 or later for itself; the ones under test may be 18.
// Exit status: 0 when all passed, 1 otherwise, 2 for bad usage.
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { run } from 'node:test';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const here = path.dirname(fileURLToPath(import.meta.url));
const { values, positionals } = parseArgs({ options: { rounds: { type: 'string' } }, allowPositionals: true });
if (values.rounds !== undefined) process.env.PRELOAD_TEST_ROUNDS = values.rounds;
const nodes = positionals.length > 0 ? positionals.map((node) => path.resolve(node)) : [process.execPath];
const files = fs
  .readdirSync(here)
  .filter((name) => name.endsWith('.test.mjs'))
  .map((name) => path.join(here, name));

/** Test name -> version -> what came of it. */
const results = new Map();
const notes = [];
const versions = [];
let failed = false;

for (const node of nodes) {
  const version = ask(node);
  versions.push(version);
  process.env.PRELOAD_TEST_NODE = node;
  await new Promise((resolve, reject) => {
    run({ files, concurrency: 1 })
      .on('test:pass', (event) => note(version, event, event.skip === undefined ? 'ok' : 'skip'))
      .on('test:fail', (event) => {
        failed = true;
        note(version, event, 'FAIL');
        const { cause } = event.details.error;
        notes.push(`${version} FAIL ${event.name}: ${cause?.message ?? event.details.error.message}`);
      })
      .on('test:diagnostic', ({ message, file }) => {
        if (file && / replaced: |: 10 of 10/.test(message)) notes.push(`${version} ${message}`);
      })
      .on('error', reject)
      .on('end', resolve)
      .resume();
  });
}

console.log(['test'.padEnd(84), ...versions.map((version) => version.padEnd(10))].join(''));
for (const [name, row] of results) {
  console.log([name.padEnd(84), ...versions.map((version) => (row.get(version) ?? '-').padEnd(10))].join(''));
}
for (const line of notes) console.log(line);
process.exitCode = failed ? 1 : 0;

function ask(node) {
  try {
    return execFileSync(node, ['--version'], { encoding: 'utf8' }).trim();
  } catch (error) {
    console.error(`cannot ask ${node} for its version: ${error.message}`);
    process.exit(2);
  }
}

function note(version, { name, nesting, file }, outcome) {
  // Files are reported as tests around their tests.
  if (nesting > 0 || files.includes(name) || !file) return;
  if (!results.has(name)) results.set(name, new Map());
  results.get(name).set(version, outcome);
}
