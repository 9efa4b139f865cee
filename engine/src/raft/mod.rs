//! The Raft core: a deterministic state machine over terms, indexes and byte counts.
//!
//! `handle(now, event) -> actions`. The core holds no payload, no clock, no file, no socket and no source of
//! randomness but the seed it is given: the same state and the same input give the same output.
//!
//! It assumes no order between connections: messages may be late, repeated or lost. It also assumes none between
//! completions and what was asked since: saves are numbered, and completions of the log carry its epoch.
//!
//! One verb, one file: `election` decides who leads, `append` replicates and commits, `membership` changes who decides,
//! `repair` says what a node may do that has lost a part of its log, `transfer` hands leadership over, `slow_disk` notices
//! when that is due, `read` answers without a write, `snapshot` takes over where a log no longer reaches. Each piece of state has
//! an owner that keeps its rule: `hard_state` that nothing leaves before term and vote are durable, `durable`
//! that late completions do not count, `progress` what may be sent to a peer, `rounds` who was following when.
//!
//! Numbers in a member's message that cannot be are ignored and counted ([`Status::ignored`]); a message that an
//! honest member cannot have sent to an honest one is a [`Violation`] and stops the node.

mod action;
mod append;
mod change;
mod config;
mod configurations;
mod durable;
mod election;
mod event;
mod hard_state;
pub mod invariants;
mod log_ids;
mod members;
mod membership;
mod progress;
mod quorum;
mod random;
mod read;
mod repair;
mod role;
mod rounds;
#[cfg(test)]
mod simulation;
mod slow_disk;
mod snapshot;
mod transfer;
mod violation;

// The switch of known bugs is the crate's; without the feature the core brings its own, which is constantly off.
use crate::mutants::{self, Mutant};

pub use action::Action;
pub use change::{Change, ChangeError, Changed, MEMBERS_MAX, Plan};
pub use config::{ConfigError, RaftConfig};
pub use event::{Append, AppendAck, AppendOutcome, Event, Message, TimeoutNow, Vote, VoteReply};
pub use log_ids::LogIds;
pub use members::{Configuration, ConfigurationError, LeaseSettings, Member, MemberRole, Settings};
pub use progress::{ProgressView, ReplicationState};
pub use quorum::Quorum;
pub use read::{ReadIndex, ReadIndexReply, ReadKind, ReadRefusal};
pub use repair::{Answer, Claim, Elsewhere, Inquiry, Reach, Restraint, Verdict};
pub use slow_disk::SlowDiskLimits;
pub use transfer::TransferEnd;
pub use violation::Violation;

use configurations::Configurations;
use durable::Durable;
use election::ElectionTimer;
use hard_state::HardState;
use random::Random;
use read::Reads;
use repair::Repair;
use ringraft_block::{LogIndex, NodeId, Term};
use role::{Announced, Hearing, RoleState};

/// A node's part in the protocol. Everything that changes it goes through [`Raft::handle`].
#[derive(Clone, Debug)]
pub struct Raft {
    config: RaftConfig,
    configurations: Configurations,
    /// Of the configuration in force.
    quorum: Quorum,
    /// Whether that names this node, with the incarnation of its directory, as a voter.
    votes: bool,
    random: Random,
    /// The latest moment handed in.
    now: Nanos,
    hard: HardState,
    log: LogIds,
    durable: Durable,
    commit: LogIndex,
    role: RoleState,
    /// Who leads the current term, where known.
    leader: Option<NodeId>,
    announced: Announced,
    hearing: Hearing,
    timer: ElectionTimer,
    repair: Repair,
    reads: Reads,
    /// Until then leadership is not handed over for a slow disk.
    slow_disk_rests_until: Nanos,
    ignored: u64,
    violation: Option<Violation>,
}

/// Terms and indexes above these are nonsense: no cluster counts to them, and below them nothing overflows.
const TERM_MAX: Term = Term(1 << 62);
const INDEX_MAX: LogIndex = LogIndex(1 << 62);

