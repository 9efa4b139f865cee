//! What the project aims at, as a table: ringraft against the machine's floor (`ringraft limit`), and against other programs that
//! take the same orders (`ringraft node --help`, "Driven"). All sides run in every round, one after the other, three processes each,
//! durable on a majority; a ratio is of two figures of one round, and the table has the median of the rounds with the least and the
//! greatest. Keep the machine idle: what else runs on it is in every figure.
//!
//! Before it is measured each side writes `--before` of commands, so that a log that is purged and recycled is in that state;
//! ringraft's segments and snapshots are small enough here that it is several times through its pool by then.
//!
//! `cargo bench -p ringraft-bench --bench goals -- --peer 'raftrs=target/release/raftrs --io sync'`; `--help` tells the rest.
//! `--raw FILE` appends every figure as a line of JSON, after a line about the machine.

mod conducted;

use anyhow::{Context as _, bail};
use clap::Parser as _;
use comfy_table::{Table, presets};
use conducted::{Outcome, Replicas};
use ringraft_bench::limit::{FollowerKind, LimitOptions, LimitReport, Shape, measure};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const KIB: usize = 1 << 10;
const RINGRAFT: &str = env!("CARGO_BIN_EXE_ringraft");
/// So that a run of some seconds goes through all segments several times. The pool has four of them.
const STEADY: [&str; 6] = ["--command-kb", "64", "--segment-mb", "16", "--snapshot-mb", "32"];
const BEFORE_COMMAND_BYTES: usize = 32 * KIB;
const BEFORE_IN_FLIGHT: usize = 16;

#[derive(clap::Parser)]
#[command(about = "The project's goals as a table")]
struct Options {
    /// Rounds; the table has their median
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds that each figure is measured for
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// MiB of commands that each side writes before it is measured
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    before: usize,
    /// Backends of ringraft
    #[arg(long, value_delimiter = ',', default_value = "glommio,uring")]
    backends: Vec<String>,
    /// Another program that takes the neutral driver's orders; several times for several, or for several modes of one
    #[arg(long = "peer", value_name = "NAME=COMMAND")]
    peers: Vec<String>,
    /// Where the data goes: a directory on the disk in question
    #[arg(long, default_value = env!("CARGO_TARGET_TMPDIR"))]
    dir: PathBuf,
    /// Appends every figure to FILE as a line of JSON
    #[arg(long, value_name = "FILE")]
    raw: Option<PathBuf>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// What the commands of a row are like.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, serde::Serialize)]
struct Work {
    payload_bytes: usize,
    in_flight: usize,
    /// Proposed on the leader's core, not from a thread.
    on_core: bool,
}

const fn work(payload_bytes: usize, in_flight: usize) -> Work {
    Work { payload_bytes, in_flight, on_core: false }
}

/// Figures of one side in one round.
#[derive(Clone, Copy, Debug, serde::Serialize)]
struct Figures {
    per_s: f64,
    bytes_per_s: f64,
    p50_us: f64,
    p99_us: f64,
    /// Processor time per command, or per batch of the floor.
    cpu_us: f64,
    cpu_s_per_gb: f64,
}

impl Figures {
    fn of(outcome: &Outcome, payload_bytes: usize) -> Self {
        let said = &outcome.said;
        let cpu_us = outcome.processor.as_secs_f64() * 1e6 / said.entries as f64;
        let per_s = said.entries as f64 / said.secs;
        Self {
            per_s,
            bytes_per_s: per_s * payload_bytes as f64,
            p50_us: said.p50_us,
            p99_us: said.p99_us,
            cpu_us,
            cpu_s_per_gb: cpu_us * 1e3 / payload_bytes as f64,
        }
    }
}

/// What is compared.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Metric {
    PerSecond,
    BytesPerSecond,
    P50,
    P99,
    Cpu,
    CpuPerGb,
}

impl Metric {
    fn of(self, figures: &Figures) -> f64 {
        match self {
            Self::PerSecond => figures.per_s,
            Self::BytesPerSecond => figures.bytes_per_s,
            Self::P50 => figures.p50_us,
            Self::P99 => figures.p99_us,
            Self::Cpu => figures.cpu_us,
            Self::CpuPerGb => figures.cpu_s_per_gb,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::PerSecond => "commits/s",
            Self::BytesPerSecond => "bytes/s",
            Self::P50 => "p50",
            Self::P99 => "p99",
            Self::Cpu => "CPU each",
            Self::CpuPerGb => "CPU per GB",
        }
    }

    fn more_is_better(self) -> bool {
        matches!(self, Self::PerSecond | Self::BytesPerSecond)
    }
}

