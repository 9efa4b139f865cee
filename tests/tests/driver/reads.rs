//! Reads without a write, over real drivers.

use super::*;
use ringraft::config::ConfigError;
use ringraft::error::ReadError;
use ringraft::membership::{MembershipChange, NewMember};
use ringraft::reads::{Consistency, QueryReply, Read};
use std::future::Future;
use std::pin::pin;
use std::task::{Poll, Waker};

impl Rig {
    /// Lets things happen until the answer is there.
    fn answer<T>(&mut self, answer: Read<T>) -> Result<T, ReadError> {
        let mut answer = pin!(answer);
        let mut context = std::task::Context::from_waker(Waker::noop());
        for _ in 0..1_000_000 {
            if let Poll::Ready(outcome) = answer.as_mut().poll(&mut context) {
                return outcome;
            }
            self.step();
        }
        panic!("the read is never answered");
    }

    pub(super) fn called(&mut self, node: usize) -> Handle {
        let process = self.process(node);
        process.wake_at = 0;
        process.handle.clone()
    }

    pub(super) fn query(&mut self, node: usize, consistency: Consistency) -> Result<QueryReply, ReadError> {
        let answer = self.called(node).query("?", consistency);
        self.answer(answer)
    }
}

fn counted(reply: &QueryReply) -> u64 {
    assert_eq!(reply.reply[0], b'?', "the machine was asked what the program asked");
    u64::from_le_bytes(reply.reply[1..].try_into().expect("eight bytes"))
}

#[test]
fn a_query_sees_every_command_that_was_acknowledged_before_on_the_leader_and_on_followers() {
    let (mut rig, leader) = Rig::started(3);
    for count in 1..=5 {
        let index = rig.commit(leader, 100);
        for node in 0..3 {
            for consistency in [Consistency::Linearizable, Consistency::Quorum] {
                let reply = rig.query(node, consistency).expect("answered");
                assert!(reply.applied >= index);
                assert_eq!(counted(&reply), count, "on {node}, {consistency:?}");
            }
            let handle = rig.called(node);
            let point = rig.answer(handle.read(Consistency::Linearizable)).expect("answered");
            assert!(point.index >= index && rig.status(node).applied >= point.index);
        }
    }
}

#[test]
fn a_read_is_work_for_whoever_asks_and_for_the_leader() {
    let (mut rig, leader) = Rig::started(3);
    rig.commit(leader, 100);
    for asked in 0..3 {
        for consistency in [Consistency::Linearizable, Consistency::Quorum] {
            rig.run_for(SECOND);
            let before = rig.turns_worked();
            rig.query(asked, consistency).expect("answered");
            let after = rig.turns_worked();
            assert!(
                after[asked] > before[asked] && after[leader] > before[leader],
                "{asked}: {before:?}, {after:?}"
            );
        }
    }
}

impl Rig {
    fn isolate(&mut self, node: usize) {
        let mut fabric = self.fabric.borrow_mut();
        for other in (0..self.machines.len()).filter(|other| *other != node) {
            fabric.cut(node, other);
            fabric.cut(other, node);
        }
    }

    /// A cluster whose leaders have leases.
    fn leased(nodes: usize) -> (Self, usize) {
        let mut rig = Self::new(nodes);
        for node in 0..nodes {
            rig.boot(Config { lease_drift_ppm: Some(200), ..config(node, nodes) });
        }
        let leader = rig.run_until_led();
        (rig, leader)
    }

    /// Another one than `old` leads and has committed a command.
    fn commit_behind_the_back_of(&mut self, old: usize) -> usize {
        let leads = |rig: &Self, node: usize| {
            let process = rig.machines[node].process.as_ref();
            process.and_then(|process| process.driver.raft()).is_some_and(|raft| raft.can_accept_proposals())
        };
        self.run_until("another leader", |rig| (0..3).any(|node| node != old && leads(rig, node)));
        let new = (0..3).find(|node| *node != old && leads(self, *node)).expect("another leader");
        self.commit(new, 100);
        new
    }
}

fn leader_named<T: std::fmt::Debug>(outcome: Result<T, ReadError>) -> NodeId {
    match outcome {
        Err(ReadError::NotLeader { leader: Some(leader) }) => leader.id,
        other => panic!("{other:?}"),
    }
}

