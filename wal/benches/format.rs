//! The image format in bytes per second: filling and sealing a batch, verifying one, and crc32c alone as the line that neither can cross.
//!
//! `cargo bench -p ringraft-wal --bench format -- --quick`

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ringraft_block::{AlignedBuf, Block, GroupId, LogIndex, Pool, Term, crc32c};
use ringraft_wal::format::{
    BatchBuilder, BatchKind, Chain, ENVELOPE_BYTES, Seal, image_bytes_for, parse_image, slot_bytes,
};
use std::convert::Infallible;
use std::hint::black_box;
use std::time::{Duration, Instant};

const SEAL: Seal = Seal {
    group: GroupId(0),
    term: Term(5),
    first: LogIndex(100),
    kind: BatchKind::Commands,
    time_ms: 1_700_000_000_123,
    previous_chain: Chain([0x11; 16]),
};

fn block(pool: &Pool<AlignedBuf>, bytes: usize) -> Block<AlignedBuf> {
    let block = pool.take(bytes, |bytes| Ok::<_, Infallible>(AlignedBuf::zeroed(bytes)));
    block.unwrap_or_else(|never| match never {})
}

fn push(builder: &mut BatchBuilder<AlignedBuf>, command: &[u8], count: usize) {
    for _ in 0..count {
        builder.push(command, None).expect("the block has room for the batch");
    }
}

fn format(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("format");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    for (command_bytes, count) in [(128, 512), (4096, 64), (256 * 1024, 1)] {
        let image_bytes = image_bytes_for(count, 0, count * command_bytes);
        let shape = format!("{command_bytes} B x {count}");
        let id = |what: &str| BenchmarkId::new(what, &shape);
        group.throughput(Throughput::Bytes(image_bytes as u64));

        let pool = Pool::new(16 << 20);
        let command: Vec<u8> = (0..command_bytes).map(|at| (at * 31) as u8).collect();
        let mut builder = BatchBuilder::new(block(&pool, slot_bytes(image_bytes)));
        push(&mut builder, &command, count);
        let (sealed, info) = builder.seal(SEAL);
        assert_eq!(info.image_bytes as usize, image_bytes);
        let image = &sealed[ENVELOPE_BYTES..ENVELOPE_BYTES + image_bytes];

        group.bench_function(id("crc32c"), |bencher| bencher.iter(|| crc32c(black_box(image))));
        group.bench_function(id("push and seal"), |bencher| {
            bencher.iter(|| {
                builder.rearm(block(&pool, slot_bytes(image_bytes)));
                push(&mut builder, black_box(&command), count);
                builder.seal(SEAL).1
            });
        });
        group.bench_function(id("seal"), |bencher| {
            bencher.iter_custom(|batches| {
                let mut time = Duration::ZERO;
                for _ in 0..batches {
                    builder.rearm(block(&pool, slot_bytes(image_bytes)));
                    push(&mut builder, &command, count);
                    let started = Instant::now();
                    black_box(builder.seal(SEAL));
                    time += started.elapsed();
                }
                time
            });
        });
        group.bench_function(id("verify"), |bencher| {
            bencher.iter(|| {
                let view = parse_image(black_box(image)).expect("a sealed image is whole");
                assert!(view.verify_chain(SEAL.previous_chain));
                view.info()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, format);
criterion_main!(benches);
