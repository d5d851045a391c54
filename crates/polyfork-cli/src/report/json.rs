//! Events as JSON lines, documented in docs/events.md.
//!
//! One object a line: `event`, `time`, then `slot`, `worker`, `pid` where it is about a worker, then the event's own
//! fields in snake_case. Durations are in milliseconds and say so in their names. A field that has no value is null; it
//! is never left out.
//!
//! The surprising rule: output that is not UTF-8 is told twice, readable in `line` and exact in `base64`.

use polyfork::cluster::{
    Address, Detected, Event, OutputLine, ReloadError, Runtime, Stream, Via, Who,
};
use serde::Serialize;

use super::Start;
use crate::clock;
use crate::ledger::{Ledger, Verdict};
use crate::words;

/// The version of the format, told in the first line.
pub(crate) const VERSION: u32 = 1;

/// Renders events.
#[derive(Debug, Default)]
pub(crate) struct Json;

/// One object.
struct Line(Vec<u8>);

impl Line {
    fn new(event: &str) -> Line {
        Line(b"{".to_vec()).with("event", event).with("time", &clock::now())
    }

    fn about(event: &str, who: &Who) -> Line {
        Line::new(event).who(who)
    }

    fn who(self, who: &Who) -> Line {
        self.with("slot", &who.slot).with("worker", &who.worker).with("pid", &who.pid)
    }

    fn with<T: Serialize + ?Sized>(mut self, key: &str, value: &T) -> Line {
        self.key(key);
        let before = self.0.len();
        if serde_json::to_writer(&mut self.0, value).is_err() {
            // Text, numbers and null cannot fail; a half-written value must not spoil the line all the same.
            self.0.truncate(before);
            self.0.extend_from_slice(b"null");
        }
        self
    }

    /// A value that is JSON already. A newline in it would end the line, so it is put through a reader.
    fn with_json(mut self, key: &str, json: Option<&str>) -> Line {
        self.key(key);
        let one_line = json.filter(|json| !json.contains(['\n', '\r']));
        self.0.extend_from_slice(one_line.unwrap_or("null").as_bytes());
        self
    }

    fn key(&mut self, key: &str) {
        if self.0.len() > 1 {
            self.0.push(b',');
        }
        self.0.push(b'"');
        self.0.extend_from_slice(key.as_bytes());
        self.0.extend_from_slice(b"\":");
    }

    fn address(self, address: &Address) -> Line {
        self.with("address", &address.to_string()).with("port", &words::port(address))
    }

    fn via(self, via: &Via) -> Line {
        self.with("policy", &via.policy.to_string())
            .with("mechanism", via.mechanism.word())
            .with("exact", &words::is_exact(via))
            .with("why", &via.why)
    }

    fn bytes(mut self) -> Vec<u8> {
        self.0.extend_from_slice(b"}\n");
        self.0
    }

    fn text(self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }
}

impl Json {
    pub(super) fn start(&mut self, start: &Start) -> Vec<String> {
        let Detected { dialect, runtime, exec, why, .. } = &start.detected;
        let setup = Line::new("setup")
            .with("v", &VERSION)
            .with("polyfork", env!("CARGO_PKG_VERSION"))
            .with("pid", &std::process::id())
            .with("name", &start.name)
            .with("workers", &start.workers)
            .with("workers_why", &start.workers_why)
            .with("dialect", &dialect.to_string())
            .with("runtime", runtime_word(*runtime))
            .with("runtime_version", &runtime_version(*runtime))
            .with("exec", &exec.to_string_lossy())
            .with("why", why);
        let warnings = start.warnings.iter().map(|text| warning(text));
        std::iter::once(setup.text()).chain(warnings).collect()
    }

