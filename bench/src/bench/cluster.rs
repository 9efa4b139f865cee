//! The processes of a benchmark's cluster. They end with the parent however it ends: the guard kills them, the
//! kernel kills them when the parent dies, and the end of their standard input stops them.

use super::control::{Answer, NodeStatus, Order};
use crate::cli::EngineArgs;
use crate::exit::{self, Failure};
use crate::machine::LogFiles;
use crate::node::LoadFrom;
use crate::{cleanup, machine};
use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal};
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Formatting a data directory writes its segments' zeros, on a slow disk for a while.
const READY_WITHIN: Duration = Duration::from_secs(120);
const LEADER_WITHIN: Duration = Duration::from_secs(20);
/// A node that runs answers at once.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Those that tell their status later than this are left out of one look at all.
const STATUS_WITHIN: Duration = Duration::from_millis(200);
/// A node that was told to stop finishes its writes.
const STOP_WITHIN: Duration = Duration::from_secs(10);
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Lines of a node's messages that are shown when it fails.
const MESSAGES_SHOWN: usize = 8;

/// How to start the members.
#[derive(Clone, Debug)]
pub(crate) struct ClusterOptions {
    /// The benchmark's own directory: data directories, ledgers and messages are in it.
    pub(crate) dir: PathBuf,
    pub(crate) nodes: usize,
    /// The core of each member, in turn.
    pub(crate) cores: Vec<usize>,
    pub(crate) engine: EngineArgs,
    pub(crate) load: LoadFrom,
    /// MiB of log after which a member takes a snapshot and purges; 0: never.
    pub(crate) snapshot_mb: u64,
}

/// The members. Dropping it kills their processes and waits for them.
pub(crate) struct Cluster {
    options: ClusterOptions,
    members: Vec<Member>,
}

/// One member, alive or dead.
pub(crate) struct Member {
    pub(crate) id: u64,
    pub(crate) dir: PathBuf,
    arguments: Vec<std::ffi::OsString>,
    messages: PathBuf,
    process: Option<Process>,
    /// The highest [`NodeStatus::kept`] that any of its processes reported.
    kept: u64,
    /// What its former processes spent and wrote.
    spent: Usage,
    /// How its latest process ended, once it has.
    pub(crate) ended: Option<ExitStatus>,
}

struct Process {
    child: Child,
    pid: Pid,
    orders: Option<ChildStdin>,
    answers: Receiver<Answer>,
    /// Orders whose answer has not come yet.
    unanswered: usize,
    seen: Usage,
}

/// What a member's processes used.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) cpu_ns: u64,
    pub(crate) written_bytes: u64,
}

impl Cluster {
    /// Starts all members and waits until each is up.
    pub(crate) fn start(options: ClusterOptions) -> anyhow::Result<Self> {
        let ports = free_ports(options.nodes)?;
        let addresses = (1..).zip(&ports).map(|(id, port)| format!("{id}=127.0.0.1:{port}"));
        let addresses = addresses.collect::<Vec<String>>().join(",");
        let mut random = [0; 16];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let cluster = format!("{:x}", u128::from_le_bytes(random) | 1);
        let mut started = Self { options, members: Vec::new() };
        for id in 1..=started.options.nodes as u64 {
            let options = &started.options;
            let dir = options.dir.join(format!("node-{id}"));
            let mut arguments = vec!["node".into(), "--control".into(), "--id".into(), id.to_string().into()];
            arguments.extend(["--dir".into(), dir.clone().into_os_string()]);
            arguments.extend(["--members".into(), (&addresses).into()]);
            arguments.extend(["--cluster".into(), (&cluster).into()]);
            arguments.extend(["--snapshot-mb".into(), options.snapshot_mb.to_string().into()]);
            arguments.extend(["--parent".into(), std::process::id().to_string().into()]);
            if options.load == LoadFrom::Core {
                arguments.extend(["--load".into(), "core".into()]);
            }
            if let Some(core) = options.cores.get((id as usize - 1) % options.cores.len().max(1)) {
                arguments.extend(["--core".into(), core.to_string().into()]);
            }
            arguments.extend(options.engine.to_args());
            let messages = options.dir.join(format!("node-{id}.log"));
            let member = Member {
                id,
                dir,
                arguments,
                messages,
                process: None,
                kept: 0,
                spent: Usage::default(),
                ended: None,
            };
            started.members.push(member);
        }
        for member in &mut started.members {
            member.spawn()?;
        }
        for member in &mut started.members {
            member.wait_ready()?;
        }
        Ok(started)
    }

