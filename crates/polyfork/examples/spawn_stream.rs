//! Runs a shell script and shows what it writes while it runs, line by line, then how it ended.
//!
//! `cargo run -p polyfork --example spawn_stream`
#![allow(clippy::print_stdout, reason = "an example talks to its user")]

use polyfork::child_process::{Command, Event, Stdio};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

const SCRIPT: &str =
    "for n in 1 2 3; do echo \"line $n\"; sleep 0.2; done; echo 'a word of warning' >&2";

/// Shows lines as they come, until the last process that could write one has gone.
async fn show(name: &str, stream: impl AsyncRead + Unpin) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    while let Some(line) = lines.next_line().await? {
        println!("{name}: {line}");
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut command = Command::new("sh");
    command.arg("-c").arg(SCRIPT).stdin(Stdio::Ignore).stdout(Stdio::Pipe).stderr(Stdio::Pipe);
    // Ctrl-C in this terminal reaches the script as well; if we are killed, it ends too.
    command.parent_death_signal(polyfork::child_process::Signal::TERM);
    let mut child = command.spawn()?;
    println!("started as process {}", child.pid());

    let stdout = child.stdout.take().ok_or("no pipe")?;
    let stderr = child.stderr.take().ok_or("no pipe")?;
    let events = async {
        while let Some(event) = child.next_event().await {
            match event {
                Event::Exit(exit) => {
                    println!("exited: code {:?}, signal {:?}", exit.code, exit.signal)
                }
                Event::Close(_) => println!("closed: everything has been read"),
                _ => {}
            }
        }
        Ok(())
    };
    tokio::try_join!(show("out", stdout), show("err", stderr), events)?;
    Ok(())
}
