//! Reads PM2's ecosystem file: every key is honoured, mapped to one of ours, or named as ignored with the reason.
//!
//! How the file becomes JSON is `evaluate`'s business. The table of all keys is [`KEYS`], which docs/config.md repeats and a
//! test holds to it.
//!
//! The surprising rules: `exec_mode: "fork"` is one worker unless `instances` says otherwise, and several instances share
//! their ports here also in fork mode, where PM2's would fight over them. `uid` and `gid` are never ignored silently: who
//! asks for another user must not get root.
//!
//! Source: PM2 7, `lib/API/schema.json`, `lib/Common.js` (the meaning of `instances` and `exec_mode`).

use std::path::Path;
use std::time::Duration;

use polyfork::cluster::usable_cpus;
use serde_json::{Map, Value};

use super::fault::Fault;
use super::file::is_variable;
use super::keys;
use super::wanted::Wanted;
use crate::control::name::Name;

/// What becomes of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It means here what it means there.
    Honoured,
    /// It becomes the key named.
    Mapped(&'static str),
    /// It has no effect, for this reason.
    Ignored(&'static str),
}

use Fate::{Honoured, Ignored, Mapped};

/// Every key of PM2, with its other names behind it.
pub(crate) const KEYS: &[(&[&str], Fate)] = &[
    (&["name"], Honoured),
    (&["name_prefix"], Honoured),
    (&["append_env_to_name"], Honoured),
    (&["script", "exec"], Mapped("program")),
    (&["args"], Mapped("args")),
    (&["interpreter", "exec_interpreter"], Mapped("runtime")),
    (&["node_args", "interpreter_args", "interpreterArgs"], Honoured),
    (&["cwd"], Mapped("cwd")),
    (&["instances"], Mapped("workers")),
    (&["exec_mode"], Mapped("workers")),
    (&["env"], Mapped("env")),
    (&["env_*"], Honoured),
    (&["port"], Mapped("env")),
    (&["instance_var"], Mapped("instance_var")),
    (&["increment_var"], Mapped("increment_var")),
    (&["wait_ready"], Mapped("ready")),
    (&["listen_timeout"], Mapped("ready_timeout")),
    (&["kill_timeout"], Mapped("grace")),
    (&["shutdown_with_message"], Mapped("stop_by")),
    (&["max_memory_restart"], Mapped("max_memory")),
    (&["max_restarts"], Mapped("restart_limit")),
    (&["min_uptime"], Mapped("min_uptime")),
    (&["stop_exit_codes"], Mapped("stop_exit_codes")),
    (&["autorestart"], Mapped("stop_exit_codes")),
    (&["restart_delay"], Mapped("restart_delay")),
    (&["exp_backoff_restart_delay"], Mapped("restart_delay")),
    (&["autostart"], Mapped("autostart")),
    (&["cron_restart", "cron"], Mapped("reload_at")),
    (&["watch"], Mapped("watch")),
    (&["ignore_watch"], Mapped("watch_ignore")),
    (&["watch_delay"], Mapped("watch_delay")),
    (&["log_type"], Mapped("log_format")),
    (&["disable_logs"], Mapped("output")),
    (&["source_map_support"], Honoured),
    (&["uid", "user", "gid"], Honoured),
    (&["out_file", "out", "output", "out_log"], Ignored(LOGS)),
    (&["error_file", "error", "err", "err_file", "err_log"], Ignored(LOGS)),
    (&["log_file", "log"], Ignored(LOGS)),
    (
        &["merge_logs", "combine_logs"],
        Ignored("`polyfork logs` merges workers in the order of time, always"),
    ),
    (&["log_date_format", "time"], Ignored("each line has its time, as RFC 3339 in UTC")),
    (
        &["pid_file", "pid"],
        Ignored("`polyfork status --json` tells the process; nothing is told by numbers in files"),
    ),
    (&["namespace"], Ignored("apps are named by patterns instead: `polyfork stop 'shop-*'`")),
    (&["filter_env"], Ignored("start from a clean environment instead: env -i")),
    (
        &["treekill"],
        Ignored("workers lead process groups of their own; what they leave behind is theirs"),
    ),
    (
        &["kill_retry_time"],
        Ignored("two seconds after SIGTERM comes SIGKILL, which needs no second try"),
    ),
    (&["watch_options"], Ignored("files are watched by inotify, not by chokidar")),
    (
        &["disable_source_map_support"],
        Ignored("source maps are off unless source_map_support is true"),
    ),
    (&["force"], Ignored("two apps of one name are never started")),
    (&["execute_command", "write"], Ignored("PM2's own command line uses it")),
    (&["username"], Ignored("PM2 fills it in; uid is what counts")),
    (&["vizion", "post_update", "install_url"], Ignored("nothing is fetched or deployed here")),
    (
        &[
            "pmx",
            "automation",
            "trace",
            "disable_trace",
            "v8",
            "event_loop_inspector",
            "deep_monitoring",
            "io",
        ],
        Ignored(
            "nothing is put into workers to watch them for PM2's service; see `polyfork status`",
        ),
    ),
    (&["windowsHide"], Ignored("there is no Windows here")),
];

const LOGS: &str = "logs are in log_dir, a file for each slot, rotated; `polyfork logs` shows them";

/// The longest wait of `exp_backoff_restart_delay`.
const LONGEST_BACKOFF: Duration = Duration::from_secs(15);
/// A limit that no restarts reach.
const NEVER: &str = "10000/1ms";

/// What stands beside `apps`.
const BESIDE: [(&str, &str); 2] =
    [("deploy", "nothing is deployed here"), ("module_conf", "there are no PM2 modules here")];

/// Reads what a file says. `path` is the file, in full.
pub(crate) fn read(path: &Path, value: &Value, profile: Option<&str>) -> (Vec<Wanted>, Vec<Fault>) {
    let mut faults = Vec::new();
    let apps: Vec<&Value> = match value {
        Value::Array(apps) => apps.iter().collect(),
        Value::Object(all) if all.contains_key("apps") || all.contains_key("deploy") => {
            for (key, why) in BESIDE {
                if all.contains_key(key) {
                    let text = format!("{key} is ignored: {why}");
                    faults.push(Fault::warning(path, None, text));
                }
            }
            match all.get("apps") {
                Some(Value::Array(apps)) => apps.iter().collect(),
                Some(one @ Value::Object(_)) => vec![one],
                _ => Vec::new(),
            }
        }
        Value::Object(one) if !one.is_empty() => vec![value],
        _ => Vec::new(),
    };
    if apps.is_empty() {
        let text = "it exports no apps: module.exports = { apps: [{ script: 'server.js' }] }";
        faults.push(Fault::new(path, None, text));
    }
    let mut found: Vec<Wanted> = Vec::new();
    let (keys, command) = (keys::all(), keys::description());
    for (number, app) in apps.into_iter().enumerate() {
        let Value::Object(app) = app else {
            let text = format!("apps[{number}] is not an object");
            faults.push(Fault::new(path, None, text));
            continue;
        };
        let mut reader =
            Reader { path, app, name: format!("apps[{number}]"), profile, faults: Vec::new() };
        let mut wanted = reader.wanted();
        reader.user(&mut wanted, keys.iter().any(|key| key.name == "user"));
        for (key, values) in &wanted.options {
            let known = keys.iter().find(|known| known.name == *key);
            if let Some(Err(why)) = known.map(|known| known.check(&command, values)) {
                reader.wrong(format!("{}: {why}", theirs(key)));
            }
        }
        if found.iter().any(|other| other.name == wanted.name) {
            reader.wrong("another app has this name as well; names must differ");
        }
        faults.append(&mut reader.faults);
        found.push(wanted);
    }
    (found, faults)
}

/// The key of PM2 that one of ours comes from.
fn theirs(ours: &str) -> &str {
    let from = |fate: &Fate| matches!(fate, Mapped(name) if *name == ours);
    KEYS.iter().find(|(_, fate)| from(fate)).map_or(ours, |(names, _)| names[0])
}

struct Reader<'a> {
    path: &'a Path,
    app: &'a Map<String, Value>,
    name: String,
    profile: Option<&'a str>,
    faults: Vec<Fault>,
}

