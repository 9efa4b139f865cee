//! Repair of damaged batches: the segment is rebuilt, and nothing is overwritten.
//!
//! The happy path: images of damaged batches arrive, verified against the index, and are queued. The oldest segment among
//! theirs is copied to `segment-N.new`, block for block, with the repaired slots in their places; the copy is flushed, read back
//! and verified ([`check`]), renamed over `segment-N.wal`, and the directory synced. Recovery sees an ordinary segment. A descriptor of the old file stays readable for what
//! is in flight on it, and is not used for anything new.
//!
//! A crash before the rename leaves a `.new` file, removed by the next start, and the damage as it was; one after it leaves either
//! file under the name. The old file goes only with the rename, when all that could be read of it is durable in the new one.
//!
//! Failures: a block of the old file that cannot be read and holds no batch of the log becomes bytes that are damage to every reader. When it holds a batch that is not
//! among the repaired ones, that batch is damaged too, and the rebuild is given up until it has come: it may be readable another
//! time. Only when there are more of these than may wait in memory, their blocks become such bytes too, under an envelope made anew. No space gives up the rebuild until somebody asks to try again. A segment that cannot be opened, or of which no copy comes out right, is passed over until then, or until another of its batches
//! comes: the others are rebuilt, and when there is no room for a batch of theirs, what waits for such a segment is forgotten ([`Repairs::awaits`]) and may be fetched again. Any other failed write stops the log. A segment that leaves the log is not rebuilt any further.

mod check;

use crate::disk::{Access, Disk, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId};
use crate::error::{DamageCause, RepairError, WalError};
use crate::format::{
    BatchInfo, Chain, ENVELOPE_BYTES, Envelope, SLOT_BYTES_MAX, SegmentHeader, parse_image, read_envelope,
    slots_start, write_envelope, write_segment_header,
};
use crate::index::{Index, Place};
use crate::ops::{Ops, Owner, take};
use crate::segment::{Segment, SegmentName, SegmentTable, Stage};
use ringraft_block::{BLOCK_BYTES, Block, BlockBuf, LogIndex, Pool};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Segments are copied in pieces of so much: larger ones delay the log's own writes behind them.
const COPY_BYTES: u64 = 256 * 1024;
/// So many pieces are on their way at once.
const COPIES_IN_FLIGHT: usize = 2;
/// So many bytes of repaired batches wait at most; one alone always may.
const QUEUED_BYTES_MAX: usize = 2 * SLOT_BYTES_MAX;

/// Stands where a sector of a slot could not be read.
const UNREADABLE: u8 = 0xdb;

const WHAT: &str = "rebuilding a segment";

/// A batch of the log of which everything is known but its bytes: its image is rotten, unreadable or lost, and has to be
/// fetched from a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedBatch {
    /// What the log knows of it. When a start found the damage, only the envelope may have been intact: then `kind`,
    /// `time_ms` and `payload_bytes` are [`crate::format::BatchKind::Commands`], 0 and 0 until the batch is repaired.
    pub info: BatchInfo,
    /// The chain before it.
    pub previous: Chain,
    /// The segment file.
    pub segment: String,
    /// The segment's generation.
    pub generation: u32,
    /// Where the slot begins in it.
    pub offset: u64,
    /// What was found.
    pub cause: DamageCause,
}

/// A repaired slot.
struct Fix<B: BlockBuf> {
    info: BatchInfo,
    place: Place,
    /// Envelope, image, and zeros to whole blocks.
    block: Block<B>,
}

/// The queue and the machine.
pub(crate) struct Repairs<B: BlockBuf> {
    fixes: BTreeMap<LogIndex, Fix<B>>,
    bytes: usize,
    work: Option<Rebuild>,
    /// No space: not before somebody asks again.
    blocked: bool,
    /// Segments that could not be opened or copied: not before somebody asks again, once each time.
    passed_over: BTreeSet<u32>,
    /// Those among all that were not rebuilt since. What waits for them gives way to what can be written.
    stuck: BTreeSet<u32>,
    /// Batches without which a segment is not rebuilt, since they could not be read: its generation, and their first index.
    missing: BTreeSet<(u32, LogIndex)>,
    /// Segments that are to be rebuilt for their header, whether a batch waits for it or not. One attempt for each.
    headless: BTreeSet<u32>,
    /// More have come than may wait: what is here is written first.
    is_full: bool,
    /// So many copies in a row were not what they were made from.
    failed_copies: u8,
}

