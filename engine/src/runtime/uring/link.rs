//! The links' sockets on a ring.
//!
//! A send is tried at once, by a system call that does not block: it should not wait for the turn to end, most are taken
//! whole, and no memory is in the kernel's hands afterwards. What the socket does not take waits for a poll on the ring.
//!
//! A receive, an accept and a dial are operations of the ring, which completes them when there is something, without
//! another system call. So sockets are blocking ones: on others the ring gives up where it would have to wait. After a
//! receive that did not fill its target the next one does not look before it waits, since there was nothing left.
//!
//! A close ends what its connection has on the ring, and completes when that has come back: until then a receive's
//! memory and the descriptor are in the kernel's hands.

use super::memory::UringBuf;
use super::operation::{Io, Operation};
use super::ring::Token;
use crate::runtime::LocalWakeup;
use crate::runtime::completions::Completions;
use crate::runtime::sockets::{self, LinkOptions, Sending, closed, failed, misuse, tcp_socket};
use io_uring::{opcode, squeue, types};
use ringraft_net::link::{
    ConnectionId, Link, LinkDone, LinkError, LinkOp, LinkOpId, LinkOutput, ListenerId, RecvInto, SendPart,
};
use socket2::{SockAddr, SockRef, Socket};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::rc::Rc;

/// IORING_RECVSEND_POLL_FIRST.
const POLL_FIRST: u16 = 1;

/// The sockets of one engine, driven from the core that made it.
pub struct UringLink {
    shared: Rc<LinkShared>,
}

/// What the link and its operations share.
pub(super) struct LinkShared {
    io: Rc<Io>,
    options: LinkOptions,
    completions: Completions<LinkDone<UringBuf>>,
    listeners: RefCell<BTreeMap<ListenerId, Rc<Listener>>>,
    connections: RefCell<BTreeMap<ConnectionId, Rc<Connection>>>,
    ids: Cell<u64>,
    /// The link was dropped: what completes goes nowhere.
    ended: Cell<bool>,
}

pub(super) struct Listener {
    socket: Socket,
    accepting: Cell<bool>,
}

pub(super) struct Connection {
    id: ConnectionId,
    socket: Socket,
    state: RefCell<ConnectionState>,
}

#[derive(Default)]
struct ConnectionState {
    /// The receive on the ring.
    recv: Option<Token>,
    /// The last receive took all that was there.
    drained: bool,
    send: Option<Sending<UringBuf>>,
    /// The poll on the ring of a send that blocks.
    writable: Option<Token>,
    closing: Option<LinkOpId>,
}

/// An operation in flight, with all that it uses.
pub(super) enum LinkOperation {
    Accept { id: LinkOpId, listener: Rc<Listener> },
    Dial { id: LinkOpId, socket: Socket, address: Box<SockAddr> },
    Recv { id: LinkOpId, connection: Rc<Connection>, into: RecvInto<UringBuf>, drained: bool },
    Writable { connection: Rc<Connection> },
}

impl LinkOperation {
    /// Names memory of a receive's target and of a dial's address: memory that does not move with its owner, and of
    /// which this operation is the only one.
    pub(super) fn entry(&mut self) -> squeue::Entry {
        match self {
            Self::Accept { listener, .. } => {
                let fd = types::Fd(listener.socket.as_raw_fd());
                opcode::Accept::new(fd, ptr::null_mut(), ptr::null_mut()).flags(libc::SOCK_CLOEXEC).build()
            }
            Self::Dial { socket, address, .. } => {
                let fd = types::Fd(socket.as_raw_fd());
                opcode::Connect::new(fd, address.as_ptr().cast(), address.len()).build()
            }
            Self::Recv { connection, into, drained, .. } => {
                let fd = types::Fd(connection.socket.as_raw_fd());
                let target = into.target();
                // The kernel moves less than 2^31 bytes at once; the rest is for the next receive.
                let len = u32::try_from(target.len()).unwrap_or(u32::MAX).min(1 << 30);
                let first = if *drained { POLL_FIRST } else { 0 };
                opcode::Recv::new(fd, target.as_mut_ptr(), len).ioprio(first).build()
            }
            Self::Writable { connection } => {
                let fd = types::Fd(connection.socket.as_raw_fd());
                opcode::PollAdd::new(fd, libc::POLLOUT as u32).build()
            }
        }
    }
}

impl UringLink {
    pub(super) fn new(options: LinkOptions, io: Rc<Io>, local: LocalWakeup) -> Self {
        let shared = LinkShared {
            io,
            options,
            completions: Completions::new(local),
            listeners: RefCell::default(),
            connections: RefCell::default(),
            ids: Cell::new(0),
            ended: Cell::new(false),
        };
        Self { shared: Rc::new(shared) }
    }

