//! Salvage: intact batches behind the place where damage cut the log. Nobody knows at once whether they belong to it again; so
//! under a claim they stay readable, and the segments that hold them, or that nothing could make sense of, stay on disk.
//!
//! The happy path: a start fills the list; whoever continues the log reads batches from here; the claim is released, durably, and
//! then the files go.

use crate::format::BatchInfo;
use crate::index::Place;
use crate::segment::{Segment, SegmentName};
use ringraft_block::LogIndex;
use std::collections::BTreeSet;

/// A batch behind the end of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Salvaged {
    pub(crate) info: BatchInfo,
    pub(crate) place: Place,
    /// Its image was intact when it was scanned.
    pub(crate) intact: bool,
}

/// What is kept under a claim.
#[derive(Default)]
pub(crate) struct Salvage {
    /// By first index, one for each.
    batches: Vec<Salvaged>,
    generations: BTreeSet<u32>,
    /// Files that nobody can place.
    unplaced: Vec<SegmentName>,
    /// Segments of older epochs are kept; 0 without a claim.
    claim_epoch: u64,
    /// What the log had left when the claim was made.
    claim_cut: LogIndex,
    /// A later start may settle the claim, if it finds all that this one has left.
    may_settle: bool,
    /// The save that makes the release durable.
    releasing: Option<u64>,
}

impl Salvage {
    pub(crate) fn new(
        batches: Vec<Salvaged>,
        unplaced: Vec<SegmentName>,
        claim_epoch: u64,
        claim_cut: LogIndex,
        may_settle: bool,
    ) -> Self {
        let generations = batches.iter().map(|batch| batch.place.generation).collect();
        Self { batches, generations, unplaced, claim_epoch, claim_cut, may_settle, releasing: None }
    }

    /// Keeps a file that nobody can place.
    pub(crate) fn keep_file(&mut self, name: SegmentName) {
        self.unplaced.push(name);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = BatchInfo> + '_ {
        self.batches.iter().map(|batch| batch.info)
    }

    /// The batch that begins at `first`.
    pub(crate) fn starting_at(&self, first: LogIndex) -> Option<&Salvaged> {
        let at = self.batches.binary_search_by_key(&first, |batch| batch.info.first).ok()?;
        self.batches.get(at)
    }

    /// The log is truncated. When that cuts off a part of what the salvage continued, it is void with it. Its files stay until the
    /// release.
    pub(crate) fn cut_after(&mut self, index: LogIndex) {
        if index < self.claim_cut {
            self.batches.clear();
        }
    }

    /// Whether the log's start may come to lie at `start`, in or behind what was appended since the claim was made. Not where that would
    /// take from what may settle it.
    pub(crate) fn is_passed_by(&self, start: LogIndex) -> bool {
        self.is_kept() && start > self.claim_cut && !self.may_settle
    }

    /// The newest segment that holds a batch which begins at `index` or before. Batches of older segments lie before that one, or were
    /// void when the claim was made.
    pub(crate) fn newest_generation_at(&self, index: LogIndex) -> Option<u32> {
        let until = self.batches.partition_point(|batch| batch.info.first <= index);
        self.batches[..until].iter().map(|batch| batch.place.generation).max()
    }

    /// Whether a file is kept that nobody can place.
    pub(crate) fn has_unplaced(&self) -> bool {
        !self.unplaced.is_empty()
    }

    /// Whether anything is kept.
    pub(crate) fn is_kept(&self) -> bool {
        self.claim_epoch > 0
    }

    /// Whether a segment that the log no longer needs is to be kept.
    pub(crate) fn keeps(&self, segment: &Segment) -> bool {
        segment.header.epoch < self.claim_epoch || self.generations.contains(&segment.generation())
    }

    /// The claim is released once the save of this number is durable. What was salvage is no longer handed out.
    pub(crate) fn release(&mut self, sequence: u64) {
        self.batches.clear();
        self.releasing = Some(sequence);
    }

    /// Whether the release has become durable. True once; nothing is kept from then on.
    pub(crate) fn released(&mut self, durable_sequence: u64) -> Option<Vec<SegmentName>> {
        self.releasing.take_if(|sequence| *sequence <= durable_sequence)?;
        let unplaced = std::mem::take(&mut self.unplaced);
        *self = Self::default();
        Some(unplaced)
    }
}
