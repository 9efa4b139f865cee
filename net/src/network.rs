//! All peers of a node: who is dialed and when, which connection is whose, what is read and sent.
//!
//! In a turn the driver gives every completion to [`Network::handle`], then calls [`Network::advance`] once, acts on
//! the events, queues frames by [`Network::send`] and ends with [`Network::flush`]. A connection goes through
//! dial or accept, handshake, session and end; each of these can fail at any point, and every failure leads to
//! [`Network::end`], which is the only place where a connection is given up.

use crate::body::BodyPool;
use crate::config::{FrameCaps, NetConfig, NetLimits};
use crate::connection::{Connection, Hold, Op, Open, Phase, Slots};
use crate::error::{
    ConfigError, DisconnectCause, FrameError, HandshakeError, RejectReason, Rejection, SendError,
};
use crate::frame::{Frame, KIND_GOODBYE, KIND_KEEPALIVE, Session};
use crate::handshake::{HANDSHAKE_BYTES, Handshake, HandshakeKind, Identity, Referral, Settled, check_start};
use crate::inbound::{BlockSource, Inbound, Step};
use crate::link::{
    ConnectionId, Link, LinkDone, LinkError, LinkErrorKind, LinkOp, LinkOpId, LinkOutput, ListenerId,
    RecvInto, SendPart,
};
use crate::outbound::{Outbound, Outgoing};
use crate::peer::{Jitter, Peer, PeerConfig};
use ringraft_block::{BlockBuf, GroupId, Incarnation, NodeId, SharedBlock};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::ops::Range;

/// How long the last frames of a session may take when this node closes: 200 ms.
const GOODBYE_TIMEOUT_NS: u64 = 200_000_000;

/// How soon a block is asked for again: 1 ms.
const BLOCK_RETRY_NS: u64 = 1_000_000;

/// What [`RejectReason::Busy`] proposes.
const BUSY_RETRY_MS: u64 = 100;

/// What happened, in the order in which it did.
pub enum NetEvent<B: BlockBuf> {
    /// Peers can reach this node.
    Listening {
        /// The address, with the actual port.
        address: SocketAddr,
    },
    /// Peers cannot reach this node. It is tried again after `listen_retry_ns`.
    ListenFailed {
        /// Why.
        error: LinkError,
    },
    /// A session begins: its queue is empty, frames can be sent.
    PeerConnected {
        /// With whom.
        peer: NodeId,
        /// Its number.
        session: Session,
        /// The incarnation that the peer announced. The engine decides whether it counts.
        incarnation: Incarnation,
        /// The abilities that the peer announced.
        features: u64,
    },
    /// A session ended. What was queued is gone; no frame of it follows.
    PeerDisconnected {
        /// With whom.
        peer: NodeId,
        /// Its number.
        session: Session,
        /// Why.
        cause: DisconnectCause,
    },
    /// A frame arrived.
    Frame {
        /// From whom.
        peer: NodeId,
        /// In which session.
        session: Session,
        /// The frame.
        frame: Frame<B>,
    },
    /// The answer to [`Network::ask`].
    Referred {
        /// Who was asked.
        by: NodeId,
        /// Whom to turn to, if it knew. Only the peer's word: what it is worth is the engine's business.
        to: Option<Referral>,
    },
    /// Another node, which may be a stranger, has asked this one whom to turn to ([`Network::ask`]), and said where it listens.
    Asked {
        /// Who asked.
        by: NodeId,
        /// Where it can be met. Only its own word, as in [`NetEvent::Referred`].
        address: SocketAddr,
    },
    /// A connection became no session. For logs; only so many a second are reported, all are counted.
    Rejected {
        /// The other end.
        remote: SocketAddr,
        /// Why.
        reason: Rejection,
    },
}

impl<B: BlockBuf> fmt::Debug for NetEvent<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listening { address } => write!(f, "Listening({address})"),
            Self::ListenFailed { error } => write!(f, "ListenFailed({error})"),
            Self::PeerConnected { peer, session, incarnation, features } => {
                write!(f, "PeerConnected({peer}, {session}, {incarnation}, {features:#x})")
            }
            Self::PeerDisconnected { peer, session, cause } => {
                write!(f, "PeerDisconnected({peer}, {session}, {cause})")
            }
            Self::Frame { peer, session, frame } => write!(f, "Frame({peer}, {session}, {frame:?})"),
            Self::Referred { by, to } => write!(f, "Referred({by}, {to:?})"),
            Self::Asked { by, address } => write!(f, "Asked({by}, {address})"),
            Self::Rejected { remote, reason } => write!(f, "Rejected({remote}, {reason})"),
        }
    }
}

/// What was counted since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStats {
    /// Frames of the engine delivered.
    pub frames_in: u64,
    /// Frames handed to the transport, keepalives included.
    pub frames_out: u64,
    /// Bytes received in sessions.
    pub bytes_in: u64,
    /// Bytes of frames handed to the transport.
    pub bytes_out: u64,
    /// Sends.
    pub sends: u64,
    /// Receives in sessions.
    pub receives: u64,
    /// Sessions begun.
    pub sessions: u64,
    /// Sessions begun with a peer that had one before.
    pub reconnects: u64,
    /// Connections dialed that became no session.
    pub dials_failed: u64,
    /// Connections accepted.
    pub accepted: u64,
    /// Handshakes refused, malformed, late or crowded out.
    pub rejected: u64,
    /// Questions answered with a referral.
    pub referrals: u64,
    /// Frames with a wrong checksum, and damaged attachments. On a sound network there are none.
    pub checksum_errors: u64,
    /// Frames that were wrong otherwise: a bug, or a hostile member.
    pub frame_errors: u64,
    /// Frames that had to wait for a block.
    pub block_waits: u64,
    /// Frames refused because the queue was full.
    pub sends_refused: u64,
}

/// How a peer is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    /// The session, while there is one.
    pub session: Option<Session>,
    /// Frames queued for it, those under way included.
    pub queued_frames: usize,
    /// Bytes queued for it, those under way included.
    pub queued_bytes: usize,
    /// Whether [`Network::pause`] is in effect.
    pub paused: bool,
    /// When the last bytes of it came, handshakes included, in this session or the last one; none before the first.
    pub heard_ns: Option<u64>,
    /// When the transport took the last bytes for it, in the same way.
    pub sent_ns: Option<u64>,
}

