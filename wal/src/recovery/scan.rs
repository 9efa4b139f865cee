//! Rebuilds the log from the bytes of its segments: a pure fold in the order of generations.
//!
//! The happy path: every segment continues the one before it, or cuts the log somewhere behind and continues there; the
//! slots of each are good up to a place where the segment's blank rest begins.
//!
//! A batch whose envelope alone is intact is kept and flagged: the envelope names its length and chain, so the fold goes on
//! behind it. Whether it was torn or lost may depend on evidence that comes later (the rest of its segment, the later segments of
//! its epoch, the cuts and the hard state): then it is *open* until its epoch ends.
//!
//! The first slot of which not even the batch is known is a *stop*: blank where the log ended, or damage. The log ends there,
//! but the fold goes on: it looks for the next intact envelope and follows the batches behind it ([`Beyond`]). What is intact
//! there is salvage, and where it ends says what the log held before the damage: the claim. A cut before the stop, or a batch that
//! provably continues the log, makes the stop irrelevant.

use super::arrival::Verified;
use super::placement::has_own_slot;
use super::prior::Prior;
use super::table::{Disposition, EnvelopeEvidence, Evidence, ImageEvidence, dispose};
use crate::error::{Damage, DamageCause, WalError};
use crate::format::{
    BatchInfo, BatchKind, BatchView, Claim, Cut, ENVELOPE_BYTES, Envelope, HardState, ImageError, LogStart,
    SectorChecksums, SegmentHeader, SegmentOrigin, envelope_place, named_chain, parse_image, read_envelope,
    slot_bytes, slots_start, table_sector_fits,
};
use crate::index::{Index, Place};
use crate::salvage::Salvaged;
use crate::segment::SegmentName;
use ringraft_block::{BLOCK_BYTES, ClusterId, LogIndex, SECTOR_BYTES, Term};
use std::ops::Range;

/// A segment file in memory.
pub(crate) struct SegmentBytes<'a> {
    pub(crate) bytes: &'a [u8],
    /// Block-aligned ranges for which the device returned an error.
    pub(crate) unreadable: &'a [Range<usize>],
    /// Images in it that were verified when they arrived.
    pub(crate) verified: &'a Verified,
}

impl<'a> SegmentBytes<'a> {
    pub(super) fn readable(&self, range: Range<usize>) -> Option<&'a [u8]> {
        let lost = self.unreadable.iter().any(|lost| lost.start < range.end && range.start < lost.end);
        if lost { None } else { self.bytes.get(range) }
    }

    /// The intact envelope at `offset`, if it was written for this offset.
    pub(super) fn envelope(&self, offset: usize) -> Option<Envelope> {
        let sector = self.readable(offset..offset.saturating_add(ENVELOPE_BYTES))?;
        read_envelope(sector).ok().filter(|envelope| envelope.offset == offset as u64)
    }

    /// Says so when the slot at `offset` is intact, was written there, and by a build whose format this one does not know. Bytes
    /// of a command may look like an envelope: so it must name the place, and, where the segment's header is known, its life.
    pub(super) fn foreign(
        &self,
        name: SegmentName,
        offset: usize,
        cluster: ClusterId,
        life: Option<(u32, u64)>,
    ) -> Option<WalError> {
        let start = offset.saturating_add(ENVELOPE_BYTES);
        let sector = self.readable(offset..start)?;
        let place = envelope_place(sector)?;
        let is_here = place.cluster == cluster && place.offset == offset as u64;
        if !is_here || life.is_some_and(|life| life != (place.generation, place.nonce)) {
            return None;
        }
        let (file, offset) = (name.to_string(), offset as u64);
        match read_envelope(sector) {
            Ok(envelope) => {
                let image = self.readable(start..start.saturating_add(envelope.image_bytes as usize))?;
                let error = parse_image(image).err().filter(ImageError::is_foreign)?;
                Some(WalError::ImageForeign { file, offset, error })
            }
            Err(error) if error.is_foreign() => Some(WalError::EnvelopeForeign { file, offset, error }),
            Err(_) => None,
        }
    }

    /// The first such slot of a segment whose header is not known. Within a known slot there is none.
    pub(super) fn first_foreign(&self, name: SegmentName, cluster: ClusterId) -> Option<WalError> {
        let mut at = 0;
        while at < self.bytes.len() {
            let foreign = self.foreign(name, at, cluster, None);
            if foreign.is_some() {
                return foreign;
            }
            let known = self.envelope(at).filter(|envelope| envelope.cluster == cluster);
            at += known.map_or(BLOCK_BYTES, |envelope| slot_bytes(envelope.image_bytes as usize));
        }
        None
    }
}

/// A segment that was scanned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scanned {
    pub(crate) name: SegmentName,
    /// As it stands in the file, or, when that is damaged, what the envelopes in the segment say of it.
    pub(crate) header: SegmentHeader,
    /// The header is damaged, so what the segment follows is not known.
    pub(crate) header_lost: bool,
}

