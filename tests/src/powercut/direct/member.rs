//! The disk of one member of three fails. A trial looks what that member does, that nobody counts on what it did not
//! write, and that it comes back.
//!
//! With a failed write, flush or read the third member is down meanwhile. So whatever is acknowledged is on the disk
//! that fails, and must still be there when the other one that had it is gone.

use super::rig::DirectRig;
use crate::powercut::disk::{Effect, On, Survival, Trigger};
use crate::powercut::trial::{ENGINE_FLAGS, MEMBERS, Machine, attempt};
use crate::process::{Cluster, EngineFlags, PATIENCE, Program};
use crate::sim::rng::Rng;
use anyhow::{Context, Result, bail, ensure};
use ringraft::runtime::Backend;
use std::time::{Duration, Instant};

/// A disk that hangs stops its member soon.
const FLAGS: EngineFlags = EngineFlags { disk_stall_stop_ms: 3_000, ..ENGINE_FLAGS };

/// Streams of a load.
const STREAMS: u64 = 32;

/// Operations of the disk that pass before one fails, at most. A segment takes some 130 writes, and a few flushes.
const WRITES: u64 = 400;
const FLUSHES: u64 = 12;
const READS: u64 = 30;

/// Writes and flushes that a member may have had under way, or begun, before it learned that one had failed.
const UNDER_WAY: u64 = 12;

/// After this, nothing that is to come is taken to come.
const QUIET: Duration = Duration::from_millis(400);

/// How the disk fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Failure {
    /// A write fails with EIO, and part of it is done.
    Write,
    /// A flush fails with EIO, what it was to flush may be gone, and the next one succeeds.
    Flush,
    /// A read of a start fails with EIO.
    Read,
    /// There is no space for more files, nor for larger ones, and later there is again.
    Full,
    /// The disk never answers again.
    Hang,
}

/// What happened.
#[derive(Clone, Debug)]
pub struct Report {
    /// The trial's seed: it decides whose disk fails and at which operation, but not the members' timing.
    pub seed: u64,
    /// The member whose disk fails.
    pub victim: u64,
    /// It was the leader.
    pub was_leader: bool,
    /// The disk has failed an operation, or left it without an answer. Without that the trial has tried nothing.
    pub exercised: bool,
    /// It is the last of so many trials of its kind, and in those before the disk failed nothing.
    pub attempts: u64,
    /// What it said when it ended, if it did.
    pub died: Option<String>,
    /// Acknowledged commands, of all members.
    pub acked: usize,
    /// What is wrong.
    pub wrong: Option<String>,
    /// How long it took.
    pub took: Duration,
}

/// Runs the trial of `seed`, with members run by `program`, and others like it as long as the disk has failed nothing: at most
/// [`ATTEMPTS`](crate::powercut::trial::ATTEMPTS). The report is that of the last one.
///
/// # Errors
/// When the rig does not work. What is wrong with the members is in the report.
pub fn run(
    rig: &mut DirectRig,
    program: &Program,
    backend: Backend,
    failure: Failure,
    seed: u64,
) -> Result<Report> {
    let is_leader = |seed| fails_leader(&mut Rng::new(seed), failure);
    attempt(seed, is_leader, |seed, attempts| {
        let report = Report { attempts, ..run_once(rig, program, backend, failure, seed)? };
        let is_over = report.exercised || report.wrong.is_some();
        Ok((report, is_over))
    })
}

fn fails_leader(rng: &mut Rng, failure: Failure) -> bool {
    rng.chance(500_000) && failure != Failure::Read
}

fn run_once(
    rig: &mut DirectRig,
    program: &Program,
    backend: Backend,
    failure: Failure,
    seed: u64,
) -> Result<Report> {
    let started = Instant::now();
    rig.reset()?;
    let engine = EngineFlags { backend, ..FLAGS };
    let cluster = Cluster::stopped(program.clone(), engine, rig.directory(), MEMBERS)?;
    let mut rng = Rng::new(seed);
    let was_leader = fails_leader(&mut rng, failure);
    let mut trial = Trial { rig, rng, cluster, streams: 0, loading: None, victim: 0, was_leader, died: None };
    let outcome = trial.run(failure);
    trial.kill_all()?;
    let refused = trial.rig.disk().stats()?.refused;
    Ok(Report {
        seed,
        victim: trial.victim,
        was_leader,
        exercised: refused > 0,
        attempts: 1,
        died: trial.died.take(),
        acked: trial.cluster.ledger().acked.len(),
        wrong: outcome.err().map(|wrong| format!("{wrong:#}")),
        took: started.elapsed(),
    })
}

