//! Listening sockets that outlive the primary: somebody who does (a service manager) holds a copy of each.
//!
//! Here is what is kept, under which name, and what of it is still waiting for somebody to ask for its address. How a
//! copy gets there and comes back is the caller's ([`Store`]); which socket of a port is the one to keep is decided in `super`.
//!
//! The rule that surprises: a name is only believed if it is what we would call that very socket now. So a name that was made
//! up, a socket that does not listen any more, and one whose file was replaced are all the same thing: not ours, let go.
//!
//! References: sd_pid_notify_with_fds(3) for what names may hold; `polyfork_sys::reuseport`, `keeper`.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use polyfork_sys::channel::{self, FdKind};
use polyfork_sys::reuseport::UnixSocket;

use super::sockets::local_address;
use crate::cluster::settings::Address;

/// What the names of our sockets begin with in a [`Store`].
pub const STORE_PREFIX: &str = "polyfork.";
/// The longest name that a service manager takes, in bytes.
const LONGEST: usize = 255;

/// Somebody who holds copies of listening sockets while this process is not there, and gives them to the next one
/// ([`Settings::kept`](super::super::Settings::kept)).
pub trait Store: Send + Sync {
    /// Takes a copy. Names have printable ASCII without colons, 255 bytes at most. What is there under the same name is the
    /// same socket.
    ///
    /// # Errors
    /// When it is not taken. It goes on without, with a notice.
    fn keep(&self, name: &str, socket: BorrowedFd<'_>) -> io::Result<()>;

    /// Lets all copies of that name go.
    ///
    /// # Errors
    /// When that could not be told. The next process does it, then.
    fn forget(&self, name: &str) -> io::Result<()>;

    /// How many sockets it can hold.
    fn room(&self) -> usize;
}

/// A [`Store`] in settings.
#[derive(Clone)]
pub(crate) struct StoreHandle(pub(crate) Arc<dyn Store>);

impl fmt::Debug for StoreHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StoreHandle")
    }
}

/// What was kept for this process, and how to have more kept.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    store: Option<StoreHandle>,
    /// Come back, and asked for by nobody so far.
    waiting: Vec<Waiting>,
    /// How many the store holds of ours.
    held: usize,
    /// For people.
    remarks: Vec<String>,
}

/// A socket that has come back.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) name: String,
    pub(super) socket: OwnedFd,
}

/// Where a socket listens, as far as it matters for who may have it.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Tcp {
        at: SocketAddr,
        ipv6_only: bool,
    },
    /// With its file as it is now; an abstract name has none.
    Unix {
        path: Vec<u8>,
        file: Option<(u64, u64)>,
    },
}

impl Stored {
    /// Looks at what has come back. What is not ours is let go, with a remark.
    pub(crate) fn new(store: Option<StoreHandle>, kept: Vec<(String, i32)>) -> Stored {
        let mut stored = Stored { store, held: kept.len(), ..Stored::default() };
        for (name, number) in kept {
            let socket = match polyfork_sys::system::take_inherited_fd(number) {
                Ok(socket) => socket,
                Err(error) => {
                    stored.reject(&name, &error.to_string());
                    continue;
                }
            };
            let known = |waiting: &Waiting| waiting.name == name;
            match Place::of(socket.as_fd()) {
                Ok(place) if place.name() != name => {
                    let text = format!("it listens on {}", place.address());
                    stored.reject(&name, &text);
                }
                Ok(_) if stored.waiting.iter().any(known) => {
                    // Closing a copy that is one too many; the name stays.
                    stored.held -= 1;
                }
                Ok(_) => stored.waiting.push(Waiting { name, socket }),
                Err(reason) => stored.reject(&name, reason),
            }
        }
        stored
    }

    fn reject(&mut self, name: &str, why: &str) {
        let shown = name.escape_debug();
        self.remarks.push(format!("a socket of the store is not used and let go: {shown}: {why}"));
        self.forget(name);
    }

