//! When rounds were sent: what turns a round that a peer returned into a moment at which it was still following.

use super::{Nanos, Round};
use std::collections::VecDeque;

/// Send times are kept at this grain of the election time-out: a returned round is dated at most one grain too
/// early, which is the safe side.
const GRAINS: u64 = 128;

/// The rounds of one term of office, their send times bounded in number.
#[derive(Clone, Debug)]
pub(super) struct Rounds {
    current: Round,
    /// Whether the current round was begun by the event being handled.
    begun: bool,
    /// (round, sent at), both strictly increasing. A round that is not listed was sent at or after the time of
    /// the one before it.
    sent: VecDeque<(Round, Nanos)>,
    grain: u64,
    keep: u64,
}

impl Rounds {
    pub(super) fn new(election_timeout: Nanos) -> Self {
        Self {
            current: Round(0),
            begun: false,
            sent: VecDeque::new(),
            grain: election_timeout.0 / GRAINS,
            keep: election_timeout.0,
        }
    }

    pub(super) fn current(&self) -> Round {
        self.current
    }

    /// An event is about to be handled: whatever it sends opens a new round.
    pub(super) fn new_turn(&mut self) {
        self.begun = false;
    }

    /// The round for a message that leaves now.
    pub(super) fn stamp(&mut self, now: Nanos) -> Round {
        if !self.begun {
            self.begun = true;
            self.current = Round(self.current.0.saturating_add(1));
            if self.sent.back().is_none_or(|(_, at)| now.0.saturating_sub(at.0) > self.grain) {
                self.sent.push_back((self.current, now));
            }
            // The newest entry that is too old is kept: it dates the rounds between it and the next.
            while self.sent.get(1).is_some_and(|(_, at)| now.0.saturating_sub(at.0) > self.keep) {
                self.sent.pop_front();
            }
        }
        self.current
    }

    /// The latest moment at which `round` had certainly not been sent before; none when it is too old to tell.
    pub(super) fn sent_at(&self, round: Round) -> Option<Nanos> {
        let after = self.sent.partition_point(|(sent, _)| *sent <= round);
        self.sent.get(after.checked_sub(1)?).map(|(_, at)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_dated_at_most_one_grain_early_and_memory_is_bounded() {
        let timeout = Nanos(1_280_000);
        let mut rounds = Rounds::new(timeout);
        let mut times = Vec::new();
        for step in 0..100_000_u64 {
            let now = Nanos(step * 37);
            rounds.new_turn();
            let round = rounds.stamp(now);
            assert_eq!(rounds.stamp(now), round, "once per turn");
            times.push(now);
            assert!(rounds.sent.len() <= GRAINS as usize + 2);
        }
        let now = times.last().copied().unwrap_or_default();
        for (round, at) in times.iter().enumerate().map(|(at, time)| (Round(at as u64 + 1), *time)) {
            match rounds.sent_at(round) {
                Some(dated) => {
                    assert!(dated <= at);
                    assert!(at.0 - dated.0 <= timeout.0 / GRAINS || now.0 - at.0 > timeout.0);
                }
                None => assert!(now.0 - at.0 > timeout.0),
            }
        }
    }
}
