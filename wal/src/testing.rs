//! A disk in memory whose completions, failures and crashes the tests control, and a harness around a log on it.
//!
//! Operations wait in a queue until the test lets one happen. What has happened durably is in the device; what has
//! happened but was not flushed, and what is still waiting, is at the mercy of a crash: of every such write any subset
//! of sectors may survive, and of the unsynced changes of names any prefix.

use crate::disk::{
    Access, DirectoryEntry, Disk, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId,
};
use crate::format::{BatchBuilder, BatchInfo, BatchKind, Chain, LogStart, Seal, image_bytes_for};
use crate::{ReadError, Recovered, StoredBatch, Wal, WalConfig, WalError, WalEvent};
use ringraft_block::{
    AlignedBuf, BLOCK_BYTES, Block, BlockBuf, ClusterId, GroupId, LogIndex, NodeId, Pool, SECTOR_BYTES, Term,
};
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;

/// Compares `text` with the checked-in file; `UPDATE_GOLDEN=1` writes it instead.
pub(crate) fn golden(name: &str, text: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(expected == text, "{} differs; UPDATE_GOLDEN=1 accepts it:\n{text}", path.display());
}

/// Bytes as a table, sixteen to a line; runs of zero lines are left out.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (ordinal, line) in bytes.chunks(16).enumerate() {
        if line.iter().all(|byte| *byte == 0) {
            continue;
        }
        write!(text, "{:06x} ", ordinal * 16).unwrap();
        for byte in line {
            write!(text, " {byte:02x}").unwrap();
        }
        text.push('\n');
    }
    text
}

/// SplitMix64.
#[derive(Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

type Inode = usize;

/// A write that a crash may undo in part.
#[derive(Clone)]
struct Unsynced {
    inode: Inode,
    offset: usize,
    bytes: Vec<u8>,
}

#[derive(Clone)]
enum NameChange {
    Add(String, Inode),
    Rename(String, String),
    Remove(String),
}

fn apply_name(names: &mut BTreeMap<String, Inode>, change: &NameChange) {
    match change {
        NameChange::Add(name, inode) => {
            names.insert(name.clone(), *inode);
        }
        NameChange::Rename(from, to) => {
            if let Some(inode) = names.remove(from) {
                names.insert(to.clone(), inode);
            }
        }
        NameChange::Remove(name) => {
            names.remove(name);
        }
    }
}

/// What survives a crash, and what might.
#[derive(Clone, Default)]
pub(crate) struct Device {
    inodes: Vec<Vec<u8>>,
    /// Content as reads see it.
    cached: Vec<Vec<u8>>,
    durable_names: BTreeMap<String, Inode>,
    names: BTreeMap<String, Inode>,
    unsynced: Vec<Unsynced>,
    unsynced_names: Vec<NameChange>,
    /// Writes of a killed process that are still on their way to the device.
    late: Vec<Unsynced>,
}

