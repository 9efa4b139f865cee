//! Who is at the other end: one message of constant size each way before any frame.
//!
//! The dialer, which is the node with the higher id, sends a hello. The acceptor compares it with its
//! configuration and answers with a welcome, which ends the handshake on its side, or with a reject, after which it
//! closes. The dialer compares the welcome in the same way. What is not a handshake message at all (another
//! protocol, a scanner) is closed without an answer, as soon as its first bytes differ from the magic number, and
//! before anything larger than this message has been allocated for it.
//!
//! A refused hello changes no state: not the newest session, not the incarnation, not the session in progress.
//!
//! Instead of a hello, any node may ask another one, whichever id is the higher: it need not be a peer there, and the answer is
//! no session but a [`Referral`], whom to turn to. After that the connection is closed. This is how a node that knows one
//! member finds the one that would take it in.

use crate::error::{HandshakeError, RejectReason};
use crate::frame::{Session, VERSIONS, field};
use ringraft_block::{ClusterId, Incarnation, NodeId, crc32c};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::Range;

/// Bytes of every handshake message, in every version.
pub const HANDSHAKE_BYTES: usize = 128;

/// The first bytes of every handshake message.
pub const HANDSHAKE_MAGIC: [u8; 8] = *b"ringraft";

/// What a handshake message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandshakeKind {
    /// The dialer introduces itself.
    Hello,
    /// The acceptor introduces itself; the session begins.
    Welcome,
    /// The acceptor refuses.
    Reject(RejectReason),
    /// The dialer asks whom to turn to, and says where it listens itself, if it wants to be met there.
    Ask(Option<SocketAddr>),
    /// Whom to turn to, if the acceptor knows.
    Referral(Option<Referral>),
}

/// Whom to turn to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Referral {
    /// Its id.
    pub node: NodeId,
    /// Where it listens. A scope of an IPv6 address is not kept: it means nothing on another machine.
    pub address: SocketAddr,
}

impl HandshakeKind {
    pub(crate) fn code(self) -> u16 {
        match self {
            Self::Hello => HELLO,
            Self::Welcome => WELCOME,
            Self::Reject(_) => REJECT,
            Self::Ask(_) => ASK,
            Self::Referral(_) => REFERRAL,
        }
    }
}

/// Which traffic a connection is for. This version opens one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Lane {
    /// All traffic.
    Control = 0,
    /// Batches only; reserved.
    Log = 1,
    /// Snapshots only; reserved.
    Bulk = 2,
}

/// A handshake message in the form that programs use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handshake {
    /// What it is.
    pub kind: HandshakeKind,
    /// Lowest version of the framing that the sender speaks; in a welcome, the one agreed on.
    pub version_min: u16,
    /// Highest version of the framing that the sender speaks; in a welcome, the one agreed on.
    pub version_max: u16,
    /// The lane's number, see [`Lane`].
    pub lane: u8,
    /// Sums up the layout of the sender's messages.
    pub format_fingerprint: u64,
    /// The sender's cluster.
    pub cluster: ClusterId,
    /// The sender.
    pub from: NodeId,
    /// Whom it wants to talk to.
    pub to: NodeId,
    /// The sender's incarnation.
    pub incarnation: Incarnation,
    /// The incarnation that the sender knows of the receiver; 0 for none yet.
    pub incarnation_expected: Incarnation,
    /// The session that the hello proposes; the answer repeats it.
    pub session: Session,
    /// Optional abilities of the sender's engine.
    pub features: u64,
}

