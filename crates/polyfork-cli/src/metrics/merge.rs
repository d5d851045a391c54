//! Makes one set of metrics of what all workers of an app tell of themselves.
//!
//! Each metric says how: the sum as a rule. What is read is `read`; here it is added up.
//!
//! The surprising rule: what only grows is remembered. When a worker is replaced its counters begin anew, and a plain sum would
//! go back; whoever computes rates from it would take all that is left for new. So what a worker had counted when it was
//! last asked stays in the sum after its end, and while it does not answer. This is kept only for apps that tell metrics,
//! and bounded: beyond 20,000 series, those that no living worker has are forgotten, and then new ones are left out.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::model::{Family, Key, Kind, Part, Sample};
use super::read::{Answer, How, Reading};

/// Series of an app.
const MOST_SERIES: usize = 20_000;
/// Names that are ours.
const OURS: &str = "polyfork_";

/// What is remembered of workers that are gone or do not answer.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Memory {
    families: BTreeMap<String, Kept>,
    series: usize,
}

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    kind: Kind,
    help: String,
    series: BTreeMap<Key, Counted>,
}

/// One series that only grows.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Counted {
    /// By workers that are gone.
    gone: f64,
    /// By worker, as it was last told.
    living: Vec<(u64, f64)>,
}

impl Counted {
    fn set(&mut self, worker: u64, value: f64) {
        match self.living.iter_mut().find(|(of, _)| *of == worker) {
            Some((_, known)) => *known = value,
            None => self.living.push((worker, value)),
        }
    }

    fn total(&self) -> f64 {
        self.gone + self.living.iter().map(|(_, value)| value).sum::<f64>()
    }
}

/// A series of this round that is not remembered.
struct Passing {
    value: f64,
    count: u32,
}

impl Passing {
    fn add(&mut self, how: How, value: f64) {
        self.count += 1;
        match how {
            How::Sum | How::Average => self.value += value,
            How::Min => self.value = self.value.min(value),
            How::Max => self.value = self.value.max(value),
            How::First | How::Omit => {}
        }
    }

    fn result(&self, how: How) -> f64 {
        match how {
            How::Average => self.value / f64::from(self.count.max(1)),
            _ => self.value,
        }
    }
}

struct Round {
    kind: Kind,
    help: String,
    how: How,
    series: BTreeMap<Key, Passing>,
}

/// What came of it.
#[derive(Debug, Default)]
pub(crate) struct Merged {
    /// By name.
    pub(crate) families: Vec<Family>,
    /// Samples that were left out.
    pub(crate) left_out: u64,
}

/// Whether a sample only grows, so that its sum must not go back.
fn grows(reading: &Reading, sample: &Sample) -> bool {
    let kind = match reading.kind {
        Kind::Counter | Kind::Histogram => true,
        Kind::Summary => sample.key.part != Part::Whole,
        Kind::Gauge | Kind::Unknown => false,
    };
    kind && reading.how == How::Sum
}

impl Memory {
    /// Adds up what workers told, in the order of their slots. `living` are all that are not gone.
    pub(crate) fn merge(&mut self, answers: Vec<(u64, Answer)>, living: &BTreeSet<u64>) -> Merged {
        self.settle(living);
        let mut round: BTreeMap<String, Round> = BTreeMap::new();
        let mut left_out = 0;
        let mut passing = 0;
        for (worker, answer) in answers {
            left_out += answer.left_out;
            for reading in answer.readings {
                if reading.how == How::Omit {
                    continue;
                }
                left_out += self.take(worker, reading, &mut round, &mut passing);
            }
        }
        let mut merged = Merged { families: self.families(round), left_out };
        merged.left_out += drop_clashes(&mut merged.families);
        merged
    }

    /// What workers had that are gone.
    fn settle(&mut self, living: &BTreeSet<u64>) {
        for counted in self.families.values_mut().flat_map(|kept| kept.series.values_mut()) {
            let gone = &mut counted.gone;
            counted.living.retain(|(worker, value)| {
                let lives = living.contains(worker);
                if !lives {
                    *gone += value;
                }
                lives
            });
        }
        if self.series >= MOST_SERIES {
            self.families.retain(|_, kept| {
                kept.series.retain(|_, counted| !counted.living.is_empty());
                !kept.series.is_empty()
            });
            self.series = self.families.values().map(|kept| kept.series.len()).sum();
        }
    }