// ---- R1: the ways to read

#[test]
fn a_read_through_the_log_commits_an_entry_without_a_command_and_only_the_leader_can() {
    let (mut rig, leader) = Rig::started(3);
    let index = rig.commit(leader, 100);
    let follower = (leader + 1) % 3;
    for expected in [index.next(), index.next().next()] {
        let handle = rig.called(leader);
        let (one, other) = (handle.barrier(), handle.query("?", Consistency::Log));
        assert_eq!(rig.answer(one).expect("answered").index, expected);
        let reply = rig.answer(other).expect("answered");
        assert_eq!((reply.applied, counted(&reply)), (expected, 1), "one entry for both, and no command");
    }
    rig.run_until("all apply them", |rig| {
        (0..3).all(|node| rig.status(node).applied.get() == index.get() + 2)
    });
    let outcome = rig.query(follower, Consistency::Log);
    assert_eq!(leader_named(outcome), NodeId(leader as u64 + 1));
}

#[test]
fn a_leader_that_is_cut_off_answers_no_read_and_the_others_answer_with_what_they_have_committed_since() {
    let (mut rig, old) = Rig::started(3);
    rig.commit(old, 100);
    rig.isolate(old);
    let handle = rig.called(old);
    let reads = [handle.query("?", Consistency::Linearizable), handle.query("?", Consistency::Quorum)];
    let new = rig.commit_behind_the_back_of(old);
    for read in reads {
        assert_eq!(rig.answer(read), Err(ReadError::LeaderChanged));
    }
    assert_eq!(rig.query(old, Consistency::Linearizable), Err(ReadError::NoLeader));
    for node in [new, 3 - old - new] {
        rig.run_until("it follows", |rig| rig.status(node).leader.is_some());
        assert_eq!(counted(&rig.query(node, Consistency::Linearizable).expect("answered")), 2);
    }
}

#[test]
fn a_followers_read_fails_when_its_connection_to_the_leader_does_and_can_be_repeated() {
    let (mut rig, leader) = Rig::started(3);
    rig.commit(leader, 100);
    let follower = (leader + 1) % 3;
    rig.run_until("it follows", |rig| rig.status(follower).leader.is_some());
    let read = rig.called(follower).query("?", Consistency::Linearizable);
    rig.turn(follower);
    let connections = rig.fabric.borrow().connections();
    (0..connections).for_each(|position| rig.fabric.borrow_mut().break_connection(position));
    assert_eq!(rig.answer(read), Err(ReadError::LeaderUnreachable));
    for _ in 0..1_000 {
        match rig.query(follower, Consistency::Linearizable) {
            Ok(reply) => return assert_eq!(counted(&reply), 1),
            Err(error) => assert!(error.is_transient(), "{error}"),
        }
        rig.run_for(10 * MILLISECOND);
    }
    panic!("a repeated read never succeeds");
}

