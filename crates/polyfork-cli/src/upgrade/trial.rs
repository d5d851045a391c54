//! A new binary shows that it can take over, before anything changes: it is run beside the primary and reads the very state
//! that would be left to it.
//!
//! The primary writes states to its standard input, each behind its length (four bytes, little-endian); it answers with a
//! line of JSON each. It touches nothing: no descriptor of the primary is open in it. It is told no words of the primary's
//! command line either: an image that was left an app does not read them.
//!
//! The surprising rule: nothing of the new binary is believed but its answer. Whatever else it writes, how it ends and
//! how long it takes are reasons to refuse it. What is quoted of it has gone through [`Secrets`]: it has read all that the
//! app's variables hold.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use polyfork::child_process::{
    Child, ChildStderr, ChildStdin, ChildStdout, Command, Signal, Stdio,
};
use polyfork::cluster::upgrade::STATE_VERSION;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::time::{Instant, timeout, timeout_at};

use super::secrets::Secrets;
use super::state::AppState;
use crate::exit::Code;
use crate::words;

/// What a process may do.
const RIGHTS: &str = "CapEff:";
/// The hidden verb.
const VERB: &str = "upgrade-check";
/// A state with its envelope.
const LONGEST_STATE: u64 = 257 << 20;
/// An answer is a line of a few hundred bytes.
const LONGEST_ANSWER: u64 = 16 << 10;
/// What it wrote to standard error is shown as far as this.
const LAST_WORDS: u64 = 4 << 10;
/// For its last words, once it has ended.
const LAST_WORDS_TIME: Duration = Duration::from_millis(200);

/// What the new binary says.
#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    /// Its release.
    polyfork: String,
    /// The version of states that it reads.
    state: u32,
    ok: bool,
    /// Why not.
    text: String,
    /// What it may do, as in `CapEff` of proc(5).
    #[serde(default)]
    rights: Option<String>,
}

/// The new binary, running.
pub(crate) struct Trial {
    child: Child,
    stdin: ChildStdin,
    out: BufReader<ChildStdout>,
    err: ChildStderr,
    deadline: Instant,
    limit: Duration,
    shown: String,
    secrets: Secrets,
}

