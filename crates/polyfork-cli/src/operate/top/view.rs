//! Draws `top`: what fits is shown, what matters most first.
//!
//! Only draws. Columns have an order of importance and are left out from the least important on until the rest fits; a
//! terminal that is too low loses the sparkline, then the listeners, then the keys.
//!
//! The surprising rule: all text was made harmless when it was read, so nothing here can move the cursor.

use std::collections::VecDeque;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph, Sparkline};

use super::screen::Screen;
use super::state::{Balance, Row, Seen, Sort};
use crate::operate::list::time;
use crate::values;

/// Less is no place for a table.
const LEAST: (u16, u16) = (20, 4);
/// Heights from which on parts are shown.
const FOR_LISTENERS: u16 = 8;
const FOR_SPARKLINE: u16 = 14;
/// Cells of the balance meter.
const METER: usize = 20;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

const HELP: [(&str, &str); 11] = [
    ("r", "reload: new workers take over if all come up"),
    ("+  -", "one worker more, one less"),
    ("R", "restart the chosen slot's worker"),
    ("S", "stop the app; asks first"),
    ("s", "sort by the next column"),
    ("up down", "choose a slot"),
    ("tab", "the next app; shift-tab the one before"),
    ("?", "this help"),
    ("q", "leave; the app goes on"),
    ("balance", "how even the shares of ready slots were of late"),
    ("lag", "by how much a worker's event loop is late"),
];

/// A column: its head, its width, what is in it, and how important it is (0 most).
struct Column {
    head: &'static str,
    width: usize,
    rank: u8,
    sort: Option<Sort>,
    text: fn(&Row, &Seen) -> String,
}

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_owned())
}

const COLUMNS: [Column; 12] = [
    column("slot", 4, 0, Some(Sort::Slot), |row, _| row.worker.slot.to_string()),
    column("pid", 7, 6, None, |row, _| or_dash(row.worker.pid.map(|pid| pid.to_string()))),
    column("state", 8, 0, None, |row, _| row.worker.state.clone()),
    column("cpu %", 6, 1, Some(Sort::Cpu), |row, _| or_dash(row.cpu.map(per_cent))),
    column("memory", 8, 2, Some(Sort::Memory), |row, _| {
        or_dash(row.worker.bytes.map(values::bytes))
    }),
    column("conn/s", 7, 1, Some(Sort::Rate), |row, _| or_dash(row.rate.map(rate))),
    column("accepted", 9, 8, None, |row, _| or_dash(row.worker.accepted.map(|n| n.to_string()))),
    column("queue", 5, 3, Some(Sort::Queue), |row, _| {
        or_dash(row.worker.queue.map(|n| n.to_string()))
    }),
    column("lag", 8, 4, Some(Sort::Lag), |row, _| {
        or_dash(row.worker.lag_ms.map(|ms| format!("{ms} ms")))
    }),
    column("restarts", 8, 5, Some(Sort::Restarts), |row, _| row.worker.restarts.to_string()),
    column("up", 12, 7, None, |row, _| or_dash(row.worker.uptime_ms.map(time))),
    column("connections", 24, 9, None, |row, seen| {
        seen.rates.get(&row.worker.slot).map_or_else(String::new, |rates| spark(rates, 24))
    }),
];

const fn column(
    head: &'static str,
    width: usize,
    rank: u8,
    sort: Option<Sort>,
    text: fn(&Row, &Seen) -> String,
) -> Column {
    Column { head, width, rank, sort, text }
}

/// A part of a CPU.
pub(crate) fn per_cent(cpu: f64) -> String {
    if cpu >= 100.0 { format!("{cpu:.0}") } else { format!("{cpu:.1}") }
}

/// Connections a second.
pub(crate) fn rate(rate: f64) -> String {
    match rate {
        0.0 => "0".to_owned(),
        few if few < 10.0 => format!("{few:.1}"),
        more if more < 100_000.0 => format!("{more:.0}"),
        many => format!("{:.0}k", many / 1000.0),
    }
}

/// The last of a history as bars, the highest of it being a full one.
fn spark(history: &VecDeque<f64>, width: usize) -> String {
    let last = history.iter().skip(history.len().saturating_sub(width));
    let most = last.clone().fold(0.0f64, |most, value| most.max(*value));
    last.map(|value| {
        let share = if most > 0.0 { value / most } else { 0.0 };
        // From 0 to 7; what is between is cut.
        BARS[((share * 7.0).round() as usize).min(7)]
    })
    .collect()
}