/// What a scan found.
pub(crate) struct ScanOutcome {
    /// The log, with its damaged batches flagged.
    pub(crate) index: Index,
    /// All segments in order of generation.
    pub(crate) segments: Vec<Scanned>,
    /// Bytes that were written behind the end of the log and are dropped: a torn tail, never acknowledged.
    pub(crate) torn_bytes: u64,
    pub(crate) damage: Vec<Damage>,
    /// Blocks that could not be read, wherever they lie.
    pub(crate) unread_blocks: usize,
    /// The claim that is in force from now on: an earlier one, a new one, or both in one.
    pub(crate) claim: Option<Claim>,
    /// The epoch that began under it; 0 when it begins with the next.
    pub(crate) claim_epoch: u64,
    pub(crate) claim_cut: LogIndex,
    /// The claim may be settled by a later start that can read more.
    pub(crate) claim_may_settle: bool,
    /// Under a claim: the intact batches that the log held behind its end.
    pub(crate) salvage: Vec<Salvaged>,
}

/// The first slot of which not even the batch is known.
struct Stop {
    name: SegmentName,
    place: Place,
    epoch: u64,
    slot: SlotEvidence,
    /// What is there is not the question: a segment before it is missing or its header is lost.
    cause: Option<DamageCause>,
}

#[derive(Clone, Copy)]
struct SlotEvidence {
    envelope: EnvelopeEvidence,
    image: ImageEvidence,
}

/// What the slot at an offset is to the log, or to the batches behind its damage.
enum Judged {
    /// It lies before the log's start, and takes so many bytes.
    Below(usize),
    /// It holds the batch that follows (or, where nothing is followed, a batch).
    Batch {
        info: BatchInfo,
        image: ImageEvidence,
        durable_through: LogIndex,
    },
    Bad(SlotEvidence),
}

/// Batches that were dropped if nothing later vouches for them: the log was torn in front of them.
#[derive(Clone, Copy)]
struct Open {
    first: LogIndex,
    /// The end of the batch before; `None` when that is not known.
    before: Option<LogStart>,
    /// Nothing was written there, so what follows may stand in the next segment.
    blank: bool,
}

/// The batches behind a stop.
#[derive(Default)]
struct Beyond {
    /// The end of the batches that are followed; `None` when there are none yet.
    end: Option<LogStart>,
    /// The last slot that was looked at leaves open how the log went on.
    lost_track: bool,
    open: Vec<Open>,
    torn_bytes: u64,
}

/// The fold.
pub(crate) struct LogScan {
    hard_state: HardState,
    index: Index,
    /// What the images of the flagged batches looked like, by first index.
    damaged: Vec<(LogIndex, SlotEvidence)>,
    segments: Vec<Scanned>,
    epoch: u64,
    /// The highest index that an intact envelope of this epoch, or a cut, vouches for.
    durable_through: LogIndex,
    /// Kept batches that may turn out torn.
    open: Vec<Open>,
    stop: Option<Stop>,
    beyond: Beyond,
    /// All batches behind stops, those with a damaged image too.
    salvage: Vec<Salvaged>,
    /// `salvage` before this epoch.
    salvage_before: usize,
    /// Damage that says nothing of its place in the log, so that what the log held is not certain.
    doubts: Vec<Damage>,
    /// Something was appended since the claim that is in force, or was damaged there.
    went_on_under_claim: bool,
    /// How many blocks could not be read, and the last of them.
    unread_blocks: usize,
    unread: Option<Place>,
    /// The highest term and index that any intact envelope of this log names.
    highest_term: Term,
    highest_last: LogIndex,
    /// A batch that another build has written.
    foreign: Option<WalError>,
}

impl LogScan {
    pub(crate) fn new(hard_state: HardState) -> Self {
        Self {
            index: Index::new(hard_state.group, hard_state.start),
            hard_state,
            damaged: Vec::new(),
            segments: Vec::new(),
            epoch: 0,
            durable_through: LogIndex(0),
            open: Vec::new(),
            stop: None,
            beyond: Beyond::default(),
            salvage: Vec::new(),
            salvage_before: 0,
            doubts: Vec::new(),
            went_on_under_claim: false,
            unread_blocks: 0,
            unread: None,
            highest_term: Term(0),
            highest_last: LogIndex(0),
            foreign: None,
        }
    }

    /// The first batch that another build has written: with it the scan has ended, and says nothing.
    pub(crate) fn take_foreign(&mut self) -> Option<WalError> {
        self.foreign.take()
    }

    /// Takes note of a file of the log that cannot be placed: it may have held any batch, the last ones too.
    pub(crate) fn unplaced(&mut self, name: SegmentName, generation: u32) {
        self.doubt(name, generation, 0, DamageCause::SegmentHeader);
    }

