//! Snapshot files: what is in one, and how damage to it is told.
//!
//! ```text
//! block 0            header: cluster, last entry covered, its chain, time, lengths of what follows
//! from 4 KiB on      slots of 64 KiB, the last one shorter, in whole blocks of 4 KiB; each has a head of 32 bytes
//! behind the last    trailer: number of slots, bytes, digest of all
//! ```
//!
//! The slots hold one stream: the encoded configuration, the encoded client sessions, the state machine's bytes. Every slot
//! has a checksum seeded by the header and its ordinal, so that a slot of another snapshot, or of another place, is
//! damage. The digest tells two snapshots of one entry apart whose state machines wrote the same state differently: a
//! transfer goes on with another leader only when all bytes are the same.
//!
//! A file is made under a temporary name, flushed, read back and verified, renamed, and its name made durable: whatever has
//! the final name was whole once. This file knows the bytes; `files` knows the order of operations.

pub(crate) mod files;
pub(crate) mod requests;

use crate::raft::LogId;
use ringraft_block::{BLOCK_BYTES, ClusterId, LogIndex, Term, crc32c_append, round_up_to_block};
use ringraft_wal::format::Chain;
use std::ops::Range;
use xxhash_rust::xxh3::Xxh3;

/// `RRsn`, `RRsl` and `RRst` in the file.
const MAGIC_HEADER: u32 = u32::from_le_bytes(*b"RRsn");
const MAGIC_SLOT: u32 = u32::from_le_bytes(*b"RRsl");
const MAGIC_TRAILER: u32 = u32::from_le_bytes(*b"RRst");
const VERSION: u32 = 2;

/// What a slot takes in the file, but for the last one.
pub(crate) const SLOT_BYTES: usize = 64 << 10;
const SLOT_HEAD_BYTES: usize = 32;
/// Bytes of the stream in a full slot.
pub(crate) const SLOT_PAYLOAD_BYTES: usize = SLOT_BYTES - SLOT_HEAD_BYTES;
/// Read at once: a slot, and the trailer if it was the last one.
pub(crate) const SLOT_READ_BYTES: usize = SLOT_BYTES + BLOCK_BYTES;
/// Configuration and sessions are kept in memory while a snapshot is read: a bound on what a damaged header can ask for.
const PREFIX_BYTES_MAX: u64 = 256 << 20;

/// Fields of the header by offset and width: the one place that knows them. `crc` covers all before it. Magic, version, cluster,
/// last index and `crc` stay where they are in all versions, so that each build knows what it does not understand.
const HEADER: [(&str, Range<usize>); 14] = [
    ("magic", 0..4),
    ("version", 4..8),
    ("cluster", 8..24),
    ("last_index", 24..32),
    ("last_term", 32..40),
    ("chain", 40..56),
    ("time_ms", 56..64),
    ("configuration_bytes", 64..72),
    ("sessions_bytes", 72..80),
    ("slot_bytes", 80..84),
    ("group", 84..88),
    ("configuration_index", 88..96),
    ("reserved", 96..124),
    ("crc", 124..128),
];
const HEADER_BYTES: usize = 128;

/// Fields of a slot's head. `crc` covers the head before it and the payload, seeded by the header's.
const SLOT: [(&str, Range<usize>); 6] = [
    ("magic", 0..4),
    ("ordinal", 4..12),
    ("payload_bytes", 12..16),
    ("is_last", 16..20),
    ("reserved", 20..28),
    ("crc", 28..32),
];

/// Fields of the trailer. `crc` covers all before it, seeded by the header's.
const TRAILER: [(&str, Range<usize>); 6] = [
    ("magic", 0..4),
    ("reserved", 4..8),
    ("slots", 8..16),
    ("stream_bytes", 16..24),
    ("digest", 24..40),
    ("crc", 40..44),
];

