//! A fault volume, mounted, that can lose its power.

use crate::powercut::disk::{Effect, Survival, Survived};
use crate::powercut::mounts;
use crate::powercut::rig::Boot;
use crate::powercut::server::Server;
use crate::powercut::trial::Machine;
use anyhow::Result;
use std::path::{Path, PathBuf};

/// Durable writes are not in the cache, so that it rarely holds more than one that may be lost.
const CACHED_AT_CUT: u64 = 2;

/// The rig. Dropping it cuts the power and removes everything.
#[derive(Debug)]
pub struct DirectRig {
    server: Server,
    mount: PathBuf,
    _scratch: tempfile::TempDir,
}

impl DirectRig {
    /// An empty volume. `program` is one that serves volumes when its first argument is
    /// [`SERVE_DIRECTORY`](crate::powercut::server::SERVE_DIRECTORY); a new directory under `parent` holds the mount point.
    ///
    /// # Errors
    /// When a right is missing.
    pub fn new(program: &Path, parent: &Path) -> Result<Self> {
        std::fs::create_dir_all(parent)?;
        let scratch = tempfile::Builder::new().prefix("powercut-").tempdir_in(parent)?;
        let mount = scratch.path().join("volume");
        std::fs::create_dir(&mount)?;
        let server = Server::start_directory(program, &mount)?;
        Ok(Self { server, mount, _scratch: scratch })
    }
}

impl Machine for DirectRig {
    fn reset(&mut self) -> Result<()> {
        self.server.reset()
    }

    /// It is mounted all the time: there is no journal to replay.
    fn boot(&mut self) -> Result<Boot> {
        Ok(Boot::Up)
    }

    fn directory(&self) -> &Path {
        &self.mount
    }

    fn disk(&mut self) -> &mut Server {
        &mut self.server
    }

    fn power_on(&mut self, seed: u64, survival: Survival) -> Result<Survived> {
        self.server.power_on(seed, survival)
    }

    fn cached_at_cut(&self) -> u64 {
        CACHED_AT_CUT
    }
}

impl Drop for DirectRig {
    fn drop(&mut self) {
        // If the server is gone there is no power either.
        let _ = self.server.strike(Effect::Cut);
        let _ = self.server.release();
        mounts::detach(&self.mount);
        // The server ends when it is dropped, before the directory is removed.
    }
}
