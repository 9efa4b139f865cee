//! The log's disk on a ring.
//!
//! Reads, writes and flushes go to the ring. What has to do with names, and opening and closing, may block and is rare: it goes
//! to a thread of the disk's own ([`Names`]), in order. Its results are taken between turns, like completions.

use super::memory::{Buffers, UringBuf};
use super::names::{NameOutput, Names};
use super::operation::{Io, Operation};
use crate::runtime::completions::Completions;
use crate::runtime::directory::{self, invalid, whole_blocks};
use crate::runtime::{LocalWakeup, RuntimeError, Wakeup};
use io_uring::{opcode, squeue, types};
use ringraft_block::{BLOCK_BYTES, Block, SharedBlock};
use ringraft_wal::disk::{Access, Disk, DiskDone, DiskError, DiskOp, DiskOpId, DiskOutput, FileId};
use rustix::thread::CpuSet;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

/// How often an operation is started again that was interrupted or lacked memory, before that counts as an error.
const TRIES_MAX: u8 = 16;

/// One data directory, driven from the core that made it.
pub struct UringDisk {
    shared: Rc<DiskShared>,
    buffers: Buffers,
}

/// What the disk and its operations share.
pub(super) struct DiskShared {
    io: Rc<Io>,
    completions: Completions<DiskDone<UringBuf>>,
    files: RefCell<BTreeMap<FileId, Rc<OpenFile>>>,
    files_opened: Cell<u32>,
    names: RefCell<Names>,
}

pub(super) struct OpenFile {
    file: OwnedFd,
    bytes: u64,
    access: Access,
}

/// An operation in flight, with all that it uses.
pub(super) struct DiskOperation {
    id: DiskOpId,
    file: Rc<OpenFile>,
    tries: u8,
    kind: Kind,
}

enum Kind {
    Write { offset: u64, block: SharedBlock<UringBuf>, bytes: u32 },
    Read { offset: u64, block: Block<UringBuf>, bytes: u32, filled: u32 },
    Flush,
}

impl DiskOperation {
    /// Names memory of the operation's block only: memory that the block's buffer owns, which does not move with it. The
    /// block of a read is the operation's alone. That of a write is shared, and a shared block can be read, not changed,
    /// until all but one of its holders are gone, of which this operation is one.
    pub(super) fn entry(&mut self) -> squeue::Entry {
        let fd = types::Fd(self.file.file.as_raw_fd());
        match &mut self.kind {
            Kind::Write { offset, block, bytes } => {
                opcode::Write::new(fd, block[..*bytes as usize].as_ptr(), *bytes).offset(*offset).build()
            }
            Kind::Read { offset, block, bytes, filled } => {
                let rest = &mut block[*filled as usize..*bytes as usize];
                let (start, len) = (rest.as_mut_ptr(), *bytes - *filled);
                opcode::Read::new(fd, start, len).offset(*offset + u64::from(*filled)).build()
            }
            Kind::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        }
    }

    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Write { .. } => "write",
            Kind::Read { .. } => "read",
            Kind::Flush => "flush",
        }
    }
}

impl UringDisk {
    /// `unpinned` are the processors that the thread for names may use.
    pub(super) fn open(
        path: &Path,
        io: Rc<Io>,
        local: LocalWakeup,
        wakeup: Arc<Wakeup>,
        unpinned: Option<CpuSet>,
    ) -> Result<Self, RuntimeError> {
        let names = Names::new(directory::open(path)?, wakeup, unpinned)?;
        let shared = DiskShared {
            io,
            completions: Completions::new(local),
            files: RefCell::default(),
            files_opened: Cell::new(0),
            names: RefCell::new(names),
        };
        Ok(Self { shared: Rc::new(shared), buffers: Buffers::default() })
    }

    pub(super) fn shared(&self) -> Rc<DiskShared> {
        Rc::clone(&self.shared)
    }

    fn file(&self, file: FileId, operation: &'static str) -> Result<Rc<OpenFile>, DiskError> {
        self.shared.files.borrow().get(&file).cloned().ok_or_else(|| invalid(operation))
    }

    fn write(&self, file: FileId, offset: u64, block: SharedBlock<UringBuf>, bytes: usize) -> Started {
        let file = self.file(file, "write")?;
        let fits = file.contains(offset, bytes) && bytes <= block.capacity();
        if file.access == Access::Read || !fits || !whole_blocks(offset, bytes) {
            return Err(invalid("write"));
        }
        let bytes = length(bytes, "write")?;
        Ok((file, Kind::Write { offset, block, bytes }))
    }

