//! A durable append through the log against the bare write under it: one O_DIRECT, O_DSYNC write of the same size in the same directory. Both
//! sides are measured in turns, write by write, so that what the device does to one it does to the other; read the ratio, not the
//! times.
//!
//! The log's side is the whole path of a batch: copy one command, seal (entry table, checksums, chain), envelope, write, completion,
//! report. Making segments ready is background work and done between the measured appends.
//!
//! `cargo bench -p ringraft-wal --bench append -- --quick`

mod direct;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use direct::{Log, noise, open_direct, open_directory, scratch};
use ringraft_block::BlockBuf;
use ringraft_wal::disk::Access;
use ringraft_wal::format::{ENVELOPE_BYTES, image_bytes_for};
use rustix::fs::FallocateFlags;
use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

const SEGMENT_BYTES: u64 = 64 << 20;

/// Both sides, and what they took so far.
struct Pair {
    log: Log,
    raw: RawFile,
    slot_bytes: usize,
    command_bytes: usize,
    noise: ringraft_block::AlignedBuf,
    writes: u64,
    log_time: Duration,
    raw_time: Duration,
}

impl Pair {
    /// One write of each; the times of both.
    fn write(&mut self) -> (Duration, Duration) {
        let block = &self.noise.bytes()[..self.slot_bytes];
        let started = Instant::now();
        self.raw.write(block);
        let raw = started.elapsed();
        let started = Instant::now();
        let info = self.log.append(&block[..self.command_bytes], 1);
        let log = started.elapsed();
        assert_eq!(info.slot_bytes(), self.slot_bytes);
        self.log.settle();
        // Segments are not recycled while nothing is purged, so the log is emptied now and then.
        if self.log.wal.stats().segments > 12 {
            self.log.clear();
        }
        self.writes += 1;
        self.log_time += log;
        self.raw_time += raw;
        (log, raw)
    }
}

/// A file with written extents, overwritten from start to end again and again.
struct RawFile {
    file: OwnedFd,
    offset: u64,
}

impl RawFile {
    fn new(directory: &Path) -> Self {
        let directory = open_directory(directory).expect("the directory is there");
        let file = open_direct(&directory, "raw", Access::DurableWrite, true).expect("a new file");
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, SEGMENT_BYTES).expect("there is space");
        let zeros = ringraft_block::AlignedBuf::zeroed(1 << 20);
        let mut raw = Self { file, offset: 0 };
        for _ in 0..SEGMENT_BYTES >> 20 {
            raw.write(zeros.bytes());
        }
        raw
    }

    fn write(&mut self, block: &[u8]) {
        if self.offset + block.len() as u64 > SEGMENT_BYTES {
            self.offset = 0;
        }
        let written = rustix::io::pwrite(&self.file, block, self.offset).expect("the device writes");
        assert_eq!(written, block.len());
        self.offset += block.len() as u64;
    }
}

/// The length of the one command that fills a slot exactly.
fn command_for(slot_bytes: usize) -> usize {
    let image = |command: usize| ENVELOPE_BYTES + image_bytes_for(1, 0, command);
    (0..slot_bytes).rev().find(|command| image(*command) <= slot_bytes).expect("a slot holds a command")
}

fn append(criterion: &mut Criterion) {
    let directory = scratch();
    let mut group = criterion.benchmark_group("append");
    group.sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    for kib in [4, 64, 256] {
        let slot_bytes = kib * 1024;
        let directory = directory.path().join(format!("{kib}-kib"));
        let mut log = Log::open(&directory, SEGMENT_BYTES);
        log.settle();
        let pair = RefCell::new(Pair {
            log,
            raw: RawFile::new(&directory),
            slot_bytes,
            command_bytes: command_for(slot_bytes),
            noise: noise(slot_bytes),
            writes: 0,
            log_time: Duration::ZERO,
            raw_time: Duration::ZERO,
        });
        group.throughput(Throughput::Bytes(slot_bytes as u64));
        let id = |side| BenchmarkId::new(side, format!("{kib} KiB"));
        group.bench_function(id("raw write"), |bencher| {
            bencher.iter_custom(|writes| (0..writes).map(|_| pair.borrow_mut().write().1).sum());
        });
        group.bench_function(id("log append"), |bencher| {
            bencher.iter_custom(|writes| (0..writes).map(|_| pair.borrow_mut().write().0).sum());
        });
        let Pair { writes, log_time, raw_time, .. } = pair.into_inner();
        if writes > 0 {
            let ratio = log_time.as_secs_f64() / raw_time.as_secs_f64();
            let each = |time: Duration| time.as_secs_f64() * 1e6 / writes as f64;
            println!(
                "append {kib} KiB: {writes} writes of each in turns, log {:.0} us, raw {:.0} us, ratio {ratio:.3}",
                each(log_time),
                each(raw_time)
            );
        }
        std::fs::remove_dir_all(&directory).expect("the directory is ours");
    }
    group.finish();
}

criterion_group!(benches, append);
criterion_main!(benches);
