//! `polyfork doctor`: looks at this machine as a primary would find it, and says what to do about what is missing.
//!
//! Each check is a line: `ok`, `warn` (works, but less well than it could) or `fail` (apps will not run). Nothing is
//! changed; what can be tried is tried rather than guessed: a program is loaded, a pidfd opened, a socket bound. The
//! checks about files and apps are in `places`.
//!
//! The surprising rule: a runtime that is missing is no fault, unless all are. Nobody needs every one.
//!
//! References: bpf(2), pidfd_open(2), memfd_create(2), cgroups(7), tcp(7), proc(5).

use std::fs;
use std::io;
use std::net::{Ipv6Addr, TcpListener};
use std::time::Duration;

use polyfork::child_process::exec_file;
use polyfork::identity;
use rustix::fs::MemfdFlags;
use rustix::process::{PidfdFlags, Resource, getpid, getrlimit, pidfd_open};
use serde::Serialize;

use crate::exit::Code;
use crate::out;
use crate::style::{Ink, Paint};
use crate::words;

mod places;

/// The version of the JSON form.
const VERSION: u32 = 1;
/// For a runtime to tell its version.
const VERSION_TIME: Duration = Duration::from_secs(5);
/// Programs that detection may choose, and how they tell their version.
const RUNTIMES: [&str; 4] = ["node", "bun", "deno", "python3"];
/// The oldest kernel that runs apps, and the oldest that takes exact turns.
const OLDEST: (u32, u32) = (5, 11);
const EXACT: (u32, u32) = (5, 14);

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warn,
    Fail,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Check {
    id: &'static str,
    level: Level,
    text: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

impl Check {
    fn ok(id: &'static str, text: impl Into<String>) -> Check {
        Check { id, level: Level::Ok, text: text.into(), next: None }
    }

    fn warn(id: &'static str, text: impl Into<String>, next: impl Into<String>) -> Check {
        Check { id, level: Level::Warn, text: text.into(), next: Some(next.into()) }
    }

    fn fail(id: &'static str, text: impl Into<String>, next: impl Into<String>) -> Check {
        Check { id, level: Level::Fail, text: text.into(), next: Some(next.into()) }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    version: u32,
    polyfork: &'a str,
    worst: Level,
    checks: &'a [Check],
}

/// Runs the verb.
pub(crate) fn run(json: bool) -> Code {
    let checks = examine();
    let worst = checks.iter().map(|check| check.level).max().unwrap_or(Level::Ok);
    let text = match json {
        true => {
            let polyfork = env!("CARGO_PKG_VERSION");
            let report = Report { version: VERSION, polyfork, worst, checks: &checks };
            let text = serde_json::to_string_pretty(&report).unwrap_or_default();
            text + "\n"
        }
        false => drawn(&checks, Paint::stdout()),
    };
    out::write(text.as_bytes());
    if worst == Level::Fail { Code::Unexpected } else { Code::Stopped }
}

fn examine() -> Vec<Check> {
    let mut checks = vec![kernel(), turns(), pidfd(), memfd(), proc(), control_groups(), cpus()];
    checks.extend([open_files(), backlog(), handshakes(), local_ports(), low_ports(), ipv6()]);
    checks.extend([clock(), confinement()]);
    checks.extend(runtimes());
    checks.extend(places::examine());
    checks
}

fn drawn(checks: &[Check], paint: Paint) -> String {
    let width = checks.iter().map(|check| check.id.len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let (word, ink) = match check.level {
            Level::Ok => ("ok  ", Ink::Good),
            Level::Warn => ("warn", Ink::Warn),
            Level::Fail => ("fail", Ink::Bad),
        };
        let told = words::harmless(&check.text);
        text.push_str(&format!("{}  {:width$}  {told}\n", paint.with(ink, word), check.id));
        if let Some(next) = &check.next {
            text.push_str(&format!(
                "{:indent$}{}\n",
                "",
                words::harmless(next),
                indent = width + 8
            ));
        }
    }
    let count = |level| checks.iter().filter(|check| check.level == level).count();
    text + &match (count(Level::Warn), count(Level::Fail)) {
        (0, 0) => "all is well\n".to_owned(),
        (warn, 0) => format!("apps run here; {warn} could be better\n"),
        (_, fail) => format!("{fail} in the way\n"),
    }
}

fn plain(error: impl Into<io::Error>) -> String {
    words::plain(&error.into().to_string())
}

fn kernel() -> Check {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let text = format!("Linux {release}");
    match version(&release) {
        Some(found) if found < OLDEST => {
            Check::fail("kernel", text, "polyfork needs Linux 5.11 or later")
        }
        Some(found) if found < EXACT => {
            let next = "exact turns by the kernel need Linux 5.14 or later; --mechanism handoff gives them here";
            Check::warn("kernel", text, next)
        }
        _ => Check::ok("kernel", text),
    }
}

/// The first two numbers of a release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn turns() -> Check {
    match identity::load_in_advance(1) {
        Ok(()) => {
            Check::ok("mechanism", "exact turns by the kernel: an eBPF program can be loaded")
        }
        Err(why) => {
            let text = format!(
                "turns at random by the kernel (even on average): an eBPF program cannot be loaded: {}",
                words::plain(&why)
            );
            let next = match identity::may_load_programs() {
                true => "the rights are there: a seccomp filter or the kernel's lockdown forbids it; --mechanism handoff \
                         gives exact turns"
                    .to_owned(),
                false => format!(
                    "exact turns need CAP_BPF and CAP_NET_ADMIN: start as root (with --user), or `setcap \
                     cap_bpf,cap_net_admin,cap_net_bind_service+ep {}`; or use --mechanism handoff",
                    std::env::current_exe().unwrap_or_default().display()
                ),
            };
            Check::warn("mechanism", text, next)
        }
    }
}

fn pidfd() -> Check {
    match pidfd_open(getpid(), PidfdFlags::empty()) {
        Ok(_) => Check::ok("pidfd", "processes are known by pidfd"),
        Err(error) => Check::fail(
            "pidfd",
            format!("pidfd_open: {}", plain(error)),
            "workers cannot be watched; let the seccomp filter of the container permit pidfd_open, pidfd_send_signal and waitid",
        ),
    }
}

fn memfd() -> Check {
    match rustix::fs::memfd_create("polyfork-doctor", MemfdFlags::CLOEXEC) {
        Ok(_) => Check::ok("memfd", "shared memory between processes can be made"),
        Err(error) => Check::warn(
            "memfd",
            format!("memfd_create: {}", plain(error)),
            "everything but shared memory works; let the seccomp filter of the container permit memfd_create",
        ),
    }
}

fn proc() -> Check {
    match fs::read_dir("/proc/self/fd") {
        Ok(_) => Check::ok("proc", "/proc is there"),
        Err(error) => Check::warn(
            "proc",
            format!("/proc/self/fd: {}", plain(error)),
            "mount /proc: without it memory and CPU time are not known, orphans are not collected, sockets cannot be taken over",
        ),
    }
}

fn control_groups() -> Check {
    let Some((folder, version)) = polyfork::cluster::cgroup_folder() else {
        return Check::ok(
            "cgroup",
            "no control groups that limit memory are mounted here: limits of memory are looked after, not enforced",
        );
    };
    let may = rustix::fs::access(&folder, rustix::fs::Access::WRITE_OK).is_ok();
    let delegated =
        if may { "groups for workers can be made" } else { "not delegated to this user" };
    Check::ok("cgroup", format!("version {version}, {}: {delegated}", folder.display()))
}

fn cpus() -> Check {
    let usable = polyfork::cluster::default_workers();
    Check::ok("cpus", format!("{} workers by default: {}", usable.workers, usable.explanation))
}

fn open_files() -> Check {
    let limits = getrlimit(Resource::Nofile);
    let shown =
        |limit: Option<u64>| limit.map_or("unlimited".to_owned(), |limit| limit.to_string());
    let text = format!("open files: {}, at most {}", shown(limits.current), shown(limits.maximum));
    match limits.current {
        Some(few) if few < 256 => {
            Check::fail("open_files", text, "`ulimit -n 65536`, or LimitNOFILE=65536 in a unit")
        }
        Some(few) if few < 4096 => Check::warn(
            "open_files",
            text,
            "each connection is one: `ulimit -n 65536`, or LimitNOFILE=65536 in a unit",
        ),
        _ => Check::ok("open_files", text),
    }
}

/// A setting of the kernel.
fn setting(path: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/sys/{path}")).ok().map(|text| text.trim().to_owned())
}

fn number(path: &str) -> Option<u64> {
    setting(path)?.parse().ok()
}

fn at_least(id: &'static str, path: &'static str, least: u64, what: &str) -> Check {
    let name = path.replace('/', ".");
    match number(path) {
        None => Check::ok(id, format!("{name} cannot be read here")),
        Some(few) if few < least => Check::warn(
            id,
            format!("{name} is {few}: {what}"),
            format!("`sysctl -w {name}={least}`"),
        ),
        Some(enough) => Check::ok(id, format!("{name} is {enough}")),
    }
}

fn backlog() -> Check {
    let what = "few connections can wait for each worker in a burst";
    at_least("backlog", "net/core/somaxconn", 511, what)
}

fn handshakes() -> Check {
    let what = "few handshakes can be under way in a burst";
    at_least("handshakes", "net/ipv4/tcp_max_syn_backlog", 512, what)
}

fn local_ports() -> Check {
    let range = setting("net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ends = range.split_whitespace().filter_map(|end| end.parse::<u32>().ok());
    let (Some(first), Some(last)) = (ends.next(), ends.next()) else {
        return Check::ok("local_ports", "net.ipv4.ip_local_port_range cannot be read here");
    };
    let text = format!("ports {first} to {last} for outgoing connections");
    match last.saturating_sub(first) {
        few if few < 10_000 => Check::warn(
            "local_ports",
            text,
            "proxies and tests run out of them: `sysctl -w net.ipv4.ip_local_port_range='32768 60999'`",
        ),
        _ => Check::ok("local_ports", text),
    }
}

fn low_ports() -> Check {
    let first = number("net/ipv4/ip_unprivileged_port_start").unwrap_or(1024);
    match (first, identity::may_bind_low_ports()) {
        (0, _) => Check::ok("low_ports", "every port may be bound"),
        (_, true) => Check::ok("low_ports", format!("ports below {first} may be bound")),
        (_, false) => Check::ok(
            "low_ports",
            format!(
                "ports below {first} may not be bound by this user: start as root with --user, let systemd listen, or \
                 `sysctl -w net.ipv4.ip_unprivileged_port_start=80`"
            ),
        ),
    }
}

fn ipv6() -> Check {
    match TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) {
        Ok(_) => Check::ok("ipv6", "IPv6 is there"),
        Err(error) => Check::warn(
            "ipv6",
            format!("no IPv6: {}", plain(error)),
            "addresses like [::]:8000 cannot be had; Node falls back to 0.0.0.0 by itself",
        ),
    }
}

fn clock() -> Check {
    let path = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let source = fs::read_to_string(path).unwrap_or_default();
    match source.trim() {
        "" => Check::ok("clock", "the clock source cannot be read here"),
        slow @ ("hpet" | "acpi_pm" | "jiffies") => Check::warn(
            "clock",
            format!("clock source {slow}: each look at the clock is slow"),
            "see /sys/devices/system/clocksource/clocksource0/available_clocksource; tsc is fast where it is stable",
        ),
        source => Check::ok("clock", format!("clock source {source}")),
    }
}

/// Containers, seccomp and the like.
fn confinement() -> Check {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim).unwrap_or_default()
    };
    let container =
        ["/.dockerenv", "/run/.containerenv"].iter().any(|file| fs::metadata(file).is_ok())
            || std::env::var_os("container").is_some();
    let mut told = vec![if container { "in a container" } else { "no container was noticed" }];
    if field("Seccomp:") == "2" {
        told.push("a seccomp filter is in force");
    }
    if field("NoNewPrivs:") == "1" {
        told.push("no new privileges");
    }
    if getpid().as_raw_nonzero().get() == 1 {
        told.push("as process 1: orphans are collected");
    }
    Check::ok("confinement", told.join(", "))
}

