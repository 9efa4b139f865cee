//! A disk in memory that does at once, and in order, what it is asked for.

use ringraft_block::AlignedBuf;
use ringraft_wal::disk::{
    DirectoryEntry, Disk, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId,
};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// The files of a member, and what is to be done with them.
#[derive(Default)]
pub(super) struct Files {
    files: Vec<Vec<u8>>,
    names: BTreeMap<String, usize>,
    /// By the number of the descriptor.
    open: Vec<usize>,
    asked: Vec<(DiskOpId, DiskOp<AlignedBuf>)>,
    working: Vec<(DiskOpId, DiskOp<AlignedBuf>)>,
    done: Vec<DiskDone<AlignedBuf>>,
}

impl Files {
    /// Does what was asked. Says whether there was anything.
    pub(super) fn work(&mut self) -> bool {
        let mut working = std::mem::take(&mut self.working);
        std::mem::swap(&mut working, &mut self.asked);
        for (id, op) in working.drain(..) {
            let error = |kind| DiskError { kind, operation: "in memory", os_error: None };
            let result = self.run(op).map_err(error);
            self.done.push(DiskDone { id, result });
        }
        self.working = working;
        !self.done.is_empty()
    }

    fn run(&mut self, op: DiskOp<AlignedBuf>) -> Result<DiskOutput<AlignedBuf>, DiskErrorKind> {
        match op {
            DiskOp::List => {
                let entries = self.names.iter().map(|(name, at)| DirectoryEntry {
                    name: name.clone(),
                    bytes: self.files[*at].len() as u64,
                });
                Ok(DiskOutput::Listed(entries.collect()))
            }
            DiskOp::Create { name, bytes, .. } => {
                if self.names.contains_key(&name) {
                    return Err(DiskErrorKind::AlreadyExists);
                }
                self.names.insert(name, self.files.len());
                self.files.push(vec![0; bytes as usize]);
                Ok(self.opened(self.files.len() - 1))
            }
            DiskOp::Open { name, .. } => {
                let at = *self.names.get(&name).ok_or(DiskErrorKind::NotFound)?;
                Ok(self.opened(at))
            }
            DiskOp::Write { file, offset, block, bytes } => {
                let place = &mut self.files[self.open[file.0 as usize]][offset as usize..][..bytes];
                // Zeros are written to all of a segment, and most of it is never used: the system need not have it.
                if place != &block[..bytes] {
                    place.copy_from_slice(&block[..bytes]);
                }
                Ok(DiskOutput::Written { bytes })
            }
            DiskOp::Read { file, offset, mut block, bytes } => {
                let content =
                    self.files[self.open[file.0 as usize]].get(offset as usize..).unwrap_or_default();
                let bytes = bytes.min(content.len());
                block[..bytes].copy_from_slice(&content[..bytes]);
                Ok(DiskOutput::Read { block, bytes })
            }
            DiskOp::Rename { from, to } => {
                let at = self.names.remove(&from).ok_or(DiskErrorKind::NotFound)?;
                self.names.insert(to, at);
                Ok(DiskOutput::Done)
            }
            DiskOp::Remove { name } => {
                self.names.remove(&name).map(|_| DiskOutput::Done).ok_or(DiskErrorKind::NotFound)
            }
            DiskOp::Close { .. } | DiskOp::Flush { .. } | DiskOp::SyncDirectory => Ok(DiskOutput::Done),
        }
    }

    fn opened(&mut self, at: usize) -> DiskOutput<AlignedBuf> {
        self.open.push(at);
        DiskOutput::Opened { file: FileId(self.open.len() as u32 - 1), bytes: self.files[at].len() as u64 }
    }
}

pub(super) struct MemoryDisk {
    files: Rc<RefCell<Files>>,
}

impl MemoryDisk {
    pub(super) fn new(files: Rc<RefCell<Files>>) -> Self {
        Self { files }
    }
}

impl Disk for MemoryDisk {
    type Buf = AlignedBuf;

    fn allocate(&mut self, bytes: usize) -> Result<AlignedBuf, DiskError> {
        Ok(AlignedBuf::zeroed(bytes))
    }

    fn submit(&mut self, id: DiskOpId, op: DiskOp<AlignedBuf>) {
        self.files.borrow_mut().asked.push((id, op));
    }

    fn poll(&mut self, done: &mut Vec<DiskDone<AlignedBuf>>) {
        done.append(&mut self.files.borrow_mut().done);
    }
}
