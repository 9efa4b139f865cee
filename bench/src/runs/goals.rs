//! What the project aims at: ratios to the machine's floor, and to another program, and how far they are reached.

mod beside;

use super::Run;
use super::statistics::{Spread, number, ratio};
use super::work::{Figures, Metric, Work};
use crate::limit::{LimitRow, Pattern, Shape};
use comfy_table::{Table, presets};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The name of the program.
pub const TOOL: &str = "goals";

const KIB: usize = 1 << 10;

/// What it is compared with.
#[derive(Clone, Copy)]
enum Against {
    /// The replication pattern without consensus, in this shape.
    Floor(Shape),
    /// The same at whichever depth it moves most bytes.
    FloorBest,
    /// The other program that is best, or the better of its modes.
    Peer,
}

/// A ratio that is to be reached.
struct Goal {
    work: Work,
    against: Against,
    metric: Metric,
    required: f64,
    goal: f64,
}

const fn goal(work: Work, against: Against, metric: Metric, required: f64, goal: f64) -> Goal {
    Goal { work, against, metric, required, goal }
}

const ON_CORE: Work = Work { payload_bytes: 128, in_flight: 1, on_core: true };
const SMALL: Shape = Shape::of(4 * KIB, 1);
const LARGE: Shape = Shape::of(64 * KIB, 16);
const BEST: [Shape; 2] = [Shape::of(64 * KIB, 8), Shape::of(256 * KIB, 4)];
const MANY: Work = Work::from_thread(128, 16 * KIB);
const THIRD: f64 = 1.0 / 3.0;

const GOALS: &[Goal] = &[
    goal(ON_CORE, Against::Floor(SMALL), Metric::P50, 1.25, 1.1),
    goal(ON_CORE, Against::Floor(SMALL), Metric::P99, 1.5, 1.5),
    goal(ON_CORE, Against::Floor(SMALL), Metric::Cpu, 1.6, 1.25),
    goal(Work::from_thread(128, 1), Against::Peer, Metric::P50, 0.9, 0.75),
    goal(Work::from_thread(128, 1), Against::Peer, Metric::P99, 0.7, 0.7),
    goal(Work::from_thread(128, 64), Against::Peer, Metric::PerSecond, 2.0, 2.5),
    goal(Work::from_thread(128, 64), Against::Peer, Metric::P99, 0.6, 0.6),
    goal(Work::from_thread(128, 256), Against::Peer, Metric::PerSecond, 2.0, 2.5),
    goal(Work::from_thread(128, 256), Against::Peer, Metric::P99, 0.6, 0.6),
    goal(Work::from_thread(128, KIB), Against::Peer, Metric::PerSecond, 3.0, 4.0),
    goal(Work::from_thread(128, KIB), Against::Peer, Metric::Cpu, THIRD, 0.25),
    goal(MANY, Against::FloorBest, Metric::BytesPerSecond, 0.7, 0.7),
    goal(Work::from_thread(4 * KIB, 256), Against::FloorBest, Metric::BytesPerSecond, 0.8, 0.9),
    goal(Work::from_thread(4 * KIB, 256), Against::Peer, Metric::PerSecond, 2.0, 2.0),
    goal(Work::from_thread(64 * KIB, 16), Against::Floor(LARGE), Metric::BytesPerSecond, 0.85, 0.95),
    goal(Work::from_thread(64 * KIB, 16), Against::Floor(LARGE), Metric::CpuPerGb, 1.6, 1.6),
];

/// Committed commands of 128 bytes per second that are enough, whatever the floor does.
const MANY_PER_SECOND: f64 = 2.5e6;
/// Of one processor, for each node of an idle cluster.
const IDLE_MAX: f64 = 0.005;
/// Nodes of every cluster here.
pub const NODES: usize = 3;

