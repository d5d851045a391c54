//! An app as a file wants it, whatever kind of file that was; and how it differs from one that runs.
//!
//! The surprising rule: a running app keeps of its variables and arguments only hashes for this comparison, so that asking
//! it for its configuration shows no secret.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::fault::Mark;
use super::file::Options;
use super::keys::FIXED;

/// One app.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    pub(crate) name: String,
    /// The file, in full.
    pub(crate) file: PathBuf,
    pub(crate) program: String,
    pub(crate) args: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    /// Options by their keys, as the command line would have them.
    pub(crate) options: Options,
    /// Whether it is started with all the others.
    pub(crate) autostart: bool,
    /// Where it is, if that is known.
    pub(crate) at: Option<Mark>,
    /// Where its keys are.
    pub(crate) marks: BTreeMap<String, Mark>,
}

impl Wanted {
    pub(crate) fn new(file: &Path) -> Wanted {
        Wanted { file: file.to_owned(), autostart: true, ..Wanted::default() }
    }

    fn folder(&self) -> &Path {
        self.file.parent().unwrap_or(Path::new("/"))
    }

    /// Makes what is relative to the file's folder independent of where we are. `paths` are the keys that hold paths.
    pub(crate) fn settle(&mut self, paths: &[String]) {
        let folder = self.folder().to_owned();
        self.options.entry("cwd".to_owned()).or_insert_with(|| vec![String::new()]);
        for (key, values) in &mut self.options {
            for value in values {
                if paths.contains(key) {
                    let joined = folder.join(&*value);
                    // A folder's own name ends with no slash.
                    let joined: PathBuf = joined.components().collect();
                    *value = joined.to_string_lossy().into_owned();
                } else if let (true, Some(path)) = (key == "listen", value.strip_prefix("unix:"))
                    && !path.starts_with(['/', '@'])
                {
                    *value = format!("unix:{}", folder.join(path).display());
                }
            }
        }
    }

    /// Where its program is looked up.
    pub(crate) fn cwd(&self) -> PathBuf {
        let cwd = self.options.get("cwd").and_then(|values| values.first());
        cwd.map_or_else(|| self.folder().to_owned(), PathBuf::from)
    }

    /// The files that it is made of, as far as its command names them, and what tells their versions apart.
    fn stamps(&self) -> BTreeMap<String, String> {
        let cwd = self.cwd();
        let words = std::iter::once(&self.program).chain(&self.args);
        let stamp = |word: &String| {
            let found =
                std::fs::metadata(cwd.join(word)).ok().filter(std::fs::Metadata::is_file)?;
            let (seconds, part) = (found.mtime(), found.mtime_nsec());
            Some((word.clone(), format!("{seconds}.{part:09} {} {}", found.size(), found.ino())))
        };
        words.filter_map(stamp).collect()
    }
}

/// What a running app tells of its configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Digest {
    /// The file, in full; none if the app was started without one.
    pub(crate) file: Option<PathBuf>,
    pub(crate) app: String,
    pub(crate) profile: Option<String>,
    salt: u64,
    program: u64,
    args: u64,
    env: BTreeMap<String, u64>,
    options: Options,
    files: BTreeMap<String, String>,
}

impl Digest {
    /// `salt` is any number; hashes of different salts have nothing in common.
    pub(crate) fn of(app: &Wanted, profile: Option<&str>, salt: u64) -> Digest {
        let hash = |texts: &[&str]| hash(salt, texts);
        let args: Vec<&str> = app.args.iter().map(String::as_str).collect();
        Digest {
            file: Some(app.file.clone()),
            app: app.name.clone(),
            profile: profile.map(str::to_owned),
            salt,
            program: hash(&[&app.program]),
            args: hash(&args),
            env: app.env.iter().map(|(key, value)| (key.clone(), hash(&[value]))).collect(),
            options: app.options.clone(),
            files: app.stamps(),
        }
    }

    /// The same for another version of the app, so that the two can be compared.
    pub(crate) fn like(&self, app: &Wanted, profile: Option<&str>) -> Digest {
        Digest::of(app, profile, self.salt)
    }

    /// The same, with what a reload does not change as `old` has it.
    pub(crate) fn but_fixed_as(mut self, old: &Digest) -> Digest {
        for key in FIXED {
            match old.options.get(key) {
                Some(values) => drop(self.options.insert(key.to_owned(), values.clone())),
                None => drop(self.options.remove(key)),
            }
        }
        self
    }

