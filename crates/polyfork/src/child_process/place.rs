//! Thread or process, by one word: an entry is started in either, and its handle is the same.
//!
//! | | thread | process |
//! | --- | --- | --- |
//! | starts in | tens of microseconds | some milliseconds |
//! | a message | moves, or is written where it is sent by reference | is written, sent and read |
//! | a crash (stack overflow, abort, bad foreign code) | ends the whole program | is an exit with a signal |
//! | told to end and deaf | goes on | is killed |
//!
//! The rule that surprises: both are asked for the same of their types. What could not cross to a process does not
//! compile for a thread either, so that the choice stays open.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::entry::Entry;
use super::fork::{ForkError, start};
use super::port::{Arrival, Framing, Packet, Port};
use super::{Child, Command, Exit, PortError, Signal};
use crate::channel::{Encoding, Limits};
use crate::process::{FORK_ENTRY, FORK_EVENTS};
use crate::worker_threads::{
    Life, NotListening, Place, WorkerContext, WorkerError, WorkerExit, WorkerOptions,
    WorkerSpawnError,
};

/// How many messages wait for a thread, in each direction, before sending waits.
const THREAD_QUEUE: usize = 1024;

/// Why an entry could not be started. Nothing of it runs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// As a process.
    #[error(transparent)]
    Process(#[from] ForkError),
    /// As a thread.
    #[error(transparent)]
    Thread(#[from] WorkerSpawnError),
}

/// What happens to an entry that was started, in this order: once online, any number of messages, at most one error, one
/// exit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryEvent<Out> {
    /// Its function is about to run. A process that ends before has no such event.
    Online,
    /// A message it sent.
    Message(Out),
    /// It went wrong.
    Error(WorkerError),
    /// It has ended.
    Exit(EntryExit),
}

/// How an entry ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryExit {
    /// Its code, unless a signal ended its process. 0 for `Ok`, 1 after an error or a panic.
    pub code: Option<i32>,
    /// The signal that ended its process.
    pub signal: Option<Signal>,
    /// What went wrong, if something did and could be told.
    pub error: Option<WorkerError>,
}

impl EntryExit {
    /// Whether it ended with code 0.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }

    fn of_process(exit: Exit, told: Option<WorkerError>, asked: bool) -> Self {
        let killed = exit.signal.filter(|_| !asked);
        let error = told.or_else(|| killed.map(|signal| WorkerError::Killed(signal.to_string())));
        Self { code: exit.code, signal: exit.signal, error }
    }

    fn of_thread(exit: WorkerExit) -> Self {
        Self { code: Some(exit.code), signal: None, error: exit.error }
    }
}

