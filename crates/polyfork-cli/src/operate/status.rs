//! `polyfork status NAME`: all that is known of an app, for people or as its primary gave it.

use serde_json::Value;

use super::list::time;
use super::table::{self, Cell};
use super::{ANSWER_TIME, ask, complain, fail, plain, targets, told};
use crate::args::operate::AppArgs;
use crate::exit::Code;
use crate::style::{Ink, Paint};
use crate::{out, values, words};

/// Runs the verb.
pub(crate) async fn run(args: AppArgs) -> Code {
    let json = args.form.json;
    let apps = match targets::find(&args.names) {
        Ok(apps) => apps,
        Err(verdict) => return fail(&verdict, json),
    };
    let several =
        apps.len() > 1 || args.names.iter().any(|name| crate::control::name::is_pattern(name));
    let mut code = Code::Stopped;
    let mut answers = Vec::new();
    for app in &apps {
        match ask(app, plain("status"), Some(ANSWER_TIME)).await {
            Ok(answer) => answers.push(answer),
            Err(error) => {
                let verdict = told(app, &error);
                if code == Code::Stopped {
                    code = verdict.code;
                }
                match json && !several {
                    true => return fail(&verdict, true),
                    false => complain(&verdict.text),
                }
            }
        }
    }
    match (json, several, answers.first()) {
        (true, false, Some(answer)) => out::json(answer),
        (true, true, _) => out::json(&answers),
        _ => {
            let drawn: Vec<String> = answers.iter().map(draw).collect();
            out::write(drawn.join("\n").as_bytes())
        }
    };
    code
}

fn draw(status: &Value) -> String {
    let paint = Paint::stdout();
    let text = |field: &str| words::harmless(status[field].as_str().unwrap_or("-"));
    let number = |field: &str| status[field].as_u64().unwrap_or(0);
    let ready =
        format!("{} of {} workers ready", number("workers_ready"), number("workers_wanted"));
    let mut drawn = format!(
        "{}  {}, {ready}, up {}, pid {}\n",
        paint.with(Ink::Bold, &text("name")),
        text("state").replace('_', " "),
        time(number("uptime_ms")),
        number("pid"),
    );
    let mut line = |what: &str, text: String| {
        drawn.push_str(&format!("  {} {text}\n", paint.with(Ink::Dim, &format!("{what:<9}"))));
    };
    line(
        "program",
        format!("{} ({}, dialect {})", text("program"), text("runtime"), text("dialect")),
    );
    for listener in status["listening"].as_array().into_iter().flatten() {
        let of = |field: &str| words::harmless(listener[field].as_str().unwrap_or("-"));
        let what =
            format!("{}: {} by {}; {}", of("address"), of("policy"), of("mechanism"), of("why"));
        line("listens", what);
    }
    let primary = &status["primary"];
    let memory = primary["resident_bytes"].as_u64().map_or("-".to_owned(), values::bytes);
    let cpu = primary["cpu_ms"].as_u64().map_or("-".to_owned(), time);
    line("primary", format!("{memory}, cpu {cpu}; {} restarts in all", number("restarts")));
    if let Some(logs) = status["logs"].as_str() {
        let lost = match status["log_lines_lost"].as_u64() {
            None | Some(0) => String::new(),
            Some(lost) => format!(" ({lost} lines could not be written)"),
        };
        line("logs", format!("{}{lost}", words::harmless(logs)));
    }
    if let Some(busy) = status["busy"].as_str() {
        line("busy", format!("{} is under way", words::with_article(busy)));
    }
    drawn.push('\n');
    let rows: Vec<Vec<Cell>> =
        status["workers"].as_array().into_iter().flatten().map(row).collect();
    let head = [
        "slot", "worker", "pid", "state", "gen", "restarts", "up", "cpu", "memory", "accepted",
        "queue", "lag", "last end",
    ];
    drawn.push_str(&table::draw(paint, &head, &rows));
    drawn
}

/// How late the event loop is; of one that is blocked, since when it has been silent.
fn lag(worker: &Value) -> Option<String> {
    match worker["blocked_ms"].as_u64() {
        Some(silent) => Some(format!("blocked {}", time(silent))),
        None => Some(format!("{:.1} ms", worker["lag_ms"].as_f64()?)),
    }
}

fn row(worker: &Value) -> Vec<Cell> {
    let number = |field: &str| worker[field].as_u64();
    let last = &worker["last_exit"];
    let last = last["text"]
        .as_str()
        .map(|text| format!("worker {} {text}", last["worker"].as_u64().unwrap_or(0)));
    vec![
        Cell::maybe(number("slot")),
        Cell::maybe(number("worker")),
        Cell::maybe(number("pid")),
        table::state(worker["state"].as_str().unwrap_or("-")),
        Cell::maybe(number("generation")),
        Cell::maybe(number("restarts")),
        Cell::maybe(number("uptime_ms").map(time)),
        Cell::maybe(number("cpu_ms").map(time)),
        Cell::maybe(number("resident_bytes").map(values::bytes)),
        Cell::maybe(number("accepted")),
        Cell::maybe(number("queue")),
        Cell::maybe(lag(worker)),
        Cell::maybe(last),
    ]
}
