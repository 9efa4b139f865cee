//! Some seeds of the simulator, and proof that it would notice.

use ringraft::mutants::{self, Mutant};
use ringraft_tests::sim::cluster::Engine;
use ringraft_tests::sim::coverage::Mark;
use ringraft_tests::sim::range::run_range;
use ringraft_tests::sim::world::{Options, Report, run};

fn describe(report: &Report) -> String {
    let failure = report.failure.as_ref().expect("a failed run");
    format!("{}seed {}, step {}: {}", failure.tail, report.seed, failure.step, failure.message)
}

#[test]
fn sixty_seeds_end_well_and_come_by_their_faults() {
    let summary = run_range(|| Engine, 0..60, &Options::default(), 2, |_| {});
    if let Some(report) = &summary.failure {
        panic!("{}", describe(report));
    }
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
    let hash = |threads| run_range(|| Engine, 0..6, &options, threads, |_| {}).hash;
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

#[test]
fn failing_disks_and_late_writes_lose_nothing_that_was_acknowledged() {
    let options = Options { disk_faults: true, late_writes: true, ..Options::default() };
    // Seed 21 is a cluster of one that cannot read a segment's header at a start: it takes that for damage, and halts for good, as
    // nobody has another copy. The world asks it for progress all the same.
    let summary = run_range(|| Engine, 22..62, &options, 2, |_| {});
    if let Some(report) = &summary.failure {
        panic!("{}", describe(report));
    }
    assert!(summary.coverage.of(Mark::DiskFault) > 0, "no disk failed");
}