    /// Takes the next segment in the order of generations.
    pub(crate) fn segment(&mut self, scanned: Scanned, bytes: &SegmentBytes<'_>) {
        let Scanned { name, header, header_lost } = scanned;
        let previous = self.segments.last().map(|segment| segment.header);
        self.segments.push(scanned);
        for range in bytes.unreadable {
            self.unread_blocks += range.len().div_ceil(BLOCK_BYTES);
            self.unread = Some(Place { generation: header.generation, offset: range.start as u64 });
        }
        if previous.is_some_and(|previous| previous.generation == header.generation) {
            self.doubt(name, header.generation, 0, DamageCause::SegmentHeader);
            return;
        }
        if header.epoch < self.epoch {
            // Its epoch was ended by a cut, and it lies behind that cut: nothing in it counts.
            return;
        }
        self.leave_what_the_claim_left(header.epoch);
        if header_lost {
            if header.epoch > self.epoch {
                self.end_epoch(header.epoch);
                self.cut_where_it_continues(scanned, bytes);
                self.keep_aside_what_the_newest_cut_voided();
            }
            self.stop_before(scanned, DamageCause::SegmentHeader);
        } else {
            match header.origin {
                SegmentOrigin::Cut { .. } if header.epoch <= self.epoch => {
                    self.doubt(name, header.generation, 0, DamageCause::SegmentHeader);
                    return;
                }
                SegmentOrigin::Cut { cut, after } => self.cut(cut, Some(after), header.epoch),
                SegmentOrigin::Rollover { previous: expected } => {
                    let continues = previous.is_some_and(|previous| {
                        previous.generation == expected && previous.epoch == header.epoch
                    });
                    if header.epoch > self.epoch {
                        // The segment that tells where this epoch cut the log is missing. Of the newest epoch the hard
                        // state knows it.
                        self.end_epoch(header.epoch);
                        let HardState { epoch, cut, start, .. } = &self.hard_state;
                        if *epoch == header.epoch && cut.index >= start.index {
                            self.cut(*cut, None, header.epoch);
                        }
                    }
                    // Segments before the log's start are removed in order, and not missed.
                    if !continues && !self.is_before_start() {
                        self.stop_before(scanned, DamageCause::SegmentMissing);
                    }
                }
            }
        }
        self.slots(scanned, bytes);
    }

    /// All segments are in: the verdict.
    pub(crate) fn finish(mut self) -> ScanOutcome {
        if self.hard_state.epoch > self.epoch && self.hard_state.cut.index < self.hard_state.start.index {
            // What lies behind a cut was written to segments of its epoch, and the log starts there: one of them is in service
            // at any time.
            let cut = self.hard_state.cut;
            self.epoch = self.hard_state.epoch;
            self.doubt(SegmentName::default(), cut.generation, cut.offset, DamageCause::SegmentMissing);
        } else if self.hard_state.epoch > self.epoch {
            // The process died between recording the cut and starting the segment.
            let cut = self.hard_state.cut;
            self.cut(cut, None, self.hard_state.epoch);
        }
        let witness = self.hard_state.witness.max(self.hard_state.cut.index);
        self.durable_through = self.durable_through.max(witness);
        let torn_bytes = self.drop_torn();
        let mut damage = self.known_damage();
        let end = self.index.end().index;
        let durable_through = self.durable_through;
        // A sector that cannot be read proves nothing.
        let unread = |stop: &Stop| stop.slot.envelope == EnvelopeEvidence::Unreadable && stop.cause.is_none();
        let least = if self.stop.as_ref().is_some_and(|stop| !unread(stop)) { end.next() } else { end };
        // All that is wrong is one block that cannot be read, at the very slot behind the log.
        let is_only_unread = damage.is_empty()
            && self.doubts.is_empty()
            && self.unread_blocks == 1
            && self.unread.is_some()
            && self.unread == self.index.end_place()
            && self.stop.as_ref().is_some_and(|stop| unread(stop) && Some(stop.place) == self.unread);
        let cut_short = match self.stop.take() {
            Some(stop) => Some(Damage {
                cause: self.cause_of(&stop).unwrap_or(DamageCause::Lost),
                segment: stop.name.to_string(),
                generation: stop.place.generation,
                offset: stop.place.offset,
                first: end.next(),
                identity: None,
                durable_through,
            }),
            None if durable_through > end => {
                // The log is whole as far as it goes, but it does not go far enough.
                let last = self.segments.last().copied();
                Some(Damage {
                    cause: DamageCause::SegmentMissing,
                    segment: last.map_or(SegmentName::default(), |segment| segment.name).to_string(),
                    generation: last.map_or(0, |segment| segment.header.generation),
                    offset: 0,
                    first: end.next(),
                    identity: None,
                    durable_through,
                })
            }
            None => None,
        };
        let mut salvage = std::mem::take(&mut self.salvage);
        let HardState { mut claim_epoch, mut claim_cut, mut claim_may_settle, .. } = self.hard_state;
        let claim = if cut_short.is_some() || !self.doubts.is_empty() {
            claim_cut = end;
            let claim = merge(self.hard_state.claim, self.claim(cut_short.is_some(), least));
            claim_may_settle = self.hard_state.claim.is_none() && is_only_unread && !claim.certain;
            if self.went_on_under_claim {
                // The log went on where the salvage of the earlier claim had been, and is damaged again: that salvage is not
                // what lay behind this cut.
                let (epoch, cut) = (self.hard_state.claim_epoch, self.hard_state.claim_cut);
                salvage
                    .retain(|batch| self.epoch_of(batch.place.generation) >= epoch || batch.info.last <= cut);
                claim_epoch = 0;
                Some(Claim { certain: false, ..claim })
            } else {
                Some(claim)
            }
        } else {
            self.hard_state.claim
        };
        damage.extend(cut_short);
        damage.append(&mut self.doubts);
        salvage.retain(|batch| claim.is_some() && batch.intact);
        // Of several for one index, the one that was written last.
        salvage.sort_by_key(|batch| (batch.info.first, std::cmp::Reverse(batch.place)));
        salvage.dedup_by_key(|batch| batch.info.first);
        ScanOutcome {
            index: self.index,
            segments: self.segments,
            torn_bytes,
            damage,
            unread_blocks: self.unread_blocks,
            claim,
            claim_epoch,
            claim_cut,
            claim_may_settle,
            salvage,
        }
    }

