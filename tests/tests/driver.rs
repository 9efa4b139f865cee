//! Single nodes and small clusters of real drivers on the simulated disk, network and clock, where the test decides
//! what happens when.

#[path = "driver/disturbed.rs"]
mod disturbed;
#[path = "driver/flipped.rs"]
mod flipped;
#[path = "driver/membership.rs"]
mod membership;
#[path = "driver/reads.rs"]
mod reads;
#[path = "driver/slow_disk.rs"]
mod slow_disk;

use bytes::Bytes;
use ringraft::config::{Config, MemberConfig};
use ringraft::driver::Driver;
use ringraft::error::{ProposeError, Refusal, StopCause, StopError, TransferError};
use ringraft::formation::FormationError;
use ringraft::handle::{AckStages, Completion, Handle, Pipeline, Status, Transferred};
use ringraft::raft::{Role, TransferEnd};
use ringraft::runtime::{Now, Turn, Wakeup};
use ringraft::state_machine::{CommittedBatch, Replies, Restore, SnapshotReader, StateMachine};
use ringraft_block::{ClusterId, LogIndex, NodeId};
use ringraft_tests::sim::context::{Context, MICROSECOND, MILLISECOND, SECOND, Time};
use ringraft_tests::sim::disk::{Crash, DiskConfig, DiskState, SimDisk};
use ringraft_tests::sim::link::{Fabric, LinkConfig, SimLink, address_of};
use ringraft_tests::sim::rng::Rng;
use ringraft_tests::sim::trace::Trace;
use ringraft_wal::WalError;
use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use xxhash_rust::xxh3::xxh3_64_with_seed;

#[path = "driver/snapshots.rs"]
mod snapshots;

/// Counts what it applies, keeps a hash of it in order, and notes where it applied the commands of sessions.
#[derive(Default)]
struct Counter {
    count: u64,
    hash: u64,
    in_sessions: Vec<((u64, u64), LogIndex)>,
    /// Its snapshots are larger by so much, and take the same bytes for the same state.
    ballast: usize,
    makes_none: bool,
    restoring: Option<Vec<u8>>,
    /// Snapshots that it was given, to the end.
    restored: u64,
    /// The log's clock, as far as it was seen.
    time_ms: u64,
    /// How often it was asked for one.
    pictures: u64,
}

impl StateMachine for Counter {
    fn apply(&mut self, batch: &CommittedBatch<'_>, replies: &mut Replies) {
        assert!(self.restoring.is_none(), "nothing is applied while it is restored");
        for command in batch.commands() {
            assert!(command.time_ms >= self.time_ms, "the log's clock never goes back");
            self.time_ms = command.time_ms;
            self.count += 1;
            self.hash = xxh3_64_with_seed(command.bytes, self.hash ^ command.index.get());
            match command.session {
                Some(session) => {
                    self.in_sessions.push((session, command.index));
                    replies.push(self.count.to_le_bytes().to_vec());
                }
                None => replies.push_empty(),
            }
        }
    }

    fn query(&self, query: &[u8]) -> Bytes {
        assert!(self.restoring.is_none(), "nothing is asked while it is restored");
        let mut answer = query.to_vec();
        answer.extend(self.count.to_le_bytes());
        answer.into()
    }

    fn snapshot(&mut self) -> Option<Box<dyn SnapshotReader>> {
        assert!(self.restoring.is_none(), "no picture is taken while it is restored");
        if self.makes_none {
            return None;
        }
        self.pictures += 1;
        let mut bytes = [self.count.to_le_bytes(), self.hash.to_le_bytes()].concat();
        bytes.extend((0..self.ballast).map(|at| (at as u64).wrapping_mul(self.hash | 1) as u8));
        Some(Box::new(Bytes::from(bytes)))
    }

    fn restore(&mut self, step: Restore<'_>) -> Result<(), String> {
        match step {
            Restore::Begin { time_ms, .. } => {
                assert!(time_ms >= self.time_ms, "the log's clock never goes back");
                (self.restoring, self.time_ms) = (Some(Vec::new()), time_ms);
            }
            Restore::Piece(piece) => self.restoring.as_mut().ok_or("no begin")?.extend_from_slice(piece),
            Restore::End => {
                let bytes = self.restoring.take().ok_or("no begin")?;
                let number = |at: usize| bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
                self.count = u64::from_le_bytes(number(0).ok_or("too short")?);
                self.hash = u64::from_le_bytes(number(8).ok_or("too short")?);
                let ballast = &bytes[16..];
                let whole = |(at, byte): (usize, &u8)| *byte == (at as u64).wrapping_mul(self.hash | 1) as u8;
                if ballast.len() != self.ballast || !ballast.iter().enumerate().all(whole) {
                    return Err("the ballast is another".to_owned());
                }
                self.restored += 1;
            }
        }
        Ok(())
    }
}

struct Process {
    driver: Driver<SimDisk, SimLink, Counter>,
    handle: Handle,
    pipeline: Pipeline,
    /// When it asked for a turn; 0 for at once.
    wake_at: Time,
    turns: u64,
    /// Those that an adaptive core looks for more after.
    turns_worked: u64,
}

struct Machine {
    disk: Rc<RefCell<DiskState>>,
    process: Option<Process>,
    /// How the last process ended.
    ended: Option<Status>,
    /// By how much its wall clock is ahead.
    wall_ahead_ms: u64,
}

