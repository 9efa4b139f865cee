//! Sessions over real drivers: what is proposed again is applied once, whoever leads.

use super::{Rig, config};
use ringraft::config::Config;
use ringraft::error::{ProposeError, Refusal, Refused, UnknownOutcome};
use ringraft::handle::{Committed, Outcome};
use ringraft::mutants::{self, Mutant};
use ringraft::sessions::{Resolved, Session, SessionLimits, SessionProposal, SessionRefusal};
use ringraft_block::LogIndex;
use ringraft_tests::sim::context::{MILLISECOND, SECOND};
use ringraft_tests::sim::rng::Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

impl Rig {
    /// Lets things happen until the future is ready.
    fn finish<F: Future + Unpin>(&mut self, mut future: F) -> F::Output {
        self.wake();
        for _ in 0..1_000_000 {
            if let Poll::Ready(output) = poll(&mut future) {
                return output;
            }
            self.step();
        }
        panic!("never ready");
    }

    /// What a handle's signal does: every node takes a turn now.
    fn wake(&mut self) {
        self.machines
            .iter_mut()
            .filter_map(|machine| machine.process.as_mut())
            .for_each(|process| process.wake_at = 0);
    }

    fn open(&mut self, node: usize) -> Session {
        let opening = self.process(node).handle.open_session();
        self.finish(opening).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The session through the node that leads.
    fn led(&mut self, session: &Session) -> Session {
        let leader = self.run_until_led();
        session.through(&self.process(leader).handle)
    }

    fn until_equal(&mut self) {
        self.run_until("all have applied the same", |rig| {
            let mut running = rig.machines.iter().filter_map(|machine| machine.process.as_ref());
            let first = running.next().map(|process| process.driver.applied());
            first.is_some_and(|first| first.0 > LogIndex(0))
                && running.all(|process| Some(process.driver.applied()) == first)
        });
    }

    fn table(&self, node: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        let process = self.machines[node].process.as_ref().expect("it runs");
        process.driver.sessions().encode(&mut bytes);
        bytes
    }

    fn applied_in_sessions(&self, node: usize) -> &[((u64, u64), LogIndex)] {
        &self.machines[node].process.as_ref().expect("it runs").driver.machine().in_sessions
    }

    /// All nodes have applied these sequences of the session and nothing else of it, each once; their tables are equal.
    fn assert_applied(&mut self, session: &Session, sequences: &[u64]) {
        self.until_equal();
        for node in 0..self.machines.len() {
            let of_session = self.applied_in_sessions(node).iter().filter(|((id, _), _)| *id == session.id());
            let applied: Vec<u64> = of_session.map(|((_, sequence), _)| *sequence).collect();
            assert_eq!(applied, sequences, "node {node}");
            assert_eq!(self.table(node), self.table(0), "node {node}");
        }
    }
}

fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
}

fn refusal(outcome: Outcome) -> SessionRefusal {
    match outcome {
        Err(ProposeError::Refused(Refused { reason: Refusal::Session(refusal), .. })) => refusal,
        other => panic!("{other:?}"),
    }
}

/// The floor, if the attempt was refused for lying below it: what became of an earlier one is not known any more.
fn below(outcome: &Outcome) -> Option<u64> {
    match outcome {
        Err(ProposeError::Unknown(UnknownOutcome::EarlierAttempt { reason, .. })) => match **reason {
            Refusal::Session(SessionRefusal::BelowFloor { floor }) => Some(floor),
            _ => None,
        },
        _ => None,
    }
}

#[test]
fn a_command_that_is_proposed_again_is_answered_as_before_and_applied_once() {
    let (mut rig, leader) = Rig::started(3);
    let session = rig.open(leader);
    let first = session.propose("a");
    let again = session.propose_with_sequence(first.sequence(), "a");
    let second = session.propose("b");
    let first = rig.finish(first).expect("committed");
    assert_eq!(rig.finish(again).expect("committed"), first, "in the same batch");
    let second = rig.finish(second).expect("committed");
    assert_eq!([&first, &second].map(|committed| committed.reply[0]), [1, 2]);
    let again = session.propose_with_sequence(1, "a");
    assert_eq!(rig.finish(again).expect("committed"), first, "later");
    rig.assert_applied(&session, &[1, 2]);
    assert_eq!(rig.finish(session.resolve(2)).expect("resolved"), Resolved::Committed(second));
}

