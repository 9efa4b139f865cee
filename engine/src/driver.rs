//! One turn of a node: take what completed, ask the core, submit what it answered.
//!
//! [`Driver::turn`] is synchronous, never blocks and does a bounded amount of work. It is the only place where the
//! core, the log and the network meet; each of them is a machine of its own that knows nothing of the others.
//!
//! The life of a command here: `take_proposals` copies it into the open batch; `seal` seals that at the core's
//! position; the core answers with one persist and one append per follower, which are under way together; `on_disk` and
//! `on_network` bring the durabilities back; the core moves the commit index; `apply` runs the state machine and delivers the
//! outcome.

mod clock;
mod installs;
mod log;
mod membership;
mod pace;
mod peers;
mod proposing;
mod reads;
mod referrals;
mod repair;
mod snapshots;
mod stages;
mod stall;
mod transfer;

use crate::apply::Applier;
use crate::config::{BATCH_BYTES_CAP, Config, ConfigError};
use crate::error::{Refusal, StopCause, StopError, TransferError, UnknownOutcome};
use crate::formation::Formation;
use crate::handle::{Handle, LocalHandle, PeerStatus, Shared, SnapshotError};
use crate::membership::MembershipError;
use crate::mutants::{self, Mutant};
use crate::outbox::{Outbox, Outgoing};
use crate::proposals::{LocalIngress, ProposalLimits, Proposals};
use crate::raft::{Action, BatchRun, Configuration, Epoch, Event, Nanos, Raft, Role};
use crate::recent::Recent;
use crate::requests::Request;
use crate::runtime::{IdlePolicy, LocalWakeup, Now, Turn, TurnOutcome, Wakeup};
use crate::sessions::SessionTable;
use crate::state_machine::StateMachine;
use crate::tickets::Deliveries;
use crate::wire::{AckStages, Encoder};
pub(crate) use installs::PIECE_BYTES;
use pace::Pace;
use ringraft_block::{
    Block, BlockBuf, GroupId, Incarnation, LogIndex, NodeId, Pool, Term, round_up_to_block,
};
use ringraft_net::link::Link;
use ringraft_net::{BlockSource, NetEvent, Network, Session};
use ringraft_wal::disk::Disk;
use ringraft_wal::format::{BatchInfo, Chain};
use ringraft_wal::{HardStateUpdate, Wal, WalEvent};
use stages::Stages;
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
pub use transfer::{HandedOver, HandoverCause, Transferred};

/// The only group of this version.
const GROUP: GroupId = GroupId(0);
/// The read that feeds the state machine; reads for a peer carry its id.
const APPLY_READ: u64 = u64::MAX;
/// A log that has been idle for so long records how far it is durable.
const WITNESS_DELAY_NS: u64 = 1_000_000_000;
/// How often a log without space tries again to reserve some.
const SPACE_RETRY_NS: u64 = 1_000_000_000;
/// It is looked so often when a leader's peers were active.
const ACTIVITY_INTERVAL_NS: u64 = 1_000_000;
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
    /// Where a follower spends its time, for the leader to know.
    stages: Stages,
    pace: Pace,
    /// Saves that the core asked for and the log's number for each, until they are durable.
    saves: VecDeque<(u64, u64)>,
    /// Messages that must not leave before a save is durable.
    deferred: VecDeque<Deferred>,
    no_space: bool,
    space_retry_at_ns: u64,
    /// When the log is told next that time has passed for a segment that is being filled.
    fill_at_ns: u64,
    witness_at_ns: u64,
    /// When to look again when peers were active.
    activity_at_ns: u64,
    clock: clock::LogClock,
    repair: repair::Repairer<D::Buf>,
    stall: stall::StallWatch,
    handover: transfer::Handover,
    reads: reads::Reads,
    snapshots: snapshots::Snapshots<D::Buf>,
    members: membership::Members,
    referrals: referrals::Referrals,
    /// Since when the address to listen at is in use.
    address_in_use_since_ns: Option<u64>,
    /// There is something to apply, and nothing to wait for.
    apply_due: bool,
    /// Until then a turn without news has nothing to do but to let the log and the network go on; 0 when the last one has left
    /// something.
    rests_until_ns: u64,
    /// This turn had to do with a read.
    read_worked: bool,
    /// This turn has brought commands a step further.
    advanced: bool,
    /// There is something to send, and nothing to wait for.
    sends_on: bool,
    closing: bool,
    /// The last turn began to close, or to hand over before that.
    ends: bool,
    /// The log has closed; what is under way with snapshots has not.
    closed: bool,

    encoder: Encoder,
    actions: Vec<Action>,
    disk_done: Vec<ringraft_wal::disk::DiskDone<D::Buf>>,
    link_done: Vec<ringraft_net::link::LinkDone<D::Buf>>,
    wal_events: VecDeque<WalEvent<D::Buf>>,
    net_events: VecDeque<NetEvent<D::Buf>>,
}

