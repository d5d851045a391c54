//! A primary without privileges: no eBPF, no low ports. The tests before these run as whoever runs them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use super::client::greeting;
use super::remote::{NOBODY, Remote};
use super::support::{Mode, Runtime, skip};

on_every_node! {
    connections_spread_over_live_workers_and_low_ports_are_refused,
}

/// A folder that belongs to nobody.
fn cache() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let id = |id| (rustix::fs::Uid::from_raw(id), rustix::fs::Gid::from_raw(id));
    let (user, group) = id(NOBODY);
    rustix::fs::chown(folder.path(), Some(user), Some(group)).expect("root may");
    folder
}

/// Whether somebody else may run this test program and the runtime.
fn others_may_run(runtime: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    let test = std::env::current_exe().expect("this program");
    [test.as_path(), runtime].into_iter().all(|program| {
        program.ancestors().all(|part| {
            std::fs::metadata(part).is_ok_and(|found| found.permissions().mode() & 0o001 != 0)
        })
    })
}

/// The classic program picks at random among the live: everybody gets some, the dead get none.
async fn connections_spread_over_live_workers_and_low_ports_are_refused(runtime: Runtime) {
    if !rustix::process::geteuid().is_root() || !others_may_run(&runtime.path) {
        let test = format!("{}::{}", module_path!(), runtime.name);
        return skip(&test, "needs root, and a place where others may run what root built");
    }
    let cache = cache();
    let mut primary = Remote::unprivileged(&runtime, Mode::Kernel, cache.path());
    let (one, two) = (primary.fork().await, primary.fork().await);
    let listen =
        "keep.s = net.createServer(greeter()); return (await listen(keep.s, 0, '127.0.0.1')).port";
    let port = primary.js(one, listen).await;
    assert_eq!(primary.js(two, listen).await, port);
    for worker in [one, two] {
        assert_eq!(primary.carried(worker).await, "KernelRandom");
    }
    let port = port.as_u64().and_then(|port| u16::try_from(port).ok()).expect("a port");
    let to = SocketAddr::from(([127, 0, 0, 1], port));
    let mut counts = BTreeMap::<String, u32>::new();
    for _ in 0..100 {
        *counts.entry(greeting(to).await.expect("greeted")).or_default() += 1;
    }
    println!("{}: {counts:?}", runtime.name);
    // Of a fair coin, fewer than 20 in 100 come once in a billion runs.
    assert!(counts.len() == 2 && counts.values().all(|n| *n >= 20), "{counts:?}");

    // What the primary has from its own parent is added to as well.
    let options = primary.js(one, "return [process.env.NODE_OPTIONS, Error.stackTraceLimit]").await;
    assert_eq!(options, serde_json::json!(["--stack-trace-limit=33", 33]));

    let first_free = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    if first_free.is_ok_and(|port| port.trim().parse().is_ok_and(|port: u16| port > 1)) {
        let low = "return listen(net.createServer(), 1, '127.0.0.1')";
        let error = primary.try_js(two, low).await.expect_err("not permitted");
        assert_eq!(error.code.as_deref(), Some("EACCES"), "{error:?}");
    }

    primary.js(one, "setImmediate(() => process.kill(process.pid, 'SIGKILL'))").await;
    let mut alone = 0;
    while alone < 50 {
        // Those that were on their way to the first are cut with it; afterwards it is never picked.
        match greeting(to).await {
            Ok(id) if id == "2" => alone += 1,
            Ok(_) | Err(_) => alone = 0,
        }
    }
    primary.end().await;
}
