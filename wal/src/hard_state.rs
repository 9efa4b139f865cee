//! Two copies of what must survive besides the log, in `hard-a` and `hard-b`.
//!
//! The happy path of a save: encode, write `hard-a` durably, write `hard-b` durably, report. Nothing may act on a value
//! before both hold it. Saves that are asked for while one is under way are coalesced into the next. When one copy is known to be
//! rotten, it is the first to be written: a write may be torn, and the other is all there is.
//!
//! The first save of every start makes both files anew (under a temporary name, renamed into place), first the one, then
//! the other. So formatting, repairing a damaged copy and starting are one procedure; a file under its final name was
//! always complete once; and a write that a dead process left in flight ends in a file that has lost its name.
//!
//! Failures: no space for a new file leaves the store blocked, with nothing changed, until somebody has made room and asks to try
//! again. Any other failed or short operation stops the log for good. Once both files are there, saves take no space.

use crate::disk::{Access, Disk, DiskDone, DiskErrorKind, DiskOp, DiskOutput, FileId};
use crate::error::WalError;
use crate::format::{HARD_STATE_FILE_BYTES, HardState, write_hard_state};
use crate::mutants::{self, Mutant};
use crate::ops::{Ops, Owner, take};
use crate::scrub::AtRest;
use ringraft_block::{BlockBuf, Pool, SharedBlock};

/// The names of the copies.
pub(crate) const COPY_NAMES: [&str; 2] = ["hard-a", "hard-b"];
/// The names under which they are made.
pub(crate) const COPY_NAMES_NEW: [&str; 2] = ["hard-a.new", "hard-b.new"];

const WHAT: &str = "saving the hard state";

/// Where a save stands.
enum Phase<B: BlockBuf> {
    Idle,
    /// Creating the temporary file of this copy.
    Creating(Save<B>),
    /// There was no space for it: removing what may be there of it.
    Clearing(Save<B>),
    /// Waiting for space.
    Blocked(Save<B>),
    Writing(Save<B>),
    Renaming(Save<B>),
    Syncing(Save<B>),
}

struct Save<B: BlockBuf> {
    block: SharedBlock<B>,
    bytes: usize,
    sequence: u64,
    /// 0 for `hard-a`, 1 for `hard-b`.
    copy: usize,
    /// The other one comes behind it.
    is_first: bool,
    /// The copy is being made anew.
    anew: bool,
}

/// The desired state, and the machine that makes it durable.
pub(crate) struct HardStateStore<B: BlockBuf> {
    /// What is to be durable. Change it, then call [`Self::request`].
    pub(crate) state: HardState,
    durable_sequence: u64,
    files: [Option<FileId>; 2],
    /// The copy that the next save writes first.
    first: usize,
    phase: Phase<B>,
}

impl<B: BlockBuf> HardStateStore<B> {
    /// A store whose copies on disk hold `state` at most; both are made anew by the first save.
    pub(crate) fn new(state: HardState) -> Self {
        let durable_sequence = state.sequence;
        Self { state, durable_sequence, files: [None, None], first: 0, phase: Phase::Idle }
    }

    /// Asks for the present state to be saved; it is durable once [`Self::durable_sequence`] has reached the number.
    pub(crate) fn request(&mut self) -> u64 {
        self.state.sequence += 1;
        self.state.sequence
    }

    /// As [`Self::request`], with this copy first: it is rotten, and the other one is to stay as it is until it is not.
    pub(crate) fn request_from(&mut self, copy: usize) {
        self.first = copy;
        self.request();
    }