/// A message that must not leave before a save of the hard state is durable.
struct Deferred {
    sequence: u64,
    to: NodeId,
    term: Term,
    message: Outgoing,
}

/// How far a node has come.
enum Life {
    /// The log is being opened.
    Opening,
    /// The log is open; the cluster is not formed as far as this node knows.
    Forming(Formation),
    /// It is; what was applied is being restored.
    Restoring,
    /// The core runs.
    Running(Box<Raft>),
    /// It is over.
    Stopped,
}

struct Peer<B: BlockBuf> {
    outbox: Outbox<B>,
    /// The incarnation of the session, while there is one.
    session: Option<Incarnation>,
    /// The number of that session.
    number: Option<Session>,
    /// What it said last, to this leader.
    stages: Option<AckStages>,
    /// It said that its log has no space.
    no_space: bool,
    /// When it was last heard, and last sent to, as of [`Driver::note_activity`].
    active_ns: (Option<u64>, Option<u64>),
    /// Where it was found in this session, by hearsay, and where it was known to be otherwise.
    moved_to: Option<(SocketAddr, Option<SocketAddr>)>,
}

impl<B: BlockBuf> Peer<B> {
    fn new() -> Self {
        Self {
            outbox: Outbox::new(),
            session: None,
            number: None,
            stages: None,
            no_space: false,
            active_ns: (None, None),
            moved_to: None,
        }
    }
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
            peers: others.map(|member| (member.id, Peer::new())).collect(),
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
            stages: Stages::default(),
            pace: Pace::default(),
            saves: VecDeque::new(),
            deferred: VecDeque::new(),
            no_space: false,
            space_retry_at_ns: u64::MAX,
            fill_at_ns: u64::MAX,
            witness_at_ns: u64::MAX,
            activity_at_ns: 0,
            clock: clock::LogClock::default(),
            repair: repair::Repairer::new(&config),
            stall: stall::StallWatch::default(),
            handover: transfer::Handover::default(),
            reads: reads::Reads::new(),
            snapshots: snapshots::Snapshots::new(&config),
            members: membership::Members::default(),
            referrals: referrals::Referrals::default(),
            address_in_use_since_ns: None,
            apply_due: false,
            rests_until_ns: 0,
            read_worked: false,
            advanced: false,
            sends_on: false,
            closing: false,
            ends: false,
            closed: false,
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

    /// Whether it was asked to stop, has drained, and only waits for the log and the connections to close: it takes nothing
    /// up any more, its core no tick.
    pub fn is_closing(&self) -> bool {
        self.closing
    }

    /// The next turn looks at everything, even if the last one has left nothing to do: for tests of that.
    pub fn rouse(&mut self) {
        self.rests_until_ns = 0;
    }

    /// Whether there is a session with `peer`.
    pub fn has_session_with(&self, peer: NodeId) -> bool {
        self.peers.get(&peer).is_some_and(|peer| peer.session.is_some())
    }

    /// The core, once the cluster is formed.
    pub fn raft(&self) -> Option<&Raft> {
        match &self.life {
            Life::Running(raft) => Some(raft),
            _ => None,
        }
    }

    /// Frames of other members that arrived damaged since the start.
    pub fn frames_damaged(&self) -> u64 {
        let counted = self.network.as_ref().map(Network::stats).unwrap_or_default();
        counted.checksum_errors + counted.frame_errors
    }

    /// How leadership was handed over last, if this node gave it away since its start.
    pub fn handed_over(&self) -> Option<HandedOver> {
        self.handover.last()
    }

    /// The log.
    pub fn wal(&self) -> &Wal<D> {
        &self.wal
    }