/// What it is compared with.
#[derive(Clone, Copy)]
enum Against {
    /// The replication pattern without consensus, in this shape.
    Floor(Shape),
    /// The same at whichever depth it moves most bytes.
    FloorBest,
    /// The other program that is best in the same round.
    Peer,
}

/// A ratio that is to be reached.
struct Goal {
    work: Work,
    against: Against,
    metric: Metric,
    required: f64,
    goal: f64,
}

const fn goal(work: Work, against: Against, metric: Metric, required: f64, goal: f64) -> Goal {
    Goal { work, against, metric, required, goal }
}

const ON_CORE: Work = Work { payload_bytes: 128, in_flight: 1, on_core: true };
const SMALL: Shape = Shape::of(4 * KIB, 1);
const LARGE: Shape = Shape::of(64 * KIB, 16);
const BEST: [Shape; 2] = [Shape::of(64 * KIB, 8), Shape::of(256 * KIB, 4)];
const MANY: Work = work(128, 16 * KIB);
const THIRD: f64 = 1.0 / 3.0;

const GOALS: &[Goal] = &[
    goal(ON_CORE, Against::Floor(SMALL), Metric::P50, 1.25, 1.1),
    goal(ON_CORE, Against::Floor(SMALL), Metric::P99, 1.5, 1.5),
    goal(ON_CORE, Against::Floor(SMALL), Metric::Cpu, 1.6, 1.25),
    goal(work(128, 1), Against::Peer, Metric::P50, 0.9, 0.75),
    goal(work(128, 1), Against::Peer, Metric::P99, 0.7, 0.7),
    goal(work(128, 64), Against::Peer, Metric::PerSecond, 2.0, 2.5),
    goal(work(128, 64), Against::Peer, Metric::P99, 0.6, 0.6),
    goal(work(128, 256), Against::Peer, Metric::PerSecond, 2.0, 2.5),
    goal(work(128, 256), Against::Peer, Metric::P99, 0.6, 0.6),
    goal(work(128, KIB), Against::Peer, Metric::PerSecond, 3.0, 4.0),
    goal(work(128, KIB), Against::Peer, Metric::Cpu, THIRD, 0.25),
    goal(MANY, Against::FloorBest, Metric::BytesPerSecond, 0.7, 0.7),
    goal(work(4 * KIB, 256), Against::FloorBest, Metric::BytesPerSecond, 0.8, 0.9),
    goal(work(4 * KIB, 256), Against::Peer, Metric::PerSecond, 2.0, 2.0),
    goal(work(64 * KIB, 16), Against::Floor(LARGE), Metric::BytesPerSecond, 0.85, 0.95),
    goal(work(64 * KIB, 16), Against::Floor(LARGE), Metric::CpuPerGb, 1.6, 1.6),
];

/// Committed commands of 128 bytes per second that are enough, whatever the floor does.
const MANY_PER_SECOND: f64 = 2.5e6;
/// Of one processor, for each node of an idle cluster.
const IDLE_MAX: f64 = 0.005;

/// A program with three replicas.
struct Side {
    name: String,
    command: Vec<String>,
    on_core: bool,
    is_peer: bool,
}

/// One round: the floor, and the figures of each side.
struct Round {
    floor: LimitReport,
    figures: BTreeMap<(String, Work), Figures>,
    /// Of ringraft's sides: processors in use by the whole cluster without work.
    idle: BTreeMap<String, f64>,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let sides = sides(&options)?;
    let mut raw = options.raw.as_ref().map(|path| Raw::open(path)).transpose()?;
    let mut rounds = Vec::new();
    for number in 1..=options.rounds {
        eprintln!("round {number} of {}", options.rounds);
        rounds.push(round(&options, &sides, number, raw.as_mut())?);
    }
    for backend in &options.backends {
        println!("{}", table(backend, &rounds));
    }
    Ok(())
}

fn sides(options: &Options) -> anyhow::Result<Vec<Side>> {
    let mut sides = Vec::new();
    for backend in &options.backends {
        for load in ["core", "thread"] {
            let arguments = [RINGRAFT, "node", "--drive", "--backend", backend, "--load", load];
            let command = arguments.iter().chain(&STEADY).map(ToString::to_string).collect();
            let on_core = load == "core";
            sides.push(Side { name: backend.clone(), command, on_core, is_peer: false });
        }
    }
    for peer in &options.peers {
        let (name, command) =
            peer.split_once('=').with_context(|| format!("{peer}: it must be NAME=COMMAND"))?;
        let command = command.split_whitespace().map(str::to_owned).collect();
        sides.push(Side { name: name.to_owned(), command, on_core: false, is_peer: true });
    }
    Ok(sides)
}

