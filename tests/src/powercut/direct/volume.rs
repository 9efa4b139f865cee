//! A file system with volatile caches, whose power can be cut and which can be told to fail, for the whole of it or for
//! one directory, as if each directory at the top were a disk of its own.
//!
//! - A write is in the cache when it completes, a durable one (O_DSYNC) on the disk: it alone, not what was written
//!   before it. A flush of a file makes its writes and its size durable.
//! - Names are made, changed and removed in the cache; a flush of their directory makes that durable.
//! - What the cache holds when the power goes survives in part: of each write any subset of its sectors, of a file that
//!   has grown any part, of the changes of names any, as long as the name that one needs is there.
//! - When the power goes, operations are not refused but unanswered: a machine without power reports nothing. Writes
//!   that come then count as under way at that moment, so that all that are in flight are torn together.
//! - After a failed write some of its sectors are there. After a failed flush, the cached writes of the file may be gone.

use crate::powercut::disk::{Effect, Luck, On, SECTOR_BYTES, Stats, Survival, Survived, Trigger};
use crate::powercut::image::{Image, pieces};
use crate::sim::rng::Rng;
use std::collections::{BTreeMap, BTreeSet};

/// The number of the directory that everything is in.
pub const ROOT: u64 = 1;

/// Why the volume refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeError {
    /// EIO.
    Io,
    /// ENOSPC.
    Full,
    /// It does not even refuse: there is never an answer.
    Hung,
    /// ENOENT.
    NotFound,
    /// EEXIST.
    Exists,
    /// EINVAL: what this volume does not do.
    Invalid,
}

/// What there is under a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A file of so many bytes.
    File(u64),
}

/// The volume.
#[derive(Debug)]
pub struct FaultVolume {
    nodes: BTreeMap<u64, Node>,
    next: u64,
    /// Changes of names that no flush has covered, in order.
    unsynced: Vec<NameChange>,
    /// Each for the directory at the top that it names, or for all.
    triggers: Vec<(Option<String>, Trigger)>,
    everywhere: Mode,
    modes: BTreeMap<String, Mode>,
    /// Directories at the top in which a write or flush has failed.
    failed: BTreeSet<String>,
    powered: bool,
    rng: Rng,
    stats: Stats,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Good,
    /// Nothing can be made and no file can grow.
    Full,
    /// Nothing is ever answered.
    Hung,
    /// Durable writes and flushes are acknowledged, and stay in the cache.
    Lying,
}

#[derive(Debug)]
struct Node {
    /// The directory at the top that it is in or is.
    top: String,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Directory(Names),
    File(File),
}

#[derive(Debug, Default)]
struct Names {
    current: BTreeMap<String, u64>,
    durable: BTreeMap<String, u64>,
}

#[derive(Debug, Default)]
struct File {
    durable: Image,
    /// The size that is durable; the image of that name is as large as the file has ever been.
    durable_bytes: u64,
    /// What reads see.
    current: Image,
    /// Completed writes since the last flush, in order.
    cached: Vec<CachedWrite>,
}

#[derive(Debug)]
struct CachedWrite {
    offset: u64,
    data: Vec<u8>,
    /// All of it survives: it stands among the others for the order.
    is_durable: bool,
}

#[derive(Debug)]
struct NameChange {
    directory: u64,
    what: What,
}

#[derive(Clone, Debug)]
enum What {
    Make { name: String, node: u64 },
    Rename { from: String, to: String, node: u64 },
    Remove { name: String, node: u64 },
}

impl What {
    /// Whether it can be done to names of which an earlier change may be missing.
    fn is_possible(&self, names: &BTreeMap<String, u64>) -> bool {
        match self {
            Self::Make { .. } => true,
            Self::Rename { from: name, node, .. } | Self::Remove { name, node } => {
                names.get(name) == Some(node)
            }
        }
    }

    fn apply(&self, names: &mut BTreeMap<String, u64>) {
        match self {
            Self::Make { name, node } => {
                names.insert(name.clone(), *node);
            }
            Self::Rename { from, to, node } => {
                names.remove(from);
                names.insert(to.clone(), *node);
            }
            Self::Remove { name, .. } => {
                names.remove(name);
            }
        }
    }
}

