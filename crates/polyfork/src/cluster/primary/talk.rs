//! Messages of the user's between the primary and its workers, in whatever encoding each of them speaks.

use polyfork_core::{Input, Reason, WorkerId};

use super::{Answer, Primary};
use crate::cluster::SendError;
use crate::cluster::event::{Encoded, Event, Message};
use crate::cluster::outgoing::{Outgoing, Refusal};
use crate::cluster::settings::Ready;

impl Primary {
    pub(super) fn send(&mut self, to: WorkerId, message: &Outgoing, reply: Answer) {
        let outcome = self.push_message(to, message);
        match self.workers.get_mut(&to) {
            Some(w) if outcome.is_ok() && w.running.link.is_full() => {
                w.waiting_senders.push_back(reply);
            }
            _ => {
                // The sender may have given up.
                let _ = reply.send(outcome);
            }
        }
    }

    /// To everybody, or, when somebody speaks what it is not written in yet, to nobody.
    pub(super) fn push_to_all(&mut self, message: &Outgoing) -> Result<(), Refusal> {
        for worker in self.workers.values() {
            if let Some(encoding) = worker.running.link.encoding()
                && !message.is_written_in(encoding)
            {
                return Err(Refusal::NotEncoded);
            }
        }
        let everybody: Vec<_> = self.workers.keys().copied().collect();
        let mut outcome = Ok(());
        for worker in everybody {
            // One that is gone or has no channel is passed over.
            let pushed = self.push_message(worker, message);
            if let Err(Refusal::Error(SendError::Encode(_))) = pushed {
                outcome = pushed;
            }
        }
        outcome
    }

    pub(super) fn push_message(&mut self, to: WorkerId, message: &Outgoing) -> Result<(), Refusal> {
        let w = self.workers.get_mut(&to).ok_or(SendError::NoSuchWorker)?;
        if w.channel_ended || w.disconnected {
            return Err(SendError::Disconnected.into());
        }
        w.running.link.push_user_message(message)?;
        self.tally.message_out(w.who.slot);
        self.flush(to);
        Ok(())
    }

    /// Writes what waits, and releases senders once there is room.
    pub(crate) fn flush(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        w.running.link.flush();
        if !w.running.link.is_full() {
            for waiting in w.waiting_senders.drain(..) {
                // The sender may have given up.
                let _ = waiting.send(Ok(()));
            }
        }
    }

    pub(crate) fn on_user_message(&mut self, worker: WorkerId, message: Encoded) {
        let Some(message) = self.take_measures(worker, message) else { return };
        let Some(w) = self.workers.get(&worker) else { return };
        self.tally.message_in(w.who.slot);
        let (who, ready_by) = (w.who, w.ready_by);
        if ready_by == Ready::Message
            && match &message {
                Encoded::Json(text) => &**text == "\"ready\"",
                Encoded::Advanced(value) => value.as_str() == Some("ready"),
                Encoded::Postcard(_) => false,
            }
        {
            self.became_ready(worker);
        }
        self.emit(Event::Message { who, message: Message(message) });
    }

    /// A worker broke the rules of its channel: it is replaced, and nothing else happens.
    pub(crate) fn protocol_fault(&mut self, worker: WorkerId, what: &str) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        if std::mem::replace(&mut w.fault, true) {
            return;
        }
        let who = w.who;
        // What it has not read goes to others. What it has read is its own now: nobody will believe what it
        // says about it, and nobody else could make sense of the rest.
        self.take_back(worker);
        self.ports.abandon(worker);
        let Some(w) = self.workers.get_mut(&worker) else { return };
        w.running.link.close();
        w.channel_ended = true;
        self.notice("protocol-fault", Some(who), format!("{what}; the worker is replaced"));
        self.feed(Input::Unfit { worker, reason: Reason::ProtocolFault });
        self.told_disconnect(worker);
        self.settle(worker);
    }
}
