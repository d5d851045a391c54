//! The end: asked for by the primary, by the program, or by the primary's own end.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use polyfork_wire::native::{ToPrimary, ToWorker};

use crate::primary::{Primary, connections, has_happened, soon};

const LISTENER: u32 = 3;

#[tokio::test]
async fn a_primary_that_says_so_stops_the_worker() {
    let (worker, primary) = Primary::new().await;
    let early = worker.shutdown();
    assert!(!worker.is_stopping());
    primary.say(&ToWorker::Disconnect { grace_ms: 1000 }, &[]).await;
    soon(early).await;
    soon(worker.shutdown()).await;
    assert!(worker.is_stopping() && worker.is_connected());
}

#[tokio::test]
async fn a_worker_that_leaves_waits_for_its_primary() {
    let (worker, mut primary) = Primary::new().await;
    let leaving = worker.disconnect();
    tokio::pin!(leaving);
    assert!(!has_happened(&mut leaving).await);
    assert_eq!(primary.next().await, ToPrimary::Leaving);
    assert!(!worker.is_stopping());
    primary.say(&ToWorker::LeavingAcknowledged, &[]).await;
    soon(leaving).await;
    assert!(has_happened(worker.shutdown()).await);
    // Again is fine and says nothing new.
    soon(worker.disconnect()).await;
    assert!(primary.said(&worker).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_worker_leaves_a_primary_that_does_not_answer() {
    let (worker, _primary) = Primary::silent();
    let began = tokio::time::Instant::now();
    worker.disconnect().await;
    assert!(worker.is_stopping());
    assert_eq!(began.elapsed().as_secs(), 5);
}

#[tokio::test]
async fn what_the_program_has_not_taken_goes_back_when_the_worker_stops() {
    let (worker, mut primary) = Primary::new().await;
    let (listener, ()) = tokio::join!(worker.listen("127.0.0.1:80"), primary.open(LISTENER, None));
    let mut listener = listener.unwrap();
    assert!(!has_happened(listener.accept()).await);
    let (_clients, ours) = connections(3).unwrap();
    primary.hand_over(LISTENER, 1, &ours[..2]).await;
    primary.say(&ToWorker::Disconnect { grace_ms: 1000 }, &[]).await;
    primary.hand_over(LISTENER, 3, &ours[2..]).await;
    primary.heard(&worker).await;
    assert!(!has_happened(listener.accept()).await);
    let refused = |seq| ToPrimary::Refused { listener: LISTENER, seq };
    let said = primary.said(&worker).await;
    assert_eq!(said[said.len() - 3..], [refused(1), refused(2), refused(3)]);
}

#[tokio::test]
async fn what_waits_in_a_socket_when_the_worker_stops_is_accepted_and_nothing_new() {
    let (worker, mut primary) = Primary::new().await;
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let ask = worker.listen("127.0.0.1:0");
    let (listener, ()) = tokio::join!(ask, primary.open(LISTENER, Some(&socket)));
    let mut listener = listener.unwrap();
    let at = socket.local_addr().unwrap();
    let _waiting = [TcpStream::connect(at).unwrap(), TcpStream::connect(at).unwrap()];
    primary.say(&ToWorker::Disconnect { grace_ms: 1000 }, &[]).await;
    soon(worker.shutdown()).await;
    soon(listener.accept()).await.unwrap();
    soon(listener.accept()).await.unwrap();
    assert!(!has_happened(listener.accept()).await);
    let _new = TcpStream::connect(at).unwrap();
    assert!(!has_happened(listener.accept()).await);
}

#[tokio::test]
async fn the_end_of_the_primary_stops_the_worker() {
    let (worker, primary) = Primary::new().await;
    drop(primary);
    soon(worker.shutdown()).await;
    assert!(soon(worker.recv()).await.is_none());
}

#[tokio::test]
async fn a_request_hears_of_the_end_of_the_primary() {
    let (worker, mut primary) = Primary::new().await;
    let end = async {
        assert!(matches!(primary.next().await, ToPrimary::Listen { .. }));
        drop(primary);
    };
    let (listener, ()) = tokio::join!(worker.listen("127.0.0.1:80"), end);
    assert_eq!(listener.unwrap_err().kind(), io::ErrorKind::NotConnected);
}

#[tokio::test]
async fn a_program_that_does_not_listen_still_hears_of_the_stop() {
    let (worker, primary) = Primary::new().await;
    let flood = async {
        let message = ToWorker::Message(vec![0; 1 << 20]);
        for _ in 0..8 {
            primary.say(&message, &[]).await;
        }
        primary.say(&ToWorker::Disconnect { grace_ms: 1000 }, &[]).await;
    };
    let stopped = tokio::time::timeout(Duration::from_secs(60), worker.shutdown());
    tokio::join!(flood, async { stopped.await.expect("the stop was not heard") });
    assert_eq!(worker.dropped_messages(), 5);
    soon(worker.recv()).await.unwrap();
}

#[tokio::test]
async fn a_program_that_does_not_listen_still_hears_of_the_end_of_the_primary() {
    let (worker, primary) = Primary::new().await;
    for _ in 0..4 {
        primary.say(&ToWorker::Message(vec![0; 1 << 20]), &[]).await;
    }
    drop(primary);
    soon(worker.shutdown()).await;
}

#[tokio::test]
async fn a_primary_that_breaks_the_protocol_is_as_good_as_gone() {
    let welcome =
        |protocol| ToWorker::Welcome { protocol, worker: 1, slot: 1, generation: 0, grace_ms: 1 };
    let listening = |request, handoff| ToWorker::Listening {
        request,
        listener: 1,
        address: polyfork_wire::native::ListenAddress::Unix(b"x".to_vec()),
        handoff,
    };
    let lost = |count| ToWorker::Connections { listener: 1, first_seq: 0, count };
    let frames = [welcome(999), listening(0, true), listening(0, false), lost(254)];
    for frame in &frames {
        let (worker, primary) = Primary::new().await;
        primary.say(frame, &[]).await;
        soon(worker.shutdown()).await;
        assert!(!worker.is_connected(), "{frame:?}");
    }
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64], &[0; 64]] {
        let (worker, primary) = Primary::new().await;
        primary.say_raw(garbage, &[]).await;
        soon(worker.shutdown()).await;
    }
}

#[tokio::test]
async fn connections_with_numbers_beyond_the_last_are_a_fault() {
    let (worker, primary) = Primary::new().await;
    let (_clients, ours) = connections(2).unwrap();
    primary.hand_over(1, u64::MAX - 1, &ours).await;
    soon(worker.shutdown()).await;
    assert!(!worker.is_connected());
}
