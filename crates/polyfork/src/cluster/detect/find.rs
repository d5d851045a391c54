//! Files and names: what a word on the command line refers to, and what kind of file that is.
//!
//! Looks and never runs anything. Relative paths start at the directory the program will run in, which need not
//! be ours.
//!
//! The surprising rule: a file that may be executed but not read is still a program; it is one of the plain kind.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::{DetectError, is_module};

/// As much of a `#!` line as the kernel reads.
const HEAD_BYTES: u64 = 256;
/// What `PATH` is when there is none, as in execvp(3).
const DEFAULT_PATH: &str = "/usr/bin:/bin";
/// A longer `PATH` is not shown in errors.
const LONGEST_PLACES: usize = 100;
/// Names looked at for a suggestion, so that a huge directory costs little.
const MOST_NAMES: usize = 10_000;
/// Links that are followed to find the bad one; Linux gives up after forty.
const MOST_LINKS: u32 = 40;
/// Where the kernel lists further kinds of program that it was taught.
const TAUGHT: &str = "/proc/sys/fs/binfmt_misc";

/// Where programs are looked up.
#[derive(Debug)]
pub(super) struct Search {
    /// Absolute.
    pub(super) directory: PathBuf,
    pub(super) path: OsString,
}

/// What kind of file a program is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    Elf { executable: bool },
    Script { shebang: Shebang, executable: bool },
    Plain { executable: bool },
}

/// A `#!` line, split as the kernel does: all after the first blank is one argument.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shebang {
    pub(super) interpreter: OsString,
    pub(super) argument: Option<OsString>,
}

impl Search {
    pub(super) fn new(directory: Option<&Path>, path: Option<&OsStr>) -> Search {
        let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        let directory = directory.map_or_else(|| here.clone(), |given| here.join(given));
        let path = path.map(OsStr::to_owned).or_else(|| std::env::var_os("PATH"));
        Search { directory, path: path.unwrap_or_else(|| DEFAULT_PATH.into()) }
    }

    /// The file that `program` means.
    pub(super) fn program(&self, program: &OsStr) -> Result<PathBuf, DetectError> {
        let here = self.resolve(program);
        let a_path =
            program.as_bytes().contains(&b'/') || [".", ".."].iter().any(|d| program == *d);
        if !program.is_empty() && (a_path || is_module(Path::new(program))) && here.exists() {
            return Ok(here);
        }
        if !a_path && let Some(found) = self.command(program) {
            return Ok(found);
        }
        if !a_path && !program.is_empty() && here.exists() {
            return Ok(here);
        }
        let obstacle = || self.obstacle(program, &here, MOST_LINKS);
        let obstacle = (!program.is_empty()).then(obstacle).flatten();
        Err(obstacle.unwrap_or_else(|| self.not_found(program, a_path)))
    }

