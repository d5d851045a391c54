//! What workers write, kept and read back.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::desk::{Desk, eventually, read};
use super::support::{Lines, Running, get};

/// Writes numbered lines until there are as many as the request says.
const TALKER: &str = "
let n = 0;
const slot = process.env.NODE_APP_INSTANCE;
require('http').createServer((request, response) => {
  const many = Number(request.url.slice(1));
  const write = () => {
    let text = '';
    for (let i = 0; i < 500 && n < many; i++) text += 'slot ' + slot + ' line ' + n++ + ' ' + 'x'.repeat(60) + '\\n';
    process.stdout.write(text, () => n < many ? write() : response.end('' + n));
  };
  write();
}).listen(0, '127.0.0.1');
";

fn talker(desk: &mut Desk, options: &[&str]) -> impl Fn(u64) + use<> {
    desk.place.file("talk.js", TALKER);
    let app = desk.start(&[&["-w", "1"], options, &["talk.js"]].concat());
    let address = Desk::address(&app);
    move |many| assert_eq!(get(address, &format!("/{many}")), many.to_string())
}

fn files(desk: &Desk, app: &str) -> Vec<String> {
    let entries = fs::read_dir(desk.logs().join(app)).expect("logs").flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// The numbers of a talker's lines.
fn numbers(text: &str) -> Vec<u64> {
    let number = |line: &str| line.split(" line ").nth(1)?.split(' ').next()?.parse().ok();
    text.lines().filter_map(number).collect()
}

fn are(numbers: &[u64], range: std::ops::Range<u64>) {
    let (first, last) = (numbers.first(), numbers.last());
    let right = numbers.iter().copied().eq(range.clone());
    assert!(right, "{} lines from {first:?} to {last:?} instead of {range:?}", numbers.len());
}

fn content(log: &Path) -> String {
    fs::read_to_string(log).unwrap_or_default()
}

#[test]
fn nothing_is_lost_when_files_are_full_and_all_is_read_back_in_order() {
    let mut desk = Desk::new();
    let talk = talker(&mut desk, &["--log-size", "64KiB", "--log-keep", "1000"]);
    talk(20_000);
    let all = eventually(
        "all lines",
        || numbers(&desk.did(&["logs", "talk", "-n", "all", "--slot", "1"])),
        |numbers| numbers.last() == Some(&19_999),
    );
    are(&all, 0..20_000);
    eventually(
        "full files are compressed",
        || files(&desk, "talk"),
        |files| {
            let mut full = files.iter().filter(|file| file.starts_with("1.2"));
            full.clone().count() > 20 && full.all(|file| file.ends_with(".log.gz"))
        },
    );
    are(&numbers(&desk.did(&["logs", "talk", "-n", "all", "--slot", "1"])), 0..20_000);
    are(&numbers(&desk.did(&["logs", "talk", "-n", "3000", "--slot", "1"])), 17_000..20_000);
    assert_eq!(desk.status("talk")["log_lines_lost"], 0);
}

#[test]
fn only_so_many_full_files_are_kept() {
    let mut desk = Desk::new();
    let talk = talker(&mut desk, &["--log-size", "16KiB", "--log-keep", "3"]);
    talk(5000);
    desk.did(&["stop", "talk"]);
    let mut of_slot: Vec<String> =
        files(&desk, "talk").into_iter().filter(|file| file.starts_with("1.")).collect();
    // The thread that compresses ends with the primary, whatever it has in hand.
    of_slot.retain(|file| !file.ends_with(".part"));
    of_slot.dedup_by_key(|file| file.split(".log").next().unwrap_or_default().to_owned());
    assert!(of_slot.len() <= 4, "{of_slot:?}");
    let kept = numbers(&desk.did(&["logs", "talk", "-n", "all", "--slot", "1"]));
    are(&kept, *kept.first().unwrap()..5000);
}

#[test]
fn a_file_that_is_old_is_full() {
    let mut desk = Desk::new();
    let talk = talker(&mut desk, &["--log-age", "50ms", "--log-keep", "1000"]);
    let mut asked = 0;
    eventually(
        "full files",
        || {
            asked += 1;
            talk(asked);
            files(&desk, "talk").iter().filter(|file| file.starts_with("1.2")).count()
        },
        |full| *full >= 3,
    );
    desk.did(&["stop", "talk"]);
    are(&numbers(&desk.did(&["logs", "talk", "-n", "all"])), 0..asked);
}

#[test]
fn slots_are_merged_by_time_and_filtered() {
    let mut desk = Desk::new();
    desk.place.file(
        "turns.js",
        "require('http').createServer((request, response) => {
           console.log('seen ' + request.url); console.error('warned ' + request.url); response.end();
         }).listen(0, '127.0.0.1');",
    );
    let app = desk.start(&["-w", "2", "turns.js"]);
    for number in 0..20 {
        get(Desk::address(&app), &format!("/{number:02}"));
    }
    let seen = |args: &[&str]| -> Vec<String> {
        let text = desk.did(&[&["logs", "turns"], args].concat());
        text.lines().map(str::to_owned).collect()
    };
    let lines = eventually("all lines", || seen(&["--grep", "seen"]), |lines| lines.len() == 20);
    let stamps: Vec<&str> = lines.iter().map(|line| &line[..23]).collect();
    assert!(stamps.is_sorted(), "{lines:#?}");
    for slot in [1, 2] {
        let of_slot = format!(" {slot} | seen /");
        let numbers: Vec<&str> =
            lines.iter().filter_map(|line| line.split(&of_slot).nth(1)).collect();
        assert!(numbers.len() == 10 && numbers.is_sorted(), "{lines:#?}");
    }
    assert_eq!(seen(&["--grep", "seen", "--slot", "1"]).len(), 10);
    assert_eq!(seen(&["--grep", "warned", "-n", "5"]).len(), 5);
    assert_eq!(seen(&["--grep", "seen", "--since", "1h"]).len(), 20);
    assert_eq!(seen(&["--grep", "seen", "--since", "2100-01-01"]).len(), 0);
    assert_eq!(seen(&["-n", "0"]).len(), 0);
    let line = read(&seen(&["--grep", "warned /19", "--json"])[0]);
    assert_eq!((&line["stream"], &line["line"]), (&"err".into(), &"warned /19".into()));
    assert_eq!((&line["name"], &line["complete"]), (&"turns".into(), &true.into()));
    // After its end they are still there.
    desk.did(&["stop", "turns"]);
    assert_eq!(seen(&["--grep", "seen"]).len(), 20);
    assert_eq!(seen(&["--grep", "stopped: every worker finished"]).len(), 1);
}

