//! `check` and `init`: what is wrong is told before anything runs, with its place.

use serde_json::Value;

use super::desk::{Desk, read};

#[test]
fn a_mistake_is_told_with_file_line_column_the_line_itself_and_what_was_meant() {
    let desk = Desk::new();
    for (text, parts) in [
        (
            "[app.shop]\nprogram = \"server.js\"\nmax_memry = \"1MiB\"\n",
            &[
                "polyfork.toml:3:1",
                "app shop",
                "max_memry",
                "did you mean max_memory?",
                "    max_memry = ",
            ][..],
        ),
        ("[app.shop]\nscript = \"server.js\"\n", &[":2:1", "did you mean program?"]),
        ("[app.shop]\nprogram = 3\n", &[":2:11", "program is a text", "not a number"]),
        (
            "[app.shop]\nprogram = \"server.js\"\ngrace = 30\n",
            &[":3:9", "grace: the unit is missing"],
        ),
        (
            "[app.shop]\nprogram = \"server.js\"\nworkers = 0\n",
            &[":3:11", "workers: ", "at least 1"],
        ),
        ("[app.shop]\nprogram = \"server.js\"\npolicy = \"fair\"\n", &[":3:10", "round-robin"]),
        ("[app.shop]\nprogram = \"server.js\"\nwindow = \"8\"\n", &[":3:10", "without quotes"]),
        (
            "[app.shop]\nprogram = \"server.js\"\nlisten = [\":80\", \"x\"]\n",
            &[":3:10", "listen: "],
        ),
        ("[app.shop]\nprogram = \"server.js\"\nenv = { A = [1] }\n", &[":3:13", "env.A"]),
        (
            "[app.shop]\nprogram = \"server.js\"\nenv = { A = \"b\\u0000\" }\n",
            &[":3:13", "cannot be in an environment"],
        ),
        ("[app.shop]\nprogram = \"server.js\"\nreload_at = \"61 * * * *\"\n", &[":3:13", "minute"]),
        ("[app.shop]\nprogram = \"server.js\n", &[":2:", "not TOML"]),
        ("[app.shop]\n", &[":1:6", "it has no program"]),
        ("[app.\"a b\"]\nprogram = \"server.js\"\n", &[":1:6", "cannot be an app's name"]),
        ("[apps.shop]\nprogram = \"server.js\"\n", &[":1:2", "did you mean app?"]),
        ("workers = 3\n", &[":1:1", "below its [app.NAME]"]),
        ("[app.shop]\nprogram = \"server.js\"\n[app.shop]\n", &[":3:", "not TOML"]),
    ] {
        desk.place.file("polyfork.toml", text);
        let told = desk.refuses(&["check"], 2);
        for part in parts {
            assert!(told.contains(part), "{part:?} is not in {told}");
        }
        // What cannot be checked is not started either.
        assert!(desk.refuses(&["start"], 2).contains(parts[0]));
    }
}

#[test]
fn all_mistakes_are_told_at_once_and_secrets_never() {
    let desk = Desk::new();
    let text = "[app.a]\nprogram = \"server.js\"\nx = 1\ny = 2\n[app.a.env]\nTOKEN = [\"hush\"]\n";
    desk.place.file("polyfork.toml", text);
    let done = desk.does(&["check", "--json"]);
    let told = read(&done.out);
    assert_eq!((done.code, &told["ok"]), (Some(2), &false.into()));
    let lines: Vec<&Value> =
        told["problems"].as_array().unwrap().iter().map(|problem| &problem["line"]).collect();
    assert_eq!(lines, [3, 4, 6]);
    assert!(!done.err.contains("hush") && !done.out.contains("hush"), "{}", done.err);
    // Nor where one stands beside a mistake.
    let text = "app.a = { program = \"server.js\", env = { TOKEN = \"hush\" }, args = [\"hush\"], max_memry = 1 }\n";
    desk.place.file("polyfork.toml", text);
    let told = desk.refuses(&["check"], 2);
    assert!(told.contains("max_memory") && !told.contains("hush"), "{told}");
}

