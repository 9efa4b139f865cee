//! Who is in the cluster.

use ringraft_block::{Incarnation, NodeId};

/// Whether a member's vote and disk count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemberRole {
    /// Counts.
    Voter,
    /// Receives the log and counts for nothing (Raft thesis, section 4.2.1).
    Learner,
}

/// A member, as the configuration in the log names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    /// Its id.
    pub id: NodeId,
    /// The life of its data directory: votes and acks of another one do not count (the driver drops them).
    pub incarnation: Incarnation,
    /// Where to reach it. The core does not look at it.
    pub address: String,
    /// Whether it counts.
    pub role: MemberRole,
}

/// The members of a cluster, possibly in transition between two sets of voters (Raft, section 6).
///
/// `members` is everyone that the log goes to, sorted by id. While `outgoing` is not empty every decision needs a
/// quorum of the voters among `members` and a quorum of `outgoing`; a voter on its way out is then a learner in
/// `members`.
///
/// `planned` is where a change under way leads to: the role of everybody who will be a member, sorted by id. It is
/// there from when future voters are caught up until the transition is over, so that whoever leads can finish it.
/// `next_id` is the lowest id that was never a member's and never reserved.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Configuration {
    members: Vec<Member>,
    outgoing: Vec<NodeId>,
    planned: Vec<(NodeId, MemberRole)>,
    next_id: u64,
}

impl Configuration {
    /// A configuration that is not in transition.
    ///
    /// # Errors
    /// When the members contradict each other.
    pub fn new(members: Vec<Member>) -> Result<Self, ConfigurationError> {
        Self::joint(members, Vec::new())
    }

    /// A configuration in transition from the voters `outgoing` to those among `members`.
    ///
    /// # Errors
    /// When the members contradict each other.
    pub fn joint(mut members: Vec<Member>, mut outgoing: Vec<NodeId>) -> Result<Self, ConfigurationError> {
        members.sort_by_key(|member| member.id);
        outgoing.sort();
        if members.first().is_some_and(|member| member.id == NodeId(0)) {
            return Err(ConfigurationError::ZeroId);
        }
        if let Some(pair) = members.windows(2).find(|pair| pair[0].id == pair[1].id) {
            return Err(ConfigurationError::Duplicate { id: pair[0].id });
        }
        if let Some(pair) = outgoing.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ConfigurationError::Duplicate { id: pair[0] });
        }
        if !members.iter().any(|member| member.role == MemberRole::Voter) {
            return Err(ConfigurationError::NoVoter);
        }
        let next_id = members.last().map_or(1, |last| last.id.get().saturating_add(1));
        let configuration = Self { members, outgoing, planned: Vec::new(), next_id };
        match configuration.outgoing.iter().find(|id| configuration.member(**id).is_none()) {
            Some(id) => Err(ConfigurationError::OutgoingUnknown { id: *id }),
            None => Ok(configuration),
        }
    }

    /// Everyone that the log goes to, sorted by id.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The voters of the previous configuration during a transition, sorted; otherwise empty.
    #[must_use]
    pub fn outgoing(&self) -> &[NodeId] {
        &self.outgoing
    }

    /// The member of that id.
    #[must_use]
    pub fn member(&self, id: NodeId) -> Option<&Member> {
        let at = self.members.binary_search_by_key(&id, |member| member.id).ok()?;
        self.members.get(at)
    }

    /// The voters of the configuration that is in force, or is being entered.
    pub fn incoming_voters(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.members.iter().filter(|member| member.role == MemberRole::Voter).map(|member| member.id)
    }

    /// The same with a plan, and with ids reserved below `next_id` if that is higher than now.
    ///
    /// # Errors
    /// When the plan names somebody twice or who is no member, or has no voter.
    pub fn with_plan(
        mut self,
        mut planned: Vec<(NodeId, MemberRole)>,
        next_id: NodeId,
    ) -> Result<Self, ConfigurationError> {
        planned.sort_by_key(|(id, _)| *id);
        if let Some(pair) = planned.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(ConfigurationError::Duplicate { id: pair[0].0 });
        }
        if let Some((id, _)) = planned.iter().find(|(id, _)| self.member(*id).is_none()) {
            return Err(ConfigurationError::PlannedUnknown { id: *id });
        }
        if !planned.is_empty() && !planned.iter().any(|(_, role)| *role == MemberRole::Voter) {
            return Err(ConfigurationError::NoVoter);
        }
        self.planned = planned;
        self.next_id = self.next_id.max(next_id.get());
        Ok(self)
    }

    /// Who will be a member, as what, once the change under way is over; empty when there is none.
    #[must_use]
    pub fn planned(&self) -> &[(NodeId, MemberRole)] {
        &self.planned
    }

    /// The lowest id that was never a member's and never reserved.
    #[must_use]
    pub fn next_id(&self) -> NodeId {
        NodeId(self.next_id)
    }

    /// Whether two sets of voters decide (joint consensus).
    #[must_use]
    pub fn is_joint(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether no change is under way.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.outgoing.is_empty() && self.planned.is_empty()
    }

    /// Future voters of the plan that do not count yet.
    pub fn to_catch_up(&self) -> impl Iterator<Item = NodeId> + '_ {
        let future = self.planned.iter().filter(|(_, role)| *role == MemberRole::Voter).map(|(id, _)| *id);
        future.filter(|id| self.member(*id).is_none_or(|member| member.role != MemberRole::Voter))
    }

    /// The step after this one, once all awaited voters are caught up: the transition, if the voters change, or its end.
    #[must_use]
    pub(super) fn next_step(&self) -> Self {
        let mut next = Self { outgoing: Vec::new(), ..self.clone() };
        if self.planned.is_empty() {
            return next;
        }
        let role_of = |id| self.planned.iter().find(|(planned, _)| *planned == id).map(|(_, role)| *role);
        for member in &mut next.members {
            member.role = role_of(member.id).unwrap_or(MemberRole::Learner);
        }
        if self.is_joint() || self.incoming_voters().eq(next.incoming_voters()) {
            next.members.retain(|member| role_of(member.id).is_some());
            next.planned.clear();
        } else {
            next.outgoing = self.incoming_voters().collect();
        }
        next
    }

    /// The same without the plan: who is no voter yet stays a learner.
    #[must_use]
    pub(super) fn without_plan(&self) -> Self {
        Self { planned: Vec::new(), ..self.clone() }
    }

    /// Whether `id` counts in any quorum.
    #[must_use]
    pub fn is_voter(&self, id: NodeId) -> bool {
        self.outgoing.binary_search(&id).is_ok()
            || self.member(id).is_some_and(|member| member.role == MemberRole::Voter)
    }
}

