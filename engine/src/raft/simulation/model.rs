//! Every run of a small cluster of real cores, up to bounds: what the random runs are likely to find, this finds for certain, as
//! far as the bounds reach.
//!
//! A state is the cores, what is durable at each, and what is under way between them; a step delivers a message, makes the next write or save of a node durable, lets a time-out fire, proposes a batch, breaks a session, or crashes a node
//! and starts it again. States that differ only in times, in rounds or in the draws of election times count as one: time
//! is made to mean nothing, by time-outs that have always passed, so that a node that may campaign may do so in any
//! state, and a follower never sticks to a leader. What stickiness and leases promise is thus not looked at here; what they
//! rest on, elections, the log and commits, is looked at under every timing.
//!
//! Bounds: terms, proposals, crashes, broken sessions, lost messages, and messages under way at a time. `MODEL=full` runs the
//! wide ones.

use crate::mutants::{self, Mutant};
use crate::raft::invariants::{self, State};
use crate::raft::role::RoleState;
use crate::raft::*;
use ringraft_block::Incarnation;
use std::collections::hash_map::{DefaultHasher, Entry};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{Hash, Hasher};

/// How far the search goes.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    nodes: u64,
    terms: u64,
    proposals: u32,
    crashes: u32,
    /// Sessions that break, with all that is under way in them.
    breaks: u32,
    /// Messages under way at a time: a state with more of them is not followed.
    messages: usize,
    states: usize,
}

#[derive(Clone)]
struct Disk {
    term: Term,
    vote: Option<NodeId>,
    log: Vec<BatchRun>,
    epoch: Epoch,
}

#[derive(Clone)]
enum Write {
    Append(Epoch, BatchRun),
    Truncate(LogIndex, Epoch),
}

#[derive(Clone)]
struct Node {
    disk: Disk,
    raft: Raft,
    writes: VecDeque<Write>,
    saves: VecDeque<(u64, Term, Option<NodeId>)>,
    deferred: VecDeque<(u64, NodeId, Message)>,
}

/// What is never forgotten.
#[derive(Clone, Default)]
struct Ledger {
    leaders: BTreeMap<Term, NodeId>,
    /// In order, with the term of the leader that committed it.
    committed: Vec<(BatchRun, Term)>,
}

#[derive(Clone)]
struct World {
    nodes: Vec<Node>,
    network: Vec<(NodeId, NodeId, Message)>,
    ledger: Ledger,
    now: Nanos,
    proposals: u32,
    crashes: u32,
    breaks: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Deliver(usize),
    Save(usize),
    Write(usize),
    TimeOut(usize),
    Propose(usize),
    Crash(usize),
    Break(usize, usize),
}

fn configuration(nodes: u64) -> Configuration {
    let members = (1..=nodes).map(|id| Member {
        id: NodeId(id),
        incarnation: Incarnation(u128::from(id)),
        address: String::new(),
        role: MemberRole::Voter,
    });
    Configuration::new(members.collect()).expect("valid")
}

fn boot(id: NodeId, nodes: u64, disk: &Disk, now: Nanos) -> Raft {
    let config = RaftConfig {
        election_timeout: Nanos(3),
        heartbeat_interval: Nanos(1),
        commit_notice_delay: Nanos(1),
        ..RaftConfig::new(id, 0)
    };
    let last = disk.log.last().map(BatchRun::end).unwrap_or_default();
    let term = disk.term.max(last.term);
    let boot = Boot {
        term,
        vote: disk.vote.filter(|_| term == disk.term),
        start: LogId::default(),
        batches: disk.log.clone(),
        epoch: disk.epoch,
        commit: LogIndex(0),
        damaged_from: None,
        claim: None,
        configuration_index: LogIndex(0),
        now,
        changes: Vec::new(),
    };
    Raft::new(config, configuration(nodes), boot).expect("bootable")
}

