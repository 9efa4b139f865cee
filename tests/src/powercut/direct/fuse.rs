//! The fault volume as a FUSE file system. Nothing is cached by the kernel: every read, write and name comes here, and a
//! write says whether its file was opened with O_DSYNC, in which case no flush follows it.

use super::volume::{FaultVolume, Kind, ROOT, VolumeError};
use crate::powercut::disk::{Effect, SECTOR_BYTES};
use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Names and sizes change with the power, which the kernel does not know of.
const NOT_AT_ALL: Duration = Duration::ZERO;

/// Requests that the kernel may have under way.
const REQUESTS_MAX: u16 = 128;

/// What statfs(2) says of size and space, in blocks of 4 KiB.
const BLOCKS: u64 = 1 << 20;

/// The volume, shared between the file system and those who cut its power.
#[derive(Clone, Debug, Default)]
pub struct SharedVolume {
    volume: Arc<Mutex<FaultVolume>>,
    held: Arc<Mutex<Unanswered>>,
}

/// Requests of a hung or powerless volume.
#[derive(Debug, Default)]
struct Unanswered {
    held: Vec<Held>,
    /// Those who asked have been killed: the kernel lets go of them when their requests are answered.
    released: bool,
}

/// A request without an answer. It fails with EIO when it is dropped.
#[derive(Debug)]
#[expect(dead_code, reason = "held, and then dropped")]
enum Held {
    Read(ReplyData),
    Write(ReplyWrite),
    Flush(ReplyEmpty),
}

impl SharedVolume {
    /// The volume. Requests wait meanwhile.
    pub fn lock(&self) -> MutexGuard<'_, FaultVolume> {
        // A panic of another holder is reported by that one; the volume fails no further for it.
        self.volume.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets requests without an answer fail, and all that come until the power is back.
    pub fn release(&self) {
        let mut unanswered = self.unanswered();
        unanswered.released = true;
        unanswered.held.clear();
    }

    /// Cuts the power, for those who are to be killed next.
    pub fn cut(&self) {
        self.lock().strike(None, Effect::Cut);
    }

    /// The power is back, or a new volume is there.
    pub fn begin_anew(&self) {
        *self.unanswered() = Unanswered::default();
    }

    fn hold(&self, request: Held) {
        let mut unanswered = self.unanswered();
        if !unanswered.released {
            unanswered.held.push(request);
        }
    }

    fn unanswered(&self) -> MutexGuard<'_, Unanswered> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The volume for an operation that is refused while the power is off.
    fn powered(&self) -> Result<MutexGuard<'_, FaultVolume>, VolumeError> {
        let volume = self.lock();
        if volume.is_powered() { Ok(volume) } else { Err(VolumeError::Io) }
    }

    /// The volume for who opened a file when it had lost its power `handle` times: after the next time its requests are
    /// still taken, until the power is back.
    fn connected(&self, handle: FileHandle) -> Result<MutexGuard<'_, FaultVolume>, VolumeError> {
        let volume = self.lock();
        let cuts = volume.cuts() - u64::from(!volume.is_powered());
        if cuts == handle.0 { Ok(volume) } else { Err(VolumeError::Io) }
    }
}

/// The file system.
#[derive(Debug)]
pub struct VolumeFs(SharedVolume);

impl VolumeFs {
    /// The file system of `volume`.
    #[must_use]
    pub fn new(volume: SharedVolume) -> Self {
        Self(volume)
    }

