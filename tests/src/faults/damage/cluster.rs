//! A small cluster in virtual time, without trouble of its own: what it suffers is done to its disks while it is down.

use crate::sim::check::{Fate, History, Recorder};
use crate::sim::clock::NodeClock;
use crate::sim::context::{Context, MICROSECOND, MILLISECOND, SECOND, Time};
use crate::sim::disk::{Crash, DiskConfig, DiskState, SimDisk};
use crate::sim::kv::{Command, CommandId, Operation};
use crate::sim::link::{Fabric, LinkConfig, SimLink, address_of};
use crate::sim::node::{CANDIDATE, LEADER, View};
use crate::sim::rng::Rng;
use crate::sim::trace::What;
use ringraft::config::{Config, MemberConfig};
use ringraft::driver::Driver;
use ringraft::error::ProposeError;
use ringraft::handle::{Completion, Handle, LocalPipeline, Status};
use ringraft::raft::{Role, invariants};
use ringraft::runtime::{LocalWakeup, Now, Turn, Wakeup};
use ringraft::state_machine::{CommittedBatch, Replies, StateMachine};
use ringraft_block::{ClusterId, LogIndex, NodeId};
use ringraft_wal::Wal;
use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Machines.
pub const NODES: usize = 3;

const ELECTION_TIMEOUT_MS: u64 = 100;
/// The smallest segments hold sixteen batches with one such command.
const COMMAND_BYTES_MAX: usize = 40 << 10;
const PORT: u16 = 7_000;

struct Applied(Recorder);

impl StateMachine for Applied {
    fn apply(&mut self, batch: &CommittedBatch<'_>, replies: &mut Replies) {
        for command in batch.commands() {
            let reply = self.0.apply(command.index.get(), command.term.get(), command.bytes);
            replies.push(reply.to_le_bytes().to_vec());
        }
    }
}

/// The configuration of a node.
#[must_use]
pub fn config(node: usize) -> Config {
    let id_of = |node: usize| NodeId(node as u64 + 1);
    let member = |node| MemberConfig { id: id_of(node), address: SocketAddr::new(address_of(node), PORT) };
    let members = (0..NODES).map(member).collect();
    Config {
        insecure: true,
        election_timeout: Duration::from_millis(ELECTION_TIMEOUT_MS),
        heartbeat_interval: Duration::from_millis(ELECTION_TIMEOUT_MS / 8),
        segments_ahead: 1,
        batch_bytes_max: 8192,
        command_bytes_max: COMMAND_BYTES_MAX,
        window_batches: 8,
        segment_bytes: 1 << 20,
        ..Config::new(ClusterId(0x5eed), id_of(node), members, "simulated")
    }
}

struct Process {
    driver: Driver<SimDisk, SimLink, Applied>,
    handle: Handle,
    local: LocalPipeline,
    completions: Vec<Completion>,
}

/// A machine, on or off.
pub struct Machine {
    /// Its disk.
    pub disk: Rc<RefCell<DiskState>>,
    clock: NodeClock,
    process: Option<Process>,
    rng: Rng,
    busy_until: Time,
    wake_at: Time,
    /// Where its node stands.
    pub view: View,
    /// Why its node stopped by itself.
    pub stopped: Option<String>,
    /// Consecutive turns that nothing from outside called for, and when the first of them was.
    idle: (u64, Time),
}

/// A node that takes so many turns in [`SPIN_TIME`] with nothing from outside spins.
const SPIN_TURNS: u64 = 1_000;
const SPIN_TIME: Time = 100 * MILLISECOND;

/// The machines, their network and one client.
pub struct Cluster {
    /// Time and trace.
    pub context: Rc<Context>,
    fabric: Rc<RefCell<Fabric>>,
    /// The machines.
    pub machines: Vec<Machine>,
    /// What was seen.
    pub history: Rc<RefCell<History>>,
    /// The client's next command.
    pub next: usize,
    /// Its commands that wait for an answer, and where.
    waiting: Vec<(usize, usize)>,
    /// Answers that said "committed".
    pub acknowledged: u64,
}

