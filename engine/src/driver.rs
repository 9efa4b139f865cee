//! One turn of a node: take what completed, ask the core, submit what it answered.
//!
//! [`Driver::turn`] is synchronous, never blocks and does a bounded amount of work. It is the only place where the
//! core, the log and the network meet; each of them is a machine of its own that knows nothing of the others.
//!
//! The life of a command here: `take_proposals` copies it into the open batch; `seal` seals that at the core's
//! position; the core answers with one persist and one append per follower, which are under way together; `on_disk` and `on_network` bring the durabilities back; the core moves the commit index;
//! `apply` runs the state machine and delivers the outcome.

use crate::apply::{Applied, Applier};
use crate::config::{BATCH_BYTES_CAP, Config, ConfigError};
use crate::error::{LeaderHint, Refusal, StopCause, StopError, UnknownOutcome};
use crate::formation::{self, Formation, FormationError, Step};
use crate::handle::{Handle, LocalHandle, Shared};
use crate::ingress::Deliveries;
use crate::outbox::{Head, Outbox, Outgoing};
use crate::proposals::{LocalIngress, ProposalLimits, Proposals};
use crate::raft::{
    Action, AppendOutcome, BatchRun, Boot, Configuration, Epoch, Event, LogId, Message, Nanos, Raft, Role,
};
use crate::recent::Recent;
use crate::runtime::{LocalWakeup, Now, Turn, TurnOutcome, Wakeup};
use crate::state_machine::StateMachine;
use crate::wire::{self, AckMessage, AckStages, AppendMessage, Body, Encoder, FormationMessage};
use ringraft_block::{Block, BlockBuf, GroupId, Incarnation, LogIndex, NodeId, Pool, round_up_to_block};
use ringraft_net::link::Link;
use ringraft_net::{BlockSource, Frame, NetEvent, Network, RejectReason, Rejection};
use ringraft_wal::disk::Disk;
use ringraft_wal::format::{BatchBuilder, BatchInfo, BatchKind, Chain, ENVELOPE_BYTES, Seal, parse_image};
use ringraft_wal::{HardStateUpdate, ReadError, Recovered, Wal, WalEvent};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

/// The only group of this version.
const GROUP: GroupId = GroupId(0);
/// The read that feeds the state machine; reads for a peer carry its id.
const APPLY_READ: u64 = u64::MAX;
/// A log that has been idle for so long records how far it is durable.
const WITNESS_DELAY_NS: u64 = 1_000_000_000;
/// How often a log without space tries again to reserve some.
const SPACE_RETRY_NS: u64 = 1_000_000_000;
/// Bytes of one read of the log, for apply or for a peer that is behind.
const READ_BYTES: usize = 4 << 20;

/// A node over its disk, its link and its state machine.
pub struct Driver<D: Disk, L: Link<Buf = D::Buf>, S> {
    config: Config,
    seed: u64,
    /// Of election times and backoff, in this boot.
    timing_seed: u64,
    shared: Arc<Shared>,
    now: Now,

    disk: D,
    link: L,
    pool: Pool<D::Buf>,
    wal: Wal<D>,
    /// Present once the log has been opened: it knows the incarnation.
    network: Option<Network<L>>,
    peers: BTreeMap<NodeId, Peer<D::Buf>>,
    incarnation: Incarnation,

    life: Life,
    /// The base configuration that is being made durable, with the number of that save.
    forming: Option<(u64, Configuration)>,
    proposals: Rc<RefCell<Proposals<D::Buf>>>,
    deliveries: Deliveries,
    applier: Applier<S, D::Buf>,
    recent: Recent<D::Buf>,
    /// Accepted by the core, not yet written: the log has no place for them at the moment.
    pending: VecDeque<(Block<D::Buf>, BatchInfo)>,
    /// Handed to the core just now; taken by its `Persist`.
    incoming: Option<(Block<D::Buf>, BatchInfo)>,
    /// Saves that the core asked for and the log's number for each, until they are durable.
    saves: VecDeque<(u64, u64)>,
    /// Messages that must not leave before a save is durable.
    deferred: VecDeque<(u64, NodeId, Message)>,
    no_space: bool,
    space_retry_at_ns: u64,
    witness_at_ns: u64,
    closing: bool,

    encoder: Encoder,
    actions: Vec<Action>,
    disk_done: Vec<ringraft_wal::disk::DiskDone<D::Buf>>,
    link_done: Vec<ringraft_net::link::LinkDone<D::Buf>>,
    wal_events: VecDeque<WalEvent<D::Buf>>,
    net_events: VecDeque<NetEvent<D::Buf>>,
}