/// The links of one node to all its peers.
pub struct Network<L: Link> {
    identity: Identity,
    listen: SocketAddr,
    limits: NetLimits,
    caps: FrameCaps,
    bodies: BodyPool,
    jitter: Jitter,
    session_next: u64,
    peers: BTreeMap<NodeId, Peer>,
    slots: Slots<L::Buf>,
    listener: Listener,
    /// Events of calls that hand none out.
    deferred: VecDeque<NetEvent<L::Buf>>,
    rejections: RateLimit,
    /// Whom those are referred to who ask.
    referral: Option<Referral>,
    /// Where this node listens, as those are told whom it asks.
    own_address: Option<SocketAddr>,
    stats: NetStats,
    closing: bool,
    /// The time of the last call that was told one.
    now: u64,
}

type Events<B> = VecDeque<NetEvent<B>>;

#[derive(Clone, Copy)]
enum Listener {
    Closed { listen_at_ns: u64 },
    Opening,
    Open { listener: ListenerId, accepting: bool, accept_at_ns: u64 },
}

impl<L: Link> Network<L> {
    /// A network that has not begun: the first [`Network::advance`] listens and dials.
    ///
    /// # Errors
    /// When the configuration cannot work.
    pub fn new(config: NetConfig, peers: Vec<PeerConfig>) -> Result<Self, ConfigError> {
        config.validate()?;
        let limits = config.limits;
        let caps = FrameCaps::new(config.frame_caps);
        let mut network = Self {
            identity: Identity {
                node: config.node,
                cluster: config.cluster,
                incarnation: config.incarnation,
                format_fingerprint: config.format_fingerprint,
                features: config.features,
            },
            listen: config.listen,
            bodies: BodyPool::new(caps.body_bytes_max(), limits.frames_per_turn_max),
            caps,
            jitter: Jitter::new(config.seed),
            session_next: config.session_epoch_start,
            peers: BTreeMap::new(),
            slots: Slots::new(),
            listener: Listener::Closed { listen_at_ns: 0 },
            deferred: VecDeque::new(),
            rejections: RateLimit { per_second: limits.rejections_per_second, second: 0, used: 0 },
            limits,
            referral: None,
            own_address: None,
            stats: NetStats::default(),
            closing: false,
            now: 0,
        };
        for peer in peers {
            network.add_peer(peer)?;
        }
        Ok(network)
    }

    /// Takes a completion of the link. Every one of them must come here, in the order of their arrival.
    pub fn handle(
        &mut self,
        now: u64,
        link: &mut L,
        done: LinkDone<L::Buf>,
        blocks: &mut impl BlockSource<L::Buf>,
        events: &mut VecDeque<NetEvent<L::Buf>>,
    ) {
        self.enter(now, events);
        let Some((op, slot)) = self.slots.resolve(done.id) else { return };
        match op {
            Op::Listen => return self.on_listen(done.result, events),
            Op::Accept => return self.on_accept(link, done.result, events),
            Op::Dial | Op::Recv | Op::Send | Op::Close => {}
        }
        let Some(connection) = self.slots.get_mut(slot) else { return };
        connection.complete(op);
        if let Some(cause) = connection.condemned.take() {
            self.end(slot, cause, link, events);
        }
        match (op, done.result) {
            (Op::Dial, Ok(LinkOutput::Dialed { connection })) => self.on_dialed(slot, connection, link),
            (Op::Recv, Ok(LinkOutput::Received { into, bytes })) => {
                self.on_received(slot, into, bytes, link, blocks, events);
            }
            (Op::Send, Ok(LinkOutput::Sent { parts })) => self.on_sent(slot, parts, link, events),
            (Op::Close, _) => {}
            (_, Ok(_)) => {
                let error = LinkError { kind: LinkErrorKind::Other, operation: "completion", os_error: None };
                self.end(slot, DisconnectCause::Link(error), link, events);
            }
            (_, Err(error)) => self.end(slot, DisconnectCause::Link(error), link, events),
        }
        self.release(slot);
    }

    /// Does what is due by the time, reads on where a turn's share was used up, and begins a new turn's shares.
    /// Once a turn; calling it more often only costs time.
    pub fn advance(
        &mut self,
        now: u64,
        link: &mut L,
        blocks: &mut impl BlockSource<L::Buf>,
        events: &mut VecDeque<NetEvent<L::Buf>>,
    ) {
        self.enter(now, events);
        self.listen_if_due(link);
        for slot in 0..self.slots.len() {
            self.advance_connection(slot, link, blocks, events);
        }
        self.dial_if_due(link);
        self.accept_if_due(link);
    }

    /// Submits what was queued. May be called several times a turn; what is queued while a send of the same peer is
    /// under way leaves with the next.
    pub fn flush(&mut self, link: &mut L) {
        for slot in 0..self.slots.len() {
            self.submit_send(slot, link);
        }
    }

