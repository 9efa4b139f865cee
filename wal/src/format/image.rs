//! The batch image: sealed once by the leader, the same bytes on every node, on the wire and in memory.
//! The layout is described in the parent module.

use super::fields::{Field, FieldAt, layout};
use super::{Chain, ENVELOPE_BYTES, FORMAT_VERSION, crc_without, field_range, slot_bytes};
use ringraft_block::{
    Block, BlockBuf, GroupId, LogIndex, SECTOR_BYTES, Term, crc32c, crc32c_append, crc32c_numbered,
    crc32c_sectors,
};
use rkyv::api::low;
use rkyv::rancor::Failure;
use rkyv::rend::{u16_le, u32_le, u64_le};
use rkyv::ser::allocator::SubAllocator;
use rkyv::ser::writer::Buffer;
use rkyv::{Archive, Serialize};
use std::mem::offset_of;
use std::ops::Range;
use xxhash_rust::xxh3::Xxh3;

/// Size of the image's fixed header.
pub const IMAGE_HEADER_BYTES: usize = Header::BYTES;

/// A batch holds at most so many commands. Bounds the entry table to 448 KiB, and fits its 16-bit session slots.
pub const COUNT_MAX: usize = 16_384;

/// A batch holds at most so many bytes of commands.
pub const PAYLOAD_BYTES_MAX: usize = 2 * 1024 * 1024;

/// The smallest image: one command without bytes.
pub const IMAGE_BYTES_MIN: usize = image_bytes_for(1, 0, 0);

/// The largest image that any batch within the caps can have: about 2.5 MiB.
pub const IMAGE_BYTES_MAX: usize = image_bytes_for(COUNT_MAX, COUNT_MAX, PAYLOAD_BYTES_MAX);

/// `RRba` in the file.
const MAGIC: u32 = u32::from_le_bytes(*b"RRba");

/// Features that a reader must know to read the image. None is defined yet.
const FEATURES_KNOWN: u32 = 0;

layout! {
    Header: 128 {
        magic: u32,
        version: u16,
        kind: u8,
        reserved_a: u8,
        features: u32,
        group: GroupId,
        term: Term,
        first: LogIndex,
        time_ms: u64,
        count: u32,
        payload_bytes: u32,
        table_bytes: u32,
        image_bytes: u32,
        chain: Chain,
        header_crc: u32,
        reserved_b: [u8; 52],
    }
}

const CRC_FIELD: Range<usize> = field_range(Header::FIELDS, "header_crc");
const CHAIN_FIELD: Range<usize> = field_range(Header::FIELDS, "chain");

/// The ordinal that seeds the header checksum; sectors count from 0 and never reach it.
const HEADER_ORDINAL: u32 = u32::MAX;

/// The command carries a session reference.
const FLAG_SESSION: u16 = 1;

/// One command's place. Archived as it is.
#[derive(Archive, Serialize, Clone, Copy)]
#[rkyv(archived = ArchivedEntry)]
#[repr(C)]
struct Entry {
    /// Of the command's first byte, from the start of the payload.
    offset: u32_le,
    length: u32_le,
    flags: u16_le,
    /// Into the sessions, when the flag is set; else 0.
    session_slot: u16_le,
}

/// A session reference as stored.
#[derive(Archive, Serialize, Clone, Copy)]
#[rkyv(archived = ArchivedSession)]
#[repr(C)]
struct Session {
    session: u64_le,
    sequence: u64_le,
}

#[derive(Archive, Serialize, Default)]
#[rkyv(archived = ArchivedTable)]
struct Table {
    entries: Vec<Entry>,
    sessions: Vec<Session>,
}

// The archive is part of the disk format, so what rkyv derives is pinned here. Cargo unifies features: a crate
// elsewhere in a user's build that turns on `big_endian`, `unaligned` or another pointer width fails to
// compile at this place instead of changing the format in silence.
const _: () = {
    assert!(size_of::<rkyv::primitive::FixedIsize>() == 4, "rkyv must use 32-bit relative pointers");
    assert!(size_of::<ArchivedEntry>() == 12 && align_of::<ArchivedEntry>() == 4);
    assert!(size_of::<ArchivedSession>() == 16 && align_of::<ArchivedSession>() == 8);
    assert!(size_of::<ArchivedTable>() == 16 && align_of::<ArchivedTable>() == 4);
    assert!(<Entry as Archive>::COPY_OPTIMIZATION.is_enabled(), "sealing must copy entries, not walk them");
    assert!(<Session as Archive>::COPY_OPTIMIZATION.is_enabled());
    assert!(COUNT_MAX <= u16::MAX as usize + 1, "session slots are 16 bits");
    assert!(IMAGE_HEADER_BYTES < SECTOR_BYTES && IMAGE_HEADER_BYTES.is_multiple_of(8));
};

