//! `polyfork run`: the way from options to a cluster, and from a cluster to lines and an exit code.
//!
//! Decides nothing about workers; it is one user of `polyfork::cluster`. The way is that of the files: `prepare` makes settings
//! of options (`how_many` workers), `place` takes a name and opens what the app is reached by, `start` starts it, `watch` stays
//! with it to the end. `replacing` gives its place to another binary, and `resume` goes on there. Rendering is in `report`,
//! writing in `sink` and `logs`.
//!
//! The surprising rule: an image that was executed in the place of another has the same command line, and must not look at
//! it. That it was left an app is found out before anything else, in `main`.

use std::cell::{Cell, RefCell};
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::time::Instant;

use polyfork::cluster::{Address, Event, Ready, Settings};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::args::choices::OutputArg;
use crate::args::run::{RunArgs, ShowArgs};
use crate::args::start::StartArgs;
use crate::args::{self, Cli, NotRun, Verb};
use crate::background::{self, Starter};
use crate::config::renew::Renewal;
use crate::control::book::About;
use crate::control::folder::Claim;
use crate::control::name::Name;
use crate::control::server::{Control, Rested, Wish};
use crate::exit::Code;
use crate::identity::{self, Wants};
use crate::ledger::{Ledger, Verdict};
use crate::logs::writer::Writer;
use crate::manager::Manager;
use crate::metrics::server::Serving;
use crate::report::{Report, Start, json};
use crate::sink::Sink;
use crate::upgrade;
use crate::{config, out, words};

use place::{claim_in_background, logs, with_claim, with_control, with_name};
use prepare::{name_of, no_foreground, prepare};
pub(crate) use resume::go_on;
use start::supervise;

pub(crate) mod how_many;
pub(crate) mod place;
pub(crate) mod prepare;
mod replacing;
mod resume;
pub(crate) mod start;
mod watch;

/// Why nothing was started.
pub(crate) type Refused = Verdict;

/// Everything that is needed to start, made from options.
pub(crate) struct Prepared {
    pub(crate) settings: Settings,
    pub(crate) start: Start,
    pub(crate) show: Show,
    pub(crate) place: Place,
}

impl Prepared {
    /// Another binary may take the place of this one.
    fn replaceable(mut self) -> Prepared {
        self.place.binary = Some(upgrade::own_binary());
        self
    }
}

/// Where an app is found, and where it writes to.
#[derive(Default)]
pub(crate) struct Place {
    /// The file of this binary, if another one may take its place.
    binary: Option<PathBuf>,
    /// Its name, as long as it runs.
    claim: Option<Claim>,
    about: About,
    background: Option<Background>,
    /// When it reloads by itself.
    renewal: Renewal,
    measured: Measured,
    /// What makes its workers ready.
    ready: Ready,
}

/// What of it is measured, and where that is served.
#[derive(Debug, Default)]
struct Measured {
    address: Option<Address>,
    programs: bool,
}

/// What an app in the background has instead of a terminal.
struct Background {
    starter: Starter,
    logs: Writer,
}

/// What is shown of it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Show {
    pub(crate) json: bool,
    pub(crate) output: OutputArg,
}

/// The control socket, and the wishes for another binary that come by it.
type Controlled = (Control, mpsc::Receiver<Wish>);

/// What surrounds a cluster: who asks, who measures, who manages.
struct Around {
    control: Option<Controlled>,
    serving: Option<Serving>,
    manager: Manager,
}

/// What is to be told once this image runs in the place of another.
struct After {
    /// The release before.
    from: String,
    began: Instant,
    rested: Instant,
    trial: u32,
    descriptors: usize,
    asker: Option<Rested>,
    /// The new binary gave everything back, for this reason.
    back: Option<String>,
}

/// A cluster being watched.
struct Watch {
    report: RefCell<Report>,
    ledger: RefCell<Ledger>,
    out: Option<Sink>,
    err: Option<Sink>,
    show: Show,
    /// In the background: where lines go instead.
    logs: Option<Writer>,
    starter: RefCell<Starter>,
    control: Option<Control>,
    wishes: RefCell<Option<mpsc::Receiver<Wish>>>,
    claim: RefCell<Option<Claim>>,
    serving: Option<Serving>,
    manager: Manager,
    renewal: Renewal,
    about: About,
    workers: u32,
    binary: Option<PathBuf>,
    after: RefCell<Option<After>>,
    /// Lines of workers dealt with so far.
    passed_on: Cell<u64>,
    /// An event, or a line of a worker, is being dealt with.
    telling: Cell<bool>,
    passing: Cell<bool>,
    /// It was told that standard output loses lines.
    told_lost: Cell<bool>,
}

