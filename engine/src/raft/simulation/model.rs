//! Every run of a small cluster of real cores, up to bounds: what the random runs are likely to find, this finds for certain, as
//! far as the bounds reach.
//!
//! A state is the cores, what is durable at each, and what is under way between them; a step delivers a message, makes the next
//! write or save of a node durable, lets a time-out fire, proposes a batch, asks for other members, tells the commit index,
//! breaks a session, or crashes a node and starts it again. After every step the invariants of the node that made it are
//! checked, and those between nodes (`checks`). States that differ only in times, in rounds or in the draws of election times
//! count as one (`print`); a state is remembered by a 64-bit hash of it, so that of `n` states about `n^2 / 2^65` are taken
//! for another and not looked at: 0.0003 of a hundred million. The search is in `search`.
//!
//! **Messages.** Those between two nodes arrive in order and once, as in a session over TCP, and as late as may be; those of
//! different pairs in any order. None is lost but with its session: by a crash of one end, or by a break. That messages
//! are lost alone, twice or out of order within a session is left to the random runs. Heartbeats only repeat, and are left out.
//!
//! **Time.** A leader's clock stands still, anybody else's has passed all time-outs since the event before: so a node that may
//! campaign may do so in any state, a follower never sticks to a leader, and a leader gives up in any state, but not
//! otherwise; a future voter is never too slow. What stickiness and leases promise is thus not looked at here; what they rest on,
//! elections, the log, commits and members, is looked at under every timing. A pre-vote changes nothing at who is asked,
//! so that asking everybody is one step.
//!
//! **Disks.** At most one node crashes; which one is chosen at the start. Its writes and saves become durable in order, as late as
//! may be. Those of the others, and its own once it has crashed, are durable at once: at a node that does not crash nobody
//! can tell a late write from a late answer, and a late save from late messages.
//!
//! **Bounds** ([`Bounds`]): nodes, terms, proposals (beside the empty batch of each leader), changes of the members and which, the
//! crash, broken sessions, and messages under way at a time. `MODEL=full` runs the wide ones.
//!
//! **Two reductions**, neither of which changes what is reachable but for names and for messages that nobody minds. While
//! nothing has happened yet, only node 1 campaigns: nodes of the same role are interchangeable, hence runs that begin with
//! another one are these with other names. (Where a leader that leaves hands over to one of two that are equally far it takes
//! the lower id; that it might take the other is all that a name decides, and not looked at where names were changed.)
//! And an answer that can mean nothing any more, because the receiver's term or office is over, is delivered at once, and
//! it is checked that it does mean nothing: later it would not either, since terms do not go back and nobody leads a term
//! twice.
//!
//! A state takes 25 bytes in a table that doubles; in the order of depth little else is kept.

mod checks;
mod print;
mod search;

use crate::raft::invariants::{self, State};
use crate::raft::*;
use ringraft_block::Incarnation;
use std::collections::VecDeque;
use std::rc::Rc;

/// How far the search goes.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    voters: u64,
    learners: u64,
    terms: u64,
    proposals: u8,
    /// How many changes of the members are begun, and which ones may be.
    changes: u8,
    wanted: &'static [Wanted],
    /// Whether a node crashes.
    crash: bool,
    /// Sessions that break, with all that is under way in them.
    breaks: u8,
    /// Whether a leader tells the commit index also when it has nothing else to send.
    notices: bool,
    /// Messages under way at a time: a state with more of them is not followed.
    messages: usize,
    /// Where the search ends in any case.
    states: usize,
}

/// A change of the members.
#[derive(Clone, Copy, Debug)]
enum Wanted {
    Remove(u64),
    Promote(u64),
    Replace { leaves: u64, comes: u64 },
}

impl Wanted {
    fn change(self) -> Change {
        let (mut remove, mut promote) = (Vec::new(), Vec::new());
        match self {
            Self::Remove(id) => remove.push(NodeId(id)),
            Self::Promote(id) => promote.push(NodeId(id)),
            Self::Replace { leaves, comes } => {
                remove.push(NodeId(leaves));
                promote.push(NodeId(comes));
            }
        }
        Change { remove, promote, ..Change::default() }
    }
}