/// What a snapshot is of.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct SnapshotMeta {
    /// The last entry that it covers.
    pub last: LogId,
    /// The chain of the log there.
    pub chain: Chain,
    /// The log's time there, in milliseconds since 1970.
    pub time_ms: u64,
    /// The members as of that entry, encoded; during a transition, both sets.
    pub configuration: Vec<u8>,
    /// Where that stands in the log, there or before; 0 if the cluster was formed with it.
    pub configuration_index: LogIndex,
    /// The client sessions as of that entry, encoded. Empty: there are none.
    pub sessions: Vec<u8>,
}

/// A snapshot file, all of which has been verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotFile {
    /// What it is of.
    pub meta: SnapshotMeta,
    /// Bytes that the state machine wrote.
    pub state_bytes: u64,
    /// From the header to the end of the trailer. The file may be longer.
    pub file_bytes: u64,
    /// Over all of it.
    pub digest: [u8; 16],
}

impl SnapshotFile {
    /// To be kept: the sessions, which may be many megabytes, are read again when they are wanted.
    pub(crate) fn without_sessions(mut self) -> Self {
        self.meta.sessions = Vec::new();
        self
    }
}

/// Why a snapshot file cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotDamage {
    /// The header is not one, or is damaged.
    #[error("its header is damaged")]
    Header,
    /// Another version of this engine wrote it. It is intact as far as its header goes.
    #[error("it has version {version}, and this build reads version {VERSION}: use the build that wrote it")]
    Version {
        /// The version.
        version: u32,
        /// The last entry that it covers.
        last: LogIndex,
    },
    /// Another cluster's.
    #[error("it belongs to another cluster")]
    Foreign,
    /// A slot is damaged, or missing.
    #[error("slot {ordinal} is damaged")]
    Slot {
        /// Which, from 0.
        ordinal: u64,
    },
    /// The trailer is damaged, or contradicts the slots.
    #[error("its trailer is damaged")]
    Trailer,
    /// What precedes the state makes no sense: no members, or members of a later entry.
    #[error("it names no members that were in force at its last entry")]
    Configuration,
}

/// The name of the snapshot that ends at `last`.
pub(crate) fn name_of(last: LogIndex) -> String {
    format!("snapshot-{:016x}.snap", last.get())
}

/// The index that a file of this name would end at.
#[must_use]
pub fn parse_name(name: &str) -> Option<LogIndex> {
    let index = name.strip_prefix("snapshot-")?.strip_suffix(".snap")?;
    let last = LogIndex(u64::from_str_radix(index, 16).ok()?);
    (name_of(last) == name).then_some(last)
}

/// The name of what has arrived of the snapshot that ends at `last` and has that digest.
pub(crate) fn partial_name_of(last: LogIndex, digest: [u8; 16]) -> String {
    format!("snapshot-{:016x}-{:032x}.part", last.get(), u128::from_be_bytes(digest))
}

/// What a file of this name would be a part of.
pub(crate) fn parse_partial_name(name: &str) -> Option<(LogIndex, [u8; 16])> {
    let (last, digest) = name.strip_prefix("snapshot-")?.strip_suffix(".part")?.split_once('-')?;
    let last = LogIndex(u64::from_str_radix(last, 16).ok()?);
    let digest = u128::from_str_radix(digest, 16).ok()?.to_be_bytes();
    (partial_name_of(last, digest) == name).then_some((last, digest))
}

/// An upper bound of the file for a stream of so many bytes.
pub(crate) fn file_bytes_max(stream_bytes: u64) -> u64 {
    let slots = stream_bytes.div_ceil(SLOT_PAYLOAD_BYTES as u64).max(1);
    slots.saturating_mul(SLOT_BYTES as u64).saturating_add(3 * BLOCK_BYTES as u64)
}

fn put(fields: &[(&str, Range<usize>)], name: &str, out: &mut [u8], value: &[u8]) {
    if let Some((_, range)) = fields.iter().find(|(field, _)| *field == name) {
        out[range.clone()].copy_from_slice(value);
    }
}