    /// The socket that was kept of an address, with its name.
    pub(super) fn take(&mut self, address: &Address, ipv6_only: bool) -> Option<Waiting> {
        let fits = |waiting: &Waiting| match (Place::of(waiting.socket.as_fd()), address) {
            (Ok(Place::Tcp { at, ipv6_only: only }), Address::Tcp(wanted)) => {
                at == *wanted && (only == ipv6_only || at.is_ipv4())
            }
            // The file as well, which may have been replaced since it came back.
            (Ok(place @ Place::Unix { .. }), Address::Unix(wanted)) => {
                place.is_at(wanted) && place.name() == waiting.name
            }
            _ => false,
        };
        let found = self.waiting.iter().position(fits)?;
        Some(self.waiting.swap_remove(found))
    }

    /// Takes back what could not be used.
    pub(super) fn put_back(&mut self, waiting: Waiting) {
        self.waiting.push(waiting);
    }

    /// Lets go of what is in the way of an address. True when there was something.
    pub(super) fn make_way(&mut self, address: &Address) -> bool {
        let in_the_way = |waiting: &Waiting| match (Place::of(waiting.socket.as_fd()), address) {
            (Ok(Place::Tcp { at, .. }), Address::Tcp(wanted)) => {
                let all = at.ip().is_unspecified() || wanted.ip().is_unspecified();
                at.port() == wanted.port() && (all || at.ip() == wanted.ip())
            }
            (Ok(place @ Place::Unix { .. }), Address::Unix(wanted)) => place.is_at(wanted),
            _ => false,
        };
        let (gone, stay) = std::mem::take(&mut self.waiting).into_iter().partition(in_the_way);
        self.waiting = stay;
        self.let_go(gone)
    }

    /// Lets go of all that nobody has asked for.
    pub(super) fn release(&mut self) {
        let gone = std::mem::take(&mut self.waiting);
        self.let_go(gone);
    }

    fn let_go(&mut self, gone: Vec<Waiting>) -> bool {
        let some = !gone.is_empty();
        for Waiting { name, socket } in gone {
            self.remarks.push(match Place::of(socket.as_fd()) {
                Ok(place) => format!(
                    "nobody listens on {} any more: the socket that was kept is let go",
                    place.address()
                ),
                Err(_) => format!("the socket that was kept as {name} is let go"),
            });
            remove_file(socket.as_fd());
            self.end(&name, socket.as_fd());
        }
        some
    }

    /// A socket is closed for good: nobody can connect from now on, whoever still has a copy.
    pub(super) fn end(&mut self, name: &str, socket: BorrowedFd<'_>) {
        // One that does not listen any more is what we want.
        let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Read);
        self.forget(name);
    }

    /// The store shall have no copy any more.
    pub(super) fn forget(&mut self, name: &str) {
        self.held = self.held.saturating_sub(1);
        let Some(StoreHandle(store)) = &self.store else { return };
        if let Err(error) = store.forget(name) {
            let name = name.escape_debug();
            self.remarks.push(format!("cannot tell the store to let {name} go: {error}"));
        }
    }

    /// Has a copy kept; its name there. `None`, with a remark, if that is not possible.
    pub(super) fn keep(&mut self, socket: BorrowedFd<'_>) -> Option<String> {
        let StoreHandle(store) = self.store.as_ref()?;
        let kept = match Place::of(socket) {
            Err(reason) => Err(reason.to_owned()),
            Ok(_) if self.held >= store.room() => {
                Err(format!("there is room for {} sockets", store.room()))
            }
            Ok(place) => {
                let name = place.name();
                store.keep(&name, socket).map(|()| name).map_err(|error| error.to_string())
            }
        };
        match kept {
            Ok(name) => {
                self.held += 1;
                Some(name)
            }
            Err(why) => {
                self.cannot(&why);
                None
            }
        }
    }

    pub(super) fn cannot(&mut self, why: &str) {
        self.remarks.push(format!(
            "a socket could not be kept; it is closed if this process is killed: {why}"
        ));
    }

    /// Whether sockets can be kept.
    pub(super) fn exists(&self) -> bool {
        self.store.is_some()
    }

    /// What there is to tell people.
    pub(crate) fn take_remarks(&mut self) -> Vec<String> {
        std::mem::take(&mut self.remarks)
    }

    pub(super) fn waiting(&self) -> &[Waiting] {
        &self.waiting
    }

    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// As another image of this process has left it.
    pub(super) fn back(store: Option<StoreHandle>, waiting: Vec<Waiting>, held: usize) -> Stored {
        Stored { store, waiting, held, remarks: Vec::new() }
    }
}

