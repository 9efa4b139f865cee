//! Leadership transfer (Raft thesis, section 3.10).
//!
//! Asked → the leader takes no more proposals → the member asked for holds the whole log → `TimeoutNow` → that member
//! campaigns at once, without asking first whether it could succeed, and the voters do not stick to the old leader →
//! its first message ends the old one's leadership. A transfer that has not led to that within an election time-out, or
//! whose member is lost, is given up, and the leader goes on at once: nobody need be told, since nothing was promised.
//!
//! The campaign that a member was told to make cannot be called back: the message may be read at any time of the term, from
//! a socket or a process that was paused. So once it has left, no lease may be relied on in this term
//! ([`Raft::may_lease`]); elections and commits do not care.

use super::progress::Progress;
use super::role::RoleState;
use super::{Action, Message, Nanos, Raft, Round, TimeoutNow};
use ringraft_block::NodeId;

/// A transfer under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Transfer {
    pub(super) to: NodeId,
    deadline: Nanos,
    /// It has been told to campaign, in this session.
    told: bool,
}

/// How a transfer ended without another leader, or that it could not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum TransferEnd {
    /// This node does not lead.
    #[error("this node does not lead: ask the leader")]
    NotLeader,
    /// Another transfer is under way.
    #[error("leadership is already being transferred{}: wait for its end", to_node(*.to))]
    UnderWay {
        /// To whom; none if that is still to be chosen.
        to: Option<NodeId>,
    },
    /// Only a voter can lead.
    #[error("node {to} is not a voter of the present configuration: name a voter, or promote it first")]
    NotAVoter {
        /// Who was asked for.
        to: NodeId,
    },
    /// There is no other voter, or none that is heard.
    #[error("no other voter answers: nobody can take over")]
    NoCandidate,
    /// The member did not take over within an election time-out; this node leads on.
    #[error(
        "node {to} did not take over within an election time-out: it is slow, far behind, or may not lead"
    )]
    TimedOut {
        /// Who was asked for.
        to: NodeId,
    },
    /// The commands that had been admitted before were not in the log within an election time-out, so that nobody was asked;
    /// this node leads on.
    #[error(
        "what was admitted before could not be written to the log in time: nobody was asked to take over"
    )]
    NotSealed,
    /// The session with the member ended; this node leads on.
    #[error("the connection to node {to} was lost during the transfer")]
    Lost {
        /// Who was asked for.
        to: NodeId,
    },
}

fn to_node(to: Option<NodeId>) -> String {
    to.map_or_else(String::new, |to| format!(" to node {to}"))
}

impl Raft {
    /// To whom leadership is being transferred.
    #[must_use]
    pub fn transfer_target(&self) -> Option<NodeId> {
        match &self.role {
            RoleState::Leader(leader) => leader.transfer.map(|transfer| transfer.to),
            _ => None,
        }
    }

    /// Whether a lease may be relied on: nobody has been told to campaign in this term, nor is about to be.
    #[must_use]
    pub fn may_lease(&self) -> bool {
        match &self.role {
            RoleState::Leader(leader) => leader.transfer.is_none() && !leader.told_to_campaign,
            _ => false,
        }
    }

    /// Whether this node campaigns because the leader of the term before told it to. It has asked nobody first whether it
    /// could succeed.
    #[must_use]
    pub fn was_told_to_campaign(&self) -> bool {
        matches!(self.role, RoleState::Candidate { transfer: true, .. })
    }

    /// Leadership is to be handed to `to`, or to the most caught-up voter that is heard.
    pub(super) fn transfer(&mut self, to: Option<NodeId>, actions: &mut Vec<Action>) {
        let deadline = self.now.plus(self.config.election_timeout);
        let candidate = self.transfer_candidate();
        let id = self.config.id;
        let RoleState::Leader(leader) = &mut self.role else {
            return actions.push(Action::TransferEnded { end: TransferEnd::NotLeader });
        };
        if let Some(Transfer { to, .. }) = leader.transfer {
            return actions.push(Action::TransferEnded { end: TransferEnd::UnderWay { to: Some(to) } });
        }
        let refused = match to.or(candidate) {
            None => TransferEnd::NoCandidate,
            Some(to)
                if to == id
                    || leader.peer(to).is_none()
                    || !self.configurations.current().is_incoming_voter(to) =>
            {
                TransferEnd::NotAVoter { to }
            }
            Some(to) => {
                leader.transfer = Some(Transfer { to, deadline, told: false });
                return self.advance_transfer(actions);
            }
        };
        actions.push(Action::TransferEnded { end: refused });
    }

