//! `ringraft bench`: what a durable commit costs on this machine, beside what the machine could do.
//!
//! Happy path of [`run`]: measure the limit; start the nodes and wait for a leader; order the leader's generator to
//! run and watch it ([`Watch`]), through failovers if there are any; let the followers catch up; stop the nodes;
//! verify the logs; measure the limit again; report. Every step fails early when the program is interrupted, and
//! the guards (the cluster, the directory) clean up on the way out.

mod cluster;
pub(crate) mod control;
pub(crate) mod ledger;
mod report;
mod verify;

use crate::cleanup;
use crate::cli::{EngineArgs, duration};
use crate::exit::{self, Failure};
use crate::limit::{self, LimitOptions, LimitReport};
use crate::load::{self, COMMAND_BYTES_MIN};
use crate::machine::{self, BlockDevice, MachineTime};
use crate::node::LoadFrom;
use anyhow::{Context as _, bail, ensure};
use cluster::{Cluster, ClusterOptions, Usage};
use control::{Answer, Order, Plan};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ledger::{Ending, Figure, Ledger, Phase};
use report::{
    Batch, Config, Cpu, Disk, Durable, Engine, Failover, Latency, Leader, Limit, Others, Outcomes, Report,
    Share, Spread,
};
use ringraft_block::{ClusterId, NodeId};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use verify::{NodeDir, RunLedger, Verified};

/// Streams of the open loop when nothing else is said: as many commands may be in flight.
const OPEN_LOOP_STREAMS: u32 = 16_384;
const CLOSED_LOOP_STREAMS: u32 = 256;
/// The watch looks at the nodes and ledgers this often; so late a failover may be noticed.
const WATCH_EVERY: Duration = Duration::from_millis(5);
/// Usage is sampled, and the rate taken, this often.
const SLICE_NS: u64 = 100_000_000;
/// Without an acknowledgement for so long, the watch asks whether another node leads.
const STALLED_NS: u64 = 250_000_000;
/// Without a leader for so long, the run has failed.
const LEADERLESS_NS_MAX: u64 = 20_000_000_000;
/// A killed node is started again after so long even if no other has taken over.
const RESTART_AFTER_NS: u64 = 2_000_000_000;
/// A generator that ends with its node alive says so by then.
const ENDED_WITHIN_NS: u64 = 8_000_000_000;
/// Two ports that were free a moment ago may be taken by others; then others are tried.
const STARTS_MAX: usize = 5;

