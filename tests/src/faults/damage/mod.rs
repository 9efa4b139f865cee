//! Damage to the disks of a cluster that was down, or of a part of it: what must be healed is healed, and what cannot be stops
//! the cluster loudly.
//!
//! A *base* is the history of a small cluster, with elections, crashes and truncations in it, to a moment when all of it is
//! down; many *patterns* begin on copies of its disks. In most of them every committed batch keeps an intact copy: then
//! all nodes must come back, agree, hold all that was committed, and say that nothing is damaged any more; and so must their
//! disks. In some no copy of some committed batch is left: then no node may apply anything from there on, or acknowledge
//! anything, and every one must say why it waits or has stopped.

pub mod cluster;
pub mod pattern;

use super::threads::{Tally, split};
use crate::sim::buffer::SimBuf;
use crate::sim::check::History;
use crate::sim::context::{Context, MILLISECOND, SECOND};
use crate::sim::disk::{Crash, DiskState, SimDisk};
use crate::sim::rng::Rng;
use crate::sim::trace::Trace;
use cluster::{Cluster, NODES, PATIENCE, config};
use pattern::{Place, Survey, Verdict, draw, draw_loss, files_of, judge};
use ringraft_block::{LogIndex, Pool};
use ringraft_wal::disk::Disk;
use ringraft_wal::{Recovered, Wal, WalEvent};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

/// So many patterns begin on each base.
const PATTERNS_PER_BASE: u64 = 40;
/// At so many moments of a base's history the disks are kept as they are, to revert parts of them to.
const EARLIER_MOMENTS: u64 = 3;
/// One of so many patterns leaves no copy of some batch.
const GONE_EVERY: u64 = 10;

/// How many patterns there are.
#[derive(Clone, Debug)]
pub struct Options {
    /// Each seed is a pattern.
    pub seeds: Range<u64>,
    /// Whether every event is printed.
    pub trace: bool,
    /// Threads.
    pub threads: usize,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Patterns and violations.
    pub tally: Tally,
    /// Of those, patterns that left no copy of some batch.
    pub gone: u64,
    /// And patterns in which a node stopped because a quorum may have held a batch behind the committed ones.
    pub undecided: u64,
}

/// Runs patterns.
pub fn run(options: &Options, progress: impl Fn(u64) + Sync) -> Report {
    let (gone, undecided) = (AtomicU64::new(0), AtomicU64::new(0));
    let bases = options.seeds.start / PATTERNS_PER_BASE..options.seeds.end.div_ceil(PATTERNS_PER_BASE);
    let next = AtomicU64::new(bases.start);
    let tally = split(options.threads, |_| {
        let mut tally = Tally::default();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= bases.end {
                return tally;
            }
            let base = match caught(|| Ok(Base::new(number))) {
                Ok(base) => base,
                Err(wrong) => {
                    tally.violations.push(format!("base {number}: {wrong}"));
                    continue;
                }
            };
            let first = number * PATTERNS_PER_BASE;
            for seed in first.max(options.seeds.start)..(first + PATTERNS_PER_BASE).min(options.seeds.end) {
                let mut told = String::new();
                let outcome = caught(|| base.pattern(seed, options.trace, &mut told));
                match outcome {
                    Ok(Kind::Gone) => drop(gone.fetch_add(1, Ordering::Relaxed)),
                    Ok(Kind::Undecided) => drop(undecided.fetch_add(1, Ordering::Relaxed)),
                    Ok(Kind::Healed) | Err(_) => {}
                }
                let violation = outcome.err();
                tally.count(violation.map(|wrong| format!("seed {seed}: {wrong}\n  the damage:{told}")));
            }
            progress(number - bases.start + 1);
        }
    });
    Report { tally, gone: gone.into_inner(), undecided: undecided.into_inner() }
}

/// A panic is a violation like any other.
fn caught<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("panicked: {}", text.unwrap_or("without a message")))
    })
}