/// A figure of one round.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// The machine's limit.
    Floor {
        /// The round, from 1.
        round: usize,
        /// All that was measured of it.
        rows: Vec<LimitRow>,
    },
    /// What a cluster of ringraft does without work.
    Idle {
        /// The round.
        round: usize,
        /// The backend.
        side: String,
        /// Processors in use by all its nodes.
        processors: f64,
    },
    /// What commands took.
    Commands {
        /// The round.
        round: usize,
        /// The backend, or the other program's name.
        side: String,
        /// Whether it is another program.
        is_peer: bool,
        /// What was ordered.
        work: Work,
        /// What it took.
        figures: Figures,
    },
}

/// The shapes in which the floor is to be measured.
pub fn shapes() -> Vec<Shape> {
    each_once([SMALL, LARGE].into_iter().chain(BEST).chain(beside::shapes()))
}

/// The same for a floor whose nodes look for work before they sleep.
pub fn shapes_looking() -> Vec<Shape> {
    each_once([SMALL].into_iter().chain(beside::shapes()))
}

fn each_once(all: impl Iterator<Item = Shape>) -> Vec<Shape> {
    let mut shapes: Vec<Shape> = Vec::new();
    for shape in all {
        if !shapes.contains(&shape) {
            shapes.push(shape);
        }
    }
    shapes
}

/// The orders that concern another program, or ringraft with its load on the core or from a thread; each once.
pub fn work_of(is_peer: bool, on_core: bool) -> Vec<Work> {
    let mut all: Vec<Work> = Vec::new();
    for goal in GOALS {
        let concerns = match is_peer {
            true => matches!(goal.against, Against::Peer),
            false => goal.work.on_core == on_core,
        };
        if concerns && !all.contains(&goal.work) {
            all.push(goal.work);
        }
    }
    all
}

/// What was measured together, and may be compared.
#[derive(Default)]
struct Round<'a> {
    floor: &'a [LimitRow],
    /// By side: of ringraft's backends, and of other programs.
    ours: BTreeMap<(&'a str, Work), Figures>,
    theirs: BTreeMap<(&'a str, Work), Figures>,
    /// By backend.
    idle: BTreeMap<&'a str, f64>,
}

impl Round<'_> {
    /// What the machine does itself.
    fn of_floor(&self, pattern: Pattern, shape: Shape) -> Option<Figures> {
        let row = self.floor.iter().find(|row| row.pattern == pattern && row.shape == shape)?;
        Some(Figures {
            per_s: row.per_s,
            bytes_per_s: row.bytes_per_s,
            p50_us: row.us_p50?,
            p99_us: row.us_p99?,
            cpu_us: row.cpu_us,
            cpu_s_per_gb: row.cpu_us * 1e3 / shape.batch_bytes as f64,
        })
    }

    /// What a goal may be compared with, by name.
    fn others(&self, goal: &Goal) -> Vec<(String, f64)> {
        let of_floor = |shape: Shape| {
            let figures = self.of_floor(Pattern::Replicate, shape)?;
            Some((format!("floor, {shape}"), goal.metric.of(&figures)))
        };
        let peers = self.theirs.iter().filter(|((_, work), _)| *work == goal.work);
        match goal.against {
            Against::Floor(shape) => of_floor(shape).into_iter().collect(),
            Against::FloorBest => BEST.into_iter().filter_map(of_floor).collect(),
            Against::Peer => {
                peers.map(|((name, _), figures)| ((*name).to_owned(), goal.metric.of(figures))).collect()
            }
        }
    }

    /// The two figures whose ratio a goal is about: this side's, and that of what it is compared with.
    fn compared(&self, backend: &str, goal: &Goal, with: &str) -> Option<(f64, f64)> {
        let ours = goal.metric.of(self.ours.get(&(backend, goal.work))?);
        Some((ours, self.others(goal).into_iter().find(|(name, _)| name == with)?.1))
    }
}