/// How far a node has come.
enum Life {
    /// The log is being opened.
    Opening,
    /// The log is open; the cluster is not formed as far as this node knows.
    Forming(Formation),
    /// The core runs.
    Running(Box<Raft>),
    /// It is over.
    Stopped,
}

struct Peer<B: BlockBuf> {
    outbox: Outbox<B>,
    /// The incarnation of the session, while there is one.
    session: Option<Incarnation>,
}

/// Blocks for what the network receives.
struct Blocks<'a, D: Disk> {
    disk: &'a mut D,
    pool: &'a Pool<D::Buf>,
}

impl<D: Disk> BlockSource<D::Buf> for Blocks<'_, D> {
    fn block(&mut self, bytes: usize) -> Option<Block<D::Buf>> {
        take_block(self.pool, self.disk, bytes).ok()
    }
}

fn take_block<D: Disk>(
    pool: &Pool<D::Buf>,
    disk: &mut D,
    bytes: usize,
) -> Result<Block<D::Buf>, ringraft_wal::disk::DiskError> {
    pool.take(bytes, |bytes| disk.allocate(bytes))
}

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// A node over a backend of one's own, which calls [`Turn::turn`]: when an operation has completed, when a handle
    /// has signalled `wakeup`, and at the deadline of the last turn at the latest. The log begins to open in the
    /// first turn. `seed` feeds everything random: the incarnation of a new directory, election times, backoff. It
    /// must be another one at every boot of every node: two directories with one incarnation pass for one another.
    ///
    /// # Errors
    /// When the configuration contradicts itself.
    pub fn with_backend(
        config: Config,
        seed: u64,
        wakeup: Arc<Wakeup>,
        disk: D,
        link: L,
        machine: S,
    ) -> Result<(Self, Handle), ConfigError> {
        config.validate()?;
        let shared = Arc::new(Shared::new(&config, wakeup));
        let handle = Handle { shared: Arc::clone(&shared) };
        Ok((Self::new(config, seed, shared, disk, link, machine), handle))
    }

    /// `config` has been validated.
    pub(crate) fn new(config: Config, seed: u64, shared: Arc<Shared>, disk: D, link: L, machine: S) -> Self {
        let pool = Pool::new(config.recent_bytes_max.saturating_add(config.window_bytes));
        let wal = Wal::open(config.log_config(seed), pool.clone());
        let limits = ProposalLimits {
            command_bytes_max: config.command_bytes_max,
            uncommitted_bytes_max: config.uncommitted_bytes_max,
            slot_bytes: round_up_to_block(config.batch_bytes_max),
        };
        let others = config.members.iter().filter(|member| member.id != config.node);
        Self {
            peers: others.map(|member| (member.id, Peer { outbox: Outbox::new(), session: None })).collect(),
            seed,
            timing_seed: seed,
            shared,
            now: Now { monotonic_ns: 0, wall_ms: 0 },
            disk,
            link,
            pool,
            wal,
            network: None,
            incarnation: Incarnation(0),
            life: Life::Opening,
            forming: None,
            proposals: Rc::new(RefCell::new(Proposals::new(limits))),
            deliveries: Deliveries::default(),
            applier: Applier::new(machine),
            recent: Recent::new(config.recent_bytes_max),
            pending: VecDeque::new(),
            incoming: None,
            saves: VecDeque::new(),
            deferred: VecDeque::new(),
            no_space: false,
            space_retry_at_ns: u64::MAX,
            witness_at_ns: u64::MAX,
            closing: false,
            encoder: Encoder::default(),
            actions: Vec::new(),
            disk_done: Vec::new(),
            link_done: Vec::new(),
            wal_events: VecDeque::new(),
            net_events: VecDeque::new(),
            config,
        }
    }

    /// A handle for tasks on this core, which is woken by `wakeup`.
    pub fn local_handle(&self, wakeup: LocalWakeup) -> LocalHandle {
        let ingress: Rc<dyn LocalIngress> = Rc::new(Rc::clone(&self.proposals));
        LocalHandle { ingress, wakeup, shared: Arc::clone(&self.shared) }
    }

    /// The core, once the cluster is formed.
    pub fn raft(&self) -> Option<&Raft> {
        match &self.life {
            Life::Running(raft) => Some(raft),
            _ => None,
        }
    }

    /// The log.
    pub fn wal(&self) -> &Wal<D> {
        &self.wal
    }

    /// The user's state machine.
    pub fn machine(&self) -> &S {
        self.applier.machine()
    }

    /// The end of what was applied, and the chain there.
    pub fn applied(&self) -> (LogIndex, Chain) {
        (self.applier.applied(), self.applier.chain())
    }

    fn run_turn(&mut self) -> Result<bool, StopError> {
        let mut progressed = self.on_disk()?;
        progressed |= self.on_network()?;
        progressed |= self.take_proposals();
        self.step(Event::Tick)?;
        self.write_pending();
        progressed |= self.seal()?;
        progressed |= self.apply()?;
        self.send_queued();
        self.deliveries.flush();
        self.keep_log();
        self.close_if_asked();
        Ok(progressed)
    }

    /// What the log wants done from time to time.
    fn keep_log(&mut self) {
        if self.now.monotonic_ns >= self.witness_at_ns {
            self.witness_at_ns = u64::MAX;
            self.wal.save_witness(&mut self.disk);
        }
        if self.now.monotonic_ns >= self.space_retry_at_ns {
            self.space_retry_at_ns = self.now.monotonic_ns.saturating_add(SPACE_RETRY_NS);
            self.wal.retry_space();
        }
    }

    // ---- The disk

    fn on_disk(&mut self) -> Result<bool, StopError> {
        let mut done = std::mem::take(&mut self.disk_done);
        let mut events = std::mem::take(&mut self.wal_events);
        self.disk.poll(&mut done);
        let mut progressed = !done.is_empty();
        for completion in done.drain(..) {
            self.wal.handle(&mut self.disk, completion, &mut events);
        }
        self.wal.advance(&mut self.disk, &mut events);
        progressed |= !events.is_empty();
        let mut outcome = Ok(());
        while let Some(event) = events.pop_front() {
            outcome = outcome.and_then(|()| self.on_log(event));
        }
        (self.disk_done, self.wal_events) = (done, events);
        outcome.map(|()| progressed)
    }

    fn on_log(&mut self, event: WalEvent<D::Buf>) -> Result<(), StopError> {
        match event {
            WalEvent::Opened(recovered) => self.opened(&recovered),
            WalEvent::Persisted { epoch, last } => {
                self.witness_at_ns = self.now.monotonic_ns.saturating_add(WITNESS_DELAY_NS);
                self.step(Event::Persisted { epoch: Epoch(epoch), last })
            }
            WalEvent::HardStateSaved { sequence } => self.saved(sequence),
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
                    Err(error) => return Err(StopError::Read(error)),
                };
                if token == APPLY_READ {
                    self.applier.fetched(batches);
                } else if let Some(peer) = self.peers.get_mut(&NodeId(token)) {
                    peer.outbox.fetched(batches);
                }
                Ok(())
            }
            WalEvent::TruncateDone { .. } => Ok(()),
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
            WalEvent::Closed => Err(StopError::Requested),
        }
    }

    fn opened(&mut self, recovered: &Recovered) -> Result<(), StopError> {
        if self.closing || recovered.report.damage.is_some() {
            // `Closed`, or the damage as `Poisoned`, follows.
            return Ok(());
        }
        let state = &recovered.hard_state;
        self.incarnation = state.incarnation;
        let listen = self.config.listen_address()?;
        let network =
            crate::config::net_config(&self.config, listen, state.incarnation, state.boot, self.seed);
        let peers = crate::config::net_peers(&self.config);
        let network =
            Network::new(network, peers).map_err(|error| ConfigError::Network(error.to_string()))?;
        self.network = Some(network);
        if state.configuration.is_empty() {
            let mut formation = Formation::new(self.config.node, state.incarnation, &self.config.members);
            let step = formation.step();
            self.life = Life::Forming(formation);
            return self.form(step);
        }
        let origin = || "this directory".to_owned();
        let configuration = wire::configuration::decode(&state.configuration)
            .ok_or_else(|| FormationError::Undecodable { origin: origin() })?;
        formation::check_members(self.config.node, &self.config.members, &configuration)?;
        self.start(configuration)
    }

    // ---- Formation

    fn form(&mut self, step: Step) -> Result<(), StopError> {
        if let Step::Form(configuration) = step {
            let encoded = wire::configuration::encode(&configuration);
            let genesis = formation::genesis_chain(self.config.cluster, &encoded);
            let save = self.wal.form(&mut self.disk, encoded, genesis);
            self.forming = Some((save, configuration));
        }
        Ok(())
    }

    /// The configuration is durable: from now on this node takes part.
    fn start(&mut self, configuration: Configuration) -> Result<(), StopError> {
        for member in configuration.members() {
            if let Some(network) = self.network.as_mut().filter(|_| member.id != self.config.node) {
                network.pin(member.id, member.incarnation);
            }
        }
        let log_start = self.wal.log_start();
        let start = LogId { term: log_start.term, index: log_start.index };
        let (term, vote) = self.wal.hard_state().map_or((start.term, None), |state| (state.term, state.vote));
        let runs: Vec<BatchRun> = self.wal.batches().map(|info| run_of(&info)).collect();
        let boot = Boot {
            term,
            vote,
            start,
            batches: runs,
            epoch: Epoch(self.wal.epoch()),
            commit: start.index,
            now: Nanos(self.now.monotonic_ns),
        };
        self.applier.start_after(log_start.index, log_start.chain);
        let raft = Raft::new(crate::config::raft_config(&self.config, self.timing_seed), configuration, boot)
            .map_err(|error| ConfigError::Raft(error.to_string()))?;
        self.life = Life::Running(Box::new(raft));
        self.set_gate();
        let connected: Vec<NodeId> =
            self.peers.iter().filter(|(_, peer)| peer.session.is_some()).map(|(id, _)| *id).collect();
        for peer in connected {
            self.announce(peer);
            self.step(Event::PeerConnected { peer })?;
        }
        Ok(())
    }

    fn announce(&mut self, peer: NodeId) {
        let formed = matches!(self.life, Life::Running(_));
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

    // ---- The core

    fn step(&mut self, event: Event) -> Result<(), StopError> {
        let Life::Running(raft) = &mut self.life else { return Ok(()) };
        // While the log closes, what becomes durable still commits; nothing new is begun.
        if self.closing && !matches!(event, Event::Persisted { .. }) {
            return Ok(());
        }
        let mut actions = std::mem::take(&mut self.actions);
        raft.handle(Nanos(self.now.monotonic_ns), event, &mut actions);
        let mut outcome = Ok(());
        for action in actions.drain(..) {
            outcome = outcome.and_then(|()| self.act(action));
        }
        self.actions = actions;
        outcome
    }

    fn act(&mut self, action: Action) -> Result<(), StopError> {
        match action {
            Action::Persist { batch } => self.persist(batch),
            Action::Truncate { after, epoch } => {
                self.pending.retain(|(_, info)| info.last <= after);
                self.recent.truncate_after(after);
                self.applier.truncate_after(after);
                let after = after.min(self.wal.last_index());
                let log_epoch = self.wal.truncate_after(&mut self.disk, after);
                invariant(Epoch(log_epoch) == epoch, || {
                    format!("log epoch {log_epoch} is not the core's {epoch:?}")
                })
            }
            Action::SaveHardState { sequence, term, vote } => {
                let save = self.wal.save_hard_state(&mut self.disk, HardStateUpdate { term, vote });
                self.saves.push_back((save, sequence));
                Ok(())
            }
            Action::SendNow { to, message } => self.send(to, message),
            Action::SendAfterSave { sequence, to, message } => {
                self.deferred.push_back((sequence, to, message));
                Ok(())
            }
            // `apply` reads the commit index from the core.
            Action::Commit { .. } => Ok(()),
            Action::Become { role, .. } => {
                self.role_changed(role);
                Ok(())
            }
            Action::SealEmpty => self.seal_empty(),
            Action::Stop { violation } => Err(StopError::Invariant(violation.to_string())),
        }
    }

    /// The batch that was just handed to the core goes to the log.
    fn persist(&mut self, batch: BatchRun) -> Result<(), StopError> {
        let incoming = self.incoming.take();
        let Some((block, info)) = incoming.filter(|(_, info)| run_of(info) == batch) else {
            return Err(StopError::Invariant(format!(
                "the core persists {batch:?}, which was not handed in"
            )));
        };
        self.pending.push_back((block, info));
        self.write_pending();
        Ok(())
    }

    /// Hands accepted batches to the log, as far as it has room.
    fn write_pending(&mut self) {
        while let Some((_, info)) = self.pending.front() {
            if !self.wal.is_ready_for(info.slot_bytes()) {
                break;
            }
            let Some((block, info)) = self.pending.pop_front() else { break };
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
        while let Some((_, to, message)) =
            take_first(&mut self.deferred, |(sequence, ..)| *sequence <= reached)
        {
            // A later term has made what an earlier one wanted to say void.
            if self.raft().is_some_and(|raft| message.term() >= raft.term()) {
                self.send(to, message)?;
            }
        }
        self.step(Event::HardStateSaved { sequence: reached })
    }

    fn role_changed(&mut self, role: Role) {
        tracing::info!(node = %self.config.node, ?role, "role");
        if role != Role::Leader {
            let refusal = self.refusal();
            let unknown = |index| UnknownOutcome::LeadershipLost { index };
            self.proposals.borrow_mut().abandon(unknown, &refusal, &mut self.deliveries);
            for peer in self.peers.values_mut() {
                peer.outbox.clear();
            }
        }
        self.set_gate();
    }

    fn refusal(&self) -> Refusal {
        Refusal::NotLeader { leader: self.leader_hint() }
    }

    fn leader_hint(&self) -> Option<LeaderHint> {
        let id = self.raft()?.leader()?;
        let own = self.config.members.iter().find(|member| member.id == id).map(|member| member.address);
        own.map(|address| LeaderHint { id, address })
    }

    /// Opens or closes the way in for proposals.
    fn set_gate(&mut self) {
        if self.closing {
            return;
        }
        let leads = self.raft().is_some_and(Raft::can_accept_proposals);
        let gate = match (leads, self.no_space) {
            (true, false) => Ok(()),
            (true, true) => Err(Refusal::NoSpace),
            (false, _) => Err(self.refusal()),
        };
        self.proposals.borrow_mut().set_gate(gate);
    }

    // ---- Proposals

    fn take_proposals(&mut self) -> bool {
        let mut taken = 0;
        let mut proposals = self.proposals.borrow_mut();
        while taken < self.config.ingress_capacity && (proposals.has_room() || !proposals.is_gate_open()) {
            let Some(submission) = self.shared.ingress.pop() else { break };
            proposals.take(submission, &mut self.deliveries);
            taken += 1;
        }
        taken > 0
    }

    /// Seals the open batch whenever the log has room for another write: the batch is what arrived meanwhile.
    fn seal(&mut self) -> Result<bool, StopError> {
        let mut progressed = false;
        // Without space, what is left is for the engine's own batches.
        while !self.no_space && self.pending.is_empty() && self.raft().is_some_and(Raft::can_accept_proposals)
        {
            self.open_batch()?;
            let slot_bytes = self.proposals.borrow().sealable_slot_bytes();
            if !slot_bytes.is_some_and(|bytes| self.wal.is_ready_for(bytes)) {
                break;
            }
            self.propose(BatchKind::Commands)?;
            progressed = true;
        }
        Ok(progressed)
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

    fn seal_empty(&mut self) -> Result<(), StopError> {
        self.propose(BatchKind::Empty)?;
        self.set_gate();
        Ok(())
    }

    /// Seals a batch at the core's position and hands it to the core.
    fn propose(&mut self, kind: BatchKind) -> Result<(), StopError> {
        let Some((term, first)) = self.raft().and_then(Raft::next_position) else { return Ok(()) };
        let (previous_chain, previous_time) = self.tail();
        // The leader's clock, made monotonic along the log.
        let time_ms = self.now.wall_ms.max(previous_time);
        let seal = Seal { group: GROUP, term, first, kind, time_ms, previous_chain };
        let sealed = match kind {
            BatchKind::Commands => self.proposals.borrow_mut().seal(seal),
            _ => {
                let block = take_block(&self.pool, &mut self.disk, ringraft_block::BLOCK_BYTES);
                Some(BatchBuilder::new(block.map_err(StopError::Memory)?).seal(seal))
            }
        };
        let Some((block, info)) = sealed else { return Ok(()) };
        self.incoming = Some((block, info));
        self.step(Event::Proposed { batch: run_of(&info) })
    }

    /// Chain and time at the end of what the core has accepted.
    fn tail(&self) -> (Chain, u64) {
        let last = self.pending.back().map(|(_, info)| *info).or_else(|| self.wal.last_info());
        last.map_or_else(|| (self.wal.log_end().chain, 0), |info| (info.chain, info.time_ms))
    }

    /// The chain at `index`, a batch end of what the core has accepted.
    fn chain_at(&self, index: LogIndex) -> Option<Chain> {
        let pending = self.pending.iter().find(|(_, info)| info.last == index);
        pending.map(|(_, info)| info.chain).or_else(|| self.wal.chain_at(index))
    }

    // ---- The network

    fn on_network(&mut self) -> Result<bool, StopError> {
        let Some(network) = &mut self.network else { return Ok(false) };
        let now = self.now.monotonic_ns;
        let mut done = std::mem::take(&mut self.link_done);
        let mut events = std::mem::take(&mut self.net_events);
        let mut blocks = Blocks { disk: &mut self.disk, pool: &self.pool };
        self.link.poll(&mut done);
        let mut progressed = !done.is_empty();
        for completion in done.drain(..) {
            network.handle(now, &mut self.link, completion, &mut blocks, &mut events);
        }
        network.advance(now, &mut self.link, &mut blocks, &mut events);
        progressed |= !events.is_empty();
        let mut outcome = Ok(());
        while let Some(event) = events.pop_front() {
            outcome = outcome.and_then(|()| self.on_net_event(event));
        }
        (self.link_done, self.net_events) = (done, events);
        outcome.map(|()| progressed)
    }

    fn on_net_event(&mut self, event: NetEvent<D::Buf>) -> Result<(), StopError> {
        match event {
            NetEvent::Listening { address } => {
                self.shared.status.publish(|status| status.listening = Some(address));
                Ok(())
            }
            NetEvent::ListenFailed { error } => {
                Err(StopError::Listen { address: self.config.listen_address()?, error })
            }
            NetEvent::PeerConnected { peer, incarnation, .. } => {
                let Some(state) = self.peers.get_mut(&peer) else { return Ok(()) };
                state.session = Some(incarnation);
                state.outbox.clear();
                tracing::info!(node = %self.config.node, %peer, "session begins");
                self.announce(peer);
                self.step(Event::PeerConnected { peer })
            }
            NetEvent::PeerDisconnected { peer, cause, .. } => {
                let Some(state) = self.peers.get_mut(&peer) else { return Ok(()) };
                state.session = None;
                state.outbox.clear();
                tracing::info!(node = %self.config.node, %peer, %cause, "session ended");
                if let Life::Forming(formation) = &mut self.life {
                    formation.lost(peer);
                }
                self.step(Event::PeerDisconnected { peer })
            }
            NetEvent::Rejected { remote, reason } => {
                tracing::warn!(node = %self.config.node, ?remote, %reason, "connection rejected");
                let Rejection::RefusedByPeer { reason: RejectReason::WrongIncarnation { known }, .. } =
                    reason
                else {
                    return Ok(());
                };
                if matches!(self.life, Life::Forming(_)) {
                    let (node, own) = (self.config.node, self.incarnation);
                    return Err(FormationError::Replaced { node, known, own }.into());
                }
                Ok(())
            }
            NetEvent::Frame { peer, frame, .. } => self.on_frame(peer, frame),
        }
    }

    fn on_frame(&mut self, peer: NodeId, frame: Frame<D::Buf>) -> Result<(), StopError> {
        let Ok(body) = wire::decode(frame.kind, frame.body()) else {
            return self.refuse(peer, "malformed body");
        };
        let attachment = frame.attachment;
        match body {
            Body::Formation(message) => self.on_formation(peer, &message),
            _ if !matches!(self.life, Life::Running(_)) => Ok(()),
            Body::Append(message) => self.on_append(peer, message, attachment.map(|a| (a.block, a.bytes))),
            Body::AppendAck(message) => self.on_ack(peer, message),
            Body::Vote(vote) => self.step(Event::Received { from: peer, message: Message::Vote(vote) }),
            Body::VoteReply(reply) => {
                self.step(Event::Received { from: peer, message: Message::VoteReply(reply) })
            }
        }
    }

    fn refuse(&mut self, peer: NodeId, why: &'static str) -> Result<(), StopError> {
        tracing::error!(node = %self.config.node, %peer, why, "peer disconnected");
        if let Some(network) = &mut self.network {
            network.disconnect(peer, &mut self.link);
        }
        Ok(())
    }

    fn on_formation(&mut self, peer: NodeId, message: &FormationMessage) -> Result<(), StopError> {
        let Some(session) = self.peers.get(&peer).and_then(|peer| peer.session) else { return Ok(()) };
        let Life::Forming(formation) = &mut self.life else { return Ok(()) };
        let step = formation.heard(peer, session, message)?;
        self.form(step)
    }

    fn on_append(
        &mut self,
        from: NodeId,
        message: AppendMessage,
        attachment: Option<(Block<D::Buf>, usize)>,
    ) -> Result<(), StopError> {
        let AppendMessage { append, previous_chain, chain } = message;
        // The body promises a batch exactly when one is attached.
        let incoming = match (append.batch, attachment) {
            (None, None) => None,
            (Some(run), Some((block, bytes))) => {
                let image = block.get(ENVELOPE_BYTES..ENVELOPE_BYTES + bytes);
                let Some(Ok(view)) = image.map(parse_image) else {
                    return self.refuse(from, "damaged batch image");
                };
                let info = view.info();
                if info.image_bytes as usize > self.config.image_bytes_max() {
                    return self
                        .refuse(from, "a batch too large for this node's segments: make limits equal");
                }
                let named = run_of(&info) == run && info.chain == chain && info.group == GROUP;
                if !named || !view.verify_chain(previous_chain) {
                    return self.refuse(from, "a batch image that is not the one announced");
                }
                Some((block, info))
            }
            _ => return self.refuse(from, "an append without its batch image"),
        };
        let previous = append.previous;
        let known = self.raft().is_some_and(|raft| raft.term_at(previous.index) == Some(previous.term));
        if known && append.term >= self.raft().map_or(append.term, Raft::term) {
            let own = self.chain_at(previous.index);
            invariant(own == Some(previous_chain), || {
                format!(
                    "node {from}'s log and this one differ at {previous:?}: {previous_chain:?}, here {own:?}"
                )
            })?;
        }
        self.incoming = incoming;
        let outcome = self.step(Event::Received { from, message: Message::Append(append) });
        self.incoming = None;
        outcome
    }

    fn on_ack(&mut self, from: NodeId, message: AckMessage) -> Result<(), StopError> {
        let AckMessage { ack, chain, .. } = message;
        if let AppendOutcome::Matched { matched } = ack.outcome {
            let leads =
                self.raft().is_some_and(|raft| raft.role() == Role::Leader && raft.term() == ack.term);
            if leads && self.chain_at(matched.index) != Some(chain) {
                return self.refuse(from, "an ack that names another chain than this leader's log");
            }
        }
        self.step(Event::Received { from, message: Message::AppendAck(ack) })
    }

    /// Adds what only the driver knows to a message of the core and queues it for the peer.
    fn send(&mut self, to: NodeId, message: Message) -> Result<(), StopError> {
        let chain_at = |index: LogIndex| {
            let chain = self.chain_at(index);
            chain.ok_or_else(|| StopError::Invariant(format!("index {index} is no batch end of this log")))
        };
        let outgoing = match message {
            Message::Append(append) => {
                let previous_chain = chain_at(append.previous.index)?;
                let chain = append.batch.map_or(Ok(previous_chain), |batch| chain_at(batch.last))?;
                Outgoing::Append(AppendMessage { append, previous_chain, chain })
            }
            Message::AppendAck(ack) => {
                let chain = match ack.outcome {
                    AppendOutcome::Matched { matched } => chain_at(matched.index)?,
                    _ => Chain::default(),
                };
                Outgoing::Ack(AckMessage { ack, chain, stages: AckStages::default() })
            }
            Message::Vote(vote) => Outgoing::Vote(vote),
            Message::VoteReply(reply) => Outgoing::VoteReply(reply),
        };
        if let Some(peer) = self.peers.get_mut(&to).filter(|peer| peer.session.is_some()) {
            peer.outbox.push(outgoing);
        }
        Ok(())
    }

    /// Moves what the outboxes can send to the network, and that to the sockets.
    fn send_queued(&mut self) {
        let Some(network) = &mut self.network else { return };
        let durable = self.wal.durable_through();
        for (id, peer) in &mut self.peers {
            loop {
                let (message, batch) = match peer.outbox.head(&self.recent, durable) {
                    Head::Empty | Head::Waiting => break,
                    Head::Fetch(first) => {
                        self.wal.read(&mut self.disk, id.get(), first, READ_BYTES);
                        break;
                    }
                    Head::Ready(message, batch) => (message, batch),
                };
                let attachment = batch.map(|batch| {
                    let image = ENVELOPE_BYTES..ENVELOPE_BYTES + batch.info.image_bytes as usize;
                    (Rc::clone(&batch.block), image)
                });
                let (kind, body) = match message {
                    Outgoing::Append(message) => (wire::kind::APPEND, self.encoder.append(message)),
                    Outgoing::Ack(message) => (wire::kind::APPEND_ACK, self.encoder.ack(message)),
                    Outgoing::Vote(vote) => (wire::kind::VOTE, self.encoder.vote(vote)),
                    Outgoing::VoteReply(reply) => (wire::kind::VOTE_REPLY, self.encoder.vote_reply(reply)),
                };
                match network.send(*id, kind, GROUP, body, attachment) {
                    Ok(()) => peer.outbox.pop(),
                    Err(ringraft_net::SendError::Full) => break,
                    Err(ringraft_net::SendError::NotConnected) => {
                        peer.outbox.clear();
                        break;
                    }
                }
            }
        }
        network.flush(&mut self.link);
    }

    // ---- Apply

    fn apply(&mut self) -> Result<bool, StopError> {
        let Some(commit) = self.raft().map(Raft::commit) else { return Ok(false) };
        let before = self.applier.applied();
        let applied = self.applier.advance(
            commit,
            self.wal.durable_through(),
            self.config.apply_bytes_per_turn,
            &self.recent,
            &mut self.proposals.borrow_mut(),
            &mut self.deliveries,
        );
        match applied.map_err(StopError::Invariant)? {
            Applied::Fetch(first) if !self.closing => {
                self.wal.read(&mut self.disk, APPLY_READ, first, READ_BYTES)
            }
            Applied::Fetch(_) | Applied::Current | Applied::More | Applied::Waiting => {}
        }
        let wanted = self.wanted_from();
        self.recent.trim(wanted, self.wal.durable_through());
        Ok(self.applier.applied() > before)
    }

    /// The first index that apply or a peer that keeps up will ask for.
    fn wanted_from(&self) -> LogIndex {
        let next = self.applier.applied().next();
        let Some(raft) = self.raft().filter(|raft| raft.role() == Role::Leader) else { return next };
        let connected = self.peers.iter().filter(|(_, peer)| peer.session.is_some());
        let unsent = connected.filter_map(|(id, peer)| {
            // What is in the outbox has been sent as far as the core knows.
            let queued = if peer.outbox.is_empty() { None } else { Some(LogIndex(0)) };
            queued.or_else(|| raft.progress(*id).map(|progress| progress.next))
        });
        unsent.min().map_or(next, |unsent| unsent.min(next))
    }

    // ---- The end

    fn close_if_asked(&mut self) {
        if !self.closing && self.shared.ingress.shutdown_requested() {
            self.closing = true;
            let stopped = Refusal::Stopped(StopError::Requested.into());
            self.proposals.borrow_mut().set_gate(Err(stopped));
            if let Some(network) = &mut self.network {
                network.close(&mut self.link);
            }
            self.wal.close(&mut self.disk);
        }
    }

    fn stop(&mut self, error: StopError) {
        if matches!(error, StopError::Requested) {
            tracing::info!(node = %self.config.node, "stopped");
        } else {
            tracing::error!(node = %self.config.node, %error, "stopped");
        }
        let cause = StopCause::from(error);
        let refusal = Refusal::Stopped(cause.clone());
        let unknown = |_| UnknownOutcome::Stopped(cause.clone());
        let mut proposals = self.proposals.borrow_mut();
        proposals.abandon(unknown, &refusal, &mut self.deliveries);
        proposals.set_gate(Err(refusal));
        drop(proposals);
        self.deliveries.flush();
        self.shared.ingress.stop(cause.clone());
        if let Some(network) = &mut self.network {
            network.close(&mut self.link);
        }
        self.life = Life::Stopped;
        self.shared.status.publish(|status| {
            status.role = Role::Follower;
            status.leader = None;
            status.stopped = Some(cause);
        });
    }

    fn publish(&self) {
        let Some(raft) = self.raft() else { return };
        let (applied, chain) = self.applied();
        let leader = self.leader_hint();
        self.shared.status.publish(|status| {
            status.formed = true;
            status.role = raft.role();
            status.term = raft.term();
            status.leader = leader;
            status.last = raft.last().index;
            status.durable = raft.durable();
            status.commit = raft.commit();
            status.applied = applied;
            status.applied_chain = chain.0;
        });
    }
}

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Turn for Driver<D, L, S> {
    fn turn(&mut self, now: Now) -> TurnOutcome {
        self.now = now;
        if matches!(self.life, Life::Stopped) {
            return TurnOutcome { progressed: false, next_deadline_ns: u64::MAX, stop: true };
        }
        match self.run_turn() {
            Ok(progressed) => {
                self.publish();
                let raft = self.raft().filter(|_| !self.closing);
                let core = raft.map_or(u64::MAX, |raft| raft.next_deadline().0);
                let network = self.network.as_ref().map_or(u64::MAX, Network::next_deadline);
                let log = self.witness_at_ns.min(self.space_retry_at_ns);
                TurnOutcome { progressed, next_deadline_ns: core.min(network).min(log), stop: false }
            }
            Err(error) => {
                self.stop(error);
                TurnOutcome { progressed: true, next_deadline_ns: u64::MAX, stop: true }
            }
        }
    }
}

fn run_of(info: &BatchInfo) -> BatchRun {
    BatchRun { first: info.first, last: info.last, term: info.term, bytes: info.image_bytes }
}

fn invariant(holds: bool, what: impl FnOnce() -> String) -> Result<(), StopError> {
    if holds { Ok(()) } else { Err(StopError::Invariant(what())) }
}

fn take_first<T>(queue: &mut VecDeque<T>, matches: impl Fn(&T) -> bool) -> Option<T> {
    if queue.front().is_some_and(matches) { queue.pop_front() } else { None }
}

const _: () = assert!(BATCH_BYTES_CAP <= u32::MAX as usize);