    fn listen(&self, id: LinkOpId, address: SocketAddr) {
        let listening = sockets::listen(address, false).map(|(socket, address)| {
            let listener = ListenerId(self.shared.next_id());
            let opened = Listener { socket, accepting: Cell::new(false) };
            self.shared.listeners.borrow_mut().insert(listener, Rc::new(opened));
            LinkOutput::Listening { listener, address }
        });
        self.shared.complete(id, listening.map_err(|error| failed("listen", &error)));
    }

    fn accept(&self, id: LinkOpId, listener: ListenerId) {
        let found = self.shared.listeners.borrow().get(&listener).cloned();
        match found.filter(|listener| !listener.accepting.replace(true)) {
            Some(listener) => {
                self.shared.start(LinkOperation::Accept { id, listener });
            }
            None => self.shared.complete(id, Err(misuse("accept"))),
        }
    }

    fn dial(&self, id: LinkOpId, address: SocketAddr) {
        let socket = tcp_socket(address, false).and_then(|socket| {
            self.shared.options.apply(&socket)?;
            Ok(socket)
        });
        match socket {
            Ok(socket) => {
                self.shared.start(LinkOperation::Dial { id, socket, address: Box::new(address.into()) });
            }
            Err(error) => self.shared.complete(id, Err(failed("dial", &error))),
        }
    }

    fn recv(&self, id: LinkOpId, connection: ConnectionId, into: RecvInto<UringBuf>) {
        let (range, capacity) = match &into {
            RecvInto::Bytes { bytes, range } => (range, bytes.len()),
            RecvInto::Block { block, range } => (range, block.len()),
        };
        let fits = !range.is_empty() && range.end <= capacity;
        let free = |connection: &Rc<Connection>| fits && connection.state.borrow().recv.is_none();
        match self.shared.connection(connection).filter(free) {
            Some(connection) => self.shared.start_recv(id, &connection, into),
            None => self.shared.complete(id, Err(misuse("recv"))),
        }
    }

    fn send(&self, id: LinkOpId, connection: ConnectionId, parts: Vec<SendPart<UringBuf>>) {
        let free = |connection: &Rc<Connection>| connection.state.borrow().send.is_none();
        let connection = self.shared.connection(connection).filter(free);
        match connection.zip(Sending::new(id, parts)) {
            Some((connection, sending)) => {
                connection.state.borrow_mut().send = Some(sending);
                self.shared.advance(&connection);
            }
            None => self.shared.complete(id, Err(misuse("send"))),
        }
    }

    fn close(&self, id: LinkOpId, connection: ConnectionId) {
        let Some(connection) = self.shared.connection(connection) else {
            return self.shared.complete(id, Err(misuse("close")));
        };
        let mut state = connection.state.borrow_mut();
        state.closing = Some(id);
        let send = state.send.take();
        let on_ring = [state.recv, state.writable];
        drop(state);
        if let Some(send) = send {
            self.shared.complete(send.id, Err(closed("send")));
        }
        for token in on_ring.into_iter().flatten() {
            self.shared.io.borrow_mut().cancel(token);
        }
        self.shared.end_close(connection);
    }
}

impl Link for UringLink {
    type Buf = UringBuf;

    fn submit(&mut self, id: LinkOpId, op: LinkOp<UringBuf>) {
        match op {
            LinkOp::Listen { address } => self.listen(id, address),
            LinkOp::Accept { listener } => self.accept(id, listener),
            LinkOp::Dial { address } => self.dial(id, address),
            LinkOp::Recv { connection, into } => self.recv(id, connection, into),
            LinkOp::Send { connection, parts } => self.send(id, connection, parts),
            LinkOp::Close { connection } => self.close(id, connection),
        }
    }

    fn poll(&mut self, done: &mut Vec<LinkDone<UringBuf>>) {
        self.shared.completions.take(done);
    }
}

impl Drop for UringLink {
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.ended.set(true);
        let ours =
            |operation: &Operation| matches!(operation, Operation::Link(link, _) if Rc::ptr_eq(link, shared));
        shared.io.borrow_mut().cancel_those(ours);
        // What is on the ring has its share of the sockets until it has come back.
        shared.listeners.borrow_mut().clear();
        shared.connections.borrow_mut().clear();
        shared.completions.close();
    }
}

impl LinkShared {
    fn next_id(&self) -> u64 {
        let id = self.ids.get();
        self.ids.set(id + 1);
        id
    }

    fn complete(&self, id: LinkOpId, result: Result<LinkOutput<UringBuf>, LinkError>) {
        self.completions.push(LinkDone { id, result });
    }

    /// One that is open, and is not being closed.
    fn connection(&self, id: ConnectionId) -> Option<Rc<Connection>> {
        let found = self.connections.borrow().get(&id).cloned();
        found.filter(|connection| connection.state.borrow().closing.is_none())
    }

