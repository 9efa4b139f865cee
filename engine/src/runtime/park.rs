//! How a parked core is woken: by other threads through [`Wakeup`], from its own thread through [`LocalWakeup`].
//!
//! A producer puts its work into a queue and then signals. The core polls the queue every turn, so the signal only
//! matters when the core is parked:
//!
//! ```text
//! producer:  push; fence; state == PARKED ?  -> ring the bell
//! core:      state = PARKED; fence; one more turn, which looks into the queue; nothing? -> sleep
//! ```
//!
//! With a full fence on both sides at least one of the two sees the other, so no work is left lying. Only the first
//! signal after a park rings, so a million signals cost one wake.
//!
//! The bell is a socket pair under glommio. Neither end is the executor's own wake channel, whose events may be overlooked:
//! see "Parking" there. On a ring of our own it is an eventfd, which costs less and need not be read.

use super::RuntimeError;
use rustix::event::EventfdFlags;
use rustix::net::SendFlags;
use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::{AtomicU8, Ordering, fence};
use std::sync::{Arc, OnceLock};
use std::task::Waker;

/// Turns are being run, or will be: nothing needs to be done to have a queue looked into.
const RUNNING: u8 = 0;
/// The core sleeps, or is about to after one more turn.
const PARKED: u8 = 1;
/// As before, and somebody has rung.
const SIGNALLED: u8 = 2;

/// Wakes one core from any thread.
#[derive(Debug, Default)]
pub struct Wakeup {
    state: AtomicU8,
    bell: OnceLock<Bell>,
}

#[derive(Debug)]
enum Bell {
    Socket(UnixStream),
    Event(Arc<OwnedFd>),
}

impl Wakeup {
    /// A wake-up for one core, to be shared with everybody who feeds that core.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sees to it that the core runs a turn after this call. To be called after the work was queued.
    ///
    /// Costs a fence and a load unless the core is parked. Never blocks. Does nothing once the core has ended.
    pub fn signal(&self) {
        fence(Ordering::SeqCst);
        self.signal_after_fence();
    }

    /// As [`Wakeup::signal`], for who has had a full fence between the queueing and this.
    pub(crate) fn signal_after_fence(&self) {
        if self.state.load(Ordering::Relaxed) == PARKED {
            self.ring();
        }
    }

    #[cold]
    fn ring(&self) {
        let first = self.state.compare_exchange(PARKED, SIGNALLED, Ordering::AcqRel, Ordering::Relaxed);
        if let (Ok(_), Some(bell)) = (first, self.bell.get()) {
            // A failure is harmless: a full bell is readable too, a closed one has nobody to wake.
            let _ = match bell {
                Bell::Socket(bell) => {
                    rustix::net::send(bell, &[0], SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map(drop)
                }
                Bell::Event(bell) => rustix::io::write(bell, &1_u64.to_ne_bytes()).map(drop),
            };
        }
    }

    /// The core's end of the bell, which becomes readable when the core is to wake.
    pub(super) fn connect(&self) -> Result<UnixStream, RuntimeError> {
        let (ours, theirs) = UnixStream::pair()?;
        self.bell.set(Bell::Socket(theirs)).map_err(|_| RuntimeError::WakeupInUse)?;
        Ok(ours)
    }

    /// As [`Wakeup::connect`], with an eventfd for a bell. Each ring is an event of its own to who watches it, whether
    /// or not it is read.
    pub(super) fn connect_event(&self) -> Result<Arc<OwnedFd>, RuntimeError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let bell = Arc::new(rustix::event::eventfd(0, flags).map_err(std::io::Error::from)?);
        self.bell.set(Bell::Event(Arc::clone(&bell))).map_err(|_| RuntimeError::WakeupInUse)?;
        Ok(bell)
    }

    /// From now on a signal rings. The core must run one more turn before it sleeps.
    pub(super) fn arm(&self) {
        self.state.store(PARKED, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Turns are being run again. A ring that has come meanwhile stays in the bell and costs one idle turn.
    pub(super) fn disarm(&self) {
        self.state.store(RUNNING, Ordering::Relaxed);
    }
}

/// Wakes the core from its own thread: completions, and futures that users run on the core.
#[derive(Clone, Debug, Default)]
pub struct LocalWakeup {
    inner: Rc<LocalWakeupInner>,
}

#[derive(Debug, Default)]
struct LocalWakeupInner {
    pending: Cell<bool>,
    core: RefCell<Option<Waker>>,
}

impl LocalWakeup {
    /// Sees to it that the core runs another turn.
    pub fn wake(&self) {
        if !self.inner.pending.replace(true)
            && let Some(core) = &*self.inner.core.borrow()
        {
            core.wake_by_ref();
        }
    }

    /// Whether a turn was asked for since the last call.
    pub(super) fn take(&self) -> bool {
        self.inner.pending.replace(false)
    }

    /// Whether a turn was asked for since it was last taken.
    pub(super) fn is_pending(&self) -> bool {
        self.inner.pending.get()
    }

    /// The task to be woken, `None` when it has ended.
    pub(super) fn set_core(&self, core: Option<Waker>) {
        *self.inner.core.borrow_mut() = core;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn only_the_first_signal_after_a_park_rings() {
        let wakeup = Wakeup::new();
        let mut core = wakeup.connect().unwrap();
        core.set_nonblocking(true).unwrap();
        let mut bytes = [0; 64];
        wakeup.signal();
        assert!(core.read(&mut bytes).is_err(), "a running core is left alone");
        for _ in 0..3 {
            wakeup.arm();
            for _ in 0..100_000 {
                wakeup.signal();
            }
            assert_eq!(core.read(&mut bytes).unwrap(), 1);
            wakeup.disarm();
            wakeup.signal();
            assert!(core.read(&mut bytes).is_err());
        }
    }

    #[test]
    fn a_wakeup_serves_one_core() {
        let wakeup = Wakeup::new();
        let core = wakeup.connect().unwrap();
        assert!(matches!(wakeup.connect(), Err(RuntimeError::WakeupInUse)));
        drop(core);
        wakeup.arm();
        wakeup.signal();
    }
}
