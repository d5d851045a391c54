//! Children of this program in a role, and what is exchanged with them.

use std::time::Duration;

use polyfork::channel::{Channel, Encoding, Handle, Message};
use polyfork::child_process::{Command, Forked, Signal, Stdio, fork_program};
use polyfork::shared_memory::SharedArrayBuffer;

/// For what must happen; far beyond what any of it takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// This program in a role, with a native channel to it.
pub(crate) fn role(name: &str) -> Forked {
    let mut command = Command::new("/proc/self/exe");
    command.args([&format!("roles::{name}"), "--exact", "--ignored", "--nocapture"]);
    command.stdout(Stdio::Ignore).kill_on_drop(true).parent_death_signal(Some(Signal::KILL));
    fork_program(&mut command, Encoding::Native).expect("it starts")
}

/// As [`role`], and the memory is given to it.
pub(crate) async fn role_with(name: &str, memory: &SharedArrayBuffer) -> Forked {
    let forked = role(name);
    forked.channel.send_with(&"memory", memory.clone()).await.unwrap();
    forked
}

/// The next message, which must come.
pub(crate) async fn next(channel: &mut Channel) -> Message {
    let next = tokio::time::timeout(PATIENCE, channel.recv()).await.expect("a message in time");
    next.expect("no fault").expect("a message")
}

/// The memory that comes with the next message.
pub(crate) async fn next_memory(channel: &mut Channel) -> SharedArrayBuffer {
    match next(channel).await.take_handle() {
        Some(Handle::Memory(memory)) => memory,
        other => panic!("no memory but {other:?}"),
    }
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(future)
}

/// What stands for a number in a ring: its bytes again and again, at most 79 of them.
pub(crate) fn record(number: u64) -> Vec<u8> {
    number.to_le_bytes().into_iter().cycle().take(8 + number as usize % 72).collect()
}

/// `short` of something, or `long` if this is the long run (`POLYFORK_STRESS=1`).
pub(crate) fn amount(short: u64, long: u64) -> u64 {
    if std::env::var_os("POLYFORK_STRESS").is_some() { long } else { short }
}
