//! Disks that are slow or never answer, and networks of which only a part is left, by name: who leads, what is committed, and
//! how long that takes, in virtual time.

use super::*;
use ringraft::Consistency;
use ringraft::handle::{HandedOver, HandoverCause};
use ringraft_tests::sim::disk::DiskFaults;

/// So many election time-outs are enough for anything to settle.
const SETTLED: Time = 12;

impl Rig {
    fn timeout(&self) -> Time {
        config(0, 1).election_timeout.as_nanos() as Time
    }

    /// How long commits take, one after the other: the median and the longest.
    fn commit_times(&mut self, leader: usize, count: usize) -> (Time, Time) {
        let mut times: Vec<Time> = Vec::new();
        for _ in 0..count {
            let begun = self.context.now();
            self.commit(leader, 300);
            times.push(self.context.now() - begun);
        }
        times.sort_unstable();
        (times[count / 2], times[count - 1])
    }

    fn slow_disk(&self, node: usize, factor: u64) {
        *self.machines[node].disk.borrow_mut().faults_mut() =
            DiskFaults { slow_factor: factor, ..DiskFaults::default() };
    }

    fn terms(&self) -> Vec<u64> {
        (0..self.machines.len())
            .filter(|node| self.machines[*node].process.is_some())
            .map(|node| self.status(node).term.get())
            .collect()
    }

    /// Cuts every link between two machines but these, both ways.
    fn only(&self, links: &[(usize, usize)]) {
        let nodes = self.machines.len();
        let mut fabric = self.fabric.borrow_mut();
        for (one, other) in (0..nodes).flat_map(|one| (0..nodes).map(move |other| (one, other))) {
            if one != other && !links.contains(&(one, other)) && !links.contains(&(other, one)) {
                fabric.cut(one, other);
            }
        }
    }

    /// For twenty election time-outs nothing happens to the leader, nobody's term rises, and commands are committed.
    fn stays_with(&mut self, leader: usize) {
        let terms = self.terms();
        for _ in 0..20 {
            self.commit(leader, 100);
            self.run_for(self.timeout());
            assert_eq!((self.leader(), self.terms()), (Some(leader), terms.clone()));
        }
    }

    /// Nobody who is asked for it can accept proposals, for twenty election time-outs.
    fn stays_without_a_leader(&mut self) {
        for _ in 0..20 * 4 {
            self.run_for(self.timeout() / 4);
            assert_eq!(self.leader(), None);
        }
    }
}

// ---- Slow disks (FAULTS 14)

#[test]
fn a_disk_that_is_a_hundred_times_slower_on_one_follower_costs_commits_nothing() {
    let (mut rig, leader) = Rig::started(3);
    rig.commit_times(leader, 20);
    for slow in (0..3).filter(|node| *node != leader) {
        let (median, longest) = rig.commit_times(leader, 200);
        rig.slow_disk(slow, 100);
        let (slow_median, slow_longest) = rig.commit_times(leader, 200);
        assert!(slow_median <= median * 3 / 2, "of node {slow}: {slow_median} ns, before {median} ns");
        // The slowest of many is the slower one of two disks instead of the second of three.
        assert!(slow_longest <= 4 * longest, "of node {slow}: {slow_longest} ns, before {longest} ns");
        assert_eq!(rig.leader(), Some(leader));
        rig.slow_disk(slow, 1);
        let last = rig.status(leader).commit;
        rig.run_until("it has caught up", |rig| rig.status(slow).durable >= last);
        rig.run_for(SECOND);
    }
}

