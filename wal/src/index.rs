//! Where every batch lies: a dense table in memory, 56 bytes per batch, found by binary search.
//!
//! Batches are contiguous, so a batch's last index is the one before its successor's first; only the very last is
//! stored. The table grows in chunks of fixed capacity: appending never moves what is there, so a log of a million
//! batches costs the append after it no more than the first.

use crate::error::DamageCause;
use crate::format::{BatchInfo, BatchKind, Chain, LogStart, slot_bytes};
use ringraft_block::{BLOCK_BYTES, GroupId, LogIndex, Term};
use std::collections::{BTreeMap, VecDeque};

/// 56 KiB per chunk.
const CHUNK: usize = 1024;

/// So many of the last batches are looked at, one by one, before all are searched.
const NEAR: usize = 8;

/// Where a slot begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// The segment.
    pub(crate) generation: u32,
    /// Offset in the segment file.
    pub(crate) offset: u64,
}

/// One batch. `kind_and_bytes` holds the kind in its top byte and the image length in the rest.
#[derive(Clone, Copy)]
struct Row {
    first: LogIndex,
    term: Term,
    time_ms: u64,
    chain: Chain,
    kind_and_bytes: u32,
    payload_bytes: u32,
    generation: u32,
    block: u32,
}

const _: () = {
    assert!(size_of::<Row>() == 56);
    assert!(crate::format::IMAGE_BYTES_MAX < 1 << 24, "the image length fits beside the kind");
};

/// The batches of the log in order.
pub(crate) struct Index {
    group: GroupId,
    start: LogStart,
    /// All but the last are full.
    chunks: VecDeque<Vec<Row>>,
    /// Rows of the first chunk that lie before the start.
    purged: usize,
    last: LogIndex,
    /// The batches whose image is not intact on disk, by first index.
    damaged: BTreeMap<LogIndex, DamageCause>,
}

impl Index {
    /// An empty log that begins after `start`.
    pub(crate) fn new(group: GroupId, start: LogStart) -> Self {
        Self { group, start, chunks: VecDeque::new(), purged: 0, last: start.index, damaged: BTreeMap::new() }
    }

    pub(crate) fn start(&self) -> LogStart {
        self.start
    }

    /// Names the chain before the first batch.
    pub(crate) fn set_genesis(&mut self, genesis: Chain) {
        assert!(self.is_empty() && self.start.index.get() == 0, "the genesis precedes every batch");
        self.start.chain = genesis;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn len(&self) -> usize {
        self.chunks.back().map_or(0, |last| (self.chunks.len() - 1) * CHUNK + last.len() - self.purged)
    }

    /// The end of the log: its last batch, or where it starts.
    pub(crate) fn end(&self) -> LogStart {
        match self.len().checked_sub(1).and_then(|at| self.row(at)) {
            Some(row) => LogStart { index: self.last, term: row.term, chain: row.chain },
            None => self.start,
        }
    }

    /// Appends a batch that the caller has checked to follow the last.
    pub(crate) fn push(&mut self, info: &BatchInfo, place: Place) {
        assert_eq!(info.first, self.last.next(), "batches are contiguous");
        if self.chunks.back().is_none_or(|chunk| chunk.len() == CHUNK) {
            self.chunks.push_back(Vec::with_capacity(CHUNK));
        }
        let row = Row {
            first: info.first,
            term: info.term,
            time_ms: info.time_ms,
            chain: info.chain,
            kind_and_bytes: (info.kind as u32) << 24 | info.image_bytes,
            payload_bytes: info.payload_bytes,
            generation: place.generation,
            block: (place.offset / BLOCK_BYTES as u64) as u32,
        };
        if let Some(chunk) = self.chunks.back_mut() {
            chunk.push(row);
        }
        self.last = info.last;
    }

    /// Notes that the image of the batch that begins at `first` is not intact. False when that is known already, or there is no such
    /// batch.
    pub(crate) fn damage(&mut self, first: LogIndex, cause: DamageCause) -> bool {
        if self.damaged.contains_key(&first) || self.ordinal_starting_at(first).is_none() {
            return false;
        }
        self.damaged.insert(first, cause);
        true
    }

    /// Notes that the batch is intact again; its image tells what its envelope did not.
    pub(crate) fn repaired(&mut self, info: &BatchInfo) {
        if self.damaged.remove(&info.first).is_some()
            && let Some(ordinal) = self.ordinal_starting_at(info.first)
            && let Some(row) = self.row_mut(ordinal)
        {
            row.kind_and_bytes = (info.kind as u32) << 24 | info.image_bytes;
            row.time_ms = info.time_ms;
            row.payload_bytes = info.payload_bytes;
        }
    }

    /// The batches that are not intact, by first index.
    pub(crate) fn damaged(&self) -> impl Iterator<Item = (LogIndex, DamageCause)> + '_ {
        self.damaged.iter().map(|(first, cause)| (*first, *cause))
    }

