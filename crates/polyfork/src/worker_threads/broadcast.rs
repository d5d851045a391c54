//! One message for all who have a channel of that name, within this process.
//!
//! Every channel has a queue of its own, so that one that is slow holds up nobody. What happens to it is its own choice:
//! see [`WhenFull`].
//!
//! The rule that surprises: a channel never hears itself, but it does hear another channel of the same name in the same
//! thread.
//!
//! Behaviour follows: Node `BroadcastChannel`; HTML, "Broadcasting to other browsing contexts".

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::future::poll_fn;
use std::sync::{Arc, LazyLock, Mutex, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use polyfork_core::sync::lock;

use super::TryReceiveError;
use super::park::{block_on, block_on_until};

/// How many messages wait for a channel, unless said.
const CAPACITY: usize = 1024;

/// What a channel does with a message for which it has no room. It is told how many it missed either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenFull {
    /// Drops the oldest: what is received is news.
    #[default]
    DropOldest,
    /// Drops the new one: what is received has no gap until the queue was full.
    DropNewest,
}

/// A channel to all others of its name in this process, whatever thread they are in.
///
/// Messages of one channel arrive at every other in the order they were posted. They are cloned for each: put large ones
/// into an [`Arc`]. All channels of a name have the same type of messages. Posting never waits.
///
/// ```
/// use polyfork::worker_threads::{BroadcastChannel, Broadcasted};
///
/// let mut one = BroadcastChannel::<String>::new("news")?;
/// let mut other = BroadcastChannel::new("news")?;
/// assert_eq!(one.post_message("hello".to_owned()), 1);
/// assert_eq!(other.receive_blocking(), Some(Broadcasted::Message("hello".to_owned())));
/// assert!(one.try_receive().is_err(), "a channel does not hear itself");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct BroadcastChannel<T> {
    name: Arc<str>,
    group: Arc<Group<T>>,
    own: Arc<Member<T>>,
}

/// What a channel hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Broadcasted<T> {
    /// A message.
    Message(T),
    /// So many messages were dropped because it did not keep up: those before the next one where the oldest are
    /// dropped; where the newest are, some after those that were received so far.
    Missed(u64),
}

/// Why there is no channel of this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BroadcastError {
    /// Channels of this name carry messages of another type.
    #[error("cannot open the broadcast channel {0:?}: it is open for messages of another type")]
    OtherType(String),
}

/// All channels of one name.
struct Group<T> {
    members: Mutex<Vec<Arc<Member<T>>>>,
}

struct Member<T> {
    capacity: usize,
    when_full: WhenFull,
    inbox: Mutex<Inbox<T>>,
}

struct Inbox<T> {
    queue: VecDeque<T>,
    missed: u64,
    /// Taken by whoever wakes it.
    waker: Option<Waker>,
    closed: bool,
}

/// The groups by name. The last channel of a name takes its entry away.
static GROUPS: LazyLock<Mutex<HashMap<Arc<str>, AnyGroup>>> = LazyLock::new(Mutex::default);

/// A [`Group`] whose type is known to its members.
type AnyGroup = Weak<dyn Any + Send + Sync>;

impl<T: Clone + Send + 'static> BroadcastChannel<T> {
    /// Opens a channel for which at most 1024 messages wait, and then the oldest are dropped.
    ///
    /// # Errors
    /// [`BroadcastError`].
    pub fn new(name: &str) -> Result<Self, BroadcastError> {
        Self::with(name, CAPACITY, WhenFull::default())
    }

    /// Opens a channel for which at most `capacity` messages wait, at least one.
    ///
    /// # Errors
    /// [`BroadcastError`].
    pub fn with(name: &str, capacity: usize, when_full: WhenFull) -> Result<Self, BroadcastError> {
        let inbox = Inbox { queue: VecDeque::new(), missed: 0, waker: None, closed: false };
        let own =
            Arc::new(Member { capacity: capacity.max(1), when_full, inbox: Mutex::new(inbox) });
        let name: Arc<str> = Arc::from(name);
        let mut groups = lock(&GROUPS);
        let known = groups.get(&name).and_then(Weak::upgrade);
        let group = match known.map(Arc::downcast::<Group<T>>) {
            Some(Ok(group)) => group,
            Some(Err(other)) => {
                drop(groups);
                // It may be the last by now, and its messages are foreign.
                drop(other);
                return Err(BroadcastError::OtherType(name.to_string()));
            }
            None => {
                let group = Arc::new(Group { members: Mutex::default() });
                let weak = Arc::downgrade(&group);
                groups.insert(Arc::clone(&name), weak);
                group
            }
        };
        lock(&group.members).push(Arc::clone(&own));
        Ok(Self { name, group, own })
    }

    /// Posts a message to all others; how many will have it. A channel that was [closed](Self::close) posts to none.
    pub fn post_message(&self, message: T) -> usize {
        if self.is_closed() {
            return 0;
        }
        // Cloning and waking are foreign code, so not with a lock held.
        let others: Vec<_> = lock(&self.group.members)
            .iter()
            .filter(|member| !Arc::ptr_eq(member, &self.own))
            .cloned()
            .collect();
        let Some((last, rest)) = others.split_last() else { return 0 };
        let told = rest.iter().filter(|member| member.take(message.clone())).count();
        told + usize::from(last.take(message))
    }
}

