//! Clients: each does one thing at a time, asks whom it believes to lead, and remembers what it was told.

use super::sessions::Book;
use super::*;
use crate::sim::check::Fate;
use crate::sim::kv::Operation;
use crate::sim::node::{Ask, is_remote};

/// A kind of call in the table.
pub(super) struct Verb {
    /// How often it is made, against the others.
    weight: u64,
    /// What it asks of a key that was last seen holding `seen`; `unique` is a number of no other call.
    draw: fn(rng: &mut Rng, seen: u64, unique: u64) -> Operation,
    /// What is asked for instead of the command; `index` is the last one that the client was told.
    ask: fn(rng: &mut Rng, index: u64) -> Option<Ask>,
}

const fn command(weight: u64, draw: fn(&mut Rng, u64, u64) -> Operation) -> Verb {
    Verb { weight, draw, ask: |_, _| None }
}

const fn read(weight: u64, ask: fn(&mut Rng, u64) -> Option<Ask>) -> Verb {
    Verb { weight, draw: |_, _, _| Operation::Get, ask }
}

/// All kinds. A new one is an entry here.
const VERBS: &[Verb] = &[
    command(2, |_, _, _| Operation::Get),
    command(4, |_, _, unique| Operation::Put { value: unique }),
    command(6, |rng, seen, unique| {
        let expected = if rng.chance(100_000) { 0 } else { seen };
        Operation::Cas { expected, new: unique }
    }),
    command(8, |_, _, unique| Operation::Append { item: unique }),
    read(9, |_, _| Some(Ask::Linearizable)),
    read(3, |_, _| Some(Ask::Quorum)),
    read(1, |_, _| Some(Ask::Barrier)),
    read(1, |rng, _| Some(Ask::Stale { age_ms: rng.below(500), lag: rng.below(20) })),
    read(1, |_, _| Some(Ask::Round)),
    read(1, |rng, index| Some(Ask::Committed(index + rng.below(4)))),
    read(1, |rng, index| Some(Ask::Applied(index + rng.below(4)))),
];

/// What a client wants to be done.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub(super) command: Command,
    pub(super) ask: Option<Ask>,
    pub(super) padding: usize,
}

pub(super) struct Client {
    pub(super) rng: Rng,
    pub(super) believed: usize,
    pub(super) next: usize,
    /// What waits for an answer, or for another attempt.
    pub(super) current: Option<Wanted>,
    pub(super) in_flight: bool,
    /// Whom it asked for that.
    pub(super) asked: usize,
    /// How often, in a million, it reads where it is, and not where it believes the leader.
    wanders_ppm: u32,
    /// The last index that it was told.
    index: u64,
    /// What each key held when it was last seen.
    seen: [u64; KEYS],
    /// How many keys it uses.
    keys: usize,
    pub(super) think: Time,
    /// Its session, if it uses any.
    pub(super) book: Option<Book>,
    /// It has used some.
    had_session: bool,
    /// How many election time-outs it waits for an answer.
    patience: u64,
    padding_max: u64,
    /// First command of the second phase.
    pub(super) fresh_from: usize,
    pub(super) fresh_acknowledged: bool,
    pub(super) fresh_read: bool,
}

impl Wanted {
    /// Whether it adds to the log.
    fn writes(&self) -> bool {
        matches!(self.ask, None | Some(Ask::Barrier))
    }

    /// The key is read instead.
    fn as_read(self) -> Self {
        let command = Command { operation: Operation::Get, ..self.command };
        Self { command, ask: Some(Ask::Linearizable), ..self }
    }
}

