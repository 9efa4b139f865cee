//! `ringraft wal dump`: batch by batch, in the order of the segments.

use super::Look;
use super::survey::SlotReport;
use anyhow::Context as _;
use clap::Args;
use ringraft_wal::format::parse_image;
use serde::Serialize;
use std::io::{BufWriter, Write as _};
use std::path::PathBuf;

/// Bytes of a command that are shown.
const SHOWN_BYTES: usize = 64;

/// The batches of a data directory, with their places
#[derive(Debug, Args)]
pub(super) struct DumpArgs {
    /// The data directory of a node, live or not
    #[arg(value_name = "DIRECTORY")]
    directory: PathBuf,
    /// From the batch that holds this index
    #[arg(long, value_name = "INDEX", default_value_t = 0)]
    from: u64,
    /// To the batch that holds this index
    #[arg(long, value_name = "INDEX", default_value_t = u64::MAX)]
    to: u64,
    /// Batches that are not in the log as well: cut off, superseded, damaged
    #[arg(long)]
    all: bool,
    /// The commands too: index, session and the first bytes of each
    #[arg(long)]
    commands: bool,
    /// One JSON document per line instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    segment: &'a str,
    #[serde(flatten)]
    slot: &'a SlotReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a [CommandLine]>,
}

#[derive(Serialize)]
struct CommandLine {
    index: u64,
    bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<(u64, u64)>,
    /// The first bytes, printable ones as they are, others escaped.
    head: String,
}

pub(super) fn run(args: &DumpArgs) -> anyhow::Result<()> {
    // First what is in the log, then the batches one by one: nothing is kept of the commands.
    let look = Look::at(&args.directory, |_, _, _| Ok(()))?;
    let fates: std::collections::HashMap<(&str, u64), &SlotReport> = look
        .survey
        .segments
        .iter()
        .flat_map(|segment| segment.slots.iter().map(|slot| ((segment.file.as_str(), slot.offset), slot)))
        .collect();
    let wanted = |slot: &SlotReport| {
        slot.last >= args.from && slot.first <= args.to && (args.all || slot.fate == "log")
    };
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut print = |segment: &str, slot: &SlotReport, image: Option<&[u8]>| -> anyhow::Result<()> {
        let content = image.filter(|_| args.commands).map(commands_of);
        let written = if args.json {
            let line = Line { segment, slot, content: content.as_deref() };
            serde_json::to_writer(&mut out, &line).map_err(std::io::Error::from).and_then(|()| writeln!(out))
        } else {
            text(&mut out, segment, slot, content.as_deref())
        };
        written.context("writing the dump")
    };
    if args.commands {
        super::survey::Survey::take(&args.directory, |segment, slot, image| {
            match fates.get(&(segment, slot.offset)) {
                Some(judged) if judged.identity == slot.identity && wanted(judged) => {
                    print(segment, judged, Some(image))
                }
                _ => Ok(()),
            }
        })?;
    } else {
        for segment in &look.survey.segments {
            for slot in segment.slots.iter().filter(|slot| wanted(slot)) {
                print(&segment.file, slot, None)?;
            }
        }
    }
    out.flush().context("writing the dump")?;
    super::ended(&look, true)
}

fn commands_of(image: &[u8]) -> Vec<CommandLine> {
    let Ok(view) = parse_image(image) else { return Vec::new() };
    let line = |command: ringraft_wal::format::Command<'_>| CommandLine {
        index: command.index.get(),
        bytes: command.bytes.len(),
        session: command.session.map(|session| (session.session, session.sequence)),
        head: command.bytes[..command.bytes.len().min(SHOWN_BYTES)].escape_ascii().to_string(),
    };
    view.commands().map(line).collect()
}

fn text(
    out: &mut impl std::io::Write,
    segment: &str,
    slot: &SlotReport,
    content: Option<&[CommandLine]>,
) -> std::io::Result<()> {
    let kind = slot.kind.unwrap_or("?");
    let state = match (slot.fate, slot.is_intact()) {
        ("log", true) => String::new(),
        (fate, true) => format!(" [{fate}]"),
        (fate, false) => format!(" [{fate}: {}]", slot.image),
    };
    writeln!(
        out,
        "{segment} {:>10}  {}..{} term {} {kind} {} bytes, payload {}, chain {}{state}",
        slot.offset,
        slot.first,
        slot.last,
        slot.term,
        slot.bytes,
        slot.payload_bytes.unwrap_or_default(),
        slot.chain
    )?;
    for command in content.unwrap_or_default() {
        let session =
            command.session.map_or(String::new(), |(id, sequence)| format!(" session {id}:{sequence}"));
        let more = if command.bytes > SHOWN_BYTES { "…" } else { "" };
        writeln!(out, "    {} ({} bytes){session} {}{more}", command.index, command.bytes, command.head)?;
    }
    Ok(())
}
