//! The mark by which an executable says that it speaks the native dialect.
//!
//! A program that uses the crate as a worker carries a small section in its ELF file. The primary
//! reads it before the first start, so that `--dialect auto` asks the program instead of guessing from
//! its name. What the dialect is belongs to `polyfork-wire`.
//!
//! The surprising rule: the section hangs on [`mark`] alone. A program that links the crate but never
//! calls `mark` (the `polyfork` command itself) does not carry it, because the linker drops what nothing
//! refers to. That is why it is not `#[used]`, and not of ELF type "note", which linkers always keep.
//!
//! The reader takes any file for foreign bytes: whatever is wrong with it, the answer is "no mark".
//!
//! Behaviour follows: elf(5), System V ABI chapter 4 (section header table).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The section's name.
pub const SECTION: &str = ".polyfork.note";
/// The version of the native protocol that [`mark`] announces.
pub const PROTOCOL_VERSION: u32 = 1;

/// What the section begins with; the version follows, little-endian.
const MAGIC: [u8; 16] = *b"polyfork native\n";
const MARK_BYTES: usize = MAGIC.len() + 4;
/// A sane executable has some dozens of sections; this bounds what a hostile one makes us read.
const MAX_SECTIONS: usize = 4096;
const MAX_NAMES_BYTES: u64 = 1 << 20;

const fn mark_bytes() -> [u8; MARK_BYTES] {
    let mut bytes = [0; MARK_BYTES];
    let mut index = 0;
    while index < MAGIC.len() {
        bytes[index] = MAGIC[index];
        index += 1;
    }
    let version = PROTOCOL_VERSION.to_le_bytes();
    let mut index = 0;
    while index < version.len() {
        bytes[MAGIC.len() + index] = version[index];
        index += 1;
    }
    bytes
}

// SAFETY: the section holds plain bytes and its name is known to no linker or loader.
#[unsafe(link_section = ".polyfork.note")]
static MARK: [u8; MARK_BYTES] = mark_bytes();

/// Marks the executable this is linked into. Call it on the way of every native worker.
///
/// Costs one read of a byte; what counts is that the call is in the program.
pub fn mark() {
    // SAFETY: reads an initialised static. Volatile, so that the reference to it survives optimisation.
    let _byte = unsafe { (&raw const MARK).cast::<u8>().read_volatile() };
}

/// The native protocol version that the executable at `path` announces; `None` for every other file:
/// scripts, programs without the mark, damaged or hostile files.
///
/// # Errors
///
/// Only when the file cannot be opened or read.
pub fn native_mark(path: &Path) -> io::Result<Option<u32>> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    read_mark(&file)
}

/// Positioned reads, so that tests can stand in for a file.
trait Bytes {
    /// Fills `buffer` from `offset`; `false` when the bytes end before.
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<bool>;
}

impl Bytes for File {
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
        // Offsets beyond i64::MAX are an error of pread(2) and no such file exists.
        if i64::try_from(offset).is_err() {
            return Ok(false);
        }
        match self.read_exact_at(buffer, offset) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Reads numbers of the file's own width and byte order.
#[derive(Clone, Copy)]
struct Layout {
    wide: bool,
    little: bool,
}

impl Layout {
    fn number<const N: usize>(self, bytes: &[u8], offset: usize) -> Option<u64> {
        let mut field = [0; 8];
        let found = bytes.get(offset..offset.checked_add(N)?)?;
        field[..N].copy_from_slice(found);
        if !self.little {
            field[..N].reverse();
        }
        Some(u64::from_le_bytes(field))
    }

    fn half(self, bytes: &[u8], offset: usize) -> Option<u64> {
        self.number::<2>(bytes, offset)
    }

    fn word(self, bytes: &[u8], offset: usize) -> Option<u64> {
        self.number::<4>(bytes, offset)
    }

