//! What a commit asks of the kernel, beside what the floor's does.

use super::Run;
use super::statistics::{Spread, number, ratio};
use crate::conducted::tracer::{ALL, Counts};
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The name of the program.
pub const TOOL: &str = "syscalls";
/// The side that others are compared with.
pub const FLOOR: &str = "floor";

/// Less than so many per commit are not worth a row: what a timer does now and then.
const SHOWN_MIN: f64 = 0.01;

/// What a process is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// It takes the commands.
    Leader,
    /// It has them sent.
    Follower,
}

/// Of one round: what the processes of one kind did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The round, from 1.
    pub round: usize,
    /// The backend and where commands are proposed, or the floor.
    pub side: String,
    /// What the processes are.
    pub part: Part,
    /// How many of them.
    pub processes: usize,
    /// Commits meanwhile.
    pub commits: u64,
    /// Calls of all of them.
    pub counts: Counts,
    /// What counted.
    pub tracer: String,
}

impl Record {
    /// Calls of this name, by one process for one commit.
    fn per_commit(&self, name: &str) -> f64 {
        let count = self.counts.get(name).copied().unwrap_or(0);
        count as f64 / (self.commits as f64 * self.processes as f64)
    }

    /// Calls that have no count of their own.
    fn others(&self) -> f64 {
        let names = self.counts.keys().filter(|name| *name != ALL);
        self.per_commit(ALL) - names.map(|name| self.per_commit(name)).sum::<f64>()
    }
}

/// The table: a column for each side and part, a row for each call, and what the whole cluster does.
pub fn tables(runs: &[Run<Record>]) -> String {
    let mut columns: BTreeMap<(&str, Part), Vec<&Record>> = BTreeMap::new();
    for record in runs.iter().flat_map(|run| &run.records) {
        columns.entry((&record.side, record.part)).or_default().push(record);
    }
    // The floor comes first.
    let mut columns: Vec<((&str, Part), Vec<&Record>)> = columns.into_iter().collect();
    columns.sort_by_key(|((side, part), _)| (*side != FLOOR, *side, *part));
    let median = |records: &[&Record], of: &dyn Fn(&Record) -> f64| {
        Spread::of(records.iter().map(|record| of(record))).map_or(0.0, |spread| spread.median)
    };

    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    let heads = columns.iter().map(|((side, part), _)| match part {
        Part::Leader => format!("{side}: leader"),
        Part::Follower => format!("{side}: a follower"),
    });
    table.set_header(std::iter::once("calls per commit".to_owned()).chain(heads));
    let names: BTreeSet<&str> = columns
        .iter()
        .flat_map(|(_, records)| records.iter().flat_map(|r| r.counts.keys()))
        .map(|name| &name[..])
        .collect();
    let mut rows: Vec<(&str, Vec<f64>)> = names
        .into_iter()
        .filter(|name| *name != ALL)
        .map(|name| {
            (name, columns.iter().map(|(_, records)| median(records, &|r| r.per_commit(name))).collect())
        })
        .collect();
    rows.push(("others", columns.iter().map(|(_, records)| median(records, &Record::others)).collect()));
    rows.retain(|(_, figures)| figures.iter().any(|figure| *figure >= SHOWN_MIN));
    rows.sort_by(|(_, a), (_, b)| b.iter().sum::<f64>().total_cmp(&a.iter().sum()));
    rows.push((ALL, columns.iter().map(|(_, records)| median(records, &|r| r.per_commit(ALL))).collect()));
    for (name, figures) in rows {
        table.add_row(std::iter::once(name.to_owned()).chain(figures.into_iter().map(number)));
    }

    let whole = |side: &str| -> f64 {
        let of_side = columns.iter().filter(|((other, _), _)| *other == side);
        of_side.map(|(_, records)| median(records, &|r| r.per_commit(ALL) * r.processes as f64)).sum()
    };
    let floor = whole(FLOOR);
    let cell = |((side, part), _): &((&str, Part), Vec<&Record>)| match part {
        Part::Leader => format!("{} ({})", number(whole(side)), ratio(whole(side) / floor)),
        Part::Follower => String::new(),
    };
    let title = "whole cluster (of the floor's)".to_owned();
    table.add_row(std::iter::once(title).chain(columns.iter().map(cell)));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let tracers: BTreeSet<&str> = runs.iter().flat_map(|run| &run.records).map(|r| &r.tracer[..]).collect();
    let tracers: Vec<&str> = tracers.into_iter().collect();
    format!("Counted by {}.\n\n{table}", tracers.join(" and "))
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::super::tests::{cells, header};
    use super::*;

    fn record(round: usize, side: &str, part: Part, commits: u64, counts: &[(&str, u64)]) -> Record {
        Record {
            round,
            side: side.to_owned(),
            part,
            processes: if part == Part::Leader { 1 } else { 2 },
            commits,
            counts: counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect(),
            tracer: "perf stat".to_owned(),
        }
    }

    #[test]
    fn calls_are_per_process_and_commit_and_the_cluster_is_compared_with_the_floor() {
        let mut lines = vec![serde_json::json!({ "run": header(TOOL) }).to_string()];
        for (round, calls) in [(1, 10), (2, 30), (3, 20)] {
            for record in [
                record(round, "a, on core", Part::Leader, 10, &[(ALL, 80), ("futex", calls), ("read", 0)]),
                record(round, "a, on core", Part::Follower, 10, &[(ALL, 40), ("futex", 40)]),
                record(round, FLOOR, Part::Leader, 10, &[(ALL, 40), ("io_uring_enter", 40)]),
                record(round, FLOOR, Part::Follower, 10, &[(ALL, 40), ("io_uring_enter", 40)]),
            ] {
                lines.push(serde_json::to_string(&record).unwrap());
            }
        }
        let table = tables(&parse(TOOL, &lines.join("\n")).unwrap());
        let rows: Vec<String> = cells(&table).iter().map(|row| row.join("; ")).collect();
        assert_eq!(
            rows,
            [
                "calls per commit; floor: leader; floor: a follower; a, on core: leader; a, on core: a follower",
                "io_uring_enter; 4.00; 2.00; 0.00; 0.00",
                "others; 0.00; 0.00; 6.00; 0.00",
                "futex; 0.00; 0.00; 2.00; 2.00",
                "all; 4.00; 2.00; 8.00; 2.00",
                "whole cluster (of the floor's); 8.00 (1.00); ; 12.00 (1.50); ",
            ]
        );
    }
}
