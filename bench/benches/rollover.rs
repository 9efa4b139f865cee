//! What rollover and purge cost an append: three logs on the engine's own backend, in turns of some seconds on one core and one disk.
//!
//! * `one segment`: no rollover while it is measured.
//! * `rollover`: small segments, each successor filled with zeros in the background while appends go on.
//! * `rollover, purge`: the same, and at each rollover all but the last segments are purged, so that in steady state segments are
//!   recycled and none is filled.
//!
//! An append's latency is from the moment that it is wanted, which is when the one before it (or, with two in flight, the one before
//! that) was durable, to the report that it is durable. So it contains waiting for a segment that is not ready.
//!
//! Before each turn all three are at rest: what one does in the background is never measured with another. Figures of one machine say
//! little about another's; read the ratios.
//!
//! `cargo bench -p ringraft-bench --bench rollover`; `RINGRAFT_ROLLOVER_ROUNDS` (default 5), `RINGRAFT_ROLLOVER_TURN_MS` (default 3000),
//! `RINGRAFT_ROLLOVER_SEGMENT_MB` (default 16, at least 16; a quarter of it for the small appends).

mod driven;

use anyhow::{Context as _, ensure};
use comfy_table::{Cell, CellAlignment, Table, presets};
use driven::{Log, config, healthy, is_measuring, noise, number, run, scratch};
use hdrhistogram::Histogram;
use ringraft::runtime::glommio::CoreContext;
use ringraft::runtime::{Now, Turn, TurnOutcome};
use ringraft_block::LogIndex;
use ringraft_wal::format::{image_bytes_for, slot_bytes};
use ringraft_wal::{WalEvent, WalStats};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Segments that a purge leaves behind the one that is appended to.
const RETAINED_SEGMENTS: u64 = 2;
/// The largest image here: a segment of 4 MiB holds sixteen.
const BATCH_BYTES_MAX: usize = 192 << 10;
/// Of the batches that only warm up.
const WARM_UP_BYTES: usize = 128 << 10;
/// A turn has at least so many appends, so that small segments roll over in it, ...
const TURN_APPENDS: u64 = 2000;
/// ... but takes at most so many times its time.
const TURN_STRETCH: u32 = 5;
/// How much of the large segment a turn may use at most.
const LARGE_SHARE: f64 = 0.95;

type Shared = Rc<RefCell<Option<anyhow::Result<Vec<(Kind, Outcome)>>>>>;

#[derive(Clone, Copy)]
struct Plan {
    rounds: usize,
    turn: Duration,
    /// A turn with fewer appends goes on: a p99.9 of less is a maximum.
    turn_appends: u64,
    large_bytes: u64,
    small_bytes: u64,
    slot_bytes: usize,
    in_flight_max: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    OneSegment,
    Rollover,
    Purge,
}

const KINDS: [Kind; 3] = [Kind::OneSegment, Kind::Rollover, Kind::Purge];

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::OneSegment => "one segment",
            Self::Rollover => "rollover",
            Self::Purge => "rollover, purge",
        }
    }
}

/// What the turns of one log came to.
#[derive(Default)]
struct Outcome {
    /// Nanoseconds, one histogram per turn.
    turns: Vec<Histogram<u64>>,
    measured: Duration,
    /// Appends that found no segment ready.
    stalls: u64,
    rollovers: u64,
    made: u64,
    recycled: u64,
}

struct Variant {
    kind: Kind,
    log: Log,
    /// Rollovers when it last purged.
    purged_at: u64,
    outcome: Outcome,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Waiting until all logs are open and at rest.
    Opening,
    /// The purging log is filled until it recycles what it appends to.
    WarmingUp,
    /// The log whose turn it is starts empty, and is at rest before it is measured.
    Settling,
    Measuring,
    /// What is in flight completes.
    Draining,
    Over,
}

struct Comparison {
    plan: Plan,
    command: Vec<u8>,
    variants: Vec<Variant>,
    opened: usize,
    phase: Phase,
    /// Counts turns of all logs.
    turn: usize,
    started: Instant,
    /// Where the turn began.
    before: WalStats,
    /// Ends of the appends in flight, and since when they were wanted.
    flying: VecDeque<(LogIndex, Instant)>,
    /// Since when the next append is wanted; one for each place in flight that is free.
    wanted: VecDeque<Instant>,
    stalled: bool,
    stalls: u64,
    is_recorded: bool,
    latencies: Histogram<u64>,
    /// What came of it, for whoever started this.
    result: Shared,
}

