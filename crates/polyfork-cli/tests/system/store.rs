//! A service manager that holds listening sockets: whoever connects while there is no primary waits for the next one.
//!
//! A test plays the manager: it takes what is sent to the notify socket with the descriptors that come along, and starts the
//! primary again with them as systemd does.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::desk::eventually;
use super::load::{Class, Counts, Load, count};
use super::support::{Events, PATIENCE, Place, command, ended, get, skip};

/// What it was told, and what it holds.
#[derive(Default)]
struct Held {
    told: Vec<String>,
    store: BTreeMap<String, Vec<OwnedFd>>,
}

/// A manager with a store.
struct Manager {
    place: Place,
    held: Arc<Mutex<Held>>,
    ends: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
    room: Option<&'static str>,
}

impl Manager {
    fn new(place: Place) -> Manager {
        let socket = UnixDatagram::bind(place.path().join("notify")).expect("a notify socket");
        socket.set_read_timeout(Some(Duration::from_millis(20))).expect("a time limit");
        let (held, ends) = (Arc::<Mutex<Held>>::default(), Arc::<AtomicBool>::default());
        let (to, until) = (Arc::clone(&held), Arc::clone(&ends));
        let reader = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                if let Some((text, fds)) = receive(&socket) {
                    to.lock().expect("held").hear(text, fds);
                }
            }
        });
        Manager { place, held, ends, reader: Some(reader), room: Some("64") }
    }

    /// Starts the primary with all that is held, as systemd does: descriptors from 3 on, with their names.
    fn start(&self, args: &[&str], env: &[(&str, String)]) -> Events {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let polyfork = self.place.polyfork([&["run", "--json"], args].concat());
        let mut launch = command("python3");
        launch.args(["-c", LAUNCH]).arg(polyfork.get_program()).args(polyfork.get_args());
        launch.current_dir(self.place.path()).stdin(Stdio::from(OwnedFd::from(theirs)));
        for (key, value) in polyfork.get_envs() {
            match value {
                Some(value) => launch.env(key, value),
                None => launch.env_remove(key),
            };
        }
        launch.env("NOTIFY_SOCKET", self.place.path().join("notify"));
        launch.env_remove("FDSTORE").envs(self.room.map(|room| ("FDSTORE", room)));
        launch.envs(env.iter().map(|(key, value)| (key, value)));
        {
            let held = self.held.lock().expect("held");
            let all =
                held.store.iter().flat_map(|(name, fds)| fds.iter().map(move |fd| (name, fd)));
            let (names, fds): (Vec<_>, Vec<_>) =
                all.map(|(name, fd)| (name.as_str(), fd.as_fd())).unzip();
            send(&ours, &format!("{} {}", fds.len(), names.join(":")), &fds);
        }
        Events::of(launch)
    }

    /// ... and waits until it is ready.
    fn serve(&self, args: &[&str], env: &[(&str, String)]) -> Events {
        let before = self.count("READY=1");
        let events = self.start(args, env);
        eventually("READY=1", || self.count("READY=1"), |count| *count > before);
        events
    }

    fn count(&self, line: &str) -> usize {
        let held = self.held.lock().expect("held");
        held.told.iter().filter(|text| text.lines().any(|said| said == line)).count()
    }

    fn names(&self) -> Vec<String> {
        self.held.lock().expect("held").store.keys().cloned().collect()
    }

    fn put(&self, name: &str, fd: OwnedFd) {
        self.held.lock().expect("held").store.entry(name.to_owned()).or_default().push(fd);
    }

    fn empties(&self) {
        eventually("an empty store", || self.names(), Vec::is_empty);
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            // It has panicked, then, and said so.
            let _ = reader.join();
        }
    }
}

