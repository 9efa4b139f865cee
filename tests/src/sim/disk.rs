//! A disk in memory that keeps only what its rules oblige it to keep.
//!
//! [`DiskState`] is the machine's disk; it outlives the processes that use it. [`SimDisk`] is one process's
//! handle on it, a backend of the log's `Disk` seam. The rules, which are the device assumptions of the log's
//! crash contract:
//!
//! - Operations take their time and complete in any order. They take effect when they complete.
//! - A write of a file opened with `DurableWrite` is durable when it has completed. A write of a file opened with
//!   `Write` is durable when a flush that was submitted after its completion has completed.
//! - A **power cut** keeps what is durable. Of each completed write that was not flushed, and of each write in
//!   flight, any subset of the 512 B sectors survives, independent of the others. Directory operations that
//!   were not synchronised survive or not, each on its own; a rename is never half done. A file that was created and
//!   neither flushed nor durably written may have lost its size.
//! - A **kill** takes only the process: completed writes and directory operations stay as they are, still not
//!   durable, for a later power cut to take. Of each write in flight any subset of the sectors arrives, and what
//!   arrived is not durable either.
//!
//! Content is kept in pages of 4 KiB, shared copy-on-write with images taken of the disk; pages of zeros are not
//! kept at all.

use super::context::{Context, MICROSECOND, Time};
use super::coverage::Mark;
use super::rng::Rng;
use super::trace::What;
use ringraft_block::{AlignedBuf, BLOCK_BYTES, SECTOR_BYTES};
use ringraft_wal::disk::{
    Access, DirectoryEntry, Disk, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId,
};
use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::rc::Rc;

/// Speeds and bounds of a disk. Latencies are typical ones: most draws are within a factor of two.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// Operations that the device works on at once; others queue.
    pub in_flight_max: usize,
    /// Space for all files together.
    pub capacity_bytes: u64,
    /// A write, besides its bytes.
    pub write: Time,
    /// A read, besides its bytes.
    pub read: Time,
    /// A flush.
    pub flush: Time,
    /// An operation on the directory.
    pub directory: Time,
    /// Transfer time of a block of 4 KiB.
    pub block: Time,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            in_flight_max: 32,
            capacity_bytes: 8 << 30,
            write: 60 * MICROSECOND,
            read: 40 * MICROSECOND,
            flush: 150 * MICROSECOND,
            directory: 100 * MICROSECOND,
            block: 800,
        }
    }
}

impl DiskConfig {
    /// A disk without latency, for looking at images.
    #[must_use]
    pub fn instant() -> Self {
        Self { write: 0, read: 0, flush: 0, directory: 0, block: 0, ..Self::default() }
    }
}

/// What a disk does wrong. All off by default.
#[derive(Clone, Debug)]
pub struct DiskFaults {
    /// Operations submitted from now until one fails with EIO; 0 is the next one.
    pub fail_after_ops: Option<u64>,
    /// Once an operation has failed, all do.
    pub fail_for_ever: bool,
    /// How often, in a million, a write of more than one block stops short after some whole blocks.
    pub short_write_ppm: u32,
    /// Every operation that needs space fails with ENOSPC.
    pub no_space: bool,
    /// Latencies are multiplied by it.
    pub slow_factor: u64,
    /// Nothing completes before this time.
    pub stalled_until: Time,
    /// How often, in a million, a write that is in flight at a kill arrives later, at its own time, whole, when
    /// the next process may be running already.
    pub late_write_ppm: u32,
}

impl Default for DiskFaults {
    fn default() -> Self {
        Self {
            fail_after_ops: None,
            fail_for_ever: false,
            short_write_ppm: 0,
            no_space: false,
            slow_factor: 1,
            stalled_until: 0,
            late_write_ppm: 0,
        }
    }
}

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// kill -9: the machine goes on.
    Kill,
    /// The machine loses power.
    PowerCut,
}

type Page = [u8; BLOCK_BYTES];

#[derive(Clone)]
struct Inode {
    bytes: u64,
    /// The size that a power cut leaves.
    durable_bytes: u64,
    /// By position; absent pages are zeros.
    pages: Vec<Option<Rc<Page>>>,
    /// Completed, not flushed, in the order of completion.
    unflushed: Vec<Unflushed>,
}

#[derive(Clone)]
struct Unflushed {
    sequence: u64,
    offset: u64,
    data: Vec<u8>,
}

