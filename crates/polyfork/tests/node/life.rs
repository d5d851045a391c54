//! A worker's life: events and their order, identity, environment, messages.
//!
//! How it ends is in `leaving`, where it listens in `listening`.

use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use polyfork::channel::advanced::Value;
use polyfork::cluster::{
    Event, Ready, RestartPolicy, SendError, Serialization, Settings, StopOn, Stream,
};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::client::{get, greeting, reach};
use super::support::{Mode, Rig, Runtime};

on_every_node! {
    events_come_in_nodes_order_with_nodes_arguments,
    a_worker_knows_who_it_is,
    messages_travel_both_ways_unchanged_and_in_order,
    a_broadcast_reaches_every_worker,
    what_json_cannot_say_travels_in_the_advanced_serialization,
    messages_sent_before_the_worker_listens_wait_for_it,
    arguments_directory_and_output_are_as_set,
    setup_again_holds_for_later_workers,
    connected_until_disconnect_and_alive_until_exit,
    messages_with_internal_names_reach_nobody,
    handles_from_a_worker_are_acknowledged_and_closed,
    handles_in_both_directions_do_not_deadlock,
    a_socket_that_came_by_message_is_served_by_http,
    sockets_of_every_kind_are_sent_to_a_worker,
    further_pipes_carry_bytes_both_ways,
    a_worker_whose_end_means_something_ends_when_nothing_is_left_to_do,
}

/// fork, online, listening, then disconnect and exit; with the right arguments, and the state follows.
async fn events_come_in_nodes_order_with_nodes_arguments(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Kernel);
    let (one, two) = (rig.fork().await, rig.fork().await);
    assert_eq!((one, two), (1, 2), "ids count from 1");
    rig.online(one).await;
    assert_eq!(rig.life_of(one), ["fork", "online"]);
    let status = rig.cluster.status().await;
    assert!(status.iter().all(|w| w.connected && w.pid != std::process::id()), "{status:?}");

    let address = rig
        .js(one, "keep.s = http.createServer(counter()); return listen(keep.s, 0, '127.0.0.1')")
        .await;
    let (told, carried) = rig.listening(one).await;
    assert!(Mode::Kernel.is(carried), "{carried:?}");
    assert_eq!(u64::from(reach(&told).port()), address["port"], "the real port, not 0");
    assert_eq!(get(reach(&told), "/").await.expect("an answer").text(), "1");

    rig.worker(one).disconnect().await;
    let ended = rig.ended(one).await;
    assert_eq!((ended.code, ended.signal, ended.voluntary), (Some(0), None, true));
    let life = rig.life_of(one);
    assert_eq!(life[..3], ["fork", "online", "listening"]);
    assert!(life[3..] == ["disconnect", "exit"] || life[3..] == ["exit", "disconnect"], "{life:?}");
    let status = rig.cluster.status().await;
    assert_eq!(status.iter().map(|w| w.worker).collect::<Vec<_>>(), [two], "the dead are gone");
    assert!(matches!(rig.events()[0], Event::Setup { .. }), "setup comes first");
    rig.end().await;
}

async fn a_worker_knows_who_it_is(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Handoff);
    let one = rig.fork_with([("NODE_OPTIONS", "--stack-trace-limit=33"), ("COLOUR", "blue")]).await;
    let two = rig.fork().await;
    let code = "return {
        isWorker: cluster.isWorker, isPrimary: cluster.isPrimary, id: cluster.worker.id,
        unique: process.env.NODE_UNIQUE_ID ?? null, fd: process.env.NODE_CHANNEL_FD ?? null,
        mode: process.env.NODE_CHANNEL_SERIALIZATION_MODE ?? null,
        instance: process.env.NODE_APP_INSTANCE, options: process.env.NODE_OPTIONS ?? null,
        limit: Error.stackTraceLimit, colour: process.env.COLOUR ?? null,
        ours: Object.keys(process.env).filter((key) => key.startsWith('POLYFORK')).sort(),
        connected: process.connected && cluster.worker.isConnected(), dead: cluster.worker.isDead(),
        leaving: cluster.worker.exitedAfterDisconnect ?? null }";
    // What the test run itself has in its environment is inherited as anything else.
    let variables = std::env::vars().map(|(key, _)| key);
    let mut inherited: Vec<String> = variables.filter(|key| key.starts_with("POLYFORK")).collect();
    inherited.sort();
    let mut expected = json!({
        "isWorker": true, "isPrimary": false, "id": 1, "unique": null, "fd": null, "mode": null,
        "instance": "0", "options": "--stack-trace-limit=33", "limit": 33, "colour": "blue",
        "ours": inherited, "connected": true, "dead": false, "leaving": null,
    });
    assert_eq!(rig.js(one, code).await, expected);
    expected["id"] = json!(2);
    expected["instance"] = json!("1");
    expected["options"] = json!(null);
    expected["limit"] = json!(10);
    expected["colour"] = json!(null);
    assert_eq!(rig.js(two, code).await, expected);
    rig.end().await;
}

