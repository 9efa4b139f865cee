//! Changing the members of simulated clusters of real drivers.

use super::*;
use ringraft::Answer;
use ringraft::Incarnation;
use ringraft::membership::{ChangeError, Changed, MemberRole, MembershipChange, MembershipError, NewMember};
use ringraft_tests::sim::coverage::Mark;

type Outcome<T> = Result<T, MembershipError>;

fn id(node: usize) -> NodeId {
    NodeId(node as u64 + 1)
}

fn address(node: usize) -> SocketAddr {
    SocketAddr::new(address_of(node), 7_000)
}

/// A node that joins, and finds the cluster by those nodes.
fn joining(node: usize, seeds: &[usize]) -> Config {
    let members =
        seeds.iter().chain([&node]).map(|node| MemberConfig { id: id(*node), address: address(*node) });
    Config { join: true, members: members.collect(), node: id(node), ..config(0, 1) }
}

fn adding(nodes: &[usize]) -> MembershipChange {
    let add = nodes.iter().map(|node| NewMember::voter(id(*node), address(*node)));
    MembershipChange { add: add.collect(), ..MembershipChange::default() }
}

fn removing(nodes: &[usize]) -> MembershipChange {
    MembershipChange { remove: nodes.iter().map(|node| id(*node)).collect(), ..MembershipChange::default() }
}

impl Rig {
    /// Lets things happen until the answer is there.
    fn asked<T>(&mut self, node: usize, ask: impl FnOnce(&Handle) -> Answer<Outcome<T>>) -> Outcome<T> {
        let process = self.process(node);
        process.wake_at = 0;
        let mut answer = ask(&process.handle);
        let deadline = self.context.now() + 60 * SECOND;
        loop {
            if let Some(outcome) = answer.try_take() {
                return outcome;
            }
            self.step();
            assert!(self.context.now() < deadline, "no answer");
        }
    }

    fn change(&mut self, node: usize, change: MembershipChange) -> Outcome<Changed> {
        self.asked(node, |handle| handle.change_membership(change))
    }

    /// The voters and the learners of the configuration in force at a node.
    fn members(&self, node: usize) -> (Vec<u64>, Vec<u64>) {
        let membership = self.status(node).membership;
        let of = |role| {
            let members = membership.configuration.members().iter().filter(move |member| member.role == role);
            members.map(|member| member.id.get()).collect()
        };
        (of(MemberRole::Voter), of(MemberRole::Learner))
    }

    fn run_until_all_apply(&mut self, nodes: &[usize], index: LogIndex) {
        self.run_until("all apply", |rig| nodes.iter().all(|node| rig.status(*node).applied >= index));
    }

    fn wipe(&mut self, node: usize) {
        if self.machines[node].process.is_some() {
            self.kill(node);
        }
        let rng = Rng::new(self.seed + 9_000);
        self.machines[node].disk = DiskState::new(&self.context, node, rng, DiskConfig::default());
    }
}

fn refused<T: std::fmt::Debug>(outcome: Outcome<T>) -> ChangeError {
    match outcome {
        Err(MembershipError::Change(error)) => error,
        other => panic!("{other:?}"),
    }
}

// ---- K7: one node, then more

/// A cluster of `nodes`, grown from the first one, on `machines` machines.
fn grown(nodes: usize, machines: usize) -> Rig {
    let mut rig = Rig::new(machines);
    rig.boot(config(0, 1));
    assert_eq!(rig.run_until_led(), 0);
    for node in 1..nodes {
        rig.boot(joining(node, &[0]));
        rig.change(0, adding(&[node])).unwrap_or_else(|error| panic!("{error}"));
    }
    rig
}

#[test]
fn k7_a_single_node_runs_and_commits_alone_and_later_joiners_are_caught_up_and_vote() {
    let mut rig = Rig::new(3);
    rig.boot(config(0, 1));
    assert_eq!(rig.run_until_led(), 0);
    for _ in 0..50 {
        rig.commit(0, 1_000);
    }
    assert_eq!(rig.members(0), (vec![1], vec![]));
    for node in 1..3 {
        rig.boot(joining(node, &[0]));
    }
    // They wait, and have no say.
    rig.run_for(5 * SECOND);
    assert!((1..3).all(|node| rig.status(node).applied == LogIndex(0)));
    let changed = rig.change(0, adding(&[1, 2])).expect("both in one call");
    assert!(changed.index <= rig.status(0).commit);
    rig.run_until_all_apply(&[0, 1, 2], changed.index);
    for node in 0..3 {
        assert_eq!(rig.members(node), (vec![1, 2, 3], vec![]));
        assert_eq!(rig.process(node).driver.machine().count, 50);
    }
    // The first one is not needed any more.
    rig.kill(0);
    let leader = rig.run_until_led();
    let index = rig.commit(leader, 100);
    // All come back from their own directories, the first one with the list of one member that it was started with.
    for node in 1..3 {
        rig.kill(node);
    }
    rig.boot(config(0, 1));
    for node in 1..3 {
        rig.boot(joining(node, &[0]));
    }
    rig.run_until_all_apply(&[0, 1, 2], index);
    let leader = rig.run_until_led();
    let index = rig.commit(leader, 100);
    rig.run_until_all_apply(&[0, 1, 2], index);
    assert!((0..3).all(|node| rig.status(node).membership.is_member));
}

