//! Bytes and descriptors through a channel, and what kind of thing arrives.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

mod common;

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use common::*;
use polyfork_sys::channel::{self, FdKind, MAX_FDS, Received};
use rustix::fs::OFlags;
use rustix::process::{Resource, Rlimit};

fn error_kind<T: std::fmt::Debug>(result: io::Result<T>) -> io::ErrorKind {
    result.unwrap_err().kind()
}

fn receive(socket: BorrowedFd<'_>, fds: &mut VecDeque<OwnedFd>) -> (Vec<u8>, Received) {
    let mut buffer = [0; 256];
    let received = channel::receive(socket, &mut buffer, fds).unwrap();
    (buffer[..received.len].to_vec(), received)
}

#[test]
fn both_ends_are_close_on_exec_and_only_ours_does_not_block() {
    let (ours, theirs) = channel::pair().unwrap();
    for (end, nonblocking) in [(&ours, true), (&theirs, false)] {
        let flags = rustix::io::fcntl_getfd(end).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        let flags = rustix::fs::fcntl_getfl(end).unwrap();
        assert_eq!(flags.contains(OFlags::NONBLOCK), nonblocking);
    }
    channel::set_nonblocking(ours.as_fd(), false).unwrap();
    assert!(!rustix::fs::fcntl_getfl(&ours).unwrap().contains(OFlags::NONBLOCK));
}