impl Held {
    fn hear(&mut self, text: String, fds: Vec<OwnedFd>) {
        let value = |key: &str| {
            let mut lines = text.lines().filter_map(|line| line.split_once('='));
            lines.find(|(name, _)| *name == key).map(|(_, value)| value.to_owned())
        };
        let name = value("FDNAME").unwrap_or_else(|| "stored".to_owned());
        if value("FDSTORE").is_some() {
            assert!(
                name.len() <= 255 && name.bytes().all(|b| (b' '..127).contains(&b) && b != b':')
            );
            assert_eq!(value("FDPOLL").as_deref(), Some("0"), "else a shutdown would end it");
            assert_eq!(fds.len(), 1, "{text}");
            self.store.entry(name).or_default().extend(fds);
        } else if value("FDSTOREREMOVE").is_some() {
            self.store.remove(&name);
        }
        self.told.push(text);
    }
}

const LAUNCH: &str = "
import array, os, socket, sys
s = socket.socket(fileno=0)
text, control, _, _ = s.recvmsg(65536, socket.CMSG_SPACE(4 * 253))
fds = array.array('i')
for level, kind, data in control:
    fds.frombytes(data)
count, names = text.decode().split(' ', 1)
# Out of the way of where they are to be.
high = [os.dup(fd) for fd in fds]
high = [os.dup2(fd, 500 + i) for i, fd in enumerate(high)]
for fd in fds: os.close(fd)
os.closerange(3, 400)
for i, fd in enumerate(high): os.dup2(fd, 3 + i)
os.closerange(500, 1000)
null = os.open('/dev/null', os.O_RDONLY)
s.detach()
os.dup2(null, 0)
if null != 0: os.close(null)
if os.environ.pop('WITHOUT_EBPF', None):
    import ctypes
    for capability in (12, 21, 39): ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.environ['LISTEN_PID'] = str(os.getpid())
os.environ['LISTEN_FDS'] = count
os.environ['LISTEN_FDNAMES'] = names
os.execv(sys.argv[1], sys.argv[1:])
";

fn send(to: &UnixStream, text: &str, fds: &[BorrowedFd<'_>]) {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    let text = [IoSlice::new(text.as_bytes())];
    sendmsg(to, &text, &mut control, SendFlags::empty()).expect("send");
}

fn receive(from: &UnixDatagram) -> Option<(String, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = [0; 4096];
    let got = {
        let mut parts = [IoSliceMut::new(&mut buffer)];
        recvmsg(from, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Some((String::from_utf8(buffer[..got.bytes].to_vec()).expect("text"), fds))
}

/// A port that is free now.
fn free() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    listener.local_addr().expect("address")
}

fn failed(counts: &Counts) -> u64 {
    counts.iter().filter(|(class, _)| **class != Class::Ok).map(|(_, n)| n).sum()
}

/// A request over a Unix socket.
fn ask(path: &Path) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// The processes that a primary has started, to be signalled and waited for after its end.
fn workers(events: &Events) -> Vec<OwnedFd> {
    let pid = events.running.pid();
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let list = list.expect("children");
    let pids = list.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?));
    pids.filter_map(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()).collect()
}

fn signal(worker: &OwnedFd, signal: Signal) {
    // It may have ended.
    let _ = pidfd_send_signal(worker, signal);
}

/// Waits for their end.
fn wait_for(workers: &[OwnedFd]) {
    let limit = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    for worker in workers {
        let mut ready = [PollFd::new(worker, PollFlags::IN)];
        assert_eq!(poll(&mut ready, Some(&limit)), Ok(1), "a worker is there still");
    }
}

/// How the primary ends, each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It alone, as by a fault of its own.
    Killed,
    /// With its workers, as systemd does after a crash.
    AllKilled,
    /// As `systemctl restart` asks.
    Asked,
}

const CLIENTS: usize = 4;
const ENDS: u64 = 3;

