//! The one table of what `setup` brings, with exact versions.
//!
//! How a thing is installed stands in `npm`, `python` and `debian`. To move to a newer version,
//! change it here and run `cargo xtask setup`; the old one is replaced.
//!
//! Source: the packages' own release lists; the Node lines are those that polyfork promises.

/// A program or library from npm, installed alone into `.peers/npm-<name>/`.
pub(super) struct NpmPin {
    /// Name in the manifest.
    pub(super) name: &'static str,
    /// Package on npm.
    pub(super) package: &'static str,
    /// Exact version.
    pub(super) version: &'static str,
    /// What the manifest points at, below `node_modules/`.
    pub(super) entry: &'static str,
}

/// Packages of npm.
pub(super) const NPM: &[NpmPin] = &[
    node("node18", "18.20.8"),
    node("node20", "20.20.2"),
    node("node22", "22.23.3"),
    node("node24", "24.21.0"),
    node("node26", "26.10.0"),
    NpmPin { name: "bun", package: "bun", version: "1.4.5", entry: "bun/bin/bun.exe" },
    NpmPin { name: "deno", package: "deno", version: "2.9.6", entry: "deno/deno" },
    NpmPin { name: "pm2", package: "pm2", version: "7.0.4", entry: "pm2/bin/pm2" },
    NpmPin { name: "piscina", package: "piscina", version: "5.3.2", entry: "piscina" },
    NpmPin { name: "express", package: "express", version: "5.3.0", entry: "express" },
    NpmPin { name: "prom-client", package: "prom-client", version: "15.1.3", entry: "prom-client" },
];

/// The npm package `node` carries the official binary of each release.
const fn node(name: &'static str, version: &'static str) -> NpmPin {
    NpmPin { name, package: "node", version, entry: "node/bin/node" }
}

/// A program from PyPI, installed into the one virtual environment.
pub(super) struct PythonPin {
    /// Name in the manifest and of the program in `bin/`.
    pub(super) name: &'static str,
    /// Exact requirements, the program's own first.
    pub(super) requirements: &'static [&'static str],
    /// Tests need it; the others are welcome.
    pub(super) required: bool,
}

/// Programs of PyPI.
pub(super) const PYTHON: &[PythonPin] = &[
    PythonPin {
        name: "uvicorn",
        requirements: &["uvicorn==0.54.0", "click==8.5.1", "h11==0.16.0", "httptools==0.9.0"],
        required: true,
    },
    PythonPin {
        name: "gunicorn",
        requirements: &["gunicorn==27.0.1", "uvicorn-worker==0.4.0"],
        required: true,
    },
    PythonPin {
        name: "granian",
        requirements: &["granian==2.8.7", "click==8.5.1"],
        required: false,
    },
];

/// A program of the system, from Debian's packages where it is missing.
pub(super) struct SystemPin {
    /// Name in the manifest and of the program in the search path.
    pub(super) name: &'static str,
    /// Debian's package.
    pub(super) package: &'static str,
}

/// Programs of the system. Their versions are the distribution's.
pub(super) const SYSTEM: &[SystemPin] = &[
    SystemPin { name: "wrk", package: "wrk" },
    SystemPin { name: "strace", package: "strace" },
    SystemPin { name: "ss", package: "iproute2" },
];

/// A program whose package is unpacked and not installed, because installing it would start it.
pub(super) struct UnpackedPin {
    /// Name in the manifest.
    pub(super) name: &'static str,
    /// Debian's package.
    pub(super) package: &'static str,
    /// The program in it.
    pub(super) entry: &'static str,
}

/// Programs that benchmarks compare with, by their manuals; tests do without.
pub(super) const UNPACKED: &[UnpackedPin] =
    &[UnpackedPin { name: "nginx", package: "nginx", entry: "usr/sbin/nginx" }];

/// npm itself, where no npm is in the search path.
pub(super) const NPM_PACKAGES: &[&str] = &["nodejs", "npm"];
/// Python's virtual environments, where Python has none.
pub(super) const PYTHON_PACKAGES: &[&str] = &["python3", "python3-venv"];
