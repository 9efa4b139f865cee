//! `ringraft limit`: what this machine can do at best, in the engine's own terms.
//!
//! It measures with raw io_uring and sockets, and with nothing of the engine: durable writes, the loopback
//! round trip and stream, and the replication pattern (a leader and its followers, each a process with a file
//! of its own) without any consensus. A figure of the engine divided by the figure of the same row here is
//! what the engine costs; absolute figures drift with the machine, so `ringraft bench` takes a short run
//! of this before and after its own.
//!
//! What a figure means:
//!
//! - A write is durable when it completes: `O_DIRECT | O_DSYNC` to a file that has been filled with zeros and
//!   flushed before. The files have no names, so nothing is left behind even if everything is killed.
//! - A batch is committed when a majority of the nodes, the leader counted, has written it and all before it.
//! - `in_flight` batches are begun and not committed at any time; the next begins when one commits. Slow
//!   followers may be some batches further behind.
//! - Processor time is that of the leader's whole process and of all followers, per batch. Let the calling
//!   process do nothing else meanwhile.
//! - Nobody looks for work: a node without some sleeps in the kernel, as an engine with `--idle park` does. In the rows that say
//!   "looking" a node looks for work for 500 µs before it sleeps, and gives way with every look, as an engine does while that gains
//!   it something.
//!
//! The files: `ring.rs` is io_uring, `disk.rs` the log files, `socket.rs` loopback and control messages,
//! `follower.rs` the followers' lives, `replicate.rs` the pattern, `report.rs` the figures.

mod disk;
mod follower;
mod replicate;
mod report;
mod ring;
mod socket;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use hdrhistogram::Histogram;
use rustix::time::ClockId;

pub use follower::{FOLLOWER_COMMAND, FollowerArgs, FollowerKind, follower_main};
pub use report::{LimitReport, LimitRow, Pattern, render};

pub(crate) use disk::check_file_system;

use disk::{BLOCK_BYTES, LogFile};
use follower::Follower;
use socket::{Answer, Command, Control};

const KIB: usize = 1 << 10;
/// The small message of the round trip.
const ROUND_TRIP_BYTES: usize = 64;
/// The pieces of the loopback stream.
const STREAM_BYTES: usize = 256 * KIB;
/// A tenth of a measurement, but no more than this, comes before it and does not count.
const WARM_UP_MAX: Duration = Duration::from_millis(100);

/// A size and a depth: `in_flight` batches of `batch_bytes` at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Shape {
    /// Bytes of a batch. A whole number of 4 KiB blocks, as every batch is on disk.
    pub batch_bytes: usize,
    /// Batches that are begun but not committed, 1 to 32.
    pub in_flight: usize,
}

impl Shape {
    /// The shape in which batches of `bytes` travel: rounded up to whole blocks.
    pub const fn of(bytes: usize, in_flight: usize) -> Self {
        let blocks = bytes.div_ceil(BLOCK_BYTES);
        Self { batch_bytes: if blocks == 0 { BLOCK_BYTES } else { blocks * BLOCK_BYTES }, in_flight }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} x {}", crate::runs::work::bytes(self.batch_bytes), self.in_flight)
    }
}

/// What to measure, and how.
#[derive(Clone, Debug)]
pub struct LimitOptions {
    /// Where the scratch files are made: a directory on the disk in question.
    pub dir: PathBuf,
    /// Nodes of the replication pattern, the leader counted: 1, 3 or 5.
    pub nodes: usize,
    /// How long each measurement takes.
    pub measure: Duration,
    /// The shapes of plain durable writes: at least one with one in flight, and one with several.
    pub disk: Vec<Shape>,
    /// The shapes of the replication pattern: at least one with one in flight, and one with several.
    pub replicated: Vec<Shape>,
    /// The shapes of the replication pattern among nodes that look for work before they sleep; there may be none.
    pub looking: Vec<Shape>,
    /// Bytes of each node's file, at least; more if a shape needs it.
    pub file_bytes: u64,
    /// The cores to run on: the leader on the first, followers on the others in turn. By default the kernel
    /// chooses.
    pub cores: Option<Vec<usize>>,
    /// What runs as a follower.
    pub followers: FollowerKind,
    /// Ends the measurement with an error soon after it becomes true. For a signal handler.
    pub stop: Option<Arc<AtomicBool>>,
}

