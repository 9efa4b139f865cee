//! Snapshots on their way from a leader to a member that its log no longer reaches.
//!
//! Happy path: the core names the member; it is offered the newest snapshot; it asks for one piece of the file after the
//! other, a few at a time; it writes them to a file of its own, reads that back, compares the digest with the one offered, and
//! gives it its name; the core is told, which starts the log behind it; the machine is restored from the file.
//!
//! The receiver leads: it knows what it has. When the session ends, another leader comes, or the receiver restarts, an offer
//! of the same bytes goes on where it stopped, and any other begins anew (`receiver`). A sender that is asked for nothing for
//! a while offers once more, and a receiver that has got nothing for a while asks anew, so that what either of them has
//! forgotten (a leader that was deposed and is back, say) holds nothing up. Pieces wait for the throttle and for
//! room in the network's queue, which appends do not share with them beyond a few pieces, so that a transfer delays neither
//! heartbeats nor commits.

mod doubt;
mod receiver;

use super::snapshots::{Throttle, tools};
use super::{Driver, GROUP};
use crate::config::Config;
use crate::error::StopError;
use crate::handle::InstallStatus;
use crate::raft::{Event, ReplicationState, Role};
use crate::snapshots::files::{FileFailure, Tools};
use crate::snapshots::{SnapshotFile, SnapshotMeta, name_of};
use crate::state_machine::StateMachine;
use crate::wire::{self, Encoder, OfferMessage, PieceMessage, RequestMessage, Requested};
use doubt::Doubt;
use receiver::Receiving;
use ringraft_block::{BLOCK_BYTES, BlockBuf, LogIndex, NodeId, SharedBlock, crc32c};
use ringraft_net::Network;
use ringraft_net::link::Link;
use ringraft_wal::disk::{Access, Disk, DiskDone, DiskOp, DiskOpId, DiskOutput, FileId};
use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

/// What travels at once.
pub(crate) const PIECE_BYTES: usize = 64 << 10;
/// Pieces that a receiver has asked for and not yet written.
const WINDOW: u64 = 8;

/// Transfers in both directions.
pub(super) struct Installs<B: BlockBuf> {
    throttle: Throttle,
    patience_ns: u64,
    /// Members that the core wants served, and members that have asked.
    wanted: BTreeSet<NodeId>,
    asking: BTreeSet<NodeId>,
    serving: Vec<Serving>,
    receiving: Option<Receiving<B>>,
    /// What an earlier process received, not all of it: its last index and digest. Not while it is being received.
    pub(super) partial: Option<(LogIndex, [u8; 16])>,
    /// What is to be received when the removal of what was received so far is through.
    next_offer: Option<(NodeId, OfferMessage)>,
    /// Whose snapshot is being installed.
    installing: Option<NodeId>,
    outgoing: VecDeque<(NodeId, Outgoing<B>)>,
    /// A snapshot of this node that is being read again.
    doubt: Option<Doubt>,
    ask_at_ns: u64,
    /// Since when what is to be applied next cannot be read here.
    stuck_since_ns: Option<u64>,
}

enum Outgoing<B: BlockBuf> {
    Offer(OfferMessage),
    Request(RequestMessage),
    Piece(PieceMessage, SharedBlock<B>, usize),
}

/// A snapshot on its way to a member.
struct Serving {
    /// None: it has ended, and the file is to be closed.
    to: Option<NodeId>,
    file: SnapshotFile,
    wanted: VecDeque<u64>,
    sent: u64,
    /// When it is offered once more if nothing is asked for by then: a node that is just starting hears no offers, and what it
    /// asked for in an earlier transfer is not known here.
    offer_at_ns: u64,
    descriptor: Option<FileId>,
    op: Option<DiskOpId>,
    reading: Option<u64>,
}

