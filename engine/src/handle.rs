//! How a program talks to its node: [`Handle`] from any thread, [`LocalHandle`] on the consensus core, and what
//! they return.
//!
//! The futures are plain: they need no particular executor, and each has a blocking `wait`. Dropping one abandons
//! the answer, not the command.
//!
//! For many commands at a time use a [`Pipeline`]: submissions carry a tag of the caller's, completions are
//! collected in batches, and a run of commands that commit together costs one lock and one wake.

mod outcomes;
mod status;

use crate::answer::Answer;
use crate::config::Config;
pub use crate::driver::{HandedOver, HandoverCause, Transferred};
use crate::error::{ProposeError, Refusal, Refused, TransferError};
use crate::group::{Commands, Group, GroupLimits, Target};
use crate::ingress::{Arrival, Ingress, Submission};
use crate::proposals::LocalIngress;
use crate::requests::Request;
use crate::runtime::{LocalWakeup, Wakeup};
use crate::sessions::{Control, SessionLimits};
pub use crate::snapshots::requests::{SnapshotError, SnapshotTaken};
use crate::tickets::Ticket;
use crate::waiting::Patience;
pub use crate::wire::AckStages;
use bytes::Bytes;
pub(crate) use outcomes::{BatchSlot, PipelineShared, ProposalSlot, lock, register};
pub use outcomes::{Proposal, ProposalBatch};
use ringraft_block::{LogIndex, NodeId, Term};
pub(crate) use status::StatusCell;
pub use status::{DamageStatus, InstallStatus, PeerStatus, SnapshotStatus, Status};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// A command that is committed and was applied on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Its index in the log.
    pub index: LogIndex,
    /// The term in which it was proposed.
    pub term: Term,
    /// What the state machine replied.
    pub reply: Bytes,
}

/// What became of a command.
pub type Outcome = Result<Committed, ProposeError>;

/// What all handles of a node share with its core.
pub(crate) struct Shared {
    pub(crate) ingress: Ingress,
    pub(crate) wakeup: Arc<Wakeup>,
    pub(crate) status: StatusCell,
    pub(crate) command_bytes_max: usize,
    group_limits: GroupLimits,
    pub(crate) session_limits: SessionLimits,
    pub(crate) patience: Patience,
}

impl Shared {
    pub(crate) fn new(config: &Config, wakeup: Arc<Wakeup>) -> Self {
        Self {
            ingress: Ingress::new(config.ingress_capacity, config.uncommitted_bytes_max, config.reads_max),
            wakeup,
            status: StatusCell::new(Status::unstarted(config.node)),
            command_bytes_max: config.command_bytes_max,
            group_limits: GroupLimits::of_queue(config.ingress_capacity, config.uncommitted_bytes_max),
            session_limits: config.session_limits(),
            patience: Patience::new(config.idle),
        }
    }
}

/// Of [`Handle::propose_batch`], commands as large as this are handed over as they are instead of copied into a group.
const GROUPED_BYTES_MAX: usize = 16 << 10;

/// Proposes commands to a node from any thread or executor.
#[derive(Clone)]
pub struct Handle {
    pub(crate) shared: Arc<Shared>,
}

impl Handle {
    /// Proposes `command`. The future resolves when it is durable on a majority and applied here, or with a typed
    /// error.
    pub fn propose(&self, command: impl Into<Bytes>) -> Proposal {
        let proposal = Proposal::new(self.shared.patience.span());
        let ticket = Ticket::Proposal(Arc::clone(proposal.slot()));
        if let Err(refused) = self.submit(command.into(), None, ticket) {
            proposal.slot().complete(Err(refused.into()));
        }
        proposal
    }

    /// Proposes `command` under a sequence of a session, without the bookkeeping of a
    /// [`Session`](crate::sessions::Session).
    pub(crate) fn propose_in_session(&self, session: u64, sequence: u64, command: Bytes) -> Proposal {
        let proposal = Proposal::new(self.shared.patience.span());
        let ticket = Ticket::Proposal(Arc::clone(proposal.slot()));
        if let Err(refused) = self.submit(command, Some((session, sequence)), ticket) {
            proposal.slot().complete(Err(refused.into()));
        }
        proposal
    }

