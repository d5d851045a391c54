// Lets a stock Node worker leave without cutting anybody off.
//
// Polyfork puts this file into NODE_OPTIONS of the Node workers it starts. A worker asked to leave ("drain")
// then answers with `Connection: close`, gives kept-alive connections that are idle a short time to speak
// up, and says GOAWAY on HTTP/2; a worker whose primary died finishes the requests in hand before it exits,
// where stock Node drops them. Where it is asked to, it also tells the primary regularly that its event loop runs,
// and once that it has had as many requests as it was to have. Grace periods of a drain, signals, and which worker is to leave are the
// primary's business. Upgraded connections (WebSocket) and plain TCP are left to the program.
//
// The surprising rule: until a drain begins this does next to nothing. It loads no module that the worker
// did not load already, adds no listener that the program could count on `message` or `disconnect` (either
// would hold the channel open), and takes itself out of the environment, so that children of the worker
// and its threads run without it. Whatever fails in here fails in silence: the worker is then as stock.
//
// Behaviour follows: Node `lib/internal/cluster/child.js`, `lib/internal/child_process.js`,
// `lib/_http_server.js`, `lib/internal/http2/core.js`, 18 to 26; RFC 9112 9.6, RFC 9113 6.8.
'use strict';

// Threads load it as well, whatever their environment says.
delete require.cache[__filename];

// What was added to NODE_OPTIONS, to the letter; its presence says that this process is meant.
const added = process.env.POLYFORK_PRELOAD;
if (added === undefined) return;

/** How long a worker without a primary may go on, in milliseconds. */
const graceMs = takeNumber('POLYFORK_GRACE_MS', 30_000);
/** How long a connection must have been idle, since the drain began, to be closed, in milliseconds. */
const lingerMs = takeNumber('POLYFORK_LINGER_MS', 1_000);
/** How often the primary wants to hear that the event loop runs, in milliseconds; 0 for never. */
const beatMs = takeNumber('POLYFORK_BEAT_MS', 0);
/** After how many requests the primary wants to hear of it; 0 for never. */
const maxRequests = takeNumber('POLYFORK_REQUESTS', 0);
/** Whether the worker may end as any program does, when it has nothing left to do. */
const mayEnd = takeNumber('POLYFORK_MAY_END', 0) > 0;

restoreEnvironment();

// Kept from before the program can replace them, as fake clocks in test suites do.
const { setTimeout, setImmediate } = globalThis;
const { hrtime } = process;

/** Weak references to the servers that listen by way of the primary. */
const listening = new Set();
/** HTTP/2 sessions seen on those servers, while open. */
const sessions = new Set();
/** Sessions between two streams, and since when; GOAWAY waits for the next one or the linger time. */
const quietSince = new WeakMap();
/** Per connection: how many bytes it had read when it was last in use, and when that was. */
const seen = new WeakMap();
/** Per connection: the answer that says, or is going to say, `Connection: close`. */
const lastAnswers = new WeakMap();

let draining = false;
let orphaned = false;
/** The primary's end of the channel went away; the program did not close it. */
let endOfChannel = false;
/** The diagnostics channel of a drain. */
let requests;
/** That of a limit on requests; kept, or it would be collected. And what is called for each. */
let counting;
let counted;
/** Undoes what only holds while cluster closes the servers. */
let shields = [];

guarded(install)();

function install() {
  // Threads have no channel, and asking `worker_threads` would load it. With one, cluster is there already.
  if (process.listenerCount('internalMessage') === 0) return;
  const cluster = require('cluster');
  if (!cluster.worker) return;
  const tell = teller();
  watchServers(cluster);
  watchRequestToLeave(cluster);
  watchPrimary(cluster.worker);
  if (maxRequests > 0) countRequests(tell);
  if (beatMs > 0) beat(tell);
  if (mayEnd) letGo(cluster);
}

// ---- The environment -------------------------------------------------------------------------------------

function takeNumber(name, otherwise) {
  const text = process.env[name];
  delete process.env[name];
  return /^[0-9]{1,10}$/.test(text) ? Math.min(Number(text), 0x7fffffff) : otherwise;
}

