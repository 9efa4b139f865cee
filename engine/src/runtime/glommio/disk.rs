//! The log's disk on glommio.
//!
//! An operation becomes a detached task of the core's executor that owns all it needs, and whose completion goes
//! into a queue. glommio's spawn polls a task at once, so that a write has been handed to the ring's queue when
//! [`Disk::submit`] returns. Names are resolved against a descriptor of the directory on glommio's blocking thread,
//! and the file found there is opened a second time through that descriptor: nothing that happens to the name
//! meanwhile can confuse glommio, which looks at the path again after it opened it.
//!
//! **The device is never polled.** The first file that an executor opens on a device decides for good whether
//! glommio sends the device's I/O to its polling ring: it reads from the file there, and when the read succeeds, so
//! be it. On an empty file or a hole that read succeeds without ever asking the device, and from then on real reads
//! fail and the core spins: exactly what a fresh data directory would do. So before anything else is opened, a
//! file is opened for writing only, which that read cannot succeed on. It costs a line in the log at level error
//! ("the poll ring will be disabled for this device: Bad file descriptor"), which is what is wanted.

use super::GlommioBuf;
use crate::runtime::completions::Completions;
use crate::runtime::directory::{self, invalid, whole_blocks};
use crate::runtime::{LocalWakeup, RuntimeError};
use ::glommio::io::{DmaBuffer, DmaFile, OpenOptions};
use ::glommio::{GlommioError, executor, spawn_local};
use ringraft_block::{BLOCK_BYTES, Block, SharedBlock};
use ringraft_wal::disk::{
    Access, Disk, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId,
};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

/// One data directory, driven from the core that made it.
pub struct GlommioDisk {
    shared: Rc<DiskShared>,
}

/// What the disk and its tasks share.
pub(super) struct DiskShared {
    directory: Arc<OwnedFd>,
    completions: Completions<DiskDone<GlommioBuf>>,
    files: RefCell<BTreeMap<FileId, Rc<OpenFile>>>,
    files_opened: Cell<u32>,
    in_flight: Cell<usize>,
    blocking: Rc<Cell<usize>>,
    first_open: FirstOpen,
    /// Who waits for the last operation, when the core ends.
    drained: RefCell<Option<Waker>>,
}

struct OpenFile {
    file: DmaFile,
    bytes: u64,
    access: Access,
}

impl GlommioDisk {
    /// `blocking` counts the operations that are on the blocking thread.
    pub(super) fn open(
        path: &Path,
        local: LocalWakeup,
        blocking: Rc<Cell<usize>>,
    ) -> Result<Self, RuntimeError> {
        let failed = |errno: Errno| RuntimeError::DataDirectory { path: path.into(), source: errno.into() };
        let directory = directory::open(path)?;
        let scratch = open_for_writing_only(&directory).map_err(failed)?;
        let shared = Rc::new(DiskShared {
            directory: Arc::new(directory),
            completions: Completions::new(local),
            files: RefCell::default(),
            files_opened: Cell::new(0),
            in_flight: Cell::new(0),
            blocking,
            first_open: FirstOpen::default(),
            drained: RefCell::default(),
        });
        let opening = Rc::clone(&shared);
        spawn_local(async move { opening.first_open.perform(scratch).await }).detach();
        Ok(Self { shared })
    }

    pub(super) fn shared(&self) -> Rc<DiskShared> {
        Rc::clone(&self.shared)
    }

    /// Starts a task whose outcome completes the operation.
    fn start<F>(&self, id: DiskOpId, operation: impl FnOnce(Rc<DiskShared>) -> F)
    where
        F: Future<Output = Result<DiskOutput<GlommioBuf>, DiskError>> + 'static,
    {
        let shared = &self.shared;
        shared.in_flight.set(shared.in_flight.get() + 1);
        let future = operation(Rc::clone(shared));
        let shared = Rc::clone(shared);
        let task = async move {
            let result = future.await;
            shared.in_flight.set(shared.in_flight.get() - 1);
            shared.complete(id, result);
        };
        spawn_local(task).detach();
    }

    fn file(&self, file: FileId, operation: &'static str) -> Result<Rc<OpenFile>, DiskError> {
        self.shared.files.borrow().get(&file).cloned().ok_or_else(|| invalid(operation))
    }

