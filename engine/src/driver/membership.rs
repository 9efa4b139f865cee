//! The driver and the members: reads the configurations of the log before the core starts, keeps network and status in step
//! with the one in force, and brings what handles ask for to the core.
//!
//! **Whom a node has sessions with.** Every member of any configuration that is not yet overtaken by a committed one, whom a leader
//! still sends to, and the leader that it follows. A member that hears no leader takes up with those, too, that it is referred to
//! and that introduce themselves. A node that is in no configuration (one that joins) keeps to those whom it was started with, and
//! to the leader that these refer it to (`referrals`). Who is being added is met before it is a member, to learn its incarnation.
//!
//! **Where it looks for them.** A member that moves listens where it was until it has been told to listen elsewhere, and nobody can
//! tell from a log which of the two it is; and whoever was away knows only where the others were. So each is looked for wherever it
//! may be: at its address by the newest configuration first, then by the earlier ones that may count, then where the operator said
//! when this node was started, then where hearsay has it. Hearsay adds a place and replaces none, and who is there is settled by
//! the handshake alone.
//!
//! **Incarnations.** Members are pinned to the incarnation of the configuration in force. A node that hears no leader for a
//! while may go by an old configuration, in which the present leader has another directory: then it lets anybody of
//! these ids talk to it. From somebody with another incarnation than the configuration's it takes a leader's appends and
//! a candidate's requests, which are judged by terms and logs, and nothing that counts: no votes, no acks.

use super::referrals::HEARSAY_EACH_MAX;
use super::{Driver, GROUP, Life, take_block};
use crate::error::{LeaderHint, StopError};
use crate::membership::{ChangeError, Changed, Membership, MembershipChange, MembershipError};
use crate::raft::{Change, Configuration, Event, Member, Raft, Role};
use crate::requests::{MembersRequest, MembersSlot, REQUESTS_MAX};
use crate::state_machine::StateMachine;
use crate::wire;
use ringraft_block::{Incarnation, LogIndex, NodeId};
use ringraft_net::PeerConfig;
use ringraft_net::link::Link;
use ringraft_wal::disk::Disk;
use ringraft_wal::format::{BatchBuilder, BatchKind, BatchView, Seal, image_bytes_for, slot_bytes};
use ringraft_wal::{ReadError, StoredBatch};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

/// Reads of configurations.
const CONFIGURATION_READ: u64 = u64::MAX - 1;

/// After so many election time-outs without a leader a node no longer insists on the incarnations that it knows.
const PIN_TIMEOUTS: u64 = 4;

/// How many election time-outs a new member has to answer the leader, five seconds at least: it dials once a second.
const MEET_TIMEOUTS: u64 = 10;
const MEET_NS_MIN: u64 = 5_000_000_000;

/// Addresses of one member that the log tells: the newest ones. Of two it may be unknown which of them holds, since one change of the
/// members is under way at the most.
const LOGGED_MAX: usize = 4;
// What the operator says, and hearsay, have a place behind them.
const _: () = assert!(LOGGED_MAX + 1 + HEARSAY_EACH_MAX <= ringraft_net::ADDRESSES_MAX);

/// Where nodes may be, the best guess first.
type Addresses = BTreeMap<NodeId, Vec<SocketAddr>>;

#[derive(Default)]
pub(super) struct Members {
    /// Configurations are being read, before the core starts.
    starting: Option<Starting>,
    /// Batches that could not be read at the start and can be now.
    missed: VecDeque<LogIndex>,
    reading: Option<LogIndex>,
    /// Network and status are to be brought in step.
    stale: bool,
    /// Of the newest configuration, while it is not committed.
    open: Option<LogIndex>,
    leaderless_since_ns: Option<u64>,
    /// Peers are pinned to their incarnations.
    pins: bool,
    /// Where the members may be, by the configurations, the newest first, and by hearsay.
    addresses: Addresses,
    /// Who is being added.
    guests: BTreeMap<NodeId, SocketAddr>,
    /// What handles ask for, until the core can be asked.
    waiting: VecDeque<MembersRequest>,
    meeting: Option<Meeting>,
    tickets: u64,
    asked: BTreeMap<u64, Asker>,
    view: Arc<Membership>,
}

/// The start of a core that waits for the configurations of its log.
struct Starting {
    base: (LogIndex, Configuration),
    commit: LogIndex,
    lost: bool,
    wanted: VecDeque<LogIndex>,
    found: Vec<(LogIndex, Option<Configuration>)>,
}