impl Comparison {
    fn new(context: &CoreContext, directory: &Path, plan: Plan, result: Shared) -> anyhow::Result<Self> {
        let variants = KINDS.into_iter().enumerate().map(|(number, kind)| {
            let mut config =
                config(if kind == Kind::OneSegment { plan.large_bytes } else { plan.small_bytes });
            config.batch_bytes_max = BATCH_BYTES_MAX;
            match kind {
                // One in use and one behind it: the next turn's.
                Kind::OneSegment => config.segments_ahead = 1,
                // What is emptied between turns is removed, so that every successor is filled.
                Kind::Rollover => config.recycled_segments_max = 0,
                Kind::Purge => config.retain_bytes = RETAINED_SEGMENTS * plan.small_bytes,
            }
            let log = Log::new(context, &directory.join(number.to_string()), config)?;
            Ok(Variant { kind, log, purged_at: 0, outcome: Outcome::default() })
        });
        Ok(Self {
            plan,
            command: noise(command_for(plan.slot_bytes)),
            variants: variants.collect::<anyhow::Result<_>>()?,
            opened: 0,
            phase: Phase::Opening,
            turn: 0,
            started: Instant::now(),
            before: WalStats::default(),
            flying: VecDeque::new(),
            wanted: VecDeque::new(),
            stalled: false,
            stalls: 0,
            is_recorded: false,
            latencies: Histogram::new(3)?,
            result,
        })
    }

    /// Whose turn it is: the order moves on by one in each round.
    fn current(&self) -> usize {
        let count = self.variants.len();
        if !self.is_recorded && matches!(self.phase, Phase::WarmingUp | Phase::Draining) {
            return KINDS.iter().position(|kind| *kind == Kind::Purge).unwrap_or(0);
        }
        (self.turn + self.turn / count) % count
    }

    fn step(&mut self) -> anyhow::Result<bool> {
        let mut progressed = false;
        let current = self.current();
        let mut events = VecDeque::new();
        for at in 0..self.variants.len() {
            progressed |= self.variants[at].log.turn(&mut events);
            healthy(&self.variants[at].log.wal)?;
            for event in events.drain(..) {
                match event {
                    WalEvent::Opened(_) => self.opened += 1,
                    WalEvent::Persisted { last, .. } if at == current => self.persisted(last)?,
                    WalEvent::NoSpace { .. } => anyhow::bail!("the disk is full"),
                    _ => {}
                }
            }
        }
        let at_rest = !progressed && self.variants.iter().all(|variant| variant.log.is_at_rest());
        match self.phase {
            Phase::Opening if at_rest && self.opened == self.variants.len() => {
                self.begin_load(Phase::WarmingUp);
                progressed = true;
            }
            Phase::WarmingUp => {
                progressed |= self.load()?;
                let stats = self.variants[current].log.wal.stats();
                if stats.segments_recycled > RETAINED_SEGMENTS + 1 {
                    self.phase = Phase::Draining;
                    progressed = true;
                }
            }
            Phase::Settling if at_rest => {
                self.begin_load(Phase::Measuring);
                progressed = true;
            }
            Phase::Measuring => progressed |= self.measure()?,
            Phase::Draining if self.flying.is_empty() => {
                self.next_turn()?;
                progressed = true;
            }
            _ => {}
        }
        Ok(progressed)
    }

    /// Commands and bytes of a batch. To warm up, larger ones do, and sooner.
    fn batch(&self) -> (usize, usize) {
        let count =
            if self.phase == Phase::WarmingUp { WARM_UP_BYTES.div_ceil(self.plan.slot_bytes) } else { 1 };
        (count, slot_bytes(image_bytes_for(count, 0, count * self.command.len())))
    }

    fn begin_load(&mut self, phase: Phase) {
        self.phase = phase;
        let variant = &self.variants[self.current()];
        self.started = Instant::now();
        self.before = variant.log.wal.stats();
        self.latencies.reset();
        self.stalled = false;
        self.stalls = 0;
        self.is_recorded = phase == Phase::Measuring;
        self.wanted = std::iter::repeat_n(self.started, self.plan.in_flight_max).collect();
    }

    fn persisted(&mut self, last: LogIndex) -> anyhow::Result<()> {
        let now = Instant::now();
        while let Some((end, wanted)) = self.flying.front().copied()
            && end <= last
        {
            self.flying.pop_front();
            self.wanted.push_back(now);
            self.latencies.record(u64::try_from((now - wanted).as_nanos())?)?;
        }
        Ok(())
    }

