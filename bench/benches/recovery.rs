//! A start of the log against reading its files: verified recovery on the engine's own backend, until the log is open, and a sequential
//! O_DIRECT read of the same segments, four pieces of 1 MiB in flight as recovery has them, and one in flight for comparison. In turns;
//! read the ratio.
//!
//! `cargo bench -p ringraft-bench --bench recovery`; `RINGRAFT_RECOVERY_BYTES` sets the size of the log (default 3 GiB),
//! `RINGRAFT_RECOVERY_ROUNDS` the number of rounds (default 5), `RINGRAFT_RECOVERY_COMMAND` and `RINGRAFT_RECOVERY_COUNT` the batches
//! (default 256 commands of 1 KiB).

mod driven;

use anyhow::{Context as _, ensure};
use driven::{Buf, Log, config, healthy, is_measuring, noise, number, run, scratch};
use io_uring::{IoUring, opcode, types};
use ringraft::runtime::glommio::CoreContext;
use ringraft::runtime::{Now, Turn, TurnOutcome};
use ringraft_block::{AlignedBuf, BlockBuf as _};
use ringraft_wal::format::{LogStart, image_bytes_for, slot_bytes};
use ringraft_wal::{Recovered, WalEvent};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

const SEGMENT_BYTES: u64 = 64 << 20;
/// What recovery reads at once, and how many of them.
const PIECE_BYTES: usize = 1 << 20;
const PIECES_IN_FLIGHT: usize = 4;
const APPENDS_IN_FLIGHT: usize = 4;

/// Elapsed time, and how much of it this thread was on a processor, or was waiting for one that others had.
#[derive(Clone, Copy, Default)]
struct Took {
    elapsed: Duration,
    processor: Duration,
    waiting: Duration,
}

struct Stopwatch {
    started: Instant,
    before: [Duration; 2],
}

impl Stopwatch {
    fn start() -> Self {
        Self { started: Instant::now(), before: Self::scheduled() }
    }

    /// Nanoseconds on a processor and waiting for one are the first numbers; 0 where the kernel does not count them.
    fn scheduled() -> [Duration; 2] {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
        let mut numbers = text.split(' ').map(|number| number.parse().unwrap_or(0));
        [numbers.next(), numbers.next()].map(|number| Duration::from_nanos(number.unwrap_or(0)))
    }

    fn took(&self) -> Took {
        let (elapsed, after) = (self.started.elapsed(), Self::scheduled());
        let [processor, waiting] = [0, 1].map(|at| after[at].saturating_sub(self.before[at]));
        Took { elapsed, processor, waiting }
    }
}

/// What came of a life of the log.
struct Life {
    start: Took,
    recovered: Recovered,
    end: LogStart,
    batches: u64,
}

/// A start of the log, appends until it has so many bytes, and its end.
struct Living<'a> {
    log: Log,
    bytes: u64,
    command: &'a [u8],
    count: usize,
    stopwatch: Stopwatch,
    opened: Option<(Took, Recovered)>,
    is_closing: bool,
    life: Rc<RefCell<Option<anyhow::Result<Life>>>>,
}

