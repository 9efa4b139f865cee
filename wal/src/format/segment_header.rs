//! The first sector of a segment file.

use super::fields::{Field, FieldAt, layout};
use super::{Chain, Cut, FINGERPRINT, FORMAT_VERSION, LogStart, crc_without, field_range};
use ringraft_block::{BLOCK_BYTES, ClusterId, GroupId, Incarnation, LogIndex, NodeId, SECTOR_BYTES, Term};

/// Size of the header: one sector, at the start of a block of its own.
pub const SEGMENT_HEADER_BYTES: usize = Layout::BYTES;

const _: () = assert!(SEGMENT_HEADER_BYTES == SECTOR_BYTES);

/// `RRsg` in the file.
const MAGIC: u32 = u32::from_le_bytes(*b"RRsg");

layout! {
    Layout: 512 {
        magic: u32,
        version: u16,
        prior_content: u8,
        origin: u8,
        fingerprint: u64,
        cluster: ClusterId,
        node: NodeId,
        incarnation: Incarnation,
        segment_bytes: u64,
        nonce: u64,
        epoch: u64,
        boot: u64,
        generation: u32,
        group: GroupId,
        previous_generation: u32,
        reserved_a: u32,
        cut_index: LogIndex,
        cut_offset: u64,
        after_term: Term,
        after_chain: Chain,
        crc: u32,
        reserved_b: [u8; 364],
    }
}

const CRC_FIELD: std::ops::Range<usize> = field_range(Layout::FIELDS, "crc");

/// What the sectors of a segment held before it entered service: the key to telling a torn write from damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PriorContent {
    /// Zeros, written when the segment was made.
    Zeros = 0,
    /// Another life, whose sector checksums stand behind the header block.
    Checksums = 1,
}

/// How a segment follows what came before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentOrigin {
    /// It continues the segment of this generation, in the same epoch, when that one is full.
    Rollover {
        /// The segment it continues.
        previous: u32,
    },
    /// It is the first of its epoch: a start of the node or a truncation cut the log here.
    Cut {
        /// Where the log was cut.
        cut: Cut,
        /// The last batch before the cut.
        after: LogStart,
    },
}

/// The identity of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The cluster whose log this is.
    pub cluster: ClusterId,
    /// The node whose log this is.
    pub node: NodeId,
    /// The life of the data directory.
    pub incarnation: Incarnation,
    /// Size of the file.
    pub segment_bytes: u64,
    /// Random number of this life of the segment; every envelope in it repeats it.
    pub nonce: u64,
    /// The epoch that all its slots belong to.
    pub epoch: u64,
    /// The start of the node that wrote it; no later one appends to it.
    pub boot: u64,
    /// Its place in the order of the log, from 1, never used twice.
    pub generation: u32,
    /// The log that it belongs to.
    pub group: GroupId,
    /// What its sectors held before.
    pub prior_content: PriorContent,
    /// What it follows.
    pub origin: SegmentOrigin,
}

/// Why a sector is no usable segment header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentHeaderError {
    /// The bytes end too early.
    #[error("a segment header takes 512 bytes")]
    TooShort,
    /// All zeros: the segment was made ready but never entered service.
    #[error("the segment header is blank")]
    Blank,
    /// Something else was written here.
    #[error("no segment magic")]
    Magic,
    /// The bytes were altered.
    #[error("the segment header's checksum does not fit")]
    Checksum,
    /// Written by another version of the format.
    #[error(
        "segment of format version {0}; this build reads version {FORMAT_VERSION}: use the build that wrote it"
    )]
    Version(u16),
    /// Written by a build whose layouts differ.
    #[error(
        "segment with layout fingerprint {0:016x}; this build has {FINGERPRINT:016x}: use the build that wrote it"
    )]
    Fingerprint(u64),
    /// A value that no writer of this version produces.
    #[error("the segment header's {0} is out of range")]
    Range(&'static str),
}

/// Where the slots of a segment of `segment_bytes` begin: behind the header block and the region for one checksum
/// per sector of its former life (4 B per 512 B), which is reserved from the start so that recycling a segment
/// moves nothing.
#[must_use]
pub const fn slots_start(segment_bytes: u64) -> u64 {
    let checksums = segment_bytes / SECTOR_BYTES as u64 * 4;
    BLOCK_BYTES as u64 + checksums.next_multiple_of(BLOCK_BYTES as u64)
}

