//! How a parked core is woken: by other threads through [`Wakeup`], from its own thread through [`LocalWakeup`].
//!
//! A producer puts its work into a queue and then signals. The core looks into the queue in every turn, so a signal has only
//! to see to it that there is another turn: it notes that somebody called, and the core, which asks for that before it
//! sleeps, does not; or the core sleeps already, and the producer rings its bell.
//!
//! ```text
//!            called                park
//!  CALLED <---------- RUNNING ------------> PARKED ----------> SIGNALLED
//!     |                  ^                     |      rung         |
//!     +------------------+---------------------+-------------------+
//!                            begin_turn
//!
//! producer:  push; fence; RUNNING -> CALLED, or PARKED -> SIGNALLED and ring; CALLED, SIGNALLED: somebody else did
//! core:      begin_turn: any -> RUNNING; fence; a turn, which looks into the queue; park: RUNNING -> PARKED; sleep
//! ```
//!
//! No work is left lying. Say that a producer has pushed, and what it finds in `state` is
//!
//! * CALLED or SIGNALLED. A turn begins before the core sleeps again, and that turn sees the push: if the producer read the
//!   state before the core changed it to RUNNING, then its fence came before that of `begin_turn`, and what was pushed before
//!   the one is seen behind the other. If the core had done so already the producer would have found something else.
//! * RUNNING, which it changes to CALLED. `park` changes nothing but RUNNING, so it fails, or came before: then so does the
//!   producer's change, and it looks again. A turn follows, and sees the push by the fences.
//! * PARKED, which it changes to SIGNALLED, and it rings. The bell keeps what has been rung, so that it does not matter whether the
//!   core sleeps yet.
//!
//! Both fences are full ones: each side writes one place and then reads the other, and one of the two must see what the other
//! wrote. The changes of `state` need no order of their own: each is of one atomic, which has one history for all.
//!
//! Only the first call of a turn writes, and only the first signal after a park rings: a million signals cost one wake.
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