impl Cluster {
    /// A cluster on these disks, all off.
    #[must_use]
    pub fn new(
        context: &Rc<Context>,
        mut rng: Rng,
        disks: Option<Vec<Rc<RefCell<DiskState>>>>,
        history: Rc<RefCell<History>>,
        next: usize,
    ) -> Self {
        let fabric = Fabric::new(context, NODES, rng.fork(1), LinkConfig::default());
        let disks = disks.unwrap_or_else(|| {
            let disk =
                |node| DiskState::new(context, node, rng.fork(10 + node as u64), DiskConfig::default());
            (0..NODES).map(disk).collect()
        });
        let machine = |(node, disk): (usize, Rc<RefCell<DiskState>>)| {
            let mut own = rng.fork(20 + node as u64);
            Machine {
                disk,
                clock: NodeClock::new(0, own.below(SECOND), 0),
                process: None,
                rng: own,
                busy_until: 0,
                wake_at: Time::MAX,
                view: View::default(),
                stopped: None,
                idle: (0, 0),
            }
        };
        let machines = disks.into_iter().enumerate().map(machine).collect();
        let context = Rc::clone(context);
        Self { context, fabric, machines, history, next, waiting: Vec::new(), acknowledged: 0 }
    }

    /// Starts a node.
    ///
    /// # Panics
    /// When it runs, or its configuration is refused.
    pub fn boot(&mut self, node: usize) {
        let now = self.context.now();
        self.context.record(node, What::Boot, 0, 0);
        self.fabric.borrow_mut().boot(node);
        let machine = &mut self.machines[node];
        assert!(machine.process.is_none(), "node {node} runs");
        let (disk, link) = (SimDisk::new(&machine.disk), SimLink::new(&self.fabric, node));
        let recorder = Applied(Recorder::new(&self.history, node));
        let seed = machine.rng.bits();
        let wakeup = Arc::new(Wakeup::new());
        let (driver, handle) = Driver::with_backend(config(node), seed, wakeup, disk, link, recorder)
            .unwrap_or_else(|error| panic!("{error}"));
        let local = driver.local_handle(LocalWakeup::default()).pipeline();
        machine.process = Some(Process { driver, handle, local, completions: Vec::new() });
        machine.view = View::default();
        machine.stopped = None;
        (machine.wake_at, machine.busy_until) = (0, now);
    }

    /// Whether a node is on.
    #[must_use]
    pub fn runs(&self, node: usize) -> bool {
        self.machines[node].process.is_some()
    }

    /// Ends a node, or its machine.
    pub fn crash(&mut self, node: usize, how: Crash) {
        let now = self.context.now();
        let what = if how == Crash::Kill { What::Kill } else { What::PowerCut };
        self.context.record(node, what, 0, 0);
        let machine = &mut self.machines[node];
        machine.process = None;
        machine.view = View::default();
        machine.wake_at = Time::MAX;
        machine.disk.borrow_mut().crash(how);
        if how == Crash::PowerCut {
            let origin = machine.rng.below(SECOND);
            machine.clock.reboot(now, origin);
        }
        self.fabric.borrow_mut().crash(node, how);
        let (gone, waiting) = self.waiting.iter().partition(|(_, at)| *at == node);
        let gone: Vec<(usize, usize)> = gone;
        self.waiting = waiting;
        for (sequence, _) in gone {
            self.history.borrow_mut().answered(CommandId { client: 0, sequence }, Fate::Unknown);
        }
    }

    /// The node that leads the highest term.
    #[must_use]
    pub fn leader(&self) -> Option<usize> {
        let leaders = (0..NODES).filter(|node| self.machines[*node].view.role == LEADER);
        leaders.max_by_key(|node| self.machines[*node].view.term)
    }

    /// Proposes the client's next command.
    pub fn propose(&mut self, node: usize, padding: usize) {
        let id = CommandId { client: 0, sequence: self.next };
        let Some(process) = self.machines[node].process.as_mut() else { return };
        self.next += 1;
        let command = Command { id, key: 0, operation: Operation::Append { item: self.next as u64 } };
        let mut bytes = Vec::new();
        command.encode(padding, &mut bytes);
        self.history.borrow_mut().proposed(command);
        self.context.record(node, What::Propose, 0, id.sequence as u64);
        if process.local.submit(id.sequence as u64, &bytes).is_err() {
            self.history.borrow_mut().answered(id, Fate::Refused);
        } else {
            self.waiting.push((id.sequence, node));
            self.machines[node].wake_at = 0;
        }
    }