    fn read(&self, file: FileId, offset: u64, block: Block<UringBuf>, bytes: usize) -> Started {
        let file = self.file(file, "read")?;
        if bytes > block.capacity() || !whole_blocks(offset, bytes) {
            return Err(invalid("read"));
        }
        let bytes = length(bytes, "read")?;
        Ok((file, Kind::Read { offset, block, bytes, filled: 0 }))
    }

    /// Starts what was found to be in order.
    fn start(&self, id: DiskOpId, checked: Started) {
        match checked {
            Ok((file, kind)) => self.shared.start(DiskOperation { id, file, tries: 0, kind }),
            Err(error) => self.shared.complete(id, Err(error)),
        }
    }

    fn create(&self, id: DiskOpId, name: String, bytes: u64, access: Access) {
        if !bytes.is_multiple_of(BLOCK_BYTES as u64) {
            return self.shared.complete(id, Err(invalid("create")));
        }
        self.shared.names.borrow().submit(id, "create", move |directory| {
            let created = directory::create(directory, &name, bytes)?;
            let file = open_again(&created, access).inspect_err(|_| {
                let _ = directory::remove(directory, &name);
            })?;
            Ok(NameOutput::Opened { file, bytes, access })
        });
    }

    fn close(&self, id: DiskOpId, file: FileId) {
        let removed = self.shared.files.borrow_mut().remove(&file);
        match removed.map(Rc::try_unwrap) {
            Some(Ok(open)) => self.shared.names.borrow().submit(id, "close", move |_| {
                // The last descriptor of a removed file: its space is freed here, which takes a while.
                drop(open.file);
                Ok(NameOutput::Done)
            }),
            Some(Err(in_use)) => {
                self.shared.files.borrow_mut().insert(file, in_use);
                self.shared.complete(id, Err(invalid("close")));
            }
            None => self.shared.complete(id, Err(invalid("close"))),
        }
    }
}

type Started = Result<(Rc<OpenFile>, Kind), DiskError>;

impl Disk for UringDisk {
    type Buf = UringBuf;

    fn allocate(&mut self, bytes: usize) -> Result<UringBuf, DiskError> {
        directory::may_allocate(bytes)?;
        Ok(self.buffers.allocate(bytes))
    }

    fn submit(&mut self, id: DiskOpId, op: DiskOp<UringBuf>) {
        let names = &self.shared.names;
        match op {
            DiskOp::Write { file, offset, block, bytes } => {
                self.start(id, self.write(file, offset, block, bytes));
            }
            DiskOp::Read { file, offset, block, bytes } => {
                self.start(id, self.read(file, offset, block, bytes))
            }
            DiskOp::Flush { file } => {
                self.start(id, self.file(file, "flush").map(|file| (file, Kind::Flush)));
            }
            DiskOp::Close { file } => self.close(id, file),
            DiskOp::Create { name, bytes, access } => self.create(id, name, bytes, access),
            DiskOp::Open { name, access } => names.borrow().submit(id, "open", move |directory| {
                let (found, bytes) = directory::find(directory, &name)?;
                Ok(NameOutput::Opened { file: open_again(&found, access)?, bytes, access })
            }),
            DiskOp::List => names
                .borrow()
                .submit(id, "list", |directory| directory::list(directory).map(NameOutput::Listed)),
            DiskOp::Rename { from, to } => names.borrow().submit(id, "rename", move |directory| {
                directory::rename(directory, &from, &to).map(|()| NameOutput::Done)
            }),
            DiskOp::Remove { name } => names.borrow().submit(id, "remove", move |directory| {
                directory::remove(directory, &name).map(|()| NameOutput::Done)
            }),
            DiskOp::SyncDirectory => names.borrow().submit(id, "sync the directory", |directory| {
                rustix::fs::fsync(directory).map(|()| NameOutput::Done)
            }),
        }
    }

    fn poll(&mut self, done: &mut Vec<DiskDone<UringBuf>>) {
        self.shared.completions.take(done);
    }
}

impl DiskShared {
    fn start(self: &Rc<Self>, operation: DiskOperation) {
        self.io.borrow_mut().start(Operation::Disk(Rc::clone(self), operation));
    }

    fn complete(&self, id: DiskOpId, result: Result<DiskOutput<UringBuf>, DiskError>) {
        self.completions.push(DiskDone { id, result });
    }