/// A segment being rebuilt.
struct Rebuild {
    generation: u32,
    name: SegmentName,
    header: SegmentHeader,
    step: Step,
    old: Option<FileId>,
    new: Option<FileId>,
    /// Pieces yet to be copied.
    wanted: Vec<Range<u64>>,
    copies: Vec<Copy>,
    /// The batches that this rebuild repairs.
    firsts: Vec<LogIndex>,
    /// The batch of the copy that is being verified, and the place behind it.
    checked: Option<check::Checked>,
    checked_to: u64,
    /// Nothing more is copied, what is in flight is awaited, and the new file is removed.
    given_up: bool,
}

/// The operation that is awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    OpeningOld,
    Creating,
    Copying,
    Flushing,
    /// A batch of the new file is being read.
    Checking,
    /// The same one of the old file.
    Comparing,
    ClosingOld,
    ClosingNew,
    Renaming,
    Syncing,
    Removing,
}

struct Copy {
    id: DiskOpId,
    range: Range<u64>,
    writing: bool,
}

/// What came of a completion.
#[derive(Default)]
pub(crate) struct Progress {
    /// Batches that turned out to be damaged as well.
    pub(crate) found: Vec<LogIndex>,
    /// The segment's file is another one now.
    pub(crate) replaced: Option<u32>,
    pub(crate) repaired: Vec<BatchInfo>,
    /// The segment is no longer held.
    pub(crate) ended: Option<u32>,
}

/// What the machine works with.
pub(crate) struct Tools<'a, D: Disk> {
    pub(crate) disk: &'a mut D,
    pub(crate) ops: &'a mut Ops,
    pub(crate) pool: &'a Pool<D::Buf>,
    pub(crate) index: &'a Index,
    pub(crate) segments: &'a SegmentTable,
}

impl<D: Disk> Tools<'_, D> {
    fn submit(&mut self, op: DiskOp<D::Buf>) -> DiskOpId {
        self.ops.submit(self.disk, Owner::Repair, op)
    }
}

impl<B: BlockBuf> Repairs<B> {
    pub(crate) fn new() -> Self {
        Self {
            fixes: BTreeMap::new(),
            bytes: 0,
            work: None,
            blocked: false,
            passed_over: BTreeSet::new(),
            stuck: BTreeSet::new(),
            missing: BTreeSet::new(),
            headless: BTreeSet::new(),
            is_full: false,
            failed_copies: 0,
        }
    }

    /// Verifies the image of a damaged batch and queues its slot.
    pub(crate) fn queue(
        &mut self,
        index: &Index,
        segments: &SegmentTable,
        first: LogIndex,
        mut block: Block<B>,
    ) -> Result<(), RepairError> {
        let not_damaged = RepairError::NotDamaged { first };
        let damaged = index.damage_of(first).and_then(|_| index.containing(first));
        let Some((known, place)) = damaged else { return Err(not_damaged) };
        let Some(previous) = index.chain_at(first.previous()) else { return Err(not_damaged) };
        let Some(segment) = segments.get(place.generation) else { return Err(not_damaged) };
        if self.fixes.get(&first).is_some_and(|fix| fix.info.chain == known.chain) {
            // It is on its way already.
            return Ok(());
        }
        let bytes = known.slot_bytes();
        let Some(yielding) = self.yielding(bytes, place.generation) else {
            // What waits for a segment that cannot be written makes no other one be written in a hurry.
            self.is_full |= !self.stuck.contains(&place.generation);
            return Err(RepairError::Busy);
        };
        let other = RepairError::Other { first };
        if block.len() < bytes {
            return Err(other);
        }
        let image_end = ENVELOPE_BYTES + known.image_bytes as usize;
        let view = parse_image(&block[ENVELOPE_BYTES..image_end])
            .map_err(|error| RepairError::Image { first, error })?;
        let info = view.info();
        if !is_same(&info, &known) || !view.verify_chain(previous) {
            return Err(other);
        }
        write_envelope(&mut block, &envelope_of(&segment.header, &info, place));
        block[image_end..bytes].fill(0);
        yielding.into_iter().for_each(|other| self.drop_fix(other));
        self.drop_fix(first);
        self.bytes += bytes;
        self.missing.remove(&(place.generation, first));
        self.fixes.insert(first, Fix { info, place, block });
        self.passed_over.remove(&place.generation);
        self.blocked = false;
        Ok(())
    }

