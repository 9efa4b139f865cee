//! A fault at every operation of a long run of the log.
//!
//! The run is a sequence of *lives*: each starts the log, appends, reads, saves, truncates, purges, and ends by closing, by a
//! kill or by a power cut. For every operation that a life submits, and every kind of fault, the life is lived once more on a copy of the
//! disk with that one fault, and goes on as far as the log lets it. Then the machine loses power, and what is left must hold
//! all that was acknowledged, twice: with random survivors, and with none. The log must take orders again.

use super::log::{LogRun, Model, config, quiet};
use super::threads::{Tally, split};
use crate::sim::buffer::SimBuf;
use crate::sim::context::{Context, SECOND};
use crate::sim::disk::{Crash, DiskConfig, DiskState, Fault, On, Scheduled};
use crate::sim::rng::Rng;
use crate::sim::trace::Trace;
use ringraft_block::{BLOCK_BYTES, Pool};
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

/// What strikes an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strike {
    /// It fails with EIO; the next one may succeed.
    Eio,
    /// It and all after it fail with EIO, until the machine is mended.
    EioForEver,
    /// It fails with ENOSPC; the next one may succeed.
    Enospc,
    /// It writes or reads less than it was asked to.
    Short,
    /// It takes a second longer.
    Stall,
}

impl Strike {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Eio, Self::EioForEver, Self::Enospc, Self::Short, Self::Stall];

    fn arm(self, state: &Rc<RefCell<DiskState>>, skip: u64) {
        let mut state = state.borrow_mut();
        let faults = state.faults_mut();
        let fault = match self {
            Self::EioForEver => {
                faults.fail_after_ops = Some(skip);
                faults.fail_for_ever = true;
                return;
            }
            Self::Eio => Fault::Io,
            Self::Enospc => Fault::NoSpace,
            Self::Short => Fault::Short,
            Self::Stall => Fault::Stall(SECOND),
        };
        faults.scheduled.push(Scheduled { on: On::Any, skip, fault });
    }

    /// Whether the log must stop for it (`Some(true)`), must not (`Some(false)`), or may (`None`).
    fn stops(self, operation: &str) -> Option<bool> {
        let (verb, rest) = operation.split_once(' ').unwrap_or((operation, ""));
        let segment = rest.starts_with("segment-");
        // Made, or made ready for another life.
        let spare = |name: &str| name.contains(".new") || name.contains(".old");
        let making = segment && (rest.split(' ').next().is_some_and(spare) || rest.ends_with(".old"));
        let durable = matches!(verb, "write" | "create" | "flush" | "rename" | "sync");
        match self {
            Self::Stall => Some(false),
            // A start asks again for a piece of a segment, block by block, but not for a header: that is damage.
            Self::Short | Self::Eio if verb == "read" => {
                let header = rest.starts_with("segment-") && rest.ends_with(&format!(" 0+{BLOCK_BYTES}"));
                (!header).then_some(false)
            }
            // A segment that cannot be made, or made ready again, is no reason to stop, and for a hard state there is time.
            Self::Enospc if making || verb == "create" => Some(false),
            Self::Short => Some(verb == "write"),
            Self::Eio | Self::EioForEver | Self::Enospc if durable => Some(true),
            Self::Eio | Self::EioForEver | Self::Enospc => None,
        }
    }
}

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Close,
    Crash(Crash),
}

/// A life's orders, from its seed.
struct Life {
    seed: u64,
    orders: u64,
    end: End,
    /// It begins by cutting everything off, so that the log stays small.
    anew: bool,
}

const LIVES: u64 = 48;

impl Life {
    fn new(seed: u64, number: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut own = rng.fork(number);
        let end = match own.below(4) {
            0 | 1 => End::Close,
            2 => End::Crash(Crash::Kill),
            _ => End::Crash(Crash::PowerCut),
        };
        Self { seed: own.bits(), orders: own.between(10, 50), end, anew: number % 6 == 5 }
    }

    /// Lives it on the disk of `run`, to its end or to that of the log. Whether everything was ordered and came to its end.
    fn live(&self, run: &mut LogRun) -> bool {
        let mut rng = Rng::new(self.seed);
        let through = |run: &LogRun| run.opened.is_some() || run.poisoned.is_some();
        // A start that has no space for its files waits until it is told that there is some.
        while !run.step_until(through) && run.short_of_space {
            run.short_of_space = false;
            run.wal.retry_space();
        }
        if !run.is_open() {
            run.settle();
            return false;
        }
        if self.anew {
            run.truncate_after(run.wal.first_index().previous());
        }
        for _ in 0..self.orders {
            self.order(run, &mut rng);
            if run.short_of_space {
                run.wal.retry_space();
            }
            for _ in 0..rng.below(4) {
                run.step();
            }
        }
        match self.end {
            End::Close => {
                if run.poisoned.is_none() {
                    run.settle();
                }
                run.close();
                run.settle();
                run.closed
            }
            End::Crash(_) => run.poisoned.is_none(),
        }
    }

