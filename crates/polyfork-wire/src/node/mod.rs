//! The channel of `child_process.fork` and `cluster`, in its JSON form and, in [`advanced`], the other.
//!
//! One message is one JSON text and a newline; descriptors travel beside it. The modules follow a
//! message on its way: [`line`](mod@line) cuts the stream, [`message`] says what a line is,
//! [`cluster`] reads and writes the messages of a primary, [`inbox`] gives descriptors to the envelopes
//! that need them, and [`outbox`] orders what is sent so that the peer does the same.

pub mod advanced;
pub mod cluster;
pub mod inbox;
pub mod line;
pub mod message;
pub mod outbox;