    /// Proposes a request about sessions.
    pub(crate) fn propose_control(&self, control: Control) -> Proposal {
        let proposal = Proposal::new(self.shared.patience.span());
        let ticket = Ticket::Control(Arc::clone(proposal.slot()));
        if let Err(refused) = self.submit(control.encode(), None, ticket) {
            proposal.slot().complete(Err(refused.into()));
        }
        proposal
    }

    /// A proposal that came to nothing at once.
    pub(crate) fn refused_proposal(&self, refused: Refused) -> Proposal {
        let proposal = Proposal::new(self.shared.patience.span());
        proposal.slot().complete(Err(refused.into()));
        proposal
    }

    /// Proposes `commands`, in order. They are neither atomic nor necessarily adjacent in the log; each has its own
    /// outcome. They go to the core by groups, so that many small ones cost little each; some may be refused
    /// ([`Refusal::Busy`]) and others behind them accepted.
    pub fn propose_batch(&self, commands: impl IntoIterator<Item = Bytes>) -> ProposalBatch {
        let commands: Vec<Bytes> = commands.into_iter().collect();
        let slot = Arc::new(BatchSlot::new(commands.len()));
        let target = Target::Batch(Arc::clone(&slot));
        let mut group = Commands::default();
        for (position, command) in (0..).zip(commands) {
            if command.len() < GROUPED_BYTES_MAX.min(self.shared.command_bytes_max + 1) {
                group.push(position, &command);
                if group.is_full(self.shared.group_limits) {
                    self.submit_group(&target, std::mem::take(&mut group));
                }
                continue;
            }
            self.submit_group(&target, std::mem::take(&mut group));
            let ticket = Ticket::Tagged { target: target.clone(), tag: position };
            if let Err(refused) = self.submit(command, None, ticket) {
                target.complete(&mut vec![Completion { tag: position, outcome: Err(refused.into()) }]);
            }
        }
        self.submit_group(&target, group);
        ProposalBatch { slot, patience: self.shared.patience.span() }
    }

    /// A channel for many commands in flight, with their completions collected in batches.
    #[must_use]
    pub fn pipeline(&self) -> Pipeline {
        let (shared, group) = (Arc::default(), Commands::default());
        Pipeline { handle: self.clone(), shared, group, looked_in_vain: false }
    }

    fn submit(&self, command: Bytes, session: Option<(u64, u64)>, ticket: Ticket) -> Result<(), Refused> {
        let reason = if let Some(cause) = self.shared.ingress.stop_cause() {
            Refusal::Stopped(cause.clone())
        } else if command.len() > self.shared.command_bytes_max {
            Refusal::TooLarge { bytes: command.len(), bytes_max: self.shared.command_bytes_max }
        } else {
            let busy = self.push(Arrival::Command(Submission { command, session, ticket }));
            let Err(Arrival::Command(Submission { command, .. })) = busy else { return Ok(()) };
            return Err(Refused { reason: Refusal::Busy, command });
        };
        Err(Refused { reason, command })
    }

    /// Hands a group over. What is refused at once is told to the target.
    fn submit_group(&self, target: &Target, commands: Commands) {
        if commands.is_empty() {
            return;
        }
        let mut group = Group::new(target.clone(), commands);
        let reason = if let Some(cause) = self.shared.ingress.stop_cause() {
            Refusal::Stopped(cause.clone())
        } else {
            let Err(Arrival::Group(busy)) = self.push(Arrival::Group(group)) else { return };
            group = busy;
            Refusal::Busy
        };
        group.refuse(&reason);
        group.give_back();
    }

    fn push(&self, arrival: Arrival) -> Result<(), Arrival> {
        self.shared.ingress.push(arrival)?;
        // The queue has a fence behind what it took.
        self.shared.wakeup.signal_after_fence();
        Ok(())
    }

    /// What the node is and knows now.
    #[must_use]
    pub fn status(&self) -> Status {
        self.shared.status.get()
    }

    /// Waits until `condition` holds of the status, or `timeout` has passed; returns the last status seen and
    /// whether the condition held. Blocks the calling thread.
    pub fn wait_status(&self, timeout: Duration, condition: impl FnMut(&Status) -> bool) -> (Status, bool) {
        self.shared.status.wait(Instant::now().checked_add(timeout), condition)
    }

