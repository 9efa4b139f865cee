//! Faults of disks: every crash image of the log's writes, a fault at every operation, damage in a cluster.

use clap::{Parser, Subcommand};
use ringraft_tests::faults::threads::{Tally, VIOLATIONS_TOLD_MAX};
use ringraft_tests::faults::{damage, errors, images, reverts};
use std::ops::Range;
use std::process::ExitCode;
use std::time::Instant;

/// Breaks disks in every way there is, and looks whether the log and the cluster keep their promises.
#[derive(Parser)]
#[command(name = "faults")]
struct Arguments {
    #[command(subcommand)]
    mode: Mode,
    /// Threads
    #[arg(long, global = true, default_value_t = 2)]
    threads: usize,
    /// End with one line of JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Mode {
    /// Every subset of what a power cut may take or leave, at every moment of appends, rollovers, cuts, saves and starts
    Images {
        /// Only scenarios whose name contains this
        #[arg(long)]
        only: Option<String>,
        /// Seed of the disk's latencies
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// At most so many images of any moment
        #[arg(long)]
        count: Option<u64>,
        /// A control that must fail: after so many writes one is told to be durable and never arrives
        #[arg(long)]
        lose_write: Option<u64>,
    },
    /// Sectors at rest that revert to what a former life of their segment left there, in every combination of neighbours
    Reverts {
        /// Logs, the second number exclusive
        #[arg(long, value_parser = parse_range, default_value = "0..20")]
        seeds: Range<u64>,
    },
    /// EIO, ENOSPC, short writes and reads, and stalls at every operation of a run of the log
    Errors {
        /// Runs, the second number exclusive
        #[arg(long, value_parser = parse_range, default_value = "0..1")]
        seeds: Range<u64>,
        /// Strike every so-manyth operation only
        #[arg(long, default_value_t = 1)]
        every: u64,
        /// One operation of one life of the run, with its trace: LIFE:OPERATION
        #[arg(long, value_parser = parse_pair)]
        only: Option<(u64, u64)>,
    },
    /// Random damage to the disks of a cluster of three
    Damage {
        /// Patterns, the second number exclusive
        #[arg(long, value_parser = parse_range, conflicts_with_all = ["seed", "count"])]
        seeds: Option<Range<u64>>,
        /// So many patterns
        #[arg(long, default_value_t = 20_000, conflicts_with = "seed")]
        count: u64,
        /// One pattern
        #[arg(long)]
        seed: Option<u64>,
        /// Print every event
        #[arg(long, requires = "seed")]
        trace: bool,
    },
}

fn parse_range(text: &str) -> Result<Range<u64>, String> {
    let (start, end) = text.split_once("..").ok_or("a range has the form A..B")?;
    let number = |text: &str| text.parse().map_err(|error| format!("{text:?}: {error}"));
    let range = number(start)?..number(end)?;
    if range.is_empty() { Err("the range is empty".to_owned()) } else { Ok(range) }
}

fn parse_pair(text: &str) -> Result<(u64, u64), String> {
    let (life, operation) = text.split_once(':').ok_or("an operation has the form LIFE:OPERATION")?;
    let number = |text: &str| text.parse().map_err(|error| format!("{text:?}: {error}"));
    Ok((number(life)?, number(operation)?))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let threads = arguments.threads.max(1);
    let start = Instant::now();
    let mut counts = serde_json::Map::new();
    let (unit, tally) = match arguments.mode {
        Mode::Images { only, seed, count, lose_write } => {
            let options = images::Options {
                seed,
                threads,
                images_max: count.unwrap_or(u64::MAX),
                lost_write: lose_write,
                ..images::Options::default()
            };
            ("images", run_images(&options, only.as_deref()))
        }
        Mode::Reverts { seeds } => {
            let mut tally = Tally::default();
            seeds.for_each(|seed| tally.merge(reverts::run(seed)));
            ("reverts", tally)
        }
        Mode::Errors { seeds, every, only } => {
            let options = errors::Options { seeds, every: every.max(1), only, threads };
            let report = errors::run(&options);
            eprintln!("{} operations of runs without faults", report.operations);
            counts.insert("operations".to_owned(), report.operations.into());
            ("injected", report.tally)
        }
        Mode::Damage { seeds, count, seed, trace } => {
            let seeds = match seed {
                Some(seed) => seed..seed + 1,
                None => seeds.unwrap_or(0..count),
            };
            let options = damage::Options { seeds, trace, threads: if trace { 1 } else { threads } };
            let report = damage::run(&options, |bases| {
                if bases.is_multiple_of(50) {
                    eprintln!("{bases} histories");
                }
            });
            eprintln!(
                "in {} of the patterns some batch had no copy left, in {} it could not be told whether there was one more",
                report.gone, report.undecided
            );
            counts.insert("no_copy_left".to_owned(), report.gone.into());
            counts.insert("undecided".to_owned(), report.undecided.into());
            ("patterns", report.tally)
        }
    };
    for violation in tally.violations.iter().take(VIOLATIONS_TOLD_MAX) {
        println!("VIOLATION: {violation}");
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{} {unit} in {seconds:.1} s, {} violations", tally.cases, tally.violations.len());
    if arguments.json {
        counts.insert(unit.to_owned(), tally.cases.into());
        counts.insert("violations".to_owned(), tally.violations.len().into());
        counts.insert("seconds".to_owned(), seconds.into());
        println!("{}", serde_json::Value::Object(counts));
    }
    if tally.violations.is_empty() && tally.cases > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_images(options: &images::Options, only: Option<&str>) -> Tally {
    let mut last = Instant::now();
    let reports = images::run(options, only, |report| {
        let seconds = last.elapsed().as_secs_f64();
        last = Instant::now();
        let images = report.tally.cases;
        let violations = report.tally.violations.len();
        let speed = images as f64 / seconds;
        eprintln!("{:<36} {images:>9} images {speed:>8.0}/s {violations} violations", report.scenario);
    });
    let mut sum = Tally::default();
    for report in reports {
        sum.merge(report.tally);
    }
    sum
}