/// The columns that fit.
fn fitting(width: usize) -> Vec<&'static Column> {
    static ALL: [Column; 12] = COLUMNS;
    let mut columns: Vec<&Column> = ALL.iter().collect();
    while columns.len() > 1
        && columns.iter().map(|column| column.width + 2).sum::<usize>() > width + 2
    {
        let least = columns.iter().enumerate().max_by_key(|(_, column)| column.rank);
        let Some((at, _)) = least else { break };
        columns.remove(at);
    }
    columns
}

/// Draws everything.
pub(crate) fn draw(frame: &mut Frame<'_>, screen: &Screen) {
    let area = frame.area();
    if area.width < LEAST.0 || area.height < LEAST.1 {
        let text = summary(&screen.seen);
        return frame.render_widget(Paragraph::new(text), area);
    }
    let (listeners, sparkline) = (area.height >= FOR_LISTENERS, area.height >= FOR_SPARKLINE);
    let parts = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(u16::from(listeners)),
        Constraint::Length(if sparkline { 3 } else { 0 }),
        Constraint::Length(u16::from(listeners)),
        Constraint::Min(2),
        Constraint::Length(1),
    ])
    .split(area);
    frame.render_widget(Paragraph::new(head(screen)), parts[0]);
    frame.render_widget(Paragraph::new(listens(&screen.seen)), parts[1]);
    total(frame, &screen.seen, parts[2]);
    frame.render_widget(Paragraph::new(meter(&screen.seen)), parts[3]);
    table(frame, screen, parts[4]);
    frame.render_widget(Paragraph::new(foot(screen)), parts[5]);
    if screen.help {
        help(frame, area);
    }
}

fn summary(seen: &Seen) -> String {
    let look = &seen.look;
    format!("{} {} {}/{}", look.name, look.state, look.ready, look.wanted)
}

fn dim() -> Style {
    Style::new().add_modifier(Modifier::DIM)
}

fn ink(state: &str) -> Style {
    match state {
        "ready" => Style::new().fg(Color::Green),
        "starting" | "online" | "draining" | "stopping" | "degraded" | "waiting" | "stopped" => {
            Style::new().fg(Color::Yellow)
        }
        _ => Style::new().fg(Color::Red),
    }
}

fn head(screen: &Screen) -> Line<'static> {
    let look = &screen.seen.look;
    let bold = Style::new().add_modifier(Modifier::BOLD);
    if look.name.is_empty() {
        return Line::styled(format!("{}: looking", screen.app), bold);
    }
    let which = match screen.apps.iter().position(|app| *app == screen.app) {
        Some(at) if screen.apps.len() > 1 => format!(" ({} of {})", at + 1, screen.apps.len()),
        _ => String::new(),
    };
    let busy = look.busy.as_ref().map_or(String::new(), |busy| format!(", {busy} under way"));
    let cpu = screen.seen.primary_cpu.map_or(String::new(), |cpu| format!(" {}%", per_cent(cpu)));
    let rest = format!(
        "  {}/{} workers, {} restarts, up {}, pid {}, primary {}{cpu}{busy}",
        look.ready,
        look.wanted,
        look.restarts,
        time(look.uptime_ms),
        look.pid,
        or_dash(look.primary_bytes.map(values::bytes)),
    );
    Line::from(vec![
        Span::styled(format!("{}{which} ", look.name), bold),
        Span::styled(look.state.replace('_', " "), ink(&look.state)),
        Span::raw(rest),
    ])
}

fn listens(seen: &Seen) -> Line<'static> {
    let look = &seen.look;
    let text = match look.listens.is_empty() {
        true => look.program.clone(),
        false => format!(
            "{} on {}; {} by {}",
            look.program,
            look.listens.join(", "),
            look.policy,
            look.mechanism
        ),
    };
    Line::styled(text, dim())
}

fn total(frame: &mut Frame<'_>, seen: &Seen, area: Rect) {
    if area.height == 0 {
        return;
    }
    let width = usize::from(area.width);
    let last = seen.total.iter().skip(seen.total.len().saturating_sub(width));
    // Tenths of a connection a second are told apart, more is not to be seen.
    let data: Vec<u64> = last.map(|rate| (rate * 10.0).round() as u64).collect();
    let text = match seen.total_rate() {
        Some(now) => format!("{} connections/s", rate(now)),
        None => "connections/s".to_owned(),
    };
    let [title, bars] = Layout::vertical([Constraint::Length(1), Constraint::Min(1)]).areas(area);
    frame.render_widget(Paragraph::new(text), title);
    frame.render_widget(Sparkline::default().data(data).style(Style::new().fg(Color::Cyan)), bars);
}

