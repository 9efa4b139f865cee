//! What waits to be sent to one peer: appends whose batch must first be read from the log, and everything that the
//! link's queue has no room for. Messages to one peer keep their order.
//!
//! The core bounds what is in here by the peer's window; acks replace one another.

use crate::raft::{ReadIndex, ReadIndexReply, TimeoutNow, Vote, VoteReply};
use crate::recent::Recent;
use crate::wire::{AckMessage, AppendMessage};
use ringraft_block::{BlockBuf, LogIndex};
use ringraft_wal::StoredBatch;
use std::collections::VecDeque;

/// A message with all that its body needs.
pub(crate) enum Outgoing {
    Append(AppendMessage),
    Ack(AckMessage),
    Vote(Vote),
    VoteReply(VoteReply),
    TimeoutNow(TimeoutNow),
    ReadIndex(ReadIndex),
    ReadIndexReply(ReadIndexReply),
}

pub(crate) struct Outbox<B: BlockBuf> {
    queue: VecDeque<Outgoing>,
    /// Read from the log for this peer, in order.
    fetched: VecDeque<StoredBatch<B>>,
    fetching: bool,
}

/// What the message at the head of the queue needs.
pub(crate) enum Head<'a, B: BlockBuf> {
    /// There is none.
    Empty,
    /// It can be sent, with this batch beside it.
    Ready(&'a Outgoing, Option<&'a StoredBatch<B>>),
    /// Its batch must be read from the log, from this index on.
    Fetch(LogIndex),
    /// A read is under way, or the log has not taken the batch yet.
    Waiting,
}

impl<B: BlockBuf> Outbox<B> {
    pub(crate) fn new() -> Self {
        Self { queue: VecDeque::new(), fetched: VecDeque::new(), fetching: false }
    }

    pub(crate) fn push(&mut self, message: Outgoing) {
        if let (Outgoing::Ack(_), Some(last @ Outgoing::Ack(_))) = (&message, self.queue.back_mut()) {
            *last = message;
        } else {
            self.queue.push_back(message);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Leadership ended: appends are void, what else was said is not.
    pub(crate) fn clear_appends(&mut self) {
        self.queue.retain(|message| !matches!(message, Outgoing::Append(_)));
        self.fetched.clear();
    }

    /// The session ended: what was queued for it is void. A read that is under way may still come back.
    pub(crate) fn clear(&mut self) {
        self.queue.clear();
        self.fetched.clear();
    }

    /// Looks at the head of the queue. Batches up to `durable` can be read back from the log; a later one is in `recent`,
    /// or will be as soon as the log takes it.
    pub(crate) fn head<'a>(&'a mut self, recent: &'a Recent<B>, durable: LogIndex) -> Head<'a, B> {
        let Some(message) = self.queue.front() else { return Head::Empty };
        let Outgoing::Append(AppendMessage { append, .. }) = message else {
            return Head::Ready(message, None);
        };
        let Some(run) = append.batch else { return Head::Ready(message, None) };
        while self.fetched.front().is_some_and(|batch| batch.info.first < run.first) {
            self.fetched.pop_front();
        }
        let is_it = |batch: &&StoredBatch<B>| batch.info.first == run.first && batch.info.term == run.term;
        let held = recent.starting_at(run.first).filter(is_it).is_some();
        if !held && self.fetched.front().filter(is_it).is_none() {
            if run.last > durable || std::mem::replace(&mut self.fetching, true) {
                return Head::Waiting;
            }
            self.fetched.clear();
            return Head::Fetch(run.first);
        }
        Head::Ready(message, if held { recent.starting_at(run.first) } else { self.fetched.front() })
    }

    /// The head has been sent.
    pub(crate) fn pop(&mut self) {
        self.queue.pop_front();
    }

    /// The read that [`Head::Fetch`] asked for has ended, with nothing if it failed or was overtaken.
    pub(crate) fn fetched(&mut self, batches: Vec<StoredBatch<B>>) {
        self.fetching = false;
        self.fetched = batches.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::{Append, BatchRun, LogId, Round};
    use ringraft_block::{AlignedBuf, Term};
    use ringraft_wal::format::Chain;

    fn append(first: u64) -> Outgoing {
        let append = Append {
            term: Term(1),
            previous: LogId { term: Term(1), index: LogIndex(first - 1) },
            batch: Some(BatchRun {
                first: LogIndex(first),
                last: LogIndex(first),
                term: Term(1),
                bytes: 300,
            }),
            commit: LogIndex(0),
            round: Round(1),
            reply_now: false,
            configuration: None,
        };
        Outgoing::Append(AppendMessage { append, previous_chain: Chain::default(), chain: Chain::default() })
    }

    /// Found by the simulator (seed 15 of the first range): the append of a batch that the log had no room for yet was
    /// looked for on disk, not found there, and looked for again in every turn.
    #[test]
    fn a_batch_that_the_log_has_not_taken_is_waited_for_and_not_read() {
        let recent = Recent::<AlignedBuf>::new(1 << 20);
        let mut outbox = Outbox::new();
        outbox.push(append(8));
        assert!(matches!(outbox.head(&recent, LogIndex(7)), Head::Waiting));
        assert!(matches!(outbox.head(&recent, LogIndex(8)), Head::Fetch(LogIndex(8))));
        assert!(matches!(outbox.head(&recent, LogIndex(8)), Head::Waiting), "one read at a time");
        outbox.fetched(Vec::new());
        assert!(matches!(outbox.head(&recent, LogIndex(8)), Head::Fetch(LogIndex(8))), "asked for again");
    }

    #[test]
    fn a_new_session_begins_with_an_empty_outbox() {
        let recent = Recent::<AlignedBuf>::new(1 << 20);
        let mut outbox = Outbox::new();
        outbox.push(append(8));
        outbox.clear();
        assert!(matches!(outbox.head(&recent, LogIndex(8)), Head::Empty));
    }
}
