//! The verbs for apps that run: who is meant, what is asked, and how the answer is told.
//!
//! All of them are clients of control sockets and decide nothing. `targets` finds out who is meant, `table` draws tables, the
//! rest is a file for each verb or two.
//!
//! The surprising rule: several apps are asked at the same time, each with its own time limit, so that one that hangs
//! holds up none of the others. The exit code is that of the first that went wrong.

use std::io;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;

use crate::args::Verb;
use crate::config;
use crate::control::client::{Connection, NoAnswer};
use crate::control::folder::App;
use crate::control::protocol::Raw;
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::style::{Ink, Paint};
use crate::{out, words};

pub(crate) mod change;
mod events;
mod list;
mod logs;
mod metrics;
pub(crate) mod start;
mod status;
mod table;
pub(crate) mod targets;
mod top;

/// The version of JSON answers.
pub(crate) const VERSION: u32 = 1;
/// For an answer that needs no work.
pub(crate) const ANSWER_TIME: Duration = Duration::from_secs(2);

/// Does what a verb says.
pub(crate) fn run(verb: Verb) -> Code {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            let text = words::plain(&format!("cannot make a runtime: {error}"));
            return fail(&Verdict { code: Code::Unexpected, text }, false);
        }
    };
    let code = runtime.block_on(async {
        match verb {
            Verb::Start(args) => start::run(*args).await,
            Verb::Ls(args) => list::run(args).await,
            Verb::Status(args) => status::run(args).await,
            Verb::Reload(args) => change::reload(args).await,
            Verb::Restart(args) => change::restart(args).await,
            Verb::Upgrade(args) => change::upgrade(args).await,
            Verb::Scale(args) => change::scale(args).await,
            Verb::Stop(args) => change::stop(args).await,
            Verb::Kill(args) => change::kill(args).await,
            Verb::Logs(args) => logs::run(args).await,
            Verb::Events(args) => events::run(args).await,
            Verb::Metrics(args) => metrics::run(args).await,
            Verb::Top(args) => top::run(args).await,
            Verb::Apply(args) => config::apply::run(args).await,
            // Those of `main`.
            _ => Code::Unexpected,
        }
    });
    runtime.shutdown_background();
    code
}

/// Tells why nothing was done: on standard error, and as JSON where that is wanted.
pub(crate) fn fail(verdict: &Verdict, json: bool) -> Code {
    if json {
        out::json_line(&Failed { version: VERSION, error: ErrorShape::of(verdict) });
    }
    complain(&verdict.text);
    verdict.code
}

/// A line on standard error.
pub(crate) fn complain(text: &str) {
    let paint = Paint::stderr();
    // What follows the first line was written by somebody else, and says so by standing further in.
    for (number, line) in text.lines().enumerate() {
        let line = words::harmless(line);
        let shown = match number {
            0 => format!("polyfork: {}\n", paint.with(Ink::Bad, &line)),
            _ => format!("{line}\n"),
        };
        crate::say(io::stderr(), &shown);
    }
}

/// A line on standard error that is no complaint.
pub(crate) fn remark(text: &str) {
    crate::say(io::stderr(), &format!("polyfork: {}\n", words::harmless(text)));
}

#[derive(Serialize)]
struct Failed<'a> {
    version: u32,
    error: ErrorShape<'a>,
}

#[derive(Serialize)]
pub(crate) struct ErrorShape<'a> {
    code: &'static str,
    exit_code: u8,
    text: &'a str,
}

impl<'a> ErrorShape<'a> {
    pub(crate) fn of(verdict: &'a Verdict) -> ErrorShape<'a> {
        let Verdict { code, text } = verdict;
        ErrorShape { code: code.row().word, exit_code: *code as u8, text }
    }
}

/// Asks one app one thing.
pub(crate) async fn ask(
    app: &App,
    request: Raw,
    limit: Option<Duration>,
) -> Result<Value, NoAnswer> {
    let deadline = Instant::now() + ANSWER_TIME;
    let mut connection = Connection::open(app, deadline).await?;
    connection.ask(request, limit.map(|limit| Instant::now() + limit)).await
}

/// What a request without further fields looks like.
pub(crate) fn plain(verb: &str) -> Raw {
    Raw { verb: verb.to_owned(), ..Raw::default() }
}

/// Why an app did not do it, for people.
pub(crate) fn told(app: &App, error: &NoAnswer) -> Verdict {
    let name = &app.name;
    let (code, text) = match error {
        NoAnswer::Gone if app.is_alive() => {
            (Code::NotAnswering, format!("{name} starts or ends this very moment; try again"))
        }
        NoAnswer::Gone => (Code::NoSuchApp, gone(app)),
        NoAnswer::Late => (
            Code::NotAnswering,
            format!("{name} does not answer; `ps` shows whether its primary is stopped or busy"),
        ),
        NoAnswer::Refused { exit_code, text } => (Code::of(*exit_code), format!("{name}: {text}")),
        NoAnswer::Broken(text) => (Code::Unexpected, format!("{name}: {text}")),
    };
    Verdict { code, text: words::plain(&text) }
}

/// What became of an app whose primary lives no more.
fn gone(app: &App) -> String {
    let name = &app.name;
    match app.card().and_then(|card| card.ended) {
        Some(ended) => format!(
            "{name} ended at {} ({}): {}; `polyfork logs {name}` says more",
            ended.time, ended.outcome, ended.text
        ),
        None => format!(
            "{name} runs no more: its primary was killed; start it again, or `polyfork stop {name}` forgets it"
        ),
    }
}
