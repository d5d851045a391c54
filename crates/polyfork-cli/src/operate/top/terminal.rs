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
