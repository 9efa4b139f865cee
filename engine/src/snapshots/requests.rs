//! Asking for a snapshot by hand: from any thread, answered by the core.

use crate::error::StopCause;
use ringraft_block::{LogIndex, Term};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// A snapshot that is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotTaken {
    /// The last index that it covers.
    pub last: LogIndex,
    /// The term of that entry.
    pub term: Term,
    /// What it takes on the disk.
    pub bytes: u64,
}

/// Why no snapshot was taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// The state machine makes none: implement [`StateMachine::snapshot`](crate::StateMachine::snapshot).
    #[error("this state machine makes no snapshots")]
    Unsupported,
    /// The disk, or the machine, failed; nothing else was affected. May be asked for again.
    #[error("no snapshot was taken: {0}")]
    Failed(String),
    /// The node has stopped.
    #[error("the node has stopped: {0}")]
    Stopped(StopCause),
}

type Answer = Result<SnapshotTaken, SnapshotError>;

#[derive(Default)]
struct State {
    answer: Option<Answer>,
    waker: Option<Waker>,
}

#[derive(Default)]
struct Slot {
    state: Mutex<State>,
    answered: Condvar,
}

/// A snapshot that was asked for. Dropping it does not take the request back.
pub struct SnapshotRequest {
    slot: Arc<Slot>,
}

/// The core's end of a [`SnapshotRequest`].
pub(crate) struct Ticket(Arc<Slot>);

impl Ticket {
    pub(crate) fn complete(self, answer: Answer) {
        let waker = {
            let mut state = lock(&self.0.state);
            state.answer.get_or_insert(answer);
            state.waker.take()
        };
        self.0.answered.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl SnapshotRequest {
    /// Blocks until the answer is there: for ever when a poll has taken it.
    ///
    /// # Errors
    /// When there will be none.
    pub fn wait(self) -> Answer {
        let mut state = lock(&self.slot.state);
        loop {
            if let Some(answer) = state.answer.take() {
                return answer;
            }
            state = self.slot.answered.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Future for SnapshotRequest {
    type Output = Answer;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Answer> {
        let mut state = lock(&self.slot.state);
        match state.answer.take() {
            Some(answer) => Poll::Ready(answer),
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Requests on their way into the core.
#[derive(Default)]
pub(crate) struct Requests {
    any: AtomicBool,
    queue: Mutex<(Vec<Ticket>, Option<StopCause>)>,
}

impl Requests {
    pub(crate) fn ask(&self) -> SnapshotRequest {
        let slot = Arc::new(Slot::default());
        let ticket = Ticket(Arc::clone(&slot));
        let mut queue = lock(&self.queue);
        match queue.1.clone() {
            Some(cause) => ticket.complete(Err(SnapshotError::Stopped(cause))),
            None => {
                queue.0.push(ticket);
                self.any.store(true, Ordering::Release);
            }
        }
        SnapshotRequest { slot }
    }

    /// Moves what has been asked to `into`. Costs a load when there is nothing.
    pub(crate) fn drain(&self, into: &mut Vec<Ticket>) {
        if self.any.load(Ordering::Relaxed) && self.any.swap(false, Ordering::AcqRel) {
            into.append(&mut lock(&self.queue).0);
        }
    }

    /// Whatever was asked, or is asked from now on, is refused.
    pub(crate) fn stop(&self, cause: &StopCause) {
        let waiting = {
            let mut queue = lock(&self.queue);
            queue.1.get_or_insert_with(|| cause.clone());
            std::mem::take(&mut queue.0)
        };
        // Whoever is answered may ask again at once: not under the lock.
        for ticket in waiting {
            ticket.complete(Err(SnapshotError::Stopped(cause.clone())));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
