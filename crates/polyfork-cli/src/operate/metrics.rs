//! `polyfork metrics NAME`: what its primary would serve to Prometheus, through the control socket.

use super::{ANSWER_TIME, ask, fail, plain, targets, told};
use crate::args::operate::MetricsArgs;
use crate::control::protocol::Raw;
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::out;

/// Runs the verb.
pub(crate) async fn run(args: MetricsArgs) -> Code {
    let json = args.json;
    let mut apps = match targets::find(&[args.name]) {
        Ok(apps) => apps,
        Err(verdict) => return fail(&verdict, json),
    };
    let (Some(app), true) = (apps.pop(), apps.is_empty()) else {
        let text = "metrics are those of one app; the pattern fits several".to_owned();
        return fail(&Verdict { code: Code::Usage, text }, json);
    };
    let request = Raw { json: Some(json), ..plain("metrics") };
    match ask(&app, request, Some(ANSWER_TIME)).await {
        Ok(answer) => {
            match answer.as_str() {
                Some(text) => out::write(text.as_bytes()),
                None => out::json(&answer),
            };
            Code::Stopped
        }
        Err(error) => fail(&told(&app, &error), json),
    }
}