/// What a pattern was.
enum Kind {
    Healed,
    /// Every committed batch is there, but of a quorum of the disks nobody can tell where the log ended, and nodes stopped,
    /// or wait, and say so. The same disks, to the bit, could come from a cluster that had committed one more batch and then
    /// lost all copies of it, which must stop. So to go on here would be wrong, and to halt loudly is right. A cluster that
    /// halts although fewer than a quorum are in such doubt is a violation.
    Undecided,
    Gone,
}

/// A cluster that is down, and all that is known of it.
struct Base {
    disks: Vec<Rc<RefCell<DiskState>>>,
    surveys: Vec<Rc<Survey>>,
    history: Rc<RefCell<History>>,
    /// The client's next command.
    next: usize,
    /// The committed batches: their last indices and chains.
    committed: Vec<(u64, [u8; 16])>,
}

impl Base {
    fn new(number: u64) -> Self {
        let context = Context::new(Trace::new(false));
        let mut rng = Rng::new(number).fork(0xba5e);
        let history = History::new(&context, 1);
        let mut cluster = Cluster::new(&context, rng.fork(1), None, Rc::clone(&history), 0);
        for node in 0..NODES {
            cluster.boot(node);
        }
        assert!(
            cluster.run_until(PATIENCE, |cluster| cluster.leader().is_some()),
            "the cluster elects a leader"
        );
        let orders = rng.between(10, 60);
        // In some, the log goes on over several segments.
        let padding = [100, 1_000, 4_000, 4_000, 39_000][rng.index(5)];
        let crashes = [0, 30_000, 100_000][rng.index(3)];
        let mut earlier: Vec<_> = vec![Vec::new(); NODES];
        for order in 0..orders {
            if order % (orders / EARLIER_MOMENTS + 1) == 0 {
                for (earlier, machine) in earlier.iter_mut().zip(&cluster.machines) {
                    earlier.push(files_of(&machine.disk.borrow()));
                }
            }
            if rng.chance(crashes) {
                let how = if rng.chance(500_000) { Crash::Kill } else { Crash::PowerCut };
                let node = match cluster.leader() {
                    Some(leader) if rng.chance(600_000) => leader,
                    _ => rng.index(NODES),
                };
                if cluster.runs(node) {
                    cluster.crash(node, how);
                    cluster.run_for(rng.between(0, 200) * MILLISECOND);
                }
            }
            for node in 0..NODES {
                if !cluster.runs(node) && rng.chance(300_000) {
                    cluster.boot(node);
                }
            }
            if let Some(leader) = cluster.leader() {
                for _ in 0..rng.between(1, 6) {
                    cluster.propose(leader, rng.below(padding) as usize);
                }
            }
            cluster.run_for(rng.between(0, 3) * MILLISECOND);
        }
        if rng.chance(500_000) {
            // In half of the cases in the middle of it.
            for node in (0..NODES).filter(|node| !cluster.runs(*node)).collect::<Vec<_>>() {
                cluster.boot(node);
            }
            let settled =
                cluster.run_until(PATIENCE, |cluster| cluster.has_converged() && cluster.waiting() == 0);
            assert!(settled || history.borrow().failure().is_some(), "{}", cluster.describe());
        }
        cluster.sweep();
        let how = if rng.chance(500_000) { Crash::Kill } else { Crash::PowerCut };
        for node in 0..NODES {
            if cluster.runs(node) {
                cluster.crash(node, how);
            }
        }
        assert_eq!(history.borrow().failure(), None);
        let disks: Vec<_> = cluster.machines.iter().map(|machine| Rc::clone(&machine.disk)).collect();
        let survey = |(disk, earlier): (&Rc<RefCell<DiskState>>, _)| {
            Rc::new(Survey::of(&disk.borrow()).with_earlier(earlier))
        };
        let surveys = disks.iter().zip(earlier).map(survey).collect();
        let committed = committed_batches(&disks, &history.borrow());
        Self { disks, surveys, history, next: cluster.next, committed }
    }

