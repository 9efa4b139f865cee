//! What a change of the members is asked to be, and what may become of it.

use super::{Configuration, ConfigurationError, Member, MemberRole};
use ringraft_block::{LogIndex, NodeId};
use std::fmt;

/// A change of the members, all of it in one call: it takes effect as a whole or not at all.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Change {
    /// Who joins, as what. A voter is a learner until it has caught up. A member that is named with its own incarnation
    /// gets that address.
    pub add: Vec<Member>,
    /// Who leaves.
    pub remove: Vec<NodeId>,
    /// Learners that become voters, once they have caught up.
    pub promote: Vec<NodeId>,
    /// Voters that become learners.
    pub demote: Vec<NodeId>,
    /// Reserve the next id for a node that has none yet.
    pub reserve_id: bool,
    /// Only if the configuration in force stands at this index (compare-and-set).
    pub expected: Option<LogIndex>,
    /// Also if the new voters cannot decide anything until some come back that do not answer now.
    pub even_if_quorum_is_lost: bool,
}

/// A change that is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed {
    /// Where the configuration stands in the log that it has led to.
    pub index: LogIndex,
    /// The id that was reserved.
    pub reserved: Option<NodeId>,
}

/// Why a change of the members came to nothing, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// Another node leads, or none does.
    #[error("this node does not lead: ask the leader")]
    NotLeader,
    /// Nothing can be proposed in a cluster that only elects.
    #[error("this cluster only elects: its members are those that it was formed with")]
    ConsensusOnly,
    /// The leader is about to be another one.
    #[error(
        "leadership is being transferred to node {to}: ask that one, or try again when the transfer is over"
    )]
    Transferring {
        /// To whom.
        to: NodeId,
    },
    /// The leader has not committed anything in its term yet.
    #[error("the leader has just been elected: try again in a moment")]
    NotReady,
    /// Another change is under way.
    #[error("another change of the members is under way since index {index}: wait until it is over")]
    InProgress {
        /// Where its last step stands.
        index: LogIndex,
    },
    /// The configuration is another one than expected.
    #[error(
        "the configuration in force is that of index {current}, not {expected}: look at it, then decide again"
    )]
    Expected {
        /// The index that was expected.
        expected: LogIndex,
        /// The index that it has.
        current: LogIndex,
    },
    /// Named twice, or for contradicting things.
    #[error("node {id} is named twice in one change: name it once")]
    NamedTwice {
        /// Who.
        id: NodeId,
    },
    /// Not a member.
    #[error("node {id} is not a member: {}", list_members(.members))]
    NotAMember {
        /// Who.
        id: NodeId,
        /// Who is.
        members: Vec<NodeId>,
    },
    /// A member already.
    #[error("node {id} is a member already: promote or demote it, or give the new node an id of its own")]
    AlreadyMember {
        /// Who.
        id: NodeId,
    },
    /// A member of that id exists with another data directory.
    #[error(
        "node {id} is a member with another data directory: remove it first, and add the new one when that is done, or give \
         the new one an id of its own"
    )]
    OtherIncarnation {
        /// Who.
        id: NodeId,
    },
    /// Id 0, or an incarnation of 0.
    #[error("node {id} has no identity: start it with `join`, then add it")]
    NoIdentity {
        /// Who.
        id: NodeId,
    },
    /// Nobody could decide any more.
    #[error("no voter would be left: keep or promote one")]
    NoVoter,
    /// More members than there may be.
    #[error("{members} members are more than {most}: remove some first")]
    TooMany {
        /// How many there would be.
        members: usize,
        /// How many there may be.
        most: usize,
    },
    /// Too many of the new voters do not answer.
    #[error(
        "of the {voters} voters that there would be, {silent:?} do not answer now, and the rest is no majority: bring them \
         back, or remove them in the same change; `even_if_quorum_is_lost` does it all the same"
    )]
    QuorumLost {
        /// Who does not answer.
        silent: Vec<NodeId>,
        /// How many voters there would be.
        voters: usize,
    },
    /// A future voter does not answer, or does not get on.
    #[error("node {id} makes no progress: it stays a learner; see to it, then promote it")]
    Stuck {
        /// Who.
        id: NodeId,
    },
    /// A future voter is slower than the cluster.
    #[error(
        "node {id} does not keep up: after {rounds} rounds it still takes longer than an election time-out to catch up; it stays \
         a learner; give it more bandwidth or the cluster less load, then promote it"
    )]
    Slow {
        /// Who.
        id: NodeId,
        /// How often it was sent all that there was.
        rounds: u32,
    },
    /// This node lost its leadership meanwhile. The change may come to nothing, or a later leader finishes it.
    #[error("outcome unknown: leadership was lost meanwhile; look at the configuration of the new leader")]
    LeadershipLost,
}

fn list_members(ids: &[NodeId]) -> String {
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    format!("the members are {}", ids.join(", "))
}

