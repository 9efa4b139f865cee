//! Framed links between the members of a cluster.
//!
//! [`Network`] keeps at most one session with each peer and carries frames in it: a type, a group, a small body and,
//! for batches, an attachment that is received straight into the block that the log then writes. It is a machine
//! without a thread, a clock or a socket: a driver hands it completions of a [`Link`](link::Link) and the time, and
//! submits operations on its behalf. Same inputs and seed, same operations.
//!
//! # What it promises
//!
//! 1. Frames of a session arrive in the order in which they were sent, each at most once and whole, with the bytes of
//!    header and body as they were sent; or the session ends. After
//!    [`PeerDisconnected`](NetEvent::PeerDisconnected) no frame of that session follows.
//! 2. A session is between this node and the configured peer, of the same cluster and message format, and of the
//!    pinned incarnation where one is pinned, at whichever of its addresses it was found. A connection that is refused changes
//!    nothing.
//! 3. Of two sessions with one peer the newer stays. A session number that was accepted is not accepted again, nor
//!    one below it, in the life of this process.
//! 4. Everything has a bound: handshakes, connections that linger, a peer's queue in frames and bytes, what is
//!    received ahead of the engine (one staging buffer and one block per peer), work per turn, time for a dial, a
//!    handshake, a frame, a silence and a send. No length from the wire is allocated before it is compared with
//!    its cap.
//! 5. Whoever belongs to the cluster may ask a node whom to turn to ([`Network::ask`]): a connection for one question, which
//!    changes nothing here.
//! 6. A peer that is slow, silent, dead or hostile costs the others nothing but that bound.
//!
//! # What it assumes
//!
//! - The link hands out the bytes of a connection in order, and completes every operation once. A dial should
//!   complete within some seconds, also when nothing answers: dials that were given up count against
//!   [`lingering_max`](NetLimits::lingering_max) until then.
//! - Checksums find accidents, not attackers. Without a secured transport below the link, whoever can reach the port and
//!   knows the ids can speak as a member. The engine listens beyond the loopback address only when told so.
//! - `session_epoch_start` is above every session number of this node's earlier processes (the boot counter is in its
//!   upper half), and time does not go backwards.
//!
//! # What fails, and how
//!
//! | failure | outcome |
//! |---|---|
//! | dial refused or lost, handshake refused | another dial, at the peer's next address; after each round of them the wait doubles, up to `reconnect_delay_max_ns` |
//! | stream ends, is reset, or carries what is not the next frame | the session ends, what was queued is dropped, then as above |
//! | peer falls silent without an end of stream | the session ends after `idle_timeout_ns`; keepalives tell silence from having nothing to say |
//! | peer does not read | its queue fills, [`SendError::Full`]; after `send_timeout_ns` the session ends |
//! | no block for an attachment, or [`Network::pause`] | that peer is not read, so that it is slowed down in turn |
//! | out of descriptors | accepting waits; sessions go on |
//!
//! # Absences
//!
//! The link does not know what a term, an index or a vote is, and does not import the log. It never resends: after a
//! session ends, the engine knows from acknowledgements where to go on. It does not verify attachments: the image of
//! a batch carries its own checksums, which the engine verifies once. There is no thread, no executor, no clock, no
//! source of randomness and no output here.

mod body;
mod config;
mod connection;
mod error;
pub mod frame;
pub mod handshake;
mod inbound;
pub mod link;
mod network;
mod outbound;
mod peer;

pub use body::{AlignedBytes, BODY_ALIGNMENT};
pub use config::{FrameCap, NetConfig, NetLimits};
pub use error::{
    ConfigError, DisconnectCause, FrameError, HandshakeError, RejectReason, Rejection, SendError,
};
pub use frame::{ATTACHMENT_OFFSET, Attachment, Frame, Session};
pub use handshake::Referral;
pub use inbound::BlockSource;
pub use network::{NetEvent, NetStats, Network, PeerStatus};
pub use peer::{ADDRESSES_MAX, PeerConfig};
