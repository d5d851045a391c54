//! The environment variables by which a child learns of its channel and its sockets.
//!
//! Pure functions over pairs of name and value: nothing here reads or changes the process's environment, and
//! nothing checks that a descriptor is open. A child removes the variables before it starts children of its
//! own; [`CHANNEL_VARIABLES`] and [`LISTEN_VARIABLES`] list them.
//!
//! The surprising rule: where Node reads a number leniently, this reads it strictly, as a wrong number would
//! make us take a descriptor that belongs to somebody else.
//!
//! Behaviour follows: Node `lib/internal/process/pre_execution.js`, `src/node_options.cc`
//! (`ParseNodeOptionsEnvVar`); sd_listen_fds(3).

use std::ffi::OsStr;

use crate::error::excerpt;

/// Descriptor of a Node channel, decimal.
pub const NODE_CHANNEL_FD: &str = "NODE_CHANNEL_FD";
/// Form of a Node channel: `json` (also when empty or absent) or `advanced`.
pub const NODE_CHANNEL_SERIALIZATION_MODE: &str = "NODE_CHANNEL_SERIALIZATION_MODE";
/// Number of a cluster worker, decimal; its presence makes a Node process a worker.
pub const NODE_UNIQUE_ID: &str = "NODE_UNIQUE_ID";
/// Options for every Node process that is started, as on its command line.
pub const NODE_OPTIONS: &str = "NODE_OPTIONS";
/// Descriptor of a native channel, decimal.
pub const POLYFORK_CHANNEL_FD: &str = "POLYFORK_CHANNEL_FD";
/// Number of a native worker, decimal, never used again.
pub const POLYFORK_WORKER_ID: &str = "POLYFORK_WORKER_ID";
/// Slot of a native worker, decimal, from 1.
pub const POLYFORK_SLOT: &str = "POLYFORK_SLOT";
/// Shared memory of a native worker: `NAME=DESCRIPTOR` each, separated by commas.
pub const POLYFORK_MEMORY: &str = "POLYFORK_MEMORY";
/// Where a primary that takes the place of another finds its state: `PID:DESCRIPTOR`, good for that process alone.
pub const POLYFORK_STATE: &str = "POLYFORK_STATE";
/// How often a worker is to say that it is alive, in milliseconds. Absent: never.
pub const POLYFORK_BEAT_MS: &str = "POLYFORK_BEAT_MS";
/// After how many requests a Node worker is to say so. Absent: they are not counted.
pub const POLYFORK_REQUESTS: &str = "POLYFORK_REQUESTS";
/// Whether a Node worker may end when it has nothing left to do, though its channel is open: 1. Absent: it may not.
pub const POLYFORK_MAY_END: &str = "POLYFORK_MAY_END";
/// How many sockets are passed, from descriptor 3 on.
pub const LISTEN_FDS: &str = "LISTEN_FDS";
/// The process for which the sockets are meant.
pub const LISTEN_PID: &str = "LISTEN_PID";
/// Names of the sockets, separated by colons.
pub const LISTEN_FDNAMES: &str = "LISTEN_FDNAMES";
/// Where notifications go, see [`crate::notify`].
pub const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// What a child must not pass on to its own children after it has found its channel.
pub const CHANNEL_VARIABLES: [&str; 7] = [
    NODE_CHANNEL_FD,
    NODE_CHANNEL_SERIALIZATION_MODE,
    NODE_UNIQUE_ID,
    POLYFORK_CHANNEL_FD,
    POLYFORK_WORKER_ID,
    POLYFORK_SLOT,
    POLYFORK_MEMORY,
];

/// What a child must not pass on to its own children after it has found its sockets.
pub const LISTEN_VARIABLES: [&str; 3] = [LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES];

/// The first descriptor that is passed by `LISTEN_FDS`.
pub const LISTEN_FDS_START: i32 = 3;

/// Most sockets that `LISTEN_FDS` may announce.
pub const MAX_LISTEN_FDS: u32 = 65_536;

/// A variable that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("environment variable {name}=\"{value}\" {why}")]
pub struct EnvError {
    /// The variable.
    pub name: &'static str,
    /// The first 64 bytes of its value, escaped.
    pub value: String,
    /// What is wrong with it; reads well after the value.
    pub why: &'static str,
}

