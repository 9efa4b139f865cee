//! The figures, as data and as a table.

use std::path::Path;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::{Deserialize, Serialize};

use super::{LimitOptions, Measured, Shape, measure};
use crate::runs::work::bytes;

/// What a row measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// Durable writes to one file, with nobody else.
    Write,
    /// A small message to another process and back.
    RoundTrip,
    /// Bytes to another process, one way.
    Stream,
    /// The replication pattern: sent to all followers, written by all, committed by a majority.
    Replicate,
    /// The same, and a node without work looks for some before it sleeps.
    ReplicateLooking,
}

impl Pattern {
    fn title(self) -> &'static str {
        match self {
            Self::Write => "durable write",
            Self::RoundTrip => "loopback round trip",
            Self::Stream => "loopback stream",
            Self::Replicate => "replicated commit",
            Self::ReplicateLooking => "replicated commit, looking",
        }
    }
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LimitRow {
    /// What was measured.
    pub pattern: Pattern,
    /// Processes that took part.
    pub nodes: usize,
    /// Bytes of a message or batch, and how many were under way at a time.
    #[serde(flatten)]
    pub shape: Shape,
    /// Operations counted.
    pub count: u64,
    /// Operations per second.
    pub per_s: f64,
    /// Payload bytes per second, each counted once however many nodes it went to.
    pub bytes_per_s: f64,
    /// Median latency; none where single operations are not timed.
    pub us_p50: Option<f64>,
    /// 99th percentile of the latency.
    pub us_p99: Option<f64>,
    /// Processor time per operation, of all processes.
    pub cpu_us: f64,
}

impl LimitRow {
    pub(super) fn new(pattern: Pattern, nodes: usize, shape: Shape, measured: &Measured) -> Self {
        let per_s = measured.count as f64 / measured.seconds;
        Self {
            pattern,
            nodes,
            shape,
            count: measured.count,
            per_s,
            bytes_per_s: per_s * shape.batch_bytes as f64,
            us_p50: measured.samples.us(50.0),
            us_p99: measured.samples.us(99.0),
            cpu_us: measured.cpu_ns_each / 1e3,
        }
    }
}

/// What the machine can do: the headline figures, then every measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LimitReport {
    /// The directory measured.
    pub dir: String,
    /// Its file system.
    pub file_system: String,
    /// The kernel's release.
    pub kernel: String,
    /// The mode of io_uring that the kernel offers.
    pub ring_mode: String,
    /// Cores of the machine that this process may use.
    pub cpus: usize,
    /// Nodes of the replication pattern.
    pub nodes: usize,
    /// Seconds that each measurement took.
    pub seconds_per_measure: f64,
    /// Median of the smallest durable write, one at a time.
    pub flush_us_p50: f64,
    /// 99th percentile of the same.
    pub flush_us_p99: f64,
    /// Durable bytes per second to one file: the best shape with several in flight.
    pub write_bytes_per_s: f64,
    /// Median loopback round trip.
    pub rtt_us_p50: f64,
    /// 99th percentile of the same.
    pub rtt_us_p99: f64,
    /// Bytes per second through one loopback connection.
    pub loopback_bytes_per_s: f64,
    /// Median commit of the smallest batch, one at a time.
    pub commit_us_p50: f64,
    /// 99th percentile of the same.
    pub commit_us_p99: f64,
    /// Processor time per commit of the same, of all nodes.
    pub commit_cpu_us: f64,
    /// Committed payload bytes per second: the best shape with several in flight.
    pub bytes_per_s: f64,
    /// Every measurement, in the order taken.
    pub rows: Vec<LimitRow>,
}

impl LimitReport {
    /// The headline figures of `dir` for `nodes` nodes, in 2 to 3 seconds.
    pub fn short(dir: &Path, nodes: usize) -> anyhow::Result<Self> {
        measure(&LimitOptions::short(dir, nodes))
    }

    /// The measurement of the replication pattern in `shape`, if it was taken.
    pub fn replicated(&self, shape: Shape) -> Option<&LimitRow> {
        self.rows.iter().find(|row| row.pattern == Pattern::Replicate && row.shape == shape)
    }

    pub(super) fn new(
        options: &LimitOptions,
        file_system: String,
        ring_mode: &str,
        cpus: usize,
        rows: Vec<LimitRow>,
    ) -> Self {
        let of = |pattern| rows.iter().filter(move |row| row.pattern == pattern);
        // A slow machine may complete no operation in a short time; then there is no figure, and 0 says so.
        let alone = |pattern| {
            let row =
                of(pattern).filter(|row| row.shape.in_flight == 1).min_by_key(|row| row.shape.batch_bytes);
            row.map_or((0.0, 0.0, 0.0), |row| {
                (row.us_p50.unwrap_or_default(), row.us_p99.unwrap_or_default(), row.cpu_us)
            })
        };
        let best = |pattern| of(pattern).map(|row| row.bytes_per_s).fold(0.0, f64::max);
        let (flush_us_p50, flush_us_p99, _) = alone(Pattern::Write);
        let (rtt_us_p50, rtt_us_p99, _) = alone(Pattern::RoundTrip);
        let (commit_us_p50, commit_us_p99, commit_cpu_us) = alone(Pattern::Replicate);
        Self {
            dir: options.dir.display().to_string(),
            file_system,
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            ring_mode: ring_mode.to_owned(),
            cpus,
            nodes: options.nodes,
            seconds_per_measure: options.measure.as_secs_f64(),
            flush_us_p50,
            flush_us_p99,
            write_bytes_per_s: best(Pattern::Write),
            rtt_us_p50,
            rtt_us_p99,
            loopback_bytes_per_s: best(Pattern::Stream),
            commit_us_p50,
            commit_us_p99,
            commit_cpu_us,
            bytes_per_s: best(Pattern::Replicate),
            rows,
        }
    }
}

/// The report for a terminal.
pub fn render(report: &LimitReport) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["", "bytes", "in flight", "p50 µs", "p99 µs", "per s", "MB/s", "CPU µs each"]);
    let microseconds = |us: Option<f64>| us.map_or_else(|| "–".to_owned(), |us| format!("{us:.1}"));
    for row in &report.rows {
        let title = match row.pattern {
            Pattern::Replicate | Pattern::ReplicateLooking if row.nodes > 1 => {
                format!("{}, {} nodes", row.pattern.title(), row.nodes)
            }
            _ => row.pattern.title().to_owned(),
        };
        table.add_row([
            title,
            bytes(row.shape.batch_bytes),
            row.shape.in_flight.to_string(),
            microseconds(row.us_p50),
            microseconds(row.us_p99),
            format!("{:.0}", row.per_s),
            format!("{:.1}", row.bytes_per_s / 1e6),
            format!("{:.1}", row.cpu_us),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!(
        "{} ({}), kernel {}, {} cores, io_uring {}\n{table}\n",
        report.dir, report.file_system, report.kernel, report.cpus, report.ring_mode
    )
}