impl World {
    fn new(bounds: &Bounds) -> Self {
        let disk = Disk { term: Term(0), vote: None, log: Vec::new(), epoch: Epoch(0) };
        let nodes = (1..=bounds.nodes).map(|id| Node {
            raft: boot(NodeId(id), bounds.nodes, &disk, Nanos(1)),
            disk: disk.clone(),
            writes: VecDeque::new(),
            saves: VecDeque::new(),
            deferred: VecDeque::new(),
        });
        Self {
            nodes: nodes.collect(),
            network: Vec::new(),
            ledger: Ledger::default(),
            now: Nanos(1),
            proposals: bounds.proposals,
            crashes: bounds.crashes,
            breaks: bounds.breaks,
        }
    }

    /// Everything that may happen next. Messages keep their order within a session. One that is lost makes no difference to
    /// one that is late for ever, so none is lost but with its session.
    fn steps(&self, bounds: &Bounds) -> Vec<Step> {
        let oldest = |at: &usize| {
            let (from, to, _) = &self.network[*at];
            !self.network[..*at].iter().any(|(earlier, other, _)| (earlier, other) == (from, to))
        };
        let mut steps: Vec<Step> = (0..self.network.len()).filter(oldest).map(Step::Deliver).collect();
        for (at, node) in self.nodes.iter().enumerate() {
            if !node.saves.is_empty() {
                steps.push(Step::Save(at));
            }
            if !node.writes.is_empty() {
                steps.push(Step::Write(at));
            }
            let raft = &node.raft;
            // A leader's time-out is its loss of the quorum.
            let campaigns = raft.term() < Term(bounds.terms) || raft.role() == Role::Leader;
            if campaigns && raft.next_deadline() != Nanos::NEVER {
                steps.push(Step::TimeOut(at));
            }
            if self.proposals > 0 && raft.can_accept_proposals() {
                steps.push(Step::Propose(at));
            }
            if self.crashes > 0 {
                steps.push(Step::Crash(at));
            }
            if self.breaks > 0 {
                steps.extend((at + 1..self.nodes.len()).map(|other| Step::Break(at, other)));
            }
        }
        steps
    }

    fn take(&mut self, step: Step) -> Result<(), String> {
        // All time-outs have passed since the step before.
        self.now = self.now.plus(Nanos(100));
        self.take_one(step)?;
        // Without a crash to come a late save is like messages that are late.
        while self.crashes == 0
            && let Some(at) = self.nodes.iter().position(|node| !node.saves.is_empty())
        {
            self.take_one(Step::Save(at))?;
        }
        Ok(())
    }

    fn take_one(&mut self, step: Step) -> Result<(), String> {
        match step {
            Step::Deliver(at) => {
                let (from, to, message) = self.network.remove(at);
                self.feed(to.get() as usize - 1, Event::Received { from, message })
            }
            Step::Save(at) => {
                let node = &mut self.nodes[at];
                let Some((sequence, term, vote)) = node.saves.pop_front() else { return Ok(()) };
                (node.disk.term, node.disk.vote) = (term, vote);
                let id = node.raft.id();
                while node.deferred.front().is_some_and(|(after, ..)| *after <= sequence) {
                    if let Some((_, to, message)) = node.deferred.pop_front() {
                        self.network.push((id, to, message));
                    }
                }
                self.feed(at, Event::HardStateSaved { sequence })
            }
            Step::Write(at) => {
                let node = &mut self.nodes[at];
                match node.writes.pop_front() {
                    Some(Write::Append(epoch, batch)) => {
                        node.disk.log.push(batch);
                        self.feed(at, Event::Persisted { epoch, last: batch.last })
                    }
                    Some(Write::Truncate(after, epoch)) => {
                        node.disk.log.retain(|batch| batch.last <= after);
                        node.disk.epoch = epoch;
                        Ok(())
                    }
                    None => Ok(()),
                }
            }
            Step::TimeOut(at) => {
                self.feed(at, Event::Tick)?;
                // Pre-votes change nothing at who is asked, so the whole exchange is one step.
                while let Some(next) = self.network.iter().position(|(.., message)| asks_first(message)) {
                    let (from, to, message) = self.network.remove(next);
                    self.feed(to.get() as usize - 1, Event::Received { from, message })?;
                }
                Ok(())
            }
            Step::Propose(at) => {
                self.proposals -= 1;
                self.propose(at)
            }
            Step::Crash(at) => {
                self.crashes -= 1;
                let (count, now) = (self.nodes.len() as u64, self.now);
                let node = &mut self.nodes[at];
                let id = node.raft.id();
                node.disk.epoch = Epoch(node.disk.epoch.0 + 1);
                node.raft = boot(id, count, &node.disk, now);
                (node.writes, node.saves, node.deferred) = Default::default();
                (0..self.nodes.len()).filter(|other| *other != at).try_for_each(|other| self.reset(at, other))
            }
            Step::Break(one, other) => {
                self.breaks -= 1;
                self.reset(one, other)
            }
        }
    }

