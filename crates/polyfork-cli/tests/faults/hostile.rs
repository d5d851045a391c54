//! Section D of the fault matrix: a worker that writes what it must not. It is replaced; nothing else happens.

use std::fs;

use super::cluster::{Cluster, descriptors, eventually, nothing_failed, report};
use super::load::{Class, Load, attempt, count};

/// A stock server that does something hostile to its channel (descriptor 3) when it is asked to.
const APP: &str = r#"
const fs = require('fs'), http = require('http'), { spawnSync } = require('child_process');
const raw = (bytes) => {
  bytes = Buffer.from(bytes);
  for (let at = 0; at < bytes.length;) {
    try { at += fs.writeSync(3, bytes, at, Math.min(bytes.length - at, 65536)); }
    catch (e) { if (e.code !== 'EAGAIN') return; Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1); }
  }
};
const line = (value) => raw(JSON.stringify(value) + '\n');
// A helper that can attach any descriptors to any bytes.
const python = (program) => spawnSync('python3', ['-c',
  'import socket,array,os,time\ns=socket.socket(fileno=3)\n' +
  'def give(text,fds):\n' +
  '  while True:\n' +
  '    try: return s.sendmsg([text.encode()],[(socket.SOL_SOCKET,socket.SCM_RIGHTS,array.array("i",fds))])\n' +
  '    except (BlockingIOError, OSError) as e:\n' +
  '      if e.errno not in (11, 109): raise\n' +
  '      time.sleep(0.001)\n' +
  'null=lambda: os.open("/dev/null",os.O_RDONLY)\n' + program], { stdio: ['ignore', 'inherit', 'inherit', 3] });
const envelope = '{"cmd":"NODE_HANDLE","type":"net.Native","msg":{"x":1}}';
const attacks = {
  malformed: () => raw('{"a":\n'),
  empty: () => raw('\n'),
  garbage: () => raw(Buffer.concat([require('crypto').randomBytes(5000), Buffer.from('\n')])),
  deep: () => raw('['.repeat(1e6) + ']'.repeat(1e6) + '\n'),
  deep_100: () => raw('['.repeat(100) + ']'.repeat(100) + '\n'),
  endless: () => raw(Buffer.alloc(80 << 20, 'x')),
  wrong_ack: () => line({ cmd: 'NODE_CLUSTER', ack: 999999, accepted: true }),
  unsolicited_ack: () => line({ cmd: 'NODE_HANDLE_ACK' }),
  unsolicited_nack: () => line({ cmd: 'NODE_HANDLE_NACK' }),
  single_bytes: () => {
    const text = JSON.stringify({ long: 'y'.repeat(200000) }) + '\n';
    for (const c of text) raw(c);
  },
  truncated: () => { raw('{"half":"'); process.exit(5); },
  foreign_internal: () => {
    line({ cmd: 'NODE_CLUSTER', act: 'newconn', key: 'polyfork:1', seq: 1 });
    line({ cmd: 'NODE_CLUSTER', act: 'close', key: 'polyfork:99' });
    line({ cmd: 'NODE_CLUSTER', act: 'disconnect' });
    line({ cmd: 'NODE_CLUSTER', act: 'listening', address: null, port: 'x', addressType: {} });
    line({ cmd: 'NODE_CLUSTER', act: 'queryServer', seq: -1, index: 1e300, port: 1e9, addressType: 4 });
    line({ cmd: 'NODE_CLUSTER', act: 'queryServer', seq: 7, fd: 0, addressType: null });
    line({ cmd: 'NODE_CLUSTER', ack: 1e300 });
    line({ cmd: 'NODE_SOMETHING' });
    line({ __proto__: null, cmd: 'NODE_SOCKET_GET_COUNT', key: 5 });
  },
  plain_with_fds: () => python('[give(\'{"plain":1}\\n\',[null()]) for i in range(500)]'),
  handle_without_fd: () => raw((envelope + '\n').repeat(3)),
  two_fds: () => python(`give('${envelope}\\n',[null(),null()])`),
  file_as_socket: () => python(`give('${envelope}\\n',[null()])`),
  many_fds: () => python('fds=[null()]*253\n[give("x",fds) for i in range(40)]\ngive("\\n",fds)'),
};
http.createServer((request, response) => {
  const url = new URL(request.url, 'http://x');
  const kind = url.searchParams.get('kind');
  response.end(JSON.stringify({ pid: process.pid }));
  if (kind) setImmediate(attacks[kind]);
}).listen(0, '127.0.0.1');
"#;

