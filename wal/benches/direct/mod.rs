//! A disk backend for benchmarks: O_DIRECT files, one blocking system call per operation. Both sides of a comparison use the same calls, so
//! what remains is the log's own cost. The engine's backend is another (io_uring); its overlap of operations is not measured here.

use ringraft_block::{AlignedBuf, BlockBuf, ClusterId, GroupId, NodeId, Pool, Term};
use ringraft_wal::disk::{
    Access, DirectoryEntry, Disk, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId,
};
use ringraft_wal::format::{
    BatchBuilder, BatchInfo, BatchKind, Chain, LogStart, Seal, image_bytes_for, slot_bytes,
};
use ringraft_wal::{DataDirectory, Wal, WalConfig, WalEvent};
use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Blocks below the data directory; operations wait until they are polled.
pub(crate) struct DirectDisk {
    directory: OwnedFd,
    files: HashMap<u32, (OwnedFd, Access)>,
    next_file: u32,
    queue: VecDeque<(DiskOpId, DiskOp<AlignedBuf>)>,
}

/// Opens a file for direct I/O.
pub(crate) fn open_direct(
    directory: &OwnedFd,
    name: &str,
    access: Access,
    create: bool,
) -> Result<OwnedFd, Errno> {
    let flags = OFlags::DIRECT
        | OFlags::CLOEXEC
        | match access {
            Access::Read => OFlags::RDONLY,
            Access::Write => OFlags::RDWR,
            // rustix has the bits of O_SYNC under that name.
            Access::DurableWrite => OFlags::RDWR | OFlags::from_bits_retain(libc::O_DSYNC.cast_unsigned()),
        };
    let created = if create { OFlags::CREATE | OFlags::EXCL } else { OFlags::empty() };
    rustix::fs::openat(directory, name, flags | created, Mode::RUSR | Mode::WUSR)
}