impl Living<'_> {
    fn step(&mut self) -> anyhow::Result<(bool, Option<Life>)> {
        let mut events: VecDeque<WalEvent<Buf>> = VecDeque::new();
        let mut progressed = self.log.turn(&mut events);
        healthy(&self.log.wal)?;
        for event in events {
            match event {
                WalEvent::Opened(recovered) => self.opened = Some((self.stopwatch.took(), recovered)),
                WalEvent::NoSpace { .. } => anyhow::bail!("the disk is full"),
                WalEvent::Closed => {
                    let (start, recovered) = self.opened.take().context("the log was open")?;
                    let wal = &self.log.wal;
                    let batches = wal.stats().writes;
                    return Ok((true, Some(Life { start, recovered, end: wal.log_end(), batches })));
                }
                _ => {}
            }
        }
        if self.opened.is_none() || self.is_closing {
            return Ok((progressed, None));
        }
        let slot_bytes = slot_bytes(image_bytes_for(self.count, 0, self.count * self.command.len()));
        while self.log.wal.stats().written_bytes < self.bytes
            && self.log.wal.stats().writes_in_flight < APPENDS_IN_FLIGHT
            && self.log.wal.is_ready_for(slot_bytes)
        {
            self.log.append(self.command, self.count)?;
            progressed = true;
        }
        let stats = self.log.wal.stats();
        if stats.written_bytes >= self.bytes && stats.writes_in_flight == 0 {
            self.is_closing = true;
            self.log.wal.close(&mut self.log.disk);
            progressed = true;
        }
        Ok((progressed, None))
    }
}

impl Turn for Living<'_> {
    fn turn(&mut self, _: Now) -> TurnOutcome {
        let result = self.step();
        let progressed = result.as_ref().is_ok_and(|(progressed, _)| *progressed);
        *self.life.borrow_mut() = result.map(|(_, life)| life).transpose();
        let stop = self.life.borrow().is_some();
        TurnOutcome { worked: progressed, more: progressed, next_deadline_ns: u64::MAX, stop }
    }
}

/// Starts the log, lets it grow to `bytes` and closes it.
fn live(path: &Path, bytes: u64, command: &[u8], count: usize) -> anyhow::Result<Life> {
    let life = Rc::new(RefCell::new(None));
    run(|context: &CoreContext| {
        let log = Log::new(context, path, config(SEGMENT_BYTES))?;
        let (life, stopwatch) = (Rc::clone(&life), Stopwatch::start());
        Ok(Living { log, bytes, command, count, stopwatch, opened: None, is_closing: false, life })
    })?;
    let life = life.take();
    life.context("the engine ended without a result")?
}

/// Reads all segments in order, with so many pieces in flight, also across the end of a file. Returns how many bytes they have.
fn read_segments(path: &Path, in_flight_max: usize) -> anyhow::Result<(u64, Took)> {
    let mut names = std::fs::read_dir(path)?
        .map(|entry| Ok(entry?.path()))
        .filter(|path| path.as_ref().map_or(true, |path| path.extension().is_some_and(|end| end == "wal")))
        .collect::<anyhow::Result<Vec<_>>>()?;
    names.sort();
    let mut ring = IoUring::new(8)?;
    let buffers: Vec<_> = (0..in_flight_max).map(|_| AlignedBuf::zeroed(PIECE_BYTES)).collect();
    // Leaked on every way out but the one on which nothing is in flight.
    let mut buffers = ManuallyDrop::new(buffers);

    let stopwatch = Stopwatch::start();
    let mut files = Vec::new();
    for name in &names {
        let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(name)?;
        let bytes = file.metadata()?.len();
        files.push((file, bytes));
    }
    let total = files.iter().map(|(_, bytes)| bytes).sum();
    let mut pieces = files.iter().flat_map(|(file, bytes)| {
        (0..*bytes).step_by(PIECE_BYTES).map(move |at| (file, at, (*bytes - at).min(PIECE_BYTES as u64)))
    });
    let mut free: Vec<usize> = (0..in_flight_max).collect();
    let mut expected = vec![0; in_flight_max];
    let mut failure = None;
    loop {
        while let Some(slot) = free.pop() {
            let Some((file, at, bytes)) = pieces.next().filter(|_| failure.is_none()) else {
                free.push(slot);
                break;
            };
            expected[slot] = bytes;
            let memory = buffers[slot].bytes_mut().as_mut_ptr();
            let read = opcode::Read::new(types::Fd(file.as_raw_fd()), memory, bytes as u32)
                .offset(at)
                .build()
                .user_data(slot as u64);
            // SAFETY: the buffer is of at least `bytes`, is used by one operation at a time, and is freed only below, when no slot
            // is in use.
            let pushed = unsafe { ring.submission().push(&read) };
            pushed.context("the ring has an entry for each slot")?;
        }
        if free.len() == in_flight_max {
            break;
        }
        ring.submit_and_wait(1)?;
        for completion in ring.completion() {
            let slot = completion.user_data() as usize;
            if u64::try_from(completion.result()).ok() != Some(expected[slot]) {
                failure = Some(completion.result());
            }
            free.push(slot);
        }
    }
    let took = stopwatch.took();
    drop(ManuallyDrop::into_inner(buffers));
    ensure!(failure.is_none(), "a read failed or was short: {failure:?}");
    Ok((total, took))
}

