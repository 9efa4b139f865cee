//! Linearizable reads without a write (Raft, section 8; thesis, section 6.4), from both ends.
//!
//! Leader: read asked for → note the commit index → a quorum returns a round that was begun since → ready at that index.
//! All reads that wait share a round: one is asked for at once when none is under way, otherwise when that one has come
//! back. Before an entry of the leader's own term has committed it does not know what is committed, so the index is
//! noted then.
//!
//! Lease: where the replicated configuration allows it, a quorum that returned a round sent at `s` elects nobody
//! else before `s + lease`, so that no round is needed. The moment that decides must not lie before the request: a
//! process may be stopped between reading its clock and taking a request. So a read is decided by the lease only
//! at a later moment than the one at which it was asked for. Nothing has to be looked at again after that: the index is
//! at least all that was committed before the request, and what is applied up to there, or further, was current at some
//! moment between request and answer.
//!
//! Follower: asks the leader under a context that no other request has; reads that arrive meanwhile wait for the
//! next request, since the leader may have noted its index before they were asked for. With another leader, or
//! another session, all of them are refused: a read can always be repeated.

use super::role::RoleState;
use super::{Action, Append, Message, Nanos, Raft, Round};
use crate::mutants::{self, Mutant};
use ringraft_block::{LogIndex, NodeId, Term};

/// What a read has to be sure of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ReadKind {
    /// Only that a quorum still follows this leader now; a follower refuses it. Its index is what the leader knew to
    /// be committed, which a new leader may not know fully.
    Round,
    /// Everything that was committed before the request; a lease will do.
    Lease,
    /// The same, confirmed by a round whatever the clocks say.
    Quorum,
}

/// Why a read came to nothing. It can be asked for again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReadRefusal {
    /// No leader is known; of a [`ReadKind::Round`], this node does not lead.
    NotLeader,
    /// This cluster only elects: there is nothing to read.
    ConsensusOnly,
    /// The leader changed, or lost its office, before the read was ready.
    LeaderChanged,
    /// The session with the leader ended before it answered.
    SessionLost,
    /// The node that was asked does not lead any more, or lets too many reads of this one wait already.
    Refused,
}

/// A follower asks its leader for a read index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadIndex {
    /// The follower's term.
    pub term: Term,
    /// Names the request: never used twice, by no life of the node.
    pub context: u64,
    /// [`ReadKind::Lease`] or [`ReadKind::Quorum`].
    pub kind: ReadKind,
}

/// The answer to a [`ReadIndex`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadIndexReply {
    /// The sender's term.
    pub term: Term,
    /// That of the request.
    pub context: u64,
    /// The read index; none when the receiver of the request refuses it.
    pub index: Option<LogIndex>,
}

/// A leader lets so many requests of one follower wait: an honest one has one, and late copies of earlier ones.
const REQUESTS_PER_PEER_MAX: usize = 16;

/// The reads that wait, and what concerns leases beside the rounds.
#[derive(Clone, Debug)]
pub(super) struct Reads {
    /// Of a leader.
    waiting: Vec<Waiting>,
    /// The last round that was asked for on behalf of reads.
    asked: Round,
    /// Of a follower: what it has asked its leader for.
    outstanding: Option<(u64, Vec<u64>)>,
    /// Of a follower: what is asked for next.
    queued: Vec<(u64, ReadKind)>,
    /// The last context used.
    context: u64,
    /// Requests of followers that are void, to be answered when the event has been handled.
    void: Vec<Origin>,
    /// Until then this node may be bound by what it promised in an earlier life.
    bound_until: Nanos,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    origin: Origin,
    /// Only that a quorum follows.
    round_only: bool,
    /// The lease may decide, at a later moment than this.
    by_lease_after: Option<Nanos>,
    /// The first round that was begun after the request.
    round: Round,
    /// Noted at the request, or once an entry of the own term has committed.
    index: Option<LogIndex>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Local(u64),
    Peer(NodeId, u64),
}

impl Reads {
    /// `seed` is another one for each node and boot, so that contexts of different lives differ.
    pub(super) fn new(seed: u64, bound_until: Nanos) -> Self {
        Self {
            waiting: Vec::new(),
            asked: Round(0),
            outstanding: None,
            queued: Vec::new(),
            void: Vec::new(),
            context: super::Random::new(!seed).next(),
            bound_until,
        }
    }

    fn next_context(&mut self) -> u64 {
        if !mutants::active(Mutant::ReadContextReused) {
            self.context = self.context.wrapping_add(1);
        }
        self.context
    }
}

