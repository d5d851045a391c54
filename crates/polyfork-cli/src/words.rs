//! Words for what happened, shared by the readers' two formats: names of signals and reasons, addresses, system
//! errors with what to do about them.
//!
//! The words for programs are stable: they are part of docs/events.md.

use std::io;

use polyfork::cluster::{Address, Carried, Exit, Policy, Reason, ReloadReport, Via};

use crate::exit::Code;

/// Linux numbers of x86 and Arm, from 1.
const SIGNALS: [&str; 31] = [
    "SIGHUP",
    "SIGINT",
    "SIGQUIT",
    "SIGILL",
    "SIGTRAP",
    "SIGABRT",
    "SIGBUS",
    "SIGFPE",
    "SIGKILL",
    "SIGUSR1",
    "SIGSEGV",
    "SIGUSR2",
    "SIGPIPE",
    "SIGALRM",
    "SIGTERM",
    "SIGSTKFLT",
    "SIGCHLD",
    "SIGCONT",
    "SIGSTOP",
    "SIGTSTP",
    "SIGTTIN",
    "SIGTTOU",
    "SIGURG",
    "SIGXCPU",
    "SIGXFSZ",
    "SIGVTALRM",
    "SIGPROF",
    "SIGWINCH",
    "SIGIO",
    "SIGPWR",
    "SIGSYS",
];

/// `SIGKILL` for 9.
pub(crate) fn signal(number: i32) -> String {
    let name = usize::try_from(number).ok().and_then(|n| SIGNALS.get(n.wrapping_sub(1)));
    name.map_or_else(|| format!("signal {number}"), |name| (*name).to_owned())
}

/// Every word of [`reason`].
pub(crate) const REASONS: [&str; 12] = [
    "exited",
    "signal",
    "unknown",
    "not_started",
    "out_of_memory",
    "never_ready",
    "protocol_fault",
    "watchdog",
    "asked",
    "voluntary",
    "grace_expired",
    "disconnected",
];

/// The word for a reason in JSON.
pub(crate) fn reason(reason: Reason) -> &'static str {
    match reason {
        Reason::Exited(Exit::Code(_)) => "exited",
        Reason::Exited(Exit::Signal(_)) => "signal",
        Reason::Exited(Exit::Unknown) => "unknown",
        Reason::Exited(Exit::NotStarted) => "not_started",
        Reason::OutOfMemory => "out_of_memory",
        Reason::NeverReady => "never_ready",
        Reason::ProtocolFault => "protocol_fault",
        Reason::Watchdog => "watchdog",
        Reason::ProbeFailed => "probe_failed",
        Reason::Asked => "asked",
        Reason::Voluntary => "voluntary",
        Reason::GraceExpired => "grace_expired",
        Reason::Disconnected => "disconnected",
    }
}

/// How a process ended, with every signal by its name.
pub(crate) fn ended(reason: Reason) -> String {
    match reason {
        Reason::Exited(Exit::Signal(number)) => format!("ended by {}", signal(number)),
        Reason::Exited(exit) => exit.to_string(),
        Reason::OutOfMemory => "was ended by the kernel: out of memory".to_owned(),
        other => other.to_string(),
    }
}

/// An address for people: a wildcard is told as what it is.
pub(crate) fn address(address: &Address) -> String {
    match address {
        Address::Tcp(tcp) if tcp.ip().is_unspecified() => {
            format!("port {} of every address ({address})", tcp.port())
        }
        other => other.to_string(),
    }
}

/// The port of a TCP or UDP address.
pub(crate) fn port(address: &Address) -> Option<u16> {
    match address {
        Address::Tcp(address) | Address::Udp(address) => Some(address.port()),
        _ => None,
    }
}

/// Whether turns are exact.
pub(crate) fn is_exact(via: &Via) -> bool {
    via.policy == Policy::RoundRobin
        && matches!(via.mechanism, Carried::KernelExact | Carried::Handoff)
}

/// Policy and mechanism for people.
pub(crate) fn via(via: &Via) -> &'static str {
    match via.mechanism {
        Carried::KernelExact => "round-robin by the kernel",
        Carried::KernelRandom => "round-robin by the kernel",
        Carried::Handoff => "round-robin, handed over by the primary",
        Carried::SharedSocket => "shared",
        Carried::OwnSocket => "each worker by itself",
        _ => "in a way this version has no words for",
    }
}

