//! What a disk does with names: system calls that may block, so that a backend makes them on another thread. Names are
//! resolved against a descriptor of the directory; what is found is opened again through its own descriptor, so
//! that nothing that happens to the name meanwhile matters.

use super::RuntimeError;
use ringraft_block::BLOCK_BYTES;
use ringraft_wal::disk::{DirectoryEntry, DiskError, DiskErrorKind};
use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// Opens the directory itself.
pub(super) fn open(path: &Path) -> Result<OwnedFd, RuntimeError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty())
        .map_err(|errno| RuntimeError::DataDirectory { path: path.into(), source: errno.into() })
}

/// The regular files, sorted by name.
pub(super) fn list(directory: &OwnedFd) -> Result<Vec<DirectoryEntry>, Errno> {
    let mut entries = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let entry = entry?;
        // A name that is not UTF-8 is none of ours.
        let Ok(name) = entry.file_name().to_str() else { continue };
        let status = match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            status => status?,
        };
        if FileType::from_raw_mode(status.st_mode) == FileType::RegularFile {
            let bytes = u64::try_from(status.st_size).unwrap_or(0);
            entries.push(DirectoryEntry { name: name.to_owned(), bytes });
        }
    }
    entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

/// Creates a file that must not exist, with space for `bytes`.
pub(super) fn create(directory: &OwnedFd, name: &str, bytes: u64) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, plain(name)?, flags, Mode::RUSR | Mode::WUSR)?;
    let allocated = match bytes {
        0 => Ok(()),
        _ => rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes),
    };
    if let Err(errno) = allocated {
        let _ = remove(directory, name);
        return Err(errno);
    }
    Ok(file)
}

/// Finds a regular file, for [`again`]; with its size in bytes.
pub(super) fn find(directory: &OwnedFd, name: &str) -> Result<(OwnedFd, u64), Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, plain(name)?, flags, Mode::empty())?;
    let status = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
        return Err(Errno::INVAL);
    }
    Ok((file, u64::try_from(status.st_size).map_err(|_| Errno::INVAL)?))
}

/// A path by which the file of a descriptor can be opened once more, with other options.
pub(super) fn again(found: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", found.as_raw_fd())
}

/// Renames within the directory.
pub(super) fn rename(directory: &OwnedFd, from: &str, to: &str) -> Result<(), Errno> {
    rustix::fs::renameat(directory, plain(from)?, directory, plain(to)?)
}

/// Removes a name.
pub(super) fn remove(directory: &OwnedFd, name: &str) -> Result<(), Errno> {
    rustix::fs::unlinkat(directory, plain(name)?, AtFlags::empty())
}

/// A name within the directory.
fn plain(name: &str) -> Result<&str, Errno> {
    let elsewhere = matches!(name, "" | "." | "..") || name.contains(['/', '\0']);
    if elsewhere { Err(Errno::INVAL) } else { Ok(name) }
}

/// Whether direct I/O can be done there.
pub(super) fn whole_blocks(offset: u64, bytes: usize) -> bool {
    bytes > 0 && bytes.is_multiple_of(BLOCK_BYTES) && offset.is_multiple_of(BLOCK_BYTES as u64)
}

/// An operation that broke the rules.
pub(super) fn invalid(operation: &'static str) -> DiskError {
    DiskError { kind: DiskErrorKind::InvalidInput, operation, os_error: None }
}

/// Whether a backend can make a buffer of so many bytes. Allocators end the process where no memory is left; this asks first.
pub(super) fn may_allocate(bytes: usize) -> Result<(), DiskError> {
    if bytes == 0 || !bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(invalid("allocate"));
    }
    // Aligned it may take a block more.
    Vec::<u8>::new().try_reserve_exact(bytes.saturating_add(BLOCK_BYTES)).map_err(|_| DiskError {
        kind: DiskErrorKind::OutOfMemory,
        operation: "allocate",
        os_error: None,
    })
}
