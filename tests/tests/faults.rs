//! A smaller number of what the binary `faults` runs in full.

use ringraft_tests::faults::threads::Tally;
use ringraft_tests::faults::{damage, errors, images};

fn assert_clean(tally: &Tally) {
    if let Some(violation) = tally.violations.first() {
        panic!("{} violations, the first: {violation}", tally.violations.len());
    }
}

#[test]
fn every_scenario_recovers_from_some_of_its_crash_images() {
    let options = images::Options { images_max: 150, ..images::Options::default() };
    for report in images::run(&options, None, |_| {}) {
        assert_clean(&report.tally);
        assert!(report.tally.cases > 0, "{} has no images", report.scenario);
    }
}

#[test]
fn a_fault_at_every_fiftieth_operation_loses_nothing_that_was_acknowledged() {
    let report = errors::run(&errors::Options { every: 50, ..errors::Options::default() });
    assert_clean(&report.tally);
    assert!(report.operations > 3_000, "the run has several thousand operations: {}", report.operations);
    assert!(report.tally.cases > 200, "{}", report.tally.cases);
}

#[test]
fn damaged_disks_are_healed_or_stop_the_cluster_loudly() {
    let report = damage::run(&damage::Options { seeds: 0..160, trace: false, threads: 2 }, |_| {});
    assert_clean(&report.tally);
    assert_eq!(report.tally.cases, 160);
    assert!(report.gone > 5, "some patterns leave no copy: {}", report.gone);
}
