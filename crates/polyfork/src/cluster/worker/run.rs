//! One `main` for both roles: the same executable is the primary, and each of its workers.
//!
//! Sugar over [`Worker`] and [`Cluster`]; a program that wants more uses these.
//!
//! The rule that surprises: a primary never runs the program's own `main`, and everything before [`run`] in
//! `fn main` happens in the primary and in every worker.

use std::error::Error;
use std::fmt::Display;
use std::future::Future;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use super::{Worker, is_worker};
use crate::cluster::{Cluster, Event, Events, Notice, Outcome, Settings};

/// With any value but `0` and the empty one, [`run`] starts no cluster: the program runs alone.
const STANDALONE: &str = "POLYFORK_STANDALONE";
/// How long a worker that has finished waits for its last words to leave.
const LAST_WORDS: Duration = Duration::from_secs(1);

// The exit codes below are those of the `polyfork` command.

/// Exit code of a primary whose program wants an address that is taken.
const ADDRESS_IN_USE: u8 = 5;
/// Exit code of a primary whose program wants an address that cannot be had.
const ADDRESS_REFUSED: u8 = 6;
/// Exit code of a primary whose workers kept ending.
const FAILED: u8 = 7;
/// Exit code of a primary whose workers never got ready.
const NEVER_READY: u8 = 8;

/// Exit code of a primary that ended its workers by force.
const FORCED: u8 = 9;

/// What the main function of a worker returns; `?` turns most errors into it.
pub type MainResult = Result<(), Box<dyn Error + Send + Sync>>;

/// Runs this program as a cluster of itself, with [`Settings::this_program`].
///
/// Started by hand, this process becomes the primary: it starts this very executable once per CPU, with the
/// same arguments, obeys signals ([`Cluster::obey_signals`]), and returns when all workers have ended. In a
/// worker it makes a current-thread tokio runtime and runs `main`. With `POLYFORK_STANDALONE=1` in the
/// environment it runs `main` alone, without a primary.
///
/// ```no_run
/// use polyfork::cluster;
///
/// fn main() -> std::process::ExitCode {
///     cluster::run(|worker| async move {
///         let mut listener = worker.listen("127.0.0.1:3000").await?;
///         loop {
///             tokio::select! {
///                 accepted = listener.accept() => drop(accepted?),
///                 () = worker.shutdown() => return Ok(()),
///             }
///         }
///     })
/// }
/// ```
///
/// The exit code is 0 when everything ended as asked; in a worker 1 when `main` returned an error; in the
/// primary those of the `polyfork` command: 5 when another program listens on the address, 6 when the address
/// cannot be had, 7 when workers kept ending, 8 when none ever got ready, 9 when workers were ended by force,
/// 1 for anything else. Errors are written to standard error, one line each.
pub fn run<M, F>(main: M) -> ExitCode
where
    M: FnOnce(Worker) -> F,
    F: Future<Output = MainResult>,
{
    match role() {
        Role::Worker => work(main),
        Role::Primary => match Settings::this_program() {
            Ok(settings) => lead(settings),
            Err(error) => failed(&format_args!("cannot find this program's own file: {error}")),
        },
    }
}

/// [`run`] with settings of one's own. Only the primary looks at them.
///
/// ```no_run
/// use polyfork::cluster::{self, Settings};
///
/// fn main() -> std::process::ExitCode {
///     let settings = Settings::this_program().expect("this program has a file").workers(4);
///     cluster::run_with(settings, |worker| async move {
///         worker.ready();
///         worker.shutdown().await;
///         Ok(())
///     })
/// }
/// ```
pub fn run_with<M, F>(settings: Settings, main: M) -> ExitCode
where
    M: FnOnce(Worker) -> F,
    F: Future<Output = MainResult>,
{
    match role() {
        Role::Worker => work(main),
        Role::Primary => lead(settings),
    }
}

enum Role {
    /// Of a primary, or alone.
    Worker,
    Primary,
}

fn role() -> Role {
    let alone = std::env::var_os(STANDALONE).is_some_and(|value| !value.is_empty() && value != "0");
    if alone || is_worker() { Role::Worker } else { Role::Primary }
}

