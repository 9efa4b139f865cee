//! What a commit asks of the kernel: system calls per commit by their names, of the leader and of a follower, with one command of
//! 128 bytes in flight, proposed on the core and from a thread, with either backend, beside those of the machine's floor with one
//! batch of 4 KiB. Medians over rounds in which all of them run.
//!
//! Counted are whole processes, their threads that take orders and keep time included, by `perf stat` where this user may and by
//! `strace -c` otherwise; where neither works the program says why and measures nothing. Calls that have no row of their own are
//! among `others`.
//!
//! `cargo bench -p ringraft-bench --bench syscalls`; `--help` tells the rest. `--raw FILE` appends every figure as a line of JSON,
//! after a line about the machine; `--render FILE` makes the table again.

use clap::Parser as _;
use ringraft_bench::conducted::tracer::{Counts, Traced, Tracer, Tracing, finish};
use ringraft_bench::conducted::{Replicas, STEADY, ringraft};
use ringraft_bench::limit::{FollowerKind, LimitOptions, Moment, Shape, measure_observed};
use ringraft_bench::runs::syscalls::{FLOOR, Part, Record, TOOL, tables};
use ringraft_bench::runs::work::Work;
use ringraft_bench::runs::{Recorder, RunArgs};
use std::path::Path;
use std::time::Duration;

const RINGRAFT: &str = env!("CARGO_BIN_EXE_ringraft");
const NODES: usize = 3;
const SMALL: Shape = Shape::of(4 << 10, 1);
const ALONE: Work = Work::from_thread(128, 1);
/// Several times through the pool of segments, which are recycled then.
const BEFORE_BYTES: u64 = 256 << 20;

#[derive(clap::Parser)]
#[command(about = "System calls per commit")]
struct Options {
    #[command(flatten)]
    run: RunArgs,
}

fn main() -> anyhow::Result<()> {
    let run = Options::parse().run;
    let scratch = env!("CARGO_TARGET_TMPDIR");
    if run.render.is_empty()
        && let Err(error) = Tracer::find(run.dir.as_deref().unwrap_or(Path::new(scratch)))
    {
        println!("skipped, as nothing here counts the system calls of other processes: {error:#}");
        return Ok(());
    }
    run.carry_out(TOOL, run.backends.clone(), scratch, tables, |dir, recorder| {
        let dir = tempfile::Builder::new().prefix("ringraft-syscalls-").tempdir_in(dir)?;
        let tracer = Tracer::find(dir.path())?;
        for round in 1..=run.rounds() {
            let mut measuring = Measuring { tracer: &tracer, dir: dir.path(), round, recorder };
            eprintln!("round {round} of {}: the floor", run.rounds());
            measuring.floor(run.span()?)?;
            for backend in &run.backends {
                for on_core in [true, false] {
                    let place = if on_core { "on core" } else { "from a thread" };
                    eprintln!("round {round} of {}: {backend}, {place}", run.rounds());
                    measuring.cluster(backend, on_core, &format!("{backend}, {place}"), run.span()?)?;
                }
            }
        }
        Ok(())
    })
}

/// One round.
struct Measuring<'a> {
    tracer: &'a Tracer,
    dir: &'a Path,
    round: usize,
    recorder: &'a mut Recorder<Record>,
}

impl Measuring<'_> {
    fn floor(&mut self, span: Duration) -> anyhow::Result<()> {
        let mut options = LimitOptions::short(self.dir, NODES);
        options.measure = span;
        options.followers = FollowerKind::Process(RINGRAFT.into());
        let mut tracing = Vec::new();
        measure_observed(&options, &mut |moment| {
            match moment {
                Moment::Begins { shape, leader, followers } if shape == SMALL => {
                    let followers = followers.iter().map(|follower| Traced::Process(*follower));
                    // The leader's thread last: what it starts, such as the other tracers, would count as its own.
                    tracing = self.trace(followers.chain([Traced::Thread(leader)]))?;
                }
                Moment::Ended { commits } if !tracing.is_empty() => {
                    let mut counts = finish(std::mem::take(&mut tracing))?;
                    counts.rotate_right(1);
                    self.keep(FLOOR, commits, counts)?;
                }
                _ => {}
            }
            Ok(())
        })?;
        Ok(())
    }

    fn cluster(&mut self, backend: &str, on_core: bool, side: &str, span: Duration) -> anyhow::Result<()> {
        let dir = tempfile::tempdir_in(self.dir)?;
        let command = ringraft(RINGRAFT, backend, on_core, &STEADY);
        let mut replicas = Replicas::start(&command, NODES, dir.path())?;
        replicas.write(BEFORE_BYTES)?;
        replicas.order(ALONE, Duration::ZERO, span / 4)?;
        let tracing = self.trace(replicas.processes().into_iter().map(Traced::Process))?;
        let commits = replicas.order(ALONE, Duration::ZERO, span)?.entries;
        self.keep(side, commits, finish(tracing)?)
    }

    fn trace(&self, all: impl Iterator<Item = Traced>) -> anyhow::Result<Vec<Tracing>> {
        all.map(|traced| self.tracer.start(traced, self.dir)).collect()
    }

    /// The counts of the leader first, then of the followers.
    fn keep(&mut self, side: &str, commits: u64, counts: Vec<Counts>) -> anyhow::Result<()> {
        let mut followers = Counts::new();
        let mut all = counts.into_iter();
        let leader = all.next().unwrap_or_default();
        for (name, count) in all.flatten() {
            *followers.entry(name).or_default() += count;
        }
        for (part, processes, counts) in [(Part::Leader, 1, leader), (Part::Follower, NODES - 1, followers)] {
            let (side, tracer) = (side.to_owned(), self.tracer.name().to_owned());
            self.recorder.record(Record {
                round: self.round,
                side,
                part,
                processes,
                commits,
                counts,
                tracer,
            })?;
        }
        Ok(())
    }
}
