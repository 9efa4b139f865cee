//! A disk that does not answer. An operation that never completes is no error that anybody reports, and a write that is
//! merely slow looks the same for a while: so there are two limits, one after which this node stands aside and one
//! after which it stops.

use super::Driver;
use crate::error::StopError;
use crate::raft::Event;
use crate::state_machine::StateMachine;
use ringraft_net::link::Link;
use ringraft_wal::disk::Disk;
use std::time::Duration;

/// The oldest durable operation under way.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StallWatch {
    operation: Option<u64>,
    /// When it was first seen, which is in the turn that submitted it.
    since_ns: u64,
    looked_ns: u64,
    stalled: bool,
}

impl StallWatch {
    fn age_ns(&self, now_ns: u64) -> u64 {
        self.operation.map_or(0, |_| now_ns.saturating_sub(self.since_ns))
    }

    /// A turn that no limit has come in: it tells a process that runs from one that does not.
    pub(super) fn looked(&mut self, now_ns: u64) {
        self.looked_ns = now_ns;
    }

    /// How long the disk has not answered, if that is too long.
    pub(super) fn stalled_ms(&self, now_ns: u64) -> Option<u64> {
        self.stalled.then(|| self.age_ns(now_ns) / 1_000_000)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// Looks at the oldest durable operation, after what completed has been taken.
    pub(super) fn watch_disk(&mut self) -> Result<(), StopError> {
        let now = self.now.monotonic_ns;
        self.note_operation();
        let operation = self.stall.operation;
        // This process, or its machine, was stopped meanwhile: that says nothing about the disk.
        let paused = now.saturating_sub(self.stall.looked_ns);
        if paused > nanos(self.config.disk_stall_timeout()).saturating_mul(2) {
            self.stall.since_ns = self.stall.since_ns.saturating_add(paused).min(now);
        }
        self.stall.looked_ns = now;
        let age = self.stall.age_ns(now);
        if operation.is_some() && age >= nanos(self.config.disk_stall_stop) {
            return Err(StopError::DiskStalled { millis: age / 1_000_000 });
        }
        let stalled = operation.is_some() && age >= nanos(self.config.disk_stall_timeout());
        if stalled != self.stall.stalled {
            self.stall.stalled = stalled;
            if stalled {
                tracing::warn!(node = %self.config.node, millis = age / 1_000_000, "the disk does not answer");
            } else {
                tracing::info!(node = %self.config.node, "the disk answers again");
            }
            self.step(Event::DiskStalled { stalled })?;
        }
        Ok(())
    }

    /// Takes note of the oldest durable operation, for its age: also at the end of a turn, since the next one may be called by
    /// nothing but its deadline.
    pub(super) fn note_operation(&mut self) {
        let operation = self.wal.oldest_operation();
        if operation != self.stall.operation {
            (self.stall.operation, self.stall.since_ns) = (operation, self.now.monotonic_ns);
        }
    }

    /// When the operation under way will have taken too long.
    pub(super) fn stall_deadline(&self) -> u64 {
        if self.stall.operation.is_none() {
            return u64::MAX;
        }
        let next =
            if self.stall.stalled { self.config.disk_stall_stop } else { self.config.disk_stall_timeout() };
        // Looked at often enough to tell a disk that does not answer from a process that did not run.
        let look = self.stall.looked_ns.saturating_add(nanos(self.config.disk_stall_timeout()));
        self.stall.since_ns.saturating_add(nanos(next)).min(look)
    }
}

#[cfg(test)]
mod tests {
    use super::super::repair::testing::Bench;
    use super::*;

    const MILLISECOND_NS: u64 = 1_000_000;

    /// Turns as often as the driver asks for, and once a millisecond.
    fn look(bench: &mut Bench, span_ns: u64) -> Result<(), StopError> {
        let end = bench.driver.now.monotonic_ns + span_ns;
        while bench.driver.now.monotonic_ns < end {
            bench.driver.now.monotonic_ns += MILLISECOND_NS;
            bench.driver.watch_disk()?;
        }
        Ok(())
    }

    #[test]
    fn a_process_that_did_not_run_for_long_does_not_take_its_disk_for_stalled() {
        let mut bench = Bench::new();
        let config = &bench.driver.config;
        let (stalls, stops) = (nanos(config.disk_stall_timeout()), nanos(config.disk_stall_stop));
        bench.memory.borrow_mut().holds_writes = true;
        bench.append(1, 0);
        look(&mut bench, stalls / 2).expect("a slow disk");
        for pause in [3 * stalls, 100 * stops] {
            bench.driver.now.monotonic_ns += pause;
            bench.driver.watch_disk().expect("nothing is known of the disk");
            assert_eq!(bench.driver.stall.stalled_ms(bench.driver.now.monotonic_ns), None);
        }
        // What it took while somebody looked counts.
        look(&mut bench, stalls / 2 - MILLISECOND_NS).expect("a slow disk");
        assert!(!bench.driver.stall.stalled);
        look(&mut bench, 2 * MILLISECOND_NS).expect("it stands aside");
        assert!(bench.driver.stall.stalled);
        let end = look(&mut bench, stops);
        assert!(
            matches!(end, Err(StopError::DiskStalled { millis }) if millis == stops / MILLISECOND_NS),
            "{end:?}"
        );
    }

    #[test]
    fn a_node_looks_often_enough_to_tell_a_pause_from_a_stall() {
        let mut bench = Bench::new();
        bench.memory.borrow_mut().holds_writes = true;
        bench.append(1, 0);
        let stops = nanos(bench.driver.config.disk_stall_stop);
        let began = bench.driver.now.monotonic_ns;
        bench.driver.watch_disk().expect("it has just been asked");
        // Only at the deadlines that it gives itself.
        let end = (0..100).find_map(|_| {
            bench.driver.now.monotonic_ns = bench.driver.stall_deadline();
            bench.driver.watch_disk().err()
        });
        assert!(matches!(end, Some(StopError::DiskStalled { .. })), "{end:?}");
        assert!(bench.driver.now.monotonic_ns - began <= stops + MILLISECOND_NS);
    }
}
