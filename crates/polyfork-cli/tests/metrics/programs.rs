//! What programs tell of themselves: prom-client as it is, and programs that lie, are silent or hang.

use std::fs;

use serde_json::Value;

use super::desk::{Desk, eventually, pidfd, signal};
use super::scrape::{Told, peer, prom_client, told};
use super::support::{get, skip};
use rustix::process::Signal;

/// Counts requests, by prom-client.
const COUNTS: &str = "
const { AggregatorRegistry, Counter, Gauge, Histogram } = require(process.env.PROM_CLIENT);
new AggregatorRegistry();
const orders = new Counter({ name: 'orders_total', help: 'Orders', labelNames: ['kind'] });
const took = new Histogram({ name: 'took_seconds', help: 'Time', buckets: [0.5, 1] });
new Gauge({ name: 'open_things', help: 'Things' }).set(2);
new Gauge({ name: 'depth', help: 'Depth', aggregator: 'max' }).set(Number(process.env.NODE_APP_INSTANCE) + 5);
new Gauge({ name: 'hidden', help: 'Hidden', aggregator: 'omit' }).set(1);
require('http').createServer((request, response) => {
  // Until the folder of the test is gone.
  if (request.url === '/hang') while (require('fs').existsSync('counts.js'));
  orders.inc({ kind: 'a \"b\"' });
  took.observe(0.7);
  response.end('' + process.pid);
}).listen(0, '127.0.0.1');
";

/// Starts a program of that text; `None` where prom-client is not there.
fn counting(desk: &mut Desk, test: &str, options: &[&str]) -> Option<Value> {
    let Some(path) = prom_client() else {
        skip(test, "prom-client is not installed; run `cargo xtask setup`");
        return None;
    };
    desk.place.file("counts.js", COUNTS);
    let path = format!("PROM_CLIENT={}", path.display());
    Some(desk.start(&[&["--env", &path], options, &["counts.js"]].concat()))
}

const ORDERS: &str = "orders_total{kind=\"a \\\"b\\\"\"}";

#[test]
fn what_prom_client_counts_is_added_up_as_each_metric_says() {
    let mut desk = Desk::new();
    let name = "what_prom_client_counts_is_added_up_as_each_metric_says";
    let Some(app) = counting(&mut desk, name, &["-w", "2"]) else { return };
    adds_up(&desk, &app);
}

#[test]
fn what_prom_client_counts_is_added_up_on_every_version_of_node() {
    let test = "what_prom_client_counts_is_added_up_on_every_version_of_node";
    for version in ["node18", "node20", "node22", "node24", "node26"] {
        let Some(node) = peer(version) else {
            skip(test, &format!("{version} is not installed; run `cargo xtask setup`"));
            continue;
        };
        let mut desk = Desk::new();
        let options = ["-w", "2", "--runtime", &node];
        let Some(app) = counting(&mut desk, test, &options) else { return };
        adds_up(&desk, &app);
        desk.did(&["stop", "counts"]);
    }
}

/// Ten orders in two workers, as each metric says that it is to be added up.
fn adds_up(desk: &Desk, app: &Value) {
    for _ in 0..10 {
        get(Desk::address(app), "/");
    }
    // A worker that is late for its first question on a busy machine is asked again.
    let both =
        |told: &Told| told.value("polyfork_app_metrics_workers{state=\"answered\"}") == Some(2.0);
    let told = eventually("both answers", || told(desk, "counts"), both);
    assert_eq!(told.of(ORDERS), 10.0);
    assert_eq!(told.types["orders_total"], "counter");
    assert_eq!(told.of("took_seconds_bucket{le=\"0.5\"}"), 0.0);
    assert_eq!(told.of("took_seconds_bucket{le=\"1\"}"), 10.0);
    assert_eq!(told.of("took_seconds_bucket{le=\"+Inf\"}"), 10.0);
    assert_eq!(told.of("took_seconds_count"), 10.0);
    assert!((told.of("took_seconds_sum") - 7.0).abs() < 1e-9);
    assert_eq!(told.of("open_things"), 4.0);
    assert_eq!(told.of("depth"), 6.0);
    assert_eq!(told.value("hidden"), None);
    assert_eq!(told.of("polyfork_app_metrics_workers{state=\"answered\"}"), 2.0);
    assert_eq!(told.of("polyfork_app_metrics_left_out"), 0.0);
    // Our questions are no messages of the user's.
    assert_eq!(told.sum("polyfork_slot_messages_total"), 0.0);
}

