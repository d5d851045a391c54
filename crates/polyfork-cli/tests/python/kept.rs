//! Clients that ask again and again on the same connection, for as long as the server keeps it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use super::support::PATIENCE;

/// An answer with status 200.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) body: String,
    /// Its head says that the connection is over.
    pub(crate) closes: bool,
}

/// One connection.
pub(crate) struct Client(BufReader<TcpStream>);

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> io::Result<Client> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Client(BufReader::new(stream)))
    }

    pub(crate) fn say(&mut self, text: &str) -> io::Result<()> {
        self.0.get_mut().write_all(text.as_bytes())
    }

    pub(crate) fn ask(&mut self, path: &str) -> io::Result<Answer> {
        self.say(&format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n"))?;
        self.answer()
    }

    pub(crate) fn answer(&mut self) -> io::Result<Answer> {
        let head = self.head()?;
        if !head.starts_with("http/1.1 200") {
            return Err(io::Error::other(head));
        }
        let field =
            |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let body = match field("content-length") {
            Some(length) => self.exactly(length.parse().map_err(io::Error::other)?)?,
            None => self.chunks()?,
        };
        Ok(Answer { body, closes: field("connection") == Some("close") })
    }

    pub(crate) fn head(&mut self) -> io::Result<String> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.0.read_line(&mut head)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(head.to_lowercase())
    }

    fn exactly(&mut self, length: usize) -> io::Result<String> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes)?;
        String::from_utf8(bytes).map_err(io::Error::other)
    }

    pub(crate) fn chunks(&mut self) -> io::Result<String> {
        let mut body = String::new();
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line)?;
            let length = usize::from_str_radix(line.trim(), 16).map_err(io::Error::other)?;
            body += &self.exactly(length)?;
            self.exactly(2)?;
            if length == 0 {
                return Ok(body);
            }
        }
    }

    /// Waits for the end; an error if anything else comes.
    pub(crate) fn ends(&mut self) -> io::Result<()> {
        match self.0.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(io::Error::other("more came")),
        }
    }
}

/// Clients in a closed loop.
pub(crate) struct Load {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<Vec<String>>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    answers: AtomicU64,
    closes: AtomicU64,
}

/// What became of all requests.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) answers: u64,
    /// Answers that said that they were the last ones.
    pub(crate) closes: u64,
    /// What went wrong, request by request.
    pub(crate) failed: Vec<String>,
}

impl Load {
    pub(crate) fn start(address: SocketAddr, clients: usize, path: &str) -> Load {
        let shared = Arc::new(Shared::default());
        let clients = (0..clients)
            .map(|_| {
                let (shared, path) = (Arc::clone(&shared), path.to_owned());
                std::thread::spawn(move || shared.ask_on(address, &path))
            })
            .collect();
        Load { shared, clients }
    }

    /// Waits until this many more requests were answered.
    pub(crate) fn wait_for_answers(&self, more: u64) {
        let until = self.shared.answers.load(Ordering::Relaxed) + more;
        let limit = Instant::now() + PATIENCE;
        while self.shared.answers.load(Ordering::Relaxed) < until {
            assert!(Instant::now() < limit, "no progress");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    pub(crate) fn stop(self) -> Seen {
        self.shared.stop.store(true, Ordering::Relaxed);
        let failed = self.clients.into_iter().flat_map(|client| client.join().expect("a client"));
        Seen {
            failed: failed.collect(),
            answers: self.shared.answers.load(Ordering::Relaxed),
            closes: self.shared.closes.load(Ordering::Relaxed),
        }
    }
}

impl Shared {
    fn ask_on(&self, address: SocketAddr, path: &str) -> Vec<String> {
        let (mut kept, mut failed) = (None, Vec::new());
        while !self.stop.load(Ordering::Relaxed) {
            match self.ask(address, path, kept.take()) {
                Ok(client) => kept = client,
                Err(error) => failed.push(error.to_string()),
            }
        }
        failed
    }

    fn ask(
        &self,
        address: SocketAddr,
        path: &str,
        kept: Option<Client>,
    ) -> io::Result<Option<Client>> {
        let mut client = kept.map_or_else(|| Client::connect(address), Ok)?;
        let answer = client.ask(path)?;
        if answer.body.is_empty() {
            return Err(io::Error::other("an empty body"));
        }
        self.answers.fetch_add(1, Ordering::Relaxed);
        self.closes.fetch_add(u64::from(answer.closes), Ordering::Relaxed);
        Ok((!answer.closes).then_some(client))
    }
}
