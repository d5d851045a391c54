//! Rows of the fault matrix about runtime folders, control sockets, logs and secrets; the number is in the name.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::desk::{Desk, eventually, is_over, pidfd, read, shell, signal};
use super::support::{Ended, Events, Running, command, ended, get, skip};

fn is_well(desk: &Desk, name: &str) {
    assert_eq!(desk.status(name)["state"], "ready");
}

/// Descriptors that a process has open.
fn open_files(pid: u64) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").count()
}

/// Memory of its own in KiB, without the pages of its code, which come and go.
fn own_kib(pid: u64) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("RssAnon");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}

/// Sends something, says that this was all, and reads what comes back.
fn exchange(mut stream: UnixStream, bytes: &[u8]) -> String {
    let _sent_away = stream.write_all(bytes);
    let _sent_away = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _reset = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// A file system of 64 KiB; it goes with the guard.
struct Tiny(PathBuf);

impl Tiny {
    fn mount(desk: &Desk, test: &str) -> Option<Tiny> {
        let path = desk.place.path().join("tiny");
        fs::create_dir(&path).expect("a folder");
        let mut mount = command("mount");
        mount.args(["-t", "tmpfs", "-o", "size=64k,mode=700", "polyfork-test"]).arg(&path);
        if ended(mount).code == Some(0) {
            return Some(Tiny(path));
        }
        skip(test, "may not mount a small file system");
        None
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let mut umount = command("umount");
        umount.arg("-l").arg(&self.0);
        let _gone = ended(umount);
    }
}

#[test]
fn fault_53_disk_full_for_logs() {
    let mut desk = Desk::new();
    let Some(tiny) = Tiny::mount(&desk, "fault_53_disk_full_for_logs") else { return };
    desk.place.file(
        "talk.js",
        "let n = 0;
         require('http').createServer((request, response) => {
           for (let i = 0; i < 100; i++) console.log('line ' + n++ + ' ' + 'x'.repeat(90));
           response.end('' + n);
         }).listen(0, '127.0.0.1');",
    );
    let app = desk.start(&["-w", "1", "--log-dir", tiny.0.to_str().unwrap(), "talk.js"]);
    let talk = || get(Desk::address(&app), "/").parse::<u64>().unwrap();
    let written = (0..30).fold(0, |_, _| talk());
    let lost = eventually(
        "lines are counted",
        || desk.status("talk")["log_lines_lost"].as_u64().unwrap(),
        |lost| *lost > 1000,
    );
    is_well(&desk, "talk");
    println!("{written} lines written, {lost} did not fit");
    // Somebody makes room.
    let log = tiny.0.join("talk/1.log");
    fs::remove_file(&log).unwrap();
    let last = format!("line {} ", talk() - 1);
    let content = || fs::read_to_string(&log).unwrap_or_default();
    let text = eventually("lines are written again", content, |text| text.contains(&last));
    assert!(text.contains("lines are missing here: No space left on device"), "{text:.300}");
    assert!(text.ends_with('\n') && text.lines().all(|line| line.len() < 200), "no line is torn");
    desk.did(&["stop", "talk"]);
}

#[test]
fn fault_54_disk_full_for_state() {
    let desk = Desk::new();
    let Some(tiny) = Tiny::mount(&desk, "fault_54_disk_full_for_state") else { return };
    fs::write(tiny.0.join("ballast"), vec![0; 1 << 20]).expect_err("it is full");
    let mut start = desk.command(&["start", "-w", "1", "server.js"]);
    start.env("POLYFORK_RUNTIME_DIR", &tiny.0);
    let told = ended(start);
    assert_eq!(told.code, Some(14), "{told:?}");
    assert!(told.err.contains("No space left on device"), "{}", told.err);
    let left: Vec<_> = fs::read_dir(&tiny.0).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, ["ballast"], "nothing empty stays behind");
    // In the foreground the program is worth more than its card.
    let mut run = desk.command(&["run", "--json", "-w", "1", "server.js"]);
    run.env("POLYFORK_RUNTIME_DIR", &tiny.0);
    let mut cluster = Events::of(run);
    cluster.wait_for("ready");
    cluster.running.signal(Signal::TERM);
    assert_eq!(cluster.end().0, 0);
}

#[test]
fn fault_56_two_hundred_workers_in_the_background() {
    let mut desk = Desk::new();
    desk.place.file("idle.sh", "exec sleep 600");
    let options = ["-w", "200", "--ready", "delay=10ms", "--name", "many"];
    let app = desk.start(&[&options[..], &["--", "sh", "idle.sh"]].concat());
    assert_eq!(app["workers_ready"], 200);
    let status = desk.status("many");
    assert_eq!(status["workers"].as_array().unwrap().len(), 200);
    let open = open_files(app["pid"].as_u64().unwrap());
    let memory = status["primary"]["resident_bytes"].as_u64().unwrap() >> 10;
    println!("200 workers: {open} descriptors, {memory} KiB");
    assert!(open < 200 * 5 + 50, "{open}");
    assert_eq!(desk.json(&["stop", "--json", "many"])["result"]["outcome"], "stopped");
}

