//! Words for errors: the kernel's text as our messages use it.

use std::io;

/// The text of `error` without "(os error 2)" and in lower case, so that it reads well after a colon.
pub(crate) fn text(error: &io::Error) -> String {
    let full = error.to_string();
    let text = full.split(" (os error").next().unwrap_or(&full);
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_lowercase().chain(letters).collect(),
        None => full,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_error_reads_as_a_fragment() {
        assert_eq!(text(&io::Error::from_raw_os_error(libc::ENOENT)), "no such file or directory");
        assert_eq!(text(&io::Error::other("odd thing")), "odd thing");
    }
}