#[test]
fn a_command_that_is_proposed_again_across_a_failover_is_applied_exactly_once() {
    let (mut survived, mut lost) = (0, 0);
    for steps in 0..60 {
        let (mut rig, leader) = Rig::started(3);
        let session = rig.open(leader);
        rig.finish(session.propose("before")).expect("committed");
        let mut proposal = session.propose("command");
        rig.wake();
        (0..steps).for_each(|_| rig.step());
        let told = poll(&mut proposal);
        rig.kill(leader);
        drop(proposal);
        let session = rig.led(&session);
        let end = rig.status(rig.leader().expect("a leader")).last;
        let committed = rig.finish(session.propose_with_sequence(2, "command")).expect("committed");
        if let Poll::Ready(told) = told {
            assert_eq!(
                told.expect("committed"),
                committed,
                "told before the leader died, after {steps} steps"
            );
        }
        *(if committed.index <= end { &mut survived } else { &mut lost }) += 1;
        assert_eq!(committed.reply[..], 2_u64.to_le_bytes());
        rig.boot(config(leader, 3));
        rig.assert_applied(&session, &[1, 2]);
    }
    assert!(survived > 5 && lost > 1, "{survived} survived the leader, {lost} were lost with it");
}

/// A leader that is cut off takes a command; the next leader is asked what became of it.
#[test]
fn what_was_resolved_as_never_applied_is_refused_when_it_arrives_late() {
    let (mut rig, old) = Rig::started(3);
    let session = rig.open(old);
    rig.finish(session.propose("first")).expect("committed");
    for node in (0..3).filter(|node| *node != old) {
        rig.fabric.borrow_mut().cut(old, node);
        rig.fabric.borrow_mut().cut(node, old);
    }
    let lost = session.propose("command");
    rig.wake();
    rig.run_until("another leads", |rig| rig.leader().is_some_and(|leader| leader != old));
    let new = rig.led(&session);
    assert_eq!(rig.finish(new.resolve(2)).expect("resolved"), Resolved::NeverApplied);
    rig.fabric.borrow_mut().heal_all();
    let outcome = rig.finish(lost);
    let unknown = matches!(outcome, Err(ProposeError::Unknown(UnknownOutcome::LeadershipLost { .. })));
    assert!(unknown, "{outcome:?}");
    assert_eq!(refusal(rig.finish(new.propose_with_sequence(2, "command"))), SessionRefusal::Fenced);
    assert_eq!(rig.finish(new.resolve(2)).expect("resolved"), Resolved::NeverApplied);
    assert_eq!(rig.finish(new.propose("third")).expect("committed").reply[0], 2);
    rig.assert_applied(&session, &[1, 3]);
}

#[test]
fn a_number_that_was_resolved_before_it_was_used_is_given_to_no_command() {
    let (mut rig, leader) = Rig::started(1);
    let session = rig.open(leader);
    assert_eq!(rig.finish(session.resolve(1)).expect("resolved"), Resolved::NeverApplied);
    let proposal = session.propose("first");
    assert_eq!(proposal.sequence(), 2);
    rig.finish(proposal).expect("not refused for a fence that another number has");
    rig.assert_applied(&session, &[2]);
}

/// The client that resumes it knows which sequences are settled; the cluster does not.
#[test]
fn a_resumed_session_is_not_refused_for_what_it_has_not_acknowledged_yet() {
    let mut rig = Rig::new(1);
    rig.boot(Config { session_window: 8, ..config(0, 1) });
    rig.run_until_led();
    let mut session = rig.open(0);
    for round in 0..5 {
        for _ in 0..8 {
            let proposal = session.propose("x");
            match proposal.sequence() {
                // By the session itself, which is acknowledging.
                0 => rig.run_for(10 * MILLISECOND),
                sequence => {
                    let outcome = rig.finish(proposal);
                    outcome.unwrap_or_else(|error| panic!("round {round}, {sequence}: {error}"));
                }
            }
        }
        session = rig.process(0).handle.resume_session(session.position());
    }
    let next = session.position().next;
    assert!(next > 25, "{next}");
    rig.assert_applied(&session, &(1..next).collect::<Vec<_>>());
}

