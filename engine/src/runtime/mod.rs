//! Backends of the disk and link seams, and the loop that drives an engine on one core.
//!
//! An engine is a [`Turn`]: a synchronous step that takes what has completed, decides, and submits what follows.
//! A backend calls it on a thread of its own, lets the kernel have the submitted operations, and parks when there
//! is nothing to do: this is the only place in the engine where anything waits. The core is woken by a completion,
//! by the deadline that the last turn named, or by another thread's [`Wakeup::signal`].
//!
//! There are two: [`glommio`], and [`uring`], which uses the kernel's rings without an executor. Nothing of either shows
//! above this module.

mod completions;
mod directory;
mod error;
pub mod glommio;
mod park;
mod polling;
mod probe;
mod sockets;
pub mod uring;

pub use error::{IoUringRefusal, RuntimeError};
pub use park::{LocalWakeup, Wakeup};
pub(crate) use polling::GivingWay;
pub use sockets::LinkOptions;

use rustix::time::{ClockId, clock_gettime};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;

/// What runs an engine's core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// [`glommio`]: an executor, on which tasks of users may use all that glommio has. Linux 5.11.
    Glommio,
    /// [`uring`]: one io_uring that does its work when the core waits for it. Fewer system calls and less processor time.
    /// Tasks of users may await whatever needs no executor. Linux 6.1.
    Uring,
}

impl Backend {
    /// What a node runs on that is not told: [`Backend::Uring`], which costs less, unless the kernel is too old for it. A
    /// kernel that offers no ring at all says why when the node starts.
    pub fn of_this_machine() -> Self {
        if uring::is_beyond_the_kernel() { Self::Glommio } else { Self::Uring }
    }
}

/// A future of a user, run on the core between turns.
pub type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;

/// What a core does when a turn found nothing to do. One that looks for work gives way with every look: to other threads of its
/// processor and priority, and on Linux from 6.6 on to those of its control group only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdlePolicy {
    /// Looks for work without pause, and so uses whatever its processor has left, always.
    Spin,
    /// Looks for work for so long after the last command, batch or read that it had to do with, then parks; a cluster without
    /// load sleeps. Where others compute on the processor, or its group may use no more of it, it parks at once; and so it does
    /// after commands while these take longer than that to be committed, or many bytes of log are under way at once: beside
    /// that it gains nothing. A thread that waits blocking for a read, or, unless commands take so long, for outcomes or anything
    /// of the log, looks as long before it sleeps: one thread of the process at a time, none for a while after others kept one
    /// away, and once for what is in flight.
    Adaptive {
        /// How long, in microseconds.
        spin_us: u64,
    },
    /// Parks at once: the thread sleeps until a completion, a signal or the deadline. The least processor time, and the choice
    /// where that is limited or paid for, for real-time priorities, and where processors are shared with what computes; a commit
    /// takes the longer for each time that somebody is woken.
    Park,
}

impl IdlePolicy {
    /// The default: looks for work for 500 µs, longer than a commit takes on a fast disk. So much processor time, and a little more, a
    /// command costs each member that comes alone, with nothing else in flight, and the thread that waits for it.
    pub const ADAPTIVE: Self = Self::Adaptive { spin_us: 500 };
}

impl Default for IdlePolicy {
    fn default() -> Self {
        Self::ADAPTIVE
    }
}

/// The clocks, read once before each turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// CLOCK_BOOTTIME in nanoseconds: never steps back, and counts while the machine is suspended.
    pub monotonic_ns: u64,
    /// The wall clock, in milliseconds since 1970. It may jump in either direction.
    pub wall_ms: u64,
}

impl Now {
    /// Reads the clocks.
    #[must_use]
    pub fn read() -> Self {
        let wall = clock_gettime(ClockId::Realtime);
        let wall_ms = unsigned(wall.tv_sec) * 1_000 + unsigned(wall.tv_nsec) / 1_000_000;
        Self { monotonic_ns: monotonic_ns(), wall_ms }
    }
}

/// As [`Now::monotonic_ns`].
pub(crate) fn monotonic_ns() -> u64 {
    let boot = clock_gettime(ClockId::Boottime);
    unsigned(boot.tv_sec) * 1_000_000_000 + unsigned(boot.tv_nsec)
}

/// Neither clock is negative on a machine that runs; a wall clock set to before 1970 reads as 1970.
fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

/// What a turn wants to happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TurnOutcome {
    /// A read went a step further, or a command or a batch and commands do not take long: more may follow soon, and an adaptive core
    /// looks for it for a while before it parks. Heartbeats do not count, nor pieces of snapshots, nor what the log does for itself.
    pub worked: bool,
    /// Another turn at the same moment would do more: a bound of this one was reached, or one of its stages has left something
    /// to a stage that comes before it. Otherwise no turn is needed until there is a completion, a signal or the deadline; one
    /// that comes earlier does nothing.
    pub more: bool,
    /// Call again at this [`Now::monotonic_ns`] at the latest; `u64::MAX` for never.
    pub next_deadline_ns: u64,
    /// This was the last turn.
    pub stop: bool,
}

/// What a backend drives: bounded work per call, never blocking.
pub trait Turn {
    /// Does what can be done now. `now` must have been read after everything had completed that the disk and the link
    /// report in this turn: what a follower promises a leader counts from when it heard it, and a clock that was read
    /// before would make that shorter than the leader's lease.
    fn turn(&mut self, now: Now) -> TurnOutcome;
}

fn caught<R>(work: impl FnOnce() -> R) -> Result<R, RuntimeError> {
    catch_unwind(AssertUnwindSafe(work))
        .map_err(|panic| RuntimeError::Panicked(panic_message(&*panic).to_owned()))
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_monotonic_clock_does_not_step_back_and_the_wall_clock_is_after_2020() {
        let first = Now::read();
        let second = Now::read();
        assert!(second.monotonic_ns >= first.monotonic_ns);
        assert!(first.wall_ms > 1_577_836_800_000);
    }
}
