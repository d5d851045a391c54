//! Gives received descriptors to the envelopes they came with.
//!
//! The reader calls [`Inbox::push`] for every descriptor of a `recvmsg`, feeds the bytes of the same call
//! to the line decoder, and calls [`Inbox::claim`] for each envelope it finds. Once the decoder has no
//! further line, [`Inbox::settle`] gives back what belongs to no message, to be closed at once.
//!
//! The rule of pairing: the n-th descriptor belongs to the n-th envelope. Node attaches it to the first byte
//! of the line, other senders to any byte of it, so a descriptor may be held only while a line is
//! incomplete. A descriptor that came with a plain message therefore never shifts later pairs.
//!
//! Behaviour follows: unix(7), `SCM_RIGHTS`; Node `lib/internal/child_process.js`.

use std::collections::VecDeque;

use crate::{Limits, ProtocolError};

/// Descriptors that were received and not yet claimed; `D` is an owned descriptor.
#[derive(Debug)]
pub struct Inbox<D> {
    waiting: VecDeque<D>,
    limit: usize,
    surplus: u64,
}

impl<D> Inbox<D> {
    /// An empty inbox that holds at most [`Limits::max_fds_queued`].
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { waiting: VecDeque::new(), limit: limits.max_fds_queued, surplus: 0 }
    }

    /// Adds a descriptor that was received. To be called before the bytes of the same read are parsed.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::SurplusDescriptor`] when the inbox is full; the descriptor is dropped, which
    /// closes it, and counted.
    pub fn push(&mut self, descriptor: D) -> Result<(), ProtocolError> {
        if self.waiting.len() >= self.limit {
            self.surplus += 1;
            return Err(ProtocolError::SurplusDescriptor);
        }
        self.waiting.push_back(descriptor);
        Ok(())
    }

    /// The descriptor of the envelope that was just parsed.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::MissingDescriptor`] when none came with it: answer with a NACK, or give the
    /// channel up.
    pub fn claim(&mut self) -> Result<D, ProtocolError> {
        self.waiting.pop_front().ok_or(ProtocolError::MissingDescriptor)
    }

    /// Takes out what no message can claim any more and counts it. To be called when every complete line
    /// was parsed; `partial_line` says whether the stream stands inside one
    /// ([`LineDecoder::has_partial`](super::line::LineDecoder::has_partial)), which may own one
    /// descriptor.
    ///
    /// The descriptors are removed even if the iterator is not used.
    pub fn settle(&mut self, partial_line: bool) -> impl Iterator<Item = D> + use<D> {
        let keep = usize::from(partial_line).min(self.waiting.len());
        let surplus = self.waiting.split_off(keep);
        self.surplus += surplus.len() as u64;
        surplus.into_iter()
    }

    /// Descriptors that wait to be claimed.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// True when none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// How many descriptors came that belonged to no message.
    #[must_use]
    pub fn surplus_total(&self) -> u64 {
        self.surplus
    }
}
