//! Why recovery judges as it does: the rule of the decision table that applies, and what it rests on.

use super::Look;
use ringraft_wal::DamageCause;

/// Sentences, in order of the questions that a reader has.
pub(super) fn explain(look: &Look) -> Vec<String> {
    let mut lines = Vec::new();
    let Some(recovery) = &look.recovery else {
        lines.push(
            "Without term and vote a node could vote twice in a term, so it must not take part: wipe the directory and \
             add the node anew."
                .to_owned(),
        );
        return lines;
    };
    let end = recovery.end;
    lines.push(format!(
        "The log is what follows index {} by checksums and chain without a gap: it ends at index {} (chain {}).",
        recovery.start.index, end.index, end.chain
    ));
    let last = look.survey.segments.iter().flat_map(|segment| {
        segment
            .slots
            .iter()
            .filter(|slot| slot.identity == (slot.identity.0, end.chain))
            .map(move |slot| (segment, slot))
    });
    if let Some((segment, slot)) = last.last() {
        lines.push(format!(
            "Its last batch stands in {} at offset {}; the slot that decides how it ended is the one at offset {}.",
            segment.file,
            slot.offset,
            slot.offset + slot.bytes
        ));
    }
    if let Some(state) = look.survey.hard_state() {
        lines.push(format!(
            "The hard state vouches for everything through index {}; what lies at or behind its cut (index {}, \
             generation {}, offset {}) with an epoch below {} is void.",
            state.witness.max(state.cut.index),
            state.cut.index,
            state.cut.generation,
            state.cut.offset,
            state.epoch
        ));
    }
    let Ok(recovered) = &recovery.outcome else { return lines };
    let report = &recovered.report;
    if report.torn_bytes > 0 {
        lines.push(
            "Torn (rows 3 and 4): behind the end a write left only a part of its sectors, and the others hold what they \
             held before. A write that completed leaves no such sector, so this one was never acknowledged; nothing \
             durable says that the log went further."
                .to_owned(),
        );
    } else if report.damage.is_empty() {
        lines.push(
            "Clean (row 3): the sector behind the last batch holds what it held before the segment entered service, and \
             nothing durable says that the log went further."
                .to_owned(),
        );
    }
    for damage in report.damage.iter() {
        lines.push(format!("{}: {}", damage.segment, reason(damage.cause)));
    }
    lines
}

fn reason(cause: DamageCause) -> &'static str {
    match cause {
        DamageCause::Lost => {
            "lost (row 2): a later envelope or the hard state says that the log was durable through this batch, and it \
             is not there. A torn write is never counted, so the device lost it or returned old content."
        }
        DamageCause::ImageRotten => {
            "rotten image (row 5): the envelope is intact, and the bad sectors hold neither what was written nor what was \
             there before. No unfinished write leaves that. The envelope tells which batch it was."
        }
        DamageCause::EnvelopeRotten => {
            "rotten envelope (row 6): the slot's first sector is neither intact nor what was there before, or the device \
             does not return it. Which batch it was is unknown."
        }
        DamageCause::Misplaced => {
            "misplaced (row 6): what is there is intact but was written for another place, or does not continue the chain. \
             What belongs there is unknown."
        }
        DamageCause::SegmentMissing => {
            "a segment that others refer to, or that the hard state vouches for, is not there."
        }
        DamageCause::SegmentHeader => {
            "the segment's header is corrupt, unreadable, or blank above written slots."
        }
    }
}
