//! What a backend of the disk and link seams promises, and the traps of glommio 0.9 with their cures. Every backend runs all
//! of it: see [`suite`].
//!
//! `disk_conformance` and `link_conformance` are scripts: futures that submit an operation and await its completion, polled by a
//! [`Turn`].

use ringraft::runtime::{
    self, IdlePolicy, IoUringRefusal, LinkOptions, LocalFuture, LocalWakeup, Now, RuntimeError, Turn,
    TurnOutcome, Wakeup,
};
use ringraft_block::{BLOCK_BYTES, Block, BlockBuf, Pool, SharedBlock};
use ringraft_net::link::{
    ConnectionId, Link, LinkDone, LinkError, LinkErrorKind, LinkOp, LinkOpId, LinkOutput, ListenerId,
    RecvInto, SendPart,
};
use ringraft_wal::disk::{
    Access, Disk, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId,
};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::pin::Pin;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

// ---- Backends -----------------------------------------------------------------------------------------------------

/// How a core is set up, on any backend.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) core: Option<usize>,
    pub(crate) idle: IdlePolicy,
    pub(crate) name: String,
    /// As little memory, and as few entries in rings, as there can be.
    pub(crate) tight: bool,
}

impl Default for Setup {
    /// A core that sleeps whenever it can: one that looks for work instead hides what would not have woken it.
    fn default() -> Self {
        Self { core: None, idle: IdlePolicy::Park, name: String::new(), tight: false }
    }
}

/// What is tested.
pub(crate) trait Backend: 'static {
    type Disk: Disk;
    type Link: Link<Buf = <Self::Disk as Disk>::Buf>;
    type Context: Clone + 'static;

    fn run<T: Turn, E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        setup: Setup,
        wakeup: Arc<Wakeup>,
        make: impl FnOnce(&Self::Context) -> Result<T, E>,
    ) -> Result<(), RuntimeError>;
    fn disk(core: &Self::Context, directory: &Path) -> Result<Self::Disk, RuntimeError>;
    fn link(core: &Self::Context, options: LinkOptions) -> Self::Link;
    fn spawn_local(core: &Self::Context, future: LocalFuture);
    fn local_wakeup(core: &Self::Context) -> LocalWakeup;

    /// What it would lock by default.
    const LOCKED_BYTES_WANTED: u64;
    /// What it says when the kernel knows io_uring, and not all of what it is asked for.
    const TOO_OLD: IoUringRefusal;
    /// Looks at what came of a start where 64 KiB may be locked.
    fn check_little_locked_memory(told: Result<(), RuntimeError>);
}

/// All tests, for a [`Backend`]. A program has one suite, at its root.
macro_rules! suite {
    ($backend:ty) => {
        suite! { $backend:
            the_disk_does_what_the_seam_promises
            the_disk_does_what_the_seam_promises_when_the_registered_memory_is_used_up
            files_are_opened_for_direct_io_and_durable_ones_for_durable_writes
            an_empty_file_opened_first_does_not_turn_the_device_into_a_polled_one
            allocated_but_unwritten_files_opened_first_do_not_turn_the_device_into_a_polled_one
            a_core_that_stops_awaits_its_writes_and_closes_its_files
            a_missing_data_directory_is_told
            the_link_does_what_the_seam_promises
            the_link_does_what_the_seam_promises_with_small_socket_buffers_and_a_spinning_core
            connections_are_set_up_for_low_latency_and_dead_peers
            a_signal_from_another_thread_wakes_a_core_under_each_idle_policy
            a_turn_that_leaves_nothing_to_do_is_the_last_one_before_the_core_parks
            an_adaptive_core_looks_for_work_after_work_and_then_sleeps
            the_deadline_is_kept_under_each_idle_policy
            a_core_with_a_deadline_in_the_past_runs_on_and_still_does_its_io
            a_core_that_always_has_more_to_do_still_does_its_io
            a_hundred_thousand_signals_from_each_of_four_threads_overflow_nothing
            no_completion_is_overlooked_while_other_threads_signal
            users_futures_run_on_the_core_wake_it_and_end_with_it
            a_users_future_that_never_rests_does_not_keep_completions_away_for_ever
            a_panic_in_a_turn_is_told_after_the_writes_in_flight_have_ended
            what_cannot_be_made_is_told
            a_wakeup_serves_one_core_only
            a_core_runs_where_it_is_told_to_and_one_that_does_not_exist_is_refused
            a_refused_io_uring_is_told_by_its_cause
            too_little_locked_memory_is_told_with_what_is_wanted
            running_out_of_descriptors_is_told_and_leaves_the_listener_usable
            sending_to_a_peer_that_is_gone_does_not_end_a_program_that_does_not_ignore_sigpipe
            a_core_that_ends_leaves_no_descriptor_behind
            in_a_child_process
        }
    };
    ($backend:ty: $($test:ident)*) => {
        $(
            #[test]
            fn $test() {
                runtime::$test::<$backend>();
            }
        )*
    };
}

// ---- Scripts ------------------------------------------------------------------------------------------------------

/// A disk and a link, for scripts.
struct Io<D: Disk, L: Link<Buf = D::Buf>> {
    inner: Rc<RefCell<IoInner<D, L>>>,
}

struct IoInner<D: Disk, L: Link<Buf = D::Buf>> {
    disk: D,
    link: L,
    pool: Pool<D::Buf>,
    next_id: u64,
    submitted: bool,
    disk_done: HashMap<u64, Result<DiskOutput<D::Buf>, DiskError>>,
    link_done: HashMap<u64, Result<LinkOutput<D::Buf>, LinkError>>,
    /// The ids of links' completions in the order of their arrival.
    link_order: Vec<u64>,
}

impl<D: Disk, L: Link<Buf = D::Buf>> Clone for Io<D, L> {
    fn clone(&self) -> Self {
        Self { inner: Rc::clone(&self.inner) }
    }
}

impl<D: Disk, L: Link<Buf = D::Buf>> Io<D, L> {
    fn new(disk: D, link: L) -> Self {
        let inner = IoInner {
            disk,
            link,
            pool: Pool::new(64 << 20),
            next_id: 0,
            submitted: false,
            disk_done: HashMap::new(),
            link_done: HashMap::new(),
            link_order: Vec::new(),
        };
        Self { inner: Rc::new(RefCell::new(inner)) }
    }

    fn next_id(&self) -> u64 {
        let mut inner = self.inner.borrow_mut();
        inner.submitted = true;
        inner.next_id += 1;
        inner.next_id
    }

    fn block(&self, bytes: usize, fill: u8) -> Block<D::Buf> {
        let mut inner = self.inner.borrow_mut();
        let IoInner { disk, pool, .. } = &mut *inner;
        let mut block = pool.take(bytes, |bytes| disk.allocate(bytes)).unwrap();
        block.fill(fill);
        block
    }

    fn start_disk(&self, op: DiskOp<D::Buf>) -> u64 {
        let id = self.next_id();
        self.inner.borrow_mut().disk.submit(DiskOpId(id), op);
        id
    }

    async fn disk_end(&self, id: u64) -> Result<DiskOutput<D::Buf>, DiskError> {
        poll_fn(|_| match self.inner.borrow_mut().disk_done.remove(&id) {
            Some(result) => Poll::Ready(result),
            None => Poll::Pending,
        })
        .await
    }

    async fn disk(&self, op: DiskOp<D::Buf>) -> Result<DiskOutput<D::Buf>, DiskError> {
        let id = self.start_disk(op);
        self.disk_end(id).await
    }

    async fn disk_kind(&self, op: DiskOp<D::Buf>) -> DiskErrorKind {
        match self.disk(op).await {
            Ok(_) => panic!("an operation that must fail"),
            Err(error) => error.kind,
        }
    }

    async fn open(&self, op: DiskOp<D::Buf>) -> (FileId, u64) {
        match self.disk(op).await.unwrap() {
            DiskOutput::Opened { file, bytes } => (file, bytes),
            _ => panic!("another output"),
        }
    }