    /// Takes one family of one worker in; tells how many samples were left out.
    fn take(
        &mut self,
        worker: u64,
        reading: Reading,
        round: &mut BTreeMap<String, Round>,
        passing: &mut usize,
    ) -> u64 {
        let Reading { name, help, kind, how, .. } = &reading;
        let differs = self.families.get(name).is_some_and(|kept| kept.kind != *kind);
        let begun = round.get(name).map(|round| (round.kind, round.how));
        if name.starts_with(OURS) || differs || begun.is_some_and(|begun| begun != (*kind, *how)) {
            return reading.samples.len() as u64;
        }
        let here = round.entry(name.clone()).or_insert_with(|| Round {
            kind: *kind,
            help: help.clone(),
            how: *how,
            series: BTreeMap::new(),
        });
        let mut left_out = 0;
        for sample in &reading.samples {
            let room = self.series + *passing < MOST_SERIES;
            let Sample { key, value } = sample;
            if grows(&reading, sample) {
                // What only grows is never less than nothing. A sum of observations may be.
                if value.is_nan() || (*value < 0.0 && key.part != Part::Sum) {
                    left_out += 1;
                    continue;
                }
                let kept = self.families.get_mut(name);
                match kept.and_then(|kept| kept.series.get_mut(key)) {
                    Some(counted) => counted.set(worker, *value),
                    None if room => {
                        let kept = self.families.entry(name.clone()).or_insert_with(|| Kept {
                            kind: *kind,
                            help: help.clone(),
                            series: BTreeMap::new(),
                        });
                        kept.series.entry(key.clone()).or_default().set(worker, *value);
                        self.series += 1;
                    }
                    None => left_out += 1,
                }
            } else {
                match here.series.get_mut(key) {
                    Some(series) => series.add(*how, *value),
                    None if room => {
                        here.series.insert(key.clone(), Passing { value: *value, count: 1 });
                        *passing += 1;
                    }
                    None => left_out += 1,
                }
            }
        }
        left_out
    }

    fn families(&self, mut round: BTreeMap<String, Round>) -> Vec<Family> {
        let mut families: BTreeMap<&str, Family> = BTreeMap::new();
        for (name, kept) in &self.families {
            let told = |(key, counted): (&Key, &Counted)| Sample {
                key: key.clone(),
                value: counted.total(),
            };
            let mut samples: Vec<Sample> = kept.series.iter().map(told).collect();
            if let Some(now) = round.remove(name) {
                samples.extend(now.samples());
                samples.sort_by(|a, b| a.key.cmp(&b.key));
            }
            let (help, kind) = (kept.help.clone(), kept.kind);
            families.insert(name, Family { name: name.clone(), help, kind, unit: "", samples });
        }
        for (name, now) in &round {
            let samples: Vec<Sample> = now.samples().collect();
            if !samples.is_empty() {
                let (help, kind) = (now.help.clone(), now.kind);
                families.insert(name, Family { name: name.clone(), help, kind, unit: "", samples });
            }
        }
        families.into_values().collect()
    }
}

impl Round {
    fn samples(&self) -> impl Iterator<Item = Sample> + '_ {
        self.series
            .iter()
            .map(|(key, series)| Sample { key: key.clone(), value: series.result(self.how) })
    }
}

/// Two families must not write samples of one name. Tells how many samples were left out.
fn drop_clashes(families: &mut Vec<Family>) -> u64 {
    let mut used: BTreeSet<String> = BTreeSet::new();
    let mut left_out = 0;
    families.retain(|family| {
        let parts = [Part::Whole, Part::Bucket, Part::Sum, Part::Count];
        let names: Vec<String> = parts
            .into_iter()
            // The bare name is the family's, whatever it is.
            .filter(|part| *part == Part::Whole || part.fits(family.kind))
            .map(|part| format!("{}{}", family.name, part.suffix()))
            .collect();
        let clashes = names.iter().any(|name| used.contains(name));
        match clashes {
            true => left_out += family.samples.len() as u64,
            false => used.extend(names),
        }
        !clashes
    });
    left_out
}

#[cfg(test)]
mod tests {
    use super::super::read::text;
    use super::*;

    fn merged(memory: &mut Memory, told: &[(u64, &str)], living: &[u64]) -> Merged {
        let answers = told.iter().map(|(worker, told)| (*worker, text(told))).collect();
        memory.merge(answers, &living.iter().copied().collect())
    }

    fn value(merged: &Merged, name: &str) -> Option<f64> {
        let family = merged.families.iter().find(|family| family.name == name)?;
        Some(family.samples[0].value)
    }

    const COUNTER: &str = "# TYPE jobs_total counter\njobs_total ";

    fn jobs(n: u32) -> String {
        format!("{COUNTER}{n}\n")
    }

