//! `cargo xtask bench soak`: what an operator does to a server under load, and what its clients lose by it.
//!
//! Closed-loop clients ask without a pause, by short or by kept-alive connections, while workers are reloaded or killed or the
//! primary is replaced. Every answer is checked in full. The same client asks PM2 and nginx in the same run.
//!
//! Surprising: nothing is forgiven. A kept-alive connection that a server closes just as the next request is written counts as
//! failed, though HTTP lets a client try again (RFC 9112, 9.3.1): a server that says `Connection: close` first loses nothing.
//!
//! Source: the project's faults 1, 14 and 26.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pico_args::Arguments;
use rustix::process::Signal;

use super::managed::{App, Built, Kind, WORKERS};
use crate::proc;
use crate::setup::manifest::Manifest;

/// A request that takes longer has hung.
const HANG: Duration = Duration::from_secs(10);
const CLIENTS: usize = 16;
/// What every server answers.
const BODY: &[u8] = b"hello from one of many\n";
/// Between two things that an operator does.
const BETWEEN: Duration = Duration::from_millis(100);
/// One kill each so often is 300 in a minute. Who cannot follow that is killed as fast as workers come up.
const PACE: Duration = Duration::from_millis(200);
/// Workers that were killed are back, and finished ones gone, after far less.
const SETTLE: Duration = Duration::from_secs(20);

/// Between two looks at who serves. A look is a command, which takes time that workers could have to come up.
const LOOK: Duration = Duration::from_millis(15);

/// Of failures in words.
const MOST_KINDS: usize = 5;

/// What is done to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deed {
    Reload,
    Kill,
    Upgrade,
}

/// How clients connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Load {
    Short,
    Kept,
}

/// What the clients saw.
#[derive(Debug, Default)]
struct Seen {
    good: AtomicU64,
    refused: AtomicU64,
    reset: AtomicU64,
    /// The end came before the whole answer.
    cut: AtomicU64,
    hung: AtomicU64,
    /// Another status, or another body.
    wrong: AtomicU64,
    slowest_us: AtomicU64,
    /// Failures in words, for people, with how often: the first few kinds.
    told: Mutex<BTreeMap<String, u64>>,
}

impl Seen {
    fn failed(&self) -> u64 {
        [&self.refused, &self.reset, &self.cut, &self.hung, &self.wrong]
            .map(|count| count.load(Ordering::Relaxed))
            .iter()
            .sum()
    }

    fn fail(&self, error: &io::Error) {
        let count = match error.kind() {
            io::ErrorKind::ConnectionRefused => &self.refused,
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => &self.reset,
            io::ErrorKind::UnexpectedEof => &self.cut,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => &self.hung,
            _ => &self.wrong,
        };
        count.fetch_add(1, Ordering::Relaxed);
        let mut told = self.told.lock().expect("nobody panics with it");
        let text = error.to_string();
        if told.len() < MOST_KINDS || told.contains_key(&text) {
            *told.entry(text).or_default() += 1;
        }
    }
}

/// One row of the result.
struct Row {
    title: String,
    deed: Deed,
    load: Load,
    done: u32,
    seen: Seen,
    seconds: f64,
    /// Descriptors of the primary at the end, less those at the beginning.
    descriptors: Option<i64>,
    ours: bool,
}

struct Settings {
    reloads: u32,
    kills: u32,
    upgrades: u32,
    requests: u64,
    only: Option<String>,
}