    async fn create(&self, name: &str, bytes: u64, access: Access) -> FileId {
        let (file, size) = self.open(DiskOp::Create { name: name.into(), bytes, access }).await;
        assert_eq!(size, bytes);
        file
    }

    async fn write(&self, file: FileId, offset: u64, block: &SharedBlock<D::Buf>, bytes: usize) {
        let op = DiskOp::Write { file, offset, block: block.clone(), bytes };
        match self.disk(op).await.unwrap() {
            DiskOutput::Written { bytes: written } => assert_eq!(written, bytes),
            _ => panic!("another output"),
        }
    }

    async fn read(&self, file: FileId, offset: u64, bytes: usize) -> Vec<u8> {
        let block = self.block(bytes, 0xee);
        match self.disk(DiskOp::Read { file, offset, block, bytes }).await.unwrap() {
            DiskOutput::Read { block, bytes } => block[..bytes].to_vec(),
            _ => panic!("another output"),
        }
    }

    async fn done(&self, op: DiskOp<D::Buf>) {
        let output = self.disk(op).await.unwrap();
        assert!(matches!(output, DiskOutput::Done));
    }

    async fn names(&self) -> Vec<(String, u64)> {
        match self.disk(DiskOp::List).await.unwrap() {
            DiskOutput::Listed(entries) => {
                entries.into_iter().map(|entry| (entry.name, entry.bytes)).collect()
            }
            _ => panic!("another output"),
        }
    }

    fn start_link(&self, op: LinkOp<D::Buf>) -> u64 {
        let id = self.next_id();
        self.inner.borrow_mut().link.submit(LinkOpId(id), op);
        id
    }

    async fn link_end(&self, id: u64) -> Result<LinkOutput<D::Buf>, LinkError> {
        poll_fn(|_| match self.inner.borrow_mut().link_done.remove(&id) {
            Some(result) => Poll::Ready(result),
            None => Poll::Pending,
        })
        .await
    }

    async fn link(&self, op: LinkOp<D::Buf>) -> Result<LinkOutput<D::Buf>, LinkError> {
        let id = self.start_link(op);
        self.link_end(id).await
    }

    async fn link_kind(&self, op: LinkOp<D::Buf>) -> LinkErrorKind {
        match self.link(op).await {
            Ok(_) => panic!("an operation that must fail"),
            Err(error) => error.kind,
        }
    }

    async fn listen(&self, address: SocketAddr) -> (ListenerId, SocketAddr) {
        match self.link(LinkOp::Listen { address }).await.unwrap() {
            LinkOutput::Listening { listener, address } => (listener, address),
            _ => panic!("another output"),
        }
    }

    async fn accept_end(&self, accept: u64) -> (ConnectionId, SocketAddr) {
        match self.link_end(accept).await.unwrap() {
            LinkOutput::Accepted { connection, remote } => (connection, remote),
            _ => panic!("another output"),
        }
    }

    async fn dial(&self, address: SocketAddr) -> ConnectionId {
        match self.link(LinkOp::Dial { address }).await.unwrap() {
            LinkOutput::Dialed { connection } => connection,
            _ => panic!("another output"),
        }
    }

    /// A connection to itself: the dialing end, the accepting end.
    async fn connection(&self) -> (ConnectionId, ConnectionId) {
        let (listener, address) = self.listen(LOOPBACK).await;
        let accept = self.start_link(LinkOp::Accept { listener });
        let dialed = self.dial(address).await;
        (dialed, self.accept_end(accept).await.0)
    }

    async fn recv_end(&self, recv: u64) -> Vec<u8> {
        match self.link_end(recv).await.unwrap() {
            LinkOutput::Received { into: RecvInto::Bytes { bytes, range }, bytes: count } => {
                bytes[range][..count].to_vec()
            }
            LinkOutput::Received { into: RecvInto::Block { block, range }, bytes: count } => {
                block[range][..count].to_vec()
            }
            _ => panic!("another output"),
        }
    }

    async fn recv(&self, connection: ConnectionId, bytes: usize) -> Vec<u8> {
        let recv = self.start_link(LinkOp::Recv { connection, into: bytes_of(bytes) });
        self.recv_end(recv).await
    }

    async fn send(&self, connection: ConnectionId, bytes: &[u8]) {
        let parts = vec![SendPart::Bytes(bytes.to_vec())];
        self.link(LinkOp::Send { connection, parts }).await.unwrap();
    }

    async fn close(&self, connection: ConnectionId) {
        let output = self.link(LinkOp::Close { connection }).await.unwrap();
        assert!(matches!(output, LinkOutput::Closed));
    }
}

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

fn bytes_of<B: BlockBuf>(bytes: usize) -> RecvInto<B> {
    RecvInto::Bytes { bytes: vec![0; bytes].into(), range: 0..bytes }
}

/// Runs one script over one disk and one link.
struct ScriptTurn<D: Disk, L: Link<Buf = D::Buf>> {
    io: Io<D, L>,
    script: Pin<Box<dyn Future<Output = ()>>>,
    disk_done: Vec<DiskDone<D::Buf>>,
    link_done: Vec<LinkDone<D::Buf>>,
}

impl<D: Disk, L: Link<Buf = D::Buf>> ScriptTurn<D, L> {
    fn new<F>(disk: D, link: L, script: impl FnOnce(Io<D, L>) -> F) -> Self
    where
        F: Future<Output = ()> + 'static,
    {
        let io = Io::new(disk, link);
        let script = Box::pin(script(io.clone()));
        Self { io, script, disk_done: Vec::new(), link_done: Vec::new() }
    }
}

impl<D: Disk, L: Link<Buf = D::Buf>> Turn for ScriptTurn<D, L> {
    fn turn(&mut self, _: Now) -> TurnOutcome {
        {
            let mut inner = self.io.inner.borrow_mut();
            inner.disk.poll(&mut self.disk_done);
            inner.link.poll(&mut self.link_done);
            inner.submitted = !self.disk_done.is_empty() || !self.link_done.is_empty();
            for done in self.disk_done.drain(..) {
                let twice = inner.disk_done.insert(done.id.0, done.result);
                assert!(twice.is_none(), "an operation completes once");
            }
            for done in self.link_done.drain(..) {
                inner.link_order.push(done.id.0);
                let twice = inner.link_done.insert(done.id.0, done.result);
                assert!(twice.is_none(), "an operation completes once");
            }
        }
        let ended = self.script.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready();
        let inner = self.io.inner.borrow();
        let progressed = inner.submitted;
        TurnOutcome { worked: progressed, more: false, next_deadline_ns: u64::MAX, stop: ended }
    }
}

type BackendIo<B> = Io<<B as Backend>::Disk, <B as Backend>::Link>;

fn on<B: Backend, F: Future<Output = ()> + 'static>(
    directory: &Path,
    script: impl FnOnce(BackendIo<B>) -> F,
) {
    with_options::<B, F>(directory, Setup::default(), LinkOptions::default(), script).unwrap();
}

fn with_options<B: Backend, F: Future<Output = ()> + 'static>(
    directory: &Path,
    options: Setup,
    link: LinkOptions,
    script: impl FnOnce(BackendIo<B>) -> F,
) -> Result<(), RuntimeError> {
    B::run(options, Arc::new(Wakeup::new()), |core| {
        Ok::<_, RuntimeError>(ScriptTurn::new(B::disk(core, directory)?, B::link(core, link), script))
    })
}

/// A directory on a real disk: `/tmp` may be memory.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

// ---- Disk ---------------------------------------------------------------------------------------------------------