fn round(
    options: &Options,
    sides: &[Side],
    number: usize,
    mut raw: Option<&mut Raw>,
) -> anyhow::Result<Round> {
    let run = Duration::try_from_secs_f64(options.seconds).context("--seconds")?;
    let floor = floor(&options.dir, run)?;
    if let Some(raw) = &mut raw {
        raw.line(&json!({ "round": number, "side": "floor", "floor": floor }))?;
    }
    let mut round = Round { floor, figures: BTreeMap::new(), idle: BTreeMap::new() };
    for side in sides {
        let dir = tempfile::Builder::new().prefix("ringraft-goals-").tempdir_in(&options.dir)?;
        let mut replicas = Replicas::start(&side.command, dir.path())?;
        if !side.is_peer && !side.on_core {
            let idle = idle(&replicas, run)?;
            if let Some(raw) = &mut raw {
                raw.line(&json!({ "round": number, "side": side.name, "idle_processors": idle }))?;
            }
            round.idle.insert(side.name.clone(), idle);
        }
        write_before(&mut replicas, options.before << 20)?;
        for work in work_of(side) {
            let outcome = replicas.order(work.payload_bytes, work.in_flight, run / 4, run)?;
            let figures = Figures::of(&outcome, work.payload_bytes);
            if let Some(raw) = &mut raw {
                raw.line(&json!({ "round": number, "side": side.name, "work": work, "figures": figures }))?;
            }
            round.figures.insert((side.name.clone(), work), figures);
        }
        // Whoever is sent a snapshot does not write the log meanwhile, so the others have the disk for themselves.
        let log = std::fs::read_to_string(dir.path().join("replica-1.log")).unwrap_or_default();
        let sent = log.lines().filter(|line| line.contains("a snapshot is offered")).count();
        if sent > 0 {
            eprintln!(
                "{}: {sent} snapshots were sent to followers that were behind: its figures flatter",
                side.name
            );
        }
    }
    Ok(round)
}

/// The orders that concern a side, each once.
fn work_of(side: &Side) -> Vec<Work> {
    let mut all: Vec<Work> = Vec::new();
    for goal in GOALS {
        let concerns = match side.is_peer {
            true => matches!(goal.against, Against::Peer),
            false => goal.work.on_core == side.on_core,
        };
        if concerns && !all.contains(&goal.work) {
            all.push(goal.work);
        }
    }
    all
}

fn floor(dir: &Path, run: Duration) -> anyhow::Result<LimitReport> {
    let mut options = LimitOptions::short(dir, 3);
    options.measure = run;
    options.replicated = [SMALL, LARGE].into_iter().chain(BEST).collect();
    options.followers = FollowerKind::Process(RINGRAFT.into());
    measure(&options)
}

/// Processors that the replicas use without any command.
fn idle(replicas: &Replicas, run: Duration) -> anyhow::Result<f64> {
    std::thread::sleep(Duration::from_secs(1));
    let (began, before) = (Instant::now(), replicas.processor()?);
    std::thread::sleep(run.max(Duration::from_secs(3)));
    Ok((replicas.processor()? - before).as_secs_f64() / began.elapsed().as_secs_f64())
}

fn write_before(replicas: &mut Replicas, bytes: usize) -> anyhow::Result<()> {
    let mut written = 0;
    while written < bytes {
        let outcome =
            replicas.order(BEFORE_COMMAND_BYTES, BEFORE_IN_FLIGHT, Duration::ZERO, Duration::from_secs(1))?;
        written += outcome.said.entries as usize * BEFORE_COMMAND_BYTES;
    }
    Ok(())
}

impl Round {
    /// The two figures whose ratio a goal is about: this side's, and what it is compared with.
    fn compared(&self, backend: &str, goal: &Goal, peers: &[String]) -> Option<(f64, f64)> {
        let ours = goal.metric.of(self.figures.get(&(backend.to_owned(), goal.work))?);
        let of_floor = |shape| {
            let row = self.floor.replicated(shape)?;
            Some(Figures {
                per_s: row.per_s,
                bytes_per_s: row.bytes_per_s,
                p50_us: row.us_p50?,
                p99_us: row.us_p99?,
                cpu_us: row.cpu_us,
                cpu_s_per_gb: row.cpu_us * 1e3 / shape.batch_bytes as f64,
            })
        };
        let theirs: Vec<f64> = match goal.against {
            Against::Floor(shape) => of_floor(shape).iter().map(|figures| goal.metric.of(figures)).collect(),
            Against::FloorBest => {
                BEST.into_iter().filter_map(of_floor).map(|figures| goal.metric.of(&figures)).collect()
            }
            Against::Peer => {
                let figures = peers.iter().filter_map(|peer| self.figures.get(&(peer.clone(), goal.work)));
                figures.map(|figures| goal.metric.of(figures)).collect()
            }
        };
        let best = match goal.metric.more_is_better() {
            true => theirs.into_iter().max_by(f64::total_cmp),
            false => theirs.into_iter().min_by(f64::total_cmp),
        };
        Some((ours, best?))
    }
}

