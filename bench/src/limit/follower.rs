//! Followers: how the leader starts and ends them, and what one does.
//!
//! A follower is this executable again with a hidden subcommand. It dials the leader, opens its file, says
//! hello and obeys until the connection closes. It never outlives the leader: the kernel kills it when the
//! leader's thread dies, and before that the closed connection ends it.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use rustix::process::{Pid, Signal};
use rustix::thread::CpuSet;

use super::Usage;
use super::disk::LogFile;
use super::replicate;
use super::socket::{self, Answer, Command, Control};

/// The hidden subcommand under which a binary calls [`follower_main`].
pub const FOLLOWER_COMMAND: &str = "__limit-follower";

/// Followers must have said hello by then.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// Followers must have ended by then, or they are killed.
const END_WITHIN: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// What runs as a follower.
#[derive(Clone, Debug)]
pub enum FollowerKind {
    /// A process that runs the current executable.
    ThisExecutable,
    /// A process that runs this executable, called with [`FOLLOWER_COMMAND`] and [`FollowerArgs`].
    Process(PathBuf),
    /// A thread of this process. For tests, where no such executable is at hand: the figures differ, as
    /// threads share one address space, and each thread counts its own processor time only.
    Thread,
}

/// The arguments of [`FOLLOWER_COMMAND`].
#[derive(Clone, Debug, clap::Args)]
pub struct FollowerArgs {
    /// Where the leader listens
    #[arg(long)]
    connect: SocketAddr,
    /// Which follower this is, from 1
    #[arg(long)]
    id: usize,
    /// Where to make the scratch file
    #[arg(long)]
    dir: PathBuf,
    /// The leader's process, without which the follower ends
    #[arg(long)]
    parent: i32,
    /// The core to run on
    #[arg(long)]
    core: Option<usize>,
}

/// Runs a follower until its leader is gone. A binary calls this for [`FOLLOWER_COMMAND`].
pub fn follower_main(args: &FollowerArgs) -> anyhow::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .context("tying to the leader's life")?;
    // The leader may have died before the line above.
    ensure!(rustix::process::getppid() == Pid::from_raw(args.parent), "the leader is gone");
    follow(args, Usage::Process)
}

fn follow(args: &FollowerArgs, usage: Usage) -> anyhow::Result<()> {
    if let Some(core) = args.core {
        pin(core)?;
    }
    let stream =
        TcpStream::connect(args.connect).with_context(|| format!("connecting to {}", args.connect))?;
    let mut leader = Control::new(stream)?;
    match serve(args, usage, &mut leader) {
        // The leader is gone, which ends a follower at any point: that is no failure of its own.
        Err(_) if leader.closed_by_peer() => Ok(()),
        Err(error) => {
            let _ = leader.tell(&Answer::Failed { error: format!("{error:#}") });
            Err(error)
        }
        Ok(()) => Ok(()),
    }
}

fn serve(args: &FollowerArgs, usage: Usage, leader: &mut Control) -> anyhow::Result<()> {
    let mut file = LogFile::create(&args.dir, &format!("follower-{}", args.id))?;
    leader.tell(&Answer::Hello { id: args.id })?;
    let mut cpu_ns = 0;
    while let Some(command) = leader.hear()? {
        match command {
            Command::Fill { bytes } => {
                file.fill(bytes)?;
                leader.tell(&Answer::Ready)?;
            }
            Command::Stream { message_bytes, echo } => {
                let before = usage.cpu_ns();
                socket::receive_messages(leader, message_bytes, echo)?;
                cpu_ns = usage.cpu_ns() - before;
            }
            Command::Replicate { batch_bytes, slots, looks } => {
                cpu_ns = replicate::follow(&file, leader, batch_bytes, slots, looks, usage)?;
            }
            Command::Report => leader.tell(&Answer::Report { cpu_ns })?,
        }
    }
    Ok(())
}

/// A running follower. Dropping it closes its connection and waits for its end.
pub(super) struct Follower {
    /// The connection to it.
    pub(super) control: Control,
    running: Running,
}