fn start(mechanism: &str) -> Cluster {
    Cluster::start(&["--mechanism", mechanism, "-w", "2", "--restart-limit", "1000/30s"], APP)
}

fn attack(cluster: &Cluster, kind: &str) -> u32 {
    let (class, body) = attempt(cluster.address, &format!("/?kind={kind}"));
    assert_eq!(class, Class::Ok, "{kind}");
    let pid = body.split("\"pid\":").nth(1).and_then(|rest| rest.split('}').next());
    pid.and_then(|pid| pid.parse().ok()).expect("a pid")
}

/// The attacker is replaced for breaking the rules of its channel, and everybody else goes on.
fn is_replaced(cluster: &mut Cluster, kind: &str) {
    let before = cluster.baseline();
    let pid = attack(cluster, kind);
    let load = Load::start(cluster.address, 4, "/");
    let exit = cluster.wait(|e| e["event"] == "exit" && e["pid"] == pid);
    assert_eq!(exit["reason"], "protocol_fault", "{kind}: {exit}");
    let slot = exit["slot"].as_u64().expect("slot");
    cluster.wait_replaced(slot, pid);
    load.wait_for_ok(20);
    let counts = load.stop();
    report(kind, &counts);
    // Only what the attacker itself was serving when it was ended.
    assert_eq!(count(&counts, Class::Refused), 0, "{kind}: {counts:?}");
    cluster.check(&before);
}

/// The attack changes nothing at all, for nobody.
fn is_harmless(cluster: &mut Cluster, kind: &str) {
    let before = cluster.baseline();
    let load = Load::start(cluster.address, 4, "/");
    let pid = attack(cluster, kind);
    load.wait_for_ok(50);
    nothing_failed(kind, &load.stop());
    assert!(cluster.workers.values().any(|worker| *worker == pid), "{kind}: it stays");
    cluster.check(&before);
}

#[test]
fn fault_59_malformed_lines() {
    let mut cluster = start("kernel");
    for kind in ["malformed", "empty", "garbage"] {
        is_replaced(&mut cluster, kind);
    }
    cluster.stop();
}

#[test]
fn fault_61_nested_brackets() {
    let mut cluster = start("handoff");
    is_replaced(&mut cluster, "deep");
    cluster.stop();
    // The limit can be set, and up to it a message is a message.
    let mut cluster = start("kernel");
    attack(&cluster, "deep_100");
    cluster.wait_for("message");
    cluster.stop();
    let options = ["-w", "2", "--max-depth", "50", "--restart-limit", "1000/30s"];
    let mut cluster = Cluster::start(&options, APP);
    is_replaced(&mut cluster, "deep_100");
    cluster.stop();
}

/// 80 MB without an end: closed at the limit of 64 MiB, and never much more than that in memory.
#[test]
fn fault_62_message_without_end() {
    let mut cluster = start("kernel");
    is_replaced(&mut cluster, "endless");
    let status = fs::read_to_string(format!("/proc/{}/status", cluster.pid())).expect("status");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    println!("peak {peak} KiB");
    assert!(peak < 2 * 64 * 1024, "{peak} KiB at the highest");
    cluster.stop();
}

/// One byte at a time gives the same message as all at once.
#[test]
fn fault_63_single_bytes() {
    let mut cluster = start("kernel");
    let before = cluster.baseline();
    let pid = attack(&cluster, "single_bytes");
    let message = cluster.wait_for("message");
    assert_eq!(message["pid"], pid);
    assert_eq!(message["message"]["long"].as_str().map(str::len), Some(200_000), "whole");
    cluster.check(&before);
    cluster.stop();
}

/// What a worker wrote half is not delivered, and is no fault: it died.
#[test]
fn fault_64_half_a_message_and_death() {
    let mut cluster = start("handoff");
    let pid = attack(&cluster, "truncated");
    let exit = cluster.wait(|e| e["event"] == "exit" && e["pid"] == pid);
    assert_eq!((&exit["reason"], &exit["code"]), (&"exited".into(), &5.into()), "{exit}");
    assert!(cluster.events.seen.iter().all(|e| e["event"] != "message"));
    cluster.stop();
}

