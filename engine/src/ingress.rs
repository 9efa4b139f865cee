//! The way into the core: a bounded queue that any thread may push to and the core polls every turn.
//!
//! It is bounded by number and by bytes, since nothing is taken from it while the core holds as much as it may.
//!
//! A push wakes nobody unless the core is parked; then it signals once (`runtime::Wakeup`). The queue carries
//! commands and the address that the outcome goes to; it knows nothing of the log.

use crate::error::{ProposeError, StopCause};
use crate::handle::{BatchSlot, Outcome, PipelineShared, ProposalSlot};
use crate::proposals::COMMAND_OVERHEAD_BYTES;
use crate::reads::{ReadQueue, ReadRequest};
use crate::requests::{Request, Requests};
use bytes::Bytes;
use crossbeam_queue::ArrayQueue;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, OnceLock};

/// A command on its way into the core.
pub(crate) struct Submission {
    pub(crate) command: Bytes,
    pub(crate) session: Option<(u64, u64)>,
    pub(crate) ticket: Ticket,
}

/// Where the outcome of a command goes.
pub(crate) enum Ticket {
    /// A [`Proposal`](crate::handle::Proposal) future.
    Proposal(Arc<ProposalSlot>),
    /// One command of a [`ProposalBatch`](crate::handle::ProposalBatch).
    Batch { slot: Arc<BatchSlot>, position: u32 },
    /// A [`Pipeline`](crate::handle::Pipeline), under the tag that its user chose.
    Pipeline { shared: Arc<PipelineShared>, tag: u64 },
    /// A request about sessions, which goes into a batch of its own kind.
    Control(Arc<ProposalSlot>),
}

impl Ticket {
    /// Tells the outcome to whoever waits. For pipelines, completions are gathered by [`Deliveries`] instead.
    fn deliver(self, outcome: Outcome) {
        match self {
            Self::Proposal(slot) | Self::Control(slot) => slot.complete(outcome),
            Self::Batch { slot, position } => slot.complete(position, outcome),
            Self::Pipeline { shared, tag } => shared.complete([(tag, outcome)]),
        }
    }
}

/// Outcomes of one turn, gathered so that each pipeline is locked and woken once per run of its commands.
#[derive(Default)]
pub(crate) struct Deliveries {
    pipeline: Option<Arc<PipelineShared>>,
    run: Vec<(u64, Outcome)>,
}

impl Deliveries {
    pub(crate) fn push(&mut self, ticket: Ticket, outcome: Outcome) {
        match ticket {
            Ticket::Pipeline { shared, tag } => {
                if !self.pipeline.as_ref().is_some_and(|pipeline| Arc::ptr_eq(pipeline, &shared)) {
                    self.flush();
                    self.pipeline = Some(shared);
                }
                self.run.push((tag, outcome));
            }
            ticket => ticket.deliver(outcome),
        }
    }

    pub(crate) fn flush(&mut self) {
        if let Some(pipeline) = self.pipeline.take() {
            pipeline.complete(self.run.drain(..));
        }
    }
}

impl Submission {
    /// What it counts for against bounds in bytes.
    pub(crate) fn cost(&self) -> usize {
        self.command.len() + COMMAND_OVERHEAD_BYTES
    }
}

/// What handles and the core share.
pub(crate) struct Ingress {
    queue: ArrayQueue<Submission>,
    /// What is in the queue, or about to be.
    queued_bytes: AtomicUsize,
    queued_bytes_max: usize,
    /// Set when the core takes no more: whoever pushed in the meantime is answered by `drain_stopped`.
    stopped: OnceLock<StopCause>,
    shutdown: AtomicBool,
    requests: Requests,
    reads: ReadQueue,
}

impl Ingress {
    pub(crate) fn new(capacity: usize, queued_bytes_max: usize, reads_max: usize) -> Self {
        Self {
            queue: ArrayQueue::new(capacity),
            queued_bytes: AtomicUsize::new(0),
            queued_bytes_max,
            stopped: OnceLock::new(),
            shutdown: AtomicBool::new(false),
            requests: Requests::default(),
            reads: ReadQueue::new(reads_max),
        }
    }

