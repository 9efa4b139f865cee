//! One trial: a new file system and a new cluster, one or two power cuts, and a check of what was acknowledged.

use super::disk::{Effect, On, Stats, Survival, Survived, Trigger};
use super::rig::Boot;
use super::server::Server;
use crate::process::{Cluster, EngineFlags, Lost, Program};
use crate::sim::rng::Rng;
use anyhow::{Result, bail};
use ringraft::runtime::Backend;
use std::path::Path;
use std::time::{Duration, Instant};

/// As small as the configuration allows with batches of this size: a trial zero-fills less and rolls over more.
pub const ENGINE_FLAGS: EngineFlags = EngineFlags {
    backend: Backend::Glommio,
    segment_bytes: 1 << 20,
    segments_ahead: 1,
    batch_bytes_max: 32 << 10,
    command_bytes_max: 16 << 10,
    disk_stall_stop_ms: 30_000,
};

/// Members of a cluster.
pub(super) const MEMBERS: u64 = 3;
const STREAMS: u64 = 64;

/// Writes and flushes of the disk between the moment a cut is armed and the cut, at most. Three members form with some
/// 200, and a second of load makes some 2,500.
const CUT_AFTER_STARTING: u64 = 200;
const CUT_AFTER_LOAD: u64 = 2_500;
const CUT_AFTER_FAULT: u64 = 20;

/// A cut that is armed and has not come by now is made: a cluster without work writes nothing.
const CUT_PATIENCE: Duration = Duration::from_secs(2);

/// How long a failed disk is left to the members before its power is cut.
const FAULT_LASTS: Duration = Duration::from_millis(300);

/// A trial that did not meet its fault is repeated so often, with other seeds.
pub const ATTEMPTS: u64 = 8;

/// How long a new load is given before its leader is taken to have changed.
const LOAD_PATIENCE: Duration = Duration::from_secs(10);

/// What else is wrong with the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Fault {
    /// Nothing: power cuts only.
    #[default]
    None,
    /// A write fails with EIO, and the power is cut a little later.
    ErrorWrite,
    /// A flush fails with EIO, and the power is cut a little later.
    ErrorFlush,
    /// The disk is full, and the power is cut a little later.
    Full,
    /// The disk never answers again until the power is cut.
    Hang,
    /// The control: the disk acknowledges flushes and does nothing from some moment under load on, and keeps nothing
    /// that it has not written. Acknowledged commands are lost.
    Lie,
}

/// When the power is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// While the members start: format or recover, meet, elect.
    Starting,
    /// While commands are being acknowledged.
    UnderLoad,
}

/// How a trial ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing acknowledged is lost, and all members have the same.
    Sound,
    /// Acknowledged commands are lost.
    Lost(String),
    /// The members do not recover, or disagree.
    Broken(String),
    /// The kernel refuses its own file system after the cut, in each attempt: nothing was tried.
    NoFileSystem(String),
}

/// What happened in a trial.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its seed. It decides the moments of the cuts and what survives of the cache, but the members' timing is their
    /// own: the same seed is a similar trial, not the same.
    pub seed: u64,
    /// The cuts.
    pub moments: Vec<Moment>,
    /// Acknowledged commands.
    pub acked: usize,
    /// Writes to the disk.
    pub writes: u64,
    /// Flushes of the disk.
    pub flushes: u64,
    /// Operations that its fault refused, besides the cuts.
    pub refused: u64,
    /// It met its fault: writes that nobody had flushed were dropped, or an operation was refused. Without that it has tried nothing.
    pub exercised: bool,
    /// It is the last of so many trials of its kind, and those before did not meet their fault.
    pub attempts: u64,
    /// What became of the writes in its cache, in all cuts.
    pub survived: Survived,
    /// The end of it.
    pub verdict: Verdict,
    /// How long it took.
    pub took: Duration,
}

/// What loses its power in a trial.
pub trait Machine {
    /// Puts the new file system back, without faults. It is not mounted.
    ///
    /// # Errors
    /// When the old one is in use.
    fn reset(&mut self) -> Result<()>;