#[test]
fn following_goes_on_through_full_files() {
    let mut desk = Desk::new();
    let talk = talker(&mut desk, &["--log-size", "32KiB", "--log-keep", "1000"]);
    talk(10);
    let mut follow = Running::start(desk.command(&["logs", "talk", "-f", "--slot", "1"]));
    let mut lines = Lines::of(follow.take_out());
    lines.wait_for("line 9 ");
    for many in [100, 2000, 2001, 5000] {
        talk(many);
        lines.wait_for(&format!("line {} ", many - 1));
    }
    are(&numbers(&lines.seen.join("\n")), 0..5000);
}

/// Writes without a pause.
const CHATTERS: &str = "
let number = 0;
require('http').createServer((request, response) => response.end()).listen(0, '127.0.0.1');
setInterval(() => { for (let i = 0; i < 200; i++) console.log('line ' + number++ + ' of many'); }, 1);
";

#[test]
fn following_begins_where_the_last_lines_end() {
    let mut desk = Desk::new();
    desk.place.file("chatters.js", CHATTERS);
    desk.start(&["-w", "1", "chatters.js"]);
    for _ in 0..3 {
        let follow = ["logs", "chatters", "-f", "--slot", "1", "-n", "5"];
        let mut follow = Running::start(desk.command(&follow));
        let mut lines = Lines::of(follow.take_out());
        let first = lines.wait_for("line ");
        let first = numbers(&first)[0];
        lines.wait_for(&format!("line {} ", first + 5000));
        are(&numbers(&lines.seen.join("\n")), first..first + 5001);
    }
}