    /// Queues `submission`; hands it back when the queue is full, by number or by bytes. One is always queued, however large.
    pub(crate) fn push(&self, submission: Submission) -> Result<(), Submission> {
        let cost = submission.cost();
        // Counted before it is there, so that it is never taken before it is counted.
        let before = self.queued_bytes.fetch_add(cost, Ordering::Relaxed);
        let fits = before == 0 || before.saturating_add(cost) <= self.queued_bytes_max;
        let pushed = if fits { self.queue.push(submission) } else { Err(submission) };
        if let Err(submission) = pushed {
            self.queued_bytes.fetch_sub(cost, Ordering::Relaxed);
            return Err(submission);
        }
        // A core that stopped between the caller's check and the push never looks again. The fence, with the one in
        // `stop`, lets at least one of the two see the other; and with the one in `Wakeup::begin_turn`, that of who signals next.
        fence(Ordering::SeqCst);
        if let Some(cause) = self.stopped.get() {
            self.drain_stopped(cause);
        }
        Ok(())
    }

    /// The next command. It counts as queued until [`Ingress::taken`]. Costs two loads when there is none: an empty queue's own
    /// `pop` is a fence, and whoever needs one, because it is about to park or stop, has its own.
    pub(crate) fn pop(&self) -> Option<Submission> {
        if self.queue.is_empty() { None } else { self.queue.pop() }
    }

    /// Whether commands wait.
    pub(crate) fn has_commands(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Commands that cost so much have been popped: told once for all of a turn.
    pub(crate) fn taken(&self, cost: usize) {
        if cost > 0 {
            self.queued_bytes.fetch_sub(cost, Ordering::Relaxed);
        }
    }

    pub(crate) fn stop_cause(&self) -> Option<&StopCause> {
        self.stopped.get()
    }

    /// Ends the queue: everything in it, and everything that comes later, is refused.
    pub(crate) fn stop(&self, cause: StopCause) {
        let cause = self.stopped.get_or_init(|| cause);
        fence(Ordering::SeqCst);
        self.drain_stopped(cause);
    }

    /// Queues what is asked besides commands and reads; answers it with a refusal when too many wait or the core has stopped.
    pub(crate) fn push_request(&self, request: Request) {
        self.requests.push(request);
        fence(Ordering::SeqCst);
        if let Some(cause) = self.stopped.get() {
            self.drain_stopped(cause);
        }
    }

    pub(crate) fn take_requests(&self) -> VecDeque<Request> {
        self.requests.take()
    }

    fn drain_stopped(&self, cause: &StopCause) {
        self.requests.refuse_all(cause);
        self.reads.refuse_all(cause);
        while let Some(submission) = self.queue.pop() {
            self.queued_bytes.fetch_sub(submission.cost(), Ordering::Relaxed);
            let Submission { command, ticket, .. } = submission;
            let reason = crate::error::Refusal::Stopped(cause.clone());
            ticket.deliver(Err(ProposeError::Refused(crate::error::Refused { reason, command })));
        }
    }

    /// Queues a read; answers it with a refusal when the queue is full or the core has stopped.
    pub(crate) fn push_read(&self, request: ReadRequest) {
        self.reads.push(request);
        fence(Ordering::SeqCst);
        if let Some(cause) = self.stopped.get() {
            self.drain_stopped(cause);
        }
    }

    /// Whether reads wait.
    pub(crate) fn has_reads(&self) -> bool {
        !self.reads.is_empty()
    }

    pub(crate) fn pop_read(&self) -> Option<ReadRequest> {
        self.reads.pop()
    }

    /// Whether anything waits that a handle has asked for, or the end.
    pub(crate) fn has_any(&self) -> bool {
        self.has_commands() || self.has_reads() || self.requests.any() || self.shutdown_requested()
    }

    pub(crate) fn request_shutdown(&self) {
        self.shutdown.store(true, Ordering::Release);
    }

    pub(crate) fn shutdown_requested(&self) -> bool {
        self.shutdown.load(Ordering::Acquire)
    }
}