    /// The voter other than this node that holds the most and was heard within an election time-out; of several the
    /// one heard last, then the lowest id. None for a node that does not lead.
    fn transfer_candidate(&self) -> Option<NodeId> {
        self.able_to_take_over()
            .max_by_key(|peer| (peer.matched(), peer.contact(), std::cmp::Reverse(peer.id())))
            .map(Progress::id)
    }

    /// The voters other than this node that were heard within an election time-out. None for a node that does not lead.
    pub(super) fn able_to_take_over(&self) -> impl Iterator<Item = &Progress> {
        let peers = match &self.role {
            RoleState::Leader(leader) => leader.peers.as_slice(),
            _ => &[],
        };
        let heard = self.now.0.saturating_sub(self.config.election_timeout.0);
        let voters = peers.iter().filter(move |peer| self.configuration().is_incoming_voter(peer.id()));
        voters.filter(move |peer| peer.contact().0 >= heard && peer.round() > Round(0))
    }

    /// Tells the member to campaign once it holds the whole log and all of it is committed: then nobody who proposed here
    /// is left with an unknown outcome.
    pub(super) fn advance_transfer(&mut self, actions: &mut Vec<Action>) {
        let last = self.log.last().index;
        let term = self.hard.term();
        let RoleState::Leader(leader) = &mut self.role else { return };
        let Some(Transfer { to, told: false, .. }) = leader.transfer else { return };
        if self.commit < last && !self.config.consensus_only
            || leader.peer(to).is_none_or(|peer| peer.matched() < last)
        {
            return;
        }
        if let Some(transfer) = &mut leader.transfer {
            transfer.told = true;
        }
        leader.told_to_campaign = true;
        self.hard.outbox(actions).send(to, Message::TimeoutNow(TimeoutNow { term }));
    }

    /// The session with `peer` ended: if leadership was going there, it stays.
    pub(super) fn transfer_lost(&mut self, peer: NodeId, actions: &mut Vec<Action>) {
        let RoleState::Leader(leader) = &mut self.role else { return };
        if leader.transfer.take_if(|transfer| transfer.to == peer).is_some() {
            actions.push(Action::TransferEnded { end: TransferEnd::Lost { to: peer } });
        }
    }

    /// Gives up a transfer that takes too long.
    pub(super) fn expire_transfer(&mut self, actions: &mut Vec<Action>) {
        let now = self.now;
        let RoleState::Leader(leader) = &mut self.role else { return };
        if let Some(Transfer { to, .. }) = leader.transfer.take_if(|transfer| transfer.deadline <= now) {
            actions.push(Action::TransferEnded { end: TransferEnd::TimedOut { to } });
        }
    }

    /// When a transfer under way will have taken too long.
    pub(super) fn transfer_deadline(&self) -> Nanos {
        match &self.role {
            RoleState::Leader(leader) => leader.transfer.map_or(Nanos::NEVER, |transfer| transfer.deadline),
            _ => Nanos::NEVER,
        }
    }

    /// Tells the voter that holds the most to campaign, without waiting for anything: for a leader that must step
    /// down now. It saves the others the wait for an election time-out; if that member cannot win, the wait decides.
    pub(super) fn hand_over_now(&mut self, actions: &mut Vec<Action>) {
        let term = self.hard.term();
        let Some(to) = self.transfer_candidate() else { return };
        if let RoleState::Leader(leader) = &mut self.role {
            leader.told_to_campaign = true;
            self.hard.outbox(actions).send(to, Message::TimeoutNow(TimeoutNow { term }));
        }
    }

    /// The leader of the term wants this node to campaign now.
    pub(super) fn handle_timeout_now(
        &mut self,
        from: NodeId,
        message: TimeoutNow,
        actions: &mut Vec<Action>,
    ) {
        let current = message.term == self.hard.term() && self.leader == Some(from);
        let follows = matches!(self.role, RoleState::Follower);
        if current && follows && self.may_campaign() {
            self.campaign(true, actions);
        }
    }
}
