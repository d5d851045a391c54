//! What the command says before or instead of running anything: help, versions, mistakes.

#![allow(clippy::print_stdout, reason = "tests print their counts")]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Stdio;

use support::{Ended, Place, ended};

/// One line on standard error that contains `parts`, nothing on standard output, and the code.
#[track_caller]
fn refused(ended: &Ended, code: i32, parts: &[&str]) {
    assert_eq!(ended.code, Some(code), "{ended:?}");
    assert!(ended.out.is_empty(), "{ended:?}");
    assert!(ended.err.starts_with("polyfork: ") && ended.err.ends_with('\n'), "{ended:?}");
    assert_eq!(ended.err.lines().count(), 1, "{ended:?}");
    for part in parts {
        assert!(ended.err.contains(part), "lacks {part:?}: {}", ended.err);
    }
}

#[test]
fn help_tells_options_environment_signals_and_exit_codes() {
    let place = Place::new();
    let help = place.ends(["run", "--help"]);
    assert_eq!(help.code, Some(0));
    for part in [
        "--workers",
        "--policy",
        "--mechanism",
        "--dialect",
        "--listen",
        "--name",
        "--grace",
        "--ready",
        "--ready-timeout",
        "--restart-limit",
        "--env",
        "--cwd",
        "--json",
        "--output",
        "--window",
        "--ack-limit",
        "--max-message",
        "--max-depth",
        "--no-drain-preload",
        "--runtime",
        "WEB_CONCURRENCY",
        "POLYFORK_WORKERS",
        "TTIN, TTOU",
        "Exit codes:",
        "Examples:",
        "Connections:",
        "[default: 30s]",
        "5/30s",
    ] {
        assert!(help.out.contains(part), "help lacks {part}");
    }
    assert!(!help.out.contains('\x1b'), "no colours without a terminal");
    let short = place.ends(["--help"]);
    assert!(short.out.contains("run") && short.out.contains("demo") && short.code == Some(0));
    let version = place.ends(["--version"]);
    assert_eq!(version.out, format!("polyfork {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn help_into_a_closed_pipe_is_no_error() {
    let mut command = Place::new().polyfork(["run", "--help"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = command.current_dir("/").stdout(Stdio::from(writer)).status().unwrap();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn help_that_could_not_be_written_is_an_error() {
    for args in [&["--help"][..], &["--version"], &["run", "--help"]] {
        let mut command = Place::new().polyfork(args);
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = command.current_dir("/").stdout(full).stderr(Stdio::piped()).output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(told.contains("standard output") && !told.contains("os error"), "{told}");
    }
}

#[test]
fn an_unknown_option_is_answered_with_the_near_one() {
    let place = Place::new();
    refused(
        &place.ends(["run", "--worker", "2", "x"]),
        2,
        &["--worker", "did you mean --workers?"],
    );
    refused(&place.ends(["run", "--jsn", "x"]), 2, &["--jsn", "--json", "polyfork run --help"]);
    refused(&place.ends(["run", "--inspect", "x"]), 2, &["--inspect", "come after"]);
    refused(&place.ends(["demo", "--polcy", "x"]), 2, &["--policy", "polyfork demo --help"]);
}

#[test]
fn wrong_values_name_option_value_and_what_is_right() {
    let place = Place::new();
    for (args, parts) in [
        (["--workers", "0"], ["at least 1 worker", "max"]),
        (["--workers", "-3"], ["-3", "1 to"]),
        (["--grace", "30"], ["30", "30s"]),
        (["--ready-timeout", "x"], ["none", "30s"]),
        (["--listen", "127.0.0.1:99999"], ["port", "unix:PATH"]),
        (["--listen", "example.org:80"], ["host", "HOST:PORT"]),
        (["--restart-limit", "5"], ["5", "5/30s"]),
        (["--mechanism", "magic"], ["magic", "handoff"]),
        (["--max-message", "many"], ["many", "64KiB"]),
        (["--window", "65"], ["65", "64"]),
        (["--env", "=x"], ["KEY=VALUE", "=x"]),
        (["--cwd", "/no/such/place"], ["/no/such/place", "no such directory"]),
        (["--cwd", "/etc/passwd"], ["/etc/passwd", "not a directory"]),
        (["--grace", "-1"], ["-1", "less than nothing"]),
        (["--grace", "99999999999d"], ["99999999999d", "at most 36500d"]),
        (["--max-message", "0"], ["0", "at least 1 byte"]),
        (["--listen", "localhost"], ["port is missing", "localhost:8000"]),
        (["--listen", "/tmp/x.sock"], ["path", "unix:/tmp/x.sock"]),
    ] {
        let ended = place.ends(["run", args[0], args[1], "server.js"]);
        refused(&ended, 2, &parts);
        refused(&ended, 2, &[args[0]]);
    }
}

#[test]
fn wrong_values_in_the_environment_are_refused_too() {
    let place = Place::with_server();
    for (key, value, part) in
        [("POLYFORK_WORKERS", "0", "at least 1"), ("POLYFORK_LISTEN", "nowhere", "unix:PATH")]
    {
        let mut command = place.polyfork(["run", "server.js"]);
        command.env(key, value);
        refused(&ended(command), 2, &[part]);
    }
}

#[test]
fn a_wrong_value_is_blamed_on_where_it_comes_from() {
    let place = Place::with_server();
    for (variable, option, right) in [
        ("POLYFORK_WORKERS", "--workers", "max"),
        ("POLYFORK_GRACE", "--grace", "500ms"),
        ("POLYFORK_POLICY", "--policy", "shared"),
        ("POLYFORK_MAX_DEPTH", "--max-depth", "1"),
        ("POLYFORK_JSON", "--json", "true"),
        ("POLYFORK_NO_DRAIN_PRELOAD", "--no-drain-preload", "off"),
    ] {
        let mut command = place.polyfork(["run", "server.js"]);
        command.env(variable, "zzz");
        let ended = ended(command);
        refused(&ended, 2, &[variable, "zzz"]);
        assert!(!ended.err.contains(option), "{ended:?}");
        assert!(ended.err.contains(right) || variable == "POLYFORK_MAX_DEPTH", "{ended:?}");
    }
    let mut both = place.polyfork(["run", "--grace", "soon", "server.js"]);
    both.env("POLYFORK_GRACE", "zzz").env("POLYFORK_WORKERS", "zzz");
    refused(&ended(both), 2, &["--grace", "soon"]);
}

#[test]
fn an_address_named_twice_is_refused() {
    let place = Place::with_server();
    let twice = ["run", "--listen", "127.0.0.1:1", "--listen", "localhost:1", "server.js"];
    refused(&place.ends(twice), 2, &["127.0.0.1:1", "twice", "--listen"]);
    let mut command = place.polyfork(["run", "server.js"]);
    command.env("POLYFORK_LISTEN", "unix:/x unix:/x");
    refused(&ended(command), 2, &["POLYFORK_LISTEN", "unix:/x", "twice"]);
}

#[test]
fn a_missing_program_is_told_with_a_near_name() {
    let place = Place::with_server();
    refused(&place.ends(["run", "servr.js"]), 3, &["servr.js", "did you mean \"server.js\"?"]);
    refused(&place.ends(["run", "./x/y.js"]), 3, &["./x/y.js", "there is no directory"]);
    refused(&place.ends(["run"]), 2, &["polyfork run PROGRAM"]);
    refused(&place.ends::<&str>([]), 2, &["polyfork run PROGRAM", "polyfork demo"]);
    refused(&place.ends(["server.js"]), 2, &["polyfork run server.js"]);
}

#[test]
fn a_file_that_cannot_be_executed_says_how_it_could() {
    let place = Place::new();
    place.file("notes", "hello");
    refused(&place.ends(["run", "./notes"]), 3, &["notes", "chmod +x"]);
    refused(&place.ends(["run", "."]), 3, &["directory", "package.json"]);
}

#[test]
fn without_a_runtime_it_is_told_what_was_looked_for() {
    let place = Place::with_server();
    let mut command = place.polyfork(["run", "server.js"]);
    command.env("PATH", place.path());
    refused(&ended(command), 4, &["server.js", "node", "--runtime"]);
    refused(&place.ends(["run", "--runtime", "nodee", "server.js"]), 4, &["nodee"]);
    let script = place.file("app", "#!/usr/bin/env no-such-interpreter\n");
    std::fs::set_permissions(script, std::fs::Permissions::from_mode(0o755)).unwrap();
    refused(&place.ends(["run", "./app"]), 4, &["no-such-interpreter", "first line"]);
}

#[test]
fn what_the_kernel_cannot_execute_is_told_once() {
    let place = Place::new();
    for (name, content, part) in [("empty", "", "empty"), ("text", "hello\n", "#!/bin/sh")] {
        let file = place.file(name, content);
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o755)).unwrap();
        refused(&place.ends(["run", &format!("./{name}")]), 3, &[name, part]);
    }
}

#[test]
fn advice_fits_the_runtime_that_was_named() {
    let place = Place::with_server();
    let with = |runtime: &str| {
        let mut command = place.polyfork(["run", "--runtime", runtime, "server.js"]);
        command.env("PATH", place.path());
        ended(command)
    };
    refused(&with("bun"), 4, &["bun", "install Bun"]);
    refused(&with("/etc/passwd"), 4, &["/etc/passwd", "node, deno or bun"]);
    assert!(!with("/etc/passwd").err.contains("what runs it first"));
}

#[test]
fn a_link_that_leads_nowhere_is_not_offered_as_its_own_correction() {
    let place = Place::new();
    std::os::unix::fs::symlink("loop", place.path().join("loop")).unwrap();
    std::os::unix::fs::symlink("gone.js", place.path().join("dangling.js")).unwrap();
    refused(&place.ends(["run", "./loop"]), 3, &["loop", "circle"]);
    refused(&place.ends(["run", "dangling.js"]), 3, &["gone.js, which does not exist"]);
    refused(&place.ends(["run", ""]), 3, &["the name is empty"]);
}

#[test]
fn a_folder_that_may_not_be_searched_is_named() {
    let place = Place::with_server();
    let closed = place.path().join("closed");
    std::fs::create_dir_all(closed.join("inner")).unwrap();
    std::fs::write(closed.join("server.js"), "").unwrap();
    let mode = if rustix::process::geteuid().is_root() { 0o700 } else { 0o600 };
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(mode)).unwrap();
    // Where the tests are built others may not look.
    let own = place.path().join("polyfork");
    std::fs::copy(env!("CARGO_BIN_EXE_polyfork"), &own).unwrap();
    let unprivileged = |args: &[&str]| {
        let mut command = support::command(&own);
        command.args(args).current_dir(place.path()).stdin(Stdio::null());
        if rustix::process::geteuid().is_root() {
            command.uid(65_534).gid(65_534);
        }
        ended(command)
    };
    let denied = format!("permission denied on {}", closed.display());
    for cwd in ["closed", "closed/inner"] {
        refused(&unprivileged(&["run", "--cwd", cwd, "server.js"]), 2, &["--cwd", &denied]);
    }
    let denied = format!("permission denied on {closed:?}");
    refused(&unprivileged(&["run", "closed/server.js"]), 3, &["closed/server.js", &denied]);
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn with_json_the_error_is_an_event_too() {
    let place = Place::new();
    let ended = place.ends(["run", "--json", "servr.js"]);
    assert_eq!(ended.code, Some(3));
    let event: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
    assert_eq!(event["event"], "error");
    assert_eq!((&event["exit_code"], &event["outcome"]), (&3.into(), &"no_program".into()));
    assert!(ended.err.contains("servr.js"), "people are told as well");
}

#[test]
fn json_and_inherited_output_exclude_each_other() {
    let place = Place::with_server();
    let ended = place.ends(["run", "--json", "--output", "inherit", "server.js"]);
    assert_eq!(ended.code, Some(2));
    assert!(ended.err.contains("--output inherit"), "{}", ended.err);
}

#[test]
fn the_demo_wants_an_address_that_a_browser_can_open() {
    refused(&Place::new().ends(["demo", "--listen", "unix:/tmp/x"]), 2, &["unix:/tmp/x", "TCP"]);
}
