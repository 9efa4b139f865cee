//! The way into the core: a bounded queue that any thread may push to, command by command or group by group, and the core polls
//! every turn.
//!
//! It is bounded by number and by bytes, since nothing is taken from it while the core holds as much as it may.
//!
//! A push wakes nobody unless the core is parked; then it signals once (`runtime::Wakeup`). The queue carries
//! commands and the address that their outcomes go to; it knows nothing of the log.

use crate::error::{ProposeError, Refusal, Refused, StopCause};
use crate::group::Group;
use crate::proposals::COMMAND_OVERHEAD_BYTES;
use crate::reads::{ReadQueue, ReadRequest};
use crate::requests::{Request, Requests};
use crate::tickets::{Deliveries, Ticket};
use bytes::Bytes;
use crossbeam_queue::ArrayQueue;
use std::collections::VecDeque;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

/// A command on its way into the core.
pub(crate) struct Submission {
    pub(crate) command: Bytes,
    pub(crate) session: Option<(u64, u64)>,
    pub(crate) ticket: Ticket,
}

impl Submission {
    /// What it counts for against bounds in bytes.
    pub(crate) fn cost(&self) -> usize {
        self.command.len() + COMMAND_OVERHEAD_BYTES
    }
}

/// What the queue carries.
pub(crate) enum Arrival {
    Command(Submission),
    Group(Group),
}

impl Arrival {
    pub(crate) fn queued(&self) -> Queued {
        match self {
            Self::Command(submission) => Queued::of(1, submission.cost()),
            Self::Group(group) => Queued::of(group.left(), group.cost()),
        }
    }

    /// Tells whoever waits that it was refused.
    fn refuse(self, reason: Refusal) {
        match self {
            Self::Command(Submission { command, ticket, .. }) => {
                let refused = Refused { reason, command };
                let mut deliveries = Deliveries::default();
                deliveries.push(ticket, Err(ProposeError::Refused(refused)));
                deliveries.flush();
            }
            Self::Group(mut group) => group.refuse(&reason),
        }
    }
}

/// A number of commands and their bytes, in one word: so both are counted at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Queued(u64);

impl Queued {
    /// The most of bytes by far: `Config` bounds them by 16 GiB.
    const BYTES_BITS: u32 = 36;

    fn of(commands: usize, bytes: usize) -> Self {
        Self((commands as u64) << Self::BYTES_BITS | bytes as u64)
    }

    fn commands(self) -> usize {
        (self.0 >> Self::BYTES_BITS) as usize
    }

    fn bytes(self) -> usize {
        (self.0 & ((1 << Self::BYTES_BITS) - 1)) as usize
    }

    /// Both together.
    pub(crate) fn add(&mut self, more: Self) {
        self.0 += more.0;
    }
}

/// What handles and the core share.
pub(crate) struct Ingress {
    queue: ArrayQueue<Arrival>,
    /// What is in the queue, or about to be: a [`Queued`].
    queued: AtomicU64,
    commands_max: usize,
    bytes_max: usize,
    /// Set when the core takes no more: whoever pushed in the meantime is answered by `drain_stopped`.
    stopped: OnceLock<StopCause>,
    shutdown: AtomicBool,
    requests: Requests,
    reads: ReadQueue,
}

impl Ingress {
    pub(crate) fn new(commands_max: usize, bytes_max: usize, reads_max: usize) -> Self {
        Self {
            queue: ArrayQueue::new(commands_max),
            queued: AtomicU64::new(0),
            commands_max,
            bytes_max,
            stopped: OnceLock::new(),
            shutdown: AtomicBool::new(false),
            requests: Requests::default(),
            reads: ReadQueue::new(reads_max),
        }
    }

    /// Queues `arrival`; hands it back when the queue is full, by number or by bytes. One is always queued, however large.
    pub(crate) fn push(&self, arrival: Arrival) -> Result<(), Arrival> {
        let more = arrival.queued();
        // Counted before it is there, so that it is never taken before it is counted.
        let before = Queued(self.queued.fetch_add(more.0, Ordering::Relaxed));
        let fits = before == Queued::default()
            || before.commands() + more.commands() <= self.commands_max
                && before.bytes() + more.bytes() <= self.bytes_max;
        let pushed = if fits { self.queue.push(arrival) } else { Err(arrival) };
        if let Err(arrival) = pushed {
            self.queued.fetch_sub(more.0, Ordering::Relaxed);
            return Err(arrival);
        }
        // A core that stopped between the caller's check and the push never looks again. The fence, with the one in
        // `stop`, lets at least one of the two see the other; and with the one in `Wakeup::begin_turn`, that of who signals next.
        fence(Ordering::SeqCst);
        if let Some(cause) = self.stopped.get() {
            self.drain_stopped(cause);
        }
        Ok(())
    }

