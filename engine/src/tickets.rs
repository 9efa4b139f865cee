//! Who waits for which command, and how outcomes get there.

use crate::group::Target;
use crate::handle::{Completion, Outcome, ProposalSlot};
use std::sync::Arc;

/// Where the outcome of a command goes.
pub(crate) enum Ticket {
    /// A [`Proposal`](crate::handle::Proposal) future.
    Proposal(Arc<ProposalSlot>),
    /// A request about sessions, which goes into a batch of its own kind.
    Control(Arc<ProposalSlot>),
    /// One of the commands that somebody tells apart by tags.
    Tagged { target: Target, tag: u64 },
}

/// Those who wait for the commands of a batch, in its order. Of commands in a row for the same target only the tags are kept
/// one by one.
#[derive(Default)]
pub(crate) struct Tickets {
    waiting: Vec<Waiting>,
    tags: Vec<u64>,
    len: usize,
}

enum Waiting {
    Slot(Arc<ProposalSlot>),
    Tagged { target: Target, commands: usize },
}

impl Tickets {
    /// How many commands they are for.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn push(&mut self, ticket: Ticket) {
        match ticket {
            Ticket::Proposal(slot) | Ticket::Control(slot) => {
                self.waiting.push(Waiting::Slot(slot));
                self.len += 1;
            }
            Ticket::Tagged { target, tag } => self.push_tagged(&target, tag),
        }
    }

    pub(crate) fn push_tagged(&mut self, target: &Target, tag: u64) {
        match self.waiting.last_mut() {
            Some(Waiting::Tagged { target: last, commands }) if last.is(target) => *commands += 1,
            _ => self.waiting.push(Waiting::Tagged { target: target.clone(), commands: 1 }),
        }
        self.tags.push(tag);
        self.len += 1;
    }

    /// As many times [`Tickets::push_tagged`].
    pub(crate) fn push_run(&mut self, target: &Target, tags: &[u64]) {
        if let [first, rest @ ..] = tags {
            self.push_tagged(target, *first);
            if let Some(Waiting::Tagged { commands, .. }) = self.waiting.last_mut() {
                *commands += rest.len();
            }
            self.tags.extend_from_slice(rest);
            self.len += rest.len();
        }
    }

    /// Tells each the outcome for its position, in order. Leaves none.
    pub(crate) fn deliver(
        &mut self,
        deliveries: &mut Deliveries,
        mut outcome_of: impl FnMut(usize) -> Outcome,
    ) {
        let mut tags = self.tags.drain(..);
        let mut position = 0;
        let mut next = || {
            position += 1;
            outcome_of(position - 1)
        };
        for waiting in self.waiting.drain(..) {
            match waiting {
                Waiting::Slot(slot) => slot.complete(next()),
                Waiting::Tagged { target, commands } => {
                    let run = tags.by_ref().take(commands);
                    deliveries.extend(target, run.map(|tag| Completion { tag, outcome: next() }));
                }
            }
        }
        self.len = 0;
    }
}

/// Outcomes of one turn, gathered so that each target is locked and woken once per run of its commands.
#[derive(Default)]
pub(crate) struct Deliveries {
    target: Option<Target>,
    run: Vec<Completion>,
}

impl Deliveries {
    pub(crate) fn push(&mut self, ticket: Ticket, outcome: Outcome) {
        match ticket {
            Ticket::Tagged { target, tag } => self.extend(target, [Completion { tag, outcome }]),
            Ticket::Proposal(slot) | Ticket::Control(slot) => slot.complete(outcome),
        }
    }

    fn extend(&mut self, target: Target, run: impl IntoIterator<Item = Completion>) {
        if !self.target.as_ref().is_some_and(|last| last.is(&target)) {
            self.flush();
            self.target = Some(target);
        }
        self.run.extend(run);
    }

    pub(crate) fn flush(&mut self) {
        if let Some(target) = self.target.take() {
            target.complete(&mut self.run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::{Committed, PipelineShared};
    use bytes::Bytes;
    use ringraft_block::{LogIndex, Term};
    use std::time::Duration;

    #[test]
    fn each_position_is_told_to_the_one_who_waits_for_it() {
        let pipelines = [(); 2].map(|()| Arc::new(PipelineShared::default()));
        let slots = [(); 2].map(|()| Arc::new(ProposalSlot::default()));
        let tagged = |pipeline: usize, tag| {
            let target = Target::Pipeline(Arc::clone(&pipelines[pipeline]));
            Ticket::Tagged { target, tag }
        };
        let mut tickets = Tickets::default();
        tickets.push(tagged(0, 10));
        tickets.push_run(&Target::Pipeline(Arc::clone(&pipelines[0])), &[11, 12]);
        tickets.push(Ticket::Proposal(Arc::clone(&slots[0])));
        tickets.push(tagged(0, 14));
        tickets.push(tagged(1, 15));
        tickets.push(tagged(0, 16));
        tickets.push(Ticket::Control(Arc::clone(&slots[1])));
        assert_eq!(tickets.len(), 8);

        let mut deliveries = Deliveries::default();
        let at = |position: usize| Committed {
            index: LogIndex(100 + position as u64),
            term: Term(1),
            reply: Bytes::new(),
        };
        tickets.deliver(&mut deliveries, |position| Ok(at(position)));
        deliveries.flush();
        assert!(tickets.is_empty());
        let told = |pipeline: &PipelineShared| {
            let mut completions = Vec::new();
            pipeline.wait(&mut completions, Duration::ZERO, Duration::ZERO);
            let told = completions.into_iter();
            told.map(|done| (done.tag, done.outcome.unwrap().index.get())).collect::<Vec<_>>()
        };
        assert_eq!(told(&pipelines[0]), [(10, 100), (11, 101), (12, 102), (14, 104), (16, 106)]);
        assert_eq!(told(&pipelines[1]), [(15, 105)]);
        let slots = slots.map(|slot| slot.take().unwrap().unwrap().index.get());
        assert_eq!(slots, [103, 107]);
    }
}