/// An entry that runs, in a thread or in a process. What it sends is received here, so the types have changed places.
///
/// ```no_run
/// use polyfork::child_process::{Entry, EntryEvent, EntryResult, Place, Port, run_entries};
///
/// const DOUBLE: Entry<u64, u64> = Entry::new("double", |port| Box::pin(double(port)));
///
/// async fn double(mut port: Port<u64, u64>) -> EntryResult {
///     while let Some(number) = port.recv().await? {
///         port.post_message(number * 2).await?;
///     }
///     Ok(())
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn runs() -> Result<(), Box<dyn std::error::Error>> {
/// for place in [Place::Thread, Place::Process] {
///     let mut started = DOUBLE.start(place)?;
///     started.port.post_message(21).await?;
///     assert_eq!(started.next_event().await?, Some(EntryEvent::Online));
///     assert_eq!(started.next_event().await?, Some(EntryEvent::Message(42)));
///     started.port.disconnect().await?;
///     assert!(started.join().await?.success());
/// }
/// # Ok(()) }
/// # fn main() { run_entries(&[&DOUBLE]); runs().unwrap() }
/// ```
///
/// What cannot be written cannot be sent to a process, and the compiler says so:
///
/// ```compile_fail,E0277
/// use polyfork::child_process::{Entry, Place};
/// use polyfork::worker_threads::MessagePort;
///
/// // A port is of this process.
/// const GIVE: Entry<MessagePort<u8, u8>, ()> = Entry::new("give", |_| Box::pin(async { Ok(()) }));
/// let started = GIVE.start(Place::Process);
/// ```
///
/// ```compile_fail,E0277
/// # use polyfork::child_process::{Entry, Place};
/// # use polyfork::worker_threads::MessagePort;
/// # const GIVE: Entry<MessagePort<u8, u8>, ()> = Entry::new("give", |_| Box::pin(async { Ok(()) }));
/// // Nor to a thread, so that the word can be changed.
/// let started = GIVE.start(Place::Thread);
/// ```
///
/// What is for threads alone may carry anything that is `Send`:
///
/// ```
/// use polyfork::worker_threads::{MessagePort, Worker, WorkerContext};
///
/// let worker = Worker::spawn_async(async |mut parent: WorkerContext<MessagePort<u8, u8>, ()>| {
///     while let Some(port) = parent.receive().await {
///         port.try_post_message(1).ok();
///     }
/// })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Dropping
/// As [`Child`] and [`Worker`](crate::worker_threads::Worker): it goes on, and sees its port end.
#[derive(Debug)]
pub struct Started<In, Out> {
    /// The port to it. Messages received here are not told as events any more.
    pub port: Port<Out, In>,
    at: At,
    told: Told,
    /// What it told of its end, before it ended.
    error: Option<WorkerError>,
    /// It was told to end, so that a signal is no surprise.
    asked: bool,
}

enum At {
    Thread(Life),
    Process(Child),
}

/// Which events were told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Nothing,
    Online,
    Error,
    Exit,
}

impl<In, Out> Entry<In, Out>
where
    In: Serialize + DeserializeOwned + Send + 'static,
    Out: Serialize + DeserializeOwned + Send + 'static,
{
    /// Starts the entry in a thread or in a process. Must be called inside a tokio runtime for a process.
    ///
    /// # Errors
    /// [`StartError`]; nothing runs then.
    pub fn start(&self, place: Place) -> Result<Started<In, Out>, StartError> {
        // The file that was started, also when it has been replaced or moved since.
        self.start_with(place, &mut Command::new("/proc/self/exe"))
    }

    /// [`start`](Self::start) with everything that can be said about a child, if it is one. The command's program must
    /// be one that has this entry; `/proc/self/exe` is this one.
    ///
    /// # Errors
    /// [`StartError`]; nothing runs then.
    pub fn start_with(
        &self,
        place: Place,
        command: &mut Command,
    ) -> Result<Started<In, Out>, StartError> {
        let (port, at) = match place {
            Place::Thread => self.as_thread()?,
            Place::Process => self.as_process(command)?,
        };
        Ok(Started { port, at, told: Told::Nothing, error: None, asked: false })
    }

    fn as_thread(&self) -> Result<(Port<Out, In>, At), WorkerSpawnError> {
        let run = self.run;
        let options = WorkerOptions::new().name(self.name).queue(THREAD_QUEUE);
        let worker =
            options.spawn_async(async move |context: WorkerContext<Packet<In>, Packet<Out>>| {
                run(Port::of_thread(context.into_port())).await
            })?;
        let (port, life) = worker.into_parts();
        Ok((Port::of_thread(port), At::Thread(life)))
    }

    fn as_process(&self, command: &mut Command) -> Result<(Port<Out, In>, At), ForkError> {
        command.env(FORK_ENTRY, self.name).env(FORK_EVENTS, "1");
        let forked = start(command, Encoding::Native, Limits::default())?;
        Ok((Port::framed(forked.channel, Framing::Parent), At::Process(forked.child)))
    }
}

impl<In, Out> Started<In, Out> {
    /// Where it runs.
    pub fn place(&self) -> Place {
        match &self.at {
            At::Thread(_) => Place::Thread,
            At::Process(_) => Place::Process,
        }
    }

    /// Its process id, if it is a process.
    pub fn pid(&self) -> Option<u32> {
        match &self.at {
            At::Thread(_) => None,
            At::Process(child) => Some(child.pid()),
        }
    }