async fn disk_conformance<D: Disk, L: Link<Buf = D::Buf>>(io: Io<D, L>) {
    const BLOCK: u64 = BLOCK_BYTES as u64;
    assert_eq!(io.names().await, []);

    // Creation, and what a new file holds.
    let a = io.create("a", 16 * BLOCK, Access::DurableWrite).await;
    assert_eq!(io.names().await, [("a".to_owned(), 16 * BLOCK)]);
    assert!(io.read(a, 0, 16 * BLOCK_BYTES).await.iter().all(|byte| *byte == 0));
    let again = DiskOp::Create { name: "a".into(), bytes: BLOCK, access: Access::Read };
    assert_eq!(io.disk_kind(again).await, DiskErrorKind::AlreadyExists);
    let uneven = DiskOp::Create { name: "uneven".into(), bytes: 100, access: Access::Write };
    assert_eq!(io.disk_kind(uneven).await, DiskErrorKind::InvalidInput);
    for name in ["", ".", "..", "a/b", "/tmp/x", "nul\0"] {
        let create = DiskOp::Create { name: name.into(), bytes: BLOCK, access: Access::Write };
        assert_eq!(io.disk_kind(create).await, DiskErrorKind::InvalidInput, "{name:?}");
        let open = DiskOp::Open { name: name.into(), access: Access::Read };
        assert_eq!(io.disk_kind(open).await, DiskErrorKind::InvalidInput, "{name:?}");
        let remove = DiskOp::Remove { name: name.into() };
        assert_eq!(io.disk_kind(remove).await, DiskErrorKind::InvalidInput, "{name:?}");
    }
    let missing = DiskOp::Open { name: "missing".into(), access: Access::Read };
    assert_eq!(io.disk_kind(missing).await, DiskErrorKind::NotFound);

    // The first bytes of a block are written, no more.
    let block = io.block(4 * BLOCK_BYTES, 0x11).share();
    io.write(a, BLOCK, &block, 3 * BLOCK_BYTES).await;
    assert_eq!(block.holders(), 1, "an operation lets go of its block");
    let read = io.read(a, 0, 5 * BLOCK_BYTES).await;
    assert!(read[..BLOCK_BYTES].iter().all(|byte| *byte == 0));
    assert!(read[BLOCK_BYTES..4 * BLOCK_BYTES].iter().all(|byte| *byte == 0x11));
    assert!(read[4 * BLOCK_BYTES..].iter().all(|byte| *byte == 0));
    let mut block = block.try_into_block().expect("nobody else shares it");
    assert!(block.iter().all(|byte| *byte == 0x11), "a written block is whole");
    block.fill(0x22);
    assert!(block.iter().all(|byte| *byte == 0x22), "and can be filled again");

    // One block can be written to two places at the same time.
    let b = io.create("b", 4 * BLOCK, Access::Write).await;
    let block = block.share();
    let both = [(a, 8 * BLOCK), (b, 0)].map(|(file, offset)| {
        let op = DiskOp::Write { file, offset, block: block.clone(), bytes: 4 * BLOCK_BYTES };
        io.start_disk(op)
    });
    for write in both {
        let output = io.disk_end(write).await.unwrap();
        assert!(matches!(output, DiskOutput::Written { bytes } if bytes == 4 * BLOCK_BYTES));
    }
    io.done(DiskOp::Flush { file: b }).await;
    assert_eq!(io.read(a, 8 * BLOCK, 4 * BLOCK_BYTES).await, block[..]);
    assert_eq!(io.read(b, 0, 4 * BLOCK_BYTES).await, block[..]);

    // Reads end at the end of the file.
    assert_eq!(io.read(b, 3 * BLOCK, 4 * BLOCK_BYTES).await.len(), BLOCK_BYTES);
    assert_eq!(io.read(b, 4 * BLOCK, BLOCK_BYTES).await.len(), 0);
    assert_eq!(io.read(b, 100 * BLOCK, BLOCK_BYTES).await.len(), 0);

    // What breaks the rules is refused, and nothing is written by it.
    let (reader, bytes) = io.open(DiskOp::Open { name: "b".into(), access: Access::Read }).await;
    assert_eq!(bytes, 4 * BLOCK);
    let write = |file, offset, bytes| DiskOp::Write { file, offset, block: block.clone(), bytes };
    for (what, op) in [
        ("beyond the end", write(b, 4 * BLOCK, BLOCK_BYTES)),
        ("over the end", write(b, 3 * BLOCK, 2 * BLOCK_BYTES)),
        ("at the end of the range", write(b, u64::MAX - BLOCK + 1, BLOCK_BYTES)),
        ("an uneven offset", write(b, 512, BLOCK_BYTES)),
        ("an uneven length", write(b, 0, 512)),
        ("nothing", write(b, 0, 0)),
        ("more than the block", write(a, 0, 5 * BLOCK_BYTES)),
        ("to a file opened for reading", write(reader, 0, BLOCK_BYTES)),
        ("to no file", write(FileId(u32::MAX), 0, BLOCK_BYTES)),
        ("flush of no file", DiskOp::Flush { file: FileId(u32::MAX) }),
        ("close of no file", DiskOp::Close { file: FileId(u32::MAX) }),
        ("uneven read", DiskOp::Read { file: b, offset: 0, block: io.block(4096, 0), bytes: 100 }),
        ("too large a read", DiskOp::Read { file: b, offset: 0, block: io.block(4096, 0), bytes: 8192 }),
    ] {
        assert_eq!(io.disk_kind(op).await, DiskErrorKind::InvalidInput, "{what}");
    }
    assert_eq!(io.read(reader, 0, 4 * BLOCK_BYTES).await, block[..]);

    // Many in flight, of all sizes; each completes once and lands where it belongs.
    let c = io.create("c", 1024 * BLOCK, Access::DurableWrite).await;
    let mut offset = 0;
    let mut writes = Vec::new();
    for number in 0..128usize {
        let blocks = 1 + number % 13;
        let block = io.block(blocks * BLOCK_BYTES, number as u8 + 1).share();
        let bytes = blocks * BLOCK_BYTES;
        writes.push((
            io.start_disk(DiskOp::Write { file: c, offset, block, bytes }),
            offset,
            bytes,
            number as u8 + 1,
        ));
        offset += bytes as u64;
    }
    for (write, _, bytes, _) in &writes {
        let output = io.disk_end(*write).await.unwrap();
        assert!(matches!(output, DiskOutput::Written { bytes: written } if written == *bytes));
    }
    for (_, offset, bytes, fill) in &writes {
        assert!(io.read(c, *offset, *bytes).await.iter().all(|byte| byte == fill));
    }

    // Names.
    io.done(DiskOp::Rename { from: "c".into(), to: "b".into() }).await;
    io.done(DiskOp::SyncDirectory).await;
    assert_eq!(io.names().await, [("a".to_owned(), 16 * BLOCK), ("b".to_owned(), 1024 * BLOCK)]);
    assert_eq!(io.read(reader, 0, 4 * BLOCK_BYTES).await, block[..], "an open file outlives its name");
    let rename = DiskOp::Rename { from: "missing".into(), to: "d".into() };
    assert_eq!(io.disk_kind(rename).await, DiskErrorKind::NotFound);
    io.done(DiskOp::Remove { name: "b".into() }).await;
    assert_eq!(io.disk_kind(DiskOp::Remove { name: "b".into() }).await, DiskErrorKind::NotFound);
    io.done(DiskOp::SyncDirectory).await;
    assert_eq!(io.names().await, [("a".to_owned(), 16 * BLOCK)]);

    // Closing.
    for file in [a, b, c, reader] {
        io.done(DiskOp::Close { file }).await;
        assert_eq!(io.disk_kind(DiskOp::Close { file }).await, DiskErrorKind::InvalidInput);
        assert_eq!(io.disk_kind(write(file, 0, BLOCK_BYTES)).await, DiskErrorKind::InvalidInput);
    }
    let (a, bytes) = io.open(DiskOp::Open { name: "a".into(), access: Access::Write }).await;
    assert_eq!(bytes, 16 * BLOCK);
    assert_eq!(io.read(a, 8 * BLOCK, 4 * BLOCK_BYTES).await, block[..]);

    // Memory.
    let allocate = |bytes| io.inner.borrow_mut().disk.allocate(bytes).map(|buffer| buffer.bytes().len());
    assert_eq!(allocate(3 * BLOCK_BYTES), Ok(3 * BLOCK_BYTES));
    for bytes in [0, 1, BLOCK_BYTES + 1] {
        assert_eq!(allocate(bytes).unwrap_err().kind, DiskErrorKind::InvalidInput);
    }
    assert_eq!(allocate(1 << 62).unwrap_err().kind, DiskErrorKind::OutOfMemory);
}