/// Why a [`Configuration`] is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigurationError {
    /// Node id 0 names nobody.
    #[error("node id 0 is reserved")]
    ZeroId,
    /// One id twice.
    #[error("node {id} is listed twice")]
    Duplicate {
        /// The id.
        id: NodeId,
    },
    /// Nobody could ever be elected.
    #[error("no member is a voter")]
    NoVoter,
    /// A plan for somebody that the log does not go to.
    #[error("{id} is planned and not a member")]
    PlannedUnknown {
        /// The id.
        id: NodeId,
    },
    /// An outgoing voter that the log no longer goes to could not be counted.
    #[error("outgoing voter {id} is not a member")]
    OutgoingUnknown {
        /// The id.
        id: NodeId,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, role: MemberRole) -> Member {
        Member { id: NodeId(id), incarnation: Incarnation(u128::from(id)), address: String::new(), role }
    }

    #[test]
    fn contradictory_members_are_refused() {
        use MemberRole::{Learner, Voter};
        assert_eq!(Configuration::new(vec![member(0, Voter)]), Err(ConfigurationError::ZeroId));
        assert_eq!(
            Configuration::new(vec![member(2, Voter), member(1, Voter), member(2, Learner)]),
            Err(ConfigurationError::Duplicate { id: NodeId(2) })
        );
        assert_eq!(Configuration::new(vec![member(1, Learner)]), Err(ConfigurationError::NoVoter));
        assert_eq!(
            Configuration::joint(vec![member(1, Voter)], vec![NodeId(2)]),
            Err(ConfigurationError::OutgoingUnknown { id: NodeId(2) })
        );
    }

    #[test]
    fn a_voter_on_its_way_out_still_counts() {
        let joint = Configuration::joint(
            vec![
                member(1, MemberRole::Voter),
                member(2, MemberRole::Learner),
                member(3, MemberRole::Learner),
            ],
            vec![NodeId(1), NodeId(2)],
        )
        .expect("valid");
        assert!(joint.is_voter(NodeId(2)));
        assert!(!joint.is_voter(NodeId(3)));
    }
}
