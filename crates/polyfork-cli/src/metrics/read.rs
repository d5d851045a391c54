//! Reads what a program says of itself: the text format of Prometheus, OpenMetrics too, or prom-client's JSON.
//!
//! Both become [`Reading`]s; adding them up is the business of `merge`. Nothing here trusts its input: a line that makes no
//! sense is left out and counted, and so is what is too much.
//!
//! The surprising rule: a comment `# AGGREGATE name max` says how the values of several workers become one; Prometheus passes
//! over such comments.

use std::collections::BTreeMap;

use polyfork::cluster::Message;
use serde::Deserialize;

use super::model::{Key, Kind, Part, Sample, help, is_name, number};

/// Samples of one worker.
const MOST_SAMPLES: usize = 10_000;

/// How the values of several workers become one. The words are prom-client's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// All together.
    Sum,
    /// That of the lowest slot.
    First,
    /// The least.
    Min,
    /// The most.
    Max,
    /// The mean.
    Average,
    /// Not told.
    Omit,
}

impl How {
    /// Reads a word.
    pub(crate) fn of(word: &str) -> Option<How> {
        Some(match word {
            "sum" => How::Sum,
            "first" => How::First,
            "min" => How::Min,
            "max" => How::Max,
            "average" => How::Average,
            "omit" => How::Omit,
            _ => return None,
        })
    }
}

/// One family, as one worker told it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Reading {
    /// Its name, which can be one.
    pub(crate) name: String,
    /// For people.
    pub(crate) help: String,
    /// What it is.
    pub(crate) kind: Kind,
    /// How it is merged.
    pub(crate) how: How,
    /// Its numbers.
    pub(crate) samples: Vec<Sample>,
}

/// What one worker told.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// All families.
    pub(crate) readings: Vec<Reading>,
    /// Samples that made no sense, or were too many.
    pub(crate) left_out: u64,
}

// ---- text ----

/// Families as they are found in a text.
#[derive(Default)]
struct Found {
    /// By name; with the order in which they came.
    families: BTreeMap<String, (usize, Reading)>,
    /// What was said of a name before its samples.
    said: BTreeMap<String, Said>,
}

#[derive(Default, Clone)]
struct Said {
    help: String,
    kind: Option<Kind>,
    how: Option<How>,
}

/// Reads a text.
pub(crate) fn text(text: &str) -> Answer {
    let mut found = Found::default();
    let mut left_out = 0;
    let mut samples = 0;
    for line in text.lines() {
        let line = line.trim();
        if let Some(comment) = line.strip_prefix('#') {
            found.comment(comment);
        } else if !line.is_empty() {
            samples += 1;
            if samples > MOST_SAMPLES || found.sample(line).is_none() {
                left_out += 1;
            }
        }
    }
    let mut families: Vec<_> = found.families.into_values().collect();
    families.sort_by_key(|(order, _)| *order);
    Answer { readings: families.into_iter().map(|(_, reading)| reading).collect(), left_out }
}

impl Found {
    fn comment(&mut self, comment: &str) {
        let mut words = comment.trim_start().splitn(3, ' ');
        let (Some(what), Some(name)) = (words.next(), words.next()) else { return };
        let rest = words.next().unwrap_or_default().trim();
        if !is_name(name, true) || self.said.len() >= MOST_SAMPLES {
            return;
        }
        let mut said = self.said.get(name).cloned().unwrap_or_default();
        match what {
            "HELP" => said.help = help(&rest.replace("\\n", " ").replace("\\\\", "\\")),
            "TYPE" => said.kind = Some(Kind::of(rest)),
            "AGGREGATE" => said.how = How::of(rest),
            _ => return,
        }
        self.said.insert(name.to_owned(), said);
    }

    /// `None`: it makes no sense.
    fn sample(&mut self, line: &str) -> Option<()> {
        let end = line.find(|c: char| c == '{' || c.is_whitespace())?;
        let (name, rest) = line.split_at(end);
        if !is_name(name, true) {
            return None;
        }
        let (labels, rest) = match rest.strip_prefix('{') {
            Some(rest) => {
                let end = end_of_labels(rest)?;
                (self::labels(&rest[..end])?, &rest[end + 1..])
            }
            None => (Vec::new(), rest),
        };
        // A timestamp or an example may follow.
        let value = number(rest.split_whitespace().next()?)?;
        let (family, part, said) = self.family_of(name)?;
        let kind = said.kind.unwrap_or(Kind::Unknown);
        let key = Key::read(kind, part, labels)?;
        let order = self.families.len();
        let how = said.how.unwrap_or(How::Sum);
        let fresh = || {
            let (name, help) = (family.clone(), said.help);
            (order, Reading { name, help, kind, how, samples: Vec::new() })
        };
        let (_, reading) = self.families.entry(family.clone()).or_insert_with(fresh);
        (reading.kind == kind).then(|| reading.samples.push(Sample { key, value }))
    }