    /// Appends what is wanted, and purges.
    fn load(&mut self) -> anyhow::Result<bool> {
        let (count, slot_bytes) = self.batch();
        let current = self.current();
        let variant = &mut self.variants[current];
        let mut progressed = false;
        while let Some(wanted) = self.wanted.front().copied() {
            if !variant.log.wal.is_ready_for(slot_bytes) {
                self.stalls += u64::from(!std::mem::replace(&mut self.stalled, true));
                break;
            }
            self.stalled = false;
            self.wanted.pop_front();
            let last = variant.log.append(&self.command, count)?;
            self.flying.push_back((last, wanted));
            progressed = true;
        }
        let rollovers = variant.log.wal.stats().rollovers;
        if variant.kind == Kind::Purge && rollovers > variant.purged_at {
            variant.purged_at = rollovers;
            let durable = variant.log.wal.durable_through();
            variant.log.wal.purge_through(&mut variant.log.disk, durable);
            progressed = true;
        }
        Ok(progressed)
    }

    fn measure(&mut self) -> anyhow::Result<bool> {
        let stats = self.variants[self.current()].log.wal.stats();
        let used = stats.written_bytes - self.before.written_bytes;
        let is_full = used as f64 >= self.plan.large_bytes as f64 * LARGE_SHARE;
        let elapsed = self.started.elapsed();
        let is_short =
            self.latencies.len() < self.plan.turn_appends && elapsed < TURN_STRETCH * self.plan.turn;
        if (elapsed < self.plan.turn || is_short) && !is_full {
            return self.load();
        }
        self.phase = Phase::Draining;
        Ok(true)
    }

    fn next_turn(&mut self) -> anyhow::Result<()> {
        if self.is_recorded {
            self.record();
            self.turn += 1;
        }
        if self.turn == self.plan.rounds * self.variants.len() {
            self.phase = Phase::Over;
            return Ok(());
        }
        self.phase = Phase::Settling;
        let current = self.current();
        let Variant { kind, log, .. } = &mut self.variants[current];
        if *kind != Kind::Purge {
            let start = log.wal.log_start().index;
            log.wal.truncate_after(&mut log.disk, start);
        }
        Ok(())
    }

    fn record(&mut self) {
        let current = self.current();
        let Variant { log, outcome, .. } = &mut self.variants[current];
        let stats = log.wal.stats();
        outcome.turns.push(self.latencies.clone());
        outcome.measured += self.started.elapsed();
        outcome.rollovers += stats.rollovers - self.before.rollovers;
        outcome.made += stats.segments_made - self.before.segments_made;
        outcome.recycled += stats.segments_recycled - self.before.segments_recycled;
        outcome.stalls += self.stalls;
    }
}

impl Turn for Comparison {
    fn turn(&mut self, _: Now) -> TurnOutcome {
        let (progressed, stop) = match self.step() {
            Ok(progressed) => (progressed, self.phase == Phase::Over),
            Err(error) => {
                *self.result.borrow_mut() = Some(Err(error));
                return TurnOutcome { worked: true, more: false, next_deadline_ns: u64::MAX, stop: true };
            }
        };
        if stop {
            let outcomes = self.variants.drain(..).map(|variant| (variant.kind, variant.outcome)).collect();
            *self.result.borrow_mut() = Some(Ok(outcomes));
        }
        TurnOutcome { worked: progressed, more: progressed, next_deadline_ns: u64::MAX, stop }
    }
}

/// The latency in microseconds at a quantile of all turns together.
fn micros(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1e3
}

fn all_turns(outcome: &Outcome) -> anyhow::Result<Histogram<u64>> {
    let mut all = Histogram::new(3)?;
    for turn in &outcome.turns {
        all.add(turn)?;
    }
    Ok(all)
}

/// The quantile relative to that of the log with one segment: the median over the rounds, and the lowest and highest.
fn ratio(outcome: &Outcome, base: &Outcome, quantile: f64) -> String {
    let mut ratios: Vec<f64> = std::iter::zip(&outcome.turns, &base.turns)
        .map(|(turn, base)| micros(turn, quantile) / micros(base, quantile))
        .collect();
    ratios.sort_by(f64::total_cmp);
    match (ratios.first(), ratios.get(ratios.len() / 2), ratios.last()) {
        (Some(low), Some(median), Some(high)) => format!("{median:.2} ({low:.2}..{high:.2})"),
        _ => String::new(),
    }
}