fn meter(seen: &Seen) -> Line<'static> {
    let Some(Balance { evenness, least, most }) = seen.balance() else {
        return Line::styled("balance  -", dim());
    };
    // Both are from 0 to 1.
    let full = ((evenness * METER as f64).round() as usize).min(METER);
    let colour = match evenness {
        even if even >= 0.95 => Color::Green,
        fair if fair >= 0.8 => Color::Yellow,
        _ => Color::Red,
    };
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    Line::from(vec![
        Span::raw("balance  "),
        Span::styled("█".repeat(full), Style::new().fg(colour)),
        Span::styled("░".repeat(METER - full), dim()),
        Span::raw(format!(
            "  {}, shares {} to {}",
            percent(evenness),
            percent(least),
            percent(most)
        )),
    ])
}

fn table(frame: &mut Frame<'_>, screen: &Screen, area: Rect) {
    let columns = fitting(usize::from(area.width));
    let rows = screen.rows();
    let cursor = screen.cursor(&rows);
    let room = usize::from(area.height.saturating_sub(1));
    // The chosen row stays in sight.
    let first = cursor.map_or(0, |at| (at + 1).saturating_sub(room));
    let mut lines = vec![heads(&columns, screen.sort)];
    for (number, row) in rows.iter().enumerate().skip(first).take(room) {
        let cells = columns.iter().map(|column| {
            let text = padded(&(column.text)(row, &screen.seen), column.width);
            match column.head {
                "state" => Span::styled(text, ink(&row.worker.state)),
                "connections" => Span::styled(text, Style::new().fg(Color::Cyan)),
                _ => Span::raw(text),
            }
        });
        let mut line = Line::from(cells.collect::<Vec<_>>());
        if cursor == Some(number) {
            line = line.style(Style::new().add_modifier(Modifier::REVERSED));
        }
        lines.push(line);
    }
    frame.render_widget(Paragraph::new(lines), area);
}

fn heads(columns: &[&Column], sort: Sort) -> Line<'static> {
    let cell = |column: &&Column| {
        let style = match column.sort == Some(sort) {
            true => Style::new().add_modifier(Modifier::BOLD | Modifier::UNDERLINED),
            false => dim(),
        };
        let gap = " ".repeat((column.width + 2).saturating_sub(column.head.len()));
        [Span::styled(column.head, style), Span::raw(gap)]
    };
    Line::from(columns.iter().flat_map(cell).collect::<Vec<_>>())
}

/// Cut or filled up to the width, with a gap behind it.
fn padded(text: &str, width: usize) -> String {
    let mut cell: String = text.chars().take(width).collect();
    let length = cell.chars().count();
    cell.extend(std::iter::repeat_n(' ', width - length + 2));
    cell
}

fn foot(screen: &Screen) -> Line<'static> {
    if screen.asks {
        let text = format!("stop {}? y stops it, any other key does not", screen.app);
        return Line::styled(text, Style::new().fg(Color::Yellow).add_modifier(Modifier::BOLD));
    }
    match &screen.said {
        Some(said) if said.bad => Line::styled(said.text.clone(), Style::new().fg(Color::Red)),
        Some(said) => Line::styled(said.text.clone(), Style::new().fg(Color::Green)),
        None => {
            let sort = screen.sort.word();
            Line::styled(
                format!(
                    "q quit  r reload  + - scale  R restart  S stop  s sort: {sort}  tab app  ? help"
                ),
                dim(),
            )
        }
    }
}