    /// Its worker id, if it is a thread.
    pub fn thread_id(&self) -> Option<u64> {
        match &self.at {
            At::Thread(life) => Some(life.id()),
            At::Process(_) => None,
        }
    }

    /// Asks it to end, and waits for that, at most for `limit`.
    ///
    /// A thread is dropped where it awaits; its code is then 1. A process gets SIGTERM, and SIGKILL after the limit, so
    /// that it always ends.
    ///
    /// # Cancel safety
    /// Asked is asked.
    ///
    /// # Errors
    /// [`NotListening`]: it is a thread that does not await, and still runs.
    ///
    /// # Panics
    /// Outside of a tokio runtime with time enabled.
    pub async fn terminate(&mut self, limit: Duration) -> Result<EntryExit, NotListening> {
        self.asked = true;
        match &mut self.at {
            At::Thread(life) => life.terminate(limit).await.map(EntryExit::of_thread),
            At::Process(child) => {
                // Gone, or not ours to signal any more: waiting tells.
                let _sent = child.kill(Signal::TERM);
                let ended = match tokio::time::timeout(limit, child.wait()).await {
                    Ok(ended) => ended,
                    Err(_elapsed) => {
                        let _sent = child.kill(Signal::KILL);
                        child.wait().await
                    }
                };
                Ok(EntryExit::of_process(ended.unwrap_or_default(), self.error.clone(), true))
            }
        }
    }
}

impl<In, Out> Started<In, Out>
where
    In: Serialize,
    Out: DeserializeOwned,
{
    /// The next event; `None` after [`EntryEvent::Exit`].
    ///
    /// # Cancel safety
    /// No event is lost.
    ///
    /// # Errors
    /// [`PortError`], as an event among the others: a message that cannot be read, or a child that breaks the protocol.
    pub async fn next_event(&mut self) -> Result<Option<EntryEvent<Out>>, PortError> {
        if let (Told::Nothing, At::Thread(life)) = (self.told, &self.at) {
            life.begun().await;
            self.told = Told::Online;
            return Ok(Some(EntryEvent::Online));
        }
        while matches!(self.told, Told::Nothing | Told::Online) {
            match self.port.arrival().await? {
                Some(Arrival::Online) if self.told == Told::Nothing => {
                    self.told = Told::Online;
                    return Ok(Some(EntryEvent::Online));
                }
                Some(Arrival::Online) => {}
                Some(Arrival::Message(message, _)) => {
                    return Ok(Some(EntryEvent::Message(message)));
                }
                Some(Arrival::Error(error)) => self.error = Some(error),
                None => {
                    let exit = self.ended().await;
                    self.told = Told::Error;
                    if let Some(error) = exit.error {
                        return Ok(Some(EntryEvent::Error(error)));
                    }
                }
            }
        }
        if self.told == Told::Exit {
            return Ok(None);
        }
        let exit = self.ended().await;
        self.told = Told::Exit;
        Ok(Some(EntryEvent::Exit(exit)))
    }

    /// Waits for its end, and drops the messages that come until then.
    ///
    /// # Cancel safety
    /// What was dropped is lost; the end is told again to who asks later.
    ///
    /// # Errors
    /// [`PortError`]: the child breaks the protocol; a message that cannot be read is dropped.
    pub async fn join(&mut self) -> Result<EntryExit, PortError> {
        while self.told != Told::Exit {
            match self.next_event().await {
                Ok(_) | Err(PortError::Decode(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.ended().await)
    }

    async fn ended(&mut self) -> EntryExit {
        match &mut self.at {
            At::Thread(life) => EntryExit::of_thread(life.ended().await),
            At::Process(child) => {
                // A runtime that ends does not tell; then nothing is known.
                let exit = child.wait().await.unwrap_or_default();
                EntryExit::of_process(exit, self.error.clone(), self.asked)
            }
        }
    }
}

impl fmt::Debug for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            At::Thread(life) => write!(f, "Thread({})", life.id()),
            At::Process(child) => write!(f, "Process({})", child.pid()),
        }
    }
}