    /// Draws the pattern of a seed and lives through it.
    fn pattern(&self, seed: u64, trace: bool, told: &mut String) -> Result<Kind, String> {
        let mut rng = Rng::new(seed).fork(0xda3a);
        let want_gone = seed % GONE_EVERY == GONE_EVERY - 1 && !self.committed.is_empty();
        let context = Context::new(Trace::new(trace));
        for _ in 0..1_000 {
            let mut places = Vec::new();
            if want_gone {
                let at = rng.index(self.committed.len());
                places = draw_loss(&mut rng, &self.surveys, &self.committed[at].1);
            }
            let damaged = 1 + rng.index(NODES);
            let first = rng.index(NODES);
            if !want_gone || rng.chance(300_000) {
                for node in (0..damaged).map(|position| (first + position) % NODES) {
                    let count = 1 + rng.index(4);
                    places.extend(draw(&mut rng, node, &self.surveys, count));
                }
            }
            let disks: Vec<_> = self.disks.iter().map(|disk| disk.borrow().fork(&context)).collect();
            for place in &places {
                disks[place.node].borrow_mut().damage(&place.file, place.offset, place.bytes, &place.rot);
            }
            let look = |(node, disk): (usize, &Rc<RefCell<DiskState>>)| {
                let damaged = places.iter().any(|place| place.node == node);
                if damaged { Rc::new(Survey::of(&disk.borrow())) } else { Rc::clone(&self.surveys[node]) }
            };
            let after: Vec<_> = disks.iter().enumerate().map(look).collect();
            let whole = after.iter().zip(&self.surveys).all(|(after, before)| after.is_whole(before));
            if whole && rng.chance(950_000) {
                continue;
            }
            *told = places.iter().map(|place| format!("\n    {}", place.describe())).collect();
            context.note(|| told.clone());
            if trace {
                for (node, disk) in disks.iter().enumerate() {
                    let copy = disk.borrow().durable_image(&Context::new(Trace::new(false)));
                    context.note(|| {
                        format!("node {node} would start with {}", describe_start(node, SimDisk::new(&copy)))
                    });
                }
            }
            let verdict = judge(&self.surveys, &after, &self.committed);
            match verdict {
                Verdict::Bound if !want_gone => {
                    let in_doubt = |node: &usize| {
                        let own: Vec<_> = places.iter().filter(|place| place.node == *node).collect();
                        self.surveys[*node].end_in_doubt(&after[*node], &own, &self.committed)
                    };
                    let doubts = (0..NODES).filter(in_doubt).count();
                    return self.heal(&context, &mut rng, disks, &places, doubts * 2 > NODES);
                }
                Verdict::Gone(gone) if want_gone => {
                    self.halt(&context, &mut rng, disks, &gone)?;
                    return Ok(Kind::Gone);
                }
                _ => {}
            }
        }
        Err("no such damage was found in a thousand draws".to_owned())
    }

    fn cluster(&self, context: &Rc<Context>, rng: &mut Rng, disks: Vec<Rc<RefCell<DiskState>>>) -> Cluster {
        let history = self.history.borrow().fork(context);
        Cluster::new(context, rng.fork(7), Some(disks), history, self.next)
    }