    pub(super) fn completed(self: &Rc<Self>, mut operation: DiskOperation, result: i32) {
        let again = matches!(-result, libc::EINTR | libc::EAGAIN) && operation.tries < TRIES_MAX;
        if again {
            // Nothing counts on it yet, and what a first try may have written is what the next one writes.
            operation.tries += 1;
            return self.start(operation);
        }
        let Ok(count) = u32::try_from(result) else {
            let error = DiskError::from_os(operation.name(), -result);
            return self.complete(operation.id, Err(error));
        };
        let DiskOperation { id, file, tries, kind } = operation;
        let output = match kind {
            Kind::Write { .. } => DiskOutput::Written { bytes: count as usize },
            Kind::Flush => DiskOutput::Done,
            Kind::Read { offset, block, bytes, filled } => {
                let filled = filled.saturating_add(count).min(bytes);
                // Only the end of the file makes a read short. Direct I/O goes on where a block begins.
                let is_whole = count > 0 && (filled as usize).is_multiple_of(BLOCK_BYTES);
                if filled < bytes && is_whole && file.contains(offset + u64::from(filled), 1) {
                    let kind = Kind::Read { offset, block, bytes, filled };
                    return self.start(DiskOperation { id, file, tries, kind });
                }
                DiskOutput::Read { block, bytes: filled as usize }
            }
        };
        drop(file);
        self.complete(id, Ok(output));
    }

    /// Takes what the thread for names has done. Says whether there was anything.
    pub(super) fn collect(&self) -> bool {
        let mut any = false;
        while let Some((id, result)) = self.names.borrow().next() {
            any = true;
            let output = result.map(|output| match output {
                NameOutput::Listed(entries) => DiskOutput::Listed(entries),
                NameOutput::Done => DiskOutput::Done,
                NameOutput::Opened { file, bytes, access } => {
                    let id = FileId(self.files_opened.get());
                    self.files_opened
                        .set(id.0.checked_add(1).expect("a process opens fewer than 2^32 files"));
                    self.files.borrow_mut().insert(id, Rc::new(OpenFile { file, bytes, access }));
                    DiskOutput::Opened { file: id, bytes }
                }
            });
            self.complete(id, output);
        }
        any
    }

    /// Waits for the thread for names, and closes the files. Nothing is in flight on the ring any more: what a write reads
    /// from must stay until the kernel is done with it, however long the device takes.
    pub(super) fn shut_down(&self) {
        self.names.borrow_mut().join();
        self.collect();
        self.completions.close();
        self.files.borrow_mut().clear();
    }
}

impl OpenFile {
    fn contains(&self, offset: u64, bytes: usize) -> bool {
        offset.checked_add(bytes as u64).is_some_and(|end| end <= self.bytes)
    }
}

fn length(bytes: usize, operation: &'static str) -> Result<u32, DiskError> {
    // The kernel moves less than 2^31 bytes at once.
    u32::try_from(bytes).ok().filter(|bytes| *bytes < 1 << 31).ok_or_else(|| invalid(operation))
}