/// What a node knows when it starts: recovered, or formed.
#[derive(Clone, Debug)]
pub struct Boot<I> {
    /// The highest term known: of the hard state, or of the last batch.
    pub term: Term,
    /// The term of the hard state. Where `term` is a later one, of which only the log tells, it is saved before anything is
    /// said in it.
    pub term_saved: Term,
    /// Whom the node voted for in `term`.
    pub vote: Option<NodeId>,
    /// What precedes the first batch: a batch end, and committed.
    pub start: LogId,
    /// The batches of the log, in order, all durable.
    pub batches: I,
    /// The log's epoch from now on.
    pub epoch: Epoch,
    /// What is known to be committed: a batch end, the log's start at least.
    pub commit: LogIndex,
    /// First index of the first batch whose bytes cannot be read, though all else of it is known.
    pub damaged_from: Option<LogIndex>,
    /// More was in the log than is.
    pub claim: Option<Claim>,
    /// Where the configuration in force at `commit` stands in the log: there or before.
    pub configuration_index: LogIndex,
    /// The time.
    pub now: Nanos,
    /// Batches behind `commit` that hold a configuration, in order; none of those that cannot be read.
    pub changes: Vec<(LogIndex, Option<Configuration>)>,
}

/// Why a node cannot start from what it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// The limits contradict each other.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The batches have a gap, or their terms fall.
    #[error("{batch:?} does not follow {last:?}")]
    Gap {
        /// The batch.
        batch: BatchRun,
        /// What it should follow.
        last: LogId,
    },
    /// The log is ahead of the term.
    #[error("the log ends at {last:?}, after term {term}")]
    Term {
        /// The end of the log.
        last: LogId,
        /// The term given.
        term: Term,
    },
    /// The commit index is not a batch end of the log.
    #[error("commit index {commit} is not a batch end of the log")]
    Commit {
        /// The commit index given.
        commit: LogIndex,
    },
    /// The damage does not begin with a batch of the log.
    #[error("no batch of the log begins at {from}, where it is said to be damaged")]
    Damage {
        /// The index given.
        from: LogIndex,
    },
    /// A leader counts on every member to stick to it for as long as the replicated minimum says.
    #[error("the election time-out of {} ns is below the {} ns that leases in this cluster count on", got.0, min.0)]
    LeaseTimeout {
        /// This node's.
        got: Nanos,
        /// The replicated minimum.
        min: Nanos,
    },
    /// No batch of the log holds the configuration, or another one as well.
    #[error(
        "no batch of the log ends at {index}, where it is said to hold a configuration, or they are out of order"
    )]
    Change {
        /// The index given.
        index: LogIndex,
    },
}

/// A node, to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its id.
    pub id: NodeId,
    /// Its role.
    pub role: Role,
    /// Its term.
    pub term: Term,
    /// Its vote in the term.
    pub vote: Option<NodeId>,
    /// The leader it knows.
    pub leader: Option<NodeId>,
    /// What its log starts after.
    pub log_start: LogId,
    /// Where its log ends.
    pub last: LogId,
    /// Up to where its log is durable.
    pub durable: LogIndex,
    /// The epoch of its log.
    pub epoch: Epoch,
    /// Up to where it knows the log to be committed.
    pub commit: LogIndex,
    /// The latest round: of a leader, sent; otherwise, heard in this term.
    pub round: Round,
    /// Messages whose numbers could not be.
    pub ignored: u64,
    /// What a leader knows of the others, by id.
    pub peers: Vec<ProgressView>,
}