#[test]
fn programs_folders_and_addresses_are_looked_at() {
    let desk = Desk::new();
    for (text, code, part) in [
        ("[app.a]\nprogram = \"nothing.js\"\n", 3, ":2:11: app a:"),
        ("[app.a]\nprogram = \"server.js\"\nruntime = \"no-such-node\"\n", 4, "no-such-node"),
        ("[app.a]\nprogram = \"server.js\"\nruntime = \"no-such-node\"\n", 4, ":3:11: app a:"),
        ("[app.a]\nprogram = \"server.js\"\ncwd = \"nowhere\"\n", 2, "no such directory"),
        ("[app.a]\nprogram = \"server.js\"\nuser = \"nobodyx\"\n", 2, ":3:8: app a:"),
        ("[app.a]\nprogram = \"server.js\"\nuser = \"nobodyx\"\n", 2, "no such user: nobodyx"),
        (
            "[app.a]\nprogram = \"server.js\"\nuser = \"\"\n",
            2,
            ":3:8: app a: user: it names no user",
        ),
        ("[app.a]\nprogram = \"server.js\"\nmetrics = \"0.0.0.0:9\"\n", 2, ":3:11: app a:"),
        (
            "[defaults]\ndialect = \"sockets\"\nlisten = \":4711\"\n[app.a]\nprogram = \"server.js\"\n[app.b]\nprogram = \"server.js\"\n",
            5,
            "app a's address",
        ),
    ] {
        desk.place.file("polyfork.toml", text);
        let told = desk.refuses(&["check"], code);
        assert!(told.contains(part), "{part:?} is not in {told}");
    }
    desk.place.file("polyfork.toml", "[app.a]\nprogram = \"server.js\"\nenv = { PORT = 1 }\n[app.b]\nprogram = \"server.js\"\nenv = { PORT = 1 }\n");
    let told = desk.json(&["check", "--json"]);
    assert_eq!((&told["ok"], &told["problems"][0]["level"]), (&true.into(), &"warning".into()));
    assert_eq!(told["apps"][1]["name"], "b");
}

#[test]
fn a_mark_at_the_beginning_of_a_json_file_is_no_mistake() {
    let desk = Desk::new();
    let text = "\u{feff}{\"apps\": [{\"name\": \"shop\", \"script\": \"server.js\"}]}";
    desk.place.file("ecosystem.config.json", text);
    desk.did(&["check"]);
}

#[test]
fn nothing_to_check_says_how_to_begin() {
    let desk = Desk::new();
    assert!(desk.refuses(&["check"], 2).contains("polyfork init"));
    assert!(desk.refuses(&["start"], 2).contains("polyfork init"));
    assert!(desk.refuses(&["run"], 2).contains("no program given"));
    assert!(desk.refuses(&["check", "none.toml"], 2).contains("none.toml"));
}

#[test]
fn init_writes_what_check_takes_and_overwrites_nothing() {
    let desk = Desk::new();
    assert!(desk.does(&["init"]).err.contains("wrote polyfork.toml"));
    desk.did(&["check"]);
    let written = std::fs::read_to_string(desk.place.path().join("polyfork.toml")).unwrap();
    assert!(written.contains("program = \"server.js\""), "{written}");
    assert!(desk.refuses(&["init"], 2).contains("stays as it is"));
    // Every line that it leaves out can be put in.
    for line in written.lines().filter_map(|line| line.strip_prefix("# ")) {
        let Some((key, _)) = line.split_once(" = ") else { continue };
        if key.contains(' ') {
            continue;
        }
        let mut text = format!("[app.a]\nprogram = \"server.js\"\n{line}\n");
        if key == "listen" {
            text.push_str("dialect = \"sockets\"\n");
        }
        if key == "metrics_on_network" {
            text.push_str("metrics = \"127.0.0.1:9100\"\n");
        }
        desk.place.file("one.toml", &text);
        let done = desk.does(&["check", "one.toml"]);
        // What makes no sense in the background is no mistake of the file's.
        let foreground = matches!(key, "no_control");
        assert!(done.code == Some(0) || foreground, "{line}: {}", done.err);
    }
}

