//! A log on a disk in memory, and the logs that the scan targets begin with.

use crate::memory::{Directory, MemoryDisk, Unreadable};
use ringraft_block::{AlignedBuf, ClusterId, GroupId, LogIndex, NodeId, Pool, Term};
use ringraft_wal::format::{
    BatchBuilder, BatchInfo, BatchKind, Claim, ENVELOPE_BYTES, Envelope, LogStart, Seal, image_bytes_for,
    parse_image, read_envelope, slot_bytes,
};
use ringraft_wal::{ReadError, Recovered, StoredBatch, Wal, WalConfig, WalError, WalEvent};
use std::collections::VecDeque;

/// A small log: slots of up to 8 KiB, 16 of them to a segment.
pub(crate) fn config() -> WalConfig {
    WalConfig {
        segment_bytes: 140 * 1024,
        segments_ahead: 1,
        batch_bytes_max: 8192 - ENVELOPE_BYTES,
        ..WalConfig::new(ClusterId(0xc1), NodeId(3), 42)
    }
}

/// A batch that the log must still have, or may only have lost for a reason.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    pub(crate) info: BatchInfo,
    pub(crate) image: Vec<u8>,
    /// The epoch that it was written in.
    pub(crate) epoch: u64,
}

/// Where a slot lies, also one that has been cut off since.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) file: String,
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
    pub(crate) envelope: Envelope,
}

/// A directory as a crash left it, and what is known about it.
pub(crate) struct Scenario {
    pub(crate) directory: Directory,
    pub(crate) log: Vec<Expected>,
    pub(crate) slots: Vec<Slot>,
}

impl Scenario {
    /// A slot by how long ago it was written.
    pub(crate) fn slot_from_end(&self, number: usize) -> &Slot {
        let envelope = |slot: &&Slot| (slot.envelope.epoch, slot.envelope.first);
        let newest = self.slots.iter().max_by_key(envelope).expect("a scenario has slots");
        let last = self.slots.iter().filter(|slot| slot.envelope.epoch == newest.envelope.epoch);
        last.rev().nth(number).unwrap_or(newest)
    }
}

/// How a start ended.
pub(crate) enum Start {
    Opened(Box<Node>, Box<Recovered>),
    Stopped(WalError, Directory),
}

/// A log as a start found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) batches: Vec<BatchInfo>,
    /// The first indices of those that are damaged.
    pub(crate) damaged: Vec<LogIndex>,
    pub(crate) salvage: Vec<BatchInfo>,
    pub(crate) claim: Option<Claim>,
}

/// A log that is open.
pub(crate) struct Node {
    wal: Wal<MemoryDisk>,
    disk: MemoryDisk,
    events: VecDeque<WalEvent<AlignedBuf>>,
    pool: Pool<AlignedBuf>,
}

/// Starts a node on `directory`.
pub(crate) fn start(directory: Directory, unreadable: Unreadable) -> Start {
    let pool = Pool::new(1 << 20);
    let wal = Wal::open(config(), pool.clone());
    let disk = MemoryDisk::new(directory, unreadable);
    let mut node = Node { wal, disk, events: VecDeque::new(), pool };
    node.settle();
    if let Some(error) = node.wal.poisoned() {
        return Start::Stopped(error.clone(), node.disk.directory);
    }
    match node.events.pop_front() {
        Some(WalEvent::Opened(recovered)) => Start::Opened(Box::new(node), Box::new(recovered)),
        other => panic!("the log neither opened nor stopped: {other:?}"),
    }
}

impl Node {
    /// Turns until nothing is under way.
    fn settle(&mut self) {
        let mut done = Vec::new();
        loop {
            self.wal.advance(&mut self.disk, &mut self.events);
            ringraft_wal::disk::Disk::poll(&mut self.disk, &mut done);
            if done.is_empty() {
                return;
            }
            for done in done.drain(..) {
                self.wal.handle(&mut self.disk, done, &mut self.events);
            }
        }
    }

    /// Appends a batch and waits until it is durable. Its commands tell their index, and hold no long runs of zeros.
    pub(crate) fn append(&mut self, count: usize, command_bytes: usize) -> Expected {
        let LogStart { index, term, chain } = self.wal.log_end();
        let bytes = slot_bytes(image_bytes_for(count, 0, count * command_bytes));
        let take = |bytes: usize| Ok::<_, std::convert::Infallible>(AlignedBuf::zeroed(bytes));
        let mut builder = BatchBuilder::new(self.pool.take(bytes, take).unwrap());
        for ordinal in 0..count as u64 {
            let identity = index.get() + 1 + ordinal;
            let command: Vec<u8> = (0..command_bytes).map(|at| (identity as u8) ^ (at as u8) | 1).collect();
            builder.push(&command, None).unwrap();
        }
        let seal = Seal {
            group: GroupId(0),
            term: term.max(Term(1)),
            first: index.next(),
            kind: BatchKind::Commands,
            time_ms: 1000 + index.get(),
            previous_chain: chain,
        };
        let (block, info) = builder.seal(seal);
        let image = block[ENVELOPE_BYTES..ENVELOPE_BYTES + info.image_bytes as usize].to_vec();
        assert!(self.wal.is_ready_for(info.slot_bytes()), "an idle log is ready");
        self.wal.append(&mut self.disk, block, info);
        self.settle();
        assert_eq!(self.wal.durable_through(), info.last);
        Expected { info, image, epoch: self.wal.epoch() }
    }