/// The exit code for an address that could not be bound.
pub(crate) fn bind_code(error: &io::Error) -> Code {
    match error.kind() {
        io::ErrorKind::AddrInUse => Code::AddressInUse,
        io::ErrorKind::PermissionDenied
        | io::ErrorKind::AddrNotAvailable
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::NotFound
        | io::ErrorKind::NotADirectory
        | io::ErrorKind::ReadOnlyFilesystem
        | io::ErrorKind::Unsupported => Code::AddressRefused,
        _ if error.raw_os_error() == Some(EAFNOSUPPORT) => Code::AddressRefused,
        _ => Code::Unexpected,
    }
}

/// The same number on every Linux.
const EAFNOSUPPORT: i32 = 97;

/// Why an address could not be bound, and what to do: one line.
pub(crate) fn bind_failed(address: &Address, error: &io::Error) -> String {
    let (what, next) = match error.kind() {
        io::ErrorKind::AddrInUse => ("address in use", who_listens(address)),
        io::ErrorKind::PermissionDenied => ("not permitted", how_to_be_permitted(address)),
        io::ErrorKind::AddrNotAvailable => {
            ("no such address here", "`ip address` lists the ones this machine has".to_owned())
        }
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            ("no such directory", "make the directory of the socket first".to_owned())
        }
        _ if error.raw_os_error() == Some(EAFNOSUPPORT) => {
            ("this machine has no such kind of address", "IPv6 may be off: use an IPv4 one".into())
        }
        _ => return format!("cannot listen on {address}: {}", plain(&error.to_string())),
    };
    format!("cannot listen on {address}: {what}; {next}")
}

fn who_listens(address: &Address) -> String {
    match address {
        Address::Tcp(tcp) => format!("`ss -ltnp 'sport = :{}'` shows who listens", tcp.port()),
        Address::Udp(udp) => format!("`ss -lunp 'sport = :{}'` shows who listens", udp.port()),
        _ => "another program listens there, or remove the file it left".to_owned(),
    }
}

fn how_to_be_permitted(address: &Address) -> String {
    match port(address) {
        Some(1..1024) => "ports below 1024 need CAP_NET_BIND_SERVICE (setcap, or \
                          AmbientCapabilities= of systemd); or take a higher port"
            .to_owned(),
        Some(_) => "a security module may forbid it".to_owned(),
        None => "the directory of the socket must be writable".to_owned(),
    }
}

/// Whether a terminal would obey it, or show nothing: control characters, those that turn the direction of writing, end lines
/// or have no width. Joiners of letters and emoji are left alone.
pub(crate) fn is_unseen(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
}

/// A line of a worker for a terminal: colours are obeyed, all other control characters are shown.
pub(crate) fn colours_only(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut safe = String::with_capacity(text.len());
    let mut rest = &*text;
    let mut coloured = false;
    while let Some(at) = rest.find(|c: char| is_unseen(c) && c != '\t') {
        safe.push_str(&rest[..at]);
        rest = &rest[at..];
        let len = colour(rest);
        if len > 0 {
            coloured = true;
            safe.push_str(&rest[..len]);
            rest = &rest[len..];
        } else {
            let c = rest.chars().next().unwrap_or_default();
            safe.extend(c.escape_default());
            rest = &rest[c.len_utf8()..];
        }
    }
    safe.push_str(rest);
    if coloured {
        safe.push_str("\x1b[0m");
    }
    safe
}

/// The length of the colour sequence at the start: `ESC [`, digits and semicolons, `m`. 0 if there is none.
fn colour(text: &str) -> usize {
    let Some(inner) = text.strip_prefix("\x1b[") else { return 0 };
    let end = inner.find(|c: char| !c.is_ascii_digit() && c != ';');
    end.filter(|end| inner[*end..].starts_with('m')).map_or(0, |end| 2 + end + 1)
}

/// A text without the `(os error 13)` that the standard library adds to the system's words.
pub(crate) fn plain(text: &str) -> String {
    const TAIL: &str = " (os error ";
    let mut parts = text.split(TAIL);
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.split_once(')') {
            Some((number, rest)) if number.bytes().all(|byte| byte.is_ascii_digit()) => {
                plain.push_str(rest);
            }
            _ => plain.extend([TAIL, part]),
        }
    }
    plain
}

/// Text of a worker for one line of a terminal: control characters are shown, not obeyed.
pub(crate) fn harmless(text: &str) -> String {
    text.chars()
        .flat_map(|c| if is_unseen(c) { c.escape_default().collect() } else { vec![c] })
        .collect()
}

