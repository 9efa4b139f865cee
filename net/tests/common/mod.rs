//! A link in memory: deterministic, with byte streams that arrive in pieces, stall, break and go missing; and a
//! world of nodes on it. Ends that belong to no node are driven by the test itself, byte by byte.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use ringraft_block::{
    AlignedBuf, Block, BlockBuf, ClusterId, GroupId, Incarnation, NodeId, Pool, SharedBlock, crc32c,
};
use ringraft_net::frame::{HEADER_BYTES, Header};
use ringraft_net::handshake::{HANDSHAKE_BYTES, Handshake, HandshakeKind};
use ringraft_net::link::{
    ConnectionId, Link, LinkDone, LinkError, LinkErrorKind, LinkOp, LinkOpId, LinkOutput, ListenerId,
    RecvInto, SendPart,
};
use ringraft_net::{
    ATTACHMENT_OFFSET, BlockSource, DisconnectCause, FrameCap, NetConfig, NetEvent, NetLimits, Network,
    PeerConfig, Referral, Rejection, Session,
};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::rc::Rc;

pub const MILLISECOND: u64 = 1_000_000;
pub const SECOND: u64 = 1_000_000_000;

/// Frames of this type have a body of at most 256 bytes.
pub const NOTE: u16 = 16;
/// Frames of this type have a body of at most 64 bytes and an attachment of at most 100,000.
pub const BATCH: u16 = 17;
pub const GROUP: GroupId = GroupId(3);
pub const CLUSTER: ClusterId = ClusterId(0xc1);
pub const FINGERPRINT: u64 = 0xf1f2;

pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// From 0 to `below - 1`.
    pub fn below(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % below.max(1)
    }

    pub fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == 0
    }
}

// ---- The link

#[derive(Clone)]
pub struct Hub(Rc<RefCell<Inner>>);

pub struct MemoryLink {
    hub: Hub,
    host: usize,
}

struct Inner {
    hosts: Vec<Host>,
    listeners: BTreeMap<SocketAddr, Listening>,
    streams: Vec<[End; 2]>,
    /// Dials to these addresses get no answer.
    silent: BTreeSet<SocketAddr>,
    unanswered: Vec<(usize, LinkOpId)>,
    /// The next accepts at these addresses fail.
    accept_errors: BTreeMap<SocketAddr, VecDeque<LinkErrorKind>>,
    /// Closes complete only when this is over.
    hold_closes: bool,
    held_closes: Vec<(usize, LinkOpId)>,
    /// A receive gets at most this many bytes; with `random`, fewer at random.
    chunk_bytes_max: usize,
    random: Option<Random>,
    /// A stream holds this many unread bytes.
    window_bytes: usize,
    trace: u64,
}

#[derive(Default)]
struct Host {
    done: VecDeque<LinkDone<AlignedBuf>>,
    dials: Vec<SocketAddr>,
    sends: usize,
    parts: usize,
}

struct Listening {
    host: Option<usize>,
    accept: Option<LinkOpId>,
    backlog: VecDeque<(usize, SocketAddr)>,
}

#[derive(Default)]
struct End {
    host: Option<usize>,
    inbox: VecDeque<u8>,
    recv: Option<(LinkOpId, RecvInto<AlignedBuf>)>,
    send: Option<Sending>,
    closed: bool,
    reset: bool,
}

struct Sending {
    id: LinkOpId,
    parts: Vec<SendPart<AlignedBuf>>,
    bytes: VecDeque<u8>,
}

fn error(kind: LinkErrorKind) -> LinkError {
    LinkError { kind, operation: "test", os_error: None }
}

impl Hub {
    pub fn new() -> Self {
        Self(Rc::new(RefCell::new(Inner {
            hosts: Vec::new(),
            listeners: BTreeMap::new(),
            streams: Vec::new(),
            silent: BTreeSet::new(),
            unanswered: Vec::new(),
            accept_errors: BTreeMap::new(),
            hold_closes: false,
            held_closes: Vec::new(),
            chunk_bytes_max: usize::MAX,
            random: None,
            window_bytes: 1 << 20,
            trace: 0,
        })))
    }

