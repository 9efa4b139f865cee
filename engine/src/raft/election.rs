//! Elections: pre-vote, vote, and what keeps a healthy leader from being disturbed.
//!
//! Time-out → pre-vote, the term unchanged → a quorum would vote → the next term, own vote durable, then votes
//! asked for → a quorum voted → leader. A node that cannot reach a quorum never leaves its term, so it disturbs
//! nobody when it returns.
//!
//! A follower sticks to a leader that it heard within the minimum election time-out: it refuses votes and
//! pre-votes and does not adopt the term of such a request (Raft, section 6; thesis, section 4.2.3). The leader
//! for its part steps down when it has not heard a quorum for as long ([`Raft::quorum_contact`]). Where leases count on
//! that, a node that restarts sticks to whomever it may have heard in its earlier life.

use super::role::{RoleState, Votes};
use super::{Action, LogId, Message, Nanos, Raft, Vote, VoteReply};
use crate::mutants::{self, Mutant};
use ringraft_block::NodeId;

/// When to campaign without a leader.
#[derive(Clone, Copy, Debug)]
pub(super) struct ElectionTimer {
    pub(super) from: Nanos,
    pub(super) wait: Nanos,
}

impl ElectionTimer {
    pub(super) fn deadline(&self) -> Nanos {
        self.from.plus(self.wait)
    }
}

impl Raft {
    /// Whether this node may lead: a voter of a configuration that it knows, whose log lacks nothing.
    ///
    /// Also one that its newest configuration leaves out, until it knows that to be committed: it may be the only one that
    /// has it, and that the others would vote for (thesis, section 4.2.2). It leads without counting itself.
    pub(super) fn may_campaign(&self) -> bool {
        let left_out = || {
            self.configurations.index() > self.commit
                && self.configurations.previous().is_some_and(|previous| self.config.counts_in(previous))
        };
        self.repair.is_whole() && !self.configurations.is_unknown() && (self.votes || left_out())
    }

    /// Where the log of a candidate must end at least; none while this node votes for nobody.
    pub(super) fn vote_bar(&self) -> Option<LogId> {
        self.repair.vote_bar(self.log.last()).filter(|_| !self.configurations.is_unknown())
    }

    /// Whether this node could only notice that its leader is silent, not take its place: its log lacks something, or it is
    /// no voter.
    pub(super) fn leader_may_be_lost(&self) -> bool {
        self.leader.is_some() && !self.may_campaign() && matches!(self.role, RoleState::Follower)
    }

    /// Waits anew, for a newly drawn time.
    pub(super) fn restart_election_timer(&mut self) {
        self.timer = ElectionTimer { from: self.now, wait: self.election_wait() };
    }

    /// Drawn from `[t + h, 1.5 t + h)`, `t` the election time-out and `h` the heartbeat interval.
    ///
    /// Not from `t` on: the other members stick to the leader for `t` from when *they* heard it last, and that may
    /// be a heartbeat later than here. A pre-vote before `t + h` can be refused for that reason alone, and costs
    /// another wait.
    ///
    /// Not up to `2 t`: the spread trades split votes against the time without a leader (Raft, section 9.3 and
    /// figure 16: a range of 5 ms already brought the median down to 287 ms at a time-out of 150 ms; 50 ms of
    /// range, the worst of 1000 trials to 513 ms). What a spread must exceed by far is the time of an election,
    /// a round trip and a flush of some milliseconds. Half of a time-out that is itself "an order of magnitude"
    /// above that (section 5.6) does; the other half would only be waited for.
    fn election_wait(&mut self) -> Nanos {
        let timeout = self.config.election_timeout.0;
        let handicap = match self.config.priority {
            Some(priority) => timeout / 255 * u64::from(u8::MAX - priority),
            None => 0,
        };
        let spread = self.random.below((timeout / 2).max(1));
        Nanos(timeout + self.config.heartbeat_interval.0 + spread + handicap)
    }

    /// When to give the leader up, if it is not heard. A node does not vote for itself either while it may be bound by what
    /// it promised in an earlier life; only its leader, which has given its lease up, can make it campaign before.
    pub(super) fn election_deadline(&self) -> Nanos {
        self.timer.deadline().max(self.lease_bound())
    }

    /// A tick while not leading.
    pub(super) fn tick_election(&mut self, actions: &mut Vec<Action>) {
        if self.now < self.election_deadline() {
            return;
        }
        if self.may_campaign() {
            if mutants::active(Mutant::PreVoteIgnored) {
                return self.campaign(false, actions);
            }
            self.ask_for_pre_votes(actions);
        } else if self.leader_may_be_lost() {
            self.leader = None;
            self.restart_election_timer();
            self.announce(actions);
        }
    }

    /// Asks whether a campaign could succeed. Promises nothing and changes no term.
    fn ask_for_pre_votes(&mut self, actions: &mut Vec<Action>) {
        let mut votes = Votes::default();
        votes.add(self.config.id);
        self.role = RoleState::PreCandidate(votes);
        self.leader = None;
        self.restart_election_timer();
        self.announce(actions);
        if !self.count_pre_votes(actions) {
            self.ask_voters(actions);
        }
    }

    /// Campaigns if a quorum would vote for this node.
    fn count_pre_votes(&mut self, actions: &mut Vec<Action>) -> bool {
        let RoleState::PreCandidate(votes) = &self.role else { return false };
        let won = self.is_elected(|id| votes.has(id));
        if won {
            self.campaign(false, actions);
        }
        won
    }

