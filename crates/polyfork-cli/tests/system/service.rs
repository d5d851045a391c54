//! Unit files: that systemd takes them, that they run what was asked for, and that nothing is written over.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use serde_json::Value;

use super::desk::{Desk, read};
use super::support::{command, ended, skip};

fn unit(desk: &Desk, args: &[&str]) -> String {
    desk.did(&[&["service", "print"], args].concat())
}

fn line<'a>(text: &'a str, name: &str) -> &'a str {
    let start = format!("{name}=");
    text.lines()
        .find_map(|line| line.strip_prefix(&start))
        .unwrap_or_else(|| panic!("{name}: {text}"))
}

#[test]
fn a_unit_is_what_systemd_takes() {
    let desk = Desk::new();
    let folder = desk.place.path().join("units");
    let dir = folder.to_str().unwrap();
    let install = ["service", "install", "--dir", dir];
    for rest in [
        &["--", "server.js"][..],
        &[
            "--socket",
            ":8000",
            "--socket",
            "unix:/run/x y.sock",
            "--",
            "-w",
            "2",
            "--name",
            "b@1",
            "server.js",
        ],
        &[
            "--watchdog-sec",
            "none",
            "--",
            "--user",
            "nobody",
            "--name",
            "c",
            "--env",
            "A=% \"$B",
            "server.js",
            "--x=%",
        ],
        &["--user-unit", "--", "--name", "d", "--grace", "1500ms", "server.js"],
    ] {
        let done = desk.does(&[&install[..], rest].concat());
        assert_eq!(done.code, Some(0), "{done:?}");
        assert!(done.err.contains("daemon-reload"), "{}", done.err);
    }
    let mut verify = command("systemd-analyze");
    verify.args(["verify", "--man=no"]);
    if command("systemd-analyze").arg("--version").output().is_err() {
        return skip("a_unit_is_what_systemd_takes", "needs systemd-analyze");
    }
    for entry in fs::read_dir(&folder).unwrap().flatten() {
        verify.arg(entry.path());
    }
    let told = ended(verify);
    assert_eq!((told.code, told.err.trim()), (Some(0), ""), "{told:?}");
}

#[test]
fn a_unit_says_all_that_a_service_of_this_kind_needs() {
    let desk = Desk::new();
    let text = unit(&desk, &["--", "-w", "2", "--grace", "5s", "server.js", "--name", "mine"]);
    let exec = line(&text, "ExecStart");
    assert!(exec.ends_with(" run --name server -w 2 --grace 5s server.js --name mine"), "{exec}");
    assert!(exec.starts_with('/'), "{exec}");
    assert!(line(&text, "ExecReload").ends_with(" reload server"), "{text}");
    for (name, value) in [
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("Restart", "on-failure"),
        ("KillMode", "mixed"),
        ("FileDescriptorStoreMax", "64"),
        ("TimeoutStopSec", "15s"),
        ("WatchdogSec", "30s"),
        ("NoNewPrivileges", "yes"),
        ("WantedBy", "multi-user.target"),
        ("WorkingDirectory", desk.place.path().to_str().unwrap()),
    ] {
        assert_eq!(line(&text, name), value, "{name}");
    }
    // systemd before 254 does not say so itself.
    assert!(text.lines().any(|line| line == "Environment=FDSTORE=64"), "{text}");
    let text = unit(&desk, &["--user-unit", "--watchdog-sec", "none", "--", "server.js"]);
    assert_eq!(line(&text, "WantedBy"), "default.target");
    assert!(!text.contains("WatchdogSec") && !text.contains("ProtectSystem"), "{text}");
}

