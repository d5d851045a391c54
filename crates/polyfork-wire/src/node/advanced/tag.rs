//! The bytes that begin and end values on the wire.

pub(super) const VERSION: u8 = 0xFF;
pub(super) const PADDING: u8 = 0;
/// Followed by a count that readers skip.
pub(super) const OBJECT_COUNT: u8 = b'?';
pub(super) const HOLE: u8 = b'-';
pub(super) const UNDEFINED: u8 = b'_';
pub(super) const NULL: u8 = b'0';
pub(super) const TRUE: u8 = b'T';
pub(super) const FALSE: u8 = b'F';
pub(super) const INT32: u8 = b'I';
pub(super) const UINT32: u8 = b'U';
pub(super) const DOUBLE: u8 = b'N';
pub(super) const BIGINT: u8 = b'Z';
pub(super) const UTF8: u8 = b'S';
pub(super) const ONE_BYTE: u8 = b'"';
pub(super) const TWO_BYTE: u8 = b'c';
pub(super) const REFERENCE: u8 = b'^';
pub(super) const OBJECT: u8 = b'o';
pub(super) const OBJECT_END: u8 = b'{';
pub(super) const SPARSE: u8 = b'a';
pub(super) const SPARSE_END: u8 = b'@';
pub(super) const DENSE: u8 = b'A';
pub(super) const DENSE_END: u8 = b'$';
pub(super) const DATE: u8 = b'D';
pub(super) const BOXED_TRUE: u8 = b'y';
pub(super) const BOXED_FALSE: u8 = b'x';
pub(super) const BOXED_NUMBER: u8 = b'n';
pub(super) const BOXED_BIGINT: u8 = b'z';
pub(super) const BOXED_STRING: u8 = b's';
pub(super) const REGEXP: u8 = b'R';
pub(super) const MAP: u8 = b';';
pub(super) const MAP_END: u8 = b':';
pub(super) const SET: u8 = b'\'';
pub(super) const SET_END: u8 = b',';
pub(super) const ARRAY_BUFFER: u8 = b'B';
pub(super) const RESIZABLE: u8 = b'~';
pub(super) const VIEW: u8 = b'V';
pub(super) const ERROR: u8 = b'r';
pub(super) const HOST: u8 = b'\\';

/// What a host object is: the bytes of a view, or a plain object.
pub(super) const HOST_BYTES: u64 = 0;
pub(super) const HOST_NATIVE: u64 = 1;

pub(super) const ERROR_MESSAGE: u8 = b'm';
pub(super) const ERROR_STACK: u8 = b's';
pub(super) const ERROR_CAUSE: u8 = b'c';
pub(super) const ERROR_END: u8 = b'.';

/// Bits of a view's flags: its length follows that of its buffer; its buffer is resizable.
pub(super) const VIEW_TRACKS: u32 = 1;
pub(super) const VIEW_RESIZABLE: u32 = 2;
