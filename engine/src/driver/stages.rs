//! Where a follower spends its time on a batch: received from the leader, handed to the log, durable.
//!
//! Times are those of the driver's turns, so that nothing shorter than a turn shows.

use crate::wire::AckStages;
use ringraft_block::LogIndex;
use std::collections::VecDeque;

/// Batches that are timed at once. More are under way only behind a leader whose window is larger; the rest of
/// those goes untimed.
const BATCHES_MAX: usize = 4096;

/// The clock of each batch that was received and is not durable yet, and what the last one showed.
#[derive(Debug, Default)]
pub(super) struct Stages {
    /// In the order of the log.
    batches: VecDeque<Timed>,
    newest: AckStages,
}

#[derive(Debug)]
struct Timed {
    last: LogIndex,
    received_ns: u64,
    submitted_ns: Option<u64>,
}

impl Stages {
    /// The batch that ends at `last` came from the leader.
    pub(super) fn received(&mut self, last: LogIndex, now_ns: u64) {
        if self.batches.len() < BATCHES_MAX {
            self.batches.push_back(Timed { last, received_ns: now_ns, submitted_ns: None });
        }
    }

    /// The log took the batch that ends at `last`.
    pub(super) fn submitted(&mut self, last: LogIndex, now_ns: u64) {
        let position = self.batches.partition_point(|batch| batch.last < last);
        if let Some(batch) = self.batches.get_mut(position).filter(|batch| batch.last == last) {
            batch.submitted_ns = Some(now_ns);
        }
    }

    /// The log is durable through `through`.
    pub(super) fn durable(&mut self, through: LogIndex, now_ns: u64) {
        while self.batches.front().is_some_and(|batch| batch.last <= through) {
            let Some(Timed { received_ns, submitted_ns, .. }) = self.batches.pop_front() else { break };
            let queued_ns = submitted_ns.map_or(0, |submitted_ns| submitted_ns.saturating_sub(received_ns));
            let durable_us = micros(now_ns.saturating_sub(received_ns));
            // Zero says that there is nothing to report.
            self.newest = AckStages { durable_us: durable_us.max(1), queued_us: micros(queued_ns) };
        }
    }

    /// What lies after `last` is cut off.
    pub(super) fn truncate_after(&mut self, last: LogIndex) {
        let kept = self.batches.partition_point(|batch| batch.last <= last);
        self.batches.truncate(kept);
    }

    /// Of the newest batch that became durable in this life; zeros before there is one.
    pub(super) fn newest(&self) -> AckStages {
        self.newest
    }
}

/// Rounded up, and 71 minutes at the most.
fn micros(span_ns: u64) -> u32 {
    u32::try_from(span_ns.div_ceil(1_000)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stages(durable_us: u32, queued_us: u32) -> AckStages {
        AckStages { durable_us, queued_us }
    }

    #[test]
    fn the_newest_durable_batch_is_told_and_of_its_time_what_it_waited_for_the_log() {
        let mut all = Stages::default();
        assert_eq!(all.newest(), AckStages::default());
        for (last, now_ns) in [(3, 1_000), (5, 2_000), (9, 3_000)] {
            all.received(LogIndex(last), now_ns);
        }
        all.submitted(LogIndex(3), 1_000);
        all.submitted(LogIndex(5), 6_000);
        all.durable(LogIndex(4), 11_000);
        assert_eq!(all.newest(), stages(10, 0));
        all.durable(LogIndex(4), 99_000);
        assert_eq!(all.newest(), stages(10, 0), "nothing new");
        all.submitted(LogIndex(9), 7_000);
        all.durable(LogIndex(9), 53_001);
        assert_eq!(all.newest(), stages(51, 4));
    }

    #[test]
    fn a_batch_that_was_cut_off_is_not_taken_for_the_one_in_its_place() {
        let mut all = Stages::default();
        all.received(LogIndex(3), 1_000);
        all.received(LogIndex(5), 1_000);
        all.truncate_after(LogIndex(3));
        all.received(LogIndex(5), 40_000);
        all.durable(LogIndex(5), 50_000);
        assert_eq!(all.newest(), stages(10, 0));
    }

    #[test]
    fn no_more_batches_are_timed_than_there_is_room_for() {
        let mut all = Stages::default();
        for last in 1..=2 * BATCHES_MAX as u64 {
            all.received(LogIndex(last), last);
            all.submitted(LogIndex(last), last);
        }
        assert_eq!(all.batches.len(), BATCHES_MAX);
        all.durable(LogIndex(u64::MAX), 10_000_000);
        assert_eq!(all.batches.len(), 0);
        all.received(LogIndex(20_000), 10_000_000);
        all.durable(LogIndex(20_000), 10_001_000);
        assert_eq!(all.newest(), stages(1, 0));
    }
}
