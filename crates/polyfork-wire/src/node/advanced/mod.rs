//! The channel in its `advanced` form: V8's structured clone, behind a length.
//!
//! [`FrameDecoder`] cuts the stream, [`read`](read()) and [`write`](write()) turn a payload into a [`Value`] and back,
//! [`to_frame`] and [`from_value`] do the same for types of serde, and [`parse_value`] says what a value
//! is, in the words of [`message`](super::message). What our side says to Node is made as a JSON line by
//! [`cluster`](super::cluster) and becomes a frame by [`transcode_line`]; a user's message with a handle is made
//! by [`handle_message`].
//!
//! The surprising rule: objects are numbered in the order in which they begin, and a second mention of one is
//! its number, [`Value::Reference`]. So graphs with cycles are trees here, and moving a part of a tree
//! elsewhere changes what the numbers in it mean.
//!
//! Why not the crate `v8_valueserializer` 0.1.2: it refuses format 13, which is the one that every peer reads,
//! and the host objects that Node makes of all buffers, recurses, and copies buffers with unsafe code that
//! frees them under another alignment than it asked for.
//!
//! Behaviour follows: V8 `src/objects/value-serializer.cc`, Node
//! `lib/internal/child_process/serialization.js` and `lib/v8.js`.

mod bigint;
mod de;
mod error;
mod frame;
mod json;
mod message;
mod read;
mod refs;
mod ser;
mod tag;
mod text;
mod tree;
mod value;
mod write;

pub use bigint::BigInt;
pub use de::from_value;
pub use error::ConvertError;
pub use frame::FrameDecoder;
pub use message::{handle_message, parse_value, transcode_line};
pub use read::read;
pub use refs::Objects;
pub use ser::{to_frame, to_payload};
pub use text::{Key, Text};
pub use value::{
    Array, Boxed, Bytes, BytesKind, ErrorKind, ErrorValue, Map, Object, RegExp, Resizable, Set,
    SparseArray, Value, View,
};
pub use write::{write, write_frame};
