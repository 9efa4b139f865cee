//! The second backend: one io_uring of its own, no executor.
//!
//! # A pass
//!
//! The loop takes the completions at hand to the disk and the link, reads the clocks, runs a turn, and lets the kernel have
//! what the turn has started. A turn after which there is more to do is followed by another one, as is one in which another
//! thread has called ([`Wakeup`]); the kernel is entered between them for what the disk is to do, not for what waits for another
//! machine. Otherwise the core hands over what was started and looks for work for as long as its policy says (`polling`), without
//! a turn and without a system call but for giving way; then it parks. One that parks at once does so with the system call that
//! hands over: it then waits for a completion, for the bell, or until the deadline, and a turn costs one system call, besides
//! those of its sends.
//!
//! # What blocks
//!
//! Nothing on this thread, but that the kernel may look for a huge page when a large buffer is new (`memory`). Names, opening and
//! closing of files have a thread of their own per disk (`names`).
//!
//! # The end
//!
//! When the engine has been dropped, what its link had on the ring is cancelled; what its disk has there is awaited,
//! however long that takes. Only then are buffers freed and files closed.

mod disk;
mod link;
mod memory;
mod names;
mod operation;
mod ring;
mod tasks;

pub use disk::UringDisk;
pub use link::UringLink;
pub use memory::UringBuf;

use super::polling::Polling;
use super::{
    IdlePolicy, IoUringRefusal, LinkOptions, LocalFuture, LocalWakeup, Now, RuntimeError, Turn, TurnOutcome,
    Wakeup, caught, monotonic_ns, probe,
};
use disk::DiskShared;
use operation::{Io, reap};
use ring::Ring;
use rustix::thread::{CpuSet, sched_getaffinity};
use std::cell::RefCell;
use std::error::Error;
use std::ffi::CString;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tasks::Tasks;

/// How a core is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UringOptions {
    /// The core to run on; `None` lets the kernel move the thread.
    pub core: Option<usize>,
    /// What to do when there is nothing to do.
    pub idle: IdlePolicy,
    /// Entries of the submission ring, at least 1. More operations than that may be in flight, and may be started in one turn.
    pub ring_depth: u32,
    /// The thread's name, of which the system shows 15 bytes.
    pub name: String,
}

impl Default for UringOptions {
    fn default() -> Self {
        Self { core: None, idle: IdlePolicy::default(), ring_depth: 256, name: "ringraft".to_owned() }
    }
}

/// Turns that leave more to do before the kernel must have what they started, urgent or not, and has its say.
const TURNS_PER_FLUSH: u32 = 2;

/// Memory of a ring's entry and its completions, which old kernels count as locked: rounded up.
const LOCKED_BYTES_PER_ENTRY: u64 = 256;

/// What an engine is made with, on the core that will run it. Clones refer to the same core.
#[derive(Clone)]
pub struct CoreContext {
    inner: Rc<CoreInner>,
}

struct CoreInner {
    io: Rc<Io>,
    wakeup: Arc<Wakeup>,
    local: LocalWakeup,
    disks: RefCell<Vec<Rc<DiskShared>>>,
    tasks: Tasks,
    /// The processors of this thread before it was pinned, if it was.
    unpinned: Option<CpuSet>,
}

impl CoreContext {
    /// The disk of a data directory, which must exist.
    ///
    /// # Errors
    /// [`RuntimeError::DataDirectory`] when it cannot be opened.
    pub fn disk(&self, directory: &Path) -> Result<UringDisk, RuntimeError> {
        let CoreInner { io, wakeup, local, disks, unpinned, .. } = &*self.inner;
        let disk = UringDisk::open(directory, Rc::clone(io), local.clone(), Arc::clone(wakeup), *unpinned)?;
        disks.borrow_mut().push(disk.shared());
        Ok(disk)
    }

    /// Sockets.
    #[must_use]
    pub fn link(&self, options: LinkOptions) -> UringLink {
        UringLink::new(options, Rc::clone(&self.inner.io), self.inner.local.clone())
    }

    /// Runs a future of a user on this core, between turns, from the first turn on. When the core ends, it is
    /// dropped. A panic in it ends it and is logged. It may await whatever needs no executor of its own: what another
    /// thread completes, or the engine.
    pub fn spawn_local(&self, future: LocalFuture) {
        self.inner.tasks.spawn(future);
    }

    /// Wakes this core from its own thread.
    #[must_use]
    pub fn local_wakeup(&self) -> LocalWakeup {
        self.inner.local.clone()
    }

    /// Wakes this core from any thread.
    #[must_use]
    pub fn wakeup(&self) -> Arc<Wakeup> {
        Arc::clone(&self.inner.wakeup)
    }
}

