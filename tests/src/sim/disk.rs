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
//! On request it does wrong what disks do wrong ([`DiskFaults`], [`DiskState::damage`]): operations fail, stop short, run out
//! of space or stall, writes are lost or go elsewhere, content rots. Nothing is drawn at random for a fault that is off.
//!
//! Content is kept in pages of 4 KiB, shared copy-on-write with images taken of the disk; pages of zeros are not
//! kept at all.

mod crash;
mod faults;
mod file;
mod image;

pub use crash::Crash;
pub use faults::{DiskFaults, Fault, On, Rot, Scheduled};
pub use image::{Pending, PendingName};

pub(in crate::sim) use faults::name_of_kind;

use super::buffer::SimBuf;
use super::context::{Context, MICROSECOND, Time};
use super::coverage::Mark;
use super::rng::Rng;
use super::trace::What;
use crash::Late;
use faults::Astray;
use file::Inode;
use ringraft_block::{BLOCK_BYTES, SECTOR_BYTES};
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
    op: DiskOp<SimBuf>,
    /// The inode of `op`'s file, where it names an open one.
    inode: Option<usize>,
    /// Of a flush or a directory sync: what had completed when it was submitted.
    covers: u64,
    fault: Option<Fault>,
    sequence: u64,
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
    /// The last write behind the first page of a file that was not of zeros.
    last_write: Option<(usize, u64)>,
    astray: Vec<Astray>,
    /// Operations that a fault has struck.
    struck: u64,
    first_struck: Option<String>,

    /// Of the present process. File ids are positions in `files`, and not used again.
    life: u32,
    files: Vec<Option<OpenFile>>,
    in_flight: Vec<Option<InFlight>>,
    vacant: Vec<u32>,
    queue: BinaryHeap<Reverse<(Time, u64, u32)>>,
    lanes: BinaryHeap<Reverse<Time>>,
    submitted: u64,
    last_done_sequence: u64,
    done: Vec<(u8, DiskDone<SimBuf>)>,
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
    type Buf = SimBuf;

    fn allocate(&mut self, bytes: usize) -> Result<SimBuf, DiskError> {
        Ok(SimBuf::take(bytes))
    }

    fn submit(&mut self, id: DiskOpId, op: DiskOp<SimBuf>) {
        let mut state = self.state.borrow_mut();
        assert_eq!(state.life, self.life, "a dead process submits nothing");
        state.submit(id, op);
    }

    fn poll(&mut self, done: &mut Vec<DiskDone<SimBuf>>) {
        let mut state = self.state.borrow_mut();
        assert_eq!(state.life, self.life, "a dead process polls nothing");
        state.poll(done);
    }
}

const KINDS: [&str; 10] =
    ["list", "create", "open", "write", "read", "flush", "close", "rename", "remove", "sync directory"];

