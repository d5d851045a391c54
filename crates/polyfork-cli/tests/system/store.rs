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
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::Signal;

use super::desk::eventually;
use super::load::{Class, Counts, Load, count};
use super::support::{Events, PATIENCE, Place, command, get, skip};

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
    room: &'static str,
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
        Manager { place, held, ends, reader: Some(reader), room: "64" }
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
        launch.env("NOTIFY_SOCKET", self.place.path().join("notify")).env("FDSTORE", self.room);
        launch.envs(env.iter().map(|(key, value)| (key, value)));
        {
            let held = self.held.lock().expect("held");
            let all = held.store.iter().flat_map(|(name, fds)| fds.iter().map(move |fd| (name, fd)));
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
            assert!(name.len() <= 255 && name.bytes().all(|b| (b' '..127).contains(&b) && b != b':'));
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

/// Kills the primary and starts it again, several times.
fn killed_under_load(what: &str, args: &[&str]) -> Counts {
    let manager = Manager::new(Place::with_server());
    let address = free();
    let env = [("PORT", address.port().to_string())];
    let mut events = manager.serve(args, &env);
    assert_eq!(manager.names().len(), 1, "{:?}", manager.names());
    let load = Load::start(address, 4, "/");
    for _ in 0..4 {
        load.wait_for_ok(150);
        events.running.signal(Signal::KILL);
        events.running.end();
        events = manager.serve(args, &env);
    }
    load.wait_for_ok(150);
    let counts = load.stop();
    println!("{what}: killed 4 times, {counts:?}");
    assert_eq!(manager.names().len(), 1, "{:?}", manager.names());
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
    counts
}

#[test]
fn a_killed_primary_refuses_nobody_kernel() {
    let counts = killed_under_load("kernel", &["-w", "2", "server.js"]);
    assert_eq!(failed(&counts), 0, "{counts:?}");
}

#[test]
fn a_killed_primary_refuses_nobody_shared() {
    let counts = killed_under_load("shared", &["-w", "2", "--policy", "shared", "server.js"]);
    assert_eq!(failed(&counts), 0, "{counts:?}");
}

/// What the primary had accepted and not handed over dies with it: with four clients that is four each time at most.
#[test]
fn a_killed_primary_refuses_nobody_handoff() {
    let args = ["-w", "2", "--mechanism", "handoff", "server.js"];
    let counts = killed_under_load("handoff", &args);
    assert_eq!((count(&counts, Class::Refused), count(&counts, Class::Hang)), (0, 0), "{counts:?}");
    assert!(failed(&counts) <= 4 * 4, "{counts:?}");
}
