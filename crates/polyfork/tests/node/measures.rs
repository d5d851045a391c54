//! What programs measure of themselves by prom-client, as it is and without a word of ours in the program.
//!
//! How answers are added up is the command's, and tested there; here is that they come: from every version of Node, over
//! either serialization of the channel.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use polyfork::cluster::{Event, Measured, Serialization};
use serde_json::Value;

use super::client::{get, reach};
use super::support::{Mode, PATIENCE, Rig, Runtime, skip};

/// Counts its requests.
const SERVER: &str = "
    const { AggregatorRegistry, Counter } = require(process.env.PROM_CLIENT);
    new AggregatorRegistry();
    const orders = new Counter({ name: 'orders_total', help: 'Orders', labelNames: ['kind'] });
    require('http').createServer((request, response) => {
        orders.inc({ kind: 'gr\u{fc}n' });
        response.end(String(process.pid));
    }).listen(0, '127.0.0.1');";

on_every_node! {
    prom_client_is_asked_and_answers_over_either_serialization,
}

fn prom_client() -> Option<PathBuf> {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let path = root.join(".peers/npm-prom-client/node_modules/prom-client");
    path.exists().then_some(path)
}

/// What a worker has counted, from prom-client's message.
fn orders(told: &Value) -> f64 {
    let metrics = told["metrics"].as_array().expect("metrics").iter();
    // Of each registry a list.
    let mut all = metrics.flat_map(|registry| registry.as_array().expect("a list"));
    let orders = all.find(|metric| metric["name"] == "orders_total").expect("orders");
    let Some(sample) = orders["values"].get(0) else { return 0.0 };
    assert_eq!(sample["labels"]["kind"], "gr\u{fc}n");
    sample["value"].as_f64().expect("a number")
}

async fn prom_client_is_asked_and_answers_over_either_serialization(runtime: Runtime) {
    let Some(prom_client) = prom_client() else {
        return skip(module_path!(), "prom-client is not installed; run `cargo xtask setup`");
    };
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("app.cjs");
    fs::write(&program, SERVER).expect("written");
    for serialization in [Serialization::Json, Serialization::Advanced] {
        let rig = Rig::serving(&runtime, program.to_str().expect("UTF-8"), Mode::Kernel, 2, |s| {
            s.env("PROM_CLIENT", &prom_client).serialization(serialization)
        });
        rig.all_ready(2).await;
        let to = reach(&rig.listening(1).await.0);
        for _ in 0..6 {
            get(to, "/").await.expect("an answer");
        }
        let (mut workers, mut sum) = (BTreeSet::new(), 0.0);
        for measures in rig.cluster.measures(PATIENCE).await {
            workers.insert(measures.who.worker);
            match measures.measured {
                Measured::PromClient(message) => sum += orders(&message.decode().expect("a value")),
                other => panic!("{serialization:?}: {other:?}\n{}", rig.story()),
            }
        }
        assert_eq!((workers, sum), (BTreeSet::from([1, 2]), 6.0), "{serialization:?}");
        // An answer is no message of the program's.
        let messages = rig.events().iter().filter(|e| matches!(e, Event::Message { .. })).count();
        assert_eq!(messages, 0, "{}", rig.story());
        rig.stop().await;
    }
}
