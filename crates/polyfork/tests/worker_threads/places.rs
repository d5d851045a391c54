//! One entry, in a thread and in a process: the same port, the same events, the same end.

use std::net::TcpListener;
use std::time::Duration;

use polyfork::channel::{Handle, RequestError};
use polyfork::child_process::{
    Command, Entry, EntryEvent, EntryResult, Place, Port, Signal, Started, Stdio, run_entries,
};
use polyfork::worker_threads::{WorkerError, exit, is_main_thread};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::support::PATIENCE;

const BOTH: [Place; 2] = [Place::Thread, Place::Process];

const DOUBLE: Entry<u64, u64> = Entry::new("double", |port| Box::pin(double(port)));
const END: Entry<String, String> = Entry::new("end", |port| Box::pin(end(port)));
const HANDLES: Entry<String, String> = Entry::new("handles", |port| Box::pin(handles(port)));
const DEAF: Entry<(), ()> = Entry::new("deaf", |port| Box::pin(deaf(port)));
/// Not in this program's list.
const ABSENT: Entry<u64, u64> = Entry::new("absent", |port| Box::pin(double(port)));

async fn double(mut port: Port<u64, u64>) -> EntryResult {
    while let Some(number) = port.recv().await? {
        match number % 2 {
            0 => port.send(&(number * 2)).await?,
            _ => port.post_message(number * 2).await?,
        }
    }
    Ok(())
}

/// Ends as it is told.
async fn end(mut port: Port<String, String>) -> EntryResult {
    let how = port.recv().await?.ok_or("no wish")?;
    port.sender().send(&format!("in main: {}", is_main_thread())).await?;
    match how.as_str() {
        "error" => Err("as wished".into()),
        "panic" => panic!("as feared"),
        "exit" => exit(7),
        "abort" => std::process::abort(),
        _ => Ok(()),
    }
}

async fn handles(mut port: Port<String, String>) -> EntryResult {
    while let Some((text, mut message)) = port.recv_message().await? {
        match (text.as_str(), message.take_handle()) {
            ("listen", Some(Handle::TcpListener(listener))) => {
                let address = listener.local_addr()?.to_string();
                port.send_with(&address, listener).await?;
            }
            ("ask", None) => message.reply(&text.len()).await?,
            ("refuse", None) => drop(message),
            ("ask me", None) => {
                let reply = port.request(&"what?".to_owned(), PATIENCE).await?;
                port.send(&reply.to::<String>()?).await?;
            }
            other => panic!("{other:?}"),
        }
    }
    Ok(())
}

async fn deaf(port: Port<(), ()>) -> EntryResult {
    // A thread has it at once; a process never gets to write it.
    port.send(&()).await?;
    std::thread::sleep(PATIENCE * 10);
    Ok(())
}

#[test]
#[ignore = "run by the other tests as their child"]
fn entries() {
    run_entries(&[&DOUBLE, &END, &HANDLES, &DEAF]);
    unreachable!("this is a child");
}

fn start<In, Out>(entry: &Entry<In, Out>, place: Place) -> Started<In, Out>
where
    In: Serialize + DeserializeOwned + Send + 'static,
    Out: Serialize + DeserializeOwned + Send + 'static,
{
    let mut command = Command::new("/proc/self/exe");
    command.args(["places::entries", "--exact", "--ignored", "--nocapture"]);
    command.stdout(Stdio::Ignore).stderr(Stdio::Ignore);
    let started = entry.start_with(place, &mut command).unwrap();
    assert_eq!(started.place(), place);
    assert_eq!(started.pid().is_some(), place == Place::Process);
    assert_eq!(started.thread_id().is_some(), place == Place::Thread);
    started
}

async fn events<In: Serialize, Out: DeserializeOwned>(
    started: &mut Started<In, Out>,
) -> Vec<EntryEvent<Out>> {
    let mut events = Vec::new();
    let all = async {
        while let Some(event) = started.next_event().await.unwrap() {
            events.push(event);
        }
    };
    tokio::time::timeout(PATIENCE, all).await.unwrap();
    events
}

#[tokio::test]
async fn messages_of_one_type_go_both_ways_in_order() {
    for place in BOTH {
        let mut started = start(&DOUBLE, place);
        assert_eq!(started.next_event().await.unwrap(), Some(EntryEvent::Online));
        let sender = started.port.sender();
        let sending = tokio::spawn(async move {
            for number in 0..3000 {
                match number % 3 {
                    0 => sender.send(&number).await.unwrap(),
                    _ => sender.post_message(number).await.unwrap(),
                }
            }
        });
        for number in 0..1500 {
            let event = started.next_event().await.unwrap();
            assert_eq!(event, Some(EntryEvent::Message(number * 2)));
        }
        for number in 1500..3000 {
            assert_eq!(started.port.recv().await.unwrap(), Some(number * 2));
        }
        sending.await.unwrap();
        assert!(started.port.is_connected());
        started.port.disconnect().await.unwrap();
        assert!(started.port.disconnect().await.is_err());
        let exit = started.join().await.unwrap();
        assert!(exit.success() && exit.error.is_none(), "{place:?}: {exit:?}");
        assert_eq!(started.next_event().await.unwrap(), None);
    }
}

