//! `ringraft wal inspect | verify | dump`: what a data directory holds, and what a start would make of it.
//!
//! Read-only, also on the directory of a running node. Two readers look: the survey goes through every file and slot
//! by the format alone; a dry run lets the engine's own recovery judge the same files on a disk that changes nothing.

mod dry_run;
mod dump;
mod explain;
mod render;
mod survey;

use crate::exit::{self, Failure};
use anyhow::Context as _;
use clap::{Args, Subcommand};
use dry_run::{DryRun, dry_run};
use serde::Serialize;
use std::io::{BufWriter, Write as _};
use std::path::PathBuf;
use survey::{CopyReport, SegmentReport, Survey};

/// Shows what a node's data directory holds; reads only
#[derive(Debug, Args)]
pub(crate) struct WalArgs {
    #[command(subcommand)]
    command: WalCommand,
}

#[derive(Debug, Subcommand)]
enum WalCommand {
    /// Identity, hard state, segments, and what recovery would find and do
    Inspect(ReportArgs),
    /// Every checksum and chain; prints what is wrong. Exit code 0 clean, 20 damage, 21 a torn end
    Verify(ReportArgs),
    /// The batches, with their places
    Dump(dump::DumpArgs),
}

#[derive(Debug, Args)]
struct ReportArgs {
    /// The data directory of a node, live or not
    #[arg(value_name = "DIRECTORY")]
    directory: PathBuf,
    /// One JSON document instead of text
    #[arg(long)]
    json: bool,
    /// Say why: which rule of recovery applies, and what it rests on
    #[arg(long)]
    explain: bool,
}

/// How a directory stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    /// Nothing is wrong.
    Clean,
    /// The log ends in a write that was never acknowledged; the next start drops it.
    TornTail,
    /// Something that was, or may have been, acknowledged is damaged.
    Damaged,
}

/// The document that `inspect` and `verify` print.
#[derive(Serialize)]
struct Document<'a> {
    schema: &'static str,
    directory: String,
    state: State,
    /// The process that has the directory open. Its last writes may be under way.
    held_by: Option<i32>,
    hard_state: &'a [CopyReport],
    #[serde(skip_serializing_if = "Option::is_none")]
    recovery: Option<RecoveryDocument>,
    /// Why a start would refuse the directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
    /// What the survey found wrong, in order of place.
    findings: &'a [Finding],
    segments: &'a [SegmentReport],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    snapshots: &'a [SnapshotReport],
    #[serde(skip_serializing_if = "Vec::is_empty")]
    explanation: Vec<String>,
}

/// What the next start would find and do.
#[derive(Serialize)]
struct RecoveryDocument {
    start_index: u64,
    last_index: u64,
    last_term: u64,
    last_chain: String,
    batches: usize,
    /// Of the cut that the start would record.
    epoch: u64,
    torn_bytes: u64,
    hard_state_repaired: bool,
    damage: Vec<String>,
    changes: Vec<String>,
}

/// A snapshot file, by its name. What is in it a start verifies.
#[derive(Serialize)]
struct SnapshotReport {
    file: String,
    last_index: u64,
    bytes: u64,
}

/// Something that is not as it was written.
#[derive(Serialize)]
struct Finding {
    segment: String,
    offset: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    first: Option<u64>,
    what: String,
}

/// A directory that a node uses is looked at so many times more when a file that was there is gone.
const LIVE_LOOKS_MAX: usize = 20;

/// Runs the command.
pub(crate) fn run(args: &WalArgs) -> anyhow::Result<()> {
    match &args.command {
        WalCommand::Inspect(report) => self::report(report, true),
        WalCommand::Verify(report) => self::report(report, false),
        WalCommand::Dump(args) => dump::run(args),
    }
}

/// What both readers found.
struct Look {
    survey: Survey,
    recovery: Option<DryRun>,
    refused: Option<String>,
    findings: Vec<Finding>,
    snapshots: Vec<SnapshotReport>,
    state: State,
}