/// Of what a goal may be compared with, the one that is better over all rounds: not whichever noise favours in each.
fn best_of_others(rounds: &[Round<'_>], goal: &Goal) -> Option<String> {
    let mut figures: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (name, figure) in rounds.iter().flat_map(|round| round.others(goal)) {
        figures.entry(name).or_default().push(figure);
    }
    // Of those that were there in every round, so that all are judged by the same ones.
    let rounds = figures.values().map(Vec::len).max()?;
    let whole = figures.into_iter().filter(|(_, figures)| figures.len() == rounds);
    let medians = whole.filter_map(|(name, figures)| {
        let median = Spread::of(figures)?.median;
        Some((name, if goal.metric.more_is_better() { median } else { -median }))
    });
    medians.max_by(|(_, one), (_, other)| one.total_cmp(other)).map(|(name, _)| name)
}

/// The rounds of all runs.
fn rounds(runs: &[Run<Record>]) -> Vec<Round<'_>> {
    let mut rounds: BTreeMap<(usize, usize), Round<'_>> = BTreeMap::new();
    for (number, run) in runs.iter().enumerate() {
        for record in &run.records {
            let (Record::Floor { round, .. } | Record::Idle { round, .. } | Record::Commands { round, .. }) =
                record;
            let round = rounds.entry((number, *round)).or_default();
            match record {
                Record::Floor { rows, .. } => round.floor = rows,
                Record::Idle { side, processors, .. } => {
                    round.idle.insert(side, *processors);
                }
                Record::Commands { side, is_peer, work, figures, .. } => {
                    let figures_of = if *is_peer { &mut round.theirs } else { &mut round.ours };
                    figures_of.insert((side, *work), *figures);
                }
            }
        }
    }
    rounds.into_values().collect()
}

/// A table for each backend.
pub fn tables(runs: &[Run<Record>]) -> String {
    let rounds = rounds(runs);
    let mut backends: Vec<&str> =
        rounds.iter().flat_map(|round| round.ours.keys().map(|(side, _)| *side)).collect();
    backends.sort_unstable();
    backends.dedup();
    let mut tables: Vec<String> =
        backends.iter().map(|backend| table(backend, &rounds).to_string()).collect();
    tables.extend(beside::tables(&backends, &rounds).iter().map(Table::to_string));
    tables.join("\n\n")
}

fn table(backend: &str, rounds: &[Round<'_>]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table
        .set_header([backend, "what", "against", "here", "there", "ratio", "spread", "required", "goal", ""]);
    for goal in GOALS {
        let Some(best) = best_of_others(rounds, goal) else { continue };
        let both: Vec<_> = rounds.iter().filter_map(|round| round.compared(backend, goal, &best)).collect();
        let spread = |of: fn(&(f64, f64)) -> f64| Spread::of(both.iter().map(of));
        let (Some(ours), Some(theirs), Some(ratios)) =
            (spread(|both| both.0), spread(|both| both.1), spread(|both| both.0 / both.1))
        else {
            continue;
        };
        let is_enough = goal.work == MANY && ours.median >= MANY_PER_SECOND * MANY.payload_bytes as f64;
        let reaches = |bound| match goal.metric.more_is_better() {
            true => ratios.median >= bound,
            false => ratios.median <= bound,
        };
        table.add_row([
            goal.work.to_string(),
            goal.metric.name().to_owned(),
            best,
            number(ours.median),
            number(theirs.median),
            ratio(ratios.median),
            format!("{} to {}", ratio(ratios.least), ratio(ratios.most)),
            ratio(goal.required),
            ratio(goal.goal),
            match (reaches(goal.goal), reaches(goal.required) || is_enough) {
                (true, _) => "goal",
                (_, true) => "met",
                _ => "missed",
            }
            .to_owned(),
        ]);
    }
    let idle = rounds.iter().filter_map(|round| Some(round.idle.get(backend)? / NODES as f64));
    if let Some(idle) = Spread::of(idle) {
        let percent = |share: f64| format!("{:.2} %", share * 100.0);
        let spread = format!("{} to {}", percent(idle.least), percent(idle.most));
        let verdict = if idle.median <= IDLE_MAX { "met" } else { "missed" };
        let (here, required) = (percent(idle.median), percent(IDLE_MAX));
        table.add_row(["idle", "CPU per node", "-", &here, "-", "-", &spread, &required, "-", verdict]);
    }
    table
}

#[cfg(test)]
mod tests;