impl Raft {
    /// A follower that knows no leader yet. `configuration` is that in force at the commit index of `boot`.
    ///
    /// # Errors
    /// If the limits, or the log, contradict themselves.
    pub fn new(
        config: RaftConfig,
        configuration: Configuration,
        boot: Boot<impl IntoIterator<Item = BatchRun>>,
    ) -> Result<Self, BootError> {
        config.validate()?;
        let mut log = LogIds::new(boot.start);
        for batch in boot.batches {
            if !log.continues_with(&batch) {
                return Err(BootError::Gap { batch, last: log.last() });
            }
            log.push(batch);
        }
        // A claim is durable, and so is the term in it.
        let term = boot.term.max(boot.claim.map_or(Term(0), |claim| claim.term));
        let vote = boot.vote.filter(|_| term == boot.term);
        if log.last().term > boot.term {
            return Err(BootError::Term { last: log.last(), term: boot.term });
        }
        if log.batch_end_at(boot.commit).is_none() {
            return Err(BootError::Commit { commit: boot.commit });
        }
        if let Some(from) = boot.damaged_from.filter(|from| log.batch_starting_at(*from).is_none()) {
            return Err(BootError::Damage { from });
        }
        if boot.configuration_index > boot.commit {
            return Err(BootError::Change { index: boot.configuration_index });
        }
        // What lies before the commit index is not taken back, so that nothing asks for what was in force before that.
        let mut configurations = Configurations::new(boot.configuration_index, configuration);
        for (index, change) in boot.changes {
            let single = log.batch_starting_at(index).is_some_and(|batch| batch.last == index);
            if !single || index <= configurations.index().max(boot.commit) {
                return Err(BootError::Change { index });
            }
            configurations.push(index, change);
        }
        let quorum = Quorum::of(configurations.current());
        let lease = configurations.current().settings().lease;
        let min = lease.map_or(Nanos(0), |lease| lease.election_timeout_min());
        if config.election_timeout < min {
            return Err(BootError::LeaseTimeout { got: config.election_timeout, min });
        }
        // Nothing was promised in term 0, or to others by a node that was a quorum by itself all the time: since before what
        // is committed, that is, for a leader that is not in a committed configuration has left office. One that has become
        // the only voter since may still be counted upon by the leader that made it so.
        let alone = configurations.all(|known| Quorum::of(known).is_only(config.id));
        let forgets = mutants::active(Mutant::LastVoterElectsItselfWithinLease);
        let alone = alone || (forgets && quorum.is_only(config.id));
        let bound = term > Term(0) && !alone;
        let bound_until = if bound { boot.now.plus(min) } else { Nanos(0) };
        let mut raft = Self {
            random: Random::new(config.seed),
            now: boot.now,
            hard: HardState::recovered(term, vote, boot.term <= boot.term_saved),
            durable: Durable::recovered(log.last().index, boot.epoch),
            commit: boot.commit,
            role: RoleState::Follower,
            leader: None,
            announced: Announced { role: Role::Follower, term, leader: None },
            hearing: Hearing::starting_at(boot.commit),
            timer: ElectionTimer { from: boot.now, wait: Nanos(0) },
            repair: Repair::new(boot.damaged_from, boot.claim),
            reads: Reads::new(config.seed, bound_until),
            slow_disk_rests_until: Nanos(0),
            ignored: 0,
            violation: None,
            votes: config.counts_in(configurations.current()),
            config,
            configurations,
            quorum,
            log,
        };
        // A node that was a quorum by itself all the time has nobody to wait for.
        if !alone {
            raft.restart_election_timer();
        }
        Ok(raft)
    }

    /// Takes in what happened and appends what is to be done to `actions`, in that order.
    ///
    /// An event that breaks an invariant yields [`Action::Stop`] alone; later ones yield nothing.
    pub fn handle(&mut self, now: Nanos, event: Event, actions: &mut Vec<Action>) {
        if self.violation.is_some() {
            return;
        }
        let before = (cfg!(debug_assertions) && !mutants::any()).then(|| invariants::State::of(self));
        let earlier_actions = actions.len();
        self.now = self.now.max(now);
        if let RoleState::Leader(leader) = &mut self.role {
            leader.rounds.new_turn();
        }
        match self.dispatch(event, actions) {
            Ok(()) => self.hard.flush(actions),
            Err(violation) => {
                self.violation = Some(violation);
                actions.truncate(earlier_actions);
                actions.push(Action::Stop { violation });
                return;
            }
        }
        if let Some(before) = before {
            let holds = invariants::check(self)
                .and_then(|()| invariants::check_step(&before, &invariants::State::of(self)));
            assert_eq!(holds, Ok(()), "node {}", self.config.id);
        }
    }

