//! Damaged logs, end to end: three nodes of the engine on simulated disks that rot while the nodes are down, or stall.

use bytes::Bytes;
use ringraft::config::{Config, MemberConfig};
use ringraft::driver::Driver;
use ringraft::error::StopError;
use ringraft::handle::{Handle, Pipeline, Status};
use ringraft::raft::Role;
use ringraft::runtime::{Now, Turn, Wakeup};
use ringraft::state_machine::{CommittedBatch, Replies, StateMachine};
use ringraft_block::{BLOCK_BYTES, ClusterId, LogIndex, NodeId, Pool};
use ringraft_tests::sim::buffer::SimBuf;
use ringraft_tests::sim::context::{Context, MILLISECOND, SECOND, Time};
use ringraft_tests::sim::disk::{Crash, DiskConfig, DiskState, SimDisk};
use ringraft_tests::sim::link::{Fabric, LinkConfig, SimLink, address_of};
use ringraft_tests::sim::rng::Rng;
use ringraft_tests::sim::trace::Trace;
use ringraft_wal::disk::{Access, Disk, DiskOp, DiskOpId, DiskOutput};
use ringraft_wal::format::{ENVELOPE_BYTES, read_envelope};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Keeps what it was given.
#[derive(Default)]
struct Journal(Vec<Bytes>);

impl StateMachine for Journal {
    fn apply(&mut self, batch: &CommittedBatch<'_>, replies: &mut Replies) {
        for command in batch.commands() {
            self.0.push(Bytes::copy_from_slice(command.bytes));
            replies.push_empty();
        }
    }
}

struct Process {
    driver: Driver<SimDisk, SimLink, Journal>,
    handle: Handle,
    pipeline: Pipeline,
    wake_at: Time,
}

struct Lab {
    context: Rc<Context>,
    fabric: Rc<RefCell<Fabric>>,
    disks: Vec<Rc<RefCell<DiskState>>>,
    processes: Vec<Option<Process>>,
    stopped: Vec<Option<Status>>,
    rng: Rng,
    proposed: Vec<Bytes>,
}

const NODES: usize = 3;
const WINDOW_BYTES: usize = 64 << 10;

fn config(node: usize, nodes: usize) -> Config {
    let member = |node| MemberConfig {
        id: NodeId(node as u64 + 1),
        address: SocketAddr::new(address_of(node), 7_000),
    };
    Config {
        insecure: true,
        election_timeout: Duration::from_millis(100),
        heartbeat_interval: Duration::from_millis(10),
        segment_bytes: 1 << 20,
        segments_ahead: 2,
        batch_bytes_max: 4096,
        command_bytes_max: 2048,
        disk_stall_stop: Duration::from_secs(2),
        window_bytes: WINDOW_BYTES,
        ..Config::new(
            ClusterId(0x5eed),
            NodeId(node as u64 + 1),
            (0..nodes).map(member).collect(),
            "simulated",
        )
    }
}

/// Where a batch lies on a disk.
#[derive(Clone, Debug)]
struct Slot {
    file: String,
    offset: u64,
    image_bytes: u32,
}

impl Lab {
    fn new(seed: u64, nodes: usize) -> Self {
        let context = Context::new(Trace::new(false));
        let mut rng = Rng::new(seed);
        let fabric = Fabric::new(&context, nodes, rng.fork(1), LinkConfig::default());
        let disk =
            |node: usize| DiskState::new(&context, node, Rng::new(seed + node as u64), DiskConfig::default());
        let disks = (0..nodes).map(disk).collect();
        let mut lab = Self {
            context: Rc::clone(&context),
            fabric,
            disks,
            processes: (0..nodes).map(|_| None).collect(),
            stopped: vec![None; nodes],
            rng,
            proposed: Vec::new(),
        };
        (0..nodes).for_each(|node| lab.boot(node));
        lab
    }

    fn boot(&mut self, node: usize) {
        self.fabric.borrow_mut().boot(node);
        let (disk, link) = (SimDisk::new(&self.disks[node]), SimLink::new(&self.fabric, node));
        let config = config(node, self.disks.len());
        let wakeup = Arc::new(Wakeup::new());
        let seed = self.rng.bits();
        let (driver, handle) =
            Driver::with_backend(config, seed, wakeup, disk, link, Journal::default()).expect("valid");
        let pipeline = handle.pipeline();
        self.stopped[node] = None;
        self.processes[node] = Some(Process { driver, handle, pipeline, wake_at: 0 });
    }

