//! One answer from the core to whoever asked: a plain future that needs no executor, with a blocking `wait`.

use crate::handle::{lock, register};
use crate::waiting::look;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

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

    /// Blocks until it is there. That of a read the thread may look for a while before it sleeps
    /// ([`IdlePolicy::Adaptive`](crate::runtime::IdlePolicy::Adaptive)).
    ///
    /// # Panics
    /// When it was polled before and was ready: the answer was given then.
    #[must_use]
    pub fn wait(self) -> T {
        look(self.patience, || self.slot.has_come.load(Ordering::Acquire));
        let mut state = lock(&self.slot.state);
        loop {
            if let Some(value) = state.value.take() {
                return value;
            }
            assert!(!state.taken, "an answer is not waited for after it was ready");
            state.blocked = true;
            state = self.slot.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The answer, if it is there: once. Never blocks.
    pub fn try_take(&mut self) -> Option<T> {
        let mut state = lock(&self.slot.state);
        let value = state.value.take();
        state.taken |= value.is_some();
        value
    }
}

impl<T> Future for Answer<T> {
    type Output = T;

    /// # Panics
    /// When polled again after it was ready, or taken.
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let mut state = lock(&self.slot.state);
        if let Some(value) = state.value.take() {
            state.taken = true;
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
    /// For who looks: it has been answered.
    has_come: AtomicBool,
}

struct State<T> {
    value: Option<T>,
    waker: Option<Waker>,
    blocked: bool,
    taken: bool,
}

impl<T> Default for AnswerSlot<T> {
    fn default() -> Self {
        let state = State { value: None, waker: None, blocked: false, taken: false };
        Self { state: Mutex::new(state), done: Condvar::new(), has_come: AtomicBool::new(false) }
    }
}

impl<T> AnswerSlot<T> {
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
    fn a_thread_looks_for_the_answer_to_a_read_and_for_no_other() {
        let before = asked();
        let (answer, slot) = Answer::new();
        slot.complete(1);
        assert_eq!((answer.wait(), asked()), (1, before));
        for is_late in [false, true] {
            let (answer, slot) = Answer::looked_for(Duration::from_secs(3_600));
            let core = std::thread::spawn(move || {
                if is_late {
                    std::thread::sleep(Duration::from_millis(20));
                }
                slot.complete(2);
            });
            assert_eq!(answer.wait(), 2);
            core.join().expect("no panic");
        }
        assert_eq!(asked(), before + 2);
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
