//! `doctor`, and what happens on machines where something is missing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;

use super::desk::{Desk, is_over, pidfd, read, signal};
use super::support::{Ended, Events, Place, command, ended, get, skip};

fn check<'a>(report: &'a Value, id: &str) -> &'a Value {
    let checks = report["checks"].as_array().expect("checks");
    checks.iter().find(|check| check["id"] == id).unwrap_or_else(|| panic!("no {id}: {report:#}"))
}

#[test]
fn doctor_looks_at_everything_and_says_what_to_do() {
    let desk = Desk::new();
    let done = desk.does(&["doctor", "--json"]);
    let report = read(&done.out);
    assert_eq!(report["version"], 1);
    for id in [
        "kernel",
        "mechanism",
        "pidfd",
        "memfd",
        "proc",
        "cgroup",
        "cpus",
        "open_files",
        "backlog",
        "handshakes",
        "local_ports",
        "low_ports",
        "ipv6",
        "clock",
        "confinement",
        "runtime",
        "home",
        "runtime_folder",
        "logs",
        "preload",
    ] {
        let check = check(&report, id);
        assert_eq!(check["level"] == "ok", check.get("next").is_none(), "{check}");
    }
    let fails = report["checks"].as_array().unwrap().iter().any(|check| check["level"] == "fail");
    assert_eq!(done.code, Some(i32::from(fails)), "{done:?}");
    let shown = desk.does(&["doctor"]);
    assert!(shown.out.contains("kernel") && shown.out.contains("node v"), "{}", shown.out);
}

#[test]
fn doctor_knows_of_control_groups_what_workers_get() {
    let place = Place::with_server();
    let report = read(&place.ends(["doctor", "--json"]).out);
    let text = check(&report, "cgroup")["text"].as_str().expect("a text").to_owned();
    if !text.contains("groups for workers can be made") {
        skip("doctor_knows_of_control_groups_what_workers_get", &text);
        return;
    }
    let mut app = place.events(["-w", "1", "--cgroup-memory", "200MiB", "server.js"]);
    let worker = app.wait_for("fork")["pid"].as_u64().expect("a pid");
    app.wait_for("ready");
    let version = if text.starts_with("version 1, /") { 1 } else { 2 };
    let groups = fs::read_to_string(format!("/proc/{worker}/cgroup")).expect("its groups");
    let of_memory = |line: &&str| match version {
        1 => line.split(':').nth(1).is_some_and(|list| list.split(',').any(|one| one == "memory")),
        _ => line.starts_with("0::"),
    };
    let group = groups.lines().find(of_memory).expect("a group");
    assert!(group.contains("/polyfork-"), "{text}: {groups}");
    app.running.signal(Signal::TERM);
    assert_eq!(app.end().0, 0);
}

#[test]
fn doctor_tells_of_apps_that_were_killed() {
    let mut desk = Desk::new();
    let app = desk.start(&["-w", "1", "server.js"]);
    let primary = pidfd(app["pid"].as_u64().unwrap());
    signal(&primary, Signal::KILL);
    assert!(is_over(&primary));
    let report = desk.json(&["doctor", "--json"]);
    let dead = check(&report, "ended_apps");
    assert_eq!(dead["level"], "warn");
    assert!(dead["next"].as_str().unwrap().contains("polyfork stop server"), "{dead}");
    desk.did(&["stop", "server"]);
    let report = desk.json(&["doctor", "--json"]);
    assert!(!report.to_string().contains("ended_apps"), "{report}");
}

#[test]
fn doctor_fails_when_apps_cannot_run() {
    let desk = Desk::new();
    fs::create_dir(desk.runtime()).unwrap();
    fs::set_permissions(desk.runtime(), fs::Permissions::from_mode(0o777)).unwrap();
    let done = desk.does(&["doctor", "--json"]);
    assert_eq!(done.code, Some(1), "{done:?}");
    let report = read(&done.out);
    assert_eq!(report["worst"], "fail");
    let check = check(&report, "runtime_folder");
    assert!(check["text"].as_str().unwrap().contains("chmod 700"), "{check}");
}

#[test]
fn doctor_runs_a_runtime_that_hangs_no_longer_than_its_limit_and_says_so() {
    let desk = Desk::new();
    let bin = desk.place.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let bad = desk.place.file("bin/bun", "#!/bin/sh\nexit 3\n");
    fs::set_permissions(&bad, fs::Permissions::from_mode(0o755)).unwrap();
    let mut doctor = desk.command(&["doctor", "--json"]);
    doctor.env("PATH", &bin);
    let report = read(&ended(doctor).out);
    let check = check(&report, "runtime");
    assert_eq!(check["level"], "warn");
    assert!(check["text"].as_str().unwrap().contains("bun is there"), "{check}");
}

