//! Messages between two threads: message ports and their rivals, in turns, in one run.
//!
//! `bench-threads MODE MILLISECONDS ROUNDS [HOW ..]`. MODE is `oneway` (one thread posts as fast as it can, the other
//! counts) or `echo` (one message there and back at a time). HOW names contenders, all if none. Every round runs
//! each contender once, so that what else the machine does hits all alike; printed is one line of JSON per contender:
//! the median of its messages per second, and the median over the rounds of its rate divided by that of
//! `crossbeam` in the same round.
//!
//! A message is a struct of 96 bytes without a heap allocation. Bounded queues hold 1024 messages.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "the lines are the result")]

use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use polyfork::worker_threads::MessageChannel;

const CAPACITY: usize = 1024;
/// The first ones warm up.
const WARM_UP: u64 = 10_000;
const WARM_UP_ECHO: u64 = 200;
/// The clock is looked at once in so many messages.
const EVERY: u64 = 256;
/// The one all others are compared with.
const REFERENCE: &str = "crossbeam";

type Message = [u64; 12];

fn message(id: u64) -> Message {
    let mut message = [7; 12];
    message[0] = id;
    message
}

/// Runs for a while and returns messages per second.
type Run = fn(Duration) -> f64;

const ONEWAY: [(&str, Run); 15] = [
    ("ours-bounded", |limit| ours_oneway(MessageChannel::bounded(CAPACITY), limit)),
    ("ours-unbounded", |limit| ours_oneway(MessageChannel::new(), limit)),
    ("ours-bounded-async", |limit| ours_oneway_async(MessageChannel::bounded(CAPACITY), limit)),
    ("ours-unbounded-async", |limit| ours_oneway_async(MessageChannel::new(), limit)),
    (REFERENCE, |limit| crossbeam_oneway(crossbeam_channel::bounded(CAPACITY), limit)),
    ("crossbeam-unbounded", |limit| crossbeam_oneway(crossbeam_channel::unbounded(), limit)),
    ("flume-bounded", |limit| flume_oneway(flume::bounded(CAPACITY), limit)),
    ("flume-unbounded", |limit| flume_oneway(flume::unbounded(), limit)),
    ("flume-bounded-async", |limit| flume_oneway_async(flume::bounded(CAPACITY), limit)),
    ("kanal-bounded", |limit| kanal_oneway(kanal::bounded(CAPACITY), limit)),
    ("kanal-unbounded", |limit| kanal_oneway(kanal::unbounded(), limit)),
    ("kanal-bounded-async", |limit| kanal_oneway_async(kanal::bounded_async(CAPACITY), limit)),
    ("tokio-bounded-async", tokio_oneway),
    ("tokio-unbounded-async", tokio_oneway_unbounded),
    ("std-bounded", std_oneway),
];

const ECHO: [(&str, Run); 8] = [
    ("ours-bounded", |limit| ours_echo(MessageChannel::bounded(CAPACITY), limit)),
    ("ours-unbounded", |limit| ours_echo(MessageChannel::new(), limit)),
    ("ours-bounded-async", |limit| ours_echo_async(MessageChannel::bounded(CAPACITY), limit)),
    (REFERENCE, crossbeam_echo),
    ("flume-bounded", flume_echo),
    ("kanal-bounded", kanal_echo),
    ("tokio-bounded-async", tokio_echo),
    ("std-bounded", std_echo),
];

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [mode, limit, rounds, wanted @ ..] = args.as_slice() else {
        bail!("usage: bench-threads oneway|echo MILLISECONDS ROUNDS [HOW ..]");
    };
    let limit = Duration::from_millis(limit.parse().context("milliseconds")?);
    let rounds: usize = rounds.parse().context("rounds")?;
    let all: &[(&str, Run)] = match mode.as_str() {
        "oneway" => &ONEWAY,
        "echo" => &ECHO,
        other => bail!("no mode \"{other}\": oneway or echo"),
    };
    let chosen: Vec<_> = all
        .iter()
        .filter(|(how, _)| {
            wanted.is_empty() || *how == REFERENCE || wanted.iter().any(|w| w == how)
        })
        .collect();
    let mut rates = vec![Vec::new(); chosen.len()];
    for _ in 0..rounds {
        for ((_, run), rates) in chosen.iter().zip(&mut rates) {
            rates.push(run(limit));
        }
    }
    let reference = chosen.iter().position(|(how, _)| *how == REFERENCE).context("a reference")?;
    let reference = rates[reference].clone();
    for ((how, _), rates) in chosen.iter().zip(&rates) {
        let ratios = rates.iter().zip(&reference).map(|(rate, reference)| rate / reference);
        println!(
            "{{\"mode\":\"{mode}\",\"how\":\"{how}\",\"rate\":{:.0},\"ratio\":{:.3}}}",
            median(rates.clone()),
            median(ratios.collect())
        );
    }
    Ok(())
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Counts what arrives and knows when it is enough.
struct Count {
    limit: Duration,
    warm_up: u64,
    messages: u64,
    since: Option<Instant>,
    rate: f64,
}