pub(crate) fn the_disk_does_what_the_seam_promises<B: Backend>() {
    for idle in POLICIES {
        let (directory, options) = (directory(), Setup { idle, ..Default::default() });
        with_options::<B, _>(directory.path(), options, LinkOptions::default(), disk_conformance).unwrap();
    }
}

pub(crate) fn the_disk_does_what_the_seam_promises_when_the_registered_memory_is_used_up<B: Backend>() {
    let directory = directory();
    let options = Setup { tight: true, ..Default::default() };
    with_options::<B, _>(directory.path(), options, LinkOptions::default(), disk_conformance).unwrap();
}

pub(crate) fn files_are_opened_for_direct_io_and_durable_ones_for_durable_writes<B: Backend>() {
    let directory = directory();
    let path = directory.path().to_path_buf();
    let inside = path.clone();
    on::<B, _>(directory.path(), |io| async move {
        let path = inside;
        for (name, access, wanted) in [
            ("read", Access::Read, libc::O_RDONLY | libc::O_DIRECT),
            ("write", Access::Write, libc::O_RDWR | libc::O_DIRECT),
            ("durable", Access::DurableWrite, libc::O_RDWR | libc::O_DIRECT | libc::O_DSYNC),
        ] {
            let created = io.create(name, 4096, access).await;
            assert_eq!(descriptor_flags(&path.join(name)), [wanted], "{name}, created");
            io.done(DiskOp::Close { file: created }).await;
            assert_eq!(descriptor_flags(&path.join(name)), [0; 0], "{name}, closed");
            io.open(DiskOp::Open { name: name.into(), access }).await;
            assert_eq!(descriptor_flags(&path.join(name)), [wanted], "{name}, opened");
        }
    });
    for name in ["read", "write", "durable"] {
        assert_eq!(descriptor_flags(&path.join(name)), [0; 0], "{name}, after the end");
    }
}

/// The flags of all descriptors of this process that refer to `path`.
fn descriptor_flags(path: &Path) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        if std::fs::read_link(entry.path()).is_ok_and(|target| target == path) {
            let info = Path::new("/proc/self/fdinfo").join(entry.file_name());
            let info = std::fs::read_to_string(info).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
            // O_SYNC is O_DSYNC and a bit of its own, which makes every write wait for its time stamps too.
            found.push(flags & (libc::O_ACCMODE | libc::O_DIRECT | libc::O_SYNC));
        }
    }
    found
}

/// glommio asks a device whether it can be polled by a read from the first file that an executor opens there. On
/// an empty file that read succeeds, and all later I/O goes to the polling ring: reads fail with EOPNOTSUPP,
/// while the core spins. A node that starts in a fresh directory does exactly this.
pub(crate) fn an_empty_file_opened_first_does_not_turn_the_device_into_a_polled_one<B: Backend>() {
    for access in [Access::Read, Access::Write, Access::DurableWrite] {
        let directory = directory();
        on::<B, _>(directory.path(), move |io| async move {
            io.create("empty", 0, access).await;
            let file = io.create("log", 1 << 20, Access::DurableWrite).await;
            let block = io.block(8192, 0x5a).share();
            io.write(file, 4096, &block, 8192).await;
            assert_eq!(io.read(file, 4096, 8192).await, block[..]);
        });
    }
}

pub(crate) fn allocated_but_unwritten_files_opened_first_do_not_turn_the_device_into_a_polled_one<
    B: Backend,
>() {
    let directory = directory();
    let log = std::fs::File::create_new(directory.path().join("log")).unwrap();
    rustix::fs::fallocate(&log, rustix::fs::FallocateFlags::empty(), 0, 1 << 20).unwrap();
    on::<B, _>(directory.path(), |io| async move {
        let (file, bytes) = io.open(DiskOp::Open { name: "log".into(), access: Access::DurableWrite }).await;
        assert_eq!(bytes, 1 << 20);
        let block = io.block(4096, 0x5a).share();
        io.write(file, 4096, &block, 4096).await;
        assert_eq!(io.read(file, 4096, 4096).await, block[..]);
    });
}

pub(crate) fn a_core_that_stops_awaits_its_writes_and_closes_its_files<B: Backend>() {
    let directory = directory();
    let path = directory.path().join("log");
    on::<B, _>(directory.path(), |io| async move {
        let file = io.create("log", 64 << 20, Access::DurableWrite).await;
        for number in 0..64 {
            let block = io.block(1 << 20, 0x77).share();
            io.start_disk(DiskOp::Write { file, offset: number << 20, block, bytes: 1 << 20 });
        }
    });
    assert_eq!(descriptor_flags(&path), [0; 0]);
    let content = std::fs::read(&path).unwrap();
    assert!(content.len() == 64 << 20 && content.iter().all(|byte| *byte == 0x77));
}

pub(crate) fn a_missing_data_directory_is_told<B: Backend>() {
    let missing = directory().path().join("missing");
    let told = with_options::<B, _>(&missing, Setup::default(), LinkOptions::default(), |_| async {});
    let Err(RuntimeError::Make(error)) = told else { panic!("{told:?}") };
    assert!(error.to_string().contains("cannot use the data directory"), "{error}");
}

// ---- Link ---------------------------------------------------------------------------------------------------------

