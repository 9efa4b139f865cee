//! Committed batches to the state machine, in order, once.
//!
//! Happy path: the next batch is in memory, where the leader sealed it or the follower received it; it is applied
//! from there. After a restart, or far behind, batches are read back from the log, some ahead. Work per turn is
//! bounded, so that a long replay does not starve heartbeats.

mod sessions;

use crate::proposals::Proposals;
use crate::recent::Recent;
use crate::sessions::SessionTable;
use crate::state_machine::{CommittedBatch, Replies, StateMachine};
use crate::tickets::Deliveries;
use ringraft_block::{BlockBuf, LogIndex};
use ringraft_wal::StoredBatch;
use ringraft_wal::format::{BatchKind, BatchView, Chain};
use sessions::{Sessions, Waiters};
use std::collections::VecDeque;

pub(crate) struct Applier<S, B: BlockBuf> {
    machine: S,
    applied: LogIndex,
    chain: Chain,
    replies: Replies,
    /// Read back from the log, in order, beginning at `applied + 1`.
    fetched: VecDeque<StoredBatch<B>>,
    fetching: bool,
    sessions: Sessions,
    /// The machine's state is being replaced, or is missing: nothing is applied.
    suspended: bool,
    /// What was applied since this was last taken, in bytes of log.
    log_bytes: u64,
    /// The log's time at `applied`, or where the state ends that is being restored.
    time_ms: u64,
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
            sessions: Sessions::default(),
            suspended: false,
            log_bytes: 0,
            time_ms: 0,
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

    /// The sessions as of what was applied.
    pub(crate) fn sessions(&self) -> &SessionTable {
        &self.sessions.table
    }

    /// The sessions are those of a snapshot.
    pub(crate) fn restore_sessions(&mut self, table: SessionTable) {
        self.sessions.table = table;
    }

    /// Tells this member's own clock, for a bug that can be put back.
    pub(crate) fn set_local_clock(&mut self, local_ms: u64) {
        self.sessions.local_ms = local_ms;
    }

    /// The machine's state is the one behind `applied`: at the start, and when a snapshot is installed.
    pub(crate) fn start_after(&mut self, applied: LogIndex, chain: Chain, time_ms: u64) {
        debug_assert!(applied >= self.applied, "what is applied does not go back");
        (self.applied, self.chain, self.time_ms) = (applied, chain, time_ms);
        self.log_bytes = 0;
        self.suspended = false;
    }

    /// Nothing is applied until [`Self::start_after`].
    pub(crate) fn suspend(&mut self) {
        self.suspended = true;
        self.fetched.clear();
    }

    /// As [`Self::suspend`], until there is a state at whose end the log's time is this: that of a log that begins there,
    /// and may go on before the state is there.
    pub(crate) fn suspend_until(&mut self, time_ms: u64) {
        self.suspend();
        self.time_ms = time_ms;
    }

    pub(crate) fn is_suspended(&self) -> bool {
        self.suspended
    }

    pub(crate) fn machine_mut(&mut self) -> &mut S {
        &mut self.machine
    }

    /// Bytes of log that were applied since [`Self::start_after`], or since they were last forgotten.
    pub(crate) fn log_bytes(&self) -> u64 {
        self.log_bytes
    }

    pub(crate) fn forget_log_bytes(&mut self) {
        self.log_bytes = 0;
    }

    pub(crate) fn time_ms(&self) -> u64 {
        self.time_ms
    }

    /// The read that [`Applied::Fetch`] asked for has ended.
    pub(crate) fn fetched(&mut self, batches: Vec<StoredBatch<B>>) {
        self.fetching = false;
        self.fetched.extend(batches);
    }