    fn dispatch(&mut self, event: Event, actions: &mut Vec<Action>) -> Result<(), Violation> {
        match event {
            Event::Tick => match self.role {
                RoleState::Leader(_) => self.tick_leader(actions),
                _ => self.tick_election(actions),
            },
            Event::Proposed { batch } => self.propose(batch, None, actions)?,
            Event::Received { from, message } if from == self.config.id || message.term() > TERM_MAX => {
                self.ignore();
            }
            Event::Received { from, message } => match message {
                Message::Append(append) => self.handle_append(from, append, actions)?,
                Message::AppendAck(ack) => self.handle_append_ack(from, ack, actions),
                Message::Vote(vote) => self.handle_vote(from, vote, actions),
                Message::VoteReply(reply) => self.handle_vote_reply(from, reply, actions),
                Message::TimeoutNow(message) => self.handle_timeout_now(from, message, actions),
                Message::ReadIndex(request) => self.handle_read_index(from, request, actions),
                Message::ReadIndexReply(reply) => self.handle_read_index_reply(reply, actions),
            },
            Event::Persisted { epoch, last } => self.persisted(epoch, last, actions)?,
            Event::HardStateSaved { sequence } => {
                if !self.hard.completed(sequence) {
                    return Err(Violation::SavedUnknown { sequence, asked: self.hard.asked() });
                }
                self.hard_state_saved(actions);
            }
            Event::PeerConnected { peer } => self.session_changed(peer, true, actions),
            Event::PeerDisconnected { peer } => self.session_changed(peer, false, actions),
            Event::DamageChanged { damaged } => self.damage_changed(damaged, actions)?,
            Event::Adopt { batch, configuration } => self.adopt(batch, configuration, actions)?,
            Event::LeaderHolds { leader, term, last } => self.leader_holds(leader, term, last),
            Event::AllAsked { elsewhere } => self.all_asked(elsewhere),
            Event::NothingBehind { after, elsewhere } => self.nothing_behind(after, elsewhere, actions)?,
            Event::DiskStalled { stalled } => self.stalled(stalled, actions),
            Event::Transfer { to } => self.transfer(to, actions),
            Event::HandoverPutOff => self.handover_put_off(actions),
            Event::Read { id, kind } => self.read(id, kind, actions),
            Event::ReadsAbandoned { ids } => self.abandon_reads(&ids),
            Event::Purged { through } => self.purged(through)?,
            Event::SnapshotReceived { last, configuration, configuration_index } => {
                self.snapshot_received(last, (configuration_index, configuration), actions)?;
            }
            Event::SnapshotEnded { to, installed } => self.snapshot_ended(to, installed, actions),
            Event::StateLost { lost } => self.state_lost(lost, actions),
            Event::Change { ticket, change } => self.change(ticket, &change, actions),
            Event::ProposedConfiguration { batch, configuration } => {
                self.propose_configuration(batch, *configuration, actions)?;
            }
            Event::ConfigurationFound { index, configuration } => {
                self.configuration_found(index, *configuration, actions);
            }
        }
        self.release_if_due(actions);
        self.advance_change(actions);
        self.serve_reads(actions);
        self.send_snapshots(actions);
        self.seal_if_due(actions);
        Ok(())
    }

    /// Counts a message whose numbers cannot be.
    fn ignore(&mut self) {
        self.ignored += 1;
    }
}

/// What can be asked at any time.
impl Raft {
    /// When to hand in the next [`Event::Tick`] at the latest; possibly in the past.
    #[must_use]
    pub fn next_deadline(&self) -> Nanos {
        match self.role {
            _ if self.violation.is_some() => Nanos::NEVER,
            RoleState::Leader(_) => self.leader_deadline(),
            _ if self.may_campaign() || self.leader_may_be_lost() => self.election_deadline(),
            _ => Nanos::NEVER,
        }
    }

    /// Where a batch can be proposed now, and in which term: only while this node leads. Before its empty batch is
    /// proposed, this is the place of that one ([`Action::SealEmpty`]). Nowhere in a cluster that only elects.
    #[must_use]
    pub fn next_position(&self) -> Option<(Term, LogIndex)> {
        let leads = matches!(self.role, RoleState::Leader(_)) && self.violation.is_none();
        (leads && !self.config.consensus_only).then(|| (self.hard.term(), self.log.last().index.next()))
    }

    /// Whether commands can be proposed: this node leads, has appended its empty batch, and is not handing over.
    #[must_use]
    pub fn can_accept_proposals(&self) -> bool {
        self.violation.is_none()
            && matches!(&self.role, RoleState::Leader(leader) if leader.first_own.is_some() && leader.transfer.is_none())
    }

    /// This node.
    #[must_use]
    pub fn id(&self) -> NodeId {
        self.config.id
    }

