//! What an app leaves to the next image of its primary, beyond what the library leaves.
//!
//! The descriptors it needs are listed once, for all parts together. Arguments and environment are not in it: exec passes them
//! on as they are, standard input too. What was set for workers (`--env`) is, as it is in this process' memory; nobody else can open it.

use std::path::PathBuf;

use polyfork::cluster::Cluster;
use polyfork::cluster::upgrade::{
    self, Descriptors, Moment, Name as Carried, ResumeError, StateError,
};
use serde::{Deserialize, Serialize};

use crate::config::live::LiveState;
use crate::config::renew::Times;
use crate::control::book::About;
use crate::control::folder::ClaimState;
use crate::control::server::Control;
use crate::control::server::carry::ControlState;
use crate::ledger::Ledger;
use crate::logs::line::Format;
use crate::logs::writer::{Lost, Rotation};
use crate::manager::Seen;
use crate::metrics::server::DoorState;
use crate::run::Show;

/// All of it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct AppState {
    pub(crate) descriptors: Descriptors,
    /// The release that wrote it.
    pub(crate) polyfork: String,
    /// The file of the binary that is to take over.
    pub(crate) binary: PathBuf,
    pub(crate) began: Moment,
    /// Since when the cluster rests.
    pub(crate) rests: Moment,
    /// The process of the trial, to be collected.
    pub(crate) trial: u32,
    pub(crate) cluster: Vec<u8>,
    pub(crate) name: String,
    pub(crate) workers: u32,
    pub(crate) about: About,
    pub(crate) claim: Option<ClaimState>,
    pub(crate) control: Option<ControlState>,
    pub(crate) background: Option<BackgroundState>,
    pub(crate) ledger: Ledger,
    pub(crate) told_lost: bool,
    pub(crate) show: Show,
    /// Its configuration, if it has one.
    pub(crate) live: Option<LiveState>,
    /// When it reloads by itself.
    pub(crate) times: Times,
    /// A file has changed, and the reload for it has not begun.
    pub(crate) change_seen: bool,
    /// What a service manager was told, if there is one.
    pub(crate) manager: Option<Seen>,
    /// Where metrics are served.
    pub(crate) metrics: Option<DoorState>,
    /// Rights were made to outlast exec, and are not for workers.
    pub(crate) keeps_rights: bool,
}

/// What an app in the background has.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct BackgroundState {
    pub(crate) starter: Option<Carried>,
    pub(crate) logs: Carried,
    pub(crate) logs_path: PathBuf,
    pub(crate) format: Format,
    pub(crate) rotation: Rotation,
    pub(crate) lost: Lost,
}

impl AppState {
    /// In its envelope.
    ///
    /// # Errors
    /// When it cannot be written: a path that is no text, for example.
    pub(crate) fn seal(&self) -> Result<Vec<u8>, String> {
        let inside = postcard::to_stdvec(self).map_err(|error| error.to_string())?;
        upgrade::seal_state(&inside).map_err(|error| error.to_string())
    }

    /// Out of its envelope, with everything found to fit together.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn read(sealed: &[u8]) -> Result<AppState, ResumeError> {
        let inside = upgrade::open_state(sealed)?;
        let wrong = |text: String| ResumeError::from(StateError::Inside(text));
        let (state, rest): (AppState, _) =
            postcard::take_from_bytes(inside).map_err(|error| wrong(error.to_string()))?;
        if !rest.is_empty() {
            return Err(wrong("there is more than there should be".to_owned()));
        }
        Cluster::check_state(&state.cluster)?;
        if let Some(control) = &state.control {
            Control::book_of(control)?;
            Control::meter_of(control)?;
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use polyfork_wire::state::shape;

    use super::*;

    #[test]
    fn fault_37_the_shape_of_the_state_belongs_to_its_version() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/upgrade/shape.txt");
        shape::hold(&shape::of::<AppState>(), &file);
    }
}