    fn reset(&mut self, one: usize, other: usize) -> Result<(), String> {
        let (a, b) = (self.nodes[one].raft.id(), self.nodes[other].raft.id());
        self.network.retain(|(from, to, _)| (*from, *to) != (a, b) && (*from, *to) != (b, a));
        for (at, peer) in [(one, b), (other, a)] {
            self.feed(at, Event::PeerDisconnected { peer })?;
            self.feed(at, Event::PeerConnected { peer })?;
        }
        Ok(())
    }

    fn propose(&mut self, at: usize) -> Result<(), String> {
        let Some((term, first)) = self.nodes[at].raft.next_position() else { return Ok(()) };
        self.feed(at, Event::Proposed { batch: BatchRun { first, last: first, term, bytes: 100 } })
    }

    fn feed(&mut self, at: usize, event: Event) -> Result<(), String> {
        let now = self.now;
        let node = &mut self.nodes[at];
        let id = node.raft.id();
        let before = State::of(&node.raft);
        let mut actions = Vec::new();
        node.raft.handle(now, event, &mut actions);
        invariants::check(&node.raft)
            .and_then(|()| invariants::check_step(&before, &State::of(&node.raft)))
            .map_err(|broken| format!("node {id}: {broken}"))?;
        for action in actions {
            let node = &mut self.nodes[at];
            match action {
                Action::Persist { batch } => node.writes.push_back(Write::Append(node.raft.epoch(), batch)),
                Action::Truncate { after, epoch } => node.writes.push_back(Write::Truncate(after, epoch)),
                Action::SaveHardState { sequence, term, vote } => {
                    node.saves.push_back((sequence, term, vote))
                }
                Action::SendNow { to, message } => self.network.push((id, to, message)),
                Action::SendAfterSave { sequence, to, message } => {
                    node.deferred.push_back((sequence, to, message));
                }
                Action::Commit { up_to } => self.committed(at, before.commit.index, up_to)?,
                Action::Become { role: Role::Leader, term, .. } => self.elected(at, term)?,
                Action::SealEmpty => self.propose(at)?,
                Action::Stop { violation } => return Err(format!("node {id}: {violation}")),
                // Nobody reads, hands over, repairs or changes the members here.
                _ => {}
            }
        }
        Ok(())
    }

    /// Election safety and leader completeness (Raft, figure 3).
    fn elected(&mut self, at: usize, term: Term) -> Result<(), String> {
        let raft = &self.nodes[at].raft;
        let id = raft.id();
        let known = *self.ledger.leaders.entry(term).or_insert(id);
        if known != id {
            return Err(format!("election safety: {known} and {id} lead term {term}"));
        }
        let held = |(batch, by): &&(BatchRun, Term)| {
            *by < term && raft.log().batch_end_at(batch.last) != Some(batch.end())
        };
        match self.ledger.committed.iter().find(held) {
            Some((batch, by)) => {
                Err(format!("leader completeness: {id} leads {term} without {batch:?}, committed in {by}"))
            }
            None => Ok(()),
        }
    }

