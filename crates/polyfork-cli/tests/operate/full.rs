//! Standard output that takes nothing: on a full disk what is told is lost, and the exit code says so.

use std::fs::OpenOptions;
use std::process::Stdio;

use super::desk::{Desk, eventually, read};
use super::support::Ended;

/// Runs a verb whose standard output is full.
fn into_full(desk: &Desk, args: &[&str]) -> Ended {
    into(desk, args, OpenOptions::new().write(true).open("/dev/full").expect("/dev/full").into())
}

fn into(desk: &Desk, args: &[&str], out: Stdio) -> Ended {
    let mut child = desk.command(args).stdout(out).stderr(Stdio::piped()).spawn().expect("a child");
    let mut err = String::new();
    let pipe = child.stderr.as_mut().expect("a pipe");
    std::io::Read::read_to_string(pipe, &mut err).expect("text");
    Ended { code: child.wait().expect("an end").code(), out: String::new(), err }
}

const COMPLAINT: &str = "polyfork: cannot write to standard output: no space left on device\n";

/// Every verb that answers and changes nothing.
const ANSWERS: [&[&str]; 16] = [
    &["ls"],
    &["ls", "--json"],
    &["status", "server"],
    &["status", "--json", "server"],
    &["logs", "server"],
    &["logs", "--json", "server"],
    &["metrics", "server"],
    &["metrics", "--json", "server"],
    &["top", "--plain"],
    &["top", "--json"],
    &["doctor"],
    &["check", "--schema"],
    &["service", "print", "server"],
    &["man"],
    &["completions", "bash"],
    &["scale", "--help"],
];

#[test]
fn an_answer_that_cannot_be_written_is_an_error() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    let has_lines = || desk.did(&["logs", "server"]);
    eventually("lines", has_lines, |text| !text.is_empty());
    for args in ANSWERS {
        let told = into_full(&desk, args);
        assert_eq!((told.code, told.err.as_str()), (Some(1), COMPLAINT), "{args:?}");
    }
}

#[test]
fn who_follows_and_cannot_write_leaves() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    for args in
        [&["events", "server"][..], &["logs", "-f", "server"], &["top", "--interval", "100ms"]]
    {
        std::thread::scope(|scope| {
            let following = scope.spawn(|| into_full(&desk, args));
            // Something has to happen for there to be something to tell.
            while !following.is_finished() {
                desk.did(&["restart", "server"]);
            }
            let told = following.join().expect("an end");
            assert_eq!((told.code, told.err.as_str()), (Some(1), COMPLAINT), "{args:?}");
        });
    }
}

#[test]
fn what_was_done_and_cannot_be_told_is_told_to_have_been_done() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    for (args, done) in [
        (&["scale", "--json", "server", "2"][..], "server: 2 workers"),
        (&["reload", "--json", "server"], "server: reloaded: 2 workers"),
        (&["start", "--json", "--name", "other", "-w", "1", "server.js"], "other: 1 worker ready"),
        (&["stop", "--json", "other"], "other: stopped"),
    ] {
        let told = into_full(&desk, args);
        assert_eq!(told.code, Some(1), "{args:?}: {told:?}");
        assert!(told.err.contains(COMPLAINT) && told.err.contains(done), "{args:?}: {told:?}");
    }
    // Without JSON there was nothing to write.
    let told = into_full(&desk, &["scale", "server", "1"]);
    assert_eq!(told.code, Some(0), "{told:?}");
    // A failure keeps its own code.
    let told = into_full(&desk, &["status", "--json", "nobody"]);
    assert_eq!(told.code, Some(10), "{told:?}");
    assert_eq!(read(&desk.did(&["ls", "--json"])).as_array().map(Vec::len), Some(1));
}

#[test]
fn a_reader_that_is_gone_has_read_enough() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    for args in [&["ls"][..], &["status", "--json", "server"], &["doctor"], &["logs", "server"]] {
        let told = into(&desk, args, std::io::pipe().expect("a pipe").1.into());
        assert_eq!((told.code, told.err.as_str()), (Some(0), ""), "{args:?}");
    }
}
