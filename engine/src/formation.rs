//! How a cluster comes into being: all initial members meet, and each makes the same configuration, with every
//! member's incarnation in it, durable before it takes part in any vote.
//!
//! Happy path: every node tells each peer, when a session begins, whether it is formed. The member with the lowest
//! id waits until it has heard "not formed" from all the others, then composes the configuration, makes it durable
//! and announces it; each of the others adopts what a formed peer announces, if it is named there with the
//! incarnation of its own directory.
//!
//! A blank directory never composes while any peer says "formed", and never adopts a configuration that names
//! another incarnation: a wiped disk cannot come back under its old id and vote (it has forgotten what it
//! acknowledged). That is reported as [`FormationError::Replaced`].

use crate::config::MemberConfig;
use crate::raft::{Configuration, Member, MemberRole, Settings};
use crate::wire::{self, FormationMessage};
use ringraft_block::{ClusterId, Incarnation, NodeId};
use ringraft_wal::format::Chain;
use std::collections::BTreeMap;

/// Why a node cannot become part of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormationError {
    /// The cluster knows this node by another data directory.
    #[error(
        "the cluster was formed with another data directory of node {node} (incarnation {known}; this directory is \
         {own}): start it with the original directory, or have the cluster replace the member"
    )]
    Replaced {
        /// This node.
        node: NodeId,
        /// The incarnation that the cluster knows.
        known: Incarnation,
        /// The incarnation of this directory.
        own: Incarnation,
    },
    /// The cluster was formed without this node.
    #[error("the cluster was formed without node {node}: start it with `join`, and add it as a member")]
    NotNamed {
        /// This node.
        node: NodeId,
    },
    /// The members disagree on who the initial members are.
    #[error(
        "the cluster was formed with members {theirs:?}, as node {source_node} knows; this node is configured with \
         {ours:?}: make `members` equal"
    )]
    MembersDiffer {
        /// Who keeps the formed configuration.
        source_node: NodeId,
        /// Its members.
        theirs: Vec<NodeId>,
        /// The members configured here.
        ours: Vec<NodeId>,
    },
    /// A formed configuration that cannot be decoded.
    #[error("the formed configuration, from {origin}, cannot be decoded: another version?")]
    Undecodable {
        /// Where it came from.
        origin: String,
    },
}

/// What is to be done next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Go on listening.
    Wait,
    /// Make this configuration durable; then the node is formed.
    Form(Configuration),
}

/// The formation of one node that is not formed yet.
pub(crate) struct Formation {
    node: NodeId,
    incarnation: Incarnation,
    members: Vec<MemberConfig>,
    /// The node is to be added to a cluster that exists: it takes over what that was formed with, whoever is named there.
    joins: bool,
    /// What the peers that are connected now said last.
    heard: BTreeMap<NodeId, Incarnation>,
    decided: bool,
    settings: Settings,
}

impl Formation {
    pub(crate) fn new(node: NodeId, incarnation: Incarnation, members: &[MemberConfig], joins: bool) -> Self {
        let mut members = members.to_vec();
        members.sort_by_key(|member| member.id);
        let (heard, decided, settings) = (BTreeMap::new(), false, Settings::default());
        Self { node, incarnation, members, joins, heard, decided, settings }
    }

    /// What the configuration says if this node composes it.
    pub(crate) fn with_settings(self, settings: Settings) -> Self {
        Self { settings, ..self }
    }

    /// Whether this node may compose the configuration now. Also to be asked once without any message, for a
    /// cluster of one.
    pub(crate) fn step(&mut self) -> Step {
        let lowest = self.members.first().is_some_and(|first| first.id == self.node);
        let composer = lowest && !self.joins;
        let met_all = self.members.iter().all(|m| m.id == self.node || self.heard.contains_key(&m.id));
        if self.decided || !composer || !met_all {
            return Step::Wait;
        }
        self.decided = true;
        let members = self.members.iter().map(|member| Member {
            id: member.id,
            incarnation: self.heard.get(&member.id).copied().unwrap_or(self.incarnation),
            address: member.address.to_string(),
            role: MemberRole::Voter,
        });
        // `Config::validate` has seen to it that the members do not contradict each other.
        let configuration = Configuration::new(members.collect());
        configuration.map_or(Step::Wait, |formed| Step::Form(formed.with_settings(self.settings)))
    }

    /// A peer said what it knows. `incarnation` is the one that its session was opened with.
    pub(crate) fn heard(
        &mut self,
        peer: NodeId,
        incarnation: Incarnation,
        message: &FormationMessage,
    ) -> Result<Step, FormationError> {
        if self.decided {
            return Ok(Step::Wait);
        }
        if message.formed {
            return self.adopt(peer, &message.configuration);
        }
        self.heard.insert(peer, incarnation);
        Ok(self.step())
    }

    /// A session ended: the peer may come back with another directory.
    pub(crate) fn lost(&mut self, peer: NodeId) {
        self.heard.remove(&peer);
    }

