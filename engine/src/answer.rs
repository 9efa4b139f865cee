//! One answer from the core to whoever asked: a plain future that needs no executor, with a blocking `wait`.

use crate::handle::{lock, register};
use crate::waiting::look;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// What was asked of the core, to be answered once. Cancel safe: dropping it abandons the answer, not what was asked.
#[must_use = "the answer tells whether it was done"]
pub struct Answer<T> {
    slot: Arc<AnswerSlot<T>>,
    /// For how long a thread looks for it before it sleeps.
    patience: Duration,
}

impl<T> Answer<T> {
    /// An answer to come, and where to put it.
    pub(crate) fn new() -> (Self, Arc<AnswerSlot<T>>) {
        Self::looked_for(Duration::ZERO)
    }

    /// One that a thread looks for so long before it sleeps.
    pub(crate) fn looked_for(patience: Duration) -> (Self, Arc<AnswerSlot<T>>) {
        let slot = Arc::new(AnswerSlot::default());
        (Self { slot: Arc::clone(&slot), patience }, slot)
    }

    /// The answer that is put there.
    pub(crate) fn of(slot: Arc<AnswerSlot<T>>, patience: Duration) -> Self {
        Self { slot, patience }
    }

    pub(crate) fn slot(&self) -> &Arc<AnswerSlot<T>> {
        &self.slot
    }

    pub(crate) fn slot_mut(&mut self) -> &mut Arc<AnswerSlot<T>> {
        &mut self.slot
    }

    /// Blocks until it is there. That of a read the thread may look for a while before it sleeps
    /// ([`IdlePolicy::Adaptive`](crate::runtime::IdlePolicy::Adaptive)).
    ///
    /// # Panics
    /// When it was polled before and was ready: the answer was given then.
    #[must_use]
    pub fn wait(mut self) -> T {
        self.wait_blocking()
    }

    pub(crate) fn wait_blocking(&mut self) -> T {
        look(self.patience, || self.slot.has_come.load(Ordering::Acquire));
        let mut state = lock(&self.slot.state);
        loop {
            if let Some(value) = state.take() {
                return value;
            }
            assert!(!state.taken, "an answer is not waited for after it was ready");
            state.blocked = true;
            state = self.slot.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Blocks until it is there or `deadline` has come.
    pub(crate) fn wait_until(&mut self, deadline: Instant) -> Option<T> {
        let left = || deadline.saturating_duration_since(Instant::now());
        look(self.patience.min(left()), || self.slot.has_come.load(Ordering::Acquire));
        let mut state = lock(&self.slot.state);
        loop {
            let left = left();
            if state.value.is_some() || left.is_zero() {
                return state.take();
            }
            state.blocked = true;
            state = self.slot.done.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The answer, if it is there: once. Never blocks.
    pub fn try_take(&mut self) -> Option<T> {
        lock(&self.slot.state).take()
    }
}

impl<T> Future for Answer<T> {
    type Output = T;

    /// # Panics
    /// When polled again after it was ready, or taken.
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let mut state = lock(&self.slot.state);
        if let Some(value) = state.take() {
            return Poll::Ready(value);
        }
        assert!(!state.taken, "an answer is not polled after it was ready");
        register(&mut state.waker, context);
        Poll::Pending
    }
}

/// Where the core puts an answer.
pub(crate) struct AnswerSlot<T> {
    state: Mutex<State<T>>,
    done: Condvar,
    /// It has been answered, for who looks without the lock; under it `state` tells.
    has_come: AtomicBool,
}

struct State<T> {
    value: Option<T>,
    waker: Option<Waker>,
    blocked: bool,
    taken: bool,
}

impl<T> State<T> {
    fn take(&mut self) -> Option<T> {
        let value = self.value.take();
        self.taken |= value.is_some();
        value
    }
}

impl<T> Default for AnswerSlot<T> {
    fn default() -> Self {
        let state = State { value: None, waker: None, blocked: false, taken: false };
        Self { state: Mutex::new(state), done: Condvar::new(), has_come: AtomicBool::new(false) }
    }
}

impl<T> AnswerSlot<T> {
    #[cfg(test)]
    pub(crate) fn take(&self) -> Option<T> {
        lock(&self.state).take()
    }

    /// Answers. A second answer to one question is a mistake that changes nothing.
    pub(crate) fn complete(&self, value: T) {
        let (waker, blocked) = {
            let mut state = lock(&self.state);
            if state.value.is_some() || state.taken {
                return;
            }
            state.value = Some(value);
            self.has_come.store(true, Ordering::Release);
            (state.waker.take(), state.blocked)
        };
        if blocked {
            self.done.notify_one();
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::waiting::asked;

    #[test]
    fn the_first_answer_counts_for_a_waiter_and_for_a_future() {
        let (answer, slot) = Answer::new();
        let waiter = std::thread::spawn(move || answer.wait());
        slot.complete(1);
        slot.complete(2);
        assert_eq!(waiter.join().expect("no panic"), 1);

        let (answer, slot) = Answer::new();
        let mut answer = std::pin::pin!(answer);
        let mut context = Context::from_waker(Waker::noop());
        assert_eq!(answer.as_mut().poll(&mut context), Poll::Pending);
        slot.complete(3);
        assert_eq!(answer.as_mut().poll(&mut context), Poll::Ready(3));

        let (mut answer, slot) = Answer::new();
        assert_eq!(answer.try_take(), None);
        slot.complete(4);
        slot.complete(5);
        assert_eq!((answer.try_take(), answer.try_take()), (Some(4), None));
        slot.complete(6);
        assert_eq!(answer.try_take(), None);
    }

    #[test]
    fn a_thread_looks_for_an_answer_if_it_has_patience() {
        let before = asked();
        let (answer, slot) = Answer::new();
        slot.complete(1);
        assert_eq!((answer.wait(), asked()), (1, before));
        let (mut answer, slot) = Answer::looked_for(Duration::from_micros(1));
        assert_eq!(answer.wait_until(Instant::now() + Duration::from_millis(20)), None);
        assert_eq!(asked(), before + 1);
        let core = std::thread::spawn(move || slot.complete(2));
        assert_eq!((answer.wait(), asked()), (2, before + 2));
        core.join().expect("no panic");
    }

    /// It would block for ever.
    #[test]
    #[should_panic(expected = "not waited for after it was ready")]
    fn an_answer_that_was_given_is_not_waited_for() {
        let (mut answer, slot) = Answer::new();
        slot.complete(1);
        let polled = Pin::new(&mut answer).poll(&mut Context::from_waker(Waker::noop()));
        assert_eq!(polled, Poll::Ready(1));
        let _ = answer.wait();
    }
}