    pub(crate) fn members(&mut self) -> &mut [Member] {
        &mut self.members
    }

    /// The member with this id.
    pub(crate) fn member(&mut self, id: u64) -> anyhow::Result<&mut Member> {
        self.members.iter_mut().find(|member| member.id == id).context("no such member")
    }

    /// Waits until every member knows that the cluster is formed and one of them leads; returns that.
    pub(crate) fn wait_formed(&mut self) -> anyhow::Result<NodeStatus> {
        let deadline = Instant::now() + LEADER_WITHIN;
        loop {
            let statuses = self.statuses()?;
            let formed = statuses.len() == self.members.len() && statuses.iter().all(|status| status.formed);
            if let Some(leader) = leader_of(&statuses).filter(|_| formed) {
                return Ok(leader.clone());
            }
            if Instant::now() > deadline {
                let said: Vec<_> = self.members.iter().map(Member::last_messages).collect();
                bail!("no leader after {LEADER_WITHIN:?}; the nodes say {statuses:?}\n{}", said.join("\n"));
            }
            cleanup::sleep(LOOK_AGAIN)?;
        }
    }

    /// What the members that live and answer in time say. Fails when one ended by itself, not by a signal.
    pub(crate) fn statuses(&mut self) -> anyhow::Result<Vec<NodeStatus>> {
        for member in &mut self.members {
            if member.look()? {
                member.post(&Order::Status)?;
            }
        }
        // One that was stopped by a signal must not hold up the others.
        let deadline = Instant::now() + STATUS_WITHIN;
        let mut statuses = Vec::new();
        for member in &mut self.members {
            if let Some(Answer::Status(status)) = member.await_answer(deadline)? {
                statuses.push(status);
            }
        }
        Ok(statuses)
    }

    /// Waits until every live member has committed and stored what its leader has. Returns the last statuses, and
    /// whether they came so far.
    pub(crate) fn wait_caught_up(&mut self) -> anyhow::Result<(Vec<NodeStatus>, bool)> {
        let deadline = Instant::now() + CAUGHT_UP_WITHIN;
        loop {
            let statuses = self.statuses()?;
            let live = self.members.iter().filter(|member| member.is_alive()).count();
            let end = leader_of(&statuses).map(|leader| leader.last);
            let caught_up =
                |status: &NodeStatus| Some(status.commit.min(status.durable).min(status.applied)) == end;
            let all = statuses.len() == live && statuses.iter().all(caught_up);
            // Too few are left for a leader: there is nothing to wait for.
            let hopeless = 2 * live <= self.members.len();
            if all || hopeless || Instant::now() > deadline {
                return Ok((statuses, all));
            }
            cleanup::sleep(LOOK_AGAIN)?;
        }
    }

    /// The segments that each live member has open for writing; none where `/proc` does not show them.
    pub(crate) fn log_files(&mut self) -> anyhow::Result<Vec<(u64, Option<LogFiles>)>> {
        let mut seen = Vec::new();
        for member in &mut self.members {
            let Some(pid) = member.process.as_ref().map(|process| process.pid) else { continue };
            let files = machine::log_files(pid, &member.dir);
            // One that has just been killed has nothing open.
            if member.look()? {
                seen.push((member.id, files));
            }
        }
        Ok(seen)
    }

    /// Stops the live members in good order. Those that do not are killed; says how many had to be.
    pub(crate) fn stop(&mut self) -> anyhow::Result<usize> {
        let mut killed = 0;
        for member in &mut self.members {
            if member.is_alive() {
                member.ask(&Order::Shutdown)?;
            }
            if let Some(process) = &mut member.process {
                process.orders = None;
            }
        }
        let deadline = Instant::now() + STOP_WITHIN;
        for member in &mut self.members {
            while member.look()? {
                if Instant::now() > deadline {
                    member.kill();
                    killed += 1;
                    break;
                }
                cleanup::sleep(LOOK_AGAIN)?;
            }
        }
        Ok(killed)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in &mut self.members {
            member.kill();
        }
    }
}

