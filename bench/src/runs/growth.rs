//! How cost grows: with the number of nodes, the size of a command, how many are in flight, and the log behind it.

use super::Run;
use super::statistics::{Spread, number, ratio};
use super::work::{Figures, Metric, Work, bytes, count};
use comfy_table::{Table, presets};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The name of the program.
pub const TOOL: &str = "growth";

const KIB: usize = 1 << 10;

/// What grows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Axis {
    /// The number of nodes
    Nodes,
    /// The size of a command
    Payload,
    /// Commands in flight
    InFlight,
    /// The log behind it
    Log,
}

/// A cluster, and what is asked of it.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Point {
    /// Its nodes.
    pub nodes: usize,
    /// Commands.
    pub work: Work,
    /// What each log held before, none of it purged, in units of 10^9 bytes; none where it is purged and recycled.
    pub log_gb: Option<f64>,
}

/// A figure of one round.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// What commands took.
    Commands {
        /// The round, from 1.
        round: usize,
        /// The backend.
        side: String,
        /// Which table this is for.
        axis: Axis,
        /// What was asked of which cluster.
        point: Point,
        /// What it took.
        figures: Figures,
        /// Resident memory of the leader's process after it.
        resident_bytes: u64,
    },
    /// A follower was started again.
    Restart {
        /// The round.
        round: usize,
        /// The backend.
        side: String,
        /// What its log held.
        log_gb: f64,
        /// Until it had recovered its log and listened.
        started_s: f64,
        /// Until it had applied all that was committed.
        applied_s: f64,
    },
}

/// How many nodes, in this order.
pub const NODES: [usize; 3] = [1, 3, 5];
/// What is asked of each number of nodes, and with a log behind: latency, and throughput.
pub const ALONE_AND_MANY: [Work; 2] = [Work::from_thread(128, 1), Work::from_thread(128, KIB)];

/// Commands of 16 bytes to 1 MiB, as many in flight as are 2 MiB, but 16 Ki at most: more bytes in flight move no more of them.
pub fn payloads() -> [Work; 6] {
    const BYTES_IN_FLIGHT: usize = 2 << 20;
    [16, 128, KIB, 16 * KIB, 128 * KIB, KIB * KIB]
        .map(|bytes| Work::from_thread(bytes, (BYTES_IN_FLIGHT / bytes).min(16 * KIB)))
}

/// 1 to 64 Ki commands of 128 bytes.
pub fn in_flight() -> [Work; 9] {
    [1, 4, 16, 64, 256, KIB, 4 * KIB, 16 * KIB, 64 * KIB].map(|count| Work::from_thread(128, count))
}

impl Axis {
    /// What a row is compared with: the first of those that share this.
    fn series(self, point: &Point) -> Option<Work> {
        matches!(self, Self::Nodes | Self::Log).then_some(point.work)
    }

    fn title(self) -> &'static str {
        match self {
            Self::Nodes => "nodes",
            Self::Payload => "payload",
            Self::InFlight => "in flight",
            Self::Log => "log behind it",
        }
    }

    fn row(self, point: &Point) -> String {
        let Point { nodes, work, log_gb } = point;
        match self {
            Self::Nodes => format!("{nodes}, {work}"),
            Self::Payload => format!("{}, {} in flight", bytes(work.payload_bytes), count(work.in_flight)),
            Self::InFlight => count(work.in_flight),
            Self::Log => format!("{} GB, {work}", log_gb.unwrap_or_default()),
        }
    }
}

/// What is shown of commands. Bytes per second only where commands have different sizes.
const COLUMNS: [Metric; 4] = [Metric::PerSecond, Metric::P50, Metric::P99, Metric::Cpu];

/// One row's figures, of all rounds: each with its ratio to the first row's of the same round.
struct Row {
    point: Point,
    /// This row's, the first row's, and resident memory.
    rounds: Vec<(Figures, Figures, u64)>,
}