fn table(backend: &str, rounds: &[Round]) -> Table {
    let mut peers: Vec<String> =
        rounds.iter().flat_map(|round| round.figures.keys().map(|(side, _)| side.clone())).collect();
    peers.retain(|side| !matches!(side.as_str(), "glommio" | "uring"));
    peers.sort_unstable();
    peers.dedup();
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table
        .set_header([backend, "what", "against", "here", "there", "ratio", "spread", "required", "goal", ""]);
    for goal in GOALS {
        let both: Vec<_> = rounds.iter().filter_map(|round| round.compared(backend, goal, &peers)).collect();
        if both.is_empty() {
            continue;
        }
        let ratios: Vec<f64> = both.iter().map(|(ours, theirs)| ours / theirs).collect();
        let median_ratio = median(&ratios);
        let ours = median(&both.iter().map(|(ours, _)| *ours).collect::<Vec<_>>());
        let theirs = median(&both.iter().map(|(_, theirs)| *theirs).collect::<Vec<_>>());
        let is_enough = goal.work == MANY && ours >= MANY_PER_SECOND * MANY.payload_bytes as f64;
        let reaches = |bound| match goal.metric.more_is_better() {
            true => median_ratio >= bound,
            false => median_ratio <= bound,
        };
        table.add_row([
            format!(
                "{} B x {}{}",
                goal.work.payload_bytes,
                goal.work.in_flight,
                match goal.work.on_core {
                    true => ", on core",
                    false => "",
                }
            ),
            goal.metric.name().to_owned(),
            match goal.against {
                Against::Floor(shape) => {
                    format!("floor, {} KiB x {}", shape.batch_bytes / KIB, shape.in_flight)
                }
                Against::FloorBest => "floor, its most".to_owned(),
                Against::Peer => peers.join(" or "),
            },
            number(ours),
            number(theirs),
            format!("{median_ratio:.2}"),
            format!(
                "{:.2} to {:.2}",
                least(&ratios),
                -least(&ratios.iter().map(|ratio| -ratio).collect::<Vec<_>>())
            ),
            format!("{:.2}", goal.required),
            format!("{:.2}", goal.goal),
            match (reaches(goal.goal), reaches(goal.required) || is_enough) {
                (true, _) => "goal",
                (_, true) => "met",
                _ => "missed",
            }
            .to_owned(),
        ]);
    }
    let idle: Vec<f64> = rounds.iter().filter_map(|round| Some(round.idle.get(backend)? / 3.0)).collect();
    if !idle.is_empty() {
        let verdict = if median(&idle) <= IDLE_MAX { "met" } else { "missed" };
        let share = format!("{:.2} %", median(&idle) * 100.0);
        table.add_row(["idle", "CPU per node", "-", &share, "-", "-", "-", "0.50 %", "-", verdict]);
    }
    table
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[count / 2],
        count => f64::midpoint(values[count / 2 - 1], values[count / 2]),
    }
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn number(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{:.2} M", value / 1e6),
        value if value >= 1e4 => format!("{:.1} k", value / 1e3),
        value => format!("{value:.2}"),
    }
}

/// Every figure, a line each.
struct Raw(std::fs::File);

impl Raw {
    fn open(path: &Path) -> anyhow::Result<Self> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        let mut raw = Self(file.with_context(|| format!("opening {}", path.display()))?);
        let commit = std::process::Command::new("git").args(["describe", "--always", "--dirty"]).output();
        let commit = commit.ok().map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        raw.line(&json!({
            "commit": commit,
            "unix_time_s": SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
            "arguments": std::env::args().skip(1).collect::<Vec<_>>(),
            "kernel": rustix::system::uname().release().to_string_lossy(),
            "cpu": cpu.map(|(_, name)| name),
            "cpus": std::thread::available_parallelism().map_or(1, usize::from),
            "load": std::fs::read_to_string("/proc/loadavg").ok(),
        }))?;
        Ok(raw)
    }

    fn line(&mut self, value: &serde_json::Value) -> anyhow::Result<()> {
        if writeln!(self.0, "{value}").is_err() {
            bail!("writing the raw figures");
        }
        Ok(())
    }
}
