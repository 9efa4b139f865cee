//! Segments made ahead, so that rolling over to the next one is no step in latency.
//!
//! The happy path: the [`Maker`] creates a file under its `.new` name, fills it with zeros through an ordinary
//! (not durable) descriptor, no faster than the log's appends bear ([`pace`]), flushes once, and renames it to `.free`. Recycled segments ([`crate::recycle`]) come back as `.used`,
//! and as long as there are enough of them none is made. The [`Standby`] takes the oldest recycled or free one, renames it to `.wal`, opens it for durable writes and writes its header. When the active segment is full the log takes the
//! standby over and the next free one moves up.
//!
//! Failures: no space leaves the maker blocked, its half-made file removed, until somebody asks to try again; the log lives
//! on with what is there. Any other error stops the log. A crash leaves a `.new` file, removed at the next start, or a
//! `.wal` file with a blank or unused header, removed as well.

mod pace;

use crate::disk::{Access, Disk, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId};
use crate::error::WalError;
use crate::format::{PriorContent, SegmentHeader, write_segment_header};
use crate::mutants::{self, Mutant};
use crate::ops::{Ops, Owner, take, zeros};
use crate::segment::{SegmentName, Stage};
use pace::{FILL_BYTES, Pace};
pub use pace::{FILL_INTERVAL, FILL_STEP_BYTES};
use ringraft_block::{BLOCK_BYTES, BlockBuf, Pool, SharedBlock};
use std::collections::VecDeque;

/// So many pieces are on their way at once.
const FILLS_IN_FLIGHT: usize = 2;

const WHAT_MAKE: &str = "making a segment";
const WHAT_STANDBY: &str = "putting a segment into service";

/// Makes free segments.
pub(crate) struct Maker<B: BlockBuf> {
    segment_bytes: u64,
    next_serial: u32,
    /// Free segments, oldest first.
    free: VecDeque<SegmentName>,
    /// Recycled segments, oldest first.
    used: VecDeque<SegmentName>,
    phase: Making<B>,
    pace: Pace,
    made: u64,
    stopped: bool,
    blocked: Option<DiskError>,
}

enum Making<B: BlockBuf> {
    Idle,
    Creating(SegmentName),
    Filling(Fill<B>),
    Flushing(SegmentName, FileId),
    Closing(SegmentName),
    Renaming(SegmentName),
    Syncing(SegmentName),
    /// After a lack of space: closing what was made so far.
    GivingUp(SegmentName),
    /// After a lack of space: removing it.
    Removing,
}

struct Fill<B: BlockBuf> {
    name: SegmentName,
    file: FileId,
    zeros: SharedBlock<B>,
    next: u64,
    /// The pieces on their way, and their sizes.
    in_flight: Vec<(DiskOpId, usize)>,
    /// No space, or the log is closing: nothing more is written, and what is in flight is awaited.
    failed: bool,
}

impl<B: BlockBuf> Fill<B> {
    /// A piece is on its way no more; its size.
    fn landed(&mut self, id: DiskOpId) -> Option<usize> {
        let at = self.in_flight.iter().position(|(other, _)| *other == id)?;
        Some(self.in_flight.swap_remove(at).1)
    }
}

impl<B: BlockBuf> Maker<B> {
    /// A maker that finds `ready` segments made or recycled by an earlier process.
    pub(crate) fn new(segment_bytes: u64, next_serial: u32, ready: VecDeque<SegmentName>) -> Self {
        let (used, free) = ready.into_iter().partition(|name| name.stage == Stage::Used);
        let (phase, blocked) = (Making::Idle, None);
        let pace = Pace::new();
        Self { segment_bytes, next_serial, free, used, phase, pace, made: 0, stopped: false, blocked }
    }

    /// The number of segments that are ready to enter service.
    pub(crate) fn ready(&self) -> usize {
        self.free.len() + self.used.len()
    }

    /// The number of those that are recycled.
    pub(crate) fn used(&self) -> usize {
        self.used.len()
    }

    /// How many it has made.
    pub(crate) fn made(&self) -> u64 {
        self.made
    }

    /// A segment was recycled.
    pub(crate) fn add_used(&mut self, name: SegmentName) {
        debug_assert_eq!(name.stage, Stage::Used);
        self.used.push_back(name);
    }

