//! The metrics of the primary itself: one table that the code and `docs/metrics.md` share.
//!
//! Labels are slots, states, reasons and addresses, never ids or pids: their number is that of slots and sockets there are.

use super::model::{Family, Kind, Sample};

/// One metric.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Metric {
    /// Its name.
    pub(crate) name: &'static str,
    /// What it is.
    pub(crate) kind: Kind,
    /// Its unit: `seconds`, `bytes`, or nothing for plain numbers.
    pub(crate) unit: &'static str,
    /// Its labels, as the document names them.
    pub(crate) labels: &'static str,
    /// For people.
    pub(crate) help: &'static str,
}

impl Metric {
    /// It, with its numbers.
    pub(crate) fn with(&self, samples: Vec<Sample>) -> Family {
        Family {
            name: self.name.to_owned(),
            help: self.help.to_owned(),
            kind: self.kind,
            unit: self.unit,
            samples,
        }
    }
}

macro_rules! catalog {
    ($($id:ident: $name:literal $kind:ident $unit:literal $labels:literal $help:literal;)*) => {
        $(pub(crate) const $id: Metric = Metric {
            name: $name, kind: Kind::$kind, unit: $unit, labels: $labels, help: $help,
        };)*
        /// All of them.
        #[cfg(test)]
        pub(crate) const ALL: &[Metric] = &[$($id),*];
    };
}

catalog! {
    BUILD: "polyfork_build_info" Gauge "" "version" "The primary's version; the value is 1";
    APP: "polyfork_app_info" Gauge "" "app, runtime, dialect, policy, mechanism" "What runs, and how; the value is 1";
    STARTED: "polyfork_start_time_seconds" Gauge "seconds" "" "When the primary was started, since 1970";
    CPU: "polyfork_primary_cpu_seconds_total" Counter "seconds" "" "CPU time of the primary itself";
    MEMORY: "polyfork_primary_resident_bytes" Gauge "bytes" "" "Memory of the primary itself";
    DESCRIPTORS: "polyfork_primary_open_descriptors" Gauge "" "" "Descriptors that the primary has open";
    MOST_DESCRIPTORS: "polyfork_primary_max_descriptors" Gauge "" "" "Descriptors that the primary may have open";
    WANTED: "polyfork_workers_wanted" Gauge "" "" "Workers that there are to be";
    WORKERS: "polyfork_workers" Gauge "" "state" "Workers by state; waiting, stopped and failed are slots without one";
    EXITS: "polyfork_worker_exits_total" Counter "" "reason" "Workers that ended, asked or not";
    RESTARTS: "polyfork_worker_restarts_total" Counter "" "reason" "Workers that ended by themselves and were replaced";
    SLOT_READY: "polyfork_slot_ready" Gauge "" "slot" "1 if the slot has a worker that gets connections, else 0";
    SLOT_RESTARTS: "polyfork_slot_restarts_total" Counter "" "slot" "Workers of the slot that ended by themselves and were replaced";
    SLOT_CONNECTIONS: "polyfork_slot_connections_total" Counter "" "slot" "Connections that the slot was given";
    SLOT_QUEUE: "polyfork_slot_queue" Gauge "" "slot" "Connections that wait for the slot's workers and nobody else";
    SLOT_CPU: "polyfork_slot_cpu_seconds_total" Counter "seconds" "slot" "CPU time of the slot's workers";
    SLOT_MEMORY: "polyfork_slot_resident_bytes" Gauge "bytes" "slot" "Memory of the slot's workers, also what they share with others";
    SLOT_LAG: "polyfork_slot_event_loop_lag_seconds" Gauge "seconds" "slot" "By how much the event loop was last seen to be late";
    MESSAGES: "polyfork_slot_messages_total" Counter "" "slot, direction" "Messages from (in) and to (out) the slot's workers";
    HANDOFF: "polyfork_handoff_seconds" Histogram "seconds" "le" "From accepting a connection to its acknowledgement by a worker";
    DROPPED: "polyfork_listener_dropped_total" Counter "" "listener" "Connections that the kernel turned away because a queue was full";
    LISTENER_QUEUE: "polyfork_listener_queue" Gauge "" "listener" "Connections that wait for no slot in particular";
    RESET: "polyfork_connections_reset_total" Counter "" "" "Connections that waited on a socket when it had to be closed";
    RELOADS: "polyfork_reloads_total" Counter "" "result" "Reloads that are over: done or failed";
    RELOAD_LOST: "polyfork_reload_lost_connections_total" Counter "" "how" "Connections refused or reset while reloads that were done went on";
    RELOAD_CUT: "polyfork_reload_cut_short_workers_total" Counter "" "" "Replaced workers that were still busy when their grace period was over";
    RELOAD_TOOK: "polyfork_last_reload_seconds" Gauge "seconds" "" "How long the last reload that was done took";
    RELOAD_WAIT: "polyfork_last_reload_slowest_wait_seconds" Gauge "seconds" "" "The longest wait of a connection during that reload";
    LOG_LOST: "polyfork_log_lines_lost_total" Counter "" "" "Lines of logs that could not be written";
    CONTROL_REFUSED: "polyfork_control_refused_total" Counter "" "" "Clients of the control socket that were sent away: strangers, garbage, too slow";
    APP_WORKERS: "polyfork_app_metrics_workers" Gauge "" "state" "Workers asked for the program's own metrics: answered, failed, late (answered before), silent (never did)";
    APP_LEFT_OUT: "polyfork_app_metrics_left_out" Gauge "" "" "Samples of the program's own metrics that made no sense or were too many";
    STALE: "polyfork_stale" Gauge "" "" "1 if the primary was too busy to look at its workers, so that what is per slot is missing; else 0";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::model::is_name;
    use super::*;

    #[test]
    fn names_follow_the_rules_of_prometheus() {
        let mut names = BTreeSet::new();
        for metric in ALL {
            let Metric { name, kind, unit, .. } = metric;
            assert!(is_name(name, false) && name.starts_with("polyfork_"), "{name}");
            assert!(names.insert(*name), "{name} stands there twice");
            assert_eq!(*kind == Kind::Counter, name.ends_with("_total"), "{name}");
            let base = name.strip_suffix("_total").unwrap_or(name);
            assert!(unit.is_empty() || base.ends_with(unit), "{name} has the unit {unit}");
        }
    }

    #[test]
    fn the_document_has_the_same_table() {
        let document = include_str!("../../../../docs/metrics.md");
        let row = |metric: &Metric| {
            let or_none = |text: &str| match text.is_empty() {
                true => "-".to_owned(),
                false => text.to_owned(),
            };
            format!(
                "| `{}` | {} | {} | {} | {} |",
                metric.name,
                metric.kind.word(),
                or_none(metric.unit),
                or_none(metric.labels),
                metric.help
            )
        };
        for metric in ALL {
            let row = row(metric);
            assert!(document.contains(&row), "docs/metrics.md lacks: {row}");
        }
        let told = document.lines().filter(|line| line.starts_with("| `polyfork_")).count();
        assert_eq!(told, ALL.len(), "docs/metrics.md tells of metrics that there are none");
    }
}