/// The changes are gone from the logs, so that only snapshots tell of them: to those who restart, and to those who join.
#[test]
fn members_are_known_from_snapshots_where_the_log_has_been_purged() {
    let purging = |config| Config { log_retention_bytes: 0, ..config };
    let mut rig = Rig::new(4);
    rig.boot(purging(config(0, 1)));
    assert_eq!(rig.run_until_led(), 0);
    for node in 1..3 {
        rig.boot(purging(joining(node, &[0])));
        rig.change(0, adding(&[node])).unwrap_or_else(|error| panic!("{error}"));
    }
    let index = rig.commit(0, 100);
    rig.run_until_all_apply(&[0, 1, 2], index);
    let stands_at = rig.status(0).membership.index;
    assert!(stands_at < index);
    for node in 0..3 {
        rig.snapshot(node);
    }
    // With the lists that they were started with, which are long overtaken.
    for node in 0..3 {
        rig.kill(node);
    }
    rig.boot(purging(config(0, 1)));
    for node in 1..3 {
        rig.boot(purging(joining(node, &[0])));
    }
    let leader = rig.run_until_led();
    let index = rig.commit(leader, 100);
    rig.run_until_all_apply(&[0, 1, 2], index);
    assert!((0..3).all(|node| rig.members(node) == (vec![1, 2, 3], vec![])));
    // Somebody who had looked at the members before may still count on nobody having changed them.
    assert!((0..3).all(|node| rig.status(node).membership.index == stands_at));
    // One that joins is sent a snapshot, and a restart finds the later change in its log.
    rig.boot(purging(joining(3, &[0, 1, 2])));
    let only_if = MembershipChange { expected: Some(stands_at), ..adding(&[3]) };
    let changed = rig.change(leader, only_if).expect("it catches up");
    rig.run_until_all_apply(&[0, 1, 2, 3], changed.index);
    rig.kill(3);
    rig.boot(purging(joining(3, &[0, 1, 2])));
    let index = rig.commit(leader, 100);
    rig.run_until_all_apply(&[0, 1, 2, 3], index);
    assert_eq!(rig.members(3), (vec![1, 2, 3, 4], vec![]));
    assert_eq!(rig.process(3).driver.machine().count, 3);
}

/// A leader's snapshot ends in the middle of a change: the transition is committed, and what would end it cannot be, since
/// all other new voters are down. One of them is sent that snapshot and loses power behind the install; then the new voters
/// have a majority of their own and none of the old ones, which is not enough.
#[test]
fn a_snapshot_that_was_taken_in_a_transition_restores_it_also_after_a_crash_right_behind_the_install() {
    let purging = |config| Config { log_retention_bytes: 0, ..config };
    let in_force = |rig: &Rig, node: usize, at: LogIndex| {
        let raft = rig.machines[node].process.as_ref().and_then(|process| process.driver.raft());
        raft.and_then(|raft| raft.configuration_at(at)).map(|(at, members)| (at, members.is_joint()))
    };
    for steps in 0..16 {
        let mut rig = Rig::seeded(5, 400 + steps);
        rig.boot(purging(config(0, 1)));
        assert_eq!(rig.run_until_led(), 0);
        for node in 1..3 {
            rig.boot(purging(joining(node, &[0])));
            rig.change(0, adding(&[node])).unwrap_or_else(|error| panic!("{error}"));
        }
        (3..5).for_each(|node| rig.boot(purging(joining(node, &[0]))));
        let replace = MembershipChange { remove: vec![id(1), id(2)], ..adding(&[3, 4]) };
        let process = rig.process(0);
        let answer = process.handle.change_membership(replace);
        process.wake_at = 0;
        rig.run_until("a transition", |rig| rig.status(0).membership.configuration.is_joint());
        rig.kill(4);
        let applied = |rig: &Rig| in_force(rig, 0, rig.status(0).applied);
        rig.run_until("it is applied", |rig| applied(rig).is_some_and(|(_, is_joint)| is_joint));
        rig.kill(3);
        let (stands_at, _) = applied(&rig).expect("known");
        let last = rig.snapshot(0);
        assert_eq!(in_force(&rig, 0, last), Some((stands_at, true)));
        assert!(rig.status(0).membership.index > last, "it is about to be left");

        rig.boot(purging(joining(4, &[0])));
        rig.run_until("installed", |rig| rig.status(4).applied == last);
        for _ in 0..steps {
            if rig.status(4).membership.configuration.is_joint() {
                rig.step();
            }
        }
        rig.crash(4, if steps % 2 == 0 { Crash::PowerCut } else { Crash::Kill });
        (0..3).for_each(|node| rig.kill(node));
        drop(answer);
        (3..5).for_each(|node| rig.boot(purging(joining(node, &[0]))));
        rig.run_for(5 * SECOND);
        assert_eq!(in_force(&rig, 4, last), Some((stands_at, true)), "crash after {steps} steps");
        if rig.status(4).membership.index == stands_at {
            assert_eq!((rig.status(4).last, rig.leader()), (last, None), "without any of the old voters");
        }
        rig.boot(purging(config(0, 1)));
        rig.boot(purging(joining(1, &[0])));
        rig.run_until("it is over", |rig| {
            let leader = rig.leader().map(|leader| rig.status(leader));
            leader.is_some_and(|status| {
                let members = &status.membership;
                members.configuration.is_settled() && members.index <= status.commit
            })
        });
        let leader = rig.leader().expect("it leads");
        assert_eq!(rig.members(leader), (vec![1, 4, 5], vec![]));
        let index = rig.commit(leader, 100);
        rig.run_until_all_apply(&[0, 3, 4], index);
    }
}

#[test]
fn k7_a_joiner_that_is_down_or_never_started_is_named_and_nothing_has_changed() {
    let mut rig = grown(1, 2);
    let outcome = rig.change(0, adding(&[1]));
    assert_eq!(outcome, Err(MembershipError::Unreachable { id: id(1), address: address(1) }));
    assert!(outcome.unwrap_err().to_string().contains("start it there with `join`"));
    assert_eq!(rig.members(0), (vec![1], vec![]));
    rig.commit(0, 100);
    // It can be tried again.
    rig.boot(joining(1, &[0]));
    rig.change(0, adding(&[1])).expect("it is there now");
}

/// A cluster of one node, whichever it is.
fn single(node: usize) -> Config {
    Config {
        members: vec![MemberConfig { id: id(node), address: address(node) }],
        node: id(node),
        ..config(0, 1)
    }
}