    /// Makes no more, and gives up the one that is being filled: the log is closing.
    pub(crate) fn stop<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops) {
        self.stopped = true;
        if let Making::Filling(fill) = &mut self.phase {
            fill.failed = true;
        }
        self.go_on(disk, ops);
    }

    /// Whether a segment is being filled with zeros, or waits to be.
    pub(crate) fn is_filling(&self) -> bool {
        matches!(&self.phase, Making::Filling(fill) if !fill.failed)
    }

    /// The log has appended `bytes`: zeros may follow.
    pub(crate) fn follow(&mut self, bytes: u64) {
        self.pace.follow(bytes, self.ready());
    }

    /// Time has passed: `bytes` of zeros may be written whatever was appended, and all of them if nothing was.
    pub(crate) fn pass<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops, bytes: u64) {
        self.pace.pass(bytes);
        self.go_on(disk, ops);
    }

    /// The lack of space that keeps it from making another.
    pub(crate) fn blocked(&self) -> Option<&DiskError> {
        self.blocked.as_ref()
    }

    /// Space may have come back.
    pub(crate) fn retry(&mut self) {
        self.blocked = None;
    }

    pub(crate) fn is_idle(&self) -> bool {
        matches!(self.phase, Making::Idle)
    }

    /// A segment to enter service, or to be given up for its space.
    pub(crate) fn take_ready(&mut self) -> Option<SegmentName> {
        self.used.pop_front().or_else(|| self.free.pop_front())
    }

    /// Begins another segment when fewer than `wanted` are ready, or goes on with the one that is being filled; at full speed
    /// when it is `urgent`, since there is none to go on in.
    pub(crate) fn advance<D: Disk<Buf = B>>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        wanted: usize,
        urgent: bool,
    ) {
        self.pace.set_urgent(urgent);
        self.go_on(disk, ops);
        if !self.is_idle() || self.stopped || self.blocked.is_some() || self.ready() >= wanted {
            return;
        }
        let name = SegmentName::new(self.next_serial, Stage::New);
        // 2^32 files are made after 256 PiB of log; the generations end first.
        self.next_serial = self.next_serial.wrapping_add(1);
        let op = DiskOp::Create { name: name.to_string(), bytes: self.segment_bytes, access: Access::Write };
        ops.submit(disk, Owner::Maker, op);
        self.pace.begin();
        self.phase = Making::Creating(name);
    }

    pub(crate) fn handle<D: Disk<Buf = B>>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        pool: &Pool<B>,
        done: DiskDone<B>,
    ) -> Result<(), WalError> {
        let phase = std::mem::replace(&mut self.phase, Making::Idle);
        let output = match done.result {
            Ok(output) => output,
            Err(error) => return self.failed(disk, ops, phase, done.id, error),
        };
        match (phase, output) {
            (Making::Creating(name), DiskOutput::Opened { file, .. }) => {
                let bytes = FILL_BYTES.min(self.segment_bytes) as usize;
                let block =
                    take(pool, disk, bytes).map_err(|error| WalError::Disk { what: WHAT_MAKE, error })?;
                let zeros = zeros(block, bytes);
                let in_flight = Vec::with_capacity(FILLS_IN_FLIGHT);
                self.fill(disk, ops, Fill { name, file, zeros, next: 0, in_flight, failed: self.stopped });
            }
            (Making::Filling(mut fill), DiskOutput::Written { bytes }) => {
                let Some(asked) = fill.landed(done.id) else {
                    return Err(WalError::Protocol { what: WHAT_MAKE });
                };
                if bytes != asked {
                    return Err(WalError::ShortWrite { what: WHAT_MAKE, asked, written: bytes });
                }
                self.fill(disk, ops, fill);
            }
            (Making::Flushing(name, file), DiskOutput::Done) => {
                ops.submit(disk, Owner::Maker, DiskOp::Close { file });
                self.phase = Making::Closing(name);
            }
            (Making::Closing(name), DiskOutput::Done) => {
                let (from, to) = (name.to_string(), name.at(Stage::Free).to_string());
                ops.submit(disk, Owner::Maker, DiskOp::Rename { from, to });
                self.phase = Making::Renaming(name);
            }
            (Making::Renaming(name), DiskOutput::Done) => {
                ops.submit(disk, Owner::Maker, DiskOp::SyncDirectory);
                self.phase = Making::Syncing(name);
            }
            (Making::Syncing(name), DiskOutput::Done) => {
                self.made += 1;
                self.free.push_back(name.at(Stage::Free));
            }
            (Making::GivingUp(name), DiskOutput::Done) => self.remove(disk, ops, name),
            (Making::Removing, DiskOutput::Done) => {}
            _ => return Err(WalError::Protocol { what: WHAT_MAKE }),
        }
        Ok(())
    }

    /// Goes on with the segment that is being filled, if there is one.
    fn go_on<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops) {
        match std::mem::replace(&mut self.phase, Making::Idle) {
            Making::Filling(fill) => self.fill(disk, ops, fill),
            other => self.phase = other,
        }
    }

    fn fill<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops, mut fill: Fill<B>) {
        let has_more = |fill: &Fill<B>| !fill.failed && fill.next < self.segment_bytes;
        while has_more(&fill) && fill.in_flight.len() < FILLS_IN_FLIGHT {
            let bytes = self.pace.piece(self.segment_bytes - fill.next);
            if bytes == 0 {
                break;
            }
            self.pace.spend(bytes);
            let (file, offset, block) = (fill.file, fill.next, fill.zeros.clone());
            let op = DiskOp::Write { file, offset, block, bytes: bytes as usize };
            fill.in_flight.push((ops.submit(disk, Owner::Maker, op), bytes as usize));
            fill.next += bytes;
        }
        self.phase = if has_more(&fill) || !fill.in_flight.is_empty() {
            Making::Filling(fill)
        } else if fill.failed {
            ops.submit(disk, Owner::Maker, DiskOp::Close { file: fill.file });
            Making::GivingUp(fill.name)
        } else {
            ops.submit(disk, Owner::Maker, DiskOp::Flush { file: fill.file });
            Making::Flushing(fill.name, fill.file)
        };
    }

    /// Lack of space blocks the maker and removes what it has made; anything else stops the log.
    fn failed<D: Disk<Buf = B>>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        phase: Making<B>,
        id: DiskOpId,
        error: DiskError,
    ) -> Result<(), WalError> {
        let no_space = error.kind == DiskErrorKind::NoSpace;
        match phase {
            // The name may or may not exist.
            Making::Creating(name) | Making::Renaming(name) if no_space => {
                self.blocked = Some(error);
                self.remove(disk, ops, name);
            }
            Making::Filling(mut fill) if no_space => {
                self.blocked = Some(error);
                fill.landed(id);
                fill.failed = true;
                self.fill(disk, ops, fill);
            }
            // Delayed allocation may run out of space at the flush. The file is given up, not flushed again.
            Making::Flushing(name, file) if no_space => {
                self.blocked = Some(error);
                ops.submit(disk, Owner::Maker, DiskOp::Close { file });
                self.phase = Making::GivingUp(name);
            }
            Making::Removing if error.kind == DiskErrorKind::NotFound => {}
            _ => return Err(WalError::Disk { what: WHAT_MAKE, error }),
        }
        Ok(())
    }

    fn remove<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops, name: SegmentName) {
        ops.submit(disk, Owner::Maker, DiskOp::Remove { name: name.to_string() });
        self.phase = Making::Removing;
    }
}

