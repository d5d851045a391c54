//! PM2's files and conventions, with stock Node.

use serde_json::Value;

use super::desk::Desk;
use super::support::{SERVER, command, ended, get};
use super::{TELLS, answer};

/// Starts the app of a file, and gives it back once it is ready.
fn started(desk: &mut Desk, file: &str) -> Value {
    let app = desk.json(&["start", "--json", file])[0].clone();
    desk.adopt(&app);
    app
}

#[test]
fn an_ecosystem_file_is_read_in_each_of_its_forms() {
    for (file, text) in [
        (
            "ecosystem.config.js",
            "module.exports = { apps: [{ script: 'tells.js', env: { COLOUR: 'a' } }] }",
        ),
        (
            "ecosystem.config.cjs",
            "console.log('noise'); module.exports = { apps: { script: 'tells.js', env: { COLOUR: 'a' } } }",
        ),
        (
            "ecosystem.config.mjs",
            "export default async () => [{ script: 'tells.js', env: { COLOUR: 'a' } }]",
        ),
        (
            "ecosystem.config.json",
            "{\"apps\": [{\"script\": \"tells.js\", \"env\": {\"COLOUR\": \"a\"}}]}",
        ),
    ] {
        let mut desk = Desk::new();
        desk.place.file("tells.js", TELLS);
        desk.place.file(file, text);
        // It is found without being named.
        let checked = desk.json(&["check", "--json"]);
        assert_eq!(
            (&checked["ok"], &checked["apps"][0]["name"]),
            (&true.into(), &"tells".into()),
            "{file}"
        );
        let app = started(&mut desk, file);
        assert_eq!(
            (&app["workers_ready"], &answer(&app)["COLOUR"]),
            (&1.into(), &"a".into()),
            "{file}"
        );
    }
}

#[test]
fn what_a_script_does_wrong_is_shown() {
    let desk = Desk::new();
    for (text, part) in [
        ("throw new Error('no such \\x1b[2Jvault')", "no such"),
        ("module.exports = { apps: [ }", "SyntaxError"),
        ("process.exit(0)", "it ended without a value"),
        ("module.exports = { name: 1n }", "BigInt"),
        ("module.exports = 'x'.repeat(3 << 20)", "more than"),
        ("module.exports = {}", "it exports no apps"),
        ("module.exports = { apps: [{ name: 'a' }] }", "it has no script"),
    ] {
        desk.place.file("ecosystem.config.js", text);
        let told = desk.refuses(&["check"], 2);
        assert!(told.contains(part) && told.contains("ecosystem.config.js"), "{part:?}: {told}");
    }
    desk.place.file("ecosystem.config.json", "{\n  \"apps\": [,]\n}");
    assert!(desk.refuses(&["check", "ecosystem.config.json"], 2).contains(":2:"));
}

#[test]
fn what_has_no_effect_is_named_with_the_reason() {
    let desk = Desk::new();
    let text = "module.exports = { apps: [{ script: 'server.js', out_file: '/x', exec_mod: 'fork' }], deploy: {} }";
    desk.place.file("ecosystem.config.js", text);
    let done = desk.does(&["check"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    for part in ["out_file is ignored: logs are in", "did you mean exec_mode?", "deploy is ignored"]
    {
        assert!(done.err.contains(part), "{}", done.err);
    }
}

#[test]
fn ready_is_told_by_message_numbers_have_their_names_and_profiles_count() {
    let mut desk = Desk::new();
    let program = format!("{TELLS}; setTimeout(() => process.send('ready'), 50);");
    desk.place.file("tells.js", &program);
    desk.place.file(
        "ecosystem.config.js",
        "module.exports = { apps: [{ name: 'shop', script: 'tells.js', instances: 2, wait_ready: true,
           instance_var: 'INSTANCE_ID', increment_var: 'BASE', env: { BASE: 3000, COLOUR: 'day' },
           env_production: { COLOUR: 'night' } }] }",
    );
    let told = desk.json(&["start", "--json", "--profile", "production"]);
    desk.adopt(&told[0]);
    let mut numbers: Vec<(String, String)> = Vec::new();
    for _ in 0..8 {
        let said = answer(&told[0]);
        assert_eq!((&said["COLOUR"], &said["NODE_APP_INSTANCE"]), (&"night".into(), &Value::Null));
        let text = |key: &str| said[key].as_str().unwrap().to_owned();
        numbers.push((text("INSTANCE_ID"), text("BASE")));
    }
    numbers.sort();
    numbers.dedup();
    assert_eq!(numbers, [("0".into(), "3000".into()), ("1".into(), "3001".into())]);
}

