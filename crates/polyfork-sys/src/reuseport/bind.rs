//! Bound sockets of every kind, and what can go wrong on the way.
//!
//! One address, one socket; groups of sockets on one port are made in `super`. All sockets are
//! non-blocking and close-on-exec.
//!
//! Unix sockets: a socket file outlives its process, so a file that nobody answers is replaced. Two
//! processes that do this at once could each remove the other's fresh file; they take turns by a lock
//! (`flock`) on the folder, which leaves nothing behind. On close only the file that we made goes.
//!
//! Behaviour follows: ip(7), ipv6(7), unix(7), socket(7), libuv `uv_tcp_bind` (`SO_REUSEADDR`, `IPV6_V6ONLY`).

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, ipproto, sockopt};

use super::Options;
use crate::errno;

/// The longest path of a Unix socket in bytes (`sun_path` without its closing zero byte).
pub const MAX_UNIX_PATH: usize = 107;
/// How long another process may hold the folder while it starts on the same path.
const LOCK_LIMIT: Duration = Duration::from_secs(2);
const LOCK_POLL: Duration = Duration::from_millis(2);
/// How often a free port is looked for again when another process takes it between bind and listen.
const PORT_TRIES: u32 = 8;

/// What was being done when binding failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BindStep {
    /// Looking at what was asked for: no slots, too long a path.
    Input,
    /// `socket(2)`: too many open files, or an address family the machine does not have.
    Socket,
    /// A socket option.
    Option,
    /// Waiting for another process that is starting on the same path.
    Lock,
    /// `bind(2)`: in use, not permitted, not an address of this machine.
    Bind,
    /// `listen(2)`: in use.
    Listen,
    /// The access mode of a socket file.
    Mode,
    /// Loading the selecting program, which was demanded.
    Program,
    /// Attaching the program, or putting a socket into its map.
    Attach,
}

/// Why nothing could be bound. Nothing stays open.
#[derive(Debug, thiserror::Error)]
pub struct BindError {
    /// The step that failed.
    pub step: BindStep,
    /// The address as it was asked for.
    pub address: String,
    /// The error.
    #[source]
    pub errno: io::Error,
    /// What the kernel's verifier had to say, when it refused the selecting program.
    pub verifier_log: Option<String>,
}

impl BindError {
    pub(super) fn new(
        step: BindStep,
        address: impl fmt::Display,
        errno: impl Into<io::Error>,
    ) -> Self {
        Self { step, address: address.to_string(), errno: errno.into(), verifier_log: None }
    }

    /// Whether somebody else has the address.
    pub fn is_in_use(&self) -> bool {
        self.errno.kind() == io::ErrorKind::AddrInUse
    }
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot listen on {}: ", self.address)?;
        match self.step {
            BindStep::Input | BindStep::Bind | BindStep::Listen => {}
            BindStep::Socket => write!(f, "make a socket: ")?,
            BindStep::Option => write!(f, "set an option: ")?,
            BindStep::Lock => write!(f, "wait for another process that starts there: ")?,
            BindStep::Mode => write!(f, "set the access mode: ")?,
            BindStep::Program => write!(f, "load the selecting program: ")?,
            BindStep::Attach => write!(f, "attach the selecting program: ")?,
        }
        write!(f, "{}", errno::text(&self.errno))
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// A socket of one kind for one address, not bound yet.
pub(super) fn socket(
    address: SocketAddr,
    kind: SocketType,
    ipv6_only: bool,
) -> Result<OwnedFd, BindError> {
    let fail = |step| move |errno: Errno| BindError::new(step, address, errno);
    let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        rustix::net::socket_with(family, kind, flags, None).map_err(fail(BindStep::Socket))?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, ipv6_only).map_err(fail(BindStep::Option))?;
    }
    Ok(socket)
}

/// The address a socket is really bound to.
pub(super) fn local_address(socket: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    let address = rustix::net::getsockname(socket)?;
    Ok(SocketAddr::try_from(address)?)
}

/// One TCP listener (`SO_REUSEADDR`), for handing over what it accepts or for a shared socket.
///
/// Port 0 takes a free one: ask [`local_addr`] which. An IPv6 wildcard takes IPv4 too unless
/// `ipv6_only`.
///
/// # Errors
///
/// [`BindError`]; in use also when the port belongs to a [`super::Group`] of anybody.
pub fn bind_listener(address: SocketAddr, options: &Options) -> Result<OwnedFd, BindError> {
    bind_prepared(address, options, |_socket| Ok(()))
}

