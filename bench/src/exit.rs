//! Exit codes: one for each kind of failure that a script may want to tell apart.

use crate::cleanup::Interrupted;
use ringraft::error::{StopCause, StopError};
use ringraft::runtime::{IoUringRefusal, RuntimeError};
use ringraft_wal::WalError;
use ringraft_wal::directory::DirectoryError;
use ringraft_wal::disk::DiskErrorKind;

/// A failure, a failed verification among them.
pub(crate) const FAILURE: u8 = 1;
/// The command line or the configuration.
pub(crate) const USAGE: u8 = 2;
/// The data directory cannot be made, read or written.
pub(crate) const DIRECTORY: u8 = 10;
/// The data directory is not on a disk (tmpfs, ramfs).
pub(crate) const NOT_ON_DISK: u8 = 11;
/// The data directory belongs to another node or cluster.
pub(crate) const ANOTHER_NODE: u8 = 12;
/// Another process uses the data directory.
pub(crate) const DIRECTORY_IN_USE: u8 = 13;
/// The port is in use.
pub(crate) const PORT_IN_USE: u8 = 14;
/// Too little memory may be locked.
pub(crate) const LOCKED_MEMORY: u8 = 15;
/// io_uring is disabled by a sysctl.
pub(crate) const IO_URING_SYSCTL: u8 = 16;
/// io_uring is refused by a seccomp filter or a security module.
pub(crate) const IO_URING_POLICY: u8 = 17;
/// io_uring is missing or too old.
pub(crate) const IO_URING_MISSING: u8 = 18;
/// No space on the log's disk.
pub(crate) const NO_SPACE: u8 = 19;
/// The log failed or is damaged.
pub(crate) const LOG: u8 = 20;
/// `wal verify`: the log ends in a torn write that was never acknowledged.
pub(crate) const TORN_TAIL: u8 = 21;

/// The codes, for `--help`.
pub(crate) const HELP: &str = "\
Exit codes:
   0  in good order
   1  any other failure, a failed verification among them
   2  command line or configuration
  10  the directory cannot be made, read or written
  11  the directory is on a file system in memory
  12  the directory belongs to another node or cluster
  13  another process uses the directory
  14  the port is in use
  15  too little memory may be locked (ulimit -l)
  16  io_uring is disabled by the sysctl kernel.io_uring_disabled
  17  io_uring is refused by a seccomp filter or a security module
  18  io_uring is missing or too old
  19  no space for the log
  20  the log failed or is damaged
  21  wal verify: the log ends in a torn write, which the next start drops
 128+ the number of the signal that interrupted it";

/// A failure whose code is known: one that a child has already told, or that was found without the engine.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) message: String,
}

/// The exit code for `error`.
pub(crate) fn code_of(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if let Some(failure) = cause.downcast_ref::<Failure>() {
            return failure.code;
        }
        if let Some(Interrupted { signal }) = cause.downcast_ref() {
            return 128_u8.saturating_add(u8::try_from(*signal).unwrap_or(u8::MAX));
        }
        if let Some(cause) = cause.downcast_ref::<StopCause>() {
            return code_of_stop(cause.error());
        }
    }
    FAILURE
}

fn code_of_stop(error: &StopError) -> u8 {
    match error {
        StopError::Config(_) => USAGE,
        StopError::Directory(error) => code_of_directory(error),
        StopError::Runtime(error) => code_of_runtime(error),
        StopError::Listen { .. } => PORT_IN_USE,
        StopError::Log(error) => code_of_log(error),
        StopError::Read(_)
        | StopError::CopiesGone { .. }
        | StopError::DiskStalled { .. }
        | StopError::SnapshotForeign { .. } => LOG,
        _ => FAILURE,
    }
}

fn code_of_directory(error: &DirectoryError) -> u8 {
    match error {
        DirectoryError::InUse { .. } => DIRECTORY_IN_USE,
        DirectoryError::FileSystem { .. } => NOT_ON_DISK,
        _ => DIRECTORY,
    }
}

fn code_of_log(error: &WalError) -> u8 {
    match error {
        WalError::Config(_) => USAGE,
        WalError::WrongIdentity { .. } => ANOTHER_NODE,
        WalError::Disk { error, .. } => match error.kind {
            DiskErrorKind::NoSpace => NO_SPACE,
            DiskErrorKind::PermissionDenied => DIRECTORY,
            DiskErrorKind::OutOfMemory => LOCKED_MEMORY,
            _ => LOG,
        },
        _ => LOG,
    }
}

fn code_of_runtime(error: &RuntimeError) -> u8 {
    match error {
        RuntimeError::LockedMemory { .. } => LOCKED_MEMORY,
        RuntimeError::IoUringRefused(IoUringRefusal::Sysctl(_)) => IO_URING_SYSCTL,
        RuntimeError::IoUringRefused(IoUringRefusal::Policy) => IO_URING_POLICY,
        RuntimeError::IoUringRefused(IoUringRefusal::Missing | IoUringRefusal::TooOld) => IO_URING_MISSING,
        RuntimeError::CoreUnavailable { .. } => USAGE,
        RuntimeError::DataDirectory { .. } => DIRECTORY,
        _ => FAILURE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_of_io_uring_has_the_code_that_the_help_names() {
        for (refusal, code, said) in [
            (IoUringRefusal::Sysctl(1), IO_URING_SYSCTL, "kernel.io_uring_disabled is 1"),
            (IoUringRefusal::Sysctl(2), IO_URING_SYSCTL, "kernel.io_uring_disabled is 2"),
            (IoUringRefusal::Policy, IO_URING_POLICY, "seccomp filter"),
            (IoUringRefusal::Missing, IO_URING_MISSING, "ENOSYS"),
            (IoUringRefusal::TooOld, IO_URING_MISSING, "Linux 5.11"),
        ] {
            let error = StopCause::from(StopError::Runtime(RuntimeError::IoUringRefused(refusal)));
            assert!(error.to_string().contains(said), "{error}");
            assert_eq!(code_of(&error.into()), code, "{refusal:?}");
        }
    }
}