/// The primary ends and is started again, several times. `args` of each start may differ.
fn ends_under_load(end: End, args: &dyn Fn(u64) -> Vec<String>) -> Counts {
    let manager = Manager::new(Place::with_server());
    manager.place.file("server.py", PYTHON);
    let address = free();
    let env = [("PORT", address.port().to_string())];
    let serve = |round: u64| {
        let args = args(round);
        let args = args.iter().map(|arg| arg.replace("PORT", &env[0].1)).collect::<Vec<_>>();
        manager.serve(&args.iter().map(String::as_str).collect::<Vec<_>>(), &env)
    };
    let mut events = serve(0);
    let names = manager.names();
    assert_eq!(names, [format!("polyfork.tcp.{}", address.to_string().replace(':', "_"))]);
    let load = Load::start(address, CLIENTS, "/");
    for round in 1..=ENDS {
        load.wait_for_ok(150);
        let workers = workers(&events);
        events.running.signal(if end == End::Asked { Signal::TERM } else { Signal::KILL });
        if end == End::AllKilled {
            workers.iter().for_each(|worker| signal(worker, Signal::KILL));
        }
        events.running.end();
        assert_eq!(manager.names(), names);
        events = serve(round);
    }
    load.wait_for_ok(150);
    let counts = load.stop();
    println!("{end:?} {ENDS} times ({:?}): {counts:?}", args(0));
    assert_eq!(manager.names(), names);
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
    assert_eq!((count(&counts, Class::Refused), count(&counts, Class::Hang)), (0, 0), "{counts:?}");
    counts
}

fn always(args: &[&str]) -> impl Fn(u64) -> Vec<String> + use<> {
    let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
    move |_| args.clone()
}

const KERNEL: [&str; 3] = ["-w", "2", "server.js"];
const SHARED: [&str; 5] = ["-w", "2", "--policy", "shared", "server.js"];
const HANDOFF: [&str; 5] = ["-w", "2", "--mechanism", "handoff", "server.js"];
/// At each end, what every client had asked and was not answered yet.
const UNANSWERED: u64 = CLIENTS as u64 * ENDS;

#[test]
fn a_killed_primary_refuses_nobody_kernel() {
    assert_eq!(failed(&ends_under_load(End::Killed, &always(&KERNEL))), 0);
}

#[test]
fn a_killed_primary_refuses_nobody_shared() {
    assert_eq!(failed(&ends_under_load(End::Killed, &always(&SHARED))), 0);
}

/// What the primary had accepted and not handed over dies with it.
#[test]
fn a_killed_primary_refuses_nobody_handoff() {
    assert!(failed(&ends_under_load(End::Killed, &always(&HANDOFF))) <= UNANSWERED);
}

#[test]
fn when_all_are_killed_only_what_was_being_served_is_lost() {
    for args in [&KERNEL[..], &SHARED, &HANDOFF] {
        assert!(failed(&ends_under_load(End::AllKilled, &always(args))) <= UNANSWERED);
    }
}

#[test]
fn a_restart_by_the_manager_fails_nobody() {
    for args in [&KERNEL[..], &SHARED, &HANDOFF] {
        assert_eq!(failed(&ends_under_load(End::Asked, &always(args))), 0);
    }
}

#[test]
fn the_mechanism_may_be_another_one_after_a_restart() {
    let args = |round: u64| {
        let args = [&KERNEL[..], &HANDOFF, &KERNEL, &SHARED, &KERNEL];
        args[round as usize].iter().map(|arg| (*arg).to_owned()).collect()
    };
    assert_eq!(failed(&ends_under_load(End::Asked, &args)), 0);
    assert!(failed(&ends_under_load(End::Killed, &args)) <= UNANSWERED);
}

/// A program that knows nothing of us: it takes a socket and finishes what it serves when it is asked to end.
const PYTHON: &str = "
import select, signal, socket
s = socket.socket(fileno=3)
s.setblocking(False)
ends = []
signal.signal(signal.SIGTERM, lambda *_: ends.append(1))
while not ends:
    if not select.select([s], [], [], 0.05)[0]: continue
    try: c, _ = s.accept()
    except OSError: continue
    c.setblocking(True)
    c.recv(4096)
    c.sendall(b'HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\n{}')
    c.close()
";

#[test]
fn any_program_is_restarted_without_a_failure() {
    let args = ["-w", "2", "--ready", "delay=50ms", "--listen", "127.0.0.1:PORT"];
    for policy in [&[][..], &["--policy", "shared"]] {
        let args = [&args[..], policy, &["--", "python3", "server.py"]].concat();
        assert_eq!(failed(&ends_under_load(End::Asked, &always(&args))), 0);
        assert_eq!(failed(&ends_under_load(End::Killed, &always(&args))), 0);
    }
}

