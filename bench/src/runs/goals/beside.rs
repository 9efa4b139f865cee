//! What the floor does in the place of those who are compared with it: how much room a goal leaves.

use super::{Against, GOALS, Goal, KIB, ON_CORE, Round, best_of_others};
use crate::limit::{Pattern, Shape};
use crate::runs::statistics::{Spread, number, ratio};
use crate::runs::work::{Metric, Work};
use comfy_table::{Table, presets};

/// What another program's commits are compared with beside those of this one: the floor with as many commands in flight, in the
/// shapes in which their bytes may be made durable, and how many commands a batch then has.
const BESIDE: [(Work, &[(Shape, usize)]); 3] = [
    (Work::from_thread(128, 64), &[(Shape::of(12 * KIB, 1), 64)]),
    (Work::from_thread(128, KIB), &[(Shape::of(128 * KIB, 1), KIB), (Shape::of(64 * KIB, 2), KIB / 2)]),
    (Work::from_thread(4 * KIB, 256), &[(Shape::of(64 * KIB, 16), 16), (Shape::of(256 * KIB, 4), 64)]),
];

/// A floor whose nodes sleep when they have nothing to do, and one whose nodes look for work first.
const FLOORS: [(Pattern, &str); 2] = [(Pattern::Replicate, ""), (Pattern::ReplicateLooking, ", looking")];

/// The shapes in which the floor is to be measured for this, some of them twice.
pub(super) fn shapes() -> impl Iterator<Item = Shape> {
    BESIDE.iter().flat_map(|(_, shapes)| shapes.iter().map(|(shape, _)| *shape))
}

/// Only those for which the floor was measured.
pub(super) fn tables(backends: &[&str], rounds: &[Round<'_>]) -> Vec<Table> {
    [commits(backends, rounds), on_core(backends, rounds)].into_iter().flatten().collect()
}

/// How much of the floor's commits everybody's are, and how much of it those are that are required: of the floor in whichever shape
/// it makes most.
fn commits(backends: &[&str], rounds: &[Round<'_>]) -> Option<Table> {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    let mut header = vec!["commands/s, of the floor's".to_owned(), "floor".to_owned()];
    header.extend(backends.iter().map(ToString::to_string));
    table.set_header(header.into_iter().chain(["the other program".to_owned(), "required".to_owned()]));
    for (work, shapes) in BESIDE {
        let is_it = |goal: &&Goal| {
            goal.work == work && matches!((goal.against, goal.metric), (Against::Peer, Metric::PerSecond))
        };
        let goal = GOALS.iter().find(is_it)?;
        let Some(peer) = best_of_others(rounds, goal) else { continue };
        for (pattern, how) in FLOORS {
            let of_floor = |round: &Round<'_>, (shape, commands): (Shape, usize)| {
                Some(round.of_floor(pattern, shape)?.per_s * commands as f64)
            };
            let medians = shapes.iter().filter_map(|shape| {
                let median = Spread::of(rounds.iter().filter_map(|round| of_floor(round, *shape)))?.median;
                Some((*shape, median))
            });
            let Some((shape, floor)) = medians.max_by(|(_, one), (_, other)| one.total_cmp(other)) else {
                continue;
            };
            let share = |of: &dyn Fn(&Round<'_>) -> Option<f64>| {
                let shares = rounds.iter().filter_map(|round| Some(of(round)? / of_floor(round, shape)?));
                Spread::of(shares).map_or_else(|| "-".to_owned(), |share| ratio(share.median))
            };
            let theirs = |round: &Round<'_>| Some(round.theirs.get(&(peer.as_str(), work))?.per_s);
            let ours =
                |backend: &str| share(&|round: &Round<'_>| Some(round.ours.get(&(backend, work))?.per_s));
            let mut row = vec![work.to_string(), format!("{}, as {}{how}", number(floor), shape.0)];
            row.extend(backends.iter().map(|backend| ours(backend)));
            row.push(share(&theirs));
            row.push(share(&|round| Some(theirs(round)? * goal.required)));
            table.add_row(row);
        }
    }
    (table.row_count() > 0).then_some(table)
}

/// What it costs the floor itself if its nodes look for work, beside what everybody needs on core.
fn on_core(backends: &[&str], rounds: &[Round<'_>]) -> Option<Table> {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    let mut header =
        vec![format!("{ON_CORE}, of the floor's"), "floor".to_owned(), "floor, looking".to_owned()];
    header.extend(backends.iter().map(ToString::to_string));
    table.set_header(header.into_iter().chain(["required".to_owned()]));
    for goal in GOALS.iter().filter(|goal| goal.work == ON_CORE) {
        let Against::Floor(shape) = goal.against else { continue };
        let floor = |round: &Round<'_>| Some(goal.metric.of(&round.of_floor(Pattern::Replicate, shape)?));
        let looking =
            |round: &Round<'_>| Some(goal.metric.of(&round.of_floor(Pattern::ReplicateLooking, shape)?));
        let share = |of: &dyn Fn(&Round<'_>) -> Option<f64>| {
            Spread::of(rounds.iter().filter_map(|round| Some(of(round)? / floor(round)?)))
        };
        let (Some(floor), Some(looking)) = (Spread::of(rounds.iter().filter_map(floor)), share(&looking))
        else {
            continue;
        };
        let ours = |backend: &str| {
            let share = share(&|round| Some(goal.metric.of(round.ours.get(&(backend, ON_CORE))?)));
            share.map_or_else(|| "-".to_owned(), |share| ratio(share.median))
        };
        let mut row = vec![goal.metric.name().to_owned(), number(floor.median), ratio(looking.median)];
        row.extend(backends.iter().map(|backend| ours(backend)));
        row.push(ratio(goal.required));
        table.add_row(row);
    }
    (table.row_count() > 0).then_some(table)
}
