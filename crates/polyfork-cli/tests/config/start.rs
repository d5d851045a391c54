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

#[test]
fn of_several_apps_every_complaint_says_which_it_is_about() {
    let mut desk = Desk::new();
    desk.place.file("bad.js", "console.error('no vault'); process.exit(9)");
    let text = "[defaults]\nworkers = 1\nrestart_limit = \"0/1m\"\n[app.good]\nprogram = \"server.js\"\n\
                [app.bad]\nprogram = \"bad.js\"\n[app.none]\nprogram = \"nofile.js\"\n";
    desk.place.file("polyfork.toml", text);
    let done = desk.does(&["start", "--json"]);
    let told = read(&done.out);
    desk.adopt(&told[0]);
    let named: Vec<_> = told.as_array().expect("an array").iter().map(|app| &app["name"]).collect();
    assert_eq!(named, ["good", "bad", "none"]);
    assert_eq!(done.code, Some(7), "{done:?}");
    assert_eq!(told[1]["error"]["code"], "failed");
    for part in [
        "polyfork: bad: every slot was given up",
        "bad: the last lines that its last worker wrote",
        "polyfork: none: no such program",
    ] {
        assert!(done.err.contains(part), "{part:?} is not in {}", done.err);
    }
    desk.did(&["stop", "good"]);
    // What `apply` starts is told of in the same way.
    desk.place.file("polyfork.toml", &text.replace("nofile.js", "bad.js"));
    let done = desk.does(&["apply", "--json"]);
    read(&done.out)["apps"].as_array().expect("apps").iter().for_each(|app| {
        if app["name"] == "good" {
            desk.adopt(&app["result"]);
        }
    });
    for name in ["bad", "none"] {
        let part = format!("polyfork: {name}: every slot was given up");
        assert!(done.err.contains(&part), "{part:?} is not in {}", done.err);
    }
}