/** Leaves NODE_OPTIONS as the user set it, or absent. */
function restoreEnvironment() {
  const { env } = process;
  delete env.POLYFORK_PRELOAD;
  const options = env.NODE_OPTIONS;
  if (options === undefined || added === '') return;
  if (options === added && added[0] !== ' ') {
    delete env.NODE_OPTIONS; // with a blank it was there, and empty
    return;
  }
  // From the end: another preload may have added to it since.
  const at = options.lastIndexOf(added);
  if (at >= 0) env.NODE_OPTIONS = options.slice(0, at) + options.slice(at + added.length);
}

// ---- What is watched before a drain ----------------------------------------------------------------------

/** Remembers each server as it asks the primary for its port: once per listen, nothing per connection. */
function watchServers(cluster) {
  const getServer = cluster._getServer;
  if (typeof getServer !== 'function') return;
  const remember = guarded((server) => {
    if (typeof server?.getConnections !== 'function') return; // a UDP socket
    for (const reference of listening) if (!reference.deref()) listening.delete(reference);
    if (!knownServers().includes(server)) listening.add(new WeakRef(server));
    // Before Node 24 a server does not know its HTTP/2 sessions, so that nobody could say GOAWAY.
    if (isHttp2(server) && (counted || !property(server, 'sessions'))) watchSessions(server);
  });
  cluster._getServer = function _getServer(server) {
    remember(server);
    return getServer.apply(this, arguments);
  };
}

/**
 * Cluster's own listeners hold the channel open, so that a worker never ends by itself. Here the channel holds nobody until
 * the program listens by way of the primary, or wants to hear from it.
 */
function letGo(cluster) {
  process.channel.unref();
  const getServer = cluster._getServer;
  const hold = guarded(() => {
    process.removeListener('newListener', wants);
    process.channel?.ref();
  });
  const wants = (name) => {
    if (name === 'message' || name === 'disconnect') hold();
  };
  process.on('newListener', wants);
  cluster._getServer = function _getServer() {
    hold();
    return getServer.apply(this, arguments);
  };
}

function watchSessions(server) {
  if (server.listeners('session').includes(onSession)) return;
  server.on('session', onSession);
}

const onSession = guarded((session) => {
  sessions.add(session);
  if (counted) session.on('stream', () => counted?.());
  session.once('close', () => sessions.delete(session));
  if (draining) sayGoawayWhenQuiet(session);
});

function watchRequestToLeave(cluster) {
  // Before cluster's own listener, which closes the servers.
  process.prependListener('internalMessage', guarded((message) => {
    if (message?.cmd !== 'NODE_CLUSTER' || message.act !== 'disconnect') return;
    beginDrain();
    process.nextTick(afterClose);
    // Cluster does not know servers that were bound with `exclusive` or `reusePort`. An immediate, since
    // what the loop can accept before then is served.
    setImmediate(guarded(closeOwnServers));
  }));
  const { prototype } = cluster.Worker;
  const { disconnect } = prototype;
  prototype.disconnect = function () {
    if (this !== cluster.worker) return disconnect.apply(this, arguments);
    guarded(beginDrain)();
    try {
      return disconnect.apply(this, arguments);
    } finally {
      afterClose();
    }
  };
  Object.defineProperty(prototype.disconnect, 'name', { value: disconnect.name });
}

/**
 * Stands in for cluster's own `disconnect` listener, which exits at once when nobody asked for the end.
 * Taking its place, rather than adding a listener, leaves the count of listeners and so the hold on the
 * channel as they were.
 */
