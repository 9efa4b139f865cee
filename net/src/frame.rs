//! The header of a frame: the only place that knows its layout.
//!
//! A frame is a header of [`HEADER_BYTES`], a body and an attachment, one after the other without padding. Numbers
//! are little-endian. The header's checksum covers all of the header before it, the body's checksum covers the
//! body and is covered by the header's, so no byte of either can change unnoticed, and no body can be moved under
//! another header.
//!
//! The attachment is not checksummed here. It is the image of a batch, whose own format carries a checksum for
//! every sector, which the engine verifies before it believes a byte: a second one would cost every node a second
//! pass over all data.

use crate::body::AlignedBytes;
use crate::error::FrameError;
use ringraft_block::{Block, BlockBuf, GroupId, SECTOR_BYTES, crc32c};
use std::fmt;
use std::ops::Range;

/// Bytes of a frame header.
pub const HEADER_BYTES: usize = 48;

/// The first bytes of every frame.
pub const MAGIC: [u8; 4] = *b"RRFM";

/// The versions of the framing that this build speaks, lowest and highest.
pub const VERSIONS: (u16, u16) = (1, 1);

/// The lowest frame type of the engine; lower ones are the link's own.
pub const KIND_ENGINE_MIN: u16 = 16;

/// The sender closes the connection in good order. No body.
pub const KIND_GOODBYE: u16 = 1;

/// The sender lives and has nothing to say. No body.
pub const KIND_KEEPALIVE: u16 = 2;

/// Where in its block an attachment starts: the log writes the block as it is, and the sector before the image is
/// the receiver's own envelope.
pub const ATTACHMENT_OFFSET: usize = SECTOR_BYTES;

/// The number of a session: the dialer's boot counter in the upper half, its count of dials in the lower. Of two
/// sessions with one peer, the higher is the newer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Session(pub u64);

impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A frame that arrived whole and passed every check of the link.
pub struct Frame<B: BlockBuf> {
    /// The frame type, one of the configured ones.
    pub kind: u16,
    /// Which log it is about.
    pub group: GroupId,
    /// The body.
    pub body: AlignedBytes,
    /// The attachment, where there is one.
    pub attachment: Option<Attachment<B>>,
}

impl<B: BlockBuf> Frame<B> {
    /// The body, aligned to [`BODY_ALIGNMENT`](crate::BODY_ALIGNMENT).
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }
}

/// What rode with a frame: not verified, see the module's words on checksums.
pub struct Attachment<B: BlockBuf> {
    /// It starts at [`ATTACHMENT_OFFSET`]. What is before and after is whatever an earlier life of the block left.
    pub block: Block<B>,
    /// How many bytes it has, not 0.
    pub bytes: usize,
}

impl<B: BlockBuf> fmt::Debug for Frame<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let attachment_bytes = self.attachment.as_ref().map_or(0, |attachment| attachment.bytes);
        f.debug_struct("Frame")
            .field("kind", &self.kind)
            .field("group", &self.group)
            .field("body_bytes", &self.body.len())
            .field("attachment_bytes", &attachment_bytes)
            .finish()
    }
}

/// A header in the form that programs use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version of the framing, agreed in the handshake.
    pub version: u16,
    /// Frame type.
    pub kind: u16,
    /// Which log it is about.
    pub group: GroupId,
    /// Bytes of the body.
    pub body_bytes: u32,
    /// Bytes of the attachment.
    pub attachment_bytes: u32,
    /// Position among the frames of this side of the session, from 0.
    pub sequence: u64,
    /// The session.
    pub session: Session,
    /// crc32c of the body.
    pub body_crc: u32,
}

/// The layout. All bytes are accounted for.
const LAYOUT: [(&str, Range<usize>); 12] = [
    ("magic", F_MAGIC),
    ("version", F_VERSION),
    ("kind", F_KIND),
    ("flags, zero", F_FLAGS),
    ("padding, zero", F_PADDING),
    ("group", F_GROUP),
    ("body bytes", F_BODY_BYTES),
    ("attachment bytes", F_ATTACHMENT_BYTES),
    ("sequence", F_SEQUENCE),
    ("session", F_SESSION),
    ("crc32c of the body", F_BODY_CRC),
    ("crc32c of the bytes before", F_HEADER_CRC),
];
const F_MAGIC: Range<usize> = 0..4;
const F_VERSION: Range<usize> = 4..6;
const F_KIND: Range<usize> = 6..8;
const F_FLAGS: Range<usize> = 8..10;
const F_PADDING: Range<usize> = 10..12;
const F_GROUP: Range<usize> = 12..16;
const F_BODY_BYTES: Range<usize> = 16..20;
const F_ATTACHMENT_BYTES: Range<usize> = 20..24;
const F_SEQUENCE: Range<usize> = 24..32;
const F_SESSION: Range<usize> = 32..40;
const F_BODY_CRC: Range<usize> = 40..44;
const F_HEADER_CRC: Range<usize> = 44..HEADER_BYTES;

