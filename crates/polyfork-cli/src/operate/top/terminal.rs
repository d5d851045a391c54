//! The terminal as `top` has it, and as it was before.
//!
//! Whatever ends the command, an answer, an error, a signal or a panic, the terminal is given back: the guard does it when it is
//! dropped, and a hook before a panic is told.
//!
//! The surprising rule: keys are read by a thread, because reading them cannot be waited for beside anything else. It
//! looks up ten times a second whether it is still wanted; nothing is lost when it is not.

use std::io::{self, Stdout};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::event::{self, Event};
use ratatui::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use ratatui::crossterm::{ExecutableCommand, execute};
use tokio::sync::mpsc;

/// Between two looks whether keys are still wanted.
const PAUSE: Duration = Duration::from_millis(100);
/// Keys that wait to be obeyed.
const KEYS: usize = 16;

/// Whether the terminal is ours now.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// A terminal in raw mode with a screen of its own.
pub(crate) struct Taken {
    /// What is drawn on.
    pub(crate) screen: Terminal<CrosstermBackend<Stdout>>,
}

impl Taken {
    /// Takes the terminal.
    ///
    /// # Errors
    /// When it cannot be had; it is as it was then.
    pub(crate) fn new() -> io::Result<Taken> {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            give_back();
            before(panic);
        }));
        enable_raw_mode()?;
        TAKEN.store(true, Ordering::SeqCst);
        let made = io::stdout()
            .execute(EnterAlternateScreen)
            .and_then(|_| Terminal::new(CrosstermBackend::new(io::stdout())));
        match made {
            Ok(screen) => Ok(Taken { screen }),
            Err(error) => {
                give_back();
                Err(error)
            }
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        give_back();
    }
}

/// Once, whoever is first.
fn give_back() {
    if TAKEN.swap(false, Ordering::SeqCst) {
        // Nobody is left to be told that the terminal is gone.
        let _ = execute!(io::stdout(), LeaveAlternateScreen, Show);
        let _ = disable_raw_mode();
    }
}

/// What the terminal says, from now on until the receiver is dropped.
pub(crate) fn events() -> mpsc::Receiver<io::Result<Event>> {
    let (sender, events) = mpsc::channel(KEYS);
    std::thread::spawn(move || {
        loop {
            let event = match event::poll(PAUSE) {
                Ok(false) if sender.is_closed() => return,
                Ok(false) => continue,
                Ok(true) => event::read(),
                Err(error) => Err(error),
            };
            let over = event.is_err();
            if sender.blocking_send(event).is_err() || over {
                return;
            }
        }
    });
    events
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::process::{Command, Stdio};

    use rustix::fs::{Mode, OFlags};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{LocalModes, tcgetattr};

    use super::*;

    /// Set in a process of the test below.
    const IN_A_TERMINAL: &str = "POLYFORK_TEST_PANICS_IN_A_TERMINAL";
    const TEST: &str =
        "operate::top::terminal::tests::a_panic_gives_the_terminal_back_before_it_is_told";

    /// In a process of its own, which has the terminal.
    fn panic_with_the_terminal() {
        // What is dropped gives it back as well, and is not what is tried here: in another thread, nothing is dropped.
        std::mem::forget(Taken::new().expect("a terminal"));
        let panics = std::thread::spawn(|| panic!("told on the screen before"));
        assert!(panics.join().is_err());
    }

    /// A terminal, and its other end.
    fn terminal() -> (File, OwnedFd) {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = openpt(flags).expect("a terminal");
        grantpt(&ours).expect("grantpt");
        unlockpt(&ours).expect("unlockpt");
        let path = ptsname(&ours, Vec::new()).expect("its name");
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let line = rustix::fs::open(&path, flags, Mode::empty()).expect("its line");
        (File::from(ours), line)
    }

    #[test]
    #[allow(clippy::disallowed_methods, reason = "a test starts itself as a shell would")]
    fn a_panic_gives_the_terminal_back_before_it_is_told() {
        if std::env::var_os(IN_A_TERMINAL).is_some() {
            return panic_with_the_terminal();
        }
        let (mut ours, line) = terminal();
        let copy = || Stdio::from(line.try_clone().expect("a copy"));
        // With this terminal as its own, whatever terminal the tests have.
        let mut itself = Command::new("setsid");
        itself.args(["--ctty", "--wait"]).arg(std::env::current_exe().expect("this program"));
        itself.args(["--exact", TEST, "--nocapture"]).env(IN_A_TERMINAL, "1");
        itself.env("TERM", "xterm-256color").stdin(copy()).stdout(copy()).stderr(copy());
        let mut running = itself.spawn().expect("setsid");
        // Read to the end, which comes when nobody has the line any more but we.
        let read = std::thread::spawn(move || {
            let (mut told, mut bytes) = (Vec::new(), [0; 4096]);
            while let Ok(read @ 1..) = ours.read(&mut bytes) {
                told.extend_from_slice(&bytes[..read]);
            }
            String::from_utf8_lossy(&told).into_owned()
        });
        let ended = running.wait().expect("its end");
        let modes = tcgetattr(&line).expect("modes").local_modes;
        drop((line, itself));
        let told = read.join().expect("a reader");
        assert!(ended.success(), "{told}");
        assert!(modes.contains(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG), "{told}");
        let at = |what: &str| told.find(what).unwrap_or_else(|| panic!("no {what:?}: {told:?}"));
        let (entered, left) = (at("\u{1b}[?1049h"), at("\u{1b}[?1049l"));
        let panic = at("told on the screen before");
        assert!(entered < left && at("\u{1b}[?25h") < panic && left < panic, "{told:?}");
    }
}
