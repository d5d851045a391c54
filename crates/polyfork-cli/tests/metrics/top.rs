//! `top` as a user has it: in a terminal, and without one.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use serde_json::Value;

use super::desk::{Desk, eventually};
use super::support::{Lines, PATIENCE, Running, command, get};

const ROWS: u16 = 24;
const COLUMNS: u16 = 110;

/// What stands on a screen: as much of a terminal as `top` uses.
struct Shown {
    cells: Vec<Vec<char>>,
    at: (usize, usize),
    /// Bytes of what is not complete yet.
    rest: Vec<u8>,
    other_screen: bool,
    cursor: bool,
}

impl Default for Shown {
    fn default() -> Shown {
        let cells = vec![vec![' '; usize::from(COLUMNS)]; usize::from(ROWS)];
        Shown { cells, at: (0, 0), rest: Vec::new(), other_screen: false, cursor: true }
    }
}

impl Shown {
    fn has(&self, text: &str) -> bool {
        self.text().contains(text)
    }

    fn text(&self) -> String {
        self.cells.iter().map(|row| row.iter().collect::<String>() + "\n").collect()
    }

    fn write(&mut self, bytes: &[u8]) {
        self.rest.extend(bytes);
        let valid = match std::str::from_utf8(&self.rest) {
            Ok(text) => text.len(),
            Err(error) => error.valid_up_to(),
        };
        let whole = String::from_utf8_lossy(&self.rest[..valid]).into_owned();
        let mut text = whole.as_str();
        while let Some(c) = text.chars().next() {
            if let Some(sequence) = text.strip_prefix("\u{1b}[") {
                let Some(end) = sequence.find(|c: char| c.is_ascii_alphabetic()) else { break };
                self.obey(&sequence[..end], sequence.as_bytes()[end]);
                text = &sequence[end + 1..];
                continue;
            }
            if text == "\u{1b}" {
                break;
            }
            match c {
                '\r' => self.at.1 = 0,
                '\n' => self.at.0 += 1,
                c => {
                    let (row, column) = self.at;
                    if let Some(cell) = self.cells.get_mut(row).and_then(|row| row.get_mut(column))
                    {
                        *cell = c;
                    }
                    self.at.1 += 1;
                }
            }
            text = &text[c.len_utf8()..];
        }
        let done = valid - text.len();
        self.rest.drain(..done);
    }

    fn obey(&mut self, arguments: &str, what: u8) {
        match (what, arguments) {
            (b'H', at) => {
                let mut numbers = at.split(';').map(|n| n.parse::<usize>().unwrap_or(1));
                let mut next = || numbers.next().unwrap_or(1) - 1;
                self.at = (next(), next());
            }
            (b'J', _) => self.cells.iter_mut().for_each(|row| row.fill(' ')),
            (b'h' | b'l', "?1049") => self.other_screen = what == b'h',
            (b'h' | b'l', "?25") => self.cursor = what == b'h',
            _ => {}
        }
    }
}

/// A terminal with `top` in it.
struct Session {
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    shown: Shown,
    line: OwnedFd,
    running: std::process::Child,
}

impl Session {
    fn start(desk: &Desk, args: &[&str]) -> Session {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC);
        let ours = ours.expect("a terminal");
        grantpt(&ours).expect("grantpt");
        unlockpt(&ours).expect("unlockpt");
        let path = ptsname(&ours, Vec::new()).expect("its name");
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let line = rustix::fs::open(&path, flags, Mode::empty()).expect("its line");
        let size = Winsize { ws_row: ROWS, ws_col: COLUMNS, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&line, size).expect("its size");
        let polyfork = desk.command(args);
        // With this terminal as its own, whatever terminal the tests have.
        let mut setsid = command("setsid");
        setsid.arg("--ctty").arg(polyfork.get_program()).args(polyfork.get_args());
        setsid.current_dir(desk.place.path()).env("TERM", "xterm-256color");
        for (key, value) in polyfork.get_envs() {
            match value {
                Some(value) => setsid.env(key, value),
                None => setsid.env_remove(key),
            };
        }
        let end = || Stdio::from(line.try_clone().expect("a copy"));
        let running = setsid.stdin(end()).stdout(end()).stderr(end()).spawn().expect("setsid");
        let keyboard = File::from(ours);
        let mut reader = keyboard.try_clone().expect("a copy");
        let (sender, screen) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = reader.read(&mut bytes) {
                if sender.send(bytes[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        Session { keyboard, screen, shown: Shown::default(), line, running }
    }

    /// Waits until this stands on the screen.
    fn shows(&mut self, text: &str) {
        let limit = Instant::now() + PATIENCE;
        while !self.shown.has(text) {
            let left = limit.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.shown.write(&bytes),
                Err(_) => panic!("{text:?} was not shown:\n{}", self.shown.text()),
            }
        }
    }

    fn types(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).expect("keys");
    }

