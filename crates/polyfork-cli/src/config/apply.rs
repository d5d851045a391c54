//! `polyfork apply`: what runs becomes what the file says; first it is told what that takes, then exactly that is done.
//!
//! What an app was started with it tells itself (`live`); here it is compared with the file, app by app.
//!
//! The surprising rule: a change that needs another primary ends an app and starts it again, which nobody does by accident:
//! without `--replace` the whole plan is refused and nothing is done.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use super::args::ApplyArgs;
use super::wanted::{Change, Digest, NEWER, Takes, Wanted};
use super::{Loaded, check};
use crate::control::folder::App;
use crate::control::protocol::Raw;
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::operate::{self, VERSION, complain, fail, remark, start, targets};
use crate::out;
use crate::run::how_many::HowMany;

/// What is to be done with one app.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Action {
    /// It is what it is to be.
    Nothing,
    /// It does not run.
    Start,
    /// Another number of workers.
    Scale,
    /// New workers.
    Reload,
    /// Stop, and start anew.
    Replace,
    /// It is in the file no more.
    Stop,
    /// The same, and it is left alone.
    Leave,
}

struct Step {
    name: String,
    action: Action,
    changes: Vec<Change>,
    /// Of an action that needs words.
    why: Option<String>,
    /// How many workers there are to be, if that has to be said.
    scale: Option<u32>,
    wanted: Option<Wanted>,
    running: Option<Arc<App>>,
}

#[derive(Serialize)]
struct Report<'a> {
    version: u32,
    file: &'a Path,
    dry_run: bool,
    apps: Vec<StepShape<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<operate::ErrorShape<'a>>,
}

#[derive(Serialize)]
struct StepShape<'a> {
    name: &'a str,
    action: Action,
    why: Option<&'a str>,
    changes: &'a [Change],
    /// What it did: null where nothing was done.
    result: Option<&'a Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<operate::ErrorShape<'a>>,
}

/// Runs the verb.
pub(crate) async fn run(args: ApplyArgs) -> Code {
    let json = args.form.json;
    match plan(&args).await {
        Ok((file, steps)) => carry_out(&args, &file, steps).await,
        Err(verdict) => fail(&verdict, json),
    }
}

async fn plan(args: &ApplyArgs) -> Result<(PathBuf, Vec<Step>), Verdict> {
    let profile = args.profile.as_deref();
    let named = super::named_or_here(args.file.as_deref())?;
    let Loaded { file, apps, faults } = super::load(&named, profile)?.sound()?;
    faults.iter().for_each(check::remark_of);
    let found = check::look(&apps, &named);
    if found.iter().any(|fault| fault.fatal) {
        return Err(super::fault::refusal(&found));
    }
    found.iter().for_each(check::remark_of);
    let running: Vec<Arc<App>> = targets::all()?.into_iter().map(Arc::new).collect();
    let mut steps = Vec::new();
    for wanted in &apps {
        let app = running.iter().find(|app| app.name.as_str() == wanted.name && app.is_alive());
        match app {
            Some(app) => steps.push(compare(app, wanted, profile).await?),
            None if wanted.autostart => steps.push(Step::of(wanted, Action::Start)),
            None => {}
        }
    }
    for app in running.iter().filter(|app| app.is_alive()) {
        let is_wanted = apps.iter().any(|wanted| wanted.name == app.name.as_str());
        if is_wanted || digest(app).await.is_none_or(|told| told.file.as_ref() != Some(&file)) {
            continue;
        }
        let action = if args.prune { Action::Stop } else { Action::Leave };
        let why = "it is in the file no more".to_owned();
        let running = Some(Arc::clone(app));
        let name = app.name.to_string();
        steps.push(Step { why: Some(why), running, ..Step::named(name, action) });
    }
    Ok((file, steps))
}

impl Step {
    fn named(name: String, action: Action) -> Step {
        let (changes, why) = (Vec::new(), None);
        Step { name, action, changes, why, scale: None, wanted: None, running: None }
    }

    fn of(wanted: &Wanted, action: Action) -> Step {
        Step { wanted: Some(wanted.clone()), ..Step::named(wanted.name.clone(), action) }
    }

    /// One line for people.
    fn told(&self) -> String {
        let name = &self.name;
        let why = self.why.as_deref().unwrap_or_default();
        match self.action {
            Action::Nothing => format!("{name}: as it is to be"),
            Action::Start => format!("{name}: start"),
            Action::Scale => format!("{name}: scale to {}", self.scale.unwrap_or(0)),
            Action::Reload => match self.scale {
                Some(workers) => format!("{name}: reload, and scale to {workers}"),
                None => format!("{name}: reload"),
            },
            Action::Replace => format!("{name}: stop and start anew{}{why}", colon(why)),
            Action::Stop => format!("{name}: stop: {why}"),
            Action::Leave => format!("{name}: runs on: {why} (--prune stops it)"),
        }
    }
}