/// An adaptive core would look in vain for what a slow disk has in work; whoever does not wait for that disk looks on.
#[test]
fn where_disks_are_slow_commands_are_no_work_to_look_for_more_after_and_reads_are() {
    let (mut rig, leader) = Rig::started(3);
    // After as many that it has got used to.
    let worked = |rig: &mut Rig| {
        rig.commit_times(leader, 60);
        let before = rig.turns_worked();
        rig.commit_times(leader, 60);
        rig.turns_worked().iter().zip(before).map(|(after, before)| after - before).collect::<Vec<_>>()
    };
    let all = worked(&mut rig);
    assert!(all.iter().all(|turns| *turns >= 60), "{all:?}");
    let slow = (leader + 1) % 3;
    rig.slow_disk(slow, 100);
    let others = worked(&mut rig);
    assert!((0..3).all(|node| node == slow || others[node] >= 60), "{others:?}, with {slow} slow");
    (0..3).filter(|node| *node != leader).for_each(|node| rig.slow_disk(node, 100));
    let few = worked(&mut rig);
    assert!(
        few.iter().zip(&all).all(|(few, all)| *few < all / 2),
        "{few:?} of {all:?}, with both followers slow"
    );
    rig.slow_disk(leader, 100);
    let few = worked(&mut rig);
    assert!(few.iter().zip(&all).all(|(few, all)| *few < all / 2), "{few:?} of {all:?}, with all disks slow");
    let before = rig.turns_worked();
    rig.query(leader, Consistency::Linearizable).expect("answered");
    assert!(rig.turns_worked()[leader] > before[leader], "a read does not wait for a disk");
    (0..3).for_each(|node| rig.slow_disk(node, 1));
    // One of them may be behind.
    rig.run_for(SECOND);
    let all = worked(&mut rig);
    assert!(all.iter().all(|turns| *turns >= 60), "{all:?}");
}

/// What is under way to a follower whose disk takes nothing is bounded, however much is committed without it.
#[test]
fn a_follower_whose_disk_takes_nothing_is_sent_a_window_and_holds_no_more() {
    let (mut rig, leader) = Rig::started(3);
    let first = rig.commit(leader, 100);
    let slow = (leader + 1) % 3;
    rig.run_until("all have it", |rig| (0..3).all(|node| rig.status(node).durable >= first));
    let forever = rig.context.now() + 25 * SECOND;
    rig.machines[slow].disk.borrow_mut().faults_mut().stalled_until = forever;
    let window = config(0, 3).window_bytes;
    let mut sent = 0;
    while sent < 8 * window {
        rig.commit(leader, 30_000);
        sent += 30_000;
    }
    let held = rig.status(slow).last.get() - first.get();
    assert!(held > 0 && held as usize * 30_000 <= 3 * window, "{held} of {} commands", sent / 30_000);
    assert_eq!(rig.status(slow).durable, first);
}

#[test]
fn a_leader_whose_every_write_takes_longer_than_an_election_hands_over_and_comes_back_as_a_follower() {
    let (mut rig, leader) = Rig::started(3);
    rig.commit(leader, 100);
    let term = rig.status(leader).term;
    // A write takes 60 µs: now some 3 s.
    rig.slow_disk(leader, 50_000);
    rig.propose(leader, 1, 100);
    let begun = rig.context.now();
    rig.run_until("another leads", |rig| rig.leader().is_some_and(|now| now != leader));
    let took = rig.context.now() - begun;
    assert!(took <= 4 * rig.timeout(), "{took} ns");
    let successor = rig.leader().expect("one leads");
    let commit = rig.commit(successor, 100);
    assert!(rig.status(successor).term > term);
    rig.slow_disk(leader, 1);
    rig.run_until("it follows", |rig| rig.status(leader).durable >= commit);
    rig.stays_with(successor);
}

impl Rig {
    /// A command in each millisecond, for as long as `leader` leads, for at most `span`; how long that was.
    fn propose_while_led_by(&mut self, leader: usize, span: Time) -> Time {
        let begun = self.context.now();
        for tag in 0.. {
            if self.leader() != Some(leader) || self.context.now() - begun >= span {
                break;
            }
            self.propose(leader, tag, 300);
            self.run_for(MILLISECOND);
            self.completed(leader);
        }
        self.context.now() - begun
    }

    /// Why a node handed over last.
    fn handed_over(&self, node: usize) -> Option<HandedOver> {
        self.status(node).handed_over
    }
}

/// By how much a disk is slower in which a write takes some 60 ms, far below the election time-out.
const FAR_SLOWER: u64 = 1_000;

impl Rig {
    /// A cluster in which a disk that fills a segment for a second is not taken for one that does not answer.
    fn started_patient(nodes: usize) -> (Self, usize) {
        let mut rig = Self::new(nodes);
        for node in 0..nodes {
            let disk_stall_timeout = Some(Duration::from_secs(20));
            rig.boot(Config { disk_stall_timeout, ..config(node, nodes) });
        }
        let leader = rig.run_until_led();
        (rig, leader)
    }
}

