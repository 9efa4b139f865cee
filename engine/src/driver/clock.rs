//! The log's clock, as a leader sets it when it seals a batch.
//!
//! It is the leader's own clock while that is not behind the log. When it is, because it was set back, or because an earlier
//! leader's clock is or was ahead, the log's clock goes on by what passes, an eighth slower: sessions go on expiring, and
//! clocks that tell the right time catch up with it. It never goes back.

use crate::runtime::Now;
use ringraft_block::NodeId;

/// A clock that is off, or jumps, by more than so much is worth a word.
const NOTED_MS: u64 = 10_000;

/// What a leader must remember to set the log's clock.
#[derive(Debug, Default)]
pub(super) struct LogClock {
    /// The clocks at the batch that this node sealed last, and the time that it carries.
    last: Option<(Now, u64)>,
    /// The log is ahead of this node's clock: the time that it had when that began to be seen, and when that was.
    ahead: Option<(u64, u64)>,
}

impl LogClock {
    /// The time of a batch behind one that carries `previous_ms`: at least as much.
    pub(super) fn time_of(&mut self, node: NodeId, now: Now, previous_ms: u64) -> u64 {
        self.note_jump(node, now);
        let own = self.last.filter(|(_, time_ms)| *time_ms == previous_ms);
        let time_ms = if now.wall_ms >= previous_ms {
            self.ahead = None;
            now.wall_ms
        } else {
            let (since_ms, since_ns) = match (self.ahead, own) {
                (Some(ahead), Some(_)) => ahead,
                (None, Some((last, _))) => (previous_ms, last.monotonic_ns),
                (_, None) => (previous_ms, now.monotonic_ns),
            };
            let behind_ms = previous_ms - now.wall_ms;
            if self.ahead.is_none() && behind_ms > NOTED_MS {
                tracing::warn!(
                    %node, behind_ms,
                    "this node's clock is behind that of the log, which goes on more slowly until it has caught up"
                );
            }
            self.ahead = Some((since_ms, since_ns));
            let passed_ms = now.monotonic_ns.saturating_sub(since_ns) / 1_000_000;
            // Not from the batch before, whose fraction of a millisecond would be lost each time.
            since_ms.saturating_add(passed_ms - passed_ms / 8).max(previous_ms)
        };
        self.last = Some((now, time_ms));
        time_ms
    }

    fn note_jump(&self, node: NodeId, now: Now) {
        let Some((last, _)) = self.last else { return };
        let passed_ms = now.monotonic_ns.saturating_sub(last.monotonic_ns) / 1_000_000;
        let expected_ms = last.wall_ms.saturating_add(passed_ms);
        if now.wall_ms > expected_ms.saturating_add(NOTED_MS) {
            let by_ms = now.wall_ms - expected_ms;
            tracing::warn!(%node, by_ms, "this node's clock has jumped ahead, and the log's with it: sessions may expire");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::repair::testing::Bench;

    const DAY_MS: u64 = 86_400_000;

    /// The time of a batch that is sealed at `passed_us` on a clock that tells `wall_ms`.
    fn seal(clock: &mut LogClock, passed_us: u64, wall_ms: u64, previous_ms: u64) -> u64 {
        clock.time_of(NodeId(1), Now { monotonic_ns: passed_us * 1_000, wall_ms }, previous_ms)
    }

    #[test]
    fn a_log_that_is_ahead_of_the_leaders_clock_goes_on_a_little_slower_until_that_has_caught_up() {
        let mut clock = LogClock::default();
        let mut time_ms = seal(&mut clock, 0, DAY_MS, 0);
        assert_eq!(time_ms, DAY_MS);
        // Set back by 10 s, then a batch every 300 µs for 16 s.
        for batch in 1..=53_334_u64 {
            let passed_us = batch * 300;
            let next = seal(&mut clock, passed_us, DAY_MS - 10_000 + passed_us / 1_000, time_ms);
            assert!(next >= time_ms);
            time_ms = next;
        }
        assert_eq!(time_ms, DAY_MS + 14_000, "seven eighths of what has passed");
        let passed_us = 100_000_000;
        let caught_up = DAY_MS - 10_000 + passed_us / 1_000;
        assert_eq!(seal(&mut clock, passed_us, caught_up, time_ms), caught_up);
    }

    #[test]
    fn what_passed_before_a_leader_sealed_its_first_batch_is_not_counted() {
        let mut clock = LogClock::default();
        assert_eq!(seal(&mut clock, 5_000_000, 1_000, 9_000), 9_000, "of another leader");
        assert_eq!(seal(&mut clock, 13_000_000, 9_000, 9_000), 9_000);
        assert_eq!(seal(&mut clock, 13_500_000, 9_500, 20_000), 20_000, "another led meanwhile");
        assert_eq!(seal(&mut clock, 21_500_000, 17_500, 20_000), 27_000);
    }

    #[test]
    fn a_batch_of_a_time_before_that_of_its_predecessor_stops_the_node() {
        let mut bench = Bench::new();
        bench.append(3, 1);
        let stopped = bench.try_append(1, 2).expect_err("time goes back");
        assert!(stopped.to_string().contains("the log's clock goes back"), "{stopped}");
    }
}