/// Machines with true monotonic clocks: that of a node is the virtual time.
struct Rig {
    context: Rc<Context>,
    fabric: Rc<RefCell<Fabric>>,
    machines: Vec<Machine>,
    /// Of the next process.
    seed: u64,
    /// A machine whose process gets no turn.
    still: Option<usize>,
    /// Of the state machines.
    ballast: usize,
    make_none: bool,
}

fn config(node: usize, nodes: usize) -> Config {
    let member = |node: usize| MemberConfig {
        id: NodeId(node as u64 + 1),
        address: SocketAddr::new(address_of(node), 7_000),
    };
    Config {
        insecure: true,
        segment_bytes: 1 << 20,
        segments_ahead: 1,
        batch_bytes_max: 32 << 10,
        command_bytes_max: 32 << 10,
        ..Config::new(ClusterId(0x7e57), member(node).id, (0..nodes).map(member).collect(), "simulated")
    }
}

impl Rig {
    fn new(machines: usize) -> Self {
        Self::seeded(machines, 0)
    }

    fn seeded(machines: usize, seed: u64) -> Self {
        let context = Context::new(Trace::new(false));
        let seed = seed << 32;
        let fabric = Fabric::new(&context, machines, Rng::new(seed), LinkConfig::default());
        let machine = |node| Machine {
            disk: DiskState::new(&context, node, Rng::new(seed + 100 + node as u64), DiskConfig::default()),
            process: None,
            ended: None,
            wall_ahead_ms: 0,
        };
        let machines = (0..machines).map(machine).collect();
        Self { context, fabric, machines, seed, ballast: 0, make_none: false, still: None }
    }

    /// A cluster with a leader that can propose: its position.
    fn started(nodes: usize) -> (Self, usize) {
        let mut rig = Self::new(nodes);
        for node in 0..nodes {
            rig.boot(config(node, nodes));
        }
        let leader = rig.run_until_led();
        (rig, leader)
    }

    fn boot(&mut self, config: Config) {
        let node = config.node.get() as usize - 1;
        self.seed += 1;
        self.fabric.borrow_mut().boot(node);
        let machine = &mut self.machines[node];
        assert!(machine.process.is_none(), "one process on a machine");
        let (disk, link) = (SimDisk::new(&machine.disk), SimLink::new(&self.fabric, node));
        let wakeup = Arc::new(Wakeup::new());
        let counter = Counter { ballast: self.ballast, makes_none: self.make_none, ..Counter::default() };
        let (driver, handle) = Driver::with_backend(config, self.seed, wakeup, disk, link, counter)
            .unwrap_or_else(|error| panic!("{error}"));
        let pipeline = handle.pipeline();
        machine.process = Some(Process { driver, handle, pipeline, wake_at: 0, turns: 0, turns_worked: 0 });
        machine.ended = None;
    }

    fn process(&mut self, node: usize) -> &mut Process {
        self.machines[node].process.as_mut().expect("it runs")
    }

    fn status(&self, node: usize) -> Status {
        self.machines[node].process.as_ref().expect("it runs").handle.status()
    }

    /// When the next thing happens, and to which node; without one, in the network.
    fn next(&self) -> (Time, Option<usize>) {
        let mut next = None;
        let mut at = self.fabric.borrow().next_due().unwrap_or(Time::MAX);
        for (node, machine) in self.machines.iter().enumerate() {
            let Some(process) = machine.process.as_ref().filter(|_| self.still != Some(node)) else {
                continue;
            };
            let disk = machine.disk.borrow().next_due().unwrap_or(Time::MAX);
            let network = if self.fabric.borrow().has_done(node) { 0 } else { Time::MAX };
            let due = process.wake_at.min(disk).min(network);
            if due < at {
                (at, next) = (due, Some(node));
            }
        }
        (at, next)
    }

    /// Lets the earliest thing happen.
    fn step(&mut self) {
        let (at, next) = self.next();
        assert!(at < Time::MAX, "nothing will ever happen again");
        self.context.advance_to(at.max(self.context.now()));
        match next {
            Some(node) => self.turn(node),
            None => self.fabric.borrow_mut().step(),
        }
    }

    fn turn(&mut self, node: usize) {
        let now = self.context.now();
        let machine = &mut self.machines[node];
        let Some(process) = &mut machine.process else { return };
        let outcome = process
            .driver
            .turn(Now { monotonic_ns: now, wall_ms: now / MILLISECOND + machine.wall_ahead_ms });
        process.turns += 1;
        process.turns_worked += u64::from(outcome.worked);
        process.wake_at = if outcome.more { now + MICROSECOND } else { outcome.next_deadline_ns };
        if outcome.stop {
            machine.ended = Some(process.handle.status());
            // After an error the runtime awaits what is under way; who stops in good order has seen to that itself.
            let orderly = machine.ended.as_ref().and_then(|status| status.stopped.as_ref());
            if orderly.is_some_and(StopCause::is_orderly) {
                let writes = machine.disk.borrow().writes_in_flight();
                assert_eq!(writes, 0, "a node that has stopped writes nothing");
            }
            self.kill(node);
        }
    }

    fn kill(&mut self, node: usize) {
        self.crash(node, Crash::Kill);
    }

    fn crash(&mut self, node: usize, how: Crash) {
        self.machines[node].process = None;
        self.machines[node].disk.borrow_mut().crash(how);
        self.fabric.borrow_mut().crash(node, how);
    }

