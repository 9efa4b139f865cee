//! The links' sockets on glommio.
//!
//! A submitted operation is tried at once, by one system call on the socket, and most sends and many receives end
//! there. What would block stays with its connection, whose one task is woken by readiness and tries again. A slice
//! of an operation's memory is never handed to anything but such a system call, so nothing can outlive it.
//!
//! Readiness comes from glommio's `TcpStream`: its `poll_read` and `poll_write` are a system call that does not
//! block, followed by a poll request on the main ring when there was nothing to do. After a receive that did not
//! fill its target the next one waits for readiness without trying, which saves a call.

use super::GlommioBuf;
use crate::runtime::LocalWakeup;
use crate::runtime::completions::Completions;
use crate::runtime::sockets::{self, LinkOptions, Sending, closed, failed, misuse, tcp_socket};
use ::glommio::net::TcpStream;
use ::glommio::spawn_local;
use futures_io::{AsyncRead, AsyncWrite};
use ringraft_net::link::{
    ConnectionId, Link, LinkDone, LinkError, LinkOp, LinkOpId, LinkOutput, ListenerId, RecvInto, SendPart,
};
use socket2::{SockAddr, SockRef, Socket};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// The sockets of one engine, driven from the core that made it.
pub struct GlommioLink {
    shared: Rc<LinkShared>,
}

struct LinkShared {
    options: LinkOptions,
    completions: Completions<LinkDone<GlommioBuf>>,
    listeners: RefCell<BTreeMap<ListenerId, Rc<Listener>>>,
    connections: RefCell<BTreeMap<ConnectionId, Rc<Connection>>>,
    ids: Cell<u64>,
    /// The tasks that accept and dial, to be woken when the link is dropped: they hold descriptors.
    waiting: RefCell<BTreeMap<LinkOpId, Waker>>,
    ended: Cell<bool>,
}

struct Listener {
    socket: Socket,
    accepting: Cell<bool>,
}

struct Connection {
    state: RefCell<ConnectionState>,
}

struct ConnectionState {
    /// `None` once closed.
    stream: Option<TcpStream>,
    /// The task that is woken by readiness.
    task: Option<Waker>,
    recv: Option<Receiving>,
    send: Option<Sending<GlommioBuf>>,
}

struct Receiving {
    id: LinkOpId,
    into: RecvInto<GlommioBuf>,
}

impl GlommioLink {
    pub(super) fn new(options: LinkOptions, local: LocalWakeup) -> Self {
        let shared = LinkShared {
            options,
            completions: Completions::new(local),
            listeners: RefCell::default(),
            connections: RefCell::default(),
            ids: Cell::new(0),
            waiting: RefCell::default(),
            ended: Cell::new(false),
        };
        Self { shared: Rc::new(shared) }
    }

    fn accept(&self, id: LinkOpId, listener: ListenerId) {
        let found = self.shared.listeners.borrow().get(&listener).cloned();
        let Some(listener) = found.filter(|listener| !listener.accepting.replace(true)) else {
            return self.shared.complete(id, Err(misuse("accept")));
        };
        let shared = Rc::clone(&self.shared);
        let accept = async move {
            let accepted = shared.accept(id, &listener.socket).await;
            listener.accepting.set(false);
            let accepted = accepted.and_then(|(socket, remote)| {
                shared.options.apply(&socket)?;
                let remote = remote.as_socket().ok_or(ErrorKind::Unsupported)?;
                let connection = shared.adopt(into_stream(socket));
                Ok(LinkOutput::Accepted { connection, remote })
            });
            shared.complete(id, accepted.map_err(|error| failed("accept", &error)));
        };
        spawn_local(accept).detach();
    }

    fn dial(&self, id: LinkOpId, address: SocketAddr) {
        let shared = Rc::clone(&self.shared);
        let dial = async move {
            let dialed = shared.connect(id, address).await;
            let dialed = dialed.map(|stream| LinkOutput::Dialed { connection: shared.adopt(stream) });
            shared.complete(id, dialed.map_err(|error| failed("dial", &error)));
        };
        spawn_local(dial).detach();
    }

    fn recv(&self, id: LinkOpId, connection: ConnectionId, into: RecvInto<GlommioBuf>) {
        let (range, capacity) = match &into {
            RecvInto::Bytes { bytes, range } => (range, bytes.len()),
            RecvInto::Block { block, range } => (range, block.len()),
        };
        let fits = !range.is_empty() && range.end <= capacity;
        self.shared.begin("recv", id, connection, |state| {
            let free = fits && state.recv.is_none();
            if free {
                state.recv = Some(Receiving { id, into });
            }
            free
        });
    }

