//! What other processes and threads ask of the kernel, counted by the name of the system call, without their help.
//!
//! `perf stat` counts in the kernel, at the tracepoints of system calls, and hardly disturbs whom it counts; it needs the
//! right to (root, or CAP_PERFMON and a readable tracefs). `strace -c` stops whom it counts at every call, which makes them
//! slow, but a commit takes no other calls for it as long as one is in flight; it needs the right to trace siblings. Where
//! neither is to be had [`Tracer::find`] says why.

use anyhow::{Context as _, anyhow, bail, ensure};
use rustix::process::{Pid, Signal};
use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};

/// System calls by name.
pub type Counts = BTreeMap<String, u64>;

/// How all calls together are called among [`Counts`]. Those that no tracepoint was put on are in nothing else.
pub const ALL: &str = "all";

/// What a node asks of the kernel at work, with either backend, and the floor. A tracepoint takes some milliseconds to set and
/// more to remove, so there is not one for each of the kernel's calls.
const NAMED: [&str; 27] = [
    "clock_nanosleep",
    "close",
    "epoll_pwait",
    "epoll_wait",
    "fallocate",
    "fdatasync",
    "futex",
    "io_uring_enter",
    "madvise",
    "membarrier",
    "mmap",
    "munmap",
    "openat",
    "poll",
    "ppoll",
    "pread64",
    "pwrite64",
    "read",
    "readv",
    "recvfrom",
    "recvmsg",
    "sched_yield",
    "sendmsg",
    "sendto",
    "timerfd_settime",
    "write",
    "writev",
];

/// Whom to count.
#[derive(Clone, Copy, Debug)]
pub enum Traced {
    /// A process with all its threads, those to come included.
    Process(u32),
    /// One thread.
    Thread(u32),
}

/// A program that counts.
#[derive(Clone, Debug)]
pub enum Tracer {
    /// `perf stat`, with these tracepoints.
    Perf {
        /// Those that this machine has.
        events: Vec<String>,
    },
    /// `strace -c`.
    Strace,
}

/// One that counts at this moment. Dropping it ends it.
pub struct Tracing {
    child: Child,
    out: Out,
}

enum Out {
    Perf(BufReader<ChildStdout>),
    Strace { summary: PathBuf, messages: BufReader<ChildStderr> },
}

impl Tracer {
    /// What works here, tried on a process in `dir`; or why nothing does.
    pub fn find(dir: &Path) -> anyhow::Result<Self> {
        let mut refusals = Vec::new();
        for tracer in [Self::perf(), Self::Strace] {
            match tracer.try_out(dir) {
                Ok(()) => return Ok(tracer),
                Err(error) => refusals.push(format!("{}: {error:#}", tracer.name())),
            }
        }
        Err(anyhow!("{}", refusals.join("; ")))
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Perf { .. } => "perf stat",
            Self::Strace => "strace -c",
        }
    }

    fn perf() -> Self {
        let tracepoints = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
        let is_there = |name: &&str| {
            let event = format!("events/syscalls/sys_enter_{name}");
            tracepoints.iter().any(|root| Path::new(root).join(&event).exists())
        };
        let named = NAMED.into_iter().filter(is_there).map(|name| format!("syscalls:sys_enter_{name}"));
        Self::Perf { events: std::iter::once("raw_syscalls:sys_enter".to_owned()).chain(named).collect() }
    }

    fn try_out(&self, dir: &Path) -> anyhow::Result<()> {
        let counts = self.count_echoes(1, dir)?;
        ensure!(counts[ALL] > 0, "it counts nothing");
        Ok(())
    }

    /// Counts what a process does that is given so many lines and gives each back.
    fn count_echoes(&self, lines: usize, dir: &Path) -> anyhow::Result<Counts> {
        let mut cat = Command::new("cat");
        let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("starting cat")?;
        let mut input = cat.stdin.take().context("its input")?;
        let mut echo = BufReader::new(cat.stdout.take().context("its output")?);
        let counts = self.start(Traced::Process(cat.id()), dir).and_then(|tracing| {
            for _ in 0..lines {
                input.write_all(b"line\n")?;
                echo.read_line(&mut String::new())?;
            }
            finish(vec![tracing])?.pop().context("its counts")
        });
        drop(input);
        let _ = cat.wait();
        counts
    }

    /// Begins to count; it counts when this returns. `dir` is for files that it needs.
    pub fn start(&self, traced: Traced, dir: &Path) -> anyhow::Result<Tracing> {
        match self {
            Self::Perf { events } => start_perf(events, traced),
            Self::Strace => start_strace(traced, dir),
        }
    }
}

