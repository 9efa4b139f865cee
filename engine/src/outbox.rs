//! What waits to be sent to one peer: appends whose batch must first be read from the log, and everything that the
//! link's queue has no room for.
//!
//! **Order.** Appends with a batch keep theirs. What carries no batch goes first: heartbeats, rounds of reads, commit
//! notices, votes and acks do not wait until the log has taken a batch, has read it, or has got it back from another
//! member, nor until the link has room for all batches. That is right since every message is true by itself, whenever it
//! arrives: the core assumes no order between messages, and a round that comes back says that the peer follows, not what
//! it holds. One thing would be a nuisance: an append without a batch asks whether the peer's log reaches up to a position,
//! and a peer that has not been sent what lies before that says no, so that the leader takes it for lost and sends it
//! again. So one that goes first asks about the position behind which the first batch in here begins: all before that has
//! left, in order and in the same session. (A leader that has sent nothing else yet would have asked the same.)
//!
//! **Bounds.** The peer's window bounds the batches. Acks replace one another, and so do appends without a batch, which a
//! leader may send for every round of reads that the other members answer.

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
    /// What carries no batch.
    light: VecDeque<Outgoing>,
    /// Appends that carry one.
    batches: VecDeque<AppendMessage>,
    /// Read from the log for this peer, in order.
    fetched: VecDeque<StoredBatch<B>>,
    fetching: bool,
}

/// What the message to be sent next needs.
pub(crate) enum Head<'a, B: BlockBuf> {
    /// There is none.
    Empty,
    /// It can be sent; it carries no batch.
    Light(&'a Outgoing),
    /// It can be sent, with this batch beside it.
    Batch(&'a AppendMessage, &'a StoredBatch<B>),
    /// Its batch must be read from the log, from this index on.
    Fetch(LogIndex),
    /// A read is under way, or the log has not taken the batch yet.
    Waiting,
}

impl<B: BlockBuf> Outbox<B> {
    pub(crate) fn new() -> Self {
        Self { light: VecDeque::new(), batches: VecDeque::new(), fetched: VecDeque::new(), fetching: false }
    }

    pub(crate) fn push(&mut self, message: Outgoing) {
        match (message, self.light.back_mut()) {
            (Outgoing::Append(message), _) if message.append.batch.is_some() => {
                self.batches.push_back(message);
            }
            (message @ Outgoing::Ack(_), Some(last @ Outgoing::Ack(_))) => *last = message,
            (Outgoing::Append(message), Some(Outgoing::Append(last)))
                if message.append.term == last.append.term =>
            {
                merge(last, message);
            }
            (message, _) => self.light.push_back(message),
        }
    }

    /// Whether no batch is in here.
    pub(crate) fn holds_no_batch(&self) -> bool {
        self.batches.is_empty()
    }

    /// Leadership ended: nobody waits for what would be appended. What else was said stays true, as that something is
    /// committed, which a member that leaves together with its leader hears from nobody else.
    pub(crate) fn clear_batches(&mut self) {
        self.batches.clear();
        self.fetched.clear();
    }

    /// The session ended: what was queued for it is void. A read that is under way may still come back.
    pub(crate) fn clear(&mut self) {
        self.light.clear();
        self.clear_batches();
    }

    /// Looks at what is to be sent next. Batches up to `durable` can be read back from the log; a later one is in `recent`,
    /// or will be as soon as the log takes it.
    pub(crate) fn head<'a>(&'a mut self, recent: &'a Recent<B>, durable: LogIndex) -> Head<'a, B> {
        if let (Some(Outgoing::Append(first)), Some(overtaken)) =
            (self.light.front_mut(), self.batches.front())
        {
            let same_leader = first.append.term == overtaken.append.term;
            if same_leader && first.append.previous.index > overtaken.append.previous.index {
                first.append.previous = overtaken.append.previous;
                (first.previous_chain, first.chain) = (overtaken.previous_chain, overtaken.previous_chain);
            }
        }
        if let Some(message) = self.light.front() {
            return Head::Light(message);
        }
        let Some(message) = self.batches.front() else { return Head::Empty };
        // Only those with a batch are in that queue.
        let Some(run) = message.append.batch else { return Head::Waiting };
        while self.fetched.front().is_some_and(|batch| batch.info.first < run.first) {
            self.fetched.pop_front();
        }
        let is_it = |batch: &&StoredBatch<B>| batch.info.first == run.first && batch.info.term == run.term;
        if let Some(batch) = recent.starting_at(run.first).filter(is_it) {
            return Head::Batch(message, batch);
        }
        if self.fetched.front().filter(is_it).is_none() {
            if run.last > durable || std::mem::replace(&mut self.fetching, true) {
                return Head::Waiting;
            }
            self.fetched.clear();
            return Head::Fetch(run.first);
        }
        self.fetched.front().map_or(Head::Waiting, |batch| Head::Batch(message, batch))
    }

    /// The head has been sent, or is not to be.
    pub(crate) fn pop(&mut self) {
        if self.light.pop_front().is_none() {
            self.batches.pop_front();
        }
    }