function watchPrimary(worker) {
  const stock = process.listeners('disconnect').find((listener) => /exitedAfterDisconnect/.test(listener));
  const channel = property(process, 'kChannelHandle');
  const onread = channel?.onread;
  if (!stock || typeof onread !== 'function') return;

  // `process.disconnect()` by the program looks the same from the event. End of file passes here.
  channel.onread = function (buffer) {
    if (!buffer && process.connected) endOfChannel = true;
    return onread.apply(this, arguments);
  };
  // A message sent between the primary's death and end of file fails with EPIPE, which nobody handles.
  const { _send } = process;
  const listeners = process.listenerCount('error'); // cluster's, which passes on to the worker
  const heard = () => process.listenerCount('error') > listeners || worker.listenerCount('error') > 0;
  process._send = function (message, handle, options, callback) {
    const swallow = options?.swallowErrors === false && !handle && !callback && !heard();
    return _send.call(this, message, handle, swallow ? { swallowErrors: true } : options, callback);
  };
  process.removeListener('disconnect', stock);
  process.prependOnceListener('disconnect', function () {
    if (endOfChannel) {
      if (worker.exitedAfterDisconnect) {
        becomeOrphan(worker);
      } else {
        // Last of the worker's listeners, so that the program's still find the worker as stock leaves it,
        // and before the check that exits.
        worker.once('disconnect', () => becomeOrphan(worker));
      }
    }
    return stock.apply(this, arguments);
  });
}

// ---- What the primary wants to hear ----------------------------------------------------------------------

/**
 * A way to tell the primary something that user code never sees: Node takes a `cmd` of this kind for its own,
 * and a primary that does not know it drops it. One at a time: while one waits to be written, as when the
 * primary reads nothing, the next is not sent, and false is returned.
 */
function teller() {
  const { _send } = process;
  let written = true;
  const done = () => {
    written = true;
  };
  return (act, count) => {
    if (!written || !process.connected) return false;
    written = false;
    // An error is that of a channel which is closing.
    _send.call(process, { cmd: 'NODE_POLYFORK', act, count }, undefined, { swallowErrors: true }, done);
    return true;
  };
}

/** Tells regularly how late the loop was for a timer. The timer holds nothing, and ends with the channel. */
function beat(tell) {
  let due = now();
  const again = guarded(() => {
    tell('beat', Math.max(0, Math.round((now() - due) * 1e3)));
    if (!process.connected) return;
    due = now() + beatMs;
    setTimeout(again, beatMs).unref();
  });
  again();
}

/** Tells once that enough requests have come: over HTTP/1 by Node's own channel, over HTTP/2 by the streams. */
function countRequests(tell) {
  let left = maxRequests;
  counted = guarded(() => {
    left -= 1;
    if (left > 0 || !tell('requests', maxRequests - left)) return;
    counting.unsubscribe(counted);
    counted = undefined;
  });
  counting = require('diagnostics_channel').channel('http.server.request.start');
  counting.subscribe(counted);
}

// ---- The drain -------------------------------------------------------------------------------------------

/** Called just before the servers are closed. */
function beginDrain() {
  if (draining) return;
  draining = true;
  sweepLater();
  onRequest(guarded(({ response, socket, server }) => {
    if (!server.listening) answerWithClose(response, socket);
  }));
  for (const server of allServers()) guarded(prepareServer)(server);
  // From Node 24 on, closing a server says GOAWAY to its sessions, between two streams or not.
  for (const session of sessions) shield(session, 'close');
}

function prepareServer(server) {
  // From Node 19 on, closing a server cuts its idle connections, under a request that is on its way.
  shield(server, 'closeIdleConnections');
  if (isHttp2(server)) {
    watchSessions(server);
    for (const session of property(server, 'sessions') ?? []) onSession(session);
  }
  for (const { socket } of httpConnections(server)) {
    const answer = socket?._httpMessage;
    // With later requests already read on it, this answer is not the last one.
    const latest = socket?.parser?.incoming;
    if (answer && (!latest || latest === answer.req)) answerWithClose(answer, socket);
  }
}

/** Called when the servers have been told to close. */
function afterClose() {
  for (const lift of shields) guarded(lift)();
  shields = [];
  for (const session of sessions) guarded(sayGoawayWhenQuiet)(session);
}