/// [`bind_listener`] with something to be done to the socket after bind and before listen.
pub(super) fn bind_prepared(
    address: SocketAddr,
    options: &Options,
    prepare: impl Fn(BorrowedFd<'_>) -> io::Result<()>,
) -> Result<OwnedFd, BindError> {
    let mut tries = if address.port() == 0 { PORT_TRIES } else { 1 };
    loop {
        tries -= 1;
        match bind_once(address, options, &prepare) {
            // Somebody took the free port between our choice and our listen.
            Err(error) if error.is_in_use() && tries > 0 => {}
            result => return result,
        }
    }
}

fn bind_once(
    wanted: SocketAddr,
    options: &Options,
    prepare: impl Fn(BorrowedFd<'_>) -> io::Result<()>,
) -> Result<OwnedFd, BindError> {
    let fail = |step| move |errno: Errno| BindError::new(step, wanted, errno);
    let (address, _scout) = match wanted.port() {
        0 => scout(wanted, options).map(|(address, scout)| (address, Some(scout)))?,
        _ => (wanted, None),
    };
    let socket = bound_stream(address, options)?;
    prepare(socket.as_fd()).map_err(|errno| BindError::new(BindStep::Attach, wanted, errno))?;
    // Two processes can both come this far (neither listens yet); the kernel lets one listen.
    rustix::net::listen(&socket, options.backlog).map_err(fail(BindStep::Listen))?;
    Ok(socket)
}

/// A free port, and a socket that holds it for the moment.
///
/// A socket that let the kernel choose its port loses it when it is shut down (`SOCK_BINDPORT_LOCK`), and
/// would listen on another one afterwards. So one socket chooses, and the one that stays asks for the number.
fn scout(address: SocketAddr, options: &Options) -> Result<(SocketAddr, OwnedFd), BindError> {
    let scout = bound_stream(address, options)?;
    let chosen = local_address(scout.as_fd())
        .map_err(|errno| BindError::new(BindStep::Bind, address, errno))?;
    Ok((chosen, scout))
}

fn bound_stream(address: SocketAddr, options: &Options) -> Result<OwnedFd, BindError> {
    let fail = |step| move |errno: Errno| BindError::new(step, address, errno);
    let socket = socket(address, SocketType::STREAM, options.ipv6_only)?;
    sockopt::set_socket_reuseaddr(&socket, true).map_err(fail(BindStep::Option))?;
    rustix::net::bind(&socket, &address).map_err(fail(BindStep::Bind))?;
    Ok(socket)
}

/// The address a TCP or UDP socket is bound to.
///
/// # Errors
///
/// Those of getsockname(2), and `EAFNOSUPPORT` for a Unix socket.
pub fn local_addr(socket: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    local_address(socket)
}

/// Says whether `address` could be bound by us alone right now; leaves nothing bound.
///
/// For workers that bind for themselves with `SO_REUSEPORT`: they would silently join a stranger's group.
///
/// # Errors
///
/// As [`bind_listener`].
pub fn ensure_free(address: SocketAddr, options: &Options) -> Result<(), BindError> {
    bind_listener(address, options).map(drop)
}

/// How a UDP socket is bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UdpFlags {
    /// An IPv6 wildcard address does not take IPv4.
    pub ipv6_only: bool,
    /// `SO_REUSEADDR`: several sockets may have the address, the last one bound gets the packets.
    pub reuse_address: bool,
    /// `SO_REUSEPORT`: several sockets may have the address, packets spread over them.
    pub reuse_port: bool,
}

/// A bound UDP socket.
///
/// # Errors
///
/// [`BindError`].
pub fn bind_udp(address: SocketAddr, flags: UdpFlags) -> Result<OwnedFd, BindError> {
    let fail = |step| move |errno: Errno| BindError::new(step, address, errno);
    let socket = socket(address, SocketType::DGRAM, flags.ipv6_only)?;
    debug_assert_eq!(sockopt::socket_protocol(&socket), Ok(Some(ipproto::UDP)));
    if flags.reuse_address {
        sockopt::set_socket_reuseaddr(&socket, true).map_err(fail(BindStep::Option))?;
    }
    if flags.reuse_port {
        sockopt::set_socket_reuseport(&socket, true).map_err(fail(BindStep::Option))?;
    }
    rustix::net::bind(&socket, &address).map_err(fail(BindStep::Bind))?;
    Ok(socket)
}

/// Whether an address means "all addresses of this machine".
pub fn is_wildcard(address: IpAddr) -> bool {
    address.is_unspecified()
}

/// A listening Unix stream socket. Dropping it removes the socket file, if that is still ours.
#[derive(Debug)]
pub struct UnixSocket {
    socket: OwnedFd,
    file: Option<SocketFile>,
}

impl UnixSocket {
    /// The path of its file; `None` for an abstract name, or when the file has been let go.
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|file| file.path.as_path())
    }

    /// Its file as it was made: path, device and inode.
    pub fn file(&self) -> Option<(&Path, u64, u64)> {
        self.file.as_ref().map(|file| (file.path.as_path(), file.device, file.inode))
    }

    /// A socket and its file that another image of this process has made.
    pub fn from_parts(socket: OwnedFd, file: Option<(PathBuf, u64, u64)>) -> UnixSocket {
        let file =
            file.map(|(path, device, inode)| SocketFile { path, device, inode, gone: false });
        UnixSocket { socket, file }
    }

    /// Whether the file stays when this is dropped: somebody else has the socket, too.
    pub fn leave_file(&mut self, stays: bool) {
        if let Some(file) = &mut self.file {
            file.gone = stays;
        }
    }

    /// The socket alone. The file stays when it is closed.
    pub fn into_fd_keeping_file(self) -> OwnedFd {
        if let Some(file) = self.file {
            file.keep();
        }
        self.socket
    }

    /// Removes the file now. `false`: it was not ours any more, or there is none.
    ///
    /// # Errors
    ///
    /// Those of unlink(2), and `WouldBlock` when another process keeps the folder locked.
    pub fn unlink(&mut self) -> io::Result<bool> {
        match self.file.take() {
            Some(file) => file.remove(),
            None => Ok(false),
        }
    }
}