/// How messages of a Node channel are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SerializationMode {
    /// JSON lines.
    #[default]
    Json,
    /// Frames of V8's serializer.
    Advanced,
}

/// The channel to a Node parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeChannel {
    /// Descriptor number.
    pub fd: i32,
    /// Form of the messages.
    pub mode: SerializationMode,
    /// Number of the cluster worker, if the process is one.
    pub unique_id: Option<u64>,
}

/// The channel to a native primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NativeChannel {
    /// Descriptor number.
    pub fd: i32,
    /// Number of the worker.
    pub worker: u64,
    /// Its slot, from 1.
    pub slot: u32,
}

/// The sockets that were passed on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListenFds {
    /// One name for each descriptor from [`LISTEN_FDS_START`] on; `unknown` where none was given.
    pub names: Vec<String>,
}

/// The channel to a Node parent, or `None` without [`NODE_CHANNEL_FD`] or when it is empty.
///
/// # Errors
///
/// A descriptor or id that is not a plain decimal number, or an unknown form.
pub fn node_channel<K, V>(
    variables: impl IntoIterator<Item = (K, V)>,
) -> Result<Option<NodeChannel>, EnvError>
where
    K: AsRef<OsStr>,
    V: AsRef<OsStr>,
{
    let [fd, mode, id] =
        find(variables, [NODE_CHANNEL_FD, NODE_CHANNEL_SERIALIZATION_MODE, NODE_UNIQUE_ID]);
    let Some(fd) = fd.not_empty() else { return Ok(None) };
    Ok(Some(NodeChannel {
        fd: fd.descriptor()?,
        mode: mode.not_empty().map_or(Ok(SerializationMode::Json), |mode| mode.mode())?,
        unique_id: id.not_empty().map(|id| id.number(u64::MAX)).transpose()?,
    }))
}

/// The channel to a native primary, or `None` without [`POLYFORK_CHANNEL_FD`] or when it is empty.
///
/// # Errors
///
/// A number that is missing or not a plain decimal one, or slot 0.
pub fn native_channel<K, V>(
    variables: impl IntoIterator<Item = (K, V)>,
) -> Result<Option<NativeChannel>, EnvError>
where
    K: AsRef<OsStr>,
    V: AsRef<OsStr>,
{
    let [fd, worker, slot] =
        find(variables, [POLYFORK_CHANNEL_FD, POLYFORK_WORKER_ID, POLYFORK_SLOT]);
    let Some(fd) = fd.not_empty() else { return Ok(None) };
    let fd = fd.descriptor()?;
    let worker = worker.number(u64::MAX)?;
    let slot = match u32::try_from(slot.number(u64::from(u32::MAX))?) {
        Ok(number) if number > 0 => number,
        _ => return Err(slot.error("must be a slot, from 1")),
    };
    Ok(Some(NativeChannel { fd, worker, slot }))
}

/// The sockets meant for process `own_pid`, or `None` without [`LISTEN_FDS`] or when [`LISTEN_PID`] names
/// another process. Without a `LISTEN_PID` they are taken to be meant for it.
///
/// # Errors
///
/// A number that is not a plain decimal one, more than [`MAX_LISTEN_FDS`], or names of another number.
pub fn listen_fds<K, V>(
    variables: impl IntoIterator<Item = (K, V)>,
    own_pid: u32,
) -> Result<Option<ListenFds>, EnvError>
where
    K: AsRef<OsStr>,
    V: AsRef<OsStr>,
{
    let [count, pid, names] = find(variables, [LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES]);
    let Some(count) = count.not_empty() else { return Ok(None) };
    if let Some(pid) = pid.not_empty()
        && pid.number(u64::from(u32::MAX))? != u64::from(own_pid)
    {
        return Ok(None);
    }
    let count = count.number(u64::from(MAX_LISTEN_FDS))?;
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let names = match names.not_empty() {
        None => vec!["unknown".to_owned(); count],
        Some(names) => {
            let list = names.names();
            if list.len() != count {
                return Err(names.error("must have as many names as LISTEN_FDS has sockets"));
            }
            list
        }
    };
    Ok(Some(ListenFds { names }))
}

