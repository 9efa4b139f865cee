//! Runs the simulator: a range of seeds, one seed with its trace, or the known bugs put back one by one.

use anyhow::{Context, bail};
use clap::Parser;
use ringraft_tests::sim::cluster::Engine;
use ringraft_tests::sim::mutants::{Bug, hunt, seeds_median, table};
use ringraft_tests::sim::range::{Summary, run_range};
use ringraft_tests::sim::shrink::shrink;
use ringraft_tests::sim::world::{Keep, Options, Report};
use std::collections::BTreeSet;
use std::ops::Range;
use std::process::ExitCode;

/// Runs real nodes on a simulated disk, network and clock. A seed is a run: the same seed gives the same events.
///
/// An event is a delivered chunk of bytes, an I/O completion, a timer or a client's call. Fails if a run does, or if the
/// range never came by a fault that one of its size must.
#[derive(Parser)]
#[command(name = "simulate")]
struct Arguments {
    /// Seeds to run, the second exclusive: 0..1000
    #[arg(long, value_parser = parse_range, conflicts_with = "seed")]
    seeds: Option<Range<u64>>,
    /// One seed
    #[arg(long)]
    seed: Option<u64>,
    /// Print every event
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Nodes, instead of a number that the seed decides
    #[arg(long)]
    nodes: Option<usize>,
    /// Steps of the phase with faults
    #[arg(long, default_value_t = 20_000)]
    steps: u64,
    /// Check one in so many advances of the commit index against recovered disk images; 0 for none
    #[arg(long, default_value_t = Options::default().image_check_every)]
    image_check_every: u64,
    /// Check after about one in so many turns that leave nothing to do that another one does nothing; 0 for none
    #[arg(long, default_value_t = Options::default().rest_check_every)]
    rest_check_every: u64,
    /// Have every turn look at everything: the hashes must be the same
    #[arg(long)]
    whole_turns: bool,
    /// Whether disks fail, run full, write short and rot, instead of what the seed decides
    #[arg(long)]
    disk_faults: Option<bool>,
    /// Whether writes of killed processes may arrive late, instead of what the seed decides
    #[arg(long)]
    late_writes: Option<bool>,
    /// Whether members join and leave, where disks do not fail, instead of what the seed decides
    #[arg(long)]
    changes: Option<bool>,
    /// Of the troubles, only those of these numbers, as a shrunk run names them: 3,17 or none
    #[arg(long, requires = "seed", value_parser = parse_troubles)]
    troubles: Option<BTreeSet<u64>>,
    /// Of the calls in the phase with faults, only these, as a shrunk run names them: 0:12,3:1 or none
    #[arg(long, requires = "seed", value_parser = parse_calls)]
    calls: Option<BTreeSet<(usize, usize)>>,
    /// Threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Put a known bug back, and report the seed that notices: succeeds if one does. A bug of the membership, or of what becomes
    /// of damaged logs, is looked for where members change, or disks fail, unless it was decided otherwise
    #[arg(long)]
    mutant: Option<String>,
    /// Put each known bug back, one at a time, and tell how many seeds it takes to notice: succeeds if all are noticed
    #[arg(long, conflicts_with_all = ["mutant", "seed"])]
    mutants: bool,
    /// Seeds to run with a known bug before it counts as not noticed
    #[arg(long, default_value_t = 4_000)]
    mutant_seeds_max: u64,
    /// Runs to spend on making a failing run smaller; by default 200, and none for a bug that was put back
    #[arg(long)]
    shrink: Option<u64>,
    /// End with one line of JSON
    #[arg(long)]
    json: bool,
}

fn parse_range(text: &str) -> Result<Range<u64>, String> {
    let (start, end) = text.split_once("..").ok_or("a range has the form A..B")?;
    let range = number(start)?..number(end)?;
    if range.is_empty() { Err("the range is empty".to_owned()) } else { Ok(range) }
}

fn number<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error| format!("{text:?}: {error}"))
}

fn parse_troubles(text: &str) -> Result<BTreeSet<u64>, String> {
    items(text).map(number).collect()
}

fn parse_calls(text: &str) -> Result<BTreeSet<(usize, usize)>, String> {
    let call = |text: &str| {
        let (client, sequence) = text.split_once(':').ok_or("a call has the form CLIENT:SEQUENCE")?;
        Ok((number(client)?, number(sequence)?))
    };
    items(text).map(call).collect()
}

fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').filter(|item| !item.is_empty() && *item != "none")
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    keep_freed_memory();
    let options = Options {
        nodes: arguments.nodes,
        steps: arguments.steps,
        trace: arguments.trace,
        image_check_every: arguments.image_check_every,
        rest_check_every: arguments.rest_check_every,
        whole_turns: arguments.whole_turns,
        disk_faults: arguments.disk_faults,
        late_writes: arguments.late_writes,
        changes: arguments.changes,
        keep: Keep { troubles: arguments.troubles.clone(), calls: arguments.calls.clone() },
        list_calls: false,
    };
    if arguments.mutants { run_mutants(&arguments, &options) } else { run_seeds(&arguments, &options) }
}

/// Disks and buffers come and go in pieces of megabytes. Handing them back to the system and faulting them in again is a
/// fifth of the time.
fn keep_freed_memory() {
    // SAFETY: sets three numbers of the allocator, before there are other threads.
    unsafe {
        // The most that is taken.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TOP_PAD, 16 << 20);
    }
}