#[test]
fn k7_joiners_find_the_leader_by_any_one_member_whichever_ids_are_the_higher() {
    for (leader, follower) in [(1, 3), (3, 1), (2, 3), (1, 2)] {
        let mut rig = Rig::new(5);
        rig.boot(single(leader));
        rig.run_until_led();
        rig.boot(joining(follower, &[leader]));
        rig.change(leader, adding(&[follower])).expect("it knows the leader");
        // With ids below, between and above those of the two.
        let joiners: Vec<usize> = (0..5).filter(|node| ![leader, follower].contains(node)).collect();
        joiners.iter().for_each(|node| rig.boot(joining(*node, &[follower])));
        rig.run_for(SECOND);
        let changed =
            rig.change(leader, adding(&joiners)).unwrap_or_else(|error| panic!("{leader}: {error}"));
        rig.run_until_all_apply(&[0, 1, 2, 3, 4], changed.index);
        assert_eq!(rig.members(joiners[0]), (vec![1, 2, 3, 4, 5], vec![]));
    }
}

/// The joiners have been waiting for long when another node takes over, which is the one that they are to be added by.
#[test]
fn k7_joiners_that_wait_learn_who_leads_after_a_change_of_leaders() {
    let mut rig = Rig::new(5);
    rig.boot(single(1));
    rig.run_until_led();
    for node in [2, 3] {
        rig.boot(joining(node, &[1]));
        rig.change(1, adding(&[node])).expect("it knows the leader");
    }
    // A member that never leads here.
    [0, 4].into_iter().for_each(|node| rig.boot(joining(node, &[2])));
    rig.run_for(5 * SECOND);
    for leader in [3, 1] {
        let from = rig.leader().expect("it leads");
        assert_eq!(rig.transfer(from, Some(leader)), Ok(leader));
        rig.run_until("it takes commands", |rig| rig.leader() == Some(leader));
        rig.commit(leader, 10);
        rig.run_for(2 * SECOND);
        let joiner = if leader == 3 { 0 } else { 4 };
        let changed = rig.change(leader, adding(&[joiner])).unwrap_or_else(|error| panic!("{error}"));
        rig.run_until_all_apply(&[1, 2, 3, joiner], changed.index);
    }
}

// ---- K8: ids

#[test]
fn k8_reserved_ids_are_unique_also_across_leaders_and_never_those_of_members_or_former_ones() {
    let mut rig = grown(3, 3);
    let mut seen = vec![1, 2, 3];
    let mut leader = 0;
    for round in 0..4 {
        let reserved = rig.asked(leader, Handle::reserve_node_id).expect("reserved").get();
        assert!(!seen.contains(&reserved), "{reserved} again in {seen:?}");
        seen.push(reserved);
        if round == 1 {
            rig.run_until("all know", |rig| {
                (0..3).all(|node| rig.status(node).commit == rig.status(leader).commit)
            });
            rig.kill(leader);
            leader = rig.run_until_led();
            // Until a batch of its own term is committed, a leader does not know what has been reserved.
            rig.commit(leader, 10);
        }
        if round == 2 {
            rig.change(leader, removing(&[0])).expect("the lost one is removed");
        }
    }
    assert_eq!(seen, [1, 2, 3, 4, 5, 6, 7]);
    let follower =
        (0..3).find(|node| *node != leader && rig.machines[*node].process.is_some()).expect("another");
    let elsewhere = rig.asked(follower, Handle::reserve_node_id);
    assert!(matches!(elsewhere, Err(MembershipError::NotLeader { .. })), "{elsewhere:?}");
}

// ---- K6: changes

#[test]
fn k6_a_member_is_replaced_in_one_call_while_commands_commit() {
    let mut rig = grown(3, 4);
    rig.kill(2);
    rig.boot(joining(3, &[0, 1]));
    let change = MembershipChange { remove: vec![id(2)], ..adding(&[3]) };
    let plan = rig.asked(0, |handle| handle.plan_membership(change.clone())).expect("a plan");
    assert_eq!(
        plan.to_string(),
        "1. 4 as learners, until they have caught up with the log; they count for nothing yet.\n\
         2. joint consensus: every decision needs a majority of 1, 2, 3 and one of 1, 2, 4.\n\
         3. voters 1, 2, 4; ids are free from 5.\n\
         3 voters then; 1 of them may fail (now 1)."
    );
    assert_eq!(rig.members(0).0, [1, 2, 3], "a plan changes nothing");
    let process = rig.process(0);
    let mut answer = process.handle.change_membership(change);
    process.wake_at = 0;
    let mut commits = 0;
    let changed = loop {
        rig.commit(0, 200);
        commits += 1;
        if let Some(outcome) = answer.try_take() {
            break outcome.expect("replaced");
        }
        assert!(commits < 100_000);
    };
    rig.run_until_all_apply(&[0, 1, 3], changed.index);
    assert_eq!(rig.members(3), (vec![1, 2, 4], vec![]));
    // The new one counts: with it, one of the others may fail.
    rig.kill(1);
    let index = rig.commit(0, 100);
    rig.run_until_all_apply(&[0, 3], index);
}

#[test]
fn k6_learners_have_the_log_and_no_vote_are_promoted_and_demoted_and_all_of_it_survives_restarts() {
    let mut rig = grown(2, 3);
    rig.boot(joining(2, &[0]));
    let learner = MembershipChange { add: vec![NewMember::learner(id(2), address(2))], ..Default::default() };
    let changed = rig.change(0, learner).expect("a learner");
    rig.run_until_all_apply(&[0, 1, 2], changed.index);
    assert_eq!(rig.members(1), (vec![1, 2], vec![3]));
    // Without the other voter nothing commits, whatever the learner has.
    rig.kill(1);
    rig.propose(0, 1, 100);
    let before = rig.status(0).commit;
    rig.run_for(2 * SECOND);
    assert_eq!(rig.status(0).commit, before);
    rig.boot(joining(1, &[0]));
    let leader = rig.run_until_led();
    rig.run_for(SECOND);
    rig.completed(leader);
    let index = rig.commit(leader, 100);
    rig.run_until_all_apply(&[0, 1, 2], index);
    let promoted = MembershipChange { promote: vec![id(2)], demote: vec![id(1)], ..Default::default() };
    let changed = if leader == 1 {
        // The leader takes its own vote away, and leaves office.
        rig.change(leader, promoted).expect("changed by the leader that loses its vote")
    } else {
        rig.change(leader, promoted).expect("changed")
    };
    rig.run_until_all_apply(&[0, 1, 2], changed.index);
    for node in 0..3 {
        rig.kill(node);
    }
    rig.boot(config(0, 1));
    rig.boot(joining(1, &[0]));
    rig.boot(joining(2, &[0]));
    let leader = rig.run_until_led();
    assert_ne!(leader, 1, "a learner does not lead");
    let index = rig.commit(leader, 100);
    rig.run_until_all_apply(&[0, 1, 2], index);
    assert!((0..3).all(|node| rig.members(node) == (vec![1, 3], vec![2])));
}

