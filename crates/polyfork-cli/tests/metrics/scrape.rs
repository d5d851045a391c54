//! A scraper: asks over HTTP and reads text as strictly as Prometheus does.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;

use serde_json::Value;

use super::desk::Desk;
use super::support::PATIENCE;

/// What was told, by name and labels as written.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) samples: BTreeMap<String, f64>,
    pub(crate) types: BTreeMap<String, String>,
}

impl Told {
    /// Reads a text; panics on what Prometheus would not take.
    pub(crate) fn read(text: &str) -> Told {
        let mut told = Told::default();
        let mut helped = BTreeSet::new();
        assert!(text.is_empty() || text.ends_with('\n'), "the last line ends");
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "control characters");
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let name = help.split(' ').next().expect("a name");
                assert!(helped.insert(name.to_owned()), "a second help of {name}");
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').expect("a type");
                let before = told.types.insert(name.to_owned(), kind.to_owned());
                assert!(before.is_none(), "a second type of {name}");
            } else if !line.starts_with('#') {
                let (series, value) = line.rsplit_once(' ').expect(line);
                let value = match value {
                    "+Inf" => f64::INFINITY,
                    "-Inf" => f64::NEG_INFINITY,
                    number => number.parse().unwrap_or_else(|e| panic!("{e}: {line}")),
                };
                let before = told.samples.insert(series.to_owned(), value);
                assert!(before.is_none(), "a second sample of {series}");
            }
        }
        told
    }

    pub(crate) fn value(&self, series: &str) -> Option<f64> {
        self.samples.get(series).copied()
    }

    /// The value; panics if there is none.
    pub(crate) fn of(&self, series: &str) -> f64 {
        self.value(series).unwrap_or_else(|| panic!("no {series} in {:#?}", self.samples.keys()))
    }

    /// Series of one name.
    pub(crate) fn named(&self, name: &str) -> Vec<&str> {
        let is = |series: &&String| series.split('{').next() == Some(name);
        self.samples.keys().filter(is).map(String::as_str).collect()
    }

    /// The sum over series of one name.
    pub(crate) fn sum(&self, name: &str) -> f64 {
        self.named(name).into_iter().map(|series| self.of(series)).sum()
    }
}

/// By the verb.
pub(crate) fn told(desk: &Desk, name: &str) -> Told {
    Told::read(&desk.did(&["metrics", name]))
}

/// Where an app says that it serves metrics.
pub(crate) fn place(desk: &Desk, name: &str) -> SocketAddr {
    let status: Value = desk.status(name);
    let place = status["metrics"].as_str().expect("metrics").to_owned();
    let address = place.strip_prefix("http://").and_then(|rest| rest.strip_suffix("/metrics"));
    address.expect("an address").parse().expect("an address")
}

/// Head and body of an answer.
pub(crate) fn exchange(mut stream: impl Read + Write, request: &str) -> (String, String) {
    stream.write_all(request.as_bytes()).expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}"));
    (head.to_owned(), body.to_owned())
}

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    stream
}

/// GET of /metrics.
pub(crate) fn scrape(address: SocketAddr) -> Told {
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\n\r\n");
    let (head, body) = exchange(connect(address), &request);
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    assert_eq!(length.and_then(|length| length.parse().ok()), Some(body.len()));
    Told::read(&body)
}

/// A program that `cargo xtask setup` has installed.
pub(crate) fn peer(name: &str) -> Option<String> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let manifest = std::fs::read_to_string(root.join(".peers/manifest.json")).ok()?;
    let manifest: Value = serde_json::from_str(&manifest).ok()?;
    manifest[name]["path"].as_str().map(str::to_owned)
}

/// prom-client, if set-up has brought it.
pub(crate) fn prom_client() -> Option<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = root.join(".peers/npm-prom-client/node_modules/prom-client");
    path.exists().then_some(path)
}
