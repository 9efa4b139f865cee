//! Many seeds, on some threads; the result does not depend on how many.

use super::coverage::{Coverage, Mark};
use super::node::Cluster;
use super::world::{Options, Report, run};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_64;

/// What came of a range of seeds.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Runs that were finished: all of the range, or up to the first failure.
    pub runs: u64,
    /// Their events.
    pub events: u64,
    /// Wall-clock time.
    pub elapsed: Duration,
    /// Processor time of all threads, also for runs beyond the first failure.
    pub busy: Duration,
    /// Hash over the runs' hashes, in the order of their seeds.
    pub hash: u64,
    /// All they came by.
    pub coverage: Coverage,
    /// How they were made.
    pub options: Options,
    /// The failed run with the lowest seed.
    pub failure: Option<Report>,
}

impl Summary {
    /// What a range of this size must come by, as far as its options allow, and did not.
    #[must_use]
    pub fn missing(&self) -> Vec<Mark> {
        let mut missing = self.coverage.missing(self.runs);
        missing.retain(|mark| self.options.allow(mark.need()));
        missing
    }

    /// Whether more than one run in fifty ended with a cluster that waits for copies, or halted: a run may, since several
    /// disks fail in it, but that must be rare.
    #[must_use]
    pub fn is_undecided_too_often(&self) -> bool {
        self.coverage.of(Mark::Undecided) * 50 > self.runs.max(50)
    }

    /// Events in a second of wall-clock time, on all threads together.
    #[must_use]
    pub fn events_per_s(&self) -> u64 {
        (self.events as f64 / self.elapsed.as_secs_f64().max(1e-9)) as u64
    }

    /// Events in a second of one processor's time: what a core does that has nothing else to do.
    #[must_use]
    pub fn events_per_core_s(&self) -> u64 {
        (self.events as f64 / self.busy.as_secs_f64().max(1e-9)) as u64
    }
}

/// Processor time of this thread.
fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Runs `seeds`, in order, until one fails. `make` makes the cluster on each thread.
pub fn run_range<C: Cluster>(
    make: impl Fn() -> C + Sync,
    seeds: Range<u64>,
    options: &Options,
    threads: usize,
    progress: impl Fn(u64) + Sync,
) -> Summary {
    let start = Instant::now();
    let next = AtomicU64::new(seeds.start);
    // No seed from here on needs to be run: a lower one failed.
    let end = AtomicU64::new(seeds.end);
    let reports = Mutex::new(Vec::new());
    let busy_ns = AtomicU64::new(0);
    let work = || {
        let began = thread_time();
        let cluster = make();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end.load(Ordering::Relaxed) {
                break;
            }
            let report = run(&cluster, seed, options);
            if report.failure.is_some() {
                end.fetch_min(seed, Ordering::Relaxed);
            }
            let mut reports = reports.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            reports.push(report);
            progress(reports.len() as u64);
        }
        busy_ns.fetch_add((thread_time() - began).as_nanos() as u64, Ordering::Relaxed);
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });

    let mut reports = reports.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    reports.sort_by_key(|report| report.seed);
    let mut summary = Summary {
        runs: 0,
        events: 0,
        elapsed: start.elapsed(),
        busy: Duration::from_nanos(busy_ns.into_inner()),
        hash: 0,
        coverage: Coverage::default(),
        options: options.clone(),
        failure: None,
    };
    let mut hashes = Vec::new();
    for report in reports {
        if summary.failure.is_some() {
            break;
        }
        summary.runs += 1;
        summary.events += report.events;
        summary.coverage.merge(&report.coverage);
        hashes.extend_from_slice(&report.hash.to_le_bytes());
        if report.failure.is_some() {
            summary.failure = Some(report);
        }
    }
    summary.hash = xxh3_64(&hashes);
    summary
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::coverage::Need;

    /// A long range with changes and without failing disks failed, since nothing had rotted in it.
    #[test]
    fn what_the_options_do_not_allow_is_not_missing() {
        let missing = |options: Options| {
            let summary = Summary {
                runs: 10_000,
                events: 0,
                elapsed: Duration::ZERO,
                busy: Duration::ZERO,
                hash: 0,
                coverage: Coverage::default(),
                options,
                failure: None,
            };
            summary.missing()
        };
        let required = |mark: &Mark| mark.required_from() > 0;
        let all: Vec<Mark> = Mark::ALL.iter().copied().filter(required).collect();
        let any = Options::default();
        assert_eq!(missing(any.clone()), all);
        let without = |options: Options, need: Need| {
            let left: Vec<Mark> = all.iter().copied().filter(|mark| mark.need() != need).collect();
            assert!(left.len() < all.len(), "{need:?}");
            assert_eq!(missing(options), left, "{need:?}");
        };
        without(Options { disk_faults: Some(false), ..any.clone() }, Need::RottingDisk);
        without(Options { disk_faults: Some(false), changes: Some(true), ..any.clone() }, Need::RottingDisk);
        without(Options { disk_faults: Some(true), ..any.clone() }, Need::Changes);
        without(Options { changes: Some(false), ..any.clone() }, Need::Changes);
        without(Options { late_writes: Some(false), ..any.clone() }, Need::LateWrites);
        without(Options { image_check_every: 0, ..any.clone() }, Need::ImageChecks);
        let two = missing(Options { nodes: Some(2), ..any });
        assert!(!two.contains(&Mark::Rot) && !two.contains(&Mark::Figure8), "{two:?}");
    }
}
