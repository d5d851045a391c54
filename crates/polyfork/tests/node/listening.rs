//! Where workers listen: every protocol and every way to name an address, under every mode.
//!
//! What Node's own primary does is not written down here but asked: `Remote::stock` runs the same code. UDP is
//! in `datagrams`, exact counts are in `exactness`.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream as StdStream};
use std::os::unix::fs::PermissionsExt as _;

use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;

use polyfork::cluster::Carried;

use super::client::{get_unix, greeting, reach};
use super::remote::{Remote, socket_name};
use super::support::{Mode, Rig, Runtime, Thrown, own_host};

/// Waits until a worker has listened this often.
async fn listened(rig: &Rig, worker: u64, times: usize) {
    rig.eventually(&format!("listening {times} times of worker {worker}"), |rig| {
        (rig.life_of(worker).iter().filter(|name| **name == "listening").count() >= times)
            .then_some(())
    })
    .await;
}

fn port_of(address: &Value) -> u16 {
    address["port"]
        .as_u64()
        .and_then(|port| u16::try_from(port).ok())
        .unwrap_or_else(|| panic!("{address}"))
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// Who greets `times` connections made one after the other, sorted.
async fn greeted_by(to: SocketAddr, times: usize) -> Vec<String> {
    let mut ids = Vec::new();
    for _ in 0..times {
        ids.push(greeting(to).await.expect("greeted"));
    }
    ids.sort_unstable();
    ids
}

const LISTEN: &str = "keep.s = net.createServer(greeter()); return listen(keep.s, ";

on_every_node! {
    every_protocol_reaches_every_worker,
    an_address_may_be_named_in_every_way_node_knows,
    ipv6_only_leaves_the_ipv4_port_free_and_its_absence_takes_both,
    errors_are_those_of_nodes_own_primary,
    a_second_listen_on_the_same_port_fails_and_harms_nothing,
    a_worker_may_close_and_listen_again,
    a_server_bound_exclusively_or_with_reuse_port_is_the_workers_own,
    unix_paths_and_abstract_names_are_served_by_all_in_turn,
    a_descriptor_that_the_primary_inherited_is_served_by_all,
    tls_sessions_go_on_with_another_worker,
    a_worker_at_its_limit_passes_connections_on,
}

/// Six servers on port 0 in one program: six ports, the same in each worker, each served by all in turn.
async fn every_protocol_reaches_every_worker(runtime: Runtime) {
    for mode in Mode::ALL {
        let rig = Rig::actors(&runtime, mode);
        let (one, two, client) = (rig.fork().await, rig.fork().await, rig.fork().await);
        let serve = "
            keep.servers = {
                http: http.createServer(counter()), https: https.createServer(secret(), counter()),
                http2: http2.createServer(counter()), http2s: http2.createSecureServer(secret(), counter()),
                tls: tls.createServer(secret(), greeter()), net: net.createServer(greeter()) };
            const ports = {};
            for (const [name, server] of Object.entries(keep.servers)) {
                ports[name] = (await listen(server, { port: 0, host: '127.0.0.1' })).port;
            }
            return ports;";
        let ports = rig.js(one, serve).await;
        assert_eq!(rig.js(two, serve).await, ports, "{mode:?}: all workers have the same ports");
        let mut different: Vec<_> =
            ports.as_object().expect("ports").values().map(Value::to_string).collect();
        different.sort_unstable();
        different.dedup();
        assert_eq!(different.len(), 6, "{mode:?}: {ports}");
        for worker in [one, two] {
            listened(&rig, worker, 6).await;
        }
        let ask = "
            const insecure = { host: '127.0.0.1', rejectUnauthorized: false };
            const overHttp = async (module, port) => {
                const request = module.get({ ...insecure, port, agent: false });
                const [response] = await once(request, 'response');
                return text(response);
            };
            const overHttp2 = async (scheme, port) => {
                const session = http2.connect(`${scheme}://127.0.0.1:${port}`, insecure);
                const body = await text(session.request({ ':path': '/' }));
                session.close();
                return body;
            };
            const ways = {
                http: (port) => overHttp(http, port), https: (port) => overHttp(https, port),
                http2: (port) => overHttp2('http', port), http2s: (port) => overHttp2('https', port),
                tls: (port) => text(tls.connect({ ...insecure, port })),
                net: (port) => text(net.connect(port, '127.0.0.1')) };
            const heard = {};
            for (const [name, port] of Object.entries(PORTS)) {
                heard[name] = [];
                for (let n = 0; n < 6; n++) heard[name].push(await ways[name](port));
                heard[name] = heard[name].sort().join('');
            }
            return heard;";
        let heard = rig.js(client, &ask.replace("PORTS", &ports.to_string())).await;
        for (name, ids) in heard.as_object().expect("what was heard") {
            let ids = ids.as_str().expect("ids");
            if Mode::TURNS.contains(&mode) {
                assert_eq!(ids, "111222", "{mode:?} {name}: exact turns");
            } else {
                assert!(
                    ids.len() == 6 && ids.bytes().all(|id| b"12".contains(&id)),
                    "{mode:?} {name}: {ids}"
                );
            }
        }
        rig.end().await;
    }
}

/// Whatever `listen` is given, the workers hear of the same address as under Node's own primary, and serve.
async fn an_address_may_be_named_in_every_way_node_knows(runtime: Runtime) {
    let mut stock = Remote::stock(&runtime, "rr");
    let twin = stock.fork().await;
    let ways = [
        ("", "127.0.0.1"),
        ("0", "127.0.0.1"),
        ("{ port: 0, host: 'localhost' }", "127.0.0.1"),
        ("0, '127.0.0.1', 17", "127.0.0.1"),
        ("{ port: 0, host: '0.0.0.0', backlog: 3 }", "127.0.0.1"),
        ("{ port: 0, host: '::' }", "::1"),
        ("{ port: 0, host: '::1' }", "::1"),
        ("{ port: 0, host: '::', ipv6Only: true }", "::1"),
        ("{ port: 0, ipv6Only: true }", "::1"),
    ];
    for mode in Mode::ALL {
        let rig = Rig::actors(&runtime, mode);
        let workers = rig.fork_many(2).await;
        for (turn, (way, host)) in ways.iter().enumerate() {
            let mut expected = stock.js(twin, &format!("{LISTEN}{way})")).await;
            stock.js(twin, "return close(keep.s)").await;
            let address = rig.js(workers[0], &format!("{LISTEN}{way})")).await;
            expected["port"] = address["port"].clone();
            assert_eq!(address, expected, "{mode:?} listen({way})");
            assert_eq!(
                rig.js(workers[1], &format!("{LISTEN}{way})")).await,
                expected,
                "{mode:?} listen({way})"
            );
            for worker in &workers {
                listened(&rig, *worker, turn + 1).await;
            }
            let to = SocketAddr::new(host.parse().expect("an address"), port_of(&address));
            let ids = greeted_by(to, 4).await;
            if Mode::TURNS.contains(&mode) {
                assert_eq!(ids, ["1", "1", "2", "2"], "{mode:?} listen({way})");
            }
            for worker in &workers {
                rig.js(*worker, "return close(keep.s)").await;
            }
        }
        rig.end().await;
    }
    stock.end().await;
}

async fn ipv6_only_leaves_the_ipv4_port_free_and_its_absence_takes_both(runtime: Runtime) {
    for mode in Mode::ALL {
        let rig = Rig::actors(&runtime, mode);
        let (one, two) = (rig.fork().await, rig.fork().await);
        let only =
            rig.js(one, &format!("{LISTEN}{{ port: 0, host: '::', ipv6Only: true }})")).await;
        TcpListener::bind((own_host(), port_of(&only))).expect("the IPv4 port is free");
        let both = rig.js(two, &format!("{LISTEN}{{ port: 0 }})")).await;
        let taken = TcpListener::bind((own_host(), port_of(&both))).expect_err("taken");
        assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse, "{mode:?}");
        rig.listening(two).await;
        assert_eq!(greeting(local(port_of(&both))).await.expect("dual stack"), "2", "{mode:?}");
        rig.end().await;
    }
}

