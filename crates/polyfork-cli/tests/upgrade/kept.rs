//! A client that keeps its connection, and counts what does not come back.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::load::HANG;

/// Clients that ask one request after the other on one connection each.
pub(crate) struct Kept {
    stop: Arc<AtomicBool>,
    ok: Arc<AtomicU64>,
    clients: Vec<JoinHandle<Result<(), String>>>,
}

impl Kept {
    pub(crate) fn start(address: SocketAddr, clients: usize, path: &str) -> Kept {
        let (stop, ok) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let client = |_| {
            let (stop, ok) = (Arc::clone(&stop), Arc::clone(&ok));
            let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n");
            std::thread::spawn(move || {
                let stream = TcpStream::connect(address).map_err(|error| error.to_string())?;
                stream.set_read_timeout(Some(HANG)).map_err(|error| error.to_string())?;
                let mut reader = BufReader::new(stream);
                while !stop.load(Ordering::Relaxed) {
                    ask(&mut reader, &request).map_err(|error| error.to_string())?;
                    ok.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            })
        };
        Kept { clients: (0..clients).map(client).collect(), stop, ok }
    }

    pub(crate) fn ok(&self) -> u64 {
        self.ok.load(Ordering::Relaxed)
    }

    /// Ends them: how many were answered, and what went wrong.
    pub(crate) fn stop(self) -> (u64, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.clients.into_iter().map(|client| client.join().expect("a client"));
        let wrong = ended.filter_map(Result::err).collect();
        (self.ok.load(Ordering::Relaxed), wrong)
    }
}

fn ask(reader: &mut BufReader<TcpStream>, request: &str) -> std::io::Result<()> {
    reader.get_mut().write_all(request.as_bytes())?;
    let (mut length, mut line) = (None, String::new());
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let lower = line.to_ascii_lowercase();
        if let Some(number) = lower.strip_prefix("content-length:") {
            length = number.trim().parse().ok();
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length.ok_or_else(|| std::io::Error::other("no length"))?];
    reader.read_exact(&mut body)
}
