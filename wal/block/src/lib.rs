//! Aligned buffers, their pool, checksums and identifiers: the one crate that the log, the links and
//! the engine all import.
//!
//! A batch of commands lives in one buffer from the moment the leader seals it, or a follower receives it,
//! until the log has written it, every socket has sent it and the state machine has read it. Such a buffer
//! is a [`Block`]: memory that the disk backend can write with direct I/O, owned by one holder while it is
//! filled, and shared afterwards ([`SharedBlock`]). When the last holder lets go, it returns to its [`Pool`].
//!
//! This crate does no I/O, knows no file format and no protocol.

mod buffer;
mod checksum;
mod ids;
mod pool;

pub use buffer::{AlignedBuf, BlockBuf};
pub use checksum::{crc32c, crc32c_append, crc32c_numbered, crc32c_sectors};
pub use ids::{ClusterId, GroupId, Incarnation, LogIndex, NodeId, Term};
pub use pool::{Block, Pool, PoolStats, SharedBlock};

/// The unit that the device writes whole or not at all, in bytes (assumption 1 of the log's crash contract).
pub const SECTOR_BYTES: usize = 512;

/// The unit of direct I/O, in bytes: offsets, lengths and memory addresses of log writes are multiples of it.
pub const BLOCK_BYTES: usize = 4096;

/// `bytes` rounded up to whole blocks of [`BLOCK_BYTES`].
#[must_use]
pub const fn round_up_to_block(bytes: usize) -> usize {
    bytes.next_multiple_of(BLOCK_BYTES)
}
