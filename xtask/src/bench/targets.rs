//! The servers that are compared, and how each is started, known to be ready, and stopped.
//!
//! What is measured on them stands elsewhere. Each start takes a fresh port on loopback; stopping is
//! by dropping [`Running`], which ends the whole tree by pid.
//!
//! Surprising: PM2's command starts a daemon that detaches itself. As the chore is a child subreaper
//! that daemon is still below us; its home is a folder of its own that goes with it, so a PM2 of the
//! user is never touched.
//!
//! Source: the manuals of Node's cluster, PM2 and axum; `polyfork run --help`.

use std::ffi::OsString;
use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use super::measure;
use crate::paths;
use crate::proc::{self, Started};
use crate::setup::manifest::{Manifest, Tool};

/// A server that is not ready after this long is left out.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// A release build may take this long.
const BUILD_LIMIT: Duration = Duration::from_secs(1800);
/// Pause between two looks at a server that starts.
const POLL: Duration = Duration::from_millis(20);

/// A kind of server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Family {
    /// The Node program alone: one process.
    Plain,
    /// Node's cluster, its default policy.
    Cluster,
    /// Node's cluster with `SCHED_NONE`.
    ClusterNone,
    /// Independent Node processes on one reuse-port, as nginx does it.
    Reuseport,
    /// PM2's cluster mode.
    Pm2,
    /// polyfork, turns by the kernel.
    Kernel,
    /// The same with a short limit for what a worker may leave unread.
    KernelQuick,
    /// polyfork, turns by handing connections over.
    Handoff,
    /// polyfork, one shared socket.
    Shared,
    /// axum on tokio's multi-thread runtime.
    AxumTokio,
    /// axum in a polyfork cluster.
    Axum,
}

impl Family {
    /// All, in the order of the report.
    pub(super) const ALL: [Self; 11] = [
        Self::Plain,
        Self::Cluster,
        Self::ClusterNone,
        Self::Reuseport,
        Self::Pm2,
        Self::Kernel,
        Self::KernelQuick,
        Self::Handoff,
        Self::Shared,
        Self::AxumTokio,
        Self::Axum,
    ];

    /// Name on the command line and in the JSON report.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Cluster => "cluster",
            Self::ClusterNone => "cluster-none",
            Self::Reuseport => "reuseport",
            Self::Pm2 => "pm2",
            Self::Kernel => "kernel",
            Self::KernelQuick => "kernel-quick",
            Self::Handoff => "handoff",
            Self::Shared => "shared",
            Self::AxumTokio => "axum-tokio",
            Self::Axum => "axum",
        }
    }

    /// Name in a table.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Plain => "one Node process",
            Self::Cluster => "Node cluster (default)",
            Self::ClusterNone => "Node cluster (none)",
            Self::Reuseport => "plain reuse-port",
            Self::Pm2 => "PM2 -i",
            Self::Kernel => "polyfork kernel",
            Self::KernelQuick => "kernel, ack limit 10 ms",
            Self::Handoff => "polyfork handoff",
            Self::Shared => "polyfork shared",
            Self::AxumTokio => "axum, tokio threads",
            Self::Axum => "axum, polyfork cluster",
        }
    }

    /// The family of that name.
    ///
    /// # Errors
    /// Names the word that is none.
    pub(super) fn parse(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|family| family.name() == name.trim());
        found.with_context(|| format!("no server `{name}`; see --help"))
    }

    /// Whether its workers are Node.
    pub(super) fn is_node(self) -> bool {
        !matches!(self, Self::AxumTokio | Self::Axum)
    }

    /// The server that its ratios are against.
    pub(super) fn baseline(self) -> Self {
        if self.is_node() { Self::Cluster } else { Self::AxumTokio }
    }

    /// Whether it takes part when a worker stalls.
    pub(super) fn in_stall_scenario(self) -> bool {
        matches!(
            self,
            Self::Cluster | Self::Reuseport | Self::Kernel | Self::KernelQuick | Self::Handoff
        )
    }

    /// Whether a primary stands beside the workers.
    fn has_primary(self) -> bool {
        !matches!(self, Self::Plain | Self::Reuseport | Self::AxumTokio)
    }

    /// Options of `polyfork run` for this family.
    fn polyfork_options(self) -> Option<&'static [&'static str]> {
        match self {
            Self::Kernel => Some(&["--policy", "round-robin", "--mechanism", "kernel"]),
            Self::KernelQuick => Some(&["--mechanism", "kernel", "--ack-limit", "10ms"]),
            Self::Handoff => Some(&["--policy", "round-robin", "--mechanism", "handoff"]),
            Self::Shared => Some(&["--policy", "shared", "--mechanism", "auto"]),
            _ => None,
        }
    }
}

