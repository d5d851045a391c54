//! What a worker inherits: environment variables and environment data.
//!
//! The rule that surprises: the variables of a thread are a map of its own (or a shared one), not the process's. The
//! process's environment cannot be changed safely once threads run, so it is read once, at first use, and what is set
//! here is seen by workers and by nobody else; give it to a child with `Command::envs`.
//!
//! Behaviour follows: Node `SHARE_ENV`, `worker.setEnvironmentData`.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::sync::{Arc, LazyLock, Mutex};

use polyfork_core::sync::lock;

use super::current;

type Vars = BTreeMap<OsString, OsString>;

/// Environment variables as the threads that share them see them.
#[derive(Clone)]
pub struct Environment(Arc<Mutex<Vars>>);

impl Environment {
    pub(super) fn of(vars: Vars) -> Self {
        Self(Arc::new(Mutex::new(vars)))
    }

    fn of_process() -> Self {
        static OF_PROCESS: LazyLock<Environment> =
            LazyLock::new(|| Environment::of(std::env::vars_os().collect()));
        OF_PROCESS.clone()
    }

    /// A variable.
    pub fn get(&self, name: impl AsRef<OsStr>) -> Option<OsString> {
        lock(&self.0).get(name.as_ref()).cloned()
    }

    /// Sets a variable, for every thread that shares this environment; what it was before.
    pub fn set(&self, name: impl Into<OsString>, value: impl Into<OsString>) -> Option<OsString> {
        lock(&self.0).insert(name.into(), value.into())
    }

    /// Removes a variable; what it was.
    pub fn remove(&self, name: impl AsRef<OsStr>) -> Option<OsString> {
        lock(&self.0).remove(name.as_ref())
    }

    /// A copy of all.
    pub fn vars(&self) -> BTreeMap<OsString, OsString> {
        lock(&self.0).clone()
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Values may be secrets.
        write!(f, "Environment({} variables)", lock(&self.0).len())
    }
}

/// Which environment variables a worker has.
#[derive(Debug, Clone, Default)]
pub enum Env {
    /// A copy of those of the thread that starts it.
    #[default]
    Copy,
    /// The same as the thread that starts it: changes are seen both ways (Node: `SHARE_ENV`).
    Share,
    /// Exactly these.
    Own(BTreeMap<OsString, OsString>),
}

impl Env {
    pub(super) fn for_worker(self) -> Environment {
        match self {
            Env::Copy => Environment::of(env().vars()),
            Env::Share => env(),
            Env::Own(vars) => Environment::of(vars),
        }
    }
}

/// The environment variables of this thread: a worker's own, and outside of workers those the process began with.
pub fn env() -> Environment {
    current::with(|current| current.map(|current| current.env.clone()))
        .unwrap_or_else(Environment::of_process)
}

type Value = Arc<dyn Any + Send + Sync>;

/// The data of one thread. Workers begin with a copy of the map; the values are shared.
#[derive(Clone, Default)]
pub(super) struct Data(Arc<Mutex<HashMap<String, Value>>>);

impl Data {
    pub(super) fn inherited() -> Self {
        Self(Arc::new(Mutex::new(lock(&own_data().0).clone())))
    }
}

fn own_data() -> Data {
    static OUTSIDE: LazyLock<Data> = LazyLock::new(Data::default);
    current::with(|current| current.map(|current| current.data.clone()))
        .unwrap_or_else(|| OUTSIDE.clone())
}

/// Sets a value that every worker started by this thread from now on inherits, and its workers in turn (Node:
/// `setEnvironmentData`). Workers that run already do not see it.
pub fn set_environment_data<T: Any + Send + Sync>(key: impl Into<String>, value: T) {
    let replaced = lock(&own_data().0).insert(key.into(), Arc::new(value));
    // Foreign code, so not with the lock held.
    drop(replaced);
}

/// Removes a value for workers that are started from now on.
pub fn remove_environment_data(key: &str) {
    let removed = lock(&own_data().0).remove(key);
    drop(removed);
}

/// A value that this thread set or inherited, if it is of type `T` (Node: `getEnvironmentData`).
pub fn get_environment_data<T: Any + Send + Sync>(key: &str) -> Option<Arc<T>> {
    let value = lock(&own_data().0).get(key).cloned()?;
    value.downcast().ok()
}