    fn start(self: &Rc<Self>, operation: LinkOperation) -> Token {
        self.io.borrow_mut().start(Operation::Link(Rc::clone(self), operation))
    }

    fn start_recv(self: &Rc<Self>, id: LinkOpId, connection: &Rc<Connection>, into: RecvInto<UringBuf>) {
        let drained = connection.state.borrow().drained;
        let token = self.start(LinkOperation::Recv { id, connection: Rc::clone(connection), into, drained });
        connection.state.borrow_mut().recv = Some(token);
    }

    pub(super) fn completed(self: &Rc<Self>, operation: LinkOperation, result: i32) {
        let outcome = if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) };
        if self.ended.get() {
            if let (LinkOperation::Accept { .. }, Ok(accepted)) = (&operation, outcome) {
                drop(owned(accepted));
            }
            return;
        }
        match operation {
            LinkOperation::Accept { id, listener } => self.accepted(id, listener, outcome),
            LinkOperation::Dial { id, socket, address } => self.dialed(id, socket, &address, outcome),
            LinkOperation::Recv { id, connection, into, .. } => self.received(id, connection, into, outcome),
            LinkOperation::Writable { connection } => {
                connection.state.borrow_mut().writable = None;
                // When the poll failed the send says why.
                self.advance(&connection);
                self.end_close(connection);
            }
        }
    }

    fn accepted(self: &Rc<Self>, id: LinkOpId, listener: Rc<Listener>, outcome: io::Result<RawFd>) {
        let accepted = outcome.and_then(|accepted| {
            let socket = Socket::from(owned(accepted));
            self.options.apply(&socket)?;
            let remote = socket.peer_addr()?.as_socket().ok_or(ErrorKind::Unsupported)?;
            Ok(LinkOutput::Accepted { connection: self.adopt(socket), remote })
        });
        // The remote side gave up while it was waiting in the backlog.
        let gone = |error: &io::Error| {
            matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::NotConnected)
        };
        if accepted.as_ref().is_err_and(|error| again(error) || gone(error)) {
            self.start(LinkOperation::Accept { id, listener });
            return;
        }
        listener.accepting.set(false);
        self.complete(id, accepted.map_err(|error| failed("accept", &error)));
    }

    fn dialed(self: &Rc<Self>, id: LinkOpId, socket: Socket, address: &SockAddr, outcome: io::Result<i32>) {
        let dialed = outcome.and_then(|_| {
            let address = address.as_socket().ok_or(ErrorKind::Unsupported)?;
            sockets::refuse_oneself(SockRef::from(&socket), address)?;
            Ok(LinkOutput::Dialed { connection: self.adopt(socket) })
        });
        self.complete(id, dialed.map_err(|error| failed("dial", &error)));
    }

    fn received(
        self: &Rc<Self>,
        id: LinkOpId,
        connection: Rc<Connection>,
        mut into: RecvInto<UringBuf>,
        outcome: io::Result<i32>,
    ) {
        let mut state = connection.state.borrow_mut();
        state.recv = None;
        let closing = state.closing.is_some();
        let result = match outcome {
            Ok(count) => {
                let bytes = usize::try_from(count).unwrap_or(0);
                state.drained = bytes < into.target().len();
                Ok(LinkOutput::Received { into, bytes })
            }
            Err(_) if closing => Err(closed("recv")),
            Err(error) if again(&error) => {
                drop(state);
                return self.start_recv(id, &connection, into);
            }
            Err(error) => Err(failed("recv", &error)),
        };
        drop(state);
        self.complete(id, result);
        self.end_close(connection);
    }

    /// Gives a connected socket its id.
    fn adopt(&self, socket: Socket) -> ConnectionId {
        let id = ConnectionId(self.next_id());
        let connection = Connection { id, socket, state: RefCell::default() };
        self.connections.borrow_mut().insert(id, Rc::new(connection));
        id
    }

    /// Sends until all is sent or the socket takes no more.
    fn advance(self: &Rc<Self>, connection: &Rc<Connection>) {
        let mut state = connection.state.borrow_mut();
        let Some(send) = &mut state.send else { return };
        let result = loop {
            match send.send_parts(connection.socket.as_fd()) {
                Ok(Some(bytes)) => send.skip(bytes),
                Ok(None) => break Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let token = self.start(LinkOperation::Writable { connection: Rc::clone(connection) });
                    state.writable = Some(token);
                    return;
                }
                Err(error) => break Err(failed("send", &error)),
            }
        };
        let send = state.send.take();
        drop(state);
        if let Some(Sending { id, mut parts, .. }) = send {
            SendPart::let_go_of_blocks(&mut parts);
            self.complete(id, result.map(|()| LinkOutput::Sent { parts }));
        }
    }

    /// Closes a connection that is to be closed, once it has nothing on the ring any more.
    fn end_close(&self, connection: Rc<Connection>) {
        let state = connection.state.borrow();
        let Some(id) = state.closing.filter(|_| state.recv.is_none() && state.writable.is_none()) else {
            return;
        };
        drop(state);
        self.connections.borrow_mut().remove(&connection.id);
        // The last share: here the descriptor is closed.
        drop(connection);
        self.complete(id, Ok(LinkOutput::Closed));
    }
}

