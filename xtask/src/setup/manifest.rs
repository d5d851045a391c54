//! `.peers/manifest.json`: where each tool is, for tests and benchmarks.
//!
//! One object, tool name to `{"path", "version"}`, or to `{"missing": reason}` so that a test that
//! skips can say why. Paths are absolute: the file belongs to this machine and is written anew by
//! every set-up.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use super::Outcome;

/// A tool that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tool {
    /// Absolute path of the program, or of the folder of a library.
    pub(crate) path: PathBuf,
    /// Version as the tool names it.
    pub(crate) version: String,
}

/// All tools, by name; the other side is the reason for which one is missing.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Manifest(BTreeMap<String, Result<Tool, String>>);

impl Manifest {
    /// From what a set-up found.
    pub(super) fn of(outcomes: &[Outcome]) -> Self {
        let entry = |outcome: &Outcome| match &outcome.result {
            Ok(found) => Ok(found.tool.clone()),
            Err(reason) => Err(reason.clone()),
        };
        Self(outcomes.iter().map(|outcome| (outcome.name.to_owned(), entry(outcome))).collect())
    }

    /// Reads the file that the last set-up wrote.
    ///
    /// # Errors
    /// When there is none, or it is not what set-up writes.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("read {}; run `cargo xtask setup`", path.display()))?;
        Self::parse(&text).with_context(|| format!("read {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let value: BTreeMap<String, Value> = serde_json::from_str(text)?;
        let entry = |tool: &Value| match (tool["path"].as_str(), tool["version"].as_str()) {
            (Some(path), Some(version)) => Ok(Tool { path: path.into(), version: version.into() }),
            _ => Err(tool["missing"].as_str().unwrap_or("unknown reason").to_owned()),
        };
        Ok(Self(value.iter().map(|(name, tool)| (name.clone(), entry(tool))).collect()))
    }

    /// Writes it whole or not at all, so that a reader never sees half a file.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let entry = |tool: &Result<Tool, String>| match tool {
            Ok(tool) => json!({ "path": tool.path, "version": tool.version }),
            Err(reason) => json!({ "missing": reason }),
        };
        let all: BTreeMap<&String, Value> =
            self.0.iter().map(|(k, tool)| (k, entry(tool))).collect();
        let draft = path.with_extension("json.new");
        fs::write(&draft, serde_json::to_string_pretty(&all)? + "\n")
            .and_then(|()| fs::rename(&draft, path))
            .with_context(|| format!("write {}", path.display()))
    }

    /// The tool of that name.
    ///
    /// # Errors
    /// Says why it is missing.
    pub(crate) fn tool(&self, name: &str) -> Result<&Tool> {
        match self.0.get(name) {
            Some(Ok(tool)) => Ok(tool),
            Some(Err(reason)) => Err(anyhow!("{name} is missing: {reason}")),
            None => Err(anyhow!("{name} is unknown to the set-up")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_manifest_is_read_back_with_the_reason_for_a_missing_tool() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("manifest.json");
        let tool = Tool { path: "/opt/wrk".into(), version: "4.1.0".into() };
        let entries = [("wrk".to_owned(), Ok(tool)), ("bun".to_owned(), Err("refused".to_owned()))];
        let manifest = Manifest(entries.into());
        manifest.write(&path).unwrap();
        let read = Manifest::read(&path).unwrap();
        assert_eq!(read, manifest);
        assert_eq!(read.tool("bun").unwrap_err().to_string(), "bun is missing: refused");
        assert_eq!(read.tool("cow").unwrap_err().to_string(), "cow is unknown to the set-up");
    }
}
