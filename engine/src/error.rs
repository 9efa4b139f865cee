//! The errors of the public API. A definite refusal and an unknown outcome are different types, because a caller
//! may repeat the one and must not blindly repeat the other.

use crate::sessions::SessionRefusal;
use bytes::Bytes;
use ringraft_block::{LogIndex, NodeId, Term};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

/// Where the leader is believed to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaderHint {
    /// Its id.
    pub id: NodeId,
    /// Its address for peers.
    pub address: SocketAddr,
}

/// Why a proposal came to nothing.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ProposeError {
    /// The command is not applied and never will be by this call: safe to propose again, there or later.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The command may or may not be applied, now or later.
    #[error(transparent)]
    Unknown(#[from] UnknownOutcome),
    /// A command of a session that had been applied, once, by an earlier attempt; the reply is no longer kept.
    #[error("the command was applied at index {index}, and its reply is no longer kept")]
    ReplyGone {
        /// Where it was applied.
        index: LogIndex,
        /// The term of the leader that sealed it there.
        term: Term,
    },
}

/// A definite refusal. The command is given back.
#[derive(Clone, Debug, thiserror::Error)]
#[error("refused: {reason}")]
pub struct Refused {
    /// Why.
    pub reason: Refusal,
    /// The command as it was handed in.
    pub command: Bytes,
}

/// Why a command was refused: before it entered the log, or, by [`Refusal::Session`], when its turn to be applied came.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another member leads, or none does: propose there, or wait for an election.
    #[error("this node does not lead{}", hint(.leader))]
    NotLeader {
        /// Who leads, where known.
        leader: Option<LeaderHint>,
    },
    /// The engine holds as many uncommitted commands as it may: wait for some to complete.
    #[error("busy: the bounds on queued and uncommitted commands are reached; wait for some to complete")]
    Busy,
    /// The command is larger than `command_bytes_max`: make it smaller, or raise the limit on every member.
    #[error("the command has {bytes} bytes, more than command_bytes_max = {bytes_max}")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// The log cannot reserve another segment: free space on its disk; the node lives on.
    #[error("no space for another log segment: free space on the log's disk")]
    NoSpace,
    /// Leadership is being handed to another member: propose there in a moment, or here if it comes to nothing.
    #[error("leadership is being transferred: propose again in a moment, at the new leader")]
    Transferring,
    /// The cluster only elects: its members are configured with `consensus_only`.
    #[error("this cluster only elects leaders (consensus_only): it keeps no log to propose to")]
    ConsensusOnly,
    /// The node has stopped.
    #[error("the node has stopped: {0}")]
    Stopped(StopCause),
    /// By the rules of its session.
    #[error(transparent)]
    Session(SessionRefusal),
}

/// Why leadership did not go where it was to go.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// It came to nothing; a node that led leads on.
    #[error(transparent)]
    Ended(#[from] crate::raft::TransferEnd),
    /// This node leads no more, and who does was not known within two election time-outs.
    #[error("this node gave leadership up, and no leader is known yet: look at the status in a moment")]
    NoLeaderYet,
    /// There was an election, and another member won it, or this one again.
    #[error("node {leader} won the election of term {term}")]
    OtherLeader {
        /// Who leads now.
        leader: NodeId,
        /// In which term.
        term: Term,
    },
    /// Too many requests wait; nothing has begun.
    #[error("too many requests wait already: try again")]
    Busy,
    /// The node has stopped.
    #[error("the node has stopped: {0}")]
    Stopped(StopCause),
}

fn hint(leader: &Option<LeaderHint>) -> String {
    match leader {
        Some(leader) => format!("; node {} at {} does", leader.id, leader.address),
        None => "; no leader is known".to_owned(),
    }
}

/// The command left this node's hands before its fate was known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownOutcome {
    /// This node lost its leadership while the command, at `index`, was uncommitted. A later leader may still
    /// commit it.
    #[error("outcome unknown: leadership was lost while the command at index {index} was uncommitted")]
    LeadershipLost {
        /// Where the command was in this node's log.
        index: LogIndex,
    },
    /// The node stopped first.
    #[error("outcome unknown: the node stopped: {0}")]
    Stopped(StopCause),
    /// This attempt was refused, but an earlier one under the same sequence may be applied yet.
    #[error(
        "outcome unknown: an earlier attempt at sequence {sequence} may be applied; the last was refused: {reason}"
    )]
    EarlierAttempt {
        /// The sequence in its session.
        sequence: u64,
        /// Why the last attempt was refused.
        reason: Box<Refusal>,
    },
    /// The deadline came first.
    #[error("outcome unknown: the deadline came before that of sequence {sequence}")]
    Deadline {
        /// The sequence in its session.
        sequence: u64,
    },
}

/// Why a node stopped, for all who wait for it.
#[derive(Clone, Debug)]
pub struct StopCause(Arc<StopError>);

impl StopCause {
    /// The error itself.
    #[must_use]
    pub fn error(&self) -> &StopError {
        &self.0
    }

    /// Whether the node was asked to stop and did so in good order.
    #[must_use]
    pub fn is_orderly(&self) -> bool {
        matches!(*self.0, StopError::Requested)
    }
}

impl From<StopError> for StopCause {
    fn from(error: StopError) -> Self {
        Self(Arc::new(error))
    }
}

impl PartialEq for StopCause {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for StopCause {}

impl fmt::Display for StopCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for StopCause {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.0)
    }
}

/// How far the lost part of a log reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LostExtent {
    /// The batch ends there; what follows it can be read.
    Batch(LogIndex),
    /// At least up to there.
    AtLeast(LogIndex),
}

