//! What a disk does wrong on request.

use super::{Access, BLOCK_BYTES, DiskOp, DiskState, KINDS, OpenFile, Rng, SECTOR_BYTES, error, kind_of};
use crate::sim::buffer::SimBuf;
use crate::sim::context::Time;
use crate::sim::coverage::Mark;
use ringraft_wal::disk::{DiskError, DiskErrorKind, DiskOutput};
use std::cmp::Reverse;

/// What a disk does wrong. All off by default.
#[derive(Clone, Debug)]
pub struct DiskFaults {
    /// Operations submitted from now until one fails with EIO; 0 is the next one.
    pub fail_after_ops: Option<u64>,
    /// Once an operation has failed, all do.
    pub fail_for_ever: bool,
    /// Single faults, each on an operation that is yet to be submitted.
    pub scheduled: Vec<Scheduled>,
    /// How often, in a million, a write of more than one block stops short after some whole blocks.
    pub short_write_ppm: u32,
    /// How often, in a million, a write is reported and never arrives.
    pub lost_write_ppm: u32,
    /// How often, in a million, a write goes to another place.
    pub misdirected_write_ppm: u32,
    /// How often, in a million, a read returns what is in another place.
    pub misdirected_read_ppm: u32,
    /// Every operation that needs space fails with ENOSPC.
    pub no_space: bool,
    /// Latencies are multiplied by it.
    pub slow_factor: u64,
    /// Nothing completes before this time.
    pub stalled_until: Time,
    /// How often, in a million, a write that is in flight at a kill arrives later, at its own time, whole, when
    /// the next process may be running already.
    pub late_write_ppm: u32,
}

impl Default for DiskFaults {
    fn default() -> Self {
        Self {
            fail_after_ops: None,
            fail_for_ever: false,
            scheduled: Vec::new(),
            short_write_ppm: 0,
            lost_write_ppm: 0,
            misdirected_write_ppm: 0,
            misdirected_read_ppm: 0,
            no_space: false,
            slow_factor: 1,
            stalled_until: 0,
            late_write_ppm: 0,
        }
    }
}

/// One fault, at the n-th operation of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheduled {
    /// Which operations are counted.
    pub on: On,
    /// So many of them come first; 0 is the next one.
    pub skip: u64,
    /// What happens to it. An operation to which that cannot happen is left alone.
    pub fault: Fault,
}

/// Operations that a scheduled fault counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// All.
    Any,
    /// Writes.
    Write,
    /// Flushes of files and of the directory.
    Flush,
    /// Reads.
    Read,
    /// Writes of batches: to a segment in service, behind its header.
    Batch,
}

/// A fault of one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails with EIO. What it did until then is unknown: of a write some sectors arrive, a flush drops what it should
    /// have made durable, a change of the directory happens or not.
    Io,
    /// It fails with ENOSPC, and is as unknown: writes, flushes and what makes or moves a name.
    NoSpace,
    /// Fewer bytes are written or read than asked, in whole blocks, possibly none.
    Short,
    /// It takes so much longer.
    Stall(Time),
    /// A write is reported as done and never arrives.
    Lost,
    /// A write goes elsewhere, a read returns what is elsewhere.
    Misdirected,
}

impl Fault {
    /// Whether it can happen to an operation.
    fn strikes(self, op: &DiskOp<SimBuf>) -> bool {
        let writes = matches!(op, DiskOp::Write { .. });
        let reads = matches!(op, DiskOp::Read { .. });
        match self {
            Self::Io | Self::Stall(_) => true,
            Self::NoSpace => {
                let takes_space = matches!(
                    op,
                    DiskOp::Create { .. }
                        | DiskOp::Flush { .. }
                        | DiskOp::Rename { .. }
                        | DiskOp::SyncDirectory
                );
                writes || takes_space
            }
            Self::Short | Self::Misdirected => writes || reads,
            Self::Lost => writes,
        }
    }
}

