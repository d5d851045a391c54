//! A control group of a child's own, so that all it starts can be ended at once.
//!
//! A group of processes can be left by any of them (`setsid`); a control group cannot, short of the right to write
//! elsewhere in the hierarchy. The child enters it by itself between clone and exec, so nothing it starts can be
//! outside.
//!
//! The rule that surprises: the folder can be removed only when the last process in it is gone *and collected*, so
//! whoever dropped the handle early leaves an empty folder behind; [`Cgroup::remove`] tells.
//!
//! References: cgroups(7), the kernel's admin-guide/cgroup-v2 (`cgroup.procs`, `cgroup.kill`, `cgroup.events`).

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{Mode, OFlags};

use crate::system::cgroup::own_unified_folder;

/// Distinguishes the groups of one process.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// A control group made for one child: a folder in the unified hierarchy (version 2), below our own group.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes an empty group below the one this process is in.
    ///
    /// # Errors
    ///
    /// `Unsupported`: no unified hierarchy is mounted, or the kernel has no `cgroup.kill` (before 5.14). Otherwise those
    /// of mkdir(2): usually not permitted, unless this process is root or its group was delegated to it (systemd:
    /// `Delegate=yes`).
    pub fn create() -> io::Result<Self> {
        let parent = own_unified_folder(Path::new("/")).ok_or_else(|| {
            io::Error::new(io::ErrorKind::Unsupported, "no control group hierarchy of version 2")
        })?;
        let me = rustix::process::getpid().as_raw_nonzero();
        let path = parent.join(format!("polyfork-{me}-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&path)?;
        let group = Self { path };
        if !group.file("cgroup.kill").exists() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel cannot kill a control group (needs 5.14)",
            ));
        }
        Ok(group)
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The file by which a process enters, for [`super::Command::enter_cgroup`].
    ///
    /// # Errors
    ///
    /// Those of open(2).
    pub fn door(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(self.file("cgroup.procs"), flags, Mode::empty())?)
    }

    /// Sends SIGKILL to every process in it and below it, those being started too. Returns before they are gone.
    ///
    /// # Errors
    ///
    /// Those of open(2) and write(2): the folder is gone.
    pub fn kill(&self) -> io::Result<()> {
        fs::write(self.file("cgroup.kill"), "1")
    }

    /// Whether no process is in it or below it.
    ///
    /// # Errors
    ///
    /// Those of read(2).
    pub fn is_empty(&self) -> io::Result<bool> {
        let text = fs::read_to_string(self.file("cgroup.events"))?;
        Ok(text.lines().any(|line| line == "populated 0"))
    }

    /// Removes the folder. One that is gone already is no error.
    ///
    /// # Errors
    ///
    /// `EBUSY`: a process is still in it.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // With a process in it the folder has to stay.
        let _busy = self.remove();
    }
}