async fn link_conformance<D: Disk, L: Link<Buf = D::Buf>>(io: Io<D, L>) {
    // An accept that waits, and connections that wait for an accept.
    let (listener, address) = io.listen(LOOPBACK).await;
    assert_ne!(address.port(), 0);
    let accept = io.start_link(LinkOp::Accept { listener });
    assert_eq!(io.link_kind(LinkOp::Accept { listener }).await, LinkErrorKind::Other, "one accept at a time");
    let left = io.dial(address).await;
    let (right, remote) = io.accept_end(accept).await;
    assert_eq!(remote.ip(), address.ip());
    let others = [io.dial(address).await, io.dial(address).await];
    for other in others {
        let accept = io.start_link(LinkOp::Accept { listener });
        let (accepted, _) = io.accept_end(accept).await;
        io.close(other).await;
        assert_eq!(io.recv(accepted, 10).await, [0; 0], "the orderly end");
        io.close(accepted).await;
    }

    // A receive that waits, a receive of what is there, parts of them.
    let recv = io.start_link(LinkOp::Recv { connection: right, into: bytes_of(100) });
    let into = bytes_of(1);
    assert_eq!(io.link_kind(LinkOp::Recv { connection: right, into }).await, LinkErrorKind::Other);
    io.send(left, b"hello").await;
    assert_eq!(io.recv_end(recv).await, b"hello");
    io.send(left, b"0123456789").await;
    assert_eq!(io.recv(right, 4).await, b"0123");
    let into = RecvInto::Block { block: io.block(4096, 0xee), range: 512..600 };
    match io.link(LinkOp::Recv { connection: right, into }).await.unwrap() {
        LinkOutput::Received { into: RecvInto::Block { block, .. }, bytes: 6 } => {
            assert_eq!(&block[510..520], b"\xee\xee456789\xee\xee");
        }
        _ => panic!("another output"),
    }
    io.send(right, b"back").await;
    assert_eq!(io.recv(left, 100).await, b"back");
    let block = SendPart::Block { block: io.block(4096, 0).share(), range: 0..0 };
    let parts = vec![block, SendPart::Bytes(Vec::with_capacity(100))];
    assert!(
        matches!(
            &io.link(LinkOp::Send { connection: left, parts }).await.unwrap(),
            LinkOutput::Sent { parts } if matches!(&parts[..], [SendPart::Bytes(bytes)] if bytes.capacity() >= 100)
        ),
        "memory comes back, blocks do not"
    );

    // What breaks the rules.
    for into in [bytes_of(0), RecvInto::Block { block: io.block(4096, 0), range: 4000..5000 }] {
        assert_eq!(io.link_kind(LinkOp::Recv { connection: right, into }).await, LinkErrorKind::Other);
    }
    let beyond = SendPart::Block { block: io.block(4096, 0).share(), range: 4000..5000 };
    let send = LinkOp::Send { connection: right, parts: vec![beyond] };
    assert_eq!(io.link_kind(send).await, LinkErrorKind::Other);
    let unknown = ConnectionId(u64::MAX);
    assert_eq!(io.link_kind(LinkOp::Close { connection: unknown }).await, LinkErrorKind::Other);
    let into = bytes_of(1);
    assert_eq!(io.link_kind(LinkOp::Recv { connection: unknown, into }).await, LinkErrorKind::Other);
    assert_eq!(io.link_kind(LinkOp::Accept { listener: ListenerId(u64::MAX) }).await, LinkErrorKind::Other);

    // Much, in both directions at the same time, more than any socket buffer takes.
    let ways = [(left, right), (right, left)];
    let mut sends = ways.map(|(from, _)| (io.start_link(send_of(&io, from, 0)), 0usize));
    let mut recvs = ways.map(|(_, to)| (start_recv(&io, to, 0), 0usize));
    while recvs.iter().any(|(_, received)| *received < STREAM_BYTES) {
        for (index, (from, to)) in ways.into_iter().enumerate() {
            let (recv, received) = &mut recvs[index];
            if *received < STREAM_BYTES {
                let bytes = io.recv_end(*recv).await;
                assert!(!bytes.is_empty());
                for (at, byte) in bytes.iter().enumerate() {
                    assert_eq!(*byte, pattern(*received + at), "at {}", *received + at);
                }
                *received += bytes.len();
                if *received < STREAM_BYTES {
                    *recv = start_recv(&io, to, *received);
                }
            }
            let (send, sent) = &mut sends[index];
            let ended = io.inner.borrow_mut().link_done.remove(send);
            if let Some(ended) = ended {
                assert!(matches!(ended.unwrap(), LinkOutput::Sent { .. }));
                *sent += MESSAGE_BYTES;
                if *sent < STREAM_BYTES {
                    *send = io.start_link(send_of(&io, from, *sent));
                }
            }
        }
    }
    for (send, sent) in sends {
        if sent < STREAM_BYTES {
            io.link_end(send).await.unwrap();
        }
    }

    // Close ends what is outstanding, then itself, and the other side sees the end after what was sent.
    let recv = io.start_link(LinkOp::Recv { connection: left, into: bytes_of(10) });
    let mut sends = 0;
    let blocked = loop {
        let send = io.start_link(send_of(&io, left, 0));
        // Two turns of an echo on another connection, then the send is still there: it is blocked.
        let (one, other) = io.connection().await;
        io.send(one, b"x").await;
        io.recv(other, 1).await;
        io.close(one).await;
        io.close(other).await;
        if !io.inner.borrow().link_done.contains_key(&send) {
            break send;
        }
        io.link_end(send).await.unwrap();
        sends += 1;
        assert!(sends < 1000, "a peer that does not read stops a sender");
    };
    let close = io.start_link(LinkOp::Close { connection: left });
    assert!(matches!(io.link_end(close).await.unwrap(), LinkOutput::Closed));
    assert_eq!(io.link_end(recv).await.err().unwrap().kind, LinkErrorKind::Closed);
    assert_eq!(io.link_end(blocked).await.err().unwrap().kind, LinkErrorKind::Closed);
    assert_eq!(io.inner.borrow().link_order.last(), Some(&close), "the close completes last");
    let into = bytes_of(1);
    assert_eq!(io.link_kind(LinkOp::Recv { connection: left, into }).await, LinkErrorKind::Other);
    while !io.recv(right, 1 << 20).await.is_empty() {}
    // The other side is gone: the first send may still be taken, the next ones are not.
    let gone = loop {
        let parts = vec![SendPart::Bytes(b"anybody there?".to_vec())];
        match io.link(LinkOp::Send { connection: right, parts }).await {
            Ok(_) => {}
            Err(error) => break error.kind,
        }
    };
    assert_eq!(gone, LinkErrorKind::Disconnected);
    io.close(right).await;

    // A reset while a receive waits.
    let (left, right) = io.connection().await;
    io.send(left, b"never read").await;
    let recv = io.start_link(LinkOp::Recv { connection: left, into: bytes_of(10) });
    io.close(right).await;
    assert_eq!(io.link_end(recv).await.err().unwrap().kind, LinkErrorKind::Disconnected);
    io.close(left).await;

    // Addresses.
    let (_second, second) = io.listen(LOOPBACK).await;
    let listen = LinkOp::Listen { address: second };
    assert_eq!(io.link_kind(listen).await, LinkErrorKind::AddressUnavailable, "in use");
    let elsewhere = "192.0.2.1:0".parse().unwrap();
    let listen = LinkOp::Listen { address: elsewhere };
    assert_eq!(io.link_kind(listen).await, LinkErrorKind::AddressUnavailable, "not of this machine");
    let free = std::net::TcpListener::bind(LOOPBACK).unwrap().local_addr().unwrap();
    assert_eq!(io.link_kind(LinkOp::Dial { address: free }).await, LinkErrorKind::Disconnected, "refused");
}

const MESSAGE_BYTES: usize = 300_000;
const STREAM_BYTES: usize = 40 * MESSAGE_BYTES;

fn pattern(at: usize) -> u8 {
    (at % 251) as u8 ^ (at >> 16) as u8
}

/// A message in many parts: memory and blocks, uneven, some empty.
fn send_of<D: Disk, L: Link<Buf = D::Buf>>(
    io: &Io<D, L>,
    connection: ConnectionId,
    start: usize,
) -> LinkOp<D::Buf> {
    let mut parts = Vec::new();
    let mut at = start;
    let end = start + MESSAGE_BYTES;
    for number in 0.. {
        if at == end {
            break;
        }
        let bytes = [1, 100, 0, 4096, 7_777, 65_536, 3][number % 7].min(end - at);
        if number % 2 == 0 {
            parts.push(SendPart::Bytes((at..at + bytes).map(pattern).collect()));
        } else {
            let mut block = io.block(512 + bytes, 0xee);
            block[512..512 + bytes].iter_mut().zip(at..).for_each(|(byte, at)| *byte = pattern(at));
            parts.push(SendPart::Block { block: block.share(), range: 512..512 + bytes });
        }
        at += bytes;
    }
    LinkOp::Send { connection, parts }
}

fn start_recv<D: Disk, L: Link<Buf = D::Buf>>(
    io: &Io<D, L>,
    connection: ConnectionId,
    received: usize,
) -> u64 {
    let bytes = [10, 70_000, 4096, 1_000_000][received % 4].min(STREAM_BYTES - received);
    let into = if received.is_multiple_of(2) {
        bytes_of(bytes)
    } else {
        RecvInto::Block { block: io.block(100 + bytes, 0xee), range: 100..100 + bytes }
    };
    io.start_link(LinkOp::Recv { connection, into })
}

pub(crate) fn the_link_does_what_the_seam_promises<B: Backend>() {
    let directory = directory();
    on::<B, _>(directory.path(), link_conformance);
}

pub(crate) fn the_link_does_what_the_seam_promises_with_small_socket_buffers_and_a_spinning_core<
    B: Backend,
