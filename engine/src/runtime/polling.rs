//! Whether a core without work looks for some or sleeps.
//!
//! A sleep is dear where the processor halts in it: what wakes the core then has to wake a processor, of a virtual machine even
//! by way of the hypervisor, which takes as long as half a durable write. A core that looks for work instead gives way with
//! every look (`sched_yield`), so that whoever else can run on this processor runs: it uses up only what nobody wants.
//!
//! Giving way has a price where somebody computes: a thread that yields to such a one comes back after the other's whole
//! slice, milliseconds later, and one that sleeps is woken at once. So after yields that took long, one soon after the other, the
//! core sleeps when it has nothing to do, for many times as long as it was kept away. A single one says nothing: it may
//! have been the hypervisor that took the processor away.

use super::IdlePolicy;

/// A yield that takes longer than this is long; shorter ones met a few others' bits of work.
const LONG_YIELD_NS: u64 = 1_000_000;
/// A long yield so soon after another is the second to somebody who computes.
const SOON_NS: u64 = 1_000_000;
/// For so many times as long as that yield took the core does not look for work.
const ABSTENTION: u64 = 32;

#[derive(Clone, Copy, Debug)]
pub(super) struct Polling {
    idle: IdlePolicy,
    worked_ns: u64,
    /// When the last long yield was over.
    long_until_ns: u64,
    abstains_until_ns: u64,
}

impl Polling {
    pub(super) fn new(idle: IdlePolicy) -> Self {
        Self { idle, worked_ns: 0, long_until_ns: 0, abstains_until_ns: 0 }
    }

    /// A turn at that time has worked.
    pub(super) fn worked(&mut self, now_ns: u64) {
        self.worked_ns = now_ns;
    }

    /// Until when to look for work, if nothing comes; then the core sleeps. 0 if it sleeps at once.
    pub(super) fn until_ns(&self, now_ns: u64) -> u64 {
        match self.idle {
            IdlePolicy::Spin => u64::MAX,
            IdlePolicy::Adaptive { .. } if now_ns < self.abstains_until_ns => 0,
            IdlePolicy::Adaptive { spin_us } => self.worked_ns.saturating_add(spin_us.saturating_mul(1_000)),
            IdlePolicy::Park => 0,
        }
    }

    /// Lets whoever waits for this processor have it; `clock` tells the time. Returns when that was over.
    pub(super) fn give_way(&mut self, now_ns: u64, clock: impl FnOnce() -> u64) -> u64 {
        rustix::thread::sched_yield();
        let back_ns = clock();
        let away_ns = back_ns.saturating_sub(now_ns);
        if away_ns > LONG_YIELD_NS {
            let since_ns = now_ns.saturating_sub(self.long_until_ns);
            if since_ns < SOON_NS {
                self.abstains_until_ns = back_ns.saturating_add(away_ns.saturating_mul(ABSTENTION));
            }
            self.long_until_ns = back_ns;
        }
        back_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADAPTIVE: IdlePolicy = IdlePolicy::Adaptive { spin_us: 200 };

    #[test]
    fn a_core_looks_for_work_for_as_long_after_work_as_its_policy_says() {
        for (idle, until_ns) in [(IdlePolicy::Park, 0), (ADAPTIVE, 1_200_000), (IdlePolicy::Spin, u64::MAX)] {
            let mut polling = Polling::new(idle);
            polling.worked(1_000_000);
            assert_eq!(polling.until_ns(1_100_000), until_ns, "{idle:?}");
        }
    }

    #[test]
    fn long_yields_in_a_row_make_an_adaptive_core_sleep_for_many_times_as_long() {
        const MS: u64 = 1_000_000;
        for (idle, until_ns) in [(ADAPTIVE, 0), (IdlePolicy::Spin, u64::MAX)] {
            let mut polling = Polling::new(idle);
            polling.worked(10 * MS);
            polling.give_way(5 * MS, || 9 * MS);
            assert!(polling.until_ns(9 * MS) > 0, "it was one");
            assert_eq!(polling.give_way(10 * MS, || 10 * MS + 900_000), 10 * MS + 900_000);
            polling.give_way(11 * MS, || 14 * MS);
            assert!(polling.until_ns(14 * MS) > 0, "the other was long ago");
            polling.give_way(14 * MS + 900_000, || 17 * MS);
            polling.worked(20 * MS);
            assert_eq!(polling.until_ns(17 * MS + ABSTENTION * 2_100_000 - 1), until_ns, "{idle:?}");
            assert!(polling.until_ns(17 * MS + ABSTENTION * 2_100_000) > 0);
        }
    }
}