/// Runs a line of shell as root of a mount namespace of its own.
fn apart(place: &Place, flags: &[&str], script: &str, args: &[&str]) -> Command {
    let polyfork = place.polyfork(args);
    let mut command = command("unshare");
    command.args(flags).args(["--", "sh", "-c", script, "sh"]);
    command.arg(polyfork.get_program()).args(polyfork.get_args()).current_dir(place.path());
    for (key, value) in polyfork.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    command
}

fn may_unshare(test: &str, flags: &[&str]) -> bool {
    let mut probe = command("unshare");
    probe.args(flags).arg("true");
    let may = ended(probe).code == Some(0);
    if !may {
        skip(test, "may not make a namespace");
    }
    may
}

fn serves_and_stops(mut cluster: Events) -> Events {
    let address = cluster.address();
    cluster.wait_for("ready");
    assert!(get(address, "/").contains("slot"));
    cluster.running.signal(Signal::TERM);
    assert_eq!(cluster.end().0, 0);
    cluster
}

#[test]
fn fault_131_a_read_only_root_and_no_home() {
    let test = "fault_131_a_read_only_root_and_no_home";
    if !may_unshare(test, &["--mount"]) {
        return;
    }
    let place = Place::with_server();
    // Everything below the root that was writable is not any more; nobody says where home is.
    let script = "for at in / /tmp /run /root /var; do
                    mount --bind $at $at && mount -o remount,ro,bind $at || true
                  done 2>/dev/null
                  exec \"$@\"";
    let without = |command: &mut Command| {
        for name in ["HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"] {
            command.env_remove(name);
        }
    };
    let mut run = apart(&place, &["--mount"], script, &["run", "--json", "-w", "1", "server.js"]);
    without(&mut run);
    let cluster = serves_and_stops(Events::of(run));
    let told = cluster.seen.iter().map(Value::to_string).collect::<String>();
    assert!(told.contains("Read-only file system"), "it says what is missing: {told}");
    assert!(told.contains("no command can reach this one"), "{told}");
    // In the background there has to be a place.
    let mut start = apart(&place, &["--mount"], script, &["start", "-w", "1", "server.js"]);
    without(&mut start);
    let refused = ended(start);
    assert_eq!(refused.code, Some(14), "{refused:?}");
    let mut doctor = apart(&place, &["--mount"], script, &["doctor", "--json"]);
    without(&mut doctor);
    let report = read(&ended(doctor).out);
    for id in ["home", "runtime_folder", "logs", "preload"] {
        assert_ne!(check(&report, id)["level"], "ok", "{report:#}");
    }
}

#[test]
fn fault_131_without_proc() {
    let test = "fault_131_without_proc";
    if !may_unshare(test, &["--mount"]) {
        return;
    }
    let place = Place::with_server();
    let script = "mount -t tmpfs none /proc && exec \"$@\"";
    let args = ["run", "--json", "-w", "1", "server.js"];
    let cluster = serves_and_stops(Events::of(apart(&place, &["--mount"], script, &args)));
    let told = cluster.seen.iter().map(Value::to_string).collect::<String>();
    println!("{told}");
    let report = read(&ended(apart(&place, &["--mount"], script, &["doctor", "--json"])).out);
    assert_eq!(check(&report, "proc")["level"], "warn");
    assert!(check(&report, "proc")["next"].as_str().unwrap().contains("mount /proc"));
}

#[test]
fn fault_132_without_ipv6() {
    let test = "fault_132_without_ipv6";
    if !may_unshare(test, &["--net"]) {
        return;
    }
    let place = Place::new();
    place.file("app.js", &super::support::SERVER.replace(", '127.0.0.1'", ""));
    let script = "ip link set lo up 2>/dev/null
                  for f in all default lo; do echo 1 > /proc/sys/net/ipv6/conf/$f/disable_ipv6; done
                  exec \"$@\"";
    // Where nothing is said, IPv4 it is.
    let args = ["run", "--json", "-w", "1", "app.js"];
    let mut cluster = Events::of(apart(&place, &["--net"], script, &args));
    let bound = cluster.wait_for("bound");
    cluster.wait_for("ready");
    println!("{bound}");
    cluster.running.signal(Signal::TERM);
    assert_eq!(cluster.end().0, 0);
    // Where IPv6 is said, it is an error with what to do.
    let args = ["run", "--listen", "[::1]:0", "--", "sh", "-c", "exec sleep 600"];
    let refused = ended(apart(&place, &["--net"], script, &args));
    assert_eq!(refused.code, Some(6), "{refused:?}");
    assert!(refused.err.contains("[::1]:0"), "{}", refused.err);
    let report = read(&ended(apart(&place, &["--net"], script, &["doctor", "--json"])).out);
    assert_eq!(check(&report, "ipv6")["level"], "warn", "{report:#}");
}

