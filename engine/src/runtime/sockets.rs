//! How sockets are set up, and what their errors mean: the same on every backend.

use ringraft_block::BlockBuf;
use ringraft_net::link::{LinkError, LinkErrorKind, LinkOpId, SendPart};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use std::io::{self, ErrorKind, IoSlice};
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// How connections are set up. The defaults suit members of a cluster in one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkOptions {
    /// TCP_USER_TIMEOUT: a connection whose bytes stay unacknowledged for so long is given up, and so is a dial that
    /// nobody answers, soon after.
    pub user_timeout_ms: u32,
    /// TCP_NOTSENT_LOWAT: how many unsent bytes the kernel takes before a send has to wait. What waits here can
    /// still be dropped when the connection is closed, and does not delay what the kernel holds.
    pub notsent_lowat_bytes: u32,
    /// SO_SNDBUF, where the system's own sizing is not wanted.
    pub send_buffer_bytes: Option<usize>,
    /// SO_RCVBUF, likewise.
    pub recv_buffer_bytes: Option<usize>,
}

impl Default for LinkOptions {
    fn default() -> Self {
        Self {
            user_timeout_ms: 10_000,
            notsent_lowat_bytes: 128 * 1024,
            send_buffer_bytes: None,
            recv_buffer_bytes: None,
        }
    }
}

/// Connections that nobody has accepted yet, per listener.
const BACKLOG: i32 = 1024;
/// An idle connection is probed after so long, and again at this interval.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Pieces handed to the kernel in one call (its own limit is 1024).
const PARTS_PER_CALL: usize = 32;

impl LinkOptions {
    pub(super) fn apply(&self, socket: &Socket) -> io::Result<()> {
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_notsent_lowat(self.notsent_lowat_bytes)?;
        socket.set_tcp_user_timeout(Some(Duration::from_millis(self.user_timeout_ms.into())))?;
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE))?;
        if let Some(bytes) = self.send_buffer_bytes {
            socket.set_send_buffer_size(bytes)?;
        }
        if let Some(bytes) = self.recv_buffer_bytes {
            socket.set_recv_buffer_size(bytes)?;
        }
        Ok(())
    }
}

/// A listening socket, and the address that it got. Without SO_REUSEPORT, with which two nodes would share a port
/// without noticing.
pub(super) fn listen(address: SocketAddr, nonblocking: bool) -> io::Result<(Socket, SocketAddr)> {
    let socket = tcp_socket(address, nonblocking)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    let address = socket.local_addr()?.as_socket().ok_or(ErrorKind::Unsupported)?;
    Ok((socket, address))
}

pub(super) fn tcp_socket(address: SocketAddr, nonblocking: bool) -> io::Result<Socket> {
    let kind = Type::STREAM.cloexec();
    let kind = if nonblocking { kind.nonblocking() } else { kind };
    Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))
}

/// With nobody listening on a local port of the ephemeral range, a socket can connect to itself: that is a refusal.
pub(super) fn refuse_oneself(socket: SockRef<'_>, dialed: SocketAddr) -> io::Result<()> {
    if socket.local_addr()?.as_socket() == Some(dialed) {
        return Err(io::Error::from_raw_os_error(libc::ECONNREFUSED));
    }
    Ok(())
}

/// A send that is under way.
pub(super) struct Sending<B: BlockBuf> {
    pub(super) id: LinkOpId,
    pub(super) parts: Vec<SendPart<B>>,
    /// The first part that is not sent, and how many bytes of it are.
    part: usize,
    part_sent_bytes: usize,
}

impl<B: BlockBuf> Sending<B> {
    /// None when a part is not within its block.
    pub(super) fn new(id: LinkOpId, parts: Vec<SendPart<B>>) -> Option<Self> {
        let fits = parts.iter().all(|part| match part {
            SendPart::Bytes(_) => true,
            SendPart::Block { block, range } => range.start <= range.end && range.end <= block.len(),
        });
        fits.then_some(Self { id, parts, part: 0, part_sent_bytes: 0 })
    }

    /// The rest of the first part that is not sent.
    pub(super) fn first_rest(&self) -> &[u8] {
        &self.parts[self.part].bytes()[self.part_sent_bytes..]
    }

    /// One system call for as many parts as it takes; it does not block. `None` when nothing is left to be sent.
    pub(super) fn send_parts(&mut self, socket: BorrowedFd<'_>) -> io::Result<Option<usize>> {
        self.skip(0);
        let mut pieces: [IoSlice<'_>; PARTS_PER_CALL] = std::array::from_fn(|_| IoSlice::new(&[]));
        let mut count = 0;
        for (piece, part) in pieces.iter_mut().zip(&self.parts[self.part..]) {
            let skipped = if count == 0 { self.part_sent_bytes } else { 0 };
            *piece = IoSlice::new(&part.bytes()[skipped..]);
            count += 1;
        }
        if count == 0 {
            return Ok(None);
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        SockRef::from(&socket).send_vectored_with_flags(&pieces[..count], flags).map(Some)
    }

    /// Goes forward by `bytes`, and over parts that are finished or empty.
    pub(super) fn skip(&mut self, bytes: usize) {
        self.part_sent_bytes += bytes;
        while let Some(part) = self.parts.get(self.part) {
            let Some(beyond) = self.part_sent_bytes.checked_sub(part.bytes().len()) else { return };
            self.part_sent_bytes = beyond;
            self.part += 1;
        }
    }
}

pub(super) fn misuse(operation: &'static str) -> LinkError {
    LinkError { kind: LinkErrorKind::Other, operation, os_error: None }
}

pub(super) fn closed(operation: &'static str) -> LinkError {
    LinkError { kind: LinkErrorKind::Closed, operation, os_error: None }
}

pub(super) fn failed(operation: &'static str, error: &io::Error) -> LinkError {
    let kind = match error.raw_os_error() {
        Some(
            libc::ECONNREFUSED
            | libc::ECONNRESET
            | libc::ECONNABORTED
            | libc::EPIPE
            | libc::ENOTCONN
            | libc::ETIMEDOUT
            | libc::EHOSTUNREACH
            | libc::EHOSTDOWN
            | libc::ENETUNREACH
            | libc::ENETDOWN,
        ) => LinkErrorKind::Disconnected,
        Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL) => LinkErrorKind::AddressUnavailable,
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS) => LinkErrorKind::Exhausted,
        Some(libc::EACCES | libc::EPERM) => LinkErrorKind::PermissionDenied,
        _ => LinkErrorKind::Other,
    };
    LinkError { kind, operation, os_error: error.raw_os_error() }
}