/// The number in the card is somebody else's by now.
#[test]
fn fault_78_a_stale_card_names_a_living_stranger() {
    let mut desk = Desk::new();
    let app = desk.start(&["-w", "1", "server.js"]);
    let primary = pidfd(app["pid"].as_u64().unwrap());
    signal(&primary, Signal::KILL);
    assert!(is_over(&primary));
    let mut sleep = command("sleep");
    sleep.arg("600");
    let mut stranger = Running::start(sleep);
    let card = desk.runtime().join("server/card.json");
    let mut text = read(&fs::read_to_string(&card).unwrap());
    text["pid"] = stranger.pid().into();
    fs::write(&card, text.to_string()).unwrap();
    assert_eq!(desk.listed(), [("server".into(), "gone".into())]);
    desk.refuses(&["status", "server"], 10);
    desk.refuses(&["restart", "server"], 10);
    desk.did(&["kill", "server"]);
    assert_eq!(desk.listed(), []);
    let stat = fs::read_to_string(format!("/proc/{}/stat", stranger.pid())).unwrap();
    assert!(stat.contains(") S "), "nobody touched it: {stat}");
    stranger.signal(Signal::KILL);
    stranger.end();
}

#[test]
fn fault_95_another_user() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    fs::set_permissions(desk.place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let socket = desk.runtime().join("server/control");
    // 42: not let in. 43: let in and sent away without a word.
    let script = format!(
        "import socket, sys
s = socket.socket(socket.AF_UNIX)
try:
  s.connect({:?})
except PermissionError:
  sys.exit(42)
try:
  s.sendall(b'{{\"verb\":\"kill\"}}\\n')
  got = s.recv(100)
except OSError:
  got = b''
sys.exit(43 if got == b'' else 1)
",
        socket.to_str().unwrap()
    );
    let as_nobody = || -> Ended {
        let mut other = command("setpriv");
        other.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        // Not the first in PATH, which may be in somebody's home.
        other.args(["/usr/bin/python3", "-c", &script]);
        ended(other)
    };
    let refused = as_nobody();
    if refused.code != Some(42) && refused.err.contains("setpriv") {
        return skip(
            "fault_95_another_user",
            "may not become another user, or no /usr/bin/python3",
        );
    }
    assert_eq!(refused.code, Some(42), "by the folder: {refused:?}");
    // With the way open for all, the credentials still say no.
    let open = [(desk.runtime(), 0o755), (desk.runtime().join("server"), 0o755), (socket, 0o777)];
    for (path, mode) in open {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let asked = as_nobody();
    assert_eq!(asked.code, Some(43), "by the credentials: {asked:?}");
    // And we ourselves use no folder that others may enter.
    let told = desk.refuses(&["status", "server"], 14);
    assert!(told.contains("chmod 700"), "{told}");
    fs::set_permissions(desk.runtime(), fs::Permissions::from_mode(0o700)).unwrap();
    is_well(&desk, "server");
}

#[test]
fn fault_96_a_socket_made_under_umask_0() {
    let mut desk = Desk::new();
    let args = ["start", "--json", "-w", "1", "server.js"];
    let done = shell(&desk, "umask 000; exec \"$@\"", &args);
    desk.started(&args, done);
    let mode = |path: PathBuf| fs::metadata(path).unwrap().mode() & 0o7777;
    let runtime = desk.runtime();
    assert_eq!(mode(runtime.clone()), 0o700);
    assert_eq!(mode(runtime.join("server")), 0o700);
    for file in ["control", "lock", "card.json"] {
        assert_eq!(mode(runtime.join("server").join(file)), 0o600, "{file}");
    }
    assert_eq!(mode(desk.logs().join("server")), 0o700);
    assert_eq!(mode(desk.logs().join("server/primary.log")), 0o600);
}

#[test]
fn fault_99_links_where_folders_and_files_are_wanted() {
    let mut desk = Desk::new();
    let victim = desk.place.file("victim", "precious");
    let elsewhere = desk.place.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let private = |path: &Path| {
        fs::create_dir(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
    };
    let start = ["start", "-w", "1", "server.js"];
    let (runtime, logs) = (desk.runtime(), desk.logs());
    // The runtime folder itself.
    symlink(&elsewhere, &runtime).unwrap();
    let told = desk.refuses(&start, 14);
    assert!(told.contains("a link or a file"), "{told}");
    desk.refuses(&["ls"], 14);
    fs::remove_file(&runtime).unwrap();
    // The app's folder, then its lock.
    private(&runtime);
    symlink(&elsewhere, runtime.join("server")).unwrap();
    let told = desk.refuses(&start, 14);
    assert!(told.contains("in the way"), "{told}");
    fs::remove_file(runtime.join("server")).unwrap();
    private(&runtime.join("server"));
    symlink(&victim, runtime.join("server/lock")).unwrap();
    desk.refuses(&start, 14);
    fs::remove_file(runtime.join("server/lock")).unwrap();
    // The log folder, then a file in it.
    private(&logs);
    symlink(&elsewhere, logs.join("server")).unwrap();
    let told = desk.refuses(&start, 14);
    assert!(told.contains("log folder"), "{told}");
    fs::remove_file(logs.join("server")).unwrap();
    private(&logs.join("server"));
    symlink(&victim, logs.join("server/primary.log")).unwrap();
    let told = desk.refuses(&start, 14);
    assert!(told.contains("a link is in the way"), "{told}");
    fs::remove_file(logs.join("server/primary.log")).unwrap();
    // What is written anew replaces a link and does not follow it.
    if !runtime.join("server").exists() {
        private(&runtime.join("server"));
    }
    for name in ["card.json", "card.new", "control"] {
        symlink(&victim, runtime.join("server").join(name)).unwrap();
    }
    // A slot's log that cannot be opened loses lines, which are counted; the app runs.
    symlink(&victim, logs.join("server/1.log")).unwrap();
    desk.place.file("server.js", &format!("console.log('words');{}", super::support::SERVER));
    desk.start(&start[1..]);
    eventually(
        "a line is lost",
        || desk.status("server")["log_lines_lost"].clone(),
        |lost| *lost == 1,
    );
    is_well(&desk, "server");
    desk.did(&["stop", "server"]);
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
}

#[test]
fn fault_100_twenty_starts_at_once() {
    let mut desk = Desk::new();
    desk.place.file("idle.sh", "exec sleep 600");
    let options = ["start", "--json", "-w", "1", "--ready", "delay=10ms", "--name", "one"];
    let args = [&options[..], &["--", "sh", "idle.sh"]].concat();
    let starting: Vec<Running> = (0..20).map(|_| Running::start(desk.command(&args))).collect();
    let mut codes = Vec::new();
    for mut start in starting {
        let mut out = String::new();
        start.take_out().read_to_string(&mut out).unwrap();
        let code = start.end().code().unwrap();
        if code == 0 {
            desk.adopt(&read(&out));
        }
        codes.push(code);
    }
    codes.sort_unstable();
    println!("{codes:?}");
    assert_eq!(codes, [&[0][..], &[11; 19]].concat());
    is_well(&desk, "one");
}

#[test]
fn fault_101_a_socket_left_by_sigkill() {
    let mut desk = Desk::new();
    for _ in 0..3 {
        let app = desk.start(&["-w", "1", "server.js"]);
        let primary = pidfd(app["pid"].as_u64().unwrap());
        signal(&primary, Signal::KILL);
        assert!(is_over(&primary));
        assert!(desk.runtime().join("server/control").exists());
        assert_eq!(desk.listed(), [("server".into(), "gone".into())]);
    }
    desk.start(&["-w", "1", "server.js"]);
    is_well(&desk, "server");
}

#[test]
fn fault_102_a_path_of_more_than_108_bytes() {
    let mut desk = Desk::new();
    let deep = desk.place.path().join("x".repeat(100)).join("y".repeat(100));
    fs::create_dir_all(&deep).unwrap();
    let deep = deep.join("runtime");
    let name = "n".repeat(64);
    let with = |args: &[&str]| {
        let mut command = desk.command(args);
        command.env("POLYFORK_RUNTIME_DIR", &deep);
        ended(command)
    };
    let started = with(&["start", "--json", "-w", "1", "--name", &name, "server.js"]);
    let status = with(&["status", "--json", &name]);
    let stopped = with(&["stop", &name]);
    assert_eq!(started.code, Some(0), "{started:?}");
    assert_eq!(read(&status.out)["state"], "ready");
    assert_eq!(stopped.code, Some(0), "{stopped:?}");
    let told = desk.refuses(&["start", "--name", &"n".repeat(65), "server.js"], 2);
    assert!(told.contains("1 to 64 bytes"), "{told}");
    desk.start(&["-w", "1", "server.js"]);
}

#[test]
fn fault_103_a_thousand_slow_clients() {
    let mut desk = Desk::new();
    let app = desk.start(&["-w", "1", "server.js"]);
    let pid = app["pid"].as_u64().unwrap();
    let before = open_files(pid);
    let mut slow: Vec<UnixStream> = Vec::new();
    let mut slowest = Duration::ZERO;
    for number in 1..=1000 {
        let mut stream = desk.socket("server");
        // Some are gone by now, to make room.
        let _evicted = stream.write_all(b"{");
        slow.push(stream);
        if number % 100 == 0 {
            for stream in &mut slow {
                let _evicted = stream.write_all(b" ");
            }
            let began = Instant::now();
            is_well(&desk, "server");
            slowest = slowest.max(began.elapsed());
        }
    }
    println!("a command among a thousand slow clients: {} ms at most", slowest.as_millis());
    let open = open_files(pid);
    assert!(open <= before + 66, "{before} descriptors, then {open}");
    eventually("who finishes nothing is sent away", || open_files(pid), |now| *now <= before + 2);
}

#[test]
fn fault_104_garbage_requests() {
    let mut desk = Desk::new();
    let app = desk.start(&["-w", "1", "server.js"]);
    let pid = app["pid"].as_u64().unwrap();
    let before = own_kib(pid);
    let deep = "[".repeat(60_000);
    let wide = format!("{{\"verb\":\"{}\"}}", "x".repeat(60_000));
    let garbage: [&[u8]; 9] = [
        b"",
        b"\n",
        b"\0\0\0\0\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"{\"verb\":\"status\"",
        b"\xff\xfe\xfd\n",
        b"[\"status\"]\n",
        deep.as_bytes(),
        wide.as_bytes(),
    ];
    for bytes in garbage.into_iter().cycle().take(180) {
        for line in exchange(desk.socket("server"), bytes).lines() {
            assert_eq!(read(line)["ok"], false, "{line}");
        }
    }
    // A line without an end, as long as it is taken.
    let mut stream = desk.socket("server");
    let megabyte = vec![b'x'; 1 << 20];
    let taken = (0..1024).take_while(|_| stream.write_all(&megabyte).is_ok()).count();
    println!("of an endless line {taken} MiB were taken; {before} KiB, then {}", own_kib(pid));
    assert!(taken < 8, "{taken} MiB");
    // A client that asks and asks and never reads.
    let mut deaf = desk.socket("server");
    deaf.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let asked = (0..100_000).take_while(|_| deaf.write_all(b"{\"verb\":\"status\"}\n").is_ok());
    println!("{} requests of a client that does not read", asked.count());
    is_well(&desk, "server");
    let after = own_kib(pid);
    assert!(after < before + 4096, "{before} KiB before, {after} KiB after");
}

#[test]
fn fault_106_verbs_that_name_files_or_functions() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    let verbs = [
        "eval",
        "exec",
        "../stop",
        "stop/../kill",
        "__class__",
        "constructor",
        "STOP",
        "stop ",
        "",
        "status\0",
    ];
    for verb in verbs {
        let line =
            serde_json::json!({ "verb": verb, "program": "/bin/sh", "args": ["-c", "exit"] });
        let answer = exchange(desk.socket("server"), format!("{line}\n").as_bytes());
        assert_eq!(read(&answer)["error"]["code"], "unknown_verb", "{verb:?}: {answer}");
    }
    is_well(&desk, "server");
}

#[test]
fn fault_107_patterns_that_take_for_ever() {
    let mut desk = Desk::new();
    let name = "a".repeat(64);
    desk.start(&["-w", "1", "--name", &name, "server.js"]);
    let pattern = format!("{}b", "a*".repeat(2000));
    desk.refuses(&["status", &pattern], 10);
    desk.did(&["logs", &name, "--grep", &"(a+)+".repeat(1000)]);
}

#[test]
fn fault_108_secrets() {
    const CANARY: &str = "canary-7f3b1c";
    let mut desk = Desk::new();
    let secret = format!("SECRET={CANARY}");
    let password = format!("--password={CANARY}");
    let options = ["start", "--json", "-w", "1", "--name", "shop", "--env", &secret];
    let args = [&options[..], &["server.js", &password]].concat();
    let mut start = desk.command(&args);
    start.env("API_TOKEN", CANARY);
    let started = ended(start);
    let mut seen = vec![started.out.clone(), started.err.clone()];
    desk.started(&args, started);
    for verb in [
        &["ls"][..],
        &["ls", "--json"],
        &["status", "shop"],
        &["status", "--json", "shop"],
        &["logs", "shop", "-n", "all"],
        &["logs", "shop", "--json"],
        &["restart", "shop"],
        &["scale", "shop", "2"],
    ] {
        let told = desk.does(verb);
        assert_eq!(told.code, Some(0), "{told:?}");
        seen.extend([told.out, told.err]);
    }
    for folder in [desk.runtime().join("shop"), desk.logs().join("shop")] {
        let files = fs::read_dir(folder).unwrap().flatten();
        seen.extend(files.map(|file| fs::read_to_string(file.path()).unwrap_or_default()));
    }
    for text in seen {
        assert!(!text.contains(CANARY), "{text}");
    }
}