/// One server to measure: a family, and the Node it runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// What it is.
    pub(super) family: Family,
    /// Node line, `20` or `26`; `None` for native servers.
    pub(super) node_line: Option<String>,
    /// The program that is started, by absolute path.
    program: PathBuf,
    /// PM2's script, polyfork's binary, or nothing.
    tool: Option<PathBuf>,
}

/// What is to be measured.
pub(super) struct Plan<'a> {
    /// What the set-up found.
    pub(super) manifest: &'a Manifest,
    /// Servers.
    pub(super) families: &'a [Family],
    /// Node lines.
    pub(super) node_lines: &'a [&'a str],
}

impl Plan<'_> {
    /// The targets, all programs built; one that cannot be had is told and left out.
    ///
    /// # Errors
    /// When the user interrupts a build.
    pub(super) fn targets(&self) -> Result<Vec<Target>> {
        let mut targets = Vec::new();
        let binaries = Binaries::default();
        for line in self.node_lines {
            for family in self.families.iter().filter(|family| family.is_node()) {
                self.add(&mut targets, *family, Some(line), &binaries)?;
            }
        }
        for family in self.families.iter().filter(|family| !family.is_node()) {
            self.add(&mut targets, *family, None, &binaries)?;
        }
        Ok(targets)
    }

    fn add(
        &self,
        targets: &mut Vec<Target>,
        family: Family,
        line: Option<&str>,
        binaries: &Binaries,
    ) -> Result<()> {
        match self.target(family, line, binaries) {
            Ok(target) => targets.push(target),
            Err(error) => println!("{:<26} left out: {error:#}", title(family, line)),
        }
        proc::check_interrupted()
    }

    fn target(&self, family: Family, line: Option<&str>, binaries: &Binaries) -> Result<Target> {
        let node = line.map(|line| self.manifest.tool(&format!("node{line}"))).transpose()?;
        let tool = match family {
            Family::Pm2 => Some(self.manifest.tool("pm2")?.path.clone()),
            family if family.polyfork_options().is_some() => Some(binaries.polyfork()?),
            _ => None,
        };
        if let Some(node) = node.filter(|_| family == Family::Reuseport) {
            ensure!(has_reuse_port(node), "listen({{reusePort}}) needs Node 22.12");
        }
        let program = match (family, node) {
            (Family::AxumTokio, _) => binaries.axum_tokio()?,
            (Family::Axum, _) => binaries.axum_cluster()?,
            (_, Some(node)) => node.path.clone(),
            (_, None) => bail!("needs a Node"),
        };
        Ok(Target { family, node_line: line.map(str::to_owned), program, tool })
    }
}

fn title(family: Family, line: Option<&str>) -> String {
    match line {
        Some(line) => format!("{}, Node {line}", family.title()),
        None => family.title().to_owned(),
    }
}

/// `listen({reusePort})` came with Node 23.1 and 22.12.
fn has_reuse_port(node: &Tool) -> bool {
    let mut parts = node.version.split('.').map_while(|part| part.parse::<u32>().ok());
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    version >= (23, 1) || (version.0 == 22 && version.1 >= 12)
}

/// Programs of this workspace, each built once, when first asked for.
#[derive(Default)]
struct Binaries {
    polyfork: Build,
    axum_tokio: Build,
    axum_cluster: Build,
}

/// The path of a built program, or why there is none.
type Build = std::cell::OnceCell<Result<PathBuf, String>>;

impl Binaries {
    fn polyfork(&self) -> Result<PathBuf> {
        once(&self.polyfork, &["-p", "polyfork-cli"])
    }

    fn axum_tokio(&self) -> Result<PathBuf> {
        once(&self.axum_tokio, &["-p", "bench-axum-tokio"])
    }

    fn axum_cluster(&self) -> Result<PathBuf> {
        let words = ["-p", "polyfork", "--example", "axum_server", "--features", "axum"];
        once(&self.axum_cluster, &words)
    }
}

fn once(build: &Build, words: &[&str]) -> Result<PathBuf> {
    let path = build.get_or_init(|| cargo_build(words).map_err(|error| format!("{error:#}")));
    path.clone().map_err(anyhow::Error::msg)
}

