//! The result: as JSON for programs, as a table for people.

use super::ledger::Ending;
use super::verify::Verified;
use crate::limit::LimitReport;
use crate::machine::{Environment, LogFiles};
use crate::node::LoadFrom;
use anyhow::ensure;
use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table, presets};
use hdrhistogram::Histogram;
use ringraft::runtime::Backend;
use serde::Serialize;
use std::fmt::Write as _;

/// Changes when a key changes its meaning.
pub(crate) const SCHEMA: &str = "ringraft-bench/1";

/// Two figures of the machine's limit that differ by more than this make the run's shares doubtful.
const NOISE: f64 = 1.25;

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) schema: &'static str,
    pub(crate) environment: Environment,
    pub(crate) config: Config,
    pub(crate) durable: Durable,
    pub(crate) commits_per_s: f64,
    pub(crate) payload_bytes_per_s: f64,
    pub(crate) latency_us: Latency,
    /// Over all nodes' processes, the load generator included.
    pub(crate) cpu_us_per_commit: f64,
    /// Mean per node.
    pub(crate) disk_bytes_per_payload_byte: Option<f64>,
    pub(crate) batch: Batch,
    /// The mean of the measurements before and after.
    pub(crate) limit: Option<Limit>,
    pub(crate) share_of_limit: Option<Share>,
    pub(crate) verified: Option<Verified>,

    /// Commits in the measured window.
    pub(crate) commits: u64,
    pub(crate) window_s: f64,
    pub(crate) cpu: Cpu,
    pub(crate) others: Option<Others>,
    pub(crate) disk: Disk,
    pub(crate) spread: Spread,
    pub(crate) failover: Option<Failover>,
    pub(crate) leaders: Vec<Leader>,
    pub(crate) outcomes: Outcomes,
    pub(crate) limit_before: Option<Limit>,
    pub(crate) limit_after: Option<Limit>,
    pub(crate) notes: Vec<String>,
}

/// What was asked for.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Config {
    pub(crate) nodes: usize,
    pub(crate) payload_bytes: usize,
    pub(crate) in_flight: u32,
    /// Commands per second in an open loop.
    pub(crate) rate: Option<f64>,
    pub(crate) load: LoadFrom,
    pub(crate) duration_s: f64,
    pub(crate) warmup_s: f64,
    pub(crate) cores: Vec<usize>,
    /// MiB of log after which a node takes a snapshot and purges; 0: never.
    pub(crate) snapshot_mb: u64,
    pub(crate) engine: Engine,
}

/// The engine's configuration as it was in force.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Engine {
    pub(crate) backend: String,
    pub(crate) idle: String,
    pub(crate) batch_bytes_max: usize,
    pub(crate) writes_in_flight_max: usize,
    pub(crate) write_bytes_in_flight_max: usize,
    pub(crate) window_batches: usize,
    pub(crate) window_bytes: usize,
    pub(crate) uncommitted_bytes_max: usize,
    pub(crate) segment_bytes: u64,
    pub(crate) segments_ahead: usize,
    pub(crate) election_timeout_ms: f64,
    pub(crate) heartbeat_interval_ms: f64,
    pub(crate) commit_notice_delay_ms: f64,
}

impl From<&ringraft::Config> for Engine {
    fn from(config: &ringraft::Config) -> Self {
        let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
        Self {
            backend: format!("{:?}", config.backend.unwrap_or_else(Backend::of_this_machine)).to_lowercase(),
            idle: format!("{:?}", config.idle).to_lowercase(),
            batch_bytes_max: config.batch_bytes_max,
            writes_in_flight_max: config.writes_in_flight_max,
            write_bytes_in_flight_max: config.write_bytes_in_flight_max,
            window_batches: config.window_batches,
            window_bytes: config.window_bytes,
            uncommitted_bytes_max: config.uncommitted_bytes_max,
            segment_bytes: config.segment_bytes,
            segments_ahead: config.segments_ahead,
            election_timeout_ms: ms(config.election_timeout),
            heartbeat_interval_ms: ms(config.heartbeat_interval),
            commit_notice_delay_ms: ms(config.commit_notice_delay),
        }
    }
}

