//! Users' futures: polled between turns, on the core.
//!
//! A wake puts a task into a queue, once until it is polled. It may come from any thread, so the queue has a lock, which
//! nobody holds for long; and it signals the core, which costs next to nothing unless the core is parked.

use crate::runtime::{LocalFuture, Wakeup, panic_message};
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

pub(super) struct Tasks {
    ready: Arc<Ready>,
    slots: RefCell<Slots>,
    /// Taken from the queue, to be polled.
    polling: RefCell<Vec<usize>>,
}

#[derive(Default)]
struct Slots {
    tasks: Vec<Option<Task>>,
    free: Vec<usize>,
    ended: bool,
}

struct Task {
    /// Absent while it is polled.
    future: Option<LocalFuture>,
    waker: Arc<TaskWaker>,
}

struct TaskWaker {
    slot: usize,
    queued: AtomicBool,
    ready: Arc<Ready>,
}

/// Tasks to be polled, seen from all threads.
struct Ready {
    any: AtomicBool,
    queue: Mutex<Vec<usize>>,
    wakeup: Arc<Wakeup>,
}

impl Tasks {
    pub(super) fn new(wakeup: Arc<Wakeup>) -> Self {
        let ready = Ready { any: AtomicBool::new(false), queue: Mutex::default(), wakeup };
        Self { ready: Arc::new(ready), slots: RefCell::default(), polling: RefCell::default() }
    }

    /// The future is polled before the core parks, or never when the core ends before.
    pub(super) fn spawn(&self, future: LocalFuture) {
        let mut slots = self.slots.borrow_mut();
        if slots.ended {
            drop(slots);
            return drop_caught(future);
        }
        let slot = slots.free.pop().unwrap_or_else(|| {
            slots.tasks.push(None);
            slots.tasks.len() - 1
        });
        let ready = Arc::clone(&self.ready);
        let waker = Arc::new(TaskWaker { slot, queued: AtomicBool::new(false), ready });
        slots.tasks[slot] = Some(Task { future: Some(future), waker: Arc::clone(&waker) });
        drop(slots);
        waker.wake();
    }

    /// Polls each task once that is to be polled. Says whether there was any.
    pub(super) fn run(&self) -> bool {
        if !self.ready.any.load(Ordering::Acquire) {
            return false;
        }
        let mut polling = self.polling.borrow_mut();
        {
            let mut queue = self.ready.lock();
            self.ready.any.store(false, Ordering::Relaxed);
            std::mem::swap(&mut *queue, &mut *polling);
        }
        for slot in polling.drain(..) {
            self.poll(slot);
        }
        true
    }

    fn poll(&self, slot: usize) {
        let (mut future, waker) = {
            let mut slots = self.slots.borrow_mut();
            let Some(task) = slots.tasks.get_mut(slot).and_then(Option::as_mut) else { return };
            // A wake from here on is for another poll. One for a former task of this slot costs a poll.
            task.waker.queued.store(false, Ordering::Release);
            let Some(future) = task.future.take() else { return };
            (future, Waker::from(Arc::clone(&task.waker)))
        };
        let polled =
            catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(&mut Context::from_waker(&waker))));
        if matches!(polled, Ok(Poll::Pending)) {
            let mut slots = self.slots.borrow_mut();
            if let Some(task) = slots.tasks.get_mut(slot).and_then(Option::as_mut) {
                task.future = Some(future);
                return;
            }
        }
        if let Err(panic) = polled {
            tracing::error!(panic = panic_message(&*panic), "a future of a user panicked and was ended");
        }
        let mut slots = self.slots.borrow_mut();
        slots.tasks[slot] = None;
        slots.free.push(slot);
        drop(slots);
        drop_caught(future);
    }

    /// Drops all futures; none is taken any more.
    pub(super) fn end(&self) {
        let tasks = {
            let mut slots = self.slots.borrow_mut();
            slots.ended = true;
            std::mem::take(&mut slots.tasks)
        };
        tasks.into_iter().flatten().filter_map(|task| task.future).for_each(drop_caught);
    }
}

fn drop_caught(future: LocalFuture) {
    if catch_unwind(AssertUnwindSafe(|| drop(future))).is_err() {
        tracing::error!("a future of a user panicked when it was dropped");
    }
}

impl Ready {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<usize>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut queue = self.ready.lock();
        queue.push(self.slot);
        self.ready.any.store(true, Ordering::Release);
        drop(queue);
        self.ready.wakeup.signal();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::future::poll_fn;
    use std::rc::Rc;

    #[test]
    fn a_task_is_polled_once_for_many_wakes_and_again_for_a_wake_while_it_is_polled() {
        let tasks = Tasks::new(Arc::new(Wakeup::new()));
        let (polls, waker) = (Rc::new(Cell::new(0)), Rc::new(RefCell::new(None)));
        let (counted, kept) = (Rc::clone(&polls), Rc::clone(&waker));
        tasks.spawn(Box::pin(poll_fn(move |context| {
            counted.set(counted.get() + 1);
            *kept.borrow_mut() = Some(context.waker().clone());
            if counted.get() == 2 {
                context.waker().wake_by_ref();
            }
            if counted.get() == 4 { Poll::Ready(()) } else { Poll::Pending }
        })));
        assert!(tasks.run() && polls.get() == 1);
        assert!(!tasks.run());
        let waker: Waker = waker.borrow().clone().unwrap();
        for _ in 0..3 {
            waker.wake_by_ref();
        }
        assert!(tasks.run() && polls.get() == 2);
        assert!(tasks.run() && polls.get() == 3, "it woke itself");
        assert!(!tasks.run());
        std::thread::scope(|scope| scope.spawn(|| waker.wake_by_ref()).join().unwrap());
        assert!(tasks.run() && polls.get() == 4);
        waker.wake_by_ref();
        tasks.run();
        assert_eq!(polls.get(), 4, "it has ended");
    }

    #[test]
    fn a_slot_is_used_again() {
        let tasks = Tasks::new(Arc::new(Wakeup::new()));
        for _ in 0..100 {
            tasks.spawn(Box::pin(async {}));
            tasks.run();
        }
        assert_eq!(tasks.slots.borrow().tasks.len(), 1);
    }
}
