//! Sockets that stand alone: Unix sockets and their files, UDP, plain listeners.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};

use polyfork_sys::reuseport::{
    BindStep, MAX_UNIX_PATH, Options, UdpFlags, UnixSocket, bind_listener, bind_udp, bind_unix,
    local_addr,
};

const BACKLOG: i32 = 16;

fn listen(path: &Path) -> UnixSocket {
    bind_unix(path, BACKLOG, None).unwrap()
}

fn place() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("app.sock");
    (folder, path)
}

#[test]
fn a_unix_socket_is_answered_and_its_file_goes_with_it() {
    let (_folder, path) = place();
    let socket = listen(&path);
    assert_eq!(socket.path(), Some(path.as_path()));
    UnixStream::connect(&path).unwrap();
    drop(socket);
    assert!(!path.exists());
}

#[test]
fn the_mode_is_exact_whatever_the_umask() {
    let (_folder, path) = place();
    for mode in [0o600, 0o666, 0o770] {
        let _socket = bind_unix(&path, BACKLOG, Some(mode)).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, mode);
    }
}

#[test]
fn a_stale_file_is_replaced_and_a_live_one_is_in_use() {
    let (_folder, path) = place();
    // std leaves the file behind.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let socket = listen(&path);
    let error = bind_unix(&path, BACKLOG, None).unwrap_err();
    assert!(error.is_in_use());
    let expected = format!("cannot listen on unix:{}: address already in use", path.display());
    assert_eq!(error.to_string(), expected);
    // Still the same one.
    UnixStream::connect(&path).unwrap();
    drop(socket);

    // A live one with a full queue is live, too.
    let socket = bind_unix(&path, 0, None).unwrap();
    let mut clients = Vec::new();
    let stream = || {
        let flags = rustix::net::SocketFlags::NONBLOCK;
        let (family, kind) = (rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM);
        rustix::net::socket_with(family, kind, flags, None).unwrap()
    };
    let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
    loop {
        let client = stream();
        let connected = rustix::net::connect(&client, &address);
        clients.push(client);
        if connected == Err(rustix::io::Errno::AGAIN) {
            break;
        }
    }
    assert!(bind_unix(&path, BACKLOG, None).unwrap_err().is_in_use());
    drop(socket);
}

#[test]
fn only_dead_sockets_are_replaced() {
    let (_folder, path) = place();
    std::fs::write(&path, "precious").unwrap();
    assert!(bind_unix(&path, BACKLOG, None).unwrap_err().is_in_use());
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    std::fs::remove_file(&path).unwrap();
    let _datagram = UnixDatagram::bind(&path).unwrap();
    assert!(bind_unix(&path, BACKLOG, None).unwrap_err().is_in_use());
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
    assert!(bind_unix(&path, BACKLOG, None).unwrap_err().is_in_use());
    assert!(path.is_symlink());
}

#[test]
fn a_file_that_is_not_ours_any_more_stays() {
    let (_folder, path) = place();
    let first = listen(&path);
    std::fs::remove_file(&path).unwrap();
    let second = listen(&path);
    drop(first);
    UnixStream::connect(&path).unwrap();
    drop(second);
    assert!(!path.exists());
}

#[test]
fn of_many_that_find_a_stale_file_exactly_one_gets_it() {
    for _ in 0..20 {
        let (_folder, path) = place();
        drop(UnixListener::bind(&path).unwrap());
        let start = Arc::new(Barrier::new(16));
        let rivals: Vec<_> = (0..16)
            .map(|_| {
                let (start, path) = (Arc::clone(&start), path.clone());
                std::thread::spawn(move || {
                    start.wait();
                    bind_unix(&path, BACKLOG, None)
                })
            })
            .collect();
        let results: Vec<_> = rivals.into_iter().map(|rival| rival.join().unwrap()).collect();
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
        assert!(results.iter().flat_map(|result| result.as_ref().err()).all(|e| e.is_in_use()));
        UnixStream::connect(&path).unwrap();
    }
}

#[test]
fn too_long_a_path_is_refused_in_words() {
    let longest = format!("/tmp/{}", "x".repeat(MAX_UNIX_PATH - 5));
    assert_eq!(longest.len(), MAX_UNIX_PATH);
    drop(listen(Path::new(&longest)));
    let error = bind_unix(Path::new(&format!("{longest}y")), BACKLOG, None).unwrap_err();
    assert_eq!(error.step, BindStep::Input);
    assert!(
        error.to_string().ends_with("the path has 108 bytes, 1 to 107 are possible"),
        "{error}"
    );
    let error = bind_unix(Path::new(""), BACKLOG, None).unwrap_err();
    assert!(error.to_string().ends_with("the path has 0 bytes, 1 to 107 are possible"), "{error}");
    let error = bind_unix(Path::new("/nonexistent/a.sock"), BACKLOG, None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot listen on unix:/nonexistent/a.sock: no such file or directory"
    );
}

#[test]
fn an_abstract_name_leaves_no_file() {
    let name = format!("\0polyfork-test-{}", std::process::id());
    let socket = listen(Path::new(&name));
    assert_eq!(socket.path(), None);
    let error = bind_unix(Path::new(&name), BACKLOG, None).unwrap_err();
    assert!(error.is_in_use());
    assert!(error.to_string().contains("abstract unix socket \"polyfork-test-"), "{error}");
    drop(socket);
    drop(listen(Path::new(&name)));
}

#[test]
fn a_udp_socket_is_exclusive_unless_told_otherwise() {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let socket = bind_udp(any, UdpFlags::default()).unwrap();
    let address = local_addr(socket.as_fd()).unwrap();
    assert!(bind_udp(address, UdpFlags::default()).unwrap_err().is_in_use());
    let client = UdpSocket::bind(any).unwrap();
    client.send_to(b"hello", address).unwrap();
    let socket = UdpSocket::from(socket);
    // Non-blocking; on loopback the packet is there when send returns.
    let mut buffer = [0; 16];
    assert_eq!(socket.recv(&mut buffer).unwrap(), 5);

    for flags in [
        UdpFlags { reuse_address: true, ..UdpFlags::default() },
        UdpFlags { reuse_port: true, ..UdpFlags::default() },
    ] {
        let first = bind_udp(any, flags).unwrap();
        let address = local_addr(first.as_fd()).unwrap();
        bind_udp(address, flags).unwrap();
        assert!(bind_udp(address, UdpFlags::default()).unwrap_err().is_in_use());
    }
}

#[test]
fn an_address_that_is_not_ours_is_refused_in_words() {
    let address: SocketAddr = "192.0.2.1:80".parse().unwrap();
    let error = bind_listener(address, &Options::default()).unwrap_err();
    assert_eq!(error.step, BindStep::Bind);
    assert!(error.to_string().starts_with("cannot listen on 192.0.2.1:80: "), "{error}");
}