/// A change whose new members have not all been met.
struct Meeting {
    change: MembershipChange,
    slot: MembersSlot<Changed>,
    until_ns: u64,
}

enum Asker {
    Change(MembersSlot<Changed>),
    ReserveId(MembersSlot<NodeId>),
}

impl Members {
    /// Whether a read with that token is this file's.
    pub(super) fn reads(&self, token: u64) -> bool {
        token == CONFIGURATION_READ
    }

    pub(super) fn view(&self) -> &Arc<Membership> {
        &self.view
    }

    pub(super) fn address_of(&self, id: NodeId) -> Option<SocketAddr> {
        self.addresses.get(&id)?.first().copied()
    }

    /// Where all of them may be, as far as a configuration or hearsay says so.
    pub(super) fn addresses(&self) -> impl Iterator<Item = (NodeId, SocketAddr)> + '_ {
        self.addresses.iter().flat_map(|(id, addresses)| addresses.iter().map(|address| (*id, *address)))
    }

    /// Whether one of them may be there.
    pub(super) fn may_be_at(&self, id: NodeId, address: SocketAddr) -> bool {
        self.addresses.get(&id).is_some_and(|addresses| addresses.contains(&address))
    }

    /// Who is being added, and where.
    pub(super) fn guests(&self) -> impl Iterator<Item = (NodeId, SocketAddr)> + '_ {
        self.guests.iter().map(|(id, address)| (*id, *address))
    }

    /// Whether this node insists on the members and incarnations of its own log: not while it hears no leader of them.
    pub(super) fn pins(&self) -> bool {
        self.pins
    }

    pub(super) fn changed(&mut self) {
        self.stale = true;
    }

    /// Whether network and status are yet to be brought in step.
    pub(super) fn is_stale(&self) -> bool {
        self.stale
    }

    /// The commit index has risen.
    pub(super) fn committed(&mut self, up_to: LogIndex) {
        self.stale |= self.open.is_some_and(|open| open <= up_to);
    }

    pub(super) fn next_deadline(&self, patience_ns: u64) -> u64 {
        let pins = self.leaderless_since_ns.filter(|_| self.pins);
        let pins = pins.map_or(u64::MAX, |since| since.saturating_add(patience_ns));
        self.meeting.as_ref().map_or(u64::MAX, |meeting| meeting.until_ns).min(pins)
    }

    /// Somebody asks for something.
    pub(super) fn ask(&mut self, request: MembersRequest) {
        match self.waiting.len() < REQUESTS_MAX {
            true => self.waiting.push_back(request),
            false => request.refuse(MembershipError::Busy),
        }
    }

    /// The node stops: nobody is left waiting.
    pub(super) fn stop(&mut self, error: &MembershipError) {
        self.waiting.drain(..).for_each(|request| request.refuse(error.clone()));
        if let Some(meeting) = self.meeting.take() {
            meeting.slot.complete(Err(error.clone()));
        }
        for asker in std::mem::take(&mut self.asked).into_values() {
            asker.answer(Err(error.clone()));
        }
    }
}

impl Asker {
    fn answer(self, outcome: Result<Changed, MembershipError>) {
        match self {
            Self::Change(slot) => slot.complete(outcome),
            // An id that was not reserved is none.
            Self::ReserveId(slot) => slot.complete(outcome.and_then(|changed| {
                changed.reserved.ok_or(MembershipError::Change(ChangeError::LeadershipLost))
            })),
        }
    }
}

/// `id` may also be there.
fn add_address(addresses: &mut Addresses, id: NodeId, address: SocketAddr) {
    let known = addresses.entry(id).or_default();
    if !known.contains(&address) {
        known.push(address);
    }
}

/// What is dialed there is dialed there first.
pub(super) fn put_first(addresses: &mut Vec<SocketAddr>, address: SocketAddr) {
    addresses.retain(|known| *known != address);
    addresses.insert(0, address);
}

/// The configuration in a batch of kind membership.
pub(super) fn configuration_in(view: BatchView<'_>) -> Option<Configuration> {
    let mut commands = view.commands();
    let configuration = wire::configuration::decode(commands.next()?.bytes)?;
    commands.next().is_none().then_some(configuration)
}

