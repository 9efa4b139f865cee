//! How a node finds a leader that its own configuration does not name.
//!
//! **A node that joins.**
//! The leader has sessions with the members and with those whom it is adding. Of two nodes the one with the higher id dials, so
//! that the two meet only if each of them knows the other: the leader is told of the newcomer by whoever asks for the change,
//! the newcomer need only know some member. It asks one after the other whom to turn to, whichever id is the higher: that
//! takes no session, and changes nothing there (`ringraft_net::Network::ask`). A member refers it to the leader that it
//! follows; from then on the newcomer dials the leader, or lets it in when it dials.
//!
//! **A member that was away for long.** All whom its configuration names may have left meanwhile, or do not lead, and the
//! leader may be one that it has never heard of. It asks around as one that joins does.
//!
//! There may be no leader because this member's vote is wanted by a candidate that it does not know. So a member that hears no
//! leader asks all whom it knows, and says with the question where it listens itself; one that is asked and hears no leader
//! either takes up with it. (Votes are given to candidates outside the own configuration: Raft, section 4.1 of Ongaro's
//! thesis.)
//!
//! Nothing depends on the answer, or on the introduction, being true: it is one more place to look for the cluster, until a
//! configuration names this node or a leader is heard.

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

/// So many are remembered that are in no configuration here; the lowest ids are forgotten for new ones.
const ACQUAINTANCES_MAX: usize = 32;

#[derive(Default)]
pub(super) struct Referrals {
    ask_at_ns: u64,
    /// Who was asked last.
    asked: NodeId,
    /// Whom this node was referred to last.
    told: Option<Referral>,
    /// Whom it refers others to.
    given: Option<Referral>,
    /// Of a member that hears no leader: whom it was referred to, and who introduced themselves.
    acquaintances: BTreeMap<NodeId, SocketAddr>,
}

impl Referrals {
    /// Whom to look for the cluster at, besides those known otherwise.
    pub(super) fn told(&self) -> Option<(NodeId, SocketAddr)> {
        self.told.map(|to| (to.node, to.address))
    }

    /// Who may be members of a configuration that is not known here.
    pub(super) fn acquaintances(&self) -> impl Iterator<Item = (NodeId, SocketAddr)> + '_ {
        self.acquaintances.iter().map(|(id, address)| (*id, *address))
    }

    /// Has no more to do with acquaintances that `which` is true of.
    pub(super) fn forget(&mut self, which: impl Fn(NodeId, SocketAddr) -> bool) {
        self.acquaintances.retain(|id, address| !which(*id, *address));
    }

    /// Whether that is news.
    fn meet(&mut self, id: NodeId, address: SocketAddr) -> bool {
        let news = self.acquaintances.insert(id, address) != Some(address);
        while self.acquaintances.len() > ACQUAINTANCES_MAX {
            let first = self.acquaintances.keys().find(|known| **known != id).copied();
            self.acquaintances.retain(|known, _| Some(*known) != first);
        }
        news
    }
}

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// Asks the next member, if it is time to, and keeps what this node tells others up to date.
    pub(super) fn ask_around(&mut self) {
        let leader = self.leader_hint().map(|hint| Referral { node: hint.id, address: hint.address });
        let due = self.referrals_deadline() <= self.now.monotonic_ns;
        let next = if due { self.whom_to_ask() } else { None };
        let own = self.config.node;
        let configured =
            self.config.members.iter().find(|member| member.id == own).map(|member| member.address);
        let own_address = self.members.address_of(own).or(configured);
        let Some(network) = &mut self.network else { return };
        if self.referrals.given != leader {
            self.referrals.given = leader;
            network.refer_to(leader);
        }
        if due {
            self.referrals.ask_at_ns = self.now.monotonic_ns.saturating_add(ASK_INTERVAL_NS);
        }
        if next.is_some() {
            network.introduce_at(own_address);
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
                let strange = !self.members.view().is_member || !self.members.pins();
                strange && !met && raft.leader() != Some(self.config.node)
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
            self.referrals.meet(to.node, to.address);
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

    /// Another node has asked this one, and said where it listens. To a member that hears no leader it may be the candidate that
    /// lacks this vote.
    pub(super) fn introduced(&mut self, by: NodeId, address: SocketAddr) {
        let leaderless = self.raft().is_some_and(|raft| raft.leader().is_none()) && !self.members.pins();
        if !leaderless || self.closing || by == self.config.node {
            return;
        }
        let known = self.members.address_of(by) == Some(address);
        if !known && self.referrals.meet(by, address) {
            tracing::info!(node = %self.config.node, peer = %by, %address, "not the address that the configuration has");
            self.members.changed();
        }
    }
}
