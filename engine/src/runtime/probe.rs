//! What a core needs of the machine, told by name where it is not there.

use super::{IoUringRefusal, RuntimeError};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CpuSet, sched_getaffinity};
use std::fs;

/// Why a ring could not be made, by the error `number` of io_uring_setup.
pub(super) fn refused(number: i32, locked_bytes_wanted: u64) -> RuntimeError {
    match number {
        libc::EPERM | libc::EACCES => {
            let sysctl = fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
            RuntimeError::IoUringRefused(who_refuses(sysctl.as_deref().unwrap_or("")))
        }
        libc::ENOSYS => RuntimeError::IoUringRefused(IoUringRefusal::Missing),
        libc::ENOMEM => locked_memory_error(locked_bytes_wanted),
        libc::EMFILE | libc::ENFILE => RuntimeError::Setup(std::io::Error::from_raw_os_error(number)),
        number => RuntimeError::IoUringRefused(IoUringRefusal::Other(number)),
    }
}

/// Tells a refusal by the sysctl, whose value is given, from one by a filter. Kernels before 6.6 have no such sysctl.
fn who_refuses(sysctl: &str) -> IoUringRefusal {
    match sysctl.trim().parse() {
        Err(_) | Ok(0) => IoUringRefusal::Policy,
        Ok(value) => IoUringRefusal::Sysctl(value),
    }
}

pub(super) fn locked_memory_error(wanted_bytes: u64) -> RuntimeError {
    let limit_bytes = getrlimit(Resource::Memlock).current.unwrap_or(u64::MAX);
    RuntimeError::LockedMemory { limit_bytes, wanted_bytes }
}

/// Whether this thread may run on `core`.
pub(super) fn core(core: usize) -> Result<(), RuntimeError> {
    let allowed = sched_getaffinity(None).map_err(std::io::Error::from)?;
    if core < CpuSet::MAX_CPU && allowed.is_set(core) {
        return Ok(());
    }
    let available = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).collect();
    Err(RuntimeError::CoreUnavailable { core, available })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_by_the_sysctl_is_told_from_one_by_a_filter() {
        assert_eq!(who_refuses(""), IoUringRefusal::Policy);
        assert_eq!(who_refuses("0\n"), IoUringRefusal::Policy);
        assert_eq!(who_refuses("1\n"), IoUringRefusal::Sysctl(1));
        assert_eq!(who_refuses("2\n"), IoUringRefusal::Sysctl(2));
    }
}
