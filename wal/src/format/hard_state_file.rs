//! The hard state: what must survive besides the log. Two files hold the same bytes; `hard_state.rs` knows the order
//! in which they are written.

use super::fields::{Field, FieldAt, layout};
use super::{Chain, FINGERPRINT, FORMAT_VERSION, crc_without, field_range};
use ringraft_block::{ClusterId, GroupId, Incarnation, LogIndex, NodeId, Term, round_up_to_block};

/// The engine's encoding of a configuration may be so long. Nine members with long host names take under 2 KiB.
pub const CONFIGURATION_BYTES_MAX: usize = 16 * 1024;

/// So many versions after this one, and so many bytes, are taken for a newer build's without a checksum to prove it.
const NEWER_VERSIONS: u16 = 255;
const NEWER_BYTES_MAX: usize = 1 << 20;

/// Size of a hard state file: one record with the longest configuration, in whole blocks.
pub const HARD_STATE_FILE_BYTES: usize =
    round_up_to_block(FileHeader::BYTES + GroupRecord::BYTES + CONFIGURATION_BYTES_MAX);

/// `RRhs` in the file.
const MAGIC: u32 = u32::from_le_bytes(*b"RRhs");

layout! {
    FileHeader: 128 {
        magic: u32,
        version: u16,
        reserved_a: u16,
        fingerprint: u64,
        cluster: ClusterId,
        node: NodeId,
        incarnation: Incarnation,
        boot: u64,
        sequence: u64,
        group_count: u32,
        total_bytes: u32,
        crc: u32,
        start_generation: u32,
        reserved_b: [u8; 40],
    }
}

layout! {
    GroupRecord: 128 {
        group: GroupId,
        configuration_bytes: u32,
        term: Term,
        vote: NodeId,
        epoch: u64,
        cut_index: LogIndex,
        cut_offset: u64,
        cut_generation: u32,
        generation: u32,
        start_index: LogIndex,
        start_term: Term,
        start_chain: Chain,
        witness: LogIndex,
        reserved: [u8; 32],
    }
}

// What the group record's reserved part holds. Declared apart, so that a record without a claim is byte for byte what builds
// without claims wrote, and the fingerprint is theirs.
layout! {
    ClaimRecord: 32 {
        cut_and_kind: u64,
        epoch: u64,
        term: Term,
        last: LogIndex,
    }
}

const _: () = {
    let (record, claim) = (GroupRecord::FIELDS, ClaimRecord::FIELDS);
    let last = claim[claim.len() - 1];
    assert!(last.at + last.bytes == record[record.len() - 1].bytes, "the claim fills the reserved part");
};

// The two lowest bits beside the index of the cut.
const CLAIM_CERTAIN: u64 = 1;
const CLAIM_UNCERTAIN: u64 = 2;
/// Not certain, and a start that can read more may settle it.
const CLAIM_UNSETTLED: u64 = 3;

const CRC_FIELD: std::ops::Range<usize> = field_range(FileHeader::FIELDS, "crc");
const RECORD_AT: usize = FileHeader::BYTES;
const CONFIGURATION_AT: usize = RECORD_AT + GroupRecord::BYTES;

/// A position in the log from which everything older in epoch is void.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// The last index that is kept; the end of a batch, or the log's start.
    pub index: LogIndex,
    /// The segment that holds the end of the kept log; 0 when none does.
    pub generation: u32,
    /// The first offset in that segment that is void.
    pub offset: u64,
}

/// The position before the first batch of the log: the last that a snapshot covers, or zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogStart {
    /// Its index; the log begins with the next.
    pub index: LogIndex,
    /// Its term.
    pub term: Term,
    /// The chain there: the genesis of the formed cluster when the index is 0.
    pub chain: Chain,
}

/// What the log held before damage of unknown identity cut it short. The batches that are missing may have been
/// acknowledged, so a node under a claim votes and campaigns as if it still had them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Certain: the term of the last batch. Otherwise: the highest term that this node knew.
    pub term: Term,
    /// Certain: the last index. Otherwise: the highest index that anything proves.
    pub last: LogIndex,
    /// Whether the end of the log that was there is known.
    pub certain: bool,
}

