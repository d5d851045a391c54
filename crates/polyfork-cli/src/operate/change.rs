//! `reload`, `restart`, `upgrade`, `scale`, `stop`, `kill`: asks for a change and waits until it is done.
//!
//! The surprising rule: what was asked for goes on without whoever asked. The first Ctrl-C says so, the second one leaves.

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use super::{ErrorShape, VERSION, ask, complain, fail, plain, remark, targets, told};
use crate::args::operate::{KillArgs, ReloadArgs, ScaleArgs, StopArgs, UpgradeArgs, WaitArgs};
use crate::control::client::NoAnswer;
use crate::control::folder::{App, Runtime};
use crate::control::protocol::{Raw, Scale};
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::out;

/// Between two looks at whether an ended primary has given its name back.
const PAUSE: Duration = Duration::from_millis(2);
/// In this time a primary that is there shows it, on a busy machine as well.
const PRESENCE: Duration = Duration::from_secs(10);
/// A primary that has told its end is gone within this.
const LEAVING: Duration = Duration::from_secs(5);

/// What a verb is called, and what it does to an app that has no primary any more.
struct Change {
    /// `restarting`, for who waits.
    doing: &'static str,
    request: fn() -> Raw,
    wait: bool,
    json: bool,
    /// The app is to end.
    ends: bool,
    /// What to say when it is done.
    done: fn(&App, &Value) -> String,
}

/// One app's outcome, for JSON.
#[derive(Serialize)]
struct Outcome<'a> {
    version: u32,
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<&'a Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorShape<'a>>,
}

/// Runs `reload`.
pub(crate) async fn reload(args: ReloadArgs) -> Code {
    let change = Change {
        doing: "reloading",
        request: || plain("reload"),
        wait: !args.wait.no_wait,
        json: args.wait.apps.form.json,
        ends: false,
        done: |app, result| match result["text"].as_str() {
            Some(text) => format!("{}: {text}", app.name),
            None => format!("{}: reloading", app.name),
        },
    };
    let probation = u64::try_from(args.probation.as_millis()).unwrap_or(u64::MAX);
    each(targets::find(&args.wait.apps.names), change, |request| {
        request.at_a_time = args.at_a_time;
        request.probation_ms = Some(probation);
    })
    .await
}

/// Runs `restart`.
pub(crate) async fn restart(args: WaitArgs) -> Code {
    let change = Change {
        doing: "restarting",
        request: || plain("restart"),
        wait: !args.no_wait,
        json: args.apps.form.json,
        ends: false,
        done: |app, result| match result["slots"].as_u64() {
            Some(1) => format!("{}: 1 worker replaced", app.name),
            Some(slots) => format!("{}: {slots} workers replaced, slot by slot", app.name),
            None => format!("{}: restarting", app.name),
        },
    };
    each(targets::find(&args.apps.names), change, |_| {}).await
}

/// Runs `upgrade`.
pub(crate) async fn upgrade(args: UpgradeArgs) -> Code {
    let change = Change {
        doing: "upgrading",
        request: || plain("upgrade"),
        wait: !args.wait.no_wait,
        json: args.wait.apps.form.json,
        ends: false,
        done: |app, result| match result["text"].as_str() {
            Some(text) => format!("{}: {text}", app.name),
            None => format!("{}: upgrading", app.name),
        },
    };
    let path = match args.binary {
        Some(path) => std::path::absolute(path),
        None => std::env::current_exe(),
    };
    // A request is text.
    let path = path.map(|path| path.into_os_string().into_string());
    let Ok(Ok(path)) = path else {
        let text = "--binary: the path of the new binary is not known, or no text".to_owned();
        return fail(&Verdict { code: Code::Usage, text }, change.json);
    };
    let limit = u64::try_from(args.limit.as_millis()).unwrap_or(u64::MAX);
    each(targets::find(&args.wait.apps.names), change, |request| {
        request.binary = Some(path.clone());
        request.limit_ms = Some(limit);
    })
    .await
}

/// Runs `scale`.
pub(crate) async fn scale(args: ScaleArgs) -> Code {
    let change = Change {
        doing: "scaling",
        request: || plain("scale"),
        wait: !args.no_wait,
        json: args.form.json,
        ends: false,
        done: |app, result| {
            let workers = result["workers"].as_u64().unwrap_or(0);
            let plural = if workers == 1 { "worker" } else { "workers" };
            match result["ready"] == true {
                true => format!("{}: {workers} {plural}", app.name),
                false => format!("{}: scaling to {workers} {plural}", app.name),
            }
        },
    };
    let workers = args.workers;
    each(targets::find(&[args.name]), change, |request| match workers {
        Scale::To(to) => request.to = Some(to),
        Scale::By(by) => request.by = Some(by),
    })
    .await
}

/// Runs `stop`.
pub(crate) async fn stop(args: StopArgs) -> Code {
    let change = Change {
        doing: "stopping",
        request: || plain("stop"),
        wait: !args.no_wait,
        json: args.form.json,
        ends: true,
        done: ended,
    };
    let apps = if args.all { targets::all() } else { targets::find(&args.names) };
    let grace = args.grace.map(|grace| u64::try_from(grace.as_millis()).unwrap_or(u64::MAX));
    each(apps, change, |request| request.grace_ms = grace).await
}

