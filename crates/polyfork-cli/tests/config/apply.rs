//! `apply`: the plan, and nothing but the plan.

use serde_json::Value;

use super::desk::Desk;
use super::{TELLS, answer};

fn write(desk: &Desk, text: &str) {
    desk.place.file("polyfork.toml", text);
}

/// The plan: name and action of each app.
fn plan(told: &Value) -> Vec<(String, String)> {
    let text = |app: &Value, field: &str| app[field].as_str().expect(field).to_owned();
    let apps = told["apps"].as_array().expect("apps").iter();
    apps.map(|app| (text(app, "name"), text(app, "action"))).collect()
}

fn does(name: &str, action: &str) -> (String, String) {
    (name.to_owned(), action.to_owned())
}

/// Applies, and notes what runs by then.
fn apply(desk: &mut Desk, args: &[&str]) -> Value {
    let told = desk.json(&[&["apply", "--json"], args].concat());
    let list = desk.json(&["ls", "--json"]);
    list.as_array().expect("a list").iter().for_each(|app| desk.adopt(app));
    told
}

#[test]
fn what_runs_becomes_what_the_file_says_and_nothing_else_is_touched() {
    let mut desk = Desk::new();
    desk.place.file("tells.js", TELLS);
    let file = |shop: &str, mail: &str| {
        format!(
            "[app.shop]\nprogram = \"tells.js\"\nworkers = 1\n{shop}\n[app.shop.env]\nCOLOUR = \"hush\"\n\
             [app.mail]\nprogram = \"tells.js\"\nworkers = 1\n{mail}\n"
        )
    };
    write(&desk, &file("", ""));
    // First nothing runs, and a dry run leaves it so.
    let told = apply(&mut desk, &["--dry-run"]);
    assert_eq!(plan(&told), [does("shop", "start"), does("mail", "start")]);
    assert_eq!(desk.listed(), []);
    let told = apply(&mut desk, &[]);
    assert_eq!(told["apps"][0]["result"]["state"], "ready");
    assert_eq!(desk.listed().len(), 2);
    let shop = desk.status("shop");
    let pid = |desk: &Desk, name: &str| desk.status(name)["pid"].clone();
    let (shop_pid, mail_pid) = (pid(&desk, "shop"), pid(&desk, "mail"));
    // Nothing to do.
    let told = apply(&mut desk, &[]);
    assert_eq!(plan(&told), [does("shop", "nothing"), does("mail", "nothing")]);
    // One is scaled, the other one reloaded.
    write(&desk, &file("", "grace = \"5s\"").replacen("workers = 1", "workers = 2", 1));
    let told = apply(&mut desk, &[]);
    assert_eq!(plan(&told), [does("shop", "scale"), does("mail", "reload")]);
    let change = &told["apps"][1]["changes"][0];
    assert_eq!((&change["key"], &change["to"]), (&"grace".into(), &"5s".into()));
    assert_eq!(desk.status("shop")["workers_ready"], 2);
    assert_eq!(desk.status("mail")["workers"][0]["generation"], 2);
    assert_eq!((pid(&desk, "shop"), pid(&desk, "mail")), (shop_pid, mail_pid.clone()));
    // A secret that changed is not shown.
    let secret = file("", "grace = \"5s\"").replacen("workers = 1", "workers = 2", 1);
    write(&desk, &secret.replace("hush", "psst"));
    let told = desk.does(&["apply"]);
    assert!(
        told.err.contains("env.COLOUR: changed") && told.err.contains("shop: reload"),
        "{}",
        told.err
    );
    assert!(!told.err.contains("hush") && !told.err.contains("psst"), "{}", told.err);
    assert_eq!(answer(&shop)["COLOUR"], "psst");
    // A newer program, and a number that was changed by hand.
    desk.did(&["scale", "shop", "1"]);
    desk.place.file("tells.js", &TELLS.replace("version: 1", "version: 2"));
    let told = desk.does(&["apply", "--dry-run"]).err;
    assert!(told.contains("    tells.js: changed since it was started\n"), "{told}");
    let told = apply(&mut desk, &[]);
    assert_eq!(plan(&told), [does("shop", "reload"), does("mail", "reload")]);
    assert_eq!(answer(&shop)["version"], 2);
    assert_eq!(desk.status("shop")["workers_ready"], 2);
    // One that is in the file no more goes only when that is asked for.
    write(&desk, "[app.shop]\nprogram = \"tells.js\"\nworkers = 2\nenv = { COLOUR = \"psst\" }\n");
    assert_eq!(plan(&apply(&mut desk, &[])), [does("shop", "nothing"), does("mail", "leave")]);
    assert_eq!(pid(&desk, "mail"), mail_pid);
    assert_eq!(
        plan(&apply(&mut desk, &["--prune"])),
        [does("shop", "nothing"), does("mail", "stop")]
    );
    assert_eq!(desk.listed(), [("shop".into(), "ready".into())]);
}

