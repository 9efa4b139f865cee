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
//! A leader, too, asks members that it has no session with, for them to learn of it: such a member may have slept through all
//! that made it the leader, and nobody be left who follows it and could refer the member to it.
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
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::ops::Bound;

/// A member is asked so often.
const ASK_INTERVAL_NS: u64 = 500_000_000;

/// So many are remembered that are in no configuration here; the oldest is forgotten for a new one.
const ACQUAINTANCES_MAX: usize = 32;

#[derive(Default)]
pub(super) struct Referrals {
    ask_at_ns: u64,
    /// As the last turn has found it ([`Driver::referrals_deadline`]).
    deadline_ns: u64,
    /// Who was asked last.
    asked: NodeId,
    /// Whom this node was referred to last.
    told: Option<Referral>,
    /// Whom it refers others to.
    given: Option<Referral>,
    /// Of a member that hears no leader: whom it was referred to, and who introduced themselves.
    acquaintances: VecDeque<(NodeId, SocketAddr)>,
}

impl Referrals {
    /// When the next member is to be asked, after a turn.
    pub(super) fn next_deadline(&self) -> u64 {
        self.deadline_ns
    }

    /// Whom to look for the cluster at, besides those known otherwise.
    pub(super) fn told(&self) -> Option<(NodeId, SocketAddr)> {
        self.told.map(|to| (to.node, to.address))
    }

    /// Who may be members of a configuration that is not known here.
    pub(super) fn acquaintances(&self) -> impl Iterator<Item = (NodeId, SocketAddr)> + '_ {
        self.acquaintances.iter().copied()
    }

    /// Has no more to do with acquaintances that `which` is true of.
    pub(super) fn forget(&mut self, which: impl Fn(NodeId) -> bool) {
        self.acquaintances.retain(|(id, _)| !which(*id));
    }

    fn has_met(&self, id: NodeId) -> bool {
        self.acquaintances.iter().any(|(known, _)| *known == id)
    }

    /// Whether that is news.
    fn meet(&mut self, id: NodeId, address: SocketAddr) -> bool {
        if self.acquaintances.contains(&(id, address)) {
            return false;
        }
        self.acquaintances.retain(|(known, _)| *known != id);
        if self.acquaintances.len() == ACQUAINTANCES_MAX {
            self.acquaintances.pop_front();
        }
        self.acquaintances.push_back((id, address));
        true
    }
}

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// Asks the next member, if it is time to, and keeps what this node tells others up to date.
    pub(super) fn ask_around(&mut self) {
        let leader = self.leader_hint().map(|hint| Referral { node: hint.id, address: hint.address });
        self.referrals.deadline_ns = self.referrals_deadline();
        let due = self.referrals.deadline_ns <= self.now.monotonic_ns;
        let next = if due { self.whom_to_ask() } else { None };
        let Some(network) = &mut self.network else { return };
        if self.referrals.given != leader {
            self.referrals.given = leader;
            network.refer_to(leader);
        }
        if due {
            self.referrals.ask_at_ns = self.now.monotonic_ns.saturating_add(ASK_INTERVAL_NS);
            self.referrals.deadline_ns = self.referrals.ask_at_ns;
        }
        let Some((node, address)) = next else { return };
        let own = self.config.node;
        let configured =
            self.config.members.iter().find(|member| member.id == own).map(|member| member.address);
        // What an operator says of this node is newer than what an old log does.
        network.introduce_at(configured.or_else(|| self.members.address_of(own)));
        if network.ask(node, address, &mut self.link) {
            self.referrals.asked = node;
        }
    }

    /// When the next member is to be asked.
    fn referrals_deadline(&self) -> u64 {
        let seeks = match &self.life {
            Life::Forming(_) => self.config.join,
            Life::Running(raft) if raft.leader() == Some(self.config.node) => self.unmet().next().is_some(),
            Life::Running(raft) => {
                let met = raft.leader().is_some_and(|leader| self.has_session_with(leader));
                let strange = !self.members.view().is_member || !self.members.pins();
                strange && !met
            }
            _ => false,
        };
        if seeks && !self.closing && self.network.is_some() { self.referrals.ask_at_ns } else { u64::MAX }
    }

    /// Members of the configuration in force that there is no session with.
    fn unmet(&self) -> impl Iterator<Item = NodeId> + '_ {
        let members = self.raft().map(|raft| raft.configuration().members()).unwrap_or_default();
        let others = members.iter().map(|member| member.id).filter(|id| *id != self.config.node);
        others.filter(|id| !self.has_session_with(*id))
    }

    fn leads_now(&self) -> bool {
        self.raft().is_some_and(|raft| raft.leader() == Some(self.config.node))
    }

    /// The next one in the order of ids, of all who are known; of a leader, of those whom it misses.
    fn whom_to_ask(&self) -> Option<(NodeId, SocketAddr)> {
        let mut known: BTreeMap<NodeId, SocketAddr> =
            self.config.members.iter().map(|member| (member.id, member.address)).collect();
        known.extend(self.members.addresses());
        known.extend(self.referrals.told());
        known.remove(&self.config.node);
        if self.leads_now() {
            let unmet: Vec<NodeId> = self.unmet().collect();
            known.retain(|id, _| unmet.contains(id));
        }
        let behind = (Bound::Excluded(self.referrals.asked), Bound::Unbounded);
        let next = known.range(behind).next().or_else(|| known.first_key_value());
        next.map(|(node, address)| (*node, *address))
    }

    /// A member has answered.
    pub(super) fn referred(&mut self, by: NodeId, to: Option<Referral>) -> Result<(), StopError> {
        let Some(to) = to.filter(|to| to.node != self.config.node) else { return Ok(()) };
        if self.referrals_deadline() == u64::MAX || self.leads_now() {
            return Ok(());
        }
        let met = !matches!(self.life, Life::Forming(_)) && self.take_up_with(to.node, to.address);
        if self.referrals.told == Some(to) && !met {
            return Ok(());
        }
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

    /// Another node has asked this one, and said where it listens. To a member that hears no leader it may be the candidate that
    /// lacks this vote.
    pub(super) fn introduced(&mut self, by: NodeId, address: SocketAddr) {
        let leaderless = self.raft().is_some_and(|raft| raft.leader().is_none()) && !self.members.pins();
        if !leaderless || self.closing || by == self.config.node {
            return;
        }
        if self.take_up_with(by, address) {
            tracing::info!(node = %self.config.node, peer = %by, %address, "met, though in no configuration here");
            self.members.changed();
        }
    }

    /// Remembers one that no configuration names; false if one does, or there is nothing new. What a configuration says of somebody
    /// is not replaced by hearsay.
    fn take_up_with(&mut self, id: NodeId, address: SocketAddr) -> bool {
        let named = self.members.address_of(id).is_some() && !self.referrals.has_met(id);
        !named && self.referrals.meet(id, address)
    }
}
