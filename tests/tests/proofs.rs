//! What proves what: each rule of Raft's thesis by its section, and each feature that the project promises, with the tests that
//! fail without it.
//!
//! An entry names a test as `file: function`, or a script of the protocol by its file. That they exist, and that no script is
//! left out, is checked; that they can fail, the known bugs that are put back show (`ringraft::mutants`), and their own text.

#[path = "proofs/features.rs"]
mod features;
#[path = "proofs/thesis.rs"]
mod thesis;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A section, or a row, with a rule and what proves it.
type Entry = (&'static str, &'static str, &'static [&'static str]);

const SCRIPTS: &str = "engine/tests/scripts";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a member of the workspace").to_owned()
}

/// Whether the file holds that test, which is not switched off, or is a script.
fn exists(proof: &str) -> Result<(), String> {
    let (file, test) = match proof.split_once(": ") {
        Some((file, test)) => (file, Some(test)),
        None => (proof, None),
    };
    let text = std::fs::read_to_string(root().join(file)).map_err(|error| format!("{proof}: {error}"))?;
    let Some(test) = test else {
        let is_script = file.starts_with(SCRIPTS) && file.ends_with(".txt") && text.contains("\n----\n");
        return if is_script { Ok(()) } else { Err(format!("{proof}: not a script")) };
    };
    let mut lines = text.lines().map(str::trim);
    let mut attributes = Vec::new();
    let found = lines.any(|line| {
        let here = line.starts_with(&format!("fn {test}("));
        if !here {
            match line.starts_with("#[") {
                true => attributes.push(line.to_owned()),
                false => attributes.clear(),
            }
        }
        here
    });
    // A suite that runs on each backend lists its tests by name, a line each.
    let is_listed = text.lines().any(|line| line.trim() == test) && text.contains("on_each_backend!");
    let is_test = is_listed || attributes.iter().any(|line| line == "#[test]");
    let ignored = attributes.iter().any(|line| line.starts_with("#[ignore"));
    match found && is_test && !ignored {
        true => Ok(()),
        false => Err(format!("{proof}: no such test, or one that does not run")),
    }
}

fn check(entries: &[Entry]) {
    let mut wrong = Vec::new();
    for (name, rule, proofs) in entries {
        if proofs.is_empty() {
            wrong.push(format!("{name}: nothing proves that {rule}"));
        }
        wrong.extend(
            proofs.iter().filter_map(|proof| exists(proof).err()).map(|why| format!("{name}: {why}")),
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_rule_of_the_thesis_is_proved_by_tests_that_exist() {
    check(thesis::RULES);
}

#[test]
fn every_feature_is_proved_by_tests_that_exist() {
    check(features::ROWS);
    let rows: BTreeSet<&str> = features::ROWS.iter().map(|(row, ..)| *row).collect();
    let all: Vec<String> =
        (1..=12).map(|row| format!("K{row}")).chain((1..=3).map(|row| format!("R{row}"))).collect();
    let missing: Vec<&String> = all.iter().filter(|row| !rows.contains(row.as_str())).collect();
    assert!(missing.is_empty(), "no entry for {missing:?}");
}

/// One that proves nothing in the tables is one that nobody finds.
#[test]
fn every_script_is_in_a_table() {
    let named: BTreeSet<&str> =
        thesis::RULES.iter().chain(features::ROWS).flat_map(|(.., proofs)| proofs.iter().copied()).collect();
    let entries = std::fs::read_dir(root().join(SCRIPTS)).expect("scripts");
    let scripts = entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
    let scripts = scripts.map(|name| format!("{SCRIPTS}/{name}"));
    let lost: Vec<String> = scripts.filter(|script| !named.contains(script.as_str())).collect();
    assert!(lost.is_empty(), "in no table: {lost:?}");
}

#[test]
fn what_does_not_exist_is_noticed() {
    for proof in [
        "engine/tests/scripts/none.txt",
        "engine/tests/raft_scripts.rs: no_such_test",
        "engine/tests/raft_scripts.rs: replay",
        "engine/tests/raft_scripts.rs",
    ] {
        assert!(exists(proof).is_err(), "{proof}");
    }
}