/// The layout. All bytes are accounted for. A referral, which announces no abilities, has the node in `features`, its
/// address, as one of IPv6, in the detail, and the port where a reject has its reason; all of them are 0 if there is none.
/// A question has the address of the one that asks in the same places.
const LAYOUT: [(&str, Range<usize>); 17] = [
    ("magic", F_MAGIC),
    ("kind", F_KIND),
    ("version min", F_VERSION_MIN),
    ("version max", F_VERSION_MAX),
    ("lane", F_LANE),
    ("padding, zero", F_PADDING),
    ("format fingerprint", F_FINGERPRINT),
    ("cluster", F_CLUSTER),
    ("from", F_FROM),
    ("to", F_TO),
    ("incarnation", F_INCARNATION),
    ("incarnation expected", F_EXPECTED),
    ("session", F_SESSION),
    ("features", F_FEATURES),
    ("detail of a reject", F_DETAIL),
    ("reason of a reject", F_REASON),
    ("crc32c of the bytes before", F_CRC),
];
const F_MAGIC: Range<usize> = 0..8;
const F_KIND: Range<usize> = 8..10;
const F_VERSION_MIN: Range<usize> = 10..12;
const F_VERSION_MAX: Range<usize> = 12..14;
const F_LANE: Range<usize> = 14..15;
const F_PADDING: Range<usize> = 15..16;
const F_FINGERPRINT: Range<usize> = 16..24;
const F_CLUSTER: Range<usize> = 24..40;
const F_FROM: Range<usize> = 40..48;
const F_TO: Range<usize> = 48..56;
const F_INCARNATION: Range<usize> = 56..72;
const F_EXPECTED: Range<usize> = 72..88;
const F_SESSION: Range<usize> = 88..96;
const F_FEATURES: Range<usize> = 96..104;
const F_DETAIL: Range<usize> = 104..120;
const F_REASON: Range<usize> = 120..124;
const F_CRC: Range<usize> = 124..HANDSHAKE_BYTES;

const _: () = {
    let mut next = 0;
    let mut field = 0;
    while field < LAYOUT.len() {
        assert!(LAYOUT[field].1.start == next, "the fields of a handshake follow one another");
        next = LAYOUT[field].1.end;
        field += 1;
    }
    assert!(next == HANDSHAKE_BYTES);
};

const HELLO: u16 = 1;
const WELCOME: u16 = 2;
const REJECT: u16 = 3;
const ASK: u16 = 4;
const REFERRAL: u16 = 5;