/// An operation that should be started once more.
fn again(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock)
}

/// The descriptor that an accept returned.
fn owned(accepted: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and told it to nobody else.
    unsafe { OwnedFd::from_raw_fd(accepted) }
}

#[cfg(test)]
mod tests {
    use super::super::operation::reap;
    use super::super::ring::Ring;
    use super::*;
    use crate::runtime::Wakeup;
    use std::io::Write;
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    struct Rig {
        io: Rc<Io>,
        link: UringLink,
        done: Vec<LinkDone<UringBuf>>,
    }

    impl Rig {
        fn new() -> Self {
            let ring = Ring::new(8, Wakeup::new().connect_event().unwrap()).unwrap();
            let io = Rc::new(RefCell::new(ring));
            let link = UringLink::new(LinkOptions::default(), Rc::clone(&io), LocalWakeup::default());
            Self { io, link, done: Vec::new() }
        }

        fn next(&mut self) -> LinkDone<UringBuf> {
            loop {
                reap(&self.io);
                self.link.poll(&mut self.done);
                if !self.done.is_empty() {
                    return self.done.remove(0);
                }
                self.io.borrow_mut().wait(None).unwrap();
            }
        }

        /// A connection, and its other end.
        fn connection(&mut self) -> (ConnectionId, TcpStream) {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            self.link.submit(LinkOpId(0), LinkOp::Dial { address: listener.local_addr().unwrap() });
            let Ok(LinkOutput::Dialed { connection }) = self.next().result else { panic!("dialed") };
            (connection, listener.accept().unwrap().0)
        }
    }

    fn into() -> RecvInto<UringBuf> {
        RecvInto::Bytes { bytes: vec![0; 8].into(), range: 0..8 }
    }

    #[test]
    fn an_interrupted_receive_and_an_accept_whose_peer_is_gone_are_started_again() {
        let mut rig = Rig::new();
        let (id, mut theirs) = rig.connection();
        let shared = Rc::clone(&rig.link.shared);
        let connection = shared.connection(id).unwrap();
        for errno in [libc::EINTR, libc::EAGAIN] {
            let id = LinkOpId(7);
            let recv =
                LinkOperation::Recv { id, connection: Rc::clone(&connection), into: into(), drained: false };
            shared.completed(recv, -errno);
            theirs.write_all(b"x").unwrap();
            let done = rig.next();
            assert!(done.id == id && matches!(done.result, Ok(LinkOutput::Received { bytes: 1, .. })));
        }
        rig.link.submit(LinkOpId(1), LinkOp::Listen { address: (Ipv4Addr::LOCALHOST, 0).into() });
        let Ok(LinkOutput::Listening { listener, address }) = rig.next().result else { panic!("listening") };
        let listener = Rc::clone(&shared.listeners.borrow()[&listener]);
        for errno in [libc::ECONNABORTED, libc::EINTR] {
            let id = LinkOpId(8);
            listener.accepting.set(true);
            shared.completed(LinkOperation::Accept { id, listener: Rc::clone(&listener) }, -errno);
            let _theirs = TcpStream::connect(address).unwrap();
            let done = rig.next();
            assert!(done.id == id && matches!(done.result, Ok(LinkOutput::Accepted { .. })));
        }
    }

    /// The kernel has the receive's memory until it says otherwise.
    #[test]
    fn a_close_completes_when_the_kernel_has_given_the_receive_back() {
        let mut rig = Rig::new();
        let (connection, _theirs) = rig.connection();
        rig.link.submit(LinkOpId(1), LinkOp::Recv { connection, into: into() });
        rig.io.borrow_mut().flush().unwrap();
        rig.link.submit(LinkOpId(2), LinkOp::Close { connection });
        let mut done = Vec::new();
        rig.link.poll(&mut done);
        assert!(done.is_empty() && rig.io.borrow().in_flight() == 1);
        rig.link.submit(LinkOpId(3), LinkOp::Recv { connection, into: into() });
        let ids: Vec<u64> = (0..3).map(|_| rig.next().id.0).collect();
        assert_eq!(ids, [3, 1, 2], "the late receive is refused, the first one ends, then the close");
        assert_eq!(rig.io.borrow().in_flight(), 0);
    }
}