    fn adopt(&mut self, peer: NodeId, configuration: &[u8]) -> Result<Step, FormationError> {
        let configuration = wire::configuration::decode(configuration)
            .ok_or_else(|| FormationError::Undecodable { origin: format!("node {peer}") })?;
        if self.joins {
            // It counts only when a later configuration names it, with the incarnation of this directory.
            self.decided = true;
            return Ok(Step::Form(configuration));
        }
        let Some(own) = configuration.member(self.node) else {
            return Err(FormationError::NotNamed { node: self.node });
        };
        if own.incarnation != self.incarnation {
            let (known, own) = (own.incarnation, self.incarnation);
            return Err(FormationError::Replaced { node: self.node, known, own });
        }
        check_members(peer, &self.members, &configuration)?;
        self.decided = true;
        Ok(Step::Form(configuration))
    }
}

/// Whether `formed`, which `source` keeps, has the members that this node is configured with.
pub(crate) fn check_members(
    source: NodeId,
    members: &[MemberConfig],
    formed: &Configuration,
) -> Result<(), FormationError> {
    let theirs: Vec<_> = formed.members().iter().map(|member| member.id).collect();
    let mut ours: Vec<_> = members.iter().map(|member| member.id).collect();
    ours.sort();
    if theirs == ours {
        Ok(())
    } else {
        Err(FormationError::MembersDiffer { source_node: source, theirs, ours })
    }
}

/// The chain before the first batch: logs of different clusters, or of one formed twice, never match.
pub(crate) fn genesis_chain(cluster: ClusterId, configuration: &[u8]) -> Chain {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    hasher.update(b"ringraft genesis");
    hasher.update(&cluster.0.to_le_bytes());
    hasher.update(configuration);
    Chain(hasher.digest128().to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    fn members(count: u64) -> Vec<MemberConfig> {
        let address = |id| SocketAddr::from(([127, 0, 0, 1], 7000 + id as u16));
        (1..=count).map(|id| MemberConfig { id: NodeId(id), address: address(id) }).collect()
    }

    fn formation(node: u64, incarnation: u128) -> Formation {
        Formation::new(NodeId(node), Incarnation(incarnation), &members(3), false)
    }

    fn unformed(incarnation: u128) -> FormationMessage {
        FormationMessage { incarnation: Incarnation(incarnation), formed: false, configuration: Vec::new() }
    }

    fn composed() -> Configuration {
        let mut first = formation(1, 11);
        assert_eq!(first.heard(NodeId(2), Incarnation(22), &unformed(22)), Ok(Step::Wait));
        match first.heard(NodeId(3), Incarnation(33), &unformed(33)) {
            Ok(Step::Form(configuration)) => configuration,
            other => panic!("{other:?}"),
        }
    }

    fn formed() -> FormationMessage {
        let configuration = wire::configuration::encode(&composed());
        FormationMessage { incarnation: Incarnation(11), formed: true, configuration }
    }

    #[test]
    fn the_lowest_id_composes_when_all_have_met_and_the_others_adopt_the_same() {
        let configuration = composed();
        let incarnations: Vec<_> =
            configuration.members().iter().map(|member| member.incarnation.0).collect();
        assert_eq!(incarnations, [11, 22, 33]);
        let mut second = formation(2, 22);
        assert_eq!(second.heard(NodeId(3), Incarnation(33), &unformed(33)), Ok(Step::Wait));
        assert_eq!(second.heard(NodeId(1), Incarnation(11), &formed()), Ok(Step::Form(configuration)));
    }

    #[test]
    fn a_single_member_forms_at_once() {
        let mut only = Formation::new(NodeId(1), Incarnation(5), &members(1), false);
        assert!(matches!(only.step(), Step::Form(_)));
    }

    #[test]
    fn a_peer_that_left_before_all_met_must_be_met_again() {
        let mut first = formation(1, 11);
        assert_eq!(first.heard(NodeId(2), Incarnation(22), &unformed(22)), Ok(Step::Wait));
        first.lost(NodeId(2));
        assert_eq!(first.heard(NodeId(3), Incarnation(33), &unformed(33)), Ok(Step::Wait));
    }

    #[test]
    fn a_wiped_directory_is_refused_also_that_of_the_composer() {
        let mut wiped = formation(2, 99);
        assert!(matches!(
            wiped.heard(NodeId(1), Incarnation(11), &formed()),
            Err(FormationError::Replaced { known: Incarnation(22), own: Incarnation(99), .. })
        ));
        let mut composer = formation(1, 98);
        assert_eq!(composer.heard(NodeId(3), Incarnation(33), &unformed(33)), Ok(Step::Wait));
        assert!(matches!(
            composer.heard(NodeId(2), Incarnation(22), &formed()),
            Err(FormationError::Replaced { known: Incarnation(11), .. })
        ));
    }

    #[test]
    fn a_node_that_joins_never_composes_and_takes_over_what_names_others() {
        let mut joiner = Formation::new(NodeId(1), Incarnation(99), &members(2), true);
        assert_eq!(joiner.heard(NodeId(2), Incarnation(22), &unformed(22)), Ok(Step::Wait));
        assert_eq!(joiner.heard(NodeId(2), Incarnation(22), &formed()), Ok(Step::Form(composed())));
        let mut only = Formation::new(NodeId(1), Incarnation(5), &members(1), true);
        assert_eq!(only.step(), Step::Wait);
    }

    #[test]
    fn different_member_lists_are_told() {
        let mut second = Formation::new(NodeId(2), Incarnation(22), &members(5), false);
        let error = second.heard(NodeId(1), Incarnation(11), &formed()).unwrap_err();
        assert!(matches!(error, FormationError::MembersDiffer { .. }));
    }
}