    /// What the log held before it was cut short. Certain only when the batches behind the damage can be followed to where the log
    /// ended as a log does, nothing vouches for more, the epoch that was the last one has left its segment, and there
    /// is no file that cannot be placed. A certain claim that is too low would let the node vote away what it acknowledged, so
    /// each of these says no in doubt. `least`: the lowest index that damage proves was written.
    fn claim(&self, cut_short: bool, least: LogIndex) -> Claim {
        let Beyond { end, lost_track, open, .. } = &self.beyond;
        let torn = open.iter().find(|open| self.durable_through < open.first);
        let end = match torn {
            Some(open) => open.before,
            None => end.filter(|_| !lost_track),
        };
        let newest = self.segments.iter().any(|segment| segment.header.epoch == self.hard_state.epoch);
        match end.filter(|end| end.index >= self.durable_through) {
            Some(end) if cut_short && newest && self.doubts.is_empty() => {
                Claim { term: end.term, last: end.index, certain: true }
            }
            _ => {
                let end = self.index.end();
                Claim {
                    term: self.hard_state.term.max(self.highest_term).max(end.term),
                    last: self.durable_through.max(self.highest_last).max(least),
                    certain: false,
                }
            }
        }
    }

    /// The damage that a stop is; `None` when the log ended there as a log does.
    fn cause_of(&self, stop: &Stop) -> Option<DamageCause> {
        let SlotEvidence { envelope, image } = stop.slot;
        let acknowledged = self.durable_through > self.index.end().index;
        match dispose(Evidence { envelope, image, acknowledged }) {
            Disposition::Cut(cause) | Disposition::KeepDamaged(cause) => stop.cause.or(Some(cause)),
            Disposition::Keep | Disposition::End => stop.cause,
        }
    }

    /// Ends the log where it was torn, if it was: in front of the first batch that is incomplete and that nothing vouches for, or
    /// at a blank slot. What lies behind in this epoch was never acknowledged. Returns the bytes of it.
    fn drop_torn(&mut self) -> u64 {
        let mut torn_bytes = 0;
        let torn = self.open.iter().find(|open| self.durable_through < open.first).map(|open| open.first);
        if let Some(first) = torn {
            let kept = self.index.ordinal_starting_at(first).unwrap_or(usize::MAX);
            let dropped = (kept..self.index.len()).map_while(|ordinal| self.index.at(ordinal));
            torn_bytes = dropped.map(|(info, _)| info.slot_bytes() as u64).sum();
            self.truncate_after(first.previous());
        }
        let ended = self.stop.as_ref().is_some_and(|stop| self.cause_of(stop).is_none());
        if torn.is_some() || ended {
            torn_bytes += self.beyond.torn_bytes;
            self.resume();
            self.salvage.truncate(self.salvage_before);
        }
        self.open.clear();
        torn_bytes
    }

    /// Flags the damaged batches of the log, now that their causes are known.
    fn known_damage(&mut self) -> Vec<Damage> {
        let mut all = Vec::new();
        for (first, SlotEvidence { envelope, image }) in std::mem::take(&mut self.damaged) {
            let acknowledged = self.durable_through >= first;
            let Disposition::KeepDamaged(cause) = dispose(Evidence { envelope, image, acknowledged }) else {
                continue;
            };
            let Some((info, place)) = self.index.containing(first) else { continue };
            let segment = self.segments.iter().find(|segment| segment.header.generation == place.generation);
            self.index.damage(first, cause);
            all.push(Damage {
                cause,
                segment: segment.map_or(SegmentName::default(), |segment| segment.name).to_string(),
                generation: place.generation,
                offset: place.offset,
                first,
                identity: Some((info.term, info.last)),
                durable_through: self.durable_through,
            });
        }
        all
    }

    // Between the segments.

    /// Everything at or behind the cut is void. What lies before it was durable when the cut was recorded.
    fn cut(&mut self, cut: Cut, after: Option<LogStart>, epoch: u64) {
        let at = Place { generation: cut.generation, offset: cut.offset };
        match self.claim_epoch() {
            Some(claim_epoch) if epoch >= claim_epoch => self.cut_under_claim(cut.index, at, claim_epoch),
            _ => self.salvage.retain(|batch| batch.place < at),
        }
        self.index.truncate_at_place(at);
        self.truncate_after(self.index.end().index);
        self.open.clear();
        self.beyond.open.clear();
        self.epoch = epoch;
        self.durable_through = cut.index;
        self.salvage_before = self.salvage.len();
        let start = self.hard_state.start.index;
        if cut.index < start {
            // The log has been started anew behind this cut.
            self.resume();
            return;
        }
        let end = self.index.end().index;
        let found = self.index.chain_at(cut.index);
        let same_log = cut.index == start || after.is_none_or(|after| found == Some(after.chain));
        if end == cut.index && same_log {
            self.resume();
            return;
        }
        if end > cut.index && after.is_some() && found.is_some() && same_log {
            // What an earlier cut had voided was not removed yet, and the segment that tells of that cut is gone.
            self.truncate_after(cut.index);
            self.resume();
            return;
        }
        // A batch that the cut vouches for is not there, or others are. Those are void, as far as can be told.
        let kept = if same_log { cut.index } else { LogIndex(cut.index.get().saturating_sub(1)) };
        if end > kept {
            let inside = self.index.containing(kept).filter(|(info, _)| info.last != kept);
            self.truncate_after(inside.map_or(kept, |(info, _)| info.first.previous()));
        }
        let cause = if end < cut.index { DamageCause::SegmentMissing } else { DamageCause::Misplaced };
        // A later cut may still make this irrelevant: segments behind a cut are removed one after the other.
        let name = self.segments.last().map_or(SegmentName::default(), |segment| segment.name);
        let slot = SlotEvidence { envelope: EnvelopeEvidence::Prior, image: ImageEvidence::Unreadable };
        self.stop.get_or_insert(Stop { name, place: at, epoch, slot, cause: Some(cause) });
        self.beyond.end = match after {
            Some(after) => Some(LogStart { index: cut.index, ..after }),
            None => self
                .salvage
                .iter()
                .find(|batch| batch.info.last == cut.index && batch.place < at)
                .map(|batch| end_of(&batch.info)),
        };
        self.beyond.lost_track = self.beyond.end.is_none();
    }

