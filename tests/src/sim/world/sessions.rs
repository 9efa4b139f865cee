//! Clients with sessions: whatever happens, each of their commands is applied at most once, and they may find out which.
//!
//! A client opens a session, proposes one command after the other in it, and acknowledges them by the way. A command of unknown
//! outcome is proposed again, or resolved, at any node, or given up. Now and then the client does what a network that repeats
//! messages does: it proposes again what was answered, acknowledged, or resolved as never applied.

use super::clients::Wanted;
use super::*;
use crate::sim::check::Fate;
use crate::sim::node::{Place, SessionAsk, SessionRefusal};

/// What a client knows of its session.
pub(super) struct Book {
    session: Option<u64>,
    /// Of the current command, or the next one.
    sequence: u64,
    /// All below is acknowledged, as the cluster has confirmed.
    floor: u64,
    /// An earlier attempt at the current command may be applied yet.
    doubtful: bool,
    /// The history does not count the current command as asked for.
    unasked: bool,
    stage: Stage,
    /// The number of the last attempt at anything.
    attempt: u8,
    /// The last command that was done, with its sequence.
    last: Option<(u64, Wanted)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Begin,
    Opening,
    Acknowledging,
    /// What was acknowledged is proposed again.
    Late,
    Proposing,
    Resolving,
    /// What was resolved as never applied is proposed again.
    Fenced,
    /// What was answered with this is proposed again.
    Again {
        index: u64,
        reply: u64,
    },
}

impl Book {
    pub(super) fn new() -> Self {
        Self {
            session: None,
            sequence: 1,
            floor: 1,
            doubtful: false,
            unasked: true,
            stage: Stage::Begin,
            attempt: 0,
            last: None,
        }
    }

    /// Whether an answer under this tag is one to the last attempt.
    pub(super) fn awaits(&self, tag: u64) -> bool {
        clients::attempt_of(tag) == self.attempt
    }

    /// The current command is over; `used`: so is its sequence.
    fn finish(&mut self, used: bool) {
        self.sequence += u64::from(used);
        (self.doubtful, self.unasked, self.stage) = (false, true, Stage::Begin);
    }

    fn forget(&mut self) {
        (self.session, self.sequence, self.floor, self.last) = (None, 1, 1, None);
    }

    fn place(&self, sequence: u64, doubtful: bool) -> Place {
        Place { session: self.session.unwrap_or(0), floor: self.floor, sequence, doubtful }
    }
}