    /// Mounts the file system as it is now, if that is not done yet.
    ///
    /// # Errors
    /// When there is no device for it.
    fn boot(&mut self) -> Result<Boot>;

    /// Where the file system is mounted.
    fn directory(&self) -> &Path;

    /// Orders of the disk.
    fn disk(&mut self) -> &mut Server;

    /// Puts the power on again once it has been cut and nobody uses the file system: what survives is decided by
    /// `seed`. The file system is not mounted then.
    ///
    /// # Errors
    /// When the file system is in use.
    fn power_on(&mut self, seed: u64, survival: Survival) -> Result<Survived>;

    /// A cut waits until the cache holds a number of writes below this, and one at least.
    fn cached_at_cut(&self) -> u64;
}

/// Runs the trial of `seed`, with members run by `program`, and others like it as long as none has met its fault: at most
/// [`ATTEMPTS`]. The report is that of the last one.
///
/// # Errors
/// When the rig does not work. What is wrong with the members is in the report.
pub fn run(
    rig: &mut impl Machine,
    program: &Program,
    backend: Backend,
    fault: Fault,
    seed: u64,
) -> Result<Report> {
    attempt(
        seed,
        |seed| moments(&mut Rng::new(seed), fault),
        |seed, attempts| {
            let report = Report { attempts, ..run_once(rig, program, backend, fault, seed)? };
            let is_over = match report.verdict {
                Verdict::Sound => report.exercised,
                Verdict::Lost(_) | Verdict::Broken(_) => true,
                Verdict::NoFileSystem(_) => false,
            };
            Ok((report, is_over))
        },
    )
}

/// Runs trials until one says that it is over, at most [`ATTEMPTS`], and returns the last: that of `seed`, and then of others
/// with which the trial is of the same kind.
pub(super) fn attempt<K: PartialEq, R>(
    seed: u64,
    kind: impl Fn(u64) -> K,
    mut run: impl FnMut(u64, u64) -> Result<(R, bool)>,
) -> Result<R> {
    let mut alike =
        (1..).map(|number| seed.wrapping_add(number << 32)).filter(|other| kind(*other) == kind(seed));
    let (mut next, mut attempts) = (seed, 1);
    loop {
        let (report, is_over) = run(next, attempts)?;
        if is_over || attempts == ATTEMPTS {
            return Ok(report);
        }
        attempts += 1;
        next = alike.next().unwrap_or(seed);
    }
}

/// Whether the trial met its fault.
fn is_exercised(fault: Fault, stats: &Stats, survived: &Survived) -> bool {
    match fault {
        Fault::None => survived.torn + survived.lost > 0,
        Fault::Lie => stats.lies > 0 && survived.lost > 0,
        Fault::ErrorWrite | Fault::ErrorFlush | Fault::Full | Fault::Hang => stats.refused > 0,
    }
}

fn run_once(
    rig: &mut impl Machine,
    program: &Program,
    backend: Backend,
    fault: Fault,
    seed: u64,
) -> Result<Report> {
    let started = Instant::now();
    rig.reset()?;
    if let Boot::Refused(error) = rig.boot()? {
        bail!("the kernel refuses a new file system: {error}");
    }
    let mut rng = Rng::new(seed);
    let moments = moments(&mut rng, fault);
    let engine = EngineFlags { backend, ..ENGINE_FLAGS };
    let cluster = Cluster::stopped(program.clone(), engine, rig.directory(), MEMBERS)?;
    let mut trial =
        Trial { rig, rng, fault, cluster, streams: 0, survived: Survived::default(), triggered: 0 };
    let verdict = trial.outcome(&moments)?;
    trial.kill_all()?;
    let acked = trial.cluster.ledger().acked.len();
    let stats = trial.rig.disk().stats()?;
    Ok(Report {
        seed,
        moments,
        acked,
        writes: stats.writes,
        flushes: stats.flushes,
        refused: stats.refused,
        exercised: is_exercised(fault, &stats, &trial.survived),
        attempts: 1,
        survived: trial.survived,
        verdict,
        took: started.elapsed(),
    })
}

