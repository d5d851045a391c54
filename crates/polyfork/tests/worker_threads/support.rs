//! Patience, a runtime, and messages that count their drops.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use polyfork::child_process::{Command, Exit, Stdio};

/// For what must happen; far beyond what any of it takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        tokio::time::timeout(PATIENCE, future).await.expect("it takes longer than anything may")
    })
}

/// Counts messages that live.
#[derive(Clone, Default)]
pub(crate) struct Census(Arc<AtomicUsize>);

pub(crate) struct Counted(Arc<AtomicUsize>);

impl Census {
    pub(crate) fn message(&self) -> Counted {
        self.0.fetch_add(1, Ordering::SeqCst);
        Counted(Arc::clone(&self.0))
    }

    pub(crate) fn alive(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        assert_ne!(self.0.fetch_sub(1, Ordering::SeqCst), 0, "dropped twice");
    }
}

/// This program as a child in a role; how it ended, and what it wrote to its standard error.
pub(crate) fn role(name: &str) -> (Exit, String) {
    block_on(async {
        let mut command = Command::new("/proc/self/exe");
        command.args([&format!("roles::{name}"), "--exact", "--ignored", "--nocapture"]);
        command.stdout(Stdio::Ignore).stderr(Stdio::Pipe).env("RUST_BACKTRACE", "0");
        let output = command.spawn().unwrap().wait_with_output().await.unwrap();
        (output.exit, String::from_utf8_lossy(&output.stderr).into_owned())
    })
}
