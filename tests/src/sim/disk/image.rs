//! Copies of a disk at rest, and what a crash may make of it.

use super::file::Inode;
use super::{
    BLOCK_BYTES, BTreeMap, Context, DirectoryOp, DiskConfig, DiskFaults, DiskOp, DiskState, Rc, RefCell, Rng,
    SECTOR_BYTES, apply_directory_op,
};

/// What a power cut may take or leave, one by one.
#[derive(Clone)]
pub enum Pending {
    /// A sector of a write that is in flight or was not flushed.
    Sector {
        /// The file, by its position on the disk.
        inode: usize,
        /// Where in the file.
        offset: u64,
        /// Its content.
        data: Rc<[u8; SECTOR_BYTES]>,
    },
    /// The size of a file that was made and neither flushed nor durably written.
    Size {
        /// The file, by its position on the disk.
        inode: usize,
    },
    /// A change of the directory.
    Name(PendingName),
}

/// A change of the directory that was not synchronised.
#[derive(Clone)]
pub struct PendingName(DirectoryOp);

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sector { inode, offset, .. } => {
                write!(f, "file {inode} sector {}", offset / SECTOR_BYTES as u64)
            }
            Self::Size { inode } => write!(f, "size of file {inode}"),
            Self::Name(PendingName(DirectoryOp::Create { name, .. })) => write!(f, "create {name}"),
            Self::Name(PendingName(DirectoryOp::Rename { from, to, .. })) => {
                write!(f, "rename {from} to {to}")
            }
            Self::Name(PendingName(DirectoryOp::Remove { name, .. })) => write!(f, "remove {name}"),
        }
    }
}

impl DiskState {
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

    /// The same disk once more, between two processes: with its luck, at its time and without its faults. Shares pages.
    ///
    /// # Panics
    /// When a process has operations in flight.
    #[must_use]
    pub fn fork(&self, context: &Rc<Context>) -> Rc<RefCell<Self>> {
        let fork = self.with_config(context, self.rng.clone(), self.config.clone());
        fork.borrow_mut().lanes = self.lanes.clone();
        fork
    }

    /// The same content on a disk of other speed and luck.
    ///
    /// # Panics
    /// When a process has operations in flight.
    #[must_use]
    pub fn with_config(&self, context: &Rc<Context>, rng: Rng, config: DiskConfig) -> Rc<RefCell<Self>> {
        assert!(self.is_idle(), "a disk is copied at rest");
        let copy = Self::new(context, self.node, rng, config);
        {
            let mut state = copy.borrow_mut();
            state.faults = DiskFaults { late_write_ppm: self.faults.late_write_ppm, ..DiskFaults::default() };
            state.inodes.clone_from(&self.inodes);
            state.names.clone_from(&self.names);
            state.durable_names.clone_from(&self.durable_names);
            state.unsynced.clone_from(&self.unsynced);
            state.completed = self.completed;
            state.late.clone_from(&self.late);
        }
        copy
    }

    /// All that a power cut at this moment may take or leave, in the order in which it was asked for.
    #[must_use]
    pub fn pending(&self) -> Vec<Pending> {
        let mut pending = Vec::new();
        let mut sectors = |inode: usize, offset: u64, data: &[u8]| {
            for (position, sector) in data.as_chunks::<SECTOR_BYTES>().0.iter().enumerate() {
                let offset = offset + (position * SECTOR_BYTES) as u64;
                pending.push(Pending::Sector { inode, offset, data: Rc::new(*sector) });
            }
        };
        for (position, inode) in self.inodes.iter().enumerate() {
            for write in inode.iter().flat_map(|inode| &inode.unflushed) {
                sectors(position, write.offset, &write.data);
            }
        }
        let mut in_flight: Vec<_> = self.in_flight.iter().flatten().collect();
        in_flight.sort_by_key(|entry| entry.sequence);
        for entry in &in_flight {
            if let (DiskOp::Write { offset, block, bytes, .. }, Some(inode)) = (&entry.op, entry.inode) {
                sectors(inode, *offset, &block[..*bytes]);
            }
        }
        // Sectors that say what is there already decide nothing.
        pending.retain(|pending| match pending {
            Pending::Sector { inode, offset, data } => {
                let mut present = [0; SECTOR_BYTES];
                let file = self.inodes[*inode].as_ref().expect("a written file has its inode");
                file.read_durable(*offset, &mut present);
                present != **data || !file.unflushed.is_empty()
            }
            _ => true,
        });
        for (position, inode) in self.inodes.iter().enumerate() {
            if inode.as_ref().is_some_and(|inode| inode.durable_bytes < inode.bytes) {
                pending.push(Pending::Size { inode: position });
            }
        }
        let names = self.unsynced.iter().map(|(_, op)| op.clone());
        pending.extend(names.map(|op| Pending::Name(PendingName(op))));
        // Changes of the directory that are in flight may be carried out, too. (Files that are being created are not there
        // yet, and blank in any case.)
        for entry in &in_flight {
            let op = match &entry.op {
                DiskOp::Rename { from, to } => self.names.get(from).map(|inode| DirectoryOp::Rename {
                    from: from.clone(),
                    to: to.clone(),
                    inode: *inode,
                }),
                DiskOp::Remove { name } => self
                    .names
                    .get(name)
                    .map(|inode| DirectoryOp::Remove { name: name.clone(), inode: *inode }),
                _ => None,
            };
            pending.extend(op.map(|op| Pending::Name(PendingName(op))));
        }
        pending
    }

