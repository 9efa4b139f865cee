//! The backend on a ring of its own does what every backend promises.

#[macro_use]
mod runtime;

use ringraft::runtime::uring::{self, CoreContext, UringDisk, UringLink, UringOptions};
use ringraft::runtime::{IoUringRefusal, LinkOptions, LocalFuture, LocalWakeup, RuntimeError, Turn, Wakeup};
use runtime::{Backend, Setup};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

struct Uring;

impl Backend for Uring {
    type Disk = UringDisk;
    type Link = UringLink;
    type Context = CoreContext;

    fn run<T: Turn, E: Into<Box<dyn Error + Send + Sync>>>(
        setup: Setup,
        wakeup: Arc<Wakeup>,
        make: impl FnOnce(&CoreContext) -> Result<T, E>,
    ) -> Result<(), RuntimeError> {
        let Setup { core, idle, name, tight } = setup;
        let mut options = UringOptions { core, idle, name, ..UringOptions::default() };
        if tight {
            options.ring_depth = 2;
        }
        uring::run(options, wakeup, make)
    }

    fn disk(core: &CoreContext, directory: &Path) -> Result<UringDisk, RuntimeError> {
        core.disk(directory)
    }

    fn link(core: &CoreContext, options: LinkOptions) -> UringLink {
        core.link(options)
    }

    fn spawn_local(core: &CoreContext, future: LocalFuture) {
        core.spawn_local(future);
    }

    fn local_wakeup(core: &CoreContext) -> LocalWakeup {
        core.local_wakeup()
    }

    const LOCKED_BYTES_WANTED: u64 = 65_536;
    const TOO_OLD: IoUringRefusal = IoUringRefusal::NoDeferredWork;

    /// It registers no memory, and the kernels on which it runs do not count rings.
    fn check_little_locked_memory(told: Result<(), RuntimeError>) {
        told.unwrap();
    }
}

suite!(Uring);