    pub(crate) fn event(&mut self, event: &Event, ledger: &Ledger) -> Option<String> {
        let line = match event {
            // Told at the start, with more.
            Event::Setup { .. } | Event::End(_) => return None,
            Event::Fork(who) => Line::about("fork", who),
            Event::Online(who) => Line::about("online", who),
            Event::Listening { who, address, by } => {
                Line::about("listening", who).address(address).via(by)
            }
            Event::Ready(who) => Line::about("worker_ready", who),
            Event::AllReady { workers } => Line::new("ready").with("workers", workers),
            Event::Message { who, message } => {
                Line::about("message", who).with_json("message", message.json())
            }
            Event::Draining(who) => Line::about("draining", who),
            Event::Disconnect(who) => Line::about("disconnect", who),
            Event::Exit { .. } => return exit(event),
            Event::SlotFailed { slot, restarts, window } => Line::new("slot_failed")
                .with("slot", slot)
                .with("restarts", restarts)
                .with("window_ms", &window.as_millis())
                .with("last_lines", &ledger.last_lines(*slot).collect::<Vec<_>>()),
            Event::SlotRests { slot, code, signal } => Line::new("slot_stopped")
                .with("slot", slot)
                .with("code", code)
                .with("signal", &signal.map(words::signal)),
            Event::SlotRetired { slot } => Line::new("slot_retired").with("slot", slot),
            Event::Bound { address, by } => Line::new("bound").address(address).via(by),
            Event::Closed { address } => Line::new("closed").address(address),
            Event::BindFailed { who, address, error } => maybe_about("bind_failed", who.as_ref())
                .address(address)
                .with("error", &error.to_string())
                .with("text", &words::bind_failed(address, error)),
            Event::Reloading { generation } => {
                Line::new("reloading").with("generation", generation)
            }
            Event::Switched { generation, workers } => {
                Line::new("switched").with("generation", generation).with("workers", workers)
            }
            Event::Reloaded(report) => Line::new("reloaded")
                .with("generation", &report.generation)
                .with("workers", &report.workers)
                .with("refused", &report.refused)
                .with("reset", &report.reset)
                .with("cut_short", &report.cut_short)
                .with("abandoned", &words::addresses(&report.abandoned))
                .with("slowest_wait_ms", &report.slowest_wait.as_millis())
                .with("took_ms", &report.took.as_millis()),
            Event::ReloadFailed { generation, error } => {
                let who = match error {
                    ReloadError::Failed { who, .. } => Some(who),
                    _ => None,
                };
                let lines = who.map(|who| ledger.last_lines(who.slot).collect::<Vec<_>>());
                maybe_about("reload_failed", who)
                    .with("generation", generation)
                    .with("text", &error.to_string())
                    .with("last_lines", &lines)
            }
            Event::Stopping => Line::new("stopping"),
            Event::Status { who, text } => Line::about("status", who).with("text", text),
            Event::Blocked { who, silent } => {
                Line::about("blocked", who).with("silent_ms", &silent.as_millis())
            }
            Event::Unblocked { who, silent } => {
                Line::about("unblocked", who).with("silent_ms", &silent.as_millis())
            }
            Event::Notice(notice) => maybe_about("notice", notice.who.as_ref())
                .with("code", notice.code)
                .with("text", &words::plain(&notice.text)),
            Event::Lagged(missed) => Line::new("lagged").with("missed", missed),
            _ => return None,
        };
        Some(line.text())
    }

    pub(crate) fn end(&mut self, verdict: &Verdict) -> String {
        Line::new("end")
            .with("outcome", verdict.code.row().word)
            .with("exit_code", &(verdict.code as u8))
            .with("text", &verdict.text)
            .text()
    }

    pub(super) fn output(&mut self, line: &OutputLine) -> Vec<u8> {
        let stream = match line.stream {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        };
        let text = String::from_utf8_lossy(&line.line);
        let exact = matches!(text, std::borrow::Cow::Borrowed(_));
        let bytes = (!exact).then(|| base64(&line.line));
        Line::new("output")
            .with("slot", &line.slot)
            .with("worker", &line.worker)
            .with("stream", stream)
            .with("line", &text)
            .with("base64", &bytes)
            .with("complete", &line.complete)
            .bytes()
    }
}