    /// Asks for a snapshot that covers all that this node has applied by now, at the least. The future resolves when it is
    /// durable; dropping it takes nothing back. The log's start follows by itself.
    ///
    /// # Errors
    /// The answer is an error when the state machine makes none, or when the disk or the machine failed.
    pub fn snapshot(&self) -> Answer<Result<SnapshotTaken, SnapshotError>> {
        let (answer, slot) = Answer::new();
        self.shared.ingress.push_request(Request::Snapshot { slot });
        self.shared.wakeup.signal();
        answer
    }

    /// Hands leadership to `to`, or to the voter that holds the most of the log. Meanwhile commands are refused with
    /// [`Refusal::Transferring`]; those admitted before are committed first. If the member has not taken over within
    /// an election time-out, or its connection is lost, this node leads on and the answer says why. To ask for the
    /// node that leads already is answered at once.
    ///
    /// # Errors
    /// The answer is an error when this node does not lead, when `to` cannot lead, when it did not take over, or when
    /// another member won the election.
    pub fn transfer_leadership(&self, to: Option<NodeId>) -> Answer<Result<Transferred, TransferError>> {
        let (answer, slot) = Answer::new();
        self.shared.ingress.push_request(Request::Transfer { to, slot });
        self.shared.wakeup.signal();
        answer
    }

    /// Asks the node to stop in good order: it takes no more commands, hands leadership over if it leads and another voter
    /// is there to take it (for at most two election time-outs), finishes its writes and closes. Returns at
    /// once; [`Node::join`](crate::Node::join) waits.
    pub fn shutdown(&self) {
        self.shared.ingress.request_shutdown();
        self.shared.wakeup.signal();
    }
}

/// Proposes commands from tasks on the consensus core itself, without a queue: a command is copied straight into
/// the open batch. Not `Send`.
#[derive(Clone)]
pub struct LocalHandle {
    pub(crate) ingress: Rc<dyn LocalIngress>,
    pub(crate) wakeup: LocalWakeup,
    pub(crate) shared: Arc<Shared>,
}

impl LocalHandle {
    /// As [`Handle::propose`]. `command` is copied.
    pub fn propose(&self, command: &[u8]) -> Proposal {
        let proposal = Proposal::new(self.shared.patience.span());
        if let Err(refused) = self.submit(command, None, Ticket::Proposal(Arc::clone(proposal.slot()))) {
            proposal.slot().complete(Err(refused.into()));
        }
        proposal
    }

    /// As [`Handle::pipeline`].
    #[must_use]
    pub fn pipeline(&self) -> LocalPipeline {
        LocalPipeline { handle: self.clone(), shared: Arc::new(PipelineShared::default()) }
    }

    /// A handle to the same node for all threads, which goes through the queue; for [sessions](crate::sessions).
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle { shared: Arc::clone(&self.shared) }
    }

    /// What the node is and knows now.
    #[must_use]
    pub fn status(&self) -> Status {
        self.shared.status.get()
    }

    fn submit(&self, command: &[u8], session: Option<(u64, u64)>, ticket: Ticket) -> Result<(), Refused> {
        let submitted = self.ingress.submit(command, session, ticket);
        self.wakeup.wake();
        submitted.map_err(|reason| Refused { reason, command: Bytes::copy_from_slice(command) })
    }
}

/// One command of a [`Pipeline`], completed.
#[derive(Clone, Debug)]
pub struct Completion {
    /// The tag it was submitted under.
    pub tag: u64,
    /// What became of it.
    pub outcome: Outcome,
}

/// Commands in flight from one thread, completions in batches. See [`Handle::pipeline`].
///
/// A command is [submitted](Pipeline::submit) by itself, at once; or [enqueued](Pipeline::enqueue), to go to the core together
/// with others. Whoever has many small commands at a time enqueues them: what a group pays on its way into the core is otherwise
/// paid by each.
///
/// ```no_run
/// # use ringraft::handle::{Completion, Handle};
/// # use std::time::Duration;
/// # fn example(handle: &Handle) {
/// let mut pipeline = handle.pipeline();
/// for tag in 0..1000 {
///     pipeline.enqueue(tag, b"a command");
/// }
/// let mut completions = Vec::new();
/// let mut left = 1000;
/// while left > 0 {
///     pipeline.wait(&mut completions, Duration::MAX);
///     for Completion { tag, outcome } in completions.drain(..) {
///         left -= 1;
///         println!("{tag}: {outcome:?}");
///     }
/// }
/// # }
/// ```
///
/// Dropping it abandons completions that were not collected, not the commands: those enqueued are handed over, and all may yet be
/// committed and applied, and nobody is told. Completions that are not collected stay in memory; how many are in flight and how
/// many uncollected is up to its user, who counts them by tags.
pub struct Pipeline {
    handle: Handle,
    shared: Arc<PipelineShared>,
    /// What has been enqueued since the last flush.
    group: Commands,
    /// A wait has looked for completions, in vain: there is no more looking before there are some or another command is on its way,
    /// or a thread that waits again and again would look for ever.
    looked_in_vain: bool,
}