    /// Whether frames are queued that [`Network::flush`] would submit now.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        self.slots.iter().any(|(_, connection)| connection.has_unsent())
    }

    /// When [`Network::advance`] has something to do, at the latest; 0 for at once, `u64::MAX` for never. Queued
    /// frames and completions are not the clock's business.
    #[must_use]
    pub fn next_deadline(&self) -> u64 {
        if !self.deferred.is_empty() {
            return 0;
        }
        let connections = self.slots.iter().map(|(_, connection)| self.connection_deadline(connection));
        let dials =
            self.peers.iter().filter(|(id, peer)| self.may_dial(**id, peer)).map(|(_, peer)| peer.dial_at_ns);
        let listener = match self.listener {
            _ if self.closing => u64::MAX,
            Listener::Closed { listen_at_ns } => listen_at_ns,
            Listener::Open { accepting: false, accept_at_ns, .. } if self.may_accept() => accept_at_ns,
            Listener::Opening | Listener::Open { .. } => u64::MAX,
        };
        connections.chain(dials).chain([listener]).min().unwrap_or(u64::MAX)
    }

    /// Queues a frame for `peer`. The attachment is the given part of the block, which is not copied; neither may
    /// change any more.
    ///
    /// # Errors
    /// [`SendError`]: the frame was not taken.
    ///
    /// # Panics
    /// When the frame exceeds the cap of its type, or that has none: the peer would close the connection.
    pub fn send(
        &mut self,
        peer: NodeId,
        kind: u16,
        group: GroupId,
        body: &[u8],
        attachment: Option<(SharedBlock<L::Buf>, Range<usize>)>,
    ) -> Result<(), SendError> {
        let cap = self.caps.get(kind).expect("the frame type has a cap in the configuration");
        let attachment_bytes = attachment.as_ref().map_or(0, |(_, range)| range.len());
        assert!(body.len() <= cap.body_bytes_max as usize, "a body of type {kind} is within its cap");
        assert!(
            attachment_bytes <= cap.attachment_bytes_max as usize,
            "an attachment of type {kind} is within its cap"
        );
        let attachment = attachment.filter(|(_, range)| !range.is_empty());
        let slot = self.peers.get(&peer).and_then(|peer| peer.slot);
        let open = slot.and_then(|slot| self.slots.get_mut(slot)).and_then(Connection::open);
        let Some(open) = open else { return Err(SendError::NotConnected) };
        let queued = open.outbound.queue(&self.limits, Outgoing { kind, group, body, attachment });
        self.stats.sends_refused += u64::from(queued.is_err());
        queued
    }

    /// Stops reading from `peer`, across sessions, until [`Network::resume`]. What the transport buffers fills up,
    /// and the peer's queue after it.
    pub fn pause(&mut self, peer: NodeId) {
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.paused = true;
        }
    }

    /// Reads from `peer` again, from the next [`Network::advance`].
    pub fn resume(&mut self, peer: NodeId) {
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.paused = false;
        }
    }

    /// From now on only this incarnation of `peer` gets a session; one with another ends.
    pub fn pin(&mut self, peer: NodeId, incarnation: Incarnation) {
        let Some(known) = self.peers.get_mut(&peer) else { return };
        known.pinned = Some(incarnation);
        if let Some(connection) = known.slot.and_then(|slot| self.slots.get_mut(slot))
            && connection.open().is_some_and(|open| open.incarnation != incarnation)
        {
            connection.condemned = Some(DisconnectCause::Pinned);
        }
    }

    /// From now on any incarnation of `peer` gets a session.
    pub fn unpin(&mut self, peer: NodeId) {
        if let Some(known) = self.peers.get_mut(&peer) {
            known.pinned = None;
        }
    }

    /// Has sessions with one more peer.
    ///
    /// # Errors
    /// When it is this node, known already, or has no id.
    pub fn add_peer(&mut self, peer: PeerConfig) -> Result<(), ConfigError> {
        if peer.id.get() == 0 {
            return Err(ConfigError::NodeZero);
        }
        if peer.id == self.identity.node {
            return Err(ConfigError::PeerIsSelf(peer.id));
        }
        if self.peers.contains_key(&peer.id) {
            return Err(ConfigError::PeerTwice(peer.id));
        }
        self.peers.insert(peer.id, Peer::new(&peer));
        Ok(())
    }

    /// Has no more sessions with `peer`; the present one ends with the next [`Network::advance`].
    pub fn remove_peer(&mut self, peer: NodeId) {
        let Some(removed) = self.peers.remove(&peer) else { return };
        if let Some(connection) = removed.slot.and_then(|slot| self.slots.get_mut(slot)) {
            connection.condemned = Some(DisconnectCause::Removed);
        }
    }

    /// Dials `peer` at these addresses from now on, one after the other until a session lasts, and then there; a session that there is
    /// goes on. If the first one is another than before, it is dialed at once; the others when their turn comes, so that they may be
    /// hearsay: who answers there is judged as anywhere, by cluster, id and incarnation. Does nothing if there is none. Those behind
    /// the first [`ADDRESSES_MAX`](crate::ADDRESSES_MAX) are not looked at.
    ///
    /// Those that `hearsay` names too are dialed as the others. But whoever comes from there is a stranger, also while there are more
    /// of them than can be let in.
    pub fn set_addresses(&mut self, peer: NodeId, addresses: &[SocketAddr], hearsay: &[SocketAddr]) {
        let Some(known) = self.peers.get_mut(&peer) else { return };
        let moves = known.move_to(addresses);
        known.set_hearsay(hearsay);
        if !moves {
            return;
        }
        let Some(slot) = known.slot else { return };
        if self.slots.get_mut(slot).is_some_and(|connection| connection.open().is_none()) {
            // Given up without blame: the dial to the new address need not wait.
            known.slot = None;
            if let Some(connection) = self.slots.get_mut(slot) {
                connection.condemned = Some(DisconnectCause::Disconnected);
            }
        }
    }

    /// Where this node has dialed `peer`, if there is a session and this node is the one that dials: that is where it listens.
    #[must_use]
    pub fn dialed_at(&self, peer: NodeId) -> Option<SocketAddr> {
        let slot = self.peers.get(&peer)?.slot?;
        let connection = self.slots.get(slot).filter(|connection| connection.dialed)?;
        matches!(connection.phase, Phase::Open(_)).then_some(connection.remote)
    }

    /// Whom those are referred to, from now on, who ask this node.
    pub fn refer_to(&mut self, to: Option<Referral>) {
        self.referral = to;
    }

    /// Where this node is to be met, as it tells those whom it asks from now on.
    pub fn introduce_at(&mut self, address: Option<SocketAddr>) {
        self.own_address = address;
    }

    /// Asks the node at an address, which need not be a peer, and to which this node need not be one, whom to turn to; the answer
    /// is [`NetEvent::Referred`], or none comes. False if that is being asked there already, or this node is closing, or too many
    /// questions ([`NetLimits::handshakes_max`]) have not ended, those included that were given up and that the link still dials.
    pub fn ask(&mut self, node: NodeId, address: SocketAddr, link: &mut L) -> bool {
        let questions = self.slots.iter().filter(|(_, connection)| connection.asks.is_some());
        let (mut count, mut is_asked) = (0, false);
        for (_, question) in questions {
            count += 1;
            is_asked |= !matches!(question.phase, Phase::Closed)
                && (question.asks, question.remote) == (Some(node), address);
        }
        if self.closing || is_asked || count >= self.limits.handshakes_max {
            return false;
        }
        let mut connection = self.dialing(address, None);
        connection.asks = Some(node);
        self.dial(connection, address, link);
        true
    }

    /// Ends the session with `peer` at once, as one that misbehaved; it may come back.
    pub fn disconnect(&mut self, peer: NodeId, link: &mut L) {
        let Some(slot) = self.peers.get(&peer).and_then(|peer| peer.slot) else { return };
        let mut events = std::mem::take(&mut self.deferred);
        self.end(slot, DisconnectCause::Disconnected, link, &mut events);
        self.deferred = events;
    }

    /// Ends the session with `peer` at once, since the attachment of one of its frames is not what was sent: whoever can verify that says
    /// so here, and it is counted as a wrong checksum.
    pub fn refuse_attachment(&mut self, peer: NodeId, link: &mut L) {
        let Some(slot) = self.peers.get(&peer).and_then(|peer| peer.slot) else { return };
        self.stats.checksum_errors += 1;
        let mut events = std::mem::take(&mut self.deferred);
        self.end(slot, DisconnectCause::Frame(FrameError::Attachment), link, &mut events);
        self.deferred = events;
    }

    /// Ends everything in good order: sessions send what is queued, and a goodbye; no connection is accepted or
    /// dialed any more. It is done when [`Network::is_closed`]; until then the driver goes on with its turns, or
    /// drops the link, which the peers take for a crash.
    pub fn close(&mut self, link: &mut L) {
        self.closing = true;
        let mut events = std::mem::take(&mut self.deferred);
        for slot in 0..self.slots.len() {
            let Some(connection) = self.slots.get_mut(slot) else { continue };
            match std::mem::replace(&mut connection.phase, Phase::Closed) {
                Phase::Open(open) if connection.condemned.is_none() => {
                    let active_ns = Some(open.active_ns());
                    let Open { session, mut outbound, .. } = *open;
                    outbound.queue_own(KIND_GOODBYE);
                    let deadline_ns = self.now.saturating_add(GOODBYE_TIMEOUT_NS);
                    connection.phase = Phase::Draining { deadline_ns, outbound: Box::new(outbound) };
                    if let Some(peer) = connection.peer {
                        self.peers
                            .entry(peer)
                            .and_modify(|peer| (peer.slot, peer.active_ns) = (None, active_ns));
                        let cause = DisconnectCause::Closing;
                        events.push_back(NetEvent::PeerDisconnected { peer, session, cause });
                    }
                    self.submit_send(slot, link);
                }
                phase => {
                    connection.phase = phase;
                    let cause = connection.condemned.take().unwrap_or(DisconnectCause::Closing);
                    if !matches!(connection.phase, Phase::Draining { .. }) {
                        self.end(slot, cause, link, &mut events);
                    }
                }
            }
        }
        self.deferred = events;
    }

    /// Whether [`Network::close`] was called and nothing is under way any more but the listener's accept.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closing && self.slots.iter().next().is_none()
    }

    /// What was counted since the start.
    #[must_use]
    pub fn stats(&self) -> NetStats {
        self.stats
    }

    /// How `peer` is doing; none if it is not one.
    #[must_use]
    pub fn peer_status(&self, peer: NodeId) -> Option<PeerStatus> {
        let peer = self.peers.get(&peer)?;
        let mut status = PeerStatus {
            session: None,
            queued_frames: 0,
            queued_bytes: 0,
            paused: peer.paused,
            heard_ns: peer.active_ns.map(|(heard_ns, _)| heard_ns),
            sent_ns: peer.active_ns.map(|(_, sent_ns)| sent_ns),
        };
        if let Some(connection) = peer.slot.and_then(|slot| self.slots.get(slot))
            && let Phase::Open(open) = &connection.phase
            && connection.condemned.is_none()
        {
            status.session = Some(open.session);
            (status.queued_frames, status.queued_bytes) = open.outbound.depth();
            let (heard_ns, sent_ns) = open.active_ns();
            (status.heard_ns, status.sent_ns) = (Some(heard_ns), Some(sent_ns));
        }
        Some(status)
    }

    fn enter(&mut self, now: u64, events: &mut Events<L::Buf>) {
        self.now = self.now.max(now);
        if !self.deferred.is_empty() {
            events.append(&mut self.deferred);
        }
    }

    fn after(&self, nanoseconds: u64) -> u64 {
        self.now.saturating_add(nanoseconds)
    }

    // ---- Listening and accepting

    fn listen_if_due(&mut self, link: &mut L) {
        match self.listener {
            Listener::Closed { listen_at_ns } if self.now >= listen_at_ns && !self.closing => {
                self.listener = Listener::Opening;
                link.submit(self.slots.op_id(Op::Listen, 0), LinkOp::Listen { address: self.listen });
            }
            _ => {}
        }
    }

    fn on_listen(&mut self, result: Result<LinkOutput<L::Buf>, LinkError>, events: &mut Events<L::Buf>) {
        match result {
            Ok(LinkOutput::Listening { listener, address }) => {
                // A later attempt gets the same port.
                self.listen = address;
                self.listener = Listener::Open { listener, accepting: false, accept_at_ns: 0 };
                events.push_back(NetEvent::Listening { address });
            }
            Ok(_) => {
                self.listener = Listener::Closed { listen_at_ns: self.after(self.limits.listen_retry_ns) }
            }
            Err(error) => {
                self.listener = Listener::Closed { listen_at_ns: self.after(self.limits.listen_retry_ns) };
                events.push_back(NetEvent::ListenFailed { error });
            }
        }
    }

    fn accept_if_due(&mut self, link: &mut L) {
        if let Listener::Open { listener, accepting: false, accept_at_ns } = self.listener
            && self.now >= accept_at_ns
            && self.may_accept()
        {
            self.listener = Listener::Open { listener, accepting: true, accept_at_ns };
            link.submit(LinkOpId((Op::Accept as u64) << 56), LinkOp::Accept { listener });
        }
    }

    /// Not while strangers that were turned away have not left yet: a flood costs a bounded number of descriptors.
    fn may_accept(&self) -> bool {
        let strangers = self.slots.iter().filter(|(_, connection)| connection.is_stranger()).count();
        !self.closing && strangers < self.limits.handshakes_max.saturating_mul(2)
    }

    fn on_accept(
        &mut self,
        link: &mut L,
        result: Result<LinkOutput<L::Buf>, LinkError>,
        events: &mut Events<L::Buf>,
    ) {
        let retry_at_ns = match &result {
            Ok(_) => self.now,
            // A connection that was gone before it was accepted is no reason to wait for the next one.
            Err(error) if error.kind == LinkErrorKind::Disconnected => self.now,
            Err(_) => self.after(self.limits.accept_retry_ns),
        };
        if let Listener::Open { accepting, accept_at_ns, .. } = &mut self.listener {
            (*accepting, *accept_at_ns) = (false, retry_at_ns);
        }
        if let Ok(LinkOutput::Accepted { connection, remote }) = result {
            self.greet(connection, remote, link, events);
        }
        self.accept_if_due(link);
    }

    fn greet(&mut self, id: ConnectionId, remote: SocketAddr, link: &mut L, events: &mut Events<L::Buf>) {
        self.stats.accepted += 1;
        let deadline_ns = self.after(self.limits.handshake_timeout_ns);
        let phase = Phase::Greeting { deadline_ns, filled: 0, proposed: None };
        let slot = self.slots.insert(Connection::new(remote, None, Some(id), phase));
        if self.closing {
            return self.end(slot, DisconnectCause::Closing, link, events);
        }
        let greetings =
            self.slots.iter().filter(|(_, connection)| connection.handshake_deadline_ns().is_some());
        if greetings.count() > self.limits.handshakes_max {
            let crowded = self.most_dispensable(slot);
            self.give_up_handshake(crowded, Rejection::Crowded, link, events);
            if crowded == slot {
                return;
            }
        }
        self.receive_greeting(slot, vec![0; HANDSHAKE_BYTES].into_boxed_slice(), 0, link);
    }

    /// The handshake to give up when there are too many: the oldest from an address of no peer, or of one by hearsay only, `newcomer`
    /// included; if all come from peers' addresses, the oldest.
    fn most_dispensable(&self, newcomer: usize) -> usize {
        let greetings = self.slots.iter().filter_map(|(slot, connection)| {
            let deadline_ns = connection.handshake_deadline_ns()?;
            let address = connection.remote.ip();
            let is_peers = self.peers.values().any(|peer| peer.has_ip(address));
            Some((is_peers, slot == newcomer, deadline_ns, slot))
        });
        greetings.min().map_or(newcomer, |(.., slot)| slot)
    }

    // ---- Dialing

    fn may_dial(&self, id: NodeId, peer: &Peer) -> bool {
        let dials = id < self.identity.node && peer.slot.is_none() && !self.closing;
        dials && self.lingering(id) < self.limits.lingering_max
    }

    /// Connections of `peer` that were given up and still cost something.
    fn lingering(&self, peer: NodeId) -> usize {
        let of_peer = self.slots.iter().filter(|(_, connection)| connection.peer == Some(peer));
        of_peer.filter(|(_, connection)| matches!(connection.phase, Phase::Closed)).count()
    }

    fn dial_if_due(&mut self, link: &mut L) {
        while let Some((id, address)) = self.next_due_dial() {
            let connection = self.dialing(address, Some(id));
            let slot = self.dial(connection, address, link);
            self.peers.entry(id).and_modify(|peer| peer.slot = Some(slot));
        }
    }

    fn dialing(&mut self, address: SocketAddr, peer: Option<NodeId>) -> Connection<L::Buf> {
        let session = Session(self.session_next);
        self.session_next = self.session_next.saturating_add(1);
        let deadline_ns = self.after(self.limits.dial_timeout_ns);
        Connection::new(address, peer, None, Phase::Dialing { deadline_ns, session })
    }

    fn dial(&mut self, mut connection: Connection<L::Buf>, address: SocketAddr, link: &mut L) -> usize {
        connection.begin(Op::Dial);
        let slot = self.slots.insert(connection);
        link.submit(self.slots.op_id(Op::Dial, slot), LinkOp::Dial { address });
        slot
    }

    fn next_due_dial(&self) -> Option<(NodeId, SocketAddr)> {
        let mut peers = self.peers.iter();
        let due = peers.find(|(id, peer)| self.now >= peer.dial_at_ns && self.may_dial(**id, peer))?;
        Some((*due.0, due.1.address()))
    }

    fn on_dialed(&mut self, slot: usize, id: ConnectionId, link: &mut L) {
        let Some(connection) = self.slots.get_mut(slot) else { return };
        connection.id = Some(id);
        let (Phase::Dialing { session, .. }, Some(to)) =
            (&connection.phase, connection.asks.or(connection.peer))
        else {
            // Given up meanwhile.
            return self.submit_close(slot, link);
        };
        let (session, asks) = (*session, connection.asks.is_some());
        let deadline_ns = self.now.saturating_add(self.limits.handshake_timeout_ns);
        connection.phase = Phase::Greeting { deadline_ns, filled: 0, proposed: Some(session) };
        let pinned = self.peers.get(&to).and_then(|peer| peer.pinned);
        let first = match asks {
            true => self.identity.ask(to, session, self.own_address),
            false => self.identity.hello(to, pinned, session),
        };
        self.send_handshake(slot, &first, link);
        self.receive_greeting(slot, vec![0; HANDSHAKE_BYTES].into_boxed_slice(), 0, link);
    }

    // ---- The handshake

    fn receive_greeting(&mut self, slot: usize, bytes: Box<[u8]>, filled: usize, link: &mut L) {
        let into = RecvInto::Bytes { bytes, range: filled..HANDSHAKE_BYTES };
        self.submit_recv(slot, into, link);
    }

    fn on_greeting(
        &mut self,
        slot: usize,
        into: RecvInto<L::Buf>,
        count: usize,
        link: &mut L,
        blocks: &mut impl BlockSource<L::Buf>,
        events: &mut Events<L::Buf>,
    ) {
        let Some(Connection { phase: Phase::Greeting { filled, proposed, .. }, .. }) =
            self.slots.get_mut(slot)
        else {
            return;
        };
        let RecvInto::Bytes { bytes, .. } = into else { return };
        *filled = (*filled + count).min(HANDSHAKE_BYTES);
        let (filled, proposed) = (*filled, *proposed);
        let started = check_start(bytes.get(..filled).unwrap_or_default());
        let message = match (started, bytes.first_chunk()) {
            (Err(error), _) => Err(error),
            (Ok(()), Some(message)) if filled == HANDSHAKE_BYTES => Handshake::decode(message),
            (Ok(()), _) => return self.receive_greeting(slot, bytes, filled, link),
        };
        let judged = message.and_then(|message| match proposed {
            None => self.on_hello(slot, &message, link, events),
            Some(session) => self.on_answer(slot, &message, session, events),
        });
        match judged {
            Ok(Judged::Open) => self.read(slot, link, blocks, events),
            Ok(Judged::Rejecting) => {}
            Ok(Judged::Told) => self.end(slot, DisconnectCause::Goodbye, link, events),
            Ok(Judged::Refused(rejection)) => self.give_up_handshake(slot, rejection, link, events),
            Err(error) => self.give_up_handshake(slot, Rejection::Malformed(error), link, events),
        }
    }

    fn on_hello(
        &mut self,
        slot: usize,
        hello: &Handshake,
        link: &mut L,
        events: &mut Events<L::Buf>,
    ) -> Result<Judged, HandshakeError> {
        if !matches!(hello.kind, HandshakeKind::Hello | HandshakeKind::Ask(_)) {
            return Err(HandshakeError::Kind(hello.kind.code()));
        }
        if hello.from == NodeId(0) || hello.incarnation == Incarnation(0) || hello.session == Session(0) {
            return Err(HandshakeError::Identity);
        }
        if let HandshakeKind::Ask(address) = hello.kind {
            match self.identity.judge_ask(hello) {
                Ok(()) => {
                    events.extend(address.map(|address| NetEvent::Asked { by: hello.from, address }));
                    self.stats.referrals += 1;
                    let answer = self.identity.refer(hello, self.referral);
                    self.send_last(slot, &answer, link);
                }
                Err(reason) => self.refuse(slot, hello, reason, link, events),
            }
            return Ok(Judged::Rejecting);
        }
        let known = self.peers.get(&hello.from).map(Peer::known);
        let crowded = self.lingering(hello.from) >= self.limits.lingering_max;
        let judged = self.identity.judge_hello(hello, known.as_ref()).and_then(|settled| {
            if crowded { Err(RejectReason::Busy { retry_after_ms: BUSY_RETRY_MS }) } else { Ok(settled) }
        });
        let (settled, known) = match (judged, known) {
            (Ok(settled), Some(known)) => (settled, known),
            (Err(reason), _) => {
                self.refuse(slot, hello, reason, link, events);
                return Ok(Judged::Rejecting);
            }
            (Ok(_), None) => return Ok(Judged::Refused(Rejection::Refused(RejectReason::UnknownPeer))),
        };
        if let Some(older) = self.peers.get(&hello.from).and_then(|peer| peer.slot) {
            self.end(older, DisconnectCause::Replaced, link, events);
        }
        let welcome = self.identity.welcome(hello, &known, settled.version);
        self.send_handshake(slot, &welcome, link);
        self.begin_session(slot, hello.from, hello.session, settled, events);
        Ok(Judged::Open)
    }

    fn on_answer(
        &mut self,
        slot: usize,
        answer: &Handshake,
        proposed: Session,
        events: &mut Events<L::Buf>,
    ) -> Result<Judged, HandshakeError> {
        let Some(connection) = self.slots.get(slot) else { return Err(HandshakeError::Identity) };
        let (asked, Some(peer)) = (connection.asks, connection.asks.or(connection.peer)) else {
            return Err(HandshakeError::Identity);
        };
        if answer.session != proposed {
            return Err(HandshakeError::Session);
        }
        match answer.kind {
            HandshakeKind::Reject(reason) => {
                return Ok(Judged::Refused(Rejection::RefusedByPeer { peer, reason }));
            }
            HandshakeKind::Referral(to) if asked.is_some() => {
                return Ok(match self.identity.judge_referral(answer, peer) {
                    Ok(()) => {
                        events.push_back(NetEvent::Referred { by: peer, to });
                        Judged::Told
                    }
                    Err(reason) => Judged::Refused(Rejection::Refused(reason)),
                });
            }
            _ if asked.is_some() => return Err(HandshakeError::Kind(answer.kind.code())),
            HandshakeKind::Hello | HandshakeKind::Ask(_) | HandshakeKind::Referral(_) => {
                return Err(HandshakeError::Kind(answer.kind.code()));
            }
            HandshakeKind::Welcome if answer.incarnation == Incarnation(0) => {
                return Err(HandshakeError::Identity);
            }
            HandshakeKind::Welcome => {}
        }
        let known = self.peers.get(&peer).map(Peer::known).ok_or(RejectReason::UnknownPeer);
        match known.and_then(|known| self.identity.judge_welcome(answer, peer, &known)) {
            Err(reason) => Ok(Judged::Refused(Rejection::Refused(reason))),
            Ok(settled) => {
                self.begin_session(slot, peer, proposed, settled, events);
                Ok(Judged::Open)
            }
        }
    }

    fn begin_session(
        &mut self,
        slot: usize,
        peer: NodeId,
        session: Session,
        settled: Settled,
        events: &mut Events<L::Buf>,
    ) {
        let Settled { version, incarnation, features } = settled;
        let (Some(connection), Some(known)) = (self.slots.get_mut(slot), self.peers.get_mut(&peer)) else {
            return;
        };
        connection.peer = Some(peer);
        connection.phase = Phase::Open(Box::new(Open {
            session,
            incarnation,
            since_ns: self.now,
            inbound: Inbound::new(self.now, version, session, self.limits.staging_bytes),
            outbound: Outbound::new(self.now, version, session),
            turn_frames_left: self.limits.frames_per_turn_max,
            hold: Hold::None,
        }));
        self.stats.sessions += 1;
        self.stats.reconnects += u64::from(known.newest.is_some());
        known.slot = Some(slot);
        known.newest = Some((incarnation, session));
        events.push_back(NetEvent::PeerConnected { peer, session, incarnation, features });
    }

    /// Sends the refusal; the connection is closed after it.
    fn refuse(
        &mut self,
        slot: usize,
        hello: &Handshake,
        reason: RejectReason,
        link: &mut L,
        events: &mut Events<L::Buf>,
    ) {
        let Some(remote) = self.slots.get(slot).map(|connection| connection.remote) else { return };
        self.report(remote, Rejection::Refused(reason), events);
        let answer = self.identity.reject(hello, reason);
        self.send_last(slot, &answer, link);
    }

    /// Sends what the connection is closed after.
    fn send_last(&mut self, slot: usize, message: &Handshake, link: &mut L) {
        let Some(connection) = self.slots.get_mut(slot) else { return };
        let Phase::Greeting { deadline_ns, .. } = connection.phase else { return };
        connection.phase = Phase::Rejecting { deadline_ns };
        self.send_handshake(slot, message, link);
    }

    fn send_handshake(&mut self, slot: usize, message: &Handshake, link: &mut L) {
        let Some(connection) = self.slots.get_mut(slot) else { return };
        let Some(id) = connection.id else { return };
        connection.begin(Op::Send);
        let parts = vec![SendPart::Bytes(message.encode().to_vec())];
        link.submit(self.slots.op_id(Op::Send, slot), LinkOp::Send { connection: id, parts });
    }

    fn give_up_handshake(
        &mut self,
        slot: usize,
        rejection: Rejection,
        link: &mut L,
        events: &mut Events<L::Buf>,
    ) {
        let Some(connection) = self.slots.get(slot) else { return };
        let (remote, peer) = (connection.remote, connection.peer);
        let busy_ms = match &rejection {
            Rejection::RefusedByPeer { reason: RejectReason::Busy { retry_after_ms }, .. } => *retry_after_ms,
            _ => 0,
        };
        self.report(remote, rejection, events);
        self.end(slot, DisconnectCause::Disconnected, link, events);
        if let Some(peer) = peer.and_then(|peer| self.peers.get_mut(&peer)) {
            // No peer can keep this node away for longer than the longest wait.
            let wait_ns = busy_ms.saturating_mul(1_000_000).min(self.limits.reconnect_delay_max_ns);
            peer.dial_at_ns = peer.dial_at_ns.max(self.now.saturating_add(wait_ns));
        }
    }

    fn report(&mut self, remote: SocketAddr, reason: Rejection, events: &mut Events<L::Buf>) {
        self.stats.rejected += 1;
        if self.rejections.allows(self.now) {
            events.push_back(NetEvent::Rejected { remote, reason });
        }
    }

    // ---- Sessions

    fn on_received(
        &mut self,
        slot: usize,
        into: RecvInto<L::Buf>,
        count: usize,
        link: &mut L,
        blocks: &mut impl BlockSource<L::Buf>,
        events: &mut Events<L::Buf>,
    ) {
        let Some(connection) = self.slots.get_mut(slot) else { return };
        match &mut connection.phase {
            Phase::Greeting { .. } | Phase::Open(_) if count == 0 => {
                self.end(slot, DisconnectCause::Ended, link, events);
            }
            Phase::Greeting { .. } => self.on_greeting(slot, into, count, link, blocks, events),
            Phase::Open(open) => {
                self.stats.receives += 1;
                self.stats.bytes_in += count as u64;
                open.inbound.received(self.now, into, count);
                self.read(slot, link, blocks, events);
            }
            Phase::Dialing { .. } | Phase::Rejecting { .. } | Phase::Draining { .. } | Phase::Closed => {}
        }
    }

    /// Delivers what has arrived, and receives on.
    fn read(
        &mut self,
        slot: usize,
        link: &mut L,
        blocks: &mut impl BlockSource<L::Buf>,
        events: &mut Events<L::Buf>,
    ) {
        loop {
            let Some(connection) = self.slots.get_mut(slot) else { return };
            let Some(peer) = connection.peer else { return };
            if connection.is_in_flight(Op::Recv) {
                return;
            }
            let Some(open) = connection.open() else { return };
            if self.peers.get(&peer).is_some_and(|peer| peer.paused) {
                open.hold = Hold::Paused;
                return;
            }
            if open.turn_frames_left == 0 {
                open.hold = Hold::Turn;
                return;
            }
            match open.inbound.step(&self.caps, &self.bodies, blocks) {
                Ok(Step::Frame(frame)) => {
                    open.turn_frames_left -= 1;
                    self.stats.frames_in += 1;
                    events.push_back(NetEvent::Frame { peer, session: open.session, frame });
                }
                Ok(Step::Keepalive) => open.turn_frames_left -= 1,
                Ok(Step::Goodbye) => return self.end(slot, DisconnectCause::Goodbye, link, events),
                Ok(Step::NeedBlock) => {
                    self.stats.block_waits += u64::from(open.hold != Hold::Block);
                    open.hold = Hold::Block;
                    return;
                }
                Ok(Step::NeedBytes) => {
                    if open.hold != Hold::None {
                        open.hold = Hold::None;
                        open.inbound.excuse(self.now);
                    }
                    let into = open.inbound.target();
                    return self.submit_recv(slot, into, link);
                }
                Err(error) => {
                    match error {
                        FrameError::HeaderChecksum | FrameError::BodyChecksum => {
                            self.stats.checksum_errors += 1
                        }
                        _ => self.stats.frame_errors += 1,
                    }
                    return self.end(slot, DisconnectCause::Frame(error), link, events);
                }
            }
        }
    }

    fn on_sent(
        &mut self,
        slot: usize,
        parts: Vec<SendPart<L::Buf>>,
        link: &mut L,
        events: &mut Events<L::Buf>,
    ) {
        let now = self.now;
        let Some(connection) = self.slots.get_mut(slot) else { return };
        let (frames, bytes) = match &mut connection.phase {
            Phase::Open(open) => open.outbound.sent(now, parts),
            Phase::Draining { outbound, .. } => {
                let counts = outbound.sent(now, parts);
                if outbound.is_idle() {
                    self.end(slot, DisconnectCause::Closing, link, events);
                } else {
                    self.submit_send(slot, link);
                }
                counts
            }
            Phase::Rejecting { .. } => return self.end(slot, DisconnectCause::Disconnected, link, events),
            Phase::Dialing { .. } | Phase::Greeting { .. } | Phase::Closed => return,
        };
        self.stats.frames_out += frames;
        self.stats.bytes_out += bytes;
    }

    // ---- Time

    fn advance_connection(
        &mut self,
        slot: usize,
        link: &mut L,
        blocks: &mut impl BlockSource<L::Buf>,
        events: &mut Events<L::Buf>,
    ) {
        let now = self.now;
        let Some(connection) = self.slots.get_mut(slot) else { return };
        if let Some(cause) = connection.condemned.take() {
            return self.end(slot, cause, link, events);
        }
        let receiving = connection.is_in_flight(Op::Recv);
        match &mut connection.phase {
            Phase::Dialing { deadline_ns, .. }
            | Phase::Rejecting { deadline_ns }
            | Phase::Draining { deadline_ns, .. }
                if now >= *deadline_ns =>
            {
                // The engine knows of no session here, so the cause goes nowhere.
                self.end(slot, DisconnectCause::Disconnected, link, events);
            }
            Phase::Greeting { deadline_ns, .. } if now >= *deadline_ns => {
                self.give_up_handshake(slot, Rejection::TimedOut, link, events);
            }
            Phase::Open(open) => {
                if let Some(cause) = open.overdue(now, receiving, &self.limits) {
                    return self.end(slot, cause, link, events);
                }
                if open.keepalive_at_ns(&self.limits) <= now {
                    open.outbound.queue_own(KIND_KEEPALIVE);
                }
                open.turn_frames_left = self.limits.frames_per_turn_max;
                self.read(slot, link, blocks, events);
            }
            _ => {}
        }
    }

    fn connection_deadline(&self, connection: &Connection<L::Buf>) -> u64 {
        if connection.condemned.is_some() {
            return 0;
        }
        match &connection.phase {
            Phase::Dialing { deadline_ns, .. }
            | Phase::Greeting { deadline_ns, .. }
            | Phase::Rejecting { deadline_ns }
            | Phase::Draining { deadline_ns, .. } => *deadline_ns,
            Phase::Closed => u64::MAX,
            Phase::Open(open) => {
                let is_paused =
                    || connection.peer.and_then(|peer| self.peers.get(&peer)).is_some_and(|peer| peer.paused);
                let read_at_ns = match open.hold {
                    Hold::None => u64::MAX,
                    _ if is_paused() => u64::MAX,
                    Hold::Turn | Hold::Paused => 0,
                    Hold::Block => self.after(BLOCK_RETRY_NS),
                };
                let receiving = connection.is_in_flight(Op::Recv);
                let overdue_at_ns = open.overdue_at_ns(receiving, &self.limits);
                read_at_ns.min(overdue_at_ns).min(open.keepalive_at_ns(&self.limits))
            }
        }
    }

    // ---- Operations

    fn submit_recv(&mut self, slot: usize, into: RecvInto<L::Buf>, link: &mut L) {
        let Some(connection) = self.slots.get_mut(slot) else { return };
        let Some(id) = connection.id else { return };
        connection.begin(Op::Recv);
        link.submit(self.slots.op_id(Op::Recv, slot), LinkOp::Recv { connection: id, into });
    }

    fn submit_send(&mut self, slot: usize, link: &mut L) {
        let Some(connection) = self.slots.get_mut(slot) else { return };
        let Some(id) = connection.id else { return };
        if connection.is_in_flight(Op::Send) || connection.condemned.is_some() {
            return;
        }
        let outbound = match &mut connection.phase {
            Phase::Open(open) => &mut open.outbound,
            Phase::Draining { outbound, .. } => &mut **outbound,
            _ => return,
        };
        let Some(parts) = outbound.next_send(self.now, &self.limits) else { return };
        connection.begin(Op::Send);
        self.stats.sends += 1;
        link.submit(self.slots.op_id(Op::Send, slot), LinkOp::Send { connection: id, parts });
    }

    fn submit_close(&mut self, slot: usize, link: &mut L) {
        let Some(connection) = self.slots.get_mut(slot) else { return };
        let Some(id) = connection.id else { return };
        if !connection.is_in_flight(Op::Close) {
            connection.begin(Op::Close);
            link.submit(self.slots.op_id(Op::Close, slot), LinkOp::Close { connection: id });
        }
    }

    /// Gives the connection up: tells the engine if it was a session, closes it, and has its peer dialed again in
    /// due time. Does nothing to one that was given up before.
    fn end(&mut self, slot: usize, cause: DisconnectCause, link: &mut L, events: &mut Events<L::Buf>) {
        let Some(connection) = self.slots.get_mut(slot) else { return };
        let mut lasted = false;
        let mut active_ns = None;
        match std::mem::replace(&mut connection.phase, Phase::Closed) {
            Phase::Closed => return,
            Phase::Open(open) => {
                active_ns = Some(open.active_ns());
                let lasted_ns = open.inbound.received_ns.saturating_sub(open.since_ns);
                lasted = lasted_ns >= self.limits.reconnect_delay_max_ns;
                if let Some(peer) = connection.peer {
                    events.push_back(NetEvent::PeerDisconnected { peer, session: open.session, cause });
                }
            }
            Phase::Dialing { .. } | Phase::Greeting { .. }
                if connection.dialed && connection.asks.is_none() =>
            {
                self.stats.dials_failed += 1
            }
            _ => {}
        }
        if let Some(peer) = connection.peer.and_then(|peer| self.peers.get_mut(&peer))
            && peer.slot == Some(slot)
        {
            peer.slot = None;
            peer.active_ns = active_ns.or(peer.active_ns);
            if lasted {
                peer.succeeded();
            } else {
                peer.try_next_address();
            }
            peer.failed(self.now, &self.limits, &mut self.jitter);
        }
        self.submit_close(slot, link);
    }

    /// Frees the slot of a connection that was given up, once nothing on it is under way.
    fn release(&mut self, slot: usize) {
        let done = |connection: &Connection<L::Buf>| {
            matches!(connection.phase, Phase::Closed) && connection.is_quiet()
        };
        if self.slots.get(slot).is_some_and(done) {
            self.slots.remove(slot);
        }
    }
}