#[test]
fn k6_a_leader_removes_itself_leads_until_that_is_committed_and_another_one_follows() {
    let mut rig = grown(3, 3);
    let changed = rig.change(0, removing(&[0])).expect("committed by the leader that leaves");
    rig.run_until("it knows", |rig| rig.status(0).role != Role::Leader);
    let leader = {
        rig.run_until("another leads", |rig| rig.leader().is_some_and(|leader| leader != 0));
        rig.leader().expect("a leader")
    };
    rig.run_until("it is known", |rig| changed.index <= rig.status(leader).commit);
    assert_eq!(rig.members(leader), (vec![2, 3], vec![]));
    let term = rig.status(leader).term;
    rig.commit(leader, 100);
    // It has learned that it has left, and disturbs nobody, also after a restart with the list that names it.
    rig.run_for(5 * SECOND);
    assert!(!rig.status(0).membership.is_member);
    rig.kill(0);
    rig.boot(config(0, 1));
    rig.run_for(5 * SECOND);
    assert_eq!((rig.status(leader).term, rig.leader()), (term, Some(leader)));
    rig.commit(leader, 100);
    // And it may come back.
    rig.change(leader, adding(&[0])).expect("back");
    assert_eq!(rig.members(leader), (vec![1, 2, 3], vec![]));
}

#[test]
fn k6_changes_that_contradict_themselves_or_the_cluster_are_refused_with_the_cure() {
    let mut rig = grown(3, 5);
    let index = rig.status(0).membership.index;
    let stale = MembershipChange { expected: Some(LogIndex(1)), ..removing(&[2]) };
    let refusal = refused(rig.change(0, stale));
    assert_eq!(refusal, ChangeError::Expected { expected: LogIndex(1), current: index });
    assert_eq!(refused(rig.change(0, removing(&[0, 1, 2]))), ChangeError::NoVoter);
    let twice = MembershipChange { promote: vec![id(2)], ..removing(&[2]) };
    assert_eq!(refused(rig.change(0, twice)), ChangeError::NamedTwice { id: id(2) });
    let members = vec![id(0), id(1), id(2)];
    assert_eq!(refused(rig.change(0, removing(&[4]))), ChangeError::NotAMember { id: id(4), members });
    let other = NewMember { incarnation: Some(Incarnation(99)), ..NewMember::voter(id(1), address(1)) };
    let other = MembershipChange { add: vec![other], ..Default::default() };
    assert_eq!(refused(rig.change(0, other)), ChangeError::OtherIncarnation { id: id(1) });
    assert!(matches!(rig.change(1, removing(&[2])), Err(MembershipError::NotLeader { leader: Some(_) })));

    // With one of three gone, none of the others can be spared, but the lost one can.
    rig.kill(2);
    rig.run_for(2 * SECOND);
    let lost = refused(rig.change(0, removing(&[1])));
    assert_eq!(lost, ChangeError::QuorumLost { silent: vec![id(2)], voters: 2 });
    assert!(lost.to_string().contains("even_if_quorum_is_lost"), "{lost}");
    assert_eq!(rig.status(0).membership.index, index, "nothing has changed");
    let expected = MembershipChange { expected: Some(index), ..removing(&[2]) };
    rig.change(0, expected).expect("the lost one is removed");
    assert_eq!(rig.members(0).0, [1, 2]);
    let same = rig.change(0, MembershipChange::default()).expect("nothing to do");
    assert_eq!(same.index, rig.status(0).membership.index);
}

#[test]
fn k6_a_second_change_is_refused_while_one_is_under_way_and_a_stuck_newcomer_stays_a_learner() {
    let mut rig = grown(3, 5);
    rig.boot(joining(3, &[0, 1, 2]));
    // It is met, added, and dies before it has caught up.
    let process = rig.process(0);
    let mut first = process.handle.change_membership(adding(&[3]));
    process.wake_at = 0;
    rig.run_until("it is a learner", |rig| rig.members(0).1 == [4]);
    rig.kill(3);
    let second = refused(rig.change(0, removing(&[2])));
    assert!(matches!(second, ChangeError::InProgress { .. }), "{second}");
    rig.run_for(20 * SECOND);
    let stuck = first.try_take().expect("given up");
    assert_eq!(stuck, Err(MembershipError::Change(ChangeError::Stuck { id: id(3) })));
    assert_eq!(rig.members(0), (vec![1, 2, 3], vec![4]));
    assert!(rig.status(0).membership.configuration.is_settled());
    rig.commit(0, 100);
    rig.boot(joining(3, &[0, 1, 2]));
    let promoted = MembershipChange { promote: vec![id(3)], ..Default::default() };
    rig.change(0, promoted).expect("it has caught up now");
    assert_eq!(rig.members(0), (vec![1, 2, 3, 4], vec![]));
}