    /// Lets things happen until `condition` holds.
    fn run_until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = self.context.now() + 60 * SECOND;
        while !condition(self) {
            self.step();
            assert!(self.context.now() < deadline, "never: {what}");
        }
    }

    fn run_for(&mut self, span: Time) {
        let end = self.context.now() + span;
        while self.next().0 <= end {
            self.step();
        }
        self.context.advance_to(end.max(self.context.now()));
    }

    /// So many turns after which an adaptive core looks for more work, of each that runs.
    fn turns_worked(&self) -> Vec<u64> {
        self.machines.iter().filter_map(|machine| Some(machine.process.as_ref()?.turns_worked)).collect()
    }

    fn leader(&self) -> Option<usize> {
        let leads = |machine: &Machine| {
            let process = machine.process.as_ref();
            process.and_then(|process| process.driver.raft()).is_some_and(|raft| raft.can_accept_proposals())
        };
        self.machines.iter().position(leads)
    }

    fn run_until_led(&mut self) -> usize {
        self.run_until("a leader", |rig| rig.leader().is_some());
        self.leader().expect("a leader")
    }

    fn run_until_ended(&mut self, node: usize) -> Status {
        self.run_until("the node stops", |rig| rig.machines[node].ended.is_some());
        self.machines[node].ended.clone().expect("it stopped")
    }

    fn propose(&mut self, node: usize, tag: u64, bytes: usize) {
        let process = self.process(node);
        process.pipeline.submit(tag, vec![7; bytes]).expect("taken");
        process.wake_at = 0;
    }

    fn completed(&mut self, node: usize) -> Vec<Completion> {
        let mut out = Vec::new();
        self.process(node).pipeline.completions(&mut out);
        out
    }

    /// Proposes and waits for the commit: the index.
    fn commit(&mut self, node: usize, bytes: usize) -> LogIndex {
        self.propose(node, 99, bytes);
        for _ in 0..100_000 {
            self.step();
            if let Some(completion) = self.completed(node).pop() {
                return completion.outcome.expect("committed").index;
            }
        }
        panic!("the command is never committed");
    }

    fn shutdown(&mut self, node: usize) {
        let process = self.process(node);
        process.handle.shutdown();
        process.wake_at = 0;
    }
}

#[path = "driver/sessions.rs"]
mod sessions;

fn micros(span: Time) -> u32 {
    span.div_ceil(MICROSECOND) as u32
}

// ---- What a command costs

#[test]
fn commands_are_work_to_look_for_more_after_and_heartbeats_are_none() {
    let mut rig = Rig::new(3);
    (0..3).for_each(|node| rig.boot(config(node, 3)));
    let leader = rig.run_until_led();
    rig.commit(leader, 100);
    rig.run_for(SECOND);
    let turns = |rig: &Rig| rig.machines[leader].process.as_ref().map(|process| process.turns);
    let (turns_before, before) = (turns(&rig), rig.turns_worked());
    rig.run_for(SECOND);
    assert_eq!(rig.turns_worked(), before, "with nothing to do");
    assert!(turns(&rig) > turns_before, "but to remind the others");
    rig.commit(leader, 100);
    rig.run_for(SECOND);
    let after = rig.turns_worked();
    assert!(after.iter().zip(&before).all(|(after, before)| after > before), "{before:?} then {after:?}");
}

/// What a socket takes while it is submitted was reported to the next turn, which had nothing else to do.
#[test]
fn a_command_costs_a_turn_for_each_thing_that_happens_and_none_for_what_the_sockets_take_at_once() {
    let (mut rig, leader) = Rig::started(3);
    rig.run_for(SECOND);
    let turns = |rig: &Rig, node: usize| rig.machines[node].process.as_ref().expect("it runs").turns;
    let before: Vec<u64> = (0..3).map(|node| turns(&rig, node)).collect();
    for _ in 0..100 {
        rig.commit(leader, 100);
        rig.run_for(5 * MILLISECOND);
    }
    let spent: Vec<u64> = (0..3).map(|node| turns(&rig, node) - before[node]).collect();
    // With a turn for each send they were 498, 503 and 825 for the leader; now 377, 382 and 625.
    assert!(spent.iter().sum::<u64>() < 1_600, "{spent:?}, and {leader} leads");
}

// ---- When a batch is sealed

#[test]
fn small_batches_leave_half_of_the_writes_in_flight_to_full_ones() {
    let mut rig = Rig::new(3);
    for node in 0..3 {
        rig.boot(Config { writes_in_flight_max: 4, ..config(node, 3) });
    }
    let leader = rig.run_until_led();
    rig.commit(leader, 100);
    let in_flight = |rig: &Rig| rig.machines[leader].disk.borrow().writes_in_flight();
    rig.run_until("all is durable", |rig| in_flight(rig) == 0);

    let stall = 40 * MILLISECOND;
    let until = rig.context.now() + stall;
    rig.machines[leader].disk.borrow_mut().faults_mut().stalled_until = until;
    for small in 0..6 {
        rig.propose(leader, small, 100);
        rig.turn(leader);
    }
    assert_eq!(in_flight(&rig), 2, "the others wait, and become one batch");

    let half_a_batch = 15 << 10;
    for large in 0..8 {
        rig.propose(leader, 100 + large, half_a_batch);
        rig.turn(leader);
    }
    assert_eq!(in_flight(&rig), 4, "those that are full did not wait");
    assert!(rig.context.now() < until, "while the disk stands still");

    let (mut done, mut steps) = (0, 0);
    while done < 14 && steps < 100_000 {
        rig.step();
        steps += 1;
        for completion in rig.completed(leader) {
            completion.outcome.expect("committed");
            done += 1;
        }
    }
    assert_eq!(done, 14, "all commit when the disk goes on");
}

// ---- What a leader learns of its followers' disks

