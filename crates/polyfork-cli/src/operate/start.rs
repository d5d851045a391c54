//! `polyfork start`: runs this executable again in a session of its own, and waits until it is ready or says why not.
//!
//! Ctrl-C ends what is being started, a second one at once; we stay until it is gone. Once it is ready it needs us no more.
//! Of a configuration every app is started that is meant, at the same time; the exit code is that of the first that went
//! wrong.

use std::ffi::OsString;
use std::io;

use polyfork::child_process::{Child, Command, Signal, Stdio};
use serde::Serialize;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::signal::unix::{Signal as Interrupts, SignalKind, signal};
use tokio::task::JoinSet;

use super::{ErrorShape, VERSION, complain, fail, remark};
use crate::args::start::StartArgs;
use crate::background;
use crate::config;
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::run::shown_name;
use crate::{out, words};

/// An app that is started: what it is called, if a file has it, and the words for its primary.
pub(crate) type Starting = (Option<String>, Vec<OsString>);

/// What was told so far.
#[derive(Default)]
struct Told {
    /// The app, where it is one of a file: it may be one of several.
    app: Option<String>,
    /// Of the last slot that was given up.
    last_lines: Vec<String>,
}

/// Why it did not start, for JSON.
#[derive(Serialize)]
struct NotStarted<'a> {
    version: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    error: ErrorShape<'a>,
    last_lines: &'a [String],
}

/// Why it did not start, with what its last worker wrote.
#[derive(Debug)]
pub(crate) struct NotReady {
    /// The app, where it is one of a file.
    app: Option<String>,
    verdict: Verdict,
    last_lines: Vec<String>,
}

impl NotReady {
    /// All of it as one complaint.
    pub(crate) fn whole(self) -> Verdict {
        let code = self.verdict.code;
        let mut text = self.text();
        if !self.last_lines.is_empty() {
            text.push_str("; the last lines that its last worker wrote to standard error:");
        }
        for line in &self.last_lines {
            text.push_str(&format!("\n    {line}"));
        }
        Verdict { code, text }
    }

    /// What went wrong, with which app.
    fn text(&self) -> String {
        match &self.app {
            // That says itself which one.
            Some(_) if self.verdict.code == Code::AlreadyRunning => self.verdict.text.clone(),
            app => about(app.as_deref(), &self.verdict.text),
        }
    }

    fn complain(&self) {
        complain(&self.text());
        if !self.last_lines.is_empty() {
            let text = "the last lines that its last worker wrote to standard error:";
            remark(&about(self.app.as_deref(), text));
            let lines = self.last_lines.iter();
            let lines = lines.map(|line| format!("    {}\n", words::harmless(line)));
            crate::say(io::stderr(), &lines.collect::<String>());
        }
    }

    fn shape(&self) -> NotStarted<'_> {
        let error = ErrorShape::of(&self.verdict);
        let name = self.app.as_deref();
        NotStarted { version: VERSION, name, error, last_lines: &self.last_lines }
    }
}

fn about(app: Option<&str>, text: &str) -> String {
    app.map_or_else(|| text.to_owned(), |app| format!("{app}: {text}"))
}

/// Runs the verb.
pub(crate) async fn run(args: StartArgs) -> Code {
    let json = args.run.show.json;
    match config::for_start(&args) {
        Ok(None) => program(json).await,
        Ok(Some(apps)) => several(apps, json).await,
        Err(verdict) => fail(&verdict, json),
    }
}

/// Starts the program of this command line.
async fn program(json: bool) -> Code {
    match one((None, std::env::args_os().skip(2).collect())).await {
        Ok(app) if json => {
            out::json(&app);
            if out::is_lost() {
                tell(&app);
            }
            Code::Stopped
        }
        Ok(app) => {
            tell(&app);
            Code::Stopped
        }
        Err(failed) => {
            failed.complain();
            if json {
                out::json(&failed.shape());
            }
            failed.verdict.code
        }
    }
}

