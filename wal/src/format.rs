//! The layout of everything on disk, and of the batch image that also travels. The only place that knows it:
//! pure functions over bytes, no I/O. Golden tests (`tests/golden/`) print every struct.
//!
//! ```text
//! segment file   = header block (4 KiB) | prior-life checksums (crc32c of each sector) | slot | slot | …
//! slot           = envelope (512 B, local to this node) | image (shared by all nodes) | zeros to 4 KiB
//! image          = header 128 B | payload | zeros to 8 B | entry table | sector checksums
//! hard-a, hard-b = header 128 B | group record 128 B | configuration | zeros to 4 KiB
//! ```
//!
//! All numbers are little-endian. Every checksum is crc32c. Bytes are judged in the order length, checksum,
//! meaning: no length is used before it was bounded, no archive is accessed before its bytes were verified.
//!
//! # The image
//!
//! The variable parts whose size is unknown while the batch is open stand *behind* the payload: so a command is
//! copied once, straight to its final place, when it is proposed, and sealing only appends. Entry table and
//! checksum table come last for that reason.
//!
//! - The **entry table** is an rkyv archive ([`LAYOUTS`] has the numbers): per command its offset and length
//!   in the payload, flags, and the slot of its session reference, if it has one.
//! - The **sector checksums** are one crc32c for each 512 B sector of the image between the header and the
//!   checksum table. The first chunk starts behind the header, the last ends where the checksum table begins;
//!   the boundaries between are sector boundaries of the disk (the envelope is one sector, so image and disk
//!   agree). Each is seeded with (group, term, first index, ordinal), so a sector of another batch or another
//!   place never fits. A checksum that computes to 0 is stored as `!0`: no stored checksum is zero, so a sector
//!   of the table that reads as zeros was never written.
//! - The **header checksum** covers the header (with the field zeroed) and the checksum table, so every byte of
//!   the image is covered exactly once.
//! - The **chain** is xxh3-128 over the previous chain, the header (chain and header checksum zeroed) and the
//!   checksum table: where two logs have equal chains they are equal up to there. It defends against faults,
//!   not against an adversary who can choose bytes; peers are authenticated.
//!
//! # What is not covered
//!
//! The zeros that pad a slot to 4 KiB carry nothing and are not checked.

mod content;
mod envelope;
mod fields;
mod hard_state_file;
mod image;
mod segment_header;
#[cfg(test)]
mod tests;

pub(crate) use content::slot_content_checksums;
pub(crate) use envelope::envelope_place;
pub use envelope::{ENVELOPE_BYTES, Envelope, EnvelopeError, read_envelope, write_envelope};
pub use fields::FieldAt;
pub use hard_state_file::{
    CONFIGURATION_BYTES_MAX, Claim, Cut, HARD_STATE_FILE_BYTES, HardState, HardStateError, LogStart,
    read_hard_state, write_hard_state,
};
#[cfg(test)]
pub(crate) use image::reseal;
pub use image::{
    BatchBuilder, BatchFull, BatchInfo, BatchKind, BatchView, COUNT_MAX, Command, Commands, IMAGE_BYTES_MAX,
    IMAGE_BYTES_MIN, IMAGE_HEADER_BYTES, ImageError, PAYLOAD_BYTES_MAX, Seal, SectorChecksums, SessionRef,
    image_bytes_for, parse_image,
};
pub(crate) use image::{named_chain, table_sector_fits};
pub use segment_header::{
    PriorContent, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentHeaderError, SegmentOrigin, content_checksum,
    prior_checksum_at, read_segment_header, slots_start, write_segment_header,
};

use ringraft_block::{SECTOR_BYTES, round_up_to_block};
use std::fmt;

/// Version of every layout in this file. A reader refuses any other. So that it can tell what a newer build wrote from rot, in every
/// version magic, version and checksum stand where they do now, and the checksum covers the bytes that it covers now; and so do an
/// envelope's cluster, nonce, generation and offset, by which it is told from a command that looks like one. Versions are counted
/// one by one: of a hard state longer than this build's, whose checksum cannot be verified here, one far ahead is taken for damage.
pub const FORMAT_VERSION: u16 = 1;

