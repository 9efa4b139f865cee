//! The engine's sessions, as calls of simulated clients.

use super::leader_in;
use super::reads::poll;
use crate::sim::node::{Answer, Place, SessionAsk, SessionRefusal as Says};
use ringraft::Handle;
use ringraft::error::{ProposeError, Refusal};
use ringraft::handle::{Committed, Outcome};
use ringraft::sessions::{
    Resolution, Resolved, Session, SessionControl, SessionOpening, SessionPosition, SessionProposal,
    SessionRefusal,
};

/// Calls that are to be answered, by tag.
pub(super) struct Sessions {
    calls: Vec<(u64, Call)>,
    window: u32,
}

enum Call {
    Open(SessionOpening),
    Propose(SessionProposal),
    Resolve(Resolution),
    Acknowledge(SessionControl),
}

impl Sessions {
    pub(super) fn new(window: u32) -> Self {
        Self { calls: Vec::new(), window }
    }

    pub(super) fn ask(&mut self, handle: &Handle, tag: u64, ask: SessionAsk, command: &[u8]) {
        let call = match ask {
            SessionAsk::Open => Call::Open(handle.open_session()),
            SessionAsk::Propose(place) => {
                let session = self.session(handle, place);
                Call::Propose(session.propose_with_sequence(place.sequence, command.to_vec()))
            }
            SessionAsk::Resolve(place) => Call::Resolve(self.session(handle, place).resolve(place.sequence)),
            SessionAsk::Acknowledge(place) => {
                Call::Acknowledge(self.session(handle, place).acknowledge(place.sequence))
            }
        };
        self.calls.push((tag, call));
    }

    /// As after a restart of the client: from what it kept.
    fn session(&self, handle: &Handle, place: Place) -> Session {
        let Place { session, floor, sequence, doubtful } = place;
        let next = sequence + u64::from(doubtful);
        handle.resume_session(SessionPosition {
            id: session,
            window: self.window,
            floor,
            confirmed: floor,
            next,
        })
    }

    /// Moves the answers that have arrived to `out`.
    pub(super) fn answers(&mut self, out: &mut Vec<(u64, Answer)>) {
        self.calls.retain_mut(|(tag, call)| {
            let answer = match call {
                Call::Open(opening) => poll(opening).map(|opened| match opened {
                    Ok(session) => Answer::Opened { session: session.id() },
                    Err(error) => failed(&error),
                }),
                Call::Propose(proposal) => poll(proposal).map(answer),
                Call::Resolve(resolution) => poll(resolution).map(|resolved| match resolved {
                    Ok(Resolved::Committed(committed)) => answered(&committed),
                    Ok(Resolved::ReplyGone { index, .. }) => {
                        Answer::InSession(Says::ReplyGone { index: index.get() })
                    }
                    Ok(Resolved::NeverApplied) => Answer::NeverApplied,
                    Err(error) => failed(&error),
                }),
                Call::Acknowledge(control) => {
                    poll(control).map(|done| done.map_or_else(|error| failed(&error), |()| Answer::Done))
                }
            };
            let Some(answer) = answer else { return true };
            out.push((*tag, answer));
            false
        });
    }
}

fn answered(committed: &Committed) -> Answer {
    let reply = committed.reply.first_chunk().map_or(0, |reply| u64::from_le_bytes(*reply));
    Answer::Committed { index: committed.index.get(), term: committed.term.get(), reply }
}

/// What a client is told of a command.
pub(super) fn answer(outcome: Outcome) -> Answer {
    outcome.map_or_else(|error| failed(&error), |committed| answered(&committed))
}

fn failed(error: &ProposeError) -> Answer {
    match error {
        ProposeError::Refused(refused) => match &refused.reason {
            Refusal::Session(refusal) => Answer::InSession(match refusal {
                SessionRefusal::Expired => Says::Expired,
                SessionRefusal::BelowFloor { .. } => Says::BelowFloor,
                SessionRefusal::BeyondWindow { .. } => Says::BeyondWindow,
                SessionRefusal::Fenced => Says::Fenced,
                SessionRefusal::TableFull { .. } => Says::TableFull,
            }),
            reason => Answer::Refused { leader: leader_in(reason) },
        },
        ProposeError::Unknown(_) => Answer::Unknown,
        ProposeError::ReplyGone { index, .. } => Answer::InSession(Says::ReplyGone { index: index.get() }),
    }
}