#[test]
fn a_silent_session_expires_by_the_logs_clock_and_so_equally_on_members_with_any_clock() {
    let mut rig = Rig::new(3);
    // Behind the leader, ahead of it, and as far as a day: only the leader's clock gets into the log.
    for (machine, ahead_ms) in rig.machines.iter_mut().zip([86_400_000, 0, 20_000]) {
        machine.wall_ahead_ms = ahead_ms;
    }
    for node in 0..3 {
        rig.boot(Config { session_timeout: Duration::from_secs(10), ..config(node, 3) });
    }
    let leader = rig.run_until_led();
    let (kept, silent) = (rig.open(leader), rig.open(leader));
    rig.finish(silent.propose("a")).expect("committed");
    for _ in 0..3 {
        rig.run_for(6 * SECOND);
        rig.finish(kept.acknowledge(0)).expect("alive");
    }
    assert_eq!(refusal(rig.finish(silent.propose("b"))), SessionRefusal::Expired);
    rig.finish(kept.propose("c")).expect("committed");
    rig.assert_applied(&kept, &[1]);
    rig.assert_applied(&silent, &[1]);
    // A member that applies the same log much later comes to the same.
    let late = (leader + 1) % 3;
    rig.shutdown(late);
    rig.run_until_ended(late);
    rig.run_for(60 * SECOND);
    rig.boot(config(late, 3));
    rig.assert_applied(&kept, &[1]);
    assert_eq!(refusal(rig.finish(kept.propose("d"))), SessionRefusal::Expired);
    rig.assert_applied(&kept, &[1]);
}

/// The leader's clock tells next year for a moment: the log keeps that time, and must not stand still until then.
#[test]
fn a_session_expires_although_the_leaders_clock_was_ahead_and_has_been_set_right() {
    let mut rig = Rig::new(1);
    rig.boot(Config { session_timeout: Duration::from_secs(10), ..config(0, 1) });
    rig.run_until_led();
    rig.machines[0].wall_ahead_ms = 365 * 86_400_000;
    let silent = rig.open(0);
    rig.machines[0].wall_ahead_ms = 0;
    let kept = rig.open(0);
    for _ in 0..4 {
        rig.run_for(4 * SECOND);
        rig.finish(kept.acknowledge(0)).expect("alive");
    }
    assert_eq!(refusal(rig.finish(silent.propose("late"))), SessionRefusal::Expired);
    rig.finish(kept.propose("alive")).expect("committed");
}

#[test]
fn a_full_table_refuses_another_session_by_name_and_drops_none() {
    let mut rig = Rig::new(3);
    let limits = |node| {
        let config = config(node, 3);
        let bytes = config.session_limits().bytes();
        Config { session_table_bytes_max: 2 * bytes + 1, ..config }
    };
    for node in 0..3 {
        rig.boot(limits(node));
    }
    let leader = rig.run_until_led();
    let sessions = [rig.open(leader), rig.open(leader)];
    let opening = rig.process(leader).handle.open_session();
    let SessionLimits { table_bytes_max, .. } = limits(0).session_limits();
    let full = SessionRefusal::TableFull { reserved_bytes: table_bytes_max - 1, table_bytes_max };
    assert_eq!(refusal(rig.finish(opening).map(|_| unreachable!("there is no room"))), full);
    for session in &sessions {
        rig.finish(session.propose("x")).expect("committed");
    }
    rig.finish(sessions[0].close()).expect("closed");
    assert_eq!(refusal(rig.finish(sessions[0].propose("y"))), SessionRefusal::Expired);
    let next = rig.open(leader);
    rig.finish(next.propose("z")).expect("committed");
    rig.assert_applied(&next, &[1]);
    rig.assert_applied(&sessions[1], &[1]);
}

