//! Listening: by a socket of its own, by connections handed over.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;

use polyfork::cluster::{ListenOptions, Worker};
use polyfork_wire::native::{ListenAddress, ToPrimary, ToWorker};

use crate::primary::{Primary, connections, fill, has_happened, soon};

const LISTENER: u32 = 6;

fn bound() -> TcpListener {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

/// A worker with a listener to which connections are handed over, and on which it accepts.
async fn handing() -> (Worker, Primary, polyfork::cluster::Listener) {
    let (worker, mut primary) = Primary::new().await;
    let listen = worker.listen("127.0.0.1:80");
    let (listener, ()) = tokio::join!(listen, primary.open(LISTENER, None));
    let mut listener = listener.unwrap();
    assert!(!has_happened(listener.accept()).await);
    assert_eq!(primary.next().await, ToPrimary::Listening { listener: LISTENER });
    assert_eq!(primary.next().await, ToPrimary::Ready);
    (worker, primary, listener)
}

fn accepted(seq: u64) -> ToPrimary {
    ToPrimary::Accepted { listener: LISTENER, seq, count: 1 }
}

fn refused(seq: u64) -> ToPrimary {
    ToPrimary::Refused { listener: LISTENER, seq }
}

#[tokio::test]
async fn a_worker_asks_its_primary_for_what_the_program_wants() {
    let (worker, mut primary) = Primary::new().await;
    let options = ListenOptions::default().backlog(77).ipv6_only(true);
    let ask = async {
        let _ = worker.listen_with("[::1]:81", options).await;
    };
    assert!(!has_happened(ask).await);
    let address = ListenAddress::Tcp("[::1]:81".parse().unwrap());
    let asked = ToPrimary::Listen { request: 0, address, backlog: 77, ipv6_only: true };
    assert_eq!(primary.next().await, asked);
}

#[tokio::test]
async fn a_worker_accepts_from_a_socket_of_its_own() {
    let (worker, mut primary) = Primary::new().await;
    let socket = bound();
    let listen = worker.listen("127.0.0.1:0");
    let (listener, ()) = tokio::join!(listen, primary.open(LISTENER, Some(&socket)));
    let mut listener = listener.unwrap();
    assert_eq!(listener.local_addr().unwrap(), socket.local_addr().unwrap());
    for _ in 0..3 {
        let client = TcpStream::connect(socket.local_addr().unwrap()).unwrap();
        let (_, peer) = soon(listener.accept()).await.unwrap();
        assert_eq!(peer, client.local_addr().unwrap());
    }
    // Connections of a socket of our own are nobody else's business.
    let said = [ToPrimary::Listening { listener: LISTENER }, ToPrimary::Ready];
    assert_eq!(primary.said(&worker).await, said);
}

#[tokio::test]
async fn a_worker_is_not_listening_before_the_program_accepts() {
    let (worker, mut primary) = Primary::new().await;
    let listen = worker.listen("127.0.0.1:80");
    let (listener, ()) = tokio::join!(listen, primary.open(LISTENER, None));
    assert!(primary.said(&worker).await.is_empty());
    assert!(!has_happened(listener.unwrap().accept()).await);
    assert_eq!(primary.next().await, ToPrimary::Listening { listener: LISTENER });
}

#[tokio::test]
async fn a_connection_is_acknowledged_when_the_program_takes_it() {
    let (worker, mut primary, mut listener) = handing().await;
    let (mut clients, ours) = connections(3).unwrap();
    primary.hand_over(LISTENER, 10, &ours).await;
    primary.heard(&worker).await;
    assert!(primary.said(&worker).await.is_empty());
    for (seq, client) in (10..).zip(&mut clients) {
        let (stream, peer) = soon(listener.accept()).await.unwrap();
        assert_eq!(peer, client.local_addr().unwrap());
        assert_eq!(primary.said(&worker).await, [accepted(seq)]);
        stream.into_std().unwrap().write_all(b"served").unwrap();
    }
    drop(ours);
    for mut client in clients {
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "served");
    }
}

#[tokio::test]
async fn a_program_gets_no_connection_while_its_acknowledgement_cannot_leave() {
    let (worker, mut primary, mut listener) = handing().await;
    let (_clients, ours) = connections(1).unwrap();
    primary.hand_over(LISTENER, 1, &ours).await;
    primary.heard(&worker).await;
    fill(&worker).await;
    assert!(!has_happened(listener.accept()).await);
    // The primary reads all that was said before.
    let mut took = None;
    tokio::select! {
        connection = listener.accept() => took = Some(connection.unwrap()),
        () = async { while primary.next().await != accepted(1) {} } => {}
    }
    if took.is_none() {
        soon(listener.accept()).await.unwrap();
    } else {
        while primary.next().await != accepted(1) {}
    }
}

