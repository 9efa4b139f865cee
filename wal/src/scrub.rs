//! The scrubber: reads closed segments in the background, so that damage is found while there are peers to repair it from, and
//! not when the batch is needed.
//!
//! The happy path: whoever drives the log hands out a budget from time to time; a piece of the log is read and verified as any read
//! is, at most two batches at a time; at the end a new pass begins.
//!
//! What is not a batch is looked at, too. With the first batches of a segment its header is read: without it, the next start could not
//! tell what the segment follows. One that is rotten is reported, and the segment is rebuilt with the right one. And after every
//! [`HARD_STATE_EVERY_BYTES`] of budget both copies of the hard state are read: a rotten one would be noticed by the next start only,
//! when the other may be gone as well. It is written anew, before the intact one is touched.
//!
//! Failures: a batch that is damaged or cannot be read is told once, by [`crate::WalEvent::DamageFound`], and passed over until it is
//! repaired. A segment that cannot be opened is reported, and passed over until the next pass: what keeps it from being opened may
//! go away, and to take all of its batches for damaged would take this node out of elections for it. Lack of memory or of
//! descriptors says nothing of a segment: the same again, with the next budget. The segment that is appended to is left alone: a
//! start has read what is in it, or this process wrote it.

use crate::disk::{Disk, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId};
use crate::error::ReadError;
use crate::format::{
    HARD_STATE_FILE_BYTES, HardState, SLOT_BYTES_MAX, SegmentHeader, read_hard_state, read_segment_header,
};
use crate::index::Index;
use crate::ops::{Ops, Owner, take};
use crate::read::Reads;
use crate::segment::SegmentTable;
use ringraft_block::{BLOCK_BYTES, BlockBuf, LogIndex, Pool};

/// So many batches are read at once.
const READS_IN_FLIGHT: usize = 2;
/// A request is for so many bytes, or one batch.
const REQUEST_BYTES: usize = 128 * 1024;
/// The hard state is read once for so much of budget: every 16 seconds at 1 MiB/s, 40 KiB at most.
pub(crate) const HARD_STATE_EVERY_BYTES: u64 = 16 * 1024 * 1024;

/// How far the scrubber has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubStatus {
    /// The first index that it has not looked at in this pass.
    pub position: LogIndex,
    /// Passes over all closed segments that were completed.
    pub passes: u64,
    /// Bytes read since the start.
    pub bytes: u64,
    /// Damaged batches that it has found since the start.
    pub found: u64,
    /// Times that a segment could not be opened and was passed over, since the start.
    pub segments_skipped: u64,
    /// Rotten segment headers that it has found since the start.
    pub headers_found: u64,
    /// Rotten copies of the hard state that it has found since the start.
    pub hard_states_found: u64,
}

pub(crate) struct Scrub<B: BlockBuf> {
    pub(crate) reads: Reads<B>,
    pub(crate) status: ScrubStatus,
    /// Bytes that may still be read; negative after a batch that was larger.
    credit: i64,
    /// The segment of the batches that are being read.
    asked: Option<u32>,
    /// The newest segment whose header was looked at in this pass.
    headed: u32,
    /// The segment whose header is to be looked at next.
    header_due: Option<u32>,
    /// What else is being read.
    check: Option<(DiskOpId, Check)>,
    /// Budget since the hard state was read.
    since_hard_state: u64,
}

/// Something that is looked at and is no batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    Header(u32),
    /// A copy of the hard state, and the save that it held.
    HardState {
        copy: usize,
        sequence: u64,
    },
}

/// The hard state at rest, when nothing is being saved: what both copies hold, and where.
#[derive(Clone, Copy)]
pub(crate) struct AtRest<'a> {
    pub(crate) state: &'a HardState,
    pub(crate) files: [FileId; 2],
}

/// What a check has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nothing, or nothing that can be told.
    Nothing,
    /// The header of the segment is not what it was.
    Header(u32),
    /// Neither is this copy of the hard state.
    HardState(usize),
}

/// What the scrubber works with.
pub(crate) struct Tools<'a, D: Disk> {
    pub(crate) disk: &'a mut D,
    pub(crate) ops: &'a mut Ops,
    pub(crate) pool: &'a Pool<D::Buf>,
    pub(crate) index: &'a Index,
    pub(crate) segments: &'a mut SegmentTable,
    /// The segment that is appended to.
    pub(crate) active: Option<u32>,
    pub(crate) durable_through: LogIndex,
    pub(crate) hard_state: Option<AtRest<'a>>,
}

