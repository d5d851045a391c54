//! Signs of life: who gives none is replaced; a machine that stood still is no reason to replace anybody.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;

use super::signal;
use super::support::{Events, Place, get, skip};

/// Longer than a watchdog of two seconds allows, twice.
const STANDSTILL: Duration = Duration::from_secs(5);

fn pids(events: &Events) -> Vec<u32> {
    let forks = events.seen.iter().filter(|event| event["event"] == "fork");
    forks.filter_map(|event| u32::try_from(event["pid"].as_u64()?).ok()).collect()
}

/// After it: everybody is still there, and a worker that is really blocked is replaced all the same.
fn nobody_was_replaced(mut events: Events, address: std::net::SocketAddr) {
    let first = get(address, "/");
    assert!(!first.is_empty());
    let ended = |events: &Events| events.seen.iter().any(|event| event["event"] == "exit");
    assert!(!ended(&events), "replaced for nothing: {:#?}", events.seen);
    // The watchdog goes on: it needs its whole time, and no event of an end comes before that.
    let stuck = pids(&events)[0];
    signal(stuck, Signal::STOP);
    let blocked = events.wait_for("blocked");
    assert_eq!(blocked["pid"], stuck, "{blocked}");
    assert!(!ended(&events), "replaced for nothing: {:#?}", events.seen);
    signal(stuck, Signal::CONT);
    events.wait_for("unblocked");
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
}

fn watched() -> (Place, Events, std::net::SocketAddr) {
    let place = Place::with_server();
    let mut events = place.events(["-w", "3", "--watchdog", "2s", "server.js"]);
    let address = events.address();
    events.wait_for("ready");
    (place, events, address)
}

#[test]
fn fault_129_everything_stopped_for_a_while_restarts_nobody() {
    let (_place, mut events, address) = watched();
    let (primary, workers) = (events.running.pid(), pids(&events));
    signal(primary, Signal::STOP);
    workers.iter().for_each(|pid| signal(*pid, Signal::STOP));
    std::thread::sleep(STANDSTILL);
    // The primary is the first that goes on, and finds nobody alive.
    signal(primary, Signal::CONT);
    events.wait_until("notice", |notice| notice["code"] == "gap");
    workers.iter().for_each(|pid| signal(*pid, Signal::CONT));
    nobody_was_replaced(events, address);
}

/// A freezer group with all of these in it; removed in the end.
struct Freezer {
    folder: PathBuf,
    home: PathBuf,
}

impl Freezer {
    fn with(pids: &[u32]) -> Option<Freezer> {
        let home = Path::new("/sys/fs/cgroup/freezer").to_owned();
        let folder = home.join(format!("polyfork-test-{}", std::process::id()));
        fs::create_dir(&folder).ok()?;
        let freezer = Freezer { folder, home };
        let moved = pids.iter().all(|pid| freezer.put(&freezer.folder, *pid));
        moved.then_some(freezer)
    }

    fn put(&self, group: &Path, pid: u32) -> bool {
        fs::write(group.join("cgroup.procs"), pid.to_string()).is_ok()
    }

    fn set(&self, state: &str) {
        fs::write(self.folder.join("freezer.state"), state).expect("a state");
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.set("THAWED");
        let procs = fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default();
        for pid in procs.lines().filter_map(|line| line.parse().ok()) {
            self.put(&self.home, pid);
        }
        let _kept = fs::remove_dir(&self.folder);
    }
}

#[test]
fn fault_129_a_frozen_control_group_restarts_nobody() {
    let (_place, events, address) = watched();
    let mut all = pids(&events);
    all.push(events.running.pid());
    let Some(freezer) = Freezer::with(&all) else {
        let reason = "no right to make freezer groups";
        return skip("fault_129_a_frozen_control_group_restarts_nobody", reason);
    };
    freezer.set("FROZEN");
    std::thread::sleep(STANDSTILL);
    drop(freezer);
    nobody_was_replaced(events, address);
}

#[test]
fn fault_129_a_clock_with_another_origin_changes_nothing() {
    let test = "fault_129_a_clock_with_another_origin_changes_nothing";
    let mut tried = super::support::command("unshare");
    tried.args(["-T", "--monotonic", "86400", "true"]);
    if !tried.status().is_ok_and(|status| status.success()) {
        return skip(test, "no right to make time namespaces");
    }
    let place = Place::with_server();
    let polyfork = place.polyfork(["run", "--json", "-w", "1", "--watchdog", "4s", "server.js"]);
    let mut command = super::support::command("unshare");
    command.args(["-T", "--monotonic", "86400000", "--boottime", "86400000"]);
    command.arg(polyfork.get_program()).args(polyfork.get_args()).current_dir(place.path());
    for (key, value) in polyfork.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    let mut events = Events::of(command);
    let address = events.address();
    let ready = events.wait_for("worker_ready");
    assert!(!get(address, "/").is_empty());
    let pid = u32::try_from(ready["pid"].as_u64().expect("a pid")).expect("fits");
    signal(pid, Signal::STOP);
    assert_eq!(events.wait_for("blocked")["pid"], pid);
    signal(pid, Signal::CONT);
    events.wait_for("unblocked");
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
}