/// The command.
///
/// # Errors
/// A wrong option, a build that fails, an interrupt. Lost requests are told by the exit code.
pub(super) fn main(args: &mut Arguments, manifest: &Manifest) -> Result<ExitCode> {
    let settings = Settings {
        reloads: args.opt_value_from_str("--reloads")?.unwrap_or(20),
        kills: args.opt_value_from_str("--kills")?.unwrap_or(300),
        upgrades: args.opt_value_from_str("--upgrades")?.unwrap_or(6),
        requests: args.opt_value_from_str("--requests")?.unwrap_or(60_000),
        only: args.opt_value_from_str("--only")?,
    };
    crate::nothing_left(args)?;
    let built = Built::new()?;
    let mut rows = Vec::new();
    for kind in kinds(&built, manifest) {
        if settings.only.as_ref().is_some_and(|only| !kind.title.contains(only.as_str())) {
            continue;
        }
        for (deed, load) in plan(&kind) {
            proc::check_interrupted()?;
            if how_often(deed, &settings) == 0 {
                continue;
            }
            match soak(&kind, deed, load, &settings) {
                Ok(row) => {
                    print(&row);
                    rows.push(row);
                }
                Err(error) => {
                    println!("{:<26} {deed:?} {load:?} left out: {error:#}", kind.title);
                    ensure!(!kind.is_ours(), "{}: {error:#}", kind.title);
                }
            }
        }
    }
    ensure!(!rows.is_empty(), "nothing to do: --only takes a part of a title");
    let bad: Vec<&Row> = rows.iter().filter(|row| row.ours && row.is_bad()).collect();
    println!("\nruns of ours that lost what they promise to keep: {}", bad.len());
    Ok(if bad.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Row {
    /// Whether something was lost beyond what a killed worker was serving.
    fn is_bad(&self) -> bool {
        let most = match self.deed {
            Deed::Kill => u64::from(self.done) * CLIENTS as u64,
            Deed::Reload | Deed::Upgrade => 0,
        };
        let hung = self.seen.hung.load(Ordering::Relaxed);
        self.seen.failed() > most || hung > 0 || self.descriptors.is_some_and(|more| more > 0)
    }
}

/// All servers; one that cannot be had is told and left out.
fn kinds(built: &Built, manifest: &Manifest) -> Vec<Kind> {
    let mut all = Vec::new();
    for line in ["20", "26"] {
        for mechanism in ["kernel", "handoff"] {
            all.push(Kind::node(built, manifest, line, mechanism));
        }
    }
    all.extend([Ok(Kind::rust(built, "kernel")), Ok(Kind::rust(built, "handoff"))]);
    all.push(Kind::uvicorn(built, manifest));
    all.push(Kind::pm2(manifest, "26"));
    all.push(Kind::nginx(manifest));
    let told = |kind: Result<Kind>| {
        kind.inspect_err(|error| println!("a server is left out: {error:#}")).ok()
    };
    all.into_iter().filter_map(told).collect()
}

fn plan(kind: &Kind) -> Vec<(Deed, Load)> {
    let deeds: &[Deed] = if kind.is_ours() {
        &[Deed::Reload, Deed::Kill, Deed::Upgrade]
    } else {
        &[Deed::Reload, Deed::Kill]
    };
    deeds.iter().flat_map(|deed| [(*deed, Load::Short), (*deed, Load::Kept)]).collect()
}

fn how_often(deed: Deed, settings: &Settings) -> u32 {
    match deed {
        Deed::Reload => settings.reloads,
        Deed::Kill => settings.kills,
        Deed::Upgrade => settings.upgrades,
    }
}

fn soak(kind: &Kind, deed: Deed, load: Load, settings: &Settings) -> Result<Row> {
    let app = kind.start(match deed {
        Deed::Kill => kind.workers_to_kill,
        Deed::Reload | Deed::Upgrade => WORKERS,
    })?;
    let primary = app.primary()?;
    let before = steady_descriptors(&app, primary);
    let (seen, stop) = (Seen::default(), AtomicBool::new(false));
    let began = Instant::now();
    let done = thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| client(app.port(), load, &seen, &stop));
        }
        let done = operate(&app, primary, deed, settings, &seen);
        stop.store(true, Ordering::Relaxed);
        done
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let after = steady_descriptors(&app, primary);
    let descriptors = before.zip(after).map(|(before, after)| after - before);
    let title = kind.title.clone();
    Ok(Row { title, deed, load, done, seen, seconds, descriptors, ours: kind.is_ours() })
}

/// Does it as often as asked, and goes on until enough was requested.
fn operate(app: &App, primary: i32, deed: Deed, settings: &Settings, seen: &Seen) -> Result<u32> {
    let times = how_often(deed, settings);
    // At least this many under load, spread over all that is done.
    let each = settings.requests / u64::from(times.max(1));
    let began = Instant::now();
    for number in 0..times {
        proc::check_interrupted()?;
        let goal = each * u64::from(number + 1);
        match deed {
            Deed::Reload => app.reload()?,
            Deed::Upgrade => app.upgrade()?,
            Deed::Kill => {
                kill_one(app, primary, number)?;
                let due = began + PACE * (number + 1);
                thread::sleep(due.saturating_duration_since(Instant::now()));
                continue;
            }
        }
        let until = Instant::now() + 3 * HANG;
        loop {
            thread::sleep(BETWEEN);
            if seen.good.load(Ordering::Relaxed) >= goal || Instant::now() >= until {
                break;
            }
        }
    }
    Ok(times)
}

/// Kills one worker, when all are there, or half of them where several come up at once. One of ours is one that serves: to be
/// killed on the way up is a strike, and such a slot rests for longer each time.
fn kill_one(app: &App, primary: i32, number: u32) -> Result<()> {
    let until = Instant::now() + SETTLE;
    let all = || match app.is_ours() {
        true => app.ready_workers(),
        false => Ok(app.worker_pids(primary)),
    };
    let wanted = if app.workers() > WORKERS { app.workers() / 2 } else { app.workers() };
    let mut workers = all()?;
    while workers.len() < wanted as usize {
        ensure!(Instant::now() < until, "no new worker came after a kill");
        thread::sleep(LOOK);
        workers = all()?;
    }
    let victim = workers.get(number as usize % workers.len()).context("no worker to kill")?;
    proc::signal(*victim, Signal::KILL);
    Ok(())
}

