//! One io_uring with its memory: the only file of the limit that talks to the kernel's ring.
//!
//! A ring lives on one thread and makes one system call per turn: submit everything that was pushed, wait
//! for some completions, hand them out. It owns the memory that its operations use, so nothing in flight
//! can outlive its buffer: dropping a ring cancels what it still has in flight, waits for it, and only then
//! unmaps. A ring that cannot learn that all is over leaks its memory instead.
//!
//! Newer kernels run completions on the waiting thread only (`DEFER_TASKRUN`, 6.1), which saves wake-ups;
//! older ones fall back to `COOP_TASKRUN` (5.19) and then to a plain ring. [`probe`] says which.

use std::ffi::c_void;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use io_uring::{IoUring, opcode, squeue, types};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::net::SendFlags;

/// Submission queue entries. A turn pushes at most a write per slot, and two operations per socket.
const ENTRIES: u32 = 128;
/// Alignment of an [`Arena`]: a huge page, which more than covers the direct-I/O alignment of any disk.
const ARENA_ALIGN: usize = 2 << 20;
/// Marks operations that complete silently when they succeed.
const QUIET: u64 = 1 << 63;
/// For so long a ring that looks for completions does so before it sleeps: as long as an engine does by default.
const LOOK_FOR: Duration = Duration::from_micros(500);
/// The token of the cancellation that ends a ring.
const CANCEL: u64 = QUIET - 1;

/// What an operation is called when it completes. The top bit is the ring's own.
pub(super) type Token = u64;

/// A finished operation.
#[derive(Debug)]
pub(super) struct Completion {
    /// The token it was pushed with.
    pub(super) token: Token,
    /// Bytes moved, or the poll's events.
    pub(super) result: io::Result<usize>,
}

/// An io_uring, a fixed table of files, and a zeroed [`Arena`] that all its operations use.
pub(super) struct Ring {
    uring: IoUring,
    arena: ManuallyDrop<Arena>,
    /// Operations pushed whose completion is still to come; silent ones are not counted.
    pending: usize,
    /// How many files the table holds.
    files: usize,
    fixed_buffers: bool,
    quiet_sends: bool,
    looks: bool,
}

