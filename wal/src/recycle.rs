//! Segments that have left service, made ready for another life without filling them with zeros again.
//!
//! The happy path of one segment, whose every write has completed: it is renamed to `.old`, durably; the checksums of what its slots
//! hold are written behind its header block, and the header block is blanked, through an ordinary (not durable)
//! descriptor with one flush; it is renamed to `.used`, durably. What this life did not write still holds what the former
//! life left there, whose checksums stand in the region already.
//!
//! Only segments that this process has written are recycled: a write of a dead process may still be on its way to any other.
//!
//! The checksums are those of what was written, and the content is not read back to compare: that would read as many bytes as the log
//! writes, for ever, to notice rot that matters only where a crash then tears the last write over it. There the torn tail looks
//! like damage to a batch that nobody acknowledged: loud, settled by asking the other members, and never unsafe. A
//! segment in which a read or the scrubber has found damage is not recycled at all.
//!
//! Failures: where the former checksums cannot be read, or there is no space, the segment is given up and removed. Any other
//! error stops the log. A crash leaves an `.old` file, removed at the next start, or a `.used` one, which is whole.

use crate::disk::{Access, Disk, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskOutput, FileId};
use crate::error::WalError;
use crate::format::{PriorContent, content_checksum, prior_checksum_at, slots_start};
use crate::ops::{Ops, Owner, take, zeros};
use crate::segment::{SectorSums, SegmentName, Stage};
use ringraft_block::{BLOCK_BYTES, Block, Pool, SECTOR_BYTES};

/// The region is read and written in pieces of at most so much: larger ones delay the log's own writes behind them.
const PIECE_BYTES: usize = 256 * 1024;

const WHAT: &str = "recycling a segment";

/// A segment that has left service.
pub(crate) struct Retired {
    /// Its name in service.
    pub(crate) name: SegmentName,
    /// Size of the file.
    pub(crate) bytes: u64,
    /// What it held before this life.
    pub(crate) prior: PriorContent,
    /// What this life has written.
    pub(crate) sums: SectorSums,
}

/// One segment at a time on its way from `.wal` to `.used`.
pub(crate) struct Recycler {
    phase: Phase,
    /// Nothing more is begun; what is half done is left for the next start to remove.
    stopped: bool,
}

enum Phase {
    Idle,
    Retiring(Retired),
    SyncingOld(Retired),
    Opening(Retired),
    /// Reading the former life's checksums into the piece of the region that begins at this offset.
    Reading(Retired, FileId, u64),
    /// Writing so much of the region at this offset.
    Writing(Retired, FileId, u64, usize),
    Blanking(SegmentName, FileId),
    Flushing(SegmentName, FileId),
    Closing(SegmentName),
    Renaming(SegmentName),
    SyncingUsed(SegmentName),
    /// Given up: closed, then removed.
    GivingUp(SegmentName),
    Removing,
    /// Stopped half way: closed.
    Leaving,
}

/// What came of a segment.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Recycled {
    /// It is ready for another life.
    Ready(SegmentName),
    /// It was given up and removed.
    Removed,
}

impl Recycler {
    pub(crate) fn new() -> Self {
        Self { phase: Phase::Idle, stopped: false }
    }