    /// A cut since the claim that is in force. What the claim left in the older segments is not void, even if it can be read again;
    /// until a leader cuts off a part of the log that it continued. What was appended since is void behind a cut.
    fn cut_under_claim(&mut self, index: LogIndex, at: Place, claim_epoch: u64) {
        self.move_aside(at);
        let mut salvage = std::mem::take(&mut self.salvage);
        let stays = index >= self.hard_state.claim_cut;
        salvage.retain(|batch| {
            if self.epoch_of(batch.place.generation) < claim_epoch { stays } else { batch.place < at }
        });
        self.salvage = salvage;
    }

    /// The first segment of an epoch that began under the claim that is in force: if the log starts at or behind where the claim
    /// cut it, all of the log is there, whether or not the segment that tells of that cut is.
    fn leave_what_the_claim_left(&mut self, epoch: u64) {
        let is_first = self.claim_epoch().is_some_and(|began| self.epoch < began && epoch >= began);
        if is_first && self.hard_state.start.index >= self.hard_state.claim_cut {
            let all = Place { generation: 0, offset: 0 };
            self.move_aside(all);
            self.index.truncate_at_place(all);
            self.truncate_after(self.index.end().index);
            self.resume();
        }
    }

    /// The batches of the log at or behind a place count as salvage.
    fn move_aside(&mut self, at: Place) {
        let cut_off = self.index.ordinal_at_place(at)..self.index.len();
        for (info, place) in cut_off.map_while(|ordinal| self.index.at(ordinal)) {
            let intact = self.damaged.iter().all(|(damaged, _)| *damaged != info.first);
            self.salvage.push(Salvaged { info, place, intact });
        }
    }

    /// An epoch begins whose cut is not known.
    fn end_epoch(&mut self, next: u64) {
        self.drop_torn();
        self.epoch = next;
        self.durable_through = LogIndex(0);
        self.salvage_before = self.salvage.len();
        self.beyond.open.clear();
        self.beyond.lost_track = true;
    }

    /// A segment whose header is lost opens an epoch: if it is the newest, the hard state knows where that cut the log. What is
    /// void counts as salvage, since a later start, whose hard state knows a later cut only, finds it so.
    fn keep_aside_what_the_newest_cut_voided(&mut self) {
        let HardState { epoch, cut, start, .. } = &self.hard_state;
        if *epoch != self.epoch || cut.index < start.index {
            return;
        }
        let at = Place { generation: cut.generation, offset: cut.offset };
        self.move_aside(at);
        self.index.truncate_at_place(at);
        self.truncate_after(self.index.end().index);
        self.salvage_before = self.salvage.len();
    }

    /// A segment whose header is lost opens an epoch: where its first batch continues the log tells where the log had been cut.
    fn cut_where_it_continues(&mut self, segment: Scanned, bytes: &SegmentBytes<'_>) {
        let offset = slots_start(segment.header.segment_bytes) as usize;
        let Some(envelope) = self.known(segment, bytes, offset) else { return };
        let previous = envelope.first.previous();
        let image = offset + ENVELOPE_BYTES..offset + ENVELOPE_BYTES + envelope.image_bytes as usize;
        let Some(chain) = self.index.chain_at(previous) else { return };
        let Some(image) = bytes.readable(image) else { return };
        if SectorChecksums::of(image).is_ok_and(|image| image.verify_chain(chain)) {
            self.truncate_after(previous);
            self.resume();
        }
    }

    /// The log cannot be followed into a segment: another one is missing, or nobody knows what this one follows.
    fn stop_before(&mut self, segment: Scanned, cause: DamageCause) {
        let slot = SlotEvidence { envelope: EnvelopeEvidence::Prior, image: ImageEvidence::Unreadable };
        let place = Place { generation: segment.header.generation, offset: 0 };
        let is_damage = self.stop.as_ref().is_some_and(|stop| self.cause_of(stop).is_some());
        if !is_damage {
            let epoch = segment.header.epoch;
            self.stop = Some(Stop { name: segment.name, place, epoch, slot, cause: Some(cause) });
        }
        self.beyond.lost_track = true;
        // A log that looks torn before that may have gone on, and been vouched for, in what is missing.
        self.beyond.open.clear();
    }

    /// The stop is irrelevant.
    fn resume(&mut self) {
        self.stop = None;
        self.beyond = Beyond::default();
    }