    fn send(&self, id: LinkOpId, connection: ConnectionId, parts: Vec<SendPart<GlommioBuf>>) {
        let sending = Sending::new(id, parts);
        self.shared.begin("send", id, connection, |state| {
            let free = sending.is_some() && state.send.is_none();
            if free {
                state.send = sending;
            }
            free
        });
    }

    fn close(&self, id: LinkOpId, connection: ConnectionId) {
        let Some(connection) = self.shared.connections.borrow_mut().remove(&connection) else {
            return self.shared.complete(id, Err(misuse("close")));
        };
        let (recv, send) = connection.close();
        if let Some(recv) = recv {
            self.shared.complete(recv.id, Err(closed("recv")));
        }
        if let Some(send) = send {
            self.shared.complete(send.id, Err(closed("send")));
        }
        self.shared.complete(id, Ok(LinkOutput::Closed));
    }
}

impl Link for GlommioLink {
    type Buf = GlommioBuf;

    fn submit(&mut self, id: LinkOpId, op: LinkOp<GlommioBuf>) {
        match op {
            LinkOp::Listen { address } => {
                let listening = sockets::listen(address, true).map(|(socket, address)| {
                    let listener = ListenerId(self.shared.next_id());
                    let opened = Listener { socket, accepting: Cell::new(false) };
                    self.shared.listeners.borrow_mut().insert(listener, Rc::new(opened));
                    LinkOutput::Listening { listener, address }
                });
                self.shared.complete(id, listening.map_err(|error| failed("listen", &error)));
            }
            LinkOp::Accept { listener } => self.accept(id, listener),
            LinkOp::Dial { address } => self.dial(id, address),
            LinkOp::Recv { connection, into } => self.recv(id, connection, into),
            LinkOp::Send { connection, parts } => self.send(id, connection, parts),
            LinkOp::Close { connection } => self.close(id, connection),
        }
    }

    fn poll(&mut self, done: &mut Vec<LinkDone<GlommioBuf>>) {
        self.shared.completions.take(done);
    }
}

impl Drop for GlommioLink {
    fn drop(&mut self) {
        self.shared.ended.set(true);
        self.shared.completions.close();
        self.shared.listeners.borrow_mut().clear();
        for connection in self.shared.connections.take().into_values() {
            connection.close();
        }
        self.shared.waiting.take().into_values().for_each(Waker::wake);
    }
}

impl LinkShared {
    fn next_id(&self) -> u64 {
        let id = self.ids.get();
        self.ids.set(id + 1);
        id
    }

    fn complete(&self, id: LinkOpId, result: Result<LinkOutput<GlommioBuf>, LinkError>) {
        self.completions.push(LinkDone { id, result });
    }

