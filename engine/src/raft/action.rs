//! What the core wants done, in this order.

use super::{
    BatchRun, ChangeError, Changed, Configuration, Epoch, LogId, Message, Nanos, ReadRefusal, Role,
    TransferEnd, Violation,
};
use ringraft_block::{LogIndex, NodeId, Term};

/// An output of [`Raft::handle`](super::Raft::handle). Actions are carried out in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Append the batch to the log. The driver holds its image: sealed by itself, or received beside the append
    /// that is being handled. Its durability is reported by [`Event::Persisted`](super::Event::Persisted).
    Persist {
        /// The batch.
        batch: BatchRun,
    },
    /// Drop everything after `after` from the log, durably, before any later [`Action::Persist`] is written. From
    /// now on the log's epoch is `epoch`.
    Truncate {
        /// The last index kept, a batch end.
        after: LogIndex,
        /// The new epoch, one above the previous.
        epoch: Epoch,
    },
    /// Make term and vote durable and report [`Event::HardStateSaved`](super::Event::HardStateSaved).
    SaveHardState {
        /// Number of this save, increasing by one.
        sequence: u64,
        /// Current term.
        term: Term,
        /// Whom this node voted for in it.
        vote: Option<NodeId>,
    },
    /// Send at once: nothing in the message promises what is not yet durable.
    SendNow {
        /// To whom.
        to: NodeId,
        /// What. An append's image is found by its [`BatchRun`].
        message: Message,
    },
    /// Send once the hard state of that number is durable. Messages to one member keep their order.
    SendAfterSave {
        /// The save that must be durable first.
        sequence: u64,
        /// To whom.
        to: NodeId,
        /// What.
        message: Message,
    },
    /// Everything up to `up_to` is committed: apply it.
    Commit {
        /// The commit index, a batch end, above the previous.
        up_to: LogIndex,
    },
    /// This node's role changed.
    Become {
        /// The new role.
        role: Role,
        /// Its term.
        term: Term,
        /// The leader of that term, where known.
        leader: Option<NodeId>,
    },
    /// Seal an empty batch at [`Raft::next_position`](super::Raft::next_position) and propose it before any
    /// command: a new leader's first (Raft, section 8: a leader commits an entry of its own term before it knows
    /// what is committed).
    SealEmpty,
    /// Nothing is left of what the claim stands for: clear it durably. Nothing waits for that.
    ReleaseClaim,
    /// A transfer of leadership came to nothing; this node leads on, if it did. One that succeeds ends with
    /// [`Action::Become`].
    TransferEnded {
        /// Why.
        end: TransferEnd,
    },
    /// This node leads, and its disk is far slower than the others': leadership is to be handed over by
    /// [`Event::Transfer`](super::Event::Transfer). Comes again after a while if nothing comes of it; if that could not even begin,
    /// [`Event::HandoverPutOff`](super::Event::HandoverPutOff) says so, and it comes again at once.
    OwnDiskSlow {
        /// What a batch took from its proposal until it was durable here, on average.
        own: Nanos,
        /// And until it was durable at a quorum without this node.
        others: Nanos,
        /// Voters that are heard and were quick, the best one first; at least one.
        to: Vec<NodeId>,
    },
    /// The log no longer holds what this peer needs: send it a snapshot, and report
    /// [`Event::SnapshotEnded`](super::Event::SnapshotEnded). One at a time for each peer; void when the session with it ends.
    SendSnapshot {
        /// To whom.
        to: NodeId,
    },
    /// The snapshot that was handed in is the state from now on.
    InstallSnapshot {
        /// The last entry that it covers.
        last: LogId,
        /// The log goes as a whole and starts behind the snapshot, durably, before any later [`Action::Persist`] is written,
        /// and this is its epoch. None if it stays as it is, since it holds that entry: the start follows with the next purge.
        epoch: Option<Epoch>,
    },
    /// An invariant between honest nodes is broken: carry out nothing more, close the node with this error. The
    /// event that showed it has no other action.
    Stop {
        /// What was seen.
        violation: Violation,
    },
    /// The read sees all that was committed before it was asked for once everything up to `index` is applied here.
    ReadReady {
        /// As in [`Event::Read`](super::Event::Read).
        id: u64,
        /// The read index, which may be above this node's commit index.
        index: LogIndex,
    },
    /// The read came to nothing; it can be asked for again.
    ReadRefused {
        /// As in [`Event::Read`](super::Event::Read).
        id: u64,
        /// Why.
        reason: ReadRefusal,
    },
    /// Seal this configuration as a batch of its own at [`Raft::next_position`](super::Raft::next_position), and propose it by
    /// [`Event::ProposedConfiguration`](super::Event::ProposedConfiguration). The last action of its event.
    SealConfiguration {
        /// What to seal.
        configuration: Box<Configuration>,
    },
    /// The configuration in force, or whom the log goes to, has changed: see
    /// [`Raft::configuration`](super::Raft::configuration) and [`Raft::replicated_to`](super::Raft::replicated_to).
    MembersChanged,
    /// What has become of a change that was asked for.
    ChangeEnded {
        /// The caller's name for it.
        ticket: u64,
        /// Where the new configuration stands, committed, or why there is none.
        outcome: Result<Changed, ChangeError>,
    },
}