/** Servers bound by the worker itself; only those that still listen. */
function closeOwnServers() {
  for (const server of allServers()) {
    if (!server.listening) continue;
    shield(server, 'closeIdleConnections');
    guarded(() => server.close())();
  }
  afterClose();
}

/** Makes `response` the last one on its connection, unless its head is already written. */
function answerWithClose(response, socket) {
  const previous = lastAnswers.get(socket);
  if (previous && previous.response !== response) previous.revoke();
  if (response.headersSent || !response.shouldKeepAlive) return;

  let last = true;
  lastAnswers.set(socket, {
    response,
    // A pipelined request came after it: what follows a `close` would be lost.
    revoke() {
      if (!last || response.headersSent) return;
      last = false;
      response.shouldKeepAlive = true;
    },
  });
  response.shouldKeepAlive = false;

  // Proxies copy `Connection: keep-alive` from the answer they pass on, and that would win.
  const { writeHead } = response;
  response.writeHead = function (...args) {
    if (last) guarded(replaceKeepAlive)(this, args);
    return writeHead.apply(this, args);
  };
}

/** Turns an explicit `Connection: keep-alive`, set before or given to `writeHead`, into `close`. */
function replaceKeepAlive(response, args) {
  const isKeepAlive = (name, value) =>
    /^connection$/i.test(name) && /keep-alive/i.test(value) && !/upgrade/i.test(value);
  if (isKeepAlive('connection', response.getHeader('connection'))) response.setHeader('connection', 'close');
  const at = typeof args[1] === 'string' ? 2 : args.length - 1;
  const headers = at >= 1 ? args[at] : undefined;
  if (Array.isArray(headers)) {
    const pairs = Array.isArray(headers[0]);
    args[at] = headers.map((entry, index) => {
      if (pairs) return isKeepAlive(entry[0], entry[1]) ? [entry[0], 'close'] : entry;
      return index % 2 === 1 && isKeepAlive(headers[index - 1], entry) ? 'close' : entry;
    });
  } else if (headers && typeof headers === 'object') {
    for (const name of Object.keys(headers)) {
      if (isKeepAlive(name, headers[name])) args[at] = { ...args[at], [name]: 'close' };
    }
  }
}

/**
 * A stream that crosses a GOAWAY is refused, which a client may but need not repeat. So it is said while
 * the client waits for an answer; to a silent one, after the linger time. (Node can not say the
 * two-step GOAWAY of RFC 9113: after the first one it refuses streams whatever number was given.)
 */
function sayGoawayWhenQuiet(session) {
  if (session.closed || session.destroyed || quietSince.has(session)) return;
  const open = property(session, 'state')?.streams?.size;
  if (open === undefined || open > 0) {
    session.close();
    return;
  }
  quietSince.set(session, now());
  session.prependOnceListener('stream', guarded(() => session.close()));
}

// ---- Idle connections ------------------------------------------------------------------------------------

/** The timer never holds the process: it has to wait for nobody but open connections, and those hold it. */
function sweepLater() {
  const interval = Math.max(5, Math.min(200, lingerMs / 5));
  setTimeout(guarded(sweep), interval).unref();
}

function sweep() {
  const expired = allServers().flatMap(idleConnections);
  const quiet = [...sessions].filter((session) => isOver(quietSince.get(session)));
  if (expired.length > 0 || quiet.length > 0) {
    // After the loop has read what has arrived by now: only a request that is still on its way can cross.
    setImmediate(guarded(() => {
      const still = new Set(allServers().flatMap(idleConnections));
      for (const socket of expired) if (still.has(socket)) guarded(() => socket.destroySoon())();
      for (const session of quiet) if (!session.closed) guarded(() => session.close())();
    }));
  }
  whetherServing((serving) => {
    if (serving) sweepLater();
    else if (orphaned) exit();
  });
}