/// The type check of the archive's byte order: the length of an archived vector is little-endian.
const _: fn(rkyv::primitive::ArchivedUsize) -> u32_le = |length| length;

pub(super) const ENTRY_FIELDS: &[FieldAt] = &[
    FieldAt { name: "offset", at: offset_of!(ArchivedEntry, offset), bytes: 4 },
    FieldAt { name: "length", at: offset_of!(ArchivedEntry, length), bytes: 4 },
    FieldAt { name: "flags", at: offset_of!(ArchivedEntry, flags), bytes: 2 },
    FieldAt { name: "session_slot", at: offset_of!(ArchivedEntry, session_slot), bytes: 2 },
];

pub(super) const SESSION_FIELDS: &[FieldAt] = &[
    FieldAt { name: "session", at: offset_of!(ArchivedSession, session), bytes: 8 },
    FieldAt { name: "sequence", at: offset_of!(ArchivedSession, sequence), bytes: 8 },
];

/// Each vector is a relative pointer (i32, from its own place) and a length (u32).
pub(super) const TABLE_FIELDS: &[FieldAt] = &[
    FieldAt { name: "entries", at: offset_of!(ArchivedTable, entries), bytes: 8 },
    FieldAt { name: "sessions", at: offset_of!(ArchivedTable, sessions), bytes: 8 },
];

/// The bytes of the entry table's archive: entries, aligned to 8, session references, the two vectors.
const fn table_bytes_for(count: usize, sessions: usize) -> usize {
    let entries = count * size_of::<ArchivedEntry>();
    let entries = entries.next_multiple_of(align_of::<ArchivedSession>());
    entries + sessions * size_of::<ArchivedSession>() + size_of::<ArchivedTable>()
}

/// The bytes of an image with so many commands, `sessions` of which carry a session reference, and
/// `payload_bytes` of commands in all.
#[must_use]
pub const fn image_bytes_for(count: usize, sessions: usize, payload_bytes: usize) -> usize {
    let table_at = (IMAGE_HEADER_BYTES + payload_bytes).next_multiple_of(8);
    let checksums_at = table_at + table_bytes_for(count, sessions);
    checksums_at + checksums_at.div_ceil(SECTOR_BYTES) * 4
}

/// How many sector checksums stand at the end of an image of `image_bytes`. The length alone determines it: `n`
/// checksums follow more than `512 (n-1)` and at most `512 n` bytes.
const fn checksum_count(image_bytes: usize) -> usize {
    image_bytes.div_ceil(SECTOR_BYTES + 4)
}

/// What a batch is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum BatchKind {
    /// Commands of the state machine.
    Commands = 1,
    /// A configuration of the cluster.
    Membership = 2,
    /// A new leader's first: one index without a command (Raft, section 5.4.2).
    Empty = 3,
    /// Registers, expires or fences sessions.
    SessionControl = 4,
    /// An index that the engine waits for, without a command of the user's.
    Barrier = 5,
}

impl BatchKind {
    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Commands),
            2 => Some(Self::Membership),
            3 => Some(Self::Empty),
            4 => Some(Self::SessionControl),
            5 => Some(Self::Barrier),
            _ => None,
        }
    }
}

/// What the log's index, the driver and the core know of a batch. Never a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchInfo {
    /// The log it belongs to.
    pub group: GroupId,
    /// The term of the leader that sealed it.
    pub term: Term,
    /// Index of its first command.
    pub first: LogIndex,
    /// Index of its last command, inclusive.
    pub last: LogIndex,
    /// What it is for.
    pub kind: BatchKind,
    /// The sealing leader's clock, monotonic along the log.
    pub time_ms: u64,
    /// Length of the image.
    pub image_bytes: u32,
    /// Bytes of commands in it.
    pub payload_bytes: u32,
    /// The chain at its end.
    pub chain: Chain,
}

impl BatchInfo {
    /// The bytes that it takes in a segment: envelope, image, padding.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        slot_bytes(self.image_bytes as usize)
    }

    /// The number of indices that it covers.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.last.get() - self.first.get() + 1
    }
}

/// A client's session and its sequence number in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionRef {
    /// The session.
    pub session: u64,
    /// The command's number in the session.
    pub sequence: u64,
}

/// The batch cannot take this command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchFull {
    /// The block is too small: [`BatchBuilder::grow`] into one of at least so many bytes and try again, or seal.
    #[error("the batch needs a block of {slot_bytes} bytes")]
    Block {
        /// Capacity needed for the batch with this command.
        slot_bytes: usize,
    },
    /// The batch is at a cap of the format: seal it. A command that does not fit an empty batch never will.
    #[error("the batch has as many commands or bytes as the format allows")]
    Cap,
}

