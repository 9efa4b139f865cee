//! A file system of the kernel on a loop device on the fault disk, that can lose its power.

use super::disk::{SECTOR_BYTES, Survival, Survived};
use super::mounts::{self, FsKind, LoopDevice};
use super::server::Server;
use super::trial::Machine;
use super::{fuse, mounts::unmount};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};

/// Enough for three members with small segments, and for XFS, which takes no less than 300 MB.
const DISK_BYTES: u64 = 512 << 20;

/// Many, since most flushes follow their write at once.
const CACHED_AT_CUT: u64 = 6;

/// The rig. Dropping it cuts the power and removes everything.
#[derive(Debug)]
pub struct Rig {
    kind: FsKind,
    server: Server,
    mounted: bool,
    /// Where the disk is a file.
    lower: PathBuf,
    /// Where the file system on it is mounted.
    upper: PathBuf,
    _scratch: tempfile::TempDir,
}

/// What came of mounting what survived.
#[derive(Debug)]
pub enum Boot {
    /// It is mounted.
    Up,
    /// The kernel refuses the file system: ringraft has nothing to recover from.
    Refused(std::io::Error),
}

impl Rig {
    /// A disk with a new file system, not mounted yet. `program` is one that serves disks when its first argument is
    /// [`SERVE`](super::server::SERVE); a new directory under `parent` holds image and mount points.
    ///
    /// # Errors
    /// When a tool or a right is missing.
    pub fn new(program: &Path, kind: FsKind, parent: &Path) -> Result<Self> {
        std::fs::create_dir_all(parent)?;
        let scratch = tempfile::Builder::new().prefix("powercut-").tempdir_in(parent)?;
        let at = |name: &str| scratch.path().join(name);
        let (image, lower, upper) = (at("image"), at("lower"), at("upper"));
        kind.format(&image, DISK_BYTES)?;
        std::fs::create_dir(&lower)?;
        std::fs::create_dir(&upper)?;
        let server = Server::start(program, &image, &lower, &upper)?;
        Ok(Self { kind, server, mounted: false, lower, upper, _scratch: scratch })
    }

    fn unmount(&mut self) -> Result<()> {
        if self.mounted {
            unmount(&self.upper).context("what used the file system has been killed")?;
            self.mounted = false;
        }
        Ok(())
    }
}

impl Machine for Rig {
    fn reset(&mut self) -> Result<()> {
        self.server.strike(super::disk::Effect::Cut)?;
        self.unmount()?;
        self.server.reset()
    }

    fn boot(&mut self) -> Result<Boot> {
        ensure!(!self.mounted, "the file system is mounted");
        let device = LoopDevice::attach(&self.lower.join(fuse::FILE), SECTOR_BYTES as u32)?;
        if let Err(error) = self.kind.mount(device.path(), &self.upper) {
            return Ok(Boot::Refused(error));
        }
        self.mounted = true;
        Ok(Boot::Up)
    }

    fn directory(&self) -> &Path {
        &self.upper
    }

    fn disk(&mut self) -> &mut Server {
        &mut self.server
    }

    fn power_on(&mut self, seed: u64, survival: Survival) -> Result<Survived> {
        self.unmount()?;
        self.server.power_on(seed, survival)
    }

    fn cached_at_cut(&self) -> u64 {
        CACHED_AT_CUT
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Without power nothing has to be waited for. If the server is gone there is none either.
        let _ = self.server.strike(super::disk::Effect::Cut);
        if self.mounted && self.unmount().is_err() {
            mounts::detach(&self.upper);
        }
        // The server unmounts the disk when it is dropped, before the directory is removed.
    }
}