/// Errors reach the worker word for word as from Node's own primary.
async fn errors_are_those_of_nodes_own_primary(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    let holder = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let taken = holder.local_addr().expect("its number").port();
    let mut ways = vec![
        format!("{{ port: {taken}, host: '127.0.0.1' }}"),
        format!("{taken}"),
        "{ port: 0, host: '203.0.113.1' }".to_owned(),
        "{ port: 0, host: '2001:db8::1' }".to_owned(),
        "{ fd: 77 }".to_owned(),
        format!("'{}'", socket_name(folder.path(), "no/such/folder")),
        format!("'{}'", folder.path().display()),
    ];
    if runtime.major >= 26 {
        // Earlier ones bind a name that is cut off.
        ways.push(format!("'{}'", socket_name(folder.path(), &"x".repeat(150))));
    }
    for (mode, policy) in [(Mode::Kernel, "rr"), (Mode::Handoff, "rr"), (Mode::Shared, "none")] {
        let mut stock = Remote::stock(&runtime, policy);
        let twin = stock.fork().await;
        let rig = Rig::actors(&runtime, mode);
        let worker = rig.fork().await;
        for way in &ways {
            let expected: Result<Value, Thrown> =
                stock.try_js(twin, &format!("{LISTEN}{way})")).await;
            let got = rig.try_js(worker, &format!("{LISTEN}{way})")).await;
            assert!(
                got.is_err() && got == expected,
                "{mode:?} listen({way}): {got:?}, Node: {expected:?}"
            );
        }
        assert_eq!(rig.js(worker, "return 'unharmed'").await, "unharmed");
        rig.end().await;
        stock.end().await;
    }
    drop(holder);
}

