//! Writes metrics down: the text format of Prometheus 0.0.4, OpenMetrics 1.0.0, and JSON.
//!
//! The surprising rule: in OpenMetrics a counter's family has no `_total` at its end and its samples always do. Where that
//! would give two families one name, the later one is left out.
//!
//! Sources: prometheus.io "Exposition formats"; the OpenMetrics specification.

use std::collections::BTreeSet;
use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::model::{Family, Kind, Part, Sample, written};
use super::read;

/// How metrics are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Prometheus text 0.0.4.
    Text,
    /// OpenMetrics 1.0.0.
    OpenMetrics,
}

impl Format {
    /// What HTTP calls it.
    pub(crate) fn content_type(self) -> &'static str {
        match self {
            Format::Text => "text/plain; version=0.0.4; charset=utf-8",
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Everything as text.
pub(crate) fn render(families: &[Family], format: Format) -> String {
    let mut text = String::new();
    let mut used = BTreeSet::new();
    for family in families {
        let open = format == Format::OpenMetrics;
        let name = match (open, family.kind) {
            (true, Kind::Counter) => {
                family.name.strip_suffix("_total").unwrap_or(&family.name).to_owned()
            }
            _ => family.name.clone(),
        };
        if used.contains(&name) {
            continue;
        }
        let kind = match (open, family.kind) {
            (true, Kind::Unknown) => "unknown",
            (_, kind) => kind.word(),
        };
        let help = escaped(&family.help, open);
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}");
        let _ = writeln!(text, "# TYPE {name} {kind}");
        if open && !family.unit.is_empty() && name.ends_with(family.unit) {
            let _ = writeln!(text, "# UNIT {name} {}", family.unit);
        }
        for sample in &family.samples {
            line(&mut text, &name, family.kind, sample, open);
        }
        used.insert(name);
    }
    if format == Format::OpenMetrics {
        text.push_str("# EOF\n");
    }
    text
}

fn line(text: &mut String, name: &str, kind: Kind, sample: &Sample, open: bool) {
    let total = if open && kind == Kind::Counter { "_total" } else { "" };
    let mut labels = sample.key.labels.to_string();
    if let Some(bound) = sample.key.bound {
        let special = if sample.key.part == Part::Bucket { "le" } else { "quantile" };
        let comma = if labels.is_empty() { "" } else { "," };
        let value = match (open, bound.0.is_finite()) {
            (true, true) => format!("{:?}", bound.0),
            _ => written(bound.0),
        };
        let _ = write!(labels, "{comma}{special}=\"{value}\"");
    }
    let (before, after) = if labels.is_empty() { ("", "") } else { ("{", "}") };
    let suffix = sample.key.part.suffix();
    let value = written(sample.value);
    let _ = writeln!(text, "{name}{suffix}{total}{before}{labels}{after} {value}");
}

fn escaped(help: &str, quotes: bool) -> String {
    let text = help.replace('\\', "\\\\").replace('\n', "\\n");
    if quotes { text.replace('"', "\\\"") } else { text }
}

/// Everything as a JSON value; numbers that JSON has no words for are text.
pub(crate) fn json(families: &[Family]) -> Value {
    families.iter().map(family).collect()
}

fn family(family: &Family) -> Value {
    let sample = |sample: &Sample| {
        let mut labels: Map<String, Value> = read::labels(&sample.key.labels)
            .unwrap_or_default()
            .into_iter()
            .map(|(name, value)| (name, value.into()))
            .collect();
        if let Some(bound) = sample.key.bound {
            let special = if sample.key.part == Part::Bucket { "le" } else { "quantile" };
            labels.insert(special.to_owned(), written(bound.0).into());
        }
        json!({
            "name": format!("{}{}", family.name, sample.key.part.suffix()),
            "labels": labels,
            "value": value(sample.value),
        })
    };
    let samples: Vec<Value> = family.samples.iter().map(sample).collect();
    json!({
        "name": family.name,
        "type": family.kind.word(),
        "help": family.help,
        "samples": samples,
    })
}

fn value(value: f64) -> Value {
    // What is whole is written so; 2^53 and more is not known that exactly.
    if value.fract() == 0.0 && (0.0..9_007_199_254_740_992.0).contains(&value) {
        return json!(value as u64);
    }
    match value.is_finite() {
        true => json!(value),
        false => json!(written(value)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::{Bound, Key, Labels};
    use super::*;

    fn families() -> Vec<Family> {
        let bucket = |le: f64, value| Sample {
            key: Key { labels: "a=\"1\"".into(), part: Part::Bucket, bound: Some(Bound(le)) },
            value,
        };
        let part = |part, value| Sample {
            key: Key { labels: "a=\"1\"".into(), part, bound: None },
            value,
        };
        vec![
            Family {
                name: "jobs_total".into(),
                help: "Jobs\\ \"done\"".into(),
                kind: Kind::Counter,
                unit: "",
                samples: vec![Labels::default().with("slot", 1).sample(3.0)],
            },
            Family {
                name: "took_seconds".into(),
                help: "Time".into(),
                kind: Kind::Histogram,
                unit: "seconds",
                samples: vec![
                    bucket(1.0, 2.0),
                    bucket(f64::INFINITY, 3.0),
                    part(Part::Sum, 2.5),
                    part(Part::Count, 3.0),
                ],
            },
        ]
    }

    #[test]
    fn text_is_that_of_prometheus() {
        assert_eq!(
            render(&families(), Format::Text),
            "# HELP jobs_total Jobs\\\\ \"done\"\n# TYPE jobs_total counter\njobs_total{slot=\"1\"} 3\n\
             # HELP took_seconds Time\n# TYPE took_seconds histogram\n\
             took_seconds_bucket{a=\"1\",le=\"1\"} 2\ntook_seconds_bucket{a=\"1\",le=\"+Inf\"} 3\n\
             took_seconds_sum{a=\"1\"} 2.5\ntook_seconds_count{a=\"1\"} 3\n"
        );
    }

    #[test]
    fn open_metrics_has_its_own_counters_units_and_end() {
        assert_eq!(
            render(&families(), Format::OpenMetrics),
            "# HELP jobs Jobs\\\\ \\\"done\\\"\n# TYPE jobs counter\njobs_total{slot=\"1\"} 3\n\
             # HELP took_seconds Time\n# TYPE took_seconds histogram\n# UNIT took_seconds seconds\n\
             took_seconds_bucket{a=\"1\",le=\"1.0\"} 2\ntook_seconds_bucket{a=\"1\",le=\"+Inf\"} 3\n\
             took_seconds_sum{a=\"1\"} 2.5\ntook_seconds_count{a=\"1\"} 3\n# EOF\n"
        );
    }

    #[test]
    fn json_has_the_same_numbers() {
        let json = json(&families());
        assert_eq!(json[0]["samples"][0]["labels"]["slot"], "1");
        assert_eq!(json[0]["samples"][0]["value"], 3);
        assert_eq!(json[1]["samples"][1]["labels"]["le"], "+Inf");
        assert_eq!(json[1]["samples"][2]["name"], "took_seconds_sum");
    }
}
