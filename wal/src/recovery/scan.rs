//! Rebuilds the log from the bytes of its segments: a pure fold in the order of generations.
//!
//! The happy path: every segment continues the one before it, or cuts the log somewhere behind and continues there; the
//! slots of each are good up to a place where the segment's blank rest begins. The first slot that is not good is
//! a *stop*; what it means is decided when all the evidence is in: the rest of its segment, the later segments of
//! its epoch, the cuts and the hard state. A cut before the stop makes it irrelevant.

use super::prior::Prior;
use super::table::{EnvelopeEvidence, Evidence, ImageEvidence, Verdict, classify};
use crate::error::{Damage, DamageCause};
use crate::format::{
    BatchInfo, Cut, ENVELOPE_BYTES, Envelope, HardState, ImageError, LogStart, SectorChecksums,
    SegmentHeader, SegmentOrigin, named_chain, parse_image, read_envelope, slot_bytes, slots_start,
    table_sector_fits,
};
use crate::index::{Index, Place};
use crate::segment::SegmentName;
use ringraft_block::{BLOCK_BYTES, LogIndex, SECTOR_BYTES, Term};
use std::ops::Range;

/// A segment file in memory.
pub(crate) struct SegmentBytes<'a> {
    pub(crate) bytes: &'a [u8],
    /// Block-aligned ranges for which the device returned an error.
    pub(crate) unreadable: &'a [Range<usize>],
}

impl<'a> SegmentBytes<'a> {
    pub(super) fn readable(&self, range: Range<usize>) -> Option<&'a [u8]> {
        let lost = self.unreadable.iter().any(|lost| lost.start < range.end && range.start < lost.end);
        if lost { None } else { self.bytes.get(range) }
    }
}

/// A segment that was scanned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scanned {
    pub(crate) name: SegmentName,
    pub(crate) header: SegmentHeader,
}

/// What a scan found.
pub(crate) struct ScanOutcome {
    pub(crate) index: Index,
    /// All segments in order of generation.
    pub(crate) segments: Vec<Scanned>,
    /// Bytes that were written behind the end of the log and are dropped: a torn tail, never acknowledged.
    pub(crate) torn_bytes: u64,
    pub(crate) damage: Option<Damage>,
}

/// The first slot that is not good, with what is known about it so far.
struct Stop {
    name: SegmentName,
    place: Place,
    epoch: u64,
    /// The slot, when there is one to judge.
    slot: Option<BadSlot>,
    /// A segment behind it refers to one that is not there.
    segment_missing: bool,
    /// The highest `durable_through` of an intact envelope behind it in its epoch.
    durable_through: LogIndex,
    torn_bytes: u64,
}

#[derive(Clone, Copy)]
struct BadSlot {
    envelope: EnvelopeEvidence,
    image: ImageEvidence,
    /// Term and last index, from a valid envelope.
    identity: Option<(Term, LogIndex)>,
}

/// The fold.
pub(crate) struct LogScan {
    hard_state: HardState,
    index: Index,
    segments: Vec<Scanned>,
    epoch: u64,
    stop: Option<Stop>,
    /// Damage that no cut can make irrelevant.
    damage: Option<Damage>,
}

impl LogScan {
    pub(crate) fn new(hard_state: HardState) -> Self {
        Self {
            index: Index::new(hard_state.group, hard_state.start),
            hard_state,
            segments: Vec::new(),
            epoch: 0,
            stop: None,
            damage: None,
        }
    }

