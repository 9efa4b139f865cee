//! The fault disk as a file: a FUSE file system with nothing in it but [`FILE`].

use super::disk::{DiskError, Effect, FaultDisk, SECTOR_BYTES};
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite,
    Request, WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

/// The name of the file.
pub const FILE: &str = "disk";

const FILE_INODE: INodeNo = INodeNo(2);

/// Nothing about the file ever changes.
const FOREVER: Duration = Duration::from_secs(3600);

/// Requests that the kernel may have under way, so that a loop device's queue fits.
const REQUESTS_MAX: u16 = 128;

/// The disk, shared between the file system and those who cut its power.
#[derive(Clone, Debug)]
pub struct SharedDisk {
    disk: Arc<Mutex<FaultDisk>>,
    /// Requests of a hung disk.
    held: Arc<Mutex<Vec<Held>>>,
}

/// A request without an answer. It fails with EIO when it is dropped.
#[derive(Debug)]
#[expect(dead_code, reason = "held, and then dropped")]
enum Held {
    Read(ReplyData),
    Write(ReplyWrite),
    Flush(ReplyEmpty),
}

impl SharedDisk {
    /// Shares `disk`.
    #[must_use]
    pub fn new(disk: FaultDisk) -> Self {
        Self { disk: Arc::new(Mutex::new(disk)), held: Arc::default() }
    }

    /// The disk. Requests wait meanwhile.
    pub fn lock(&self) -> MutexGuard<'_, FaultDisk> {
        // A panic of another holder is reported by that one; the disk fails no further for it.
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts the power; a hung disk's requests fail.
    pub fn cut(&self) {
        self.lock().strike(Effect::Cut);
        self.held().clear();
    }

    /// Leaves a request without an answer, until the power is cut.
    fn hold(&self, request: Held) {
        let mut held = self.held();
        held.push(request);
        // The power may have gone since the disk was asked. If it goes after this, `cut` finds the request.
        if !self.lock().stats().powered {
            held.clear();
        }
    }

    fn held(&self) -> MutexGuard<'_, Vec<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk, if it was opened since the power last went.
    fn connected(&self, handle: FileHandle) -> Result<MutexGuard<'_, FaultDisk>, DiskError> {
        let disk = self.lock();
        if disk.cuts() == handle.0 { Ok(disk) } else { Err(DiskError::Io) }
    }
}

/// The file system.
#[derive(Debug)]
pub struct DiskFs {
    disk: SharedDisk,
    bytes: u64,
}

impl DiskFs {
    /// The file system of `disk`.
    #[must_use]
    pub fn new(disk: SharedDisk) -> Self {
        let bytes = disk.lock().bytes();
        Self { disk, bytes }
    }

    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, nlink, size) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0o700, 2, 0),
            FILE_INODE => (FileType::RegularFile, 0o600, 1, self.bytes),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size / SECTOR_BYTES as u64,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

fn errno(error: DiskError) -> Errno {
    match error {
        DiskError::Io | DiskError::Hung => Errno::EIO,
        DiskError::Full => Errno::ENOSPC,
    }
}

impl Filesystem for DiskFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Direct I/O of a loop device completes in the background.
        config
            .add_capabilities(InitFlags::FUSE_ASYNC_DIO)
            .map_err(|_| io::Error::other("this kernel's FUSE has no asynchronous direct I/O"))?;
        config
            .set_max_background(REQUESTS_MAX)
            .map_err(|least| io::Error::other(format!("{REQUESTS_MAX} requests are fewer than {least}")))?;
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(FILE_INODE) {
            Some(attributes) if parent == INodeNo::ROOT && name == FILE => {
                reply.entry(&FOREVER, &attributes, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&FOREVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let disk = self.disk.lock();
        if disk.stats().powered {
            // No page cache: what the disk has not seen, nobody has written.
            let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
            reply.opened(FileHandle(disk.cuts()), flags);
        } else {
            reply.error(Errno::EIO);
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let len = u64::from(size).min(self.bytes.saturating_sub(offset));
        let mut bytes = vec![0; len as usize];
        let outcome = self.disk.connected(handle).and_then(|mut disk| disk.read(offset, &mut bytes));
        match outcome {
            Ok(()) => reply.data(&bytes),
            Err(DiskError::Hung) => self.disk.hold(Held::Read(reply)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let outcome = self.disk.connected(handle).and_then(|mut disk| disk.write(offset, data));
        match outcome {
            Ok(()) => reply.written(data.len() as u32),
            Err(DiskError::Hung) => self.disk.hold(Held::Write(reply)),
            Err(error) => reply.error(errno(error)),
        }
    }

    /// Comes with every close(2), and promises nothing.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    /// What a loop device makes of a flush.
    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        let outcome = self.disk.connected(handle).and_then(|mut disk| disk.flush());
        match outcome {
            Ok(()) => reply.ok(),
            Err(DiskError::Hung) => self.disk.hold(Held::Flush(reply)),
            Err(error) => reply.error(errno(error)),
        }
    }

    /// No discard and no hole: the kernel then writes zeros.
    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(Errno::EOPNOTSUPP);
    }
}