    /// The read that [`Head::Fetch`] asked for has ended, with nothing if it failed or was overtaken.
    pub(crate) fn fetched(&mut self, batches: Vec<StoredBatch<B>>) {
        self.fetching = false;
        self.fetched = batches.into();
    }
}

/// One append without a batch says what two of the same leader would have said: the later one knows all that the earlier
/// one knew, but the earlier one may ask about a higher position. A position once asked about is one of the leader's log,
/// whatever has happened since.
fn merge(earlier: &mut AppendMessage, later: AppendMessage) {
    let (asks, asked) = (earlier.append.reply_now, earlier.append.previous);
    let chain = earlier.previous_chain;
    *earlier = later;
    earlier.append.reply_now |= asks;
    if asked.index > earlier.append.previous.index {
        earlier.append.previous = asked;
        (earlier.previous_chain, earlier.chain) = (chain, chain);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::{Append, BatchRun, LogId, Round};
    use ringraft_block::{AlignedBuf, Term};
    use ringraft_wal::format::Chain;

    fn chain_at(index: u64) -> Chain {
        Chain(u128::from(index).to_le_bytes())
    }

    /// A heartbeat, a round or a notice.
    fn empty(term: u64, previous: u64, round: u64, reply_now: bool) -> Outgoing {
        let append = Append {
            term: Term(term),
            previous: LogId { term: Term(1), index: LogIndex(previous) },
            batch: None,
            commit: LogIndex(round),
            round: Round(round),
            reply_now,
            configuration: None,
        };
        let chain = chain_at(previous);
        Outgoing::Append(AppendMessage { append, previous_chain: chain, chain })
    }

    /// What leaves next: of an append without a batch the position, its chain, the round and whether it asks.
    fn next(outbox: &mut Outbox<AlignedBuf>, recent: &Recent<AlignedBuf>) -> Option<(u64, u64, bool)> {
        let told = match outbox.head(recent, LogIndex(0)) {
            Head::Light(Outgoing::Append(message)) => {
                let AppendMessage { append, previous_chain, chain } = message;
                let expected = chain_at(append.previous.index.get());
                assert_eq!((*previous_chain, *chain), (expected, expected));
                assert_eq!(append.commit.get(), append.round.0, "all of the latest");
                Some((append.previous.index.get(), append.round.0, append.reply_now))
            }
            _ => None,
        };
        if told.is_some() {
            outbox.pop();
        }
        told
    }

    /// A leader's log has no room for a batch while its disk is slow. Whoever hears nothing for so long elects another one.
    #[test]
    fn what_carries_no_batch_does_not_wait_for_one_and_asks_about_what_has_left() {
        let recent = Recent::<AlignedBuf>::new(1 << 20);
        let mut outbox = Outbox::new();
        outbox.push(append(8));
        outbox.push(append(9));
        outbox.push(empty(1, 9, 5, true));
        outbox.push(Outgoing::TimeoutNow(TimeoutNow { term: Term(1) }));
        outbox.push(empty(1, 3, 6, false));
        assert_eq!(next(&mut outbox, &recent), Some((7, 5, true)), "what lies before the first batch");
        assert!(matches!(outbox.head(&recent, LogIndex(7)), Head::Light(Outgoing::TimeoutNow(_))));
        outbox.pop();
        assert_eq!(next(&mut outbox, &recent), Some((3, 6, false)), "that had left anyway");
        assert!(matches!(outbox.head(&recent, LogIndex(8)), Head::Fetch(LogIndex(8))));
        // Of another leader's log nothing is known here.
        outbox.push(empty(2, 9, 1, true));
        assert_eq!(next(&mut outbox, &recent), Some((9, 1, true)));
    }

    /// Rounds of reads are begun as fast as the other members answer; this peer's link may be full.
    #[test]
    fn appends_without_a_batch_replace_one_another_and_none_of_what_they_say_is_lost() {
        let recent = Recent::<AlignedBuf>::new(1 << 20);
        let mut outbox = Outbox::new();
        outbox.push(empty(1, 7, 1, true));
        (2..10_000).for_each(|round| outbox.push(empty(1, 4, round, round % 2 == 0)));
        outbox.push(empty(2, 4, 1, false));
        assert_eq!(outbox.light.len(), 2);
        assert_eq!(next(&mut outbox, &recent), Some((7, 9_999, true)));
        assert_eq!(next(&mut outbox, &recent), Some((4, 1, false)), "of another term");
        assert!(matches!(outbox.head(&recent, LogIndex(0)), Head::Empty));
    }

    /// A leader that has left the members says so to those who leave with it, and steps down in the same step.
    #[test]
    fn what_a_leader_said_before_it_left_office_is_still_sent_and_its_batches_are_not() {
        let recent = Recent::<AlignedBuf>::new(1 << 20);
        let mut outbox = Outbox::new();
        outbox.push(append(8));
        outbox.push(empty(1, 6, 5, false));
        outbox.clear_batches();
        assert!(outbox.holds_no_batch());
        assert_eq!(next(&mut outbox, &recent), Some((6, 5, false)));
        assert!(matches!(outbox.head(&recent, LogIndex(9)), Head::Empty));
    }

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
        Outgoing::Append(AppendMessage {
            append,
            previous_chain: chain_at(first - 1),
            chain: chain_at(first),
        })
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