    /// What comes next. It counts as queued until [`Ingress::taken`]. Costs two loads when there is none: an empty queue's own
    /// `pop` is a fence, and whoever needs one, because it is about to park or stop, has its own.
    pub(crate) fn pop(&self) -> Option<Arrival> {
        if self.queue.is_empty() { None } else { self.queue.pop() }
    }

    /// Whether commands wait.
    pub(crate) fn has_commands(&self) -> bool {
        !self.queue.is_empty()
    }

    /// So much has been popped: told once for all of a turn.
    pub(crate) fn taken(&self, taken: Queued) {
        if taken != Queued::default() {
            self.queued.fetch_sub(taken.0, Ordering::Relaxed);
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
        while let Some(arrival) = self.queue.pop() {
            self.queued.fetch_sub(arrival.queued().0, Ordering::Relaxed);
            arrival.refuse(Refusal::Stopped(cause.clone()));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::StopError;
    use crate::group::{Commands, Target};
    use crate::handle::{Completion, PipelineShared, ProposalSlot};
    use std::sync::Arc;
    use std::time::Duration;

    fn group(pipeline: &Arc<PipelineShared>, commands: usize, bytes: usize) -> Arrival {
        let mut together = Commands::default();
        (0..commands).for_each(|tag| together.push(tag as u64, &vec![7; bytes]));
        Arrival::Group(Group::new(Target::Pipeline(Arc::clone(pipeline)), together))
    }

    fn command(bytes: usize) -> Arrival {
        let ticket = Ticket::Proposal(Arc::new(ProposalSlot::default()));
        Arrival::Command(Submission { command: vec![7; bytes].into(), session: None, ticket })
    }

    #[test]
    fn the_commands_of_groups_count_one_by_one_against_the_bounds() {
        let pipeline = Arc::new(PipelineShared::default());
        let by_number = Ingress::new(10, 1 << 30, 1);
        assert!(by_number.push(group(&pipeline, 6, 1)).is_ok());
        assert!(by_number.push(group(&pipeline, 5, 1)).is_err());
        assert!(by_number.push(group(&pipeline, 3, 1)).is_ok());
        assert!(by_number.push(command(1)).is_ok());
        assert!(by_number.push(command(1)).is_err());
        let taken = by_number.pop().map(|arrival| arrival.queued()).expect("the first group");
        assert!(by_number.push(group(&pipeline, 5, 1)).is_err(), "until it is told");
        by_number.taken(taken);
        assert!(by_number.push(group(&pipeline, 6, 1)).is_ok());

        let by_bytes = Ingress::new(1000, 10_000, 1);
        assert!(by_bytes.push(group(&pipeline, 100, 200)).is_ok(), "one always");
        assert!(by_bytes.push(command(0)).is_err());
        by_bytes.taken(by_bytes.pop().map(|arrival| arrival.queued()).expect("the group"));
        assert!(by_bytes.push(group(&pipeline, 10, 900)).is_ok());
        assert!(by_bytes.push(command(1000)).is_err());
        assert!(by_bytes.push(command(10_000 - 10 * 964 - COMMAND_OVERHEAD_BYTES)).is_ok());
        assert!(by_bytes.push(command(0)).is_err());
    }

    #[test]
    fn a_stop_refuses_every_command_of_a_group_before_and_after_it() {
        let pipeline = Arc::new(PipelineShared::default());
        let ingress = Ingress::new(10, 1 << 20, 1);
        assert!(ingress.push(group(&pipeline, 3, 5)).is_ok());
        ingress.stop(StopError::Requested.into());
        assert!(ingress.push(group(&pipeline, 2, 5)).is_ok());
        let mut completions = Vec::new();
        pipeline.wait(&mut completions, Duration::ZERO, Duration::ZERO);
        let tags: Vec<u64> = completions.iter().map(|done| done.tag).collect();
        assert_eq!(tags, [0, 1, 2, 0, 1]);
        for Completion { outcome, .. } in completions {
            let Err(ProposeError::Refused(refused)) = outcome else { panic!("{outcome:?}") };
            assert!(matches!(refused.reason, Refusal::Stopped(_)));
            assert_eq!(refused.command, [7; 5][..]);
        }
        assert_eq!(ingress.queued.load(Ordering::Relaxed), 0);
    }
}
