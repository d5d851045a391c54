//! Finds out what a program is: which runtime runs it, and so how it is spoken to.
//!
//! By asking, never by guessing from a path: the program file is read (ELF, `#!`, the mark of this crate), and
//! what claims to be a JavaScript runtime is asked for its version. A folder named `node` on the way to
//! a program means nothing, and a program that happens to be called `bun` is not Bun unless it answers like Bun.
//!
//! Looking up files is in `detect/find.rs`, asking in `detect/ask.rs`. What follows from the answer (which
//! mechanism, which environment) is decided by the primary; the facts it needs are the methods of
//! [`Runtime`], one table for all.
//!
//! The surprising rule: a bare name is what a shell would run (`PATH` first), unless it is the name of a
//! module that lies here: `server.js` is a file, `node` is a command even beside a file called `node`.
//!
//! Source: execve(2) for `#!`, env(1), Node's "type stripping" page for TypeScript; what the runtimes do
//! with a cluster was tried with Node 18 to 26, Deno 2.9 and Bun 1.4.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::settings::Dialect;

mod ask;
mod find;

pub use ask::Answers;
use find::{Kind, Search, Shebang};

/// The oldest Node whose cluster messages were tried.
const OLDEST_NODE: Version = Version { major: 18, minor: 0, patch: 0 };
/// `#!` files that name `#!` files: Linux follows four, so do we.
const DEEPEST: u32 = 4;
/// The variable that names the runtime for modules.
const RUNTIME_VARIABLE: &str = "POLYFORK_RUNTIME";

/// A version as runtimes tell theirs.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second number.
    pub minor: u32,
    /// The third number.
    pub patch: u32,
}

impl Version {
    const fn new(major: u32, minor: u32, patch: u32) -> Version {
        Version { major, minor, patch }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// What runs a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Runtime {
    /// Node.js.
    Node {
        /// As it answered.
        version: Version,
    },
    /// Deno.
    Deno {
        /// As it answered.
        version: Version,
    },
    /// Bun.
    Bun {
        /// As it answered.
        version: Version,
    },
    /// A Python interpreter.
    Python,
    /// The program itself, built on this crate.
    Native {
        /// The protocol its mark names.
        protocol: u32,
    },
    /// The program itself, or something unknown.
    Other,
}

impl Runtime {
    /// How it is spoken to.
    pub fn dialect(&self) -> Dialect {
        match self {
            Runtime::Native { .. } => Dialect::Native,
            Runtime::Node { .. } | Runtime::Deno { .. } | Runtime::Bun { .. } => Dialect::Node,
            Runtime::Python | Runtime::Other => Dialect::Sockets,
        }
    }

    /// Whether a worker accepts on a listening socket it is given, which the kernel mechanism and the shared
    /// policy need. Deno says that it listens and then never accepts; Bun takes no socket at all.
    pub fn accepts_on_a_given_socket(&self) -> bool {
        !matches!(self, Runtime::Deno { .. } | Runtime::Bun { .. })
    }

    /// Whether a worker takes connections that are handed over.
    pub fn takes_connections(&self) -> bool {
        matches!(self, Runtime::Node { .. } | Runtime::Deno { .. } | Runtime::Native { .. })
    }

    /// Whether workers bind for themselves with `SO_REUSEPORT`, so that the primary must not listen: Bun.
    pub fn binds_itself(&self) -> bool {
        matches!(self, Runtime::Bun { .. })
    }
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Runtime::Node { version } => write!(f, "Node {version}"),
            Runtime::Deno { version } => write!(f, "Deno {version}"),
            Runtime::Bun { version } => write!(f, "Bun {version}"),
            Runtime::Python => f.write_str("Python"),
            Runtime::Native { protocol } => write!(f, "native, protocol {protocol}"),
            Runtime::Other => f.write_str("an executable"),
        }
    }
}

