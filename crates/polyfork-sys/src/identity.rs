//! Who this process is: accounts, and the way from root to somebody less powerful.
//!
//! [`become_user`] changes groups, group and user for good and keeps of all capabilities only those that are named. It is
//! meant for the first lines of `main`: capabilities belong to threads, and a thread that exists already would keep
//! its own.
//!
//! The surprising rule: a process that changed its user is not "dumpable" any more, and its own `/proc/self` then belongs
//! to root. That is put back, since descriptors are reached by way of `/proc/self/fd`. Another process of the same user
//! still cannot look into this one while this one has a capability that the other has not (ptrace(2)).
//!
//! References: credentials(7), capabilities(7), setresuid(2), getpwnam_r(3), getgrouplist(3), PR_SET_NO_NEW_PRIVS in prctl(2).

use std::ffi::{CStr, CString, OsStr, OsString};
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::ptr;

use rustix::process::DumpableBehavior;
use rustix::thread::{CapabilitySet, CapabilitySets};

/// The least memory that a look into the user database is given, and the most, in bytes.
const ENTRY_BYTES: std::ops::Range<usize> = 1 << 10..1 << 20;
/// More groups than the kernel takes (`NGROUPS_MAX`).
const MOST_GROUPS: usize = 65_536;
/// Numbers of capabilities that a kernel may know.
const CAPABILITIES: std::ops::Range<u64> = 0..64;

/// An account of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// What it is called; its number if it has no entry.
    pub name: OsString,
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Every group it belongs to, the primary one included.
    pub groups: Vec<u32>,
    /// Home folder; empty if it has no entry.
    pub home: PathBuf,
    /// Login shell; empty if it has no entry.
    pub shell: PathBuf,
}

/// Finds an account by its name, or by its number, which need not have an entry.
///
/// `None`: no such name, or a number without an entry and without a `group` to go with it.
///
/// # Errors
/// When the user database cannot be read.
pub fn account(user: &OsStr, group: Option<u32>) -> io::Result<Option<Account>> {
    let number = user.to_str().and_then(|text| text.parse::<u32>().ok());
    let entry = match number {
        Some(uid) => entry_of_number(uid)?,
        None => entry_of_name(user)?,
    };
    if let Some(mut account) = entry {
        account.gid = group.unwrap_or(account.gid);
        account.groups = groups_of(&account.name, account.gid)?;
        return Ok(Some(account));
    }
    Ok(number.zip(group).map(|(uid, gid)| Account {
        name: user.to_owned(),
        uid,
        gid,
        groups: vec![gid],
        home: PathBuf::new(),
        shell: PathBuf::new(),
    }))
}

