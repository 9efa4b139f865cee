//! Repair of damaged batches.

use crate::error::DamageCause;
use crate::format::{BatchInfo, Chain};

/// A batch of the log of which everything is known but its bytes: its image is rotten, unreadable or lost, and has to be
/// fetched from a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedBatch {
    /// What the log knows of it. When a start found the damage, only the envelope may have been intact: then `kind`,
    /// `time_ms` and `payload_bytes` are [`crate::format::BatchKind::Commands`], 0 and 0 until the batch is repaired.
    pub info: BatchInfo,
    /// The chain before it.
    pub previous: Chain,
    /// The segment file.
    pub segment: String,
    /// The segment's generation.
    pub generation: u32,
    /// Where the slot begins in it.
    pub offset: u64,
    /// What was found.
    pub cause: DamageCause,
}