    /// What is to be forgotten for room for so many bytes of a batch of that segment, nothing if there is room; `None` when that does
    /// not make room either.
    fn yielding(&self, bytes: usize, generation: u32) -> Option<Vec<LogIndex>> {
        let (mut left, mut kept) = (self.bytes, self.fixes.len());
        let fits = |left: usize, kept: usize| kept == 0 || left + bytes <= QUEUED_BYTES_MAX;
        let rebuilding = self.work.as_ref().map(|work| work.generation);
        let yields = |fix: &&Fix<B>| {
            let of = fix.place.generation;
            self.stuck.contains(&of) && Some(of) != rebuilding && !self.stuck.contains(&generation)
        };
        let mut yielding = Vec::new();
        for fix in self.fixes.values().rev().filter(yields) {
            if fits(left, kept) {
                break;
            }
            (left, kept) = (left - fix.info.slot_bytes(), kept - 1);
            yielding.push(fix.info.first);
        }
        fits(left, kept).then_some(yielding)
    }

    /// Whether the image of the batch that begins at `first` is here, and waits to be written or is being written.
    pub(crate) fn awaits(&self, index: &Index, first: LogIndex) -> bool {
        let known = index.containing(first).map(|(known, _)| known.chain);
        self.fixes.get(&first).is_some_and(|fix| Some(fix.info.chain) == known)
    }

    fn drop_fix(&mut self, first: LogIndex) {
        if let Some(fix) = self.fixes.remove(&first) {
            self.bytes -= fix.info.slot_bytes();
        }
    }

    /// The slot that repairs a batch of the segment.
    fn fix_of(&self, first: LogIndex, generation: u32) -> Option<&Fix<B>> {
        self.fixes.get(&first).filter(|fix| fix.place.generation == generation)
    }

    /// The log is closing: nothing more is copied. A segment that is being replaced already is.
    pub(crate) fn stop(&mut self) {
        if let Some(work) = self.work.as_mut() {
            work.given_up |= !matches!(work.step, Step::Renaming | Step::Syncing);
        }
    }

    /// Space may have come back, and what could not be opened may be.
    pub(crate) fn retry(&mut self) {
        self.blocked = false;
        self.passed_over.clear();
        // Whether they are still what no rebuild gets over, the next attempt tells.
        self.stuck.clear();
    }

    /// The segment that is to be rebuilt next.
    pub(crate) fn next_generation(&self) -> Option<u32> {
        if self.work.is_some() || self.blocked {
            return None;
        }
        let waits = |generation: &u32| {
            let missing = (*generation, LogIndex(0))..=(*generation, LogIndex(u64::MAX));
            self.passed_over.contains(generation)
                || !self.is_full && self.missing.range(missing).next().is_some()
        };
        let fixes = self.fixes.values().map(|fix| fix.place.generation);
        fixes.chain(self.headless.iter().copied()).filter(|generation| !waits(generation)).min()
    }

    /// A segment's header is rotten: a rebuild writes the right one.
    pub(crate) fn rebuild(&mut self, generation: u32) {
        self.headless.insert(generation);
    }

    /// The segment has left the log.
    pub(crate) fn forget_segment(&mut self, generation: u32) {
        self.headless.remove(&generation);
    }

    /// The segment cannot be rebuilt now.
    fn pass_over(&mut self, generation: u32) {
        self.passed_over.insert(generation);
        self.stuck.insert(generation);
    }

    /// The descriptors, to be closed at the end.
    pub(crate) fn take_files(&mut self) -> impl Iterator<Item = FileId> {
        self.work.take().into_iter().flat_map(|work| [work.old, work.new]).flatten()
    }

    /// Forgets batches that the log no longer holds as damaged.
    pub(crate) fn forget_void(&mut self, index: &Index) {
        self.stuck.retain(|generation| index.uses(*generation));
        if self.fixes.is_empty() && self.missing.is_empty() {
            return;
        }
        let is_wanted = |fix: &Fix<B>| {
            let known = index.damage_of(fix.info.first).and_then(|_| index.containing(fix.info.first));
            known.is_some_and(|(known, place)| known.chain == fix.info.chain && place == fix.place)
        };
        let rebuilding = self.work.as_ref().map_or(&[][..], |work| &work.firsts);
        let void = self.fixes.values().filter(|fix| !is_wanted(fix)).map(|fix| fix.info.first);
        let void: Vec<LogIndex> = void.filter(|first| !rebuilding.contains(first)).collect();
        for first in void {
            self.drop_fix(first);
        }
        self.missing.retain(|(_, first)| index.damage_of(*first).is_some());
    }