/// Where in a segment file the checksum of the former life of the sector at `offset` stands: [`content_checksum`],
/// little-endian. Those of the sectors before [`slots_start`] are zero and mean nothing.
#[must_use]
pub const fn prior_checksum_at(offset: u64) -> u64 {
    BLOCK_BYTES as u64 + offset / SECTOR_BYTES as u64 * 4
}

/// What the region of former checksums holds for a sector: the plain crc32c of its 512 bytes. It only tells prior content
/// from other content; whether a sector is *good* is for the seeded checksums of the image to say.
#[must_use]
pub fn content_checksum(sector: &[u8]) -> u32 {
    ringraft_block::crc32c(sector)
}

/// Writes `header` to the first 512 bytes of `block`.
///
/// # Panics
/// When `block` is shorter than that.
pub fn write_segment_header(block: &mut [u8], header: &SegmentHeader) {
    let (origin, previous_generation, cut, after) = match header.origin {
        SegmentOrigin::Rollover { previous } => (0, previous, Cut::default(), LogStart::default()),
        SegmentOrigin::Cut { cut, after } => (1, cut.generation, cut, after),
    };
    let mut bytes = Layout {
        magic: MAGIC,
        version: FORMAT_VERSION,
        prior_content: header.prior_content as u8,
        origin,
        fingerprint: FINGERPRINT,
        cluster: header.cluster,
        node: header.node,
        incarnation: header.incarnation,
        segment_bytes: header.segment_bytes,
        nonce: header.nonce,
        epoch: header.epoch,
        boot: header.boot,
        generation: header.generation,
        group: header.group,
        previous_generation,
        reserved_a: 0,
        cut_index: cut.index,
        cut_offset: cut.offset,
        after_term: after.term,
        after_chain: after.chain,
        crc: 0,
        reserved_b: [0; 364],
    }
    .encode();
    let crc = ringraft_block::crc32c(&bytes);
    bytes[CRC_FIELD].copy_from_slice(&crc.to_le_bytes());
    block[..SEGMENT_HEADER_BYTES].copy_from_slice(&bytes);
}

/// Reads a segment header from the start of `block`.
///
/// # Errors
/// The first rule that the bytes break.
pub fn read_segment_header(block: &[u8]) -> Result<SegmentHeader, SegmentHeaderError> {
    let bytes = block.first_chunk::<SEGMENT_HEADER_BYTES>().ok_or(SegmentHeaderError::TooShort)?;
    if bytes.iter().all(|byte| *byte == 0) {
        return Err(SegmentHeaderError::Blank);
    }
    let layout = Layout::decode(bytes);
    if layout.magic != MAGIC {
        return Err(SegmentHeaderError::Magic);
    }
    if crc_without(0, bytes, CRC_FIELD) != layout.crc {
        return Err(SegmentHeaderError::Checksum);
    }
    if layout.version != FORMAT_VERSION {
        return Err(SegmentHeaderError::Version(layout.version));
    }
    if layout.fingerprint != FINGERPRINT {
        return Err(SegmentHeaderError::Fingerprint(layout.fingerprint));
    }
    if layout.reserved_a != 0 || layout.reserved_b != [0; 364] {
        return Err(SegmentHeaderError::Range("reserved part"));
    }
    if layout.generation == 0 || layout.previous_generation >= layout.generation {
        return Err(SegmentHeaderError::Range("generation"));
    }
    let prior_content = match layout.prior_content {
        0 => PriorContent::Zeros,
        1 => PriorContent::Checksums,
        _ => return Err(SegmentHeaderError::Range("prior content")),
    };
    let cut =
        Cut { index: layout.cut_index, generation: layout.previous_generation, offset: layout.cut_offset };
    let after = LogStart { index: layout.cut_index, term: layout.after_term, chain: layout.after_chain };
    let origin = match layout.origin {
        0 => SegmentOrigin::Rollover { previous: layout.previous_generation },
        1 => SegmentOrigin::Cut { cut, after },
        _ => return Err(SegmentHeaderError::Range("origin")),
    };
    Ok(SegmentHeader {
        cluster: layout.cluster,
        node: layout.node,
        incarnation: layout.incarnation,
        segment_bytes: layout.segment_bytes,
        nonce: layout.nonce,
        epoch: layout.epoch,
        boot: layout.boot,
        generation: layout.generation,
        group: layout.group,
        prior_content,
        origin,
    })
}
