//! The configuration of an app that runs: read again at every reload, and told to whoever compares.
//!
//! The surprising rule: what was read counts only once a reload with it has succeeded. Until then, and if it fails, the app
//! is what it was, and so is what it tells. What a reload cannot take over stays as it was told before, and is named.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::renew::{Renewal, Times};
use super::wanted::{Digest, Takes, Wanted};
use crate::args::run::RunArgs;
use crate::ledger::Verdict;
use crate::words;

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
    /// Keys that differ by what was read last, and that no reload changes.
    left: Vec<String>,
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
        let taken =
            Taken { now: Digest::of(app, profile.as_deref(), salt), next: None, left: Vec::new() };
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
        let taken = Mutex::new(Taken { now, next: None, left: Vec::new() });
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
        let changes = salt_of.changes(&wanted, profile.as_deref());
        let fixed = changes.into_iter().filter(|change| change.takes == Takes::Replace);
        let taken = &mut *self.taken();
        taken.left = fixed.map(|change| change.key).collect();
        taken.next = Some((next, Times::of(&args)));
        Ok(args)
    }

    /// Keys that the file has otherwise than what runs: the last reload could not take them over.
    pub(crate) fn left(&self) -> Vec<String> {
        self.taken().left.clone()
    }

    /// The same for people, with what to do about it.
    pub(crate) fn left_told(&self) -> Option<String> {
        let left = self.left();
        let profile = self.0.profile.as_ref();
        let profile = profile.map_or(String::new(), |name| format!("--profile {name} "));
        (!left.is_empty()).then(|| {
            words::harmless(&format!(
                "left as it was, since no reload can change it: {}; `polyfork apply --replace {profile}{}`, or a stop \
                 and a start, takes that over",
                left.join(", "),
                self.0.file.display()
            ))
        })
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
