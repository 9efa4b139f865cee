//! The driver and the log: what became durable, what is to be, and how a node comes to be part of its cluster.

use super::{
    APPLY_READ, Deferred, Driver, GROUP, Life, SPACE_RETRY_NS, WITNESS_DELAY_NS, invariant, run_of,
    take_first,
};
use crate::config::{self, ConfigError};
use crate::error::StopError;
use crate::formation::{self, Formation, FormationError, Step};
use crate::raft::{BatchRun, Boot, Configuration, Epoch, Event, LogId, Nanos, Raft, Role};
use crate::snapshots::files;
use crate::state_machine::StateMachine;
use crate::wire::{self, FormationMessage};
use ringraft_block::{LogIndex, NodeId};
use ringraft_net::Network;
use ringraft_net::link::Link;
use ringraft_wal::disk::Disk;
use ringraft_wal::format::{BatchInfo, BatchKind};
use ringraft_wal::{FILL_INTERVAL, FILL_STEP_BYTES, ReadError, Recovered, WalEvent};

const FILL_INTERVAL_NS: u64 = FILL_INTERVAL.as_nanos() as u64;

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// What the log reports is news, and so is what has completed for snapshots. The rest the log did for itself: of that others
    /// see only that it may have room again, for which nothing waits at rest ([`Self::is_at_rest`]).
    pub(super) fn on_disk(&mut self) -> Result<bool, StopError> {
        let mut done = std::mem::take(&mut self.disk_done);
        let mut events = std::mem::take(&mut self.wal_events);
        self.disk.poll(&mut done);
        let mut news = false;
        let mut outcome = Ok(());
        for completion in done.drain(..) {
            if files::owns(completion.id) {
                news = true;
                outcome = outcome.and_then(|()| self.on_snapshot_disk(completion));
            } else {
                self.wal.handle(&mut self.disk, completion, &mut events);
            }
        }
        self.wal.advance(&mut self.disk, &mut events);
        news |= !events.is_empty();
        while let Some(event) = events.pop_front() {
            outcome = outcome.and_then(|()| self.on_log(event));
        }
        (self.disk_done, self.wal_events) = (done, events);
        if self.closed && self.snapshots.ops.in_flight == 0 {
            outcome = outcome.and(Err(StopError::Requested));
        }
        outcome.map(|()| news)
    }

    fn on_log(&mut self, event: WalEvent<D::Buf>) -> Result<(), StopError> {
        match event {
            WalEvent::Opened(recovered) => self.opened(&recovered),
            WalEvent::Persisted { epoch, last } => {
                self.witness_at_ns = self.now.monotonic_ns.saturating_add(WITNESS_DELAY_NS);
                // Not `last`, which a truncation since may have overtaken.
                self.stages.durable(self.wal.durable_through(), self.now.monotonic_ns);
                self.step(Event::Persisted { epoch: Epoch(epoch), last })
            }
            WalEvent::HardStateSaved { sequence } => self.saved(sequence),
            WalEvent::Read { token, result } if self.repair.reads(token) => {
                self.read_for_repair(token, result)
            }
            WalEvent::Read { token, result } if self.members.reads(token) => self.configuration_read(result),
            WalEvent::Read { token, result } => {
                let batches = match result {
                    Ok(batches) => batches,
                    // Overtaken by a truncation, or too many at once: asked for again if it is still wanted.
                    Err(
                        ReadError::NotFound { .. }
                        | ReadError::Truncated
                        | ReadError::Busy
                        | ReadError::Stopped,
                    ) => Vec::new(),
                    // The log has told of it, and it is waited for.
                    Err(ReadError::Damaged { .. }) => Vec::new(),
                    Err(error) => return Err(StopError::Read(error)),
                };
                if token == APPLY_READ {
                    self.applier.fetched(batches);
                } else if let Some(peer) = self.peers.get_mut(&NodeId(token)) {
                    peer.outbox.fetched(batches);
                }
                Ok(())
            }
            WalEvent::TruncateDone { .. } | WalEvent::Purged { .. } => Ok(()),
            WalEvent::Poisoned(error) => Err(error.into()),
            WalEvent::NoSpace { .. } => {
                self.no_space = true;
                self.space_retry_at_ns = self.now.monotonic_ns.saturating_add(SPACE_RETRY_NS);
                self.set_gate();
                Ok(())
            }
            WalEvent::SpaceAgain => {
                self.no_space = false;
                self.space_retry_at_ns = u64::MAX;
                self.set_gate();
                Ok(())
            }
            WalEvent::DamageFound(batch) => self.damage_found(&batch),
            WalEvent::Repaired { first, last } => self.repaired(first, last),
            WalEvent::Closed => {
                self.closed = true;
                Ok(())
            }
        }
    }

    fn opened(&mut self, recovered: &Recovered) -> Result<(), StopError> {
        self.repair.found_at_start(&recovered.report.damage);
        if self.closing {
            // `Closed` follows.
            return Ok(());
        }
        let state = &recovered.hard_state;
        self.incarnation = state.incarnation;
        let listen = self.config.listen_address()?;
        self.timing_seed = config::timing_seed(&self.config, state.boot, self.seed);
        let network =
            config::net_config(&self.config, listen, state.incarnation, state.boot, self.timing_seed);
        let peers = config::net_peers(&self.config);
        let network =
            Network::new(network, peers).map_err(|error| ConfigError::Network(error.to_string()))?;
        self.network = Some(network);
        if state.configuration.is_empty() {
            let (node, incarnation) = (self.config.node, state.incarnation);
            let formation = Formation::new(node, incarnation, &self.config.members, self.config.join);
            let mut formation = formation.with_settings(self.config.settings());
            let step = formation.step();
            self.life = Life::Forming(formation);
            return self.form(step);
        }
        let origin = || "this directory".to_owned();
        let configuration = wire::configuration::decode(&state.configuration)
            .ok_or_else(|| FormationError::Undecodable { origin: origin() })?;
        // Once they have been changed, the members that this node was started with are only where it begins to look. What was
        // changed before the log's start, the snapshot tells (`begin_core`).
        let from_the_start = self.wal.log_start().index == LogIndex(0);
        let changed = self.wal.batches().any(|info| info.kind == BatchKind::Membership);
        if from_the_start && !changed && !self.config.join {
            formation::check_members(self.config.node, &self.config.members, &configuration)?;
        }
        self.start(configuration)
    }

    /// The batch that was just handed to the core goes to the log.
    pub(super) fn persist(&mut self, batch: BatchRun) -> Result<(), StopError> {
        let incoming = self.incoming.take();
        let Some((block, info)) = incoming.filter(|(_, info)| run_of(info) == batch) else {
            return Err(StopError::Invariant(format!(
                "the core persists {batch:?}, which was not handed in"
            )));
        };
        let (_, previous_ms) = self.tail();
        invariant(info.time_ms >= previous_ms, || {
            format!(
                "the log's clock goes back at index {}: {} ms, and before it {previous_ms}",
                info.first, info.time_ms
            )
        })?;
        if self.raft().is_some_and(|raft| raft.role() != Role::Leader) {
            self.stages.received(info.last, self.now.monotonic_ns);
        }
        self.pace.begun(info.last, info.slot_bytes(), self.now.monotonic_ns);
        self.pending.push_back((block, info));
        self.write_pending();
        Ok(())
    }

    /// Whether a batch may wait for the log. A leader's window bounds what waits; but each new leader has one of its
    /// own, and a log without space takes nothing.
    pub(super) fn has_room_for(&self, info: &BatchInfo) -> bool {
        let waiting: usize = self.pending.iter().map(|(_, info)| info.slot_bytes()).sum();
        waiting == 0 || waiting + info.slot_bytes() <= 2 * self.config.window_bytes
    }

    /// Hands accepted batches to the log, as far as it has room.
    pub(super) fn write_pending(&mut self) {
        while let Some((_, info)) = self.pending.front() {
            if !self.wal.is_ready_for(info.slot_bytes()) {
                break;
            }
            let Some((block, info)) = self.pending.pop_front() else { break };
            self.stages.submitted(info.last, self.now.monotonic_ns);
            let block = self.wal.append(&mut self.disk, block, info);
            self.recent.push(info, block);
        }
    }

    fn saved(&mut self, save: u64) -> Result<(), StopError> {
        if let Some((_, configuration)) = self.forming.take_if(|(number, _)| *number <= save) {
            self.start(configuration)?;
        }
        let mut reached = None;
        while let Some((_, sequence)) = self.saves.front().filter(|(number, _)| *number <= save) {
            reached = Some(*sequence);
            self.saves.pop_front();
        }
        let Some(reached) = reached else { return Ok(()) };
        while let Some(Deferred { to, term, message, .. }) =
            take_first(&mut self.deferred, |deferred| deferred.sequence <= reached)
        {
            // A later term has made what an earlier one wanted to say void.
            if self.raft().is_some_and(|raft| term >= raft.term()) {
                self.queue(to, message);
            }
        }
        self.step(Event::HardStateSaved { sequence: reached })
    }

    /// What the log wants done from time to time.
    pub(super) fn keep_log(&mut self) {
        if self.now.monotonic_ns >= self.witness_at_ns {
            self.witness_at_ns = u64::MAX;
            self.wal.save_witness(&mut self.disk);
        }
        let now_ns = self.now.monotonic_ns;
        if now_ns >= self.space_retry_at_ns {
            self.space_retry_at_ns =
                if self.no_space { now_ns.saturating_add(SPACE_RETRY_NS) } else { u64::MAX };
            self.wal.retry_space();
        }
        // A segment that is rebuilt may lack the space for it while appends lack nothing.
        if self.space_retry_at_ns == u64::MAX && self.wal.first_damaged().is_some() {
            self.space_retry_at_ns = now_ns.saturating_add(SPACE_RETRY_NS);
        }
        if now_ns >= self.fill_at_ns {
            self.fill_at_ns = u64::MAX;
            self.wal.fill_step(&mut self.disk, FILL_STEP_BYTES);
        }
        let fill_at_ns = self.fill_at_ns.min(now_ns.saturating_add(FILL_INTERVAL_NS));
        self.fill_at_ns = if self.wal.is_filling() { fill_at_ns } else { u64::MAX };
    }

    pub(super) fn form(&mut self, step: Step) -> Result<(), StopError> {
        if let Step::Form(configuration) = step {
            let encoded = wire::configuration::encode(&configuration);
            let genesis = formation::genesis_chain(self.config.cluster, &encoded);
            let save = self.wal.form(&mut self.disk, encoded, genesis);
            self.forming = Some((save, configuration));
        }
        Ok(())
    }

    /// `configuration`, which stands at the index with it, is that as of `commit`, up to where what was applied is restored, and
    /// `changes` are those that the log holds behind it: from now on this node takes part.
    pub(super) fn start_core(
        &mut self,
        (configuration_index, configuration): (LogIndex, Configuration),
        changes: Vec<(LogIndex, Option<Configuration>)>,
        commit: LogIndex,
    ) -> Result<(), StopError> {
        let log_start = self.wal.log_start();
        let start = LogId { term: log_start.term, index: log_start.index };
        let (saved, vote) =
            self.wal.hard_state().map_or((start.term, None), |state| (state.term, state.vote));
        // A log that was started anew behind a snapshot may be of a term whose save a crash has prevented. An entry of a term
        // is proof of the term, though not of a vote in it; the core has it saved before it says anything.
        let term = saved.max(self.wal.log_end().term);
        let vote = vote.filter(|_| term == saved);
        let runs: Vec<BatchRun> = self.wal.batches().map(|info| run_of(&info)).collect();
        let boot = Boot {
            term,
            term_saved: saved,
            vote,
            start,
            batches: runs,
            epoch: Epoch(self.wal.epoch()),
            commit,
            damaged_from: self.wal.first_damaged(),
            claim: self.claim(),
            configuration_index,
            now: Nanos(self.now.monotonic_ns),
            changes,
        };
        config::check_lease(&self.config, configuration.settings())?;
        let raft_config = config::raft_config(&self.config, self.timing_seed, Some(self.incarnation));
        let raft = Raft::new(raft_config, configuration, boot)
            .map_err(|error| ConfigError::Raft(error.to_string()))?;
        self.life = Life::Running(Box::new(raft));
        self.members.changed();
        self.repair.start(self.now.monotonic_ns);
        self.set_gate();
        let connected: Vec<NodeId> =
            self.peers.iter().filter(|(_, peer)| peer.session.is_some()).map(|(id, _)| *id).collect();
        for peer in connected {
            self.announce(peer);
            self.step(Event::PeerConnected { peer })?;
        }
        Ok(())
    }

    pub(super) fn announce(&mut self, peer: NodeId) {
        // A node that is restoring its state has been formed long ago: whoever is blank must hear of it.
        let formed = matches!(self.life, Life::Running(_) | Life::Restoring);
        let configuration = self.wal.hard_state().filter(|_| formed).map(|state| state.configuration.clone());
        let configuration = configuration.unwrap_or_default();
        let message = FormationMessage { incarnation: self.incarnation, formed, configuration };
        let Some(network) = &mut self.network else { return };
        let body = self.encoder.formation(&message);
        if network.send(peer, wire::kind::FORMATION, GROUP, body, None).is_err() {
            // The queue of a session that has just begun is empty; one that is full ends by its time-out.
            tracing::debug!(%peer, "formation message not sent");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::repair::testing::{Bench, TERM};
    use crate::outbox::{Head, Outgoing};
    use crate::raft::{Action, AppendAck, AppendOutcome, Event, LogId, Message, Round, Vote};
    use ringraft_block::{LogIndex, NodeId, Term};
    use ringraft_wal::format::{Chain, LogStart};

    /// Its place was looked up when it left, and a log that starts behind it by then stopped the node.
    #[test]
    fn an_ack_that_waits_for_the_vote_leaves_with_the_chain_of_its_own_time() {
        let mut bench = Bench::new();
        bench.append(5, 3);
        let driver = &mut bench.driver;
        let matched = LogId { term: TERM, index: LogIndex(3) };
        let chain = driver.chain_at(matched.index).expect("a batch end");
        let outcome = AppendOutcome::Matched { matched };
        let message = Message::AppendAck(AppendAck { term: TERM, round: Round(9), outcome });
        driver.act(Action::SendAfterSave { sequence: 1, to: NodeId(2), message }).expect("it waits");
        driver.saves.push_back((1_000, 1));
        // Meanwhile a snapshot is installed.
        let start = LogStart { index: LogIndex(40), term: TERM, chain: Chain([1; 16]) };
        driver.wal.start_anew(&mut driver.disk, start);
        assert_eq!(driver.chain_at(matched.index), None);
        driver.peers.get_mut(&NodeId(2)).expect("a member").outbox.clear();
        driver.saved(1_000).expect("it goes on");
        let outbox = &mut driver.peers.get_mut(&NodeId(2)).expect("a member").outbox;
        let Head::Light(Outgoing::Ack(ack)) = outbox.head(&driver.recent, LogIndex(0)) else {
            panic!("no ack");
        };
        assert_eq!((ack.ack.outcome.clone(), ack.chain), (AppendOutcome::Matched { matched }, chain));
    }

    /// The crash came between a snapshot of a later term and the save of that term. The next start spoke in it all the same.
    #[test]
    fn a_log_that_began_anew_in_a_later_term_has_it_saved_before_the_node_speaks_in_it() {
        let mut bench = Bench::new();
        bench.append(5, 3);
        let driver = &mut bench.driver;
        let configuration = driver.raft().expect("it runs").configuration().clone();
        let (last, later) = (driver.raft().expect("it runs").last(), Term(7));
        let start = LogStart { index: LogIndex(40), term: later, chain: Chain([1; 16]) };
        driver.wal.start_anew(&mut driver.disk, start);
        bench.settle();
        bench.memory.borrow_mut().holds_writes = true;
        let driver = &mut bench.driver;
        driver.peers.get_mut(&NodeId(2)).expect("a member").outbox.clear();
        driver.start_core((LogIndex(0), configuration), Vec::new(), start.index).expect("it starts");
        let ask = Message::Vote(Vote { term: later, last, pre: false, transfer: false });
        driver.step(Event::Received { from: NodeId(2), message: ask }).expect("it goes on");
        let said = |bench: &mut Bench| {
            let driver = &mut bench.driver;
            let outbox = &mut driver.peers.get_mut(&NodeId(2)).expect("a member").outbox;
            match outbox.head(&driver.recent, LogIndex(0)) {
                Head::Light(Outgoing::VoteReply(reply)) => Some(reply.term),
                _ => None,
            }
        };
        bench.settle();
        assert_eq!(said(&mut bench), None, "the disk has not answered");
        bench.memory.borrow_mut().holds_writes = false;
        bench.settle();
        assert_eq!(said(&mut bench), Some(later));
        assert_eq!(bench.driver.wal.hard_state().map(|state| state.term), Some(later));
    }
}