/// Measure a durable cluster on this machine
///
/// Starts nodes as processes on loopback with their logs on the file system of --dir, drives the leader, measures
/// the machine's own limit before and after, and verifies from disk that every acknowledged command is there once, as far as the
/// logs go (--snapshot-mb).
/// It leaves nothing running and nothing on disk. Run it while the machine does nothing else.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = exit::HELP, args_override_self = true)]
pub(crate) struct BenchArgs {
    /// Nodes
    #[arg(long, value_name = "1|3|5", default_value_t = 3, value_parser = nodes)]
    nodes: usize,
    /// Bytes of a command; the first 16 say which it is
    #[arg(long, value_name = "BYTES", default_value_t = 128)]
    payload: usize,
    /// Closed loop: so many commands are in flight at any time. With --rate: at most so many [default: 256, with
    /// --rate 16384]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    in_flight: Option<u32>,
    /// Open loop: commands per second, whatever the engine does; latency counts from when each was due
    #[arg(long, value_name = "PER_SECOND")]
    rate: Option<f64>,
    /// How long to measure
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    duration: Duration,
    /// Load before the measurement, which does not count
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    warmup: Duration,
    /// Where the load comes from, in the leader's process
    #[arg(long, value_enum, default_value_t = LoadFrom::Thread)]
    load: LoadFrom,
    /// The directory on the disk to use; everything is made in a directory of its own there
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Keep the data, and say where it is
    #[arg(long)]
    keep: bool,
    /// The core of each node, in turn [default: as the kernel chooses]
    #[arg(long, value_name = "CORE,...", value_delimiter = ',')]
    cores: Vec<usize>,
    /// Write the result as JSON to FILE as well; with `-` the standard output holds only the JSON
    #[arg(long, value_name = "FILE|-")]
    json: Option<PathBuf>,
    /// Write the latency distribution to FILE, for HdrHistogram's tools
    #[arg(long, value_name = "FILE")]
    hgrm: Option<PathBuf>,
    /// Take a snapshot after so much log, and purge the log behind it, as nodes do that run for long; 0: never
    ///
    /// Their segments are recycled. Without, each is filled with zeros before it is used, which takes half of what the disk writes;
    /// but all commands can be verified, and otherwise only those that the logs still hold at the end.
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    snapshot_mb: u64,
    /// Do not measure the machine's limit
    #[arg(long)]
    no_limit: bool,
    /// Do not verify the logs
    #[arg(long)]
    no_verify: bool,
    /// Kill the leader (SIGKILL) so long after the measurement began
    #[arg(long, value_name = "TIME", value_parser = duration)]
    kill_leader_after: Option<Duration>,
    /// Start a node again that was killed
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    restart_killed: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

fn nodes(text: &str) -> Result<usize, String> {
    match text {
        "1" => Ok(1),
        "3" => Ok(3),
        "5" => Ok(5),
        _ => Err("it must be 1, 3 or 5".to_owned()),
    }
}

impl BenchArgs {
    fn streams(&self) -> u32 {
        let default = if self.rate.is_some() { OPEN_LOOP_STREAMS } else { CLOSED_LOOP_STREAMS };
        self.in_flight.unwrap_or(default)
    }

    /// The engine's configuration as the nodes will have it, checked before anything is started.
    fn engine_config(&self) -> anyhow::Result<ringraft::Config> {
        let member = ringraft::MemberConfig { id: NodeId(1), address: ([127, 0, 0, 1], 1).into() };
        let mut config = ringraft::Config::new(ClusterId(1), NodeId(1), vec![member], &self.dir);
        self.engine.apply_to(&mut config);
        for core in &self.cores {
            config.core = Some(*core);
            config.validate().map_err(|error| usage(format!("--cores: {error}")))?;
        }
        config.validate().map_err(|error| usage(error.to_string()))?;
        Ok(config)
    }

    fn check(&self, config: &ringraft::Config) -> anyhow::Result<()> {
        let payload = COMMAND_BYTES_MIN..=config.command_bytes_max;
        if !payload.contains(&self.payload) {
            return Err(usage(format!("--payload must be {} to {}", payload.start(), payload.end())));
        }
        if self.rate.is_some_and(|rate| !(rate.is_finite() && rate > 0.0)) {
            return Err(usage("--rate must be more than 0".to_owned()));
        }
        if self.duration.is_zero() {
            return Err(usage("--duration must be more than 0".to_owned()));
        }
        if self.kill_leader_after.is_some_and(|after| after >= self.duration) {
            return Err(usage("--kill-leader-after must be less than --duration".to_owned()));
        }
        Ok(())
    }
}

fn usage(message: String) -> anyhow::Error {
    Failure { code: exit::USAGE, message }.into()
}

/// Runs the benchmark and prints its report.
pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let config = args.engine_config()?;
    args.check(&config)?;
    let environment = machine::environment(&args.dir)?;
    let parent = machine::canonical(&args.dir)?;
    let mut notes = Vec::new();
    if !environment.optimised {
        notes.push(
            "this is a build with debug assertions; build with --release for figures that count".to_owned(),
        );
    }

