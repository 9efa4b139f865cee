//! Snapshots in clusters of real drivers: taken, purged behind, restored, sent, and what damage and crashes make of them.

use super::*;
use ringraft::error::ReadError;
use ringraft::mutants::{self, Mutant};
use ringraft::reads::{Consistency, QueryReply, Read};
use ringraft_tests::sim::disk::{Fault, On, Rot, Scheduled};
use ringraft_wal::disk::{Disk as _, DiskDone, DiskOp, DiskOpId};
use std::future::Future;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

/// Nothing is retained, so that every snapshot moves the log's start to its end.
fn config(node: usize, nodes: usize) -> Config {
    Config { log_retention_bytes: 0, snapshot_bytes_per_second: 0, ..super::config(node, nodes) }
}

impl Rig {
    fn boot_all(&mut self) {
        let nodes = self.machines.len();
        (0..nodes).for_each(|node| self.boot(config(node, nodes)));
    }

    fn with_ballast(nodes: usize, ballast: usize, seed: u64) -> (Self, usize) {
        let mut rig = Rig::seeded(nodes, seed);
        rig.ballast = ballast;
        rig.boot_all();
        let leader = rig.run_until_led();
        (rig, leader)
    }

    fn log_start(&self, node: usize) -> LogIndex {
        let process = self.machines[node].process.as_ref().expect("it runs");
        process.driver.raft().map_or(LogIndex(0), |raft| raft.log_start().index)
    }

    fn counter(&self, node: usize) -> &Counter {
        self.machines[node].process.as_ref().expect("it runs").driver.machine()
    }

    fn state(&self, node: usize) -> (u64, u64) {
        (self.counter(node).count, self.counter(node).hash)
    }

    /// Takes a snapshot by hand, and waits until the log starts behind it.
    pub(super) fn snapshot(&mut self, node: usize) -> LogIndex {
        let applied = self.status(node).applied;
        let request = self.process(node).handle.snapshot();
        self.process(node).wake_at = 0;
        // One that covers all already is the answer in the next turn.
        self.run_for(MILLISECOND);
        self.run_until("a snapshot is taken", |rig| rig.status(node).snapshot.last >= Some(applied));
        let taken = request.wait().expect("taken");
        assert!(taken.last >= applied);
        self.run_until("the log starts behind it", |rig| rig.log_start(node) >= taken.last);
        taken.last
    }

    fn commit_some(&mut self, node: usize, count: usize) -> LogIndex {
        (0..count).map(|_| self.commit(node, 300)).last().expect("some")
    }

    /// All nodes that run have applied up to `index`, and have the same state.
    fn run_until_equal(&mut self, index: LogIndex) {
        self.run_until("all have applied it", |rig| {
            let running = (0..rig.machines.len()).filter(|node| rig.machines[*node].process.is_some());
            running.into_iter().all(|node| rig.status(node).applied >= index)
        });
        let running: Vec<_> =
            (0..self.machines.len()).filter(|node| self.machines[*node].process.is_some()).collect();
        let states: Vec<_> = running.iter().map(|node| self.state(*node)).collect();
        assert!(states.windows(2).all(|pair| pair[0] == pair[1]), "{states:?}");
    }

    fn snapshot_files(&self, node: usize) -> Vec<String> {
        let names = self.machines[node].disk.borrow().listing().into_iter().map(|entry| entry.name);
        names.filter(|name| name.starts_with("snapshot-")).collect()
    }

    fn receives(&self, node: usize) -> Option<u64> {
        let installs = self.machines[node].process.as_ref()?.handle.status().snapshot.installs;
        installs.iter().find(|install| install.incoming).map(|install| install.bytes_done)
    }
}

#[test]
fn a_restart_begins_with_the_newest_snapshot_and_the_log_behind_it() {
    let (mut rig, leader) = Rig::with_ballast(1, 200_000, 1);
    rig.commit_some(leader, 20);
    let last = rig.snapshot(leader);
    assert_eq!((rig.log_start(leader), rig.counter(leader).restored), (last, 0));
    // Nothing new has been applied: the same one answers.
    assert_eq!(rig.snapshot(leader), last);
    let end = rig.commit_some(leader, 5);
    let state = rig.state(leader);
    rig.crash(0, Crash::PowerCut);
    rig.boot_all();
    rig.run_until_led();
    rig.run_until("it has applied all", |rig| rig.status(0).applied >= end);
    assert_eq!(rig.state(0), state);
    assert_eq!((rig.log_start(0), rig.counter(0).restored), (last, 1));
    assert_eq!(rig.status(0).snapshot.last, Some(last));
    // It goes on as before, with snapshots of its own: two are kept.
    for _ in 0..3 {
        rig.commit_some(0, 3);
        rig.snapshot(0);
    }
    rig.run_for(SECOND);
    assert_eq!(rig.snapshot_files(0).len(), 2, "{:?}", rig.snapshot_files(0));
}

