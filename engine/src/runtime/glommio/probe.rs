//! What is checked before an executor is made, because glommio answers a refusal with a panic or an exit.

use crate::runtime::probe::{locked_memory_error, refused};
use crate::runtime::{IoUringRefusal, RuntimeError};
use rustix::process::{Resource, getrlimit};
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Once;

/// glommio makes three rings, and registers the I/O memory with each.
const RINGS: u64 = 3;
/// glommio refuses to start below this.
const LOCKED_BYTES_MIN: u64 = 512 * 1024;
/// IORING_FEAT_EXT_ARG, which came with Linux 5.11: later than every operation that glommio uses.
const FEATURE_OF_5_11: u32 = 1 << 8;

/// Does now, while the process has few threads, what would stall the first park by 14 to 80 ms: the kernel's
/// registration for expedited memory barriers waits for a grace period once the process has several threads.
///
/// [`run`](super::run) does this too; a program that calls it first thing in `main` does not pay.
pub fn warm_up() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: this system call reads and writes no memory of ours. Where it fails, glommio falls back to
        // another barrier.
        unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) };
    });
}

/// Whether this process may use io_uring.
pub(super) fn io_uring(locked_bytes_wanted: u64) -> Result<(), RuntimeError> {
    // struct io_uring_params: 120 bytes, of which the words from the sixth are the kernel's features.
    let mut parameters = [0u32; 30];
    // SAFETY: `parameters` is as large as the structure that the kernel reads and fills; zeros ask for nothing.
    let returned = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1u32, parameters.as_mut_ptr()) };
    if returned < 0 {
        let number = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        return Err(refused(number, locked_bytes_wanted));
    }
    let descriptor = RawFd::try_from(returned).expect("a descriptor is an int");
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    drop(unsafe { OwnedFd::from_raw_fd(descriptor) });
    if parameters[5] & FEATURE_OF_5_11 == 0 {
        return Err(RuntimeError::IoUringRefused(IoUringRefusal::TooOld));
    }
    Ok(())
}

/// How much memory the executor would like to lock.
pub(super) fn locked_bytes_wanted(io_memory_bytes: usize) -> u64 {
    (RINGS * io_memory_bytes as u64).max(LOCKED_BYTES_MIN)
}

/// Refuses a limit under which the executor cannot start, and warns of one under which the kernel will not keep
/// the buffers registered, so that each write maps its buffer again.
pub(super) fn locked_memory(wanted_bytes: u64) -> Result<(), RuntimeError> {
    let Some(limit_bytes) = getrlimit(Resource::Memlock).current else { return Ok(()) };
    if limit_bytes < LOCKED_BYTES_MIN {
        return Err(locked_memory_error(wanted_bytes));
    }
    if limit_bytes < wanted_bytes && !may_lock_any_amount() {
        tracing::warn!(
            limit_bytes,
            wanted_bytes,
            "the locked-memory limit is too low to register the I/O buffers: writes cost a little more CPU; \
             raise RLIMIT_MEMLOCK or lower io_memory_bytes"
        );
    }
    Ok(())
}

/// CAP_IPC_LOCK, which lifts the limit.
fn may_lock_any_amount() -> bool {
    const IPC_LOCK: u64 = 1 << 14;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .is_some_and(|set| set & IPC_LOCK != 0)
}

/// A write to a closed socket must be an error, not the end of a program that does not ignore SIGPIPE.
pub(super) fn block_sigpipe() {
    // SAFETY: the set is initialised by sigemptyset before it is used; the mask is that of this thread alone.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGPIPE);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
}
