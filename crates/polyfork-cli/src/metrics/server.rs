//! Serves metrics over HTTP, on a loopback address or a Unix socket.
//!
//! Just enough of HTTP/1.1 for whoever scrapes: GET and HEAD of `/metrics`, one request a connection. What is told is
//! gathered in `metrics`.
//!
//! Bounded: 16 clients, a head of 8 KiB, five seconds to send it and five to take the answer. When all places are taken the
//! oldest client that is still sending gives way, so that slow ones keep nobody out. Written by hand because this is all
//! that is needed: a library for HTTP would weigh more in a primary than everything else here.
//!
//! The surprising rule: on a loopback address a request must name that in `Host` by number or as localhost. A page in a
//! browser can make its own name mean 127.0.0.1, and would read along otherwise.
//!
//! Sources: RFC 9110, RFC 9112; unix(7).

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polyfork::cluster::Address;
use polyfork::cluster::upgrade::{Name as Carried, Packing, ResumeError, Unpacking};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::text::Format;
use crate::control::server::Control;

/// Clients at a time.
const MOST_CLIENTS: usize = 16;
/// The longest head of a request.
const LONGEST_HEAD: usize = 8 << 10;
/// For a client to send its request, or to take its answer.
const CLIENT_TIME: Duration = Duration::from_secs(5);
/// After an error of `accept`: as a rule too many files are open.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Between two looks at whether clients rest.
const REST_STEP: Duration = Duration::from_millis(1);
/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;
/// Of a socket's file: its user alone.
const PRIVATE_FILE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Where metrics are served, before anybody is answered.
#[derive(Debug)]
pub(crate) struct Door {
    socket: Socket,
    /// As people see it.
    pub(crate) place: String,
    /// `Host` must be the loopback address.
    loopback_only: bool,
}

#[derive(Debug)]
enum Socket {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener, SocketFile),
}

/// Removes the file of a Unix socket, if it is still that one.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            // Whoever starts next takes it over.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Opens the place.
///
/// # Errors
/// The system's; for a Unix socket `AddrInUse` also where the file is none of a socket that nobody listens on.
pub(crate) fn open(address: &Address) -> io::Result<Door> {
    match address {
        Address::Tcp(address) => {
            let socket = std::net::TcpListener::bind(address)?;
            socket.set_nonblocking(true)?;
            let real = socket.local_addr()?;
            let place = format!("http://{real}/metrics");
            Ok(Door { socket: Socket::Tcp(socket), place, loopback_only: is_loopback(real) })
        }
        Address::Unix(path) => {
            let path = std::path::absolute(path)?;
            let socket = listen_unix(&path)?;
            let inode = std::fs::symlink_metadata(&path)?.ino();
            let place = format!("unix:{}", path.display());
            let file = SocketFile { path, inode };
            Ok(Door { socket: Socket::Unix(socket, file), place, loopback_only: false })
        }
        _ => Err(io::Error::new(io::ErrorKind::Unsupported, "neither TCP nor a Unix path")),
    }
}

/// Whether only this machine can reach it.
pub(crate) fn is_loopback(address: SocketAddr) -> bool {
    match address.ip() {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => {
            ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback())
        }
    }
}