    fn truncate_after(&mut self, index: LogIndex) {
        if index < self.index.end().index {
            self.index.truncate_after(index);
        }
        self.damaged.retain(|(first, _)| *first <= index);
        self.open.retain(|open| open.first <= index);
    }

    /// The epoch that began under the claim that is in force already.
    fn claim_epoch(&self) -> Option<u64> {
        self.hard_state.claim.map(|_| self.hard_state.claim_epoch)
    }

    fn is_under_claim(&self, segment: Scanned) -> bool {
        self.claim_epoch().is_some_and(|epoch| segment.header.epoch >= epoch)
    }

    fn epoch_of(&self, generation: u32) -> u64 {
        let segment = self.segments.iter().rev().find(|segment| segment.header.generation == generation);
        segment.map_or(0, |segment| segment.header.epoch)
    }

    /// Whether no batch behind the log's start was found yet.
    fn is_before_start(&self) -> bool {
        self.index.is_empty() && self.hard_state.start.index.get() > 0
    }

    // Within a segment.

    /// Takes the slots of a segment of the present epoch.
    fn slots(&mut self, segment: Scanned, bytes: &SegmentBytes<'_>) {
        let generation = segment.header.generation;
        let mut offset = slots_start(segment.header.segment_bytes) as usize;
        let mut is_first = true;
        while offset + BLOCK_BYTES <= bytes.bytes.len() {
            let place = Place { generation, offset: offset as u64 };
            match self.judge_next(segment, bytes, place, is_first) {
                Judged::Below(bytes) => offset += bytes,
                Judged::Batch { info, image, durable_through } => {
                    if image != ImageEvidence::Good {
                        self.look_for_foreign(segment, bytes, offset);
                    }
                    self.went_on_under_claim |= self.is_under_claim(segment);
                    self.durable_through = self.durable_through.max(durable_through);
                    self.highest_term = self.highest_term.max(info.term);
                    self.highest_last = self.highest_last.max(info.last);
                    if self.stop.is_none() {
                        self.take(&info, place, image);
                    } else {
                        self.take_beyond(segment, &info, place, image);
                    }
                    offset += info.slot_bytes();
                }
                Judged::Bad(slot) => {
                    self.went_on_under_claim |=
                        slot.envelope != EnvelopeEvidence::Prior && self.is_under_claim(segment);
                    self.bad(segment, place, slot, is_first);
                    if slot.envelope != EnvelopeEvidence::Prior {
                        self.look_for_foreign(segment, bytes, offset);
                    }
                    let Some(at) = self.find_known(segment, bytes, offset) else { return };
                    offset = at;
                }
            }
            is_first = false;
        }
        // Without its header, nobody knows whether the segment ended where the file does.
        self.beyond.lost_track |= segment.header_lost;
    }

    /// Judges a slot: as the one that holds the batch behind the end of the log, or, behind a stop, as one of those behind it. A
    /// slot behind a stop that continues the log nevertheless takes the log up again.
    fn judge_next(
        &mut self,
        segment: Scanned,
        bytes: &SegmentBytes<'_>,
        place: Place,
        is_first: bool,
    ) -> Judged {
        let Some(stop) = &self.stop else {
            return self.judge(segment, bytes, place, Some(self.index.end()));
        };
        let before_start = self.is_before_start();
        if !segment.header_lost && (is_first || before_start) {
            let judged = self.judge(segment, bytes, place, Some(self.index.end()));
            let same_epoch = stop.cause.is_none() && stop.epoch == segment.header.epoch;
            let continues = match judged {
                // It names the end of the log by its chain, so nothing lies between.
                Judged::Batch { image: ImageEvidence::Good, .. } | Judged::Below(_) => true,
                // It has the next index, and an epoch writes an index once.
                Judged::Batch { .. } => same_epoch || before_start,
                Judged::Bad(_) => false,
            };
            if continues {
                self.resume();
                return judged;
            }
            // Behind a blank end, the batch that follows may have been written here. The evidence about it counts,
            // except when this is a later batch: then the one that follows belonged to the blank end.
            let is_later = self
                .known(segment, bytes, place.offset as usize)
                .is_some_and(|envelope| envelope.first > self.index.end().index.next());
            if let Judged::Bad(slot) = judged
                && let Some(stop) = self.stop.as_mut()
                && same_epoch
                && stop.slot.envelope == EnvelopeEvidence::Prior
                && slot.envelope != EnvelopeEvidence::Prior
                && self.beyond.end.is_none()
                && !is_later
            {
                (stop.name, stop.place, stop.slot) = (segment.name, place, slot);
            }
        }
        self.judge(segment, bytes, place, None)
    }