    /// What it is.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role.role()
    }

    /// Its term.
    #[must_use]
    pub fn term(&self) -> Term {
        self.hard.term()
    }

    /// Whom it voted for in its term.
    #[must_use]
    pub fn vote(&self) -> Option<NodeId> {
        self.hard.vote()
    }

    /// The leader of its term, where known.
    #[must_use]
    pub fn leader(&self) -> Option<NodeId> {
        self.leader
    }

    /// Up to where it knows the log to be committed.
    #[must_use]
    pub fn commit(&self) -> LogIndex {
        self.commit
    }

    /// The end of its log, durable or not.
    #[must_use]
    pub fn last(&self) -> LogId {
        self.log.last()
    }

    /// Up to where its log is durable.
    #[must_use]
    pub fn durable(&self) -> LogIndex {
        self.durable.last()
    }

    /// The epoch of its log.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.durable.epoch()
    }

    /// What precedes the first batch of its log.
    #[must_use]
    pub fn log_start(&self) -> LogId {
        self.log.start()
    }

    /// Where batches end in its log, and which terms sealed them.
    #[must_use]
    pub fn log(&self) -> &LogIds {
        &self.log
    }

    /// The term of the entry at `index`; none outside of the log.
    #[must_use]
    pub fn term_at(&self, index: LogIndex) -> Option<Term> {
        self.log.term_at(index)
    }

    /// The batch whose first index is `index`.
    #[must_use]
    pub fn batch_starting_at(&self, index: LogIndex) -> Option<BatchRun> {
        self.log.batch_starting_at(index)
    }

    /// The batch that holds `index`.
    #[must_use]
    pub fn batch_at(&self, index: LogIndex) -> Option<BatchRun> {
        self.log.batch_at(index)
    }

    /// The members, as the newest configuration of the log names them, committed or not.
    #[must_use]
    pub fn configuration(&self) -> &Configuration {
        self.configurations.current()
    }

    /// Where that stands in the log, which may start behind it; 0 if the cluster was formed with it.
    #[must_use]
    pub fn configuration_index(&self) -> LogIndex {
        self.configurations.index()
    }

    /// The configuration that was in force at `index`, with its place; none before the oldest that is known, and none where
    /// the batch cannot be read.
    #[must_use]
    pub fn configuration_at(&self, index: LogIndex) -> Option<(LogIndex, &Configuration)> {
        self.configurations.at(index)
    }

    /// All configurations that are known with their places, oldest first, that before the log's start included.
    pub fn configurations(&self) -> impl DoubleEndedIterator<Item = (LogIndex, &Configuration)> {
        self.configurations.iter()
    }

    /// Whom a leader sends the log to: the members, and for a while those who have left.
    pub fn replicated_to(&self) -> impl Iterator<Item = NodeId> + '_ {
        let peers = match &self.role {
            RoleState::Leader(leader) => leader.peers.as_slice(),
            _ => &[],
        };
        peers.iter().map(progress::Progress::id)
    }

    /// What a leader knows of `peer`.
    #[must_use]
    pub fn progress(&self, peer: NodeId) -> Option<ProgressView> {
        match &self.role {
            RoleState::Leader(leader) => leader.peer(peer).map(progress::Progress::view),
            _ => None,
        }
    }

    /// The highest round that a quorum has returned to this leader, its own included.
    #[must_use]
    pub fn quorum_round(&self) -> Option<Round> {
        let RoleState::Leader(leader) = &self.role else { return None };
        let own = leader.rounds.current();
        Some(self.quorum.agreed(|voter| self.of_voter(voter, own, |progress| progress.round())))
    }

    /// The latest moment at which a quorum was certainly still following this leader: when the highest round that
    /// a quorum has returned was sent, at the earliest.
    #[must_use]
    pub fn quorum_contact(&self) -> Option<Nanos> {
        matches!(self.role, RoleState::Leader(_)).then(|| {
            self.quorum.agreed(|voter| self.of_voter(voter, Nanos::NEVER, |progress| progress.contact()))
        })
    }

    fn of_voter<T: Default>(&self, voter: NodeId, own: T, of: impl Fn(&progress::Progress) -> T) -> T {
        match &self.role {
            _ if voter == self.config.id => own,
            RoleState::Leader(leader) => leader.peer(voter).map(of).unwrap_or_default(),
            _ => T::default(),
        }
    }

    /// The voters.
    #[must_use]
    pub fn quorum(&self) -> &Quorum {
        &self.quorum
    }

    /// What restrains this node, if anything does.
    #[must_use]
    pub fn restraint(&self) -> Restraint {
        Restraint {
            damaged_from: self.repair.damaged_from(),
            claim: self.repair.claim(),
            vote_bar: self.vote_bar(),
            stalled: self.repair.is_stalled(),
            state_lost: self.repair.is_state_lost(),
            members_unknown: self.configurations.is_unknown(),
        }
    }

    /// [`Restraint::claim`] alone.
    pub(crate) fn claim(&self) -> Option<Claim> {
        self.repair.claim()
    }

    /// [`Restraint::state_lost`] alone.
    pub(crate) fn is_state_lost(&self) -> bool {
        self.repair.is_state_lost()
    }

    /// Why this node has stopped, if it has.
    #[must_use]
    pub fn violation(&self) -> Option<Violation> {
        self.violation
    }

    /// Everything at once, to look at.
    #[must_use]
    pub fn status(&self) -> Status {
        let (round, peers) = match &self.role {
            RoleState::Leader(leader) => {
                (leader.rounds.current(), leader.peers.iter().map(progress::Progress::view).collect())
            }
            _ => (self.hearing.round, Vec::new()),
        };
        Status {
            id: self.config.id,
            role: self.role(),
            term: self.term(),
            vote: self.vote(),
            leader: self.leader,
            log_start: self.log_start(),
            last: self.last(),
            durable: self.durable(),
            epoch: self.epoch(),
            commit: self.commit,
            round,
            ignored: self.ignored,
            peers,
        }
    }
}