#[test]
fn the_schema_has_what_the_parser_takes() {
    let desk = Desk::new();
    let schema = desk.json(&["check", "--schema"]);
    assert_eq!(schema, desk.json(&["init", "--schema"]));
    let app = &schema["definitions"]["app"];
    assert_eq!(app["additionalProperties"], false);
    for (key, property) in app["properties"].as_object().unwrap() {
        // A value of the type that the schema names is never refused for its type.
        let value = match (&property["type"], &property["enum"], &property["anyOf"]) {
            (_, Value::Array(choices), _) => format!("\"{}\"", choices[0].as_str().unwrap()),
            (_, _, Value::Array(_)) => "[]".to_owned(),
            (kind, ..) if kind == "boolean" => "true".to_owned(),
            (kind, ..) if kind == "integer" => "1".to_owned(),
            (kind, ..) if kind == "object" => "{}".to_owned(),
            (kind, ..) if kind == "array" => "[]".to_owned(),
            _ => "\"1\"".to_owned(),
        };
        desk.place.file("one.toml", &format!("[app.a]\n{key} = {value}\n"));
        let told = desk.does(&["check", "one.toml"]).err;
        assert!(!told.contains("unknown key") && !told.contains(&format!("{key} is ")), "{told}");
    }
}

#[test]
fn a_user_that_is_named_and_empty_is_refused_wherever_it_is_named() {
    let desk = Desk::new();
    for verb in ["run", "start"] {
        let told = desk.refuses(&[verb, "--user", "", "-w", "1", "server.js"], 2);
        assert!(told.contains("--user") && told.contains("names no user"), "{told}");
        let mut command = desk.command(&[verb, "-w", "1", "server.js"]);
        command.env("POLYFORK_USER", "");
        let done = super::support::ended(command);
        assert_eq!(done.code, Some(2), "{done:?}");
        assert!(done.err.contains("names no user"), "{done:?}");
    }
    desk.place.file("polyfork.toml", "[app.a]\nprogram = \"server.js\"\nuser = \"\"\n");
    let js =
        "module.exports = { apps: [{ script: 'server.js', uid: process.env.NO_SUCH_USER || '' }] }";
    desk.place.file("ecosystem.config.js", js);
    for file in ["polyfork.toml", "ecosystem.config.js"] {
        for verb in ["check", "start", "run", "apply"] {
            desk.refuses(&[verb, file], 2);
        }
    }
    assert_eq!(desk.listed(), []);
}

#[test]
fn of_many_apps_the_runtime_is_asked_once_and_the_first_are_named() {
    use std::os::unix::fs::PermissionsExt;
    let desk = Desk::new();
    let mut text: String =
        (0..40).map(|n| format!("[app.a{n}]\nprogram = \"server.js\"\n")).collect();
    std::fs::create_dir(desk.place.path().join("other")).expect("a folder");
    text.push_str("[app.b]\nprogram = \"../server.js\"\ncwd = \"other\"\n");
    desk.place.file("polyfork.toml", &text);
    // It stands for Node, as version managers have it: what it answers may depend on the folder.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut nodes = std::env::split_paths(&path).map(|folder| folder.join("node"));
    let node = nodes.find(|node| node.is_file()).expect("node");
    let shims = desk.place.path().join("shims");
    std::fs::create_dir(&shims).expect("a folder");
    let asked = shims.join("asked");
    let shim =
        format!("#!/bin/sh\necho x >> {}\nexec {} \"$@\"\n", asked.display(), node.display());
    std::fs::write(shims.join("node"), shim).expect("write");
    std::fs::set_permissions(shims.join("node"), std::fs::Permissions::from_mode(0o755))
        .expect("chmod");
    let mut command = desk.command(&["check"]);
    command.env(
        "PATH",
        std::env::join_paths([shims].into_iter().chain(std::env::split_paths(&path)))
            .expect("a path"),
    );
    let done = super::support::ended(command);
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.err.contains("41 apps (a0, a1, a2, a3, a4 and 36 more)"), "{done:?}");
    let asked = std::fs::read_to_string(asked).expect("asked").lines().count();
    assert_eq!(asked, 2, "once in each folder");
}