fn print(plan: Plan, outcomes: &[(Kind, Outcome)]) -> anyhow::Result<()> {
    let Plan { rounds, turn, slot_bytes, in_flight_max, small_bytes, .. } = plan;
    println!(
        "appends of {} KiB, {in_flight_max} in flight; segments of {} MiB; {rounds} rounds of {turn:?} each; microseconds",
        slot_bytes >> 10,
        small_bytes >> 20
    );
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header([
        "log",
        "appends",
        "MB/s",
        "p50",
        "p99",
        "p99.9",
        "max",
        "rolled",
        "filled",
        "recycled",
        "waited",
        "p50 ratio",
        "p99 ratio",
        "p99.9 ratio",
    ]);
    let Some((_, base)) = outcomes.first() else { return Ok(()) };
    for (kind, outcome) in outcomes {
        let all = all_turns(outcome)?;
        ensure!(!all.is_empty(), "{} has appended nothing", kind.name());
        let bytes = all.len() * slot_bytes as u64;
        let mut cells = vec![
            all.len().to_string(),
            format!("{:.0}", bytes as f64 / outcome.measured.as_secs_f64() / 1e6),
        ];
        cells.extend([0.5, 0.99, 0.999].map(|quantile| format!("{:.0}", micros(&all, quantile))));
        cells.push(format!("{:.0}", all.max() as f64 / 1e3));
        let Outcome { rollovers, made, recycled, stalls, .. } = outcome;
        cells.extend([rollovers, made, recycled, stalls].map(u64::to_string));
        cells.extend([0.5, 0.99, 0.999].map(|quantile| ratio(outcome, base, quantile)));
        let right = |text| Cell::new(text).set_alignment(CellAlignment::Right);
        table.add_row(std::iter::once(Cell::new(kind.name())).chain(cells.into_iter().map(right)));
    }
    println!("{table}");
    Ok(())
}

/// The length of the one command that fills a slot exactly.
fn command_for(slot: usize) -> usize {
    (0..slot).rev().find(|command| slot_bytes(image_bytes_for(1, 0, *command)) <= slot).unwrap_or(0)
}

fn compare(plan: Plan) -> anyhow::Result<Vec<(Kind, Outcome)>> {
    let directory = scratch()?;
    let result = Rc::new(RefCell::new(None));
    run(|context| Comparison::new(context, directory.path(), plan, Rc::clone(&result)))?;
    let result = result.take();
    result.context("the engine ended without a result")?
}

fn main() -> anyhow::Result<()> {
    let measuring = is_measuring();
    let turn_ms = if measuring { number("RINGRAFT_ROLLOVER_TURN_MS", 3000)? } else { 100 };
    let small_mib = if measuring { number("RINGRAFT_ROLLOVER_SEGMENT_MB", 16)?.max(16) } else { 16 };
    let rounds = if measuring { number("RINGRAFT_ROLLOVER_ROUNDS", 5)?.max(1) } else { 1 };
    // Small appends take long to fill a segment. With smaller ones about one append in a thousand finds its segment full.
    for (slot_bytes, in_flight_max, share) in [(4 << 10, 1, 4), (64 << 10, 2, 1)] {
        let plan = Plan {
            rounds: usize::try_from(rounds)?,
            turn: Duration::from_millis(turn_ms),
            turn_appends: if measuring { TURN_APPENDS } else { 0 },
            large_bytes: if measuring { 512 << 20 } else { 32 << 20 },
            small_bytes: (small_mib << 20) / share,
            slot_bytes,
            in_flight_max,
        };
        let outcomes = compare(plan)?;
        print(plan, &outcomes)?;
        if outcomes.iter().any(|(kind, outcome)| *kind != Kind::OneSegment && outcome.rollovers == 0)
            && measuring
        {
            println!(
                "No rollover within the turns: this compares nothing. Make them longer (RINGRAFT_ROLLOVER_TURN_MS)."
            );
        }
        for (kind, outcome) in &outcomes {
            // Else it is not what it is called.
            let is_right = match kind {
                Kind::OneSegment => outcome.rollovers == 0,
                Kind::Rollover => outcome.recycled == 0,
                Kind::Purge => outcome.made == 0,
            };
            ensure!(is_right, "{}: the log did other than it was to do", kind.name());
        }
    }
    Ok(())
}
