//! Clients: each does one thing at a time, asks whom it believes to lead, and remembers what it was told.

use super::*;
use crate::sim::check::Fate;
use crate::sim::kv::Operation;
use crate::sim::node::RefusedAtOnce;

/// A kind of call in the table.
pub(super) struct Verb {
    /// How often it is made, against the others.
    weight: u64,
    /// What it asks of a key that was last seen holding `seen`; `unique` is a number of no other call.
    draw: fn(rng: &mut Rng, seen: u64, unique: u64) -> Operation,
    /// How it is asked.
    issue: fn(node: &mut dyn SimNode, tag: u64, bytes: &[u8]) -> Result<(), RefusedAtOnce>,
}

/// All kinds. A new one is an entry here; one that goes another way through a node has its own `issue`.
const VERBS: &[Verb] = &[
    Verb { weight: 4, draw: |_, _, _| Operation::Get, issue: |node, tag, bytes| node.propose(tag, bytes) },
    Verb {
        weight: 2,
        draw: |_, _, unique| Operation::Put { value: unique },
        issue: |node, tag, bytes| node.propose(tag, bytes),
    },
    Verb {
        weight: 3,
        draw: |rng, seen, unique| {
            let expected = if rng.chance(100_000) { 0 } else { seen };
            Operation::Cas { expected, new: unique }
        },
        issue: |node, tag, bytes| node.propose(tag, bytes),
    },
    Verb {
        weight: 4,
        draw: |_, _, unique| Operation::Append { item: unique },
        issue: |node, tag, bytes| node.propose(tag, bytes),
    },
];

/// What a client wants to be done.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub(super) command: Command,
    verb: &'static Verb,
    padding: usize,
}

pub(super) struct Client {
    rng: Rng,
    pub(super) believed: usize,
    pub(super) next: usize,
    /// What waits for an answer, or for another attempt.
    pub(super) current: Option<Wanted>,
    pub(super) in_flight: bool,
    /// What each key held when it was last seen.
    seen: [u64; KEYS],
    /// How many keys it uses.
    keys: usize,
    think: Time,
    /// How many election time-outs it waits for an answer.
    patience: u64,
    padding_max: u64,
    /// First command of the second phase.
    pub(super) fresh_from: usize,
    pub(super) fresh_acknowledged: bool,
}

impl Client {
    pub(super) fn draw(
        mut rng: Rng,
        nodes: usize,
        keys: usize,
        think: Time,
        command_bytes_max: usize,
    ) -> Self {
        Self {
            believed: rng.index(nodes),
            next: 0,
            current: None,
            in_flight: false,
            seen: [0; KEYS],
            keys,
            think: think * rng.between(1, 4),
            patience: rng.between(1, 10),
            padding_max: [100, 100, 100, 1_000, 1_000, 1_000, 5_000, 39_000][rng.index(8)]
                .min(command_bytes_max as u64 - 100),
            fresh_from: usize::MAX,
            fresh_acknowledged: false,
            rng,
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
        let padding = self.rng.below(self.padding_max) as usize;
        Wanted { command: Command { id, key: key as u8, operation }, verb, padding }
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
        let wanted = this.current.unwrap_or_else(|| this.want(client));
        let id = wanted.command.id;
        let node = this.believed;
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
        self.history.borrow_mut().proposed(wanted.command);
        self.context.record(node, What::Propose, client as u64, id.sequence as u64);
        let now = self.context.now();
        let machine = &mut self.machines[node];
        let outcome = match &mut machine.process {
            Some(process) if machine.paused_until <= now => {
                wanted.command.encode(wanted.padding, &mut self.bytes);
                (wanted.verb.issue)(process, tag_of(id), &self.bytes).map_err(|refused| refused.leader)
            }
            _ => Err(None),
        };
        let this = &mut self.clients[client];
        this.current = Some(wanted);
        match outcome {
            Ok(()) => {
                this.in_flight = true;
                self.machines[node].wake_at = 0;
                self.machines[node].called = true;
                let patience = self.tuning.election_timeout_ms * MILLISECOND * this.patience;
                self.plan(patience, Plan::GiveUp { client, sequence: id.sequence });
            }
            Err(leader) => {
                this.believed = leader.unwrap_or_else(|| this.rng.index(nodes));
                self.refused(id);
            }
        }
    }

    /// A definite refusal: the client tries again elsewhere, or sometimes lets go of the command.
    fn refused(&mut self, id: CommandId) {
        self.context.cover(Mark::Refused);
        self.context.record(0, What::Refused, id.client as u64, id.sequence as u64);
        self.history.borrow_mut().answered(id, Fate::Refused);
        let this = &mut self.clients[id.client];
        this.in_flight = false;
        if this.rng.chance(50_000) {
            this.current = None;
        }
        let delay = this.rng.between(MILLISECOND, 20 * MILLISECOND);
        self.plan(delay, Plan::Client { client: id.client });
    }

    pub(super) fn unknown(&mut self, id: CommandId) {
        self.context.cover(Mark::UnknownOutcome);
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
        let nodes = self.machines.len();
        let this = &mut self.clients[id.client];
        let wanted = this.current.filter(|wanted| this.in_flight && wanted.command.id == id);
        let awaited = wanted.is_some();
        match *answer {
            Answer::Committed { index, term, reply } => {
                self.context.record(node, What::Answer, tag, index ^ term << 48 ^ reply);
                self.history.borrow_mut().answered(id, Fate::Acknowledged { index, reply });
                if id.sequence >= this.fresh_from {
                    this.fresh_acknowledged = true;
                }
                if let Some(Wanted { command, .. }) = wanted {
                    this.seen[usize::from(command.key)] = match command.operation {
                        Operation::Put { value } => value,
                        Operation::Cas { expected, new } if expected == reply => new,
                        _ => reply,
                    };
                    this.in_flight = false;
                    this.current = None;
                    let delay = this.rng.around(this.think);
                    self.plan(delay, Plan::Client { client: id.client });
                }
            }
            Answer::Refused { leader } if awaited => {
                this.believed = leader.unwrap_or_else(|| this.rng.index(nodes));
                self.refused(id);
            }
            Answer::Refused { .. } => self.history.borrow_mut().answered(id, Fate::Refused),
            Answer::Unknown if awaited => self.unknown(id),
            Answer::Unknown => {}
        }
    }

    /// The client stops: a command that was refused last stays refused.
    fn abandon(&mut self, client: usize) {
        let this = &mut self.clients[client];
        if !this.in_flight {
            this.current = None;
        }
    }
}

fn tag_of(id: CommandId) -> u64 {
    (id.client as u64) << 32 | id.sequence as u64
}

fn id_of(tag: u64) -> CommandId {
    CommandId { client: (tag >> 32) as usize, sequence: (tag & 0xffff_ffff) as usize }
}