#[test]
fn a_file_that_is_there_is_not_written_over() {
    let desk = Desk::new();
    let folder = desk.place.path().join("units");
    let dir = folder.to_str().unwrap();
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("polyfork-server.socket"), "mine").unwrap();
    let install = ["service", "install", "--dir", dir, "--socket", ":80", "--", "server.js"];
    let told = desk.refuses(&install, 13);
    assert!(told.contains("is there already"), "{told}");
    assert_eq!(fs::read_to_string(folder.join("polyfork-server.socket")).unwrap(), "mine");
    assert!(!folder.join("polyfork-server.service").exists(), "all or none");
    // Nor is a link followed.
    fs::remove_file(folder.join("polyfork-server.socket")).unwrap();
    symlink(desk.place.path().join("victim"), folder.join("polyfork-server.service")).unwrap();
    desk.refuses(&install, 13);
    assert!(!desk.place.path().join("victim").exists());
}

#[test]
fn an_app_that_runs_becomes_a_unit() {
    let mut desk = Desk::new();
    let options = ["-w", "1", "--log-keep", "3", "--log-format=json", "--name", "shop"];
    let program = ["--env", "KEY=very secret", "server.js", "--json", "--log-dir"];
    desk.start(&[&options[..], &program].concat());
    let folder = desk.place.path().join("units");
    let dir = folder.to_str().unwrap();
    let told: Value = read(&desk.did(&["service", "install", "--json", "--dir", dir, "shop"]));
    assert_eq!(
        (&told["version"], &told["name"], &told["installed"]),
        (&1.into(), &"shop".into(), &true.into())
    );
    let path = folder.join("polyfork-shop.service");
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(told["units"][0]["text"], text);
    let exec = line(&text, "ExecStart");
    let wanted = " run --name shop -w 1 --env \"KEY=very secret\" server.js --json --log-dir";
    assert!(exec.ends_with(wanted), "{exec}");
    let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600, "what an app was started with is nobody's business");
}

#[test]
fn options_that_were_given_as_variables_stand_in_the_unit() {
    let mut desk = Desk::new();
    let args = ["start", "--json", "--name", "shop", "server.js"];
    let variables =
        [("POLYFORK_WORKERS", "1"), ("POLYFORK_METRICS", "127.0.0.1:0"), ("OTHER", "secret")];
    let mut start = desk.command(&args);
    start.envs(variables);
    let done = ended(start);
    desk.started(&args, done);
    let told = unit(&desk, &["shop"]);
    assert!(told.contains("\nEnvironment=POLYFORK_WORKERS=1\n"), "{told}");
    assert!(told.contains("\nEnvironment=POLYFORK_METRICS=127.0.0.1:0\n"), "{told}");
    assert!(!told.contains("OTHER"), "{told}");
    // Of a program they are those of whoever asks.
    let print = ["service", "print", "--", "server.js"];
    let mut print = desk.command(&print);
    print.env("POLYFORK_GRACE", "2m");
    let told = ended(print).out;
    assert!(told.contains("\nEnvironment=POLYFORK_GRACE=2m\n"), "{told}");
    assert_eq!(line(&told, "TimeoutStopSec"), "130s");
}

#[test]
fn what_is_no_app_and_no_program_is_refused() {
    let desk = Desk::new();
    let told = desk.refuses(&["service", "print", "shop"], 10);
    assert!(told.contains("put -- in front"), "{told}");
    desk.refuses(&["service", "print", "node", "server.js"], 2);
    let told = desk.refuses(&["service", "print", "--", "--wrokers", "2", "server.js"], 2);
    assert!(told.contains("--workers"), "{told}");
    desk.refuses(&["service", "print", "--", "--help"], 2);
}

#[test]
fn an_app_of_a_configuration_becomes_a_unit_that_reads_it() {
    let mut desk = Desk::new();
    let file = desk.place.path().join("polyfork.toml");
    let text = "[app.shop]\nprogram = \"server.js\"\nworkers = 1\ngrace = \"2m\"\n";
    fs::write(&file, text).unwrap();
    let started = desk.json(&["start", "--json", "shop"]);
    started.as_array().unwrap().iter().for_each(|app| desk.adopt(app));
    let unit = unit(&desk, &["shop"]);
    let wanted = format!(" run --name shop --config {} shop", file.display());
    let exec = line(&unit, "ExecStart");
    assert!(exec.ends_with(&wanted), "{exec}");
    assert_eq!(line(&unit, "TimeoutStopSec"), "130s");
}
