//! What a start finds on disk, read and judged. Recovery itself changes nothing but to remove files that never entered
//! service; what it found becomes effective only by the cut that the log then records.
//!
//! The happy path: list the directory; read both copies of the hard state; remove what a crash left half made; read the
//! headers of all segments; read every segment in the order of generations, in large pieces with several on their
//! way, verify the images that have arrived ([`arrival`]), and fold the segment into the log ([`scan`]); flush the segments of the newest epoch, since what was read there may
//! so far have reached only the device's cache; hand over.
//!
//! Failures: a directory of another node, a hard state of which no copy is usable, or one older than the log, stop the
//! start with an error that names the cure, and so does what another build of this program has written, which is no
//! damage. A sector that cannot be read is evidence, not an error, and so is a segment that the device cannot even open,
//! twice in a row: it counts as one of which no sector can be read. Damage is part of the result: batches that are known
//! but for their bytes, and a claim where more than that is lost. No file that may hold a batch is removed here.

mod arrival;
mod placement;
mod prior;
mod scan;
mod settle;
mod table;

pub(crate) use scan::belongs;

use crate::WalConfig;
use crate::disk::{
    Access, DirectoryEntry, Disk, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId,
};
use crate::error::{CopyState, Damage, WalError};
use crate::format::{
    Claim, Cut, HARD_STATE_FILE_BYTES, HardState, LogStart, PriorContent, SegmentHeader, SegmentHeaderError,
    read_hard_state, read_segment_header, slots_start,
};
use crate::hard_state::{COPY_NAMES, COPY_NAMES_NEW};
use crate::index::Index;
use crate::ops::{Ops, Owner, Random, take};
use crate::salvage::Salvaged;
use crate::segment::{SegmentName, Stage};
use arrival::Arrival;
use placement::{Identity, Suspect, Testimony};
use ringraft_block::{AlignedBuf, BLOCK_BYTES, Block, BlockBuf, Incarnation, LogIndex, Pool};
use scan::{LogScan, ScanOutcome, SegmentBytes};

pub(crate) use scan::Scanned;
use std::collections::VecDeque;
use std::ops::Range;

/// Segments are read in pieces of so much.
const READ_BYTES: usize = 1024 * 1024;
/// The largest segment that a configuration allows.
const SEGMENT_BYTES_MAX: usize = (1 << 20) * BLOCK_BYTES;
/// So many pieces are on their way at once.
const READS_IN_FLIGHT: usize = 4;

const WHAT: &str = "recovering the log";

/// What recovery found and did. For people and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Segments that hold a part of the log.
    pub segments: usize,
    /// Bytes of segments that were read.
    pub scanned_bytes: u64,
    /// Bytes of a torn tail that was dropped: written, never acknowledged.
    pub torn_bytes: u64,
    /// One copy of the hard state was missing or damaged and was made anew from the other.
    pub hard_state_repaired: bool,
    /// Half-made and unused files that were removed.
    pub removed_files: usize,
    /// Damage to what was, or may have been, acknowledged, in the order of the log: batches that are known and
    /// await repair, and the places where the log was cut since nobody can tell what they held.
    pub damage: Vec<Damage>,
}

/// All that the log needs to open.
pub(crate) struct Found {
    pub(crate) hard_state: HardState,
    pub(crate) fresh: bool,
    pub(crate) index: Index,
    /// The claim that is in force from this start on.
    pub(crate) claim: Option<Claim>,
    /// The epoch that began under it; 0 when it begins with this start.
    pub(crate) claim_epoch: u64,
    pub(crate) claim_cut: LogIndex,
    pub(crate) claim_may_settle: bool,
    pub(crate) salvage: Vec<Salvaged>,
    /// Files that may hold batches, though nobody can tell which.
    pub(crate) unplaced: Vec<SegmentName>,
    /// Segments in service in order of generation.
    pub(crate) segments: Vec<Scanned>,
    /// Segments that a purge has left behind: wholly before the log's start.
    pub(crate) purged: Vec<Scanned>,
    /// Free and recycled segments of the configured size, by serial number.
    pub(crate) free: VecDeque<SegmentName>,
    pub(crate) next_serial: u32,
    pub(crate) report: RecoveryReport,
}

