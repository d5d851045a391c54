//! Apps in the background under a manager: polyfork, PM2 or nginx, and what an operator does with them.
//!
//! What is asked of them while is the business of `soak` and `operate`. All of it is done by the managers' own
//! commands, as their manuals say.
//!
//! Surprising: what a command has started is no child of ours but of nobody. Dropping an [`App`] therefore asks
//! the manager to end it, and then ends by pid what is left of its tree.
//!
//! Source: `polyfork start --help`; PM2's documentation of cluster mode; nginx's "Controlling nginx".

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use super::targets::{cargo_build, first_in_path, free_port, wait_answer};
use crate::setup::manifest::Manifest;
use crate::{paths, proc};

/// No command of a manager takes longer.
const COMMAND_LIMIT: Duration = Duration::from_secs(90);
/// As a rule.
pub(super) const WORKERS: u32 = 2;
/// Where a worker takes long to come up: several come up at once while others serve.
const SLOW_WORKERS: u32 = 8;
/// Name of the app with its manager.
const NAME: &str = "soak";

/// Who manages.
#[derive(Debug, Clone)]
enum Manager {
    Polyfork { program: PathBuf, options: Vec<OsString>, words: Vec<OsString> },
    Pm2 { script: PathBuf, node: PathBuf },
    Nginx { program: PathBuf },
}

/// An app that can be started.
#[derive(Debug, Clone)]
pub(super) struct Kind {
    /// Name in a table.
    pub(super) title: String,
    manager: Manager,
    /// In front of the search path.
    node: Option<PathBuf>,
    /// How many workers there are while some are killed, so that enough serve while others come up.
    pub(super) workers_to_kill: u32,
}

/// Programs that are built once.
pub(super) struct Built {
    polyfork: PathBuf,
    axum: PathBuf,
}

impl Built {
    /// Builds them, with the release profile.
    ///
    /// # Errors
    /// When a build fails.
    pub(super) fn new() -> Result<Self> {
        let axum = ["-p", "polyfork", "--example", "axum_server", "--features", "axum"];
        Ok(Self { polyfork: cargo_build(&["-p", "polyfork-cli"])?, axum: cargo_build(&axum)? })
    }
}

impl Kind {
    /// Stock Node under polyfork.
    ///
    /// # Errors
    /// When that Node is missing.
    pub(super) fn node(
        built: &Built,
        manifest: &Manifest,
        line: &str,
        mechanism: &str,
    ) -> Result<Self> {
        let node = manifest.tool(&format!("node{line}"))?.path.clone();
        let manager = Manager::Polyfork {
            program: built.polyfork.clone(),
            options: vec!["--mechanism".into(), mechanism.into()],
            words: vec!["server.cjs".into()],
        };
        let title = format!("polyfork {mechanism}, Node {line}");
        Ok(Self { title, manager, node: Some(node), workers_to_kill: WORKERS })
    }

    /// Whether its workers are Node.
    pub(super) fn runs_node(&self) -> bool {
        self.node.is_some()
    }

    /// A Rust program under polyfork.
    pub(super) fn rust(built: &Built, mechanism: &str) -> Self {
        let manager = Manager::Polyfork {
            program: built.polyfork.clone(),
            options: vec!["--mechanism".into(), mechanism.into()],
            words: vec![built.axum.clone().into()],
        };
        let title = format!("polyfork {mechanism}, axum");
        Self { title, manager, node: None, workers_to_kill: WORKERS }
    }