#[tokio::test]
async fn a_program_never_gets_a_connection_that_was_not_acknowledged() {
    let (worker, primary, mut listener) = handing().await;
    let (_clients, ours) = connections(1).unwrap();
    primary.hand_over(LISTENER, 1, &ours).await;
    primary.heard(&worker).await;
    fill(&worker).await;
    assert!(!has_happened(listener.accept()).await);
    drop(primary);
    soon(worker.shutdown()).await;
    assert!(!has_happened(listener.accept()).await);
}

#[tokio::test]
async fn what_the_program_has_not_taken_goes_back_when_it_drops_the_listener() {
    let (worker, mut primary, mut listener) = handing().await;
    let (_clients, ours) = connections(3).unwrap();
    primary.hand_over(LISTENER, 5, &ours).await;
    primary.heard(&worker).await;
    soon(listener.accept()).await.unwrap();
    drop(listener);
    let close = ToPrimary::Close { listener: LISTENER };
    assert_eq!(primary.said(&worker).await, [accepted(5), refused(6), refused(7), close]);
    primary.hand_over(LISTENER, 8, &ours[..1]).await;
    primary.heard(&worker).await;
    assert_eq!(primary.said(&worker).await, [refused(8)]);
}

#[tokio::test]
async fn a_client_that_is_gone_does_not_end_the_listener() {
    let (_worker, mut primary, mut listener) = handing().await;
    let (mut clients, ours) = connections(2).unwrap();
    let gone = clients.remove(0);
    socket2::SockRef::from(&gone).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    drop(gone);
    primary.hand_over(LISTENER, 1, &ours).await;
    let (_, peer) = soon(listener.accept()).await.unwrap();
    assert_eq!(peer, clients[0].local_addr().unwrap());
    assert_eq!([primary.next().await, primary.next().await], [accepted(1), accepted(2)]);
}

#[tokio::test]
async fn a_connection_that_did_not_arrive_goes_back() {
    let (worker, mut primary, mut listener) = handing().await;
    let (clients, ours) = connections(1).unwrap();
    // As after the kernel dropped the second of two: this process was at its limit of open files.
    let frame = ToWorker::Connections { listener: LISTENER, first_seq: 1, count: 2 };
    let fds: Vec<_> = ours.iter().map(AsFd::as_fd).collect();
    primary.say(&frame, &fds).await;
    primary.heard(&worker).await;
    assert_eq!(primary.said(&worker).await, [refused(2)]);
    let (_, peer) = soon(listener.accept()).await.unwrap();
    assert_eq!(peer, clients[0].local_addr().unwrap());
    assert_eq!(primary.said(&worker).await, [accepted(1)]);
}

#[tokio::test]
async fn a_listening_socket_that_did_not_arrive_is_an_error() {
    let (worker, mut primary) = Primary::new().await;
    let answer = async {
        let ToPrimary::Listen { request, address, .. } = primary.next().await else {
            panic!("no request")
        };
        let answer = ToWorker::Listening { request, listener: LISTENER, address, handoff: false };
        primary.say(&answer, &[]).await;
    };
    let (listener, ()) = tokio::join!(worker.listen("127.0.0.1:80"), answer);
    let too_many_files = rustix::io::Errno::MFILE.raw_os_error();
    assert_eq!(listener.unwrap_err().raw_os_error(), Some(too_many_files));
    assert_eq!(primary.next().await, ToPrimary::Close { listener: LISTENER });
}

#[tokio::test]
async fn an_address_that_cannot_be_had_is_the_error_of_bind() {
    let (worker, mut primary) = Primary::new().await;
    let answer = async {
        let ToPrimary::Listen { request, .. } = primary.next().await else { panic!("no request") };
        let text = "cannot listen on 127.0.0.1:80: permission denied".to_owned();
        let errno = rustix::io::Errno::ACCESS.raw_os_error();
        primary.say(&ToWorker::ListenFailed { request, errno, text }, &[]).await;
    };
    let (listener, ()) = tokio::join!(worker.listen("127.0.0.1:80"), answer);
    let error = listener.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    assert_eq!(error.to_string(), "cannot listen on 127.0.0.1:80: permission denied");
}

