//! Whether a core without work looks for some or sleeps; and how anybody looks for anything here.
//!
//! A sleep is dear where the processor halts in it: what wakes the core then has to wake a processor, of a virtual machine even
//! by way of the hypervisor, which takes as long as half a durable write. A core that looks for work instead gives way with
//! every look (`sched_yield`), so that whoever else can run on this processor runs.
//!
//! Giving way has a price where somebody computes: a thread that yields to such a one comes back after the other's whole
//! slice, milliseconds later, and one that sleeps is woken soon. The same holds where the group of this thread may use no more of
//! the processor. So after it was kept away for long the core sleeps when it has nothing to do, for many times as long.
//! Kept away by others, that is: a hypervisor may take the processor away as well, which is no reason to give up more of it.
//! The scheduler tells the two apart: it counts for how long a thread was ready and did not run.

use super::{IdlePolicy, monotonic_ns};
use std::fs::File;
use std::os::unix::fs::FileExt as _;

/// Away for longer than this is long; others' bits of work are shorter.
const AWAY_NS_MAX: u64 = 1_000_000;
/// For so many times as long the core does not look for work.
const ABSTENTION: u64 = 32;
/// But not for longer than this.
const ABSTENTION_NS_MAX: u64 = 200_000_000;
/// The scheduler's count is read again when it is older than this, so that what it grew by is of the last absence mostly.
const COUNT_AGE_NS_MAX: u64 = 1_000_000;

#[derive(Debug)]
pub(super) struct Polling {
    idle: IdlePolicy,
    /// A turn has worked, and nobody has asked since until when to look for more.
    worked: bool,
    until_ns: u64,
    giving_way: GivingWay,
}

impl Polling {
    /// For the thread that it is made on.
    pub(super) fn new(idle: IdlePolicy) -> Self {
        Self { idle, worked: false, until_ns: 0, giving_way: GivingWay::of_this_thread() }
    }

    /// A turn has worked.
    pub(super) fn worked(&mut self) {
        self.worked = true;
    }

    /// Until when to look for work, if nothing comes; then the core sleeps. 0 if it sleeps at once.
    pub(super) fn until_ns(&mut self, now_ns: u64) -> u64 {
        let IdlePolicy::Adaptive { spin_us } = self.idle else {
            return if self.idle == IdlePolicy::Spin { u64::MAX } else { 0 };
        };
        if std::mem::take(&mut self.worked) {
            self.until_ns = now_ns.saturating_add(spin_us.saturating_mul(1_000));
        }
        if self.giving_way.abstains(now_ns) { 0 } else { self.until_ns }
    }

    /// As [`GivingWay::give_way`].
    pub(super) fn give_way(&mut self, now_ns: u64) -> u64 {
        self.giving_way.give_way(now_ns)
    }
}

/// How a thread that looks for something gives way to others, and when that keeps it away too long to look at all.
#[derive(Debug)]
pub(crate) struct GivingWay {
    abstains_until_ns: u64,
    queued: Queued,
    /// The scheduler's count, and when it was read.
    count: (u64, u64),
}

impl GivingWay {
    fn of_this_thread() -> Self {
        Self { queued: Queued::of_this_thread(), ..Self::of_any_thread() }
    }

    /// Whoever looks. What keeps it away counts as others, the hypervisor too.
    pub(crate) const fn of_any_thread() -> Self {
        Self { abstains_until_ns: 0, queued: Queued { schedstat: None }, count: (0, 0) }
    }

    /// Whether others have kept this thread away of late, so that it should sleep.
    pub(crate) fn abstains(&self, now_ns: u64) -> bool {
        now_ns < self.abstains_until_ns
    }

    /// Lets whoever waits for this processor have it. Returns when that was over.
    pub(crate) fn give_way(&mut self, now_ns: u64) -> u64 {
        if now_ns.saturating_sub(self.count.1) > COUNT_AGE_NS_MAX {
            self.count = (self.queued.ns(), now_ns);
        }
        rustix::thread::sched_yield();
        let back_ns = monotonic_ns();
        if back_ns.saturating_sub(now_ns) > AWAY_NS_MAX {
            let (before_ns, after_ns) = (self.count.0, self.queued.ns());
            self.count = (after_ns, back_ns);
            self.away(now_ns, back_ns, after_ns.saturating_sub(before_ns));
        }
        back_ns
    }

    /// The core was away for long, of which it was kept waiting for so much by others.
    fn away(&mut self, since_ns: u64, back_ns: u64, waited_ns: u64) {
        let away_ns = back_ns.saturating_sub(since_ns);
        if waited_ns >= away_ns / 2 {
            let abstains_ns = away_ns.saturating_mul(ABSTENTION).min(ABSTENTION_NS_MAX);
            self.abstains_until_ns = back_ns.saturating_add(abstains_ns);
        }
    }
}