impl LimitOptions {
    /// The whole picture, in about 15 seconds.
    pub fn full(dir: impl Into<PathBuf>, nodes: usize) -> Self {
        let pipelined = [Shape::of(64 * KIB, 8), Shape::of(256 * KIB, 4)];
        let alone = [4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB].map(|bytes| Shape::of(bytes, 1));
        let shapes: Vec<_> = alone.into_iter().chain(pipelined).collect();
        Self {
            dir: dir.into(),
            nodes,
            measure: Duration::from_secs(1),
            disk: shapes.clone(),
            replicated: shapes,
            looking: Vec::new(),
            file_bytes: 64 << 20,
            cores: None,
            followers: FollowerKind::ThisExecutable,
            stop: None,
        }
    }

    /// The headline figures, in 2 to 3 seconds. Push a [`Shape`] to `replicated` for the floor of that shape,
    /// which [`LimitReport::replicated`] then finds.
    pub fn short(dir: impl Into<PathBuf>, nodes: usize) -> Self {
        let shapes = vec![Shape::of(4 * KIB, 1), Shape::of(64 * KIB, 8)];
        Self {
            measure: Duration::from_millis(350),
            disk: shapes.clone(),
            replicated: shapes,
            file_bytes: 32 << 20,
            ..Self::full(dir, nodes)
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(matches!(self.nodes, 1 | 3 | 5), "{} nodes: it must be 1, 3 or 5", self.nodes);
        ensure!(!self.measure.is_zero(), "a measurement must take some time");
        for (name, shapes) in [("disk", &self.disk), ("replicated", &self.replicated)] {
            let both = shapes.iter().any(|shape| shape.in_flight == 1)
                && shapes.iter().any(|shape| shape.in_flight > 1);
            ensure!(both, "the {name} shapes lack one with one in flight, or one with several");
        }
        Ok(())
    }

    /// Bytes of each node's file: no two writes in flight ever meet.
    fn file_bytes(&self) -> u64 {
        let shapes = self.disk.iter().chain(&self.replicated).chain(&self.looking);
        let needed = shapes.map(|shape| 2 * replicate::slots(*shape) as u64 * shape.batch_bytes as u64);
        needed.fold(self.file_bytes, u64::max).next_multiple_of(BLOCK_BYTES as u64)
    }
}

/// What [`measure_observed`] tells while it goes on.
#[derive(Clone, Copy, Debug)]
pub enum Moment<'a> {
    /// The replication pattern is about to begin in this shape.
    Begins {
        /// The shape.
        shape: Shape,
        /// The thread that leads: the one that calls.
        leader: u32,
        /// The processes that follow; none of them where followers are threads.
        followers: &'a [u32],
    },
    /// It is over.
    Ended {
        /// Batches committed since it began, those of the warm-up included.
        commits: u64,
    },
}

/// Whoever wants to know the moments of a measurement.
type Observer<'a> = dyn FnMut(Moment<'_>) -> anyhow::Result<()> + Send + 'a;

/// Measures, on a thread of its own, and leaves nothing behind: no file, no process.
///
/// That holds for every return. If the process is killed, its followers die with it and its files, which
/// have no names, are gone; only in the first milliseconds could an empty directory named `ringraft-limit-*`
/// stay. A program that handles signals sets [`LimitOptions::stop`] instead.
pub fn measure(options: &LimitOptions) -> anyhow::Result<LimitReport> {
    measure_observed(options, &mut |_| Ok(()))
}

/// The same, with somebody who is told before and after each shape of the replication pattern, and may make it fail.
pub fn measure_observed(options: &LimitOptions, observer: &mut Observer<'_>) -> anyhow::Result<LimitReport> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("limit-leader".into());
        let leader = thread.spawn_scoped(scope, || lead(options, observer)).context("starting a thread")?;
        leader.join().map_err(|_| anyhow!("the measurement panicked"))?
    })
}