    fn write(&self, id: DiskOpId, file: FileId, offset: u64, block: SharedBlock<GlommioBuf>, bytes: usize) {
        let checked = self.file(file, "write").and_then(|file| {
            let fits = file.contains(offset, bytes) && bytes <= block.capacity();
            if file.access == Access::Read || !fits || !whole_blocks(offset, bytes) {
                return Err(invalid("write"));
            }
            Ok(file)
        });
        let file = match checked {
            Ok(file) => file,
            Err(error) => return self.shared.complete(id, Err(error)),
        };
        self.start(id, |_| async move {
            let source = Prefix::new(block, bytes);
            let written = file.file.write_rc_at(source.buffer(), offset).await;
            drop(source);
            let bytes = written.map_err(|error| failed("write", &error))?;
            Ok(DiskOutput::Written { bytes })
        });
    }

    fn read(&self, id: DiskOpId, file: FileId, offset: u64, mut block: Block<GlommioBuf>, bytes: usize) {
        let checked = self.file(file, "read").and_then(|file| {
            let fits = bytes <= block.capacity() && whole_blocks(offset, bytes);
            if fits { Ok(file) } else { Err(invalid("read")) }
        });
        let file = match checked {
            Ok(file) => file,
            Err(error) => return self.shared.complete(id, Err(error)),
        };
        self.start(id, |_| async move {
            // glommio reads into buffers of its own. The log reads when it recovers and when a follower is far
            // behind, so one more copy does not matter.
            let read =
                file.file.read_at_aligned(offset, bytes).await.map_err(|error| failed("read", &error))?;
            let bytes = read.len().min(bytes);
            block[..bytes].copy_from_slice(&read[..bytes]);
            Ok(DiskOutput::Read { block, bytes })
        });
    }

    fn create(&self, id: DiskOpId, name: String, bytes: u64, access: Access) {
        if !bytes.is_multiple_of(BLOCK_BYTES as u64) {
            return self.shared.complete(id, Err(invalid("create")));
        }
        self.start(id, |shared| async move {
            let created_name = name.clone();
            let created =
                shared.on_directory("create", move |directory| directory::create(directory, &name, bytes));
            let opened = shared.reopen("create", created.await?, bytes, access).await;
            if opened.is_err() {
                let removed = shared
                    .on_directory("create", move |directory| directory::remove(directory, &created_name));
                let _ = removed.await;
            }
            opened
        });
    }

    fn open_file(&self, id: DiskOpId, name: String, access: Access) {
        self.start(id, |shared| async move {
            let found = shared.on_directory("open", move |directory| directory::find(directory, &name));
            let (file, bytes) = found.await?;
            shared.reopen("open", file, bytes, access).await
        });
    }

    fn close(&self, id: DiskOpId, file: FileId) {
        let removed = self.shared.files.borrow_mut().remove(&file);
        match removed.map(Rc::try_unwrap) {
            Some(Ok(open)) => self.start(id, |_| async move {
                open.file.close().await.map_err(|error| failed("close", &error))?;
                Ok(DiskOutput::Done)
            }),
            Some(Err(in_use)) => {
                self.shared.files.borrow_mut().insert(file, in_use);
                self.shared.complete(id, Err(invalid("close")));
            }
            None => self.shared.complete(id, Err(invalid("close"))),
        }
    }

    fn on_names(
        &self,
        id: DiskOpId,
        operation: &'static str,
        work: impl FnOnce(&OwnedFd) -> Result<(), Errno> + Send + 'static,
    ) {
        self.start(id, |shared| async move {
            shared.on_directory(operation, work).await?;
            Ok(DiskOutput::Done)
        });
    }
}

impl Disk for GlommioDisk {
    type Buf = GlommioBuf;

    fn allocate(&mut self, bytes: usize) -> Result<GlommioBuf, DiskError> {
        GlommioBuf::zeroed(bytes)
    }

