//! A network in memory: byte streams that are late, stall, break in the middle and sometimes end in silence.
//!
//! The [`Fabric`] is the network between all machines; [`SimLink`] is one process's handle on it, a backend of the
//! `Link` seam. A connection is two pipes, one a direction. Bytes enter a pipe while it has room, travel in chunks
//! of random size, and arrive in order. One event is one chunk.
//!
//! - A directed link that is **cut** holds its bytes up, and the news of freed room, which travel the other way.
//!   While it is cut, each end may time out on its own and see a reset; after it heals, the bytes go on.
//! - A **reset** ends a connection behind a random byte.
//! - A **killed** process's connections end orderly or by reset, as its kernel sees fit. A machine that **loses
//!   power** says nothing: its peers time out, or are reset when they reach it after its return.
//! - A dial is refused where nobody listens, and times out where nobody is or a link of the pair is cut.

use super::buffer::SimBuf;
use super::context::{Context, MICROSECOND, MILLISECOND, Time};
use super::coverage::Mark;
use super::disk::Crash;
use super::rng::Rng;
use super::trace::What;

use ringraft_net::link::{
    ConnectionId, Link, LinkDone, LinkError, LinkErrorKind, LinkOp, LinkOpId, LinkOutput, ListenerId,
    RecvInto, SendPart,
};
use std::cell::RefCell;
use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeSet, BinaryHeap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::rc::Rc;

/// Speeds and bounds of the network.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    /// One way, typically.
    pub latency: Time,
    /// Transfer time of 1024 bytes.
    pub kilobyte: Time,
    /// Bytes that a pipe holds before its sender waits.
    pub pipe_bytes_max: usize,
    /// Largest chunk.
    pub chunk_bytes_max: usize,
    /// Connections that wait for an accept.
    pub backlog_max: usize,
    /// After what time a dial into silence fails.
    pub dial_timeout: RangeInclusive<Time>,
    /// After what time of silence an end gives up.
    pub silence_timeout: RangeInclusive<Time>,
    /// How often, in a million, a dial fails for no reason.
    pub dial_failure_ppm: u32,
    /// How often, in a million, a chunk has a bit flipped that no transport checksum saw.
    pub corrupt_chunk_ppm: u32,
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            latency: 40 * MICROSECOND,
            kilobyte: MICROSECOND,
            pipe_bytes_max: 256 << 10,
            chunk_bytes_max: 64 << 10,
            backlog_max: 16,
            dial_timeout: 200 * MILLISECOND..=1_000 * MILLISECOND,
            silence_timeout: 100 * MILLISECOND..=2_000 * MILLISECOND,
            dial_failure_ppm: 0,
            corrupt_chunk_ppm: 0,
        }
    }
}

mod tap;
use tap::{Heard, Tap};

/// The network.
pub struct Fabric {
    context: Rc<Context>,
    rng: Rng,
    config: LinkConfig,
    hosts: Vec<Host>,
    /// `cut[from][to]`.
    cut: Vec<Vec<bool>>,
    /// When each was cut last.
    cut_at: Vec<Vec<Time>>,
    /// How much longer each takes than others.
    slow: Vec<Vec<Time>>,
    /// By serial number, from 0; never used again.
    connections: Vec<Option<Box<Connection>>>,
    /// Serial numbers of the present ones, in order.
    present: Vec<usize>,
    listeners: u64,
    queue: BinaryHeap<Scheduled>,
    scheduled: u64,
    /// Who has told whom, in which term, to campaign; as of what has arrived.
    told_to_campaign: BTreeSet<(usize, usize, u64)>,
}

struct Host {
    up: bool,
    life: u32,
    port: u16,
    listeners: Vec<Listener>,
    done: Vec<(u8, LinkDone<SimBuf>)>,
}

struct Listener {
    id: ListenerId,
    address: SocketAddr,
    accept: Option<LinkOpId>,
    backlog: VecDeque<usize>,
}

struct Connection {
    ends: [End; 2],
    /// `pipes[e]` carries what `ends[e]` sends.
    pipes: [Pipe; 2],
}

struct End {
    host: usize,
    life: u32,
    remote: SocketAddr,
    phase: Phase,
    receiving: Option<(LinkOpId, RecvInto<SimBuf>)>,
    sending: Option<Sending>,
    /// The peer has sent its last byte, and it has arrived.
    finished: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// Ended from outside: operations fail.
    Reset,
    /// Being closed here.
    Closing(LinkOpId),
    /// Closed here, or its process is gone.
    Gone,
}

struct Sending {
    id: LinkOpId,
    parts: Vec<SendPart<SimBuf>>,
    part: usize,
    sent: usize,
}