    /// What both files hold, while nothing is being saved.
    pub(crate) fn at_rest(&self) -> Option<AtRest<'_>> {
        match self.files {
            [Some(a), Some(b)] if self.is_quiet() => Some(AtRest { state: &self.state, files: [a, b] }),
            _ => None,
        }
    }

    pub(crate) fn durable_sequence(&self) -> u64 {
        self.durable_sequence
    }

    /// Whether nothing is under way or asked for.
    pub(crate) fn is_quiet(&self) -> bool {
        matches!(self.phase, Phase::Idle) && self.durable_sequence == self.state.sequence
    }

    /// Whether it waits for space to make its files.
    pub(crate) fn is_blocked(&self) -> bool {
        matches!(self.phase, Phase::Blocked(_))
    }

    /// Space may have come back.
    pub(crate) fn retry<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops) {
        match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Blocked(save) => self.begin_copy(disk, ops, save),
            other => self.phase = other,
        }
    }

    /// The descriptors, to be closed.
    pub(crate) fn take_files(&mut self) -> impl Iterator<Item = FileId> {
        std::mem::take(&mut self.files).into_iter().flatten()
    }

    /// Starts the next save when one is asked for and none is under way.
    pub(crate) fn advance<D: Disk<Buf = B>>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        pool: &Pool<B>,
    ) -> Result<(), WalError> {
        if !matches!(self.phase, Phase::Idle) || self.durable_sequence == self.state.sequence {
            return Ok(());
        }
        let mut block =
            take(pool, disk, HARD_STATE_FILE_BYTES).map_err(|error| WalError::Disk { what: WHAT, error })?;
        let bytes = write_hard_state(&mut block, &self.state);
        let sequence = self.state.sequence;
        let copy = std::mem::take(&mut self.first);
        let save = Save { block: block.share(), bytes, sequence, copy, is_first: true, anew: false };
        self.begin_copy(disk, ops, save);
        Ok(())
    }

    pub(crate) fn handle<D: Disk<Buf = B>>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        done: DiskDone<B>,
    ) -> Result<(), WalError> {
        let phase = std::mem::replace(&mut self.phase, Phase::Idle);
        let output = match (done.result, phase) {
            (Err(error), Phase::Creating(save)) if error.kind == DiskErrorKind::NoSpace => {
                let name = COPY_NAMES_NEW[save.copy].to_owned();
                ops.submit(disk, Owner::HardState, DiskOp::Remove { name });
                self.phase = Phase::Clearing(save);
                return Ok(());
            }
            (Err(error), Phase::Clearing(save)) if error.kind == DiskErrorKind::NotFound => {
                self.phase = Phase::Blocked(save);
                return Ok(());
            }
            (Err(error), _) => return Err(WalError::Disk { what: WHAT, error }),
            (Ok(output), phase) => (phase, output),
        };
        match output {
            (Phase::Clearing(save), DiskOutput::Done) => self.phase = Phase::Blocked(save),
            (Phase::Creating(save), DiskOutput::Opened { file, .. }) => {
                self.files[save.copy] = Some(file);
                self.write(disk, ops, file, save);
            }
            (Phase::Writing(save), DiskOutput::Written { bytes }) => {
                if bytes != save.bytes {
                    return Err(WalError::ShortWrite { what: WHAT, asked: save.bytes, written: bytes });
                }
                if save.anew {
                    let from = COPY_NAMES_NEW[save.copy].to_owned();
                    let to = COPY_NAMES[save.copy].to_owned();
                    ops.submit(disk, Owner::HardState, DiskOp::Rename { from, to });
                    self.phase = Phase::Renaming(save);
                } else {
                    self.end_copy(disk, ops, save);
                }
            }
            (Phase::Renaming(save), DiskOutput::Done) => {
                ops.submit(disk, Owner::HardState, DiskOp::SyncDirectory);
                self.phase = Phase::Syncing(save);
            }
            (Phase::Syncing(save), DiskOutput::Done) => self.end_copy(disk, ops, save),
            _ => return Err(WalError::Protocol { what: WHAT }),
        }
        Ok(())
    }

    fn begin_copy<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops, mut save: Save<B>) {
        match self.files[save.copy] {
            Some(file) => self.write(disk, ops, file, save),
            None => {
                save.anew = true;
                let name = COPY_NAMES_NEW[save.copy].to_owned();
                let bytes = HARD_STATE_FILE_BYTES as u64;
                let op = DiskOp::Create { name, bytes, access: Access::DurableWrite };
                ops.submit(disk, Owner::HardState, op);
                self.phase = Phase::Creating(save);
            }
        }
    }

    fn write<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops, file: FileId, save: Save<B>) {
        let block = save.block.clone();
        let op = DiskOp::Write { file, offset: 0, block, bytes: save.bytes };
        ops.submit(disk, Owner::HardState, op);
        self.phase = Phase::Writing(save);
    }

    fn end_copy<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops, save: Save<B>) {
        if save.is_first && !mutants::active(Mutant::HardStateInOneCopy) {
            self.begin_copy(disk, ops, Save { copy: 1 - save.copy, is_first: false, anew: false, ..save });
        } else {
            self.durable_sequence = save.sequence;
        }
    }
}