/// Adds one argument to the value of [`NODE_OPTIONS`], quoted if it needs to be. What is there stays as it is.
///
/// Node splits the value at blanks; within double quotes a backslash makes the next character an ordinary
/// one. A value that Node refuses, as a quote is left open, is returned unchanged: added to, it might
/// mean something.
///
/// ```
/// use polyfork_wire::env::append_node_options;
///
/// assert_eq!(append_node_options(None, "--require=/a.js"), "--require=/a.js");
/// assert_eq!(
///     append_node_options(Some("--no-warnings"), "--require=/my app/a.js"),
///     r#"--no-warnings "--require=/my app/a.js""#
/// );
/// ```
#[must_use]
pub fn append_node_options(existing: Option<&str>, extra: &str) -> String {
    let existing = existing.unwrap_or_default();
    let mut options = existing.to_owned();
    if extra.is_empty() || split_node_options(existing).is_err() {
        return options;
    }
    if !options.is_empty() && !options.ends_with(' ') {
        options.push(' ');
    }
    if !extra.contains([' ', '"']) {
        // Outside of quotes a backslash is an ordinary character.
        options.push_str(extra);
        return options;
    }
    options.push('"');
    for character in extra.chars() {
        if matches!(character, '"' | '\\') {
            options.push('\\');
        }
        options.push(character);
    }
    options.push('"');
    options
}

/// The arguments in a value of [`NODE_OPTIONS`], as Node splits it.
///
/// # Errors
///
/// A quote that is left open, or a backslash with nothing after it; Node does not start then.
pub fn split_node_options(options: &str) -> Result<Vec<String>, EnvError> {
    let error = |why| EnvError { name: NODE_OPTIONS, value: excerpt(options.as_bytes()), why };
    let mut arguments: Vec<String> = Vec::new();
    let (mut quoted, mut between) = (false, true);
    let mut characters = options.chars();
    while let Some(mut character) = characters.next() {
        match character {
            '\\' if quoted => {
                character = characters.next().ok_or_else(|| error("ends with a backslash"))?;
            }
            ' ' if !quoted => {
                between = true;
                continue;
            }
            '"' => {
                quoted = !quoted;
                continue;
            }
            _ => {}
        }
        match arguments.last_mut() {
            Some(last) if !between => last.push(character),
            _ => arguments.push(character.into()),
        }
        between = false;
    }
    if quoted { Err(error("has a quote that is not closed")) } else { Ok(arguments) }
}

/// A variable and its value; the last one wins when it is there twice.
struct Variable {
    name: &'static str,
    value: Option<Vec<u8>>,
}

