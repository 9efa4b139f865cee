//! The seam between the log and the disk: operations in, completions out.
//!
//! A backend implements [`Disk`]. The log submits an operation under an id of its own choosing and learns
//! the outcome from a later [`Disk::poll`]. An operation owns what it needs (its buffer, shared or by value)
//! until its completion, so nothing borrowed can outlive a cancelled future: there are no futures here, and
//! no operation is ever cancelled. Each operation completes exactly once.
//!
//! Operations in flight at the same time may complete in any order, and their effects may reach the device in
//! any order. Whoever needs an order waits for the first completion before submitting the second.
//!
//! A backend serves one data directory: names are plain file names in it.

use ringraft_block::{Block, BlockBuf, SharedBlock};
use std::fmt;

/// Names an operation in flight. The submitter chooses it; the backend only hands it back. An id may be used
/// again once its completion has been polled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskOpId(pub u64);

/// An open file. The backend chooses it; it is valid from [`DiskOutput::Opened`] until the submission of
/// [`DiskOp::Close`], and is never used again in the life of the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u32);

/// How a file is opened. All access is direct (O_DIRECT): offsets, lengths and buffers are whole blocks of
/// [`ringraft_block::BLOCK_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Reads only.
    Read,
    /// Reads and writes; a write is durable only after a later [`DiskOp::Flush`] of the same file completed.
    Write,
    /// Reads and writes; a write that completed is durable (O_DSYNC).
    DurableWrite,
}

/// An operation, with all that it needs.
pub enum DiskOp<B: BlockBuf> {
    /// Lists the files of the data directory. Completes with [`DiskOutput::Listed`], sorted by name.
    List,
    /// Creates a file that must not exist, with `bytes` of space allocated to it (its content reads as zeros).
    /// The name is durable only after [`DiskOp::SyncDirectory`]. Completes with [`DiskOutput::Opened`].
    Create {
        /// Plain file name.
        name: String,
        /// Size, a multiple of the block size.
        bytes: u64,
        /// Access of the descriptor that is handed out.
        access: Access,
    },
    /// Opens a file that must exist. Completes with [`DiskOutput::Opened`].
    Open {
        /// Plain file name.
        name: String,
        /// Access of the descriptor that is handed out.
        access: Access,
    },
    /// Writes the first `bytes` of `block` at `offset`, within the file's size. Completes with
    /// [`DiskOutput::Written`], whose count may be short: the caller must check it.
    Write {
        /// An open file with write access.
        file: FileId,
        /// Where in the file, in bytes.
        offset: u64,
        /// What to write.
        block: SharedBlock<B>,
        /// How much of it, from its start.
        bytes: usize,
    },
    /// Reads `bytes` at `offset` into the start of `block`. Completes with [`DiskOutput::Read`], whose count is
    /// short at the end of the file.
    Read {
        /// An open file.
        file: FileId,
        /// Where in the file, in bytes.
        offset: u64,
        /// Where the bytes go; handed back by the completion, also by a failed one.
        block: Block<B>,
        /// How many.
        bytes: usize,
    },
    /// Makes completed writes of the file durable (fdatasync). Completes with [`DiskOutput::Done`].
    Flush {
        /// An open file.
        file: FileId,
    },
    /// Closes a file. No other operation on it may be in flight. Completes with [`DiskOutput::Done`].
    Close {
        /// The file, invalid from now on.
        file: FileId,
    },
    /// Renames within the directory, replacing `to`. Durable after [`DiskOp::SyncDirectory`].
    Rename {
        /// Present name.
        from: String,
        /// New name.
        to: String,
    },
    /// Removes a name. Durable after [`DiskOp::SyncDirectory`].
    Remove {
        /// Plain file name.
        name: String,
    },
    /// Makes completed creations, renames and removals durable. Completes with [`DiskOutput::Done`].
    SyncDirectory,
}

/// A file in the data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Plain file name.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
}

/// What a completed operation brought.
#[derive(Debug)]
pub enum DiskOutput<B: BlockBuf> {
    /// The files, sorted by name.
    Listed(Vec<DirectoryEntry>),
    /// The file is open.
    Opened {
        /// Its id.
        file: FileId,
        /// Its size in bytes.
        bytes: u64,
    },
    /// So many bytes were written, possibly fewer than asked.
    Written {
        /// Count from the start of the block.
        bytes: usize,
    },
    /// So many bytes were read, fewer than asked only at the end of the file.
    Read {
        /// The block of the operation.
        block: Block<B>,
        /// Count from its start.
        bytes: usize,
    },
    /// Nothing but the success.
    Done,
}

