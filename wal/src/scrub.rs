//! The scrubber: reads closed segments in the background, so that damage is found while there are peers to repair it from, and
//! not when the batch is needed.
//!
//! The happy path: whoever drives the log hands out a budget from time to time; a piece of the log is read and verified as any read
//! is, at most two batches at a time; at the end a new pass begins.
//!
//! Failures: a batch that is damaged or cannot be read is told once, by [`crate::WalEvent::DamageFound`], and passed over until it is
//! repaired. The segment that is appended to is left alone: a start has read what is in it, or this process wrote it.

use crate::disk::Disk;
use crate::error::ReadError;
use crate::format::SLOT_BYTES_MAX;
use crate::index::Index;
use crate::ops::Ops;
use crate::read::Reads;
use crate::segment::SegmentTable;
use ringraft_block::{BlockBuf, LogIndex, Pool};

/// So many batches are read at once.
const READS_IN_FLIGHT: usize = 2;
/// A request is for so many bytes, or one batch.
const REQUEST_BYTES: usize = 128 * 1024;

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
}

pub(crate) struct Scrub<B: BlockBuf> {
    pub(crate) reads: Reads<B>,
    pub(crate) status: ScrubStatus,
    /// Bytes that may still be read; negative after a batch that was larger.
    credit: i64,
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
}

impl<B: BlockBuf> Scrub<B> {
    pub(crate) fn new() -> Self {
        Self { reads: Reads::new(READS_IN_FLIGHT), status: ScrubStatus::default(), credit: 0 }
    }

    /// Grants `budget_bytes` more. What was not used lately is not saved up beyond one budget, or the largest batch.
    pub(crate) fn grant<D: Disk<Buf = B>>(&mut self, tools: &mut Tools<'_, D>, budget_bytes: u64) {
        let budget = i64::try_from(budget_bytes).unwrap_or(i64::MAX / 2).min(i64::MAX / 2);
        self.credit = (self.credit + budget).min(budget.max(SLOT_BYTES_MAX as i64));
        self.advance(tools);
    }

    /// Takes the answer that has come, and asks for more while there is credit.
    pub(crate) fn advance<D: Disk<Buf = B>>(&mut self, tools: &mut Tools<'_, D>) {
        if let Some((_, result)) = self.reads.finished() {
            self.take(tools.index, &result.map(|batches| batches.last().map(|batch| batch.info.last)));
        }
        if self.reads.len() == 0 && self.credit > 0 {
            self.ask(tools.index, tools.segments, tools.active, tools.durable_through);
        }
        self.reads.advance(tools.disk, tools.ops, tools.pool, tools.segments, tools.active);
    }

    /// An answer: the last index of the batches that were read, or why they were not.
    fn take(&mut self, index: &Index, result: &Result<Option<LogIndex>, ReadError>) {
        match result {
            Ok(Some(last)) => self.status.position = last.next(),
            Err(ReadError::Damaged { first, .. }) => {
                let behind = index.containing(*first).map(|(info, _)| info.last.next());
                self.status.position = behind.unwrap_or(*first);
            }
            // Truncated meanwhile, or no memory: the same again, with the next budget.
            Ok(None) | Err(_) => self.credit = self.credit.min(0),
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
                let through = active.map_or(durable_through, |active| index.end_before(active));
                let through = through.min(durable_through);
                let bytes = REQUEST_BYTES.min(usize::try_from(self.credit).unwrap_or(usize::MAX));
                let asked = self.reads.request(index, segments, through, 0, info.first, bytes);
                self.status.bytes += asked as u64;
                self.credit -= asked as i64;
            }
            _ => {
                // The end of what can be looked at. The next pass begins with the next budget.
                self.status.passes += u64::from(self.status.position > index.start().index.next());
                self.status.position = index.start().index.next();
                self.credit = self.credit.min(0);
            }
        }
    }
}