/// It answers, and takes no snapshot: the change went on for ever, and no other one could begin.
#[test]
fn k6_a_newcomer_without_space_for_a_snapshot_is_stuck_and_stays_a_learner() {
    let purging = |config| Config { log_retention_bytes: 0, ..config };
    let mut rig = Rig::new(3);
    rig.boot(purging(config(0, 1)));
    assert_eq!(rig.run_until_led(), 0);
    for _ in 0..5 {
        rig.commit(0, 100);
    }
    rig.snapshot(0);
    rig.boot(purging(joining(1, &[0])));
    rig.run_for(2 * SECOND);
    rig.machines[1].disk.borrow_mut().faults_mut().no_space = true;
    let stuck = refused(rig.change(0, adding(&[1])));
    assert_eq!(stuck, ChangeError::Stuck { id: id(1) });
    assert_eq!(rig.members(0), (vec![1], vec![2]));
    // The next one is accepted.
    rig.boot(purging(joining(2, &[0])));
    rig.change(0, adding(&[2])).expect("it has space");
    rig.machines[1].disk.borrow_mut().faults_mut().no_space = false;
    let promoted = MembershipChange { promote: vec![id(1)], ..Default::default() };
    let changed = rig.change(0, promoted).expect("it has space now");
    rig.run_until_all_apply(&[0, 1, 2], changed.index);
    assert_eq!(rig.members(1), (vec![1, 2, 3], vec![]));
}

/// It said that it does not lead, and that it should be asked.
#[test]
fn a_leader_that_closes_tells_who_asks_for_a_change_that_it_has_stopped() {
    let mut rig = grown(1, 1);
    rig.shutdown(0);
    rig.turn(0);
    let process = rig.process(0);
    process.wake_at = 0;
    let mut answer = process.handle.change_membership(adding(&[1]));
    rig.turn(0);
    let told = answer.try_take().expect("at once");
    assert!(matches!(told, Err(MembershipError::Stopped(_))), "{told:?}");
    rig.run_until_ended(0);
}

#[test]
fn k6_whoever_leads_next_finishes_a_change_wherever_the_leader_dies() {
    // The moment at which the leader dies, in steps of the rig after it was asked.
    let mut stages = std::collections::BTreeSet::new();
    for steps in (0..240).step_by(3) {
        let mut rig = grown(3, 4);
        rig.boot(joining(3, &[0, 1, 2]));
        rig.run_for(3 * SECOND);
        let process = rig.process(0);
        let mut answer =
            process.handle.change_membership(MembershipChange { remove: vec![id(2)], ..adding(&[3]) });
        process.wake_at = 0;
        for _ in 0..steps {
            rig.step();
        }
        let membership = rig.status(0).membership;
        let configuration = &membership.configuration;
        stages.insert((
            configuration.is_joint(),
            configuration.planned().is_empty(),
            configuration.is_voter(id(3)),
        ));
        let done = answer.try_take();
        rig.kill(0);
        rig.run_until("another leads", |rig| rig.leader().is_some_and(|leader| leader != 0));
        let settled = |rig: &Rig| {
            let leader = rig.leader().filter(|leader| *leader != 0)?;
            let status = rig.status(leader);
            let membership = status.membership;
            (membership.configuration.is_settled() && membership.index <= status.commit).then_some(leader)
        };
        rig.run_until("it is over", |rig| settled(rig).is_some());
        let leader = settled(&rig).expect("it is over");
        let members = rig.members(leader);
        // All of it, or nothing of it.
        let all = members == (vec![1, 2, 4], vec![]);
        assert!(all || (members == (vec![1, 2, 3], vec![]) && done.is_none()), "after {steps}: {members:?}");
        if matches!(done, Some(Ok(_))) {
            assert!(all, "after {steps}: told that it is done");
        }
        rig.commit(leader, 100);
    }
    assert!(stages.len() >= 4, "{stages:?}");
}

// ---- Incarnations

#[test]
fn k12_a_wiped_disk_under_an_old_id_is_refused_and_comes_back_as_a_learner_after_the_old_one_was_removed() {
    let (mut rig, leader) = Rig::started(3);
    rig.commit(leader, 100);
    // One that dials: it is told by whom it meets.
    let lost = if leader == 2 { 1 } else { 2 };
    let other = 3 - leader - lost;
    rig.wipe(lost);
    // As before, it is told apart.
    rig.boot(config(lost, 3));
    let cause = rig.run_until_ended(lost).stopped.expect("stopped");
    assert!(matches!(cause.error(), StopError::Formation(FormationError::Replaced { .. })), "{cause}");
    assert!(cause.to_string().contains("have the cluster replace the member"), "{cause}");
    // As one that joins, it waits, and has no say, while the old one is a member.
    rig.boot(joining(lost, &[leader, other]));
    rig.run_for(5 * SECOND);
    assert!(!rig.status(lost).formed);
    let again = rig.change(leader, adding(&[lost])).expect("nothing to do: it is a member");
    assert_eq!(again.index, rig.status(leader).membership.index);
    rig.change(leader, removing(&[lost])).expect("the old one is removed");
    rig.change(leader, adding(&[lost])).expect("the new one is added");
    let index = rig.commit(leader, 100);
    rig.run_until_all_apply(&[0, 1, 2], index);
    assert!(rig.status(lost).membership.is_member);
    rig.kill(other);
    rig.commit(leader, 100);
}

/// A voter that slept through the replacement of a peer knows the new one only by its own old configuration, which names
/// another directory. When only the new one can lead, it must get through all the same, and stay: on its way to the end of the
/// log the sleeper passes a configuration in which the peer has been removed and not yet been added again. (Where it ended the
/// session there, nobody else was left to tell it the rest.)
#[test]
fn a_member_with_an_old_configuration_follows_a_leader_that_it_knows_by_another_directory() {
    for seed in 0..6 {
        let mut rig = Rig::seeded(4, seed);
        (0..4).for_each(|node| rig.boot(config(node, 4)));
        let leader = rig.run_until_led();
        let index = rig.commit(leader, 100);
        rig.run_until_all_apply(&[0, 1, 2, 3], index);
        let others: Vec<usize> = (0..4).filter(|node| *node != leader).collect();
        let [sleeper, replaced, spare] = others[..] else { panic!("{others:?}") };
        rig.kill(sleeper);
        rig.run_for(2 * SECOND);
        assert_eq!(rig.leader(), Some(leader));
        rig.change(leader, removing(&[replaced])).expect("removed");
        rig.wipe(replaced);
        rig.boot(joining(replaced, &[leader, spare]));
        rig.change(leader, adding(&[replaced])).expect("the new directory is a voter");
        rig.change(leader, removing(&[spare])).expect("three are left");
        let index = rig.commit(leader, 10);
        rig.run_until_all_apply(&[leader, replaced], index);
        rig.kill(spare);
        rig.kill(leader);
        // The sleeper's log is the shorter one: it has to vote for the new directory, which its configuration does not know.
        rig.boot(config(sleeper, 4));
        rig.run_until("the new directory leads", |rig| rig.leader() == Some(replaced));
        let index = rig.commit(replaced, 10);
        rig.run_until_all_apply(&[sleeper, replaced], index);
        assert_eq!(rig.members(sleeper), rig.members(replaced));
    }
}

