//! The text of unit files.
//!
//! Two kinds of lines: what a service of this kind needs, and what it can do without. The latter only as far as any program
//! can live with it: no line here stops a just-in-time compiler, hides the program's own folder, or keeps it from the
//! network. For the service manager of a user there are fewer, since it may not make the rest.
//!
//! The surprising rule: in a unit `%` means something everywhere, and `$` in command lines; they are doubled in whatever
//! comes from elsewhere.
//!
//! References: systemd.service(5) ("Command lines"), systemd.syntax(7), systemd.exec(5).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use polyfork::cluster::Address;

use crate::control::name::Name;
use crate::exit::Code;

/// After the grace period: SIGTERM, two seconds, SIGKILL; then systemd's turn.
const BEYOND_GRACE: Duration = Duration::from_secs(10);
/// Beyond the time that a worker has to get ready: slots are given up after a few attempts.
const BEYOND_READY: Duration = Duration::from_secs(300);
/// More addresses than a program listens on.
const MOST_KEPT: u32 = 64;
/// What `--user` needs: to bind, to load, and to become somebody else.
const CAPABILITIES: &str = "CAP_NET_BIND_SERVICE CAP_BPF CAP_NET_ADMIN CAP_SETUID CAP_SETGID CAP_SETPCAP CAP_CHOWN \
                            CAP_DAC_OVERRIDE CAP_FOWNER";
/// Starting again would end the same way.
const HOPELESS: [Code; 5] =
    [Code::Usage, Code::NoProgram, Code::NoRuntime, Code::AlreadyRunning, Code::NoFolder];

/// What a unit is made for.
pub(super) struct App {
    pub(super) name: Name,
    /// This very program.
    pub(super) program: PathBuf,
    /// What follows `polyfork run`, without the name.
    pub(super) words: Vec<OsString>,
    pub(super) directory: PathBuf,
    pub(super) user_unit: bool,
    pub(super) sockets: Vec<Address>,
    pub(super) watchdog: Option<Duration>,
    pub(super) grace: Duration,
    pub(super) ready_timeout: Option<Duration>,
    pub(super) changes_user: bool,
    pub(super) path: Option<OsString>,
    /// Options that were given as variables.
    pub(super) variables: Vec<(OsString, OsString)>,
    /// Where apps are found, if not where they usually are.
    pub(super) runtime: Option<OsString>,
    /// Its words may hold what is nobody's business.
    pub(super) secret: bool,
}

/// A file.
#[derive(Debug)]
pub(super) struct Unit {
    pub(super) file: String,
    pub(super) text: String,
    /// Only its owner is to read it.
    pub(super) secret: bool,
}

/// The units of an app: the service, and its sockets if systemd is to listen.
pub(super) fn of(app: &App) -> Vec<Unit> {
    let stem = stem(&app.name);
    let text = service(app, &stem);
    let mut units = vec![Unit { file: format!("{stem}.service"), text, secret: app.secret }];
    if !app.sockets.is_empty() {
        units.push(Unit { file: format!("{stem}.socket"), text: socket(app), secret: false });
    }
    units
}

/// A unit's name has fewer letters than an app's: `@` would make it a template.
fn stem(name: &Name) -> String {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let name: String = name.as_str().chars().map(|c| if fits(c) { c } else { '-' }).collect();
    format!("polyfork-{name}")
}