impl fmt::Display for LostExtent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Batch(last) => write!(f, "the batch ends at index {last}"),
            Self::AtLeast(last) => write!(f, "the log reached at least index {last}"),
        }
    }
}

/// Why a read was not answered. It changed nothing and can be asked for again, here or elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Only the leader can do this, and this node does not lead.
    #[error("this node does not lead{}", hint(.leader))]
    NotLeader {
        /// Who leads, where known.
        leader: Option<LeaderHint>,
    },
    /// No leader is known here: wait for an election.
    #[error("no leader is known: try again after an election")]
    NoLeader,
    /// The leader changed, or no longer leads, before it had confirmed the read: ask again.
    #[error("the leader changed before it had confirmed the read: ask again")]
    LeaderChanged,
    /// There is no session with the leader, or it ended before the leader had answered: ask again.
    #[error("the connection to the leader was lost before it had answered: ask again")]
    LeaderUnreachable,
    /// What is applied here may be older than was allowed: ask another node, or allow more.
    #[error("what is applied here is too old: {}, {lag} entries behind", heard(.age))]
    TooStale {
        /// How long ago a leader was heard; none when none is known.
        age: Option<std::time::Duration>,
        /// Entries known to be committed and not applied.
        lag: u64,
    },
    /// The state is missing here, or being replaced by a snapshot's: there is nothing to read, however old it may be. Ask
    /// another node, or this one in a moment.
    #[error("the state is being restored here: ask another node, or this one in a moment")]
    Restoring,
    /// As many reads wait as may: wait for some to be answered.
    #[error("busy: the bound on reads that wait is reached")]
    Busy,
    /// A read through the log needs space in it.
    #[error("no space for another log segment: free space on the log's disk, or read without the log")]
    NoSpace,
    /// The cluster only elects leaders: there is nothing to read.
    #[error("this cluster only elects leaders (`consensus_only`): there is nothing to read")]
    ConsensusOnly,
    /// It was not ready in time: no majority answers, or this node is behind.
    #[error("timed out before the read could be answered")]
    TimedOut,
    /// The node has stopped.
    #[error("the node has stopped: {0}")]
    Stopped(StopCause),
}

impl ReadError {
    /// Whether the same read may well succeed here a little later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        !matches!(self, Self::NotLeader { .. } | Self::ConsensusOnly | Self::Stopped(_))
    }
}

fn heard(age: &Option<std::time::Duration>) -> String {
    match age {
        Some(age) => format!("a leader was heard {} ms ago", age.as_millis()),
        None => "no leader is known".to_owned(),
    }
}

/// What ended a node, or kept it from starting.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// [`Handle::shutdown`](crate::Handle::shutdown) was called.
    #[error("shutdown was requested")]
    Requested,
    /// The configuration contradicts itself or the machine.
    #[error("configuration: {0}")]
    Config(#[from] crate::config::ConfigError),
    /// The data directory cannot be used.
    #[error(transparent)]
    Directory(#[from] ringraft_wal::DirectoryError),
    /// The log failed; nothing was acknowledged that is not durable.
    #[error("log: {0}")]
    Log(#[from] ringraft_wal::WalError),
    /// The backend could not be started.
    #[error(transparent)]
    Runtime(#[from] crate::runtime::RuntimeError),
    /// The address for peers cannot be listened on.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        error: ringraft_net::link::LinkError,
    },
    /// The cluster exists and does not know this data directory.
    #[error("formation: {0}")]
    Formation(#[from] crate::formation::FormationError),
    /// A committed batch, or one that may have been committed, cannot be read here, and every voter has been asked and
    /// holds no readable copy.
    #[error(
        "every copy of the log from index {first} is gone: here it is unreadable ({segment} at offset {offset}), and no voter \
         has it; {known}. Nothing was changed. Restore the directory of one member from before the damage, or give the data \
         from there up by forming a new cluster"
    )]
    CopiesGone {
        /// The first index that nobody can read.
        first: LogIndex,
        /// What is known of its end.
        known: LostExtent,
        /// The segment file here.
        segment: String,
        /// Where in it.
        offset: u64,
    },
    /// The disk has left a durable operation unanswered for longer than `disk_stall_stop`.
    #[error(
        "the disk has not answered a write for {millis} ms, more than disk_stall_stop: check the device, then restart this \
         node"
    )]
    DiskStalled {
        /// For how long.
        millis: u64,
    },
    /// The log could not be read back.
    #[error("log: {0}")]
    Read(ringraft_wal::ReadError),
    /// A snapshot could not be restored.
    #[error("the snapshot that ends at index {last} cannot be restored: {error}")]
    Restore {
        /// The last index that it covers.
        last: LogIndex,
        /// Why, in the words of the disk or of the state machine.
        error: String,
    },
    /// A snapshot was written by another version of this engine. It is intact, so it is neither removed nor replaced by another
    /// member's.
    #[error("{file}: {damage}")]
    SnapshotForeign {
        /// The file in the data directory.
        file: String,
        /// Which version, and the cure.
        damage: crate::snapshots::SnapshotDamage,
    },
    /// No memory for a buffer.
    #[error("no memory for a batch: {0}")]
    Memory(ringraft_wal::disk::DiskError),
    /// The system gave no random numbers.
    #[error("no random numbers from the system: {0}")]
    Entropy(String),
    /// The consensus thread could not be started.
    #[error("cannot start the consensus thread: {0}")]
    Thread(String),
    /// Members disagree in a way that no crash or fault within the contract explains; the node stops rather than
    /// spread it.
    #[error("invariant broken, this node stops: {0}")]
    Invariant(String),
    /// The consensus thread ended without a word.
    #[error("the consensus thread ended unexpectedly")]
    ThreadLost,
}