/// A moment of the driver's monotonic clock, in nanoseconds from an arbitrary origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Nanos(pub u64);

impl Nanos {
    /// A deadline that does not come.
    pub const NEVER: Self = Self(u64::MAX);

    /// A span of `millis` milliseconds.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis.saturating_mul(1_000_000))
    }

    /// The moment `span` later.
    #[must_use]
    pub const fn plus(self, span: Self) -> Self {
        Self(self.0.saturating_add(span.0))
    }

    /// The span since `earlier`; none if that is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
}

/// Counts a leader's contacts with its followers within a term. A follower returns the highest that it heard,
/// independent of its disk: check-quorum, leases and reads are decided by rounds, durability by matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Round(pub u64);

/// Counts the truncations of a node's log: a completion of an older epoch says nothing about what lies beyond
/// the cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u64);

/// A position in a log and the term of the entry there. `(0, 0)` precedes every log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LogId {
    /// Term of the entry. First, so that the derived order is "at least as up-to-date" (Raft, section 5.4.1).
    pub term: Term,
    /// Position.
    pub index: LogIndex,
}

/// A batch as the core sees it: indexes `first..=last`, all of one term, and the size of its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BatchRun {
    /// Index of its first command.
    pub first: LogIndex,
    /// Index of its last command.
    pub last: LogIndex,
    /// The term that sealed it.
    pub term: Term,
    /// Size of its image.
    pub bytes: u32,
}

impl BatchRun {
    /// The position at its end.
    #[must_use]
    pub fn end(&self) -> LogId {
        LogId { term: self.term, index: self.last }
    }
}