impl Count {
    fn new(limit: Duration, warm_up: u64) -> Self {
        Self { limit, warm_up, messages: 0, since: None, rate: 0.0 }
    }

    /// One more; true when time is up.
    fn one(&mut self, message: Message) -> bool {
        black_box(message);
        self.messages += 1;
        match self.since {
            None if self.messages == self.warm_up => {
                self.messages = 0;
                self.since = Some(Instant::now());
                false
            }
            Some(start) if self.messages.is_multiple_of(EVERY) => {
                let time = start.elapsed();
                self.rate = self.messages as f64 / time.as_secs_f64();
                time >= self.limit
            }
            _ => false,
        }
    }
}

/// Posts on a thread of its own until nobody takes it any more; counts here. The ends are closed by being dropped.
fn oneway(
    limit: Duration,
    mut post: impl FnMut(Message) -> bool + Send,
    mut receive: impl FnMut() -> Message,
) -> f64 {
    let mut count = Count::new(limit, WARM_UP);
    thread::scope(|scope| {
        scope.spawn(move || (0..).all(|id| post(message(id))));
        while !count.one(receive()) {}
        drop(receive);
    });
    count.rate
}

/// Answers on a thread of its own, and asks here.
fn echo(
    limit: Duration,
    mut answer: impl FnMut() -> bool + Send,
    mut ask: impl FnMut(Message) -> Message,
) -> f64 {
    let mut count = Count::new(limit, WARM_UP_ECHO);
    thread::scope(|scope| {
        scope.spawn(move || while answer() {});
        let mut id = 0;
        while !count.one(ask(message(id))) {
            id += 1;
        }
        drop(ask);
    });
    count.rate
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime")
}

/// As [`oneway`], with a runtime of its own on each thread.
fn oneway_async(
    limit: Duration,
    post: impl AsyncFn(Message) -> bool + Send,
    mut receive: impl AsyncFnMut() -> Message,
) -> f64 {
    let mut count = Count::new(limit, WARM_UP);
    thread::scope(|scope| {
        scope.spawn(move || {
            runtime().block_on(async {
                let mut id = 0;
                while post(message(id)).await {
                    id += 1;
                }
            });
        });
        runtime().block_on(async { while !count.one(receive().await) {} });
        drop(receive);
    });
    count.rate
}

/// As [`echo`], with a runtime of its own on each thread.
fn echo_async(
    limit: Duration,
    mut answer: impl AsyncFnMut() -> bool + Send,
    mut ask: impl AsyncFnMut(Message) -> Message,
) -> f64 {
    let mut count = Count::new(limit, WARM_UP_ECHO);
    thread::scope(|scope| {
        scope.spawn(move || runtime().block_on(async { while answer().await {} }));
        runtime().block_on(async {
            let mut id = 0;
            while !count.one(ask(message(id)).await) {
                id += 1;
            }
        });
        drop(ask);
    });
    count.rate
}

type Ours = MessageChannel<Message, Message>;

fn ours_oneway(channel: Ours, limit: Duration) -> f64 {
    let (sender, mut receiver) = (channel.port1, channel.port2);
    let receive = move || receiver.receive_blocking().expect("a message");
    oneway(limit, move |message| sender.post_message_blocking(message).is_ok(), receive)
}

fn ours_oneway_async(channel: Ours, limit: Duration) -> f64 {
    let (sender, mut receiver) = (channel.port1, channel.port2);
    let receive = async move || receiver.receive().await.expect("a message");
    oneway_async(limit, async move |message| sender.post_message(message).await.is_ok(), receive)
}

fn ours_echo(channel: Ours, limit: Duration) -> f64 {
    let (mut here, mut there) = (channel.port1, channel.port2);
    let answer = move || match there.receive_blocking() {
        Some(message) => there.post_message_blocking(message).is_ok(),
        None => false,
    };
    echo(limit, answer, move |message| {
        here.post_message_blocking(message).expect("open");
        here.receive_blocking().expect("an answer")
    })
}

fn ours_echo_async(channel: Ours, limit: Duration) -> f64 {
    let (mut here, mut there) = (channel.port1, channel.port2);
    let answer = async move || match there.receive().await {
        Some(message) => there.post_message(message).await.is_ok(),
        None => false,
    };
    echo_async(limit, answer, async move |message| {
        here.post_message(message).await.expect("open");
        here.receive().await.expect("an answer")
    })
}