impl AsFd for UnixSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The file we made, and how to know it again. Removed when dropped.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
    /// It is not ours to remove, or is removed.
    gone: bool,
}

impl SocketFile {
    fn keep(mut self) {
        self.gone = true;
    }

    fn remove(mut self) -> io::Result<bool> {
        self.gone = true;
        let _turn = FolderLock::take(&self.path)?;
        self.remove_under_lock()
    }

    fn remove_under_lock(&self) -> io::Result<bool> {
        match look(&self.path)? {
            Some(found) if found.st_dev == self.device && found.st_ino == self.inode => {
                rustix::fs::unlink(&self.path)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.gone {
            // If the folder has gone or is read-only, the next start deals with a stale file.
            let _kept = FolderLock::take(&self.path).and_then(|_turn| self.remove_under_lock());
        }
    }
}

/// A listening Unix stream socket at `path`; a name that begins with a zero byte is abstract (no file).
///
/// `mode` is the file's access mode, exact from the moment the file is visible on; without it the
/// process' umask decides. A socket file that nobody answers any more is replaced; a live one is "in
/// use"; any other kind of file is left alone and "in use".
///
/// # Errors
///
/// [`BindError`]; a path longer than [`MAX_UNIX_PATH`] bytes is refused before any call.
pub fn bind_unix(path: &Path, backlog: i32, mode: Option<u32>) -> Result<UnixSocket, BindError> {
    let bytes = path.as_os_str().as_bytes();
    let (name, shown) = match bytes.split_first() {
        Some((0, name)) => {
            (Some(name), format!("abstract unix socket \"{}\"", name.escape_ascii()))
        }
        _ => (None, format!("unix:{}", path.display())),
    };
    let fail = |step| {
        let shown = shown.clone();
        move |errno: Errno| BindError::new(step, &shown, errno)
    };
    if bytes.is_empty() || bytes.len() > MAX_UNIX_PATH {
        let length = bytes.len();
        let text = format!("the path has {length} bytes, 1 to {MAX_UNIX_PATH} are possible");
        return Err(BindError::new(BindStep::Input, &shown, invalid(text)));
    }
    let address = match name {
        Some(name) => SocketAddrUnix::new_abstract_name(name),
        None => SocketAddrUnix::new(path),
    };
    let address = address.map_err(fail(BindStep::Input))?;
    let socket = unix_socket().map_err(fail(BindStep::Socket))?;
    if name.is_some() {
        rustix::net::bind(&socket, &address).map_err(fail(BindStep::Bind))?;
        rustix::net::listen(&socket, backlog).map_err(fail(BindStep::Listen))?;
        return Ok(UnixSocket { socket, file: None });
    }
    let turn = FolderLock::take(path);
    let turn = turn.map_err(|errno| BindError::new(BindStep::Lock, &shown, errno))?;
    let made =
        bind_file(&socket, &address, path, mode).map_err(|(step, errno)| fail(step)(errno))?;
    let listening = rustix::net::listen(&socket, backlog).map_err(fail(BindStep::Listen));
    // Before the file might be dropped, which takes the lock again.
    drop(turn);
    listening.map(|()| UnixSocket { socket, file: Some(made) })
}

/// Binds `socket` to a new file of exactly this mode. Called under the lock.
fn bind_file(
    socket: &OwnedFd,
    address: &SocketAddrUnix,
    path: &Path,
    mode: Option<u32>,
) -> Result<SocketFile, (BindStep, Errno)> {
    let mode = mode.map(|mode| Mode::from_raw_mode(mode & 0o777));
    if let Some(mode) = mode {
        // The file gets the socket's own mode, less the umask, when bind makes it.
        rustix::fs::fchmod(socket, mode).map_err(|errno| (BindStep::Mode, errno))?;
    }
    bind_replacing(socket, address, path).map_err(|errno| (BindStep::Bind, errno))?;
    if let Some(mode) = mode {
        // Adds what the umask took away.
        rustix::fs::chmod(path, mode).map_err(|errno| (BindStep::Mode, errno))?;
    }
    let made = look(path).and_then(|found| found.ok_or(Errno::NOENT));
    let made = made.map_err(|errno| (BindStep::Bind, errno))?;
    let path = path.to_owned();
    Ok(SocketFile { path, device: made.st_dev, inode: made.st_ino, gone: false })
}

fn unix_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Binds; if a dead socket file is in the way, removes it and binds again. Called under the lock.
fn bind_replacing(
    socket: &OwnedFd,
    address: &SocketAddrUnix,
    path: &Path,
) -> rustix::io::Result<()> {
    match rustix::net::bind(socket, address) {
        Err(Errno::ADDRINUSE) if is_stale(address, path)? => {}
        result => return result,
    }
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => rustix::net::bind(socket, address),
        Err(errno) => Err(errno),
    }
}

/// Whether the file at `path` is a socket that nobody answers.
fn is_stale(address: &SocketAddrUnix, path: &Path) -> rustix::io::Result<bool> {
    let Some(found) = look(path)? else { return Ok(true) };
    if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
        return Ok(false);
    }
    // Other answers (accepted, queue full, other type of socket, no permission) come from a live one.
    let answer = rustix::net::connect(&unix_socket()?, address);
    Ok(matches!(answer, Err(Errno::CONNREFUSED | Errno::NOENT)))
}

fn look(path: &Path) -> rustix::io::Result<Option<Stat>> {
    match rustix::fs::statat(rustix::fs::CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// The right to create and remove a socket file in a folder, among processes of our kind.
#[derive(Debug)]
struct FolderLock {
    _folder: Option<OwnedFd>,
}

impl FolderLock {
    /// # Errors
    ///
    /// `WouldBlock`: another process holds it for longer than a start takes.
    fn take(path: &Path) -> io::Result<Self> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // A folder that cannot be read, or not be locked (some network file systems), is used without.
        let Ok(folder) = rustix::fs::open(folder, flags, Mode::empty()) else {
            return Ok(Self { _folder: None });
        };
        let started = Instant::now();
        loop {
            match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self { _folder: Some(folder) }),
                Err(Errno::WOULDBLOCK) if started.elapsed() < LOCK_LIMIT => {
                    std::thread::sleep(LOCK_POLL);
                }
                Err(Errno::WOULDBLOCK) => return Err(Errno::WOULDBLOCK.into()),
                Err(Errno::INTR) => {}
                Err(_) => return Ok(Self { _folder: None }),
            }
        }
    }
}