impl<B: BlockBuf> Scrub<B> {
    pub(crate) fn new() -> Self {
        Self {
            reads: Reads::new(READS_IN_FLIGHT),
            status: ScrubStatus::default(),
            credit: 0,
            asked: None,
            headed: 0,
            header_due: None,
            check: None,
            since_hard_state: 0,
        }
    }

    /// Grants `budget_bytes` more. What was not used lately is not saved up beyond one budget, or the largest batch.
    pub(crate) fn grant<D: Disk<Buf = B>>(&mut self, tools: &mut Tools<'_, D>, budget_bytes: u64) {
        let budget = i64::try_from(budget_bytes).unwrap_or(i64::MAX / 2).min(i64::MAX / 2);
        self.credit = (self.credit + budget).min(budget.max(SLOT_BYTES_MAX as i64));
        self.since_hard_state = self.since_hard_state.saturating_add(budget_bytes);
        self.advance(tools);
    }

    /// Takes the answer that has come, and asks for more while there is credit.
    pub(crate) fn advance<D: Disk<Buf = B>>(&mut self, tools: &mut Tools<'_, D>) {
        if let Some((_, result)) = self.reads.finished() {
            let segments = &*tools.segments;
            self.take(
                tools.index,
                segments,
                &result.map(|batches| batches.last().map(|batch| batch.info.last)),
            );
        }
        if self.check.is_none() && self.reads.len() == 0 && self.credit > 0 {
            self.check_next(tools);
        }
        if self.check.is_none() && self.reads.len() == 0 && self.credit > 0 {
            self.ask(tools.index, tools.segments, tools.active, tools.durable_through);
        }
        self.reads.advance(tools.disk, tools.ops, tools.pool, tools.segments, tools.active);
    }

    /// An answer: the last index of the batches that were read, or why they were not.
    fn take(&mut self, index: &Index, segments: &SegmentTable, result: &Result<Option<LogIndex>, ReadError>) {
        match (result, self.asked.take()) {
            (Ok(Some(last)), asked) => {
                self.status.position = last.next();
                // The segment is open now.
                self.header_due = asked.filter(|generation| *generation > self.headed);
            }
            (Err(ReadError::Damaged { first, .. }), asked) => {
                let behind = index.containing(*first).map(|(info, _)| info.last.next());
                self.status.position = behind.unwrap_or(*first);
                self.header_due = asked.filter(|generation| *generation > self.headed);
            }
            (Err(ReadError::Disk(error)), Some(generation)) if error.kind != DiskErrorKind::OutOfMemory => {
                let segment = segments.get(generation).map(|segment| segment.name).unwrap_or_default();
                tracing::warn!(%segment, %error, "a segment cannot be opened; it is looked at again in the next pass");
                self.status.segments_skipped += 1;
                self.status.position = index.end_before(generation.saturating_add(1)).next();
            }
            // Truncated meanwhile, or no memory: the same again, with the next budget.
            (Ok(None) | Err(_), _) => self.credit = self.credit.min(0),
        }
    }

    /// Reads what is due besides batches.
    fn check_next<D: Disk<Buf = B>>(&mut self, tools: &mut Tools<'_, D>) {
        if let Some(generation) = self.header_due.take() {
            self.headed = generation;
            // One that is being replaced gets the right header with it.
            let segment = tools.segments.get_mut(generation).filter(|segment| !segment.is_replaced);
            if let Some(segment) = segment
                && let Some(file) = segment.file()
                && self.read(tools.disk, tools.ops, tools.pool, file, BLOCK_BYTES, Check::Header(generation))
            {
                segment.operations += 1;
            }
            return;
        }
        if self.since_hard_state >= HARD_STATE_EVERY_BYTES
            && let Some(AtRest { state, files }) = tools.hard_state
        {
            let check = Check::HardState { copy: 0, sequence: state.sequence };
            self.since_hard_state = 0;
            self.read(tools.disk, tools.ops, tools.pool, files[0], HARD_STATE_FILE_BYTES, check);
        }
    }

