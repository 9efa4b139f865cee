//! The driver and reads: taken from the queue, put to the core together, answered when enough is applied.
//!
//! All reads of one turn that want the same go to the core under one id. When the core says at which index they can be
//! read, they wait for apply to get there; then they are answered, queries by the state machine. Barriers share an entry
//! of the log in the same way. Whatever waits has a deadline.
//!
//! While the machine's state is missing or being replaced, what counts as applied is a number with nothing behind it: then
//! reads wait, but for those that ask for what is here now, which are refused.
//!
//! The clock of a turn was read before the requests were taken in it, and the process may have been stopped in
//! between. So what a clock decides is decided in a later turn: the lease by the core, the age of what is read here.

use super::{Driver, Life};
use crate::error::{ReadError, StopCause, StopError};
use crate::mutants::{self, Mutant};
use crate::raft::{Event, Raft, ReadKind, ReadRefusal, Role};
use crate::reads::{Consistency, ReadRequest, ReadTicket, Wanted};
use crate::state_machine::StateMachine;
use ringraft_block::LogIndex;
use ringraft_net::link::Link;
use ringraft_wal::disk::Disk;
use ringraft_wal::format::BatchKind;
use std::collections::BTreeMap;
use std::time::Duration;

/// Reads answered in one turn at the most, so that a flood of queries does not starve heartbeats.
const ANSWERS_PER_TURN: usize = 1024;
/// Deadlines are looked at this often.
const DEADLINE_GRAIN_NS: u64 = 5_000_000;

/// The reads that wait.
pub(super) struct Reads {
    /// The last id used.
    id: u64,
    /// Put to the core.
    asked: BTreeMap<u64, (ReadKind, Vec<Waiting>)>,
    /// For everything up to there to be applied.
    applying: BTreeMap<LogIndex, Vec<Waiting>>,
    /// For everything up to there to be committed.
    committing: BTreeMap<LogIndex, Vec<Waiting>>,
    /// For the age of what is applied here to be looked at.
    stale: Vec<(StaleBound, Waiting)>,
    /// For a barrier to be sealed.
    queued: Vec<Waiting>,
    /// For the barrier at that index, sealed in the present term of office.
    barrier: Option<(LogIndex, Vec<Waiting>)>,
    count: usize,
    /// No deadline comes before.
    next_deadline_ns: u64,
}

struct Waiting {
    deadline_ns: u64,
    ticket: ReadTicket,
}

#[derive(Clone, Copy)]
struct StaleBound {
    taken_ns: u64,
    age_max: Duration,
    lag_max: u64,
}

impl Reads {
    pub(super) fn new() -> Self {
        Self {
            id: 0,
            asked: BTreeMap::new(),
            applying: BTreeMap::new(),
            committing: BTreeMap::new(),
            stale: Vec::new(),
            queued: Vec::new(),
            barrier: None,
            count: 0,
            next_deadline_ns: u64::MAX,
        }
    }

    fn refuse(&mut self, waiting: Vec<Waiting>, error: &ReadError) {
        self.count -= waiting.len();
        waiting.into_iter().for_each(|read| read.ticket.refuse(error.clone()));
    }

    fn drain(&mut self) -> Vec<Waiting> {
        let mut all: Vec<Waiting> =
            std::mem::take(&mut self.asked).into_values().flat_map(|(_, reads)| reads).collect();
        all.extend(std::mem::take(&mut self.applying).into_values().flatten());
        all.extend(std::mem::take(&mut self.committing).into_values().flatten());
        all.extend(self.stale.drain(..).map(|(_, read)| read));
        all.append(&mut self.queued);
        all.extend(self.barrier.take().map_or_else(Vec::new, |(_, reads)| reads));
        all
    }