fn start_perf(events: &[String], traced: Traced) -> anyhow::Result<Tracing> {
    let mut perf = Command::new("perf");
    // Nothing is counted before it is told so, on its standard input.
    perf.env("LC_ALL", "C").args(["stat", "-x", ",", "-D", "-1", "--control", "fd:0,1"]);
    events.iter().for_each(|event| {
        perf.args(["-e", event]);
    });
    match traced {
        Traced::Process(id) => perf.args(["-p", &id.to_string()]),
        Traced::Thread(id) => perf.args(["-t", &id.to_string()]),
    };
    perf.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = perf.spawn().context("it cannot be started")?;
    let answers = BufReader::new(child.stdout.take().context("its output")?);
    let mut tracing = Tracing { child, out: Out::Perf(answers) };
    if tracing.tell_perf("enable").is_err() {
        let mut said = String::new();
        if let Some(mut messages) = tracing.child.stderr.take() {
            messages.read_to_string(&mut said)?;
        }
        bail!("{}", first_line(&said));
    }
    Ok(tracing)
}

fn start_strace(traced: Traced, dir: &Path) -> anyhow::Result<Tracing> {
    let (Traced::Process(id) | Traced::Thread(id)) = traced;
    let summary = dir.join(format!("calls-{id}"));
    let mut strace = Command::new("strace");
    strace.env("LC_ALL", "C").args(["-c", "-f", "-o"]).arg(&summary).args(["-p", &id.to_string()]);
    strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = strace.spawn().context("it cannot be started")?;
    let mut messages = BufReader::new(child.stderr.take().context("its messages")?);
    let mut line = String::new();
    messages.read_line(&mut line)?;
    let tracing = Tracing { child, out: Out::Strace { summary, messages } };
    ensure!(line.contains("attached"), "{}", first_line(&line));
    Ok(tracing)
}

fn first_line(said: &str) -> &str {
    said.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("it says nothing")
}

/// Ends them all before the counts of any are read, which takes a while; returns those in the same order.
pub fn finish(mut all: Vec<Tracing>) -> anyhow::Result<Vec<Counts>> {
    all.iter_mut().try_for_each(Tracing::stop)?;
    all.into_iter().map(Tracing::counts).collect()
}

impl Tracing {
    fn stop(&mut self) -> anyhow::Result<()> {
        if matches!(self.out, Out::Perf(_)) {
            self.tell_perf("disable")?;
        }
        Ok(rustix::process::kill_process(Pid::from_child(&self.child), Signal::INT)?)
    }

    fn counts(mut self) -> anyhow::Result<Counts> {
        match &mut self.out {
            Out::Perf(_) => {
                let mut said = String::new();
                self.child.stderr.take().context("its figures")?.read_to_string(&mut said)?;
                of_perf(&said)
            }
            Out::Strace { summary, messages } => {
                messages.read_to_string(&mut String::new())?;
                self.child.wait()?;
                of_strace(&std::fs::read_to_string(summary)?)
            }
        }
    }

    /// Gives an order, and waits until it has been carried out.
    fn tell_perf(&mut self, order: &str) -> anyhow::Result<()> {
        let Out::Perf(answers) = &mut self.out else { bail!("only perf takes orders") };
        let orders = self.child.stdin.as_mut().context("its input")?;
        writeln!(orders, "{order}")?;
        let mut answer = String::new();
        answers.read_line(&mut answer)?;
        // The byte that ends its string comes, too.
        ensure!(answer.trim_matches(['\0', '\n']) == "ack", "it does not take the order {order}: {answer:?}");
        Ok(())
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        // SIGINT, so that strace lets go of whom it traces.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = rustix::process::kill_process(Pid::from_child(&self.child), Signal::INT);
        }
        let _ = self.child.wait();
    }
}

