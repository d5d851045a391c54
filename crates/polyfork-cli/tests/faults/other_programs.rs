//! Programs that know nothing of Node: each slot with its own inherited socket. And the cluster of a user without any
//! right: a classic program in place of eBPF, with the same promises but for the exactness.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use rustix::process::Signal;
use serde_json::Value;

use super::cluster::{APP, Cluster, nothing_failed, report, signal};
use super::load::{Class, Load, attempt, count};
use super::support::{Events, PATIENCE, Place, command, skip};

fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// A peer that the set-up has brought; a skip if it has not.
fn peer(test: &str, name: &str) -> Option<String> {
    let manifest = std::fs::read_to_string(root().join(".peers/manifest.json")).ok();
    let manifest: Option<Value> = manifest.and_then(|text| serde_json::from_str(&text).ok());
    let path = manifest.and_then(|m| m[name]["path"].as_str().map(str::to_owned));
    if path.is_none() {
        skip(test, &format!("{name} is missing: run `cargo xtask setup`"));
    }
    path
}

/// Who answered how often.
fn answers(cluster: &Cluster, requests: u32) -> BTreeMap<String, u32> {
    let mut by_pid = BTreeMap::new();
    for _ in 0..requests {
        let (class, body) = attempt(cluster.address, "/");
        assert_eq!(class, Class::Ok);
        let pid = body.split("\"pid\":").nth(1).expect("pid").trim_start();
        let pid = pid.split(|c: char| !c.is_ascii_digit()).next().expect("digits").to_owned();
        *by_pid.entry(pid).or_default() += 1;
    }
    by_pid
}

/// Turns are exact, a drain under load fails nobody, and a killed worker costs what it was serving.
fn serves(what: &str, program: &[&str]) {
    let apps = root().join("tests/apps");
    let mut words = vec!["-w", "2", "--listen", "127.0.0.1:0", "--cwd"];
    words.push(apps.to_str().expect("a path"));
    words.extend(["--ready", "delay=2s", "--restart-limit", "1000/30s", "--"]);
    words.extend(program);
    let mut cluster = Cluster::start_in(Place::new(), &words);
    // "Ready" is a guess here: one that is late has been passed over for a while.
    let limit = Instant::now() + PATIENCE;
    while answers(&cluster, 4).into_values().ne([2, 2]) {
        assert!(Instant::now() < limit, "{what}: the workers do not take turns");
    }
    let by_pid = answers(&cluster, 20);
    println!("{what}: {by_pid:?}");
    assert_eq!(by_pid.values().copied().collect::<Vec<_>>(), [10, 10], "{what}: {by_pid:?}");

    let load = Load::start(cluster.address, 4, "/");
    load.wait_for_ok(50);
    cluster.events.running.signal(Signal::TTOU);
    cluster.wait_for("slot_retired");
    load.wait_for_ok(50);
    nothing_failed(&format!("{what}: two workers to one"), &load.stop());

    let load = Load::start(cluster.address, 4, "/");
    load.wait_for_ok(20);
    let victim = cluster.workers[&1];
    signal(victim, Signal::KILL);
    cluster.wait_replaced(1, victim);
    load.wait_for_ok(20);
    let counts = load.stop();
    report(&format!("{what}: the only worker killed"), &counts);
    assert_eq!(count(&counts, Class::Refused), 0, "{counts:?}");
    cluster.stop();
}

#[test]
fn uvicorn_serves_on_its_slots_socket() {
    let Some(uvicorn) = peer("uvicorn_serves_on_its_slots_socket", "uvicorn") else { return };
    serves("uvicorn", &[&uvicorn, "--fd", "3", "--log-level", "warning", "asgi:app"]);
}

#[test]
fn gunicorn_serves_on_its_slots_socket() {
    let Some(gunicorn) = peer("gunicorn_serves_on_its_slots_socket", "gunicorn") else { return };
    serves("gunicorn", &[&gunicorn, "--workers", "1", "--log-level", "warning", "wsgi:app"]);
}