/// Four windows one behind the other, and a reply that is no longer kept.
#[test]
fn a_session_acknowledges_by_the_way_and_forgets_in_order() {
    let mut rig = Rig::new(3);
    for node in 0..3 {
        rig.boot(Config { session_window: 8, session_reply_bytes_max: 12, ..config(node, 3) });
    }
    let leader = rig.run_until_led();
    let session = rig.open(leader);
    for sequence in 1..=32 {
        let proposal = session.propose("x");
        assert_eq!(proposal.sequence(), sequence);
        rig.finish(proposal).expect("committed");
    }
    let floor = match below(&rig.finish(session.propose_with_sequence(1, "x"))) {
        Some(floor) => floor,
        None => panic!("nobody knows any more whether it was applied"),
    };
    assert!((25..=32).contains(&floor), "{floor}");
    let again = rig.finish(session.propose_with_sequence(32, "x")).expect("kept");
    assert_eq!(again.reply[..], 32_u64.to_le_bytes());
    // Of replies of 8 bytes, one fits.
    let gone = rig.finish(session.propose_with_sequence(31, "x"));
    assert!(matches!(gone, Err(ProposeError::ReplyGone { index, .. }) if index < again.index), "{gone:?}");
    assert!(matches!(rig.finish(session.resolve(31)), Ok(Resolved::ReplyGone { .. })));
    rig.assert_applied(&session, &(1..=32).collect::<Vec<_>>());
}

#[test]
fn a_pipeline_proposes_in_a_session_too() {
    let (mut rig, leader) = Rig::started(1);
    let session = rig.open(leader);
    for tag in 0..6 {
        let sequence = 1 + tag / 2;
        rig.process(leader).pipeline.submit_in_session(tag, (session.id(), sequence), "x").expect("taken");
    }
    rig.wake();
    let mut done = Vec::new();
    while done.len() < 6 {
        rig.step();
        done.extend(rig.completed(leader));
    }
    let replies: Vec<u8> = done.iter().map(|one| one.outcome.as_ref().expect("committed").reply[0]).collect();
    assert_eq!(replies, [1, 1, 2, 2, 3, 3]);
    rig.assert_applied(&session, &[1, 2, 3]);
}

// ---- Random runs

/// A client that asks for more than is good, on nodes that die, over clocks that disagree; and an observer.
struct Run {
    rig: Rig,
    rng: Rng,
    sessions: Vec<Known>,
    /// By applied index, what the table was on the first node that got there.
    tables: BTreeMap<LogIndex, Vec<u8>>,
    seen: Vec<LogIndex>,
    coverage: Coverage,
}

struct Known {
    session: Session,
    /// What was promised of sequences.
    committed: BTreeMap<u64, Committed>,
    never: BTreeSet<u64>,
}

#[derive(Clone, Copy, Default)]
struct Coverage {
    duplicates: u32,
    fenced: u32,
    below: u32,
    expired: u32,
    unknown: u32,
    failovers: u32,
}