/// The mode is set before anybody can connect. A file that a killed primary left behind is taken over.
fn listen_unix(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    if let Ok(found) = std::fs::symlink_metadata(path) {
        let nobody = || {
            let tried = std::os::unix::net::UnixStream::connect(path);
            tried.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        };
        if !found.file_type().is_socket() || !nobody() {
            return Err(io::Error::from(io::ErrorKind::AddrInUse));
        }
        std::fs::remove_file(path)?;
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::fs::chmod(path, PRIVATE_FILE)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Who is being served.
#[derive(Default)]
struct Clients {
    all: Mutex<VecDeque<Client>>,
    next: AtomicU64,
}

struct Client {
    id: u64,
    phase: Arc<AtomicU8>,
    task: AbortHandle,
}

const SENDING: u8 = 0;
const SERVED: u8 = 1;
const ANSWERED: u8 = 2;

fn lock(clients: &Clients) -> MutexGuard<'_, VecDeque<Client>> {
    clients.all.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers whoever comes, until it is dropped.
pub(crate) struct Serving {
    open: Open,
    file: Option<SocketFile>,
    place: String,
    loopback_only: bool,
    control: Control,
    clients: Arc<Clients>,
    accepting: Mutex<Option<AbortHandle>>,
}

enum Open {
    Tcp(Arc<TcpListener>),
    Unix(Arc<UnixListener>),
}

/// Where metrics are served, as it is carried to the next image of the primary.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct DoorState {
    socket: Carried,
    /// Of a Unix socket: its file, and the number of that.
    file: Option<(PathBuf, u64)>,
    place: String,
    loopback_only: bool,
}

impl Door {
    /// Takes it over from the image before.
    ///
    /// # Errors
    /// When the descriptor is missing.
    pub(crate) fn unpack(state: DoorState, unpacking: &mut Unpacking) -> Result<Door, ResumeError> {
        let DoorState { socket, file, place, loopback_only } = state;
        let socket = unpacking.take(socket)?;
        let socket = match file {
            None => Socket::Tcp(socket.into()),
            Some((path, inode)) => Socket::Unix(socket.into(), SocketFile { path, inode }),
        };
        Ok(Door { socket, place, loopback_only })
    }
}

impl Serving {
    fn accept(&self) {
        let (clients, control) = (Arc::clone(&self.clients), self.control.clone());
        let task = match &self.open {
            Open::Tcp(socket) => {
                tokio::spawn(accept_tcp(Arc::clone(socket), clients, control, self.loopback_only))
            }
            Open::Unix(socket) => tokio::spawn(accept_unix(Arc::clone(socket), clients, control)),
        };
        *self.accepting() = Some(task.abort_handle());
    }

    fn accepting(&self) -> MutexGuard<'_, Option<AbortHandle>> {
        self.accepting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes no new client, and waits for the answers that are on their way. Who has not asked yet, or does not take its
    /// answer within the time, has to ask again.
    pub(crate) async fn rest(&self, limit: Duration) {
        if let Some(accepting) = self.accepting().take() {
            accepting.abort();
        }
        let served = |client: &Client| client.phase.load(Ordering::Relaxed) == SERVED;
        let rest = async {
            while lock(&self.clients).iter().any(served) {
                tokio::time::sleep(REST_STEP).await;
            }
        };
        let _ = timeout(limit, rest).await;
    }

    /// Everybody is served as before.
    pub(crate) fn go_on(&self) {
        if self.accepting().is_none() {
            self.accept();
        }
    }

    /// Leaves it to the next image of this process.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn pack(&self, packing: &mut Packing) -> io::Result<DoorState> {
        let socket = match &self.open {
            Open::Tcp(socket) => packing.name(socket.as_fd())?,
            Open::Unix(socket) => packing.name(socket.as_fd())?,
        };
        let file = self.file.as_ref().map(|file| (file.path.clone(), file.inode));
        let (place, loopback_only) = (self.place.clone(), self.loopback_only);
        Ok(DoorState { socket, file, place, loopback_only })
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some(accepting) = self.accepting().take() {
            accepting.abort();
        }
    }
}

/// Begins to answer. Must be called inside the primary's runtime.
///
/// # Errors
/// When the system cannot wait for the socket.
pub(crate) fn serve(door: Door, control: &Control) -> io::Result<Serving> {
    let Door { socket, place, loopback_only } = door;
    let (open, file) = match socket {
        Socket::Tcp(socket) => (Open::Tcp(Arc::new(TcpListener::from_std(socket)?)), None),
        Socket::Unix(socket, file) => {
            (Open::Unix(Arc::new(UnixListener::from_std(socket)?)), Some(file))
        }
    };
    let (control, clients, accepting) = (control.clone(), Arc::default(), Mutex::default());
    let serving = Serving { open, file, place, loopback_only, control, clients, accepting };
    serving.accept();
    Ok(serving)
}