/// A worker cannot listen twice on one port; the first is not hurt; later either worker may have it again.
async fn a_second_listen_on_the_same_port_fails_and_harms_nothing(runtime: Runtime) {
    for mode in Mode::ALL {
        let host = own_host();
        let rig = Rig::actors(&runtime, mode);
        let (one, two) = (rig.fork().await, rig.fork().await);
        let port = port_of(&rig.js(one, &format!("{LISTEN}0, '{host}')")).await);
        let fixed = format!("{LISTEN}{port}, '{host}')");
        let again = format!("keep.t = net.createServer(); return listen(keep.t, {port}, '{host}')");
        // The port that 0 led to is held as "0": as under Node, the number is somebody else's.
        let error = rig.try_js(one, &again).await.expect_err("held already");
        assert_eq!(error.code.as_deref(), Some("EADDRINUSE"), "{mode:?}: {error:?}");
        assert_eq!(greeting((host, port).into()).await.expect("the first is not hurt"), "1");
        rig.js(one, "return close(keep.s)").await;

        for worker in [one, two] {
            assert_eq!(port_of(&rig.js_when_free(worker, &fixed).await), port, "{mode:?}");
            for _ in 0..2 {
                let error = rig.try_js(worker, &again).await.expect_err("held already");
                assert_eq!(error.code.as_deref(), Some("EADDRINUSE"), "{mode:?}: {error:?}");
            }
        }
        for worker in [one, two] {
            listened(&rig, worker, if worker == one { 2 } else { 1 }).await;
        }
        let mut ids = greeted_by((host, port).into(), 4).await;
        ids.dedup();
        assert!(mode == Mode::Shared || ids == ["1", "2"], "{mode:?}: {ids:?}");
        for (leaves, stays) in [(one, two), (two, one)] {
            rig.js(leaves, "return close(keep.s)").await;
            assert_eq!(
                greeted_by((host, port).into(), 3).await,
                vec![stays.to_string(); 3],
                "{mode:?}"
            );
            rig.js_when_free(leaves, &fixed).await;
        }
        rig.end().await;
    }
}

/// Close and listen again, many times, on a fixed port and on port 0: never an old socket, never an error.
async fn a_worker_may_close_and_listen_again(runtime: Runtime) {
    for mode in Mode::ALL {
        let rig = Rig::actors(&runtime, mode);
        let (one, two) = (rig.fork().await, rig.fork().await);
        let shared = port_of(&rig.js(two, &format!("{LISTEN}0, '127.0.0.1')")).await);
        for turn in 0..5 {
            let port = port_of(&rig.js(one, &format!("{LISTEN}0, '127.0.0.1')")).await);
            assert_eq!(port, shared, "{mode:?}: the first server on port 0 is everybody's first");
            let second =
                "keep.t = http.createServer(counter()); return listen(keep.t, 0, '127.0.0.1')";
            let other = port_of(&rig.js(one, second).await);
            assert_ne!(other, shared);
            listened(&rig, one, 2 * (turn + 1)).await;
            StdStream::connect(local(other)).expect("open");
            rig.js(one, "await close(keep.s); return close(keep.t)").await;
            rig.eventually("the second one's end", |rig| {
                let is_closed = |e: &&_| matches!(e, polyfork::cluster::Event::Closed { .. });
                (rig.events().iter().filter(is_closed).count() > turn).then_some(())
            })
            .await;
            assert_eq!(greeted_by(local(shared), 2).await, ["2", "2"], "{mode:?}");
        }
        rig.end().await;
    }
}