impl Handshake {
    /// The bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; HANDSHAKE_BYTES] {
        let (reason, detail, features) = match self.kind {
            HandshakeKind::Hello | HandshakeKind::Welcome | HandshakeKind::Ask(None) => (0, 0, self.features),
            HandshakeKind::Ask(Some(address)) => {
                let (port, ip) = encode_address(address);
                (port, ip, self.features)
            }
            HandshakeKind::Reject(reason) => {
                let (reason, detail) = encode_reason(reason);
                (reason, detail, self.features)
            }
            HandshakeKind::Referral(to) => encode_referral(to),
        };
        let mut bytes = [0; HANDSHAKE_BYTES];
        bytes[F_MAGIC].copy_from_slice(&HANDSHAKE_MAGIC);
        bytes[F_KIND].copy_from_slice(&self.kind.code().to_le_bytes());
        bytes[F_VERSION_MIN].copy_from_slice(&self.version_min.to_le_bytes());
        bytes[F_VERSION_MAX].copy_from_slice(&self.version_max.to_le_bytes());
        bytes[F_LANE].copy_from_slice(&self.lane.to_le_bytes());
        bytes[F_FINGERPRINT].copy_from_slice(&self.format_fingerprint.to_le_bytes());
        bytes[F_CLUSTER].copy_from_slice(&self.cluster.0.to_le_bytes());
        bytes[F_FROM].copy_from_slice(&self.from.0.to_le_bytes());
        bytes[F_TO].copy_from_slice(&self.to.0.to_le_bytes());
        bytes[F_INCARNATION].copy_from_slice(&self.incarnation.0.to_le_bytes());
        bytes[F_EXPECTED].copy_from_slice(&self.incarnation_expected.0.to_le_bytes());
        bytes[F_SESSION].copy_from_slice(&self.session.0.to_le_bytes());
        bytes[F_FEATURES].copy_from_slice(&features.to_le_bytes());
        bytes[F_DETAIL].copy_from_slice(&detail.to_le_bytes());
        bytes[F_REASON].copy_from_slice(&u32::from(reason).to_le_bytes());
        let crc = crc32c(&bytes[..F_CRC.start]);
        bytes[F_CRC].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The message in `bytes`, if they are one and undamaged. Padding is ignored: it is where a later version that
    /// still speaks this one may put what this one does not know.
    ///
    /// # Errors
    /// [`HandshakeError::Magic`], [`HandshakeError::Checksum`] or [`HandshakeError::Kind`].
    pub fn decode(bytes: &[u8; HANDSHAKE_BYTES]) -> Result<Self, HandshakeError> {
        check_start(bytes)?;
        if u32::from_le_bytes(field(bytes, F_CRC)) != crc32c(&bytes[..F_CRC.start]) {
            return Err(HandshakeError::Checksum);
        }
        let reason = u32::from_le_bytes(field(bytes, F_REASON)) as u16;
        let detail = u128::from_le_bytes(field(bytes, F_DETAIL));
        let mut features = u64::from_le_bytes(field(bytes, F_FEATURES));
        let kind = match u16::from_le_bytes(field(bytes, F_KIND)) {
            HELLO => HandshakeKind::Hello,
            WELCOME => HandshakeKind::Welcome,
            REJECT => HandshakeKind::Reject(decode_reason(reason, detail)),
            ASK => HandshakeKind::Ask(decode_address(reason, detail)),
            REFERRAL => {
                HandshakeKind::Referral(decode_referral(reason, detail, std::mem::take(&mut features)))
            }
            other => return Err(HandshakeError::Kind(other)),
        };
        Ok(Self {
            kind,
            version_min: u16::from_le_bytes(field(bytes, F_VERSION_MIN)),
            version_max: u16::from_le_bytes(field(bytes, F_VERSION_MAX)),
            lane: u8::from_le_bytes(field(bytes, F_LANE)),
            format_fingerprint: u64::from_le_bytes(field(bytes, F_FINGERPRINT)),
            cluster: ClusterId(u128::from_le_bytes(field(bytes, F_CLUSTER))),
            from: NodeId(u64::from_le_bytes(field(bytes, F_FROM))),
            to: NodeId(u64::from_le_bytes(field(bytes, F_TO))),
            incarnation: Incarnation(u128::from_le_bytes(field(bytes, F_INCARNATION))),
            incarnation_expected: Incarnation(u128::from_le_bytes(field(bytes, F_EXPECTED))),
            session: Session(u64::from_le_bytes(field(bytes, F_SESSION))),
            features,
        })
    }
}

/// Whether `bytes`, the first ones of a connection, however few, can begin a handshake message.
pub(crate) fn check_start(bytes: &[u8]) -> Result<(), HandshakeError> {
    let differs = bytes.iter().zip(HANDSHAKE_MAGIC).any(|(byte, magic)| *byte != magic);
    if differs { Err(HandshakeError::Magic) } else { Ok(()) }
}

fn encode_referral(to: Option<Referral>) -> (u16, u128, u64) {
    let Some(Referral { node, address }) = to else { return (0, 0, 0) };
    let (port, ip) = encode_address(address);
    (port, ip, node.0)
}

fn decode_referral(port: u16, ip: u128, node: u64) -> Option<Referral> {
    let address = decode_address(port, ip).filter(|_| node != 0)?;
    Some(Referral { node: NodeId(node), address })
}

fn encode_address(address: SocketAddr) -> (u16, u128) {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    (address.port(), ip.to_bits())
}

/// An address with a port, or none.
fn decode_address(port: u16, ip: u128) -> Option<SocketAddr> {
    (port != 0).then(|| SocketAddr::new(Ipv6Addr::from_bits(ip).to_canonical(), port))
}