impl Pipeline {
    /// Submits `command` under `tag`, which its completion will carry. What was enqueued goes first.
    ///
    /// # Errors
    /// A refusal that is known at once, with the command; no completion follows.
    pub fn submit(&mut self, tag: u64, command: impl Into<Bytes>) -> Result<(), Refused> {
        self.flush();
        self.looked_in_vain = false;
        self.handle.submit(command.into(), None, Ticket::Tagged { target: self.target(), tag })
    }

    /// As [`Pipeline::submit`], under a sequence of a session. The caller keeps the books: it uses a sequence for
    /// one command only, and acknowledges (see [`Session`](crate::sessions::Session)).
    ///
    /// # Errors
    /// As there.
    pub fn submit_in_session(
        &mut self,
        tag: u64,
        (session, sequence): (u64, u64),
        command: impl Into<Bytes>,
    ) -> Result<(), Refused> {
        self.flush();
        self.looked_in_vain = false;
        let ticket = Ticket::Tagged { target: self.target(), tag };
        self.handle.submit(command.into(), Some((session, sequence)), ticket)
    }

    /// Adds `command` under `tag` to those that go to the core together. They go when they are enough (256 commands or 64 KiB,
    /// less where the queue into the core is small), and with every other call of this pipeline, [`Pipeline::flush`] among
    /// them; until then nothing is done about them.
    ///
    /// `command` is copied. Each command has a completion, even if it is refused at once, as when the queue into the core is
    /// full ([`Refusal::Busy`]): together with those that it would have gone with, while later ones may be accepted, and maybe
    /// before the completions of earlier ones. Whoever needs a command in the log only behind another one waits for that.
    pub fn enqueue(&mut self, tag: u64, command: &[u8]) {
        let bytes_max = self.handle.shared.command_bytes_max;
        if command.len() > bytes_max {
            let reason = Refusal::TooLarge { bytes: command.len(), bytes_max };
            let refused = Refused { reason, command: Bytes::copy_from_slice(command) };
            return self.shared.complete(&mut vec![Completion { tag, outcome: Err(refused.into()) }]);
        }
        self.group.push(tag, command);
        if self.group.is_full(self.handle.shared.group_limits) {
            self.flush();
        }
    }

    /// Hands what was enqueued to the core. Does nothing if nothing was.
    pub fn flush(&mut self) {
        if !self.group.is_empty() {
            self.looked_in_vain = false;
            let group = std::mem::replace(&mut self.group, self.shared.spare());
            self.handle.submit_group(&self.target(), group);
        }
    }

    /// Moves the completions that have arrived to `out`; an empty `out` may be exchanged for another vector. Never blocks.
    pub fn completions(&mut self, out: &mut Vec<Completion>) {
        self.flush();
        self.shared.completions(out);
        self.looked_in_vain &= out.is_empty();
    }

    /// Blocks until there are completions, or until `timeout`, and moves them to `out`. The thread may look for them for a while before
    /// it sleeps ([`IdlePolicy::Adaptive`](crate::runtime::IdlePolicy::Adaptive)).
    pub fn wait(&mut self, out: &mut Vec<Completion>, timeout: Duration) {
        self.flush();
        let patience = if self.looked_in_vain { Duration::ZERO } else { self.handle.shared.patience.span() };
        let in_vain = self.shared.wait(out, timeout, patience);
        self.looked_in_vain = out.is_empty() && (self.looked_in_vain || in_vain);
    }

    /// Waits for completions and moves them to `out`. Cancel safe: what has not been moved stays.
    pub fn poll_completions(&mut self, context: &mut Context<'_>, out: &mut Vec<Completion>) -> Poll<()> {
        self.flush();
        let poll = self.shared.poll(context, out);
        self.looked_in_vain &= poll.is_pending();
        poll
    }

