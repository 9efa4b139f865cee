//! A disk in memory on which every operation happens at once and nothing is lost. Only reads can fail, where a test says so.

use ringraft_block::{AlignedBuf, BLOCK_BYTES, BlockBuf};
use ringraft_wal::disk::{
    Access, DirectoryEntry, Disk, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId,
};
use std::collections::{BTreeMap, BTreeSet};

/// The files of a directory by name.
pub(crate) type Directory = BTreeMap<String, Vec<u8>>;

/// Blocks that cannot be read: file name and offset.
pub(crate) type Unreadable = BTreeSet<(String, usize)>;

pub(crate) struct MemoryDisk {
    pub(crate) directory: Directory,
    unreadable: Unreadable,
    open: BTreeMap<u32, (String, Access)>,
    next_file: u32,
    done: Vec<DiskDone<AlignedBuf>>,
}

impl MemoryDisk {
    pub(crate) fn new(directory: Directory, unreadable: Unreadable) -> Self {
        Self { directory, unreadable, open: BTreeMap::new(), next_file: 1, done: Vec::new() }
    }

    fn happen(&mut self, op: DiskOp<AlignedBuf>) -> Result<DiskOutput<AlignedBuf>, DiskErrorKind> {
        match op {
            DiskOp::List => {
                let entry = |(name, content): (&String, &Vec<u8>)| DirectoryEntry {
                    name: name.clone(),
                    bytes: content.len() as u64,
                };
                Ok(DiskOutput::Listed(self.directory.iter().map(entry).collect()))
            }
            DiskOp::Create { name, bytes, access } => {
                if self.directory.contains_key(&name) {
                    return Err(DiskErrorKind::AlreadyExists);
                }
                self.directory.insert(name.clone(), vec![0; bytes as usize]);
                Ok(self.opened(name, access))
            }
            DiskOp::Open { name, access } => {
                if !self.directory.contains_key(&name) {
                    return Err(DiskErrorKind::NotFound);
                }
                Ok(self.opened(name, access))
            }
            DiskOp::Write { file, offset, block, bytes } => {
                let (name, access) = self.file(file)?;
                assert!(access != Access::Read && whole_blocks(offset, bytes), "writes keep the rules");
                let content = self.directory.get_mut(&name).ok_or(DiskErrorKind::NotFound)?;
                let start = offset as usize;
                content
                    .get_mut(start..start + bytes)
                    .ok_or(DiskErrorKind::InvalidInput)?
                    .copy_from_slice(&block[..bytes]);
                Ok(DiskOutput::Written { bytes })
            }
            DiskOp::Read { file, offset, mut block, bytes } => {
                let (name, _) = self.file(file)?;
                assert!(whole_blocks(offset, bytes), "reads keep the rules");
                let content = self.directory.get(&name).ok_or(DiskErrorKind::NotFound)?;
                let start = (offset as usize).min(content.len());
                let end = (start + bytes).min(content.len());
                if self.unreadable.iter().any(|(lost, at)| *lost == name && (start..end).contains(at)) {
                    return Err(DiskErrorKind::Io);
                }
                block[..end - start].copy_from_slice(&content[start..end]);
                Ok(DiskOutput::Read { block, bytes: end - start })
            }
            DiskOp::Flush { file } => self.file(file).map(|_| DiskOutput::Done),
            DiskOp::Close { file } => {
                self.open.remove(&file.0).map(|_| DiskOutput::Done).ok_or(DiskErrorKind::InvalidInput)
            }
            DiskOp::Rename { from, to } => {
                let content = self.directory.remove(&from).ok_or(DiskErrorKind::NotFound)?;
                for (name, _) in self.open.values_mut() {
                    if *name == from {
                        name.clone_from(&to);
                    }
                }
                self.directory.insert(to, content);
                Ok(DiskOutput::Done)
            }
            DiskOp::Remove { name } => {
                self.directory.remove(&name).map(|_| DiskOutput::Done).ok_or(DiskErrorKind::NotFound)
            }
            DiskOp::SyncDirectory => Ok(DiskOutput::Done),
        }
    }

    fn file(&self, file: FileId) -> Result<(String, Access), DiskErrorKind> {
        self.open.get(&file.0).cloned().ok_or(DiskErrorKind::InvalidInput)
    }

    fn opened(&mut self, name: String, access: Access) -> DiskOutput<AlignedBuf> {
        let file = FileId(self.next_file);
        self.next_file += 1;
        let bytes = self.directory[&name].len() as u64;
        self.open.insert(file.0, (name, access));
        DiskOutput::Opened { file, bytes }
    }
}

fn whole_blocks(offset: u64, bytes: usize) -> bool {
    offset.is_multiple_of(BLOCK_BYTES as u64) && bytes.is_multiple_of(BLOCK_BYTES)
}

impl Disk for MemoryDisk {
    type Buf = AlignedBuf;

    fn allocate(&mut self, bytes: usize) -> Result<AlignedBuf, DiskError> {
        // Recycled memory is never blank.
        let mut buffer = AlignedBuf::zeroed(bytes);
        buffer.bytes_mut().fill(0xa5);
        Ok(buffer)
    }

    fn submit(&mut self, id: DiskOpId, op: DiskOp<AlignedBuf>) {
        let error = |kind| DiskError { kind, operation: "test", os_error: None };
        let result = self.happen(op).map_err(error);
        self.done.push(DiskDone { id, result });
    }

    fn poll(&mut self, done: &mut Vec<DiskDone<AlignedBuf>>) {
        done.append(&mut self.done);
    }
}
