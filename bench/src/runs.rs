//! Measuring runs as they are kept, and the tables that are made of them.
//!
//! A raw file has one JSON value a line. A run begins with a [`Header`], which says what it was measured on, and goes on with
//! its records, every figure of every round; another run may follow in the same file. A table is always made of records,
//! whether they have just been measured or are read back, so that a table in a document can be made again from its raw files.
//! Nothing in them names the machine or a place on it.
//!
//! The files: `work.rs` what is asked of a cluster and what it took, `statistics.rs` medians and spreads, and for each of the
//! programs that measure its records and tables: `goals.rs`, `growth.rs`, `syscalls.rs`.

pub mod goals;
pub mod growth;
pub mod statistics;
pub mod syscalls;
pub mod work;

use crate::cleanup::catch_signals;
use crate::machine;
use anyhow::{Context as _, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

pub use crate::machine::Environment;

/// What all programs that measure can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {
    /// Rounds; the tables have their median
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Seconds that each figure is measured for
    #[arg(long, default_value_t = 3.0)]
    pub seconds: f64,
    /// Backends of ringraft, an idle policy behind them or not: uring/park
    #[arg(long, value_delimiter = ',', default_value = "glommio,uring,uring/park")]
    pub backends: Vec<String>,
    /// Where the data goes: a directory on the disk in question [default: below the target directory]
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Appends every figure to FILE as a line of JSON, after a line about the machine
    #[arg(long, value_name = "FILE")]
    pub raw: Option<PathBuf>,
    /// Measures nothing, and makes the tables of what `--raw` has written
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub render: Vec<PathBuf>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    pub bench: bool,
}

