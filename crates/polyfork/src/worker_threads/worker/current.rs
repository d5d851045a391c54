//! Which worker a thread is.

use std::cell::RefCell;
use std::sync::Arc;

use super::control::Control;
use super::env::{Data, Environment};

/// What code in a worker can ask without a handle.
pub(super) struct Current {
    pub(super) control: Arc<Control>,
    pub(super) env: Environment,
    pub(super) data: Data,
}

thread_local! {
    static CURRENT: RefCell<Option<Current>> = const { RefCell::new(None) };
}

/// Makes this thread a worker.
pub(super) fn become_worker(current: Current) {
    CURRENT.with(|cell| *cell.borrow_mut() = Some(current));
}

/// Lets go of what the worker inherited. Left to the thread's own end, a panic of a destructor would abort the process.
pub(super) fn leave() {
    let left = CURRENT.with(|cell| cell.borrow_mut().take());
    drop(left);
}

/// Looks at the worker that this thread is. While the thread's own data is being destroyed, it is none any more.
pub(super) fn with<T>(look: impl FnOnce(Option<&Current>) -> T) -> T {
    let mut look = Some(look);
    let seen = CURRENT.try_with(|cell| {
        let look = look.take()?;
        Some(look(cell.borrow().as_ref()))
    });
    match (seen, look) {
        (Ok(Some(value)), _) => value,
        (_, Some(look)) => look(None),
        _ => unreachable!("it was either called or not"),
    }
}

/// Whether this thread is not a worker (Node: `isMainThread`). Threads made by other means count as main.
pub fn is_main_thread() -> bool {
    with(|current| current.is_none())
}

/// The id of this worker; 0 outside of workers (Node: `threadId`). Ids increase and are never used again.
pub fn thread_id() -> u64 {
    with(|current| current.map_or(0, |current| current.control.id))
}

/// The name of this worker, if it has one (Node: `threadName`).
pub fn thread_name() -> Option<String> {
    with(|current| current.and_then(|current| current.control.name.clone()))
}