/// What a follower had to say of its log waits for its term to be durable, on a disk where that takes long. Meanwhile it is
/// given a snapshot, and its log begins behind that. True if it lives on.
fn outlives_its_log() -> bool {
    let (mut rig, leader) = Rig::with_ballast(3, 1_000, 7);
    let (late, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let end = rig.commit_some(leader, 5);
    rig.run_until_equal(end);
    // It knows nothing of the next term, and holds all of the log before.
    for node in [leader, other] {
        rig.fabric.borrow_mut().cut(node, late);
        rig.fabric.borrow_mut().cut(late, node);
    }
    assert_eq!(rig.transfer(leader, Some(other)), Ok(other));
    let stall = Scheduled { on: On::Write, skip: 0, fault: Fault::Stall(5 * SECOND) };
    rig.machines[late].disk.borrow_mut().faults_mut().scheduled.push(stall);
    rig.fabric.borrow_mut().heal_all();
    let term = rig.status(other).term;
    rig.run_until("it is in the term", |rig| rig.status(late).term == term);
    rig.commit_some(other, 20);
    rig.snapshot(other);
    rig.run_until("it is given the snapshot", |rig| rig.counter(late).restored > 0);
    for _ in 0..10_000 {
        rig.step();
        if rig.machines[late].process.is_none() {
            return false;
        }
    }
    let end = rig.commit_some(other, 3);
    rig.run_until_equal(end);
    true
}

#[test]
fn what_waits_for_a_slow_disk_is_not_said_of_a_log_that_is_gone_meanwhile() {
    assert!(outlives_its_log());
}

/// A follower knows of committed batches that wait in memory for a disk that is slow. In its next session it is offered a
/// snapshot that ends among them: the log has not taken that batch, and is of the same history all the same.
#[test]
fn a_snapshot_that_ends_in_what_waits_for_a_slow_disk_is_restored_and_the_log_goes_on() {
    let (mut rig, leader) = Rig::with_ballast(3, 1_000, 8);
    let late = (leader + 1) % 3;
    let end = rig.commit_some(leader, 5);
    rig.run_until_equal(end);
    rig.run_until("all of it is durable", |rig| rig.status(late).durable >= end);
    let stall = Scheduled { on: On::Write, skip: 0, fault: Fault::Stall(10 * SECOND) };
    rig.machines[late].disk.borrow_mut().faults_mut().scheduled.push(stall);
    // More than the log has under way at a time.
    let waiting = config(late, 3).writes_in_flight_max + 2;
    let last = rig.commit_some(leader, waiting);
    rig.run_until("it knows that all is committed", |rig| rig.status(late).commit == last);
    let (applied, durable) = (rig.status(late).applied, rig.status(late).durable);
    assert!(applied < last && durable == end, "{applied} applied, {durable} durable");
    for (from, to) in [(leader, late), (late, leader)] {
        rig.fabric.borrow_mut().cut(from, to);
    }
    rig.run_until("the session ends", |rig| {
        rig.status(leader).peers.iter().any(|peer| peer.id == NodeId(late as u64 + 1) && !peer.connected)
    });
    assert_eq!(rig.snapshot(leader), last);
    rig.fabric.borrow_mut().heal_all();
    rig.run_until("it has applied all", |rig| rig.status(late).applied >= last);
    assert_eq!((rig.counter(late).restored, rig.log_start(late)), (1, LogIndex(0)));
    assert_eq!(rig.status(late).durable, end, "the disk is still slow");
    // The log takes what waited, behind the state.
    rig.run_until("the disk is as fast as before", |rig| rig.status(late).durable >= last);
    let leader = rig.run_until_led();
    let end = rig.commit_some(leader, 3);
    rig.run_until_equal(end);
    rig.crash(late, Crash::PowerCut);
    rig.boot(config(late, 3));
    rig.run_until_equal(end);
}

#[test]
fn a_machine_that_makes_no_snapshots_says_so_and_keeps_its_log() {
    let mut rig = Rig::new(1);
    rig.make_none = true;
    rig.boot(Config { snapshot_log_entries: 3, ..config(0, 1) });
    rig.run_until_led();
    rig.commit_some(0, 10);
    let request = rig.process(0).handle.snapshot();
    rig.process(0).wake_at = 0;
    rig.run_for(SECOND);
    assert_eq!(request.wait(), Err(ringraft::handle::SnapshotError::Unsupported));
    assert_eq!((rig.log_start(0), rig.snapshot_files(0).len()), (LogIndex(0), 0));
    // One that was asked for and not taken is answered at the end.
    let request = rig.process(0).handle.snapshot();
    let handle = rig.process(0).handle.clone();
    rig.shutdown(0);
    rig.run_until_ended(0);
    assert!(request.wait().is_err() && handle.snapshot().wait().is_err());
}

#[test]
fn a_follower_behind_the_logs_start_is_caught_up_by_a_snapshot_while_commits_go_on() {
    let (mut rig, leader) = Rig::with_ballast(3, 3 << 20, 2);
    let away = (leader + 1) % 3;
    rig.commit_some(leader, 5);
    rig.kill(away);
    rig.commit_some(leader, 20);
    let start = rig.snapshot(leader);
    rig.boot(config(away, 3));
    rig.run_until("a snapshot is on its way", |rig| rig.receives(away).is_some());
    assert!(rig.status(leader).snapshot.installs.iter().any(|install| !install.incoming));
    let mut during = 0;
    let mut end = LogIndex(0);
    while rig.counter(away).restored == 0 {
        end = rig.commit(leader, 300);
        during += 1;
        assert!(during < 100_000, "it is never installed");
    }
    println!("{during} commits during the transfer of {} bytes", rig.status(leader).snapshot.bytes);
    assert!(during > 20, "{during} commits meanwhile");
    rig.run_until_equal(end);
    assert_eq!((rig.leader(), rig.counter(away).restored), (Some(leader), 1));
    assert!(rig.log_start(away) >= start);
    // Both sides have let go of the transfer.
    rig.run_for(SECOND);
    assert!((0..3).all(|node| rig.status(node).snapshot.installs.is_empty()));
    // What it was given serves it at a restart.
    let state = rig.state(away);
    rig.crash(away, Crash::PowerCut);
    rig.boot(config(away, 3));
    rig.run_until_equal(end);
    assert_eq!(rig.state(away), state);
}

/// A throttled transfer takes as long as its bytes do, and no commit waits for it.
#[test]
fn a_transfer_takes_what_it_may_of_the_disk_and_of_the_network_and_no_more() {
    let mut rig = Rig::seeded(3, 3);
    rig.ballast = 1 << 20;
    for node in 0..3 {
        rig.boot(Config { snapshot_bytes_per_second: 512 << 10, ..config(node, 3) });
    }
    let leader = rig.run_until_led();
    let away = (leader + 1) % 3;
    rig.kill(away);
    rig.commit_some(leader, 5);
    let before = rig.context.now();
    rig.snapshot(leader);
    let taking = rig.context.now() - before;
    assert!(taking > 2 * SECOND && taking < 3 * SECOND, "taken in {} ms", taking / MILLISECOND);
    rig.boot(Config { snapshot_bytes_per_second: 512 << 10, ..config(away, 3) });
    rig.run_until("a snapshot is on its way", |rig| rig.receives(away).is_some());
    let before = rig.context.now();
    rig.run_until("installed", |rig| rig.counter(away).restored > 0);
    let sending = rig.context.now() - before;
    assert!(sending > 19 * SECOND / 10 && sending < 3 * SECOND, "sent in {} ms", sending / MILLISECOND);
}

/// The process dies at every so many turns of a transfer and of what follows, by a kill and by a power cut.
#[test]
fn a_crash_at_any_moment_of_an_install_costs_nothing_but_time() {
    let mut installed = 0;
    for turn in 0..60_u64 {
        let (mut rig, leader) = Rig::with_ballast(3, 150_000, 100 + turn);
        let away = (leader + 1) % 3;
        rig.commit_some(leader, 3);
        rig.kill(away);
        rig.commit_some(leader, 5);
        rig.snapshot(leader);
        let end = rig.commit_some(leader, 3);
        rig.boot(config(away, 3));
        rig.run_until("a snapshot is on its way", |rig| rig.receives(away).is_some());
        let turns = rig.process(away).turns;
        rig.run_until("its turn has come", |rig| {
            rig.machines[away].process.as_ref().is_some_and(|process| process.turns >= turns + 3 * turn)
        });
        installed += u64::from(rig.counter(away).restored > 0);
        rig.crash(away, if turn % 2 == 0 { Crash::PowerCut } else { Crash::Kill });
        rig.boot(config(away, 3));
        rig.run_until_equal(end);
        let end = rig.commit_some(rig.leader().expect("it leads"), 3);
        rig.run_until_equal(end);
    }
    println!("{installed} of 60 crashes came after the install");
    assert!((5..55).contains(&installed), "{installed} of 60 crashes came after the install");
}

#[test]
fn a_transfer_goes_on_where_it_stopped_when_the_connection_was_cut() {
    let (mut rig, leader) = Rig::with_ballast(3, 4 << 20, 5);
    let away = (leader + 1) % 3;
    rig.kill(away);
    rig.commit_some(leader, 5);
    rig.snapshot(leader);
    rig.boot(config(away, 3));
    rig.run_until("half of it is there", |rig| rig.receives(away) > Some(2 << 20));
    let half = rig.receives(away).expect("on its way");
    for (from, to) in [(leader, away), (away, leader)] {
        rig.fabric.borrow_mut().cut(from, to);
    }
    rig.run_until("the session ends", |rig| rig.receives(away).is_none());
    rig.fabric.borrow_mut().heal_all();
    rig.run_until("it goes on", |rig| rig.receives(away).is_some());
    assert!(rig.receives(away) >= Some(half), "{:?} after {half}", rig.receives(away));
    rig.run_until("installed", |rig| rig.counter(away).restored == 1);
    let leader = rig.run_until_led();
    let end = rig.commit_some(leader, 3);
    rig.run_until_equal(end);
}

#[test]
fn a_transfer_goes_on_with_the_next_leader_when_that_has_the_same_snapshot() {
    let (mut rig, leader) = Rig::with_ballast(3, 4 << 20, 6);
    let (away, next) = ((leader + 1) % 3, (leader + 2) % 3);
    rig.kill(away);
    let end = rig.commit_some(leader, 5);
    rig.run_until_equal(end);
    assert_eq!(rig.snapshot(leader), rig.snapshot(next));
    rig.boot(config(away, 3));
    rig.run_until("half of it is there", |rig| rig.receives(away) > Some(2 << 20));
    let half = rig.receives(away).expect("on its way");
    rig.kill(leader);
    rig.run_until("the session ends", |rig| rig.receives(away).is_none());
    rig.run_until("it goes on", |rig| rig.receives(away).is_some());
    assert_eq!(rig.leader(), Some(next));
    assert!(rig.receives(away) >= Some(half), "{:?} after {half}", rig.receives(away));
    rig.run_until("installed", |rig| rig.counter(away).restored == 1);
    let end = rig.commit_some(next, 3);
    rig.run_until_equal(end);
}

// ---- A receiver that restarts

impl Rig {
    /// The file that holds what has arrived of a snapshot.
    fn partial_file(&self, node: usize) -> Option<String> {
        let mut names = self.snapshot_files(node).into_iter();
        let found = names.find(|name| name.ends_with(".part") && name != "snapshot-taking.part");
        assert_eq!(names.find(|name| name.ends_with(".part")), None, "one at a time");
        found
    }

    /// A follower that is being sent a snapshot of `ballast` bytes, of which `arrived` and more have arrived there.
    fn receiving(ballast: usize, arrived: u64, seed: u64) -> (Self, usize, usize) {
        let (mut rig, leader) = Rig::with_ballast(3, ballast, seed);
        let away = (leader + 1) % 3;
        let end = rig.commit_some(leader, 5);
        rig.run_until_equal(end);
        rig.kill(away);
        let end = rig.commit_some(leader, 5);
        rig.run_until_equal(end);
        for node in (0..3).filter(|node| *node != away) {
            rig.snapshot(node);
        }
        rig.boot(config(away, 3));
        rig.run_until("enough is there", |rig| rig.receives(away) >= Some(arrived));
        (rig, leader, away)
    }

    /// How much there was when the transfer went on, and all of it is installed.
    fn run_until_received(&mut self, node: usize) -> u64 {
        self.run_until("it goes on", |rig| rig.receives(node) > Some(0));
        let at = self.receives(node).expect("on its way");
        self.run_until("installed", |rig| rig.counter(node).restored == 1);
        let leader = self.run_until_led();
        let end = self.commit_some(leader, 2);
        self.run_until_equal(end);
        self.run_for(SECOND);
        assert_eq!(self.partial_file(node), None, "nothing is left over");
        at
    }
}

#[test]
fn a_transfer_goes_on_where_it_stopped_when_the_receiver_is_killed() {
    let (mut rig, _, away) = Rig::receiving(4 << 20, 2 << 20, 50);
    let half = rig.receives(away).expect("on its way");
    rig.kill(away);
    rig.boot(config(away, 3));
    let at = rig.run_until_received(away);
    // The last slot may not be complete.
    assert!(at + (64 << 10) >= half && at < 4 << 20, "{at} after {half}");
}

/// What was flushed survives, whatever becomes of the rest.
#[test]
fn a_transfer_goes_on_from_what_is_durable_when_the_receiver_loses_power() {
    let (mut rig, _, away) = Rig::receiving(20 << 20, 18 << 20, 51);
    rig.crash(away, Crash::PowerCut);
    rig.boot(config(away, 3));
    let at = rig.run_until_received(away);
    assert!(at + (64 << 10) >= 16 << 20, "{at}");
}

#[test]
fn a_transfer_goes_on_after_a_restart_with_the_next_leader_when_that_has_the_same_snapshot() {
    let (mut rig, leader, away) = Rig::receiving(4 << 20, 2 << 20, 52);
    let half = rig.receives(away).expect("on its way");
    rig.kill(away);
    rig.kill(leader);
    rig.boot(config(away, 3));
    let at = rig.run_until_received(away);
    assert!(at + (64 << 10) >= half, "{at} after {half}");
    assert_ne!(rig.leader(), Some(leader));
}

#[test]
fn what_has_arrived_of_another_snapshot_is_removed_and_the_transfer_begins_anew() {
    let (mut rig, leader, away) = Rig::receiving(4 << 20, 2 << 20, 53);
    rig.kill(away);
    let stale = rig.partial_file(away).expect("half of it");
    rig.commit_some(leader, 3);
    rig.snapshot(leader);
    rig.boot(config(away, 3));
    rig.run_until("the other one comes", |rig| rig.receives(away) > Some(0));
    assert!(rig.receives(away) < Some(1 << 20), "from its beginning");
    assert_ne!(rig.partial_file(away), Some(stale));
    rig.run_until_received(away);
}

/// The leader that had to send a snapshot is gone, and the next one still has the log.
#[test]
fn what_has_arrived_is_removed_when_it_is_not_needed_any_more() {
    for restarts in [false, true] {
        let mut rig = Rig::seeded(3, 54);
        rig.ballast = 4 << 20;
        let keeps = |node| Config { log_retention_bytes: 1 << 30, ..config(node, 3) };
        rig.boot(config(0, 3));
        (1..3).for_each(|node| rig.boot(keeps(node)));
        let leader = rig.run_until_led();
        if leader != 0 {
            assert_eq!(rig.transfer(leader, Some(0)), Ok(0));
            rig.run_until("it takes commands", |rig| rig.leader() == Some(0));
        }
        let end = rig.commit_some(0, 3);
        rig.run_until_equal(end);
        rig.kill(2);
        let end = rig.commit_some(0, 5);
        rig.run_until("the third has it", |rig| rig.status(1).applied >= end);
        rig.snapshot(0);
        rig.boot(keeps(2));
        rig.run_until("half of it is there", |rig| rig.receives(2) > Some(2 << 20));
        rig.kill(0);
        assert!(rig.partial_file(2).is_some());
        if restarts {
            rig.kill(2);
            rig.boot(keeps(2));
        }
        rig.run_until("the other one leads", |rig| rig.leader() == Some(1));
        let end = rig.commit_some(1, 2);
        rig.run_until_equal(end);
        rig.run_for(SECOND);
        assert_eq!((rig.counter(2).restored, rig.partial_file(2)), (0, None), "restarts: {restarts}");
        assert!(rig.status(2).snapshot.installs.is_empty());
    }
}

/// Rot where it was verified in the life before, and where it is not looked at again before the end.
#[test]
fn what_rots_while_a_transfer_is_interrupted_is_asked_for_again_and_never_installed() {
    for (case, (at, unreadable)) in
        [(100, false), (4096 + 70_000, false), (1 << 20, false), (1 << 20, true), (0, true)]
            .into_iter()
            .enumerate()
    {
        let (mut rig, _, away) = Rig::receiving(4 << 20, 2 << 20, 60 + case as u64);
        rig.kill(away);
        let name = rig.partial_file(away).expect("half of it");
        let disk = Rc::clone(&rig.machines[away].disk);
        match unreadable {
            true => disk.borrow_mut().damage(&name, at, 4096, &Rot::Unreadable),
            false => disk.borrow_mut().flip_bit(&name, at, 3),
        };
        rig.boot(config(away, 3));
        let from = rig.run_until_received(away);
        assert!(from <= at + 8 * (64 << 10), "from {from}, rotten at {at}");
    }
    // Behind the back of a transfer that goes on: all is compared with the digest before it counts.
    let (mut rig, _, away) = Rig::receiving(4 << 20, 2 << 20, 70);
    rig.kill(away);
    rig.boot(config(away, 3));
    rig.run_until("it goes on", |rig| rig.receives(away) > Some(2 << 20));
    let name = rig.partial_file(away).expect("half of it");
    rig.machines[away].disk.borrow_mut().flip_bit(&name, 1 << 20, 3);
    rig.run_until("it begins anew", |rig| rig.receives(away).is_some_and(|bytes| bytes < 1 << 20));
    rig.run_until_received(away);
}

/// A file of the right name holds another snapshot, whole and right in itself.
#[test]
fn a_whole_snapshot_under_the_name_of_another_one_is_not_taken_for_it() {
    let (mut rig, leader) = Rig::with_ballast(3, 1 << 20, 80);
    let away = (leader + 1) % 3;
    let end = rig.commit_some(leader, 5);
    rig.run_until_equal(end);
    rig.snapshot(away);
    rig.kill(away);
    rig.commit_some(leader, 5);
    rig.snapshot(leader);
    rig.boot(config(away, 3));
    rig.run_until("half of it is there", |rig| rig.receives(away) >= Some(1 << 19));
    rig.kill(away);
    let partial = rig.partial_file(away).expect("half of it");
    let whole = rig.snapshot_files(away).into_iter().find(|name| name.ends_with(".snap")).expect("its own");
    let mut disk = SimDisk::new(&rig.machines[away].disk);
    disk.submit(DiskOpId(1), DiskOp::Rename { from: whole, to: partial });
    rig.run_for(SECOND);
    let mut done = Vec::new();
    disk.poll(&mut done);
    assert!(matches!(done[..], [DiskDone { result: Ok(_), .. }]));
    rig.boot(config(away, 3));
    assert_eq!(rig.run_until_received(away), 64 << 10, "from its beginning");
}

/// Killed and cut off from power again and again, at any moment, until it has got all of it.
#[test]
fn a_transfer_that_is_interrupted_again_and_again_goes_forward_and_ends_right() {
    let (mut went_on, mut began_anew) = (0, 0);
    for seed in 0..8 {
        let mut rng = Rng::new(seed);
        let (mut rig, _, away) = Rig::receiving(3 << 20, 100 << 10, 90 + seed);
        let mut crashes = 0;
        while rig.counter(away).restored == 0 && crashes < 12 {
            for _ in 0..rng.below(250) {
                rig.step();
            }
            if rig.counter(away).restored > 0 {
                break;
            }
            let before = rig.receives(away).unwrap_or(0);
            crashes += 1;
            rig.crash(away, if rng.below(2) == 0 { Crash::PowerCut } else { Crash::Kill });
            rig.boot(config(away, 3));
            rig.run_until("it goes on", |rig| rig.receives(away) > Some(0) || rig.counter(away).restored > 0);
            match rig.receives(away) {
                Some(at) if at > 128 << 10 => went_on += 1,
                Some(_) if before > 256 << 10 => began_anew += 1,
                _ => {}
            }
        }
        rig.run_until("installed", |rig| rig.counter(away).restored > 0);
        let leader = rig.run_until_led();
        let end = rig.commit_some(leader, 2);
        rig.run_until_equal(end);
        rig.run_for(SECOND);
        assert_eq!(rig.partial_file(away), None);
    }
    println!("{went_on} times it went on, {began_anew} times it began anew");
    assert!(went_on > 15 && began_anew > 0, "{went_on} times it went on, {began_anew} times it began anew");
}

// ---- A transfer whose sender or receiver has forgotten something

/// A failed read ended the transfer for the leader. The next offer was of the same bytes, and the receiver, which had asked for
/// them already, asked for nothing.
#[test]
fn a_transfer_goes_on_when_the_leader_could_not_read_a_piece_once() {
    use ringraft_tests::sim::disk::{Fault, On, Scheduled};
    for skip in 0..8 {
        let (mut rig, leader, away) = Rig::receiving(4 << 20, 1 << 20, 110 + skip);
        let struck = rig.machines[leader].disk.borrow().faults_struck();
        rig.machines[leader].disk.borrow_mut().faults_mut().scheduled.push(Scheduled {
            on: On::Read,
            skip,
            fault: Fault::Io,
        });
        rig.run_until("a read fails", |rig| rig.machines[leader].disk.borrow().faults_struck() > struck);
        let at = rig.receives(away).expect("on its way");
        rig.run_until("installed", |rig| {
            assert!(rig.receives(away).is_none_or(|bytes| bytes >= at), "it does not begin anew");
            rig.counter(away).restored == 1
        });
        assert_eq!(rig.leader(), Some(leader));
        assert!(rig.status(leader).snapshot.last.is_some(), "it was right");
    }
}

/// The receiver stood still for longer than an election time-out: its leader stepped down, and leads again, in the same
/// session, without knowing what it had been asked for.
#[test]
fn a_transfer_goes_on_when_the_leader_was_deposed_and_leads_again_in_the_same_session() {
    for case in 0..6 {
        let (mut rig, leader, away) = Rig::receiving(4 << 20, (1 << 20) + case * (100 << 10), 120 + case);
        rig.kill(3 - leader - away);
        rig.still = Some(away);
        rig.run_until("it steps down", |rig| rig.status(leader).role != Role::Leader);
        rig.still = None;
        let at = rig.receives(away).expect("the session goes on");
        rig.run_until("installed", |rig| {
            assert!(rig.receives(away).is_none_or(|bytes| bytes >= at), "in the same session");
            rig.counter(away).restored == 1
        });
        let end = rig.commit_some(leader, 2);
        rig.run_until_equal(end);
    }
}

impl Rig {
    /// A follower that has lost its state, while nobody's log has more, and is being sent a snapshot that all have.
    fn fetching(ballast: usize, arrived: u64, seed: u64) -> (Self, usize, usize) {
        let (mut rig, leader) = Rig::with_ballast(3, ballast, seed);
        let away = (leader + 1) % 3;
        let end = rig.commit_some(leader, 5);
        rig.run_until_equal(end);
        (0..3).for_each(|node| {
            rig.snapshot(node);
        });
        rig.shutdown(away);
        rig.run_until_ended(away);
        for name in rig.snapshot_files(away) {
            rig.machines[away].disk.borrow_mut().damage(&name, 8192, 4096, &Rot::Unreadable);
        }
        rig.boot(config(away, 3));
        rig.run_until("enough is there", |rig| rig.receives(away) >= Some(arrived));
        (rig, leader, away)
    }
}

/// The leader that it had asked was deposed and sent nothing more, and the next one was not asked while that was waited for.
#[test]
fn a_node_without_state_asks_the_next_leader_when_the_one_that_sent_it_stops() {
    let (mut rig, leader, away) = Rig::fetching(4 << 20, 1 << 20, 130);
    let next = 3 - leader - away;
    assert_eq!(rig.transfer(leader, Some(next)), Ok(next));
    assert!(rig.status(away).snapshot.state_lost && rig.counter(away).restored == 0);
    rig.run_until("it has it again", |rig| !rig.status(away).snapshot.state_lost);
    let end = rig.commit_some(next, 2);
    rig.run_until_equal(end);
    assert_eq!(rig.counter(away).restored, 1);
}

/// The bytes of a snapshot were right when it was published; what they are when they are sent, nobody looked at. The receiver
/// refused the whole, and was sent the same again.
#[test]
fn a_snapshot_that_rots_at_the_leader_is_replaced_by_another_one() {
    for (case, (fetches, unreadable)) in
        [(false, false), (false, true), (true, false), (true, true)].into_iter().enumerate()
    {
        let seed = 140 + case as u64;
        let (mut rig, leader, away) = match fetches {
            true => Rig::fetching(1 << 20, 0, seed),
            false => Rig::receiving(1 << 20, 0, seed),
        };
        let names = rig.snapshot_files(leader);
        let name = names.iter().max().expect("one");
        let disk = Rc::clone(&rig.machines[leader].disk);
        match unreadable {
            true => disk.borrow_mut().damage(name, 900_000, 4096, &Rot::Unreadable),
            false => disk.borrow_mut().flip_bit(name, 900_000, 3),
        }
        let (mut transfers, mut was_on_its_way) = (1, true);
        let deadline = rig.context.now() + 30 * SECOND;
        while rig.counter(away).restored == 0 {
            rig.step();
            let is_on_its_way = rig.receives(away).is_some();
            transfers += u64::from(is_on_its_way && !was_on_its_way);
            was_on_its_way = is_on_its_way;
            assert!(rig.context.now() < deadline, "it is never installed: {transfers} transfers");
        }
        assert!(transfers <= 2, "{transfers} transfers");
        let end = rig.commit_some(leader, 2);
        rig.run_until_equal(end);
        // What took its place is right.
        rig.crash(leader, Crash::Kill);
        rig.boot(config(leader, 3));
        rig.run_until("it starts", |rig| rig.status(leader).applied > LogIndex(0));
        assert_eq!(rig.counter(leader).restored, 1);
        rig.run_until_equal(end);
    }
}

/// What a picture of the state costs is the machine's affair. It was asked for one each second, to find that there was no place.
#[test]
fn a_machine_is_not_asked_for_pictures_that_the_disk_has_no_space_for() {
    let (mut rig, leader) = Rig::with_ballast(1, 300_000, 160);
    rig.commit_some(leader, 3);
    rig.run_for(2 * SECOND);
    rig.machines[0].disk.borrow_mut().faults_mut().no_space = true;
    for asked in 1..=2 {
        let request = rig.process(0).handle.snapshot();
        rig.process(0).wake_at = 0;
        rig.run_for(60 * SECOND);
        assert!(request.wait().is_err(), "whoever asks is told");
        assert_eq!(rig.counter(0).pictures, 1, "after {asked} min");
    }
    rig.machines[0].disk.borrow_mut().faults_mut().no_space = false;
    let last = rig.status(0).applied;
    rig.run_until("taken at last", |rig| rig.status(0).snapshot.last == Some(last));
    assert_eq!(rig.counter(0).pictures, 2);
    // The next one is taken as before.
    rig.commit_some(0, 1);
    rig.snapshot(0);
    assert_eq!((rig.counter(0).pictures, rig.snapshot_files(0).len()), (3, 2));
}

/// Rot in every part of the newest file, header to trailer.
#[test]
fn a_damaged_snapshot_gives_way_to_the_one_before_if_the_log_still_reaches() {
    for part in 0..5 {
        let mut rig = Rig::seeded(1, 10 + part);
        rig.ballast = 200_000;
        let keeps = || Config { log_retention_bytes: 1 << 30, ..config(0, 1) };
        rig.boot(keeps());
        rig.run_until_led();
        rig.commit_some(0, 5);
        let take = |rig: &mut Rig| {
            let applied = rig.status(0).applied;
            let request = rig.process(0).handle.snapshot();
            rig.process(0).wake_at = 0;
            rig.run_until("taken", |rig| rig.status(0).snapshot.last >= Some(applied));
            request.wait().expect("taken").last
        };
        let older = take(&mut rig);
        rig.commit_some(0, 5);
        let newer = take(&mut rig);
        let bytes = rig.status(0).snapshot.bytes;
        let end = rig.commit_some(0, 5);
        let state = rig.state(0);
        rig.shutdown(0);
        rig.run_until_ended(0);
        let files = rig.snapshot_files(0);
        assert_eq!(files.len(), 2);
        let newest = files.last().expect("two");
        let at = [16, 4096 + 5, 100_000, bytes - 8192 + 40, bytes - 4096 + 30][part as usize];
        rig.machines[0].disk.borrow_mut().flip_bit(newest, at, 2);
        rig.boot(keeps());
        rig.run_until_led();
        rig.run_until("it has applied all", |rig| rig.status(0).applied >= end);
        assert_eq!((rig.state(0), rig.counter(0).restored), (state, 1));
        assert_eq!(rig.status(0).snapshot.last, Some(older), "not the one that ends at {newer}");
        // The next one takes its place.
        rig.commit_some(0, 1);
        take(&mut rig);
        rig.run_for(SECOND);
        assert!(rig.snapshot_files(0).len() == 2 && !rig.snapshot_files(0).contains(newest));
    }
}

/// It counted as damaged: the node took its state from another member, and the file was removed behind the next snapshot.
#[test]
fn a_snapshot_that_a_newer_build_has_published_refuses_the_start_by_name_and_stays() {
    use ringraft_block::crc32c_append;
    // Where the header is another, and by how much; whether its checksum is right; whether the start is refused.
    type Case = (&'static [(usize, u8)], bool, bool);
    let changes: [Case; 5] = [
        (&[(4, 1)], true, true),
        (&[(4, 1)], false, false),
        // It says of itself that it is another file's, or another cluster's: that went astray.
        (&[(4, 1), (24, 1)], true, false),
        (&[(4, 1), (8, 1)], true, false),
        // Of this version, and not of this file.
        (&[(24, 1)], true, false),
    ];
    for (change, is_sealed, refuses) in changes {
        let (mut rig, leader) = Rig::with_ballast(3, 10_000, 22);
        let newer = (leader + 1) % 3;
        let end = rig.commit_some(leader, 5);
        rig.run_until_equal(end);
        rig.snapshot(newer);
        rig.shutdown(newer);
        rig.run_until_ended(newer);
        let names = rig.snapshot_files(newer);
        let [name] = &names[..] else { panic!("{names:?}") };
        let disk = Rc::clone(&rig.machines[newer].disk);
        let before = disk.borrow().content(name).expect("readable");
        let mut header = before[..128].to_vec();
        change.iter().for_each(|(at, by)| header[*at] += by);
        if is_sealed {
            let crc = crc32c_append(0, &header[..124]);
            header[124..].copy_from_slice(&crc.to_le_bytes());
        }
        disk.borrow_mut().damage(name, 0, 128, &Rot::Content(header.clone()));
        rig.boot(config(newer, 3));
        if refuses {
            let ended = rig.run_until_ended(newer);
            let told = ended.stopped.expect("it says why");
            let StopError::SnapshotForeign { file, .. } = told.error() else { panic!("{told}") };
            assert!(file == name && told.to_string().contains("use the build that wrote it"), "{told}");
            let after = disk.borrow().content(name).expect("readable");
            assert!(after[..128] == header && after[128..] == before[128..], "nothing has changed in it");
            // The build that wrote it finds it whole.
            disk.borrow_mut().damage(name, 0, 128, &Rot::Content(before[..128].to_vec()));
            rig.boot(config(newer, 3));
            rig.run_until("it has restored it", |rig| rig.counter(newer).restored == 1);
            assert!(!rig.status(newer).snapshot.state_lost);
        } else {
            rig.run_until("it says so", |rig| rig.status(newer).snapshot.state_lost);
        }
        let leader = rig.run_until_led();
        let end = rig.commit_some(leader, 2);
        rig.run_until_equal(end);
    }
}

#[test]
fn a_node_whose_snapshots_are_all_damaged_fetches_the_state_from_the_leader_and_does_not_lead_before() {
    let (mut rig, leader) = Rig::with_ballast(3, 500_000, 20);
    let broken = (leader + 1) % 3;
    let end = rig.commit_some(leader, 5);
    rig.run_until_equal(end);
    rig.snapshot(broken);
    rig.commit_some(leader, 2);
    rig.shutdown(broken);
    rig.run_until_ended(broken);
    for name in rig.snapshot_files(broken) {
        let disk = &rig.machines[broken].disk;
        disk.borrow_mut().damage(&name, 8192, 4096, &Rot::Unreadable);
    }
    rig.boot(config(broken, 3));
    rig.run_until("it says so", |rig| rig.status(broken).snapshot.state_lost);
    assert_eq!(rig.state(broken), (0, 0));
    rig.run_until("it has it again", |rig| !rig.status(broken).snapshot.state_lost);
    let end = rig.commit_some(rig.leader().expect("it leads"), 2);
    rig.run_until_equal(end);
    assert_eq!(rig.counter(broken).restored, 1);
    // It may lead again.
    for node in (0..3).filter(|node| *node != broken) {
        rig.kill(node);
    }
    rig.boot(config(leader, 3));
    rig.run_until_led();
}

#[test]
fn a_batch_that_the_others_have_purged_comes_back_in_a_snapshot() {
    let (mut rig, leader) = Rig::with_ballast(3, 0, 21);
    let (broken, other) = ((leader + 1) % 3, (leader + 2) % 3);
    rig.commit_some(leader, 3);
    // Longer than all others, so that it is found on the disk.
    let bytes = 1_777;
    let lost = rig.commit(leader, bytes);
    let end = rig.commit_some(leader, 5);
    rig.run_until_equal(end);
    rig.crash(broken, Crash::Kill);
    for node in [leader, other] {
        assert_eq!(rig.snapshot(node), end);
    }
    rot_command(&rig, broken, bytes);
    rig.boot(config(broken, 3));
    // Its log reaches the leader's, so that nothing but this batch is missing, and it acknowledges nothing behind that.
    rig.run_until("it is whole again", |rig| rig.log_start(broken) >= end);
    assert_eq!((rig.status(broken).damage.batches, rig.status(broken).damage.repaired), (0, 0));
    assert_eq!(rig.counter(broken).restored, 1);
    let end = rig.commit_some(leader, 2);
    rig.run_until_equal(end);
    assert!(end > lost);
    // What it acknowledges counts again.
    rig.kill(other);
    rig.commit_some(leader, 2);
}

/// What it lacks it had applied long before it rotted: no snapshot of others has anything for it, and none of them can give that
/// batch. It was asked for as long as the node ran, and the node did not lead.
#[test]
fn a_batch_that_rots_after_it_was_applied_and_that_the_others_have_purged_is_left_behind_a_snapshot() {
    for (seed, of_leader) in [(22, false), (23, true)] {
        let (mut rig, leader) = Rig::with_ballast(3, 0, seed);
        let broken = if of_leader { leader } else { (leader + 1) % 3 };
        rig.commit_some(leader, 3);
        let bytes = 1_777;
        let lost = rig.commit(leader, bytes);
        rig.commit_some(leader, 5);
        // The scrubber reads what is closed, as by a restart.
        (0..3).for_each(|node| rig.crash(node, Crash::Kill));
        rig.boot_all();
        let mut leader = rig.run_until_led();
        if of_leader != (leader == broken) {
            let to = if of_leader { broken } else { (broken + 1) % 3 };
            assert_eq!(rig.transfer(leader, Some(to)), Ok(to));
            leader = to;
        }
        let end = rig.commit_some(leader, 2);
        rig.run_until_equal(end);
        let others = (0..3).filter(|node| *node != broken);
        for node in others {
            assert_eq!(rig.snapshot(node), end);
        }
        rot_command(&rig, broken, bytes);
        rig.run_until("found", |rig| rig.status(broken).damage.batches == 1);
        rig.run_until("left behind", |rig| rig.log_start(broken) >= lost);
        let status = rig.status(broken);
        assert_eq!((status.damage.batches, status.damage.repaired), (0, 0));
        assert_eq!(rig.counter(broken).restored, 0, "its own state is in order");
        // It leads.
        let leader = rig.run_until_led();
        if leader != broken {
            assert_eq!(rig.transfer(leader, Some(broken)), Ok(broken));
        }
        let end = rig.commit_some(broken, 2);
        rig.run_until_equal(end);
    }
}

/// Flips a bit in the slot, of a node that is down, that holds a command of so many bytes at least.
fn rot_command(rig: &Rig, node: usize, bytes: usize) {
    let mut disk = rig.machines[node].disk.borrow_mut();
    let place = disk.listing().into_iter().find_map(|entry| {
        let content = disk.content(&entry.name).filter(|_| entry.name.starts_with("segment"))?;
        let at = content.windows(bytes).position(|run| run.iter().all(|byte| *byte == 7))?;
        Some((entry.name, at as u64))
    });
    let (name, at) = place.expect("it is there");
    disk.flip_bit(&name, at + 9, 3);
}

/// A query that is asked for again and again, each time when the last one was answered.
struct Asking {
    consistency: Consistency,
    read: Option<Read<QueryReply>>,
    answers: Vec<Result<QueryReply, ReadError>>,
}

impl Asking {
    fn new(consistency: Consistency) -> Self {
        Self { consistency, read: None, answers: Vec::new() }
    }

    fn go_on(&mut self, rig: &mut Rig, node: usize) {
        let process = rig.process(node);
        let read = self.read.get_or_insert_with(|| {
            process.wake_at = 0;
            process.handle.query("?", self.consistency)
        });
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        if let Poll::Ready(answer) = pin!(read).poll(&mut context) {
            self.read = None;
            self.answers.push(answer);
        }
    }
}

const ANY_AGE: Consistency = Consistency::Stale { age_max: Duration::from_secs(60), lag_max: u64::MAX };

/// The log of a follower starts where the snapshot ends that it was given, and nothing has come since. When that file rots,
/// all that is left is a number: the same that the leader names to a read.
#[test]
fn a_node_that_has_lost_its_state_answers_no_read_before_it_has_it_again() {
    let (mut rig, leader) = Rig::with_ballast(3, 4 << 20, 21);
    let broken = (leader + 1) % 3;
    rig.kill(broken);
    rig.commit_some(leader, 20);
    let end = rig.snapshot(leader);
    rig.boot(config(broken, 3));
    rig.run_until_equal(end);
    let state = rig.state(broken);
    assert_eq!((rig.counter(broken).restored, rig.log_start(broken), rig.status(broken).last), (1, end, end));
    rig.shutdown(broken);
    rig.run_until_ended(broken);
    for name in rig.snapshot_files(broken) {
        let disk = &rig.machines[broken].disk;
        disk.borrow_mut().damage(&name, 8192, 4096, &Rot::Unreadable);
    }
    rig.boot(config(broken, 3));
    rig.run_until("it says so", |rig| rig.status(broken).snapshot.state_lost);
    let mut linearizable = Asking::new(Consistency::Linearizable);
    let mut stale = Asking::new(ANY_AGE);
    let applied = rig.called(broken).wait_applied(end, None);
    let mut applied = pin!(applied);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    while rig.counter(broken).restored == 0 {
        linearizable.go_on(&mut rig, broken);
        stale.go_on(&mut rig, broken);
        assert!(applied.as_mut().poll(&mut context).is_pending(), "nothing is applied");
        assert_eq!(rig.status(broken).applied, LogIndex(0), "of a state that is not here");
        rig.step();
    }
    // At first no leader is known.
    let unanswered = |answer: &Result<QueryReply, ReadError>| {
        matches!(answer, Err(ReadError::NoLeader | ReadError::LeaderUnreachable | ReadError::TimedOut))
    };
    assert!(linearizable.answers.iter().all(unanswered), "{:?}", linearizable.answers);
    assert!(linearizable.read.is_some(), "it waits");
    assert!(stale.answers.iter().all(|answer| *answer == Err(ReadError::Restoring)), "{:?}", stale.answers);
    assert!(stale.answers.len() > 10);
    let answered = linearizable.answers.len();
    while linearizable.answers.len() == answered {
        linearizable.go_on(&mut rig, broken);
        rig.step();
    }
    let answer = linearizable.answers.pop().expect("an answer").expect("it waited for the state");
    assert_eq!((answer.applied, &answer.reply[1..]), (end, &state.0.to_le_bytes()[..]));
    assert_eq!((rig.status(broken).applied, rig.state(broken)), (end, state));
    rig.run_for(MILLISECOND);
    assert_eq!(applied.as_mut().poll(&mut context), Poll::Ready(Ok(end)));
}

/// The machine asserts that nothing is asked of it between the begin and the end of what it is given.
#[test]
fn a_machine_whose_state_is_being_replaced_is_asked_nothing_however_old_the_answer_may_be() {
    let (mut rig, leader) = Rig::with_ballast(3, 2 << 20, 22);
    let away = (leader + 1) % 3;
    let end = rig.commit_some(leader, 3);
    rig.run_until_equal(end);
    for node in [leader, (leader + 2) % 3] {
        rig.fabric.borrow_mut().cut(node, away);
        rig.fabric.borrow_mut().cut(away, node);
    }
    // What was sent in a session that goes on would arrive.
    rig.run_until("the session has ended", |rig| {
        let peers = rig.status(leader).peers;
        peers.iter().any(|peer| peer.id == NodeId(away as u64 + 1) && !peer.connected)
    });
    rig.commit_some(leader, 20);
    rig.snapshot(leader);
    rig.fabric.borrow_mut().heal_all();
    // Not while it connects: a query after the other lets no time pass.
    rig.run_until("it is on its way", |rig| rig.receives(away).is_some());
    let mut stale = Asking::new(ANY_AGE);
    while rig.counter(away).restored == 0 {
        stale.go_on(&mut rig, away);
        rig.step();
    }
    let refused = stale.answers.iter().filter(|answer| **answer == Err(ReadError::Restoring)).count();
    let told: Vec<u64> = stale.answers.iter().flatten().map(|reply| reply.applied.get()).collect();
    assert!(refused > 10, "{refused} refused, {} answered", told.len());
    assert!(told.iter().all(|applied| *applied == end.get()), "{told:?}");
}

/// A member whose clock is an hour behind is given a snapshot, and leads before it has read it: its log holds nothing that
/// tells the time. Disks that read slowly leave it the time for that.
#[test]
fn the_logs_clock_does_not_go_back_when_a_node_leads_that_is_still_restoring_its_state() {
    let mut rig = Rig::seeded(3, 23);
    rig.ballast = 4 << 20;
    for node in 0..3 {
        let slow = DiskConfig { read: 3 * MILLISECOND, ..DiskConfig::default() };
        rig.machines[node].disk = DiskState::new(&rig.context, node, Rng::new(node as u64), slow);
        rig.machines[node].wall_ahead_ms = 3_600_000;
    }
    let quick = |node: usize| Config {
        election_timeout: Duration::from_millis(30),
        heartbeat_interval: Duration::from_millis(3),
        ..config(node, 3)
    };
    (0..3).for_each(|node| rig.boot(quick(node)));
    let leader = rig.run_until_led();
    let (away, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let end = rig.commit_some(leader, 3);
    rig.kill(other);
    // It campaigns after the one that is to lead.
    rig.boot(Config { election_priority: Some(0), ..quick(other) });
    rig.run_until("it is back", |rig| rig.status(other).applied >= end);
    rig.kill(away);
    rig.commit_some(leader, 20);
    let time_ms = rig.process(leader).driver.wal().batches().map(|info| info.time_ms).max().expect("some");
    rig.snapshot(leader);
    rig.machines[away].wall_ahead_ms = 0;
    rig.boot(quick(away));
    rig.run_until("the state is being read", |rig| rig.status(away).snapshot.restoring);
    rig.kill(leader);
    rig.run_until("it leads", |rig| rig.status(away).role == Role::Leader);
    assert_eq!(rig.counter(away).restored, 0, "without a state");
    rig.run_until("it has the state", |rig| rig.counter(away).restored == 1);
    let leader = rig.run_until_led();
    let end = rig.commit_some(leader, 3);
    rig.run_until_equal(end);
    for node in [away, other] {
        let times = rig.process(node).driver.wal().batches().map(|info| info.time_ms);
        let times: Vec<u64> = times.collect();
        assert!(times.is_sorted(), "{times:?}");
        assert!(node == other || times.iter().all(|time| *time >= time_ms), "{time_ms}: {times:?}");
    }
}

/// The log, its files and the snapshots stay within bounds while commands come without end, on all nodes.
#[test]
fn the_log_is_bounded_under_constant_load() {
    let mut rig = Rig::seeded(3, 30);
    rig.ballast = 100_000;
    for node in 0..3 {
        rig.boot(Config { snapshot_log_bytes: 2 << 20, log_retention_bytes: 1 << 20, ..config(node, 3) });
    }
    let leader = rig.run_until_led();
    let (mut done, mut tag, mut segments_max, mut bytes_max) = (0, 0, 0, 0);
    while done < 4_000 {
        while tag < done + 16 {
            rig.propose(leader, tag, 8_000);
            tag += 1;
        }
        rig.step();
        for completion in rig.completed(leader) {
            completion.outcome.expect("committed");
            done += 1;
        }
        if done > 2_000 {
            for node in 0..3 {
                let stats = rig.machines[node].process.as_ref().expect("it runs").driver.wal().stats();
                segments_max = segments_max.max(stats.segments);
                let files = rig.machines[node].disk.borrow().listing();
                bytes_max = bytes_max.max(files.iter().map(|entry| entry.bytes).sum::<u64>());
            }
        }
    }
    rig.run_for(SECOND);
    let end = rig.status(leader).commit;
    rig.run_until_equal(end);
    let stats = rig.process(leader).driver.wal().stats();
    println!(
        "{} MiB written, at most {segments_max} segments and {} MiB on a disk",
        stats.written_bytes >> 20,
        bytes_max >> 20
    );
    println!(
        "{} segments made, {} recycled, {} removed",
        stats.segments_made, stats.segments_recycled, stats.segments_removed
    );
    assert!(stats.written_bytes > 30 << 20 && segments_max <= 8 && bytes_max < 24 << 20);
    assert!(stats.segments_recycled > 10, "in steady state segments are used again: {stats:?}");
    assert_eq!(rig.counter(leader).restored, 0);
    assert!((0..3).all(|node| rig.status(node).snapshot.installs.is_empty()), "nobody falls behind");
}

/// No space, an error, or a short write at any operation of a snapshot: it comes to nothing, and commits go on.
#[test]
fn a_snapshot_that_the_disk_refuses_is_given_up_and_taken_later() {
    use ringraft_tests::sim::disk::{Fault, On, Scheduled};
    for fault in [Fault::Io, Fault::NoSpace, Fault::Short] {
        let mut failed = 0;
        for skip in 0..14 {
            let (mut rig, leader) = Rig::with_ballast(1, 300_000, 40 + skip);
            rig.commit_some(leader, 3);
            rig.run_for(2 * SECOND);
            let request = rig.process(leader).handle.snapshot();
            rig.process(leader).wake_at = 0;
            rig.machines[0].disk.borrow_mut().faults_mut().scheduled.push(Scheduled {
                on: On::Any,
                skip,
                fault,
            });
            rig.run_for(SECOND / 2);
            rig.machines[0].disk.borrow_mut().faults_mut().scheduled.clear();
            if rig.machines[0].process.is_none() {
                // The log's own operations were struck.
                continue;
            }
            failed += u64::from(rig.status(0).snapshot.last.is_none());
            rig.commit_some(0, 2);
            rig.run_until("taken at last", |rig| rig.status(0).snapshot.last.is_some());
            drop(request);
            let (state, end) = (rig.state(0), rig.status(0).applied);
            rig.crash(0, Crash::PowerCut);
            rig.boot_all();
            rig.run_until("it has applied all", |rig| rig.status(0).applied >= end);
            assert_eq!(rig.state(0), state);
        }
        println!("{fault:?}: {failed} snapshots failed");
        assert!(failed > 0, "{fault:?} struck nothing");
    }
}

/// A node alone takes snapshots and loses power at some moment; then it must come back with all that was committed.
fn survives_a_power_cut(seed: u64) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let (mut rig, _) = Rig::with_ballast(1, 100_000, 1_000 + seed);
    let mut end = LogIndex(0);
    for _ in 0..3 {
        end = rig.commit_some(0, 1 + rng.below(4) as usize);
        let request = rig.process(0).handle.snapshot();
        rig.process(0).wake_at = 0;
        drop(request);
        for _ in 0..rng.below(60) {
            rig.step();
        }
    }
    rig.crash(0, Crash::PowerCut);
    rig.boot_all();
    let deadline = rig.context.now() + 20 * SECOND;
    while rig.machines[0].process.is_some() && rig.status(0).applied < end {
        rig.step();
        if rig.context.now() > deadline {
            return Err(format!("it does not come back: {:?}", rig.status(0)));
        }
    }
    match &rig.machines[0].ended {
        Some(status) => Err(format!("it stopped: {:?}", status.stopped)),
        None => Ok(()),
    }
}

/// One of three restarts, alone, with what its snapshot says of the others.
fn a_minority_does_not_lead(seed: u64) -> Result<(), String> {
    let (mut rig, leader) = Rig::with_ballast(3, 10_000, 2_000 + seed);
    let end = rig.commit_some(leader, 3);
    rig.run_until_equal(end);
    let alone = seed as usize % 3;
    rig.snapshot(alone);
    (0..3).for_each(|node| rig.crash(node, Crash::PowerCut));
    rig.boot(config(alone, 3));
    rig.run_for(5 * SECOND);
    match rig.leader() {
        Some(_) => Err("one of three leads alone".to_owned()),
        None => Ok(()),
    }
}

#[test]
fn a_power_cut_while_snapshots_are_taken_loses_nothing_and_known_bugs_are_caught_by_it() {
    for seed in 0..60 {
        if let Err(wrong) = survives_a_power_cut(seed).and_then(|()| a_minority_does_not_lead(seed)) {
            panic!("seed {seed}: {wrong}");
        }
    }
    for mutant in [Mutant::PurgeBeforeSnapshotDurable, Mutant::SnapshotForgetsConfiguration] {
        mutants::set(Some(mutant));
        let found = (0..60).find_map(|seed| {
            let wrong = survives_a_power_cut(seed).and_then(|()| a_minority_does_not_lead(seed)).err()?;
            Some((seed, wrong))
        });
        mutants::set(None);
        println!(
            "{mutant:?}: {:?}",
            found.as_ref().map(|(seed, wrong)| (seed, &wrong[..wrong.len().min(120)]))
        );
        assert!(found.is_some(), "{mutant:?} was not noticed");
    }
}