/// A batch that went elsewhere, and whose place still holds what it held before. The log's contract leaves a gap here: as long as nothing
/// later vouches for it, that looks like a write that was never made.
pub(super) struct Astray {
    inode: usize,
    /// The name of its file: another one says that it was removed, or has another life.
    name: String,
    offset: u64,
    /// Batches that were written since.
    since: u64,
}

/// So many later batches vouch for one for sure: some of them were submitted when it had completed.
const VOUCHERS: u64 = 16;

impl DiskState {
    fn counts(&self, on: On, op: &DiskOp<SimBuf>) -> bool {
        match on {
            On::Any => true,
            On::Write => matches!(op, DiskOp::Write { .. }),
            On::Flush => matches!(op, DiskOp::Flush { .. } | DiskOp::SyncDirectory),
            On::Read => matches!(op, DiskOp::Read { .. }),
            On::Batch => self.is_of_batch(op),
        }
    }

    /// Whether an operation writes a batch.
    pub(super) fn is_of_batch(&self, op: &DiskOp<SimBuf>) -> bool {
        let DiskOp::Write { file, offset, .. } = op else { return false };
        let open = self.files.get(file.0 as usize).copied().flatten();
        let segment = |open: OpenFile| {
            self.names.iter().any(|(name, inode)| *inode == open.inode && name.ends_with(".wal"))
        };
        *offset >= BLOCK_BYTES as u64
            && open.is_some_and(|open| open.access == Access::DurableWrite && segment(open))
    }

    /// A batch was written, at its own place or not.
    pub(super) fn batch_written(&mut self, astray: Option<(usize, u64)>) {
        self.astray.iter_mut().for_each(|astray| astray.since += 1);
        self.astray.retain(|astray| astray.since < VOUCHERS);
        let Some((inode, offset)) = astray else { return };
        let named = self.names.iter().find(|(_, named)| **named == inode);
        self.astray.extend(named.map(|(name, _)| Astray { inode, name: name.clone(), offset, since: 0 }));
    }

    /// The process ends. What the contract cannot promise is not asked of it: where nothing vouches for a batch that went elsewhere, its
    /// place is found damaged instead of untouched.
    pub(super) fn close_the_gap(&mut self) {
        for Astray { inode, name, offset, .. } in std::mem::take(&mut self.astray) {
            if self.names.get(&name) == Some(&inode) {
                let seed = self.rng.bits();
                self.damage(&name, offset, SECTOR_BYTES, &Rot::Garbage(seed));
            }
        }
    }

    /// What was to take longer takes no longer than it would have without: a stalled operation in flight is due when it
    /// would have been, or at once. The switches of [`DiskFaults`] cannot take that back.
    pub fn end_stalls(&mut self) {
        let queue = std::mem::take(&mut self.queue).into_iter().map(|Reverse((due, sequence, slot))| {
            let entry = self.in_flight[slot as usize].as_mut();
            let stall = entry.and_then(|entry| entry.fault.take_if(|fault| matches!(fault, Fault::Stall(_))));
            let due = if let Some(Fault::Stall(time)) = stall { due - time } else { due };
            Reverse((due, sequence, slot))
        });
        self.queue = queue.collect();
    }

    /// How many operations a fault has struck, those that only took longer included.
    #[must_use]
    pub fn faults_struck(&self) -> u64 {
        self.struck
    }

    /// The first of them: what it was to do.
    #[must_use]
    pub fn first_struck(&self) -> Option<&str> {
        self.first_struck.as_deref()
    }