    pub(crate) fn damage_of(&self, first: LogIndex) -> Option<DamageCause> {
        self.damaged.get(&first).copied()
    }

    /// Whether a batch of the log lies in the segment.
    pub(crate) fn uses(&self, generation: u32) -> bool {
        let at = self.partition(|row| row.generation < generation);
        self.row(at).is_some_and(|row| row.generation == generation)
    }

    /// The ordinal of the first batch that ends behind `index`.
    pub(crate) fn ordinal_behind(&self, index: LogIndex) -> usize {
        let after = self.partition(|row| row.first <= index);
        match after.checked_sub(1).and_then(|at| self.at(at)) {
            Some((info, _)) if info.last > index => after - 1,
            _ => after,
        }
    }

    /// The last index before the segment.
    pub(crate) fn end_before(&self, generation: u32) -> LogIndex {
        let at = self.partition(|row| row.generation < generation);
        self.row(at).map_or(self.last, |row| row.first.previous())
    }

    /// The ordinal of the first batch whose slot begins at `place` or later in the order of the segments.
    pub(crate) fn ordinal_at_place(&self, place: Place) -> usize {
        self.partition(|row| row.place() < place)
    }

    /// Drops every batch after `index`, which is the end of a batch or the log's start.
    pub(crate) fn truncate_after(&mut self, index: LogIndex) {
        let kept = self.partition(|row| row.first <= index);
        self.truncate(kept);
        assert_eq!(self.last, index, "the log is cut at the end of a batch");
    }

    /// Drops every batch whose slot begins at `place` or later in the order of the segments.
    pub(crate) fn truncate_at_place(&mut self, place: Place) {
        let kept = self.partition(|row| row.place() < place);
        self.truncate(kept);
    }

    /// Drops every batch through `start`, the end of a batch, which becomes where the log starts.
    pub(crate) fn start_behind(&mut self, start: LogStart) {
        assert_eq!(self.chain_at(start.index), Some(start.chain), "the log starts at the end of a batch");
        let dropped = self.partition(|row| row.first <= start.index) + self.purged;
        self.damaged = self.damaged.split_off(&start.index.next());
        self.start = start;
        if dropped == self.len() + self.purged {
            self.chunks.clear();
            self.purged = 0;
        } else {
            self.chunks.drain(..dropped / CHUNK);
            self.purged = dropped % CHUNK;
        }
    }

    /// The last index that can be dropped when at least `bytes` of slots are to be kept; the log's start when all are.
    pub(crate) fn last_droppable(&self, bytes: u64) -> LogIndex {
        let mut missing = bytes;
        let mut end = self.len();
        // From the newest segment to the oldest; within one, slots lie one behind the other.
        while let Some((info, place)) = end.checked_sub(1).and_then(|last| self.at(last)) {
            let slots_end = place.offset + info.slot_bytes() as u64;
            let first = self.partition(|row| row.generation < place.generation);
            let begins = self.row(first).map_or(slots_end, |row| row.place().offset);
            if missing <= slots_end - begins {
                let limit = Place { generation: place.generation, offset: slots_end - missing };
                // The newest slot that begins at or before the limit is kept, and all behind it.
                let kept = self.partition(|row| row.place() <= limit);
                let kept = if missing == 0 { end } else { kept.saturating_sub(1).max(first) };
                return self.row(kept).map_or(self.last, |row| row.first.previous());
            }
            missing -= slots_end - begins;
            end = first;
        }
        self.start.index
    }

    /// The segment of the first batch.
    pub(crate) fn first_generation(&self) -> Option<u32> {
        self.row(0).map(|row| row.generation)
    }

    fn truncate(&mut self, kept: usize) {
        let Some(next) = self.row(kept).copied() else { return };
        self.last = next.first.previous();
        self.damaged.split_off(&next.first);
        let kept = kept + self.purged;
        self.chunks.truncate(kept.div_ceil(CHUNK));
        let full = self.chunks.len().saturating_sub(1) * CHUNK;
        if let Some(last) = self.chunks.back_mut() {
            last.truncate(kept - full);
        }
    }

    /// The batch that `index` lies in.
    pub(crate) fn containing(&self, index: LogIndex) -> Option<(BatchInfo, Place)> {
        if index > self.last {
            return None;
        }
        // Most ask for one of the last batches.
        let newest = self.len().checked_sub(1)?;
        for ordinal in (0..=newest).rev().take(NEAR) {
            if self.row(ordinal)?.first <= index {
                return self.at(ordinal);
            }
        }
        let after = self.partition(|row| row.first <= index);
        self.at(after.checked_sub(1)?)
    }