    /// State machine safety, and that a quorum has made durable what is committed.
    fn committed(&mut self, at: usize, from: LogIndex, up_to: LogIndex) -> Result<(), String> {
        let raft = &self.nodes[at].raft;
        let (id, term) = (raft.id(), raft.term());
        for batch in raft.log().iter().filter(|batch| batch.first > from && batch.last <= up_to) {
            let known = self.ledger.committed.iter().find(|(known, _)| known.first == batch.first);
            match known {
                Some((known, by)) if *known != batch => {
                    return Err(format!("node {id} commits {batch:?}; {known:?} was committed in {by}"));
                }
                Some(_) => {}
                None => {
                    let holds = |node: &&Node| node.disk.log.contains(&batch);
                    let holders = self.nodes.iter().filter(holds).count();
                    if holders * 2 <= self.nodes.len() {
                        return Err(format!("node {id} commits {batch:?}, durable at {holders} nodes"));
                    }
                    self.ledger.committed.push((batch, term));
                }
            }
        }
        Ok(())
    }

    /// What makes states the same: everything but times, rounds and draws.
    fn fingerprint(&self) -> u128 {
        let mut one = DefaultHasher::new();
        // In order within a session, without order between them.
        let mut messages: Vec<(NodeId, NodeId, u64)> =
            self.network.iter().map(|message| (message.0, message.1, message_print(message))).collect();
        messages.sort_by_key(|(from, to, _)| (*from, *to));
        (messages, self.proposals, self.crashes, self.breaks).hash(&mut one);
        for node in &self.nodes {
            node_print(node, &mut one);
        }
        for (batch, by) in &self.ledger.committed {
            (batch, by).hash(&mut one);
        }
        self.ledger.leaders.hash(&mut one);
        let mut other = one.clone();
        0x5eed_u64.hash(&mut other);
        u128::from(one.finish()) << 64 | u128::from(other.finish())
    }
}

fn asks_first(message: &Message) -> bool {
    matches!(message, Message::Vote(Vote { pre: true, .. }) | Message::VoteReply(VoteReply { pre: true, .. }))
}

fn message_print((from, to, message): &(NodeId, NodeId, Message)) -> u64 {
    let mut hasher = DefaultHasher::new();
    (from, to).hash(&mut hasher);
    match message {
        Message::Append(append) => {
            let Append { term, previous, batch, commit, round: _, reply_now, configuration } = append;
            (1, term, previous, batch, commit, reply_now, configuration).hash(&mut hasher);
        }
        Message::AppendAck(AppendAck { term, round: _, outcome }) => {
            (2, term, format!("{outcome:?}")).hash(&mut hasher);
        }
        Message::Vote(vote) => (3, vote.term, vote.last, vote.pre, vote.transfer).hash(&mut hasher),
        Message::VoteReply(reply) => (4, reply.term, reply.granted, reply.pre).hash(&mut hasher),
        Message::TimeoutNow(message) => (5, message.term).hash(&mut hasher),
        // Nobody reads here.
        Message::ReadIndex(_) | Message::ReadIndexReply(_) => {}
    }
    hasher.finish()
}

fn node_print(node: &Node, into: &mut impl Hasher) {
    let Node { disk, raft, writes, saves, deferred } = node;
    (disk.term, disk.vote, &disk.log, disk.epoch).hash(into);
    for write in writes {
        match write {
            Write::Append(epoch, batch) => (1, epoch, batch).hash(into),
            Write::Truncate(after, epoch) => (2, after, epoch).hash(into),
        }
    }
    for (_, term, vote) in saves {
        (term, vote).hash(into);
    }
    let last_save = saves.back().map_or(0, |save| save.0);
    for (after, to, message) in deferred {
        (last_save.saturating_sub(*after), message_print(&(raft.id(), *to, message.clone()))).hash(into);
    }
    let State { role, term, vote, leader, commit, durable, epoch, .. } = State::of(raft);
    (role, term, vote, leader, commit, durable, epoch, raft.hard.is_saved()).hash(into);
    for batch in raft.log().iter() {
        batch.hash(into);
    }
    (raft.hearing.matched, raft.hearing.acked).hash(into);
    match &raft.role {
        RoleState::Follower => {}
        RoleState::PreCandidate(votes) => format!("{votes:?}").hash(into),
        RoleState::Candidate { votes, own_vote, transfer } => {
            (format!("{votes:?}"), raft.hard.saved() >= *own_vote, transfer).hash(into);
        }
        RoleState::Leader(leader) => {
            (leader.first_own, leader.transfer.is_some()).hash(into);
            for progress in &leader.peers {
                progress.fingerprint(into);
            }
        }
    }
}

