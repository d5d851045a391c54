//! An app in the background that is upgraded, and what can be seen of its primary from outside.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::desk::{Desk, eventually, read};
use super::support::{Ended, skip};

/// One app, and where it answers.
pub(crate) struct App {
    pub(crate) desk: Desk,
    pub(crate) name: String,
    pub(crate) pid: u64,
    pub(crate) address: SocketAddr,
}

impl App {
    pub(crate) fn start(args: &[&str]) -> App {
        App::start_on(Desk::new(), args)
    }

    pub(crate) fn start_on(mut desk: Desk, args: &[&str]) -> App {
        let app = desk.start(args);
        let pid = app["pid"].as_u64().expect("a pid");
        let name = app["name"].as_str().expect("a name").to_owned();
        let address = Desk::address(&app);
        App { desk, name, pid, address }
    }

    /// Upgrades to the binary under test, which must work; what it tells.
    pub(crate) fn upgrade(&self) -> Value {
        let before = self.status();
        let told = self.desk.json(&["upgrade", "--json", &self.name]);
        let after = self.status();
        assert_eq!(workers(&before), workers(&after), "workers notice nothing");
        assert_eq!((&before["pid"], &before["started"]), (&after["pid"], &after["started"]));
        told["result"].clone()
    }

    /// Tries to upgrade to a file.
    pub(crate) fn try_upgrade(&self, binary: &Path, more: &[&str]) -> Ended {
        let binary = binary.to_str().expect("a path");
        let args = [&["upgrade", &self.name, "--binary", binary], more].concat();
        self.desk.does(&args)
    }

    /// ... which must be refused, with nothing changed; why.
    pub(crate) fn refuses(&self, binary: &Path, more: &[&str]) -> String {
        let before = (self.image(), self.descriptors(), workers(&self.status()));
        let done = self.try_upgrade(binary, more);
        assert_eq!(done.code, Some(13), "{done:?}");
        assert!(done.err.contains("nothing has changed"), "{done:?}");
        assert_eq!(before.0, self.image(), "the same image runs");
        // What is open for a moment only: a client that is just leaving, a file that gets a line.
        let brief = ["socket:", "primary.log", "state.json"];
        let differ = || {
            let now = self.descriptors();
            // Its own log is opened by the first line that an image writes, and stays open.
            let first_line = |target: &str, count| target.ends_with("primary.log") && count == 1;
            let more = now.iter().filter(|(target, count)| {
                before.1.get(*target) < Some(count) && !first_line(target, **count)
            });
            let less = before.1.iter().filter(|(target, _)| {
                !brief.iter().any(|part| target.contains(part)) && !now.contains_key(*target)
            });
            more.chain(less).map(|(target, count)| (target.clone(), *count)).collect::<Vec<_>>()
        };
        eventually("the same descriptors", differ, Vec::is_empty);
        assert_eq!(before.2, workers(&self.status()));
        done.err
    }

    /// A primary on a busy machine may take longer than the command waits for an answer.
    pub(crate) fn status(&self) -> Value {
        let ask = || self.desk.does(&["status", "--json", &self.name]);
        let done = eventually("a status", ask, |done| done.code != Some(12));
        assert_eq!(done.code, Some(0), "{done:?}");
        read(&done.out)
    }

    /// By when the process image began: it changes with each exec.
    pub(crate) fn image(&self) -> String {
        // The start of the stack is another one in each image.
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).expect("stat");
        let rest = stat.rsplit(')').next().expect("fields").to_owned();
        rest.split_whitespace().nth(25).expect("start of the stack").to_owned()
    }

    /// What is open in the primary, by kind; numbers of sockets and files count as they are.
    pub(crate) fn descriptors(&self) -> BTreeMap<String, usize> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{}/fd", self.pid)).expect("fd").flatten() {
            if let Ok(target) = fs::read_link(entry.path()) {
                let target = target.to_string_lossy().into_owned();
                // Made anew in each image.
                *found.entry(target).or_default() += 1;
            }
        }
        found
    }

    /// The descriptors of a kind that has an inode of its own.
    pub(crate) fn inodes(&self, kind: &str) -> Vec<String> {
        self.descriptors().into_keys().filter(|target| target.starts_with(kind)).collect()
    }

    /// What its primary has said.
    pub(crate) fn says(&self) -> String {
        let log = self.desk.logs().join(&self.name).join("primary.log");
        fs::read_to_string(log).unwrap_or_default()
    }
}

/// Who works: slot, worker, process and how often restarted.
pub(crate) fn workers(status: &Value) -> Vec<(u64, u64, u64, u64)> {
    let workers = status["workers"].as_array().expect("workers");
    let number = |worker: &Value, field: &str| worker[field].as_u64().unwrap_or(0);
    let one = |worker: &Value| {
        let of = |field| number(worker, field);
        (of("slot"), of("worker"), of("pid"), of("restarts"))
    };
    workers.iter().map(one).collect()
}

/// The binary under test.
pub(crate) fn binary() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_polyfork"))
}

/// A copy of it in a folder.
pub(crate) fn copy_to(folder: &Path) -> PathBuf {
    let copy = folder.join("polyfork-copy");
    fs::copy(binary(), &copy).expect("a copy");
    copy
}

/// A program in C; `None`, told as a skip, without a compiler.
pub(crate) fn program(test: &str, folder: &Path, source: &str) -> Option<PathBuf> {
    let (from, to) = (folder.join("program.c"), folder.join("program"));
    fs::write(&from, source).expect("a source");
    let mut cc = super::support::command("cc");
    let built = cc.arg("-o").arg(&to).arg(&from).status();
    match built {
        Ok(status) if status.success() => Some(to),
        _ => {
            skip(test, "no C compiler");
            None
        }
    }
}

/// A line of JSON.
pub(crate) fn json(done: &Ended) -> Value {
    read(&done.out)
}
