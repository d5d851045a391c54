//! Clients, from the moment that they connect until they leave, rest or are sent away.
//!
//! What they send is taken by `requests`, what they ask for is done by `work`. Here are the places and the times: who gets
//! one, who gives way, and how long anything may take.
//!
//! The surprising rule: work that was begun for a client goes on when the client leaves. A restart that stopped half-way
//! because a terminal was closed would be worse than one that is finished unseen.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::broadcast;
use tokio::time::timeout;

use super::requests::{Requests, is_permitted};
use super::work::{Accepted, Answer, work};
use super::{Client, Control, LISTENING, Rested, SENDING, SERVED, Wish, lock};
use crate::control::protocol::{self, Request, Verb};
use crate::report::json;

/// Clients at a time.
const MOST_CLIENTS: usize = 64;
/// For a client to send its request.
const REQUEST_TIME: Duration = Duration::from_secs(5);
/// For a client to take an answer, or a line of a stream.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// After an error of `accept`: as a rule too many files are open.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl Control {
    /// Tells who asked for another binary what became of it, and serves him on.
    pub(crate) fn answer(&self, asker: Rested, line: Vec<u8>) {
        let control = self.clone();
        tokio::spawn(async move {
            let mut asker = asker;
            // Who does not take it has been warned.
            if matches!(timeout(ANSWER_TIME, asker.stream.write_all(&line)).await, Ok(Ok(()))) {
                admit(&control, asker);
            }
        });
    }
}

