//! Every limit of the links, with its default and the arithmetic behind it.

use crate::error::ConfigError;
use crate::frame::{HEADER_BYTES, KIND_ENGINE_MIN};
use ringraft_block::{ClusterId, Incarnation, NodeId};
use std::net::SocketAddr;

const MILLISECOND: u64 = 1_000_000;

/// Who this node is, and what it allows.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// This node. Not 0.
    pub node: NodeId,
    /// The cluster; peers of another are refused.
    pub cluster: ClusterId,
    /// This life of this node's data directory. Not 0.
    pub incarnation: Incarnation,
    /// Sums up the layout of everything that the engine puts into frames; peers of another are refused.
    pub format_fingerprint: u64,
    /// Optional abilities of the engine, announced to every peer. Each side acts on what both have.
    pub features: u64,
    /// Where to listen. Port 0 lets the system choose.
    pub listen: SocketAddr,
    /// The number of this node's first session: its boot counter in the upper half, 1 in the lower. Later sessions
    /// count up from it, so a boot counter that grows with every start makes every session new. Not 0.
    pub session_epoch_start: u64,
    /// Seed of the jitter.
    pub seed: u64,
    /// Sizes and times.
    pub limits: NetLimits,
    /// The engine's frame types. A frame of any other closes the connection.
    pub frame_caps: Vec<FrameCap>,
}

/// A frame type of the engine, and how large its frames may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameCap {
    /// The type, 16 or more.
    pub kind: u16,
    /// Largest body in bytes.
    pub body_bytes_max: u32,
    /// Largest attachment in bytes; 0 for none.
    pub attachment_bytes_max: u32,
}

/// Sizes and times, the latter in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetLimits {
    /// A dial that takes longer is given up: 1 s, which covers one retransmission of the first segment.
    pub dial_timeout_ns: u64,
    /// From the connection to the session: 1 s, three round trips around the globe.
    pub handshake_timeout_ns: u64,
    /// From a frame's first byte to its last: 5 s, a frame of 2 MiB at 3.4 Mbit/s.
    pub frame_timeout_ns: u64,
    /// A session in which nothing arrives for this long is closed: 3 s. A third of it is the interval at which a
    /// side that has nothing to send sends a keepalive.
    pub idle_timeout_ns: u64,
    /// A send that the transport does not take within this time closes the session: 10 s, 1 MiB at 0.8 Mbit/s.
    pub send_timeout_ns: u64,
    /// The first wait before a peer is dialed again: 20 ms. It doubles with every failure, less up to half at
    /// random, until a session in which a frame arrived.
    pub reconnect_delay_min_ns: u64,
    /// The longest wait before a peer is dialed again: 1 s.
    pub reconnect_delay_max_ns: u64,
    /// The wait before accepting again after a failure other than the remote side's: 100 ms.
    pub accept_retry_ns: u64,
    /// The wait before listening again after a failure: 100 ms.
    pub listen_retry_ns: u64,
    /// Accepted connections that have not identified themselves: 32. Beyond it, those that come from an address of
    /// no peer are closed first, the oldest first. And so many questions ([`crate::Network::ask`]) that have not ended.
    pub handshakes_max: usize,
    /// Connections of one peer that are closed here but not yet by the system, and dials that were given up: 8.
    /// While there are as many, no other is begun. It bounds the memory of a peer that reconnects all the time.
    pub lingering_max: usize,
    /// Frames that one peer gets delivered in one turn: 256.
    pub frames_per_turn_max: usize,
    /// The buffer that a session receives into: 64 KiB, some hundred acknowledgements or a batch of that size in
    /// one receive.
    pub staging_bytes: usize,
    /// Frames queued for a peer, those under way included: 1,024.
    pub queue_frames_max: usize,
    /// Bytes queued for a peer, those under way included: 16 MiB.
    pub queue_bytes_max: usize,
    /// Parts of one send: 64, well below the system's limit of 1,024.
    pub send_parts_max: usize,
    /// Bytes of one send, which a single part may exceed: 1 MiB.
    pub send_bytes_max: usize,
    /// Rejected connections reported per second: 4. Others are only counted.
    pub rejections_per_second: u32,
}

impl Default for NetLimits {
    fn default() -> Self {
        Self {
            dial_timeout_ns: 1_000 * MILLISECOND,
            handshake_timeout_ns: 1_000 * MILLISECOND,
            frame_timeout_ns: 5_000 * MILLISECOND,
            idle_timeout_ns: 3_000 * MILLISECOND,
            send_timeout_ns: 10_000 * MILLISECOND,
            reconnect_delay_min_ns: 20 * MILLISECOND,
            reconnect_delay_max_ns: 1_000 * MILLISECOND,
            accept_retry_ns: 100 * MILLISECOND,
            listen_retry_ns: 100 * MILLISECOND,
            handshakes_max: 32,
            lingering_max: 8,
            frames_per_turn_max: 256,
            staging_bytes: 64 << 10,
            queue_frames_max: 1024,
            queue_bytes_max: 16 << 20,
            send_parts_max: 64,
            send_bytes_max: 1 << 20,
            rejections_per_second: 4,
        }
    }
}