/// The segment that the log rolls over to next.
pub(crate) struct Standby {
    phase: Readying,
    /// What it held before: as its name said when it was taken.
    prior: PriorContent,
    /// Of the segment that is being reused.
    reused: Option<SegmentHeader>,
}

enum Readying {
    Idle,
    Renaming(SegmentName),
    Syncing(SegmentName),
    Opening(SegmentName),
    /// Open, without a header that fits.
    Open(SegmentName, FileId),
    Heading(SegmentName, FileId, SegmentHeader),
    Ready(SegmentName, FileId, SegmentHeader),
}

impl Standby {
    pub(crate) fn new() -> Self {
        Self { phase: Readying::Idle, prior: PriorContent::Zeros, reused: None }
    }

    /// Whether there is none at all.
    pub(crate) fn is_idle(&self) -> bool {
        matches!(self.phase, Readying::Idle)
    }

    /// The durable header of the standby.
    pub(crate) fn header(&self) -> Option<&SegmentHeader> {
        match &self.phase {
            Readying::Ready(_, _, header) => Some(header),
            _ => None,
        }
    }

    /// Hands the segment over to the log.
    pub(crate) fn take(&mut self) -> Option<(SegmentName, FileId, SegmentHeader)> {
        match std::mem::replace(&mut self.phase, Readying::Idle) {
            Readying::Ready(name, file, header) => Some((name, file, header)),
            other => {
                self.phase = other;
                None
            }
        }
    }

