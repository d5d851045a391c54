//! Programs of every kind in a directory of their own, with a `PATH` of their own.
//!
//! Runtimes are stand-ins: the smallest ELF file that writes one line, so that any version can answer. One test at a
//! time: a file that another thread is writing cannot be executed (ETXTBSY) while a child being started has a copy
//! of its descriptor.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::*;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A directory with `bin`, which is the `PATH`; removed in the end.
struct Place {
    root: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl Place {
    fn new(name: &str) -> Place {
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let root = std::env::temp_dir().join(format!("polyfork-{name}-{}", std::process::id()));
        let _left_over = fs::remove_dir_all(&root);
        fs::create_dir_all(root.join("bin")).unwrap();
        Place { root: root.canonicalize().unwrap(), _alone: alone }
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    fn executable(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.write(name, content);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn runtime(&self, name: &str, says: &str) -> PathBuf {
        self.executable(name, elf_that_says(says))
    }

    fn path(&self) -> OsString {
        self.root.join("bin").into_os_string()
    }

    fn look(&self, program: &str) -> Result<Detected, DetectError> {
        self.look_with(program, &[], None)
    }

    fn look_with(
        &self,
        program: &str,
        args: &[&str],
        runtime: Option<&str>,
    ) -> Result<Detected, DetectError> {
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        let runtime = runtime.map(OsStr::new);
        detect_with(OsStr::new(program), &args, Some(&self.root), Some(&self.path()), runtime)
    }

    fn error(&self, program: &str) -> String {
        self.look(program).expect_err(program).to_string()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _already = fs::remove_dir_all(&self.root);
    }
}

/// A static x86-64 executable: write(1, text); exit(0).
fn elf_that_says(text: &str) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let length = u32::try_from(text.len()).unwrap().to_le_bytes();
    let mut code = vec![0xb8, 1, 0, 0, 0, 0xbf, 1, 0, 0, 0, 0x48, 0x8d, 0x35, 16, 0, 0, 0, 0xba];
    code.extend(length);
    code.extend([0x0f, 0x05, 0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05]);
    assert_eq!(code.len(), 17 + 16, "the text follows the code");
    let size = HEADERS + code.len() as u64 + text.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [2u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes());
    for word in [BASE + HEADERS, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for half in [1u32, 5] {
        file.extend(half.to_le_bytes());
    }
    for word in [0, BASE, BASE, size, size, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file.extend(text.as_bytes());
    file
}

fn node(major: u32, minor: u32, patch: u32) -> Runtime {
    Runtime::Node { version: Version::new(major, minor, patch) }
}

#[test]
fn a_module_runs_by_node_from_the_path() {
    let place = Place::new("module");
    let exec = place.runtime("bin/node", "v20.20.2\n");
    place.write("server.js", "require('http')");
    let found = place.look("server.js").unwrap();
    assert_eq!(found.runtime, node(20, 20, 2));
    assert_eq!(found.dialect, Dialect::Node);
    assert_eq!(found.exec, exec);
    assert_eq!(found.args_before, ["server.js"]);
    assert!(
        found.why.contains("JavaScript module") && found.why.contains("20.20.2"),
        "{}",
        found.why
    );
}

#[test]
fn a_module_that_is_marked_executable_is_still_a_module() {
    let place = Place::new("marked");
    let exec = place.runtime("bin/node", "v22.1.0\n");
    place.executable("server.mjs", "import 'http'");
    assert_eq!(place.look("./server.mjs").unwrap().exec, exec);
}

#[test]
fn folders_called_like_runtimes_mean_nothing() {
    let place = Place::new("folders");
    place.executable("home/bun/node/deno/app", elf_that_says("v20.0.0\n"));
    place.executable("bin/node-exporter", elf_that_says("v20.0.0\n"));
    for program in ["home/bun/node/deno/app", "node-exporter"] {
        let found = place.look(program).unwrap();
        assert_eq!((found.runtime, found.dialect), (Runtime::Other, Dialect::Sockets), "{program}");
    }
}

#[test]
fn what_is_called_like_a_runtime_is_believed_only_by_its_answer() {
    let place = Place::new("imposter");
    place.runtime("bin/node", "node 0.3.2, amateur radio\n");
    place.runtime("bin/bun", "v20.1.1\n");
    for name in ["node", "bun"] {
        let found = place.look(name).unwrap();
        assert_eq!(found.runtime, Runtime::Other, "{name}");
        assert!(found.why.contains("answers"), "{}", found.why);
    }
    place.write("server.js", "");
    let error = place.look("server.js").expect_err("no Node here");
    assert!(error.is_about_the_runtime() && error.to_string().contains("is not Node"), "{error}");
}

#[test]
fn each_runtime_is_known_by_its_own_answer() {
    let place = Place::new("each");
    place.runtime("bin/deno", "deno 2.9.6 (stable, release)\nv8 1\n");
    place.runtime("lib/bun.exe", "1.4.5\n");
    symlink(place.root.join("lib/bun.exe"), place.root.join("bin/bun")).unwrap();
    let deno = place.look("deno").unwrap();
    assert_eq!(deno.runtime, Runtime::Deno { version: Version::new(2, 9, 6) });
    assert!(!deno.runtime.accepts_on_a_given_socket() && deno.runtime.takes_connections());
    let bun = place.look("bun").unwrap();
    assert_eq!(bun.runtime, Runtime::Bun { version: Version::new(1, 4, 5) });
    assert!(bun.runtime.binds_itself());
    assert_eq!(bun.exec, place.root.join("bin/bun"), "links are kept");
}

#[test]
fn another_runtime_can_be_named() {
    let place = Place::new("named");
    place.runtime("bin/deno", "deno 2.9.6 (stable)\n");
    let bun = place.runtime("opt/bun", "1.4.5\n");
    place.executable("server.ts", "#!/usr/bin/env node\n");
    let by_deno = place.look_with("server.ts", &[], Some("deno")).unwrap();
    assert_eq!(by_deno.args_before, ["run", "-A", "server.ts"]);
    let by_bun = place.look_with("server.ts", &[], Some("opt/bun")).unwrap();
    assert_eq!((by_bun.exec, by_bun.args_before), (bun, vec!["server.ts".into()]));
    let error = place.look_with("server.ts", &[], Some("nodde")).expect_err("not there");
    assert!(error.is_about_the_runtime(), "{error}");
}

#[test]
fn without_a_runtime_the_error_names_what_was_looked_for_and_what_to_do() {
    let place = Place::new("none");
    place.write("server.js", "");
    place.write("app.py", "");
    for (program, name) in [("server.js", "node"), ("app.py", "python3")] {
        let error = place.look(program).expect_err(program);
        let text = error.to_string();
        assert!(error.is_about_the_runtime());
        assert!(text.contains(name) && text.contains("install") && text.contains("bin"), "{text}");
    }
}

#[test]
fn a_node_that_is_too_old_is_refused_with_the_version_that_is_needed() {
    let place = Place::new("old");
    place.runtime("bin/node", "v16.20.2\n");
    place.write("server.js", "");
    for program in ["server.js", "node"] {
        let error = place.look(program).expect_err("too old");
        assert!(error.is_about_the_runtime());
        assert!(
            error.to_string().contains("16.20.2") && error.to_string().contains("18"),
            "{error}"
        );
    }
}

#[test]
fn typescript_gets_the_flag_its_node_needs() {
    let place = Place::new("typescript");
    place.write("server.ts", "");
    for (says, flags) in [
        ("v24.1.0\n", Some(vec![])),
        ("v22.18.0\n", Some(vec![])),
        ("v23.6.0\n", Some(vec![])),
        ("v22.17.1\n", Some(vec!["--experimental-strip-types"])),
        ("v23.5.0\n", Some(vec!["--experimental-strip-types"])),
        ("v22.5.0\n", None),
        ("v20.20.2\n", None),
    ] {
        place.runtime("bin/node", says);
        let found = place.look("server.ts");
        match flags {
            Some(mut flags) => {
                flags.push("server.ts");
                assert_eq!(found.unwrap().args_before, flags, "{says}");
            }
            None => assert!(found.expect_err(says).to_string().contains("TypeScript"), "{says}"),
        }
    }
}

#[test]
fn a_script_is_followed_to_its_interpreter() {
    let place = Place::new("script");
    let node_path = place.runtime("bin/node", "v20.20.2\n");
    let python = place.runtime("bin/python3.12", "Python 3.12\n");
    symlink(&python, place.root.join("bin/python3")).unwrap();
    place.executable("by-env", "#!/usr/bin/env -S node --enable-source-maps\n");
    place.executable("by-path", format!("#!{}\n", node_path.display()));
    place.executable("bin/uvicorn", format!("#!{}\nimport uvicorn", python.display()));
    place.executable("by-shell", "#!/bin/sh\nexec app\n");
    for (program, runtime) in [
        ("./by-env", node(20, 20, 2)),
        ("./by-path", node(20, 20, 2)),
        ("uvicorn", Runtime::Python),
        ("python3", Runtime::Python),
        ("./by-shell", Runtime::Other),
    ] {
        let found = place.look(program).unwrap();
        assert_eq!(found.runtime, runtime, "{program}: {}", found.why);
        assert!(found.args_before.is_empty(), "an executable script runs by itself");
    }
}

#[test]
fn a_script_that_may_not_be_executed_runs_as_the_kernel_would() {
    let place = Place::new("not-executable");
    place.runtime("bin/node", "v20.20.2\n");
    place.write("server", "#!/usr/bin/env -S node --no-warnings\n");
    let found = place.look("./server").unwrap();
    assert_eq!(found.exec, Path::new("/usr/bin/env"));
    assert_eq!(found.args_before, ["-S node --no-warnings", "./server"]);
    assert_eq!(found.dialect, Dialect::Node);
}

#[test]
fn a_shim_is_replaced_by_what_it_stands_for() {
    let place = Place::new("shim");
    let real = place.runtime("versions/20/node", "v20.20.2\n");
    let shim = format!("#!/bin/sh\ntest \"$1\" = -p && echo '{}'\n", real.display());
    place.executable("bin/node", shim);
    place.write("server.js", "");
    let found = place.look("server.js").unwrap();
    assert_eq!(found.exec, real);
    assert_eq!(found.args_before, ["server.js"]);
    assert!(found.why.contains("stands for"), "{}", found.why);
}

#[test]
fn scripts_in_a_circle_and_missing_interpreters_are_errors() {
    let place = Place::new("circle");
    let path = place.root.join("again").display().to_string();
    place.executable("again", format!("#!{path}\n"));
    assert!(place.error("./again").contains("circle"));
    place.executable("gone", "#!/no/such/interpreter\n");
    assert!(place.error("./gone").contains("/no/such/interpreter"));
    place.executable("gone-env", "#!/usr/bin/env nodejs99\n");
    assert!(place.error("./gone-env").contains("nodejs99"));
}

#[test]
fn env_on_the_command_line_is_looked_through() {
    let place = Place::new("env");
    place.runtime("bin/node", "v20.20.2\n");
    let env = place.runtime("bin/env", "");
    let found = place.look_with("env", &["A=1", "node", "server.js"], None).unwrap();
    assert_eq!((found.runtime, found.exec), (node(20, 20, 2), env));
    let alone = place.look_with("env", &[], None).unwrap();
    assert_eq!(alone.runtime, Runtime::Other);
}

#[test]
fn a_missing_program_is_told_with_a_near_name() {
    let place = Place::new("missing");
    place.runtime("bin/gunicorn", "");
    place.write("server.js", "");
    place.write("sub/main.js", "");
    for (typed, near) in [
        ("servr.js", "\"server.js\""),
        ("./sevrer.js", "\"./server.js\""),
        ("sub/mian.js", "\"sub/main.js\""),
        ("gunicron", "\"gunicorn\""),
    ] {
        let error = place.error(typed);
        assert!(error.contains("no such program") && error.contains(near), "{error}");
    }
    assert!(!place.error("nothing-like-it").contains("did you mean"));
    assert!(place.error("nowhere/x.js").contains("there is no directory"));
    assert!(place.error("").contains("the name is empty"));
    place.write("file", "");
    assert!(place.error("file/x").contains("file is not a directory"));
}

#[test]
fn links_that_lead_nowhere_are_told_as_links() {
    let place = Place::new("links");
    symlink("loop", place.root.join("loop")).unwrap();
    symlink("b.js", place.root.join("a.js")).unwrap();
    symlink("a.js", place.root.join("b.js")).unwrap();
    symlink("gone.js", place.root.join("dangling.js")).unwrap();
    symlink("dangling.js", place.root.join("over.js")).unwrap();
    for program in ["./loop", "loop", "a.js", "./loop/x"] {
        let error = place.error(program);
        assert!(error.contains("circle") && !error.contains("did you mean"), "{error}");
    }
    for program in ["dangling.js", "./dangling.js"] {
        let error = place.error(program);
        assert!(error.contains("gone.js, which does not exist"), "{error}");
        assert!(!error.contains("did you mean"), "{error}");
    }
    assert!(place.error("over.js").contains("which does not exist"));
}

#[test]
fn what_the_kernel_refuses_for_good_is_told_before_anything_starts() {
    let place = Place::new("refused");
    let mut foreign = elf_that_says("x");
    // A Motorola 68000.
    foreign[18] = 4;
    let mut object = elf_that_says("x");
    object[16] = 1;
    for (name, content, part) in [
        ("empty", Vec::new(), "empty"),
        ("text", b"hello\n".to_vec(), "#!/bin/sh"),
        ("no-interpreter", b"#!\n".to_vec(), "#!/bin/sh"),
        ("cut", elf_that_says("x")[..30].to_vec(), "broken"),
        ("magic", b"\x7fELF".to_vec(), "broken"),
        ("foreign", foreign, "another kind of machine"),
        ("object", object, "no program"),
    ] {
        place.executable(name, content);
        let error = place.look(&format!("./{name}")).expect_err(name);
        assert!(matches!(error, DetectError::NotAProgram { .. }), "{name}: {error}");
        assert!(!error.is_about_the_runtime() && error.to_string().contains(part), "{error}");
    }
    place.executable("by-text", format!("#!{}\n", place.write("plain", "x").display()));
    assert!(place.error("./by-text").contains("may not be executed"));
}

#[test]
fn advice_fits_the_runtime_that_was_named() {
    let place = Place::new("advice");
    place.write("server.ts", "");
    place.write("plain", "x");
    place.executable("empty", "");
    for (runtime, part) in [
        ("bun", "install Bun"),
        ("deno", "install Deno"),
        ("node", "install Node"),
        ("nodee", "node, deno or bun"),
        ("./plain", "node, deno or bun"),
        ("./empty", "node, deno or bun"),
        ("bin", "node, deno or bun"),
        ("./bin", "node, deno or bun"),
    ] {
        let error = place.look_with("server.ts", &[], Some(runtime)).expect_err(runtime);
        let text = error.to_string();
        assert!(error.is_about_the_runtime() && text.contains(part), "{runtime}: {text}");
        assert!(!text.contains("what runs it first"), "{text}");
    }
}

#[test]
fn a_command_comes_before_a_file_of_its_name_and_a_module_after_none() {
    let place = Place::new("order");
    let node_path = place.runtime("bin/node", "v20.20.2\n");
    place.write("node", "notes about node");
    assert_eq!(place.look("node").unwrap().exec, node_path);
    place.runtime("bin/server.js", "not this");
    place.write("server.js", "");
    assert_eq!(place.look("server.js").unwrap().args_before, ["server.js"]);
    let local = place.runtime("local-app", "");
    assert_eq!(place.look("local-app").unwrap().exec, local);
}

#[test]
fn what_cannot_be_executed_says_how_it_could() {
    let place = Place::new("chmod");
    place.write("app", elf_that_says("x"));
    place.write("notes.txt", "hello");
    for program in ["./app", "./notes.txt"] {
        let error = place.error(program);
        assert!(error.contains("chmod +x"), "{error}");
    }
}

#[test]
fn a_directory_is_run_as_node_does() {
    let place = Place::new("directory");
    place.runtime("bin/node", "v20.20.2\n");
    assert!(place.error(".").contains("package.json"));
    place.write("package.json", "{\"main\": \"server.js\"}");
    let found = place.look(".").unwrap();
    assert_eq!((found.runtime, found.args_before), (node(20, 20, 2), vec![".".into()]));
}

#[test]
fn a_name_that_looks_like_an_option_stays_a_file() {
    let place = Place::new("dash");
    place.runtime("bin/node", "v20.20.2\n");
    place.write("-e.js", "");
    assert_eq!(place.look("-e.js").unwrap().args_before, ["./-e.js"]);
}

#[test]
fn a_runtime_that_never_answers_does_not_hold_up_for_ever() {
    let place = Place::new("silent");
    let mut waits = elf_that_says("");
    waits.truncate(64 + 56);
    // pause()
    waits.extend([0xb8, 34, 0, 0, 0, 0x0f, 0x05]);
    place.executable("bin/node", waits);
    let error = place.look("node").expect_err("no answer");
    assert!(error.is_about_the_runtime() && error.to_string().contains("no answer"), "{error}");
}

#[test]
fn a_shim_as_an_interpreter_answers_for_its_runtime() {
    let place = Place::new("shim-interpreter");
    let real = place.runtime("versions/20/node", "v20.20.2\n");
    place.executable("bin/node", format!("#!/bin/sh\nexec '{}' \"$@\"\n", real.display()));
    place.executable("server", "#!/usr/bin/env node\n");
    assert_eq!(place.look("./server").unwrap().runtime, node(20, 20, 2));
}

#[test]
fn a_package_manager_comes_with_a_warning() {
    let place = Place::new("npm");
    place.runtime("bin/node", "v20.20.2\n");
    place.executable("bin/npm", "#!/usr/bin/env node\n");
    let found = place.look("npm").unwrap();
    assert!(found.warning.is_some_and(|text| text.contains("polyfork run server.js")));
}

#[test]
fn a_native_program_need_not_be_marked_when_that_is_said() {
    let found = Detected::native(OsStr::new("/bin/true")).unwrap();
    assert_eq!(found.dialect, Dialect::Native);
    assert_eq!(found.exec, Path::new("/bin/true"));
    assert!(Detected::native(OsStr::new("/no/such")).is_err());
}
