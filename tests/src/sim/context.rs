//! What all parts of one world share: the virtual time, the trace and the coverage counters.

use super::coverage::{Coverage, Mark};
use super::trace::{Trace, TraceEvent, What};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// A moment of virtual time, in nanoseconds from the start of the run.
pub type Time = u64;

/// One microsecond of virtual time.
pub const MICROSECOND: Time = 1_000;
/// One millisecond of virtual time.
pub const MILLISECOND: Time = 1_000_000;
/// One second of virtual time.
pub const SECOND: Time = 1_000_000_000;

/// Shared by the world, its disks and its network. Single-threaded, as a world is.
pub struct Context {
    now: Cell<Time>,
    trace: RefCell<Trace>,
    coverage: RefCell<Coverage>,
}

impl Context {
    /// A context at time 0.
    #[must_use]
    pub fn new(trace: Trace) -> Rc<Self> {
        Rc::new(Self {
            now: Cell::new(0),
            trace: RefCell::new(trace),
            coverage: RefCell::new(Coverage::default()),
        })
    }

    /// The virtual time.
    pub fn now(&self) -> Time {
        self.now.get()
    }

    /// Moves time forward.
    ///
    /// # Panics
    /// When `time` lies in the past.
    pub fn advance_to(&self, time: Time) {
        assert!(time >= self.now.get(), "time does not run backwards");
        self.now.set(time);
    }

    /// Records an event of `node` in the trace, now.
    pub fn record(&self, node: usize, what: What, a: u64, b: u64) {
        self.trace.borrow_mut().record(TraceEvent { time: self.now(), node: node as u16, what, a, b });
    }

    /// Prints what numbers do not say, in a run whose events are printed.
    pub fn note(&self, text: impl FnOnce() -> String) {
        self.trace.borrow().note(text);
    }

    /// Counts that the run came by `mark`.
    pub fn cover(&self, mark: Mark) {
        self.coverage.borrow_mut().count(mark, 1);
    }

    /// The counters so far.
    pub fn coverage(&self) -> Coverage {
        self.coverage.borrow().clone()
    }

    /// The trace.
    pub fn trace(&self) -> &RefCell<Trace> {
        &self.trace
    }
}
