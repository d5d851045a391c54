//! Where things are, all relative to the root of the work tree.
//!
//! The root is taken from where this crate was built, not from the current directory, so that a
//! chore does the same from any folder.

use std::path::{Path, PathBuf};

/// The root of the work tree.
pub(crate) fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().expect("xtask/ is a folder of the root").to_path_buf()
}

/// Cargo's build folder.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Peers and tools that `setup` brings; git-ignored.
pub(crate) fn peers() -> PathBuf {
    root().join(".peers")
}

/// What `setup` found or brought: tool -> path and version, read by tests and benchmarks.
pub(crate) fn manifest() -> PathBuf {
    peers().join("manifest.json")
}
