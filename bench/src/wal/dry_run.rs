//! A start of the log on which nothing happens: the engine's own recovery over a disk that reads the directory and only
//! notes what would be changed.

use anyhow::Context as _;
use ringraft_block::{AlignedBuf, Pool};
use ringraft_wal::disk::{
    Access, DirectoryEntry, Disk, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId,
};
use ringraft_wal::format::{BatchInfo, HardState, IMAGE_BYTES_MIN, LogStart};
use ringraft_wal::{Recovered, Wal, WalConfig, WalError, WalEvent};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Turns after which a start that has not ended is taken for a defect.
const TURNS_MAX: usize = 100_000_000;

/// What a start would find and do.
pub(super) struct DryRun {
    /// What it would find, or why it would refuse.
    pub(super) outcome: Result<Recovered, WalError>,
    /// What it would change, in order.
    pub(super) changes: Vec<String>,
    /// The batches of the log.
    pub(super) batches: Vec<BatchInfo>,
    pub(super) start: LogStart,
    pub(super) end: LogStart,
    /// The epoch that it would open.
    pub(super) epoch: u64,
}

impl DryRun {
    /// Whether a file that had been listed was not there any more.
    pub(super) fn has_lost_a_file(&self) -> bool {
        let error = match &self.outcome {
            Err(WalError::Disk { error, .. }) => error,
            _ => return false,
        };
        error.kind == DiskErrorKind::NotFound
    }
}

/// Lets the engine's recovery look at `dir` as the node that `identity` names.
pub(super) fn dry_run(
    dir: &Path,
    identity: &HardState,
    segment_bytes: Option<u64>,
) -> anyhow::Result<DryRun> {
    let mut config = WalConfig::new(identity.cluster, identity.node, 0);
    config.group = identity.group;
    if let Some(segment_bytes) = segment_bytes {
        // The limits only have to agree with each other: recovery reads what is there.
        config.segment_bytes = segment_bytes;
        while config.validate().is_err() && config.batch_bytes_max > IMAGE_BYTES_MIN {
            config.batch_bytes_max = (config.batch_bytes_max / 2).max(IMAGE_BYTES_MIN);
        }
        if config.validate().is_err() {
            config =
                WalConfig { group: identity.group, ..WalConfig::new(identity.cluster, identity.node, 0) };
        }
    }
    let mut disk = ReadOnly::new(dir);
    let mut wal = Wal::open(config, Pool::new(0));
    let (mut done, mut events) = (Vec::new(), VecDeque::new());
    let mut outcome = None;
    for _ in 0..TURNS_MAX {
        wal.advance(&mut disk, &mut events);
        disk.poll(&mut done);
        let idle = done.is_empty() && events.is_empty();
        for completion in done.drain(..) {
            wal.handle(&mut disk, completion, &mut events);
        }
        for event in events.drain(..) {
            match event {
                WalEvent::Opened(recovered) => outcome = outcome.or(Some(Ok(recovered))),
                WalEvent::Poisoned(error) => outcome = outcome.or(Some(Err(error))),
                _ => {}
            }
        }
        if outcome.is_some() || idle {
            break;
        }
    }
    let outcome = outcome.context("recovery did not come to an end; this is a defect")?;
    Ok(DryRun {
        outcome,
        changes: disk.changes,
        batches: wal.batches().collect(),
        start: wal.log_start(),
        end: wal.log_end(),
        epoch: wal.epoch(),
    })
}

/// The directory, read; changes are noted and not made.
struct ReadOnly {
    dir: PathBuf,
    files: HashMap<FileId, Open>,
    next: u32,
    done: Vec<DiskDone<AlignedBuf>>,
    changes: Vec<String>,
}

enum Open {
    Real(File),
    /// Would have been made; holds nothing, since nothing that is made by a start is read by it.
    Imagined,
}

impl ReadOnly {
    fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), files: HashMap::new(), next: 0, done: Vec::new(), changes: Vec::new() }
    }

    fn list(&self) -> Result<DiskOutput<AlignedBuf>, DiskError> {
        let failed = |error| io_error("list", &error);
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // A file of a live node may be gone by now.
            let Ok(metadata) = entry.metadata() else { continue };
            if let Ok(name) = entry.file_name().into_string()
                && metadata.is_file()
            {
                entries.push(DirectoryEntry { name, bytes: metadata.len() });
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(DiskOutput::Listed(entries))
    }

    fn add(&mut self, open: Open, bytes: u64) -> DiskOutput<AlignedBuf> {
        let file = FileId(self.next);
        self.next += 1;
        self.files.insert(file, open);
        DiskOutput::Opened { file, bytes }
    }

    fn run(&mut self, op: DiskOp<AlignedBuf>) -> Result<DiskOutput<AlignedBuf>, DiskError> {
        match op {
            DiskOp::List => self.list(),
            DiskOp::Open { name, access } => {
                let file = open_direct(&self.dir.join(&name)).map_err(|error| io_error("open", &error))?;
                let bytes = file.metadata().map_err(|error| io_error("open", &error))?.len();
                let open = if access == Access::DurableWrite { Open::Imagined } else { Open::Real(file) };
                Ok(self.add(open, bytes))
            }
            DiskOp::Create { name, bytes, .. } => {
                self.changes.push(format!("make {name}"));
                Ok(self.add(Open::Imagined, bytes))
            }
            DiskOp::Write { bytes, .. } => Ok(DiskOutput::Written { bytes }),
            DiskOp::Read { file, offset, mut block, bytes } => match self.files.get(&file) {
                Some(Open::Real(file)) => {
                    let got = read_up_to(file, offset, &mut block[..bytes])
                        .map_err(|error| io_error("read", &error))?;
                    Ok(DiskOutput::Read { block, bytes: got })
                }
                _ => Ok(DiskOutput::Read { block, bytes: 0 }),
            },
            DiskOp::Close { file } => {
                self.files.remove(&file);
                Ok(DiskOutput::Done)
            }
            DiskOp::Rename { from, to } => {
                self.changes.push(format!("rename {from} to {to}"));
                Ok(DiskOutput::Done)
            }
            DiskOp::Remove { name } => {
                self.changes.push(format!("remove {name}"));
                Ok(DiskOutput::Done)
            }
            DiskOp::Flush { .. } | DiskOp::SyncDirectory => Ok(DiskOutput::Done),
        }
    }
}

impl Disk for ReadOnly {
    type Buf = AlignedBuf;

    fn allocate(&mut self, bytes: usize) -> Result<AlignedBuf, DiskError> {
        Ok(AlignedBuf::zeroed(bytes))
    }

    fn submit(&mut self, id: DiskOpId, op: DiskOp<AlignedBuf>) {
        let result = self.run(op);
        self.done.push(DiskDone { id, result });
    }

    fn poll(&mut self, done: &mut Vec<DiskDone<AlignedBuf>>) {
        done.append(&mut self.done);
    }
}

/// Opens for reading past the page cache, so that what is read is what the device holds; through the cache where the
/// file system does not do that.
pub(super) fn open_direct(path: &Path) -> std::io::Result<File> {
    let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(path);
    match direct {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => File::open(path),
        other => other,
    }
}

/// Reads until `buffer` is full or the file ends.
pub(super) fn read_up_to(file: &File, offset: u64, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read_at(&mut buffer[got..], offset + got as u64) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

fn io_error(operation: &'static str, error: &std::io::Error) -> DiskError {
    match error.raw_os_error() {
        Some(number) => DiskError::from_os(operation, number),
        None => DiskError { kind: DiskErrorKind::Io, operation, os_error: None },
    }
}
