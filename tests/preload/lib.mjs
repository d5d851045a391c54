// What the tests of the preload share: a cluster of stock Node workers, clients that count what they lose.
//
// The Node under test (`PRELOAD_TEST_NODE`, else the one that runs the tests) is primary and worker; the clients run
// in the test's own process. The primary here is Node's own, so that what is tested is the preload alone.
import { execFileSync, spawn } from 'node:child_process';
import { EventEmitter, once } from 'node:events';
import net from 'node:net';
import path from 'node:path';
import tls from 'node:tls';
import { fileURLToPath } from 'node:url';

const here = path.dirname(fileURLToPath(import.meta.url));

export const NODE = process.env.PRELOAD_TEST_NODE ?? process.execPath;
export const MAJOR = Number(/^v(\d+)/.exec(execFileSync(NODE, ['--version'], { encoding: 'utf8' }))[1]);
export const PRELOAD = path.join(here, '../../crates/polyfork/src/cluster/preload.cjs');
export const APPS = path.join(here, 'apps');
/** For what must happen; far beyond what any of it takes. */
export const PATIENCE_MS = 30_000;
/** Replacements per run: more in CI. */
export const ROUNDS = Number(process.env.PRELOAD_TEST_ROUNDS ?? 8);

/** The variables that polyfork gives to a Node worker (`preload::environment`). */
export function environment({ existing, file = PRELOAD, graceMs = 30_000, lingerMs } = {}) {
  const argument = `--require=${file}`;
  const quoted = /[ "]/.test(argument) ? `"${argument.replace(/["\\]/g, '\\$&')}"` : argument;
  const added = existing === undefined || existing.endsWith(' ') ? quoted : ` ${quoted}`;
  return {
    NODE_OPTIONS: `${existing ?? ''}${added}`,
    POLYFORK_PRELOAD: added,
    POLYFORK_GRACE_MS: String(graceMs),
    ...(lingerMs === undefined ? {} : { POLYFORK_LINGER_MS: String(lingerMs) }),
  };
}

/** `process.env` without what would change the Node under test. */
export function ownEnvironment() {
  const { NODE_OPTIONS, NODE_TEST_CONTEXT, NODE_V8_COVERAGE, ...rest } = process.env;
  return rest;
}

/**
 * A Node cluster in a process of its own.
 *
 * Events: `listening` {id, port}, `exit` {id, code, signal}, `disconnect` {id}, `message` {id, message}, and `line`, a
 * line that a worker wrote; lines are also how a worker without a primary is heard.
 */
export class Cluster extends EventEmitter {
  lines = [];
  messages = [];
  stderr = '';
  workers = new Map();
  #tag = 0;

  constructor(app, { preload = true, workers = 1, policy = 'rr', env = {}, ...options } = {}) {
    super();
    this.setMaxListeners(0);
    this.process = spawn(NODE, [path.join(APPS, 'primary.cjs'), path.join(APPS, app)], {
      env: { ...ownEnvironment(), NODE_CLUSTER_SCHED_POLICY: policy },
      stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
    });
    this.env = { ...(preload ? environment(options) : {}), ...env };
    this.process.on('message', ({ event, ...rest }) => {
      if (event === 'message') this.messages.push(rest);
      this.emit(event, rest);
    });
    this.process.stderr.setEncoding('utf8').on('data', (text) => (this.stderr += text));
    let rest = '';
    this.process.stdout.setEncoding('utf8').on('data', (text) => {
      const lines = (rest + text).split('\n');
      rest = lines.pop();
      for (const line of lines) {
        this.lines.push(line);
        this.emit('line', line);
      }
    });
    /** No process holds the output any more: primary and workers are gone. */
    this.gone = once(this.process, 'close');
    this.count = workers;
  }

  async start() {
    await Promise.all(Array.from({ length: this.count }, () => this.fork()));
    return this;
  }

  /** Starts a worker and waits until it listens. */
  async fork() {
    const tag = (this.#tag += 1);
    const started = this.next('forked', (event) => event.tag === tag);
    this.process.send({ command: 'fork', env: this.env, tag });
    const { id } = await started;
    const { port, address } = await this.next('listening', (event) => event.id === id);
    this.port ??= port;
    this.address ??= address;
    this.workers.set(id, new Promise((resolve) => this.on('exit', (event) => event.id === id && resolve(event))));
    return id;
  }

  /** Asks a worker to leave; the promise is that it did, with its code. */
  disconnect(id) {
    const left = this.workers.get(id);
    this.workers.delete(id);
    this.process.send({ command: 'disconnect', id });
    return within(left, () => `worker ${id} does not leave; lines ${JSON.stringify(this.lines)}, stderr ${this.stderr}`);
  }

  /** Has a new worker listening before an old one is asked to leave. */
  async replace() {
    const [old] = this.workers.keys();
    await this.fork();
    return this.disconnect(old);
  }

  kill(id) {
    this.process.send({ command: 'kill', id });
  }

  /** Resolves when the worker knows that it is to leave (the app has to say so). */
  async draining() {
    await this.message('draining');
  }

  send(id, message) {
    this.process.send({ command: 'send', id, message });
  }

  next(event, wanted = () => true) {
    return within(
      new Promise((resolve) => {
        const look = (value) => {
          if (!wanted(value)) return;
          this.off(event, look);
          resolve(value);
        };
        this.on(event, look);
      }),
      () => `no ${event} event; lines ${JSON.stringify(this.lines)}, stderr ${this.stderr}`,
    );
  }

  /** A line that was or will be written. */
  async line(wanted) {
    return this.lines.find((line) => wanted.test(line)) ?? this.next('line', (line) => wanted.test(line));
  }

  /** The worker's message of this kind, past or future. */
  async message(kind) {
    const known = this.messages.find(({ message }) => message.kind === kind);
    return (known ?? (await this.next('message', ({ message }) => message.kind === kind))).message;
  }

  /** SIGKILL to the primary, and nothing else. */
  async killPrimary() {
    const exited = once(this.process, 'exit');
    this.process.kill('SIGKILL');
    await exited;
  }

  async stop() {
    if (this.process.connected) this.process.send({ command: 'stop' });
    await within(this.gone, 'cluster does not end').catch(async (error) => {
      this.process.kill('SIGKILL');
      throw error;
    });
  }
}

/** Fails with `what` when the promise takes for ever. */
export async function within(promise, what, ms = PATIENCE_MS) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(typeof what === 'function' ? what() : what)), ms);
    timer.unref(); // what is waited for holds the process, or nothing can come
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

export const delay = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** One HTTP/1.1 connection that is used again until the server says close. Each attempt ends in one class. */
export class Http1 {
  constructor(where, { secure = false } = {}) {
    this.where = where;
    this.secure = secure;
  }

  async connect() {
    this.socket = this.secure
      ? tls.connect({ ...this.where, rejectUnauthorized: false })
      : net.connect(this.where);
    this.socket.on('error', () => {});
    this.text = '';
    this.socket.setEncoding('latin1').on('data', (text) => {
      this.text += text;
      this.socket.emit('progress');
    });
    this.ended = new Promise((resolve) => this.socket.once('close', resolve));
    await within(once(this.socket, this.secure ? 'secureConnect' : 'connect'), 'no connection');
    return this;
  }

  write(request = 'GET / HTTP/1.1\r\nHost: a\r\n\r\n') {
    this.socket.write(request);
  }

  /** The next answer: {status, headers, body}, or undefined when the connection ends first. */
  async answer() {
    for (;;) {
      const answer = this.#take();
      if (answer) return answer;
      if (this.socket.destroyed || this.socket.readableEnded) return undefined;
      const how = await within(
        Promise.race([once(this.socket, 'progress').then(() => 'more'), this.ended.then(() => 'end')]),
        'an answer hangs',
      );
      if (how === 'end') return this.#take();
    }
  }

  #take() {
    const end = this.text.indexOf('\r\n\r\n');
    if (end < 0) return undefined;
    const [first, ...lines] = this.text.slice(0, end).split('\r\n');
    const headers = Object.fromEntries(
      lines.map((line) => [line.slice(0, line.indexOf(':')).toLowerCase(), line.slice(line.indexOf(':') + 1).trim()]),
    );
    let from = end + 4;
    let body = '';
    if (headers['content-length'] !== undefined) {
      const length = Number(headers['content-length']);
      if (this.text.length < from + length) return undefined;
      body = this.text.slice(from, from + length);
      from += length;
    } else if (/chunked/i.test(headers['transfer-encoding'])) {
      for (;;) {
        const eol = this.text.indexOf('\r\n', from);
        if (eol < 0) return undefined;
        const size = Number.parseInt(this.text.slice(from, eol), 16);
        if (this.text.length < eol + 2 + size + 2) return undefined;
        body += this.text.slice(eol + 2, eol + 2 + size);
        from = eol + 2 + size + 2;
        if (size === 0) break;
      }
    }
    this.text = this.text.slice(from);
    return { status: Number(first.split(' ')[1]), headers, body };
  }

  close() {
    this.socket?.destroy();
  }
}

/**
 * Clients in a closed loop on kept-alive connections: each sends its next request as soon as it has its answer, or
 * after `pauseMs`.
 */
export class Load {
  counts = { ok: 0, refused: 0, cut: 0, hang: 0, connections: 0 };
  #stop = false;

  constructor(where, { clients = 8, pauseMs = 0, ...options } = {}) {
    this.loops = Array.from({ length: clients }, () => this.#loop(where, pauseMs, options));
  }

  async #loop(where, pauseMs, options) {
    let connection;
    while (!this.#stop) {
      if (!connection) {
        try {
          connection = await new Http1(where, options).connect();
          this.counts.connections += 1;
        } catch {
          this.counts.refused += 1;
          continue;
        }
      }
      connection.write();
      let answer;
      try {
        answer = await connection.answer();
      } catch {
        this.counts.hang += 1;
      }
      if (answer?.status === 200) this.counts.ok += 1;
      else if (!answer) this.counts.cut += 1;
      if (!answer || /close/i.test(answer.headers.connection)) {
        connection.close();
        connection = undefined;
      }
      // Waits even for 0 ms: all clients and the test share one loop.
      await delay(pauseMs);
    }
    connection?.close();
  }

  get failures() {
    return this.counts.refused + this.counts.cut + this.counts.hang;
  }

  /** Waits until `count` more requests were answered. */
  async more(count) {
    const until = this.counts.ok + count;
    await within(
      (async () => {
        while (this.counts.ok < until) await delay(5);
      })(),
      () => `clients are stuck: ${JSON.stringify(this.counts)}`,
    );
  }

  async stop() {
    this.#stop = true;
    await Promise.all(this.loops);
    return this.counts;
  }
}

/** Resolves when a new process-wide listener on the port works; fails on the first error. */
export async function bindAtOnce(port, host = '127.0.0.1') {
  const server = net.createServer();
  server.listen({ port, host });
  await once(server, 'listening');
  server.close();
  await once(server, 'close');
}
