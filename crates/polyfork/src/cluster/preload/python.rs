//! Places the file that lets uvicorn workers leave cleanly, and says what makes Python load it.
//!
//! The file itself, `sitecustomize.py` next to this one, says what it does. Python imports a module of that name, which it looks
//! for in the folders of PYTHONPATH first; so each version of the file has a folder of its own, whose name carries the hash.
//!
//! The surprising rule: the folder also holds an empty file called `__pycache__`. Python would make a folder of that name and
//! keep compiled code in it, which it would then run without a look at our file.
//!
//! Behaviour follows: CPython `Lib/site.py`, `Lib/importlib/_bootstrap_external.py` (`SourceLoader`), `Python/pathconfig.c`.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::{Folder, MARKER, hash, in_the_first, make_folder, own_folders, place_file, refused};

/// The folders where Python looks for modules first, with `:` between them.
pub(crate) const PATH: &str = "PYTHONPATH";
/// What Python runs before the program.
const CONTENT: &str = include_str!("sitecustomize.py");
/// The name by which Python knows it.
const NAME: &str = "sitecustomize.py";
/// Where Python would keep it compiled.
const COMPILED: &str = "__pycache__";

/// Writes the preload into the user's cache, unless it is there, and returns the folder it is alone in.
///
/// # Errors
///
/// As [`place`](super::place).
pub(crate) fn place() -> io::Result<PathBuf> {
    place_in(&own_folders(), CONTENT.as_bytes())
}

/// What to put into the environment of a Python worker, for the preload in `folder` to be loaded by it.
///
/// `existing` is the PYTHONPATH that the worker would have had; it comes second, and the preload puts it back.
pub(crate) fn environment(existing: Option<&OsStr>, folder: &Path) -> [(OsString, OsString); 2] {
    let folder = folder.as_os_str().to_owned();
    let (path, added) = match existing {
        None => (folder.clone(), folder),
        Some(existing) => {
            let mut added = folder.clone();
            added.push(":");
            let mut path = folder;
            // An empty one names no folder; behind a colon it would name the current one.
            if !existing.is_empty() {
                path = added.clone();
                path.push(existing);
            }
            (path, added)
        }
    };
    [(PATH, path), (MARKER, added)].map(|(name, value)| (name.into(), value))
}

/// Whether `exec` is an interpreter that is told to look at no PYTHONPATH (`-E`, `-I`), or to import nothing before the program
/// (`-S`): nobody would put the environment back.
pub(crate) fn is_isolated<'a>(exec: &Path, args: impl Iterator<Item = &'a OsString>) -> bool {
    let name = exec.file_name().map(OsStr::as_bytes).unwrap_or_default();
    if !name.starts_with(b"python") && !name.starts_with(b"pypy") {
        return false; // a script, whose arguments mean something else
    }
    let mut args = args.map(|arg| arg.as_bytes());
    while let Some([b'-', letters @ ..]) = args.next() {
        // The rest of the word, or the next one, belongs to the last of these.
        let own = letters.iter().position(|letter| b"cmWX-".contains(letter));
        let flags = &letters[..own.unwrap_or(letters.len())];
        if flags.iter().any(|flag| b"EIS".contains(flag)) {
            return true;
        }
        match own.map(|at| (letters[at], &letters[at + 1..])) {
            Some((b'c' | b'm', _)) => return false,
            Some((b'W' | b'X', [])) => drop(args.next()),
            _ => {}
        }
    }
    false
}

fn place_in(folders: &[Folder], content: &[u8]) -> io::Result<PathBuf> {
    let name = format!("python-{:016x}", hash(content));
    in_the_first(folders, |folder| place_in_one(folder, &name, content))
}

fn place_in_one(folder: &Folder, name: &str, content: &[u8]) -> io::Result<PathBuf> {
    let own = Folder { path: folder.path.join(name), make_parent: false };
    if own.path.as_os_str().as_bytes().contains(&b':') {
        return Err(refused("the path has a colon, by which Python would split it"));
    }
    make_folder(folder)?;
    make_folder(&own)?;
    // Before there is anything to compile.
    place_file(&own.path, own.path.join(COMPILED), b"")?;
    place_file(&own.path, own.path.join(NAME), content)?;
    Ok(own.path)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::tests::{Scratch, mode, names};
    use super::*;

    fn pairs(existing: Option<&str>) -> Vec<(String, String)> {
        let text = |os: OsString| os.into_string().expect("UTF-8");
        let pairs = environment(existing.map(OsStr::new), Path::new("/our"));
        pairs.map(|(name, value)| (text(name), text(value))).into()
    }

    #[test]
    fn our_folder_comes_first_and_what_is_ours_is_told() {
        let expected = |path: &str, added: &str| {
            [(PATH, path), (MARKER, added)].map(|(a, b)| (a.to_owned(), b.to_owned())).to_vec()
        };
        assert_eq!(pairs(None), expected("/our", "/our"));
        assert_eq!(pairs(Some("")), expected("/our", "/our:"));
        assert_eq!(pairs(Some("a:/b")), expected("/our:a:/b", "/our:"));
        assert_eq!(pairs(Some(":")), expected("/our::", "/our:"));
    }

    #[test]
    fn flags_of_an_interpreter_are_told_from_what_it_runs() {
        let isolated = |line: &str| {
            let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            is_isolated(Path::new("/usr/bin/python3"), words.iter())
        };
        for line in ["-I x.py", "-E", "-bSu x.py", "-W error -E x.py", "-Xdev -I -m uvicorn"] {
            assert!(isolated(line), "{line}");
        }
        for line in ["", "x.py -I", "-m uvicorn -I", "-mS", "-c E", "-W E x.py", "-WE", "-u x.py"] {
            assert!(!isolated(line), "{line}");
        }
        assert!(!isolated("--check-hash-based-pycs default app.py -E"));
        let words = [OsString::from("-E")];
        assert!(!is_isolated(Path::new("/venv/bin/gunicorn"), words.iter()));
    }

    #[test]
    fn a_folder_of_its_own_is_private_and_takes_no_compiled_code() {
        let scratch = Scratch::new();
        let folder = place_in(&[scratch.folder("f")], b"one").expect("placed");
        assert_eq!((mode(&folder), mode(&folder.join(NAME))), (0o700, 0o600));
        assert_eq!(names(&folder), [COMPILED, NAME]);
        assert!(fs::create_dir(folder.join(COMPILED)).is_err());
        let other = place_in(&[scratch.folder("f")], b"two").expect("placed");
        assert_ne!(folder, other, "versions live side by side");
        assert_eq!(place_in(&[scratch.folder("f")], b"one").expect("there"), folder);
        assert_eq!(fs::read(folder.join(NAME)).expect("kept"), b"one");
    }

    #[test]
    fn a_path_that_python_would_split_is_passed_over() {
        let scratch = Scratch::new();
        let folders = [scratch.folder("a:b"), scratch.folder("next")];
        let placed = place_in(&folders, b"x").expect("placed");
        assert!(placed.starts_with(scratch.folder("next").path));
        assert_eq!(names(scratch.folder("next").path.parent().expect("a folder")).len(), 1);
    }

    #[test]
    fn compiled_code_of_somebody_else_is_not_run() {
        let scratch = Scratch::new();
        let folder = place_in(&[scratch.folder("f")], b"x").expect("placed");
        fs::remove_file(folder.join(COMPILED)).expect("ours");
        fs::create_dir(folder.join(COMPILED)).expect("a folder");
        assert!(place_in(&[scratch.folder("f")], b"x").is_err());
    }
}
