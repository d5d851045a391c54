//! `polyfork top [NAME]`: apps live, in a terminal; as text or JSON where there is none.
//!
//! `state` makes rates of two looks, `screen` knows what keys do, `view` draws, `plain` writes text, `terminal` takes the terminal
//! and gives it back. Here is what happens when: looks, keys, signals, and what is asked of apps.
//!
//! The surprising rule: keys wait for nothing. A look at an app that hangs, and what is asked of an app (a reload may take
//! minutes), go on beside, each over a connection of its own, and are shown when they are there.

use std::io::{self, IsTerminal};
use std::time::Duration;

use ratatui::crossterm::event::Event;
use serde_json::Value;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use super::{ANSWER_TIME, ask, complain, fail, plain as request, targets, told};
use crate::args::operate::TopArgs;
use crate::control::folder::App;
use crate::control::protocol::Raw;
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::style::Paint;
use crate::{out, words};
use screen::{Screen, Wish};
use state::{Look, Seen};

mod plain;
mod screen;
mod state;
mod terminal;
mod view;

/// Between two looks, unless asked otherwise.
const INTERVAL: Duration = Duration::from_secs(1);
/// Between the two looks that one table is made of.
const BRIEFLY: Duration = Duration::from_millis(500);
/// Outcomes of wishes that wait to be shown.
const OUTCOMES: usize = 8;

/// Runs the verb.
pub(crate) async fn run(args: TopArgs) -> Code {
    let apps = match living(&args.names) {
        Ok(apps) => apps,
        Err(verdict) => return fail(&verdict, args.json),
    };
    let is_dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb" || term.is_empty());
    let terminal = io::stdout().is_terminal() && io::stdin().is_terminal() && !is_dumb;
    match terminal && !args.plain && !args.json {
        true => live(&args, apps).await,
        false => written(&args, apps).await,
    }
}

/// The apps that are meant and live.
fn living(names: &[String]) -> Result<Vec<App>, Verdict> {
    let apps = match names.is_empty() {
        true => targets::all()?,
        false => targets::find(names)?,
    };
    let named = !names.is_empty();
    let gone = apps.iter().find(|app| !app.is_alive()).map(|app| app.name.to_string());
    let apps: Vec<App> = apps.into_iter().filter(App::is_alive).collect();
    match (apps.is_empty(), gone) {
        (false, _) => Ok(apps),
        (true, Some(name)) if named => {
            let text = format!("{name} runs no more; `polyfork ls` lists those that do");
            Err(Verdict { code: Code::NoSuchApp, text })
        }
        _ => {
            let text = "no app runs; `polyfork start PROGRAM` starts one".to_owned();
            Err(Verdict { code: Code::NoSuchApp, text })
        }
    }
}

async fn look(app: &App) -> Result<Look, Verdict> {
    let answer = ask(app, request("status"), Some(ANSWER_TIME)).await;
    answer.map(|status| Look::read(&status)).map_err(|error| told(app, &error))
}

// ---- without a terminal ----

/// Tables or objects: one, or one after the other until somebody has enough.
async fn written(args: &TopArgs, apps: Vec<App>) -> Code {
    let mut stop = match signal(SignalKind::interrupt()) {
        Ok(stop) => stop,
        Err(error) => return unexpected(&error, args.json),
    };
    let mut seen: Vec<Seen> = apps.iter().map(|_| Seen::default()).collect();
    let mut code = look_at_all(&apps, &mut seen, None).await;
    let mut last = Instant::now();
    loop {
        let pause = args.interval.unwrap_or(BRIEFLY);
        tokio::select! {
            () = tokio::time::sleep_until(last + pause) => {}
            _ = stop.recv() => return Code::Stopped,
        }
        let now = Instant::now();
        let went = look_at_all(&apps, &mut seen, Some(now - last)).await;
        last = now;
        if code == Code::Stopped {
            code = went;
        }
        let known: Vec<&Seen> = seen.iter().filter(|seen| seen.has_rates()).collect();
        let written = match args.json {
            true => {
                let mut line = plain::json(&known).to_string();
                line.push('\n');
                out::write(line.as_bytes())
            }
            false => {
                let paint = Paint::stdout();
                let drawn: Vec<String> =
                    known.iter().map(|seen| plain::draw(seen, paint)).collect();
                let gap = if args.interval.is_some() { "\n" } else { "" };
                out::write(format!("{}{gap}", drawn.join("\n")).as_bytes())
            }
        };
        // When all have gone there is nothing more to see.
        if args.interval.is_none() || !written || apps.iter().all(|app| !app.is_alive()) {
            return code;
        }
    }
}

/// Who does not answer is told, and passed over.
async fn look_at_all(apps: &[App], seen: &mut [Seen], since: Option<Duration>) -> Code {
    let mut code = Code::Stopped;
    for (app, seen) in apps.iter().zip(seen) {
        match look(app).await {
            Ok(look) => seen.next(look, since.unwrap_or(BRIEFLY)),
            Err(verdict) => {
                if code == Code::Stopped {
                    code = verdict.code;
                }
                complain(&verdict.text);
                *seen = Seen::default();
            }
        }
    }
    code
}

fn unexpected(error: &io::Error, json: bool) -> Code {
    let text = words::plain(&format!("cannot watch: {error}"));
    fail(&Verdict { code: Code::Unexpected, text }, json)
}

// ---- in a terminal ----

/// What ends the command from outside.
struct Signals([Signal; 3]);