/// A descriptor of a directory.
pub(crate) fn open_directory(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

impl DirectDisk {
    /// A disk over an existing directory.
    pub(crate) fn new(path: &Path) -> Result<Self, Errno> {
        let directory = open_directory(path)?;
        Ok(Self { directory, files: HashMap::new(), next_file: 1, queue: VecDeque::new() })
    }

    /// Performs the durable writes that wait, and nothing else: what the log prepares in the background stays where it is.
    #[allow(dead_code, reason = "not every benchmark appends")]
    pub(crate) fn poll_durable_writes(&mut self, done: &mut Vec<DiskDone<AlignedBuf>>) {
        self.poll_some(done, |disk, op| matches!(op, DiskOp::Write { file, .. } if disk.is_durable(*file)));
    }

    /// Performs everything that waits but the filling of new segments, which a real backend does beside it.
    pub(crate) fn poll_foreground(&mut self, done: &mut Vec<DiskDone<AlignedBuf>>) {
        self.poll_some(done, |disk, op| !matches!(op, DiskOp::Write { file, .. } if !disk.is_durable(*file)));
    }

    fn poll_some(
        &mut self,
        done: &mut Vec<DiskDone<AlignedBuf>>,
        wanted: impl Fn(&Self, &DiskOp<AlignedBuf>) -> bool,
    ) {
        for _ in 0..self.queue.len() {
            let Some((id, op)) = self.queue.pop_front() else { break };
            if wanted(self, &op) {
                self.perform(id, op, done);
            } else {
                self.queue.push_back((id, op));
            }
        }
    }

    fn is_durable(&self, file: FileId) -> bool {
        self.files.get(&file.0).is_some_and(|(_, access)| *access == Access::DurableWrite)
    }

    fn perform(&mut self, id: DiskOpId, op: DiskOp<AlignedBuf>, done: &mut Vec<DiskDone<AlignedBuf>>) {
        let (operation, result) = self.happen(op);
        let result = result.map_err(|errno| DiskError::from_os(operation, errno.raw_os_error()));
        done.push(DiskDone { id, result });
    }

    fn happen(&mut self, op: DiskOp<AlignedBuf>) -> (&'static str, Result<DiskOutput<AlignedBuf>, Errno>) {
        match op {
            DiskOp::List => ("list", self.list()),
            DiskOp::Create { name, bytes, access } => ("create", self.create(&name, bytes, access)),
            DiskOp::Open { name, access } => ("open", self.open(&name, access)),
            DiskOp::Write { file, offset, block, bytes } => {
                let written =
                    self.file(file).and_then(|file| rustix::io::pwrite(file, &block[..bytes], offset));
                ("write", written.map(|bytes| DiskOutput::Written { bytes }))
            }
            DiskOp::Read { file, offset, mut block, bytes } => {
                let read =
                    self.file(file).and_then(|file| rustix::io::pread(file, &mut block[..bytes], offset));
                ("read", read.map(|bytes| DiskOutput::Read { block, bytes }))
            }
            DiskOp::Flush { file } => {
                ("flush", self.file(file).and_then(rustix::fs::fdatasync).map(|()| DiskOutput::Done))
            }
            DiskOp::Close { file } => {
                ("close", self.files.remove(&file.0).map(|_| DiskOutput::Done).ok_or(Errno::BADF))
            }
            DiskOp::Rename { from, to } => {
                let renamed = rustix::fs::renameat(&self.directory, &from, &self.directory, &to);
                ("rename", renamed.map(|()| DiskOutput::Done))
            }
            DiskOp::Remove { name } => {
                let removed = rustix::fs::unlinkat(&self.directory, &name, AtFlags::empty());
                ("remove", removed.map(|()| DiskOutput::Done))
            }
            DiskOp::SyncDirectory => {
                ("sync the directory", rustix::fs::fsync(&self.directory).map(|()| DiskOutput::Done))
            }
        }
    }

    fn file(&self, file: FileId) -> Result<&OwnedFd, Errno> {
        self.files.get(&file.0).map(|(file, _)| file).ok_or(Errno::BADF)
    }

    fn list(&self) -> Result<DiskOutput<AlignedBuf>, Errno> {
        let mut entries = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.directory)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                let status = rustix::fs::statat(&self.directory, &name, AtFlags::SYMLINK_NOFOLLOW)?;
                entries.push(DirectoryEntry { name, bytes: status.st_size as u64 });
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(DiskOutput::Listed(entries))
    }

    fn create(&mut self, name: &str, bytes: u64, access: Access) -> Result<DiskOutput<AlignedBuf>, Errno> {
        let file = open_direct(&self.directory, name, access, true)?;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
        Ok(self.opened(file, bytes, access))
    }

    fn open(&mut self, name: &str, access: Access) -> Result<DiskOutput<AlignedBuf>, Errno> {
        let file = open_direct(&self.directory, name, access, false)?;
        let bytes = rustix::fs::fstat(&file)?.st_size as u64;
        Ok(self.opened(file, bytes, access))
    }

    fn opened(&mut self, file: OwnedFd, bytes: u64, access: Access) -> DiskOutput<AlignedBuf> {
        let id = FileId(self.next_file);
        self.next_file += 1;
        self.files.insert(id.0, (file, access));
        DiskOutput::Opened { file: id, bytes }
    }
}

impl Disk for DirectDisk {
    type Buf = AlignedBuf;

    fn allocate(&mut self, bytes: usize) -> Result<AlignedBuf, DiskError> {
        if bytes == 0 {
            return Err(DiskError {
                kind: DiskErrorKind::InvalidInput,
                operation: "allocate",
                os_error: None,
            });
        }
        Ok(AlignedBuf::zeroed(bytes))
    }

    fn submit(&mut self, id: DiskOpId, op: DiskOp<AlignedBuf>) {
        self.queue.push_back((id, op));
    }

    fn poll(&mut self, done: &mut Vec<DiskDone<AlignedBuf>>) {
        while let Some((id, op)) = self.queue.pop_front() {
            self.perform(id, op, done);
        }
    }
}

/// A log on a [`DirectDisk`], driven from here.
pub(crate) struct Log {
    /// The log.
    pub(crate) wal: Wal<DirectDisk>,
    disk: DirectDisk,
    events: VecDeque<WalEvent<AlignedBuf>>,
    done: Vec<DiskDone<AlignedBuf>>,
    pool: Pool<AlignedBuf>,
    builder: Option<BatchBuilder<AlignedBuf>>,
    time_ms: u64,
    _directory: DataDirectory,
}