#[test]
fn descriptors_arrive_in_order_with_their_bytes_and_close_on_exec() {
    let (ours, theirs) = channel::pair().unwrap();
    let pipes: Vec<_> = (0..3).map(|_| pipe()).collect();
    let readers: Vec<_> = pipes.iter().map(|(reader, _)| reader.as_fd()).collect();
    assert_eq!(channel::send(ours.as_fd(), b"one", &readers[..2]).unwrap(), 3);
    assert_eq!(channel::send(ours.as_fd(), b"two", &readers[2..]).unwrap(), 3);
    assert_eq!(channel::send(ours.as_fd(), b"three", &[]).unwrap(), 5);
    let mut fds = VecDeque::new();
    // Never merged past a message with descriptors.
    assert_eq!(receive(theirs.as_fd(), &mut fds).0, b"one");
    assert_eq!(fds.len(), 2);
    let rest = receive(theirs.as_fd(), &mut fds).0;
    assert_eq!(fds.len(), 3);
    assert!(rest.starts_with(b"two"));
    for ((_, writer), fd) in pipes.iter().zip(&fds) {
        let flags = rustix::io::fcntl_getfd(fd).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        rustix::io::write(writer, b"x").unwrap();
        let mut byte = [0];
        rustix::io::read(fd, &mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }
}

#[test]
fn a_full_message_carries_253_and_more_are_refused_before_any_call() {
    let (ours, theirs) = channel::pair().unwrap();
    let null = File::open("/dev/null").unwrap();
    let many = vec![null.as_fd(); MAX_FDS + 1];
    let error = channel::send(ours.as_fd(), b"x", &many).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert!(error.to_string().contains("254 descriptors"), "{error}");
    assert_eq!(channel::send(ours.as_fd(), b"x", &many[1..]).unwrap(), 1);
    let mut fds = VecDeque::new();
    let (bytes, received) = receive(theirs.as_fd(), &mut fds);
    assert_eq!((bytes, received.truncated, fds.len()), (b"x".to_vec(), false, MAX_FDS));
}

#[test]
fn descriptors_without_a_byte_are_refused_because_they_would_vanish() {
    let (ours, theirs) = channel::pair().unwrap();
    let null = File::open("/dev/null").unwrap();
    let sent = channel::send(ours.as_fd(), b"", &[null.as_fd()]);
    assert_eq!(error_kind(sent), io::ErrorKind::InvalidInput);
    let empty = channel::receive(theirs.as_fd(), &mut [], &mut VecDeque::new());
    assert_eq!(error_kind(empty), io::ErrorKind::InvalidInput);
}

#[test]
fn an_empty_and_a_full_channel_say_would_block_and_a_closed_one_ends() {
    let (ours, theirs) = channel::pair().unwrap();
    let mut fds = VecDeque::new();
    let nothing = channel::receive(ours.as_fd(), &mut [0; 8], &mut fds);
    assert_eq!(error_kind(nothing), io::ErrorKind::WouldBlock);
    let block = [0; 65536];
    let full = loop {
        if let Err(error) = channel::send(ours.as_fd(), &block, &[]) {
            break error;
        }
    };
    assert_eq!(full.kind(), io::ErrorKind::WouldBlock);

    let (ours, theirs_closed) = channel::pair().unwrap();
    drop(theirs_closed);
    let end = channel::receive(ours.as_fd(), &mut [0; 8], &mut fds).unwrap();
    assert_eq!(end, Received { len: 0, truncated: false });
    // An error and no SIGPIPE: put the default back to be sure in a process of its own.
    assert_eq!(error_kind(channel::send(ours.as_fd(), b"x", &[])), io::ErrorKind::BrokenPipe);
    drop(theirs);
}

#[test]
fn sending_to_a_closed_channel_raises_no_signal() {
    let mut command = helper("helper_sends_to_a_closed_channel");
    command.parent_death_signal(Some(rustix::process::Signal::KILL));
    assert!(command.spawn().unwrap().wait().unwrap().success());
}

#[test]
#[ignore = "run by sending_to_a_closed_channel_raises_no_signal"]
fn helper_sends_to_a_closed_channel() {
    // SAFETY: the default action for a signal that should not come.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let (ours, theirs) = channel::pair().unwrap();
    drop(theirs);
    assert_eq!(error_kind(channel::send(ours.as_fd(), b"x", &[])), io::ErrorKind::BrokenPipe);
}

#[test]
fn a_receiver_at_its_descriptor_limit_is_told_what_it_lost() {
    assert!(helper("helper_receives_at_its_limit").spawn().unwrap().wait().unwrap().success());
}

#[test]
#[ignore = "run by a_receiver_at_its_descriptor_limit_is_told_what_it_lost"]
fn helper_receives_at_its_limit() {
    let (ours, theirs) = channel::pair().unwrap();
    let null = File::open("/dev/null").unwrap();
    channel::send(ours.as_fd(), b"abc", &[null.as_fd(); 10]).unwrap();
    // The numbers are given out in order, so this leaves room for three.
    let next = rustix::io::dup(&null).unwrap().as_raw_fd() as u64;
    let limit = Rlimit { current: Some(next + 3), maximum: Some(next + 3) };
    rustix::process::setrlimit(Resource::Nofile, limit).unwrap();
    let mut fds = VecDeque::new();
    let (bytes, received) = receive(theirs.as_fd(), &mut fds);
    assert_eq!((bytes.as_slice(), received.truncated, fds.len()), (&b"abc"[..], true, 3));
}

#[test]
fn every_kind_is_known_by_looking_at_it() {
    let folder = tempfile::tempdir().unwrap();
    let kind = |fd: BorrowedFd<'_>| channel::kind(fd).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    assert_eq!(kind(listener.as_fd()), FdKind::TcpListener);
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    assert_eq!(kind(stream.as_fd()), FdKind::TcpStream);
    assert_eq!(kind(UdpSocket::bind("127.0.0.1:0").unwrap().as_fd()), FdKind::Udp);
    let unix = UnixListener::bind(folder.path().join("socket")).unwrap();
    assert_eq!(kind(unix.as_fd()), FdKind::UnixListener);
    let (one, _other) = UnixStream::pair().unwrap();
    assert_eq!(kind(one.as_fd()), FdKind::UnixStream);
    assert_eq!(kind(UnixDatagram::unbound().unwrap().as_fd()), FdKind::UnixDatagram);
    let (reader, writer) = pipe();
    assert_eq!((kind(reader.as_fd()), kind(writer.as_fd())), (FdKind::Fifo, FdKind::Fifo));
    assert_eq!(kind(File::open("/etc/passwd").unwrap().as_fd()), FdKind::File);
    assert_eq!(kind(File::open("/dev/null").unwrap().as_fd()), FdKind::Other);
    assert_eq!(kind(File::open("/").unwrap().as_fd()), FdKind::Other);
}

/// A channel end sent over itself makes a cycle that only the kernel can collect: no process has a descriptor for
/// it any more. Sockets are known by their inode, so other programs' do not disturb the count.
#[test]
fn fault_73_channels_that_carry_themselves_are_collected() {
    let mut inodes = HashSet::new();
    for _ in 0..2000 {
        let (ours, theirs) = channel::pair().unwrap();
        inodes.extend([&ours, &theirs].map(|end| rustix::fs::fstat(end).unwrap().st_ino));
        channel::send(ours.as_fd(), b"x", &[ours.as_fd(), theirs.as_fd()]).unwrap();
        channel::send(theirs.as_fd(), b"x", &[ours.as_fd(), theirs.as_fd()]).unwrap();
    }
    until("the kernel has collected every socket", || {
        let table = std::fs::read_to_string("/proc/net/unix").unwrap();
        let inode = |line: &str| line.split_ascii_whitespace().nth(6)?.parse::<u64>().ok();
        !table.lines().skip(1).filter_map(inode).any(|inode| inodes.contains(&inode))
    });
}

#[test]
fn a_channel_that_arrives_over_itself_is_the_same_channel() {
    let (ours, theirs) = channel::pair().unwrap();
    channel::send(ours.as_fd(), b"x", &[ours.as_fd()]).unwrap();
    let mut fds = VecDeque::new();
    assert_eq!(receive(theirs.as_fd(), &mut fds).0, b"x");
    assert_eq!(channel::cookie(fds[0].as_fd()).unwrap(), channel::cookie(ours.as_fd()).unwrap());
}

#[test]
fn fault_74_a_thousand_received_descriptors_stay_out_of_a_child() {
    let command = helper("helper_receives_a_thousand_descriptors");
    assert!(command.spawn().unwrap().wait().unwrap().success());
}

#[test]
#[ignore = "run by fault_74_a_thousand_received_descriptors_stay_out_of_a_child"]
fn helper_receives_a_thousand_descriptors() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let limit = Rlimit { current: limit.maximum, maximum: limit.maximum };
    rustix::process::setrlimit(Resource::Nofile, limit).unwrap();
    let (ours, theirs) = channel::pair().unwrap();
    // As careless libraries leave it: what the sender's copy says must not matter.
    let (reader, _writer) = pipe();
    rustix::io::fcntl_setfd(&reader, rustix::io::FdFlags::empty()).unwrap();
    let mut fds = VecDeque::new();
    while fds.len() < 1000 {
        channel::send(ours.as_fd(), b"x", &[reader.as_fd(); 25]).unwrap();
        assert!(!receive(theirs.as_fd(), &mut fds).1.truncated);
    }
    for fd in &fds {
        let flags = rustix::io::fcntl_getfd(fd).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
    let child = stopping_shell().spawn().unwrap();
    wait_until_stopped(&child);
    let numbers: Vec<i32> = open_fds(child.pid()).into_keys().collect();
    kill(&child);
    assert_eq!(numbers, [0, 1, 2]);
}

#[test]
fn a_child_speaks_over_its_end() {
    let (ours, theirs) = channel::pair().unwrap();
    let mut command = shell("read line <&3; echo \"got $line\" >&3");
    command.fd(3, theirs);
    let child = command.spawn().unwrap();
    channel::send(ours.as_fd(), b"hello\n", &[]).unwrap();
    channel::set_nonblocking(ours.as_fd(), false).unwrap();
    let mut stream = UnixStream::from(ours);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "got hello\n");
    child.wait().unwrap();
    assert!(stream.write(b"x").is_err());
}