#[test]
fn a_leader_sees_how_long_a_followers_disk_took_and_how_long_a_batch_waited_for_it() {
    let mut rig = Rig::new(3);
    for node in 0..3 {
        rig.boot(Config { writes_in_flight_max: 1, ..config(node, 3) });
    }
    let leader = rig.run_until_led();
    let slow = (leader + 1) % 3;
    let first = rig.commit(leader, 100);
    rig.run_until("all have it", |rig| (0..3).all(|node| rig.status(node).durable >= first));

    // Received when the disk is about to stand still.
    rig.propose(leader, 1, 100);
    rig.run_until("received", |rig| rig.status(slow).last > first);
    let (second, received) = (rig.status(slow).last, rig.context.now());
    let stall = 40 * MILLISECOND;
    rig.machines[slow].disk.borrow_mut().faults_mut().stalled_until = received + stall;
    // Received meanwhile, and not taken by a log that has its one write in flight.
    rig.propose(leader, 2, 100);
    rig.run_until("received behind it", |rig| rig.status(slow).last > second);
    let (third, waiting_since) = (rig.status(slow).last, rig.context.now());
    assert!(waiting_since < received + stall, "while the disk stands still");

    let stages = |rig: &Rig, node: usize| {
        let peers = rig.status(leader).peers;
        let id = NodeId(node as u64 + 1);
        peers.iter().find(|peer| peer.id == id).map(|peer| (peer.matched, peer.stages))
    };
    rig.run_until("durable after the stall", |rig| rig.status(slow).durable >= second);
    let (submitted, expected) = (rig.context.now(), rig.context.now() - received);
    assert!(expected >= stall);
    // The third may be durable before the leader has heard of the second.
    let behind = Cell::new(None);
    let watch = |rig: &Rig| {
        if rig.status(slow).durable >= third && behind.get().is_none() {
            behind.set(Some(rig.context.now()));
        }
    };
    rig.run_until("acknowledged", |rig| {
        watch(rig);
        stages(rig, slow).is_some_and(|(matched, _)| matched >= second)
    });
    let told = AckStages { durable_us: micros(expected), queued_us: 0 };
    assert_eq!(stages(&rig, slow), Some((second, Some(told))));

    rig.run_until("durable behind it", |rig| {
        watch(rig);
        behind.get().is_some()
    });
    let expected = behind.get().expect("seen") - waiting_since;
    rig.run_until("acknowledged", |rig| stages(rig, slow).is_some_and(|(matched, _)| matched >= third));
    let told = AckStages { durable_us: micros(expected), queued_us: micros(submitted - waiting_since) };
    assert_eq!(stages(&rig, slow), Some((third, Some(told))));

    let quick = (leader + 2) % 3;
    let (_, told) = stages(&rig, quick).expect("a peer");
    let told = told.expect("it has reported");
    assert!(told.durable_us > 0 && u64::from(told.durable_us) < stall / MICROSECOND, "{told:?}");
    assert_eq!(rig.status(slow).peers, [], "only a leader knows its peers");
}

#[test]
fn k11_a_leader_tells_when_it_last_heard_each_member_and_when_it_last_sent_to_it() {
    let (mut rig, leader) = Rig::started(3);
    let [quiet, other] = [(leader + 1) % 3, (leader + 2) % 3];
    // As of now: the last turn may have been a heartbeat ago.
    let ages = |rig: &mut Rig, leader: usize, node: usize| {
        rig.turn(leader);
        let peers = rig.status(leader).peers;
        let peer = peers.iter().find(|peer| peer.id == NodeId(node as u64 + 1)).expect("a peer");
        let millis = |age: Option<Duration>| age.map(|age| age.as_millis());
        (peer.connected, millis(peer.heard_age), millis(peer.sent_age))
    };
    let beat = config(0, 3).heartbeat_interval.as_millis() + 5;
    rig.run_for(SECOND);
    for node in [quiet, other] {
        let (connected, heard, sent) = ages(&mut rig, leader, node);
        assert!(
            connected && heard.expect("heard") <= beat && sent.expect("sent to") <= beat,
            "{heard:?} {sent:?}"
        );
    }

    // What it says does not arrive; what it is told is sent.
    rig.fabric.borrow_mut().cut(quiet, leader);
    rig.run_for(90 * MILLISECOND);
    let (connected, heard, sent) = ages(&mut rig, leader, quiet);
    assert!(connected, "nobody has given the connection up yet");
    assert!((90..=90 + beat).contains(&heard.expect("heard")), "{heard:?}");
    assert!(sent.expect("sent to") <= beat, "{sent:?}");
    let (_, heard, _) = ages(&mut rig, leader, other);
    assert!(heard.expect("heard") <= beat, "{heard:?}");

    // It is gone, with its session.
    rig.fabric.borrow_mut().heal_all();
    rig.run_for(SECOND);
    rig.kill(quiet);
    rig.run_for(SECOND);
    let (connected, heard, sent) = ages(&mut rig, leader, quiet);
    assert!(!connected);
    for age in [heard, sent] {
        assert!((995..=1_000 + beat).contains(&age.expect("before")), "{heard:?} {sent:?}");
    }
    rig.boot(config(quiet, 3));
    rig.run_for(2 * SECOND);
    let (connected, heard, sent) = ages(&mut rig, leader, quiet);
    assert!(
        connected && heard.expect("heard") <= beat && sent.expect("sent to") <= beat,
        "{heard:?} {sent:?}"
    );

    // A leader that has had no session with it since its start.
    (0..3).for_each(|node| rig.kill(node));
    rig.boot(config(leader, 3));
    rig.boot(config(other, 3));
    let leader = rig.run_until_led();
    assert_eq!(ages(&mut rig, leader, quiet), (false, None, None));
}

