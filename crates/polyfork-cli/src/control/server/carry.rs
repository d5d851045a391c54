//! The control plane on its way to the next image of its process: clients come to rest, and are served on there.
//!
//! When that happens, and what else goes along, is decided in `run::replacing`.
//!
//! The order: nobody new is let in, and who is sending waits with what he has sent. Who is being answered is waited for.
//! Who listens to events rests last, once he knows the last of them.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use polyfork::cluster::Cluster;
use polyfork::cluster::upgrade::{Name as Carried, Packing, ResumeError, StateError, Unpacking};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::clients::admit;
use super::{Control, LISTENING, Rest, Rested, Wish, lock};
use crate::config::live::Live;
use crate::control::book::Book;
use crate::control::folder::StateFile;
use crate::logs::writer::Losses;
use crate::metrics::Meter;

/// Between two looks at whether clients rest.
const REST_STEP: Duration = Duration::from_millis(1);

/// A client, as it is carried to the next image of this process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ClientState {
    stream: Carried,
    buffer: Vec<u8>,
    listens: bool,
}

impl Rested {
    fn pack(&self, packing: &mut Packing) -> io::Result<ClientState> {
        let Rested { stream, buffer, listens } = self;
        let stream = packing.name(stream.as_fd())?;
        Ok(ClientState { stream, buffer: buffer.clone(), listens: *listens })
    }

    fn unpack(state: ClientState, unpacking: &mut Unpacking) -> Result<Rested, ResumeError> {
        let ClientState { stream, buffer, listens } = state;
        let stream = StdStream::from(unpacking.take(stream)?);
        Ok(Rested { stream: UnixStream::from_std(stream)?, buffer, listens })
    }
}

/// The control plane, as it is carried to the next image of this process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ControlState {
    /// None for an app that no command can reach.
    socket: Option<Carried>,
    book: Vec<u8>,
    refused: u64,
    meter: Vec<u8>,
    clients: Vec<ClientState>,
    asker: Option<ClientState>,
}

impl Control {
    /// Takes no new client, and lets those rest that ask nothing. Who is being answered is waited for.
    ///
    /// # Errors
    /// When that is not done within the time.
    pub(crate) async fn rest(&self, limit: Duration) -> Result<(), &'static str> {
        if let Some(accepting) = lock(&self.0.accepting).take() {
            accepting.abort();
        }
        self.0.rest.send_replace(Rest::Askers);
        let rest = async {
            while !lock(&self.0.clients).iter().all(|client| client.is(LISTENING)) {
                tokio::time::sleep(REST_STEP).await;
            }
        };
        timeout(limit, rest).await.map_err(|_| "somebody waits for what he asked of it")
    }

    /// Lets those rest that are told what happens, once they know it.
    ///
    /// # Errors
    /// When they do not take it within the time.
    pub(crate) async fn rest_all(&self, limit: Duration) -> Result<(), &'static str> {
        self.0.rest.send_replace(Rest::Everybody);
        let rest = async {
            while !lock(&self.0.clients).is_empty() {
                tokio::time::sleep(REST_STEP).await;
            }
        };
        timeout(limit, rest).await.map_err(|_| "who listens to events does not read them")
    }

    /// Everybody is served as before.
    pub(crate) fn go_on(&self) {
        if self.0.rest.send_replace(Rest::Nobody) == Rest::Nobody {
            return;
        }
        for client in std::mem::take(&mut *lock(&self.0.rested)) {
            admit(self, client);
        }
        self.accept();
    }

    /// Writes down what is known and who is there, all at rest.
    ///
    /// # Errors
    /// The system's, or what cannot be written.
    pub(crate) fn pack(
        &self,
        asker: Option<&Rested>,
        packing: &mut Packing,
    ) -> io::Result<ControlState> {
        let clients = lock(&self.0.rested);
        let clients = clients.iter().map(|client| client.pack(packing));
        let clients = clients.collect::<io::Result<_>>()?;
        let asker = asker.map(|asker| asker.pack(packing)).transpose()?;
        let book = postcard::to_stdvec(&*self.book()).map_err(io::Error::other)?;
        let meter = self.0.meter.pack()?;
        let socket = self.0.socket.as_ref().map(|socket| packing.name(socket.as_fd()));
        let (socket, refused) = (socket.transpose()?, self.refused());
        Ok(ControlState { socket, book, refused, meter, clients, asker })
    }

    /// The book in what was written down.
    ///
    /// # Errors
    /// When it makes no sense.
    pub(crate) fn book_of(state: &ControlState) -> Result<Book, ResumeError> {
        postcard::from_bytes(&state.book)
            .map_err(|error| StateError::Inside(format!("the book of the app: {error}")).into())
    }

    /// What is remembered of measurements, in what was written down.
    ///
    /// # Errors
    /// When it makes no sense.
    pub(crate) fn meter_of(state: &ControlState) -> Result<Meter, ResumeError> {
        Meter::unpack(&state.meter)
            .map_err(|error| StateError::Inside(format!("what was measured: {error}")).into())
    }

    /// Answers on, for the image before this one. Also gives who asked for this, if somebody did.
    ///
    /// # Errors
    /// When a descriptor is missing, or the system cannot wait for one.
    pub(crate) fn unpack(
        state: ControlState,
        unpacking: &mut Unpacking,
        file: Option<StateFile>,
        cluster: &Cluster,
        (losses, live): (Option<Arc<Losses>>, Option<Live>),
    ) -> Result<(Control, mpsc::Receiver<Wish>, Option<Rested>), ResumeError> {
        let book = Control::book_of(&state)?.with(losses, live);
        let meter = Control::meter_of(&state)?;
        let ControlState { socket, book: _, refused, meter: _, clients, asker } = state;
        let socket = socket.map(|socket| unpacking.take(socket)).transpose()?;
        let clients = clients.into_iter().map(|client| Rested::unpack(client, unpacking));
        let clients: Vec<Rested> = clients.collect::<Result<_, _>>()?;
        let asker = asker.map(|asker| Rested::unpack(asker, unpacking)).transpose()?;
        let (control, wished) = match socket.zip(file) {
            Some((socket, file)) => {
                Control::start(StdListener::from(socket), file, cluster, book, meter)?
            }
            None => Control::quiet(cluster, book, meter),
        };
        control.0.refused.store(refused, Ordering::Relaxed);
        for client in clients {
            admit(&control, client);
        }
        Ok((control, wished, asker))
    }
}