/// What sealing adds to the commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seal {
    /// The log that the batch belongs to.
    pub group: GroupId,
    /// The leader's term.
    pub term: Term,
    /// The index of the first command.
    pub first: LogIndex,
    /// What the batch is for.
    pub kind: BatchKind,
    /// The leader's clock; not less than that of the batch before.
    pub time_ms: u64,
    /// The chain at the end of the batch before.
    pub previous_chain: Chain,
}

/// The open batch: commands go straight to their final place in the block that is then written and sent.
///
/// The builder keeps its entry vectors from batch to batch: [`BatchBuilder::seal`] hands out the block and leaves the
/// builder without one, [`BatchBuilder::rearm`] gives it the next. In steady state nothing is allocated.
pub struct BatchBuilder<B: BlockBuf> {
    /// `None` between sealing and re-arming.
    block: Option<Block<B>>,
    payload_bytes: usize,
    table: Table,
}

impl<B: BlockBuf> BatchBuilder<B> {
    /// An empty batch in `block`.
    #[must_use]
    pub fn new(block: Block<B>) -> Self {
        Self { block: Some(block), payload_bytes: 0, table: Table::default() }
    }

    /// Whether there is a block to push to.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.block.is_some()
    }

    /// Begins the next batch in `block`.
    ///
    /// # Panics
    /// When a batch is open already.
    pub fn rearm(&mut self, block: Block<B>) {
        assert!(self.block.is_none(), "the open batch must be sealed first");
        self.block = Some(block);
    }

    /// Appends a command.
    ///
    /// # Errors
    /// [`BatchFull`] when it does not fit; the batch is unchanged.
    ///
    /// # Panics
    /// When no block is armed.
    pub fn push(&mut self, command: &[u8], session: Option<SessionRef>) -> Result<(), BatchFull> {
        self.push_within(usize::MAX, command, session)
    }

    /// As [`BatchBuilder::push`], if the slot takes no more than `slot_bytes_max` with the command, however large the block is.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub fn push_within(
        &mut self,
        slot_bytes_max: usize,
        command: &[u8],
        session: Option<SessionRef>,
    ) -> Result<(), BatchFull> {
        let block = self.block.as_mut().expect("a builder is armed while commands are pushed");
        let count = self.table.entries.len() + 1;
        let sessions = self.table.sessions.len() + usize::from(session.is_some());
        let payload_bytes = self.payload_bytes.saturating_add(command.len());
        if count > COUNT_MAX || payload_bytes > PAYLOAD_BYTES_MAX {
            return Err(BatchFull::Cap);
        }
        let slot_bytes = slot_bytes(image_bytes_for(count, sessions, payload_bytes));
        if slot_bytes > slot_bytes_max.min(block.capacity()) {
            return Err(BatchFull::Block { slot_bytes });
        }
        let at = ENVELOPE_BYTES + IMAGE_HEADER_BYTES + self.payload_bytes;
        block[at..at + command.len()].copy_from_slice(command);
        let (flags, session_slot) = match session {
            Some(session) => {
                let slot = self.table.sessions.len() as u16;
                let session = Session { session: session.session.into(), sequence: session.sequence.into() };
                self.table.sessions.push(session);
                (FLAG_SESSION, slot)
            }
            None => (0, 0),
        };
        self.table.entries.push(Entry {
            offset: (self.payload_bytes as u32).into(),
            length: (command.len() as u32).into(),
            flags: flags.into(),
            session_slot: session_slot.into(),
        });
        self.payload_bytes = payload_bytes;
        Ok(())
    }

    /// Appends commands without sessions that stand one behind the other in `payload`, `lengths` telling them apart: the first of
    /// them, as many as fit while the slot takes no more than `slot_bytes_max`. Returns how many. Costs less than to push them
    /// one by one: they are copied together.
    ///
    /// # Panics
    /// When no block is armed, or `payload` is shorter than `lengths` together.
    pub fn push_run(&mut self, slot_bytes_max: usize, payload: &[u8], lengths: &[u32]) -> usize {
        let block = self.block.as_mut().expect("a builder is armed while commands are pushed");
        let (present, sessions) = (self.table.entries.len(), self.table.sessions.len());
        let slot_bytes_max = slot_bytes_max.min(block.capacity());
        let fits = |commands: usize, bytes: usize| {
            let (count, payload_bytes) = (present + commands, self.payload_bytes.saturating_add(bytes));
            count <= COUNT_MAX
                && payload_bytes <= PAYLOAD_BYTES_MAX
                && slot_bytes(image_bytes_for(count, sessions, payload_bytes)) <= slot_bytes_max
        };
        let all: usize = lengths.iter().map(|length| *length as usize).sum();
        let (mut taken, mut taken_bytes) = (lengths.len(), all);
        if !fits(taken, taken_bytes) {
            (taken, taken_bytes) = (0, 0);
            while let Some(length) = lengths.get(taken)
                && fits(taken + 1, taken_bytes + *length as usize)
            {
                (taken, taken_bytes) = (taken + 1, taken_bytes + *length as usize);
            }
        }
        let at = ENVELOPE_BYTES + IMAGE_HEADER_BYTES + self.payload_bytes;
        block[at..at + taken_bytes].copy_from_slice(&payload[..taken_bytes]);
        let mut offset = self.payload_bytes as u32;
        self.table.entries.extend(lengths[..taken].iter().map(|length| {
            let entry = Entry {
                offset: offset.into(),
                length: (*length).into(),
                flags: 0.into(),
                session_slot: 0.into(),
            };
            offset += *length;
            entry
        }));
        self.payload_bytes += taken_bytes;
        taken
    }

    /// The number of commands.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.entries.len()
    }

    /// Whether there is no command.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.entries.is_empty()
    }

    /// Bytes of commands.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// The length that the image would have if it were sealed now.
    #[must_use]
    pub fn image_bytes_if_sealed(&self) -> usize {
        image_bytes_for(self.len().max(1), self.table.sessions.len(), self.payload_bytes)
    }

    /// Gives the commands of the open batch back, in order, and empties it; its block stays.
    pub fn abandon(&mut self, mut give_back: impl FnMut(&[u8])) {
        if let Some(block) = &self.block {
            for entry in &self.table.entries {
                let at = ENVELOPE_BYTES + IMAGE_HEADER_BYTES + entry.offset.to_native() as usize;
                give_back(&block[at..at + entry.length.to_native() as usize]);
            }
        }
        self.table.entries.clear();
        self.table.sessions.clear();
        self.payload_bytes = 0;
    }

    /// Moves the open batch to a larger block.
    ///
    /// # Panics
    /// When no batch is open, or `block` is smaller than the present one.
    pub fn grow(&mut self, mut block: Block<B>) {
        let old = self.block.take().expect("a builder is armed while it grows");
        assert!(block.capacity() >= old.capacity(), "a batch grows into a larger block");
        let at = ENVELOPE_BYTES + IMAGE_HEADER_BYTES;
        let end = at + self.payload_bytes;
        block[at..end].copy_from_slice(&old[at..end]);
        self.block = Some(block);
    }

    /// Closes the batch. The image stands at byte 512 of the block, in front of it the room for the envelope, behind
    /// it zeros to the end of the slot; what follows those is undefined.
    ///
    /// # Panics
    /// When no block is armed; when the kind and the commands do not fit each other (an empty batch has no command, any
    /// other has one or more); when `first` is 0.
    pub fn seal(&mut self, seal: Seal) -> (Block<B>, BatchInfo) {
        let mut block = self.block.take().expect("a builder is armed when it is sealed");
        assert!(seal.first.get() > 0, "index 0 is the position before the log");
        assert_eq!(seal.kind == BatchKind::Empty, self.is_empty(), "only an empty batch has no command");
        if seal.kind == BatchKind::Empty {
            self.table.entries.push(Entry {
                offset: 0.into(),
                length: 0.into(),
                flags: 0.into(),
                session_slot: 0.into(),
            });
        }
        let count = self.table.entries.len();
        let table_bytes = table_bytes_for(count, self.table.sessions.len());
        let image_bytes = image_bytes_for(count, self.table.sessions.len(), self.payload_bytes);
        let slot_end = slot_bytes(image_bytes);
        block[ENVELOPE_BYTES + image_bytes..slot_end].fill(0);
        let image = &mut block[ENVELOPE_BYTES..ENVELOPE_BYTES + image_bytes];

        let payload_end = IMAGE_HEADER_BYTES + self.payload_bytes;
        let table_at = payload_end.next_multiple_of(8);
        let checksums_at = table_at + table_bytes;
        image[payload_end..checksums_at].fill(0);
        let writer = Buffer::from(&mut image[table_at..checksums_at]);
        let written =
            low::to_bytes_in_with_alloc::<_, _, Failure>(&self.table, writer, SubAllocator::empty());
        let written = written.expect("the table fits the bytes computed for it").len();
        assert_eq!(written, table_bytes, "the archive has the size computed for it");

        let mut header = Header {
            magic: MAGIC,
            version: FORMAT_VERSION,
            kind: seal.kind as u8,
            reserved_a: 0,
            features: 0,
            group: seal.group,
            term: seal.term,
            first: seal.first,
            time_ms: seal.time_ms,
            count: count as u32,
            payload_bytes: self.payload_bytes as u32,
            table_bytes: table_bytes as u32,
            image_bytes: image_bytes as u32,
            chain: Chain::default(),
            header_crc: 0,
            reserved_b: [0; 52],
        };
        let (content, checksums) = image.split_at_mut(checksums_at);
        let seed = seed_of(&header);
        let mut places = checksums.as_chunks_mut::<4>().0.iter_mut();
        sector_checksums(seed, content, |_, checksum| {
            if let Some(place) = places.next() {
                *place = checksum.to_le_bytes();
            }
        });
        header.chain = chain_of(seal.previous_chain, &header, checksums);
        header.header_crc = header_checksum(seed, &header.encode(), checksums);
        content[..IMAGE_HEADER_BYTES].copy_from_slice(&header.encode());

        self.table.entries.clear();
        self.table.sessions.clear();
        self.payload_bytes = 0;
        let info = info_of(&header, seal.kind);
        (block, info)
    }
}