/// Finds a group by its name or number.
///
/// # Errors
/// When the group database cannot be read.
pub fn group(name: &OsStr) -> io::Result<Option<u32>> {
    if let Some(number) = name.to_str().and_then(|text| text.parse::<u32>().ok()) {
        return Ok(Some(number));
    }
    let Ok(name) = CString::new(name.as_bytes()) else { return Ok(None) };
    let mut entry = MaybeUninit::<libc::group>::uninit();
    look_up(|buffer, found| {
        // SAFETY: all pointers are valid for the call: a terminated name, room for one entry, a buffer of the length
        // that is given with it, and room for the pointer that tells whether something was found.
        unsafe {
            libc::getgrnam_r(
                name.as_ptr(),
                entry.as_mut_ptr(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                found,
            )
        }
    })
    // SAFETY: the call told that it had filled the entry in.
    .map(|found| found.map(|_buffer| unsafe { entry.assume_init() }.gr_gid))
}

fn entry_of_name(name: &OsStr) -> io::Result<Option<Account>> {
    let Ok(name) = CString::new(name.as_bytes()) else { return Ok(None) };
    let mut entry = MaybeUninit::<libc::passwd>::uninit();
    let found = look_up(|buffer, found| {
        // SAFETY: as in `group`.
        unsafe {
            libc::getpwnam_r(
                name.as_ptr(),
                entry.as_mut_ptr(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                found,
            )
        }
    })?;
    // SAFETY: the call told that it had filled the entry in; its strings live in the buffer.
    Ok(found.map(|_buffer| read_entry(unsafe { entry.assume_init_ref() })))
}

fn entry_of_number(uid: u32) -> io::Result<Option<Account>> {
    let mut entry = MaybeUninit::<libc::passwd>::uninit();
    let found = look_up(|buffer, found| {
        // SAFETY: as in `group`.
        unsafe {
            libc::getpwuid_r(
                uid,
                entry.as_mut_ptr(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                found,
            )
        }
    })?;
    // SAFETY: the call told that it had filled the entry in; its strings live in the buffer.
    Ok(found.map(|_buffer| read_entry(unsafe { entry.assume_init_ref() })))
}

/// Calls with more and more memory; gives the memory when something was found.
fn look_up<T>(mut call: impl FnMut(&mut [u8], *mut *mut T) -> i32) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = ENTRY_BYTES.start;
    loop {
        let mut buffer = vec![0; bytes];
        let mut found: *mut T = ptr::null_mut();
        match call(&mut buffer, &raw mut found) {
            0 if found.is_null() => return Ok(None),
            0 => return Ok(Some(buffer)),
            libc::ERANGE if bytes < ENTRY_BYTES.end => bytes *= 2,
            libc::EINTR => {}
            // What "there is none" is called where it is no success (getpwnam(3)).
            libc::ENOENT | libc::ESRCH => return Ok(None),
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
}

fn read_entry(entry: &libc::passwd) -> Account {
    Account {
        name: text(entry.pw_name),
        uid: entry.pw_uid,
        gid: entry.pw_gid,
        groups: Vec::new(),
        home: text(entry.pw_dir).into(),
        shell: text(entry.pw_shell).into(),
    }
}

fn text(from: *const libc::c_char) -> OsString {
    if from.is_null() {
        return OsString::new();
    }
    // SAFETY: not null, and a terminated string in a buffer that the caller still holds.
    let text = unsafe { CStr::from_ptr(from) };
    OsStr::from_bytes(text.to_bytes()).to_owned()
}

fn groups_of(name: &OsStr, gid: u32) -> io::Result<Vec<u32>> {
    let Ok(name) = CString::new(name.as_bytes()) else { return Ok(vec![gid]) };
    let mut room = 32;
    loop {
        let mut groups = vec![0; room];
        let mut count = i32::try_from(room).unwrap_or(i32::MAX);
        // SAFETY: a terminated name, and room for as many groups as `count` says.
        let told =
            unsafe { libc::getgrouplist(name.as_ptr(), gid, groups.as_mut_ptr(), &raw mut count) };
        if told >= 0 {
            groups.truncate(usize::try_from(count).unwrap_or(0));
            groups.sort_unstable();
            groups.dedup();
            return Ok(groups);
        }
        if room >= MOST_GROUPS {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        room *= 2;
    }
}

/// What a process may keep when it becomes somebody else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// To bind ports below `net.ipv4.ip_unprivileged_port_start`.
    pub low_ports: bool,
    /// To change maps of programs that were loaded before: needed on kernels before 6.0 only.
    pub maps: bool,
}

impl Keep {
    fn set(self) -> CapabilitySet {
        let mut set = CapabilitySet::empty();
        set.set(CapabilitySet::NET_BIND_SERVICE, self.low_ports);
        set.set(CapabilitySet::BPF, self.maps);
        set
    }
}

/// Which step of a change failed.
#[derive(Debug)]
pub struct ChangeError {
    /// In words that follow "cannot".
    pub step: &'static str,
    /// The system's error.
    pub errno: io::Error,
}

impl fmt::Display for ChangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.step, self.errno)
    }
}

impl std::error::Error for ChangeError {}

/// Becomes `account` for good: its groups, its group, its user, no capability but those of `keep` that there were, none for
/// programs that are started, and no way to more (`no_new_privs`), not even by programs with a set-user-id bit.
///
/// The environment is made to fit: `HOME`, `USER`, `LOGNAME` and `SHELL` are the account's, and what names folders of
/// whoever was before (`XDG_RUNTIME_DIR` and the like) goes.
///
/// # Errors
/// Which step failed. Some steps may have been done: the only thing to do then is to end.
///
/// # Platform notes
/// Capabilities are given up by the calling thread and those it starts. With several threads it is refused.
pub fn become_user(account: &Account, keep: Keep) -> Result<(), ChangeError> {
    let failed = |step| move |errno: io::Error| ChangeError { step, errno };
    if threads() > 1 {
        let errno = io::Error::other("there are several threads");
        return Err(ChangeError { step: "change the user", errno });
    }
    let before = rustix::thread::capabilities(None)
        .map_err(|errno| failed("read capabilities")(errno.into()))?;
    set_groups(&account.groups).map_err(failed("set the groups"))?;
    let kept = keep.set() & before.permitted;
    give_up_bounding(kept);
    rustix::thread::set_keep_capabilities(true)
        .map_err(|errno| failed("keep capabilities")(errno.into()))?;
    set_ids(account.uid, account.gid)?;
    let sets =
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)
        .map_err(|errno| failed("give up capabilities")(errno.into()))?;
    rustix::thread::set_no_new_privs(true)
        .map_err(|errno| failed("set no_new_privs")(errno.into()))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)
        .map_err(|errno| failed("reach its own /proc")(errno.into()))?;
    // SAFETY: this is the only thread (see above), so nobody reads the environment meanwhile.
    unsafe { fit_environment(account) };
    Ok(())
}

/// How many threads this process has, as far as `/proc` tells.
fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count)
}

fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: a list of as many numbers as are told.
    match unsafe { libc::setgroups(groups.len(), groups.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Programs that are started cannot get back what is not in the bounding set, by whatever file. Without the right to
/// narrow it, `no_new_privs` does as much.
fn give_up_bounding(kept: CapabilitySet) {
    for number in CAPABILITIES {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if !kept.contains(one) {
            // One that this kernel does not know, or without the right: see above.
            let _ = rustix::thread::remove_capability_from_bounding_set(one);
        }
    }
}

fn set_ids(uid: u32, gid: u32) -> Result<(), ChangeError> {
    // SAFETY: three numbers.
    if unsafe { libc::setresgid(gid, gid, gid) } != 0 {
        return Err(ChangeError { step: "set the group", errno: io::Error::last_os_error() });
    }
    // SAFETY: three numbers.
    if unsafe { libc::setresuid(uid, uid, uid) } != 0 {
        return Err(ChangeError { step: "set the user", errno: io::Error::last_os_error() });
    }
    let (mut real, mut effective, mut saved) = (0, 0, 0);
    // SAFETY: room for three numbers.
    unsafe { libc::getresuid(&raw mut real, &raw mut effective, &raw mut saved) };
    if [real, effective, saved] != [uid; 3] {
        let errno = io::Error::other("it did not take effect");
        return Err(ChangeError { step: "set the user", errno });
    }
    Ok(())
}

/// # Safety
/// No other thread may exist.
unsafe fn fit_environment(account: &Account) {
    let set = |name: &str, value: &OsStr| {
        if value.is_empty() {
            // SAFETY: the caller promises that nobody else reads or writes the environment.
            unsafe { std::env::remove_var(name) };
        } else {
            // SAFETY: as above.
            unsafe { std::env::set_var(name, value) };
        }
    };
    set("HOME", account.home.as_os_str());
    set("USER", &account.name);
    set("LOGNAME", &account.name);
    set("SHELL", account.shell.as_os_str());
    for folder in
        ["XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"]
    {
        set(folder, OsStr::new(""));
    }
}

/// Whether this process may bind ports below the first one that everybody may.
pub fn may_bind_low_ports() -> bool {
    has(CapabilitySet::NET_BIND_SERVICE)
}

/// Whether this process has what the kernel asks of those who load a reuse-port program.
pub fn may_load_programs() -> bool {
    has(CapabilitySet::SYS_ADMIN) || (has(CapabilitySet::BPF) && has(CapabilitySet::NET_ADMIN))
}

fn has(one: CapabilitySet) -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(one))
}

/// Makes what this process may do outlast the next exec of this thread, for a primary that replaces itself by a new
/// version: a user who is not root loses at exec whatever is not "ambient". Programs started otherwise must not have it, so
/// undo it with `false` if the exec failed.
///
/// # Errors
/// The system's.
pub fn keep_over_exec(keep: bool) -> io::Result<()> {
    let mut sets = rustix::thread::capabilities(None)?;
    sets.inheritable = if keep { sets.permitted } else { CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)?;
    rustix::thread::clear_ambient_capability_set()?;
    if keep {
        for number in CAPABILITIES {
            let one = CapabilitySet::from_bits_retain(1 << number);
            if sets.permitted.contains(one) {
                rustix::thread::configure_capability_in_ambient_set(one, true)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_found_by_name_and_by_number() {
        let by_name = account(OsStr::new("root"), None).unwrap().expect("root");
        let by_number = account(OsStr::new("0"), None).unwrap().expect("root");
        assert_eq!((by_name.uid, &by_name), (0, &by_number));
        assert!(by_name.groups.contains(&by_name.gid));
    }

    #[test]
    fn who_is_not_there_is_not_found() {
        assert_eq!(account(OsStr::new("no-such-user-here"), None).unwrap(), None);
        assert_eq!(account(OsStr::new("a\0b"), None).unwrap(), None);
        assert_eq!(account(OsStr::new("4000000001"), None).unwrap(), None);
        assert_eq!(group(OsStr::new("no-such-group-here")).unwrap(), None);
        assert_eq!(group(OsStr::new("17")).unwrap(), Some(17));
    }

    #[test]
    fn a_number_without_an_entry_needs_its_group() {
        let found = account(OsStr::new("4000000001"), Some(17)).unwrap().expect("an account");
        assert_eq!((found.uid, found.gid, found.groups), (4_000_000_001, 17, vec![17]));
    }

    /// Of this thread: the set that an exec leaves to a user who is not root.
    fn ambient() -> String {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        status.lines().find_map(|line| line.strip_prefix("CapAmb:\t")).unwrap().to_owned()
    }

    #[test]
    fn what_may_be_done_is_kept_over_an_exec_and_no_longer() {
        let permitted = rustix::thread::capabilities(None).unwrap().permitted;
        let before = ambient();
        keep_over_exec(true).unwrap();
        let kept = u64::from_str_radix(&ambient(), 16).unwrap();
        assert_eq!(kept, permitted.bits());
        keep_over_exec(false).unwrap();
        assert_eq!(ambient(), format!("{:016x}", 0), "{before}");
    }

    #[test]
    fn a_process_of_several_threads_is_refused() {
        let (sender, waits) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || waits.recv());
        let root = account(OsStr::new("root"), None).unwrap().expect("root");
        let refused = become_user(&root, Keep::default()).unwrap_err();
        assert!(refused.to_string().contains("several threads"), "{refused}");
        drop(sender);
        let _ended = other.join();
    }
}
