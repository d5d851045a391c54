//! A cluster is started, with everything around it, and stayed with to its end.
//!
//! What is opened before and after is in `place`; what is told of it meanwhile in `watch`.
//!
//! The order: metrics are bound first, since nothing is to be started that cannot be measured as was asked; the control socket
//! comes after the cluster, which it answers for.

use polyfork::cluster::{Cluster, Event, Output, OutputLine, Settings, StartError};
use tokio::sync::mpsc;

use super::prepare::not_run;
use super::{Around, Prepared, Refused, Watch, usage};
use crate::args::choices::OutputArg;
use crate::exit::Code;
use crate::ledger::{Ledger, Verdict};
use crate::manager::{self, Manager};
use crate::metrics::server as metrics_server;
use crate::words;

/// Lines of worker output between the primary and the writer; each is 64 KiB at most.
const LINES: usize = 16;

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

/// Starts the cluster and stays with it to the end. `observer` makes, with the cluster at hand, what sees every event
/// before it is shown.
///
/// # Errors
/// Why nothing was started.
pub(crate) fn supervise<F: FnMut(&Event)>(
    prepared: Prepared,
    observer: impl FnOnce(&Cluster) -> F,
) -> Result<Code, Refused> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Verdict {
        code: Code::Unexpected,
        text: words::plain(&format!("cannot make a runtime: {error}; are too many files open?")),
    })?;
    let code = runtime.block_on(async {
        let Prepared { settings, mut start, show, mut place } = prepared;
        let door = place.open_metrics()?;
        let (settings, lines) = with_output(settings, show.output);
        // Whoever runs `start` is no manager of what stays behind.
        let settings = match place.background {
            Some(_) => settings,
            None => manager::with_store(settings),
        };
        let started = Cluster::start_detected(settings, start.detected.clone());
        let cluster = match started {
            Ok(cluster) => cluster,
            Err(error) => return Err(place.refuse(not_started(&error))),
        };
        let control = place.open(&cluster, &mut start)?;
        let (manager, warning) = match place.background {
            Some(_) => (Manager::default(), None),
            None => Manager::take(),
        };
        start.warnings.extend(warning);
        let serving = door
            .zip(control.as_ref())
            .map(|(door, (control, _))| metrics_server::serve(door, control));
        let serving = match serving.transpose() {
            Ok(serving) => serving,
            Err(error) => {
                let text = words::plain(&format!("cannot serve metrics: {error}"));
                return Err(place.refuse(Verdict { code: Code::Unexpected, text }));
            }
        };
        let around = Around { control, serving, manager };
        let mut watch = Watch::new(start.workers, show, place, around, Ledger::default());
        let first = watch.report.get_mut().start(&start);
        first.iter().for_each(|line| watch.own(line));
        drop((first, start));
        Ok(watch.run(&cluster, lines, observer(&cluster)).await.code)
    });
    // Whatever is left of the cluster ends with the process.
    runtime.shutdown_background();
    code
}

fn with_output(
    settings: Settings,
    output: OutputArg,
) -> (Settings, Option<mpsc::Receiver<OutputLine>>) {
    let (output, lines) = what_becomes_of(output);
    (settings.output(output), lines)
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
