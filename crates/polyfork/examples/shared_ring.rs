//! The producer and the consumer that every introduction to `SharedArrayBuffer` has, in two processes instead of two threads.
//!
//! First as it is written in JavaScript: a bounded buffer of numbers with two counters, `Atomics.wait` and
//! `Atomics.notify`. Then with the ring of this crate, which takes records of any length and enters the kernel
//! only when one side sleeps.
//!
//! `cargo run --release --example shared_ring`
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::sync::atomic::AtomicI32;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Instant;

use polyfork::channel::Handle;
use polyfork::child_process::{Entry, EntryResult, Port, fork_entry, run_entries};
use polyfork::shared_memory::ring::{self, Consumer, Producer};
use polyfork::shared_memory::{Atomics, SharedArrayBuffer, View};

const NUMBERS: i32 = 200_000;
const SLOTS: i32 = 1024;

/// The process that consumes. It gets the memory, and says what the numbers add up to.
const CONSUMER: Entry<String, i64> = Entry::new("consumer", |port| Box::pin(consumer(port)));

/// In JavaScript: `new Int32Array(sab)`, with `PUT` and `TAKEN` as its first two elements and the slots behind.
struct Buffer(View<AtomicI32>);

/// How many numbers were put in, and taken out.
const PUT: usize = 0;
const TAKEN: usize = 1;

impl Buffer {
    fn put(&self, number: i32) {
        let put = self.0[PUT].load(SeqCst);
        loop {
            let taken = self.0[TAKEN].load(SeqCst);
            if put - taken < SLOTS {
                break;
            }
            // Returns at once if something was taken in between.
            self.0.wait(TAKEN, taken, None);
        }
        self.0[2 + (put % SLOTS) as usize].store(number, SeqCst);
        self.0[PUT].store(put + 1, SeqCst);
        self.0.notify(PUT, 1);
    }

    fn take(&self) -> i32 {
        let taken = self.0[TAKEN].load(SeqCst);
        while self.0[PUT].load(SeqCst) == taken {
            self.0.wait(PUT, taken, None);
        }
        let number = self.0[2 + (taken % SLOTS) as usize].load(SeqCst);
        self.0[TAKEN].store(taken + 1, SeqCst);
        self.0.notify(TAKEN, 1);
        number
    }
}

async fn consumer(mut port: Port<String, i64>) -> EntryResult {
    while let Some((how, mut message)) = port.recv_message().await? {
        let Some(Handle::Memory(memory)) = message.take_handle() else {
            return Err("the message has no memory".into());
        };
        // Both loops block, so they have a thread of their own.
        let sum = tokio::task::spawn_blocking(move || match how.as_str() {
            "classic" => take_classic(&memory),
            _ => take_from_ring(&memory),
        });
        port.send(&sum.await?.map_err(|error| error.to_string())?).await?;
    }
    Ok(())
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

fn take_classic(memory: &SharedArrayBuffer) -> Result<i64, AnyError> {
    let buffer = Buffer(memory.i32()?);
    Ok((0..NUMBERS).map(|_| i64::from(buffer.take())).sum())
}

fn take_from_ring(memory: &SharedArrayBuffer) -> Result<i64, AnyError> {
    let mut consumer = Consumer::new(memory)?;
    let (mut record, mut sum) = (Vec::new(), 0);
    while consumer.pop(&mut record, None)? {
        sum += String::from_utf8_lossy(&record).parse::<i64>()?;
    }
    Ok(sum)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    run_entries(&[&CONSUMER]); // does not return in the other process
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut child = fork_entry(&CONSUMER)?;
        let expected = i64::from(NUMBERS) * i64::from(NUMBERS - 1) / 2;

        let memory = SharedArrayBuffer::new((2 + SLOTS as usize) * size_of::<i32>())?;
        let buffer = Buffer(memory.i32()?);
        let start = Instant::now();
        child.port.send_with(&"classic".to_owned(), memory).await?;
        tokio::task::spawn_blocking(move || (0..NUMBERS).for_each(|number| buffer.put(number)))
            .await?;
        let sum = child.port.recv().await?;
        println!("wait and notify: {NUMBERS} numbers in {:?}, sum {sum:?}", start.elapsed());
        assert_eq!(sum, Some(expected));

        let memory = ring::create(64 << 10)?;
        let mut producer = Producer::new(&memory)?;
        let start = Instant::now();
        child.port.send_with(&"ring".to_owned(), memory).await?;
        let producing = tokio::task::spawn_blocking(move || {
            (0..NUMBERS).try_for_each(|number| producer.push(number.to_string().as_bytes(), None))
        });
        producing.await??;
        let sum = child.port.recv().await?;
        println!("ring of records: {NUMBERS} numbers in {:?}, sum {sum:?}", start.elapsed());
        assert_eq!(sum, Some(expected));

        child.port.disconnect().await?;
        child.child.wait().await?;
        Ok(())
    })
}
