//! What happens to the core: everything it knows of the world arrives as one of these.

use super::{
    BatchRun, Change, Configuration, Elsewhere, Epoch, LogId, ReadIndex, ReadIndexReply, ReadKind, Round,
};
use ringraft_block::{LogIndex, NodeId, Term};
use std::collections::BTreeSet;

/// An input of [`Raft::handle`](super::Raft::handle).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time has passed; handed in at [`Raft::next_deadline`](super::Raft::next_deadline) at the latest. Early and
    /// repeated ticks are harmless.
    Tick,
    /// The driver sealed `batch` at the position that [`Raft::next_position`](super::Raft::next_position) gave.
    /// Only while this node leads.
    Proposed {
        /// The sealed batch.
        batch: BatchRun,
    },
    /// A message of a member arrived, already checked for identity, incarnation and checksums.
    Received {
        /// Who sent it.
        from: NodeId,
        /// What it says.
        message: Message,
    },
    /// The log has made everything up to `last` durable, in the life of `epoch`.
    Persisted {
        /// The log's epoch when the writes were submitted; a completion from before a truncation carries an older
        /// one than [`Action::Truncate`](super::Action::Truncate) announced.
        epoch: Epoch,
        /// The last durable index, a batch end.
        last: LogIndex,
    },
    /// The hard state of [`Action::SaveHardState`](super::Action::SaveHardState) with this number, and all before
    /// it, are durable.
    HardStateSaved {
        /// The number of the save.
        sequence: u64,
    },
    /// A session with `peer` began: what was sent before may be lost.
    PeerConnected {
        /// The member.
        peer: NodeId,
    },
    /// The session with `peer` ended.
    PeerDisconnected {
        /// The member.
        peer: NodeId,
    },
    /// The batches of the log that cannot be read have changed: one was found, one is durable again.
    DamageChanged {
        /// First indexes of all of them.
        damaged: BTreeSet<LogIndex>,
    },
    /// This batch, which continues the log, is proved to have been in it before the damage. Only while a claim is in force
    /// and no leader is known.
    Adopt {
        /// The batch.
        batch: BatchRun,
        /// What it holds, if it is one of membership.
        configuration: Option<Box<Configuration>>,
    },
    /// The leader of `term`, asked in this life, held a log that ends there.
    LeaderHolds {
        /// Who.
        leader: NodeId,
        /// The term in which it leads.
        term: Term,
        /// The end of its log, durable or not.
        last: LogId,
    },
    /// Every voter has said how far all that it holds reaches ([`Inquiry`](super::Inquiry)).
    AllAsked {
        /// How far, and whether that is believed.
        elsewhere: Elsewhere,
    },
    /// Every voter has been asked for the batch behind `after`, where this log can no longer be read, and none holds one
    /// ([`Inquiry`](super::Inquiry)). A leader steps down: it can send nobody what lies behind.
    NothingBehind {
        /// The end of the last batch before the damage.
        after: LogIndex,
        /// Where the others' logs end, over whatever batches.
        elsewhere: Elsewhere,
    },
    /// The disk has not answered for too long, or answers again.
    DiskStalled {
        /// Which of the two.
        stalled: bool,
    },
    /// Leadership is to be handed over. Ends with another leader, or with
    /// [`Action::TransferEnded`](super::Action::TransferEnded).
    Transfer {
        /// To whom; without a name, to the most caught-up voter.
        to: Option<NodeId>,
    },
    /// What [`Action::OwnDiskSlow`](super::Action::OwnDiskSlow) asked for could not begin. It was no attempt, and if the disk is still
    /// slow, it is asked for again at once.
    HandoverPutOff,
    /// A read is asked for; answered by one [`Action::ReadReady`](super::Action::ReadReady) or
    /// [`Action::ReadRefused`](super::Action::ReadRefused). All that arrived at about the same time may go under one id.
    ///
    /// The request may be younger than the moment that comes with it, by as long as a process may be stopped; what
    /// arrives in a [`Event::Received`] must not be.
    Read {
        /// Names it in the answer.
        id: u64,
        /// What it has to be sure of.
        kind: ReadKind,
    },
    /// Nobody waits any more for the reads under these ids, which may have been answered: they need no answer.
    ReadsAbandoned {
        /// The ids, ascending.
        ids: Vec<u64>,
    },
    /// The log's start is moving to the end of a batch that is durable, committed, and covered by a durable snapshot.
    Purged {
        /// The batch end.
        through: LogIndex,
    },
    /// A snapshot of another member is durable here, all of it verified.
    SnapshotReceived {
        /// The last entry that it covers.
        last: LogId,
        /// The members as of that entry.
        configuration: Configuration,
        /// Where they stand in the log: there or before.
        configuration_index: LogIndex,
    },
    /// The transfer of [`Action::SendSnapshot`](super::Action::SendSnapshot) has ended.
    SnapshotEnded {
        /// To whom.
        to: NodeId,
        /// The last entry of what is installed there; none if it failed.
        installed: Option<LogId>,
    },
    /// The state before the log's start cannot be read, so that nothing can be applied; or it is there again. Meanwhile the node
    /// does not campaign.
    StateLost {
        /// Which of the two.
        lost: bool,
    },
    /// Somebody wants the members changed. Ends with [`Action::ChangeEnded`](super::Action::ChangeEnded).
    Change {
        /// The caller's name for it.
        ticket: u64,
        /// What is wanted.
        change: Box<Change>,
    },
    /// The driver sealed the configuration of [`Action::SealConfiguration`](super::Action::SealConfiguration) in `batch`, a
    /// batch of its own, at [`Raft::next_position`](super::Raft::next_position).
    ProposedConfiguration {
        /// The sealed batch.
        batch: BatchRun,
        /// What it holds.
        configuration: Box<Configuration>,
    },
    /// A batch that holds a configuration and could not be read at the start can be read again.
    ConfigurationFound {
        /// Its index.
        index: LogIndex,
        /// What it holds.
        configuration: Box<Configuration>,
    },
}

