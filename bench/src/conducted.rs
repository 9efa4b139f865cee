//! Replicas that a neutral driver conducts: `COMMAND --id I --dir DIR --ports P1,P2,P3` each, orders to the first on its
//! standard input. `ringraft node --drive` is one such command; a program that ringraft is compared with is another, and
//! then only what every replica understands may be asked of it ([`Replicas::order`]).
//!
//! Whatever becomes of a measurement, its replicas end: dropping [`Replicas`] closes their standard inputs and waits for
//! them. Under [`RunArgs::carry_out`](crate::runs::RunArgs::carry_out) that holds for a request to stop, too.
//!
//! [`tracer`] counts what they ask of the kernel.

pub mod tracer;

use crate::bench::control::NodeStatus;
use crate::cleanup;
use crate::limit::check_file_system;
use crate::runs::work::{Figures, Work};
use anyhow::{Context as _, ensure};
use serde::Deserialize;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// How long replicas may take to end when they are told to.
const FAREWELL: Duration = Duration::from_secs(5);
/// A restarted replica has caught up by then.
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(600);
/// It is asked this often whether it has.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// What a log is filled with: few large commands are written soonest.
const FILLING: Work = Work::from_thread(32 << 10, 16);
/// Filling stops at the end of one of these.
const FILLING_SPAN: Duration = Duration::from_millis(250);
/// So many of them in a row without a commit are no hiccup.
const IDLE_SPANS_MAX: u32 = 50;
/// Arguments with which a run of some seconds goes through all segments of a log several times: the pool has four of them.
pub const STEADY: [&str; 6] = ["--command-kb", "64", "--segment-mb", "16", "--snapshot-mb", "32"];

/// The command of ringraft's replicas: `more` are the engine's flags. `backend` may have an idle policy behind it, as in `uring/park`.
pub fn ringraft(executable: &str, backend: &str, on_core: bool, more: &[&str]) -> Vec<String> {
    let load = if on_core { "core" } else { "thread" };
    let (backend, idle) = backend.split_once('/').map_or((backend, None), |(name, idle)| (name, Some(idle)));
    let arguments = [executable, "node", "--drive", "--backend", backend, "--load", load];
    let idle = idle.map(|idle| ["--idle", idle]);
    arguments.iter().chain(idle.iter().flatten()).chain(more).map(ToString::to_string).collect()
}

/// Refuses a disk that has less room than that, and one that is in memory.
pub fn ensure_room(dir: &Path, bytes: u64) -> anyhow::Result<()> {
    check_file_system(dir, bytes).map(drop)
}

/// What the first replica says of an order.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Said {
    /// Commands committed in the time measured.
    entries: u64,
    /// That time.
    secs: f64,
    /// Latency.
    p50_us: f64,
    p99_us: f64,
}

/// What one order came to.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Commands committed in the time measured.
    pub entries: u64,
    /// What they took.
    pub figures: Figures,
}

/// How a replica came back.
#[derive(Clone, Copy, Debug)]
pub struct Restart {
    /// Until it had recovered its log and listened.
    pub started: Duration,
    /// Until it had applied all that was committed.
    pub applied: Duration,
}

/// Running replicas, of which the first leads. They end with this.
pub struct Replicas {
    start: Start,
    /// The first one last.
    children: Children,
    orders: Talk,
}

/// How to start them.
struct Start {
    program: String,
    arguments: Vec<String>,
    ports: String,
    dir: PathBuf,
}

/// The standard input and output of a replica.
struct Talk {
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Start {
    fn replica(&self, id: usize, stdout: Stdio) -> anyhow::Result<Child> {
        let home = self.dir.join(format!("replica-{id}"));
        std::fs::create_dir_all(&home)?;
        let log = std::fs::File::options().create(true).append(true).open(self.log(id))?;
        let mut replica = Command::new(&self.program);
        replica.args(&self.arguments).args(["--id", &id.to_string(), "--ports", &self.ports]);
        replica.arg("--dir").arg(&home).stdin(Stdio::piped()).stdout(stdout).stderr(log);
        replica.spawn().with_context(|| format!("starting {}", self.program))
    }

    fn log(&self, id: usize) -> PathBuf {
        self.dir.join(format!("replica-{id}.log"))
    }
}

impl Talk {
    fn with(child: &mut Child) -> anyhow::Result<Self> {
        let orders = Some(child.stdin.take().context("its standard input")?);
        Ok(Self { orders, answers: BufReader::new(child.stdout.take().context("its standard output")?) })
    }