    /// The family that a sample belongs to, by what was said of names so far. `None` for what is passed over.
    fn family_of(&self, name: &str) -> Option<(String, Part, Said)> {
        if let Some(said) = self.said.get(name) {
            return Some((name.to_owned(), Part::Whole, said.clone()));
        }
        for (part, kinds) in [
            (Part::Bucket, &[Kind::Histogram][..]),
            (Part::Sum, &[Kind::Histogram, Kind::Summary]),
            (Part::Count, &[Kind::Histogram, Kind::Summary]),
        ] {
            if let Some(base) = name.strip_suffix(part.suffix())
                && let Some(said) = self.said.get(base)
                && said.kind.is_some_and(|kind| kinds.contains(&kind))
            {
                return Some((base.to_owned(), part, said.clone()));
            }
        }
        // OpenMetrics names the family without it.
        if let Some(base) = name.strip_suffix("_total")
            && let Some(said) = self.said.get(base)
            && said.kind == Some(Kind::Counter)
        {
            return Some((name.to_owned(), Part::Whole, said.clone()));
        }
        Some((name.to_owned(), Part::Whole, Said::default()))
    }
}

/// Where the labels end, which a quoted brace does not.
fn end_of_labels(text: &str) -> Option<usize> {
    let mut quoted = false;
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '}' if !quoted => return Some(at),
            _ => {}
        }
    }
    None
}

/// Reads what stands between the braces.
pub(crate) fn labels(text: &str) -> Option<Vec<(String, String)>> {
    let mut labels = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let (name, after) = rest.split_once('=')?;
        let mut value = String::new();
        let mut chars = after.trim_start().strip_prefix('"')?.chars();
        loop {
            match chars.next()? {
                '"' => break,
                '\\' => match chars.next()? {
                    'n' => value.push('\n'),
                    c @ ('\\' | '"') => value.push(c),
                    _ => return None,
                },
                c => value.push(c),
            }
        }
        labels.push((name.trim().to_owned(), value));
        rest = chars.as_str().trim_start();
        rest = match rest.strip_prefix(',') {
            Some(more) => more.trim_start(),
            None if rest.is_empty() => rest,
            None => return None,
        };
    }
    Some(labels)
}

// ---- prom-client ----

#[derive(Deserialize)]
struct Said15 {
    #[serde(default)]
    error: Option<String>,
    /// Of each registry.
    #[serde(default)]
    metrics: Vec<Vec<Metric>>,
}

#[derive(Deserialize)]
struct Metric {
    name: String,
    #[serde(default)]
    help: Option<String>,
    #[serde(default)]
    r#type: Option<String>,
    #[serde(default)]
    aggregator: Option<String>,
    #[serde(default)]
    values: Vec<One>,
}