fn colon(text: &str) -> &'static str {
    if text.is_empty() { "" } else { ": " }
}

fn told_change(change: &Change) -> String {
    let key = crate::words::harmless(&change.key);
    let said = |text: &Option<String>| match text {
        Some(text) => crate::words::harmless(text),
        None => "(not set)".to_owned(),
    };
    match (&change.from, &change.to) {
        (None, None) => format!("    {key}: changed"),
        (Some(from), Some(to)) if from == "set" && to == "changed" => format!("    {key}: changed"),
        (None, Some(to)) if matches!(change.takes, Takes::Reload) && change.key == "program" => {
            format!("    {key}: {}", crate::words::harmless(to))
        }
        (None, Some(to)) if to == NEWER => format!("    {key}: changed since it was started"),
        (from, to) => format!("    {key}: {} -> {}", said(from), said(to)),
    }
}

/// What a running app was started with; `None` for one that does not tell.
async fn digest(app: &App) -> Option<Digest> {
    let told =
        operate::ask(app, operate::plain("config"), Some(operate::ANSWER_TIME)).await.ok()?;
    serde_json::from_value(told).ok()
}

async fn compare(app: &Arc<App>, wanted: &Wanted, profile: Option<&str>) -> Result<Step, Verdict> {
    let ask = |verb| operate::ask(app, operate::plain(verb), Some(operate::ANSWER_TIME));
    let told = ask("config").await.map_err(|error| operate::told(app, &error))?;
    let digest: Digest = serde_json::from_value(told).unwrap_or_default();
    let mut step = Step { running: Some(Arc::clone(app)), ..Step::of(wanted, Action::Nothing) };
    let replace =
        |step: Step, why: String| Ok(Step { action: Action::Replace, why: Some(why), ..step });
    match &digest.file {
        None => {
            return replace(step, "it was started by hand, not from a file".to_owned());
        }
        Some(file) if *file != wanted.file => {
            return replace(step, format!("it was started from {}", file.display()));
        }
        Some(_) if digest.profile.as_deref() != profile => {
            let said = |profile: Option<&str>| profile.unwrap_or("no profile").to_owned();
            let (from, to) = (said(digest.profile.as_deref()), said(profile));
            return replace(step, format!("it was started with {from}, not {to}"));
        }
        Some(_) => {}
    }
    step.changes = digest.changes(wanted, profile);
    step.scale = workers_to_be(wanted, &step.changes, app).await?;
    let takes = step.changes.iter().map(|change| change.takes).max();
    step.action = match (takes, step.scale) {
        (Some(Takes::Replace), _) => Action::Replace,
        (Some(Takes::Reload), _) => Action::Reload,
        (_, Some(_)) => Action::Scale,
        // A number that is not what the file said before, and is what it says now.
        (Some(Takes::Scale), None) => Action::Reload,
        (None, None) => Action::Nothing,
    };
    if step.action == Action::Replace {
        let fixed = step.changes.iter().filter(|change| change.takes == Takes::Replace);
        let keys: Vec<&str> = fixed.map(|change| change.key.as_str()).collect();
        step.why = Some(format!("{} cannot be changed while it runs", keys.join(", ")));
    }
    Ok(step)
}

/// How many workers there are to be, if there are others now: the file says so, or said so before.
async fn workers_to_be(
    wanted: &Wanted,
    changes: &[Change],
    app: &App,
) -> Result<Option<u32>, Verdict> {
    let changed = changes.iter().any(|change| change.key == "workers");
    if !changed && !wanted.options.contains_key("workers") {
        return Ok(None);
    }
    let args = super::layered("start", &[], wanted)?;
    let to = HowMany::of(args.run.workers).workers;
    let status = operate::ask(app, operate::plain("brief"), Some(operate::ANSWER_TIME)).await;
    let status = status.map_err(|error| operate::told(app, &error))?;
    let now = status["workers_wanted"].as_u64();
    Ok((now != Some(u64::from(to))).then_some(to))
}

type Done = Result<Option<Value>, Verdict>;