    /// Takes the next segment in the order of generations.
    pub(crate) fn segment(&mut self, name: SegmentName, header: SegmentHeader, bytes: &SegmentBytes<'_>) {
        let scanned = Scanned { name, header };
        let previous = self.segments.last().map(|segment| segment.header);
        self.segments.push(scanned);
        let continues = match header.origin {
            SegmentOrigin::Cut { cut, after } => {
                if previous.is_some_and(|previous| previous.generation == header.generation)
                    || header.epoch <= self.epoch
                {
                    self.damaged(name, header.generation, 0, DamageCause::SegmentHeader);
                    return;
                }
                self.cut(cut, Some(after), header.epoch);
                true
            }
            SegmentOrigin::Rollover { previous: expected } => {
                if previous.is_some_and(|previous| previous.generation == header.generation) {
                    self.damaged(name, header.generation, 0, DamageCause::SegmentHeader);
                    return;
                }
                let follows = |previous: SegmentHeader| {
                    previous.generation == expected && previous.epoch == header.epoch
                };
                // The first that is there: the one that holds the log's start, or the one behind it.
                let start = self.hard_state.start_generation;
                let anchored =
                    start > 0 && previous.is_none() && (header.generation == start || expected == start);
                if anchored {
                    self.epoch = header.epoch;
                }
                anchored || previous.is_some_and(follows)
            }
        };
        if header.epoch < self.epoch {
            // Its epoch was ended by a cut, and it lies behind that cut: nothing in it counts.
            return;
        }
        if !continues {
            // A later cut may still make this irrelevant: segments behind a cut are removed in any order.
            self.epoch = header.epoch;
            let stop = self.stop.get_or_insert(Stop {
                name,
                place: Place { generation: header.generation, offset: 0 },
                epoch: header.epoch,
                slot: None,
                segment_missing: true,
                durable_through: LogIndex(0),
                torn_bytes: 0,
            });
            stop.segment_missing = true;
        }
        self.slots(scanned, bytes);
    }

    /// All segments are in: the verdict.
    pub(crate) fn finish(mut self) -> ScanOutcome {
        if self.hard_state.epoch > self.epoch && self.hard_state.cut.index < self.hard_state.start.index {
            // What lies behind a cut was written to segments of its epoch, and the log starts there: one of them is in service
            // at any time.
            let cut = self.hard_state.cut;
            self.damaged(SegmentName::default(), cut.generation, cut.offset, DamageCause::SegmentMissing);
        } else if self.hard_state.epoch > self.epoch {
            // The process died between recording the cut and starting the segment.
            let cut = self.hard_state.cut;
            self.cut(cut, None, self.hard_state.epoch);
        }
        let end = self.index.end().index;
        let witness = self.hard_state.witness.max(self.hard_state.cut.index);
        let mut torn_bytes = 0;
        match self.stop.take() {
            Some(stop) => {
                let durable_through = stop.durable_through.max(witness);
                let acknowledged = durable_through > end;
                let verdict = stop.slot.map(|BadSlot { envelope, image, .. }| {
                    classify(Evidence { envelope, image, acknowledged })
                });
                let cause = match verdict {
                    Some(Verdict::Lost) => Some(DamageCause::Lost),
                    Some(Verdict::ImageRotten) => Some(DamageCause::ImageRotten),
                    Some(Verdict::EnvelopeRotten) => Some(DamageCause::EnvelopeRotten),
                    Some(Verdict::Misplaced) => Some(DamageCause::Misplaced),
                    // A good slot is no stop: it was pushed to the index.
                    None | Some(Verdict::Accept | Verdict::Torn) => {
                        stop.segment_missing.then_some(DamageCause::SegmentMissing)
                    }
                };
                let identity = stop.slot.and_then(|slot| slot.identity);
                torn_bytes = stop.torn_bytes;
                if let Some(cause) = cause {
                    self.damage.get_or_insert(Damage {
                        cause,
                        segment: stop.name.to_string(),
                        generation: stop.place.generation,
                        offset: stop.place.offset,
                        first: end.next(),
                        identity,
                        durable_through,
                    });
                }
            }
            None if witness > end => {
                // The log is whole as far as it goes, but it does not go far enough.
                let last = self.segments.last().copied();
                let name = last.map_or(SegmentName::default(), |segment| segment.name);
                let generation = last.map_or(0, |segment| segment.header.generation);
                self.damaged(name, generation, 0, DamageCause::SegmentMissing);
            }
            None => {}
        }
        ScanOutcome { index: self.index, segments: self.segments, torn_bytes, damage: self.damage }
    }

    /// Everything at or behind the cut is void. What lies before it was durable when the cut was recorded.
    fn cut(&mut self, cut: Cut, after: Option<LogStart>, epoch: u64) {
        self.index.truncate_at_place(Place { generation: cut.generation, offset: cut.offset });
        self.epoch = epoch;
        let end = self.index.end();
        let start = self.hard_state.start.index;
        if cut.index < start {
            // The log has been started anew behind this cut.
            self.stop = None;
            return;
        }
        let same_chain = end.index == start || after.is_none_or(|after| after.chain == end.chain);
        if end.index == cut.index && same_chain {
            self.stop = None;
            return;
        }
        match self.stop.as_mut() {
            // The stop lies before the cut: what was there had been durable.
            Some(stop) => stop.durable_through = stop.durable_through.max(cut.index),
            // A later cut may still make this irrelevant: segments behind a cut are removed one after the other.
            None if end.index < cut.index => {
                let name = self.segments.last().map_or(SegmentName::default(), |segment| segment.name);
                self.stop = Some(Stop {
                    name,
                    place: Place { generation: cut.generation, offset: cut.offset },
                    epoch,
                    slot: None,
                    segment_missing: true,
                    durable_through: cut.index,
                    torn_bytes: 0,
                });
            }
            None => {
                let name = self.segments.last().map_or(SegmentName::default(), |segment| segment.name);
                self.damaged(name, cut.generation, cut.offset, DamageCause::Misplaced);
            }
        }
    }