fn maybe_about(event: &str, who: Option<&Who>) -> Line {
    match who {
        Some(who) => Line::about(event, who),
        None => {
            let none: Option<u64> = None;
            Line::new(event).with("slot", &none).with("worker", &none).with("pid", &none)
        }
    }
}

fn exit(event: &Event) -> Option<String> {
    let Event::Exit { who, code, signal, reason, lived, voluntary, restart_in } = event else {
        return None;
    };
    let line = Line::about("exit", who)
        .with("code", code)
        .with("signal", &signal.map(words::signal))
        .with("reason", words::reason(*reason))
        .with("text", &words::ended(*reason))
        .with("lived_ms", &lived.as_millis())
        .with("voluntary", voluntary)
        .with("restart_in_ms", &restart_in.map(|delay| delay.as_millis()));
    Some(line.text())
}

/// The line that tells why nothing was started.
pub(crate) fn refused(verdict: &Verdict) -> String {
    Line::new("error")
        .with("v", &VERSION)
        .with("outcome", verdict.code.row().word)
        .with("exit_code", &(verdict.code as u8))
        .with("text", &verdict.text)
        .text()
}

/// The line that tells how many of the primary's own lines were dropped.
pub(crate) fn dropped(lines: u64) -> String {
    Line::new("dropped").with("lines", &lines).text()
}

/// A warning of the time before anything runs.
pub(crate) fn warning(text: &str) -> String {
    Line::new("notice").with("code", "warning").with("text", text).text()
}

/// The line that tells a starter in the foreground that an app runs in the background.
pub(crate) fn started<T: Serialize>(app: &T) -> String {
    Line::new("started").with("app", app).text()
}

/// The line that tells how many events were missed.
pub(crate) fn lagged(missed: u64) -> String {
    Line::new("lagged").with("missed", &missed).text()
}

/// The object of a line in a log.
pub(crate) fn log_line(
    app: Option<&str>,
    time: &str,
    slot: u32,
    worker: Option<u64>,
    stream: &str,
    line: &[u8],
    complete: bool,
) -> Vec<u8> {
    let text = String::from_utf8_lossy(line);
    let exact = matches!(text, std::borrow::Cow::Borrowed(_));
    let object = Line(b"{".to_vec()).with("time", time);
    let object = match app {
        Some(app) => object.with("name", app),
        None => object,
    };
    let object = object
        .with("slot", &slot)
        .with("worker", &worker)
        .with("stream", stream)
        .with("line", &text)
        .with("complete", &complete);
    match exact {
        true => object.bytes(),
        false => object.with("base64", &base64(line)).bytes(),
    }
}

pub(crate) fn runtime_word(runtime: Runtime) -> &'static str {
    match runtime {
        Runtime::Node { .. } => "node",
        Runtime::Deno { .. } => "deno",
        Runtime::Bun { .. } => "bun",
        Runtime::Python => "python",
        Runtime::Native { .. } => "native",
        _ => "other",
    }
}

fn runtime_version(runtime: Runtime) -> Option<String> {
    match runtime {
        Runtime::Node { version } | Runtime::Deno { version } | Runtime::Bun { version } => {
            Some(version.to_string())
        }
        _ => None,
    }
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0u32, |bits, &byte| bits << 8 | u32::from(byte));
        let bits = bits << (8 * (3 - group.len()));
        for place in 0..4 {
            if place <= group.len() {
                text.push(char::from(DIGITS[(bits >> (18 - 6 * place) & 63) as usize]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

/// Back to bytes; `None` for what is none.
pub(crate) fn from_base64(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits = text.trim_end_matches('=').bytes().map(digit).collect::<Option<Vec<u8>>>()?;
    let mut bytes = Vec::with_capacity(digits.len() * 3 / 4);
    for group in digits.chunks(4) {
        let bits = group.iter().fold(0u32, |bits, digit| bits << 6 | u32::from(*digit));
        let bits = bits << (6 * (4 - group.len()));
        bytes.extend(bits.to_be_bytes()[1..].iter().take(group.len() * 6 / 8));
    }
    Some(bytes)
}

#[cfg(test)]
mod tests;
