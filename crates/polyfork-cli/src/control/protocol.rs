//! What is said over a control socket, documented in docs/control.md.
//!
//! A request is one line of JSON, and so is its answer; a stream of events follows its answer line by line. There is
//! one fixed table of verbs; nothing in a request names a function, and only `upgrade` names a file, which is looked at
//! before anything comes of it.
//!
//! The surprising rule: an unknown field is no error, so that a newer command can ask an older primary; an unknown verb is
//! one, since it cannot be done in part.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::exit::Code;
use crate::ledger::Verdict;
use crate::values;

/// The version of requests and answers.
pub(crate) const VERSION: u32 = 1;
/// The longest request.
pub(crate) const LONGEST_REQUEST: usize = 64 << 10;
/// What a client may ask to wait at most, in milliseconds: a week.
const LONGEST_WAIT: u64 = 7 * 24 * 3600 * 1000;

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verb {
    /// All that is known.
    Status,
    /// One line of a list.
    Brief,
    /// Metrics, of the programs too.
    Metrics {
        /// As values instead of text.
        json: bool,
    },
    /// What it was started with, for comparison.
    Config,
    /// Every event from now on.
    Events,
    /// Another number of workers.
    Scale(Scale),
    /// Every worker anew, slot by slot.
    Restart,
    /// One slot's worker anew.
    RestartSlot {
        /// Which.
        slot: u32,
    },
    /// A new generation of workers, if it comes up.
    Reload {
        /// How many workers at a time; zero for all at once.
        at_a_time: u32,
        /// How long new workers must stay ready first.
        probation: Option<Duration>,
    },
    /// Finish and leave.
    Stop {
        /// Instead of the time it was started with; if it stops already, from now on.
        grace: Option<Duration>,
    },
    /// End at once.
    Kill,
    /// Another binary in the place of this one.
    Upgrade {
        /// The file, an absolute path.
        binary: PathBuf,
        /// How long it may take to show that it can take over.
        limit: Option<Duration>,
    },
}

/// How many workers are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// So many.
    To(u32),
    /// So many more, or less.
    By(i32),
}

/// A request that makes sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    /// What to do.
    pub(crate) verb: Verb,
    /// Whether to answer only when it is done.
    pub(crate) wait: bool,
    /// After which time the asker wants no answer any more.
    pub(crate) deadline: Option<Duration>,
}

/// A request as it is written.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Raw {
    /// Of the protocol.
    pub(crate) v: Option<u32>,
    /// What to do.
    pub(crate) verb: String,
    /// `scale`: how many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) to: Option<u32>,
    /// `scale`: how many more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) by: Option<i32>,
    /// `stop`: how long workers may finish.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) grace_ms: Option<u64>,
    /// `reload`: how many workers at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) at_a_time: Option<u32>,
    /// `reload`: how long new workers must stay ready before they get connections.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) probation_ms: Option<u64>,
    /// `upgrade`: the file of the new binary, an absolute path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) binary: Option<String>,
    /// `upgrade`: how long the new binary may take to show that it can take over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) limit_ms: Option<u64>,
    /// `restart_slot`: which.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) slot: Option<u32>,
    /// `metrics`: as values instead of text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) json: Option<bool>,
    /// Whether to answer only when it is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) wait: Option<bool>,
    /// How long to wait at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) deadline_ms: Option<u64>,
}

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// A stable word.
    pub(crate) word: &'static str,
    /// The exit code it means for a command.
    pub(crate) code: Code,
    /// For people.
    pub(crate) text: String,
}

impl Refusal {
    /// The request itself is wrong.
    pub(crate) fn bad(text: impl Into<String>) -> Refusal {
        Refusal { word: "bad_request", code: Code::Refused, text: text.into() }
    }

    /// Somebody else than the user of the app, or root, has sent it.
    pub(crate) fn stranger() -> Refusal {
        let text =
            "only the user of the app, and root, may ask: this request was sent by somebody else";
        Refusal { word: "refused", code: Code::Refused, text: text.to_owned() }
    }

    /// It makes sense and cannot be done.
    pub(crate) fn refused(text: impl Into<String>) -> Refusal {
        Refusal { word: "refused", code: Code::Refused, text: text.into() }
    }

    /// The app ended before it was done.
    pub(crate) fn ended(verdict: &Verdict) -> Refusal {
        let text = format!("the app ended meanwhile: {}", verdict.text);
        Refusal { word: "ended", code: verdict.code, text }
    }
}