#[derive(Clone)]
enum DirectoryOp {
    Create { name: String, inode: usize },
    Rename { from: String, to: String, inode: usize },
    Remove { name: String, inode: usize },
}

#[derive(Clone, Copy)]
struct OpenFile {
    inode: usize,
    access: Access,
    in_flight: u32,
}

struct InFlight {
    id: DiskOpId,
    op: DiskOp<AlignedBuf>,
    /// The inode of `op`'s file, where it names an open one.
    inode: Option<usize>,
    /// Of a flush or a directory sync: what had completed when it was submitted.
    covers: u64,
    fail: bool,
    sequence: u64,
}

/// A late write of a process that was killed.
struct Late {
    due: Time,
    inode: usize,
    offset: u64,
    data: Vec<u8>,
}

/// One machine's disk.
pub struct DiskState {
    context: Rc<Context>,
    node: usize,
    rng: Rng,
    config: DiskConfig,
    faults: DiskFaults,

    inodes: Vec<Option<Inode>>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    unsynced: Vec<(u64, DirectoryOp)>,
    /// Numbers completed writes and directory operations.
    completed: u64,
    late: Vec<Late>,

    /// Of the present process. File ids are positions in `files`, and not used again.
    life: u32,
    files: Vec<Option<OpenFile>>,
    in_flight: Vec<Option<InFlight>>,
    vacant: Vec<u32>,
    queue: BinaryHeap<Reverse<(Time, u64, u32)>>,
    lanes: BinaryHeap<Reverse<Time>>,
    submitted: u64,
    last_done_sequence: u64,
    done: Vec<(u8, DiskDone<AlignedBuf>)>,
}

/// A process's handle on its machine's disk.
pub struct SimDisk {
    state: Rc<RefCell<DiskState>>,
    life: u32,
}

impl SimDisk {
    /// A handle for the process that starts now.
    #[must_use]
    pub fn new(state: &Rc<RefCell<DiskState>>) -> Self {
        Self { state: Rc::clone(state), life: state.borrow().life }
    }
}

impl Disk for SimDisk {
    type Buf = AlignedBuf;

    fn allocate(&mut self, bytes: usize) -> Result<AlignedBuf, DiskError> {
        Ok(AlignedBuf::zeroed(bytes))
    }

    fn submit(&mut self, id: DiskOpId, op: DiskOp<AlignedBuf>) {
        let mut state = self.state.borrow_mut();
        assert_eq!(state.life, self.life, "a dead process submits nothing");
        state.submit(id, op);
    }

    fn poll(&mut self, done: &mut Vec<DiskDone<AlignedBuf>>) {
        let mut state = self.state.borrow_mut();
        assert_eq!(state.life, self.life, "a dead process polls nothing");
        state.poll(done);
    }
}

const KINDS: [&str; 10] =
    ["list", "create", "open", "write", "read", "flush", "close", "rename", "remove", "sync directory"];

/// The name of an operation's kind, as traced. The outcome is in the bits above the lowest four.
pub(super) fn name_of_kind(kind: u64) -> &'static str {
    KINDS.get((kind & 15) as usize).copied().unwrap_or("unknown")
}

fn kind_of(op: &DiskOp<AlignedBuf>) -> u8 {
    match op {
        DiskOp::List => 0,
        DiskOp::Create { .. } => 1,
        DiskOp::Open { .. } => 2,
        DiskOp::Write { .. } => 3,
        DiskOp::Read { .. } => 4,
        DiskOp::Flush { .. } => 5,
        DiskOp::Close { .. } => 6,
        DiskOp::Rename { .. } => 7,
        DiskOp::Remove { .. } => 8,
        DiskOp::SyncDirectory => 9,
    }
}

fn bytes_of(op: &DiskOp<AlignedBuf>) -> usize {
    match op {
        DiskOp::Write { bytes, .. } | DiskOp::Read { bytes, .. } => *bytes,
        DiskOp::Create { bytes, .. } => *bytes as usize,
        _ => 0,
    }
}

fn file_of(op: &DiskOp<AlignedBuf>) -> Option<FileId> {
    match op {
        DiskOp::Write { file, .. }
        | DiskOp::Read { file, .. }
        | DiskOp::Flush { file }
        | DiskOp::Close { file } => Some(*file),
        _ => None,
    }
}

const fn error(kind: DiskErrorKind, op: u8) -> DiskError {
    DiskError { kind, operation: KINDS[op as usize], os_error: None }
}