    pub fn link(&self) -> MemoryLink {
        let mut inner = self.0.borrow_mut();
        inner.hosts.push(Host::default());
        MemoryLink { hub: self.clone(), host: inner.hosts.len() - 1 }
    }

    pub fn chunks(&self, bytes_max: usize, seed: Option<u64>) {
        let mut inner = self.0.borrow_mut();
        (inner.chunk_bytes_max, inner.random) = (bytes_max, seed.map(Random::new));
    }

    pub fn window(&self, bytes: usize) {
        self.0.borrow_mut().window_bytes = bytes;
    }

    /// From now on dials to `address` get no answer; or, if not `silent`, an answer again.
    pub fn silence(&self, address: SocketAddr, silent: bool) {
        let mut inner = self.0.borrow_mut();
        if silent {
            inner.silent.insert(address)
        } else {
            inner.silent.remove(&address)
        };
    }

    pub fn fail_unanswered_dials(&self) {
        let mut inner = self.0.borrow_mut();
        for (host, id) in std::mem::take(&mut inner.unanswered) {
            inner.done(host, id, Err(error(LinkErrorKind::Disconnected)));
        }
    }

    /// Dials that got no answer get one, however late.
    pub fn answer_unanswered_dials(&self) {
        let mut inner = self.0.borrow_mut();
        for (host, id) in std::mem::take(&mut inner.unanswered) {
            let stream = inner.open_stream(Some(host), None);
            let connection = ConnectionId(stream as u64 * 2);
            inner.done(host, id, Ok(LinkOutput::Dialed { connection }));
        }
    }

    /// Whether the dialer of a stream has closed it.
    pub fn dialer_closed(&self, stream: usize) -> bool {
        self.0.borrow().streams[stream][0].closed
    }

    pub fn fail_accepts(&self, address: SocketAddr, kinds: &[LinkErrorKind]) {
        self.0.borrow_mut().accept_errors.entry(address).or_default().extend(kinds);
    }

    /// Whether closes that are submitted complete only when this is called again with `false`.
    pub fn hold_closes(&self, hold: bool) {
        let mut inner = self.0.borrow_mut();
        inner.hold_closes = hold;
        for (host, id) in std::mem::take(&mut inner.held_closes) {
            inner.done(host, id, Ok(LinkOutput::Closed));
        }
    }

    /// Dials to `address` are refused from now on.
    pub fn stop_listening(&self, address: SocketAddr) {
        self.0.borrow_mut().listeners.remove(&address);
    }

    pub fn dials(&self, host: usize) -> Vec<SocketAddr> {
        self.0.borrow().hosts[host].dials.clone()
    }

    /// Sends submitted by a host, and their parts.
    pub fn sends(&self, host: usize) -> (usize, usize) {
        let inner = self.0.borrow();
        (inner.hosts[host].sends, inner.hosts[host].parts)
    }

    /// Streams that are open at either end.
    pub fn open_streams(&self) -> Vec<usize> {
        let inner = self.0.borrow();
        let open = |ends: &[End; 2]| ends.iter().any(|end| !end.closed && !end.reset);
        inner.streams.iter().enumerate().filter(|(_, ends)| open(ends)).map(|(stream, _)| stream).collect()
    }

    /// Bytes that arrived at either end of a stream and were not read.
    pub fn unread(&self, stream: usize) -> usize {
        self.0.borrow().streams[stream].iter().map(|end| end.inbox.len()).sum()
    }

    /// Breaks a stream: both ends learn of it, what is under way is lost.
    pub fn reset(&self, stream: usize) {
        self.0.borrow_mut().reset(stream);
    }

    /// Sums up every operation in order.
    pub fn trace(&self) -> u64 {
        self.0.borrow().trace
    }

    /// The test connects to `address` as if from `from`.
    pub fn connect(&self, address: SocketAddr, from: &str) -> Raw {
        let mut inner = self.0.borrow_mut();
        let stream = inner.open_stream(None, None);
        let from = from.parse().unwrap();
        inner.listeners.get_mut(&address).expect("somebody listens").backlog.push_back((stream, from));
        Raw { hub: self.clone(), stream, side: 0 }
    }

    /// The test listens on `address`.
    pub fn listen(&self, address: SocketAddr) {
        let listening = Listening { host: None, accept: None, backlog: VecDeque::new() };
        self.0.borrow_mut().listeners.insert(address, listening);
    }