    /// The user's state machine.
    pub fn machine(&self) -> &S {
        self.applier.machine()
    }

    /// The end of what was applied, and the chain there; of a state that was lost, where the log that is left begins.
    pub fn applied(&self) -> (LogIndex, Chain) {
        (self.applier.applied(), self.applier.chain())
    }

    /// The sessions as of what was applied: equal on all nodes that have applied as much.
    pub fn sessions(&self) -> &SessionTable {
        self.applier.sessions()
    }

    /// What each stage makes of the time and of what has come, in an order in which hardly any leaves something to one before
    /// it; what it does leave there, [`Self::has_more`] knows. True if nothing but the log, with work of its own, and the network had
    /// anything to do.
    fn run_turn(&mut self) -> Result<bool, StopError> {
        (self.read_worked, self.advanced) = (false, false);
        let before = self.milestones();
        let disk_news = self.on_disk()?;
        let network_news = self.on_network()?;
        if !disk_news && !network_news && self.is_at_rest() {
            // A send has completed, or a part of a frame has come, or the log has taken one of the many steps in which it scrubs,
            // makes segments and saves its hard state: many of the turns of a node that is busy.
            self.note_operation();
            self.stall.looked(self.now.monotonic_ns);
            self.trim_recent();
            self.send_queued();
            return Ok(true);
        }
        self.take_requests();
        self.watch_disk()?;
        self.step(Event::Tick)?;
        self.mend()?;
        self.advanced |= self.take_proposals();
        self.begin_transfers()?;
        self.read_worked |= self.take_reads()?;
        self.write_pending();
        self.seal()?;
        self.advance_handover()?;
        self.keep_members()?;
        self.ask_around();
        self.apply()?;
        self.read_worked |= self.serve_reads()?;
        self.seal_barrier()?;
        self.mind_snapshots()?;
        self.send_queued();
        self.deliveries.flush();
        self.keep_log();
        self.ends = self.close_if_asked()?;
        self.note_operation();
        let after = self.milestones();
        self.advanced |= after != before;
        let [_, durable, commit, _] = after;
        let leads = self.raft().is_some_and(|raft| raft.role() == Role::Leader);
        let ended = if leads { commit } else { durable.max(commit) };
        self.pace.ended(ended, self.now.monotonic_ns);
        Ok(false)
    }

    /// Whether what commands wait for takes longer than the core would look for it, and it would look in vain.
    fn commands_take_long(&self) -> bool {
        let IdlePolicy::Adaptive { spin_us } = self.config.idle else { return false };
        self.pace.is_long(spin_us.saturating_mul(1_000))
    }

    /// How far commands have come: in the log, on its disk, committed, applied.
    fn milestones(&self) -> [LogIndex; 4] {
        let (last, commit) =
            self.raft().map_or_else(Default::default, |raft| (raft.last().index, raft.commit()));
        [last, self.wal.durable_through(), commit, self.applier.applied()]
    }

    /// Whether the last turn has left nothing to do, nothing that only time brings is due, and nobody here asks for anything. What
    /// looks at the time without a deadline of its own is not at rest while it has anything to look for.
    fn is_at_rest(&self) -> bool {
        let now_ns = self.now.monotonic_ns;
        let Life::Running(raft) = &self.life else { return false };
        now_ns < self.rests_until_ns
            && now_ns < self.stall_deadline()
            && (raft.role() != Role::Leader || now_ns < self.activity_at_ns)
            && self.stall.stalled_ms(now_ns).is_none()
            && self.pending.is_empty()
            && !self.shared.ingress.has_any()
            && !self.proposals.borrow().has_unsealed()
            && !self.proposals.borrow().has_arriving()
            && self.snapshots.is_at_rest(now_ns)
            && !(self.no_space || self.closing || raft.is_state_lost())
            && self.wal.first_damaged().is_none()
            // The log may have begun to fill a segment, or have filled it, of which nothing tells.
            && self.wal.is_filling() == (self.fill_at_ns < u64::MAX)
    }