impl Default for FaultVolume {
    fn default() -> Self {
        Self::new()
    }
}

impl FaultVolume {
    /// An empty volume that is on.
    #[must_use]
    pub fn new() -> Self {
        let root = Node { top: String::new(), content: Content::Directory(Names::default()) };
        Self {
            nodes: BTreeMap::from([(ROOT, root)]),
            next: ROOT + 1,
            unsynced: Vec::new(),
            triggers: Vec::new(),
            everywhere: Mode::Good,
            modes: BTreeMap::new(),
            failed: BTreeSet::new(),
            powered: true,
            rng: Rng::new(0),
            stats: Stats::default(),
        }
    }

    /// Removes everything, and forgets all faults.
    pub fn reset(&mut self) {
        // The kernel may still know numbers of what was there.
        let (next, cuts) = (self.next, self.stats.cuts);
        *self = Self::new();
        self.next = next;
        self.stats.cuts = cuts;
    }

    /// How often the power has gone. Who opened a file before the last time is not connected to it any more.
    #[must_use]
    pub fn cuts(&self) -> u64 {
        self.stats.cuts
    }

    /// Whether the power is on.
    #[must_use]
    pub fn is_powered(&self) -> bool {
        self.powered
    }

    /// Figures.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats { powered: self.powered, ..self.stats }
    }

    /// Adds a fault to come: in the directory `under` at the top, or anywhere.
    pub fn arm(&mut self, under: Option<String>, trigger: Trigger) {
        self.triggers.push((under, trigger));
    }

    /// Lets it happen now, in the directory `under` at the top or everywhere. A cut is always everywhere.
    pub fn strike(&mut self, under: Option<&str>, effect: Effect) {
        let mode = match under {
            Some(top) => self.modes.entry(top.to_owned()).or_default(),
            None => &mut self.everywhere,
        };
        match effect {
            Effect::Cut => {
                self.stats.cuts += u64::from(self.powered);
                self.powered = false;
            }
            Effect::Error => {}
            Effect::Full => *mode = Mode::Full,
            Effect::Free if *mode == Mode::Full => *mode = Mode::Good,
            Effect::Free => {}
            Effect::Hang => *mode = Mode::Hung,
            Effect::Lie => *mode = Mode::Lying,
        }
    }

    // Names.

    /// What there is under a number.
    ///
    /// # Errors
    /// When it is gone.
    pub fn kind(&self, node: u64) -> Result<Kind, VolumeError> {
        match &self.node(node)?.content {
            Content::Directory(_) => Ok(Kind::Directory),
            Content::File(file) => Ok(Kind::File(file.current.bytes())),
        }
    }

    /// The number behind a name.
    ///
    /// # Errors
    /// When there is none.
    pub fn look_up(&self, directory: u64, name: &str) -> Result<u64, VolumeError> {
        self.names(directory)?.get(name).copied().ok_or(VolumeError::NotFound)
    }

    /// What is in a directory.
    ///
    /// # Errors
    /// When it is none.
    pub fn list(&self, directory: u64) -> Result<Vec<(String, u64, Kind)>, VolumeError> {
        let names = self.names(directory)?;
        names.iter().map(|(name, node)| Ok((name.clone(), *node, self.kind(*node)?))).collect()
    }

    /// Makes an empty file or directory.
    ///
    /// # Errors
    /// When the name is taken, and by the faults.
    pub fn make(&mut self, directory: u64, name: &str, is_directory: bool) -> Result<u64, VolumeError> {
        if self.names(directory)?.contains_key(name) {
            return Err(VolumeError::Exists);
        }
        let above = &self.node(directory)?.top;
        let top = if directory == ROOT { name.to_owned() } else { above.clone() };
        self.answers(&top)?;
        if self.mode(&top) == Mode::Full {
            self.stats.refused += 1;
            return Err(VolumeError::Full);
        }
        let content = match is_directory {
            true => Content::Directory(Names::default()),
            false => Content::File(File::default()),
        };
        let node = self.next;
        self.next += 1;
        self.nodes.insert(node, Node { top, content });
        self.change(directory, What::Make { name: name.to_owned(), node })?;
        Ok(node)
    }

    /// Renames within a directory, replacing what has the new name.
    ///
    /// # Errors
    /// When there is nothing of that name, and by the faults.
    pub fn rename(&mut self, directory: u64, from: &str, to: &str) -> Result<(), VolumeError> {
        let node = self.look_up(directory, from)?;
        self.answers(&self.node(node)?.top)?;
        self.change(directory, What::Rename { from: from.to_owned(), to: to.to_owned(), node })
    }

    /// Removes a name. Whoever has the file open keeps it.
    ///
    /// # Errors
    /// When there is nothing of that name, and by the faults.
    pub fn remove(&mut self, directory: u64, name: &str) -> Result<(), VolumeError> {
        let node = self.look_up(directory, name)?;
        self.answers(&self.node(node)?.top)?;
        self.change(directory, What::Remove { name: name.to_owned(), node })
    }

    /// Makes all changes of names in a directory durable.
    ///
    /// # Errors
    /// By the faults.
    pub fn flush_names(&mut self, directory: u64) -> Result<(), VolumeError> {
        let top = self.node(directory)?.top.clone();
        self.count(On::Flush, &top)?;
        self.stats.flushes += 1;
        if self.mode(&top) == Mode::Lying {
            self.stats.lies += 1;
            return Ok(());
        }
        let (of_it, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.unsynced).into_iter().partition(|change| change.directory == directory);
        self.unsynced = others;
        let names = self.names_mut(directory)?;
        of_it.iter().for_each(|change| change.what.apply(&mut names.durable));
        Ok(())
    }

    fn change(&mut self, directory: u64, what: What) -> Result<(), VolumeError> {
        what.apply(&mut self.names_mut(directory)?.current);
        self.unsynced.push(NameChange { directory, what });
        Ok(())
    }

    // Contents.

    /// Makes a file at least `bytes` long.
    ///
    /// # Errors
    /// When it is none, and by the faults.
    pub fn grow(&mut self, node: u64, bytes: u64) -> Result<(), VolumeError> {
        let top = self.node(node)?.top.clone();
        self.answers(&top)?;
        let is_full = self.mode(&top) == Mode::Full;
        let file = self.file_mut(node)?;
        if bytes > file.current.bytes() {
            if is_full {
                self.stats.refused += 1;
                return Err(VolumeError::Full);
            }
            file.current.grow(bytes);
        }
        Ok(())
    }

    /// Reads up to `len` bytes, fewer at the end.
    ///
    /// # Errors
    /// By the faults.
    pub fn read(&mut self, node: u64, offset: u64, len: usize) -> Result<Vec<u8>, VolumeError> {
        let top = self.node(node)?.top.clone();
        self.count(On::Read, &top)?;
        let file = self.file_mut(node)?;
        let len = file.current.bytes().saturating_sub(offset).min(len as u64);
        let mut bytes = vec![0; len as usize];
        file.current.read(offset, &mut bytes);
        Ok(bytes)
    }

    /// Writes into the cache, or durably.
    ///
    /// # Errors
    /// By the faults.
    pub fn write(
        &mut self,
        node: u64,
        offset: u64,
        data: &[u8],
        is_durable: bool,
    ) -> Result<(), VolumeError> {
        let top = self.node(node)?.top.clone();
        let outcome = self.count(On::Write, &top);
        let powered = self.powered;
        let mode = self.mode(&top);
        let torn = Luck::new(self.rng.bits(), Survival::Random).sectors(sectors(offset, data).count());
        let end = offset.checked_add(data.len() as u64).ok_or(VolumeError::Invalid)?;
        let file = self.file_mut(node)?;
        match outcome {
            // It is under way.
            Err(VolumeError::Hung) if !powered => {
                file.cached.push(CachedWrite { offset, data: data.to_vec(), is_durable: false });
            }
            Err(VolumeError::Io) if end <= file.current.bytes() => {
                for (range, _) in sectors(offset, data).zip(torn).filter(|(_, written)| *written) {
                    let data = data[range.clone()].to_vec();
                    file.write(offset + range.start as u64, data, false);
                }
            }
            _ => {}
        }
        outcome?;
        if end > file.current.bytes() {
            if mode == Mode::Full {
                self.stats.refused += 1;
                return Err(VolumeError::Full);
            }
            file.current.grow(end);
        }
        file.write(offset, data.to_vec(), is_durable && mode != Mode::Lying);
        self.stats.writes += 1;
        self.stats.write_bytes += data.len() as u64;
        self.stats.lies += u64::from(is_durable && mode == Mode::Lying);
        Ok(())
    }

    /// Makes all writes to a file that have completed durable, and its size.
    ///
    /// # Errors
    /// By the faults.
    pub fn flush(&mut self, node: u64) -> Result<(), VolumeError> {
        let top = self.node(node)?.top.clone();
        let outcome = self.count(On::Flush, &top);
        let forgets = outcome == Err(VolumeError::Io) && self.rng.chance(500_000);
        let mode = self.mode(&top);
        if forgets {
            self.file_mut(node)?.forget();
        }
        outcome?;
        self.stats.flushes += 1;
        if mode == Mode::Lying {
            self.stats.lies += 1;
            return Ok(());
        }
        self.file_mut(node)?.flush();
        Ok(())
    }

    // Faults.

    fn mode(&self, top: &str) -> Mode {
        match self.everywhere {
            Mode::Good => self.modes.get(top).copied().unwrap_or_default(),
            mode => mode,
        }
    }

    /// Whether an operation that no trigger counts may go on.
    fn answers(&self, top: &str) -> Result<(), VolumeError> {
        match self.mode(top) {
            Mode::Hung => Err(VolumeError::Io),
            Mode::Good | Mode::Full | Mode::Lying => Ok(()),
        }
    }

    /// Lets triggers count an operation; whether it may go on.
    fn count(&mut self, operation: On, top: &str) -> Result<(), VolumeError> {
        let cached: u64 = self.nodes.values().map(Node::cached).sum();
        let mut struck = Vec::new();
        self.triggers.retain_mut(|(under, trigger)| {
            if !trigger.on.counts(operation) || under.as_deref().is_some_and(|under| under != top) {
                return true;
            }
            if trigger.after == 0 && cached >= trigger.cached_min {
                struck.push((under.take(), trigger.effect));
                return false;
            }
            trigger.after = trigger.after.saturating_sub(1);
            true
        });
        self.stats.triggered += struck.len() as u64;
        self.stats.after_error += u64::from(self.failed.contains(top) && operation != On::Read);
        for (under, effect) in &struck {
            self.strike(under.as_deref(), *effect);
        }
        if !self.powered || self.mode(top) == Mode::Hung {
            self.stats.refused += u64::from(self.powered);
            return Err(VolumeError::Hung);
        }
        if struck.iter().any(|(_, effect)| *effect == Effect::Error) {
            self.stats.refused += 1;
            if operation != On::Read {
                self.failed.insert(top.to_owned());
            }
            return Err(VolumeError::Io);
        }
        Ok(())
    }

    /// Cuts the power if it is on, and puts it on again, without any fault: of the cache that survives which `seed`
    /// and `survival` let.
    pub fn power_on(&mut self, seed: u64, survival: Survival) -> Survived {
        self.strike(None, Effect::Cut);
        let mut luck = Luck::new(seed, survival);
        let mut rng = Rng::new(seed).fork(1);
        for NameChange { directory, what } in std::mem::take(&mut self.unsynced) {
            let survives = survival == Survival::Random && rng.chance(500_000);
            if let Ok(names) = self.names_mut(directory)
                && survives
                && what.is_possible(&names.durable)
            {
                what.apply(&mut names.durable);
            }
        }
        let mut survived = Survived::default();
        for node in self.nodes.values_mut() {
            match &mut node.content {
                Content::Directory(names) => names.current.clone_from(&names.durable),
                Content::File(file) => file.lose_power(survival, &mut rng, &mut luck, &mut survived),
            }
        }
        self.forget_what_has_no_name();
        self.triggers.clear();
        self.modes.clear();
        self.everywhere = Mode::Good;
        self.failed.clear();
        self.powered = true;
        self.rng = rng;
        survived
    }

    fn forget_what_has_no_name(&mut self) {
        let (mut found, mut next) = (BTreeSet::from([ROOT]), vec![ROOT]);
        while let Some(node) = next.pop() {
            if let Some(Node { content: Content::Directory(names), .. }) = self.nodes.get(&node) {
                next.extend(names.durable.values().copied().filter(|node| found.insert(*node)));
            }
        }
        self.nodes.retain(|node, _| found.contains(node));
    }

    // Nodes.

    fn node(&self, node: u64) -> Result<&Node, VolumeError> {
        self.nodes.get(&node).ok_or(VolumeError::NotFound)
    }

    fn names(&self, directory: u64) -> Result<&BTreeMap<String, u64>, VolumeError> {
        match &self.node(directory)?.content {
            Content::Directory(names) => Ok(&names.current),
            Content::File(_) => Err(VolumeError::Invalid),
        }
    }

    fn names_mut(&mut self, directory: u64) -> Result<&mut Names, VolumeError> {
        match self.nodes.get_mut(&directory).map(|node| &mut node.content) {
            Some(Content::Directory(names)) => Ok(names),
            Some(Content::File(_)) => Err(VolumeError::Invalid),
            None => Err(VolumeError::NotFound),
        }
    }

    fn file_mut(&mut self, node: u64) -> Result<&mut File, VolumeError> {
        match self.nodes.get_mut(&node).map(|node| &mut node.content) {
            Some(Content::File(file)) => Ok(file),
            Some(Content::Directory(_)) => Err(VolumeError::Invalid),
            None => Err(VolumeError::NotFound),
        }
    }
}

