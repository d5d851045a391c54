//! What a worker still holds when another one takes over: it is told, it is given its time, and it gets nothing new.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{ChildStdin, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::support::{Events, Lines, PATIENCE, Place, Running, command, get};

/// How many idle connections. 100,800 take about a minute and 2 GiB.
const IDLE: &str = "POLYFORK_TEST_IDLE_CONNECTIONS";
const DEFAULT_IDLE: usize = 20_000;
/// Longer than that many connections take on a busy machine.
const LONG: Duration = Duration::from_secs(600);

/// Echoes lines, and says who it is at first. Connections are idle in between, of no protocol that anybody else knows.
const ECHO: &str = "
    require('net').createServer((socket) => {
        socket.on('error', () => {});
        socket.write(process.pid + '\\n');
        socket.on('data', (data) => socket.write(data));
    }).listen(0, '0.0.0.0');";

/// Takes upgrades, and says good-bye on each when it is told that its time is over; that is all it does about it.
const UPGRADES: &str = "
    const open = new Set();
    const server = require('http').createServer((request, response) => response.end(String(process.pid)));
    server.on('upgrade', (request, socket) => {
        open.add(socket);
        socket.on('error', () => {});
        socket.on('close', () => open.delete(socket));
        socket.write('HTTP/1.1 101 Switching Protocols\\r\\nConnection: Upgrade\\r\\nUpgrade: x\\r\\n\\r\\n');
        socket.on('data', (data) => socket.write(data));
    });
    process.on('SIGTERM', () => open.forEach((socket) => socket.write('bye\\n')));
    server.listen(0, '127.0.0.1');";

fn start(app: &str, mechanism: &str, grace: &str) -> (Place, Events, SocketAddr) {
    start_many(2, app, mechanism, grace)
}

fn start_many(
    workers: usize,
    app: &str,
    mechanism: &str,
    grace: &str,
) -> (Place, Events, SocketAddr) {
    let place = Place::new();
    place.file("app.js", app);
    let workers = workers.to_string();
    let words = ["-w", &workers, "--mechanism", mechanism, "--grace", grace, "app.js"];
    let mut events = place.events(words);
    let address = events.address();
    events.wait_for("ready");
    (place, events, address)
}

struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
        Client(BufReader::with_capacity(128, stream))
    }

    fn say(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).expect("written");
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }

    fn echoes(&mut self) -> bool {
        self.say("there?\n");
        self.line() == "there?"
    }
}

#[test]
fn fault_20_slow_upgraded_connections_are_told_and_cut_at_the_limit_and_not_before() {
    const CLIENTS: usize = 200;
    let grace = Duration::from_secs(4);
    let (_place, mut events, address) = start(UPGRADES, "auto", "4s");
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| Client::connect(address)).collect();
    for client in &mut clients {
        client.say("GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n");
        while !client.line().is_empty() {}
        assert!(client.echoes());
    }
    let begun = Instant::now();
    events.running.signal(Signal::HUP);
    events.wait_for("switched");
    for client in clients.iter_mut().take_while(|_| begun.elapsed() < grace / 2) {
        assert!(client.echoes());
    }
    // Everybody is told, and has a little longer.
    assert!(clients.iter_mut().all(|client| client.line() == "bye"));
    assert!(begun.elapsed() >= grace, "told after {:?}", begun.elapsed());
    let mut last = Vec::new();
    for client in &mut clients {
        last.clear();
        // The end may be a reset.
        let _ = client.0.read_to_end(&mut last);
    }
    events.wait_for("reloaded");
    assert!(events.seen.iter().any(|e| e["code"] == "grace-expired"), "{:#?}", events.seen);
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
}

/// Connections that one process holds, on either side: fewer than it may open anywhere.
const A_PROCESS_HOLDS: usize = 8_400;