    /// The batch at `ordinal` from the oldest.
    pub(crate) fn at(&self, ordinal: usize) -> Option<(BatchInfo, Place)> {
        let row = self.row(ordinal)?;
        let last = self.row(ordinal + 1).map_or(self.last, |next| next.first.previous());
        Some((row.info(self.group, last), row.place()))
    }

    /// The ordinal of the batch that begins at `first`.
    pub(crate) fn ordinal_starting_at(&self, first: LogIndex) -> Option<usize> {
        let ordinal = self.partition(|row| row.first < first);
        self.row(ordinal).is_some_and(|row| row.first == first).then_some(ordinal)
    }

    /// The chain at `index`, when that is the end of a batch or the log's start.
    pub(crate) fn chain_at(&self, index: LogIndex) -> Option<Chain> {
        if index == self.start.index {
            return Some(self.start.chain);
        }
        let (info, _) = self.containing(index)?;
        (info.last == index).then_some(info.chain)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (BatchInfo, Place)> + '_ {
        (0..self.len()).map_while(|ordinal| self.at(ordinal))
    }

    /// Where the slot behind the last batch would begin in the last batch's segment; `None` in an empty log.
    pub(crate) fn end_place(&self) -> Option<Place> {
        let (info, place) = self.at(self.len().checked_sub(1)?)?;
        let offset = place.offset + slot_bytes(info.image_bytes as usize) as u64;
        Some(Place { generation: place.generation, offset })
    }

    fn row(&self, ordinal: usize) -> Option<&Row> {
        let ordinal = ordinal + self.purged;
        self.chunks.get(ordinal / CHUNK)?.get(ordinal % CHUNK)
    }

    fn row_mut(&mut self, ordinal: usize) -> Option<&mut Row> {
        let ordinal = ordinal + self.purged;
        self.chunks.get_mut(ordinal / CHUNK)?.get_mut(ordinal % CHUNK)
    }

    /// The number of batches from the front for which `before` holds; it holds for a prefix.
    fn partition(&self, before: impl Fn(&Row) -> bool) -> usize {
        let chunk = self.chunks.partition_point(|chunk| chunk.last().is_some_and(&before));
        match self.chunks.get(chunk) {
            Some(rows) => (chunk * CHUNK + rows.partition_point(&before)).saturating_sub(self.purged),
            None => self.len(),
        }
    }
}

impl Row {
    fn place(&self) -> Place {
        Place { generation: self.generation, offset: u64::from(self.block) * BLOCK_BYTES as u64 }
    }