    /// Takes the slots of a segment of the present epoch.
    fn slots(&mut self, segment: Scanned, bytes: &SegmentBytes<'_>) {
        let length = bytes.bytes.len();
        let mut offset = slots_start(segment.header.segment_bytes) as usize;
        if self.damage.is_some() {
            return;
        }
        if segment.header.generation == self.hard_state.start_generation {
            match behind_start(self.hard_state.start.index, segment, bytes) {
                Ok(behind) => offset = behind,
                Err(doubtful) => {
                    let slot = BadSlot {
                        envelope: EnvelopeEvidence::Rotten,
                        image: ImageEvidence::Unreadable,
                        identity: None,
                    };
                    self.stop = Some(Stop {
                        name: segment.name,
                        place: Place { generation: segment.header.generation, offset: doubtful as u64 },
                        epoch: segment.header.epoch,
                        slot: Some(slot),
                        segment_missing: false,
                        durable_through: LogIndex(0),
                        torn_bytes: 0,
                    });
                    self.collect(segment, bytes, doubtful);
                    return;
                }
            }
        }
        if let Some(stop) = self.stop.take() {
            let slot = self.judge(segment, bytes, offset);
            let behind_blank = stop.slot.is_some_and(|slot| slot.envelope == EnvelopeEvidence::Prior);
            match slot {
                // The segment before was left when the next batch did not fit: this one goes on.
                Ok(_) => {}
                // Behind a blank end, the batch that follows may have been written here. Its evidence counts, except
                // when it is a later batch: then the one that follows belonged to the blank end.
                Err(slot)
                    if behind_blank
                        && slot.envelope != EnvelopeEvidence::Prior
                        && !self.is_later(segment, bytes, offset) =>
                {
                    let place = Place { generation: segment.header.generation, offset: offset as u64 };
                    self.stop = Some(Stop { name: segment.name, place, slot: Some(slot), ..stop });
                    self.collect(segment, bytes, offset);
                    return;
                }
                Err(_) => {
                    self.stop = Some(stop);
                    self.collect(segment, bytes, offset);
                    return;
                }
            }
        }
        while offset + BLOCK_BYTES <= length {
            match self.judge(segment, bytes, offset) {
                Ok(info) => {
                    let place = Place { generation: segment.header.generation, offset: offset as u64 };
                    self.index.push(&info, place);
                    offset += info.slot_bytes();
                }
                Err(slot) => {
                    self.stop = Some(Stop {
                        name: segment.name,
                        place: Place { generation: segment.header.generation, offset: offset as u64 },
                        epoch: segment.header.epoch,
                        slot: Some(slot),
                        segment_missing: false,
                        durable_through: LogIndex(0),
                        torn_bytes: 0,
                    });
                    self.collect(segment, bytes, offset);
                    return;
                }
            }
        }
    }

    /// Judges the slot at `offset` as the one that should hold the batch behind the end of the log.
    fn judge(&self, segment: Scanned, bytes: &SegmentBytes<'_>, offset: usize) -> Result<BatchInfo, BadSlot> {
        let image = ImageEvidence::Unreadable;
        let bad = |envelope| Err(BadSlot { envelope, image, identity: None });
        let Some(sector) = bytes.readable(offset..offset.saturating_add(ENVELOPE_BYTES)) else {
            return bad(EnvelopeEvidence::Unreadable);
        };
        let prior = Prior::new(segment.header.prior_content, bytes);
        if prior.holds(offset..offset + ENVELOPE_BYTES) {
            return bad(EnvelopeEvidence::Prior);
        }
        let Ok(envelope) = read_envelope(sector) else { return bad(EnvelopeEvidence::Rotten) };
        let end = self.index.end();
        let slot_end = offset.saturating_add(slot_bytes(envelope.image_bytes as usize));
        if !belongs(&envelope, &segment.header, offset)
            || envelope.first != end.index.next()
            || slot_end > bytes.bytes.len()
        {
            return bad(EnvelopeEvidence::Misplaced);
        }
        let (image, info) = match judge_image(&envelope, bytes, &prior, offset, end) {
            Ok(info) => (ImageEvidence::Good, Some(info)),
            Err(image) => (image, None),
        };
        let evidence = Evidence { envelope: EnvelopeEvidence::Valid, image, acknowledged: false };
        match (classify(evidence), info) {
            (Verdict::Accept, Some(info)) => Ok(info),
            _ => {
                let identity = Some((envelope.term, envelope.last));
                Err(BadSlot { envelope: EnvelopeEvidence::Valid, image, identity })
            }
        }
    }

