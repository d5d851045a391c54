//! `polyfork events NAME`: what happens, line by line, until the app ends or the reader has enough.

use tokio::time::Instant;

use super::{ANSWER_TIME, fail, plain, targets, told};
use crate::args::operate::EventsArgs;
use crate::control::client::Connection;
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::out;

/// Runs the verb.
pub(crate) async fn run(args: EventsArgs) -> Code {
    let mut apps = match targets::find(&[args.name]) {
        Ok(apps) => apps,
        Err(verdict) => return fail(&verdict, args.json),
    };
    let (Some(app), true) = (apps.pop(), apps.is_empty()) else {
        let text = "events are those of one app; the pattern fits several".to_owned();
        return fail(&Verdict { code: Code::Usage, text }, args.json);
    };
    let deadline = Instant::now() + ANSWER_TIME;
    let opened = async {
        let mut connection = Connection::open(&app, deadline).await?;
        connection.ask(plain("events"), Some(deadline)).await?;
        Ok(connection)
    };
    let mut connection = match opened.await {
        Ok(connection) => connection,
        Err(error) => return fail(&told(&app, &error), args.json),
    };
    loop {
        match connection.line().await {
            Ok(Some(line)) if out::write(&line) => {}
            Ok(_) => return Code::Stopped,
            Err(error) => return fail(&told(&app, &error), args.json),
        }
    }
}