    /// What is in the way to a file whose name is right; `None` when it is simply not there.
    fn obstacle(&self, program: &OsStr, path: &Path, links: u32) -> Option<DetectError> {
        let mut steps: Vec<&Path> = path.ancestors().collect();
        steps.reverse();
        for step in steps {
            let folder = || step.parent().unwrap_or(step).to_owned();
            let meta = match std::fs::symlink_metadata(step) {
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    let (program, folder) = (program.to_owned(), folder());
                    return Some(DetectError::NotPermitted { program, folder });
                }
                Err(_) => return None,
                Ok(meta) => meta,
            };
            if !meta.is_symlink() || step.exists() {
                continue;
            }
            let target = folder().join(std::fs::read_link(step).ok()?);
            if links == 0 {
                return Some(DetectError::BadLink { link: path.to_owned(), target: None });
            }
            let link = || step.to_owned();
            return Some(match self.obstacle(program, &target, links - 1) {
                None => DetectError::BadLink { link: link(), target: Some(target) },
                Some(DetectError::BadLink { target: None, .. }) => {
                    DetectError::BadLink { link: link(), target: None }
                }
                Some(other) => other,
            });
        }
        None
    }

    /// The first executable file of that name in `PATH`.
    pub(super) fn command(&self, name: &OsStr) -> Option<PathBuf> {
        if name.as_bytes().contains(&b'/') {
            return Some(self.resolve(name)).filter(|path| path.is_file());
        }
        if name.is_empty() {
            return None;
        }
        self.folders().map(|folder| folder.join(name)).find(|path| is_executable_file(path))
    }

    /// A path as seen from the program's directory.
    pub(super) fn resolve(&self, path: &OsStr) -> PathBuf {
        let joined = self.directory.join(path);
        std::path::absolute(&joined).unwrap_or(joined)
    }

    /// `PATH` for people; a long one is counted instead of listed.
    pub(super) fn places(&self) -> String {
        if self.path.len() <= LONGEST_PLACES {
            return format!("PATH ({})", self.path.display());
        }
        format!("the {} directories of PATH", self.folders().count())
    }

    fn folders(&self) -> impl Iterator<Item = PathBuf> {
        std::env::split_paths(&self.path).map(|folder| self.directory.join(folder))
    }

    fn not_found(&self, program: &OsStr, a_path: bool) -> DetectError {
        let parent = match Path::new(program).parent() {
            Some(parent) if a_path => self.resolve(parent.as_os_str()),
            _ => self.directory.clone(),
        };
        let tried = if program.is_empty() {
            "the name is empty: give a file or a command".to_owned()
        } else if !a_path {
            format!("no file in {}, not in {}", parent.display(), self.places())
        } else if parent.is_dir() {
            format!("no such file in {}", parent.display())
        } else if parent.exists() {
            format!("{} is not a directory", parent.display())
        } else {
            format!("there is no directory {}", parent.display())
        };
        let near = self.near(program, &parent, a_path);
        DetectError::NotFound { program: program.to_owned(), tried, near }
    }

    /// A name that is there and looks like `program`.
    fn near(&self, program: &OsStr, parent: &Path, a_path: bool) -> Option<String> {
        let wanted = Path::new(program).file_name()?.to_str()?;
        let here = names_in(parent);
        let in_path = self.folders().filter(|_| !a_path).flat_map(|folder| names_in(&folder));
        let name = here.chain(in_path).take(MOST_NAMES).filter_map(|name| {
            let name = name.into_string().ok()?;
            let distance = distance(wanted, &name);
            (distance <= allowed(wanted)).then_some((distance, name))
        });
        let (_, name) = name.min()?;
        match Path::new(program).parent() {
            Some(parent) if a_path => Some(parent.join(name).to_string_lossy().into_owned()),
            _ => Some(name),
        }
    }
}

fn names_in(folder: &Path) -> impl Iterator<Item = OsString> + use<> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name())
}

/// Typing errors that still count as near.
fn allowed(name: &str) -> usize {
    match name.chars().count() {
        0..=2 => 0,
        3..=5 => 1,
        6..=12 => 2,
        _ => 3,
    }
}

