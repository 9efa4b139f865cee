//! The command line.

use crate::bench::BenchArgs;
use crate::limit::{FollowerArgs, LimitArgs};
use crate::node::NodeArgs;
use crate::wal::WalArgs;
use crate::{bench, cleanup, exit, limit, node, wal};
use clap::{Parser, Subcommand};
use ringraft::Config;
use ringraft::runtime::{Backend, IdlePolicy};
use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

/// Replicates a log: runs a node, and measures what a durable commit costs on this machine
///
/// Without a command it runs `bench`.
#[derive(Debug, Parser)]
#[command(name = "ringraft", version, after_help = exit::HELP)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Bench(BenchArgs),
    Limit(LimitArgs),
    Node(NodeArgs),
    Wal(WalArgs),
    /// A follower of `limit`
    #[command(name = limit::FOLLOWER_COMMAND, hide = true)]
    LimitFollower(FollowerArgs),
}

/// Runs the program on the arguments of the process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let command = cli.command.unwrap_or_else(|| {
        let bench = Cli::parse_from(["ringraft", "bench"]);
        bench.command.expect("a command was given")
    });
    let outcome = match &command {
        Command::Bench(args) => caught().and_then(|()| bench::run(args)),
        // It leaves nothing behind when a signal ends it: its files have no names, its followers die with it.
        Command::Limit(args) => limit::run(args),
        Command::Node(args) => caught().and_then(|()| node::run(args)),
        Command::Wal(args) => wal::run(args),
        Command::LimitFollower(args) => limit::follower_main(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let told = match error.downcast_ref::<ringraft::error::StopCause>() {
                Some(cause) => cause.to_string(),
                None => format!("{error:#}"),
            };
            eprintln!("error: {told}");
            ExitCode::from(exit::code_of(&error))
        }
    }
}

fn caught() -> anyhow::Result<()> {
    Ok(cleanup::catch_signals()?)
}

/// Knobs of the engine, the same for `bench` and `node`. What is not given keeps the engine's default.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArgs {
    /// What runs the core: glommio, or uring (Linux 6.1) [default: uring where the kernel has it]
    #[arg(long, value_name = "NAME", value_parser = backend)]
    pub(crate) backend: Option<Backend>,
    /// What the core does when idle: park, adaptive (adaptive:MICROSECONDS) or spin [default:
    /// adaptive:500]
    #[arg(long, value_name = "POLICY", value_parser = idle)]
    pub(crate) idle: Option<IdlePolicy>,
    /// The largest command [default: 1024]
    #[arg(long, value_name = "KIB")]
    pub(crate) command_kb: Option<usize>,
    /// A batch of many commands is sealed at this size at the latest [default: 256]
    #[arg(long, value_name = "KIB")]
    pub(crate) batch_kb: Option<usize>,
    /// Durable writes in flight at once, half of them for full batches only [default: 4]
    #[arg(long, value_name = "N")]
    pub(crate) writes_in_flight: Option<usize>,
    /// Bytes of durable writes in flight [default: 1024]
    #[arg(long, value_name = "KIB")]
    pub(crate) write_kb_in_flight: Option<usize>,
    /// Appends in flight to one follower [default: 64]
    #[arg(long, value_name = "N")]
    pub(crate) window_batches: Option<usize>,
    /// Bytes of appends in flight to one follower [default: 8]
    #[arg(long, value_name = "MIB")]
    pub(crate) window_mb: Option<usize>,
    /// Payload that is proposed and not yet committed, beyond which the engine is busy [default: 64]
    #[arg(long, value_name = "MIB")]
    pub(crate) uncommitted_mb: Option<usize>,
    /// Size of a log segment [default: 64]
    #[arg(long, value_name = "MIB")]
    pub(crate) segment_mb: Option<u64>,
    /// Segments kept ready ahead [default: 4]
    #[arg(long, value_name = "N")]
    pub(crate) segments_ahead: Option<usize>,
    /// A follower that hears no leader for this long, and a heartbeat interval, up to half as long again, campaigns [default: 500ms]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) election_timeout: Option<Duration>,
    /// An idle leader reminds its followers this often [default: 50ms]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) heartbeat_interval: Option<Duration>,
    /// The commit index goes out alone after this long without an append [default: 1ms]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) commit_notice_delay: Option<Duration>,
}

impl EngineArgs {
    /// Puts what was given into `config`.
    pub(crate) fn apply_to(&self, config: &mut Config) {
        fn put<T: Copy, U>(given: Option<T>, place: &mut U, unit: impl FnOnce(T) -> U) {
            if let Some(given) = given {
                *place = unit(given);
            }
        }
        let kib = |given: usize| given.saturating_mul(1 << 10);
        let mib = |given: usize| given.saturating_mul(1 << 20);
        put(self.backend, &mut config.backend, Some);
        put(self.idle, &mut config.idle, |given| given);
        put(self.command_kb, &mut config.command_bytes_max, kib);
        put(self.batch_kb, &mut config.batch_bytes_max, kib);
        put(self.writes_in_flight, &mut config.writes_in_flight_max, |given| given);
        put(self.write_kb_in_flight, &mut config.write_bytes_in_flight_max, kib);
        put(self.window_batches, &mut config.window_batches, |given| given);
        put(self.window_mb, &mut config.window_bytes, mib);
        put(self.uncommitted_mb, &mut config.uncommitted_bytes_max, mib);
        put(self.segment_mb, &mut config.segment_bytes, |given| given.saturating_mul(1 << 20));
        put(self.segments_ahead, &mut config.segments_ahead, |given| given);
        put(self.election_timeout, &mut config.election_timeout, |given| given);
        put(self.heartbeat_interval, &mut config.heartbeat_interval, |given| given);
        put(self.commit_notice_delay, &mut config.commit_notice_delay, |given| given);
    }