impl<B: BlockBuf> Installs<B> {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            throttle: Throttle::new(config.snapshot_bytes_per_second),
            patience_ns: u64::try_from(config.election_timeout.as_nanos()).unwrap_or(u64::MAX),
            wanted: BTreeSet::new(),
            asking: BTreeSet::new(),
            serving: Vec::new(),
            receiving: None,
            partial: None,
            next_offer: None,
            installing: None,
            outgoing: VecDeque::new(),
            doubt: None,
            ask_at_ns: 0,
            stuck_since_ns: None,
        }
    }

    pub(super) fn wanted_by(&mut self, peer: NodeId) {
        self.wanted.insert(peer);
    }

    /// The lowest end of a snapshot on its way: the log behind it is wanted next.
    pub(super) fn floor(&self) -> Option<LogIndex> {
        self.serving
            .iter()
            .filter(|serving| serving.to.is_some())
            .map(|serving| serving.file.meta.last.index)
            .min()
    }

    pub(super) fn is_serving(&self, last: LogIndex) -> bool {
        self.serving.iter().any(|serving| serving.file.meta.last.index == last)
    }

    pub(super) fn next_deadline(&self, now_ns: u64) -> u64 {
        let idle = |serving: &&Serving| serving.op.is_none() && serving.to.is_some();
        let reads = self.serving.iter().filter(idle).any(|serving| !serving.wanted.is_empty());
        let reads = if reads { self.throttle.next_at_ns().max(now_ns) } else { u64::MAX };
        let offers = self.serving.iter().filter(|serving| serving.is_unasked());
        let offers = offers.map(|serving| serving.offer_at_ns);
        offers.min().map_or(reads, |offer| reads.min(offer.max(now_ns)))
    }

    /// Whether nothing is under way, in either direction.
    pub(super) fn is_at_rest(&self) -> bool {
        let wanted = !self.wanted.is_empty() || !self.asking.is_empty() || self.next_offer.is_some();
        let sends = !self.serving.is_empty() || !self.outgoing.is_empty();
        !(wanted || sends || self.receiving.is_some() || self.doubt.is_some())
    }

    pub(super) fn status(&self) -> Vec<InstallStatus> {
        let outgoing = self.serving.iter().filter_map(|serving| {
            let (last, bytes) = (serving.file.meta.last.index, serving.file.file_bytes);
            Some(InstallStatus { peer: serving.to?, incoming: false, last, bytes_done: serving.sent, bytes })
        });
        outgoing.chain(self.receiving.iter().filter_map(Receiving::status)).collect()
    }

    /// A session began or ended: what was under way in it is void. `leads`: that of the leader, who can be asked again.
    pub(super) fn session_changed(&mut self, peer: NodeId, leads: bool) {
        self.outgoing.retain(|(to, _)| *to != peer);
        self.wanted.remove(&peer);
        self.asking.remove(&peer);
        self.stop_serving(|to| to == peer);
        if let Some(receiving) = self.receiving.as_mut().filter(|receiving| receiving.from == Some(peer)) {
            receiving.from = None;
        }
        self.next_offer = self.next_offer.filter(|(from, _)| *from != peer);
        self.installing = self.installing.filter(|from| *from != peer);
        if leads {
            self.ask_at_ns = 0;
        }
    }

    /// This node does not lead any more.
    pub(super) fn deposed(&mut self) {
        self.wanted.clear();
        self.asking.clear();
        self.stop_serving(|_| true);
        self.outgoing.retain(|(_, message)| matches!(message, Outgoing::Request(_)));
    }

    fn stop_serving(&mut self, ended: impl Fn(NodeId) -> bool) {
        for serving in &mut self.serving {
            serving.to = serving.to.filter(|to| !ended(*to));
        }
    }

    fn answer(&mut self, to: NodeId, offer: &OfferMessage, what: Requested, offset: u64) {
        let OfferMessage { last, digest, .. } = *offer;
        let request = RequestMessage { last, digest, offset, what };
        self.outgoing.push_back((to, Outgoing::Request(request)));
    }

    /// Moves what waits to the network, as far as that has room.
    pub(super) fn send<L: Link<Buf = B>>(&mut self, network: &mut Network<L>, encoder: &mut Encoder) {
        if self.outgoing.is_empty() {
            return;
        }
        let mut full = BTreeSet::new();
        let mut kept = VecDeque::new();
        while let Some((to, message)) = self.outgoing.pop_front() {
            let (kind, body, attachment): (_, _, Option<(_, Range<usize>)>) = match &message {
                Outgoing::Offer(offer) => (wire::kind::SNAPSHOT_OFFER, encoder.offer(offer), None),
                Outgoing::Request(request) => (wire::kind::SNAPSHOT_REQUEST, encoder.request(request), None),
                Outgoing::Piece(piece, block, bytes) => {
                    let attachment = Some((block.clone(), 0..*bytes));
                    (wire::kind::SNAPSHOT_PIECE, encoder.piece(piece), attachment)
                }
            };
            let waits = full.contains(&to)
                || matches!(
                    network.send(to, kind, GROUP, body, attachment),
                    Err(ringraft_net::SendError::Full)
                );
            if waits {
                full.insert(to);
                kept.push_back((to, message));
            }
        }
        self.outgoing = kept;
    }
}

