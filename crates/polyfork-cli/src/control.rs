//! The control plane: how commands in other terminals reach a running primary.
//!
//! There is no daemon. Every primary opens a socket of its own in the runtime folder (`folder`), keeps a `book` of what
//! happens to it, and answers requests (`protocol`, `server`); the commands are clients (`client`). Docs:
//! docs/control.md.

pub(crate) mod book;
pub(crate) mod client;
pub(crate) mod folder;
pub(crate) mod name;
pub(crate) mod protocol;
pub(crate) mod server;
pub(crate) mod usage;
