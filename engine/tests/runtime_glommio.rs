//! The glommio backend does what every backend promises.

#[macro_use]
mod runtime;

use ringraft::runtime::glommio::{self, CoreContext, GlommioDisk, GlommioLink, GlommioOptions};
use ringraft::runtime::{IoUringRefusal, LinkOptions, LocalFuture, LocalWakeup, RuntimeError, Turn, Wakeup};
use runtime::{Backend, Setup};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

struct Glommio;

impl Backend for Glommio {
    type Disk = GlommioDisk;
    type Link = GlommioLink;
    type Context = CoreContext;

    fn run<T: Turn, E: Into<Box<dyn Error + Send + Sync>>>(
        setup: Setup,
        wakeup: Arc<Wakeup>,
        make: impl FnOnce(&CoreContext) -> Result<T, E>,
    ) -> Result<(), RuntimeError> {
        let Setup { core, idle, name, tight } = setup;
        let mut options = GlommioOptions { core, idle, name, ..GlommioOptions::default() };
        if tight {
            options.io_memory_bytes = 64 * 1024;
            options.ring_depth = 8;
        }
        glommio::run(options, wakeup, make)
    }

    fn disk(core: &CoreContext, directory: &Path) -> Result<GlommioDisk, RuntimeError> {
        core.disk(directory)
    }

    fn link(core: &CoreContext, options: LinkOptions) -> GlommioLink {
        core.link(options)
    }

    fn spawn_local(core: &CoreContext, future: LocalFuture) {
        core.spawn_local(future);
    }

    fn local_wakeup(core: &CoreContext) -> LocalWakeup {
        core.local_wakeup()
    }

    const LOCKED_BYTES_WANTED: u64 = 50_331_648;
    const TOO_OLD: IoUringRefusal = IoUringRefusal::Other(libc::EINVAL);

    fn check_little_locked_memory(told: Result<(), RuntimeError>) {
        let Err(error @ RuntimeError::LockedMemory { limit_bytes: 65_536, .. }) = told else {
            panic!("{told:?}")
        };
        assert!(error.to_string().contains("ulimit -l 49152"), "{error}");
    }
}

suite!(Glommio);