fn tuned(node: usize) -> Config {
    Config {
        session_timeout: Duration::from_secs(8),
        session_window: 8,
        session_reply_bytes_max: 40,
        ..config(node, 3)
    }
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut rig = Rig::seeded(3, seed);
        let mut rng = Rng::new(seed ^ 0x5e55_1045);
        for node in 0..3 {
            rig.machines[node].wall_ahead_ms = rng.below(3_000);
            rig.boot(tuned(node));
        }
        rig.run_until_led();
        let (sessions, tables, coverage) = Default::default();
        Self { rig, rng, sessions, tables, seen: vec![LogIndex(0); 3], coverage }
    }

    fn step(&mut self) -> Result<(), String> {
        self.rig.step();
        for node in 0..3 {
            let Some(process) = &self.rig.machines[node].process else {
                self.seen[node] = LogIndex(0);
                continue;
            };
            let (applied, _) = process.driver.applied();
            if applied == self.seen[node] || applied == LogIndex(0) {
                continue;
            }
            self.seen[node] = applied;
            let table = self.rig.table(node);
            let expected = self.tables.entry(applied).or_insert_with(|| table.clone());
            if *expected != table {
                return Err(format!("at index {applied} node {node} has another table than the first there"));
            }
        }
        Ok(())
    }

    fn finish<F: Future + Unpin>(&mut self, mut future: F) -> Result<Option<F::Output>, String> {
        self.rig.wake();
        let deadline = self.rig.context.now() + 3 * SECOND;
        while self.rig.context.now() < deadline {
            if let Poll::Ready(output) = poll(&mut future) {
                return Ok(Some(output));
            }
            self.step()?;
        }
        Ok(None)
    }

    /// Lets a little happen, and takes note of outcomes that nobody waits for.
    fn wait(&mut self, span: u64) -> Result<(), String> {
        let end = self.rig.context.now() + span;
        while self.rig.next().0 <= end {
            self.step()?;
        }
        self.rig.context.advance_to(end.max(self.rig.context.now()));
        Ok(())
    }

    fn told(&mut self, known: usize, sequence: u64, outcome: Outcome) -> Result<(), String> {
        let Known { committed, never, .. } = &mut self.sessions[known];
        self.coverage.below += u32::from(below(&outcome).is_some());
        match outcome {
            Ok(found) => {
                if never.contains(&sequence) {
                    return Err(format!(
                        "sequence {sequence} was resolved as never applied, and is at {found:?}"
                    ));
                }
                if let Some(before) = committed.insert(sequence, found.clone()) {
                    self.coverage.duplicates += 1;
                    if before != found {
                        return Err(format!("sequence {sequence} was told {before:?}, then {found:?}"));
                    }
                }
            }
            Err(ProposeError::ReplyGone { index, .. }) => {
                let before = committed.get(&sequence).map(|before| before.index);
                if before.is_some_and(|before| before != index) {
                    return Err(format!("sequence {sequence} was told {before:?}, then {index}"));
                }
            }
            Err(ProposeError::Refused(Refused { reason: Refusal::Session(refusal), .. })) => match refusal {
                SessionRefusal::BelowFloor { .. } => self.coverage.below += 1,
                SessionRefusal::Expired => self.coverage.expired += 1,
                SessionRefusal::Fenced if committed.contains_key(&sequence) => {
                    return Err(format!("sequence {sequence} was committed and is fenced"));
                }
                SessionRefusal::Fenced => self.coverage.fenced += 1,
                SessionRefusal::BeyondWindow { .. } | SessionRefusal::TableFull { .. } => {}
            },
            Err(ProposeError::Refused(_)) => {}
            Err(ProposeError::Unknown(_)) => self.coverage.unknown += 1,
        }
        Ok(())
    }

    fn propose(&mut self, known: usize, proposal: SessionProposal) -> Result<(), String> {
        let sequence = proposal.sequence();
        if self.rng.chance(300_000) {
            // The client loses patience.
            drop(proposal);
            self.rig.wake();
            return self.wait(self.rng.clone().below(5 * MILLISECOND));
        }
        match self.finish(proposal)? {
            Some(outcome) => self.told(known, sequence, outcome),
            None => Ok(()),
        }
    }

    fn act(&mut self) -> Result<(), String> {
        if let Some(down) = (0..3).find(|node| self.rig.machines[*node].process.is_none()) {
            if self.rng.chance(300_000) {
                self.rig.boot(tuned(down));
            }
        } else if self.rng.chance(60_000) {
            let leader = self.rig.leader();
            let node = leader.filter(|_| self.rng.chance(700_000)).unwrap_or_else(|| self.rng.index(3));
            self.coverage.failovers += u32::from(leader == Some(node));
            self.rig.kill(node);
        }
        while self.rig.leader().is_none() {
            self.step()?;
        }
        let leader = self.rig.leader().expect("a leader");
        let handle = self.rig.process(leader).handle.clone();
        if self.sessions.is_empty() || self.sessions.len() < 40 && self.rng.chance(20_000) {
            if let Some(Ok(session)) = self.finish(handle.open_session())? {
                self.sessions.push(Known { session, committed: BTreeMap::new(), never: BTreeSet::new() });
            }
            return Ok(());
        }
        // Mostly the newest.
        let back = if self.rng.chance(700_000) { 0 } else { self.rng.index(self.sessions.len()) };
        let known = self.sessions.len() - 1 - back;
        let session = self.sessions[known].session.through(&handle);
        let next = session.position().next;
        let sequence = next.saturating_sub(self.rng.below(12)).max(1);
        match self.rng.below(100) {
            0..=34 => self.propose(known, session.propose("new")),
            35..=64 => self.propose(known, session.propose_with_sequence(sequence, "again")),
            65..=79 => {
                let Some(outcome) = self.finish(session.resolve(sequence))? else { return Ok(()) };
                match outcome {
                    Ok(Resolved::Committed(committed)) => self.told(known, sequence, Ok(committed)),
                    Ok(Resolved::ReplyGone { index, term }) => {
                        self.told(known, sequence, Err(ProposeError::ReplyGone { index, term }))
                    }
                    Ok(Resolved::NeverApplied) => {
                        let Known { committed, never, .. } = &mut self.sessions[known];
                        never.insert(sequence);
                        match committed.get(&sequence) {
                            Some(before) => Err(format!("{before:?} is said to have never been applied")),
                            None => Ok(()),
                        }
                    }
                    Err(_) => Ok(()),
                }
            }
            80..=91 => self.finish(session.acknowledge(sequence)).map(|_| ()),
            92..=96 => self.wait(self.rng.clone().below(SECOND)),
            97 => self.finish(session.close()).map(|_| ()),
            98 => self.wait(9 * SECOND),
            _ => {
                let node = self.rng.index(3);
                self.rig.machines[node].wall_ahead_ms = self.rng.below(3_000);
                Ok(())
            }
        }
    }

    fn check(&mut self) -> Result<(), String> {
        for node in 0..3 {
            let mut seen = BTreeMap::new();
            for (session, index) in self.rig.applied_in_sessions(node) {
                if let Some(before) = seen.insert(*session, *index) {
                    return Err(format!("node {node} applied {session:?} at {before} and at {index}"));
                }
            }
            for Known { session, committed, never } in &self.sessions {
                let of = |sequence: &u64| seen.get(&(session.id(), *sequence)).copied();
                if let Some(sequence) = never.iter().find(|sequence| of(sequence).is_some()) {
                    return Err(format!("sequence {sequence} is applied, and was resolved as never applied"));
                }
                let lost = committed.iter().find(|(sequence, told)| of(sequence) != Some(told.index));
                if let Some((sequence, told)) = lost {
                    return Err(format!("sequence {sequence}: told {told:?}, applied at {:?}", of(sequence)));
                }
            }
        }
        Ok(())
    }
}