    /// Commands without an answer.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Lets the earliest thing happen. Whether there was any.
    pub fn step(&mut self) -> bool {
        let mut next = None;
        let mut at = Time::MAX;
        let fabric = self.fabric.borrow();
        if let Some(due) = fabric.next_due() {
            (at, next) = (due, Some(None));
        }
        for (node, machine) in self.machines.iter().enumerate() {
            if machine.process.is_none() {
                continue;
            }
            let mut due = machine.wake_at;
            if fabric.has_done(node) {
                due = 0;
            } else if let Some(disk) = machine.disk.borrow().next_due() {
                due = due.min(disk);
            }
            let due = due.max(machine.busy_until);
            if due < at {
                (at, next) = (due, Some(Some(node)));
            }
        }
        drop(fabric);
        match next {
            Some(what) => {
                self.context.advance_to(at.max(self.context.now()));
                match what {
                    None => self.fabric.borrow_mut().step(),
                    Some(node) => self.turn(node),
                }
                true
            }
            None => false,
        }
    }

    /// Steps until `until` holds, a check fails, or `limit` has passed. Whether it holds.
    pub fn run_until(&mut self, limit: Time, mut until: impl FnMut(&mut Self) -> bool) -> bool {
        let end = self.context.now() + limit;
        loop {
            if self.history.borrow().failure().is_some() {
                return false;
            }
            if until(self) {
                return true;
            }
            if self.context.now() >= end || !self.step() {
                return false;
            }
        }
    }

    /// Steps for so long.
    pub fn run_for(&mut self, time: Time) {
        self.run_until(time, |_| false);
    }

    fn turn(&mut self, node: usize) {
        let now = self.context.now();
        let machine = &mut self.machines[node];
        let called = self.fabric.borrow().has_done(node)
            || machine.disk.borrow().next_due().is_some_and(|due| due <= now);
        let Some(process) = machine.process.as_mut() else { return };
        let monotonic_ns = machine.clock.monotonic_ns(now);
        let wall_ms = machine.clock.wall_ms(now);
        let turned = process.driver.turn(Now { monotonic_ns, wall_ms });
        machine.busy_until = now + machine.rng.around(2 * MICROSECOND);
        machine.wake_at = if turned.progressed { 0 } else { machine.clock.time_of(turned.next_deadline_ns) };
        self.context.record(node, What::Turn, u64::from(turned.progressed), machine.wake_at);
        machine.idle = if called { (0, now) } else { (machine.idle.0 + 1, machine.idle.1) };
        if machine.idle.0 == SPIN_TURNS && now - machine.idle.1 < SPIN_TIME {
            let (progressed, wake_at) = (turned.progressed, machine.wake_at);
            self.history.borrow_mut().fail(|| {
                format!("node {node} spins at {now}: progressed {progressed}, to wake at {wake_at}")
            });
        }

        process.local.completions(&mut process.completions);
        for completion in process.completions.drain(..) {
            let id = CommandId { client: 0, sequence: completion.tag as usize };
            self.waiting.retain(|(sequence, _)| *sequence != id.sequence);
            let fate = match completion.outcome {
                Ok(committed) => {
                    self.acknowledged += 1;
                    let reply = committed.reply.first_chunk().map_or(0, |reply| u64::from_le_bytes(*reply));
                    Fate::Acknowledged { index: committed.index.get(), reply }
                }
                Err(ProposeError::Refused(_)) => Fate::Refused,
                Err(ProposeError::Unknown(_) | ProposeError::ReplyGone { .. }) => Fate::Unknown,
            };
            self.history.borrow_mut().answered(id, fate);
        }
        if turned.stop {
            let cause = process.handle.status().stopped.map(|cause| cause.to_string());
            let cause = cause.unwrap_or_else(|| "for no reason given".to_owned());
            self.context.record(node, What::Stopped, 0, 0);
            self.context.note(|| format!("node {node} stopped: {cause}"));
            self.crash(node, Crash::Kill);
            self.machines[node].stopped = Some(cause);
            return;
        }
        let after = process.view();
        let before = std::mem::replace(&mut machine.view, after);
        if before != after {
            self.changed(node, &before, &after);
        }
    }