    /// When the next turn is to come without news of the network or of the disk.
    fn due_ns(&self) -> u64 {
        let now_ns = self.now.monotonic_ns;
        let members = self.members.next_deadline(self.pin_patience_ns());
        let log = self.witness_at_ns.min(self.space_retry_at_ns).min(self.fill_at_ns);
        let always = members.min(log).min(self.handover.next_deadline()).min(self.reads_deadline());
        if self.closing {
            return always;
        }
        let core = self.raft().map_or(u64::MAX, |raft| raft.next_deadline().0);
        let (repair, referrals) = (self.repair.next_deadline(), self.referrals.next_deadline());
        always.min(core).min(repair).min(referrals).min(self.snapshots.next_deadline(now_ns))
    }

    /// Whether another turn at the same moment would do more.
    fn has_more(&self) -> bool {
        let proposals = self.proposals.borrow();
        let commands = proposals.has_arriving() || self.shared.ingress.has_commands();
        let stale = self.members.is_stale() && self.raft().is_some();
        self.ends
            || self.wal.is_due()
            || self.network_has_more()
            || stale
            || self.apply_due
            || self.has_reads_to_answer()
            || commands && proposals.takes_more()
            || self.takes_reads() && self.shared.ingress.has_reads()
    }

    // ---- The core