#[test]
fn a_file_that_somebody_takes_away_is_made_anew() {
    let mut desk = Desk::new();
    let talk = talker(&mut desk, &[]);
    let log = desk.logs().join("talk/1.log");
    let until = |line: &str| eventually("lines", || content(&log), |text| text.contains(line));
    talk(10);
    until("line 9 ");
    fs::remove_file(&log).unwrap();
    talk(20);
    are(&numbers(&until("line 19 ")), 10..20);
    fs::rename(&log, desk.logs().join("talk/moved")).unwrap();
    talk(30);
    are(&numbers(&until("line 29 ")), 20..30);
    // Somebody truncates it, as logrotate's copytruncate does.
    fs::write(&log, "").unwrap();
    talk(40);
    are(&numbers(&until("line 39 ")), 30..40);
    assert_eq!(desk.status("talk")["log_lines_lost"], 0);
}

#[test]
fn a_folder_that_somebody_removes_is_made_anew_and_told_once() {
    let mut desk = Desk::new();
    let talk = talker(&mut desk, &[]);
    let folder = desk.logs().join("talk");
    let log = folder.join("1.log");
    let until = |line: &str| eventually("lines", || content(&log), |text| text.contains(line));
    talk(10);
    until("line 9 ");
    let mut following = Running::start(desk.command(&["logs", "-f", "--slot", "1", "talk"]));
    let mut followed = Lines::of(following.take_out());
    followed.wait_for("line 9 ");
    // With all that is above it.
    fs::remove_dir_all(desk.logs()).unwrap();
    talk(20);
    are(&numbers(&until("line 19 ")), 10..20);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&folder), mode(&log)), (0o700, 0o600));
    let told = || content(&folder.join("primary.log"));
    let told = eventually("a notice", told, |text| text.contains("was removed, and is made anew"));
    assert_eq!(told.matches("made anew").count(), 1, "{told}");
    assert_eq!(desk.status("talk")["log_lines_lost"], 0);
    followed.wait_for("line 19 ");
    let seen: Vec<u64> = numbers(&followed.seen.join("\n"));
    are(&seen, 0..20);
    // The next image writes to the new one, too.
    desk.did(&["upgrade", "talk"]);
    talk(30);
    are(&numbers(&until("line 29 ")), 10..30);
    desk.did(&["stop", "talk"]);
    assert!(numbers(&desk.did(&["logs", "talk", "-n", "all"])).contains(&29));
}

#[test]
fn a_link_in_the_place_of_a_removed_folder_is_not_followed() {
    let mut desk = Desk::new();
    let talk = talker(&mut desk, &[]);
    let folder = desk.logs().join("talk");
    talk(1);
    eventually("a line", || content(&folder.join("1.log")), |text| text.contains("line 0 "));
    let elsewhere = desk.place.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::remove_dir_all(&folder).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &folder).unwrap();
    talk(2);
    eventually("a loss", || desk.status("talk")["log_lines_lost"].clone(), |lost| *lost != 0);
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    // Once it is out of the way, lines are written again, with how many are missing and why.
    fs::remove_file(&folder).unwrap();
    let mut asked = 2;
    let told = eventually(
        "written again",
        || {
            asked += 1;
            talk(asked);
            content(&folder.join("1.log"))
        },
        |text| text.contains("missing here"),
    );
    assert!(told.contains("talk: "), "{told}");
}

#[test]
fn a_folder_that_cannot_be_written_is_told_at_the_start() {
    let desk = Desk::new();
    let path = desk.place.file("no-folder", "a file");
    let told = desk.refuses(&["start", "--log-dir", path.to_str().unwrap(), "server.js"], 14);
    assert!(told.contains("log folder") && told.contains("--log-dir names another"), "{told}");
    assert_eq!(desk.listed(), []);
}