#[tokio::test]
async fn errors_panics_and_exits_are_told_alike_in_thread_and_process() {
    let failed = |text: &str| Some(WorkerError::Failed(text.to_owned()));
    let panicked = |text: &str| Some(WorkerError::Panicked(text.to_owned()));
    let ends = [
        ("nothing", 0, None),
        ("exit", 7, None),
        ("error", 1, failed("as wished")),
        ("panic", 1, panicked("as feared")),
    ];
    for place in BOTH {
        for (how, code, error) in &ends {
            let mut started = start(&END, place);
            started.port.send(&(*how).to_owned()).await.unwrap();
            let events = events(&mut started).await;
            let [EntryEvent::Online, EntryEvent::Message(words), rest @ ..] = &events[..] else {
                panic!("{place:?}, {how}: {events:?}")
            };
            // A test of this program is not in its first thread, but in no worker either.
            assert_eq!(words, &format!("in main: {}", place == Place::Process));
            let EntryEvent::Exit(exit) = rest.last().unwrap() else { panic!("{events:?}") };
            assert_eq!((exit.code, exit.signal, &exit.error), (Some(*code), None, error));
            let told = error.clone().map(EntryEvent::Error);
            assert!(rest[..rest.len() - 1].iter().eq(told.iter()), "{place:?}, {how}: {events:?}");
        }
    }
}

#[tokio::test]
async fn a_crash_costs_only_the_process_it_happens_in() {
    let mut started = start(&END, Place::Process);
    started.port.send(&"abort".to_owned()).await.unwrap();
    let events = events(&mut started).await;
    // What it said just before may be lost.
    let [EntryEvent::Online, .., EntryEvent::Error(error), EntryEvent::Exit(exit)] = &events[..]
    else {
        panic!("{events:?}")
    };
    assert_eq!(error, &WorkerError::Killed("SIGABRT".to_owned()));
    assert_eq!((exit.code, exit.signal), (None, Some(Signal::ABRT)));
    assert_eq!(exit.error.as_ref(), Some(error));
}

#[tokio::test]
async fn handles_requests_and_answers_work_in_both_places() {
    for place in BOTH {
        let mut started = start(&HANDLES, place);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        started.port.send_with(&"listen".to_owned(), listener).await.unwrap();
        let (text, mut message) = started.port.recv_message().await.unwrap().unwrap();
        assert_eq!(text, address);
        assert!(matches!(message.take_handle(), Some(Handle::TcpListener(_))));
        let reply = started.port.request(&"ask".to_owned(), PATIENCE).await.unwrap();
        assert_eq!(reply.to::<usize>().unwrap(), 3);
        let refused = started.port.request(&"refuse".to_owned(), PATIENCE).await;
        assert_eq!(refused.err(), Some(RequestError::Refused));
        started.port.send(&"ask me".to_owned()).await.unwrap();
        let (question, message) = started.port.recv_message().await.unwrap().unwrap();
        assert!(message.wants_reply());
        message.reply(&format!("{question} that!")).await.unwrap();
        assert_eq!(started.port.recv().await.unwrap().unwrap(), "what? that!");
        started.port.disconnect().await.unwrap();
        assert!(started.join().await.unwrap().success());
    }
}

#[tokio::test]
async fn whoever_does_not_listen_is_killed_as_a_process_and_told_of_as_a_thread() {
    let limit = Duration::from_millis(10);
    let mut process = start(&DEAF, Place::Process);
    assert_eq!(process.next_event().await.unwrap(), Some(EntryEvent::Online));
    let exit = process.terminate(limit).await.unwrap();
    assert!(exit.signal.is_some() && exit.error.is_none(), "{exit:?}");
    let mut thread = start(&DEAF, Place::Thread);
    assert_eq!(thread.port.recv().await.unwrap(), Some(()));
    let error = thread.terminate(limit).await.unwrap_err();
    assert!(error.to_string().contains("(deaf) did not stop within 10ms"), "{error}");
}

#[tokio::test]
async fn whoever_awaits_ends_when_told_to_in_both_places() {
    for place in BOTH {
        let mut started = start(&DOUBLE, place);
        assert_eq!(started.next_event().await.unwrap(), Some(EntryEvent::Online));
        let exit = started.terminate(PATIENCE).await.unwrap();
        assert!(!exit.success() && exit.error.is_none(), "{exit:?}");
        let events = events(&mut started).await;
        assert_eq!(events, [EntryEvent::Exit(exit)], "{place:?}");
    }
}

#[tokio::test]
async fn an_entry_that_is_not_listed_is_an_exit_without_having_been_online() {
    let mut started = start(&ABSENT, Place::Process);
    let events = events(&mut started).await;
    let [EntryEvent::Exit(exit)] = &events[..] else { panic!("{events:?}") };
    assert_eq!(exit.code, Some(70));
    // A thread needs no list.
    let mut started = start(&ABSENT, Place::Thread);
    started.port.post_message(4).await.unwrap();
    assert_eq!(started.port.recv().await.unwrap(), Some(8));
}