/// Every kind of JSON value, large ones, and many: unchanged and in order, in both directions.
async fn messages_travel_both_ways_unchanged_and_in_order(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Kernel);
    let worker = rig.fork().await;
    rig.js(worker, "process.on('message', (m) => { if (m === null || m.call === undefined) process.send({ echo: m }) })")
        .await;
    let large: String = "grüße ☃ 💡 \u{2028} \"\\\n".chars().cycle().take(800_000).collect();
    let values = [
        json!("text"),
        json!(1.5),
        json!(-7),
        json!(true),
        json!(null),
        json!([]),
        json!({}),
        json!({ "cmd": "NODE_", "nested": [{ "deep": [[[]]] }] }),
        json!(large),
    ];
    for value in &values {
        rig.worker(worker).send(value).await.expect("sent");
    }
    let is_echo = |message: &serde_json::Value| message.get("echo").is_some();
    rig.eventually("all echoes", |rig| {
        (messages(rig).iter().filter(|m| is_echo(m)).count() == values.len()).then_some(())
    })
    .await;
    let echoes: Vec<_> =
        messages(&rig).into_iter().filter(is_echo).map(|mut m| m["echo"].take()).collect();
    assert!(echoes == values, "as they were sent");

    let many = 2_000;
    rig.start_js(worker, "for (let n = 0; n < 2000; n++) process.send({ n })").await;
    rig.message(worker, |m| m["n"] == many - 1).await;
    let numbers: Vec<_> = messages(&rig).iter().filter_map(|m| m["n"].as_u64()).collect();
    assert_eq!(numbers, (0..many).collect::<Vec<_>>());
    rig.end().await;
}

/// The whole conversation of a cluster in V8's serialization: requests, handles, connections, and messages with
/// values that JSON does not know.
async fn what_json_cannot_say_travels_in_the_advanced_serialization(runtime: Runtime) {
    for mode in Mode::ALL {
        let rig = Rig::start(&runtime, "actor.cjs", |settings| {
            let settings = mode.apply(settings).supervise(false).ready_timeout(None);
            settings.serialization(Serialization::Advanced)
        });
        let workers = rig.fork_many(2).await;
        let code = "keep.s = http.createServer(counter()); return listen(keep.s, 0, '127.0.0.1')";
        for worker in &workers {
            rig.js(*worker, code).await;
        }
        let (address, carried) = rig.listening(workers[0]).await;
        assert!(mode.is(carried), "{carried:?}");
        rig.listening(workers[1]).await;
        for _ in 0..10 {
            get(reach(&address), "/").await.expect("an answer");
        }

        let code =
            "const m = { map: new Map([['a', 1n]]), date: new Date(5), bytes: Buffer.from('abc') };
            m.self = m; process.send(m)";
        rig.start_js(workers[0], code).await;
        let value = rig
            .eventually("the message", |rig| {
                rig.events().iter().find_map(|event| match event {
                    Event::Message { message, .. } => {
                        message.value().filter(|v| v.get("map").is_some()).cloned()
                    }
                    _ => None,
                })
            })
            .await;
        assert!(matches!(value.get("map"), Some(Value::Map(_))), "{value:?}");
        assert_eq!(value.get("date"), Some(&Value::Date(5.0)));
        assert_eq!(value.get("bytes").and_then(Value::as_bytes), Some(&b"abc"[..]));
        assert_eq!(value.get("self"), Some(&Value::Reference(0)), "a cycle");

        // And back, as it came.
        let code = "process.on('message', (m) => {
            if (m.map) process.send({ same: m.self === m && m.map.get('a') === 1n && m.date.getTime() === 5 });
        })";
        rig.js(workers[1], code).await;
        rig.worker(workers[1]).send(&value).await.expect("sent");
        rig.message(workers[1], |m| m["same"] == true).await;

        for worker in &workers {
            rig.worker(*worker).disconnect().await;
            let ended = rig.ended(*worker).await;
            assert_eq!((ended.code, ended.voluntary), (Some(0), true), "{mode:?}");
        }
        rig.end().await;
    }
}