    pub(crate) fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Idle)
    }

    /// Finishes the operation that is under way and no more.
    pub(crate) fn stop(&mut self) {
        self.stopped = true;
    }

    /// Begins with a segment on which nothing is in flight and whose file is closed.
    pub(crate) fn begin<D: Disk>(&mut self, disk: &mut D, ops: &mut Ops, retired: Retired) {
        debug_assert!(self.is_idle() && !self.stopped);
        let (from, to) = (retired.name.to_string(), retired.name.at(Stage::Old).to_string());
        ops.submit(disk, Owner::Recycle, DiskOp::Rename { from, to });
        self.phase = Phase::Retiring(retired);
    }

    /// Takes a completion and starts what follows from it.
    pub(crate) fn handle<D: Disk>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        pool: &Pool<D::Buf>,
        done: DiskDone<D::Buf>,
    ) -> Result<Option<Recycled>, WalError> {
        let phase = std::mem::replace(&mut self.phase, Phase::Idle);
        let output = match done.result {
            Ok(output) => output,
            Err(error) => return self.failed(disk, ops, phase, error),
        };
        match (phase, output) {
            (Phase::Retiring(retired), DiskOutput::Done) => {
                ops.submit(disk, Owner::Recycle, DiskOp::SyncDirectory);
                self.phase = Phase::SyncingOld(retired);
            }
            // From here on the file has a name that no start reads, so it may be written to.
            (Phase::SyncingOld(_), DiskOutput::Done) if self.stopped => {}
            (Phase::SyncingOld(retired), DiskOutput::Done) => {
                let name = retired.name.at(Stage::Old).to_string();
                ops.submit(disk, Owner::Recycle, DiskOp::Open { name, access: Access::Write });
                self.phase = Phase::Opening(retired);
            }
            (Phase::Opening(retired), DiskOutput::Opened { file, .. }) => {
                self.next_piece(disk, ops, pool, retired, file, BLOCK_BYTES as u64)?;
            }
            (Phase::Reading(retired, file, at), DiskOutput::Read { block, bytes }) => {
                if bytes == piece_bytes(retired.bytes, at) {
                    self.write_piece(disk, ops, retired, file, at, block);
                } else {
                    self.give_up(disk, ops, retired.name, file);
                }
            }
            (Phase::Writing(retired, file, at, asked), DiskOutput::Written { bytes }) => {
                if bytes != asked {
                    return Err(WalError::ShortWrite { what: WHAT, asked, written: bytes });
                }
                self.next_piece(disk, ops, pool, retired, file, at + asked as u64)?;
            }
            (Phase::Blanking(name, file), DiskOutput::Written { bytes }) => {
                if bytes != BLOCK_BYTES {
                    return Err(WalError::ShortWrite { what: WHAT, asked: BLOCK_BYTES, written: bytes });
                }
                ops.submit(disk, Owner::Recycle, DiskOp::Flush { file });
                self.phase = Phase::Flushing(name, file);
            }
            (Phase::Flushing(name, file), DiskOutput::Done) => {
                ops.submit(disk, Owner::Recycle, DiskOp::Close { file });
                self.phase = Phase::Closing(name);
            }
            (Phase::Closing(name), DiskOutput::Done) => {
                let (from, to) = (name.at(Stage::Old).to_string(), name.at(Stage::Used).to_string());
                ops.submit(disk, Owner::Recycle, DiskOp::Rename { from, to });
                self.phase = Phase::Renaming(name);
            }
            (Phase::Renaming(name), DiskOutput::Done) => {
                ops.submit(disk, Owner::Recycle, DiskOp::SyncDirectory);
                self.phase = Phase::SyncingUsed(name);
            }
            (Phase::SyncingUsed(name), DiskOutput::Done) => {
                return Ok(Some(Recycled::Ready(name.at(Stage::Used))));
            }
            (Phase::GivingUp(name), DiskOutput::Done) => self.remove(disk, ops, name.at(Stage::Old)),
            (Phase::Removing, DiskOutput::Done) => return Ok(Some(Recycled::Removed)),
            (Phase::Leaving, DiskOutput::Done) => {}
            _ => return Err(WalError::Protocol { what: WHAT }),
        }
        Ok(None)
    }

    /// Goes on with the region at `at`; behind its end the header block is blanked.
    fn next_piece<D: Disk>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        pool: &Pool<D::Buf>,
        retired: Retired,
        file: FileId,
        at: u64,
    ) -> Result<(), WalError> {
        if self.stopped {
            ops.submit(disk, Owner::Recycle, DiskOp::Close { file });
            self.phase = Phase::Leaving;
            return Ok(());
        }
        let bytes = piece_bytes(retired.bytes, at);
        let block = take(pool, disk, bytes.max(BLOCK_BYTES));
        let block = block.map_err(|error| WalError::Disk { what: WHAT, error })?;
        if bytes == 0 {
            let block = zeros(block, BLOCK_BYTES);
            ops.submit(disk, Owner::Recycle, DiskOp::Write { file, offset: 0, block, bytes: BLOCK_BYTES });
            self.phase = Phase::Blanking(retired.name, file);
            return Ok(());
        }
        // What this life has not written is as the life before it left it, and so is its checksum.
        let unwritten = sector_of(at + bytes as u64) > retired.sums.end();
        if unwritten && retired.prior == PriorContent::Checksums {
            ops.submit(disk, Owner::Recycle, DiskOp::Read { file, offset: at, block, bytes });
            self.phase = Phase::Reading(retired, file, at);
        } else {
            self.write_piece(disk, ops, retired, file, at, block);
        }
        Ok(())
    }

    /// Fills the piece of the region at `at` with what is known and writes it. In a segment of a later life the block holds the
    /// former checksums of what is not.
    fn write_piece<D: Disk>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        retired: Retired,
        file: FileId,
        at: u64,
        mut block: Block<D::Buf>,
    ) {
        let bytes = piece_bytes(retired.bytes, at);
        let blank = content_checksum(&[0; SECTOR_BYTES]);
        let slots = slots_start(retired.bytes)..retired.bytes;
        for (ordinal, entry) in block[..bytes].as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let sector = sector_of(at + 4 * ordinal as u64);
            let sum = match (retired.sums.at(sector), retired.prior) {
                _ if !slots.contains(&sector) => 0,
                (Some(sum), _) => sum,
                (None, PriorContent::Zeros) => blank,
                (None, PriorContent::Checksums) => continue,
            };
            *entry = sum.to_le_bytes();
        }
        let op = DiskOp::Write { file, offset: at, block: block.share(), bytes };
        ops.submit(disk, Owner::Recycle, op);
        self.phase = Phase::Writing(retired, file, at, bytes);
    }

    /// Lack of space, or former checksums that cannot be read, cost the segment; anything else stops the log.
    fn failed<D: Disk>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        phase: Phase,
        error: DiskError,
    ) -> Result<Option<Recycled>, WalError> {
        let no_space = error.kind == DiskErrorKind::NoSpace;
        match phase {
            Phase::Retiring(retired) if no_space => self.remove(disk, ops, retired.name),
            Phase::Reading(retired, file, _) => self.give_up(disk, ops, retired.name, file),
            Phase::Writing(Retired { name, .. }, file, ..)
            | Phase::Blanking(name, file)
            | Phase::Flushing(name, file)
                if no_space =>
            {
                self.give_up(disk, ops, name, file);
            }
            Phase::Renaming(name) if no_space => self.remove(disk, ops, name.at(Stage::Old)),
            Phase::Removing if error.kind == DiskErrorKind::NotFound => return Ok(Some(Recycled::Removed)),
            _ => return Err(WalError::Disk { what: WHAT, error }),
        }
        Ok(None)
    }

    fn give_up<D: Disk>(&mut self, disk: &mut D, ops: &mut Ops, name: SegmentName, file: FileId) {
        ops.submit(disk, Owner::Recycle, DiskOp::Close { file });
        self.phase = Phase::GivingUp(name);
    }

    fn remove<D: Disk>(&mut self, disk: &mut D, ops: &mut Ops, name: SegmentName) {
        ops.submit(disk, Owner::Recycle, DiskOp::Remove { name: name.to_string() });
        self.phase = Phase::Removing;
    }
}

/// The offset of the sector whose checksum stands at `at` in the region.
fn sector_of(at: u64) -> u64 {
    (at - prior_checksum_at(0)) / 4 * SECTOR_BYTES as u64
}

/// The length of the piece of the region that begins at `at`; 0 behind its end.
fn piece_bytes(segment_bytes: u64, at: u64) -> usize {
    let left = slots_start(segment_bytes).saturating_sub(at);
    usize::try_from(left).unwrap_or(PIECE_BYTES).min(PIECE_BYTES)
}
