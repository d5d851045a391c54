//! The units under systemd itself: a manager of its own for each test, with nothing of the machine's.
//!
//! `systemd --user` runs in a process, mount and control group namespace, and knows only the units that the test wrote; it
//! ends, with all that it started, when the test lets go of it.
//!
//! Surprising: a manager of a user starts only where `/run/systemd/system` exists, so it gets a `/run` of its own.
//!
//! Source: systemd(1), systemd.service(5), sd_listen_fds(3), cgroups(7).

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::desk::{eventually, read};
use super::load::{Class, Counts, Load, count};
use super::support::{Ended, Lines, PATIENCE, Place, Running, command, ended, get, skip};

/// What a manager of a user wants to find; the real ones would start other things.
const TARGETS: [&str; 7] = ["basic", "default", "exit", "paths", "shutdown", "sockets", "timers"];

/// The first process of the namespace: what it starts ends with it.
const FIRST: &str = "
set -e
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/systemd/system
mount -t cgroup2 cgroup2 /sys/fs/cgroup
\"$SYSTEMD\" --user --log-target=console --log-level=info &
wait
";

const SERVICE: &str = "polyfork-web.service";
const PROBE: &str = "probe.service";
const SOCKET: &str = "polyfork-web.socket";

/// A manager, and what it was given to manage.
struct Systemd {
    // In this order: what runs ends before its group and its folder go.
    running: Running,
    said: Lines,
    _group: Group,
    place: Place,
}

/// A control group with all of the manager's; removed in the end.
struct Group(PathBuf);

impl Group {
    fn new() -> Option<Group> {
        let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
        let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let home = mounts.find(|mount| mount.get(2) == Some(&"cgroup2"))?[1].to_owned();
        let number = TcpListener::bind("127.0.0.1:0").ok()?.local_addr().ok()?.port();
        let group = Path::new(&home).join(format!("polyfork-test-{}-{number}", std::process::id()));
        fs::create_dir(&group).ok()?;
        Some(Group(group))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        fn remove(folder: &Path) {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries.filter(|entry| entry.path().is_dir()).for_each(|entry| remove(&entry.path()));
            let _kept = fs::remove_dir(folder);
        }
        // All of it was killed with the first process, and leaves the group a moment later.
        let limit = Instant::now() + PATIENCE;
        let events = || fs::read_to_string(self.0.join("cgroup.events")).unwrap_or_default();
        while events().contains("populated 1") && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(5));
        }
        remove(&self.0);
    }
}