    /// What happens to an operation that is submitted now. Draws nothing at random unless a fault that does is on.
    pub(super) fn fault_of(&mut self, op: &DiskOp<SimBuf>) -> Option<Fault> {
        let mut fault = None;
        match &mut self.faults.fail_after_ops {
            Some(0) => {
                if !self.faults.fail_for_ever {
                    self.faults.fail_after_ops = None;
                }
                fault = Some(Fault::Io);
            }
            Some(left) => *left -= 1,
            None => {}
        }
        let mut position = 0;
        let mut counted: Vec<bool> =
            self.faults.scheduled.iter().map(|scheduled| self.counts(scheduled.on, op)).collect();
        while let Some(scheduled) = self.faults.scheduled.get_mut(position) {
            if !counted[position] {
                position += 1;
            } else if scheduled.skip > 0 {
                scheduled.skip -= 1;
                position += 1;
            } else {
                fault = fault.or(Some(scheduled.fault));
                self.faults.scheduled.remove(position);
                counted.remove(position);
            }
        }
        let writes = matches!(op, DiskOp::Write { .. });
        let reads = matches!(op, DiskOp::Read { .. });
        if writes && self.rng.chance(self.faults.lost_write_ppm) {
            fault = fault.or(Some(Fault::Lost));
        }
        let misdirected_ppm = match (writes, reads) {
            (true, _) => self.faults.misdirected_write_ppm,
            (_, true) => self.faults.misdirected_read_ppm,
            _ => 0,
        };
        if self.rng.chance(misdirected_ppm) {
            fault = fault.or(Some(Fault::Misdirected));
        }
        let fault = fault.filter(|fault| fault.strikes(op))?;
        if self.struck == 0 {
            self.first_struck = Some(self.describe(op));
        }
        self.struck += 1;
        self.context.cover(match fault {
            Fault::Lost => Mark::LostWrite,
            Fault::Misdirected => Mark::Misdirected,
            _ => Mark::DiskFault,
        });
        Some(fault)
    }

    /// An operation that fails, with what it does all the same.
    pub(super) fn fail(
        &mut self,
        op: DiskOp<SimBuf>,
        inode: Option<usize>,
        covers: u64,
        kind: DiskErrorKind,
    ) -> DiskError {
        let error = error(kind, kind_of(&op));
        match (op, inode) {
            (DiskOp::Write { offset, block, bytes, .. }, Some(inode)) => {
                self.tear(inode, offset, &block[..bytes]);
            }
            (DiskOp::Flush { .. }, Some(inode)) => {
                // What a failed flush leaves is unknown: here, nothing of what it should have made durable.
                self.inode_mut(inode).unflushed.retain(|write| write.sequence > covers);
            }
            (op @ DiskOp::Create { .. }, _) => {
                if self.rng.chance(500_000)
                    && let Ok(DiskOutput::Opened { file, .. }) = self.act(op, None, covers)
                {
                    self.files[file.0 as usize] = None;
                }
            }
            (op @ (DiskOp::Rename { .. } | DiskOp::Remove { .. } | DiskOp::SyncDirectory), _)
                if self.rng.chance(500_000) =>
            {
                let _ = self.act(op, None, covers);
            }
            _ => {}
        }
        error
    }

    /// How much of `bytes` is written or read by an operation that stops short.
    pub(super) fn cut_short(&mut self, bytes: usize) -> usize {
        BLOCK_BYTES * self.rng.index((bytes / BLOCK_BYTES).max(1))
    }

    /// Another place for `bytes`, in any file, but for a batch in none that holds more than the log: where a misdirected operation goes.
    pub(super) fn elsewhere(
        &mut self,
        inode: usize,
        offset: u64,
        bytes: usize,
        is_batch: bool,
    ) -> (usize, u64) {
        let mut places = Vec::new();
        for (name, other) in &self.names {
            if is_batch && name.starts_with("hard") {
                continue;
            }
            let size = self.inodes[*other].as_ref().map_or(0, |inode| inode.bytes);
            let blocks = (size + BLOCK_BYTES as u64).saturating_sub(bytes as u64) / BLOCK_BYTES as u64;
            let at = self.rng.below(blocks) * BLOCK_BYTES as u64;
            if blocks > 0 && (*other, at) != (inode, offset) {
                places.push((*other, at));
            }
        }
        if places.is_empty() { (inode, offset) } else { places[self.rng.index(places.len())] }
    }
}