fn kind_of(op: &DiskOp<SimBuf>) -> u8 {
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

fn bytes_of(op: &DiskOp<SimBuf>) -> usize {
    match op {
        DiskOp::Write { bytes, .. } | DiskOp::Read { bytes, .. } => *bytes,
        DiskOp::Create { bytes, .. } => *bytes as usize,
        _ => 0,
    }
}

fn file_of(op: &DiskOp<SimBuf>) -> Option<FileId> {
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
            last_write: None,
            astray: Vec::new(),
            struck: 0,
            first_struck: None,
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

    /// The names and sizes that a process sees.
    #[must_use]
    pub fn listing(&self) -> Vec<DirectoryEntry> {
        let entry = |(name, inode): (&String, &usize)| DirectoryEntry {
            name: name.clone(),
            bytes: self.inodes[*inode].as_ref().map_or(0, |inode| inode.bytes),
        };
        self.names.iter().map(entry).collect()
    }

    fn submit(&mut self, id: DiskOpId, op: DiskOp<SimBuf>) {
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
        if let (DiskOp::Write { offset, block, .. }, Some(inode)) = (&op, inode)
            && *offset >= BLOCK_BYTES as u64
            && block.iter().take(8).any(|byte| *byte != 0)
        {
            self.last_write = Some((inode, *offset));
        }
        let fault = self.fault_of(&op);

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
        let mut due = lane_free.max(self.context.now()) + latency;
        self.lanes.push(Reverse(due));
        if let Some(Fault::Stall(time)) = fault {
            due += time;
        }

        self.submitted += 1;
        let sequence = self.submitted;
        let entry = InFlight { id, op, inode, covers: self.completed, fault, sequence };
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

    fn describe(&self, op: &DiskOp<SimBuf>) -> String {
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

    fn poll(&mut self, done: &mut Vec<DiskDone<SimBuf>>) {
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
            let result = self.carry_out(entry);
            self.done.push((kind, DiskDone { id, result }));
        }
    }

    fn carry_out(&mut self, entry: InFlight) -> Result<DiskOutput<SimBuf>, DiskError> {
        let InFlight { mut op, mut inode, covers, fault, .. } = entry;
        let is_of_batch = (fault.is_some() || !self.astray.is_empty()) && self.is_of_batch(&op);
        let (mut short, mut astray) = (None, None);
        match fault {
            Some(Fault::Io) => return Err(self.fail(op, inode, covers, DiskErrorKind::Io)),
            Some(Fault::NoSpace) => return Err(self.fail(op, inode, covers, DiskErrorKind::NoSpace)),
            Some(Fault::Short) => short = Some(self.cut_short(bytes_of(&op))),
            Some(Fault::Lost) => return Ok(DiskOutput::Written { bytes: bytes_of(&op) }),
            Some(Fault::Misdirected) => {
                if let (
                    DiskOp::Write { offset, bytes, .. } | DiskOp::Read { offset, bytes, .. },
                    Some(inode),
                ) = (&mut op, &mut inode)
                {
                    let place = (*inode, *offset);
                    (*inode, *offset) = self.elsewhere(*inode, *offset, *bytes, is_of_batch);
                    astray = Some(place).filter(|place| is_of_batch && *place != (*inode, *offset));
                }
            }
            Some(Fault::Stall(_)) | None => {}
        }
        if short.is_none()
            && let DiskOp::Write { bytes, .. } = &op
            && *bytes > BLOCK_BYTES
            && self.rng.chance(self.faults.short_write_ppm)
        {
            short = Some(self.cut_short(*bytes));
            self.context.cover(Mark::DiskFault);
        }
        match (&mut op, short) {
            (DiskOp::Write { .. }, Some(0)) => return Ok(DiskOutput::Written { bytes: 0 }),
            (DiskOp::Write { bytes, .. } | DiskOp::Read { bytes, .. }, Some(short)) => *bytes = short,
            _ => {}
        }
        if is_of_batch {
            self.batch_written(astray);
        }
        self.act(op, inode, covers)
    }

    /// Does what was asked.
    fn act(
        &mut self,
        op: DiskOp<SimBuf>,
        inode: Option<usize>,
        covers: u64,
    ) -> Result<DiskOutput<SimBuf>, DiskError> {
        let kind = kind_of(&op);
        let open_inode = inode.ok_or(error(DiskErrorKind::InvalidInput, kind));
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
                let file = Inode { bytes, ..Inode::default() };
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
                self.completed += 1;
                let sequence = self.completed;
                let target = self.inode_mut(inode);
                let data = &block[..bytes];
                if access == Access::DurableWrite {
                    target.supersede(offset, bytes);
                    target.write_durable(offset, data);
                    target.durable_bytes = target.bytes;
                } else if !target.is_zero(offset, data) {
                    target.write_unflushed(sequence, offset, data.to_vec());
                }
                Ok(DiskOutput::Written { bytes })
            }
            DiskOp::Read { offset, mut block, bytes, .. } => {
                let inode = open_inode?;
                let size = self.inode_mut(inode).bytes;
                let aligned = offset % BLOCK_BYTES as u64 == 0 && bytes % BLOCK_BYTES == 0;
                if !aligned || bytes > block.len() {
                    return Err(error(DiskErrorKind::InvalidInput, kind));
                }
                let available = size.saturating_sub(offset).min(bytes as u64) as usize;
                let file = self.inode_mut(inode);
                if !file.is_readable(offset, available) {
                    return Err(error(DiskErrorKind::Io, kind));
                }
                let content_bytes = file.content_bytes(offset, available);
                block.buffer_mut().read_into(available, content_bytes, |content| file.read(offset, content));
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

    fn opened(&mut self, inode: usize, access: Access) -> DiskOutput<SimBuf> {
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
        let mut reached = vec![false; self.inodes.len()];
        let named = self.names.values().chain(self.durable_names.values()).copied();
        let open = self.files.iter().flatten().map(|file| file.inode);
        let unsynced = self.unsynced.iter().map(|(_, op)| op.inode());
        let late = self.late.iter().map(|late| late.inode);
        named.chain(open).chain(unsynced).chain(late).for_each(|inode| reached[inode] = true);
        for (inode, _) in self.inodes.iter_mut().zip(reached).filter(|(_, reached)| !reached) {
            *inode = None;
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

#[cfg(test)]
mod tests;