fn encode_reason(reason: RejectReason) -> (u16, u128) {
    match reason {
        RejectReason::WrongCluster => (1, 0),
        RejectReason::WrongDestination { node } => (2, u128::from(node.0)),
        RejectReason::UnknownPeer => (3, 0),
        RejectReason::WrongDirection => (4, 0),
        RejectReason::WrongIncarnation { known } => (5, known.0),
        RejectReason::VersionUnsupported { min, max } => (6, u128::from(min) | u128::from(max) << 64),
        RejectReason::FormatMismatch { fingerprint } => (7, u128::from(fingerprint)),
        RejectReason::LaneUnsupported { lane } => (8, u128::from(lane)),
        RejectReason::StaleSession { newest } => (9, u128::from(newest)),
        RejectReason::Busy { retry_after_ms } => (10, u128::from(retry_after_ms)),
        RejectReason::Other(code) => (code, 0),
    }
}

fn decode_reason(code: u16, detail: u128) -> RejectReason {
    match code {
        1 => RejectReason::WrongCluster,
        2 => RejectReason::WrongDestination { node: NodeId(detail as u64) },
        3 => RejectReason::UnknownPeer,
        4 => RejectReason::WrongDirection,
        5 => RejectReason::WrongIncarnation { known: Incarnation(detail) },
        6 => RejectReason::VersionUnsupported { min: detail as u16, max: (detail >> 64) as u16 },
        7 => RejectReason::FormatMismatch { fingerprint: detail as u64 },
        8 => RejectReason::LaneUnsupported { lane: detail as u8 },
        9 => RejectReason::StaleSession { newest: detail as u64 },
        10 => RejectReason::Busy { retry_after_ms: detail as u64 },
        other => RejectReason::Other(other),
    }
}

/// This node, as it introduces itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub(crate) node: NodeId,
    pub(crate) cluster: ClusterId,
    pub(crate) incarnation: Incarnation,
    pub(crate) format_fingerprint: u64,
    pub(crate) features: u64,
}

/// What this node knows of a peer, as far as a handshake is judged by it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    pub(crate) pinned: Option<Incarnation>,
    /// The newest session accepted, and the incarnation that it was with.
    pub(crate) newest: Option<(Incarnation, Session)>,
}

/// What a handshake settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Settled {
    pub(crate) version: u16,
    pub(crate) incarnation: Incarnation,
    pub(crate) features: u64,
}

impl Identity {
    pub(crate) fn hello(&self, to: NodeId, pinned: Option<Incarnation>, session: Session) -> Handshake {
        Handshake {
            kind: HandshakeKind::Hello,
            version_min: VERSIONS.0,
            version_max: VERSIONS.1,
            lane: Lane::Control as u8,
            format_fingerprint: self.format_fingerprint,
            cluster: self.cluster,
            from: self.node,
            to,
            incarnation: self.incarnation,
            incarnation_expected: pinned.unwrap_or_default(),
            session,
            features: self.features,
        }
    }

    pub(crate) fn welcome(&self, hello: &Handshake, known: &Known, version: u16) -> Handshake {
        let welcome = self.hello(hello.from, known.pinned, hello.session);
        Handshake { kind: HandshakeKind::Welcome, version_min: version, version_max: version, ..welcome }
    }

    /// Asks `of` whom to turn to, and says where to meet this node. `session` only names the question.
    pub(crate) fn ask(&self, of: NodeId, session: Session, own: Option<SocketAddr>) -> Handshake {
        Handshake { kind: HandshakeKind::Ask(own), ..self.hello(of, None, session) }
    }

    /// The answer to `ask`, which has been judged.
    pub(crate) fn refer(&self, ask: &Handshake, to: Option<Referral>) -> Handshake {
        Handshake {
            kind: HandshakeKind::Referral(to),
            features: 0,
            ..self.hello(ask.from, None, ask.session)
        }
    }

    /// Whether one that asks belongs to this cluster, and means this node. Anybody may ask who does: it has no peer's rights.
    pub(crate) fn judge_ask(&self, ask: &Handshake) -> Result<(), RejectReason> {
        self.agree(ask)?;
        if ask.cluster != self.cluster {
            return Err(RejectReason::WrongCluster);
        }
        if ask.to != self.node {
            return Err(RejectReason::WrongDestination { node: self.node });
        }
        Ok(())
    }