// ---- Back-pressure

/// A disk that stands still keeps what was taken from being applied, and with that the core from taking more: what waits
/// in the queue was bounded by number alone, to 64 GiB of commands of 1 MiB.
#[test]
fn commands_that_wait_for_a_stalled_disk_are_bounded_by_their_bytes() {
    const BOUND: usize = 4 << 20;
    let mut rig = Rig::new(1);
    rig.boot(Config {
        command_bytes_max: 1 << 20,
        uncommitted_bytes_max: BOUND,
        segment_bytes: 32 << 20,
        ..config(0, 1)
    });
    rig.run_until_led();
    rig.run_for(SECOND);
    for round in 0..3 {
        rig.machines[0].disk.borrow_mut().faults_mut().stalled_until = rig.context.now() + 200 * MILLISECOND;
        let (mut admitted, mut busy, mut answered) = (0, 0, 0);
        for tag in 0..40 {
            match rig.process(0).pipeline.submit(tag, vec![7; 1 << 20]) {
                Ok(()) => admitted += 1,
                Err(refused) => {
                    assert_eq!((refused.reason, refused.command.len()), (Refusal::Busy, 1 << 20));
                    busy += 1;
                }
            }
            rig.process(0).wake_at = 0;
            rig.run_for(MILLISECOND);
            answered += rig.completed(0).len();
        }
        assert!(admitted - answered <= 2 * (BOUND >> 20), "round {round}: {admitted} wait, less {answered}");
        assert!(admitted >= 6 && busy > 20, "round {round}: {admitted} admitted, {busy} not");
        rig.run_for(SECOND);
        let completions = rig.completed(0);
        assert_eq!(completions.len() + answered, admitted);
        let busy = |outcome: &_| matches!(outcome, Err(ProposeError::Refused(refused)) if refused.reason == Refusal::Busy);
        assert!(completions.iter().all(|one| one.outcome.is_ok() || busy(&one.outcome)), "{completions:?}");
    }
}

// ---- Elections

/// From the death of a leader to when the next one takes commands, in virtual time. Two followers that draw waits
/// within an election's time of one another split the vote and wait again: that must be rare.
#[test]
fn a_dead_leader_is_replaced_within_two_election_time_outs_unless_votes_split_which_is_rare() {
    const RUNS: u64 = 200;
    for nodes in [3, 5] {
        let mut gaps = Vec::new();
        for seed in 0..RUNS {
            let mut rig = Rig::seeded(nodes, seed);
            for node in 0..nodes {
                rig.boot(config(node, nodes));
            }
            let leader = rig.run_until_led();
            rig.commit(leader, 100);
            // Anywhere between two heartbeats.
            rig.run_for(SECOND + seed * 50 * MILLISECOND / RUNS);
            assert_eq!(rig.leader(), Some(leader), "nobody disturbs a healthy leader");
            rig.kill(leader);
            let died = rig.context.now();
            rig.run_until_led();
            gaps.push(rig.context.now() - died);
        }
        gaps.sort_unstable();
        let timeout = config(0, nodes).election_timeout.as_nanos() as Time;
        let late = gaps.iter().filter(|gap| **gap > 2 * timeout).count() as u64;
        let told: Vec<_> = [0, RUNS / 2, RUNS * 9 / 10, RUNS - 1]
            .map(|position| gaps[position as usize] as f64 / timeout as f64)
            .into();
        println!(
            "{nodes} nodes: {late} of {RUNS} later than two time-outs; least, median, 90 %, most: {told:.2?}"
        );
        assert!(late * 100 <= 2 * RUNS, "{nodes} nodes: {late} of {RUNS}: {told:.2?}");
        assert!(gaps[0] > timeout - 50 * MILLISECOND, "nobody campaigns while others stick to the leader");
    }
}

// ---- Peers with other limits

/// Takes what the engine logs as errors, for people.
#[derive(Clone, Default)]
struct Errors(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Errors {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::ERROR
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Text<'a>(&'a mut String);
        impl tracing::field::Visit for Text<'_> {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0.push_str(&format!("{field}={value:?} "));
            }
        }
        let mut text = String::new();
        event.record(&mut Text(&mut text));
        self.0.lock().expect("no holder panics").push(text);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

/// A member with small segments among members with large ones, one of which leads: the others go on, and it refuses
/// what it cannot hold.
fn a_batch_of(bytes: usize, commands: u64) {
    let errors = Errors::default();
    let _log = tracing::subscriber::set_default(errors.clone());
    let mut rig = Rig::new(3);
    for node in 0..2 {
        let large = Config {
            segment_bytes: 32 << 20,
            batch_bytes_max: 1 << 20,
            command_bytes_max: 1 << 20,
            ..config(node, 3)
        };
        rig.boot(large);
    }
    rig.boot(config(2, 3));
    // Whoever leads, the small member does not.
    let leader = loop {
        let leader = rig.run_until_led();
        if leader != 2 {
            break leader;
        }
        rig.shutdown(2);
        rig.run_until_ended(2);
        rig.run_until("another leads", |rig| rig.leader().is_some_and(|leader| leader != 2));
        rig.boot(config(2, 3));
    };
    let held = rig.commit(leader, 100);
    rig.run_until("all have it", |rig| (0..3).all(|node| rig.status(node).applied >= held));
    assert_eq!(errors.0.lock().expect("no holder panics").as_slice(), [] as [&str; 0]);

    // Between two turns, so that they make one batch.
    for tag in 0..commands {
        rig.propose(leader, tag, bytes);
    }
    let mut done = 0;
    while done < commands {
        rig.step();
        for completion in rig.completed(leader) {
            completion.outcome.expect("committed by the other two");
            done += 1;
        }
    }
    rig.run_for(2 * SECOND);
    let (small, large) = (rig.status(2), rig.status(leader));
    assert!(small.stopped.is_none() && small.durable < large.commit, "{small:?}");
    assert_eq!(large.role, Role::Leader, "the member that refuses disturbs nobody");
    let told = errors.0.lock().expect("no holder panics").join("\n");
    assert!(told.contains("too large for this node's segments: make limits equal"), "{told}");
    assert!(told.contains(&format!("node=3 peer={}", leader + 1)), "{told}");
}