    #[test]
    fn a_sum_never_goes_back_when_workers_die_or_are_silent() {
        let mut memory = Memory::default();
        let jobs_of = |memory: &mut Memory, told: &[(u64, &str)], living: &[u64]| {
            value(&merged(memory, told, living), "jobs_total").unwrap()
        };
        let (a, b) = (jobs(100), jobs(50));
        assert_eq!(jobs_of(&mut memory, &[(1, &a), (2, &b)], &[1, 2]), 150.0);
        assert_eq!(jobs_of(&mut memory, &[(2, &b)], &[1, 2]), 150.0, "1 does not answer");
        assert_eq!(jobs_of(&mut memory, &[(2, &b)], &[2]), 150.0, "1 is gone");
        let (fresh, b) = (jobs(1), jobs(51));
        assert_eq!(jobs_of(&mut memory, &[(3, &fresh), (2, &b)], &[2, 3]), 152.0);
        assert_eq!(jobs_of(&mut memory, &[], &[]), 152.0, "nobody is left");
    }

    #[test]
    fn gauges_are_merged_as_each_says_and_are_not_remembered() {
        let mut memory = Memory::default();
        let of = |n: u32| {
            format!(
                "# TYPE s gauge\ns {n}\n# AGGREGATE f first\n# TYPE f gauge\nf {n}\n# AGGREGATE lo min\nlo {n}\n\
                 # AGGREGATE hi max\nhi {n}\n# AGGREGATE mean average\nmean {n}\n# AGGREGATE o omit\no {n}\n"
            )
        };
        let (two, six) = (of(2), of(6));
        let both = merged(&mut memory, &[(1, &two), (2, &six)], &[1, 2]);
        let values: Vec<_> =
            ["s", "f", "lo", "hi", "mean", "o"].iter().map(|name| value(&both, name)).collect();
        assert_eq!(values, [Some(8.0), Some(2.0), Some(2.0), Some(6.0), Some(4.0), None]);
        let one = merged(&mut memory, &[(2, &six)], &[1, 2]);
        assert_eq!(value(&one, "s"), Some(6.0));
        assert!(memory.families.is_empty());
    }

    #[test]
    fn histograms_are_added_bucket_by_bucket_and_written_in_order() {
        let mut memory = Memory::default();
        let text = "# TYPE t histogram\nt_count 3\nt_sum 1.5\nt_bucket{le=\"+Inf\"} 3\nt_bucket{le=\"10\"} 3\nt_bucket{le=\"2\"} 1\n";
        let both = merged(&mut memory, &[(1, text), (2, text)], &[1, 2]);
        let samples: Vec<_> =
            both.families[0].samples.iter().map(|s| (s.key.part, s.value)).collect();
        let bucket = Part::Bucket;
        assert_eq!(
            samples,
            [(bucket, 2.0), (bucket, 6.0), (bucket, 6.0), (Part::Sum, 3.0), (Part::Count, 6.0)]
        );
    }

    #[test]
    fn a_program_cannot_imitate_us_nor_contradict_another() {
        let mut memory = Memory::default();
        let lies = "polyfork_workers 7\n# TYPE jobs_total gauge\njobs_total 5\n# TYPE t counter\nt_sum 4\n";
        let honest = format!("{}# TYPE t summary\nt_sum 1\nt_count 1\n", jobs(1));
        let merged = merged(&mut memory, &[(1, &honest), (2, lies)], &[1, 2]);
        assert_eq!(value(&merged, "jobs_total"), Some(1.0));
        assert_eq!(value(&merged, "polyfork_workers"), None);
        // `t_sum` of the one is a part of the other's summary.
        let names: Vec<_> = merged.families.iter().map(|family| family.name.as_str()).collect();
        assert_eq!(names, ["jobs_total", "t"]);
        assert_eq!(merged.left_out, 3);
    }

    #[test]
    fn series_are_bounded_and_those_of_the_dead_give_way() {
        let mut memory = Memory::default();
        let many = |from: usize, count: usize| -> String {
            let series = (from..from + count).map(|n| format!("j_total{{n=\"{n}\"}} 1\n"));
            std::iter::once("# TYPE j_total counter\n".to_owned()).chain(series).collect()
        };
        for round in 0..3 {
            let told = many(round * 10_000, 10_000);
            let worker = round as u64;
            let merged = merged(&mut memory, &[(worker, &told)], &[worker]);
            assert_eq!(merged.left_out, 0, "round {round}");
        }
        assert!(memory.series <= MOST_SERIES);
        let (told, more) = (many(0, 10_000), many(90_000, 10_000));
        let merged =
            merged(&mut memory, &[(7, &told), (8, &more), (9, &many(50_000, 10))], &[7, 8, 9]);
        assert!(merged.left_out >= 10 && memory.series <= MOST_SERIES);
    }
}
