//! Moving the log's start, and what becomes of segments that leave service.
//!
//! The happy path: the new start is saved to both copies of the hard state; the segments wholly before it leave the table; each
//! waits until nothing is in flight on it, is closed, and is recycled, or removed where it cannot be. Segments behind a
//! truncation leave in the same way, once the cut is durable.
//!
//! [`Wal::start_anew`] is both in one: start and cut are saved together, and all segments are left behind.

use super::{Announce, CutPhase, PendingCut, Stage, Wal, WalEvent};
use crate::disk::{Disk, DiskDone, DiskErrorKind, DiskOp, DiskOpId};
use crate::error::WalError;
use crate::format::{Cut, LogStart};
use crate::index::Index;
use crate::ops::Owner;
use crate::read::close;
use crate::recycle::{Recycled, Retired};
use crate::segment::{Descriptor, Segment, SegmentName};
use ringraft_block::LogIndex;
use std::collections::VecDeque;

/// Moves of the log's start whose saves are on their way: the one that is being written, and the next.
pub(super) type Purges = VecDeque<Purge>;

/// A move of the log's start.
pub(super) struct Purge {
    /// The save that makes it durable.
    sequence: u64,
    through: LogIndex,
    /// Segments of lower generations are not needed behind the new start.
    needed: u32,
    /// But for those that are kept under a claim, of this generation or a higher one.
    kept: u32,
}

/// Segments on their way out.
#[derive(Default)]
pub(super) struct Removal {
    /// Behind a cut, or before the log's start.
    pub(super) segments: VecDeque<Segment>,
    /// Files that never entered service, given up for their space.
    names: VecDeque<String>,
    /// Files of which nobody can tell what they are, once no claim needs them any more.
    pub(super) files: Vec<SegmentName>,
    pub(super) operation: Option<DiskOpId>,
    /// Something was removed since the directory was synced.
    dirty: bool,
}

impl<D: Disk> Wal<D> {
    /// Moves the log's start to `index`, or as near to it as leaves `retain_bytes` of log, and returns where it starts now. Reads
    /// before it find nothing any more. Damaged batches are not retained. [`WalEvent::Purged`] says that it is durable; only then do segments leave
    /// service. Does nothing when the log starts there already, or later. Under a claim the start stays before the segment in which the
    /// log was cut, or lies in what was appended since; then the older segments stay that may hold what follows it.
    ///
    /// # Panics
    /// When the log is not open, or `index` lies behind the log's start and is not the end of a durable batch.
    pub fn purge_through(&mut self, disk: &mut D, index: LogIndex) -> LogIndex {
        assert_eq!(self.stage, Stage::Open, "an open log is purged");
        let start = self.index.start().index;
        if index <= start {
            return start;
        }
        assert!(self.index.chain_at(index).is_some(), "the log is purged through the end of a batch");
        assert!(index <= self.window.durable_through(), "only what is durable is purged");
        let droppable = self.index.last_droppable(self.config.retain_bytes);
        // A batch that cannot be read is of no use to anyone.
        let damaged = self.index.damaged().map(|(first, _)| first).take_while(|first| *first <= index).last();
        let damaged = damaged.and_then(|first| self.index.containing(first)).map(|(info, _)| info.last);
        let mut through = index.min(droppable.max(damaged.unwrap_or_default()));
        if !self.salvage.is_passed_by(through)
            && let Some(generation) = self.claimed_from()
        {
            through = through.min(self.index.end_before(generation));
        }
        let Some((info, place)) = self.index.containing(through).filter(|_| through > start) else {
            return start;
        };
        debug_assert_eq!(info.last, through, "both bounds are ends of batches");
        let start = LogStart { index: info.last, term: info.term, chain: info.chain };
        let kept = self.claimed_behind(start.index);
        let has_unplaced = self.salvage.has_unplaced();
        self.index.start_behind(start);
        self.reads.start_behind(start.index);
        let store = self.open_hard_state();
        store.state.start = start;
        match kept {
            None => store.state.start_generation = place.generation,
            // A later start may be able to place what this one could not, anywhere among the older ones.
            Some(_) if has_unplaced => {}
            Some(kept) => {
                let generation = kept.min(place.generation);
                store.state.start_generation = store.state.start_generation.max(generation);
            }
        }
        store.state.witness = store.state.witness.max(start.index);
        let sequence = store.request();
        // What the log goes on with holds the first batch that is kept; without one it is the segment that is appended to, and
        // while that is being replaced, the one that held the last.
        let first = self.index.first_generation();
        let needed = first.or(self.active.map(|active| active.generation)).unwrap_or(place.generation);
        let purge = Purge { sequence, through: start.index, needed, kept: kept.unwrap_or(needed) };
        // A save that has not begun will contain this start too.
        if self.purges.len() >= 2 {
            self.purges.pop_back();
        }
        self.purges.push_back(purge);
        self.try_advance_hard_state(disk);
        start.index
    }

