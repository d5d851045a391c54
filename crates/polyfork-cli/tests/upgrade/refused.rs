//! Faults 27 to 29, 36, 37 and 115: what is wrong with a new binary or with the moment is told before anything changes.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::app::{App, binary, copy_to, json, program};
use super::desk::{Desk, eventually, is_over, pidfd, signal};
use super::load::{Class, Load, count};
use super::support::{Ended, Running, SERVER, get};

fn executable(path: &Path, content: &[u8]) {
    fs::write(path, content).expect("a file");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("chmod");
}

/// The app of these tests, under load: whatever is tried, nobody is to notice.
fn undisturbed(try_it: impl FnOnce(&App)) {
    let app = App::start(&["-w", "2", "server.js"]);
    let load = Load::start(app.address, 2, "/");
    load.wait_for_ok(20);
    try_it(&app);
    load.wait_for_ok(20);
    let counts = load.stop();
    assert_eq!(counts.values().sum::<u64>(), count(&counts, Class::Ok), "{counts:?}");
    // The next one, which is good, is not hindered by those before.
    app.upgrade();
}

#[test]
fn fault_27_a_binary_that_cannot_run_is_refused_before_anything_changes() {
    undisturbed(|app| {
        let folder = app.desk.place.path().to_owned();
        let file = folder.join("bad");
        let refuses = |part: &str| {
            let told = app.refuses(&file, &[]);
            assert!(told.contains(part), "{part:?}: {told}");
        };
        refuses("No such file");
        fs::write(&file, "x").expect("a file");
        refuses("may not be executed");
        executable(&file, b"a text file\n");
        refuses("it is no executable");
        executable(&file, b"#!/bin/sh\ntouch evil\n");
        refuses("it is a script");
        executable(&file, b"");
        refuses("it is no executable");
        let whole = fs::read(binary()).expect("the binary");
        // Of another machine: the field after the type.
        let mut other = whole.clone();
        other[18] ^= 0xff;
        executable(&file, &other);
        refuses("for another machine");
        for part in [100, 4096, whole.len() / 2, whole.len() - 1] {
            executable(&file, &whole[..part]);
            refuses("it is cut short");
        }
        assert!(!folder.join("evil").exists());
        let told = app.refuses(&folder, &[]);
        assert!(told.contains("not a file"), "{told}");
        assert!(app.says().contains("not upgraded: "), "{}", app.says());
    });
}

#[test]
fn fault_28_a_binary_that_ends_hangs_or_babbles_is_refused() {
    let name = "fault_28_a_binary_that_ends_hangs_or_babbles_is_refused";
    let ways = [
        ("int main() { return 3; }", "it ended with code 3 before it answered"),
        ("int main() { return *(volatile int *)0; }", "it was ended by SIGSEGV"),
        ("#include <unistd.h>\nint main() { pause(); }", "it does not answer within 500 ms"),
        ("#include <unistd.h>\nint main() { close(0); close(1); pause(); }", "program: it "),
        ("#include <stdio.h>\nint main() { for (;;) puts(\"yes\"); }", "does not know how"),
        ("#include <stdio.h>\nint main() { for (;;) putchar('x'); }", "program: it "),
        (
            "#include <stdio.h>\nint main() { fputs(\"no \\033[2Jlibrary\\n\", stderr); return 127; }",
            "ended with code 127 before it answered: no \\u{1b}[2Jlibrary",
        ),
    ];
    undisturbed(|app| {
        for (source, part) in ways {
            let Some(binary) = program(name, app.desk.place.path(), source) else { return };
            let told = app.refuses(&binary, &["--limit", "500ms"]);
            assert!(told.contains(part), "{part:?}: {told}");
        }
    });
}

