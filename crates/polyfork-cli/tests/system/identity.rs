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

use super::desk::{Desk, read};
use super::support::{Ended, Events, PATIENCE, command, ended, get, skip};

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

/// Root connects, and leaves the connection to somebody else.
#[test]
fn fault_97_a_connection_passed_on_to_somebody_else() {
    let test = "fault_97_a_connection_passed_on_to_somebody_else";
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    let stream = desk.socket("server");
    rustix::io::fcntl_setfd(&stream, rustix::io::FdFlags::empty()).unwrap();
    let asks = |verb: &str| -> Ended {
        let script = format!(
            "import socket, sys
s = socket.socket(fileno={})
s.sendall(b'{{\"verb\":\"{verb}\"}}\\n')
sys.stdout.write(s.recv(65536).decode())
s.detach()
",
            stream.as_raw_fd()
        );
        let mut other = command("setpriv");
        other.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        other.args(["/usr/bin/python3", "-c", &script]);
        ended(other)
    };
    // We may ask, on this very connection.
    let mut ours = stream.try_clone().unwrap();
    assert_eq!(line_of(&mut ours, b"{\"verb\":\"brief\"}\n")["ok"], true);
    let told = asks("kill");
    if told.err.contains("setpriv") {
        return skip(test, "may not become another user");
    }
    assert_eq!(told.code, Some(0), "{told:?}");
    let answer = read(&told.out);
    assert_eq!((&answer["ok"], &answer["error"]["code"]), (&false.into(), &"refused".into()));
    assert!(answer["error"]["text"].as_str().unwrap().contains("sent by somebody else"));
    // Half a request of ours cannot be ended by somebody else either.
    let mut half = desk.socket("server");
    half.write_all(b"{\"verb\":").unwrap();
    drop(half);
    assert_eq!(desk.status("server")["state"], "ready", "nothing was done");
    // The connection is closed: whoever had it is no friend.
    let mut rest = Vec::new();
    let _reset = ours.read_to_end(&mut rest);
    assert!(rest.is_empty(), "{rest:?}");
}

fn line_of(stream: &mut UnixStream, request: &[u8]) -> Value {
    stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    stream.write_all(request).expect("ask");
    let mut answer = Vec::new();
    let mut byte = [0];
    while answer.last() != Some(&b'\n') {
        assert_eq!(stream.read(&mut byte).expect("a byte"), 1, "an answer");
        answer.push(byte[0]);
    }
    read(std::str::from_utf8(&answer).expect("text"))
}
