//! `ringraft node`: one member, as a process of its own.

use crate::bench::control::{Answer, NodeStatus, Order, Plan};
use crate::bench::ledger::{self, Figure, Ledger, Phase};
use crate::cleanup;
use crate::cli::EngineArgs;
use crate::exit;
use crate::load::{self, Applied, Counter, Job, Mailbox};
use anyhow::{Context as _, anyhow, bail};
use ringraft::{Config, Handle, LocalHandle, LocalTask, MemberConfig, Node, Role};
use ringraft_block::{ClusterId, NodeId};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, Signal};
use std::cell::RefCell;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Run one member of a cluster
///
/// The state machine counts commands. The node stops in good order on SIGTERM and SIGINT. Its log messages go to
/// the standard error; RUST_LOG chooses them.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = exit::HELP, args_override_self = true)]
pub(crate) struct NodeArgs {
    /// This member's id, from 1
    #[arg(long)]
    id: u64,
    /// The data directory, on a local disk with direct I/O; made if missing
    #[arg(long)]
    dir: PathBuf,
    /// All members of the cluster, this one included
    #[arg(long, value_name = "ID=ADDRESS,...", value_delimiter = ',', value_parser = member, required_unless_present = "drive")]
    members: Vec<MemberConfig>,
    /// The cluster's id, the same for all members: up to 32 hexadecimal digits, not 0
    #[arg(long, value_parser = cluster_id, required_unless_present = "drive")]
    cluster: Option<ClusterId>,
    /// Where to listen [default: this member's address]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Allow addresses beyond loopback: members talk in plain text
    #[arg(long)]
    insecure: bool,
    /// The processor to pin consensus to [default: as the kernel chooses]
    #[arg(long)]
    core: Option<usize>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    /// Take a snapshot after so much log, and purge the log behind it; 0: never
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    snapshot_mb: u64,
    /// Stop in good order when the standard input ends
    #[arg(long)]
    stop_with_stdin: bool,

    /// Take orders of a benchmark on the standard input, and answer on the standard output
    #[arg(long, hide = true, conflicts_with = "drive")]
    control: bool,
    /// Where the load of a benchmark comes from
    #[arg(long, value_enum, default_value_t = LoadFrom::Thread, help_heading = "Driven")]
    load: LoadFrom,
    /// Be a replica of a benchmark that a driver conducts
    ///
    /// Replica 1 leads, says LEADER, and takes orders on its standard input, a line each: `bench PAYLOAD-BYTES IN-FLIGHT
    /// WARM-MS RUN-MS`. It keeps so many commands in flight, says BEGIN when the first span is over, and at the end of the
    /// second END with the figures as JSON. To `status` any replica answers STATUS and where it stands, as JSON. A replica
    /// stops when its standard input ends.
    #[arg(long, requires = "ports", help_heading = "Driven")]
    drive: bool,
    /// The ports of replicas 1, 2, … on loopback, instead of --members
    #[arg(long, value_name = "PORT,...", value_delimiter = ',', help_heading = "Driven")]
    ports: Vec<u16>,
    /// The process without which this one ends
    #[arg(long, hide = true)]
    parent: Option<i32>,
}

/// Where the load comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LoadFrom {
    /// A thread of the leader's process, through its `Handle`
    Thread,
    /// A task on the leader's core, through its `LocalHandle`
    Core,
}

fn member(text: &str) -> Result<MemberConfig, String> {
    let (id, address) = text.split_once('=').ok_or("it must be ID=ADDRESS, such as 1=127.0.0.1:7001")?;
    let id = id.parse().map_err(|_| format!("`{id}` is no id"))?;
    let address =
        address.parse().map_err(|_| format!("`{address}` is no address, such as 127.0.0.1:7001"))?;
    Ok(MemberConfig { id: NodeId(id), address })
}

fn cluster_id(text: &str) -> Result<ClusterId, String> {
    let id =
        u128::from_str_radix(text, 16).map_err(|_| "it must be up to 32 hexadecimal digits".to_owned())?;
    Ok(ClusterId(id))
}

/// Nothing is looked at more rarely than this while the node runs.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// The election time-outs of the driven replicas that should not lead, in those of the one that should.
const DRIVEN_PATIENCE: u32 = 8;

/// Runs the node until it is told to stop, or stops by itself.
pub(crate) fn run(args: &NodeArgs) -> anyhow::Result<()> {
    if let Some(parent) = args.parent {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
            .context("tying to the parent's life")?;
        // It may have died before the line above.
        if rustix::process::getppid() != Pid::from_raw(parent) {
            bail!("the parent is gone");
        }
    }
    log_to_stderr();
    let applied = Arc::new(Applied::default());
    let counter = Arc::clone(&applied);
    let mailbox = (args.load == LoadFrom::Core).then(Arc::<Mailbox>::default);
    let tasks = mailbox.iter().map(|mailbox| {
        let mailbox = Arc::clone(mailbox);
        let task: LocalTask =
            Box::new(move |handle: LocalHandle| Box::pin(load::serve_on_core(handle, mailbox)));
        task
    });
    let node = Node::start_with(config(args)?, move || Counter::new(counter), tasks.collect())?;
    let service = Service { handle: node.handle(), applied, mailbox, stop_load: RefCell::default() };
    let served = if args.drive {
        service.drive(args.id)
    } else if args.control {
        Answer::Ready { node: args.id }.say().and_then(|()| service.obey())
    } else {
        service.wait(args.stop_with_stdin)
    };
    service.handle.shutdown();
    let cause = node.join();
    if !cause.is_orderly() {
        return Err(cause.into());
    }
    served
}