impl Reader<'_> {
    fn wrong(&mut self, text: impl Into<String>) {
        let fault = Fault::new(self.path, None, text);
        self.faults.push(fault.of(&self.name));
    }

    fn note(&mut self, text: impl Into<String>) {
        let fault = Fault::warning(self.path, None, text);
        self.faults.push(fault.of(&self.name));
    }

    /// The value of a key or of its other names. `null` is as good as none.
    fn get(&self, names: &[&str]) -> Option<&Value> {
        names.iter().filter_map(|name| self.app.get(*name)).find(|value| !value.is_null())
    }

    /// Text, or a number as text.
    fn text(&self, names: &[&str]) -> Option<String> {
        match self.get(names)? {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        }
    }

    fn is(&self, names: &[&str]) -> bool {
        matches!(self.get(names), Some(Value::Bool(true)))
            || self.text(names).is_some_and(|text| text == "true")
    }

    fn is_not(&self, names: &[&str]) -> bool {
        matches!(self.get(names), Some(Value::Bool(false)))
            || self.text(names).is_some_and(|text| text == "false")
    }

    /// Words: a list, or a text that is cut at blanks as a shell does.
    fn words(&self, names: &[&str]) -> Vec<String> {
        match self.get(names) {
            Some(Value::Array(items)) => items.iter().filter_map(plain).collect(),
            Some(Value::String(text)) => split(text),
            Some(other) => plain(other).into_iter().collect(),
            None => Vec::new(),
        }
    }

    fn wanted(&mut self) -> Wanted {
        let mut wanted = Wanted::new(self.path);
        self.command(&mut wanted);
        self.names(&mut wanted);
        self.variables(&mut wanted);
        self.workers(&mut wanted);
        self.life(&mut wanted);
        self.renewal(&mut wanted);
        self.tell_of_others();
        wanted
    }

    fn command(&mut self, wanted: &mut Wanted) {
        let script = self.text(&["script", "exec"]).unwrap_or_default();
        if script.is_empty() {
            self.wrong("it has no script");
        }
        let runtime = self.text(&["interpreter", "exec_interpreter"]);
        let mut flags = self.words(&["node_args", "interpreter_args", "interpreterArgs"]);
        if self.is(&["source_map_support"]) {
            flags.push("--enable-source-maps".to_owned());
        }
        let args = self.words(&["args"]);
        let is_module = [".js", ".cjs", ".mjs", ".ts", ".mts", ".cts", ".jsx", ".tsx"]
            .iter()
            .any(|end| script.ends_with(end));
        match runtime.as_deref() {
            None | Some("node") if flags.is_empty() => {
                (wanted.program, wanted.args) = (script, args);
            }
            Some("none") => (wanted.program, wanted.args) = (script, args),
            Some(runtime) if is_module && flags.is_empty() => {
                (wanted.program, wanted.args) = (script, args);
                wanted.options.insert("runtime".into(), vec![runtime.to_owned()]);
            }
            runtime => {
                wanted.program = runtime.unwrap_or("node").to_owned();
                wanted.args = [flags, vec![script], args].concat();
            }
        }
        if let Some(cwd) = self.text(&["cwd"]) {
            wanted.options.insert("cwd".into(), vec![cwd]);
        }
    }

    fn names(&mut self, wanted: &mut Wanted) {
        let script = self.text(&["script", "exec"]).unwrap_or_default();
        let stem = Path::new(&script).file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let mut name = self.text(&["name"]).or(stem).unwrap_or_else(|| self.name.clone());
        if let Some(prefix) = self.text(&["name_prefix"]) {
            name = format!("{prefix}{name}");
        }
        if let (true, Some(profile)) = (self.is(&["append_env_to_name"]), self.profile) {
            name = format!("{name}-{profile}");
        }
        let read = Name::read(&name).is_ok();
        let fit = Name::like(&name).to_string();
        // A name that nobody gave is nobody's mistake.
        let is_given = !script.is_empty() || self.text(&["name"]).is_some();
        self.name.clone_from(&fit);
        if !read && is_given {
            self.note(format!("its name {name:?} becomes {fit}: a name is a folder's as well"));
        }
        wanted.name = fit;
    }

    fn variables(&mut self, wanted: &mut Wanted) {
        let mut tables = vec!["env".to_owned()];
        if let Some(profile) = self.profile {
            let name = format!("env_{profile}");
            if self.app.contains_key(&name) {
                tables.push(name);
            } else {
                self.note(format!("it has no {name}: its env alone holds"));
            }
        }
        for table in tables {
            let Some(value) = self.get(&[&table]) else { continue };
            let Value::Object(values) = value.clone() else {
                self.wrong(format!("{table} is not an object"));
                continue;
            };
            for (key, value) in values {
                let text = match &value {
                    Value::Null => continue,
                    Value::String(text) => text.clone(),
                    // As `process.env.X = value` has them; objects as PM2 has them.
                    other => other.to_string(),
                };
                if is_variable(&key) && !text.contains('\0') {
                    wanted.env.insert(key, text);
                } else {
                    self.wrong(format!("{table}.{key:?} cannot be in an environment"));
                }
            }
        }
        if let Some(port) = self.text(&["port"]) {
            wanted.env.entry("PORT".to_owned()).or_insert(port);
        }
        for key in ["instance_var", "increment_var"] {
            if let Some(name) = self.text(&[key]) {
                wanted.options.insert(key.into(), vec![name]);
            }
        }
    }

    fn workers(&mut self, wanted: &mut Wanted) {
        let mode = self.text(&["exec_mode"]).map(|mode| mode.trim_end_matches("_mode").to_owned());
        let asked = self.text(&["instances"]);
        let is_cluster = mode.as_deref() == Some("cluster") || (mode.is_none() && asked.is_some());
        if let Some(other) = mode.filter(|mode| !matches!(mode.as_str(), "fork" | "cluster")) {
            self.wrong(format!("exec_mode is \"fork\" or \"cluster\", not {other:?}"));
        }
        let workers = match asked.as_deref().map(str::trim) {
            None => "1".to_owned(),
            Some("max" | "0") => "max".to_owned(),
            Some(text) => match text.parse::<i64>() {
                Ok(fewer) if fewer < 0 => {
                    let cpus = i64::from(usable_cpus().workers);
                    (cpus + fewer).max(1).to_string()
                }
                _ => text.to_owned(),
            },
        };
        if !is_cluster && workers != "1" {
            self.note("exec_mode fork with several instances: they share their ports here");
        }
        wanted.options.insert("workers".into(), vec![workers]);
    }

    fn life(&mut self, wanted: &mut Wanted) {
        let mut set =
            |key: &str, value: String| drop(wanted.options.insert(key.into(), vec![value]));
        // A program that is not to be started again is a job as a rule, and may listen on nothing: PM2 waits for it no longer
        // than this, either.
        let is_job = self.is_not(&["autorestart"]) && !self.is(&["wait_ready"]);
        if is_job {
            let limit = self.text(&["listen_timeout"]).unwrap_or_else(|| "3000".to_owned());
            set("ready", format!("listening-or={}", in_ms(&limit)));
        }
        if self.is(&["wait_ready"]) {
            set("ready", "message".into());
        }
        if self.is(&["shutdown_with_message"]) {
            set("stop_by", "message".into());
        }
        for (theirs, ours) in [("listen_timeout", "ready_timeout"), ("kill_timeout", "grace")] {
            let time = self.text(&[theirs]).filter(|_| !(is_job && theirs == "listen_timeout"));
            if let Some(time) = time {
                set(ours, in_ms(&time));
            }
        }
        if let Some(size) = self.text(&["max_memory_restart"]) {
            set("max_memory", size);
        }
        if self.text(&["log_type"]).as_deref() == Some("json") {
            set("log_format", "json".into());
        }
        if self.is(&["disable_logs"]) {
            set("output", "none".into());
        }
        if self.is_not(&["autostart"]) {
            wanted.autostart = false;
        }
        self.restarts(wanted);
        self.ends(wanted);
    }

    /// Whether, and how soon, another worker follows.
    fn restarts(&mut self, wanted: &mut Wanted) {
        self.limit(wanted);
        // As PM2 has it, the second of the two counts more.
        let delay = match self.text(&["exp_backoff_restart_delay"]) {
            Some(first) => match crate::values::duration(&in_ms(&first)) {
                Ok(time) if time > LONGEST_BACKOFF => Some(format!("{0}..{0}", in_ms(&first))),
                _ => Some(format!("{}..{}s", in_ms(&first), LONGEST_BACKOFF.as_secs())),
            },
            None => self.text(&["restart_delay"]).map(|delay| in_ms(&delay)),
        };
        if let Some(delay) = delay {
            wanted.options.insert("restart_delay".into(), vec![delay]);
        }
    }

    /// PM2 gives an app up after `max_restarts` workers in a row that ended before they were `min_uptime` old.
    fn limit(&mut self, wanted: &mut Wanted) {
        let (most, uptime) = (self.text(&["max_restarts"]), self.text(&["min_uptime"]));
        if most.is_none() && uptime.is_none() {
            return;
        }
        let most = most.as_deref().unwrap_or("16").trim().parse::<u64>();
        let uptime = crate::values::duration(&in_ms(uptime.as_deref().unwrap_or("1000")));
        let mut set =
            |key: &str, value: String| drop(wanted.options.insert(key.into(), vec![value]));
        match (most, uptime) {
            (Ok(_), Ok(uptime)) if uptime.is_zero() => set("restart_limit", NEVER.to_owned()),
            (Ok(most), Ok(uptime)) => {
                set("restart_limit", most.min(10_000).to_string());
                set("min_uptime", format!("{}ms", uptime.as_millis()));
            }
            _ => self
                .wrong("max_restarts is a number, min_uptime a number of ms or a text as \"5s\""),
        }
    }

    /// Ends of workers after which none follows.
    fn ends(&mut self, wanted: &mut Wanted) {
        let codes = match self.is_not(&["autorestart"]) {
            true => vec!["any".to_owned()],
            false => self.words(&["stop_exit_codes"]),
        };
        if !codes.is_empty() {
            wanted.options.insert("stop_exit_codes".into(), codes);
        }
    }

    fn renewal(&mut self, wanted: &mut Wanted) {
        if let Some(cron) = self.text(&["cron_restart", "cron"]).filter(|cron| cron != "0") {
            wanted.options.insert("reload_at".into(), vec![cron]);
        }
        let watched = match self.get(&["watch"]) {
            Some(Value::Bool(true)) => vec![".".to_owned()],
            Some(Value::Bool(false)) | None => Vec::new(),
            Some(Value::String(one)) => vec![one.clone()],
            _ => self.words(&["watch"]),
        };
        if !watched.is_empty() {
            wanted.options.insert("watch".into(), watched);
        }
        let ignored = match self.get(&["ignore_watch"]) {
            Some(Value::String(one)) => vec![one.clone()],
            _ => self.words(&["ignore_watch"]),
        };
        if !ignored.is_empty() {
            wanted.options.insert("watch_ignore".into(), ignored);
        }
        if let Some(delay) = self.text(&["watch_delay"]) {
            wanted.options.insert("watch_delay".into(), vec![in_ms(&delay)]);
        }
    }

    /// Another user is one that can be had, or a mistake. `can` is whether there is an option for it.
    fn user(&mut self, wanted: &mut Wanted, can: bool) {
        for key in ["uid", "user", "gid"] {
            let named = self.text(&[key]).is_some_and(|text| !text.trim().is_empty());
            if self.get(&[key]).is_some() && !named {
                // Passed over, it would run as whoever starts it.
                self.wrong(format!("{key} names nobody; is the variable set that it comes from?"));
                return;
            }
        }
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        let user = std::env::var("USER").unwrap_or_default();
        let is_other = |asked: Option<String>, own: u32| {
            asked.filter(|asked| *asked != own.to_string() && *asked != user)
        };
        let other = is_other(self.text(&["uid", "user"]), uid.as_raw())
            .or_else(|| is_other(self.text(&["gid"]), gid.as_raw()));
        if let (true, Some(_)) = (can, &other) {
            let named = self.text(&["uid", "user"]).unwrap_or_else(|| uid.as_raw().to_string());
            let group = self.text(&["gid"]).map_or(String::new(), |group| format!(":{group}"));
            wanted.options.insert("user".into(), vec![format!("{named}{group}")]);
        } else if let Some(other) = other {
            self.wrong(format!(
                "it is to run as {other:?}: start it as that user; no user is changed by this file"
            ));
        }
    }

    /// Keys that have no effect, and keys that nobody knows.
    fn tell_of_others(&mut self) {
        let names: Vec<String> = self.app.keys().cloned().collect();
        for name in names {
            if name.starts_with("env_") || self.get(&[&name]).is_none() {
                continue;
            }
            let known = KEYS.iter().find(|(names, _)| names.contains(&name.as_str()));
            match known {
                Some((_, Ignored(why))) => self.note(format!("{name} is ignored: {why}")),
                Some(_) => {}
                None => {
                    let all = KEYS.iter().flat_map(|(names, _)| names.iter().copied());
                    let hint = match keys::nearest(&name, all) {
                        Some(near) => format!("; did you mean {near}?"),
                        None => String::new(),
                    };
                    self.note(format!("{name} is ignored: PM2 has no such key{hint}"));
                }
            }
        }
    }
}

fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        _ => None,
    }
}

/// A number is of milliseconds; a text may have its own unit.
fn in_ms(text: &str) -> String {
    let text = text.trim();
    match !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => format!("{text}ms"),
        false => text.to_owned(),
    }
}

/// Cuts a text at blanks; quotes keep a word together.
fn split(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in text.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn one(app: Value) -> (Wanted, Vec<String>) {
        let (mut apps, faults) =
            read(Path::new("/srv/x/ecosystem.config.js"), &json!({"apps": [app]}), None);
        (apps.remove(0), faults.iter().map(Fault::told).collect())
    }

    fn options(app: Value) -> Vec<String> {
        let (app, faults) = one(app);
        assert_eq!(faults, Vec::<String>::new());
        let plain = app.options.iter().map(|(key, values)| format!("{key}={}", values.join(",")));
        plain.collect()
    }

    #[test]
    fn every_key_of_pm2_is_in_the_table_once() {
        // schema.json of PM2 7.0.4, and the names that stand in its "alias" fields.
        let all = "script exec name name_prefix filter_env namespace install_url cwd args exec_interpreter interpreter
            node_args interpreterArgs interpreter_args out_file out output out_log error_file error err err_file err_log
            log_file log disable_logs log_type log_date_format time env env_* max_memory_restart pid_file pid restart_delay
            exp_backoff_restart_delay source_map_support disable_source_map_support wait_ready instances kill_timeout
            shutdown_with_message listen_timeout cron_restart cron merge_logs combine_logs vizion autostart autorestart
            stop_exit_codes watch_delay watch ignore_watch watch_options min_uptime max_restarts execute_command exec_mode
            force append_env_to_name post_update trace disable_trace v8 event_loop_inspector deep_monitoring increment_var
            instance_var pmx automation treekill port username uid user gid windowsHide kill_retry_time write io";
        let known: Vec<&str> = KEYS.iter().flat_map(|(names, _)| names.iter().copied()).collect();
        for name in all.split_whitespace() {
            let times = known.iter().filter(|known| **known == name).count();
            assert_eq!(times, 1, "{name}");
        }
        assert_eq!(known.len(), all.split_whitespace().count());
        let keys = keys::all();
        for (names, fate) in KEYS {
            if let Mapped(ours) = fate {
                let own = keys::OWN_KEYS.iter().any(|(own, _)| own == ours);
                assert!(own || keys.iter().any(|key| key.name == *ours), "{names:?} {ours}");
            }
        }
    }

    #[test]
    fn the_document_has_the_same_table() {
        let document = include_str!("../../../../docs/config.md");
        for (names, fate) in KEYS {
            let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
            let what = match fate {
                Honoured => "honoured".to_owned(),
                Mapped(ours) => format!("`{ours}`"),
                Ignored(why) => format!("ignored: {why}"),
            };
            let row = format!("| {} | {what}", names.join(", "));
            assert!(document.contains(&row), "docs/config.md lacks: {row}");
        }
    }

    #[test]
    fn instances_and_modes_are_numbers_of_workers() {
        for (app, workers) in [
            (json!({"script": "a.js"}), "1"),
            (json!({"script": "a.js", "exec_mode": "fork"}), "1"),
            (json!({"script": "a.js", "exec_mode": "cluster"}), "1"),
            (json!({"script": "a.js", "instances": 3}), "3"),
            (json!({"script": "a.js", "instances": "max"}), "max"),
            (json!({"script": "a.js", "instances": 0}), "max"),
        ] {
            assert_eq!(options(app), [format!("workers={workers}")]);
        }
        let fewer: u32 = one(json!({"script": "a.js", "instances": -1})).0.options["workers"][0]
            .parse()
            .expect("a number");
        assert_eq!(fewer, usable_cpus().workers.saturating_sub(1).max(1));
        let (app, told) = one(json!({"script": "a.js", "instances": 2, "exec_mode": "fork"}));
        assert_eq!(app.options["workers"], ["2"]);
        assert!(told[0].contains("share their ports"), "{told:?}");
    }

    #[test]
    fn conventions_become_options() {
        let app = json!({
            "script": "a.js", "wait_ready": true, "listen_timeout": 8000, "kill_timeout": 1600,
            "shutdown_with_message": true, "max_memory_restart": "150M", "max_restarts": 10, "min_uptime": "5s",
            "cron_restart": "0 3 * * *", "watch": true, "ignore_watch": ["tmp"], "watch_delay": 500,
            "instance_var": "INSTANCE_ID", "increment_var": "PORT", "log_type": "json",
            "restart_delay": 4000, "stop_exit_codes": [0, "3"],
        });
        assert_eq!(
            options(app),
            [
                "grace=1600ms",
                "increment_var=PORT",
                "instance_var=INSTANCE_ID",
                "log_format=json",
                "max_memory=150M",
                "min_uptime=5000ms",
                "ready=message",
                "ready_timeout=8000ms",
                "reload_at=0 3 * * *",
                "restart_delay=4000ms",
                "restart_limit=10",
                "stop_by=message",
                "stop_exit_codes=0,3",
                "watch=.",
                "watch_delay=500ms",
                "watch_ignore=tmp",
                "workers=1",
            ]
        );
    }

    #[test]
    fn keys_of_restarts_mean_what_they_mean_there() {
        let of = |key: &str, value: Value| {
            let app = json!({"script": "a.js", key: value});
            let all = options(app);
            all.into_iter().filter(|option| option != "workers=1").collect::<Vec<_>>().join(" ")
        };
        assert_eq!(of("stop_exit_codes", json!(7)), "stop_exit_codes=7");
        assert_eq!(
            of("autorestart", json!(false)),
            "ready=listening-or=3000ms stop_exit_codes=any"
        );
        assert_eq!(of("autorestart", json!("false")), of("autorestart", json!(false)));
        assert_eq!(of("autorestart", json!(true)), "");
        assert_eq!(of("exp_backoff_restart_delay", json!(100)), "restart_delay=100ms..15s");
        assert_eq!(of("exp_backoff_restart_delay", json!(20000)), "restart_delay=20000ms..20000ms");
        assert_eq!(of("max_restarts", json!(3)), "min_uptime=1000ms restart_limit=3");
        assert_eq!(of("min_uptime", json!("10s")), "min_uptime=10000ms restart_limit=16");
        assert_eq!(of("min_uptime", json!(0)), "restart_limit=10000/1ms");
        let (_, told) = one(json!({"script": "a.js", "stop_exit_codes": [0, 256]}));
        assert!(told[0].contains("stop_exit_codes: give exit codes from 0 to 255"), "{told:?}");
    }

    #[test]
    fn interpreters_flags_and_arguments_become_a_command() {
        let command = |app| {
            let app = one(app).0;
            let runtime = app.options.get("runtime").map(|values| values.join(" "));
            (std::iter::once(app.program).chain(app.args).collect::<Vec<_>>().join(" "), runtime)
        };
        for (app, line, runtime) in [
            (json!({"script": "a.js", "args": "--x 'y z'"}), "a.js --x y z", None),
            (json!({"script": "a.js", "node_args": "--inspect"}), "node --inspect a.js", None),
            (json!({"script": "a.ts", "interpreter": "bun"}), "a.ts", Some("bun")),
            (json!({"script": "a.py", "interpreter": "python3"}), "python3 a.py", None),
            (json!({"script": "./a", "interpreter": "none"}), "./a", None),
            (
                json!({"script": "a.js", "source_map_support": true}),
                "node --enable-source-maps a.js",
                None,
            ),
        ] {
            assert_eq!(
                command(app.clone()),
                (line.to_owned(), runtime.map(str::to_owned)),
                "{app}"
            );
        }
        assert_eq!(split(" a  'b c' d\"e\" '' "), ["a", "b c", "de", ""]);
    }

    #[test]
    fn the_environment_of_a_profile_lies_on_top() {
        let app = json!({"apps": [{
            "script": "a.js", "port": 80, "env": {"A": 1, "B": true}, "env_production": {"A": "2"},
        }]});
        let path = Path::new("/srv/ecosystem.config.js");
        let env = |profile| {
            let (apps, _) = read(path, &app, profile);
            apps[0].env.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>()
        };
        assert_eq!(env(None), ["A=1", "B=true", "PORT=80"]);
        assert_eq!(env(Some("production")), ["A=2", "B=true", "PORT=80"]);
    }

    #[test]
    fn another_user_is_never_ignored_and_other_keys_are_named() {
        let (app, told) = one(json!({"script": "a.js", "uid": "nobody-at-all"}));
        let refused = told.iter().any(|line| line.contains("nobody-at-all"));
        assert!(refused || app.options["user"] == ["nobody-at-all"], "{told:?}");
        for app in
            [json!({"user": ""}), json!({"uid": " "}), json!({"gid": ""}), json!({"uid": true})]
        {
            let mut app = app;
            app["script"] = "a.js".into();
            let (app, told) = one(app);
            assert!(
                told[0].contains("names nobody") && !app.options.contains_key("user"),
                "{told:?}"
            );
        }
        let (app, told) = one(json!({"script": "a.js", "uid": null, "user": "nobody-at-all"}));
        assert!(app.options["user"] == ["nobody-at-all"], "null is as good as none: {told:?}");
        let (_, told) =
            one(json!({"script": "a.js", "pmx": false, "vizion": null, "exec_mod": "fork"}));
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told.iter().any(|line| line.contains("did you mean exec_mode")), "{told:?}");
        let (_, told) = one(json!({"script": "a.js", "max_memory_restart": "lots"}));
        assert!(told[0].contains("max_memory_restart: give a number of bytes"), "{told:?}");
    }

    #[test]
    fn what_is_no_ecosystem_is_told_and_harms_nobody() {
        for value in [json!(null), json!(3), json!([]), json!({"apps": 3}), json!({"apps": [1]})] {
            let (_, faults) = read(Path::new("/x"), &value, None);
            assert!(faults.iter().any(|fault| fault.fatal), "{value}");
        }
        for value in [json!({}), json!({"apps": []})] {
            let (_, faults) = read(Path::new("/x"), &value, None);
            assert!(faults.len() == 1 && faults[0].text.contains("exports no apps"), "{faults:?}");
        }
        let (_, faults) = read(Path::new("/x"), &json!({"apps": [{}]}), None);
        assert!(faults.len() == 1 && faults[0].text == "it has no script", "{faults:?}");
    }
}