>() {
    let directory = directory();
    let small = LinkOptions {
        send_buffer_bytes: Some(32 * 1024),
        recv_buffer_bytes: Some(32 * 1024),
        ..Default::default()
    };
    for idle in [IdlePolicy::Spin, IdlePolicy::Adaptive { spin_us: 50 }] {
        let options = Setup { idle, ..Default::default() };
        with_options::<B, _>(directory.path(), options, small, link_conformance).unwrap();
    }
}

pub(crate) fn connections_are_set_up_for_low_latency_and_dead_peers<B: Backend>() {
    let directory = directory();
    on::<B, _>(directory.path(), |io| async move {
        let (listener, address) = io.listen(LOOPBACK).await;
        let accept = io.start_link(LinkOp::Accept { listener });
        io.dial(address).await;
        io.accept_end(accept).await;
        let mut ends = 0;
        for descriptor in 3..1024 {
            // SAFETY: it is used only to ask; where there is no such descriptor, or no socket, asking is an error.
            let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
            let socket = socket2::SockRef::from(&descriptor);
            let address_of =
                |end: std::io::Result<socket2::SockAddr>| end.ok().and_then(|end| end.as_socket());
            let ours = [address_of(socket.local_addr()), address_of(socket.peer_addr())];
            if ours[1].is_none() || !ours.contains(&Some(address)) {
                continue;
            }
            ends += 1;
            assert!(socket.tcp_nodelay().unwrap());
            assert!(socket.keepalive().unwrap());
            assert!(!socket.reuse_port().unwrap());
            assert_eq!(socket.tcp_notsent_lowat().unwrap(), 128 * 1024);
            assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(10)));
        }
        assert_eq!(ends, 2);
    });
}

// ---- The loop -----------------------------------------------------------------------------------------------------

/// A turn made of a closure.
struct FnTurn<F>(F);

impl<F: FnMut(Now) -> TurnOutcome> Turn for FnTurn<F> {
    fn turn(&mut self, now: Now) -> TurnOutcome {
        (self.0)(now)
    }
}

const IDLE: TurnOutcome = TurnOutcome { worked: false, more: false, next_deadline_ns: u64::MAX, stop: false };
const PROGRESS: TurnOutcome = TurnOutcome { worked: true, more: true, ..IDLE };
const STOP: TurnOutcome = TurnOutcome { stop: true, ..IDLE };

/// Runs a closure as a core on a thread of its own.
fn core<B: Backend>(
    options: Setup,
    wakeup: &Arc<Wakeup>,
    turn: impl FnMut(Now) -> TurnOutcome + Send + 'static,
) -> std::thread::JoinHandle<Result<(), RuntimeError>> {
    let wakeup = Arc::clone(wakeup);
    std::thread::spawn(move || B::run(options, wakeup, |_| Ok::<_, RuntimeError>(FnTurn(turn))))
}

/// A core that is only looked at every 50 ms needs 100 s for what is asked of it here.
const ROUNDS: u64 = 2_000;
const GENEROUS: Duration = Duration::from_secs(60);
const POLICIES: [IdlePolicy; 4] = [
    IdlePolicy::Park,
    IdlePolicy::Adaptive { spin_us: 20 },
    IdlePolicy::Adaptive { spin_us: 500 },
    IdlePolicy::Spin,
];

pub(crate) fn a_signal_from_another_thread_wakes_a_core_under_each_idle_policy<B: Backend>() {
    for idle in POLICIES {
        let (asked, answered) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let wakeup = Arc::new(Wakeup::new());
        let thread = core::<B>(Setup { idle, ..Default::default() }, &wakeup, {
            let (asked, answered) = (Arc::clone(&asked), Arc::clone(&answered));
            move |_| match asked.load(Ordering::Relaxed) {
                ROUNDS => STOP,
                now if answered.swap(now, Ordering::Relaxed) == now => IDLE,
                _ => PROGRESS,
            }
        });
        for round in 1..=ROUNDS {
            // A lost wake shows as one round that never ends; how long all take is the machine's affair.
            let start = Instant::now();
            asked.store(round, Ordering::Relaxed);
            wakeup.signal();
            let mut looks = 0;
            while round < ROUNDS && answered.load(Ordering::Relaxed) < round {
                assert!(start.elapsed() < GENEROUS, "round {round} with {idle:?}");
                // Yields would put this thread behind all others on a busy machine, for minutes when they add up.
                if looks < 1_000 {
                    looks += 1;
                    std::hint::spin_loop();
                } else {
                    std::thread::sleep(Duration::from_micros(10));
                }
            }
        }
        thread.join().unwrap().unwrap();
        wakeup.signal();
    }
}

pub(crate) fn a_turn_that_leaves_nothing_to_do_is_the_last_one_before_the_core_parks<B: Backend>() {
    let (asked, answered) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (wakeup, turns) = (Arc::new(Wakeup::new()), Arc::new(AtomicU64::new(0)));
    let thread = core::<B>(Setup::default(), &wakeup, {
        let (asked, answered, turns) = (Arc::clone(&asked), Arc::clone(&answered), Arc::clone(&turns));
        move |_| {
            turns.fetch_add(1, Ordering::Relaxed);
            let now = asked.load(Ordering::Relaxed);
            let progressed = answered.swap(now, Ordering::Relaxed) < now;
            TurnOutcome { worked: progressed, stop: now == ROUNDS, ..IDLE }
        }
    });
    for round in 1..=ROUNDS {
        asked.store(round, Ordering::Relaxed);
        wakeup.signal();
        while round < ROUNDS && answered.load(Ordering::Relaxed) < round {
            std::thread::yield_now();
        }
    }
    thread.join().unwrap().unwrap();
    // A core that looks once more before it parks takes two each. Some come by themselves: glommio's sleeps are bounded.
    let turns = turns.load(Ordering::Relaxed);
    assert!(turns < ROUNDS + ROUNDS / 2, "{turns} turns for {ROUNDS} calls");
}

pub(crate) fn an_adaptive_core_looks_for_work_after_work_and_then_sleeps<B: Backend>() {
    const CALLS: u32 = 3;
    const BETWEEN: Duration = Duration::from_millis(100);
    let used =
        || Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime)).unwrap();
    // What a core uses that is called now and then and looks for work for 20 ms after it.
    let measure = |worked| {
        let (calls, took_ns) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let wakeup = Arc::new(Wakeup::new());
        let idle = IdlePolicy::Adaptive { spin_us: 20_000 };
        let thread = core::<B>(Setup { idle, ..Default::default() }, &wakeup, {
            let (calls, took_ns) = (Arc::clone(&calls), Arc::clone(&took_ns));
            let (mut before, mut seen) = (None, 0);
            move |_| {
                // What starting has cost does not count.
                let before = *before.get_or_insert_with(used);
                took_ns.store((used() - before).as_nanos() as u64, Ordering::Relaxed);
                let calls = calls.load(Ordering::Relaxed);
                let called = std::mem::replace(&mut seen, calls) < calls;
                TurnOutcome { worked: worked && called, stop: calls > u64::from(CALLS), ..IDLE }
            }
        });
        for _ in 0..=CALLS {
            std::thread::sleep(BETWEEN);
            calls.fetch_add(1, Ordering::Relaxed);
            wakeup.signal();
        }
        thread.join().unwrap().unwrap();
        Duration::from_nanos(took_ns.load(Ordering::Relaxed))
    };
    let begun = Instant::now();
    // A core that others keep from the processor looks for less: then once more.
    loop {
        let (looked, slept) = (measure(true), measure(false));
        assert!(looked < BETWEEN * CALLS / 2 && slept < BETWEEN * CALLS / 8, "{looked:?} and {slept:?}");
        if looked > Duration::from_millis(30) {
            break;
        }
        assert!(begun.elapsed() < GENEROUS, "it looked for {looked:?} only");
    }
}