impl NetConfig {
    /// Refuses what cannot work.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        if self.node.get() == 0 {
            return Err(ConfigError::NodeZero);
        }
        if self.incarnation == Incarnation(0) {
            return Err(ConfigError::IncarnationZero);
        }
        if self.session_epoch_start == 0 {
            return Err(ConfigError::Zero("session_epoch_start"));
        }
        self.limits.validate()?;
        let (mut body_bytes_max, mut frame_bytes_max) = (0, HEADER_BYTES as u64);
        for (position, cap) in self.frame_caps.iter().enumerate() {
            if cap.kind < KIND_ENGINE_MIN {
                return Err(ConfigError::ReservedKind(cap.kind));
            }
            if self.frame_caps[..position].iter().any(|other| other.kind == cap.kind) {
                return Err(ConfigError::KindTwice(cap.kind));
            }
            let body = u64::from(cap.body_bytes_max);
            body_bytes_max = body_bytes_max.max(body);
            frame_bytes_max =
                frame_bytes_max.max(HEADER_BYTES as u64 + body + u64::from(cap.attachment_bytes_max));
        }
        let header_and_body =
            "the header and the largest body: lower body_bytes_max of the frame types or raise it";
        at_least(
            "staging_bytes",
            self.limits.staging_bytes,
            HEADER_BYTES as u64 + body_bytes_max,
            header_and_body,
        )?;
        let frame = "the largest frame: lower the caps of the frame types or raise it";
        at_least("queue_bytes_max", self.limits.queue_bytes_max, frame_bytes_max, frame)
    }
}

impl NetLimits {
    fn validate(&self) -> Result<(), ConfigError> {
        let times = [
            ("dial_timeout_ns", self.dial_timeout_ns),
            ("handshake_timeout_ns", self.handshake_timeout_ns),
            ("frame_timeout_ns", self.frame_timeout_ns),
            ("send_timeout_ns", self.send_timeout_ns),
            ("reconnect_delay_min_ns", self.reconnect_delay_min_ns),
            ("accept_retry_ns", self.accept_retry_ns),
            ("listen_retry_ns", self.listen_retry_ns),
        ];
        let sizes = [
            ("handshakes_max", self.handshakes_max),
            ("lingering_max", self.lingering_max),
            ("frames_per_turn_max", self.frames_per_turn_max),
            ("queue_frames_max", self.queue_frames_max),
            ("send_parts_max", self.send_parts_max),
            ("send_bytes_max", self.send_bytes_max),
        ];
        let sizes = sizes.map(|(name, value)| (name, value as u64));
        if let Some((name, _)) = times.into_iter().chain(sizes).find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero(name));
        }
        if self.idle_timeout_ns < 3 {
            let (name, value) = ("idle_timeout_ns", self.idle_timeout_ns);
            return Err(ConfigError::TooSmall {
                name,
                value,
                least: 3,
                reason: "as keepalives go at a third of it",
            });
        }
        if self.reconnect_delay_max_ns < self.reconnect_delay_min_ns {
            return Err(ConfigError::TooSmall {
                name: "reconnect_delay_max_ns",
                value: self.reconnect_delay_max_ns,
                least: self.reconnect_delay_min_ns,
                reason: "which is reconnect_delay_min_ns: raise the one or lower the other",
            });
        }
        Ok(())
    }
}

fn at_least(name: &'static str, value: usize, least: u64, reason: &'static str) -> Result<(), ConfigError> {
    let value = value as u64;
    if value < least { Err(ConfigError::TooSmall { name, value, least, reason }) } else { Ok(()) }
}

/// The caps of the frame types, for lookup.
pub(crate) struct FrameCaps(Vec<FrameCap>);

impl FrameCaps {
    pub(crate) fn new(mut caps: Vec<FrameCap>) -> Self {
        caps.sort_unstable_by_key(|cap| cap.kind);
        Self(caps)
    }

    pub(crate) fn get(&self, kind: u16) -> Option<&FrameCap> {
        let found = self.0.binary_search_by_key(&kind, |cap| cap.kind).ok()?;
        self.0.get(found)
    }

    pub(crate) fn body_bytes_max(&self) -> usize {
        self.0.iter().map(|cap| cap.body_bytes_max as usize).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> NetConfig {
        NetConfig {
            node: NodeId(1),
            cluster: ClusterId(2),
            incarnation: Incarnation(3),
            format_fingerprint: 4,
            features: 0,
            listen: "127.0.0.1:0".parse().unwrap(),
            session_epoch_start: 1 << 32,
            seed: 5,
            limits: NetLimits::default(),
            frame_caps: vec![FrameCap { kind: 16, body_bytes_max: 4096, attachment_bytes_max: 2 << 20 }],
        }
    }

    #[test]
    fn the_defaults_fit_together() {
        assert_eq!(config().validate(), Ok(()));
    }

    #[test]
    fn what_cannot_work_is_refused_with_its_cure() {
        type Change = fn(&mut NetConfig);
        let cases: [(Change, &str); 10] = [
            (|c| c.node = NodeId(0), "node id 0 means none: give every member an id from 1"),
            (|c| c.incarnation = Incarnation(0), "incarnation 0 means unknown: draw a random one when"),
            (|c| c.session_epoch_start = 0, "session_epoch_start is 0: it must be at least 1"),
            (|c| c.limits.handshakes_max = 0, "handshakes_max is 0: it must be at least 1"),
            (|c| c.limits.idle_timeout_ns = 2, "idle_timeout_ns is 2: it must be at least 3"),
            (
                |c| c.limits.reconnect_delay_max_ns = 5,
                "reconnect_delay_max_ns is 5: it must be at least 20000000",
            ),
            (
                |c| c.limits.staging_bytes = 4143,
                "staging_bytes is 4143: it must be at least 4144, the header and",
            ),
            (
                |c| c.limits.queue_bytes_max = 2 << 20,
                "queue_bytes_max is 2097152: it must be at least 2101296",
            ),
            (|c| c.frame_caps[0].kind = 15, "frame type 15 belongs to the link: choose one of 16 or more"),
            (|c| c.frame_caps.extend(c.frame_caps.clone()), "frame type 16 has two caps: give it one"),
        ];
        for (change, message) in cases {
            let mut config = config();
            change(&mut config);
            let error = config.validate().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