impl DiskState {
    /// An empty disk of `node`.
    #[must_use]
    pub fn new(context: &Rc<Context>, node: usize, rng: Rng, config: DiskConfig) -> Rc<RefCell<Self>> {
        let lanes = std::iter::repeat_n(Reverse(0), config.in_flight_max.max(1)).collect();
        Rc::new(RefCell::new(Self {
            context: Rc::clone(context),
            node,
            rng,
            config,
            faults: DiskFaults::default(),
            inodes: Vec::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            unsynced: Vec::new(),
            completed: 0,
            late: Vec::new(),
            life: 0,
            files: Vec::new(),
            in_flight: Vec::new(),
            vacant: Vec::new(),
            queue: BinaryHeap::new(),
            lanes,
            submitted: 0,
            last_done_sequence: 0,
            done: Vec::new(),
        }))
    }

    /// What the disk does wrong, to be changed at will.
    pub fn faults_mut(&mut self) -> &mut DiskFaults {
        &mut self.faults
    }

    /// When the next completion arrives. In the past if one waits to be polled.
    #[must_use]
    pub fn next_due(&self) -> Option<Time> {
        if !self.done.is_empty() {
            return Some(0);
        }
        self.queue.peek().map(|Reverse((due, ..))| (*due).max(self.faults.stalled_until))
    }

    /// Writes that the present process has in flight.
    #[must_use]
    pub fn writes_in_flight(&self) -> usize {
        self.in_flight.iter().flatten().filter(|op| matches!(op.op, DiskOp::Write { .. })).count()
    }

    /// A disk that holds exactly what is durable now, without latency or faults: what the least lucky power cut
    /// would leave. Shares its pages with this one until either writes. It counts and traces into `context`.
    #[must_use]
    pub fn durable_image(&self, context: &Rc<Context>) -> Rc<RefCell<Self>> {
        let image = Self::new(context, self.node, Rng::new(0), DiskConfig::instant());
        {
            let mut state = image.borrow_mut();
            for (name, inode) in &self.durable_names {
                let original = self.inodes[*inode].as_ref().expect("a durable name has its inode");
                let copy = Inode { unflushed: Vec::new(), bytes: original.durable_bytes, ..original.clone() };
                state.inodes.push(Some(copy));
                let position = state.inodes.len() - 1;
                state.names.insert(name.clone(), position);
                state.durable_names.insert(name.clone(), position);
            }
        }
        image
    }

    /// Flips one bit of a file where it is durable: rot.
    ///
    /// # Panics
    /// When there is no such file.
    pub fn flip_bit(&mut self, name: &str, offset: u64, bit: u8) {
        let inode = self.durable_names[name];
        let mut sector = [0; SECTOR_BYTES];
        let start = offset - offset % SECTOR_BYTES as u64;
        let file = self.inodes[inode].as_mut().expect("a durable name has its inode");
        file.read_durable(start, &mut sector);
        sector[(offset - start) as usize] ^= 1 << (bit & 7);
        file.write_durable(start, &sector);
    }

    /// The names and sizes that a process sees.
    #[must_use]
    pub fn listing(&self) -> Vec<DirectoryEntry> {
        let entry = |(name, inode): (&String, &usize)| DirectoryEntry {
            name: name.clone(),
            bytes: self.inodes[*inode].as_ref().map_or(0, |inode| inode.bytes),
        };
        self.names.iter().map(entry).collect()
    }

    /// A hash over everything durable, to compare images by.
    #[must_use]
    pub fn durable_hash(&self) -> u64 {
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        for (name, inode) in &self.durable_names {
            let inode = self.inodes[*inode].as_ref().expect("a durable name has its inode");
            hasher.update(name.as_bytes());
            hasher.update(&inode.durable_bytes.to_le_bytes());
            for (position, page) in inode.pages.iter().enumerate() {
                if let Some(page) = page {
                    hasher.update(&position.to_le_bytes());
                    hasher.update(&page[..]);
                }
            }
        }
        hasher.digest()
    }