impl<C: Cluster> World<'_, C> {
    /// Whether the client has a command of a session under way, and it is this one.
    pub(super) fn is_in_session(&self, id: CommandId) -> bool {
        let this = &self.clients[id.client];
        let current = |wanted: Wanted| wanted.command.id == id && wanted.ask.is_none();
        this.book.is_some() && this.current.is_some_and(current)
    }

    /// The client's next step with its current command, at `node`, if that does not stand still.
    pub(super) fn acts_in_session(&mut self, client: usize, node: usize, stands: bool, wanted: Wanted) {
        let window = u64::from(self.tuning.session_window);
        let this = &mut self.clients[client];
        this.current = Some(wanted);
        let Some(book) = &mut this.book else { return };
        if std::mem::take(&mut book.unasked) {
            self.history.borrow_mut().asked(wanted.command, None);
        }
        if book.stage == Stage::Begin {
            book.stage = match book.session {
                None => Stage::Opening,
                Some(_) if book.sequence - book.floor >= (window / 2).max(1) => Stage::Acknowledging,
                Some(_) => Stage::Proposing,
            };
        }
        let own = book.place(book.sequence, book.doubtful);
        let (ask, command) = match book.stage {
            Stage::Begin | Stage::Opening => (SessionAsk::Open, wanted),
            Stage::Acknowledging => (SessionAsk::Acknowledge(book.place(book.sequence - 1, false)), wanted),
            Stage::Late => {
                let (sequence, last) = book.last.unwrap_or((book.sequence, wanted));
                (SessionAsk::Propose(book.place(sequence, true)), last)
            }
            Stage::Proposing => (SessionAsk::Propose(own), wanted),
            Stage::Resolving => (SessionAsk::Resolve(own), wanted),
            Stage::Fenced | Stage::Again { .. } => {
                (SessionAsk::Propose(Place { doubtful: true, ..own }), wanted)
            }
        };
        if book.stage == Stage::Proposing && book.doubtful {
            self.context.cover(Mark::ProposedAgain);
        }
        let id = wanted.command.id;
        book.attempt = book.attempt.wrapping_add(1);
        let tag = clients::tag_of(id) | u64::from(book.attempt) << 24;
        self.context.record(node, What::Propose, client as u64, id.sequence as u64);
        let Some(process) = self.machines[node].process.as_mut().filter(|_| !stands) else {
            return self.answered_in_session(node, id, &Answer::Refused { leader: None });
        };
        command.command.encode(command.padding, &mut self.bytes);
        if !process.in_session(tag, ask, &self.bytes) {
            // Nodes of this kind know no sessions.
            self.clients[client].book = None;
            return self.plan(0, Plan::Client { client });
        }
        self.issued(client, node, id);
    }

    /// Something came back of an attempt at the client's current command that it had given up: only facts count.
    pub(super) fn answered_late(&mut self, node: usize, id: CommandId, answer: &Answer) {
        let Some(book) = &self.clients[id.client].book else { return };
        let open = matches!(book.stage, Stage::Proposing | Stage::Resolving) && !book.unasked;
        if open && matches!(answer, Answer::Committed { .. } | Answer::NeverApplied) {
            self.answered_in_session(node, id, answer);
        }
    }

    /// Something came back of the last attempt at the client's current command, or will not.
    pub(super) fn answered_in_session(&mut self, node: usize, id: CommandId, answer: &Answer) {
        let nodes = self.machines.len();
        let this = &mut self.clients[id.client];
        let Some(wanted) = this.current else { return };
        let Some(book) = &mut this.book else { return };
        let stage = book.stage;
        this.in_flight = false;
        match *answer {
            Answer::Committed { index, term, reply } => {
                self.context.record(node, What::Answer, clients::tag_of(id), index ^ term << 48 ^ reply);
                match stage {
                    Stage::Again { index: first, reply: told } => {
                        self.context.cover(Mark::AnsweredAgain);
                        if (first, told) != (index, reply) {
                            self.fail_history(|| {
                                format!(
                                    "{id:?} was answered {told:x} at index {first}, and then {reply:x} at {index}"
                                )
                            });
                        }
                        return self.over(id.client, true);
                    }
                    Stage::Late | Stage::Fenced => {
                        return self.fail_history(|| {
                            format!(
                                "{id:?} of a session was applied at index {index} although it is {stage:?}"
                            )
                        });
                    }
                    _ => {}
                }
                book.last = Some((book.sequence, wanted));
                self.history.borrow_mut().answered(id, Fate::Acknowledged { index, reply });
                let this = &mut self.clients[id.client];
                if id.sequence >= this.fresh_from {
                    this.fresh_acknowledged = true;
                }
                this.learn(wanted.command, index, reply);
                if this.rng.chance(250_000) {
                    self.next_stage(id.client, Stage::Again { index, reply });
                } else {
                    self.over(id.client, true);
                }
            }
            Answer::Opened { session } if stage == Stage::Opening => {
                self.context.cover(Mark::SessionOpened);
                book.forget();
                book.session = Some(session);
                self.next_stage(id.client, Stage::Begin);
            }
            Answer::Done if stage == Stage::Acknowledging => {
                book.floor = book.sequence;
                let late = book.last.is_some_and(|(sequence, _)| sequence < book.floor);
                let late = late && this.rng.chance(300_000);
                self.next_stage(id.client, if late { Stage::Late } else { Stage::Begin });
            }
            Answer::NeverApplied => match stage {
                Stage::Fenced => self.over(id.client, true),
                Stage::Again { .. } => {
                    self.fail_history(|| format!("{id:?} was acknowledged, and resolved as never applied"));
                }
                _ => {
                    self.context.cover(Mark::ResolvedNever);
                    self.history.borrow_mut().answered(id, Fate::Refused);
                    if self.clients[id.client].rng.chance(500_000) {
                        self.next_stage(id.client, Stage::Fenced);
                    } else {
                        self.over(id.client, true);
                    }
                }
            },
            Answer::InSession(refusal) => self.refused_in_session(id, stage, refusal),
            Answer::Refused { leader } => {
                this.follow_hint(leader, nodes);
                match stage {
                    Stage::Proposing if !this.is_doubtful() => {
                        self.context.cover(Mark::Refused);
                        self.history.borrow_mut().answered(id, Fate::Refused);
                        let this = &mut self.clients[id.client];
                        if this.rng.chance(50_000) {
                            return self.over(id.client, false);
                        }
                        if let Some(book) = &mut this.book {
                            book.unasked = true;
                        }
                        self.next_stage(id.client, stage);
                    }
                    _ => self.in_doubt(id, stage),
                }
            }
            Answer::Unknown => {
                self.context.cover(Mark::UnknownOutcome);
                this.believed = this.rng.index(nodes);
                if let (Stage::Proposing, Some(book)) = (stage, &mut this.book) {
                    book.doubtful = true;
                }
                self.in_doubt(id, stage);
            }
            // Of an earlier attempt at something else.
            _ => self.next_stage(id.client, stage),
        }
    }

    /// An attempt has come to nothing that is known.
    fn in_doubt(&mut self, id: CommandId, stage: Stage) {
        let this = &mut self.clients[id.client];
        let next = match stage {
            Stage::Begin | Stage::Opening | Stage::Acknowledging => stage,
            Stage::Late => Stage::Begin,
            Stage::Again { .. } | Stage::Fenced => return self.over(id.client, true),
            Stage::Proposing | Stage::Resolving => match this.rng.below(100) {
                0..10 => {
                    self.history.borrow_mut().answered(id, Fate::Unknown);
                    return self.over(id.client, true);
                }
                10..45 => Stage::Proposing,
                _ => Stage::Resolving,
            },
        };
        self.next_stage(id.client, next);
    }

    /// The rules of the session say no.
    fn refused_in_session(&mut self, id: CommandId, stage: Stage, refusal: SessionRefusal) {
        let this = &mut self.clients[id.client];
        let Some(book) = &mut this.book else { return };
        let doubtful = book.doubtful;
        if refusal == SessionRefusal::Expired {
            self.context.cover(Mark::SessionExpired);
            book.forget();
        }
        match (stage, refusal) {
            (Stage::Opening, SessionRefusal::TableFull) => {
                self.context.cover(Mark::SessionTableFull);
                this.book = None;
                self.plan(0, Plan::Client { client: id.client });
            }
            (Stage::Late, SessionRefusal::BelowFloor) => {
                self.context.cover(Mark::BelowFloor);
                self.next_stage(id.client, Stage::Begin);
            }
            // The second answer, when the late command was sent again: nothing else of this client is under way.
            (Stage::Begin, SessionRefusal::BelowFloor) => {}
            (Stage::Late | Stage::Acknowledging, SessionRefusal::Expired) => {
                self.next_stage(id.client, Stage::Begin);
            }
            (Stage::Fenced, SessionRefusal::Fenced) => {
                self.context.cover(Mark::FenceHeld);
                self.over(id.client, true);
            }
            (Stage::Fenced | Stage::Again { .. }, SessionRefusal::Expired) => self.over(id.client, false),
            (Stage::Again { .. }, SessionRefusal::ReplyGone { .. }) => self.over(id.client, true),
            (Stage::Proposing | Stage::Resolving, SessionRefusal::Fenced) => {
                self.history.borrow_mut().answered(id, Fate::Refused);
                self.over(id.client, true);
            }
            (Stage::Proposing | Stage::Resolving, SessionRefusal::ReplyGone { .. }) => {
                self.history.borrow_mut().answered(id, Fate::Unknown);
                self.over(id.client, true);
            }
            (Stage::Proposing | Stage::Resolving, SessionRefusal::Expired) => {
                let fate = if doubtful { Fate::Unknown } else { Fate::Refused };
                self.history.borrow_mut().answered(id, fate);
                self.over(id.client, false);
            }
            _ => self.fail_history(|| format!("{id:?} of a session, {stage:?}, was refused as {refusal:?}")),
        }
    }

    fn next_stage(&mut self, client: usize, stage: Stage) {
        let this = &mut self.clients[client];
        if let Some(book) = &mut this.book {
            book.stage = stage;
        }
        let delay = this.rng.between(MILLISECOND / 10, 20 * MILLISECOND);
        self.plan(delay, Plan::Client { client });
    }

    fn over(&mut self, client: usize, used: bool) {
        let this = &mut self.clients[client];
        if let Some(book) = &mut this.book {
            book.finish(used);
        }
        this.current = None;
        let delay = this.rng.around(this.think);
        self.plan(delay, Plan::Client { client });
    }

    /// The client stops with a command of its session under way: nobody will say what became of it.
    pub(super) fn abandon_in_session(&mut self, client: usize) {
        let this = &mut self.clients[client];
        let Some(wanted) = this.current.take() else { return };
        self.history.borrow_mut().abandon(wanted.command.id);
    }

    fn fail_history(&self, why: impl FnOnce() -> String) {
        self.history.borrow_mut().fail(why);
    }
}

impl Client {
    pub(super) fn is_doubtful(&self) -> bool {
        self.book.as_ref().is_some_and(|book| book.doubtful)
    }
}