/// Takes clients in, for ever.
pub(super) async fn accept(control: Control) {
    let Some(socket) = &control.0.socket else { return };
    loop {
        match socket.accept().await {
            Ok((stream, _)) if is_permitted(&stream) => {
                admit(&control, Rested { stream, buffer: Vec::new(), listens: false });
            }
            Ok(_) => count_refused(&control),
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

fn count_refused(control: &Control) {
    control.0.refused.fetch_add(1, Ordering::Relaxed);
}

/// Gives a client a place, if need be that of one that is still sending.
pub(super) fn admit(control: &Control, client: Rested) {
    let mut clients = lock(&control.0.clients);
    if clients.len() >= MOST_CLIENTS {
        let sending = |client: &Client| client.phase.load(Ordering::Relaxed) == SENDING;
        let Some(oldest) = clients.iter().position(sending) else {
            drop(clients);
            return count_refused(control);
        };
        if let Some(client) = clients.remove(oldest) {
            client.task.abort();
            count_refused(control);
        }
    }
    let id = control.0.next_client.fetch_add(1, Ordering::Relaxed);
    let phase = Arc::new(AtomicU8::new(if client.listens { LISTENING } else { SENDING }));
    let served = serve(control.clone(), client, Arc::clone(&phase));
    let theirs = control.clone();
    let task = tokio::spawn(async move {
        served.await;
        let mut clients = lock(&theirs.0.clients);
        clients.retain(|client| client.id != id);
        if clients.is_empty() {
            // An answer takes code that nothing else does.
            polyfork::process::give_back_code();
        }
    });
    clients.push_back(Client { id, phase, task: task.abort_handle() });
}

/// One client, from its first byte to its last, or until it is to rest.
async fn serve(control: Control, client: Rested, phase: Arc<AtomicU8>) {
    let Rested { stream, buffer, listens } = client;
    let (reader, mut writer) = stream.into_split();
    let mut requests = Requests { reader, buffer, stranger: false };
    let mut rest = control.0.rest.subscribe();
    if listens {
        phase.store(LISTENING, Ordering::Relaxed);
        if let Ok(lines) = control.listen() {
            stream_to(&control, writer, requests, lines).await;
        }
        return;
    }
    loop {
        phase.store(SENDING, Ordering::Relaxed);
        let line = tokio::select! {
            biased;
            _ = rest.wait_for(|level| *level > 0) => return park(&control, requests, writer, false),
            line = timeout(REQUEST_TIME, requests.next()) => line,
        };
        let line = match line {
            Ok(Ok(Some(line))) => line,
            Ok(Ok(None)) => return,
            Ok(Err(refusal)) => {
                count_refused(&control);
                answer(&mut writer, &protocol::not_done(&refusal)).await;
                return;
            }
            Err(_too_slow) => return count_refused(&control),
        };
        phase.store(SERVED, Ordering::Relaxed);
        let read = protocol::read(&line);
        drop(line);
        let reply = match read {
            Ok(Request { verb: Verb::Upgrade { binary, limit }, wait, .. }) => {
                match wish(&control, binary, limit, wait, requests, writer).await {
                    Some(kept) => {
                        (requests, writer) = kept;
                        continue;
                    }
                    None => return,
                }
            }
            Ok(request) => tokio::select! {
                reply = work(&control, request) => reply,
                // Nobody is left to be answered. What was begun goes on.
                () = requests.gone(&writer) => return,
            },
            Err(refusal) => {
                count_refused(&control);
                answer(&mut writer, &protocol::not_done(&refusal)).await;
                // Whoever sent it is lost, or no friend.
                if refusal.word == "bad_request" {
                    return;
                }
                continue;
            }
        };
        match reply {
            Answer::Line(line) => {
                if !answer(&mut writer, &line).await {
                    return;
                }
            }
            Answer::Stream(lines) => {
                phase.store(LISTENING, Ordering::Relaxed);
                if answer(&mut writer, &protocol::done(&Accepted { accepted: true })).await {
                    stream_to(&control, writer, requests, lines).await;
                }
                return;
            }
        }
    }
}

/// Keeps a client for whoever goes on with it.
fn park(control: &Control, requests: Requests, writer: OwnedWriteHalf, listens: bool) {
    let Requests { reader, buffer, stranger } = requests;
    if stranger {
        return count_refused(control);
    }
    // Both are halves of one.
    if let Ok(stream) = reader.reunite(writer) {
        lock(&control.0.rested).push(Rested { stream, buffer, listens });
    }
}

/// Passes a wish for another binary on, with the client, who is answered when it is fulfilled or not. Gives the client back
/// when it does not wait for that.
async fn wish(
    control: &Control,
    binary: PathBuf,
    limit: Option<Duration>,
    wait: bool,
    requests: Requests,
    mut writer: OwnedWriteHalf,
) -> Option<(Requests, OwnedWriteHalf)> {
    let begun = control.begin_upgrade();
    if let Err(refusal) = begun {
        let told = answer(&mut writer, &protocol::not_done(&refusal)).await;
        return told.then_some((requests, writer));
    }
    let (asker, kept) = match wait {
        false => {
            answer(&mut writer, &protocol::done(&Accepted { accepted: true })).await;
            (None, Some((requests, writer)))
        }
        true => {
            let Requests { reader, buffer, stranger: _ } = requests;
            let stream = reader.reunite(writer).ok();
            (stream.map(|stream| Rested { stream, buffer, listens: false }), None)
        }
    };
    if control.0.wishes.send(Wish { binary, limit, asker }).await.is_err() {
        control.end_upgrade();
    }
    kept
}

/// Writes a line; false when the client does not take it.
async fn answer(writer: &mut OwnedWriteHalf, line: &[u8]) -> bool {
    matches!(timeout(ANSWER_TIME, writer.write_all(line)).await, Ok(Ok(())))
}

/// Passes events on until the app ends, the client has enough, or all are to rest.
async fn stream_to(
    control: &Control,
    mut writer: OwnedWriteHalf,
    mut requests: Requests,
    mut lines: broadcast::Receiver<Arc<str>>,
) {
    let mut rest = control.0.rest.subscribe();
    loop {
        let line = tokio::select! {
            biased;
            line = lines.recv() => line,
            _ = rest.wait_for(|level| *level > 1) => return park(control, requests, writer, true),
            () = requests.gone(&writer) => return,
        };
        let written = match line {
            Ok(line) => answer(&mut writer, line.as_bytes()).await,
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                answer(&mut writer, json::lagged(missed).as_bytes()).await
            }
            Err(broadcast::error::RecvError::Closed) => return,
        };
        if !written {
            return;
        }
    }
}