/// What a change would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The steps, each of them an entry of the log; empty if there is nothing to do.
    pub steps: Vec<Configuration>,
    /// Voters that must first catch up.
    pub to_catch_up: Vec<NodeId>,
    /// Why it would be refused, if it would.
    pub refused: Option<ChangeError>,
    /// How many of the voters may fail now, and then, without that anything stops; none before, if it is refused.
    pub tolerates: (usize, usize),
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(error) = &self.refused {
            return write!(f, "Refused: {error}.");
        }
        let Some(last) = self.steps.last() else { return write!(f, "Nothing to do.") };
        for (number, step) in self.steps.iter().enumerate() {
            write!(f, "{}. ", number + 1)?;
            match step {
                step if step.is_joint() => writeln!(
                    f,
                    "joint consensus: every decision needs a majority of {} and one of {}.",
                    list(step.outgoing().iter().copied()),
                    list(step.incoming_voters())
                )?,
                step if !step.planned().is_empty() => writeln!(
                    f,
                    "{} as learners, until they have caught up with the log; they count for nothing yet.",
                    list(self.to_catch_up.iter().copied())
                )?,
                step => {
                    let learners = step.members().iter().filter(|member| member.role == MemberRole::Learner);
                    let learners: Vec<NodeId> = learners.map(|member| member.id).collect();
                    write!(f, "voters {}", list(step.incoming_voters()))?;
                    if !learners.is_empty() {
                        write!(f, "; learners {}", list(learners.into_iter()))?;
                    }
                    writeln!(f, "; ids are free from {}.", step.next_id())?;
                }
            }
        }
        let (now, then) = self.tolerates;
        write!(f, "{} voters then; {then} of them may fail (now {now}).", last.incoming_voters().count())
    }
}

fn list(ids: impl Iterator<Item = NodeId>) -> String {
    let ids: Vec<String> = ids.map(|id| id.to_string()).collect();
    ids.join(", ")
}

/// The most members of a configuration, learners included.
pub const MEMBERS_MAX: usize = 31;

impl Configuration {
    /// The first step of `change`: with the plan in it, or the one after that if nobody has to catch up. None if there is
    /// nothing to do.
    pub(super) fn changed(&self, change: &Change) -> Result<Option<Self>, ChangeError> {
        let named = change.add.iter().map(|member| member.id);
        let mut named: Vec<NodeId> = named
            .chain([&change.remove, &change.promote, &change.demote].into_iter().flatten().copied())
            .collect();
        named.sort();
        if let Some(pair) = named.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ChangeError::NamedTwice { id: pair[0] });
        }
        let mut members = self.members().to_vec();
        let mut planned: Vec<(NodeId, MemberRole)> = Vec::new();
        for new in &change.add {
            if new.id == NodeId(0) || new.incarnation.0 == 0 {
                return Err(ChangeError::NoIdentity { id: new.id });
            }
            match members.iter_mut().find(|member| member.id == new.id) {
                Some(known) if known.incarnation != new.incarnation => {
                    return Err(ChangeError::OtherIncarnation { id: new.id });
                }
                Some(known) if known.role != new.role => {
                    return Err(ChangeError::AlreadyMember { id: new.id });
                }
                Some(known) => known.address.clone_from(&new.address),
                None => {
                    members.push(Member { role: MemberRole::Learner, ..new.clone() });
                    planned.push((new.id, new.role));
                }
            }
        }
        for id in [&change.remove, &change.promote, &change.demote].into_iter().flatten() {
            if self.member(*id).is_none() {
                let members = self.members().iter().map(|member| member.id).collect();
                return Err(ChangeError::NotAMember { id: *id, members });
            }
        }
        for member in self.members().iter().filter(|member| !change.remove.contains(&member.id)) {
            let role = match member.id {
                id if change.promote.contains(&id) => MemberRole::Voter,
                id if change.demote.contains(&id) => MemberRole::Learner,
                _ => member.role,
            };
            planned.push((member.id, role));
        }
        if !planned.iter().any(|(_, role)| *role == MemberRole::Voter) {
            return Err(ChangeError::NoVoter);
        }
        if planned.len() > MEMBERS_MAX {
            return Err(ChangeError::TooMany { members: planned.len(), most: MEMBERS_MAX });
        }
        let next_id = NodeId(self.next_id().get().saturating_add(u64::from(change.reserve_id)));
        let next = Self::new(members).map(|next| next.with_settings(*self.settings()));
        let next = next.and_then(|next| next.with_plan(planned, next_id.max(self.next_id())));
        let next = next.map_err(|error| match error {
            ConfigurationError::Duplicate { id } => ChangeError::NamedTwice { id },
            ConfigurationError::ZeroId => ChangeError::NoIdentity { id: NodeId(0) },
            _ => ChangeError::NoVoter,
        })?;
        let next = if next.to_catch_up().next().is_none() { next.next_step() } else { next };
        Ok((next != *self).then_some(next))
    }
}
