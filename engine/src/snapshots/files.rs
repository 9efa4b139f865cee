//! Snapshot files through the disk seam: making one, and reading one, an operation at a time.
//!
//! Making ([`Part`]): create under a temporary name, with room for all of it; write; flush; close; read all of it back and
//! verify; and only when the owner says so, rename and sync the directory. A failure at any step removes the file, and
//! leaves everything else as it was: none of it is the log's. One that a later process is to go on with is made durable
//! with its name before the first write, and can be flushed in between.
//!
//! Reading ([`Reading`]): header, slots, trailer, each verified before anybody sees it. The owner asks for the next slot, so
//! that work is bounded per turn.

use super::{Decoder, SLOT_READ_BYTES, SnapshotDamage, SnapshotFile};
use crate::raft::LogId;
use ringraft_block::{BLOCK_BYTES, Block, BlockBuf, ClusterId, Pool, SharedBlock};
use ringraft_wal::disk::{
    Access, Disk, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId,
};
use ringraft_wal::format::Chain;
use std::ops::Range;

/// The top byte of every id of an operation on snapshots.
const TAG: u64 = 0x53;

/// Whether the completion of `id` is for snapshots.
pub(crate) fn owns(id: DiskOpId) -> bool {
    id.0 >> 56 == TAG
}

/// Names operations.
#[derive(Default)]
pub(crate) struct Ops {
    next: u64,
    pub(crate) in_flight: usize,
}

impl Ops {
    pub(crate) fn submit<D: Disk>(&mut self, disk: &mut D, op: DiskOp<D::Buf>) -> DiskOpId {
        let id = DiskOpId(TAG << 56 | (self.next & 0xff_ffff_ffff_ffff));
        self.next = self.next.wrapping_add(1);
        self.in_flight += 1;
        disk.submit(id, op);
        id
    }

    pub(crate) fn ended(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }
}

/// What is needed to go on.
pub(crate) struct Tools<'a, D: Disk> {
    pub(crate) disk: &'a mut D,
    pub(crate) pool: &'a Pool<D::Buf>,
    pub(crate) ops: &'a mut Ops,
}

impl<D: Disk> Tools<'_, D> {
    pub(crate) fn block(&mut self, bytes: usize) -> Result<Block<D::Buf>, FileFailure> {
        self.pool.take(bytes, |bytes| self.disk.allocate(bytes)).map_err(FileFailure::Disk)
    }

    pub(crate) fn submit(&mut self, op: DiskOp<D::Buf>) -> DiskOpId {
        self.ops.submit(self.disk, op)
    }
}

/// Why a file could not be made or read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FileFailure {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Damaged(#[from] SnapshotDamage),
    #[error("a write was cut short")]
    Short,
    #[error("what was read back is another snapshot")]
    Other,
    /// Of the state machine, in its words.
    #[error("{0}")]
    Machine(String),
}

/// Reads a file to its end.
pub(crate) struct Reading {
    cluster: ClusterId,
    phase: ReadPhase,
    op: Option<DiskOpId>,
    file: Option<FileId>,
    decoder: Option<Box<Decoder>>,
    outcome: Option<Result<SnapshotFile, FileFailure>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ReadPhase {
    Opening,
    Header,
    /// Waits to be asked for the next slot.
    Idle,
    Slot,
    Closing,
}

/// What came of a completion.
pub(crate) enum ReadStep<B: BlockBuf> {
    /// Nothing yet.
    Pending,
    /// These bytes of the block are the state machine's; ask for more with [`Reading::next`].
    State(Block<B>, Range<usize>),
    /// It is closed, and this is what it is.
    Ended(Result<SnapshotFile, FileFailure>),
}

impl Reading {
    pub(crate) fn open<D: Disk>(tools: &mut Tools<'_, D>, cluster: ClusterId, name: String) -> Self {
        let op = tools.submit(DiskOp::Open { name, access: Access::Read });
        Self { cluster, phase: ReadPhase::Opening, op: Some(op), file: None, decoder: None, outcome: None }
    }

    pub(crate) fn awaits(&self, id: DiskOpId) -> bool {
        self.op == Some(id)
    }

    /// What the file is of, and up to where its bytes have turned out right. None before the header has.
    pub(crate) fn verified(&self) -> Option<(LogId, Chain, u64)> {
        let decoder = self.decoder.as_ref()?;
        let (last, chain) = decoder.position();
        Some((last, chain, decoder.offset()))
    }

    /// Whether it waits for [`Self::next`].
    pub(crate) fn is_idle(&self) -> bool {
        self.phase == ReadPhase::Idle
    }

    /// Reads the next slot, if it waits for that.
    pub(crate) fn next<D: Disk>(&mut self, tools: &mut Tools<'_, D>) {
        let (ReadPhase::Idle, Some(file), Some(decoder)) = (self.phase, self.file, &self.decoder) else {
            return;
        };
        let offset = decoder.offset();
        self.read(tools, file, offset, SLOT_READ_BYTES, ReadPhase::Slot);
    }

