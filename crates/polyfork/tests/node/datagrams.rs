//! UDP in workers: one socket of the primary's, shared by those who ask for the same.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use serde_json::{Value, json};

use super::remote::Remote;
use super::support::{Mode, PATIENCE, Rig, Runtime, Thrown, own_host};

const LOCAL: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// A socket that answers each datagram with its worker's id.
const BIND: &str = "keep.u = dgram.createSocket(TYPE);
    keep.u.on('message', (m, from) => keep.u.send(`${cluster.worker.id}`, from.port, from.address));
    return listen(keep.u, ";

fn bind(kind: &str, how: &str) -> String {
    format!("{}{how})", BIND.replace("TYPE", kind))
}

fn port_of(address: &Value) -> u16 {
    address["port"]
        .as_u64()
        .and_then(|port| u16::try_from(port).ok())
        .unwrap_or_else(|| panic!("{address}"))
}

/// Sends one datagram and gives what comes back.
async fn ask(host: Ipv4Addr, port: u16) -> String {
    let asker = tokio::net::UdpSocket::bind((host, 0)).await.expect("a socket");
    asker.connect((host, port)).await.expect("an address");
    let mut answer = [0; 64];
    // Loopback loses a datagram only when a buffer is full, but it may.
    for _ in 0..PATIENCE.as_secs() {
        asker.send(b"who?").await.expect("sent");
        if let Ok(length) =
            tokio::time::timeout(Duration::from_secs(1), asker.recv(&mut answer)).await
        {
            return String::from_utf8_lossy(&answer[..length.expect("received")]).into_owned();
        }
    }
    panic!("no answer from port {port}")
}

on_every_node! {
    workers_share_a_socket_on_port_0_and_on_a_fixed_port,
    a_worker_may_close_and_bind_again,
    ipv6_only_leaves_the_ipv4_port_free,
    two_sockets_in_a_worker_share_a_port_with_reuse_addr,
    a_socket_of_the_workers_own_never_asks_the_primary,
    a_descriptor_that_the_primary_inherited_is_shared,
}

async fn workers_share_a_socket_on_port_0_and_on_a_fixed_port(runtime: Runtime) {
    for mode in Mode::ALL {
        let rig = Rig::actors(&runtime, mode);
        let workers = rig.fork_many(2).await;
        let address =
            rig.js(workers[0], &bind("'udp4'", "{ port: 0, address: '127.0.0.1' }")).await;
        let port = port_of(&address);
        assert_eq!(
            rig.js(workers[1], &bind("'udp4'", "{ port: 0, address: '127.0.0.1' }")).await,
            address,
            "{mode:?}"
        );
        for _ in 0..4 {
            assert!(["1", "2"].contains(&ask(LOCAL, port).await.as_str()), "{mode:?}");
        }
        // Whoever stays answers.
        rig.js(workers[0], "return close(keep.u)").await;
        assert_eq!(ask(LOCAL, port).await, "2", "{mode:?}");
        rig.worker(workers[1]).disconnect().await;
        let ended = rig.ended(workers[1]).await;
        assert_eq!((ended.code, ended.voluntary), (Some(0), true));

        let host = own_host();
        let probe = UdpSocket::bind((host, 0)).expect("a port");
        let free = probe.local_addr().expect("its number").port();
        let taken: Result<_, Thrown> =
            rig.try_js(workers[0], &bind("'udp4'", &format!("{free}, '{host}'"))).await;
        assert_eq!(taken.expect_err("taken").code.as_deref(), Some("EADDRINUSE"));
        drop(probe);
        // A child that another test starts at this moment holds a copy of the probe until it executes its program.
        let address = loop {
            let code = bind("'udp4'", &format!("{free}, '{host}'"));
            match rig.try_js(workers[0], &code).await {
                Ok(address) => break address,
                Err(thrown) => assert_eq!(thrown.code.as_deref(), Some("EADDRINUSE")),
            }
        };
        assert_eq!(port_of(&address), free);
        assert_eq!(ask(host, free).await, "1");
        rig.end().await;
    }
}

/// Bind to port 0 and close, again and again: each works.
async fn a_worker_may_close_and_bind_again(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Kernel);
    let worker = rig.fork().await;
    for _ in 0..8 {
        let port = port_of(&rig.js(worker, &bind("'udp4'", "0, '127.0.0.1'")).await);
        let other = "keep.v = dgram.createSocket('udp4'); return listen(keep.v, 0, '127.0.0.1')";
        assert_ne!(port_of(&rig.js(worker, other).await), port, "a second socket on port 0");
        assert_eq!(ask(LOCAL, port).await, "1");
        rig.js(worker, "await close(keep.u); return close(keep.v)").await;
    }
    rig.end().await;
}