#[tokio::test]
async fn the_next_address_of_a_name_is_tried_when_one_cannot_be_had() {
    let (worker, mut primary) = Primary::new().await;
    let both =
        ["127.0.0.1:80".parse().unwrap(), "127.0.0.1:81".parse::<std::net::SocketAddr>().unwrap()];
    let answers = async {
        let ToPrimary::Listen { request, .. } = primary.next().await else { panic!("no request") };
        let errno = rustix::io::Errno::ADDRINUSE.raw_os_error();
        primary.say(&ToWorker::ListenFailed { request, errno, text: "in use".into() }, &[]).await;
        primary.open(LISTENER, None).await;
    };
    let (listener, ()) = tokio::join!(worker.listen(&both[..]), answers);
    assert_eq!(listener.unwrap().local_addr().unwrap(), both[1]);
}

#[tokio::test]
async fn a_listener_that_nobody_waits_for_any_more_is_closed() {
    let (worker, mut primary) = Primary::new().await;
    assert!(!has_happened(worker.listen("127.0.0.1:80")).await);
    primary.open(LISTENER, None).await;
    assert_eq!(primary.next().await, ToPrimary::Close { listener: LISTENER });
}

#[tokio::test]
async fn a_worker_cannot_listen_twice_on_one_address_but_again() {
    let (worker, mut primary) = Primary::new().await;
    let (first, ()) = tokio::join!(worker.listen("127.0.0.1:80"), primary.open(LISTENER, None));
    let (second, ()) = tokio::join!(worker.listen("127.0.0.1:80"), primary.open(LISTENER, None));
    assert_eq!(second.unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
    drop(first);
    assert_eq!(primary.next().await, ToPrimary::Close { listener: LISTENER });
    let (third, ()) = tokio::join!(worker.listen("127.0.0.1:80"), primary.open(LISTENER, None));
    assert!(third.is_ok());
}

#[tokio::test]
async fn a_relative_path_is_meant_from_the_directory_of_the_worker() {
    let asked = |path: &'static str| async move {
        let (worker, mut primary) = Primary::new().await;
        assert!(!has_happened(worker.listen_unix(path)).await);
        match primary.next().await {
            ToPrimary::Listen { address: ListenAddress::Unix(path), .. } => path,
            other => panic!("{other:?}"),
        }
    };
    let here = std::env::current_dir().unwrap().join("some.sock");
    assert_eq!(asked("some.sock").await, here.into_os_string().into_encoded_bytes());
    assert_eq!(asked("\0abstract").await, b"\0abstract");
}

#[tokio::test]
async fn a_unix_listener_takes_what_is_handed_over() {
    let (worker, mut primary) = Primary::new().await;
    let ask = worker.listen_unix("/run/some.sock");
    let (listener, ()) = tokio::join!(ask, primary.open(LISTENER, None));
    let mut listener = listener.unwrap();
    assert_eq!(listener.path(), std::path::Path::new("/run/some.sock"));
    let (client, ours) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    primary.hand_over(LISTENER, 1, &[ours.into()]).await;
    let (stream, _) = soon(listener.accept()).await.unwrap();
    drop(stream.into_std().unwrap().write_all(b"x"));
    assert_eq!((&client).read(&mut [0; 8]).unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_on_several_threads_gets_every_connection_once() {
    const EACH: u64 = 8;
    const ROUNDS: u64 = 40;
    let (_worker, mut primary, mut listener) = handing().await;
    let serve = tokio::spawn(async move {
        for _ in 0..EACH * ROUNDS {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move { stream.into_std().unwrap().write_all(b"1").unwrap() });
        }
    });
    for round in 0..ROUNDS {
        let (clients, ours) = connections(EACH.try_into().unwrap()).unwrap();
        primary.hand_over(LISTENER, round * EACH, &ours).await;
        drop(ours);
        for seq in round * EACH..(round + 1) * EACH {
            assert_eq!(primary.next().await, accepted(seq));
        }
        for mut client in clients {
            client.set_nonblocking(false).unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).unwrap();
            assert_eq!(answer, b"1");
        }
    }
    soon(serve).await.unwrap();
}

#[tokio::test]
async fn a_stream_of_connections_fits_what_tonic_asks_for() {
    use tokio_stream::Stream;
    fn serve_with_incoming<I, IO, E>(incoming: I) -> I
    where
        I: Stream<Item = Result<IO, E>>,
        IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        incoming
    }
    let (_worker, primary, listener) = handing().await;
    let mut incoming = serve_with_incoming(listener.into_stream());
    let (_clients, ours) = connections(2).unwrap();
    primary.hand_over(LISTENER, 1, &ours).await;
    for _ in 0..2 {
        let next = std::future::poll_fn(|cx| std::pin::Pin::new(&mut incoming).poll_next(cx));
        soon(next).await.unwrap().unwrap();
    }
    assert!(incoming.get_ref().local_addr().is_ok());
}