    /// Nobody wants the rest.
    pub(crate) fn stop<D: Disk>(&mut self, tools: &mut Tools<'_, D>, why: FileFailure) {
        self.end(tools, Err(why));
    }

    fn read<D: Disk>(
        &mut self,
        tools: &mut Tools<'_, D>,
        file: FileId,
        offset: u64,
        bytes: usize,
        phase: ReadPhase,
    ) {
        match tools.block(bytes) {
            Ok(block) => {
                self.op = Some(tools.submit(DiskOp::Read { file, offset, block, bytes }));
                self.phase = phase;
            }
            Err(error) => self.end(tools, Err(error)),
        }
    }

    fn end<D: Disk>(&mut self, tools: &mut Tools<'_, D>, outcome: Result<SnapshotFile, FileFailure>) {
        self.outcome.get_or_insert(outcome);
        self.phase = ReadPhase::Closing;
        self.op = self.file.take().map(|file| tools.submit(DiskOp::Close { file }));
    }

    fn ended<B: BlockBuf>(&mut self) -> ReadStep<B> {
        self.op = None;
        ReadStep::Ended(self.outcome.take().unwrap_or(Err(SnapshotDamage::Trailer.into())))
    }

    /// Takes the completion that it awaits.
    pub(crate) fn handle<D: Disk>(
        &mut self,
        tools: &mut Tools<'_, D>,
        done: DiskDone<D::Buf>,
    ) -> ReadStep<D::Buf> {
        self.op = None;
        let step = match (self.phase, done.result) {
            (ReadPhase::Closing, _) => return self.ended(),
            (ReadPhase::Opening, Ok(DiskOutput::Opened { file, .. })) => {
                self.file = Some(file);
                self.read(tools, file, 0, BLOCK_BYTES, ReadPhase::Header);
                ReadStep::Pending
            }
            (ReadPhase::Header, Ok(DiskOutput::Read { block, bytes })) => {
                match Decoder::new(self.cluster, block.get(..bytes).unwrap_or_default()) {
                    Ok(decoder) => {
                        self.decoder = Some(Box::new(decoder));
                        self.phase = ReadPhase::Idle;
                        ReadStep::Pending
                    }
                    Err(damage) => {
                        self.end(tools, Err(damage.into()));
                        ReadStep::Pending
                    }
                }
            }
            (ReadPhase::Slot, Ok(DiskOutput::Read { block, bytes })) => {
                let slot =
                    self.decoder.as_mut().map(|decoder| decoder.slot(block.get(..bytes).unwrap_or_default()));
                match slot {
                    Some(Ok(slot)) => {
                        self.phase = ReadPhase::Idle;
                        if let Some(end) = slot.end {
                            self.end(tools, Ok(end));
                        }
                        ReadStep::State(block, slot.state)
                    }
                    Some(Err(damage)) => {
                        self.end(tools, Err(damage.into()));
                        ReadStep::Pending
                    }
                    None => ReadStep::Pending,
                }
            }
            (_, Err(error)) => {
                self.end(tools, Err(error.into()));
                ReadStep::Pending
            }
            (_, Ok(_)) => {
                self.end(tools, Err(SnapshotDamage::Header.into()));
                ReadStep::Pending
            }
        };
        // Without a file there is nothing to close.
        if self.phase == ReadPhase::Closing && self.op.is_none() {
            return self.ended();
        }
        step
    }
}

/// A file that is being made.
pub(crate) struct Part {
    cluster: ClusterId,
    name: String,
    phase: PartPhase,
    op: Option<DiskOpId>,
    file: Option<FileId>,
    bytes: u64,
    /// What an operation under way has to have written.
    writing: usize,
    failure: Option<FileFailure>,
}

enum PartPhase {
    Creating {
        durably: bool,
    },
    /// Its size and then its name are made durable.
    Settling,
    Naming,
    Reopening,
    Open,
    Writing,
    /// What is written so far is made durable.
    Saving,
    Flushing,
    Closing,
    Verifying(Reading),
    /// Durable under its temporary name.
    Verified(SnapshotFile),
    Renaming(SnapshotFile),
    Syncing(SnapshotFile),
    Removing,
}

/// What came of a completion.
pub(crate) enum PartStep {
    /// Nothing yet.
    Pending,
    /// The next write can be given.
    Ready,
    /// All of it is durable and verified: [`Part::publish`] makes it count.
    Verified,
    /// It has its final name, durably.
    Published(SnapshotFile),
    /// It came to nothing, and is removed.
    Failed(FileFailure),
}

impl Part {
    /// Makes a file with room for `bytes`.
    pub(crate) fn create<D: Disk>(
        tools: &mut Tools<'_, D>,
        cluster: ClusterId,
        name: &str,
        bytes: u64,
    ) -> Self {
        let bytes = bytes.next_multiple_of(BLOCK_BYTES as u64);
        let create = DiskOp::Create { name: name.to_owned(), bytes, access: Access::Write };
        Self::begin(tools, cluster, name, bytes, PartPhase::Creating { durably: false }, create)
    }