    /// An address, offset or size: eight bytes in a 64-bit file, four in a 32-bit one.
    fn long(self, bytes: &[u8], wide_at: usize, narrow_at: usize) -> Option<u64> {
        if self.wide { self.number::<8>(bytes, wide_at) } else { self.word(bytes, narrow_at) }
    }
}

/// The fields of a section header that matter here.
struct Section {
    name: u64,
    offset: u64,
    size: u64,
}

fn section(layout: Layout, header: &[u8]) -> Option<Section> {
    Some(Section {
        name: layout.word(header, 0)?,
        offset: layout.long(header, 24, 16)?,
        size: layout.long(header, 32, 20)?,
    })
}

fn read_mark(file: &impl Bytes) -> io::Result<Option<u32>> {
    let mut start = [0; 64];
    if !file.read(&mut start[..52], 0)? || start[..4] != *b"\x7fELF" {
        return Ok(None);
    }
    let wide = start[4] == 2;
    if wide && !file.read(&mut start, 0)? {
        return Ok(None);
    }
    let layout = Layout { wide, little: start[5] == 1 };
    let Some((headers, names)) = headers(file, layout, &start)? else { return Ok(None) };
    for header in &headers {
        let name = usize::try_from(header.name).ok().and_then(|start| names.get(start..));
        let named = name.and_then(|rest| rest.strip_prefix(SECTION.as_bytes()));
        if named.is_some_and(|rest| rest.first() == Some(&0)) {
            return read_version(file, header);
        }
    }
    Ok(None)
}

/// All section headers and the table of their names.
fn headers(
    file: &impl Bytes,
    layout: Layout,
    start: &[u8],
) -> io::Result<Option<(Vec<Section>, Vec<u8>)>> {
    let width = if layout.wide { 64 } else { 40 };
    let at = |wide, narrow| if layout.wide { wide } else { narrow };
    let fields = (
        layout.long(start, 40, 32),
        layout.half(start, at(58, 46)),
        layout.half(start, at(60, 48)),
        layout.half(start, at(62, 50)),
    );
    let (Some(offset), Some(size), Some(count), Some(names)) = fields else { return Ok(None) };
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if size != width || count == 0 || count > MAX_SECTIONS {
        return Ok(None);
    }
    let mut bytes = vec![0; count * width as usize];
    if !file.read(&mut bytes, offset)? {
        return Ok(None);
    }
    let parsed = bytes.chunks_exact(width as usize).map(|header| section(layout, header));
    let Some(headers) = parsed.collect::<Option<Vec<_>>>() else { return Ok(None) };
    let Some(table) = usize::try_from(names).ok().and_then(|names| headers.get(names)) else {
        return Ok(None);
    };
    if table.size > MAX_NAMES_BYTES {
        return Ok(None);
    }
    let mut names = vec![0; table.size as usize];
    let complete = file.read(&mut names, table.offset)?;
    Ok(complete.then_some((headers, names)))
}

fn read_version(file: &impl Bytes, header: &Section) -> io::Result<Option<u32>> {
    let mut mark = [0; MARK_BYTES];
    if header.size < MARK_BYTES as u64 || !file.read(&mut mark, header.offset)? {
        return Ok(None);
    }
    let Some(version) = mark.strip_prefix(&MAGIC) else { return Ok(None) };
    Ok(version.try_into().ok().map(u32::from_le_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Bytes for Vec<u8> {
        fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let Some(end) = start.checked_add(buffer.len()) else { return Ok(false) };
            match self.get(start..end) {
                Some(found) => buffer.copy_from_slice(found),
                None => return Ok(false),
            }
            Ok(true)
        }
    }

    #[test]
    fn a_program_that_calls_mark_carries_it() {
        mark();
        let me = std::env::current_exe().unwrap();
        assert_eq!(native_mark(&me).unwrap(), Some(PROTOCOL_VERSION));
    }

    #[test]
    fn other_files_carry_none() {
        for path in ["/bin/sh", "/etc/passwd", "/dev/null", "/"] {
            assert_eq!(native_mark(Path::new(path)).unwrap(), None, "{path}");
        }
        assert!(native_mark(Path::new("/nonexistent")).is_err());
    }
}