impl Systemd {
    /// With the units that `service install` makes of `args`.
    fn with(test: &str, install: &[&str], args: &[&str]) -> Option<Systemd> {
        let programs = ["/usr/lib/systemd/systemd", "/lib/systemd/systemd"];
        let Some(program) = programs.iter().find(|path| Path::new(path).exists()) else {
            skip(test, "needs systemd");
            return None;
        };
        let Some(group) = Group::new() else {
            skip(test, "no right to make control groups of version 2");
            return None;
        };
        let place = Place::with_server();
        let units = write_units(&place, install, args);
        let runtime = place.path().join("run");
        fs::create_dir(&runtime).expect("a runtime folder");
        let mut first = command("sh");
        first.args(["-c", "echo $$ > \"$1\" && shift && exec \"$@\"", "sh"]);
        first.arg(group.0.join("cgroup.procs"));
        first.args(["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]);
        first.args(["--cgroup", "sh", "-c", FIRST]).stdin(Stdio::null()).env_clear();
        first.env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", place.path());
        first.env("XDG_RUNTIME_DIR", &runtime).env("SYSTEMD_UNIT_PATH", units);
        first.env("SYSTEMD", program);
        let mut running = Running::start(first);
        let said = Lines::of(running.take_err());
        let socket = runtime.join("systemd/private");
        eventually("a manager", || socket.exists() || running.is_over(), |is| *is);
        let mut manager = Systemd { running, said, _group: group, place };
        if manager.running.is_over() {
            let said = manager.said.rest();
            skip(test, &format!("no manager: {}", said.last().map_or("", String::as_str)));
            return None;
        }
        // A manager that cannot start anything here says nothing about our units.
        let probe = manager.systemctl(&["start", PROBE]);
        if probe.code != Some(0) {
            skip(test, &format!("the manager starts nothing: {}", probe.err.trim()));
            return None;
        }
        Some(manager)
    }

    /// Runs a command where the manager is.
    fn inside(&self, program: &str, args: &[&str]) -> Ended {
        let pid = self.running.pid();
        let first = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let first = first.expect("the first process");
        let mut enter = command("nsenter");
        enter.args(["-t", first.trim(), "--pid", "--mount", "--cgroup", "--", program]).args(args);
        let runtime = self.place.path().join("run");
        enter.env("POLYFORK_RUNTIME_DIR", runtime.join("polyfork")).env("XDG_RUNTIME_DIR", runtime);
        enter.stdin(Stdio::null());
        ended(enter)
    }

    fn polyfork(&self, args: &[&str]) -> Ended {
        self.inside(env!("CARGO_BIN_EXE_polyfork"), args)
    }

    fn systemctl(&self, args: &[&str]) -> Ended {
        self.inside("systemctl", &[&["--user"], args].concat())
    }

    fn did(&self, args: &[&str]) {
        let done = self.systemctl(args);
        assert_eq!(done.code, Some(0), "{args:?}: {done:?}\n{:#?}", self.show(""));
    }

    /// A property of the service.
    fn show(&self, property: &str) -> String {
        let done = self.systemctl(&["show", "--value", "-p", property, SERVICE]);
        assert_eq!(done.code, Some(0), "{done:?}");
        done.out.trim().to_owned()
    }

    fn waits_until(&self, property: &str, value: &str) {
        eventually(property, || self.show(property), |seen| seen == value);
    }

    /// Those that serve; one of a version that failed may be about to end.
    fn workers(&self) -> Vec<u64> {
        let done = self.polyfork(&["status", "--json", "web"]);
        assert_eq!(done.code, Some(0), "{done:?}");
        let workers = read(&done.out)["workers"].clone();
        let workers = workers.as_array().expect("workers").iter();
        workers
            .filter(|worker| worker["state"] == "ready")
            .map(|worker| worker["pid"].as_u64().expect("a pid"))
            .collect()
    }
}

/// What `service install` writes, and what a manager wants to find beside it; the folder.
fn write_units(place: &Place, install: &[&str], args: &[&str]) -> PathBuf {
    let units = place.path().join("units");
    let dir = units.to_str().expect("a plain path");
    let all = [&["service", "install", "--user-unit", "--dir", dir], install, &["--"], args];
    let mut unit = place.polyfork(all.concat());
    unit.env_remove("POLYFORK_RUNTIME_DIR").env_remove("POLYFORK_LOG_DIR");
    let done = ended(unit);
    assert_eq!(done.code, Some(0), "{done:?}");
    let probe = "[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nExecStart=true\n";
    fs::write(units.join(PROBE), probe).expect("a unit");
    for target in TARGETS {
        let text = format!("[Unit]\nDescription={target}\nDefaultDependencies=no\n");
        fs::write(units.join(format!("{target}.target")), text).expect("a unit");
    }
    units
}

fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port")
}

const ARGS: [&str; 5] = ["--name", "web", "-w", "2", "--env"];

#[test]
fn real_systemd_starts_reloads_upgrades_and_stops_a_unit() {
    let (address, test) = (free(), "real_systemd_starts_reloads_upgrades_and_stops_a_unit");
    let port = format!("PORT={}", address.port());
    let args = [&ARGS[..], &[port.as_str(), "server.js"]].concat();
    let Some(systemd) = Systemd::with(test, &[], &args) else { return };
    // It returns when the workers are ready, so this one is answered.
    systemd.did(&["start", SERVICE]);
    assert!(!get(address, "/").is_empty());
    assert_eq!(systemd.show("StatusText"), "2 of 2 workers ready");
    let (primary, first) = (systemd.show("MainPID"), systemd.workers());

    let load = Load::start(address, 4, "/");
    systemd.did(&["reload", SERVICE]);
    let second = systemd.workers();
    assert!(second.iter().all(|pid| !first.contains(pid)), "{first:?} {second:?}");
    let server = fs::read_to_string(systemd.place.path().join("server.js")).expect("a source");
    systemd.place.file("server.js", "this is no script");
    assert_ne!(systemd.systemctl(&["reload", SERVICE]).code, Some(0));
    assert_eq!((systemd.show("ActiveState").as_str(), systemd.workers()), ("active", second));
    systemd.place.file("server.js", &server);
    let done = systemd.polyfork(&["upgrade", "web"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    load.wait_for_ok(100);
    lost_nothing(&load.stop());
    assert_eq!((systemd.show("ActiveState"), systemd.show("MainPID")), ("active".into(), primary));
    assert_eq!(systemd.show("NRestarts"), "0");

    systemd.did(&["stop", SERVICE]);
    assert_eq!(systemd.show("ActiveState"), "inactive");
    assert_eq!(systemd.show("Result"), "success");
    assert_eq!(systemd.polyfork(&["ls", "--json"]).out.trim(), "[]");
}

fn lost_nothing(counts: &Counts) {
    let ok = count(counts, Class::Ok);
    assert_eq!(counts.values().sum::<u64>(), ok, "{counts:?}");
    println!("{ok} answered");
}

#[test]
fn real_systemd_keeps_the_port_through_a_restart_and_a_crash() {
    let (address, test) = (free(), "real_systemd_keeps_the_port_through_a_restart_and_a_crash");
    let port = format!("PORT={}", address.port());
    let args = [&ARGS[..], &[port.as_str(), "server.js"]].concat();
    let Some(systemd) = Systemd::with(test, &[], &args) else { return };
    systemd.did(&["start", SERVICE]);
    let load = Load::start(address, 4, "/");
    load.wait_for_ok(100);
    systemd.did(&["restart", SERVICE]);
    load.wait_for_ok(100);
    lost_nothing(&load.stop());

    let load = Load::start(address, 4, "/");
    load.wait_for_ok(100);
    systemd.did(&["kill", "--kill-whom=main", "-s", "KILL", SERVICE]);
    systemd.waits_until("NRestarts", "1");
    systemd.waits_until("ActiveState", "active");
    load.wait_for_ok(100);
    let counts = load.stop();
    println!("a crash: {counts:?}");
    // systemd ends the workers as well; each of the clients had at most one request there.
    assert_eq!((count(&counts, Class::Refused), count(&counts, Class::Hang)), (0, 0), "{counts:?}");
    assert!(counts.values().sum::<u64>() - count(&counts, Class::Ok) <= 4, "{counts:?}");
    systemd.did(&["stop", SERVICE]);
    assert_eq!(systemd.show("NFileDescriptorStore"), "0");
}

#[test]
fn real_systemd_replaces_a_primary_that_hangs() {
    let (address, test) = (free(), "real_systemd_replaces_a_primary_that_hangs");
    let port = format!("PORT={}", address.port());
    let args = [&ARGS[..], &[port.as_str(), "server.js"]].concat();
    let Some(systemd) = Systemd::with(test, &["--watchdog-sec", "2s"], &args) else { return };
    systemd.did(&["start", SERVICE]);
    let primary = systemd.show("MainPID");
    systemd.did(&["kill", "--kill-whom=main", "-s", "STOP", SERVICE]);
    systemd.waits_until("NRestarts", "1");
    systemd.waits_until("ActiveState", "active");
    assert_ne!(systemd.show("MainPID"), primary);
    assert!(!get(address, "/").is_empty());
    systemd.did(&["stop", SERVICE]);
}

#[test]
fn real_systemd_starts_a_unit_with_its_first_connection() {
    let (address, test) = (free(), "real_systemd_starts_a_unit_with_its_first_connection");
    let (socket, port) = (address.to_string(), format!("PORT={}", address.port()));
    let args = [&ARGS[..], &[port.as_str(), "server.js"]].concat();
    let Some(systemd) = Systemd::with(test, &["--socket", &socket], &args) else { return };
    systemd.did(&["start", SOCKET]);
    assert_eq!(systemd.show("ActiveState"), "inactive");
    assert!(!get(address, "/").is_empty());
    systemd.waits_until("ActiveState", "active");
    let load = Load::start(address, 4, "/");
    load.wait_for_ok(100);
    systemd.did(&["restart", SERVICE]);
    load.wait_for_ok(100);
    lost_nothing(&load.stop());
    systemd.did(&["stop", SOCKET, SERVICE]);
}