#[derive(Default)]
struct Pipe {
    /// Sent and not read: the first `arrived` can be read.
    bytes: VecDeque<u8>,
    arrived: usize,
    travelling: VecDeque<(Time, Travelling)>,
    last_due: Time,
    /// An event for the first of `travelling` is in the queue.
    scheduled: bool,
    /// The first of `travelling` waits for a cut link or a machine without power.
    stalled: bool,
    /// Room that was freed, of which the sender has not heard because the way back is cut.
    owed: usize,
    tap: Tap,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Travelling {
    Bytes(usize),
    Finish,
    Reset,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Event {
    Arrive {
        serial: usize,
        end: usize,
    },
    /// A reset that the peer's kernel sent.
    Refused {
        serial: usize,
        end: usize,
    },
    /// An end has heard nothing for long.
    Silent {
        serial: usize,
        end: usize,
    },
    CloseDone {
        serial: usize,
        end: usize,
    },
    DialArrives {
        host: usize,
        life: u32,
        id: LinkOpId,
        address: SocketAddr,
    },
    Dialed {
        serial: usize,
        id: LinkOpId,
    },
    DialFails {
        host: usize,
        life: u32,
        id: LinkOpId,
    },
}

#[derive(PartialEq, Eq)]
struct Scheduled {
    due: Time,
    sequence: u64,
    event: Event,
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> Ordering {
        Reverse((self.due, self.sequence)).cmp(&Reverse((other.due, other.sequence)))
    }
}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// A process's handle on the network.
pub struct SimLink {
    fabric: Rc<RefCell<Fabric>>,
    host: usize,
    life: u32,
}

impl SimLink {
    /// A handle for the process that starts now on `host`.
    #[must_use]
    pub fn new(fabric: &Rc<RefCell<Fabric>>, host: usize) -> Self {
        Self { fabric: Rc::clone(fabric), host, life: fabric.borrow().hosts[host].life }
    }
}

impl Link for SimLink {
    type Buf = SimBuf;

    fn submit(&mut self, id: LinkOpId, op: LinkOp<SimBuf>) {
        let mut fabric = self.fabric.borrow_mut();
        assert_eq!(fabric.hosts[self.host].life, self.life, "a dead process submits nothing");
        fabric.submit(self.host, id, op);
    }

    fn poll(&mut self, done: &mut Vec<LinkDone<SimBuf>>) {
        let mut fabric = self.fabric.borrow_mut();
        assert_eq!(fabric.hosts[self.host].life, self.life, "a dead process polls nothing");
        fabric.poll(self.host, done);
    }
}

const KINDS: [&str; 6] = ["listen", "accept", "dial", "recv", "send", "close"];
const LISTEN: u8 = 0;
const ACCEPT: u8 = 1;
const DIAL: u8 = 2;
const RECV: u8 = 3;
const SEND: u8 = 4;
const CLOSE: u8 = 5;

/// The name of an operation's kind, as traced. The outcome is in the bits above the lowest four.
pub(super) fn name_of_kind(kind: u64) -> &'static str {
    KINDS.get((kind & 15) as usize).copied().unwrap_or("unknown")
}

/// Whether a traced kind is that of a receive.
pub(super) fn is_receive(kind: u64) -> bool {
    kind & 15 == u64::from(RECV)
}

fn failed(kind: LinkErrorKind, op: u8) -> LinkError {
    LinkError { kind, operation: KINDS[op as usize], os_error: None }
}

/// The IP address of a host.
#[must_use]
pub fn address_of(host: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, (host >> 8) as u8, (host & 255) as u8 + 1))
}

fn host_of(address: SocketAddr) -> Option<usize> {
    let IpAddr::V4(ip) = address.ip() else { return None };
    let [ten, zero, high, low] = ip.octets();
    (ten == 10 && zero == 0 && low > 0).then(|| usize::from(high) << 8 | (usize::from(low) - 1))
}

fn connection_id(serial: usize, end: usize) -> ConnectionId {
    ConnectionId((serial as u64) << 1 | end as u64)
}

fn serial_and_end(connection: ConnectionId) -> (usize, usize) {
    ((connection.0 >> 1) as usize, (connection.0 & 1) as usize)
}

