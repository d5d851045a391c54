//! What a worker still holds when another one takes over: it is told, it is given its time, and it gets nothing new.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Signal, getrlimit, setrlimit};

use super::support::{Events, PATIENCE, Place, get};

/// How many idle connections; 100,000 takes a few minutes and as many descriptors.
const IDLE: &str = "POLYFORK_TEST_IDLE_CONNECTIONS";

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
    let place = Place::new();
    place.file("app.js", app);
    let words = ["-w", "2", "--mechanism", mechanism, "--grace", grace, "app.js"];
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

#[test]
fn fault_22_idle_connections_stay_open_through_a_reload() {
    let wanted = std::env::var(IDLE).ok().and_then(|text| text.parse().ok()).unwrap_or(2_000);
    let limit = getrlimit(Resource::Nofile);
    let room = limit.maximum.unwrap_or(u64::MAX);
    setrlimit(Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit })
        .expect("as many as may be");
    let clients = usize::try_from(room.saturating_sub(200)).unwrap_or(usize::MAX).min(wanted);
    let (_place, mut events, address) = start(ECHO, "auto", "10m");
    // A source has some 28,000 ports for one destination.
    let to = |number: usize| {
        let last = u8::try_from(1 + number / 20_000).expect("not that many");
        SocketAddr::from(([127, 0, 0, last], address.port()))
    };
    let mut idle: Vec<Client> = (0..clients).map(|number| Client::connect(to(number))).collect();
    let before: Vec<String> = idle.iter_mut().map(Client::line).collect();
    let primary = events.running.pid();
    let resident = status_of_kib(primary);
    events.running.signal(Signal::HUP);
    events.wait_for("switched");
    let new: Vec<String> = (0..20).map(|number| Client::connect(to(number)).line()).collect();
    assert!(new.iter().all(|pid| !before.contains(pid)), "{new:?}");
    let open = idle.iter_mut().filter_map(|client| client.echoes().then_some(())).count();
    println!("{clients} idle connections, {open} open after the switch; primary {resident} KiB");
    assert_eq!(open, clients);
    assert!(status_of_kib(primary) < 32 * 1024, "the primary holds nothing of them");
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