/// Runs a program until it ends.
pub(crate) fn run(args: RunArgs) -> Code {
    let json = args.show.json;
    let args = match config::for_run(args) {
        Ok(args) => args,
        Err(refused) => return refuse(&refused, json),
    };
    let prepared = prepare_run(args).map(Prepared::replaceable);
    match prepared.and_then(|prepared| supervise(prepared, |_| |_: &Event| ())) {
        Ok(code) => code,
        Err(refused) => refuse(&refused, json),
    }
}

fn prepare_run(args: RunArgs) -> Result<Prepared, Refused> {
    let explicit = args.name.is_some();
    let controlled = !args.no_control;
    let name = name_of(&args);
    let wants = Wants { name: &name, explicit, controlled, logs: None };
    let settled = identity::settle(&args, &wants)?;
    let prepared = prepare(args)?;
    match settled.and_then(|settled| settled.claim) {
        _ if !controlled => Ok(prepared),
        Some(claim) => Ok(with_claim(prepared, claim)),
        None => with_control(prepared, explicit),
    }
}

/// Runs a program in the background, as `polyfork start` began it.
pub(crate) fn run_in_background() -> Code {
    let Some(words) = background::given() else {
        let text = "`polyfork primary` is what `polyfork start` runs, and starts nothing by itself: use `polyfork start`";
        return refuse(&usage(text), false);
    };
    let mut starter = match Starter::take() {
        Ok(starter) => starter,
        Err(error) => {
            let text = words::plain(&format!("cannot leave the foreground: {error}"));
            return refuse(&Verdict { code: Code::Unexpected, text }, false);
        }
    };
    let args = background_args(&words).and_then(|args| config::for_primary(args, &words));
    match args.and_then(prepare_background) {
        Ok((mut prepared, logs)) => {
            prepared.start.warnings.iter().for_each(|text| starter.warning(text));
            prepared.place.background = Some(Background { starter, logs });
            supervise(prepared.replaceable(), |_| |_: &Event| ())
                .unwrap_or_else(|refused| refused.code)
        }
        Err(refused) => {
            starter.refused(&refused);
            refused.code
        }
    }
}

/// The words that `start` left, read as a command line.
fn background_args(words: &[OsString]) -> Result<StartArgs, Refused> {
    let whole = ["polyfork", "primary"].map(OsString::from).into_iter();
    match args::parse(whole.chain(words.iter().cloned())) {
        Ok(Cli { verb: Verb::Primary(args) }) => Ok(*args),
        Err(NotRun::Wrong(text)) => Err(usage(text)),
        Ok(_) | Err(NotRun::Asked(_)) => Err(usage(config::nothing_to("start"))),
    }
}

/// What an app of these words is called in lists of processes.
pub(crate) fn shown_name(words: &[OsString]) -> String {
    let named = background_args(words).map(|StartArgs { run, .. }| {
        let of_config = run.config.of_app.clone().filter(|_| run.name.is_none());
        of_config.unwrap_or_else(|| name_of(&run))
    });
    Name::like(&named.unwrap_or_default()).to_string()
}

fn prepare_background(args: StartArgs) -> Result<(Prepared, Writer), Refused> {
    let StartArgs { run, log } = args;
    no_foreground(&run)?;
    let explicit = run.name.is_some();
    let name = name_of(&run);
    let given = Some(log.log_dir.as_deref());
    let wants = Wants { name: &name, explicit, controlled: true, logs: given };
    let settled = identity::settle(&run, &wants)?.unwrap_or_default();
    let prepared = prepare(RunArgs { show: ShowArgs { json: false, ..run.show }, ..run })?;
    let claim = match settled.claim {
        Some(Ok(claim)) => claim,
        _ => claim_in_background(&prepared.start.name, explicit)?,
    };
    let mut prepared = with_name(prepared, claim);
    let logs = logs(&log, settled.logs, &mut prepared.place.about)?;
    Ok((prepared, logs))
}

/// Tells why nothing was started: a line on standard error, and a JSON line where those are wanted.
pub(crate) fn refuse(refused: &Refused, json: bool) -> Code {
    if json {
        out::write(json::refused(refused).as_bytes());
    }
    crate::say(io::stderr(), &format!("polyfork: {}\n", refused.text));
    refused.code
}

fn usage(text: impl Into<String>) -> Refused {
    Verdict { code: Code::Usage, text: text.into() }
}
