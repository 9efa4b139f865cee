//! The data directory itself: that it is there, on a disk, and nobody else's.
//!
//! The only part of this crate that calls the system directly and may block: it is used once, before the core runs.

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

const LOCK_NAME: &str = "LOCK";

const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;
const OVERLAYFS_MAGIC: u64 = 0x794c_7630;

/// A data directory that this process holds alone for as long as the value lives.
#[derive(Debug)]
pub struct DataDirectory {
    path: PathBuf,
    /// The lock goes with the descriptor, also when the process is killed.
    _lock: OwnedFd,
}

/// Why a directory cannot hold a log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DirectoryError {
    /// Another process, or another node of this one, uses it.
    #[error("{} is in use by another process: stop that one, or give this node a directory of its own", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The file system keeps nothing over a power failure, or cannot do direct I/O properly.
    #[error("{} is on {file_system}, which cannot hold a log: choose a directory on a local disk (ext4, XFS)", path.display())]
    FileSystem {
        /// The directory.
        path: PathBuf,
        /// What it is on.
        file_system: &'static str,
    },
    /// Something else has the name.
    #[error("{} is not a directory: move it away, or choose another path", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// It does not exist and was not to be created.
    #[error("{} does not exist: create it, or correct the path", path.display())]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// This process may not write there.
    #[error("cannot write to {}: {reason}; give this user write permission, or choose another directory", path.display())]
    NotWritable {
        /// The path.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// Anything else that the system said.
    #[error("cannot open the data directory {}: {reason}", path.display())]
    Other {
        /// The path.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

impl DataDirectory {
    /// Opens the directory at `path`, creates it if it is missing and `create` says so, and locks it.
    ///
    /// # Errors
    /// [`DirectoryError`], each with its cure.
    pub fn open(path: &Path, create: bool) -> Result<Self, DirectoryError> {
        let failed = |error: Errno| match error {
            Errno::ACCESS | Errno::PERM | Errno::ROFS => {
                DirectoryError::NotWritable { path: path.to_owned(), reason: error.to_string() }
            }
            Errno::NOTDIR => DirectoryError::NotADirectory { path: path.to_owned() },
            Errno::NOENT => DirectoryError::Missing { path: path.to_owned() },
            error => DirectoryError::Other { path: path.to_owned(), reason: error.to_string() },
        };
        // What has to be created, the innermost first.
        let missing: Vec<&Path> = path.ancestors().take_while(|above| create && !above.exists()).collect();
        if create {
            std::fs::create_dir_all(path).map_err(|error| match error.raw_os_error() {
                // The path, or one above it, is a file.
                Some(number) if Errno::from_raw_os_error(number) == Errno::EXIST => failed(Errno::NOTDIR),
                Some(number) => failed(Errno::from_raw_os_error(number)),
                None => DirectoryError::Other { path: path.to_owned(), reason: error.to_string() },
            })?;
        }
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
        let statistics = rustix::fs::fstatfs(&directory).map_err(failed)?;
        if let Some(file_system) = unfit(statistics.f_type as u64) {
            return Err(DirectoryError::FileSystem { path: path.to_owned(), file_system });
        }
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC;
        let lock =
            rustix::fs::openat(&directory, LOCK_NAME, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            Errno::WOULDBLOCK => DirectoryError::InUse { path: path.to_owned() },
            error => failed(error),
        })?;
        // The names that lead here must survive a power failure as well.
        rustix::fs::fsync(&directory).map_err(failed)?;
        for created in missing {
            let parent =
                created.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let parent =
                rustix::fs::open(parent, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
            parent.and_then(rustix::fs::fsync).map_err(failed)?;
        }
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The name of a file system that cannot hold a log.
fn unfit(magic: u64) -> Option<&'static str> {
    match magic & 0xffff_ffff {
        TMPFS_MAGIC => Some("tmpfs"),
        RAMFS_MAGIC => Some("ramfs"),
        OVERLAYFS_MAGIC => Some("overlayfs"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch() -> tempfile::TempDir {
        // Beside the test's own program, wherever cargo builds: the system's temporary directory is often in memory.
        let program = std::env::current_exe().expect("a program");
        tempfile::tempdir_in(program.parent().expect("in a directory")).expect("a directory for test data")
    }

    #[test]
    fn a_directory_is_created_and_held_by_one_at_a_time() {
        let parent = scratch();
        let path = parent.path().join("a/b");
        assert_eq!(
            DataDirectory::open(&path, false).unwrap_err(),
            DirectoryError::Missing { path: path.clone() }
        );
        let held = DataDirectory::open(&path, true).expect("created");
        assert_eq!(
            DataDirectory::open(&path, true).unwrap_err(),
            DirectoryError::InUse { path: path.clone() }
        );
        drop(held);
        DataDirectory::open(&path, false).expect("free again");
    }

    #[test]
    fn a_file_in_the_way_is_told() {
        let parent = scratch();
        let path = parent.path().join("file");
        std::fs::write(&path, b"x").unwrap();
        for path in [path.clone(), path.join("below")] {
            let error = DataDirectory::open(&path, true).unwrap_err();
            assert!(matches!(error, DirectoryError::NotADirectory { .. }), "{error:?}");
        }
    }

    #[test]
    fn memory_is_no_place_for_a_log() {
        let Ok(parent) = tempfile::tempdir_in("/dev/shm") else {
            eprintln!("skipped: there is no /dev/shm to try");
            return;
        };
        let error = DataDirectory::open(parent.path(), true).unwrap_err();
        assert!(matches!(error, DirectoryError::FileSystem { file_system: "tmpfs", .. }), "{error:?}");
    }
}
