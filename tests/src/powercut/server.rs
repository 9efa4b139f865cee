//! The process that holds the disk or the volume: a file system must not be served by those who wait for it.
//!
//! Orders come in on standard input and answers go out on standard output, one line of JSON each. When standard input
//! ends without [`Order::Quit`], those who should have cleaned up are gone: the power is cut and everything unmounted.

use super::direct::fuse::{SharedVolume, VolumeFs};
use super::disk::{Effect, FaultDisk, Stats, Survival, Survived, Trigger};
use super::fuse::{DiskFs, SharedDisk};
use super::image::Image;
use super::mounts;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// The first argument of a program that is to [`serve`].
pub const SERVE: &str = "serve-disk";

/// The first argument of a program that is to [`serve_directory`].
pub const SERVE_DIRECTORY: &str = "serve-directory";

/// What the server is told. `under` is a directory at the top of a volume, whose disk alone is meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// [`FaultDisk::reset`].
    Reset,
    /// [`FaultDisk::arm`].
    Arm {
        /// Where.
        under: Option<String>,
        /// What.
        trigger: Trigger,
    },
    /// [`FaultDisk::strike`].
    Strike {
        /// Where.
        under: Option<String>,
        /// What.
        effect: Effect,
    },
    /// Those who wait for a disk without power have been killed: their requests fail.
    Release,
    /// [`FaultDisk::power_on`].
    PowerOn {
        /// Decides what survives.
        seed: u64,
        /// How.
        survival: Survival,
    },
    /// [`FaultDisk::stats`].
    Stats,
    /// Unmounts and ends.
    Quit,
}

/// What the server says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Done,
    Survived(Survived),
    Stats(Stats),
}

/// The main function of the server: `IMAGE MOUNT UPPER` serves the contents of the file `IMAGE`, which it removes, on
/// the directory `MOUNT`; `UPPER` is where others mount a file system that lies on it. All three are in one directory.
///
/// # Errors
/// When it cannot be mounted, or the orders are not understood.
pub fn serve(mut args: impl Iterator<Item = String>) -> Result<()> {
    let mut path = || args.next().map(PathBuf::from).context("serve-disk IMAGE MOUNT UPPER");
    let (image, mount, upper) = (path()?, path()?, path()?);
    let disk = SharedDisk::new(FaultDisk::new(Image::load(&image)?));
    std::fs::remove_file(&image)?;
    mount_and_obey(DiskFs::new(disk.clone()), &disk, &mount, Some(&upper))
}

/// The main function of the server of a volume: `MOUNT` serves an empty one on that directory.
///
/// # Errors
/// When it cannot be mounted, or the orders are not understood.
pub fn serve_directory(mut args: impl Iterator<Item = String>) -> Result<()> {
    let mount = args.next().map(PathBuf::from).context("serve-directory MOUNT")?;
    let volume = SharedVolume::default();
    mount_and_obey(VolumeFs::new(volume.clone()), &volume, &mount, None)
}

fn mount_and_obey(
    file_system: impl fuser::Filesystem,
    served: &impl Served,
    mount: &Path,
    upper: Option<&Path>,
) -> Result<()> {
    let mut config = fuser::Config::default();
    config.mount_options = vec![fuser::MountOption::FSName("powercut".to_owned())];
    let session = fuser::Session::new(file_system, mount, &config)
        .with_context(|| format!("cannot mount the disk on {}", mount.display()))?;
    let session = session.spawn()?;
    let orderly = obey(served);
    if matches!(orderly, Ok(true)) {
        mounts::detach(mount);
    } else {
        served.cut();
        served.release();
        upper.into_iter().for_each(mounts::detach);
        mounts::detach(mount);
        if let Some(scratch) = mount.parent() {
            remove(scratch);
        }
    }
    // Ends as this process does: whoever still has the file open must not be waited for.
    drop(session);
    orderly.map(|_| ())
}

/// What orders are for.
trait Served {
    fn reset(&self);
    fn arm(&self, under: Option<String>, trigger: Trigger) -> Result<()>;
    fn strike(&self, under: Option<String>, effect: Effect) -> Result<()>;
    fn cut(&self);
    fn release(&self);
    fn power_on(&self, seed: u64, survival: Survival) -> Survived;
    fn stats(&self) -> Stats;
}

impl Served for SharedDisk {
    fn reset(&self) {
        SharedDisk::cut(self);
        self.lock().reset();
    }

    fn arm(&self, under: Option<String>, trigger: Trigger) -> Result<()> {
        ensure!(under.is_none(), "a disk knows no directories");
        self.lock().arm(trigger);
        Ok(())
    }

    fn strike(&self, under: Option<String>, effect: Effect) -> Result<()> {
        ensure!(under.is_none(), "a disk knows no directories");
        match effect {
            Effect::Cut => SharedDisk::cut(self),
            _ => self.lock().strike(effect),
        }
        Ok(())
    }

    fn cut(&self) {
        SharedDisk::cut(self);
    }

    /// The cut has let them fail.
    fn release(&self) {}

    fn power_on(&self, seed: u64, survival: Survival) -> Survived {
        SharedDisk::cut(self);
        self.lock().power_on(seed, survival)
    }

    fn stats(&self) -> Stats {
        self.lock().stats()
    }
}

impl Served for SharedVolume {
    fn reset(&self) {
        SharedVolume::cut(self);
        SharedVolume::release(self);
        self.lock().reset();
        self.begin_anew();
    }