fn get<const N: usize>(fields: &[(&str, Range<usize>)], name: &str, bytes: &[u8]) -> [u8; N] {
    let range = fields.iter().find(|(field, _)| *field == name).map(|(_, range)| range.clone());
    let value = range.and_then(|range| bytes.get(range)?.try_into().ok());
    value.unwrap_or([0; N])
}

/// Writes a snapshot: the header, then slot by slot, then the trailer.
pub(crate) struct Encoder {
    seed: u32,
    ordinal: u64,
    stream_bytes: u64,
    digest: Box<Xxh3>,
}

impl Encoder {
    /// Writes the header into a block.
    pub(crate) fn new(cluster: ClusterId, meta: &SnapshotMeta, block: &mut [u8]) -> Self {
        block[..BLOCK_BYTES].fill(0);
        let head = &mut block[..HEADER_BYTES];
        put(&HEADER, "magic", head, &MAGIC_HEADER.to_le_bytes());
        put(&HEADER, "version", head, &VERSION.to_le_bytes());
        put(&HEADER, "cluster", head, &cluster.0.to_le_bytes());
        put(&HEADER, "last_index", head, &meta.last.index.get().to_le_bytes());
        put(&HEADER, "last_term", head, &meta.last.term.get().to_le_bytes());
        put(&HEADER, "chain", head, &meta.chain.0);
        put(&HEADER, "time_ms", head, &meta.time_ms.to_le_bytes());
        put(&HEADER, "configuration_bytes", head, &(meta.configuration.len() as u64).to_le_bytes());
        put(&HEADER, "sessions_bytes", head, &(meta.sessions.len() as u64).to_le_bytes());
        put(&HEADER, "slot_bytes", head, &(SLOT_BYTES as u32).to_le_bytes());
        put(&HEADER, "configuration_index", head, &meta.configuration_index.get().to_le_bytes());
        let seed = crc32c_append(0, &head[..HEADER_BYTES - 4]);
        put(&HEADER, "crc", head, &seed.to_le_bytes());
        let mut digest = Box::new(Xxh3::new());
        digest.update(head);
        Self { seed, ordinal: 0, stream_bytes: 0, digest }
    }

    /// Where the stream's bytes go in a slot.
    pub(crate) fn payload(slot: &mut [u8]) -> &mut [u8] {
        &mut slot[SLOT_HEAD_BYTES..SLOT_BYTES]
    }

    /// Over all that has been written, as the trailer will have it.
    pub(crate) fn digest(&self) -> [u8; 16] {
        self.digest.digest128().to_le_bytes()
    }

    /// Completes a slot that holds so many bytes of the stream; all but the last are full. Returns what it takes in the file.
    pub(crate) fn seal(&mut self, slot: &mut [u8], payload_bytes: usize, is_last: bool) -> usize {
        let end = SLOT_HEAD_BYTES + payload_bytes;
        let bytes = if is_last { round_up_to_block(end) } else { SLOT_BYTES };
        slot[end..bytes].fill(0);
        let (head, payload) = slot[..end].split_at_mut(SLOT_HEAD_BYTES);
        head.fill(0);
        put(&SLOT, "magic", head, &MAGIC_SLOT.to_le_bytes());
        put(&SLOT, "ordinal", head, &self.ordinal.to_le_bytes());
        put(&SLOT, "payload_bytes", head, &(payload_bytes as u32).to_le_bytes());
        put(&SLOT, "is_last", head, &u32::from(is_last).to_le_bytes());
        let crc = crc32c_append(crc32c_append(self.seed, &head[..SLOT_HEAD_BYTES - 4]), payload);
        put(&SLOT, "crc", head, &crc.to_le_bytes());
        self.digest.update(payload);
        self.ordinal += 1;
        self.stream_bytes += payload_bytes as u64;
        bytes
    }

