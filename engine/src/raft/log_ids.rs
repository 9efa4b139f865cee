//! The log as the core sees it: where batches end, and which term sealed them.
//!
//! 16 bytes per batch and 16 per change of term, so that a log of a million batches costs 16 MB. An index is
//! found by binary search, unless it is one of the last batches', which nearly all questions are about.

use super::{BatchRun, LogId};
use ringraft_block::{LogIndex, Term};
use std::collections::VecDeque;

/// So many of the last batches are looked at, one by one, before all are searched.
const NEAR: usize = 8;

/// The batches after `start`, without gaps, their terms never decreasing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogIds {
    /// What precedes the first batch held: a batch end, committed, possibly covered by a snapshot.
    start: LogId,
    batches: VecDeque<Slot>,
    /// Terms in increasing order, each with the first index that it sealed.
    runs: VecDeque<Run>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    last: LogIndex,
    bytes: u32,
    count: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    term: Term,
    first: LogIndex,
}

const _: () = assert!(size_of::<Slot>() <= 24, "the budget per batch");

impl Slot {
    fn first(&self) -> LogIndex {
        LogIndex(self.last.get() - u64::from(self.count) + 1)
    }
}

impl LogIds {
    /// An empty log after `start`.
    #[must_use]
    pub fn new(start: LogId) -> Self {
        Self { start, batches: VecDeque::new(), runs: VecDeque::new() }
    }

    /// What precedes the first batch held.
    #[must_use]
    pub fn start(&self) -> LogId {
        self.start
    }

    /// The end of the log.
    #[must_use]
    pub fn last(&self) -> LogId {
        match (self.batches.back(), self.runs.back()) {
            (Some(slot), Some(run)) => LogId { term: run.term, index: slot.last },
            _ => self.start,
        }
    }

    /// Number of batches held.
    #[must_use]
    pub fn batch_count(&self) -> usize {
        self.batches.len()
    }

    /// Whether `batch` could be the next one.
    #[must_use]
    pub fn continues_with(&self, batch: &BatchRun) -> bool {
        batch.first > self.last().index
            && batch.first == self.last().index.next()
            && batch.term >= self.last().term
            && count_of(batch).is_some()
    }

    /// Appends `batch`.
    ///
    /// # Panics
    /// If it does not continue the log: callers have asked [`LogIds::continues_with`].
    pub fn push(&mut self, batch: BatchRun) {
        assert!(self.continues_with(&batch), "{batch:?} does not follow {:?}", self.last());
        if self.runs.back().is_none_or(|run| run.term < batch.term) {
            self.runs.push_back(Run { term: batch.term, first: batch.first });
        }
        let count = count_of(&batch).unwrap_or_default();
        self.batches.push_back(Slot { last: batch.last, bytes: batch.bytes, count });
    }

    /// Drops everything after `after`, which is a batch end at or above the start.
    pub fn truncate_after(&mut self, after: LogIndex) {
        assert!(self.batch_end_at(after).is_some(), "{after} is not a batch end");
        let kept = self.batches.partition_point(|slot| slot.last <= after);
        self.batches.truncate(kept);
        let kept = self.runs.partition_point(|run| run.first <= after);
        self.runs.truncate(kept);
    }

    /// Drops everything up to `start`, a batch end of the log or its present start, which becomes where it starts.
    ///
    /// # Panics
    /// If no batch ends there.
    pub fn start_behind(&mut self, start: LogId) {
        assert!(self.floor(start.index) == Some(start.index), "{start:?} is not a batch end");
        let dropped = self.batches.partition_point(|slot| slot.last <= start.index);
        self.batches.drain(..dropped);
        // The run that goes on behind the start begins there.
        let after = self.runs.partition_point(|run| run.first <= start.index);
        if !self.batches.is_empty()
            && let Some(run) = after.checked_sub(1).and_then(|at| self.runs.get(at)).copied()
            && self.runs.get(after).is_none_or(|next| next.first > start.index.next())
        {
            self.runs.drain(..after - 1);
            self.runs[0] = Run { first: start.index.next(), ..run };
        } else {
            self.runs.drain(..after);
        }
        self.start = start;
    }

    /// The term of the entry at `index`; none outside of the log. Known at the start, too.
    #[must_use]
    pub fn term_at(&self, index: LogIndex) -> Option<Term> {
        if index == self.start.index {
            return Some(self.start.term);
        }
        if index < self.start.index || index > self.last().index {
            return None;
        }
        // Most ask for the newest term.
        if let Some(newest) = self.runs.back().filter(|newest| newest.first <= index) {
            return Some(newest.term);
        }
        let after = self.runs.partition_point(|run| run.first <= index);
        Some(self.runs.get(after.checked_sub(1)?)?.term)
    }