#[test]
fn a_sum_does_not_go_back_when_workers_are_killed_and_replaced() {
    let mut desk = Desk::new();
    let name = "a_sum_does_not_go_back_when_workers_are_killed_and_replaced";
    let Some(app) = counting(&mut desk, name, &["-w", "2"]) else { return };
    let mut orders = 0.0;
    for _ in 0..3 {
        for _ in 0..6 {
            get(Desk::address(&app), "/");
            orders += 1.0;
        }
        assert_eq!(told(&desk, "counts").of(ORDERS), orders);
        let status = desk.status("counts");
        let pid = status["workers"][0]["pid"].as_u64().expect("a pid");
        signal(&pidfd(pid), Signal::KILL);
        let replaced = |status: &Value| {
            status["workers_ready"] == 2 && status["workers"][0]["pid"].as_u64() != Some(pid)
        };
        eventually("a successor", || desk.status("counts"), replaced);
        // The successor may be late for its first question on a busy machine; what counts up does not wait for it.
        let answered = |after: &Told| {
            assert_eq!(after.of(ORDERS), orders, "nothing is lost, nothing is counted twice");
            after.of("open_things") == 4.0
        };
        eventually("both gauges", || told(&desk, "counts"), answered);
    }
}

#[test]
fn a_worker_that_hangs_is_late_and_its_counts_stay() {
    let mut desk = Desk::new();
    let name = "a_worker_that_hangs_is_late_and_its_counts_stay";
    let Some(app) = counting(&mut desk, name, &["-w", "2"]) else { return };
    for _ in 0..4 {
        get(Desk::address(&app), "/");
    }
    assert_eq!(told(&desk, "counts").of(ORDERS), 4.0);
    let address = Desk::address(&app);
    let mut stream = super::scrape::connect(address);
    std::io::Write::write_all(&mut stream, b"GET /hang HTTP/1.1\r\nHost: x\r\n\r\n").expect("ask");
    let late = |told: &Told| told.of("polyfork_app_metrics_workers{state=\"late\"}") == 1.0;
    // It hangs for ever; an answer that comes waits for nobody.
    let told = eventually("late", || told(&desk, "counts"), late);
    assert_eq!(told.of("polyfork_app_metrics_workers{state=\"answered\"}"), 1.0);
    assert_eq!(told.of(ORDERS), 4.0);
    assert_eq!(told.of("open_things"), 2.0);
}

/// A program that knows nothing of this sees the question as a message, unless it was not to be asked.
#[test]
fn programs_are_left_alone_where_that_is_asked_for() {
    let mut desk = Desk::new();
    desk.place.file(
        "hears.js",
        "const fs = require('fs');
         process.on('message', message => fs.appendFileSync(process.env.HEARD, JSON.stringify(message) + '\\n'));
         require('http').createServer((_, response) => response.end()).listen(0, '127.0.0.1');",
    );
    let heard = desk.place.path().join("heard");
    let variable = format!("HEARD={}", heard.display());
    desk.start(&["--name", "a", "--no-app-metrics", "--env", &variable, "-w", "1", "hears.js"]);
    let silent = told(&desk, "a");
    assert!(silent.named("polyfork_app_metrics_workers").is_empty());
    assert!(!heard.exists());
    desk.start(&["--name", "b", "--env", &variable, "-w", "1", "hears.js"]);
    for _ in 0..4 {
        let told = told(&desk, "b");
        assert_eq!(told.of("polyfork_app_metrics_workers{state=\"silent\"}"), 1.0);
    }
    let questions = eventually(
        "four questions",
        || fs::read_to_string(&heard).unwrap_or_default(),
        |heard| heard.lines().count() == 4,
    );
    assert!(questions.lines().all(|line| {
        line.starts_with("{\"type\":\"prom-client:getMetricsReq\",\"requestId\":\"polyfork:")
    }));
}