impl Client {
    pub(super) fn draw(
        mut rng: Rng,
        nodes: usize,
        keys: usize,
        think: Time,
        command_bytes_max: usize,
    ) -> Self {
        let has_sessions = rng.chance(400_000);
        Self {
            believed: rng.index(nodes),
            next: 0,
            current: None,
            in_flight: false,
            asked: 0,
            book: has_sessions.then(Book::new),
            had_session: has_sessions,
            wanders_ppm: [0, 500_000, 1_000_000][rng.index(3)],
            index: 0,
            seen: [0; KEYS],
            keys,
            think: think * rng.between(1, 4),
            patience: rng.between(1, 10),
            padding_max: [100, 100, 100, 1_000, 1_000, 1_000, 5_000, 39_000][rng.index(8)]
                .min(command_bytes_max as u64 - 100),
            fresh_from: usize::MAX,
            fresh_acknowledged: false,
            fresh_read: false,
            rng,
        }
    }

    /// It was told what became of a command, or what it read.
    pub(super) fn learn(&mut self, command: Command, index: u64, reply: u64) {
        self.index = index;
        self.seen[usize::from(command.key)] = match command.operation {
            Operation::Put { value } => value,
            Operation::Cas { expected, new } if expected == reply => new,
            _ => reply,
        };
    }

    /// It was refused, with a hint.
    pub(super) fn follow_hint(&mut self, leader: Option<usize>, nodes: usize) {
        // Who was asked because it is near is asked again.
        if let Some(leader) = leader {
            self.believed = leader;
        } else if self.asked == self.believed {
            self.believed = self.rng.index(nodes);
        }
    }

    fn want(&mut self, client: usize) -> Wanted {
        let id = CommandId { client, sequence: self.next };
        self.next += 1;
        let total = VERBS.iter().map(|verb| verb.weight).sum();
        let mut draw = self.rng.below(total);
        let chosen = VERBS.iter().find(|verb| match draw.checked_sub(verb.weight) {
            Some(left) => {
                draw = left;
                false
            }
            None => true,
        });
        let verb = chosen.expect("the draw is below the sum of the weights");
        let key = self.rng.index(self.keys);
        let unique = (id.sequence as u64) << 8 | (client as u64 + 1);
        let operation = (verb.draw)(&mut self.rng, self.seen[key], unique);
        let ask = (verb.ask)(&mut self.rng, self.index);
        let padding = self.rng.below(self.padding_max) as usize;
        Wanted { command: Command { id, key: key as u8, operation }, ask, padding }
    }
}