/// Of `perf stat -x ,`: count, unit, event, time, share of it that was counted.
fn of_perf(said: &str) -> anyhow::Result<Counts> {
    let mut counts = Counts::new();
    for line in said.lines() {
        let fields: Vec<&str> = line.split(',').collect();
        let [count, _, event, _, share, ..] = fields[..] else { continue };
        let name = match event.split_once("sys_enter") {
            Some(("raw_syscalls:", "")) => ALL,
            Some(("syscalls:", name)) => name.trim_start_matches('_'),
            _ => continue,
        };
        let count = count.parse().with_context(|| format!("{event}: not a count: {count}"))?;
        let share: f64 = share.parse().with_context(|| format!("{event}: not a share: {share}"))?;
        ensure!(count == 0 || share > 99.0, "{event} was counted {share} % of the time");
        counts.insert(name.to_owned(), count);
    }
    ensure!(counts.contains_key(ALL), "perf says {:?}", first_line(said));
    Ok(counts)
}

/// Of `strace -c`: share, seconds, µs for each, calls, errors if any, name.
fn of_strace(said: &str) -> anyhow::Result<Counts> {
    let mut counts = Counts::new();
    for line in said.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, _, _, calls, .., name] = fields[..] else { continue };
        let Ok(calls) = calls.parse() else { continue };
        let name = if name == "total" { ALL } else { name };
        counts.insert(name.to_owned(), calls);
    }
    // Without any call there is no table.
    counts.entry(ALL.to_owned()).or_default();
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_perf_have_the_names_of_calls() {
        let said = "Events disabled\nEvents enabled\nEvents disabled\n\
                    188,,raw_syscalls:sys_enter,9457327,100.00,,\n\
                    7,,syscalls:sys_enter_futex,9457327,100.00,,\n\
                    0,,syscalls:sys_enter_io_uring_enter,0,0.00,,\n";
        let counts = of_perf(said).unwrap();
        assert_eq!(
            counts.into_iter().collect::<Vec<_>>(),
            [(ALL.to_owned(), 188), ("futex".to_owned(), 7), ("io_uring_enter".to_owned(), 0)]
        );
        let shared = "188,,raw_syscalls:sys_enter,9457327,57.12,,\n";
        assert!(of_perf(shared).unwrap_err().to_string().contains("57.12"), "an estimate is no count");
        let refused = "<not supported>,,raw_syscalls:sys_enter,0,100.00,,\n";
        assert!(of_perf(refused).is_err());
        assert!(of_perf("event syntax error: 'x'\n").unwrap_err().to_string().contains("syntax"));
    }

    #[test]
    fn counts_of_strace_are_found_with_and_without_errors() {
        let said = "% time     seconds  usecs/call     calls    errors syscall\n\
                    ------ ----------- ----------- --------- --------- ----------------\n \
                     85.71    0.000012           3         4           futex\n \
                     14.29    0.000002           1         2         1 read\n\
                    ------ ----------- ----------- --------- --------- ----------------\n\
                    100.00    0.000014           2         6         1 total\n";
        let counts = of_strace(said).unwrap();
        assert_eq!(
            counts.into_iter().collect::<Vec<_>>(),
            [(ALL.to_owned(), 6), ("futex".to_owned(), 4), ("read".to_owned(), 2)]
        );
        assert_eq!(of_strace("").unwrap()[ALL], 0);
    }

    #[test]
    fn what_this_machine_has_counts_the_calls_of_another_process() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for tracer in [Tracer::perf(), Tracer::Strace] {
            if let Err(error) = tracer.try_out(dir.path()) {
                eprintln!("skipped: {}: {error:#}", tracer.name());
                continue;
            }
            let counts = tracer.count_echoes(100, dir.path()).unwrap();
            // The last of them may not have been begun, or the first have been before.
            assert!((99..=101).contains(&counts["read"]) && counts["write"] == 100, "{counts:?}");
            assert!(counts[ALL] >= 199, "{counts:?}");
        }
    }
}