    /// Writes the trailer into a block.
    pub(crate) fn trailer(&self, block: &mut [u8]) {
        block[..BLOCK_BYTES].fill(0);
        put(&TRAILER, "magic", block, &MAGIC_TRAILER.to_le_bytes());
        put(&TRAILER, "slots", block, &self.ordinal.to_le_bytes());
        put(&TRAILER, "stream_bytes", block, &self.stream_bytes.to_le_bytes());
        put(&TRAILER, "digest", block, &self.digest());
        let crc = crc32c_append(self.seed, &block[..40]);
        put(&TRAILER, "crc", block, &crc.to_le_bytes());
    }
}

/// Reads a snapshot in the order of its bytes.
pub(crate) struct Decoder {
    seed: u32,
    meta: SnapshotMeta,
    configuration_bytes: usize,
    sessions_bytes: usize,
    ordinal: u64,
    stream_bytes: u64,
    file_bytes: u64,
    digest: Box<Xxh3>,
}

/// What a slot brought.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// The bytes of it that are the state machine's.
    pub(crate) state: Range<usize>,
    /// It was the last one, and the trailer behind it is right.
    pub(crate) end: Option<SnapshotFile>,
}

impl Decoder {
    /// Reads the header.
    pub(crate) fn new(cluster: ClusterId, block: &[u8]) -> Result<Self, SnapshotDamage> {
        let head = block.get(..HEADER_BYTES).ok_or(SnapshotDamage::Header)?;
        let number = |name| u64::from_le_bytes(get(&HEADER, name, head));
        let seed = crc32c_append(0, &head[..HEADER_BYTES - 4]);
        if u32::from_le_bytes(get(&HEADER, "magic", head)) != MAGIC_HEADER
            || u32::from_le_bytes(get(&HEADER, "crc", head)) != seed
        {
            return Err(SnapshotDamage::Header);
        }
        if u128::from_le_bytes(get(&HEADER, "cluster", head)) != cluster.0 {
            return Err(SnapshotDamage::Foreign);
        }
        let version = u32::from_le_bytes(get(&HEADER, "version", head));
        if version != VERSION {
            return Err(SnapshotDamage::Version { version, last: LogIndex(number("last_index")) });
        }
        if u32::from_le_bytes(get(&HEADER, "slot_bytes", head)) as usize != SLOT_BYTES {
            return Err(SnapshotDamage::Header);
        }
        let (configuration, sessions) = (number("configuration_bytes"), number("sessions_bytes"));
        if configuration.checked_add(sessions).is_none_or(|bytes| bytes > PREFIX_BYTES_MAX) {
            return Err(SnapshotDamage::Header);
        }
        let (last_index, configuration_index) = (number("last_index"), number("configuration_index"));
        if configuration == 0 || configuration_index > last_index {
            return Err(SnapshotDamage::Configuration);
        }
        let mut digest = Box::new(Xxh3::new());
        digest.update(head);
        Ok(Self {
            seed,
            meta: SnapshotMeta {
                last: LogId { term: Term(number("last_term")), index: LogIndex(last_index) },
                chain: Chain(get(&HEADER, "chain", head)),
                time_ms: number("time_ms"),
                configuration: Vec::new(),
                configuration_index: LogIndex(configuration_index),
                sessions: Vec::new(),
            },
            configuration_bytes: configuration as usize,
            sessions_bytes: sessions as usize,
            ordinal: 0,
            stream_bytes: 0,
            file_bytes: BLOCK_BYTES as u64,
            digest,
        })
    }

    /// The last entry that it covers, and the chain there.
    pub(crate) fn position(&self) -> (LogId, Chain) {
        (self.meta.last, self.meta.chain)
    }

    /// Where the next slot is in the file: everything before is right.
    pub(crate) fn offset(&self) -> u64 {
        self.file_bytes
    }