fn runtimes() -> Vec<Check> {
    let mut found: Vec<Check> = RUNTIMES.iter().filter_map(|name| runtime(name)).collect();
    if found.is_empty() {
        let text = format!("none of {} is in PATH", RUNTIMES.join(", "));
        found.push(Check::warn(
            "runtime",
            text,
            "programs that need none run all the same; --runtime names one elsewhere",
        ));
    }
    found
}

/// `None` when it is not in `PATH`.
fn runtime(name: &'static str) -> Option<Check> {
    let output = exec_file(name, ["--version"]).timeout(VERSION_TIME).run_sync();
    let output = match output {
        Ok(output) => output,
        Err(error) if on_path(name) => {
            let text = format!(
                "{name} is there and does not tell its version: {}",
                words::plain(&error.to_string())
            );
            let next = format!("try `{name} --version`; --runtime names another");
            return Some(Check::warn("runtime", text, next));
        }
        Err(_) => return None,
    };
    let told = output.stdout_lossy();
    let line = told.lines().next().unwrap_or_default().trim();
    let line = line.strip_prefix(name).unwrap_or(line).trim();
    Some(Check::ok("runtime", format!("{name} {line}")))
}

fn on_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| fs::metadata(folder.join(name)).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read_as_far_as_they_matter() {
        assert_eq!(version("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(version("5.4"), Some((5, 4)));
        assert_eq!(version("x"), None);
    }

    #[test]
    fn what_is_drawn_says_what_to_do_and_moves_no_cursor() {
        let checks = [Check::ok("a", "fine\x1b[2J"), Check::fail("long", "broken", "mend it")];
        assert_eq!(
            drawn(&checks, Paint::PLAIN),
            "ok    a     fine\\u{1b}[2J\nfail  long  broken\n            mend it\n1 in the way\n"
        );
    }
}