    let limit_before = limit(args, &parent, "before")?;
    let scratch = cluster::scratch(&parent)?;
    let options = ClusterOptions {
        dir: scratch.path().to_owned(),
        nodes: args.nodes,
        cores: args.cores.clone(),
        engine: args.engine.clone(),
        load: args.load,
        snapshot_mb: args.snapshot_mb,
    };
    say("starting the nodes");
    let mut cluster = start(&options)?;
    let leader = cluster.wait_formed()?;
    let mut watch = Watch::new(args, scratch.path());
    watch.order(&mut cluster, leader.node, leader.term)?;
    watch.run(&mut cluster)?;
    let (statuses, caught_up) = cluster.wait_caught_up()?;
    if !caught_up {
        notes.push("not all nodes had caught up when they were stopped".to_owned());
    }
    let durable = Durable::of(args.nodes, &cluster.log_files()?)?;
    let killed = cluster.stop()?;
    if killed > 0 {
        notes.push(format!("{killed} nodes did not stop in good order and were killed"));
    }
    let dirs: Vec<NodeDir> = cluster
        .members()
        .iter()
        .map(|member| {
            let status = statuses.iter().find(|status| status.node == member.id);
            NodeDir {
                node: member.id,
                dir: member.dir.clone(),
                committed: status.map(|status| status.commit),
                kept: member.kept(),
                entries: status.filter(|status| status.applied == status.commit).map(|status| status.entries),
            }
        })
        .collect();
    drop(cluster);
    let verified = if args.no_verify { None } else { Some(verified(&dirs, &watch, args.payload)?) };
    if args.keep {
        notes.push(format!("the data is kept in {}", scratch.keep().display()));
    } else {
        scratch.close().context("removing the benchmark's directory")?;
    }
    let limit_after = limit(args, &parent, "after")?;

    let limits = (limit_before.as_ref().map(Limit::from), limit_after.as_ref().map(Limit::from));
    let latencies = watch.latencies();
    let report = watch.report(&config, environment, durable, verified, limits, notes);
    if let Some(file) = &args.hgrm {
        std::fs::write(file, report::hgrm(&latencies))
            .with_context(|| format!("writing {}", file.display()))?;
    }
    print(args, &report)?;
    let ok = report.verified.as_ref().is_none_or(|verified| verified.ok);
    ensure!(ok, "verification failed: what was acknowledged is not what the logs hold");
    Ok(())
}

fn start(options: &ClusterOptions) -> anyhow::Result<Cluster> {
    for _ in 1..STARTS_MAX {
        match Cluster::start(options.clone()) {
            Err(error) if exit::code_of(&error) == exit::PORT_IN_USE => {
                for id in 1..=options.nodes {
                    let _ = std::fs::remove_dir_all(options.dir.join(format!("node-{id}")));
                }
            }
            other => return other,
        }
    }
    Cluster::start(options.clone())
}

/// A short measurement of what the machine can do, in this run's terms.
fn limit(args: &BenchArgs, dir: &Path, when: &str) -> anyhow::Result<Option<LimitReport>> {
    if args.no_limit {
        return Ok(None);
    }
    cleanup::check()?;
    say(&format!("measuring the machine's limit, {when}"));
    let mut options = LimitOptions::short(dir, args.nodes);
    options.stop = Some(cleanup::stop_flag());
    options.cores = Some(args.cores.clone()).filter(|cores| !cores.is_empty());
    let measured = limit::measure(&options);
    // A signal ends the measurement with an error of its own, which is not the news.
    cleanup::check()?;
    measured.context("measuring the machine's limit (--no-limit does without)").map(Some)
}

fn verified(dirs: &[NodeDir], watch: &Watch<'_>, payload_bytes: usize) -> anyhow::Result<Verified> {
    say("verifying the logs");
    let mut verified = verify::verify(dirs, &watch.runs, payload_bytes)?;
    if !verified.ok {
        verified.problems.insert(0, "the logs on disk contradict what was acknowledged".to_owned());
    }
    Ok(verified)
}