    /// Waits for the end: exit code. The terminal must be as it was.
    fn ends(&mut self) -> Option<i32> {
        let limit = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.running.try_wait().expect("wait") {
                break status;
            }
            assert!(Instant::now() < limit, "top did not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        while let Ok(bytes) = self.screen.recv_timeout(Duration::from_millis(200)) {
            self.shown.write(&bytes);
        }
        assert!(!self.shown.other_screen && self.shown.cursor, "the screen was not given back");
        let modes = tcgetattr(&self.line).expect("modes").local_modes;
        assert!(modes.contains(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG));
        status.code()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Ended already, as a rule.
        let _gone = self.running.kill();
        let _collected = self.running.wait();
    }
}

#[test]
fn in_a_terminal_it_shows_obeys_and_gives_the_terminal_back() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    let mut top = Session::start(&desk, &["top", "--interval", "100ms"]);
    top.shows("server");
    top.shows("conn/s");
    top.shows("q quit");
    top.types("?");
    top.shows("reload: new workers take over");
    top.types(" +");
    top.shows("one worker more: 2 workers");
    assert_eq!(desk.status("server")["workers_ready"], 2);
    top.types("r");
    top.shows("reloaded: 2 workers replaced");
    top.types("S");
    top.shows("stop server?");
    top.types("n");
    top.types("\u{1b}[BR");
    top.shows("restarting slot 1");
    top.types("q");
    assert_eq!(top.ends(), Some(0));
    // Who asks for a restart and leaves has asked for it all the same.
    eventually("both workers", || desk.status("server"), |status| status["state"] == "ready");
}

#[test]
fn stopping_is_done_when_it_is_confirmed() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    let mut top = Session::start(&desk, &["top", "server"]);
    top.shows("q quit");
    top.types("S");
    top.shows("stop server?");
    top.types("y");
    eventually("its end", || desk.listed(), Vec::is_empty);
    top.types("q");
    assert_eq!(top.ends(), Some(0));
}

#[test]
fn a_signal_gives_the_terminal_back() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        let mut top = Session::start(&desk, &["top"]);
        top.shows("q quit");
        super::desk::signal(&super::desk::pidfd(u64::from(top.running.id())), signal);
        assert_eq!(top.ends(), Some(15));
    }
}

#[test]
fn without_a_terminal_it_is_a_table_or_json() {
    let mut desk = Desk::new();
    let app = desk.start(&["-w", "2", "server.js"]);
    get(Desk::address(&app), "/");
    let table = desk.did(&["top"]);
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("server  ready, 2/2 workers ready"), "{table}");
    assert!(lines[1].starts_with("slot  pid"), "{table}");
    assert_eq!(lines.len(), 4);
    assert!(!table.contains('\u{1b}'), "{table}");
    let json = desk.json(&["top", "--json", "server"]);
    assert_eq!(json["version"], 1);
    let workers = json["apps"][0]["workers"].as_array().expect("workers");
    assert_eq!(workers.len(), 2);
    assert!(workers[0]["cpu_percent"].is_number() && workers[0]["pid"].is_number());
    assert!(desk.refuses(&["top", "nobody"], 10).contains("nobody"));
}

#[test]
fn with_an_interval_it_goes_on_until_the_reader_has_enough_or_the_app_ends() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    let mut running = Running::start(desk.command(&["top", "--json", "--interval", "100ms"]));
    let mut lines = Lines::of(running.take_out());
    for _ in 0..3 {
        let look: Value = serde_json::from_str(&lines.next().expect("a look")).expect("JSON");
        assert_eq!(look["apps"][0]["name"], "server");
    }
    desk.did(&["stop", "server"]);
    running.end();
    assert!(desk.refuses(&["top"], 10).contains("no app runs"));
}