fn moments(rng: &mut Rng, fault: Fault) -> Vec<Moment> {
    match (fault, rng.below(4)) {
        (Fault::None, 0) => vec![Moment::Starting, Moment::UnderLoad],
        (Fault::None, 1) => vec![Moment::UnderLoad, Moment::Starting],
        _ => vec![Moment::UnderLoad],
    }
}

struct Trial<'a, M: Machine> {
    rig: &'a mut M,
    rng: Rng,
    fault: Fault,
    cluster: Cluster,
    /// Streams used so far: each load has its own.
    streams: u64,
    survived: Survived,
    triggered: u64,
}

impl<M: Machine> Trial<'_, M> {
    fn outcome(&mut self, moments: &[Moment]) -> Result<Verdict> {
        for moment in moments {
            match moment {
                Moment::Starting => self.cut_while_starting()?,
                Moment::UnderLoad => {
                    if let Err(error) = self.start_and_load() {
                        return Ok(Verdict::Broken(format!("{error:#}")));
                    }
                    self.cut_under_load()?;
                }
            }
            if let Boot::Refused(error) = self.power_returns()? {
                return Ok(Verdict::NoFileSystem(error.to_string()));
            }
        }
        let checked = self.start_and_load().and_then(|leader| {
            self.cluster.stop_load(leader)?;
            self.cluster.verify()
        });
        Ok(match checked {
            Ok(()) => Verdict::Sound,
            Err(error) if error.is::<Lost>() => Verdict::Lost(error.to_string()),
            Err(error) => Verdict::Broken(format!("{error:#}")),
        })
    }

    fn cut_while_starting(&mut self) -> Result<()> {
        let after = self.rng.below(CUT_AFTER_STARTING);
        self.arm_cut(after)?;
        for id in 1..=MEMBERS {
            self.cluster.spawn(id)?;
        }
        self.wait_cut()
    }

    /// Starts all members, and returns the leader once it acknowledges a new load.
    fn start_and_load(&mut self) -> Result<u64> {
        for id in 1..=MEMBERS {
            self.cluster.spawn(id)?;
        }
        for id in 1..=MEMBERS {
            self.cluster.wait_ready(id)?;
        }
        let wanted = self.cluster.ledger().acked.len() + self.rng.between(50, 500) as usize;
        for _ in 0..10 {
            let leader = self.cluster.wait_leader()?;
            self.cluster.order(leader, &format!("load {} {STREAMS}", self.streams))?;
            self.streams += STREAMS;
            if self.acked(wanted) {
                return Ok(leader);
            }
            self.cluster.stop_load(leader)?;
        }
        bail!("{} acknowledged, {wanted} wanted", self.cluster.ledger().acked.len())
    }

    fn acked(&self, wanted: usize) -> bool {
        let deadline = Instant::now() + LOAD_PATIENCE;
        while self.cluster.ledger().acked.len() < wanted {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    fn cut_under_load(&mut self) -> Result<()> {
        let after = self.rng.below(CUT_AFTER_LOAD);
        if self.fault == Fault::Lie {
            self.rig.disk().strike(Effect::Lie)?;
            let wanted = self.cluster.ledger().acked.len() + 200;
            self.acked(wanted);
        }
        let first = match self.fault {
            Fault::None | Fault::Lie => None,
            Fault::ErrorWrite => Some((On::Write, Effect::Error)),
            Fault::ErrorFlush => Some((On::Flush, Effect::Error)),
            Fault::Full => Some((On::Write, Effect::Full)),
            Fault::Hang => Some((On::Any, Effect::Hang)),
        };
        if let Some((on, effect)) = first {
            self.rig.disk().arm(Trigger { on, after, cached_min: 0, effect })?;
            self.triggered(CUT_PATIENCE)?;
            std::thread::sleep(FAULT_LASTS);
        }
        let after = if first.is_some() { self.rng.below(CUT_AFTER_FAULT) } else { after };
        self.arm_cut(after)?;
        self.wait_cut()
    }

    fn arm_cut(&mut self, after: u64) -> Result<()> {
        // Of an empty cache nothing can be lost.
        let cached_min = self.rng.between(1, self.rig.cached_at_cut() - 1);
        self.rig.disk().arm(Trigger { on: On::Any, after, cached_min, effect: Effect::Cut })
    }

    /// Waits for the cut that is armed, makes it in any case, and kills the members.
    fn wait_cut(&mut self) -> Result<()> {
        self.triggered(CUT_PATIENCE)?;
        self.rig.disk().strike(Effect::Cut)?;
        self.kill_all()
    }

    /// Kills the members. One that waits for a disk without power does not end before its requests fail.
    fn kill_all(&mut self) -> Result<()> {
        self.cluster.signal_all()?;
        self.rig.disk().release()?;
        self.cluster.kill_all()
    }

    /// Whether one more trigger comes to pass in that time.
    fn triggered(&mut self, patience: Duration) -> Result<bool> {
        let deadline = Instant::now() + patience;
        loop {
            let triggered = self.rig.disk().stats()?.triggered;
            if triggered > self.triggered {
                self.triggered = triggered;
                return Ok(true);
            }
            if Instant::now() > deadline {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn power_returns(&mut self) -> Result<Boot> {
        let survival = if self.fault == Fault::Lie { Survival::None } else { Survival::Random };
        let survived = self.rig.power_on(self.rng.bits(), survival)?;
        self.survived.kept += survived.kept;
        self.survived.torn += survived.torn;
        self.survived.lost += survived.lost;
        self.rig.boot()
    }
}

impl<M: Machine> Drop for Trial<'_, M> {
    fn drop(&mut self) {
        // The members are killed next. One that waits for a hung disk would not end before its power is cut.
        let _ = self.rig.disk().strike(Effect::Cut);
        let _ = self.rig.disk().release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The cut came after everything was flushed, or the error was never hit, and the trial passed for one that had tried something.
    #[test]
    fn a_trial_that_did_not_meet_its_fault_is_made_again_with_seeds_alike_and_not_for_ever() {
        let kind = |seed| moments(&mut Rng::new(seed), Fault::None);
        for seed in 1..20 {
            for needed in 1..=ATTEMPTS + 1 {
                let mut seeds = Vec::new();
                let last = attempt(seed, kind, |seed, number| {
                    seeds.push(seed);
                    Ok((number, number == needed))
                });
                assert_eq!(last.unwrap(), needed.min(ATTEMPTS));
                assert_eq!((seeds[0], seeds.len() as u64), (seed, needed.min(ATTEMPTS)));
                assert!(seeds.iter().all(|other| kind(*other) == kind(seed)), "{seeds:?}");
                assert!(seeds.is_sorted_by(|one, other| one < other), "another each time: {seeds:?}");
            }
        }
    }

    #[test]
    fn a_trial_has_met_its_fault_when_something_was_dropped_or_refused() {
        let nothing = (Stats::default(), Survived { kept: 9, ..Survived::default() });
        let dropped = |lost, torn| (Stats::default(), Survived { kept: 0, torn, lost });
        let refused = (Stats { refused: 1, ..Stats::default() }, nothing.1);
        let lied = |lost| (Stats { lies: 5, ..Stats::default() }, Survived { lost, ..Survived::default() });
        let met = |fault, (stats, survived)| is_exercised(fault, &stats, &survived);
        assert!(
            !met(Fault::None, nothing) && met(Fault::None, dropped(1, 0)) && met(Fault::None, dropped(0, 1))
        );
        assert!(!met(Fault::None, refused));
        assert!(!met(Fault::Lie, lied(0)) && met(Fault::Lie, lied(1)) && !met(Fault::Lie, dropped(1, 0)));
        for fault in [Fault::ErrorWrite, Fault::ErrorFlush, Fault::Full, Fault::Hang] {
            assert!(!met(fault, dropped(3, 3)) && met(fault, refused), "{fault:?}");
        }
    }
}
