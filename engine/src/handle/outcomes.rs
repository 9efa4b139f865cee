//! Where a core puts what became of commands, and how threads and tasks wait for that.
//!
//! A slot is shared by who waits and by the core. The core puts the outcome there under the slot's lock, and wakes whom it finds
//! there, after the lock: a sleeping thread, or a task. An atomic beside the lock is for threads that look before they sleep.

use super::{Completion, Outcome};
use crate::answer::{Answer, AnswerSlot};
use crate::group::Commands;
use crate::waiting::look;
use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// The outcome of one proposed command. Cancel safe: dropping it abandons the answer, not the command.
#[must_use = "the outcome of a proposal is worth knowing"]
pub struct Proposal(Answer<Outcome>);

/// Where a core puts the outcome of one command.
pub(crate) type ProposalSlot = AnswerSlot<Outcome>;

thread_local! {
    /// Of proposals that this thread has done with, for its next ones: so a thread that waits for its own allocates
    /// hardly any. It may have an outcome before the core has let go of the slot.
    static SPARE_SLOTS: RefCell<Vec<Arc<ProposalSlot>>> = const { RefCell::new(Vec::new()) };
}

/// A thread keeps so many.
const SPARE_SLOTS_MAX: usize = 1024;

impl Proposal {
    /// One to come, which a thread looks for so long before it sleeps.
    pub(super) fn new(patience: Duration) -> Self {
        // A thread that ends has none left.
        let spare = SPARE_SLOTS.try_with(|spare| spare.borrow_mut().pop());
        Self(Answer::of(spare.ok().flatten().unwrap_or_default(), patience))
    }

    /// Where its outcome goes.
    pub(super) fn slot(&self) -> &Arc<ProposalSlot> {
        self.0.slot()
    }

    /// Blocks until the outcome is known.
    ///
    /// # Errors
    /// Those of the proposal.
    ///
    /// # Panics
    /// When it was polled before and was ready: the outcome was told then.
    pub fn wait(mut self) -> Outcome {
        self.wait_blocking()
    }

    pub(crate) fn wait_blocking(&mut self) -> Outcome {
        self.0.wait_blocking()
    }

    /// Blocks until the outcome is known or `deadline` has come.
    pub(crate) fn wait_until(&mut self, deadline: Instant) -> Option<Outcome> {
        self.0.wait_until(deadline)
    }

    /// The outcome, if it is known.
    pub(crate) fn try_outcome(&mut self) -> Option<Outcome> {
        self.0.try_take()
    }
}

impl Drop for Proposal {
    /// Keeps the slot for another proposal, if the core has let go of it.
    fn drop(&mut self) {
        let slot = self.0.slot_mut();
        let Some(unused) = Arc::get_mut(slot) else { return };
        *unused = ProposalSlot::default();
        // When the thread ends it is simply dropped.
        let _ = SPARE_SLOTS.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < SPARE_SLOTS_MAX {
                spare.push(Arc::clone(slot));
            }
        });
    }
}

impl Future for Proposal {
    type Output = Outcome;

    /// # Panics
    /// When polled again after it was ready.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        Pin::new(&mut self.0).poll(context)
    }
}

/// The outcomes of [`Handle::propose_batch`](super::Handle::propose_batch), one per command, in order. Cancel safe: dropping it
/// abandons the answers, not the commands. Outcomes are told all together: after it was ready there are none left, and waited for or polled again, it gives
/// an empty list at once.
#[must_use = "the outcomes of proposals are worth knowing"]
pub struct ProposalBatch {
    pub(super) slot: Arc<BatchSlot>,
    /// For how long a thread looks for the outcomes before it sleeps.
    pub(super) patience: Duration,
}