fn oneway_of<S: Send, R>(
    (sender, mut receiver): (S, R),
    limit: Duration,
    post: fn(&S, Message) -> bool,
    receive: fn(&mut R) -> Message,
) -> f64 {
    oneway(limit, move |message| post(&sender, message), move || receive(&mut receiver))
}

fn echo_of<S: Send, R: Send>(
    make: impl Fn() -> (S, R),
    limit: Duration,
    post: fn(&S, Message) -> bool,
    receive: fn(&mut R) -> Option<Message>,
) -> f64 {
    let (there, mut theirs) = make();
    let (here, mut ours) = make();
    let answer = move || receive(&mut theirs).is_some_and(|message| post(&here, message));
    echo(limit, answer, move |message| {
        post(&there, message);
        receive(&mut ours).expect("an answer")
    })
}

type Pair<S, R> = (S, R);

fn crossbeam_oneway(
    ends: Pair<crossbeam_channel::Sender<Message>, crossbeam_channel::Receiver<Message>>,
    limit: Duration,
) -> f64 {
    oneway_of(ends, limit, |s, m| s.send(m).is_ok(), |r| r.recv().expect("a message"))
}

fn crossbeam_echo(limit: Duration) -> f64 {
    let make = || crossbeam_channel::bounded(CAPACITY);
    echo_of(make, limit, |s, m| s.send(m).is_ok(), |r| r.recv().ok())
}

fn flume_oneway(
    ends: Pair<flume::Sender<Message>, flume::Receiver<Message>>,
    limit: Duration,
) -> f64 {
    oneway_of(ends, limit, |s, m| s.send(m).is_ok(), |r| r.recv().expect("a message"))
}

fn flume_oneway_async(
    (sender, receiver): Pair<flume::Sender<Message>, flume::Receiver<Message>>,
    limit: Duration,
) -> f64 {
    let receive = async move || receiver.recv_async().await.expect("a message");
    oneway_async(limit, async move |message| sender.send_async(message).await.is_ok(), receive)
}

fn flume_echo(limit: Duration) -> f64 {
    echo_of(|| flume::bounded(CAPACITY), limit, |s, m| s.send(m).is_ok(), |r| r.recv().ok())
}

fn kanal_oneway(
    ends: Pair<kanal::Sender<Message>, kanal::Receiver<Message>>,
    limit: Duration,
) -> f64 {
    oneway_of(ends, limit, |s, m| s.send(m).is_ok(), |r| r.recv().expect("a message"))
}

fn kanal_oneway_async(
    (sender, receiver): Pair<kanal::AsyncSender<Message>, kanal::AsyncReceiver<Message>>,
    limit: Duration,
) -> f64 {
    let receive = async move || receiver.recv().await.expect("a message");
    oneway_async(limit, async move |message| sender.send(message).await.is_ok(), receive)
}

fn kanal_echo(limit: Duration) -> f64 {
    echo_of(|| kanal::bounded(CAPACITY), limit, |s, m| s.send(m).is_ok(), |r| r.recv().ok())
}

fn tokio_oneway(limit: Duration) -> f64 {
    let (sender, mut receiver) = tokio::sync::mpsc::channel(CAPACITY);
    let receive = async move || receiver.recv().await.expect("a message");
    oneway_async(limit, async move |message| sender.send(message).await.is_ok(), receive)
}

fn tokio_oneway_unbounded(limit: Duration) -> f64 {
    let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
    let receive = async move || receiver.recv().await.expect("a message");
    oneway_async(limit, async move |message| sender.send(message).is_ok(), receive)
}

fn tokio_echo(limit: Duration) -> f64 {
    let (here, mut theirs) = tokio::sync::mpsc::channel::<Message>(CAPACITY);
    let (there, mut ours) = tokio::sync::mpsc::channel(CAPACITY);
    let answer = async move || match theirs.recv().await {
        Some(message) => there.send(message).await.is_ok(),
        None => false,
    };
    echo_async(limit, answer, async move |message| {
        here.send(message).await.expect("open");
        ours.recv().await.expect("an answer")
    })
}

fn std_oneway(limit: Duration) -> f64 {
    let ends = std::sync::mpsc::sync_channel(CAPACITY);
    oneway_of(ends, limit, |s, m| s.send(m).is_ok(), |r| r.recv().expect("a message"))
}

fn std_echo(limit: Duration) -> f64 {
    let make = || std::sync::mpsc::sync_channel(CAPACITY);
    echo_of(make, limit, |s, m| s.send(m).is_ok(), |r| r.recv().ok())
}
