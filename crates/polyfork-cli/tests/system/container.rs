//! As the first process of a container.

use rustix::process::Signal;

use super::desk::{pidfd, signal};
use super::support::{Lines, Place, Running, command, ended, skip};

fn inside(place: &Place, args: &[&str]) -> std::process::Command {
    let polyfork = place.polyfork(args);
    let mut container = command("unshare");
    container.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    container.arg(polyfork.get_program()).args(polyfork.get_args()).current_dir(place.path());
    for (key, value) in polyfork.get_envs() {
        match value {
            Some(value) => container.env(key, value),
            None => container.env_remove(key),
        };
    }
    container
}

fn is_possible(test: &str) -> bool {
    let mut probe = command("unshare");
    probe.args(["--pid", "--fork", "--mount-proc", "true"]);
    let possible = ended(probe).code == Some(0);
    if !possible {
        skip(test, "may not make a pid namespace");
    }
    possible
}

/// The process that `unshare` waits for.
fn first_process(of: u32) -> u64 {
    let path = format!("/proc/{of}/task/{of}/children");
    let children = std::fs::read_to_string(path).expect("children");
    children.split_whitespace().next().and_then(|pid| pid.parse().ok()).expect("a child")
}

#[test]
fn output_passes_through_and_a_signal_stops_it() {
    if !is_possible("output_passes_through_and_a_signal_stops_it") {
        return;
    }
    let place = Place::new();
    let script =
        "trap 'echo oops >&2; echo bye; exit 0' TERM; echo hello; while :; do sleep 0.02; done";
    let options = ["run", "-w", "1", "--output", "inherit", "--ready", "delay=1ms"];
    let args = [&options[..], &["--dialect", "sockets", "--", "sh", "-c", script]].concat();
    let mut running = Running::start(inside(&place, &args));
    let mut out = Lines::of(running.take_out());
    let mut err = Lines::of(running.take_err());
    out.wait_for("hello");
    err.wait_for("ready after");
    signal(&pidfd(first_process(running.pid())), Signal::TERM);
    out.wait_for("bye");
    err.wait_for("oops");
    assert_eq!(running.end().code(), Some(0));
}

#[test]
fn its_exit_code_is_one_of_the_table_and_no_signal() {
    if !is_possible("its_exit_code_is_one_of_the_table_and_no_signal") {
        return;
    }
    let place = Place::new();
    let options = ["run", "-w", "1", "--restart-limit", "1/10s", "--dialect", "sockets"];
    for script in ["exit 9", "kill -9 $$"] {
        let told = ended(inside(&place, &[&options[..], &["--", "sh", "-c", script]].concat()));
        assert_eq!(told.code, Some(7), "{told:?}");
    }
    let told = ended(inside(&place, &["run", "no-such-program"]));
    assert_eq!(told.code, Some(3), "{told:?}");
}