    fn order(&self, run: &mut LogRun, rng: &mut Rng) {
        if !run.is_open() {
            run.step();
            return;
        }
        let (term, vote) = run.wal.hard_state().map_or((0, None), |state| (state.term.get(), state.vote));
        let pick = |run: &LogRun, rng: &mut Rng| {
            let batches = run.batches();
            (!batches.is_empty()).then(|| batches[rng.index(batches.len())].info)
        };
        match rng.below(100) {
            0..60 => {
                let slot = BLOCK_BYTES * (1 + rng.index(2));
                let salt = rng.bits();
                run.step_until(|run| !run.is_open() || run.wal.is_ready_for(slot));
                run.append(term.max(1), slot, salt);
            }
            60..78 => {
                let bytes_max = BLOCK_BYTES << rng.below(5);
                if let Some(info) = pick(run, rng) {
                    run.read(info.first, bytes_max);
                }
            }
            78..88 => {
                let (another, voter) = (rng.chance(500_000), rng.between(1, 3));
                let term = term.max(1) + u64::from(another);
                let given = if another { None } else { vote.map(|vote| vote.get()) };
                run.save(term, Some(given.unwrap_or(voter)));
            }
            88..93 => {
                if let Some(info) = pick(run, rng) {
                    run.save(term.max(1) + 1, None);
                    run.truncate_after(info.last);
                }
            }
            93..95 => run.save_witness(),
            95..98 => {
                if let Some(info) = pick(run, rng) {
                    run.purge(info.last);
                }
            }
            _ => run.settle(),
        }
    }
}

/// How many faults there are.
#[derive(Clone, Debug)]
pub struct Options {
    /// Each seed is a run.
    pub seeds: Range<u64>,
    /// Of each run, every so-manyth operation is struck.
    pub every: u64,
    /// Only this operation of this life, with its trace.
    pub only: Option<(u64, u64)>,
    /// Threads.
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { seeds: 0..1, every: 1, only: None, threads: 2 }
    }
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Injected faults and violations.
    pub tally: Tally,
    /// Operations of the runs without faults.
    pub operations: u64,
}

/// Injects faults.
#[must_use]
pub fn run(options: &Options) -> Report {
    let mut report = Report::default();
    for seed in options.seeds.clone() {
        report.operations += Injector::new(seed, options, usize::MAX).run();
        let tally = split(options.threads, |thread| {
            let mut injector = Injector::new(seed, options, thread);
            injector.run();
            injector.tally
        });
        report.tally.merge(tally);
    }
    report
}

struct Injector<'a> {
    seed: u64,
    options: &'a Options,
    thread: usize,
    pool: Pool<SimBuf>,
    tally: Tally,
}

impl<'a> Injector<'a> {
    fn new(seed: u64, options: &'a Options, thread: usize) -> Self {
        Self { seed, options, thread, pool: Pool::new(4 << 20), tally: Tally::default() }
    }

    /// The run without faults, and from the beginning of each of its lives the same life with every fault. Returns how many
    /// operations it has.
    fn run(&mut self) -> u64 {
        let context = quiet();
        let mut state = DiskState::new(&context, 0, Rng::new(self.seed), DiskConfig::default());
        let mut model = Model::default();
        let mut operations = 0;
        for number in 0..LIVES {
            let life = Life::new(self.seed, number);
            let context = quiet();
            let fork = state.borrow().fork(&context);
            let mut run = LogRun::start(&context, &fork, config(number), &self.pool, model.clone());
            let whole = life.live(&mut run);
            let count = fork.borrow().submitted();
            if self.thread == 0 {
                let wrong = run
                    .violation
                    .take()
                    .or_else(|| (!whole).then(|| format!("it ended: {:?}", run.poisoned)));
                self.tally
                    .violations
                    .extend(wrong.map(|wrong| format!("{}: {wrong}", self.name(number, None))));
            }
            for operation in 0..count {
                let position = operations + operation;
                if self.thread == usize::MAX
                    || position % self.options.every != 0
                    || position / self.options.every % self.options.threads.max(1) as u64
                        != self.thread as u64
                    || self.options.only.is_some_and(|only| only != (number, operation))
                {
                    continue;
                }
                for strike in Strike::ALL {
                    self.inject(&state, &model, &life, number, operation, strike);
                }
            }
            operations += count;
            // The next life begins on what this one leaves.
            let how = match life.end {
                End::Crash(how) => how,
                End::Close => Crash::Kill,
            };
            model = run.into_model();
            fork.borrow_mut().crash(how);
            state = fork;
        }
        operations
    }