/// Tells on standard error what it was started with, and what it was left to read.
const BLABS: &str = "
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
extern char **environ;
int main(int count, char **words) {
  for (int at = 1; at < count; at++) fprintf(stderr, \"WORD %s \", words[at]);
  for (char **of = environ; *of; of++) fprintf(stderr, \"%s \", *of);
  char bytes[1 << 16]; ssize_t length = read(0, bytes, sizeof bytes);
  for (ssize_t at = 0; at < length; at++) {
    char c = bytes[at];
    if (c >= ' ' && c < 127) fputc(c, stderr);
  }
  fputs(\"\\ncannot access 'API_KEY=s3cretX' for hush-hush and 0therSecret \\033[2J\\n\", stderr);
  return 2;
}";

#[test]
fn a_refused_trial_tells_no_value_of_a_variable_and_no_argument() {
    let name = "a_refused_trial_tells_no_value_of_a_variable_and_no_argument";
    let desk = Desk::new();
    let Some(binary) = program(name, desk.place.path(), BLABS) else { return };
    let mut command = desk.command(&["start", "--json", "-w", "1", "--name", "sx"]);
    command.args(["--env", "API_KEY=s3cretX", "server.js", "--token", "hush-hush"]);
    command.env("OF_THE_PRIMARY", "0therSecret");
    let mut desk = desk;
    let started = desk.started(&["start"], super::support::ended(command));
    let pid = started["pid"].as_u64().expect("a pid");
    let secrets = ["s3cretX", "hush-hush", "0therSecret", "WORD --", "\x1b"];
    let without = |told: &str| {
        assert!(told.contains("before it answered: cannot access 'API_KEY=***' for ***"), "{told}");
        for secret in secrets {
            assert!(!told.contains(secret), "{secret}: {told}");
        }
    };
    let file = binary.to_str().expect("a path");
    without(&desk.refuses(&["upgrade", "sx", "--binary", file], 13));
    without(&desk.does(&["upgrade", "--json", "sx", "--binary", file]).out);
    let log = desk.logs().join("sx").join("primary.log");
    let log = || fs::read_to_string(&log).unwrap_or_default();
    without(&eventually("the log has it", log, |log| log.contains("not upgraded")));
    // A real tool, as a person may name it by mistake.
    let told = desk.refuses(&["upgrade", "sx", "--binary", "/bin/ls"], 13);
    assert!(told.contains("before it answered") && !told.contains("s3cretX"), "{told}");
    assert_eq!(desk.status("sx")["pid"], pid);
}

#[test]
fn what_an_app_was_given_is_in_no_list_of_processes() {
    let given = ["-w", "1", "--name", "sx", "--env", "API_KEY=s3cretX", "server.js", "--token=x y"];
    let app = App::start(&given);
    let shown = || fs::read(format!("/proc/{}/cmdline", app.pid)).expect("cmdline");
    let printed = || app.desk.did(&["service", "print", "sx"]);
    let unit = printed();
    assert!(unit.contains("API_KEY=s3cretX") && unit.contains("--token=x y"), "{unit}");
    assert_eq!(shown(), b"polyfork\0primary\0sx\0");
    for _ in 0..2 {
        app.upgrade();
        assert_eq!(shown(), b"polyfork\0primary\0sx\0");
        assert_eq!(printed(), unit, "what it was given is known");
    }
    app.desk.did(&["reload", "--probation", "0s", "sx"]);
    // No worker has it open.
    let worker = app.status()["workers"][0]["pid"].as_u64().expect("a pid");
    let stdin = fs::read_link(format!("/proc/{worker}/fd/0")).expect("its standard input");
    assert_eq!(stdin, Path::new("/dev/null"));
}

/// The process of a trial.
struct Trial {
    pid: i32,
    fd: OwnedFd,
}

/// The process of the trial, once it is there; `None` when the upgrade was faster.
fn trial_of(app: &App, upgrade: &mut Running) -> Option<Trial> {
    let limit = Instant::now() + Duration::from_secs(20);
    let children = format!("/proc/{0}/task/{0}/children", app.pid);
    while Instant::now() < limit {
        let children = fs::read_to_string(&children).unwrap_or_default();
        for child in children.split_whitespace() {
            let words = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&words).contains("upgrade-check") {
                let pid: i32 = child.parse().expect("a pid");
                let named = Pid::from_raw(pid).expect("a pid");
                let fd = pidfd_open(named, PidfdFlags::empty()).ok()?;
                return Some(Trial { pid, fd });
            }
        }
        if fs::read_to_string(format!("/proc/{}/stat", upgrade.pid()))
            .is_ok_and(|s| s.contains(") Z"))
        {
            return None;
        }
    }
    None
}

fn upgrading(app: &App) -> Running {
    let mut command = app.desk.command(&["upgrade", &app.name]);
    command.stdin(Stdio::null());
    Running::start(command)
}

#[test]
fn fault_28_a_trial_that_is_killed_at_any_moment_changes_nothing() {
    undisturbed(|app| {
        let (mut refused, mut upgraded) = (0, 0);
        for step in 0..24 {
            let (before, mut upgrade) = (app.image(), upgrading(app));
            let Some(trial) = trial_of(app, &mut upgrade) else { continue };
            std::thread::sleep(Duration::from_millis(step * 3));
            // It may have ended by itself.
            let _ = pidfd_send_signal(&trial.fd, Signal::KILL);
            let code = upgrade.end().code();
            match code {
                Some(0) => upgraded += 1,
                Some(13) => {
                    refused += 1;
                    assert_eq!(before, app.image(), "refused, so nothing has changed");
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(app.status()["workers_ready"], 2);
        }
        println!("killed trials: {refused} refused, {upgraded} upgraded all the same");
        assert!(refused > 0);
    });
}

#[test]
fn fault_29_a_primary_that_is_killed_during_an_upgrade_leaves_no_second_one() {
    for step in 0..12 {
        let app = App::start(&["-w", "1", "server.js"]);
        let status = app.status();
        let worker = pidfd(status["workers"][0]["pid"].as_u64().expect("a pid"));
        let primary = pidfd(app.pid);
        let mut upgrade = upgrading(&app);
        let trial = trial_of(&app, &mut upgrade);
        if let Some(trial) = &trial {
            std::thread::sleep(Duration::from_millis(step * 8));
            signal(&primary, Signal::KILL);
            assert!(is_over(&primary) && is_over(&trial.fd), "the trial ends with its primary");
        }
        upgrade.end();
        if trial.is_none() {
            signal(&primary, Signal::KILL);
        }
        // As after any end of a primary: workers finish and leave, and both name and port are free.
        assert!(is_over(&worker));
        assert_eq!(app.desk.listed(), [("server".into(), "gone".into())]);
        app.desk.did(&["stop", "server"]);
        let again = std::net::TcpListener::bind(app.address);
        assert!(again.is_ok(), "{again:?}");
    }
}

#[test]
fn fault_36_of_many_upgrades_at_once_each_is_answered_and_one_is_under_way() {
    let app = App::start(&["-w", "2", "server.js"]);
    let all: Vec<Running> = (0..10).map(|_| upgrading(&app)).collect();
    let codes: Vec<Option<i32>> = all.into_iter().map(|mut one| one.end().code()).collect();
    println!("ten at once: {codes:?}");
    assert!(codes.contains(&Some(0)), "{codes:?}");
    assert!(codes.iter().all(|code| matches!(code, Some(0 | 13))), "{codes:?}");
    assert_eq!(app.status()["busy"], serde_json::Value::Null);
    app.upgrade();
}

#[test]
fn fault_36_an_upgrade_during_a_reload_is_refused_and_the_other_way_round() {
    let desk = Desk::new();
    // It gets ready when the file is there.
    let slow = format!(
        "const fs = require('fs'); \
         const look = setInterval(() => {{ if (!fs.existsSync('slow')) {{ clearInterval(look); go(); }} }}, 10); \
         function go() {{ {SERVER} }}"
    );
    desk.place.file("slow.js", &slow);
    let app = App::start_on(desk, &["-w", "1", "slow.js"]);
    app.desk.place.file("slow", "");
    let mut reload = Running::start(app.desk.command(&["reload", "--probation", "0s", "slow"]));
    eventually("a reload", || app.status()["busy"].clone(), |busy| *busy == "reload");
    let (before, told) = (app.image(), app.try_upgrade(&binary(), &[]));
    assert_eq!((told.code, before), (Some(13), app.image()));
    assert!(told.err.contains("a reload is under way"), "{told:?}");
    fs::remove_file(app.desk.place.path().join("slow")).expect("the file");
    assert_eq!(reload.end().code(), Some(0));
    app.upgrade();
    let generation = |app: &App| app.status()["workers"][0]["generation"].clone();
    assert_eq!(generation(&app), 2);
    app.desk.did(&["reload", "--probation", "0s", "slow"]);
    assert_eq!(generation(&app), 3, "generations are counted on");
    app.upgrade();
}

/// Writes what it is asked to read to a file, then ends.
const KEEPS: &str = "
#include <stdio.h>
#include <stdint.h>
int main(void) {
  uint32_t length; static char bytes[1 << 24];
  if (fread(&length, 4, 1, stdin) != 1 || length > sizeof bytes) return 1;
  if (fread(bytes, 1, length, stdin) != length) return 2;
  FILE *file = fopen(\"FOLDER/state\", \"w\");
  fwrite(bytes, 1, length, file); fclose(file);
  return 4;
}";

/// What the binary under test says to a state.
fn asked(desk: &Desk, state: &[u8]) -> Ended {
    use std::io::Write;
    let mut command = desk.command(&["upgrade-check"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("start");
    let mut stdin = child.stdin.take().expect("stdin");
    let length = u32::try_from(state.len()).expect("a length");
    stdin.write_all(&length.to_le_bytes()).and_then(|()| stdin.write_all(state)).expect("written");
    drop(stdin);
    let output = child.wait_with_output().expect("its end");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ended { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

#[test]
fn fault_37_a_state_that_is_damaged_cut_or_of_another_version_is_refused() {
    let name = "fault_37_a_state_that_is_damaged_cut_or_of_another_version_is_refused";
    let app = App::start(&["-w", "2", "--mechanism", "handoff", "server.js"]);
    let folder = app.desk.place.path().to_owned();
    let source = KEEPS.replace("FOLDER", folder.to_str().expect("a path"));
    let Some(binary) = program(name, &folder, &source) else { return };
    app.refuses(&binary, &[]);
    let state = fs::read(folder.join("state")).expect("the state");
    let good = json(&asked(&app.desk, &state));
    assert_eq!((&good["ok"], &good["state"]), (&true.into(), &1.into()), "{good}");
    println!("a state of {} bytes", state.len());
    let mut wrong = Vec::new();
    // A process for each: every byte of the head, and a good many of the rest. All bytes are flipped in the tests of
    // `polyfork_wire::state`.
    for at in (0..28).chain((28..state.len()).step_by(state.len() / 40)) {
        let mut damaged = state.clone();
        damaged[at] ^= 0x10;
        wrong.push((format!("byte {at}"), damaged));
    }
    for at in [0, 7, 11, 27, 28, state.len() / 2, state.len() - 1] {
        wrong.push((format!("cut at {at}"), state[..at].to_vec()));
    }
    for version in [0_u8, 2] {
        let mut other = state.clone();
        other[8] = version;
        wrong.push((format!("version {version}"), other));
    }
    for (what, state) in wrong {
        let answer = json(&asked(&app.desk, &state));
        assert_eq!(answer["ok"], false, "{what}: {answer}");
    }
    app.upgrade();
}

#[test]
fn fault_115_what_was_opened_is_what_runs() {
    let app = App::start(&["-w", "2", "server.js"]);
    let folder = app.desk.place.path().to_owned();
    let (binary, other) = (copy_to(&folder), folder.join("other"));
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (mut upgraded, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The name means one file or the other, and both are tried to be written to.
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                executable(&other, b"#!/bin/sh\ntouch evil\n");
                let _ = fs::rename(&other, &binary);
                std::thread::sleep(Duration::from_millis(7));
                copy_to(&folder.join("."));
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        for _ in 0..12 {
            match app.try_upgrade(&binary, &[]).code {
                Some(0) => upgraded += 1,
                Some(13) => refused += 1,
                other => panic!("{other:?}"),
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    println!("swapped in a loop: {upgraded} upgraded, {refused} refused");
    assert!(!folder.join("evil").exists(), "what was never looked at never ran");
    assert!(get(app.address, "/").contains("pid"));
    app.upgrade();
}

#[test]
fn fault_115_nobody_writes_to_a_binary_while_it_is_tried() {
    let name = "fault_115_nobody_writes_to_a_binary_while_it_is_tried";
    let app = App::start(&["-w", "1", "server.js"]);
    let waits = "#include <unistd.h>\nint main() { pause(); }";
    let Some(binary) = program(name, app.desk.place.path(), waits) else { return };
    let binary_text = binary.to_str().expect("a path");
    let command =
        app.desk.command(&["upgrade", &app.name, "--binary", binary_text, "--limit", "3s"]);
    let mut upgrade = Running::start(command);
    let trial = trial_of(&app, &mut upgrade).expect("a trial");
    eventually(
        "it runs",
        || fs::read_link(format!("/proc/{}/exe", trial.pid)).unwrap_or_default(),
        |exe| exe.ends_with("program"),
    );
    let busy = fs::OpenOptions::new().write(true).open(&binary).map(drop);
    let busy = busy.expect_err("it is being executed");
    assert_eq!(busy.kind(), std::io::ErrorKind::ExecutableFileBusy);
    assert_eq!(upgrade.end().code(), Some(13));
}

/// Passes its trial, and then gives everything back.
const GIVES_BACK: &str = "
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(int count, char **words) {
  int pid, state, old; char text[256], path[64];
  if (count > 1 && !strcmp(words[1], \"upgrade-check\")) return execv(\"REAL\", words);
  if (sscanf(getenv(\"POLYFORK_STATE\"), \"%d:%d:%d\", &pid, &state, &old) != 3) return 1;
  snprintf(text, sizeof text, \"%d:%d:%d:it changed its mind\", pid, state, old);
  setenv(\"POLYFORK_STATE\", text, 1);
  snprintf(path, sizeof path, \"/proc/self/fd/%d\", old);
  return execv(path, words);
}";

#[test]
fn a_new_image_that_gives_everything_back_leaves_the_old_one_in_its_place() {
    let name = "a_new_image_that_gives_everything_back_leaves_the_old_one_in_its_place";
    undisturbed(|app| {
        let real = binary();
        let source = GIVES_BACK.replace("REAL", real.to_str().expect("a path"));
        let Some(shim) = program(name, app.desk.place.path(), &source) else { return };
        let before = super::app::workers(&app.status());
        let told = app.try_upgrade(&shim, &[]);
        assert_eq!(told.code, Some(13), "{told:?}");
        assert!(told.err.contains("it changed its mind"), "{told:?}");
        assert_eq!(before, super::app::workers(&app.status()));
        let exe = fs::read_link(format!("/proc/{}/exe", app.pid)).expect("exe");
        assert_eq!(exe, real, "the binary before runs");
        assert_eq!(app.status()["busy"], serde_json::Value::Null);
    });
}
