//! What `top` shows besides figures, and what keys do: selection, sorting, help, questions.
//!
//! No I/O: keys go in, wishes come out. The surprising rule: only stopping asks back; all else can be taken back or changes
//! nothing for clients.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::state::{Row, Seen, Sort};

/// What the user wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Leave.
    Quit,
    /// A new generation.
    Reload,
    /// So many workers more.
    Scale(i32),
    /// The worker of a slot anew.
    RestartSlot(u32),
    /// Stop the app.
    Stop,
    /// The app so many places on.
    Switch(i32),
}

/// The state of the screen.
#[derive(Debug, Default)]
pub(crate) struct Screen {
    /// All apps that can be switched to.
    pub(crate) apps: Vec<String>,
    /// The one that is shown.
    pub(crate) app: String,
    pub(crate) seen: Seen,
    pub(crate) sort: Sort,
    /// The slot and worker under the cursor.
    pub(crate) chosen: Option<(u64, Option<u64>)>,
    pub(crate) help: bool,
    /// It was asked whether the app is really to be stopped.
    pub(crate) asks: bool,
    /// What came of the last wish, or why nothing is seen. Harmless.
    pub(crate) said: Option<Said>,
}

/// A line at the bottom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) text: String,
    pub(crate) bad: bool,
}

impl Screen {
    /// Rows in the order in which they are shown.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let mut rows = self.seen.rows.clone();
        self.sort.sort(&mut rows);
        rows
    }

    /// Where the cursor is, if it is on a row that is there.
    pub(crate) fn cursor(&self, rows: &[Row]) -> Option<usize> {
        let (slot, id) = self.chosen?;
        let exact = rows.iter().position(|row| (row.worker.slot, row.worker.id) == (slot, id));
        exact.or_else(|| rows.iter().position(|row| row.worker.slot == slot))
    }

    /// What a key does.
    pub(crate) fn key(&mut self, key: KeyEvent) -> Option<Wish> {
        if key.kind == KeyEventKind::Release {
            return None;
        }
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return matches!(key.code, KeyCode::Char('c' | 'd')).then_some(Wish::Quit);
        }
        if std::mem::take(&mut self.asks) {
            // Whatever is no yes is a no.
            return matches!(key.code, KeyCode::Char('y' | 'Y')).then_some(Wish::Stop);
        }
        if std::mem::take(&mut self.help) {
            return matches!(key.code, KeyCode::Char('q')).then_some(Wish::Quit);
        }
        self.said = None;
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Some(Wish::Quit),
            KeyCode::Char('r') => return Some(Wish::Reload),
            KeyCode::Char('+' | '=') => return Some(Wish::Scale(1)),
            KeyCode::Char('-') => return Some(Wish::Scale(-1)),
            KeyCode::Char('R') => return self.restart(),
            KeyCode::Char('S') => self.asks = true,
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('?' | 'h') => self.help = true,
            KeyCode::Tab | KeyCode::Right => return Some(Wish::Switch(1)),
            KeyCode::BackTab | KeyCode::Left => return Some(Wish::Switch(-1)),
            KeyCode::Down | KeyCode::Char('j') => self.go(1),
            KeyCode::Up | KeyCode::Char('k') => self.go(-1),
            KeyCode::PageDown => self.go(10),
            KeyCode::PageUp => self.go(-10),
            KeyCode::Home => self.go(isize::MIN / 2),
            KeyCode::End => self.go(isize::MAX / 2),
            _ => {}
        }
        None
    }

    fn restart(&mut self) -> Option<Wish> {
        let rows = self.rows();
        let slot = self.cursor(&rows).and_then(|at| u32::try_from(rows[at].worker.slot).ok());
        if slot.is_none() {
            self.say("choose a slot first, with the arrow keys", true);
        }
        slot.map(Wish::RestartSlot)
    }

    fn go(&mut self, by: isize) {
        let rows = self.rows();
        let Some(last) = rows.len().checked_sub(1) else { return };
        let to = match self.cursor(&rows) {
            Some(at) => at.saturating_add_signed(by).min(last),
            None if by == -1 => last,
            None if by == 1 => 0,
            None => 0usize.saturating_add_signed(by).min(last),
        };
        self.chosen = Some((rows[to].worker.slot, rows[to].worker.id));
    }

    /// Shows a line at the bottom.
    pub(crate) fn say(&mut self, text: &str, bad: bool) {
        let text = crate::words::harmless(text.lines().next().unwrap_or_default());
        self.said = Some(Said { text, bad });
    }

    /// Shows another app; what was seen belongs to the one before.
    pub(crate) fn switch(&mut self, by: i32) {
        let Some(at) = self.apps.iter().position(|app| *app == self.app) else {
            if let Some(first) = self.apps.first() {
                self.show(first.clone());
            }
            return;
        };
        let count = i64::try_from(self.apps.len()).unwrap_or(1);
        let to = (i64::try_from(at).unwrap_or(0) + i64::from(by)).rem_euclid(count);
        let to = usize::try_from(to).unwrap_or(0);
        if to != at {
            self.show(self.apps[to].clone());
        }
    }

    fn show(&mut self, app: String) {
        self.app = app;
        self.seen = Seen::default();
        self.chosen = None;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::super::state::Look;
    use super::*;

    fn screen() -> Screen {
        let mut screen =
            Screen { apps: vec!["a".into(), "b".into()], app: "a".into(), ..Screen::default() };
        let status = json!({"name": "a", "pid": 1, "workers": [
            {"slot": 1, "worker": 1, "state": "ready"}, {"slot": 2, "worker": 2, "state": "ready"}]});
        screen.seen.next(Look::read(&status), Duration::from_secs(1));
        screen
    }

    fn press(screen: &mut Screen, code: KeyCode) -> Option<Wish> {
        screen.key(KeyEvent::new(code, KeyModifiers::NONE))
    }

    fn types(screen: &mut Screen, c: char) -> Option<Wish> {
        press(screen, KeyCode::Char(c))
    }

    #[test]
    fn stopping_asks_back_and_only_yes_is_yes() {
        let mut screen = screen();
        assert_eq!(types(&mut screen, 'S'), None);
        assert!(screen.asks);
        assert_eq!(types(&mut screen, 'S'), None, "no yes");
        assert!(!screen.asks);
        assert_eq!(types(&mut screen, 'y'), None, "nothing was asked");
        types(&mut screen, 'S');
        assert_eq!(types(&mut screen, 'y'), Some(Wish::Stop));
    }

    #[test]
    fn keys_are_wishes() {
        let mut screen = screen();
        assert_eq!(types(&mut screen, 'r'), Some(Wish::Reload));
        assert_eq!(types(&mut screen, '+'), Some(Wish::Scale(1)));
        assert_eq!(types(&mut screen, '-'), Some(Wish::Scale(-1)));
        assert_eq!(types(&mut screen, 'q'), Some(Wish::Quit));
        assert_eq!(press(&mut screen, KeyCode::Tab), Some(Wish::Switch(1)));
        let ctrl_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(screen.key(ctrl_c), Some(Wish::Quit));
        assert_eq!(types(&mut screen, '?'), None);
        assert!(screen.help);
        assert_eq!(types(&mut screen, 'r'), None, "any key closes the help");
        assert!(!screen.help);
    }

    #[test]
    fn the_slot_under_the_cursor_is_restarted_and_none_without_one() {
        let mut screen = screen();
        assert_eq!(types(&mut screen, 'R'), None);
        assert!(screen.said.as_ref().is_some_and(|said| said.bad));
        press(&mut screen, KeyCode::Down);
        press(&mut screen, KeyCode::Down);
        press(&mut screen, KeyCode::Down);
        assert_eq!(types(&mut screen, 'R'), Some(Wish::RestartSlot(2)));
        press(&mut screen, KeyCode::Home);
        assert_eq!(types(&mut screen, 'R'), Some(Wish::RestartSlot(1)));
    }

    #[test]
    fn the_cursor_stays_with_its_slot_when_the_worker_is_replaced() {
        let mut screen = screen();
        press(&mut screen, KeyCode::End);
        let status = json!({"name": "a", "pid": 1, "workers": [{"slot": 2, "worker": 9}]});
        screen.seen.next(Look::read(&status), Duration::from_secs(1));
        assert_eq!(screen.cursor(&screen.rows()), Some(0));
    }

    #[test]
    fn apps_are_switched_round_and_round() {
        let mut screen = screen();
        screen.switch(-1);
        assert_eq!((screen.app.as_str(), screen.rows().len()), ("b", 0));
        screen.switch(1);
        assert_eq!(screen.app, "a");
        screen.apps.clear();
        screen.switch(1);
        assert_eq!(screen.app, "a");
    }
}