async fn ipv6_only_leaves_the_ipv4_port_free(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Kernel);
    let worker = rig.fork().await;
    let only = rig
        .js(worker, &bind("{ type: 'udp6', ipv6Only: true }", "{ port: 0, address: '::' }"))
        .await;
    assert_eq!(only["family"], "IPv6");
    UdpSocket::bind((own_host(), port_of(&only))).expect("the IPv4 port is free");
    let both = "keep.v = dgram.createSocket('udp6'); return listen(keep.v, 0)";
    let both = port_of(&rig.js(worker, both).await);
    UdpSocket::bind((own_host(), both)).expect_err("taken");
    rig.end().await;
}

/// Two sockets in one worker share a port if both say so, and only then, as under Node's own primary.
async fn two_sockets_in_a_worker_share_a_port_with_reuse_addr(runtime: Runtime) {
    let mut stock = Remote::stock(&runtime, "rr");
    let twin = stock.fork().await;
    let rig = Rig::actors(&runtime, Mode::Kernel);
    let worker = rig.fork().await;
    for reuse in [true, false] {
        let host = own_host();
        let share = |first: &str| {
            format!(
                "
            const options = {{ type: 'udp4', reuseAddr: {reuse} }};
            const [a, b] = [dgram.createSocket(options), dgram.createSocket(options)];
            try {{
                const {{ port }} = await listen(a, {first}, '{host}');
                return (await listen(b, port, '{host}')).port === port;
            }} catch (error) {{
                return error.code;
            }} finally {{
                a.close();
                try {{ b.close() }} catch {{}}
            }}"
            )
        };
        let expected = if reuse { json!(true) } else { json!("EADDRINUSE") };
        assert_eq!(stock.js(twin, &share("0")).await, expected, "Node, reuseAddr {reuse}");
        assert_eq!(rig.js(worker, &share("0")).await, expected, "reuseAddr {reuse}");
        // Both by number. From 22 on, stock Node dies of an assertion here.
        let free = UdpSocket::bind((host, 0)).expect("a port").local_addr().expect("known").port();
        assert_eq!(
            rig.js(worker, &share(&free.to_string())).await,
            expected,
            "reuseAddr {reuse}, both by number"
        );
    }
    rig.end().await;
    stock.end().await;
}

/// Sockets that are the worker's own: exclusive, reusePort, or bound by sending.
async fn a_socket_of_the_workers_own_never_asks_the_primary(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Kernel);
    let (one, two) = (rig.fork().await, rig.fork().await);
    let exclusive = bind("'udp4'", "{ port: 0, address: '127.0.0.1', exclusive: true }");
    let first = port_of(&rig.js(one, &exclusive).await);
    assert_ne!(port_of(&rig.js(two, &exclusive).await), first);
    let sent = rig
        .js(
            one,
            &format!(
                "
        const s = dgram.createSocket('udp4');
        s.send('x', {first}, '127.0.0.1');
        await once(s, 'message');
        s.close();
        return 'answered'"
            ),
        )
        .await;
    assert_eq!(sent, "answered");
    if runtime.major >= 24 {
        let host = own_host();
        let free = UdpSocket::bind((host, 0)).expect("a port").local_addr().expect("known").port();
        for worker in [one, two] {
            let own = bind("{ type: 'udp4', reusePort: true }", &format!("{free}, '{host}'"));
            assert_eq!(port_of(&rig.js(worker, &own).await), free);
        }
    }
    let bound = |e: &_| matches!(e, polyfork::cluster::Event::Bound { .. });
    assert!(!rig.events().iter().any(bound), "the primary was not asked");
    rig.end().await;
}

async fn a_descriptor_that_the_primary_inherited_is_shared(runtime: Runtime) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = socket.local_addr().expect("its number").port();
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let mut primary =
        Remote::ours(&runtime, Mode::Kernel, [(9, socket.into()), (10, listener.into())]);
    let (one, two) = (primary.fork().await, primary.fork().await);
    for worker in [one, two] {
        assert_eq!(port_of(&primary.js(worker, &bind("'udp4'", "{ fd: 9 }")).await), port);
    }
    assert!(["1", "2"].contains(&ask(LOCAL, port).await.as_str()));
    // A descriptor of the other kind is refused in both directions.
    let wrong =
        [bind("'udp4'", "{ fd: 10 }"), "return listen(net.createServer(), { fd: 9 })".to_owned()];
    for code in wrong {
        let error = primary.try_js(one, &code).await.expect_err("not of this kind");
        println!("{error:?}");
        assert_eq!(primary.js(one, "return 1").await, 1, "and the worker lives");
    }
    primary.end().await;
}