async fn a_broadcast_reaches_every_worker(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Kernel);
    let workers = rig.fork_many(3).await;
    for worker in &workers {
        rig.js(
            *worker,
            "process.on('message', (m) => { if (m.news) process.send({ heard: m.news }) })",
        )
        .await;
    }
    rig.cluster.broadcast(&json!({ "news": 42 })).await.expect("sent");
    for worker in &workers {
        rig.message(*worker, |m| m["heard"] == 42).await;
    }
    rig.end().await;
}

/// What comes before a program listens for messages is kept for it.
async fn messages_sent_before_the_worker_listens_wait_for_it(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Kernel);
    let worker = rig.fork().await;
    // No `online` yet: the process has just been started.
    assert_eq!(rig.js(worker, "return 'early'").await, "early");
    rig.end().await;
}

async fn arguments_directory_and_output_are_as_set(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    let place = folder.path().canonicalize().expect("its name");
    let rig = Rig::start(&runtime, "actor.cjs", |settings| {
        settings.arg("--one").arg("two words").cwd(&place).env("GREETING", "hello").supervise(false)
    });
    let worker = rig.fork().await;
    let code =
        "console.log('to stdout'); console.error('to stderr'); process.stdout.write('no newline');
        return { args: process.argv.slice(2), cwd: process.cwd(), greeting: process.env.GREETING }";
    let expected = json!({ "args": ["--one", "two words"], "cwd": place, "greeting": "hello" });
    assert_eq!(rig.js(worker, code).await, expected);
    rig.worker(worker).disconnect().await;
    rig.ended(worker).await;
    rig.eventually("the output", |rig| {
        let (out, err) =
            (rig.lines_of(worker, Stream::Stdout), rig.lines_of(worker, Stream::Stderr));
        (out == ["to stdout", "no newline"] && err == ["to stderr"]).then_some(())
    })
    .await;
    rig.end().await;
}

/// Each setup is told, and holds for workers that are started later.
async fn setup_again_holds_for_later_workers(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    let place = folder.path().canonicalize().expect("its name");
    let rig = Rig::actors(&runtime, Mode::Kernel);
    let tell = "return { args: process.argv.slice(2), cwd: process.cwd(), colour: process.env.COLOUR ?? null }";
    let here = std::env::current_dir().expect("a directory");
    let first = rig.fork().await;
    assert_eq!(rig.js(first, tell).await, json!({ "args": [], "cwd": here, "colour": null }));

    let settings = rig.cluster.settings().await.expect("running");
    let changed = settings.clone().arg("--later").cwd(&place).env("COLOUR", "green");
    rig.cluster.setup(changed).await.expect("set up");
    rig.cluster.setup(settings.cwd("/").arg("--last")).await.expect("set up again");
    rig.eventually("three setups", |rig| {
        (rig.events().iter().filter(|e| matches!(e, Event::Setup { .. })).count() == 3)
            .then_some(())
    })
    .await;
    let later = rig.fork().await;
    assert_eq!(
        rig.js(later, tell).await,
        json!({ "args": ["--last"], "cwd": "/", "colour": null })
    );
    assert_eq!(rig.js(first, tell).await["args"], json!([]), "one that runs is not changed");

    let wrong = polyfork::cluster::Settings::new("/no/such/program");
    rig.cluster.setup(wrong).await.expect_err("no such program");
    rig.end().await;
}

async fn connected_until_disconnect_and_alive_until_exit(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Kernel);
    let id = rig.fork().await;
    let worker = rig.worker(id);
    assert!(worker.is_connected().await && !worker.is_dead().await, "from the start");
    rig.js(
        id,
        "keep.s = net.createServer((c) => c.resume()); await listen(keep.s, 0, '127.0.0.1');
        keep.c = net.connect(keep.s.address().port, '127.0.0.1'); await once(keep.c, 'connect')",
    )
    .await;
    // It closes its channel and lives on, for the connection.
    rig.start_js(id, "cluster.worker.exitedAfterDisconnect = true; process.disconnect()").await;
    rig.eventually("disconnect", |rig| rig.life_of(id).contains(&"disconnect").then_some(())).await;
    assert!(!worker.is_connected().await && !worker.is_dead().await);
    let refused = worker.send(&1).await.expect_err("no channel");
    assert!(matches!(refused, polyfork::cluster::SendError::Disconnected), "{refused}");
    worker.kill(9).await;
    rig.ended(id).await;
    assert!(!worker.is_connected().await && worker.is_dead().await);
    rig.end().await;
}