/// What does not change during a search.
struct Model {
    bounds: Bounds,
    changes: Vec<Change>,
    /// That at the start, and all that changes can lead to. A batch holds the one that its size tells.
    configurations: Vec<Configuration>,
}

/// Size of the batch with the first of the configurations; all other batches are smaller.
const CONFIGURATION: u32 = 1_000;
const EMPTY: u32 = 1;
const COMMAND: u32 = 100;

impl Model {
    fn new(bounds: &Bounds) -> Self {
        let members = (1..=bounds.voters + bounds.learners).map(|id| Member {
            id: NodeId(id),
            incarnation: Incarnation(u128::from(id)),
            address: String::new(),
            role: if id <= bounds.voters { MemberRole::Voter } else { MemberRole::Learner },
        });
        let changes: Vec<Change> = bounds.wanted.iter().map(|wanted| wanted.change()).collect();
        let mut configurations = vec![Configuration::new(members.collect()).expect("valid")];
        let mut at = 0;
        while let Some(from) = configurations.get(at).cloned() {
            let mut next: Vec<Configuration> =
                changes.iter().filter_map(|change| from.changed(change).ok().flatten()).collect();
            if !from.is_settled() {
                next.extend([from.next_step(), from.without_plan()]);
            }
            for configuration in next {
                if !configurations.contains(&configuration) {
                    configurations.push(configuration);
                }
            }
            at += 1;
        }
        Self { bounds: *bounds, changes, configurations }
    }

    /// What a batch holds, if it is one of membership.
    fn configuration_in(&self, batch: &BatchRun) -> Option<&Configuration> {
        self.configurations.get(batch.bytes.checked_sub(CONFIGURATION)? as usize)
    }

    /// What must be in force behind these batches.
    fn in_force(&self, log: impl Iterator<Item = BatchRun>) -> &Configuration {
        log.filter_map(|batch| self.configuration_in(&batch)).last().unwrap_or(&self.configurations[0])
    }

    fn boot(&self, id: NodeId, disk: &Disk, now: Nanos) -> Raft {
        let config = RaftConfig {
            election_timeout: TIMEOUT,
            heartbeat_interval: Nanos(TIMEOUT.0 / 3),
            commit_notice_delay: NOTICE,
            ..RaftConfig::new(id, 0)
        };
        let last = disk.log.last().map(BatchRun::end).unwrap_or_default();
        let term = disk.term.max(last.term);
        let found = |batch: &BatchRun| Some((batch.first, Some(self.configuration_in(batch)?.clone())));
        let boot = Boot {
            term,
            term_saved: term,
            vote: disk.vote.filter(|_| term == disk.term),
            start: LogId::default(),
            batches: disk.log.clone(),
            epoch: disk.epoch,
            commit: LogIndex(0),
            damaged_from: None,
            claim: None,
            configuration_index: LogIndex(0),
            now,
            changes: disk.log.iter().filter_map(found).collect(),
        };
        Raft::new(config, self.configurations[0].clone(), boot).expect("bootable")
    }
}

/// Notices come due within no part of a time-out that matters, however many there are in a term.
const TIMEOUT: Nanos = Nanos(3_000_000);
const NOTICE: Nanos = Nanos(1);
/// What passes all time-outs.
const LEAP: Nanos = Nanos(10_000_000);

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
    clock: Nanos,
    writes: VecDeque<Write>,
    saves: VecDeque<(u64, Term, Option<NodeId>)>,
    deferred: VecDeque<(u64, Sent)>,
    /// Of all of this; none since it has changed.
    print: Option<u64>,
}

/// A message under way, with the hash of it.
#[derive(Clone)]
struct Sent {
    from: NodeId,
    to: NodeId,
    print: u64,
    message: Message,
}

/// What is never forgotten.
#[derive(Clone, Default)]
struct Ledger {
    leaders: Vec<(Term, NodeId)>,
    /// In order, with the term of the leader that committed it.
    committed: Vec<(BatchRun, Term)>,
}