    /// The same as arguments for another process.
    pub(crate) fn to_args(&self) -> Vec<OsString> {
        let backend = self.backend.map(|backend| match backend {
            Backend::Glommio => "glommio".to_owned(),
            Backend::Uring => "uring".to_owned(),
        });
        let idle = self.idle.map(|idle| match idle {
            IdlePolicy::Park => "park".to_owned(),
            IdlePolicy::Spin => "spin".to_owned(),
            IdlePolicy::Adaptive { spin_us } => format!("adaptive:{spin_us}"),
        });
        let number = |given: Option<usize>| given.map(|given| given.to_string());
        let time = |given: Option<Duration>| given.map(|given| format!("{}us", given.as_micros()));
        let all = [
            ("--backend", backend),
            ("--idle", idle),
            ("--command-kb", number(self.command_kb)),
            ("--batch-kb", number(self.batch_kb)),
            ("--writes-in-flight", number(self.writes_in_flight)),
            ("--write-kb-in-flight", number(self.write_kb_in_flight)),
            ("--window-batches", number(self.window_batches)),
            ("--window-mb", number(self.window_mb)),
            ("--uncommitted-mb", number(self.uncommitted_mb)),
            ("--segment-mb", self.segment_mb.map(|given| given.to_string())),
            ("--segments-ahead", number(self.segments_ahead)),
            ("--election-timeout", time(self.election_timeout)),
            ("--heartbeat-interval", time(self.heartbeat_interval)),
            ("--commit-notice-delay", time(self.commit_notice_delay)),
        ];
        let given = all.into_iter().filter_map(|(name, value)| Some([name.into(), value?.into()]));
        given.flatten().collect()
    }
}

fn backend(text: &str) -> Result<Backend, String> {
    match text {
        "glommio" => Ok(Backend::Glommio),
        "uring" => Ok(Backend::Uring),
        _ => Err("it must be glommio or uring".to_owned()),
    }
}

fn idle(text: &str) -> Result<IdlePolicy, String> {
    match text.split_once(':').unwrap_or((text, "")) {
        ("park", "") => Ok(IdlePolicy::Park),
        ("spin", "") => Ok(IdlePolicy::Spin),
        ("adaptive", "") => Ok(IdlePolicy::ADAPTIVE),
        ("adaptive", spin_us) => {
            let spin_us = spin_us.parse().map_err(|_| format!("`{spin_us}` is no number of microseconds"))?;
            Ok(IdlePolicy::Adaptive { spin_us })
        }
        _ => Err("it must be park, adaptive, adaptive:MICROSECONDS or spin".to_owned()),
    }
}

/// `10s`, `1.5s`, `500ms`, `250us`, `2m`; a bare number counts seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let seconds = match unit {
        "" | "s" => 1.0,
        "ms" => 1e-3,
        "us" => 1e-6,
        "m" | "min" => 60.0,
        _ => return Err(format!("`{unit}` is no unit of time: use us, ms, s or m")),
    };
    let number: f64 =
        number.trim().parse().map_err(|_| format!("`{text}` is no time, such as 10s or 500ms"))?;
    Duration::try_from_secs_f64(number * seconds).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn times_have_units() {
        for (text, expected) in [
            ("10s", Some(Duration::from_secs(10))),
            ("500ms", Some(Duration::from_millis(500))),
            ("1.5", Some(Duration::from_millis(1500))),
            ("250us", Some(Duration::from_micros(250))),
            ("2m", Some(Duration::from_secs(120))),
            ("10h", None),
            ("-1s", None),
            ("s", None),
            ("", None),
        ] {
            assert_eq!(duration(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn engine_flags_survive_the_way_to_a_child() {
        let line = "ringraft node --id 1 --dir d --cluster 1 --members 1=127.0.0.1:1 --backend uring --idle adaptive:7 --command-kb 7 \
                    --batch-kb 8 --writes-in-flight 3 --write-kb-in-flight 9 --window-batches 5 --window-mb 4 --uncommitted-mb 6 \
                    --segment-mb 40 --segments-ahead 2 --election-timeout 300ms --heartbeat-interval 30ms \
                    --commit-notice-delay 500us";
        let words = |line: &str| line.split_whitespace().map(OsString::from).collect::<Vec<_>>();
        let engine = |cli: Cli| match cli.command {
            Some(Command::Node(args)) => args.engine,
            other => panic!("{other:?}"),
        };
        let first = engine(Cli::parse_from(words(line)));
        let base = "ringraft node --id 1 --dir d --cluster 1 --members 1=127.0.0.1:1";
        let again = words(base).into_iter().chain(first.to_args());
        let second = engine(Cli::parse_from(again));
        assert_eq!(format!("{first:?}"), format!("{second:?}"));
        assert_eq!(first.to_args().len(), 28);
    }
}
