//! Memory that runs out: for one worker, by its own control group, and for the whole tree.

use std::fs;
use std::path::{Path, PathBuf};

use super::support::{Events, Place, get, skip};

const SERVER: &str = "
    const keep = [];
    require('http').createServer((request, response) => {
        if (request.url === '/grow') for (;;) keep.push(Buffer.alloc(8 << 20, 1));
        response.end(String(process.pid));
    }).listen(0, '127.0.0.1');";

/// Where this process may make memory groups, and what the limit's file is called there.
fn home() -> Option<(PathBuf, &'static str)> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let old = groups.lines().find_map(|line| line.split_once(":memory:"));
    let (home, file) = match old {
        Some((_, path)) => (format!("/sys/fs/cgroup/memory{path}"), "memory.limit_in_bytes"),
        None => {
            let own = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
            (format!("/sys/fs/cgroup{own}"), "memory.max")
        }
    };
    let home = PathBuf::from(home);
    let tried = home.join(format!("polyfork-test-{}", std::process::id()));
    fs::create_dir(&tried).ok()?;
    let works = tried.join(file).exists();
    fs::remove_dir(&tried).ok()?;
    works.then_some((home, file))
}

/// Folders of groups that a process made.
fn groups_of(home: &Path, pid: u32) -> usize {
    let name = format!("polyfork-{pid}-");
    let entries = fs::read_dir(home).expect("the home of groups").flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&name)).count()
}

fn grow(address: std::net::SocketAddr) {
    // The worker dies under it.
    let asked =
        std::thread::spawn(move || drop(std::panic::catch_unwind(|| get(address, "/grow"))));
    drop(asked);
}

#[test]
fn fault_51_a_worker_beyond_its_control_group_is_told_as_out_of_memory() {
    let test = "fault_51_a_worker_beyond_its_control_group_is_told_as_out_of_memory";
    let Some((home, _)) = home() else { return skip(test, "no right to make memory groups") };
    let place = Place::new();
    place.file("app.js", SERVER);
    let words = ["-w", "2", "--cgroup-memory", "150MiB", "--cgroup-cpu", "1.5", "app.js"];
    let mut events = place.events(words);
    let address = events.address();
    events.wait_for("ready");
    let primary = events.running.pid();
    assert_eq!(groups_of(&home, primary), 2);
    grow(address);
    let exit = events.wait_for("exit");
    assert_eq!((&exit["reason"], &exit["signal"]), (&"out_of_memory".into(), &"SIGKILL".into()));
    events.wait_for("ready");
    let exits = events.seen.iter().filter(|event| event["event"] == "exit").count();
    assert_eq!(exits, 1, "nobody else: {:#?}", events.seen);
    assert_eq!(groups_of(&home, primary), 2);
    events.running.signal(rustix::process::Signal::TERM);
    assert_eq!(events.end().0, 0);
    assert_eq!(groups_of(&home, primary), 0, "left behind");
}

#[test]
fn a_control_group_is_still_its_workers_after_an_upgrade() {
    let test = "a_control_group_is_still_its_workers_after_an_upgrade";
    let Some((home, _)) = home() else { return skip(test, "no right to make memory groups") };
    let place = Place::new();
    place.file("app.js", SERVER);
    let mut events = place.events(["-w", "2", "--cgroup-memory", "150MiB", "app.js"]);
    let address = events.address();
    events.wait_for("ready");
    let primary = events.running.pid();
    events.running.signal(rustix::process::Signal::USR2);
    events.wait_until("notice", |notice| notice["code"] == "upgraded");
    assert_eq!(groups_of(&home, primary), 2);
    grow(address);
    assert_eq!(events.wait_for("exit")["reason"], "out_of_memory");
    events.wait_for("ready");
    assert_eq!(groups_of(&home, primary), 2);
    events.running.signal(rustix::process::Signal::TERM);
    assert_eq!(events.end().0, 0);
    assert_eq!(groups_of(&home, primary), 0, "left behind");
}

#[test]
fn fault_52_the_primary_survives_when_the_whole_tree_is_out_of_memory() {
    let test = "fault_52_the_primary_survives_when_the_whole_tree_is_out_of_memory";
    let Some((home, limit)) = home() else { return skip(test, "no right to make memory groups") };
    let group = home.join(format!("polyfork-test-tree-{}", std::process::id()));
    fs::create_dir(&group).expect("a group");
    fs::write(group.join(limit), (400u64 << 20).to_string()).expect("a limit");
    let place = Place::new();
    place.file("app.js", SERVER);
    let procs = group.join("cgroup.procs");
    let inside = format!("echo $$ > {}; exec \"$0\" \"$@\"", procs.display());
    let polyfork = place.polyfork(["run", "--json", "-w", "2", "app.js"]);
    let mut command = super::support::command("sh");
    command.arg("-c").arg(inside).arg(polyfork.get_program()).args(polyfork.get_args());
    command.current_dir(place.path()).stdin(std::process::Stdio::null());
    for (key, value) in polyfork.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    let mut events = Events::of(command);
    let address = events.address();
    events.wait_for("ready");
    let (primary, worker) =
        (events.running.pid(), events.seen.iter().find(|e| e["event"] == "fork"));
    let score = |pid: u64| -> i32 {
        let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).expect("a score");
        text.trim().parse().expect("a number")
    };
    let worker = worker.and_then(|event| event["pid"].as_u64()).expect("a worker");
    assert!(score(u64::from(primary)) < score(worker));
    grow(address);
    let exit = events.wait_for("exit");
    assert_eq!(exit["reason"], "out_of_memory", "{exit}");
    events.wait_for("ready");
    assert!(!get(address, "/").is_empty());
    events.running.signal(rustix::process::Signal::TERM);
    assert_eq!(events.end().0, 0);
    drop(events);
    fs::remove_dir(&group).expect("an empty group");
}

#[test]
fn without_the_right_to_make_groups_limits_are_refused_or_left_out_as_asked() {
    let test = "without_the_right_to_make_groups_limits_are_refused_or_left_out_as_asked";
    if !rustix::process::geteuid().is_root() {
        return skip(test, "only root can become somebody without rights");
    }
    let nobody = |mode: &str| {
        let place = Place::new();
        place.file("app.js", SERVER);
        // Where everybody may execute it.
        let binary = place.path().join("polyfork");
        fs::copy(env!("CARGO_BIN_EXE_polyfork"), &binary).expect("a copy");
        let mut command = super::support::command("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(binary);
        command.args(["run", "--json", "--no-control", "-w", "1", "--cgroup-memory", "200MiB"]);
        command.args(["--cgroup", mode, "app.js"]).current_dir(place.path());
        command.env("HOME", place.path()).env_remove("XDG_CACHE_HOME");
        (Events::of(command), place)
    };
    let (mut events, place) = nobody("require");
    let error = events.wait_for("error");
    let text = error["text"].as_str().expect("a text");
    assert!(text.contains("control group") && text.contains("cannot"), "{text}");
    drop((events, place));
    let (mut events, place) = nobody("auto");
    let notice = events.wait_until("notice", |notice| notice["code"] == "cgroup");
    assert!(
        notice["text"].as_str().is_some_and(|t| t.contains("without these limits")),
        "{notice}"
    );
    events.wait_for("ready");
    events.running.signal(rustix::process::Signal::TERM);
    assert_eq!(events.end().0, 0);
    drop(place);
}