/// The durable state of a node besides its log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HardState {
    /// The cluster that the directory belongs to.
    pub cluster: ClusterId,
    /// The node that the directory belongs to.
    pub node: NodeId,
    /// This life of the directory, drawn when it was formatted.
    pub incarnation: Incarnation,
    /// How often the node has started.
    pub boot: u64,
    /// Counts the writes of the hard state; of two valid copies the higher one counts.
    pub sequence: u64,
    /// The log that the following belongs to.
    pub group: GroupId,
    /// The current term.
    pub term: Term,
    /// Whom this node voted for in that term.
    pub vote: Option<NodeId>,
    /// How often the log was cut, by a start or by a truncation.
    pub epoch: u64,
    /// The newest cut.
    pub cut: Cut,
    /// The generation of the newest segment when the cut was recorded; later ones have higher generations.
    pub generation: u32,
    /// Where the log begins.
    pub start: LogStart,
    /// The segment that holds the last batch before the start, when the start was moved there by a purge; 0 otherwise. Segments of
    /// lower generations are not needed any more, and may be gone.
    pub start_generation: u32,
    /// The log was durable through here when this was written; may lag.
    pub witness: LogIndex,
    /// What the log held before damage cut it short; in force until it is released.
    pub claim: Option<Claim>,
    /// The epoch that the first cut under the claim opened: what older segments hold behind their log is kept. 0 without a
    /// claim.
    pub claim_epoch: u64,
    /// The last index that was left when the claim was made; what was cut off behind it is not void.
    pub claim_cut: LogIndex,
    /// The claim is not certain, but all that was wrong with the log was one block that could not be read, at the slot behind `claim_cut`.
    /// So a start that finds a batch there, and can read all of the log of the epochs before `claim_epoch`, knows where it ended.
    pub claim_may_settle: bool,
    /// The formed base configuration in the engine's encoding; empty when the cluster is not formed.
    pub configuration: Vec<u8>,
}

/// Why a copy of the hard state is not usable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HardStateError {
    /// The bytes end too early.
    #[error("the hard state ends too early")]
    TooShort,
    /// Something else was written here, or nothing.
    #[error("no hard state magic")]
    Magic,
    /// The bytes were altered, or the write was torn.
    #[error("the hard state's checksum does not fit")]
    Checksum,
    /// Written by another version of the format.
    #[error(
        "hard state of format version {0}; this build reads version {FORMAT_VERSION}: use the build that wrote it"
    )]
    Version(u16),
    /// Written by a build whose layouts differ.
    #[error(
        "hard state with layout fingerprint {0:016x}; this build has {FINGERPRINT:016x}: use the build that wrote it"
    )]
    Fingerprint(u64),
    /// A value that no writer of this version produces.
    #[error("the hard state's {0} is out of range")]
    Range(&'static str),
}

impl HardStateError {
    /// The copy is intact, but not for this build: it must not be repaired from the other one.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        matches!(self, Self::Version(_) | Self::Fingerprint(_))
    }
}

/// Writes `state` to the start of `block` and returns how many bytes of it, whole blocks, are to be written to
/// the file. The rest of those is zeroed.
///
/// # Panics
/// When the configuration exceeds [`CONFIGURATION_BYTES_MAX`] or `block` is shorter than
/// [`HARD_STATE_FILE_BYTES`].
pub fn write_hard_state(block: &mut [u8], state: &HardState) -> usize {
    assert!(state.configuration.len() <= CONFIGURATION_BYTES_MAX, "the configuration is too long");
    assert!(block.len() >= HARD_STATE_FILE_BYTES, "the block is too short");
    let total = CONFIGURATION_AT + state.configuration.len();
    let written = round_up_to_block(total);
    block[..written].fill(0);
    let header = FileHeader {
        magic: MAGIC,
        version: FORMAT_VERSION,
        reserved_a: 0,
        fingerprint: FINGERPRINT,
        cluster: state.cluster,
        node: state.node,
        incarnation: state.incarnation,
        boot: state.boot,
        sequence: state.sequence,
        group_count: 1,
        total_bytes: total as u32,
        crc: 0,
        start_generation: state.start_generation,
        reserved_b: [0; 40],
    };
    let record = GroupRecord {
        group: state.group,
        configuration_bytes: state.configuration.len() as u32,
        term: state.term,
        vote: state.vote.unwrap_or_default(),
        epoch: state.epoch,
        cut_index: state.cut.index,
        cut_offset: state.cut.offset,
        cut_generation: state.cut.generation,
        generation: state.generation,
        start_index: state.start.index,
        start_term: state.start.term,
        start_chain: state.start.chain,
        witness: state.witness,
        reserved: write_claim(state),
    };
    block[..RECORD_AT].copy_from_slice(&header.encode());
    block[RECORD_AT..CONFIGURATION_AT].copy_from_slice(&record.encode());
    block[CONFIGURATION_AT..total].copy_from_slice(&state.configuration);
    let crc = ringraft_block::crc32c(&block[..total]);
    block[CRC_FIELD].copy_from_slice(&crc.to_le_bytes());
    written
}