    fn kill(&mut self, node: usize) {
        self.processes[node] = None;
        self.disks[node].borrow_mut().crash(Crash::PowerCut);
        self.fabric.borrow_mut().crash(node, Crash::Kill);
    }

    fn step(&mut self) {
        let mut at = self.fabric.borrow().next_due().map_or((Time::MAX, None), |due| (due, None));
        for (node, process) in self.processes.iter().enumerate() {
            let Some(process) = process else { continue };
            let mut due = process.wake_at;
            if self.fabric.borrow().has_done(node) {
                due = 0;
            } else if let Some(disk) = self.disks[node].borrow().next_due() {
                due = due.min(disk);
            }
            if due < at.0 {
                at = (due, Some(node));
            }
        }
        let now = at.0.max(self.context.now());
        self.context.advance_to(now);
        match at.1 {
            None => self.fabric.borrow_mut().step(),
            Some(node) => self.turn(node),
        }
    }

    fn turn(&mut self, node: usize) {
        let now = self.context.now();
        let Some(process) = &mut self.processes[node] else { return };
        let outcome = process.driver.turn(Now { monotonic_ns: now, wall_ms: now / MILLISECOND });
        process.wake_at = if outcome.more { now + 2_000 } else { outcome.next_deadline_ns.max(now + 1) };
        if outcome.stop {
            self.stopped[node] = Some(process.handle.status());
            self.kill(node);
        }
    }

