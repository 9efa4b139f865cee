//! What a crash leaves.

use super::{DirectoryOp, DiskState, apply_directory_op};
use crate::sim::context::Time;
use crate::sim::coverage::Mark;
use crate::sim::rng::Rng;
use crate::sim::trace::What;
use ringraft_block::{BLOCK_BYTES, SECTOR_BYTES};
use ringraft_wal::disk::DiskOp;
use std::cmp::Reverse;

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// kill -9: the machine goes on.
    Kill,
    /// The machine loses power.
    PowerCut,
}

/// A late write of a process that was killed.
#[derive(Clone)]
pub(super) struct Late {
    due: Time,
    pub(super) inode: usize,
    offset: u64,
    data: Vec<u8>,
}

impl DiskState {
    /// Some sectors of `data` arrive, not durable.
    pub(super) fn tear(&mut self, inode: usize, offset: u64, data: &[u8]) {
        let survivors = Survivors::draw(&mut self.rng, data.len() / SECTOR_BYTES);
        self.completed += 1;
        let sequence = self.completed;
        for (position, sector) in data.chunks_exact(SECTOR_BYTES).enumerate() {
            if survivors.holds(position) {
                let offset = offset + (position * SECTOR_BYTES) as u64;
                self.inode_mut(inode).write_unflushed(sequence, offset, sector.to_vec());
            }
        }
        if survivors.partial() {
            self.context.cover(Mark::TornWrite);
        }
    }

    /// The process ends, and with a power cut the machine: see the module's rules.
    pub fn crash(&mut self, how: Crash) {
        self.settle();
        let now = self.context.now();
        let mut writes = Vec::new();
        for Reverse((due, _, slot)) in std::mem::take(&mut self.queue).into_sorted_vec() {
            let entry = self.in_flight[slot as usize].take().expect("a queued operation is in flight");
            match (entry.op, entry.inode) {
                (DiskOp::Write { offset, block, bytes, .. }, Some(inode)) => {
                    writes.push((due, inode, offset, block, bytes));
                }
                (DiskOp::Flush { .. }, Some(inode)) if self.rng.chance(500_000) => {
                    self.inode_mut(inode).flush(entry.covers);
                }
                _ => {}
            }
        }
        if !writes.is_empty() {
            self.context.cover(Mark::CrashWithPendingWrites);
        }
        self.context.record(self.node, What::DiskCrash, writes.len() as u64, self.unsynced.len() as u64);
        // They reach the device in any order.
        while !writes.is_empty() {
            let (due, inode, offset, block, bytes) = writes.swap_remove(self.rng.index(writes.len()));
            if how == Crash::Kill && self.rng.chance(self.faults.late_write_ppm) {
                self.late.push(Late { due: due.max(now), inode, offset, data: block[..bytes].to_vec() });
            } else {
                let fits = (self.inode_mut(inode).bytes.saturating_sub(offset) as usize).min(bytes);
                self.tear(inode, offset, &block[..fits - fits % SECTOR_BYTES]);
            }
        }
        self.close_the_gap();
        if how == Crash::PowerCut {
            self.lose_power();
        }
        self.life += 1;
        self.files.clear();
        self.in_flight.clear();
        self.vacant.clear();
        self.done.clear();
        self.lanes = std::iter::repeat_n(Reverse(now), self.config.in_flight_max.max(1)).collect();
        self.last_done_sequence = 0;
        self.submitted = 0;
        self.forget_unreachable();
    }

    fn lose_power(&mut self) {
        self.late.clear();
        for op in std::mem::take(&mut self.unsynced) {
            // A rename or removal needs the name as it was; where the operation that made it was lost, so is this.
            let possible = match &op.1 {
                DirectoryOp::Create { .. } => true,
                DirectoryOp::Rename { from: name, inode, .. } | DirectoryOp::Remove { name, inode } => {
                    self.durable_names.get(name) == Some(inode)
                }
            };
            if possible && self.rng.chance(500_000) {
                apply_directory_op(&mut self.durable_names, &op.1);
            } else {
                self.context.cover(Mark::DirectoryOpLost);
            }
        }
        self.names.clone_from(&self.durable_names);
        for inode in self.inodes.iter_mut().flatten() {
            if inode.durable_bytes < inode.bytes {
                let blocks = inode.bytes / BLOCK_BYTES as u64;
                inode.bytes = match self.rng.below(3) {
                    0 => 0,
                    1 => self.rng.between(0, blocks) * BLOCK_BYTES as u64,
                    _ => inode.bytes,
                };
                if inode.bytes < blocks * BLOCK_BYTES as u64 {
                    self.context.cover(Mark::FileSizeLost);
                }
                inode.durable_bytes = inode.bytes;
                inode.pages.truncate((inode.bytes / BLOCK_BYTES as u64) as usize);
            }
            let mut lost = false;
            for write in std::mem::take(&mut inode.unflushed) {
                let survivors = Survivors::draw(&mut self.rng, write.data.len() / SECTOR_BYTES);
                for (position, sector) in write.data.chunks_exact(SECTOR_BYTES).enumerate() {
                    let offset = write.offset + (position * SECTOR_BYTES) as u64;
                    if survivors.holds(position) && offset < inode.bytes {
                        inode.write_durable(offset, sector);
                    } else {
                        lost = true;
                    }
                }
            }
            if lost {
                self.context.cover(Mark::UnflushedWriteLost);
            }
        }
    }

    pub(super) fn late_writes_arrive(&mut self, now: Time) {
        let mut position = 0;
        while position < self.late.len() {
            if self.late[position].due > now {
                position += 1;
                continue;
            }
            let Late { inode, offset, data, .. } = self.late.swap_remove(position);
            self.context.cover(Mark::LateWrite);
            self.completed += 1;
            let sequence = self.completed;
            self.inode_mut(inode).write_unflushed(sequence, offset, data);
        }
    }
}

/// Which sectors of a write survive a crash.
enum Survivors {
    None,
    All,
    Prefix { count: usize, of: usize },
    Each { bits: Vec<bool> },
}

impl Survivors {
    fn draw(rng: &mut Rng, sectors: usize) -> Self {
        match rng.below(8) {
            0 | 1 => Self::None,
            2 | 3 => Self::All,
            4 | 5 => Self::Prefix { count: rng.between(0, sectors as u64) as usize, of: sectors },
            _ => Self::Each { bits: (0..sectors).map(|_| rng.chance(500_000)).collect() },
        }
    }

    fn holds(&self, sector: usize) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Prefix { count, .. } => sector < *count,
            Self::Each { bits } => bits[sector],
        }
    }

    fn partial(&self) -> bool {
        match self {
            Self::None | Self::All => false,
            Self::Prefix { count, of } => *count > 0 && count < of,
            Self::Each { bits } => bits.contains(&true) && bits.contains(&false),
        }
    }
}
