//! Runs a command with a time limit and says what became of it.
//!
//! `cargo run -p polyfork --example exec_timeout -- 2 sleep 10`
#![allow(clippy::print_stdout, reason = "an example talks to its user")]

use std::time::Duration;

use polyfork::child_process::{ExecErrorKind, Signal, exec_file};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let limit: f64 = args.next().map_or(Ok(1.0), |text| text.parse())?;
    let program = args.next().unwrap_or_else(|| "sleep".to_owned());
    let mut rest: Vec<String> = args.collect();
    if rest.is_empty() && program == "sleep" {
        rest.push("10".to_owned());
    }

    // No shell reads the arguments: they reach the program as they are.
    let run = exec_file(&program, &rest)
        .timeout(Duration::try_from_secs_f64(limit)?)
        .kill_signal(Signal::KILL)
        .max_buffer(64 * 1024);
    match run.await {
        Ok(output) => print!("in time:\n{}", output.stdout_lossy()),
        Err(error) => match error.kind() {
            ExecErrorKind::Timeout => {
                println!(
                    "not in {limit} s, so {:?} was sent; until then it wrote:",
                    error.signal()
                );
                print!("{}", String::from_utf8_lossy(error.stdout()));
            }
            ExecErrorKind::Failed => println!("{error}"),
            _ => return Err(error.into()),
        },
    }
    Ok(())
}
