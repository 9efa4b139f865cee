//! The first backend, on glommio 0.9.
//!
//! # A pass
//!
//! glommio hands queued requests to the kernel and collects completions only between runs of its task queues, in a
//! *reactor pass*, and its executor does not come to one while any task can run: `yield_now` never gets there. A
//! task that waits for a channel that nobody connects to is woken once in each pass: that is how the loop has one.
//! A pass costs three to four system calls (two timers are armed and cancelled each time), so the loop does not pass
//! after every turn: when there is no more to do, and no other thread has called meanwhile ([`Wakeup`]), the core parks, which
//! submits too. While it looks for work instead (`polling`), each look is a pass and a turn: nothing else shows what has completed.
//!
//! # Parking
//!
//! glommio can park although a task can run: when anything happened on its latency ring between a pass and the run
//! of the task queues, the queues are not run, and what the pass woke is forgotten until the next event. Its preempt
//! timer and the eventfd of its wakes from other threads live on that ring. Therefore
//!
//! * wake-ups by other threads come over a socket, whose readiness is polled on the main ring ([`Wakeup`]);
//! * there is no task queue with a latency, and the preempt timer is long (it limits how long users' futures
//!   that never rest can keep a pass away);
//! * no sleep is longer than `SLEEP_NS_MAX`, and than `SLEEP_WHILE_BLOCKING_NS_MAX` while an operation is on
//!   the blocking thread, which reports by that eventfd: what is overlooked after all is found then.
//!
//! # Timers
//!
//! One timer serves all deadlines. It is armed anew only when it would fire too late; when it fires too early, a
//! turn is run for nothing.

mod disk;
mod link;
mod probe;

pub use disk::GlommioDisk;
pub use link::GlommioLink;
pub use probe::warm_up;

use super::polling::Polling;
use super::{
    IdlePolicy, LinkOptions, LocalFuture, LocalWakeup, Now, RuntimeError, Turn, TurnOutcome, Wakeup, caught,
    directory, monotonic_ns, panic_message,
};
use crate::runtime::probe::{core as available_core, locked_memory_error};
use ::glommio::channels::shared_channel;
use ::glommio::io::DmaBuffer;
use ::glommio::net::UnixStream;
use ::glommio::timer::Timer;
use ::glommio::{
    BuilderErrorKind, GlommioError, LocalExecutorBuilder, Placement, PoolPlacement, ReactorErrorKind,
    spawn_local,
};
use disk::DiskShared;
use futures_io::AsyncRead;
use ringraft_block::BlockBuf;
use ringraft_wal::disk::DiskError;
use std::cell::{Cell, RefCell};
use std::error::Error;
use std::ffi::CString;
use std::fmt;
use std::future::poll_fn;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

/// Turns that leave more to do before the kernel must see what they submitted.
const TURNS_PER_PASS: u32 = 2;
/// No sleep is longer (see "Parking"): 20 wakes per second of an idle core, at some 50 µs each.
const SLEEP_NS_MAX: u64 = 50_000_000;
/// No sleep is longer while, and shortly after, an operation is on the blocking thread.
const SLEEP_WHILE_BLOCKING_NS_MAX: u64 = 2_000_000;
/// How long after the last such operation its report may still be overlooked.
const BLOCKING_ECHO_NS: u64 = 20_000_000;
/// How long users' futures may run without rest before completions are looked at.
const PREEMPT: Duration = Duration::from_millis(100);

/// How a core is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GlommioOptions {
    /// The core to run on; `None` lets the kernel move the thread.
    pub core: Option<usize>,
    /// What to do when there is nothing to do.
    pub idle: IdlePolicy,
    /// Memory for I/O buffers that is registered with the kernel, in bytes. Three times as much should be allowed
    /// to be locked. Buffers beyond it are ordinary memory, which costs a little CPU per write.
    pub io_memory_bytes: usize,
    /// Entries of each submission ring. More operations than that may be in flight; they queue in front of it.
    pub ring_depth: usize,
    /// The thread's name, of which the system shows 15 bytes.
    pub name: String,
}