fn run_seeds(arguments: &Arguments, options: &Options) -> anyhow::Result<ExitCode> {
    let bug = match arguments.mutant.as_deref() {
        Some(name) => match Bug::named(name) {
            Some(bug) => Some(bug),
            None => {
                let names: Vec<_> = Bug::all().iter().map(Bug::to_string).collect();
                bail!("no bug is called {name}; there are {}", names.join(", "));
            }
        },
        None => None,
    };
    let options = &bug.map_or_else(|| options.clone(), |bug| bug.options(options));
    let seeds = match (arguments.seed, arguments.seeds.clone()) {
        (Some(seed), _) => seed..seed.checked_add(1).context("the last seed there is cannot be run")?,
        (None, Some(seeds)) => seeds,
        (None, None) if bug.is_some() => 0..arguments.mutant_seeds_max,
        (None, None) => 0..200,
    };
    let make = || {
        Bug::set(bug);
        Engine
    };
    let threads = if options.trace { 1 } else { arguments.threads.max(1) };
    let progress = |runs: u64| {
        if runs.is_multiple_of(100) {
            eprintln!("{runs} runs");
        }
    };
    let summary = run_range(make, seeds.clone(), options, threads, progress);
    print(&summary);
    let shrink_runs = arguments.shrink.unwrap_or(if bug.is_some() || options.trace { 0 } else { 200 });
    if let Some(report) = summary.failure.as_ref().filter(|_| shrink_runs > 0)
        && let Some(shrunk) = shrink(&make(), options, report, shrink_runs)
    {
        println!("{}", shrunk.describe());
    }
    let missing = if arguments.seed.is_some() { Vec::new() } else { summary.missing() };
    let good = match (bug, &summary.failure) {
        (Some(bug), Some(report)) => {
            println!("{bug} was noticed by seed {} after {} runs", report.seed, summary.runs);
            true
        }
        (Some(bug), None) => {
            println!("{bug} was NOT noticed by seeds {seeds:?}");
            false
        }
        (None, Some(_)) => false,
        (None, None) if !missing.is_empty() => {
            let names: Vec<_> = missing.iter().map(|mark| mark.name()).collect();
            println!("the range never came by: {}", names.join(", "));
            false
        }
        (None, None) if arguments.seed.is_none() && summary.is_undecided_too_often() => {
            println!("too many runs ended undecided");
            false
        }
        (None, None) => true,
    };
    if arguments.json {
        println!("{}", json(&summary));
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run_mutants(arguments: &Arguments, options: &Options) -> anyhow::Result<ExitCode> {
    let bugs = Bug::all();
    let all = hunt(
        Engine::default,
        &bugs,
        arguments.mutant_seeds_max,
        options,
        arguments.threads.max(1),
        |caught| {
            let seeds = caught.by.as_ref().map_or_else(|| "not noticed".to_owned(), |by| by.0.to_string());
            eprintln!("{}: {seeds}", caught.bug);
        },
    );
    let caught = all.iter().filter(|caught| caught.by.is_some()).count();
    let median = seeds_median(&all);
    print!("{}", table(&all));
    let of_seeds = median.map_or_else(|| "none".to_owned(), |median| median.to_string());
    println!("{caught} of {} noticed; median of the seeds: {of_seeds}", all.len());
    if arguments.json {
        let each: serde_json::Map<_, _> = all
            .iter()
            .map(|caught| (caught.bug.to_string(), caught.by.as_ref().map(|by| by.0).into()))
            .collect();
        let line = serde_json::json!({
            "mutants": all.len(), "caught": caught, "seeds_median": median, "seeds": each,
        });
        println!("{line}");
    }
    Ok(if caught == all.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(summary: &Summary) {
    if let Some(report) = &summary.failure {
        print_failure(report);
    }
    println!(
        "{} runs, {} events, {} events/s, {} events/s of processor time, trace hash {:016x}",
        summary.runs,
        summary.events,
        summary.events_per_s(),
        summary.events_per_core_s(),
        summary.hash
    );
    println!("{}", summary.coverage.table());
}

fn print_failure(report: &Report) {
    let Some(failure) = &report.failure else { return };
    println!("{}", failure.tail);
    println!(
        "seed {} failed at step {}, {:.6} s of virtual time:\n{}",
        report.seed,
        failure.step,
        report.virtual_ns as f64 / 1e9,
        failure.message
    );
    println!("again, with all events: simulate --seed {} --trace\n", report.seed);
}

fn json(summary: &Summary) -> serde_json::Value {
    let coverage: serde_json::Map<_, _> =
        summary.coverage.entries().map(|(name, count)| (name.to_owned(), count.into())).collect();
    let failure = summary.failure.as_ref().and_then(|report| {
        let failure = report.failure.as_ref()?;
        Some(serde_json::json!({ "seed": report.seed, "step": failure.step, "message": failure.message }))
    });
    let missing: Vec<_> = summary.missing().iter().map(|mark| mark.name()).collect();
    serde_json::json!({
        "runs": summary.runs,
        "events": summary.events,
        "events_per_s": summary.events_per_s(),
        "events_per_core_s": summary.events_per_core_s(),
        "trace_hash": format!("{:016x}", summary.hash),
        "coverage": coverage,
        "missing": missing,
        "failure": failure,
    })
}