impl RunArgs {
    /// Makes the tables of raw files, or of a run of `tool` that is measured now: `measure` is given where its data may go, and
    /// where to record its figures. Without `--dir` the data goes to `scratch`.
    pub fn carry_out<R: Serialize + DeserializeOwned>(
        &self,
        tool: &str,
        sides: Vec<String>,
        scratch: &str,
        tables: fn(&[Run<R>]) -> String,
        measure: impl FnOnce(&Path, &mut Recorder<R>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let runs = match &self.render[..] {
            [] => {
                catch_signals()?;
                let dir = self.dir.as_deref().unwrap_or(Path::new(scratch));
                let mut recorder = Recorder::begin(self.header(tool, sides, dir)?, self.raw.as_deref())?;
                measure(dir, &mut recorder)?;
                vec![recorder.run]
            }
            paths => read(tool, paths)?,
        };
        println!("{}\n\n{}", headers(&runs), tables(&runs));
        Ok(())
    }

    /// `cargo test --benches` runs these programs too: then they only show that they work.
    pub fn is_measuring(&self) -> bool {
        self.bench
    }

    /// How many rounds.
    pub fn rounds(&self) -> usize {
        if self.is_measuring() { self.rounds } else { 1 }
    }

    /// How long each figure is measured.
    pub fn span(&self) -> anyhow::Result<Duration> {
        match self.is_measuring() {
            true => Duration::try_from_secs_f64(self.seconds).context("--seconds"),
            false => Ok(Duration::from_millis(200)),
        }
    }

    fn header(&self, tool: &str, sides: Vec<String>, dir: &Path) -> anyhow::Result<Header> {
        ensure!(self.rounds() > 0, "--rounds: there must be one");
        let environment = machine::environment(dir)?;
        Ok(Header {
            tool: tool.to_owned(),
            date: date(environment.unix_time_s),
            environment,
            // The bare hash: tags move.
            commit: said(Command::new("git").args(["rev-parse", "--short=12", "HEAD"])),
            is_dirty: said(Command::new("git").args(["status", "--porcelain", "--untracked-files=no"]))
                .map(|changed| !changed.is_empty()),
            rustc: said(Command::new("rustc").arg("--version")),
            sides,
            rounds: self.rounds(),
            seconds: self.span()?.as_secs_f64(),
        })
    }
}

/// What a program says, if it succeeds.
fn said(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// How and on what a run was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Header {
    /// The program that measured.
    pub tool: String,
    /// The day, as year-month-day in UTC.
    pub date: String,
    /// The machine, and the disk of the data.
    pub environment: Environment,
    /// What was built, where git knows.
    pub commit: Option<String>,
    /// Whether files that git knows had been changed since.
    pub is_dirty: Option<bool>,
    /// The compiler.
    pub rustc: Option<String>,
    /// What was measured: backends of ringraft, and other programs by their names.
    pub sides: Vec<String>,
    /// Rounds.
    pub rounds: usize,
    /// Seconds that each figure was measured for.
    pub seconds: f64,
}

impl Header {
    /// All of it in a line.
    pub fn line(&self) -> String {
        let machine = &self.environment;
        let unknown = || "unknown".to_owned();
        format!(
            "{} x {}, {} MiB of memory, Linux {}, {} on {}; {}; commit {}{}{}; {}; {}; {} rounds of {} s; load {} before.",
            machine.cpus,
            machine.cpu,
            machine.memory_mib,
            machine.kernel,
            machine.file_system,
            machine.device_class.clone().unwrap_or_else(unknown),
            self.rustc.clone().unwrap_or_else(unknown),
            self.commit.clone().unwrap_or_else(unknown),
            if self.is_dirty == Some(true) { ", changed" } else { "" },
            if machine.optimised { "" } else { ", NOT OPTIMISED" },
            self.sides.join(", "),
            self.date,
            self.rounds,
            self.seconds,
            machine.load_1min_before.map_or_else(unknown, |load| load.to_string()),
        )
    }
}

/// A run: its header, and every figure.
#[derive(Clone, Debug)]
pub struct Run<R> {
    /// How and on what it was measured.
    pub header: Header,
    /// Every figure, in the order in which they were taken.
    pub records: Vec<R>,
}

#[derive(Serialize, Deserialize)]
struct HeaderLine {
    run: Header,
}

/// A run that is being measured, and the raw file that it is written to.
pub struct Recorder<R> {
    run: Run<R>,
    file: Option<File>,
}

impl<R: Serialize> Recorder<R> {
    /// Begins a run; `raw` gets its header at once, and each record when it is known, so that an interrupted run is not lost.
    pub fn begin(header: Header, raw: Option<&Path>) -> anyhow::Result<Self> {
        let file = raw.map(|path| {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)?;
            }
            let file = File::options().create(true).append(true).open(path);
            file.with_context(|| format!("opening {}", path.display()))
        });
        let mut recorder = Self { run: Run { header, records: Vec::new() }, file: file.transpose()? };
        let line = HeaderLine { run: recorder.run.header.clone() };
        recorder.write(&line)?;
        Ok(recorder)
    }

    /// Keeps a figure.
    pub fn record(&mut self, record: R) -> anyhow::Result<()> {
        self.write(&record)?;
        self.run.records.push(record);
        Ok(())
    }

    fn write(&mut self, line: &impl Serialize) -> anyhow::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let line = serde_json::to_string(line)? + "\n";
        file.write_all(line.as_bytes()).context("writing the raw figures")
    }
}

/// The runs of `tool` in raw files.
pub fn read<R: DeserializeOwned>(tool: &str, paths: &[PathBuf]) -> anyhow::Result<Vec<Run<R>>> {
    let mut runs = Vec::new();
    for path in paths {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        runs.extend(parse(tool, &text).with_context(|| path.display().to_string())?);
    }
    Ok(runs)
}

fn parse<R: DeserializeOwned>(tool: &str, text: &str) -> anyhow::Result<Vec<Run<R>>> {
    let mut runs: Vec<Run<R>> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let value: serde_json::Value =
            serde_json::from_str(line).with_context(|| format!("line {number} is no JSON"))?;
        if value.get("run").is_some() {
            let HeaderLine { run: header } =
                serde_json::from_value(value).with_context(|| format!("line {number} is no header"))?;
            ensure!(header.tool == tool, "line {number}: a run of {}, not of {tool}", header.tool);
            runs.push(Run { header, records: Vec::new() });
            continue;
        }
        let Some(run) = runs.last_mut() else { bail!("line {number} comes before any header") };
        let record = serde_json::from_value(value);
        run.records.push(record.with_context(|| format!("line {number} is no record of {tool}"))?);
    }
    ensure!(!runs.is_empty(), "there is no run");
    Ok(runs)
}