impl Default for GlommioOptions {
    fn default() -> Self {
        Self {
            core: None,
            idle: IdlePolicy::default(),
            io_memory_bytes: 16 * 1024 * 1024,
            ring_depth: 128,
            name: "ringraft".to_owned(),
        }
    }
}

/// What an engine is made with, on the core that will run it. Clones refer to the same core.
#[derive(Clone)]
pub struct CoreContext {
    inner: Rc<CoreInner>,
}

struct CoreInner {
    wakeup: Arc<Wakeup>,
    local: LocalWakeup,
    disks: RefCell<Vec<(PathBuf, Rc<DiskShared>)>>,
    blocking: Rc<Cell<usize>>,
    users: RefCell<Users>,
}

/// The users' futures. Their tasks do not own them, so that the core can drop them when it ends.
#[derive(Default)]
struct Users {
    started: bool,
    ended: bool,
    futures: Vec<Rc<UserFuture>>,
    /// Finished futures are cleared away when there are so many in all.
    sweep_at: usize,
}

type UserFuture = RefCell<Option<LocalFuture>>;

impl CoreContext {
    /// The disk of a data directory, which must exist.
    ///
    /// # Errors
    /// [`RuntimeError::DataDirectory`] when it cannot be opened or no file in it can be opened for writing.
    pub fn disk(&self, directory: &Path) -> Result<GlommioDisk, RuntimeError> {
        let disk = GlommioDisk::open(directory, self.inner.local.clone(), Rc::clone(&self.inner.blocking))?;
        self.inner.disks.borrow_mut().push((directory.to_path_buf(), disk.shared()));
        Ok(disk)
    }

    /// Sockets.
    #[must_use]
    pub fn link(&self, options: LinkOptions) -> GlommioLink {
        GlommioLink::new(options, self.inner.local.clone())
    }