async fn a_server_bound_exclusively_or_with_reuse_port_is_the_workers_own(runtime: Runtime) {
    for mode in Mode::ALL {
        let rig = Rig::actors(&runtime, mode);
        let (one, two) = (rig.fork().await, rig.fork().await);
        let exclusive = format!("{LISTEN}{{ port: 0, host: '127.0.0.1', exclusive: true }})");
        let first = port_of(&rig.js(one, &exclusive).await);
        // It tells nobody; what it listens on is found.
        let (address, carried) = rig.listening(one).await;
        assert_eq!((reach(&address), carried), (local(first), Carried::OwnSocket), "{mode:?}");
        assert_ne!(port_of(&rig.js(two, &exclusive).await), first);
        let taken = format!(
            "keep.t = net.createServer(); return listen(keep.t, {{ port: {first}, host: '127.0.0.1', exclusive: true }})"
        );
        let error = rig.try_js(two, &taken).await.expect_err("taken");
        assert_eq!(error.code.as_deref(), Some("EADDRINUSE"));
        assert_eq!(greeting(local(first)).await.expect("greeted"), "1");

        if runtime.major >= 22 {
            let (three, four) = (rig.fork().await, rig.fork().await);
            // Nobody else uses this address, so every number is free.
            let (host, free) = (own_host(), 47_011);
            for worker in [three, four] {
                let own = format!("{LISTEN}{{ port: {free}, host: '{host}', reusePort: true }})");
                assert_eq!(port_of(&rig.js(worker, &own).await), free);
                assert_eq!(rig.listening(worker).await.1, Carried::OwnSocket, "{mode:?}");
            }
            let ids = greeted_by((host, free).into(), 12).await;
            assert!(ids.iter().all(|id| ["3", "4"].contains(&id.as_str())), "{mode:?}: {ids:?}");
        }
        let bound = |e: &_| matches!(e, polyfork::cluster::Event::Bound { .. });
        assert!(!rig.events().iter().any(bound), "the primary was not asked");
        rig.end().await;
    }
}

async fn unix_paths_and_abstract_names_are_served_by_all_in_turn(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut stock = Remote::stock(&runtime, "rr");
    let twin = stock.fork().await;
    let mode_of =
        |path: &str| std::fs::metadata(path).expect("a file").permissions().mode() & 0o7777;
    for mode in Mode::ALL {
        let rig = Rig::actors(&runtime, mode);
        let workers = rig.fork_many(2).await;
        let mut times = 0;
        for options in [
            "",
            ", readableAll: true",
            ", writableAll: true",
            ", readableAll: true, writableAll: true, backlog: 9",
        ] {
            let theirs = socket_name(folder.path(), "stock");
            let serve = |path: &str| {
                format!(
                    "keep.h = http.createServer(counter()); return listen(keep.h, {{ path: '{path}'{options} }})"
                )
            };
            stock.js(twin, &serve(&theirs)).await;
            let expected = mode_of(&theirs);
            stock.js(twin, "return close(keep.h)").await;

            let path = socket_name(folder.path(), "ours");
            times += 1;
            for worker in &workers {
                assert_eq!(rig.js(*worker, &serve(&path)).await, json!(path), "{mode:?}");
                listened(&rig, *worker, times).await;
            }
            // From 22 on, Node takes away what the owner has unless all is asked for; we only add.
            let got = mode_of(&path);
            assert!(
                got & expected == expected && got & !expected & !0o755 == 0,
                "{mode:?}{options}: {got:o}, Node: {expected:o}"
            );
            let mut ids = Vec::new();
            for _ in 0..4 {
                ids.push(get_unix(path.as_ref(), "/").await.expect("answered").text());
            }
            ids.sort_unstable();
            assert!(mode == Mode::Shared || ids == ["1", "1", "2", "2"], "{mode:?}: {ids:?}");
            for worker in &workers {
                rig.js(*worker, "return close(keep.h)").await;
            }
            rig.eventually("the file's end", |_| {
                (!std::path::Path::new(&path).exists()).then_some(())
            })
            .await;
        }

        let name = format!("polyfork-test-{}-{}-{mode:?}", std::process::id(), runtime.name);
        for worker in &workers {
            let address = rig.js(*worker, &format!("{LISTEN}'\\0{name}')")).await;
            assert_eq!(address, json!(format!("\0{name}")), "{mode:?}");
            listened(&rig, *worker, times + 1).await;
        }
        let mut ids = Vec::new();
        for _ in 0..4 {
            let mut text = String::new();
            let mut client =
                tokio::net::UnixStream::connect(format!("\0{name}")).await.expect("connected");
            client.read_to_string(&mut text).await.expect("greeted");
            ids.push(text);
        }
        ids.sort_unstable();
        assert!(mode == Mode::Shared || ids == ["1", "1", "2", "2"], "{mode:?}: {ids:?}");
        rig.end().await;
    }
    stock.end().await;
}