/// `LISTEN_FDS`, `LISTEN_PID`, `LISTEN_FDNAMES` and `NOTIFY_SOCKET` as systemd would have them.
#[test]
fn a_program_with_socket_activation_serves_two_addresses() {
    let program = root().join("tests/apps/listen_fds.py");
    let words = [
        "-w",
        "2",
        "--listen",
        "127.0.0.1:0",
        "--listen",
        "unix:second.sock",
        "--ready",
        "notify",
        "--watchdog",
        "20s",
        program.to_str().expect("a path"),
    ];
    let mut cluster = Cluster::start_in(Place::new(), &words);
    let status = cluster.events.seen.iter().find(|e| e["event"] == "status").expect("STATUS=");
    assert_eq!(status["text"], "serving 2 sockets");
    let by_pid = answers(&cluster, 10);
    assert_eq!(by_pid.values().copied().collect::<Vec<_>>(), [5, 5], "{by_pid:?}");
    // It says STOPPING=1 by itself when it is asked to leave.
    let load = Load::start(cluster.address, 4, "/");
    load.wait_for_ok(20);
    cluster.events.running.signal(Signal::TTOU);
    cluster.wait_for("slot_retired");
    nothing_failed("socket activation: two workers to one", &load.stop());
    cluster.stop();
}

/// `polyfork run` as a user without rights or capabilities.
fn unprivileged(test: &str, words: &[&str]) -> Option<(Events, Place)> {
    use std::os::unix::fs::PermissionsExt;
    if !rustix::process::geteuid().is_root() {
        skip(test, "needs root to become somebody without rights");
        return None;
    }
    let place = Place::new();
    place.file("app.js", APP);
    let binary = place.path().join("polyfork");
    std::fs::copy(env!("CARGO_BIN_EXE_polyfork"), &binary).expect("a copy that everybody may run");
    std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let mut without = command("setpriv");
    without.args([
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        "--bounding-set",
        "-all",
    ]);
    without.args(["--inh-caps", "-all", "--"]).arg(binary).args(["run", "--json"]).args(words);
    without.current_dir(place.path()).env_remove("XDG_CACHE_HOME").env("HOME", place.path());
    Some((Events::of(without), place))
}

/// Even over the live slots on average; dead ones get nothing; what waited for them is passed on by hand.
#[test]
fn without_privilege_a_classic_program_takes_over() {
    let test = "without_privilege_a_classic_program_takes_over";
    let words = ["-w", "3", "--restart-limit", "1000/30s", "app.js"];
    let Some((mut events, _place)) = unprivileged(test, &words) else { return };
    let bound = events.wait_for("bound");
    assert_eq!(
        (&bound["mechanism"], &bound["exact"]),
        (&"kernel".into(), &false.into()),
        "{bound}"
    );
    let why = bound["why"].as_str().expect("why");
    assert!(why.contains("classic") && why.contains("not permitted"), "{why}");
    events.wait_for("ready");
    let mut pids: BTreeMap<u64, u32> = BTreeMap::new();
    for event in &events.seen {
        if event["event"] == "worker_ready" {
            let pid = u32::try_from(event["pid"].as_u64().expect("pid")).expect("a pid");
            pids.insert(event["slot"].as_u64().expect("slot"), pid);
        }
    }
    let address = bound["address"].as_str().expect("address").parse().expect("an address");
    let load = Load::start(address, 8, "/");
    load.wait_for_ok(100);
    // A stopped worker collects a queue; when it is killed its siblings get it from the primary.
    let victim = pids[&1];
    signal(victim, Signal::STOP);
    load.wait_for_ok(5);
    signal(victim, Signal::KILL);
    events.wait_until("exit", |e| e["pid"] == victim);
    load.wait_for_ok(100);
    events.wait_for("ready");
    load.wait_for_ok(100);
    let counts = load.stop();
    report("classic program, a stopped worker killed", &counts);
    assert_eq!(count(&counts, Class::Refused), 0, "{counts:?}");
    assert!(count(&counts, Class::Reset) + count(&counts, Class::Empty) <= 8, "{counts:?}");
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
}

/// Handing over needs no right, and its turns are exact.
#[test]
fn without_privilege_handing_over_is_exact() {
    let test = "without_privilege_handing_over_is_exact";
    let words = ["-w", "2", "--mechanism", "handoff", "app.js"];
    let Some((mut events, _place)) = unprivileged(test, &words) else { return };
    let address = events.address();
    events.wait_for("ready");
    let mut by_pid = BTreeMap::<String, u32>::new();
    for _ in 0..20 {
        let (class, body) = attempt(address, "/");
        assert_eq!(class, Class::Ok);
        *by_pid.entry(body.split(',').next().expect("pid").to_owned()).or_default() += 1;
    }
    assert_eq!(by_pid.values().copied().collect::<Vec<_>>(), [10, 10], "{by_pid:?}");
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
}