impl<C: Cluster> World<'_, C> {
    /// Whether a client still waits for the answer to a command.
    pub(super) fn waits(&self, client: usize, sequence: usize) -> bool {
        let this = &self.clients[client];
        this.in_flight && this.current.is_some_and(|wanted| wanted.command.id.sequence == sequence)
    }

    pub(super) fn client_acts(&mut self, client: usize) {
        if matches!(self.phase, Phase::Quiet | Phase::Over) {
            self.abandon(client);
            return;
        }
        let nodes = self.machines.len();
        let this = &mut self.clients[client];
        if this.in_flight {
            return;
        }
        let first_time = this.current.is_none();
        let mut wanted = this.current.unwrap_or_else(|| this.want(client));
        if wanted.writes() && self.only_reads(client) {
            if !first_time {
                let wait = self.tuning.election_timeout_ms * MILLISECOND / 10;
                return self.plan(wait, Plan::Client { client });
            }
            wanted = wanted.as_read();
        }
        let this = &mut self.clients[client];
        let id = wanted.command.id;
        let may_wander = wanted.ask.is_some_and(Ask::may_wander);
        // Where members change, what is near may be no member for ever; elsewhere it may be behind for long.
        let calm = self.phase != Phase::Trouble;
        let may_wander = may_wander && !(self.changes && calm);
        let wanders_ppm = if calm { this.wanders_ppm / 2 } else { this.wanders_ppm };
        let wanders = may_wander && this.rng.chance(wanders_ppm);
        let watched =
            self.watched.filter(|(_, until)| may_wander && client % 2 == 1 && self.context.now() < *until);
        let node = match watched {
            Some((watched, _)) => watched,
            None if wanders => client % nodes,
            None => this.believed,
        };
        this.asked = node;
        if first_time && id.sequence < this.fresh_from {
            let kept = self.options.keep.calls.as_ref();
            if kept.is_some_and(|kept| !kept.contains(&(client, id.sequence))) {
                // Left out. The numbers go on, so that the others keep theirs.
                self.history.borrow_mut().left_out(wanted.command);
                let delay = this.rng.around(this.think);
                return self.plan(delay, Plan::Client { client });
            }
            if self.options.list_calls {
                let called = Called { time: self.context.now(), command: wanted.command, node };
                self.progress.calls.borrow_mut().push(called);
            }
        }
        let now = self.context.now();
        let machine = &self.machines[node];
        // While only the core stands still, the other threads go on.
        let stands = machine.paused_until > now && !(machine.core_reading.is_some() && is_remote(tag_of(id)));
        if self.clients[client].book.is_some() && wanted.ask.is_none() {
            return self.acts_in_session(client, node, stands, wanted);
        }
        self.history.borrow_mut().asked(wanted.command, wanted.ask);
        self.context.record(node, What::Propose, client as u64, id.sequence as u64);
        let machine = &mut self.machines[node];
        let outcome = match &mut machine.process {
            Some(process) if !stands => {
                wanted.command.encode(wanted.padding, &mut self.bytes);
                let issued = match wanted.ask {
                    Some(ask) => process.ask(tag_of(id), ask, &self.bytes),
                    None => process.propose(tag_of(id), &self.bytes),
                };
                issued.map_err(|refused| refused.leader)
            }
            _ => Err(None),
        };
        let this = &mut self.clients[client];
        this.current = Some(wanted);
        match outcome {
            Ok(()) => self.issued(client, node, id),
            Err(leader) => {
                this.follow_hint(leader, nodes);
                self.refused(id);
            }
        }
    }

    /// A client waits for the answer of a node.
    pub(super) fn issued(&mut self, client: usize, node: usize, id: CommandId) {
        let this = &mut self.clients[client];
        this.in_flight = true;
        self.machines[node].wake_at = 0;
        self.machines[node].called = true;
        let patience = self.tuning.election_timeout_ms * MILLISECOND * this.patience;
        self.plan(patience, Plan::GiveUp { client, sequence: id.sequence });
    }

    /// A definite refusal: the client tries again elsewhere, or sometimes lets go of the command.
    fn refused(&mut self, id: CommandId) {
        let reads = self.clients[id.client].current.is_some_and(|wanted| wanted.ask.is_some());
        self.context.cover(if reads { Mark::ReadRefused } else { Mark::Refused });
        self.context.record(0, What::Refused, id.client as u64, id.sequence as u64);
        self.history.borrow_mut().answered(id, Fate::Refused);
        let this = &mut self.clients[id.client];
        this.in_flight = false;
        // Nobody may write any more, so that what is waited for never comes.
        let waits =
            matches!(this.current, Some(Wanted { ask: Some(Ask::Committed(_) | Ask::Applied(_)), .. }));
        if waits || this.rng.chance(50_000) {
            this.current = None;
        }
        let delay = this.rng.between(MILLISECOND, 20 * MILLISECOND);
        self.plan(delay, Plan::Client { client: id.client });
    }

    pub(super) fn unknown(&mut self, id: CommandId) {
        if self.is_in_session(id) {
            self.context.record(0, What::Refused, id.client as u64, id.sequence as u64);
            return self.answered_in_session(0, id, &Answer::Unknown);
        }
        if self.clients[id.client].current.is_some_and(|wanted| wanted.ask.is_none()) {
            self.context.cover(Mark::UnknownOutcome);
        }
        self.context.record(0, What::Refused, id.client as u64, id.sequence as u64);
        self.history.borrow_mut().answered(id, Fate::Unknown);
        let nodes = self.machines.len();
        let this = &mut self.clients[id.client];
        this.in_flight = false;
        this.current = None;
        this.believed = this.rng.index(nodes);
        let delay = this.rng.between(MILLISECOND, 20 * MILLISECOND);
        self.plan(delay, Plan::Client { client: id.client });
    }

    pub(super) fn answered(&mut self, node: usize, tag: u64, answer: &Answer) {
        let id = id_of(tag);
        if self.is_in_session(id) {
            let awaited = self.clients[id.client].book.as_ref().is_some_and(|book| book.awaits(tag));
            return match awaited {
                true => self.answered_in_session(node, id, answer),
                false => self.answered_late(node, id, answer),
            };
        }
        let nodes = self.machines.len();
        let this = &mut self.clients[id.client];
        let had_session = this.had_session;
        let wanted = this.current.filter(|wanted| this.in_flight && wanted.command.id == id);
        let awaited = wanted.is_some();
        match *answer {
            Answer::Committed { index, term, reply } => {
                self.context.record(node, What::Answer, tag, index ^ term << 48 ^ reply);
                self.history.borrow_mut().answered(id, Fate::Acknowledged { index, reply });
                if id.sequence >= this.fresh_from {
                    // A node that knows no other way reads through the log.
                    let read = wanted.is_some_and(|wanted| wanted.ask.is_some());
                    *(if read { &mut this.fresh_read } else { &mut this.fresh_acknowledged }) = true;
                }
                if let Some(Wanted { command, .. }) = wanted {
                    self.clients[id.client].learn(command, index, reply);
                    self.done(id.client);
                }
            }
            Answer::Read { applied, reply } => {
                self.context.record(node, What::Answer, tag, applied ^ reply);
                self.history.borrow_mut().answered(id, Fate::Read { applied, reply });
                if let Some(Wanted { command, ask, .. }) = wanted {
                    self.was_read(node, id, ask);
                    self.clients[id.client].learn(command, applied, reply);
                    self.done(id.client);
                }
            }
            Answer::Reached { index } => {
                self.context.record(node, What::Answer, tag, index);
                self.history.borrow_mut().answered(id, Fate::Reached { index });
                if let Some(Wanted { ask, .. }) = wanted {
                    if ask == Some(Ask::Round) {
                        let term = self.machines[node].view.term;
                        self.history.borrow_mut().round_forced(id, term);
                    }
                    self.done(id.client);
                }
            }
            Answer::Refused { leader } if awaited => {
                this.follow_hint(leader, nodes);
                self.refused(id);
            }
            // Of a session's command another attempt may have been applied.
            Answer::Refused { .. } if had_session => {}
            Answer::Refused { .. } => self.history.borrow_mut().answered(id, Fate::Refused),
            Answer::NeverApplied => self.history.borrow_mut().answered(id, Fate::Refused),
            Answer::Unknown if awaited => self.unknown(id),
            Answer::Unknown | Answer::Opened { .. } | Answer::Done | Answer::InSession(_) => {}
        }
    }

    /// A call was answered, and the client thinks about the next one.
    fn done(&mut self, client: usize) {
        let this = &mut self.clients[client];
        this.in_flight = false;
        this.current = None;
        let delay = this.rng.around(this.think);
        self.plan(delay, Plan::Client { client });
    }

    /// The client stops: a command that was refused last stays refused.
    fn abandon(&mut self, client: usize) {
        let this = &mut self.clients[client];
        if !this.in_flight {
            match this.current {
                Some(wanted) if this.book.is_some() && wanted.ask.is_none() => {
                    self.abandon_in_session(client)
                }
                _ => this.current = None,
            }
        }
    }
}

pub(super) fn tag_of(id: CommandId) -> u64 {
    (id.client as u64) << 32 | id.sequence as u64
}

/// Which of the attempts at a command of a session.
pub(super) fn attempt_of(tag: u64) -> u8 {
    (tag >> 24) as u8
}

fn id_of(tag: u64) -> CommandId {
    CommandId { client: (tag >> 32) as usize, sequence: (tag & 0xff_ffff) as usize }
}
