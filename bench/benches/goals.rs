//! What the project aims at, as a table: ringraft against the machine's floor (`ringraft limit`), and against other programs that
//! take the same orders (`ringraft node --help`, "Driven"). All sides run in every round, one after the other, three processes each,
//! durable on a majority; a ratio is of two figures of one round, and the table has the median of the rounds with the least and the
//! greatest. Keep the machine idle: what else runs on it is in every figure.
//!
//! Before it is measured each side writes `--before` of commands, so that a log that is purged and recycled is in that state;
//! ringraft's segments and snapshots are small enough here that it is several times through its pool by then.
//!
//! `cargo bench -p ringraft-bench --bench goals -- --peer 'raftrs=DIRECTORY/raftrs --io sync'`; `--help` tells the rest.
//! `--raw FILE` appends every figure as a line of JSON, after a line about the machine; `--render FILE` makes the tables again.

use anyhow::Context as _;
use clap::Parser as _;
use ringraft_bench::conducted::{Replicas, STEADY, ringraft};
use ringraft_bench::limit::{FollowerKind, LimitOptions, LimitRow, measure};
use ringraft_bench::runs::goals::{NODES, Record, TOOL, shapes, tables, work_of};
use ringraft_bench::runs::{Recorder, RunArgs};
use std::path::Path;
use std::time::{Duration, Instant};

const RINGRAFT: &str = env!("CARGO_BIN_EXE_ringraft");

#[derive(clap::Parser)]
#[command(about = "The project's goals as a table")]
struct Options {
    #[command(flatten)]
    run: RunArgs,
    /// MiB of commands that each side writes before it is measured
    #[arg(long, value_name = "MIB", default_value_t = 512)]
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
        for round in 1..=options.run.rounds() {
            eprintln!("round {round} of {}: the floor", options.run.rounds());
            let span = options.run.span()?;
            recorder.record(Record::Floor { round, rows: floor(dir, span)? })?;
            for side in &sides {
                eprintln!("round {round} of {}: {}", options.run.rounds(), side.name);
                measure_side(&options, side, round, dir, recorder)?;
            }
        }
        Ok(())
    })
}

fn sides(options: &Options) -> anyhow::Result<Vec<Side>> {
    let mut sides = Vec::new();
    for backend in &options.run.backends {
        for on_core in [true, false] {
            let command = ringraft(RINGRAFT, backend, on_core, &STEADY);
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

fn measure_side(
    options: &Options,
    side: &Side,
    round: usize,
    dir: &Path,
    recorder: &mut Recorder<Record>,
) -> anyhow::Result<()> {
    let span = options.run.span()?;
    let dir = tempfile::Builder::new().prefix("ringraft-goals-").tempdir_in(dir)?;
    let mut replicas = Replicas::start(&side.command, NODES, dir.path())?;
    if !side.is_peer && !side.on_core {
        let processors = idle(&replicas, span)?;
        recorder.record(Record::Idle { round, side: side.name.clone(), processors })?;
    }
    if options.run.is_measuring() {
        replicas.write(options.before << 20)?;
    }
    for work in work_of(side.is_peer, side.on_core) {
        let figures = replicas.order(work, span / 4, span)?.figures;
        let (side, is_peer) = (side.name.clone(), side.is_peer);
        recorder.record(Record::Commands { round, side, is_peer, work, figures })?;
    }
    // Whoever is sent a snapshot does not write the log meanwhile, so the others have the disk for themselves.
    let sent = replicas.messages().lines().filter(|line| line.contains("a snapshot is offered")).count();
    if sent > 0 {
        eprintln!(
            "{}: {sent} snapshots were sent to followers that were behind: its figures flatter",
            side.name
        );
    }
    Ok(())
}

fn floor(dir: &Path, span: Duration) -> anyhow::Result<Vec<LimitRow>> {
    let mut options = LimitOptions::short(dir, NODES);
    options.measure = span;
    options.replicated = shapes();
    options.followers = FollowerKind::Process(RINGRAFT.into());
    Ok(measure(&options)?.rows)
}

/// Processors that the replicas use without any command.
fn idle(replicas: &Replicas, span: Duration) -> anyhow::Result<f64> {
    std::thread::sleep(Duration::from_secs(1));
    let (began, before) = (Instant::now(), replicas.processor()?);
    std::thread::sleep(span.max(Duration::from_secs(3)));
    Ok((replicas.processor()? - before).as_secs_f64() / began.elapsed().as_secs_f64())
}
