//! How long what commands wait for takes, so that a core knows whether it is worth while to look for it.
//!
//! A wake takes tens of microseconds. Beside a write of the log that takes much longer, since the disk is slow or much of the log is
//! under way, that is nothing, and the processor time of who looks meanwhile would be wasted.
//!
//! A batch is under way from when the log was given it until it is durable here or committed, whichever is first: a leader whose own
//! disk is slow does not wait for that, and a follower that is behind is not waited for. All this is of the log: reads wait
//! for none of it.

use super::take_first;
use ringraft_block::LogIndex;
use std::collections::VecDeque;

/// Batches that are followed at once; the rest of more goes uncounted.
const BATCHES_MAX: usize = 1024;
/// The weight of one batch in what is usual is this part of the whole.
const USUAL_PART: u64 = 8;
/// Without a batch for so long, what was usual says nothing about now.
const AGE_NS_MAX: u64 = 10_000_000;
/// With more than so much of the log under way at once it is bytes that commands wait for, rather than for somebody to wake: with
/// it two cores of a virtual machine moved as many bytes per second in either case, in November 2026.
const BULK_BYTES: u64 = 384 << 10;
/// What waking may add to what a core measures that sleeps. Such a one looks again when all takes less than this and as long as it
/// would look, and not only when it takes less than that: otherwise one that sleeps once might do so for ever.
const WAKE_NS: u64 = 100_000;

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
    is_long: bool,
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
        self.newest_ns = now_ns;
        if self.under_way.len() < BATCHES_MAX {
            let bytes = bytes as u64;
            self.under_way.push_back(Batch { last, bytes, since_ns: now_ns });
            self.under_way_bytes += bytes;
            self.usual_bytes = mean(self.usual_bytes, self.under_way_bytes);
        }
    }

    /// The log is durable or committed through `through`.
    pub(super) fn ended(&mut self, through: LogIndex, now_ns: u64) {
        while let Some(batch) = take_first(&mut self.under_way, |batch| batch.last <= through) {
            self.under_way_bytes -= batch.bytes;
            self.usual_ns = mean(self.usual_ns, now_ns.saturating_sub(batch.since_ns));
            self.newest_ns = now_ns;
        }
    }

    /// What lies after `last` is cut off.
    pub(super) fn truncate_after(&mut self, last: LogIndex) {
        let kept = self.under_way.partition_point(|batch| batch.last <= last);
        self.under_way_bytes -= self.under_way.drain(kept..).map(|batch| batch.bytes).sum::<u64>();
    }

    /// Whether commands wait too long, of late, for a core to look that looks for `patience_ns`.
    pub(super) fn is_long(&mut self, patience_ns: u64, now_ns: u64) -> bool {
        let longest_ns = if self.is_long { patience_ns.saturating_add(WAKE_NS) } else { patience_ns };
        let is_current = now_ns.saturating_sub(self.newest_ns) <= AGE_NS_MAX || !self.under_way.is_empty();
        self.is_long = is_current && (self.usual_ns > longest_ns || self.usual_bytes > BULK_BYTES);
        self.is_long
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

        /// So many batches, one after the other.
        fn take(&mut self, batches: u32, bytes: usize, span_ns: u64) -> bool {
            for _ in 0..batches {
                self.last += 1;
                self.pace.begun(LogIndex(self.last), bytes, self.now_ns);
                self.now_ns += span_ns;
                self.pace.ended(LogIndex(self.last), self.now_ns);
            }
            self.pace.is_long(PATIENCE_NS, self.now_ns)
        }
    }

    #[test]
    fn it_is_long_while_batches_take_longer_than_a_core_would_look() {
        let mut rig = Rig::new();
        assert!(!rig.pace.is_long(PATIENCE_NS, 0), "nothing is known");
        assert!(!rig.take(50, 4096, 400_000));
        assert!(!rig.take(1, 4096, 1_000_000), "one is no rule");
        assert!(rig.take(50, 4096, 1_000_000));
        assert!(!rig.take(50, 4096, 400_000));
    }

    #[test]
    fn what_waking_adds_does_not_keep_a_core_asleep() {
        let mut rig = Rig::new();
        assert!(rig.take(50, 4096, 1_000_000));
        assert!(rig.take(50, 4096, PATIENCE_NS + 2 * WAKE_NS));
        assert!(
            !rig.take(50, 4096, PATIENCE_NS + WAKE_NS / 2),
            "the write takes less, and the wake is the rest"
        );
        assert!(rig.take(50, 4096, PATIENCE_NS + WAKE_NS / 2), "now it is the write");
    }

    #[test]
    fn it_is_long_while_much_of_the_log_is_under_way() {
        let mut rig = Rig::new();
        let half = BULK_BYTES as usize / 2;
        assert!(!rig.take(50, half, 1_000));
        for number in 0..50 {
            rig.pace.begun(LogIndex(rig.last + number + 1), half, rig.now_ns);
            rig.pace.ended(LogIndex((rig.last + number).saturating_sub(2)), rig.now_ns);
        }
        assert!(rig.pace.is_long(PATIENCE_NS, rig.now_ns), "four halves at a time");
        rig.last += 50;
        rig.pace.ended(LogIndex(rig.last), rig.now_ns);
        assert_eq!(rig.pace.under_way_bytes, 0);
        assert!(!rig.take(50, half, 1_000));
    }

    #[test]
    fn what_was_usual_says_nothing_long_after() {
        let mut rig = Rig::new();
        assert!(rig.take(50, 4096, 1_000_000));
        assert!(rig.pace.is_long(PATIENCE_NS, rig.now_ns + AGE_NS_MAX));
        assert!(!rig.pace.is_long(PATIENCE_NS, rig.now_ns + AGE_NS_MAX + 1));
        rig.pace.begun(LogIndex(rig.last + 1), 4096, rig.now_ns);
        assert!(rig.pace.is_long(PATIENCE_NS, rig.now_ns + 100 * AGE_NS_MAX), "it still takes long");
    }

    #[test]
    fn a_batch_that_was_cut_off_is_under_way_no_more() {
        let mut rig = Rig::new();
        for last in [3, 5, 9] {
            rig.pace.begun(LogIndex(last), 4096, 0);
        }
        rig.pace.truncate_after(LogIndex(3));
        assert_eq!((rig.pace.under_way.len(), rig.pace.under_way_bytes), (1, 4096));
        rig.pace.truncate_after(LogIndex(0));
        rig.pace.ended(LogIndex(9), u64::MAX);
        assert_eq!((rig.pace.under_way_bytes, rig.pace.usual_ns), (0, 0));
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
        assert!(pace.is_long(PATIENCE_NS, u64::MAX));
    }
}