fn offer_of(file: &SnapshotFile) -> OfferMessage {
    let SnapshotMeta { last, chain, .. } = file.meta;
    OfferMessage { last, chain, digest: file.digest, bytes: file.file_bytes }
}

impl Serving {
    fn is(&self, to: NodeId, request: &RequestMessage) -> bool {
        self.to == Some(to) && self.file.digest == request.digest && self.file.meta.last == request.last
    }

    /// All that was asked for has been sent.
    fn is_unasked(&self) -> bool {
        self.to.is_some() && self.op.is_none() && self.wanted.is_empty()
    }
}

// The sender.

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// Does what is due, a piece of each.
    pub(super) fn mind_installs(&mut self) -> Result<(), StopError> {
        self.doubt_on();
        self.offer_to_those_who_need_one()?;
        self.serve()?;
        self.receive_on();
        self.ask_for_state();
        Ok(())
    }

    fn offer_to_those_who_need_one(&mut self) -> Result<(), StopError> {
        let needs = |driver: &Self, peer: NodeId| {
            let progress = driver.raft().and_then(|raft| raft.progress(peer));
            progress.is_some_and(|progress| progress.state == ReplicationState::Snapshot)
        };
        // Whoever has come by what it needs in another way needs no more of it.
        for at in 0..self.snapshots.installs.serving.len() {
            let to = self.snapshots.installs.serving[at].to;
            if to.is_some_and(|to| !needs(self, to) && !self.snapshots.installs.asking.contains(&to)) {
                self.snapshots.installs.serving[at].to = None;
            }
        }
        if self.snapshots.installs.wanted.is_empty() && self.snapshots.installs.asking.is_empty() {
            return Ok(());
        }
        let wanted = std::mem::take(&mut self.snapshots.installs.wanted);
        for to in wanted.into_iter().chain(self.snapshots.installs.asking.clone()) {
            let served = self.snapshots.installs.serving.iter().any(|serving| serving.to == Some(to));
            let connected = self.peers.get(&to).is_some_and(|peer| peer.session.is_some());
            if served || !needs(self, to) && !self.snapshots.installs.asking.contains(&to) {
                continue;
            }
            let start = self.raft().map_or(LogIndex(0), |raft| raft.log_start().index);
            let newest = self.snapshots.newest().filter(|file| file.meta.last.index >= start).cloned();
            match newest.filter(|file| !self.snapshots.installs.doubts(file.meta.last.index)) {
                Some(file) if connected => self.offer(to, file),
                // There will be one, or it is known that there is none.
                None if connected && self.snapshots.is_soon_another() => {
                    self.snapshots.installs.wanted.insert(to);
                }
                _ => {
                    self.snapshots.installs.asking.remove(&to);
                    self.step(Event::SnapshotEnded { to, installed: None })?;
                }
            }
        }
        Ok(())
    }

    fn offer(&mut self, to: NodeId, file: SnapshotFile) {
        let last = file.meta.last.index;
        tracing::info!(node = %self.config.node, %to, %last, bytes = file.file_bytes, "a snapshot is offered");
        let op = tools!(self).submit(DiskOp::Open { name: name_of(last), access: Access::Read });
        let installs = &mut self.snapshots.installs;
        installs.outgoing.push_back((to, Outgoing::Offer(offer_of(&file))));
        let (wanted, sent, descriptor, reading) = (VecDeque::new(), 0, None, None);
        let (to, op) = (Some(to), Some(op));
        let offer_at_ns = self.now.monotonic_ns.saturating_add(installs.patience_ns);
        installs.serving.push(Serving { to, file, wanted, sent, offer_at_ns, descriptor, op, reading });
    }

    /// Reads the next piece for a member, if the throttle allows, and closes what has ended.
    fn serve(&mut self) -> Result<(), StopError> {
        let now = self.now.monotonic_ns;
        let super::snapshots::Snapshots { ops, installs, .. } = &mut self.snapshots;
        let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
        installs.serving.retain_mut(|serving| {
            if serving.op.is_some() {
                return true;
            }
            match (serving.to, serving.descriptor) {
                (None, Some(file)) => {
                    serving.descriptor = None;
                    serving.op = Some(tools.submit(DiskOp::Close { file }));
                    true
                }
                (None, None) => false,
                (Some(_), _) => true,
            }
        });
        let due = |serving: &&mut Serving| serving.is_unasked() && now >= serving.offer_at_ns;
        for serving in installs.serving.iter_mut().filter(due) {
            serving.offer_at_ns = now.saturating_add(installs.patience_ns);
            // Unless the network has yet to take what was sent last.
            if let Some(to) = serving.to.filter(|to| installs.outgoing.iter().all(|(other, _)| other != to)) {
                installs.outgoing.push_back((to, Outgoing::Offer(offer_of(&serving.file))));
            }
        }
        if !installs.throttle.is_open(now) {
            return Ok(());
        }
        // Whoever has waited longest.
        let idle =
            |serving: &Serving| serving.op.is_none() && serving.to.is_some() && !serving.wanted.is_empty();
        let Some(at) = installs.serving.iter().position(idle) else { return Ok(()) };
        let mut serving = installs.serving.remove(at);
        let mut ended = None;
        if let (Some(file), Some(offset)) = (serving.descriptor, serving.wanted.pop_front()) {
            match tools.block(PIECE_BYTES) {
                Ok(block) => {
                    let bytes = PIECE_BYTES.min((serving.file.file_bytes - offset) as usize);
                    serving.op = Some(tools.submit(DiskOp::Read { file, offset, block, bytes }));
                    serving.reading = Some(offset);
                    installs.throttle.spend(bytes as u64, now);
                }
                // The core comes back to it after a while.
                Err(failure) => ended = serving.to.take().map(|to| (to, failure)),
            }
        }
        installs.serving.push(serving);
        match ended {
            Some((to, failure)) => self.serving_failed(to, &failure),
            None => Ok(()),
        }
    }

    /// A member is not sent a snapshot for the moment, for a reason of this node's.
    fn serving_failed(&mut self, to: NodeId, why: &FileFailure) -> Result<(), StopError> {
        tracing::warn!(node = %self.config.node, %to, %why, "a snapshot cannot be read for another member");
        self.snapshots.installs.asking.remove(&to);
        self.step(Event::SnapshotEnded { to, installed: None })
    }

    pub(super) fn on_snapshot_request(
        &mut self,
        from: NodeId,
        request: RequestMessage,
    ) -> Result<(), StopError> {
        let leads = self.raft().is_some_and(|raft| raft.role() == Role::Leader);
        let installs = &mut self.snapshots.installs;
        match request.what {
            Requested::Any => {
                // It says what it needs more than.
                let newer =
                    self.snapshots.newest().is_some_and(|file| file.meta.last.index > request.last.index);
                if leads && newer {
                    self.snapshots.installs.asking.insert(from);
                } else if leads {
                    self.snapshots.take_soon();
                }
                Ok(())
            }
            Requested::Piece => {
                let patience_ns = installs.patience_ns;
                let Some(serving) = installs.serving.iter_mut().find(|serving| serving.is(from, &request))
                else {
                    return Ok(());
                };
                // It asks no further ahead of what it has written: it has what lies before.
                let span = WINDOW * PIECE_BYTES as u64;
                serving.wanted.retain(|offset| offset.saturating_add(span) > request.offset);
                if serving.reading == Some(request.offset) || serving.wanted.contains(&request.offset) {
                    return Ok(());
                }
                let right = request.offset.is_multiple_of(BLOCK_BYTES as u64)
                    && request.offset < serving.file.file_bytes
                    && (serving.wanted.len() as u64) < 2 * WINDOW;
                if !right {
                    return self.refuse(from, "a request for what is no piece of a snapshot");
                }
                serving.wanted.push_back(request.offset);
                serving.offer_at_ns = self.now.monotonic_ns.saturating_add(patience_ns);
                Ok(())
            }
            Requested::Installed | Requested::Refused => {
                let known = installs.serving.iter_mut().find(|serving| serving.is(from, &request));
                let Some(serving) = known else { return Ok(()) };
                serving.to = None;
                let all_of_it = serving.sent == serving.file.file_bytes;
                installs.asking.remove(&from);
                if all_of_it && request.what == Requested::Refused {
                    self.doubt(request.last.index);
                }
                let installed = (request.what == Requested::Installed).then_some(request.last);
                tracing::info!(node = %self.config.node, to = %from, ?installed, "a snapshot's transfer has ended");
                self.step(Event::SnapshotEnded { to: from, installed })
            }
        }
    }

    /// Takes a completion that is for a transfer.
    pub(super) fn on_install_disk(&mut self, done: DiskDone<D::Buf>) -> Result<(), StopError> {
        let installs = &mut self.snapshots.installs;
        if installs.receiving.as_ref().is_some_and(|receiving| receiving.awaits(done.id)) {
            return self.on_receiving(done);
        }
        if installs.doubt.as_ref().is_some_and(|doubt| doubt.awaits(done.id)) {
            return self.on_doubted(done);
        }
        let now = self.now.monotonic_ns;
        let Some(serving) = installs.serving.iter_mut().find(|serving| serving.op == Some(done.id)) else {
            return Ok(());
        };
        serving.op = None;
        let reading = serving.reading.take();
        match (done.result, reading) {
            (Ok(DiskOutput::Opened { file, .. }), _) => serving.descriptor = Some(file),
            (Ok(DiskOutput::Read { block, bytes }), Some(offset)) => {
                let Some(to) = serving.to else { return Ok(()) };
                let crc = crc32c(block.get(..bytes).unwrap_or_default());
                serving.sent = serving.sent.max(offset + bytes as u64);
                serving.offer_at_ns = now.saturating_add(installs.patience_ns);
                let piece =
                    PieceMessage { last: serving.file.meta.last, digest: serving.file.digest, offset, crc };
                installs.outgoing.push_back((to, Outgoing::Piece(piece, block.share(), bytes)));
            }
            (Err(error), _) => {
                let (to, last) = (serving.to.take(), serving.file.meta.last.index);
                if let Some(to) = to {
                    self.doubt(last);
                    return self.serving_failed(to, &error.into());
                }
            }
            (Ok(_), _) => {}
        }
        Ok(())
    }
}