/// Reads one copy of the hard state.
///
/// # Errors
/// The first rule that the bytes break.
pub fn read_hard_state(bytes: &[u8]) -> Result<HardState, HardStateError> {
    let header = bytes.first_chunk::<{ FileHeader::BYTES }>().ok_or(HardStateError::TooShort)?;
    let header = FileHeader::decode(header);
    if header.magic != MAGIC {
        return Err(HardStateError::Magic);
    }
    let total = header.total_bytes as usize;
    if !(CONFIGURATION_AT..=HARD_STATE_FILE_BYTES).contains(&total) {
        // A newer one may be longer than what this build reads of it, so its checksum cannot be verified. Garbage behind the magic
        // hardly ever looks like one, since versions are counted.
        let newer = (1..=NEWER_VERSIONS).contains(&header.version.saturating_sub(FORMAT_VERSION))
            && (HARD_STATE_FILE_BYTES + 1..=NEWER_BYTES_MAX).contains(&total);
        return Err(match newer {
            true => HardStateError::Version(header.version),
            false => HardStateError::Range("length"),
        });
    }
    let bytes = bytes.get(..total).ok_or(HardStateError::TooShort)?;
    if crc_without(0, bytes, CRC_FIELD) != header.crc {
        return Err(HardStateError::Checksum);
    }
    if header.version != FORMAT_VERSION {
        return Err(HardStateError::Version(header.version));
    }
    if header.fingerprint != FINGERPRINT {
        return Err(HardStateError::Fingerprint(header.fingerprint));
    }
    if header.group_count != 1 {
        return Err(HardStateError::Range("group count"));
    }
    if header.reserved_a != 0 || header.reserved_b != [0; 40] {
        return Err(HardStateError::Range("reserved part"));
    }
    let (record, configuration) = bytes
        .get(RECORD_AT..)
        .and_then(<[u8]>::split_first_chunk::<{ GroupRecord::BYTES }>)
        .ok_or(HardStateError::TooShort)?;
    let record = GroupRecord::decode(record);
    if record.configuration_bytes as usize != configuration.len()
        || configuration.len() > CONFIGURATION_BYTES_MAX
    {
        return Err(HardStateError::Range("configuration length"));
    }
    let ReadClaim { claim, claim_epoch, claim_cut, claim_may_settle } = read_claim(&record)?;
    if record.cut_generation > record.generation {
        return Err(HardStateError::Range("generation"));
    }
    Ok(HardState {
        cluster: header.cluster,
        node: header.node,
        incarnation: header.incarnation,
        boot: header.boot,
        sequence: header.sequence,
        group: record.group,
        term: record.term,
        vote: (record.vote.get() != 0).then_some(record.vote),
        epoch: record.epoch,
        cut: Cut { index: record.cut_index, generation: record.cut_generation, offset: record.cut_offset },
        generation: record.generation,
        start: LogStart { index: record.start_index, term: record.start_term, chain: record.start_chain },
        start_generation: header.start_generation,
        witness: record.witness,
        claim,
        claim_epoch,
        claim_cut,
        claim_may_settle,
        configuration: configuration.to_vec(),
    })
}

fn write_claim(state: &HardState) -> [u8; ClaimRecord::BYTES] {
    let Some(claim) = state.claim else { return [0; ClaimRecord::BYTES] };
    let kind = match (claim.certain, state.claim_may_settle) {
        (true, _) => CLAIM_CERTAIN,
        (false, false) => CLAIM_UNCERTAIN,
        (false, true) => CLAIM_UNSETTLED,
    };
    let cut_and_kind = state.claim_cut.get() << 2 | kind;
    ClaimRecord { cut_and_kind, epoch: state.claim_epoch, term: claim.term, last: claim.last }.encode()
}

/// What the record says of the claim.
#[derive(Default)]
struct ReadClaim {
    claim: Option<Claim>,
    claim_epoch: u64,
    claim_cut: LogIndex,
    claim_may_settle: bool,
}

fn read_claim(record: &GroupRecord) -> Result<ReadClaim, HardStateError> {
    if record.reserved == [0; ClaimRecord::BYTES] {
        return Ok(ReadClaim::default());
    }
    let ClaimRecord { cut_and_kind, epoch, term, last } = ClaimRecord::decode(&record.reserved);
    let kind = cut_and_kind & 3;
    if kind == 0 || epoch == 0 || epoch > record.epoch {
        return Err(HardStateError::Range("claim"));
    }
    Ok(ReadClaim {
        claim: Some(Claim { term, last, certain: kind == CLAIM_CERTAIN }),
        claim_epoch: epoch,
        claim_cut: LogIndex(cut_and_kind >> 2),
        claim_may_settle: kind == CLAIM_UNSETTLED,
    })
}