/// What an acknowledgement stands for.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Durable {
    /// In words.
    pub(crate) acknowledgement: String,
    pub(crate) nodes: usize,
    pub(crate) majority: usize,
    /// Every live node was seen to write its segments with `O_DIRECT | O_DSYNC`, and none otherwise. False when `/proc`
    /// did not show it; a node that was seen to do otherwise fails the run.
    pub(crate) seen: bool,
    /// Segments of each node's log that were seen open with these flags at the end of the run; 0 for one that had ended.
    pub(crate) durable_files_seen: Vec<usize>,
}

impl Durable {
    /// Judges by the segments that each live node had open for writing; none where `/proc` did not show them. Fails
    /// when a node was seen to do anything else than an acknowledgement promises.
    pub(crate) fn of(nodes: usize, live: &[(u64, Option<LogFiles>)]) -> anyhow::Result<Self> {
        for (node, files) in live {
            let Some(LogFiles { durable, others }) = files else { continue };
            ensure!(
                *others == 0,
                "node {node} has {others} segments of its log open for writing without O_DIRECT | O_DSYNC: what it \
                 acknowledges is not durable, so there is no result"
            );
            ensure!(
                *durable > 0,
                "node {node} was not seen with a segment of its log open with O_DIRECT | O_DSYNC, so there is no proof \
                 that what it acknowledges is durable, and no result"
            );
        }
        let majority = nodes / 2 + 1;
        let seen = !live.is_empty() && live.iter().all(|(_, files)| files.is_some());
        let durable_of = |node: u64| {
            let files = live.iter().find(|(id, _)| *id == node).and_then(|(_, files)| *files);
            files.map_or(0, |files| files.durable)
        };
        let how = if seen { "durable" } else { "meant to be durable" };
        Ok(Self {
            acknowledgement: format!(
                "{how} (O_DIRECT | O_DSYNC) on {majority} of {nodes} nodes and applied on the leader"
            ),
            nodes,
            majority,
            seen,
            durable_files_seen: (1..=nodes as u64).map(durable_of).collect(),
        })
    }
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
}

impl Latency {
    pub(crate) fn of(latencies: &Histogram<u64>, max_ns: u64) -> Self {
        let us = |quantile| latencies.value_at_quantile(quantile).min(max_ns) as f64 / 1e3;
        Self { p50: us(0.5), p90: us(0.9), p99: us(0.99), p999: us(0.999), max: max_ns as f64 / 1e3 }
    }
}

/// Batches of commands that the leaders applied within the window.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Batch {
    pub(crate) entries_mean: f64,
    /// Payload bytes.
    pub(crate) bytes_mean: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Limit {
    pub(crate) flush_us_p50: f64,
    pub(crate) rtt_us_p50: f64,
    /// Of the smallest batch, one at a time.
    pub(crate) commit_us_p50: f64,
    pub(crate) commit_cpu_us: f64,
    pub(crate) bytes_per_s: f64,
}

impl From<&LimitReport> for Limit {
    fn from(report: &LimitReport) -> Self {
        Self {
            flush_us_p50: report.flush_us_p50,
            rtt_us_p50: report.rtt_us_p50,
            commit_us_p50: report.commit_us_p50,
            commit_cpu_us: report.commit_cpu_us,
            bytes_per_s: report.bytes_per_s,
        }
    }
}

impl Limit {
    /// The mean of two.
    pub(crate) fn between(a: &Self, b: &Self) -> Self {
        let mean = |figure: fn(&Self) -> f64| f64::midpoint(figure(a), figure(b));
        Self {
            flush_us_p50: mean(|limit| limit.flush_us_p50),
            rtt_us_p50: mean(|limit| limit.rtt_us_p50),
            commit_us_p50: mean(|limit| limit.commit_us_p50),
            commit_cpu_us: mean(|limit| limit.commit_cpu_us),
            bytes_per_s: mean(|limit| limit.bytes_per_s),
        }
    }

    /// Whether two measurements of one machine differ so much that something else was going on.
    pub(crate) fn differs_from(&self, other: &Self) -> bool {
        let apart = |a: f64, b: f64| a.max(b) > NOISE * a.min(b);
        apart(self.commit_us_p50, other.commit_us_p50) || apart(self.bytes_per_s, other.bytes_per_s)
    }
}