/// What happens to content at rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rot {
    /// One bit of the first byte of the range flips.
    Flip(u8),
    /// Random bytes of this seed.
    Garbage(u64),
    /// Zeros.
    Zero,
    /// These bytes, repeated to the end of the range: what was there before, or belongs to another place.
    Content(Vec<u8>),
    /// The device cannot read the sectors until they are written again.
    Unreadable,
}

impl DiskState {
    /// Damages `bytes` at `offset` of a file at rest: what a process would read there, durable from then on.
    ///
    /// # Panics
    /// When there is no such file, or the range is not within it.
    pub fn damage(&mut self, name: &str, offset: u64, bytes: usize, rot: &Rot) {
        self.context.cover(Mark::Rot);
        let inode = *self.names.get(name).unwrap_or_else(|| panic!("{name} exists"));
        let file = self.inode_mut(inode);
        let sector_bytes = SECTOR_BYTES as u64;
        let start = offset - offset % sector_bytes;
        let end = (offset + bytes as u64).next_multiple_of(sector_bytes);
        assert!(bytes > 0 && end <= file.bytes, "{name} holds {offset}+{bytes}");
        if *rot == Rot::Unreadable {
            file.unreadable.extend(start / sector_bytes..end / sector_bytes);
            return;
        }
        let mut content = vec![0; (end - start) as usize];
        file.read(start, &mut content);
        let range = (offset - start) as usize..(offset - start) as usize + bytes;
        match rot {
            Rot::Flip(bit) => content[range.start] ^= 1 << (bit & 7),
            Rot::Garbage(seed) => Rng::new(*seed).fill(&mut content[range]),
            Rot::Zero => content[range].fill(0),
            Rot::Content(with) => {
                for (byte, new) in content[range].iter_mut().zip(with.iter().cycle()) {
                    *byte = *new;
                }
            }
            Rot::Unreadable => {}
        }
        let unreadable = std::mem::take(&mut file.unreadable);
        file.supersede(start, content.len());
        file.write_durable(start, &content);
        file.unreadable = unreadable;
    }

    /// Whether a process would find a file of this name.
    #[must_use]
    pub fn has_file(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// Somewhere in the content of the log's segments: a file and a sector in it that is not blank, if there is one.
    pub fn place_in_log(&self, rng: &mut Rng) -> Option<(String, u64)> {
        let mut places = Vec::new();
        for (name, inode) in self.names.iter().filter(|(name, _)| !name.starts_with("hard")) {
            let pages = self.inodes[*inode].as_ref().map(|inode| inode.pages.as_slice()).unwrap_or_default();
            // The first page is the header: without it the whole segment is lost, which is for other tests to try.
            let written = pages.iter().enumerate().skip(1).filter(|(_, page)| page.is_some());
            places.extend(written.map(|(page, _)| (name, page)));
        }
        let (name, page) = *places.get(rng.below(places.len() as u64) as usize)?;
        let sector = rng.below((BLOCK_BYTES / SECTOR_BYTES) as u64 - 1);
        Some((name.clone(), page as u64 * BLOCK_BYTES as u64 + sector * SECTOR_BYTES as u64))
    }

    /// Where the last write to the log began that was not of zeros: a file and a sector in it.
    #[must_use]
    pub fn last_place_in_log(&self) -> Option<(String, u64)> {
        let (inode, offset) = self.last_write?;
        let (name, _) = self.names.iter().find(|(name, of)| **of == inode && !name.starts_with("hard"))?;
        Some((name.clone(), offset))
    }

    /// Flips one bit of a file: rot.
    ///
    /// # Panics
    /// When there is no such file.
    pub fn flip_bit(&mut self, name: &str, offset: u64, bit: u8) {
        self.damage(name, offset, 1, &Rot::Flip(bit));
    }
}

/// The name of an operation's kind, as traced. The outcome is in the bits above the lowest four.
pub(in crate::sim) fn name_of_kind(kind: u64) -> &'static str {
    KINDS.get((kind & 15) as usize).copied().unwrap_or("unknown")
}