    /// With an `end`: judges the slot as the one that should hold the batch behind it. Without: as any batch of its segment.
    fn judge(
        &self,
        segment: Scanned,
        bytes: &SegmentBytes<'_>,
        place: Place,
        end: Option<LogStart>,
    ) -> Judged {
        let offset = place.offset as usize;
        let bad = |envelope| Judged::Bad(SlotEvidence { envelope, image: ImageEvidence::Unreadable });
        let Some(sector) = bytes.readable(offset..offset.saturating_add(ENVELOPE_BYTES)) else {
            return bad(EnvelopeEvidence::Unreadable);
        };
        let prior = Prior::new(segment.header.prior_content, bytes);
        if prior.holds(offset..offset + ENVELOPE_BYTES) {
            return bad(EnvelopeEvidence::Prior);
        }
        let Ok(envelope) = read_envelope(sector) else { return bad(EnvelopeEvidence::Rotten) };
        if !fits(&envelope, segment, bytes, offset) {
            return bad(EnvelopeEvidence::Misplaced);
        }
        if envelope.last <= self.hard_state.start.index {
            return Judged::Below(slot_bytes(envelope.image_bytes as usize));
        }
        let follows = |end: &LogStart| envelope.first == end.index.next() && envelope.term >= end.term;
        if !end.as_ref().is_none_or(follows) {
            return bad(EnvelopeEvidence::Misplaced);
        }
        let previous = end.or(self.beyond.end.filter(follows));
        let (image, info) = judge_image(&envelope, bytes, &prior, offset, previous);
        let slot = SlotEvidence { envelope: EnvelopeEvidence::Valid, image };
        let evidence = Evidence { envelope: slot.envelope, image, acknowledged: true };
        match dispose(evidence) {
            Disposition::Cut(_) if end.is_some() => Judged::Bad(slot),
            _ => Judged::Batch { info, image, durable_through: envelope.durable_through },
        }
    }

    /// The envelope at `offset`, if it is intact and was written for this place in this segment.
    fn known(&self, segment: Scanned, bytes: &SegmentBytes<'_>, offset: usize) -> Option<Envelope> {
        bytes.envelope(offset).filter(|envelope| fits(envelope, segment, bytes, offset))
    }

    /// The next batch of the log.
    fn take(&mut self, info: &BatchInfo, place: Place, image: ImageEvidence) {
        if image != ImageEvidence::Good {
            let slot = SlotEvidence { envelope: EnvelopeEvidence::Valid, image };
            self.damaged.push((info.first, slot));
        }
        if image == ImageEvidence::PriorRemains {
            self.open.push(Open { first: info.first, before: Some(self.index.end()), blank: false });
        }
        self.index.push(info, place);
    }

    /// A batch behind the stop.
    fn take_beyond(&mut self, segment: Scanned, info: &BatchInfo, place: Place, image: ImageEvidence) {
        let before = self.beyond.end.filter(|end| end.index.next() == info.first);
        if before.is_some() {
            // Nothing is missing between them.
            self.beyond.open.retain(|open| !open.blank || open.first != info.first);
        }
        let goes_back = self.beyond.end.is_some_and(|end| info.first <= end.index || info.term < end.term);
        if goes_back || image == ImageEvidence::Misplaced {
            let cause = DamageCause::Misplaced;
            self.doubt(segment.name, place.generation, place.offset, cause);
        }
        if image == ImageEvidence::PriorRemains {
            self.beyond.open.push(Open { first: info.first, before, blank: false });
        }
        self.beyond.end = Some(end_of(info));
        self.beyond.lost_track = false;
        self.beyond.torn_bytes += info.slot_bytes() as u64;
        self.salvage.push(Salvaged { info: *info, place, intact: image == ImageEvidence::Good });
    }

    /// A slot that holds no batch that could be known.
    fn bad(&mut self, segment: Scanned, place: Place, slot: SlotEvidence, is_first: bool) {
        let epoch = segment.header.epoch;
        if self.stop.is_none() {
            self.stop = Some(Stop { name: segment.name, place, epoch, slot, cause: None });
            self.beyond = Beyond { lost_track: true, ..Beyond::default() };
            return;
        }
        let Some(end) = self.beyond.end.filter(|_| !self.beyond.lost_track) else { return };
        let blank = Open { first: end.index.next(), before: Some(end), blank: true };
        if slot.envelope == EnvelopeEvidence::Prior {
            self.beyond.open.push(blank);
        } else {
            // At the start of a segment, this may be where the batch went that did not fit before.
            if is_first {
                self.beyond.open.retain(|open| !open.blank || open.first != blank.first);
            }
            self.beyond.lost_track = true;
        }
    }

    /// The first slot at or behind `offset` whose envelope is intact and belongs there.
    fn find_known(&mut self, segment: Scanned, bytes: &SegmentBytes<'_>, offset: usize) -> Option<usize> {
        let prior = Prior::new(segment.header.prior_content, bytes);
        for at in (offset..bytes.bytes.len()).step_by(BLOCK_BYTES) {
            if bytes.readable(at..at.saturating_add(BLOCK_BYTES)).is_none()
                || prior.holds(at..at.saturating_add(BLOCK_BYTES))
            {
                continue;
            }
            if self.known(segment, bytes, at).is_some() {
                return Some(at);
            }
            self.look_for_foreign(segment, bytes, at);
            self.beyond.torn_bytes += BLOCK_BYTES as u64;
            let header = &segment.header;
            let is_younger = |envelope: &Envelope| {
                envelope.cluster == header.cluster
                    && envelope.group == header.group
                    && envelope.generation > header.generation
            };
            if bytes.envelope(at).is_some_and(|envelope| is_younger(&envelope))
                && !has_own_slot(bytes, header)
            {
                // The header is that of an older segment: a misdirected write.
                self.doubt(segment.name, header.generation, 0, DamageCause::SegmentHeader);
            }
        }
        None
    }

    /// What is no batch of this log may be one that another build has written.
    fn look_for_foreign(&mut self, segment: Scanned, bytes: &SegmentBytes<'_>, offset: usize) {
        if self.foreign.is_none() {
            let header = &segment.header;
            let life = (header.generation, header.nonce);
            self.foreign = bytes.foreign(segment.name, offset, header.cluster, Some(life));
        }
    }