/// 1 is the machine's limit.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Share {
    /// The limit's median commit over ours.
    pub(crate) latency: f64,
    /// Our payload bytes per second over the limit's.
    pub(crate) throughput: f64,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Cpu {
    /// Per commit, each node's processes, by id.
    pub(crate) nodes_us_per_commit: Vec<f64>,
    /// Per commit, the load generator's thread, which is part of the leader's figure; none with `--load core`.
    pub(crate) generator_us_per_commit: Option<f64>,
}

/// What else the machine did within the window, in processors.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Others {
    /// Used by other programs and by the kernel on its own account.
    pub(crate) busy_cores: f64,
    /// Taken by the hypervisor.
    pub(crate) stolen_cores: f64,
}

impl Others {
    /// So much disturbs the figures.
    pub(crate) fn disturb(&self) -> bool {
        self.busy_cores.max(self.stolen_cores) > 0.2
    }
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Disk {
    /// What `disk_bytes_per_payload_byte` was taken from.
    pub(crate) source: &'static str,
    /// By the counters of the block device: everything on the machine that wrote to it.
    pub(crate) device_bytes: Option<u64>,
    /// By `/proc/PID/io`, all nodes.
    pub(crate) process_bytes: u64,
}

/// Commits per second in slices of the window.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Spread {
    pub(crate) slice_ms: u64,
    pub(crate) slices: usize,
    pub(crate) commits_per_s_min: f64,
    pub(crate) commits_per_s_p50: f64,
    pub(crate) commits_per_s_max: f64,
}

impl Spread {
    pub(crate) fn of(slice_ms: u64, mut rates: Vec<f64>) -> Self {
        rates.sort_by(f64::total_cmp);
        Self {
            slice_ms,
            slices: rates.len(),
            commits_per_s_min: rates.first().copied().unwrap_or_default(),
            commits_per_s_p50: rates.get(rates.len() / 2).copied().unwrap_or_default(),
            commits_per_s_max: rates.last().copied().unwrap_or_default(),
        }
    }
}

/// The leader changed during the run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Failover {
    /// The longest time from the last acknowledgement by one leader to the first by the next.
    pub(crate) gap_ms: f64,
    /// Each of these times.
    pub(crate) gaps_ms: Vec<f64>,
    pub(crate) election_timeouts: f64,
}

/// One generator's time: who led and how it ended.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Leader {
    pub(crate) node: u64,
    pub(crate) term: u64,
    pub(crate) acked: u64,
    pub(crate) ended: Ending,
}

/// Of all commands, warm-up included.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Outcomes {
    pub(crate) acked: u64,
    pub(crate) unknown: u64,
    /// Definite refusals, each followed by another attempt or by the end of its generator.
    pub(crate) refused: u64,
    /// Commands on the open loop's timetable.
    pub(crate) due: Option<u64>,
    /// Those of them that were not acknowledged: of unknown outcome, or not sent before the end.
    pub(crate) missed: Option<u64>,
}

/// An open loop that commits less than is due, by more than this part of it, is not measured at its rate.
const SHORTFALL: f64 = 0.01;

/// What to say of an open loop in whose window `due` commands were due and `commits` acknowledged; over the whole run
/// the outcome of `unknown` ones is not known.
pub(crate) fn shortfall(due: f64, commits: u64, unknown: u64) -> Vec<String> {
    let mut notes = Vec::new();
    let missing = due - commits as f64;
    if missing > SHORTFALL * due {
        notes.push(format!(
            "{} of the {} commands due within the window were not acknowledged in it ({:.1} %): the latencies are those \
             of the others",
            thousands(missing),
            thousands(due),
            100.0 * missing / due
        ));
    }
    if unknown > 0 {
        notes.push(format!(
            "the outcome of {} commands is unknown; they count as missed and are not in the latencies",
            thousands(unknown as f64)
        ));
    }
    notes
}

