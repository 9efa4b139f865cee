//! The report as text.

use super::survey::{SegmentReport, position};
use super::{Look, State};
use std::io::{self, Write};

pub(super) fn report(
    out: &mut impl Write,
    look: &Look,
    inspect: bool,
    explanation: &[String],
) -> io::Result<()> {
    if inspect {
        identity(out, look)?;
        segments(out, &look.survey.segments)?;
        for snapshot in &look.snapshots {
            let (file, bytes, last) = (&snapshot.file, snapshot.bytes, snapshot.last_index);
            writeln!(out, "{file}: {bytes} bytes, a snapshot up to index {last}")?;
        }
    }
    for finding in &look.findings {
        let first = finding.first.map_or(String::new(), |first| format!(", batch from index {first}"));
        writeln!(out, "{} at offset {}{first}: {}", finding.segment, finding.offset, finding.what)?;
    }
    recovery(out, look, inspect)?;
    for line in explanation {
        writeln!(out, "  {line}")?;
    }
    let state = match look.state {
        State::Clean => "clean",
        State::TornTail => "a torn end, never acknowledged: the next start drops it",
        State::Damaged => "DAMAGED",
    };
    writeln!(out, "state: {state}")
}

fn identity(out: &mut impl Write, look: &Look) -> io::Result<()> {
    if let Some(pid) = look.survey.held_by {
        writeln!(out, "in use by process {pid}: its last writes may be under way and look torn")?;
    }
    let counts = look.survey.hard_state().map(|state| state.sequence);
    for copy in &look.survey.copies {
        let Some(values) = &copy.values else {
            writeln!(out, "{}: {}", copy.file, copy.state)?;
            continue;
        };
        let mark = if counts == Some(values.sequence) { ", counts" } else { ", older" };
        writeln!(out, "{}: valid, sequence {}{mark}", copy.file, values.sequence)?;
        if counts == Some(values.sequence) && copy.file == "hard-a"
            || look.survey.copies[0].values.as_ref().is_none_or(|a| a.sequence < values.sequence)
        {
            writeln!(
                out,
                "  node {} of cluster {}, incarnation {}, {}",
                values.node,
                values.cluster,
                values.incarnation,
                if values.formed { "formed" } else { "not formed" }
            )?;
            let vote = values.vote.map_or("no vote".to_owned(), |vote| format!("vote for node {vote}"));
            writeln!(
                out,
                "  term {}, {vote}; boot {}, epoch {}; log starts after index {}",
                values.term, values.boot, values.epoch, values.start_index
            )?;
            writeln!(
                out,
                "  newest cut: index {}, generation {}, offset {}; known durable through index {}",
                values.cut.index, values.cut.generation, values.cut.offset, values.witness
            )?;
        }
    }
    Ok(())
}

fn segments(out: &mut impl Write, segments: &[SegmentReport]) -> io::Result<()> {
    for segment in segments {
        write!(out, "{}: {} bytes, {}", segment.file, segment.bytes, segment.stage)?;
        let Some(header) = &segment.header else {
            match &segment.header_problem {
                Some(problem) => writeln!(out, "; header {problem}")?,
                None => writeln!(out)?,
            }
            continue;
        };
        writeln!(
            out,
            "; generation {}, epoch {}, boot {}, {}",
            header.generation, header.epoch, header.boot, header.origin
        )?;
        let in_log = segment.slots.iter().filter(|slot| slot.fate == "log").count();
        let indices = match (segment.slots.first(), segment.slots.last()) {
            (Some(first), Some(last)) => format!(", indices {} to {}", first.first, last.last),
            _ => String::new(),
        };
        let used: u64 = segment.slots.iter().map(|slot| slot.bytes).sum();
        writeln!(
            out,
            "  {} batches in {used} bytes{indices}; {in_log} of them in the log; never written: {} bytes, former lives: {}",
            segment.slots.len(),
            segment.blank_bytes,
            segment.former_life_bytes
        )?;
    }
    Ok(())
}

fn recovery(out: &mut impl Write, look: &Look, inspect: bool) -> io::Result<()> {
    if let Some(refused) = &look.refused {
        return writeln!(out, "a start would refuse: {refused}");
    }
    let Some(recovery) = &look.recovery else { return Ok(()) };
    let Ok(recovered) = &recovery.outcome else { return Ok(()) };
    let report = &recovered.report;
    writeln!(
        out,
        "recovery would find: {} batches, from behind index {} to {}",
        recovery.batches.len(),
        recovery.start.index,
        position(recovery.end.term, recovery.end.index)
    )?;
    for damage in report.damage.iter() {
        writeln!(out, "  damage: {damage}")?;
    }
    if report.torn_bytes > 0 {
        writeln!(out, "  torn end: {} bytes, dropped", report.torn_bytes)?;
    }
    if report.hard_state_repaired {
        writeln!(out, "  one copy of the hard state, made anew from the other")?;
    }
    if inspect {
        for change in &recovery.changes {
            writeln!(out, "  it would {change}")?;
        }
    }
    Ok(())
}