impl Follower {
    /// Starts `count` followers whose files are in `dir`, and waits until those are open.
    pub(super) fn start(
        kind: &FollowerKind,
        count: usize,
        dir: &Path,
        cores: Option<&[usize]>,
    ) -> anyhow::Result<Vec<Self>> {
        let listener = TcpListener::bind("127.0.0.1:0").context("listening on loopback")?;
        listener.set_nonblocking(true).context("listening on loopback")?;
        let connect = listener.local_addr().context("listening on loopback")?;
        let mut started = Vec::new();
        for id in 1..=count {
            let core = cores.and_then(|cores| cores.get(id % cores.len().max(1)).copied());
            let parent = rustix::process::getpid().as_raw_pid();
            let args = FollowerArgs { connect, id, dir: dir.to_owned(), parent, core };
            started.push(Some(Running::start(kind, &args)?));
        }
        let mut followers: Vec<Option<Self>> = (0..count).map(|_| None).collect();
        let deadline = Instant::now() + HELLO_WITHIN;
        while followers.iter().any(Option::is_none) {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    for running in started.iter_mut().flatten() {
                        running.check()?;
                    }
                    ensure!(
                        Instant::now() < deadline,
                        "no follower connected within {} s",
                        HELLO_WITHIN.as_secs()
                    );
                    std::thread::sleep(LOOK_AGAIN);
                    continue;
                }
                Err(error) => return Err(error).context("accepting a follower"),
            };
            stream.set_nonblocking(false).context("accepting a follower")?;
            let mut control = Control::new(stream)?;
            control.limit_silence()?;
            let Answer::Hello { id } = control.answer()? else { bail!("a follower answered out of turn") };
            let running = started.get_mut(id.wrapping_sub(1)).and_then(Option::take);
            let running = running.ok_or_else(|| anyhow!("a stranger said hello as follower {id}"))?;
            followers[id - 1] = Some(Self { control, running });
        }
        Ok(followers.into_iter().flatten().collect())
    }

    /// Its process, if it has one of its own.
    pub(super) fn process(&self) -> Option<u32> {
        match &self.running {
            Running::Process(child) => Some(child.id()),
            Running::Thread(_) => None,
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.control.close();
        self.running.end();
    }
}

enum Running {
    Process(Child),
    Thread(Option<JoinHandle<anyhow::Result<()>>>),
}

impl Running {
    fn start(kind: &FollowerKind, args: &FollowerArgs) -> anyhow::Result<Self> {
        let executable = match kind {
            FollowerKind::ThisExecutable => std::env::current_exe().context("looking for this executable")?,
            FollowerKind::Process(executable) => executable.clone(),
            FollowerKind::Thread => {
                let args = args.clone();
                let thread = std::thread::Builder::new().name(format!("limit-follower-{}", args.id));
                let thread =
                    thread.spawn(move || follow(&args, Usage::Thread)).context("starting a thread")?;
                return Ok(Self::Thread(Some(thread)));
            }
        };
        let mut process = Process::new(&executable);
        process.arg(FOLLOWER_COMMAND);
        process.arg("--connect").arg(args.connect.to_string());
        process.arg("--id").arg(args.id.to_string());
        process.arg("--dir").arg(&args.dir);
        process.arg("--parent").arg(args.parent.to_string());
        if let Some(core) = args.core {
            process.arg("--core").arg(core.to_string());
        }
        let child = process.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Ok(Self::Process(child.with_context(|| format!("starting {}", executable.display()))?))
    }

    /// Fails if it has ended.
    fn check(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Process(child) => match child.try_wait().context("looking at a follower")? {
                Some(status) => bail!("a follower ended before it said hello ({status})"),
                None => Ok(()),
            },
            Self::Thread(thread) => {
                ensure!(
                    !thread.as_ref().is_some_and(JoinHandle::is_finished),
                    "a follower ended before it said hello"
                );
                Ok(())
            }
        }
    }

    /// Waits for its end, which the closed connection brings about; kills a process that takes too long.
    fn end(&mut self) {
        match self {
            Self::Process(child) => {
                let deadline = Instant::now() + END_WITHIN;
                while matches!(child.try_wait(), Ok(None)) {
                    if Instant::now() >= deadline {
                        let _ = child.kill();
                        let _ = child.wait();
                        return;
                    }
                    std::thread::sleep(LOOK_AGAIN);
                }
            }
            Self::Thread(thread) => {
                // Its error has been told to the leader, or the leader's own error is the cause.
                let _ = thread.take().map(JoinHandle::join);
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        match self {
            // It never said hello, or `end` has waited for it already.
            Self::Process(child) => {
                if matches!(child.try_wait(), Ok(None)) {
                    let _ = child.kill();
                    let _ = child.wait();
                }
            }
            // Detached: it ends when it cannot reach the leader.
            Self::Thread(_) => {}
        }
    }
}

/// Binds the calling thread to `core`.
pub(super) fn pin(core: usize) -> anyhow::Result<()> {
    ensure!(core < CpuSet::MAX_CPU, "there is no core {core}");
    let mut set = CpuSet::new();
    set.set(core);
    rustix::thread::sched_setaffinity(None, &set).with_context(|| format!("running on core {core}"))
}