// The start.

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// `base`, with its place in the log, was in force at `commit`: reads the configurations that the log holds behind it,
    /// then starts the core.
    pub(super) fn read_changes(
        &mut self,
        base: (LogIndex, Configuration),
        commit: LogIndex,
        lost: bool,
    ) -> Result<(), StopError> {
        let batches = self.wal.batches().filter(|info| info.kind == BatchKind::Membership);
        let wanted = batches.map(|info| info.first).filter(|first| *first > commit).collect();
        self.members.starting = Some(Starting { base, commit, lost, wanted, found: Vec::new() });
        self.read_configurations()
    }

    fn read_configurations(&mut self) -> Result<(), StopError> {
        if let Some(starting) = &mut self.members.starting {
            while let Some(first) =
                starting.wanted.front().copied().filter(|first| self.wal.is_damaged(*first))
            {
                starting.wanted.pop_front();
                starting.found.push((first, None));
            }
            let Some(first) = starting.wanted.front().copied() else {
                let Some(starting) = self.members.starting.take_if(|_| !self.closing) else { return Ok(()) };
                return self.begin_core(starting.base, starting.found, starting.commit, starting.lost);
            };
            self.wal.read(&mut self.disk, CONFIGURATION_READ, first, 1);
            return Ok(());
        }
        while self.members.reading.is_none()
            && let Some(first) = self.members.missed.pop_front()
        {
            let unread = self.raft().is_some_and(|raft| raft.configuration_at(first).is_none());
            if unread && !self.closing {
                self.members.reading = Some(first);
                self.wal.read(&mut self.disk, CONFIGURATION_READ, first, 1);
            }
        }
        Ok(())
    }

    /// One of them has been read, or cannot be.
    pub(super) fn configuration_read(
        &mut self,
        result: Result<Vec<StoredBatch<D::Buf>>, ReadError>,
    ) -> Result<(), StopError> {
        let starting = self.members.starting.as_ref();
        let wanted = self.members.reading.take().or_else(|| starting?.wanted.front().copied());
        let Some(first) = wanted else { return Ok(()) };
        let batch = match result {
            Ok(batches) => batches.into_iter().find(|batch| batch.info.first == first),
            Err(ReadError::NotFound { .. } | ReadError::Truncated | ReadError::Busy) => None,
            Err(ReadError::Damaged { .. }) => {
                if let Some(starting) = &mut self.members.starting {
                    starting.wanted.pop_front();
                    starting.found.push((first, None));
                }
                return self.read_configurations();
            }
            Err(ReadError::Stopped) => return Ok(()),
            Err(error) => return Err(StopError::Read(error)),
        };
        let Some(batch) = batch else { return self.read_configurations() };
        let configuration = BatchView::trusted(batch.image()).ok().and_then(configuration_in);
        let configuration = configuration.ok_or_else(|| undecodable(first))?;
        match &mut self.members.starting {
            Some(starting) => {
                starting.wanted.pop_front();
                starting.found.push((first, Some(configuration)));
            }
            None => {
                let configuration = Box::new(configuration);
                self.step(Event::ConfigurationFound { index: first, configuration })?;
            }
        }
        self.read_configurations()
    }

    /// A batch that could not be read can be.
    pub(super) fn configuration_repaired(&mut self, first: LogIndex) -> Result<(), StopError> {
        let kind = self.wal.batches().find(|info| info.first == first).map(|info| info.kind);
        if kind == Some(BatchKind::Membership) {
            self.members.missed.push_back(first);
            return self.read_configurations();
        }
        Ok(())
    }

    /// Seals what the core wants in the log.
    pub(super) fn seal_configuration(&mut self, configuration: Box<Configuration>) -> Result<(), StopError> {
        let Some((term, first)) = self.raft().and_then(Raft::next_position) else { return Ok(()) };
        let encoded = wire::configuration::encode(&configuration);
        let bytes = slot_bytes(image_bytes_for(1, 0, encoded.len()));
        let block = take_block(&self.pool, &mut self.disk, bytes).map_err(StopError::Memory)?;
        let mut builder = BatchBuilder::new(block);
        builder
            .push(&encoded, None)
            .map_err(|error| StopError::Invariant(format!("a configuration is too large: {error}")))?;
        let (previous_chain, previous_time) = self.tail();
        let time_ms = self.clock.time_of(self.config.node, self.now, previous_time);
        let kind = BatchKind::Membership;
        let (block, info) = builder.seal(Seal { group: GROUP, term, first, kind, time_ms, previous_chain });
        self.incoming = Some((block, info));
        self.step(Event::ProposedConfiguration { batch: super::run_of(&info), configuration })
    }
}

fn undecodable(index: LogIndex) -> StopError {
    StopError::Invariant(format!("the configuration at index {index} cannot be decoded: upgrade this node"))
}