impl Device {
    /// Lets a write of a killed process reach the device's cache.
    pub(crate) fn land_late(&mut self) -> bool {
        let Some(write) = self.late.pop() else { return false };
        self.write(write.inode, write.offset, &write.bytes, false);
        true
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    /// Changes bytes behind the log's back.
    pub(crate) fn corrupt(&mut self, name: &str, offset: usize, change: impl Fn(&mut [u8]), bytes: usize) {
        let inode = self.names[name];
        change(&mut self.inodes[inode][offset..offset + bytes]);
        change(&mut self.cached[inode][offset..offset + bytes]);
    }

    pub(crate) fn content(&self, name: &str) -> &[u8] {
        &self.cached[self.names[name]]
    }

    /// Cuts a file to so many bytes.
    pub(crate) fn shorten(&mut self, name: &str, bytes: usize) {
        let inode = self.names[name];
        self.inodes[inode].truncate(bytes);
        self.cached[inode].truncate(bytes);
    }

    pub(crate) fn remove(&mut self, name: &str) {
        self.names.remove(name);
        self.durable_names.remove(name);
    }

    /// All that survived, name by name.
    pub(crate) fn image(&self) -> BTreeMap<String, Vec<u8>> {
        self.names.iter().map(|(name, inode)| (name.clone(), self.cached[*inode].clone())).collect()
    }

    fn write(&mut self, inode: Inode, offset: usize, bytes: &[u8], durable: bool) {
        self.cached[inode][offset..offset + bytes.len()].copy_from_slice(bytes);
        if durable {
            self.inodes[inode][offset..offset + bytes.len()].copy_from_slice(bytes);
        } else {
            self.unsynced.push(Unsynced { inode, offset, bytes: bytes.to_vec() });
        }
    }

    /// Power is lost: of each unsynced write those sectors survive that `survives` picks.
    fn lose_power(&mut self, mut survives: impl FnMut() -> bool, names_kept: usize) {
        for write in std::mem::take(&mut self.unsynced) {
            for (ordinal, sector) in write.bytes.chunks(SECTOR_BYTES).enumerate() {
                if survives() {
                    let at = write.offset + ordinal * SECTOR_BYTES;
                    self.inodes[write.inode][at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
        for change in self.unsynced_names.drain(..).take(names_kept) {
            apply_name(&mut self.durable_names, &change);
        }
        self.late.clear();
        self.cached.clone_from(&self.inodes);
        self.names.clone_from(&self.durable_names);
    }
}

/// What the test wants to happen to an operation.
pub(crate) enum Fate {
    Happen,
    Fail(DiskErrorKind),
    /// A write of fewer bytes.
    Short(usize),
}

/// The disk.
pub(crate) struct TestDisk {
    pub(crate) device: Device,
    open: BTreeMap<u32, (Inode, Access)>,
    next_file: u32,
    pub(crate) queue: VecDeque<(DiskOpId, DiskOp<AlignedBuf>)>,
    done: Vec<DiskDone<AlignedBuf>>,
    /// Every operation in the order of submission.
    pub(crate) trace: Vec<String>,
    /// Creating or filling a file beyond so many bytes in all fails.
    pub(crate) space: Option<u64>,
    /// Blocks that cannot be read: file name and offset.
    pub(crate) unreadable: Vec<(String, u64)>,
    /// Files that the device fails to open, so many times.
    pub(crate) unopenable: Vec<(String, usize)>,
    /// The next so many reads of that place of a file bring bytes from elsewhere.
    pub(crate) misread: Vec<(String, u64, usize)>,
}

impl TestDisk {
    pub(crate) fn new(device: Device) -> Self {
        Self {
            device,
            open: BTreeMap::new(),
            next_file: 1,
            queue: VecDeque::new(),
            done: Vec::new(),
            trace: Vec::new(),
            space: None,
            unreadable: Vec::new(),
            unopenable: Vec::new(),
            misread: Vec::new(),
        }
    }

    /// Lets the waiting operation at `at` happen.
    pub(crate) fn complete(&mut self, at: usize, fate: Fate) {
        let (id, op) = self.queue.remove(at).expect("the operation waits");
        let result = match fate {
            Fate::Fail(kind) => Err(DiskError { kind, operation: "test", os_error: None }),
            Fate::Happen => self.happen(op),
            Fate::Short(bytes) => match self.happen(op) {
                Ok(_) => Ok(DiskOutput::Written { bytes }),
                Err(error) => Err(error),
            },
        };
        self.done.push(DiskDone { id, result });
    }

    /// The process dies, and power fails with it: what waits happens in part, what was not synced is kept in part.
    pub(crate) fn crash(mut self, mut survives: impl FnMut() -> bool) -> Device {
        for (_, op) in std::mem::take(&mut self.queue) {
            match op {
                DiskOp::Write { file, offset, block, bytes } => {
                    let (inode, _) = self.open[&file.0];
                    self.device.unsynced.push(Unsynced {
                        inode,
                        offset: offset as usize,
                        bytes: block[..bytes].to_vec(),
                    });
                }
                op @ (DiskOp::Create { .. } | DiskOp::Rename { .. } | DiskOp::Remove { .. }) => {
                    let _ = self.happen(op);
                }
                _ => {}
            }
        }
        let names_kept = (0..self.device.unsynced_names.len()).take_while(|_| survives()).count();
        self.device.lose_power(&mut survives, names_kept);
        self.device
    }

    /// The process is killed and power stays: what has happened stays in the device's cache; of what waits each operation
    /// happens (0), never happens (1), or, a write, happens during the next life (2).
    pub(crate) fn kill(mut self, mut choose: impl FnMut() -> usize) -> Device {
        for (_, op) in std::mem::take(&mut self.queue) {
            let choice = choose();
            match op {
                DiskOp::Write { file, offset, block, bytes } if choice != 1 => {
                    let (inode, _) = self.open[&file.0];
                    let write = Unsynced { inode, offset: offset as usize, bytes: block[..bytes].to_vec() };
                    match choice {
                        0 => self.device.write(inode, write.offset, &write.bytes, false),
                        _ => self.device.late.push(write),
                    }
                }
                op @ (DiskOp::Create { .. } | DiskOp::Rename { .. } | DiskOp::Remove { .. })
                    if choice == 0 =>
                {
                    let _ = self.happen(op);
                }
                _ => {}
            }
        }
        self.device
    }

    fn inode(&self, file: FileId) -> (Inode, Access) {
        *self.open.get(&file.0).expect("the file is open")
    }

    fn happen(&mut self, op: DiskOp<AlignedBuf>) -> Result<DiskOutput<AlignedBuf>, DiskError> {
        let error = |kind, operation| Err(DiskError { kind, operation, os_error: None });
        let device = &mut self.device;
        match op {
            DiskOp::List => {
                let entry = |(name, inode): (&String, &Inode)| DirectoryEntry {
                    name: name.clone(),
                    bytes: device.cached[*inode].len() as u64,
                };
                Ok(DiskOutput::Listed(device.names.iter().map(entry).collect()))
            }
            DiskOp::Create { name, bytes, access } => {
                if device.names.contains_key(&name) {
                    return error(DiskErrorKind::AlreadyExists, "create");
                }
                let used: u64 = device.names.values().map(|inode| device.cached[*inode].len() as u64).sum();
                let fits = self.space.is_none_or(|space| used + bytes <= space);
                let size = if fits { bytes as usize } else { 0 };
                device.inodes.push(vec![0; size]);
                device.cached.push(vec![0; size]);
                let inode = device.inodes.len() - 1;
                device.names.insert(name.clone(), inode);
                device.unsynced_names.push(NameChange::Add(name, inode));
                if !fits {
                    return error(DiskErrorKind::NoSpace, "create");
                }
                Ok(self.opened(inode, access))
            }
            DiskOp::Open { name, .. }
                if self.unopenable.iter_mut().any(|(bad, times)| {
                    let fails = *bad == name && *times > 0;
                    *times -= usize::from(fails);
                    fails
                }) =>
            {
                error(DiskErrorKind::Io, "open")
            }
            DiskOp::Open { name, access } => match device.names.get(&name).copied() {
                Some(inode) => Ok(self.opened(inode, access)),
                None => error(DiskErrorKind::NotFound, "open"),
            },
            DiskOp::Write { file, offset, block, bytes } => {
                let (inode, access) = self.inode(file);
                assert!(access != Access::Read, "the file is open for writing");
                assert!(offset.is_multiple_of(BLOCK_BYTES as u64) && bytes.is_multiple_of(BLOCK_BYTES));
                assert!(
                    offset as usize + bytes <= self.device.cached[inode].len(),
                    "files are never extended"
                );
                let durable = access == Access::DurableWrite;
                self.device.write(inode, offset as usize, &block[..bytes], durable);
                Ok(DiskOutput::Written { bytes })
            }
            DiskOp::Read { file, offset, mut block, bytes } => {
                let (inode, _) = self.inode(file);
                assert!(offset.is_multiple_of(BLOCK_BYTES as u64) && bytes.is_multiple_of(BLOCK_BYTES));
                let name = self.device.names.iter().find(|(_, named)| **named == inode).map(|(name, _)| name);
                let range = offset..offset + bytes as u64;
                if self.unreadable.iter().any(|(bad, at)| Some(bad) == name && range.contains(at)) {
                    return error(DiskErrorKind::Io, "read");
                }
                let content = &self.device.cached[inode];
                let start = (offset as usize).min(content.len());
                let end = (offset as usize + bytes).min(content.len());
                block[..end - start].copy_from_slice(&content[start..end]);
                for (bad, at, times) in &mut self.misread {
                    if Some(&*bad) == name && range.contains(at) && *times > 0 {
                        *times -= 1;
                        let at = (*at - offset) as usize;
                        block[at..at + BLOCK_BYTES].fill(0x5a);
                    }
                }
                Ok(DiskOutput::Read { block, bytes: end - start })
            }
            DiskOp::Flush { file } => {
                let (inode, _) = self.inode(file);
                let device = &mut self.device;
                device.inodes[inode] = device.cached[inode].clone();
                device.unsynced.retain(|write| write.inode != inode);
                Ok(DiskOutput::Done)
            }
            DiskOp::Close { file } => {
                let in_flight = self.queue.iter().any(|(_, op)| match op {
                    DiskOp::Write { file: other, .. }
                    | DiskOp::Read { file: other, .. }
                    | DiskOp::Flush { file: other } => *other == file,
                    _ => false,
                });
                assert!(!in_flight, "nothing is in flight on a file that is closed");
                self.open.remove(&file.0).expect("a file is closed once");
                Ok(DiskOutput::Done)
            }
            DiskOp::Rename { from, to } => {
                if !device.names.contains_key(&from) {
                    return error(DiskErrorKind::NotFound, "rename");
                }
                let change = NameChange::Rename(from, to);
                apply_name(&mut device.names, &change);
                device.unsynced_names.push(change);
                Ok(DiskOutput::Done)
            }
            DiskOp::Remove { name } => {
                if device.names.remove(&name).is_none() {
                    return error(DiskErrorKind::NotFound, "remove");
                }
                device.unsynced_names.push(NameChange::Remove(name));
                Ok(DiskOutput::Done)
            }
            DiskOp::SyncDirectory => {
                for change in std::mem::take(&mut device.unsynced_names) {
                    apply_name(&mut device.durable_names, &change);
                }
                Ok(DiskOutput::Done)
            }
        }
    }

    fn opened(&mut self, inode: Inode, access: Access) -> DiskOutput<AlignedBuf> {
        let file = FileId(self.next_file);
        self.next_file += 1;
        self.open.insert(file.0, (inode, access));
        DiskOutput::Opened { file, bytes: self.device.cached[inode].len() as u64 }
    }

    pub(crate) fn open_files(&self) -> usize {
        self.open.len()
    }
}

pub(crate) fn describe(op: &DiskOp<AlignedBuf>) -> String {
    match op {
        DiskOp::List => "list".to_owned(),
        DiskOp::Create { name, .. } => format!("create {name}"),
        DiskOp::Open { name, .. } => format!("open {name}"),
        DiskOp::Write { file, offset, bytes, .. } => format!("write {} {offset}+{bytes}", file.0),
        DiskOp::Read { file, offset, bytes, .. } => format!("read {} {offset}+{bytes}", file.0),
        DiskOp::Flush { file } => format!("flush {}", file.0),
        DiskOp::Close { file } => format!("close {}", file.0),
        DiskOp::Rename { from, to } => format!("rename {from} {to}"),
        DiskOp::Remove { name } => format!("remove {name}"),
        DiskOp::SyncDirectory => "sync directory".to_owned(),
    }
}

impl Disk for TestDisk {
    type Buf = AlignedBuf;

    fn allocate(&mut self, bytes: usize) -> Result<AlignedBuf, DiskError> {
        // Recycled memory is never blank: fill it, so that a forgotten padding shows.
        let mut buffer = AlignedBuf::zeroed(bytes);
        buffer.bytes_mut().fill(0xa5);
        Ok(buffer)
    }

    fn submit(&mut self, id: DiskOpId, op: DiskOp<AlignedBuf>) {
        assert!(Wal::<TestDisk>::owns(id));
        assert!(self.queue.iter().all(|(other, _)| *other != id), "ids in flight are unique");
        self.trace.push(describe(&op));
        self.queue.push_back((id, op));
    }

    fn poll(&mut self, done: &mut Vec<DiskDone<AlignedBuf>>) {
        done.append(&mut self.done);
    }
}

/// A small log: slots of up to 8 KiB, 16 of them to a segment.
pub(crate) fn config() -> WalConfig {
    WalConfig {
        segment_bytes: 140 * 1024,
        segments_ahead: 2,
        batch_bytes_max: 8192 - 512,
        writes_in_flight_max: 4,
        bytes_in_flight_max: 64 * 1024,
        ..WalConfig::new(ClusterId(0xc1), NodeId(3), 42)
    }
}

/// A log, its disk, and what it has told.
pub(crate) struct Harness {
    pub(crate) disk: TestDisk,
    pub(crate) wal: Wal<TestDisk>,
    pub(crate) events: VecDeque<WalEvent<AlignedBuf>>,
    pub(crate) pool: Pool<AlignedBuf>,
    builder: Option<BatchBuilder<AlignedBuf>>,
    /// What `Persisted` has said so far.
    pub(crate) persisted: LogIndex,
}

impl Harness {
    pub(crate) fn start(device: Device) -> Self {
        Self::start_with(device, config())
    }

    pub(crate) fn start_with(device: Device, config: WalConfig) -> Self {
        let pool = Pool::new(1 << 20);
        let wal = Wal::open(config, pool.clone());
        let disk = TestDisk::new(device);
        Self { disk, wal, events: VecDeque::new(), pool, builder: None, persisted: LogIndex(0) }
    }

    /// A blank directory, formatted and open.
    pub(crate) fn fresh() -> Self {
        let mut harness = Self::start(Device::default());
        assert!(harness.open().fresh);
        harness
    }

    /// Polls and handles what has completed, and advances.
    pub(crate) fn turn(&mut self) {
        let mut done = Vec::new();
        self.disk.poll(&mut done);
        let before = self.events.len();
        for done in done {
            self.wal.handle(&mut self.disk, done, &mut self.events);
        }
        self.wal.advance(&mut self.disk, &mut self.events);
        for event in self.events.iter().skip(before) {
            if let WalEvent::Persisted { last, .. } = event {
                self.persisted = *last;
            }
        }
    }

    /// Lets the oldest waiting operation happen, and takes a turn.
    pub(crate) fn step(&mut self) -> bool {
        if self.disk.queue.is_empty() {
            return false;
        }
        self.disk.complete(0, Fate::Happen);
        self.turn();
        true
    }

    /// Turns until nothing is waiting, and so much time has passed that no segment is being filled either.
    pub(crate) fn settle(&mut self) {
        self.turn();
        while self.step() || self.wal.is_filling() {
            if self.disk.queue.is_empty() {
                self.wal.fill_step(&mut self.disk, 0);
            }
        }
        self.turn();
        assert!(self.disk.queue.is_empty());
    }

    /// Settles; the log must open.
    pub(crate) fn open(&mut self) -> Recovered {
        self.settle();
        match self.events.pop_front() {
            Some(WalEvent::Opened(recovered)) => recovered,
            other => panic!("the log did not open: {other:?}"),
        }
    }

    /// Settles; the log must stop.
    pub(crate) fn stopped(&mut self) -> WalError {
        self.settle();
        let poisoned = self.events.iter().find_map(|event| match event {
            WalEvent::Poisoned(error) => Some(error.clone()),
            _ => None,
        });
        poisoned.unwrap_or_else(|| panic!("the log did not stop: {:?}", self.events))
    }

    /// A sealed batch that follows the log: `count` commands that tell their index and `salt`.
    pub(crate) fn batch(
        &mut self,
        term: u64,
        count: usize,
        bytes: usize,
        salt: u64,
    ) -> (Block<AlignedBuf>, BatchInfo) {
        let LogStart { index, chain, .. } = self.wal.log_end();
        let image = image_bytes_for(count, 0, count * bytes);
        let pool = self.pool.clone();
        let block = crate::ops::take(&pool, &mut self.disk, crate::format::slot_bytes(image)).unwrap();
        let builder = match self.builder.as_mut() {
            Some(builder) => {
                builder.rearm(block);
                builder
            }
            None => self.builder.insert(BatchBuilder::new(block)),
        };
        for ordinal in 0..count as u64 {
            let mut command = vec![(salt & 0xff) as u8; bytes];
            let identity = (index.get() + 1 + ordinal) << 16 | salt & 0xffff;
            command[..8].copy_from_slice(&identity.to_le_bytes());
            builder.push(&command, None).unwrap();
        }
        builder.seal(Seal {
            group: GroupId(0),
            term: Term(term),
            first: index.next(),
            kind: BatchKind::Commands,
            time_ms: 1000 + index.get(),
            previous_chain: chain,
        })
    }

    /// Appends a batch without letting its write happen.
    pub(crate) fn append(&mut self, term: u64, count: usize, bytes: usize, salt: u64) -> BatchInfo {
        let (block, info) = self.batch(term, count, bytes, salt);
        self.wal.append(&mut self.disk, block, info);
        info
    }

    /// Appends a batch and lets everything happen.
    pub(crate) fn append_durably(&mut self, term: u64, count: usize, bytes: usize, salt: u64) -> BatchInfo {
        let info = self.append(term, count, bytes, salt);
        self.settle();
        assert_eq!(self.persisted, info.last);
        info
    }

    pub(crate) fn chains(&self) -> Vec<Chain> {
        self.wal.batches().map(|batch| batch.chain).collect()
    }

    /// The oldest answer to a read.
    pub(crate) fn take_read(&mut self) -> Result<Vec<StoredBatch<AlignedBuf>>, ReadError> {
        let at = self.events.iter().position(|event| matches!(event, WalEvent::Read { .. })).unwrap();
        match self.events.remove(at) {
            Some(WalEvent::Read { result, .. }) => result,
            other => panic!("{other:?}"),
        }
    }

    /// Reads the whole log back.
    pub(crate) fn read_all(&mut self) -> Vec<StoredBatch<AlignedBuf>> {
        let mut batches: Vec<StoredBatch<AlignedBuf>> = Vec::new();
        loop {
            let first = batches.last().map_or(self.wal.first_index(), |batch| batch.info.last.next());
            if first > self.wal.last_index() {
                return batches;
            }
            self.wal.read(&mut self.disk, 7, first, 32 * 1024);
            self.settle();
            let at = self.events.iter().position(|event| matches!(event, WalEvent::Read { .. })).unwrap();
            match self.events.remove(at) {
                Some(WalEvent::Read { token: 7, result: Ok(more) }) => batches.extend(more),
                other => panic!("{other:?}"),
            }
        }
    }

    /// The process dies and power fails.
    pub(crate) fn crash(self, survives: impl FnMut() -> bool) -> Device {
        self.disk.crash(survives)
    }

    /// The process ends in good order.
    pub(crate) fn shut_down(mut self) -> Device {
        self.wal.close(&mut self.disk);
        self.settle();
        assert!(matches!(self.events.back(), Some(WalEvent::Closed)), "{:?}", self.events);
        assert_eq!(self.disk.open_files(), 0, "every file is closed: {:#?}", self.disk.trace);
        self.disk.crash(|| false)
    }
}