#[test]
fn what_takes_another_primary_is_done_only_when_asked_for_and_then_nothing_is_half_done() {
    let mut desk = Desk::new();
    desk.place.file("tells.js", TELLS);
    write(
        &desk,
        "[defaults]\nworkers = 1\n[app.a]\nprogram = \"tells.js\"\n[app.b]\nprogram = \"tells.js\"\n",
    );
    apply(&mut desk, &[]);
    let before = (desk.status("a")["pid"].clone(), desk.status("b")["workers"].clone());
    write(
        &desk,
        "[defaults]\nworkers = 1\n[app.a]\nprogram = \"tells.js\"\npolicy = \"shared\"\n[app.b]\nprogram = \"tells.js\"\ngrace = \"5s\"\n",
    );
    let told = desk.refuses(&["apply"], 13);
    assert!(told.contains("a: stop and start anew: policy cannot be changed"), "{told}");
    assert!(told.contains("nothing was done") && told.contains("--replace"), "{told}");
    assert_eq!(desk.status("a")["pid"], before.0);
    assert_eq!(desk.status("b")["workers"][0]["generation"], before.1[0]["generation"]);
    let told = apply(&mut desk, &["--replace"]);
    assert_eq!(plan(&told), [does("a", "replace"), does("b", "reload")]);
    assert_ne!(desk.status("a")["pid"], before.0);
    assert_eq!(desk.status("a")["policy"], "shared");
}

#[test]
fn an_app_that_was_started_by_hand_is_not_taken_over_in_silence() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "--name", "shop", "server.js"]);
    write(&desk, "[app.shop]\nprogram = \"server.js\"\nworkers = 1\n");
    let told = desk.refuses(&["apply"], 13);
    assert!(told.contains("started by hand"), "{told}");
    let told = apply(&mut desk, &["--replace"]);
    assert_eq!(plan(&told), [does("shop", "replace")]);
    assert_eq!(plan(&apply(&mut desk, &[])), [does("shop", "nothing")]);
}

#[test]
fn a_new_version_that_does_not_come_up_fails_the_apply_and_not_the_app() {
    let mut desk = Desk::new();
    desk.place.file("tells.js", TELLS);
    write(&desk, "[app.shop]\nprogram = \"tells.js\"\nworkers = 1\n");
    apply(&mut desk, &[]);
    let shop = desk.status("shop");
    desk.place.file("tells.js", "throw new Error('half of it')");
    let told = desk.refuses(&["apply"], 16);
    assert!(told.contains("half of it"), "{told}");
    assert_eq!(answer(&shop)["version"], 1);
    // It is still to be done.
    let told = desk.json(&["apply", "--dry-run", "--json"]);
    assert_eq!(plan(&told), [does("shop", "reload")]);
}

#[test]
fn nothing_is_pruned_while_what_should_come_instead_does_not_run() {
    let mut desk = Desk::new();
    desk.place.file("tells.js", TELLS);
    write(&desk, "[app.old]\nprogram = \"tells.js\"\nworkers = 1\n");
    apply(&mut desk, &[]);
    let old = desk.status("old");
    desk.place.file("bad.js", "process.exit(9)");
    write(&desk, "[app.new]\nprogram = \"bad.js\"\nworkers = 1\nrestart_limit = \"0/1m\"\n");
    let done = desk.does(&["apply", "--prune"]);
    assert_ne!(done.code, Some(0), "{done:?}");
    assert!(done.err.contains("old: runs on, since new did not"), "{done:?}");
    assert_eq!(answer(&old)["version"], 1, "it serves");
    desk.place.file("bad.js", TELLS);
    let told = apply(&mut desk, &["--prune"]);
    assert_eq!(plan(&told), [does("new", "start"), does("old", "stop")]);
}