    fn changed(&mut self, node: usize, before: &View, after: &View) {
        let Some(process) = &self.machines[node].process else { return };
        let mut history = self.history.borrow_mut();
        if (before.role, before.term) != (after.role, after.term) {
            self.context.record(node, What::Role, u64::from(after.role), after.term);
        }
        history.see(node, before, after);
        let start = process.driver.raft().map_or(0, |raft| raft.log_start().index.get());
        let chain_at = |index| process.driver.wal().chain_at(LogIndex(index)).map(|chain| chain.0);
        if after.role == LEADER && before.role != LEADER {
            history.elected(node, after, start, chain_at);
        }
        if before.commit != after.commit {
            self.context.record(node, What::Commit, after.commit, after.term);
        }
        let news = before.commit.min(before.written) != after.commit.min(after.written);
        if news && after.commit <= after.written && after.commit > start {
            history.committed(node, after.term, after.commit, chain_at(after.commit));
        }
    }

    /// Checks what must hold of every running node's state.
    pub fn sweep(&self) {
        let mut history = self.history.borrow_mut();
        for (node, machine) in self.machines.iter().enumerate() {
            let Some(process) = &machine.process else { continue };
            let Some(raft) = process.driver.raft() else { continue };
            if let Err(broken) = invariants::check(raft) {
                history.fail(|| format!("node {node}: {broken:?}"));
            }
            let chain_at = |index| process.driver.wal().chain_at(LogIndex(index)).map(|chain| chain.0);
            history.sweep(node, &machine.view, raft.log_start().index.get(), chain_at);
        }
    }

    /// A running node's log.
    #[must_use]
    pub fn wal(&self, node: usize) -> Option<&Wal<SimDisk>> {
        self.machines[node].process.as_ref().map(|process| process.driver.wal())
    }

    /// A running node's own account of itself.
    #[must_use]
    pub fn status(&self, node: usize) -> Option<Status> {
        self.machines[node].process.as_ref().map(|process| process.handle.status())
    }

    /// Whether all run, have applied the same log to its end, and one leads.
    #[must_use]
    pub fn has_converged(&self) -> bool {
        let first = &self.machines[0];
        let chain = |node: usize| {
            let applied = LogIndex(self.machines[node].view.applied);
            self.wal(node).and_then(|wal| wal.chain_at(applied))
        };
        let equal = |node: usize| {
            let view = self.machines[node].view;
            [view.applied, view.commit, view.last, view.durable] == [first.view.applied; 4]
                && chain(node).is_some()
                && chain(node) == chain(0)
        };
        (0..NODES).all(|node| self.runs(node) && equal(node)) && self.leader().is_some()
    }

    /// All nodes, for a report.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut told = String::new();
        for (node, machine) in self.machines.iter().enumerate() {
            let state = match (&machine.process, &machine.stopped) {
                (Some(process), _) => {
                    let raft = process.driver.raft().map(ringraft::raft::Raft::status);
                    format!("{raft:?}; {:?}", process.handle.status())
                }
                (None, Some(stopped)) => format!("stopped: {stopped}"),
                (None, None) => "down".to_owned(),
            };
            told += &format!("\n  node {node}: {:?}\n    {state}", machine.view);
        }
        told
    }
}

impl Process {
    fn view(&self) -> View {
        let Some(raft) = self.driver.raft() else { return View::default() };
        View {
            formed: true,
            role: match raft.role() {
                Role::Follower => 0,
                Role::PreCandidate => 1,
                Role::Candidate => CANDIDATE,
                Role::Leader => LEADER,
            },
            term: raft.term().get(),
            leader: raft.leader().map(|id| id.get() as usize - 1),
            vote: raft.vote().map(|id| id.get() as usize - 1),
            last: raft.last().index.get(),
            written: self.driver.wal().last_index().get(),
            durable: raft.durable().get(),
            commit: raft.commit().get(),
            applied: self.driver.applied().0.get(),
            epoch: raft.epoch().0,
            rollovers: self.driver.wal().stats().rollovers,
            met: self.driver.acquaintances_met(),
        }
    }
}

/// How long an election may take, several times over.
pub const PATIENCE: Time = 100 * ELECTION_TIMEOUT_MS * MILLISECOND;
