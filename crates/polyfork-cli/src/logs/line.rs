//! One line of a log.
//!
//! As text: `2026-11-23T06:56:56.042123Z 3 out hello`, which is when, which worker (`-` for the primary), which stream, and
//! the line as the worker wrote it. A `+` behind the stream says that the line was cut: more follows, or the worker
//! ended without a newline. As JSON: an object with the same fields.
//!
//! The surprising rule: both formats may stand in one file, after the format was changed; each line tells its own.

use std::time::SystemTime;

use polyfork::cluster::Stream;
use serde_json::Value;

use crate::clock;
use crate::report::json;

/// The length of a stamp with microseconds.
const STAMP: usize = 27;

/// Who wrote a line to where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The primary.
    Own,
    /// A worker, on standard output.
    Out(u64),
    /// A worker, on standard error.
    Err(u64),
}

/// A line with all that is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// When, as text that sorts as time does.
    pub(crate) stamp: String,
    /// The slot; 0 is the primary.
    pub(crate) slot: u32,
    /// Who.
    pub(crate) source: Source,
    /// False when it was cut.
    pub(crate) complete: bool,
    /// Without its newline.
    pub(crate) line: Vec<u8>,
}

/// How lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) enum Format {
    /// See above.
    Text,
    /// See above.
    Json,
}

impl Source {
    /// Of a worker.
    pub(crate) fn of(worker: u64, stream: Stream) -> Source {
        match stream {
            Stream::Stdout => Source::Out(worker),
            Stream::Stderr => Source::Err(worker),
        }
    }

    /// The word for its stream.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Source::Own => "own",
            Source::Out(_) => "out",
            Source::Err(_) => "err",
        }
    }

    /// The worker.
    pub(crate) fn worker(self) -> Option<u64> {
        match self {
            Source::Own => None,
            Source::Out(worker) | Source::Err(worker) => Some(worker),
        }
    }

    fn read(word: &str, worker: Option<u64>) -> Option<Source> {
        match (word, worker) {
            ("own", None) => Some(Source::Own),
            ("out", Some(worker)) => Some(Source::Out(worker)),
            ("err", Some(worker)) => Some(Source::Err(worker)),
            _ => None,
        }
    }
}

/// Appends a line, with its newline, to `to`.
pub(crate) fn write(
    to: &mut Vec<u8>,
    format: Format,
    time: SystemTime,
    slot: u32,
    source: Source,
    line: &[u8],
    complete: bool,
) {
    let stamp = clock::fine_stamp(time);
    match format {
        Format::Text => {
            to.extend_from_slice(stamp.as_bytes());
            match source.worker() {
                Some(worker) => to.extend_from_slice(format!(" {worker} ").as_bytes()),
                None => to.extend_from_slice(b" - "),
            }
            to.extend_from_slice(source.word().as_bytes());
            to.extend_from_slice(if complete { b" " } else { b"+ " });
            to.extend_from_slice(line);
            to.push(b'\n');
        }
        Format::Json => {
            let entry = Entry { stamp, slot, source, complete, line: line.to_vec() };
            to.extend_from_slice(&json(&entry, None));
        }
    }
}

/// The JSON object of a line, with a newline. `app` is told where lines of several are mixed.
pub(crate) fn json(entry: &Entry, app: Option<&str>) -> Vec<u8> {
    let Entry { stamp, slot, source, complete, line } = entry;
    json::log_line(app, stamp, *slot, source.worker(), source.word(), line, *complete)
}

/// Reads a line without its newline; `None` for one that is none of ours.
pub(crate) fn read(line: &[u8], slot: u32) -> Option<Entry> {
    match line.first()? {
        b'{' => read_json(line, slot),
        _ => read_text(line, slot),
    }
}

fn read_text(line: &[u8], slot: u32) -> Option<Entry> {
    let stamp = std::str::from_utf8(line.get(..STAMP)?).ok()?;
    clock::read(stamp)?;
    let mut parts = line.get(STAMP + 1..)?.splitn(3, |byte| *byte == b' ');
    let worker = match std::str::from_utf8(parts.next()?).ok()? {
        "-" => None,
        number => Some(number.parse().ok()?),
    };
    let word = std::str::from_utf8(parts.next()?).ok()?;
    let complete = !word.ends_with('+');
    let source = Source::read(word.trim_end_matches('+'), worker)?;
    let line = parts.next()?.to_vec();
    Some(Entry { stamp: stamp.to_owned(), slot, source, complete, line })
}

fn read_json(line: &[u8], slot: u32) -> Option<Entry> {
    let value: Value = serde_json::from_slice(line).ok()?;
    let stamp = value["time"].as_str()?.to_owned();
    clock::read(&stamp)?;
    let source = Source::read(value["stream"].as_str()?, value["worker"].as_u64())?;
    let text = value["line"].as_str()?;
    let exact = value["base64"].as_str().and_then(json::from_base64);
    let line = exact.unwrap_or_else(|| text.as_bytes().to_vec());
    let complete = value["complete"].as_bool().unwrap_or(true);
    Some(Entry { stamp, slot, source, complete, line })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn a_line_reads_back_as_it_was_written() {
        let time = UNIX_EPOCH + Duration::from_micros(1_795_417_016_042_123);
        for format in [Format::Text, Format::Json] {
            for (source, line, complete) in [
                (Source::Out(3), &b"hello world"[..], true),
                (Source::Err(u64::MAX), b"", true),
                (Source::Own, b"  spaces  ", true),
                (Source::Out(1), b"\xff\xfe\x00\x1b[31m", false),
                (Source::Out(1), b"{\"json\":1}", true),
                (Source::Err(1), b"2026-11-23T06:56:56.042123Z 1 out x", true),
            ] {
                let mut text = Vec::new();
                write(&mut text, format, time, 7, source, line, complete);
                assert_eq!(text.pop(), Some(b'\n'));
                assert!(!text.contains(&b'\n'));
                let entry = read(&text, 7).unwrap_or_else(|| panic!("{format:?} {line:?}"));
                assert_eq!(entry.stamp, "2026-11-23T06:56:56.042123Z");
                assert_eq!((entry.slot, entry.source, entry.complete), (7, source, complete));
                assert_eq!(entry.line, line);
            }
        }
    }

    #[test]
    fn lines_of_others_are_not_ours() {
        for line in [
            &b""[..],
            b"x",
            b"2026-11-23T06:56:56.042123Z",
            b"2026-11-23T06:56:56.042123Z 1",
            b"2026-11-23T06:56:56.042123Z 1 out",
            b"2026-11-23T06:56:56.042123Z x out y",
            b"2026-11-23T06:56:56.042123Z - out y",
            b"{}",
            b"{\"time\":1}",
            b"{",
            &[0xff; 40],
        ] {
            assert_eq!(read(line, 1), None, "{line:?}");
        }
    }
}