    /// The next connection that was made to `address`, on which the test listens.
    pub fn accept(&self, address: SocketAddr) -> Option<Raw> {
        let mut inner = self.0.borrow_mut();
        let (stream, _) = inner.listeners.get_mut(&address)?.backlog.pop_front()?;
        Some(Raw { hub: self.clone(), stream, side: 1 })
    }
}

impl Inner {
    fn done(&mut self, host: usize, id: LinkOpId, result: Result<LinkOutput<AlignedBuf>, LinkError>) {
        self.hosts[host].done.push_back(LinkDone { id, result });
    }

    fn open_stream(&mut self, dialer: Option<usize>, acceptor: Option<usize>) -> usize {
        let end = |host| End { host, ..End::default() };
        self.streams.push([end(dialer), end(acceptor)]);
        self.streams.len() - 1
    }

    fn submit(&mut self, host: usize, id: LinkOpId, op: LinkOp<AlignedBuf>) {
        let (kind, size) = match &op {
            LinkOp::Listen { .. } => (1, 0),
            LinkOp::Accept { .. } => (2, 0),
            LinkOp::Dial { .. } => (3, 0),
            LinkOp::Recv { into: RecvInto::Bytes { range, .. }, .. } => (4, range.len()),
            LinkOp::Recv { into: RecvInto::Block { range, .. }, .. } => (5, range.len()),
            LinkOp::Send { parts, .. } => (6, parts.iter().map(|part| part.bytes().len()).sum()),
            LinkOp::Close { .. } => (7, 0),
        };
        for number in [host as u64, id.0, kind, size as u64] {
            self.trace = self.trace.rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number;
        }
        match op {
            LinkOp::Listen { address } => {
                let listening = Listening { host: Some(host), accept: None, backlog: VecDeque::new() };
                if self.listeners.contains_key(&address) {
                    return self.done(host, id, Err(error(LinkErrorKind::AddressUnavailable)));
                }
                self.listeners.insert(address, listening);
                let listener = ListenerId(u64::from(address.port()));
                self.done(host, id, Ok(LinkOutput::Listening { listener, address }));
            }
            LinkOp::Accept { listener } => {
                let found = self.listeners.iter_mut().find(|(at, _)| u64::from(at.port()) == listener.0);
                let Some((_, listening)) = found else {
                    return self.done(host, id, Err(error(LinkErrorKind::Other)));
                };
                assert!(listening.accept.replace(id).is_none(), "one accept at a time");
            }
            LinkOp::Dial { address } => {
                self.hosts[host].dials.push(address);
                if self.silent.contains(&address) {
                    return self.unanswered.push((host, id));
                }
                let Some(acceptor) = self.listeners.get(&address).map(|listening| listening.host) else {
                    return self.done(host, id, Err(error(LinkErrorKind::Disconnected)));
                };
                let stream = self.open_stream(Some(host), acceptor);
                let from = SocketAddr::from(([127, 0, 0, 1], 40_000));
                self.listeners
                    .entry(address)
                    .and_modify(|listening| listening.backlog.push_back((stream, from)));
                let connection = ConnectionId(stream as u64 * 2);
                self.done(host, id, Ok(LinkOutput::Dialed { connection }));
            }
            LinkOp::Recv { connection, mut into } => {
                assert!(!into.target().is_empty(), "a receive has room");
                match self.usable(connection) {
                    Ok(end) => assert!(end.recv.replace((id, into)).is_none(), "one receive at a time"),
                    Err(kind) => self.done(host, id, Err(error(kind))),
                }
            }
            LinkOp::Send { connection, parts } => {
                self.hosts[host].sends += 1;
                self.hosts[host].parts += parts.len();
                assert!(!parts.is_empty() && parts.iter().all(|part| !part.bytes().is_empty()));
                let mut bytes = VecDeque::new();
                parts.iter().for_each(|part| bytes.extend(part.bytes()));
                match self.usable(connection) {
                    Ok(end) => {
                        assert!(
                            end.send.replace(Sending { id, parts, bytes }).is_none(),
                            "one send at a time"
                        )
                    }
                    Err(kind) => self.done(host, id, Err(error(kind))),
                }
            }
            LinkOp::Close { connection } => {
                let end = &mut self.streams[connection.0 as usize / 2][connection.0 as usize % 2];
                assert!(!std::mem::replace(&mut end.closed, true), "closed once");
                let (recv, send) = (end.recv.take(), end.send.take());
                let under_way = recv.map(|recv| recv.0).into_iter().chain(send.map(|send| send.id));
                for id in under_way {
                    self.done(host, id, Err(error(LinkErrorKind::Closed)));
                }
                if self.hold_closes {
                    self.held_closes.push((host, id));
                } else {
                    self.done(host, id, Ok(LinkOutput::Closed));
                }
            }
        }
    }