    /// Starts all nodes, or the undamaged ones first; all must be healed.
    fn heal(
        &self,
        context: &Rc<Context>,
        rng: &mut Rng,
        disks: Vec<Rc<RefCell<DiskState>>>,
        places: &[Place],
        doubtful: bool,
    ) -> Result<Kind, String> {
        let mut cluster = self.cluster(context, rng, disks);
        let damaged = |node: usize| places.iter().any(|place| place.node == node);
        let staged = rng.chance(400_000);
        for node in 0..NODES {
            if !staged || !damaged(node) {
                cluster.run_for(rng.below(5) * MILLISECOND);
                cluster.boot(node);
            }
        }
        let wait = rng.between(0, 600);
        cluster.run_for(if staged { wait * MILLISECOND } else { 0 });
        for node in 0..NODES {
            if !cluster.runs(node) && cluster.machines[node].stopped.is_none() {
                cluster.run_for(rng.below(50) * MILLISECOND);
                // Commits go on while a node is repaired.
                if let Some(leader) = cluster.leader() {
                    cluster.propose(leader, 500);
                }
                cluster.boot(node);
            }
        }
        let mut proposed = 0;
        cluster.acknowledged = 0;
        let healed = cluster.run_until(PATIENCE, |cluster| {
            if cluster.machines.iter().any(|machine| machine.stopped.is_some()) {
                return true;
            }
            if let Some(leader) = cluster.leader()
                && cluster.waiting() == 0
                && proposed < 3
            {
                proposed += 1;
                cluster.propose(leader, 500);
            }
            cluster.acknowledged > 0
                && cluster.waiting() == 0
                && cluster.has_converged()
                && (0..NODES).all(|node| lacks(cluster, node).is_none())
        });
        cluster.sweep();
        if let Some(failure) = cluster.history.borrow().failure() {
            return Err(format!("{failure}{}", cluster.describe()));
        }
        let healed_all = healed && cluster.machines.iter().all(|machine| machine.stopped.is_none());
        let stopped = |node: usize| cluster.machines[node].stopped.as_deref().is_some_and(says_gone);
        let waits = |node: usize| cluster.leader().is_none() && lacks(&cluster, node).is_some();
        if doubtful && !healed_all && (0..NODES).any(|node| stopped(node) || waits(node)) {
            return Ok(Kind::Undecided);
        }
        if !healed_all {
            return Err(format!("not healed{}", cluster.describe()));
        }
        // What is void by now is removed in the background.
        cluster.run_for(500 * MILLISECOND);
        self.held(&mut cluster).map(|()| Kind::Healed)
    }