/// Builds with the release profile; cargo itself tells where the program went.
pub(super) fn cargo_build(words: &[&str]) -> Result<PathBuf> {
    println!("building {} (release)", words.join(" "));
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::root()).args(["build", "--release", "--quiet"]).args(words);
    command.arg("--message-format=json-render-diagnostics");
    let run = proc::capture(command, BUILD_LIMIT)?;
    ensure!(run.ok(), "cargo build {}: {}", words.join(" "), run.complaint());
    let executable = |line: &str| -> Option<PathBuf> {
        let message: Value = serde_json::from_str(line).ok()?;
        message["executable"].as_str().map(PathBuf::from)
    };
    run.stdout.lines().rev().find_map(executable).context("cargo built no program")
}

/// A server that serves. Dropping it ends every process of it.
pub(super) struct Running {
    port: u16,
    root: i32,
    family: Family,
    workers: u32,
    /// The started process; for PM2 the daemon, which PM2's command started, is `root`.
    started: Option<Started>,
    /// Its output, and PM2's home.
    _folder: TempDir,
}

impl Running {
    /// Its TCP port on loopback.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// The process above all of it.
    pub(super) fn root(&self) -> i32 {
        self.root
    }

    /// The process that manages the workers, if there is one.
    pub(super) fn primary(&self) -> Option<i32> {
        self.family.has_primary().then_some(self.root)
    }

    /// How many workers can be asked for their connections; `None` where there is one process.
    pub(super) fn counted_workers(&self) -> Option<usize> {
        let one = matches!(self.family, Family::Plain | Family::AxumTokio);
        (!one).then_some(self.workers as usize)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        match &mut self.started {
            Some(started) => started.end(),
            None => proc::end_tree(self.root),
        }
    }
}

#[cfg(test)]
impl Target {
    /// A target that is never started.
    pub(super) fn for_test(family: Family, line: &str) -> Self {
        Self { family, node_line: Some(line.into()), program: PathBuf::new(), tool: None }
    }
}

impl Target {
    /// Name in a table.
    pub(super) fn label(&self) -> String {
        title(self.family, self.node_line.as_deref())
    }

    /// Starts it and waits until all its workers serve.
    ///
    /// # Errors
    /// When it ends, or is not ready in time; the last line it wrote is in the error.
    pub(super) fn start(&self, workers: u32, stalling: bool) -> Result<Running> {
        let folder = TempDir::with_prefix("polyfork-bench-").context("make a folder")?;
        let port = free_port()?;
        let mut command = self.command(workers);
        command.current_dir(paths::root().join("bench/apps")).stdin(Stdio::null());
        command.stdout(log(&folder, "out")?).stderr(log(&folder, "err")?);
        command.env("PORT", port.to_string()).env("WORKERS", workers.to_string());
        command.env("PM2_HOME", folder.path().join("pm2"));
        self.with_environment(&mut command, stalling);
        let mut started = proc::start(&mut command)?;
        let ready = match self.family {
            Family::Pm2 => pm2_daemon(&mut started, folder.path()),
            _ => self.wait_ready(&mut started, &folder, port, workers).map(|()| None),
        };
        let daemon = ready.with_context(|| last_words(&folder))?;
        let root = daemon.unwrap_or_else(|| started.pid());
        let started = daemon.is_none().then_some(started);
        let running =
            Running { port, root, family: self.family, workers, started, _folder: folder };
        wait_answer(port)?;
        Ok(running)
    }

    fn command(&self, workers: u32) -> Command {
        let mut command = Command::new(match self.family.polyfork_options() {
            Some(_) => self.tool.as_ref().expect("a polyfork target has its binary"),
            None => &self.program,
        });
        let count = workers.to_string();
        match self.family {
            Family::Plain => command.arg("server.cjs"),
            Family::Cluster | Family::ClusterNone => command.arg("cluster.cjs"),
            Family::Reuseport => command.arg("reuseport.cjs"),
            Family::Pm2 => {
                command.args(self.tool.as_slice());
                command.args(["start", "server.cjs", "--name", "bench", "-i", &count])
            }
            Family::Kernel | Family::KernelQuick | Family::Handoff | Family::Shared => {
                command.args(["run", "--json", "--workers", &count]);
                command.args(self.family.polyfork_options().into_iter().flatten()).arg("server.cjs")
            }
            Family::AxumTokio | Family::Axum => &mut command,
        };
        command
    }

    fn with_environment(&self, command: &mut Command, stalling: bool) {
        for name in ["NODE_OPTIONS", "NODE_CLUSTER_SCHED_POLICY", "WEB_CONCURRENCY", "STALL"] {
            command.env_remove(name);
        }
        if self.family == Family::ClusterNone {
            command.env("NODE_CLUSTER_SCHED_POLICY", "none");
        }
        if stalling {
            command.env("STALL", "1");
        }
        if self.family.is_node() {
            // polyfork and PM2 look their Node up in the search path.
            command.env("PATH", first_in_path(&self.program));
        }
    }