/// What was found out about a program.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Detected {
    /// How it is spoken to.
    pub dialect: Dialect,
    /// What runs it.
    pub runtime: Runtime,
    /// The file to execute: an absolute path, symbolic links kept (a Python environment is one).
    pub exec: PathBuf,
    /// Arguments that come before the program's own: for `server.js` run by Node, `server.js`.
    pub args_before: Vec<OsString>,
    /// How this was found out: one line for people.
    pub why: String,
    /// What is likely to go wrong all the same, and what to do: one line for people.
    pub warning: Option<String>,
}

/// Why a program cannot be run. Each text says what was tried on what, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DetectError {
    /// There is no such file or command.
    #[error("no such program: {program:?} ({tried}){}", suggestion(near.as_deref()))]
    NotFound {
        /// As it was given.
        program: OsString,
        /// Where it was looked for.
        tried: String,
        /// A name that is there and looks much like it.
        near: Option<String>,
    },
    /// It cannot be executed, and nothing tells what could run it.
    #[error(
        "{path:?} cannot be executed and is no script or module: chmod +x it, or name what runs it first, \
         as in `polyfork run python3 FILE`"
    )]
    NotExecutable {
        /// The file.
        path: PathBuf,
    },
    /// It may be executed, and the kernel would refuse it for good.
    #[error("{path:?} is marked executable, but the kernel cannot execute it: {what}")]
    NotAProgram {
        /// The file.
        path: PathBuf,
        /// Why, and what to do.
        what: &'static str,
    },
    /// A symbolic link on the way to it leads nowhere.
    #[error("{link:?} is {}; correct the link", leads(target.as_deref()))]
    BadLink {
        /// The link.
        link: PathBuf,
        /// The missing file it points to; `None` when links lead in a circle.
        target: Option<PathBuf>,
    },
    /// A directory on the way to it may not be searched.
    #[error(
        "permission denied on {folder:?}, which is on the way to {program:?}: run as a user who may search it, or \
         chmod +x it"
    )]
    NotPermitted {
        /// As it was given.
        program: OsString,
        /// The directory.
        folder: PathBuf,
    },
    /// It is a directory that is no program.
    #[error("{path:?} is a directory without package.json or index.js: name the file to run")]
    Directory {
        /// The directory.
        path: PathBuf,
    },
    /// It cannot be read.
    #[error("cannot read {path:?}: {}", unreadable(error))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        error: io::Error,
    },
    /// What should run it is not there.
    #[error("nothing to run {program:?} with: {tried}; {next}")]
    NoRuntime {
        /// As it was given.
        program: OsString,
        /// What was looked for, and where.
        tried: String,
        /// What to do.
        next: &'static str,
    },
    /// What should run it is too old.
    #[error("{exec:?} is Node {version}, which is too old for {what}: {needs} is needed")]
    TooOld {
        /// The runtime.
        exec: PathBuf,
        /// Its version.
        version: Version,
        /// What it is too old for.
        what: &'static str,
        /// The version that would do.
        needs: &'static str,
    },
    /// A runtime does not answer.
    #[error("{exec:?} does not tell its version: {}; does it run by hand?", plain(error))]
    NoAnswer {
        /// The runtime.
        exec: PathBuf,
        /// What went wrong.
        #[source]
        error: io::Error,
    },
}

impl DetectError {
    /// True when the program is there and what should run it is missing, too old or broken.
    pub fn is_about_the_runtime(&self) -> bool {
        use DetectError::{NoAnswer, NoRuntime, TooOld};
        matches!(self, NoRuntime { .. } | TooOld { .. } | NoAnswer { .. })
    }
}

fn suggestion(near: Option<&str>) -> String {
    near.map(|name| format!("; did you mean {name:?}?")).unwrap_or_default()
}

fn leads(target: Option<&Path>) -> String {
    match target {
        Some(target) => format!("a symbolic link to {}, which does not exist", target.display()),
        None => "in a circle of symbolic links".to_owned(),
    }
}

fn unreadable(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "permission denied; chmod +r it, or run as a user who may read it".to_owned()
        }
        _ => format!("{}; can it be read by hand?", plain(error)),
    }
}