    fn entry(volume: &FaultVolume, node: u64) -> Result<FileAttr, VolumeError> {
        let (kind, perm, nlink, size) = match volume.kind(node)? {
            Kind::Directory => (FileType::Directory, 0o700, 2, 0),
            Kind::File(bytes) => (FileType::RegularFile, 0o600, 1, bytes),
        };
        Ok(FileAttr {
            ino: INodeNo(node),
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

    fn make(
        &self,
        parent: INodeNo,
        name: &OsStr,
        is_directory: bool,
    ) -> Result<(FileAttr, FileHandle), VolumeError> {
        let mut volume = self.0.powered()?;
        let node = volume.make(parent.0, plain(name)?, is_directory)?;
        Ok((Self::entry(&volume, node)?, FileHandle(volume.cuts())))
    }
}

fn plain(name: &OsStr) -> Result<&str, VolumeError> {
    name.to_str().ok_or(VolumeError::Invalid)
}

fn errno(error: VolumeError) -> Errno {
    match error {
        VolumeError::Io | VolumeError::Hung => Errno::EIO,
        VolumeError::Full => Errno::ENOSPC,
        VolumeError::NotFound => Errno::ENOENT,
        VolumeError::Exists => Errno::EEXIST,
        VolumeError::Invalid => Errno::EINVAL,
    }
}

fn answer(outcome: Result<(), VolumeError>, reply: ReplyEmpty) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

fn answer_entry(outcome: Result<FileAttr, VolumeError>, reply: ReplyEntry) {
    match outcome {
        Ok(attributes) => reply.entry(&NOT_AT_ALL, &attributes, Generation(0)),
        Err(error) => reply.error(errno(error)),
    }
}

/// No page cache: what the volume has not seen, nobody has written.
const OPENED: FopenFlags = FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);

impl Filesystem for VolumeFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Writes of one file are under way at the same time.
        config
            .add_capabilities(InitFlags::FUSE_ASYNC_DIO)
            .map_err(|_| io::Error::other("this kernel's FUSE has no asynchronous direct I/O"))?;
        config
            .set_max_background(REQUESTS_MAX)
            .map_err(|least| io::Error::other(format!("{REQUESTS_MAX} requests are fewer than {least}")))?;
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let outcome = self.0.powered().and_then(|volume| {
            let node = volume.look_up(parent.0, plain(name)?)?;
            Self::entry(&volume, node)
        });
        answer_entry(outcome, reply);
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        // Also without power: the mount point must be found to be unmounted.
        match Self::entry(&self.0.lock(), inode.0) {
            Ok(attributes) => reply.attr(&NOT_AT_ALL, &attributes),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let outcome = self.0.powered().and_then(|mut volume| {
            if let Some(size) = size {
                match volume.kind(inode.0)? {
                    Kind::File(bytes) if size >= bytes => volume.grow(inode.0, size)?,
                    // Nobody makes a file of the log smaller.
                    _ => return Err(VolumeError::Invalid),
                }
            }
            Self::entry(&volume, inode.0)
        });
        match outcome {
            Ok(attributes) => reply.attr(&NOT_AT_ALL, &attributes),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        answer_entry(self.make(parent, name, true).map(|(attributes, _)| attributes), reply);
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        match self.make(parent, name, false) {
            Ok((attributes, handle)) => {
                reply.created(&NOT_AT_ALL, &attributes, Generation(0), handle, OPENED);
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let outcome = self
            .0
            .powered()
            .and_then(|mut volume| plain(name).and_then(|name| volume.remove(parent.0, name)));
        answer(outcome, reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let outcome = self.0.powered().and_then(|mut volume| {
            if new_parent != parent || !flags.is_empty() {
                return Err(VolumeError::Invalid);
            }
            volume.rename(parent.0, plain(name)?, plain(new_name)?)
        });
        answer(outcome, reply);
    }

    fn readdir(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let entries = match self.0.powered().and_then(|volume| volume.list(inode.0)) {
            Ok(entries) => entries,
            Err(error) => return reply.error(errno(error)),
        };
        // Where one entry was removed since the last call, another may be passed over: so numbers, which only grow, not
        // positions.
        let mut entries: Vec<_> =
            entries.into_iter().filter(|(_, node, _)| *node > offset.max(ROOT)).collect();
        entries.sort_unstable_by_key(|(_, node, _)| *node);
        for (name, node, kind) in entries {
            let kind = match kind {
                Kind::Directory => FileType::Directory,
                Kind::File(_) => FileType::RegularFile,
            };
            if reply.add(INodeNo(node), node, kind, &name) {
                break;
            }
        }
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, inode: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.0.lock().flush_names(inode.0) {
            Err(VolumeError::Hung) => self.0.hold(Held::Flush(reply)),
            outcome => answer(outcome, reply),
        }
    }

    fn open(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let outcome =
            self.0.powered().and_then(|volume| volume.kind(inode.0).map(|_| FileHandle(volume.cuts())));
        match outcome {
            Ok(handle) => reply.opened(handle, OPENED),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let outcome =
            self.0.connected(handle).and_then(|mut volume| volume.read(inode.0, offset, size as usize));
        match outcome {
            Ok(bytes) => reply.data(&bytes),
            Err(VolumeError::Hung) => self.0.hold(Held::Read(reply)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let is_durable = flags.0 & libc::O_DSYNC != 0;
        let outcome =
            self.0.connected(handle).and_then(|mut volume| volume.write(inode.0, offset, data, is_durable));
        match outcome {
            Ok(()) => reply.written(data.len() as u32),
            Err(VolumeError::Hung) => self.0.hold(Held::Write(reply)),
            Err(error) => reply.error(errno(error)),
        }
    }

    /// Comes with every close(2), and promises nothing.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, inode: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.0.connected(handle).and_then(|mut volume| volume.flush(inode.0)) {
            Err(VolumeError::Hung) => self.0.hold(Held::Flush(reply)),
            outcome => answer(outcome, reply),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if mode != 0 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let outcome =
            self.0.powered().and_then(|mut volume| volume.grow(inode.0, offset.saturating_add(length)));
        answer(outcome, reply);
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(BLOCKS, BLOCKS, BLOCKS, BLOCKS, BLOCKS, 4096, 255, 4096);
    }
}