/// A turn is being run, or will be, and nobody has called since it began.
const RUNNING: u8 = 0;
/// As before, and somebody has: there will be another turn.
const CALLED: u8 = 1;
/// The core sleeps, or is about to.
const PARKED: u8 = 2;
/// As before, and somebody has rung.
const SIGNALLED: u8 = 3;

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
    /// Costs a fence and a load, and a write the first time since the core began its last turn, unless the core is parked. Never
    /// blocks. Does nothing once the core has ended.
    pub fn signal(&self) {
        fence(Ordering::SeqCst);
        self.signal_after_fence();
    }

    /// As [`Wakeup::signal`], for who has had a full fence between the queueing and this.
    pub(crate) fn signal_after_fence(&self) {
        let mut state = self.state.load(Ordering::Relaxed);
        loop {
            let told = match state {
                RUNNING => CALLED,
                PARKED => SIGNALLED,
                _ => return,
            };
            match self.change(state, told) {
                Ok(()) if told == SIGNALLED => return self.ring(),
                Ok(()) => return,
                Err(now) => state = now,
            }
        }
    }

    fn change(&self, from: u8, to: u8) -> Result<(), u8> {
        self.state.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed).map(drop)
    }

    #[cold]
    fn ring(&self) {
        if let Some(bell) = self.bell.get() {
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

    /// What was pushed before the signals so far is seen by what the core does next; later ones are for another turn. A ring that has
    /// come meanwhile stays in the bell and may cost one idle turn.
    pub(super) fn begin_turn(&self) {
        // A call that is not seen here is one that `park` finds.
        if self.state.load(Ordering::Relaxed) != RUNNING {
            self.state.store(RUNNING, Ordering::Relaxed);
            fence(Ordering::SeqCst);
        }
    }

    /// Whether anybody has called since the last turn began, which asks for another.
    pub(super) fn is_called(&self) -> bool {
        self.state.load(Ordering::Relaxed) != RUNNING
    }

    /// Whether the bell has been rung, or is about to be, since the core parked.
    pub(super) fn is_signalled(&self) -> bool {
        self.state.load(Ordering::Relaxed) == SIGNALLED
    }

    /// Whether the core may sleep, since nobody has called since its last turn began: from now on a signal rings. Otherwise it
    /// runs another turn.
    #[must_use]
    pub(super) fn park(&self) -> bool {
        self.change(RUNNING, PARKED).is_ok()
    }
}

/// Wakes the core from its own thread: completions, and futures that users run on the core.
#[derive(Clone, Debug, Default)]
pub struct LocalWakeup {
    inner: Rc<LocalWakeupInner>,
}

#[derive(Debug, Default)]
struct LocalWakeupInner {
    /// A turn was asked for.
    asked: Cell<bool>,
    /// Completions that no turn has taken.
    completions: Cell<usize>,
    core: RefCell<Option<Waker>>,
}

impl LocalWakeup {
    /// Sees to it that the core runs another turn.
    pub fn wake(&self) {
        if !self.inner.asked.replace(true) {
            self.wake_core();
        }
    }

    /// There is one more completion for a turn to take, in this one or in another.
    pub(super) fn completed(&self) {
        let before = self.inner.completions.replace(self.inner.completions.get() + 1);
        if before == 0 {
            self.wake_core();
        }
    }

    /// A turn has taken so many completions.
    pub(super) fn taken(&self, completions: usize) {
        self.inner.completions.set(self.inner.completions.get() - completions);
    }

    fn wake_core(&self) {
        if let Some(core) = &*self.inner.core.borrow() {
            core.wake_by_ref();
        }
    }

    /// A turn begins, which is what was asked for.
    pub(super) fn begin_turn(&self) {
        self.inner.asked.set(false);
    }

    /// Whether a turn was asked for since the last one began, or there is something to take.
    pub(super) fn is_pending(&self) -> bool {
        self.inner.asked.get() || self.inner.completions.get() > 0
    }

    /// Whether a turn was asked for since the last one began, and there is nothing to take.
    pub(super) fn is_only_asked(&self) -> bool {
        self.inner.asked.get() && self.inner.completions.get() == 0
    }

    /// The task to be woken, `None` when it has ended.
    pub(super) fn set_core(&self, core: Option<Waker>) {
        *self.inner.core.borrow_mut() = core;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::time::Timespec;
    use std::io::Read;
    use std::sync::atomic::AtomicU64;

    fn connected() -> (Wakeup, UnixStream) {
        let wakeup = Wakeup::new();
        let core = wakeup.connect().unwrap();
        core.set_nonblocking(true).unwrap();
        (wakeup, core)
    }

    fn rings(core: &mut UnixStream) -> usize {
        core.read(&mut [0; 64]).unwrap_or(0)
    }

    #[test]
    fn a_signal_during_a_turn_keeps_the_core_from_parking_until_another_turn_has_begun() {
        let (wakeup, mut core) = connected();
        for _ in 0..3 {
            for _ in 0..100_000 {
                wakeup.signal();
            }
            assert!(!wakeup.park() && !wakeup.park());
            wakeup.begin_turn();
            assert!(wakeup.park());
            wakeup.begin_turn();
        }
        assert_eq!(rings(&mut core), 0, "a running core is left alone");
    }

    #[test]
    fn only_the_first_signal_after_a_park_rings() {
        let (wakeup, mut core) = connected();
        for _ in 0..3 {
            assert!(wakeup.park());
            for _ in 0..100_000 {
                wakeup.signal();
            }
            assert_eq!(rings(&mut core), 1);
            wakeup.begin_turn();
            wakeup.signal();
            assert_eq!(rings(&mut core), 0);
            wakeup.begin_turn();
        }
    }

    #[test]
    fn a_core_that_wakes_by_itself_has_not_been_called() {
        let (wakeup, mut core) = connected();
        for _ in 0..3 {
            assert!(wakeup.park());
            wakeup.begin_turn();
        }
        assert_eq!(rings(&mut core), 0);
    }

    /// Two producers, each with a push and a signal to come, and a core.
    struct Model {
        wakeup: Wakeup,
        steps: [u32; 2],
        pushed: [bool; 2],
        taken: [bool; 2],
        core_step: u32,
        asleep: bool,
    }

    impl Model {
        const CORE: usize = 2;

        fn new() -> Self {
            let (steps, pushed, taken) = ([0; 2], [false; 2], [false; 2]);
            Self { wakeup: Wakeup::new(), steps, pushed, taken, core_step: 0, asleep: false }
        }

        /// Who can go on.
        fn able(&self) -> Vec<usize> {
            let mut able: Vec<usize> = (0..2).filter(|producer| self.steps[*producer] < 2).collect();
            if !self.asleep || self.wakeup.is_signalled() {
                able.push(Self::CORE);
            }
            able
        }

        fn step(&mut self, who: usize) {
            if who == Self::CORE {
                self.asleep = false;
                match self.core_step {
                    0 => self.wakeup.begin_turn(),
                    1 => self.taken = self.pushed,
                    _ => self.asleep = self.wakeup.park(),
                }
                self.core_step = (self.core_step + 1) % 3;
            } else {
                match self.steps[who] {
                    0 => self.pushed[who] = true,
                    _ => self.wakeup.signal(),
                }
                self.steps[who] += 1;
            }
        }
    }

    #[test]
    fn in_no_order_of_their_steps_does_the_core_sleep_over_what_two_producers_pushed() {
        let mut orders = vec![Vec::new()];
        let mut ended = 0;
        while let Some(order) = orders.pop() {
            let mut model = Model::new();
            order.iter().for_each(|who| model.step(*who));
            let able = model.able();
            if able.is_empty() {
                assert_eq!(model.taken, [true; 2], "{order:?}");
                ended += 1;
            }
            assert!(order.len() < 32, "the core never rests: {order:?}");
            orders.extend(able.into_iter().map(|who| [&order[..], &[who]].concat()));
        }
        assert!(ended > 100, "{ended} orders");
    }

    /// A signal that was lost shows at once: the core sleeps and nobody has rung, though a signal has returned for work that no
    /// turn has seen. It sleeps without an end, so that one that rings too early shows too.
    #[test]
    fn nothing_is_left_lying_when_several_threads_push_and_signal_while_the_core_parks() {
        const ROUNDS: u64 = 30_000;
        let wakeup = Wakeup::new();
        let bell = wakeup.connect_event().unwrap();
        let zeros = || [const { AtomicU64::new(0) }; 3];
        let (pushed, signalled, taken) = (zeros(), zeros(), zeros());
        std::thread::scope(|scope| {
            for producer in 0..pushed.len() {
                let (wakeup, pushed, signalled, taken) = (&wakeup, &pushed, &signalled, &taken);
                scope.spawn(move || {
                    for round in 1..=ROUNDS {
                        pushed[producer].store(round, Ordering::Relaxed);
                        wakeup.signal();
                        signalled[producer].store(round, Ordering::Release);
                        // Now and then until it has been taken, so that the core parks.
                        while round % 4 == 0 && taken[producer].load(Ordering::Relaxed) < round {
                            std::thread::yield_now();
                        }
                    }
                });
            }
            let (mut parks, patience) = (0, Timespec { tv_sec: 60, tv_nsec: 0 });
            loop {
                wakeup.begin_turn();
                for (pushed, taken) in pushed.iter().zip(&taken) {
                    taken.store(pushed.load(Ordering::Relaxed), Ordering::Relaxed);
                }
                if taken.iter().all(|taken| taken.load(Ordering::Relaxed) == ROUNDS) {
                    break;
                }
                if wakeup.park() {
                    parks += 1;
                    let overlooked = signalled.iter().zip(&taken).any(|(signalled, taken)| {
                        signalled.load(Ordering::Acquire) > taken.load(Ordering::Relaxed)
                    });
                    let lost = overlooked && !wakeup.is_signalled();
                    let sleep = || poll(&mut [PollFd::new(&*bell, PollFlags::IN)], Some(&patience)).unwrap();
                    if lost || sleep() == 0 {
                        // Nobody is left waiting, or the test would not end.
                        taken.iter().for_each(|taken| taken.store(u64::MAX, Ordering::Relaxed));
                        panic!("asleep over work after {parks} parks, seen at once: {lost}");
                    }
                    rustix::io::read(&*bell, &mut [0; 8]).unwrap();
                }
            }
            assert!(parks > 0);
        });
    }

    #[test]
    fn a_wakeup_serves_one_core() {
        let wakeup = Wakeup::new();
        let core = wakeup.connect().unwrap();
        assert!(matches!(wakeup.connect(), Err(RuntimeError::WakeupInUse)));
        drop(core);
        assert!(wakeup.park());
        wakeup.signal();
    }
}
