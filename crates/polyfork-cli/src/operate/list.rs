//! `polyfork ls`: a line for each app, whatever state it is in.
//!
//! What changes seldom is read from the file that each primary keeps for this, memory and CPU time from the kernel. So
//! a list of a hundred apps wakes none of them, takes milliseconds, and no app that hangs can hold it up. Only where there
//! is no such file the app is asked, all of those at the same time, and whoever does not answer within a second is shown
//! as such.
//!
//! The surprising rule: the file says nothing about who lives; the lock does. A primary that somebody has stopped is told by
//! the kernel. One that hangs in another way looks well here; `status` asks it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::table::{self, Cell};
use super::{VERSION, fail, plain, targets};
use crate::args::operate::LsArgs;
use crate::control::client::NoAnswer;
use crate::control::folder::App;
use crate::control::usage;
use crate::exit::Code;
use crate::out;
use crate::style::{Ink, Paint};
use crate::values;

/// Longer than any primary is busy.
const PATIENCE: Duration = Duration::from_secs(1);

/// Runs the verb.
pub(crate) async fn run(args: LsArgs) -> Code {
    let json = args.form.json;
    let apps = match args.names.is_empty() {
        true => targets::all(),
        false => targets::find(&args.names),
    };
    let apps = match apps {
        Ok(apps) => apps,
        Err(verdict) => return fail(&verdict, json),
    };
    let briefs = briefs(apps).await;
    if json {
        out::json(&briefs);
    } else if briefs.is_empty() {
        super::remark("no app runs; `polyfork start PROGRAM` starts one");
    } else {
        out::write(draw(&briefs).as_bytes());
    }
    Code::Stopped
}

/// The lines of all of them.
async fn briefs(apps: Vec<App>) -> Vec<Value> {
    let mut asking = JoinSet::new();
    let mut briefs: Vec<(usize, Value)> = Vec::new();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    for (number, app) in apps.into_iter().enumerate() {
        match written(&app, now) {
            Some(brief) => briefs.push((number, brief)),
            None => drop(asking.spawn(async move { (number, asked(&app).await) })),
        }
    }
    while let Some(answer) = asking.join_next().await {
        briefs.extend(answer.ok());
    }
    briefs.sort_by_key(|(number, _)| *number);
    briefs.into_iter().map(|(_, brief)| brief).collect()
}

/// The line of an app that lives and has written one, with what the kernel knows now.
fn written(app: &App, now: u64) -> Option<Value> {
    if !app.is_alive() {
        return Some(without_primary(app));
    }
    let mut line: Value = serde_json::from_slice(&app.state()?).ok()?;
    let fields = line.as_object_mut()?;
    let started = fields.remove("started_ms")?.as_u64()?;
    let pids = fields.remove("pids")?;
    let number = |value: &Value| value.as_u64().and_then(|pid| u32::try_from(pid).ok());
    let primary = usage::of(number(fields.get("pid")?)?)?;
    let workers = usage::of_all(pids.as_array()?.iter().filter_map(number));
    let all = primary.plus(workers);
    if primary.is_stopped {
        return Some(from_card(app, "not_answering"));
    }
    fields.insert("uptime_ms".into(), now.saturating_sub(started).into());
    fields.insert("cpu_ms".into(), all.cpu_ms.into());
    fields.insert("resident_bytes".into(), all.resident_bytes.into());
    Some(line)
}

async fn asked(app: &App) -> Value {
    let asked = tokio::time::timeout(PATIENCE, super::ask(app, plain("brief"), Some(PATIENCE)));
    let state = match asked.await {
        Ok(Ok(answer)) => return answer,
        Ok(Err(NoAnswer::Gone)) if app.is_alive() => "starting",
        Ok(Err(NoAnswer::Gone)) => return without_primary(app),
        _ => "not_answering",
    };
    from_card(app, state)
}

fn without_primary(app: &App) -> Value {
    let ended = app.card().is_some_and(|card| card.ended.is_some());
    from_card(app, if ended { "failed" } else { "gone" })
}

/// What can be told of an app without its help: the same fields, most of them null.
fn from_card(app: &App, state: &str) -> Value {
    let card = app.card();
    let none = Value::Null;
    json!({
        "version": VERSION,
        "name": app.name.as_str(),
        "pid": card.as_ref().map(|card| card.pid),
        "state": state,
        "program": card.as_ref().map(|card| &card.program),
        "policy": none,
        "mechanism": none,
        "listeners": [],
        "workers_wanted": none,
        "workers_ready": none,
        "restarts": none,
        "started": card.as_ref().map(|card| &card.started),
        "uptime_ms": none,
        "cpu_ms": none,
        "resident_bytes": none,
        "ended": card.as_ref().and_then(|card| card.ended.as_ref()),
    })
}

fn draw(briefs: &[Value]) -> String {
    let rows: Vec<Vec<Cell>> = briefs.iter().map(row).collect();
    let head = ["name", "state", "workers", "restarts", "up", "cpu", "memory", "listens on", "by"];
    table::draw(Paint::stdout(), &head, &rows)
}

fn row(brief: &Value) -> Vec<Cell> {
    let text = |field: &str| brief[field].as_str().unwrap_or("-");
    let number = |field: &str| brief[field].as_u64();
    let workers = number("workers_ready").zip(number("workers_wanted"));
    let listeners: Vec<&str> =
        brief["listeners"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    vec![
        Cell::of(text("name")).ink(Ink::Bold),
        table::state(text("state")),
        Cell::maybe(workers.map(|(ready, wanted)| format!("{ready}/{wanted}"))),
        Cell::maybe(number("restarts")),
        Cell::maybe(number("uptime_ms").map(time)),
        Cell::maybe(number("cpu_ms").map(time)),
        Cell::maybe(number("resident_bytes").map(values::bytes)),
        match listeners.as_slice() {
            [] => Cell::unknown(),
            [one] => Cell::of(one),
            [one, more @ ..] => Cell::of(format!("{one} and {} more", more.len())),
        },
        Cell::maybe(brief["mechanism"].as_str()),
    ]
}

/// A time in milliseconds for people.
pub(crate) fn time(ms: u64) -> String {
    values::spoken(Duration::from_millis(ms))
}
