//! A cluster is started, with everything around it, and stayed with to its end.
//!
//! What is opened before and after is in `place`; what is told of it meanwhile in `watch`.
//!
//! The order: metrics are bound first, since nothing is to be started that cannot be measured as was asked; the control socket
//! comes after the cluster, which it answers for.

use std::io;

use polyfork::cluster::{Cluster, Event, Output, OutputLine, StartError};
use tokio::sync::mpsc;

use super::prepare::not_run;
use super::{Around, Prepared, Refused, Watch, usage};
use crate::args::choices::OutputArg;
use crate::exit::Code;
use crate::ledger::{Ledger, Verdict};
use crate::manager::{self, Manager};
use crate::words;

/// Lines of worker output between the primary and the writer; each is 64 KiB at most.
const LINES: usize = 16;

/// Starts the cluster and stays with it to the end. `observer` makes, with the cluster at hand, what sees every event
/// before it is shown.
///
/// # Errors
/// Why nothing was started.
pub(crate) fn supervise<F: FnMut(&Event)>(
    prepared: Prepared,
    observer: impl FnOnce(&Cluster) -> F,
) -> Result<Code, Refused> {
    on_this_thread(start(prepared, observer)).map_err(|error| Verdict {
        code: Code::Unexpected,
        text: words::plain(&format!("cannot make a runtime: {error}; are too many files open?")),
    })?
}

/// Does all of this on the calling thread.
///
/// # Errors
/// When there are no descriptors for that; nothing was done.
pub(super) fn on_this_thread<T>(all: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(all);
    // Whatever is left of the cluster ends with the process.
    runtime.shutdown_background();
    Ok(outcome)
}

async fn start<F: FnMut(&Event)>(
    prepared: Prepared,
    observer: impl FnOnce(&Cluster) -> F,
) -> Result<Code, Refused> {
    let Prepared { settings, mut start, show, mut place } = prepared;
    let door = place.open_metrics()?;
    let (output, lines) = what_becomes_of(show.output);
    let settings = settings.output(output);
    // Whoever runs `start` is no manager of what stays behind.
    let managed = place.background.is_none();
    let settings = match managed {
        true => manager::with_store(settings),
        // As with PM2, whose apps stay when they have stopped.
        false => settings.stay_at_rest(true),
    };
    let cluster = Cluster::start_detected(settings, start.detected.clone())
        .map_err(|error| place.refuse(not_started(&error)))?;
    let control = place.open(&cluster, &mut start)?;
    let (manager, warning) = if managed { Manager::take() } else { (Manager::default(), None) };
    start.warnings.extend(warning);
    let serving = place.serve(door, control.as_ref())?;
    let around = Around { control, serving, manager };
    let ledger = Ledger::awaiting(place.ready);
    let mut watch = Watch::new(start.workers, show, place, around, ledger);
    let first = watch.report.get_mut().start(&start);
    first.iter().for_each(|line| watch.own(line));
    drop((first, start));
    Ok(watch.run(&cluster, lines, observer(&cluster)).await.code)
}

fn not_started(error: &StartError) -> Refused {
    match error {
        StartError::Program(error) => not_run(error),
        StartError::Bind { address, error } => {
            Verdict { code: words::bind_code(error), text: words::bind_failed(address, error) }
        }
        StartError::Settings(text) => usage(text.clone()),
        other => Verdict { code: Code::Unexpected, text: words::plain(&other.to_string()) },
    }
}

/// What becomes of what workers write, and where we read it.
pub(super) fn what_becomes_of(output: OutputArg) -> (Output, Option<mpsc::Receiver<OutputLine>>) {
    if output == OutputArg::Inherit {
        return (Output::Inherit, None);
    }
    // Also when nothing is shown: the last lines explain a slot that is given up.
    let (sender, lines) = mpsc::channel(LINES);
    (Output::Lines(sender), Some(lines))
}
