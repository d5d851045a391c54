//! CPU and memory limits from control groups, both hierarchies.
//!
//! `/proc/self/cgroup` names our group per hierarchy, `/proc/self/mountinfo` where each hierarchy is
//! mounted and which part of it. A limit holds for all below, so the walk goes up to the mount point.
//! In a container the mount may show only our part of the tree (its root field then is a prefix of
//! our path), and limits above are invisible: that is as far as anyone can look.
//!
//! All files are found below a root folder that tests can choose. What is missing or makes no sense is no limit.
//!
//! Behaviour follows: cgroups(7), proc(5), kernel admin-guide cgroup-v2 (`cpu.max`), cgroup-v1 (`cpu.cfs_quota_us`).

use std::fs;
use std::path::{Component, Path, PathBuf};

/// A limit and where it stands.
#[derive(Debug, PartialEq)]
pub(super) struct Quota {
    pub(super) cpus: f64,
    pub(super) source: String,
}

/// The strictest CPU limit over our groups, in processors.
pub(super) fn cpu_quota(root: &Path) -> Option<Quota> {
    let groups = Groups::read(root)?;
    let mut strictest: Option<Quota> = None;
    let v2 = groups.folders(None).map(|folder| (folder.join("cpu.max"), cpu_max(&folder)));
    let v1 = groups.folders(Some("cpu"));
    let v1 = v1.map(|folder| (folder.join("cpu.cfs_quota_us"), cfs_quota(&folder)));
    for (file, cpus) in v2.chain(v1) {
        let Some(cpus) = cpus else { continue };
        if strictest.as_ref().is_none_or(|quota| cpus < quota.cpus) {
            let shown = file.strip_prefix(root).unwrap_or(&file);
            strictest = Some(Quota { cpus, source: format!("/{}", shown.display()) });
        }
    }
    strictest
}

/// OOM kills counted in our own group.
pub(super) fn oom_kills(root: &Path) -> Option<u64> {
    let groups = Groups::read(root)?;
    let v2 = groups.folders(None).next().map(|folder| folder.join("memory.events"));
    let v1 = groups.folders(Some("memory")).next().map(|folder| folder.join("memory.oom_control"));
    [v2, v1].into_iter().flatten().find_map(|file| counter(&file, "oom_kill"))
}

/// The bytes that our groups, and those above them, still have room for, the least of all. What the kernel can
/// take back (cached files) counts as room.
pub(super) fn memory_room(root: &Path) -> Option<u64> {
    let groups = Groups::read(root)?;
    let v2 = groups.folders(None).filter_map(|folder| {
        room_in(&folder, ["memory.max", "memory.current"], ["inactive_file", "active_file"])
    });
    let v1 = groups.folders(Some("memory")).filter_map(|folder| {
        let files = ["memory.limit_in_bytes", "memory.usage_in_bytes"];
        room_in(&folder, files, ["total_inactive_file", "total_active_file"])
    });
    v2.chain(v1).min()
}

fn room_in(folder: &Path, [limit, used]: [&str; 2], cached: [&str; 2]) -> Option<u64> {
    let number = |name| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    // "max" is no number, and no limit.
    let limit = number(limit)?;
    let stat = folder.join("memory.stat");
    let cached = cached.iter().filter_map(|key| counter(&stat, key)).sum();
    Some(limit.saturating_sub(number(used)?.saturating_sub(cached)))
}

/// Our own group's folder in the unified hierarchy.
pub(crate) fn own_unified_folder(root: &Path) -> Option<PathBuf> {
    Groups::read(root)?.folders(None).next()
}

/// `"150000 100000"` or `"max 100000"`.
fn cpu_max(folder: &Path) -> Option<f64> {
    let text = fs::read_to_string(folder.join("cpu.max")).ok()?;
    let mut fields = text.split_ascii_whitespace();
    let quota = fields.next()?.parse::<f64>().ok()?;
    ratio(quota, fields.next()?.parse::<f64>().ok()?)
}

fn cfs_quota(folder: &Path) -> Option<f64> {
    let number = |name| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<f64>().ok();
    ratio(number("cpu.cfs_quota_us")?, number("cpu.cfs_period_us")?)
}

