//! A cluster that comes to rest and goes on, in the middle of everything: no message is lost, torn or out of order.
//!
//! Going on after a rest and going on in another image of the process are the same code; whole upgrades are tested with the
//! command (`polyfork-cli/tests/upgrade`). Needs `node`.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]
#![expect(clippy::print_stdout, reason = "tests print their counts")]

use std::collections::BTreeMap;
use std::time::Duration;

use polyfork::cluster::upgrade::{FreezeError, Packing};
use polyfork::cluster::{Cluster, Event, Mechanism, Ready, ReloadOptions, Serialization, Settings};
use polyfork::shared_memory::SharedArrayBuffer;

/// Longer than anything takes on a busy machine.
const SOON: Duration = Duration::from_secs(60);
const MESSAGES: u64 = 1500;

/// Sends numbers with something of changing length behind, and sends back what it is sent.
const TALKS: &str = "
const net = require('net');
process.on('message', m => process.send({ back: m }));
let n = 0;
function more() {
  for (let i = 0; i < 5 && n < MESSAGES; i++, n++) {
    process.send({ n, rest: 'x'.repeat((n * 7919) % 70000) });
  }
  if (n < MESSAGES) setImmediate(more);
}
net.createServer().listen(0, '127.0.0.1', more);
";

fn start(folder: &tempfile::TempDir, workers: u32, how: fn(Settings) -> Settings) -> Cluster {
    let program = folder.path().join("talks.cjs");
    std::fs::write(&program, TALKS.replace("MESSAGES", &MESSAGES.to_string())).unwrap();
    Cluster::start(how(Settings::new(&program).workers(workers).ready(Ready::Listening))).unwrap()
}

/// All numbers of all workers arrive in their order, while the cluster rests again and again.
async fn nothing_is_lost(how: fn(Settings) -> Settings) {
    let folder = tempfile::tempdir().unwrap();
    let cluster = start(&folder, 2, how);
    let mut events = cluster.events();
    let resting = cluster.clone();
    let rests = tokio::spawn(async move {
        let (mut rests, mut bytes) = (0_u32, 0);
        loop {
            match resting.freeze(Packing::new()).await {
                Ok(frozen) => {
                    rests += 1;
                    bytes = bytes.max(frozen.state.len());
                    Cluster::check_state(&frozen.state).unwrap();
                    assert!(!frozen.packing.finish().is_empty());
                    // Workers write on meanwhile.
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                // The test is over.
                Err(FreezeError::Ended | FreezeError::NotNow(_)) => return (rests, bytes),
                // A message of ours waits for its worker to read: another time, then.
                Err(FreezeError::NotCarried(what)) => assert!(what.contains("sender"), "{what}"),
                Err(error) => panic!("{error}"),
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    // Who listens must not wait for the loop, or it is told less than all.
    let (say, mut said) = tokio::sync::mpsc::unbounded_channel();
    let saying = cluster.clone();
    tokio::spawn(async move {
        while let Some((worker, n)) = said.recv().await {
            saying.worker(worker).send(&n).await.unwrap();
        }
    });
    let (mut next, mut back) = (BTreeMap::<u64, u64>::new(), BTreeMap::<u64, u64>::new());
    let told = async {
        while next.len() < 2 || next.values().chain(back.values()).any(|n| *n < MESSAGES) {
            let (who, message) = match events.next().await.unwrap() {
                Event::Message { who, message } => (who, message),
                Event::Lagged(missed) => panic!("{missed} events were not read in time"),
                _ => continue,
            };
            let value: serde_json::Value = message.decode().unwrap();
            if let Some(n) = value["n"].as_u64() {
                assert_eq!(next.insert(who.worker, n + 1).unwrap_or(0), n);
                let length = value["rest"].as_str().unwrap().len() as u64;
                assert_eq!(length, (n * 7919) % 70000);
                say.send((who.worker, n)).unwrap();
            } else {
                let n = value["back"].as_u64().unwrap();
                assert_eq!(back.insert(who.worker, n + 1).unwrap_or(0), n);
            }
        }
    };
    tokio::time::timeout(SOON, told).await.expect("all messages");
    cluster.stop_now().await;
    cluster.wait().await;
    let (rests, bytes) = rests.await.unwrap();
    println!(
        "{rests} rests within {MESSAGES} messages of each worker, states of up to {bytes} bytes"
    );
    assert!(rests > 10);
}

#[tokio::test]
async fn a_rest_in_the_middle_of_messages_loses_none() {
    nothing_is_lost(|settings| settings).await;
}

#[tokio::test]
async fn a_rest_in_the_middle_of_frames_loses_none() {
    nothing_is_lost(|settings| settings.serialization(Serialization::Advanced)).await;
}

#[tokio::test]
async fn a_rest_while_connections_are_handed_over_loses_none() {
    nothing_is_lost(|settings| settings.mechanism(Mechanism::Handoff)).await;
}

#[tokio::test]
async fn what_cannot_be_carried_is_named_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = start(&folder, 1, |settings| settings);
    let mut events = cluster.events();
    while !matches!(events.next().await.unwrap(), Event::AllReady { .. }) {}
    let reloading = cluster.clone();
    let options = ReloadOptions::new().probation(Duration::from_millis(300));
    let reload = tokio::spawn(async move { reloading.reload(options).await });
    while !matches!(events.next().await.unwrap(), Event::Reloading { .. }) {}
    let error = cluster.freeze(Packing::new()).await.unwrap_err();
    assert!(error.to_string().contains("a reload is under way"), "{error}");
    reload.await.unwrap().unwrap();
    drop(cluster.freeze(Packing::new()).await.unwrap());
    cluster.stop_now().await;
    cluster.wait().await;
    let error = cluster.freeze(Packing::new()).await.unwrap_err();
    assert!(matches!(error, FreezeError::Ended), "{error}");
}

#[tokio::test]
async fn memory_that_is_shared_with_this_process_is_not_left_behind() {
    let memory = SharedArrayBuffer::new(4096).unwrap();
    let settings = Settings::new("/bin/sleep").arg("600").workers(1);
    let settings = settings.dialect(polyfork::cluster::Dialect::Native);
    let cluster = Cluster::start(settings.shared_memory("board", &memory)).unwrap();
    let error = cluster.freeze(Packing::new()).await.unwrap_err();
    assert!(error.to_string().contains("memory that workers share"), "{error}");
    cluster.stop_now().await;
    cluster.wait().await;
}
