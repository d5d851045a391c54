//! The servers that people use take a worker's listener as they are: hyper, tonic, axum.
//!
//! Standalone workers, real clients. That a listener behaves alike under a primary is tested in `worker` and
//! `native_cluster`.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::convert::Infallible;
use std::future::Future;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use polyfork::cluster::{MainResult, Worker};

/// For what should happen at once. Generous: the machine may be busy.
const SOON: Duration = Duration::from_secs(60);

async fn soon<F: Future>(event: F) -> F::Output {
    tokio::time::timeout(SOON, event).await.expect("did not happen")
}

/// Runs a client that may block in a thread of its own.
async fn client<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    soon(tokio::task::spawn_blocking(work)).await.unwrap()
}

fn ask_for_root(at: SocketAddr) -> String {
    let mut stream = TcpStream::connect(at).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[tokio::test]
async fn hyper_serves_connections_one_by_one() {
    async fn answer(_: Request<Incoming>) -> Result<Response<String>, Infallible> {
        Ok(Response::new("from hyper".into()))
    }
    async fn serve(worker: Worker, mut listener: polyfork::cluster::Listener) -> MainResult {
        loop {
            let stream = tokio::select! {
                accepted = listener.accept() => accepted?.0,
                () = worker.shutdown() => return Ok(()),
            };
            let connection = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service_fn(answer));
            tokio::spawn(connection);
        }
    }
    let worker = Worker::from_env().unwrap();
    let listener = worker.listen("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let serving = tokio::spawn(serve(worker.clone(), listener));
    assert!(client(move || ask_for_root(at)).await.ends_with("from hyper"));
    worker.disconnect().await;
    soon(serving).await.unwrap().unwrap();
}

/// What a client of HTTP/2 begins with (RFC 9113, 3.4): the preface and an empty SETTINGS frame.
const HTTP2_BEGIN: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";
/// The type of a SETTINGS frame (RFC 9113, 6.5), in the fourth byte of its header.
const SETTINGS: u8 = 4;

#[tokio::test]
async fn tonic_serves_the_stream_of_connections_until_the_worker_stops() {
    let worker = Worker::from_env().unwrap();
    let listener = worker.listen("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let serving = tonic::transport::Server::builder()
        .add_routes(tonic::service::Routes::default())
        .serve_with_incoming_shutdown(listener.into_stream(), worker.shutdown());
    let serving = tokio::spawn(serving);
    let answered = client(move || {
        let mut stream = TcpStream::connect(at).unwrap();
        stream.write_all(HTTP2_BEGIN).unwrap();
        let mut header = [0; 9];
        stream.read_exact(&mut header).unwrap();
        header[3]
    });
    assert_eq!(answered.await, SETTINGS);
    worker.disconnect().await;
    soon(serving).await.unwrap().unwrap();
}

mod axum_serve {
    use axum::Router;
    use axum::extract::ConnectInfo;
    use axum::routing::get;
    use axum::serve::ListenerExt;
    use polyfork::cluster::{self, RemoteAddr};

    use super::*;

    /// Asks who the client is, as the server sees it.
    fn ask(at: SocketAddr) {
        let mut stream = TcpStream::connect(at).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let own = stream.local_addr().unwrap().to_string();
        assert!(answer.ends_with(&own), "{answer} is not for {own}");
    }

    #[tokio::test]
    async fn axum_serves_from_a_listener_until_the_worker_stops() {
        let worker = Worker::from_env().unwrap();
        let listener = worker.listen("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let who = |ConnectInfo(RemoteAddr(client)): ConnectInfo<RemoteAddr>| async move {
            client.to_string()
        };
        let app = Router::new().route("/", get(who));
        let app = app.into_make_service_with_connect_info::<RemoteAddr>();
        let serving = axum::serve(listener, app).with_graceful_shutdown(worker.shutdown());
        let serving = tokio::spawn(serving.into_future());
        client(move || ask(at)).await;
        worker.disconnect().await;
        soon(serving).await.unwrap().unwrap();
    }

    /// One request on a connection that stays; its answer.
    fn ask_again(stream: &mut TcpStream) -> String {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\nhello") {
            let mut some = [0; 512];
            let count = stream.read(&mut some).unwrap();
            assert_ne!(count, 0, "cut off after {:?}", String::from_utf8_lossy(&answer));
            answer.extend(&some[..count]);
        }
        String::from_utf8(answer).unwrap().to_ascii_lowercase()
    }

    #[tokio::test]
    async fn fault_21_a_kept_connection_is_asked_once_more_while_its_worker_leaves() {
        let worker = Worker::from_env().unwrap();
        let listener = worker.listen("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let app = Router::new().route("/", get(|| async { "hello" }));
        let (serving, leaving) = (worker.clone(), worker.clone());
        let serving = tokio::spawn(async move { cluster::serve(listener, app, &serving).await });
        let (asked, first) = tokio::sync::oneshot::channel();
        let (left, wait) = std::sync::mpsc::channel();
        let client = client(move || {
            let mut clients = [TcpStream::connect(at).unwrap(), TcpStream::connect(at).unwrap()];
            for client in &mut clients {
                assert!(!ask_again(client).contains("connection: close"));
            }
            asked.send(()).unwrap();
            wait.recv().unwrap();
            let [busy, idle] = &mut clients;
            assert!(ask_again(busy).contains("connection: close"));
            // Both are closed, and without a reset.
            assert_eq!(busy.read(&mut [0; 8]).unwrap(), 0);
            assert_eq!(idle.read(&mut [0; 8]).unwrap(), 0);
        });
        let leave = async {
            first.await.unwrap();
            let leaving = tokio::spawn(async move { leaving.disconnect().await });
            worker.shutdown().await;
            left.send(()).unwrap();
            soon(leaving).await.unwrap();
        };
        tokio::join!(client, leave);
        soon(serving).await.unwrap();
    }

    #[tokio::test]
    async fn a_tapped_listener_tells_the_address_of_the_client() {
        let worker = Worker::from_env().unwrap();
        let listener = worker.listen("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let who = |ConnectInfo(client): ConnectInfo<SocketAddr>| async move { client.to_string() };
        let app = Router::new().route("/", get(who));
        let app = app.into_make_service_with_connect_info::<SocketAddr>();
        let listener = listener.tap_io(|tcp| tcp.set_nodelay(true).unwrap());
        let serving = tokio::spawn(axum::serve(listener, app).into_future());
        client(move || ask(at)).await;
        serving.abort();
    }

    #[tokio::test]
    async fn axum_serves_from_a_unix_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sock");
        let worker = Worker::from_env().unwrap();
        let listener = worker.listen_unix(&path).await.unwrap();
        let app = Router::new().route("/", get(|| async { "by file" }));
        let serving = tokio::spawn(axum::serve(listener, app).into_future());
        let answer = client(move || {
            let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        assert!(answer.await.ends_with("by file"));
        serving.abort();
    }
}
