//! House rules that a compiler does not check: who may import whom, and the purity of the core.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests are a member of the workspace")
        .to_owned()
}

fn rust_files(directory: &Path) -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    let entries = fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    for entry in entries {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("a text file");
            files.push((path, text));
        }
    }
    assert!(!files.is_empty(), "{} holds Rust files", directory.display());
    files
}

/// Lines of code: comments, documentation and the tests at the end of a file may speak of anything.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text);
    code.lines()
        .enumerate()
        .map(|(number, line)| (number + 1, line.trim()))
        .filter(|(_, line)| !line.starts_with("//"))
}

fn forbid(directory: &str, words: &[&str], why: &str) {
    let mut found = Vec::new();
    for (path, text) in rust_files(&root().join(directory)) {
        let within = path.strip_prefix(root().join(directory)).unwrap_or(&path);
        let is_test = |part: &std::path::Path| {
            let name = part.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
            ["tests", "testing", "simulation"].contains(&name) || name.ends_with("_tests")
        };
        if within.components().any(|part| is_test(part.as_ref())) {
            continue;
        }
        for (number, line) in code_lines(&text) {
            for word in words.iter().filter(|word| line.contains(**word)) {
                found.push(format!("{}:{number}: {word}", path.display()));
            }
        }
    }
    assert!(found.is_empty(), "{why}:\n{}", found.join("\n"));
}

#[test]
fn the_core_has_no_clock_file_socket_random_source_or_await() {
    forbid(
        "engine/src/raft",
        &[
            "glommio",
            "std::time",
            "std::fs",
            "std::net",
            "std::thread",
            "std::io",
            "async ",
            ".await",
            "HashMap",
            "HashSet",
            "getrandom",
            "SystemTime",
            "Instant::",
            "ringraft_wal",
            "ringraft_net",
            "unsafe ",
        ],
        "the core is a function of its inputs",
    );
}

#[test]
fn the_log_and_the_network_know_neither_each_other_nor_the_engine_nor_an_executor() {
    forbid(
        "wal/src",
        &["ringraft_net", "ringraft::", "glommio", "async fn"],
        "the log owns bytes and durability only",
    );
    forbid("net/src", &["ringraft_wal", "ringraft::", "glommio", "async fn"], "the network moves bytes only");
    forbid(
        "wal/block/src",
        &["ringraft_wal", "ringraft_net", "ringraft::", "glommio"],
        "the leaf crate imports none of the others",
    );
}

#[test]
fn only_the_runtime_knows_the_executor() {
    let source = root().join("engine/src");
    let mut checked = 0;
    for (path, text) in rust_files(&source) {
        let within = path.strip_prefix(&source).unwrap_or(&path);
        // Whoever starts a node chooses its backend.
        if within.starts_with("runtime") || within == Path::new("node.rs") {
            continue;
        }
        checked += 1;
        for (number, line) in code_lines(&text) {
            assert!(!line.contains("glommio"), "{}:{number} knows the executor", path.display());
        }
    }
    assert!(checked > 50, "{checked} files");
}

#[test]
fn libraries_do_not_print() {
    for directory in ["engine/src", "wal/src", "net/src", "wal/block/src"] {
        forbid(directory, &["println!", "eprintln!", "print!(", "dbg!"], "a library has tracing and errors");
    }
}
