//! What cannot happen between honest nodes, and stops the node when it does.

use super::{BatchRun, Epoch, LogId};
use ringraft_block::{LogIndex, NodeId, Term};

/// A broken invariant. The node has answered nothing in the event that showed it and handles no further one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Election safety (Raft, figure 3).
    #[error("two leaders in term {term}: {known} and {other}")]
    TwoLeaders {
        /// The term.
        term: Term,
        /// Who is known to lead it.
        known: NodeId,
        /// Who else says so.
        other: NodeId,
    },
    /// Leader completeness (Raft, figure 3): a leader's log has something else, or another batch, where this
    /// node has committed.
    #[error("the leader of term {term} contradicts what is committed up to {commit} at {at:?}")]
    CommittedDiffers {
        /// The leader's term.
        term: Term,
        /// The commit index.
        commit: LogIndex,
        /// The position in the leader's log.
        at: LogId,
    },
    /// Leader append-only (Raft, figure 3): a leader's log has something else where it was verified to be equal
    /// in the same term.
    #[error("the leader of term {term} has changed its log at {at:?}, at or below {matched}")]
    LeaderRewrote {
        /// The leader's term.
        term: Term,
        /// The highest position verified.
        matched: LogIndex,
        /// The position in the leader's log.
        at: LogId,
    },
    /// Log matching (Raft, figure 3), by batches: two batches of one term hold one index.
    #[error("{index} of term {term} was sealed twice: here it is in {here:?}")]
    SealedTwice {
        /// An index that both hold, or at which one ends and the other does not.
        index: LogIndex,
        /// The term of both.
        term: Term,
        /// The batch in this node's log.
        here: Option<BatchRun>,
    },
    /// The driver proposed what does not follow, or to a node that does not lead.
    #[error("{batch:?} was proposed at {expected:?}")]
    ProposedElsewhere {
        /// The batch.
        batch: BatchRun,
        /// Where one could have been proposed, and in which term.
        expected: Option<(Term, LogIndex)>,
    },
    /// The log reported as durable what it was never given.
    #[error("epoch {} is durable up to {last}, but the log is at epoch {} and ends at {end}", epoch.0, log_epoch.0)]
    PersistedUnknown {
        /// The completion's epoch.
        epoch: Epoch,
        /// What it reports.
        last: LogIndex,
        /// The log's epoch.
        log_epoch: Epoch,
        /// The log's end.
        end: LogIndex,
    },
    /// The log reported damage where it has no batch.
    #[error("damage is reported at {first}, where no batch begins")]
    DamageUnknown {
        /// First index of the damaged batch.
        first: LogIndex,
    },
    /// The driver adopted what does not follow, or where there is nothing to be adopted.
    #[error("{batch:?} was adopted behind {last:?}")]
    AdoptedElsewhere {
        /// The batch.
        batch: BatchRun,
        /// The end of the log.
        last: LogId,
    },
    /// The driver moved the log's start to where no batch ends, or beyond what is committed and durable.
    #[error("the log was purged through {through}, with commit index {commit}")]
    PurgedUnknown {
        /// The index given.
        through: LogIndex,
        /// The commit index.
        commit: LogIndex,
    },
    /// A hard state was reported as saved that was never given.
    #[error("hard state {sequence} was saved, but {asked} is the last one asked for")]
    SavedUnknown {
        /// The number reported.
        sequence: u64,
        /// The last number given.
        asked: u64,
    },
}