/// The system's words without the number that the standard library adds.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error ").next().unwrap_or_default().to_owned()
}

/// What to do when the runtime for modules is not there.
fn how_to_get(runtime: Option<&OsStr>) -> &'static str {
    let Some(named) = runtime else { return INSTALL_NODE };
    match Path::new(named).file_name().and_then(OsStr::to_str) {
        Some("node" | "nodejs") => "install Node 18 or later, or give its path to --runtime",
        Some("deno") => "install Deno (deno.com), or give its path to --runtime",
        Some("bun") => "install Bun (bun.com), or give its path to --runtime",
        _ => "--runtime takes node, deno or bun, or the path of one",
    }
}

const INSTALL_NODE: &str = "install Node 18 or later, or name another runtime with --runtime";
const INSTALL_PYTHON: &str = "install Python 3, or name the interpreter first";
const FIX_INTERPRETER: &str = "install it, or correct the first line";

/// Finds out what `program` is, given its arguments.
///
/// `cwd` is where a relative path starts (default: this process' working directory), `path_env` the `PATH` to
/// search (default: this process'). `POLYFORK_RUNTIME` in the environment names the runtime for JavaScript and
/// TypeScript modules.
///
/// # Blocking
/// Reads files, and may start a runtime to ask for its version: tens of milliseconds, five seconds at most for
/// each question.
///
/// # Errors
/// [`DetectError`]; none of them is cured by trying again.
pub fn detect(
    program: &OsStr,
    args: &[OsString],
    cwd: Option<&Path>,
    path_env: Option<&OsStr>,
) -> Result<Detected, DetectError> {
    let named = std::env::var_os(RUNTIME_VARIABLE).filter(|name| !name.is_empty());
    detect_with(program, args, cwd, path_env, named.as_deref())
}

/// [`detect`] with the runtime for modules named: a name in `PATH`, or a path. `None`: `node`.
///
/// # Errors
/// As [`detect`].
pub fn detect_with(
    program: &OsStr,
    args: &[OsString],
    cwd: Option<&Path>,
    path_env: Option<&OsStr>,
    runtime: Option<&OsStr>,
) -> Result<Detected, DetectError> {
    Answers::default().detect(program, args, cwd, path_env, runtime)
}

impl Answers {
    /// [`detect_with`], which asks each runtime once, however many programs it runs.
    ///
    /// # Errors
    /// As [`detect`].
    pub fn detect(
        &self,
        program: &OsStr,
        args: &[OsString],
        cwd: Option<&Path>,
        path_env: Option<&OsStr>,
        runtime: Option<&OsStr>,
    ) -> Result<Detected, DetectError> {
        let search = Search::new(cwd, path_env);
        let path = search.program(program)?;
        let question = Question { search: &search, program, args, runtime, answers: self };
        question.about(&path)
    }
}

/// Everything that is known when a file is looked at.
struct Question<'a> {
    search: &'a Search,
    program: &'a OsStr,
    args: &'a [OsString],
    runtime: Option<&'a OsStr>,
    answers: &'a Answers,
}

/// What executes, and what that is.
struct Found {
    runtime: Runtime,
    /// How that was found out, beginning with the file.
    why: String,
}