#[test]
fn a_command_that_this_nodes_segments_cannot_hold_is_refused_with_the_cure() {
    a_batch_of(200 << 10, 1);
}

#[test]
fn a_batch_of_small_commands_that_this_nodes_segments_cannot_hold_is_refused_with_the_cure() {
    a_batch_of(1 << 10, 300);
}

// ---- Shutdown at any moment of a start

#[test]
fn a_shutdown_asked_before_the_log_is_open_ends_the_node_in_good_order() {
    let mut rig = Rig::new(1);
    rig.boot(config(0, 1));
    rig.shutdown(0);
    let status = rig.run_until_ended(0);
    assert!(status.stopped.expect("stopped").is_orderly());
    assert!(!status.formed && status.listening.is_none(), "it had not got that far");
    rig.boot(config(0, 1));
    let leader = rig.run_until_led();
    rig.commit(leader, 100);
}

#[test]
fn a_shutdown_asked_while_the_cluster_forms_ends_the_node_in_good_order() {
    let mut rig = Rig::new(3);
    for node in 0..2 {
        rig.boot(config(node, 3));
    }
    // The third member is missing, so nothing can be formed.
    rig.run_for(5 * SECOND);
    for node in 0..2 {
        assert!(!rig.status(node).formed && rig.status(node).listening.is_some());
        rig.shutdown(node);
        assert!(rig.run_until_ended(node).stopped.expect("stopped").is_orderly());
    }
    for node in 0..3 {
        rig.boot(config(node, 3));
    }
    let leader = rig.run_until_led();
    rig.commit(leader, 100);
}

/// Found by the simulator (seed 52, when it had learned to shut nodes down): a log with nothing to finish needs no
/// completion, so that nothing called for the turn in which it would have closed, and the node never ended.
#[test]
fn a_shutdown_asked_of_an_idle_node_with_nothing_left_to_write_ends_it() {
    let (mut rig, leader) = Rig::started(1);
    rig.commit(leader, 100);
    // Far longer than it takes an idle log to record how far it is durable.
    rig.run_for(10 * SECOND);
    rig.shutdown(leader);
    assert!(rig.run_until_ended(leader).stopped.expect("stopped").is_orderly());
}

/// Each turn of a start is tried: log opening, blank, configuration on its way to the disk, formed, elected.
#[test]
fn a_shutdown_asked_in_any_turn_of_a_start_ends_the_node_in_good_order_and_the_cluster_comes_up_later() {
    let mut formed = 0;
    let mut unformed = 0;
    for asked in 0..160 {
        let node = asked as usize % 3;
        let mut rig = Rig::new(3);
        for node in 0..3 {
            rig.boot(config(node, 3));
        }
        rig.run_until("its turn has come", |rig| {
            let process = rig.machines[node].process.as_ref();
            process.is_some_and(|process| process.turns >= asked)
        });
        rig.shutdown(node);
        let status = rig.run_until_ended(node);
        let cause = status.stopped.expect("stopped");
        assert!(cause.is_orderly(), "asked in turn {asked}: {cause}");
        *(if status.formed { &mut formed } else { &mut unformed }) += 1;
        rig.boot(config(node, 3));
        rig.run_until("all are formed", |rig| (0..3).all(|node| rig.status(node).formed));
        let leader = rig.run_until_led();
        let index = rig.commit(leader, 100);
        rig.run_until("all apply", |rig| (0..3).all(|node| rig.status(node).applied >= index));
    }
    assert!(formed > 10 && unformed > 10, "{formed} turns after formation, {unformed} before");
}

// ---- What a start refuses

#[test]
fn a_node_whose_vote_is_lost_on_both_copies_stops_and_says_so() {
    let (mut rig, leader) = Rig::started(1);
    rig.commit(leader, 100);
    rig.shutdown(0);
    rig.run_until_ended(0);
    for name in ["hard-a", "hard-b"] {
        rig.machines[0].disk.borrow_mut().flip_bit(name, 40, 3);
    }
    let before = rig.machines[0].disk.borrow().durable_hash();
    rig.boot(config(0, 1));
    let status = rig.run_until_ended(0);
    let cause = status.stopped.expect("stopped");
    assert!(matches!(cause.error(), StopError::Log(WalError::HardStateLost { .. })), "{cause}");
    assert!(cause.to_string().contains("wipe the directory and add the node anew"), "{cause}");
    assert!(!status.formed && status.listening.is_none(), "it takes no part");
    assert_eq!(rig.machines[0].disk.borrow().durable_hash(), before, "nothing was changed");
}