    /// Whether the slot holds an intact envelope of this segment for a batch behind the one that follows.
    fn is_later(&self, segment: Scanned, bytes: &SegmentBytes<'_>, offset: usize) -> bool {
        bytes
            .readable(offset..offset.saturating_add(ENVELOPE_BYTES))
            .and_then(|sector| read_envelope(sector).ok())
            .is_some_and(|envelope| {
                belongs(&envelope, &segment.header, offset) && envelope.first > self.index.end().index.next()
            })
    }

    /// Adds what a segment holds from `offset` on to the evidence about the stop.
    fn collect(&mut self, segment: Scanned, bytes: &SegmentBytes<'_>, offset: usize) {
        let Some(stop) = self.stop.as_mut() else { return };
        if stop.epoch != segment.header.epoch {
            return;
        }
        let prior = Prior::new(segment.header.prior_content, bytes);
        for at in (offset..bytes.bytes.len()).step_by(BLOCK_BYTES) {
            let Some(block) = bytes.readable(at..at.saturating_add(BLOCK_BYTES)) else { continue };
            if !prior.holds(at..at + BLOCK_BYTES) {
                stop.torn_bytes += BLOCK_BYTES as u64;
            }
            if let Ok(envelope) = read_envelope(block)
                && belongs(&envelope, &segment.header, at)
            {
                stop.durable_through = stop.durable_through.max(envelope.durable_through);
            }
        }
    }

    fn damaged(&mut self, name: SegmentName, generation: u32, offset: u64, cause: DamageCause) {
        let damage = Damage {
            cause,
            segment: name.to_string(),
            generation,
            offset,
            first: self.index.end().index.next(),
            identity: None,
            durable_through: self.hard_state.witness.max(self.hard_state.cut.index),
        };
        self.damage.get_or_insert(damage);
    }
}

/// Where the slots behind the log's start begin in the segment that holds it. What the batches before it say does not matter any
/// more, so their envelopes only lead the way; where one of them is damaged, the way is found again at the next intact
/// one. When the last of them is damaged and the batch behind the start is not found either, the first damaged place.
fn behind_start(start: LogIndex, segment: Scanned, bytes: &SegmentBytes<'_>) -> Result<usize, usize> {
    let mut offset = slots_start(segment.header.segment_bytes) as usize;
    let mut doubtful = offset;
    while offset + BLOCK_BYTES <= bytes.bytes.len() {
        let sector = bytes.readable(offset..offset + ENVELOPE_BYTES);
        let envelope = sector.and_then(|sector| read_envelope(sector).ok());
        match envelope.filter(|envelope| belongs(envelope, &segment.header, offset)) {
            Some(envelope) if envelope.last > start => return Ok(offset),
            Some(envelope) => {
                offset += slot_bytes(envelope.image_bytes as usize);
                doubtful = offset;
                if envelope.last == start {
                    return Ok(offset);
                }
            }
            None => offset += BLOCK_BYTES,
        }
    }
    Err(doubtful)
}

/// Whether an intact envelope was written for this place in this life of the segment.
pub(crate) fn belongs(envelope: &Envelope, header: &SegmentHeader, offset: usize) -> bool {
    envelope.cluster == header.cluster
        && envelope.group == header.group
        && envelope.nonce == header.nonce
        && envelope.generation == header.generation
        && envelope.epoch == header.epoch
        && envelope.boot == header.boot
        && envelope.offset == offset as u64
}

