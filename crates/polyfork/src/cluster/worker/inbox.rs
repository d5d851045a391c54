//! Messages from the primary that the program has not taken yet.
//!
//! Bounded by bytes. When full, reading of the channel pauses, which in the end makes the primary's `send`
//! wait: nothing is lost to a slow program.
//!
//! The rule that surprises: a program that takes nothing at all for five seconds while the inbox is full
//! counts as not listening, and what comes then is dropped and counted, until it takes a message again.
//! Otherwise a program without interest in messages would, one day, no longer hear that it should stop,
//! because that word comes over the same channel.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};

use crate::cluster::event::{Encoded, Message};

/// How much may wait, in bytes as sent plus [`OVERHEAD_BYTES`] each.
const CAPACITY_BYTES: usize = 4 << 20;
/// What a waiting message costs besides its bytes; bounds the number of empty messages.
const OVERHEAD_BYTES: usize = 256;
/// How long a program may take nothing from a full inbox before it counts as not listening.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often to look whether the primary lives while reading is paused.
const LOOK: Duration = Duration::from_millis(100);

/// The program's end.
#[derive(Debug)]
pub(super) struct Inbox {
    // Unbounded in name only: an entry holds a permit out of `CAPACITY_BYTES`.
    waiting: Mutex<UnboundedReceiver<Entry>>,
    counters: Arc<Counters>,
}

/// The reader's end.
#[derive(Debug)]
pub(super) struct Delivery {
    entries: UnboundedSender<Entry>,
    room: Arc<Semaphore>,
    counters: Arc<Counters>,
    /// The number taken when the program was found not to listen.
    deaf_at: Option<u64>,
}

#[derive(Debug)]
struct Entry {
    message: Message,
    _room: OwnedSemaphorePermit,
}

#[derive(Debug, Default)]
struct Counters {
    taken: AtomicU64,
    dropped: AtomicU64,
}

/// The primary went away while we waited.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

/// Makes an empty inbox.
pub(super) fn inbox() -> (Delivery, Inbox) {
    let (entries, waiting) = unbounded_channel();
    let counters = Arc::new(Counters::default());
    let delivery = Delivery {
        entries,
        room: Arc::new(Semaphore::new(CAPACITY_BYTES)),
        counters: Arc::clone(&counters),
        deaf_at: None,
    };
    (delivery, Inbox { waiting: Mutex::new(waiting), counters })
}

impl Inbox {
    /// The next message; `None` when there will be none. Cancel safe.
    pub(super) async fn next(&self) -> Option<Message> {
        let entry = self.waiting.lock().await.recv().await?;
        self.counters.taken.fetch_add(1, Ordering::Relaxed);
        Some(entry.message)
    }

    /// How many messages were dropped because the program did not listen.
    pub(super) fn dropped(&self) -> u64 {
        self.counters.dropped.load(Ordering::Relaxed)
    }
}

impl Delivery {
    /// Puts a message into the inbox when there is room. `is_gone` is asked now and then while waiting.
    pub(super) async fn deliver(
        &mut self,
        bytes: Vec<u8>,
        is_gone: impl Fn() -> bool,
    ) -> Result<(), Gone> {
        let cost = u32::try_from((bytes.len() + OVERHEAD_BYTES).min(CAPACITY_BYTES))
            .expect("the capacity fits 32 bits");
        let room = match Arc::clone(&self.room).try_acquire_many_owned(cost) {
            Ok(room) => Some(room),
            Err(_) if self.deaf_at == Some(self.taken()) => None,
            Err(_) => self.wait_for_room(cost, is_gone).await?,
        };
        let Some(room) = room else {
            self.counters.dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        };
        self.deaf_at = None;
        let message = Message(Encoded::Postcard(bytes.into()));
        // The program's end is gone only when the whole worker is: nobody is left to miss the message.
        let _ = self.entries.send(Entry { message, _room: room });
        Ok(())
    }

    /// Waits for room; `None` when the program turns out not to listen.
    async fn wait_for_room(
        &mut self,
        cost: u32,
        is_gone: impl Fn() -> bool,
    ) -> Result<Option<OwnedSemaphorePermit>, Gone> {
        let acquire = Arc::clone(&self.room).acquire_many_owned(cost);
        tokio::pin!(acquire);
        let mut seen = self.taken();
        let mut idle = Duration::ZERO;
        loop {
            if let Ok(room) = tokio::time::timeout(LOOK, &mut acquire).await {
                return Ok(Some(room.expect("nobody closes the semaphore")));
            }
            if is_gone() {
                return Err(Gone);
            }
            idle = if seen == self.taken() { idle + LOOK } else { Duration::ZERO };
            seen = self.taken();
            if idle >= PATIENCE {
                self.deaf_at = Some(seen);
                return Ok(None);
            }
        }
    }

    fn taken(&self) -> u64 {
        self.counters.taken.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BIG: usize = CAPACITY_BYTES / 2 - OVERHEAD_BYTES;

    async fn full() -> (Delivery, Inbox) {
        let (mut delivery, inbox) = inbox();
        for _ in 0..2 {
            delivery.deliver(vec![7; BIG], || false).await.unwrap();
        }
        (delivery, inbox)
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_program_loses_nothing() {
        let (mut delivery, inbox) = full().await;
        let slow = async {
            for _ in 0..5 {
                tokio::time::sleep(PATIENCE - LOOK * 2).await;
                inbox.next().await.unwrap();
            }
        };
        let flood = async {
            for _ in 0..3 {
                delivery.deliver(vec![7; BIG], || false).await.unwrap();
            }
        };
        tokio::join!(slow, flood);
        assert_eq!(inbox.dropped(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_program_that_never_listens_holds_the_channel_up_once() {
        let (mut delivery, inbox) = full().await;
        delivery.deliver(vec![7; BIG], || false).await.unwrap();
        let after_the_first = tokio::time::Instant::now();
        for _ in 0..100 {
            delivery.deliver(vec![7; BIG], || false).await.unwrap();
        }
        assert_eq!(after_the_first.elapsed(), Duration::ZERO);
        assert_eq!(inbox.dropped(), 101);
        inbox.next().await.unwrap();
        delivery.deliver(vec![8], || false).await.unwrap();
        assert_eq!(inbox.dropped(), 101);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_the_primary_is_noticed_while_the_inbox_is_full() {
        let (mut delivery, _inbox) = full().await;
        assert_eq!(delivery.deliver(vec![7; BIG], || true).await, Err(Gone));
    }

    #[tokio::test]
    async fn a_message_larger_than_the_inbox_gets_through_alone() {
        let (mut delivery, inbox) = inbox();
        delivery.deliver(vec![7; CAPACITY_BYTES * 2], || false).await.unwrap();
        assert!(inbox.next().await.is_some());
    }
}