// In step with the configuration.

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// Brings the network and the status in step with the configuration in force, and goes on with what handles asked for.
    pub(super) fn keep_members(&mut self) -> Result<(), StopError> {
        let Some(raft) = self.raft() else {
            while let Some(request) = self.members.waiting.pop_front() {
                request.refuse(MembershipError::NotLeader { leader: None });
            }
            return Ok(());
        };
        let now_ns = self.now.monotonic_ns;
        // One that the configuration here knows by another directory is let in until the log has told who it is.
        let known = raft.leader().filter(|leader| *leader == self.config.node || !self.is_foreign(*leader));
        let leaderless_since_ns = match known {
            Some(_) => None,
            None => self.members.leaderless_since_ns.or(Some(now_ns)),
        };
        let is_member = self.is_member(raft);
        let patience_ns = self.pin_patience_ns();
        let pins =
            is_member && leaderless_since_ns.is_none_or(|since| now_ns.saturating_sub(since) < patience_ns);
        self.members.leaderless_since_ns = leaderless_since_ns;
        if pins != self.members.pins {
            self.members.pins = pins;
            self.members.stale = true;
        }
        self.take_membership_requests()?;
        self.meet()?;
        if std::mem::take(&mut self.members.stale) { self.follow_members() } else { Ok(()) }
    }

    pub(super) fn pin_patience_ns(&self) -> u64 {
        self.election_timeout_ns().saturating_mul(PIN_TIMEOUTS)
    }

    fn election_timeout_ns(&self) -> u64 {
        u64::try_from(self.config.election_timeout.as_nanos()).unwrap_or(u64::MAX)
    }

    fn is_member(&self, raft: &Raft) -> bool {
        raft.configuration().member(self.config.node).is_some_and(|own| own.incarnation == self.incarnation)
    }

    /// Whether `peer` has another incarnation than the configuration says: nothing of it counts.
    pub(super) fn is_foreign(&self, peer: NodeId) -> bool {
        let member = self.raft().and_then(|raft| raft.configuration().member(peer));
        let session = self.peers.get(&peer).and_then(|peer| peer.session);
        member.is_some_and(|member| Some(member.incarnation) != session)
    }

    fn follow_members(&mut self) -> Result<(), StopError> {
        let Life::Running(raft) = &self.life else { return Ok(()) };
        let own = self.config.node;
        let is_member = self.is_member(raft);
        // From the configuration that is committed here on, whatever may be in force elsewhere.
        let committed = raft.configuration_at(raft.commit()).map_or(LogIndex(0), |(index, _)| index);
        let mut addresses = Addresses::new();
        for (_, configuration) in raft.configurations().rev().filter(|(index, _)| *index >= committed) {
            for member in configuration.members() {
                let Ok(address) = member.address.parse::<SocketAddr>() else {
                    tracing::warn!(node = %own, member = %member.id, address = member.address, "not an address");
                    continue;
                };
                if addresses.get(&member.id).is_none_or(|known| known.len() < LOGGED_MAX) {
                    add_address(&mut addresses, member.id, address);
                }
            }
        }
        // An overtaken configuration does not know who they are now.
        let mut pins: BTreeMap<NodeId, Incarnation> = BTreeMap::new();
        if self.members.pins {
            pins.extend(raft.configuration().members().iter().map(|member| (member.id, member.incarnation)));
        }
        // Until they know that they have left, they are sent to where they were.
        // (Who is being added again is met where the change says.)
        let leaving = raft.replicated_to().filter(|id| !self.members.guests.contains_key(id));
        for id in leaving.filter(|id| !addresses.contains_key(id)).collect::<Vec<_>>() {
            let member = raft.configurations().rev().find_map(|(_, configuration)| configuration.member(id));
            let of_log = member.and_then(|member| member.address.parse().ok());
            let before = self.members.addresses.get(&id).cloned();
            if let Some(before) = before.or_else(|| of_log.map(|address| vec![address])) {
                addresses.insert(id, before);
                pins.extend(member.filter(|_| self.members.pins).map(|member| (id, member.incarnation)));
            }
        }
        // A log that is caught up may pass a configuration without the very leader that sends it, which was added later.
        if let Some(leader) = raft.leader().filter(|leader| !addresses.contains_key(leader))
            && let Some(before) = self.members.addresses.get(&leader)
            && self.peers.get(&leader).is_some_and(|peer| peer.session.is_some())
        {
            addresses.insert(leader, before.clone());
        }
        // An old configuration may lack the present leader, and the candidate that needs this node's vote, or have them where they
        // are no more.
        let leader = raft.leader();
        self.referrals.forget(|id, address| {
            let is_known = addresses.get(&id).is_some_and(|known| known.contains(&address));
            is_known || leader.is_some_and(|leader| leader != id)
        });
        let mut wanted = addresses.clone();
        for member in &self.config.members {
            if !is_member || wanted.contains_key(&member.id) {
                add_address(&mut wanted, member.id, member.address);
            }
        }
        for (id, address) in &self.members.guests {
            add_address(&mut wanted, *id, *address);
        }
        let mut hearsay = Addresses::new();
        let told = self.referrals.told().filter(|_| !is_member);
        for (id, address) in self.referrals.acquaintances().chain(told) {
            if wanted.get(&id).is_none_or(|known| !known.contains(&address)) {
                add_address(&mut hearsay, id, address);
            }
        }
        for (id, address) in self.referrals.acquaintances() {
            add_address(&mut wanted, id, address);
            add_address(&mut addresses, id, address);
        }
        // Whoever refers this node to the leader knows better where that is than a list from long ago.
        if let Some((id, address)) = told {
            put_first(wanted.entry(id).or_default(), address);
        }
        wanted.remove(&own);
        let index = raft.configuration_index();
        self.members.open = (index > raft.commit()).then_some(index);
        self.members.addresses = addresses;
        let view = Membership { index, configuration: raft.configuration().clone(), is_member };
        if view != *self.members.view {
            tracing::info!(node = %own, %index, configuration = ?view.configuration, "members");
            self.members.view = Arc::new(view);
        }
        self.have_sessions_with(wanted, &hearsay, &pins)
    }

    /// Ends the session with `peer`, if there is one, and tells the core.
    pub(super) fn forget_peer(&mut self, peer: NodeId) -> Result<(), StopError> {
        if self.peers.remove(&peer).is_none() {
            return Ok(());
        }
        if let Some(network) = &mut self.network {
            network.remove_peer(peer);
        }
        self.repair.session_changed(peer);
        let leads = self.raft().and_then(Raft::leader) == Some(peer);
        self.snapshots.installs.session_changed(peer, leads);
        self.step(Event::PeerDisconnected { peer })
    }

    fn have_sessions_with(
        &mut self,
        wanted: Addresses,
        hearsay: &Addresses,
        pins: &BTreeMap<NodeId, Incarnation>,
    ) -> Result<(), StopError> {
        let gone: Vec<NodeId> = self.peers.keys().filter(|id| !wanted.contains_key(id)).copied().collect();
        if !gone.is_empty() {
            // Among what they are still to be told may be that they have left.
            self.send_queued();
        }
        for id in gone {
            self.forget_peer(id)?;
        }
        let Some(network) = &mut self.network else { return Ok(()) };
        for (id, addresses) in wanted {
            let Some(address) = addresses.first().copied() else { continue };
            let pin = pins.get(&id).copied();
            if let Entry::Vacant(vacant) = self.peers.entry(id) {
                if let Err(error) = network.add_peer(PeerConfig { id, address, incarnation: pin }) {
                    tracing::error!(peer = %id, %error, "not added");
                    continue;
                }
                vacant.insert(super::Peer::new());
            }
            network.set_addresses(id, &addresses, hearsay.get(&id).map_or(&[], Vec::as_slice));
            match pin {
                Some(incarnation) => network.pin(id, incarnation),
                None => network.unpin(id),
            }
        }
        Ok(())
    }
}