    fn doubt(&mut self, name: SegmentName, generation: u32, offset: u64, cause: DamageCause) {
        let damage = Damage {
            cause,
            segment: name.to_string(),
            generation,
            offset,
            first: self.index.end().index.next(),
            identity: None,
            durable_through: self.hard_state.witness.max(self.hard_state.cut.index),
        };
        if !self.doubts.contains(&damage) {
            self.doubts.push(damage);
        }
    }
}

/// Two claims in one: whoever satisfies it satisfies both.
fn merge(earlier: Option<Claim>, later: Claim) -> Claim {
    let Some(earlier) = earlier else { return later };
    if earlier.certain && later.certain {
        return if (earlier.term, earlier.last) > (later.term, later.last) { earlier } else { later };
    }
    Claim { term: earlier.term.max(later.term), last: earlier.last.max(later.last), certain: false }
}

fn end_of(info: &BatchInfo) -> LogStart {
    LogStart { index: info.last, term: info.term, chain: info.chain }
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

/// Whether an intact envelope was written for this place, and its slot lies within the segment.
fn fits(envelope: &Envelope, segment: Scanned, bytes: &SegmentBytes<'_>, offset: usize) -> bool {
    let end = offset.saturating_add(slot_bytes(envelope.image_bytes as usize));
    belongs(envelope, &segment.header, offset) && end <= bytes.bytes.len()
}

/// Judges the image behind a valid envelope, sector by sector if need be, and says what is known of the batch.
fn judge_image(
    envelope: &Envelope,
    bytes: &SegmentBytes<'_>,
    prior: &Prior<'_>,
    offset: usize,
    previous: Option<LogStart>,
) -> (ImageEvidence, BatchInfo) {
    let start = offset + ENVELOPE_BYTES;
    let image_bytes = envelope.image_bytes as usize;
    let mut known = BatchInfo {
        group: envelope.group,
        term: envelope.term,
        first: envelope.first,
        last: envelope.last,
        kind: BatchKind::Commands,
        time_ms: 0,
        image_bytes: envelope.image_bytes,
        payload_bytes: 0,
        chain: envelope.chain,
    };
    let sector_range = |ordinal: usize| {
        let at = start + ordinal * SECTOR_BYTES;
        at..at + SECTOR_BYTES
    };
    // A sector counts as never written when all of it is prior; the last one's padding is prior in any case.
    let prior = |ordinal: usize| prior.holds(sector_range(ordinal));

    let place = start..start + image_bytes;
    let parse = if bytes.verified.has(&place) { BatchView::trusted } else { parse_image };
    let whole = bytes.readable(place);
    if let Some(Ok(view)) = whole.map(parse)
        && is_named(&view.info(), envelope)
        && previous.is_none_or(|previous| view.verify_chain(previous.chain))
    {
        return (ImageEvidence::Good, view.info());
    }
    let otherwise = if whole.is_some() { ImageEvidence::Rotten } else { ImageEvidence::Unreadable };
    // Where the device returned errors the buffer holds zeros, so those sectors just fail their checksums.
    let Some(image) = bytes.bytes.get(start..start + image_bytes) else { return (otherwise, known) };

    // Prior content proves that a sector was not written only where the new content differs. In a blank segment it always does for
    // the header's sector and those of the checksum table. In a recycled one the former life may have held this very batch
    // at this very place (cut off, and sent again by the leader): then all its sectors are prior and right, and those that
    // are not are rotten. The header names its chain, and a checksum fits only the batch that it was made for, so
    // these sectors say themselves whether they are of this batch.
    let of_this_batch =
        |sector: usize| table_sector_fits(image, envelope.group, envelope.term, envelope.first, sector);
    let mut table = SectorChecksums::table_sectors(image_bytes).filter(|sector| *sector > 0);
    if prior(0) && named_chain(image) != Some(envelope.chain)
        || table.any(|sector| prior(sector) && !of_this_batch(sector))
    {
        return (ImageEvidence::PriorRemains, known);
    }
    let Ok(sectors) = SectorChecksums::of(image) else { return (otherwise, known) };
    let Some(info) = sectors.info().filter(|info| is_named(info, envelope)) else {
        return (otherwise, known);
    };
    // Header and checksums are those of the batch, so all of this is known, and the chain can be verified.
    known = info;
    let mut bad = (0..sectors.count()).filter(|ordinal| !sectors.is_good(*ordinal)).peekable();
    let image = if bad.peek().is_some() {
        if bad.any(prior) { ImageEvidence::PriorRemains } else { otherwise }
    } else if whole.is_none() {
        otherwise
    } else {
        match parse_image(image) {
            Ok(_) => ImageEvidence::Good,
            Err(ImageError::SectorChecksum(_) | ImageError::HeaderChecksum) => ImageEvidence::Rotten,
            Err(_) => ImageEvidence::Misplaced,
        }
    };
    if previous.is_some_and(|previous| !sectors.verify_chain(previous.chain)) {
        return (ImageEvidence::Misplaced, known);
    }
    (image, known)
}

fn is_named(info: &BatchInfo, envelope: &Envelope) -> bool {
    info.group == envelope.group
        && info.term == envelope.term
        && info.first == envelope.first
        && info.last == envelope.last
        && info.chain == envelope.chain
        && info.image_bytes == envelope.image_bytes
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
