//! A leader whose disk is slow, for longer than it takes to elect another one.

use super::*;
use ringraft::error::ReadError;
use ringraft::reads::Consistency;
use std::future::Future;
use std::pin::pin;
use std::task::{Poll, Waker};
use std::time::Duration;

/// Disks that make nothing durable for `span` from now on.
fn stall(rig: &Rig, nodes: &[usize], span: Time) {
    for node in nodes {
        let until = rig.context.now() + span;
        rig.machines[*node].disk.borrow_mut().faults_mut().stalled_until = until;
    }
}

/// A disk that is slow for long is not taken for one that does not answer.
fn patient(node: usize) -> Config {
    Config { disk_stall_timeout: Some(Duration::from_secs(20)), ..config(node, 3) }
}

/// A batch that the leader's own log has no room for yet kept everything else from leaving to every peer: the leader answered
/// no read, was not heard, and lost its office.
#[test]
fn a_leader_whose_log_has_no_room_is_heard_and_read_from() {
    let mut rig = Rig::new(3);
    (0..3).for_each(|node| rig.boot(Config { writes_in_flight_max: 1, ..patient(node) }));
    let leader = rig.run_until_led();
    rig.commit(leader, 100);
    let (term, timeout) = (rig.status(leader).term, config(0, 3).election_timeout.as_nanos() as Time);
    stall(&rig, &[leader], 4 * timeout);
    // The write that the log has under way at a time; the followers have it.
    rig.commit(leader, 100);
    let process = rig.process(leader);
    process.wake_at = 0;
    let barrier = process.handle.barrier();
    rig.run_for(MILLISECOND);
    let last = rig.status(leader).last;
    assert!((0..3).filter(|node| *node != leader).all(|node| rig.status(node).last < last), "it waits");
    let begun = rig.context.now();
    let process = rig.process(leader);
    process.wake_at = 0;
    let mut round = pin!(process.handle.force_round());
    rig.run_for(20 * MILLISECOND);
    let answered = round.as_mut().poll(&mut std::task::Context::from_waker(Waker::noop()));
    assert!(matches!(answered, Poll::Ready(Ok(_))), "a majority has answered: {answered:?}");
    rig.run_for(3 * timeout);
    assert_eq!((rig.leader(), rig.status(leader).term), (Some(leader), term));
    for node in (0..3).filter(|node| *node != leader) {
        assert_eq!(rig.status(node).leader.map(|leader| leader.id), Some(NodeId(leader as u64 + 1)));
    }
    assert!(rig.context.now() < begun + 4 * timeout - 100 * MILLISECOND, "the disk is still slow");
    rig.run_until("the barrier is applied", |rig| rig.status(leader).applied >= last);
    assert_eq!(barrier.wait().map(|point| point.index), Ok(last));
}

/// A leader that has committed nothing in its term cannot say what is committed: its reads wait, and time out. The core is to
/// forget them too.
#[test]
fn reads_that_time_out_before_a_new_leader_knows_what_is_committed_leave_nothing_behind() {
    let mut rig = Rig::new(3);
    let read_timeout = Duration::from_millis(100);
    (0..3).for_each(|node| rig.boot(Config { read_timeout, ..patient(node) }));
    rig.run_until("a leader", |rig| (0..3).any(|node| rig.status(node).role == Role::Leader));
    let leader = (0..3).find(|node| rig.status(*node).role == Role::Leader).expect("a leader");
    stall(&rig, &[0, 1, 2], 2 * SECOND);
    let waiting = |rig: &Rig| {
        let process = rig.machines[leader].process.as_ref();
        process.and_then(|process| process.driver.raft()).map_or(0, |raft| raft.reads_waiting())
    };
    let mut reads = Vec::new();
    let mut most = 0;
    for _ in 0..300 {
        let process = rig.process(leader);
        process.wake_at = 0;
        reads.push(process.handle.read(Consistency::Quorum));
        rig.run_for(3 * MILLISECOND);
        most = most.max(waiting(&rig));
    }
    assert!((10..=40).contains(&most), "as many as wait at a time: {most}");
    rig.run_for(200 * MILLISECOND);
    assert_eq!(waiting(&rig), 0);
    for read in reads {
        assert_eq!(read.wait().err(), Some(ReadError::TimedOut));
    }
    rig.commit(leader, 100);
}