/// A member that was away while all others were replaced knows none of those who are there now, but for one that only follows:
/// that refers it to the leader. Once with a leader that dials it, and once with one that it must dial.
#[test]
fn a_member_that_was_away_for_long_finds_a_leader_that_its_configuration_does_not_name() {
    for (sleeper, staying, leaving, coming) in [(0, 1, 2, 3), (3, 1, 2, 0)] {
        let mut rig = Rig::new(4);
        let first = [sleeper, staying, leaving];
        let leader = founded_and_left(&mut rig, &first, sleeper);
        rig.boot(joining(coming, &[staying, leaving]));
        rig.change(leader, adding(&[coming])).expect("added");
        if leader != coming {
            drop(rig.transfer(leader, Some(coming)));
        }
        rig.run_until("it leads", |rig| rig.leader() == Some(coming));
        rig.change(coming, removing(&[leaving])).expect("removed");
        let index = rig.commit(coming, 10);
        rig.run_until_all_apply(&[coming, staying], index);
        rig.kill(leaving);
        rig.boot(founder(sleeper, &first));
        rig.run_until_all_apply(&[sleeper], index);
        assert_eq!((rig.leader(), rig.members(sleeper)), (Some(coming), rig.members(coming)));
    }
}

/// After a start nothing is known to be committed, so all configurations of the log count. One that is overtaken names the
/// present leader by a directory that was wiped since, and the newest, which is without it, has nothing to say about that: it
/// was taken for a stranger as soon as it was heard, again and again.
#[test]
fn a_member_follows_a_leader_that_an_overtaken_configuration_knows_by_another_directory() {
    for (sleeper, replaced) in [(0, 3), (3, 0)] {
        let mut rig = Rig::new(4);
        (0..4).for_each(|node| rig.boot(config(node, 4)));
        let leader = rig.run_until_led();
        if leader == replaced {
            drop(rig.transfer(leader, Some(1)));
        }
        let index = rig.commit(rig.leader().expect("one leads"), 100);
        rig.run_until_all_apply(&[0, 1, 2, 3], index);
        let leader = rig.run_until_led();
        rig.change(leader, removing(&[replaced])).expect("removed");
        let leader = rig.run_until_led();
        let index = rig.commit(leader, 100);
        rig.run_until_all_apply(&[sleeper], index);
        rig.kill(sleeper);
        rig.wipe(replaced);
        rig.boot(joining(replaced, &[1, 2]));
        let leader = rig.run_until_led();
        rig.change(leader, adding(&[replaced])).expect("the new directory is a voter");
        drop(rig.transfer(leader, Some(replaced)));
        rig.run_until("it leads", |rig| rig.leader() == Some(replaced));
        let index = rig.commit(replaced, 10);
        rig.boot(config(sleeper, 4));
        rig.run_until_all_apply(&[sleeper], index);
        assert_eq!(rig.members(sleeper), rig.members(replaced));
    }
}

/// Nobody is left but the leader and a learner that has never heard of it: no one follows the leader who could refer the learner
/// to it. Once with a leader that dials the learner, and once with one that it must dial.
#[test]
fn a_leader_makes_itself_known_to_a_member_whose_configuration_does_not_name_it() {
    for (sleeper, leaving, coming) in [(0, [1, 2], 3), (3, [1, 2], 0)] {
        let mut rig = Rig::new(4);
        let first = [sleeper, leaving[0], leaving[1]];
        let leader = founded_and_left(&mut rig, &first, sleeper);
        rig.boot(joining(coming, &leaving));
        rig.change(leader, adding(&[coming])).expect("added");
        let demote = MembershipChange { demote: vec![id(sleeper)], ..MembershipChange::default() };
        rig.change(leader, demote).expect("a learner now");
        rig.change(leader, removing(&leaving)).expect("removed");
        rig.run_until("it leads", |rig| rig.leader() == Some(coming));
        leaving.into_iter().for_each(|node| rig.kill(node));
        let index = rig.commit(coming, 10);
        rig.boot(founder(sleeper, &first));
        rig.run_until_all_apply(&[sleeper], index);
        assert_eq!(rig.members(sleeper), rig.members(coming));
    }
}

/// The leader and a follower are removed in one change: the follower learns that this is committed, though the leader that has
/// committed it is gone and the next one does not count it.
#[test]
fn a_follower_that_is_removed_together_with_its_leader_learns_that_it_is_committed() {
    for removed in [1, 3] {
        let mut rig = grown(4, 4);
        let index = rig.commit(0, 100);
        rig.run_until_all_apply(&[0, 1, 2, 3], index);
        let changed = rig.change(0, removing(&[0, removed])).expect("removed");
        rig.run_until("another leads", |rig| rig.leader().is_some_and(|leader| leader != 0));
        rig.run_until("it knows", |rig| rig.status(removed).commit >= changed.index);
        assert!(!rig.status(removed).membership.is_member);
    }
}