pub(crate) fn the_deadline_is_kept_under_each_idle_policy<B: Backend>() {
    for idle in POLICIES {
        let wakeup = Arc::new(Wakeup::new());
        let (mut deadline, mut met) = (0, 0);
        let start = Instant::now();
        let thread = core::<B>(Setup { idle, ..Default::default() }, &wakeup, move |now| {
            if now.monotonic_ns >= deadline {
                met += 1;
                // Nearer and farther by turns, so that the timer must be set to an earlier time too.
                deadline = now.monotonic_ns + if met % 2 == 0 { 1_000_000 } else { 200_000 };
            }
            TurnOutcome { next_deadline_ns: deadline, worked: true, stop: met == ROUNDS, ..IDLE }
        });
        while !thread.is_finished() {
            assert!(start.elapsed() < GENEROUS, "{idle:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
        thread.join().unwrap().unwrap();
    }
}

pub(crate) fn a_core_with_a_deadline_in_the_past_runs_on_and_still_does_its_io<B: Backend>() {
    let directory = directory();
    let wakeup = Arc::new(Wakeup::new());
    B::run(Setup::default(), wakeup, |core| {
        let disk = B::disk(core, directory.path())?;
        let mut script = ScriptTurn::new(disk, B::link(core, LinkOptions::default()), disk_conformance);
        Ok::<_, RuntimeError>(FnTurn(move |now| TurnOutcome { next_deadline_ns: 0, ..script.turn(now) }))
    })
    .unwrap();
}

pub(crate) fn a_core_that_always_has_more_to_do_still_does_its_io<B: Backend>() {
    let directory = directory();
    B::run(Setup::default(), Arc::new(Wakeup::new()), |core| {
        let disk = B::disk(core, directory.path())?;
        let mut script = ScriptTurn::new(disk, B::link(core, LinkOptions::default()), disk_conformance);
        Ok::<_, RuntimeError>(FnTurn(move |now| TurnOutcome { more: true, ..script.turn(now) }))
    })
    .unwrap();
}

/// glommio counts the wakers of a task in 16 bits, and a wake by another thread queues one each: more than 32,767
/// of them before the core looks, and it panics.
pub(crate) fn a_hundred_thousand_signals_from_each_of_four_threads_overflow_nothing<B: Backend>() {
    let wakeup = Arc::new(Wakeup::new());
    let (running, ended) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let thread = core::<B>(Setup::default(), &wakeup, {
        let (running, ended) = (Arc::clone(&running), Arc::clone(&ended));
        let mut turns = 0;
        move |_| {
            turns += 1;
            running.store(true, Ordering::Relaxed);
            if turns == 1 {
                // Busy for as long as it takes the signals to come: nobody looks at the wakes.
                while ended.load(Ordering::Relaxed) < 2 {
                    std::thread::yield_now();
                }
            }
            if ended.load(Ordering::Relaxed) == 4 { STOP } else { IDLE }
        }
    });
    while !running.load(Ordering::Relaxed) {
        std::thread::yield_now();
    }
    let signallers: Vec<_> = (0..4)
        .map(|_| {
            let (wakeup, ended) = (Arc::clone(&wakeup), Arc::clone(&ended));
            std::thread::spawn(move || {
                for _ in 0..100_000 {
                    wakeup.signal();
                }
                ended.fetch_add(1, Ordering::Relaxed);
                wakeup.signal();
            })
        })
        .collect();
    signallers.into_iter().for_each(|thread| thread.join().unwrap());
    thread.join().unwrap().unwrap();
}

pub(crate) fn no_completion_is_overlooked_while_other_threads_signal<B: Backend>() {
    let directory = directory();
    let wakeup = Arc::new(Wakeup::new());
    let stop = Arc::new(AtomicBool::new(false));
    let signaller = {
        let (wakeup, stop) = (Arc::clone(&wakeup), Arc::clone(&stop));
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                wakeup.signal();
                std::thread::yield_now();
            }
        })
    };
    let start = Instant::now();
    let ended = B::run(Setup::default(), wakeup, |core| {
        let disk = B::disk(core, directory.path())?;
        Ok::<_, RuntimeError>(ScriptTurn::new(disk, B::link(core, LinkOptions::default()), |io| async move {
            let file = io.create("log", 1 << 20, Access::DurableWrite).await;
            let block = io.block(4096, 0x5a).share();
            let (left, right) = io.connection().await;
            for round in 0..ROUNDS {
                io.write(file, round % 256 * 4096, &block, 4096).await;
                io.send(left, b"ping").await;
                assert_eq!(io.recv(right, 100).await, b"ping");
            }
        }))
    });
    stop.store(true, Ordering::Relaxed);
    signaller.join().unwrap();
    ended.unwrap();
    assert!(start.elapsed() < GENEROUS);
}

pub(crate) fn users_futures_run_on_the_core_wake_it_and_end_with_it<B: Backend>() {
    for idle in POLICIES {
        users_futures_run::<B>(idle);
    }
}

fn users_futures_run<B: Backend>(idle: IdlePolicy) {
    struct Dropped(Rc<Cell<u32>>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
        }
    }
    B::run(Setup { idle, ..Default::default() }, Arc::new(Wakeup::new()), |core: &B::Context| {
        let (asked, dropped) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
        let (local, later) = (B::local_wakeup(core), core.clone());
        let asking = Rc::clone(&asked);
        B::spawn_local(
            core,
            Box::pin(async move {
                // A future that starts another one, as a user's would.
                let inner = Rc::clone(&asking);
                B::spawn_local(
                    &later,
                    Box::pin(async move {
                        inner.set(inner.get() + 1);
                        local.wake();
                        panic!("a user's bug");
                    }),
                );
                asking.set(asking.get() + 1);
            }),
        );
        let guard = Dropped(Rc::clone(&dropped));
        B::spawn_local(
            core,
            Box::pin(async move {
                let _guard = guard;
                std::future::pending::<()>().await;
            }),
        );
        let watched = Rc::clone(&dropped);
        Ok::<_, RuntimeError>(FnTurn(move |_| {
            assert_eq!(watched.get(), 0);
            if asked.get() == 2 { STOP } else { TurnOutcome { worked: true, ..IDLE } }
        }))
    })
    .unwrap();
}

pub(crate) fn a_users_future_that_never_rests_does_not_keep_completions_away_for_ever<B: Backend>() {
    let directory = directory();
    B::run(Setup::default(), Arc::new(Wakeup::new()), |core| {
        B::spawn_local(
            core,
            Box::pin(poll_fn(|context| {
                context.waker().wake_by_ref();
                Poll::Pending
            })),
        );
        let disk = B::disk(core, directory.path())?;
        Ok::<_, RuntimeError>(ScriptTurn::new(disk, B::link(core, LinkOptions::default()), |io| async move {
            let file = io.create("log", 4096, Access::DurableWrite).await;
            let block = io.block(4096, 0x5a).share();
            io.write(file, 0, &block, 4096).await;
        }))
    })
    .unwrap();
}

pub(crate) fn a_panic_in_a_turn_is_told_after_the_writes_in_flight_have_ended<B: Backend>() {
    let directory = directory();
    let path = directory.path().join("log");
    let told =
        with_options::<B, _>(directory.path(), Setup::default(), LinkOptions::default(), |io| async move {
            let file = io.create("log", 1 << 20, Access::DurableWrite).await;
            let block = io.block(1 << 20, 0x77).share();
            io.start_disk(DiskOp::Write { file, offset: 0, block, bytes: 1 << 20 });
            panic!("a broken invariant");
        });
    assert!(
        matches!(&told, Err(RuntimeError::Panicked(message)) if message == "a broken invariant"),
        "{told:?}"
    );
    assert_eq!(descriptor_flags(&path), [0; 0]);
    assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0x77));
}

pub(crate) fn what_cannot_be_made_is_told<B: Backend>() {
    let told = B::run(Setup::default(), Arc::new(Wakeup::new()), |_| {
        Err::<FnTurn<fn(Now) -> TurnOutcome>, _>("no such thing")
    });
    assert!(
        matches!(&told, Err(RuntimeError::Make(error)) if error.to_string() == "no such thing"),
        "{told:?}"
    );
}