/// -1 means no limit in v1; nothing else can be below or at zero.
fn ratio(quota: f64, period: f64) -> Option<f64> {
    let cpus = quota / period;
    (quota > 0.0 && period > 0.0 && cpus.is_finite()).then_some(cpus)
}

pub(super) fn counter(file: &Path, key: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(name, _)| *name == key)?.1.trim().parse().ok()
}

/// One hierarchy as it is mounted.
#[derive(Debug)]
struct Mount {
    /// Which part of the hierarchy the mount shows.
    part: PathBuf,
    point: PathBuf,
    /// Controllers, for v1; `None` for the unified hierarchy.
    controllers: Option<Vec<String>>,
}

#[derive(Debug)]
pub(super) struct Groups {
    root: PathBuf,
    mounts: Vec<Mount>,
    /// Controllers (none: unified) and our path in their hierarchy.
    ours: Vec<(Option<Vec<String>>, PathBuf)>,
}

impl Groups {
    pub(super) fn read(root: &Path) -> Option<Self> {
        let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
        let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).ok()?;
        Some(Self {
            root: root.to_owned(),
            mounts: mounts.lines().filter_map(mount).collect(),
            ours: groups.lines().filter_map(membership).collect(),
        })
    }

    /// Our group's folder in the hierarchy of `controller` (`None`: unified), then those above it.
    pub(super) fn folders(
        &self,
        controller: Option<&str>,
    ) -> impl Iterator<Item = PathBuf> + use<> {
        let folder = self.own_folder(controller);
        let mut next = folder.clone().map(|(path, _)| path);
        std::iter::from_fn(move || {
            let current = next.take()?;
            if folder.as_ref().is_some_and(|(_, top)| current != *top) {
                next = current.parent().map(Path::to_owned);
            }
            Some(current)
        })
    }

    /// Our group's folder and the mount point above it.
    fn own_folder(&self, controller: Option<&str>) -> Option<(PathBuf, PathBuf)> {
        let has = |list: &Option<Vec<String>>| match (controller, list) {
            (None, None) => true,
            (Some(name), Some(list)) => list.iter().any(|one| one == name),
            _ => false,
        };
        let (_, path) = self.ours.iter().find(|(list, _)| has(list))?;
        let mount = self.mounts.iter().find(|mount| has(&mount.controllers))?;
        // A path outside the mounted part (a cgroup namespace, or a bind mount) is looked up at the top.
        let inside = path.strip_prefix(&mount.part).unwrap_or(Path::new(""));
        let top = self.root.join(mount.point.strip_prefix("/").ok()?);
        let plain = inside.components().all(|part| matches!(part, Component::Normal(_)));
        Some((if plain { top.join(inside) } else { top.clone() }, top))
    }
}