const _: () = {
    let mut next = 0;
    let mut field = 0;
    while field < LAYOUT.len() {
        assert!(LAYOUT[field].1.start == next, "the fields of a header follow one another");
        next = LAYOUT[field].1.end;
        field += 1;
    }
    assert!(next == HEADER_BYTES);
};

impl Header {
    /// The bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[F_MAGIC].copy_from_slice(&MAGIC);
        bytes[F_VERSION].copy_from_slice(&self.version.to_le_bytes());
        bytes[F_KIND].copy_from_slice(&self.kind.to_le_bytes());
        bytes[F_GROUP].copy_from_slice(&self.group.get().to_le_bytes());
        bytes[F_BODY_BYTES].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes[F_ATTACHMENT_BYTES].copy_from_slice(&self.attachment_bytes.to_le_bytes());
        bytes[F_SEQUENCE].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[F_SESSION].copy_from_slice(&self.session.0.to_le_bytes());
        bytes[F_BODY_CRC].copy_from_slice(&self.body_crc.to_le_bytes());
        let crc = crc32c(&bytes[..F_HEADER_CRC.start]);
        bytes[F_HEADER_CRC].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The header in `bytes`, if they are one and undamaged. Whether it belongs here is the session's business.
    ///
    /// # Errors
    /// [`FrameError::Magic`], [`FrameError::HeaderChecksum`] or [`FrameError::Reserved`].
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        if bytes[F_MAGIC] != MAGIC {
            return Err(FrameError::Magic);
        }
        if u32::from_le_bytes(field(bytes, F_HEADER_CRC)) != crc32c(&bytes[..F_HEADER_CRC.start]) {
            return Err(FrameError::HeaderChecksum);
        }
        if bytes[F_FLAGS.start..F_PADDING.end].iter().any(|byte| *byte != 0) {
            return Err(FrameError::Reserved);
        }
        Ok(Self {
            version: u16::from_le_bytes(field(bytes, F_VERSION)),
            kind: u16::from_le_bytes(field(bytes, F_KIND)),
            group: GroupId(u32::from_le_bytes(field(bytes, F_GROUP))),
            body_bytes: u32::from_le_bytes(field(bytes, F_BODY_BYTES)),
            attachment_bytes: u32::from_le_bytes(field(bytes, F_ATTACHMENT_BYTES)),
            sequence: u64::from_le_bytes(field(bytes, F_SEQUENCE)),
            session: Session(u64::from_le_bytes(field(bytes, F_SESSION))),
            body_crc: u32::from_le_bytes(field(bytes, F_BODY_CRC)),
        })
    }
}

/// A field of a record of constant size: `at` is one of the layout's ranges, and `N` its length.
pub(crate) fn field<const RECORD: usize, const N: usize>(record: &[u8; RECORD], at: Range<usize>) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&record[at]);
    field
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::fmt::Write;

    pub(crate) fn print_layout<const N: usize>(layout: &[(&str, Range<usize>)], record: &[u8; N]) -> String {
        let mut text = format!("{N} bytes, little-endian\n");
        for (name, range) in layout {
            let hex: String = record[range.clone()].iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(text, "{:>4} {:>3}  {name:<28} {hex}", range.start, range.len()).unwrap();
        }
        text
    }

    fn header() -> Header {
        Header {
            version: 1,
            kind: 17,
            group: GroupId(0x0102_0304),
            body_bytes: 5,
            attachment_bytes: 0x0012_3456,
            sequence: 0x1122_3344_5566_7788,
            session: Session((7 << 32) | 9),
            body_crc: crc32c(b"hello"),
        }
    }

    #[test]
    fn the_layout_is_the_one_on_record() {
        let printed = print_layout(&LAYOUT, &header().encode());
        assert_eq!(printed, include_str!("../tests/golden/frame.txt"), "\n{printed}");
    }

    #[test]
    fn a_header_survives_the_wire() {
        assert_eq!(Header::decode(&header().encode()), Ok(header()));
    }

    #[test]
    fn every_changed_bit_of_a_header_is_refused() {
        let good = header().encode();
        for at in 0..HEADER_BYTES {
            for change in 1..=255 {
                let mut bad = good;
                bad[at] ^= change;
                assert!(Header::decode(&bad).is_err(), "byte {at} changed by {change:#x}");
            }
        }
    }

    #[test]
    fn unknown_flags_are_refused_under_a_right_checksum() {
        for at in F_FLAGS.start..F_PADDING.end {
            let mut bytes = header().encode();
            bytes[at] = 1;
            let crc = crc32c(&bytes[..F_HEADER_CRC.start]);
            bytes[F_HEADER_CRC].copy_from_slice(&crc.to_le_bytes());
            assert_eq!(Header::decode(&bytes), Err(FrameError::Reserved));
        }
    }
}