/// Progress for people: a line each where the standard error is no terminal either.
fn say(what: &str) {
    eprintln!("{what}…");
}

fn print(args: &BenchArgs, report: &Report) -> anyhow::Result<()> {
    let json = serde_json::to_string_pretty(report)? + "\n";
    let people = report::render(report);
    let mut out = std::io::stdout().lock();
    match args.json.as_deref() {
        Some(file) if file == Path::new("-") => {
            eprint!("{people}");
            out.write_all(json.as_bytes())?;
        }
        Some(file) => {
            std::fs::write(file, json).with_context(|| format!("writing {}", file.display()))?;
            out.write_all(people.as_bytes())?;
        }
        None => out.write_all(people.as_bytes())?,
    }
    out.flush().context("writing the report")
}

/// Watches a run: orders generators, notices failovers, samples what is used.
struct Watch<'a> {
    args: &'a BenchArgs,
    dir: PathBuf,
    /// When the load begins, warm-up included.
    start_ns: u64,
    begin_ns: u64,
    end_ns: u64,
    runs: Vec<RunLedger>,
    /// Who each of `runs` was ordered from, and the term.
    leaders: Vec<(u64, u64)>,
    /// The last acknowledgement that there had been when each of `runs` was ordered; 0 for none.
    acked_before_ns: Vec<u64>,
    device: Option<BlockDevice>,
    at_begin: Option<Sample>,
    at_end: Option<Sample>,
    /// Commits per second in each whole slice of the window.
    rates: Vec<f64>,
    slice: (u64, u64),
    killed_leader: bool,
    /// Nodes that were killed, and when that was noticed.
    killed: Vec<(u64, u64)>,
    notes: Vec<String>,
    progress: ProgressBar,
}

/// What was used up to a moment.
struct Sample {
    now_ns: u64,
    nodes: Vec<Usage>,
    device_bytes: Option<u64>,
    machine: Option<MachineTime>,
}

