//! Runs the simulator: a range of seeds, or one seed with its trace.

use anyhow::{Context, bail};
use clap::Parser;
use ringraft::mutants::{self, Mutant};
use ringraft_tests::sim::cluster::Engine;
use ringraft_tests::sim::range::{Summary, run_range};
use ringraft_tests::sim::world::{Options, Report};
use std::ops::Range;
use std::process::ExitCode;

/// Runs real nodes on a simulated disk, network and clock. A seed is a run: the same seed gives the same events.
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
    #[arg(long, default_value_t = 64)]
    image_check_every: u64,
    /// Whether disks fail, run full, write short and rot, instead of what the seed decides
    #[arg(long)]
    disk_faults: Option<bool>,
    /// Whether writes of killed processes may arrive late, instead of what the seed decides
    #[arg(long)]
    late_writes: Option<bool>,
    /// Threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Put a known bug back, and report the seed that notices: succeeds if one does
    #[arg(long)]
    mutant: Option<String>,
    /// End with one line of JSON
    #[arg(long)]
    json: bool,
}

fn parse_range(text: &str) -> Result<Range<u64>, String> {
    let (start, end) = text.split_once("..").ok_or("a range has the form A..B")?;
    let number = |text: &str| text.parse().map_err(|error| format!("{text:?}: {error}"));
    let range = number(start)?..number(end)?;
    if range.is_empty() { Err("the range is empty".to_owned()) } else { Ok(range) }
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let mutant = arguments.mutant.as_deref().map(mutant_of).transpose()?;
    let seeds = match (arguments.seed, arguments.seeds) {
        (Some(seed), _) => seed..seed.checked_add(1).context("the last seed there is cannot be run")?,
        (None, Some(seeds)) => seeds,
        (None, None) => 0..200,
    };
    let options = Options {
        nodes: arguments.nodes,
        steps: arguments.steps,
        trace: arguments.trace,
        image_check_every: arguments.image_check_every,
        disk_faults: arguments.disk_faults,
        late_writes: arguments.late_writes,
        ..Options::default()
    };
    let make = || {
        mutants::set(mutant);
        Engine
    };
    let threads = if arguments.trace { 1 } else { arguments.threads.max(1) };
    let progress = |runs: u64| {
        if runs.is_multiple_of(100) {
            eprintln!("{runs} runs");
        }
    };
    let summary = run_range(make, seeds.clone(), &options, threads, progress);
    print(&summary);
    if arguments.json {
        println!("{}", json(&summary));
    }
    let missing = summary.missing();
    let good = match (mutant, &summary.failure) {
        (Some(mutant), Some(report)) => {
            println!("{mutant:?} was caught by seed {} after {} runs", report.seed, summary.runs);
            true
        }
        (Some(mutant), None) => {
            println!("{mutant:?} was NOT caught by seeds {seeds:?}");
            false
        }
        (None, Some(_)) => false,
        (None, None) if !missing.is_empty() => {
            let names: Vec<_> = missing.iter().map(|mark| mark.name()).collect();
            println!("the range never came by: {}", names.join(", "));
            false
        }
        (None, None) => true,
    };
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn mutant_of(name: &str) -> anyhow::Result<Mutant> {
    let plain = |text: &str| text.replace(['-', '_'], "").to_lowercase();
    let found = Mutant::ALL.into_iter().find(|mutant| plain(&format!("{mutant:?}")) == plain(name));
    match found {
        Some(mutant) => Ok(mutant),
        None => bail!("no mutant is called {name}; there are {:?}", Mutant::ALL),
    }
}

fn print(summary: &Summary) {
    if let Some(report) = &summary.failure {
        print_failure(report);
    }
    println!(
        "{} runs, {} events, {} events/s, trace hash {:016x}",
        summary.runs,
        summary.events,
        summary.events_per_s(),
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
    serde_json::json!({
        "runs": summary.runs,
        "events": summary.events,
        "events_per_s": summary.events_per_s(),
        "trace_hash": format!("{:016x}", summary.hash),
        "coverage": coverage,
        "failure": failure,
    })
}