    fn usable(&mut self, connection: ConnectionId) -> Result<&mut End, LinkErrorKind> {
        let end = &mut self.streams[connection.0 as usize / 2][connection.0 as usize % 2];
        match (end.closed, end.reset) {
            (true, _) => Err(LinkErrorKind::Closed),
            (false, true) => Err(LinkErrorKind::Disconnected),
            (false, false) => Ok(end),
        }
    }

    fn reset(&mut self, stream: usize) {
        for side in 0..2 {
            let end = &mut self.streams[stream][side];
            end.reset = true;
            end.inbox.clear();
            let (recv, send) = (end.recv.take(), end.send.take());
            let Some(host) = end.host else { continue };
            let under_way = recv.map(|recv| recv.0).into_iter().chain(send.map(|send| send.id));
            for id in under_way {
                self.done(host, id, Err(error(LinkErrorKind::Disconnected)));
            }
        }
    }

    /// Moves what can move: a piece per receive, a connection per accept.
    fn pump(&mut self) {
        for address in self.listeners.keys().copied().collect::<Vec<_>>() {
            let listening = self.listeners.get_mut(&address).expect("just listed");
            let (Some(host), Some(id)) = (listening.host, listening.accept) else { continue };
            if let Some(kind) = self.accept_errors.get_mut(&address).and_then(VecDeque::pop_front) {
                listening.accept = None;
                self.done(host, id, Err(error(kind)));
            } else if let Some((stream, remote)) = listening.backlog.pop_front() {
                listening.accept = None;
                self.streams[stream][1].host = Some(host);
                let connection = ConnectionId(stream as u64 * 2 + 1);
                self.done(host, id, Ok(LinkOutput::Accepted { connection, remote }));
            }
        }
        for stream in 0..self.streams.len() {
            for side in 0..2 {
                self.pump_end(stream, side);
            }
        }
    }

    fn pump_end(&mut self, stream: usize, side: usize) {
        let window_bytes = self.window_bytes;
        let ends = &mut self.streams[stream];
        let room = window_bytes.saturating_sub(ends[1 - side].inbox.len());
        if let Some(sending) = &mut ends[side].send {
            let count = room.min(sending.bytes.len());
            let moved: Vec<u8> = sending.bytes.drain(..count).collect();
            let complete = sending.bytes.is_empty();
            let other = &mut ends[1 - side];
            if !other.closed {
                other.inbox.extend(moved);
            }
            if complete && let (Some(host), Some(mut sent)) = (ends[side].host, ends[side].send.take()) {
                SendPart::let_go_of_blocks(&mut sent.parts);
                self.done(host, sent.id, Ok(LinkOutput::Sent { parts: sent.parts }));
            }
        }
        let ends = &mut self.streams[stream];
        let ended = ends[1 - side].closed;
        let end = &mut ends[side];
        if end.recv.is_none() || end.host.is_none() || (end.inbox.is_empty() && !ended) {
            return;
        }
        let Some((id, mut into)) = end.recv.take() else { return };
        let target = into.target();
        let mut count = end.inbox.len().min(target.len()).min(self.chunk_bytes_max);
        if let Some(random) = &mut self.random
            && count > 0
        {
            count = 1 + random.below(count);
        }
        let (front, back) = end.inbox.as_slices();
        let first = count.min(front.len());
        target[..first].copy_from_slice(&front[..first]);
        target[first..count].copy_from_slice(&back[..count - first]);
        end.inbox.drain(..count);
        let host = end.host.expect("looked at above");
        self.done(host, id, Ok(LinkOutput::Received { into, bytes: count }));
    }
}