    fn submit(&mut self, id: DiskOpId, op: DiskOp<GlommioBuf>) {
        match op {
            DiskOp::List => self.start(id, |shared| async move {
                shared.on_directory("list", directory::list).await.map(DiskOutput::Listed)
            }),
            DiskOp::Create { name, bytes, access } => self.create(id, name, bytes, access),
            DiskOp::Open { name, access } => self.open_file(id, name, access),
            DiskOp::Write { file, offset, block, bytes } => self.write(id, file, offset, block, bytes),
            DiskOp::Read { file, offset, block, bytes } => self.read(id, file, offset, block, bytes),
            DiskOp::Flush { file } => match self.file(file, "flush") {
                Ok(file) => self.start(id, |_| async move {
                    file.file.fdatasync().await.map_err(|error| failed("flush", &error))?;
                    Ok(DiskOutput::Done)
                }),
                Err(error) => self.shared.complete(id, Err(error)),
            },
            DiskOp::Close { file } => self.close(id, file),
            DiskOp::Rename { from, to } => {
                self.on_names(id, "rename", move |directory| directory::rename(directory, &from, &to));
            }
            DiskOp::Remove { name } => {
                self.on_names(id, "remove", move |directory| directory::remove(directory, &name));
            }
            DiskOp::SyncDirectory => {
                self.on_names(id, "sync the directory", |directory| rustix::fs::fsync(directory));
            }
        }
    }

    fn poll(&mut self, done: &mut Vec<DiskDone<GlommioBuf>>) {
        self.shared.completions.take(done);
    }
}

impl DiskShared {
    fn complete(&self, id: DiskOpId, result: Result<DiskOutput<GlommioBuf>, DiskError>) {
        self.completions.push(DiskDone { id, result });
        if let Some(waiting) = self.drained.borrow_mut().take() {
            waiting.wake();
        }
    }

