//! Committed batches to the state machine, in order, once.
//!
//! Happy path: the next batch is in memory, where the leader sealed it or the follower received it; it is applied
//! from there. After a restart, or far behind, batches are read back from the log, some ahead. Work per turn is
//! bounded, so that a long replay does not starve heartbeats.

use crate::ingress::Deliveries;
use crate::proposals::Proposals;
use crate::recent::Recent;
use crate::state_machine::{CommittedBatch, Replies, StateMachine};
use ringraft_block::{BlockBuf, LogIndex};
use ringraft_wal::StoredBatch;
use ringraft_wal::format::{BatchKind, BatchView, Chain};
use std::collections::VecDeque;

pub(crate) struct Applier<S, B: BlockBuf> {
    machine: S,
    applied: LogIndex,
    chain: Chain,
    replies: Replies,
    /// Read back from the log, in order, beginning at `applied + 1`.
    fetched: VecDeque<StoredBatch<B>>,
    fetching: bool,
}

/// What an apply of some batches came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Applied {
    /// There is nothing committed that is not applied.
    Current,
    /// The bound of a turn is reached; there is more.
    More,
    /// The next batch must be read from the log, from this index on.
    Fetch(LogIndex),
    /// A read is under way, or the log has not taken the batch yet.
    Waiting,
}

impl<S: StateMachine, B: BlockBuf> Applier<S, B> {
    pub(crate) fn new(machine: S) -> Self {
        Self {
            machine,
            applied: LogIndex(0),
            chain: Chain::default(),
            replies: Replies::default(),
            fetched: VecDeque::new(),
            fetching: false,
        }
    }

    pub(crate) fn applied(&self) -> LogIndex {
        self.applied
    }

    pub(crate) fn chain(&self) -> Chain {
        self.chain
    }

    pub(crate) fn machine(&self) -> &S {
        &self.machine
    }

    /// Begins at the start of the log, before anything has been applied.
    pub(crate) fn start_after(&mut self, applied: LogIndex, chain: Chain) {
        debug_assert_eq!(self.applied, LogIndex(0));
        (self.applied, self.chain) = (applied, chain);
    }

    /// The read that [`Applied::Fetch`] asked for has ended.
    pub(crate) fn fetched(&mut self, batches: Vec<StoredBatch<B>>) {
        self.fetching = false;
        self.fetched.extend(batches);
    }

    /// Applies up to `commit`, about `bytes_max` of payload at the most. Batches up to `durable` can be read back from
    /// the log; a later one is in `recent`, or will be as soon as the log takes it.
    pub(crate) fn advance(
        &mut self,
        commit: LogIndex,
        durable: LogIndex,
        bytes_max: usize,
        recent: &Recent<B>,
        proposals: &mut Proposals<B>,
        deliveries: &mut Deliveries,
    ) -> Result<Applied, String> {
        let mut bytes = 0;
        while self.applied < commit {
            if bytes >= bytes_max {
                return Ok(Applied::More);
            }
            let next = self.applied.next();
            while self.fetched.front().is_some_and(|batch| batch.info.first < next) {
                self.fetched.pop_front();
            }
            let batch = match self.fetched.front().filter(|batch| batch.info.first == next) {
                Some(batch) => Some(batch),
                None => recent.starting_at(next),
            };
            let Some(batch) = batch else {
                if self.fetching || next > durable {
                    return Ok(Applied::Waiting);
                }
                self.fetched.clear();
                self.fetching = true;
                return Ok(Applied::Fetch(next));
            };
            let info = batch.info;
            if info.kind == BatchKind::Commands {
                let view = BatchView::trusted(batch.image());
                let view =
                    view.map_err(|error| format!("the batch at index {next} changed in memory: {error}"))?;
                self.replies.rearm(proposals.awaits(info.first));
                self.machine.apply(&CommittedBatch::new(view), &mut self.replies);
                proposals.applied(&info, &mut self.replies, deliveries);
            }
            bytes += info.payload_bytes as usize;
            self.applied = info.last;
            self.chain = info.chain;
        }
        self.fetched.clear();
        Ok(Applied::Current)
    }
}