impl Link for MemoryLink {
    type Buf = AlignedBuf;

    fn submit(&mut self, id: LinkOpId, op: LinkOp<AlignedBuf>) {
        self.hub.0.borrow_mut().submit(self.host, id, op);
    }

    fn poll(&mut self, done: &mut Vec<LinkDone<AlignedBuf>>) {
        let mut inner = self.hub.0.borrow_mut();
        inner.pump();
        done.extend(inner.hosts[self.host].done.drain(..));
    }
}

/// An end of a stream that the test drives.
pub struct Raw {
    hub: Hub,
    pub stream: usize,
    side: usize,
}

impl Raw {
    pub fn write(&self, bytes: &[u8]) {
        let mut inner = self.hub.0.borrow_mut();
        let other = &mut inner.streams[self.stream][1 - self.side];
        if !other.closed {
            other.inbox.extend(bytes);
        }
    }

    /// All that arrived.
    pub fn read(&self) -> Vec<u8> {
        self.hub.0.borrow_mut().streams[self.stream][self.side].inbox.drain(..).collect()
    }

    pub fn close(&self) {
        self.hub.0.borrow_mut().streams[self.stream][self.side].closed = true;
    }

    /// Whether the other side closed.
    pub fn is_closed(&self) -> bool {
        self.hub.0.borrow().streams[self.stream][1 - self.side].closed
    }

    /// The handshake message that arrived.
    pub fn read_handshake(&self) -> Option<Handshake> {
        let bytes = self.read();
        let message: &[u8; HANDSHAKE_BYTES] = bytes.as_slice().try_into().ok()?;
        Handshake::decode(message).ok()
    }

    /// A frame of the given sequence number.
    pub fn write_frame(&self, session: u64, sequence: u64, kind: u16, body: &[u8], attachment: &[u8]) {
        self.write(&frame(session, sequence, kind, body, attachment));
    }
}

pub fn frame(session: u64, sequence: u64, kind: u16, body: &[u8], attachment: &[u8]) -> Vec<u8> {
    let header = Header {
        version: 1,
        kind,
        group: GROUP,
        body_bytes: body.len() as u32,
        attachment_bytes: attachment.len() as u32,
        sequence,
        session: Session(session),
        body_crc: crc32c(body),
    };
    [&header.encode()[..], body, attachment].concat()
}

/// A hello of node `from` to node `to` that is right in every respect.
pub fn hello(from: u64, to: u64, session: u64) -> Handshake {
    Handshake {
        kind: HandshakeKind::Hello,
        version_min: 1,
        version_max: 1,
        lane: 0,
        format_fingerprint: FINGERPRINT,
        cluster: CLUSTER,
        from: NodeId(from),
        to: NodeId(to),
        incarnation: incarnation(from),
        incarnation_expected: Incarnation(0),
        session: Session(session),
        features: from,
    }
}

// ---- Nodes

pub fn address(node: u64) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7000 + node as u16))
}

pub fn incarnation(node: u64) -> Incarnation {
    Incarnation(0x1000 + u128::from(node))
}

/// The session number that a node starts from.
pub fn first_session(node: u64) -> u64 {
    (1 << 32) | (node << 16)
}

pub fn config(node: u64, limits: NetLimits) -> NetConfig {
    NetConfig {
        node: NodeId(node),
        cluster: CLUSTER,
        incarnation: incarnation(node),
        format_fingerprint: FINGERPRINT,
        features: node,
        listen: address(node),
        session_epoch_start: first_session(node),
        seed: node,
        limits,
        frame_caps: vec![
            FrameCap { kind: NOTE, body_bytes_max: 256, attachment_bytes_max: 0 },
            FrameCap { kind: BATCH, body_bytes_max: 64, attachment_bytes_max: 100_000 },
        ],
    }
}

pub fn peer(node: u64) -> PeerConfig {
    PeerConfig { id: NodeId(node), address: address(node), incarnation: None }
}

/// An event, with the content of its frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    Listening,
    ListenFailed,
    Connected { peer: u64, session: u64, incarnation: Incarnation },
    Disconnected { peer: u64, session: u64, cause: DisconnectCause },
    Frame { peer: u64, session: u64, kind: u16, body: Vec<u8>, attachment: Vec<u8> },
    Rejected(Rejection),
    Referred(u64, Option<Referral>),
    Asked(u64, SocketAddr),
}

