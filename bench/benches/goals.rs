//! What the project aims at, as a table: ringraft against the machine's floor (`ringraft limit`), and against other programs that
//! take the same orders (`ringraft node --help`, "Driven"). The replicas of all sides, three processes each, durable on a majority,
//! are there all the time; in every round each piece of work is done by one side after the other, while those whose turn it is not
//! have nothing to do. A ratio is of two figures of one round, and the table has the median of the rounds with the least and the
//! greatest. Many short rounds tell more than few long ones, since the machine is not the same from one minute to the next. Keep
//! it idle: what else runs on it is in every figure.
//!
//! Before it is measured each side writes `--before` of commands, so that a log that is purged and recycled is in that state:
//! by default ringraft, with segments and snapshots as they are by default, has been through its pool of segments several times by then.
//!
//! `cargo bench -p ringraft-bench --bench goals -- --peer 'raftrs=DIRECTORY/raftrs --io sync'`; `--help` tells the rest.
//! `--raw FILE` appends every figure as a line of JSON, after a line about the machine; `--render FILE` makes the tables again.

use anyhow::Context as _;
use clap::Parser as _;
use ringraft_bench::conducted::{Replicas, STEADY, ensure_room, ringraft};
use ringraft_bench::limit::{FollowerKind, LimitOptions, LimitRow, measure};
use ringraft_bench::runs::goals::{NODES, Record, TOOL, shapes, shapes_looking, tables, work_of};
use ringraft_bench::runs::work::Work;
use ringraft_bench::runs::{Recorder, RunArgs};
use std::path::Path;
use std::time::{Duration, Instant};

const RINGRAFT: &str = env!("CARGO_BIN_EXE_ringraft");

/// What a replica may take on the disk: the log behind the last two snapshots, segments ahead, and what is not purged yet.
const REPLICA_BYTES: u64 = 1 << 30;

#[derive(clap::Parser)]
#[command(about = "The project's goals as a table")]
struct Options {
    #[command(flatten)]
    run: RunArgs,
    /// MiB of commands that each side writes before it is measured
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    before: u64,
    /// Another program that takes the neutral driver's orders; several times for several, or for several modes of one
    #[arg(long = "peer", value_name = "NAME=COMMAND")]
    peers: Vec<String>,
}

/// A program with three replicas.
struct Side {
    name: String,
    command: Vec<String>,
    on_core: bool,
    is_peer: bool,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let sides = sides(&options)?;
    let mut names: Vec<String> = sides.iter().map(|side| side.name.clone()).collect();
    names.dedup();
    options.run.carry_out(TOOL, names, env!("CARGO_TARGET_TMPDIR"), tables, |dir, recorder| {
        if options.run.is_measuring() {
            ensure_room(dir, (sides.len() * NODES) as u64 * REPLICA_BYTES)?;
        }
        let scratch = tempfile::Builder::new().prefix("ringraft-goals-").tempdir_in(dir)?;
        let mut running = Vec::new();
        for (number, side) in sides.into_iter().enumerate() {
            eprintln!("{} starts", side.name);
            running.push(Running::start(&options, side, &scratch.path().join(number.to_string()))?);
        }
        for round in 1..=options.run.rounds() {
            eprintln!("round {round} of {}", options.run.rounds());
            measure_round(&options, round, dir, &mut running, recorder)?;
        }
        Ok(())
    })
}

/// A program whose replicas are there, and do nothing unless it is their turn.
struct Running {
    side: Side,
    replicas: Replicas,
}

impl Running {
    fn start(options: &Options, side: Side, dir: &Path) -> anyhow::Result<Self> {
        let mut replicas = Replicas::start(&side.command, NODES, dir)?;
        if options.run.is_measuring() {
            replicas.write(options.before << 20)?;
        }
        Ok(Self { side, replicas })
    }

    fn works(&self) -> Vec<Work> {
        work_of(self.side.is_peer, self.side.on_core)
    }