/// It led on: what was proposed waited until its own disk had taken what was before, though the others had it all long ago.
#[test]
fn a_leader_whose_disk_is_far_slower_than_the_others_hands_over_and_stays_away() {
    let (mut rig, leader) = Rig::started_patient(3);
    let (median, _) = rig.commit_times(leader, 200);
    let term = rig.status(leader).term;
    rig.slow_disk(leader, FAR_SLOWER);
    // Four election time-outs, in four parts that each may end a batch or two later, behind the one in which it became slow.
    let led = rig.propose_while_led_by(leader, 20 * SECOND);
    assert!(led <= 8 * rig.timeout(), "{led} ns");
    assert!(led >= 4 * rig.timeout(), "a disk may be slow for a while: {led} ns");
    let successor = rig.run_until_led();
    assert_eq!(rig.status(successor).term.get(), term.get() + 1, "nobody had to notice that it was gone");
    rig.run_until("it has heard of it", |rig| rig.handed_over(leader).is_some());
    let HandedOver { cause, leader: to, term: in_term } = rig.handed_over(leader).expect("in good order");
    assert_eq!((to, in_term.get()), (NodeId(successor as u64 + 1), term.get() + 1));
    let HandoverCause::DiskSlow { own, others } = cause else { panic!("{cause:?}") };
    assert!(own >= Duration::from_millis(20) && own >= 10 * others && !others.is_zero(), "{cause:?}");
    // Under the other one commits are as they were, though the slow disk is one of three.
    let (now, _) = rig.commit_times(successor, 200);
    assert!(now <= 2 * median, "{now} ns, before {median} ns");
    rig.stays_with(successor);
    assert_eq!(rig.handed_over(successor), None);
}

#[test]
fn where_all_disks_are_slow_or_nobody_else_makes_a_quorum_a_leader_stays() {
    for (nodes, all) in [(3, true), (1, false), (2, false)] {
        let (mut rig, leader) = Rig::started_patient(nodes);
        for node in (0..nodes).filter(|node| all || *node == leader) {
            rig.slow_disk(node, FAR_SLOWER);
        }
        let term = rig.status(leader).term;
        rig.propose_while_led_by(leader, 40 * rig.timeout());
        let status = rig.status(leader);
        assert_eq!((rig.leader(), status.term, status.handed_over), (Some(leader), term, None), "{nodes}");
    }
}

/// Of two slow disks in three one is a follower's: a quorum without the leader is as slow as the leader.
#[test]
fn a_leader_that_is_as_slow_as_the_quorum_without_it_stays() {
    let (mut rig, leader) = Rig::started_patient(3);
    for node in [leader, (leader + 1) % 3] {
        rig.slow_disk(node, FAR_SLOWER);
    }
    assert_eq!(rig.propose_while_led_by(leader, 40 * rig.timeout()) / rig.timeout(), 40);
    assert_eq!(rig.leader(), Some(leader));
}

/// Two of five are slow, and the leader is one of them: whoever takes over is not the other one.
#[test]
fn a_slow_leader_hands_over_to_one_that_is_not() {
    for turn in 1..5 {
        let (mut rig, leader) = Rig::started_patient(5);
        let other = (leader + turn) % 5;
        for node in [leader, other] {
            rig.slow_disk(node, FAR_SLOWER);
        }
        let led = rig.propose_while_led_by(leader, 20 * SECOND);
        assert!(led <= 8 * rig.timeout(), "{led} ns");
        let successor = rig.run_until_led();
        assert!(successor != other && successor != leader);
        rig.propose_while_led_by(successor, 20 * rig.timeout());
        assert_eq!(rig.leader(), Some(successor));
    }
}

#[test]
fn a_leader_that_is_told_to_put_up_with_its_slow_disk_stays() {
    let mut rig = Rig::new(3);
    let disk_stall_timeout = Some(Duration::from_secs(20));
    (0..3).for_each(|node| {
        rig.boot(Config { disk_slow_factor: 0, disk_stall_timeout, ..config(node, 3) });
    });
    let leader = rig.run_until_led();
    rig.slow_disk(leader, FAR_SLOWER);
    assert_eq!(rig.propose_while_led_by(leader, 40 * rig.timeout()) / rig.timeout(), 40);
    assert_eq!(rig.leader(), Some(leader));
}

