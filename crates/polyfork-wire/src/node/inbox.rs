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

    /// The descriptors that wait, oldest first, for another inbox.
    pub fn into_waiting(self) -> VecDeque<D> {
        self.waiting
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

#[cfg(test)]
mod tests {
    use super::*;

    fn inbox() -> Inbox<u32> {
        Inbox::new(Limits { max_fds_queued: 3, ..Limits::default() })
    }

    fn with(descriptors: &[u32]) -> Inbox<u32> {
        let mut inbox = inbox();
        for descriptor in descriptors {
            inbox.push(*descriptor).expect("there is room");
        }
        inbox
    }

    #[test]
    fn nth_descriptor_belongs_to_the_nth_envelope() {
        let mut inbox = with(&[1, 2]);
        assert_eq!(inbox.claim(), Ok(1));
        inbox.push(3).expect("there is room");
        assert_eq!((inbox.claim(), inbox.claim()), (Ok(2), Ok(3)));
        assert!(inbox.is_empty());
    }

    #[test]
    fn envelope_without_a_descriptor_is_told() {
        assert_eq!(inbox().claim(), Err(ProtocolError::MissingDescriptor));
    }

    #[test]
    fn descriptor_of_a_plain_message_does_not_shift_later_ones() {
        let mut inbox = with(&[1]);
        assert_eq!(inbox.settle(false).collect::<Vec<_>>(), [1]);
        inbox.push(2).expect("there is room");
        assert_eq!(inbox.claim(), Ok(2));
        assert_eq!(inbox.surplus_total(), 1);
    }

    #[test]
    fn unfinished_line_keeps_one_descriptor() {
        let mut inbox = with(&[1, 2]);
        assert_eq!(inbox.settle(true).collect::<Vec<_>>(), [2]);
        assert_eq!(inbox.settle(true).count(), 0);
        assert_eq!(inbox.claim(), Ok(1));
    }

    #[test]
    fn settling_works_without_looking_at_the_result() {
        let mut inbox = with(&[1, 2, 3]);
        drop(inbox.settle(false));
        assert_eq!((inbox.len(), inbox.surplus_total()), (0, 3));
    }

    #[test]
    fn full_inbox_drops_and_counts() {
        let mut inbox = with(&[1, 2, 3]);
        assert_eq!(inbox.push(4), Err(ProtocolError::SurplusDescriptor));
        assert_eq!((inbox.len(), inbox.surplus_total()), (3, 1));
    }

    #[test]
    fn ten_thousand_descriptors_without_envelopes_are_given_back_at_once() {
        let mut inbox = inbox();
        for descriptor in 0..10_000 {
            inbox.push(descriptor).expect("each is settled before the next");
            assert_eq!(inbox.settle(false).collect::<Vec<_>>(), [descriptor]);
        }
        assert_eq!(inbox.surplus_total(), 10_000);
    }
}
