//! `docs/conformance/*.tsv` and `docs/faults.tsv` are true: every row has a verdict, and every test they name exists and is
//! run.
//!
//! The tables say, behaviour by behaviour of Node's own tests, where ours are. That those tests pass is for the
//! test run to say; here the tables are held to the sources, so that a test cannot be renamed or lost under them.
//!
//! Columns: id (the middle of the name of Node's test), behaviour in our words, class, verdict, and for `test` the
//! places as `CRATE/tests/FILE.rs::NAME`, for `n/a` and `later` the reason.
//!
//! The list of faults has the number of a fault, what must hold when it happens, the verdict `test` or `later`, and the
//! places, separated by commas, or the part of the project that will hold them. Numbers that are missing are not in use.
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
    let begins = [format!("fn {name}("), format!("async fn {name}(")];
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let marked = |at: usize| {
        // Attributes and comments stand between the mark and the name.
        let of_it = |line: &&&str| line.starts_with("#[") || line.starts_with("//");
        let above: Vec<_> = lines[..at].iter().rev().take_while(of_it).collect();
        let has = |mark: &str| above.iter().any(|line| line.starts_with(mark));
        (has("#[test]") || has("#[tokio::test")) && !has("#[ignore")
    };
    let is_named = |line: &&str| begins.iter().any(|begin| line.starts_with(begin));
    let found: Vec<usize> = (0..lines.len()).filter(|at| is_named(&lines[*at])).collect();
    let listed = |line: &&str| line.trim_end_matches(',') == name;
    found.iter().any(|at| marked(*at)) || (!found.is_empty() && lines.iter().any(listed))
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

const FAULTS_HEADER: &str = "number\tfault\thow\twhere or why";

/// What is wrong with one row of the list of faults; `last` is the number before it.
fn wrong(row: &str, last: &mut u32) -> Option<String> {
    let columns: Vec<&str> = row.split('\t').collect();
    let [number, fault, how, detail] = columns[..] else {
        return Some(format!("{} columns", columns.len()));
    };
    let Ok(number) = number.parse::<u32>() else { return Some("no number".to_owned()) };
    if number <= std::mem::replace(last, number) {
        return Some("the numbers do not ascend".to_owned());
    }
    if !fault.ends_with('.') || detail.trim().is_empty() {
        return Some("no sentence, or an empty column".to_owned());
    }
    match how {
        "later" => None,
        "test" => detail.split(", ").find_map(missing),
        _ => Some(format!("no verdict: {how:?}")),
    }
}

#[test]
fn every_fault_has_a_verdict_and_every_named_test_is_run() {
    let path = root().join("docs/faults.tsv");
    let text = fs::read_to_string(&path).expect("the list");
    let mut rows = text.lines();
    assert_eq!(rows.next(), Some(FAULTS_HEADER));
    let (mut last, mut counts) = (0, BTreeMap::<&str, u32>::new());
    let mut faults = Vec::new();
    for row in rows {
        faults.extend(wrong(row, &mut last).map(|fault| format!("{row}\n    {fault}")));
        *counts.entry(row.split('\t').nth(2).unwrap_or("none")).or_default() += 1;
    }
    println!("{}: {counts:?}", path.display());
    assert!(faults.is_empty(), "{}:\n{}", path.display(), faults.join("\n"));
}

#[test]
fn faults_in_the_list_of_faults_are_found() {
    let here = "polyfork/tests/conformance.rs::faults_in_the_list_of_faults_are_found";
    let good = format!("7\tIt holds.\ttest\t{here}, {here}");
    assert_eq!(wrong(&good, &mut 6), None);
    for (bad, part) in [
        ("7\tIt holds.\tlater", "3 columns"),
        ("x\tIt holds.\tlater\tsoon", "no number"),
        ("6\tIt holds.\tlater\tsoon", "ascend"),
        ("7\tIt holds\tlater\tsoon", "sentence"),
        ("7\tIt holds.\tlater\t ", "empty"),
        ("7\tIt holds.\tn/a\tno", "verdict"),
        ("7\tIt holds.\ttest\tpolyfork/tests/none.rs::x", "no such file"),
        ("7\tIt holds.\ttest\tpolyfork/tests/conformance.rs::missing", "no such test"),
    ] {
        let found = wrong(bad, &mut 6);
        assert!(found.as_ref().is_some_and(|found| found.contains(part)), "{bad}: {found:?}");
    }
    let ignored =
        "#[test]\n#[ignore = \"why\"]\nfn a() {}\n    #[test]\n    // Why.\n    async fn b() {}";
    assert!(!is_run(ignored, "a") && is_run(ignored, "b") && !is_run(ignored, "c"));
}
