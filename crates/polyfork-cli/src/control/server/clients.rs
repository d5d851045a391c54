//! Clients, from the moment that they connect until they leave, rest or are sent away.
//!
//! Here is who gets a place and who gives way; what is said to one of them is in `talk`.
//!
//! The surprising rule: whoever is still sending can lose its place, whoever is being answered cannot.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::requests::is_permitted;
use super::talk::Talk;
use super::{ANSWER_TIME, Client, Control, LISTENING, Rested, SENDING, lock};

/// Clients at a time.
const MOST_CLIENTS: usize = 64;
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
            Ok(_) => control.count_refused(),
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Gives a client a place, if need be that of one that is still sending.
pub(super) fn admit(control: &Control, client: Rested) {
    let mut clients = lock(&control.0.clients);
    if clients.len() >= MOST_CLIENTS {
        let Some(oldest) = clients.iter().position(|client| client.is(SENDING)) else {
            drop(clients);
            return control.count_refused();
        };
        if let Some(client) = clients.remove(oldest) {
            client.task.abort();
            control.count_refused();
        }
    }
    let id = control.0.next_client.fetch_add(1, Ordering::Relaxed);
    let phase = Arc::new(AtomicU8::new(if client.listens { LISTENING } else { SENDING }));
    let talk = Talk::new(control.clone(), client, Arc::clone(&phase));
    let theirs = control.clone();
    let task = tokio::spawn(async move {
        talk.go_on().await;
        let mut clients = lock(&theirs.0.clients);
        clients.retain(|client| client.id != id);
        if clients.is_empty() {
            // An answer takes code that nothing else does.
            polyfork::process::give_back_code();
        }
    });
    clients.push_back(Client { id, phase, task: task.abort_handle() });
}