    /// What was read ahead of the commit index and then truncated must not be applied.
    pub(crate) fn truncate_after(&mut self, last: LogIndex) {
        self.fetched.retain(|batch| batch.info.last <= last);
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
        if self.suspended {
            return Ok(Applied::Waiting);
        }
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
                if view.session_count() == 0 {
                    self.replies.rearm(proposals.awaits(info.first));
                    self.machine.apply(&CommittedBatch::new(view), &mut self.replies);
                    proposals.applied(&info, &mut self.replies, deliveries);
                } else {
                    let waiters = Waiters { proposals, deliveries };
                    self.sessions.apply(view, &mut self.machine, &mut self.replies, waiters);
                }
            }
            if info.kind == BatchKind::SessionControl {
                let view = BatchView::trusted(batch.image());
                let view =
                    view.map_err(|error| format!("the batch at index {next} changed in memory: {error}"))?;
                let waiters = Waiters { proposals, deliveries };
                self.sessions.control(view, waiters).map_err(|index| {
                    format!("the request about sessions at index {index} is unknown: upgrade this node")
                })?;
            }
            bytes += info.payload_bytes as usize;
            self.applied = info.last;
            self.chain = info.chain;
            self.log_bytes += info.slot_bytes() as u64;
            self.time_ms = info.time_ms;
        }
        self.fetched.clear();
        Ok(Applied::Current)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proposals::ProposalLimits;
    use ringraft_block::{AlignedBuf, GroupId, Pool, Term};
    use ringraft_wal::format::{BatchBuilder, BatchInfo, Seal};
    use std::convert::Infallible;

    #[derive(Default)]
    struct Journal(String);

    impl StateMachine for Journal {
        fn apply(&mut self, batch: &CommittedBatch<'_>, _: &mut Replies) {
            for command in batch.commands() {
                self.0.push_str(std::str::from_utf8(command.bytes).expect("text"));
            }
        }
    }

    fn batch(first: u64, term: u64, kind: BatchKind, text: &str) -> StoredBatch<AlignedBuf> {
        let pool = Pool::new(0);
        let block =
            pool.take(4096, |bytes| Ok::<_, Infallible>(AlignedBuf::zeroed(bytes))).expect("infallible");
        let mut builder = BatchBuilder::new(block);
        if kind != BatchKind::Empty {
            builder.push(text.as_bytes(), None).expect("there is room");
        }
        let (block, info) = builder.seal(Seal {
            group: GroupId(0),
            term: Term(term),
            first: LogIndex(first),
            kind,
            time_ms: 0,
            previous_chain: Chain::default(),
        });
        StoredBatch { info, block: block.share() }
    }

    fn push(recent: &mut Recent<AlignedBuf>, batch: StoredBatch<AlignedBuf>) -> BatchInfo {
        recent.push(batch.info, batch.block);
        batch.info
    }

    struct Rig {
        applier: Applier<Journal, AlignedBuf>,
        recent: Recent<AlignedBuf>,
        proposals: Proposals<AlignedBuf>,
    }

    impl Rig {
        fn new() -> Self {
            let limits =
                ProposalLimits { command_bytes_max: 100, uncommitted_bytes_max: 1000, slot_bytes: 4096 };
            Self {
                applier: Applier::new(Journal::default()),
                recent: Recent::new(1 << 20),
                proposals: Proposals::new(limits),
            }
        }

        fn advance(&mut self, commit: u64, durable: u64, bytes_max: usize) -> Result<Applied, String> {
            let (commit, durable) = (LogIndex(commit), LogIndex(durable));
            let mut deliveries = Deliveries::default();
            self.applier.advance(
                commit,
                durable,
                bytes_max,
                &self.recent,
                &mut self.proposals,
                &mut deliveries,
            )
        }
    }

    /// A read for apply brings what is durable, not only what is committed. When the rest of it is truncated before
    /// its turn comes, it must be forgotten.
    #[test]
    fn what_was_read_ahead_and_then_truncated_is_not_applied() {
        let mut rig = Rig::new();
        assert_eq!(rig.advance(2, 3, 1), Ok(Applied::Fetch(LogIndex(1))));
        let read =
            [(1, "a"), (2, "b"), (3, "X")].map(|(index, text)| batch(index, 1, BatchKind::Commands, text));
        rig.applier.fetched(read.into());
        assert_eq!(rig.advance(2, 3, 1), Ok(Applied::More));
        rig.applier.truncate_after(LogIndex(2));
        rig.recent.truncate_after(LogIndex(2));
        push(&mut rig.recent, batch(3, 2, BatchKind::Commands, "c"));
        assert_eq!(rig.advance(3, 2, 100), Ok(Applied::Current));
        assert_eq!(rig.applier.machine().0, "abc");
    }

    #[test]
    fn batches_without_commands_are_stepped_over() {
        let mut rig = Rig::new();
        push(&mut rig.recent, batch(1, 1, BatchKind::Empty, ""));
        push(&mut rig.recent, batch(2, 1, BatchKind::Barrier, ""));
        push(&mut rig.recent, batch(3, 1, BatchKind::Membership, "?"));
        assert_eq!(rig.advance(3, 0, 100), Ok(Applied::Current));
        assert_eq!((rig.applier.applied(), rig.applier.machine().0.as_str()), (LogIndex(3), ""));
    }
}
