//! What a node is, and how it becomes something else.

use super::membership::Changing;
use super::progress::Progress;
use super::rounds::Rounds;
use super::slow_disk::SlowDisk;
use super::transfer::Transfer;
use super::{Action, Nanos, Raft, Role};
use ringraft_block::{LogIndex, NodeId, Term};

/// A role with what only that role knows: leaving it forgets it.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a node has one of it")]
pub(super) enum RoleState {
    Follower,
    PreCandidate(Votes),
    Candidate {
        votes: Votes,
        /// The save that makes the node's own vote durable.
        own_vote: u64,
        /// The leader of the term before asked for it.
        transfer: bool,
    },
    Leader(Leader),
}

impl RoleState {
    pub(super) fn role(&self) -> Role {
        match self {
            Self::Follower => Role::Follower,
            Self::PreCandidate(_) => Role::PreCandidate,
            Self::Candidate { .. } => Role::Candidate,
            Self::Leader(_) => Role::Leader,
        }
    }
}

/// Who said yes, sorted.
#[derive(Clone, Debug, Default)]
pub(super) struct Votes(Vec<NodeId>);

impl Votes {
    pub(super) fn add(&mut self, voter: NodeId) {
        if let Err(at) = self.0.binary_search(&voter) {
            self.0.insert(at, voter);
        }
    }

    pub(super) fn has(&self, voter: NodeId) -> bool {
        self.0.binary_search(&voter).is_ok()
    }
}

/// A leader's view of the others.
#[derive(Clone, Debug)]
pub(super) struct Leader {
    /// Everyone but this node, sorted by id.
    pub(super) peers: Vec<Progress>,
    pub(super) rounds: Rounds,
    /// The first index of this term, once its empty batch is appended.
    pub(super) first_own: Option<LogIndex>,
    pub(super) transfer: Option<Transfer>,
    /// In this term a member was told to campaign.
    pub(super) told_to_campaign: bool,
    pub(super) changing: Box<Changing>,
    pub(super) slow_disk: SlowDisk,
}

impl Leader {
    pub(super) fn peer(&self, id: NodeId) -> Option<&Progress> {
        self.peers.get(self.position(id)?)
    }

    pub(super) fn position(&self, id: NodeId) -> Option<usize> {
        self.peers.binary_search_by_key(&id, Progress::id).ok()
    }
}

/// What was last told by [`Action::Become`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Announced {
    pub(super) role: Role,
    pub(super) term: Term,
    pub(super) leader: Option<NodeId>,
}

impl Raft {
    /// Follows `leader`, or nobody yet, in `term`, which is the current one or a later one.
    pub(super) fn become_follower(&mut self, term: Term, leader: Option<NodeId>, actions: &mut Vec<Action>) {
        let was_follower = matches!(self.role, RoleState::Follower);
        self.abandon_change(actions);
        if term > self.hard.term() {
            self.hard.enter(term);
            self.hearing.new_term(self.commit);
        }
        self.role = RoleState::Follower;
        self.leader = leader;
        if !was_follower {
            self.restart_election_timer();
        }
        self.announce(actions);
    }

    /// Leads the current term, having won it.
    pub(super) fn become_leader(&mut self, actions: &mut Vec<Action>) {
        let last = self.log.last().index;
        let id = self.config.id;
        let others = self.configuration().members().iter().map(|member| member.id);
        // Who has left with the newest configuration may know only the leader before this one, and not that it is committed.
        let left = self.left_last();
        let mut others: Vec<NodeId> =
            others.chain(left.iter().copied()).filter(|other| *other != id).collect();
        others.sort_unstable();
        if !left.is_empty() {
            actions.push(Action::MembersChanged);
        }
        let changing = Changing::begun_with(left, self.configurations.index());
        self.role = RoleState::Leader(Leader {
            peers: others.into_iter().map(|id| Progress::new(id, last, self.now)).collect(),
            rounds: Rounds::new(self.config.election_timeout),
            first_own: None,
            transfer: None,
            told_to_campaign: false,
            changing: Box::new(changing),
            slow_disk: SlowDisk::default(),
        });
        self.leader = Some(id);
        self.announce(actions);
        if !self.config.consensus_only {
            actions.push(Action::SealEmpty);
        }
    }

    /// Tells the role, if it is not the one told last.
    pub(super) fn announce(&mut self, actions: &mut Vec<Action>) {
        let current = Announced { role: self.role.role(), term: self.hard.term(), leader: self.leader };
        if current != self.announced {
            self.announced = current;
            self.refuse_reads(actions);
            let Announced { role, term, leader } = current;
            actions.push(Action::Become { role, term, leader });
        }
    }
}

/// What a follower heard from the leader of the current term.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hearing {
    /// The highest position verified to be equal to the log of this term's leader: a batch end.
    pub(super) matched: LogIndex,
    /// The highest position acknowledged to it in this session; of a leader, what it counts as its own part.
    pub(super) acked: LogIndex,
    /// The highest round heard.
    pub(super) round: super::Round,
    /// When the leader was last heard.
    pub(super) heard_at: Option<Nanos>,
    /// The highest commit index that the leader told.
    pub(super) commit: LogIndex,
}

impl Hearing {
    /// Whoever will lead a new term holds all that is committed (Raft, figure 3: leader completeness).
    pub(super) fn starting_at(commit: LogIndex) -> Self {
        Self {
            matched: commit,
            acked: LogIndex(0),
            round: super::Round(0),
            heard_at: None,
            commit: LogIndex(0),
        }
    }

    pub(super) fn new_term(&mut self, commit: LogIndex) {
        *self = Self::starting_at(commit);
    }
}
