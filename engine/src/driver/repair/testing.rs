//! One node by itself, on a disk in memory and without sockets: a test says what the other members say, and looks at what
//! the node would send them.

use super::super::{Driver, GROUP, Life};
use super::Outgoing;
use crate::config::{Config, MemberConfig};
use crate::error::StopError;
use crate::formation::Step;
use crate::raft::{Append, BatchRun, Configuration, Event, LogId, Member, MemberRole, Reach, Round};
use crate::runtime::{Now, Wakeup};
use crate::state_machine::{CommittedBatch, Replies, StateMachine};
use crate::wire::{AppendMessage, FetchMessage, FetchReplyMessage, Fetched};
use ringraft_block::{
    AlignedBuf, BLOCK_BYTES, Block, ClusterId, Incarnation, LogIndex, NodeId, Term, round_up_to_block,
};
use ringraft_net::link::{Link, LinkDone, LinkOp, LinkOpId};
use ringraft_wal::StoredBatch;
use ringraft_wal::disk::{
    DirectoryEntry, Disk, DiskDone, DiskError, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId,
};
use ringraft_wal::format::{
    BatchBuilder, BatchInfo, BatchKind, Chain, ENVELOPE_BYTES, Seal, parse_image, read_envelope,
};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

/// How long a member may take to answer.
pub(in crate::driver) const PATIENCE_NS: u64 = 1_000_000_000;

/// Bytes of a slot by which a batch is known, and others.
pub(in crate::driver) const IN_ENVELOPE: usize = 17;
pub(in crate::driver) const IN_IMAGE: usize = ENVELOPE_BYTES + 100;
/// The term of the log, and of its leader.
pub(in crate::driver) const TERM: Term = Term(2);

/// Files, and operations that happen when they are polled for.
#[derive(Default)]
pub(in crate::driver) struct Memory {
    files: Vec<Vec<u8>>,
    names: BTreeMap<String, usize>,
    open: BTreeMap<FileId, usize>,
    waiting: VecDeque<(DiskOpId, DiskOp<AlignedBuf>)>,
    opened: u32,
    completed: usize,
    /// Reads, or writes, do not happen.
    pub(in crate::driver) holds_reads: bool,
    pub(in crate::driver) holds_writes: bool,
    /// Nothing new can be created.
    pub(in crate::driver) is_full: bool,
    pub(in crate::driver) bytes_read: usize,
}

impl Memory {
    fn run(&mut self, op: DiskOp<AlignedBuf>) -> Result<DiskOutput<AlignedBuf>, DiskErrorKind> {
        match op {
            DiskOp::List => {
                let entry = |(name, file): (&String, &usize)| DirectoryEntry {
                    name: name.clone(),
                    bytes: self.files[*file].len() as u64,
                };
                Ok(DiskOutput::Listed(self.names.iter().map(entry).collect()))
            }
            DiskOp::Create { .. } if self.is_full => Err(DiskErrorKind::NoSpace),
            DiskOp::Create { name, .. } if self.names.contains_key(&name) => {
                Err(DiskErrorKind::AlreadyExists)
            }
            DiskOp::Create { name, bytes, .. } => {
                self.names.insert(name.clone(), self.files.len());
                self.files.push(vec![0; bytes as usize]);
                self.opened(&name)
            }
            DiskOp::Open { name, .. } => self.opened(&name),
            DiskOp::Write { file, offset, block, bytes } => {
                let at = offset as usize;
                self.files[self.open[&file]][at..at + bytes].copy_from_slice(&block[..bytes]);
                Ok(DiskOutput::Written { bytes })
            }
            DiskOp::Read { file, offset, mut block, bytes } => {
                let content = self.files[self.open[&file]].get(offset as usize..).unwrap_or_default();
                let bytes = bytes.min(content.len());
                block[..bytes].copy_from_slice(&content[..bytes]);
                self.bytes_read += bytes;
                Ok(DiskOutput::Read { block, bytes })
            }
            DiskOp::Rename { from, to } => {
                let file = self.names.remove(&from).ok_or(DiskErrorKind::NotFound)?;
                self.names.insert(to, file);
                Ok(DiskOutput::Done)
            }
            DiskOp::Remove { name } => {
                self.names.remove(&name).map(|_| DiskOutput::Done).ok_or(DiskErrorKind::NotFound)
            }
            DiskOp::Close { .. } | DiskOp::Flush { .. } | DiskOp::SyncDirectory => Ok(DiskOutput::Done),
        }
    }

    fn opened(&mut self, name: &str) -> Result<DiskOutput<AlignedBuf>, DiskErrorKind> {
        let at = *self.names.get(name).ok_or(DiskErrorKind::NotFound)?;
        self.opened += 1;
        self.open.insert(FileId(self.opened), at);
        Ok(DiskOutput::Opened { file: FileId(self.opened), bytes: self.files[at].len() as u64 })
    }

