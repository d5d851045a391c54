//! Control groups of workers: one each, with limits that the kernel enforces.
//!
//! The folders are made and removed in `polyfork_sys::system`; here is which worker gets one, and what becomes of those that
//! cannot be removed yet because something that a worker started is still in it.
//!
//! The rule that surprises: whether limits can be had at all is tried at the start, with a group that is removed again, so
//! that a missing right is told before anything runs and not by every worker that cannot be started.
//!
//! Reference: cgroups(7).

use std::io;
use std::path::PathBuf;

use polyfork_core::WorkerId;
use polyfork_sys::system::{LimitGroup, Limits, limits_folder, sweep};

use super::StartError;
use super::primary::Primary;
use super::settings::{CgroupLimits, Settings};

/// So many groups that could not be removed are remembered.
const LEFT: usize = 256;

/// Where control groups of workers are made, and of which version they are; nothing where the kernel enforces no limits.
pub fn cgroup_folder() -> Option<(PathBuf, u32)> {
    let (folder, is_v2) = limits_folder().ok()?;
    Some((folder, if is_v2 { 2 } else { 1 }))
}

/// The group of one worker, if workers are to have one.
pub(crate) fn of_worker(settings: &Settings, worker: WorkerId) -> io::Result<Option<LimitGroup>> {
    let Some(limits) = &settings.cgroup else { return Ok(None) };
    match make(&format!("w{}", worker.0), limits) {
        // Told at the start.
        Err(_) if limits.optional => Ok(None),
        made => made.map(Some),
    }
}

fn make(name: &str, limits: &CgroupLimits) -> io::Result<LimitGroup> {
    LimitGroup::create(name, &Limits { memory: limits.memory, cpus: limits.cpus })
}

/// Takes limits out of the settings that cannot be had and need not; gives what to tell about it.
pub(crate) fn settle(settings: &mut Settings) -> Result<Option<String>, StartError> {
    let Some(limits) = settings.cgroup else { return Ok(None) };
    if limits.cpus.is_some_and(|cpus| !(cpus.is_finite() && cpus > 0.0)) {
        let text = "the CPU limit of a control group must be above 0".to_owned();
        return Err(StartError::Settings(text));
    }
    sweep();
    let tried = make("try", &limits).and_then(|group| group.doors().map(drop));
    let Err(error) = tried else { return Ok(None) };
    let text = format!("workers cannot have control groups: {error}");
    if !limits.optional {
        let next = "run as root, or as a service with Delegate=yes; or make the limits optional";
        return Err(StartError::Settings(format!("{text}; {next}")));
    }
    settings.cgroup = None;
    Ok(Some(format!("{text}; they run without these limits")))
}

/// A group as it is carried to the next image of the primary: the processes in it stay.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct GroupState {
    folders: Vec<PathBuf>,
    counts: Option<PathBuf>,
}

impl GroupState {
    pub(crate) fn of(group: &LimitGroup) -> GroupState {
        let (folders, counts) = group.parts();
        GroupState { folders: folders.to_vec(), counts: counts.map(ToOwned::to_owned) }
    }

    pub(crate) fn back(self) -> LimitGroup {
        LimitGroup::from_parts(self.folders, self.counts)
    }
}

impl Primary {
    /// A worker is gone: so is its group, unless something it has started lives on.
    pub(crate) fn give_up_group(&mut self, group: Option<LimitGroup>) {
        self.groups_left.extend(group);
        self.groups_left.retain(|group| group.remove().is_err());
        if self.groups_left.len() > LEFT {
            // The next start sweeps it away.
            self.groups_left.remove(0);
        }
    }
}
