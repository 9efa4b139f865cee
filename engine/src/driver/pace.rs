//! How long what commands wait for takes, so that a core knows whether it is worth while to look for it.
//!
//! A wake takes tens of microseconds. Beside a commit that takes much longer, since disks are slow or much of the log is under way, that is
//! nothing, and the processor time of who looks meanwhile would be wasted.
//!
//! A batch is under way from when the log was given it: on a leader until it is committed, whatever its own disk or one follower
//! takes, and on a follower until it is durable there or known to be committed. All this is of the log: reads wait for none of it.
//!
//! A core that sleeps measures its wakes, too, and those of others that do as it does. So it looks for some batches of many all the
//! same: if they take less time then, it goes on.

use super::take_first;
use ringraft_block::LogIndex;
use std::collections::VecDeque;

/// Batches that are followed at once; the rest of more goes uncounted.
const BATCHES_MAX: usize = 1024;
/// The weight of one batch in what is usual is this part of the whole.
const USUAL_PART: u64 = 8;
/// Without a batch for so long, what was usual says nothing about the next one.
const AGE_NS_MAX: u64 = 1_000_000_000;
/// With more than so much of the log under way at once it is bytes that commands wait for, rather than for somebody to wake: with
/// it two cores of a virtual machine moved as many bytes per second in either case, in November 2026.
const BULK_BYTES: u64 = 384 << 10;
/// Of so many batches ...
const TRIAL_EVERY: u64 = 64;
/// ... so many are looked for even if they take long.
const TRIAL_BATCHES: u64 = 8;

/// The batches under way, and what is usual.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// In the order of the log.
    under_way: VecDeque<Batch>,
    under_way_bytes: u64,
    /// Means, in which older batches count ever less: how long a batch is under way, and how many bytes are with a new one.
    usual_ns: u64,
    usual_bytes: u64,
    /// When a batch last came or ended.
    newest_ns: u64,
    /// How many have ended.
    ended: u64,
}

#[derive(Debug)]
struct Batch {
    last: LogIndex,
    bytes: u64,
    since_ns: u64,
}

impl Pace {
    /// The log was given the batch that ends at `last` and takes so many bytes.
    pub(super) fn begun(&mut self, last: LogIndex, bytes: usize, now_ns: u64) {
        if self.under_way.is_empty() && now_ns.saturating_sub(self.newest_ns) > AGE_NS_MAX {
            (self.usual_ns, self.usual_bytes) = (0, 0);
        }
        self.newest_ns = now_ns;
        if self.under_way.len() < BATCHES_MAX {
            let bytes = bytes as u64;
            self.under_way.push_back(Batch { last, bytes, since_ns: now_ns });
            self.under_way_bytes += bytes;
            self.usual_bytes = mean(self.usual_bytes, self.under_way_bytes);
        }
    }

    /// Batches up to `through` are not under way any more.
    pub(super) fn ended(&mut self, through: LogIndex, now_ns: u64) {
        while let Some(batch) = take_first(&mut self.under_way, |batch| batch.last <= through) {
            self.under_way_bytes -= batch.bytes;
            self.usual_ns = mean(self.usual_ns, now_ns.saturating_sub(batch.since_ns));
            self.newest_ns = now_ns;
            self.ended = self.ended.wrapping_add(1);
        }
    }

    /// What lies after `last` is cut off.
    pub(super) fn truncate_after(&mut self, last: LogIndex) {
        let kept = self.under_way.partition_point(|batch| batch.last <= last);
        self.under_way_bytes -= self.under_way.drain(kept..).map(|batch| batch.bytes).sum::<u64>();
    }

    /// Whether commands wait too long, of late, for a core to look that looks for `patience_ns`.
    pub(super) fn is_long(&self, patience_ns: u64) -> bool {
        let is_trial = self.ended % TRIAL_EVERY < TRIAL_BATCHES;
        self.usual_bytes > BULK_BYTES || self.usual_ns > patience_ns && !is_trial
    }
}