/// Answers in every wrong way that comes to mind.
const LIES: &str = "
const bomb = '\\u001b[2J\\nevil 1\\n';
const answers = [
  id => ({ metrics: 7 }),
  id => ({ error: bomb }),
  id => ({ metrics: [[{ name: bomb, help: bomb, type: 'gauge', values: [{ value: 1, labels: {} }] }]] }),
  id => ({ metrics: [[{ name: 'ok', help: bomb, type: 'gauge', values: [{ value: 1, labels: { a: bomb } }, { value: 2, labels: { [bomb]: 'x' } }] }]] }),
  id => ({ metrics: [[{ name: 'polyfork_workers', help: '', type: 'gauge', values: [{ value: 99, labels: { state: 'ready' } }] }]] }),
  id => ({ metrics: [[{ name: 'x', type: 'histogram', values: [{ value: 1, metricName: 'polyfork_stale', labels: {} }, { value: 1, metricName: 'x_bucket', labels: { le: 'no' } }] }]] }),
  id => ({ metrics: [[{ name: 'many', type: 'counter', values: Array.from({ length: 12000 }, (_, n) => ({ value: n, labels: { n } })) }]] }),
  id => ({ metrics: [[{ name: 'long', help: '', type: 'gauge', values: [{ value: 1, labels: { a: 'x'.repeat(6 << 20) } }] }]] }),
  id => ({ metrics: [[{ name: 'c', type: 'counter', values: [{ value: -5 }, { value: null, labels: { a: '1' } }, { value: 1e308, labels: { a: '2' } }] }]] }),
];
let turn = 0;
process.on('message', ({ type, requestId }) => {
  if (type !== 'prom-client:getMetricsReq') return;
  for (const id of [requestId, 'polyfork:99999', requestId]) {
    process.send({ type: 'prom-client:getMetricsRes', requestId: id, ...answers[turn % answers.length](id) });
  }
  turn += 1;
});
require('http').createServer((_, response) => response.end('well')).listen(0, '127.0.0.1');
";

#[test]
fn lies_of_a_program_cannot_break_the_text_nor_the_primary() {
    let mut desk = Desk::new();
    desk.place.file("lies.js", LIES);
    let app = desk.start(&["-w", "1", "lies.js"]);
    let (mut left_out, mut was_refused) = (0.0, false);
    for _ in 0..18 {
        // Reading is strict: what Prometheus would not take is a panic.
        let told = told(&desk, "lies");
        assert_eq!(told.of("polyfork_workers{state=\"ready\"}"), 1.0);
        assert_eq!(told.value("evil"), None);
        assert!(told.samples.len() < 25_000);
        left_out += told.of("polyfork_app_metrics_left_out");
        let failed = told.of("polyfork_app_metrics_workers{state=\"failed\"}");
        let answered = told.of("polyfork_app_metrics_workers{state=\"answered\"}");
        // A long answer may take longer than is waited.
        let late = told.of("polyfork_app_metrics_workers{state=\"late\"}");
        assert_eq!(failed + answered + late, 1.0, "{left_out}");
        was_refused |= failed == 1.0;
    }
    assert!(left_out > 5.0 && was_refused, "{left_out}");
    assert_eq!(get(Desk::address(&app), "/"), "well");
    let status = desk.status("lies");
    assert_eq!((&status["restarts"], &status["state"]), (&0.into(), &"ready".into()));
}
