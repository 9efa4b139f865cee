//! Batches with commands of sessions, and requests about sessions: the table decides, before the state machine sees a
//! command, and answers those who wait for one that it does not see.

use crate::error::{ProposeError, Refusal, Refused};
use crate::handle::{Committed, Outcome};
use crate::mutants::{self, Mutant};
use crate::proposals::Proposals;
use crate::sessions::{Answer, Control, Controlled, SessionRefusal, SessionTable, Verdict};
use crate::state_machine::{CommittedBatch, Replies, StateMachine};
use crate::tickets::Deliveries;
use bytes::Bytes;
use ringraft_block::{BlockBuf, LogIndex};
use ringraft_wal::format::BatchView;

/// The table, and room for the verdicts on one batch.
#[derive(Default)]
pub(super) struct Sessions {
    pub(super) table: SessionTable,
    verdicts: Vec<Option<Verdict>>,
    /// By position in the batch: what the state machine does not see.
    skipped: Vec<bool>,
    /// This member's own clock, which must decide nothing.
    pub(super) local_ms: u64,
}

/// Who waits for the outcomes of a batch, and how they get them.
pub(super) struct Waiters<'a, B: BlockBuf> {
    pub(super) proposals: &'a mut Proposals<B>,
    pub(super) deliveries: &'a mut Deliveries,
}

impl Sessions {
    /// The clock that sessions expire by.
    fn time_of(&self, log_ms: u64) -> u64 {
        if mutants::active(Mutant::DedupeByLocalClock) { self.local_ms } else { log_ms }
    }

    /// Applies a batch of commands, some of which are of sessions.
    pub(super) fn apply<S: StateMachine, B: BlockBuf>(
        &mut self,
        view: BatchView<'_>,
        machine: &mut S,
        replies: &mut Replies,
        waiters: Waiters<'_, B>,
    ) {
        let info = view.info();
        let time_ms = self.time_of(info.time_ms);
        self.verdicts.clear();
        self.skipped.clear();
        let (mut seen, mut kept) = (0, false);
        for command in view.commands() {
            let verdict = command.session.map(|session| {
                let session = (session.session, session.sequence);
                self.table.admit(session, command.index, info.term, time_ms)
            });
            let fresh = matches!(verdict, Some(Verdict::Fresh(_)));
            let skipped = verdict.is_some() && !fresh;
            kept |= fresh;
            seen += usize::from(!skipped);
            self.verdicts.push(verdict);
            self.skipped.push(skipped);
        }
        let awaited = waiters.proposals.awaits(info.first);
        // What is kept is equal on all members, so all compute it.
        replies.rearm(awaited || kept);
        if seen > 0 {
            machine.apply(&CommittedBatch::without(view, &self.skipped, seen), replies);
        }
        let mut position = 0;
        for verdict in &self.verdicts {
            if let Some(Verdict::Fresh(place)) = verdict {
                self.table.remember(*place, replies.get(position));
            }
            position += usize::from(matches!(verdict, None | Some(Verdict::Fresh(_))));
        }
        let mut position = 0;
        let outcome = |ordinal: usize, index: LogIndex| match self.verdicts.get(ordinal).copied().flatten() {
            None | Some(Verdict::Fresh(_)) => {
                position += 1;
                Ok(Committed { index, term: info.term, reply: replies.take(position - 1) })
            }
            Some(Verdict::Duplicate(place)) => outcome_of(self.table.answer(place)),
            Some(Verdict::Refused(reason)) => Err(refused(reason, view, ordinal)),
        };
        waiters.proposals.applied_with(&info, outcome, waiters.deliveries);
    }

    /// Applies a batch of requests. The index of one that this version does not know, if there is such.
    pub(super) fn control<B: BlockBuf>(
        &mut self,
        view: BatchView<'_>,
        waiters: Waiters<'_, B>,
    ) -> Result<(), LogIndex> {
        let info = view.info();
        let time_ms = self.time_of(info.time_ms);
        let awaited = waiters.proposals.awaits(info.first);
        let mut outcomes = Vec::with_capacity(if awaited { view.len() } else { 0 });
        for (ordinal, command) in view.commands().enumerate() {
            let control = Control::decode(command.bytes).ok_or(command.index)?;
            let done = self.table.control(control, command.index, time_ms);
            if awaited {
                outcomes.push(match done {
                    Ok(Controlled::Done) => {
                        Ok(Committed { index: command.index, term: info.term, reply: Bytes::new() })
                    }
                    // Before the next request makes another place of it.
                    Ok(Controlled::Applied(place)) => outcome_of(self.table.answer(place)),
                    Err(reason) => Err(refused(reason, view, ordinal)),
                });
            }
        }
        let mut outcomes = outcomes.into_iter();
        let outcome = |_, index| {
            let done = Committed { index, term: info.term, reply: Bytes::new() };
            outcomes.next().unwrap_or(Ok(done))
        };
        waiters.proposals.applied_with(&info, outcome, waiters.deliveries);
        Ok(())
    }
}

fn outcome_of(Answer { index, term, reply }: Answer) -> Outcome {
    match reply {
        Some(reply) => Ok(Committed { index, term, reply: reply.into() }),
        None => Err(ProposeError::ReplyGone { index, term }),
    }
}

fn refused(reason: SessionRefusal, view: BatchView<'_>, ordinal: usize) -> ProposeError {
    let command = view.command(ordinal).map(|command| Bytes::copy_from_slice(command.bytes));
    Refused { reason: Refusal::Session(reason), command: command.unwrap_or_default() }.into()
}

#[cfg(test)]
mod tests;
