//! The file of a new binary: opened once, and looked at before it is run.
//!
//! It belongs to root or to us, nobody else can write to it, it may be executed, and by its head it is a whole executable for
//! this machine. Whether it is any good shows in its trial.
//!
//! The surprising rule: a script is refused here and not run. What would be executed in the place of the primary is the
//! interpreter, which knows nothing of all this.
//!
//! Reference: elf(5).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};

use crate::words;

/// Of an ELF file of 64 bits.
const HEAD_BYTES: usize = 64;

/// Opens the file.
///
/// # Errors
/// Why it will not do, for people.
pub(crate) fn open(path: &Path) -> Result<OwnedFd, String> {
    let shown = words::harmless(&path.to_string_lossy());
    look(path).map_err(|text| format!("{shown}: {text}"))
}

fn look(path: &Path) -> Result<OwnedFd, String> {
    let told = |error: rustix::io::Errno| words::plain(&io::Error::from(error).to_string());
    let file = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let file = file.map_err(told)?;
    let stat = rustix::fs::fstat(&file).map_err(told)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err("not a file".to_owned());
    }
    let me = rustix::process::geteuid().as_raw();
    if stat.st_uid != 0 && stat.st_uid != me {
        return Err("it belongs to another user, who could change it".to_owned());
    }
    let ours = stat.st_gid == 0 || stat.st_gid == rustix::process::getegid().as_raw();
    if stat.st_mode & 0o002 != 0 || (stat.st_mode & 0o020 != 0 && !ours) {
        return Err("other users may write to it: `chmod go-w` it".to_owned());
    }
    if stat.st_mode & 0o111 == 0 {
        return Err("it may not be executed: `chmod +x` it".to_owned());
    }
    // One that may be executed and not read shows in its trial what it is.
    if let Ok(readable) = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())) {
        check_head(&readable, u64::try_from(stat.st_size).unwrap_or(0))?;
    }
    Ok(file)
}

fn check_head(file: &File, size: u64) -> Result<(), String> {
    let mut head = Vec::with_capacity(HEAD_BYTES);
    let read = file.take(HEAD_BYTES as u64).read_to_end(&mut head);
    read.map_err(|error| words::plain(&error.to_string()))?;
    if head.starts_with(b"#!") {
        return Err("it is a script, not an executable".to_owned());
    }
    let Some(head) = head.first_chunk::<HEAD_BYTES>().filter(|head| head.starts_with(b"\x7fELF"))
    else {
        return Err("it is no executable".to_owned());
    };
    // Class, byte order and machine are those of whatever runs here.
    let own = File::open("/proc/self/exe").and_then(|own| {
        let mut head = [0; HEAD_BYTES];
        own.read_exact_at(&mut head, 0).map(|()| head)
    });
    if own.is_ok_and(|own| own[4..6] != head[4..6] || own[18..20] != head[18..20]) {
        return Err("it is an executable for another machine".to_owned());
    }
    match whole_size(head) {
        Some(whole) if size < whole => {
            Err(format!("it is cut short: {size} bytes are there of {whole}"))
        }
        _ => Ok(()),
    }
}

/// Where the table of its sections ends, as a rule the end of the file; nothing for one that has none.
fn whole_size(head: &[u8; HEAD_BYTES]) -> Option<u64> {
    let number = |at: usize, bytes: usize| {
        let field = head.get(at..at + bytes)?;
        // Of this machine, so in its byte order; that of all 64-bit machines Linux is found on here.
        Some(field.iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte)))
    };
    let (offset, size, count) = (number(40, 8)?, number(58, 2)?, number(60, 2)?);
    if offset == 0 || head[5] != 1 {
        return None;
    }
    offset.checked_add(size.checked_mul(count)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn fault_27_what_cannot_be_executed_or_could_be_changed_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("binary");
        let why = |path: &Path| open(path).expect_err("refused");
        assert!(why(&file).contains("No such file"), "{}", why(&file));
        assert!(why(folder.path()).contains("not a file"));
        let whole = std::fs::read("/proc/self/exe").expect("this executable");
        std::fs::write(&file, &whole).expect("a file");
        let mode = |mode| {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).expect("chmod");
        };
        mode(0o644);
        assert!(why(&file).contains("may not be executed"));
        mode(0o757);
        assert!(why(&file).contains("other users may write"));
        mode(0o755);
        assert!(open(&file).is_ok());
        std::fs::write(&file, &whole[..whole.len() - 1]).expect("a file");
        assert!(why(&file).contains("cut short"), "{}", why(&file));
        for (content, part) in
            [(&b"#!/bin/sh\n"[..], "a script"), (b"text", "no executable"), (b"", "no executable")]
        {
            std::fs::write(&file, content).expect("a file");
            assert!(why(&file).contains(part), "{}", why(&file));
        }
        let mut other = whole;
        other[18] ^= 0xff;
        std::fs::write(&file, &other).expect("a file");
        assert!(why(&file).contains("another machine"));
    }
}