/// Why bytes are no batch image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// Shorter or longer than any image, or than its header says.
    #[error("the image has a length that its header contradicts")]
    Length,
    /// Something else is here.
    #[error("no image magic")]
    Magic,
    /// Header or checksum table were altered.
    #[error("the image's header checksum does not fit")]
    HeaderChecksum,
    /// A sector was altered, or belongs to another batch.
    #[error("the checksum of the image's sector {0} does not fit")]
    SectorChecksum(u32),
    /// Written by another version of the format.
    #[error(
        "image of format version {0}; this build reads version {FORMAT_VERSION}: use the build that wrote it"
    )]
    Version(u16),
    /// The image needs features that this build does not know.
    #[error("the image needs unknown features {0:#x}: upgrade this node")]
    Features(u32),
    /// A kind of batch that this build does not know.
    #[error("unknown kind of batch {0}: upgrade this node")]
    Kind(u8),
    /// A value that no writer of this version produces.
    #[error("the image's {0} is out of range")]
    Range(&'static str),
    /// The bytes do not lie on an 8-byte boundary in memory, so the entry table cannot be read in place.
    #[error("the image is not aligned to 8 bytes in memory")]
    Misaligned,
    /// The entry table is no valid archive, or says something else than the header.
    #[error("the image's entry table is invalid")]
    Table,
    /// An entry of the table breaks a rule.
    #[error("entry {0} of the image's entry table is invalid")]
    Entry(u32),
}