#[test]
fn a_program_of_this_crate_is_restarted_without_a_failure() {
    let binary = env!("CARGO_BIN_EXE_polyfork");
    let args = ["-w", "2", "--name", "native", "--dialect", "native", binary, "demo"];
    let args = [&args[..], &["--listen", "127.0.0.1:PORT"]].concat();
    assert_eq!(failed(&ends_under_load(End::Asked, &always(&args))), 0);
    assert_eq!(failed(&ends_under_load(End::Killed, &always(&args))), 0);
}

const UNIX: &str = "require('http').createServer((q, a) => a.end('{}')).listen(process.env.AT);";

#[test]
fn a_unix_socket_waits_with_its_file() {
    let manager = Manager::new(Place::new());
    manager.place.file("server.js", UNIX);
    let path = manager.place.path().join("app: %.sock");
    let env = [("AT", path.display().to_string())];
    for args in [&KERNEL[..], &SHARED] {
        let mut events = manager.serve(args, &env);
        assert_eq!(manager.names().len(), 1, "{:?}", manager.names());
        for signal in [Signal::KILL, Signal::TERM] {
            assert!(ask(&path).expect("an answer").starts_with("HTTP/1.1 200"));
            let workers = workers(&events);
            events.running.signal(signal);
            events.running.end();
            wait_for(&workers);
            let waits = {
                let path = path.clone();
                std::thread::spawn(move || ask(&path))
            };
            events = manager.serve(args, &env);
            let answer = waits.join().expect("a client").expect("not refused");
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
        // For good this time.
        let stop = manager.place.ends(["stop", "server"]);
        assert_eq!(stop.code, Some(0), "{stop:?}");
        events.running.end();
        manager.empties();
        assert!(!path.exists());
    }
}

#[test]
fn a_stop_for_good_leaves_nothing_behind() {
    for args in [&KERNEL[..], &SHARED, &HANDOFF] {
        for verb in ["stop", "kill"] {
            let manager = Manager::new(Place::with_server());
            let address = free();
            let mut events = manager.serve(args, &[("PORT", address.port().to_string())]);
            assert_eq!(manager.names().len(), 1);
            let load = Load::start(address, 2, "/");
            load.wait_for_ok(20);
            let ended = manager.place.ends([verb, "server"]);
            assert_eq!(ended.code, Some(0), "{ended:?}");
            events.running.end();
            manager.empties();
            assert!(TcpStream::connect(address).is_err(), "{verb} {args:?}: the port is closed");
            let counts = load.stop();
            assert_eq!(count(&counts, Class::Hang), 0, "{verb} {args:?}: {counts:?}");
        }
    }
}

#[test]
fn without_a_store_nothing_is_kept() {
    let mut manager = Manager::new(Place::with_server());
    for room in [None, Some("0"), Some("many")] {
        manager.room = room;
        let address = free();
        let mut events = manager.serve(&KERNEL, &[("PORT", address.port().to_string())]);
        assert!(get(address, "/").contains("slot"));
        let workers = workers(&events);
        events.running.signal(Signal::KILL);
        events.running.end();
        wait_for(&workers);
        assert!(TcpStream::connect(address).is_err(), "nobody listens");
        assert_eq!(manager.names(), [""; 0]);
    }
}

/// A group with a classic program cannot be left to anybody; a socket that another mechanism has left is used all the same.
#[test]
fn without_ebpf_a_group_is_not_kept_and_what_was_kept_is_handed_over() {
    let manager = Manager::new(Place::with_server());
    let address = free();
    let port = ("PORT", address.port().to_string());
    let without = [port.clone(), ("WITHOUT_EBPF", "1".to_owned())];
    let mut events = manager.start(&KERNEL, &without);
    let bound = events.wait_for("bound");
    assert!(bound["why"].to_string().contains("classic"), "{bound}");
    events.wait_for("ready");
    assert_eq!(manager.names(), [""; 0]);
    events.running.signal(Signal::KILL);
    events.running.end();
    let mut events = manager.serve(&KERNEL, &[port]);
    let bound = events.wait_for("bound");
    if bound["why"].to_string().contains("classic") {
        return skip("without_ebpf_a_group_is_not_kept_and_what_was_kept_is_handed_over", "eBPF");
    }
    let load = Load::start(address, CLIENTS, "/");
    load.wait_for_ok(50);
    events.running.signal(Signal::TERM);
    events.running.end();
    let names = manager.names();
    let mut events = manager.serve(&KERNEL, &without);
    let bound = events.wait_for("bound");
    assert!(bound["why"].to_string().contains("the primary accepts"), "{bound}");
    load.wait_for_ok(50);
    assert_eq!(failed(&load.stop()), 0);
    assert_eq!(manager.names(), names);
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
}

#[test]
fn a_full_store_is_told_of_and_does_no_harm() {
    let mut manager = Manager::new(Place::new());
    manager.room = Some("1");
    manager.place.file(
        "server.js",
        "const http = require('http');
         const answer = (q, a) => a.end('{}');
         http.createServer(answer).listen(process.env.ONE, '127.0.0.1', () =>
           http.createServer(answer).listen(process.env.TWO, '127.0.0.1'));",
    );
    let (one, two) = (free(), free());
    let env = [("ONE", one.port().to_string()), ("TWO", two.port().to_string())];
    let mut events = manager.start(&KERNEL, &env);
    let notice = events.wait_until("notice", |notice| notice["code"] == "store");
    assert!(notice["text"].as_str().expect("text").contains("room for 1 sockets"), "{notice}");
    assert_eq!(manager.names().len(), 1);
    eventually("both ports", || TcpStream::connect(two).is_ok(), |there| *there);
    assert_eq!((get(one, "/"), get(two, "/")), ("{}".to_owned(), "{}".to_owned()));
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
}

#[test]
fn what_nobody_asks_for_any_more_is_let_go() {
    let manager = Manager::new(Place::with_server());
    let (before, now) = (free(), free());
    let mut events = manager.serve(&KERNEL, &[("PORT", before.port().to_string())]);
    events.running.signal(Signal::KILL);
    events.running.end();
    let mut events = manager.serve(&KERNEL, &[("PORT", now.port().to_string())]);
    let wanted = [format!("polyfork.tcp.{}", now.to_string().replace(':', "_"))];
    eventually("only what is used", || manager.names(), |names| *names == wanted);
    events.wait_until("notice", |notice| notice["code"] == "store");
    assert!(TcpStream::connect(before).is_err(), "it is closed");
    assert!(get(now, "/").contains("slot"));
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
}

/// The socket that was kept holds the port that is wanted.
#[test]
fn another_address_on_the_same_port_can_be_had() {
    let manager = Manager::new(Place::new());
    let text = "require('http').createServer((q, a) => a.end('{}')).listen(process.env.PORT, process.env.HOST);";
    manager.place.file("server.js", text);
    let address = free();
    for (host, listens) in
        [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("", "[__]"), ("", "[__]")]
    {
        let env = [("PORT", address.port().to_string()), ("HOST", host.to_owned())];
        let mut events = manager.serve(&KERNEL, &env);
        assert_eq!(get(address, "/"), "{}");
        let wanted = [format!("polyfork.tcp.{listens}_{}", address.port())];
        eventually("only what is used", || manager.names(), |names| *names == wanted);
        events.running.signal(Signal::KILL);
        events.running.end();
    }
}

#[test]
fn a_socket_that_its_last_worker_closes_is_let_go() {
    let manager = Manager::new(Place::new());
    manager.place.file(
        "server.js",
        "const http = require('http');
         http.createServer((q, a) => a.end('{}')).listen(process.env.ONE, '127.0.0.1');
         const other = http.createServer((q, a) => a.end('{}')).listen(process.env.TWO, '127.0.0.1');
         process.on('SIGUSR2', () => other.close());",
    );
    let (one, two) = (free(), free());
    let env = [("ONE", one.port().to_string()), ("TWO", two.port().to_string())];
    let mut events = manager.serve(&["-w", "1", "server.js"], &env);
    eventually("both", || manager.names().len(), |count| *count == 2);
    signal(&workers(&events)[0], Signal::USR2);
    events.wait_for("closed");
    eventually("one", || manager.names().len(), |count| *count == 1);
    assert!(TcpStream::connect(two).is_err());
    assert_eq!(get(one, "/"), "{}");
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
}

#[test]
fn names_that_are_made_up_do_no_harm() {
    let manager = Manager::new(Place::with_server());
    let address = free();
    let mine = TcpListener::bind("127.0.0.1:0").expect("bind");
    let path = manager.place.path().join("x.sock");
    let unix = UnixListener::bind(&path).expect("bind");
    std::fs::remove_file(&path).expect("remove");
    let name = format!("polyfork.tcp.127.0.0.1_{}", address.port());
    // A socket of another address, by the name of the one that is wanted.
    manager.put(&name, mine.try_clone().expect("dup").into());
    manager.put("polyfork.unix.1.2./x.sock", unix.into());
    manager.put("polyfork.", std::fs::File::open("/dev/null").expect("open").into());
    manager.put("polyfork.tcp.%s%n%00 ../../etc", UnixStream::pair().expect("pair").0.into());
    manager.put(&format!("polyfork.{}", "x".repeat(500)), mine.try_clone().expect("dup").into());
    let mut events = manager.serve(&KERNEL, &[("PORT", address.port().to_string())]);
    for _ in 0..5 {
        events.wait_until("notice", |notice| {
            notice["code"] == "store" && notice["text"].as_str().expect("text").contains("not used")
        });
    }
    assert!(get(address, "/").contains("slot"));
    eventually("only what is used", || manager.names(), |names| *names == [name.clone()]);
    assert!(mine.local_addr().is_ok());
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
}

/// What systemd's own socket units pass on is not ours, whatever else comes along.
#[test]
fn sockets_of_the_manager_and_kept_ones_do_not_get_mixed_up() {
    let manager = Manager::new(Place::new());
    manager.place.file("server.py", PYTHON);
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let (given, listened) = (listener.local_addr().expect("address"), free());
    manager.put("a.socket", listener.into());
    let port = listened.port().to_string();
    let listen = format!("127.0.0.1:{port}");
    // The worker serves what it inherits first.
    let args =
        ["-w", "1", "--ready", "delay=50ms", "--listen", &listen, "--", "python3", "server.py"];
    let mut events = manager.serve(&args, &[]);
    let names = manager.names();
    assert_eq!(names, ["a.socket".to_owned(), format!("polyfork.tcp.127.0.0.1_{port}")]);
    assert_eq!(get(listened, "/"), "{}");
    events.running.signal(Signal::KILL);
    events.running.end();
    let mut events = manager.serve(&args, &[]);
    assert_eq!(manager.names(), names);
    assert_eq!(get(listened, "/"), "{}");
    assert!(TcpStream::connect(given).is_ok());
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
}

#[test]
fn an_upgraded_primary_is_followed_as_well() {
    for args in [&KERNEL[..], &SHARED, &HANDOFF] {
        let manager = Manager::new(Place::with_server());
        let address = free();
        let env = [("PORT", address.port().to_string())];
        let mut events = manager.serve(args, &env);
        let load = Load::start(address, CLIENTS, "/");
        let names = manager.names();
        for _ in 0..2 {
            load.wait_for_ok(50);
            let told = ended(manager.place.polyfork(["upgrade", "server"]));
            assert_eq!(told.code, Some(0), "{told:?}");
            load.wait_for_ok(50);
            assert_eq!(manager.names(), names);
            events.running.signal(Signal::KILL);
            events.running.end();
            events = manager.serve(args, &env);
        }
        load.wait_for_ok(50);
        let counts = load.stop();
        println!("upgraded and killed twice ({args:?}): {counts:?}");
        assert_eq!(count(&counts, Class::Refused) + count(&counts, Class::Hang), 0, "{counts:?}");
        assert!(
            failed(&counts) <= if args == HANDOFF { 2 * CLIENTS as u64 } else { 0 },
            "{counts:?}"
        );
        // ... and lets go of what it has from another image.
        let told = ended(manager.place.polyfork(["upgrade", "server"]));
        assert_eq!(told.code, Some(0), "{told:?}");
        assert_eq!(manager.place.ends(["stop", "server"]).code, Some(0));
        events.running.end();
        manager.empties();
    }
}
