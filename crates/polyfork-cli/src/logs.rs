//! What workers write, kept in files: one folder for each app, one file for each slot, old ones compressed.
//!
//! `folder` knows places and names of files, `line` how a line is written, `writer` writes and rotates, `reader` reads
//! back in the order of time. Only apps in the background have logs; in the foreground lines go to standard output.

pub(crate) mod folder;
pub(crate) mod line;
pub(crate) mod reader;
pub(crate) mod writer;