impl ProposalBatch {
    /// Blocks until all outcomes are known.
    #[must_use]
    pub fn wait(self) -> Vec<Outcome> {
        look(self.patience, || self.slot.have_come.load(Ordering::Acquire));
        let mut state = lock(&self.slot.state);
        while state.missing > 0 {
            state.blocked = true;
            state = self.slot.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.take()
    }
}

impl Future for ProposalBatch {
    type Output = Vec<Outcome>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Vec<Outcome>> {
        let mut state = lock(&self.slot.state);
        if state.missing == 0 {
            return Poll::Ready(state.take());
        }
        register(&mut state.waker, context);
        Poll::Pending
    }
}

pub(crate) fn register(waker: &mut Option<Waker>, context: &Context<'_>) {
    match waker {
        Some(present) if present.will_wake(context.waker()) => {}
        waker => *waker = Some(context.waker().clone()),
    }
}

/// A lock whose holder panicked still holds a consistent value here: every critical section is a few plain
/// assignments.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a core puts the outcomes of a batch.
pub(crate) struct BatchSlot {
    pub(super) state: Mutex<BatchState>,
    /// All have come, for who looks without the lock; under it `state` tells.
    have_come: AtomicBool,
    done: Condvar,
}

pub(super) struct BatchState {
    pub(super) outcomes: Vec<Option<Outcome>>,
    pub(super) missing: usize,
    waker: Option<Waker>,
    blocked: bool,
}

impl BatchState {
    fn take(&mut self) -> Vec<Outcome> {
        std::mem::take(&mut self.outcomes).into_iter().flatten().collect()
    }
}

impl BatchSlot {
    pub(super) fn new(commands: usize) -> Self {
        let outcomes = std::iter::repeat_with(|| None).take(commands).collect();
        Self {
            state: Mutex::new(BatchState { outcomes, missing: commands, waker: None, blocked: false }),
            have_come: AtomicBool::new(commands == 0),
            done: Condvar::new(),
        }
    }

