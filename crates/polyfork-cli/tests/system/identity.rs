//! `--user` and `--umask`: who runs it, what they may, and whose files are whose.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::process::Signal;
use serde_json::Value;

use super::desk::{Desk, pidfd, read, signal};
use super::support::{Events, command, ended, get, skip};

const NOBODY: u32 = 65534;

/// Tells who it is, and makes a file.
const WHO: &str = "
const fs = require('fs');
require('http').createServer((request, response) => {
  fs.writeFileSync('work/made-' + process.pid, '');
  const status = fs.readFileSync('/proc/self/status', 'utf8').split('\\n').map(line => line.split(':\\t'));
  response.end(JSON.stringify({
    ids: [process.getuid(), process.geteuid(), process.getgid(), process.getegid()],
    groups: process.getgroups(), home: process.env.HOME, user: process.env.USER,
    runtime: process.env.XDG_RUNTIME_DIR, status: Object.fromEntries(status),
  }));
}).listen(Number(process.env.PORT), '127.0.0.1');
";

/// Whether another user can reach this program at all.
fn is_open_to_all(path: &Path) -> bool {
    let all =
        |path: &Path| fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o001 != 0);
    path.ancestors().all(all)
}

fn can_become_nobody(test: &str) -> bool {
    if !rustix::process::geteuid().is_root() {
        skip(test, "needs root");
        return false;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let node =
        std::env::split_paths(&path).map(|folder| folder.join("node")).find(|node| node.exists());
    let node = node.and_then(|node| fs::canonicalize(node).ok());
    let open = node.is_some_and(|node| is_open_to_all(&node));
    if !open || !is_open_to_all(Path::new(env!("CARGO_BIN_EXE_polyfork"))) {
        skip(test, "another user cannot reach the programs of this test");
        return false;
    }
    true
}

/// A port below 1024 that nobody has. No two tests get the same one.
fn low_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(999);
    let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let mut ports = std::iter::repeat_with(|| NEXT.fetch_sub(1, Ordering::Relaxed));
    ports.by_ref().take(400).find(free).expect("a low port")
}

fn place(desk: &Desk) {
    desk.place.file("who.js", WHO);
    let work = desk.place.path().join("work");
    fs::create_dir(&work).expect("a folder");
    fs::set_permissions(work, fs::Permissions::from_mode(0o777)).expect("chmod");
}

fn start(desk: &mut Desk, args: &[&str], port: u16) -> Value {
    let args = [&["start", "--json"], args, &["who.js"]].concat();
    let mut start = desk.command(&args);
    start.env("PORT", port.to_string()).env("XDG_RUNTIME_DIR", "/run/user/0");
    let done = ended(start);
    desk.started(&args, done)
}

fn status_of(pid: u64) -> String {
    fs::read_to_string(format!("/proc/{pid}/status")).expect("status")
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status.lines().find_map(|line| line.strip_prefix(name)).expect(name).trim()
}

#[test]
fn another_user_is_taken_on_completely_and_low_ports_are_bound() {
    let test = "another_user_is_taken_on_completely_and_low_ports_are_bound";
    if !can_become_nobody(test) {
        return;
    }
    let mut desk = Desk::new();
    place(&desk);
    let port = low_port();
    let app = start(&mut desk, &["-w", "2", "--user", "nobody", "--umask", "027"], port);
    let address = Desk::address(&app);
    assert_eq!(address.port(), port);
    let who = read(&get(address, "/"));
    let nobody: Value = NOBODY.into();
    assert_eq!(who["ids"], serde_json::json!([NOBODY, NOBODY, NOBODY, NOBODY]), "{who}");
    assert_eq!(who["groups"], serde_json::json!([nobody]), "{who}");
    assert_eq!((&who["user"], &who["runtime"]), (&"nobody".into(), &Value::Null), "{who}");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(who["status"][set], "0000000000000000", "{set}");
    }
    assert_eq!(who["status"]["NoNewPrivs"], "1");
    // The primary keeps the one right that a later reload to another low port needs.
    let status = status_of(app["pid"].as_u64().unwrap());
    assert_eq!(field(&status, "Uid:"), "65534\t65534\t65534\t65534");
    assert_eq!(field(&status, "Gid:"), "65534\t65534\t65534\t65534");
    assert_eq!(field(&status, "Groups:"), "65534");
    assert_eq!(
        field(&status, "CapPrm:"),
        format!("{:016x}", 1 << 10),
        "CAP_NET_BIND_SERVICE alone"
    );
    assert_eq!(field(&status, "NoNewPrivs:"), "1");
    // Files are theirs, with the modes that were asked for.
    for path in
        [desk.runtime().join("who"), desk.logs().join("who"), desk.logs().join("who/primary.log")]
    {
        assert_eq!(fs::metadata(&path).unwrap().uid(), NOBODY, "{}", path.display());
    }
    let made = fs::read_dir(desk.place.path().join("work")).unwrap().flatten().next().unwrap();
    let made = made.metadata().unwrap();
    assert_eq!((made.uid(), made.mode() & 0o777), (NOBODY, 0o640));
    // It grows, reloads and shrinks on its low port, and takes its turns exactly where root's would.
    desk.did(&["scale", "who", "3"]);
    desk.did(&["reload", "who", "--probation", "0"]);
    desk.did(&["scale", "who", "1"]);
    assert_eq!(read(&get(address, "/"))["ids"][0], NOBODY);
    let exact = &desk.status("who")["listening"][0]["exact"];
    let by_root =
        desk.json(&["doctor", "--json"]).to_string().contains("an eBPF program can be loaded");
    assert_eq!(*exact, by_root);
    desk.did(&["stop", "who"]);
    assert_eq!(desk.listed(), []);
    // The name can be had again, by root and by the user.
    start(&mut desk, &["-w", "1", "--user", "65534:65534"], port);
    desk.did(&["stop", "who"]);
}