    /// As [`Self::create`]; a later process finds the file by its name.
    pub(crate) fn create_durably<D: Disk>(
        tools: &mut Tools<'_, D>,
        cluster: ClusterId,
        name: &str,
        bytes: u64,
    ) -> Self {
        let part = Self::create(tools, cluster, name, bytes);
        Self { phase: PartPhase::Creating { durably: true }, ..part }
    }

    /// Goes on with a file that an earlier process has made. Fails, and removes it, if it has not got room for `bytes`.
    pub(crate) fn reopen<D: Disk>(
        tools: &mut Tools<'_, D>,
        cluster: ClusterId,
        name: &str,
        bytes: u64,
    ) -> Self {
        let open = DiskOp::Open { name: name.to_owned(), access: Access::Write };
        Self::begin(tools, cluster, name, bytes, PartPhase::Reopening, open)
    }

    /// Only removes a file that an earlier process has made, and fails.
    pub(crate) fn remove<D: Disk>(tools: &mut Tools<'_, D>, cluster: ClusterId, name: &str) -> Self {
        let remove = DiskOp::Remove { name: name.to_owned() };
        let part = Self::begin(tools, cluster, name, 0, PartPhase::Removing, remove);
        Self { failure: Some(FileFailure::Other), ..part }
    }

    fn begin<D: Disk>(
        tools: &mut Tools<'_, D>,
        cluster: ClusterId,
        name: &str,
        bytes: u64,
        phase: PartPhase,
        op: DiskOp<D::Buf>,
    ) -> Self {
        let (name, op) = (name.to_owned(), Some(tools.submit(op)));
        Self { cluster, name, phase, op, file: None, bytes, writing: 0, failure: None }
    }

    pub(crate) fn awaits(&self, id: DiskOpId) -> bool {
        match &self.phase {
            PartPhase::Verifying(reading) => reading.awaits(id),
            _ => self.op == Some(id),
        }
    }

    /// Whether a write can be given.
    pub(crate) fn is_ready(&self) -> bool {
        matches!(self.phase, PartPhase::Open)
    }

    /// Whether it waits for [`Self::publish`], and what it is.
    pub(crate) fn verified(&self) -> Option<&SnapshotFile> {
        match &self.phase {
            PartPhase::Verified(file) => Some(file),
            _ => None,
        }
    }

    /// Writes a part of a file that is ready.
    pub(crate) fn write<D: Disk>(
        &mut self,
        tools: &mut Tools<'_, D>,
        offset: u64,
        block: SharedBlock<D::Buf>,
        bytes: usize,
    ) {
        let Some(file) = self.file.filter(|_| self.is_ready()) else { return };
        if offset.saturating_add(bytes as u64) > self.bytes {
            return self.fail(tools, FileFailure::Short);
        }
        self.writing = bytes;
        self.phase = PartPhase::Writing;
        self.op = Some(tools.submit(DiskOp::Write { file, offset, block, bytes }));
    }

    /// Makes durable what has been written to a file that is ready.
    pub(crate) fn flush<D: Disk>(&mut self, tools: &mut Tools<'_, D>) {
        let Some(file) = self.file.filter(|_| self.is_ready()) else { return };
        self.phase = PartPhase::Saving;
        self.op = Some(tools.submit(DiskOp::Flush { file }));
    }

    /// Everything is written.
    pub(crate) fn finish<D: Disk>(&mut self, tools: &mut Tools<'_, D>) {
        let Some(file) = self.file.filter(|_| self.is_ready()) else { return };
        self.phase = PartPhase::Flushing;
        self.op = Some(tools.submit(DiskOp::Flush { file }));
    }

    /// Gives a verified file its final name.
    pub(crate) fn publish<D: Disk>(&mut self, tools: &mut Tools<'_, D>) {
        match std::mem::replace(&mut self.phase, PartPhase::Removing) {
            PartPhase::Verified(file) => {
                let to = super::name_of(file.meta.last.index);
                self.op = Some(tools.submit(DiskOp::Rename { from: self.name.clone(), to }));
                self.phase = PartPhase::Renaming(file);
            }
            other => self.phase = other,
        }
    }

    /// Reads on while it is being verified: one slot for each call.
    pub(crate) fn verify_on<D: Disk>(&mut self, tools: &mut Tools<'_, D>) {
        if let PartPhase::Verifying(reading) = &mut self.phase {
            reading.next(tools);
        }
    }