#[derive(Clone)]
struct World {
    /// A step changes few of them.
    nodes: Vec<Rc<Node>>,
    network: Vec<Sent>,
    ledger: Ledger,
    proposals: u8,
    changes: u8,
    breaks: u8,
    /// Who will crash.
    fragile: Option<usize>,
}

/// Nodes by position; small, since every state remembers the step to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Begin { crashes: Option<u8> },
    Deliver(u8),
    Save(u8),
    Write(u8),
    TimeOut(u8),
    Propose(u8),
    Change(u8, u8),
    Notice(u8),
    Crash(u8),
    Break(u8, u8),
}

type Outcome = Result<(), String>;

fn position(id: NodeId) -> usize {
    id.get() as usize - 1
}

impl World {
    fn new(model: &Model, fragile: Option<usize>) -> Self {
        let Bounds { voters, learners, proposals, changes, breaks, .. } = model.bounds;
        let disk = Disk { term: Term(0), vote: None, log: Vec::new(), epoch: Epoch(0) };
        let node = |id| Node {
            raft: model.boot(NodeId(id), &disk, Nanos(1)),
            disk: disk.clone(),
            clock: Nanos(1),
            writes: VecDeque::new(),
            saves: VecDeque::new(),
            deferred: VecDeque::new(),
            print: None,
        };
        Self {
            nodes: (1..=voters + learners).map(|id| Rc::new(node(id))).collect(),
            network: Vec::new(),
            ledger: Ledger::default(),
            proposals,
            changes,
            breaks,
            fragile,
        }
    }

    /// Everything that may happen next.
    fn steps(&self, model: &Model) -> Vec<Step> {
        let Bounds { terms, notices, .. } = model.bounds;
        if self.nodes.iter().all(|node| node.raft.term() == Term(0) && node.raft.role() == Role::Follower) {
            return vec![Step::TimeOut(0)];
        }
        let oldest = |at: &usize| {
            let Sent { from, to, .. } = &self.network[*at];
            !self.network[..*at].iter().any(|earlier| (earlier.from, earlier.to) == (*from, *to))
        };
        let mut steps: Vec<Step> =
            (0..self.network.len()).filter(oldest).map(|at| Step::Deliver(at as u8)).collect();
        for (position, node) in self.nodes.iter().enumerate() {
            let (raft, at) = (&node.raft, position as u8);
            if !node.saves.is_empty() {
                steps.push(Step::Save(at));
            }
            if !node.writes.is_empty() {
                steps.push(Step::Write(at));
            }
            // A leader's time-out is its loss of the quorum. Anybody else's question would wait for a save under way.
            let leads = raft.role() == Role::Leader;
            let asks = raft.term() < Term(terms) && node.saves.is_empty();
            if (leads || asks) && raft.next_deadline() != Nanos::NEVER {
                steps.push(Step::TimeOut(at));
            }
            if self.proposals > 0 && raft.can_accept_proposals() {
                steps.push(Step::Propose(at));
            }
            if self.changes > 0 && leads {
                let begins = |change: &Change| !raft.plan(change).steps.is_empty();
                let which = (0..model.changes.len()).filter(|which| begins(&model.changes[*which]));
                steps.extend(which.map(|which| Step::Change(at, which as u8)));
            }
            if notices && leads && raft.next_deadline() <= node.clock.plus(NOTICE) {
                steps.push(Step::Notice(at));
            }
            if self.fragile == Some(position) {
                steps.push(Step::Crash(at));
            }
            if self.breaks > 0 {
                steps.extend((at + 1..self.nodes.len() as u8).map(|other| Step::Break(at, other)));
            }
        }
        steps
    }