fn lead(options: &LimitOptions, observer: &mut Observer<'_>) -> anyhow::Result<LimitReport> {
    options.check()?;
    let helpers = (options.nodes - 1).max(1);
    let file_bytes = options.file_bytes();
    let file_system = check_file_system(&options.dir, file_bytes * (helpers as u64 + 1))?;
    let ring_mode = ring::probe()?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    if let Some(core) = options.cores.as_deref().and_then(<[usize]>::first) {
        follower::pin(*core)?;
    }
    let usage = match options.followers {
        FollowerKind::ThisExecutable | FollowerKind::Process(_) => Usage::Process,
        FollowerKind::Thread => Usage::Thread,
    };
    let warm_up = (options.measure / 10).min(WARM_UP_MAX);
    let pace = Pace { warm_up, measure: options.measure, stop: options.stop.clone(), usage };

    let scratch = tempfile::Builder::new().prefix("ringraft-limit-").tempdir_in(&options.dir);
    let scratch = scratch.with_context(|| format!("making a directory in {}", options.dir.display()))?;
    let mut file = LogFile::create(scratch.path(), "leader")?;
    let mut followers =
        Follower::start(&options.followers, helpers, scratch.path(), options.cores.as_deref())?;
    // All files are open and have lost their names: from here on even a kill leaves nothing behind.
    scratch.close().context("removing the scratch directory")?;

    let rows = rows(options, &mut file, &mut followers, file_bytes, &pace, observer);
    // A signal that asks to stop may reach the followers first; then their end is not the news.
    pace.check()?;
    Ok(LimitReport::new(options, file_system, ring_mode, cpus, rows?))
}

fn rows(
    options: &LimitOptions,
    file: &mut LogFile,
    followers: &mut [Follower],
    file_bytes: u64,
    pace: &Pace,
    observer: &mut Observer<'_>,
) -> anyhow::Result<Vec<LimitRow>> {
    file.fill(file_bytes)?;
    for follower in followers.iter_mut() {
        let ready = follower.control.ask(&Command::Fill { bytes: file_bytes })?;
        ensure!(matches!(ready, Answer::Ready), "a follower answered out of turn");
        pace.check()?;
    }
    let mut rows = Vec::new();
    for &shape in &options.disk {
        rows.push(LimitRow::new(
            Pattern::Write,
            1,
            shape,
            &replicate::lead(file, &mut [], shape, false, pace)?,
        ));
    }
    let processes: Vec<u32> =
        followers.iter().take(options.nodes - 1).filter_map(Follower::process).collect();
    let leader = rustix::thread::gettid().as_raw_pid().cast_unsigned();
    let mut peers: Vec<&mut Control> = followers.iter_mut().map(|follower| &mut follower.control).collect();
    for (pattern, batch_bytes) in [(Pattern::RoundTrip, ROUND_TRIP_BYTES), (Pattern::Stream, STREAM_BYTES)] {
        let Some(peer) = peers.first_mut() else { bail!("there is no follower") };
        let measured = socket::send_messages(peer, batch_bytes, pattern == Pattern::RoundTrip, pace)?;
        rows.push(LimitRow::new(pattern, 2, Shape { batch_bytes, in_flight: 1 }, &measured));
    }
    peers.truncate(options.nodes - 1);
    let sleeping = options.replicated.iter().map(|shape| (Pattern::Replicate, *shape));
    let looking = options.looking.iter().map(|shape| (Pattern::ReplicateLooking, *shape));
    for (pattern, shape) in sleeping.chain(looking) {
        observer(Moment::Begins { shape, leader, followers: &processes })?;
        let looks = pattern == Pattern::ReplicateLooking;
        let measured = replicate::lead(file, &mut peers, shape, looks, pace)?;
        observer(Moment::Ended { commits: measured.total })?;
        rows.push(LimitRow::new(pattern, options.nodes, shape, &measured));
    }
    Ok(rows)
}

/// How long to measure, and when to stop early.
struct Pace {
    warm_up: Duration,
    measure: Duration,
    stop: Option<Arc<AtomicBool>>,
    usage: Usage,
}

impl Pace {
    fn stopped(&self) -> bool {
        self.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed))
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(!self.stopped(), "the measurement was stopped");
        Ok(())
    }
}

/// Whose processor time counts.
#[derive(Clone, Copy, Debug)]
enum Usage {
    /// The whole process's, its kernel workers included.
    Process,
    /// The calling thread's.
    Thread,
}

