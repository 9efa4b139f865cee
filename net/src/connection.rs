//! One byte stream, from its dial or accept until the last operation on it has completed.
//!
//! A connection that was given up stays in its slot as [`Phase::Closed`] until the link has completed all that it
//! was asked on it: so a completion always finds the connection that it belongs to, and never a later one.

use crate::error::DisconnectCause;
use crate::frame::Session;
use crate::inbound::Inbound;
use crate::link::{ConnectionId, LinkOpId};
use crate::outbound::Outbound;
use ringraft_block::{BlockBuf, Incarnation, NodeId};
use std::net::SocketAddr;

pub(crate) struct Connection<B: BlockBuf> {
    /// Absent until it is dialed.
    pub(crate) id: Option<ConnectionId>,
    pub(crate) remote: SocketAddr,
    /// Known from the start if dialed here, else from the handshake.
    pub(crate) peer: Option<NodeId>,
    /// Dialed here, not accepted.
    pub(crate) dialed: bool,
    /// Dialed only to ask this node whom to turn to.
    pub(crate) asks: Option<NodeId>,
    /// To be ended at the next opportunity, and treated as ended already.
    pub(crate) condemned: Option<DisconnectCause>,
    pub(crate) phase: Phase<B>,
    in_flight: u8,
}

pub(crate) enum Phase<B: BlockBuf> {
    /// The link is connecting.
    Dialing { deadline_ns: u64, session: Session },
    /// A handshake message is awaited: the hello, or, if dialed here, the answer to the hello that proposed a
    /// session.
    Greeting { deadline_ns: u64, filled: usize, proposed: Option<Session> },
    /// The refusal, or the referral, is being sent.
    Rejecting { deadline_ns: u64 },
    /// A session.
    Open(Box<Open<B>>),
    /// The session ended on this side, its last frames are being sent.
    Draining { deadline_ns: u64, outbound: Box<Outbound<B>> },
    /// Given up; waits for its operations.
    Closed,
}

/// A session in progress.
pub(crate) struct Open<B: BlockBuf> {
    pub(crate) session: Session,
    pub(crate) incarnation: Incarnation,
    pub(crate) since_ns: u64,
    pub(crate) inbound: Inbound<B>,
    pub(crate) outbound: Outbound<B>,
    /// Frames that may still be delivered in this turn.
    pub(crate) turn_frames_left: usize,
    /// Why nothing is being received.
    pub(crate) hold: Hold,
}

/// Why a session is not read for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// It is read.
    None,
    /// It had its share of this turn.
    Turn,
    /// There was no block for an attachment.
    Block,
    /// The engine asked for it.
    Paused,
}

/// An operation on a connection, or of the listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Op {
    Dial = 1,
    Recv = 2,
    Send = 3,
    Close = 4,
    Listen = 5,
    Accept = 6,
}

impl<B: BlockBuf> Connection<B> {
    pub(crate) fn new(
        remote: SocketAddr,
        peer: Option<NodeId>,
        id: Option<ConnectionId>,
        phase: Phase<B>,
    ) -> Self {
        Self { id, remote, peer, dialed: id.is_none(), asks: None, condemned: None, phase, in_flight: 0 }
    }

    pub(crate) fn is_in_flight(&self, op: Op) -> bool {
        self.in_flight & (1 << op as u8) != 0
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.in_flight == 0
    }

    pub(crate) fn begin(&mut self, op: Op) {
        assert!(!self.is_in_flight(op), "one {op:?} at a time on a connection");
        self.in_flight |= 1 << op as u8;
    }

    pub(crate) fn complete(&mut self, op: Op) {
        self.in_flight &= !(1 << op as u8);
    }

    /// The session, unless it is about to be ended.
    pub(crate) fn open(&mut self) -> Option<&mut Open<B>> {
        match &mut self.phase {
            Phase::Open(open) if self.condemned.is_none() => Some(open),
            _ => None,
        }
    }

    /// Whether frames are queued and no send is under way.
    pub(crate) fn has_unsent(&self) -> bool {
        let outbound = match &self.phase {
            Phase::Open(open) => &open.outbound,
            Phase::Draining { outbound, .. } => outbound,
            _ => return false,
        };
        outbound.has_queued() && !self.is_in_flight(Op::Send) && self.condemned.is_none()
    }

    /// Accepted, and not (yet) identified.
    pub(crate) fn is_stranger(&self) -> bool {
        !self.dialed && self.peer.is_none()
    }

    /// When an accepted connection that is not a session runs out of time: the lowest came first.
    pub(crate) fn handshake_deadline_ns(&self) -> Option<u64> {
        match self.phase {
            Phase::Greeting { deadline_ns, .. } | Phase::Rejecting { deadline_ns } if !self.dialed => {
                Some(deadline_ns)
            }
            _ => None,
        }
    }
}

/// The connections, each in a slot that is named by position and generation in the ids of its operations.
pub(crate) struct Slots<B: BlockBuf> {
    slots: Vec<Slot<B>>,
    free: Vec<usize>,
}

struct Slot<B: BlockBuf> {
    generation: u32,
    connection: Option<Connection<B>>,
}

/// Positions take 24 bits of an operation's id; the limits keep them to some hundreds.
const SLOTS_MAX: usize = 1 << 24;

impl<B: BlockBuf> Slots<B> {
    pub(crate) fn new() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }

    /// How many positions there are, used or not.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn insert(&mut self, connection: Connection<B>) -> usize {
        let position = self.free.pop().unwrap_or_else(|| {
            assert!(self.slots.len() < SLOTS_MAX, "the limits bound the number of connections");
            self.slots.push(Slot { generation: 0, connection: None });
            self.slots.len() - 1
        });
        self.slots[position].connection = Some(connection);
        position
    }

    pub(crate) fn remove(&mut self, position: usize) {
        let Some(slot) = self.slots.get_mut(position) else { return };
        if slot.connection.take().is_some() {
            slot.generation = slot.generation.wrapping_add(1);
            self.free.push(position);
        }
    }

    pub(crate) fn get(&self, position: usize) -> Option<&Connection<B>> {
        self.slots.get(position)?.connection.as_ref()
    }

    pub(crate) fn get_mut(&mut self, position: usize) -> Option<&mut Connection<B>> {
        self.slots.get_mut(position)?.connection.as_mut()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &Connection<B>)> {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(position, slot)| slot.connection.as_ref().map(|connection| (position, connection)))
    }

    /// The id of an operation on the connection at `position`.
    pub(crate) fn op_id(&self, op: Op, position: usize) -> LinkOpId {
        let generation = self.slots.get(position).map_or(0, |slot| slot.generation);
        LinkOpId((op as u64) << 56 | (position as u64) << 32 | u64::from(generation))
    }

    /// The operation that `id` names, and the position of its connection; none if that is gone.
    pub(crate) fn resolve(&self, id: LinkOpId) -> Option<(Op, usize)> {
        let op = match id.0 >> 56 {
            1 => Op::Dial,
            2 => Op::Recv,
            3 => Op::Send,
            4 => Op::Close,
            5 => return Some((Op::Listen, 0)),
            6 => return Some((Op::Accept, 0)),
            _ => return None,
        };
        let position = (id.0 >> 32) as usize % SLOTS_MAX;
        let slot = self.slots.get(position)?;
        let current = slot.connection.is_some() && slot.generation == id.0 as u32;
        current.then_some((op, position))
    }
}