pub struct Blocks {
    pub pool: Pool<AlignedBuf>,
    pub deny: bool,
}

impl BlockSource<AlignedBuf> for Blocks {
    fn block(&mut self, bytes: usize) -> Option<Block<AlignedBuf>> {
        if self.deny {
            return None;
        }
        let mut block = self.pool.take(bytes, |bytes| Ok::<_, Infallible>(AlignedBuf::zeroed(bytes))).ok()?;
        block.buffer_mut().bytes_mut().fill(0xee);
        Some(block)
    }
}

pub struct Node {
    pub net: Network<MemoryLink>,
    pub link: MemoryLink,
    pub seen: Vec<Seen>,
    pub blocks: Blocks,
    /// Frames delivered in the fullest turn.
    pub turn_frames_max: usize,
}

impl Node {
    pub fn new(hub: &Hub, config: NetConfig, peers: Vec<PeerConfig>) -> Self {
        Self {
            net: Network::new(config, peers).unwrap(),
            link: hub.link(),
            seen: Vec::new(),
            blocks: Blocks { pool: Pool::new(1 << 20), deny: false },
            turn_frames_max: 0,
        }
    }

    pub fn turn(&mut self, now: u64) {
        let mut done = Vec::new();
        let mut events = VecDeque::new();
        self.link.poll(&mut done);
        for completion in done {
            self.net.handle(now, &mut self.link, completion, &mut self.blocks, &mut events);
        }
        self.net.advance(now, &mut self.link, &mut self.blocks, &mut events);
        self.net.flush(&mut self.link);
        let frames = events.iter().filter(|event| matches!(event, NetEvent::Frame { .. })).count();
        self.turn_frames_max = self.turn_frames_max.max(frames);
        self.seen.extend(events.into_iter().map(see));
    }

    pub fn note(&mut self, peer: u64, body: &[u8]) -> Result<(), ringraft_net::SendError> {
        self.net.send(NodeId(peer), NOTE, GROUP, body, None)
    }

    pub fn batch(
        &mut self,
        peer: u64,
        body: &[u8],
        attachment: &[u8],
    ) -> Result<(), ringraft_net::SendError> {
        let at = ATTACHMENT_OFFSET;
        let block = shared(&self.blocks.pool, attachment);
        self.net.send(NodeId(peer), BATCH, GROUP, body, Some((block, at..at + attachment.len())))
    }

    pub fn session(&self, peer: u64) -> Option<u64> {
        self.net.peer_status(NodeId(peer)).unwrap().session.map(|session| session.0)
    }

    pub fn frames(&self) -> impl Iterator<Item = (u64, Vec<u8>, Vec<u8>)> {
        self.seen.iter().filter_map(|seen| match seen {
            Seen::Frame { peer, body, attachment, .. } => Some((*peer, body.clone(), attachment.clone())),
            _ => None,
        })
    }

    pub fn causes(&self) -> Vec<DisconnectCause> {
        let causes = self.seen.iter().filter_map(|seen| match seen {
            Seen::Disconnected { cause, .. } => Some(cause.clone()),
            _ => None,
        });
        causes.collect()
    }

    pub fn rejections(&self) -> Vec<Rejection> {
        let rejections = self.seen.iter().filter_map(|seen| match seen {
            Seen::Rejected(rejection) => Some(rejection.clone()),
            _ => None,
        });
        rejections.collect()
    }
}

fn shared(pool: &Pool<AlignedBuf>, attachment: &[u8]) -> SharedBlock<AlignedBuf> {
    let bytes = ATTACHMENT_OFFSET + attachment.len();
    let mut block = pool.take(bytes, |bytes| Ok::<_, Infallible>(AlignedBuf::zeroed(bytes))).unwrap();
    block[ATTACHMENT_OFFSET..bytes].copy_from_slice(attachment);
    block.share()
}

