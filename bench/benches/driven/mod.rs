//! A log on the engine's own disk backend, driven by itself: no consensus, no network. What a node's log does, including
//! all that it does in the background, is what these benchmarks measure.

use anyhow::{Context as _, bail};
use ringraft::runtime::glommio::{CoreContext, GlommioDisk, GlommioOptions};
use ringraft::runtime::{Turn, Wakeup};
use ringraft_block::{ClusterId, GroupId, LogIndex, NodeId, Pool, Term};
use ringraft_wal::disk::{Disk, DiskDone, DiskError, DiskOp, DiskOpId};
use ringraft_wal::format::{BatchBuilder, BatchKind, LogStart, Seal, image_bytes_for, slot_bytes};
use ringraft_wal::{DataDirectory, FILL_INTERVAL, FILL_STEP_BYTES, Wal, WalConfig, WalEvent};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// The backend, and how much it has in hand.
pub(crate) struct CountingDisk {
    inner: GlommioDisk,
    in_flight: usize,
}

impl Disk for CountingDisk {
    type Buf = <GlommioDisk as Disk>::Buf;

    fn allocate(&mut self, bytes: usize) -> Result<Self::Buf, DiskError> {
        self.inner.allocate(bytes)
    }

    fn submit(&mut self, id: DiskOpId, op: DiskOp<Self::Buf>) {
        self.in_flight += 1;
        self.inner.submit(id, op);
    }

    fn poll(&mut self, done: &mut Vec<DiskDone<Self::Buf>>) {
        let before = done.len();
        self.inner.poll(done);
        self.in_flight -= done.len() - before;
    }
}

/// The memory of the backend.
pub(crate) type Buf = <CountingDisk as Disk>::Buf;

/// A log and what it needs.
pub(crate) struct Log {
    pub(crate) wal: Wal<CountingDisk>,
    pub(crate) disk: CountingDisk,
    pool: Pool<Buf>,
    builder: Option<BatchBuilder<Buf>>,
    done: Vec<DiskDone<Buf>>,
    time_ms: u64,
    /// When the log was told last that time has passed, while it fills a segment.
    filled_at: Option<Instant>,
    _directory: DataDirectory,
}

impl Log {
    /// The log of `path`, which is made if it is not there. Nothing happens before the first turn.
    pub(crate) fn new(context: &CoreContext, path: &Path, config: WalConfig) -> anyhow::Result<Self> {
        let directory = DataDirectory::open(path, true)?;
        let pool = Pool::new(16 << 20);
        Ok(Self {
            wal: Wal::open(config, pool.clone()),
            disk: CountingDisk { inner: context.disk(path)?, in_flight: 0 },
            pool,
            builder: None,
            done: Vec::new(),
            time_ms: 0,
            filled_at: None,
            _directory: directory,
        })
    }

    /// Takes what has completed and lets the log go on. Says whether anything happened.
    pub(crate) fn turn(&mut self, events: &mut VecDeque<WalEvent<Buf>>) -> bool {
        self.disk.poll(&mut self.done);
        let mut progressed = !self.done.is_empty();
        for done in self.done.drain(..) {
            self.wal.handle(&mut self.disk, done, events);
        }
        let in_flight = self.disk.in_flight;
        self.wal.advance(&mut self.disk, events);
        self.pass_time();
        progressed |= self.disk.in_flight != in_flight || !events.is_empty();
        progressed
    }

    /// As a node does.
    fn pass_time(&mut self) {
        if !self.wal.is_filling() {
            self.filled_at = None;
        } else if self.filled_at.get_or_insert_with(Instant::now).elapsed() >= FILL_INTERVAL {
            self.filled_at = None;
            self.wal.fill_step(&mut self.disk, FILL_STEP_BYTES);
        }
    }

    /// Nothing is under way, not even in the background.
    #[allow(dead_code, reason = "not every benchmark waits for that")]
    pub(crate) fn is_at_rest(&self) -> bool {
        self.disk.in_flight == 0 && !self.wal.is_filling()
    }

    /// Seals a batch of `count` times `command` and appends it. The log must be ready for it.
    pub(crate) fn append(&mut self, command: &[u8], count: usize) -> anyhow::Result<LogIndex> {
        let bytes = slot_bytes(image_bytes_for(count, 0, count * command.len()));
        let block = self.pool.take(bytes, |bytes| self.disk.allocate(bytes))?;
        let builder = match self.builder.as_mut() {
            Some(builder) => {
                builder.rearm(block);
                builder
            }
            None => self.builder.insert(BatchBuilder::new(block)),
        };
        for _ in 0..count {
            builder.push(command, None).context("the block has room for the batch")?;
        }
        let LogStart { index, chain, .. } = self.wal.log_end();
        self.time_ms += 1;
        let (block, info) = builder.seal(Seal {
            group: GroupId(0),
            term: Term(1),
            first: index.next(),
            kind: BatchKind::Commands,
            time_ms: self.time_ms,
            previous_chain: chain,
        });
        self.wal.append(&mut self.disk, block, info);
        Ok(info.last)
    }
}

/// The limits of a log with segments of this size.
pub(crate) fn config(segment_bytes: u64) -> WalConfig {
    let mut config = WalConfig::new(ClusterId(1), NodeId(1), 7);
    config.segment_bytes = segment_bytes;
    config
}

/// Runs `make`'s engine on this thread, on a core of its own, until it stops.
pub(crate) fn run<T: Turn>(make: impl FnOnce(&CoreContext) -> anyhow::Result<T>) -> anyhow::Result<()> {
    let mut failure = None;
    let outcome =
        ringraft::runtime::glommio::run(GlommioOptions::default(), Arc::new(Wakeup::new()), |context| {
            make(context).map_err(|error| {
                failure = Some(error);
                "it could not be made"
            })
        });
    match failure {
        Some(error) => Err(error),
        None => Ok(outcome?),
    }
}

/// What no benchmark expects: the log has stopped.
pub(crate) fn healthy<D: Disk>(wal: &Wal<D>) -> anyhow::Result<()> {
    match wal.poisoned() {
        Some(error) => bail!("the log has stopped: {error}"),
        None => Ok(()),
    }
}

/// Bytes that do not compress or deduplicate easily.
pub(crate) fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

/// Whether this is a run for figures. `cargo test --benches` runs these programs too, without this flag: then they run small.
pub(crate) fn is_measuring() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

/// A number from the environment.
pub(crate) fn number(name: &str, default: u64) -> anyhow::Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} is a number, not {text:?}")),
        Err(_) => Ok(default),
    }
}

/// A directory for the run below the target directory, which is on a disk; removed at the end.
pub(crate) fn scratch() -> anyhow::Result<tempfile::TempDir> {
    Ok(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?)
}