impl Question<'_> {
    fn about(&self, path: &Path) -> Result<Detected, DetectError> {
        match find::kind(path)? {
            Kind::Directory => self.directory(path),
            Kind::Script { executable: true, .. } if self.module_of_a_named_runtime(path) => {
                self.module(path)
            }
            Kind::Script { shebang, executable } => self.script(path, &shebang, executable),
            Kind::Elf { .. } | Kind::Plain { .. } if is_module(path) => self.module(path),
            Kind::Plain { .. } if has_extension(path, &["py"]) => self.python(path),
            Kind::Elf { executable: true } | Kind::Plain { executable: true } => {
                self.executable(path)
            }
            Kind::Elf { .. } | Kind::Plain { .. } => {
                Err(DetectError::NotExecutable { path: path.to_owned() })
            }
        }
    }

    fn module_of_a_named_runtime(&self, path: &Path) -> bool {
        self.runtime.is_some() && is_module(path)
    }

    /// A binary, or an executable file of a kind the kernel may know (binfmt_misc).
    fn executable(&self, path: &Path) -> Result<Detected, DetectError> {
        if find::is_env(path)
            && let Some(name) = find::behind_env(self.args)
            && let Ok(behind) = self.search.program(&name)
            && !find::is_env(&behind)
        {
            let found = self.what_is(&behind, DEEPEST)?;
            return Ok(detected(found, path.to_owned(), Vec::new()));
        }
        if let Some(what) = find::refused_by_the_kernel(path) {
            return Err(DetectError::NotAProgram { path: path.to_owned(), what });
        }
        let found = self.what_is(path, DEEPEST)?;
        Ok(detected(found, path.to_owned(), Vec::new()))
    }

    /// A file with `#!`: run by itself if it may be, else as the kernel would.
    fn script(
        &self,
        path: &Path,
        shebang: &Shebang,
        executable: bool,
    ) -> Result<Detected, DetectError> {
        if let Some(shim) = self.behind_a_shim(path, executable)? {
            return Ok(shim);
        }
        let found = self.what_is_script(path, shebang, DEEPEST)?;
        if executable {
            let mut detected = detected(found, path.to_owned(), Vec::new());
            detected.warning = find::is_package_manager(path).then(|| package_manager(path));
            return Ok(detected);
        }
        let exec = self.search.resolve(&shebang.interpreter);
        let mut before: Vec<OsString> = shebang.argument.clone().into_iter().collect();
        before.push(self.as_argument());
        Ok(detected(found, exec, before))
    }

    /// Version managers put a script called `node` in `PATH`. It is asked for the real one, which then is run:
    /// it spares a process per worker, and no shim can lose the channel.
    fn behind_a_shim(
        &self,
        path: &Path,
        executable: bool,
    ) -> Result<Option<Detected>, DetectError> {
        let Some(name) = ask::runtime_name(path).filter(|_| executable) else { return Ok(None) };
        let Ok(real) = ask::real_path(name, path, self.search, self.answers) else {
            return Ok(None);
        };
        if !matches!(find::kind(&real), Ok(Kind::Elf { executable: true })) {
            return Ok(None);
        }
        let found = self.what_is(&real, DEEPEST)?;
        let why = format!("{} stands for {}", path.display(), found.why);
        Ok(Some(detected(Found { why, ..found }, real, Vec::new())))
    }

    /// A JavaScript or TypeScript module.
    fn module(&self, path: &Path) -> Result<Detected, DetectError> {
        let what = if is_typescript(path) { "a TypeScript module" } else { "a JavaScript module" };
        let (exec, found) = self.module_runtime()?;
        let mut before = flags_for(found.runtime, is_typescript(path), &exec)?;
        before.push(self.as_argument());
        let why = format!("{} is {what}; {}", name_of(path), found.why);
        Ok(detected(Found { why, ..found }, exec, before))
    }

    /// A directory, which Node runs by its package.json or index.js.
    fn directory(&self, path: &Path) -> Result<Detected, DetectError> {
        if !["package.json", "index.js"].iter().any(|name| path.join(name).is_file()) {
            return Err(DetectError::Directory { path: path.to_owned() });
        }
        let (exec, found) = self.module_runtime()?;
        let mut before = flags_for(found.runtime, false, &exec)?;
        before.push(self.as_argument());
        let why = format!("{} is a package; {}", self.program.display(), found.why);
        Ok(detected(Found { why, ..found }, exec, before))
    }

    /// The runtime for modules: the one that was named, or Node.
    fn module_runtime(&self) -> Result<(PathBuf, Found), DetectError> {
        let name = self.runtime.unwrap_or(OsStr::new("node"));
        let unfit = |error: DetectError| match error {
            error if error.is_about_the_runtime() => error,
            error => DetectError::NoRuntime {
                program: self.program.to_owned(),
                tried: match error {
                    DetectError::NotExecutable { path } => format!("{path:?} cannot be executed"),
                    DetectError::Directory { path } => format!("{path:?} is a directory"),
                    other => other.to_string(),
                },
                next: how_to_get(self.runtime),
            },
        };
        let exec = self.search.program(name).map_err(unfit)?;
        let about = Question { program: name, args: &[], runtime: None, ..*self };
        let detected = about.about(&exec).map_err(unfit)?;
        if self.runtime.is_none() && !matches!(detected.runtime, Runtime::Node { .. }) {
            return Err(DetectError::NoRuntime {
                program: self.program.to_owned(),
                tried: format!("{} is not Node: {}", exec.display(), detected.why),
                next: INSTALL_NODE,
            });
        }
        let found = Found { runtime: detected.runtime, why: detected.why };
        Ok((detected.exec, found))
    }

    fn python(&self, path: &Path) -> Result<Detected, DetectError> {
        let names = ["python3", "python"];
        let exec = names.iter().find_map(|name| self.search.command(OsStr::new(name)));
        let Some(exec) = exec else {
            return Err(DetectError::NoRuntime {
                program: self.program.to_owned(),
                tried: format!("no python3 and no python in {}", self.search.places()),
                next: INSTALL_PYTHON,
            });
        };
        let why = format!("{} is a Python script for {}", name_of(path), exec.display());
        let found = Found { runtime: Runtime::Python, why };
        Ok(detected(found, exec, vec![self.as_argument()]))
    }

    /// What a file that executes is.
    fn what_is(&self, path: &Path, depth: u32) -> Result<Found, DetectError> {
        if let Kind::Script { shebang, .. } = find::kind(path)? {
            return self.what_is_script(path, &shebang, depth);
        }
        if let Ok(Some(protocol)) = polyfork_sys::note::native_mark(path) {
            let why = format!("{} has polyfork's mark", name_of(path));
            return Ok(Found { runtime: Runtime::Native { protocol }, why });
        }
        if let Some(name) = ask::runtime_name(path) {
            return self.ask(name, path);
        }
        if find::is_python(path) {
            return Ok(python(path));
        }
        let why = format!("{} is an executable that takes sockets, if any", name_of(path));
        Ok(Found { runtime: Runtime::Other, why })
    }

    /// What a script is: a shim that passes its arguments on answers for its runtime, all others are what their
    /// interpreter is.
    fn what_is_script(
        &self,
        path: &Path,
        shebang: &Shebang,
        depth: u32,
    ) -> Result<Found, DetectError> {
        if find::is_python(path) {
            return Ok(python(path));
        }
        match ask::runtime_name(path).map(|name| self.ask(name, path)) {
            Some(Ok(found)) if found.runtime != Runtime::Other => Ok(found),
            _ => self.follow(path, shebang, depth),
        }
    }

    /// What the interpreter of a script is.
    fn follow(&self, path: &Path, shebang: &Shebang, depth: u32) -> Result<Found, DetectError> {
        let missing = |tried: String| DetectError::NoRuntime {
            program: self.program.to_owned(),
            tried: format!("the first line of {} names {tried}", path.display()),
            next: FIX_INTERPRETER,
        };
        let named = self.search.resolve(&shebang.interpreter);
        if !named.is_file() {
            return Err(missing(format!("{}, which does not exist", named.display())));
        }
        if !find::is_executable_file(&named) {
            return Err(missing(format!("{}, which may not be executed", named.display())));
        }
        let interpreter = match shebang.behind_env() {
            None => named,
            Some(name) => match self.search.command(&name) {
                Some(found) => found,
                None => {
                    let places = self.search.places();
                    return Err(missing(format!("{}, which is not in {places}", name.display())));
                }
            },
        };
        if depth == 0 {
            return Err(missing("scripts in a circle".into()));
        }
        let found = self.what_is(&interpreter, depth - 1)?;
        let why = match found.runtime {
            Runtime::Other => {
                format!("{} is a script for {}", name_of(path), interpreter.display())
            }
            _ => format!("{} is a script; {}", name_of(path), found.why),
        };
        Ok(Found { why, ..found })
    }

    fn ask(&self, name: ask::Name, path: &Path) -> Result<Found, DetectError> {
        let answer = ask::version(name, path, self.search, self.answers)
            .map_err(|error| DetectError::NoAnswer { exec: path.to_owned(), error })?;
        let runtime = match (name, answer) {
            (ask::Name::Node, Ok(version)) => Runtime::Node { version },
            (ask::Name::Deno, Ok(version)) => Runtime::Deno { version },
            (ask::Name::Bun, Ok(version)) => Runtime::Bun { version },
            (_, Err(said)) => {
                let why =
                    format!("{} is no JavaScript runtime: it answers {said:?}", path.display());
                return Ok(Found { runtime: Runtime::Other, why });
            }
        };
        if let Runtime::Node { version } = runtime
            && version < OLDEST_NODE
        {
            let (what, needs) = ("its cluster to be served", "Node 18 or later");
            return Err(DetectError::TooOld { exec: path.to_owned(), version, what, needs });
        }
        Ok(Found { runtime, why: format!("{} is {runtime}", path.display()) })
    }

    /// The program as an argument of its runtime; never taken for an option.
    fn as_argument(&self) -> OsString {
        if self.program.as_bytes().starts_with(b"-") {
            return Path::new(".").join(self.program).into_os_string();
        }
        self.program.to_owned()
    }
}

