//! Sockets in memory: what is sent is there at once.

use ringraft_block::AlignedBuf;
use ringraft_net::link::{
    ConnectionId, Link, LinkDone, LinkError, LinkErrorKind, LinkOp, LinkOpId, LinkOutput, ListenerId,
    RecvInto, SendPart,
};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;

/// The sockets of all members.
#[derive(Default)]
pub(super) struct Wires {
    /// By the port: whose it is, and the accept that waits.
    listeners: BTreeMap<u16, (usize, Option<LinkOpId>)>,
    ends: Vec<End>,
    done: [Vec<LinkDone<AlignedBuf>>; 3],
}

/// One end of a connection, known by its number.
struct End {
    owner: usize,
    other: usize,
    is_open: bool,
    /// What has arrived; the first `taken` bytes of it have been received.
    arrived: Vec<u8>,
    taken: usize,
    receiving: Option<(LinkOpId, RecvInto<AlignedBuf>)>,
}

fn failed(kind: LinkErrorKind) -> LinkError {
    LinkError { kind, operation: "in memory", os_error: None }
}

impl Wires {
    pub(super) fn has_news(&self, member: usize) -> bool {
        !self.done[member].is_empty()
    }

    fn complete(
        &mut self,
        member: usize,
        id: LinkOpId,
        result: Result<LinkOutput<AlignedBuf>, LinkErrorKind>,
    ) {
        self.done[member].push(LinkDone { id, result: result.map_err(failed) });
    }

    fn dial(&mut self, member: usize, id: LinkOpId, address: SocketAddr) {
        let waiting = self.listeners.get_mut(&address.port());
        let Some((acceptor, accept)) = waiting.and_then(|(owner, accept)| Some((*owner, accept.take()?)))
        else {
            return self.complete(member, id, Err(LinkErrorKind::Disconnected));
        };
        let (ours, theirs) = (self.ends.len(), self.ends.len() + 1);
        for (owner, other) in [(member, theirs), (acceptor, ours)] {
            let (arrived, receiving) = (Vec::new(), None);
            self.ends.push(End { owner, other, is_open: true, arrived, taken: 0, receiving });
        }
        let connection = |end: usize| ConnectionId(end as u64);
        self.complete(member, id, Ok(LinkOutput::Dialed { connection: connection(ours) }));
        let accepted = LinkOutput::Accepted { connection: connection(theirs), remote: address };
        self.complete(acceptor, accept, Ok(accepted));
    }

    fn send(&mut self, member: usize, id: LinkOpId, at: usize, mut parts: Vec<SendPart<AlignedBuf>>) {
        let other = self.ends[at].other;
        parts.iter().for_each(|part| self.ends[other].arrived.extend_from_slice(part.bytes()));
        parts.retain(|part| matches!(part, SendPart::Bytes(_)));
        self.complete(member, id, Ok(LinkOutput::Sent { parts }));
        self.deliver(other);
    }

    /// Fills the receive of an end that waits, if anything has arrived there or nothing can.
    fn deliver(&mut self, at: usize) {
        let ends_soon = !self.ends[self.ends[at].other].is_open;
        let end = &mut self.ends[at];
        let rest = &end.arrived[end.taken..];
        if rest.is_empty() && !ends_soon {
            return;
        }
        let Some((id, mut into)) = end.receiving.take() else { return };
        let target = into.target();
        let bytes = rest.len().min(target.len());
        target[..bytes].copy_from_slice(&rest[..bytes]);
        end.taken += bytes;
        if end.taken == end.arrived.len() {
            (end.taken, _) = (0, end.arrived.clear());
        }
        let owner = end.owner;
        self.complete(owner, id, Ok(LinkOutput::Received { into, bytes }));
    }

    fn close(&mut self, member: usize, id: LinkOpId, at: usize) {
        self.ends[at].is_open = false;
        if let Some((receive, _)) = self.ends[at].receiving.take() {
            self.complete(member, receive, Err(LinkErrorKind::Closed));
        }
        self.deliver(self.ends[at].other);
        self.complete(member, id, Ok(LinkOutput::Closed));
    }
}

pub(super) struct MemoryLink {
    member: usize,
    wires: Rc<RefCell<Wires>>,
}

impl MemoryLink {
    pub(super) fn new(member: usize, wires: Rc<RefCell<Wires>>) -> Self {
        Self { member, wires }
    }
}

impl Link for MemoryLink {
    type Buf = AlignedBuf;

    fn submit(&mut self, id: LinkOpId, op: LinkOp<AlignedBuf>) {
        let member = self.member;
        let mut wires = self.wires.borrow_mut();
        match op {
            LinkOp::Listen { address } => {
                wires.listeners.insert(address.port(), (member, None));
                let listener = ListenerId(u64::from(address.port()));
                wires.complete(member, id, Ok(LinkOutput::Listening { listener, address }));
            }
            LinkOp::Accept { listener } => {
                wires.listeners.insert(listener.0 as u16, (member, Some(id)));
            }
            LinkOp::Dial { address } => wires.dial(member, id, address),
            LinkOp::Recv { connection, into } => {
                let at = connection.0 as usize;
                wires.ends[at].receiving = Some((id, into));
                wires.deliver(at);
            }
            LinkOp::Send { connection, parts } => wires.send(member, id, connection.0 as usize, parts),
            LinkOp::Close { connection } => wires.close(member, id, connection.0 as usize),
        }
    }

    fn poll(&mut self, done: &mut Vec<LinkDone<AlignedBuf>>) {
        done.append(&mut self.wires.borrow_mut().done[self.member]);
    }
}