    /// Waits until the server itself says that all workers listen.
    fn wait_ready(
        &self,
        started: &mut Started,
        folder: &TempDir,
        port: u16,
        workers: u32,
    ) -> Result<()> {
        let out = folder.path().join("out");
        wait_until(|| {
            if let Some(status) = started.poll()? {
                bail!("ended while starting: {}", proc::describe(Some(status)));
            }
            let text = fs::read_to_string(&out).unwrap_or_default();
            Ok(match self.family {
                Family::Plain => told_listening(&text) >= 1,
                Family::Cluster | Family::ClusterNone | Family::Reuseport => {
                    told_listening(&text) >= workers as usize
                }
                Family::AxumTokio => measure::get(port, "/").is_ok(),
                Family::Axum => {
                    proc::tree(started.pid()).len() > workers as usize
                        && measure::get(port, "/").is_ok()
                }
                _ => text.lines().any(is_ready_event),
            })
        })
    }
}

/// How many workers of a Node program said that they listen.
fn told_listening(text: &str) -> usize {
    text.lines().filter(|line| *line == "listening").count()
}

/// polyfork's event that all workers serve.
fn is_ready_event(line: &str) -> bool {
    serde_json::from_str::<Value>(line)
        .is_ok_and(|event| event["event"] == "ready" && event["workers"].is_number())
}

/// PM2's command returns when its workers are online; the daemon's pid is in its home.
fn pm2_daemon(command: &mut Started, folder: &Path) -> Result<Option<i32>> {
    let status = command.wait(READY_LIMIT)?;
    let pid = fs::read_to_string(folder.join("pm2/pm2.pid")).ok();
    let pid = pid.and_then(|text| text.trim().parse().ok());
    if !status.is_some_and(|status| status.success()) {
        pid.into_iter().for_each(proc::end_tree);
        bail!("pm2 start: {}", proc::describe(status));
    }
    Ok(Some(pid.context("PM2 told no daemon")?))
}

/// Waits until the port answers.
pub(super) fn wait_answer(port: u16) -> Result<()> {
    wait_until(|| Ok(measure::get(port, "/").is_ok()))
}

fn wait_until(mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let until = Instant::now() + READY_LIMIT;
    while !holds()? {
        proc::check_interrupted()?;
        ensure!(Instant::now() < until, "not ready after {} s", READY_LIMIT.as_secs());
        thread::sleep(POLL);
    }
    Ok(())
}

/// A port that is free now; the moment until the server binds it is ours alone on a quiet machine.
pub(super) fn free_port() -> Result<u16> {
    let probe = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port")?;
    Ok(probe.local_addr()?.port())
}

fn log(folder: &TempDir, name: &str) -> Result<File> {
    File::create(folder.path().join(name)).context("make a log file")
}

/// The last line the server wrote, errors first.
fn last_words(folder: &TempDir) -> String {
    let last = |name| {
        let text = fs::read_to_string(folder.path().join(name)).unwrap_or_default();
        text.lines().rfind(|line| !line.trim().is_empty()).map(str::to_owned)
    };
    last("err").or_else(|| last("out")).unwrap_or_else(|| "it wrote nothing".into())
}

/// The search path with the folder of `program` in front.
pub(super) fn first_in_path(program: &Path) -> OsString {
    let folder = program.parent().map(Path::to_path_buf);
    let rest = std::env::var_os("PATH").unwrap_or_default();
    let all = folder.into_iter().chain(std::env::split_paths(&rest));
    std::env::join_paths(all).unwrap_or(rest.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_parsed_back() {
        for family in Family::ALL {
            assert_eq!(Family::parse(family.name()).unwrap(), family);
        }
        assert!(Family::parse("nginx").is_err());
    }

    #[test]
    fn reuse_port_is_known_by_version() {
        let node = |version: &str| Tool { path: "/node".into(), version: version.into() };
        let known: Vec<bool> = ["20.20.2", "22.11.0", "22.12.0", "23.0.0", "23.1.0", "26.10.0"]
            .map(|version| has_reuse_port(&node(version)))
            .into();
        assert_eq!(known, [false, false, true, false, true, true]);
    }

    #[test]
    fn only_the_event_of_the_whole_cluster_means_ready() {
        assert!(is_ready_event(r#"{"event":"ready","time":1,"workers":2}"#));
        assert!(!is_ready_event(r#"{"event":"listening","slot":1}"#));
        assert!(!is_ready_event("listening"));
    }
}
