//! Counting over one or two sets of voters.

use super::Configuration;
use ringraft_block::NodeId;

/// The voters that must agree: a majority of `incoming`, and during a transition also one of `outgoing`.
///
/// Nothing is allocated to count: sets of voters have a handful of members, which are sorted in place. A larger set is
/// scanned once for each of its members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quorum {
    incoming: Vec<NodeId>,
    outgoing: Vec<NodeId>,
}

impl Quorum {
    /// The quorum of a configuration.
    #[must_use]
    pub fn of(configuration: &Configuration) -> Self {
        Self {
            incoming: configuration.incoming_voters().collect(),
            outgoing: configuration.outgoing().to_vec(),
        }
    }

    /// Whether it is the quorum of `configuration`.
    #[must_use]
    pub fn is_of(&self, configuration: &Configuration) -> bool {
        configuration.incoming_voters().eq(self.incoming.iter().copied())
            && self.outgoing == configuration.outgoing()
    }

    /// The highest value that a quorum has reached, when `value` is what each voter has reached.
    pub fn agreed<T: Ord + Copy>(&self, value: impl Fn(NodeId) -> T) -> T {
        let incoming = majority(&self.incoming, &value);
        let outgoing = majority(&self.outgoing, &value);
        match (incoming, outgoing) {
            (Some(incoming), Some(outgoing)) => incoming.min(outgoing),
            (Some(one), None) | (None, Some(one)) => one,
            // A configuration has at least one voter.
            (None, None) => value(NodeId(0)),
        }
    }

    /// Whether those for whom `says_yes` holds are a quorum.
    pub fn reached(&self, says_yes: impl Fn(NodeId) -> bool) -> bool {
        self.agreed(says_yes)
    }

    /// Whether `id` alone is a quorum.
    #[must_use]
    pub fn is_only(&self, id: NodeId) -> bool {
        self.reached(|voter| voter == id)
    }

    /// Every voter once.
    pub fn voters(&self) -> impl Iterator<Item = NodeId> + '_ {
        let old = self.outgoing.iter().filter(|id| !self.incoming.contains(id));
        self.incoming.iter().chain(old).copied()
    }
}

/// Sets of no more voters than this are sorted to count them.
const SORTED_MAX: usize = 9;

/// The highest value that more than half of `voters` have reached.
fn majority<T: Ord + Copy>(voters: &[NodeId], value: &impl Fn(NodeId) -> T) -> Option<T> {
    // Most sets, counted many times in a turn.
    match *voters {
        [] => return None,
        [only] => return Some(value(only)),
        [a, b, c] => {
            let (a, b, c) = (value(a), value(b), value(c));
            return Some(a.max(b).min(a.min(b).max(c)));
        }
        _ => {}
    }
    let needed = voters.len() / 2 + 1;
    let mut reached = [None; SORTED_MAX];
    if let Some(reached) = reached.get_mut(..voters.len()) {
        for (place, id) in reached.iter_mut().zip(voters) {
            *place = Some(value(*id));
        }
        reached.sort_unstable();
        // As many as are needed have reached this, or more.
        return reached.get(voters.len().checked_sub(needed)?).copied().flatten();
    }
    let reached_by_majority =
        |candidate: &T| voters.iter().filter(|id| value(**id) >= *candidate).count() >= needed;
    voters.iter().map(|id| value(*id)).filter(reached_by_majority).max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::{Member, MemberRole};
    use ringraft_block::Incarnation;

    fn quorum(voters: &[u64], outgoing: &[u64]) -> Quorum {
        let members = voters.iter().map(|id| Member {
            id: NodeId(*id),
            incarnation: Incarnation(1),
            address: String::new(),
            role: MemberRole::Voter,
        });
        let leaving = outgoing.iter().filter(|id| !voters.contains(id)).map(|id| Member {
            id: NodeId(*id),
            incarnation: Incarnation(1),
            address: String::new(),
            role: MemberRole::Learner,
        });
        let outgoing = outgoing.iter().map(|id| NodeId(*id)).collect();
        Quorum::of(&Configuration::joint(members.chain(leaving).collect(), outgoing).expect("valid"))
    }

    #[test]
    fn what_a_majority_reached_is_agreed_for_one_to_five_voters() {
        let reached = |id: NodeId| id.get() * 10;
        for (voters, agreed) in [(1, 10), (2, 10), (3, 20), (4, 20), (5, 30)] {
            let ids: Vec<u64> = (1..=voters).collect();
            assert_eq!(quorum(&ids, &[]).agreed(reached), agreed, "{voters} voters");
        }
    }

    #[test]
    fn a_majority_is_counted_alike_in_sets_that_are_sorted_and_in_larger_ones() {
        for voters in 1..=SORTED_MAX as u64 + 3 {
            let ids: Vec<u64> = (1..=voters).collect();
            // In no order, and some of them equal.
            let reached = |id: NodeId| id.get() * 7 % 5;
            let mut sorted: Vec<u64> = ids.iter().map(|id| reached(NodeId(*id))).collect();
            sorted.sort_unstable_by(|one, other| other.cmp(one));
            let agreed = sorted[ids.len() / 2];
            assert_eq!(quorum(&ids, &[]).agreed(reached), agreed, "{voters} voters");
        }
    }

    #[test]
    fn a_quorum_is_told_from_that_of_other_voters() {
        let of = |voters: &[u64], outgoing: &[u64]| {
            let member = |id: u64, role| Member {
                id: NodeId(id),
                incarnation: Incarnation(1),
                address: String::new(),
                role,
            };
            let members = voters.iter().map(|id| member(*id, MemberRole::Voter));
            let leaving = outgoing.iter().filter(|id| !voters.contains(id));
            let leaving = leaving.map(|id| member(*id, MemberRole::Learner));
            let outgoing = outgoing.iter().map(|id| NodeId(*id)).collect();
            Configuration::joint(members.chain(leaving).collect(), outgoing).expect("valid")
        };
        let all: [(&[u64], &[u64]); 4] =
            [(&[1, 2, 3], &[]), (&[1, 2], &[]), (&[1, 2, 3], &[1, 4]), (&[1, 2, 3], &[4])];
        for (at, (voters, outgoing)) in all.iter().enumerate() {
            for (other, (other_voters, other_outgoing)) in all.iter().enumerate() {
                let configuration = of(other_voters, other_outgoing);
                assert_eq!(quorum(voters, outgoing).is_of(&configuration), at == other, "{configuration:?}");
            }
        }
    }

    #[test]
    fn a_transition_needs_both_majorities() {
        let quorum = quorum(&[1, 2, 3], &[3, 4, 5]);
        assert!(!quorum.reached(|id| id.get() <= 3));
        assert!(!quorum.reached(|id| id.get() >= 3));
        assert!(quorum.reached(|id| id.get() != 2 && id.get() != 5));
        assert_eq!(quorum.voters().collect::<Vec<_>>(), [1, 2, 3, 4, 5].map(NodeId));
    }

    #[test]
    fn one_voter_is_a_quorum_of_itself_and_a_learner_never_is() {
        assert!(quorum(&[1], &[]).is_only(NodeId(1)));
        assert!(!quorum(&[1], &[]).is_only(NodeId(2)));
        assert!(!quorum(&[1, 2], &[]).is_only(NodeId(1)));
        assert!(!quorum(&[1], &[2]).is_only(NodeId(1)));
    }
}