    /// Runs a future of a user on this core, between turns, from the first turn on. When the core ends, it is
    /// dropped. A panic in it ends it and is logged.
    pub fn spawn_local(&self, future: LocalFuture) {
        let mut users = self.inner.users.borrow_mut();
        if users.ended {
            return;
        }
        let future = Rc::new(RefCell::new(Some(future)));
        if users.futures.len() >= users.sweep_at {
            users.futures.retain(|future| !matches!(future.try_borrow().as_deref(), Ok(None)));
            users.sweep_at = 2 * users.futures.len() + 16;
        }
        users.futures.push(Rc::clone(&future));
        let started = users.started;
        drop(users);
        if started {
            start_user(&future);
        }
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

    fn start_users(&self) {
        let waiting = {
            let mut users = self.inner.users.borrow_mut();
            users.started = true;
            users.futures.clone()
        };
        waiting.iter().for_each(start_user);
    }

    fn end_users(&self) {
        let futures = {
            let mut users = self.inner.users.borrow_mut();
            users.ended = true;
            std::mem::take(&mut users.futures)
        };
        for future in futures {
            let dropped = future.take();
            let _ = catch_unwind(AssertUnwindSafe(|| drop(dropped)));
        }
    }
}

fn start_user(future: &Rc<UserFuture>) {
    let future: Weak<UserFuture> = Rc::downgrade(future);
    let task = poll_fn(move |context| {
        let Some(future) = future.upgrade() else { return Poll::Ready(()) };
        let Some(mut running) = future.take() else { return Poll::Ready(()) };
        match catch_unwind(AssertUnwindSafe(|| running.as_mut().poll(context))) {
            Ok(Poll::Pending) => {
                *future.borrow_mut() = Some(running);
                Poll::Pending
            }
            Ok(Poll::Ready(())) => Poll::Ready(()),
            Err(panic) => {
                tracing::error!(panic = panic_message(&*panic), "a future of a user panicked and was ended");
                Poll::Ready(())
            }
        }
    });
    spawn_local(task).detach();
}

/// Runs an engine on this thread until it stops.
///
/// `make` is called on the core and may submit operations already. The thread should be the engine's own: it is
/// pinned, named, and has SIGPIPE blocked.
///
/// # Errors
/// Those of [`RuntimeError`] which say why it could not start; [`RuntimeError::Make`] with the error of `make`;
/// [`RuntimeError::Panicked`] after a panic in `make` or in a turn. In each case the operations in flight have been
/// awaited and all files are closed.
pub fn run<T, E>(
    options: GlommioOptions,
    wakeup: Arc<Wakeup>,
    make: impl FnOnce(&CoreContext) -> Result<T, E>,
) -> Result<(), RuntimeError>
where
    T: Turn,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    let locked_bytes_wanted = probe::locked_bytes_wanted(options.io_memory_bytes);
    probe::locked_memory(locked_bytes_wanted)?;
    probe::io_uring(locked_bytes_wanted)?;
    let placement = match options.core {
        Some(core) => {
            available_core(core)?;
            Placement::Fixed(core)
        }
        None => Placement::Unbound,
    };
    warm_up();
    probe::block_sigpipe();
    let name: Vec<u8> = options.name.bytes().filter(|byte| *byte != 0).take(15).collect();
    if let Ok(name) = CString::new(name) {
        // A name is a convenience: where it cannot be set, the thread goes without.
        let _ = rustix::thread::set_name(&name);
    }
    let bell = wakeup.connect()?;
    let executor = LocalExecutorBuilder::new(placement)
        .io_memory(options.io_memory_bytes)
        .ring_depth(options.ring_depth)
        .preempt_timer(PREEMPT)
        .blocking_thread_pool_placement(PoolPlacement::Unbound(1))
        .make()
        .map_err(|error| setup_error(error, locked_bytes_wanted))?;
    executor.run(async {
        // SAFETY: the descriptor is owned by `bell`, which hands its ownership over.
        let bell = unsafe { UnixStream::from_raw_fd(bell.into_raw_fd()) };
        let inner = CoreInner {
            wakeup: Arc::clone(&wakeup),
            local: LocalWakeup::default(),
            disks: RefCell::default(),
            blocking: Rc::default(),
            users: RefCell::default(),
        };
        let context = CoreContext { inner: Rc::new(inner) };
        let core = Core::new(context.clone(), bell, options.idle).await;
        live(core, &context, make).await
    })
}

/// From `make` to the last closed file.
async fn live<T, E>(
    mut core: Core,
    context: &CoreContext,
    make: impl FnOnce(&CoreContext) -> Result<T, E>,
) -> Result<(), RuntimeError>
where
    T: Turn,
    E: Into<Box<dyn Error + Send + Sync>>,
{
    let result = match caught(|| make(context)) {
        Ok(Ok(mut turn)) => {
            let driven = match context.first_opens().await {
                Ok(()) => {
                    context.start_users();
                    core.drive(&mut turn).await
                }
                Err(error) => Err(error),
            };
            let dropped = caught(|| drop(turn));
            driven.and(dropped)
        }
        Ok(Err(error)) => Err(RuntimeError::Make(error.into())),
        Err(panicked) => Err(panicked),
    };
    context.end_users();
    let disks = context.inner.disks.take();
    for (_, disk) in disks {
        disk.shut_down().await;
    }
    core.end().await;
    result
}

impl CoreContext {
    async fn first_opens(&self) -> Result<(), RuntimeError> {
        let disks = self.inner.disks.borrow().clone();
        for (path, disk) in disks {
            disk.ready().await.map_err(|error| {
                let source = error
                    .os_error
                    .map_or_else(|| std::io::Error::other(error.clone()), std::io::Error::from_raw_os_error);
                RuntimeError::DataDirectory { path, source }
            })?;
        }
        Ok(())
    }
}

