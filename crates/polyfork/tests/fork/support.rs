//! Which Node to test with, and how to start it.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use polyfork::channel::{Channel, Encoding, Message};
use polyfork::child_process::{ForkNode, Forked, Signal};
use serde_json::Value;

/// For what must happen; far beyond what any of it takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Makes scenarios tests, for two Node versions and both encodings of Node.
///
/// `only node26:` makes them tests of that version alone, for what came with it.
macro_rules! on_node {
    (only node26: $($scenario:ident),+ $(,)?) => {$(
        mod $scenario {
            use polyfork::channel::Encoding::{Advanced, Json};
            #[test]
            fn node26_json() { crate::support::play(module_path!(), "node26", Json, super::$scenario); }
            #[test]
            fn node26_advanced() { crate::support::play(module_path!(), "node26", Advanced, super::$scenario); }
        }
    )+};
    ($($scenario:ident),+ $(,)?) => {$(
        mod $scenario {
            use polyfork::channel::Encoding::{Advanced, Json};
            #[test]
            fn node20_json() { crate::support::play(module_path!(), "node20", Json, super::$scenario); }
            #[test]
            fn node20_advanced() { crate::support::play(module_path!(), "node20", Advanced, super::$scenario); }
            #[test]
            fn node26_json() { crate::support::play(module_path!(), "node26", Json, super::$scenario); }
            #[test]
            fn node26_advanced() { crate::support::play(module_path!(), "node26", Advanced, super::$scenario); }
        }
    )+};
}
pub(crate) use on_node;

/// A Node to test with, and the encoding to talk to it.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) path: PathBuf,
    pub(crate) encoding: Encoding,
}

impl Node {
    /// A script of `tests/fork-apps`, to be forked.
    pub(crate) fn script(&self, name: &str) -> ForkNode {
        let mut fork = ForkNode::new(app(name));
        fork.exec_path(&self.path).encoding(self.encoding);
        // What it has been given may keep it alive for ever.
        fork.command().kill_on_drop(true).parent_death_signal(Some(Signal::KILL));
        fork
    }

    pub(crate) fn fork(&self, name: &str) -> Forked {
        self.script(name).fork().expect("it starts")
    }
}

pub(crate) fn app(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fork-apps").join(name)
}

/// Runs a scenario, or tells that it is skipped because there is no such Node.
pub(crate) fn play(test: &str, name: &str, encoding: Encoding, scenario: impl AsyncFnOnce(Node)) {
    match find(name) {
        Ok(path) => block_on(async {
            let all = tokio::time::timeout(PATIENCE * 2, scenario(Node { path, encoding }));
            all.await.expect("the scenario takes longer than anything in it may");
        }),
        Err(reason) => skip(&format!("{test}::{name}"), &reason),
    }
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(future)
}

fn skip(test: &str, reason: &str) {
    println!("SKIP {test}: {reason}");
    if let Some(path) = std::env::var_os("POLYFORK_SKIP_LOG") {
        let log = fs::OpenOptions::new().append(true).create(true).open(path);
        log.and_then(|mut log| log.write_all(format!("SKIP {test}: {reason}\n").as_bytes()))
            .expect("the skip log can be written");
    }
}

/// From the manifest that `cargo xtask setup` writes.
fn find(name: &str) -> Result<PathBuf, String> {
    let manifest = std::env::var_os("POLYFORK_PEERS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.peers/manifest.json"),
        PathBuf::from,
    );
    let text = fs::read_to_string(&manifest)
        .map_err(|_| "not set up: run `cargo xtask setup`".to_owned())?;
    let tools: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let tool = &tools[name];
    tool["path"]
        .as_str()
        .map(PathBuf::from)
        .ok_or_else(|| tool["missing"].as_str().unwrap_or("not in the manifest").to_owned())
}

/// The next message, which must come.
pub(crate) async fn next(channel: &mut Channel) -> Message {
    let next = tokio::time::timeout(PATIENCE, channel.recv()).await.expect("a message in time");
    next.expect("no fault").expect("a message")
}

/// The next message as JSON.
pub(crate) async fn next_json(channel: &mut Channel) -> Value {
    next(channel).await.to().expect("it fits JSON")
}
