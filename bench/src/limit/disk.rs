//! The files that the limit writes to, and the file systems that it refuses.
//!
//! A log file is opened with `O_DIRECT | O_DSYNC`, unlinked at once, preallocated, filled with zeros and
//! flushed, so that each write measured afterwards overwrites blocks that are already there and is durable
//! when it completes. As it has no name, it is gone with its process, however that ends.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use rustix::fs::FallocateFlags;

/// Every write's size and offset is a multiple of this.
pub(super) const BLOCK_BYTES: usize = 4096;
/// A log file is filled in pieces of this size.
const PIECE_BYTES: usize = 256 << 10;

/// A nameless file whose writes are durable when they complete.
pub(super) struct LogFile {
    file: File,
    len: u64,
}

impl LogFile {
    /// Makes an empty file in `dir`. `name` is in use for a moment only.
    pub(super) fn create(dir: &Path, name: &str) -> anyhow::Result<Self> {
        let path = dir.join(name);
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .custom_flags(libc::O_DIRECT | libc::O_DSYNC)
            .open(&path);
        if opened.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL)) {
            // Linux creates the name before it finds that the file system has no direct I/O.
            let _ = std::fs::remove_file(&path);
            bail!(
                "the file system of {} refuses direct I/O (O_DIRECT). Cure: a directory on ext4 or xfs",
                dir.display()
            );
        }
        let file = opened.with_context(|| format!("creating {}", path.display()))?;
        std::fs::remove_file(&path).with_context(|| format!("unlinking {}", path.display()))?;
        Ok(Self { file, len: 0 })
    }

    /// Grows the file to `len` bytes of written zeros. `len` is a multiple of [`BLOCK_BYTES`].
    pub(super) fn fill(&mut self, len: u64) -> anyhow::Result<()> {
        // Not every file system can allocate ahead; writing the zeros allocates as well.
        let _ = rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, len);
        let zeros = Box::new(Zeros([0; PIECE_BYTES]));
        while self.len < len {
            let piece = usize::try_from(len - self.len).map_or(PIECE_BYTES, |rest| rest.min(PIECE_BYTES));
            self.file.write_all_at(&zeros.0[..piece], self.len).context("filling a file with zeros")?;
            self.len += piece as u64;
        }
        self.file.sync_all().context("flushing a file of zeros")
    }

    /// Where write number `sequence` of a series of writes of `bytes` each goes: in order, and round again.
    pub(super) fn offset(&self, sequence: u64, bytes: usize) -> u64 {
        sequence % (self.len / bytes as u64) * bytes as u64
    }

    /// Fails unless the file holds at least two writes of `bytes`.
    pub(super) fn check(&self, bytes: usize) -> anyhow::Result<()> {
        ensure!(
            bytes > 0 && bytes.is_multiple_of(BLOCK_BYTES),
            "{bytes} bytes are not whole blocks of {BLOCK_BYTES}"
        );
        ensure!(
            self.len >= 2 * bytes as u64,
            "a file of {} bytes is too small for writes of {bytes}",
            self.len
        );
        Ok(())
    }
}

impl AsFd for LogFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Zeros aligned for direct I/O.
#[repr(C, align(4096))]
struct Zeros([u8; PIECE_BYTES]);

/// The name of `dir`'s file system. Fails where nothing can be durable, or where `needed_bytes` do not fit.
pub(crate) fn check_file_system(dir: &Path, needed_bytes: u64) -> anyhow::Result<String> {
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    let stat = rustix::fs::statfs(dir)
        .with_context(|| format!("looking at the file system of {}", dir.display()))?;
    let magic = stat.f_type as u64 & 0xffff_ffff;
    let name = match magic {
        0xef53 => "ext4".to_owned(),
        0x5846_5342 => "xfs".to_owned(),
        0x9123_683e => "btrfs".to_owned(),
        0xf2f5_2010 => "f2fs".to_owned(),
        0x2fc1_2fc1 => "zfs".to_owned(),
        0x794c_7630 => "overlay".to_owned(),
        0x6969 => "nfs".to_owned(),
        TMPFS | RAMFS => bail!(
            "{} is on a file system in memory (tmpfs or ramfs), where no write is ever durable and the figures \
             would mean nothing. Cure: --dir with a directory on a disk, such as one under your home directory",
            dir.display()
        ),
        other => format!("type {other:#x}"),
    };
    let free = rustix::fs::statvfs(dir).map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize));
    let free = free.with_context(|| format!("looking at the free space of {}", dir.display()))?;
    ensure!(
        free > needed_bytes,
        "{} has {} MiB free and the measurement writes to {} MiB. Cure: --dir with a directory that has more room",
        dir.display(),
        free >> 20,
        needed_bytes >> 20
    );
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_file_has_no_name_and_wraps_around() {
        let dir = tempfile::tempdir_in(".").unwrap();
        let mut file = LogFile::create(dir.path(), "log").unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        file.fill(1 << 20).unwrap();
        assert_eq!(file.file.metadata().unwrap().len(), 1 << 20);
        file.check(256 << 10).unwrap();
        assert_eq!([0, 1, 3, 4, 9].map(|n| file.offset(n, 256 << 10) >> 10), [0, 256, 768, 0, 256]);
        assert!(file.check(1 << 20).is_err());
        assert!(file.check(1000).is_err());
    }

    #[test]
    fn more_than_the_disk_holds_is_refused() {
        let error = check_file_system(Path::new("."), u64::MAX).unwrap_err();
        assert!(error.to_string().contains("more room"), "{error}");
    }
}