    /// uvicorn under polyfork.
    ///
    /// # Errors
    /// When uvicorn is missing.
    pub(super) fn uvicorn(built: &Built, manifest: &Manifest) -> Result<Self> {
        let uvicorn = &manifest.tool("uvicorn")?.path;
        let app = paths::root().join("tests/apps");
        let mut words: Vec<OsString> = vec!["--".into(), uvicorn.into(), "--fd".into(), "3".into()];
        words.extend(["--log-level".into(), "warning".into(), "--app-dir".into(), app.into()]);
        words.push("asgi:app".into());
        // It tells nobody when it is ready; without a question that is after a second.
        let options = vec!["--probe".into(), "/".into()];
        let manager = Manager::Polyfork { program: built.polyfork.clone(), options, words };
        let title = "polyfork kernel, uvicorn".into();
        Ok(Self { title, manager, node: None, workers_to_kill: SLOW_WORKERS })
    }

    /// The same Node program under PM2's cluster mode.
    ///
    /// # Errors
    /// When PM2 or that Node is missing.
    pub(super) fn pm2(manifest: &Manifest, line: &str) -> Result<Self> {
        let node = manifest.tool(&format!("node{line}"))?.path.clone();
        let script = manifest.tool("pm2")?.path.clone();
        let manager = Manager::Pm2 { script, node: node.clone() };
        let title = format!("PM2, Node {line}");
        Ok(Self { title, manager, node: Some(node), workers_to_kill: WORKERS })
    }

    /// nginx, which answers itself.
    ///
    /// # Errors
    /// When nginx is missing.
    pub(super) fn nginx(manifest: &Manifest) -> Result<Self> {
        let program = manifest.tool("nginx")?.path.clone();
        let manager = Manager::Nginx { program };
        Ok(Self { title: "nginx".into(), manager, node: None, workers_to_kill: WORKERS })
    }

    /// Takes its probe away; false if it has none.
    fn asks_nothing(&mut self) -> bool {
        match &mut self.manager {
            Manager::Polyfork { options, .. } if options.iter().any(|word| word == "--probe") => {
                options.clear();
                true
            }
            _ => false,
        }
    }

    /// Whether it is ours.
    pub(super) fn is_ours(&self) -> bool {
        matches!(self.manager, Manager::Polyfork { .. })
    }

    /// Starts it; returns when it answers.
    ///
    /// # Errors
    /// What its manager complained about.
    pub(super) fn start(&self, workers: u32) -> Result<App> {
        let folder = TempDir::with_prefix("polyfork-soak-").context("make a folder")?;
        let mut app = App { kind: self.clone(), port: free_port()?, workers, folder };
        let mut started = app.run(app.start_command()?);
        if started.is_err() && app.kind.asks_nothing() {
            // Without the right to exact turns there are no probes in this dialect.
            started = app.run(app.start_command()?);
        }
        started.with_context(|| format!("start {}", self.title))?;
        wait_answer(app.port)?;
        Ok(app)
    }
}

/// An app that runs.
pub(super) struct App {
    kind: Kind,
    port: u16,
    workers: u32,
    folder: TempDir,
}

impl App {
    /// Its TCP port on loopback.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Whether it is ours.
    pub(super) fn is_ours(&self) -> bool {
        self.kind.is_ours()
    }

    /// How many workers serve.
    pub(super) fn workers(&self) -> u32 {
        self.workers
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(paths::root().join("bench/apps"));
        for name in ["NODE_OPTIONS", "NODE_CLUSTER_SCHED_POLICY", "WEB_CONCURRENCY", "STALL"] {
            command.env_remove(name);
        }
        // A start of Python that compiles what it imports each time is none that anybody has. Not into the source tree.
        command.env_remove("PYTHONDONTWRITEBYTECODE");
        command.env("PYTHONPYCACHEPREFIX", self.folder.path().join("pycache"));
        command.env("PORT", self.port.to_string()).env("WORKERS", self.workers.to_string());
        command.env("PM2_HOME", self.folder.path().join("pm2"));
        command.env("POLYFORK_RUNTIME_DIR", self.folder.path().join("run"));
        command.env("POLYFORK_LOG_DIR", self.folder.path().join("log"));
        if let Some(node) = &self.kind.node {
            command.env("PATH", first_in_path(node));
        }
        command
    }

