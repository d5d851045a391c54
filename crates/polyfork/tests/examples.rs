//! The examples do what they say. Each is run as a user runs it, as a program of its own.
//!
//! Cargo builds examples with the tests of a package; a run of this file alone (`--test examples`) does not, so
//! what is missing is built first.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

use std::ffi::OsString;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use polyfork::child_process::{Exec, Output, exec_file};
use serde_json::Value;

/// Far beyond what any example takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// An example's program, next to this one.
async fn example(name: &str) -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let profile = tests.ancestors().nth(2).unwrap().to_owned();
    let program = profile.join("examples").join(name);
    if !program.exists() {
        let mut args: Vec<OsString> =
            ["build", "-p", "polyfork", "--example", name, "--target-dir"].map(Into::into).into();
        args.push(profile.parent().unwrap().into());
        args.extend(profile.ends_with("release").then(|| "--release".into()));
        args.extend(cfg!(feature = "axum").then(|| "--all-features".into()));
        let built = exec_file(env!("CARGO"), args).max_buffer(16 << 20).await;
        built.unwrap_or_else(|error| panic!("{name} is not built: {error}"));
    }
    program
}

/// A Node to test with, or why there is none.
fn node(name: &str) -> Result<PathBuf, String> {
    let manifest = std::env::var_os("POLYFORK_PEERS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.peers/manifest.json"),
        PathBuf::from,
    );
    let text = fs::read_to_string(&manifest)
        .map_err(|_| "not set up: run `cargo xtask setup`".to_owned())?;
    let tools: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let path = tools[name]["path"].as_str().map(PathBuf::from);
    path.ok_or_else(|| tools[name]["missing"].as_str().unwrap_or("not in the manifest").to_owned())
}

fn skip(test: &str, reason: &str) {
    println!("SKIP {test}: {reason}");
    if let Some(path) = std::env::var_os("POLYFORK_SKIP_LOG") {
        let log = fs::OpenOptions::new().append(true).create(true).open(path);
        log.and_then(|mut log| log.write_all(format!("SKIP {test}: {reason}\n").as_bytes()))
            .expect("the skip log can be written");
    }
}

/// Runs it to its end, which must be a good one.
async fn run(program: Exec) -> String {
    let Output { stdout, stderr, .. } = program.timeout(PATIENCE).await.unwrap();
    let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    println!("{stdout}{stderr}");
    stdout
}

#[tokio::test]
async fn spawn_stream_shows_each_line_as_it_comes_and_the_end() {
    let none: [&str; 0] = [];
    let text = run(exec_file(example("spawn_stream").await, none)).await;
    let at = |part: &str| text.find(part).unwrap_or_else(|| panic!("no {part:?} in {text}"));
    assert!(text.starts_with("started as process "));
    assert!(at("out: line 1") < at("out: line 2") && at("out: line 2") < at("out: line 3"));
    assert!(at("err: a word of warning") < at("closed: everything has been read"));
    assert!(at("exited: code Some(0), signal None") < at("closed:"));
}

#[tokio::test]
async fn exec_timeout_ends_what_takes_too_long_and_shows_what_does_not() {
    let late = ["0.3", "sh", "-c", "echo so far; exec sleep 1000"];
    let text = run(exec_file(example("exec_timeout").await, late)).await;
    assert!(text.starts_with("not in 0.3 s, so Some("), "{text}");
    assert!(text.ends_with("until then it wrote:\nso far\n"), "{text}");
    let text = run(exec_file(example("exec_timeout").await, ["60", "echo", "a  b"])).await;
    assert_eq!(text, "in time:\na  b\n");
}

#[tokio::test]
async fn fork_node_talks_to_its_script() {
    for version in ["node20", "node26"] {
        let node = match node(version) {
            Ok(node) => node,
            Err(reason) => {
                skip(&format!("examples::fork_node_talks_to_its_script::{version}"), &reason);
                continue;
            }
        };
        let none: [&str; 0] = [];
        let program = exec_file(example("fork_node").await, none);
        let others = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::iter::once(node.parent().unwrap().to_owned());
        let path = std::env::join_paths(folders.chain(std::env::split_paths(&others))).unwrap();
        let text = run(program.env("PATH", path)).await;
        let hello = format!("the script says \"hello Rust, I am Node v{}", &version[4..]);
        assert!(text.starts_with(&hello), "{text}");
        assert!(text.contains("the sum is 6\n"), "{text}");
        assert!(text.ends_with("it ended with code Some(0)\n"), "{text}");
    }
}

#[tokio::test]
async fn rust_worker_for_node_counts_and_serves() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/rust_worker_for_node.mjs");
    for version in ["node20", "node26"] {
        let test = "examples::rust_worker_for_node_counts_and_serves";
        match node(version) {
            Ok(node) => {
                let worker = example("rust_worker_for_node").await;
                let text = run(exec_file(node, [&script, &worker])).await;
                assert_eq!(text, "{ primes: 9592 }\nserving\nserved by Rust\n\n", "{version}");
            }
            Err(reason) => skip(&format!("{test}::{version}"), &reason),
        }
    }
}