#[test]
fn another_user_is_still_taken_on_after_an_upgrade() {
    let test = "another_user_is_still_taken_on_after_an_upgrade";
    if !can_become_nobody(test) {
        return;
    }
    let mut desk = Desk::new();
    place(&desk);
    let port = low_port();
    let app = start(&mut desk, &["-w", "2", "--user", "nobody"], port);
    let address = Desk::address(&app);
    let pid = app["pid"].as_u64().unwrap();
    let rights = || {
        let status = status_of(pid);
        let names = ["Uid:", "Gid:", "Groups:", "CapInh:", "CapPrm:", "CapEff:", "CapAmb:"];
        let names = [&names[..], &["NoNewPrivs:"]].concat();
        names.into_iter().map(|name| field(&status, name).to_owned()).collect::<Vec<_>>()
    };
    let (before, exact) = (rights(), desk.status("who")["listening"][0]["exact"].clone());
    for _ in 0..2 {
        let told = desk.json(&["upgrade", "--json", "who"]);
        assert_eq!(told["result"]["workers"], 2, "{told}");
        assert_eq!(rights(), before);
    }
    // New workers get their places on the low port, and no rights.
    desk.did(&["scale", "who", "3"]);
    desk.did(&["reload", "who", "--probation", "0"]);
    assert_eq!(desk.status("who")["listening"][0]["exact"], exact);
    for _ in 0..3 {
        let who = read(&get(address, "/"));
        assert_eq!(who["ids"], serde_json::json!([NOBODY, NOBODY, NOBODY, NOBODY]), "{who}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(who["status"][set], "0000000000000000", "{set}");
        }
    }
    desk.did(&["stop", "who"]);
}

#[test]
fn in_the_foreground_it_is_the_same_and_root_s_commands_find_it() {
    let test = "in_the_foreground_it_is_the_same_and_root_s_commands_find_it";
    if !can_become_nobody(test) {
        return;
    }
    let desk = Desk::new();
    place(&desk);
    let port = low_port();
    let mut run = desk.command(&["run", "--json", "-w", "1", "--user", "nobody", "who.js"]);
    run.env("PORT", port.to_string());
    let mut cluster = Events::of(run);
    let address = cluster.address();
    cluster.wait_for("ready");
    assert_eq!(read(&get(address, "/"))["ids"][0], NOBODY);
    assert_eq!(desk.listed(), [("who".into(), "ready".into())]);
    desk.did(&["reload", "who", "--probation", "0"]);
    cluster.running.signal(Signal::TERM);
    assert_eq!(cluster.end().0, 0);
}

#[test]
fn who_cannot_be_is_refused_before_anything_runs() {
    let desk = Desk::new();
    let told = desk.refuses(&["run", "--user", "no-such-user-here", "server.js"], 2);
    assert!(told.contains("no such user"), "{told}");
    let told = desk.refuses(&["run", "--user", "root:no-such-group-here", "server.js"], 2);
    assert!(told.contains("no such group"), "{told}");
    let told = desk.refuses(&["run", "--umask", "999", "server.js"], 2);
    assert!(told.contains("--umask"), "{told}");
    if !can_become_nobody("who_cannot_be_is_refused_before_anything_runs") {
        return;
    }
    let polyfork = desk.command(&["run", "--user", "root", "server.js"]);
    let mut other = command("setpriv");
    other.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    other.arg(polyfork.get_program()).args(polyfork.get_args()).current_dir(desk.place.path());
    let told = ended(other);
    assert_eq!(told.code, Some(2), "{told:?}");
    assert!(told.err.contains("only root may become another user"), "{}", told.err);
}

/// What a connection that root made, and that has root's credentials for ever, is asked to do by somebody else.
const DANGEROUS: [&str; 8] = [
    r#"{"verb":"kill"}"#,
    r#"{"verb":"stop","grace_ms":0}"#,
    r#"{"verb":"reload"}"#,
    r#"{"verb":"restart"}"#,
    r#"{"verb":"restart_slot","slot":1}"#,
    r#"{"verb":"scale","to":3}"#,
    r#"{"verb":"upgrade","binary":"/bin/true"}"#,
    r#"{"verb":"status"}"#,
];