/// Starts apps of a configuration at the same time.
async fn several(apps: Vec<Starting>, json: bool) -> Code {
    let mut starting = JoinSet::new();
    for (number, app) in apps.into_iter().enumerate() {
        starting.spawn(async move { (number, one(app).await) });
    }
    let mut outcomes = Vec::new();
    while let Some(outcome) = starting.join_next().await {
        let Ok((number, outcome)) = outcome else { continue };
        match &outcome {
            Ok(app) if !json => tell(app),
            Ok(_) => {}
            Err(failed) => failed.complain(),
        }
        outcomes.push((number, outcome));
    }
    outcomes.sort_by_key(|(number, _)| *number);
    if json {
        let shape = |(_, outcome): &(usize, Result<Value, NotReady>)| match outcome {
            Ok(app) => app.clone(),
            Err(failed) => serde_json::to_value(failed.shape()).unwrap_or_default(),
        };
        out::json(&outcomes.iter().map(shape).collect::<Vec<Value>>());
        if out::is_lost() {
            outcomes.iter().flat_map(|(_, outcome)| outcome).for_each(tell);
        }
    }
    let failed = outcomes.iter().filter_map(|(_, outcome)| outcome.as_ref().err()).next();
    failed.map_or(Code::Stopped, |failed| failed.verdict.code)
}

/// Starts one app, by the words that its primary gets; what it is once it is ready.
///
/// # Errors
/// Why it is not.
pub(crate) async fn one((app, words): Starting) -> Result<Value, NotReady> {
    let mut told = Told { app, ..Told::default() };
    let started = match spawn(&words) {
        Ok(mut child) => wait(&mut child, &mut told).await,
        Err(text) => Err(Verdict { code: Code::Unexpected, text: words::plain(&text) }),
    };
    let Told { app, last_lines } = told;
    started.map_err(|verdict| NotReady { app, verdict, last_lines })
}

/// Its words are for nobody else's eyes; what stands in lists of processes says which app it is.
fn spawn(words: &[OsString]) -> Result<Child, String> {
    let program = std::env::current_exe()
        .map_err(|error| format!("cannot find this program's own file: {error}"))?;
    let mut command = Command::new(program);
    let given = background::give(words);
    let given = given.map_err(|error| format!("cannot leave the primary its words: {error}"))?;
    command.arg0("polyfork").arg("primary").arg(shown_name(words));
    command.detached(true).stdin(Stdio::Fd(given)).stdout(Stdio::Pipe).stderr(Stdio::Ignore);
    command.spawn().map_err(|error| format!("cannot start the primary: {error}"))
}

/// Reads what the primary tells until it is ready.
async fn wait(child: &mut Child, told: &mut Told) -> Result<Value, Verdict> {
    let unexpected = |text: String| Verdict { code: Code::Unexpected, text };
    let Some(out) = child.stdout.take() else {
        return Err(unexpected("the primary has no standard output".into()));
    };
    let mut lines = BufReader::new(out).lines();
    let mut interrupt = signal(SignalKind::interrupt())
        .map_err(|error| unexpected(words::plain(&format!("cannot watch signals: {error}"))))?;
    let mut interrupts = 0;
    let mut told_end = None;
    loop {
        let line = tokio::select! {
            line = lines.next_line() => line,
            _ = interrupt.recv() => {
                end_harder(child, &mut interrupts);
                continue;
            }
        };
        let Ok(Some(line)) = line else { break };
        let Ok(event) = serde_json::from_str::<Value>(&line) else { continue };
        match take(&event, told) {
            Some(Err(verdict)) => {
                told_end = Some(verdict);
                break;
            }
            // It got ready at the very moment at which it was told to end.
            Some(Ok(_)) if interrupts > 0 => {}
            Some(Ok(app)) => return Ok(app),
            None => {}
        }
    }
    if interrupts > 0 {
        gone(child, &mut interrupt, &mut interrupts).await;
    }
    Err(why_not(told_end, interrupts))
}

/// An interrupt more: asks the primary to end, then to end at once. One that cannot obey any more is killed.
fn end_harder(child: &Child, interrupts: &mut u32) {
    *interrupts += 1;
    let wanted = match interrupts {
        1 => Signal::TERM,
        2 => Signal::QUIT,
        _ => Signal::KILL,
    };
    // It may have ended by itself.
    let _ = child.kill(wanted);
}

