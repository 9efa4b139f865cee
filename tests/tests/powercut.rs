//! Power cuts under a cluster of real processes: a few trials, on each backend. The binary `powercut` runs as many as one likes.

use anyhow::Result;
use ringraft::runtime::Backend;
use ringraft_tests::powercut::direct::member::{self, Failure};
use ringraft_tests::powercut::direct::rig::DirectRig;
use ringraft_tests::powercut::mounts::{self, FsKind};
use ringraft_tests::powercut::rig::Rig;
use ringraft_tests::powercut::trial::{self, Fault, Machine, Moment, Report, Verdict};
use ringraft_tests::process::Program;
use std::path::Path;

ringraft_tests::on_each_backend! {
    nothing_acknowledged_is_lost_when_the_power_fails_under_ext4
    nothing_acknowledged_is_lost_when_the_power_fails_under_xfs
    nothing_acknowledged_is_lost_when_a_write_or_a_flush_fails_before_the_power_does
    on_a_disk_that_lies_about_flushes_acknowledged_commands_are_lost
    nothing_acknowledged_is_lost_when_the_power_fails_directly_under_the_log
    a_member_whose_disk_fails_a_write_ends_by_name_and_nobody_counts_on_it
    a_member_whose_disk_fails_a_flush_ends_by_name_and_nobody_counts_on_it
    a_member_that_cannot_read_its_disk_once_comes_back
    a_leader_without_space_lets_another_lead_and_a_follower_stays_behind_until_there_is_some
    a_member_whose_disk_hangs_gives_way_and_ends_by_name
}

/// Where the members and the disk come from.
fn programs() -> (&'static Path, Program, &'static Path) {
    let member = Program { path: env!("CARGO_BIN_EXE_testnode").into(), leading: Vec::new() };
    (Path::new(env!("CARGO_BIN_EXE_powercut")), member, Path::new(env!("CARGO_TARGET_TMPDIR")))
}

/// Runs trials from `seed` on, under a file system or directly, or says why this machine cannot.
fn run(
    backend: Backend,
    kind: Option<FsKind>,
    fault: Fault,
    seed: u64,
    trials: usize,
) -> Result<Option<Vec<Report>>> {
    if !mounts::available(kind) {
        return Ok(None);
    }
    let (powercut, _, scratch) = programs();
    let reports = match kind {
        Some(kind) => run_on(backend, Rig::new(powercut, kind, scratch)?, fault, seed, trials)?,
        None => run_on(backend, DirectRig::new(powercut, scratch)?, fault, seed, trials)?,
    };
    Ok(Some(reports))
}

fn run_on(
    backend: Backend,
    mut rig: impl Machine,
    fault: Fault,
    seed: u64,
    trials: usize,
) -> Result<Vec<Report>> {
    let (_, member, _) = programs();
    (seed..).take(trials).map(|seed| trial::run(&mut rig, &member, backend, fault, seed)).collect()
}

fn all_sound(
    backend: Backend,
    kind: Option<FsKind>,
    fault: Fault,
    seed: u64,
    trials: usize,
) -> Result<Option<Vec<Report>>> {
    let reports = run(backend, kind, fault, seed, trials)?;
    for report in reports.iter().flatten() {
        assert_eq!(report.verdict, Verdict::Sound, "{report:?}");
        assert!(report.acked > 0 && report.flushes > 0, "the disk was used: {report:?}");
        assert!(report.exercised, "its fault was met: {report:?}");
    }
    Ok(reports)
}

/// Two seeds, one of which also cuts while the members form.
fn two_cuts(backend: Backend, kind: Option<FsKind>) -> Result<()> {
    let Some(reports) = all_sound(backend, kind, Fault::None, 2, 2)? else { return Ok(()) };
    let moments: Vec<_> = reports.iter().map(|report| &report.moments[..]).collect();
    assert_eq!(moments, [&[Moment::UnderLoad][..], &[Moment::Starting, Moment::UnderLoad]]);
    Ok(())
}

fn nothing_acknowledged_is_lost_when_the_power_fails_under_ext4(backend: Backend) -> Result<()> {
    two_cuts(backend, Some(FsKind::Ext4))
}

fn nothing_acknowledged_is_lost_when_the_power_fails_under_xfs(backend: Backend) -> Result<()> {
    two_cuts(backend, Some(FsKind::Xfs))
}

fn nothing_acknowledged_is_lost_when_a_write_or_a_flush_fails_before_the_power_does(
    backend: Backend,
) -> Result<()> {
    all_sound(backend, Some(FsKind::Ext4), Fault::ErrorWrite, 1, 1)?;
    all_sound(backend, Some(FsKind::Ext4), Fault::ErrorFlush, 1, 1)?;
    Ok(())
}

fn on_a_disk_that_lies_about_flushes_acknowledged_commands_are_lost(backend: Backend) -> Result<()> {
    for kind in [Some(FsKind::Ext4), None] {
        let Some(reports) = run(backend, kind, Fault::Lie, 1, 2)? else { continue };
        let lost = reports.iter().filter(|report| matches!(report.verdict, Verdict::Lost(_))).count();
        assert!(lost > 0, "the check notices losses: {reports:?}");
        assert!(reports.iter().all(|report| report.exercised), "its fault was met: {reports:?}");
    }
    Ok(())
}

fn nothing_acknowledged_is_lost_when_the_power_fails_directly_under_the_log(backend: Backend) -> Result<()> {
    two_cuts(backend, None)
}

/// Seeds that let the disk of a follower and that of the leader fail.
const FOLLOWER: u64 = 2;
const LEADER: u64 = 3;

/// The disk of one member fails, once of a follower and once of the leader.
fn one_fails(backend: Backend, failure: Failure) -> Result<()> {
    if !mounts::available(None) {
        return Ok(());
    }
    let (powercut, program, scratch) = programs();
    let mut rig = DirectRig::new(powercut, scratch)?;
    for seed in [FOLLOWER, LEADER] {
        let report = member::run(&mut rig, &program, backend, failure, seed)?;
        assert_eq!(report.wrong, None, "{report:?}");
        assert!(report.exercised, "the disk failed something: {report:?}");
        assert_eq!(report.was_leader, seed == LEADER && failure != Failure::Read);
    }
    Ok(())
}

fn a_member_whose_disk_fails_a_write_ends_by_name_and_nobody_counts_on_it(backend: Backend) -> Result<()> {
    one_fails(backend, Failure::Write)
}

fn a_member_whose_disk_fails_a_flush_ends_by_name_and_nobody_counts_on_it(backend: Backend) -> Result<()> {
    one_fails(backend, Failure::Flush)
}

fn a_member_that_cannot_read_its_disk_once_comes_back(backend: Backend) -> Result<()> {
    one_fails(backend, Failure::Read)
}

fn a_leader_without_space_lets_another_lead_and_a_follower_stays_behind_until_there_is_some(
    backend: Backend,
) -> Result<()> {
    one_fails(backend, Failure::Full)
}

fn a_member_whose_disk_hangs_gives_way_and_ends_by_name(backend: Backend) -> Result<()> {
    one_fails(backend, Failure::Hang)
}