    fn take(&mut self, model: &Model, step: Step) -> Outcome {
        self.take_one(model, step)?;
        loop {
            let busy = |at: &usize| {
                let node = &self.nodes[*at];
                self.fragile != Some(*at) && !(node.saves.is_empty() && node.writes.is_empty())
            };
            if let Some(at) = (0..self.nodes.len()).find(busy) {
                let saves = !self.nodes[at].saves.is_empty();
                let at = at as u8;
                self.take_one(model, if saves { Step::Save(at) } else { Step::Write(at) })?;
            } else if let Some(next) = self.network.iter().position(|sent| asks_first(&sent.message)) {
                self.take_one(model, Step::Deliver(next as u8))?;
            } else if let Some(next) = self.network.iter().position(|sent| self.means_nothing(sent)) {
                let at = position(self.network[next].to);
                let before = (self.print_of(at), self.network.len() - 1);
                self.take_one(model, Step::Deliver(next as u8))?;
                if (self.print_of(at), self.network.len()) != before {
                    return Err(format!("node {} minds an answer to what is over", at + 1));
                }
            } else {
                return Ok(());
            }
        }
    }

    fn take_one(&mut self, model: &Model, step: Step) -> Outcome {
        match step {
            Step::Begin { .. } => Ok(()),
            Step::Deliver(at) => {
                let Sent { from, to, mut message, .. } = self.network.remove(at.into());
                match &mut message {
                    // As the driver hands it to the core: with what is in the image.
                    Message::Append(append) => {
                        let held = append.batch.as_ref().and_then(|batch| model.configuration_in(batch));
                        append.configuration = held.cloned().map(Box::new);
                    }
                    Message::TimeoutNow(message) if message.term >= Term(model.bounds.terms) => return Ok(()),
                    _ => {}
                }
                self.feed(model, position(to), Event::Received { from, message })
            }
            Step::Save(at) => {
                let node = self.node(at.into());
                let Some((sequence, term, vote)) = node.saves.pop_front() else { return Ok(()) };
                (node.disk.term, node.disk.vote) = (term, vote);
                let ready = node.deferred.iter().take_while(|(after, _)| *after <= sequence).count();
                let ready: Vec<Sent> = node.deferred.drain(..ready).map(|(_, sent)| sent).collect();
                self.network.extend(ready);
                self.feed(model, at.into(), Event::HardStateSaved { sequence })
            }
            Step::Write(at) => {
                let node = self.node(at.into());
                match node.writes.pop_front() {
                    Some(Write::Append(epoch, batch)) => {
                        node.disk.log.push(batch);
                        self.feed(model, at.into(), Event::Persisted { epoch, last: batch.last })
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
                self.pass(at.into(), LEAP);
                self.feed(model, at.into(), Event::Tick)
            }
            Step::Notice(at) => {
                self.pass(at.into(), NOTICE);
                self.feed(model, at.into(), Event::Tick)
            }
            Step::Propose(at) => {
                self.proposals -= 1;
                self.propose(model, at.into(), COMMAND)
            }
            Step::Change(at, which) => {
                self.changes -= 1;
                let change = Box::new(model.changes[usize::from(which)].clone());
                self.feed(model, at.into(), Event::Change { ticket: 1, change })
            }
            Step::Crash(at) => {
                self.fragile = None;
                let at = usize::from(at);
                let node = self.node(at);
                node.disk.epoch = Epoch(node.disk.epoch.0 + 1);
                node.clock = node.clock.plus(LEAP);
                node.raft = model.boot(node.raft.id(), &node.disk, node.clock);
                (node.writes, node.saves, node.deferred) = Default::default();
                let others = (0..self.nodes.len()).filter(|other| *other != at);
                others.collect::<Vec<_>>().into_iter().try_for_each(|other| self.reset(model, at, other))
            }
            Step::Break(one, other) => {
                self.breaks -= 1;
                self.reset(model, one.into(), other.into())
            }
        }
    }

    /// Messages on their way, and those that wait for a save.
    fn under_way(&self) -> usize {
        self.network.len() + self.nodes.iter().map(|node| node.deferred.len()).sum::<usize>()
    }

    fn node(&mut self, at: usize) -> &mut Node {
        let node = Rc::make_mut(&mut self.nodes[at]);
        node.print = None;
        node
    }

    fn pass(&mut self, at: usize, span: Nanos) {
        let node = self.node(at);
        node.clock = node.clock.plus(span);
    }

    fn reset(&mut self, model: &Model, one: usize, other: usize) -> Outcome {
        let (a, b) = (self.nodes[one].raft.id(), self.nodes[other].raft.id());
        self.network.retain(|sent| (sent.from, sent.to) != (a, b) && (sent.from, sent.to) != (b, a));
        for (at, peer) in [(one, b), (other, a)] {
            self.feed(model, at, Event::PeerDisconnected { peer })?;
            self.feed(model, at, Event::PeerConnected { peer })?;
        }
        Ok(())
    }

    fn propose(&mut self, model: &Model, at: usize, bytes: u32) -> Outcome {
        let Some((term, first)) = self.nodes[at].raft.next_position() else { return Ok(()) };
        self.feed(model, at, Event::Proposed { batch: BatchRun { first, last: first, term, bytes } })
    }

    fn seal(&mut self, model: &Model, at: usize, configuration: Box<Configuration>) -> Outcome {
        let Some((term, first)) = self.nodes[at].raft.next_position() else { return Ok(()) };
        let number = model.configurations.iter().position(|known| *known == *configuration);
        let number = number.ok_or_else(|| format!("{configuration:?} leads nowhere"))?;
        let batch = BatchRun { first, last: first, term, bytes: CONFIGURATION + number as u32 };
        self.feed(model, at, Event::ProposedConfiguration { batch, configuration })
    }

    fn feed(&mut self, model: &Model, at: usize, event: Event) -> Outcome {
        let node = self.node(at);
        if node.raft.role() != Role::Leader {
            node.clock = node.clock.plus(LEAP);
        }
        let id = node.raft.id();
        let before = State::of(&node.raft);
        let mut actions = Vec::new();
        node.raft.handle(node.clock, event, &mut actions);
        invariants::check(&node.raft)
            .and_then(|()| invariants::check_step(&before, &State::of(&node.raft)))
            .map_err(|broken| format!("node {id}: {broken}"))?;
        for action in actions {
            let node = self.node(at);
            match action {
                Action::Persist { batch } => node.writes.push_back(Write::Append(node.raft.epoch(), batch)),
                Action::Truncate { after, epoch } => node.writes.push_back(Write::Truncate(after, epoch)),
                Action::SaveHardState { sequence, term, vote } => {
                    node.saves.push_back((sequence, term, vote))
                }
                Action::SendNow { to, message } => self.network.push(Sent::new(id, to, message)),
                Action::SendAfterSave { sequence, to, message } => {
                    node.deferred.push_back((sequence, Sent::new(id, to, message)));
                }
                Action::Commit { up_to } => self.committed(model, at, before.commit.index, up_to)?,
                Action::Become { role: Role::Leader, term, .. } => self.elected(model, at, term)?,
                Action::SealEmpty => self.propose(model, at, EMPTY)?,
                Action::SealConfiguration { configuration } => self.seal(model, at, configuration)?,
                Action::ChangeEnded { outcome: Ok(changed), .. } => self.changed(at, &changed)?,
                Action::Stop { violation } => return Err(format!("node {id}: {violation}")),
                // Nobody reads, is asked to hand over, repairs or is sent a snapshot here.
                _ => {}
            }
        }
        self.check(model, at)
    }

    /// An answer that its receiver will not mind any more.
    fn means_nothing(&self, sent: &Sent) -> bool {
        let raft = &self.nodes[position(sent.to)].raft;
        let (term, role) = (raft.term(), raft.role());
        match &sent.message {
            Message::VoteReply(VoteReply { term: of, granted, .. }) => {
                *of < term || (*of == term && !(*granted && role == Role::Candidate))
            }
            Message::AppendAck(ack) => ack.term < term || (ack.term == term && role != Role::Leader),
            Message::TimeoutNow(message) => message.term < term,
            _ => false,
        }
    }
}

fn asks_first(message: &Message) -> bool {
    matches!(message, Message::Vote(Vote { pre: true, .. }) | Message::VoteReply(VoteReply { pre: true, .. }))
}