#[test]
fn a_node_is_told_when_its_members_are_not_those_that_the_cluster_was_formed_with() {
    let (mut rig, _) = Rig::started(3);
    rig.run_until("all are formed", |rig| (0..3).all(|node| rig.status(node).formed));
    for (members, expected) in [(2, &[1, 2][..]), (4, &[1, 2, 3, 4][..])] {
        rig.shutdown(1);
        rig.run_until_ended(1);
        rig.boot(config(1, members));
        let cause = rig.run_until_ended(1).stopped.expect("stopped");
        let StopError::Formation(FormationError::MembersDiffer { source_node, theirs, ours }) = cause.error()
        else {
            panic!("{cause}");
        };
        let ids = |ids: &[NodeId]| ids.iter().map(|id| id.get()).collect::<Vec<_>>();
        assert_eq!((source_node.get(), ids(theirs), ids(ours)), (2, vec![1, 2, 3], expected.to_vec()));
        assert!(cause.to_string().contains("make `members` equal"), "{cause}");
        rig.boot(config(1, 3));
        let leader = rig.run_until_led();
        rig.commit(leader, 100);
    }
}

// ---- Leadership (K4, K5, K10)

fn answer_of<T>(answer: &mut ringraft::Answer<T>) -> Option<T> {
    use std::future::Future as _;
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::Pin::new(answer).poll(&mut context) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}

impl Rig {
    /// Asks for a transfer and lets things happen until it has ended.
    fn transfer(&mut self, from: usize, to: Option<usize>) -> Result<usize, TransferError> {
        let mut answer = self.ask_for_transfer(from, to);
        for _ in 0..100_000 {
            self.step();
            if let Some(told) = answer_of(&mut answer) {
                return told.map(|done| done.leader.get() as usize - 1);
            }
        }
        panic!("the transfer never ends");
    }

    fn ask_for_transfer(
        &mut self,
        from: usize,
        to: Option<usize>,
    ) -> ringraft::Answer<Result<Transferred, TransferError>> {
        let process = self.process(from);
        process.wake_at = 0;
        process.handle.transfer_leadership(to.map(|to| NodeId(to as u64 + 1)))
    }
}

/// K5: every command that was admitted is committed, none is of unknown outcome, and the successor leads within a few round
/// trips.
#[test]
fn leadership_goes_where_it_is_asked_to_and_no_command_is_lost_on_the_way() {
    let (mut rig, leader) = Rig::started(3);
    rig.commit(leader, 100);
    for to in [(leader + 1) % 3, leader] {
        let from = rig.leader().expect("a leader");
        for tag in 0..200 {
            rig.propose(from, tag, 1_000);
        }
        rig.turn(from);
        let began = rig.context.now();
        assert_eq!(rig.transfer(from, Some(to)), Ok(to));
        let timeout = config(0, 3).election_timeout.as_nanos() as Time;
        assert!(rig.context.now() - began < timeout, "without waiting for an election time-out");
        rig.run_until("the successor takes commands", |rig| rig.leader() == Some(to));
        let done = rig.completed(from);
        assert_eq!(done.len(), 200);
        // What was admitted is committed, and the rest is refused for certain: nothing is of unknown outcome.
        let refused = |completion: &Completion| matches!(&completion.outcome, Err(ProposeError::Refused(refused)) if refused.reason == Refusal::Transferring);
        let committed = done.iter().filter(|completion| completion.outcome.is_ok()).count();
        assert!(
            committed > 0 && done.iter().all(|completion| completion.outcome.is_ok() || refused(completion))
        );
        rig.commit(to, 100);
    }
}

#[test]
fn commands_are_refused_while_leadership_is_on_its_way_and_taken_again_when_it_stays() {
    let (mut rig, leader) = Rig::started(3);
    rig.commit(leader, 100);
    let target = (leader + 1) % 3;
    // It follows, and its disk makes nothing durable: it never holds the whole log.
    let now = rig.context.now();
    rig.machines[target].disk.borrow_mut().faults_mut().stalled_until = now + 20 * SECOND;
    rig.commit(leader, 100);
    let mut answer = rig.ask_for_transfer(leader, Some(target));
    rig.run_until("it is under way", |rig| {
        rig.machines[leader]
            .process
            .as_ref()
            .is_some_and(|process| process.driver.raft().is_some_and(|raft| raft.transfer_target().is_some()))
    });
    rig.propose(leader, 2, 100);
    rig.turn(leader);
    let told = rig.completed(leader).pop().map(|completion| completion.outcome);
    let Some(Err(ProposeError::Refused(refused))) = told else { panic!("{told:?}") };
    assert_eq!(refused.reason, Refusal::Transferring);

    let began = rig.context.now();
    let ended = loop {
        rig.step();
        if let Some(told) = answer_of(&mut answer) {
            break told;
        }
    };
    let to = NodeId(target as u64 + 1);
    assert_eq!(ended, Err(TransferError::Ended(TransferEnd::TimedOut { to })));
    let timeout = config(0, 3).election_timeout.as_nanos() as Time;
    assert!(rig.context.now() - began <= timeout + 10 * MILLISECOND);
    assert_eq!(rig.leader(), Some(leader));
    rig.commit(leader, 100);
}

