//! What can go wrong, and what whoever meets it can do.

use crate::disk::DiskError;
use crate::format::{
    EnvelopeError, HardStateError, IMAGE_BYTES_MAX, IMAGE_BYTES_MIN, ImageError, SegmentHeaderError,
};
use ringraft_block::{ClusterId, LogIndex, NodeId, Term};
use std::fmt;

/// Why the log has stopped. Nothing that was not acknowledged before will be; the process should step down and end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalError {
    /// The limits contradict each other.
    #[error("{0}: correct the configuration")]
    Config(ConfigError),
    /// The device failed, and what it holds of unacknowledged writes is unknown.
    #[error(
        "{what}: {error}. The log is stopped and nothing is retried. Check the device, then restart this node"
    )]
    Disk {
        /// What the log was doing.
        what: &'static str,
        /// The backend's error.
        error: DiskError,
    },
    /// The device wrote less than it was asked to, without an error.
    #[error(
        "{what}: {written} of {asked} bytes were written. The log is stopped and nothing is retried. \
         Check the device and the free space, then restart this node"
    )]
    ShortWrite {
        /// What the log was doing.
        what: &'static str,
        /// Bytes that were to be written.
        asked: usize,
        /// Bytes that were.
        written: usize,
    },
    /// A backend answered an operation with the completion of another: a defect of the backend.
    #[error("{what}: the disk backend answered with the completion of another operation; this is a defect")]
    Protocol {
        /// What the log was doing.
        what: &'static str,
    },
    /// The directory belongs to another node or cluster.
    #[error(
        "the data directory belongs to node {found_node} of cluster {found_cluster}, not to node {node} of cluster \
         {cluster}: correct the path or the identity in the configuration"
    )]
    WrongIdentity {
        /// The node that the configuration names.
        node: NodeId,
        /// The cluster that the configuration names.
        cluster: ClusterId,
        /// The node that the directory names.
        found_node: NodeId,
        /// The cluster that the directory names.
        found_cluster: ClusterId,
    },
    /// Neither copy of the hard state can be used, so term and vote are unknown and the node must not take part.
    #[error(
        "both copies of the hard state are unusable (hard-a: {a}; hard-b: {b}). This node's vote is unknown: wipe the \
         directory and add the node anew"
    )]
    HardStateLost {
        /// What is wrong with the first copy.
        a: CopyState,
        /// What is wrong with the second.
        b: CopyState,
    },
    /// A copy of the hard state was written by another version of this program.
    #[error("{file}: {error}")]
    HardStateForeign {
        /// The file.
        file: &'static str,
        /// What it says.
        error: HardStateError,
    },
    /// The segments are newer than both copies of the hard state: the directory was partly restored from a backup.
    #[error(
        "the log has reached epoch {log_epoch} but the hard state knows only {hard_state_epoch}: parts of the \
         directory are from different times. Wipe the directory and add the node anew"
    )]
    HardStateBehind {
        /// The newest epoch of a segment.
        log_epoch: u64,
        /// The epoch of the hard state.
        hard_state_epoch: u64,
    },
    /// A segment was written by another version of this program.
    #[error("{file}: {error}")]
    SegmentForeign {
        /// The file.
        file: String,
        /// What its header says.
        error: SegmentHeaderError,
    },
    /// A batch was written by another version of this program. It is intact, so nothing is repaired, cut or overwritten.
    #[error("{file} at offset {offset}: {error}")]
    EnvelopeForeign {
        /// The segment file.
        file: String,
        /// Where the slot begins in it.
        offset: u64,
        /// What its envelope says.
        error: EnvelopeError,
    },
    /// A batch that this version of the program put on disk was sealed by another one. It is intact, so nothing is repaired, cut or
    /// overwritten.
    #[error("{file} at offset {offset}: {error}")]
    ImageForeign {
        /// The segment file.
        file: String,
        /// Where the slot begins in it.
        offset: u64,
        /// What its image says.
        error: ImageError,
    },
    /// Every generation number has been used: 2^32 segments, restarts and truncations.
    #[error("the log has used up its segment generations: wipe the directory and add the node anew")]
    GenerationsExhausted,
}

/// A configuration that cannot work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A batch of this size does not exist.
    #[error("batch_bytes_max is {given}; the format allows {IMAGE_BYTES_MIN} to {IMAGE_BYTES_MAX} bytes")]
    BatchBytes {
        /// The configured value.
        given: usize,
    },
    /// The segment is too small, too large or no multiple of 4 KiB.
    #[error(
        "segment_bytes is {given}, of which {usable} hold batches; it must be a multiple of 4096, at most 4 GiB, and \
         hold 16 batches of the largest size, {needed} bytes"
    )]
    SegmentBytes {
        /// The configured value.
        given: u64,
        /// What of it holds batches.
        usable: u64,
        /// What 16 of the largest batches take.
        needed: u64,
    },
    /// A limit is zero.
    #[error("segments_ahead, writes_in_flight_max and bytes_in_flight_max must be at least 1")]
    Zero,
}