    fn name(&self, life: u64, operation: Option<(u64, Strike)>) -> String {
        let what = operation.map_or(String::new(), |(at, strike)| format!(", {strike:?} at operation {at}"));
        format!("seed {}, life {life}{what}", self.seed)
    }

    fn inject(
        &mut self,
        state: &Rc<RefCell<DiskState>>,
        model: &Model,
        life: &Life,
        number: u64,
        operation: u64,
        strike: Strike,
    ) {
        let context = Context::new(Trace::new(self.options.only.is_some()));
        context.note(|| self.name(number, Some((operation, strike))));
        let fork = state.borrow().fork(&context);
        strike.arm(&fork, operation);
        let mut run = LogRun::start(&context, &fork, config(number), &self.pool, model.clone());
        let whole = life.live(&mut run);
        if fork.borrow().faults_struck() == 0 {
            return;
        }
        let struck = fork.borrow().first_struck().unwrap_or_default().to_owned();
        let name = || format!("{} ({struck})", self.name(number, Some((operation, strike))));
        let outcome = check(&mut run, life, strike, &struck, whole);
        context.note(|| format!("the power fails; {:?}", run.model));
        let outcome = outcome.and_then(|()| self.aftermath(&fork, run, number));
        let violation = outcome.err().map(|wrong| format!("{}: {wrong}", name()));
        self.tally.count(violation);
    }

    /// The machine is mended after a loss of power, and the log must be there and take orders.
    fn aftermath(&self, state: &Rc<RefCell<DiskState>>, run: LogRun, number: u64) -> Result<(), String> {
        let model = run.into_model();
        {
            let mut state = state.borrow_mut();
            *state.faults_mut() = crate::sim::disk::DiskFaults::default();
        }
        let least = state.borrow().durable_image(&quiet());
        state.borrow_mut().crash(Crash::PowerCut);
        for (survivors, state) in [("random", state), ("no", &least)] {
            let context = quiet();
            let state = state.borrow().with_config(&context, Rng::new(number), DiskConfig::instant());
            let mut run = LogRun::start(&context, &state, config(number + 1_000), &self.pool, model.clone());
            run.settle();
            if let Some(error) = &run.poisoned {
                return Err(format!("with {survivors} survivors the log does not open: {error}"));
            }
            if let Some(wrong) = run.violation {
                return Err(format!("with {survivors} survivors: {wrong}"));
            }
            if run.damaged {
                // It was given a header that could not be read, and has cut itself off from what it keeps aside.
                continue;
            }
            let term = run.wal.hard_state().map_or(1, |state| state.term.get()) + 1;
            run.save(term, Some(1));
            for salt in 0..2 {
                if !run.append(term, BLOCK_BYTES, salt) {
                    return Err(format!("with {survivors} survivors the log is not ready for an append"));
                }
                run.settle();
            }
            if run.model.log.acknowledged != run.wal.last_index() {
                return Err(format!("with {survivors} survivors nothing new is acknowledged"));
            }
            run.read_all();
            if let Some(wrong) = run.violation {
                return Err(format!("with {survivors} survivors: {wrong}"));
            }
        }
        Ok(())
    }
}

/// What must hold at the end of a life that was struck.
fn check(run: &mut LogRun, life: &Life, strike: Strike, struck: &str, whole: bool) -> Result<(), String> {
    if let Some(wrong) = run.violation.take() {
        return Err(wrong);
    }
    if run.found > 0 && !struck.starts_with("read") && strike != Strike::EioForEver {
        return Err("an intact batch was taken for damaged".to_owned());
    }
    if run.poisoned.is_some() {
        // It has stopped; whatever still completes must not be acknowledged.
        let acknowledged = run.model.log.acknowledged;
        run.settle();
        if run.model.log.acknowledged != acknowledged || run.violation.is_some() {
            return Err("it acknowledged after it had stopped".to_owned());
        }
    }
    match strike.stops(struck) {
        Some(true) if run.poisoned.is_none() && life.end == End::Close => Err("it did not stop".to_owned()),
        Some(false) if run.poisoned.is_some() => Err(format!("it stopped: {:?}", run.poisoned)),
        Some(false) if !whole => Err("it did not go on to its end".to_owned()),
        _ => Ok(()),
    }
}