/// A descriptor of the primary's, named by its number there.
async fn a_descriptor_that_the_primary_inherited_is_served_by_all(runtime: Runtime) {
    for mode in Mode::ALL {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let to = listener.local_addr().expect("its number");
        let null = std::fs::File::open("/dev/null").expect("open");
        let mut primary = Remote::ours(&runtime, mode, [(9, listener.into()), (8, null.into())]);
        let (one, two) = (primary.fork().await, primary.fork().await);
        for worker in [one, two] {
            primary.js(worker, &format!("{LISTEN}{{ fd: 9 }})")).await;
        }
        let mut ids = greeted_by(to, 6).await;
        ids.dedup();
        assert!(mode == Mode::Shared || ids == ["1", "2"], "{mode:?}: {ids:?}");
        // Not inherited, not open, not a socket.
        for fd in [3, 10, 77, 8] {
            let error = primary
                .try_js(one, &format!("{LISTEN}{{ fd: {fd} }})"))
                .await
                .expect_err("not inherited");
            assert_eq!(error.code.as_deref(), Some("EINVAL"), "{fd}: {error:?}");
        }
        primary.end().await;
    }
}

/// All workers have one key for TLS tickets, so a session goes on with another worker.
async fn tls_sessions_go_on_with_another_worker(runtime: Runtime) {
    for mode in Mode::TURNS {
        let rig = Rig::actors(&runtime, mode);
        let (one, two, client) = (rig.fork().await, rig.fork().await, rig.fork().await);
        let serve = "
            keep.s = tls.createServer({ ...secret(), maxVersion: 'TLSv1.2' }, greeter());
            const { port } = await listen(keep.s, 0, '127.0.0.1');
            return { port, keys: keep.s.getTicketKeys().toString('hex') };";
        let first = rig.js(one, serve).await;
        assert_eq!(rig.js(two, serve).await, first, "{mode:?}: the same port and the same keys");
        for worker in [one, two] {
            rig.listening(worker).await;
        }
        let resume = format!(
            "
            const to = {{ port: {}, host: '127.0.0.1', rejectUnauthorized: false }};
            const first = tls.connect(to);
            await once(first, 'secureConnect');
            const session = first.getSession();
            const heard = [await text(first)];
            for (let n = 0; n < 3; n++) {{
                const next = tls.connect({{ ...to, session }});
                await once(next, 'secureConnect');
                const reused = next.isSessionReused();
                heard.push(`${{await text(next)}} ${{reused}}`);
            }}
            return heard.sort();",
            first["port"]
        );
        let heard = rig.js(client, &resume).await;
        let expected = [
            json!(["1", "1 true", "2 true", "2 true"]),
            json!(["1 true", "1 true", "2", "2 true"]),
        ];
        assert!(expected.contains(&heard), "{mode:?}: {heard}");
        rig.end().await;
    }
}

/// A worker at its limit refuses what it is handed, and others get it; nobody is bounced to and fro without
/// end, and a client that nobody can have now is served as soon as one can.
async fn a_worker_at_its_limit_passes_connections_on(runtime: Runtime) {
    for limit in [0, 1, 9] {
        let rig = Rig::actors(&runtime, Mode::Handoff);
        let (limited, other) = (rig.fork().await, rig.fork().await);
        let serve = |limit: &str| {
            format!("
            keep.held = new Set();
            keep.s = net.createServer((c) => {{ keep.held.add(c); c.on('error', () => {{}}); c.write(`${{cluster.worker.id}}`); }});
            {limit} return listen(keep.s, 0, '127.0.0.1')")
        };
        let to = local(port_of(
            &rig.js(limited, &serve(&format!("keep.s.maxConnections = {limit};"))).await,
        ));
        rig.js(other, &serve("")).await;
        rig.listening(limited).await;
        rig.listening(other).await;
        let mut held = Vec::new();
        let mut ids = Vec::new();
        for _ in 0..24 {
            let mut client = tokio::net::TcpStream::connect(to).await.expect("connected");
            ids.push(client.read_u8().await.expect("placed somewhere"));
            held.push(client);
        }
        let limited_has = ids.iter().filter(|id| **id == b'1').count();
        // 18 and 20 take 0 for no limit.
        let most = if limit == 0 && runtime.major < 22 { 12 } else { limit };
        println!("limit {limit}: {limited_has} of 24");
        assert_eq!(limited_has, most, "limit {limit}: {ids:?}");

        rig.js(other, "keep.s.close()").await;
        if limit > 0 {
            let mut waiting = tokio::net::TcpStream::connect(to).await.expect("in the queue");
            rig.js(limited, "for (const c of keep.held) c.destroy()").await;
            assert_eq!(waiting.read_u8().await.expect("served in the end"), b'1');
        }
        rig.end().await;
    }
}