    fn say(&mut self, order: &str) -> anyhow::Result<()> {
        let orders = self.orders.as_mut().context("a replica that was dismissed")?;
        writeln!(orders, "{order}").context("giving an order")
    }

    /// The rest of the next line that begins so.
    fn wait_for(&mut self, word: &str) -> anyhow::Result<String> {
        loop {
            let mut line = String::new();
            let ended = self.answers.read_line(&mut line)? == 0;
            cleanup::check()?;
            ensure!(!ended, "it ended before it said {word}");
            if let Some(rest) = line.strip_prefix(word) {
                return Ok(rest.trim().to_owned());
            }
        }
    }

    fn status(&mut self) -> anyhow::Result<NodeStatus> {
        self.say("status")?;
        let status = self.wait_for("STATUS")?;
        serde_json::from_str(&status).with_context(|| format!("not a status: {status}"))
    }
}

impl Replicas {
    /// Starts `count` of them with data in `dir`, and waits until the first one leads.
    pub fn start(command: &[String], count: usize, dir: &Path) -> anyhow::Result<Self> {
        let listeners: Vec<_> =
            (0..count).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<_, _>>()?;
        let ports: Vec<_> = listeners
            .iter()
            .map(|listener| Ok(listener.local_addr()?.port().to_string()))
            .collect::<anyhow::Result<_>>()?;
        drop(listeners);
        let (program, arguments) = command.split_first().context("an empty command")?;
        let start = Start {
            program: program.clone(),
            arguments: arguments.to_vec(),
            ports: ports.join(","),
            dir: dir.to_owned(),
        };
        let mut children = Children(Vec::new());
        for id in (1..=count).rev() {
            let stdout = if id == 1 { Stdio::piped() } else { Stdio::null() };
            children.0.push(start.replica(id, stdout)?);
        }
        let orders = Talk::with(children.0.last_mut().context("no replica at all")?)?;
        let mut replicas = Self { start, children, orders };
        let leads = replicas.orders.wait_for("LEADER");
        leads.with_context(|| format!("waiting for {program}, see {}", dir.display()))?;
        Ok(replicas)
    }

    /// Has commands kept in flight, first for `warm_up`, then measured for `run`. Where they are proposed was decided when
    /// the replicas were started.
    pub fn order(&mut self, work: Work, warm_up: Duration, run: Duration) -> anyhow::Result<Outcome> {
        let outcome = self.try_order(work, warm_up, run)?;
        outcome.with_context(|| format!("nothing was committed in {run:?}"))
    }

    /// The same; nothing if nothing was committed.
    fn try_order(&mut self, work: Work, warm_up: Duration, run: Duration) -> anyhow::Result<Option<Outcome>> {
        let Work { payload_bytes, in_flight, .. } = work;
        let spans = (warm_up.as_millis(), run.as_millis());
        self.orders.say(&format!("bench {payload_bytes} {in_flight} {} {}", spans.0, spans.1))?;
        self.orders.wait_for("BEGIN")?;
        let before = self.processor()?;
        let end = self.orders.wait_for("END")?;
        let processor = self.processor()?.saturating_sub(before);
        let said: Said = serde_json::from_str(&end).with_context(|| format!("not an outcome: {end}"))?;
        if said.entries == 0 {
            return Ok(None);
        }
        let per_s = said.entries as f64 / said.secs;
        let cpu_us = processor.as_secs_f64() * 1e6 / said.entries as f64;
        let figures = Figures {
            per_s,
            bytes_per_s: per_s * payload_bytes as f64,
            p50_us: said.p50_us,
            p99_us: said.p99_us,
            cpu_us,
            cpu_s_per_gb: cpu_us * 1e3 / payload_bytes as f64,
        };
        Ok(Some(Outcome { entries: said.entries, figures }))
    }

