//! The `polyfork` command: every core behind one port, from any program.
//!
//! Parses, renders, never decides: what happens to workers is the business of the library it stands on. `args` is the
//! command line, `run` and `demo` are the verbs in the foreground, `advise` measures, `operate` has those for apps that run, `config` is files
//! that say what is to run, `control` is how they are reached, `logs` is what they wrote, `report` has the words, `sink` and `out` write them, `exit` has the codes.
//!
//! The surprising rule: this very executable is also the demo's worker; it then is started by its own primary.
#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use polyfork::child_process::run_entries;

use crate::args::{NotRun, Verb};
use crate::exit::Code;
use crate::ledger::Verdict;

mod advise;
mod args;
mod background;
mod clock;
mod config;
mod control;
mod demo;
mod doctor;
mod exit;
mod identity;
mod ledger;
mod logs;
mod manager;
mod metrics;
mod operate;
mod out;
mod pages;
mod report;
mod run;
mod service;
mod sink;
mod style;
mod upgrade;
mod values;
mod words;

fn main() -> ExitCode {
    // Does not return in a child that `advise` has forked.
    run_entries(&[&advise::ENTRY]);
    // The command line is that of the image before, and is not looked at.
    if let Some(left) = upgrade::left() {
        return run::go_on(left).into();
    }
    let code = match args::parse(std::env::args_os()) {
        Ok(cli) => match cli.verb {
            Verb::Run(args) => run::run(*args),
            Verb::Demo(args) => demo::run(args),
            Verb::Advise(args) => advise::run(args),
            Verb::Primary(_) => run::run_in_background(),
            Verb::UpgradeCheck => upgrade::trial::check(),
            Verb::Doctor(args) => doctor::run(args.json),
            Verb::Service(args) => service::run(args),
            Verb::Man(args) => pages::man(&args),
            Verb::Completions(args) => pages::completions(&args),
            Verb::Names => pages::names(),
            Verb::Check(args) => config::check::run(args),
            Verb::Init(args) => config::init::run(args),
            verb => operate::run(verb),
        },
        Err(NotRun::Asked(text)) => {
            out::write(text.as_bytes());
            Code::Stopped
        }
        Err(NotRun::Wrong(line)) => {
            let wrong = Verdict { code: Code::Usage, text: line };
            operate::fail(&wrong, args::wants_json(std::env::args_os()))
        }
    };
    out::code(code).into()
}

/// Writes what is said before or instead of running anything to standard error; the exit code tells it as well.
fn say(mut stream: impl Write, text: &str) {
    let _gone = stream.write_all(text.as_bytes()).and_then(|()| stream.flush());
}
