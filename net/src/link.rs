//! The seam between the protocol and the sockets: operations in, completions out.
//!
//! A backend implements [`Link`]: it accepts and dials byte streams, reads and writes them. Framing, identity,
//! windows and reconnection live above it, so that the simulator, which implements this trait too, exercises
//! them. The shape is that of the log's `Disk`: an operation owns what it needs until its completion, each
//! completes exactly once, and none is cancelled, except that [`LinkOp::Close`] ends all operations of its
//! connection with [`LinkErrorKind::Closed`] (or, where they had finished already, with their result) before it
//! completes itself.
//!
//! On one connection at most one [`LinkOp::Recv`] and one [`LinkOp::Send`] are in flight. Bytes arrive in the order
//! they were sent, or the connection fails.

use ringraft_block::{Block, BlockBuf, SharedBlock};
use std::fmt;
use std::net::SocketAddr;
use std::ops::Range;

/// Names an operation in flight. The submitter chooses it; it may be used again once its completion has been
/// polled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkOpId(pub u64);

/// A byte stream. The backend chooses it and never uses it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// A listening socket. The backend chooses it and never uses it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenerId(pub u64);

/// Where received bytes go. The operation owns it and hands it back, also when it fails.
pub enum RecvInto<B: BlockBuf> {
    /// Ordinary memory: headers and small bodies.
    Bytes {
        /// The memory.
        bytes: Box<[u8]>,
        /// The part to fill, not empty.
        range: Range<usize>,
    },
    /// A block that the log will write as it is: batch images.
    Block {
        /// The block.
        block: Block<B>,
        /// The part to fill, not empty.
        range: Range<usize>,
    },
}

impl<B: BlockBuf> RecvInto<B> {
    /// The bytes to be filled.
    #[must_use]
    pub fn target(&mut self) -> &mut [u8] {
        match self {
            Self::Bytes { bytes, range } => &mut bytes[range.clone()],
            Self::Block { block, range } => &mut block[range.clone()],
        }
    }
}

/// A piece of what is sent.
pub enum SendPart<B: BlockBuf> {
    /// Ordinary memory: headers and bodies.
    Bytes(Vec<u8>),
    /// A part of a block that the log or another connection may be holding too: batch images.
    Block {
        /// The block.
        block: SharedBlock<B>,
        /// The part to send.
        range: Range<usize>,
    },
}

impl<B: BlockBuf> SendPart<B> {
    /// Of parts that have been sent, what goes back with [`LinkOutput::Sent`]: blocks are let go of.
    pub fn let_go_of_blocks(parts: &mut Vec<Self>) {
        parts.retain(|part| matches!(part, Self::Bytes(_)));
    }

    /// The bytes to be sent.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Block { block, range } => &block[range.clone()],
        }
    }
}

/// An operation, with all that it needs.
pub enum LinkOp<B: BlockBuf> {
    /// Listens on `address` (port 0: one that the system chooses). Completes with [`LinkOutput::Listening`].
    Listen {
        /// Local address.
        address: SocketAddr,
    },
    /// Waits for the next connection. Completes with [`LinkOutput::Accepted`]. A failure leaves the listener
    /// usable; after [`LinkErrorKind::Exhausted`] the caller waits before it accepts again.
    Accept {
        /// An open listener, with no other accept in flight.
        listener: ListenerId,
    },
    /// Connects. Completes with [`LinkOutput::Dialed`].
    Dial {
        /// Remote address.
        address: SocketAddr,
    },
    /// Reads at least one byte. Completes with [`LinkOutput::Received`]; a count of 0 is the orderly end.
    Recv {
        /// An open connection.
        connection: ConnectionId,
        /// Where the bytes go.
        into: RecvInto<B>,
    },
    /// Sends all parts, in order. Completes with [`LinkOutput::Sent`] when the last byte has been handed to the
    /// transport: that says nothing about its arrival.
    Send {
        /// An open connection.
        connection: ConnectionId,
        /// What is sent. The vector comes back with the parts that are no blocks, for their memory.
        parts: Vec<SendPart<B>>,
    },
    /// Closes the connection at once; bytes that are still unsent are dropped. Completes with
    /// [`LinkOutput::Closed`].
    Close {
        /// The connection, invalid from now on.
        connection: ConnectionId,
    },
}

/// What a completed operation brought.
pub enum LinkOutput<B: BlockBuf> {
    /// The listener is open.
    Listening {
        /// Its id.
        listener: ListenerId,
        /// The address that it listens on, with the actual port.
        address: SocketAddr,
    },
    /// A connection came in.
    Accepted {
        /// Its id.
        connection: ConnectionId,
        /// Where it came from.
        remote: SocketAddr,
    },
    /// A connection was made.
    Dialed {
        /// Its id.
        connection: ConnectionId,
    },
    /// Bytes arrived.
    Received {
        /// The target of the operation.
        into: RecvInto<B>,
        /// How many, from the start of its range; 0 is the orderly end.
        bytes: usize,
    },
    /// All parts were handed to the transport.
    Sent {
        /// The vector of the operation, without the blocks.
        parts: Vec<SendPart<B>>,
    },
    /// The connection is closed.
    Closed,
}

/// A completion.
pub struct LinkDone<B: BlockBuf> {
    /// The id under which the operation was submitted.
    pub id: LinkOpId,
    /// What came of it. A failed receive drops its target.
    pub result: Result<LinkOutput<B>, LinkError>,
}

/// A backend, driven from one thread.
pub trait Link {
    /// The memory that batch images are received into and sent from: the disk backend's own.
    type Buf: BlockBuf;

    /// Starts `op`. Never blocks; every outcome arrives by [`Link::poll`].
    fn submit(&mut self, id: LinkOpId, op: LinkOp<Self::Buf>);

    /// Appends the completions that have arrived to `done`, in the order of their arrival. Never blocks.
    fn poll(&mut self, done: &mut Vec<LinkDone<Self::Buf>>);
}

/// Why an operation failed, so far as a caller decides by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinkErrorKind {
    /// The remote side refused, reset or vanished, or cannot be reached.
    Disconnected,
    /// Closed by [`LinkOp::Close`].
    Closed,
    /// The address is in use, or not one of this machine.
    AddressUnavailable,
    /// Out of descriptors or memory: wait before trying again.
    Exhausted,
    /// Not permitted.
    PermissionDenied,
    /// An argument broke the rules of [`LinkOp`], or anything else.
    Other,
}

/// A failed operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkError {
    /// What callers decide by.
    pub kind: LinkErrorKind,
    /// The operation, for people: `"dial"`, `"recv"`.
    pub operation: &'static str,
    /// The operating system's error number, where there was one.
    pub os_error: Option<i32>,
}

impl fmt::Display for LinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            LinkErrorKind::Disconnected => "disconnected",
            LinkErrorKind::Closed => "the connection was closed here",
            LinkErrorKind::AddressUnavailable => "the address is in use or not one of this machine",
            LinkErrorKind::Exhausted => "out of descriptors or memory",
            LinkErrorKind::PermissionDenied => "not permitted",
            LinkErrorKind::Other => "failed",
        };
        write!(f, "{}: {what}", self.operation)?;
        match self.os_error {
            Some(number) => write!(f, " ({})", std::io::Error::from_raw_os_error(number)),
            None => Ok(()),
        }
    }
}

impl std::error::Error for LinkError {}