    /// What a start must find again.
    pub(crate) fn known(&self) -> Known {
        Known {
            batches: self.wal.batches().collect(),
            damaged: self.wal.damaged().map(|damaged| damaged.info.first).collect(),
            salvage: self.wal.salvage().collect(),
            claim: self.wal.hard_state().and_then(|state| state.claim),
        }
    }

    /// Reads every batch of the log that is not damaged, checking that it is whole and continues the log. Reading a damaged one
    /// must say so.
    pub(crate) fn read_all(&mut self) -> Vec<StoredBatch<AlignedBuf>> {
        let Known { batches: infos, damaged, .. } = self.known();
        let mut batches = Vec::new();
        let mut chain = self.wal.log_start().chain;
        for info in infos {
            self.events.clear();
            self.wal.read(&mut self.disk, 7, info.first, 1);
            self.settle();
            let answer = self.events.drain(..).find_map(|event| match event {
                WalEvent::Read { token: 7, result } => Some(result),
                _ => None,
            });
            match answer.expect("a read is answered") {
                Ok(mut read) => {
                    assert!(!damaged.contains(&info.first), "a damaged batch is not handed out");
                    let batch = read.swap_remove(0);
                    let view = parse_image(batch.image()).expect("what is handed out is whole");
                    assert_eq!((view.info(), batch.info), (info, info));
                    assert!(view.verify_chain(chain), "what is handed out continues the log");
                    batches.push(batch);
                }
                Err(ReadError::Damaged { first, .. }) => {
                    assert!(first == info.first && damaged.contains(&first), "what is intact can be read");
                }
                Err(error) => panic!("{error}"),
            }
            chain = info.chain;
        }
        batches
    }

    fn truncate_after(&mut self, index: LogIndex) {
        self.wal.truncate_after(&mut self.disk, index);
        self.settle();
    }

    fn save_witness(&mut self) {
        self.wal.save_witness(&mut self.disk);
        self.settle();
    }

    /// The process is killed.
    pub(crate) fn kill(self) -> Directory {
        self.disk.directory
    }
}

/// Starts, which must succeed without damage.
fn opened(directory: Directory) -> Node {
    match start(directory, Unreadable::new()) {
        Start::Opened(node, recovered) => {
            assert_eq!((recovered.report.damage, recovered.claim), (Vec::new(), None));
            *node
        }
        Start::Stopped(error, _) => panic!("{error}"),
    }
}

/// The logs to begin with: one that only grew, one over several segments, one of several starts, one truncated within a segment and
/// across one.
pub(crate) fn scenarios() -> Vec<Scenario> {
    // Slots of one and of two blocks.
    let sizes = [(3, 200), (1, 6000), (1, 8), (20, 150)];
    let grow = |node: &mut Node, log: &mut Vec<Expected>, batches: usize| {
        for _ in 0..batches {
            let (count, bytes) = sizes[log.len() % sizes.len()];
            log.push(node.append(count, bytes));
        }
    };
    let cut = |node: &mut Node, log: &mut Vec<Expected>, batches: usize| {
        log.truncate(log.len() - batches);
        node.truncate_after(log.last().map_or(LogIndex(0), |batch| batch.info.last));
    };
    let mut scenarios = Vec::new();
    let mut finish = |node: Node, log: Vec<Expected>| {
        let directory = node.kill();
        let slots = slots_of(&directory);
        scenarios.push(Scenario { directory, log, slots });
    };

    let (mut node, mut log) = (opened(Directory::new()), Vec::new());
    grow(&mut node, &mut log, 9);
    finish(node, log);

    let (mut node, mut log) = (opened(Directory::new()), Vec::new());
    grow(&mut node, &mut log, 20);
    node.save_witness();
    grow(&mut node, &mut log, 40);
    finish(node, log);

    let (mut node, mut log) = (opened(Directory::new()), Vec::new());
    for batches in [5, 30, 0, 7] {
        grow(&mut node, &mut log, batches);
        node = opened(node.kill());
    }
    grow(&mut node, &mut log, 3);
    finish(node, log);

    let (mut node, mut log) = (opened(Directory::new()), Vec::new());
    grow(&mut node, &mut log, 12);
    cut(&mut node, &mut log, 4);
    grow(&mut node, &mut log, 30);
    cut(&mut node, &mut log, 28);
    grow(&mut node, &mut log, 4);
    node = opened(node.kill());
    grow(&mut node, &mut log, 2);
    cut(&mut node, &mut log, 1);
    grow(&mut node, &mut log, 5);
    finish(node, log);
    scenarios
}

/// Every intact envelope in the segments of a directory.
fn slots_of(directory: &Directory) -> Vec<Slot> {
    let mut slots = Vec::new();
    for (file, content) in directory.iter().filter(|(file, _)| file.ends_with(".wal")) {
        for offset in (0..content.len()).step_by(ringraft_block::BLOCK_BYTES) {
            if let Ok(envelope) = read_envelope(&content[offset..]) {
                let bytes = slot_bytes(envelope.image_bytes as usize);
                slots.push(Slot { file: file.clone(), offset, bytes, envelope });
            }
        }
    }
    slots
}