/// The bytes that a slot takes on disk for an image of `image_bytes`: envelope, image, zeros to whole blocks.
#[must_use]
pub const fn slot_bytes(image_bytes: usize) -> usize {
    round_up_to_block(ENVELOPE_BYTES + image_bytes)
}

/// The most that a slot can take.
pub const SLOT_BYTES_MAX: usize = slot_bytes(IMAGE_BYTES_MAX);

/// Identifies a log up to a batch: equal chains, equal logs. The chain before the first batch is the genesis of
/// the formed cluster (all zeros before formation).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Chain(pub [u8; 16]);

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A number that changes when any layout in this file changes, computed from the layouts themselves. It stands in
/// every segment header, in the hard state and in the hello of the wire, so a build whose archive layout was
/// altered by a dependency's feature is refused rather than misread.
pub const FINGERPRINT: u64 = {
    let mut hash = Fnv::new();
    hash = hash.number(FORMAT_VERSION as u64);
    hash = hash.number(SECTOR_BYTES as u64);
    hash = hash.number(ringraft_block::BLOCK_BYTES as u64);
    hash = hash.number(COUNT_MAX as u64);
    hash = hash.number(PAYLOAD_BYTES_MAX as u64);
    let mut ordinal = 0;
    while ordinal < LAYOUTS.len() {
        hash = hash.layout(LAYOUTS[ordinal].1);
        ordinal += 1;
    }
    hash.0
};

/// Every fixed struct by name, and the entry table's archived types, for the golden tests.
pub const LAYOUTS: &[(&str, &[FieldAt])] = &[
    ("image header", image::Header::FIELDS),
    ("entry table (archive root)", image::TABLE_FIELDS),
    ("entry (archive)", image::ENTRY_FIELDS),
    ("session (archive)", image::SESSION_FIELDS),
    ("envelope", envelope::Layout::FIELDS),
    ("segment header", segment_header::Layout::FIELDS),
    ("hard state file header", hard_state_file::FileHeader::FIELDS),
    ("hard state group record", hard_state_file::GroupRecord::FIELDS),
];

/// FNV-1a, 64 bits: small enough to run at compile time.
struct Fnv(u64);

impl Fnv {
    const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    const fn byte(self, byte: u8) -> Self {
        Self((self.0 ^ byte as u64).wrapping_mul(0x0100_0000_01b3))
    }

    const fn number(mut self, number: u64) -> Self {
        let bytes = number.to_le_bytes();
        let mut at = 0;
        while at < bytes.len() {
            self = self.byte(bytes[at]);
            at += 1;
        }
        self
    }

    const fn layout(mut self, fields: &[FieldAt]) -> Self {
        let mut ordinal = 0;
        while ordinal < fields.len() {
            let field = fields[ordinal];
            let name = field.name.as_bytes();
            let mut at = 0;
            while at < name.len() {
                self = self.byte(name[at]);
                at += 1;
            }
            self = self.number(field.at as u64).number(field.bytes as u64);
            ordinal += 1;
        }
        self
    }
}

/// The crc32c of a fixed struct with the bytes of its own checksum field taken as zero, so that the field may
/// stand anywhere. `seed` continues an earlier checksum.
fn crc_without(seed: u32, bytes: &[u8], crc_field: std::ops::Range<usize>) -> u32 {
    let crc = ringraft_block::crc32c_append(seed, &bytes[..crc_field.start]);
    let crc = ringraft_block::crc32c_append(crc, &[0; 4]);
    ringraft_block::crc32c_append(crc, &bytes[crc_field.end..])
}

/// The bytes of the field `name`; compile-time only, so a misspelt name does not build.
const fn field_range(fields: &[FieldAt], name: &str) -> std::ops::Range<usize> {
    let mut ordinal = 0;
    while ordinal < fields.len() {
        if equal(fields[ordinal].name.as_bytes(), name.as_bytes()) {
            return fields[ordinal].at..fields[ordinal].at + fields[ordinal].bytes;
        }
        ordinal += 1;
    }
    panic!("no such field")
}

const fn equal(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut at = 0;
    while at < a.len() {
        if a[at] != b[at] {
            return false;
        }
        at += 1;
    }
    true
}
