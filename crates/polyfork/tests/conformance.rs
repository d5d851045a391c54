//! `docs/conformance/*.tsv` are true: every row has a verdict, and every test they name exists and is run.
//!
//! The tables say, behaviour by behaviour of Node's own tests, where ours are. That those tests pass is for the
//! test run to say; here the tables are held to the sources, so that a test cannot be renamed or lost under them.
//!
//! Columns: id (the middle of the name of Node's test), behaviour in our words, class, verdict, and for `test` the
//! places as `CRATE/tests/FILE.rs::NAME`, for `n/a` and `later` the reason.
#![allow(clippy::print_stdout, reason = "a test prints its counts")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const HEADER: &str = "id\tbehaviour\tclass\thow\twhere or why";
const CLASSES: [&str; 5] = ["core", "wire", "js", "win", "debug"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// What is wrong with one row.
fn fault(row: &str, ids: &mut BTreeSet<String>) -> Option<String> {
    let columns: Vec<&str> = row.split('\t').collect();
    let [id, behaviour, class, how, detail] = columns[..] else {
        return Some(format!("{} columns", columns.len()));
    };
    if !ids.insert(id.to_owned()) {
        return Some("the id is there twice".to_owned());
    }
    if id.is_empty() || behaviour.is_empty() || detail.trim().is_empty() {
        return Some("an empty column".to_owned());
    }
    if !CLASSES.contains(&class) {
        return Some(format!("no such class: {class}"));
    }
    match how {
        "n/a" | "later" => None,
        "test" => detail.split(' ').find_map(missing),
        _ => Some(format!("no verdict: {how:?}")),
    }
}

/// Why a test is not one, if so.
fn missing(place: &str) -> Option<String> {
    let Some((file, name)) = place.split_once("::") else {
        return Some(format!("{place}: not FILE::NAME"));
    };
    let Ok(source) = fs::read_to_string(root().join("crates").join(file)) else {
        return Some(format!("{place}: no such file"));
    };
    (!is_run(&source, name)).then(|| format!("{place}: no such test"))
}

/// Whether a source has a test of this name: marked as one, or listed as one for every Node version.
fn is_run(source: &str, name: &str) -> bool {
    let marked = format!("#[test]\nfn {name}(");
    let marked_async = format!("#[tokio::test]\nasync fn {name}(");
    let listed = |line: &str| line.trim().trim_end_matches(',') == name;
    let scenario = source.contains(&format!("\nasync fn {name}("));
    source.contains(&marked)
        || source.contains(&marked_async)
        || (scenario && source.lines().any(listed))
}

#[test]
fn every_row_has_a_verdict_and_every_named_test_is_run() {
    let folder = root().join("docs/conformance");
    let mut tables = 0;
    for entry in fs::read_dir(&folder).expect("the tables") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|extension| extension != "tsv") {
            continue;
        }
        tables += 1;
        let text = fs::read_to_string(&path).expect("a table");
        let mut rows = text.lines();
        assert_eq!(rows.next(), Some(HEADER), "{}", path.display());
        let mut ids = BTreeSet::new();
        let mut counts = BTreeMap::<&str, u32>::new();
        let mut faults = Vec::new();
        for row in rows {
            faults.extend(fault(row, &mut ids).map(|fault| format!("{row}\n    {fault}")));
            *counts.entry(row.split('\t').nth(3).unwrap_or("none")).or_default() += 1;
        }
        println!("{}: {} rows, {counts:?}", path.display(), ids.len());
        assert!(faults.is_empty(), "{}:\n{}", path.display(), faults.join("\n"));
    }
    assert!(tables > 0, "no table in {}", folder.display());
}

#[test]
fn faults_in_a_table_are_found() {
    let here = "polyfork/tests/conformance.rs::faults_in_a_table_are_found";
    let good = format!("a\tb\tcore\ttest\t{here}");
    assert_eq!(fault(&good, &mut BTreeSet::new()), None);
    for (bad, part) in [
        ("a\tb\tcore\ttest", "4 columns"),
        ("a\t\tcore\tn/a\twhy", "empty"),
        ("a\tb\tcore\tn/a\t", "empty"),
        ("a\tb\tother\tn/a\twhy", "class"),
        ("a\tb\tcore\t\twhy", "verdict"),
        ("a\tb\tcore\ttest\tpolyfork/tests/none.rs::x", "no such file"),
        ("a\tb\tcore\ttest\tpolyfork/tests/conformance.rs::fault", "no such test"),
    ] {
        let found = fault(bad, &mut BTreeSet::new());
        assert!(found.as_ref().is_some_and(|found| found.contains(part)), "{bad}: {found:?}");
    }
    let mut ids = BTreeSet::from(["a".to_owned()]);
    assert!(fault(&good, &mut ids).is_some_and(|found| found.contains("twice")));
}
