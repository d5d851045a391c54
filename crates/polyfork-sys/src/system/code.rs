//! Giving back the memory of code that has run its course.
//!
//! A primary parses options, asks runtimes and starts workers once, and then sleeps; but every page of a program or
//! library that was ever executed, and up to fifteen around it, stays mapped and counts as resident. Here the process says
//! that it can do without. Which moment is right for that is the caller's to know.
//!
//! The surprising rule: only code that nobody can have changed is touched. A library whose code was relocated in place
//! (`DT_TEXTREL`) is left alone, for its pages are not the file's.
//!
//! Behaviour follows: madvise(2), dl_iterate_phdr(3), elf(5).

use std::ffi::{c_int, c_void};

// elf.h
const DT_NULL: usize = 0;
const DT_TEXTREL: usize = 22;
const DT_FLAGS: usize = 30;
const DF_TEXTREL: usize = 4;

/// An entry of a dynamic section; both fields are as wide as an address.
#[repr(C)]
#[derive(Clone, Copy)]
struct Dyn {
    tag: usize,
    value: usize,
}

/// Unmaps the pages of this process' code; those that are needed come back, one by one, from the page cache. Gives the
/// number of code segments that were given back.
///
/// Costs some tens of microseconds now, and about one for each page that is executed later. Breakpoints that a debugger has
/// set are lost.
pub fn give_back_code() -> usize {
    let mut given = 0usize;
    let data = (&raw mut given).cast::<c_void>();
    // SAFETY: the callback has the type that is asked for, does not unwind, and gets `data`, which outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(object), data) };
    given
}

/// Called for the program and each of its libraries, none of which can be unloaded meanwhile.
unsafe extern "C" fn object(
    info: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    data: *mut c_void,
) -> c_int {
    // SAFETY: dl_iterate_phdr passes a description that is valid during the call.
    let info = unsafe { &*info };
    if info.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: that many program headers begin there, for as long as the object is loaded.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    let base = info.dlpi_addr as usize;
    let mut dynamic = headers.iter().filter(|header| header.p_type == libc::PT_DYNAMIC);
    // Without a dynamic section (the kernel's own object has one, a static program may not) nothing was relocated by name.
    let Some(dynamic) = dynamic.next() else { return 0 };
    // SAFETY: the header says that the object has its dynamic section there, in memory, ending with a null entry.
    if unsafe { changed_in_place(base.wrapping_add(dynamic.p_vaddr as usize)) } {
        return 0;
    }
    for header in headers.iter().filter(|header| header.p_type == libc::PT_LOAD) {
        if header.p_flags & (libc::PF_R | libc::PF_W | libc::PF_X) != libc::PF_R | libc::PF_X {
            continue;
        }
        let page = rustix::param::page_size();
        let start = base.wrapping_add(header.p_vaddr as usize);
        // Whole pages inside the segment: the ones at its ends may be shared with what else is there.
        let first = start.next_multiple_of(page);
        let end = start.wrapping_add(header.p_memsz as usize) / page * page;
        // SAFETY: a segment of code, never writable and not relocated, so its pages are its file's.
        if end > first && unsafe { give_back(first, end - first) } {
            // SAFETY: `data` is the counter that `give_back_code` passed.
            unsafe { *data.cast::<usize>() += 1 };
        }
    }
    0
}

/// Whether relocation has written into the code of an object.
///
/// # Safety
///
/// `place` is the address of the dynamic section of a loaded object.
unsafe fn changed_in_place(place: usize) -> bool {
    let mut entry = std::ptr::with_exposed_provenance::<Dyn>(place);
    loop {
        // SAFETY: the caller vouches for the section, and its end has not been reached.
        let Dyn { tag, value } = unsafe { *entry };
        match tag {
            DT_NULL => return false,
            DT_TEXTREL => return true,
            DT_FLAGS if value & DF_TEXTREL != 0 => return true,
            _ => {}
        }
        // SAFETY: the section goes on behind an entry that is not its last.
        entry = unsafe { entry.add(1) };
    }
}

/// # Safety
///
/// The range is mapped from a file whose bytes it has.
unsafe fn give_back(start: usize, length: usize) -> bool {
    let place = std::ptr::with_exposed_provenance_mut(start);
    // Without this each page that comes back would bring its neighbours along.
    // SAFETY: advice on how a mapping will be used changes nothing in it.
    let alone = unsafe { libc::madvise(place, length, libc::MADV_RANDOM) };
    // SAFETY: the caller vouches that the next access maps the same bytes again.
    let dropped = unsafe { libc::madvise(place, length, libc::MADV_DONTNEED) };
    alone == 0 && dropped == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_goes_on_without_its_code() {
        for _ in 0..50 {
            assert!(give_back_code() >= 2, "the program and the C library");
            let others: Vec<_> =
                (0..4).map(|n| std::thread::spawn(move || format!("{n}").len())).collect();
            assert!(others.into_iter().all(|other| other.join().expect("no panic") == 1));
        }
    }
}
