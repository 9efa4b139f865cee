//! Who is in the cluster.

use super::Nanos;
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
    settings: Settings,
    planned: Vec<(NodeId, MemberRole)>,
    next_id: u64,
}

/// What all members have to agree on beside who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Settings {
    /// Whether leaders may answer reads by a lease, and what it counts on. `None`: never.
    pub lease: Option<LeaseSettings>,
}

/// What a leader's lease counts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseSettings {
    /// Every member's election time-out is at least this long, in nanoseconds: for so long after it heard the leader it
    /// elects nobody else.
    pub election_timeout_min_ns: u64,
    /// The most by which the rate of any member's clock is off, in millionths.
    pub drift_ppm: u32,
}

impl LeaseSettings {
    /// As a span.
    #[must_use]
    pub fn election_timeout_min(&self) -> Nanos {
        Nanos(self.election_timeout_min_ns)
    }

    /// How long a lease lasts on the leader's clock, which may be slow, from when a round was sent to when a follower, whose
    /// clock may be fast, has waited for the minimum: `min * (1 - drift) / (1 + drift)`.
    #[must_use]
    pub fn duration(&self) -> Nanos {
        let million = 1_000_000_u128;
        let drift = u128::from(self.drift_ppm).min(million);
        let span = u128::from(self.election_timeout_min_ns) * (million - drift) / (million + drift);
        Nanos(u64::try_from(span).unwrap_or(u64::MAX))
    }
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
        let settings = Settings::default();
        let configuration = Self { members, outgoing, settings, planned: Vec::new(), next_id };
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

    /// The same with these settings.
    #[must_use]
    pub fn with_settings(self, settings: Settings) -> Self {
        Self { settings, ..self }
    }

    /// What all members have to agree on beside who they are.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
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

    /// Whether `id` is a voter of the configuration that is in force, or is being entered.
    #[must_use]
    pub fn is_incoming_voter(&self, id: NodeId) -> bool {
        self.member(id).is_some_and(|member| member.role == MemberRole::Voter)
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

    /// A leader whose clock is slow by all that is allowed, a follower whose clock is fast by as much: in true time the lease
    /// is over before the follower has waited for the minimum.
    #[test]
    fn a_lease_ends_before_the_fastest_clock_has_waited_for_the_minimum() {
        for (min, drift_ppm) in [(500_000_000, 200), (1_000_000_000, 100_000), (7, 1), (u64::MAX, 0)] {
            let lease = LeaseSettings { election_timeout_min_ns: min, drift_ppm };
            let (million, drift) = (1_000_000_u128, u128::from(drift_ppm));
            let lasts = u128::from(lease.duration().0) * million * (million + drift);
            let waits = u128::from(min) * million * (million - drift);
            assert!(lasts <= waits, "{lease:?}");
            assert!(lasts + million * (million + drift) > waits, "not shorter than it must be: {lease:?}");
        }
        let broken = LeaseSettings { election_timeout_min_ns: 1_000, drift_ppm: 2_000_000 };
        assert_eq!(broken.duration(), Nanos(0));
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