/// The machine. Every phase but the reading of a segment has one operation in flight.
pub(crate) struct Recovery<B: BlockBuf> {
    config: WalConfig,
    pool: Pool<B>,
    phase: Phase,
    entries: Vec<DirectoryEntry>,
    copies: [Option<Result<HardState, CopyState>>; 2],
    foreign: Option<WalError>,
    hard_state: Option<HardState>,
    fresh: bool,
    /// Files to remove.
    leftovers: Vec<String>,
    /// Segment files whose header is to be read.
    unread: VecDeque<(SegmentName, u64)>,
    free: VecDeque<SegmentName>,
    headed: Vec<(Scanned, u64)>,
    purged: Vec<Scanned>,
    /// Files whose header does not say what they are, with the intact header if it says too much. They are read first: one that is
    /// blank was never used, and the envelopes in the others say where they belong.
    suspects: Vec<Suspect>,
    next_suspect: usize,
    /// A file whose header turned out to be another's.
    doubted: Option<(Scanned, u64)>,
    /// Headers that stand in files of other segments.
    misdirected: Vec<Scanned>,
    /// Files without a batch that share their header with another file.
    blank_twins: Vec<(Scanned, u64)>,
    /// Suspects that nothing can place. They are kept until the claim is released.
    unplaced: Vec<SegmentName>,
    scan: Option<LogScan>,
    /// The log as it was when the claim was made that may be settled.
    former: Option<LogScan>,
    outcome: Option<ScanOutcome>,
    /// Position in `headed`.
    next_scan: usize,
    /// The segment that is being read: in the block that all of it was read to, or else put together here.
    whole: Option<Block<B>>,
    buffer: Option<AlignedBuf>,
    /// The device has failed to open the segment that is to be opened.
    open_failed: bool,
    next_serial: u32,
    report: RecoveryReport,
}

/// Where recovery stands; each variant names the operation that is awaited.
enum Phase {
    Start,
    List,
    OpenCopy(usize),
    ReadCopy(usize, FileId),
    CloseCopy(usize),
    OpenHeader(SegmentName, u64),
    ReadHeader(SegmentName, u64, FileId),
    CloseHeader,
    OpenSegment,
    ReadSegment(Reading),
    FlushSegment(FileId),
    CloseSegment,
    Remove(usize),
    SyncRemovals,
    End,
}

/// A segment on its way into memory.
struct Reading {
    /// None when it could not be opened.
    file: Option<FileId>,
    length: usize,
    /// Ranges yet to be asked for, in order.
    wanted: VecDeque<Range<usize>>,
    in_flight: Vec<(DiskOpId, Range<usize>)>,
    unreadable: Vec<Range<usize>>,
    arrival: Arrival,
}

/// Whether a failed read says that something on the device cannot be read. Any other failure (no memory, say) says nothing
/// of it, and must not be taken for damage: the start fails, and the next one may succeed.
fn is_evidence(error: &DiskError) -> bool {
    error.kind == DiskErrorKind::Io
}

impl<B: BlockBuf> Recovery<B> {
    pub(crate) fn new(config: WalConfig, pool: Pool<B>) -> Self {
        Self {
            config,
            pool,
            phase: Phase::Start,
            entries: Vec::new(),
            copies: [None, None],
            foreign: None,
            hard_state: None,
            fresh: false,
            leftovers: Vec::new(),
            unread: VecDeque::new(),
            free: VecDeque::new(),
            headed: Vec::new(),
            purged: Vec::new(),
            suspects: Vec::new(),
            next_suspect: 0,
            doubted: None,
            misdirected: Vec::new(),
            blank_twins: Vec::new(),
            unplaced: Vec::new(),
            scan: None,
            former: None,
            outcome: None,
            next_scan: 0,
            whole: None,
            buffer: None,
            open_failed: false,
            next_serial: 0,
            report: RecoveryReport::default(),
        }
    }