    /// Whether the read has begun.
    fn read<D: Disk<Buf = B>>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        pool: &Pool<B>,
        file: FileId,
        bytes: usize,
        check: Check,
    ) -> bool {
        // Without memory it has its turn another time.
        let Ok(block) = take(pool, disk, bytes) else { return false };
        let id = ops.submit(disk, Owner::Scrub, DiskOp::Read { file, offset: 0, block, bytes });
        self.check = Some((id, check));
        self.status.bytes += bytes as u64;
        self.credit -= bytes as i64;
        true
    }

    /// The segment that a check reads, when `id` is one that reads a segment.
    pub(crate) fn checks(&self, id: DiskOpId) -> Option<u32> {
        match self.check {
            Some((checking, Check::Header(generation))) if checking == id => Some(generation),
            _ => None,
        }
    }

    /// Takes the completion of a check, and begins that of the second copy of the hard state behind that of the first.
    pub(crate) fn checked<D: Disk<Buf = B>>(&mut self, tools: &mut Tools<'_, D>, done: DiskDone<B>) -> Found {
        let Some((_, check)) = self.check.take_if(|(id, _)| *id == done.id) else { return Found::Nothing };
        match check {
            Check::Header(generation) => {
                let Some(segment) = tools.segments.get(generation) else { return Found::Nothing };
                let is_rotten = is_rotten(done.result, BLOCK_BYTES, |bytes| {
                    read_segment_header(bytes).is_ok_and(|header: SegmentHeader| header == segment.header)
                });
                if !is_rotten {
                    return Found::Nothing;
                }
                let name = segment.name;
                tracing::warn!(segment = %name, "the header of a segment is rotten; the segment is rebuilt");
                self.status.headers_found += 1;
                Found::Header(generation)
            }
            Check::HardState { copy, sequence } => {
                // A save that began meanwhile has written both copies, or will.
                let at_rest = tools.hard_state.filter(|at_rest| at_rest.state.sequence == sequence);
                let Some(AtRest { state, files }) = at_rest else { return Found::Nothing };
                let is_rotten = is_rotten(done.result, HARD_STATE_FILE_BYTES, |bytes| {
                    read_hard_state(bytes).is_ok_and(|found| {
                        (found.incarnation, found.sequence) == (state.incarnation, state.sequence)
                    })
                });
                if is_rotten {
                    tracing::warn!(copy, "a copy of the hard state is rotten; it is written anew");
                    self.status.hard_states_found += 1;
                    return Found::HardState(copy);
                }
                if copy == 0 {
                    let check = Check::HardState { copy: 1, sequence };
                    self.read(tools.disk, tools.ops, tools.pool, files[1], HARD_STATE_FILE_BYTES, check);
                }
                Found::Nothing
            }
        }
    }

    fn ask(
        &mut self,
        index: &Index,
        segments: &SegmentTable,
        active: Option<u32>,
        durable_through: LogIndex,
    ) {
        let mut ordinal = index.ordinal_behind(self.status.position.previous());
        // What is known to be damaged awaits its repair.
        while let Some((info, _)) = index.at(ordinal)
            && index.damage_of(info.first).is_some()
        {
            ordinal += 1;
        }
        let closed = |generation: u32| active.is_none_or(|active| generation < active);
        match index.at(ordinal) {
            Some((info, place)) if closed(place.generation) && info.last <= durable_through => {
                // One segment at a time, so that it is known which one cannot be opened.
                let through = index.end_before(place.generation.saturating_add(1)).min(durable_through);
                let bytes = REQUEST_BYTES.min(usize::try_from(self.credit).unwrap_or(usize::MAX));
                let asked = self.reads.request(index, segments, through, 0, info.first, bytes);
                self.asked = Some(place.generation);
                self.status.bytes += asked as u64;
                self.credit -= asked as i64;
            }
            _ => {
                // The end of what can be looked at. The next pass begins with the next budget.
                self.status.passes += u64::from(self.status.position > index.start().index.next());
                self.status.position = index.start().index.next();
                self.headed = 0;
                self.credit = self.credit.min(0);
            }
        }
    }
}

/// Whether what was read is not what it should be. A read that fails for another reason than the device says nothing.
fn is_rotten<B: BlockBuf>(
    result: Result<DiskOutput<B>, DiskError>,
    bytes: usize,
    is_right: impl FnOnce(&[u8]) -> bool,
) -> bool {
    match result {
        Ok(DiskOutput::Read { block, bytes: read }) => !block.get(..read.min(bytes)).is_some_and(is_right),
        Err(error) => error.kind == DiskErrorKind::Io,
        Ok(_) => false,
    }
}
