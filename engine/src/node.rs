//! Starting a node: one thread that runs the driver on its backend, and the means to wait for it.

use crate::config::{Config, ConfigError};
use crate::driver::Driver;
use crate::error::{StopCause, StopError};
use crate::handle::{Handle, LocalHandle, Shared, Status};
use crate::runtime::glommio::{self, GlommioOptions};
use crate::runtime::uring::{self, UringOptions};
use crate::runtime::{Backend, LinkOptions, LocalFuture, LocalWakeup, RuntimeError, Wakeup};
use crate::state_machine::StateMachine;
use ringraft_net::link::Link;
use ringraft_wal::DataDirectory;
use ringraft_wal::disk::Disk;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// A task that runs on the consensus core, beside the node.
pub type LocalTask = Box<dyn FnOnce(LocalHandle) -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// A running node. Dropping it asks the node to stop and waits for that.
pub struct Node {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

/// How often a thread is looked at that is waited for: it says when it stops, unless it panics.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

impl Node {
    /// Starts a node on a thread of its own and returns when its log is open and it listens, which takes as long as
    /// formatting a new directory or scanning the log. `machine` makes the state machine on that thread.
    ///
    /// # Errors
    /// Whatever keeps the node from starting; nothing is left running.
    pub fn start<S: StateMachine>(
        config: Config,
        machine: impl FnOnce() -> S + Send + 'static,
    ) -> Result<Self, StopCause> {
        Self::start_with(config, machine, Vec::new())
    }

    /// As [`Node::start`], with tasks that run on the consensus core and propose through a [`LocalHandle`]. They
    /// share the core with the node: a task that does not await blocks consensus.
    ///
    /// # Errors
    /// As there.
    pub fn start_with<S: StateMachine>(
        config: Config,
        machine: impl FnOnce() -> S + Send + 'static,
        tasks: Vec<LocalTask>,
    ) -> Result<Self, StopCause> {
        config.validate().map_err(StopError::from)?;
        let seed = entropy().map_err(StopError::Entropy)?;
        let shared = Arc::new(Shared::new(&config, Arc::new(Wakeup::new())));
        let handle = Handle { shared: Arc::clone(&shared) };
        let name = format!("ringraft-{}", config.node);
        let core = move || run_core(config, seed, &shared, machine, tasks);
        let thread = std::thread::Builder::new().name(name).spawn(core);
        let thread = thread.map_err(|error| StopError::Thread(error.to_string()))?;
        let node = Self { handle, thread: Some(thread) };
        let started = |status: &Status| status.listening.is_some() || status.stopped.is_some();
        let stopped = node.handle.shared.status.wait(None, started).0.stopped;
        match stopped {
            Some(cause) => {
                node.join();
                Err(cause)
            }
            None => Ok(node),
        }
    }

    /// A handle to the node.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits until the node has stopped, by [`Handle::shutdown`] or by itself, and tells why. All it had under way has ended
    /// then, except when its disk does not answer ([`StopError::DiskStalled`]): what waits for that disk is left behind, and
    /// the process should end.
    pub fn join(mut self) -> StopCause {
        self.join_thread();
        self.handle.status().stopped.unwrap_or_else(|| StopError::ThreadLost.into())
    }

    fn join_thread(&mut self) {
        let stalled = |status: &Status| {
            status
                .stopped
                .as_ref()
                .is_some_and(|cause| matches!(cause.error(), StopError::DiskStalled { .. }))
        };
        if let Some(thread) = self.thread.take() {
            while !thread.is_finished() {
                let (status, _) = self.handle.wait_status(LOOK_AGAIN, |status| status.stopped.is_some());
                if stalled(&status) {
                    return;
                }
                if status.stopped.is_some() {
                    break;
                }
            }
            // A panic on the core has aborted the process: see `run_core`.
            let _ = thread.join();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.handle.shutdown();
        self.join_thread();
    }
}

fn run_core<S: StateMachine>(
    config: Config,
    seed: u64,
    shared: &Arc<Shared>,
    machine: impl FnOnce() -> S + Send + 'static,
    tasks: Vec<LocalTask>,
) {
    let outcome = run_backend(config, seed, shared, machine, tasks);
    if let Err(StopError::Runtime(error @ RuntimeError::Panicked(_))) = &outcome {
        // A state machine that panicked half way through a batch has a state that no other member has.
        tracing::error!(%error, "aborting");
        std::process::abort();
    }
    let cause = StopCause::from(match outcome {
        Err(error) => error,
        Ok(()) => StopError::ThreadLost,
    });
    shared.ingress.stop(cause.clone());
    shared.status.publish(|status| {
        status.stopped.get_or_insert(cause);
    });
}

fn run_backend<S: StateMachine>(
    config: Config,
    seed: u64,
    shared: &Arc<Shared>,
    machine: impl FnOnce() -> S + Send + 'static,
    tasks: Vec<LocalTask>,
) -> Result<(), StopError> {
    let directory = DataDirectory::open(&config.data_dir, true)?;
    let name = format!("ringraft-{}", config.node);
    let (core, idle) = (config.core, config.idle);
    let wakeup = Arc::clone(&shared.wakeup);
    let shared = Arc::clone(shared);
    let path = directory.path().to_owned();
    match config.backend.unwrap_or_else(Backend::of_this_machine) {
        Backend::Glommio => {
            let options = GlommioOptions { core, idle, name, ..GlommioOptions::default() };
            glommio::run(options, wakeup, move |context| {
                let (disk, link) = (context.disk(&path)?, context.link(LinkOptions::default()));
                let driver = Driver::new(config, seed, shared, disk, link, machine());
                begin(&driver, tasks, &context.local_wakeup(), |task| context.spawn_local(task));
                Ok::<_, RuntimeError>(driver)
            })?;
        }
        Backend::Uring => {
            let options = UringOptions { core, idle, name, ..UringOptions::default() };
            uring::run(options, wakeup, move |context| {
                let (disk, link) = (context.disk(&path)?, context.link(LinkOptions::default()));
                let driver = Driver::new(config, seed, shared, disk, link, machine());
                begin(&driver, tasks, &context.local_wakeup(), |task| context.spawn_local(task));
                Ok::<_, RuntimeError>(driver)
            })?;
        }
    }
    // Held until the last operation has ended.
    drop(directory);
    Ok(())
}

/// The users' futures begin on the core.
fn begin<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine>(
    driver: &Driver<D, L, S>,
    tasks: Vec<LocalTask>,
    wakeup: &LocalWakeup,
    spawn: impl Fn(LocalFuture),
) {
    for task in tasks {
        spawn(task(driver.local_handle(wakeup.clone())));
    }
}

fn entropy() -> Result<u64, String> {
    let mut bytes = [0; 8];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    match filled {
        Ok(8) => Ok(u64::from_le_bytes(bytes)),
        Ok(_) => Err("getrandom returned too little".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

impl From<ConfigError> for StopCause {
    fn from(error: ConfigError) -> Self {
        StopError::from(error).into()
    }
}
