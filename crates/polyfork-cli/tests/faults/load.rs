//! A closed loop of clients that puts every attempt in one class.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// What became of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// A whole answer with status 200.
    Ok,
    Refused,
    /// Reset, or cut in the middle of the answer.
    Reset,
    /// Closed without a byte of an answer.
    Empty,
    /// No answer for [`HANG`].
    Hang,
    Other,
}

/// Far longer than any answer takes; an attempt that waits longer has been forgotten by everybody.
pub(crate) const HANG: Duration = Duration::from_secs(20);

/// How many attempts ended how. The classes add up to the attempts (invariant I1).
pub(crate) type Counts = BTreeMap<Class, u64>;

pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    counts: Arc<Mutex<Counts>>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    /// Clients that ask `path` again and again, a connection each time.
    pub(crate) fn start(address: SocketAddr, clients: usize, path: &str) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let counts = Arc::new(Mutex::new(Counts::new()));
        let clients = (0..clients)
            .map(|_| {
                let (stop, counts, path) =
                    (Arc::clone(&stop), Arc::clone(&counts), path.to_owned());
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let (class, _) = attempt(address, &path);
                        *counts.lock().expect("counts").entry(class).or_default() += 1;
                    }
                })
            })
            .collect();
        Load { stop, counts, clients }
    }

    pub(crate) fn ok(&self) -> u64 {
        self.counts.lock().expect("counts").get(&Class::Ok).copied().unwrap_or(0)
    }

    /// Waits until this many more attempts have succeeded.
    pub(crate) fn wait_for_ok(&self, more: u64) {
        let until = self.ok() + more;
        let limit = std::time::Instant::now() + super::support::PATIENCE;
        while self.ok() < until {
            assert!(std::time::Instant::now() < limit, "no progress: {:?}", self.counts.lock());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Lets the running attempts finish and tells what became of all.
    pub(crate) fn stop(self) -> Counts {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.join().expect("a client");
        }
        self.counts.lock().expect("counts").clone()
    }
}

pub(crate) fn count(counts: &Counts, class: Class) -> u64 {
    counts.get(&class).copied().unwrap_or(0)
}

/// One request on a connection of its own: how it ended, and the body.
pub(crate) fn attempt(address: SocketAddr, path: &str) -> (Class, String) {
    let mut stream = match TcpStream::connect_timeout(&address, HANG) {
        Ok(stream) => stream,
        Err(e) => return (class_of(e.kind()), String::new()),
    };
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    if let Err(e) = stream.write_all(request.as_bytes()) {
        return (class_of(e.kind()), String::new());
    }
    answer(&mut stream)
}

/// Reads an answer to the end of the connection.
pub(crate) fn answer(stream: &mut TcpStream) -> (Class, String) {
    stream.set_read_timeout(Some(HANG)).expect("a time limit");
    let mut bytes = Vec::new();
    let end = stream.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let class = match end {
        Err(e) => class_of(e.kind()),
        Ok(0) => Class::Empty,
        Ok(_) if whole(&text) => Class::Ok,
        Ok(_) => Class::Reset,
    };
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
    (class, body)
}

/// Status 200, and a JSON body (maybe chunked) that is complete.
fn whole(text: &str) -> bool {
    text.starts_with("HTTP/1.1 200") && text.contains('}')
}

fn class_of(kind: ErrorKind) -> Class {
    match kind {
        ErrorKind::ConnectionRefused => Class::Refused,
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted => {
            Class::Reset
        }
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Class::Hang,
        _ => Class::Other,
    }
}
