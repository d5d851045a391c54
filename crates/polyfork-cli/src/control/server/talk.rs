//! One client that is talked to: from a request to its answer, again and again, until it leaves or is to rest.
//!
//! What it sends is taken by `requests`, what it asks for is done by `work`, who has a place at all is in `clients`.
//!
//! The surprising rule: work that was begun for a client goes on when the client leaves. A restart that stopped half-way
//! because a terminal was closed would be worse than one that is finished unseen.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tokio::time::timeout;

use super::requests::Requests;
use super::work::{Answer, accepted, work};
use super::{ANSWER_TIME, Control, LISTENING, Rest, Rested, SENDING, SERVED, Wish, lock};
use crate::control::protocol::{self, Refusal, Request, Verb};
use crate::report::json;

/// For a client to send its request.
const REQUEST_TIME: Duration = Duration::from_secs(5);

/// A client that is talked to.
pub(super) struct Talk {
    control: Control,
    requests: Requests,
    writer: OwnedWriteHalf,
    listens: bool,
    phase: Arc<AtomicU8>,
    rest: watch::Receiver<Rest>,
}

impl Talk {
    pub(super) fn new(control: Control, client: Rested, phase: Arc<AtomicU8>) -> Talk {
        let Rested { stream, buffer, listens } = client;
        let (reader, writer) = stream.into_split();
        let requests = Requests { reader, buffer, stranger: false };
        let rest = control.0.rest.subscribe();
        Talk { control, requests, writer, listens, phase, rest }
    }

    /// From the first byte to the last, or until it is to rest.
    pub(super) async fn go_on(mut self) {
        if self.listens {
            if let Ok(lines) = self.control.listen() {
                self.pass_on(lines).await;
            }
            return;
        }
        loop {
            self.enter(SENDING);
            let sent = tokio::select! {
                biased;
                () = until(&mut self.rest, Rest::Askers) => return self.park(),
                sent = timeout(REQUEST_TIME, self.requests.next()) => sent,
            };
            let line = match sent {
                Ok(Ok(Some(line))) => line,
                Ok(Ok(None)) => return,
                Ok(Err(refusal)) => return self.refuse(&refusal).await,
                Err(_too_slow) => return self.control.count_refused(),
            };
            self.enter(SERVED);
            match self.answer(line).await {
                Some(talk) => self = talk,
                None => return,
            }
        }
    }

    fn enter(&self, phase: u8) {
        self.phase.store(phase, Ordering::Relaxed);
    }

    /// Does what a line asks for. `None` when nothing follows, or not here.
    async fn answer(mut self, line: Vec<u8>) -> Option<Talk> {
        let read = protocol::read(&line);
        drop(line);
        match read {
            Ok(Request { verb: Verb::Upgrade { binary, limit }, wait, .. }) => {
                self.wish(binary, limit, wait).await
            }
            Ok(request) => self.work(request).await,
            Err(refusal) => {
                self.refuse(&refusal).await;
                // Whoever sent it is lost, or no friend.
                (refusal.word != "bad_request").then_some(self)
            }
        }
    }

    async fn work(mut self, request: Request) -> Option<Talk> {
        let reply = tokio::select! {
            reply = work(&self.control, request) => reply,
            // Nobody is left to be answered. What was begun goes on.
            () = self.requests.gone(&self.writer) => return None,
        };
        match reply {
            Answer::Line(line) => self.write(&line).await.then_some(self),
            Answer::Stream(lines) => {
                self.listens = true;
                self.enter(LISTENING);
                if self.write(&accepted()).await {
                    self.pass_on(lines).await;
                }
                None
            }
        }
    }

    /// Passes a wish for another binary on, with the client, who is answered when it is fulfilled or not. Gives the client
    /// back when it does not wait for that.
    async fn wish(mut self, binary: PathBuf, limit: Option<Duration>, wait: bool) -> Option<Talk> {
        if let Err(refusal) = self.control.begin_upgrade() {
            return self.write(&protocol::not_done(&refusal)).await.then_some(self);
        }
        let control = self.control.clone();
        let (asker, kept) = match wait {
            false => {
                // Who does not take it asks for nothing more.
                self.write(&accepted()).await;
                (None, Some(self))
            }
            true => (self.rested(), None),
        };
        if control.0.wishes.send(Wish { binary, limit, asker }).await.is_err() {
            control.end_upgrade();
        }
        kept
    }

    /// Passes events on until the app ends, the client has enough, or all are to rest.
    async fn pass_on(mut self, mut lines: broadcast::Receiver<Arc<str>>) {
        loop {
            let line = tokio::select! {
                biased;
                line = lines.recv() => line,
                () = until(&mut self.rest, Rest::Everybody) => return self.park(),
                () = self.requests.gone(&self.writer) => return,
            };
            let written = match line {
                Ok(line) => self.write(line.as_bytes()).await,
                Err(RecvError::Lagged(missed)) => self.write(json::lagged(missed).as_bytes()).await,
                Err(RecvError::Closed) => return,
            };
            if !written {
                return;
            }
        }
    }

    /// Tells what is wrong with what was sent, and counts it.
    async fn refuse(&mut self, refusal: &Refusal) {
        self.control.count_refused();
        self.write(&protocol::not_done(refusal)).await;
    }

    /// Writes a line; false when the client does not take it.
    async fn write(&mut self, line: &[u8]) -> bool {
        matches!(timeout(ANSWER_TIME, self.writer.write_all(line)).await, Ok(Ok(())))
    }

    /// Keeps the client for whoever goes on with it.
    fn park(self) {
        let control = self.control.clone();
        if self.requests.stranger {
            return control.count_refused();
        }
        if let Some(client) = self.rested() {
            lock(&control.0.rested).push(client);
        }
    }

    fn rested(self) -> Option<Rested> {
        let Requests { reader, buffer, stranger: _ } = self.requests;
        // Both are halves of one.
        let stream = reader.reunite(self.writer).ok()?;
        Some(Rested { stream, buffer, listens: self.listens })
    }
}

/// Returns when these are to rest.
async fn until(rest: &mut watch::Receiver<Rest>, these: Rest) {
    // Whoever tells lives as long as the control plane.
    let _ = rest.wait_for(|now| *now >= these).await;
}
