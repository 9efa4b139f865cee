//! Power cuts under a cluster of real processes: a few trials. The binary `powercut` runs as many as one likes.

use anyhow::Result;
use ringraft_tests::powercut::mounts::{self, FsKind};
use ringraft_tests::powercut::rig::Rig;
use ringraft_tests::powercut::trial::{self, Fault, Moment, Report, Verdict};
use ringraft_tests::process::Program;
use std::path::Path;

/// Runs trials from `seed` on, or says why this machine cannot.
fn run(kind: FsKind, fault: Fault, seed: u64, trials: usize) -> Result<Option<Vec<Report>>> {
    if let Some(why) = mounts::missing(kind) {
        println!("skipped: {why}");
        return Ok(None);
    }
    let powercut = Path::new(env!("CARGO_BIN_EXE_powercut"));
    let member = Program { path: env!("CARGO_BIN_EXE_testnode").into(), leading: Vec::new() };
    let mut rig = Rig::new(powercut, kind, Path::new(env!("CARGO_TARGET_TMPDIR")))?;
    let reports = (seed..).take(trials).map(|seed| trial::run(&mut rig, &member, fault, seed));
    Ok(Some(reports.collect::<Result<_>>()?))
}

fn all_sound(kind: FsKind, fault: Fault, seed: u64, trials: usize) -> Result<Option<Vec<Report>>> {
    let reports = run(kind, fault, seed, trials)?;
    for report in reports.iter().flatten() {
        assert_eq!(report.verdict, Verdict::Sound, "{report:?}");
        assert!(report.acked > 0 && report.flushes > 0, "the disk was used: {report:?}");
    }
    Ok(reports)
}

/// Two seeds, one of which also cuts while the members form.
fn two_cuts(kind: FsKind) -> Result<()> {
    let Some(reports) = all_sound(kind, Fault::None, 2, 2)? else { return Ok(()) };
    let moments: Vec<_> = reports.iter().map(|report| &report.moments[..]).collect();
    assert_eq!(moments, [&[Moment::UnderLoad][..], &[Moment::Starting, Moment::UnderLoad]]);
    Ok(())
}

#[test]
fn nothing_acknowledged_is_lost_when_the_power_fails_under_ext4() -> Result<()> {
    two_cuts(FsKind::Ext4)
}

#[test]
fn nothing_acknowledged_is_lost_when_the_power_fails_under_xfs() -> Result<()> {
    two_cuts(FsKind::Xfs)
}

#[test]
fn nothing_acknowledged_is_lost_when_a_write_or_a_flush_fails_before_the_power_does() -> Result<()> {
    all_sound(FsKind::Ext4, Fault::ErrorWrite, 1, 1)?;
    all_sound(FsKind::Ext4, Fault::ErrorFlush, 1, 1)?;
    Ok(())
}

#[test]
fn on_a_disk_that_lies_about_flushes_acknowledged_commands_are_lost() -> Result<()> {
    let Some(reports) = run(FsKind::Ext4, Fault::Lie, 1, 2)? else { return Ok(()) };
    let lost = reports.iter().filter(|report| matches!(report.verdict, Verdict::Lost(_))).count();
    assert!(lost > 0, "the check notices losses: {reports:?}");
    Ok(())
}
