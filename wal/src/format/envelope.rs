//! The envelope: what this node's disk knows about a batch that its image does not say. It names the place it was
//! written for, so that stale, late and misdirected writes are recognised, and what was durable when it was written.

use super::fields::{Field, FieldAt, layout};
use super::{Chain, FORMAT_VERSION, IMAGE_BYTES_MAX, IMAGE_BYTES_MIN, crc_without, field_range};
use ringraft_block::{ClusterId, GroupId, LogIndex, SECTOR_BYTES, Term};

/// Size of the envelope: one sector, so the device writes it whole or not at all.
pub const ENVELOPE_BYTES: usize = Layout::BYTES;

const _: () = assert!(ENVELOPE_BYTES == SECTOR_BYTES);

/// `RRev` in the file.
const MAGIC: u32 = u32::from_le_bytes(*b"RRev");

layout! {
    Layout: 512 {
        magic: u32,
        version: u16,
        reserved_a: u16,
        cluster: ClusterId,
        nonce: u64,
        generation: u32,
        group: GroupId,
        offset: u64,
        epoch: u64,
        boot: u64,
        durable_through: LogIndex,
        term: Term,
        first: LogIndex,
        last: LogIndex,
        chain: Chain,
        image_bytes: u32,
        crc: u32,
        reserved_b: [u8; 392],
    }
}

const CRC_FIELD: std::ops::Range<usize> = field_range(Layout::FIELDS, "crc");

/// The local half of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// The cluster whose log this is.
    pub cluster: ClusterId,
    /// Random number of the segment's life, from its header.
    pub nonce: u64,
    /// The segment's place in the order of the log.
    pub generation: u32,
    /// The log that the batch belongs to.
    pub group: GroupId,
    /// Where in the segment file this slot was written to.
    pub offset: u64,
    /// How often the log had been cut when this was written.
    pub epoch: u64,
    /// How often the node had started when this was written.
    pub boot: u64,
    /// The log was known to be durable through here when this write was submitted.
    pub durable_through: LogIndex,
    /// The batch's term.
    pub term: Term,
    /// The batch's first index.
    pub first: LogIndex,
    /// The batch's last index, inclusive.
    pub last: LogIndex,
    /// The chain at the batch's end.
    pub chain: Chain,
    /// Length of the image that follows.
    pub image_bytes: u32,
}

/// Why 512 bytes are no envelope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// The bytes end too early.
    #[error("an envelope takes 512 bytes")]
    TooShort,
    /// Something else was written here, or nothing.
    #[error("no envelope magic")]
    Magic,
    /// The bytes were altered.
    #[error("the envelope's checksum does not fit")]
    Checksum,
    /// Written by another version of the format.
    #[error(
        "envelope of format version {0}; this build reads version {FORMAT_VERSION}: use the build that wrote it"
    )]
    Version(u16),
    /// A value that no writer of this version produces.
    #[error("the envelope's {0} is out of range")]
    Range(&'static str),
}

impl EnvelopeError {
    /// The envelope is intact, but not for this build: it is no damage.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        matches!(self, Self::Version(_))
    }
}

/// Writes `envelope` to the first 512 bytes of `slot`.
///
/// # Panics
/// When `slot` is shorter than that.
pub fn write_envelope(slot: &mut [u8], envelope: &Envelope) {
    let mut bytes = Layout {
        magic: MAGIC,
        version: FORMAT_VERSION,
        reserved_a: 0,
        cluster: envelope.cluster,
        nonce: envelope.nonce,
        generation: envelope.generation,
        group: envelope.group,
        offset: envelope.offset,
        epoch: envelope.epoch,
        boot: envelope.boot,
        durable_through: envelope.durable_through,
        term: envelope.term,
        first: envelope.first,
        last: envelope.last,
        chain: envelope.chain,
        image_bytes: envelope.image_bytes,
        crc: 0,
        reserved_b: [0; 392],
    }
    .encode();
    let crc = ringraft_block::crc32c(&bytes);
    bytes[CRC_FIELD].copy_from_slice(&crc.to_le_bytes());
    slot[..ENVELOPE_BYTES].copy_from_slice(&bytes);
}

/// Where an envelope was written, as it says itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EnvelopePlace {
    pub(crate) cluster: ClusterId,
    pub(crate) nonce: u64,
    pub(crate) generation: u32,
    pub(crate) offset: u64,
}

/// The place of an intact envelope of any version.
pub(crate) fn envelope_place(slot: &[u8]) -> Option<EnvelopePlace> {
    let bytes = slot.first_chunk::<ENVELOPE_BYTES>()?;
    let Layout { magic, cluster, nonce, generation, offset, crc, .. } = Layout::decode(bytes);
    let intact = magic == MAGIC && crc_without(0, bytes, CRC_FIELD) == crc;
    intact.then_some(EnvelopePlace { cluster, nonce, generation, offset })
}

/// Reads an envelope from the start of `slot`. A checked envelope says that these bytes were written as one; whether
/// they belong here is for the caller to compare.
///
/// # Errors
/// The first rule that the bytes break.
pub fn read_envelope(slot: &[u8]) -> Result<Envelope, EnvelopeError> {
    let bytes = slot.first_chunk::<ENVELOPE_BYTES>().ok_or(EnvelopeError::TooShort)?;
    let layout = Layout::decode(bytes);
    if layout.magic != MAGIC {
        return Err(EnvelopeError::Magic);
    }
    if crc_without(0, bytes, CRC_FIELD) != layout.crc {
        return Err(EnvelopeError::Checksum);
    }
    if layout.version != FORMAT_VERSION {
        return Err(EnvelopeError::Version(layout.version));
    }
    if layout.reserved_a != 0 || layout.reserved_b != [0; 392] {
        return Err(EnvelopeError::Range("reserved part"));
    }
    if !(IMAGE_BYTES_MIN..=IMAGE_BYTES_MAX).contains(&(layout.image_bytes as usize)) {
        return Err(EnvelopeError::Range("image length"));
    }
    if layout.first.get() == 0 || layout.last < layout.first || layout.durable_through >= layout.first {
        return Err(EnvelopeError::Range("index"));
    }
    Ok(Envelope {
        cluster: layout.cluster,
        nonce: layout.nonce,
        generation: layout.generation,
        group: layout.group,
        offset: layout.offset,
        epoch: layout.epoch,
        boot: layout.boot,
        durable_through: layout.durable_through,
        term: layout.term,
        first: layout.first,
        last: layout.last,
        chain: layout.chain,
        image_bytes: layout.image_bytes,
    })
}