    async fn accept(&self, id: LinkOpId, listener: &Socket) -> io::Result<(Socket, SockAddr)> {
        loop {
            match listener.accept() {
                Ok((socket, remote)) => {
                    socket.set_nonblocking(true)?;
                    return Ok((socket, remote));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    // A stream around a second descriptor, because a new stream waits for readability before it
                    // reads anything. It reads once: from a listener that fails, and the stream has served.
                    let mut stream = into_stream(listener.try_clone()?);
                    self.wait(id, |task| Pin::new(&mut stream).poll_read(task, &mut [0]).map(|_| Ok(())))
                        .await?;
                }
                // The remote side gave up while it was waiting in the backlog.
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn connect(&self, id: LinkOpId, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = tcp_socket(address, true)?;
        self.options.apply(&socket)?;
        match socket.connect(&address.into()) {
            Ok(()) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINPROGRESS | libc::EINTR)) => {}
            Err(error) => return Err(error),
        }
        let mut stream = into_stream(socket);
        // To send nothing blocks for as long as the connection is being made, fails with the reason when it could
        // not be made, and otherwise does nothing.
        self.wait(id, |task| Pin::new(&mut stream).poll_write(task, &[])).await?;
        sockets::refuse_oneself(SockRef::from(&borrow(&stream)), address)?;
        Ok(stream)
    }

    /// Waits for `ready`, or for the end of the link.
    async fn wait<T>(
        &self,
        id: LinkOpId,
        mut ready: impl FnMut(&mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> io::Result<T> {
        let outcome = poll_fn(|task| {
            if self.ended.get() {
                return Poll::Ready(Err(io::Error::from_raw_os_error(libc::ECONNABORTED)));
            }
            let outcome = ready(task);
            if outcome.is_pending() {
                self.waiting.borrow_mut().insert(id, task.waker().clone());
            }
            outcome
        })
        .await;
        self.waiting.borrow_mut().remove(&id);
        outcome
    }

    /// Gives a connected stream its id and its task.
    fn adopt(self: &Rc<Self>, stream: TcpStream) -> ConnectionId {
        let id = ConnectionId(self.next_id());
        let state = ConnectionState { stream: Some(stream), task: None, recv: None, send: None };
        let connection = Rc::new(Connection { state: RefCell::new(state) });
        if self.ended.get() {
            return id;
        }
        self.connections.borrow_mut().insert(id, Rc::clone(&connection));
        let shared = Rc::clone(self);
        let task = poll_fn(move |context| connection.on_ready(&shared, context));
        spawn_local(task).detach();
        id
    }

    /// Places an operation on its connection and tries it at once.
    fn begin(
        &self,
        operation: &'static str,
        id: LinkOpId,
        connection: ConnectionId,
        place: impl FnOnce(&mut ConnectionState) -> bool,
    ) {
        let connection = self.connections.borrow().get(&connection).cloned();
        let placed = connection.filter(|connection| place(&mut connection.state.borrow_mut()));
        match placed {
            Some(connection) => connection.try_now(self),
            None => self.complete(id, Err(misuse(operation))),
        }
    }
}

impl Connection {
    fn on_ready(&self, shared: &LinkShared, context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state.borrow_mut();
        if state.stream.is_none() {
            return Poll::Ready(());
        }
        if state.task.is_none() {
            state.task = Some(context.waker().clone());
        }
        state.advance(shared, context);
        Poll::Pending
    }

    fn try_now(&self, shared: &LinkShared) {
        let mut state = self.state.borrow_mut();
        // Without a waker the task has not run yet, and will find the operation when it does.
        if let Some(task) = state.task.clone() {
            state.advance(shared, &mut Context::from_waker(&task));
        }
    }

    fn close(&self) -> (Option<Receiving>, Option<Sending<GlommioBuf>>) {
        let mut state = self.state.borrow_mut();
        state.stream = None;
        let ended = (state.recv.take(), state.send.take());
        let task = state.task.take();
        drop(state);
        if let Some(task) = task {
            task.wake();
        }
        ended
    }
}

impl ConnectionState {
    fn advance(&mut self, shared: &LinkShared, context: &mut Context<'_>) {
        let Some(stream) = &mut self.stream else { return };
        if let Some(mut recv) = self.recv.take() {
            match receive(stream, recv.into.target(), context) {
                Poll::Pending => self.recv = Some(recv),
                Poll::Ready(Ok(bytes)) => {
                    let output = LinkOutput::Received { into: recv.into, bytes };
                    shared.complete(recv.id, Ok(output));
                }
                Poll::Ready(Err(error)) => shared.complete(recv.id, Err(failed("recv", &error))),
            }
        }
        if let Some(mut send) = self.send.take() {
            match advance(&mut send, stream, context) {
                Poll::Pending => self.send = Some(send),
                Poll::Ready(Ok(())) => {
                    SendPart::let_go_of_blocks(&mut send.parts);
                    shared.complete(send.id, Ok(LinkOutput::Sent { parts: send.parts }));
                }
                Poll::Ready(Err(error)) => shared.complete(send.id, Err(failed("send", &error))),
            }
        }
    }
}

fn receive(stream: &mut TcpStream, target: &mut [u8], context: &mut Context<'_>) -> Poll<io::Result<usize>> {
    loop {
        match Pin::new(&mut *stream).poll_read(context, target) {
            Poll::Ready(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// Sends until all is sent or the socket takes no more.
fn advance(
    send: &mut Sending<GlommioBuf>,
    stream: &mut TcpStream,
    context: &mut Context<'_>,
) -> Poll<io::Result<()>> {
    loop {
        let sent = match send.send_parts(borrow(stream)) {
            Ok(None) => return Poll::Ready(Ok(())),
            Ok(Some(sent)) => sent,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                // Tries once more, with the first part alone, and asks for readiness when that blocks too.
                match Pin::new(&mut *stream).poll_write(context, send.first_rest()) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Err(error)) if error.kind() == ErrorKind::Interrupted => continue,
                    Poll::Ready(sent) => sent?,
                }
            }
            Err(error) => return Poll::Ready(Err(error)),
        };
        send.skip(sent);
    }
}

fn into_stream(socket: Socket) -> TcpStream {
    // SAFETY: the descriptor is owned by `socket`, which hands its ownership over.
    unsafe { TcpStream::from_raw_fd(socket.into_raw_fd()) }
}

fn borrow(stream: &TcpStream) -> BorrowedFd<'_> {
    // SAFETY: the stream keeps its descriptor open for as long as it lives, which the lifetime says.
    unsafe { BorrowedFd::borrow_raw(stream.as_raw_fd()) }
}