fn find<K: AsRef<OsStr>, V: AsRef<OsStr>, const N: usize>(
    variables: impl IntoIterator<Item = (K, V)>,
    names: [&'static str; N],
) -> [Variable; N] {
    let mut found = names.map(|name| Variable { name, value: None });
    for (name, value) in variables {
        if let Some(slot) = found.iter_mut().find(|variable| name.as_ref() == variable.name) {
            slot.value = Some(value.as_ref().as_encoded_bytes().to_vec());
        }
    }
    found
}

impl Variable {
    fn not_empty(&self) -> Option<&Self> {
        self.value.as_ref().filter(|value| !value.is_empty()).map(|_| self)
    }

    fn bytes(&self) -> &[u8] {
        self.value.as_deref().unwrap_or_default()
    }

    /// Decimal digits and nothing else.
    fn number(&self, most: u64) -> Result<u64, EnvError> {
        let bytes = self.bytes();
        if bytes.is_empty() {
            return Err(self.error("is missing"));
        }
        if !bytes.iter().all(u8::is_ascii_digit) {
            return Err(self.error("is not a decimal number"));
        }
        std::str::from_utf8(bytes)
            .ok()
            .and_then(|digits| digits.parse().ok())
            .filter(|number| *number <= most)
            .ok_or_else(|| self.error("is too large a number"))
    }

    fn descriptor(&self) -> Result<i32, EnvError> {
        let number = self.number(u64::from(i32::MAX.unsigned_abs()))?;
        i32::try_from(number).map_err(|_| self.error("is too large a number"))
    }

    fn mode(&self) -> Result<SerializationMode, EnvError> {
        match self.bytes() {
            b"json" => Ok(SerializationMode::Json),
            b"advanced" => Ok(SerializationMode::Advanced),
            _ => Err(self.error("must be json or advanced")),
        }
    }

    fn names(&self) -> Vec<String> {
        self.bytes()
            .split(|byte| *byte == b':')
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect()
    }

    fn error(&self, why: &'static str) -> EnvError {
        EnvError { name: self.name, value: excerpt(self.bytes()), why }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Pairs<'a> = &'a [(&'a str, &'a str)];

    fn node(variables: Pairs<'_>) -> Result<Option<NodeChannel>, EnvError> {
        node_channel(variables.iter().copied())
    }

    fn native(variables: Pairs<'_>) -> Result<Option<NativeChannel>, EnvError> {
        native_channel(variables.iter().copied())
    }

    fn listen(variables: Pairs<'_>) -> Result<Option<Vec<String>>, EnvError> {
        listen_fds(variables.iter().copied(), 77).map(|fds| fds.map(|fds| fds.names))
    }

    #[test]
    fn node_channel_is_found() {
        let channel = |mode, unique_id| Ok(Some(NodeChannel { fd: 3, mode, unique_id }));
        let fd = (NODE_CHANNEL_FD, "3");
        assert_eq!(node(&[]), Ok(None));
        assert_eq!(node(&[(NODE_CHANNEL_FD, ""), (NODE_UNIQUE_ID, "x")]), Ok(None));
        assert_eq!(node(&[fd, ("PATH", "/bin")]), channel(SerializationMode::Json, None));
        let mode = |mode| (NODE_CHANNEL_SERIALIZATION_MODE, mode);
        assert_eq!(node(&[fd, mode("")]), channel(SerializationMode::Json, None));
        assert_eq!(node(&[fd, mode("json")]), channel(SerializationMode::Json, None));
        assert_eq!(node(&[mode("advanced"), fd]), channel(SerializationMode::Advanced, None));
        assert_eq!(node(&[fd, (NODE_UNIQUE_ID, "12")]), channel(SerializationMode::Json, Some(12)));
    }

    #[test]
    fn native_channel_is_found() {
        let all = [(POLYFORK_CHANNEL_FD, "0"), (POLYFORK_WORKER_ID, "9"), (POLYFORK_SLOT, "2")];
        assert_eq!(native(&all), Ok(Some(NativeChannel { fd: 0, worker: 9, slot: 2 })));
        assert_eq!(native(&all[1..]), Ok(None));
        let error = native(&all[..2]).expect_err("the slot is missing");
        assert_eq!(error.to_string(), "environment variable POLYFORK_SLOT=\"\" is missing");
        assert!(native(&[all[0], all[1], (POLYFORK_SLOT, "0")]).is_err());
        assert!(native(&[all[0], all[1], (POLYFORK_SLOT, "4294967296")]).is_err());
    }

    #[test]
    fn hostile_numbers_are_refused_in_words() {
        for (value, why) in [
            ("-1", "is not a decimal number"),
            ("+3", "is not a decimal number"),
            (" 3", "is not a decimal number"),
            ("3x", "is not a decimal number"),
            ("0x3", "is not a decimal number"),
            ("3.0", "is not a decimal number"),
            ("٣", "is not a decimal number"),
            ("2147483648", "is too large a number"),
            ("99999999999999999999999999", "is too large a number"),
        ] {
            let error = node(&[(NODE_CHANNEL_FD, value)]).expect_err(value);
            assert_eq!((error.name, error.why), (NODE_CHANNEL_FD, why), "{value}");
            assert!(error.to_string().is_ascii());
        }
        let error = node(&[(NODE_CHANNEL_FD, "3"), (NODE_CHANNEL_SERIALIZATION_MODE, "\u{1b}x")]);
        assert_eq!(
            error.expect_err("no such mode").to_string(),
            r#"environment variable NODE_CHANNEL_SERIALIZATION_MODE="\x1bx" must be json or advanced"#
        );
    }

    #[test]
    fn last_of_a_repeated_variable_counts() {
        let twice = [(NODE_CHANNEL_FD, "3"), (NODE_CHANNEL_FD, "4")];
        assert_eq!(node(&twice).map(|channel| channel.map(|channel| channel.fd)), Ok(Some(4)));
    }

    #[test]
    fn sockets_are_found_with_their_names() {
        let names = |names: &[&str]| Ok(Some(names.iter().map(|&name| name.to_owned()).collect()));
        assert_eq!(listen(&[]), Ok(None));
        assert_eq!(listen(&[(LISTEN_FDS, "0")]), names(&[]));
        assert_eq!(
            listen(&[(LISTEN_FDS, "2"), (LISTEN_PID, "77")]),
            names(&["unknown", "unknown"])
        );
        assert_eq!(
            listen(&[(LISTEN_FDS, "2"), (LISTEN_FDNAMES, "web:admin")]),
            names(&["web", "admin"])
        );
        assert_eq!(listen(&[(LISTEN_FDS, "1"), (LISTEN_PID, "78")]), Ok(None));
    }

    #[test]
    fn wrong_numbers_of_sockets_are_refused() {
        assert!(listen(&[(LISTEN_FDS, "65537")]).is_err());
        assert!(listen(&[(LISTEN_FDS, "1"), (LISTEN_PID, "self")]).is_err());
        assert!(listen(&[(LISTEN_FDS, "1"), (LISTEN_FDNAMES, "a:b")]).is_err());
        assert!(listen(&[(LISTEN_FDS, "2"), (LISTEN_FDNAMES, "a")]).is_err());
    }

    #[test]
    fn options_are_appended_and_never_replaced() {
        let path = r#"--require=/my "app"\x.js"#;
        let quoted = r#""--require=/my \"app\"\\x.js""#;
        assert_eq!(append_node_options(None, path), quoted);
        assert_eq!(append_node_options(Some(""), path), quoted);
        assert_eq!(append_node_options(Some("-r ./a"), path), format!("-r ./a {quoted}"));
        assert_eq!(append_node_options(Some("-r ./a "), path), format!("-r ./a {quoted}"));
        assert_eq!(
            append_node_options(Some("-r ./a"), r"--require=C:\x"),
            r"-r ./a --require=C:\x"
        );
        assert_eq!(append_node_options(Some("-r ./a"), ""), "-r ./a");
    }

    #[test]
    fn options_that_node_refuses_stay_as_they_are() {
        for broken in ["\"-r ./a", "\"-r ./a\\", "\"-r ./a\\\""] {
            assert!(split_node_options(broken).is_err());
            assert_eq!(append_node_options(Some(broken), "--x"), broken);
        }
    }

    #[test]
    fn options_are_split_as_node_does() {
        let split = |options| split_node_options(options).expect(options);
        assert_eq!(split(""), [""; 0]);
        assert_eq!(split("   "), [""; 0]);
        assert_eq!(split(" a  b "), ["a", "b"]);
        assert_eq!(split(r#"a"b c"d"#), ["ab cd"]);
        assert_eq!(split(r#"a\ b "\a\\\"" "#), [r"a\", "b", r#"a\""#]);
        assert_eq!(split("a\tb\nc"), ["a\tb\nc"]);
        // An empty quoted argument disappears in Node.
        assert_eq!(split(r#"a "" b"#), ["a", "b"]);
    }

    proptest! {
        #[test]
        fn appended_option_is_found_again(
            existing in prop::option::of("[a \"\\\\é-]{0,20}"), extra in "[a \"\\\\é\t-]{1,20}"
        ) {
            let before = split_node_options(existing.as_deref().unwrap_or_default());
            let options = append_node_options(existing.as_deref(), &extra);
            prop_assert!(options.starts_with(existing.as_deref().unwrap_or_default()));
            match before {
                Ok(mut arguments) => {
                    arguments.push(extra);
                    prop_assert_eq!(split_node_options(&options), Ok(arguments));
                }
                Err(_) => prop_assert_eq!(Some(options), existing),
            }
        }

        #[test]
        fn garbage_never_panics(values in prop::collection::vec(any::<String>(), 6), options in any::<String>()) {
            let names = [CHANNEL_VARIABLES, [LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES, "", "", "", ""]].concat();
            let pairs: Vec<_> = names.iter().zip(values.iter().cycle()).collect();
            let _ = node_channel(pairs.iter().copied());
            let _ = native_channel(pairs.iter().copied());
            let _ = listen_fds(pairs.iter().copied(), 1);
            let _ = split_node_options(&options);
        }
    }
}