fn see(event: NetEvent<AlignedBuf>) -> Seen {
    match event {
        NetEvent::Listening { .. } => Seen::Listening,
        NetEvent::ListenFailed { .. } => Seen::ListenFailed,
        NetEvent::PeerConnected { peer, session, incarnation, features } => {
            assert_eq!(features, peer.get(), "every node announces its own number");
            Seen::Connected { peer: peer.get(), session: session.0, incarnation }
        }
        NetEvent::PeerDisconnected { peer, session, cause } => {
            Seen::Disconnected { peer: peer.get(), session: session.0, cause }
        }
        NetEvent::Frame { peer, session, frame } => {
            assert_eq!(frame.group, GROUP);
            assert_eq!(frame.body().as_ptr() as usize % ringraft_net::BODY_ALIGNMENT, 0);
            let attachment = frame.attachment.as_ref().map_or(Vec::new(), |attachment| {
                let (block, end) = (&attachment.block, ATTACHMENT_OFFSET + attachment.bytes);
                assert!(
                    block[..ATTACHMENT_OFFSET].iter().all(|byte| *byte == 0xee),
                    "before it nothing changes"
                );
                assert!(block[end..].iter().all(|byte| *byte == 0xee), "nor after it");
                block[ATTACHMENT_OFFSET..end].to_vec()
            });
            let body = frame.body().to_vec();
            Seen::Frame { peer: peer.get(), session: session.0, kind: frame.kind, body, attachment }
        }
        NetEvent::Rejected { reason, .. } => Seen::Rejected(reason),
        NetEvent::Referred { by, to } => Seen::Referred(by.get(), to),
        NetEvent::Asked { by, address } => Seen::Asked(by.get(), address),
    }
}

pub struct World {
    pub hub: Hub,
    pub now: u64,
    pub step_ns: u64,
    pub nodes: Vec<Node>,
}

impl World {
    /// Nodes 1 to `count`, all peers of each other.
    pub fn new(count: u64, limits: &NetLimits) -> Self {
        let hub = Hub::new();
        let others = |node| (1..=count).filter(move |other| *other != node).map(peer).collect();
        let nodes =
            (1..=count).map(|node| Node::new(&hub, config(node, limits.clone()), others(node))).collect();
        Self { hub, now: SECOND, step_ns: MILLISECOND, nodes }
    }

    /// Node 1 alone, with nodes 2 to `count` as peers that the test plays.
    pub fn alone(count: u64, limits: &NetLimits) -> Self {
        let mut world = Self::new(count, limits);
        world.nodes.truncate(1);
        world.run(2);
        world
    }

    pub fn node(&mut self, node: u64) -> &mut Node {
        &mut self.nodes[node as usize - 1]
    }

    pub fn run(&mut self, turns: usize) {
        for _ in 0..turns {
            self.now += self.step_ns;
            for node in &mut self.nodes {
                node.turn(self.now);
            }
        }
    }

    pub fn run_for(&mut self, nanoseconds: u64) {
        self.run(nanoseconds.div_ceil(self.step_ns) as usize);
    }

    #[track_caller]
    pub fn run_until(&mut self, what: &str, mut reached: impl FnMut(&mut Self) -> bool) {
        for _ in 0..100_000 {
            if reached(self) {
                return;
            }
            self.run(1);
        }
        panic!("not reached: {what}");
    }

    #[track_caller]
    pub fn connect_all(&mut self) {
        self.run_until("sessions between all", |world| {
            let count = world.nodes.len() as u64;
            let node = |id: u64| &world.nodes[id as usize - 1];
            (1..=count).all(|a| (1..=count).all(|b| a == b || node(a).session(b).is_some()))
        });
    }

    /// The test opens a session with node 1 as `from`; what node 1 answers is taken off the stream.
    #[track_caller]
    pub fn raw_session(&mut self, from: u64, session: u64) -> Raw {
        let raw = self.hub.connect(address(1), "127.0.0.1:50000");
        raw.write(&hello(from, 1, session).encode());
        self.run(4);
        let welcome = raw.read_handshake().expect("an answer");
        assert_eq!(welcome.kind, HandshakeKind::Welcome);
        raw
    }
}

pub fn bytes(count: usize, start: usize) -> Vec<u8> {
    (0..count).map(|at| (at * 31 + start + at / 251) as u8).collect()
}

pub const FRAME_HEADER_BYTES: usize = HEADER_BYTES;
