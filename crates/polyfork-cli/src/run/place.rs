//! Where an app is found, and where it writes to: its name, its logs, its control socket, its metrics.
//!
//! Folders and locks are in `control::folder`, what is answered there in `control::server` and `metrics::server`. Here is
//! which of them an app has, and what it is told when it cannot have one.
//!
//! The surprising rule: an app in the foreground is worth more than its control socket, and goes on without; one in the
//! background could not be stopped then, and is not started.

use std::sync::Arc;

use polyfork::cluster::Cluster;

use super::{Controlled, Place, Prepared, Refused, usage};
use crate::args::start::{LogArgs, LogFormatArg};
use crate::control::book::{About, Book};
use crate::control::folder::{Card, Claim, Ended, NotClaimed, Runtime};
use crate::control::name::Name;
use crate::control::server::Control;
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::logs::folder as log_folder;
use crate::logs::line::Format;
use crate::logs::writer::{Rotation, Writer};
use crate::metrics::Meter;
use crate::metrics::server::{self as metrics_server, Door, Serving};
use crate::report::Start;
use crate::{background, clock, words};

/// Takes the app's name, so that commands find it. An app in the foreground is worth more than its control socket: without
/// a folder for it, it goes on without; and a name that nobody chose gets a number if it is taken.
pub(crate) fn with_control(prepared: Prepared, explicit: bool) -> Result<Prepared, Refused> {
    let claim = claim_a_name(&prepared.start.name, explicit)?;
    Ok(with_claim(prepared, claim))
}

pub(super) fn with_claim(mut prepared: Prepared, claim: Result<Claim, String>) -> Prepared {
    match claim {
        Ok(claim) => with_name(prepared, claim),
        Err(why) => {
            prepared.start.warnings.push(why);
            prepared
        }
    }
}

/// Claims a name for an app in the foreground, or says why it has to go without.
pub(crate) fn claim_a_name(wanted: &str, explicit: bool) -> Result<Result<Claim, String>, Refused> {
    let name = name(wanted, explicit)?;
    let without = |refused: &Verdict| {
        Ok(Err(format!("{}; no command can reach this one (--no-control says so)", refused.text)))
    };
    let mut runtime = match Runtime::make() {
        Ok(runtime) => runtime,
        Err(refused) => return without(&refused),
    };
    let mut number = 1;
    let mut wanted = name.clone();
    loop {
        match runtime.claim(&wanted) {
            Ok(claim) => return Ok(Ok(claim)),
            Err((_, NotClaimed::Unusable(refused))) => return without(&refused),
            Err((_, NotClaimed::Taken)) if explicit => return Err(taken(&wanted)),
            Err((back, NotClaimed::Taken)) => {
                runtime = back;
                number += 1;
                wanted = name.numbered(number);
            }
        }
    }
}

fn name(wanted: &str, explicit: bool) -> Result<Name, Refused> {
    match explicit {
        true => named(wanted),
        false => Ok(Name::like(wanted)),
    }
}

/// A name that somebody chose.
pub(crate) fn named(name: &str) -> Result<Name, Refused> {
    Name::read(name).map_err(|error| usage(format!("--name {}: {error}", words::harmless(name))))
}

fn taken(name: &Name) -> Refused {
    let text = format!(
        "an app named {name} runs already: `polyfork status {name}` shows it, `polyfork stop {name}` ends it, \
         --name gives this one another name"
    );
    Verdict { code: Code::AlreadyRunning, text }
}

/// Everything is called what the claim says.
pub(super) fn with_name(mut prepared: Prepared, claim: Claim) -> Prepared {
    let name = claim.name().to_string();
    prepared.settings = prepared.settings.name(&name);
    prepared.place.about.name.clone_from(&name);
    prepared.start.name = name;
    prepared.place.claim = Some(claim);
    prepared
}

/// Claims a name for an app in the background, which has to be had.
pub(crate) fn claim_in_background(wanted: &str, explicit: bool) -> Result<Claim, Refused> {
    let name = name(wanted, explicit)?;
    Runtime::make()?.claim(&name).map_err(|(_, error)| match error {
        NotClaimed::Taken => taken(&name),
        NotClaimed::Unusable(refused) => refused,
    })
}

