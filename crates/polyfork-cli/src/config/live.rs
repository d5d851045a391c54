//! The configuration of an app that runs: read again at every reload, and told to whoever compares.
//!
//! The surprising rule: what was read counts only once a reload with it has succeeded. Until then, and if it fails, the app
//! is what it was, and so is what it tells. What a reload cannot take over stays as it was told before.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::renew::{Renewal, Times};
use super::wanted::{Digest, Wanted};
use crate::args::run::RunArgs;
use crate::ledger::Verdict;

/// Where options came from.
#[derive(Clone)]
pub(crate) struct Live(Arc<Inner>);

struct Inner {
    verb: String,
    file: PathBuf,
    app: String,
    profile: Option<String>,
    /// The options of the command line, which count more than the file's.
    words: Vec<OsString>,
    taken: Mutex<Taken>,
}

struct Taken {
    now: Digest,
    next: Option<(Digest, Times)>,
}

/// A configuration as it is carried to the next image of the primary. What was read and has not taken effect is not.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LiveState {
    verb: String,
    file: PathBuf,
    app: String,
    profile: Option<String>,
    words: Vec<OsString>,
    now: Digest,
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.0.app, self.0.file.display())
    }
}

impl Live {
    pub(crate) fn new(
        verb: &'static str,
        app: &Wanted,
        profile: Option<String>,
        words: Vec<OsString>,
    ) -> Live {
        let salt = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), &app.name);
        let taken = Taken { now: Digest::of(app, profile.as_deref(), salt), next: None };
        let (file, name) = (app.file.clone(), app.name.clone());
        let verb = verb.to_owned();
        Live(Arc::new(Inner { verb, file, app: name, profile, words, taken: Mutex::new(taken) }))
    }

    pub(crate) fn state(&self) -> LiveState {
        let Inner { verb, file, app, profile, words, taken: _ } = &*self.0;
        LiveState {
            verb: verb.clone(),
            file: file.clone(),
            app: app.clone(),
            profile: profile.clone(),
            words: words.clone(),
            now: self.digest(),
        }
    }

    pub(crate) fn back(state: LiveState) -> Live {
        let LiveState { verb, file, app, profile, words, now } = state;
        let taken = Mutex::new(Taken { now, next: None });
        Live(Arc::new(Inner { verb, file, app, profile, words, taken }))
    }

    fn taken(&self) -> std::sync::MutexGuard<'_, Taken> {
        self.0.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it was started with, or reloaded with last.
    pub(crate) fn digest(&self) -> Digest {
        self.taken().now.clone()
    }

    /// Options as the file has them now.
    ///
    /// # Errors
    /// What is wrong with the file, or that the app is not in it any more.
    pub(crate) fn read_again(&self) -> Result<RunArgs, Verdict> {
        let Inner { verb, file, app, profile, words, .. } = &*self.0;
        let wanted = super::one_of(file, profile.as_deref(), app)?;
        let args = super::layered(verb, words, &wanted)?.run;
        let salt_of = self.digest();
        let next = salt_of.like(&wanted, profile.as_deref());
        self.taken().next = Some((next, Times::of(&args)));
        Ok(args)
    }

    /// What was read last has taken effect.
    pub(crate) fn commit(&self, renewal: &Renewal) {
        let next = self.taken().next.take();
        if let Some((digest, times)) = next {
            let taken = &mut *self.taken();
            taken.now = digest.but_fixed_as(&taken.now);
            renewal.set(times);
        }
    }
}