    /// Takes outcomes, whose tags are positions, out of `run`.
    pub(crate) fn complete(&self, run: &mut Vec<Completion>) {
        let (waker, blocked) = {
            let mut state = lock(&self.state);
            for Completion { tag, outcome } in run.drain(..) {
                if let Some(place) = state.outcomes.get_mut(tag as usize)
                    && place.replace(outcome).is_none()
                {
                    state.missing -= 1;
                }
            }
            if state.missing > 0 {
                return;
            }
            self.have_come.store(true, Ordering::Release);
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

/// Where a core puts the outcomes of a pipeline's commands.
#[derive(Default)]
pub(crate) struct PipelineShared {
    state: Mutex<PipelineState>,
    /// There are completions, for who looks without the lock; under it `state` tells.
    pub(super) has_done: AtomicBool,
    arrived: Condvar,
    /// Memory of groups that the core has taken.
    spare: Mutex<Vec<Commands>>,
}

/// A pipeline keeps the memory of so many groups: of those under way at a time there are few, since the core takes a group long
/// before its commands are committed.
const SPARE_GROUPS_MAX: usize = 4;
/// Of a group with more memory than this nothing is kept.
const SPARE_BYTES_MAX: usize = 128 << 10;

#[derive(Default)]
struct PipelineState {
    done: Vec<Completion>,
    waker: Option<Waker>,
    blocked: bool,
}

impl PipelineState {
    fn take(&mut self, out: &mut Vec<Completion>) {
        if out.is_empty() {
            std::mem::swap(&mut self.done, out);
        } else {
            out.append(&mut self.done);
        }
    }
}

impl PipelineShared {
    /// Takes completions out of `run`, and leaves an empty vector, maybe another one.
    pub(crate) fn complete(&self, run: &mut Vec<Completion>) {
        let (waker, blocked) = {
            let mut state = lock(&self.state);
            if state.done.is_empty() {
                std::mem::swap(&mut state.done, run);
            } else {
                state.done.append(run);
            }
            self.has_done.store(!state.done.is_empty(), Ordering::Release);
            (state.waker.take(), std::mem::take(&mut state.blocked))
        };
        if blocked {
            self.arrived.notify_one();
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// An empty group, with memory if there is some.
    pub(super) fn spare(&self) -> Commands {
        lock(&self.spare).pop().unwrap_or_default()
    }

    /// Keeps the memory of a group.
    pub(crate) fn take_back(&self, mut commands: Commands) {
        commands.clear();
        let mut spare = lock(&self.spare);
        if spare.len() < SPARE_GROUPS_MAX && commands.capacity_bytes() <= SPARE_BYTES_MAX {
            spare.push(commands);
        }
    }

    /// True if it has looked for as long as `patience`, in vain.
    pub(crate) fn wait(&self, out: &mut Vec<Completion>, timeout: Duration, patience: Duration) -> bool {
        let started = Instant::now();
        let in_vain = look(patience.min(timeout), || self.has_done.load(Ordering::Acquire));
        let mut state = lock(&self.state);
        while state.done.is_empty() {
            let left = timeout.saturating_sub(started.elapsed());
            if left.is_zero() {
                break;
            }
            state.blocked = true;
            state = self.arrived.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.blocked = false;
        self.collect(&mut state, out);
        in_vain && patience <= timeout
    }

    /// What has arrived.
    pub(super) fn completions(&self, out: &mut Vec<Completion>) {
        self.collect(&mut lock(&self.state), out);
    }

    fn collect(&self, state: &mut PipelineState, out: &mut Vec<Completion>) {
        state.take(out);
        self.has_done.store(false, Ordering::Relaxed);
    }

    pub(super) fn poll(&self, context: &Context<'_>, out: &mut Vec<Completion>) -> Poll<()> {
        let mut state = lock(&self.state);
        if state.done.is_empty() {
            register(&mut state.waker, context);
            return Poll::Pending;
        }
        self.collect(&mut state, out);
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Committed;
    use super::*;
    use crate::waiting::asked;
    use bytes::Bytes;
    use ringraft_block::{LogIndex, Term};

    const PATIENCE: Duration = Duration::from_micros(1);

    fn completion(tag: u64) -> Completion {
        Completion { tag, outcome: Ok(Committed { index: LogIndex(1), term: Term(1), reply: Bytes::new() }) }
    }

    #[test]
    fn the_slot_of_a_proposal_serves_the_next_one_if_the_core_has_let_go_of_it() {
        let outcome = || Ok(Committed { index: LogIndex(1), term: Term(1), reply: Bytes::new() });
        let proposal = Proposal::new(Duration::ZERO);
        let (place, core) = (Arc::as_ptr(proposal.slot()), Arc::clone(proposal.slot()));
        core.complete(outcome());
        drop(proposal);
        let other = Proposal::new(Duration::ZERO);
        assert_ne!(Arc::as_ptr(other.slot()), place, "the core has it still");
        drop((core, other));
        let proposal = Proposal::new(Duration::ZERO);
        let place = Arc::as_ptr(proposal.slot());
        Arc::clone(proposal.slot()).complete(outcome());
        drop(proposal);
        let mut proposal = Proposal::new(Duration::ZERO);
        assert_eq!(Arc::as_ptr(proposal.slot()), place);
        assert!(proposal.try_outcome().is_none(), "it is as new");
        Arc::clone(proposal.slot()).complete(outcome());
        assert!(proposal.wait().is_ok());
    }

    #[test]
    fn who_waits_for_an_outcome_looks_first() {
        let before = asked();
        let mut proposal = Proposal::new(PATIENCE);
        assert!(proposal.wait_until(Instant::now() + Duration::from_millis(200)).is_none());
        assert_eq!(asked() - before, 1);
        proposal.slot().complete(completion(0).outcome);
        assert!(proposal.wait().is_ok());
        assert_eq!(asked() - before, 2);

        let slot = Arc::new(BatchSlot::new(1));
        slot.complete(&mut vec![completion(0)]);
        let before = asked();
        assert_eq!(ProposalBatch { slot, patience: PATIENCE }.wait().len(), 1);
        assert_eq!(ProposalBatch { slot: Arc::new(BatchSlot::new(0)), patience: PATIENCE }.wait().len(), 0);
        assert_eq!(asked() - before, 2);
    }

    #[test]
    fn a_thread_keeps_a_bounded_number_of_slots() {
        let many: Vec<Proposal> = (0..2 * SPARE_SLOTS_MAX).map(|_| Proposal::new(Duration::ZERO)).collect();
        drop(many);
        assert_eq!(SPARE_SLOTS.with(|spare| spare.borrow().len()), SPARE_SLOTS_MAX);
    }
}