    fn submit(&mut self, id: DiskOpId, op: DiskOp<AlignedBuf>) {
        let kind = kind_of(&op);
        let bytes = bytes_of(&op);
        self.context.record(self.node, What::DiskSubmit, u64::from(kind), bytes as u64);
        self.context.note(|| self.describe(&op));
        let inode = file_of(&op).and_then(|file| {
            let open = self.files.get_mut(file.0 as usize)?.as_mut()?;
            if matches!(op, DiskOp::Close { .. }) {
                assert_eq!(open.in_flight, 0, "a file is closed when nothing on it is in flight");
            }
            open.in_flight += 1;
            Some(open.inode)
        });
        let fail = match &mut self.faults.fail_after_ops {
            Some(0) => {
                if !self.faults.fail_for_ever {
                    self.faults.fail_after_ops = None;
                }
                self.context.cover(Mark::DiskFault);
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        };

        let base = match kind {
            3 => self.config.write,
            4 => self.config.read,
            5 => self.config.flush,
            6 => self.config.read / 8,
            _ => self.config.directory,
        };
        let blocks = if kind == 1 { 0 } else { bytes.div_ceil(BLOCK_BYTES) as u64 };
        let latency = self.rng.around(base + blocks * self.config.block) * self.faults.slow_factor;
        let Reverse(lane_free) = self.lanes.pop().expect("a disk has a lane");
        let due = lane_free.max(self.context.now()) + latency;
        self.lanes.push(Reverse(due));

        self.submitted += 1;
        let sequence = self.submitted;
        let entry = InFlight { id, op, inode, covers: self.completed, fail, sequence };
        let slot = match self.vacant.pop() {
            Some(slot) => {
                self.in_flight[slot as usize] = Some(entry);
                slot
            }
            None => {
                self.in_flight.push(Some(entry));
                (self.in_flight.len() - 1) as u32
            }
        };
        self.queue.push(Reverse((due, sequence, slot)));
    }

    fn describe(&self, op: &DiskOp<AlignedBuf>) -> String {
        let name = |file: &FileId| {
            let open = self.files.get(file.0 as usize).copied().flatten();
            let inode = open.map_or(usize::MAX, |open| open.inode);
            let named = self.names.iter().find(|(_, named)| **named == inode);
            named.map_or_else(|| format!("file {}", file.0), |(name, _)| name.clone())
        };
        match op {
            DiskOp::List => "list".to_owned(),
            DiskOp::Create { name, bytes, access } => format!("create {name}, {bytes} bytes, {access:?}"),
            DiskOp::Open { name, access } => format!("open {name}, {access:?}"),
            DiskOp::Write { file, offset, bytes, .. } => format!("write {} {offset}+{bytes}", name(file)),
            DiskOp::Read { file, offset, bytes, .. } => format!("read {} {offset}+{bytes}", name(file)),
            DiskOp::Flush { file } => format!("flush {}", name(file)),
            DiskOp::Close { file } => format!("close {}", name(file)),
            DiskOp::Rename { from, to } => format!("rename {from} to {to}"),
            DiskOp::Remove { name } => format!("remove {name}"),
            DiskOp::SyncDirectory => "sync directory".to_owned(),
        }
    }

    fn poll(&mut self, done: &mut Vec<DiskDone<AlignedBuf>>) {
        self.settle();
        for (kind, completion) in self.done.drain(..) {
            let (outcome, bytes) = match &completion.result {
                Ok(DiskOutput::Written { bytes } | DiskOutput::Read { bytes, .. }) => (0, *bytes as u64),
                Ok(DiskOutput::Opened { bytes, .. }) => (0, *bytes),
                Ok(DiskOutput::Listed(entries)) => (0, entries.len() as u64),
                Ok(DiskOutput::Done) => (0, 0),
                Err(error) => (1 + error.kind as u64, 0),
            };
            self.context.record(self.node, What::DiskDone, u64::from(kind) | outcome << 4, bytes);
            done.push(completion);
        }
    }

    /// Carries out what is due.
    fn settle(&mut self) {
        let now = self.context.now();
        if !self.late.is_empty() {
            self.late_writes_arrive(now);
        }
        if now < self.faults.stalled_until {
            return;
        }
        while let Some(Reverse((due, _, slot))) = self.queue.peek() {
            if *due > now {
                break;
            }
            let slot = *slot;
            self.queue.pop();
            self.vacant.push(slot);
            let entry = self.in_flight[slot as usize].take().expect("a queued operation is in flight");
            let kind = kind_of(&entry.op);
            if let Some(file) = file_of(&entry.op)
                && entry.inode.is_some()
            {
                let open = self.files[file.0 as usize].as_mut().expect("closed when nothing is in flight");
                open.in_flight -= 1;
            }
            if kind == 3 {
                if entry.sequence < self.last_done_sequence {
                    self.context.cover(Mark::WriteOvertook);
                }
                self.last_done_sequence = self.last_done_sequence.max(entry.sequence);
            }
            let id = entry.id;
            let result = self.carry_out(entry, kind);
            self.done.push((kind, DiskDone { id, result }));
        }
    }

    fn carry_out(&mut self, entry: InFlight, kind: u8) -> Result<DiskOutput<AlignedBuf>, DiskError> {
        let InFlight { op, inode, covers, fail, .. } = entry;
        let open_inode = inode.ok_or(error(DiskErrorKind::InvalidInput, kind));
        if fail {
            if let (DiskOp::Write { offset, block, bytes, .. }, Some(inode)) = (&op, inode) {
                self.tear(inode, *offset, &block[..*bytes]);
            }
            if let (DiskOp::Flush { .. }, Some(inode)) = (&op, inode) {
                // What a failed flush leaves is unknown: here, nothing of what it should have made durable.
                self.inode_mut(inode).unflushed.retain(|write| write.sequence > covers);
            }
            return Err(error(DiskErrorKind::Io, kind));
        }
        match op {
            DiskOp::List => Ok(DiskOutput::Listed(self.listing())),
            DiskOp::Create { name, bytes, access } => {
                if self.names.contains_key(&name) {
                    return Err(error(DiskErrorKind::AlreadyExists, kind));
                }
                if name.is_empty() || name.contains('/') || bytes % BLOCK_BYTES as u64 != 0 {
                    return Err(error(DiskErrorKind::InvalidInput, kind));
                }
                let used: u64 = self.inodes.iter().flatten().map(|inode| inode.bytes).sum();
                if self.faults.no_space || used + bytes > self.config.capacity_bytes {
                    return Err(error(DiskErrorKind::NoSpace, kind));
                }
                let file = Inode { bytes, durable_bytes: 0, pages: Vec::new(), unflushed: Vec::new() };
                let inode = match self.inodes.iter().position(Option::is_none) {
                    Some(vacant) => {
                        self.inodes[vacant] = Some(file);
                        vacant
                    }
                    None => {
                        self.inodes.push(Some(file));
                        self.inodes.len() - 1
                    }
                };
                self.names.insert(name.clone(), inode);
                self.directory_changed(DirectoryOp::Create { name, inode });
                Ok(self.opened(inode, access))
            }
            DiskOp::Open { name, access } => match self.names.get(&name) {
                Some(inode) => Ok(self.opened(*inode, access)),
                None => Err(error(DiskErrorKind::NotFound, kind)),
            },
            DiskOp::Write { file, offset, block, bytes } => {
                let inode = open_inode?;
                let access = self.files[file.0 as usize].expect("the file is open").access;
                let size = self.inode_mut(inode).bytes;
                let aligned = offset % BLOCK_BYTES as u64 == 0 && bytes % BLOCK_BYTES == 0;
                if access == Access::Read || !aligned || bytes > block.len() || bytes == 0 {
                    return Err(error(DiskErrorKind::InvalidInput, kind));
                }
                if offset + bytes as u64 > size {
                    return Err(error(DiskErrorKind::InvalidInput, kind));
                }
                let mut written = bytes;
                if bytes > BLOCK_BYTES && self.rng.chance(self.faults.short_write_ppm) {
                    written = BLOCK_BYTES * self.rng.index(bytes / BLOCK_BYTES);
                    self.context.cover(Mark::DiskFault);
                }
                self.completed += 1;
                let sequence = self.completed;
                let target = self.inode_mut(inode);
                let data = &block[..written];
                if access == Access::DurableWrite {
                    target.supersede(offset, written);
                    target.write_durable(offset, data);
                    target.durable_bytes = target.bytes;
                } else if !target.is_zero(offset, data) {
                    target.unflushed.push(Unflushed { sequence, offset, data: data.to_vec() });
                }
                Ok(DiskOutput::Written { bytes: written })
            }
            DiskOp::Read { offset, mut block, bytes, .. } => {
                let inode = open_inode?;
                let size = self.inode_mut(inode).bytes;
                let aligned = offset % BLOCK_BYTES as u64 == 0 && bytes % BLOCK_BYTES == 0;
                if !aligned || bytes > block.len() {
                    return Err(error(DiskErrorKind::InvalidInput, kind));
                }
                let available = size.saturating_sub(offset).min(bytes as u64) as usize;
                self.inode_mut(inode).read(offset, &mut block[..available]);
                Ok(DiskOutput::Read { block, bytes: available })
            }
            DiskOp::Flush { .. } => {
                let target = self.inode_mut(open_inode?);
                target.flush(covers);
                Ok(DiskOutput::Done)
            }
            DiskOp::Close { file } => {
                open_inode?;
                self.files[file.0 as usize] = None;
                self.forget_unreachable();
                Ok(DiskOutput::Done)
            }
            DiskOp::Rename { from, to } => {
                let inode = self.names.remove(&from).ok_or(error(DiskErrorKind::NotFound, kind))?;
                self.names.insert(to.clone(), inode);
                self.directory_changed(DirectoryOp::Rename { from, to, inode });
                Ok(DiskOutput::Done)
            }
            DiskOp::Remove { name } => {
                let inode = self.names.remove(&name).ok_or(error(DiskErrorKind::NotFound, kind))?;
                self.directory_changed(DirectoryOp::Remove { name, inode });
                Ok(DiskOutput::Done)
            }
            DiskOp::SyncDirectory => {
                let unsynced = std::mem::take(&mut self.unsynced);
                for (sequence, op) in unsynced {
                    if sequence <= covers {
                        apply_directory_op(&mut self.durable_names, &op);
                    } else {
                        self.unsynced.push((sequence, op));
                    }
                }
                self.forget_unreachable();
                Ok(DiskOutput::Done)
            }
        }
    }

    fn opened(&mut self, inode: usize, access: Access) -> DiskOutput<AlignedBuf> {
        self.files.push(Some(OpenFile { inode, access, in_flight: 0 }));
        let file = FileId((self.files.len() - 1) as u32);
        DiskOutput::Opened { file, bytes: self.inode_mut(inode).bytes }
    }

    fn directory_changed(&mut self, op: DirectoryOp) {
        self.completed += 1;
        self.unsynced.push((self.completed, op));
    }

    fn inode_mut(&mut self, inode: usize) -> &mut Inode {
        self.inodes[inode].as_mut().expect("an inode lives while something refers to it")
    }

    fn forget_unreachable(&mut self) {
        for position in 0..self.inodes.len() {
            let named =
                self.names.values().chain(self.durable_names.values()).any(|inode| *inode == position);
            let open = self.files.iter().flatten().any(|file| file.inode == position);
            let unsynced = self.unsynced.iter().any(|(_, op)| op.inode() == position);
            let late = self.late.iter().any(|late| late.inode == position);
            if !(named || open || unsynced || late) {
                self.inodes[position] = None;
            }
        }
    }

    /// Some sectors of `data` arrive, not durable.
    fn tear(&mut self, inode: usize, offset: u64, data: &[u8]) {
        let survivors = Survivors::draw(&mut self.rng, data.len() / SECTOR_BYTES);
        self.completed += 1;
        let sequence = self.completed;
        for (position, sector) in data.chunks_exact(SECTOR_BYTES).enumerate() {
            if survivors.holds(position) {
                let offset = offset + (position * SECTOR_BYTES) as u64;
                self.inode_mut(inode).unflushed.push(Unflushed { sequence, offset, data: sector.to_vec() });
            }
        }
        if survivors.partial() {
            self.context.cover(Mark::TornWrite);
        }
    }

    /// The process ends, and with a power cut the machine: see the module's rules.
    pub fn crash(&mut self, how: Crash) {
        self.settle();
        let now = self.context.now();
        let mut writes = Vec::new();
        for Reverse((due, _, slot)) in std::mem::take(&mut self.queue).into_sorted_vec() {
            let entry = self.in_flight[slot as usize].take().expect("a queued operation is in flight");
            match (entry.op, entry.inode) {
                (DiskOp::Write { offset, block, bytes, .. }, Some(inode)) => {
                    writes.push((due, inode, offset, block, bytes));
                }
                (DiskOp::Flush { .. }, Some(inode)) if self.rng.chance(500_000) => {
                    self.inode_mut(inode).flush(entry.covers);
                }
                _ => {}
            }
        }
        if !writes.is_empty() {
            self.context.cover(Mark::CrashWithPendingWrites);
        }
        self.context.record(self.node, What::DiskCrash, writes.len() as u64, self.unsynced.len() as u64);
        // They reach the device in any order.
        while !writes.is_empty() {
            let (due, inode, offset, block, bytes) = writes.swap_remove(self.rng.index(writes.len()));
            if how == Crash::Kill && self.rng.chance(self.faults.late_write_ppm) {
                self.late.push(Late { due: due.max(now), inode, offset, data: block[..bytes].to_vec() });
            } else {
                let fits = (self.inode_mut(inode).bytes.saturating_sub(offset) as usize).min(bytes);
                self.tear(inode, offset, &block[..fits - fits % SECTOR_BYTES]);
            }
        }
        if how == Crash::PowerCut {
            self.lose_power();
        }
        self.life += 1;
        self.files.clear();
        self.in_flight.clear();
        self.vacant.clear();
        self.done.clear();
        self.lanes = std::iter::repeat_n(Reverse(now), self.config.in_flight_max.max(1)).collect();
        self.last_done_sequence = 0;
        self.submitted = 0;
        self.forget_unreachable();
    }

    fn lose_power(&mut self) {
        self.late.clear();
        for op in std::mem::take(&mut self.unsynced) {
            // A rename or removal needs the name as it was; where the operation that made it was lost, so is this.
            let possible = match &op.1 {
                DirectoryOp::Create { .. } => true,
                DirectoryOp::Rename { from: name, inode, .. } | DirectoryOp::Remove { name, inode } => {
                    self.durable_names.get(name) == Some(inode)
                }
            };
            if possible && self.rng.chance(500_000) {
                apply_directory_op(&mut self.durable_names, &op.1);
            } else {
                self.context.cover(Mark::DirectoryOpLost);
            }
        }
        self.names.clone_from(&self.durable_names);
        for inode in self.inodes.iter_mut().flatten() {
            if inode.durable_bytes < inode.bytes {
                let blocks = inode.bytes / BLOCK_BYTES as u64;
                inode.bytes = match self.rng.below(3) {
                    0 => 0,
                    1 => self.rng.between(0, blocks) * BLOCK_BYTES as u64,
                    _ => inode.bytes,
                };
                if inode.bytes < blocks * BLOCK_BYTES as u64 {
                    self.context.cover(Mark::FileSizeLost);
                }
                inode.durable_bytes = inode.bytes;
                inode.pages.truncate((inode.bytes / BLOCK_BYTES as u64) as usize);
            }
            let mut lost = false;
            for write in std::mem::take(&mut inode.unflushed) {
                let survivors = Survivors::draw(&mut self.rng, write.data.len() / SECTOR_BYTES);
                for (position, sector) in write.data.chunks_exact(SECTOR_BYTES).enumerate() {
                    let offset = write.offset + (position * SECTOR_BYTES) as u64;
                    if survivors.holds(position) && offset < inode.bytes {
                        inode.write_durable(offset, sector);
                    } else {
                        lost = true;
                    }
                }
            }
            if lost {
                self.context.cover(Mark::UnflushedWriteLost);
            }
        }
    }

    fn late_writes_arrive(&mut self, now: Time) {
        let mut position = 0;
        while position < self.late.len() {
            if self.late[position].due > now {
                position += 1;
                continue;
            }
            let Late { inode, offset, data, .. } = self.late.swap_remove(position);
            self.completed += 1;
            let sequence = self.completed;
            self.inode_mut(inode).unflushed.push(Unflushed { sequence, offset, data });
        }
    }
}

impl DirectoryOp {
    fn inode(&self) -> usize {
        match self {
            Self::Create { inode, .. } | Self::Rename { inode, .. } | Self::Remove { inode, .. } => *inode,
        }
    }
}

fn apply_directory_op(names: &mut BTreeMap<String, usize>, op: &DirectoryOp) {
    match op {
        DirectoryOp::Create { name, inode } => {
            names.insert(name.clone(), *inode);
        }
        DirectoryOp::Rename { from, to, inode } => {
            names.remove(from);
            names.insert(to.clone(), *inode);
        }
        DirectoryOp::Remove { name, .. } => {
            names.remove(name);
        }
    }
}

impl Inode {
    fn page_of(offset: u64) -> (usize, usize) {
        ((offset / BLOCK_BYTES as u64) as usize, (offset % BLOCK_BYTES as u64) as usize)
    }

