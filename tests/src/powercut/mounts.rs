//! Loop devices and mounts, and what they need of the machine.

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::thread::CapabilitySet;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// A file system to put on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum FsKind {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

/// How long something that is still held for a moment after its process was killed is waited for.
const RELEASE_PATIENCE: Duration = Duration::from_secs(20);

impl FsKind {
    /// The name that mount(2) knows.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// What makes it, with arguments that leave nothing to be initialised in the background.
    fn mkfs(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Ext4 => {
                ("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"])
            }
            Self::Xfs => ("mkfs.xfs", &["-q", "-f", "-K"]),
        }
    }

    fn mount_options(self) -> &'static str {
        match self {
            Self::Ext4 => "errors=remount-ro",
            // The image of the last trial has the same id, and may not be quite gone.
            Self::Xfs => "nouuid",
        }
    }

    /// Makes the file system on a new file of `bytes`.
    ///
    /// # Errors
    /// When the file cannot be made or the program fails.
    pub fn format(self, path: &Path, bytes: u64) -> Result<()> {
        File::create_new(path)?.set_len(bytes)?;
        let (program, arguments) = self.mkfs();
        let output = Command::new(program).args(arguments).arg(path).output();
        let output = output.with_context(|| format!("cannot run {program}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program}: {}: {said}", output.status);
        Ok(())
    }

    /// Mounts the file system that is on `device`: the kernel replays its journal.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn mount(self, device: &Path, at: &Path) -> std::io::Result<()> {
        let options = CString::new(self.mount_options())?;
        Ok(rustix::mount::mount(device, at, self.name(), MountFlags::NOATIME, options.as_c_str())?)
    }
}

/// Whether this machine can cut power under a file system, or directly under the log. Where it cannot, what was to do so is skipped, and
/// this is the one place that says so, on standard error itself: what a test prints is not shown when it passes.
#[must_use]
pub fn available(kind: Option<FsKind>) -> bool {
    let Some(why) = missing(kind) else { return true };
    let under = kind.map_or("the log itself", FsKind::name);
    let _ = writeln!(std::io::stderr(), "SKIPPED: power is not cut under {under} here: {why}");
    false
}

/// Why this machine cannot cut power under a file system, or directly under the log; none if it can.
#[must_use]
pub fn missing(kind: Option<FsKind>) -> Option<String> {
    if let Some(why) = missing_of_fuse() {
        return Some(why);
    }
    let kind = kind?;
    if let Err(error) = OpenOptions::new().read(true).write(true).open(LOOP_CONTROL) {
        return Some(format!("{LOOP_CONTROL}: {error}"));
    }
    let (program, _) = kind.mkfs();
    if let Err(error) = Command::new(program).arg("-V").output() {
        return Some(format!("{program}: {error}"));
    }
    unknown(kind.name())
}

/// Why this machine cannot mount a FUSE file system; none if it can.
fn missing_of_fuse() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root, for mount(2)".to_owned());
    }
    let capable = rustix::thread::capabilities(None);
    if !capable.is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN)) {
        return Some("root may not mount here: CAP_SYS_ADMIN is missing".to_owned());
    }
    if let Err(error) = OpenOptions::new().read(true).write(true).open(FUSE) {
        return Some(format!("{FUSE}: {error}"));
    }
    unknown("fuse")
}

/// Why a file system cannot be mounted, if the kernel does not know it.
fn unknown(name: &str) -> Option<String> {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    // A module that is not loaded yet is not listed; mount(2) loads it.
    let module = || Command::new("modprobe").args(["-q", name]).status().is_ok_and(|s| s.success());
    let is_known = known.lines().any(|line| line.split_whitespace().last() == Some(name)) || module();
    (!is_known).then(|| format!("this kernel has no {name}"))
}

/// Unmounts what is mounted at `path`, and waits for those who were just killed in it.
///
/// # Errors
/// When it stays in use.
pub fn unmount(path: &Path) -> Result<()> {
    let deadline = Instant::now() + RELEASE_PATIENCE;
    loop {
        match rustix::mount::unmount(path, UnmountFlags::empty()) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::BUSY) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error).with_context(|| format!("cannot unmount {}", path.display())),
        }
    }
}

/// Takes what is mounted at `path` out of sight; it ends with its last user. Nothing may be mounted there.
pub fn detach(path: &Path) {
    let _ = rustix::mount::unmount(path, UnmountFlags::DETACH);
}

const FUSE: &str = "/dev/fuse";
const LOOP_CONTROL: &str = "/dev/loop-control";
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_config` of linux/loop.h, with `struct loop_info64` in it.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    ids: [u64; 3],
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt: [u32; 2],
    flags: u32,
    names: [u8; 128],
    encrypt_key: [u8; 32],
    init: [u64; 2],
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopConfig>() == 304);

/// A loop device. It is freed by its last user: drop this once the device is mounted.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    _open: File,
}

impl LoopDevice {
    /// A free loop device, set up on the file at `path` with direct I/O: each write and each flush goes to the file at
    /// once.
    ///
    /// # Errors
    /// When there is none, or it cannot do direct I/O there.
    pub fn attach(path: &Path, block_bytes: u32) -> Result<Self> {
        let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
        let (control, file) = (open(Path::new(LOOP_CONTROL))?, open(path)?);
        let config = LoopConfig {
            fd: file.as_raw_fd() as u32,
            block_size: block_bytes,
            ids: [0; 3],
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt: [0; 2],
            flags: LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
            names: [0; 128],
            encrypt_key: [0; 32],
            init: [0; 2],
            reserved: [0; 8],
        };
        let deadline = Instant::now() + RELEASE_PATIENCE;
        loop {
            // SAFETY: this request takes no argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            ensure!(number >= 0, "no free loop device: {}", std::io::Error::last_os_error());
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = open(&path).with_context(|| format!("{}", path.display()))?;
            // SAFETY: this request reads one `struct loop_config`, which `config` is, and which outlives the call.
            let outcome = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
            if outcome == 0 {
                let direct = std::fs::read_to_string(format!("/sys/block/loop{number}/loop/dio"))?;
                ensure!(direct.trim() == "1", "{} does no direct I/O to the disk", path.display());
                return Ok(Self { path, _open: device });
            }
            let error = std::io::Error::last_os_error();
            // Somebody else was faster.
            if error.raw_os_error() != Some(libc::EBUSY) || Instant::now() > deadline {
                return Err(error).with_context(|| format!("cannot set up {}", path.display()));
            }
        }
    }

    /// The device.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}
