//! Manual pages and completions, as they come out of the command.

use std::fs;

use super::desk::Desk;
use super::support::{command, ended};

#[test]
fn a_page_is_written_for_each_verb() {
    let desk = Desk::new();
    let folder = desk.place.path().join("man/man1");
    desk.did(&["man", "--out", folder.to_str().unwrap()]);
    // Again: these are made files.
    desk.did(&["man", "--out", folder.to_str().unwrap()]);
    for page in ["polyfork", "polyfork-run", "polyfork-doctor", "polyfork-service-install"] {
        let text = fs::read_to_string(folder.join(format!("{page}.1"))).expect(page);
        assert!(text.contains(".SH NAME"), "{page}");
    }
    assert!(desk.did(&["man"]).contains(".TH polyfork 1"));
}

/// What a person sees who presses the key after `polyfork stop sh`.
#[test]
fn bash_completes_names_of_apps() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "--name", "shop-one", "server.js"]);
    let script = desk.place.file("complete.bash", &desk.did(&["completions", "bash"]));
    let polyfork = desk.command(&[]);
    let mut bash = command("bash");
    bash.arg("-c").arg(format!(
        "polyfork() {{ {} \"$@\"; }}
         source {}
         COMP_WORDS=(polyfork stop sh) COMP_CWORD=2
         _polyfork_with_apps polyfork sh stop
         printf '%s\\n' \"${{COMPREPLY[@]}}\"
         COMP_WORDS=(polyfork do) COMP_CWORD=1 COMPREPLY=()
         _polyfork_with_apps polyfork do polyfork
         printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        polyfork.get_program().to_str().unwrap(),
        script.display()
    ));
    bash.env("POLYFORK_RUNTIME_DIR", desk.runtime());
    let told = ended(bash);
    let words: Vec<&str> = told.out.lines().collect();
    assert!(words.contains(&"shop-one"), "{told:?}");
    assert!(words.contains(&"doctor"), "{told:?}");
}

#[test]
fn names_are_told_one_a_line_and_none_where_no_app_ever_ran() {
    let mut desk = Desk::new();
    assert_eq!(desk.did(&["names"]), "");
    desk.start(&["-w", "1", "--name", "b", "server.js"]);
    desk.start(&["-w", "1", "--name", "a", "server.js"]);
    assert_eq!(desk.did(&["names"]), "a\nb\n");
}