    /// The position at `index` if a batch, or the start, ends there.
    #[must_use]
    pub fn batch_end_at(&self, index: LogIndex) -> Option<LogId> {
        let term = self.term_at(index)?;
        (self.floor(index) == Some(index)).then_some(LogId { term, index })
    }

    /// The batch that holds `index`.
    #[must_use]
    pub fn batch_at(&self, index: LogIndex) -> Option<BatchRun> {
        if index <= self.start.index {
            return None;
        }
        let newest = self.batches.back()?;
        if index > newest.last {
            return None;
        }
        let slot = self.batches.get(self.ended_by(index.previous()))?;
        let term = self.term_at(slot.last)?;
        Some(BatchRun { first: slot.first(), last: slot.last, term, bytes: slot.bytes })
    }

    /// The batch whose first index is `index`.
    #[must_use]
    pub fn batch_starting_at(&self, index: LogIndex) -> Option<BatchRun> {
        self.batch_at(index).filter(|batch| batch.first == index)
    }

    /// The last batch end at or below `index`; none below the start.
    #[must_use]
    pub fn floor(&self, index: LogIndex) -> Option<LogIndex> {
        if index < self.start.index {
            return None;
        }
        let last = self.ended_by(index).checked_sub(1).and_then(|at| self.batches.get(at));
        Some(last.map_or(self.start.index, |slot| slot.last))
    }

    /// How many batches end at or below `index`.
    fn ended_by(&self, index: LogIndex) -> usize {
        // Most ask for the end of the log, or for a place shortly before it.
        let near = self.batches.iter().rev().take(NEAR).position(|slot| slot.last <= index);
        match near {
            Some(later) => self.batches.len() - later,
            None => self.batches.partition_point(|slot| slot.last <= index),
        }
    }

    /// The last batch end at or below `index` whose term is at or below `term`; none if that would be below the
    /// start.
    #[must_use]
    pub fn floor_within_term(&self, index: LogIndex, term: Term) -> Option<LogId> {
        if term < self.start.term {
            return None;
        }
        let later = self.runs.partition_point(|run| run.term <= term);
        let bound = self.runs.get(later).map_or(index, |run| index.min(run.first.previous()));
        self.batch_end_at(self.floor(bound)?)
    }

    /// The batches held, in order.
    pub fn iter(&self) -> impl Iterator<Item = BatchRun> + '_ {
        self.batches.iter().filter_map(|slot| self.batch_at(slot.last))
    }
}