    /// Enters the next term and asks for votes. The own vote counts when it is durable
    /// ([`Raft::hard_state_saved`]), and the requests leave then. `transfer`: the leader asked for it.
    pub(super) fn campaign(&mut self, transfer: bool, actions: &mut Vec<Action>) {
        self.hard.enter(self.hard.term().next());
        self.hearing.new_term(self.commit);
        self.hard.vote_for(self.config.id);
        self.hard.flush(actions);
        self.role = RoleState::Candidate { votes: Votes::default(), own_vote: self.hard.asked(), transfer };
        self.leader = None;
        self.restart_election_timer();
        self.announce(actions);
        self.ask_voters(actions);
        if mutants::active(Mutant::OwnVoteBeforeDurable) {
            self.count_vote(self.config.id, actions);
        }
    }

    /// Sends the request of the current role to every voter that has not said yes.
    fn ask_voters(&mut self, actions: &mut Vec<Action>) {
        let voters: Vec<NodeId> = self.quorum.voters().collect();
        for voter in voters {
            self.ask_voter(voter, actions);
        }
    }

    /// Sends the request of the current role to `voter`: again, after a new session began.
    pub(super) fn ask_voter(&mut self, voter: NodeId, actions: &mut Vec<Action>) {
        let (term, pre, transfer, votes) = match &self.role {
            RoleState::PreCandidate(votes) => (self.hard.term().next(), true, false, votes),
            RoleState::Candidate { votes, transfer, .. } => (self.hard.term(), false, *transfer, votes),
            RoleState::Follower | RoleState::Leader(_) => return,
        };
        if voter != self.config.id && self.configurations.current().is_voter(voter) && !votes.has(voter) {
            let vote = Vote { term, last: self.log.last(), pre, transfer };
            self.hard.outbox(actions).send(voter, Message::Vote(vote));
        }
    }

    /// A save of term and vote is durable: perhaps the own vote.
    pub(super) fn hard_state_saved(&mut self, actions: &mut Vec<Action>) {
        if let RoleState::Candidate { own_vote, .. } = &self.role
            && self.hard.saved() >= *own_vote
        {
            self.count_vote(self.config.id, actions);
        }
    }

    /// Whether a leader was heard so recently that nobody else is listened to. A leader sticks to itself: it is
    /// check-quorum that tells it when to give up.
    fn sticks_to_leader(&self) -> bool {
        match (&self.role, self.hearing.heard_at) {
            (RoleState::Leader(_), _) => true,
            (_, Some(heard_at)) => {
                self.leader.is_some() && self.now < heard_at.plus(self.config.election_timeout)
            }
            (_, None) => false,
        }
    }

    /// RequestVote (Raft, figure 2) or a pre-vote.
    pub(super) fn handle_vote(&mut self, from: NodeId, vote: Vote, actions: &mut Vec<Action>) {
        let malformed =
            vote.last.term >= vote.term || (vote.last.index.get() == 0) != (vote.last.term.get() == 0);
        if malformed {
            return self.ignore();
        }
        // A leader that asks for an election has given its lease up before.
        let sticks = !vote.transfer && (self.sticks_to_leader() || self.is_bound_by_lease());
        if !sticks && !vote.pre && vote.term > self.hard.term() {
            self.become_follower(vote.term, None, actions);
        }
        let vote_is_free = vote.term > self.hard.term()
            || (vote.term == self.hard.term()
                && self.leader.is_none()
                && (self.hard.vote().is_none_or(|candidate| candidate == from)
                    || mutants::active(Mutant::SecondVoteInTerm)));
        // What this node may have acknowledged counts, not only what its log still shows.
        let long_enough = self.vote_bar().is_some_and(|bar| vote.last >= bar);
        let long_enough = long_enough || mutants::active(Mutant::VoteForShorterLog);
        let granted = !sticks && vote_is_free && long_enough;
        if granted && !vote.pre {
            self.become_follower(vote.term, None, actions);
            if !mutants::active(Mutant::VoteForgotten) {
                self.hard.vote_for(from);
            }
            self.restart_election_timer();
        }
        let term = if granted { vote.term } else { self.hard.term() };
        let reply = Message::VoteReply(VoteReply { term, granted, pre: vote.pre });
        self.hard.outbox(actions).send(from, reply);
    }

    /// The answer to a vote or a pre-vote.
    pub(super) fn handle_vote_reply(&mut self, from: NodeId, reply: VoteReply, actions: &mut Vec<Action>) {
        let term = self.hard.term();
        match &self.role {
            RoleState::PreCandidate(_) if reply.pre && reply.granted && reply.term == term.next() => {
                if let RoleState::PreCandidate(votes) = &mut self.role {
                    votes.add(from);
                }
                self.count_pre_votes(actions);
            }
            RoleState::Candidate { .. }
                if !reply.pre
                    && reply.granted
                    && (reply.term == term
                        || reply.term < term && mutants::active(Mutant::StaleReplyTakenForNewTerm)) =>
            {
                self.count_vote(from, actions);
            }
            // Refused because the voter knows a later term. A granted reply of a later term is an old one, or
            // one that nobody asked for.
            RoleState::PreCandidate(_) | RoleState::Candidate { .. }
                if !reply.granted && reply.term > term =>
            {
                self.become_follower(reply.term, None, actions);
            }
            _ => {}
        }
    }

    /// Counts a vote, durable at the voter, and leads if it completes a quorum.
    fn count_vote(&mut self, voter: NodeId, actions: &mut Vec<Action>) {
        let RoleState::Candidate { votes, .. } = &mut self.role else { return };
        votes.add(voter);
        let votes = votes.clone();
        if self.is_elected(|id| votes.has(id)) {
            self.become_leader(actions);
        }
    }
}