/// What a search found.
#[derive(Debug, Default)]
struct Found {
    states: usize,
    transitions: usize,
    /// Steps of the longest run.
    depth: u32,
    /// States with more messages under way than the bound, not followed.
    cut: usize,
    /// States in which batches of more than one term are committed.
    committed_in_two_terms: usize,
    /// Whether nothing within the bounds is left.
    complete: bool,
}

/// Breadth first: what breaks an invariant is told with a shortest run to it.
fn explore(bounds: &Bounds) -> Result<Found, (String, Vec<Step>)> {
    let mut found = Found { complete: true, ..Found::default() };
    let root = World::new(bounds);
    let start = root.fingerprint();
    let mut reached: HashMap<u128, (u128, Step)> = HashMap::new();
    reached.insert(start, (start, Step::TimeOut(0)));
    let mut frontier = VecDeque::from([(root, start, 0)]);
    while let Some((world, print, depth)) = frontier.pop_front() {
        found.depth = depth;
        for step in world.steps(bounds) {
            let mut next = world.clone();
            found.transitions += 1;
            if let Err(what) = next.take(step) {
                return Err((what, run_to(&reached, start, print, step)));
            }
            if next.network.len() > bounds.messages {
                found.cut += 1;
                continue;
            }
            let print_of_next = next.fingerprint();
            if let Entry::Vacant(entry) = reached.entry(print_of_next) {
                entry.insert((print, step));
                let mut terms: Vec<Term> =
                    next.ledger.committed.iter().map(|(batch, _)| batch.term).collect();
                terms.dedup();
                found.committed_in_two_terms += usize::from(terms.len() > 1);
                frontier.push_back((next, print_of_next, depth + 1));
            }
        }
        if reached.len() >= bounds.states {
            found.complete = false;
            break;
        }
    }
    found.states = reached.len();
    Ok(found)
}

/// The steps that lead from `start` to `print`, and then `last`.
fn run_to(reached: &HashMap<u128, (u128, Step)>, start: u128, print: u128, last: Step) -> Vec<Step> {
    let (mut run, mut at) = (vec![last], print);
    while at != start {
        let Some((before, step)) = reached.get(&at) else { break };
        run.push(*step);
        at = *before;
    }
    run.reverse();
    run
}

const SMALL: Bounds =
    Bounds { nodes: 3, terms: 2, proposals: 1, crashes: 1, breaks: 0, messages: 3, states: 60_000 };

/// `MODEL=full` goes further; `MODEL_STATES=n` sets where it ends.
#[test]
fn no_run_of_a_small_cluster_breaks_an_invariant() {
    let full = std::env::var_os("MODEL").is_some_and(|value| value == "full");
    let states = std::env::var("MODEL_STATES").ok().and_then(|value| value.parse().ok());
    let mut bounds =
        if full { Bounds { proposals: 2, messages: 4, states: 3_000_000, ..SMALL } } else { SMALL };
    bounds.states = states.unwrap_or(bounds.states);
    match explore(&bounds) {
        Ok(found) => println!("{bounds:?}: {found:?}"),
        Err((what, run)) => panic!("{what}\nafter {run:?}"),
    }
}

/// The search would notice.
#[test]
fn bugs_that_are_put_back_are_found_by_the_search() {
    for mutant in [Mutant::AckBeforeDurable, Mutant::MatchFromSent] {
        mutants::set(Some(mutant));
        let found = explore(&SMALL);
        mutants::set(None);
        match found {
            Err((what, run)) => println!("{mutant:?}: {what} after {run:?}"),
            Ok(found) => panic!("{mutant:?} was not noticed in {found:?}"),
        }
    }
}
