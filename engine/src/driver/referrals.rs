//! How a node that joins finds the leader.
//!
//! The leader has sessions with the members and with those whom it is adding. Of two nodes the one with the higher id dials, so
//! that the two meet only if each of them knows the other: the leader is told of the newcomer by whoever asks for the change,
//! the newcomer need only know some member. It asks one after the other whom to turn to, whichever id is the higher: that
//! takes no session, and changes nothing there (`ringraft_net::Network::ask`). A member refers it to the leader that it
//! follows; from then on the newcomer dials the leader, or lets it in when it dials.
//!
//! Nothing depends on the answer being true: it is one more place to look for the cluster, until a configuration names this
//! node.

use super::{Driver, Life, Peer};
use crate::error::StopError;
use crate::state_machine::StateMachine;
use ringraft_block::NodeId;
use ringraft_net::link::Link;
use ringraft_net::{PeerConfig, Referral};
use ringraft_wal::disk::Disk;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::SocketAddr;
use std::ops::Bound;

/// A member is asked so often.
const ASK_INTERVAL_NS: u64 = 500_000_000;

#[derive(Default)]
pub(super) struct Referrals {
    ask_at_ns: u64,
    /// Who was asked last.
    asked: NodeId,
    /// Whom this node was referred to last.
    told: Option<Referral>,
    /// Whom it refers others to.
    given: Option<Referral>,
}

impl Referrals {
    /// Whom to look for the cluster at, besides those known otherwise.
    pub(super) fn told(&self) -> Option<(NodeId, SocketAddr)> {
        self.told.map(|to| (to.node, to.address))
    }
}

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// Asks the next member, if it is time to, and keeps what this node tells others up to date.
    pub(super) fn ask_around(&mut self) {
        let leader = self.leader_hint().map(|hint| Referral { node: hint.id, address: hint.address });
        let due = self.referrals_deadline() <= self.now.monotonic_ns;
        let next = if due { self.whom_to_ask() } else { None };
        let Some(network) = &mut self.network else { return };
        if self.referrals.given != leader {
            self.referrals.given = leader;
            network.refer_to(leader);
        }
        if due {
            self.referrals.ask_at_ns = self.now.monotonic_ns.saturating_add(ASK_INTERVAL_NS);
        }
        if let Some((node, address)) = next
            && network.ask(node, address, &mut self.link)
        {
            self.referrals.asked = node;
        }
    }

    /// When the next member is to be asked.
    pub(super) fn referrals_deadline(&self) -> u64 {
        let seeks = match &self.life {
            Life::Forming(_) => self.config.join,
            Life::Running(raft) => {
                let leader = raft.leader().filter(|leader| *leader != self.config.node);
                let met = leader
                    .and_then(|leader| self.peers.get(&leader))
                    .is_some_and(|peer| peer.session.is_some());
                !self.members.view().is_member && !met && raft.leader() != Some(self.config.node)
            }
            _ => false,
        };
        if seeks && !self.closing && self.network.is_some() { self.referrals.ask_at_ns } else { u64::MAX }
    }

    /// The next one in the order of ids, of all who are known.
    fn whom_to_ask(&self) -> Option<(NodeId, SocketAddr)> {
        let mut known: BTreeMap<NodeId, SocketAddr> =
            self.config.members.iter().map(|member| (member.id, member.address)).collect();
        known.extend(self.members.addresses());
        known.extend(self.referrals.told());
        known.remove(&self.config.node);
        let behind = (Bound::Excluded(self.referrals.asked), Bound::Unbounded);
        let next = known.range(behind).next().or_else(|| known.first_key_value());
        next.map(|(node, address)| (*node, *address))
    }

    /// A member has answered.
    pub(super) fn referred(&mut self, by: NodeId, to: Option<Referral>) -> Result<(), StopError> {
        let to = to.filter(|to| to.node != self.config.node && self.referrals.told != Some(*to));
        let Some(to) = to.filter(|_| self.referrals_deadline() < u64::MAX) else { return Ok(()) };
        tracing::info!(node = %self.config.node, %by, leader = %to.node, address = %to.address, "the leader is looked for there");
        let before = self.referrals.told.replace(to);
        if !matches!(self.life, Life::Forming(_)) {
            // The peers are those of the configuration, and this one.
            self.members.changed();
            return Ok(());
        }
        let listed = |node| self.config.members.iter().any(|member| member.id == node);
        if let Some(before) = before.filter(|before| before.node != to.node && !listed(before.node)) {
            self.forget_peer(before.node)?;
        }
        let Some(network) = &mut self.network else { return Ok(()) };
        if let Entry::Vacant(vacant) = self.peers.entry(to.node) {
            match network.add_peer(PeerConfig { id: to.node, address: to.address, incarnation: None }) {
                Ok(()) => drop(vacant.insert(Peer::new())),
                Err(error) => tracing::error!(peer = %to.node, %error, "not added"),
            }
        }
        network.set_address(to.node, to.address);
        Ok(())
    }
}