async fn carry_out(args: &ApplyArgs, file: &Path, steps: Vec<Step>) -> Code {
    let json = args.form.json;
    if !json {
        for step in &steps {
            remark(&step.told());
            step.changes.iter().for_each(|change| remark(&told_change(change)));
        }
        if steps.is_empty() {
            remark(&format!("{} has nothing to apply", file.display()));
        }
    }
    let replaced: Vec<&str> = steps
        .iter()
        .filter(|step| step.action == Action::Replace)
        .map(|step| step.name.as_str())
        .collect();
    let refused = (!replaced.is_empty() && !args.replace && !args.dry_run).then(|| Verdict {
        code: Code::Refused,
        text: format!(
            "nothing was done: {} would have to be stopped and started anew; --replace does that",
            replaced.join(", ")
        ),
    });
    let mut outcomes: Vec<Done> = Vec::new();
    for step in &steps {
        let done = match args.dry_run || refused.is_some() {
            true => Ok(None),
            false => match (step.action, not_done(&steps, &outcomes)) {
                (Action::Stop, Some(other)) => Err(runs_on(&step.name, other)),
                _ => carry_out_one(step, args.profile.as_deref()).await,
            },
        };
        if let Err(verdict) = &done {
            complain(&verdict.text);
        }
        outcomes.push(done);
    }
    let failed = outcomes.iter().filter_map(|done| done.as_ref().err()).next();
    let code = refused.as_ref().or(failed).map_or(Code::Stopped, |verdict| verdict.code);
    if let Some(refused) = &refused {
        complain(&refused.text);
    }
    if json {
        let shape = |(step, done): (&'_ Step, &'_ Done)| -> Value {
            let shape = StepShape {
                name: &step.name,
                action: step.action,
                why: step.why.as_deref(),
                changes: &step.changes,
                result: done.as_ref().ok().and_then(Option::as_ref),
                error: done.as_ref().err().map(operate::ErrorShape::of),
            };
            serde_json::to_value(shape).unwrap_or_default()
        };
        let apps: Vec<Value> = steps.iter().zip(&outcomes).map(shape).collect();
        let report = Report {
            version: VERSION,
            file,
            dry_run: args.dry_run,
            apps: Vec::new(),
            error: refused.as_ref().map(operate::ErrorShape::of),
        };
        let mut report = serde_json::to_value(report).unwrap_or_default();
        report["apps"] = apps.into();
        out::json(&report);
    }
    code
}

/// The first app that did not come to be as it should.
fn not_done<'a>(steps: &'a [Step], outcomes: &[Done]) -> Option<&'a str> {
    let mut done = steps.iter().zip(outcomes);
    done.find(|(_, done)| done.is_err()).map(|(step, _)| step.name.as_str())
}

/// What was renamed may be all that serves.
fn runs_on(name: &str, other: &str) -> Verdict {
    Verdict {
        code: Code::Refused,
        text: format!(
            "{name}: runs on, since {other} did not do as it should; `polyfork stop {name}` stops it, and then apply again"
        ),
    }
}

async fn carry_out_one(step: &Step, profile: Option<&str>) -> Done {
    match (step.action, &step.running, &step.wanted) {
        (Action::Start, _, Some(wanted)) => start_one(wanted, profile).await.map(Some),
        (Action::Scale, Some(app), _) => scale(app, step).await,
        (Action::Reload, Some(app), _) => {
            let done = ask_and_tell(app, operate::plain("reload"), "text").await?;
            match step.scale {
                Some(_) => scale(app, step).await,
                None => Ok(Some(done)),
            }
        }
        (Action::Replace, Some(app), Some(wanted)) => {
            operate::change::end(app, operate::plain("stop")).await?;
            start_one(wanted, profile).await.map(Some)
        }
        (Action::Stop, Some(app), _) => {
            let done = operate::change::end(app, operate::plain("stop")).await?;
            remark(&format!("{}: {}", app.name, done["text"].as_str().unwrap_or("stopped")));
            Ok(Some(done))
        }
        _ => Ok(None),
    }
}

async fn scale(app: &App, step: &Step) -> Done {
    let request = Raw { to: step.scale, ..operate::plain("scale") };
    let done = operate::ask(app, request, None).await;
    let done = done.map_err(|error| operate::told(app, &error))?;
    let workers = done["workers"].as_u64().unwrap_or(0);
    let plural = if workers == 1 { "worker" } else { "workers" };
    remark(&format!("{}: {workers} {plural}", app.name));
    Ok(Some(done))
}

async fn ask_and_tell(app: &App, request: Raw, text: &str) -> Result<Value, Verdict> {
    let done = operate::ask(app, request, None).await;
    let done = done.map_err(|error| operate::told(app, &error))?;
    if let Some(text) = done[text].as_str() {
        remark(&format!("{}: {text}", app.name));
    }
    Ok(done)
}

async fn start_one(wanted: &Wanted, profile: Option<&str>) -> Result<Value, Verdict> {
    let profile: Vec<OsString> =
        profile.map(|profile| vec!["--profile".into(), profile.into()]).unwrap_or_default();
    let words = super::start_words(&profile, wanted);
    let app =
        start::one((Some(wanted.name.clone()), words)).await.map_err(|refused| refused.whole())?;
    start::tell(&app);
    Ok(app)
}