    /// A bit of the slot of the batch at `first` flips.
    pub(in crate::driver) fn rot(&mut self, first: u64, at_byte: usize) {
        for (name, file) in &self.names {
            let content = &mut self.files[*file];
            for at in (0..content.len()).step_by(BLOCK_BYTES).filter(|_| name.ends_with(".wal")) {
                let envelope = read_envelope(&content[at..at + ENVELOPE_BYTES]);
                if envelope
                    .is_ok_and(|envelope| envelope.offset == at as u64 && envelope.first.get() == first)
                {
                    content[at + at_byte] ^= 4;
                    return;
                }
            }
        }
        panic!("no batch at {first}");
    }
}

pub(in crate::driver) struct MemoryDisk(Rc<RefCell<Memory>>);

impl Disk for MemoryDisk {
    type Buf = AlignedBuf;

    fn allocate(&mut self, bytes: usize) -> Result<AlignedBuf, DiskError> {
        Ok(AlignedBuf::zeroed(bytes))
    }

    fn submit(&mut self, id: DiskOpId, op: DiskOp<AlignedBuf>) {
        self.0.borrow_mut().waiting.push_back((id, op));
    }

    fn poll(&mut self, done: &mut Vec<DiskDone<AlignedBuf>>) {
        let mut memory = self.0.borrow_mut();
        for (id, op) in std::mem::take(&mut memory.waiting) {
            let held = match &op {
                DiskOp::Read { .. } => memory.holds_reads,
                DiskOp::Write { .. } => memory.holds_writes,
                _ => false,
            };
            if held {
                memory.waiting.push_back((id, op));
                continue;
            }
            let error = |kind| DiskError { kind, operation: "memory", os_error: None };
            memory.completed += 1;
            let result = memory.run(op).map_err(error);
            done.push(DiskDone { id, result });
        }
    }
}

/// Sockets on which nothing happens.
pub(in crate::driver) struct NoLink;

impl Link for NoLink {
    type Buf = AlignedBuf;

    fn submit(&mut self, _: LinkOpId, _: LinkOp<AlignedBuf>) {}

    fn poll(&mut self, _: &mut Vec<LinkDone<AlignedBuf>>) {}
}

pub(in crate::driver) struct Nothing;

impl StateMachine for Nothing {
    fn apply(&mut self, batch: &CommittedBatch<'_>, replies: &mut Replies) {
        batch.commands().for_each(|_| replies.push_empty());
    }
}

/// Node 1 of three, a follower of node 2 in [`TERM`].
pub(in crate::driver) struct Bench {
    pub(in crate::driver) driver: Driver<MemoryDisk, NoLink, Nothing>,
    pub(in crate::driver) memory: Rc<RefCell<Memory>>,
    round: u64,
}

/// What the node says to another.
pub(in crate::driver) enum Said {
    Question(FetchMessage),
    Answer(FetchReplyMessage, Option<BatchInfo>),
}

impl Bench {
    pub(in crate::driver) fn new() -> Self {
        let mut bench = Self::unformed();
        let member = |id| Member {
            id: NodeId(id),
            incarnation: if id == 1 { bench.driver.incarnation } else { Incarnation(id.into()) },
            address: format!("127.0.0.1:{}", 7_000 + id),
            role: MemberRole::Voter,
        };
        let configuration = Configuration::new((1..=3).map(member).collect()).expect("valid");
        bench.driver.form(Step::Form(configuration)).expect("a configuration");
        bench.settle();
        bench.begin();
        bench
    }

    /// The node when it does not know yet whether there is a cluster.
    pub(in crate::driver) fn unformed() -> Self {
        let bench = Self::over(Rc::new(RefCell::new(Memory::default())));
        assert!(matches!(bench.driver.life, Life::Forming(_)));
        bench
    }

    /// The process ends, and another one starts over what it wrote.
    pub(in crate::driver) fn restart(self) -> Self {
        let memory = Rc::clone(&self.memory);
        memory.borrow_mut().waiting.clear();
        drop(self);
        let mut bench = Self::over(memory);
        bench.begin();
        bench
    }