impl<'a> Watch<'a> {
    fn new(args: &'a BenchArgs, dir: &Path) -> Self {
        let start_ns = load::now_ns();
        let begin_ns = start_ns + args.warmup.as_nanos() as u64;
        let end_ns = begin_ns + args.duration.as_nanos() as u64;
        let progress = ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stderr_with_hz(10));
        let style = ProgressStyle::with_template("{bar:30} {msg}").expect("the template is valid");
        progress.set_style(style);
        Self {
            args,
            dir: dir.to_owned(),
            start_ns,
            begin_ns,
            end_ns,
            runs: Vec::new(),
            leaders: Vec::new(),
            acked_before_ns: Vec::new(),
            device: BlockDevice::of(dir),
            at_begin: None,
            at_end: None,
            rates: Vec::new(),
            slice: (begin_ns, 0),
            killed_leader: false,
            killed: Vec::new(),
            notes: Vec::new(),
            progress,
        }
    }

    /// Orders a generator from the leader; the first order fixes the window.
    fn order(&mut self, cluster: &mut Cluster, node: u64, term: u64) -> anyhow::Result<()> {
        let run = u32::try_from(self.runs.len())?;
        let streams = self.args.streams();
        let path = self.dir.join(format!("ledger-{run}"));
        let ledger = Ledger::create(&path, streams as usize)?;
        match self.runs.last() {
            Some(former) => ledger.succeed(&former.ledger),
            None => ledger.set(Figure::ServedNs, self.start_ns),
        }
        let plan = Plan {
            run,
            streams,
            payload_bytes: self.args.payload,
            rate: self.args.rate,
            due_from_ns: ledger.get(Figure::ServedNs),
            begin_ns: self.begin_ns,
            end_ns: self.end_ns,
        };
        let acked_ns = self.runs.iter().map(|run| run.ledger.get(Figure::LastAckNs));
        self.acked_before_ns.push(acked_ns.max().unwrap_or(0));
        let answer = cluster.member(node)?.ask(&Order::Run { ledger: path, plan })?;
        // From here on the ledger counts: a node that died over the order may have sent something.
        self.runs.push(RunLedger { run, term, ledger });
        self.leaders.push((node, term));
        match answer {
            Some(Answer::Failed { error }) => bail!("node {node} cannot generate load: {error}"),
            Some(_) => Ok(()),
            // It was killed just now, or is stalled: the watch will find out.
            None => Ok(()),
        }
    }

    /// Watches until the window is over and every generator has ended.
    fn run(&mut self, cluster: &mut Cluster) -> anyhow::Result<()> {
        let mut leaderless_since_ns: Option<u64> = None;
        loop {
            cleanup::sleep(WATCH_EVERY)?;
            let now_ns = load::now_ns();
            self.look_at_members(cluster, now_ns)?;
            self.sample(cluster, now_ns)?;
            self.kill_leader_when_due(cluster, now_ns)?;
            let (node, _) = self.leaders.last().copied().context("a generator was ordered")?;
            let alive = cluster.member(node)?.is_alive();
            let ledger = &self.current()?.ledger;
            let running = alive && ledger.phase() != Phase::Ended;
            if now_ns >= self.end_ns {
                if !running || now_ns > self.end_ns + ENDED_WITHIN_NS {
                    break;
                }
                continue;
            }
            let stalled = running && self.is_stalled(now_ns)?;
            if running && !stalled {
                leaderless_since_ns = None;
                continue;
            }
            if ledger.phase() == Phase::Ended
                && matches!(ledger.ending(), Ending::Refused | Ending::TooManyUnknown)
            {
                bail!(
                    "the load on node {node} ended early ({:?}); the node's messages say more",
                    ledger.ending()
                );
            }
            self.look_for_leader(cluster, running)?;
            let since_ns = *leaderless_since_ns.get_or_insert(now_ns);
            if self.leaders.last().is_some_and(|(newest, _)| *newest != node) {
                leaderless_since_ns = None;
            } else if now_ns > since_ns + LEADERLESS_NS_MAX {
                bail!("no node leads for {} s", LEADERLESS_NS_MAX / 1_000_000_000);
            }
        }
        // The last slice, and what a killed process could not say.
        self.sample(cluster, load::now_ns())?;
        self.progress.finish_and_clear();
        Ok(())
    }

    fn current(&self) -> anyhow::Result<&RunLedger> {
        self.runs.last().context("a generator was ordered")
    }

    fn is_stalled(&self, now_ns: u64) -> anyhow::Result<bool> {
        let ledger = &self.current()?.ledger;
        let last_ns = ledger.get(Figure::LastAckNs).max(self.start_ns);
        // A slow open loop may have nothing to acknowledge.
        let interval_ns = self.args.rate.map_or(0, |rate| (2e9 / rate) as u64);
        Ok(now_ns > last_ns + STALLED_NS.max(interval_ns))
    }

    /// Orders the new leader to go on, if there is one.
    fn look_for_leader(&mut self, cluster: &mut Cluster, old_runs: bool) -> anyhow::Result<()> {
        let statuses = cluster.statuses()?;
        let Some(leader) = cluster::leader_of(&statuses) else { return Ok(()) };
        let Some((node, term)) = self.leaders.last().copied() else { return Ok(()) };
        if leader.term <= term {
            return Ok(());
        }
        if old_runs && leader.node != node {
            // It may be cut off or stopped, and notice later; its outcomes count until then.
            cluster.member(node)?.post(&Order::StopLoad)?;
        }
        self.order(cluster, leader.node, leader.term)
    }

    /// Notices processes that were killed, and starts them again.
    fn look_at_members(&mut self, cluster: &mut Cluster, now_ns: u64) -> anyhow::Result<()> {
        for member in cluster.members() {
            if member.is_alive() && !member.look()? {
                let signal =
                    member.killed_by().map_or_else(|| "by itself".to_owned(), |n| format!("by signal {n}"));
                self.notes.push(format!("node {} ended {signal} during the run", member.id));
                self.killed.push((member.id, now_ns));
            }
        }
        if !self.args.restart_killed {
            return Ok(());
        }
        // The next leader comes first, so that the gap is that of the remaining nodes.
        let settled = self.current()?.ledger.get(Figure::FirstAckNs) > 0;
        let leads = self.leaders.last().map(|(node, _)| *node);
        for (id, since_ns) in std::mem::take(&mut self.killed) {
            let member = cluster.member(id)?;
            if (settled && leads != Some(id)) || now_ns > since_ns + RESTART_AFTER_NS {
                member.spawn()?;
            } else {
                self.killed.push((id, since_ns));
            }
        }
        Ok(())
    }

    fn kill_leader_when_due(&mut self, cluster: &mut Cluster, now_ns: u64) -> anyhow::Result<()> {
        let Some(after) = self.args.kill_leader_after else { return Ok(()) };
        if !self.killed_leader && now_ns >= self.begin_ns + after.as_nanos() as u64 {
            self.killed_leader = true;
            let (node, _) = self.leaders.last().copied().context("a generator was ordered")?;
            cluster.member(node)?.send_kill();
        }
        Ok(())
    }

    /// Takes what is to be taken at the window's begin and end and at each slice of it.
    fn sample(&mut self, cluster: &mut Cluster, now_ns: u64) -> anyhow::Result<()> {
        if self.at_begin.is_none() && now_ns >= self.begin_ns {
            self.at_begin = Some(self.usage(cluster));
            self.slice = (now_ns, self.measured());
        }
        if self.at_end.is_none() && now_ns >= self.end_ns {
            self.at_end = Some(self.usage(cluster));
        }
        if now_ns < self.begin_ns || now_ns > self.end_ns || now_ns < self.slice.0 + SLICE_NS {
            self.show(now_ns, None);
            return Ok(());
        }
        let measured = self.measured();
        let rate = (measured - self.slice.1) as f64 * 1e9 / (now_ns - self.slice.0) as f64;
        self.rates.push(rate);
        self.slice = (now_ns, measured);
        for member in cluster.members() {
            member.sample();
            member.glance()?;
        }
        self.show(now_ns, Some(rate));
        Ok(())
    }

    fn usage(&self, cluster: &mut Cluster) -> Sample {
        Sample {
            now_ns: load::now_ns(),
            nodes: cluster.members().iter_mut().map(cluster::Member::sample).collect(),
            device_bytes: self.device.as_ref().and_then(BlockDevice::written_bytes),
            machine: machine::machine_time(),
        }
    }

    fn show(&self, now_ns: u64, rate: Option<f64>) {
        if self.progress.is_hidden() {
            return;
        }
        if now_ns < self.begin_ns {
            self.progress.set_message("warm-up");
        } else if let Some(rate) = rate {
            let p99_us = self.latencies().value_at_quantile(0.99) as f64 / 1e3;
            let done = (now_ns - self.begin_ns) * 100 / (self.end_ns - self.begin_ns);
            self.progress.set_position(done);
            self.progress.set_message(format!("{rate:.0} commits per s, p99 {p99_us:.0} µs"));
        }
    }

    fn sum(&self, figure: Figure) -> u64 {
        self.runs.iter().map(|run| run.ledger.get(figure)).sum()
    }

    fn measured(&self) -> u64 {
        self.sum(Figure::Measured)
    }

    fn latencies(&self) -> hdrhistogram::Histogram<u64> {
        let mut latencies = ledger::latency_histogram();
        self.runs.iter().for_each(|run| run.ledger.add_latencies_to(&mut latencies));
        latencies
    }

    /// What the leaders' figure `now` grew by since `then`, within the window.
    fn grown(&self, then: Figure, now: Figure) -> f64 {
        let grown = self.runs.iter().map(|run| run.ledger.get(now).saturating_sub(run.ledger.get(then)));
        grown.sum::<u64>() as f64
    }

    fn failover(&self, election_timeout: Duration) -> Option<Failover> {
        // A leader that was only stopped may acknowledge something later, after the next one has begun; what it had
        // acknowledged when that one was ordered counts here.
        let gaps = self.runs.iter().enumerate().filter_map(|(number, run)| {
            let first_ns = run.ledger.get(Figure::FirstAckNs);
            let earlier = self.runs[..number].iter().map(|run| run.ledger.get(Figure::LastAckNs));
            let known = earlier.chain(self.acked_before_ns.get(number).copied());
            let last_ns = known.filter(|last_ns| *last_ns > 0 && *last_ns <= first_ns).max()?;
            Some((first_ns - last_ns) as f64 / 1e6)
        });
        let gaps_ms: Vec<f64> = gaps.collect();
        let gap_ms = gaps_ms.iter().copied().fold(0.0, f64::max);
        let election_timeouts = gap_ms / (election_timeout.as_secs_f64() * 1e3);
        (!gaps_ms.is_empty()).then_some(Failover { gap_ms, gaps_ms, election_timeouts })
    }

    /// What else the machine did, `cpu_ns` being what the nodes used.
    fn others(&self, cpu_ns: u64) -> Option<Others> {
        let (begin, end) = self.at_begin.as_ref().zip(self.at_end.as_ref())?;
        let (before, after) = begin.machine.zip(end.machine)?;
        let window_ns = end.now_ns.saturating_sub(begin.now_ns).max(1) as f64;
        let busy_ns = after.busy_ns.saturating_sub(before.busy_ns).saturating_sub(cpu_ns);
        let stolen_ns = after.steal_ns.saturating_sub(before.steal_ns);
        Some(Others { busy_cores: busy_ns as f64 / window_ns, stolen_cores: stolen_ns as f64 / window_ns })
    }

    fn report(
        self,
        config: &ringraft::Config,
        environment: machine::Environment,
        durable: Durable,
        verified: Option<Verified>,
        (before, after): (Option<Limit>, Option<Limit>),
        mut notes: Vec<String>,
    ) -> Report {
        let args = self.args;
        notes.extend(self.notes.iter().cloned());
        let window_s = args.duration.as_secs_f64();
        let commits = self.measured();
        let payload_bytes = commits as f64 * args.payload as f64;
        let per_commit_us = |ns: f64| ns / 1e3 / commits.max(1) as f64;
        let used = |figure: fn(&Usage) -> u64| -> Vec<u64> {
            let (Some(begin), Some(end)) = (&self.at_begin, &self.at_end) else { return Vec::new() };
            let pairs = begin.nodes.iter().zip(&end.nodes);
            pairs.map(|(begin, end)| figure(end).saturating_sub(figure(begin))).collect()
        };
        let cpu_ns = used(|usage| usage.cpu_ns);
        let process_bytes = used(|usage| usage.written_bytes).iter().sum::<u64>();
        let device_bytes = match (&self.at_begin, &self.at_end) {
            (Some(begin), Some(end)) => {
                begin.device_bytes.zip(end.device_bytes).map(|(b, e)| e.saturating_sub(b))
            }
            _ => None,
        };
        let disk_bytes = device_bytes.unwrap_or(process_bytes);
        let batches = self.grown(Figure::BatchesAtBegin, Figure::Batches).max(1.0);
        let latencies = self.latencies();
        let max_ns = self.runs.iter().map(|run| run.ledger.get(Figure::LatencyNsMax)).max().unwrap_or(0);
        let latency_us = Latency::of(&latencies, max_ns);
        let payload_bytes_per_s = payload_bytes / window_s;
        let limit = match (&before, &after) {
            (Some(before), Some(after)) => {
                if before.differs_from(after) {
                    notes.push(
                        "the machine's limit before and after differs by more than a quarter: something else was \
                         running, so take the shares with care"
                            .to_owned(),
                    );
                }
                Some(Limit::between(before, after))
            }
            (one, other) => one.or(*other),
        };
        let share_of_limit = limit.map(|limit| Share {
            latency: limit.commit_us_p50 / latency_us.p50.max(f64::MIN_POSITIVE),
            throughput: payload_bytes_per_s / limit.bytes_per_s.max(f64::MIN_POSITIVE),
        });
        let others = self.others(cpu_ns.iter().sum());
        if let Some(others) = others.filter(Others::disturb) {
            notes.push(format!(
                "meanwhile other programs used {:.1} of {} cores, and the hypervisor took {:.1}: the figures are those \
                 of a disturbed machine",
                others.busy_cores, environment.cpus, others.stolen_cores
            ));
        }
        if commits == 0 {
            notes.push("nothing was committed within the window".to_owned());
        }
        if !durable.seen {
            notes.push(
                "/proc did not show how the nodes opened their logs, so it was not seen that acknowledgements are durable"
                    .to_owned(),
            );
        }
        let acked = self.sum(Figure::Acked);
        let run_s = (self.end_ns - self.start_ns) as f64 / 1e9;
        let due = args.rate.map(|rate| (rate * run_s).ceil() as u64);
        let outcomes = Outcomes {
            acked,
            unknown: self.runs.iter().map(|run| run.ledger.unknown_count()).sum(),
            refused: self.sum(Figure::Refused),
            due,
            missed: due.map(|due| due.saturating_sub(acked)),
        };
        if let Some(rate) = args.rate {
            notes.extend(report::shortfall(rate * window_s, commits, outcomes.unknown));
        }
        let leaders = self.runs.iter().zip(&self.leaders).map(|(run, (node, term))| Leader {
            node: *node,
            term: *term,
            acked: run.ledger.get(Figure::Acked),
            ended: run.ledger.ending(),
        });
        Report {
            schema: report::SCHEMA,
            config: Config {
                nodes: args.nodes,
                payload_bytes: args.payload,
                in_flight: args.streams(),
                rate: args.rate,
                load: args.load,
                duration_s: window_s,
                warmup_s: args.warmup.as_secs_f64(),
                cores: args.cores.clone(),
                snapshot_mb: args.snapshot_mb,
                engine: Engine::from(config),
            },
            durable,
            commits_per_s: commits as f64 / window_s,
            payload_bytes_per_s,
            latency_us,
            cpu_us_per_commit: per_commit_us(cpu_ns.iter().sum::<u64>() as f64),
            disk_bytes_per_payload_byte: (commits > 0)
                .then_some(disk_bytes as f64 / args.nodes as f64 / payload_bytes),
            batch: Batch {
                entries_mean: self.grown(Figure::EntriesAtBegin, Figure::Entries) / batches,
                bytes_mean: self.grown(Figure::BytesAtBegin, Figure::Bytes) / batches,
            },
            limit,
            share_of_limit,
            verified,
            commits,
            window_s,
            cpu: Cpu {
                nodes_us_per_commit: cpu_ns.iter().map(|ns| per_commit_us(*ns as f64)).collect(),
                generator_us_per_commit: (args.load == LoadFrom::Thread)
                    .then(|| per_commit_us(self.grown(Figure::CpuNsAtBegin, Figure::CpuNs))),
            },
            others,
            disk: Disk {
                source: if device_bytes.is_some() { "block device counters" } else { "/proc/PID/io" },
                device_bytes,
                process_bytes,
            },
            spread: Spread::of(SLICE_NS / 1_000_000, self.rates.clone()),
            failover: self.failover(config.election_timeout),
            leaders: leaders.collect(),
            outcomes,
            limit_before: before,
            limit_after: after,
            notes,
            environment,
        }
    }
}