/// What members say to each other. Every message carries the sender's term.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// AppendEntries (Raft, figure 2): from the leader of `term`.
    Append(Append),
    /// The answer to an append, or a report of durability sent later.
    AppendAck(AppendAck),
    /// RequestVote, or its trial run (Raft thesis, section 9.6).
    Vote(Vote),
    /// The answer to a [`Vote`].
    VoteReply(VoteReply),
    /// The leader hands over: campaign now (Raft thesis, section 3.10).
    TimeoutNow(TimeoutNow),
    /// Where can I read? From a follower to the leader.
    ReadIndex(ReadIndex),
    /// The answer to a [`ReadIndex`].
    ReadIndexReply(ReadIndexReply),
}

impl Message {
    /// The sender's term. A pre-vote carries the term that the sender would campaign in, which is one above its
    /// own; a granted pre-vote's reply repeats that term.
    #[must_use]
    pub fn term(&self) -> Term {
        match self {
            Self::Append(append) => append.term,
            Self::AppendAck(ack) => ack.term,
            Self::Vote(vote) => vote.term,
            Self::VoteReply(reply) => reply.term,
            Self::TimeoutNow(message) => message.term,
            Self::ReadIndex(request) => request.term,
            Self::ReadIndexReply(reply) => reply.term,
        }
    }
}

/// AppendEntries with at most one batch; without one it is a heartbeat or a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Append {
    /// The leader's term.
    pub term: Term,
    /// What precedes the batch in the leader's log: a batch end.
    pub previous: LogId,
    /// The batch that follows, whose image travels beside the message.
    pub batch: Option<BatchRun>,
    /// The leader's commit index, not clamped to what the receiver has.
    pub commit: LogIndex,
    /// The leader's current round; never decreases within a term.
    pub round: Round,
    /// Whether the receiver answers at once, before anything is durable, so that the leader hears `round` back.
    pub reply_now: bool,
    /// What the batch holds, if it is one of membership. Not part of the message: the receiver's driver reads it in the image.
    pub configuration: Option<Box<Configuration>>,
}

/// What a follower holds. Acks are cumulative: a later one replaces an earlier one of the same session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppendAck {
    /// The follower's term.
    pub term: Term,
    /// The highest round heard from the leader of `term`, whatever the disk is doing.
    pub round: Round,
    /// How the last append fared.
    pub outcome: AppendOutcome,
}

/// How an append fared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AppendOutcome {
    /// The follower's log equals the leader's up to `matched`, and is durable up to there.
    Matched {
        /// A batch end of the leader's log.
        matched: LogId,
    },
    /// `previous` of the append is not in the follower's log.
    Rejected {
        /// The index of the refused `previous`, by which the leader tells a late rejection from a current one.
        refused: LogIndex,
        /// The largest position at which the two logs may agree: the follower's last batch end at or below
        /// `refused` with a term at or below that of `previous` (skips whole terms, as etcd's raft does).
        hint: LogId,
    },
    /// The sender's term is over: the receiver's is in `term`.
    StaleTerm,
}

/// RequestVote (Raft, figure 2) or pre-vote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vote {
    /// The candidate's term; of a pre-vote, the term it would campaign in.
    pub term: Term,
    /// The end of the candidate's log.
    pub last: LogId,
    /// Whether this only asks if a campaign could succeed.
    pub pre: bool,
    /// Whether the leader itself asked for this campaign: then nobody sticks to it.
    pub transfer: bool,
}

/// The answer to a [`Vote`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VoteReply {
    /// If granted, the term of the request; otherwise the voter's own term.
    pub term: Term,
    /// Whether the vote, or the pre-vote, is given.
    pub granted: bool,
    /// Which of the two it answers.
    pub pre: bool,
}

/// A leader's last word to its successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeoutNow {
    /// The leader's term. In a later one the message means nothing.
    pub term: Term,
}