    /// What has to change for a running app to be what is wanted.
    pub(crate) fn changes(&self, wanted: &Wanted, profile: Option<&str>) -> Vec<Change> {
        let new = self.like(wanted, profile);
        let mut changes = Vec::new();
        let mut add = |key: &str, from: Option<String>, to: Option<String>, takes| {
            changes.push(Change { key: key.to_owned(), from, to, takes });
        };
        if self.program != new.program {
            add("program", None, Some(wanted.program.clone()), Takes::Reload);
        }
        if self.args != new.args {
            add("args", None, None, Takes::Reload);
        }
        for (word, stamp) in &new.files {
            if self.files.get(word).is_some_and(|old| old != stamp) {
                add(word, None, Some(NEWER.to_owned()), Takes::Reload);
            }
        }
        let keys = |old: Vec<&String>, new: Vec<&String>| {
            let all: std::collections::BTreeSet<String> =
                old.into_iter().chain(new).cloned().collect();
            all
        };
        for key in keys(self.env.keys().collect(), new.env.keys().collect()) {
            let (old, new) = (self.env.get(&key), new.env.get(&key));
            if old != new {
                let said = |is: Option<&u64>| is.map(|_| "set".to_owned());
                let to =
                    if old.is_some() && new.is_some() { Some("changed".into()) } else { said(new) };
                add(&format!("env.{key}"), said(old), to, Takes::Reload);
            }
        }
        for key in keys(self.options.keys().collect(), new.options.keys().collect()) {
            let (old, new) = (self.options.get(&key), new.options.get(&key));
            let said = |values: Option<&Vec<String>>| values.map(|values| values.join(" "));
            let takes = match key.as_str() {
                "workers" => Takes::Scale,
                key if FIXED.contains(&key) => Takes::Replace,
                _ => Takes::Reload,
            };
            if old != new {
                add(&key, said(old), said(new), takes);
            }
        }
        changes
    }
}

/// What a file has become that is named in the command.
pub(crate) const NEWER: &str = "a newer version";

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Change {
    pub(crate) key: String,
    /// As it is; none where it is not set, or is not shown.
    pub(crate) from: Option<String>,
    /// As it is wanted.
    pub(crate) to: Option<String>,
    /// What it takes.
    #[serde(skip)]
    pub(crate) takes: Takes,
}

/// What it takes for a change to have its effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Takes {
    Scale,
    Reload,
    Replace,
}

/// FNV-1a, 64 bit, over texts that are told apart: the same for every build of this program.
fn hash(salt: u64, texts: &[&str]) -> u64 {
    let texts = texts.iter().flat_map(|text| text.bytes().map(u16::from).chain([256]));
    let salt = salt.to_le_bytes().into_iter().map(u16::from);
    salt.chain(texts).fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app() -> Wanted {
        let mut app = Wanted::new(Path::new("/srv/app/polyfork.toml"));
        app.name = "shop".into();
        app.program = "server.js".into();
        app.env.insert("TOKEN".into(), "secret".into());
        app.options.insert("grace".into(), vec!["1m".into()]);
        app
    }

    #[test]
    fn a_digest_tells_what_changed_and_no_secret() {
        let before = Digest::of(&app(), None, 7);
        assert!(!serde_json::to_string(&before).expect("JSON").contains("secret"));
        assert_eq!(before.changes(&app(), None), []);
        let mut after = app();
        after.env.insert("TOKEN".into(), "other".into());
        after.env.insert("NEW".into(), String::new());
        after.options.insert("grace".into(), vec!["2m".into()]);
        after.options.insert("policy".into(), vec!["shared".into()]);
        after.options.insert("workers".into(), vec!["3".into()]);
        after.args = vec!["x".into()];
        let changes = before.changes(&after, None);
        let told: Vec<_> = changes.iter().map(|c| (c.key.as_str(), c.takes)).collect();
        assert_eq!(
            told,
            [
                ("args", Takes::Reload),
                ("env.NEW", Takes::Reload),
                ("env.TOKEN", Takes::Reload),
                ("grace", Takes::Reload),
                ("policy", Takes::Replace),
                ("workers", Takes::Scale),
            ]
        );
        assert!(!format!("{changes:?}").contains("other"), "{changes:?}");
    }

    #[test]
    fn a_reload_leaves_what_it_cannot_change_to_be_changed() {
        let before = Digest::of(&app(), None, 7);
        let mut after = app();
        after.options.insert("policy".into(), vec!["shared".into()]);
        after.options.insert("grace".into(), vec!["2m".into()]);
        let reloaded = before.like(&after, None).but_fixed_as(&before);
        let left: Vec<_> =
            reloaded.changes(&after, None).into_iter().map(|change| change.key).collect();
        assert_eq!(left, ["policy"]);
    }

    #[test]
    fn texts_are_told_apart_however_they_are_cut() {
        assert_ne!(hash(1, &["ab", "c"]), hash(1, &["a", "bc"]));
        assert_ne!(hash(1, &["a"]), hash(2, &["a"]));
    }

    #[test]
    fn what_is_relative_is_relative_to_the_file() {
        let mut app = app();
        app.options.insert("listen".into(), vec!["unix:run/x.sock".into(), ":80".into()]);
        app.settle(&["cwd".to_owned()]);
        assert_eq!(app.cwd(), Path::new("/srv/app"));
        assert_eq!(app.options["listen"], ["unix:/srv/app/run/x.sock", ":80"]);
        app.options.insert("cwd".into(), vec!["web".into()]);
        app.settle(&["cwd".to_owned()]);
        assert_eq!(app.cwd(), Path::new("/srv/app/web"));
    }
}