/// For how long this thread was ready and did not run, as the scheduler counts.
#[derive(Debug)]
struct Queued {
    /// `None` where the kernel does not tell, and where it is not asked.
    schedstat: Option<File>,
}

impl Queued {
    fn of_this_thread() -> Self {
        Self { schedstat: File::open("/proc/thread-self/schedstat").ok() }
    }

    /// In nanoseconds; without a count, as if all the time.
    fn ns(&self) -> u64 {
        let mut text = [0; 64];
        let read = self.schedstat.as_ref().and_then(|file| file.read_at(&mut text, 0).ok());
        let text = read.and_then(|read| std::str::from_utf8(text.get(..read)?).ok());
        // Nanoseconds on a processor, nanoseconds of waiting for one, and how often.
        let waited = text.and_then(|text| text.split_ascii_whitespace().nth(1)?.parse().ok());
        waited.unwrap_or_else(monotonic_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};
    use std::time::Duration;

    const MS: u64 = 1_000_000;
    const ADAPTIVE: IdlePolicy = IdlePolicy::Adaptive { spin_us: 200 };

    #[test]
    fn a_core_looks_for_work_for_as_long_after_work_as_its_policy_says() {
        for (idle, until_ns) in
            [(IdlePolicy::Park, 0), (ADAPTIVE, MS + 200_000), (IdlePolicy::Spin, u64::MAX)]
        {
            let mut polling = Polling::new(idle);
            polling.worked();
            assert_eq!(polling.until_ns(MS), until_ns, "{idle:?}");
            assert_eq!(polling.until_ns(MS + 100_000), until_ns, "{idle:?} without more work");
        }
    }

    #[test]
    fn a_core_that_others_kept_away_sleeps_for_many_times_as_long() {
        for (idle, until_ns) in [(ADAPTIVE, 0), (IdlePolicy::Spin, u64::MAX)] {
            let mut polling = Polling::new(idle);
            polling.worked();
            polling.giving_way.away(10 * MS, 14 * MS, MS);
            assert!(polling.until_ns(14 * MS) > 0, "by the hypervisor, mostly");
            polling.giving_way.away(14 * MS, 17 * MS, 3 * MS);
            let over_ns = 17 * MS + 3 * MS * ABSTENTION;
            polling.worked();
            assert_eq!(polling.until_ns(over_ns - 1), until_ns, "{idle:?}");
            polling.worked();
            assert!(polling.until_ns(over_ns) > over_ns);
            // Stopped by a signal, or suspended.
            polling.giving_way.away(17 * MS, 1_000_000 * MS, 999_983 * MS);
            polling.worked();
            let over_ns = 1_000_000 * MS + ABSTENTION_NS_MAX;
            assert!(polling.until_ns(over_ns) > over_ns, "not for hours");
        }
    }

    /// Processes that compute, two for each processor.
    struct Others(Vec<Child>);

    impl Others {
        fn start() -> Self {
            let processors = std::thread::available_parallelism().unwrap().get();
            let mut others = Self(Vec::new());
            for _ in 0..2 * processors {
                others.0.push(Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap());
            }
            others
        }
    }

    impl Drop for Others {
        fn drop(&mut self) {
            for other in &mut self.0 {
                let _ = other.kill();
                let _ = other.wait();
            }
        }
    }

    const PATIENCE_NS: u64 = 60_000 * MS;

    #[test]
    fn waiting_for_the_processor_is_told_from_using_it() {
        let queued = Queued::of_this_thread();
        if queued.schedstat.is_none() {
            eprintln!("skipped: this kernel has no /proc/thread-self/schedstat");
            return;
        }
        let used_ns = || {
            let used = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            Duration::try_from(used).unwrap().as_nanos() as u64
        };
        let _others = Others::start();
        let (began_ns, used_before_ns, before_ns) = (monotonic_ns(), used_ns(), queued.ns());
        let (mut used, mut waited) = (0, 0);
        while (used < 40 * MS || waited < 40 * MS) && monotonic_ns() - began_ns < PATIENCE_NS {
            (used, waited) = (used_ns() - used_before_ns, queued.ns() - before_ns);
        }
        let took_ns = monotonic_ns() - began_ns;
        assert!(waited >= 40 * MS, "only {waited} ns of waiting in {took_ns} ns");
        assert!(
            used + waited <= took_ns + 20 * MS,
            "{used} ns of use and {waited} of waiting in {took_ns} ns"
        );
    }

    #[test]
    fn beside_those_who_compute_a_core_that_gives_way_soon_abstains() {
        let _others = Others::start();
        let mut polling = Polling::new(ADAPTIVE);
        let began_ns = monotonic_ns();
        let mut now_ns = began_ns;
        while polling.giving_way.abstains_until_ns == 0 {
            assert!(now_ns - began_ns < PATIENCE_NS, "it is never kept away for long");
            now_ns = polling.give_way(now_ns);
        }
        polling.worked();
        assert_eq!(polling.until_ns(now_ns), 0);
    }
}
