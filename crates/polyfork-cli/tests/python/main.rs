//! Python workers: what their clients lose when they leave, and what the preload for that leaves alone.
//!
//! Needs `python3`, and of what `cargo xtask setup` brings uvicorn and gunicorn; what is missing is said.

#![allow(clippy::print_stdout, reason = "tests print their counts")]

#[path = "../support/mod.rs"]
mod support;

mod kept;
mod leaving;
mod preload;

use std::path::PathBuf;

use serde_json::Value;

use support::skip;

fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// The folder of the stock programs.
fn apps() -> String {
    root().join("tests/apps").to_str().expect("a path").to_owned()
}

/// A peer that the set-up has brought; a skip if it has not.
fn peer(test: &str, name: &str) -> Option<String> {
    let manifest = std::fs::read_to_string(root().join(".peers/manifest.json")).ok();
    let manifest: Option<Value> = manifest.and_then(|text| serde_json::from_str(&text).ok());
    let path = manifest.and_then(|m| m[name]["path"].as_str().map(str::to_owned));
    if path.is_none() {
        skip(test, &format!("{name} is missing: run `cargo xtask setup`"));
    }
    path
}

/// A program of the environment that the set-up has brought, if the environment also has a module; else a skip.
fn with_module(test: &str, program: &str, module: &str) -> Option<String> {
    let program = peer(test, program)?;
    let python = PathBuf::from(&program).with_file_name("python");
    let import = format!("import {module}");
    let found = support::ended({
        let mut command = support::command(python);
        command.args(["-W", "ignore", "-c", &import]);
        command
    });
    if found.code != Some(0) {
        skip(test, &format!("{module} is missing: run `cargo xtask setup`"));
        return None;
    }
    Some(program)
}