/// Differences of less than [`USUAL_PART`] are lost, which is little beside microseconds and blocks.
fn mean(usual: u64, new: u64) -> u64 {
    usual - usual / USUAL_PART + new / USUAL_PART
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE_NS: u64 = 500_000;

    struct Rig {
        pace: Pace,
        now_ns: u64,
        last: u64,
    }

    impl Rig {
        fn new() -> Self {
            Self { pace: Pace::default(), now_ns: 1, last: 0 }
        }

        fn is_long(&self) -> bool {
            self.pace.is_long(PATIENCE_NS)
        }

        /// So many batches, one after the other, each taking so long, and longer by the second if it is not looked for. Tells how
        /// many are not.
        fn take(&mut self, batches: u64, bytes: usize, (span_ns, wake_ns): (u64, u64)) -> u64 {
            let mut asleep = 0;
            for _ in 0..batches {
                self.last += 1;
                self.pace.begun(LogIndex(self.last), bytes, self.now_ns);
                let sleeps = self.is_long();
                asleep += u64::from(sleeps);
                self.now_ns += span_ns + if sleeps { wake_ns } else { 0 };
                self.pace.ended(LogIndex(self.last), self.now_ns);
            }
            asleep
        }
    }

    #[test]
    fn it_is_long_while_batches_take_longer_than_a_core_would_look_but_for_some_of_many() {
        let mut rig = Rig::new();
        assert!(!rig.is_long(), "nothing is known");
        assert_eq!(rig.take(200, 4096, (400_000, 0)), 0);
        assert_eq!(rig.take(1, 4096, (1_000_000, 0)), 0);
        assert!(!rig.is_long(), "one is no rule");
        rig.take(2 * TRIAL_EVERY, 4096, (1_000_000, 0));
        assert_eq!(rig.take(TRIAL_EVERY, 4096, (1_000_000, 0)), TRIAL_EVERY - TRIAL_BATCHES);
        rig.take(50, 4096, (400_000, 0));
        assert_eq!(rig.take(200, 4096, (400_000, 0)), 0);
    }

    #[test]
    fn what_wakes_add_does_not_keep_a_core_asleep_for_ever() {
        let mut rig = Rig::new();
        let quick = (450_000, 120_000);
        assert_eq!(rig.take(200, 4096, quick), 0);
        rig.take(10, 4096, (5_000_000, 0));
        let asleep = rig.take(3 * TRIAL_EVERY, 4096, quick);
        assert!(asleep > 0 && asleep <= 2 * TRIAL_EVERY, "{asleep}");
        assert_eq!(rig.take(10 * TRIAL_EVERY, 4096, quick), 0);
    }

    #[test]
    fn it_is_long_while_much_of_the_log_is_under_way() {
        let mut rig = Rig::new();
        let half = BULK_BYTES as usize / 2;
        assert_eq!(rig.take(200, half, (1_000, 0)), 0);
        for number in 0..200 {
            rig.pace.begun(LogIndex(rig.last + number + 1), half, rig.now_ns);
            rig.pace.ended(LogIndex((rig.last + number).saturating_sub(2)), rig.now_ns);
            assert!(number < 50 || rig.is_long(), "four halves at a time");
        }
        rig.last += 200;
        rig.pace.ended(LogIndex(rig.last), rig.now_ns);
        assert_eq!(rig.pace.under_way_bytes, 0);
        rig.take(50, half, (1_000, 0));
        assert_eq!(rig.take(200, half, (1_000, 0)), 0);
    }

    #[test]
    fn what_was_usual_says_nothing_about_a_batch_long_after() {
        for (pause_ns, forgets) in [(AGE_NS_MAX, false), (AGE_NS_MAX + 1, true)] {
            let mut rig = Rig::new();
            rig.take(TRIAL_EVERY - 1, 4096, (1_000_000, 0));
            assert!(rig.is_long());
            rig.now_ns += pause_ns;
            rig.pace.begun(LogIndex(rig.last + 1), 4096, rig.now_ns);
            assert_eq!(!rig.is_long(), forgets);
            // It takes long itself.
            rig.pace.ended(LogIndex(rig.last + 1), rig.now_ns + 100 * AGE_NS_MAX);
            assert!(rig.pace.usual_ns > PATIENCE_NS);
        }
    }

    #[test]
    fn a_batch_that_was_cut_off_is_under_way_no_more() {
        let mut pace = Pace::default();
        for last in [3, 5, 9] {
            pace.begun(LogIndex(last), 4096, 0);
        }
        pace.truncate_after(LogIndex(3));
        assert_eq!((pace.under_way.len(), pace.under_way_bytes), (1, 4096));
        pace.truncate_after(LogIndex(0));
        pace.ended(LogIndex(9), u64::MAX);
        assert_eq!((pace.under_way_bytes, pace.usual_ns), (0, 0));
    }

    #[test]
    fn no_more_batches_are_followed_than_there_is_room_for() {
        let mut pace = Pace::default();
        for last in 1..=2 * BATCHES_MAX as u64 {
            pace.begun(LogIndex(last), 4096, last);
        }
        assert_eq!(pace.under_way.len(), BATCHES_MAX);
        pace.ended(LogIndex(u64::MAX), u64::MAX);
        assert_eq!((pace.under_way.len(), pace.under_way_bytes), (0, 0));
        assert!(pace.is_long(PATIENCE_NS));
    }
}