impl Ring {
    /// A ring over `files`, which the caller keeps open while the ring lives, and `arena_bytes` of memory. If it `looks`, it does so
    /// for completions before it sleeps, and lets others of its processor go first with every look.
    pub(super) fn new(files: &[BorrowedFd<'_>], arena_bytes: usize, looks: bool) -> anyhow::Result<Self> {
        let (uring, _mode) = set_up()?;
        let arena = Arena::new(arena_bytes)?;
        let raw: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        uring.submitter().register_files(&raw).context("registering files with io_uring")?;
        let vector = libc::iovec { iov_base: arena.base.as_ptr().cast(), iov_len: arena.len };
        // SAFETY: the arena stays mapped until the ring's last operation is over: see `drop`.
        let fixed_buffers = unsafe { uring.submitter().register_buffers(&[vector]) }.is_ok();
        let quiet_sends = uring.params().is_feature_skip_cqe_on_success();
        let arena = ManuallyDrop::new(arena);
        Ok(Self { uring, arena, pending: 0, files: files.len(), fixed_buffers, quiet_sends, looks })
    }

    /// Whether a send can be pushed that reports only its failure.
    pub(super) fn quiet_sends(&self) -> bool {
        self.quiet_sends
    }

    /// Copies `bytes` into the arena.
    pub(super) fn copy_in(&mut self, at: usize, bytes: &[u8]) {
        let to = self.arena.at(at, bytes.len());
        // SAFETY: the range is inside the mapping, which no Rust reference covers.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Copies 8 bytes out of the arena.
    pub(super) fn copy_out(&self, at: usize) -> u64 {
        let from = self.arena.at(at, 8);
        let mut bytes = [0; 8];
        // SAFETY: the range is inside the mapping, which no Rust reference covers.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), 8) };
        u64::from_le_bytes(bytes)
    }

    /// Fills the whole arena with bytes that no disk can compress, and so touches every page of it.
    pub(super) fn fill(&mut self) {
        let mut state = 0x9E37_79B9_7F4A_7C15u64;
        for at in (0..self.arena.len / 8 * 8).step_by(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            self.copy_in(at, &state.to_le_bytes());
        }
    }

    /// Writes `len` bytes of the arena to file `file` at `offset`.
    pub(super) fn push_write(
        &mut self,
        file: u32,
        at: usize,
        len: usize,
        offset: u64,
        token: Token,
    ) -> io::Result<()> {
        let from = self.arena.at(at, len);
        let fd = types::Fixed(file);
        let entry = if self.fixed_buffers {
            opcode::WriteFixed::new(fd, from, len as u32, 0).offset(offset).build()
        } else {
            opcode::Write::new(fd, from, len as u32).offset(offset).build()
        };
        self.push(entry, file, token)
    }

    /// Receives into the arena: up to `len` bytes, or all of them if `whole`.
    pub(super) fn push_recv(
        &mut self,
        file: u32,
        at: usize,
        len: usize,
        whole: bool,
        token: Token,
    ) -> io::Result<()> {
        let to = self.arena.at(at, len);
        let flags = if whole { libc::MSG_WAITALL } else { 0 };
        let entry = opcode::Recv::new(types::Fixed(file), to, len as u32).flags(flags).build();
        self.push(entry, file, token)
    }

    /// Sends from the arena with the next turn, with a completion only if it fails or falls short.
    /// Needs [`Self::quiet_sends`].
    pub(super) fn push_quiet_send(
        &mut self,
        file: u32,
        at: usize,
        len: usize,
        token: Token,
    ) -> io::Result<()> {
        let from = self.arena.at(at, len);
        let flags = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
        let entry = opcode::Send::new(types::Fixed(file), from, len as u32).flags(flags).build();
        self.push(entry.flags(squeue::Flags::SKIP_SUCCESS), file, token | QUIET)
    }

    /// Completes when `file` can be written to.
    pub(super) fn push_poll_out(&mut self, file: u32, token: Token) -> io::Result<()> {
        let entry = opcode::PollAdd::new(types::Fixed(file), libc::POLLOUT as u32).build();
        self.push(entry, file, token)
    }

    /// Sends from the arena at once, as much as the socket takes: zero bytes if it takes none.
    pub(super) fn send_now(&self, socket: BorrowedFd<'_>, at: usize, len: usize) -> io::Result<usize> {
        let from = self.arena.at(at, len);
        // SAFETY: the range is inside the mapping; callers send only what no operation in flight changes.
        let bytes = unsafe { std::slice::from_raw_parts(from, len) };
        match rustix::net::send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => Ok(sent),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Submits what was pushed and waits for `want` completions. May return earlier (a signal).
    pub(super) fn turn(&mut self, want: usize) -> io::Result<()> {
        if self.looks {
            let until = Instant::now() + LOOK_FOR;
            while Instant::now() < until {
                // Without anything to submit or to collect this is no system call.
                self.enter(0)?;
                if self.uring.completion().len() >= want {
                    return Ok(());
                }
                rustix::thread::sched_yield();
            }
        }
        self.enter(want)
    }

    fn enter(&mut self, want: usize) -> io::Result<()> {
        let submission = self.uring.submission();
        let idle = submission.is_empty() && !submission.taskrun() && !submission.cq_overflow();
        drop(submission);
        if want == 0 && idle {
            return Ok(());
        }
        match self.uring.submit_and_wait(want) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // Nothing is lost: what was not submitted stays in the queue for the next turn.
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// The next completion at hand.
    pub(super) fn next(&mut self) -> Option<Completion> {
        let entry = self.uring.completion().next()?;
        let mut token = entry.user_data();
        if token & QUIET == 0 {
            self.pending -= 1;
        } else {
            token &= !QUIET;
        }
        let result = match entry.result() {
            error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
            bytes => Ok(bytes as usize),
        };
        Some(Completion { token, result })
    }

    fn push(&mut self, entry: squeue::Entry, file: u32, token: Token) -> io::Result<()> {
        assert!((file as usize) < self.files, "file {file} is not registered");
        let entry = entry.user_data(token);
        // SAFETY: the entry's memory is inside the arena, which outlives every operation (see `drop`), and
        // its file is in the ring's own table.
        if unsafe { self.uring.submission().push(&entry) }.is_err() {
            self.uring.submit()?;
            // SAFETY: as above.
            unsafe { self.uring.submission().push(&entry) }.map_err(io::Error::other)?;
        }
        if token & QUIET == 0 {
            self.pending += 1;
        }
        Ok(())
    }

    /// Cancels what is in flight and waits for its end. Says whether all has ended.
    fn quiesce(&mut self) -> bool {
        if self.pending == 0 {
            return true;
        }
        let entry = opcode::AsyncCancel2::new(types::CancelBuilder::any()).build().user_data(CANCEL);
        // SAFETY: a cancellation uses no memory.
        if unsafe { self.uring.submission().push(&entry) }.is_err() {
            return false;
        }
        self.pending += 1;
        while self.pending > 0 {
            if self.turn(1).is_err() {
                return false;
            }
            while let Some(completion) = self.next() {
                let unknown = completion.result.err().and_then(|error| error.raw_os_error());
                if completion.token == CANCEL && unknown == Some(libc::EINVAL) {
                    return false;
                }
            }
        }
        true
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.quiesce() {
            // SAFETY: dropped once, here, and no operation uses it any more.
            unsafe { ManuallyDrop::drop(&mut self.arena) };
        }
    }
}

/// Memory for a ring: zeroed, aligned for direct I/O, in huge pages where the kernel grants them.
struct Arena {
    base: NonNull<u8>,
    len: usize,
    mapped: NonNull<c_void>,
    mapped_len: usize,
}

impl Arena {
    fn new(len: usize) -> anyhow::Result<Self> {
        let len = len.next_multiple_of(ARENA_ALIGN);
        let mapped_len = len + ARENA_ALIGN;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new private mapping at an address of the kernel's choice touches nothing of ours.
        let mapped =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), mapped_len, access, MapFlags::PRIVATE) }
                .with_context(|| format!("mapping {mapped_len} bytes"))?;
        let base = mapped.cast::<u8>().wrapping_add(mapped.cast::<u8>().align_offset(ARENA_ALIGN));
        // SAFETY: the range is the mapping just made. Huge pages are a wish: a refusal changes nothing.
        let _ = unsafe { rustix::mm::madvise(base.cast(), len, Advice::LinuxHugepage) };
        let (Some(base), Some(mapped)) = (NonNull::new(base), NonNull::new(mapped)) else {
            return Err(anyhow!("the kernel mapped memory at address zero"));
        };
        Ok(Self { base, len, mapped, mapped_len })
    }

    /// The address of a range, which must lie inside.
    fn at(&self, at: usize, len: usize) -> *mut u8 {
        assert!(at <= self.len && len <= self.len - at, "{len} bytes at {at} of an arena of {}", self.len);
        self.base.as_ptr().wrapping_add(at)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made, and its owner is gone.
        let _ = unsafe { rustix::mm::munmap(self.mapped.as_ptr(), self.mapped_len) };
    }
}

/// Makes an io_uring in the best mode that the kernel offers.
fn set_up() -> anyhow::Result<(IoUring, &'static str)> {
    let best =
        IoUring::builder().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().build(ENTRIES);
    let refused = match best {
        Ok(uring) => return Ok((uring, "DEFER_TASKRUN, SINGLE_ISSUER")),
        Err(error) => error,
    };
    if refused.raw_os_error() == Some(libc::EINVAL) {
        if let Ok(uring) = IoUring::builder().setup_coop_taskrun().build(ENTRIES) {
            return Ok((uring, "COOP_TASKRUN"));
        }
        if let Ok(uring) = IoUring::builder().build(ENTRIES) {
            return Ok((uring, "plain"));
        }
    }
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok();
    let disabled = disabled.and_then(|value| value.trim().parse().ok());
    Err(anyhow!(why_refused(&refused, disabled)))
}

/// What a refused `io_uring_setup` means and what cures it. `disabled` is the sysctl's value, where there is
/// one (kernel 6.6).
fn why_refused(error: &io::Error, disabled: Option<u32>) -> String {
    let head = format!("the kernel refused io_uring: {error}.");
    match (error.raw_os_error(), disabled) {
        (Some(libc::EPERM), Some(2)) => format!(
            "{head} The sysctl kernel.io_uring_disabled is 2, which forbids it to every process. \
             Cure: sysctl -w kernel.io_uring_disabled=0"
        ),
        (Some(libc::EPERM), Some(1)) => format!(
            "{head} The sysctl kernel.io_uring_disabled is 1, which forbids it to processes outside the group \
             kernel.io_uring_group that lack CAP_SYS_ADMIN. Cure: sysctl -w kernel.io_uring_disabled=0, or join \
             that group"
        ),
        (Some(libc::EPERM), _) => format!(
            "{head} The sysctl kernel.io_uring_disabled does not forbid it, so a seccomp filter does, as the \
             default profiles of container runtimes do. Cure: run outside the container, or with a profile that \
             allows io_uring_setup, io_uring_enter and io_uring_register (Docker: --security-opt \
             seccomp=unconfined)"
        ),
        (Some(libc::ENOSYS), _) => format!(
            "{head} This kernel is older than 5.1 or was built without CONFIG_IO_URING, or a sandbox (gVisor, a \
             seccomp filter) hides it. Cure: a kernel of 5.11 or later, outside the sandbox"
        ),
        (Some(libc::ENOMEM), _) => {
            let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
            let limit = limit.map_or_else(|| "unlimited".to_owned(), |bytes| format!("{} KiB", bytes / 1024));
            format!(
                "{head} Rings count as locked memory, and this process may lock {limit}. Cure: a higher limit \
                 (ulimit -l, LimitMEMLOCK= in a systemd unit, --ulimit memlock=-1 in Docker)"
            )
        }
        _ => head,
    }
}

/// Fails, with the reason and its cure, if this process may not use io_uring. Returns the mode it gets.
pub(super) fn probe() -> anyhow::Result<&'static str> {
    let (uring, mode) = set_up()?;
    ensure!(
        uring.params().is_feature_nodrop(),
        "this kernel's io_uring may lose completions: 5.5 or later is needed"
    );
    Ok(mode)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_ring_dropped_with_a_receive_in_flight_cancels_it_and_returns() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut ring = Ring::new(&[ours.as_fd()], 4096, false).unwrap();
        ring.push_recv(0, 0, 64, true, 1).unwrap();
        ring.turn(0).unwrap();
        assert_eq!(ring.pending, 1);
        assert!(ring.quiesce());
        assert_eq!(ring.pending, 0);
    }

    #[test]
    fn a_quiet_send_arrives_and_only_the_receive_completes() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut ring = Ring::new(&[ours.as_fd(), theirs.as_fd()], 4096, false).unwrap();
        if !ring.quiet_sends() {
            return;
        }
        ring.copy_in(0, &7u64.to_le_bytes());
        ring.push_quiet_send(0, 0, 8, 1).unwrap();
        ring.push_recv(1, 64, 8, true, 2).unwrap();
        ring.turn(1).unwrap();
        let completion = ring.next().unwrap();
        assert_eq!((completion.token, completion.result.unwrap()), (2, 8));
        assert_eq!(ring.copy_out(64), 7);
        assert!(ring.next().is_none());
    }

    #[test]
    fn a_refusal_names_its_cause_and_its_cure() {
        let eperm = io::Error::from_raw_os_error(libc::EPERM);
        assert!(why_refused(&eperm, Some(2)).contains("kernel.io_uring_disabled is 2"));
        assert!(why_refused(&eperm, Some(1)).contains("io_uring_group"));
        assert!(why_refused(&eperm, Some(0)).contains("seccomp"));
        assert!(why_refused(&eperm, None).contains("seccomp"));
        assert!(why_refused(&io::Error::from_raw_os_error(libc::ENOSYS), None).contains("CONFIG_IO_URING"));
        assert!(why_refused(&io::Error::from_raw_os_error(libc::ENOMEM), None).contains("ulimit -l"));
    }

    #[test]
    #[should_panic(expected = "of an arena of")]
    fn memory_outside_the_arena_is_refused() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut ring = Ring::new(&[ours.as_fd()], 4096, false).unwrap();
        let _ = ring.push_recv(0, ARENA_ALIGN - 8, 16, false, 1);
    }
}