/// How many entries a run holds, if it is a run at all.
fn count_of(batch: &BatchRun) -> Option<u32> {
    let before_last = batch.last.get().checked_sub(batch.first.get())?;
    u32::try_from(before_last.checked_add(1)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(index: u64, term: u64) -> LogId {
        LogId { term: Term(term), index: LogIndex(index) }
    }

    /// Batches of (count, term) after `start`.
    fn log(start: LogId, batches: &[(u64, u64)]) -> LogIds {
        let mut log = LogIds::new(start);
        for (count, term) in batches {
            let first = log.last().index.next();
            log.push(BatchRun {
                first,
                last: LogIndex(first.get() + count - 1),
                term: Term(*term),
                bytes: (count * 100) as u32,
            });
        }
        log
    }

    #[test]
    fn every_index_finds_its_term_and_its_batch() {
        let log = log(id(10, 1), &[(2, 1), (1, 3), (3, 3), (1, 4)]);
        let terms: Vec<_> = (9..=18).map(|index| log.term_at(LogIndex(index)).map(Term::get)).collect();
        let expected = [None, Some(1), Some(1), Some(1), Some(3), Some(3), Some(3), Some(3), Some(4), None];
        assert_eq!(terms, expected);
        let ends: Vec<_> = (9..=18).filter(|index| log.batch_end_at(LogIndex(*index)).is_some()).collect();
        assert_eq!(ends, [10, 12, 13, 16, 17]);
        assert_eq!(
            log.batch_at(LogIndex(15)).map(|batch| (batch.first.get(), batch.last.get())),
            Some((14, 16))
        );
        assert_eq!(log.batch_starting_at(LogIndex(15)), None);
        assert_eq!(log.batch_starting_at(LogIndex(14)).map(|batch| batch.end()), Some(id(16, 3)));
        assert_eq!(log.iter().count(), log.batch_count());
    }

    #[test]
    fn floor_within_term_skips_whole_terms() {
        let log = log(id(0, 0), &[(1, 1), (2, 1), (2, 4), (1, 4), (3, 6)]);
        for (index, term, expected) in [
            (9, 6, Some(id(9, 6))),
            (8, 6, Some(id(6, 4))),
            (9, 5, Some(id(6, 4))),
            (5, 5, Some(id(5, 4))),
            (4, 4, Some(id(3, 1))),
            (9, 3, Some(id(3, 1))),
            (2, 3, Some(id(1, 1))),
            (9, 0, Some(id(0, 0))),
            (u64::MAX, u64::MAX, Some(id(9, 6))),
        ] {
            assert_eq!(log.floor_within_term(LogIndex(index), Term(term)), expected, "{index}@{term}");
        }
        let purged = LogIds::new(id(5, 4));
        assert_eq!(purged.floor_within_term(LogIndex(9), Term(3)), None);
        assert_eq!(purged.floor_within_term(LogIndex(4), Term(4)), None);
    }

    #[test]
    fn truncation_forgets_batches_and_terms_after_the_cut() {
        let mut log = log(id(0, 0), &[(1, 1), (2, 2), (2, 3)]);
        log.truncate_after(LogIndex(3));
        assert_eq!(log.last(), id(3, 2));
        log.truncate_after(LogIndex(0));
        assert_eq!(log.last(), id(0, 0));
        assert_eq!(log, LogIds::new(id(0, 0)));
    }

    #[test]
    fn a_batch_is_found_near_the_end_and_far_from_it() {
        let counts: Vec<u64> = (0..3 * NEAR as u64).map(|batch| batch % 3 + 1).collect();
        let batches: Vec<(u64, u64)> = counts.iter().map(|count| (*count, 1)).collect();
        let log = log(id(10, 1), &batches);
        let mut floor = 10;
        for count in counts {
            let last = floor + count;
            for index in (floor + 1..=last).map(LogIndex) {
                let batch = log.batch_at(index).expect("it is in the log");
                assert_eq!((batch.first, batch.last), (LogIndex(floor + 1), LogIndex(last)), "{index}");
                let expected = if index.get() == last { last } else { floor };
                assert_eq!(log.floor(index), Some(LogIndex(expected)), "{index}");
            }
            floor = last;
        }
        assert_eq!(log.last().index, LogIndex(floor));
        assert_eq!(log.floor(LogIndex(floor + 5)), Some(LogIndex(floor)));
        assert_eq!((log.batch_at(LogIndex(10)), log.batch_at(LogIndex(floor + 1))), (None, None));
        assert_eq!((log.floor(LogIndex(10)), log.floor(LogIndex(9))), (Some(LogIndex(10)), None));
    }

    #[test]
    fn a_log_that_starts_later_answers_as_before_from_there_on() {
        let batches = [(1, 1), (2, 2), (2, 2), (1, 3), (3, 3), (1, 6)];
        let whole = log(id(0, 0), &batches);
        for start in whole.iter().map(|batch| batch.end()) {
            let mut later = whole.clone();
            later.start_behind(start);
            assert_eq!((later.start(), later.last()), (start, whole.last()));
            for index in (start.index.get()..=11).map(LogIndex) {
                assert_eq!(later.term_at(index), whole.term_at(index), "{index} behind {start:?}");
                assert_eq!(later.batch_end_at(index), whole.batch_end_at(index));
                if index > start.index {
                    assert_eq!(later.batch_at(index), whole.batch_at(index));
                }
                for term in (start.term.get()..8).map(Term) {
                    let expected = whole.floor_within_term(index, term);
                    assert_eq!(later.floor_within_term(index, term), expected, "{index}@{term}");
                }
            }
            assert_eq!(
                later.term_at(start.index.previous()),
                if start.index.get() == 0 { Some(Term(0)) } else { None }
            );
            let mut anew = LogIds::new(start);
            whole.iter().filter(|batch| batch.first > start.index).for_each(|batch| anew.push(batch));
            assert_eq!(later, anew);
        }
    }

    #[test]
    fn what_does_not_continue_the_log_is_told_apart() {
        let log = log(id(0, 0), &[(2, 3)]);
        let run = |first, last, term| BatchRun {
            first: LogIndex(first),
            last: LogIndex(last),
            term: Term(term),
            bytes: 1,
        };
        assert!(log.continues_with(&run(3, 3, 3)));
        assert!(!log.continues_with(&run(2, 3, 3)));
        assert!(!log.continues_with(&run(4, 4, 3)));
        assert!(!log.continues_with(&run(3, 3, 2)));
        assert!(!log.continues_with(&run(3, 2, 3)));
        assert!(!log.continues_with(&run(3, u64::MAX, 3)));
    }
}