#[derive(Deserialize)]
struct One {
    /// JSON has no word for what is no number.
    #[serde(default)]
    value: Option<f64>,
    #[serde(default)]
    labels: Option<BTreeMap<String, Scalar>>,
    #[serde(rename = "metricName", default)]
    metric_name: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Scalar {
    Text(String),
    Number(f64),
    Truth(bool),
    Nothing(()),
}

impl Scalar {
    /// As JavaScript turns it into text.
    fn text(self) -> String {
        match self {
            Scalar::Text(text) => text,
            Scalar::Number(number) => format!("{number}"),
            Scalar::Truth(truth) => truth.to_string(),
            Scalar::Nothing(()) => "null".to_owned(),
        }
    }
}

/// Reads prom-client's answer.
///
/// # Errors
/// What the program said went wrong, or that this is no such answer.
pub(crate) fn prom_client(message: &Message) -> Result<Answer, String> {
    said(message.decode().map_err(|error| error.to_string())?)
}

fn said(said: Said15) -> Result<Answer, String> {
    if let Some(error) = said.error {
        return Err(error);
    }
    let mut answer = Answer::default();
    let mut samples = 0;
    for metric in said.metrics.into_iter().flatten() {
        samples += metric.values.len();
        answer.metric(metric, samples <= MOST_SAMPLES);
    }
    Ok(answer)
}

impl Answer {
    fn metric(&mut self, metric: Metric, has_room: bool) {
        let Metric { name, help: about, r#type, aggregator, values } = metric;
        let how = aggregator.as_deref().map_or(Some(How::Sum), How::of);
        let kind = Kind::of(r#type.as_deref().unwrap_or_default());
        let (Some(how), true) = (how, has_room && is_name(&name, true)) else {
            self.left_out += values.len() as u64;
            return;
        };
        let mut samples = Vec::with_capacity(values.len());
        for One { value, labels, metric_name } in values {
            let part = metric_name.as_deref().map_or(Some(Part::Whole), |own| Part::of(own, &name));
            let labels = labels.unwrap_or_default().into_iter();
            let labels = labels.map(|(name, value)| (name, value.text())).collect();
            match part.and_then(|part| Key::read(kind, part, labels)) {
                Some(key) => samples.push(Sample { key, value: value.unwrap_or(f64::NAN) }),
                None => self.left_out += 1,
            }
        }
        let help = help(about.as_deref().unwrap_or_default());
        self.readings.push(Reading { name, help, kind, how, samples });
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::Bound;
    use super::*;

    #[test]
    fn a_text_is_read_family_by_family() {
        let answer = text(
            "# HELP jobs_total Jobs done\n# TYPE jobs_total counter\njobs_total{kind=\"a b\"} 3 1700000000000\n\
             # AGGREGATE depth max\n# TYPE depth gauge\ndepth 2.5\n\
             # TYPE took histogram\ntook_bucket{le=\"0.1\"} 1\ntook_bucket{le=\"+Inf\"} 2 # {id=\"x\"} 0.3\ntook_sum 1.5\ntook_count 2\n\
             # TYPE open counter\nopen_total 9\nuntyped_one 1\n# EOF\n",
        );
        assert_eq!(answer.left_out, 0);
        let names: Vec<_> = answer.readings.iter().map(|r| (r.name.as_str(), r.kind)).collect();
        assert_eq!(
            names,
            [
                ("jobs_total", Kind::Counter),
                ("depth", Kind::Gauge),
                ("took", Kind::Histogram),
                ("open_total", Kind::Counter),
                ("untyped_one", Kind::Unknown),
            ]
        );
        assert_eq!(answer.readings[1].how, How::Max);
        let took = &answer.readings[2].samples;
        assert_eq!(took[1].key.bound, Some(Bound(f64::INFINITY)));
        assert_eq!((took[1].value, took[3].value), (2.0, 2.0));
        assert_eq!(answer.readings[0].help, "Jobs done");
    }

    #[test]
    fn what_prom_client_says_is_read_family_by_family() {
        let json = r#"{"type":"prom-client:getMetricsRes","requestId":"polyfork:1","metrics":[[
            {"name":"jobs","help":"Jobs","type":"counter","aggregator":"sum","values":[{"value":3,"labels":{"code":200,"ok":true}}]},
            {"name":"took","help":"","type":"histogram","values":[
                {"labels":{"le":0.5},"value":1,"metricName":"took_bucket"},
                {"labels":{"le":"+Inf"},"value":2,"metricName":"took_bucket","exemplar":null},
                {"labels":{},"value":null,"metricName":"took_sum"}]}],
           [{"name":"bad name","values":[{"value":1}]},
            {"name":"strange","aggregator":"median","values":[{"value":1},{"value":2}]},
            {"name":"other","type":"gauge","values":[{"value":1,"metricName":"polyfork_workers"}]}]]}"#;
        let answer = said(serde_json::from_str(json).unwrap()).unwrap();
        assert_eq!(answer.left_out, 4);
        assert_eq!(&*answer.readings[0].samples[0].key.labels, "code=\"200\",ok=\"true\"");
        let took = &answer.readings[1].samples;
        assert_eq!(took[1].key.bound, Some(Bound(f64::INFINITY)));
        assert!(took[2].value.is_nan() && took[2].key.part == Part::Sum);
        let error = serde_json::from_str(r#"{"error":"no registry"}"#).unwrap();
        assert_eq!(said(error).unwrap_err(), "no registry");
    }

    #[test]
    fn lines_without_sense_are_left_out_and_counted() {
        let bad = [
            "no_value",
            "a{b=\"c} 1",
            "a{b=c} 1",
            "a{b=\"c\" d=\"e\"} 1",
            "1a 1",
            "a{b=\"\\x\"} 1",
            "a one",
            "a{} ",
            "\u{1b}[2J 1",
        ];
        let answer = text(&bad.join("\n"));
        assert_eq!((answer.left_out, answer.readings.len()), (bad.len() as u64, 0));
    }

    #[test]
    fn more_samples_than_are_read_are_left_out_and_counted() {
        let long: String = (0..MOST_SAMPLES + 7).map(|n| format!("a{{n=\"{n}\"}} 1\n")).collect();
        let answer = text(&long);
        assert_eq!((answer.left_out, answer.readings[0].samples.len()), (7, MOST_SAMPLES));
    }

    #[test]
    fn labels_are_read_as_they_are_written() {
        let read = labels("a=\"x\\\"\\\\\\n}\", b=\"\",").unwrap();
        assert_eq!(read, [("a".into(), "x\"\\\n}".into()), ("b".into(), String::new())]);
        assert_eq!(labels(""), Some(Vec::new()));
    }
}