fn as_nobody(place: &Place, args: &[&str]) -> Ended {
    let polyfork = place.polyfork(args);
    let mut other = command("setpriv");
    other.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    other.arg(polyfork.get_program()).args(polyfork.get_args()).current_dir(place.path());
    for (key, value) in polyfork.get_envs() {
        match value {
            Some(value) => other.env(key, value),
            None => other.env_remove(key),
        };
    }
    ended(other)
}

#[test]
fn fault_132_a_low_port_without_the_right_and_unix_paths_that_cannot_be() {
    let test = "fault_132_a_low_port_without_the_right_and_unix_paths_that_cannot_be";
    let place = Place::new();
    let idle = ["--", "sh", "-c", "exec sleep 600"];
    let run = |listen: &str| {
        as_nobody(&place, &[&["run", "--no-control", "--listen", listen], &idle[..]].concat())
    };
    let low = run("127.0.0.1:81");
    if low.err.contains("setpriv") {
        return skip(test, "may not become another user");
    }
    if fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        .is_ok_and(|p| p.trim() == "0")
    {
        return skip(test, "every port may be bound here");
    }
    assert_eq!(low.code, Some(6), "{low:?}");
    assert!(low.err.contains("127.0.0.1:81") && low.err.contains("1024"), "{}", low.err);
    for (path, part) in [
        ("unix:/etc/x.sock", "/etc/x.sock"),
        ("unix:/nowhere/at/all.sock", "/nowhere/at/all.sock"),
        (&*format!("unix:/tmp/{}", "x".repeat(120)), "107"),
    ] {
        let told = run(path);
        assert!(matches!(told.code, Some(2 | 6)), "{path}: {told:?}");
        assert!(told.err.contains(part) && told.err.lines().count() <= 3, "{path}: {}", told.err);
    }
}

/// Each call fails as if the kernel did not know it.
#[test]
fn fault_133_calls_that_the_kernel_does_not_know() {
    let test = "fault_133_calls_that_the_kernel_does_not_know";
    if command("strace").arg("-V").output().is_err() {
        return skip(test, "needs strace");
    }
    let place = Place::with_server();
    let with = |calls: &str, args: &[&str]| {
        let polyfork = place.polyfork(args);
        let mut trace = command("strace");
        // Only the primary: what is asked is what it does.
        trace.args(["-o", "/dev/null", "-e", &format!("inject={calls}:error=ENOSYS")]);
        trace.arg(polyfork.get_program()).args(polyfork.get_args()).current_dir(place.path());
        for (key, value) in polyfork.get_envs() {
            match value {
                Some(value) => trace.env(key, value),
                None => trace.env_remove(key),
            };
        }
        trace
    };
    let probe = ended(with("getcpu", &["ls"]));
    if probe.code != Some(0) {
        return skip(test, "strace may not trace here");
    }
    // Not needed for this: it serves.
    for calls in ["clone3", "memfd_create", "clone3,memfd_create,bpf", "pidfd_getfd", "close_range"]
    {
        let mut cluster = Events::of(with(calls, &["run", "--json", "-w", "1", "server.js"]));
        let address = cluster.address();
        cluster.wait_for("ready");
        assert!(get(address, "/").contains("slot"), "{calls}");
        let primary = cluster.seen[0]["pid"].as_u64().expect("a pid");
        signal(&pidfd(primary), Signal::TERM);
        assert_eq!(cluster.end().0, 0, "{calls}");
    }
    let report = read(&ended(with("memfd_create,bpf,pidfd_open", &["doctor", "--json"])).out);
    assert_eq!(check(&report, "memfd")["level"], "warn");
    assert_eq!(check(&report, "mechanism")["level"], "warn");
    assert_eq!(check(&report, "pidfd")["level"], "fail");
}