impl Trial {
    /// Runs it. Of what it says nothing is quoted that is among `secrets`.
    ///
    /// # Errors
    /// Why it cannot be run, for people.
    pub(crate) fn start(
        binary: &OwnedFd,
        path: &Path,
        limit: Duration,
        secrets: Secrets,
    ) -> Result<Trial, String> {
        let shown = words::harmless(&path.to_string_lossy());
        // By our descriptor, not by its name.
        let program = format!("/proc/{}/fd/{}", std::process::id(), binary.as_raw_fd());
        let mut command = Command::new(program);
        command.arg0("polyfork").arg(VERB);
        command.stdin(Stdio::Pipe).stdout(Stdio::Pipe).stderr(Stdio::Pipe).process_group(true);
        let failed = |text: &str| format!("{shown}: {text}");
        let spawned = super::with_rights(|| command.spawn());
        let spawned = spawned.map_err(|error| failed(&words::plain(&error.to_string())))?;
        let mut child = spawned.map_err(|error| match error.raw_os_error() {
            Some(libc_errno::ENOEXEC) => failed("no executable for this machine"),
            Some(libc_errno::ENOENT) => {
                failed("it is a script, or what it needs to be loaded with is not there")
            }
            Some(libc_errno::ETXTBSY) => failed("somebody is writing to it"),
            Some(raw) => {
                let text = io::Error::from_raw_os_error(raw).to_string();
                failed(&format!("it cannot be executed: {}", words::plain(&text)))
            }
            None => failed(&words::plain(&error.to_string())),
        })?;
        let (Some(stdin), Some(out), Some(err)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(failed("it has no standard streams"));
        };
        let (out, deadline) = (BufReader::new(out), Instant::now() + limit);
        Ok(Trial { child, stdin, out, err, deadline, limit, shown, secrets })
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Has it read a state; gives its release.
    ///
    /// # Errors
    /// Why it cannot take over, for people.
    pub(crate) async fn reads(&mut self, sealed: &[u8]) -> Result<String, String> {
        let told = timeout_at(self.deadline, self.asked(sealed)).await;
        let answer = match told {
            Err(_) => {
                let limit = self.limit.as_millis();
                return Err(format!("{}: it does not answer within {limit} ms", self.shown));
            }
            Ok(Err(_)) => return Err(self.last_words().await),
            Ok(Ok(line)) => line,
        };
        let answer: Answer = serde_json::from_slice(&answer)
            .map_err(|_| format!("{}: it does not know how to take over", self.shown))?;
        let Answer { polyfork, state, ok, text, rights } = answer;
        if !ok {
            let text = self.quoted(&words::plain(&text));
            return Err(format!(
                "{}: it cannot take over: {text} (it is {}, reads states of version {state})",
                self.shown,
                self.quoted(&polyfork)
            ));
        }
        match lost_rights(own_rights(RIGHTS).as_deref(), rights.as_deref()) {
            None => Ok(polyfork),
            Some(lost) => Err(format!(
                "{}: run from this process it would lose rights that this process has (capabilities {lost:x})",
                self.shown
            )),
        }
    }

    async fn asked(&mut self, sealed: &[u8]) -> io::Result<Vec<u8>> {
        let length = u32::try_from(sealed.len()).map_err(io::Error::other)?;
        self.stdin.write_all(&length.to_le_bytes()).await?;
        self.stdin.write_all(sealed).await?;
        self.stdin.flush().await?;
        let mut line = Vec::new();
        (&mut self.out).take(LONGEST_ANSWER).read_until(b'\n', &mut line).await?;
        match line.last() {
            Some(b'\n') => Ok(line),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// A text of its own, as it may be shown and written to logs.
    fn quoted(&self, text: &str) -> String {
        words::harmless(&self.secrets.hidden(text))
    }

    /// More time, for another state.
    pub(crate) fn again(&mut self, limit: Duration) {
        (self.deadline, self.limit) = (Instant::now() + limit, limit);
    }

    /// How it ended, and what it said.
    async fn last_words(&mut self) -> String {
        let mut said = Vec::new();
        let mut err = (&mut self.err).take(LAST_WORDS);
        // It may go on without saying anything.
        let read = timeout(LAST_WORDS_TIME, err.read_to_end(&mut said)).await;
        let whole = matches!(read, Ok(Ok(_))) && (said.len() as u64) < LAST_WORDS;
        let ended = timeout(LAST_WORDS_TIME, self.child.wait()).await;
        let how = match (self.child.exit_code(), self.child.signal_code()) {
            (Some(code), _) => format!("it ended with code {code} before it answered"),
            (_, Some(signal)) => format!("it was ended by {signal} before it answered"),
            _ if ended.is_err() => "it closed its streams and stayed".to_owned(),
            _ => "it ended before it answered".to_owned(),
        };
        match last_line(&self.secrets.hidden(&String::from_utf8_lossy(&said)), whole) {
            Some(line) => format!("{}: {how}: {}", self.shown, words::harmless(line)),
            None => format!("{}: {how}", self.shown),
        }
    }

    /// Ends it.
    pub(crate) async fn end(mut self) {
        // It may have ended by itself.
        let _ = self.child.kill(Signal::KILL);
        let _ = self.child.wait().await;
    }
}

/// The last line with something in it. Of a text that was cut short the last one is left out: half a value is not known
/// for one.
fn last_line(said: &str, whole: bool) -> Option<&str> {
    let cut = if whole { said.len() } else { said.rfind('\n')? };
    said[..cut].lines().rev().find(|line| !line.trim().is_empty())
}

/// The same numbers on all of Linux.
mod libc_errno {
    pub(super) const ENOENT: i32 = 2;
    pub(super) const ENOEXEC: i32 = 8;
    pub(super) const ETXTBSY: i32 = 26;
}

/// One of the sets of capabilities of this process.
pub(super) fn own_rights(set: &str) -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(set))?;
    Some(line.trim().to_owned())
}

/// What `ours` has and `theirs` has not; nothing where one of them is not known.
fn lost_rights(ours: Option<&str>, theirs: Option<&str>) -> Option<u64> {
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let lost = number(ours?)? & !number(theirs?)?;
    (lost != 0).then_some(lost)
}

/// `polyfork upgrade-check`: the other end.
pub(crate) fn check() -> Code {
    let mut input = io::stdin().lock();
    loop {
        let sealed = match next(&mut input) {
            Ok(Some(sealed)) => sealed,
            Ok(None) => return Code::Stopped,
            Err(_) => return Code::Unexpected,
        };
        let checked = AppState::read(&sealed);
        let checked = checked.map(drop).map_err(|error| words::plain(&error.to_string()));
        let answer = Answer {
            polyfork: env!("CARGO_PKG_VERSION").to_owned(),
            state: STATE_VERSION,
            ok: checked.is_ok(),
            text: checked.err().unwrap_or_default(),
            rights: own_rights(RIGHTS),
        };
        let mut line = serde_json::to_vec(&answer).unwrap_or_default();
        line.push(b'\n');
        let mut out = io::stdout().lock();
        if out.write_all(&line).and_then(|()| out.flush()).is_err() {
            return Code::Unexpected;
        }
    }
}

fn next(input: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    match input.read_exact(&mut length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let length = u64::from(u32::from_le_bytes(length));
    if length > LONGEST_STATE {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut sealed = Vec::new();
    input.take(length).read_to_end(&mut sealed)?;
    match sealed.len() as u64 == length {
        true => Ok(Some(sealed)),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_that_would_be_lost_are_found() {
        assert_eq!(lost_rights(Some("0000000000001001"), Some("0000000000000001")), Some(0x1000));
        assert_eq!(lost_rights(Some("1"), Some("ff")), None);
        assert_eq!(lost_rights(None, Some("0")), None);
        assert!(own_rights(RIGHTS).is_some());
    }

    #[test]
    fn states_come_behind_their_length_and_are_cut_nowhere() {
        let mut input: &[u8] = b"\x02\0\0\0ab\x01\0\0\0c";
        assert_eq!(next(&mut input).expect("a state").as_deref(), Some(&b"ab"[..]));
        assert_eq!(next(&mut input).expect("a state").as_deref(), Some(&b"c"[..]));
        assert_eq!(next(&mut input).expect("the end"), None);
        assert!(next(&mut &b"\x02\0\0\0a"[..]).is_err());
        assert!(next(&mut &b"\xff\xff\xff\xff"[..]).is_err());
    }

    #[test]
    fn half_a_line_is_not_quoted() {
        assert_eq!(last_line("one\ntwo\n \n", true), Some("two"));
        assert_eq!(last_line("one\ntwo", true), Some("two"));
        assert_eq!(last_line("one\ntwo", false), Some("one"));
        assert_eq!(last_line("one", false), None);
        assert_eq!(last_line("", true), None);
    }
}