impl ImageError {
    /// The image is intact, but not for this build: it is no damage.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        matches!(self, Self::Version(_) | Self::Features(_) | Self::Kind(_))
    }
}

/// Verifies an image and gives access to it. Nothing is copied.
///
/// # Errors
/// The first rule that the bytes break.
pub fn parse_image(image: &[u8]) -> Result<BatchView<'_>, ImageError> {
    let sectors = SectorChecksums::of(image)?;
    if let Some(ordinal) = sectors.first_bad() {
        return Err(ImageError::SectorChecksum(ordinal));
    }
    let view = BatchView::access(image, &sectors.header, sectors.checksums_at)?;
    view.validate_entries()?;
    Ok(view)
}

/// The first half of verifying an image: header and checksum table fit each other, so every sector can be judged by
/// itself. Recovery uses this to tell a torn image from a rotten one.
pub struct SectorChecksums<'a> {
    header: Header,
    content: &'a [u8],
    checksums: &'a [u8],
    checksums_at: usize,
    seed: u32,
}

impl<'a> SectorChecksums<'a> {
    /// Verifies header and checksum table.
    ///
    /// # Errors
    /// The first rule that they break.
    pub fn of(image: &'a [u8]) -> Result<Self, ImageError> {
        if !(IMAGE_BYTES_MIN..=IMAGE_BYTES_MAX).contains(&image.len()) {
            return Err(ImageError::Length);
        }
        let (header_bytes, _) = image.split_first_chunk::<IMAGE_HEADER_BYTES>().ok_or(ImageError::Length)?;
        let header = Header::decode(header_bytes);
        if header.magic != MAGIC {
            return Err(ImageError::Magic);
        }
        let checksums_at = image.len() - 4 * checksum_count(image.len());
        let (content, checksums) = image.split_at(checksums_at);
        let seed = seed_of(&header);
        if header_checksum(seed, header_bytes, checksums) != header.header_crc {
            return Err(ImageError::HeaderChecksum);
        }
        Ok(Self { header, content, checksums, checksums_at, seed })
    }

    /// The number of sectors that have a checksum: all that hold anything but checksums.
    #[must_use]
    pub fn count(&self) -> usize {
        self.checksums.len() / 4
    }

    /// Whether a sector's bytes fit its checksum. A sector out of range does not.
    #[must_use]
    pub fn is_good(&self, ordinal: usize) -> bool {
        let Some(stored) = self.checksums.get(ordinal * 4..).and_then(<[u8]>::first_chunk::<4>) else {
            return false;
        };
        let Some(chunk) = self.content.get(chunk_of(self.checksums_at, ordinal)) else { return false };
        u32::from_le_bytes(*stored) == sector_checksum(self.seed, ordinal, chunk)
    }