/// Reads a request.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn read(line: &[u8]) -> Result<Request, Refusal> {
    if line.iter().all(u8::is_ascii_whitespace) {
        return Err(Refusal::bad("an empty request"));
    }
    // A list would be taken for the fields in their order.
    if line.trim_ascii_start().first() != Some(&b'{') {
        return Err(Refusal::bad("not a request: not a JSON object"));
    }
    let raw: Raw = serde_json::from_slice(line)
        .map_err(|error| Refusal::bad(format!("not a request: {error}")))?;
    if let Some(version) = raw.v.filter(|version| *version != VERSION) {
        let text = format!("version {version} of the protocol is not spoken here, but {VERSION}");
        return Err(Refusal { word: "version", code: Code::Refused, text });
    }
    let limited = |ms: u64| Duration::from_millis(ms.min(LONGEST_WAIT));
    let verb = match raw.verb.as_str() {
        "status" => Verb::Status,
        "brief" => Verb::Brief,
        "metrics" => Verb::Metrics { json: raw.json.unwrap_or(false) },
        "restart_slot" => {
            let slot = raw.slot.ok_or_else(|| Refusal::bad("restart_slot needs `slot`"))?;
            Verb::RestartSlot { slot }
        }
        "config" => Verb::Config,
        "events" => Verb::Events,
        "scale" => Verb::Scale(scale(&raw)?),
        "restart" => Verb::Restart,
        "reload" => Verb::Reload {
            at_a_time: raw.at_a_time.unwrap_or(0),
            probation: raw.probation_ms.map(limited),
        },
        "stop" => Verb::Stop { grace: raw.grace_ms.map(limited) },
        "kill" => Verb::Kill,
        "upgrade" => Verb::Upgrade { binary: binary(&raw)?, limit: raw.limit_ms.map(limited) },
        other => {
            let shown: String = other.chars().take(40).collect();
            let text = format!("no such verb: {shown:?}");
            return Err(Refusal { word: "unknown_verb", code: Code::Refused, text });
        }
    };
    let wait = raw.wait.unwrap_or(true);
    Ok(Request { verb, wait, deadline: raw.deadline_ms.map(limited) })
}

fn binary(raw: &Raw) -> Result<PathBuf, Refusal> {
    let path = raw.binary.as_deref().map(PathBuf::from);
    path.filter(|path| path.is_absolute())
        .ok_or_else(|| Refusal::bad("upgrade needs `binary`, an absolute path"))
}

fn scale(raw: &Raw) -> Result<Scale, Refusal> {
    match (raw.to, raw.by) {
        (Some(to), None) if (1..=values::MOST_WORKERS).contains(&to) => Ok(Scale::To(to)),
        (None, Some(by)) => Ok(Scale::By(by)),
        (Some(to), None) => Err(Refusal::bad(format!(
            "{to} workers: from 1 to {} can be had",
            values::MOST_WORKERS
        ))),
        _ => Err(Refusal::bad("scale needs either `to` or `by`")),
    }
}

#[derive(Serialize)]
struct Done<'a, T> {
    v: u32,
    ok: bool,
    result: &'a T,
}

#[derive(Serialize)]
struct NotDone<'a> {
    v: u32,
    ok: bool,
    error: ErrorShape<'a>,
}

#[derive(Serialize)]
struct ErrorShape<'a> {
    code: &'a str,
    exit_code: u8,
    text: &'a str,
}

/// The line of an answer.
pub(crate) fn done<T: Serialize>(result: &T) -> Vec<u8> {
    line(&Done { v: VERSION, ok: true, result })
}

/// The line that tells why there is none.
pub(crate) fn not_done(refusal: &Refusal) -> Vec<u8> {
    let Refusal { word, code, text } = refusal;
    let error = ErrorShape { code: word, exit_code: *code as u8, text };
    line(&NotDone { v: VERSION, ok: false, error })
}

fn line<T: Serialize>(value: &T) -> Vec<u8> {
    // Texts, numbers and lists of them cannot fail.
    let mut line = serde_json::to_vec(value).unwrap_or_else(|_| b"{\"ok\":false}".to_vec());
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(line: &str) -> &'static str {
        read(line.as_bytes()).expect_err(line).word
    }

    #[test]
    fn unknown_fields_are_passed_over_and_unknown_verbs_are_not() {
        let request = read(br#"{"v":1,"verb":"status","colour":"red","deadline_ms":5}"#).unwrap();
        assert_eq!(request.verb, Verb::Status);
        assert_eq!(request.deadline, Some(Duration::from_millis(5)));
        assert_eq!(word(r#"{"v":1,"verb":"eval"}"#), "unknown_verb");
        assert_eq!(word(r#"{"v":1,"verb":"__proto__"}"#), "unknown_verb");
        assert_eq!(word(r#"{"v":1}"#), "unknown_verb");
        assert_eq!(word(r#"{"v":2,"verb":"status"}"#), "version");
    }

    #[test]
    fn what_is_no_request_is_told_so() {
        let deep = "[".repeat(50_000);
        for line in ["", "  ", "x", "[]", "1", "null", "\"status\"", "{", "{\"verb\":3}", &deep] {
            assert_eq!(word(line), "bad_request", "{line:.20}");
        }
        assert_eq!(read(b"\xff\xfe{}").expect_err("no text").word, "bad_request");
    }

    #[test]
    fn a_number_of_workers_has_bounds() {
        let of = |text: &str| read(format!(r#"{{"verb":"scale",{text}}}"#).as_bytes());
        assert_eq!(of(r#""to":3"#).unwrap().verb, Verb::Scale(Scale::To(3)));
        assert_eq!(of(r#""by":-1"#).unwrap().verb, Verb::Scale(Scale::By(-1)));
        for bad in [r#""to":0"#, r#""to":5000"#, r#""to":1,"by":1"#, r#""x":1"#, r#""to":-1"#] {
            assert_eq!(of(bad).expect_err(bad).word, "bad_request");
        }
    }
}