fn run(seed: u64, actions: usize) -> Result<Coverage, String> {
    let mut run = Run::new(seed);
    for _ in 0..actions {
        run.act()?;
    }
    for node in 0..3 {
        if run.rig.machines[node].process.is_none() {
            run.rig.boot(tuned(node));
        }
    }
    run.wait(5 * SECOND)?;
    run.rig.until_equal();
    run.check()?;
    Ok(run.coverage)
}

#[test]
fn random_clients_on_random_failures_get_each_command_applied_at_most_once_and_as_they_were_told() {
    let mut all = Coverage::default();
    for seed in 0..30 {
        let coverage = run(seed, 300).unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
        all.duplicates += coverage.duplicates;
        all.fenced += coverage.fenced;
        all.below += coverage.below;
        all.expired += coverage.expired;
        all.unknown += coverage.unknown;
        all.failovers += coverage.failovers;
    }
    let Coverage { duplicates, fenced, below, expired, unknown, failovers } = all;
    println!(
        "{duplicates} duplicates, {fenced} fenced, {below} below, {expired} expired, {unknown} unknown, {failovers} failovers"
    );
    for (what, times) in [
        ("duplicates", duplicates),
        ("fenced", fenced),
        ("below the floor", below),
        ("expired", expired),
        ("unknown", unknown),
        ("failovers", failovers),
    ] {
        assert!(times >= 20, "{what}: {times} times");
    }
}

#[test]
fn each_bug_of_sessions_that_is_put_back_is_noticed() {
    for mutant in Mutant::SESSIONS {
        mutants::set(Some(mutant));
        let noticed = (0..12).find_map(|seed| run(seed, 300).err().map(|why| (seed, why)));
        mutants::set(None);
        println!("{mutant:?}: {noticed:?}");
        assert!(noticed.is_some(), "{mutant:?} goes unnoticed");
    }
}
