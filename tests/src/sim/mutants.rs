//! The known bugs of all crates, put back one at a time: the simulator must notice each.

use super::node::Cluster;
use super::world::{Options, run};
use ringraft::mutants::{self as engine, Mutant as EngineMutant};
use ringraft_wal::mutants::{self as log, Mutant as LogMutant};
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A known bug of one of the crates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// Of core or driver.
    Engine(EngineMutant),
    /// Of the log.
    Log(LogMutant),
}

impl Bug {
    /// All that a cluster of nodes can show. Three bugs of the core are left to the core's own simulation:
    ///
    /// A cut that is forgotten, an acknowledgement behind it that only a node has that is lost next, and an election before
    /// that one is back (`ClaimEndsAtVoidEnd`) come together in one of some ten thousand runs here; the core's own simulation
    /// seeks them.
    ///
    /// The log never hands the core a completion from before a truncation under an older epoch
    /// (`LateCompletionCounted`); the log has a bug like it.
    ///
    /// Within a session, answers arrive in the order in which they were given, and a new session begins with nothing
    /// matched. A rejection that comes late (`StaleRejectionTaken`) was therefore given after whatever the leader counts as
    /// matched: the follower's log held that, and its hint, which is the end of its log up to the rejected position and no
    /// later term, lies at or above it. So the position that is tried next is the one that the mended code tries, and only
    /// something is sent twice.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let engine = EngineMutant::ALL
            .into_iter()
            .chain(EngineMutant::CLUSTER)
            .chain(EngineMutant::READS)
            .chain(EngineMutant::SESSIONS)
            .chain(EngineMutant::SNAPSHOT)
            .chain(EngineMutant::SNAPSHOT_DRIVER)
            .chain(EngineMutant::REPAIR)
            .chain(EngineMutant::MEMBERSHIP);
        let cores = [
            EngineMutant::LateCompletionCounted,
            EngineMutant::StaleRejectionTaken,
            EngineMutant::ClaimEndsAtVoidEnd,
        ];
        let engine = engine.filter(|mutant| !cores.contains(mutant)).map(Self::Engine);
        engine.chain(LogMutant::ALL.into_iter().map(Self::Log)).collect()
    }

    /// The bug of this name, written in any case, with or without dashes.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let plain = |text: &str| text.replace(['-', '_'], "").to_lowercase();
        Self::all().into_iter().find(|bug| plain(&bug.to_string()) == plain(name))
    }

    /// The options with which it is looked for: what only some runs have, and it needs, all of them have, where that was not
    /// decided.
    #[must_use]
    pub fn options(self, options: &Options) -> Options {
        let mut options = options.clone();
        let decided = options.changes.is_some() || options.disk_faults.is_some();
        match self {
            Self::Engine(mutant) if EngineMutant::MEMBERSHIP.contains(&mutant) && !decided => {
                (options.changes, options.disk_faults) = (Some(true), Some(false));
            }
            Self::Engine(mutant) if EngineMutant::REPAIR.contains(&mutant) && !decided => {
                options.disk_faults = Some(true);
            }
            Self::Engine(EngineMutant::LastVoterElectsItselfWithinLease) if !decided => {
                (options.changes, options.disk_faults) = (Some(true), Some(false));
            }
            _ => {}
        }
        options
    }

    /// Puts one bug back for this thread, or none.
    pub fn set(bug: Option<Self>) {
        engine::set(match bug {
            Some(Self::Engine(mutant)) => Some(mutant),
            _ => None,
        });
        log::set(match bug {
            Some(Self::Log(mutant)) => Some(mutant),
            _ => None,
        });
    }
}

impl fmt::Display for Bug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Engine(mutant) => format!("{mutant:?}"),
            Self::Log(mutant) => format!("{mutant:?}"),
        };
        for (at, letter) in name.char_indices() {
            if letter.is_uppercase() && at > 0 {
                f.write_str("-")?;
            }
            write!(f, "{}", letter.to_lowercase())?;
        }
        Ok(())
    }
}

/// How a bug fared.
#[derive(Clone, Debug)]
pub struct Caught {
    /// The bug.
    pub bug: Bug,
    /// How many seeds were run until one noticed, and the first line of what it said.
    pub by: Option<(u64, String)>,
}

/// Runs seeds from 0 on with each of `bugs` put back, until one notices or `seeds_max` did not.
pub fn hunt<C: Cluster>(
    make: impl Fn() -> C + Sync,
    bugs: &[Bug],
    seeds_max: u64,
    options: &Options,
    threads: usize,
    told: impl Fn(&Caught) + Sync,
) -> Vec<Caught> {
    let next = AtomicUsize::new(0);
    let all = Mutex::new(Vec::new());
    let work = || {
        let cluster = make();
        while let Some(bug) = bugs.get(next.fetch_add(1, Ordering::Relaxed)) {
            Bug::set(Some(*bug));
            let options = &bug.options(options);
            let by = (0..seeds_max).find_map(|seed| {
                let failure = run(&cluster, seed, options).failure?;
                // A seed that fails without the bug has not noticed it.
                Bug::set(None);
                let noticed = run(&cluster, seed, options).failure.is_none();
                Bug::set(Some(*bug));
                noticed.then(|| (seed + 1, failure.message.lines().next().unwrap_or_default().to_owned()))
            });
            Bug::set(None);
            let caught = Caught { bug: *bug, by };
            told(&caught);
            all.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(caught);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    let mut all = all.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    all.sort_by_key(|caught| bugs.iter().position(|bug| *bug == caught.bug));
    all
}

/// The median of the seeds that were needed, the higher one of two; a bug that was not caught needs more than any other.
#[must_use]
pub fn seeds_median(all: &[Caught]) -> Option<u64> {
    let mut seeds: Vec<u64> =
        all.iter().map(|caught| caught.by.as_ref().map_or(u64::MAX, |by| by.0)).collect();
    seeds.sort_unstable();
    seeds.get(seeds.len() / 2).copied().filter(|seeds| *seeds < u64::MAX)
}

/// Bug, seeds, and what was noticed, for people.
#[must_use]
pub fn table(all: &[Caught]) -> String {
    let mut out = format!("{:<34}{:>6}  {}\n", "bug", "seeds", "noticed as");
    for Caught { bug, by } in all {
        let (seeds, why) = match by {
            Some((seeds, why)) => (seeds.to_string(), why.as_str()),
            None => ("-".to_owned(), "NOT CAUGHT"),
        };
        let why: String = why.chars().take(100).collect();
        out += &format!("{:<34}{seeds:>6}  {why}\n", bug.to_string());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bug_is_found_by_its_name() {
        assert_eq!(Bug::Log(LogMutant::HardStateInOneCopy).to_string(), "hard-state-in-one-copy");
        for bug in Bug::all() {
            assert_eq!(Bug::named(&bug.to_string()), Some(bug));
        }
        assert_eq!(Bug::named("no-such-bug"), None);
    }

    #[test]
    fn the_median_takes_a_bug_that_was_not_caught_for_the_worst() {
        let caught =
            |seeds: Option<u64>| Caught { bug: Bug::all()[0], by: seeds.map(|seeds| (seeds, String::new())) };
        assert_eq!(seeds_median(&[]), None);
        assert_eq!(seeds_median(&[caught(Some(9)), caught(Some(1)), caught(None)]), Some(9));
        assert_eq!(seeds_median(&[caught(Some(9)), caught(None), caught(None)]), None);
    }
}
