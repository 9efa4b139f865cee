//! Term and vote, and the rule that nothing leaves before they are durable.
//!
//! Every message carries the term, or promises a vote, so while a save is pending every message waits for it:
//! a node that acknowledged in a term and then forgot the term could elect an older leader beside a newer one
//! that counts on it.

use super::{Action, Message};
use crate::mutants::{self, Mutant};
use ringraft_block::{NodeId, Term};

/// Current term and vote, and how much of their history is durable.
#[derive(Clone, Debug)]
pub(super) struct HardState {
    term: Term,
    vote: Option<NodeId>,
    /// Number of the latest save asked for.
    asked: u64,
    /// Number of the latest save known to be durable; never above `asked`.
    saved: u64,
    /// Changed since the latest save was asked for.
    changed: bool,
}

impl HardState {
    /// As recovered. It is to be saved first where something else than the hard state has told of the term.
    pub(super) fn recovered(term: Term, vote: Option<NodeId>, is_saved: bool) -> Self {
        Self { term, vote, asked: 0, saved: 0, changed: !is_saved }
    }

    pub(super) fn term(&self) -> Term {
        self.term
    }

    pub(super) fn vote(&self) -> Option<NodeId> {
        self.vote
    }

    pub(super) fn asked(&self) -> u64 {
        self.asked
    }

    pub(super) fn saved(&self) -> u64 {
        self.saved
    }

    /// Whether everything is durable.
    pub(super) fn is_saved(&self) -> bool {
        !self.changed && self.saved == self.asked
    }

    /// Enters a later term, without a vote in it.
    pub(super) fn enter(&mut self, term: Term) {
        debug_assert!(term > self.term, "{term} does not follow {}", self.term);
        self.term = term;
        self.vote = None;
        self.changed = true;
    }

    /// Votes in the current term.
    pub(super) fn vote_for(&mut self, candidate: NodeId) {
        debug_assert!(
            self.vote.is_none_or(|vote| vote == candidate) || mutants::any(),
            "a second vote in {}",
            self.term
        );
        self.changed |= self.vote != Some(candidate);
        self.vote = Some(candidate);
    }

    /// Asks for a save if anything changed. To be called before anything is sent.
    pub(super) fn flush(&mut self, actions: &mut Vec<Action>) {
        if self.changed {
            self.changed = false;
            self.asked += 1;
            actions.push(Action::SaveHardState { sequence: self.asked, term: self.term, vote: self.vote });
        }
    }

    /// A save is durable. False if it was never asked for.
    pub(super) fn completed(&mut self, sequence: u64) -> bool {
        self.saved = self.saved.max(sequence.min(self.asked));
        sequence <= self.asked
    }

    /// The way out for messages.
    pub(super) fn outbox<'a>(&mut self, actions: &'a mut Vec<Action>) -> Outbox<'a> {
        self.flush(actions);
        Outbox { after: (self.saved < self.asked).then_some(self.asked), actions }
    }
}

/// Sends at once, or after the save that is pending.
pub(super) struct Outbox<'a> {
    after: Option<u64>,
    actions: &'a mut Vec<Action>,
}

impl Outbox<'_> {
    pub(super) fn send(&mut self, to: NodeId, message: Message) {
        let unguarded =
            mutants::active(Mutant::VoteReplyBeforeSave) && matches!(message, Message::VoteReply(_));
        self.actions.push(match self.after {
            Some(sequence) if !unguarded => Action::SendAfterSave { sequence, to, message },
            _ => Action::SendNow { to, message },
        });
    }
}
