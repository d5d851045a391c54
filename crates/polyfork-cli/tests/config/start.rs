//! `start` and `run` by a file.

use super::desk::{Desk, pidfd, read};
use super::support::{Events, get};
use super::{TELLS, answer};

fn two_apps() -> Desk {
    let desk = Desk::new();
    desk.place.file("tells.js", TELLS);
    let text = "[defaults]\nworkers = 1\nenv = { COLOUR = \"red\" }\n[app.one]\nprogram = \"tells.js\"\nargs = [\"a b\", \"-w\"]\n\
                [app.two]\nprogram = \"tells.js\"\nworkers = 2\n[app.two.env]\nCOLOUR = \"blue\"\n\
                [app.two.profile.night.env]\nCOLOUR = \"black\"\n[app.three]\nprogram = \"tells.js\"\nautostart = false\n";
    desk.place.file("polyfork.toml", text);
    desk
}

#[test]
fn all_apps_of_the_file_are_started_or_those_named() {
    let mut desk = two_apps();
    let started = desk.json(&["start", "--json"]);
    started.as_array().expect("an array").iter().for_each(|app| desk.adopt(app));
    let names: Vec<_> = started.as_array().unwrap().iter().map(|app| &app["name"]).collect();
    assert_eq!(names, ["one", "two"]);
    assert_eq!(
        (&started[0]["workers_ready"], &started[1]["workers_ready"]),
        (&1.into(), &2.into())
    );
    let one = answer(&started[0]);
    assert_eq!((&one["COLOUR"], &one["argv"]), (&"red".into(), &serde_json::json!(["a b", "-w"])));
    assert_eq!(answer(&started[1])["COLOUR"], "blue");
    // A second time: each is there already.
    assert!(desk.refuses(&["start"], 11).contains("one runs already"));
    desk.did(&["stop", "--all"]);
    let three = desk.json(&["start", "--json", "three"]);
    desk.adopt(&three[0]);
    assert_eq!(desk.listed(), [("three".into(), "ready".into())]);
    let told = desk.refuses(&["start", "--config", "polyfork.toml", "tow"], 2);
    assert!(told.contains("no app tow") && told.contains("did you mean two?"), "{told}");
}

#[test]
fn what_counts_is_the_command_line_then_the_environment_then_the_file() {
    let mut desk = two_apps();
    let workers = |desk: &mut Desk, variable: Option<&str>, args: &[&str]| {
        let args = [&["start", "--json"], args, &["--", "two"]].concat();
        let mut command = desk.command(&args);
        command.envs(variable.map(|value| ("POLYFORK_WORKERS", value)));
        let done = super::support::ended(command);
        assert_eq!(done.code, Some(0), "{done:?}");
        let app = read(&done.out)[0].clone();
        desk.adopt(&app);
        let colour = answer(&app)["COLOUR"].clone();
        desk.did(&["stop", "two"]);
        (app["workers_ready"].as_u64().unwrap(), colour)
    };
    let blue = || serde_json::Value::from("blue");
    assert_eq!(workers(&mut desk, None, &[]), (2, blue()));
    assert_eq!(workers(&mut desk, Some("3"), &[]), (3, blue()));
    assert_eq!(workers(&mut desk, Some("3"), &["-w", "1"]), (1, blue()));
    assert_eq!(workers(&mut desk, None, &["--env", "COLOUR=green"]), (2, "green".into()));
    assert_eq!(workers(&mut desk, None, &["--profile", "night"]), (2, "black".into()));
}

#[test]
fn the_folder_of_the_file_is_where_its_programs_are() {
    let mut desk = two_apps();
    std::fs::create_dir(desk.place.path().join("else")).expect("a folder");
    let mut command = desk.command(&["start", "--json", "--config", "../polyfork.toml", "one"]);
    command.current_dir(desk.place.path().join("else"));
    let done = super::support::ended(command);
    assert_eq!(done.code, Some(0), "{done:?}");
    desk.adopt(&read(&done.out)[0]);
}

#[test]
fn run_takes_the_one_app_of_a_file_and_asks_which_of_several() {
    let desk = two_apps();
    let told = desk.refuses(&["run"], 2);
    assert!(told.contains("several apps") && told.contains("polyfork run one"), "{told}");
    let mut events = Events::of(desk.command(&["run", "--json", "one"]));
    let address = events.address();
    events.wait_for("ready");
    assert_eq!(read(&get(address, "/"))["COLOUR"], "red");
    events.running.signal(rustix::process::Signal::TERM);
    assert_eq!(events.end().0, 0);
}

#[test]
fn a_program_of_a_folder_with_a_file_is_still_a_program() {
    let mut desk = two_apps();
    let app = desk.start(&["-w", "1", "server.js"]);
    assert_eq!(app["name"], "server");
    let primary = pidfd(app["pid"].as_u64().unwrap());
    desk.did(&["stop", "server"]);
    assert!(super::desk::is_over(&primary));
}