impl Look {
    fn at(
        directory: &std::path::Path,
        on_batch: impl FnMut(&str, &survey::SlotReport, &[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let mut survey = Survey::take(directory, on_batch)?;
        let (mut recovery, mut refused) = (None, None);
        match survey.hard_state() {
            Some(identity) => {
                let mut run = dry_run(directory, identity, survey.segment_bytes)?;
                // A node that runs makes and renames segments while they are looked at.
                for _ in 0..LIVE_LOOKS_MAX {
                    if survey.held_by.is_none() || !run.has_lost_a_file() {
                        break;
                    }
                    run = dry_run(directory, identity, survey.segment_bytes)?;
                }
                recovery = Some(run);
            }
            None if survey.segments.is_empty()
                && survey.copies.iter().all(|copy| copy.state == "missing") =>
            {
                anyhow::bail!(Failure {
                    code: exit::DIRECTORY,
                    message: format!(
                        "{} is not the data directory of a node: it has neither a hard state nor segments",
                        directory.display()
                    ),
                });
            }
            None => {
                refused = Some("no copy of the hard state is usable: term and vote are unknown".to_owned());
            }
        }
        if let Some(DryRun { outcome: Err(error), .. }) = &recovery {
            refused = Some(error.to_string());
        }
        if let Some(recovery) = &recovery {
            survey.judge_slots(&recovery.batches, recovery.start.index);
        }
        let findings = find(&survey);
        let report = recovery.as_ref().and_then(|recovery| recovery.outcome.as_ref().ok());
        let report = report.map(|recovered| &recovered.report);
        let damaged = refused.is_some() || report.is_some_and(|report| !report.damage.is_empty());
        let torn = report.is_some_and(|report| report.torn_bytes > 0);
        let state = match (damaged, torn) {
            (true, _) => State::Damaged,
            (false, true) => State::TornTail,
            (false, false) => State::Clean,
        };
        let snapshots = snapshots(directory)?;
        Ok(Self { survey, recovery, refused, findings, snapshots, state })
    }

    fn recovery_document(&self) -> Option<RecoveryDocument> {
        let recovery = self.recovery.as_ref()?;
        let report = &recovery.outcome.as_ref().ok()?.report;
        Some(RecoveryDocument {
            start_index: recovery.start.index.get(),
            last_index: recovery.end.index.get(),
            last_term: recovery.end.term.get(),
            last_chain: recovery.end.chain.to_string(),
            batches: recovery.batches.len(),
            epoch: recovery.epoch,
            torn_bytes: report.torn_bytes,
            hard_state_repaired: report.hard_state_repaired,
            damage: report.damage.iter().map(ToString::to_string).collect(),
            changes: recovery.changes.clone(),
        })
    }
}

/// The snapshots in the directory, the oldest first.
fn snapshots(directory: &std::path::Path) -> anyhow::Result<Vec<SnapshotReport>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).context("reading the directory")? {
        let entry = entry.context("reading the directory")?;
        let file = entry.file_name().to_string_lossy().into_owned();
        let Some(last) = ringraft::snapshots::parse_name(&file) else { continue };
        // One that has just been removed is none.
        let Ok(metadata) = entry.metadata() else { continue };
        found.push(SnapshotReport { file, last_index: last.get(), bytes: metadata.len() });
    }
    found.sort_by_key(|snapshot| snapshot.last_index);
    Ok(found)
}

/// What the survey has to say about the segments.
fn find(survey: &Survey) -> Vec<Finding> {
    let mut findings = Vec::new();
    for segment in &survey.segments {
        let finding = |offset, first, what| Finding { segment: segment.file.clone(), offset, first, what };
        if let Some(problem) = segment.header_problem.as_ref().filter(|problem| !problem.starts_with("blank"))
        {
            findings.push(finding(0, None, format!("the segment header: {problem}")));
        }
        for slot in segment.slots.iter().filter(|slot| !slot.is_intact()) {
            let sectors = match slot.bad_sectors.as_slice() {
                [] => String::new(),
                bad => format!(" (bad sectors of the image: {bad:?})"),
            };
            findings.push(finding(
                slot.offset,
                Some(slot.first),
                format!("the image: {}{sectors}", slot.image),
            ));
        }
        for extent in &segment.other_content {
            findings.push(finding(extent.offset, None, format!("{} bytes: {}", extent.bytes, extent.what)));
        }
    }
    findings.sort_by(|a, b| (&a.segment, a.offset).cmp(&(&b.segment, b.offset)));
    findings
}

fn report(args: &ReportArgs, inspect: bool) -> anyhow::Result<()> {
    let look = Look::at(&args.directory, |_, _, _| Ok(()))?;
    let explanation = if args.explain { explain::explain(&look) } else { Vec::new() };
    let mut out = BufWriter::new(std::io::stdout().lock());
    let written = if args.json {
        let document = Document {
            schema: "ringraft.wal/1",
            directory: args.directory.display().to_string(),
            state: look.state,
            held_by: look.survey.held_by,
            hard_state: &look.survey.copies,
            recovery: look.recovery_document(),
            refused: look.refused.clone(),
            findings: &look.findings,
            segments: &look.survey.segments,
            snapshots: &look.snapshots,
            explanation,
        };
        serde_json::to_writer_pretty(&mut out, &document)
            .map_err(std::io::Error::from)
            .and_then(|()| writeln!(out))
    } else {
        render::report(&mut out, &look, inspect, &explanation)
    };
    written.and_then(|()| out.flush()).context("writing the report")?;
    ended(&look, inspect)
}

/// The exit code says how the directory stands; `inspect` fails only when it could not look.
fn ended(look: &Look, inspect: bool) -> anyhow::Result<()> {
    let (code, message) = match look.state {
        _ if inspect => return Ok(()),
        State::Clean => return Ok(()),
        State::TornTail => (exit::TORN_TAIL, "the log ends in a torn write, which the next start drops"),
        State::Damaged => (exit::LOG, "the log is damaged"),
    };
    Err(Failure { code, message: message.to_owned() }.into())
}