    fn arm(&self, under: Option<String>, trigger: Trigger) -> Result<()> {
        self.lock().arm(under, trigger);
        Ok(())
    }

    fn strike(&self, under: Option<String>, effect: Effect) -> Result<()> {
        self.lock().strike(under.as_deref(), effect);
        Ok(())
    }

    fn cut(&self) {
        SharedVolume::cut(self);
    }

    fn release(&self) {
        SharedVolume::release(self);
    }

    fn power_on(&self, seed: u64, survival: Survival) -> Survived {
        SharedVolume::cut(self);
        SharedVolume::release(self);
        let survived = self.lock().power_on(seed, survival);
        self.begin_anew();
        survived
    }

    fn stats(&self) -> Stats {
        self.lock().stats()
    }
}

/// Removes the directory in which nothing is mounted any more. Members that were about to start may still make theirs
/// in it, until they notice that their parent is gone.
fn remove(scratch: &Path) {
    for _ in 0..20 {
        let _ = std::fs::remove_dir_all(scratch);
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Obeys until the end, and says whether that was ordered.
fn obey(served: &impl Served) -> Result<bool> {
    let mut out = std::io::stdout().lock();
    say(&mut out, Answer::Done)?;
    for line in std::io::stdin().lock().lines() {
        let mut answer = Answer::Done;
        match serde_json::from_str(&line?)? {
            Order::Reset => served.reset(),
            Order::Arm { under, trigger } => served.arm(under, trigger)?,
            Order::Strike { under, effect } => served.strike(under, effect)?,
            Order::Release => served.release(),
            Order::PowerOn { seed, survival } => answer = Answer::Survived(served.power_on(seed, survival)),
            Order::Stats => answer = Answer::Stats(served.stats()),
            Order::Quit => return Ok(true),
        }
        say(&mut out, answer)?;
    }
    Ok(false)
}

fn say(out: &mut impl Write, answer: Answer) -> Result<()> {
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    out.write_all(&line)?;
    Ok(out.flush()?)
}

/// A running server. Dropping it ends it.
#[derive(Debug)]
pub struct Server {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Server {
    /// Starts `program` as the server of a disk.
    ///
    /// # Errors
    /// When it does not come up; it has said why on standard error.
    pub fn start(program: &Path, image: &Path, mount: &Path, upper: &Path) -> Result<Self> {
        Self::start_with(program, SERVE, &[image, mount, upper])
    }

    /// Starts `program` as the server of a volume.
    ///
    /// # Errors
    /// When it does not come up; it has said why on standard error.
    pub fn start_directory(program: &Path, mount: &Path) -> Result<Self> {
        Self::start_with(program, SERVE_DIRECTORY, &[mount])
    }

    fn start_with(program: &Path, what: &str, paths: &[&Path]) -> Result<Self> {
        let mut child = Command::new(program)
            .arg(what)
            .args(paths)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // An interrupt from the terminal ends the others; the server then cleans up behind them.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let orders = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("standard output is piped")?);
        let mut server = Self { child, orders, answers };
        server.answer().context("the disk does not come up")?;
        Ok(server)
    }

    /// Puts the formatted image back.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn reset(&mut self) -> Result<()> {
        self.done(Order::Reset)
    }

    /// Adds a fault to come.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn arm(&mut self, trigger: Trigger) -> Result<()> {
        self.done(Order::Arm { under: None, trigger })
    }

    /// Adds a fault to come on the disk of one directory of a volume.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn arm_under(&mut self, under: &str, trigger: Trigger) -> Result<()> {
        self.done(Order::Arm { under: Some(under.to_owned()), trigger })
    }

    /// Lets something happen now.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn strike(&mut self, effect: Effect) -> Result<()> {
        self.done(Order::Strike { under: None, effect })
    }

    /// Lets something happen now to the disk of one directory of a volume.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn strike_under(&mut self, under: &str, effect: Effect) -> Result<()> {
        self.done(Order::Strike { under: Some(under.to_owned()), effect })
    }

    /// Lets requests without an answer fail: those who wait for them have been killed.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn release(&mut self) -> Result<()> {
        self.done(Order::Release)
    }

    /// Puts the power on again.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn power_on(&mut self, seed: u64, survival: Survival) -> Result<Survived> {
        match self.ask(Order::PowerOn { seed, survival })? {
            Answer::Survived(survived) => Ok(survived),
            other => bail!("odd answer {other:?}"),
        }
    }

    /// Figures of the disk.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn stats(&mut self) -> Result<Stats> {
        match self.ask(Order::Stats)? {
            Answer::Stats(stats) => Ok(stats),
            other => bail!("odd answer {other:?}"),
        }
    }

    fn done(&mut self, order: Order) -> Result<()> {
        match self.ask(order)? {
            Answer::Done => Ok(()),
            other => bail!("odd answer {other:?}"),
        }
    }

    fn ask(&mut self, order: Order) -> Result<Answer> {
        self.tell(order)?;
        self.answer()
    }

    fn tell(&mut self, order: Order) -> Result<()> {
        let mut line = serde_json::to_vec(&order)?;
        line.push(b'\n');
        self.orders.as_mut().context("the disk has been told to quit")?.write_all(&line)?;
        Ok(())
    }

    fn answer(&mut self) -> Result<Answer> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("the disk says {line:?}"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // If it does not take the order, it is on its way out, or takes the end of its input for one.
        let _ = self.tell(Order::Quit);
        self.orders = None;
        let _ = self.child.wait();
    }
}