/// Runs an engine on this thread until it stops.
///
/// `make` is called on the core and may submit operations already. The thread should be the engine's own: it is pinned and
/// named.
///
/// # Errors
/// Those of [`RuntimeError`] which say why it could not start; [`RuntimeError::Make`] with the error of `make`;
/// [`RuntimeError::Panicked`] after a panic in `make` or in a turn. In each case the operations in flight have been
/// awaited and all files are closed. [`RuntimeError::Ring`] when the kernel would not go on with the ring: then they
/// may be in flight, and what they use is kept.
pub fn run<T, E>(
    options: UringOptions,
    wakeup: Arc<Wakeup>,
    make: impl FnOnce(&CoreContext) -> Result<T, E>,
) -> Result<(), RuntimeError>
where
    T: Turn,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    let unpinned = options.core.map(pin).transpose()?;
    let name: Vec<u8> = options.name.bytes().filter(|byte| *byte != 0).take(15).collect();
    if let Ok(name) = CString::new(name) {
        // A name is a convenience: where it cannot be set, the thread goes without.
        let _ = rustix::thread::set_name(&name);
    }
    let bell = wakeup.connect_event()?;
    let ring = Ring::new(options.ring_depth, bell).map_err(|error| refused(&error, options.ring_depth))?;
    let inner = CoreInner {
        io: Rc::new(RefCell::new(ring)),
        tasks: Tasks::new(Arc::clone(&wakeup)),
        wakeup,
        local: LocalWakeup::default(),
        disks: RefCell::default(),
        unpinned,
    };
    let context = CoreContext { inner: Rc::new(inner) };
    let driven = match caught(|| make(&context)) {
        Ok(Ok(mut turn)) => {
            let driven = context.drive(options.idle, &mut turn);
            let dropped = caught(|| drop(turn));
            driven.and(dropped)
        }
        Ok(Err(error)) => Err(RuntimeError::Make(error.into())),
        Err(panicked) => Err(panicked),
    };
    driven.and(context.end())
}

impl CoreContext {
    /// Runs turns until one says stop.
    fn drive(&self, idle: IdlePolicy, turn: &mut impl Turn) -> Result<(), RuntimeError> {
        let CoreInner { io, wakeup, local, tasks, .. } = &*self.inner;
        let mut polling = Polling::new(idle);
        let mut turns_since_flush = 0;
        loop {
            // Before anything is looked into that other threads fill.
            wakeup.begin_turn();
            self.take_completed();
            local.begin_turn();
            // After what completed: see `Turn::turn`.
            let now = Now::read();
            let TurnOutcome { more, worked, next_deadline_ns, stop } = caught(|| turn.turn(now))?;
            if stop {
                return Ok(());
            }
            if worked {
                polling.worked();
            }
            if tasks.run() || more || local.is_pending() || wakeup.is_called() {
                turns_since_flush += 1;
                let mut ring = io.borrow_mut();
                if ring.is_urgent() || turns_since_flush >= TURNS_PER_FLUSH {
                    turns_since_flush = 0;
                    ring.flush().map_err(RuntimeError::Ring)?;
                }
                continue;
            }
            turns_since_flush = 0;
            if self.poll(&mut polling, next_deadline_ns)? {
                continue;
            }
            // A turn may take a while, of which the deadline knows nothing.
            let left_ns = next_deadline_ns.saturating_sub(monotonic_ns());
            if left_ns > 0 && wakeup.park() {
                let timeout = (next_deadline_ns < u64::MAX).then(|| Duration::from_nanos(left_ns));
                io.borrow_mut().wait(timeout).map_err(RuntimeError::Ring)?;
            } else {
                io.borrow_mut().flush().map_err(RuntimeError::Ring)?;
            }
        }
    }

    /// Looks for work as long as the policy says, and not beyond the deadline. Whether there is some.
    fn poll(&self, polling: &mut Polling, deadline_ns: u64) -> Result<bool, RuntimeError> {
        let CoreInner { io, wakeup, .. } = &*self.inner;
        let mut now_ns = monotonic_ns();
        while now_ns < polling.until_ns(now_ns).min(deadline_ns) {
            let mut ring = io.borrow_mut();
            ring.flush().map_err(RuntimeError::Ring)?;
            if ring.has_completions() || wakeup.is_called() {
                return Ok(true);
            }
            drop(ring);
            now_ns = polling.give_way(now_ns);
        }
        Ok(false)
    }

    fn take_completed(&self) {
        reap(&self.inner.io);
        for disk in &*self.inner.disks.borrow() {
            disk.collect();
        }
    }

    /// Waits for all that is in flight, once nobody starts anything any more.
    fn end(&self) -> Result<(), RuntimeError> {
        let CoreInner { io, wakeup, disks, tasks, .. } = &*self.inner;
        wakeup.begin_turn();
        tasks.end();
        loop {
            reap(io);
            if io.borrow().in_flight() == 0 {
                break;
            }
            io.borrow_mut().wait(None).map_err(RuntimeError::Ring)?;
        }
        for disk in disks.take() {
            disk.shut_down();
        }
        Ok(())
    }
}

/// Pins this thread. Returns the processors that it could use before.
fn pin(core: usize) -> Result<CpuSet, RuntimeError> {
    probe::core(core)?;
    let before = sched_getaffinity(None).map_err(std::io::Error::from)?;
    if core_affinity::set_for_current(core_affinity::CoreId { id: core }) {
        return Ok(before);
    }
    Err(RuntimeError::CoreUnavailable { core, available: vec![] })
}

/// Whether the kernel has io_uring, but not what this backend asks of it.
pub(super) fn is_beyond_the_kernel() -> bool {
    ring::setup(1).is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
}

fn refused(error: &std::io::Error, entries: u32) -> RuntimeError {
    match error.raw_os_error() {
        // The flags are what older kernels do not know.
        Some(libc::EINVAL) => RuntimeError::IoUringRefused(IoUringRefusal::NoDeferredWork),
        Some(number) => probe::refused(number, LOCKED_BYTES_PER_ENTRY * u64::from(entries)),
        None => RuntimeError::Setup(std::io::Error::other(error.to_string())),
    }
}