    /// Begins to rebuild a segment that nothing is appended to any more. The caller holds it until [`Progress::ended`].
    pub(crate) fn begin<D: Disk<Buf = B>>(&mut self, tools: &mut Tools<'_, D>, segment: &Segment) {
        debug_assert!(self.work.is_none());
        let generation = segment.generation();
        self.headless.remove(&generation);
        let fixes = self.fixes.values().filter(|fix| fix.place.generation == generation);
        let bytes = segment.header.segment_bytes;
        // In order from the end, to be taken from there.
        let mut wanted: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        while at < bytes {
            let end = (at + COPY_BYTES).min(bytes);
            wanted.push(at..end);
            at = end;
        }
        wanted.reverse();
        let work = Rebuild {
            generation,
            name: segment.name,
            header: segment.header,
            step: Step::OpeningOld,
            old: None,
            new: None,
            wanted,
            copies: Vec::new(),
            firsts: fixes.map(|fix| fix.info.first).collect(),
            checked: None,
            checked_to: 0,
            given_up: false,
        };
        tools.submit(DiskOp::Open { name: segment.name.to_string(), access: Access::Read });
        self.work = Some(work);
    }

    /// Takes a completion and starts what follows from it.
    pub(crate) fn handle<D: Disk<Buf = B>>(
        &mut self,
        mut tools: Tools<'_, D>,
        done: DiskDone<B>,
    ) -> Result<Progress, WalError> {
        let Some(mut work) = self.work.take() else { return Err(WalError::Protocol { what: WHAT }) };
        let mut progress = Progress::default();
        let result = self.step(&mut tools, &mut work, done, &mut progress);
        if progress.ended.is_none() {
            // Also after a failure: its files are open.
            self.work = Some(work);
        }
        result.map(|()| progress)
    }

    fn step<D: Disk<Buf = B>>(
        &mut self,
        tools: &mut Tools<'_, D>,
        work: &mut Rebuild,
        done: DiskDone<B>,
        progress: &mut Progress,
    ) -> Result<(), WalError> {
        // A cut or a purge may have taken the segment out of the log.
        if tools.segments.get(work.generation).is_none() {
            work.given_up = true;
        }
        let no_space = |error: &DiskError| error.kind == DiskErrorKind::NoSpace;
        match (work.step, done.result) {
            (Step::OpeningOld, Ok(DiskOutput::Opened { file, .. })) => {
                work.old = Some(file);
                let (name, bytes) = (new_name(work.name), work.header.segment_bytes);
                tools.submit(DiskOp::Create { name, bytes, access: Access::Write });
                work.step = Step::Creating;
            }
            (Step::OpeningOld, Err(_)) => {
                // Nothing was begun. It may be readable another time.
                self.pass_over(work.generation);
                progress.ended = Some(work.generation);
            }
            (Step::Creating, Ok(DiskOutput::Opened { file, .. })) => {
                work.new = Some(file);
                work.step = Step::Copying;
                self.copy(tools, work)?;
            }
            (Step::Creating, Err(error)) if no_space(&error) => {
                // The name may or may not exist.
                self.give_up(tools, work);
            }
            (Step::Copying, result) => {
                let at = work.copies.iter().position(|copy| copy.id == done.id);
                let Some(at) = at else { return Err(WalError::Protocol { what: WHAT }) };
                let copy = work.copies.swap_remove(at);
                match (copy.writing, result) {
                    (false, result) => self.copied(tools, work, copy.range, result, progress)?,
                    (true, Ok(DiskOutput::Written { bytes })) => {
                        let asked = (copy.range.end - copy.range.start) as usize;
                        if bytes != asked {
                            return Err(WalError::ShortWrite { what: WHAT, asked, written: bytes });
                        }
                    }
                    (true, Err(error)) if no_space(&error) => {
                        self.blocked = true;
                        work.given_up = true;
                    }
                    (true, Err(error)) => return Err(WalError::Disk { what: WHAT, error }),
                    (true, Ok(_)) => return Err(WalError::Protocol { what: WHAT }),
                }
                self.copy(tools, work)?;
            }
            (Step::Flushing, Err(error)) if no_space(&error) => self.give_up(tools, work),
            (Step::Flushing, Ok(DiskOutput::Done)) => self.check_next(tools, work)?,
            (Step::Checking | Step::Comparing, result) => self.was_read(tools, work, result, progress)?,
            (Step::ClosingOld | Step::ClosingNew, Ok(DiskOutput::Done)) => {
                self.close_next(tools, work);
            }
            (Step::Renaming, Err(error)) if no_space(&error) => self.give_up(tools, work),
            (Step::Renaming, Ok(DiskOutput::Done)) => {
                tools.submit(DiskOp::SyncDirectory);
                work.step = Step::Syncing;
            }
            (Step::Syncing, Ok(DiskOutput::Done)) => {
                progress.replaced = Some(work.generation);
                progress.ended = Some(work.generation);
                for first in &work.firsts {
                    if let Some(fix) = self.fix_of(*first, work.generation) {
                        progress.repaired.push(fix.info);
                        self.drop_fix(*first);
                    }
                }
                self.is_full = false;
                self.stuck.remove(&work.generation);
            }
            (Step::Removing, result) => {
                match result {
                    Ok(DiskOutput::Done) => {}
                    Err(error) if error.kind == DiskErrorKind::NotFound => {}
                    Err(error) => return Err(WalError::Disk { what: WHAT, error }),
                    Ok(_) => return Err(WalError::Protocol { what: WHAT }),
                }
                progress.ended = Some(work.generation);
            }
            (_, Err(error)) => return Err(WalError::Disk { what: WHAT, error }),
            (_, Ok(_)) => return Err(WalError::Protocol { what: WHAT }),
        }
        Ok(())
    }