fn service(app: &App, stem: &str) -> String {
    let mut lines = Lines::default();
    lines.add("[Unit]");
    lines.set("Description", &format!("{} (polyfork)", app.name));
    lines.set("Documentation", "man:polyfork-run(1)");
    lines.set("After", "network.target");
    if !app.sockets.is_empty() {
        lines.set("Requires", &format!("{stem}.socket"));
        lines.set("After", &format!("{stem}.socket"));
    }
    lines.add("");
    lines.add("[Service]");
    lines.set("Type", "notify");
    lines.set("NotifyAccess", "main");
    lines.set("ExecStart", &start_line(app));
    lines.set("ExecReload", &command(app, &["reload", app.name.as_str()]));
    lines.set("WorkingDirectory", &plain(app.directory.as_os_str()));
    environment(&mut lines, app);
    lines.set("Restart", "on-failure");
    lines.set("RestartSec", "1s");
    lines.set("RestartPreventExitStatus", &HOPELESS.map(|code| (code as u8).to_string()).join(" "));
    let start =
        app.ready_timeout.map_or("infinity".to_owned(), |limit| seconds(limit + BEYOND_READY));
    lines.set("TimeoutStartSec", &start);
    lines.set("TimeoutStopSec", &seconds(app.grace + BEYOND_GRACE));
    if let Some(limit) = app.watchdog {
        lines.set("WatchdogSec", &seconds(limit));
    }
    lines.set("KillMode", "mixed");
    lines.set("OOMPolicy", "continue");
    lines.set("LimitNOFILE", "65536");
    lines.set("FileDescriptorStoreMax", &MOST_KEPT.to_string());
    // What systemd says by itself from 254 on; older ones have the store and keep silent.
    lines.set("Environment", &assignment("FDSTORE", MOST_KEPT.to_string().as_ref()));
    harden(&mut lines, app);
    lines.add("");
    lines.add("[Install]");
    lines.set("WantedBy", if app.user_unit { "default.target" } else { "multi-user.target" });
    lines.0
}

fn environment(lines: &mut Lines, app: &App) {
    if let Some(path) = &app.path {
        lines.set("Environment", &assignment("PATH", path));
    }
    for (name, value) in &app.variables {
        lines.set("Environment", &assignment(&name.to_string_lossy(), value));
    }
    match &app.runtime {
        Some(folder) => lines.set("Environment", &assignment("POLYFORK_RUNTIME_DIR", folder)),
        None => {
            lines.set("RuntimeDirectory", "polyfork");
            lines.set("RuntimeDirectoryMode", "0700");
            lines.set("RuntimeDirectoryPreserve", "yes");
        }
    }
}

fn harden(lines: &mut Lines, app: &App) {
    lines.set("NoNewPrivileges", "yes");
    lines.set("RestrictSUIDSGID", "yes");
    lines.set("RestrictRealtime", "yes");
    lines.set("LockPersonality", "yes");
    lines.set("SystemCallArchitectures", "native");
    if app.user_unit {
        return;
    }
    lines.set("ProtectSystem", "full");
    lines.set("ProtectClock", "yes");
    lines.set("ProtectControlGroups", "yes");
    lines.set("ProtectKernelLogs", "yes");
    lines.set("ProtectKernelModules", "yes");
    lines.set("ProtectKernelTunables", "yes");
    lines.set("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX AF_NETLINK");
    if app.changes_user {
        lines.set("CapabilityBoundingSet", CAPABILITIES);
    }
}

fn socket(app: &App) -> String {
    let mut lines = Lines::default();
    lines.add("[Unit]");
    lines.set("Description", &format!("Sockets of {} (polyfork)", app.name));
    lines.add("");
    lines.add("[Socket]");
    for address in &app.sockets {
        match address {
            Address::Unix(path) => lines.set("ListenStream", &plain(&unix(path))),
            other => lines.set("ListenStream", &other.to_string()),
        }
    }
    lines.set("Backlog", "4096");
    lines.add("");
    lines.add("[Install]");
    lines.set("WantedBy", "sockets.target");
    lines.0
}

/// A path, or `@` and an abstract name.
fn unix(path: &Path) -> OsString {
    match path.as_os_str().as_bytes().split_first() {
        Some((0, name)) => OsString::from_vec([b"@", name].concat()),
        _ => path.as_os_str().to_owned(),
    }
}

fn start_line(app: &App) -> String {
    let mut line = command(app, &["run", "--name", app.name.as_str()]);
    for word in &app.words {
        line.push(' ');
        line.push_str(&quoted(word, "$$"));
    }
    line
}

fn command(app: &App, words: &[&str]) -> String {
    let words = words.iter().map(|word| quoted(OsStr::new(word), "$$"));
    let program = quoted(app.program.as_os_str(), "$$");
    std::iter::once(program).chain(words).collect::<Vec<_>>().join(" ")
}

fn assignment(name: &str, value: &OsStr) -> String {
    let mut text = OsString::from(name);
    text.push("=");
    text.push(value);
    quoted(&text, "$")
}