/// A table for each backend and axis, in that order.
pub fn tables(runs: &[Run<Record>]) -> String {
    let mut rows: BTreeMap<(&str, Axis), Vec<Row>> = BTreeMap::new();
    let mut restarts: BTreeMap<&str, Vec<(f64, [f64; 2])>> = BTreeMap::new();
    for run in runs {
        // The first of each series in each round.
        let mut firsts: Vec<(usize, &str, Axis, Option<Work>, Figures)> = Vec::new();
        for record in &run.records {
            match record {
                Record::Commands { round, side, axis, point, figures, resident_bytes } => {
                    let series = axis.series(point);
                    let is_first = |first: &&(usize, &str, Axis, Option<Work>, Figures)| {
                        (first.0, first.1, first.2, first.3) == (*round, side.as_str(), *axis, series)
                    };
                    let first = firsts.iter().find(is_first).map(|first| first.4);
                    if first.is_none() {
                        firsts.push((*round, side, *axis, series, *figures));
                    }
                    let rows = rows.entry((side, *axis)).or_default();
                    let measured = (*figures, first.unwrap_or(*figures), *resident_bytes);
                    match rows.iter_mut().find(|row| row.point == *point) {
                        Some(row) => row.rounds.push(measured),
                        None => rows.push(Row { point: *point, rounds: vec![measured] }),
                    }
                }
                Record::Restart { side, log_gb, started_s, applied_s, .. } => {
                    restarts.entry(side).or_default().push((*log_gb, [*started_s, *applied_s]));
                }
            }
        }
    }
    let mut tables: Vec<String> = Vec::new();
    for ((side, axis), rows) in &rows {
        tables.push(table(side, *axis, rows).to_string());
        if let (Axis::Log, Some(restarts)) = (axis, restarts.get(side)) {
            tables.push(restart_table(side, restarts).to_string());
        }
    }
    tables.join("\n\n")
}

fn table(side: &str, axis: Axis, rows: &[Row]) -> Table {
    let mut metrics = COLUMNS.to_vec();
    if axis == Axis::Payload {
        metrics.insert(1, Metric::BytesPerSecond);
        metrics.push(Metric::CpuPerGb);
    }
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    let mut heads = vec![format!("{side}: {}", axis.title())];
    heads.extend(metrics.iter().flat_map(|metric| [metric.name(), "of the first"]).map(str::to_owned));
    heads.push("leader's memory, MiB".to_owned());
    table.set_header(heads);
    for row in rows {
        let mut cells = vec![axis.row(&row.point)];
        for metric in &metrics {
            let figures = row.rounds.iter().map(|(figures, ..)| metric.of(figures));
            let ratios = row.rounds.iter().map(|(figures, first, _)| metric.of(figures) / metric.of(first));
            cells.extend(Spread::of(figures).map(|figures| figures.cell(number)));
            cells.extend(Spread::of(ratios).map(|ratios| ratio(ratios.median)));
        }
        let resident = row.rounds.iter().map(|(.., resident)| *resident as f64 / f64::from(1 << 20));
        cells.extend(Spread::of(resident).map(|resident| format!("{:.0}", resident.median)));
        table.add_row(cells);
    }
    table
}

