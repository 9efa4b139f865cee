//! What comes of a snapshot that was asked for by hand.

use crate::error::StopCause;
use ringraft_block::{LogIndex, Term};

/// A snapshot that is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotTaken {
    /// The last index that it covers.
    pub last: LogIndex,
    /// The term of that entry.
    pub term: Term,
    /// What it takes on the disk.
    pub bytes: u64,
}

/// Why no snapshot was taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// The state machine makes none: implement [`StateMachine::snapshot`](crate::StateMachine::snapshot).
    #[error("this state machine makes no snapshots")]
    Unsupported,
    /// The disk, or the machine, failed; nothing else was affected. May be asked for again.
    #[error("no snapshot was taken: {0}")]
    Failed(String),
    /// Too many requests wait.
    #[error("too many requests wait already: try again")]
    Busy,
    /// The node has stopped.
    #[error("the node has stopped: {0}")]
    Stopped(StopCause),
}