fn seconds(time: Duration) -> String {
    match time.subsec_millis() {
        0 => format!("{}s", time.as_secs()),
        _ => format!("{}ms", time.as_millis()),
    }
}

/// A word, as systemd reads it; `dollar` stands for a `$`.
fn quoted(word: &OsStr, dollar: &str) -> String {
    let harmless = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_./:=,@+".contains(byte);
    let bytes = word.as_bytes();
    if !bytes.is_empty() && bytes.iter().all(harmless) {
        return word.to_string_lossy().into_owned();
    }
    let mut text = String::from("\"");
    for byte in bytes {
        match byte {
            b'"' => text.push_str("\\\""),
            b'\\' => text.push_str("\\\\"),
            b'%' => text.push_str("%%"),
            b'$' => text.push_str(dollar),
            b' '..=b'~' => text.push(char::from(*byte)),
            other => text.push_str(&format!("\\x{other:02x}")),
        }
    }
    text.push('"');
    text
}

/// The value of a setting that is no command line: only `%` means something.
fn plain(value: &OsStr) -> String {
    value.to_string_lossy().replace('%', "%%")
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, line: &str) {
        self.0.push_str(line);
        self.0.push('\n');
    }

    /// Nothing that comes from elsewhere can begin a line of its own.
    fn set(&mut self, name: &str, value: &str) {
        let value = value.replace(['\n', '\r', '\0'], " ");
        self.add(&format!("{name}={value}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app() -> App {
        App {
            name: Name::read("shop@2").unwrap(),
            program: "/usr/bin/polyfork".into(),
            words: ["--env", "GREETING=50% \"off\" $HOME", "server.js"].map(OsString::from).into(),
            directory: "/srv/100%".into(),
            user_unit: false,
            sockets: vec!["127.0.0.1:80".parse().unwrap(), "unix:@name".parse().unwrap()],
            watchdog: Some(Duration::from_secs(30)),
            grace: Duration::from_millis(1500),
            ready_timeout: None,
            changes_user: true,
            path: Some("/opt/node $1/bin:/usr/bin".into()),
            variables: vec![("POLYFORK_PROBE".into(), "/health?50%".into())],
            runtime: None,
            secret: true,
        }
    }

    #[test]
    fn nothing_in_a_word_means_anything_to_systemd() {
        let text = service(&app(), "polyfork-shop-2");
        let line = "ExecStart=/usr/bin/polyfork run --name shop@2 --env \"GREETING=50%% \\\"off\\\" $$HOME\" server.js\n";
        assert!(text.contains(line), "{text}");
        assert!(text.contains("\nWorkingDirectory=/srv/100%%\n"), "{text}");
        assert!(
            text.contains("\nEnvironment=\"POLYFORK_PROBE=/health?50%%\"\n")
                || text.contains("\nEnvironment=POLYFORK_PROBE=/health?50%%\n"),
            "{text}"
        );
        assert!(text.contains("\nEnvironment=\"PATH=/opt/node $1/bin:/usr/bin\"\n"), "{text}");
        assert_eq!(quoted(OsStr::new("a\nb"), "$$"), "\"a\\x0ab\"");
        assert_eq!(quoted(OsStr::new(""), "$$"), "\"\"");
    }

    #[test]
    fn what_comes_from_elsewhere_begins_no_line() {
        let directory = "/srv\nExecStartPre=/bin/evil".into();
        let text = service(&App { directory, ..app() }, "x");
        assert!(!text.lines().any(|line| line.starts_with("ExecStartPre")), "{text}");
    }

    #[test]
    fn times_leave_room_for_the_grace_period() {
        let text = service(&app(), "x");
        assert!(text.contains("\nTimeoutStopSec=11500ms\n"), "{text}");
        assert!(text.contains("\nRestartPreventExitStatus=2 3 4 11 14\n"), "{text}");
    }

    #[test]
    fn a_socket_unit_has_every_address() {
        let units = of(&app());
        assert_eq!(units[0].file, "polyfork-shop-2.service");
        assert_eq!(units[1].file, "polyfork-shop-2.socket");
        assert!(units[1].text.contains("\nListenStream=127.0.0.1:80\nListenStream=@name\n"));
        assert!(units[0].text.contains("\nRequires=polyfork-shop-2.socket\n"));
    }
}