/// Returns once nothing of it is left.
async fn gone(child: &mut Child, interrupt: &mut Interrupts, interrupts: &mut u32) {
    loop {
        tokio::select! {
            _ = child.wait() => return,
            _ = interrupt.recv() => end_harder(child, interrupts),
        }
    }
}

/// Why it is not ready, by what it told in the end and by what we told it.
fn why_not(told: Option<Verdict>, interrupts: u32) -> Verdict {
    let verdict = |code, text: &str| Verdict { code, text: text.to_owned() };
    let at_once = told.as_ref().is_none_or(|told| told.code == Code::Forced);
    match (told, interrupts) {
        (Some(told), _) if !matches!(told.code, Code::Stopped | Code::Forced) => told,
        (_, 2..) if at_once => {
            verdict(Code::Forced, "interrupted twice before it was ready: it was stopped at once")
        }
        (_, 1..) => verdict(Code::Interrupted, "interrupted before it was ready: it was stopped"),
        (Some(told), 0) if told.code == Code::Stopped => verdict(
            Code::Refused,
            "it was stopped before it was ready, by another command or a signal; `polyfork start` starts it again",
        ),
        (Some(told), 0) => told,
        (None, 0) => verdict(
            Code::Unexpected,
            "the primary ended without a word; its memory may have run out, or somebody killed it",
        ),
    }
}

/// What an event means for who waits; `None` to wait on.
fn take(event: &Value, told: &mut Told) -> Option<Result<Value, Verdict>> {
    let text = event["text"].as_str().unwrap_or_default();
    match event["event"].as_str()? {
        "started" => Some(Ok(event["app"].clone())),
        "error" | "end" => {
            let number = event["exit_code"].as_u64().and_then(|code| u8::try_from(code).ok());
            let code = number.map_or(Code::Unexpected, Code::of);
            Some(Err(Verdict { code, text: text.to_owned() }))
        }
        "slot_failed" => {
            let lines = event["last_lines"].as_array().into_iter().flatten();
            told.last_lines = lines.filter_map(Value::as_str).map(str::to_owned).collect();
            None
        }
        "notice" | "bind_failed" => {
            let slot =
                event["slot"].as_u64().map_or(String::new(), |slot| format!("slot {slot}: "));
            remark(&about(told.app.as_deref(), &format!("{slot}{text}")));
            None
        }
        _ => None,
    }
}

/// Tells people that an app is ready.
pub(crate) fn tell(app: &Value) {
    let number = |field: &str| app[field].as_u64().unwrap_or(0);
    let name = app["name"].as_str().unwrap_or_default();
    let listeners: Vec<&str> =
        app["listeners"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let plural = if number("workers_ready") == 1 { "worker" } else { "workers" };
    let listening = match listeners.is_empty() {
        true => String::new(),
        false => format!(" on {}", listeners.join(", ")),
    };
    if app["state"] == "stopped" {
        remark(&format!(
            "{name}: every worker has done its work already; `polyfork status {name}`, `restart`, `stop`"
        ));
        return;
    }
    remark(&format!(
        "{name}: {} {plural} ready{listening}; `polyfork status {name}`, `logs`, `stop`",
        number("workers_ready"),
    ));
    let failed = app["failed_slots"].as_array().map_or(0, Vec::len);
    if failed > 0 {
        complain(&format!(
            "{name}: {failed} of its slots were given up; `polyfork logs {name}` says why"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_it_is_not_ready_is_told_by_who_ended_it() {
        let code = |told: Option<Code>, interrupts| {
            let told = told.map(|code| Verdict { code, text: "told".to_owned() });
            why_not(told, interrupts).code
        };
        let table = [
            (Some(Code::Stopped), [Code::Refused, Code::Interrupted, Code::Interrupted]),
            (Some(Code::Forced), [Code::Forced, Code::Interrupted, Code::Forced]),
            (Some(Code::Failed), [Code::Failed, Code::Failed, Code::Failed]),
            (None, [Code::Unexpected, Code::Interrupted, Code::Forced]),
        ];
        for (told, codes) in table {
            for (interrupts, wanted) in (0..).zip(codes) {
                assert_eq!(code(told, interrupts), wanted, "{told:?} {interrupts}");
            }
        }
    }
}
