//! What can fail, and what the caller may do about it.

use crate::link::LinkError;
use ringraft_block::{Incarnation, NodeId};

/// Why [`Network::send`](crate::Network::send) took no frame. Nothing of it has left, and nothing will.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// There is no session with the peer: wait for [`NetEvent::PeerConnected`](crate::NetEvent::PeerConnected).
    #[error("there is no session with this peer")]
    NotConnected,
    /// The peer's queue is full: try again after a later completion, or let the peer fall behind.
    #[error("the queue of this peer is full")]
    Full,
}

/// A configuration that cannot work. Each says what to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A node id of 0.
    #[error("node id 0 means none: give every member an id from 1")]
    NodeZero,
    /// An incarnation of 0.
    #[error("incarnation 0 means unknown: draw a random one when the data directory is formatted")]
    IncarnationZero,
    /// This node among its own peers.
    #[error("node {0} is this node: leave it out of its own peers")]
    PeerIsSelf(NodeId),
    /// A peer that is known already.
    #[error("node {0} is listed twice: list each peer once")]
    PeerTwice(NodeId),
    /// A limit that must not be 0.
    #[error("{0} is 0: it must be at least 1")]
    Zero(&'static str),
    /// One limit contradicts another.
    #[error("{name} is {value}: it must be at least {least}, {reason}")]
    TooSmall {
        /// Which limit.
        name: &'static str,
        /// What was given.
        value: u64,
        /// The least that works.
        least: u64,
        /// Where that comes from.
        reason: &'static str,
    },
    /// A frame type of the link itself.
    #[error("frame type {0} belongs to the link: choose one of 16 or more")]
    ReservedKind(u16),
    /// A frame type with two caps.
    #[error("frame type {0} has two caps: give it one")]
    KindTwice(u16),
}

/// Why bytes are not a frame of this session. The connection is closed: a stream that was wrong once has no
/// next frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not a header.
    #[error("a frame does not begin with the magic number")]
    Magic,
    /// A damaged header.
    #[error("the checksum of a frame header is wrong")]
    HeaderChecksum,
    /// A version other than the session's.
    #[error("a frame has version {0}, which is not the session's")]
    Version(u16),
    /// A flag or padding that this version does not know.
    #[error("a frame header has bits set that this version does not know")]
    Reserved,
    /// A frame type without a cap.
    #[error("frame type {0} is unknown")]
    UnknownKind(u16),
    /// A body above the cap of its type.
    #[error("the body of a frame of type {kind} has {bytes} bytes, more than its cap")]
    BodyTooLarge {
        /// The type.
        kind: u16,
        /// What the header announced.
        bytes: u32,
    },
    /// An attachment above the cap of its type.
    #[error("the attachment of a frame of type {kind} has {bytes} bytes, more than its cap")]
    AttachmentTooLarge {
        /// The type.
        kind: u16,
        /// What the header announced.
        bytes: u32,
    },
    /// A frame of another session.
    #[error("a frame belongs to another session")]
    Session,
    /// A frame is missing or came twice.
    #[error("frame {got} came where {expected} is next")]
    Sequence {
        /// The next one.
        expected: u64,
        /// The one that came.
        got: u64,
    },
    /// A damaged body.
    #[error("the checksum of a frame body is wrong")]
    BodyChecksum,
    /// A damaged attachment, as [`Network::refuse_attachment`](crate::Network::refuse_attachment) said.
    #[error("the attachment of a frame is damaged")]
    Attachment,
}

/// Why bytes are not a handshake message. The connection is closed without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Something else speaks: HTTP, TLS, a scanner.
    #[error("the remote side speaks another protocol")]
    Magic,
    /// Damaged.
    #[error("the checksum of a handshake message is wrong")]
    Checksum,
    /// A hello where a welcome belongs, or the reverse.
    #[error("handshake message of type {0} out of place")]
    Kind(u16),
    /// A node id, incarnation or session of 0.
    #[error("a handshake message lacks an identity")]
    Identity,
    /// An answer to another hello.
    #[error("the answer belongs to another session")]
    Session,
}