    /// Starts the first operation.
    pub(crate) fn start<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops) {
        if matches!(self.phase, Phase::Start) {
            self.submit(disk, ops, DiskOp::List);
            self.phase = Phase::List;
        }
    }

    /// Takes a completion and starts what follows from it. Hands over what was found at the end.
    pub(crate) fn handle<D: Disk<Buf = B>>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        random: &mut Random,
        done: DiskDone<B>,
    ) -> Result<Option<Found>, WalError> {
        let failed = |error| WalError::Disk { what: WHAT, error };
        match (std::mem::replace(&mut self.phase, Phase::End), done.result) {
            (Phase::List, Ok(DiskOutput::Listed(entries))) => {
                self.entries = entries;
                self.open_copy(disk, ops, 0);
            }

            (Phase::OpenCopy(copy), Ok(DiskOutput::Opened { file, .. })) => {
                let block = self.block(disk, HARD_STATE_FILE_BYTES)?;
                self.submit(disk, ops, DiskOp::Read { file, offset: 0, block, bytes: HARD_STATE_FILE_BYTES });
                self.phase = Phase::ReadCopy(copy, file);
            }
            (Phase::OpenCopy(copy), Err(error)) => {
                let state = match error.kind {
                    DiskErrorKind::NotFound => CopyState::Missing,
                    DiskErrorKind::Io => CopyState::Unreadable(error),
                    _ => return Err(failed(error)),
                };
                self.copies[copy] = Some(Err(state));
                self.next_copy(disk, ops, random, copy)?;
            }
            (Phase::ReadCopy(copy, file), result) => {
                self.copies[copy] = Some(match result {
                    Ok(DiskOutput::Read { block, bytes }) => self.judge_copy(copy, &block, bytes),
                    Ok(_) => return Err(WalError::Protocol { what: WHAT }),
                    Err(error) if is_evidence(&error) => Err(CopyState::Unreadable(error)),
                    Err(error) => return Err(failed(error)),
                });
                self.submit(disk, ops, DiskOp::Close { file });
                self.phase = Phase::CloseCopy(copy);
            }
            (Phase::CloseCopy(copy), Ok(DiskOutput::Done)) => self.next_copy(disk, ops, random, copy)?,

            (Phase::OpenHeader(name, length), Err(error)) if is_evidence(&error) => {
                if self.tries_again() {
                    self.open_header(disk, ops, name, length);
                    return Ok(None);
                }
                tracing::warn!(segment = %name, %error, "a segment cannot be opened");
                // What is in service is renamed, durably, before it gets a header: whatever this one holds, the log does not need it.
                if !matches!(name.stage, Stage::Free | Stage::Used) {
                    self.take_header(name, length, None)?;
                }
                self.next_header(disk, ops)?;
            }
            (Phase::OpenHeader(name, length), Ok(DiskOutput::Opened { file, .. })) => {
                self.open_failed = false;
                let block = self.block(disk, BLOCK_BYTES)?;
                self.submit(disk, ops, DiskOp::Read { file, offset: 0, block, bytes: BLOCK_BYTES });
                self.phase = Phase::ReadHeader(name, length, file);
            }
            (Phase::ReadHeader(name, length, file), result) => {
                let header = match result {
                    Ok(DiskOutput::Read { block, bytes }) => block.get(..bytes).map(read_segment_header),
                    Ok(_) => return Err(WalError::Protocol { what: WHAT }),
                    Err(error) if is_evidence(&error) => None,
                    Err(error) => return Err(failed(error)),
                };
                self.take_header(name, length, header)?;
                self.submit(disk, ops, DiskOp::Close { file });
                self.phase = Phase::CloseHeader;
            }
            (Phase::CloseHeader, Ok(DiskOutput::Done)) => self.next_header(disk, ops)?,

            (Phase::OpenSegment, Ok(DiskOutput::Opened { file, bytes })) => {
                self.open_failed = false;
                self.begin_reading(disk, ops, Some(file), bytes)?;
            }
            (Phase::OpenSegment, Err(error)) if is_evidence(&error) => {
                let suspect =
                    self.suspects.get(self.next_suspect).map(|suspect| (suspect.name, suspect.length));
                let headed = self.headed.get(self.next_scan).map(|(segment, length)| (segment.name, *length));
                match suspect.or(headed) {
                    Some((name, length)) if !self.tries_again() => {
                        tracing::warn!(segment = %name, %error, "a segment cannot be opened");
                        self.begin_reading(disk, ops, None, length)?;
                    }
                    // Only that: what the suspects are has been settled, and cannot be settled twice.
                    _ => {
                        self.open_segment(disk, ops);
                    }
                }
            }
            (Phase::ReadSegment(reading), result) => {
                let reading = self.take_piece(done.id, reading, result)?;
                self.read_on(disk, ops, reading)?;
            }
            (Phase::FlushSegment(file), Ok(DiskOutput::Done)) => {
                self.submit(disk, ops, DiskOp::Close { file });
                self.phase = Phase::CloseSegment;
            }
            (Phase::CloseSegment, Ok(DiskOutput::Done)) => self.end_segment(disk, ops)?,

            (Phase::Remove(at), result) => {
                match result {
                    Ok(_) => {}
                    Err(error) if error.kind == DiskErrorKind::NotFound => {}
                    Err(error) => return Err(failed(error)),
                }
                self.remove(disk, ops, at + 1);
            }
            (Phase::SyncRemovals, Ok(DiskOutput::Done)) => {}

            (_, Err(error)) => return Err(failed(error)),
            (_, Ok(_)) => return Err(WalError::Protocol { what: WHAT }),
        }
        Ok(if matches!(self.phase, Phase::End) { self.found() } else { None })
    }

    // The hard state.

    fn open_copy<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops, copy: usize) {
        let name = COPY_NAMES[copy].to_owned();
        self.submit(disk, ops, DiskOp::Open { name, access: Access::Read });
        self.phase = Phase::OpenCopy(copy);
    }

    fn judge_copy(&mut self, copy: usize, block: &[u8], bytes: usize) -> Result<HardState, CopyState> {
        read_hard_state(block.get(..bytes).unwrap_or_default()).map_err(|error| {
            if error.is_foreign() {
                self.foreign = Some(WalError::HardStateForeign { file: COPY_NAMES[copy], error });
            }
            CopyState::Invalid(error)
        })
    }

    fn next_copy<D: Disk<Buf = B>>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        random: &mut Random,
        copy: usize,
    ) -> Result<(), WalError> {
        if copy == 0 {
            self.open_copy(disk, ops, 1);
            return Ok(());
        }
        let hard_state = self.choose_hard_state(random)?;
        if hard_state.cluster != self.config.cluster
            || hard_state.node != self.config.node
            || hard_state.group != self.config.group
        {
            return Err(WalError::WrongIdentity {
                node: self.config.node,
                cluster: self.config.cluster,
                found_node: hard_state.node,
                found_cluster: hard_state.cluster,
            });
        }
        self.hard_state = Some(hard_state);
        self.begin_scan();
        self.sort_entries();
        self.next_header(disk, ops)
    }

    /// The copy that counts: the valid one with the highest sequence. A new state when the directory is blank.
    fn choose_hard_state(&mut self, random: &mut Random) -> Result<HardState, WalError> {
        if let Some(foreign) = self.foreign.take() {
            return Err(foreign);
        }
        let missing = || Err(CopyState::Missing);
        let [a, b] = std::mem::take(&mut self.copies).map(|copy| copy.unwrap_or_else(missing));
        match (a, b) {
            (Ok(a), Ok(b)) => Ok(if a.sequence >= b.sequence { a } else { b }),
            (Ok(state), Err(_)) | (Err(_), Ok(state)) => {
                self.report.hard_state_repaired = true;
                Ok(state)
            }
            // Segments are made after both copies, so a directory without either is blank, or has lost them.
            (Err(CopyState::Missing), Err(CopyState::Missing)) if !self.has_segments() => {
                self.fresh = true;
                Ok(self.format(random))
            }
            (a, b) => {
                let state = |copy: Result<_, CopyState>| copy.err().unwrap_or(CopyState::Intact);
                Err(WalError::HardStateLost { a: state(a), b: state(b) })
            }
        }
    }

    fn has_segments(&self) -> bool {
        self.entries
            .iter()
            .filter_map(|entry| SegmentName::parse(&entry.name))
            .any(|name| name.stage != Stage::New)
    }

    fn format(&self, random: &mut Random) -> HardState {
        let incarnation = u128::from(random.next()) << 64 | u128::from(random.next());
        HardState {
            cluster: self.config.cluster,
            node: self.config.node,
            incarnation: Incarnation(incarnation),
            boot: 0,
            sequence: 0,
            group: self.config.group,
            term: Default::default(),
            vote: None,
            epoch: 0,
            cut: Cut::default(),
            generation: 0,
            start: LogStart::default(),
            start_generation: 0,
            witness: Default::default(),
            claim: None,
            claim_epoch: 0,
            claim_cut: Default::default(),
            claim_may_settle: false,
            configuration: Vec::new(),
        }
    }

    // The headers.

    /// Sorts the directory into what to read, what to keep and what to remove. Files of other names are not ours.
    fn sort_entries(&mut self) {
        for entry in std::mem::take(&mut self.entries) {
            if COPY_NAMES_NEW.contains(&entry.name.as_str()) {
                self.leftovers.push(entry.name);
                continue;
            }
            let Some(name) = SegmentName::parse(&entry.name) else { continue };
            self.next_serial = self.next_serial.max(name.serial.saturating_add(1));
            match name.stage {
                Stage::New | Stage::Old => self.leftovers.push(entry.name),
                Stage::Free | Stage::Used if entry.bytes != self.config.segment_bytes => {
                    self.leftovers.push(entry.name);
                }
                Stage::Free | Stage::Used | Stage::InService => self.unread.push_back((name, entry.bytes)),
            }
        }
    }

    fn next_header<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops) -> Result<(), WalError> {
        if let Some((name, length)) = self.unread.pop_front() {
            self.open_header(disk, ops, name, length);
            return Ok(());
        }
        self.suspect_twins();
        self.next_segment(disk, ops)
    }

    fn open_header<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops, name: SegmentName, length: u64) {
        self.submit(disk, ops, DiskOp::Open { name: name.to_string(), access: Access::Read });
        self.phase = Phase::OpenHeader(name, length);
    }

    /// The device could not open a segment. As a piece that could not be read is asked for again, so is this, once.
    fn tries_again(&mut self) -> bool {
        self.open_failed = !self.open_failed;
        self.open_failed
    }

    /// Two files with one generation: a header was written over another's. Their envelopes say whose it is.
    fn suspect_twins(&mut self) {
        self.headed.sort_by_key(|(segment, _)| (segment.header.generation, segment.name.serial));
        let generations: Vec<u32> =
            self.headed.iter().map(|(segment, _)| segment.header.generation).collect();
        let is_twin = |generation| generations.iter().filter(|other| **other == generation).nth(1).is_some();
        let twins = self.headed.extract_if(.., |(segment, _)| is_twin(segment.header.generation));
        let suspect = |(Scanned { name, header, .. }, length)| Suspect::new(name, length, Some(header));
        self.suspects.extend(twins.map(suspect));
    }

    /// A suspect that holds slots of a segment which another file's header names: the header may have been written over that one's.
    fn suspect_namesakes(&mut self) {
        let suspects = &self.suspects;
        let named = |header: &SegmentHeader| suspects.iter().any(|suspect| suspect.names(header));
        let namesakes: Vec<Suspect> = self
            .headed
            .extract_if(.., |(segment, _)| named(&segment.header))
            .map(|(Scanned { name, header, .. }, length)| Suspect::new(name, length, Some(header)))
            .collect();
        self.suspects.extend(namesakes);
    }

    /// All headers are known as far as they can be.
    fn judge_epochs(&mut self) -> Result<(), WalError> {
        for (twin, length) in std::mem::take(&mut self.blank_twins) {
            // When no other file turned out to be what the header says, it is this one's.
            if self.headed.iter().any(|(other, _)| other.header.generation == twin.header.generation) {
                self.leftovers.push(twin.name.to_string());
            } else {
                self.headed.push((twin, length));
            }
        }
        // A header in the wrong place is all that may be left of its segment.
        for Scanned { name, header, .. } in &self.misdirected {
            if !self.is_taken(header.generation)
                && let Some(scan) = self.scan.as_mut()
            {
                scan.unplaced(*name, header.generation);
            }
        }
        self.headed.sort_by_key(|(segment, _)| (segment.header.generation, segment.name.serial));
        let hard_state_epoch = self.hard_state.as_ref().map_or(0, |state| state.epoch);
        let log_epoch = self.newest_epoch();
        if log_epoch > hard_state_epoch {
            return Err(WalError::HardStateBehind { log_epoch, hard_state_epoch });
        }
        // What lies wholly before the log's start says nothing any more. It is removed once the hard state is safe in both
        // copies again.
        let start = self.hard_state.as_ref().map_or(0, |state| state.start_generation);
        let purged = self.headed.partition_point(|(segment, _)| segment.header.generation < start);
        self.purged.extend(self.headed.drain(..purged).map(|(segment, _)| segment));
        Ok(())
    }

    fn newest_epoch(&self) -> u64 {
        self.headed.iter().map(|(segment, _)| segment.header.epoch).max().unwrap_or(0)
    }

    fn take_header(
        &mut self,
        name: SegmentName,
        length: u64,
        header: Option<Result<SegmentHeader, SegmentHeaderError>>,
    ) -> Result<(), WalError> {
        match (name.stage, header) {
            (Stage::Free | Stage::Used, Some(Err(SegmentHeaderError::Blank))) => self.free.push_back(name),
            (_, Some(Err(error @ (SegmentHeaderError::Version(_) | SegmentHeaderError::Fingerprint(_))))) => {
                return Err(WalError::SegmentForeign { file: name.to_string(), error });
            }
            // A free segment is renamed, durably, before its header is written.
            (Stage::InService, Some(Ok(header))) if self.is_ours(&header, length) => {
                self.headed.push((Scanned { name, header, header_lost: false }, length));
            }
            _ => self.suspects.push(Suspect::new(name, length, None)),
        }
        Ok(())
    }

    fn is_ours(&self, header: &SegmentHeader, length: u64) -> bool {
        self.hard_state.as_ref().is_some_and(|state| {
            header.cluster == state.cluster
                && header.node == state.node
                && header.incarnation == state.incarnation
                && header.group == state.group
                && header.segment_bytes.is_multiple_of(BLOCK_BYTES as u64)
                // A file that lost its end, or got a tail, is still the segment that its header names. What a header says of its
                // length must not be believed with memory.
                && header.segment_bytes <= length.max(self.config.segment_bytes)
        })
    }

    // The segments.

    fn next_segment<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops) -> Result<(), WalError> {
        if self.next_suspect == self.suspects.len() && self.next_scan == 0 {
            self.suspect_namesakes();
            if self.next_suspect == self.suspects.len() {
                self.place_suspects();
                self.judge_epochs()?;
            }
        }
        if !self.open_segment(disk, ops) {
            self.buffer = None;
            self.outcome = self.scan.take().map(LogScan::finish);
            self.remove(disk, ops, 0);
        }
        Ok(())
    }

    /// Opens the segment that is to be read, if there is one left.
    fn open_segment<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops) -> bool {
        let suspect = self.suspects.get(self.next_suspect).map(|suspect| suspect.name);
        let headed = self.headed.get(self.next_scan).map(|(segment, _)| segment.name);
        let Some(name) = suspect.or(headed) else { return false };
        // With write access, since the newest are flushed.
        self.submit(disk, ops, DiskOp::Open { name: name.to_string(), access: Access::Write });
        self.phase = Phase::OpenSegment;
        true
    }

    /// Reads a segment whose file has so many bytes. Without a `file`, none of them can be read.
    fn begin_reading<D: Disk<Buf = B>>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        file: Option<FileId>,
        length: u64,
    ) -> Result<(), WalError> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let headed = self.headed.get(self.next_scan).filter(|_| self.next_suspect == self.suspects.len());
        let in_file = length - length % BLOCK_BYTES;
        let length = match headed {
            Some((Scanned { header, .. }, _)) => usize::try_from(header.segment_bytes).unwrap_or(usize::MAX),
            None => in_file,
        };
        // No segment is larger; a file that claims to be must not be believed with memory.
        let length = length.min(SEGMENT_BYTES_MAX);
        self.whole = None;
        // What a file that was cut short should hold behind its end cannot be read.
        let in_file = if file.is_some() { in_file.min(length) } else { 0 };
        let wanted = (0..in_file).step_by(READ_BYTES).map(|at| at..(at + READ_BYTES).min(in_file)).collect();
        let (in_flight, mut unreadable) = (Vec::new(), Vec::new());
        let mut arrival =
            Arrival::new(headed.map(|(segment, _)| slots_start(segment.header.segment_bytes) as usize));
        if in_file < length {
            arrival.stop();
            unreadable.push(in_file..length);
            if let Some(rest) = self.room(length).get_mut(in_file..length) {
                rest.fill(0);
            }
        }
        let reading = Reading { file, length, wanted, in_flight, unreadable, arrival };
        self.read_on(disk, ops, reading)
    }

    /// Room for the pieces of a segment of so many bytes.
    fn room(&mut self, length: usize) -> &mut [u8] {
        let large = self.buffer.take().filter(|buffer| buffer.bytes().len() >= length);
        self.buffer.insert(large.unwrap_or_else(|| AlignedBuf::zeroed(length))).bytes_mut()
    }

    /// Copies a piece to its place, unless it is the whole. One that failed is asked for again block by block; a block that failed
    /// is lost.
    fn take_piece(
        &mut self,
        id: DiskOpId,
        mut reading: Reading,
        result: Result<DiskOutput<B>, DiskError>,
    ) -> Result<Reading, WalError> {
        let Some(at) = reading.in_flight.iter().position(|(flying, _)| *flying == id) else {
            return Err(WalError::Protocol { what: WHAT });
        };
        let (_, range) = reading.in_flight.swap_remove(at);
        match result {
            Err(error) if !is_evidence(&error) => return Err(WalError::Disk { what: WHAT, error }),
            Ok(DiskOutput::Read { block, bytes }) if bytes >= range.len() => {
                self.report.scanned_bytes += range.len() as u64;
                if range == (0..reading.length) {
                    self.whole = Some(block);
                } else if let Some(place) = self.room(reading.length).get_mut(range.clone()) {
                    place.copy_from_slice(&block[..range.len()]);
                }
                reading.arrival.add(range);
            }
            Ok(DiskOutput::Read { .. }) | Err(_) if range.len() > BLOCK_BYTES => {
                reading.arrival.stop();
                let blocks = range.step_by(BLOCK_BYTES).map(|at| at..at + BLOCK_BYTES);
                reading.wanted.extend(blocks);
            }
            Ok(DiskOutput::Read { .. }) | Err(_) => {
                if let Some(place) = self.room(reading.length).get_mut(range.clone()) {
                    place.fill(0);
                }
                reading.arrival.stop();
                reading.unreadable.push(range);
            }
            Ok(_) => return Err(WalError::Protocol { what: WHAT }),
        }
        Ok(reading)
    }

    fn read_on<D: Disk<Buf = B>>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        mut reading: Reading,
    ) -> Result<(), WalError> {
        while reading.in_flight.len() < READS_IN_FLIGHT {
            let Some(file) = reading.file else { break };
            let Some(range) = reading.wanted.pop_front() else { break };
            let block = self.block(disk, range.len())?;
            let offset = range.start as u64;
            let op = DiskOp::Read { file, offset, block, bytes: range.len() };
            let id = ops.submit(disk, Owner::Recovery, op);
            reading.in_flight.push((id, range));
        }
        // The device goes on meanwhile.
        let arrived = self.whole.as_deref().or(self.buffer.as_ref().map(BlockBuf::bytes));
        reading.arrival.verify(arrived.unwrap_or_default());
        if !reading.in_flight.is_empty() {
            self.phase = Phase::ReadSegment(reading);
            return Ok(());
        }
        self.scan_segment(&reading)?;
        let Some(file) = reading.file else { return self.end_segment(disk, ops) };
        let newest = self.newest_epoch();
        let scanned = self.headed.get(self.next_scan).filter(|_| self.next_suspect == self.suspects.len());
        if scanned.is_some_and(|(segment, _)| segment.header.epoch == newest) {
            self.submit(disk, ops, DiskOp::Flush { file });
            self.phase = Phase::FlushSegment(file);
        } else {
            self.submit(disk, ops, DiskOp::Close { file });
            self.phase = Phase::CloseSegment;
        }
        Ok(())
    }

    /// A segment has been read, and is closed.
    fn end_segment<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops) -> Result<(), WalError> {
        if let Some((segment, length)) = self.doubted.take() {
            self.doubt_header(segment, length);
        } else if self.next_suspect < self.suspects.len() {
            self.next_suspect += 1;
        } else {
            self.next_scan += 1;
        }
        self.next_segment(disk, ops)
    }

    fn scan_segment(&mut self, reading: &Reading) -> Result<(), WalError> {
        let (whole, buffer) = (self.whole.take(), self.buffer.take());
        let bytes = whole.as_deref().or(buffer.as_ref().map(BlockBuf::bytes)).unwrap_or_default();
        let bytes = bytes.get(..reading.length).unwrap_or_default();
        let bytes =
            SegmentBytes { bytes, unreadable: &reading.unreadable, verified: reading.arrival.verified() };
        if let Some(suspect) = self.suspects.get_mut(self.next_suspect) {
            suspect.testimony = self.hard_state.as_ref().map(|state| Testimony::of(&bytes, state));
            let name = suspect.name;
            let cluster = self.hard_state.as_ref().map(|state| state.cluster);
            if let Some(foreign) = cluster.and_then(|cluster| bytes.first_foreign(name, cluster)) {
                return Err(foreign);
            }
        } else if let Some((segment, length)) = self.headed.get(self.next_scan).copied() {
            if self.is_misdirected(&segment, &bytes) {
                self.doubted = Some((segment, length));
            } else {
                let claim_epoch = self.hard_state.as_ref().map_or(0, |state| state.claim_epoch);
                if let Some(former) = self.former.as_mut().filter(|_| segment.header.epoch < claim_epoch) {
                    former.segment(segment, &bytes);
                }
                if let Some(scan) = self.scan.as_mut() {
                    scan.segment(segment, &bytes);
                    if let Some(foreign) = scan.take_foreign() {
                        return Err(foreign);
                    }
                }
            }
        }
        self.buffer = buffer;
        Ok(())
    }

    /// All suspects have been read: says what each is.
    fn place_suspects(&mut self) {
        let identities = placement::identify(&self.suspects, |generation| self.is_taken(generation));
        for (suspect, (identity, doubtful)) in self.suspects.iter().zip(identities) {
            let Suspect { name, length, header, .. } = *suspect;
            let named = header.map_or(0, |header| header.generation);
            match identity {
                // Whatever its header was, no batch was ever written here. But it may tell of a cut.
                Identity::Unused => match header {
                    Some(header) => {
                        self.blank_twins.push((Scanned { name, header, header_lost: false }, length));
                    }
                    None => self.leftovers.push(name.to_string()),
                },
                Identity::Headed(header) => {
                    self.headed.push((Scanned { name, header, header_lost: false }, length));
                }
                Identity::Voiced(header) => {
                    self.headed.push((Scanned { name, header, header_lost: true }, length));
                }
                Identity::Unknown => self.unplaced.push(name),
            }
            if let Some(scan) = self.scan.as_mut()
                && (doubtful || matches!(identity, Identity::Unknown))
            {
                scan.unplaced(name, named);
            }
        }
    }

    /// A former life of a recycled file lies before the log's start, or belonged to a generation that is there.
    fn is_taken(&self, generation: u32) -> bool {
        let start = self.hard_state.as_ref().map_or(0, |state| state.start_generation);
        generation < start || self.headed.iter().any(|(other, _)| other.header.generation == generation)
    }

    /// Whether a header is not that of the file in which it stands: it was meant for another, which does not have it. A file that
    /// began blank then holds slots of another generation, and none of this one.
    fn is_misdirected(&self, segment: &Scanned, bytes: &SegmentBytes<'_>) -> bool {
        !segment.header_lost
            && segment.header.prior_content == PriorContent::Zeros
            && !placement::has_own_slot(bytes, &segment.header)
            && self.hard_state.as_ref().is_some_and(|state| {
                let taken = |generation| self.is_taken(generation);
                placement::names_another(bytes, state, taken)
            })
    }

    /// Goes back to where the headers were known, with one of them fewer.
    fn doubt_header(&mut self, segment: Scanned, length: u64) {
        let name = segment.name;
        self.misdirected.push(segment);
        self.headed.append(
            &mut self.purged.drain(..).map(|segment| (segment, segment.header.segment_bytes)).collect(),
        );
        let suspects = &self.suspects;
        self.headed.retain(|(segment, _)| {
            segment.name != name && suspects.iter().all(|suspect| suspect.name != segment.name)
        });
        self.leftovers.retain(|left| suspects.iter().all(|suspect| suspect.name.to_string() != *left));
        self.unplaced.clear();
        self.next_suspect = self.suspects.len();
        self.next_scan = 0;
        self.suspects.push(Suspect::new(name, length, None));
        self.begin_scan();
    }

    fn begin_scan(&mut self) {
        self.scan = self.hard_state.clone().map(LogScan::new);
        self.former = self.hard_state.as_ref().and_then(settle::former);
    }

    // The end.

    /// Removes what never entered service, one file after the other, and makes the removals durable.
    fn remove<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops, at: usize) {
        if let Some(name) = self.leftovers.get(at).cloned() {
            self.submit(disk, ops, DiskOp::Remove { name });
            self.phase = Phase::Remove(at);
            return;
        }
        self.report.removed_files = at;
        self.submit(disk, ops, DiskOp::SyncDirectory);
        self.phase = Phase::SyncRemovals;
    }

    fn found(&mut self) -> Option<Found> {
        let mut outcome = self.outcome.take()?;
        let hard_state = self.hard_state.take()?;
        if let Some(former) = self.former.take().map(LogScan::finish) {
            outcome.claim = settle::settle(&hard_state, &outcome, former);
            outcome.claim_may_settle &= outcome.claim.is_some_and(|claim| !claim.certain);
            outcome.salvage.retain(|_| outcome.claim.is_some());
        }
        // What a header block that could not be read had said is not known.
        outcome.claim_may_settle &= hard_state.claim_may_settle || self.suspects.is_empty();
        let mut report = std::mem::take(&mut self.report);
        report.torn_bytes = outcome.torn_bytes;
        report.segments = outcome.segments.len();
        report.damage = outcome.damage;
        Some(Found {
            hard_state,
            fresh: self.fresh,
            index: outcome.index,
            claim: outcome.claim,
            claim_epoch: outcome.claim_epoch,
            claim_cut: outcome.claim_cut,
            claim_may_settle: outcome.claim_may_settle,
            salvage: outcome.salvage,
            unplaced: std::mem::take(&mut self.unplaced),
            segments: outcome.segments,
            purged: std::mem::take(&mut self.purged),
            free: std::mem::take(&mut self.free),
            next_serial: self.next_serial,
            report,
        })
    }

    fn submit<D: Disk<Buf = B>>(&self, disk: &mut D, ops: &mut Ops, op: DiskOp<B>) {
        ops.submit(disk, Owner::Recovery, op);
    }

    fn block<D: Disk<Buf = B>>(&self, disk: &mut D, bytes: usize) -> Result<Block<B>, WalError> {
        take(&self.pool, disk, bytes).map_err(|error| WalError::Disk { what: WHAT, error })
    }
}