/// A completion.
#[derive(Debug)]
pub struct DiskDone<B: BlockBuf> {
    /// The id under which the operation was submitted.
    pub id: DiskOpId,
    /// What came of it.
    pub result: Result<DiskOutput<B>, DiskError>,
}

/// A backend: one data directory, driven from one thread.
pub trait Disk {
    /// The memory that this backend reads and writes.
    type Buf: BlockBuf;

    /// A buffer of exactly `bytes`, a whole number of blocks, content undefined. Callers keep buffers in a
    /// [`ringraft_block::Pool`], so this is not on the hot path.
    ///
    /// # Errors
    /// [`DiskErrorKind::OutOfMemory`].
    fn allocate(&mut self, bytes: usize) -> Result<Self::Buf, DiskError>;

    /// Starts `op`. Never blocks; every outcome, an invalid argument included, arrives by [`Disk::poll`].
    fn submit(&mut self, id: DiskOpId, op: DiskOp<Self::Buf>);

    /// Appends the completions that have arrived to `done`, in the order of their arrival. Never blocks.
    fn poll(&mut self, done: &mut Vec<DiskDone<Self::Buf>>);
}

/// Why an operation failed, so far as a caller decides by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DiskErrorKind {
    /// No space, or a quota (ENOSPC, EDQUOT).
    NoSpace,
    /// The device failed, or anything else that has no kind of its own (EIO and the rest).
    Io,
    /// No such file.
    NotFound,
    /// The file exists already.
    AlreadyExists,
    /// Not permitted, or the file system is read-only.
    PermissionDenied,
    /// The file system or kernel does not do this (direct I/O, allocation).
    Unsupported,
    /// No memory, no more of it may be locked, no more files may be open, or the kernel asks to try again (ENOMEM, EMFILE,
    /// ENFILE, EAGAIN, EINTR): says nothing about what is on the device.
    OutOfMemory,
    /// An argument broke the rules of [`DiskOp`].
    InvalidInput,
}

/// A failed operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskError {
    /// What callers decide by.
    pub kind: DiskErrorKind,
    /// The operation, for people: `"write"`, `"open"`.
    pub operation: &'static str,
    /// The operating system's error number, where there was one.
    pub os_error: Option<i32>,
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            DiskErrorKind::NoSpace => "no space left on the device",
            DiskErrorKind::Io => "input/output error",
            DiskErrorKind::NotFound => "no such file",
            DiskErrorKind::AlreadyExists => "the file exists already",
            DiskErrorKind::PermissionDenied => "not permitted",
            DiskErrorKind::Unsupported => "not supported by this file system or kernel",
            DiskErrorKind::OutOfMemory => "out of memory",
            DiskErrorKind::InvalidInput => "invalid argument",
        };
        write!(f, "{} failed: {what}", self.operation)?;
        match self.os_error {
            Some(number) => write!(f, " ({})", std::io::Error::from_raw_os_error(number)),
            None => Ok(()),
        }
    }
}

impl std::error::Error for DiskError {}

impl DiskError {
    /// The failure of `operation` with the operating system's error `number`.
    #[must_use]
    pub fn from_os(operation: &'static str, number: i32) -> Self {
        use rustix::io::Errno;
        let kind = match Errno::from_raw_os_error(number) {
            Errno::NOSPC | Errno::DQUOT => DiskErrorKind::NoSpace,
            Errno::NOENT => DiskErrorKind::NotFound,
            Errno::EXIST => DiskErrorKind::AlreadyExists,
            Errno::ACCESS | Errno::PERM | Errno::ROFS => DiskErrorKind::PermissionDenied,
            Errno::OPNOTSUPP | Errno::NOSYS => DiskErrorKind::Unsupported,
            Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::AGAIN | Errno::INTR => {
                DiskErrorKind::OutOfMemory
            }
            Errno::INVAL | Errno::BADF => DiskErrorKind::InvalidInput,
            _ => DiskErrorKind::Io,
        };
        Self { kind, operation, os_error: Some(number) }
    }
}
