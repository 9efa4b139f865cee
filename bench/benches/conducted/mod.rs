//! Three replicas that a neutral driver conducts: `COMMAND --id I --dir DIR --ports P1,P2,P3` each, orders to the first on its
//! standard input. `ringraft node --drive` is one such command; a program that ringraft is compared with is another.

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// How long replicas may take to end when they are told to.
const FAREWELL: Duration = Duration::from_secs(5);

/// What the first replica says of an order.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Said {
    /// Commands committed in the time measured.
    pub(crate) entries: u64,
    /// That time.
    pub(crate) secs: f64,
    /// Latency.
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

/// What one order came to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) said: Said,
    /// Processor time of the three processes meanwhile, user's and kernel's.
    pub(crate) processor: Duration,
}

/// Three running replicas, of which the first leads. They end with this.
pub(crate) struct Replicas {
    /// The first one last.
    children: Vec<Child>,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Replicas {
    /// Starts them with data in `dir`, and waits until the first one leads.
    pub(crate) fn start(command: &[String], dir: &Path) -> anyhow::Result<Self> {
        let listeners: Vec<_> =
            (0..3).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<_, _>>()?;
        let ports: Vec<_> = listeners
            .iter()
            .map(|listener| Ok(listener.local_addr()?.port().to_string()))
            .collect::<anyhow::Result<_>>()?;
        drop(listeners);
        let (program, arguments) = command.split_first().context("an empty command")?;
        let mut children = Children(Vec::new());
        for id in [3, 2, 1] {
            let home = dir.join(format!("replica-{id}"));
            std::fs::create_dir_all(&home)?;
            let log = std::fs::File::create(dir.join(format!("replica-{id}.log")))?;
            let mut replica = Command::new(program);
            replica.args(arguments).args(["--id", &id.to_string(), "--ports", &ports.join(",")]);
            replica.arg("--dir").arg(&home).stdin(Stdio::piped()).stderr(log);
            replica.stdout(if id == 1 { Stdio::piped() } else { Stdio::null() });
            children.0.push(replica.spawn().with_context(|| format!("starting {program}"))?);
        }
        let first = children.0.last_mut().expect("three were started");
        let orders = first.stdin.take().context("its standard input")?;
        let answers = BufReader::new(first.stdout.take().context("its standard output")?);
        let mut replicas = Self { children: std::mem::take(&mut children.0), orders: Some(orders), answers };
        replicas
            .wait_for("LEADER")
            .with_context(|| format!("waiting for {program}, see {}", dir.display()))?;
        Ok(replicas)
    }

    /// The rest of the next line that begins so.
    fn wait_for(&mut self, word: &str) -> anyhow::Result<String> {
        loop {
            let mut line = String::new();
            ensure!(self.answers.read_line(&mut line)? > 0, "it ended before it said {word}");
            if let Some(rest) = line.strip_prefix(word) {
                return Ok(rest.trim().to_owned());
            }
        }
    }

    /// Has `in_flight` commands of `payload_bytes` kept in flight, first for `warm_up`, then measured for `run`.
    pub(crate) fn order(
        &mut self,
        payload_bytes: usize,
        in_flight: usize,
        warm_up: Duration,
        run: Duration,
    ) -> anyhow::Result<Outcome> {
        let orders = self.orders.as_mut().context("replicas that were dismissed")?;
        writeln!(orders, "bench {payload_bytes} {in_flight} {} {}", warm_up.as_millis(), run.as_millis())?;
        self.wait_for("BEGIN")?;
        let before = self.processor()?;
        let end = self.wait_for("END")?;
        let processor = self.processor()?.saturating_sub(before);
        let said: Said = serde_json::from_str(&end).with_context(|| format!("not an outcome: {end}"))?;
        if said.entries == 0 {
            bail!("nothing was committed in {:.1} s", said.secs);
        }
        Ok(Outcome { said, processor })
    }

    /// What they have used of processors since they began.
    pub(crate) fn processor(&self) -> anyhow::Result<Duration> {
        self.children.iter().map(|child| processor_of(child.id())).sum()
    }
}

/// Ended by force when a start fails.
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        end(&mut self.0, Duration::ZERO);
    }
}

impl Drop for Replicas {
    fn drop(&mut self) {
        // A replica stops when its standard input ends.
        drop(self.orders.take());
        for child in &mut self.children {
            drop(child.stdin.take());
        }
        end(&mut self.children, FAREWELL);
    }
}

fn end(children: &mut [Child], within: Duration) {
    let asked = Instant::now();
    for child in children {
        while matches!(child.try_wait(), Ok(None)) {
            if asked.elapsed() >= within {
                let _ = child.kill();
                let _ = child.wait();
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Of `/proc/PID/stat`: the 14th and 15th field, in clock ticks.
fn processor_of(pid: u32) -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit_once(')').context("/proc/PID/stat without a name")?.1;
    let ticks: u64 = fields
        .split_ascii_whitespace()
        .skip(11)
        .take(2)
        .map(str::parse::<u64>)
        .sum::<Result<_, _>>()
        .context("ticks in /proc/PID/stat")?;
    Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}