/// An error that the program catches itself, or not, is its own business; so is what it says to users of
/// internal names.
async fn messages_with_internal_names_reach_nobody(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Kernel);
    let worker = rig.fork().await;
    let code = "
        process.send({ cmd: 'NODE_SOMETHING', x: 1 });
        process.send({ cmd: 'NODE_CLUSTER', ack: -1 });
        process.send({ cmd: 'NODE_CLUSTER', ack: 123456 });
        process.send({ cmd: 'NODE_CLUSTER', act: 'what' });
        process.send({ cmd: 'NODE_CLUSTER' });
        process.send({ cmd: 'NODE_' });";
    rig.js(worker, code).await;
    let seen = messages(&rig);
    let internal = seen.iter().filter(|m| m.get("cmd").is_some()).collect::<Vec<_>>();
    assert_eq!(internal, [&json!({ "cmd": "NODE_" })], "all others are internal");
    assert_eq!(rig.js(worker, "return 'still here'").await, "still here");
    rig.end().await;
}

/// Handles that a worker sends are taken and closed: its next messages depend on the answer.
async fn handles_from_a_worker_are_acknowledged_and_closed(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Handoff);
    let worker = rig.fork().await;
    let code = "
        const own = net.createServer();
        await listen(own, { port: 0, host: '127.0.0.1', exclusive: true });
        const client = net.connect(own.address().port, '127.0.0.1');
        const [socket] = await once(own, 'connection');
        const ended = text(client);
        const udp = dgram.createSocket('udp4');
        await listen(udp, { port: 0, address: '127.0.0.1', exclusive: true });
        process.send({ with: 'server' }, own);
        process.send({ with: 'datagrams' }, udp);
        process.send({ with: 'large', payload: 'x'.repeat(800000) }, socket);
        process.send({ with: 'again' }, socket);
        process.send({ with: 'nothing' });
        await ended; // the primary has closed its copy, and there is no other
        const { port } = own.address();
        await close(own);
        const error = await once(net.connect(port, '127.0.0.1'), 'connect').catch((e) => e);
        return error.code; // the same for the listening socket";
    assert_eq!(rig.js(worker, code).await, "ECONNREFUSED");
    let seen: Vec<_> = messages(&rig).iter().filter_map(|m| Some(m.get("with")?.clone())).collect();
    assert_eq!(seen, ["server", "datagrams", "large", "again", "nothing"]);
    let large = rig.message(worker, |m| m["with"] == "large").await;
    assert_eq!(large["payload"].as_str().map(str::len), Some(800_000));
    rig.end().await;
}

/// Connections go to the worker while it sends handles itself: neither side waits for the other.
async fn handles_in_both_directions_do_not_deadlock(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Handoff);
    let worker = rig.fork().await;
    rig.js(
        worker,
        "keep.s = net.createServer((socket) => {
        socket.on('error', () => {});
        process.send({ got: 'one' }, socket);
    }); await listen(keep.s, 0, '127.0.0.1')",
    )
    .await;
    let to = reach(&rig.listening(worker).await.0);
    let mut clients = tokio::task::JoinSet::new();
    let number = 200;
    for _ in 0..number {
        clients.spawn(async move { greeting(to).await.expect("closed in the end") });
    }
    while let Some(client) = clients.join_next().await {
        assert_eq!(client.expect("no panic"), "");
    }
    rig.eventually("all handles", |rig| {
        (messages(rig).iter().filter(|m| m["got"] == "one").count() == number).then_some(())
    })
    .await;
    rig.end().await;
}

/// Node: `worker.send(message, socket)` in the primary, `server.emit('connection', socket)` in the worker.
async fn a_socket_that_came_by_message_is_served_by_http(runtime: Runtime) {
    for serialization in [Serialization::Json, Serialization::Advanced] {
        let rig = Rig::start(&runtime, "actor.cjs", |s| {
            s.supervise(false).ready_timeout(None).serialization(serialization)
        });
        let worker = rig.fork().await;
        rig.js(
            worker,
            "keep.s = http.createServer((request, response) => response.end(`served ${request.url}`));
            process.on('message', (m, socket) => {
              if (m?.take === 'this') keep.s.emit('connection', socket);
            });",
        )
        .await;
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let to = listener.local_addr().expect("its address");
        // One more than are on their way at once.
        for number in 0..70 {
            let path = format!("/{number}");
            let asking = tokio::spawn(async move { get(to, &path).await });
            let (listening, handle) = (listener.try_clone().expect("a copy"), rig.worker(worker));
            let accepting = tokio::task::spawn_blocking(move || listening.accept());
            let (connection, _) = accepting.await.expect("no panic").expect("a connection");
            handle.send_with(&json!({ "take": "this" }), connection).await.expect("sent");
            let answer = asking.await.expect("no panic").expect("an answer");
            assert_eq!(answer.text(), format!("served /{number}"));
        }
        rig.end().await;
    }
}

