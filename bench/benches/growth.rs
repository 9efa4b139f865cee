//! How cost grows, each axis a table: with 1, 3, 5 nodes; with commands of 16 bytes to 1 MiB; with 1 to 64 Ki commands in flight;
//! and with a log behind it of which nothing is purged. All points of an axis run in every round, one after the other; each figure
//! is the median of the rounds with the least and the greatest, beside its ratio to the first row's of the same round. Keep the
//! machine idle: what else runs on it is in every figure.
//!
//! Before it is measured a cluster writes `--before` of commands, so that its log is in the steady state in which segments are
//! recycled. The last axis has nothing purged instead, and nothing or `--behind-gb` written before; there a follower is also
//! stopped and started again, with the log that it has then. Load comes from a thread of the leader's process.
//!
//! `cargo bench -p ringraft-bench --bench growth -- --axis in-flight,log --behind-gb 10`; `--help` tells the rest. `--raw FILE`
//! appends every figure as a line of JSON, after a line about the machine; `--render FILE` makes the tables again.

use anyhow::{Context as _, ensure};
use clap::{Parser as _, ValueEnum as _};
use ringraft_bench::conducted::{Replicas, STEADY, ensure_room, ringraft};
use ringraft_bench::runs::growth::{
    ALONE_AND_MANY, Axis, NODES, Point, Record, TOOL, in_flight, payloads, tables,
};
use ringraft_bench::runs::work::Work;
use ringraft_bench::runs::{Recorder, RunArgs};
use std::path::Path;
use std::time::Duration;

const RINGRAFT: &str = env!("CARGO_BIN_EXE_ringraft");
/// Nodes where their number does not grow.
const USUAL: usize = 3;
/// Commands of every size fit; a pool of the usual segments is recycled soon.
const OF_ALL_SIZES: [&str; 2] = ["--snapshot-mb", "128"];
const NEVER_PURGED: [&str; 2] = ["--snapshot-mb", "0"];
/// What a log of so many bytes of commands takes on disk: envelopes, tables, checksums and padding come to 2 % of them.
const ON_DISK: f64 = 1.03;
/// What a node's disk holds beside that: segments that are ready, ...
const AHEAD_BYTES: f64 = 1e9;
/// ... and what is written while it is measured, for each second of a figure.
const MEASURED_BYTES_PER_S: f64 = 3e8;
/// The node that is started again.
const FOLLOWER: usize = 2;

#[derive(clap::Parser)]
#[command(about = "How cost grows with nodes, sizes, commands in flight, and the log")]
struct Options {
    #[command(flatten)]
    run: RunArgs,
    /// What is to grow [default: all of them]
    #[arg(long, value_delimiter = ',')]
    axis: Vec<Axis>,
    /// MiB of commands that a cluster writes before it is measured, where its log is purged
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    before: u64,
    /// GB (10^9 bytes) of commands in the log behind it, on each of three nodes
    #[arg(long, value_name = "GB", default_value_t = 2.0)]
    behind_gb: f64,
}

fn main() -> anyhow::Result<()> {
    let mut options = Options::parse();
    if options.axis.is_empty() {
        options.axis = Axis::value_variants().to_vec();
    }
    if !options.run.is_measuring() {
        (options.before, options.behind_gb) = (16, 0.05);
    }
    let backends = options.run.backends.clone();
    options.run.carry_out(TOOL, backends, env!("CARGO_TARGET_TMPDIR"), tables, |dir, recorder| {
        if options.axis.contains(&Axis::Log) {
            has_room(&options, dir)?;
        }
        for round in 1..=options.run.rounds() {
            for side in &options.run.backends {
                for axis in &options.axis {
                    eprintln!("round {round} of {}: {side}, {axis:?}", options.run.rounds());
                    Measuring { options: &options, dir, round, side, axis: *axis, recorder }.run()?;
                }
            }
        }
        Ok(())
    })
}

/// The largest cluster fits on the disk; one is removed before the next is made.
fn has_room(options: &Options, dir: &Path) -> anyhow::Result<()> {
    let gb = options.behind_gb;
    ensure!(gb.is_finite() && gb > 0.0, "--behind-gb must be more than 0");
    let measured = MEASURED_BYTES_PER_S * options.run.span()?.as_secs_f64();
    let needed = USUAL as f64 * (gb * 1e9 * ON_DISK + AHEAD_BYTES + measured);
    ensure_room(dir, needed as u64)
        .with_context(|| format!("--behind-gb {gb} for each of {USUAL} nodes is too much"))
}

/// One axis in one round with one backend.
struct Measuring<'a> {
    options: &'a Options,
    dir: &'a Path,
    round: usize,
    side: &'a str,
    axis: Axis,
    recorder: &'a mut Recorder<Record>,
}

impl Measuring<'_> {
    fn run(&mut self) -> anyhow::Result<()> {
        match self.axis {
            Axis::Nodes => {
                NODES.into_iter().try_for_each(|nodes| self.steady(nodes, &STEADY, &ALONE_AND_MANY))
            }
            Axis::Payload => self.steady(USUAL, &OF_ALL_SIZES, &payloads()),
            Axis::InFlight => self.steady(USUAL, &STEADY, &in_flight()),
            Axis::Log => self.log(),
        }
    }

    /// A cluster whose log is purged and recycled.
    fn steady(&mut self, nodes: usize, flags: &[&str], all: &[Work]) -> anyhow::Result<()> {
        let dir = self.scratch()?;
        let mut replicas = self.start(nodes, flags, dir.path())?;
        replicas.write(self.options.before << 20)?;
        all.iter().try_for_each(|work| self.order(&mut replicas, Point { nodes, work: *work, log_gb: None }))
    }

    /// A cluster that purges nothing, first with no log, then with one.
    fn log(&mut self) -> anyhow::Result<()> {
        let dir = self.scratch()?;
        let mut replicas = self.start(USUAL, &NEVER_PURGED, dir.path())?;
        for log_gb in [0.0, self.options.behind_gb] {
            replicas.write((log_gb * 1e9) as u64)?;
            let restart = replicas.restart(FOLLOWER)?;
            self.recorder.record(Record::Restart {
                round: self.round,
                side: self.side.to_owned(),
                log_gb,
                started_s: restart.started.as_secs_f64(),
                applied_s: restart.applied.as_secs_f64(),
            })?;
            for work in ALONE_AND_MANY {
                self.order(&mut replicas, Point { nodes: USUAL, work, log_gb: Some(log_gb) })?;
            }
        }
        Ok(())
    }

    fn scratch(&self) -> anyhow::Result<tempfile::TempDir> {
        Ok(tempfile::Builder::new().prefix("ringraft-growth-").tempdir_in(self.dir)?)
    }

    fn start(&self, nodes: usize, flags: &[&str], dir: &Path) -> anyhow::Result<Replicas> {
        Replicas::start(&ringraft(RINGRAFT, self.side, false, flags), nodes, dir)
    }

    fn order(&mut self, replicas: &mut Replicas, point: Point) -> anyhow::Result<()> {
        let span: Duration = self.options.run.span()?;
        let figures = replicas.order(point.work, span / 4, span)?.figures;
        self.recorder.record(Record::Commands {
            round: self.round,
            side: self.side.to_owned(),
            axis: self.axis,
            point,
            figures,
            resident_bytes: replicas.resident_bytes()?,
        })
    }
}