    /// The first sector whose bytes do not fit its checksum.
    fn first_bad(&self) -> Option<u32> {
        let mut stored = self.checksums.as_chunks::<4>().0.iter();
        let mut bad = None;
        sector_checksums(self.seed, self.content, |ordinal, checksum| {
            let fits = stored.next().is_some_and(|stored| u32::from_le_bytes(*stored) == checksum);
            if !fits && bad.is_none() {
                bad = Some(ordinal);
            }
        });
        // A length that no writer produces has a checksum more than sectors.
        let judged = self.content.len().div_ceil(SECTOR_BYTES);
        bad.or_else(|| {
            (judged..self.count()).find(|ordinal| !self.is_good(*ordinal)).map(|ordinal| ordinal as u32)
        })
    }

    /// What the log knows of the batch; `None` when the header names a kind that this build does not know.
    #[must_use]
    pub fn info(&self) -> Option<BatchInfo> {
        BatchKind::from_byte(self.header.kind).map(|kind| info_of(&self.header, kind))
    }

    /// Whether the batch follows a log whose chain is `previous`.
    #[must_use]
    pub fn verify_chain(&self, previous: Chain) -> bool {
        chain_of(previous, &self.header, self.checksums) == self.header.chain
    }

    /// The sectors of an image of `image_bytes` that hold a part of its checksum table. None of them is all zeros
    /// in a complete image, since no stored checksum is zero.
    #[must_use]
    pub fn table_sectors(image_bytes: usize) -> Range<usize> {
        let checksums_at = image_bytes - (4 * checksum_count(image_bytes)).min(image_bytes);
        checksums_at / SECTOR_BYTES..image_bytes.div_ceil(SECTOR_BYTES)
    }
}

/// The chain that an image's header names, if it is an image header at all; nothing is verified.
pub(crate) fn named_chain(image: &[u8]) -> Option<Chain> {
    let header = Header::decode(image.first_chunk::<IMAGE_HEADER_BYTES>()?);
    (header.magic == MAGIC).then_some(header.chain)
}

/// Whether any checksum that stands in `sector` of the image fits the bytes that it is for, in a batch of this identity. Then the
/// sector belongs to that batch, whatever else is wrong with the image.
pub(crate) fn table_sector_fits(
    image: &[u8],
    group: GroupId,
    term: Term,
    first: LogIndex,
    sector: usize,
) -> bool {
    let count = checksum_count(image.len());
    let Some(checksums_at) = image.len().checked_sub(4 * count) else { return false };
    let seed = seed_for(group, term, first);
    let begins = sector * SECTOR_BYTES;
    let from = begins.saturating_sub(checksums_at).div_ceil(4);
    let to = ((begins + SECTOR_BYTES).min(image.len()).saturating_sub(checksums_at) / 4).min(count);
    (from..to).any(|ordinal| {
        let stored = image.get(checksums_at + 4 * ordinal..).and_then(<[u8]>::first_chunk::<4>);
        let chunk = image.get(chunk_of(checksums_at, ordinal));
        stored.zip(chunk).is_some_and(|(stored, chunk)| {
            u32::from_le_bytes(*stored) == sector_checksum(seed, ordinal, chunk)
        })
    })
}

/// A batch in the memory of its image.
#[derive(Clone, Copy)]
pub struct BatchView<'a> {
    info: BatchInfo,
    header: Header,
    checksums: &'a [u8],
    payload: &'a [u8],
    entries: &'a [ArchivedEntry],
    sessions: &'a [ArchivedSession],
}

impl<'a> BatchView<'a> {
    /// Access to an image that this process has verified or sealed already: lengths and the archive's structure are
    /// checked, so nothing panics whatever the bytes are; checksums and entries are not.
    ///
    /// # Errors
    /// The first rule that the bytes break.
    pub fn trusted(image: &'a [u8]) -> Result<Self, ImageError> {
        let (header, _) = image.split_first_chunk::<IMAGE_HEADER_BYTES>().ok_or(ImageError::Length)?;
        let checksums_at = image.len() - (4 * checksum_count(image.len())).min(image.len());
        Self::access(image, &Header::decode(header), checksums_at)
    }