    /// Gives it up: what is under way ends, and the file is removed.
    pub(crate) fn fail<D: Disk>(&mut self, tools: &mut Tools<'_, D>, failure: FileFailure) {
        self.failure.get_or_insert(failure);
        match &mut self.phase {
            PartPhase::Open | PartPhase::Verified(_) => self.close_or_remove(tools),
            PartPhase::Verifying(reading) if reading.is_idle() => reading.stop(tools, FileFailure::Short),
            // At its completion.
            _ => {}
        }
    }

    fn close_or_remove<D: Disk>(&mut self, tools: &mut Tools<'_, D>) {
        let op = match self.file.take() {
            Some(file) => {
                self.phase = PartPhase::Closing;
                DiskOp::Close { file }
            }
            None => {
                self.phase = PartPhase::Removing;
                DiskOp::Remove { name: self.name.clone() }
            }
        };
        self.op = Some(tools.submit(op));
    }

    /// Takes the completion that it awaits.
    pub(crate) fn handle<D: Disk>(&mut self, tools: &mut Tools<'_, D>, done: DiskDone<D::Buf>) -> PartStep {
        if let PartPhase::Verifying(reading) = &mut self.phase {
            match reading.handle(tools, done) {
                ReadStep::Ended(Ok(file)) if self.failure.is_none() => {
                    self.phase = PartPhase::Verified(file);
                    return PartStep::Verified;
                }
                ReadStep::Ended(outcome) => {
                    self.failure.get_or_insert(outcome.err().unwrap_or(FileFailure::Short));
                    self.close_or_remove(tools);
                }
                _ => {}
            }
            return PartStep::Pending;
        }
        self.op = None;
        let phase = std::mem::replace(&mut self.phase, PartPhase::Removing);
        match (phase, done.result) {
            (PartPhase::Removing, _) => {
                return PartStep::Failed(self.failure.take().unwrap_or(FileFailure::Short));
            }
            (PartPhase::Creating { durably: true }, Ok(DiskOutput::Opened { file, .. })) => {
                self.file = Some(file);
                self.phase = PartPhase::Settling;
                self.op = Some(tools.submit(DiskOp::Flush { file }));
                return PartStep::Pending;
            }
            (PartPhase::Settling, Ok(DiskOutput::Done)) => {
                self.phase = PartPhase::Naming;
                self.op = Some(tools.submit(DiskOp::SyncDirectory));
                return PartStep::Pending;
            }
            (PartPhase::Naming | PartPhase::Saving, Ok(DiskOutput::Done)) => self.phase = PartPhase::Open,
            (PartPhase::Creating { .. }, Ok(DiskOutput::Opened { file, .. })) => {
                self.file = Some(file);
                self.phase = PartPhase::Open;
            }
            (PartPhase::Reopening, Ok(DiskOutput::Opened { file, bytes })) => {
                self.file = Some(file);
                self.phase = PartPhase::Open;
                if bytes < self.bytes {
                    self.failure.get_or_insert(FileFailure::Short);
                }
            }
            (PartPhase::Creating { .. }, Err(error)) if error.kind == DiskErrorKind::NoSpace => {
                // Nothing was made of it.
                return PartStep::Failed(error.into());
            }
            (PartPhase::Writing, Ok(DiskOutput::Written { bytes })) => {
                self.phase = PartPhase::Open;
                if bytes != self.writing {
                    self.failure.get_or_insert(FileFailure::Short);
                }
            }
            (PartPhase::Flushing, Ok(DiskOutput::Done)) => self.close_or_remove(tools),
            (PartPhase::Closing, Ok(DiskOutput::Done)) if self.failure.is_none() => {
                self.phase = PartPhase::Verifying(Reading::open(tools, self.cluster, self.name.clone()));
            }
            (PartPhase::Renaming(file), Ok(DiskOutput::Done)) => {
                self.op = Some(tools.submit(DiskOp::SyncDirectory));
                self.phase = PartPhase::Syncing(file);
                return PartStep::Pending;
            }
            (PartPhase::Syncing(file), Ok(DiskOutput::Done)) => return PartStep::Published(file),
            // It has its name, though perhaps not durably: it does not count, and the next start finds it or not.
            (PartPhase::Syncing(_), Err(error)) => return PartStep::Failed(error.into()),
            (_, Err(error)) => {
                self.failure.get_or_insert(error.into());
                self.close_or_remove(tools);
                return PartStep::Pending;
            }
            (_, Ok(_)) => {
                self.failure.get_or_insert(FileFailure::Short);
                self.close_or_remove(tools);
                return PartStep::Pending;
            }
        }
        match self.phase {
            PartPhase::Open if self.failure.is_some() => self.close_or_remove(tools),
            PartPhase::Open => return PartStep::Ready,
            _ => {}
        }
        PartStep::Pending
    }
}