impl Fabric {
    /// A network between `hosts` machines, all up.
    #[must_use]
    pub fn new(context: &Rc<Context>, hosts: usize, rng: Rng, config: LinkConfig) -> Rc<RefCell<Self>> {
        let host = |_| Host { up: true, life: 0, port: 40_000, listeners: Vec::new(), done: Vec::new() };
        Rc::new(RefCell::new(Self {
            context: Rc::clone(context),
            rng,
            config,
            hosts: (0..hosts).map(host).collect(),
            cut: vec![vec![false; hosts]; hosts],
            cut_at: vec![vec![0; hosts]; hosts],
            slow: vec![vec![0; hosts]; hosts],
            connections: Vec::new(),
            present: Vec::new(),
            listeners: 0,
            queue: BinaryHeap::new(),
            scheduled: 0,
            told_to_campaign: BTreeSet::new(),
        }))
    }

    /// Speeds, bounds and fault rates, to be changed at will.
    pub fn config_mut(&mut self) -> &mut LinkConfig {
        &mut self.config
    }

    /// When the next event is due.
    #[must_use]
    pub fn next_due(&self) -> Option<Time> {
        self.queue.peek().map(|scheduled| scheduled.due)
    }

    /// Whether completions wait for `host` to poll them.
    #[must_use]
    pub fn has_done(&self, host: usize) -> bool {
        !self.hosts[host].done.is_empty()
    }

    /// Carries out the next event, which is due.
    pub fn step(&mut self) {
        let Some(Scheduled { event, .. }) = self.queue.pop() else { return };
        match event {
            Event::Arrive { serial, end } => self.arrive(serial, end),
            Event::Refused { serial, end } => {
                let Some(connection) = self.connections[serial].as_ref() else { return };
                let (from, to) = (connection.ends[1 - end].host, connection.ends[end].host);
                if !self.cut[from][to] {
                    self.reset(serial, end);
                }
            }
            Event::Silent { serial, end } => self.silent(serial, end),
            Event::CloseDone { serial, end } => self.close_done(serial, end),
            Event::DialArrives { host, life, id, address } => self.dial_arrives(host, life, id, address),
            Event::Dialed { serial, id } => {
                let Some(connection) = self.connections[serial].as_ref() else { return };
                if connection.ends[0].phase != Phase::Gone {
                    let host = connection.ends[0].host;
                    self.context.cover(Mark::Connected);
                    self.done(
                        host,
                        DIAL,
                        id,
                        Ok(LinkOutput::Dialed { connection: connection_id(serial, 0) }),
                    );
                }
            }
            Event::DialFails { host, life, id } => {
                if self.hosts[host].life == life {
                    self.context.cover(Mark::DialFailed);
                    self.done(host, DIAL, id, Err(failed(LinkErrorKind::Disconnected, DIAL)));
                }
            }
        }
    }

    /// Cuts the link from one host to another. Connections that use it stall; their ends may give up.
    pub fn cut(&mut self, from: usize, to: usize) {
        if std::mem::replace(&mut self.cut[from][to], true) {
            return;
        }
        self.cut_at[from][to] = self.context.now();
        self.context.record(from, What::Cut, to as u64, 0);
        self.context.cover(Mark::LinkCut);
        for position in 0..self.present.len() {
            let serial = self.present[position];
            let Some(connection) = self.connections[serial].as_ref() else { continue };
            let hosts = connection.ends.each_ref().map(|end| end.host);
            if hosts == [from, to] || hosts == [to, from] {
                for end in 0..2 {
                    let due = self.context.now() + self.draw(self.config.silence_timeout.clone());
                    self.schedule(due, Event::Silent { serial, end });
                }
            }
        }
    }

    /// Mends the link from one host to another.
    pub fn heal(&mut self, from: usize, to: usize) {
        if !std::mem::replace(&mut self.cut[from][to], false) {
            return;
        }
        self.context.record(from, What::Heal, to as u64, 0);
        for position in 0..self.present.len() {
            let serial = self.present[position];
            for end in 0..2 {
                let Some(connection) = self.connections[serial].as_mut() else { continue };
                let hosts = connection.ends.each_ref().map(|end| end.host);
                if (hosts[end], hosts[1 - end]) == (from, to) {
                    self.unstall(serial, end);
                }
                if (hosts[1 - end], hosts[end]) == (from, to) {
                    let Some(connection) = self.connections[serial].as_mut() else { continue };
                    connection.pipes[end].owed = 0;
                    self.pump(serial, end);
                }
            }
        }
    }

    /// Whether the link from one host to another is cut.
    #[must_use]
    pub fn is_cut(&self, from: usize, to: usize) -> bool {
        self.cut[from][to]
    }

    /// Until when `to` could hear `from` at the latest: now, or when the link was cut.
    #[must_use]
    pub fn audible_until(&self, from: usize, to: usize) -> Time {
        if self.cut[from][to] { self.cut_at[from][to] } else { self.context.now() }
    }