/// Single stalls say nothing of a disk, however often each is the one batch that was being timed.
#[test]
fn a_leader_whose_disk_is_slow_now_and_then_stays() {
    let (mut rig, leader) = Rig::started_patient(3);
    for _ in 0..6 {
        rig.slow_disk(leader, FAR_SLOWER);
        assert_eq!(rig.propose_while_led_by(leader, 2 * rig.timeout()) / rig.timeout(), 2);
        rig.slow_disk(leader, 1);
        assert_eq!(rig.propose_while_led_by(leader, 2 * rig.timeout()) / rig.timeout(), 2);
    }
    assert_eq!(rig.leader(), Some(leader));
}

/// Whom it asks stands still: it gives up, and takes commands at once.
#[test]
fn a_slow_leader_whose_successor_does_not_take_over_leads_on_at_once() {
    let (mut rig, leader) = Rig::started_patient(3);
    let term = rig.status(leader).term;
    rig.slow_disk(leader, FAR_SLOWER);
    let target = |rig: &Rig| {
        let process = rig.machines[leader].process.as_ref().expect("it runs");
        process.driver.raft().and_then(|raft| raft.transfer_target())
    };
    for tag in 0..20_000 {
        rig.propose(leader, tag, 300);
        let end = rig.context.now() + MILLISECOND;
        while target(&rig).is_none() && rig.next().0 <= end {
            rig.step();
        }
        if target(&rig).is_some() {
            break;
        }
        rig.context.advance_to(end);
        rig.completed(leader);
    }
    let to = target(&rig).expect("it hands over");
    rig.still = Some(to.get() as usize - 1);
    let begun = rig.context.now();
    rig.run_until("it gives up", |rig| target(rig).is_none());
    assert!(rig.context.now() - begun <= rig.timeout() + 10 * MILLISECOND);
    assert_eq!((rig.leader(), rig.status(leader).term, rig.handed_over(leader)), (Some(leader), term, None));
    rig.completed(leader);
    rig.commit(leader, 300);
    assert_eq!((rig.leader(), rig.status(leader).term), (Some(leader), term));
}

// ---- Operations that never complete (FAULTS 15)

#[test]
fn a_leader_whose_disk_never_answers_leads_no_longer_than_an_election_lasts_says_nothing_durable_and_ends_by_name()
 {
    let (mut rig, leader) = Rig::started(3);
    let first = rig.commit(leader, 100);
    let (other, third) = ((leader + 1) % 3, (leader + 2) % 3);
    rig.run_until("all have it", |rig| (0..3).all(|node| rig.status(node).durable >= first));
    // Two are left, and the leader's disk takes no more: nothing can be committed, nobody can be elected.
    rig.kill(third);
    rig.machines[leader].disk.borrow_mut().faults_mut().stalled_until = Time::MAX / 2;
    let (begun, timeout) = (rig.context.now(), rig.timeout());
    rig.propose(leader, 1, 100);
    rig.run_until("it steps down", |rig| rig.status(leader).role != Role::Leader);
    assert!(rig.context.now() - begun <= timeout + 50 * MILLISECOND);
    let stop = config(0, 3).disk_stall_stop.as_nanos() as Time;
    while rig.context.now() < begun + stop - SECOND {
        rig.run_for(timeout / 2);
        assert_eq!(rig.leader(), None, "nobody has the vote of a disk that does not answer");
        assert_eq!((rig.status(leader).durable, rig.status(leader).commit), (first, first));
        assert_eq!(rig.status(other).commit, first, "nothing counts on it");
    }
    assert!(rig.status(leader).damage.disk_stalled_ms.is_some());
    let ended = rig.run_until_ended(leader);
    let error = ended.stopped.expect("it says why");
    assert!(matches!(error.error(), StopError::DiskStalled { .. }), "{error}");
    assert!(rig.context.now() - begun <= stop + SECOND);
    // With a disk that answers there is a majority again, and nothing is lost.
    rig.machines[leader].disk.borrow_mut().faults_mut().stalled_until = 0;
    rig.boot(config(third, 3));
    let next = rig.run_until_led();
    rig.commit(next, 100);
    rig.boot(config(leader, 3));
    let end = rig.commit(next, 100);
    rig.run_until("all have it", |rig| (0..3).all(|node| rig.status(node).durable >= end));
}