/// The report for people.
pub(crate) fn render(report: &Report) -> String {
    let Report { config, latency_us, batch, .. } = report;
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["", "ringraft", "limit before", "limit after", "share of limit"]);
    let both = |figure: &dyn Fn(&Limit) -> String| {
        [&report.limit_before, &report.limit_after]
            .map(|limit| limit.as_ref().map_or_else(String::new, figure))
    };
    let share = |figure: fn(&Share) -> f64| {
        report
            .share_of_limit
            .as_ref()
            .map_or_else(String::new, |share| format!("{:.0} %", 100.0 * figure(share)))
    };
    let mut row = |name: &str, value: String, [before, after]: [String; 2], share: String| {
        table.add_row([name.to_owned(), value, before, after, share]);
    };
    let none = || [String::new(), String::new()];
    let mb = |bytes: f64| format!("{:.1}", bytes / 1e6);
    row("commits per s", thousands(report.commits_per_s), none(), String::new());
    row(
        "payload MB/s",
        mb(report.payload_bytes_per_s),
        both(&|limit| mb(limit.bytes_per_s)),
        share(|share| share.throughput),
    );
    row(
        "latency p50 µs",
        microseconds(latency_us.p50),
        both(&|limit| microseconds(limit.commit_us_p50)),
        share(|share| share.latency),
    );
    row("        p90", microseconds(latency_us.p90), none(), String::new());
    row("        p99", microseconds(latency_us.p99), none(), String::new());
    row("        p99.9", microseconds(latency_us.p999), none(), String::new());
    row("        max", microseconds(latency_us.max), none(), String::new());
    row(
        "CPU µs per commit",
        format!("{:.2}", report.cpu_us_per_commit),
        both(&|limit| format!("{:.1} a batch", limit.commit_cpu_us)),
        String::new(),
    );
    if let Some(generator) = report.cpu.generator_us_per_commit {
        row("  of it load generator", format!("{generator:.2}"), none(), String::new());
    }
    let disk = report.disk_bytes_per_payload_byte;
    let disk = disk.map_or_else(|| "unknown".to_owned(), |ratio| format!("{ratio:.2}"));
    row("disk bytes per payload byte", disk, none(), String::new());
    row(
        "mean batch",
        format!("{:.1} commands, {:.0} B", batch.entries_mean, batch.bytes_mean),
        none(),
        String::new(),
    );
    for (position, column) in table.column_iter_mut().enumerate().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
        if position > 1 && report.limit.is_none() {
            column.set_constraint(ColumnConstraint::Hidden);
        }
    }

    let mut out = String::new();
    let environment = &report.environment;
    let device = environment.device.as_ref().map_or_else(String::new, |device| format!(" on {device}"));
    let pace = match config.rate {
        Some(rate) => format!("open loop at {} per s, up to {} in flight", thousands(rate), config.in_flight),
        None => format!("closed loop, {} in flight", config.in_flight),
    };
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{} nodes, {} B commands, {pace}, load from {}; {:.1} s",
        config.nodes,
        config.payload_bytes,
        match config.load {
            LoadFrom::Thread => "a thread",
            LoadFrom::Core => "the core",
        },
        report.window_s
    );
    let _ = writeln!(
        out,
        "{}, {} cores, kernel {}, {}{device}",
        environment.cpu, environment.cpus, environment.kernel, environment.file_system
    );
    let _ = writeln!(out, "{table}");
    let seen = if report.durable.seen { " (these flags were seen in /proc on every live node)" } else { "" };
    let _ = writeln!(out, "An acknowledged command is {}{seen}.", report.durable.acknowledgement);
    if let Some(failover) = &report.failover {
        let leaders: Vec<_> = report
            .leaders
            .iter()
            .map(|leader| format!("node {} (term {})", leader.node, leader.term))
            .collect();
        let gaps: Vec<_> = failover.gaps_ms.iter().map(|gap| format!("{gap:.0} ms")).collect();
        let _ = writeln!(
            out,
            "Failover: led by {}; without acknowledgements for {} ({:.1} election time-outs).",
            leaders.join(", then "),
            gaps.join(" and "),
            failover.election_timeouts
        );
    }
    match &report.verified {
        Some(verified) => {
            let _ = writeln!(out, "{verified}");
        }
        None => {
            let _ = writeln!(out, "Not verified, as asked.");
        }
    }
    for note in &report.notes {
        let _ = writeln!(out, "Note: {note}.");
    }
    out
}

fn microseconds(us: f64) -> String {
    if us >= 10_000.0 { thousands(us) } else { format!("{us:.1}") }
}

