//! A command's end of a control socket.
//!
//! Every wait has a limit, so that an app that hangs is told as such and holds up nothing, least of all a list of others.
//!
//! The surprising rule: a socket whose queue is full answers a connection attempt with EAGAIN at once. That is tried again
//! until the time is over: the app may just be busy.

use std::io;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

use super::folder::App;
use super::protocol::{Raw, VERSION};

/// Longer than any answer: a status of 4,096 workers is some 2 MiB.
const LONGEST_ANSWER: u64 = 16 << 20;
/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(5);

/// A connection to an app.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: BufReader<UnixStream>,
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum NoAnswer {
    /// Nobody is there.
    Gone,
    /// Somebody is there and does not answer in time.
    Late,
    /// It said why not.
    Refused {
        /// The exit code that it means.
        exit_code: u8,
        /// For people.
        text: String,
    },
    /// Something else.
    Broken(String),
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// When nobody listens, or not in time.
    pub(crate) async fn open(app: &App, deadline: Instant) -> Result<Connection, NoAnswer> {
        let path = app.socket_path().map_err(|error| NoAnswer::Broken(error.to_string()))?;
        loop {
            match timeout_at(deadline, UnixStream::connect(&path)).await {
                Ok(Ok(stream)) => return Ok(Connection { stream: BufReader::new(stream) }),
                Err(_) => return Err(NoAnswer::Late),
                Ok(Err(error)) => match error.kind() {
                    io::ErrorKind::WouldBlock if Instant::now() < deadline => {
                        tokio::time::sleep(PAUSE).await;
                    }
                    io::ErrorKind::WouldBlock => return Err(NoAnswer::Late),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                        return Err(NoAnswer::Gone);
                    }
                    _ => return Err(NoAnswer::Broken(error.to_string())),
                },
            }
        }
    }

    /// Asks, and gives the answer's `result`. Without a deadline it waits as long as it takes.
    ///
    /// # Errors
    /// See [`NoAnswer`].
    pub(crate) async fn ask(
        &mut self,
        mut request: Raw,
        deadline: Option<Instant>,
    ) -> Result<Value, NoAnswer> {
        request.v = Some(VERSION);
        let mut line =
            serde_json::to_vec(&request).map_err(|error| NoAnswer::Broken(error.to_string()))?;
        line.push(b'\n');
        let asking = async {
            match self.stream.get_mut().write_all(&line).await {
                Ok(()) => self.line().await,
                // It may have said why it hung up.
                Err(_) => self.line().await,
            }
        };
        let line = match deadline {
            Some(deadline) => timeout_at(deadline, asking).await.map_err(|_| NoAnswer::Late)?,
            None => asking.await,
        };
        let line = line?.ok_or(NoAnswer::Gone)?;
        result(&line)
    }

    /// The next line; `None` at the end.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(crate) async fn line(&mut self) -> Result<Option<Vec<u8>>, NoAnswer> {
        let mut line = Vec::new();
        let mut limited = (&mut self.stream).take(LONGEST_ANSWER);
        match limited.read_until(b'\n', &mut line).await {
            Ok(0) => Ok(None),
            Ok(_) => Ok(Some(line)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) => Err(NoAnswer::Broken(error.to_string())),
        }
    }
}

fn result(line: &[u8]) -> Result<Value, NoAnswer> {
    let mut answer: Value = serde_json::from_slice(line)
        .map_err(|error| NoAnswer::Broken(format!("its answer makes no sense: {error}")))?;
    if answer["ok"] == true {
        return Ok(answer["result"].take());
    }
    let error = &answer["error"];
    let exit_code = error["exit_code"].as_u64().and_then(|code| u8::try_from(code).ok());
    let text = error["text"].as_str().unwrap_or("it gave no reason").to_owned();
    Err(NoAnswer::Refused { exit_code: exit_code.unwrap_or(1), text })
}