/// The state of one copy of the hard state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CopyState {
    /// It is intact.
    #[error("intact")]
    Intact,
    /// There is no such file.
    #[error("missing")]
    Missing,
    /// Its bytes are not usable.
    #[error("{0}")]
    Invalid(HardStateError),
    /// It could not be read.
    #[error("{0}")]
    Unreadable(DiskError),
}

/// Damage to a part of the log that was, or may have been, acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// What was found.
    pub cause: DamageCause,
    /// The segment file, or the one that should be there.
    pub segment: String,
    /// The segment's generation; 0 when its header does not tell.
    pub generation: u32,
    /// The offset of the first bad slot in it.
    pub offset: u64,
    /// The first index that is not intact.
    pub first: LogIndex,
    /// What an intact envelope says of the batch: its term and last index. `None`: identity unknown.
    pub identity: Option<(Term, LogIndex)>,
    /// The log is known to have been durable through here.
    pub durable_through: LogIndex,
}

/// What kind of damage it is; the numbers are the rows of the table in `recovery.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DamageCause {
    /// Something durable proves that the batch was complete, and it is not (row 2).
    Lost,
    /// The envelope is intact, the image is not, and what is bad was never blank (row 5).
    ImageRotten,
    /// The envelope is neither intact nor blank, or cannot be read (row 6).
    EnvelopeRotten,
    /// Envelope or image are intact but are not what belongs here (row 6).
    Misplaced,
    /// A segment that others refer to is not there.
    SegmentMissing,
    /// A segment's header is neither intact nor blank, or cannot be read, or is blank above written slots.
    SegmentHeader,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cause = match self.cause {
            DamageCause::Lost => "an acknowledged write is missing or incomplete",
            DamageCause::ImageRotten => "a batch is corrupt",
            DamageCause::EnvelopeRotten => "a batch and its identity are corrupt or unreadable",
            DamageCause::Misplaced => "a batch lies where it was not written to",
            DamageCause::SegmentMissing => "a segment is missing",
            DamageCause::SegmentHeader => "a segment's header is corrupt or unreadable",
        };
        let Self { segment, offset, first, .. } = self;
        write!(f, "the log is damaged from index {first} ({segment} at offset {offset}): {cause}")
    }
}

/// Why a block is not taken for the repair of a batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RepairError {
    /// No damaged batch begins at the index: it is repaired already, or was cut off.
    #[error("no damaged batch begins at index {first}")]
    NotDamaged {
        /// The index that was given.
        first: LogIndex,
    },
    /// The image is not intact. Fetch it again, or from another peer.
    #[error("the image that was to repair the batch at index {first} is not intact: {error}")]
    Image {
        /// The batch's first index.
        first: LogIndex,
        /// What is wrong with it.
        error: ImageError,
    },
    /// The image is intact, but it is another batch, or it does not continue the log. Ask another peer.
    #[error("the image that was to repair the batch at index {first} is that of another batch")]
    Other {
        /// The batch's first index.
        first: LogIndex,
    },
    /// As many bytes wait to be written as the log takes. Offer the batch again after [`crate::WalEvent::Repaired`].
    #[error("too many repaired batches are waiting to be written")]
    Busy,
    /// The log has stopped or is closing.
    #[error("the log has stopped")]
    Stopped,
}

/// Why batches could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// No durable batch begins at the index. Before the first: take a snapshot instead. Behind the last: it is in memory
    /// only, or does not exist.
    #[error("no durable batch begins at index {first}")]
    NotFound {
        /// The index that was asked for.
        first: LogIndex,
    },
    /// The log was truncated while the read was under way. Ask again.
    #[error("the log was truncated during the read")]
    Truncated,
    /// What the device returned is not what was written, though it may be on another attempt.
    #[error("the batch at index {first} is damaged ({segment} at offset {offset}): fetch it from a peer")]
    Damaged {
        /// Index of its first command.
        first: LogIndex,
        /// The segment file.
        segment: String,
        /// Where the slot begins in it.
        offset: u64,
    },
    /// The device failed to read, or memory is short.
    #[error("{0}: fetch the batch from a peer")]
    Disk(DiskError),
    /// As many requests wait as the log takes. Ask again after an answer.
    #[error("too many reads are waiting")]
    Busy,
    /// The log has stopped or is closing.
    #[error("the log has stopped")]
    Stopped,
}