    /// What is left when of `pending` those survive that `survives` picks: a disk at rest, without latency or faults.
    #[must_use]
    pub fn crash_image(
        &self,
        context: &Rc<Context>,
        pending: &[Pending],
        survives: impl Fn(usize) -> bool,
    ) -> Rc<RefCell<Self>> {
        let image = Self::new(context, self.node, Rng::new(0), DiskConfig::instant());
        {
            let mut state = image.borrow_mut();
            let mut names: BTreeMap<String, usize> = self.durable_names.clone();
            state.inodes.clone_from(&self.inodes);
            for inode in state.inodes.iter_mut().flatten() {
                inode.unflushed.clear();
                inode.bytes = inode.durable_bytes;
            }
            for (position, pending) in pending.iter().enumerate() {
                let survives = survives(position);
                match pending {
                    Pending::Size { inode } if survives => {
                        let original = self.inodes[*inode].as_ref().map_or(0, |inode| inode.bytes);
                        let file = state.inode_mut(*inode);
                        (file.bytes, file.durable_bytes) = (original, original);
                    }
                    Pending::Name(PendingName(op)) if survives => {
                        let possible = match op {
                            DirectoryOp::Create { .. } => true,
                            DirectoryOp::Rename { from: name, inode, .. }
                            | DirectoryOp::Remove { name, inode } => names.get(name) == Some(inode),
                        };
                        if possible {
                            apply_directory_op(&mut names, op);
                        }
                    }
                    _ => {}
                }
            }
            for (position, pending) in pending.iter().enumerate() {
                if let Pending::Sector { inode, offset, data } = pending
                    && survives(position)
                {
                    let file = state.inode_mut(*inode);
                    if *offset < file.bytes {
                        file.write_durable(*offset, &data[..]);
                    }
                }
            }
            for inode in state.inodes.iter_mut().flatten() {
                inode.pages.truncate((inode.bytes / BLOCK_BYTES as u64) as usize);
            }
            state.durable_names.clone_from(&names);
            state.names = names;
            state.forget_unreachable();
        }
        image
    }

    /// What a file holds, as a process would read it; `None` for a file that is not there.
    #[must_use]
    pub fn content(&self, name: &str) -> Option<Vec<u8>> {
        let inode = self.inodes[*self.names.get(name)?].as_ref()?;
        let mut content = vec![0; inode.bytes as usize];
        inode.read(0, &mut content);
        Some(content)
    }

    /// Whether the device can read all of a range of a file.
    #[must_use]
    pub fn can_read(&self, name: &str, offset: u64, bytes: usize) -> bool {
        let inode = self.names.get(name).and_then(|inode| self.inodes[*inode].as_ref());
        inode.is_some_and(|inode| inode.is_readable(offset, bytes))
    }

    /// Whether nothing is in flight and nothing waits to be polled.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.done.is_empty()
    }

    /// Operations of the present process that were submitted so far.
    #[must_use]
    pub fn submitted(&self) -> u64 {
        self.submitted
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
}