    /// The descriptor, to be closed.
    pub(crate) fn take_file(&mut self) -> Option<FileId> {
        match std::mem::replace(&mut self.phase, Readying::Idle) {
            Readying::Open(_, file) | Readying::Ready(_, file, _) => Some(file),
            other => {
                self.phase = other;
                None
            }
        }
    }

    /// What the standby held before.
    pub(crate) fn prior(&self) -> PriorContent {
        self.prior
    }

    /// Moves a segment that is ready up when there is no standby.
    pub(crate) fn begin<D: Disk>(&mut self, disk: &mut D, ops: &mut Ops, ready: SegmentName) {
        debug_assert!(self.is_idle());
        let name = ready.at(Stage::InService);
        self.prior = if ready.stage == Stage::Used { PriorContent::Checksums } else { PriorContent::Zeros };
        ops.submit(disk, Owner::Standby, DiskOp::Rename { from: ready.to_string(), to: name.to_string() });
        self.phase = Readying::Renaming(name);
    }

    fn open<D: Disk>(&mut self, disk: &mut D, ops: &mut Ops, name: SegmentName) {
        let flushed = !mutants::active(Mutant::WriteNotFlushed);
        let access = if flushed { Access::DurableWrite } else { Access::Write };
        ops.submit(disk, Owner::Standby, DiskOp::Open { name: name.to_string(), access });
        self.phase = Readying::Opening(name);
    }

    /// A segment of an earlier process is opened to be gone on with: only with that bug put back.
    pub(crate) fn reuse<D: Disk>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        name: SegmentName,
        header: SegmentHeader,
    ) {
        self.reused = Some(header);
        self.open(disk, ops, name);
    }

    /// Whether a header could be written now.
    pub(crate) fn takes_header(&self) -> bool {
        matches!(self.phase, Readying::Open(..) | Readying::Ready(..))
    }

    /// Writes `header`, also over one that no longer fits: no slot has been written to a standby, and the header's
    /// sector is written whole or not at all.
    pub(crate) fn write_header<D: Disk>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        pool: &Pool<D::Buf>,
        header: SegmentHeader,
    ) -> Result<(), WalError> {
        let (name, file) = match self.phase {
            Readying::Open(name, file) | Readying::Ready(name, file, _) => (name, file),
            _ => return Ok(()),
        };
        let block = take(pool, disk, BLOCK_BYTES);
        let mut block = block.map_err(|error| WalError::Disk { what: WHAT_STANDBY, error })?;
        block[..BLOCK_BYTES].fill(0);
        write_segment_header(&mut block, &header);
        let op = DiskOp::Write { file, offset: 0, block: block.share(), bytes: BLOCK_BYTES };
        ops.submit(disk, Owner::Standby, op);
        self.phase = Readying::Heading(name, file, header);
        Ok(())
    }

    pub(crate) fn handle<D: Disk>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        done: DiskDone<D::Buf>,
    ) -> Result<(), WalError> {
        let output = done.result.map_err(|error| WalError::Disk { what: WHAT_STANDBY, error })?;
        match (std::mem::replace(&mut self.phase, Readying::Idle), output) {
            (Readying::Renaming(name), DiskOutput::Done) if mutants::active(Mutant::DirectoryNotSynced) => {
                self.open(disk, ops, name);
            }
            (Readying::Renaming(name), DiskOutput::Done) => {
                ops.submit(disk, Owner::Standby, DiskOp::SyncDirectory);
                self.phase = Readying::Syncing(name);
            }
            (Readying::Syncing(name), DiskOutput::Done) => self.open(disk, ops, name),
            (Readying::Opening(name), DiskOutput::Opened { file, .. }) => {
                self.phase = match self.reused.take() {
                    Some(header) => Readying::Ready(name, file, header),
                    None => Readying::Open(name, file),
                };
            }
            (Readying::Heading(name, file, header), DiskOutput::Written { bytes }) => {
                if bytes != BLOCK_BYTES {
                    let asked = BLOCK_BYTES;
                    return Err(WalError::ShortWrite { what: WHAT_STANDBY, asked, written: bytes });
                }
                self.phase = Readying::Ready(name, file, header);
            }
            _ => return Err(WalError::Protocol { what: WHAT_STANDBY }),
        }
        Ok(())
    }
}
