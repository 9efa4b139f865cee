//! What waits to be sent to one peer: appends whose batch must first be read from the log, and everything that the
//! link's queue has no room for. Messages to one peer keep their order.
//!
//! The core bounds what is in here by the peer's window; acks replace one another.

use crate::raft::{Vote, VoteReply};
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
    /// A read is under way.
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

    /// The session ended: what was queued for it is void. A read that is under way may still come back.
    pub(crate) fn clear(&mut self) {
        self.queue.clear();
        self.fetched.clear();
    }

    /// Looks at the head of the queue.
    pub(crate) fn head<'a>(&'a mut self, recent: &'a Recent<B>) -> Head<'a, B> {
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
            if std::mem::replace(&mut self.fetching, true) {
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