    /// Runs until `condition` holds.
    fn until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        let end = self.context.now() + 60 * SECOND;
        while !condition(self) {
            let states: Vec<_> = (0..self.disks.len()).map(|node| self.status(node)).collect();
            assert!(self.context.now() < end, "{what}: {states:#?}");
            self.step();
        }
    }

    fn run(&mut self, span: Time) {
        let end = self.context.now() + span;
        while self.context.now() < end {
            self.step();
        }
    }

    fn status(&self, node: usize) -> Option<Status> {
        self.processes[node].as_ref().map(|process| process.handle.status())
    }

    fn leader(&self) -> Option<usize> {
        (0..self.disks.len()).find(|node| {
            self.driver(*node).is_some_and(|driver| {
                driver.raft().is_some_and(|raft| raft.role() == Role::Leader && raft.can_accept_proposals())
            })
        })
    }

    fn driver(&self, node: usize) -> Option<&Driver<SimDisk, SimLink, Journal>> {
        self.processes[node].as_ref().map(|process| &process.driver)
    }

    fn journal(&self, node: usize) -> &[Bytes] {
        self.driver(node).map_or(&[], |driver| &driver.machine().0)
    }

    /// Proposes so many commands, one after the other, each in a batch of its own, and waits for them.
    fn commit(&mut self, count: usize) {
        for _ in 0..count {
            let leader = self.propose();
            self.until("a commit", |lab| lab.journal(leader).last() == lab.proposed.last());
        }
    }

    /// Proposes a command to the leader, which it returns.
    fn propose(&mut self) -> usize {
        self.until("a leader", |lab| lab.leader().is_some());
        let leader = self.leader().expect("just seen");
        let number = self.proposed.len();
        let mut command = vec![number as u8; 700];
        command[..8].copy_from_slice(&(number as u64).to_le_bytes());
        let command = Bytes::from(command);
        self.proposed.push(command.clone());
        let process = self.processes[leader].as_mut().expect("it leads");
        process.pipeline.submit(number as u64, command).expect("accepted");
        process.wake_at = 0;
        leader
    }

    /// Waits until every node that runs has applied everything, and compares.
    fn converge(&mut self) {
        self.until("convergence", |lab| {
            let running = (0..lab.disks.len()).filter(|node| lab.processes[*node].is_some());
            running.into_iter().all(|node| lab.journal(node).len() >= lab.proposed.len())
        });
        for node in 0..self.disks.len() {
            if self.processes[node].is_some() {
                assert_eq!(self.journal(node), self.proposed, "node {node}");
            }
        }
    }

    fn is_healed(&self, node: usize) -> bool {
        self.status(node).is_some_and(|status| {
            let damage = &status.damage;
            status.formed && damage.batches == 0 && damage.claim.is_none() && damage.waiting_for.is_empty()
        })
    }

    /// Every batch on a disk, by its first index, as a later start would see it; of the newest segment that has it.
    fn slots(&self, node: usize) -> BTreeMap<u64, Slot> {
        let image = self.disks[node].borrow().durable_image(&self.context);
        let listing = image.borrow().listing();
        let mut disk = SimDisk::new(&image);
        let pool: Pool<SimBuf> = Pool::new(1 << 20);
        let mut slots = BTreeMap::new();
        for entry in listing.iter().filter(|entry| entry.name.starts_with("segment")) {
            let mut run = |op| {
                let mut done = Vec::new();
                disk.submit(DiskOpId(0), op);
                disk.poll(&mut done);
                done.remove(0).result.expect("a disk without faults")
            };
            let opened = run(DiskOp::Open { name: entry.name.clone(), access: Access::Read });
            let DiskOutput::Opened { file, bytes } = opened else { panic!("not opened") };
            for offset in (0..bytes).step_by(BLOCK_BYTES) {
                let block = pool.take(BLOCK_BYTES, |bytes| Ok::<_, Infallible>(SimBuf::take(bytes)));
                let block = block.expect("infallible");
                let DiskOutput::Read { block, .. } =
                    run(DiskOp::Read { file, offset, block, bytes: BLOCK_BYTES })
                else {
                    panic!("not read")
                };
                let Ok(envelope) = read_envelope(&block) else { continue };
                if envelope.offset == offset {
                    let slot = Slot { file: entry.name.clone(), offset, image_bytes: envelope.image_bytes };
                    slots.insert(envelope.first.get(), slot);
                }
            }
        }
        slots
    }

    /// The bytes of the batch at `first` rot; its identity stays.
    fn rot_image(&mut self, node: usize, first: u64) {
        let slot = self.slots(node).remove(&first).unwrap_or_else(|| panic!("no batch at {first}"));
        let at = slot.offset + ENVELOPE_BYTES as u64 + u64::from(slot.image_bytes) - 9;
        self.disks[node].borrow_mut().flip_bit(&slot.file, at, 3);
    }

    /// The envelope of the batch at `first` rots: what was there, nobody knows.
    fn rot_envelope(&mut self, node: usize, first: u64) {
        let slot = self.slots(node).remove(&first).unwrap_or_else(|| panic!("no batch at {first}"));
        self.disks[node].borrow_mut().flip_bit(&slot.file, slot.offset + 17, 3);
    }

    fn kill_all(&mut self) {
        (0..self.disks.len()).for_each(|node| self.kill(node));
    }

    fn boot_all(&mut self) {
        (0..self.disks.len()).for_each(|node| self.boot(node));
    }
}

/// A cluster with some committed batches on all disks.
fn prepared(seed: u64, nodes: usize) -> Lab {
    let mut lab = Lab::new(seed, nodes);
    lab.commit(20);
    lab.converge();
    lab.run(20 * MILLISECOND);
    lab
}

fn follower(lab: &Lab) -> usize {
    let leader = lab.leader().expect("a leader");
    (leader + 1) % lab.disks.len()
}

#[test]
fn rot_in_a_followers_log_is_healed_while_commits_go_on() {
    for seed in 0..5 {
        let mut lab = prepared(seed, NODES);
        let damaged = follower(&lab);
        lab.kill(damaged);
        lab.rot_image(damaged, 5);
        lab.rot_image(damaged, 9);
        lab.rot_image(damaged, 10);
        lab.commit(5);
        lab.boot(damaged);
        lab.until("the damage is seen", |lab| {
            lab.status(damaged).is_some_and(|status| status.damage.batches > 0)
        });
        assert_eq!(lab.status(damaged).expect("it runs").damage.first, Some(LogIndex(5)));
        lab.commit(5);
        lab.until("healed", |lab| lab.is_healed(damaged));
        assert_eq!(lab.status(damaged).expect("it runs").damage.repaired, 3);
        lab.converge();
        // And for good.
        lab.kill(damaged);
        lab.boot(damaged);
        lab.until("it runs again", |lab| lab.status(damaged).is_some_and(|status| status.formed));
        assert!(lab.is_healed(damaged));
        lab.converge();
    }
}