/// The one of the newest term that leads.
pub(crate) fn leader_of(statuses: &[NodeStatus]) -> Option<&NodeStatus> {
    statuses.iter().filter(|status| status.leads).max_by_key(|status| status.term)
}

/// Ports on loopback that nobody uses at this moment.
fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    // All are held at once, so that they differ.
    let bind = |_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let listeners: Vec<_> =
        (0..count).map(bind).collect::<Result<_, _>>().context("looking for free ports")?;
    let port = |listener: &TcpListener| Ok(listener.local_addr()?.port());
    listeners.iter().map(port).collect()
}

impl Process {
    /// Notes an answer.
    fn take(&mut self, answer: &Answer, kept: &mut u64) {
        match answer {
            // One that was started again says first, unasked, that it is up.
            Answer::Ready { .. } => return,
            Answer::Status(status) => *kept = (*kept).max(status.kept()),
            Answer::Taken | Answer::Failed { .. } => {}
        }
        self.unanswered = self.unanswered.saturating_sub(1);
    }
}

impl Member {
    /// Starts a process for this member, the first or another one on the same directory.
    pub(crate) fn spawn(&mut self) -> anyhow::Result<()> {
        let executable = std::env::current_exe().context("finding this executable")?;
        let messages = OpenOptions::new().create(true).append(true).open(&self.messages);
        let messages = messages.with_context(|| format!("creating {}", self.messages.display()))?;
        let mut command = Command::new(executable);
        command.args(&self.arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(messages);
        // Ctrl-C in a terminal goes to the whole process group; the parent decides what becomes of its nodes.
        command.process_group(0);
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "warn");
        }
        let mut child = command.spawn().context("starting a node")?;
        let pid = Pid::from_child(&child);
        let orders = child.stdin.take();
        let stdout = child.stdout.take().context("the child has an output")?;
        let (sender, answers) = channel();
        std::thread::Builder::new()
            .name(format!("answers-{}", self.id))
            .spawn(move || {
                let answers = BufReader::new(stdout).lines().map_while(Result::ok);
                for answer in answers.filter_map(|line| serde_json::from_str(&line).ok()) {
                    if sender.send(answer).is_err() {
                        break;
                    }
                }
            })
            .context("starting a thread")?;
        self.ended = None;
        self.process = Some(Process { child, pid, orders, answers, unanswered: 0, seen: Usage::default() });
        Ok(())
    }

    fn wait_ready(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        while self.look()? {
            cleanup::check()?;
            if let Some(process) = &self.process
                && let Ok(Answer::Ready { .. }) = process.answers.recv_timeout(LOOK_AGAIN)
            {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("node {} is not up after {READY_WITHIN:?}\n{}", self.id, self.last_messages());
            }
        }
        bail!("node {} was killed while it started", self.id)
    }

    /// Whether a process runs. Fails when it ended by itself, with what it said.
    pub(crate) fn look(&mut self) -> anyhow::Result<bool> {
        let Some(process) = &mut self.process else { return Ok(false) };
        let Some(status) = process.child.try_wait().context("looking at a node")? else { return Ok(true) };
        self.spent.cpu_ns += process.seen.cpu_ns;
        self.spent.written_bytes += process.seen.written_bytes;
        while let Ok(answer) = process.answers.try_recv() {
            process.take(&answer, &mut self.kept);
        }
        self.process = None;
        self.ended = Some(status);
        match status.code() {
            Some(0) | None => Ok(false),
            Some(code) => {
                let message = format!("node {}: {}", self.id, self.last_messages());
                Err(Failure { code: u8::try_from(code).unwrap_or(exit::FAILURE), message }.into())
            }
        }
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.process.is_some()
    }

    /// The signal that ended the latest process.
    pub(crate) fn killed_by(&self) -> Option<i32> {
        self.ended.and_then(|status| status.signal())
    }

    /// Gives an order and waits for its answer; none if the node is gone or does not answer.
    pub(crate) fn ask(&mut self, order: &Order) -> anyhow::Result<Option<Answer>> {
        self.post(order)?;
        self.await_answer(Instant::now() + ANSWER_WITHIN)
    }

    /// Gives an order without waiting for its answer.
    pub(crate) fn post(&mut self, order: &Order) -> anyhow::Result<()> {
        let line = serde_json::to_string(order)? + "\n";
        if let Some(process) = &mut self.process
            && let Some(orders) = &mut process.orders
        {
            // An error means that the node is gone, which shows elsewhere.
            let posted = orders.write_all(line.as_bytes()).and_then(|()| orders.flush());
            process.unanswered += usize::from(posted.is_ok());
        }
        Ok(())
    }

    /// The answer to the order given last; none if it does not come by `deadline`.
    fn await_answer(&mut self, deadline: Instant) -> anyhow::Result<Option<Answer>> {
        let Some(process) = &mut self.process else { return Ok(None) };
        while process.unanswered > 0 {
            cleanup::check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            match process.answers.recv_timeout(left.min(LOOK_AGAIN)) {
                Ok(answer) => {
                    process.take(&answer, &mut self.kept);
                    // Answers come in the order of the orders: this may be a late one.
                    if process.unanswered == 0 {
                        return Ok(Some(answer));
                    }
                }
                Err(RecvTimeoutError::Timeout) if !left.is_zero() => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(None),
            }
        }
        Ok(None)
    }

    /// Takes the answers that have come, without waiting, and asks for the status again when none is owed. So what a
    /// killed node had reported is at most as old as the last two calls.
    pub(crate) fn glance(&mut self) -> anyhow::Result<()> {
        let Some(process) = &mut self.process else { return Ok(()) };
        while let Ok(answer) = process.answers.try_recv() {
            process.take(&answer, &mut self.kept);
        }
        if process.unanswered == 0 {
            self.post(&Order::Status)?;
        }
        Ok(())
    }

    /// The end of what its disk must hold, by all that its processes reported.
    pub(crate) fn kept(&self) -> u64 {
        self.kept
    }

    /// SIGKILL, as an operator would.
    pub(crate) fn kill(&mut self) {
        self.sample();
        let Some(mut process) = self.process.take() else { return };
        // It may have ended by itself; either way it is waited for.
        let _ = process.child.kill();
        self.ended = process.child.wait().ok();
        self.spent.cpu_ns += process.seen.cpu_ns;
        self.spent.written_bytes += process.seen.written_bytes;
    }

    /// Kills the process and leaves it to [`Member::look`] to find out.
    pub(crate) fn send_kill(&mut self) {
        self.sample();
        if let Some(process) = &self.process {
            let _ = rustix::process::kill_process(process.pid, Signal::KILL);
        }
    }

    /// What all processes of this member have used. Call it often enough that little is lost with a killed one.
    pub(crate) fn sample(&mut self) -> Usage {
        let mut total = self.spent;
        if let Some(process) = &mut self.process {
            process.seen.cpu_ns = machine::cpu_ns(process.pid).unwrap_or(process.seen.cpu_ns);
            let written = machine::process_written_bytes(process.pid);
            process.seen.written_bytes = written.unwrap_or(process.seen.written_bytes);
            total.cpu_ns += process.seen.cpu_ns;
            total.written_bytes += process.seen.written_bytes;
        }
        total
    }

    /// The end of what it said: its error, if it gave one.
    fn last_messages(&self) -> String {
        let messages = File::open(&self.messages)
            .map(|file| BufReader::new(file).lines().map_while(Result::ok).collect::<Vec<String>>());
        let messages = messages.unwrap_or_default();
        match messages.iter().rev().find_map(|line| line.strip_prefix("error: ")) {
            Some(error) => error.to_owned(),
            None => messages[messages.len().saturating_sub(MESSAGES_SHOWN)..].join("\n"),
        }
    }
}

/// The directory of a benchmark: removed at the end, unless it is to be kept.
pub(crate) fn scratch(parent: &Path) -> anyhow::Result<tempfile::TempDir> {
    let made = tempfile::Builder::new().prefix("ringraft-bench-").tempdir_in(parent);
    made.map_err(|error| {
        let message = format!(
            "cannot make a directory in {}: {error}. Cure: --dir with a directory that you may write to",
            parent.display()
        );
        Failure { code: exit::DIRECTORY, message }.into()
    })
}