#[test]
fn one_that_never_says_ready_is_not_ready() {
    let desk = Desk::new();
    desk.place.file("ecosystem.config.js", "module.exports = { apps: [{ script: 'server.js', wait_ready: true, listen_timeout: 300, max_restarts: 0 }] }");
    let done = desk.does(&["start"]);
    assert_eq!(done.code, Some(8), "{done:?}");
    assert!(done.err.contains("process.send('ready')"), "{done:?}");
    assert!(!done.err.contains("does it listen"), "it does: {done:?}");
}

#[test]
fn shutdown_is_told_by_message_and_signals_by_name() {
    let mut desk = Desk::new();
    let leaves = "process.on('message', (m) => { if (m === 'shutdown') { console.log('told to go'); process.exit(0); } });";
    desk.place.file("leaves.js", &format!("{SERVER}{leaves}"));
    desk.place.file("ecosystem.config.js", "module.exports = { apps: [{ name: 'shop', script: 'leaves.js', shutdown_with_message: true }] }");
    let app = started(&mut desk, "ecosystem.config.js");
    assert!(get(Desk::address(&app), "/").contains("pid"));
    desk.did(&["stop", "shop"]);
    assert!(desk.did(&["logs", "shop", "-n", "all"]).contains("told to go"));
    let leaves = "process.on('SIGINT', () => { console.log('interrupted'); process.exit(0); });";
    desk.place.file("leaves.js", &format!("{SERVER}{leaves}"));
    desk.start(&["--name", "other", "-w", "1", "--stop-by", "SIGINT", "leaves.js"]);
    desk.did(&["stop", "other"]);
    assert!(desk.did(&["logs", "other", "-n", "all"]).contains("interrupted"));
}

#[test]
fn init_from_an_ecosystem_file_says_the_same() {
    let desk = Desk::new();
    desk.place.file(
        "ecosystem.config.js",
        "module.exports = { apps: [{ name: 'shop', script: 'server.js', args: ['a \"b\"', 'c'], instances: 'max',
           max_memory_restart: '150M', kill_timeout: 5000, watch: ['src'], env: { 'A.B': 'x\\ny', N: 1 } },
           { script: 'server.js', name: 'other', autostart: false }] }",
    );
    desk.did(&["init", "--from", "ecosystem.config.js"]);
    let same = |file: &str| desk.json(&["check", "--json", file])["apps"].clone();
    assert_eq!(same("polyfork.toml"), same("ecosystem.config.js"));
}

#[test]
fn a_pm2_users_morning() {
    let desk = Desk::new();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/pm2-morning/morning.sh");
    let polyfork = std::path::Path::new(env!("CARGO_BIN_EXE_polyfork"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = polyfork.parent().map(Into::into).into_iter().chain(std::env::split_paths(&path));
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
    let mut morning = command("sh");
    morning.arg(script).current_dir(desk.place.path()).stdin(std::process::Stdio::null());
    for (key, _) in
        std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("POLYFORK_"))
    {
        morning.env_remove(key);
    }
    morning.env("PATH", std::env::join_paths(folders).expect("a path"));
    morning.env("SHOP_PORT", port.expect("a port").port().to_string());
    let done = ended(morning);
    assert_eq!(done.code, Some(0), "{}\n{}", done.out, done.err);
    for part in ["shop 1, worker", "shop 2, worker", "no new mail", "development"] {
        assert!(done.out.contains(part), "{part:?}: {}\n{}", done.out, done.err);
    }
    for part in [
        "out_file is ignored",
        "2 workers ready",
        "reloaded: 3 workers",
        "forgot to finish this",
        "shop: reload",
        "no app runs",
    ] {
        assert!(done.err.contains(part), "{part:?}: {}\n{}", done.out, done.err);
    }
    let served = done.out.matches("shop 2, worker").count();
    assert_eq!(served, 2, "after the bad deploy as before it: {}", done.out);
}

#[test]
fn any_config_js_that_is_named_is_an_ecosystem_file() {
    for (file, text) in [
        ("big.config.js", "module.exports = { apps: [{ name: 'big', script: 'tells.js' }] }"),
        ("big.config.cjs", "module.exports = { apps: [{ name: 'big', script: 'tells.js' }] }"),
        ("big.config.mjs", "export default { apps: [{ name: 'big', script: 'tells.js' }] }"),
    ] {
        let mut desk = Desk::new();
        desk.place.file("tells.js", TELLS);
        desk.place.file(file, text);
        assert_eq!(started(&mut desk, file)["name"], "big", "{file}");
        desk.did(&["stop", "big"]);
        let mut events = super::support::Events::of(desk.command(&["run", "--json", file]));
        events.wait_for("ready");
        events.running.signal(rustix::process::Signal::TERM);
        assert_eq!(events.end().0, 0);
        // It is not looked for.
        assert!(desk.refuses(&["start"], 2).contains("no program given"));
    }
}