// What handles ask for.

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    fn take_membership_requests(&mut self) -> Result<(), StopError> {
        // A leader that has just been elected is ready in a moment, or leads no more.
        let soon = |raft: &Raft| raft.role() == Role::Leader && !raft.is_ready_for_changes();
        while (self.closing || !self.raft().is_some_and(soon))
            && let Some(request) = self.members.waiting.pop_front()
        {
            if self.closing {
                // It may lead still, and takes nothing up any more.
                request.refuse(MembershipError::Stopped(StopError::Requested.into()));
                continue;
            }
            let Some(raft) = self.raft().filter(|raft| raft.role() == Role::Leader) else {
                request.refuse(self.members_not_leader());
                continue;
            };
            match request {
                MembersRequest::Plan { change, slot } => {
                    let plan = raft.plan(&self.resolved(&change).0);
                    slot.complete(Ok(plan));
                }
                MembersRequest::ReserveId { slot } => {
                    let change = Change { reserve_id: true, ..Change::default() };
                    self.ask_for_change(change, Asker::ReserveId(slot))?;
                }
                MembersRequest::Change { change, slot } if self.members.meeting.is_none() => {
                    let patience_ns =
                        self.election_timeout_ns().saturating_mul(MEET_TIMEOUTS).max(MEET_NS_MIN);
                    let until_ns = self.now.monotonic_ns.saturating_add(patience_ns);
                    self.members.meeting = Some(Meeting { change, slot, until_ns });
                    self.meet()?;
                }
                MembersRequest::Change { slot, .. } => {
                    let index = raft.configuration_index();
                    slot.complete(Err(ChangeError::InProgress { index }.into()));
                }
            }
        }
        Ok(())
    }

    fn members_not_leader(&self) -> MembershipError {
        let leader: Option<LeaderHint> = self.leader_hint();
        MembershipError::NotLeader { leader }
    }

    /// The change as the core takes it, and who is still to be met.
    fn resolved(&self, change: &MembershipChange) -> (Change, Vec<(NodeId, SocketAddr)>) {
        let configuration = self.raft().map(Raft::configuration);
        let mut unmet = Vec::new();
        let add = change.add.iter().map(|new| {
            let member = configuration.and_then(|configuration| configuration.member(new.id));
            // Not by a session from before: that may be with the directory that has left.
            let guest = self.members.guests.contains_key(&new.id);
            let met = || self.peers.get(&new.id).and_then(|peer| peer.session).filter(|_| guest);
            let own = || (new.id == self.config.node).then_some(self.incarnation);
            let known =
                new.incarnation.or_else(|| member.map(|member| member.incarnation)).or_else(own).or_else(met);
            if known.is_none() {
                unmet.push((new.id, new.address));
            }
            // A plan can be made for somebody who has not been met.
            let incarnation = known.unwrap_or(Incarnation(u128::MAX));
            Member { id: new.id, incarnation, address: new.address.to_string(), role: new.role }
        });
        let change = Change {
            add: add.collect(),
            remove: change.remove.clone(),
            promote: change.promote.clone(),
            demote: change.demote.clone(),
            reserve_id: false,
            expected: change.expected,
            even_if_quorum_is_lost: change.even_if_quorum_is_lost,
        };
        (change, unmet)
    }

    /// Asks the core for the change that waits, once all its new members have been met.
    fn meet(&mut self) -> Result<(), StopError> {
        let Some(meeting) = &self.members.meeting else { return Ok(()) };
        let Some(raft) = self.raft() else { return Ok(()) };
        let (change, unmet) = self.resolved(&meeting.change);
        // What is refused anyway need not wait for anybody.
        let refused = raft.plan(&change).refused;
        let error = match (unmet.first(), refused) {
            _ if raft.role() != Role::Leader => Some(self.members_not_leader()),
            (_, Some(error)) => Some(error.into()),
            (Some((id, address)), None) if self.now.monotonic_ns >= meeting.until_ns => {
                Some(MembershipError::Unreachable { id: *id, address: *address })
            }
            (Some(_), None) => {
                for (id, address) in unmet {
                    if self.members.guests.insert(id, address).is_none() {
                        self.members.stale = true;
                        self.forget_peer(id)?;
                    }
                }
                return Ok(());
            }
            (None, None) => None,
        };
        let Some(meeting) = self.members.meeting.take() else { return Ok(()) };
        let outcome = match error {
            Some(error) => {
                meeting.slot.complete(Err(error));
                Ok(())
            }
            None => self.ask_for_change(change, Asker::Change(meeting.slot)),
        };
        // Whoever has become a member is known by the configuration.
        self.members.stale |= !self.members.guests.is_empty();
        self.members.guests.clear();
        outcome
    }

    fn ask_for_change(&mut self, change: Change, asker: Asker) -> Result<(), StopError> {
        self.members.tickets += 1;
        let ticket = self.members.tickets;
        self.members.asked.insert(ticket, asker);
        self.step(Event::Change { ticket, change: Box::new(change) })
    }

    /// The core has told what has become of a change.
    pub(super) fn change_ended(&mut self, ticket: u64, outcome: Result<Changed, ChangeError>) {
        if let Err(error) = &outcome {
            tracing::warn!(node = %self.config.node, %error, "change of the members");
        }
        if let Some(asker) = self.members.asked.remove(&ticket) {
            let outcome = match outcome {
                Err(ChangeError::NotLeader) => Err(self.members_not_leader()),
                outcome => outcome.map_err(MembershipError::from),
            };
            asker.answer(outcome);
        }
    }
}
