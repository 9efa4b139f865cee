//! Cuts the power of a cluster again and again, and checks that nothing acknowledged is lost. Needs root.

use anyhow::{Context, Result};
use clap::Parser;
use ringraft::runtime::Backend;
use ringraft_tests::powercut::direct::member::{self, Failure};
use ringraft_tests::powercut::direct::rig::DirectRig;
use ringraft_tests::powercut::disk::Survived;
use ringraft_tests::powercut::mounts::{self, FsKind};
use ringraft_tests::powercut::rig::Rig;
use ringraft_tests::powercut::server;
use ringraft_tests::powercut::trial::{self, Fault, Machine, Report, Verdict};
use ringraft_tests::process::{NodeArgs, Program};
use std::path::PathBuf;
use std::process::ExitCode;

#[path = "testnode.rs"]
#[expect(dead_code, reason = "its main function; this program is a member when its first argument says so")]
mod testnode;

/// The first argument of this program as a member.
const MEMBER: &str = "member";

/// Cuts the power of a three-node cluster under load, lets the kernel replay its journal, starts the nodes again and
/// checks that nothing acknowledged is lost. Exit status 0 means: no violation, or with --sabotage, that one was seen.
#[derive(Parser)]
#[command(name = "powercut")]
struct Arguments {
    /// What is under the nodes
    #[arg(long, value_enum, default_value = "ext4")]
    fs: Under,
    /// What runs the members' cores
    #[arg(long, value_enum, default_value = "glommio")]
    backend: On,
    /// How many trials
    #[arg(long, default_value_t = 50)]
    trials: u64,
    /// Seed of the first trial; the next has the next
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What happens to the disk before its power is cut
    #[arg(long, value_enum, default_value = "none", conflicts_with = "sabotage")]
    fault: Fault,
    /// No power cut: the disk of one member fails like this, directly under it
    #[arg(long, value_enum, conflicts_with_all = ["sabotage", "fault", "fs"])]
    member: Option<Failure>,
    /// The control: a disk that acknowledges flushes and does nothing. Succeeds if acknowledged commands are lost
    #[arg(long)]
    sabotage: bool,
    /// Only the line of JSON at the end
    #[arg(long)]
    json: bool,
    /// Succeed on a machine that cannot cut power, and say why it cannot
    #[arg(long)]
    or_skip: bool,
    /// Where mount points are made; a directory of the build by default
    #[arg(long)]
    dir: Option<PathBuf>,
}

/// What runs a member's core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum On {
    /// glommio
    Glommio,
    /// A ring of its own
    Uring,
}

impl From<On> for Backend {
    fn from(on: On) -> Self {
        match on {
            On::Glommio => Self::Glommio,
            On::Uring => Self::Uring,
        }
    }
}

/// What is between the nodes and the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Under {
    /// ext4 on a loop device
    Ext4,
    /// XFS on a loop device
    Xfs,
    /// Nothing: files and names themselves are lost and torn
    Direct,
}

impl Under {
    fn kind(self) -> Option<FsKind> {
        match self {
            Self::Ext4 => Some(FsKind::Ext4),
            Self::Xfs => Some(FsKind::Xfs),
            Self::Direct => None,
        }
    }

    fn name(self) -> &'static str {
        self.kind().map_or("direct", FsKind::name)
    }
}

fn main() -> Result<ExitCode> {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some(server::SERVE) => server::serve(args).map(|()| ExitCode::SUCCESS),
        Some(server::SERVE_DIRECTORY) => server::serve_directory(args).map(|()| ExitCode::SUCCESS),
        Some(MEMBER) => testnode::run(&NodeArgs::parse(args)?).map(|()| ExitCode::SUCCESS),
        _ => cut(&Arguments::parse()),
    }
}