impl Detected {
    /// What a program of the native dialect is, without looking for its mark: for `Settings::this_program`, and
    /// for whoever knows better.
    ///
    /// # Errors
    /// [`DetectError::NotFound`].
    pub fn native(program: &OsStr) -> Result<Detected, DetectError> {
        let exec = Search::new(None, None).program(program)?;
        let runtime = Runtime::Native { protocol: polyfork_sys::note::PROTOCOL_VERSION };
        let why = format!("{} is run as native", name_of(&exec));
        Ok(detected(Found { runtime, why }, exec, Vec::new()))
    }
}

fn detected(found: Found, exec: PathBuf, args_before: Vec<OsString>) -> Detected {
    let Found { runtime, why } = found;
    Detected { dialect: runtime.dialect(), runtime, exec, args_before, why, warning: None }
}

fn python(path: &Path) -> Found {
    let why = format!("{} is a Python interpreter", path.display());
    Found { runtime: Runtime::Python, why }
}

fn package_manager(path: &Path) -> String {
    format!(
        "{} starts the server as a process of its own, which is no worker then: give what its script runs, as in \
         `polyfork run server.js`",
        name_of(path)
    )
}

/// What a runtime wants before the name of a module.
fn flags_for(
    runtime: Runtime,
    typescript: bool,
    exec: &Path,
) -> Result<Vec<OsString>, DetectError> {
    match runtime {
        Runtime::Deno { .. } => Ok(vec!["run".into(), "-A".into()]),
        Runtime::Node { version } if typescript => type_stripping(version).ok_or_else(|| {
            let exec = exec.to_owned();
            let (what, needs) = ("TypeScript", "22.18 or later (or Deno or Bun by --runtime)");
            DetectError::TooOld { exec, version, what, needs }
        }),
        _ => Ok(Vec::new()),
    }
}

/// The flags by which this Node runs TypeScript; `None` if it cannot.
fn type_stripping(version: Version) -> Option<Vec<OsString>> {
    let by_itself = version >= Version::new(23, 6, 0)
        || (version.major == 22 && version >= Version::new(22, 18, 0));
    if by_itself {
        return Some(Vec::new());
    }
    (version >= Version::new(22, 6, 0)).then(|| vec!["--experimental-strip-types".into()])
}

fn is_module(path: &Path) -> bool {
    has_extension(path, &["js", "mjs", "cjs"]) || is_typescript(path)
}

fn is_typescript(path: &Path) -> bool {
    has_extension(path, &["ts", "mts", "cts"])
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension().is_some_and(|found| extensions.iter().any(|one| found == *one))
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests;
