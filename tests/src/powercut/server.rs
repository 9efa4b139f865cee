//! The process that holds the disk: a file system must not be served by those who wait for it.
//!
//! Orders come in on standard input and answers go out on standard output, one line of JSON each. When standard input
//! ends without [`Order::Quit`], those who should have cleaned up are gone: the power is cut and everything unmounted.

use super::disk::{Effect, FaultDisk, Stats, Survival, Survived, Trigger};
use super::fuse::{DiskFs, SharedDisk};
use super::image::Image;
use super::mounts;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// The first argument of a program that is to [`serve`].
pub const SERVE: &str = "serve-disk";

/// What the server is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// [`FaultDisk::reset`].
    Reset,
    /// [`FaultDisk::arm`].
    Arm(Trigger),
    /// [`FaultDisk::strike`].
    Strike(Effect),
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
    let mut config = fuser::Config::default();
    config.mount_options = vec![fuser::MountOption::FSName("powercut".to_owned())];
    let session = fuser::Session::new(DiskFs::new(disk.clone()), &mount, &config)
        .with_context(|| format!("cannot mount the disk on {}", mount.display()))?;
    let session = session.spawn()?;
    let orderly = obey(&disk);
    if matches!(orderly, Ok(true)) {
        mounts::detach(&mount);
    } else {
        disk.cut();
        mounts::detach(&upper);
        mounts::detach(&mount);
        if let Some(scratch) = image.parent() {
            remove(scratch);
        }
    }
    // Ends as this process does: whoever still has the file open must not be waited for.
    drop(session);
    orderly.map(|_| ())
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
fn obey(disk: &SharedDisk) -> Result<bool> {
    let mut out = std::io::stdout().lock();
    say(&mut out, Answer::Done)?;
    for line in std::io::stdin().lock().lines() {
        let answer = match serde_json::from_str(&line?)? {
            Order::Reset => {
                disk.cut();
                disk.lock().reset();
                Answer::Done
            }
            Order::Arm(trigger) => {
                disk.lock().arm(trigger);
                Answer::Done
            }
            Order::Strike(Effect::Cut) => {
                disk.cut();
                Answer::Done
            }
            Order::Strike(effect) => {
                disk.lock().strike(effect);
                Answer::Done
            }
            Order::PowerOn { seed, survival } => {
                disk.cut();
                Answer::Survived(disk.lock().power_on(seed, survival))
            }
            Order::Stats => Answer::Stats(disk.lock().stats()),
            Order::Quit => return Ok(true),
        };
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
    /// Starts `program` as the server.
    ///
    /// # Errors
    /// When it does not come up; it has said why on standard error.
    pub fn start(program: &Path, image: &Path, mount: &Path, upper: &Path) -> Result<Self> {
        let mut child = Command::new(program)
            .arg(SERVE)
            .args([image, mount, upper])
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
        self.done(Order::Arm(trigger))
    }

    /// Lets something happen now.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn strike(&mut self, effect: Effect) -> Result<()> {
        self.done(Order::Strike(effect))
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