#[test]
fn a_stale_read_asks_nobody_and_is_refused_once_the_leader_has_been_silent_for_too_long() {
    let (mut rig, leader) = Rig::started(3);
    let index = rig.commit(leader, 100);
    let follower = (leader + 1) % 3;
    rig.run_until("it applies", |rig| rig.status(follower).applied >= index);
    let stale = |millis| Consistency::Stale { age_max: std::time::Duration::from_millis(millis), lag_max: 0 };
    rig.run_for(SECOND);
    rig.isolate(follower);
    for node in [leader, follower] {
        assert_eq!(counted(&rig.query(node, stale(200)).expect("recent")), 1, "{node}");
    }
    rig.run_for(250 * MILLISECOND);
    match rig.query(follower, stale(200)) {
        Err(ReadError::TooStale { age: Some(age), lag: 0 }) => assert!(age.as_millis() >= 250, "{age:?}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(counted(&rig.query(follower, stale(400)).expect("recent enough")), 1);
    rig.commit(leader, 100);
    rig.run_for(2 * SECOND);
    assert_eq!(
        rig.query(follower, stale(10_000)),
        Err(ReadError::TooStale { age: None, lag: 0 }),
        "no leader"
    );
    assert_eq!(counted(&rig.query(leader, stale(200)).expect("the leader hears the other follower")), 2);
}

/// Nobody can be elected without the only voter. Once there is a second one, it could be.
#[test]
fn the_only_voter_reads_what_is_fresh_whoever_is_silent_and_with_a_second_voter_it_needs_that_one() {
    let mut rig = Rig::new(2);
    rig.boot(config(0, 1));
    assert_eq!(rig.run_until_led(), 0);
    rig.boot(Config { join: true, ..config(1, 2) });
    rig.commit(0, 100);
    let stale = |millis| Consistency::Stale { age_max: std::time::Duration::from_millis(millis), lag_max: 0 };
    rig.isolate(0);
    rig.run_for(5 * SECOND);
    assert_eq!(counted(&rig.query(0, stale(50)).expect("it is the quorum")), 1);
    rig.fabric.borrow_mut().heal_all();
    let joins = NewMember::voter(NodeId(2), config(1, 2).members[1].address);
    let change = MembershipChange { add: vec![joins], ..MembershipChange::default() };
    let mut changed = rig.called(0).change_membership(change);
    let added = loop {
        match changed.try_take() {
            Some(outcome) => break outcome.expect("it joins"),
            None => rig.step(),
        }
    };
    rig.run_until("both know it", |rig| rig.status(1).applied >= added.index);
    rig.isolate(0);
    rig.run_for(250 * MILLISECOND);
    match rig.query(0, stale(200)) {
        Err(ReadError::TooStale { age: Some(age), lag: 0 }) => assert!(age.as_millis() >= 250, "{age:?}"),
        other => panic!("{other:?}"),
    }
    rig.run_for(2 * SECOND);
    assert_eq!(rig.query(0, stale(10_000)), Err(ReadError::TooStale { age: None, lag: 0 }), "no leader");
}

#[test]
fn a_stale_read_is_refused_while_more_is_known_to_be_committed_than_is_applied_here() {
    let (mut rig, leader) = Rig::started(3);
    let follower = (leader + 1) % 3;
    rig.kill(follower);
    let index = (0..30).map(|_| rig.commit(leader, 1_000)).last().expect("committed");
    rig.boot(config(follower, 3));
    let behind = |rig: &Rig| rig.status(follower).leader.is_some() && rig.status(follower).applied < index;
    rig.run_until("it has heard the leader and not caught up", behind);
    let stale = |lag_max| Consistency::Stale { age_max: std::time::Duration::from_secs(60), lag_max };
    match rig.query(follower, stale(3)) {
        Err(ReadError::TooStale { age: Some(_), lag }) => assert!(lag > 3, "{lag}"),
        other => panic!("{other:?}"),
    }
    assert!(rig.query(follower, stale(1_000)).is_ok());
    rig.run_until("it has caught up", |rig| rig.status(follower).applied >= index);
    assert_eq!(counted(&rig.query(follower, stale(0)).expect("all is applied")), 30);
}

// ---- Leases

#[test]
fn a_leader_with_a_lease_answers_without_hearing_anybody_for_as_long_as_it_lasts_and_not_longer() {
    let (mut rig, leader) = Rig::leased(3);
    rig.commit(leader, 100);
    rig.run_for(SECOND);
    rig.isolate(leader);
    let cut = rig.context.now();
    let quorum = rig.called(leader).query("?", Consistency::Quorum);
    assert_eq!(counted(&rig.query(leader, Consistency::Linearizable).expect("by lease")), 1);
    assert!(rig.context.now() < cut + MILLISECOND, "nobody was waited for");
    rig.run_for(300 * MILLISECOND);
    assert_eq!(counted(&rig.query(leader, Consistency::Linearizable).expect("by lease")), 1);
    rig.run_for(205 * MILLISECOND);
    let outcome = rig.query(leader, Consistency::Linearizable);
    let expected = matches!(outcome, Err(ReadError::LeaderChanged | ReadError::NoLeader));
    assert!(expected, "an election time-out after the last round: {outcome:?}");
    assert_eq!(rig.answer(quorum), Err(ReadError::LeaderChanged));
}

/// A process is stopped after it has read its clock, and takes a request when it goes on.
#[test]
fn a_leader_that_stood_still_longer_than_its_lease_does_not_answer_by_it() {
    let (mut rig, old) = Rig::leased(3);
    rig.commit(old, 100);
    rig.run_for(SECOND);
    let read_clock = rig.context.now();
    rig.still = Some(old);
    rig.commit_behind_the_back_of(old);
    let mut answer = pin!(rig.called(old).query("?", Consistency::Linearizable));
    rig.process(old).driver.turn(Now { monotonic_ns: read_clock, wall_ms: read_clock / MILLISECOND });
    let mut context = std::task::Context::from_waker(Waker::noop());
    assert!(answer.as_mut().poll(&mut context).is_pending(), "its clock said that the lease was in force");
    rig.still = None;
    rig.process(old).wake_at = 0;
    for _ in 0..1_000_000 {
        match answer.as_mut().poll(&mut context) {
            Poll::Ready(outcome) => return assert_eq!(outcome, Err(ReadError::LeaderChanged)),
            Poll::Pending => rig.step(),
        }
    }
    panic!("never answered");
}

#[test]
fn a_node_that_would_elect_another_leader_within_a_lease_does_not_start() {
    let (mut rig, leader) = Rig::leased(3);
    rig.commit(leader, 100);
    let node = (leader + 1) % 3;
    rig.shutdown(node);
    rig.run_until_ended(node);
    rig.boot(Config { election_timeout: std::time::Duration::from_millis(499), ..config(node, 3) });
    let cause = rig.run_until_ended(node).stopped.expect("stopped");
    let expected = ConfigError::ElectionTimeoutBelowLease { got_ns: 499_000_000, min_ns: 500_000_000 };
    assert!(matches!(cause.error(), StopError::Config(error) if *error == expected), "{cause}");
    rig.boot(Config { election_timeout: std::time::Duration::from_millis(600), ..config(node, 3) });
    rig.run_until("it follows", |rig| rig.status(node).leader.is_some());
}

// ---- R2: rounds, commits, bounds

#[test]
fn a_forced_round_is_answered_by_a_majority_and_only_on_the_leader() {
    let (mut rig, leader) = Rig::started(3);
    let index = rig.commit(leader, 100);
    let follower = (leader + 1) % 3;
    let round = rig.called(leader).force_round();
    assert_eq!(rig.answer(round), Ok(index));
    let round = rig.called(follower).force_round();
    let outcome = rig.answer(round);
    assert_eq!(leader_named(outcome), NodeId(leader as u64 + 1));
    rig.isolate(leader);
    let round = rig.called(leader).force_round();
    assert_eq!(rig.answer(round), Err(ReadError::LeaderChanged));
}

#[test]
fn commit_and_apply_of_an_index_can_be_waited_for_on_any_node_and_only_for_so_long() {
    let (mut rig, leader) = Rig::started(3);
    let next = rig.commit(leader, 100).next();
    let waits: Vec<_> = (0..3)
        .map(|node| {
            let handle = rig.called(node);
            (node, handle.wait_committed(next, None), handle.wait_applied(next, None))
        })
        .collect();
    assert_eq!(rig.commit(leader, 100), next);
    for (node, committed, applied) in waits {
        assert!(rig.answer(committed).expect("committed") >= next);
        assert!(rig.answer(applied).expect("applied") >= next && rig.status(node).commit >= next);
    }
    let begun = rig.context.now();
    let never = rig.called(leader).wait_applied(LogIndex(1_000), Some(std::time::Duration::from_millis(70)));
    assert_eq!(rig.answer(never), Err(ReadError::TimedOut));
    let waited = rig.context.now() - begun;
    assert!((70 * MILLISECOND..80 * MILLISECOND).contains(&waited), "{waited}");
    let default = rig.called(leader).wait_committed(LogIndex(1_000), None);
    assert_eq!(rig.answer(default), Err(ReadError::TimedOut));
    assert!(rig.context.now() - begun >= 5 * SECOND);
}

#[test]
fn reads_beyond_the_bound_are_refused_and_all_that_wait_are_refused_when_the_node_stops() {
    let mut rig = Rig::new(1);
    rig.boot(Config { reads_max: 4, ..config(0, 1) });
    let leader = rig.run_until_led();
    rig.commit(leader, 100);
    let handle = rig.called(leader);
    let waiting: Vec<_> = (0..4).map(|_| handle.wait_applied(LogIndex(1_000), None)).collect();
    rig.turn(leader);
    let queued: Vec<_> = (0..4).map(|_| handle.wait_applied(LogIndex(1_000), None)).collect();
    rig.turn(leader);
    assert_eq!(rig.answer(handle.read(Consistency::Linearizable)), Err(ReadError::Busy));
    rig.shutdown(leader);
    rig.run_until_ended(leader);
    for read in waiting.into_iter().chain(queued) {
        assert!(matches!(read.wait(), Err(ReadError::Stopped(cause)) if cause.is_orderly()));
    }
    let late = handle.query("?", Consistency::Quorum).wait();
    assert!(matches!(late, Err(ReadError::Stopped(_))), "{late:?}");
}

#[test]
fn a_read_that_nobody_waits_for_any_more_leaves_its_place_when_it_is_due() {
    let mut rig = Rig::new(1);
    rig.boot(Config { reads_max: 1, ..config(0, 1) });
    let leader = rig.run_until_led();
    rig.commit(leader, 100);
    drop(rig.called(leader).wait_applied(LogIndex(1_000), Some(std::time::Duration::from_millis(20))));
    rig.run_for(SECOND);
    assert_eq!(counted(&rig.query(leader, Consistency::Linearizable).expect("there is room")), 1);
}

// ---- Seeds

/// Reads at every node beside commands, in clusters that apply slowly: each must see what was acknowledged before.
fn reads_beside_commands(seed: u64) -> Result<u64, String> {
    let mut rig = Rig::seeded(3, seed);
    let lease_drift_ppm = seed.is_multiple_of(2).then_some(200);
    for node in 0..3 {
        rig.boot(Config { apply_bytes_per_turn: 1, lease_drift_ppm, ..config(node, 3) });
    }
    let leader = rig.run_until_led();
    let (mut acknowledged, mut answered) = (0, 0);
    let mut rng = Rng::new(seed);
    let mut under_way: Vec<(u64, std::pin::Pin<Box<Read<QueryReply>>>)> = Vec::new();
    let mut context = std::task::Context::from_waker(Waker::noop());
    for tag in 0..400 {
        if rng.below(2) == 0 {
            rig.propose(leader, tag, 10 + rng.below(2_000) as usize);
        } else {
            let node = rng.below(3) as usize;
            let consistency = [Consistency::Linearizable, Consistency::Quorum][rng.below(2) as usize];
            under_way.push((acknowledged, Box::pin(rig.called(node).query("?", consistency))));
        }
        for _ in 0..rng.below(30) {
            rig.step();
            acknowledged +=
                rig.completed(leader).into_iter().filter(|done| done.outcome.is_ok()).count() as u64;
            let mut wrong = None;
            under_way.retain_mut(|(needed, read)| match read.as_mut().poll(&mut context) {
                Poll::Ready(Ok(reply)) => {
                    answered += 1;
                    if counted(&reply) < *needed {
                        wrong =
                            Some(format!("{} of {needed} acknowledged commands are seen", counted(&reply)));
                    }
                    false
                }
                Poll::Ready(Err(_)) => false,
                Poll::Pending => true,
            });
            if let Some(wrong) = wrong {
                return Err(wrong);
            }
        }
    }
    Ok(answered)
}

#[test]
fn reads_beside_commands_see_what_was_acknowledged_before_at_every_seed() {
    for seed in 0..20 {
        let answered = reads_beside_commands(seed).unwrap_or_else(|found| panic!("seed {seed}: {found}"));
        assert!(answered > 100, "seed {seed}: {answered}");
    }
}

#[test]
fn a_read_that_is_answered_before_it_is_applied_is_noticed() {
    use ringraft::mutants::{self, Mutant};
    mutants::set(Some(Mutant::FollowerReadWithoutApply));
    let found = (0..20).find_map(|seed| reads_beside_commands(seed).err());
    mutants::set(None);
    assert!(found.is_some(), "the bug was not noticed");
}