    fn target(&self) -> Target {
        Target::Pipeline(Arc::clone(&self.shared))
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.flush();
    }
}

/// A [`Pipeline`] on the consensus core. See [`LocalHandle::pipeline`].
pub struct LocalPipeline {
    handle: LocalHandle,
    shared: Arc<PipelineShared>,
}

impl LocalPipeline {
    /// As [`Pipeline::submit`]; `command` is copied.
    ///
    /// # Errors
    /// As there.
    pub fn submit(&mut self, tag: u64, command: &[u8]) -> Result<(), Refused> {
        self.handle.submit(command, None, Ticket::Tagged { target: self.target(), tag })
    }

    /// As [`Pipeline::submit_in_session`]; `command` is copied.
    ///
    /// # Errors
    /// As there.
    pub fn submit_in_session(
        &mut self,
        tag: u64,
        (session, sequence): (u64, u64),
        command: &[u8],
    ) -> Result<(), Refused> {
        let ticket = Ticket::Tagged { target: self.target(), tag };
        self.handle.submit(command, Some((session, sequence)), ticket)
    }

    fn target(&self) -> Target {
        Target::Pipeline(Arc::clone(&self.shared))
    }

    /// As [`Pipeline::completions`].
    pub fn completions(&mut self, out: &mut Vec<Completion>) {
        self.shared.completions(out);
    }