    /// Drops the whole log and lets it begin behind `start`, the end of a snapshot that is durable. Returns the new epoch. The
    /// index shows it at once; appends wait until it is durable and a fresh segment is there. [`WalEvent::TruncateDone`] tells
    /// the former. After a crash before that the log is as it was. Under a claim the old files are kept from the one on in which the log
    /// was cut, and what was salvage stays readable, since some of it may follow the snapshot.
    ///
    /// # Panics
    /// When the log is not open, or `start` does not lie behind the present one.
    pub fn start_anew(&mut self, disk: &mut D, start: LogStart) -> u64 {
        assert_eq!(self.stage, Stage::Open, "an open log is started anew");
        assert!(start.index > self.index.start().index, "the log's start does not go back");
        self.unfinished = true;
        self.epoch += 1;
        let claimed_from = self.claimed_behind(start.index).or(self.claimed_from()).unwrap_or(0);
        self.index = Index::new(self.config.group, start);
        self.window.start_behind(start.index);
        self.reads.cut_after(LogIndex(0));
        self.scrub.reads.cut_after(LogIndex(0));
        self.persisted_told = start.index;
        self.active = None;
        self.removal.segments.extend(self.segments.take_if(|segment| segment.generation() < claimed_from));
        for segment in self.segments.take_after(0) {
            self.let_go(segment);
        }
        let kept = self.salvage.is_kept();
        let next_generation = self.next_generation;
        let store = self.open_hard_state();
        store.state.start = start;
        if !kept {
            // Whatever is there now lies before the start.
            store.state.start_generation = next_generation;
        }
        // Nothing has to become durable first, so the cut is saved with the start, in one.
        let cut = Cut { index: start.index, ..Cut::default() };
        let (phase, announce) = (CutPhase::Draining, Announce::TruncateDone);
        self.cut = Some(PendingCut { phase, cut, after: start, announce });
        self.try_advance_cut(disk);
        self.epoch
    }

    /// Under a claim, the segment from which on all that are older than the claim may hold what the log is to go on with: the one in
    /// which the log was cut. What lies before is log like any other: were it kept, a full disk could keep the log from ever
    /// reaching what would release the claim.
    fn claimed_from(&self) -> Option<u32> {
        if !self.salvage.is_kept() {
            return None;
        }
        let mut cut_in = None;
        for segment in self.segments.iter().filter(|segment| self.salvage.keeps(segment)) {
            if !self.index.uses(segment.generation()) {
                return cut_in.or(Some(segment.generation()));
            }
            cut_in = Some(segment.generation());
        }
        Some(cut_in.unwrap_or(0))
    }

    /// When the log's start moves to `start`, in or behind what was appended under the claim: the oldest of the older segments
    /// that may hold a batch behind it. What they hold before it, a snapshot covers.
    fn claimed_behind(&self, start: LogIndex) -> Option<u32> {
        if !self.salvage.is_passed_by(start) {
            return None;
        }
        let kept =
            || self.segments.iter().filter(|segment| self.salvage.keeps(segment)).map(Segment::generation);
        // The one in which the log was cut, if it holds any of the log.
        let cut_in = kept().filter(|generation| self.index.uses(*generation)).last();
        let behind = self.salvage.newest_generation_at(start.next());
        let newest = cut_in.max(behind).or_else(|| kept().next());
        // Nothing is kept that could be told from what was appended: then all of that is the log's.
        Some(newest.unwrap_or(u32::MAX))
    }

    /// The last index that [`Self::purge_through`] could move the start to if it had to leave `bytes` of log.
    #[must_use]
    pub fn last_droppable(&self, bytes: u64) -> LogIndex {
        self.index.last_droppable(bytes)
    }

    /// Lets the segments go that lie before a start that is durable.
    pub(super) fn advance_purges(&mut self, events: &mut VecDeque<WalEvent<D::Buf>>) {
        let durable = self.hard_state.as_ref().map_or(0, |store| store.durable_sequence());
        while let Some(purge) = self.purges.front()
            && purge.sequence <= durable
        {
            let Purge { through, needed, kept, .. } = *purge;
            self.purges.pop_front();
            let salvage = &self.salvage;
            let stays = |segment: &Segment| segment.generation() >= kept && salvage.keeps(segment);
            let mut leaving =
                self.segments.take_if(|segment| segment.generation() < needed && !stays(segment));
            if kept < needed {
                // Older ones are read on: what a file held in its former life must not be looked for among them.
                leaving.iter_mut().for_each(|segment| segment.sums = None);
            }
            self.removal.segments.extend(leaving);
            events.push_back(WalEvent::Purged { through });
        }
    }