/** HTTP/1 connections without a request in hand for the linger time. The first look starts the clock. */
function idleConnections(server) {
  if (server.listening) return []; // one of the program's own, which it did not ask to drain
  const between = new Set(property(server, 'http.server.connections')?.idle());
  return httpConnections(server).flatMap((parser) => {
    const { socket } = parser;
    if (!socket || socket.destroyed) return [];
    const bytes = socket.bytesRead;
    // Nothing read at all: opened ahead of need, which older majors count as in use.
    const busy = socket._httpMessage || (bytes > 0 && !between.has(parser));
    const last = seen.get(socket);
    if (!busy && last?.bytes === bytes) return isOver(last.since) ? [socket] : [];
    seen.set(socket, { bytes, since: now() });
    return [];
  });
}

function isOver(since) {
  return since !== undefined && now() - since >= lingerMs;
}

/** Tells whether any connection is left, of whatever protocol. */
function whetherServing(tell) {
  const servers = allServers();
  if (servers.length === 0) process.nextTick(tell, false);
  let left = servers.length;
  let connections = 0;
  for (const server of servers) {
    server.getConnections(guarded((error, count) => {
      connections += error ? 0 : count;
      left -= 1;
      if (left === 0) tell(connections > 0);
    }));
  }
}

// ---- Without a primary -----------------------------------------------------------------------------------

/** Stops accepting at once, so that a new primary can have the port; exits when the work in hand is done. */
function becomeOrphan(worker) {
  orphaned = true;
  guarded(() => {
    beginDrain();
    setTimeout(exit, graceMs).unref();
    // When a drain was under way, cluster closes the channel at its end, and there is none: an error event.
    process.disconnect = guarded(exitWhenDone);
    // The same for a request in hand that sends; with a callback the program is told.
    const { send } = process;
    process.send = function (...args) {
      return typeof args.at(-1) === 'function' ? send.apply(this, args) : false;
    };
  })();
  // Closes what cluster knows, UDP too, and sets the mark by which cluster does not exit.
  guarded(() => worker.disconnect())();
  guarded(closeOwnServers)();
  guarded(exitWhenDone)();
}

function exitWhenDone() {
  whetherServing((serving) => {
    if (!serving) exit();
  });
}

function exit() {
  process.exit(0);
}

// ---- Looking into Node -----------------------------------------------------------------------------------

/** Milliseconds on a clock that only goes forward. */
function now() {
  const [seconds, nanoseconds] = hrtime();
  return seconds * 1e3 + nanoseconds / 1e6;
}

function knownServers() {
  return [...listening].map((reference) => reference.deref()).filter(Boolean);
}

/** The servers that cluster was asked for, and those that the worker bound by itself. */
function allServers() {
  const servers = new Set(knownServers());
  for (const handle of process._getActiveHandles?.() ?? []) {
    for (const candidate of [handle, handle?.server]) {
      if (typeof candidate?.getConnections === 'function') servers.add(candidate);
    }
  }
  return [...servers];
}

/** The parsers of a server's HTTP/1 connections; upgraded ones have none. */
function httpConnections(server) {
  return property(server, 'http.server.connections')?.all() ?? [];
}

function isHttp2(server) {
  return typeof server.updateSettings === 'function';
}

/** What Node keeps under a symbol of this description. */
function property(object, description) {
  const symbol = Object.getOwnPropertySymbols(object).find((symbol) => symbol.description === description);
  return symbol && object[symbol];
}

/** Calls `subscriber` for each HTTP/1 request from now on, before the program is. */
function onRequest(subscriber) {
  // Not `subscribe` of the module, which is not in 18.0. The channel is kept, or it would be collected.
  requests = require('diagnostics_channel').channel('http.server.request.start');
  requests.subscribe(subscriber);
}

/** Makes a method of one object do nothing until `afterClose`. */
function shield(object, name) {
  if (typeof object[name] !== 'function') return;
  const own = Object.getOwnPropertyDescriptor(object, name);
  if (own && !own.configurable) return;
  Object.defineProperty(object, name, { configurable: true, writable: true, value() {} });
  shields.push(() => (own ? Object.defineProperty(object, name, own) : delete object[name]));
}

/** The program never sees an error of ours. */
function guarded(action) {
  return (...args) => {
    try {
      return action(...args);
    } catch {
      return undefined;
    }
  };
}