/// The vote that a candidate lacks is that of a member which has never heard of it, and nobody is left who could refer them to
/// each other. Once with a candidate that dials, and once with one that must be dialed.
#[test]
fn a_candidate_gets_the_vote_of_a_member_whose_configuration_does_not_name_it() {
    for (sleeper, leaving, coming) in [(0, [1, 2], [3, 4]), (4, [1, 2], [0, 3])] {
        let mut rig = Rig::new(5);
        let first = [sleeper, leaving[0], leaving[1]];
        let leader = founded_and_left(&mut rig, &first, sleeper);
        for node in coming {
            rig.boot(joining(node, &leaving));
        }
        rig.change(leader, adding(&coming)).expect("added");
        rig.change(leader, removing(&leaving)).expect("removed");
        leaving.into_iter().for_each(|node| rig.kill(node));
        rig.run_for(2 * SECOND);
        let leader = rig.run_until_led();
        let index = rig.commit(leader, 10);
        rig.run_until_all_apply(&coming, index);
        // Of the three who are left one falls out, and the one that stays needs the sleeper.
        rig.kill(coming[1]);
        rig.boot(founder(sleeper, &first));
        rig.run_until("it is led", |rig| {
            rig.status(sleeper).leader.is_some_and(|leader| leader.id == id(coming[0]))
        });
        let index = rig.commit(coming[0], 10);
        rig.run_until_all_apply(&[sleeper], index);
        assert_eq!(rig.members(sleeper), rig.members(coming[0]));
    }
}

/// They asked twice a second, for ever.
#[test]
fn who_has_left_or_is_not_added_asks_less_and_less_and_is_met_at_once_when_it_is_added() {
    let mut rig = grown(3, 5);
    // The one with the highest id of all dials; of the others each must be dialed by some.
    for (newcomer, leaves, knows) in [(3, false, true), (2, true, true), (1, true, false)] {
        if leaves {
            let leader = rig.run_until_led();
            if leader == newcomer {
                drop(rig.transfer(leader, Some(0)));
                rig.run_until("another leads", |rig| rig.leader() == Some(0));
            }
            let leader = rig.run_until_led();
            if !knows {
                rig.kill(newcomer);
                rig.run_for(2 * SECOND);
            }
            rig.change(leader, removing(&[newcomer])).expect("removed");
            if !knows {
                rig.boot(config(newcomer, 3));
            }
        } else {
            rig.boot(joining(newcomer, &[0, 1, 2]));
        }
        rig.run_for(60 * SECOND);
        assert_eq!(rig.status(newcomer).leader, None);
        let asked = |rig: &Rig| rig.context.coverage().of(Mark::Asked);
        let before = asked(&rig);
        rig.run_for(40 * SECOND);
        let questions = asked(&rig) - before;
        assert!((4..=20).contains(&questions), "{questions} questions in 40 s by {newcomer}");

        // Also by a leader that it was not told of.
        let leader = rig.run_until_led();
        let other = (0..3).find(|node| *node != leader && *node != newcomer).expect("a voter");
        drop(rig.transfer(leader, Some(other)));
        rig.run_until("another leads", |rig| rig.leader() == Some(other));
        let begun = rig.context.now();
        rig.change(other, adding(&[newcomer])).expect("added");
        let took = rig.context.now() - begun;
        assert!(took < 4 * SECOND, "{newcomer} was met after {} ms", took / MILLISECOND);
        let index = rig.commit(other, 10);
        rig.run_until_all_apply(&[newcomer], index);
    }
}

/// One of those who found a cluster.
fn founder(node: usize, all: &[usize]) -> Config {
    Config {
        join: false,
        ..joining(node, &all.iter().copied().filter(|other| *other != node).collect::<Vec<_>>())
    }
}

/// These found a cluster, and one of them falls asleep: who leads the others.
fn founded_and_left(rig: &mut Rig, all: &[usize], sleeper: usize) -> usize {
    for node in all {
        rig.boot(founder(*node, all));
    }
    let leader = rig.run_until_led();
    let index = rig.commit(leader, 100);
    rig.run_until_all_apply(all, index);
    rig.kill(sleeper);
    rig.run_until_led()
}

// ---- Members that move

fn elsewhere(node: usize) -> SocketAddr {
    SocketAddr::new(address_of(node), 7_001)
}

/// With these nodes where they have moved to.
fn knowing(config: Config, moved: &[usize]) -> Config {
    let mut config = config;
    for member in &mut config.members {
        if let Some(node) = moved.iter().find(|node| id(**node) == member.id) {
            member.address = elsewhere(*node);
        }
    }
    config
}

fn moving(node: usize) -> MembershipChange {
    MembershipChange { add: vec![NewMember::voter(id(node), elsewhere(node))], ..MembershipChange::default() }
}

impl Rig {
    /// A member is to be met elsewhere from now on, and is started there if it runs.
    fn move_member(&mut self, node: usize, nodes: usize) {
        let leader = self.run_until_led();
        self.change(leader, moving(node)).expect("the others are told");
        if self.machines[node].process.is_some() {
            self.kill(node);
            // The list is from long ago otherwise.
            self.boot(knowing(config(node, nodes), &[node]));
        }
    }
}

/// A member that was away while all others moved knows none of the places where they are. Whom it must dial, since their ids are
/// lower, it dialed for ever where they had been, and what they told it of themselves did not count: they were in its
/// configuration. Also one that has been moved itself meanwhile.
#[test]
fn a_member_that_was_away_while_all_others_moved_finds_them() {
    for (sleeper, moves) in [(0, false), (1, false), (2, false), (0, true), (1, true), (2, true)] {
        let (mut rig, leader) = Rig::started(3);
        let index = rig.commit(leader, 100);
        rig.run_until_all_apply(&[0, 1, 2], index);
        rig.kill(sleeper);
        let others: Vec<usize> = (0..3).filter(|node| *node != sleeper).collect();
        for node in &others {
            rig.move_member(*node, 3);
        }
        if moves {
            rig.move_member(sleeper, 3);
        }
        let leader = rig.run_until_led();
        let index = rig.commit(leader, 10);
        rig.run_until_all_apply(&others, index);
        let moved = if moves { vec![sleeper] } else { Vec::new() };
        rig.boot(knowing(config(sleeper, 3), &moved));
        rig.run_until_all_apply(&[sleeper], index);
        let members = |rig: &Rig, node| rig.status(node).membership.configuration.clone();
        assert_eq!(members(&rig, sleeper), members(&rig, leader));
    }
}