/// `made`: the folder, if it had to be made before.
pub(super) fn logs(
    args: &LogArgs,
    made: Option<log_folder::Folder>,
    about: &mut About,
) -> Result<Writer, Refused> {
    let folder = match made {
        Some(folder) => folder,
        None => {
            let root = log_folder::root(args.log_dir.as_deref())?;
            log_folder::Folder::make(&root, &named(&about.name)?)?
        }
    };
    about.logs = Some(folder.path.to_string_lossy().into_owned());
    if let Ok(folder) = folder.again() {
        background::write_panics_to(folder);
    }
    let (format, rotation) = how_to_log(args);
    Writer::start(folder, format, rotation).map_err(|error| Verdict {
        code: Code::Unexpected,
        text: words::plain(&format!("cannot start to write logs: {error}")),
    })
}

fn how_to_log(args: &LogArgs) -> (Format, Rotation) {
    let format = match args.log_format {
        LogFormatArg::Text => Format::Text,
        LogFormatArg::Json => Format::Json,
    };
    let rotation = Rotation {
        size: u64::try_from(args.log_size).unwrap_or(u64::MAX),
        age: args.log_age.0,
        keep: usize::from(args.log_keep),
    };
    (format, rotation)
}

impl Place {
    /// An app that is not reached by a name yet.
    pub(crate) fn of(about: About) -> Place {
        Place { about, ..Place::default() }
    }

    /// Tells whoever waits in the foreground.
    pub(super) fn refuse(&mut self, refused: Refused) -> Refused {
        // The name is free when they are told.
        self.claim = None;
        if let Some(background) = &mut self.background {
            background.starter.refused(&refused);
        }
        refused
    }

    /// Opens the place where metrics are served, before anything is started.
    pub(super) fn open_metrics(&mut self) -> Result<Option<Door>, Refused> {
        let Some(address) = &self.measured.address else { return Ok(None) };
        match metrics_server::open(address) {
            Ok(door) => {
                self.about.metrics = Some(door.place.clone());
                Ok(Some(door))
            }
            Err(error) => {
                let text = format!("--metrics: {}", words::bind_failed(address, &error));
                Err(self.refuse(Verdict { code: words::bind_code(&error), text }))
            }
        }
    }

    /// Serves metrics there.
    pub(super) fn serve(
        &mut self,
        door: Option<Door>,
        control: Option<&Controlled>,
    ) -> Result<Option<Serving>, Refused> {
        let Some((door, (control, _))) = door.zip(control) else { return Ok(None) };
        metrics_server::serve(door, control).map(Some).map_err(|error| {
            let text = words::plain(&format!("cannot serve metrics: {error}"));
            self.refuse(Verdict { code: Code::Unexpected, text })
        })
    }

    /// Opens the control socket. In the background it has to be had; in the foreground it is gone without.
    pub(super) fn open(
        &mut self,
        cluster: &Cluster,
        start: &mut Start,
    ) -> Result<Option<Controlled>, Refused> {
        let meter = Meter::new(self.measured.programs);
        let Some(claim) = &self.claim else {
            // Nobody can reach it; it may be measured all the same.
            let book = || Book::new(self.about.clone(), start.workers, None);
            let measured = self.measured.address.is_some();
            return Ok(measured.then(|| Control::quiet(cluster, book(), meter)));
        };
        let card = card(&self.about, clock::now(), None);
        let opened =
            claim.write_card(&card).and_then(|()| Ok((claim.listen()?, claim.state_file()?)));
        let losses = self.background.as_ref().map(|background| Arc::clone(&background.logs.losses));
        let book = Book::new(self.about.clone(), start.workers, losses);
        match opened.and_then(|(socket, state)| Control::start(socket, state, cluster, book, meter))
        {
            Ok(controlled) => Ok(Some(controlled)),
            Err(error) => {
                let text =
                    format!("cannot open the control socket of {}: {error}", self.about.name);
                let refused = Verdict { code: Code::NoFolder, text: words::plain(&text) };
                if self.background.is_some() {
                    return Err(self.refuse(refused));
                }
                start.warnings.push(format!("{}; no command can reach this one", refused.text));
                self.claim = None;
                Ok(None)
            }
        }
    }
}

pub(super) fn card(about: &About, started: String, ended: Option<Ended>) -> Card {
    Card {
        version: 1,
        pid: std::process::id(),
        started,
        program: about.program.clone(),
        logs: about.logs.as_ref().map(Into::into),
        ended,
    }
}