    /// All that was committed is in every log, and on every disk.
    fn held(&self, cluster: &mut Cluster) -> Result<(), String> {
        for (index, chain) in &self.committed {
            for node in 0..NODES {
                let found = cluster.wal(node).and_then(|wal| wal.chain_at(LogIndex(*index)));
                if found.is_none_or(|found| found.0 != *chain) {
                    return Err(format!("node {node} has lost the committed batch that ends at {index}"));
                }
            }
        }
        for node in 0..NODES {
            let image = cluster.machines[node].disk.borrow().durable_image(&cluster.context);
            let held = stored_log(node, SimDisk::new(&image))?;
            for (index, chain) in &self.committed {
                if !held.contains(&(*index, *chain)) {
                    return Err(format!(
                        "the disk of node {node} lacks the committed batch that ends at {index}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Starts all nodes; none may get past the first batch that is gone, and none that had it may be silent about it.
    fn halt(
        &self,
        context: &Rc<Context>,
        rng: &mut Rng,
        disks: Vec<Rc<RefCell<DiskState>>>,
        gone: &[usize],
    ) -> Result<(), String> {
        let last_good = gone[0].checked_sub(1).map_or(0, |before| self.committed[before].0);
        let held: Vec<_> =
            self.surveys.iter().map(|survey| survey.holds(&self.committed[gone[0]].1)).collect();
        let mut cluster = self.cluster(context, rng, disks);
        for node in 0..NODES {
            cluster.run_for(rng.below(50) * MILLISECOND);
            cluster.boot(node);
        }
        let mut proposed_at = 0;
        cluster.run_until(5 * SECOND, |cluster| {
            if let Some(leader) = cluster.leader()
                && cluster.context.now() > proposed_at + 500 * MILLISECOND
            {
                proposed_at = cluster.context.now();
                cluster.propose(leader, 100);
            }
            cluster.acknowledged > 0
        });
        cluster.sweep();
        if let Some(failure) = cluster.history.borrow().failure() {
            return Err(format!("{failure}{}", cluster.describe()));
        }
        if cluster.acknowledged > 0 {
            return Err(format!(
                "acknowledged something behind a batch that is gone everywhere{}",
                cluster.describe()
            ));
        }
        for (node, held) in held.into_iter().enumerate() {
            let machine = &cluster.machines[node];
            if machine.view.applied > last_good {
                return Err(format!("node {node} applied beyond {last_good}{}", cluster.describe()));
            }
            // One that never had it waits for the others.
            if held && machine.stopped.is_none() && lacks(&cluster, node).is_none() {
                return Err(format!("node {node} is silent about it{}", cluster.describe()));
            }
        }
        Ok(())
    }
}

/// The typed stop of a node that found all copies of a batch gone, by its text.
fn says_gone(stopped: &str) -> bool {
    stopped.starts_with("every copy of the log from index")
}

/// What a running node says it lacks.
fn lacks(cluster: &Cluster, node: usize) -> Option<String> {
    let status = cluster.status(node)?;
    let wal = cluster.wal(node)?;
    let (damaged, aside) = (wal.damaged().count(), wal.salvage().count());
    let claim = wal.hard_state().and_then(|state| state.claim);
    let told = status.damage.batches > 0 || status.damage.claim.is_some();
    (told || damaged > 0 || aside > 0 || claim.is_some())
        .then(|| format!("{:?}, {damaged} damaged, {aside} aside, {claim:?}", status.damage))
}

/// The batches up to the last one that is known to be committed.
fn committed_batches(disks: &[Rc<RefCell<DiskState>>], history: &History) -> Vec<(u64, [u8; 16])> {
    let Some(last) = history.last_committed() else { return Vec::new() };
    let context = Context::new(Trace::new(false));
    for (node, disk) in disks.iter().enumerate() {
        let image = disk.borrow().durable_image(&context);
        let Ok(mut log) = stored_log(node, SimDisk::new(&image)) else { continue };
        if log.contains(&last) {
            log.retain(|(index, _)| *index <= last.0);
            return log;
        }
    }
    panic!("what is committed is on some disk");
}

/// Recovers the log of an image without latency: batch ends with their chains.
fn stored_log(node: usize, image: SimDisk) -> Result<Vec<(u64, [u8; 16])>, String> {
    let (wal, opened) = open(node, image)?;
    if !opened.report.damage.is_empty() {
        return Err(format!("the disk of node {node}: {:?}", opened.report.damage));
    }
    Ok(wal.batches().map(|info| (info.last.get(), info.chain.0)).collect())
}

/// What a start on an image finds.
fn describe_start(node: usize, image: SimDisk) -> String {
    let (wal, opened) = match open(node, image) {
        Ok(found) => found,
        Err(error) => return error,
    };
    let aside: Vec<_> = wal.salvage().map(|info| info.last.get()).collect();
    let unreadable: Vec<_> = wal.damaged().map(|batch| batch.info.last.get()).collect();
    let (end, claim) = (wal.log_end(), wal.hard_state().and_then(|state| state.claim));
    let mut told = format!(
        "a log to {} in term {}, {claim:?}, aside {aside:?}, unreadable {unreadable:?}",
        end.index, end.term
    );
    for damage in opened.report.damage {
        told += &format!("\n{:>28}{damage:?}", "");
    }
    told
}

fn open(node: usize, mut image: SimDisk) -> Result<(Wal<SimDisk>, Recovered), String> {
    let mut wal: Wal<SimDisk> = Wal::open(config(node).log_config(0), Pool::<SimBuf>::new(1 << 20));
    let (mut done, mut events) = (Vec::new(), VecDeque::new());
    for _ in 0..100_000 {
        wal.advance(&mut image, &mut events);
        image.poll(&mut done);
        for completion in done.drain(..) {
            wal.handle(&mut image, completion, &mut events);
        }
        while let Some(event) = events.pop_front() {
            match event {
                WalEvent::Opened(opened) => return Ok((wal, opened)),
                WalEvent::Poisoned(error) => return Err(format!("the disk of node {node}: {error}")),
                _ => {}
            }
        }
    }
    Err("recovery does not end".to_owned())
}