    /// Gives up what has waited too long, and forgets what nobody waits for any more. The ids of what the core need not answer
    /// any more, ascending.
    fn expire(&mut self, now_ns: u64) -> Vec<u64> {
        if now_ns < self.next_deadline_ns {
            return Vec::new();
        }
        let mut expired = Vec::new();
        let mut next = u64::MAX;
        let mut keep = |read: &mut Waiting| {
            let gone = read.deadline_ns <= now_ns || read.ticket.is_abandoned();
            if !gone {
                next = next.min(read.deadline_ns);
            }
            !gone
        };
        let mut sift = |reads: &mut Vec<Waiting>| expired.extend(reads.extract_if(.., |read| !keep(read)));
        self.asked.values_mut().for_each(|(_, reads)| sift(reads));
        self.applying.values_mut().for_each(&mut sift);
        self.committing.values_mut().for_each(&mut sift);
        sift(&mut self.queued);
        if let Some((_, reads)) = &mut self.barrier {
            sift(reads);
        }
        let empty = self.asked.iter().filter(|(_, (_, reads))| reads.is_empty());
        let abandoned: Vec<u64> = empty.map(|(id, _)| *id).collect();
        self.asked.retain(|_, (_, reads)| !reads.is_empty());
        self.applying.retain(|_, reads| !reads.is_empty());
        self.committing.retain(|_, reads| !reads.is_empty());
        for (_, read) in &self.stale {
            next = next.min(read.deadline_ns);
        }
        self.next_deadline_ns = if next == u64::MAX { next } else { next.max(now_ns + DEADLINE_GRAIN_NS) };
        self.refuse(expired, &ReadError::TimedOut);
        abandoned
    }
}

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// Takes reads from the queue and puts them to whoever can tell when they are ready.
    pub(super) fn take_reads(&mut self) -> Result<bool, StopError> {
        if !self.shared.ingress.has_reads() {
            return Ok(false);
        }
        let (mut rounds, mut leased, mut quorum) = (Vec::new(), Vec::new(), Vec::new());
        let mut taken = 0;
        while taken < self.config.reads_max && self.takes_reads() {
            let Some(ReadRequest { wanted, timeout, ticket }) = self.shared.ingress.pop_read() else { break };
            taken += 1;
            if self.closing {
                ticket.refuse(ReadError::Stopped(StopError::Requested.into()));
                continue;
            }
            let timeout = timeout.unwrap_or(self.config.read_timeout).as_nanos();
            let timeout_ns = u64::try_from(timeout).unwrap_or(u64::MAX);
            let deadline_ns = self.now.monotonic_ns.saturating_add(timeout_ns);
            let read = Waiting { deadline_ns, ticket };
            self.reads.count += 1;
            self.reads.next_deadline_ns = self.reads.next_deadline_ns.min(deadline_ns);
            match wanted {
                Wanted::Round => rounds.push(read),
                Wanted::Read(Consistency::Linearizable) => leased.push(read),
                Wanted::Read(Consistency::Quorum) => quorum.push(read),
                Wanted::Read(Consistency::Log) => match self.barrier_refusal() {
                    Some(error) => self.reads.refuse(vec![read], &error),
                    None => self.reads.queued.push(read),
                },
                Wanted::Read(Consistency::Stale { age_max, lag_max }) => {
                    let bound = StaleBound { taken_ns: self.now.monotonic_ns, age_max, lag_max };
                    self.reads.stale.push((bound, read));
                }
                Wanted::Committed(index) => self.reads.committing.entry(index).or_default().push(read),
                Wanted::Applied(index) => self.reads.applying.entry(index).or_default().push(read),
            }
        }
        self.ask_core(ReadKind::Round, rounds)?;
        self.ask_core(ReadKind::Lease, leased)?;
        self.ask_core(ReadKind::Quorum, quorum)?;
        Ok(taken > 0)
    }

    /// Whether there is room for another one.
    pub(super) fn takes_reads(&self) -> bool {
        self.reads.count < self.config.reads_max
    }

    fn ask_core(&mut self, kind: ReadKind, reads: Vec<Waiting>) -> Result<(), StopError> {
        if reads.is_empty() {
            return Ok(());
        }
        if !matches!(self.life, Life::Running(_)) {
            self.reads.refuse(reads, &ReadError::NoLeader);
            return Ok(());
        }
        // The core does not know who is connected.
        let leader = self.raft().and_then(Raft::leader);
        if leader.and_then(|leader| self.peers.get(&leader)).is_some_and(|leader| leader.session.is_none()) {
            self.reads.refuse(reads, &ReadError::LeaderUnreachable);
            return Ok(());
        }
        self.reads.id += 1;
        let id = self.reads.id;
        self.reads.asked.insert(id, (kind, reads));
        self.step(Event::Read { id, kind })
    }

    /// The core has an index for the reads under `id`.
    pub(super) fn read_ready(&mut self, id: u64, index: LogIndex) {
        self.read_worked = true;
        match self.reads.asked.remove(&id) {
            Some((ReadKind::Round, reads)) => {
                self.reads.count -= reads.len();
                let applied = self.applier.applied();
                reads
                    .into_iter()
                    .for_each(|read| read.ticket.complete(index, applied, |_| Default::default()));
            }
            Some((_, reads)) => self.reads.applying.entry(index).or_default().extend(reads),
            None => {}
        }
    }

    /// The core refuses the reads under `id`.
    pub(super) fn read_refused(&mut self, id: u64, reason: ReadRefusal) {
        let Some((_, reads)) = self.reads.asked.remove(&id) else { return };
        let error = match reason {
            ReadRefusal::NotLeader => self.not_leader(),
            ReadRefusal::ConsensusOnly => ReadError::ConsensusOnly,
            ReadRefusal::LeaderChanged | ReadRefusal::Refused => ReadError::LeaderChanged,
            ReadRefusal::SessionLost => ReadError::LeaderUnreachable,
        };
        self.reads.refuse(reads, &error);
    }

    fn not_leader(&self) -> ReadError {
        let leader = self.leader_hint();
        if leader.is_some() { ReadError::NotLeader { leader } } else { ReadError::NoLeader }
    }

    fn barrier_refusal(&self) -> Option<ReadError> {
        let leads = self.raft().is_some_and(|raft| raft.role() == Role::Leader);
        match (leads, self.no_space) {
            _ if self.config.consensus_only => Some(ReadError::ConsensusOnly),
            (false, _) => Some(self.not_leader()),
            (true, true) => Some(ReadError::NoSpace),
            (true, false) => None,
        }
    }

    /// Seals a barrier for all that wait for one, one at a time.
    pub(super) fn seal_barrier(&mut self) -> Result<(), StopError> {
        if self.reads.queued.is_empty() {
            return Ok(());
        }
        let idle = self.reads.barrier.is_none() && self.pending.is_empty() && !self.closing;
        let can = self.raft().is_some_and(Raft::can_accept_proposals) && !self.no_space;
        let position = self.raft().and_then(Raft::next_position);
        let Some((_, index)) = position.filter(|_| idle && can) else {
            return Ok(());
        };
        self.reads.barrier = Some((index, std::mem::take(&mut self.reads.queued)));
        self.propose(BatchKind::Barrier)
    }

    /// This node no longer leads: a barrier may be lost, and what stands at its index may be something else.
    pub(super) fn reads_lose_leadership(&mut self) {
        let mut reads = std::mem::take(&mut self.reads.queued);
        reads.extend(self.reads.barrier.take().map_or_else(Vec::new, |(_, reads)| reads));
        self.reads.refuse(reads, &ReadError::LeaderChanged);
    }

    /// Answers what is ready. True if it answered anything.
    pub(super) fn serve_reads(&mut self) -> Result<bool, StopError> {
        let before = self.reads.count;
        if before == 0 && self.now.monotonic_ns < self.reads.next_deadline_ns {
            return Ok(false);
        }
        self.judge_stale();
        let applied = self.applier.applied();
        let commit = self.raft().map_or(LogIndex(0), Raft::commit);
        if let Some((index, reads)) = self.reads.barrier.take_if(|(index, _)| *index <= applied) {
            // All of them may have been given up meanwhile.
            if !reads.is_empty() {
                self.reads.applying.entry(index).or_default().extend(reads);
            }
        }
        while self.reads.committing.first_key_value().is_some_and(|(index, _)| *index <= commit) {
            let Some((_, reads)) = self.reads.committing.pop_first() else { break };
            self.reads.count -= reads.len();
            reads.into_iter().for_each(|read| read.ticket.complete(commit, applied, |_| Default::default()));
        }
        let mut answered = 0;
        while answered < ANSWERS_PER_TURN && !self.applier.is_suspended() {
            let Some(mut first) = self.reads.applying.first_entry() else { break };
            let index = *first.key();
            if index > applied && !mutants::active(Mutant::FollowerReadWithoutApply) {
                break;
            }
            let reads = first.get_mut();
            let kept = reads.len().saturating_sub(ANSWERS_PER_TURN - answered);
            let batch = reads.split_off(kept);
            if kept == 0 {
                first.remove();
            }
            self.reads.count -= batch.len();
            answered += batch.len();
            let machine = self.applier.machine();
            for read in batch {
                if !read.ticket.is_abandoned() {
                    read.ticket.complete(applied, applied, |query| machine.query(query));
                }
            }
        }
        let abandoned = self.reads.expire(self.now.monotonic_ns);
        if !abandoned.is_empty() {
            self.step(Event::ReadsAbandoned { ids: abandoned })?;
        }
        Ok(self.reads.count < before)
    }

    /// Looks at the age of what is applied here, by a clock that was read after the request came.
    fn judge_stale(&mut self) {
        let now_ns = self.now.monotonic_ns;
        if self.reads.stale.is_empty() {
            return;
        }
        if self.applier.is_suspended() {
            let refused = std::mem::take(&mut self.reads.stale).into_iter().map(|(_, read)| read).collect();
            return self.reads.refuse(refused, &ReadError::Restoring);
        }
        let applied = self.applier.applied();
        let contact = self.raft().and_then(Raft::leader_contact);
        let age = contact.map(|contact| Duration::from_nanos(now_ns.saturating_sub(contact.0)));
        let lag = self.raft().map_or(0, |raft| raft.commit_heard().get().saturating_sub(applied.get()));
        // No more than are answered in this turn: in the next one they are older, or there is nothing to read.
        let judged = self.reads.stale.len().min(ANSWERS_PER_TURN);
        let judged: Vec<_> = self.reads.stale.drain(..judged).collect();
        for (bound, read) in judged {
            if bound.taken_ns >= now_ns {
                self.reads.stale.push((bound, read));
            } else if age.is_some_and(|age| age <= bound.age_max) && lag <= bound.lag_max {
                self.reads.applying.entry(LogIndex(0)).or_default().push(read);
            } else {
                self.reads.refuse(vec![read], &ReadError::TooStale { age, lag });
            }
        }
    }

    /// Whether reads are ready that a turn's bound has left, or that have become so behind [`Self::serve_reads`].
    pub(super) fn has_reads_to_answer(&self) -> bool {
        let applied = self.applier.applied();
        let first = self.reads.applying.first_key_value().filter(|_| !self.applier.is_suspended());
        first.is_some_and(|(index, _)| *index <= applied)
    }

    /// When reads have something to do, if nothing happens before.
    pub(super) fn reads_deadline(&self) -> u64 {
        let stale = self.reads.stale.iter().map(|(bound, _)| bound.taken_ns.saturating_add(1)).min();
        stale.unwrap_or(u64::MAX).min(self.reads.next_deadline_ns)
    }

    /// Refuses everything that waits.
    pub(super) fn stop_reads(&mut self, cause: &StopCause) {
        let waiting = self.reads.drain();
        self.reads.refuse(waiting, &ReadError::Stopped(cause.clone()));
    }
}
