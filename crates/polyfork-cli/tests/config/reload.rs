//! A reload reads the file again: by hand, by SIGHUP, when something changes.

use rustix::process::Signal;

use super::desk::{Desk, eventually, pidfd, signal};
use super::{TELLS, answer};

fn write(desk: &Desk, extra: &str, colour: &str) {
    desk.place.file(
        "polyfork.toml",
        &format!("[app.shop]\nprogram = \"tells.js\"\nworkers = 1\n{extra}\n[app.shop.env]\nCOLOUR = \"{colour}\"\n"),
    );
}

fn started(extra: &str) -> (Desk, serde_json::Value) {
    let mut desk = Desk::new();
    desk.place.file("tells.js", TELLS);
    write(&desk, extra, "red");
    let app = desk.json(&["start", "--json"])[0].clone();
    desk.adopt(&app);
    (desk, app)
}

#[test]
fn a_changed_script_environment_and_configuration_take_effect() {
    let (desk, app) = started("");
    let before = answer(&app);
    desk.place.file("tells.js", &TELLS.replace("version: 1", "version: 2"));
    write(&desk, "args = [\"new\"]\ninstance_var = \"INSTANCE_ID\"\ngrace = \"5s\"", "blue");
    desk.did(&["reload", "--probation", "0", "shop"]);
    let after = answer(&app);
    assert_eq!((&before["version"], &after["version"]), (&1.into(), &2.into()));
    assert_eq!((&before["COLOUR"], &after["COLOUR"]), (&"red".into(), &"blue".into()));
    assert_eq!(after["argv"], serde_json::json!(["new"]));
    assert_eq!(after["INSTANCE_ID"], "0");
    // The primary is the same, and the port.
    assert_eq!(desk.status("shop")["pid"], app["pid"]);
    // Another number of workers is had as well.
    write(&desk, "", "blue");
    let text = std::fs::read_to_string(desk.place.path().join("polyfork.toml")).unwrap();
    desk.place.file("polyfork.toml", &text.replace("workers = 1", "workers = 3"));
    desk.did(&["reload", "--probation", "0", "shop"]);
    eventually("3 workers", || desk.status("shop")["workers_ready"].clone(), |ready| ready == 3);
}

#[test]
fn a_reload_with_a_wrong_file_or_program_changes_nothing_and_says_why() {
    let (desk, app) = started("");
    let before = answer(&app);
    write(&desk, "max_memry = 3", "blue");
    let told = desk.refuses(&["reload", "--probation", "0", "shop"], 16);
    assert!(
        told.contains("polyfork.toml:4:1") && told.contains("did you mean max_memory?"),
        "{told}"
    );
    write(&desk, "", "blue");
    desk.place.file("tells.js", "throw new Error('half of it')");
    let told = desk.refuses(&["reload", "--probation", "0", "shop"], 16);
    assert!(told.contains("half of it"), "{told}");
    assert_eq!(answer(&app), before);
    std::fs::remove_file(desk.place.path().join("polyfork.toml")).expect("remove");
    desk.refuses(&["reload", "--probation", "0", "shop"], 16);
    assert_eq!(answer(&app), before);
    desk.place.file("tells.js", TELLS);
    write(&desk, "", "green");
    desk.did(&["reload", "--probation", "0", "shop"]);
    assert_eq!(answer(&app)["COLOUR"], "green");
}

#[test]
fn hup_reads_the_file_again() {
    let (desk, app) = started("");
    write(&desk, "", "blue");
    signal(&pidfd(app["pid"].as_u64().unwrap()), Signal::HUP);
    eventually("blue", || answer(&app)["COLOUR"].clone(), |colour| colour == "blue");
}

#[test]
fn a_change_of_a_watched_file_reloads_and_a_bad_one_leaves_the_old_version() {
    let (desk, app) =
        started("watch = [\".\"]\nwatch_ignore = [\"*.tmp\"]\nwatch_delay = \"20ms\"");
    let version = || answer(&app)["version"].clone();
    desk.place.file("tells.js", &TELLS.replace("version: 1", "version: 2"));
    eventually("version 2", version, |version| *version == 2);
    // What is ignored, and the app's own logs, which lie in this folder, change nothing.
    let generation = || desk.status("shop")["workers"][0]["generation"].clone();
    let is_quiet = || desk.status("shop")["busy"].is_null();
    eventually("quiet", is_quiet, |quiet| *quiet);
    let was = generation();
    desk.place.file("some.tmp", "1");
    desk.place.file("tells.js", "throw new Error('half of it')");
    let logs = || desk.did(&["logs", "shop", "-n", "all", "--slot", "0"]);
    eventually("a refusal", logs, |logs| {
        logs.contains("half of it") || logs.contains("go on serving")
    });
    assert_eq!((version(), generation()), (2.into(), was));
    assert!(!logs().contains("some.tmp"), "{}", logs());
    desk.place.file("tells.js", &TELLS.replace("version: 1", "version: 3"));
    eventually("version 3", version, |version| *version == 3);
}

#[test]
fn a_minute_of_the_clock_on_the_wall_reloads() {
    let (desk, app) = started("reload_at = \"* * * * *\"");
    let first = answer(&app)["pid"].clone();
    let began = std::time::Instant::now();
    // The next full minute is 60 s away at most, and a probation more.
    while answer(&app)["pid"] == first {
        assert!(began.elapsed().as_secs() < 180, "{}", desk.did(&["logs", "shop", "--slot", "0"]));
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    assert!(
        desk.did(&["logs", "shop", "-n", "all", "--slot", "0"]).contains("it is time (* * * * *)")
    );
}

#[test]
fn what_a_reload_leaves_as_it_was_is_named_with_what_to_do() {
    let (desk, app) = started("");
    let logs = || desk.did(&["logs", "shop", "-n", "all", "--slot", "0"]);
    write(&desk, "grace = \"5s\"", "blue");
    let told = desk.does(&["reload", "--probation", "0", "shop"]);
    assert!(told.code == Some(0) && !told.err.contains("left as it was"), "{told:?}");
    write(&desk, "mechanism = \"handoff\"\nlog_size = \"1MiB\"", "green");
    let told = desk.does(&["reload", "--probation", "0", "shop"]);
    assert_eq!(told.code, Some(0), "{told:?}");
    for part in
        ["left as it was", "log_size, mechanism", "polyfork apply --replace", "polyfork.toml"]
    {
        assert!(told.err.contains(part), "{part:?} is not in {}", told.err);
    }
    assert_eq!(answer(&app)["COLOUR"], "green");
    let notices = || logs().matches("left as it was").count();
    eventually("a notice", notices, |notices| *notices == 1);
    // It differs as long as it differs, however the reload was asked for.
    let told = desk.json(&["reload", "--json", "--probation", "0", "shop"]);
    assert_eq!(told["result"]["left"], serde_json::json!(["log_size", "mechanism"]));
    eventually("a second notice", notices, |notices| *notices == 2);
    signal(&pidfd(app["pid"].as_u64().unwrap()), Signal::HUP);
    eventually("a third notice", notices, |notices| *notices == 3);
}