    /// Recycles or removes the segments on their way out: one operation at a time.
    pub(super) fn advance_removal(&mut self, disk: &mut D) {
        if self.removal.operation.is_some() {
            return;
        }
        if let Some(name) = self.removal.names.pop_front() {
            self.remove(disk, name);
            return;
        }
        let durable = matches!(self.cut, None | Some(PendingCut { phase: CutPhase::Fresh, .. }));
        if !durable || self.stage != Stage::Open {
            return;
        }
        if let Some(name) = self.removal.files.pop() {
            self.remove(disk, name.to_string());
            return;
        }
        match self.removal.segments.front_mut() {
            Some(segment) if segment.operations > 0 => {}
            Some(segment) if segment.descriptor == Descriptor::Closed => {
                if self.recycler.is_idle()
                    && let Some(segment) = self.removal.segments.pop_front()
                {
                    self.retire(disk, segment);
                }
            }
            Some(segment) => {
                close(disk, &mut self.ops, segment);
            }
            None if self.removal.dirty => {
                self.removal.dirty = false;
                self.removal.operation = Some(self.ops.submit(disk, Owner::Removal, DiskOp::SyncDirectory));
            }
            None => {}
        }
    }

    /// Recycles a segment that this process has written, if there is room among the recycled ones, and removes any other.
    fn retire(&mut self, disk: &mut D, segment: Segment) {
        let used = self.maker.as_ref().map_or(0, |maker| maker.used());
        let Segment { name, header, sums, .. } = segment;
        match sums {
            Some(sums) if used < self.config.recycled_segments_max => {
                // The next one can be closed meanwhile.
                self.unfinished = true;
                let (bytes, prior) = (header.segment_bytes, header.prior_content);
                self.recycler.begin(disk, &mut self.ops, Retired { name, bytes, prior, sums });
            }
            _ => self.remove(disk, name.to_string()),
        }
    }

    fn remove(&mut self, disk: &mut D, name: String) {
        self.removal.dirty = true;
        self.stats.segments_removed += 1;
        self.removal.operation = Some(self.ops.submit(disk, Owner::Removal, DiskOp::Remove { name }));
    }

    pub(super) fn removal_done(&mut self, done: DiskDone<D::Buf>) -> Result<(), WalError> {
        if self.removal.operation != Some(done.id) {
            return Err(WalError::Protocol { what: "taking a completion" });
        }
        self.removal.operation = None;
        match done.result {
            Ok(_) => {}
            Err(error) if error.kind == DiskErrorKind::NotFound => {}
            Err(error) => return Err(WalError::Disk { what: "removing a segment", error }),
        }
        self.space_freed = true;
        Ok(())
    }

    pub(super) fn recycle_done(&mut self, disk: &mut D, done: DiskDone<D::Buf>) -> Result<(), WalError> {
        match self.recycler.handle(disk, &mut self.ops, &self.pool, done)? {
            Some(Recycled::Ready(name)) => {
                self.stats.segments_recycled += 1;
                if let Some(maker) = self.maker.as_mut() {
                    maker.add_used(name);
                }
            }
            Some(Recycled::Removed) => {
                self.stats.segments_removed += 1;
                self.removal.dirty = true;
                self.space_freed = true;
            }
            None => {}
        }
        Ok(())
    }

    /// The hard state has no space for its files at a start: a segment that is ready is given up for it, and when there is none,
    /// the start waits for [`Self::retry_space`].
    pub(super) fn advance_blocked_start(&mut self, disk: &mut D, events: &mut VecDeque<WalEvent<D::Buf>>) {
        let Some(store) = self.hard_state.as_mut().filter(|store| store.is_blocked()) else { return };
        if self.removal.operation.is_some() || !self.removal.names.is_empty() {
            return;
        }
        if std::mem::take(&mut self.space_freed) {
            store.retry(disk, &mut self.ops);
        } else if let Some(name) = self.maker.as_mut().and_then(|maker| maker.take_ready()) {
            self.removal.names.push_back(name.to_string());
        } else if !self.short_of_space {
            self.short_of_space = true;
            events.push_back(WalEvent::NoSpace { segments_left: 0 });
        }
    }
}