fn work<M, F>(main: M) -> ExitCode
where
    M: FnOnce(Worker) -> F,
    F: Future<Output = MainResult>,
{
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error),
    };
    runtime.block_on(async {
        let worker = match Worker::from_env() {
            Ok(worker) => worker,
            Err(error) => return failed(&chain(&error)),
        };
        let result = main(worker.clone()).await;
        // A primary that does not read any more must not keep us.
        let _ = tokio::time::timeout(LAST_WORDS, worker.flush()).await;
        match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&format_args!("{}{}", Name(&worker), chain(&*error))),
        }
    })
}

fn lead(settings: Settings) -> ExitCode {
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error),
    };
    runtime.block_on(async {
        let cluster = match Cluster::start(settings) {
            Ok(cluster) => cluster,
            Err(error) => return failed(&chain(&error)),
        };
        let told = tokio::spawn(tell(cluster.events()));
        cluster.obey_signals().await;
        let outcome = cluster.wait().await;
        // The end of the cluster is its last event; a panic while printing is no reason to fail.
        let _ = told.await;
        match outcome {
            Outcome::Stopped => ExitCode::SUCCESS,
            Outcome::BindFailed { address, error } => {
                say(&format_args!("cannot listen on {address}: {error}"));
                let in_use = error.kind() == std::io::ErrorKind::AddrInUse;
                ExitCode::from(if in_use { ADDRESS_IN_USE } else { ADDRESS_REFUSED })
            }
            Outcome::AtRest { clean: true, .. } => ExitCode::SUCCESS,
            Outcome::AtRest { last, clean: false } => {
                say(&format_args!("every worker has ended, the last one: {last}"));
                ExitCode::from(FAILED)
            }
            Outcome::AllFailed { last } => {
                say(&format_args!("every worker kept ending; the last one {last}"));
                ExitCode::from(FAILED)
            }
            Outcome::NeverReady { first, .. } => {
                say(&format_args!("no worker ever got ready; the first one {first}"));
                ExitCode::from(NEVER_READY)
            }
            Outcome::Forced => ExitCode::from(FORCED),
        }
    })
}

/// Writes what a person must know to standard error: workers that died, slots that were given up.
async fn tell(mut events: Events) {
    while let Some(event) = events.next().await {
        match event {
            Event::Exit { who, reason, restart_in, voluntary: false, .. } => {
                let then = match restart_in {
                    Some(pause) => format!("; its replacement starts in {} ms", pause.as_millis()),
                    None => String::new(),
                };
                say(&format_args!("worker {} (slot {}) {reason}{then}", who.worker, who.slot));
            }
            Event::SlotFailed { slot, restarts, window } => say(&format_args!(
                "slot {slot} was given up: {restarts} restarts in {} s",
                window.as_secs_f32()
            )),
            // The end of the worker is told when it comes, with its reason.
            Event::Notice(Notice { code: "replacing", .. }) => {}
            Event::Notice(Notice { who, text, .. }) => match who {
                Some(who) => {
                    say(&format_args!("worker {} (slot {}): {text}", who.worker, who.slot));
                }
                None => say(&text),
            },
            Event::End(_) => return,
            _ => {}
        }
    }
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// One line on standard error.
fn say(text: &dyn Display) {
    // One write, so that the lines of many processes do not mix.
    let line = format!("polyfork: {text}\n");
    // Nobody to tell when standard error is closed.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

fn failed(text: &dyn Display) -> ExitCode {
    say(text);
    ExitCode::FAILURE
}

/// An error and its sources, in one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors repeat their source in their own text.
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text.replace('\n', " ")
}

/// `worker 3: ` in a cluster, nothing alone.
struct Name<'a>(&'a Worker);

impl Display for Name<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.id() {
            Some(id) => write!(f, "worker {id}: "),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the door")]
    struct Outer(#[source] std::io::Error);

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the door: {0}")]
    struct Repeats(#[source] std::io::Error);

    #[test]
    fn an_error_is_told_in_one_line_with_its_causes_once() {
        let io = || std::io::Error::other("locked\ntwice");
        assert_eq!(chain(&Outer(io())), "cannot open the door: locked twice");
        assert_eq!(chain(&Repeats(io())), "cannot open the door: locked twice");
    }
}