    /// Reads further pieces, as far as the bounds allow. Flushes behind the last.
    fn copy<D: Disk<Buf = B>>(
        &mut self,
        tools: &mut Tools<'_, D>,
        work: &mut Rebuild,
    ) -> Result<(), WalError> {
        let (Some(old), Some(new)) = (work.old, work.new) else {
            return Err(WalError::Protocol { what: WHAT });
        };
        while !work.given_up && work.copies.len() < COPIES_IN_FLIGHT {
            let Some(range) = work.wanted.pop() else { break };
            let bytes = (range.end - range.start) as usize;
            let block = take(tools.pool, tools.disk, bytes);
            let block = block.map_err(|error| WalError::Disk { what: WHAT, error })?;
            let id = tools.submit(DiskOp::Read { file: old, offset: range.start, block, bytes });
            work.copies.push(Copy { id, range, writing: false });
        }
        if !work.copies.is_empty() {
            return Ok(());
        }
        if work.given_up {
            self.close_next(tools, work);
        } else {
            tools.submit(DiskOp::Flush { file: new });
            work.step = Step::Flushing;
        }
        Ok(())
    }

    /// A piece was read, or not: it is written with the repaired slots in their places.
    fn copied<D: Disk<Buf = B>>(
        &mut self,
        tools: &mut Tools<'_, D>,
        work: &mut Rebuild,
        range: Range<u64>,
        result: Result<DiskOutput<B>, DiskError>,
        progress: &mut Progress,
    ) -> Result<(), WalError> {
        let bytes = (range.end - range.start) as usize;
        if work.given_up {
            return Ok(());
        }
        let mut block = match result {
            Ok(DiskOutput::Read { block, bytes: read }) if read >= bytes => block,
            Ok(DiskOutput::Read { .. }) | Err(_) if bytes > BLOCK_BYTES => {
                let blocks = range.step_by(BLOCK_BYTES).map(|at| at..at + BLOCK_BYTES as u64);
                let before = work.wanted.len();
                work.wanted.extend(blocks);
                work.wanted[before..].reverse();
                return Ok(());
            }
            Ok(DiskOutput::Read { .. }) | Err(_) => {
                let lost = Self::lost_batch(tools.index, work, range.start);
                if let Some(first) = lost.filter(|first| {
                    !(work.firsts.contains(first) || self.is_full && tools.index.damage_of(*first).is_some())
                }) {
                    progress.found.push(first);
                    // It may have come since this began: then the next attempt has it.
                    if self.fix_of(first, work.generation).is_none() {
                        self.missing.insert((work.generation, first));
                    }
                    work.given_up = true;
                    return Ok(());
                }
                let block = take(tools.pool, tools.disk, bytes);
                let mut block = block.map_err(|error| WalError::Disk { what: WHAT, error })?;
                // In the place of slots it must not pass for a write that never was.
                let is_slot = range.start >= slots_start(work.header.segment_bytes);
                block[..bytes].fill(if is_slot { UNREADABLE } else { 0 });
                block
            }
            Ok(_) => return Err(WalError::Protocol { what: WHAT }),
        };
        if range.start == 0 {
            // It is known, whatever was read.
            write_segment_header(&mut block, &work.header);
        }
        self.overlay(tools.index, work, &range, &mut block);
        let Some(file) = work.new else { return Err(WalError::Protocol { what: WHAT }) };
        let id = tools.submit(DiskOp::Write { file, offset: range.start, block: block.share(), bytes });
        work.copies.push(Copy { id, range, writing: true });
        Ok(())
    }

