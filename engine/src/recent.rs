//! The batches that are still wanted in memory: to be applied, and to be sent to followers that keep up. All others
//! are read from the log.

use ringraft_block::{BlockBuf, LogIndex, SharedBlock};
use ringraft_wal::StoredBatch;
use ringraft_wal::format::BatchInfo;
use std::collections::VecDeque;

/// A consecutive run of batches at the end of the log.
pub(crate) struct Recent<B: BlockBuf> {
    batches: VecDeque<StoredBatch<B>>,
    /// Capacity of the blocks that this holds on to.
    bytes: usize,
    bytes_max: usize,
}

impl<B: BlockBuf> Recent<B> {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { batches: VecDeque::new(), bytes: 0, bytes_max }
    }

    /// Whether none is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// The batch follows the last one.
    pub(crate) fn push(&mut self, info: BatchInfo, block: SharedBlock<B>) {
        debug_assert!(self.batches.back().is_none_or(|last| last.info.last.next() == info.first));
        self.bytes += block.capacity();
        self.batches.push_back(StoredBatch { info, block });
    }

    /// The batch that begins at `first`, if it is held.
    pub(crate) fn starting_at(&self, first: LogIndex) -> Option<&StoredBatch<B>> {
        let position = self.batches.partition_point(|batch| batch.info.first < first);
        self.batches.get(position).filter(|batch| batch.info.first == first)
    }

    /// Drops everything after `last`.
    pub(crate) fn truncate_after(&mut self, last: LogIndex) {
        while let Some(newest) = self.batches.back() {
            if newest.info.last <= last {
                break;
            }
            self.bytes -= newest.block.capacity();
            self.batches.pop_back();
        }
    }

    /// Lets go of the batches that end before `wanted_from`, and of the oldest while there are more bytes than
    /// allowed; but never of one behind `durable`, which cannot be read back yet.
    pub(crate) fn trim(&mut self, wanted_from: LogIndex, durable: LogIndex) {
        while let Some(oldest) = self.batches.front() {
            let wanted = oldest.info.last >= wanted_from && self.bytes <= self.bytes_max;
            if wanted || oldest.info.last > durable {
                break;
            }
            self.bytes -= oldest.block.capacity();
            self.batches.pop_front();
        }
    }
}