/// Runs `kill`.
pub(crate) async fn kill(args: KillArgs) -> Code {
    let change = Change {
        doing: "killing",
        request: || plain("kill"),
        wait: true,
        json: args.form.json,
        ends: true,
        done: ended,
    };
    let apps = if args.all { targets::all() } else { targets::find(&args.names) };
    each(apps, change, |_| {}).await
}

fn ended(app: &App, result: &Value) -> String {
    match result["text"].as_str() {
        Some(text) => format!("{}: {text}", app.name),
        None => format!("{}: stopping", app.name),
    }
}

/// Asks each app, and waits for all.
async fn each(apps: Result<Vec<App>, Verdict>, change: Change, fill: impl Fn(&mut Raw)) -> Code {
    let apps = match apps {
        Ok(apps) => apps,
        Err(verdict) => return fail(&verdict, change.json),
    };
    let one = apps.len() == 1;
    if apps.is_empty() {
        if change.json {
            out::json(&Vec::<Value>::new());
        } else {
            remark("no app runs");
        }
        return Code::Stopped;
    }
    let mut asking = JoinSet::new();
    for (number, app) in apps.into_iter().enumerate() {
        let mut request = (change.request)();
        request.wait = Some(change.wait);
        fill(&mut request);
        let (wait, ends) = (change.wait, change.ends);
        asking.spawn(async move {
            let answer = one_app(&app, request, wait, ends).await;
            (number, app, answer)
        });
    }
    let answers = tokio::select! {
        answers = all_of(&mut asking, &change) => answers,
        () = interrupted_twice(change.doing) => return Code::Interrupted,
    };
    tell(answers, &change, one)
}

type Answer = (usize, App, Result<Value, Verdict>);

async fn all_of(asking: &mut JoinSet<Answer>, change: &Change) -> Vec<Answer> {
    let mut answers = Vec::new();
    while let Some(answer) = asking.join_next().await {
        let Ok(answer) = answer else { continue };
        if !change.json {
            match &answer.2 {
                Ok(result) => remark(&(change.done)(&answer.1, result)),
                Err(verdict) => complain(&verdict.text),
            }
        }
        answers.push(answer);
    }
    answers.sort_by_key(|(number, ..)| *number);
    answers
}

fn tell(answers: Vec<Answer>, change: &Change, one: bool) -> Code {
    let failed = answers.iter().filter_map(|(_, _, answer)| answer.as_ref().err());
    let code = failed.map(|verdict| verdict.code).next().unwrap_or(Code::Stopped);
    if !change.json {
        return code;
    }
    let outcomes: Vec<Outcome<'_>> = answers
        .iter()
        .map(|(_, app, answer)| Outcome {
            version: VERSION,
            name: app.name.as_str(),
            result: answer.as_ref().ok(),
            error: answer.as_ref().err().map(ErrorShape::of),
        })
        .collect();
    for verdict in answers.iter().filter_map(|(_, _, answer)| answer.as_ref().err()) {
        complain(&verdict.text);
    }
    match (one, outcomes.first()) {
        (true, Some(outcome)) => out::json(outcome),
        _ => out::json(&outcomes),
    };
    if out::is_lost() {
        // It was done all the same.
        for (_, app, answer) in &answers {
            answer.iter().for_each(|result| remark(&(change.done)(app, result)));
        }
    }
    code
}

async fn one_app(app: &App, request: Raw, wait: bool, ends: bool) -> Result<Value, Verdict> {
    // What it asks for takes as long as it takes; whether anybody is there is asked before.
    if wait {
        match ask(app, plain("brief"), Some(PRESENCE)).await {
            Ok(_) | Err(NoAnswer::Gone) => {}
            Err(error) => return Err(told(app, &error)),
        }
    }
    let limit = (!wait).then_some(super::ANSWER_TIME);
    match ask(app, request, limit).await {
        Ok(result) if ends && wait => {
            wait_until_gone(app).await;
            Ok(result)
        }
        Ok(result) => Ok(result),
        Err(NoAnswer::Gone) if ends && !app.is_alive() => forget(app),
        Err(error) => Err(told(app, &error)),
    }
}

/// Ends an app, and returns when its name is free.
///
/// # Errors
/// Why it did not end.
pub(crate) async fn end(app: &App, request: Raw) -> Result<Value, Verdict> {
    one_app(app, request, true, true).await
}

/// Its name can be taken again when this returns.
async fn wait_until_gone(app: &App) {
    let gone = async {
        while app.is_alive() {
            tokio::time::sleep(PAUSE).await;
        }
    };
    // It has told its end; whoever needs the name tries it.
    let _ = tokio::time::timeout(LEAVING, gone).await;
}

/// Clears away what a primary that was killed, or failed, has left.
fn forget(app: &App) -> Result<Value, Verdict> {
    let text = match app.card().and_then(|card| card.ended) {
        Some(ended) => format!("had ended already ({}): {}", ended.outcome, ended.text),
        None => "its primary was killed before; forgotten".to_owned(),
    };
    if let Ok(claim) = Runtime::make()?.claim(&app.name) {
        drop(claim);
    }
    Ok(serde_json::json!({ "outcome": "gone", "exit_code": 0, "text": text }))
}

async fn interrupted_twice(doing: &str) {
    let Ok(mut interrupt) = signal(SignalKind::interrupt()) else {
        return std::future::pending().await;
    };
    interrupt.recv().await;
    remark(&format!("still {doing}; Ctrl-C again leaves it to go on by itself"));
    interrupt.recv().await;
}
