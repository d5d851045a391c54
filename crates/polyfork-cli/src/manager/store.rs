//! The service manager's file descriptor store: who holds the listening sockets while there is no primary.
//!
//! There is one where the manager says so: `FDSTORE`, from systemd 254 on; for older ones our units say it.
//! Which sockets go there and come back, and what they are called, is decided in `polyfork::cluster`.
//!
//! The surprising rule: a socket that is shut down looks to the manager like one that is of no use any more, and it would
//! throw it away. Ours is shut down for a moment to move what waits on it, so `FDPOLL=0` goes with it.
//!
//! References: sd_pid_notify_with_fds(3), sd_listen_fds_with_names(3), systemd.service(5) `FileDescriptorStoreMax=`,
//! `FileDescriptorStorePreserve=`; systemd's FILE_DESCRIPTOR_STORE.md.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use polyfork::cluster::{STORE_PREFIX, Settings, Store};
use rustix::io::Errno;
use rustix::net::{
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, sendmsg_addr,
};

/// How long a manager may take to read what was said before. One that reads nothing holds nothing.
const PATIENCE: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(5);

/// The way to the store.
struct ManagerStore {
    socket: OwnedFd,
    address: SocketAddrUnix,
    room: usize,
}

/// The manager's store, if it has one for us.
pub(crate) fn store() -> Option<Arc<dyn Store>> {
    let room = std::env::var("FDSTORE").ok()?.parse().ok().filter(|room| *room > 0)?;
    let place = std::env::var_os("NOTIFY_SOCKET").filter(|place| !place.is_empty())?;
    // One that cannot be used is told of elsewhere.
    let (socket, address) = super::connect(&place).ok()?;
    Some(Arc::new(ManagerStore { socket, address, room }))
}

/// Sockets that the manager held and gives back, by name.
pub(super) fn kept() -> Vec<(String, i32)> {
    let given = super::given();
    let Ok(names) = std::env::var("LISTEN_FDNAMES") else { return Vec::new() };
    let names: Vec<&str> = names.split(':').collect();
    // As for sd_listen_fds_with_names(3): a list that does not fit says nothing about any of them.
    if names.len() != given.len() {
        return Vec::new();
    }
    let ours = names.into_iter().zip(given).filter(|(name, _)| name.starts_with(STORE_PREFIX));
    ours.map(|(name, number)| (name.to_owned(), number)).collect()
}

/// Settings of a cluster whose listening sockets the manager holds. Once in the life of a process: what it gave back belongs to
/// the cluster.
pub(crate) fn with_store(settings: Settings) -> Settings {
    let settings = settings.kept(kept());
    match store() {
        Some(store) => settings.store(store),
        None => settings,
    }
}

impl Store for ManagerStore {
    fn keep(&self, name: &str, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.tell(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n"), Some(socket))
    }

    fn forget(&self, name: &str) -> io::Result<()> {
        // It came from the environment: a line of its own would say something else.
        if name.contains(char::is_control) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "that is no name"));
        }
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), None)
    }

    fn room(&self) -> usize {
        self.room
    }
}

impl ManagerStore {
    /// Unlike what is told besides, this is not told anew by whatever comes next.
    fn tell(&self, text: &str, socket: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let passed = socket.as_slice();
        if !passed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(passed)) {
            return Err(io::Error::other("no room for a descriptor in a message"));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let text = [IoSlice::new(text.as_bytes())];
        let began = Instant::now();
        loop {
            match sendmsg_addr(&self.socket, &self.address, &text, &mut control, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if began.elapsed() < PATIENCE => std::thread::sleep(PAUSE),
                Err(Errno::AGAIN) => {
                    let text = "the service manager does not read";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