/// There is no leader that could look for the member that was away: its vote is wanted by one that has moved.
#[test]
fn a_candidate_that_has_moved_gets_the_vote_of_a_member_that_was_away() {
    for (sleeper, stays, falls_out) in [(2, 0, 1), (2, 1, 0), (1, 0, 2), (0, 1, 2)] {
        let (mut rig, leader) = Rig::started(3);
        let index = rig.commit(leader, 100);
        rig.run_until_all_apply(&[0, 1, 2], index);
        rig.kill(sleeper);
        rig.move_member(stays, 3);
        rig.move_member(falls_out, 3);
        let leader = rig.run_until_led();
        let index = rig.commit(leader, 10);
        rig.run_until_all_apply(&[stays], index);
        rig.kill(falls_out);
        rig.run_for(10 * SECOND);
        assert_eq!(rig.leader(), None);
        rig.boot(config(sleeper, 3));
        rig.run_until("the one that is not behind leads", |rig| rig.leader() == Some(stays));
        let index = rig.commit(stays, 10);
        rig.run_until_all_apply(&[sleeper], index);
    }
}

/// The leader has written down where a member is to be met, and lost it before it was told: so it is where it was. It was looked
/// for only where it was not yet, and nobody else was there to decide anything.
#[test]
fn a_member_that_was_to_move_and_has_not_is_found_where_it_is() {
    let (mut rig, leader) = Rig::started(3);
    if leader != 2 {
        drop(rig.transfer(leader, Some(2)));
        rig.run_until("it leads", |rig| rig.leader() == Some(2));
    }
    let index = rig.commit(2, 100);
    rig.run_until_all_apply(&[0, 1, 2], index);
    rig.kill(1);
    for (from, to) in [(0, 2), (2, 0)] {
        rig.fabric.borrow_mut().cut(from, to);
    }
    let process = rig.process(2);
    let answer = process.handle.change_membership(moving(0));
    process.wake_at = 0;
    rig.run_until("it is written", |rig| {
        let membership = rig.status(2).membership;
        let address = membership.configuration.member(id(0)).map(|member| member.address.clone());
        address == Some(elsewhere(0).to_string()) && rig.status(2).durable >= membership.index
    });
    rig.run_for(10 * SECOND);
    assert!(rig.status(2).commit < rig.status(2).membership.index);
    drop(answer);
    rig.fabric.borrow_mut().heal_all();
    let leader = rig.run_until_led();
    assert_eq!(leader, 2, "its log is the longer one");
    let index = rig.commit(2, 10);
    rig.run_until_all_apply(&[0], index);
}

/// All machines got other addresses while they were down, and the log that says where they were cannot be told before they meet.
#[test]
fn members_that_all_have_other_addresses_meet_by_the_lists_that_they_are_started_with() {
    let (mut rig, leader) = Rig::started(3);
    let index = rig.commit(leader, 100);
    rig.run_until_all_apply(&[0, 1, 2], index);
    (0..3).for_each(|node| rig.kill(node));
    (0..3).for_each(|node| rig.boot(knowing(config(node, 3), &[0, 1, 2])));
    let leader = rig.run_until_led();
    for node in 0..3 {
        rig.change(leader, moving(node)).expect("told");
    }
    let index = rig.commit(leader, 10);
    rig.run_until_all_apply(&[0, 1, 2], index);
    let membership = rig.status(leader).membership;
    assert!(membership.configuration.members().iter().all(|member| member.address.ends_with(":7001")));
}

/// Nobody is any more where one that joins was told to look.
#[test]
fn one_that_joins_is_met_by_a_leader_that_has_moved() {
    let mut rig = Rig::new(4);
    (0..3).for_each(|node| rig.boot(config(node, 3)));
    (0..3).for_each(|node| rig.move_member(node, 3));
    rig.boot(joining(3, &[0, 1, 2]));
    rig.run_for(20 * SECOND);
    let leader = rig.run_until_led();
    rig.change(leader, adding(&[3])).expect("the leader knows where it is");
    let index = rig.commit(leader, 10);
    rig.run_until_all_apply(&[3], index);
}

/// Flips a bit in the newest configuration of a node that is down.
fn rot_newest_configuration(rig: &Rig, node: usize, address: &str) {
    let mut disk = rig.machines[node].disk.borrow_mut();
    let places = disk.listing().into_iter().filter_map(|entry| {
        let content = disk.content(&entry.name).filter(|_| entry.name.starts_with("segment"))?;
        let at = content.windows(address.len()).rposition(|bytes| bytes == address.as_bytes())?;
        Some((entry.name, at as u64))
    });
    let (name, at) = places.max().expect("a configuration names it");
    disk.flip_bit(&name, at, 0);
}

#[test]
fn a_member_that_cannot_read_its_newest_configuration_has_no_say_until_another_one_has_given_it() {
    let mut rig = grown(3, 3);
    let mut index = LogIndex(0);
    for _ in 0..3 {
        index = rig.commit(0, 100);
    }
    rig.run_until_all_apply(&[0, 1, 2], index);
    for node in 0..3 {
        rig.kill(node);
    }
    rot_newest_configuration(&rig, 1, "10.0.0.3:7000");
    rig.boot(joining(1, &[0]));
    let unknown = |rig: &Rig, node: usize| {
        let driver = rig.machines[node].process.as_ref().map(|process| &process.driver);
        driver.and_then(|driver| driver.raft()).map(|raft| raft.restraint().members_unknown)
    };
    rig.run_until("it runs", |rig| unknown(rig, 1) == Some(true));
    rig.run_for(5 * SECOND);
    assert_eq!((rig.status(1).damage.batches, rig.status(1).role), (1, Role::Follower));
    rig.boot(config(0, 1));
    rig.run_until("it is given the batch", |rig| unknown(rig, 1) == Some(false));
    assert_eq!(rig.status(1).damage.repaired, 1);
    let leader = rig.run_until_led();
    let index = rig.commit(leader, 100);
    rig.run_until_all_apply(&[0, 1], index);
}