fn cut(arguments: &Arguments) -> Result<ExitCode> {
    let under = if arguments.member.is_some() { Under::Direct } else { arguments.fs };
    if !mounts::available(under.kind()) {
        return Ok(if arguments.or_skip { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let this = std::env::current_exe()?;
    let beside = this.parent().and_then(|profile| profile.parent()).map(|target| target.join("tmp"));
    let parent = arguments.dir.clone().or(beside).context("give a directory with --dir")?;
    let program = Program { path: this.clone(), leading: vec![MEMBER.to_owned()] };
    match (arguments.member, under.kind()) {
        (Some(failure), _) => fail_members(arguments, DirectRig::new(&this, &parent)?, &program, failure),
        (None, None) => cut_power(arguments, DirectRig::new(&this, &parent)?, &program),
        (None, Some(kind)) => cut_power(arguments, Rig::new(&this, kind, &parent)?, &program),
    }
}

fn seeds(arguments: &Arguments) -> Result<impl Iterator<Item = u64> + use<>> {
    Ok((arguments.seed..).take(usize::try_from(arguments.trials)?))
}

fn cut_power(arguments: &Arguments, mut rig: impl Machine, program: &Program) -> Result<ExitCode> {
    let fault = if arguments.sabotage { Fault::Lie } else { arguments.fault };
    let mut sum = Sum::default();
    for seed in seeds(arguments)? {
        let report = trial::run(&mut rig, program, arguments.backend.into(), fault, seed)?;
        if !arguments.json {
            print(&report);
        }
        sum.add(&report);
    }
    drop(rig);
    println!("{}", sum.json(arguments, fault));
    Ok(if sum.good(fault) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn fail_members(
    arguments: &Arguments,
    mut rig: DirectRig,
    program: &Program,
    failure: Failure,
) -> Result<ExitCode> {
    let (mut wrong, mut acked, mut leaders, mut died, mut seconds) = (Vec::new(), 0, 0, 0, 0.0);
    let (mut not_run, mut never_run) = (0, Vec::new());
    for seed in seeds(arguments)? {
        let report = member::run(&mut rig, program, arguments.backend.into(), failure, seed)?;
        if !arguments.json {
            println!("{report:?}");
        }
        acked += report.acked;
        leaders += u64::from(report.was_leader);
        died += u64::from(report.died.is_some());
        seconds += report.took.as_secs_f64();
        not_run += report.attempts - 1;
        never_run.extend((!report.exercised).then_some(seed));
        wrong.extend(report.wrong.map(|wrong| format!("seed {seed}: {wrong}")));
    }
    drop(rig);
    let json = serde_json::json!({
        "member": format!("{failure:?}"),
        "seed": arguments.seed,
        "trials": arguments.trials,
        "not_run": not_run,
        "never_run": never_run,
        "violations": wrong.len(),
        "acknowledged": acked,
        "leaders": leaders,
        "died": died,
        "seconds": (seconds * 10.0).round() / 10.0,
        "wrong": wrong,
    });
    println!("{json}");
    Ok(if wrong.is_empty() && never_run.is_empty() && acked > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn print(report: &Report) {
    let Report { seed, moments, acked, writes, flushes, refused, exercised, attempts, .. } = report;
    let Survived { kept, torn, lost } = report.survived;
    let met = if *exercised { "met" } else { "not met" };
    println!(
        "seed {seed}: cut {moments:?}, {acked} acknowledged, {writes} writes, {flushes} flushes, {refused} refused; \
         unflushed writes: {kept} kept, {torn} torn, {lost} lost; fault {met} in attempt {attempts}; {:.1} s: {:?}",
        report.took.as_secs_f64(),
        report.verdict
    );
}

#[derive(Default)]
struct Sum {
    trials: u64,
    cuts: u64,
    acked: u64,
    writes: u64,
    flushes: u64,
    survived: Survived,
    seconds: f64,
    lost: Vec<String>,
    broken: Vec<String>,
    no_file_system: Vec<String>,
    /// Trials that did not meet their fault, and were made again with another seed.
    not_run: u64,
    /// Those that did not meet it in any attempt.
    never_run: Vec<u64>,
}

impl Sum {
    fn add(&mut self, report: &Report) {
        self.trials += 1;
        self.cuts += report.moments.len() as u64;
        self.acked += report.acked as u64;
        self.writes += report.writes;
        self.flushes += report.flushes;
        self.survived.kept += report.survived.kept;
        self.survived.torn += report.survived.torn;
        self.survived.lost += report.survived.lost;
        self.seconds += report.took.as_secs_f64();
        self.not_run += report.attempts - 1;
        self.never_run.extend((!report.exercised).then_some(report.seed));
        let named = |text: &String| format!("seed {}: {text}", report.seed);
        match &report.verdict {
            Verdict::Sound => {}
            Verdict::Lost(text) => self.lost.push(named(text)),
            Verdict::Broken(text) => self.broken.push(named(text)),
            Verdict::NoFileSystem(text) => self.no_file_system.push(named(text)),
        }
    }

    fn good(&self, fault: Fault) -> bool {
        if fault == Fault::Lie {
            return !self.lost.is_empty() && self.never_run.is_empty();
        }
        // A cut after which the kernel had no file system has tried nothing; a run of nothing else proves nothing.
        self.lost.is_empty()
            && self.broken.is_empty()
            && self.never_run.is_empty()
            && (self.no_file_system.len() as u64) < self.trials.max(1)
    }

    fn json(&self, arguments: &Arguments, fault: Fault) -> serde_json::Value {
        let Survived { kept, torn, lost } = self.survived;
        serde_json::json!({
            "fs": arguments.fs.name(),
            "fault": format!("{fault:?}"),
            "seed": arguments.seed,
            "trials": self.trials,
            "not_run": self.not_run,
            "never_run": self.never_run,
            "violations": self.lost.len() + self.broken.len(),
            "cuts": self.cuts,
            "acknowledged": self.acked,
            "writes": self.writes,
            "flushes": self.flushes,
            "unflushed": { "kept": kept, "torn": torn, "lost": lost },
            "seconds": (self.seconds * 10.0).round() / 10.0,
            "lost": self.lost,
            "broken": self.broken,
            "no_file_system": self.no_file_system,
        })
    }
}