    fn run(&self, command: Command) -> Result<String> {
        let run = proc::capture(command, COMMAND_LIMIT)?;
        ensure!(run.ok(), "{}", run.complaint());
        Ok(run.stdout)
    }

    fn start_command(&self) -> Result<Command> {
        Ok(match &self.kind.manager {
            Manager::Polyfork { program, options, words } => {
                let mut command = self.command(program);
                command.args(["start", "--name", NAME, "-w", &self.workers.to_string()]);
                // A worker is killed often here, and that is no crash loop.
                command.args(["--restart-limit", "10000/1s"]);
                if words.first().is_some_and(|first| first == "--") {
                    command.args(["--listen", &format!("127.0.0.1:{}", self.port)]);
                }
                command.args(options).args(words);
                command
            }
            Manager::Pm2 { script, node } => {
                let mut command = self.command(node);
                command.arg(script);
                command.args(["start", "server.cjs", "--name", NAME]);
                command.args(["-i", &self.workers.to_string()]);
                command
            }
            Manager::Nginx { program } => {
                self.write_nginx()?;
                self.nginx(program)
            }
        })
    }

    fn nginx(&self, program: &Path) -> Command {
        let mut command = self.command(program);
        command.arg("-p").arg(self.folder.path()).args(["-e", "error.log", "-c", "nginx.conf"]);
        command
    }

    fn write_nginx(&self) -> Result<()> {
        let text = format!(
            "worker_processes {};\npid nginx.pid;\nerror_log error.log;\nevents {{ }}\nhttp {{\n  access_log off;\n  \
             client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;\n  \
             keepalive_requests 1000000;\n  server {{\n    listen 127.0.0.1:{} reuseport;\n    location / {{ return 200 \"hello \
             from one of many\\n\"; }}\n  }}\n}}\n",
            self.workers, self.port
        );
        fs::write(self.folder.path().join("nginx.conf"), text).context("write nginx.conf")
    }

    /// New workers in place of the old ones; returns when the manager says that it is done.
    ///
    /// # Errors
    /// What it complained about.
    pub(super) fn reload(&self) -> Result<()> {
        let command = match &self.kind.manager {
            Manager::Polyfork { program, .. } => {
                let mut command = self.command(program);
                command.args(["reload", "--probation", "50ms", NAME]);
                command
            }
            Manager::Pm2 { script, node } => {
                let mut command = self.command(node);
                command.arg(script).args(["reload", NAME]);
                command
            }
            Manager::Nginx { program } => {
                let mut command = self.nginx(program);
                command.args(["-s", "reload"]);
                command
            }
        };
        self.run(command).with_context(|| format!("reload {}", self.kind.title)).map(drop)
    }

    /// A new primary in place of the running one.
    ///
    /// # Errors
    /// What it complained about, and always for who cannot do that.
    pub(super) fn upgrade(&self) -> Result<()> {
        let Manager::Polyfork { program, .. } = &self.kind.manager else {
            anyhow::bail!("{} has no command for it", self.kind.title);
        };
        let mut command = self.command(program);
        command.args(["upgrade", NAME]);
        self.run(command).with_context(|| format!("upgrade {}", self.kind.title)).map(drop)
    }

    /// The process above the workers.
    ///
    /// # Errors
    /// When it cannot be found.
    pub(super) fn primary(&self) -> Result<i32> {
        let text = match &self.kind.manager {
            Manager::Polyfork { .. } => {
                let status = self.status()?;
                return status["pid"]
                    .as_i64()
                    .and_then(|pid| pid.try_into().ok())
                    .context("no pid");
            }
            Manager::Pm2 { .. } => fs::read_to_string(self.folder.path().join("pm2/pm2.pid")),
            Manager::Nginx { .. } => fs::read_to_string(self.folder.path().join("nginx.pid")),
        };
        text.context("the manager's pid")?.trim().parse().context("the manager's pid")
    }