#[test]
fn a_transfer_that_cannot_be_says_why() {
    let (mut rig, leader) = Rig::started(3);
    let other = (leader + 1) % 3;
    let ended = |end| Err(TransferError::Ended(end));
    assert_eq!(rig.transfer(other, None), ended(TransferEnd::NotLeader));
    assert_eq!(rig.transfer(leader, Some(8)), ended(TransferEnd::NotAVoter { to: NodeId(9) }));
    assert_eq!(rig.transfer(leader, Some(leader)), Ok(leader), "it leads already");
    rig.kill(other);
    let to = NodeId(other as u64 + 1);
    let Err(TransferError::Ended(end)) = rig.transfer(leader, Some(other)) else { panic!("it is dead") };
    assert!(matches!(end, TransferEnd::Lost { .. } | TransferEnd::TimedOut { .. }), "{end:?} for {to}");
    assert_eq!(rig.leader(), Some(leader), "it leads on");

    let (mut alone, _) = Rig::started(1);
    assert_eq!(alone.transfer(0, None), ended(TransferEnd::NoCandidate));
}

/// K5: on shutdown.
#[test]
fn a_leader_that_shuts_down_hands_over_first_and_its_last_commands_are_committed() {
    let (mut rig, leader) = Rig::started(3);
    rig.commit(leader, 100);
    for tag in 0..50 {
        rig.propose(leader, tag, 500);
    }
    // Once the commands are in.
    rig.turn(leader);
    rig.shutdown(leader);
    let began = rig.context.now();
    let handle = rig.process(leader).handle.clone();
    let pipeline = std::mem::replace(&mut rig.process(leader).pipeline, handle.pipeline());
    let status = rig.run_until_ended(leader);
    assert!(status.stopped.is_some_and(|cause| cause.is_orderly()));
    let successor = rig.run_until_led();
    assert_ne!(successor, leader);
    let timeout = config(0, 3).election_timeout.as_nanos() as Time;
    assert!(rig.context.now() - began < timeout, "nobody waited for an election time-out");
    let (mut pipeline, mut done) = (pipeline, Vec::new());
    pipeline.completions(&mut done);
    assert_eq!(done.len(), 50);
    assert!(done.into_iter().all(|completion| completion.outcome.is_ok()));
    rig.commit(successor, 100);
}

#[test]
fn a_leader_that_shuts_down_alone_does_not_wait_for_anybody() {
    let (mut rig, leader) = Rig::started(3);
    rig.commit(leader, 100);
    for other in [1, 2] {
        rig.kill((leader + other) % 3);
    }
    rig.run_for(10 * MILLISECOND);
    let began = rig.context.now();
    rig.shutdown(leader);
    rig.run_until_ended(leader);
    let timeout = config(0, 3).election_timeout.as_nanos() as Time;
    assert!(rig.context.now() - began <= 2 * timeout + 10 * MILLISECOND);
}

/// K4: with priorities, the higher one follows a dead leader, whoever that is.
#[test]
fn the_member_of_the_highest_priority_campaigns_first() {
    for seed in 0..20 {
        let mut rig = Rig::seeded(3, seed);
        for node in 0..3 {
            let election_priority = Some([0, 0, 255][node]);
            rig.boot(Config { election_priority, ..config(node, 3) });
        }
        assert_eq!(rig.run_until_led(), 2, "seed {seed}");
    }
}

/// K10: a leader and no log. After its death another one, and terms that never repeat over restarts.
#[test]
fn a_cluster_that_only_elects_has_one_leader_at_a_time_and_takes_no_commands() {
    let boot = |rig: &mut Rig, node| rig.boot(Config { consensus_only: true, ..config(node, 3) });
    let mut rig = Rig::new(3);
    (0..3).for_each(|node| boot(&mut rig, node));
    let leads = |rig: &Rig| {
        let of =
            |node: &usize| rig.machines[*node].process.is_some() && rig.status(*node).role == Role::Leader;
        (0..3).find(of)
    };
    let mut terms = Vec::new();
    for _ in 0..4 {
        rig.run_until("a leader", |rig| leads(rig).is_some());
        let leader = leads(&rig).expect("a leader");
        terms.push(rig.status(leader).term);
        rig.run_for(5 * SECOND);
        assert_eq!(leads(&rig), Some(leader), "it stays");
        assert_eq!(rig.status(leader).last, LogIndex(0));
        rig.completed(leader);
        rig.propose(leader, 1, 10);
        rig.run_for(MILLISECOND);
        let told = rig.completed(leader).pop().expect("refused").outcome;
        assert!(
            matches!(&told, Err(ProposeError::Refused(refused)) if refused.reason == Refusal::ConsensusOnly),
            "{told:?}"
        );
        rig.kill(leader);
        rig.run_until("another leader", |rig| leads(rig).is_some());
        terms.push(rig.status(leads(&rig).expect("a leader")).term);
        boot(&mut rig, leader);
        rig.run_for(SECOND);
        (0..3).for_each(|node| rig.kill(node));
        (0..3).for_each(|node| boot(&mut rig, node));
    }
    assert!(terms.windows(2).all(|pair| pair[0] < pair[1]), "{terms:?}");
}

/// FAULTS: a leader whose log has no space lets one lead that has some.
#[test]
fn a_leader_without_space_hands_over_to_a_member_that_has_some() {
    let (mut rig, leader) = Rig::started(3);
    rig.commit(leader, 100);
    rig.machines[leader].disk.borrow_mut().faults_mut().no_space = true;
    let mut tag = 0;
    let deadline = rig.context.now() + 30 * SECOND;
    while rig.leader() == Some(leader) {
        if rig.status(leader).leader.is_some() && tag < 20_000 {
            tag += 1;
            rig.propose(leader, tag, 30_000);
        }
        rig.run_for(MILLISECOND);
        rig.completed(leader);
        assert!(rig.context.now() < deadline, "it leads on without space");
    }
    let successor = rig.run_until_led();
    assert_ne!(successor, leader);
    rig.commit(successor, 100);
}