    fn write_durable(&mut self, offset: u64, data: &[u8]) {
        let mut written = 0;
        while written < data.len() {
            let (page, start) = Self::page_of(offset + written as u64);
            let count = (BLOCK_BYTES - start).min(data.len() - written);
            let bytes = &data[written..written + count];
            written += count;
            let present = self.pages.get(page).is_some_and(Option::is_some);
            if all_zero(bytes) && (!present || count == BLOCK_BYTES) {
                if present {
                    self.pages[page] = None;
                }
                continue;
            }
            if self.pages.len() <= page {
                self.pages.resize(page + 1, None);
            }
            let page = self.pages[page].get_or_insert_with(|| Rc::new([0; BLOCK_BYTES]));
            Rc::make_mut(page)[start..start + count].copy_from_slice(bytes);
        }
    }

    fn read_durable(&self, offset: u64, into: &mut [u8]) {
        let mut read = 0;
        while read < into.len() {
            let (page, start) = Self::page_of(offset + read as u64);
            let count = (BLOCK_BYTES - start).min(into.len() - read);
            match self.pages.get(page) {
                Some(Some(page)) => {
                    into[read..read + count].copy_from_slice(&page[start..start + count]);
                }
                _ => into[read..read + count].fill(0),
            }
            read += count;
        }
    }