#[test]
fn lines_are_written_as_json_where_that_is_asked_for() {
    let mut desk = Desk::new();
    desk.place.file(
        "bytes.js",
        "process.stdout.write(Buffer.from([0xff, 0x41, 0x0a])); console.log('plain');
         require('http').createServer().listen(0, '127.0.0.1');",
    );
    desk.start(&["-w", "1", "--log-format", "json", "bytes.js"]);
    let log = desk.logs().join("bytes/1.log");
    let text = eventually("lines", || content(&log), |text| text.contains("plain"));
    let lines: Vec<_> = text.lines().map(read).collect();
    assert_eq!(lines[0]["base64"], "/0E=");
    assert_eq!((&lines[1]["line"], &lines[1]["slot"]), (&"plain".into(), &1.into()));
    let shown = desk.did(&["logs", "bytes", "--slot", "1"]);
    assert!(shown.contains("plain") && shown.contains("\u{fffd}A"), "{shown:?}");
}

#[test]
fn several_apps_are_read_together() {
    let mut desk = Desk::new();
    for name in ["web-1", "web-2"] {
        desk.start(&["-w", "1", "--name", name, "server.js"]);
    }
    let text = desk.did(&["logs", "web-*", "--slot", "0", "-n", "all"]);
    let mut names: Vec<&str> = text.lines().filter_map(|line| line.split(' ').nth(1)).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names, ["web-1", "web-2"], "{text}");
}

/// Folders of two apps that wrote in turns, in two slots and with a full file. The seconds are the lines' numbers.
fn two_that_ended(desk: &Desk) {
    let line =
        |second: u32| format!("2026-11-23T06:56:{second:02}.000000Z 3 out number {second:02}\n");
    let file = |path: &str, seconds: &[u32]| {
        let path = desk.logs().join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, seconds.iter().copied().map(line).collect::<String>()).expect("written");
    };
    file("shop/1.20261123T065606000000Z.log", &[0, 4]);
    file("shop/1.log", &[8, 12]);
    file("shop/2.log", &[2, 6, 10]);
    file("soap/1.log", &[1, 3, 5]);
    file("soap/2.log", &[7, 9, 11, 13]);
}

/// The number of each line, and whose it is.
fn told(text: &str) -> Vec<(u32, String)> {
    let number = |line: &str| line.rsplit(' ').next()?.parse().ok();
    let app = |line: &str| line.split(' ').nth(1).map(str::to_owned);
    text.lines().filter_map(|line| number(line).zip(app(line))).collect()
}