    fn over(memory: Rc<RefCell<Memory>>) -> Self {
        let member = |id| MemberConfig {
            id: NodeId(id),
            address: SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 7_000 + id as u16),
        };
        let config = Config {
            insecure: true,
            segment_bytes: 1 << 20,
            segments_ahead: 1,
            batch_bytes_max: 4096,
            command_bytes_max: 4096,
            election_timeout: std::time::Duration::from_nanos(PATIENCE_NS),
            ..Config::new(ClusterId(7), NodeId(1), (1..=3).map(member).collect(), "memory")
        };
        let (disk, wakeup) = (MemoryDisk(Rc::clone(&memory)), Arc::new(Wakeup::new()));
        let (driver, _) = Driver::with_backend(config, 1, wakeup, disk, NoLink, Nothing).expect("valid");
        let mut bench = Self { driver, memory, round: 0 };
        bench.driver.now = Now { monotonic_ns: PATIENCE_NS, wall_ms: 1 };
        bench.settle();
        bench
    }

    fn begin(&mut self) {
        assert!(self.driver.raft().is_some());
        for id in 2..=3 {
            self.connect(id);
        }
    }

    pub(in crate::driver) fn connect(&mut self, id: u64) {
        let peer = self.driver.peers.get_mut(&NodeId(id)).expect("a member");
        peer.session = Some(Incarnation(id.into()));
        self.driver.repair.session_changed(NodeId(id));
        self.driver.step(Event::PeerConnected { peer: NodeId(id) }).expect("it goes on");
    }

    pub(in crate::driver) fn disconnect(&mut self, id: u64) {
        self.driver.peers.get_mut(&NodeId(id)).expect("a member").session = None;
        self.driver.repair.session_changed(NodeId(id));
        self.driver.step(Event::PeerDisconnected { peer: NodeId(id) }).expect("it goes on");
    }

    /// The disk does what it was asked for, and the node all that follows, in no time.
    pub(in crate::driver) fn settle(&mut self) {
        for _ in 0..2_000 {
            let (waiting, completed) = self.operations();
            let news = self.driver.on_disk().expect("the disk is in order");
            self.driver.write_pending();
            self.driver.mend().expect("it goes on");
            if !news && self.operations() == (waiting, completed) {
                return;
            }
        }
        panic!("it never settles");
    }

    /// How many operations wait, and how many have completed.
    fn operations(&self) -> (usize, usize) {
        let memory = self.memory.borrow();
        (memory.waiting.len(), memory.completed)
    }

    pub(in crate::driver) fn wait(&mut self, span_ns: u64) {
        self.driver.now.monotonic_ns += span_ns;
        self.settle();
    }

    /// Time passes without anything of the leader.
    pub(in crate::driver) fn lose_leader(&mut self) {
        self.driver.now.monotonic_ns += 3 * PATIENCE_NS;
        self.driver.step(Event::Tick).expect("it goes on");
        self.settle();
        assert_eq!(self.driver.raft().and_then(|raft| raft.leader()), None);
    }

    /// A sealed batch behind a position.
    pub(in crate::driver) fn batch(
        &mut self,
        term: u64,
        first: u64,
        previous: Chain,
        bytes: usize,
    ) -> (Block<AlignedBuf>, BatchInfo) {
        self.batch_at(first, term, first, previous, bytes)
    }

    fn batch_at(
        &mut self,
        time_ms: u64,
        term: u64,
        first: u64,
        previous: Chain,
        bytes: usize,
    ) -> (Block<AlignedBuf>, BatchInfo) {
        let size = round_up_to_block(bytes + 2 * BLOCK_BYTES);
        let block = super::super::take_block(&self.driver.pool, &mut self.driver.disk, size).expect("memory");
        let mut builder = BatchBuilder::new(block);
        builder.push(&vec![first as u8; bytes], None).expect("it fits");
        builder.seal(Seal {
            group: GROUP,
            term: Term(term),
            first: LogIndex(first),
            kind: BatchKind::Commands,
            time_ms,
            previous_chain: previous,
        })
    }

    /// The leader sends so many batches of one command each; `commit` is how far it has committed.
    pub(in crate::driver) fn append(&mut self, count: u64, commit: u64) {
        for _ in 0..count {
            let next = self.driver.raft().expect("it runs").last().index.next();
            self.try_append(next.get(), commit).expect("it follows");
            self.settle();
        }
    }

    /// The leader sends a batch of one command, of this time.
    pub(in crate::driver) fn try_append(&mut self, time_ms: u64, commit: u64) -> Result<(), StopError> {
        let last = self.driver.raft().expect("it runs").last();
        let previous_chain = self.driver.chain_at(last.index).expect("a batch end");
        let (block, info) = self.batch_at(time_ms, TERM.get(), last.index.get() + 1, previous_chain, 700);
        let batch = BatchRun { first: info.first, last: info.last, term: info.term, bytes: info.image_bytes };
        self.round += 1;
        let append = Append {
            term: TERM,
            previous: last,
            batch: Some(batch),
            commit: LogIndex(commit),
            round: Round(self.round),
            reply_now: false,
            configuration: None,
        };
        let message = AppendMessage { append, previous_chain, chain: info.chain };
        let attachment = Some((block, info.image_bytes as usize));
        self.driver.on_append(NodeId(2), message, attachment)
    }

    /// The leader sends a configuration.
    pub(in crate::driver) fn append_configuration(&mut self, configuration: &Configuration) {
        let last = self.driver.raft().expect("it runs").last();
        let previous_chain = self.driver.chain_at(last.index).expect("a batch end");
        let encoded = crate::wire::configuration::encode(configuration);
        let size = round_up_to_block(encoded.len() + 2 * BLOCK_BYTES);
        let block = super::super::take_block(&self.driver.pool, &mut self.driver.disk, size).expect("memory");
        let mut builder = BatchBuilder::new(block);
        builder.push(&encoded, None).expect("it fits");
        let (first, kind) = (last.index.next(), BatchKind::Membership);
        let time_ms = first.get();
        let (block, info) =
            builder.seal(Seal { group: GROUP, term: TERM, first, kind, time_ms, previous_chain });
        self.round += 1;
        let append = Append {
            term: TERM,
            previous: last,
            batch: Some(BatchRun {
                first: info.first,
                last: info.last,
                term: info.term,
                bytes: info.image_bytes,
            }),
            commit: last.index,
            round: Round(self.round),
            reply_now: false,
            configuration: None,
        };
        let message = AppendMessage { append, previous_chain, chain: info.chain };
        let attachment = Some((block, info.image_bytes as usize));
        self.driver.on_append(NodeId(2), message, attachment).expect("it follows");
        self.settle();
    }

    /// What is applied and sent is not kept in memory.
    pub(in crate::driver) fn forget_recent(&mut self) {
        let durable = self.driver.wal.durable_through();
        self.driver.recent.trim(LogIndex(u64::MAX), durable);
    }

    /// The batch at `first` rots, and is read.
    pub(in crate::driver) fn damage(&mut self, first: u64) {
        self.memory.borrow_mut().rot(first, IN_IMAGE);
        self.driver.wal.read(&mut self.driver.disk, 3, LogIndex(first), 1);
        for _ in 0..20 {
            self.driver.on_disk().expect("the disk is in order");
            if self.driver.wal.is_damaged(LogIndex(first)) {
                return;
            }
        }
        panic!("the damage at {first} is not found");
    }

    /// What the node has said since, and to whom.
    pub(in crate::driver) fn said(&mut self) -> Vec<(u64, Said)> {
        let said = std::mem::take(&mut self.driver.repair.outgoing).into_iter().map(|(to, message)| {
            let said = match message {
                Outgoing::Fetch(question) => Said::Question(question),
                Outgoing::Reply(reply, batch) => Said::Answer(
                    reply,
                    batch.map(|batch: StoredBatch<_>| {
                        let image =
                            &batch.block[ENVELOPE_BYTES..ENVELOPE_BYTES + batch.info.image_bytes as usize];
                        parse_image(image).expect("an intact image").info()
                    }),
                ),
            };
            (to.get(), said)
        });
        said.collect()
    }

    pub(in crate::driver) fn questions(&mut self) -> Vec<(u64, FetchMessage)> {
        let question = |(to, said)| match said {
            Said::Question(question) => Some((to, question)),
            Said::Answer(..) => None,
        };
        self.said().into_iter().filter_map(question).collect()
    }

    /// A member answers.
    pub(in crate::driver) fn answer(&mut self, from: u64, token: u64, outcome: Fetched) {
        self.try_answer(from, token, outcome, None).expect("it goes on");
        self.settle();
    }

    pub(in crate::driver) fn try_answer(
        &mut self,
        from: u64,
        token: u64,
        outcome: Fetched,
        image: Option<(Block<AlignedBuf>, usize)>,
    ) -> Result<(), StopError> {
        let highest = LogId { term: TERM, index: LogIndex(1) };
        let reach = Reach { highest, in_doubt: false, claims: false };
        let reply = FetchReplyMessage { token, outcome, proves: true, term: TERM, leads: false, reach };
        self.driver.on_fetch_reply(NodeId(from), reply, image)
    }

    /// A member asks for the batch at `first`.
    pub(in crate::driver) fn ask(&mut self, from: u64, token: u64, first: u64) {
        let previous = LogIndex(first).previous();
        let message = FetchMessage {
            token,
            first: LogIndex(first),
            previous_chain: self.driver.chain_at(previous).expect("a batch end"),
            proof: None,
            image: true,
            only_proved: false,
        };
        self.driver.on_fetch(NodeId(from), message).expect("it goes on");
    }
}

/// What the driver logs as errors.
#[derive(Clone, Default)]
pub(in crate::driver) struct Errors(Arc<Mutex<String>>);

impl Errors {
    pub(in crate::driver) fn told(&self) -> String {
        self.0.lock().expect("no holder panics").clone()
    }
}

impl tracing::Subscriber for Errors {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::ERROR
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Text<'a>(&'a mut String);
        impl tracing::field::Visit for Text<'_> {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0.push_str(&format!("{field}={value:?} "));
            }
        }
        event.record(&mut Text(&mut self.0.lock().expect("no holder panics")));
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}