fn restart_table(side: &str, restarts: &[(f64, [f64; 2])]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    let title = format!("{side}: a follower starts again");
    table.set_header([&title, "log recovered after, s", "all applied after, s"]);
    let mut sizes: Vec<f64> = restarts.iter().map(|(log_gb, _)| *log_gb).collect();
    sizes.sort_unstable_by(f64::total_cmp);
    sizes.dedup();
    for size in sizes {
        let mut cells = vec![format!("{size} GB")];
        for at in [0, 1] {
            let times = restarts.iter().filter(|(log_gb, _)| *log_gb == size).map(|(_, times)| times[at]);
            cells.extend(Spread::of(times).map(|times| times.cell(ratio)));
        }
        table.add_row(cells);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::super::tests::{cells, header};
    use super::*;

    fn commands(round: usize, axis: Axis, point: Point, per_s: f64) -> Record {
        let figures = Figures {
            per_s,
            bytes_per_s: per_s * point.work.payload_bytes as f64,
            p50_us: 1e6 / per_s,
            p99_us: 2e6 / per_s,
            cpu_us: 50.0,
            cpu_s_per_gb: 5.0,
        };
        Record::Commands { round, side: "uring".to_owned(), axis, point, figures, resident_bytes: 96 << 20 }
    }

    fn fixture(records: &[Record]) -> Vec<Run<Record>> {
        let mut lines = vec![serde_json::json!({ "run": header(TOOL) }).to_string()];
        lines.extend(records.iter().map(|record| serde_json::to_string(record).unwrap()));
        parse(TOOL, &lines.join("\n")).unwrap()
    }

    #[test]
    fn each_figure_stands_beside_its_ratio_to_the_first_of_its_series_in_its_round() {
        let [alone, many] = ALONE_AND_MANY;
        let mut records = Vec::new();
        // The machine is twice as fast in the second round: the ratios do not see it.
        for (round, speed) in [(1, 1.0), (2, 2.0)] {
            for (nodes, work, per_s) in
                [(1, alone, 100.0), (1, many, 1000.0), (3, alone, 50.0), (3, many, 900.0)]
            {
                let point = Point { nodes, work, log_gb: None };
                records.push(commands(round, Axis::Nodes, point, per_s * speed));
            }
        }
        let tables = tables(&fixture(&records));
        let cells = cells(&tables);
        assert_eq!(cells[0][..3], ["uring: nodes", "commands/s", "of the first"]);
        let rows: Vec<_> = cells[1..].iter().map(|row| [row[0], row[1], row[2], row[4], row[9]]).collect();
        assert_eq!(
            rows,
            [
                ["1, 128 B x 1", "150 [100 .. 200]", "1.00", "1.00", "96"],
                ["1, 128 B x 1 Ki", "1500 [1000 .. 2000]", "1.00", "1.00", "96"],
                ["3, 128 B x 1", "75.00 [50.00 .. 100]", "0.50", "2.00", "96"],
                ["3, 128 B x 1 Ki", "1350 [900 .. 1800]", "0.90", "1.11", "96"],
            ]
        );
    }

    #[test]
    fn sizes_have_bytes_too_and_a_log_has_its_restarts() {
        let [small, .., large] = payloads();
        let point = |work, log_gb| Point { nodes: 3, work, log_gb };
        let restart = |log_gb, started_s| {
            let side = "uring".to_owned();
            Record::Restart { round: 1, side, log_gb, started_s, applied_s: started_s + 1.0 }
        };
        let [alone, _] = ALONE_AND_MANY;
        let tables = tables(&fixture(&[
            commands(1, Axis::Payload, point(small, None), 1000.0),
            commands(1, Axis::Payload, point(large, None), 100.0),
            commands(1, Axis::Log, point(alone, Some(0.0)), 100.0),
            restart(0.0, 0.25),
            commands(1, Axis::Log, point(alone, Some(2.5)), 99.0),
            restart(2.5, 3.5),
        ]));
        let cells = cells(&tables);
        assert_eq!(cells[0].len(), 14);
        assert_eq!(
            cells[2][..5],
            ["1 MiB, 2 in flight", "100 [100 .. 100]", "0.10", "104.86 M [104.86 M .. 104.86 M]", "6553.60"]
        );
        assert_eq!(cells[5][..3], ["2.5 GB, 128 B x 1", "99.00 [99.00 .. 99.00]", "0.99"]);
        assert_eq!(
            cells[6..],
            [
                ["uring: a follower starts again", "log recovered after, s", "all applied after, s"],
                ["0 GB", "0.25 [0.25 .. 0.25]", "1.25 [1.25 .. 1.25]"],
                ["2.5 GB", "3.50 [3.50 .. 3.50]", "4.50 [4.50 .. 4.50]"],
            ]
        );
    }

    #[test]
    fn no_size_has_more_in_flight_than_is_of_use_or_nothing() {
        for work in payloads() {
            assert!(work.in_flight >= 1 && work.in_flight <= 16 * KIB, "{work}");
            assert!(work.payload_bytes * work.in_flight <= 2 << 20, "{work}");
        }
    }
}