/// What a handshake message led to.
enum Judged {
    Open,
    /// The last message is being sent.
    Rejecting,
    /// A question was answered.
    Told,
    Refused(Rejection),
}

impl<B: BlockBuf> Open<B> {
    /// When the peer was last heard, and last sent to.
    fn active_ns(&self) -> (u64, u64) {
        (self.inbound.heard_ns, self.outbound.sent_ns)
    }

    /// Why this session has run out of time, if it has.
    fn overdue(&self, now: u64, receiving: bool, limits: &NetLimits) -> Option<DisconnectCause> {
        let causes =
            [DisconnectCause::FrameTimeout, DisconnectCause::IdleTimeout, DisconnectCause::SendTimeout];
        let due = self.overdue_each(receiving, limits);
        causes.into_iter().zip(due).find(|(_, at_ns)| now >= *at_ns).map(|(cause, _)| cause)
    }

    fn overdue_at_ns(&self, receiving: bool, limits: &NetLimits) -> u64 {
        let [frame, idle, send] = self.overdue_each(receiving, limits);
        frame.min(idle).min(send)
    }

    /// When the frame that is arriving, the silence and the send under way last too long. What is not being read
    /// cannot be late.
    fn overdue_each(&self, receiving: bool, limits: &NetLimits) -> [u64; 3] {
        let after = |since: Option<u64>, limit| since.map_or(u64::MAX, |since| since.saturating_add(limit));
        let frame_started_ns = self.inbound.frame_started_ns().filter(|_| receiving);
        let received_ns = receiving.then_some(self.inbound.received_ns);
        [
            after(frame_started_ns, limits.frame_timeout_ns),
            after(received_ns, limits.idle_timeout_ns),
            after(self.outbound.sending_since_ns(), limits.send_timeout_ns),
        ]
    }

    /// When the peer needs a sign of life, if nothing else is being sent.
    fn keepalive_at_ns(&self, limits: &NetLimits) -> u64 {
        if !self.outbound.is_idle() {
            return u64::MAX;
        }
        self.outbound.sent_ns.saturating_add(limits.idle_timeout_ns / 3)
    }
}

/// So many a second.
struct RateLimit {
    per_second: u32,
    second: u64,
    used: u32,
}

impl RateLimit {
    fn allows(&mut self, now: u64) -> bool {
        let second = now / 1_000_000_000;
        if second != self.second {
            (self.second, self.used) = (second, 0);
        }
        let allowed = self.used < self.per_second;
        self.used += u32::from(allowed);
        allowed
    }
}