    /// Takes the next slot, and the trailer behind the last one: `bytes` is what the file holds from there on,
    /// [`SLOT_READ_BYTES`] of it or all.
    pub(crate) fn slot(&mut self, bytes: &[u8]) -> Result<Slot, SnapshotDamage> {
        let damaged = SnapshotDamage::Slot { ordinal: self.ordinal };
        let head = bytes.get(..SLOT_HEAD_BYTES).ok_or(damaged)?;
        let payload_bytes = u32::from_le_bytes(get(&SLOT, "payload_bytes", head)) as usize;
        let is_last = u32::from_le_bytes(get(&SLOT, "is_last", head));
        let end = SLOT_HEAD_BYTES.saturating_add(payload_bytes);
        let payload = bytes.get(SLOT_HEAD_BYTES..end).filter(|_| end <= SLOT_BYTES).ok_or(damaged)?;
        let crc = crc32c_append(crc32c_append(self.seed, &head[..SLOT_HEAD_BYTES - 4]), payload);
        let right = u32::from_le_bytes(get(&SLOT, "magic", head)) == MAGIC_SLOT
            && u64::from_le_bytes(get(&SLOT, "ordinal", head)) == self.ordinal
            && u32::from_le_bytes(get(&SLOT, "crc", head)) == crc
            && (is_last == 1 || is_last == 0 && end == SLOT_BYTES);
        if !right {
            return Err(damaged);
        }
        self.digest.update(payload);
        self.ordinal += 1;
        self.stream_bytes += payload_bytes as u64;
        let mut rest = payload;
        for (into, wanted) in [
            (&mut self.meta.configuration, self.configuration_bytes),
            (&mut self.meta.sessions, self.sessions_bytes),
        ] {
            let (taken, behind) = rest.split_at(rest.len().min(wanted - into.len()));
            into.extend_from_slice(taken);
            rest = behind;
        }
        let state = end - rest.len()..end;
        if is_last == 0 {
            self.file_bytes += SLOT_BYTES as u64;
            return Ok(Slot { state, end: None });
        }
        let trailer_at = round_up_to_block(end);
        let trailer = bytes.get(trailer_at..trailer_at + BLOCK_BYTES).ok_or(SnapshotDamage::Trailer)?;
        let digest: [u8; 16] = get(&TRAILER, "digest", trailer);
        let prefix = (self.configuration_bytes + self.sessions_bytes) as u64;
        let right = u32::from_le_bytes(get(&TRAILER, "magic", trailer)) == MAGIC_TRAILER
            && u32::from_le_bytes(get(&TRAILER, "crc", trailer)) == crc32c_append(self.seed, &trailer[..40])
            && u64::from_le_bytes(get(&TRAILER, "slots", trailer)) == self.ordinal
            && u64::from_le_bytes(get(&TRAILER, "stream_bytes", trailer)) == self.stream_bytes
            && digest == self.digest.digest128().to_le_bytes()
            && self.stream_bytes >= prefix;
        if !right {
            return Err(SnapshotDamage::Trailer);
        }
        self.file_bytes += (trailer_at + BLOCK_BYTES) as u64;
        let end = SnapshotFile {
            meta: std::mem::take(&mut self.meta),
            state_bytes: self.stream_bytes - prefix,
            file_bytes: self.file_bytes,
            digest,
        };
        Ok(Slot { state, end: Some(end) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    const CLUSTER: ClusterId = ClusterId(0x5eed);

    fn meta() -> SnapshotMeta {
        SnapshotMeta {
            last: LogId { term: Term(7), index: LogIndex(0x1234) },
            chain: Chain([0xc4; 16]),
            time_ms: 1_700_000_000_000,
            configuration: vec![0xcf; 50],
            configuration_index: LogIndex(0x1230),
            sessions: vec![0x5e; 20],
        }
    }

    fn encode(meta: &SnapshotMeta, state: &[u8]) -> Vec<u8> {
        let mut block = vec![0xaa; BLOCK_BYTES];
        let mut encoder = Encoder::new(CLUSTER, meta, &mut block);
        let mut file = block.clone();
        let stream = [&meta.configuration[..], &meta.sessions, state].concat();
        let mut chunks = stream.chunks(SLOT_PAYLOAD_BYTES).peekable();
        while let Some(chunk) = chunks.next() {
            let mut slot = vec![0xaa; SLOT_BYTES];
            Encoder::payload(&mut slot)[..chunk.len()].copy_from_slice(chunk);
            let bytes = encoder.seal(&mut slot, chunk.len(), chunks.peek().is_none());
            file.extend_from_slice(&slot[..bytes]);
        }
        encoder.trailer(&mut block);
        file.extend_from_slice(&block);
        assert!(file.len() as u64 <= file_bytes_max(stream.len() as u64));
        file
    }

    fn decode(file: &[u8]) -> Result<(SnapshotFile, Vec<u8>), SnapshotDamage> {
        let mut decoder = Decoder::new(CLUSTER, file.get(..BLOCK_BYTES).ok_or(SnapshotDamage::Header)?)?;
        let mut state = Vec::new();
        loop {
            let from = (decoder.offset() as usize).min(file.len());
            let bytes = &file[from..file.len().min(from + SLOT_READ_BYTES)];
            let slot = decoder.slot(bytes)?;
            state.extend_from_slice(&bytes[slot.state]);
            if let Some(end) = slot.end {
                return Ok((end, state));
            }
        }
    }

    fn state(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|at| (at * 7 + at / 251) as u8).collect()
    }

    #[test]
    fn what_is_read_is_what_was_written_at_every_length_around_a_slot() {
        let lengths = [0, 1, 4000, SLOT_PAYLOAD_BYTES - 71, SLOT_PAYLOAD_BYTES - 70, SLOT_PAYLOAD_BYTES - 69];
        for bytes in lengths.into_iter().chain([SLOT_PAYLOAD_BYTES * 3 - 70, 200_000]) {
            let mut file = encode(&meta(), &state(bytes));
            let whole = file.len() as u64;
            // A file may have been made larger than it turned out to be.
            file.extend_from_slice(&[0; BLOCK_BYTES]);
            let (found, read) = decode(&file).expect("whole");
            assert_eq!((found.meta, read), (meta(), state(bytes)));
            assert_eq!((found.state_bytes, found.file_bytes), (bytes as u64, whole));
        }
    }

    #[test]
    fn every_changed_byte_that_is_not_padding_and_every_cut_is_told() {
        let file = encode(&meta(), &state(SLOT_PAYLOAD_BYTES + 500));
        let used_of_last = SLOT_HEAD_BYTES + 500 + 70;
        let last = BLOCK_BYTES + SLOT_BYTES;
        let trailer = file.len() - BLOCK_BYTES;
        let is_padding = |at: usize| {
            (HEADER_BYTES..BLOCK_BYTES).contains(&at)
                || (last + used_of_last..trailer).contains(&at)
                || at >= trailer + 44
        };
        for at in (0..file.len())
            .filter(|at| !is_padding(*at))
            .filter(|at| at % 7 == 0 || *at < 300 || *at >= trailer)
        {
            let mut changed = file.clone();
            changed[at] ^= 0x10;
            assert!(decode(&changed).is_err(), "byte {at}");
        }
        for end in (0..file.len()).step_by(BLOCK_BYTES) {
            assert!(decode(&file[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn a_slot_of_another_place_or_of_another_snapshot_is_damage() {
        let file = encode(&meta(), &state(3 * SLOT_PAYLOAD_BYTES));
        let mut swapped = file.clone();
        let (first, second) = (BLOCK_BYTES, BLOCK_BYTES + SLOT_BYTES);
        swapped.copy_within(first..second, second);
        assert_eq!(decode(&swapped), Err(SnapshotDamage::Slot { ordinal: 1 }));
        let other = SnapshotMeta { time_ms: 1, ..meta() };
        let other = encode(&other, &state(3 * SLOT_PAYLOAD_BYTES));
        let mut mixed = file.clone();
        mixed[first..second].copy_from_slice(&other[first..second]);
        assert_eq!(decode(&mixed), Err(SnapshotDamage::Slot { ordinal: 0 }));
        assert_eq!(Decoder::new(ClusterId(1), &file).err(), Some(SnapshotDamage::Foreign));
    }

    #[test]
    fn a_snapshot_that_names_no_members_or_such_of_a_later_entry_is_none() {
        let file = encode(&SnapshotMeta { configuration: Vec::new(), ..meta() }, b"state");
        assert_eq!(decode(&file), Err(SnapshotDamage::Configuration));
        let later = SnapshotMeta { configuration_index: LogIndex(0x1235), ..meta() };
        assert_eq!(decode(&encode(&later, b"state")), Err(SnapshotDamage::Configuration));
    }

    #[test]
    fn names_are_read_as_they_are_written_and_others_are_not() {
        assert_eq!(name_of(LogIndex(0x2a)), "snapshot-000000000000002a.snap");
        assert_eq!(parse_name("snapshot-000000000000002a.snap"), Some(LogIndex(42)));
        for other in ["snapshot-2a.snap", "snapshot-000000000000002A.snap", "snapshot-taking.part", "hard-a"]
        {
            assert_eq!(parse_name(other), None, "{other}");
        }
        let digest = [7; 16];
        let partial = partial_name_of(LogIndex(42), digest);
        assert_eq!(partial, "snapshot-000000000000002a-07070707070707070707070707070707.part");
        assert_eq!(
            (parse_partial_name(&partial), parse_name(&partial)),
            (Some((LogIndex(42), digest)), None)
        );
        for other in
            ["snapshot-taking.part", "snapshot-000000000000002a.snap", &partial[..40], "snapshot-2a-7.part"]
        {
            assert_eq!(parse_partial_name(other), None, "{other}");
        }
    }

    /// A later build's is intact, and its bytes stay: where it was written, and of which cluster, is known all the same.
    #[test]
    fn a_snapshot_of_another_version_says_so_and_for_which_entry_unless_it_is_of_another_cluster() {
        let sealed = |change: &dyn Fn(&mut [u8])| {
            let mut file = encode(&meta(), b"state");
            change(&mut file);
            let crc = crc32c_append(0, &file[..HEADER_BYTES - 4]);
            put(&HEADER, "crc", &mut file, &crc.to_le_bytes());
            file
        };
        let newer = |file: &mut [u8]| put(&HEADER, "version", file, &(VERSION + 1).to_le_bytes());
        let version = SnapshotDamage::Version { version: VERSION + 1, last: LogIndex(0x1234) };
        assert_eq!(decode(&sealed(&newer)), Err(version));
        let elsewhere = |file: &mut [u8]| {
            newer(file);
            put(&HEADER, "cluster", file, &1_u128.to_le_bytes());
        };
        assert_eq!(decode(&sealed(&elsewhere)), Err(SnapshotDamage::Foreign));
        // Without its checksum nobody has said so.
        let mut rotten = encode(&meta(), b"state");
        newer(&mut rotten);
        assert_eq!(decode(&rotten), Err(SnapshotDamage::Header));
    }

    /// The layout, and the bytes of a small file: `UPDATE_GOLDEN=1` rewrites it, and then the version must change.
    #[test]
    fn the_layout_is_the_golden_one() {
        let mut text = String::new();
        for (what, fields) in [("header", &HEADER[..]), ("slot", &SLOT[..]), ("trailer", &TRAILER[..])] {
            let mut at = 0;
            for (name, range) in fields {
                assert_eq!(range.start, at, "{what} has no gaps");
                at = range.end;
                let _ = writeln!(text, "{what:8} {:3} {:3} {name}", range.start, range.len());
            }
        }
        let file = encode(&meta(), b"the state of a machine");
        let rows = file.chunks(16).enumerate().filter(|(_, row)| row.iter().any(|byte| *byte != 0));
        for (ordinal, row) in rows {
            let bytes: Vec<String> = row.iter().map(|byte| format!("{byte:02x}")).collect();
            let _ = writeln!(text, "{:05x} {}", ordinal * 16, bytes.join(" "));
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/snapshot.txt");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(path, &text).expect("writable");
        }
        assert_eq!(text, std::fs::read_to_string(path).expect("readable"));
    }
}