#[test]
fn lines_of_several_apps_are_in_one_order() {
    let desk = Desk::new();
    two_that_ended(&desk);
    let whose = |number: u32| if number.is_multiple_of(2) { "shop" } else { "soap" }.to_owned();
    let right = |from: u32| (from..14).map(|number| (number, whose(number))).collect::<Vec<_>>();
    for names in [&["shop", "soap"][..], &["soap", "shop"], &["s*"]] {
        let seen = |args: &[&str]| told(&desk.did(&[&["logs"], names, args].concat()));
        assert_eq!(seen(&["-n", "all"]), right(0));
        assert_eq!(seen(&["-n", "5"]), right(9));
        assert_eq!(seen(&["-n", "all", "--since", "2026-11-23T06:56:04Z"]), right(4));
        assert_eq!(seen(&["-n", "2", "--grep", "number 0"]), right(8)[..2]);
        let slot = seen(&["-n", "all", "--slot", "1"]);
        let numbers: Vec<u32> = slot.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [0, 1, 3, 4, 5, 8, 12]);
    }
    let text = desk.did(&["logs", "s*", "--json", "-n", "3"]);
    let lines: Vec<_> = text.lines().map(read).collect();
    let names: Vec<_> = lines.iter().map(|line| line["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["soap", "shop", "soap"]);
    assert_eq!(lines[2]["line"], "number 13");
}

#[test]
fn following_several_apps_begins_in_order_and_goes_on_with_all() {
    let desk = Desk::new();
    two_that_ended(&desk);
    let mut follow = Running::start(desk.command(&["logs", "-f", "s*", "-n", "4"]));
    let mut lines = Lines::of(follow.take_out());
    lines.wait_for("number 13");
    let append = |path: &str, second: u32| {
        let mut file = fs::OpenOptions::new().append(true).open(desk.logs().join(path)).unwrap();
        writeln!(file, "2026-11-23T06:56:{second:02}.000000Z 3 out number {second:02}").unwrap();
    };
    for (path, second) in [("soap/2.log", 14), ("shop/1.log", 15), ("soap/1.log", 16)] {
        append(path, second);
        lines.wait_for(&format!("number {second:02}"));
    }
    let numbers: Vec<u32> =
        told(&lines.seen.join("\n")).into_iter().map(|(number, _)| number).collect();
    assert_eq!(numbers, (10..17).collect::<Vec<_>>());
}

/// What is before the cut of a damaged file, and everything else.
#[test]
fn a_file_that_cannot_be_read_keeps_nothing_else_from_being_shown() {
    let desk = Desk::new();
    two_that_ended(&desk);
    let shop = desk.logs().join("shop");
    let full = shop.join("1.20261123T065606000000Z.log");
    // Two members; the second is cut off.
    let mut packed = gzip(&fs::read(&full).unwrap());
    let second = gzip(b"2026-11-23T06:56:05.000000Z 3 out never seen\n");
    packed.extend_from_slice(&second[..second.len() / 2]);
    fs::write(full.with_extension("log.gz"), packed).unwrap();
    fs::remove_file(&full).unwrap();
    let secret = desk.place.file("secret", "2026-11-23T06:56:59.000000Z 3 out secret 59\n");
    std::os::unix::fs::symlink(&secret, shop.join("3.log")).unwrap();
    std::os::unix::fs::symlink(&secret, shop.join("1.20261123T065600000000Z.log.gz")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        shop.join("4.log"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    for (args, numbers) in [
        (&["logs", "shop", "-n", "all"][..], &[0, 2, 4, 6, 8, 10, 12][..]),
        (&["logs", "shop", "-n", "1"], &[12]),
        (&["logs", "s*", "-n", "2"], &[12, 13]),
    ] {
        let shown = desk.does(args);
        let seen: Vec<u32> = told(&shown.out).into_iter().map(|(number, _)| number).collect();
        assert_eq!((seen.as_slice(), shown.code), (numbers, Some(1)), "{args:?}: {shown:?}");
        assert!(!shown.out.contains("secret"), "{shown:?}");
        for (file, why) in [("3.log", "a link is in the way"), ("4.log", "no file is in the way")] {
            let path = shop.join(file).display().to_string();
            let line = shown.err.lines().find(|line| line.contains(&path)).unwrap_or_default();
            let parts = ["polyfork: shop: cannot read", why, "remove it"];
            assert!(parts.iter().all(|part| line.contains(part)), "{args:?}: {shown:?}");
        }
        assert_eq!(shown.err.contains(".log.gz: "), numbers.len() > 2, "{args:?}: {shown:?}");
    }
    let shown = desk.does(&["logs", "shop", "-n", "1", "--json"]);
    let lines: Vec<_> = shown.out.lines().map(read).collect();
    assert_eq!(lines[0]["line"], "number 12");
    assert!(lines[1..].iter().all(|line| line["error"]["exit_code"] == 1), "{shown:?}");
    // Who follows sees the rest as well.
    let mut follow = Running::start(desk.command(&["logs", "-f", "shop", "-n", "1"]));
    let mut lines = Lines::of(follow.take_out());
    lines.wait_for("number 12");
    let mut file = fs::OpenOptions::new().append(true).open(shop.join("2.log")).unwrap();
    file.write_all(b"2026-11-23T06:56:58.000000Z 3 out number 58\n").unwrap();
    lines.wait_for("number 58");
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    to.write_all(text).expect("packed");
    to.finish().expect("packed")
}