fn help(frame: &mut Frame<'_>, area: Rect) {
    let lines: Vec<Line<'_>> =
        HELP.iter().map(|(key, what)| Line::raw(format!("{key:<8} {what}"))).collect();
    let widest = lines.iter().map(Line::width).max().unwrap_or(0);
    let width = u16::try_from(widest + 2).unwrap_or(u16::MAX).min(area.width);
    let height = u16::try_from(lines.len() + 2).unwrap_or(u16::MAX).min(area.height);
    let place = Rect {
        x: area.x + (area.width - width) / 2,
        y: area.y + (area.height - height) / 2,
        width,
        height,
    };
    frame.render_widget(Clear, place);
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" keys ")), place);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use serde_json::{Value, json};

    use super::super::state::Look;
    use super::*;

    fn status(step: u64) -> Value {
        let worker = |slot: u64| {
            json!({"slot": slot, "worker": slot, "pid": 4000 + slot, "state": "ready", "restarts": slot - 1,
                   "uptime_ms": 65_000, "cpu_ms": 1000 + step * slot * 100, "resident_bytes": 50 << 20,
                   "accepted": step * 40, "queue": 3, "lag_ms": 7})
        };
        let workers: Vec<Value> = (1..=4).map(worker).collect();
        json!({"name": "shop", "program": "server.js", "pid": 77, "state": "ready", "workers_wanted": 4,
               "workers_ready": 4, "restarts": 6, "uptime_ms": 70_000, "policy": "round-robin",
               "mechanism": "kernel", "listeners": ["127.0.0.1:3000"],
               "primary": {"cpu_ms": step, "resident_bytes": 4 << 20}, "workers": workers})
    }

    fn screen() -> Screen {
        let mut screen =
            Screen { app: "shop".into(), apps: vec!["shop".into()], ..Screen::default() };
        for step in 0..5 {
            screen.seen.next(Look::read(&status(step)), Duration::from_secs(1));
        }
        screen
    }

    fn drawn(screen: &Screen, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, screen)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..height).map(|y| line(y).trim_end().to_owned()).collect()
    }

    #[test]
    fn everything_is_shown_where_there_is_room() {
        let lines = drawn(&screen(), 140, 24);
        let all = lines.join("\n");
        assert!(
            lines[0].starts_with("shop ready  4/4 workers, 6 restarts, up 1 min 10 s, pid 77"),
            "{all}"
        );
        assert_eq!(lines[1], "server.js on 127.0.0.1:3000; round-robin by kernel");
        assert_eq!(lines[2], "160 connections/s");
        assert!(
            lines[5].starts_with("balance  ████████████████████  100 %, shares 25 % to 25 %"),
            "{all}"
        );
        let heads: Vec<&str> = lines[6].split_whitespace().collect();
        let wanted =
            "slot pid state cpu % memory conn/s accepted queue lag restarts up connections";
        assert_eq!(heads.join(" "), wanted);
        let row: Vec<&str> = lines[8].split_whitespace().collect();
        assert_eq!(row.join(" "), "2 4002 ready 20.0 50 MiB 40 160 3 7 ms 1 1 min 5 s ████");
        assert!(lines[23].starts_with("q quit  r reload"), "{all}");
    }

    #[test]
    fn what_matters_less_is_left_out_where_there_is_no_room() {
        let lines = drawn(&screen(), 42, 10);
        let head = lines.iter().find(|line| line.starts_with("slot")).expect("a table");
        let heads: Vec<&str> = head.split_whitespace().collect();
        assert_eq!(heads, ["slot", "state", "cpu", "%", "memory", "conn/s"]);
        let lines = drawn(&screen(), 20, 4);
        assert!(lines[1].starts_with("slot  state"), "{lines:?}");
        assert_eq!(drawn(&screen(), 12, 2)[0], "shop ready 4");
        // No size is too small or too large for it.
        for (width, height) in [(1, 1), (3, 30), (19, 5), (20, 3), (400, 4), (400, 120)] {
            drawn(&screen(), width, height);
            let mut helped = screen();
            helped.help = true;
            drawn(&helped, width, height);
        }
    }

    #[test]
    fn nothing_in_a_name_moves_the_cursor() {
        let mut status = status(0);
        status["name"] = "\u{1b}[2J\u{1b}]0;x\u{7}".into();
        status["program"] = "a\nb\u{9b}31m".into();
        status["workers"][0]["state"] = "\u{1b}[31m".into();
        let mut screen = Screen { app: "x".into(), ..Screen::default() };
        screen.seen.next(Look::read(&status), Duration::from_secs(1));
        screen.say("\u{1b}[0m done", false);
        let all = drawn(&screen, 140, 24).join("");
        assert!(!all.chars().any(char::is_control), "{all:?}");
        assert!(all.contains("\\u{1b}[2J"), "{all}");
    }

    #[test]
    fn the_chosen_slot_stays_in_sight() {
        let mut screen = screen();
        screen.chosen = Some((4, Some(4)));
        let lines = drawn(&screen, 60, 5);
        assert!(lines.iter().any(|line| line.starts_with("4 ")), "{lines:#?}");
    }

    #[test]
    fn questions_and_answers_take_the_place_of_keys() {
        let mut screen = screen();
        screen.asks = true;
        assert!(drawn(&screen, 80, 10)[9].starts_with("stop shop? y stops it"));
        screen.asks = false;
        screen.say("reloaded: 4 workers\nmore", false);
        assert_eq!(drawn(&screen, 80, 10)[9], "reloaded: 4 workers");
    }

    #[test]
    fn bars_are_as_high_as_their_share_of_the_highest() {
        assert_eq!(spark(&VecDeque::from([0.0, 7.0, 14.0]), 3), "▁▅█");
        assert_eq!(spark(&VecDeque::from([0.0, 0.0]), 5), "▁▁");
        assert_eq!(spark(&VecDeque::from([1.0, 2.0, 4.0]), 2), "▅█");
    }
}