#[test]
fn damage_that_hides_what_was_there_is_healed_by_the_leader_and_the_node_votes_again() {
    for seed in 0..5 {
        let mut lab = prepared(seed, NODES);
        let damaged = follower(&lab);
        lab.kill(damaged);
        let last = *lab.slots(damaged).keys().last().expect("batches");
        for (round, first) in [7, last].into_iter().enumerate() {
            if round > 0 {
                lab.kill(damaged);
            }
            lab.rot_envelope(damaged, first);
            lab.boot(damaged);
            lab.until("the claim", |lab| {
                lab.status(damaged).is_some_and(|status| status.damage.claim.is_some())
            });
            lab.commit(2);
            lab.until("healed", |lab| lab.is_healed(damaged));
            lab.converge();
        }
        // Its vote counts again, though the term has not changed since it lost what it lost: with the leader down the two
        // others need each other.
        let leader = lab.leader().expect("a leader");
        lab.kill(leader);
        lab.until("another leader", |lab| lab.leader().is_some());
        lab.commit(1);
        lab.converge();
    }
}

/// A follower that has lost a batch of its log, the last one or the one at 7, has met the leader again, and is sent a new one.
fn with_a_claim(at_end: bool) -> (Lab, usize) {
    let mut lab = prepared(3, NODES);
    let damaged = follower(&lab);
    lab.kill(damaged);
    let last = *lab.slots(damaged).keys().last().expect("batches");
    lab.rot_envelope(damaged, if at_end { last } else { 7 });
    lab.boot(damaged);
    lab.until("the claim", |lab| lab.status(damaged).is_some_and(|status| status.damage.claim.is_some()));
    lab.until("it is led", |lab| lab.status(damaged).is_some_and(|status| status.leader.is_some()));
    lab.propose();
    (lab, damaged)
}

/// A node is told to stop while what it had lost is given back to it, at any moment in which it writes: it stops in good order,
/// and the next start goes on with that.
#[test]
fn a_node_that_is_stopped_while_its_claim_is_settled_stops_in_good_order() {
    for at_end in [false, true] {
        let (mut lab, damaged) = with_a_claim(at_end);
        let mut moments = Vec::new();
        while !lab.is_healed(damaged) {
            lab.step();
            let writes = lab.disks[damaged].borrow().writes_in_flight() > 0;
            moments.extend(Some(lab.context.now()).filter(|_| writes));
        }
        moments.dedup();
        assert!(moments.len() > 4, "{moments:?}");
        for moment in moments {
            let (mut lab, damaged) = with_a_claim(at_end);
            while lab.context.now() < moment {
                lab.step();
            }
            let process = lab.processes[damaged].as_mut().expect("it runs");
            process.handle.shutdown();
            process.wake_at = 0;
            lab.until("it stops", |lab| lab.processes[damaged].is_none());
            let stopped = lab.stopped[damaged].take().and_then(|status| status.stopped).expect("a cause");
            assert!(stopped.is_orderly(), "{stopped}");
            lab.boot(damaged);
            lab.commit(1);
            lab.until("healed", |lab| lab.is_healed(damaged));
            lab.converge();
        }
    }
}

#[test]
fn three_nodes_each_damaged_elsewhere_heal_each_other_without_a_leader() {
    for seed in 0..5 {
        for kinds in 0..8 {
            let mut lab = prepared(seed, NODES);
            lab.kill_all();
            for node in 0..NODES {
                let first = 4 + 5 * node as u64;
                if kinds >> node & 1 == 0 {
                    lab.rot_image(node, first);
                } else {
                    lab.rot_envelope(node, first);
                }
            }
            lab.boot_all();
            lab.until("all healed", |lab| (0..NODES).all(|node| lab.is_healed(node)));
            lab.commit(3);
            lab.converge();
        }
    }
}

#[test]
fn the_last_batches_lost_at_all_but_one_are_not_forgotten() {
    for seed in 0..5 {
        let mut lab = prepared(seed, NODES);
        lab.kill_all();
        let last = *lab.slots(0).keys().last().expect("batches");
        lab.rot_envelope(0, last);
        lab.rot_envelope(1, last - 1);
        lab.rot_envelope(1, last);
        lab.boot_all();
        lab.commit(1);
        lab.until("all healed", |lab| (0..NODES).all(|node| lab.is_healed(node)));
        lab.converge();
    }
}

