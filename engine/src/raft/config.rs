//! The core's limits and intervals.

use super::{Configuration, Nanos, SlowDiskLimits};
use ringraft_block::{Incarnation, NodeId};

/// What the core is told once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RaftConfig {
    /// This node.
    pub id: NodeId,
    /// The time `t` for which a follower sticks to a leader that it heard, and for which a leader goes on without
    /// hearing a quorum. A node that hears no leader campaigns after a wait drawn from `[t + h, 1.5 t + h)`, where
    /// `h` is the heartbeat interval: within two election time-outs a new leader follows a dead one. Why that
    /// range: see `election_wait` in `election.rs`.
    pub election_timeout: Nanos,
    /// The longest time between two appends that ask a peer for an immediate answer. At most a third of
    /// `election_timeout`: then the longest wait, 1.5 t + h, leaves a sixth of `t` for the election itself.
    pub heartbeat_interval: Nanos,
    /// How long a commit index that no append carried waits before it is sent alone. 1 ms by default: with
    /// traffic it never happens, without traffic a follower applies 1 ms later than it could.
    pub commit_notice_delay: Nanos,
    /// The most batches sent to one peer and not acknowledged.
    pub window_batches: usize,
    /// The most image bytes sent to one peer and not acknowledged. One batch is always let through.
    pub window_bytes: u64,
    /// Seed of the election time-outs: another one for each node and each boot.
    pub seed: u64,
    /// How much this node should lead: one of 255 campaigns without delay, one of 0 waits up to one
    /// `election_timeout` more than its draw. `None` is no delay.
    pub priority: Option<u8>,
    /// Elections only: a leader appends nothing, so nothing can be proposed, and the log stays empty.
    pub consensus_only: bool,
    /// When this node, leading, hands over since its own disk is slow. `None`: never.
    pub slow_disk: Option<SlowDiskLimits>,
    /// The life of this node's data directory. A configuration that names its id with another one means another node.
    /// `None` for models without directories: the id is enough.
    pub incarnation: Option<Incarnation>,
}

impl RaftConfig {
    /// A configuration with the default intervals: 1 s election time-out, 100 ms heartbeats, windows of 64
    /// batches and 8 MiB (64 Gbit/s at a round trip of 1 ms).
    #[must_use]
    pub fn new(id: NodeId, seed: u64) -> Self {
        Self {
            id,
            election_timeout: Nanos::from_millis(1_000),
            heartbeat_interval: Nanos::from_millis(100),
            commit_notice_delay: Nanos::from_millis(1),
            window_batches: 64,
            window_bytes: 8 << 20,
            seed,
            priority: None,
            consensus_only: false,
            slow_disk: None,
            incarnation: None,
        }
    }

    /// Whether this node counts in a quorum of `configuration`.
    pub(super) fn counts_in(&self, configuration: &Configuration) -> bool {
        let named = configuration.member(self.id).is_some_and(|member| {
            self.incarnation.is_none_or(|incarnation| incarnation == member.incarnation)
        });
        named && configuration.is_voter(self.id)
    }

    /// Checks the limits against each other.
    ///
    /// # Errors
    /// The first relation that does not hold.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.id == NodeId(0) {
            return Err(ConfigError::ZeroId);
        }
        if self.election_timeout.0 == 0 || self.election_timeout.0 > ELECTION_TIMEOUT_MAX.0 {
            return Err(ConfigError::ElectionTimeout { got: self.election_timeout });
        }
        if self.heartbeat_interval.0 == 0 || self.heartbeat_interval.0 > self.election_timeout.0 / 3 {
            return Err(ConfigError::HeartbeatInterval {
                got: self.heartbeat_interval,
                election_timeout: self.election_timeout,
            });
        }
        if self.commit_notice_delay > self.heartbeat_interval {
            return Err(ConfigError::CommitNoticeDelay {
                got: self.commit_notice_delay,
                heartbeat_interval: self.heartbeat_interval,
            });
        }
        if self.window_batches == 0 || self.window_bytes == 0 {
            return Err(ConfigError::EmptyWindow);
        }
        if let Some(limits) = self.slow_disk
            && (limits.factor < 2 || limits.floor.0 == 0 || limits.span.0 == 0)
        {
            return Err(ConfigError::SlowDisk { limits });
        }
        Ok(())
    }
}

/// One hour: anything longer is a mistake of units.
const ELECTION_TIMEOUT_MAX: Nanos = Nanos(3_600_000_000_000);

/// Why a [`RaftConfig`] is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Node id 0 names nobody.
    #[error("node id 0 is reserved")]
    ZeroId,
    /// Out of range.
    #[error("election time-out of {} ns is not within 1 ns and 1 h", got.0)]
    ElectionTimeout {
        /// What was given.
        got: Nanos,
    },
    /// A follower must get some chances to hear its leader within an election time-out, and a wait of 1.5 time-outs
    /// and a heartbeat must end well within two.
    #[error("heartbeat interval of {} ns is not within 1 ns and a third of the election time-out ({} ns)", got.0, election_timeout.0)]
    HeartbeatInterval {
        /// What was given.
        got: Nanos,
        /// The election time-out beside it.
        election_timeout: Nanos,
    },
    /// Every heartbeat carries the commit index, so a longer delay would mean nothing.
    #[error("commit notice delay of {} ns is above the heartbeat interval ({} ns)", got.0, heartbeat_interval.0)]
    CommitNoticeDelay {
        /// What was given.
        got: Nanos,
        /// The heartbeat interval beside it.
        heartbeat_interval: Nanos,
    },
    /// Nothing could ever be replicated.
    #[error("a replication window of no batches or no bytes")]
    EmptyWindow,
    /// A disk that is no slower than the others would do.
    #[error("a slow disk takes a factor of at least 2, and a floor and a span of more than 0: {limits:?}")]
    SlowDisk {
        /// What was given.
        limits: SlowDiskLimits,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_contradict_each_other_are_refused() {
        let good = RaftConfig::new(NodeId(1), 7);
        assert_eq!(good.validate(), Ok(()));
        assert_eq!(RaftConfig::new(NodeId(0), 7).validate(), Err(ConfigError::ZeroId));
        let timeout = good.election_timeout;
        let late = RaftConfig { heartbeat_interval: Nanos(timeout.0 / 3 + 1), ..good.clone() };
        assert!(matches!(late.validate(), Err(ConfigError::HeartbeatInterval { .. })));
        let never = RaftConfig { election_timeout: Nanos::NEVER, ..good.clone() };
        assert!(matches!(never.validate(), Err(ConfigError::ElectionTimeout { .. })));
        let slow = RaftConfig { commit_notice_delay: Nanos(good.heartbeat_interval.0 + 1), ..good.clone() };
        assert!(matches!(slow.validate(), Err(ConfigError::CommitNoticeDelay { .. })));
        assert_eq!(
            RaftConfig { window_batches: 0, ..good.clone() }.validate(),
            Err(ConfigError::EmptyWindow)
        );
        let limits = SlowDiskLimits { factor: 2, floor: Nanos(1), span: Nanos(1) };
        assert_eq!(RaftConfig { slow_disk: Some(limits), ..good.clone() }.validate(), Ok(()));
        for limits in [
            SlowDiskLimits { factor: 1, ..limits },
            SlowDiskLimits { floor: Nanos(0), ..limits },
            SlowDiskLimits { span: Nanos(0), ..limits },
        ] {
            let slow = RaftConfig { slow_disk: Some(limits), ..good.clone() };
            assert_eq!(slow.validate(), Err(ConfigError::SlowDisk { limits }));
        }
    }
}