    fn read(&self, offset: u64, into: &mut [u8]) {
        self.read_durable(offset, into);
        let end = offset + into.len() as u64;
        for write in &self.unflushed {
            let from = write.offset.max(offset);
            let to = (write.offset + write.data.len() as u64).min(end);
            if from < to {
                let source = (from - write.offset) as usize..(to - write.offset) as usize;
                into[(from - offset) as usize..(to - offset) as usize].copy_from_slice(&write.data[source]);
            }
        }
    }

    fn flush(&mut self, covers: u64) {
        let unflushed = std::mem::take(&mut self.unflushed);
        for write in unflushed {
            if write.sequence <= covers {
                self.write_durable(write.offset, &write.data);
            } else {
                self.unflushed.push(write);
            }
        }
        self.durable_bytes = self.bytes;
    }

    /// A durable write replaces what older writes left unflushed in its range.
    fn supersede(&mut self, offset: u64, bytes: usize) {
        let end = offset + bytes as u64;
        let overlaps =
            |write: &Unflushed| write.offset < end && offset < write.offset + write.data.len() as u64;
        if !self.unflushed.iter().any(overlaps) {
            return;
        }
        let unflushed = std::mem::take(&mut self.unflushed);
        for write in unflushed {
            if !overlaps(&write) {
                self.unflushed.push(write);
                continue;
            }
            let write_end = write.offset + write.data.len() as u64;
            if write.offset < offset {
                let head = write.data[..(offset - write.offset) as usize].to_vec();
                self.unflushed.push(Unflushed { sequence: write.sequence, offset: write.offset, data: head });
            }
            if end < write_end {
                let tail = write.data[(end - write.offset) as usize..].to_vec();
                self.unflushed.push(Unflushed { sequence: write.sequence, offset: end, data: tail });
            }
        }
    }