async fn accept_tcp(
    socket: Arc<TcpListener>,
    clients: Arc<Clients>,
    control: Control,
    strict: bool,
) {
    loop {
        match socket.accept().await {
            Ok((stream, _)) => admit(&clients, &control, strict, stream),
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn accept_unix(socket: Arc<UnixListener>, clients: Arc<Clients>, control: Control) {
    loop {
        match socket.accept().await {
            Ok((stream, _)) => admit(&clients, &control, false, stream),
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Gives a client a place, if need be that of one that is still sending.
fn admit<S>(clients: &Arc<Clients>, control: &Control, strict: bool, stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut all = lock(clients);
    if all.len() >= MOST_CLIENTS {
        let sending = |client: &Client| client.phase.load(Ordering::Relaxed) == SENDING;
        let Some(oldest) = all.iter().position(sending) else { return };
        if let Some(client) = all.remove(oldest) {
            client.task.abort();
        }
    }
    let id = clients.next.fetch_add(1, Ordering::Relaxed);
    let phase = Arc::new(AtomicU8::new(SENDING));
    let (theirs, control, own) = (Arc::clone(clients), control.clone(), Arc::clone(&phase));
    let task = tokio::spawn(async move {
        converse(stream, &control, strict, &own).await;
        lock(&theirs).retain(|client| client.id != id);
    });
    all.push_back(Client { id, phase, task: task.abort_handle() });
}

async fn converse<S>(mut stream: S, control: &Control, strict: bool, phase: &AtomicU8)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Ok(Some(head)) = timeout(CLIENT_TIME, head(&mut stream)).await else { return };
    phase.store(SERVED, Ordering::Relaxed);
    let answer = match asked(&head, strict) {
        Ok(Asked { format, body }) => {
            let text = super::gather(control).await.text(format);
            respond("200 OK", format.content_type(), &text, body)
        }
        Err((status, text)) => respond(status, "text/plain; charset=utf-8", text, true),
    };
    let write = async {
        stream.write_all(&answer).await?;
        stream.shutdown().await
    };
    // A client that does not take its answer has had its time.
    if matches!(timeout(CLIENT_TIME, write).await, Ok(Ok(()))) {
        phase.store(ANSWERED, Ordering::Relaxed);
        // What it still sends must not cut off the answer.
        let mut rest = [0; 512];
        let _ = timeout(CLIENT_TIME, async {
            let mut left = LONGEST_HEAD;
            while let Ok(read @ 1..) = stream.read(&mut rest).await {
                left = left.saturating_sub(read);
                if left == 0 {
                    break;
                }
            }
        })
        .await;
    }
}

/// Reads up to the empty line. Longer than allowed is given as far as it goes; `None` when the client leaves before.
async fn head(stream: &mut (impl AsyncRead + Unpin)) -> Option<Vec<u8>> {
    let mut head = Vec::with_capacity(512);
    loop {
        if stream.read_buf(&mut head).await.ok()? == 0 {
            return None;
        }
        if ends(&head) || head.len() >= LONGEST_HEAD {
            return Some(head);
        }
    }
}

fn ends(head: &[u8]) -> bool {
    head.windows(4).any(|end| end == b"\r\n\r\n") || head.windows(2).any(|end| end == b"\n\n")
}

/// What a request comes to.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    format: Format,
    /// False for HEAD.
    body: bool,
}

type Wrong = (&'static str, &'static str);

fn asked(head: &[u8], strict: bool) -> Result<Asked, Wrong> {
    const BAD: Wrong = ("400 Bad Request", "this is no request\n");
    if !ends(head) {
        return Err(("431 Request Header Fields Too Large", "the head of a request has 8 KiB\n"));
    }
    let head = std::str::from_utf8(head).map_err(|_| BAD)?;
    let mut lines = head.lines();
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(BAD);
    };
    if !matches!(version, "HTTP/1.0" | "HTTP/1.1") {
        return Err(BAD);
    }
    let headers = lines.take_while(|line| !line.is_empty()).map(|line| line.split_once(':'));
    let (mut accept, mut hosts) = (String::new(), Vec::new());
    for header in headers {
        let (name, value) = header.ok_or(BAD)?;
        if name.eq_ignore_ascii_case("accept") {
            accept.push(',');
            accept.push_str(value);
        } else if name.eq_ignore_ascii_case("host") {
            hosts.push(value.trim());
        }
    }
    if strict && !hosts.iter().all(|host| is_here(host)) {
        return Err((
            "403 Forbidden",
            "ask by address: the name of another host is not answered\n",
        ));
    }
    let body = match method {
        "GET" => true,
        "HEAD" => false,
        _ => return Err(("405 Method Not Allowed", "metrics can only be read: GET\n")),
    };
    match target.split('?').next() {
        Some("/metrics") => Ok(Asked { format: wanted(&accept), body }),
        _ => Err(("404 Not Found", "metrics are at /metrics\n")),
    }
}

/// Whether a `Host` is an address, or localhost.
fn is_here(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    host.is_empty() || name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

/// OpenMetrics for whoever likes it at least as well as the text format.
fn wanted(accept: &str) -> Format {
    let mut likes = [0.0f32; 2];
    for part in accept.split(',') {
        let mut words = part.split(';').map(str::trim);
        let place = match words.next().unwrap_or_default() {
            "application/openmetrics-text" => 0,
            "text/plain" => 1,
            _ => continue,
        };
        let like = words.find_map(|word| word.strip_prefix("q="));
        let like: f32 = like.map_or(1.0, |like| like.parse().unwrap_or(0.0));
        likes[place] = like.max(likes[place]);
    }
    match likes[0] > 0.0 && likes[0] >= likes[1] {
        true => Format::OpenMetrics,
        false => Format::Text,
    }
}

fn respond(status: &str, content: &str, text: &str, body: bool) -> Vec<u8> {
    let length = text.len();
    let allow = if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
    let mut answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content}\r\nContent-Length: {length}\r\n{allow}\
         Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    );
    if body {
        answer.push_str(text);
    }
    answer.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(head: &str, strict: bool) -> &'static str {
        match asked(head.as_bytes(), strict) {
            Ok(_) => "200",
            Err((status, _)) => &status[..3],
        }
    }

    #[test]
    fn only_what_makes_sense_is_answered() {
        assert_eq!(status("GET /metrics HTTP/1.1\r\nHost: localhost:9\r\n\r\n", true), "200");
        assert_eq!(status("HEAD /metrics?a=b HTTP/1.0\n\n", true), "200");
        assert_eq!(status("POST /metrics HTTP/1.1\r\n\r\n", true), "405");
        assert_eq!(status("GET / HTTP/1.1\r\n\r\n", true), "404");
        assert_eq!(status("GET /metrics/../x HTTP/1.1\r\n\r\n", true), "404");
        for bad in
            ["\n\n", "GET /metrics\r\n\r\n", "GET  /metrics HTTP/1.1\r\n\r\n", "x HTTP/2\n\n"]
        {
            assert_eq!(status(bad, true), "400", "{bad:?}");
        }
        assert_eq!(status("GET /metrics HTTP/1.1\r\nno colon\r\n\r\n", true), "400");
        assert_eq!(status(&format!("GET /{} HTTP/1.1", "x".repeat(9000)), true), "431");
        assert_eq!(asked(b"\xff\xfe \n\n", true).unwrap_err().0, "400 Bad Request");
    }

    #[test]
    fn a_name_that_a_page_made_up_is_not_answered_on_loopback() {
        let of = |host: &str, strict| {
            status(&format!("GET /metrics HTTP/1.1\r\nHost: {host}\r\n\r\n"), strict)
        };
        for host in ["127.0.0.1:9090", "[::1]:9090", "[::1]", "LOCALHOST", "10.0.0.1"] {
            assert_eq!(of(host, true), "200", "{host}");
        }
        for host in ["evil.example", "127.0.0.1.evil.example:80", "localhost.evil.example"] {
            assert_eq!(of(host, true), "403", "{host}");
            assert_eq!(of(host, false), "200", "{host}");
        }
    }

    #[test]
    fn open_metrics_is_for_who_asks() {
        for (accept, format) in [
            ("", Format::Text),
            ("*/*", Format::Text),
            ("application/openmetrics-text", Format::OpenMetrics),
            (
                "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                Format::OpenMetrics,
            ),
            ("application/openmetrics-text;q=0.2, text/plain;q=0.9", Format::Text),
            ("application/openmetrics-text;q=0", Format::Text),
            ("application/openmetrics-text;q=much", Format::Text),
        ] {
            assert_eq!(wanted(accept), format, "{accept}");
        }
    }

    #[test]
    fn loopback_is_what_only_this_machine_reaches() {
        for (address, here) in [
            ("127.0.0.1:1", true),
            ("127.9.9.9:1", true),
            ("[::1]:1", true),
            ("[::ffff:127.0.0.1]:1", true),
            ("0.0.0.0:1", false),
            ("[::]:1", false),
            ("10.0.0.1:1", false),
            ("[fe80::1]:1", false),
        ] {
            assert_eq!(is_loopback(address.parse().unwrap()), here, "{address}");
        }
    }
}