/// A line of `/proc/self/cgroup`: `hierarchy:controllers:path`.
fn membership(line: &str) -> Option<(Option<Vec<String>>, PathBuf)> {
    let mut fields = line.splitn(3, ':');
    let (_id, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let list = controllers.split(',').map(str::to_owned).collect();
    Some(((!controllers.is_empty()).then_some(list), PathBuf::from(path)))
}

/// A line of `/proc/self/mountinfo`: fixed fields, optional ones, `-`, then type, source, options.
fn mount(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let mut after = after.split(' ');
    let (kind, _source, options) = (after.next()?, after.next()?, after.next()?);
    let controllers = match kind {
        "cgroup2" => None,
        "cgroup" => Some(options.split(',').map(str::to_owned).collect()),
        _ => return None,
    };
    let mut before = before.split(' ').skip(3);
    let part = unescape(before.next()?);
    Some(Mount { part, point: unescape(before.next()?), controllers })
}

/// Blanks in paths are written as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let text = text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n");
    PathBuf::from(text.replace("\\134", "\\"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2_MOUNT: &str = "31 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1_MOUNTS: &str = "\
        32 31 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
        33 31 0:29 / /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory\n";

    #[test]
    fn room_for_memory_is_the_least_of_all_groups() {
        let here = machine(&[
            ("proc/self/cgroup", "0::/a/b\n"),
            ("proc/self/mountinfo", V2_MOUNT),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/memory.max", "1000\n"),
            ("sys/fs/cgroup/a/memory.current", "900\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 1\nactive_file 300\ninactive_file 50\n"),
        ]);
        assert_eq!(memory_room(here.path()), Some(450));
        let here = machine(&[
            ("proc/self/cgroup", "4:memory:/a\n"),
            ("proc/self/mountinfo", V1_MOUNTS),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "1000\n"),
            ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "2000\n"),
        ]);
        assert_eq!(memory_room(here.path()), Some(0));
        assert_eq!(memory_room(machine(&[]).path()), None);
    }

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn the_strictest_limit_of_the_unified_hierarchy_counts() {
        let root = machine(&[
            ("proc/self/cgroup", "0::/a/b/c\n"),
            ("proc/self/mountinfo", V2_MOUNT),
            ("sys/fs/cgroup/a/cpu.max", "150000 100000\n"),
            ("sys/fs/cgroup/a/b/cpu.max", "300000 100000\n"),
            ("sys/fs/cgroup/a/b/c/cpu.max", "max 100000\n"),
        ]);
        let quota = cpu_quota(root.path()).unwrap();
        assert_eq!(quota, Quota { cpus: 1.5, source: "/sys/fs/cgroup/a/cpu.max".into() });
        let parallelism = super::super::parallelism_at(root.path(), 8);
        assert_eq!((parallelism.cpus, parallelism.affinity), (2, 8));
        assert!(parallelism.explain.contains("1.50"), "{}", parallelism.explain);
    }

    #[test]
    fn the_old_hierarchy_counts_too_and_minus_one_is_no_limit() {
        let groups = "4:cpu,cpuacct:/app\n3:memory:/app\n0::/\n";
        let files = [
            ("proc/self/cgroup", groups),
            ("proc/self/mountinfo", V1_MOUNTS),
            ("sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_quota_us", "50000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/memory/app/memory.oom_control", "oom_kill_disable 0\noom_kill 7\n"),
        ];
        let root = machine(&files);
        assert_eq!(cpu_quota(root.path()).unwrap().cpus, 0.5);
        assert_eq!(super::super::parallelism_at(root.path(), 4).cpus, 1);
        assert_eq!(oom_kills(root.path()), Some(7));
    }

    #[test]
    fn a_container_that_sees_only_its_part_finds_its_limit_at_the_mount_point() {
        let mount = "31 23 0:27 /docker/xyz /sys/fs/cgroup ro - cgroup2 cgroup rw\n";
        let root = machine(&[
            ("proc/self/cgroup", "0::/docker/xyz\n"),
            ("proc/self/mountinfo", mount),
            ("sys/fs/cgroup/cpu.max", "200000 100000\n"),
            ("sys/fs/cgroup/memory.events", "low 0\noom 3\noom_kill 2\noom_group_kill 0\n"),
        ]);
        assert_eq!(cpu_quota(root.path()).unwrap().cpus, 2.0);
        assert_eq!(oom_kills(root.path()), Some(2));
    }

    #[test]
    fn nonsense_is_no_limit() {
        for text in ["", "max", "0 0", "-5 100000", "nan 1", "1e999 1", "7"] {
            let root = machine(&[
                ("proc/self/cgroup", "0::/../..\n:\n1:x\n"),
                ("proc/self/mountinfo", V2_MOUNT),
                ("sys/fs/cgroup/cpu.max", text),
            ]);
            assert_eq!(cpu_quota(root.path()), None, "{text:?}");
            assert_eq!(super::super::parallelism_at(root.path(), 3).cpus, 3);
        }
        assert_eq!(cpu_quota(Path::new("/nonexistent")), None);
    }

    #[test]
    fn a_mount_point_with_a_blank_is_read() {
        let line = "31 23 0:27 / /my\\040groups rw shared:1 - cgroup2 x rw";
        assert_eq!(mount(line).unwrap().point, Path::new("/my groups"));
    }
}