    fn take_turn(
        &mut self,
        round: usize,
        work: Work,
        span: Duration,
        recorder: &mut Recorder<Record>,
    ) -> anyhow::Result<()> {
        let before = self.snapshots_sent();
        let figures = self.replicas.order(work, span / 4, span)?.figures;
        let (side, is_peer) = (self.side.name.clone(), self.side.is_peer);
        // Whoever is sent a snapshot does not write the log meanwhile, so the others have the disk for themselves.
        let sent = self.snapshots_sent() - before;
        if sent > 0 {
            eprintln!(
                "round {round}, {side}, {work}: {sent} snapshots were sent to followers that were behind: this figure flatters"
            );
        }
        recorder.record(Record::Commands { round, side, is_peer, work, figures })
    }

    fn snapshots_sent(&self) -> usize {
        self.replicas.messages().lines().filter(|line| line.contains("a snapshot is offered")).count()
    }
}

/// The floor, what all sides use without any command, and each piece of work by one side after the other, so that what is
/// compared lies close together: who else uses this machine changes within seconds.
fn measure_round(
    options: &Options,
    round: usize,
    dir: &Path,
    running: &mut [Running],
    recorder: &mut Recorder<Record>,
) -> anyhow::Result<()> {
    let span = options.run.span()?;
    recorder.record(Record::Floor { round, rows: floor(dir, span)? })?;
    for (side, processors) in idle(running, span)? {
        recorder.record(Record::Idle { round, side, processors })?;
    }
    let mut works: Vec<Work> = Vec::new();
    for work in running.iter().flat_map(Running::works) {
        if !works.contains(&work) {
            works.push(work);
        }
    }
    let mut chance = Chance(round as u64);
    for work in works {
        let mut turns: Vec<&mut Running> =
            running.iter_mut().filter(|running| running.works().contains(&work)).collect();
        // What somebody leaves behind, as segments to be filled, should not always be in the way of the same one.
        while !turns.is_empty() {
            let next = turns.swap_remove(chance.below(turns.len()));
            next.take_turn(round, work, span, recorder)?;
        }
    }
    Ok(())
}

/// Numbers by chance, the same in every run: splitmix64.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % bound as u64) as usize
    }
}

fn sides(options: &Options) -> anyhow::Result<Vec<Side>> {
    let mut sides = Vec::new();
    // Who only shows that it works need not fill large segments.
    let more: &[&str] = if options.run.is_measuring() { &[] } else { &STEADY };
    for backend in &options.run.backends {
        for on_core in [true, false] {
            let command = ringraft(RINGRAFT, backend, on_core, more);
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

fn floor(dir: &Path, span: Duration) -> anyhow::Result<Vec<LimitRow>> {
    let mut options = LimitOptions::short(dir, NODES);
    options.measure = span;
    options.replicated = shapes();
    options.looking = shapes_looking();
    options.followers = FollowerKind::Process(RINGRAFT.into());
    Ok(measure(&options)?.rows)
}

/// Processors that the replicas of each of ringraft's backends use without any command, of which there is none anywhere.
fn idle(running: &[Running], span: Duration) -> anyhow::Result<Vec<(String, f64)>> {
    let asked = || running.iter().filter(|running| !running.side.is_peer && !running.side.on_core);
    let used = || asked().map(|running| running.replicas.processor()).collect::<anyhow::Result<Vec<_>>>();
    std::thread::sleep(Duration::from_secs(1));
    let (began, before) = (Instant::now(), used()?);
    std::thread::sleep(span.max(Duration::from_secs(3)));
    let (after, seconds) = (used()?, began.elapsed().as_secs_f64());
    let processors =
        before.iter().zip(after).map(|(before, after)| (after - *before).as_secs_f64() / seconds);
    Ok(asked().map(|running| running.side.name.clone()).zip(processors).collect())
}