    fn info(&self, group: GroupId, last: LogIndex) -> BatchInfo {
        let kind = match self.kind_and_bytes >> 24 {
            2 => BatchKind::Membership,
            3 => BatchKind::Empty,
            4 => BatchKind::SessionControl,
            5 => BatchKind::Barrier,
            _ => BatchKind::Commands,
        };
        BatchInfo {
            group,
            term: self.term,
            first: self.first,
            last,
            kind,
            time_ms: self.time_ms,
            image_bytes: self.kind_and_bytes & 0x00ff_ffff,
            payload_bytes: self.payload_bytes,
            chain: self.chain,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(first: u64, last: u64) -> BatchInfo {
        BatchInfo {
            group: GroupId(0),
            term: Term(first / 100 + 1),
            first: LogIndex(first),
            last: LogIndex(last),
            kind: if first.is_multiple_of(7) { BatchKind::Barrier } else { BatchKind::Commands },
            time_ms: first * 10,
            image_bytes: 1000,
            payload_bytes: 800,
            chain: Chain((u128::from(first) << 64 | u128::from(last)).to_le_bytes()),
        }
    }

    /// Three indices per batch, two batches of one block each per segment.
    fn filled(batches: u64) -> (Index, Vec<(BatchInfo, Place)>) {
        let mut index = Index::new(GroupId(0), LogStart::default());
        let mut model = Vec::new();
        for ordinal in 0..batches {
            let info = batch(ordinal * 3 + 1, ordinal * 3 + 3);
            let place = Place { generation: (ordinal / 2) as u32 + 1, offset: 8192 + ordinal % 2 * 4096 };
            index.push(&info, place);
            model.push((info, place));
        }
        (index, model)
    }

    #[test]
    fn every_index_finds_its_batch_across_chunks() {
        let (index, model) = filled(2 * CHUNK as u64 + 10);
        assert_eq!(index.iter().collect::<Vec<_>>(), model);
        for (ordinal, row) in model.iter().enumerate() {
            for at in row.0.first.get()..=row.0.last.get() {
                assert_eq!(index.containing(LogIndex(at)).as_ref(), Some(row));
            }
            assert_eq!(index.ordinal_starting_at(row.0.first), Some(ordinal));
            assert_eq!(index.ordinal_starting_at(row.0.last), None);
            assert_eq!(index.chain_at(row.0.last), Some(row.0.chain));
            assert_eq!(index.chain_at(row.0.first), None);
        }
        assert_eq!(index.containing(LogIndex(0)), None);
        assert_eq!(index.containing(index.end().index.next()), None);
    }

    #[test]
    fn a_log_that_starts_later_is_the_same_log_without_its_front() {
        let batches = 2 * CHUNK as u64 + 10;
        for dropped in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 9, 2 * CHUNK + 10] {
            let (mut index, model) = filled(batches);
            for dropped in [dropped / 2, dropped] {
                let chain = index.chain_at(LogIndex(dropped as u64 * 3)).unwrap();
                let start = LogStart { index: LogIndex(dropped as u64 * 3), term: Term(1), chain };
                index.start_behind(start);
                assert_eq!(index.start(), start);
            }
            assert_eq!(index.iter().collect::<Vec<_>>(), model[dropped..]);
            assert_eq!(index.len(), model.len() - dropped);
            assert_eq!(index.is_empty(), dropped == model.len());
            assert_eq!(index.containing(LogIndex(dropped as u64 * 3)), None);
            assert_eq!(index.end().index, LogIndex(batches * 3));
            for (ordinal, row) in model[dropped..].iter().enumerate() {
                assert_eq!(index.containing(row.0.last).as_ref(), Some(row));
                assert_eq!(index.ordinal_starting_at(row.0.first), Some(ordinal));
            }
            let kept = (dropped + 3).min(model.len());
            index.truncate_after(LogIndex(kept as u64 * 3));
            assert_eq!(index.iter().collect::<Vec<_>>(), model[dropped..kept]);
            let info = batch(kept as u64 * 3 + 1, kept as u64 * 3 + 1);
            index.push(&info, Place { generation: 1 << 20, offset: 8192 });
            assert_eq!(index.end().index, info.last);
            assert_eq!(index.len(), kept - dropped + 1);
        }
    }

    /// Found by the simulator (seed 1875): a batch that was repaired behind a purged front left its length to another one, as
    /// many rows before it as were purged. That one could not be read any more, every intact image of it was refused, and the
    /// node stopped, since all copies seemed to be gone.
    #[test]
    fn what_a_repair_tells_goes_to_the_repaired_batch_wherever_the_log_starts() {
        for dropped in [0, 1, 30, CHUNK - 1, CHUNK, CHUNK + 30] {
            for repaired in [dropped, dropped + 1, 2 * CHUNK - 1, 2 * CHUNK + 9] {
                let (mut index, mut model) = filled(2 * CHUNK as u64 + 10);
                let chain = index.chain_at(LogIndex(dropped as u64 * 3)).unwrap();
                let start = LogStart { index: LogIndex(dropped as u64 * 3), term: Term(1), chain };
                index.start_behind(start);
                let info = &mut model[repaired].0;
                assert!(index.damage(info.first, DamageCause::ImageRotten));
                (info.image_bytes, info.time_ms, info.payload_bytes) = (2000, 7, 1800);
                index.repaired(info);
                assert_eq!(index.damaged().count(), 0);
                let found: Vec<_> = index.iter().collect();
                assert!(found == model[dropped..], "{repaired} behind {dropped}");
            }
        }
    }

    #[test]
    fn what_is_kept_by_bytes_is_at_least_that_and_not_a_batch_more() {
        // Slots of one block, two to a segment.
        let (mut index, _) = filled(21);
        let start =
            LogStart { index: LogIndex(6), chain: index.chain_at(LogIndex(6)).unwrap(), term: Term(1) };
        index.start_behind(start);
        for bytes in (0..25 * 4096).step_by(1024) {
            let kept = (bytes as u64).div_ceil(4096).min(19);
            assert_eq!(index.last_droppable(bytes as u64), LogIndex((21 - kept) * 3), "{bytes} bytes");
        }
        assert_eq!(Index::new(GroupId(0), start).last_droppable(1), LogIndex(6));
    }

    #[test]
    fn cutting_by_index_and_by_place_keep_the_same_prefix() {
        for kept in [0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK] {
            let (mut by_index, model) = filled(2 * CHUNK as u64 + 10);
            let (mut by_place, _) = filled(2 * CHUNK as u64 + 10);
            by_index.truncate_after(LogIndex(kept as u64 * 3));
            by_place.truncate_at_place(model[kept].1);
            assert_eq!(by_index.iter().collect::<Vec<_>>(), model[..kept]);
            assert_eq!(by_place.iter().collect::<Vec<_>>(), model[..kept]);
            assert_eq!(by_index.end(), by_place.end());
            assert_eq!(by_index.len(), kept);
            let info = batch(kept as u64 * 3 + 1, kept as u64 * 3 + 1);
            by_index.push(&info, model[kept].1);
            assert_eq!(by_index.end().index, info.last);
        }
    }
}