// ---- One direction only (FAULTS 17)

/// Whichever directed link fails, there is a leader within some election time-outs, and it stays: terms do not rise, also not
/// when the link is mended.
#[test]
fn one_directed_link_that_fails_costs_at_most_one_election() {
    for (from, to) in [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)] {
        let (mut rig, leader) = Rig::started(3);
        rig.commit(leader, 100);
        let term = rig.status(leader).term.get();
        rig.fabric.borrow_mut().cut(from, to);
        rig.run_for(SETTLED * rig.timeout());
        let now = rig.run_until_led();
        rig.stays_with(now);
        assert!(
            rig.terms().iter().all(|now| *now <= term + 1),
            "{from} to {to}: {:?}, before {term}",
            rig.terms()
        );
        rig.fabric.borrow_mut().heal(from, to);
        rig.run_for(SETTLED * rig.timeout());
        rig.stays_with(now);
    }
}

/// A node that hears nobody and is heard by all.
#[test]
fn a_member_that_hears_nobody_and_is_heard_by_all_unseats_no_leader() {
    for deaf in 0..3 {
        let (mut rig, leader) = Rig::started(3);
        rig.commit(leader, 100);
        let term = rig.status(leader).term.get();
        for other in (0..3).filter(|other| *other != deaf) {
            rig.fabric.borrow_mut().cut(other, deaf);
        }
        rig.run_for(SETTLED * rig.timeout());
        let now = rig.run_until_led();
        assert!(now != deaf, "nobody leads whom nobody is heard by");
        let terms = rig.terms();
        for _ in 0..10 {
            rig.commit(now, 100);
            rig.run_for(rig.timeout());
        }
        assert_eq!((rig.leader(), rig.terms()), (Some(now), terms));
        assert!(rig.status(now).term.get() <= term + 1);
        rig.fabric.borrow_mut().heal_all();
        rig.run_for(SETTLED * rig.timeout());
        rig.stays_with(now);
    }
}

// ---- Named topologies (FAULTS 18)

/// 0 - 1 - 2: whoever leads at an end is not heard at the other. That one must not unseat it again and again: the middle hears the
/// leader, and grants no pre-vote.
#[test]
fn in_a_chain_of_three_the_leader_stays_wherever_it_is() {
    for middle in 0..3 {
        let (mut rig, leader) = Rig::started(3);
        rig.commit(leader, 100);
        let term = rig.status(leader).term.get();
        let ends = [(middle, (middle + 1) % 3), (middle, (middle + 2) % 3)];
        rig.only(&ends);
        rig.run_for(SETTLED * rig.timeout());
        assert_eq!(rig.leader(), Some(leader), "it reaches a quorum");
        rig.stays_with(leader);
        assert!(rig.terms().iter().all(|now| *now == term), "{:?}", rig.terms());
        rig.fabric.borrow_mut().heal_all();
        let end = rig.commit(leader, 100);
        rig.run_until("all have it", |rig| (0..3).all(|node| rig.status(node).durable >= end));
        rig.stays_with(leader);
    }
}

/// Of five only one reaches a quorum, and it hears the leader, which does not: the leader gives way, and that one leads.
#[test]
fn whoever_alone_reaches_a_quorum_leads_although_it_hears_a_leader_that_does_not() {
    let (mut rig, leader) = Rig::started(5);
    let end = rig.commit(leader, 100);
    rig.run_until("all have it", |rig| (0..5).all(|node| rig.status(node).durable >= end));
    let term = rig.status(leader).term.get();
    for step in 1..5 {
        let centre = (leader + step) % 5;
        rig.fabric.borrow_mut().heal_all();
        rig.run_for(SETTLED * rig.timeout());
        let links: Vec<_> = (0..5).filter(|other| *other != centre).map(|other| (centre, other)).collect();
        rig.only(&links);
        rig.run_for(2 * SETTLED * rig.timeout());
        rig.run_until("the centre leads", |rig| rig.leader() == Some(centre));
        rig.stays_with(centre);
    }
    assert!(rig.terms().iter().all(|now| *now <= term + 4 * 4), "{:?}, before {term}", rig.terms());
}