impl Signals {
    fn new() -> io::Result<Signals> {
        let of = |kind| signal(kind);
        Ok(Signals([
            of(SignalKind::terminate())?,
            of(SignalKind::hangup())?,
            of(SignalKind::interrupt())?,
        ]))
    }

    async fn next(&mut self) {
        let [terminate, hangup, interrupt] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

/// What comes of a wish.
struct Outcome {
    text: String,
    bad: bool,
}

async fn live(args: &TopArgs, apps: Vec<App>) -> Code {
    let taken = Signals::new().and_then(|signals| Ok((signals, terminal::Taken::new()?)));
    let (mut signals, mut taken) = match taken {
        Ok(taken) => taken,
        Err(error) => return unexpected(&error, false),
    };
    let mut keys = terminal::events();
    let (outcomes, mut came) = mpsc::channel(OUTCOMES);
    let names: Vec<String> = apps.iter().map(|app| app.name.to_string()).collect();
    let app = names.first().cloned().unwrap_or_default();
    let mut screen = Screen { apps: names, app, ..Screen::default() };
    let mut ticks = tokio::time::interval(args.interval.unwrap_or(INTERVAL));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut last, mut looks) = (Instant::now(), JoinSet::new());
    loop {
        if let Err(error) = taken.screen.draw(|frame| view::draw(frame, &screen)) {
            drop(taken);
            return unexpected(&error, false);
        }
        tokio::select! {
            () = signals.next() => return Code::Interrupted,
            _ = ticks.tick(), if looks.is_empty() => {
                looks.spawn(watch(screen.app.clone(), args.names.clone()));
            }
            Some(Ok(looked)) = looks.join_next() => show(&mut screen, looked, &mut last),
            Some(Outcome { text, bad }) = came.recv() => screen.say(&text, bad),
            event = keys.recv() => match event {
                Some(Ok(Event::Key(key))) => match screen.key(key) {
                    Some(Wish::Quit) => return Code::Stopped,
                    Some(Wish::Switch(by)) => {
                        screen.switch(by);
                        looks.abort_all();
                        ticks.reset_immediately();
                    }
                    Some(wish) => begin(&mut screen, wish, &outcomes),
                    None => {}
                },
                // Drawn anew in the new size.
                Some(Ok(_)) => {}
                // The terminal is gone.
                Some(Err(_)) | None => return Code::Interrupted,
            },
        }
    }
}

/// What a look came to.
struct Looked {
    /// Everybody who lives.
    apps: Vec<String>,
    /// Who was looked at.
    app: String,
    /// `None`: it runs no more.
    look: Option<Result<Look, Verdict>>,
    at: Instant,
}

/// Looks at the app that is shown, and at which others there are.
async fn watch(app: String, names: Vec<String>) -> Looked {
    let apps = living(&names).unwrap_or_default();
    let look = match apps.iter().find(|other| other.name.as_str() == app) {
        Some(found) => Some(look(found).await),
        None => None,
    };
    let apps = apps.iter().map(|app| app.name.to_string()).collect();
    Looked { apps, app, look, at: Instant::now() }
}

/// Shows what a look came to, unless another app is shown by now.
fn show(screen: &mut Screen, looked: Looked, last: &mut Instant) {
    screen.apps = looked.apps;
    if looked.app != screen.app {
        return;
    }
    match looked.look {
        Some(Ok(look)) => {
            screen.seen.next(look, looked.at - *last);
            *last = looked.at;
        }
        Some(Err(verdict)) => screen.say(&verdict.text, true),
        None => {
            screen.seen = Seen::default();
            let text = format!("{} runs no more; tab shows another app, q leaves", screen.app);
            screen.say(&text, true);
        }
    }
}

/// Asks the app for what is wished; the outcome comes later.
fn begin(screen: &mut Screen, wish: Wish, outcomes: &mpsc::Sender<Outcome>) {
    let name = screen.app.clone();
    let (doing, raw) = match wish {
        Wish::Reload => ("reloading".to_owned(), request("reload")),
        Wish::Scale(by) => {
            let what = if by > 0 { "one worker more" } else { "one worker less" };
            (what.to_owned(), Raw { by: Some(by), ..request("scale") })
        }
        Wish::RestartSlot(slot) => {
            (format!("restarting slot {slot}"), Raw { slot: Some(slot), ..request("restart_slot") })
        }
        Wish::Stop => ("stopping".to_owned(), request("stop")),
        Wish::Quit | Wish::Switch(_) => return,
    };
    screen.say(&format!("{doing} ..."), false);
    let outcomes = outcomes.clone();
    tokio::spawn(async move {
        let found = targets::find(std::slice::from_ref(&name));
        let outcome = match found.map(|mut apps| apps.pop()) {
            Ok(Some(app)) => match ask(&app, raw, None).await {
                Ok(answer) => Outcome { text: done(&doing, &answer), bad: false },
                Err(error) => Outcome { text: told(&app, &error).text, bad: true },
            },
            Ok(None) => Outcome { text: format!("{name} runs no more"), bad: true },
            Err(verdict) => Outcome { text: verdict.text, bad: true },
        };
        // The screen may have been left.
        let _ = outcomes.send(outcome).await;
    });
}

fn done(doing: &str, answer: &Value) -> String {
    match (answer["text"].as_str(), answer["workers"].as_u64()) {
        (Some(text), _) => text.to_owned(),
        (None, Some(workers)) => format!("{doing}: {workers} workers"),
        (None, None) => format!("{doing}: done"),
    }
}