#[tokio::test]
async fn worker_thread_computes_while_the_server_answers() {
    let none: [&str; 0] = [];
    let text = run(exec_file(example("worker_thread").await, none)).await;
    let at = |part: &str| text.find(part).unwrap_or_else(|| panic!("no {part:?} in {text}"));
    assert!(text.starts_with("the worker is online\n"), "{text}");
    assert!(at("664579 primes below 10000000") < at("the worker ended with code 0"));
    at("requests were answered meanwhile");
}

#[tokio::test]
async fn thread_or_process_differ_in_one_word_and_in_a_crash() {
    let none: [&str; 0] = [];
    let text = run(exec_file(example("thread_or_process").await, none)).await;
    assert_eq!(text.matches("  Online\n  Message(9592)\n  Exit(").count(), 2, "{text}");
    assert!(text.contains("  Online\n  Error(Killed(\"SIGABRT\"))\n"), "{text}");
}

#[tokio::test]
async fn shared_counters_are_exact_over_all_workers() {
    use polyfork::child_process::{Command, Signal, Stdio};
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

    let mut command = Command::new(example("shared_counters").await);
    command.env("PORT", "0").env("WORKERS", "2").stdout(Stdio::Pipe).kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = tokio::time::timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap().unwrap();
    let address = line.strip_prefix("http://").and_then(|rest| rest.strip_suffix('/')).unwrap();
    let mut processes = std::collections::BTreeMap::<String, u64>::new();
    for number in 1..=40u64 {
        let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        let body = answer.split("\r\n\r\n").nth(1).unwrap();
        let words: Vec<&str> = body.split_whitespace().collect();
        assert_eq!(words.last().unwrap().parse(), Ok(number), "{body}");
        *processes.entry(words[1].to_owned()).or_default() += 1;
    }
    assert!(!processes.is_empty() && processes.len() <= 2, "{processes:?}");
    child.kill(Signal::TERM).unwrap();
    let ended = tokio::time::timeout(PATIENCE, child.wait()).await.unwrap().unwrap();
    assert!(ended.success(), "{ended:?}");
}

/// The example checks its sums itself.
#[tokio::test]
async fn shared_ring_adds_up_what_came_both_ways() {
    use polyfork::child_process::{Command, Stdio};
    use tokio::io::AsyncReadExt;

    let mut command = Command::new(example("shared_ring").await);
    command.stdout(Stdio::Pipe).kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let mut shown = String::new();
    let mut stdout = child.stdout.take().unwrap();
    tokio::time::timeout(PATIENCE, stdout.read_to_string(&mut shown)).await.unwrap().unwrap();
    assert!(shown.starts_with("wait and notify: 200000 numbers in "), "{shown}");
    assert!(shown.contains("\nring of records: 200000 numbers in "), "{shown}");
    let ended = tokio::time::timeout(PATIENCE, child.wait()).await.unwrap().unwrap();
    assert!(ended.success(), "{ended:?}");
}

#[cfg(feature = "axum")]
mod offload {
    use polyfork::child_process::{Child, Command, Signal, Stdio};
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
    use tokio::net::TcpStream;

    use super::{PATIENCE, example};

    struct Server {
        address: String,
        /// Killed when it is dropped.
        _child: Child,
    }

    async fn start(place: &str) -> Server {
        let mut command = Command::new(example("offload").await);
        command.env("PLACE", place).env("PORT", "0").stdin(Stdio::Ignore).stderr(Stdio::Pipe);
        command.kill_on_drop(true).parent_death_signal(Signal::KILL);
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).await.unwrap();
        let address = line.trim().strip_prefix("listening on http://").unwrap().to_owned();
        Server { address, _child: child }
    }

    impl Server {
        async fn ask(&self, path: &str) -> TcpStream {
            let mut stream = TcpStream::connect(&self.address).await.unwrap();
            let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            stream
        }

        async fn get(&self, path: &str) -> (String, Vec<u8>) {
            let mut answer = Vec::new();
            let mut stream = self.ask(path).await;
            let read = stream.read_to_end(&mut answer);
            tokio::time::timeout(PATIENCE, read).await.expect("an answer").unwrap();
            let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap();
            let body = answer.split_off(end + 4);
            (String::from_utf8(answer).unwrap(), body)
        }
    }

    #[tokio::test]
    async fn offload_computes_and_answers_meanwhile_in_threads_and_in_processes() {
        for place in ["thread", "process"] {
            let server = start(place).await;
            // More of them than there are cores, none of which is ever waited for.
            let mut heavy = Vec::new();
            for _ in 0..4 {
                heavy.push(server.ask("/primes/200000000").await);
            }
            let (head, body) = server.get("/").await;
            assert!(head.starts_with("HTTP/1.1 200"), "{head}");
            assert_eq!(body, b"still here\n");
            // Those who hang up make room for others.
            drop(heavy);
            let (_, body) = server.get("/primes/1000").await;
            assert_eq!(String::from_utf8(body).unwrap(), "168 primes below 1000\n", "{place}");
            let (head, body) = server.get("/tile/6/20/30").await;
            assert!(head.contains("image/png") && body.starts_with(b"\x89PNG\r\n"), "{head}");
            let (head, _) = server.get("/tile/1/2/0").await;
            assert!(head.starts_with("HTTP/1.1 404"), "{head}");
        }
    }
}
