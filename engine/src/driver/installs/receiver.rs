//! The receiver of a snapshot: it knows what it has, asks for the rest, and installs the whole.
//!
//! What arrives goes to a file that is named by the digest of all the bytes, so that a process that is started anew finds it.
//! How much of it can be trusted the bytes say themselves: each slot has its checksum, and the first slot that is not right
//! ends what has arrived. From there on it is asked for, from whoever offers the same bytes. That much is also made durable
//! from time to time, since a loss of power otherwise takes what the disk still had in its cache.
//!
//! None of that is proof: before the file counts all of it is read back and compared with the digest, and a file that is not
//! what was offered is removed and the transfer begins anew. At most one file is kept for later; it goes when an offer of
//! other bytes comes, and when what has been applied here reaches its end.

use super::super::snapshots::{Snapshots, tools};
use super::super::{Driver, invariant};
use super::{Installs, PIECE_BYTES, WINDOW, offer_of};
use crate::error::StopError;
use crate::handle::InstallStatus;
use crate::raft::{Epoch, Event, LogId, Role};
use crate::snapshots::files::{FileFailure, Part, PartStep, ReadStep, Reading, Tools};
use crate::snapshots::{SnapshotFile, SnapshotMeta, partial_name_of};
use crate::state_machine::StateMachine;
use crate::wire::{self, OfferMessage, PieceMessage, Requested};
use ringraft_block::{BLOCK_BYTES, Block, BlockBuf, LogIndex, NodeId, SharedBlock, crc32c};
use ringraft_net::link::Link;
use ringraft_wal::disk::{Disk, DiskDone, DiskOpId};
use ringraft_wal::format::{ENVELOPE_BYTES, LogStart};
use std::collections::VecDeque;

/// What has arrived is made durable each time that so much has come: at the default rate, four times a second.
const SAVE_BYTES: u64 = 16 << 20;

/// A snapshot on its way here.
pub(super) struct Receiving<B: BlockBuf> {
    /// None: the session has ended; it goes on with the next offer of the same.
    pub(super) from: Option<NodeId>,
    offer: OfferMessage,
    file: Arriving,
    /// The file takes what arrives.
    is_open: bool,
    /// Nobody wants it any more: it ends with its file.
    given_up: bool,
    /// Written, without a gap.
    written: u64,
    /// In flight to the disk.
    writing: u64,
    /// Of what is written, made durable.
    saved: u64,
    /// Arrived behind that, in order.
    arrived: VecDeque<(SharedBlock<B>, usize)>,
    arrived_bytes: u64,
    /// Asked for in this session, without a gap.
    asked: u64,
    /// When it was begun, or asked for, or a piece of it came.
    heard_at_ns: u64,
}

/// The file that it goes to.
enum Arriving {
    /// What an earlier process has left of it is being verified.
    Checking(Reading),
    /// It is being made.
    Making(Part),
}

impl<B: BlockBuf> Receiving<B> {
    fn name(&self) -> String {
        partial_name_of(self.offer.last.index, self.offer.digest)
    }

    pub(super) fn awaits(&self, id: DiskOpId) -> bool {
        match &self.file {
            Arriving::Checking(reading) => reading.awaits(id),
            Arriving::Making(part) => part.awaits(id),
        }
    }

    pub(super) fn status(&self) -> Option<InstallStatus> {
        let OfferMessage { last, bytes, .. } = self.offer;
        let bytes_done = self.written;
        Some(InstallStatus { peer: self.from?, incoming: true, last: last.index, bytes_done, bytes })
    }

    /// Where what is still to come begins.
    fn next(&self) -> u64 {
        self.written + self.writing + self.arrived_bytes
    }

    /// Whether nothing has come for so long although something is to come.
    fn waits_for(&self, span_ns: u64, now_ns: u64) -> bool {
        let all = self.next() >= self.offer.bytes;
        self.is_open && !all && now_ns >= self.heard_at_ns.saturating_add(span_ns)
    }

    /// Ends it, and removes the file.
    fn give_up<D: Disk>(&mut self, tools: &mut Tools<'_, D>, why: FileFailure) {
        self.given_up = true;
        match &mut self.file {
            // When the read under way has ended.
            Arriving::Checking(_) => {}
            Arriving::Making(part) => part.fail(tools, why),
        }
    }
}