/// Opens the file behind `found` for direct I/O.
fn open_again(found: &OwnedFd, access: Access) -> Result<OwnedFd, rustix::io::Errno> {
    use rustix::fs::{Mode, OFlags};
    let how = match access {
        Access::Read => OFlags::RDONLY,
        Access::Write => OFlags::RDWR,
        // rustix has the bits of O_SYNC under that name: a write would wait for the file's time stamps too.
        Access::DurableWrite => OFlags::RDWR | OFlags::from_bits_retain(libc::O_DSYNC.cast_unsigned()),
    };
    rustix::fs::open(directory::again(found), how | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::super::operation::reap;
    use super::super::ring::Ring;
    use super::*;
    use ringraft_block::Pool;
    use ringraft_wal::disk::DiskErrorKind;
    use std::time::Duration;

    struct Rig {
        _directory: tempfile::TempDir,
        io: Rc<Io>,
        disk: UringDisk,
        pool: Pool<UringBuf>,
    }

    impl Rig {
        fn new() -> Self {
            let directory = tempfile::tempdir_in(std::env::current_dir().unwrap()).unwrap();
            let wakeup = Arc::new(Wakeup::new());
            let ring = Ring::new(8, wakeup.connect_event().unwrap()).unwrap();
            let io = Rc::new(RefCell::new(ring));
            let local = LocalWakeup::default();
            let disk = UringDisk::open(directory.path(), Rc::clone(&io), local, wakeup, None).unwrap();
            Self { _directory: directory, io, disk, pool: Pool::new(1 << 20) }
        }

        fn block(&mut self, blocks: usize, fill: u8) -> Block<UringBuf> {
            let disk = &mut self.disk;
            let mut block = self.pool.take(blocks * BLOCK_BYTES, |bytes| disk.allocate(bytes)).unwrap();
            block.fill(fill);
            block
        }

        fn next(&mut self) -> Result<DiskOutput<UringBuf>, DiskError> {
            let mut done = Vec::new();
            loop {
                reap(&self.io);
                self.disk.shared.collect();
                self.disk.poll(&mut done);
                if let Some(done) = done.pop() {
                    return done.result;
                }
                self.io.borrow_mut().wait(Some(Duration::from_millis(1))).unwrap();
            }
        }

        /// A file of so many blocks, all of them 0x11.
        fn file(&mut self, blocks: usize) -> Rc<OpenFile> {
            let bytes = blocks * BLOCK_BYTES;
            let access = Access::DurableWrite;
            self.disk.submit(DiskOpId(0), DiskOp::Create { name: "log".into(), bytes: bytes as u64, access });
            let Ok(DiskOutput::Opened { file, .. }) = self.next() else { panic!("created") };
            let block = self.block(blocks, 0x11).share();
            self.disk.submit(DiskOpId(0), DiskOp::Write { file, offset: 0, block, bytes });
            self.next().unwrap();
            self.disk.file(file, "open").unwrap()
        }

        /// As if the kernel had returned `result` for the operation.
        fn returned(&self, file: &Rc<OpenFile>, tries: u8, kind: Kind, result: i32) {
            let operation = DiskOperation { id: DiskOpId(1), file: Rc::clone(file), tries, kind };
            self.disk.shared.completed(operation, result);
        }
    }

    const BYTES: u32 = 4 * BLOCK_BYTES as u32;

    #[test]
    fn a_read_that_comes_short_within_the_file_goes_on_where_it_stopped() {
        let mut rig = Rig::new();
        let file = rig.file(4);
        let kind = Kind::Read { offset: 0, block: rig.block(4, 0x77), bytes: BYTES, filled: 0 };
        rig.returned(&file, 0, kind, BLOCK_BYTES as i32);
        let Ok(DiskOutput::Read { block, bytes }) = rig.next() else { panic!("read") };
        assert_eq!(bytes, BYTES as usize);
        assert!(block[..BLOCK_BYTES].iter().all(|byte| *byte == 0x77), "taken as it was");
        assert!(block[BLOCK_BYTES..].iter().all(|byte| *byte == 0x11), "read");
    }

    #[test]
    fn a_read_that_comes_short_at_the_end_of_the_file_is_short() {
        let mut rig = Rig::new();
        let file = rig.file(4);
        let offset = 2 * BLOCK_BYTES as u64;
        let kind = Kind::Read { offset, block: rig.block(4, 0), bytes: BYTES, filled: 0 };
        rig.returned(&file, 0, kind, 2 * BLOCK_BYTES as i32);
        assert_eq!(rig.io.borrow().in_flight(), 0);
        assert!(matches!(rig.next(), Ok(DiskOutput::Read { bytes, .. }) if bytes == 2 * BLOCK_BYTES));
    }

    #[test]
    fn an_interrupted_write_is_done_again_and_a_short_one_is_told() {
        let mut rig = Rig::new();
        let file = rig.file(4);
        for errno in [libc::EINTR, libc::EAGAIN] {
            let block = rig.block(4, 0x22).share();
            rig.returned(&file, 0, Kind::Write { offset: 0, block: block.clone(), bytes: BYTES }, -errno);
            assert!(matches!(rig.next(), Ok(DiskOutput::Written { bytes }) if bytes == BYTES as usize));
            assert_eq!(block.holders(), 1);
        }
        let written = std::fs::read(rig._directory.path().join("log")).unwrap();
        assert!(written.iter().all(|byte| *byte == 0x22));
        let block = rig.block(4, 0x33).share();
        rig.returned(&file, 0, Kind::Write { offset: 0, block, bytes: BYTES }, 512);
        assert!(matches!(rig.next(), Ok(DiskOutput::Written { bytes: 512 })));
    }

    #[test]
    fn an_operation_that_never_gets_its_turn_fails_in_the_end() {
        let mut rig = Rig::new();
        let file = rig.file(1);
        rig.returned(&file, TRIES_MAX, Kind::Flush, -libc::EAGAIN);
        let error = rig.next().err().unwrap();
        assert_eq!((error.kind, error.operation), (DiskErrorKind::OutOfMemory, "flush"));
        rig.returned(&file, 0, Kind::Flush, -libc::EIO);
        assert_eq!(rig.next().err().unwrap().os_error, Some(libc::EIO), "no other error is tried again");
    }
}