/// The main task: what it takes to have a pass, and to sleep.
struct Core {
    context: CoreContext,
    bell: UnixStream,
    idle: IdlePolicy,
    pass: Pass,
    alarm: Alarm,
    /// Until when an operation on the blocking thread may be overlooked.
    blocking_until_ns: u64,
}

impl Core {
    async fn new(context: CoreContext, bell: UnixStream, idle: IdlePolicy) -> Self {
        let waker = poll_fn(|task| Poll::Ready(task.waker().clone())).await;
        context.inner.local.set_core(Some(waker.clone()));
        Self {
            context,
            bell,
            idle,
            pass: Pass::new(waker),
            alarm: Alarm { timer: None, fires_at_ns: 0 },
            blocking_until_ns: 0,
        }
    }

    /// Runs turns until one says stop.
    async fn drive(&mut self, turn: &mut impl Turn) -> Result<(), RuntimeError> {
        let inner = Rc::clone(&self.context.inner);
        let mut turns_since_pass = 0;
        let mut polling = Polling::new(self.idle);
        loop {
            inner.wakeup.begin_turn();
            inner.local.begin_turn();
            let now = Now::read();
            let TurnOutcome { more, worked, next_deadline_ns, stop } = caught(|| turn.turn(now))?;
            if stop {
                return Ok(());
            }
            let more = more || inner.local.is_pending();
            if worked {
                polling.worked();
            }
            let more = more || inner.wakeup.is_called();
            // A turn may take a while, of which the deadline knows nothing.
            let now_ns = if more { now.monotonic_ns } else { monotonic_ns() };
            let looks = !more && now_ns < polling.until_ns(now_ns);
            if !more && !looks {
                let rests = next_deadline_ns > now_ns && inner.wakeup.park();
                if rests && self.sleep(now_ns, next_deadline_ns).await {
                    turns_since_pass = 0;
                    continue;
                }
            }
            turns_since_pass += 1;
            if !more || turns_since_pass >= TURNS_PER_PASS {
                turns_since_pass = 0;
                self.pass.once().await;
            }
            // Now that the kernel has what the turn started. What has completed meanwhile takes another pass to show.
            if looks && !inner.wakeup.is_called() && !inner.local.is_pending() {
                polling.give_way(monotonic_ns());
            }
        }
    }

    /// Until a completion, a signal or the deadline; or less. False if the executor may not have come to a pass meanwhile: there was
    /// nothing to wait for, or only a task of this core has asked for a turn.
    async fn sleep(&mut self, now_ns: u64, deadline_ns: u64) -> bool {
        if self.context.inner.blocking.get() > 0 {
            self.blocking_until_ns = now_ns + BLOCKING_ECHO_NS;
        }
        let blocking = now_ns < self.blocking_until_ns;
        let sleep_ns_max = if blocking { SLEEP_WHILE_BLOCKING_NS_MAX } else { SLEEP_NS_MAX };
        let until_ns = deadline_ns.min(now_ns + sleep_ns_max);
        let mut slept = false;
        poll_fn(|task| {
            let CoreInner { wakeup, local, .. } = &*self.context.inner;
            let before = std::mem::replace(&mut slept, true);
            let wakes = before || local.is_pending();
            // What has been rung is taken out of the bell, or it would end the next sleep too.
            let rings = (!wakes || wakeup.is_signalled())
                && Pin::new(&mut self.bell).poll_read(task, &mut [0; 64]).is_ready();
            if wakes || rings {
                return Poll::Ready(before && !local.is_only_asked());
            }
            self.alarm.arm(now_ns, until_ns, task).map(|()| false)
        })
        .await
    }

    async fn end(mut self) {
        self.context.inner.wakeup.begin_turn();
        self.context.inner.local.set_core(None);
        // Once for what was submitted by dropping: closes, and tasks that find their connection gone.
        self.pass.once().await;
        self.pass.once().await;
    }
}