    /// Whether this is the answer of the one that was asked, `of`.
    pub(crate) fn judge_referral(&self, answer: &Handshake, of: NodeId) -> Result<(), RejectReason> {
        self.judge_ask(answer)?;
        if answer.from == of { Ok(()) } else { Err(RejectReason::WrongDestination { node: answer.from }) }
    }

    /// The refusal of `hello`. It tells a stranger nothing but the reason.
    pub(crate) fn reject(&self, hello: &Handshake, reason: RejectReason) -> Handshake {
        Handshake {
            kind: HandshakeKind::Reject(reason),
            version_min: VERSIONS.0,
            version_max: VERSIONS.1,
            lane: hello.lane,
            format_fingerprint: 0,
            cluster: ClusterId::default(),
            from: NodeId::default(),
            to: hello.from,
            incarnation: Incarnation::default(),
            incarnation_expected: Incarnation::default(),
            session: hello.session,
            features: 0,
        }
    }

    /// The acceptor's judgement; `known` is what is known of `hello.from`, if it is a peer.
    pub(crate) fn judge_hello(
        &self,
        hello: &Handshake,
        known: Option<&Known>,
    ) -> Result<Settled, RejectReason> {
        let version = self.agree(hello)?;
        let known = self.judge_identity(hello, known)?;
        if hello.from <= self.node {
            return Err(RejectReason::WrongDirection);
        }
        if hello.lane != Lane::Control as u8 {
            return Err(RejectReason::LaneUnsupported { lane: hello.lane });
        }
        match known.newest {
            Some((incarnation, newest)) if incarnation == hello.incarnation && hello.session <= newest => {
                Err(RejectReason::StaleSession { newest: newest.0 })
            }
            _ => Ok(Settled { version, incarnation: hello.incarnation, features: hello.features }),
        }
    }

    /// The dialer's judgement; `known` is what is known of the peer that was dialed, `peer`.
    pub(crate) fn judge_welcome(
        &self,
        welcome: &Handshake,
        peer: NodeId,
        known: &Known,
    ) -> Result<Settled, RejectReason> {
        let version = self.agree(welcome)?;
        if welcome.from != peer {
            return Err(RejectReason::WrongDestination { node: welcome.from });
        }
        self.judge_identity(welcome, Some(known))?;
        Ok(Settled { version, incarnation: welcome.incarnation, features: welcome.features })
    }

    /// The highest version in common.
    fn agree(&self, other: &Handshake) -> Result<u16, RejectReason> {
        let (min, max) = VERSIONS;
        let version = max.min(other.version_max);
        let common = version >= min.max(other.version_min);
        if common { Ok(version) } else { Err(RejectReason::VersionUnsupported { min, max }) }
    }