impl Node {
    /// Writes that may be lost.
    fn cached(&self) -> u64 {
        match &self.content {
            Content::Directory(_) => 0,
            Content::File(file) => file.cached.iter().filter(|write| !write.is_durable).count() as u64,
        }
    }
}

impl File {
    fn write(&mut self, offset: u64, data: Vec<u8>, is_durable: bool) {
        self.current.write(offset, &data);
        self.cached.push(CachedWrite { offset, data, is_durable });
        if is_durable {
            self.durable_bytes = self.current.bytes();
        }
        if self.cached.iter().all(|write| write.is_durable) {
            self.flush();
        }
    }

    fn flush(&mut self) {
        self.durable_bytes = self.current.bytes();
        self.durable.grow(self.durable_bytes);
        for write in self.cached.drain(..) {
            self.durable.write(write.offset, &write.data);
        }
    }

    /// Drops what is not durable, and keeps the size.
    fn forget(&mut self) {
        self.cached.retain(|write| write.is_durable);
        let bytes = self.current.bytes();
        self.durable.grow(bytes);
        self.current = self.durable.clone();
        for write in &self.cached {
            self.current.write(write.offset, &write.data);
        }
    }

    fn lose_power(&mut self, survival: Survival, rng: &mut Rng, luck: &mut Luck, survived: &mut Survived) {
        let bytes = match (survival, rng.below(3)) {
            (Survival::None, _) | (_, 0) => self.durable_bytes,
            (_, 1) => rng.between(self.durable_bytes, self.current.bytes()),
            _ => self.current.bytes(),
        };
        self.durable.grow(self.current.bytes());
        for CachedWrite { offset, data, is_durable } in std::mem::take(&mut self.cached) {
            let sectors: Vec<_> = sectors(offset, &data).collect();
            let kept = if is_durable { vec![true; sectors.len()] } else { luck.sectors(sectors.len()) };
            for (range, _) in sectors.into_iter().zip(&kept).filter(|(_, kept)| **kept) {
                let at = offset + range.start as u64;
                // A write that was under way may have been about to make the file grow.
                if self.durable.contains(at, range.len()) {
                    self.durable.write(at, &data[range]);
                }
            }
            match kept.iter().filter(|kept| **kept).count() {
                _ if is_durable => {}
                0 => survived.lost += 1,
                count if count == kept.len() => survived.kept += 1,
                _ => survived.torn += 1,
            }
        }
        self.durable.cut_off(bytes);
        self.durable_bytes = bytes;
        self.current = self.durable.clone();
    }
}

/// The parts of `data`, to be written at `offset`, that are written whole or not at all.
fn sectors(offset: u64, data: &[u8]) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut done = 0;
    pieces(offset, data.len(), SECTOR_BYTES).map(move |(_, _, len)| {
        done += len;
        done - len..done
    })
}

#[cfg(test)]
mod tests;
