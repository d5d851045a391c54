//! A program that links this crate, even this module, but does not call `mark` carries no mark.
//!
//! The other half is a unit test of `note`: that program calls it.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;

use polyfork_sys::note::native_mark;
use proptest::prelude::*;

fn me() -> Vec<u8> {
    std::fs::read(std::env::current_exe().unwrap()).unwrap()
}

#[test]
fn linking_alone_does_not_mark() {
    assert_eq!(native_mark(&std::env::current_exe().unwrap()).unwrap(), None);
}

/// A small 64-bit ELF file with one section of each kind that matters, marked.
fn marked() -> Vec<u8> {
    let names = b"\0.shstrtab\0.polyfork.note\0";
    let mark = b"polyfork native\n\x07\0\0\0";
    let headers_at = 64 + names.len() + mark.len();
    let mut file = vec![0; 64];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[40..48].copy_from_slice(&(headers_at as u64).to_le_bytes());
    file[58..60].copy_from_slice(&64u16.to_le_bytes());
    file[60..62].copy_from_slice(&3u16.to_le_bytes());
    file[62..64].copy_from_slice(&1u16.to_le_bytes());
    file.extend_from_slice(names);
    file.extend_from_slice(mark);
    let mut header = |name: u32, offset: usize, size: usize| {
        let mut header = [0; 64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[24..32].copy_from_slice(&(offset as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(size as u64).to_le_bytes());
        file.extend_from_slice(&header);
    };
    header(0, 0, 0);
    header(1, 64, names.len());
    header(11, 64 + names.len(), mark.len());
    file
}

fn read(bytes: &[u8]) -> Option<u32> {
    let file = rustix::fs::memfd_create("elf", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(file);
    file.write_all(bytes).unwrap();
    native_mark(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd()))).unwrap()
}

#[test]
fn the_version_is_read_from_a_marked_file() {
    assert_eq!(read(&marked()), Some(7));
}

#[test]
fn a_file_cut_anywhere_has_no_mark() {
    let whole = marked();
    for end in 0..whole.len() {
        assert_eq!(read(&whole[..end]), None, "cut at {end}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn damaged_files_are_read_without_harm(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12)
    ) {
        let mut file = marked();
        for (place, byte) in changes {
            let place = place.index(file.len());
            file[place] = byte;
        }
        let _any = read(&file);
    }

    #[test]
    fn garbage_behind_the_magic_is_read_without_harm(
        rest in proptest::collection::vec(any::<u8>(), 0..256)
    ) {
        let _any = read(&[b"\x7fELF", rest.as_slice()].concat());
    }
}

#[test]
fn a_whole_program_with_wild_headers_is_read_without_harm() {
    let mut file = me();
    for wild in [u64::MAX, u64::MAX - 63, i64::MAX as u64, 0, 1, file.len() as u64 - 1] {
        file[40..48].copy_from_slice(&wild.to_le_bytes());
        assert_eq!(read(&file), None);
    }
}

#[test]
fn what_cannot_be_read_is_an_error() {
    assert!(native_mark(Path::new("/nonexistent/program")).is_err());
}
