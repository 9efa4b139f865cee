//! A clock for a task on the core, which has none of its own there: a thread that sleeps and wakes it.

use super::now_ns;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::thread::JoinHandle;
use std::time::Duration;

/// Wakes a task at a time that the task sets, and sets anew each time. The thread ends with it.
pub(super) struct Alarm {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Whom to wake, and when.
    set: Option<(u64, Waker)>,
    over: bool,
}

impl Alarm {
    pub(super) fn new() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("alarm".to_owned()).spawn(move || of_thread.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Wakes the task at `at_ns` of the monotonic clock, instead of when it was to before.
    pub(super) fn set(&self, at_ns: u64, waker: &Waker) {
        let mut state = self.shared.lock();
        // An earlier time than the thread sleeps for is news to it; at a later one it wakes, and sleeps again.
        let news = state.set.as_ref().is_none_or(|(before_ns, _)| at_ns < *before_ns);
        match &mut state.set {
            Some((before_ns, known)) if known.will_wake(waker) => *before_ns = at_ns,
            set => *set = Some((at_ns, waker.clone())),
        }
        if news {
            self.shared.changed.notify_one();
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It has nothing that could panic.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        super::sleep_precisely();
        let mut state = self.lock();
        while !state.over {
            let wait_ns = match &state.set {
                None => u64::MAX,
                Some((at_ns, _)) => at_ns.saturating_sub(now_ns()),
            };
            if wait_ns == 0
                && let Some((_, waker)) = state.set.take()
            {
                drop(state);
                waker.wake();
                state = self.lock();
                continue;
            }
            let wait = Duration::from_nanos(wait_ns.min(1_000_000_000));
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};
    use std::task::Wake;

    struct Rings(Mutex<Sender<u64>>);

    impl Wake for Rings {
        fn wake(self: Arc<Self>) {
            self.0.lock().unwrap().send(now_ns()).unwrap();
        }
    }

    #[test]
    fn it_rings_once_at_the_time_that_was_set_last_and_not_before() {
        let alarm = Alarm::new().unwrap();
        let (rings, rung) = channel();
        let waker = Waker::from(Arc::new(Rings(Mutex::new(rings))));
        let start_ns = now_ns();
        alarm.set(start_ns + 3_600_000_000_000, &waker);
        alarm.set(start_ns + 2_000_000, &waker);
        assert!(rung.recv().unwrap() >= start_ns + 2_000_000);
        let later_ns = now_ns() + 5_000_000;
        alarm.set(now_ns(), &waker);
        alarm.set(later_ns, &waker);
        // The first of the two may have come to ring before it was put off.
        let mut last_ns = 0;
        while last_ns < later_ns {
            last_ns = rung.recv().unwrap();
        }
        drop(alarm);
        assert!(rung.try_recv().is_err(), "it rings no more");
    }
}