    fn judge_identity<'a>(
        &self,
        other: &Handshake,
        known: Option<&'a Known>,
    ) -> Result<&'a Known, RejectReason> {
        if other.cluster != self.cluster {
            return Err(RejectReason::WrongCluster);
        }
        if other.to != self.node {
            return Err(RejectReason::WrongDestination { node: self.node });
        }
        let known = known.ok_or(RejectReason::UnknownPeer)?;
        if let Some(pinned) = known.pinned.filter(|pinned| *pinned != other.incarnation) {
            return Err(RejectReason::WrongIncarnation { known: pinned });
        }
        let expected = other.incarnation_expected;
        if expected != Incarnation(0) && expected != self.incarnation {
            return Err(RejectReason::WrongIncarnation { known: self.incarnation });
        }
        if other.format_fingerprint != self.format_fingerprint {
            return Err(RejectReason::FormatMismatch { fingerprint: self.format_fingerprint });
        }
        Ok(known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::tests::print_layout;

    const ACCEPTOR: Identity = Identity {
        node: NodeId(1),
        cluster: ClusterId(0xc1),
        incarnation: Incarnation(0x11),
        format_fingerprint: 0xf0,
        features: 0b01,
    };
    const DIALER: Identity =
        Identity { node: NodeId(2), incarnation: Incarnation(0x22), features: 0b11, ..ACCEPTOR };
    const STRANGE: Known = Known { pinned: None, newest: None };

    fn hello() -> Handshake {
        DIALER.hello(NodeId(1), None, Session((3 << 32) | 5))
    }

    #[test]
    fn the_layout_is_the_one_on_record() {
        let mut hello = DIALER.hello(NodeId(1), Some(Incarnation(0x11)), Session((3 << 32) | 5));
        let mut printed = print_layout(&LAYOUT, &hello.encode());
        hello.kind = HandshakeKind::Reject(RejectReason::VersionUnsupported { min: 2, max: 3 });
        printed += &print_layout(&LAYOUT, &hello.encode());
        assert_eq!(printed, include_str!("../tests/golden/handshake.txt"), "\n{printed}");
    }

    #[test]
    fn every_message_survives_the_wire() {
        let reasons = [
            RejectReason::WrongCluster,
            RejectReason::WrongDestination { node: NodeId(u64::MAX) },
            RejectReason::UnknownPeer,
            RejectReason::WrongDirection,
            RejectReason::WrongIncarnation { known: Incarnation(u128::MAX - 1) },
            RejectReason::VersionUnsupported { min: 2, max: u16::MAX },
            RejectReason::FormatMismatch { fingerprint: u64::MAX },
            RejectReason::LaneUnsupported { lane: 9 },
            RejectReason::StaleSession { newest: 77 },
            RejectReason::Busy { retry_after_ms: 5 },
            RejectReason::Other(999),
        ];
        let kinds = reasons.into_iter().map(HandshakeKind::Reject);
        let kinds = kinds.chain([HandshakeKind::Hello, HandshakeKind::Welcome, HandshakeKind::Ask(None)]);
        for kind in kinds {
            let message = Handshake { kind, ..hello() };
            assert_eq!(Handshake::decode(&message.encode()), Ok(message));
        }
        let addresses =
            ["10.1.2.3:7000", "[fd00::7]:65535", "[::1]:1"].map(|address| address.parse().unwrap());
        let referrals = addresses.map(|address| Some(Referral { node: NodeId(u64::MAX), address }));
        for to in referrals.into_iter().chain([None]) {
            let ask = DIALER.ask(NodeId(1), Session(7), to.map(|to| to.address));
            let message = ACCEPTOR.refer(&ask, to);
            assert_eq!(message.kind, HandshakeKind::Referral(to));
            assert_eq!(Handshake::decode(&message.encode()), Ok(message));
            assert_eq!(Handshake::decode(&ask.encode()), Ok(ask));
        }
    }

    #[test]
    fn whoever_asks_must_belong_to_the_cluster_and_mean_this_node() {
        let ask = DIALER.ask(NodeId(1), Session(7), None);
        assert_eq!(ACCEPTOR.judge_ask(&ask), Ok(()));
        // The lower id may ask as well, and one with another format, which is told so when it becomes a peer.
        let lower = Identity { node: NodeId(0), format_fingerprint: 9, ..DIALER };
        assert_eq!(ACCEPTOR.judge_ask(&lower.ask(NodeId(1), Session(7), None)), Ok(()));
        let foreign = Handshake { cluster: ClusterId(2), ..ask };
        assert_eq!(ACCEPTOR.judge_ask(&foreign), Err(RejectReason::WrongCluster));
        let other = Handshake { to: NodeId(9), ..ask };
        assert_eq!(ACCEPTOR.judge_ask(&other), Err(RejectReason::WrongDestination { node: NodeId(1) }));
        let answer = ACCEPTOR.refer(&ask, None);
        assert_eq!(DIALER.judge_referral(&answer, NodeId(1)), Ok(()));
        let wrong = DIALER.judge_referral(&answer, NodeId(3));
        assert_eq!(wrong, Err(RejectReason::WrongDestination { node: NodeId(1) }));
    }

    #[test]
    fn every_changed_byte_of_a_message_is_refused() {
        let good = hello().encode();
        for at in 0..HANDSHAKE_BYTES {
            for change in 1..=255 {
                let mut bad = good;
                bad[at] ^= change;
                assert!(Handshake::decode(&bad).is_err(), "byte {at} changed by {change:#x}");
            }
        }
    }

    #[test]
    fn a_right_hello_and_a_right_welcome_settle_version_incarnation_and_features() {
        let settled = ACCEPTOR.judge_hello(&hello(), Some(&STRANGE)).unwrap();
        assert_eq!(settled, Settled { version: 1, incarnation: Incarnation(0x22), features: 0b11 });
        let welcome = ACCEPTOR.welcome(&hello(), &STRANGE, settled.version);
        let settled = DIALER.judge_welcome(&welcome, NodeId(1), &STRANGE).unwrap();
        assert_eq!(settled, Settled { version: 1, incarnation: Incarnation(0x11), features: 0b01 });
    }

    #[test]
    fn each_wrong_field_has_its_reason() {
        let pinned = Known { pinned: Some(Incarnation(0x22)), newest: None };
        type Change = fn(&mut Handshake);
        let cases: [(Change, RejectReason); 9] = [
            (|h| h.cluster = ClusterId(2), RejectReason::WrongCluster),
            (|h| h.to = NodeId(7), RejectReason::WrongDestination { node: NodeId(1) }),
            (|h| h.incarnation = Incarnation(9), RejectReason::WrongIncarnation { known: Incarnation(0x22) }),
            (
                |h| h.incarnation_expected = Incarnation(9),
                RejectReason::WrongIncarnation { known: Incarnation(0x11) },
            ),
            (
                |h| (h.version_min, h.version_max) = (2, 9),
                RejectReason::VersionUnsupported { min: 1, max: 1 },
            ),
            (
                |h| (h.version_min, h.version_max) = (0, 0),
                RejectReason::VersionUnsupported { min: 1, max: 1 },
            ),
            (|h| h.format_fingerprint = 1, RejectReason::FormatMismatch { fingerprint: 0xf0 }),
            (|h| h.lane = Lane::Bulk as u8, RejectReason::LaneUnsupported { lane: 2 }),
            (|h| h.from = NodeId(1), RejectReason::WrongDirection),
        ];
        for (change, reason) in cases {
            let mut hello = hello();
            change(&mut hello);
            assert_eq!(ACCEPTOR.judge_hello(&hello, Some(&pinned)), Err(reason), "{hello:?}");
        }
        assert_eq!(ACCEPTOR.judge_hello(&hello(), None), Err(RejectReason::UnknownPeer));
        let welcome = ACCEPTOR.welcome(&hello(), &STRANGE, 1);
        let answers = DIALER.judge_welcome(&welcome, NodeId(7), &STRANGE);
        assert_eq!(answers, Err(RejectReason::WrongDestination { node: NodeId(1) }));
        let later = Known { pinned: Some(Incarnation(0x99)), newest: None };
        let wiped = DIALER.judge_welcome(&welcome, NodeId(1), &later);
        assert_eq!(wiped, Err(RejectReason::WrongIncarnation { known: Incarnation(0x99) }));
    }

    #[test]
    fn a_session_is_accepted_once_and_none_before_it() {
        let newest = Session((3 << 32) | 5);
        let known = Known { pinned: None, newest: Some((Incarnation(0x22), newest)) };
        for (session, fresh) in
            [(newest.0 - 1, false), (newest.0, false), (newest.0 + 1, true), (4 << 32, true)]
        {
            let hello = Handshake { session: Session(session), ..hello() };
            assert_eq!(ACCEPTOR.judge_hello(&hello, Some(&known)).is_ok(), fresh, "{session:#x}");
        }
        // Another life of the data directory counts its boots from the start.
        let reformatted = Handshake { session: Session(1 << 32), incarnation: Incarnation(5), ..hello() };
        assert!(ACCEPTOR.judge_hello(&reformatted, Some(&known)).is_ok());
    }
}
