//! Messages to any worker by its id, without a port to it.
//!
//! The rule that surprises: the types are not known to the compiler. The receiver looks what came; ports between
//! those who know each other are better and faster.
//!
//! Behaviour follows: Node `worker.postMessageToThread`.

use std::any::Any;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Mutex;

use polyfork_core::sync::lock;
use polyfork_core::sync::port::{Sender, TryPost, queue};

use super::{control, current};
use crate::worker_threads::MessagePort;
use crate::worker_threads::port::{Poster, next_id};

pub(super) type Inbox = Sender<ThreadMessage>;

/// That of all threads that are no workers.
static MAIN: Mutex<Option<Inbox>> = Mutex::new(None);

/// A message that came by [`post_message_to_thread`].
pub struct ThreadMessage {
    /// The id of the worker that posted it; 0 for a thread that is no worker.
    pub source: u64,
    /// What it posted; `downcast` it.
    pub value: Box<dyn Any + Send>,
}

impl fmt::Debug for ThreadMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThreadMessage").field("source", &self.source).finish_non_exhaustive()
    }
}

/// Why a message did not reach a thread. It is given back.
pub struct PostToThreadError {
    /// Why.
    pub kind: PostToThreadErrorKind,
    /// The message.
    pub value: Box<dyn Any + Send>,
}

/// Why a message did not reach a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PostToThreadErrorKind {
    /// A thread cannot post to itself (Node: `ERR_WORKER_MESSAGING_SAME_THREAD`).
    #[error("a thread cannot post a message to itself")]
    SameThread,
    /// No such worker, or it has ended (Node: `ERR_WORKER_MESSAGING_FAILED`).
    #[error("no such worker runs")]
    NoSuchThread,
    /// It has not called [`thread_messages`], or receives no more.
    #[error("the worker does not receive such messages")]
    NotListening,
    /// It has not received those before.
    #[error("too many messages wait for the worker")]
    Full,
}

impl fmt::Debug for PostToThreadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostToThreadError").field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl fmt::Display for PostToThreadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot post a message to a thread: {}", self.kind)
    }
}

impl std::error::Error for PostToThreadError {}

/// Makes this worker, or the part of the program that is no worker, receive messages by id: at most `capacity` wait, at
/// least one. A second call takes the place of the first.
///
/// Nothing can be posted on this port; it is for receiving, in any of its ways.
pub fn thread_messages(capacity: usize) -> MessagePort<ThreadMessage, ()> {
    let capacity = NonZeroUsize::new(capacity).unwrap_or(NonZeroUsize::MIN);
    let (inbox, incoming) = queue(Some(capacity));
    // Nobody receives the other direction.
    let (outgoing, _closed) = queue(None);
    let replaced = current::with(|current| {
        let place = current.map_or(&MAIN, |current| &current.control.inbox);
        lock(place).replace(inbox)
    });
    drop(replaced);
    MessagePort::new(next_id(), incoming, Poster::new(0, outgoing))
}

/// Posts a message to a worker by its id; 0 is whoever is no worker (Node: `postMessageToThread`).
///
/// # Errors
/// [`PostToThreadError`] with the message.
pub fn post_message_to_thread<T: Any + Send>(id: u64, value: T) -> Result<(), PostToThreadError> {
    use PostToThreadErrorKind as Kind;
    let source = current::thread_id();
    let value: Box<dyn Any + Send> = Box::new(value);
    let refuse = |kind, value| Err(PostToThreadError { kind, value });
    if id == source {
        return refuse(Kind::SameThread, value);
    }
    let inbox = match id {
        0 => lock(&MAIN).clone(),
        _ => match control::find(id) {
            Some(control) => lock(&control.inbox).clone(),
            None => return refuse(Kind::NoSuchThread, value),
        },
    };
    let Some(inbox) = inbox else { return refuse(Kind::NotListening, value) };
    match inbox.try_post(ThreadMessage { source, value }) {
        Ok(()) => Ok(()),
        Err(TryPost::Full(message)) => refuse(Kind::Full, message.value),
        Err(TryPost::Closed(message)) => refuse(Kind::NotListening, message.value),
    }
}