// The leader.

impl Raft {
    /// A read was asked for here.
    pub(super) fn read(&mut self, id: u64, kind: ReadKind, actions: &mut Vec<Action>) {
        match (&self.role, self.leader) {
            _ if self.config.consensus_only && kind != ReadKind::Round => {
                actions.push(Action::ReadRefused { id, reason: ReadRefusal::ConsensusOnly });
            }
            (RoleState::Leader(_), _) => self.wait_for_round(Origin::Local(id), kind),
            (RoleState::Follower, Some(_)) if kind != ReadKind::Round => {
                self.reads.queued.push((id, kind));
                self.ask_leader(actions);
            }
            _ => actions.push(Action::ReadRefused { id, reason: ReadRefusal::NotLeader }),
        }
    }

    /// Forgets reads that were asked for here. A leader that cannot commit, or a follower whose leader cannot, would keep them
    /// for as long as that lasts. A request that is under way stays so, for whoever comes behind it.
    pub(super) fn abandon_reads(&mut self, ids: &[u64]) {
        let kept = |id: &u64| ids.binary_search(id).is_err();
        self.reads.waiting.retain(|read| !matches!(read.origin, Origin::Local(id) if !kept(&id)));
        self.reads.queued.retain(|(id, _)| kept(id));
        if let Some((_, asked)) = &mut self.reads.outstanding {
            asked.retain(kept);
        }
    }

    /// A follower asks for a read index.
    pub(super) fn handle_read_index(&mut self, from: NodeId, request: ReadIndex, actions: &mut Vec<Action>) {
        let RoleState::Leader(leader) = &self.role else {
            return self.answer_read(Origin::Peer(from, request.context), None, actions);
        };
        if leader.position(from).is_none() || request.kind == ReadKind::Round {
            return self.ignore();
        }
        let origin = Origin::Peer(from, request.context);
        let of_peer = |read: &&Waiting| matches!(read.origin, Origin::Peer(peer, _) if peer == from);
        if request.term != self.hard.term()
            || self.config.consensus_only
            || self.reads.waiting.iter().filter(of_peer).count() >= REQUESTS_PER_PEER_MAX
        {
            return self.answer_read(origin, None, actions);
        }
        self.wait_for_round(origin, request.kind);
    }

    fn wait_for_round(&mut self, origin: Origin, kind: ReadKind) {
        let leased = kind == ReadKind::Lease && self.has_lease();
        let knows = self.has_committed_own_term() || mutants::active(Mutant::ReadIndexBeforeOwnTermCommit);
        let round_only = kind == ReadKind::Round;
        let RoleState::Leader(leader) = &self.role else { return };
        let current = leader.rounds.current();
        let before = mutants::active(Mutant::ReadRoundFromBeforeRequest);
        self.reads.waiting.push(Waiting {
            origin,
            round_only,
            by_lease_after: leased.then_some(self.now),
            // The current one may have left, and come back, before the request.
            round: if before { current } else { Round(current.0.saturating_add(1)) },
            index: (knows || round_only).then_some(self.commit),
        });
    }

    /// Answers the reads that are ready, and asks for a round when others need one and none is under way.
    pub(super) fn serve_reads(&mut self, actions: &mut Vec<Action>) {
        for origin in std::mem::take(&mut self.reads.void) {
            self.answer_read(origin, None, actions);
        }
        while !self.reads.waiting.is_empty() {
            let returned = self.quorum_round().unwrap_or_default();
            let (leased, knows) = (self.has_lease(), self.has_committed_own_term());
            let (now, commit) = (self.now, self.commit);
            let mut ready = Vec::new();
            let mut needs_round = false;
            let asked = self.reads.asked;
            self.reads.waiting.retain_mut(|read| {
                if knows {
                    read.index.get_or_insert(commit);
                }
                if let Some(asked_at) = read.by_lease_after {
                    let later = now > asked_at || mutants::active(Mutant::LeaseKeptThroughPause);
                    if later && leased {
                        // As if it had been confirmed by a round: only its index may still be missing.
                        read.round = Round(0);
                    }
                    if later || !leased {
                        read.by_lease_after = None;
                    }
                }
                let confirmed = returned >= read.round;
                needs_round |= !confirmed && read.by_lease_after.is_none() && read.round > asked;
                match read.index.filter(|_| confirmed) {
                    Some(index) => ready.push((read.origin, index)),
                    None => return true,
                }
                false
            });
            for (origin, index) in ready {
                self.answer_read(origin, Some(index), actions);
            }
            if !needs_round || returned < asked {
                return;
            }
            self.ask_round(actions);
        }
    }