pub(crate) fn a_wakeup_serves_one_core_only<B: Backend>() {
    let wakeup = Arc::new(Wakeup::new());
    core::<B>(Setup::default(), &wakeup, |_| STOP).join().unwrap().unwrap();
    let told = core::<B>(Setup::default(), &wakeup, |_| STOP).join().unwrap();
    assert!(matches!(told, Err(RuntimeError::WakeupInUse)), "{told:?}");
}

pub(crate) fn a_core_runs_where_it_is_told_to_and_one_that_does_not_exist_is_refused<B: Backend>() {
    let allowed = rustix::thread::sched_getaffinity(None).unwrap();
    let last = (0..1024).rfind(|core| allowed.is_set(*core)).unwrap();
    let options = Setup { core: Some(last), name: "pinned".into(), ..Default::default() };
    let pinned = core::<B>(options, &Arc::new(Wakeup::new()), move |_| {
        let mine = rustix::thread::sched_getaffinity(None).unwrap();
        assert!(mine.is_set(last) && mine.count() == 1);
        let name = rustix::thread::name().unwrap();
        assert_eq!(name.to_str(), Ok("pinned"));
        STOP
    });
    pinned.join().unwrap().unwrap();
    for missing in [1023, 1_000_000] {
        let options = Setup { core: Some(missing), ..Default::default() };
        let told = core::<B>(options, &Arc::new(Wakeup::new()), |_| STOP).join().unwrap();
        let Err(RuntimeError::CoreUnavailable { core, available }) = told else { panic!("{told:?}") };
        assert!(core == missing && available.contains(&last));
    }
}

// ---- Refusals, in processes of their own --------------------------------------------------------------------------

/// What a child process does, by name.
const CHILD: &str = "RINGRAFT_RUNTIME_TEST_CHILD";

pub(crate) fn a_refused_io_uring_is_told_by_its_cause<B: Backend>() {
    child("eperm");
    child("enosys");
    child("enomem");
    child("einval");
}

pub(crate) fn too_little_locked_memory_is_told_with_what_is_wanted<B: Backend>() {
    child("memlock");
}

pub(crate) fn running_out_of_descriptors_is_told_and_leaves_the_listener_usable<B: Backend>() {
    child("descriptors");
}

pub(crate) fn sending_to_a_peer_that_is_gone_does_not_end_a_program_that_does_not_ignore_sigpipe<
    B: Backend,
>() {
    child("sigpipe");
}

pub(crate) fn a_core_that_ends_leaves_no_descriptor_behind<B: Backend>() {
    child("leaks");
}

fn child(what: &str) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output =
        command.args(["--exact", "in_a_child_process", "--nocapture"]).env(CHILD, what).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("child has run"), "{what}: {}\n{text}", output.status);
}

/// Not a test of its own: what the tests above run in another process.
pub(crate) fn in_a_child_process<B: Backend>() {
    let Ok(what) = std::env::var(CHILD) else { return };
    let start =
        || B::run(Setup::default(), Arc::new(Wakeup::new()), |_| Ok::<_, RuntimeError>(FnTurn(|_| STOP)));
    match what.as_str() {
        "eperm" => {
            refuse_io_uring(libc::EPERM);
            let told = start();
            // A machine whose sysctl refuses everybody is told so, rightly.
            assert!(
                matches!(
                    told,
                    Err(RuntimeError::IoUringRefused(IoUringRefusal::Policy | IoUringRefusal::Sysctl(_)))
                ),
                "{told:?}"
            );
        }
        "enosys" => {
            refuse_io_uring(libc::ENOSYS);
            assert_eq!(
                runtime::Backend::of_this_machine(),
                runtime::Backend::Uring,
                "which says why it cannot start"
            );
            let told = start();
            assert!(matches!(told, Err(RuntimeError::IoUringRefused(IoUringRefusal::Missing))), "{told:?}");
        }
        "einval" => {
            refuse_io_uring(libc::EINVAL);
            assert_eq!(runtime::Backend::of_this_machine(), runtime::Backend::Glommio);
            let told = start();
            assert!(matches!(told, Err(RuntimeError::IoUringRefused(why)) if why == B::TOO_OLD), "{told:?}");
        }
        "enomem" => {
            refuse_io_uring(libc::ENOMEM);
            let told = start();
            assert!(
                matches!(told, Err(RuntimeError::LockedMemory { wanted_bytes, .. }) if wanted_bytes == B::LOCKED_BYTES_WANTED),
                "{told:?}"
            );
        }
        "memlock" => {
            limit(libc::RLIMIT_MEMLOCK, 64 * 1024);
            let told = start();
            B::check_little_locked_memory(told);
        }
        "descriptors" => {
            let directory = directory();
            on::<B, _>(directory.path(), |io| async move {
                let (listener, address) = io.listen(LOOPBACK).await;
                let dialed = io.dial(address).await;
                let before = limit(libc::RLIMIT_NOFILE, 3);
                assert_eq!(io.link_kind(LinkOp::Accept { listener }).await, LinkErrorKind::Exhausted);
                assert_eq!(io.link_kind(LinkOp::Dial { address }).await, LinkErrorKind::Exhausted);
                limit(libc::RLIMIT_NOFILE, before);
                let accept = io.start_link(LinkOp::Accept { listener });
                let (accepted, _) = io.accept_end(accept).await;
                io.send(dialed, b"hello").await;
                assert_eq!(io.recv(accepted, 10).await, b"hello");
            });
        }
        "leaks" => {
            let directory = directory();
            // All but one that glommio 0.9 itself leaves behind with each executor: an eventfd.
            let count = || {
                let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
                let targets = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
                targets.filter(|target| !target.to_string_lossy().contains("eventfd")).count()
            };
            let mut before = 0;
            for round in 0..4 {
                let listened = Rc::new(Cell::new(LOOPBACK));
                let inside = Rc::clone(&listened);
                on::<B, _>(directory.path(), move |io| async move {
                    let (listener, address) = io.listen(LOOPBACK).await;
                    inside.set(address);
                    io.dial(address).await;
                    let accept = io.start_link(LinkOp::Accept { listener });
                    let (accepted, _) = io.accept_end(accept).await;
                    io.start_link(LinkOp::Recv { connection: accepted, into: bytes_of(10) });
                    io.start_link(send_of(&io, accepted, 0));
                    // Waits for ever.
                    io.start_link(LinkOp::Accept { listener });
                    io.create(&round.to_string(), 4096, Access::Write).await;
                });
                std::net::TcpListener::bind(listened.get()).expect("nobody listens any more");
                // The first run opens what stays open for the process; threads end a little after the run.
                let start = Instant::now();
                while round > 0 && count() > before {
                    assert!(start.elapsed() < GENEROUS, "{} descriptors, then {}", before, count());
                }
                before = count();
            }
        }
        "sigpipe" => {
            // SAFETY: restores the default action, as a program that is not written in Rust has it.
            unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
            let directory = directory();
            on::<B, _>(directory.path(), link_conformance);
        }
        other => panic!("no such child: {other}"),
    }
    println!("child has run");
}

/// Sets a soft limit and returns what it was.
fn limit(resource: libc::__rlimit_resource_t, value: u64) -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls are given a valid structure.
    let set = unsafe {
        libc::getrlimit(resource, &mut limit);
        libc::setrlimit(resource, &libc::rlimit { rlim_cur: value, ..limit })
    };
    assert_eq!(set, 0);
    limit.rlim_cur
}

/// From now on io_uring_setup fails with `errno` on this thread.
fn refuse_io_uring(errno: i32) {
    let statement = |code: u32, k: u32, jt, jf| libc::sock_filter { code: code as u16, jt, jf, k };
    let number_of_call = 0;
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, number_of_call, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_io_uring_setup as u32, 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32, 0, 0),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its filter are valid and outlive the call, which copies them.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program), 0);
    }
}
