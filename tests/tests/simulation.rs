//! Some seeds of the simulator, and proof that it would notice.

use ringraft::mutants::{self, Mutant};
use ringraft_tests::sim::cluster::Engine;
use ringraft_tests::sim::coverage::Mark;
use ringraft_tests::sim::range::run_range;
use ringraft_tests::sim::shrink::{kind_of, shrink};
use ringraft_tests::sim::world::{Options, Report, run};

fn describe(report: &Report) -> String {
    let failure = report.failure.as_ref().expect("a failed run");
    format!("{}seed {}, step {}: {}", failure.tail, report.seed, failure.step, failure.message)
}

#[test]
fn sixty_seeds_end_well_and_come_by_their_faults() {
    let summary = run_range(Engine::default, 0..60, &Options::default(), 2, |_| {});
    if let Some(report) = &summary.failure {
        panic!("{}", describe(report));
    }
    assert!(!summary.is_undecided_too_often());
    let missing = summary.missing();
    assert!(missing.is_empty(), "never came by {missing:?}");
}

#[test]
fn the_same_seed_gives_the_same_trace_and_another_seed_another() {
    let options = Options { steps: 5_000, ..Options::default() };
    let hash = |seed| run(&Engine, seed, &options).hash;
    assert_eq!(hash(7), hash(7));
    assert_ne!(hash(7), hash(8));
}

#[test]
fn a_range_gives_the_same_hash_on_one_thread_and_on_two() {
    let options = Options { steps: 2_000, ..Options::default() };
    let hash = |threads| run_range(Engine::default, 0..6, &options, threads, |_| {}).hash;
    assert_eq!(hash(1), hash(2));
}

#[test]
fn an_acknowledgement_before_durability_is_noticed() {
    let make = || {
        mutants::set(Some(Mutant::AckBeforeDurable));
        Engine
    };
    let summary = run_range(make, 0..20, &Options::default(), 1, |_| {});
    mutants::set(None);
    let message = &summary.failure.expect("noticed").failure.expect("a failed run").message;
    let why = ["durable", "acknowledged"];
    assert!(why.iter().any(|word| message.contains(word)), "noticed for another reason: {message}");
}

/// A driver that says that it has nothing more to do is not called until something happens: what it left lying would wait.
#[test]
fn after_a_turn_that_leaves_nothing_to_do_another_one_does_nothing_and_the_run_is_the_same() {
    let kinds = [(None, None), (Some(true), Some(false)), (Some(false), Some(true))];
    for (seed, (changes, disk_faults)) in (0..9).zip(kinds.into_iter().cycle()) {
        let options = |rest_check_every| Options {
            rest_check_every,
            changes,
            disk_faults,
            steps: 10_000,
            ..Options::default()
        };
        let report = run(&Engine, seed, &options(1));
        if report.failure.is_some() {
            panic!("{}", describe(&report));
        }
        assert_eq!(report.hash, run(&Engine, seed, &options(0)).hash, "seed {seed}");
    }
}

/// A turn without news for anybody but the network, or the log itself, passes over what has nothing to do: nothing may come of that.
#[test]
fn a_run_is_the_same_when_every_turn_looks_at_everything() {
    let kinds = [(None, None), (Some(true), Some(false)), (Some(false), Some(true))];
    for (seed, (changes, disk_faults)) in (20..29).zip(kinds.into_iter().cycle()) {
        let options =
            |whole_turns| Options { whole_turns, changes, disk_faults, steps: 10_000, ..Options::default() };
        let report = run(&Engine, seed, &options(false));
        if report.failure.is_some() {
            panic!("{}", describe(&report));
        }
        assert_eq!(report.hash, run(&Engine, seed, &options(true)).hash, "seed {seed}");
    }
}

#[test]
fn a_turn_that_leaves_work_without_saying_so_is_noticed() {
    let make = || {
        mutants::set(Some(Mutant::TurnLeavesWork));
        Engine
    };
    let options = Options { rest_check_every: 1, ..Options::default() };
    let summary = run_range(make, 0..10, &options, 1, |_| {});
    mutants::set(None);
    let message = &summary.failure.expect("noticed").failure.expect("a failed run").message;
    assert!(message.contains("had nothing more to do, and did"), "noticed for another reason: {message}");
}

#[test]
fn failing_disks_and_late_writes_lose_nothing_that_was_acknowledged() {
    let options = Options { disk_faults: Some(true), late_writes: Some(true), ..Options::default() };
    let summary = run_range(Engine::default, 0..40, &options, 2, |_| {});
    if let Some(report) = &summary.failure {
        panic!("{}", describe(report));
    }
    assert!(summary.coverage.of(Mark::DiskFault) > 0, "no disk failed");
}

#[test]
fn a_failing_run_is_shrunk_to_a_few_troubles_and_calls_that_fail_in_the_same_way() {
    mutants::set(Some(Mutant::ConflictKept));
    let options = Options::default();
    let cluster = Engine;
    let report = (0..200).map(|seed| run(&cluster, seed, &options)).find(|report| report.failure.is_some());
    let report = report.expect("logs that differ");
    let shrunk = shrink(&cluster, &options, &report, 120).expect("it failed");
    let again = run(&cluster, report.seed, &shrunk.options);
    mutants::set(None);
    let message = |report: &Report| report.failure.as_ref().map(|failure| failure.message.clone());
    assert_eq!(message(&again), message(&shrunk.report), "the shrunk run can be run again");
    assert_eq!(
        message(&report).as_deref().map(kind_of),
        message(&again).as_deref().map(kind_of),
        "it fails in the same way"
    );
    assert!(shrunk.report.calls.len() <= 200, "far fewer calls are needed for that: {}", shrunk.describe());
    assert!(shrunk.report.struck.len() <= report.struck.len());
    assert!(shrunk.describe().contains("--troubles"), "{}", shrunk.describe());
}