    /// Whether writing `data` would only put zeros where there are zeros, durably.
    fn is_zero(&self, offset: u64, data: &[u8]) -> bool {
        let (first, _) = Self::page_of(offset);
        let last = first + data.len() / BLOCK_BYTES;
        let absent = (first..last).all(|page| !self.pages.get(page).is_some_and(Option::is_some));
        absent && self.unflushed.is_empty() && all_zero(data)
    }
}

fn all_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| *word == [0; 16]) && rest.iter().all(|byte| *byte == 0)
}

/// Which sectors of a write survive a crash.
enum Survivors {
    None,
    All,
    Prefix { count: usize, of: usize },
    Each { bits: Vec<bool> },
}

impl Survivors {
    fn draw(rng: &mut Rng, sectors: usize) -> Self {
        match rng.below(8) {
            0 | 1 => Self::None,
            2 | 3 => Self::All,
            4 | 5 => Self::Prefix { count: rng.between(0, sectors as u64) as usize, of: sectors },
            _ => Self::Each { bits: (0..sectors).map(|_| rng.chance(500_000)).collect() },
        }
    }

    fn holds(&self, sector: usize) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Prefix { count, .. } => sector < *count,
            Self::Each { bits } => bits[sector],
        }
    }

    fn partial(&self) -> bool {
        match self {
            Self::None | Self::All => false,
            Self::Prefix { count, of } => *count > 0 && count < of,
            Self::Each { bits } => bits.contains(&true) && bits.contains(&false),
        }
    }
}

#[cfg(test)]
mod tests;