    fn access(image: &'a [u8], header: &Header, checksums_at: usize) -> Result<Self, ImageError> {
        let header = *header;
        if header.magic != MAGIC {
            return Err(ImageError::Magic);
        }
        if header.version != FORMAT_VERSION {
            return Err(ImageError::Version(header.version));
        }
        if header.features & !FEATURES_KNOWN != 0 {
            return Err(ImageError::Features(header.features & !FEATURES_KNOWN));
        }
        let kind = BatchKind::from_byte(header.kind).ok_or(ImageError::Kind(header.kind))?;
        if header.reserved_a != 0 || header.reserved_b != [0; 52] {
            return Err(ImageError::Range("reserved part"));
        }
        if header.image_bytes as usize != image.len() {
            return Err(ImageError::Length);
        }
        let count = header.count as usize;
        if !(1..=COUNT_MAX).contains(&count) {
            return Err(ImageError::Range("count"));
        }
        if header.first.get() == 0 || header.first.get().checked_add(u64::from(header.count)).is_none() {
            return Err(ImageError::Range("index"));
        }
        let payload_bytes = header.payload_bytes as usize;
        if payload_bytes > PAYLOAD_BYTES_MAX {
            return Err(ImageError::Range("payload length"));
        }
        if kind == BatchKind::Empty && (count != 1 || payload_bytes != 0) {
            return Err(ImageError::Range("content of an empty batch"));
        }
        let table_bytes = header.table_bytes as usize;
        let payload_end = IMAGE_HEADER_BYTES + payload_bytes;
        let table_at = payload_end.next_multiple_of(8);
        if table_bytes > table_bytes_for(COUNT_MAX, COUNT_MAX) || table_at + table_bytes != checksums_at {
            return Err(ImageError::Range("table length"));
        }
        let payload = image.get(IMAGE_HEADER_BYTES..payload_end).ok_or(ImageError::Length)?;
        let table = image.get(table_at..checksums_at).ok_or(ImageError::Length)?;
        let checksums = image.get(checksums_at..).ok_or(ImageError::Length)?;
        if !(table.as_ptr() as usize).is_multiple_of(align_of::<ArchivedSession>()) {
            return Err(ImageError::Misaligned);
        }
        let table = low::access::<ArchivedTable, Failure>(table).map_err(|_| ImageError::Table)?;
        if table.entries.len() != count
            || table.sessions.len() > count
            || table_bytes != table_bytes_for(count, table.sessions.len())
        {
            return Err(ImageError::Table);
        }
        Ok(Self {
            info: info_of(&header, kind),
            header,
            checksums,
            payload,
            entries: table.entries.as_slice(),
            sessions: table.sessions.as_slice(),
        })
    }

    /// Commands lie one behind the other and fill the payload; session slots count up.
    fn validate_entries(&self) -> Result<(), ImageError> {
        let mut payload_at = 0u32;
        let mut sessions = 0;
        for (ordinal, entry) in self.entries.iter().enumerate() {
            let invalid = ImageError::Entry(ordinal as u32);
            let expected_slot = match entry.flags.to_native() {
                0 => 0,
                FLAG_SESSION => {
                    sessions += 1;
                    sessions - 1
                }
                _ => return Err(invalid),
            };
            if usize::from(entry.session_slot.to_native()) != expected_slot
                || entry.offset.to_native() != payload_at
            {
                return Err(invalid);
            }
            payload_at = payload_at.checked_add(entry.length.to_native()).ok_or(invalid)?;
        }
        if payload_at as usize != self.payload.len() || sessions != self.sessions.len() {
            return Err(ImageError::Table);
        }
        Ok(())
    }

    /// What the log knows of it.
    #[must_use]
    pub fn info(&self) -> BatchInfo {
        self.info
    }

    /// Whether the batch follows a log whose chain is `previous`.
    #[must_use]
    pub fn verify_chain(&self, previous: Chain) -> bool {
        chain_of(previous, &self.header, self.checksums) == self.header.chain
    }

    /// The number of commands.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Never: a batch has at least one entry. (An empty batch has one without bytes.)
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many of the commands carry a session reference.
    #[must_use]
    pub fn session_count(&self) -> usize {
        self.sessions.len()
    }

    /// The command at `ordinal` from 0.
    #[must_use]
    pub fn command(&self, ordinal: usize) -> Option<Command<'a>> {
        let entry = self.entries.get(ordinal)?;
        let at = entry.offset.to_native() as usize;
        let bytes = self.payload.get(at..at.checked_add(entry.length.to_native() as usize)?)?;
        let session = if entry.flags.to_native() & FLAG_SESSION != 0 {
            let stored = self.sessions.get(usize::from(entry.session_slot.to_native()))?;
            let (session, sequence) = (stored.session.to_native(), stored.sequence.to_native());
            Some(SessionRef { session, sequence })
        } else {
            None
        };
        let index = LogIndex(self.info.first.get() + ordinal as u64);
        Some(Command { index, time_ms: self.info.time_ms, session, bytes })
    }

    /// The commands in order.
    #[must_use]
    pub fn commands(&self) -> Commands<'a> {
        Commands { view: *self, ordinal: 0 }
    }
}

impl<'a> IntoIterator for BatchView<'a> {
    type Item = Command<'a>;
    type IntoIter = Commands<'a>;

    fn into_iter(self) -> Commands<'a> {
        self.commands()
    }
}

/// The commands of a batch in order.
#[derive(Clone)]
pub struct Commands<'a> {
    view: BatchView<'a>,
    ordinal: usize,
}

impl<'a> Iterator for Commands<'a> {
    type Item = Command<'a>;

    fn next(&mut self) -> Option<Command<'a>> {
        let command = self.view.command(self.ordinal)?;
        self.ordinal += 1;
        Some(command)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.view.len() - self.ordinal;
        (0, Some(left))
    }
}

