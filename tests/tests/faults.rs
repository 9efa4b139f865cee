//! A smaller number of what the binary `faults` runs in full.

use ringraft_tests::faults::threads::Tally;
use ringraft_tests::faults::{damage, errors, images, reverts};

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

/// A control: of a disk that loses one write that it told to be durable, the images must tell.
#[test]
fn a_lost_write_is_noticed() {
    let wrong = |lost_write| {
        let options = images::Options { images_max: 20, lost_write, ..images::Options::default() };
        let reports = images::run(&options, Some("append-over-a-former-life"), |_| {});
        let tally = &reports[0].tally;
        (tally.violations.len() as u64, tally.cases)
    };
    assert_eq!(wrong(None).0, 0);
    // Some of these are acknowledged batches that no image has.
    assert!((70..90).map(|skip| wrong(Some(skip))).any(|(wrong, images)| wrong == images));
}

#[test]
fn a_durable_write_that_reverts_to_a_former_life_is_damage() {
    let tally = reverts::run(0);
    assert_clean(&tally);
    assert!(tally.cases > 200, "{}", tally.cases);
}

#[test]
fn a_fault_at_every_fiftieth_operation_loses_nothing_that_was_acknowledged() {
    let report = errors::run(&errors::Options { every: 50, ..errors::Options::default() });
    assert_clean(&report.tally);
    assert!(report.operations > 3_000, "the run has several thousand operations: {}", report.operations);
    assert!(report.tally.cases > 200, "{}", report.tally.cases);
}

/// The header of the segment that tells of the newest cut could not be read, and what that cut had voided came back: behind
/// a later segment of the same epoch, and in front of the segment itself when no intact batch in it tells what it continues.
#[test]
fn a_cut_counts_when_the_segment_that_tells_of_it_cannot_be_read() {
    for (seed, life, operation) in [(0, 9, 17), (1, 25, 17), (1, 41, 23), (2, 6, 14)] {
        let (seeds, only) = (seed..seed + 1, Some((life, operation)));
        let report = errors::run(&errors::Options { seeds, only, ..errors::Options::default() });
        assert_clean(&report.tally);
        assert!(report.tally.cases >= 4, "seed {seed}, life {life}: {}", report.tally.cases);
    }
}

#[test]
fn damaged_disks_are_healed_or_stop_the_cluster_loudly() {
    let report = damage::run(&damage::Options { seeds: 0..160, trace: false, threads: 2 }, |_| {});
    assert_clean(&report.tally);
    assert_eq!(report.tally.cases, 160);
    assert!(report.gone > 5, "some patterns leave no copy: {}", report.gone);
}

/// A machine had died between the cut of its start and the first segment of the new epoch; then an envelope rotted far before that
/// cut. Nothing on its disk says that no batch was acknowledged in that epoch, and the only other node that could tell had lost
/// the next batch: two of three may have had it, and to wait is right. It was counted as a failure to heal.
#[test]
fn a_quorum_in_doubt_waits_also_when_the_newest_epoch_has_left_no_segment() {
    for seed in [9467, 9474] {
        let options = damage::Options { seeds: seed..seed + 1, trace: false, threads: 1 };
        let report = damage::run(&options, |_| {});
        assert_clean(&report.tally);
        assert_eq!((report.tally.cases, report.undecided), (1, 1), "seed {seed}");
    }
}