    /// Sends every voter an empty append that is answered at once. Heartbeats go on as if it had not been sent: they
    /// ask about positions at which a lost append shows.
    fn ask_round(&mut self, actions: &mut Vec<Action>) {
        let RoleState::Leader(leader) = &mut self.role else { return };
        let round = leader.rounds.stamp(self.now);
        self.reads.asked = round;
        let mut outbox = self.hard.outbox(actions);
        for progress in &mut leader.peers {
            if !self.configurations.current().is_voter(progress.id()) {
                continue;
            }
            let previous = self.log.batch_end_at(progress.matched()).unwrap_or(self.log.start());
            progress.told(false, self.now);
            let append = Append {
                term: self.hard.term(),
                previous,
                batch: None,
                commit: self.commit,
                round,
                reply_now: true,
                configuration: None,
            };
            outbox.send(progress.id(), Message::Append(append));
        }
    }

    fn answer_read(&mut self, origin: Origin, index: Option<LogIndex>, actions: &mut Vec<Action>) {
        match (origin, index) {
            (Origin::Local(id), Some(index)) => actions.push(Action::ReadReady { id, index }),
            (Origin::Local(id), None) => {
                actions.push(Action::ReadRefused { id, reason: ReadRefusal::LeaderChanged });
            }
            (Origin::Peer(peer, context), index) => {
                let reply = ReadIndexReply { term: self.hard.term(), context, index };
                self.hard.outbox(actions).send(peer, Message::ReadIndexReply(reply));
            }
        }
    }

    /// Whether an entry of its own term has committed: before that, a leader does not know what is committed.
    fn has_committed_own_term(&self) -> bool {
        matches!(&self.role, RoleState::Leader(leader) if leader.first_own.is_some_and(|first| self.commit >= first))
    }

    /// When a read that waits for its lease is decided.
    pub(super) fn reads_deadline(&self) -> Nanos {
        let asked = self.reads.waiting.iter().filter_map(|read| read.by_lease_after);
        asked.min().map_or(Nanos::NEVER, |asked_at| asked_at.plus(Nanos(1)))
    }
}

// Leases.

impl Raft {
    /// Until when nobody else can have been elected, as far as this leader knows; none without a lease. Counted from when
    /// the highest round that a quorum has returned was sent: a follower that hears it sticks to the leader for the
    /// replicated minimum of all election time-outs from then or later.
    #[must_use]
    pub fn lease_end(&self) -> Option<Nanos> {
        let lease = self.configuration().settings().lease?;
        let RoleState::Leader(_) = &self.role else { return None };
        // A member that is told to campaign at once overrides what followers promise, whenever it gets to do so.
        if !self.may_lease() && !mutants::active(Mutant::LeaseKeptThroughTransfer) {
            return None;
        }
        // A contact that no round has shown is that of the election, and a vote promises nothing for later.
        let contact = self.quorum.agreed(|voter| {
            self.of_voter(voter, Some(Nanos::NEVER), |peer| {
                (peer.round() > Round(0)).then_some(peer.contact())
            })
        })?;
        Some(contact.plus(lease.duration()))
    }

    fn has_lease(&self) -> bool {
        self.lease_end().is_some_and(|end| self.now < end)
    }

    /// Whether this node, restarted, may have promised a leader in an earlier life to elect nobody else yet.
    pub(super) fn is_bound_by_lease(&self) -> bool {
        self.now < self.lease_bound() && !mutants::active(Mutant::RestartedVoterVotesWithinLease)
    }

    /// Until when that is so.
    pub(super) fn lease_bound(&self) -> Nanos {
        self.reads.bound_until
    }
}

// The follower.

impl Raft {
    /// Asks for what is queued, unless an answer is awaited.
    fn ask_leader(&mut self, actions: &mut Vec<Action>) {
        let Some(leader) = self.leader else { return };
        // A lease serves only if it serves all.
        let Some(kind) = self.reads.queued.iter().map(|(_, kind)| *kind).max() else { return };
        if self.reads.outstanding.is_some() {
            return;
        }
        let context = self.reads.next_context();
        let ids = self.reads.queued.drain(..).map(|(id, _)| id).collect();
        self.reads.outstanding = Some((context, ids));
        let request = ReadIndex { term: self.hard.term(), context, kind };
        self.hard.outbox(actions).send(leader, Message::ReadIndex(request));
    }