async fn sockets_of_every_kind_are_sent_to_a_worker(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Handoff);
    let worker = rig.fork().await;
    let code = "process.on('message', (m, handle) => {
        if (m?.kind) process.send({ kind: m.kind, got: handle?.constructor.name ?? null });
        handle?.close?.(); handle?.destroy?.();
    })";
    rig.js(worker, code).await;
    let to = rig.worker(worker);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let (unix, _other) = UnixStream::pair().expect("a pair");
    let udp = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    // A worker of Node 18 asks its primary for the port of a server that it was sent, and there is none.
    if runtime.major > 18 {
        to.send_with(&json!({ "kind": "server" }), listener).await.expect("sent");
    }
    to.send_with(&json!({ "kind": "socket" }), unix).await.expect("sent");
    to.send_with(&json!({ "kind": "datagrams" }), udp).await.expect("sent");
    let all = [("server", "Server"), ("socket", "Socket"), ("datagrams", "Socket")];
    for (kind, got) in all.into_iter().skip(usize::from(runtime.major <= 18)) {
        let told = rig.message(worker, |m| m["kind"] == kind).await;
        assert_eq!(told["got"], got, "{kind}");
    }
    // What would end the worker is refused, and it goes on.
    let file = std::fs::File::open("/dev/null").expect("a file");
    let refused = to.send_with(&1, file).await.expect_err("Node takes no file");
    assert!(matches!(refused, SendError::Handle(_)), "{refused}");
    assert_eq!(rig.js(worker, "return 'still here'").await, "still here");
    rig.end().await;
}

/// Node: `stdio: ['pipe', 'pipe', 'pipe', 'ipc', 'pipe', ...]`.
async fn further_pipes_carry_bytes_both_ways(runtime: Runtime) {
    let rig = Rig::start(&runtime, "actor.cjs", |s| {
        s.supervise(false).ready_timeout(None).pipe(4).pipe(9)
    });
    for worker in rig.fork_many(2).await {
        rig.js(
            worker,
            "for (const fd of [4, 9]) {
              const pipe = new net.Socket({ fd, readable: true, writable: true });
              pipe.on('data', (data) => pipe.write(`${fd}: ${data}`));
            }",
        )
        .await;
        for number in [4, 9] {
            let taken = rig.worker(worker).take_pipe(number).await.expect("no error");
            let mut pipe = taken.expect("a pipe");
            pipe.write_all(b"hello").await.expect("written");
            let mut answer = [0; 8];
            pipe.read_exact(&mut answer).await.expect("an answer");
            assert_eq!(std::str::from_utf8(&answer), Ok(format!("{number}: hello").as_str()));
            assert!(rig.worker(worker).take_pipe(number).await.expect("no error").is_none());
        }
        assert!(rig.worker(worker).take_pipe(5).await.expect("no error").is_none());
    }
    // The channel's own number is not to be had.
    let settings = rig.cluster.settings().await.expect("settings").pipe(3);
    let refused = rig.cluster.setup(settings).await.expect_err("3 is the channel");
    assert!(refused.to_string().contains("choose from 4 on"), "{refused}");
    rig.end().await;
}

/// All messages so far.
fn messages(rig: &Rig) -> Vec<serde_json::Value> {
    let message = |event: &Event| match event {
        Event::Message { message, .. } => message.decode().ok(),
        _ => None,
    };
    rig.events().iter().filter_map(message).collect()
}

/// Cluster's own listeners would hold it for ever. One that listens, or waits for messages, is held as ever.
async fn a_worker_whose_end_means_something_ends_when_nothing_is_left_to_do(runtime: Runtime) {
    for mode in [Mode::Kernel, Mode::Handoff] {
        let restart = RestartPolicy { stop_on: StopOn::AnyEnd, ..RestartPolicy::default() };
        let long = Ready::ListeningOr(Duration::from_secs(60));
        let change = |settings: Settings| settings.restart(restart).ready(long);
        let rig = Rig::serving(&runtime, "job.cjs", mode, 3, change);
        rig.online(3).await;
        let (told, _) = rig.listening(2).await;
        let ended = rig.ended(1).await;
        assert_eq!((ended.code, ended.voluntary), (Some(0), false), "{}", rig.story());
        assert_eq!(get(reach(&told), "/").await.expect("an answer").text(), "here");
        rig.worker(3).send("go").await.expect("it listens");
        assert_eq!(rig.ended(3).await.code, Some(5), "{}", rig.story());
        assert_eq!(get(reach(&told), "/").await.expect("an answer").text(), "here");
        rig.end().await;
    }
}