    /// Whether any link is cut.
    #[must_use]
    pub fn is_partitioned(&self) -> bool {
        self.cut.iter().flatten().any(|cut| *cut)
    }

    /// From now on what goes from one host to another takes so much longer; 0 for as usual.
    pub fn slow_down(&mut self, from: usize, to: usize, by: Time) {
        self.context.record(from, What::LinkSpeed, to as u64, by);
        self.slow[from][to] = by;
    }

    /// Whether one host has told another to campaign, in that term, and was heard.
    #[must_use]
    pub fn has_told_to_campaign(&self, from: usize, to: usize, term: u64) -> bool {
        self.told_to_campaign.contains(&(from, to, term))
    }

    /// One host has told another to campaign, in that term.
    #[cfg(test)]
    pub fn tell_to_campaign(&mut self, from: usize, to: usize, term: u64) {
        self.told_to_campaign.insert((from, to, term));
    }

    /// Mends all links.
    pub fn heal_all(&mut self) {
        for from in 0..self.hosts.len() {
            for to in 0..self.hosts.len() {
                self.slow[from][to] = 0;
                self.heal(from, to);
            }
        }
    }

    /// How many machines there are.
    #[must_use]
    pub fn hosts(&self) -> usize {
        self.hosts.len()
    }

    /// How many connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.present.len()
    }

    /// Breaks the connection at a position below [`Fabric::connections`], each direction behind a random byte of
    /// those that are on their way.
    pub fn break_connection(&mut self, position: usize) {
        let serial = self.present[position];
        self.context.cover(Mark::CutAtByte);
        for end in 0..2 {
            self.break_pipe(serial, end);
        }
    }

    /// The process on `host` ends. After a power cut the machine stays away until [`Fabric::boot`].
    pub fn crash(&mut self, host: usize, how: Crash) {
        let state = &mut self.hosts[host];
        state.life += 1;
        state.listeners.clear();
        state.done.clear();
        state.up = how == Crash::Kill;
        for serial in self.present.clone() {
            for end in 0..2 {
                let Some(connection) = self.connections[serial].as_mut() else { continue };
                let this = &mut connection.ends[end];
                if this.host != host || this.phase == Phase::Gone {
                    continue;
                }
                this.phase = Phase::Gone;
                this.receiving = None;
                this.sending = None;
                if how == Crash::Kill {
                    self.end_pipe(serial, end);
                } else {
                    // What was on its way may still arrive; nothing follows.
                    let due = self.context.now() + self.draw(self.config.silence_timeout.clone());
                    self.schedule(due, Event::Silent { serial, end: 1 - end });
                }
                self.forget_if_gone(serial);
            }
        }
    }

    /// The machine of `host` is back: whatever still waits to reach its former life is refused.
    pub fn boot(&mut self, host: usize) {
        self.hosts[host].up = true;
        for serial in self.present.clone() {
            for end in 0..2 {
                let Some(connection) = self.connections[serial].as_ref() else { continue };
                if connection.ends[1 - end].host == host && !self.cut[connection.ends[end].host][host] {
                    self.unstall(serial, end);
                }
            }
        }
    }

    fn submit(&mut self, host: usize, id: LinkOpId, op: LinkOp<SimBuf>) {
        let (kind, bytes) = match &op {
            LinkOp::Listen { .. } => (LISTEN, 0),
            LinkOp::Accept { .. } => (ACCEPT, 0),
            LinkOp::Dial { .. } => (DIAL, 0),
            LinkOp::Recv { into: RecvInto::Bytes { range, .. } | RecvInto::Block { range, .. }, .. } => {
                (RECV, range.len())
            }
            LinkOp::Send { parts, .. } => (SEND, parts.iter().map(|part| part.bytes().len()).sum()),
            LinkOp::Close { .. } => (CLOSE, 0),
        };
        self.context.record(host, What::LinkSubmit, u64::from(kind), bytes as u64);
        match op {
            LinkOp::Listen { address } => {
                let result = self.listen(host, address);
                self.done(host, LISTEN, id, result);
            }
            LinkOp::Accept { listener } => self.accept(host, id, listener),
            LinkOp::Dial { address } => {
                let due = self.context.now() + self.rng.around(self.config.latency);
                let life = self.hosts[host].life;
                self.schedule(due, Event::DialArrives { host, life, id, address });
            }
            LinkOp::Recv { connection, into } => {
                assert!(bytes > 0, "a receive has room");
                let (serial, end) = serial_and_end(connection);
                match self.usable(host, serial, end) {
                    Some(this) => {
                        assert!(this.receiving.is_none(), "one receive at a time");
                        this.receiving = Some((id, into));
                        self.deliver(serial, end);
                    }
                    None => self.done(host, RECV, id, Err(failed(LinkErrorKind::Other, RECV))),
                }
            }
            LinkOp::Send { connection, mut parts } => {
                let (serial, end) = serial_and_end(connection);
                match self.usable(host, serial, end) {
                    Some(this) if this.phase == Phase::Open => {
                        assert!(this.sending.is_none(), "one send at a time");
                        this.sending = Some(Sending { id, parts, part: 0, sent: 0 });
                        self.pump(serial, end);
                    }
                    Some(_) => {
                        parts.clear();
                        self.done(host, SEND, id, Err(failed(LinkErrorKind::Disconnected, SEND)));
                    }
                    None => self.done(host, SEND, id, Err(failed(LinkErrorKind::Other, SEND))),
                }
            }
            LinkOp::Close { connection } => {
                let (serial, end) = serial_and_end(connection);
                if self.usable(host, serial, end).is_none() {
                    self.done(host, CLOSE, id, Err(failed(LinkErrorKind::Other, CLOSE)));
                    return;
                }
                let open = self.connection(serial).ends[end].phase == Phase::Open;
                self.connection(serial).ends[end].phase = Phase::Closing(id);
                if open {
                    self.end_pipe(serial, end);
                }
                let due = self.context.now() + self.rng.around(5 * MICROSECOND);
                self.schedule(due, Event::CloseDone { serial, end });
            }
        }
    }

    fn poll(&mut self, host: usize, done: &mut Vec<LinkDone<SimBuf>>) {
        for (kind, completion) in self.hosts[host].done.drain(..) {
            let (outcome, number) = match &completion.result {
                Ok(LinkOutput::Received { bytes, .. }) => (0, *bytes as u64),
                Ok(LinkOutput::Accepted { connection, .. } | LinkOutput::Dialed { connection }) => {
                    (0, connection.0)
                }
                Ok(_) => (0, 0),
                Err(error) => (1 + error.kind as u64, 0),
            };
            self.context.record(host, What::LinkDone, u64::from(kind) | outcome << 4, number);
            done.push(completion);
        }
    }

    fn listen(&mut self, host: usize, address: SocketAddr) -> Result<LinkOutput<SimBuf>, LinkError> {
        let mut address = address;
        if address.ip().is_unspecified() {
            address.set_ip(address_of(host));
        }
        let taken = |state: &Host, port| state.listeners.iter().any(|other| other.address.port() == port);
        if address.ip() != address_of(host) || taken(&self.hosts[host], address.port()) {
            return Err(failed(LinkErrorKind::AddressUnavailable, LISTEN));
        }
        if address.port() == 0 {
            address.set_port(self.ephemeral_port(host));
        }
        self.listeners += 1;
        let id = ListenerId(self.listeners);
        self.hosts[host].listeners.push(Listener { id, address, accept: None, backlog: VecDeque::new() });
        Ok(LinkOutput::Listening { listener: id, address })
    }

    fn accept(&mut self, host: usize, id: LinkOpId, listener: ListenerId) {
        let Some(position) = self.hosts[host].listeners.iter().position(|other| other.id == listener) else {
            self.done(host, ACCEPT, id, Err(failed(LinkErrorKind::Other, ACCEPT)));
            return;
        };
        let listener = &mut self.hosts[host].listeners[position];
        assert!(listener.accept.is_none(), "one accept at a time");
        match listener.backlog.pop_front() {
            Some(serial) => self.accepted(host, id, serial),
            None => listener.accept = Some(id),
        }
    }

    fn accepted(&mut self, host: usize, id: LinkOpId, serial: usize) {
        let remote = self.connection(serial).ends[1].remote;
        let accepted = LinkOutput::Accepted { connection: connection_id(serial, 1), remote };
        self.done(host, ACCEPT, id, Ok(accepted));
    }

    fn dial_arrives(&mut self, host: usize, life: u32, id: LinkOpId, address: SocketAddr) {
        if self.hosts[host].life != life {
            return;
        }
        let now = self.context.now();
        let target = host_of(address).filter(|target| *target < self.hosts.len());
        let reachable = target.is_some_and(|target| {
            self.hosts[target].up && !self.cut[host][target] && !self.cut[target][host]
        });
        let Some(target) = target.filter(|_| reachable) else {
            let due = now + self.draw(self.config.dial_timeout.clone());
            self.schedule(due, Event::DialFails { host, life, id });
            return;
        };
        let back = now + self.rng.around(self.config.latency);
        let backlog_max = self.config.backlog_max;
        let unlucky = self.rng.chance(self.config.dial_failure_ppm);
        let listener = self.hosts[target].listeners.iter().position(|listener| {
            listener.address.port() == address.port() && listener.backlog.len() < backlog_max
        });
        let Some(listener) = listener.filter(|_| !unlucky) else {
            self.schedule(back, Event::DialFails { host, life, id });
            return;
        };

        let serial = self.connections.len();
        let local = SocketAddr::new(address_of(host), self.ephemeral_port(host));
        let end = |host: usize, life, remote| End {
            host,
            life,
            remote,
            phase: Phase::Open,
            receiving: None,
            sending: None,
            finished: false,
        };
        let ends = [end(host, life, address), end(target, self.hosts[target].life, local)];
        self.connections.push(Some(Box::new(Connection { ends, pipes: [Pipe::default(), Pipe::default()] })));
        self.present.push(serial);
        self.schedule(back, Event::Dialed { serial, id });
        let listener = &mut self.hosts[target].listeners[listener];
        match listener.accept.take() {
            Some(accept) => self.accepted(target, accept, serial),
            None => listener.backlog.push_back(serial),
        }
    }

    fn ephemeral_port(&mut self, host: usize) -> u16 {
        let port = &mut self.hosts[host].port;
        *port = if *port == u16::MAX { 40_001 } else { *port + 1 };
        *port
    }

    /// An end on which its process may submit.
    fn usable(&mut self, host: usize, serial: usize, end: usize) -> Option<&mut End> {
        let life = self.hosts[host].life;
        let this = &mut self.connections.get_mut(serial)?.as_mut()?.ends[end];
        let usable = matches!(this.phase, Phase::Open | Phase::Reset);
        (usable && this.host == host && this.life == life).then_some(this)
    }

    fn connection(&mut self, serial: usize) -> &mut Connection {
        self.connections[serial].as_mut().expect("a connection lives until both its ends are gone")
    }

    /// Moves bytes of the pending send of `end` into its pipe, as many as fit.
    fn pump(&mut self, serial: usize, end: usize) {
        let pipe_bytes_max = self.config.pipe_bytes_max;
        let connection = self.connections[serial].as_mut().expect("the connection is there");
        let this = &mut connection.ends[end];
        let Some(sending) = &mut this.sending else { return };
        if this.phase != Phase::Open {
            return;
        }
        let pipe = &mut connection.pipes[end];
        let room = pipe_bytes_max.saturating_sub(pipe.bytes.len() + pipe.owed);
        let mut moved = 0;
        while let Some(part) = sending.parts.get(sending.part) {
            let bytes = &part.bytes()[sending.sent..];
            let count = bytes.len().min(room - moved);
            pipe.bytes.extend(&bytes[..count]);
            moved += count;
            if count < bytes.len() {
                sending.sent += count;
                break;
            }
            sending.part += 1;
            sending.sent = 0;
        }
        let complete = sending.part == sending.parts.len();
        let host = this.host;
        if complete {
            let mut sending = this.sending.take().expect("just seen");
            // The memory of headers and bodies serves again.
            sending.parts.retain(|part| matches!(part, SendPart::Bytes(_)));
            self.done(host, SEND, sending.id, Ok(LinkOutput::Sent { parts: sending.parts }));
        } else {
            self.context.cover(Mark::SendWaited);
        }
        while moved > 0 {
            let chunk = self.chunk_of(moved);
            moved -= chunk;
            self.travel(serial, end, Travelling::Bytes(chunk));
        }
    }

    fn chunk_of(&mut self, bytes: usize) -> usize {
        let most = bytes.min(self.config.chunk_bytes_max);
        match self.rng.below(16) {
            0..=11 => most,
            12..=14 => 1 + self.rng.index(most),
            _ => 1 + self.rng.index(most.min(16)),
        }
    }

    /// Sends something down the pipe of `end`, behind all that travels already.
    fn travel(&mut self, serial: usize, end: usize, what: Travelling) {
        let transfer = match what {
            Travelling::Bytes(bytes) => bytes as u64 * self.config.kilobyte / 1024,
            _ => 0,
        };
        let due = self.context.now() + self.rng.around(self.config.latency) + transfer;
        let ends = &self.connection(serial).ends;
        let (from, to) = (ends[end].host, ends[1 - end].host);
        let due = due + self.slow[from][to];
        let pipe = &mut self.connection(serial).pipes[end];
        let due = due.max(pipe.last_due);
        pipe.last_due = due;
        pipe.travelling.push_back((due, what));
        self.schedule_pipe(serial, end);
    }

    fn schedule_pipe(&mut self, serial: usize, end: usize) {
        let pipe = &mut self.connection(serial).pipes[end];
        if pipe.scheduled || pipe.stalled {
            return;
        }
        if let Some((due, _)) = pipe.travelling.front() {
            let due = *due;
            pipe.scheduled = true;
            self.schedule(due.max(self.context.now()), Event::Arrive { serial, end });
        }
    }

    fn unstall(&mut self, serial: usize, end: usize) {
        let latency = self.rng.around(self.config.latency);
        let now = self.context.now();
        let Some(connection) = self.connections[serial].as_mut() else { return };
        let pipe = &mut connection.pipes[end];
        if std::mem::replace(&mut pipe.stalled, false) {
            if let Some((due, _)) = pipe.travelling.front_mut() {
                *due = now + latency;
                pipe.last_due = pipe.last_due.max(*due);
            }
            self.schedule_pipe(serial, end);
        }
    }

    /// The first of what travels in the pipe of `end` has come to the far end.
    fn arrive(&mut self, serial: usize, end: usize) {
        let Some(connection) = self.connections[serial].as_mut() else { return };
        let (from, to) = (connection.ends[end].host, connection.ends[1 - end].host);
        let pipe = &mut connection.pipes[end];
        pipe.scheduled = false;
        let Some((due, what)) = pipe.travelling.front().copied() else { return };
        if due > self.context.now() {
            self.schedule_pipe(serial, end);
            return;
        }
        if self.cut[from][to] || !self.hosts[to].up {
            pipe.stalled = true;
            self.context.cover(Mark::BytesStalled);
            return;
        }
        pipe.travelling.pop_front();
        let far = &mut connection.ends[1 - end];
        let dead = !matches!(far.phase, Phase::Open);
        match what {
            Travelling::Bytes(bytes) if dead => {
                self.context.record(to, What::Arrive, serial as u64, 0);
                let arrived = pipe.arrived;
                pipe.bytes.drain(arrived..arrived + bytes);
                let due = self.context.now() + self.rng.around(self.config.latency);
                self.schedule(due, Event::Refused { serial, end });
            }
            Travelling::Bytes(bytes) => {
                self.context.record(to, What::Arrive, serial as u64, bytes as u64);
                if self.rng.chance(self.config.corrupt_chunk_ppm) {
                    let position = pipe.arrived + self.rng.index(bytes);
                    pipe.bytes[position] ^= 1 << self.rng.below(8);
                }
                pipe.arrived += bytes;
                self.deliver(serial, 1 - end);
            }
            Travelling::Finish => {
                far.finished = true;
                self.deliver(serial, 1 - end);
            }
            Travelling::Reset => self.reset(serial, 1 - end),
        }
        if self.connections[serial].is_some() {
            self.schedule_pipe(serial, end);
        }
    }

    /// Completes the pending receive of `end`, if there is anything to tell it.
    fn deliver(&mut self, serial: usize, end: usize) {
        let connection = self.connections[serial].as_mut().expect("the connection is there");
        let this = &mut connection.ends[end];
        let host = this.host;
        if !matches!(this.phase, Phase::Open | Phase::Reset) || this.receiving.is_none() {
            return;
        }
        let pipe = &mut connection.pipes[1 - end];
        if pipe.arrived == 0 {
            let result = match this.phase {
                Phase::Reset => Err(failed(LinkErrorKind::Disconnected, RECV)),
                _ if this.finished => Ok(()),
                _ => return,
            };
            let (id, into) = this.receiving.take().expect("just seen");
            self.done(host, RECV, id, result.map(|()| LinkOutput::Received { into, bytes: 0 }));
            return;
        }
        let (id, mut into) = this.receiving.take().expect("just seen");
        let target = into.target();
        let count = target.len().min(pipe.arrived);
        let (front, back) = pipe.bytes.as_slices();
        let split = count.min(front.len());
        target[..split].copy_from_slice(&front[..split]);
        target[split..count].copy_from_slice(&back[..count - split]);
        pipe.bytes.drain(..count);
        pipe.arrived -= count;
        let sender = connection.ends[1 - end].host;
        pipe.tap.hear(&target[..count], |heard| match heard {
            Heard::Question { introduces } => {
                self.context.cover(Mark::Asked);
                if introduces {
                    self.context.cover(Mark::Introduced);
                }
            }
            Heard::Referral => self.context.cover(Mark::Referred),
            Heard::Campaign { term } => {
                self.told_to_campaign.insert((sender, host, term.get()));
            }
        });
        let deaf = self.cut[host][sender];
        if deaf {
            connection.pipes[1 - end].owed += count;
        }
        self.done(host, RECV, id, Ok(LinkOutput::Received { into, bytes: count }));
        if !deaf {
            self.pump(serial, 1 - end);
        }
    }

    /// The orderly or disorderly end of what `end` sends.
    fn end_pipe(&mut self, serial: usize, end: usize) {
        let unread = !self.connection(serial).pipes[1 - end].bytes.is_empty();
        if unread || self.rng.chance(250_000) {
            self.break_pipe(serial, end);
        } else {
            self.travel(serial, end, Travelling::Finish);
        }
    }

    /// Drops what travels in the pipe of `end` behind a random byte, and ends it with a reset.
    fn break_pipe(&mut self, serial: usize, end: usize) {
        let pipe = &self.connection(serial).pipes[end];
        let (arrived, on_the_way) = (pipe.arrived, pipe.bytes.len() - pipe.arrived);
        let mut keep = self.rng.below(on_the_way as u64 + 1) as usize;
        let pipe = &mut self.connection(serial).pipes[end];
        pipe.bytes.truncate(arrived + keep);
        for (_, what) in &mut pipe.travelling {
            if let Travelling::Bytes(bytes) = what {
                *bytes = (*bytes).min(keep);
                keep -= *bytes;
            }
        }
        pipe.travelling.retain(|(_, what)| !matches!(what, Travelling::Bytes(0) | Travelling::Finish));
        self.travel(serial, end, Travelling::Reset);
    }

    /// `end` learns that the connection is broken.
    fn reset(&mut self, serial: usize, end: usize) {
        let drop_unread = self.rng.chance(500_000);
        let Some(connection) = self.connections[serial].as_mut() else { return };
        let this = &mut connection.ends[end];
        if this.phase != Phase::Open {
            return;
        }
        this.phase = Phase::Reset;
        let host = this.host;
        let sending = this.sending.take();
        if drop_unread {
            let pipe = &mut connection.pipes[1 - end];
            pipe.bytes.drain(..pipe.arrived);
            pipe.arrived = 0;
        }
        self.context.record(host, What::Reset, serial as u64, end as u64);
        self.context.cover(Mark::ConnectionReset);
        if let Some(sending) = sending {
            self.done(host, SEND, sending.id, Err(failed(LinkErrorKind::Disconnected, SEND)));
        }
        self.deliver(serial, end);
    }

    /// `end` gives up if there has been silence.
    fn silent(&mut self, serial: usize, end: usize) {
        let Some(connection) = self.connections[serial].as_ref() else { return };
        let (here, there) = (connection.ends[end].host, connection.ends[1 - end].host);
        let vanished =
            connection.ends[1 - end].phase == Phase::Gone && connection.pipes[1 - end].travelling.is_empty();
        if vanished || self.cut[here][there] || self.cut[there][here] {
            self.reset(serial, end);
        }
    }

    fn close_done(&mut self, serial: usize, end: usize) {
        let Some(connection) = self.connections[serial].as_mut() else { return };
        let this = &mut connection.ends[end];
        let Phase::Closing(id) = this.phase else { return };
        this.phase = Phase::Gone;
        let (host, receiving, sending) = (this.host, this.receiving.take(), this.sending.take());
        if let Some((id, _)) = receiving {
            self.done(host, RECV, id, Err(failed(LinkErrorKind::Closed, RECV)));
        }
        if let Some(sending) = sending {
            self.done(host, SEND, sending.id, Err(failed(LinkErrorKind::Closed, SEND)));
        }
        self.done(host, CLOSE, id, Ok(LinkOutput::Closed));
        self.forget_if_gone(serial);
    }

    fn forget_if_gone(&mut self, serial: usize) {
        let Some(connection) = self.connections[serial].as_ref() else { return };
        if connection.ends.iter().all(|end| end.phase == Phase::Gone) {
            self.connections[serial] = None;
            let position =
                self.present.binary_search(&serial).expect("a connection is listed while it lives");
            self.present.remove(position);
            for host in &mut self.hosts {
                for listener in &mut host.listeners {
                    listener.backlog.retain(|waiting| *waiting != serial);
                }
            }
        }
    }

    fn done(&mut self, host: usize, kind: u8, id: LinkOpId, result: Result<LinkOutput<SimBuf>, LinkError>) {
        self.hosts[host].done.push((kind, LinkDone { id, result }));
    }

    fn schedule(&mut self, due: Time, event: Event) {
        self.scheduled += 1;
        self.queue.push(Scheduled { due, sequence: self.scheduled, event });
    }

    fn draw(&mut self, range: RangeInclusive<Time>) -> Time {
        self.rng.between(*range.start(), *range.end())
    }
}

#[cfg(test)]
mod tests;