/// Judges the image behind a valid envelope, sector by sector if need be.
fn judge_image(
    envelope: &Envelope,
    bytes: &SegmentBytes<'_>,
    prior: &Prior<'_>,
    offset: usize,
    end: LogStart,
) -> Result<BatchInfo, ImageEvidence> {
    let start = offset + ENVELOPE_BYTES;
    let image_bytes = envelope.image_bytes as usize;
    let sector_range = |ordinal: usize| {
        let at = start + ordinal * SECTOR_BYTES;
        at..at + SECTOR_BYTES
    };
    // A sector counts as never written when all of it is prior; the last one's padding is prior in any case.
    let prior = |ordinal: usize| prior.holds(sector_range(ordinal));
    let whole = bytes.readable(start..start + image_bytes);
    // Where the device returned errors the buffer holds zeros, so those sectors just fail their checksums.
    let image = bytes.bytes.get(start..start + image_bytes).ok_or(ImageEvidence::Misplaced)?;

    // Prior content proves that a sector was not written only where the new content differs. In a blank segment it always does for
    // the header's sector and those of the checksum table. In a recycled one the former life may have held this very batch
    // at this very place (cut off, and sent again by the leader): then all its sectors are prior and right, and those that
    // are not are rotten. The header names its chain, and a checksum fits only the batch that it was made for, so
    // these sectors say themselves whether they are of this batch.
    if prior(0) && named_chain(image) != Some(envelope.chain) {
        return Err(ImageEvidence::PriorRemains);
    }
    let of_this_batch =
        |sector: usize| table_sector_fits(image, envelope.group, envelope.term, envelope.first, sector);
    let mut table = SectorChecksums::table_sectors(image_bytes).filter(|sector| *sector > 0);
    if table.any(|sector| prior(sector) && !of_this_batch(sector)) {
        return Err(ImageEvidence::PriorRemains);
    }
    let otherwise = if whole.is_some() { ImageEvidence::Rotten } else { ImageEvidence::Unreadable };
    let sectors = SectorChecksums::of(image).map_err(|_| otherwise)?;
    let mut bad = (0..sectors.count()).filter(|ordinal| !sectors.is_good(*ordinal)).peekable();
    if bad.peek().is_some() {
        return Err(if bad.any(prior) { ImageEvidence::PriorRemains } else { otherwise });
    }
    if whole.is_none() {
        return Err(otherwise);
    }
    let view = parse_image(image).map_err(|error| match error {
        ImageError::SectorChecksum(_) | ImageError::HeaderChecksum => ImageEvidence::Rotten,
        _ => ImageEvidence::Misplaced,
    })?;
    let info = view.info();
    let named = info.group == envelope.group
        && info.term == envelope.term
        && info.first == envelope.first
        && info.last == envelope.last
        && info.chain == envelope.chain
        && info.image_bytes == envelope.image_bytes;
    if !named || info.term < end.term || !view.verify_chain(end.chain) {
        return Err(ImageEvidence::Misplaced);
    }
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Chain, PriorContent};
    use ringraft_block::{ClusterId, GroupId, Incarnation, NodeId};

    #[test]
    fn an_envelope_belongs_only_where_every_part_of_its_place_agrees() {
        let header = SegmentHeader {
            cluster: ClusterId(1),
            node: NodeId(1),
            incarnation: Incarnation(1),
            segment_bytes: 1 << 20,
            nonce: 2,
            epoch: 3,
            boot: 4,
            generation: 5,
            group: GroupId(6),
            prior_content: PriorContent::Zeros,
            origin: SegmentOrigin::Rollover { previous: 4 },
        };
        let envelope = Envelope {
            cluster: ClusterId(1),
            nonce: 2,
            generation: 5,
            group: GroupId(6),
            offset: 8192,
            epoch: 3,
            boot: 4,
            durable_through: LogIndex(0),
            term: Term(1),
            first: LogIndex(1),
            last: LogIndex(1),
            chain: Chain::default(),
            image_bytes: 300,
        };
        assert!(belongs(&envelope, &header, 8192));
        for elsewhere in [
            Envelope { cluster: ClusterId(2), ..envelope },
            Envelope { nonce: 9, ..envelope },
            Envelope { generation: 9, ..envelope },
            Envelope { group: GroupId(9), ..envelope },
            Envelope { offset: 12_288, ..envelope },
            Envelope { epoch: 9, ..envelope },
            Envelope { boot: 9, ..envelope },
        ] {
            assert!(!belongs(&elsewhere, &header, 8192), "{elsewhere:?}");
        }
    }
}