fn log_to_stderr() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}

fn config(args: &NodeArgs) -> anyhow::Result<Config> {
    let members = if args.drive {
        let members = (1..).zip(&args.ports).map(|(id, port)| MemberConfig {
            id: NodeId(id),
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, *port)),
        });
        members.collect()
    } else {
        args.members.clone()
    };
    let mut config = Config::new(args.cluster.unwrap_or(ClusterId(1)), NodeId(args.id), members, &args.dir);
    config.listen = args.listen;
    config.insecure = args.insecure;
    config.core = args.core;
    config.snapshot_log_bytes = args.snapshot_mb.saturating_mul(1 << 20);
    args.engine.apply_to(&mut config);
    if args.drive && args.id != 1 {
        config.election_timeout *= DRIVEN_PATIENCE;
    }
    Ok(config)
}

/// What a running node is asked for.
struct Service {
    handle: Handle,
    applied: Arc<Applied>,
    /// The way to the generator on the core, if it is there.
    mailbox: Option<Arc<Mailbox>>,
    /// Ends the newest load.
    stop_load: RefCell<Arc<AtomicBool>>,
}

impl Service {
    /// Waits until the node stops or is told to.
    fn wait(&self, stop_with_stdin: bool) -> anyhow::Result<()> {
        let mut input = Lines::default();
        while self.goes_on() {
            if stop_with_stdin {
                if let Input::End = input.next(LOOK_AGAIN)? {
                    break;
                }
            } else if cleanup::sleep(LOOK_AGAIN).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Whether there is neither a signal nor a cause to stop.
    fn goes_on(&self) -> bool {
        cleanup::signalled().is_none() && self.handle.status().stopped.is_none()
    }

    fn status(&self) -> NodeStatus {
        NodeStatus::new(self.handle.status(), || self.applied.entries())
    }

    /// Carries out the orders of a benchmark.
    fn obey(&self) -> anyhow::Result<()> {
        let mut input = Lines::default();
        while self.goes_on() {
            let line = match input.next(LOOK_AGAIN)? {
                Input::Nothing => continue,
                Input::End => break,
                Input::Line(line) => line,
            };
            let order = serde_json::from_str(&line).with_context(|| format!("not an order: {line}"))?;
            let answer = match order {
                Order::Status => Answer::Status(self.status()),
                Order::StopLoad => {
                    self.stop_load();
                    Answer::Taken
                }
                Order::Shutdown => {
                    Answer::Taken.say()?;
                    break;
                }
                Order::Run { ledger, plan } => match self.start_load(&ledger, plan) {
                    Ok(()) => Answer::Taken,
                    Err(error) => Answer::Failed { error: format!("{error:#}") },
                },
            };
            answer.say()?;
        }
        Ok(())
    }

    fn stop_load(&self) {
        self.stop_load.borrow().store(true, Ordering::Relaxed);
    }

    fn start_load(&self, ledger: &Path, plan: Plan) -> anyhow::Result<()> {
        self.start_job(Arc::new(Ledger::open(ledger)?), plan)
    }

    fn start_job(&self, ledger: Arc<Ledger>, plan: Plan) -> anyhow::Result<()> {
        // A node that leads again is ordered anew; its former load must not go on beside that.
        self.stop_load();
        let stop = Arc::<AtomicBool>::default();
        self.stop_load.replace(Arc::clone(&stop));
        let job = Job { plan, ledger, applied: Arc::clone(&self.applied), stop };
        match &self.mailbox {
            Some(mailbox) => mailbox.put(job),
            None => {
                let handle = self.handle.clone();
                let thread = std::thread::Builder::new().name("load".to_owned());
                thread.spawn(move || load::run_on_thread(&handle, job)).context("starting a thread")?;
            }
        }
        Ok(())
    }

    /// Carries out the orders of the neutral driver, which knows replica 1 only.
    fn drive(&self, id: u64) -> anyhow::Result<()> {
        let mut input = Lines::default();
        let mut leads = false;
        while self.goes_on() {
            if !leads && self.handle.status().role == Role::Leader {
                leads = id == 1;
                if leads {
                    say("LEADER")?;
                } else {
                    // It was too slow to campaign first: as long as this replica leads it is asked again.
                    drop(self.handle.transfer_leadership(Some(NodeId(1))));
                }
            }
            // Until there is a leader, more often.
            let settled = leads || id != 1 && self.handle.status().leader.is_some();
            let line = match input.next(if settled { LOOK_AGAIN } else { LOOK_AGAIN / 10 })? {
                Input::Nothing => continue,
                Input::End => break,
                Input::Line(line) => line,
            };
            let words: Vec<&str> = line.split_whitespace().collect();
            if words == ["status"] {
                let status = self.status();
                say(&format!("STATUS {}", serde_json::to_string(&status)?))?;
                continue;
            }
            let ["bench", numbers @ ..] = &words[..] else { bail!("not an order: {line}") };
            let numbers: Vec<u64> = numbers.iter().map(|word| word.parse()).collect::<Result<_, _>>()?;
            let [payload_bytes, in_flight, warm_ms, run_ms] = numbers[..] else {
                bail!("not an order: {line}")
            };
            // What was ordered, or nothing.
            let payload_bytes = usize::try_from(payload_bytes)?;
            if payload_bytes < load::COMMAND_BYTES_MIN || in_flight == 0 {
                bail!(
                    "a command has {} bytes at least, and one is in flight: {line}",
                    load::COMMAND_BYTES_MIN
                );
            }
            if !leads {
                bail!("this replica does not lead: {line}");
            }
            let later = |from_ns: u64, ms: u64| {
                let sum = ms.checked_mul(1_000_000).and_then(|ns| from_ns.checked_add(ns));
                sum.with_context(|| format!("too long: {line}"))
            };
            let begin_ns = later(load::now_ns(), warm_ms)?;
            let plan = Plan {
                run: 0,
                streams: u32::try_from(in_flight)?,
                payload_bytes,
                rate: None,
                due_from_ns: begin_ns,
                begin_ns,
                end_ns: later(begin_ns, run_ms)?,
            };
            self.drive_one(&plan)?;
        }
        Ok(())
    }

    fn drive_one(&self, plan: &Plan) -> anyhow::Result<()> {
        let ended = |ledger: &Ledger| match ledger.ending() {
            ledger::Ending::Completed => Ok(()),
            ending => Err(anyhow!("the load ended early: {ending:?}")),
        };
        let ledger = Arc::new(Ledger::private(plan.streams as usize)?);
        self.start_job(Arc::clone(&ledger), plan.clone())?;
        cleanup::sleep(Duration::from_nanos(plan.begin_ns.saturating_sub(load::now_ns())))?;
        say("BEGIN")?;
        cleanup::sleep(Duration::from_nanos(plan.end_ns.saturating_sub(load::now_ns())))?;
        if ledger.phase() == Phase::Ended {
            ended(&ledger)?;
        }
        // The driver samples when it reads the next line, so it must not wait for the last outcomes; the window's
        // figures change no more once the generator has seen its end, which takes it one completion.
        let entries = ledger.get(Figure::Measured);
        let mut latencies = ledger::latency_histogram();
        ledger.add_latencies_to(&mut latencies);
        let us = |quantile| latencies.value_at_quantile(quantile) as f64 / 1e3;
        let seconds = (plan.end_ns - plan.begin_ns) as f64 / 1e9;
        say(&format!(
            r#"END {{"entries":{entries},"secs":{seconds:.4},"mean_us":{:.1},"p50_us":{:.1},"p99_us":{:.1},"p999_us":{:.1}}}"#,
            latencies.mean() / 1e3,
            us(0.5),
            us(0.99),
            us(0.999)
        ))?;
        // With the node a load on its core ends without a word.
        while ledger.phase() != Phase::Ended && self.goes_on() {
            cleanup::sleep(Duration::from_millis(1))?;
        }
        ended(&ledger)
    }
}

impl Answer {
    fn say(&self) -> anyhow::Result<()> {
        say(&serde_json::to_string(self)?)
    }
}

fn say(line: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("answering on the standard output")
}

/// What the standard input brought.
enum Input {
    /// Nothing yet.
    Nothing,
    /// Its end.
    End,
    Line(String),
}

/// Lines of the standard input, without blocking longer than asked: a signal or the node's end matters too.
#[derive(Default)]
struct Lines {
    pending: Vec<u8>,
}

impl Lines {
    fn next(&mut self, within: Duration) -> anyhow::Result<Input> {
        if let Some(line) = self.take_line() {
            return Ok(Input::Line(line));
        }
        let input = std::io::stdin();
        let input = input.as_fd();
        let timeout = rustix::time::Timespec::try_from(within)?;
        match rustix::event::poll(&mut [PollFd::new(&input, PollFlags::IN)], Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(Input::Nothing),
            other => other.context("waiting for the standard input")?,
        };
        let mut bytes = [0; 4096];
        match rustix::io::read(input, &mut bytes) {
            Ok(0) => return Ok(Input::End),
            Ok(count) => self.pending.extend_from_slice(&bytes[..count]),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(error) => return Err(error).context("reading the standard input"),
        }
        Ok(self.take_line().map_or(Input::Nothing, Input::Line))
    }

    fn take_line(&mut self) -> Option<String> {
        let end = self.pending.iter().position(|byte| *byte == b'\n')?;
        let line = self.pending.drain(..=end).collect::<Vec<u8>>();
        Some(String::from_utf8_lossy(&line).trim_end().to_owned())
    }
}