fn median(mut times: Vec<Took>) -> Took {
    times.sort_by_key(|took| took.elapsed);
    times[times.len() / 2]
}

fn main() -> anyhow::Result<()> {
    let measuring = is_measuring();
    let bytes = if measuring { number("RINGRAFT_RECOVERY_BYTES", 3 << 30)? } else { 8 << 20 };
    let rounds = if measuring { number("RINGRAFT_RECOVERY_ROUNDS", 5)?.max(1) } else { 1 };
    let command = noise(usize::try_from(number("RINGRAFT_RECOVERY_COMMAND", 1024)?)?);
    let count = usize::try_from(number("RINGRAFT_RECOVERY_COUNT", 256)?)?;

    let directory = scratch()?;
    let path = directory.path().join("log");
    let Life { end, batches, .. } = live(&path, bytes, &command, count)?;

    let (mut recoveries, mut plain, mut single) = (Vec::new(), Vec::new(), Vec::new());
    let mut total = 0;
    let mut ratios = Vec::new();
    for _ in 0..rounds {
        let (read, one) = read_segments(&path, 1)?;
        let (_, four) = read_segments(&path, PIECES_IN_FLIGHT)?;
        let life = live(&path, 0, &command, count)?;
        ensure!(life.end == end, "the whole log is recovered");
        ensure!(life.recovered.report.damage.is_empty(), "the log is intact");
        let scanned = life.recovered.report.scanned_bytes;
        ensure!(scanned == read, "recovery reads all of it: {scanned} of {read} bytes");
        total = read;
        ratios.push(life.start.elapsed.as_secs_f64() / four.elapsed.as_secs_f64());
        recoveries.push(life.start);
        plain.push(four);
        single.push(one);
    }
    println!(
        "{batches} batches of {count} commands of {} bytes, {total} bytes of segments, median of {rounds} rounds",
        command.len()
    );
    let line = |what: &str, took: Took| {
        let rate = total as f64 / took.elapsed.as_secs_f64() / 1e6;
        let [elapsed, processor, waiting] =
            [took.elapsed, took.processor, took.waiting].map(|time| time.as_secs_f64());
        println!(
            "{what}: {elapsed:.3} s, {rate:.0} MB/s; {processor:.3} s on a processor, {waiting:.3} s waiting for one"
        );
    };
    let (recovery, plain, single) = (median(recoveries), median(plain), median(single));
    line("read, 1 MiB in flight", single);
    line("read, 4 MiB in flight", plain);
    line("recovery, verified   ", recovery);
    let undisturbed = |took: Took| took.elapsed.saturating_sub(took.waiting).as_secs_f64();
    ratios.sort_by(f64::total_cmp);
    let (low, high) = (ratios[0], ratios[ratios.len() - 1]);
    println!(
        "recovery takes {:.2} times as long as reading with 4 MiB in flight ({low:.2}..{high:.2}), {:.2} times as with 1 MiB",
        ratios[ratios.len() / 2],
        recovery.elapsed.as_secs_f64() / single.elapsed.as_secs_f64()
    );
    println!(
        "without the waiting for a processor that others had: {:.2} times",
        undisturbed(recovery) / undisturbed(plain)
    );
    Ok(())
}