    /// The leader's answer. Whatever term it is of: it was confirmed after the request.
    pub(super) fn handle_read_index_reply(&mut self, reply: ReadIndexReply, actions: &mut Vec<Action>) {
        let Some((_, ids)) = self.reads.outstanding.take_if(|(context, _)| *context == reply.context) else {
            return;
        };
        actions.extend(ids.into_iter().map(|id| match reply.index {
            Some(index) => Action::ReadReady { id, index },
            None => Action::ReadRefused { id, reason: ReadRefusal::Refused },
        }));
        self.ask_leader(actions);
    }

    /// The session with the leader began or ended: an answer may be lost.
    pub(super) fn leaders_session_changed(&mut self, actions: &mut Vec<Action>) {
        self.refuse_asked(ReadRefusal::SessionLost, actions);
    }

    /// The role, the term or the leader changed.
    pub(super) fn refuse_reads(&mut self, actions: &mut Vec<Action>) {
        for read in std::mem::take(&mut self.reads.waiting) {
            match read.origin {
                Origin::Local(_) => self.answer_read(read.origin, None, actions),
                // Not yet: a message would have the term saved before the vote that may follow.
                Origin::Peer(..) => self.reads.void.push(read.origin),
            }
        }
        self.reads.asked = Round(0);
        self.refuse_asked(ReadRefusal::LeaderChanged, actions);
    }

    fn refuse_asked(&mut self, reason: ReadRefusal, actions: &mut Vec<Action>) {
        let outstanding = self.reads.outstanding.take().map_or_else(Vec::new, |(_, ids)| ids);
        let queued = self.reads.queued.drain(..).map(|(id, _)| id);
        actions.extend(outstanding.into_iter().chain(queued).map(|id| Action::ReadRefused { id, reason }));
    }
}

/// What can be asked at any time.
impl Raft {
    /// When this node last knew a leader to be in office: a follower, when it heard it last in this term; a leader, when
    /// a quorum certainly followed it.
    #[must_use]
    pub fn leader_contact(&self) -> Option<Nanos> {
        match &self.role {
            RoleState::Leader(_) => self.quorum_contact().map(|contact| contact.min(self.now)),
            _ => self.leader.and(self.hearing.heard_at),
        }
    }

    /// The highest commit index that this node has heard of: a follower's own one ends where its log is known to be
    /// equal to the leader's.
    #[must_use]
    pub fn commit_heard(&self) -> LogIndex {
        self.commit.max(self.hearing.commit)
    }

    /// Reads that wait here, of this node and of its followers.
    #[must_use]
    pub fn reads_waiting(&self) -> usize {
        let outstanding = self.reads.outstanding.as_ref().map_or(0, |(_, ids)| ids.len());
        self.reads.waiting.len() + outstanding + self.reads.queued.len()
    }
}

// What must hold of the reads of a node (`invariants`).
impl Raft {
    pub(super) fn check_reads(&self) -> Result<(), String> {
        let reads = &self.reads;
        match &self.role {
            RoleState::Leader(leader) => {
                if reads.outstanding.is_some() || !reads.queued.is_empty() {
                    return Err("a leader asks nobody else".to_owned());
                }
                if reads.asked > leader.rounds.current() {
                    return Err(format!("{:?} was asked for and not begun", reads.asked));
                }
                let knows = self.has_committed_own_term();
                for read in &reads.waiting {
                    if read.index.is_some_and(|index| index > self.commit) {
                        return Err(format!("{read:?} is above commit {}", self.commit));
                    }
                    if read.index.is_some() && !knows && !read.round_only {
                        return Err(format!("{read:?}, and nothing of the own term is committed"));
                    }
                    // Whoever waits either needs a round that is under way, or the next one, or waits for its lease.
                    let awaited = read.round <= reads.asked
                        || self.quorum_round().is_some_and(|returned| returned < reads.asked)
                        || read.by_lease_after.is_some()
                        || read.index.is_none();
                    if !awaited {
                        return Err(format!("nothing will answer {read:?}: {:?} was asked for", reads.asked));
                    }
                }
            }
            role => {
                let follows = matches!(role, RoleState::Follower) && self.leader.is_some();
                if !reads.waiting.is_empty() {
                    return Err("only a leader's reads wait for rounds".to_owned());
                }
                if !follows && (reads.outstanding.is_some() || !reads.queued.is_empty()) {
                    return Err("without a leader nothing is asked".to_owned());
                }
                if reads.outstanding.is_none() && !reads.queued.is_empty() {
                    return Err("reads are queued behind nothing".to_owned());
                }
            }
        }
        Ok(())
    }
}