    fn step(&mut self, event: Event) -> Result<(), StopError> {
        let Life::Running(raft) = &mut self.life else { return Ok(()) };
        self.rests_until_ns = 0;
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
                self.stages.truncate_after(after);
                self.pace.truncate_after(after);
                self.recent.truncate_after(after);
                self.applier.truncate_after(after);
                self.repair.truncate_after(after);
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
                let term = message.term();
                let message = self.complete(message)?;
                self.deferred.push_back(Deferred { sequence, to, term, message });
                Ok(())
            }
            // `apply` reads the commit index from the core.
            Action::Commit { up_to } => {
                self.apply_due = true;
                self.members.committed(up_to);
                Ok(())
            }
            Action::Become { role, .. } => {
                self.role_changed(role);
                Ok(())
            }
            Action::SealEmpty => self.seal_empty(),
            // The log that closes takes no further saves: the next start finds the claim, and that nothing is missing.
            Action::ReleaseClaim if self.closing => Ok(()),
            Action::ReleaseClaim => {
                tracing::info!(node = %self.config.node, "the log lacks nothing any more that this node may have acknowledged");
                self.wal.release_claim(&mut self.disk);
                Ok(())
            }
            Action::TransferEnded { end } => self.transfer_ended(end),
            Action::OwnDiskSlow { own, others, to } => {
                self.handover.disk_is_slow(own, others, to);
                Ok(())
            }
            Action::SendSnapshot { to } => {
                self.snapshots.installs.wanted_by(to);
                Ok(())
            }
            Action::InstallSnapshot { last, epoch } => self.install(last, epoch),
            Action::Stop { violation } => Err(StopError::Invariant(violation.to_string())),
            Action::ReadReady { id, index } => {
                self.read_ready(id, index);
                Ok(())
            }
            Action::ReadRefused { id, reason } => {
                self.read_refused(id, reason);
                Ok(())
            }
            Action::SealConfiguration { configuration } => self.seal_configuration(configuration),
            Action::MembersChanged => {
                self.members.changed();
                Ok(())
            }
            Action::ChangeEnded { ticket, outcome } => {
                self.change_ended(ticket, outcome);
                Ok(())
            }
        }
    }

    fn role_changed(&mut self, role: Role) {
        tracing::info!(node = %self.config.node, ?role, "role");
        self.peers.values_mut().for_each(|peer| peer.stages = None);
        if role != Role::Leader && !mutants::active(Mutant::WaitersKeptAfterDeposition) {
            let refusal = self.refusal();
            let unknown = |index| UnknownOutcome::LeadershipLost { index };
            let certain = self.raft().map_or(LogIndex(0), Raft::commit);
            self.proposals.borrow_mut().abandon(certain, unknown, &refusal, &mut self.deliveries);
            self.reads_lose_leadership();
            for peer in self.peers.values_mut() {
                peer.outbox.clear_batches();
            }
            self.snapshots.installs.deposed();
        }
        self.handover_role_changed();
        self.set_gate();
    }

    /// Takes what handles ask besides commands and reads to whoever sees to it later in the turn.
    fn take_requests(&mut self) {
        for request in self.shared.ingress.take_requests() {
            match request {
                Request::Transfer { to, slot } => self.handover.ask(to, slot),
                Request::Snapshot { slot } => self.snapshots.ask(slot),
                Request::Members(request) => self.members.ask(request),
            }
        }
    }

    // ---- The end

    /// True when it begins to close, or to hand over before that: neither need wait for anything.
    fn close_if_asked(&mut self) -> Result<bool, StopError> {
        let asked = !self.closing && self.shared.ingress.shutdown_requested();
        let drains = asked && !self.is_draining();
        if asked && self.is_drained()? {
            self.closing = true;
            let stopped = Refusal::Stopped(StopError::Requested.into());
            self.proposals.borrow_mut().set_gate(Err(stopped));
            self.stop_reads(&StopError::Requested.into());
            if let Some(network) = &mut self.network {
                network.close(&mut self.link);
            }
            self.wal.close(&mut self.disk);
        }
        Ok(drains || asked && self.closing)
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
        proposals.abandon(LogIndex(0), unknown, &refusal, &mut self.deliveries);
        proposals.set_gate(Err(refusal));
        drop(proposals);
        self.deliveries.flush();
        self.handover.stopped(|| TransferError::Stopped(cause.clone()));
        self.stop_reads(&cause);
        self.shared.ingress.stop(cause.clone());
        self.snapshots.refuse_all(&SnapshotError::Stopped(cause.clone()));
        self.members.stop(&MembershipError::Stopped(cause.clone()));
        if let Some(network) = &mut self.network {
            network.close(&mut self.link);
        }
        self.life = Life::Stopped;
        self.shared.status.publish(|status| {
            status.role = Role::Follower;
            status.leader = None;
            status.peers.clear();
            status.stopped = Some(cause);
        });
    }

    fn publish(&self) {
        let Some(raft) = self.raft() else { return };
        // Of a state that cannot be read nothing is applied, wherever the log begins.
        let lost = raft.is_state_lost();
        let (applied, chain) = if lost { (LogIndex(0), Chain::default()) } else { self.applied() };
        let leader = self.leader_hint();
        let damage = self.damage_status(raft);
        let snapshot = self.snapshots.status(lost);
        let now_ns = self.now.monotonic_ns;
        let age = |at_ns: Option<u64>| Some(Duration::from_nanos(now_ns.saturating_sub(at_ns?)));
        let peers = self.peers.iter().filter_map(|(id, peer)| {
            let matched = raft.progress(*id)?.matched;
            let Peer { stages, no_space, active_ns: (heard_ns, sent_ns), .. } = *peer;
            let (connected, heard_age, sent_age) = (peer.session.is_some(), age(heard_ns), age(sent_ns));
            Some(PeerStatus { id: *id, connected, matched, stages, no_space, heard_age, sent_age })
        });
        let (frames_damaged, handed_over) = (self.frames_damaged(), self.handover.last());
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
            status.damage = damage;
            status.snapshot = snapshot;
            status.peers.clear();
            status.peers.extend(peers);
            status.frames_damaged = frames_damaged;
            status.handed_over = handed_over;
            if !Arc::ptr_eq(&status.membership, self.members.view()) {
                status.membership = Arc::clone(self.members.view());
            }
        });
    }
}
impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Turn for Driver<D, L, S> {
    fn turn(&mut self, now: Now) -> TurnOutcome {
        self.now = now;
        if matches!(self.life, Life::Stopped) {
            return TurnOutcome { worked: false, more: false, next_deadline_ns: u64::MAX, stop: true };
        }
        match self.run_turn() {
            Ok(rested) => {
                if !rested {
                    self.note_activity();
                    self.publish();
                    self.rests_until_ns = self.due_ns();
                }
                let network = self.network.as_ref().map_or(u64::MAX, Network::next_deadline);
                let next_deadline_ns = self.rests_until_ns.min(network).min(self.stall_deadline());
                let more = self.has_more();
                if more {
                    self.rests_until_ns = 0;
                }
                let take_long = self.commands_take_long();
                self.shared.patience.set_over(take_long);
                let worked = self.read_worked || self.advanced && !take_long;
                TurnOutcome { worked, more, next_deadline_ns, stop: false }
            }
            Err(error) => {
                self.stop(error);
                TurnOutcome { worked: false, more: false, next_deadline_ns: u64::MAX, stop: true }
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