    /// The batch of the log that an unreadable block holds a part of.
    fn lost_batch(index: &Index, work: &Rebuild, at: u64) -> Option<LogIndex> {
        let behind = Place { generation: work.generation, offset: at + 1 };
        let (info, place) = index.at(index.ordinal_at_place(behind).checked_sub(1)?)?;
        let overlaps = place.generation == work.generation && place.offset + info.slot_bytes() as u64 > at;
        overlaps.then_some(info.first)
    }

    /// Puts the repaired slots, and the envelopes of batches that are still damaged, into a piece.
    fn overlay(&self, index: &Index, work: &Rebuild, range: &Range<u64>, piece: &mut [u8]) {
        for first in &work.firsts {
            let Some(fix) = self.fix_of(*first, work.generation) else { continue };
            let slot = fix.place.offset..fix.place.offset + fix.info.slot_bytes() as u64;
            let (from, to) = (slot.start.max(range.start), slot.end.min(range.end));
            if from < to {
                let target = (from - range.start) as usize..(to - range.start) as usize;
                let source = (from - slot.start) as usize..(to - slot.start) as usize;
                piece[target].copy_from_slice(&fix.block[source]);
            }
        }
        for (first, _) in index.damaged() {
            let Some((info, place)) = index.containing(first) else { continue };
            if place.generation == work.generation
                && range.contains(&place.offset)
                && !work.firsts.contains(&first)
            {
                let at = (place.offset - range.start) as usize;
                let Some(sector) = piece.get_mut(at..at + ENVELOPE_BYTES) else { continue };
                if read_envelope(sector).is_err() {
                    write_envelope(sector, &envelope_of(&work.header, &info, place));
                }
            }
        }
    }

    /// Lack of space: what was made so far is removed, and the rebuild begins anew when somebody asks.
    fn give_up<D: Disk<Buf = B>>(&mut self, tools: &mut Tools<'_, D>, work: &mut Rebuild) {
        self.blocked = true;
        work.given_up = true;
        self.close_next(tools, work);
    }

    /// Closes the files, then puts the new one in the old one's place, or removes it.
    fn close_next<D: Disk<Buf = B>>(&mut self, tools: &mut Tools<'_, D>, work: &mut Rebuild) {
        let (from, to) = (new_name(work.name), work.name.to_string());
        if let Some(file) = work.old.take() {
            tools.submit(DiskOp::Close { file });
            work.step = Step::ClosingOld;
        } else if let Some(file) = work.new.take() {
            tools.submit(DiskOp::Close { file });
            work.step = Step::ClosingNew;
        } else if work.given_up {
            tools.submit(DiskOp::Remove { name: from });
            work.step = Step::Removing;
        } else {
            tools.submit(DiskOp::Rename { from, to });
            work.step = Step::Renaming;
        }
    }
}

fn new_name(name: SegmentName) -> String {
    name.at(Stage::New).to_string()
}

/// Whether an image is that of a batch of which only the envelope may be known.
fn is_same(info: &BatchInfo, known: &BatchInfo) -> bool {
    info.group == known.group
        && info.term == known.term
        && info.first == known.first
        && info.last == known.last
        && info.image_bytes == known.image_bytes
        && info.chain == known.chain
}

/// The envelope of a batch in its place. All before it has become durable since it was first written.
fn envelope_of(header: &SegmentHeader, info: &BatchInfo, place: Place) -> Envelope {
    Envelope {
        cluster: header.cluster,
        nonce: header.nonce,
        generation: header.generation,
        group: header.group,
        offset: place.offset,
        epoch: header.epoch,
        boot: header.boot,
        durable_through: info.first.previous(),
        term: info.term,
        first: info.first,
        last: info.last,
        chain: info.chain,
        image_bytes: info.image_bytes,
    }
}