/// The one timer.
struct Alarm {
    timer: Option<Timer>,
    fires_at_ns: u64,
}

impl Alarm {
    /// Sees to it that the task is woken at `until_ns` or before. Ready when that is now.
    fn arm(&mut self, now_ns: u64, until_ns: u64, task: &mut Context<'_>) -> Poll<()> {
        if now_ns < self.fires_at_ns && self.fires_at_ns <= until_ns {
            return Poll::Pending;
        }
        self.fires_at_ns = until_ns;
        let after = Duration::from_nanos(until_ns.saturating_sub(now_ns));
        let timer = match &mut self.timer {
            Some(timer) => {
                timer.reset(after);
                timer
            }
            none => none.insert(Timer::new(after)),
        };
        Pin::new(timer).poll(task).map(|_| ())
    }
}

/// Waits for the reactor's next pass.
struct Pass {
    /// Pending for ever, and woken in each pass after it was polled.
    connecting: Pin<Box<dyn Future<Output = ()>>>,
    over: Arc<PassOver>,
    waker: Waker,
}

struct PassOver {
    over: AtomicBool,
    core: Waker,
}

impl Pass {
    fn new(core: Waker) -> Self {
        let (never_connected, receiver) = shared_channel::new_bounded::<()>(1);
        let connecting = Box::pin(async move {
            let _connected = receiver.connect().await;
            drop(never_connected);
        });
        let over = Arc::new(PassOver { over: AtomicBool::new(false), core });
        Self { connecting, waker: Waker::from(Arc::clone(&over)), over }
    }

    async fn once(&mut self) {
        self.over.over.store(false, Ordering::Relaxed);
        let pending = self.connecting.as_mut().poll(&mut Context::from_waker(&self.waker)).is_pending();
        assert!(pending, "nobody connects to the channel");
        poll_fn(|_| if self.over.over.load(Ordering::Relaxed) { Poll::Ready(()) } else { Poll::Pending })
            .await;
    }
}

impl Wake for PassOver {
    fn wake(self: Arc<Self>) {
        self.over.store(true, Ordering::Relaxed);
        self.core.wake_by_ref();
    }
}

/// Memory that glommio can write from. Zeroed when it is made.
pub struct GlommioBuf {
    dma: DmaBuffer,
}

impl GlommioBuf {
    fn zeroed(bytes: usize) -> Result<Self, DiskError> {
        directory::may_allocate(bytes)?;
        let mut dma = ::glommio::allocate_dma_buffer(bytes);
        let start = dma.as_mut_ptr();
        // SAFETY: `start` points to as many bytes, which the buffer owns. It is done by pointer because the memory
        // is not initialised yet, so that no slice of it may exist.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Self { dma })
    }

    fn dma(&self) -> &DmaBuffer {
        &self.dma
    }
}

impl BlockBuf for GlommioBuf {
    fn bytes(&self) -> &[u8] {
        self.dma.as_bytes()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.dma.as_bytes_mut()
    }
}

impl fmt::Debug for GlommioBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GlommioBuf").field("bytes", &self.dma.len()).finish_non_exhaustive()
    }
}

fn setup_error(error: GlommioError<()>, locked_bytes_wanted: u64) -> RuntimeError {
    let source = match error {
        GlommioError::ReactorError(ReactorErrorKind::MemLockLimit(..)) => {
            return locked_memory_error(locked_bytes_wanted);
        }
        GlommioError::BuilderError(BuilderErrorKind::NonExistentCpus { cpu }) => {
            return available_core(cpu)
                .err()
                .unwrap_or(RuntimeError::CoreUnavailable { core: cpu, available: vec![] });
        }
        GlommioError::IoError(source) | GlommioError::EnhancedIoError { source, .. } => source,
        other => std::io::Error::other(other.to_string()),
    };
    match source.raw_os_error() {
        Some(libc::ENOMEM) => locked_memory_error(locked_bytes_wanted),
        _ => RuntimeError::Setup(source),
    }
}