/// How many descriptors the primary has once the number no longer falls.
fn steady_descriptors(app: &App, primary: i32) -> Option<i64> {
    if !app.is_ours() {
        return None;
    }
    let count = || fs::read_dir(format!("/proc/{primary}/fd")).ok().map(|all| all.count() as i64);
    let until = Instant::now() + SETTLE;
    let mut least = count()?;
    let mut same = 0;
    // Finished workers keep theirs for as long as they finish.
    while Instant::now() < until && same < 10 {
        thread::sleep(BETWEEN);
        let now = count()?;
        same = if now < least { 0 } else { same + 1 };
        least = least.min(now);
    }
    Some(least)
}

fn client(port: u16, load: Load, seen: &Seen, stop: &AtomicBool) {
    let mut kept: Option<BufReader<TcpStream>> = None;
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        match one(port, load, kept.take()) {
            Ok(again) => {
                seen.good.fetch_add(1, Ordering::Relaxed);
                kept = again;
            }
            Err(error) => seen.fail(&error),
        }
        let took = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        seen.slowest_us.fetch_max(took, Ordering::Relaxed);
    }
}

/// One request; the connection when it may be used again.
fn one(
    port: u16,
    load: Load,
    kept: Option<BufReader<TcpStream>>,
) -> io::Result<Option<BufReader<TcpStream>>> {
    let mut connection = match kept {
        Some(connection) => connection,
        None => {
            let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port).into();
            let socket = TcpStream::connect_timeout(&address, HANG)?;
            socket.set_nodelay(true)?;
            socket.set_read_timeout(Some(HANG))?;
            BufReader::new(socket)
        }
    };
    let how = if load == Load::Kept { "keep-alive" } else { "close" };
    let request = format!("GET / HTTP/1.1\r\nhost: localhost\r\nconnection: {how}\r\n\r\n");
    connection.get_mut().write_all(request.as_bytes())?;
    let closes = answer(&mut connection)?;
    Ok((load == Load::Kept && !closes).then_some(connection))
}

/// Reads one answer; whether the server closes the connection.
fn answer(connection: &mut BufReader<TcpStream>) -> io::Result<bool> {
    let mut line = String::new();
    let (mut closes, mut length, mut chunked) = (false, None, false);
    for number in 0.. {
        line.clear();
        whole_line(connection, &mut line)?;
        let text = line.trim_end().to_ascii_lowercase();
        match (number, text.split_once(':')) {
            (0, _) if !text.starts_with("http/1.1 200") => return Err(io::Error::other(text)),
            (_, Some(("connection", value))) => closes = value.trim() == "close",
            (_, Some(("content-length", value))) => length = value.trim().parse().ok(),
            (_, Some(("transfer-encoding", _))) => chunked = true,
            _ if text.is_empty() => break,
            _ => {}
        }
    }
    let body = match (length, chunked) {
        (Some(length), _) => exactly(connection, length)?,
        (None, true) => chunks(connection)?,
        (None, false) => {
            closes = true;
            let mut rest = Vec::new();
            connection.read_to_end(&mut rest)?;
            rest
        }
    };
    if body.is_empty() {
        return Err(io::Error::other("an empty body"));
    }
    // uvicorn's program answers something else, and all of it.
    if body.starts_with(b"hello") && body != BODY {
        return Err(io::Error::other("another body"));
    }
    Ok(closes)
}

/// An end in the middle of a line is an end before the whole answer, too.
fn whole_line(connection: &mut BufReader<TcpStream>, line: &mut String) -> io::Result<()> {
    connection.read_line(line)?;
    match line.ends_with('\n') {
        true => Ok(()),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn exactly(connection: &mut impl Read, length: usize) -> io::Result<Vec<u8>> {
    let mut body = vec![0; length.min(1 << 20)];
    connection.read_exact(&mut body)?;
    Ok(body)
}

fn chunks(connection: &mut BufReader<TcpStream>) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        whole_line(connection, &mut line)?;
        let length = usize::from_str_radix(line.trim(), 16).map_err(io::Error::other)?;
        body.extend(exactly(connection, length)?);
        exactly(connection, 2)?;
        if length == 0 {
            return Ok(body);
        }
    }
}

fn print(row: &Row) {
    let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let seen = &row.seen;
    let what = format!("{} {:?}", row.done, row.deed).to_lowercase();
    let load = format!("{:?}", row.load).to_lowercase();
    print!(
        "{:<26} {what:<12} {load:<5} {:>8} answered {:>6} failed in {:>5.1} s; slowest {:>7.1} ms",
        row.title,
        count(&seen.good),
        seen.failed(),
        row.seconds,
        count(&seen.slowest_us) as f64 / 1e3,
    );
    if let Some(more) = row.descriptors {
        print!("; descriptors {more:+}");
    }
    println!();
    if seen.failed() > 0 {
        let told = seen.told.lock().expect("nobody panics with it");
        let kinds: Vec<_> = told.iter().map(|(text, times)| format!("{times} x {text}")).collect();
        println!(
            "{:<26} refused {}, reset {}, cut {}, hung {}, wrong {}: {}",
            "",
            count(&seen.refused),
            count(&seen.reset),
            count(&seen.cut),
            count(&seen.hung),
            count(&seen.wrong),
            kinds.join("; ")
        );
    }
}