/// Why a well-formed hello, or the welcome to it, was refused. It travels as a code and two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RejectReason {
    /// The other side belongs to another cluster. Check the addresses.
    #[error("it belongs to another cluster")]
    WrongCluster,
    /// The address leads to another node.
    #[error("this address is that of node {node}")]
    WrongDestination {
        /// The node that answers there.
        node: NodeId,
    },
    /// The other side is not configured as a peer here.
    #[error("it is not a peer of this node")]
    UnknownPeer,
    /// The lower id dialed: the higher dials, the lower accepts.
    #[error("the node with the higher id dials, this one did not")]
    WrongDirection,
    /// Another life of a data directory than the one that is known: a wiped disk must be added anew.
    #[error("incarnation {known} was expected")]
    WrongIncarnation {
        /// The one that the refusing side holds to be right.
        known: Incarnation,
    },
    /// No version in common.
    #[error("only versions {min} to {max} are spoken here")]
    VersionUnsupported {
        /// Lowest that the refusing side speaks.
        min: u16,
        /// Highest that the refusing side speaks.
        max: u16,
    },
    /// The other side was built with another layout of messages.
    #[error("the format here has the fingerprint {fingerprint:#018x}")]
    FormatMismatch {
        /// The refusing side's.
        fingerprint: u64,
    },
    /// A lane that is not opened by this version.
    #[error("lane {lane} is not served")]
    LaneUnsupported {
        /// The lane's number.
        lane: u8,
    },
    /// The session is no newer than one that was seen: a replay, a late connection, or a data directory that was
    /// set back.
    #[error("session {newest} has been seen already")]
    StaleSession {
        /// The newest session seen.
        newest: u64,
    },
    /// Earlier connections of the same peer have not ended yet. Try again.
    #[error("busy, try again after {retry_after_ms} ms")]
    Busy {
        /// A proposal.
        retry_after_ms: u64,
    },
    /// A reason that a later version knows.
    #[error("refused for a reason unknown here, code {0}")]
    Other(u16),
}

/// Why a connection became no session. For logs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// This node refused the remote side.
    #[error("refused here: {0}")]
    Refused(RejectReason),
    /// The remote side, dialed as `peer`, refused this node.
    #[error("refused by node {peer}: {reason}")]
    RefusedByPeer {
        /// Which peer.
        peer: NodeId,
        /// Its reason.
        reason: RejectReason,
    },
    /// The remote side did not speak the handshake.
    #[error("{0}")]
    Malformed(HandshakeError),
    /// The handshake did not end in time.
    #[error("the handshake took too long")]
    TimedOut,
    /// Too many handshakes at once.
    #[error("too many handshakes at once")]
    Crowded,
}

/// Why a session ended. What was queued for the peer is gone; what was sent may have arrived or not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DisconnectCause {
    /// The peer closed in good order.
    #[error("closed by the peer")]
    Goodbye,
    /// The byte stream ended without a goodbye: the peer's process died, or what is between the two.
    #[error("the stream ended")]
    Ended,
    /// The byte stream failed.
    #[error("{0}")]
    Link(LinkError),
    /// The peer sent what is not a frame of this session.
    #[error("{0}")]
    Frame(FrameError),
    /// A frame began to arrive and did not end in time.
    #[error("a frame took too long to arrive")]
    FrameTimeout,
    /// Nothing arrived for `idle_timeout`, not even a keepalive.
    #[error("nothing arrived for too long")]
    IdleTimeout,
    /// The peer did not take what was sent in time.
    #[error("the peer did not read for too long")]
    SendTimeout,
    /// A newer session of the same peer took its place.
    #[error("replaced by a newer session")]
    Replaced,
    /// [`Network::pin`](crate::Network::pin) named another incarnation.
    #[error("another incarnation was pinned")]
    Pinned,
    /// [`Network::remove_peer`](crate::Network::remove_peer).
    #[error("the peer was removed")]
    Removed,
    /// [`Network::disconnect`](crate::Network::disconnect).
    #[error("disconnected by this node")]
    Disconnected,
    /// [`Network::close`](crate::Network::close).
    #[error("this node is closing")]
    Closing,
}
