//! A start of the log against reading its files: recovery until the log has told that it is open, and a sequential O_DIRECT read of the same
//! segments in the same pieces, in turns. Prints both and their ratio.
//!
//! `cargo bench -p ringraft-wal --bench replay`; `RINGRAFT_REPLAY_BYTES` sets the size of the log (default 1 GiB), `RINGRAFT_REPLAY_ROUNDS` the
//! number of rounds (default 3), `RINGRAFT_REPLAY_COMMAND` and `RINGRAFT_REPLAY_COUNT` the batches (default 256 commands of 1 KiB).

mod direct;

use direct::{Log, noise, open_direct, open_directory, scratch};
use ringraft_block::{AlignedBuf, BlockBuf};
use ringraft_wal::disk::Access;
use std::path::Path;
use std::time::{Duration, Instant};

const SEGMENT_BYTES: u64 = 64 << 20;
/// What recovery reads at once.
const PIECE_BYTES: usize = 1 << 20;

/// Elapsed time, and how much of it this thread was on a processor, or was waiting for one that others had.
#[derive(Clone, Copy, Default)]
struct Took {
    elapsed: Duration,
    processor: Duration,
    waiting: Duration,
}

fn took<T>(work: impl FnOnce() -> T) -> (T, Took) {
    // Nanoseconds on a processor and waiting for one are the first numbers; 0 where the kernel does not count them.
    let scheduled = || {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
        let mut numbers = text.split(' ').map(|number| number.parse().unwrap_or(0));
        [numbers.next(), numbers.next()].map(|number| Duration::from_nanos(number.unwrap_or(0)))
    };
    let (started, before) = (Instant::now(), scheduled());
    let result = work();
    let (elapsed, after) = (started.elapsed(), scheduled());
    let [processor, waiting] = [0, 1].map(|at| after[at].saturating_sub(before[at]));
    (result, Took { elapsed, processor, waiting })
}

fn read_segments(path: &Path, piece: &mut AlignedBuf) -> u64 {
    let directory = open_directory(path).expect("the directory is there");
    let mut names: Vec<_> = std::fs::read_dir(path)
        .and_then(|entries| {
            entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
        })
        .expect("the directory can be listed");
    names.retain(|name: &String| name.ends_with(".wal"));
    names.sort();
    let mut total = 0;
    for name in names {
        let file = open_direct(&directory, &name, Access::Read, false).expect("the segment is there");
        let mut offset = 0;
        loop {
            let read = rustix::io::pread(&file, piece.bytes_mut(), offset).expect("the device reads");
            if read == 0 {
                break;
            }
            offset += read as u64;
        }
        total += offset;
    }
    total
}

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")),
        Err(_) => default,
    }
}

fn main() {
    // `cargo test --benches` runs this too, with a flag of the test harness and without `--bench`: then it runs small.
    let small = !std::env::args().any(|argument| argument == "--bench");
    let bytes = if small { 8 << 20 } else { number("RINGRAFT_REPLAY_BYTES", 1 << 30) };
    let rounds = if small { 1 } else { number("RINGRAFT_REPLAY_ROUNDS", 3).max(1) };
    let command = noise(number("RINGRAFT_REPLAY_COMMAND", 1024) as usize);
    let command = &command.bytes()[..number("RINGRAFT_REPLAY_COMMAND", 1024) as usize];
    let count = number("RINGRAFT_REPLAY_COUNT", 256) as usize;

    let directory = scratch();
    let path = directory.path().join("log");
    let mut log = Log::open(&path, SEGMENT_BYTES);
    log.settle();
    let mut batches = 0;
    while log.wal.stats().written_bytes < bytes {
        log.append(command, count);
        log.settle();
        batches += 1;
    }
    let end = log.wal.log_end();
    drop(log);

    let (mut recovery, mut raw) = (Vec::new(), Vec::new());
    let mut piece = AlignedBuf::zeroed(PIECE_BYTES);
    let mut total = 0;
    for _ in 0..rounds {
        let (read, time) = took(|| read_segments(&path, &mut piece));
        total = read;
        raw.push(time);
        let (log, time) = took(|| Log::open(&path, SEGMENT_BYTES));
        assert_eq!(log.wal.log_end(), end, "the whole log is recovered");
        recovery.push(time);
    }
    let median = |times: &mut Vec<Took>| {
        times.sort_by_key(|took| took.elapsed);
        times[times.len() / 2]
    };
    let (raw, recovery) = (median(&mut raw), median(&mut recovery));
    let line = |what: &str, took: Took| {
        let rate = total as f64 / took.elapsed.as_secs_f64() / 1e6;
        let [elapsed, processor, waiting] =
            [took.elapsed, took.processor, took.waiting].map(|time| time.as_secs_f64());
        println!(
            "{what}: {elapsed:.3} s, {rate:.0} MB/s; {processor:.3} s on a processor, {waiting:.3} s waiting for one"
        );
    };
    println!(
        "{batches} batches of {count} commands of {} bytes, {total} bytes of segments, median of {rounds} rounds",
        command.len()
    );
    line("sequential read", raw);
    line("recovery       ", recovery);
    let ratio = |time: fn(Took) -> Duration| time(recovery).as_secs_f64() / time(raw).as_secs_f64();
    let undisturbed = |took: Took| took.elapsed.saturating_sub(took.waiting);
    println!(
        "ratio {:.2}, without the waiting for others {:.2}",
        ratio(|took| took.elapsed),
        ratio(undisturbed)
    );
}