/// One command of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command<'a> {
    /// Its position in the log.
    pub index: LogIndex,
    /// The leader's clock when the batch was sealed.
    pub time_ms: u64,
    /// The session that proposed it.
    pub session: Option<SessionRef>,
    /// Its bytes.
    pub bytes: &'a [u8],
}

fn info_of(header: &Header, kind: BatchKind) -> BatchInfo {
    BatchInfo {
        group: header.group,
        term: header.term,
        first: header.first,
        last: LogIndex(header.first.get() + u64::from(header.count) - 1),
        kind,
        time_ms: header.time_ms,
        image_bytes: header.image_bytes,
        payload_bytes: header.payload_bytes,
        chain: header.chain,
    }
}

/// What binds every checksum of an image to its batch.
fn seed_of(header: &Header) -> u32 {
    seed_for(header.group, header.term, header.first)
}

pub(super) fn seed_for(group: GroupId, term: Term, first: LogIndex) -> u32 {
    let mut identity = [0; 20];
    identity[..4].copy_from_slice(&group.get().to_le_bytes());
    identity[4..12].copy_from_slice(&term.get().to_le_bytes());
    identity[12..].copy_from_slice(&first.get().to_le_bytes());
    crc32c(&identity)
}

/// The bytes of the image that checksum `ordinal` covers.
fn chunk_of(checksums_at: usize, ordinal: usize) -> Range<usize> {
    let start = ordinal.saturating_mul(SECTOR_BYTES).clamp(IMAGE_HEADER_BYTES, checksums_at);
    let end = ordinal.saturating_add(1).saturating_mul(SECTOR_BYTES).clamp(start, checksums_at);
    start..end
}

/// What the checksum of a sector begins with, before its bytes.
pub(super) fn prefix_checksum(seed: u32, ordinal: usize) -> u32 {
    crc32c_append(seed, &(ordinal as u32).to_le_bytes())
}

/// The number of an image's sectors that hold nothing but what their checksum covers, the first and its header included, and
/// the checksum table.
pub(super) fn stored_checksums(image: &[u8]) -> (usize, &[[u8; 4]]) {
    let checksums_at = image.len().saturating_sub(4 * checksum_count(image.len()));
    (checksums_at / SECTOR_BYTES, image[checksums_at..].as_chunks().0)
}

fn sector_checksum(seed: u32, ordinal: usize, chunk: &[u8]) -> u32 {
    stored(crc32c_numbered(seed, ordinal as u32, chunk))
}

/// Hands the checksums of all sectors of an image to `each`, in order. `content` is what lies before the checksum table.
fn sector_checksums(seed: u32, content: &[u8], mut each: impl FnMut(u32, u32)) {
    let (header_sector, others) = content.split_at(content.len().min(SECTOR_BYTES));
    let first = header_sector.get(IMAGE_HEADER_BYTES..).unwrap_or_default();
    each(0, sector_checksum(seed, 0, first));
    crc32c_sectors(seed, 1, others, |ordinal, crc| each(ordinal, stored(crc)));
}

/// No stored checksum is zero, so that a blank sector of the checksum table can be told.
const fn stored(crc: u32) -> u32 {
    if crc == 0 { !0 } else { crc }
}

fn header_checksum(seed: u32, header: &[u8; IMAGE_HEADER_BYTES], checksums: &[u8]) -> u32 {
    let seed = crc32c_append(seed, &HEADER_ORDINAL.to_le_bytes());
    crc32c_append(crc_without(seed, header, CRC_FIELD), checksums)
}

fn chain_of(previous: Chain, header: &Header, checksums: &[u8]) -> Chain {
    let mut bytes = header.encode();
    bytes[CRC_FIELD].fill(0);
    bytes[CHAIN_FIELD].fill(0);
    let mut hash = Xxh3::new();
    hash.update(&previous.0);
    hash.update(&bytes);
    hash.update(checksums);
    Chain(hash.digest128().to_le_bytes())
}

/// Makes all checksums of an altered image fit again, so that tests reach the rules behind them.
#[cfg(test)]
pub(crate) fn reseal(image: &mut [u8]) {
    let checksums_at = image.len() - 4 * checksum_count(image.len());
    let (content, checksums) = image.split_at_mut(checksums_at);
    let header = content.first_chunk::<IMAGE_HEADER_BYTES>().copied().unwrap();
    let seed = seed_of(&Header::decode(&header));
    for (ordinal, checksum) in checksums.chunks_exact_mut(4).enumerate() {
        let chunk = chunk_of(checksums_at, ordinal);
        checksum.copy_from_slice(&sector_checksum(seed, ordinal, &content[chunk]).to_le_bytes());
    }
    let crc = header_checksum(seed, &header, checksums);
    content[CRC_FIELD].copy_from_slice(&crc.to_le_bytes());
}
