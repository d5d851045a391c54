//! An app that another image of this process has left: it is taken up, and goes on as if nothing had been.
//!
//! The state is found to fit together by `upgrade` before; how this image was put in its place is in `replacing`.
//!
//! The order: descriptors are taken out of the bag by whoever they belong to, the cluster first. What is left in the bag is
//! closed before anything else happens.

use std::cell::{Cell, RefCell};
use std::io;
use std::sync::Arc;

use polyfork::cluster::upgrade::{ResumeError, Unpacking};
use polyfork::cluster::{Cluster, Event, Ready, Settings};

use super::prepare::read_again;
use super::start::{on_this_thread, what_becomes_of};
use super::{After, Around, Background, Measured, Place, Watch};
use crate::background::{self, Starter};
use crate::config::live::Live;
use crate::config::renew::Renewal;
use crate::control::book::About;
use crate::control::folder::Claim;
use crate::control::server::Control;
use crate::exit::Code;
use crate::logs::folder as log_folder;
use crate::logs::writer::Writer;
use crate::manager::{self, Manager};
use crate::metrics::server::{self as metrics_server, Door};
use crate::upgrade::state::{AppState, BackgroundState};
use crate::upgrade::{self, Left};

/// Goes on with an app that another image of this process has left.
pub(crate) fn go_on(left: Left) -> Code {
    let adopted = left.open().and_then(|state| {
        let unpacking = Unpacking::adopt(&state.descriptors)?;
        Ok((state, unpacking))
    });
    let (state, unpacking) = match adopted {
        Ok(adopted) => adopted,
        Err(error) => return left.go_back(&error),
    };
    // What is executed by its descriptor is called after its number.
    let _ = rustix::thread::set_name(c"polyfork");
    if state.keeps_rights {
        upgrade::rights_are_ours_alone();
    }
    let outcome = on_this_thread(go_on_with(state, unpacking, left.back));
    let outcome = outcome.map_err(ResumeError::from).flatten();
    outcome.unwrap_or_else(|error| {
        // Everything was found to fit before; this is a machine without memory or descriptors. Workers finish and leave.
        crate::say(io::stderr(), &format!("polyfork: cannot go on: {error}\n"));
        Code::Unexpected
    })
}

async fn go_on_with(
    state: AppState,
    mut left: Unpacking,
    back: Option<String>,
) -> Result<Code, ResumeError> {
    let unpacking = &mut left;
    let show = state.show;
    let (output, lines) = what_becomes_of(show.output);
    let live = state.live.map(Live::back);
    let store = state.manager.as_ref().and_then(|_| manager::store());
    let source = live.clone();
    let anew = |settings: Settings| {
        let settings = settings.output(output);
        let settings = store.into_iter().fold(settings, Settings::store);
        source
            .into_iter()
            .fold(settings, |settings, live| settings.reload_from(move || read_again(&live)))
    };
    let cluster = Cluster::resume(&state.cluster, unpacking, anew)?;
    let claim = state.claim.map(|claim| Claim::unpack(claim, unpacking)).transpose()?;
    let background = state.background.map(|background| Background::unpack(background, unpacking));
    let background = background.transpose()?;
    let losses = background.as_ref().map(|background| Arc::clone(&background.logs.losses));
    let (mut control, mut asker) = (None, None);
    if let Some(state) = state.control {
        let file = claim.as_ref().map(Claim::state_file).transpose()?;
        let known = (losses, live.clone());
        let (there, wishes, waits) = Control::unpack(state, unpacking, file, &cluster, known)?;
        (control, asker) = (Some((there, wishes)), waits);
    }
    let serving = match (state.metrics, &control) {
        (Some(door), Some((control, _))) => {
            Some(metrics_server::serve(Door::unpack(door, unpacking)?, control)?)
        }
        _ => None,
    };
    // What it shares would stay open with it: connections that their workers have had and closed.
    drop(left);
    let around = Around { control, serving, manager: Manager::back(state.manager) };
    // The binary that asked for this one is what runs, when that one gave everything back.
    let own = if back.is_some() { upgrade::own_binary() } else { state.binary };
    let place = Place {
        binary: Some(own),
        claim,
        about: About { live, ..state.about },
        background,
        renewal: Renewal::at(state.times, state.change_seen),
        measured: Measured::default(),
        // That explains a start which failed; this one did not.
        ready: Ready::default(),
    };
    let mut watch = Watch::new(state.workers, show, place, around, state.ledger);
    watch.told_lost = Cell::new(state.told_lost);
    watch.after = RefCell::new(Some(After {
        from: state.polyfork,
        began: state.began.0,
        rested: state.rests.0,
        trial: state.trial,
        descriptors: state.descriptors.len(),
        asker,
        back,
    }));
    Ok(watch.run(&cluster, lines, |_: &Event| ()).await.code)
}

impl Background {
    fn unpack(
        state: BackgroundState,
        unpacking: &mut Unpacking,
    ) -> Result<Background, ResumeError> {
        let BackgroundState { starter, logs, logs_path, format, rotation, lost } = state;
        let starter = Starter::unpack(starter, unpacking)?;
        let folder = log_folder::Folder::of(unpacking.take(logs)?, logs_path);
        background::write_panics_to(folder.again()?);
        let logs = Writer::go_on(folder, format, rotation, lost)?;
        Ok(Background { starter, logs })
    }
}
