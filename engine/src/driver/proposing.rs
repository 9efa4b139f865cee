//! The driver and the commands: from the queue into the open batch, sealed, applied, answered.

use super::{APPLY_READ, Driver, GROUP, READ_BYTES, run_of, take_block};
use crate::apply::Applied;
use crate::error::{LeaderHint, Refusal, StopError};
use crate::ingress::Queued;
use crate::mutants::{self, Mutant};
use crate::raft::{Event, Raft, Role};
use crate::state_machine::StateMachine;
use ringraft_block::{LogIndex, NodeId};
use ringraft_net::link::Link;
use ringraft_wal::disk::Disk;
use ringraft_wal::format::{BatchBuilder, BatchKind, Chain, Seal};
use std::net::SocketAddr;

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    pub(super) fn refusal(&self) -> Refusal {
        Refusal::NotLeader { leader: self.leader_hint() }
    }

    /// Where the leader listens: by the configuration in force, unless a session was found elsewhere since, where hearsay had it.
    pub(super) fn leader_hint(&self) -> Option<LeaderHint> {
        let id = self.raft()?.leader()?;
        let known = self.known_address_of(id);
        let moved_to = self.peers.get(&id).and_then(|peer| peer.moved_to);
        let found = moved_to.filter(|(_, instead_of)| *instead_of == known).map(|(at, _)| at);
        found.or(known).map(|address| LeaderHint { id, address })
    }

    /// By the configurations, the newest first, then by the operator; by hearsay where they do not know it.
    pub(super) fn known_address_of(&self, id: NodeId) -> Option<SocketAddr> {
        let configured =
            || self.config.members.iter().find(|member| member.id == id).map(|member| member.address);
        self.members.address_of(id).or_else(configured)
    }

    /// Opens or closes the way in for proposals.
    pub(super) fn set_gate(&mut self) {
        if self.closing || self.is_draining() {
            return;
        }
        let leads = self.raft().is_some_and(Raft::can_accept_proposals);
        let gate = match (leads, self.no_space) {
            _ if self.config.consensus_only => Err(Refusal::ConsensusOnly),
            _ if self.handover.is_under_way()
                && self.raft().is_some_and(|raft| raft.role() == Role::Leader) =>
            {
                Err(Refusal::Transferring)
            }
            (true, false) => Ok(()),
            (true, true) => Err(Refusal::NoSpace),
            (false, _) => Err(self.refusal()),
        };
        self.proposals.borrow_mut().set_gate(gate);
    }

    /// Whether there were some, and not only to be refused.
    pub(super) fn take_proposals(&mut self) -> bool {
        let (mut arrivals, mut taken) = (0, Queued::default());
        let mut proposals = self.proposals.borrow_mut();
        let mut any = proposals.has_arriving() && proposals.takes_more();
        proposals.take_arriving(&mut self.deliveries);
        while arrivals < self.config.ingress_capacity && proposals.takes_more() {
            let Some(arrival) = self.shared.ingress.pop() else { break };
            taken.add(arrival.queued());
            proposals.take(arrival, &mut self.deliveries);
            arrivals += 1;
            any = true;
        }
        self.shared.ingress.taken(taken);
        any && proposals.is_gate_open()
    }

    /// Seals the open batch whenever the log has room for another write: the batch is what arrived meanwhile. One that might
    /// still grow leaves half of the writes in flight to those that cannot, for which waiting gains nothing.
    pub(super) fn seal(&mut self) -> Result<(), StopError> {
        // Without space, what is left is for the engine's own batches.
        while !self.no_space && self.pending.is_empty() && self.raft().is_some_and(Raft::can_accept_proposals)
        {
            self.open_batch()?;
            if self.seal_control()? {
                continue;
            }
            let (slot_bytes, is_full) = {
                let proposals = self.proposals.borrow();
                (proposals.sealable_slot_bytes(), proposals.is_full())
            };
            let may_go = is_full || self.may_seal_early();
            if !slot_bytes.is_some_and(|bytes| may_go && self.wal.is_ready_for(bytes)) {
                break;
            }
            self.propose(BatchKind::Commands)?;
        }
        Ok(())
    }

    /// Whether a batch that might still grow is sealed now: less than half of the writes that may be are in flight.
    fn may_seal_early(&self) -> bool {
        self.wal.writes_in_flight() < self.config.writes_in_flight_max.div_ceil(2)
    }

    /// Makes sure that there is an open batch to copy commands into.
    fn open_batch(&mut self) -> Result<(), StopError> {
        let mut proposals = self.proposals.borrow_mut();
        if let Some(bytes) = proposals.wants_block() {
            let block = take_block(&self.pool, &mut self.disk, bytes).map_err(StopError::Memory)?;
            proposals.open(block);
        }
        Ok(())
    }

    pub(super) fn seal_empty(&mut self) -> Result<(), StopError> {
        self.propose(BatchKind::Empty)?;
        self.set_gate();
        Ok(())
    }

    /// Seals requests about sessions, if there are some and the log has room.
    fn seal_control(&mut self) -> Result<bool, StopError> {
        let slot_bytes = self.proposals.borrow().control_slot_bytes();
        let ready = slot_bytes.is_some_and(|bytes| self.may_seal_early() && self.wal.is_ready_for(bytes));
        if ready {
            self.propose(BatchKind::SessionControl)?;
        }
        Ok(ready)
    }

    /// Seals a batch at the core's position and hands it to the core.
    pub(super) fn propose(&mut self, kind: BatchKind) -> Result<(), StopError> {
        let Some((term, first)) = self.raft().and_then(Raft::next_position) else { return Ok(()) };
        let (previous_chain, previous_time) = self.tail();
        let time_ms = self.clock.time_of(self.config.node, self.now, previous_time);
        let seal = Seal { group: GROUP, term, first, kind, time_ms, previous_chain };
        let sealed = match kind {
            BatchKind::Commands => self.proposals.borrow_mut().seal(seal),
            BatchKind::SessionControl => {
                let mut proposals = self.proposals.borrow_mut();
                let Some(bytes) = proposals.control_slot_bytes() else { return Ok(()) };
                let block = take_block(&self.pool, &mut self.disk, bytes).map_err(StopError::Memory)?;
                Some(proposals.seal_control(block, seal))
            }
            _ => {
                let block = take_block(&self.pool, &mut self.disk, ringraft_block::BLOCK_BYTES);
                let mut builder = BatchBuilder::new(block.map_err(StopError::Memory)?);
                if kind != BatchKind::Empty {
                    // Only an empty batch has no entry at all.
                    let pushed = builder.push(&[], None);
                    pushed.map_err(|_| {
                        StopError::Invariant("a block holds an entry without bytes".to_owned())
                    })?;
                }
                Some(builder.seal(seal))
            }
        };
        let Some((block, info)) = sealed else { return Ok(()) };
        self.incoming = Some((block, info));
        self.step(Event::Proposed { batch: run_of(&info) })
    }

    /// Chain and time at the end of what the core has accepted.
    pub(super) fn tail(&self) -> (Chain, u64) {
        let last = self.pending.back().map(|(_, info)| *info).or_else(|| self.wal.last_info());
        // Of a log that holds nothing, what was applied last, or is being restored, is the end.
        last.map_or_else(
            || (self.wal.log_end().chain, self.applier.time_ms()),
            |info| (info.chain, info.time_ms),
        )
    }

    /// The chain at `index`, a batch end of what the core has accepted.
    pub(super) fn chain_at(&self, index: LogIndex) -> Option<Chain> {
        let pending = self.pending.iter().find(|(_, info)| info.last == index);
        pending.map(|(_, info)| info.chain).or_else(|| self.wal.chain_at(index))
    }

    pub(super) fn apply(&mut self) -> Result<(), StopError> {
        self.apply_due = false;
        let Some(commit) = self.raft().map(Raft::commit) else { return Ok(()) };
        let commit = match self.raft() {
            Some(raft) if mutants::active(Mutant::AppliedBeforeCommit) => raft.last().index,
            _ => commit,
        };
        if mutants::active(Mutant::DedupeByLocalClock) {
            self.applier.set_local_clock(self.now.wall_ms);
        }
        let applied = self.applier.advance(
            commit,
            self.wal.durable_through(),
            self.config.apply_bytes_per_turn,
            &self.recent,
            &mut self.proposals.borrow_mut(),
            &mut self.deliveries,
        );
        match applied.map_err(StopError::Invariant)? {
            Applied::Fetch(first) if self.wal.is_damaged(first) => self.applier.fetched(Vec::new()),
            Applied::Fetch(first) if !self.closing => {
                self.wal.read(&mut self.disk, APPLY_READ, first, READ_BYTES)
            }
            Applied::More => self.apply_due = !mutants::active(Mutant::TurnLeavesWork),
            Applied::Fetch(_) | Applied::Current | Applied::Waiting => {}
        }
        self.trim_recent();
        Ok(())
    }

    /// Lets go of the batches that nobody here will ask for.
    pub(super) fn trim_recent(&mut self) {
        if !self.recent.is_empty() {
            let wanted = self.wanted_from();
            self.recent.trim(wanted, self.wal.durable_through());
        }
    }

    /// The first index that apply or a peer that keeps up will ask for.
    fn wanted_from(&self) -> LogIndex {
        let next = self.applier.applied().next();
        let Some(raft) = self.raft().filter(|raft| raft.role() == Role::Leader) else { return next };
        let connected = self.peers.iter().filter(|(_, peer)| peer.session.is_some());
        let unsent = connected.filter_map(|(id, peer)| {
            // What is in the outbox has been sent as far as the core knows.
            let queued = if peer.outbox.holds_no_batch() { None } else { Some(LogIndex(0)) };
            queued.or_else(|| raft.progress(*id).map(|progress| progress.next))
        });
        unsent.min().map_or(next, |unsent| unsent.min(next))
    }
}
