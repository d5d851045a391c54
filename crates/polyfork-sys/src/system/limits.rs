//! Control groups that limit what a process, and all it starts, may use: memory and CPU, both versions of the hierarchy.
//!
//! A group is a folder below the one this process is in, made in the hierarchy that has the controller. Whether there shall
//! be a limit, and what to do without the right to one, is decided above. Where our own group is, `cgroup` knows; a group
//! to end all of a child's processes is `spawn::Cgroup`.
//!
//! The rule that surprises: in version 2 a group that has processes of its own cannot limit groups below it. So this
//! process moves itself into a group of its own first, if it is alone in its group (a service with `Delegate=yes` is).
//!
//! Behaviour follows: cgroups(7), kernel admin-guide cgroup-v2 (`memory.max`, `cpu.max`, "no internal process
//! constraint"), cgroup-v1 (`memory.limit_in_bytes`, `cpu.cfs_quota_us`), proc(5) (`oom_score_adj`).

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;

use super::cgroup::{Groups, counter};

/// Every folder of ours begins so, followed by the process that made it.
const PREFIX: &str = "polyfork-";
/// What the group of this very process is called, below the one it was in.
const OWN: &str = "-primary";
/// In which time a CPU limit is granted, in microseconds: the kernel's own default.
const PERIOD: f64 = 100_000.0;
/// The least that the kernel takes for it.
const LEAST_QUOTA: f64 = 1_000.0;

/// What a group may use.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    /// Bytes of memory. A process that needs more, and from which the kernel can take nothing back, is killed.
    pub memory: Option<u64>,
    /// Processors' worth of time: 0.5 is half of one.
    pub cpus: Option<f64>,
}

/// A group with limits; its folders are removed when it is dropped, if nobody is in it any more.
#[derive(Debug)]
pub struct LimitGroup {
    folders: Vec<PathBuf>,
    /// Where the kernel counts whom it has killed for want of memory.
    counts: Option<PathBuf>,
}

/// What one controller needs.
struct Controller {
    name: &'static str,
    v1: Vec<(&'static str, String)>,
    v2: (&'static str, String),
}

impl Limits {
    fn controllers(&self) -> Vec<Controller> {
        let memory = self.memory.map(|bytes| Controller {
            name: "memory",
            v1: vec![("memory.limit_in_bytes", bytes.to_string())],
            v2: ("memory.max", bytes.to_string()),
        });
        let cpu = self.cpus.map(|cpus| {
            let quota = (cpus * PERIOD).max(LEAST_QUOTA).round();
            Controller {
                name: "cpu",
                v1: vec![
                    ("cpu.cfs_period_us", PERIOD.to_string()),
                    ("cpu.cfs_quota_us", quota.to_string()),
                ],
                v2: ("cpu.max", format!("{quota} {PERIOD}")),
            }
        });
        memory.into_iter().chain(cpu).collect()
    }
}

impl LimitGroup {
    /// Makes a group below our own. `name` tells the groups of this process apart.
    ///
    /// # Errors
    ///
    /// `Unsupported`: no hierarchy here has the controller. Else those of mkdir(2) and write(2), with the path: usually not
    /// permitted, unless this process is root or its group was delegated to it.
    pub fn create(name: &str, limits: &Limits) -> io::Result<Self> {
        Self::create_at(Path::new("/"), name, limits)
    }

    fn create_at(root: &Path, name: &str, limits: &Limits) -> io::Result<Self> {
        let groups = Groups::read(root).ok_or_else(|| unsupported("no control groups".into()))?;
        let me = rustix::process::getpid().as_raw_nonzero();
        let mut group = Self { folders: Vec::new(), counts: None };
        for controller in limits.controllers() {
            let (parent, is_v2) = home(&groups, controller.name)?;
            let folder = parent.join(format!("{PREFIX}{me}-{name}"));
            if !group.folders.contains(&folder) {
                if is_v2 {
                    delegate(&parent, controller.name)?;
                }
                match fs::create_dir(&folder) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                        return Err(named("make", &folder, error));
                    }
                    _ => group.folders.push(folder.clone()),
                }
            } else {
                delegate(&parent, controller.name)?;
            }
            let v2 = [controller.v2];
            let files = if is_v2 { &v2[..] } else { &controller.v1[..] };
            for (file, value) in files {
                let file = folder.join(file);
                fs::write(&file, value).map_err(|error| named("write", &file, error))?;
            }
            if controller.name == "memory" {
                let counts = if is_v2 { "memory.events" } else { "memory.oom_control" };
                group.counts = Some(folder.join(counts));
            }
        }
        Ok(group)
    }