/// The one that reaches a quorum lacks an entry that is committed, and those that have it reach no quorum: this is where Raft has
/// no leader, since who votes for it would lose the entry. Terms do not rise meanwhile, and one more link suffices.
#[test]
fn while_whoever_reaches_a_quorum_lacks_what_is_committed_nobody_leads_and_one_more_link_ends_it() {
    let (mut rig, leader) = Rig::started(5);
    let end = rig.commit(leader, 100);
    rig.run_until("all have it", |rig| (0..5).all(|node| rig.status(node).durable >= end));
    let others: Vec<usize> = (0..5).filter(|node| *node != leader).collect();
    let centre = others[0];
    // It misses an entry of which the others have each a copy, and then the leader is gone.
    for other in (0..5).filter(|other| *other != centre) {
        rig.fabric.borrow_mut().cut(centre, other);
        rig.fabric.borrow_mut().cut(other, centre);
    }
    let missed = rig.commit(leader, 100);
    rig.run_until("the others have it", |rig| {
        others[1..].iter().all(|node| rig.status(*node).durable >= missed)
    });
    rig.kill(leader);
    rig.fabric.borrow_mut().heal_all();
    let links: Vec<_> = others[1..].iter().map(|other| (centre, *other)).collect();
    rig.only(&links);
    rig.run_for(SETTLED * rig.timeout());
    let terms = rig.terms();
    rig.stays_without_a_leader();
    assert_eq!(rig.terms(), terms, "pre-votes cost no terms");
    assert!(rig.status(centre).last < missed);
    // One of those that have it reaches the centre and another one: a quorum.
    rig.fabric.borrow_mut().heal(others[1], others[2]);
    rig.fabric.borrow_mut().heal(others[2], others[1]);
    rig.run_for(SETTLED * rig.timeout());
    let now = rig.run_until_led();
    assert!([others[1], others[2]].contains(&now), "{now}");
    let last = rig.commit(now, 100);
    rig.run_until("the centre has it", |rig| rig.status(centre).durable >= last);
    rig.stays_with(now);
}

// ---- A disk that was set back (FAULTS 37)

/// As far as that can be known: who dials names the number of its start, and peers that have met a later one refuse it. The
/// ones that it dials are those with lower ids; it is dialed by the others, and names none to them.
#[test]
fn a_directory_that_was_set_back_is_refused_by_those_who_have_met_a_later_start_and_nothing_counts_on_it() {
    let (mut rig, _) = Rig::started(3);
    let back = 2;
    rig.kill(back);
    let old = rig.machines[back].disk.borrow().fork(&rig.context);
    let mut end = LogIndex(0);
    for _ in 0..3 {
        rig.boot(config(back, 3));
        rig.run_for(SETTLED * rig.timeout());
        let leader = rig.run_until_led();
        end = rig.commit(leader, 100);
        rig.run_until("all have it", |rig| (0..3).all(|node| rig.status(node).durable >= end));
        rig.kill(back);
    }
    rig.run_for(SETTLED * rig.timeout());
    let leader = rig.run_until_led();
    let term = rig.status(leader).term;
    rig.machines[back].disk = old;
    rig.boot(config(back, 3));
    for _ in 0..20 {
        rig.run_for(rig.timeout());
        rig.commit(leader, 100);
        assert!((0..2).all(|other| !rig.process(back).driver.has_session_with(NodeId(other + 1))));
    }
    assert!(rig.status(back).last < end, "it lacks what it had acknowledged");
    assert_eq!((rig.leader(), rig.status(leader).term), (Some(leader), term));
    // Also where its word would make a majority.
    let commit = rig.commit(leader, 100);
    rig.kill(1 - leader);
    rig.propose(leader, 7, 100);
    rig.run_for(SETTLED * rig.timeout());
    assert_eq!((rig.leader(), rig.status(leader).commit), (None, commit));
    assert!(rig.status(back).role != Role::Leader);
}