struct Trial<'a> {
    rig: &'a mut DirectRig,
    rng: Rng,
    cluster: Cluster,
    /// Streams used so far: each load has its own.
    streams: u64,
    /// Who was told to load last.
    loading: Option<u64>,
    victim: u64,
    was_leader: bool,
    died: Option<String>,
}

impl Trial<'_> {
    fn run(&mut self, failure: Failure) -> Result<()> {
        for id in 1..=MEMBERS {
            self.cluster.spawn(id)?;
        }
        for id in 1..=MEMBERS {
            self.cluster.wait_ready(id)?;
        }
        let leader = self.load()?;
        let follower = 1 + leader % MEMBERS;
        let third = 1 + follower % MEMBERS;
        let other = if self.was_leader { follower } else { leader };
        self.victim = if self.was_leader { leader } else { follower };
        match failure {
            Failure::Write => self.fails(On::Write, WRITES, other, third)?,
            Failure::Flush => self.fails(On::Flush, FLUSHES, other, third)?,
            Failure::Read => self.cannot_read()?,
            Failure::Full => self.is_full(leader)?,
            Failure::Hang => self.hangs()?,
        }
        self.load()?;
        self.stop_load()?;
        self.cluster.verify()
    }

    fn under(&self) -> String {
        format!("node-{}", self.victim)
    }

    fn arm(&mut self, on: On, within: u64) -> Result<()> {
        let after = self.rng.below(within);
        let trigger = Trigger { on, after, cached_min: 0, effect: Effect::Error };
        let under = self.under();
        self.rig.disk().arm_under(&under, trigger)
    }

    /// Of the members that run, finds the leader, and returns once it acknowledges a new load.
    fn load(&mut self) -> Result<u64> {
        for _ in 0..10 {
            self.stop_load()?;
            let leader = self.cluster.wait_leader()?;
            self.loading = Some(leader);
            self.cluster.order(leader, &format!("load {} {STREAMS}", self.streams))?;
            self.streams += STREAMS;
            let before = self.cluster.ledger().acked.len();
            let deadline = Instant::now() + Duration::from_secs(10);
            while Instant::now() < deadline {
                if self.cluster.ledger().acked.len() > before + 200 {
                    return Ok(leader);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            // It led no more when the order came.
        }
        bail!("nothing new is acknowledged")
    }

    /// Ends the load, if who was told to load still runs.
    fn stop_load(&mut self) -> Result<()> {
        match self.loading.take().filter(|id| self.cluster.running().contains(id)) {
            Some(id) => self.cluster.stop_load(id),
            None => Ok(()),
        }
    }

    fn fails(&mut self, on: On, within: u64, other: u64, third: u64) -> Result<()> {
        self.cluster.kill(third)?;
        self.arm(on, within)?;
        self.dies("Log(Disk {", &["kind: Io"])?;
        let before = self.acked_at_rest()?;
        std::thread::sleep(QUIET);
        ensure!(self.acked() == before, "commands are acknowledged that one member alone has");
        let after = self.rig.disk().stats()?.after_error;
        ensure!(after <= UNDER_WAY, "{after} writes and flushes came after one had failed");
        // What was acknowledged is on the disk that failed, and with certainty only there.
        self.cluster.kill(other)?;
        self.cluster.restart(self.victim)?;
        self.cluster.restart(third)?;
        self.cluster.wait_leader()?;
        self.load()?;
        self.stop_load()?;
        self.cluster.verify()?;
        self.cluster.restart(other)
    }

    fn cannot_read(&mut self) -> Result<()> {
        self.cluster.kill(self.victim)?;
        self.arm(On::Read, READS)?;
        self.cluster.spawn(self.victim)?;
        // It may refuse to start, by name, or start and let its peers repair it.
        if self.cluster.wait_ready(self.victim).is_err() {
            let status = self.cluster.wait_exit(self.victim)?;
            ensure!(status.code().is_some_and(|code| code != 0), "it ended with {status}");
            self.died = Some(status.to_string());
            self.cluster.restart(self.victim)?;
        }
        Ok(())
    }

    fn is_full(&mut self, leader: u64) -> Result<()> {
        let before = self.cluster.status(leader)?;
        let under = self.under();
        self.rig.disk().strike_under(&under, Effect::Full)?;
        if self.was_leader {
            // It lets one lead that has space, commands go on there, and it lives on.
            self.another_leads(before.term)?;
            self.load()?;
            self.cluster.status(leader).context("the member lives on")?;
        } else {
            // The other two go on, well past what the full one has room for.
            self.cluster.wait_acks(20_000)?;
            self.cluster.status(self.victim).context("the member lives on")?;
        }
        self.rig.disk().strike_under(&under, Effect::Free)?;
        self.cluster.wait_acks(500).context("there is space again")?;
        self.stop_load()?;
        self.cluster.wait_converged()?;
        Ok(())
    }

    /// Waits until another member leads a later term.
    fn another_leads(&mut self, term: u64) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            ensure!(Instant::now() < deadline, "nobody else leads");
            let mut others = self.cluster.running();
            others.retain(|id| *id != self.victim);
            let statuses: Vec<_> =
                others.into_iter().map(|id| self.cluster.status(id)).collect::<Result<_>>()?;
            if statuses.iter().any(|status| status.role == "Leader" && status.term > term) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn hangs(&mut self) -> Result<()> {
        let before = self.cluster.status(self.victim)?;
        let under = self.under();
        self.rig.disk().strike_under(&under, Effect::Hang)?;
        if self.was_leader {
            // It steps down, and another leads, long before it ends.
            self.another_leads(before.term)?;
        }
        self.dies("DiskStalled {", &[])?;
        self.load()?;
        self.stop_load()?;
        // The hung disk is replaced by a loss of power, and keeps what it had.
        self.kill_all()?;
        let seed = self.rng.bits();
        self.rig.power_on(seed, Survival::Random)?;
        for id in 1..=MEMBERS {
            self.cluster.spawn(id)?;
        }
        for id in 1..=MEMBERS {
            self.cluster.wait_ready(id)?;
        }
        Ok(())
    }

    /// The victim says by name why it ends, and ends, with a status that is not 0.
    fn dies(&mut self, error: &str, details: &[&str]) -> Result<()> {
        let said = self.cluster.wait_line(self.victim, "died ")?;
        let named = said.strip_prefix("died ").is_some_and(|named| named.starts_with(error));
        ensure!(named && details.iter().all(|detail| said.contains(detail)), "it says {said:?}");
        self.died = Some(said);
        let status = self.cluster.wait_exit(self.victim)?;
        ensure!(status.code().is_some_and(|code| code != 0), "it ended with {status}");
        Ok(())
    }

    fn acked(&self) -> usize {
        self.cluster.ledger().acked.len()
    }

    /// How many commands are acknowledged, once no more acknowledgements are on their way through pipes.
    fn acked_at_rest(&self) -> Result<usize> {
        let deadline = Instant::now() + PATIENCE;
        let mut before = self.acked();
        while Instant::now() < deadline {
            std::thread::sleep(QUIET);
            let now = self.acked();
            if now == before {
                return Ok(now);
            }
            before = now;
        }
        bail!("commands are still acknowledged")
    }

    /// One that waits for a disk that does not answer does not end before its requests fail.
    fn kill_all(&mut self) -> Result<()> {
        self.rig.disk().strike(Effect::Cut)?;
        self.cluster.signal_all()?;
        self.rig.disk().release()?;
        self.cluster.kill_all()
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        // The members are killed next.
        let _ = self.kill_all();
    }
}