#[test]
fn several_batches_missing_in_a_row_are_proved_by_what_was_kept_behind_them() {
    for seed in 0..3 {
        let mut lab = prepared(seed, NODES);
        let leader = lab.leader().expect("a leader");
        let others: Vec<_> = (0..NODES).filter(|node| *node != leader).collect();
        let last = *lab.slots(leader).keys().last().expect("batches");
        others.iter().for_each(|other| lab.kill(*other));
        // Nobody else gets these.
        for number in 0..2 {
            let command = Bytes::from(vec![0xe0 + number; 300]);
            lab.proposed.push(command.clone());
            let process = lab.processes[leader].as_mut().expect("it leads");
            process.pipeline.submit(900 + u64::from(number), command).expect("accepted");
            process.wake_at = 0;
            lab.run(10 * MILLISECOND);
        }
        lab.kill_all();
        (last - 2..=last).for_each(|first| lab.rot_envelope(leader, first));
        // The third may have anything; but what the other has leads to what was kept, and needs no more proof.
        lab.boot(leader);
        lab.boot(others[0]);
        lab.commit(1);
        lab.until("healed", |lab| lab.is_healed(leader));
        lab.boot(others[1]);
        lab.converge();
    }
}

#[test]
fn a_member_that_may_have_the_only_copy_is_waited_for_and_named() {
    let mut lab = prepared(3, NODES);
    lab.kill_all();
    let last = *lab.slots(0).keys().last().expect("batches");
    lab.rot_envelope(0, last);
    lab.rot_envelope(1, last);
    lab.boot(0);
    lab.boot(1);
    lab.until("it is waited for", |lab| {
        (0..2)
            .all(|node| lab.status(node).is_some_and(|status| status.damage.waiting_for.contains(&NodeId(3))))
    });
    lab.run(5 * SECOND);
    assert_eq!(lab.leader(), None, "neither knows what it has forgotten");
    lab.boot(2);
    lab.commit(1);
    lab.until("all healed", |lab| (0..NODES).all(|node| lab.is_healed(node)));
    lab.converge();
}

#[test]
fn all_copies_of_a_batch_gone_stop_the_nodes_with_the_place() {
    for unknown in [false, true] {
        for nodes in [1, NODES] {
            let mut lab = prepared(2, nodes);
            lab.kill_all();
            for node in 0..nodes {
                if unknown {
                    lab.rot_envelope(node, 11);
                } else {
                    lab.rot_image(node, 11);
                }
            }
            lab.boot_all();
            // The others may wait for one that has stopped before them: a node that cannot be asked may have a copy.
            lab.until("a node stops", |lab| lab.stopped.iter().any(Option::is_some));
            for status in lab.stopped.iter().flatten() {
                let cause = status.stopped.clone().expect("it stopped");
                let StopError::CopiesGone { first, segment, offset, .. } = cause.error() else {
                    panic!("{cause}")
                };
                assert_eq!(*first, LogIndex(11));
                assert!(segment.starts_with("segment") && *offset > 0, "{cause}");
            }
        }
    }
}

/// Each node's log was closed by a restart, so the scrubber reads it; nobody else does.
#[test]
fn the_scrubber_finds_rot_at_nodes_that_run_and_it_is_healed_while_the_leader_leads() {
    let mut lab = prepared(4, NODES);
    lab.kill_all();
    lab.boot_all();
    lab.commit(1);
    lab.converge();
    let leader = lab.leader().expect("a leader");
    for node in 0..NODES {
        lab.rot_image(node, 4 + node as u64);
    }
    lab.until("found and repaired", |lab| {
        (0..NODES).all(|node| lab.status(node).is_some_and(|status| status.damage.repaired == 1))
    });
    assert_eq!(lab.leader(), Some(leader));
    assert!((0..NODES).all(|node| lab.is_healed(node)));
    lab.commit(1);
    lab.kill_all();
    lab.boot_all();
    lab.converge();
    assert!((0..NODES).all(|node| lab.is_healed(node)));
}