/// Connects, tells the pids that answered, and each time it is asked how many connections echo.
const HOLDER: &str = r#"
import json, resource, socket, sys
first, count, port = map(int, sys.argv[1:])
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
def line(s):
    text = b''
    while not text.endswith(b'\n'):
        more = s.recv(64)
        if not more:
            return None
        text += more
    return text
def echoes(s):
    s.sendall(b'there?\n')
    return line(s) == b'there?\n'
held = []
for number in range(first, first + count):
    # An address has some 28,000 ports for one destination, and looks long for one when most are taken.
    held.append(socket.create_connection(('127.0.0.%d' % (1 + number // 5000), port), 60))
print(json.dumps(sorted({int(line(s)) for s in held})), flush=True)
while sys.stdin.readline():
    print(sum(echoes(s) for s in held), flush=True)
"#;

/// Processes that hold idle connections; they let go when their input ends.
struct Holders(Vec<(Running, ChildStdin, Lines)>);

impl Holders {
    fn connect(connections: usize, port: u16) -> Holders {
        let starts = (0..connections).step_by(A_PROCESS_HOLDS);
        let of = |first: usize| {
            let count = A_PROCESS_HOLDS.min(connections - first).to_string();
            let mut holder = command("python3");
            holder.args(["-c", HOLDER, &first.to_string(), &count, &port.to_string()]);
            holder.stdin(Stdio::piped());
            let mut running = Running::start(holder);
            let (ask, answers) = (running.take_in(), Lines::of(running.take_out()));
            (running, ask, answers)
        };
        Holders(starts.map(of).collect())
    }

    /// Who holds the other ends.
    fn pids(&mut self) -> BTreeSet<u64> {
        let of = |text: String| serde_json::from_str::<Vec<u64>>(&text).expect("pids");
        self.0.iter_mut().flat_map(|(_, _, answers)| of(answers.next_within(LONG))).collect()
    }

    /// How many echo.
    fn open(&mut self) -> usize {
        for (_, ask, _) in &mut self.0 {
            ask.write_all(b"\n").expect("asked");
        }
        let of = |text: String| text.parse::<usize>().expect("a number");
        self.0.iter_mut().map(|(_, _, answers)| of(answers.next_within(LONG))).sum()
    }
}

/// Between two new connections: those who come are to be there, not to take the machine.
const PACE: Duration = Duration::from_millis(5);

/// Connects again and again until `done`: who answered, and how long that took.
fn new_connections(address: SocketAddr, done: &AtomicBool) -> (BTreeSet<u64>, Vec<Duration>) {
    let connect = |_| {
        let begun = Instant::now();
        let pid = Client::connect(address).line();
        let waited = begun.elapsed();
        std::thread::sleep(PACE);
        (pid.parse::<u64>().expect("a pid"), waited)
    };
    (0..).take_while(|_| !done.load(Ordering::Relaxed)).map(connect).unzip()
}

/// Ends it, also when the test fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// New connections while that happens: who served them. Each is served.
fn meanwhile(what: &str, address: SocketAddr, happens: impl FnOnce()) -> BTreeSet<u64> {
    let done = AtomicBool::new(false);
    let (pids, mut waits) = std::thread::scope(|scope| {
        let new = scope.spawn(|| new_connections(address, &done));
        let is_done = Done(&done);
        happens();
        drop(is_done);
        new.join().expect("each is served")
    });
    waits.sort();
    let p99 = waits[(waits.len() - 1) * 99 / 100];
    let longest = waits[waits.len() - 1];
    println!("{what}: {} new connections, p99 {p99:?}, longest {longest:?}", waits.len());
    pids
}

#[test]
fn fault_22_idle_connections_stay_open_through_an_upgrade_and_a_reload() {
    let wanted = std::env::var(IDLE).ok().and_then(|text| text.parse().ok());
    let wanted = wanted.unwrap_or(DEFAULT_IDLE);
    let workers = wanted.div_ceil(A_PROCESS_HOLDS).max(2);
    let (_place, mut events, address) = start_many(workers, ECHO, "auto", "10m");
    let fresh = SocketAddr::from(([127, 0, 0, 254], address.port()));
    let begun = Instant::now();
    let mut idle = Holders::connect(wanted, address.port());
    let before = idle.pids();
    assert_eq!(before.len(), workers, "they are everywhere");
    let primary = events.running.pid();
    println!(
        "{wanted} idle connections to {workers} workers after {:?}; primary {} KiB",
        begun.elapsed(),
        status_of_kib(primary)
    );
    let served = meanwhile("upgrade", fresh, || {
        events.running.signal(Signal::USR2);
        events.wait_until("notice", |notice| notice["code"] == "upgraded");
    });
    assert!(served.is_subset(&before), "an upgrade keeps the workers");
    assert_eq!(idle.open(), wanted, "after the upgrade");
    meanwhile("reload", fresh, || {
        events.running.signal_again(Signal::HUP);
        events.wait_for("switched");
    });
    let served = meanwhile("after it", fresh, || {
        assert_eq!(idle.open(), wanted, "after the switch");
    });
    assert!(served.is_disjoint(&before), "{served:?}");
    let resident = status_of_kib(primary);
    println!("all open; primary {resident} KiB");
    assert!(resident < 32 * 1024, "the primary holds nothing of them");
    drop(idle);
    events.wait_for("reloaded");
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
}

fn status_of_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn fault_23_a_draining_worker_gets_nothing_new() {
    for mechanism in ["auto", "handoff"] {
        let (_place, mut events, address) = start(ECHO, mechanism, "10m");
        let address = SocketAddr::from(([127, 0, 0, 1], address.port()));
        let mut held: Vec<Client> = (0..4).map(|_| Client::connect(address)).collect();
        let old: Vec<String> = held.iter_mut().map(Client::line).collect();
        events.running.signal(Signal::HUP);
        events.wait_for("switched");
        let new: Vec<String> = (0..200).map(|_| Client::connect(address).line()).collect();
        let wrong = new.iter().filter(|pid| old.contains(pid)).count();
        println!("{mechanism}: {} new connections, {wrong} to workers that drain", new.len());
        assert_eq!(wrong, 0);
        assert!(held.iter_mut().all(Client::echoes), "what they hold goes on");
        drop(held);
        events.wait_for("reloaded");
        events.running.signal(Signal::TERM);
        assert_eq!(events.end().0, 0);
    }
}

/// Requests that meet the beginning of a drain on a kept-alive connection.
#[test]
fn fault_21_a_request_on_a_kept_connection_is_answered_when_a_drain_begins() {
    let (_place, mut events, address) = start(UPGRADES, "auto", "30s");
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (mut answers, mut closes) = (0u32, 0u32);
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            let (mut answers, mut closes) = (0, 0);
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let mut client = Client::connect(address);
                // As long as the server keeps it.
                loop {
                    client.say("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
                    let mut head = String::new();
                    while !head.ends_with("\r\n\r\n") {
                        let read = client.0.read_line(&mut head).expect("not a reset");
                        assert!(read > 0, "closed under a request: {head:?}");
                    }
                    let head = head.to_lowercase();
                    let length =
                        head.lines().find_map(|line| line.strip_prefix("content-length: "));
                    let mut body = vec![0; length.and_then(|n| n.parse().ok()).expect("a length")];
                    client.0.read_exact(&mut body).expect("a body");
                    answers += 1;
                    if head.contains("connection: close") {
                        closes += 1;
                        break;
                    }
                    if stop.load(std::sync::atomic::Ordering::Relaxed) {
                        break;
                    }
                }
            }
            (answers, closes)
        });
        for _ in 0..5 {
            events.running.signal_again(Signal::HUP);
            events.wait_for("reloaded");
            assert!(!get(address, "/").is_empty());
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        (answers, closes) = client.join().expect("no request fails");
    });
    println!("{answers} answers, {closes} with Connection: close");
    assert!(answers > 0 && closes >= 5);
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
}