    /// Writes that much of commands, and little more.
    pub fn write(&mut self, bytes: u64) -> anyhow::Result<()> {
        let (mut written, mut idle) = (0, 0);
        while written < bytes {
            let outcome = self.try_order(FILLING, Duration::ZERO, FILLING_SPAN)?;
            written += outcome.as_ref().map_or(0, |outcome| outcome.entries * FILLING.payload_bytes as u64);
            // A disk may hang for the moment.
            idle = if outcome.is_none() { idle + 1 } else { 0 };
            ensure!(idle < IDLE_SPANS_MAX, "nothing was committed in {:?}", FILLING_SPAN * idle);
        }
        Ok(())
    }

    /// Stops a replica that does not lead, starts it again on what it has written, and waits until it has caught up. Only
    /// ringraft's replicas tell their status.
    pub fn restart(&mut self, id: usize) -> anyhow::Result<Restart> {
        ensure!(1 < id && id <= self.children.0.len(), "replica {id} does not follow");
        let place = self.children.0.len() - id;
        let child = &mut self.children.0[place];
        drop(child.stdin.take());
        end(std::slice::from_mut(child), FAREWELL);
        let committed = self.orders.status()?.commit;
        let began = Instant::now();
        *child = self.start.replica(id, Stdio::piped())?;
        let mut talk = Talk::with(child)?;
        let mut status = talk.status().with_context(|| format!("starting replica {id} again"))?;
        let started = began.elapsed();
        while status.applied < committed {
            ensure!(began.elapsed() < CAUGHT_UP_WITHIN, "replica {id} does not catch up: {status:?}");
            cleanup::sleep(LOOK_AGAIN)?;
            status = talk.status()?;
        }
        let applied = began.elapsed();
        child.stdin = talk.orders.take();
        // It says nothing unasked.
        Ok(Restart { started, applied })
    }

    /// Their processes, the leader's first.
    pub fn processes(&self) -> Vec<u32> {
        self.children.0.iter().rev().map(Child::id).collect()
    }

    /// What the leader has said to its log.
    pub fn messages(&self) -> String {
        std::fs::read_to_string(self.start.log(1)).unwrap_or_default()
    }

    /// Memory of the leader's process that is resident.
    pub fn resident_bytes(&self) -> anyhow::Result<u64> {
        let leader = self.processes()[0];
        let sizes = std::fs::read_to_string(format!("/proc/{leader}/statm"))?;
        let pages =
            sizes.split_ascii_whitespace().nth(1).context("/proc/PID/statm without a second field")?;
        Ok(pages.parse::<u64>()? * rustix::param::page_size() as u64)
    }

    /// What they have used of processors since they began.
    pub fn processor(&self) -> anyhow::Result<Duration> {
        self.children.0.iter().map(|child| processor_of(child.id())).sum()
    }
}

/// They end with this: those whose standard input has been closed in good order, if they do so soon.
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            drop(child.stdin.take());
        }
        end(&mut self.0, FAREWELL);
    }
}

impl Drop for Replicas {
    fn drop(&mut self) {
        // A replica stops when its standard input ends; that of the first one is held here.
        drop(self.orders.orders.take());
    }
}

fn end(children: &mut [Child], within: Duration) {
    let asked = Instant::now();
    for child in children {
        while matches!(child.try_wait(), Ok(None)) {
            if asked.elapsed() >= within {
                let _ = child.kill();
                let _ = child.wait();
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Of `/proc/PID/stat`: the 14th and 15th field, in clock ticks.
fn processor_of(pid: u32) -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit_once(')').context("/proc/PID/stat without a name")?.1;
    let ticks: u64 = fields
        .split_ascii_whitespace()
        .skip(11)
        .take(2)
        .map(str::parse::<u64>)
        .sum::<Result<_, _>>()
        .context("ticks in /proc/PID/stat")?;
    Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}
