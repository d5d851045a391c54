//! `polyfork advise`: every figure of the four ways is there, and nothing stays behind.

#![allow(clippy::print_stdout, reason = "tests print their counts")]

mod support;

use serde_json::Value;
use support::Place;

#[test]
fn every_figure_is_measured_and_shown_as_json() {
    let place = Place::new();
    let output = place.polyfork(["advise", "--quick", "--json"]).output().expect("it runs");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let advice: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&advice["version"], &advice["missing"]), (&1.into(), &serde_json::json!([])));
    let rows = advice["rows"].as_array().expect("rows");
    let names: Vec<&str> = rows.iter().filter_map(|row| row["figure"].as_str()).collect();
    let all = "start starts memory messages round_trip share_64_mib speed_up crash";
    assert_eq!(names.join(" "), all);
    for row in rows {
        for way in ["cluster", "worker_threads", "spawn", "fork"] {
            let gap = row["figure"] == "speed_up" && (way == "cluster" || way == "spawn")
                || row["figure"] == "crash" && way == "spawn";
            let value = row[way].as_f64();
            assert_eq!(value.is_none(), gap, "{way} of {row}");
            assert!(value.is_none_or(|value| value >= 0.0), "{way} of {row}");
        }
        println!("{row}");
    }
    // A message between threads takes less than one between processes, on any machine.
    let trip = rows.iter().find(|row| row["figure"] == "round_trip").expect("there");
    assert!(trip["worker_threads"].as_f64() < trip["fork"].as_f64(), "{trip}");
}

#[test]
fn the_page_says_which_one_to_take() {
    let place = Place::new();
    let output = place.polyfork(["advise", "--quick"]).output().expect("it runs");
    let page = String::from_utf8(output.stdout).expect("text");
    for words in ["cluster", "worker_threads", "spawn", "fork", "\nTake\n", "CPU-bound work"] {
        assert!(page.contains(words), "{words} in {page}");
    }
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}
