//! How much of the log is durable, when completions come late.
//!
//! Completions are not ordered with truncations: a write submitted before a truncation may complete after it,
//! and then says nothing about what was written at the same indexes since. So every completion carries the epoch
//! in which its write was submitted, and one of an older epoch counts only up to the lowest cut made since.

use super::Epoch;
use crate::mutants::{self, Mutant};
use ringraft_block::LogIndex;
use std::collections::VecDeque;

/// The durable prefix of the log.
#[derive(Clone, Debug)]
pub(super) struct Durable {
    /// Everything up to here is durable; a batch end.
    last: LogIndex,
    epoch: Epoch,
    /// (epoch, lowest cut made since in that epoch or a later one), both strictly increasing. An epoch that is
    /// not listed is bounded by the next one that is. Only cuts above `last` are kept, so that there are never
    /// more of them than batches in flight.
    cuts: VecDeque<(Epoch, LogIndex)>,
    /// Completions of this epoch and older ones can say nothing new.
    forgotten: Option<Epoch>,
}

/// A completion of an epoch that has not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FutureEpoch;

impl Durable {
    pub(super) fn recovered(last: LogIndex, epoch: Epoch) -> Self {
        Self { last, epoch, cuts: VecDeque::new(), forgotten: None }
    }

    pub(super) fn last(&self) -> LogIndex {
        self.last
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The log was cut after `after`; returns the epoch that begins.
    pub(super) fn truncate(&mut self, after: LogIndex) -> Epoch {
        while self.cuts.back().is_some_and(|(_, cut)| *cut >= after) {
            self.cuts.pop_back();
        }
        self.cuts.push_back((self.epoch, after));
        self.last = self.last.min(after);
        self.epoch = Epoch(self.epoch.0.saturating_add(1));
        self.forget();
        self.epoch
    }

    /// The log begins anew behind `start`, which is durable; returns the epoch that begins.
    pub(super) fn start_behind(&mut self, start: LogIndex) -> Epoch {
        let epoch = self.truncate(LogIndex(0));
        self.last = start;
        epoch
    }

    /// What a completion of `epoch` that reports `last` means now.
    pub(super) fn means(&self, epoch: Epoch, last: LogIndex) -> Result<LogIndex, FutureEpoch> {
        if epoch == self.epoch || mutants::active(Mutant::LateCompletionCounted) {
            return Ok(last);
        }
        if epoch > self.epoch {
            return Err(FutureEpoch);
        }
        if self.forgotten.is_some_and(|forgotten| epoch <= forgotten) {
            return Ok(self.last.min(last));
        }
        let bound = self.cuts.iter().find(|(of, _)| *of >= epoch).map_or(self.last, |(_, cut)| *cut);
        Ok(last.min(bound))
    }

    /// Everything up to `last` is durable. True if that is news.
    pub(super) fn advance(&mut self, last: LogIndex) -> bool {
        let news = last > self.last;
        self.last = self.last.max(last);
        self.forget();
        news
    }

    fn forget(&mut self) {
        while let Some((epoch, cut)) = self.cuts.front().copied()
            && cut <= self.last
        {
            self.forgotten = Some(epoch);
            self.cuts.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn means(durable: &Durable, epoch: u64, last: u64) -> Option<u64> {
        durable.means(Epoch(epoch), LogIndex(last)).ok().map(LogIndex::get)
    }

    #[test]
    fn a_late_completion_counts_up_to_the_lowest_cut_since() {
        let mut durable = Durable::recovered(LogIndex(2), Epoch(4));
        assert_eq!(durable.truncate(LogIndex(8)), Epoch(5));
        assert_eq!(durable.truncate(LogIndex(5)), Epoch(6));
        assert_eq!(durable.truncate(LogIndex(7)), Epoch(7));
        assert_eq!(means(&durable, 4, 9), Some(5));
        assert_eq!(means(&durable, 5, 9), Some(5));
        assert_eq!(means(&durable, 6, 9), Some(7));
        assert_eq!(means(&durable, 7, 9), Some(9));
        assert_eq!(means(&durable, 4, 3), Some(3));
        assert_eq!(durable.means(Epoch(8), LogIndex(3)), Err(FutureEpoch));
    }

    #[test]
    fn a_cut_below_what_is_durable_makes_older_completions_worthless() {
        let mut durable = Durable::recovered(LogIndex(9), Epoch(0));
        durable.truncate(LogIndex(6));
        assert_eq!(durable.last(), LogIndex(6));
        assert!(durable.cuts.is_empty());
        assert!(durable.advance(LogIndex(8)));
        durable.truncate(LogIndex(7));
        assert_eq!(means(&durable, 0, 9), Some(7));
        durable.truncate(LogIndex(3));
        assert_eq!(means(&durable, 0, 9), Some(3));
        assert_eq!(means(&durable, 1, 9), Some(3));
    }

    #[test]
    fn every_history_of_three_cuts_agrees_with_remembering_all_of_them() {
        // A step is a cut, or an advance; the model keeps every cut and takes the minimum.
        for script in 0..6_u64.pow(6) {
            let mut durable = Durable::recovered(LogIndex(0), Epoch(0));
            let mut all: Vec<(u64, u64)> = Vec::new();
            let mut rest = script;
            for _ in 0..6 {
                let step = rest % 6;
                rest /= 6;
                let before = durable.epoch().0;
                if step < 3 {
                    durable.truncate(LogIndex(step * 2 + 1));
                    all.push((before, step * 2 + 1));
                } else {
                    durable.advance(LogIndex(step * 2 - 4));
                }
                for epoch in 0..=durable.epoch().0 {
                    let bound = all.iter().filter(|(of, _)| *of >= epoch).map(|(_, cut)| *cut).min();
                    let model = bound.unwrap_or(u64::MAX).min(20).max(durable.last().get());
                    let got =
                        means(&durable, epoch, 20).expect("not a future epoch").max(durable.last().get());
                    assert_eq!(got, model, "script {script} epoch {epoch} {durable:?}");
                }
            }
        }
    }
}