/// The headers of runs, each once, to stand above their tables.
pub fn headers<R>(runs: &[Run<R>]) -> String {
    let mut lines: Vec<String> = Vec::new();
    for run in runs {
        let line = run.header.line();
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines.join("\n")
}

/// The day of a time, in UTC: days since the epoch in eras of 400 years that begin with March.
fn date(unix_time_s: u64) -> String {
    let days = unix_time_s / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = match month {
        0..10 => (era * 400 + year, month + 3),
        _ => (era * 400 + year + 1, month - 9),
    };
    format!("{year}-{month:02}-{day:02}")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A header of nowhere.
    pub(crate) fn header(tool: &str) -> Header {
        let environment = Environment {
            version: "0.1.0".to_owned(),
            optimised: true,
            unix_time_s: 1_700_000_000,
            kernel: "6.1.0".to_owned(),
            cpu: "Some CPU".to_owned(),
            cpus: 2,
            memory_mib: 1024,
            file_system: "ext4".to_owned(),
            device: Some("vda".to_owned()),
            device_class: Some("virtio, write back".to_owned()),
            load_1min_before: Some(0.1),
        };
        Header {
            tool: tool.to_owned(),
            date: date(environment.unix_time_s),
            environment,
            commit: Some("0123456789ab".to_owned()),
            is_dirty: Some(true),
            rustc: Some("rustc 1.95.0".to_owned()),
            sides: vec!["uring".to_owned(), "other".to_owned()],
            rounds: 2,
            seconds: 3.0,
        }
    }

    /// The cells of the rows of Markdown tables, their heads included.
    pub(crate) fn cells(tables: &str) -> Vec<Vec<&str>> {
        let rows = tables.lines().filter(|line| line.starts_with('|') && !line.starts_with("|--"));
        rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect()
    }

    #[test]
    fn a_run_that_was_written_is_read_back_with_its_header_and_every_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runs/of/numbers.jsonl");
        for numbers in [&[1, 2][..], &[3]] {
            let mut recorder = Recorder::begin(header("numbers"), Some(path.as_path())).unwrap();
            numbers.iter().for_each(|number| recorder.record(*number).unwrap());
            assert_eq!(recorder.run.records, numbers);
        }
        let paths = [path];
        let runs: Vec<Run<u64>> = read("numbers", &paths).unwrap();
        assert_eq!(runs.iter().map(|run| &run.records[..]).collect::<Vec<_>>(), [&[1, 2][..], &[3]]);
        assert_eq!(
            headers(&runs),
            "2 x Some CPU, 1024 MiB of memory, Linux 6.1.0, ext4 on virtio, write back; rustc 1.95.0; commit 0123456789ab, \
             changed; uring, other; 2023-11-14; 2 rounds of 3 s; load 0.1 before."
        );
        let error = read::<u64>("letters", &paths).unwrap_err();
        assert!(format!("{error:#}").contains("line 1: a run of numbers, not of letters"), "{error:#}");
        let error = read::<String>("numbers", &paths).unwrap_err();
        assert!(format!("{error:#}").contains("line 2 is no record of numbers"), "{error:#}");
    }

    #[test]
    fn figures_without_a_machine_are_refused() {
        for (text, why) in [("", "no run"), ("1\n", "before any header"), ("{", "line 1 is no JSON")] {
            let error = parse::<u64>("numbers", text).unwrap_err();
            assert!(format!("{error:#}").contains(why), "{error:#}");
        }
    }

    #[test]
    fn a_header_of_this_machine_names_neither_it_nor_a_place_on_it() {
        let args = RunArgs {
            rounds: 1,
            seconds: 1.0,
            backends: Vec::new(),
            dir: None,
            raw: None,
            render: Vec::new(),
            bench: true,
        };
        let place = Path::new(env!("CARGO_MANIFEST_DIR"));
        let header = args.header("goals", vec!["uring".to_owned()], place).unwrap();
        let line = serde_json::to_string(&header).unwrap();
        let host = rustix::system::uname();
        let host = format!("\"{}\"", host.nodename().to_string_lossy());
        assert!(!line.contains(place.to_str().unwrap()) && !line.contains(&host), "{line}");
        assert!(header.rustc.is_some_and(|rustc| rustc.starts_with("rustc 1.")), "{line}");
    }

    #[test]
    fn days_have_dates() {
        for (unix_time_s, expected) in [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (951_868_799, "2000-02-29"),
            (951_868_800, "2000-03-01"),
            (1_735_689_599, "2024-12-31"),
            (1_735_689_600, "2025-01-01"),
        ] {
            assert_eq!(date(unix_time_s), expected);
        }
    }
}