/// What a node is in its current term.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Takes the log from a leader, or waits for one.
    Follower,
    /// Asks whether a campaign could succeed, its term unchanged.
    PreCandidate,
    /// Asks for votes.
    Candidate,
    /// Orders and replicates.
    Leader,
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringraft_block::Incarnation;

    fn three() -> Configuration {
        let members = (1..=3).map(|id| Member {
            id: NodeId(id),
            incarnation: Incarnation(u128::from(id)),
            address: String::new(),
            role: MemberRole::Voter,
        });
        Configuration::new(members.collect()).expect("valid")
    }

    fn run(first: u64, last: u64, term: u64) -> BatchRun {
        BatchRun { first: LogIndex(first), last: LogIndex(last), term: Term(term), bytes: 1 }
    }

    fn boot(term: u64, batches: &[BatchRun], commit: u64) -> Result<Raft, BootError> {
        boot_with(term, term, batches, commit)
    }

    fn boot_with(saved: u64, term: u64, batches: &[BatchRun], commit: u64) -> Result<Raft, BootError> {
        let boot = Boot {
            term: Term(term),
            term_saved: Term(saved),
            vote: None,
            start: LogId { term: Term(2), index: LogIndex(10) },
            batches: batches.to_vec(),
            epoch: Epoch(4),
            commit: LogIndex(commit),
            damaged_from: None,
            claim: None,
            configuration_index: LogIndex(9),
            now: Nanos(5),
            changes: Vec::new(),
        };
        Raft::new(RaftConfig::new(NodeId(1), 7), three(), boot)
    }

    #[test]
    fn what_was_recovered_is_durable_and_known() {
        let raft = boot(3, &[run(11, 12, 2), run(13, 13, 3)], 12).expect("consistent");
        assert_eq!((raft.term(), raft.durable(), raft.commit()), (Term(3), LogIndex(13), LogIndex(12)));
        assert_eq!((raft.epoch(), raft.role(), raft.leader()), (Epoch(4), Role::Follower, None));
        assert_eq!(raft.term_at(LogIndex(10)), Some(Term(2)));
        assert_eq!((raft.configuration_index(), raft.configuration_at(LogIndex(8))), (LogIndex(9), None));
        assert_eq!(raft.batch_starting_at(LogIndex(11)), Some(run(11, 12, 2)));
        assert_eq!((raft.next_position(), raft.can_accept_proposals()), (None, false));
        assert_eq!(invariants::check(&raft), Ok(()));
    }

    #[test]
    fn a_log_that_contradicts_itself_is_refused() {
        assert!(matches!(boot(3, &[run(12, 12, 2)], 10), Err(BootError::Gap { .. })));
        assert!(matches!(boot(3, &[run(11, 11, 1)], 10), Err(BootError::Gap { .. })));
        assert!(matches!(boot(2, &[run(11, 11, 3)], 10), Err(BootError::Term { .. })));
        assert!(matches!(boot(3, &[run(11, 12, 2)], 11), Err(BootError::Commit { .. })));
        assert!(matches!(boot(3, &[run(11, 12, 2)], 9), Err(BootError::Commit { .. })));
    }

    #[test]
    fn a_node_that_would_elect_another_leader_within_a_lease_is_refused() {
        let lease = LeaseSettings { election_timeout_min_ns: 1_000_000_001, drift_ppm: 0 };
        let configuration = three().with_settings(Settings { lease: Some(lease) });
        let boot = Boot {
            term: Term(0),
            term_saved: Term(0),
            vote: None,
            start: LogId::default(),
            batches: [],
            epoch: Epoch(0),
            commit: LogIndex(0),
            damaged_from: None,
            claim: None,
            configuration_index: LogIndex(0),
            now: Nanos(0),
            changes: Vec::new(),
        };
        let refused = Raft::new(RaftConfig::new(NodeId(1), 7), configuration, boot).map(|raft| raft.id());
        let (got, min) = (Nanos::from_millis(1_000), Nanos(1_000_000_001));
        assert_eq!(refused, Err(BootError::LeaseTimeout { got, min }));
    }

    #[test]
    fn a_wait_outlasts_what_others_stick_to_and_is_well_within_two_time_outs_and_priority_delays_it() {
        let draw = |seed, priority| {
            let config = RaftConfig { priority, ..RaftConfig::new(NodeId(1), seed) };
            let (start, commit, batches) = (LogId::default(), LogIndex(0), []);
            let (term, now) = (Term(0), Nanos(0));
            let (damaged_from, claim) = (None, None);
            let (vote, epoch, changes) = (None, Epoch(0), Vec::new());
            let boot = Boot {
                term,
                term_saved: term,
                vote,
                start,
                batches,
                epoch,
                commit,
                damaged_from,
                claim,
                configuration_index: LogIndex(0),
                now,
                changes,
            };
            Raft::new(config, three(), boot).expect("consistent").next_deadline().0 / 1_000_000
        };
        let plain: Vec<u64> = (0..200).map(|seed| draw(seed, None)).collect();
        // A time-out of 1 s and heartbeats of 100 ms.
        assert!(plain.iter().all(|millis| (1_100..1_600).contains(millis)));
        assert!(plain.iter().any(|millis| *millis < 1_150) && plain.iter().any(|millis| *millis > 1_550));
        for seed in 0..200 {
            assert_eq!(draw(seed, Some(255)), draw(seed, None));
            assert!(draw(seed, Some(0)) >= draw(seed, None) + 999);
        }
    }

    #[test]
    fn a_term_that_only_the_log_tells_of_is_saved_before_anything_is_said_in_it() {
        let mut raft = boot_with(2, 3, &[run(11, 12, 2), run(13, 13, 3)], 12).expect("consistent");
        let mut refuse = |event: Option<Event>| {
            let vote = Vote { term: Term(3), last: raft.log_start(), pre: false, transfer: false };
            let asked = Event::Received { from: NodeId(2), message: Message::Vote(vote) };
            let mut actions = Vec::new();
            raft.handle(Nanos(6), event.unwrap_or(asked), &mut actions);
            actions
        };
        let reply = VoteReply { term: Term(3), granted: false, pre: false };
        let (to, message) = (NodeId(2), Message::VoteReply(reply));
        let save = Action::SaveHardState { sequence: 1, term: Term(3), vote: None };
        let after = Action::SendAfterSave { sequence: 1, to, message: message.clone() };
        assert_eq!(refuse(None), [save, after.clone()]);
        assert_eq!(refuse(None), [after], "it is not durable yet");
        assert_eq!(refuse(Some(Event::HardStateSaved { sequence: 1 })), []);
        assert_eq!(refuse(None), [Action::SendNow { to, message }]);
    }

    /// What it promised a leader in its earlier life it has forgotten, and the leader may still read by its lease.
    #[test]
    fn a_voter_that_restarts_elects_nobody_within_a_lease_unless_the_leader_has_given_that_up() {
        const SECOND: u64 = 1_000_000_000;
        let lease = LeaseSettings { election_timeout_min_ns: SECOND, drift_ppm: 0 };
        let start = LogId { term: Term(2), index: LogIndex(10) };
        let asked = |after: u64, pre: bool, transfer: bool| {
            let boot = Boot {
                term: Term(3),
                term_saved: Term(3),
                vote: None,
                start,
                batches: [],
                epoch: Epoch(4),
                commit: start.index,
                damaged_from: None,
                claim: None,
                configuration_index: LogIndex(9),
                now: Nanos(5),
                changes: Vec::new(),
            };
            let configuration = three().with_settings(Settings { lease: Some(lease) });
            let raft = Raft::new(RaftConfig::new(NodeId(1), 7), configuration, boot);
            let mut raft = raft.expect("consistent");
            let vote = Message::Vote(Vote { term: Term(4), last: start, pre, transfer });
            let mut actions = Vec::new();
            raft.handle(Nanos(5 + after), Event::Received { from: NodeId(2), message: vote }, &mut actions);
            let granted = actions.iter().any(|action| {
                let (Action::SendNow { message, .. } | Action::SendAfterSave { message, .. }) = action else {
                    return false;
                };
                matches!(message, Message::VoteReply(VoteReply { granted: true, .. }))
            });
            (granted, raft.term())
        };
        assert_eq!(asked(SECOND - 1, true, false), (false, Term(3)));
        assert_eq!(asked(SECOND - 1, false, false), (false, Term(3)), "nor does it leave its term");
        assert_eq!(asked(SECOND - 1, false, true), (true, Term(4)));
        assert_eq!(asked(SECOND, true, false), (true, Term(3)));
        assert_eq!(asked(SECOND, false, false), (true, Term(4)));
        mutants::set(Some(Mutant::RestartedVoterVotesWithinLease));
        let forgetful = asked(SECOND - 1, false, false);
        mutants::set(None);
        assert_eq!(forgetful, (true, Term(4)), "with the known bug");
    }

    /// A broken driver is told so, too.
    #[test]
    fn events_that_nothing_asked_for_stop_the_node() {
        let stops = |event| {
            let mut raft = boot(3, &[run(11, 12, 2)], 12).expect("consistent");
            let mut actions = Vec::new();
            raft.handle(Nanos(6), event, &mut actions);
            let stopped = matches!(actions[..], [Action::Stop { .. }]) && raft.violation().is_some();
            actions.clear();
            raft.handle(Nanos(u64::MAX), Event::Tick, &mut actions);
            stopped && actions.is_empty() && raft.next_deadline() == Nanos::NEVER
        };
        assert!(stops(Event::Proposed { batch: run(13, 13, 3) }));
        assert!(stops(Event::Persisted { epoch: Epoch(4), last: LogIndex(13) }));
        assert!(stops(Event::Persisted { epoch: Epoch(5), last: LogIndex(12) }));
        assert!(stops(Event::HardStateSaved { sequence: 1 }));
        assert!(!stops(Event::Persisted { epoch: Epoch(3), last: LogIndex(99) }));
    }
}