    /// As [`Pipeline::poll_completions`].
    pub fn poll_completions(&mut self, context: &mut Context<'_>, out: &mut Vec<Completion>) -> Poll<()> {
        self.shared.poll(context, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::waiting::asked;
    use std::sync::atomic::Ordering;
    use std::task::Waker;

    fn completion(tag: u64) -> Completion {
        Completion { tag, outcome: Ok(Committed { index: LogIndex(1), term: Term(1), reply: Bytes::new() }) }
    }

    #[test]
    fn who_waits_looks_first_and_after_a_look_in_vain_not_before_something_has_happened() {
        let handle = unstarted();
        let mut pipeline = handle.pipeline();
        let shared = Arc::clone(&pipeline.shared);
        let mut completions = Vec::new();
        let mut wait = |pipeline: &mut Pipeline, timeout| {
            let before = asked();
            pipeline.wait(&mut completions, timeout);
            (std::mem::take(&mut completions).len(), asked() - before)
        };
        let long = Duration::from_millis(20);
        assert_eq!(wait(&mut pipeline, Duration::ZERO), (0, 0), "no time to");
        // Until it has been the only one to look, for all the time.
        while !pipeline.looked_in_vain {
            assert_eq!(wait(&mut pipeline, long), (0, 1));
        }
        assert_eq!(wait(&mut pipeline, long), (0, 0), "it has looked");
        shared.complete(&mut vec![completion(2), completion(3)]);
        assert!(shared.has_done.load(Ordering::Relaxed));
        assert_eq!(wait(&mut pipeline, long), (2, 0));
        assert!(!shared.has_done.load(Ordering::Relaxed));
        let collects = |pipeline: &mut Pipeline| {
            pipeline.shared.complete(&mut vec![completion(6)]);
            pipeline.completions(&mut Vec::new());
        };
        let reasons_to: [fn(&mut Pipeline); 4] = [
            |_| {},
            collects,
            |pipeline| pipeline.submit(4, Bytes::new()).unwrap(),
            |pipeline| pipeline.enqueue(5, b""),
        ];
        for reason_to in reasons_to {
            reason_to(&mut pipeline);
            assert_eq!(wait(&mut pipeline, long).1, 1);
            pipeline.looked_in_vain = true;
        }
    }

    fn unstarted() -> Handle {
        let member = crate::config::MemberConfig { id: NodeId(1), address: ([127, 0, 0, 1], 1).into() };
        let config = Config {
            command_bytes_max: 100,
            ingress_capacity: 4196,
            ..Config::new(ringraft_block::ClusterId(1), NodeId(1), vec![member], "")
        };
        Handle { shared: Arc::new(Shared::new(&config, Arc::new(Wakeup::new()))) }
    }

    /// What has come into the core, as tags or numbers of commands.
    fn arrived(handle: &Handle) -> Vec<usize> {
        std::iter::from_fn(|| handle.shared.ingress.pop())
            .map(|arrival| match arrival {
                Arrival::Command(_) => 1,
                Arrival::Group(group) => group.left(),
            })
            .collect()
    }

    #[test]
    fn what_is_enqueued_goes_to_the_core_when_it_is_enough_and_with_every_other_call() {
        let handle = unstarted();
        let mut pipeline = handle.pipeline();
        let mut out = Vec::new();
        (0..258).for_each(|tag| pipeline.enqueue(tag, b"command"));
        assert_eq!(arrived(&handle), [256]);
        pipeline.submit(258, &b"command"[..]).unwrap();
        assert_eq!(arrived(&handle), [2, 1], "in order");
        let calls: [fn(&mut Pipeline, &mut Vec<Completion>); 4] = [
            |pipeline, _| pipeline.flush(),
            |pipeline, out| pipeline.completions(out),
            |pipeline, out| pipeline.wait(out, Duration::ZERO),
            |pipeline, out| {
                let mut context = Context::from_waker(Waker::noop());
                assert!(pipeline.poll_completions(&mut context, out).is_pending());
            },
        ];
        for call in calls {
            pipeline.enqueue(1, b"command");
            assert_eq!(arrived(&handle), []);
            call(&mut pipeline, &mut out);
            assert_eq!(arrived(&handle), [1]);
        }
        pipeline.enqueue(1, b"command");
        drop(pipeline);
        assert_eq!(arrived(&handle), [1]);
        assert!(out.is_empty());
    }

    #[test]
    fn what_is_enqueued_and_refused_completes() {
        let handle = unstarted();
        let mut pipeline = handle.pipeline();
        pipeline.enqueue(1, &[0; 101]);
        (2..4386).for_each(|tag| pipeline.enqueue(tag, b"command"));
        let mut out = Vec::new();
        pipeline.completions(&mut out);
        let reasons = out.iter().map(|done| match &done.outcome {
            Err(ProposeError::Refused(refused)) => (done.tag, refused.reason.clone(), refused.command.len()),
            outcome => panic!("{outcome:?}"),
        });
        let reasons: Vec<_> = reasons.collect();
        assert_eq!(reasons[0], (1, Refusal::TooLarge { bytes: 101, bytes_max: 100 }, 101));
        // The seventeenth group goes beyond the bound of the queue, what is left fits again.
        let busy: Vec<_> = (4098..4354).map(|tag| (tag, Refusal::Busy, 7)).collect();
        assert_eq!(reasons[1..], busy);
        let mut expected = vec![256; 16];
        expected.push(32);
        assert_eq!(arrived(&handle), expected);
    }

    #[test]
    fn the_memory_of_a_group_serves_the_next_one() {
        let handle = unstarted();
        let mut pipeline = handle.pipeline();
        pipeline.enqueue(1, b"command");
        pipeline.flush();
        let Some(Arrival::Group(group)) = handle.shared.ingress.pop() else { panic!("a group") };
        let place = group.next().map(|(_, command)| command.as_ptr());
        group.give_back();
        pipeline.enqueue(2, b"another");
        pipeline.flush();
        pipeline.enqueue(3, b"a third");
        pipeline.flush();
        handle.shared.ingress.pop();
        let Some(Arrival::Group(group)) = handle.shared.ingress.pop() else { panic!("a group") };
        assert_eq!(group.next().map(|(_, command)| command.as_ptr()), place);
    }

    #[test]
    fn a_batch_goes_by_groups_but_for_what_is_large_and_keeps_its_order() {
        let handle = unstarted();
        let mut shared = Arc::try_unwrap(handle.shared).ok().expect("the only one");
        shared.command_bytes_max = 1 << 20;
        let handle = Handle { shared: Arc::new(shared) };
        let sizes = [10, 10, GROUPED_BYTES_MAX, 10, (1 << 20) + 1, 10];
        let batch = handle.propose_batch(sizes.map(|size| vec![0; size].into()));
        assert_eq!(arrived(&handle), [2, 1, 1, 1]);
        let state = lock(&batch.slot.state);
        assert_eq!(state.missing, 5);
        assert!(
            matches!(&state.outcomes[4], Some(Err(ProposeError::Refused(refused))) if matches!(refused.reason, Refusal::TooLarge { .. }))
        );
    }
}