impl Log {
    /// Starts on the directory and returns when the log has told that it is open. What it then does in the background has not been done.
    pub(crate) fn open(path: &Path, segment_bytes: u64) -> Self {
        let directory = DataDirectory::open(path, true).expect("the target directory is on a disk");
        let pool = Pool::new(16 << 20);
        let config = WalConfig { segment_bytes, ..WalConfig::new(ClusterId(1), NodeId(1), 7) };
        let mut log = Self {
            wal: Wal::open(config, pool.clone()),
            disk: DirectDisk::new(path).expect("the directory is there"),
            events: VecDeque::new(),
            done: Vec::new(),
            pool,
            builder: None,
            time_ms: 0,
            _directory: directory,
        };
        loop {
            log.turn(DirectDisk::poll_foreground);
            match log.events.pop_front() {
                Some(WalEvent::Opened(_)) => return log,
                Some(other) => panic!("the log does not open: {other:?}"),
                None => {}
            }
        }
    }

    fn turn(&mut self, poll: impl Fn(&mut DirectDisk, &mut Vec<DiskDone<AlignedBuf>>)) -> bool {
        self.wal.advance(&mut self.disk, &mut self.events);
        poll(&mut self.disk, &mut self.done);
        let progress = !self.done.is_empty();
        for done in self.done.drain(..) {
            self.wal.handle(&mut self.disk, done, &mut self.events);
        }
        progress
    }

    /// Lets everything happen that waits.
    #[allow(dead_code, reason = "not every benchmark appends")]
    pub(crate) fn settle(&mut self) {
        while self.turn(DirectDisk::poll) {}
        self.events.clear();
        assert_eq!(self.wal.poisoned(), None);
    }

    /// Seals a batch of `count` times `command`, appends it and returns when it is durable.
    #[allow(dead_code, reason = "not every benchmark appends")]
    pub(crate) fn append(&mut self, command: &[u8], count: usize) -> BatchInfo {
        let slot = slot_bytes(image_bytes_for(count, 0, count * command.len()));
        let block = self.pool.take(slot, |bytes| Ok::<_, Infallible>(AlignedBuf::zeroed(bytes)));
        let block = block.unwrap_or_else(|never| match never {});
        let builder = match self.builder.as_mut() {
            Some(builder) => {
                builder.rearm(block);
                builder
            }
            None => self.builder.insert(BatchBuilder::new(block)),
        };
        for _ in 0..count {
            builder.push(command, None).expect("the block has room for the batch");
        }
        let LogStart { index, chain, .. } = self.wal.log_end();
        self.time_ms += 1;
        let (block, info) = builder.seal(seal(index.get() + 1, self.time_ms, chain));
        self.wal.append(&mut self.disk, block, info);
        self.disk.poll_durable_writes(&mut self.done);
        for done in self.done.drain(..) {
            self.wal.handle(&mut self.disk, done, &mut self.events);
        }
        self.wal.advance(&mut self.disk, &mut self.events);
        assert_eq!(self.wal.durable_through(), info.last, "the batch is durable");
        info
    }

    /// Empties the log and gives its space back.
    #[allow(dead_code, reason = "not every benchmark appends")]
    pub(crate) fn clear(&mut self) {
        let start = self.wal.log_start().index;
        self.wal.truncate_after(&mut self.disk, start);
        self.settle();
    }
}

fn seal(first: u64, time_ms: u64, previous_chain: Chain) -> Seal {
    let kind = BatchKind::Commands;
    Seal { group: GroupId(0), term: Term(1), first: first.into(), kind, time_ms, previous_chain }
}

/// A buffer of `bytes` that does not compress or deduplicate easily.
pub(crate) fn noise(bytes: usize) -> AlignedBuf {
    let mut buffer = AlignedBuf::zeroed(bytes);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for byte in buffer.bytes_mut() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *byte = (state >> 56) as u8;
    }
    buffer
}

/// A directory for the run below the target directory, removed at the end.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory for the run")
}