#[test]
fn fault_67_descriptors_on_plain_messages_are_closed() {
    let mut cluster = start("kernel");
    let before = cluster.baseline();
    attack(&cluster, "plain_with_fds");
    for _ in 0..500 {
        cluster.wait_for("message");
    }
    cluster.check(&before);
    cluster.stop();
}

/// Answered as Node would: refused without a descriptor, and what came too much or of the wrong kind is closed.
#[test]
fn fault_68_wrong_descriptors() {
    let mut cluster = start("handoff");
    for kind in ["two_fds", "file_as_socket"] {
        is_harmless_to_others(&mut cluster, kind);
    }
    cluster.stop();
}

/// The worker may trip over the answer it provoked; nobody else notices.
fn is_harmless_to_others(cluster: &mut Cluster, kind: &str) {
    let before = cluster.baseline();
    let held = descriptors(cluster.pid());
    attack(cluster, kind);
    let load = Load::start(cluster.address, 4, "/");
    load.wait_for_ok(50);
    let counts = load.stop();
    report(kind, &counts);
    assert_eq!(count(&counts, Class::Refused), 0, "{kind}: {counts:?}");
    while cluster.workers.len() < 2 {
        cluster.wait_for("worker_ready");
    }
    eventually("descriptors", || descriptors(cluster.pid()), |now| *now == held);
    cluster.check(&before);
}

#[test]
fn fault_68_handle_message_without_a_descriptor() {
    let mut cluster = start("kernel");
    is_harmless_to_others(&mut cluster, "handle_without_fd");
    cluster.stop();
}

/// 41 times 253 descriptors with bytes that make no message: all received, all closed.
#[test]
fn fault_69_many_descriptors() {
    let mut cluster = start("kernel");
    is_replaced(&mut cluster, "many_fds");
    cluster.stop();
}

/// On channels descriptors are received by recvmsg alone; a plain read would lose them silently.
#[test]
fn fault_70_channels_are_never_read_by_read() {
    let sources = concat!(env!("CARGO_MANIFEST_DIR"), "/../polyfork/src/cluster");
    for name in ["link.rs", "worker/channel.rs", "worker/reader.rs"] {
        let text = fs::read_to_string(format!("{sources}/{name}")).expect("a source file");
        for call in ["read(fd", "readv(", "try_read", "read_buf", "AsyncRead"] {
            assert!(!text.contains(call), "{name} uses {call}");
        }
    }
}

#[test]
fn fault_09_answers_to_connections_it_does_not_hold() {
    let mut cluster = start("handoff");
    is_replaced(&mut cluster, "wrong_ack");
    cluster.stop();
    // Nothing is on its way that a lie could be mistaken for an answer to.
    let mut cluster = start("kernel");
    for kind in ["unsolicited_ack", "unsolicited_nack"] {
        is_replaced(&mut cluster, kind);
    }
    cluster.stop();
}

/// Internal messages that only a primary may send, that are about somebody else, or that make no sense.
#[test]
fn fault_75_internal_messages_it_may_not_send() {
    for mechanism in ["kernel", "handoff"] {
        let mut cluster = start(mechanism);
        is_harmless(&mut cluster, "foreign_internal");
        cluster.stop();
    }
}

/// A native channel: absurd lengths, unknown frames, garbage.
#[test]
fn fault_58_native_frames() {
    // Honest in slot 2, so that the cluster goes on; the attack is the first thing the other one says.
    let program = r#"#!/usr/bin/env python3
import os, socket, sys, time
fd = int(os.environ['POLYFORK_CHANNEL_FD'])
os.write(fd, bytes.fromhex(sys.argv[1]))
time.sleep(1000)
"#;
    for bytes in [
        "000000800000",
        "ffffffff0000",
        "000000000000",
        "010000000000ff",
        "0400000003007f7f7f7f",
        "05000000fd000000000000",
    ] {
        let place = super::support::Place::new();
        let path = place.file("liar.py", program);
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
        let words =
            ["-w", "1", "--dialect", "native", "--restart-limit", "1/30s", "./liar.py", bytes];
        let mut events = place.events(words);
        let exit = events.wait_for("exit");
        assert_eq!(exit["reason"], "protocol_fault", "{bytes}: {exit}");
        let (code, _) = events.end();
        assert!(matches!(code, 7 | 8), "{bytes}: {code}");
    }
}