/// The proof at the end of a reload, in one line.
pub(crate) fn reloaded(report: &ReloadReport) -> String {
    let workers = match report.workers {
        1 => "1 worker".to_owned(),
        n => format!("{n} workers"),
    };
    let mut text = format!(
        "reloaded: {workers} replaced in {} ms, {} connections refused, {} reset, slowest wait {} ms",
        report.took.as_millis(),
        report.refused,
        report.reset,
        report.slowest_wait.as_millis()
    );
    match report.cut_short {
        0 => {}
        1 => text.push_str("; 1 worker was still busy when its grace period was over"),
        n => {
            text.push_str(&format!(
                "; {n} workers were still busy when their grace period was over"
            ));
        }
    }
    if !report.abandoned.is_empty() {
        let addresses = addresses(&report.abandoned).join(", ");
        text.push_str(&format!(
            "; nobody listens on {addresses} any more, which is closed unless a worker does within 3 s"
        ));
    }
    text
}

/// As texts.
pub(crate) fn addresses(addresses: &[Address]) -> Vec<String> {
    addresses.iter().map(ToString::to_string).collect()
}

/// `a reload`, `an upgrade`.
pub(crate) fn with_article(word: &str) -> String {
    let article = if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {word}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_their_names() {
        for (number, name) in
            [(1, "SIGHUP"), (9, "SIGKILL"), (11, "SIGSEGV"), (15, "SIGTERM"), (31, "SIGSYS")]
        {
            assert_eq!(signal(number), name);
        }
        for number in [0, -1, 32, 64, i32::MIN] {
            assert_eq!(signal(number), format!("signal {number}"));
        }
    }

    #[test]
    fn a_failed_bind_says_what_on_what_and_what_next() {
        let address: Address = "127.0.0.1:80".parse().unwrap();
        for (kind, code, parts) in [
            (io::ErrorKind::AddrInUse, Code::AddressInUse, ["in use", "ss -ltnp"]),
            (
                io::ErrorKind::PermissionDenied,
                Code::AddressRefused,
                ["not permitted", "CAP_NET_BIND"],
            ),
            (
                io::ErrorKind::AddrNotAvailable,
                Code::AddressRefused,
                ["no such address", "ip address"],
            ),
        ] {
            let error = io::Error::from(kind);
            let text = bind_failed(&address, &error);
            assert_eq!(bind_code(&error), code);
            assert!(
                text.contains("127.0.0.1:80") && parts.iter().all(|p| text.contains(p)),
                "{text}"
            );
        }
    }

    #[test]
    fn numbers_of_system_errors_are_left_out() {
        assert_eq!(plain("a: denied (os error 13)"), "a: denied");
        assert_eq!(plain("a (os error 2); b (os error 13) c"), "a; b c");
        assert_eq!(plain("a (os error x) (os error "), "a (os error x) (os error ");
    }

    #[test]
    fn control_characters_of_workers_are_shown() {
        assert_eq!(harmless("a\x1b[2Jb\n"), "a\\u{1b}[2Jb\\n");
    }

    #[test]
    fn what_turns_or_hides_text_is_shown() {
        let turned = "user\u{202e}nimda\u{2069} a\u{200b}b\u{feff}";
        let shown = "user\\u{202e}nimda\\u{2069} a\\u{200b}b\\u{feff}";
        assert_eq!(harmless(turned), shown);
        assert_eq!(colours_only(turned.as_bytes()), shown);
        // Words of every language, and emoji that are joined.
        for text in ["עברית العربية", "नमस्ते", "می\u{200c}خواهم", "👩\u{200d}💻", "日本語 é"]
        {
            assert_eq!(harmless(text), text);
            assert_eq!(colours_only(text.as_bytes()), text);
        }
    }

    #[test]
    fn only_colours_reach_a_terminal() {
        assert_eq!(colours_only(b"a\x1b[31mred\x1b[0m b"), "a\x1b[31mred\x1b[0m b\x1b[0m");
        assert_eq!(colours_only(b"tab\there"), "tab\there");
        for bad in [
            "\x1b[2J",
            "\x1b]0;title\x07",
            "\x1b[31",
            "\x1bc",
            "\r\x08\x7f",
            "\u{9b}31m",
            "\x1b[?25l",
        ] {
            let shown = colours_only(bad.as_bytes());
            assert!(!shown.contains(|c: char| c.is_control()), "{shown:?}");
        }
        assert_eq!(colours_only(b"\xff"), "\u{fffd}");
    }
}