    /// The files by which a process enters, for [`enter_cgroup`](crate::spawn::Command::enter_cgroup), one by one.
    ///
    /// # Errors
    ///
    /// Those of open(2), with the path.
    pub fn doors(&self) -> io::Result<Vec<OwnedFd>> {
        let open = |folder: &PathBuf| {
            let file = folder.join("cgroup.procs");
            let opened = rustix::fs::open(&file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
            opened.map_err(|errno| named("open", &file, errno.into()))
        };
        self.folders.iter().map(open).collect()
    }

    /// Its folders, and the file in which the kernel counts whom it has killed, for the next image of this process.
    pub fn parts(&self) -> (&[PathBuf], Option<&Path>) {
        (&self.folders, self.counts.as_deref())
    }

    /// The group that the image of this process before this one has made.
    pub fn from_parts(folders: Vec<PathBuf>, counts: Option<PathBuf>) -> Self {
        Self { folders, counts }
    }

    /// How many processes of the group the kernel has killed for want of memory. `None` without a limit on memory.
    pub fn oom_kills(&self) -> Option<u64> {
        counter(self.counts.as_deref()?, "oom_kill")
    }

    /// Removes the folders. Those that are gone are no error.
    ///
    /// # Errors
    ///
    /// `EBUSY`: a process is still in it.
    pub fn remove(&self) -> io::Result<()> {
        for folder in &self.folders {
            match fs::remove_dir(folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

impl Drop for LimitGroup {
    fn drop(&mut self) {
        // With a process in it a folder has to stay, for `sweep`.
        let _busy = self.remove();
    }
}

/// Where groups with a limit on memory are made, and whether that is version 2.
///
/// # Errors
///
/// `Unsupported`: no hierarchy that is mounted here has the controller.
pub fn limits_folder() -> io::Result<(PathBuf, bool)> {
    let groups = Groups::read(Path::new("/"));
    home(&groups.ok_or_else(|| unsupported("no control groups".into()))?, "memory")
}

/// Removes empty groups that processes left behind which are no more.
pub fn sweep() {
    sweep_at(Path::new("/"));
}

fn sweep_at(root: &Path) {
    let Some(groups) = Groups::read(root) else { return };
    let homes = ["memory", "cpu"].into_iter().filter_map(|name| Some(home(&groups, name).ok()?.0));
    for folder in homes.filter_map(|home| fs::read_dir(home).ok()).flatten().flatten() {
        let name = folder.file_name();
        let name = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        let maker = name.and_then(|name| name.split('-').next()?.parse::<u32>().ok());
        let is_gone = |pid: u32| !root.join(format!("proc/{pid}")).exists();
        if maker.is_some_and(is_gone) {
            // Somebody may still be in it.
            let _busy = fs::remove_dir(folder.path());
        }
    }
}

/// Our group in the hierarchy that has a controller, and whether that is version 2.
fn home(groups: &Groups, controller: &str) -> io::Result<(PathBuf, bool)> {
    let own = groups.folders(None).next().map(|folder| match folder.file_name() {
        // Where this process was before it moved.
        Some(name) if is_own(&name.to_string_lossy()) => {
            folder.parent().unwrap_or(&folder).to_owned()
        }
        _ => folder,
    });
    let has = |folder: &PathBuf| {
        let text = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
        text.split_ascii_whitespace().any(|name| name == controller)
    };
    if let Some(folder) = own.filter(has) {
        return Ok((folder, true));
    }
    match groups.folders(Some(controller)).next() {
        Some(folder) => Ok((folder, false)),
        None => Err(unsupported(format!(
            "no control group hierarchy here has the controller {controller:?}"
        ))),
    }
}

fn is_own(name: &str) -> bool {
    name.starts_with(PREFIX) && name.ends_with(OWN)
}

/// Lets groups below `parent` have the controller (version 2).
fn delegate(parent: &Path, controller: &str) -> io::Result<()> {
    let file = parent.join("cgroup.subtree_control");
    let text = fs::read_to_string(&file).unwrap_or_default();
    if text.split_ascii_whitespace().any(|name| name == controller) {
        return Ok(());
    }
    let enable = || fs::write(&file, format!("+{controller}"));
    match enable() {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            step_aside(parent)?;
            enable().map_err(|error| named("write", &file, error))
        }
        other => other.map_err(|error| named("write", &file, error)),
    }
}

/// Moves this process into a group of its own, if it is the only one in `parent`.
fn step_aside(parent: &Path) -> io::Result<()> {
    let me = rustix::process::getpid().as_raw_nonzero();
    let procs = parent.join("cgroup.procs");
    let text = fs::read_to_string(&procs).map_err(|error| named("read", &procs, error))?;
    if text.lines().any(|line| line.trim() != me.to_string()) {
        let text = format!(
            "{} has other processes than this one, so that groups below it cannot have limits; run it as a service \
             with Delegate=yes, or in a group of its own",
            parent.display()
        );
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
    }
    let own = parent.join(format!("{PREFIX}{me}{OWN}"));
    match fs::create_dir(&own) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(named("make", &own, error));
        }
        _ => {}
    }
    let door = own.join("cgroup.procs");
    fs::write(&door, me.to_string()).map_err(|error| named("write", &door, error))
}

fn named(verb: &str, path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {verb} {}: {error}", path.display()))
}

fn unsupported(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, text)
}

/// Makes the kernel choose this process rather than ours when memory is short, by so many thousandths of all memory.
///
/// # Errors
///
/// Those of open(2) and write(2): the process is gone, or another user's.
pub fn prefer_as_oom_victim(pid: Pid, by: i32) -> io::Result<()> {
    let own = fs::read_to_string("/proc/self/oom_score_adj")?;
    let own: i32 = own.trim().parse().map_err(|_| io::Error::other("no number"))?;
    let score = own.saturating_add(by).min(1000);
    fs::write(format!("/proc/{}/oom_score_adj", pid.as_raw_nonzero()), score.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2_MOUNT: &str = "31 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1_MOUNTS: &str = "\
        32 31 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
        33 31 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
    const BOTH: Limits = Limits { memory: Some(1 << 20), cpus: Some(0.5) };

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn read(root: &tempfile::TempDir, path: &str) -> String {
        let me = std::process::id();
        let path = path.replace("ME", &me.to_string());
        fs::read_to_string(root.path().join(&path)).expect(&path)
    }

    #[test]
    fn version_2_gets_one_folder_with_both_limits() {
        let root = machine(&[
            ("proc/self/cgroup", "0::/app\n"),
            ("proc/self/mountinfo", V2_MOUNT),
            ("sys/fs/cgroup/app/cgroup.controllers", "cpu io memory pids\n"),
            ("sys/fs/cgroup/app/cgroup.subtree_control", "memory\n"),
        ]);
        let group = LimitGroup::create_at(root.path(), "w1", &BOTH).unwrap();
        let folder = "sys/fs/cgroup/app/polyfork-ME-w1";
        assert_eq!(read(&root, &format!("{folder}/memory.max")), "1048576");
        assert_eq!(read(&root, &format!("{folder}/cpu.max")), "50000 100000");
        assert_eq!(read(&root, "sys/fs/cgroup/app/cgroup.subtree_control"), "+cpu");
        assert_eq!(group.folders.len(), 1);
        fs::write(group.folders[0].join("memory.events"), "oom 1\noom_kill 2\n").unwrap();
        assert_eq!(group.oom_kills(), Some(2));
    }

    #[test]
    fn who_has_moved_aside_still_makes_groups_where_it_was() {
        let root = machine(&[
            ("proc/self/cgroup", "0::/app/polyfork-7-primary\n"),
            ("proc/self/mountinfo", V2_MOUNT),
            ("sys/fs/cgroup/app/cgroup.controllers", "cpu memory\n"),
            ("sys/fs/cgroup/app/cgroup.subtree_control", "cpu memory\n"),
        ]);
        LimitGroup::create_at(root.path(), "w1", &BOTH).map(std::mem::forget).unwrap();
        assert_eq!(read(&root, "sys/fs/cgroup/app/polyfork-ME-w1/memory.max"), "1048576");
    }

    #[test]
    fn version_1_gets_a_folder_for_each_controller() {
        let root = machine(&[
            ("proc/self/cgroup", "4:cpu:/a\n3:memory:/b\n0::/\n"),
            ("proc/self/mountinfo", V1_MOUNTS),
            ("sys/fs/cgroup/cpu/a/x", ""),
            ("sys/fs/cgroup/memory/b/x", ""),
        ]);
        let group = LimitGroup::create_at(root.path(), "w1", &BOTH).unwrap();
        let (cpu, memory) = ("sys/fs/cgroup/cpu/a", "sys/fs/cgroup/memory/b");
        assert_eq!(
            read(&root, &format!("{memory}/polyfork-ME-w1/memory.limit_in_bytes")),
            "1048576"
        );
        assert_eq!(read(&root, &format!("{cpu}/polyfork-ME-w1/cpu.cfs_quota_us")), "50000");
        assert_eq!(group.folders.len(), 2);
    }

    #[test]
    fn a_machine_without_the_controller_says_so() {
        let root = machine(&[("proc/self/cgroup", "0::/\n"), ("proc/self/mountinfo", V2_MOUNT)]);
        let error = LimitGroup::create_at(root.path(), "w1", &BOTH).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        assert!(error.to_string().contains("memory"), "{error}");
    }

    #[test]
    fn a_group_that_cannot_be_made_names_its_path() {
        let root = machine(&[
            ("proc/self/cgroup", "3:memory:/missing\n"),
            ("proc/self/mountinfo", V1_MOUNTS),
        ]);
        let limits = Limits { memory: Some(1), cpus: None };
        let error = LimitGroup::create_at(root.path(), "w1", &limits).unwrap_err();
        assert!(error.to_string().contains("cgroup/memory/missing/polyfork-"), "{error}");
    }

    #[test]
    fn what_the_dead_left_behind_is_removed_and_nothing_else() {
        let root = machine(&[
            ("proc/self/cgroup", "3:memory:/\n"),
            ("proc/self/mountinfo", V1_MOUNTS),
            ("proc/12/x", ""),
        ]);
        let home = root.path().join("sys/fs/cgroup/memory");
        for name in ["polyfork-11-w1", "polyfork-12-w1", "other-11-w1", "polyfork-x"] {
            fs::create_dir_all(home.join(name)).unwrap();
        }
        sweep_at(root.path());
        let mut left: Vec<_> =
            fs::read_dir(home).unwrap().flatten().map(|entry| entry.file_name()).collect();
        left.sort();
        assert_eq!(left, ["other-11-w1", "polyfork-12-w1", "polyfork-x"]);
    }
}