fn thousands(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut out = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// The percentile distribution in the format of HdrHistogram's own tools, in microseconds.
pub(crate) fn hgrm(latencies: &Histogram<u64>) -> String {
    let mut out =
        format!("{:>12} {:>14} {:>10} {:>14}\n\n", "Value", "Percentile", "TotalCount", "1/(1-Percentile)");
    let mut seen = 0;
    for value in latencies.iter_quantiles(5) {
        seen += value.count_since_last_iteration();
        let quantile = value.quantile_iterated_to();
        let us = value.value_iterated_to() as f64 / 1e3;
        let _ = write!(out, "{us:12.3} {quantile:2.12} {seen:10}");
        let _ =
            if quantile < 1.0 { writeln!(out, " {:14.2}", 1.0 / (1.0 - quantile)) } else { writeln!(out) };
    }
    let us = |ns: f64| ns / 1e3;
    let _ = writeln!(
        out,
        "#[Mean    = {:12.3}, StdDeviation   = {:12.3}]\n#[Max     = {:12.3}, Total count    = {:12}]\n\
         #[Buckets = {:12}, SubBuckets     = {:12}]",
        us(latencies.mean()),
        us(latencies.stdev()),
        us(latencies.max() as f64),
        latencies.len(),
        latencies.buckets(),
        2048
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(thousands(1_234_567.4), "1\u{202f}234\u{202f}567");
        assert_eq!(thousands(999.0), "999");
        assert_eq!(thousands(0.0), "0");
    }

    #[test]
    fn the_percentile_distribution_ends_with_all_values() {
        let mut latencies = super::super::ledger::latency_histogram();
        for us in 1..=1000_u64 {
            latencies.record(us * 1000).unwrap();
        }
        let text = hgrm(&latencies);
        let last = text.lines().rfind(|line| !line.starts_with('#')).unwrap();
        let fields: Vec<_> = last.split_whitespace().collect();
        assert_eq!(fields[1..], ["1.000000000000", "1000"], "{text}");
        assert!(text.contains("Total count    =         1000"), "{text}");
    }

    #[test]
    fn an_open_loop_that_falls_short_by_more_than_one_percent_says_so() {
        assert_eq!(shortfall(10_000.0, 9_900, 0), [""; 0]);
        assert_eq!(shortfall(10_000.0, 10_200, 0), [""; 0]);
        let notes = shortfall(10_000.0, 9_899, 7);
        assert_eq!(notes.len(), 2, "{notes:?}");
        assert!(notes[0].contains("101 of the") && notes[0].contains("(1.0 %)"), "{notes:?}");
        assert!(notes[1].contains("7 commands is unknown"), "{notes:?}");
    }

    #[test]
    fn durable_is_said_only_when_every_live_node_was_seen_to_be() {
        let files = |durable, others| Some(LogFiles { durable, others });
        let good = Durable::of(3, &[(1, files(2, 0)), (3, files(1, 0))]).unwrap();
        assert_eq!(good.durable_files_seen, [2, 0, 1]);
        assert!(good.seen && good.acknowledgement.starts_with("durable"), "{good:?}");
        for unseen in [&[][..], &[(1, files(2, 0)), (2, None)]] {
            let unseen = Durable::of(3, unseen).unwrap();
            assert!(!unseen.seen && unseen.acknowledgement.starts_with("meant to be"), "{unseen:?}");
        }
        for (files, said) in [(files(0, 0), "was not seen"), (files(2, 1), "is not durable")] {
            let error = Durable::of(3, &[(1, None), (2, files)]).unwrap_err().to_string();
            assert!(error.starts_with("node 2 ") && error.contains(said), "{error}");
        }
    }

    #[test]
    fn a_limit_that_moved_by_a_third_is_noise() {
        let limit = Limit {
            flush_us_p50: 30.0,
            rtt_us_p50: 20.0,
            commit_us_p50: 90.0,
            commit_cpu_us: 70.0,
            bytes_per_s: 5e8,
        };
        assert!(!limit.differs_from(&Limit { commit_us_p50: 100.0, ..limit }));
        assert!(limit.differs_from(&Limit { commit_us_p50: 120.0, ..limit }));
        assert_eq!(Limit::between(&limit, &Limit { bytes_per_s: 7e8, ..limit }).bytes_per_s, 6e8);
    }
}