impl<T> BroadcastChannel<T> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What comes next; `None` when the channel was closed.
    ///
    /// # Cancel safety
    /// No message is lost.
    pub async fn receive(&mut self) -> Option<Broadcasted<T>> {
        let own = &self.own;
        poll_fn(|cx| {
            let coop = std::task::ready!(tokio::task::coop::poll_proceed(cx));
            let next = own.poll_next(cx);
            if next.is_ready() {
                coop.made_progress();
            }
            next
        })
        .await
    }

    /// [`receive`](Self::receive), blocking the thread.
    pub fn receive_blocking(&mut self) -> Option<Broadcasted<T>> {
        block_on(poll_fn(|cx| self.own.poll_next(cx)))
    }

    /// [`receive_blocking`](Self::receive_blocking), for no longer than `limit`.
    ///
    /// # Errors
    /// [`TryReceiveError::Empty`]: nothing came in time.
    pub fn receive_timeout(&mut self, limit: Duration) -> Result<Broadcasted<T>, TryReceiveError> {
        let deadline = Instant::now().checked_add(limit);
        match block_on_until(poll_fn(|cx| self.own.poll_next(cx)), deadline) {
            Some(next) => next.ok_or(TryReceiveError::Closed),
            None => Err(TryReceiveError::Empty),
        }
    }

    /// What comes next, if it is there.
    ///
    /// # Errors
    /// [`TryReceiveError`].
    pub fn try_receive(&mut self) -> Result<Broadcasted<T>, TryReceiveError> {
        let mut inbox = lock(&self.own.inbox);
        let closed = inbox.closed;
        let why = if closed { TryReceiveError::Closed } else { TryReceiveError::Empty };
        self.own.next(&mut inbox).ok_or(why)
    }

    /// Leaves the group: it hears nothing more, not even what waits, and posts to nobody.
    pub fn close(&self) {
        lock(&self.group.members).retain(|member| !Arc::ptr_eq(member, &self.own));
        let mut inbox = lock(&self.own.inbox);
        inbox.closed = true;
        inbox.missed = 0;
        let (queue, waker) = (std::mem::take(&mut inbox.queue), inbox.waker.take());
        drop(inbox);
        if let Some(waker) = waker {
            waker.wake();
        }
        drop(queue);
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        lock(&self.own.inbox).closed
    }
}

impl<T> Drop for BroadcastChannel<T> {
    fn drop(&mut self) {
        self.close();
        let mut groups = lock(&GROUPS);
        // Ours is the last strong reference if nobody else is in the group: others are only made with the lock held.
        if Arc::strong_count(&self.group) == 1 {
            groups.remove(&self.name);
        }
    }
}

impl<T> Member<T> {
    /// Whether it will have the message.
    fn take(&self, message: T) -> bool {
        let mut inbox = lock(&self.inbox);
        if inbox.closed {
            drop(inbox);
            drop(message);
            return false;
        }
        let full = inbox.queue.len() >= self.capacity;
        let (kept, dropped) = match self.when_full {
            _ if !full => (Some(message), None),
            WhenFull::DropOldest => (Some(message), inbox.queue.pop_front()),
            WhenFull::DropNewest => (None, Some(message)),
        };
        inbox.missed += u64::from(full);
        let has = kept.is_some();
        inbox.queue.extend(kept);
        let waker = inbox.waker.take();
        drop(inbox);
        if let Some(waker) = waker {
            waker.wake();
        }
        drop(dropped);
        has
    }

    fn next(&self, inbox: &mut Inbox<T>) -> Option<Broadcasted<T>> {
        let gap_is_next = match self.when_full {
            WhenFull::DropOldest => true,
            // What was dropped came after what waits.
            WhenFull::DropNewest => inbox.queue.is_empty(),
        };
        if inbox.missed > 0 && gap_is_next {
            return Some(Broadcasted::Missed(std::mem::take(&mut inbox.missed)));
        }
        inbox.queue.pop_front().map(Broadcasted::Message)
    }

    fn poll_next(&self, cx: &mut Context<'_>) -> Poll<Option<Broadcasted<T>>> {
        let waker = cx.waker().clone();
        let mut inbox = lock(&self.inbox);
        if let Some(next) = self.next(&mut inbox) {
            return Poll::Ready(Some(next));
        }
        if inbox.closed {
            return Poll::Ready(None);
        }
        let replaced = inbox.waker.replace(waker);
        drop(inbox);
        drop(replaced);
        Poll::Pending
    }
}

impl<T> fmt::Debug for BroadcastChannel<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BroadcastChannel")
            .field("name", &self.name)
            .field("closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}