    /// Runs `work` on the blocking thread.
    async fn on_directory<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&OwnedFd) -> Result<T, Errno> + Send + 'static,
    ) -> Result<T, DiskError> {
        let directory = Arc::clone(&self.directory);
        self.blocking.set(self.blocking.get() + 1);
        // A panic on that thread would leave this task waiting for ever.
        let guarded = move || catch_unwind(AssertUnwindSafe(|| work(&directory)));
        let outcome = executor().spawn_blocking(guarded).await;
        self.blocking.set(self.blocking.get() - 1);
        match outcome {
            Ok(result) => result.map_err(|errno| DiskError::from_os(operation, errno.raw_os_error())),
            Err(_) => Err(DiskError { kind: DiskErrorKind::Io, operation, os_error: None }),
        }
    }

    /// Opens the file behind `found` for direct I/O.
    async fn reopen(
        &self,
        operation: &'static str,
        found: OwnedFd,
        bytes: u64,
        access: Access,
    ) -> Result<DiskOutput<GlommioBuf>, DiskError> {
        self.first_open.wait().await;
        let (writes, durable) = match access {
            Access::Read => (false, 0),
            Access::Write => (true, 0),
            Access::DurableWrite => (true, libc::O_DSYNC),
        };
        let mut options = OpenOptions::new();
        options.read(true).write(writes).custom_flags(libc::O_DIRECT | durable);
        let file = open_again(&found, &options).await.map_err(|error| failed(operation, &error))?;
        let id = FileId(self.files_opened.get());
        self.files_opened.set(id.0.checked_add(1).expect("a process opens fewer than 2^32 files"));
        self.files.borrow_mut().insert(id, Rc::new(OpenFile { file, bytes, access }));
        Ok(DiskOutput::Opened { file: id, bytes })
    }

    /// Resolves when the first open is over. An error says that it did not protect the ones to come.
    pub(super) async fn ready(&self) -> Result<(), DiskError> {
        self.first_open.wait().await;
        self.first_open.failure.take().map_or(Ok(()), Err)
    }

    /// Waits for all that is in flight, then closes the files: what a write reads from must stay until the kernel
    /// is done with it, however long the device takes.
    pub(super) async fn shut_down(&self) {
        self.first_open.wait().await;
        poll_fn(|context| {
            if self.in_flight.get() == 0 {
                return Poll::Ready(());
            }
            *self.drained.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
        self.completions.close();
        let files = std::mem::take(&mut *self.files.borrow_mut());
        for open in files.into_values().filter_map(Rc::into_inner) {
            let _ = open.file.close().await;
        }
    }
}

impl OpenFile {
    fn contains(&self, offset: u64, bytes: usize) -> bool {
        offset.checked_add(bytes as u64).is_some_and(|end| end <= self.bytes)
    }
}

/// The write-only open that goes before all others.
#[derive(Default)]
struct FirstOpen {
    done: Cell<bool>,
    failure: Cell<Option<DiskError>>,
    waiting: RefCell<Vec<Waker>>,
}

impl FirstOpen {
    async fn perform(&self, scratch: OwnedFd) {
        match open_again(&scratch, OpenOptions::new().write(true)).await {
            Ok(file) => {
                let _ = file.close().await;
            }
            Err(error) => self.failure.set(Some(failed("open for writing", &error))),
        }
        self.done.set(true);
        self.waiting.take().into_iter().for_each(Waker::wake);
    }

    async fn wait(&self) {
        poll_fn(|context| {
            if self.done.get() {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// A file on the directory's device, opened for writing only. Preferably one without a name and without space, so
/// that a full disk does not prevent a start.
fn open_for_writing_only(directory: &OwnedFd) -> Result<OwnedFd, Errno> {
    let write = OFlags::WRONLY | OFlags::CLOEXEC;
    let owner = Mode::RUSR | Mode::WUSR;
    let nameless = rustix::fs::openat(directory, ".", write | OFlags::TMPFILE, owner);
    let Err(nameless) = nameless else { return nameless };
    for entry in directory::list(directory)? {
        if let Ok(file) = rustix::fs::openat(directory, &entry.name, write | OFlags::NOFOLLOW, Mode::empty())
        {
            return Ok(file);
        }
    }
    if !matches!(nameless, Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) {
        return Err(nameless);
    }
    const NAME: &str = "first-open.tmp";
    let file = rustix::fs::openat(directory, NAME, write | OFlags::CREATE, owner)?;
    rustix::fs::unlinkat(directory, NAME, AtFlags::empty())?;
    Ok(file)
}

/// Opens the file of a descriptor once more, with other options.
async fn open_again(found: &OwnedFd, options: &OpenOptions) -> Result<DmaFile, GlommioError<()>> {
    options.dma_open(directory::again(found)).await
}

fn failed(operation: &'static str, error: &GlommioError<()>) -> DiskError {
    let os_error = match error {
        GlommioError::IoError(source) | GlommioError::EnhancedIoError { source, .. } => source.raw_os_error(),
        _ => None,
    };
    match os_error {
        Some(number) => DiskError::from_os(operation, number),
        None => DiskError { kind: DiskErrorKind::Io, operation, os_error: None },
    }
}

/// The first bytes of a shared block, in the only shape that glommio writes: `Rc<DmaBuffer>`, all of it.
///
/// glommio has no views of a buffer. So this is a second handle to the same memory, shortened, that must never be
/// dropped as a `DmaBuffer`, since the memory belongs to the block. It is forgotten when the write has ended. Should
/// glommio still hold it then, both are leaked: the memory stays valid for as long as anybody may read it.
struct Prefix {
    buffer: ManuallyDrop<Rc<DmaBuffer>>,
    owner: ManuallyDrop<SharedBlock<GlommioBuf>>,
}

impl Prefix {
    fn new(owner: SharedBlock<GlommioBuf>, bytes: usize) -> Self {
        // SAFETY: a bitwise copy of a valid value is valid as long as at most one of the two is dropped and neither
        // is written through while the other is read. The copy is never dropped (see `drop` below), nobody can
        // mutate it (it is behind `Rc`, of which glommio gets clones and nobody else), and the original is
        // shared by `owner` for as long as the copy exists, so it cannot be mutated either.
        let mut buffer = ManuallyDrop::new(unsafe { std::ptr::read(owner.buffer().dma()) });
        buffer.trim_to_size(bytes);
        let buffer = Rc::new(ManuallyDrop::into_inner(buffer));
        Self { buffer: ManuallyDrop::new(buffer), owner: ManuallyDrop::new(owner) }
    }

    fn buffer(&self) -> Rc<DmaBuffer> {
        Rc::clone(&self.buffer)
    }
}

impl Drop for Prefix {
    fn drop(&mut self) {
        // SAFETY: neither field is used again.
        let (buffer, owner) =
            unsafe { (ManuallyDrop::take(&mut self.buffer), ManuallyDrop::take(&mut self.owner)) };
        match Rc::try_unwrap(buffer) {
            Ok(last) => std::mem::forget(last),
            Err(in_use) => {
                std::mem::forget(in_use);
                std::mem::forget(owner);
            }
        }
    }
}