/// Says that it needs more time for as long as it needs it; `GET /trigger` asks to be replaced.
const SLOW: &str = "
import os, socket, time
def notify(text):
    path = os.environ['NOTIFY_SOCKET']
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(text.encode(), '\\0' + path[1:])
notify('EXTEND_TIMEOUT_USEC=60000000')
time.sleep(7)
notify('READY=1\\nWATCHDOG_USEC=600000000')
listener = socket.socket(fileno=3)
while True:
    connection, _ = listener.accept()
    path = connection.recv(4096).split(b' ')[1:2]
    if path == [b'/trigger']:
        notify('WATCHDOG=trigger')
    status = b'503 Ill' if path == [b'/health'] and os.path.exists('ill') else b'200 OK'
    connection.sendall(b'HTTP/1.1 ' + status + b'\\r\\nconnection: close\\r\\n\\r\\nhello')
    connection.close()
";

fn python(words: &[&str]) -> (Place, Events) {
    let place = Place::new();
    place.file("slow.py", SLOW);
    let options = ["-w", "2", "--ready-timeout", "5s", "--listen", "127.0.0.1:0", "--grace", "1s"];
    let events = place.events(options.iter().chain(words).chain(&["slow.py"]));
    (place, events)
}

#[test]
fn a_program_that_speaks_sd_notify_gets_more_time_and_can_ask_to_be_replaced() {
    // The limit of the command would end it at once; its own is longer.
    let (_place, mut events) = python(&["--ready", "notify", "--watchdog", "1500ms"]);
    let address = events.address();
    events.wait_for("ready");
    assert!(!events.seen.iter().any(|event| event["event"] == "exit"), "{:#?}", events.seen);
    get(address, "/trigger");
    let exit = events.wait_for("exit");
    assert_eq!(exit["reason"], "watchdog", "{exit}");
    events.running.signal(Signal::TERM);
    events.wait_for("end");
}

#[test]
fn programs_that_inherit_sockets_are_probed_one_by_one() {
    let probe = ["--probe", "/health", "--probe-interval", "100ms", "--probe-timeout", "20s"];
    let (place, mut events) = python(&[&probe[..], &["--probe-failures", "2"]].concat());
    let first = events.next().expect("an event");
    if first["event"] == "error" {
        let reason = first["text"].as_str().unwrap_or_default();
        return skip("programs_that_inherit_sockets_are_probed_one_by_one", reason);
    }
    events.wait_for("ready");
    place.file("ill", "");
    // A successor comes first, and has to be well to take over.
    events.wait_for("fork");
    fs::remove_file(place.path().join("ill")).expect("well again");
    let exit = events.wait_for("exit");
    assert_eq!(exit["reason"], "probe_failed", "{exit}");
    events.running.signal(Signal::TERM);
    events.wait_for("end");
}

#[test]
fn fault_128_no_limit_and_no_timer_follows_the_wall_clock() {
    // Only these read it: stamps of logs and events, the ages of files, and the times of `--reload-at`.
    const MAY: [&str; 8] = [
        "polyfork-cli/src/args/operate.rs",
        "polyfork-cli/src/clock.rs",
        "polyfork-cli/src/config/cron.rs",
        "polyfork-cli/src/control/book.rs",
        "polyfork-cli/src/logs/line.rs",
        "polyfork-cli/src/logs/writer.rs",
        "polyfork-cli/src/operate/list.rs",
        "polyfork-cli/src/values.rs",
    ];
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crates");
    let mut folders = vec![
        root.join("polyfork-core/src"),
        root.join("polyfork/src/cluster"),
        root.join("polyfork-cli/src"),
    ];
    let (mut looked, mut read) = (0, Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let text = fs::read_to_string(&path).expect("a source");
                // A file's own tests come last in it, and may make up times.
                let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
                if code.contains("SystemTime") || code.contains("ClockId::Realtime") {
                    let path = path.strip_prefix(root).expect("under the crates");
                    read.push(path.to_str().expect("a plain path").to_owned());
                }
                looked += 1;
            }
        }
    }
    read.sort();
    println!("{looked} sources");
    assert!(looked > 50);
    assert_eq!(read, MAY, "these read the wall clock (left), these may (right)");
}