/// Typing errors between two names: a letter changed, left out, added, or two exchanged (optimal string
/// alignment). Names of very different length are not compared.
fn distance(a: &str, b: &str) -> usize {
    if a.len().abs_diff(b.len()) > 3 {
        return usize::MAX;
    }
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = [vec![0; b.len() + 1], (0..=b.len()).collect(), vec![0; b.len() + 1]];
    for i in 1..=a.len() {
        let [before, above, row] = &mut rows;
        row[0] = i;
        for j in 1..=b.len() {
            let changed = above[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = changed.min(above[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        rows.rotate_left(1);
    }
    rows[1][b.len()]
}

/// What kind of file `path` is.
pub(super) fn kind(path: &Path) -> Result<Kind, DetectError> {
    let unreadable = |error| DetectError::Unreadable { path: path.to_owned(), error };
    let meta = std::fs::metadata(path).map_err(unreadable)?;
    if meta.is_dir() {
        return Ok(Kind::Directory);
    }
    if !meta.is_file() {
        return Ok(Kind::Plain { executable: false });
    }
    let executable = is_executable_file(path);
    match head(path) {
        Ok(head) if head.starts_with(ELF) => Ok(Kind::Elf { executable }),
        Ok(head) => Ok(match Shebang::parse(&head) {
            Some(shebang) => Kind::Script { shebang, executable },
            None => Kind::Plain { executable },
        }),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && executable => {
            Ok(Kind::Plain { executable })
        }
        Err(error) => Err(unreadable(error)),
    }
}

fn head(path: &Path) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    File::open(path)?.take(HEAD_BYTES).read_to_end(&mut head)?;
    Ok(head)
}

/// Whether *we* may execute it: the kernel knows about owners, groups, lists and root.
pub(super) fn is_executable_file(path: &Path) -> bool {
    let flags = rustix::fs::AtFlags::EACCESS;
    path.is_file()
        && rustix::fs::accessat(rustix::fs::CWD, path, rustix::fs::Access::EXEC_OK, flags).is_ok()
}

/// Why the kernel would refuse a file that may be executed, and what to do; `None` when it may well take it, which
/// it also may when we cannot read it, or when the kernel was taught other kinds (binfmt_misc).
pub(super) fn refused_by_the_kernel(path: &Path) -> Option<&'static str> {
    let head = head(path).ok()?;
    if !head.starts_with(ELF) && !head.is_empty() {
        return (!kernel_was_taught()).then_some(
            "it is neither an ELF program nor begins with #!; a script needs a first line like #!/bin/sh, or name \
             what runs it, as in `polyfork run sh FILE`",
        );
    }
    let what = match Elf::parse(&head) {
        _ if head.is_empty() => "it is empty; was it written completely?",
        None => "its ELF header is broken; was it copied completely?",
        Some(elf) if !elf.runs => "it is an ELF file but no program (an object or a core file?)",
        Some(elf) => match Elf::parse(&self::head(Path::new("/proc/self/exe")).ok()?) {
            Some(ours) if !elf.fits(&ours) => "it was built for another kind of machine",
            _ => return None,
        },
    };
    (!kernel_was_taught()).then_some(what)
}

/// Whether the kernel may execute more than ELF and `#!`.
fn kernel_was_taught() -> bool {
    names_in(Path::new(TAUGHT)).any(|name| name != "register" && name != "status")
}

const ELF: &[u8] = b"\x7fELF";

/// The part of an ELF header that tells what can execute it. Source: elf(5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Elf {
    big_endian: bool,
    machine: u16,
    /// An executable, a shared one included.
    runs: bool,
}

impl Elf {
    /// `None` when the header is cut off or contradicts itself.
    fn parse(head: &[u8]) -> Option<Elf> {
        let (class, data) = (*head.get(4)?, *head.get(5)?);
        let big_endian = match data {
            1 => false,
            2 => true,
            _ => return None,
        };
        let half = |at: usize| {
            let bytes = head.get(at..at + 2)?.try_into().ok()?;
            Some(if big_endian { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
        };
        // Size and number of program headers, without which nothing is loaded.
        let (size, number) = match class {
            1 => (half(42)? == 32, half(44)?),
            2 => (half(54)? == 56, half(56)?),
            _ => return None,
        };
        let runs = matches!(half(16)?, 2 | 3) && size && number > 0;
        Some(Elf { big_endian, machine: half(18)?, runs })
    }

    /// Whether a kernel that executes `ours` may execute this: x86-64 kernels run x86, 64-bit Arm kernels Arm.
    fn fits(self, ours: &Elf) -> bool {
        let smaller = matches!((ours.machine, self.machine), (62, 3) | (183, 40));
        self.big_endian == ours.big_endian && (self.machine == ours.machine || smaller)
    }
}

impl Shebang {
    /// Reads the line at the start of a file; `None` if there is none.
    pub(super) fn parse(head: &[u8]) -> Option<Shebang> {
        let line = head.strip_prefix(b"#!")?.split(|&byte| byte == b'\n').next()?;
        let line = line.strip_suffix(b"\r").unwrap_or(line).trim_ascii();
        let end = line.iter().position(|byte| b" \t".contains(byte)).unwrap_or(line.len());
        let (interpreter, rest) = line.split_at(end);
        let rest = rest.trim_ascii();
        if interpreter.is_empty() || interpreter.contains(&0) || rest.contains(&0) {
            return None;
        }
        let text = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        Some(Shebang {
            interpreter: text(interpreter),
            argument: (!rest.is_empty()).then(|| text(rest)),
        })
    }

    /// The command that env(1) will run, if env is the interpreter.
    pub(super) fn behind_env(&self) -> Option<OsString> {
        if !is_env(Path::new(&self.interpreter)) {
            return None;
        }
        let argument = self.argument.as_ref()?.as_bytes();
        // Without -S, env gets all of it as one word; the plain form is one word anyway.
        let words = argument.split(|byte| b" \t".contains(byte)).filter(|word| !word.is_empty());
        let words: Vec<OsString> = words.map(|word| OsString::from_vec(word.to_vec())).collect();
        behind_env(&words)
    }
}

pub(super) fn is_env(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == "env")
}

/// The command among the arguments of env(1): after its options and its assignments.
pub(super) fn behind_env(words: &[OsString]) -> Option<OsString> {
    let mut words = words.iter().map(|word| word.as_bytes());
    while let Some(word) = words.next() {
        match word {
            b"-u" | b"--unset" | b"-C" | b"--chdir" => drop(words.next()),
            [b'-', b'S', rest @ ..] if !rest.is_empty() => {
                let glued = rest.split(|byte| b" \t".contains(byte)).find(|word| !word.is_empty());
                return glued.map(|word| OsString::from_vec(word.to_vec()));
            }
            option if option.starts_with(b"-") => {}
            assignment if assignment.contains(&b'=') => {}
            command => return Some(OsString::from_vec(command.to_vec())),
        }
    }
    None
}

/// Whether the file is a package manager's command, which runs programs as processes of its own.
pub(super) fn is_package_manager(path: &Path) -> bool {
    const NAMES: [&str; 8] =
        ["npm", "npx", "yarn", "yarnpkg", "pnpm", "pnpx", "npm-cli.js", "npx-cli.js"];
    path.file_name().is_some_and(|name| NAMES.iter().any(|one| name == *one))
}

/// Whether the file is called `python`, `python3`, `python3.12`, `pypy3` and so on, itself or what it links to.
pub(super) fn is_python(path: &Path) -> bool {
    let python = |path: &Path| {
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let rest = name.strip_prefix("python").or_else(|| name.strip_prefix("pypy"));
        rest.is_some_and(|rest| rest.chars().all(|c| c.is_ascii_digit() || c == '.' || c == 't'))
    };
    python(path) || std::fs::canonicalize(path).is_ok_and(|real| python(&real))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Option<(String, Option<String>)> {
        let shebang = Shebang::parse(line.as_bytes())?;
        let text = |os: OsString| os.into_string().unwrap();
        Some((text(shebang.interpreter), shebang.argument.map(text)))
    }

    #[test]
    fn a_shebang_is_split_as_the_kernel_does() {
        let some = |a: &str, b: Option<&str>| Some((a.to_owned(), b.map(str::to_owned)));
        assert_eq!(parsed("#!/bin/sh\necho"), some("/bin/sh", None));
        assert_eq!(parsed("#! /bin/sh -e -x \r\n"), some("/bin/sh", Some("-e -x")));
        assert_eq!(parsed("#!/usr/bin/env node"), some("/usr/bin/env", Some("node")));
        assert_eq!(parsed("#!\n"), None);
        assert_eq!(parsed("#!/bin/a\0b\n"), None);
        assert_eq!(parsed("echo"), None);
    }

    #[test]
    fn env_is_looked_through() {
        for (line, command) in [
            ("#!/usr/bin/env node", Some("node")),
            ("#!/usr/bin/env -S node --enable-source-maps", Some("node")),
            ("#!/usr/bin/env -Snode --x", Some("node")),
            ("#!/usr/bin/env -S A=1 B=2 deno run -A", Some("deno")),
            ("#!/usr/bin/env -i -u HOME -S python3 -u", Some("python3")),
            ("#!/usr/bin/env", None),
            ("#!/usr/bin/node --env", None),
            ("#!/opt/env/sh", None),
        ] {
            let shebang = Shebang::parse(line.as_bytes()).unwrap();
            assert_eq!(shebang.behind_env(), command.map(OsString::from), "{line}");
        }
    }

    #[test]
    fn near_names_are_a_typing_error_away() {
        for (a, b, expected) in [
            ("server.js", "server.js", 0),
            ("servr.js", "server.js", 1),
            ("sevrer.js", "server.js", 1),
            ("serverr.js", "server.js", 1),
            ("", "abc", 3),
            ("node", "deno", 4),
        ] {
            assert_eq!(distance(a, b), expected, "{a} {b}");
            assert_eq!(distance(b, a), expected, "{b} {a}");
        }
        assert_eq!(distance("a", "abcdefgh"), usize::MAX);
        assert!(distance("node", "deno") > allowed("node"));
    }

    #[test]
    fn python_is_known_by_its_whole_name() {
        for name in ["python", "python3", "/usr/bin/python3.12", "python3.13t", "pypy3"] {
            assert!(is_python(Path::new(name)), "{name}");
        }
        for name in ["pythonista", "/python3/sh", "ipython"] {
            assert!(!is_python(Path::new(name)), "{name}");
        }
    }
}
