//! Why a core could not be started or had to stop, with the cure.

use std::error::Error;
use std::fmt;
use std::path::PathBuf;

/// Why a core did not start, or how it ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// The kernel does not let this process use io_uring.
    #[error("io_uring is refused: {0}")]
    IoUringRefused(IoUringRefusal),
    /// Too little memory may be locked, or the machine is out of memory, for the rings and their buffers.
    #[error(
        "too little memory may be locked for io_uring, or the machine has too little: the limit is {limit_bytes} bytes \
         and {wanted_bytes} are wanted. Raise it with `ulimit -l {kib}`, `LimitMEMLOCK={wanted_bytes}` in \
         the systemd unit, `--ulimit memlock={wanted_bytes}` for a container, or give the backend less I/O memory",
        kib = wanted_bytes.div_ceil(1024)
    )]
    LockedMemory {
        /// RLIMIT_MEMLOCK as it is.
        limit_bytes: u64,
        /// What it should be.
        wanted_bytes: u64,
    },
    /// The configured core does not exist, or this process may not run on it.
    #[error(
        "core {core} is not available to this process; available are {available:?}. Choose one of these, or none \
         to let the kernel place the thread"
    )]
    CoreUnavailable {
        /// The configured core.
        core: usize,
        /// The cores that the affinity mask of the process allows.
        available: Vec<usize>,
    },
    /// The data directory cannot be used.
    #[error("cannot use the data directory {}: {source}", path.display())]
    DataDirectory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The kernel refuses to go on with the ring that it gave. What was in flight may still be, and its memory is kept.
    #[error("io_uring_enter failed: {0}")]
    Ring(std::io::Error),
    /// A [`Wakeup`](super::Wakeup) serves one core; this one serves, or served, another.
    #[error("this Wakeup belongs to another core; give each core a new one")]
    WakeupInUse,
    /// The system refused something else that a core needs (descriptors, threads).
    #[error("cannot set up the core: {0}")]
    Setup(#[from] std::io::Error),
    /// What was to be driven could not be made.
    #[error("{0}")]
    Make(Box<dyn Error + Send + Sync>),
    /// A turn panicked: a broken invariant. Writes in flight were awaited and the files closed.
    #[error("the engine stopped on a broken invariant: {0}")]
    Panicked(String),
}

/// Why io_uring is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IoUringRefusal {
    /// EPERM, and the sysctl `kernel.io_uring_disabled` has this value: 1 admits privileged processes and members
    /// of a group only, 2 admits nobody.
    Sysctl(u32),
    /// EPERM or EACCES although the sysctl allows it: a seccomp filter or a security module.
    Policy,
    /// ENOSYS: not in this kernel, or hidden by a seccomp filter.
    Missing,
    /// There, but older than Linux 5.11.
    TooOld,
    /// There, but older than Linux 6.1: it does not put its work off until the core waits (IORING_SETUP_DEFER_TASKRUN).
    NoDeferredWork,
    /// Another error number.
    Other(i32),
}

impl fmt::Display for IoUringRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sysctl(1) => f.write_str(
                "the sysctl kernel.io_uring_disabled is 1. Set it to 0 (`sysctl kernel.io_uring_disabled=0`), or \
                 add this user to the group named by kernel.io_uring_group",
            ),
            Self::Sysctl(value) => write!(
                f,
                "the sysctl kernel.io_uring_disabled is {value}. Set it to 0 (`sysctl kernel.io_uring_disabled=0`)"
            ),
            Self::Policy => f.write_str(
                "not permitted by a seccomp filter or a security module, as container runtimes set by default. \
                 Allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile \
                 (`--security-opt seccomp=profile.json`)",
            ),
            Self::Missing => f.write_str(
                "the system call is missing (ENOSYS). Use Linux 5.11 or later built with CONFIG_IO_URING; in a \
                 sandbox that hides system calls, allow io_uring_setup, io_uring_enter and io_uring_register",
            ),
            Self::TooOld => f.write_str("this kernel's io_uring is too old. Use Linux 5.11 or later"),
            Self::NoDeferredWork => f.write_str(
                "this kernel's io_uring cannot put its work off (IORING_SETUP_DEFER_TASKRUN). Use Linux 6.1 or later, \
                 or the glommio backend",
            ),
            Self::Other(number) => write!(f, "{}", std::io::Error::from_raw_os_error(*number)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_their_cure() {
        let told = RuntimeError::LockedMemory { limit_bytes: 65_536, wanted_bytes: 50_331_648 }.to_string();
        assert!(told.contains("ulimit -l 49152") && told.contains("LimitMEMLOCK=50331648"), "{told}");
        let told = RuntimeError::IoUringRefused(IoUringRefusal::Sysctl(2)).to_string();
        assert!(told.contains("sysctl kernel.io_uring_disabled=0"), "{told}");
        let told = RuntimeError::IoUringRefused(IoUringRefusal::Policy).to_string();
        assert!(told.contains("seccomp"), "{told}");
    }
}