/// The leader that it was acknowledged to goes on counting it; the next one is told what can be read.
#[test]
fn rot_found_at_a_follower_that_runs_is_not_counted_by_the_next_leader_before_it_is_mended() {
    let mut lab = prepared(6, NODES);
    lab.kill_all();
    lab.boot_all();
    lab.commit(1);
    lab.converge();
    let first = lab.leader().expect("a leader");
    let damaged = follower(&lab);
    let matched = |lab: &Lab, leader: usize| {
        let id = NodeId(damaged as u64 + 1);
        let status = lab.status(leader).expect("it runs");
        status.peers.iter().find(|peer| peer.id == id).map(|peer| peer.matched.get())
    };
    // It finds the rot and has no room for the mended segment.
    lab.disks[damaged].borrow_mut().faults_mut().no_space = true;
    lab.rot_image(damaged, 4);
    lab.until("found", |lab| lab.status(damaged).is_some_and(|status| status.damage.batches == 1));
    lab.commit(1);
    lab.converge();
    let last = lab.status(first).expect("it runs").last.get();
    lab.until("counted as before", |lab| matched(lab, first) == Some(last));

    lab.kill(first);
    lab.until("another leader", |lab| lab.leader().is_some());
    let next = lab.leader().expect("just seen");
    assert_ne!(next, damaged);
    lab.until("it is heard", |lab| matched(lab, next).is_some_and(|matched| matched > 0));
    let commit = lab.status(next).expect("it runs").commit;
    lab.run(SECOND);
    assert_eq!(matched(&lab, next), Some(3), "what lies before the damage");
    assert_eq!(lab.status(next).expect("it runs").commit, commit, "two of three, and one cannot read it");
    lab.disks[damaged].borrow_mut().faults_mut().no_space = false;
    lab.until("mended", |lab| lab.is_healed(damaged));
    lab.commit(1);
    lab.boot(first);
    lab.converge();
}

#[test]
fn a_follower_without_space_holds_a_bounded_number_of_batches_in_memory_and_catches_up_later() {
    let mut lab = prepared(5, NODES);
    let full = follower(&lab);
    lab.disks[full].borrow_mut().faults_mut().no_space = true;
    // Three segments are ready or in use; each holds some 250 of these batches.
    lab.commit(1_100);
    let unwritten = |lab: &Lab| {
        let driver = lab.driver(full).expect("it runs");
        driver.raft().expect("formed").last().index.get() - driver.wal().last_index().get()
    };
    assert!(unwritten(&lab) > 0, "the test is to fill its log");
    // Each new leader has a window of its own.
    for _ in 0..4 {
        let leader = lab.leader().expect("a leader");
        lab.kill(leader);
        lab.boot(leader);
        lab.until("another leader", |lab| lab.leader().is_some());
        lab.commit(40);
        assert!(unwritten(&lab) * 4096 <= 2 * WINDOW_BYTES as u64, "{}", unwritten(&lab));
    }
    lab.disks[full].borrow_mut().faults_mut().no_space = false;
    lab.converge();
}

#[test]
fn a_leader_whose_disk_stalls_hands_over_and_stops_when_it_does_not_recover() {
    let mut lab = prepared(1, NODES);
    let stalled = lab.leader().expect("a leader");
    lab.disks[stalled].borrow_mut().faults_mut().stalled_until = lab.context.now() + SECOND;
    let process = lab.processes[stalled].as_mut().expect("it leads");
    process.pipeline.submit(1_000, Bytes::from_static(b"x")).expect("accepted");
    process.wake_at = 0;
    lab.proposed.push(Bytes::from_static(b"x"));
    lab.until("it stands aside", |lab| lab.leader().is_some_and(|leader| leader != stalled));
    assert!(lab.status(stalled).expect("it runs").damage.disk_stalled_ms.is_some());
    lab.commit(3);
    lab.run(SECOND);
    assert_eq!(lab.status(stalled).expect("it runs").damage.disk_stalled_ms, None);
    lab.converge();

    let stalled = lab.leader().expect("a leader");
    lab.disks[stalled].borrow_mut().faults_mut().stalled_until = Time::MAX / 2;
    let process = lab.processes[stalled].as_mut().expect("it leads");
    process.pipeline.submit(1_001, Bytes::from_static(b"y")).expect("accepted");
    process.wake_at = 0;
    lab.until("it stops", |lab| lab.stopped[stalled].is_some());
    let cause = lab.stopped[stalled].take().and_then(|status| status.stopped).expect("it stopped");
    assert!(matches!(cause.error(), StopError::DiskStalled { millis } if *millis >= 2_000), "{cause}");
}