impl<B: BlockBuf> Installs<B> {
    /// Asks for what the window has room for.
    fn ask_on(&mut self) {
        let Some(receiving) = &mut self.receiving else { return };
        let Some(from) = receiving.from.filter(|_| receiving.is_open) else { return };
        let mut requests = Vec::new();
        let end = receiving.written.saturating_add(WINDOW * PIECE_BYTES as u64).min(receiving.offer.bytes);
        while receiving.asked < end {
            requests.push(receiving.asked);
            receiving.asked = receiving.asked.saturating_add(PIECE_BYTES as u64).min(receiving.offer.bytes);
        }
        let offer = receiving.offer;
        requests.into_iter().for_each(|offset| self.answer(from, &offer, Requested::Piece, offset));
    }
}

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// What this node needs more than.
    fn reached(&self) -> LogIndex {
        match self.raft() {
            Some(raft) if raft.is_state_lost() => raft.log_start().index.previous(),
            _ => self.applier.applied(),
        }
    }

    pub(in super::super) fn on_snapshot_offer(
        &mut self,
        from: NodeId,
        offer: OfferMessage,
    ) -> Result<(), StopError> {
        let Some(raft) = self.raft() else { return Ok(()) };
        let from_another = raft.leader().is_some_and(|leader| leader != from);
        let reached = self.reached();
        if from_another || raft.role() == Role::Leader {
            return Ok(());
        }
        if !offer.bytes.is_multiple_of(BLOCK_BYTES as u64) || offer.bytes < 2 * BLOCK_BYTES as u64 {
            return self.refuse(from, "an offer of what cannot be a snapshot");
        }
        let held = self.snapshots.files.iter().find(|file| offer_of(file) == offer).cloned();
        let restoring = self.snapshots.restoring.is_some();
        let now = self.now.monotonic_ns;
        let installs = &mut self.snapshots.installs;
        if offer.last.index <= reached {
            installs.answer(from, &offer, Requested::Installed, 0);
            return Ok(());
        }
        if installs.installing == Some(from) {
            // It will hear of it.
            return Ok(());
        }
        if restoring {
            // One at a time; it is offered again.
            return Ok(());
        }
        if let Some(file) = held {
            // Whole already, from a transfer whose end nobody heard of.
            return self.install_file(Some(from), file);
        }
        match &mut installs.receiving {
            Some(receiving) if receiving.given_up || receiving.offer != offer => {
                installs.next_offer = Some((from, offer));
                if !receiving.given_up {
                    let ops = &mut self.snapshots.ops;
                    let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
                    receiving.give_up(tools, FileFailure::Other);
                }
            }
            // The sender may have forgotten what it was asked for; pieces that come show that it has not.
            Some(receiving)
                if receiving.from == Some(from) && !receiving.waits_for(installs.patience_ns, now) => {}
            Some(receiving) => {
                tracing::info!(node = %self.config.node, %from, at = receiving.written, "a snapshot's transfer goes on");
                receiving.from = Some(from);
                receiving.asked = receiving.next();
                receiving.heard_at_ns = now;
                installs.ask_on();
            }
            None => self.receive(from, offer),
        }
        Ok(())
    }

    fn receive(&mut self, from: NodeId, offer: OfferMessage) {
        tracing::info!(
            node = %self.config.node, %from, last = %offer.last.index, bytes = offer.bytes, "a snapshot is received"
        );
        let name = partial_name_of(offer.last.index, offer.digest);
        // What was left of other bytes is of no use to anybody.
        let kept = self.snapshots.installs.partial.take();
        let Snapshots { leftovers, ops, .. } = &mut self.snapshots;
        leftovers.extend(kept.map(|(last, digest)| partial_name_of(last, digest)));
        let is_here = leftovers.contains(&name);
        leftovers.retain(|leftover| *leftover != name);
        let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
        let file = match is_here {
            true => Arriving::Checking(Reading::open(tools, self.config.cluster, name)),
            false => Arriving::Making(Part::create_durably(tools, self.config.cluster, &name, offer.bytes)),
        };
        self.snapshots.installs.receiving = Some(Receiving {
            from: Some(from),
            offer,
            file,
            is_open: false,
            given_up: false,
            written: 0,
            writing: 0,
            saved: 0,
            arrived: VecDeque::new(),
            arrived_bytes: 0,
            asked: 0,
            heard_at_ns: self.now.monotonic_ns,
        });
    }

    pub(in super::super) fn on_snapshot_piece(
        &mut self,
        from: NodeId,
        piece: PieceMessage,
        attachment: Option<(Block<D::Buf>, usize)>,
    ) -> Result<(), StopError> {
        let Some((block, bytes)) = attachment else {
            return self.refuse(from, "a piece of a snapshot without its bytes");
        };
        let Some(data) = block.get(ENVELOPE_BYTES..ENVELOPE_BYTES + bytes) else { return Ok(()) };
        if crc32c(data) != piece.crc {
            return self.refuse_attachment(from, "a damaged piece of a snapshot");
        }
        let Some(receiving) = &mut self.snapshots.installs.receiving else { return Ok(()) };
        let OfferMessage { last, digest, bytes: all, .. } = receiving.offer;
        let next = receiving.next();
        let expected = receiving.from == Some(from) && (last, digest) == (piece.last, piece.digest);
        // What was asked for in a session before, or by a transfer before.
        if !expected || !receiving.is_open || piece.offset != next {
            return Ok(());
        }
        let right = bytes as u64 == (all - next).min(PIECE_BYTES as u64);
        if !right {
            return self.refuse(from, "a piece of a snapshot of the wrong size");
        }
        let mut own = match tools!(self).block(PIECE_BYTES) {
            Ok(own) => own,
            Err(FileFailure::Disk(error)) => return Err(StopError::Memory(error)),
            Err(_) => return Ok(()),
        };
        // To the block's start, where direct I/O wants it.
        own[..bytes].copy_from_slice(data);
        let Some(receiving) = &mut self.snapshots.installs.receiving else { return Ok(()) };
        receiving.arrived.push_back((own.share(), bytes));
        receiving.arrived_bytes += bytes as u64;
        receiving.heard_at_ns = self.now.monotonic_ns;
        Ok(())
    }

    /// Writes the next piece, or goes on verifying.
    pub(super) fn receive_on(&mut self) {
        self.give_up_what_is_overtaken();
        let Snapshots { ops, installs, .. } = &mut self.snapshots;
        let Some(receiving) = &mut installs.receiving else { return };
        let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
        let part = match &mut receiving.file {
            Arriving::Checking(reading) if receiving.given_up && reading.is_idle() => {
                return reading.stop(tools, FileFailure::Other);
            }
            Arriving::Checking(reading) => return reading.next(tools),
            Arriving::Making(part) => part,
        };
        part.verify_on(tools);
        if !part.is_ready() {
            return;
        }
        if receiving.written == receiving.offer.bytes {
            part.finish(tools);
        } else if receiving.written - receiving.saved >= SAVE_BYTES {
            receiving.saved = receiving.written;
            part.flush(tools);
        } else if let Some((block, bytes)) = receiving.arrived.pop_front() {
            receiving.arrived_bytes -= bytes as u64;
            receiving.writing = bytes as u64;
            part.write(tools, receiving.written, block, bytes);
        }
    }

    /// What has been applied here may have reached the end of a snapshot in another way, from a leader whose log was longer.
    fn give_up_what_is_overtaken(&mut self) {
        let reached = self.reached();
        let Snapshots { ops, installs, leftovers, .. } = &mut self.snapshots;
        if let Some((last, digest)) = installs.partial.take_if(|(last, _)| *last <= reached) {
            leftovers.push_back(partial_name_of(last, digest));
        }
        if let Some(receiving) = &mut installs.receiving
            && receiving.offer.last.index <= reached
            && !receiving.given_up
        {
            let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
            receiving.give_up(tools, FileFailure::Other);
        }
    }

    pub(super) fn on_receiving(&mut self, done: DiskDone<D::Buf>) -> Result<(), StopError> {
        let reached = self.reached();
        let Snapshots { ops, installs, .. } = &mut self.snapshots;
        let Some(receiving) = &mut installs.receiving else { return Ok(()) };
        let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
        let step = match &mut receiving.file {
            Arriving::Checking(reading) => {
                if let ReadStep::Ended(found) = reading.handle(tools, done) {
                    let arrived = arrived_of(&receiving.offer, reading, found);
                    self.checked(arrived);
                }
                return Ok(());
            }
            Arriving::Making(part) => part.handle(tools, done),
        };
        match step {
            PartStep::Pending => Ok(()),
            PartStep::Ready => {
                receiving.written += std::mem::take(&mut receiving.writing);
                if !std::mem::replace(&mut receiving.is_open, true) {
                    receiving.heard_at_ns = self.now.monotonic_ns;
                }
                installs.ask_on();
                Ok(())
            }
            PartStep::Verified => {
                let Arriving::Making(part) = &mut receiving.file else { return Ok(()) };
                let same = part.verified().is_some_and(|file| offer_of(file) == receiving.offer);
                match same {
                    true => part.publish(tools),
                    false => part.fail(tools, FileFailure::Other),
                }
                Ok(())
            }
            PartStep::Failed(failure) => {
                let Receiving { from, offer, .. } = *receiving;
                installs.receiving = None;
                let overtaken = offer.last.index <= reached;
                if let Some((from, offer)) = installs.next_offer.take() {
                    self.receive(from, offer);
                    return Ok(());
                }
                if !overtaken {
                    tracing::warn!(node = %self.config.node, %failure, "a snapshot was not received: it is tried again");
                }
                if let Some(from) = from {
                    let what = if overtaken { Requested::Installed } else { Requested::Refused };
                    installs.answer(from, &offer, what, 0);
                }
                Ok(())
            }
            PartStep::Published(file) => {
                let file = file.without_sessions();
                let from = receiving.from;
                installs.receiving = None;
                self.published(file.clone())?;
                self.install_file(from, file)
            }
        }
    }

    /// So much of what an earlier process has left can be trusted.
    fn checked(&mut self, arrived: u64) {
        let cluster = self.config.cluster;
        let Snapshots { ops, installs, .. } = &mut self.snapshots;
        let Some(receiving) = &mut installs.receiving else { return };
        let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
        let name = receiving.name();
        if receiving.given_up {
            receiving.file = Arriving::Making(Part::remove(tools, cluster, &name));
            return;
        }
        tracing::info!(node = %self.config.node, at = arrived, "a snapshot's transfer goes on after a restart");
        (receiving.written, receiving.asked) = (arrived, arrived);
        receiving.file = Arriving::Making(Part::reopen(tools, cluster, &name, receiving.offer.bytes));
    }

    /// A snapshot of another member is durable here: it becomes the state, if it tells more than this node has.
    fn install_file(&mut self, from: Option<NodeId>, file: SnapshotFile) -> Result<(), StopError> {
        let SnapshotMeta { last, chain, configuration_index, .. } = file.meta;
        if self.snapshots.restoring.is_some() {
            // One at a time; it is offered again, and is here then.
            return Ok(());
        }
        self.snapshots.installs.installing = from;
        let Some(raft) = self.raft() else { return Ok(()) };
        if last.index <= self.reached() {
            return self.snapshot_installed(last);
        }
        if last.index > raft.commit() {
            let Some(configuration) = wire::configuration::decode(&file.meta.configuration) else {
                return match from {
                    Some(from) => self.refuse(from, "a snapshot whose members cannot be decoded"),
                    None => Ok(()),
                };
            };
            // Figure 13 of the Raft paper is the core's; `install` is called if it comes to that.
            let outcome = self.step(Event::SnapshotReceived { last, configuration, configuration_index });
            if self.snapshots.restoring.is_none() {
                // It leads, and needs none. Whoever offers it again is heard.
                self.snapshots.installs.installing = None;
            }
            return outcome;
        }
        // Known to be committed, and not applied: what lies before cannot be read here, or the disk is slow to take it. What
        // the core has accepted counts, also what still waits for room in the log.
        let own = self.chain_at(last.index);
        invariant(own == Some(chain), || {
            format!("the snapshot that ends at {last:?} and this log differ there: {chain:?}, here {own:?}")
        })?;
        if let Some(configuration) = wire::configuration::decode(&file.meta.configuration) {
            // The core may know of the members only from what can be read here.
            self.step(Event::SnapshotReceived { last, configuration, configuration_index })?;
        }
        self.restore(file);
        Ok(())
    }

    /// The core takes a snapshot over.
    pub(in super::super) fn install(&mut self, last: LogId, epoch: Option<Epoch>) -> Result<(), StopError> {
        let file = self.snapshots.files.iter().rev().find(|file| file.meta.last == last).cloned();
        let Some(file) = file else {
            return Err(StopError::Invariant(format!("the core installs {last:?}, which is not here")));
        };
        tracing::info!(node = %self.config.node, last = %last.index, anew = epoch.is_some(), "snapshot installed");
        if let Some(epoch) = epoch {
            let all = LogIndex(0);
            self.pending.clear();
            self.stages.truncate_after(all);
            self.pace.truncate_after(all);
            self.recent.truncate_after(all);
            self.applier.truncate_after(all);
            self.repair.truncate_after(all);
            let start = LogStart { index: last.index, term: last.term, chain: file.meta.chain };
            let log_epoch = self.wal.start_anew(&mut self.disk, start);
            invariant(Epoch(log_epoch) == epoch, || {
                format!("log epoch {log_epoch} is not the core's {epoch:?}")
            })?;
        }
        self.restore(file);
        Ok(())
    }

    /// The state is that of the snapshot, or of a later entry.
    pub(in super::super) fn snapshot_installed(&mut self, last: LogId) -> Result<(), StopError> {
        let file = self.snapshots.files.iter().find(|file| file.meta.last == last).map(offer_of);
        if let (Some(from), Some(offer)) = (self.snapshots.installs.installing.take(), file) {
            self.snapshots.installs.answer(from, &offer, Requested::Installed, 0);
        }
        self.purge_soon();
        Ok(())
    }

    /// A node that cannot apply what lies next asks the leader for a snapshot of more.
    pub(super) fn ask_for_state(&mut self) {
        let now = self.now.monotonic_ns;
        let Some(raft) = self.raft() else { return };
        let stuck = self.wal.first_damaged() == Some(self.applier.applied().next());
        let lost = raft.is_state_lost();
        let leader = raft.leader().filter(|leader| *leader != raft.id());
        let restoring = self.snapshots.restoring.is_some();
        let installs = &mut self.snapshots.installs;
        let stuck_since_ns = *installs.stuck_since_ns.get_or_insert(now);
        if !stuck {
            installs.stuck_since_ns = None;
        }
        let Some(leader) = leader.filter(|_| lost || stuck) else { return };
        let patience_ns = 2 * installs.patience_ns;
        // One whose sender has stopped is not waited for: whoever is asked goes on with it, or offers another.
        let comes = |receiving: &Receiving<D::Buf>| {
            receiving.from.is_some() && !receiving.waits_for(patience_ns, now)
        };
        if restoring || installs.receiving.as_ref().is_some_and(comes) || now < installs.ask_at_ns {
            return;
        }
        if !lost && now < stuck_since_ns.saturating_add(patience_ns) {
            // The others may still hold the batch: that is tried first.
            return;
        }
        installs.ask_at_ns = now.saturating_add(patience_ns);
        let last = LogId { index: self.reached(), ..LogId::default() };
        let any = OfferMessage { last, ..OfferMessage::default() };
        self.snapshots.installs.answer(leader, &any, Requested::Any, 0);
    }
}

/// How far the bytes that an earlier process has left are those that are offered now.
fn arrived_of(offer: &OfferMessage, reading: &Reading, found: Result<SnapshotFile, FileFailure>) -> u64 {
    match found {
        Ok(file) if offer_of(&file) == *offer => offer.bytes,
        Ok(_) => 0,
        Err(_) => reading
            .verified()
            .filter(|(last, chain, _)| (*last, *chain) == (offer.last, offer.chain))
            .map_or(0, |(.., bytes)| bytes.min(offer.bytes)),
    }
}
