//! What the sectors of a segment held before it entered service: the key to telling a torn write from damage.

use super::scan::SegmentBytes;
use crate::format::{PriorContent, content_checksum, prior_checksum_at, slots_start};
use ringraft_block::{BLOCK_BYTES, SECTOR_BYTES};
use std::ops::Range;

/// Tells prior content from other content in one segment.
pub(crate) struct Prior<'a> {
    content: PriorContent,
    segment: &'a SegmentBytes<'a>,
}

impl<'a> Prior<'a> {
    pub(crate) fn new(content: PriorContent, segment: &'a SegmentBytes<'a>) -> Self {
        Self { content, segment }
    }

    /// Whether every sector in `range`, whole sectors behind the region of checksums, could be read and holds what it held before
    /// this life of the segment. What the former life left is not known where its checksums cannot be read or are
    /// rotten: then nothing is prior, so that a doubt ends as damage and never as a torn write.
    pub(crate) fn holds(&self, range: Range<usize>) -> bool {
        let Some(sectors) = self.segment.readable(range.clone()) else { return false };
        match self.content {
            PriorContent::Zeros => is_blank(sectors),
            PriorContent::Checksums => {
                let offsets = range.step_by(SECTOR_BYTES);
                sectors.chunks(SECTOR_BYTES).zip(offsets).all(|(sector, offset)| {
                    let at = prior_checksum_at(offset as u64) as usize;
                    let stored = self.segment.readable(at..at.saturating_add(4));
                    let stored = stored.and_then(<[u8]>::first_chunk::<4>);
                    stored.is_some_and(|stored| u32::from_le_bytes(*stored) == content_checksum(sector))
                })
            }
        }
    }
}

/// Whether no batch was ever written to a segment since it was made ready, by zeros or by recycling, whatever its header says.
pub(crate) fn is_unused(segment: &SegmentBytes<'_>) -> bool {
    let length = segment.bytes.len();
    let slots = slots_start(length as u64) as usize..length;
    if slots.start >= slots.end {
        return false;
    }
    segment.readable(BLOCK_BYTES..length).is_some_and(is_blank)
        || Prior::new(PriorContent::Checksums, segment).holds(slots)
}

fn is_blank(bytes: &[u8]) -> bool {
    // Every segment's blank rest is compared: by some cache lines, so that the processor takes as much as it can at once.
    let (parts, rest) = bytes.as_chunks::<256>();
    let any = |part: &[u8; 256]| {
        let (words, _) = part.as_chunks::<8>();
        words.iter().fold(0, |any, word| any | u64::from_ne_bytes(*word))
    };
    parts.iter().all(|part| any(part) == 0) && rest.iter().all(|byte| *byte == 0)
}