impl Place {
    fn of(socket: BorrowedFd<'_>) -> Result<Place, &'static str> {
        let nowhere = "its address cannot be told";
        match channel::kind(socket) {
            Ok(FdKind::TcpListener) => {
                let at = local_address(socket).map_err(|_| nowhere)?;
                let only = || rustix::net::sockopt::ipv6_v6only(socket);
                let ipv6_only = at.is_ipv6() && only().map_err(|_| nowhere)?;
                Ok(Place::Tcp { at, ipv6_only })
            }
            Ok(FdKind::UnixListener) => {
                let at = rustix::net::getsockname(socket).map_err(|_| nowhere)?;
                let at = rustix::net::SocketAddrUnix::try_from(at).map_err(|_| nowhere)?;
                if let Some(name) = at.abstract_name() {
                    let path = [b"\0", name].concat();
                    return Ok(Place::Unix { path, file: None });
                }
                let path = at.path_bytes().ok_or(nowhere)?.to_vec();
                let look = std::fs::symlink_metadata(Path::new(std::ffi::OsStr::from_bytes(&path)));
                let file = look.map_err(|_| "its file is gone")?;
                Ok(Place::Unix { path, file: Some((file.dev(), file.ino())) })
            }
            _ => Err("it is no listening socket"),
        }
    }

    fn is_at(&self, wanted: &Path) -> bool {
        matches!(self, Place::Unix { path, .. } if path == wanted.as_os_str().as_bytes())
    }

    /// For people.
    fn address(&self) -> Address {
        match self {
            Place::Tcp { at, .. } => Address::Tcp(*at),
            Place::Unix { path, .. } => Address::Unix(std::ffi::OsStr::from_bytes(path).into()),
        }
    }

    /// What it is called in a store: the same for the same socket, another for every other.
    fn name(&self) -> String {
        let mut name = match self {
            Place::Tcp { at, .. } => format!("{STORE_PREFIX}tcp.{at}"),
            Place::Unix { path, file: Some((device, inode)) } => {
                format!("{STORE_PREFIX}unix.{device:x}.{inode:x}.{}", printed(path))
            }
            Place::Unix { path, file: None } => {
                format!("{STORE_PREFIX}abstract.{}", printed(path.get(1..).unwrap_or_default()))
            }
        };
        // Separates names in LISTEN_FDNAMES.
        name = name.replace(':', "_");
        // Of a path the number of its file is enough to know it again.
        name.truncate(LONGEST);
        name
    }
}

/// Bytes as printable ASCII.
fn printed(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes {
        match byte {
            b'%' => text.push_str("%25"),
            b'!'..=b'~' => text.push(char::from(*byte)),
            other => text.push_str(&format!("%{other:02x}")),
        }
    }
    text
}

/// The file of a Unix socket that nobody will listen on any more.
fn remove_file(socket: BorrowedFd<'_>) {
    if let (Ok(Place::Unix { path, file: Some(file) }), Ok(socket)) =
        (Place::of(socket), socket.try_clone_to_owned())
    {
        let path = Path::new(std::ffi::OsStr::from_bytes(&path)).to_owned();
        drop(UnixSocket::from_parts(socket, Some((path, file.0, file.1))));
    }
}

/// A Unix socket that has come back, with its file.
pub(super) fn with_file(socket: OwnedFd) -> UnixSocket {
    let file = match Place::of(socket.as_fd()) {
        Ok(Place::Unix { path, file: Some((device, inode)) }) => {
            Some((Path::new(std::ffi::OsStr::from_bytes(&path)).to_owned(), device, inode))
        }
        _ => None,
    };
    UnixSocket::from_parts(socket, file)
}