/// Root connects and forks; the child, which has the connection, becomes somebody else and asks.
#[test]
fn fault_97_a_connection_passed_on_to_somebody_else() {
    let test = "fault_97_a_connection_passed_on_to_somebody_else";
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    let before = workers(&desk);
    for request in DANGEROUS {
        let mut stream = desk.socket("server");
        // We may ask, on this very connection.
        write(&mut stream, "{\"verb\":\"brief\"}\n");
        assert_eq!(line_of(&mut stream)["ok"], true);
        if !nobody_sends(&stream, &format!("{request}\n")) {
            return skip(test, "may not become another user");
        }
        is_refused_and_closed(stream, request);
    }
    assert_eq!(workers(&desk), before, "nothing was done");
}

/// Root writes the first half, and the child that has become somebody else the second.
#[test]
fn fault_97_half_a_request_of_ours_is_not_ended_by_somebody_else() {
    let test = "fault_97_half_a_request_of_ours_is_not_ended_by_somebody_else";
    let mut desk = Desk::new();
    let app = desk.start(&["-w", "1", "server.js"]);
    let primary = pidfd(app["pid"].as_u64().expect("a pid"));
    let before = workers(&desk);
    let whole = "{\"verb\":\"kill\"}\n";
    // The first byte, the verb, all but the newline.
    for cut in [1, 8, whole.len() - 1] {
        // It comes to read when the first half is there, and when both are.
        for both_wait in [false, true] {
            let mut stream = desk.socket("server");
            let (ours, theirs) = whole.split_at(cut);
            if both_wait {
                signal(&primary, Signal::STOP);
            }
            write(&mut stream, ours);
            if !both_wait {
                // Who asked later is answered: what was there before has been read.
                assert_eq!(workers(&desk), before);
            }
            let sent = nobody_sends(&stream, theirs);
            signal(&primary, Signal::CONT);
            if !sent {
                return skip(test, "may not become another user");
            }
            is_refused_and_closed(stream, theirs);
        }
    }
    // The other way round, what we end is not ours either.
    let mut stream = desk.socket("server");
    assert!(nobody_sends(&stream, "{\"verb\":"));
    // It may be closed before we get to it.
    let _closed = stream.write_all(b"\"kill\"}\n");
    is_refused_and_closed(stream, "a half of somebody else's");
    assert_eq!(workers(&desk), before, "nothing was done");
}

/// The workers of `server`: their numbers and pids.
fn workers(desk: &Desk) -> Vec<(Value, Value)> {
    let status = desk.status("server");
    assert_eq!(status["state"], "ready");
    let workers = status["workers"].as_array().expect("workers");
    workers.iter().map(|worker| (worker["worker"].clone(), worker["pid"].clone())).collect()
}

fn write(stream: &mut UnixStream, text: &str) {
    stream.write_all(text.as_bytes()).expect("written");
}

/// A child with this connection becomes another user and writes to it; false when it may not become one.
fn nobody_sends(stream: &UnixStream, text: &str) -> bool {
    let inherited = stream.try_clone().expect("a copy");
    rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty()).expect("inherited");
    let script =
        "import os, sys; os.write(int(sys.argv[1]), sys.argv[2].encode()); print(os.getuid())";
    let mut other = command("setpriv");
    other.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    other.args(["/usr/bin/python3", "-c", script, &inherited.as_raw_fd().to_string(), text]);
    let done = ended(other);
    if done.err.contains("setpriv") {
        return false;
    }
    assert_eq!((done.code, done.out.trim()), (Some(0), "65534"), "{done:?}");
    true
}

/// Whoever had it is no friend: the last answer says why, and nothing comes after it.
fn is_refused_and_closed(mut stream: UnixStream, request: &str) {
    let answer = line_of(&mut stream);
    assert_eq!(answer["ok"], false, "{request}: {answer}");
    assert_eq!(answer["error"]["code"], "refused", "{request}: {answer}");
    let text = answer["error"]["text"].as_str().expect("a text");
    assert!(text.contains("sent by somebody else"), "{request}: {answer}");
    let mut rest = Vec::new();
    // A reset, if it has not read everything.
    let _reset = stream.read_to_end(&mut rest);
    assert!(rest.is_empty(), "{request}: {rest:?}");
}

fn line_of(stream: &mut UnixStream) -> Value {
    let mut answer = Vec::new();
    let mut byte = [0];
    while answer.last() != Some(&b'\n') {
        assert_eq!(stream.read(&mut byte).expect("a byte"), 1, "an answer");
        answer.push(byte[0]);
    }
    read(std::str::from_utf8(&answer).expect("text"))
}
