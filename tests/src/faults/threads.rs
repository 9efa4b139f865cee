//! Work that is split over threads, each of which makes its own world.

use std::sync::Mutex;
use std::sync::PoisonError;

/// What all modes report.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Images, injections or patterns.
    pub cases: u64,
    /// What went wrong, in the order of its name.
    pub violations: Vec<String>,
}

/// So many violations are told; a defect shows in thousands of images.
pub const VIOLATIONS_TOLD_MAX: usize = 10;

impl Tally {
    /// Counts a case.
    pub fn count(&mut self, violation: Option<String>) {
        self.cases += 1;
        self.violations.extend(violation);
    }

    /// Adds another.
    pub fn merge(&mut self, other: Self) {
        self.cases += other.cases;
        self.violations.extend(other.violations);
        self.violations.sort();
    }
}

/// Runs `work` with the number of each thread, from 0, and adds up what they bring. The sum does not depend on their order.
pub fn split(threads: usize, work: impl Fn(usize) -> Tally + Sync) -> Tally {
    let sum = Mutex::new(Tally::default());
    std::thread::scope(|scope| {
        for thread in 0..threads.max(1) {
            let (sum, work) = (&sum, &work);
            scope.spawn(move || {
                let tally = work(thread);
                sum.lock().unwrap_or_else(PoisonError::into_inner).merge(tally);
            });
        }
    });
    sum.into_inner().unwrap_or_else(PoisonError::into_inner)
}