    /// `polyfork status --json`.
    ///
    /// # Errors
    /// When it is not ours, or does not answer.
    pub(super) fn status(&self) -> Result<Value> {
        let Manager::Polyfork { program, .. } = &self.kind.manager else {
            anyhow::bail!("{} has no status of ours", self.kind.title);
        };
        let mut command = self.command(program);
        command.args(["status", "--json", NAME]);
        let text = self.run(command)?;
        let value: Value = serde_json::from_str(&text).context("status --json")?;
        Ok(if value.is_array() { value[0].clone() } else { value })
    }

    /// Processes of workers that are ready, as `polyfork status` tells.
    ///
    /// # Errors
    /// See [`App::status`].
    pub(super) fn ready_workers(&self) -> Result<Vec<i32>> {
        let status = self.status()?;
        let workers = status["workers"].as_array().context("no workers")?;
        let ready = workers.iter().filter(|worker| worker["state"] == "ready");
        Ok(ready.filter_map(|worker| worker["pid"].as_i64()?.try_into().ok()).collect())
    }

    /// Lists apps as an operator does, in the folder of this one.
    ///
    /// # Errors
    /// When the manager has no such command, or it fails.
    pub(super) fn list(&self) -> Result<()> {
        let mut command = match &self.kind.manager {
            Manager::Polyfork { program, .. } => {
                let mut command = self.command(program);
                command.args(["ls", "--json"]);
                command
            }
            Manager::Pm2 { script, node } => {
                let mut command = self.command(node);
                command.arg(script).arg("jlist");
                command
            }
            Manager::Nginx { .. } => anyhow::bail!("nginx lists nothing"),
        };
        // Waited for by the system, not looked at now and then: it takes milliseconds.
        let done = command.stdin(Stdio::null()).output().context("cannot list")?;
        let told = String::from_utf8_lossy(&done.stderr);
        ensure!(done.status.success(), "list: {}", told.trim_end());
        Ok(())
    }

    /// Starts one more app beside this one, with one worker that listens nowhere; polyfork and PM2 only.
    ///
    /// # Errors
    /// What the manager complained about.
    pub(super) fn start_idle(&self, number: usize) -> Result<()> {
        let name = format!("idle-{number}");
        let command = match &self.kind.manager {
            Manager::Polyfork { program, .. } => {
                let mut command = self.command(program);
                command.args(["start", "--name", &name, "-w", "1", "--dialect", "sockets"]);
                command.args(["--", "sleep", "3600"]);
                command
            }
            Manager::Pm2 { script, node } => {
                let mut command = self.command(node);
                command.arg(script).args(["start", "sleep", "--interpreter", "none"]);
                command.args(["--name", &name, "--", "3600"]);
                command
            }
            Manager::Nginx { .. } => anyhow::bail!("nginx runs no programs"),
        };
        self.run(command).with_context(|| format!("start {name}")).map(drop)
    }

    /// Processes that serve now: the primary's children, without zombies.
    ///
    /// # Errors
    /// When the primary cannot be found.
    pub(super) fn worker_pids(&self, primary: i32) -> Vec<i32> {
        let children = proc::tree(primary).into_iter();
        children.filter(|p| p.parent == primary && p.state != 'Z').map(|p| p.pid).collect()
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let primary = self.primary().ok();
        let command = match &self.kind.manager {
            Manager::Polyfork { program, .. } => {
                let mut command = self.command(program);
                command.args(["kill", "*"]);
                command
            }
            Manager::Pm2 { script, node } => {
                let mut command = self.command(node);
                command.arg(script).arg("kill");
                command
            }
            Manager::Nginx { program } => {
                let mut command = self.nginx(program);
                command.args(["-s", "stop"]);
                command
            }
        };
        // What does not end this way is ended by pid.
        let _ = proc::capture(command, COMMAND_LIMIT);
        if let Some(primary) = primary {
            proc::end_tree(primary);
        }
    }
}