impl Usage {
    fn cpu_ns(self) -> u64 {
        let time = rustix::time::clock_gettime(match self {
            Self::Process => ClockId::ProcessCPUTime,
            Self::Thread => ClockId::ThreadCPUTime,
        });
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    }
}

/// Latencies, in nanoseconds.
struct Samples(Histogram<u64>);

impl Samples {
    fn new() -> anyhow::Result<Self> {
        Ok(Self(Histogram::new_with_bounds(1, 60_000_000_000, 3).context("making a histogram")?))
    }

    fn record(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    /// A percentile in microseconds, if there is any sample.
    fn us(&self, percentile: f64) -> Option<f64> {
        (!self.0.is_empty()).then(|| self.0.value_at_percentile(percentile) as f64 / 1e3)
    }
}

/// What a measurement found.
struct Measured {
    samples: Samples,
    /// Operations in `seconds`.
    count: u64,
    /// All of them, those of the warm-up included.
    total: u64,
    seconds: f64,
    /// Processor time per operation, of all nodes.
    cpu_ns_each: f64,
}

/// Measure what this machine can do at best: durable writes, loopback, and both together
///
/// The replication pattern without consensus: a leader sends each batch to its followers and writes it to its
/// own file; each follower writes it durably and acknowledges it; a majority makes a commit. Divide a figure
/// of `ringraft bench` by the figure of the same row to see what the engine costs. Run it while the machine
/// does nothing else.
#[derive(Clone, Debug, clap::Args)]
pub struct LimitArgs {
    /// Directory on the disk to measure; its scratch files vanish with the run
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// Nodes, the leader counted: 1, 3 or 5
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub nodes: usize,
    /// Further shapes of the replication pattern: KiB of a batch, and batches in flight
    #[arg(long, value_name = "KIBxN,...", value_delimiter = ',', value_parser = shape)]
    pub shapes: Vec<Shape>,
    /// The same, among nodes that look for work for 500 µs before they sleep
    #[arg(long, value_name = "KIBxN,...", value_delimiter = ',', value_parser = shape)]
    pub looking: Vec<Shape>,
    /// Seconds for each of the measurements (there are 14, and those of further shapes)
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub duration: f64,
    /// Cores to run on, the leader's first [default: as the kernel chooses]
    #[arg(long, value_name = "CORE,...", value_delimiter = ',')]
    pub cores: Option<Vec<usize>>,
    /// Write the figures as JSON to FILE as well, or only as JSON to the standard output if it is `-`
    #[arg(long, value_name = "FILE|-")]
    pub json: Option<PathBuf>,
}

/// `64x2`: 64 KiB, two in flight.
fn shape(text: &str) -> Result<Shape, String> {
    let parts = text.split_once('x').and_then(|(kib, depth)| Some((kib.parse().ok()?, depth.parse().ok()?)));
    match parts {
        Some((kib @ 1..=65_536, depth @ 1..=32)) => Ok(Shape::of(kib * KIB, depth)),
        _ => Err("it must be KiB of a batch, up to 65536, an x, and up to 32 batches in flight, as in 64x2"
            .to_owned()),
    }
}

/// Runs `ringraft limit`: measures and prints.
pub fn run(args: &LimitArgs) -> anyhow::Result<()> {
    let mut options = LimitOptions::full(&args.dir, args.nodes);
    options.measure = Duration::try_from_secs_f64(args.duration).context("--duration")?;
    options.cores.clone_from(&args.cores);
    options.replicated.extend(&args.shapes);
    options.looking.clone_from(&args.looking);
    let measurements = (options.disk.len() + 2 + options.replicated.len() + options.looking.len()) as f64;
    eprintln!(
        "measuring {} for about {:.0} s; keep the machine idle",
        args.dir.display(),
        measurements * 1.1 * args.duration + 1.0
    );
    let report = measure(&options)?;
    let json = serde_json::to_string_pretty(&report)? + "\n";
    let mut out = std::io::stdout().lock();
    match args.json.as_deref() {
        Some(file) if file == Path::new("-") => out.write_all(json.as_bytes())?,
        Some(file) => {
            std::fs::write(file, json).with_context(|| format!("writing {}", file.display()))?;
            out.write_all(render(&report).as_bytes())?;
        }
        None => out.write_all(render(&report).as_bytes())?,
    }
    Ok(())
}

#[cfg(test)]
mod tests;
