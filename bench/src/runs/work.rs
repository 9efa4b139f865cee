//! What is asked of a cluster, and what it took.

use serde::{Deserialize, Serialize};

/// Commands that are kept in flight.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Work {
    /// Bytes of each.
    pub payload_bytes: usize,
    /// How many are proposed and not yet committed at any time.
    pub in_flight: usize,
    /// Proposed on the leader's core, not from a thread.
    pub on_core: bool,
}

impl Work {
    /// Proposed from a thread of the leader's process.
    pub const fn from_thread(payload_bytes: usize, in_flight: usize) -> Self {
        Self { payload_bytes, in_flight, on_core: false }
    }
}

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = if self.on_core { ", on core" } else { "" };
        write!(f, "{} x {}{place}", bytes(self.payload_bytes), count(self.in_flight))
    }
}

/// A size, in the largest unit that it is a multiple of.
pub fn bytes(bytes: usize) -> String {
    match bytes {
        bytes if bytes >= 1 << 20 && bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        bytes if bytes >= 1 << 10 && bytes.is_multiple_of(1 << 10) => format!("{} KiB", bytes >> 10),
        bytes => format!("{bytes} B"),
    }
}

/// A number of commands, in multiples of 1024 where it is one.
pub fn count(count: usize) -> String {
    match count {
        count if count >= 1 << 10 && count.is_multiple_of(1 << 10) => format!("{} Ki", count >> 10),
        count => count.to_string(),
    }
}

/// What commands took.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Figures {
    /// Commands committed per second.
    pub per_s: f64,
    /// Their bytes, each counted once.
    pub bytes_per_s: f64,
    /// Median latency.
    pub p50_us: f64,
    /// 99th percentile of the latency.
    pub p99_us: f64,
    /// Processor time of all processes per command, or per batch of the floor.
    pub cpu_us: f64,
    /// Processor time of all processes per 10^9 bytes.
    pub cpu_s_per_gb: f64,
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// [`Figures::per_s`].
    PerSecond,
    /// [`Figures::bytes_per_s`].
    BytesPerSecond,
    /// [`Figures::p50_us`].
    P50,
    /// [`Figures::p99_us`].
    P99,
    /// [`Figures::cpu_us`].
    Cpu,
    /// [`Figures::cpu_s_per_gb`].
    CpuPerGb,
}

impl Metric {
    /// This one of them.
    pub fn of(self, figures: &Figures) -> f64 {
        match self {
            Self::PerSecond => figures.per_s,
            Self::BytesPerSecond => figures.bytes_per_s,
            Self::P50 => figures.p50_us,
            Self::P99 => figures.p99_us,
            Self::Cpu => figures.cpu_us,
            Self::CpuPerGb => figures.cpu_s_per_gb,
        }
    }

    /// What it is called in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::PerSecond => "commands/s",
            Self::BytesPerSecond => "bytes/s",
            Self::P50 => "p50, µs",
            Self::P99 => "p99, µs",
            Self::Cpu => "CPU each, µs",
            Self::CpuPerGb => "CPU per GB, s",
        }
    }

    /// Whether more of it is better.
    pub fn more_is_better(self) -> bool {
        matches!(self, Self::PerSecond | Self::BytesPerSecond)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_written_in_round_units() {
        assert_eq!(Work::from_thread(128, 1 << 14).to_string(), "128 B x 16 Ki");
        assert_eq!(Work { on_core: true, ..Work::from_thread(4096, 1) }.to_string(), "4 KiB x 1, on core");
        assert_eq!(
            (bytes(1 << 20), bytes(1536), count(1000)),
            ("1 MiB".into(), "1536 B".into(), "1000".into())
        );
    }
}
