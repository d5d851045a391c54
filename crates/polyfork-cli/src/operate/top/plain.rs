//! `top` without a terminal: tables as text, or JSON objects.

use serde_json::{Value, json};

use super::state::{Balance, Row, Seen};
use super::view::{per_cent, rate};
use crate::operate::list::time;
use crate::operate::table::{self, Cell};
use crate::style::{Ink, Paint};
use crate::{clock, values};

/// One app as text.
pub(crate) fn draw(seen: &Seen, paint: Paint) -> String {
    let look = &seen.look;
    let balance = seen.balance().map_or(String::new(), |balance| {
        format!(
            ", balance {:.0} % (shares {:.0} % to {:.0} %)",
            balance.evenness * 100.0,
            balance.least * 100.0,
            balance.most * 100.0
        )
    });
    let total =
        seen.total_rate().map_or(String::new(), |now| format!(", {} connections/s", rate(now)));
    let head = format!(
        "{}  {}, {}/{} workers ready, {} restarts, up {}{total}{balance}\n",
        paint.with(Ink::Bold, &look.name),
        look.state.replace('_', " "),
        look.ready,
        look.wanted,
        look.restarts,
        time(look.uptime_ms),
    );
    let columns = [
        "slot", "pid", "state", "cpu %", "memory", "conn/s", "accepted", "queue", "lag",
        "restarts", "up",
    ];
    let rows: Vec<Vec<Cell>> = seen.rows.iter().map(row).collect();
    head + &table::draw(paint, &columns, &rows)
}

fn row(row: &Row) -> Vec<Cell> {
    let worker = &row.worker;
    vec![
        Cell::of(worker.slot),
        Cell::maybe(worker.pid),
        table::state(&worker.state),
        Cell::maybe(row.cpu.map(per_cent)),
        Cell::maybe(worker.bytes.map(values::bytes)),
        Cell::maybe(row.rate.map(rate)),
        Cell::maybe(worker.accepted),
        Cell::maybe(worker.queue),
        Cell::maybe(worker.lag_ms.map(|ms| format!("{ms} ms"))),
        Cell::of(worker.restarts),
        Cell::maybe(worker.uptime_ms.map(time)),
    ]
}

/// Two digits behind the point are more than was measured.
fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// A look at several apps as a JSON object.
pub(crate) fn json(apps: &[&Seen]) -> Value {
    let apps: Vec<Value> = apps.iter().map(|seen| app(seen)).collect();
    json!({"version": crate::operate::VERSION, "time": clock::now(), "apps": apps})
}

fn app(seen: &Seen) -> Value {
    let look = &seen.look;
    let balance = seen.balance().map(|Balance { evenness, least, most }| {
        json!({"evenness": rounded(evenness), "least": rounded(least), "most": rounded(most)})
    });
    let worker = |row: &Row| {
        json!({
            "slot": row.worker.slot,
            "worker": row.worker.id,
            "pid": row.worker.pid,
            "state": row.worker.state,
            "cpu_percent": row.cpu.map(rounded),
            "resident_bytes": row.worker.bytes,
            "connections_per_second": row.rate.map(rounded),
            "accepted": row.worker.accepted,
            "queue": row.worker.queue,
            "lag_ms": row.worker.lag_ms,
            "restarts": row.worker.restarts,
            "uptime_ms": row.worker.uptime_ms,
        })
    };
    json!({
        "name": look.name,
        "pid": look.pid,
        "state": look.state,
        "workers_wanted": look.wanted,
        "workers_ready": look.ready,
        "restarts": look.restarts,
        "uptime_ms": look.uptime_ms,
        "connections_per_second": seen.total_rate().map(rounded),
        "primary_cpu_percent": seen.primary_cpu.map(rounded),
        "primary_resident_bytes": look.primary_bytes,
        "balance": balance,
        "workers": seen.rows.iter().map(worker).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::state::Look;
    use super::*;

    fn seen() -> Seen {
        let mut seen = Seen::default();
        for step in 0..3 {
            let worker = |slot: u64| {
                json!({"slot": slot, "worker": slot, "pid": slot, "state": "ready", "restarts": 0,
                       "cpu_ms": step * 100, "resident_bytes": 1 << 20, "accepted": step * slot, "queue": 0})
            };
            let status = json!({"name": "a\u{1b}[2J", "pid": 5, "state": "ready", "workers_ready": 2,
                                "workers_wanted": 2, "workers": [worker(1), worker(2), {"slot": 3, "state": "failed"}]});
            seen.next(Look::read(&status), Duration::from_secs(1));
        }
        seen
    }

    #[test]
    fn a_table_has_what_the_terminal_has() {
        let drawn = draw(&seen(), Paint::PLAIN);
        let lines: Vec<&str> = drawn.lines().collect();
        assert!(lines[0].starts_with("a\\u{1b}[2J  ready, 2/2 workers ready"), "{drawn}");
        assert!(
            lines[0].contains("3.0 connections/s, balance 90 % (shares 33 % to 67 %)"),
            "{drawn}"
        );
        assert_eq!(lines[2].split_whitespace().nth(3), Some("10.0"));
        assert!(lines[4].starts_with("3     -    failed"), "{drawn}");
    }

    #[test]
    fn json_says_null_for_what_is_not_known() {
        let seen = seen();
        let json = json(&[&seen]);
        let workers = &json["apps"][0]["workers"];
        assert_eq!(workers[1]["connections_per_second"], 2.0);
        assert_eq!(workers[2]["pid"], Value::Null);
        assert_eq!(workers[0]["lag_ms"], Value::Null);
        assert_eq!(json["apps"][0]["balance"]["evenness"], 0.9);
    }
}
