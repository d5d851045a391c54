//! A program without a primary.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};

use polyfork::cluster::{ListenOptions, SendError, Worker, WorkerError, is_primary, is_worker};

use crate::primary::{has_happened, soon};

#[tokio::test]
async fn a_program_without_a_primary_serves_by_itself() {
    assert!(is_primary() && !is_worker());
    let worker = Worker::from_env().unwrap();
    assert!(worker.is_standalone() && !worker.is_connected());
    assert_eq!((worker.id(), worker.slot()), (None, None));
    let mut listener = worker.listen("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (_, peer) = soon(listener.accept()).await.unwrap();
    assert_eq!(peer, client.local_addr().unwrap());
}

#[tokio::test]
async fn a_program_without_a_primary_has_nobody_to_talk_to() {
    let worker = Worker::from_env().unwrap();
    worker.ready();
    worker.status("alone");
    worker.flush().await;
    assert!(matches!(worker.send(&1).await, Err(SendError::Disconnected)));
    assert!(soon(worker.recv()).await.is_none());
}

#[tokio::test]
async fn a_program_without_a_primary_can_leave() {
    let worker = Worker::from_env().unwrap();
    assert!(!has_happened(worker.shutdown()).await);
    soon(worker.disconnect()).await;
    soon(worker.shutdown()).await;
}

#[tokio::test]
async fn an_address_in_use_is_an_error() {
    let worker = Worker::from_env().unwrap();
    let listener = worker.listen("127.0.0.1:0").await.unwrap();
    let again = worker.listen(listener.local_addr().unwrap()).await;
    assert_eq!(again.unwrap_err().kind(), io::ErrorKind::AddrInUse);
}

#[tokio::test]
async fn ipv6_only_leaves_the_same_port_of_ipv4_free() {
    let worker = Worker::from_env().unwrap();
    let options = ListenOptions::default().ipv6_only(true);
    let Ok(six) = worker.listen_with("[::]:0", options).await else { return }; // no IPv6 here
    let port = six.local_addr().unwrap().port();
    assert!(worker.listen(("0.0.0.0", port)).await.is_ok());
    let both = worker.listen("[::]:0").await.unwrap();
    let port = both.local_addr().unwrap().port();
    assert!(worker.listen(("0.0.0.0", port)).await.is_err());
}

#[tokio::test]
async fn a_socket_file_lives_as_long_as_its_listener() {
    let worker = Worker::from_env().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sock");
    let mut listener = worker.listen_unix(&path).await.unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    let (stream, _) = soon(listener.accept()).await.unwrap();
    stream.into_std().unwrap().write_all(b"hi").unwrap();
    let mut heard = String::new();
    client.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "hi");
    drop(listener);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_socket_file_that_nobody_listens_on_is_replaced() {
    let worker = Worker::from_env().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let _listener = worker.listen_unix(&path).await.unwrap();
    UnixStream::connect(&path).unwrap();
}

#[tokio::test]
async fn a_file_that_is_in_use_or_no_socket_is_left_alone() {
    let worker = Worker::from_env().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let busy = folder.path().join("busy");
    let _other = UnixListener::bind(&busy).unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    for path in [&busy, &file] {
        let error = worker.listen_unix(path).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{}", path.display());
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    UnixStream::connect(&busy).unwrap();
}

#[tokio::test]
async fn an_abstract_name_needs_no_file() {
    let worker = Worker::from_env().unwrap();
    let name = format!("\0polyfork-test-{}", std::process::id());
    let listener = worker.listen_unix(&name).await.unwrap();
    assert_eq!(listener.path(), std::path::Path::new(&name));
    assert!(worker.listen_unix(&name).await.is_err());
}

#[test]
fn a_worker_needs_a_runtime() {
    assert!(matches!(Worker::from_env(), Err(WorkerError::NoRuntime)));
}
