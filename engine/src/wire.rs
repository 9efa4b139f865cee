//! The bodies of the frames between members: rkyv archives of explicit-endian integers.
//!
//! The frame around a body (net) has its checksum, so the bytes are those that a member wrote; they are
//! nevertheless validated before use, since that member may run other code. Body sizes are fixed by type and
//! asserted below: a change of layout does not compile unnoticed, and [`FINGERPRINT`] in the hello keeps two layouts
//! apart.

use crate::raft::{
    Append, AppendAck, AppendOutcome, BatchRun, LogId, Reach, ReadIndex, ReadIndexReply, ReadKind, Round,
    TimeoutNow, Vote, VoteReply,
};
use ringraft_block::{Incarnation, LogIndex, NodeId, Term};
use ringraft_wal::format::Chain;
use rkyv::rancor;
use rkyv::rend::{u16_le, u32_le, u64_le, u128_le};
use rkyv::util::AlignedVec;
use rkyv::{Archive, Serialize};

/// Frame types of the engine, as the frame header carries them. Below 16 they are net's own.
pub(crate) mod kind {
    pub(crate) const APPEND: u16 = 16;
    pub(crate) const APPEND_ACK: u16 = 17;
    pub(crate) const VOTE: u16 = 18;
    pub(crate) const VOTE_REPLY: u16 = 19;
    pub(crate) const FORMATION: u16 = 20;
    pub(crate) const FETCH: u16 = 21;
    pub(crate) const FETCH_REPLY: u16 = 22;
    pub(crate) const TIMEOUT_NOW: u16 = 23;
    pub(crate) const READ_INDEX: u16 = 24;
    pub(crate) const READ_INDEX_REPLY: u16 = 25;
    pub(crate) const SNAPSHOT_OFFER: u16 = 40;
    pub(crate) const SNAPSHOT_REQUEST: u16 = 41;
    pub(crate) const SNAPSHOT_PIECE: u16 = 42;
}

/// The type of the frames by which a leader tells a member to campaign.
pub const TOLD_TO_CAMPAIGN: u16 = kind::TIMEOUT_NOW;

/// The term of a frame of this type and with this body if it tells a member to campaign: for tests that listen in.
#[must_use]
pub fn told_to_campaign(kind: u16, body: &[u8]) -> Option<Term> {
    if kind != TOLD_TO_CAMPAIGN {
        return None;
    }
    let mut aligned = AlignedVec::<16>::new();
    aligned.extend_from_slice(body);
    match decode(kind, &aligned) {
        Ok(Body::TimeoutNow(message)) => Some(message.term),
        _ => None,
    }
}

/// The largest body: a formation message with a full configuration.
pub(crate) const BODY_BYTES_MAX: usize = 4096;

/// What the hello says of the layouts in this file: changes when any of them does.
pub(crate) const FINGERPRINT: u64 = {
    let sizes = [
        size_of::<ArchivedAppendBody>(),
        size_of::<ArchivedAppendAckBody>(),
        size_of::<ArchivedVoteBody>(),
        size_of::<ArchivedVoteReplyBody>(),
        size_of::<ArchivedFormationBody>(),
        align_of::<ArchivedFormationBody>(),
        size_of::<ArchivedFetchBody>(),
        size_of::<ArchivedFetchReplyBody>(),
        size_of::<ArchivedTimeoutNowBody>(),
        size_of::<ArchivedOfferBody>(),
        size_of::<ArchivedRequestBody>(),
        size_of::<ArchivedPieceBody>(),
        size_of::<rkyv::primitive::ArchivedUsize>(),
        size_of::<ArchivedReadIndexBody>(),
        size_of::<ArchivedReadIndexReplyBody>(),
    ];
    let version = 4;
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325 ^ version;
    let mut at = 0;
    while at < sizes.len() {
        hash = (hash ^ sizes[at] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        at += 1;
    }
    hash
};

const _: () = {
    assert!(size_of::<ArchivedAppendBody>() == 112);
    assert!(size_of::<ArchivedAppendAckBody>() == 72);
    assert!(size_of::<ArchivedVoteBody>() == 32);
    assert!(size_of::<ArchivedVoteReplyBody>() == 16);
    assert!(size_of::<ArchivedTimeoutNowBody>() == 8);
    assert!(size_of::<ArchivedFetchBody>() == 64);
    assert!(size_of::<ArchivedFetchReplyBody>() == 72);
    assert!(size_of::<ArchivedReadIndexBody>() == 24);
    assert!(size_of::<ArchivedReadIndexReplyBody>() == 32);
    assert!(size_of::<ArchivedOfferBody>() == 64);
    assert!(size_of::<ArchivedRequestBody>() == 48);
    assert!(size_of::<ArchivedPieceBody>() == 48);
    assert!(align_of::<ArchivedAppendBody>() <= 16);
    assert!(
        size_of::<rkyv::primitive::ArchivedUsize>() == 4,
        "rkyv's pointer width feature changes our layout"
    );
};

/// An append with what only the driver knows: chains and the lengths of the image beside it.
#[derive(Archive, Serialize)]
struct AppendBody {
    previous_chain: [u8; 16],
    chain: [u8; 16],
    term: u64_le,
    previous_term: u64_le,
    previous_index: u64_le,
    batch_first: u64_le,
    batch_last: u64_le,
    batch_term: u64_le,
    commit: u64_le,
    round: u64_le,
    batch_bytes: u32_le,
    flags: u32_le,
    reserved: u64_le,
}

const APPEND_HAS_BATCH: u32 = 1;
const APPEND_REPLY_NOW: u32 = 2;

#[derive(Archive, Serialize)]
struct AppendAckBody {
    chain: [u8; 16],
    term: u64_le,
    round: u64_le,
    index: u64_le,
    index_term: u64_le,
    refused: u64_le,
    /// See [`AckStages`].
    durable_us: u32_le,
    queued_us: u32_le,
    outcome: u16_le,
    flags: u16_le,
    reserved_2: u32_le,
}

const ACK_MATCHED: u16 = 1;
const ACK_REJECTED: u16 = 2;
const ACK_STALE_TERM: u16 = 3;

const ACK_NO_SPACE: u16 = 1;

#[derive(Archive, Serialize)]
struct VoteBody {
    term: u64_le,
    last_term: u64_le,
    last_index: u64_le,
    pre: u32_le,
    transfer: u32_le,
}

#[derive(Archive, Serialize)]
struct TimeoutNowBody {
    term: u64_le,
}

#[derive(Archive, Serialize)]
struct VoteReplyBody {
    term: u64_le,
    granted: u32_le,
    pre: u32_le,
}

/// What a node says of the cluster's formation when a session begins and when it changes.
#[derive(Archive, Serialize)]
struct FormationBody {
    incarnation: u128_le,
    formed: u32_le,
    /// The encoded base configuration of a formed node.
    configuration: Vec<u8>,
}

/// A question of a member whose log is damaged.
#[derive(Archive, Serialize)]
struct FetchBody {
    previous_chain: [u8; 16],
    proof_chain: [u8; 16],
    token: u64_le,
    first: u64_le,
    /// 0: no proof is asked for.
    proof_last: u64_le,
    flags: u32_le,
    reserved: u32_le,
}

const FETCH_IMAGE: u32 = 1;
const FETCH_ONLY_PROVED: u32 = 2;

/// The answer. With the batch beside it, if the outcome is that.
#[derive(Archive, Serialize)]
struct FetchReplyBody {
    chain: [u8; 16],
    token: u64_le,
    term: u64_le,
    end_term: u64_le,
    end_index: u64_le,
    batch_last: u64_le,
    batch_term: u64_le,
    outcome: u32_le,
    flags: u32_le,
}

const FETCHED_BATCH: u32 = 1;
const FETCHED_NOT_SENT: u32 = 2;
const FETCHED_HAD: u32 = 3;
const FETCHED_NONE: u32 = 4;
const FETCHED_BUSY: u32 = 5;
const FETCHED_UNCLEAR: u32 = 6;

const FETCHED_PROVES: u32 = 1;
const FETCHED_LEADS: u32 = 2;
const FETCHED_IN_DOUBT: u32 = 4;
const FETCHED_CLAIMS: u32 = 8;

/// A follower's question where it can read.
#[derive(Archive, Serialize)]
struct ReadIndexBody {
    term: u64_le,
    context: u64_le,
    kind: u32_le,
    reserved: u32_le,
}

const READ_LEASE: u32 = 1;
const READ_QUORUM: u32 = 2;

/// The leader's answer.
#[derive(Archive, Serialize)]
struct ReadIndexReplyBody {
    term: u64_le,
    context: u64_le,
    index: u64_le,
    ready: u32_le,
    reserved: u32_le,
}

/// A leader's offer of a snapshot.
#[derive(Archive, Serialize)]
struct OfferBody {
    chain: [u8; 16],
    digest: [u8; 16],
    last_term: u64_le,
    last_index: u64_le,
    bytes: u64_le,
    reserved: u64_le,
}

/// What the receiver of a snapshot wants.
#[derive(Archive, Serialize)]
struct RequestBody {
    digest: [u8; 16],
    last_term: u64_le,
    last_index: u64_le,
    offset: u64_le,
    what: u32_le,
    reserved: u32_le,
}

const REQUEST_PIECE: u32 = 1;
const REQUEST_INSTALLED: u32 = 2;
const REQUEST_REFUSED: u32 = 3;
const REQUEST_ANY: u32 = 4;

/// A piece of a snapshot file, whose bytes travel beside it.
#[derive(Archive, Serialize)]
struct PieceBody {
    digest: [u8; 16],
    last_term: u64_le,
    last_index: u64_le,
    offset: u64_le,
    crc: u32_le,
    reserved: u32_le,
}

/// An append as the driver handles it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AppendMessage {
    pub(crate) append: Append,
    /// The chain at `append.previous`.
    pub(crate) previous_chain: Chain,
    /// The chain at the end of the batch; that of `previous` without one.
    pub(crate) chain: Chain,
}

/// An ack as the driver handles it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AckMessage {
    pub(crate) ack: AppendAck,
    /// The chain at the matched position.
    pub(crate) chain: Chain,
    pub(crate) stages: AckStages,
    /// The follower's log has no space for more: it cannot lead either.
    pub(crate) no_space: bool,
}

/// Where a follower spent its time on the newest batch from a leader that became durable there, in microseconds,
/// rounded up. Both are zero on the wire before there was one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AckStages {
    /// From when the batch was received to when it was durable.
    pub durable_us: u32,
    /// Of that, until the log took it for writing: above zero when the log's writes in flight were at their limit,
    /// when a segment was not ready, or while a truncation was under way.
    pub queued_us: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FormationMessage {
    pub(crate) incarnation: Incarnation,
    pub(crate) formed: bool,
    pub(crate) configuration: Vec<u8>,
}

/// Asks for the batch behind a position, from the log or from what was kept aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FetchMessage {
    /// Repeated in the answer.
    pub(crate) token: u64,
    /// The first index of the batch.
    pub(crate) first: LogIndex,
    /// The chain before it.
    pub(crate) previous_chain: Chain,
    /// The end of a batch that the asker has: who has that one too has the same log before it.
    pub(crate) proof: Option<(LogIndex, Chain)>,
    /// Whether the batch itself is wanted.
    pub(crate) image: bool,
    /// Whether a batch counts only if the proof holds.
    pub(crate) only_proved: bool,
}

/// The answer to a [`FetchMessage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FetchReplyMessage {
    pub(crate) token: u64,
    pub(crate) outcome: Fetched,
    /// Whether the sender has what the proof names.
    pub(crate) proves: bool,
    /// The sender's term.
    pub(crate) term: Term,
    /// Whether it leads that term.
    pub(crate) leads: bool,
    /// How far all that it holds reaches; of a leader, its log.
    pub(crate) reach: Reach,
}

/// What a member holds behind the position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fetched {
    /// The batch that ends so, beside the message.
    Batch { end: LogId, chain: Chain },
    /// It holds one, and was not asked to send it.
    NotSent,
    /// It had one that it cannot read.
    Had,
    /// None.
    None,
    /// It holds none, and may have had one: its own log has to be mended before it can tell.
    Unclear,
    /// It cannot tell at the moment.
    Busy,
}

/// Offers a snapshot. Two with the same digest have the same bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct OfferMessage {
    /// The last entry that it covers, and the chain there.
    pub(crate) last: LogId,
    pub(crate) chain: Chain,
    pub(crate) digest: [u8; 16],
    /// Size of the file.
    pub(crate) bytes: u64,
}

/// The receiver's side of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestMessage {
    pub(crate) last: LogId,
    pub(crate) digest: [u8; 16],
    /// Of a piece in the file.
    pub(crate) offset: u64,
    pub(crate) what: Requested,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Requested {
    /// The piece at the offset.
    Piece,
    /// Nothing more: it is installed, or not needed.
    Installed,
    /// Nothing more: it was not to be had here, or cannot be taken now.
    Refused,
    /// An offer of any snapshot that ends behind `last.index`.
    Any,
}

/// A piece of a snapshot, with its bytes beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PieceMessage {
    pub(crate) last: LogId,
    pub(crate) digest: [u8; 16],
    pub(crate) offset: u64,
    /// crc32c of the bytes: frames have no checksum of what is attached.
    pub(crate) crc: u32,
}

/// A decoded body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    Append(AppendMessage),
    AppendAck(AckMessage),
    Vote(Vote),
    VoteReply(VoteReply),
    TimeoutNow(TimeoutNow),
    Formation(FormationMessage),
    Fetch(FetchMessage),
    FetchReply(FetchReplyMessage),
    ReadIndex(ReadIndex),
    ReadIndexReply(ReadIndexReply),
    Offer(OfferMessage),
    Request(RequestMessage),
    Piece(PieceMessage),
}

/// A body that is not what its frame type promises: the peer runs other code, or there is a bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a frame of type {kind} has a malformed body")]
pub(crate) struct MalformedBody {
    pub(crate) kind: u16,
}

/// Encodes bodies into memory that is used again.
#[derive(Default)]
pub(crate) struct Encoder {
    scratch: AlignedVec,
}

impl Encoder {
    pub(crate) fn append(&mut self, message: &AppendMessage) -> &[u8] {
        let AppendMessage { append, previous_chain, chain } = message;
        let batch = append.batch;
        let mut flags = 0;
        flags |= if batch.is_some() { APPEND_HAS_BATCH } else { 0 };
        flags |= if append.reply_now { APPEND_REPLY_NOW } else { 0 };
        self.encode(&AppendBody {
            previous_chain: previous_chain.0,
            chain: chain.0,
            term: append.term.get().into(),
            previous_term: append.previous.term.get().into(),
            previous_index: append.previous.index.get().into(),
            batch_first: batch.map_or(0, |batch| batch.first.get()).into(),
            batch_last: batch.map_or(0, |batch| batch.last.get()).into(),
            batch_term: batch.map_or(0, |batch| batch.term.get()).into(),
            commit: append.commit.get().into(),
            round: append.round.0.into(),
            batch_bytes: batch.map_or(0, |batch| batch.bytes).into(),
            flags: flags.into(),
            reserved: 0.into(),
        })
    }

    pub(crate) fn ack(&mut self, message: &AckMessage) -> &[u8] {
        let AckMessage { ack, chain, stages, no_space } = message;
        let (outcome, position, refused) = match ack.outcome {
            AppendOutcome::Matched { matched } => (ACK_MATCHED, matched, LogIndex(0)),
            AppendOutcome::Rejected { refused, hint } => (ACK_REJECTED, hint, refused),
            AppendOutcome::StaleTerm => (ACK_STALE_TERM, LogId::default(), LogIndex(0)),
        };
        self.encode(&AppendAckBody {
            chain: chain.0,
            term: ack.term.get().into(),
            round: ack.round.0.into(),
            index: position.index.get().into(),
            index_term: position.term.get().into(),
            refused: refused.get().into(),
            durable_us: stages.durable_us.into(),
            queued_us: stages.queued_us.into(),
            outcome: outcome.into(),
            flags: if *no_space { ACK_NO_SPACE } else { 0 }.into(),
            reserved_2: 0.into(),
        })
    }

    pub(crate) fn vote(&mut self, vote: &Vote) -> &[u8] {
        self.encode(&VoteBody {
            term: vote.term.get().into(),
            last_term: vote.last.term.get().into(),
            last_index: vote.last.index.get().into(),
            pre: u32::from(vote.pre).into(),
            transfer: u32::from(vote.transfer).into(),
        })
    }

    pub(crate) fn timeout_now(&mut self, message: &TimeoutNow) -> &[u8] {
        self.encode(&TimeoutNowBody { term: message.term.get().into() })
    }

    pub(crate) fn vote_reply(&mut self, reply: &VoteReply) -> &[u8] {
        self.encode(&VoteReplyBody {
            term: reply.term.get().into(),
            granted: u32::from(reply.granted).into(),
            pre: u32::from(reply.pre).into(),
        })
    }

    pub(crate) fn formation(&mut self, message: &FormationMessage) -> &[u8] {
        self.encode(&FormationBody {
            incarnation: message.incarnation.0.into(),
            formed: u32::from(message.formed).into(),
            configuration: message.configuration.clone(),
        })
    }

    pub(crate) fn fetch(&mut self, message: &FetchMessage) -> &[u8] {
        let (proof_last, proof_chain) = message.proof.unwrap_or_default();
        let image = if message.image { FETCH_IMAGE } else { 0 };
        let only_proved = if message.only_proved { FETCH_ONLY_PROVED } else { 0 };
        self.encode(&FetchBody {
            previous_chain: message.previous_chain.0,
            proof_chain: proof_chain.0,
            token: message.token.into(),
            first: message.first.get().into(),
            proof_last: proof_last.get().into(),
            flags: (image | only_proved).into(),
            reserved: 0.into(),
        })
    }

    pub(crate) fn fetch_reply(&mut self, message: &FetchReplyMessage) -> &[u8] {
        let (outcome, end, chain) = match message.outcome {
            Fetched::Batch { end, chain } => (FETCHED_BATCH, end, chain),
            Fetched::NotSent => (FETCHED_NOT_SENT, LogId::default(), Chain::default()),
            Fetched::Had => (FETCHED_HAD, LogId::default(), Chain::default()),
            Fetched::None => (FETCHED_NONE, LogId::default(), Chain::default()),
            Fetched::Unclear => (FETCHED_UNCLEAR, LogId::default(), Chain::default()),
            Fetched::Busy => (FETCHED_BUSY, LogId::default(), Chain::default()),
        };
        let proves = if message.proves { FETCHED_PROVES } else { 0 };
        let leads = if message.leads { FETCHED_LEADS } else { 0 };
        let in_doubt = if message.reach.in_doubt { FETCHED_IN_DOUBT } else { 0 };
        let claims = if message.reach.claims { FETCHED_CLAIMS } else { 0 };
        self.encode(&FetchReplyBody {
            chain: chain.0,
            token: message.token.into(),
            term: message.term.get().into(),
            end_term: message.reach.highest.term.get().into(),
            end_index: message.reach.highest.index.get().into(),
            batch_last: end.index.get().into(),
            batch_term: end.term.get().into(),
            outcome: outcome.into(),
            flags: (proves | leads | in_doubt | claims).into(),
        })
    }

    pub(crate) fn read_index(&mut self, request: &ReadIndex) -> &[u8] {
        let kind = if request.kind == ReadKind::Lease { READ_LEASE } else { READ_QUORUM };
        self.encode(&ReadIndexBody {
            term: request.term.get().into(),
            context: request.context.into(),
            kind: kind.into(),
            reserved: 0.into(),
        })
    }

    pub(crate) fn read_index_reply(&mut self, reply: &ReadIndexReply) -> &[u8] {
        self.encode(&ReadIndexReplyBody {
            term: reply.term.get().into(),
            context: reply.context.into(),
            index: reply.index.unwrap_or_default().get().into(),
            ready: u32::from(reply.index.is_some()).into(),
            reserved: 0.into(),
        })
    }

    pub(crate) fn offer(&mut self, message: &OfferMessage) -> &[u8] {
        self.encode(&OfferBody {
            chain: message.chain.0,
            digest: message.digest,
            last_term: message.last.term.get().into(),
            last_index: message.last.index.get().into(),
            bytes: message.bytes.into(),
            reserved: 0.into(),
        })
    }

    pub(crate) fn request(&mut self, message: &RequestMessage) -> &[u8] {
        let what = match message.what {
            Requested::Piece => REQUEST_PIECE,
            Requested::Installed => REQUEST_INSTALLED,
            Requested::Refused => REQUEST_REFUSED,
            Requested::Any => REQUEST_ANY,
        };
        self.encode(&RequestBody {
            digest: message.digest,
            last_term: message.last.term.get().into(),
            last_index: message.last.index.get().into(),
            offset: message.offset.into(),
            what: what.into(),
            reserved: 0.into(),
        })
    }

    pub(crate) fn piece(&mut self, message: &PieceMessage) -> &[u8] {
        self.encode(&PieceBody {
            digest: message.digest,
            last_term: message.last.term.get().into(),
            last_index: message.last.index.get().into(),
            offset: message.offset.into(),
            crc: message.crc.into(),
            reserved: 0.into(),
        })
    }

    fn encode<T>(&mut self, body: &T) -> &[u8]
    where
        T: for<'a> Serialize<
            rkyv::api::high::HighSerializer<AlignedVec, rkyv::ser::allocator::ArenaHandle<'a>, rancor::Panic>,
        >,
    {
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        // Growing memory is the only way for this to fail, and that aborts.
        let Ok(scratch) = rkyv::api::high::to_bytes_in::<_, rancor::Panic>(body, scratch);
        self.scratch = scratch;
        &self.scratch
    }
}

/// Decodes the body of a frame of type `kind`. `body` is aligned to 16 bytes, as net delivers it.
pub(crate) fn decode(kind: u16, body: &[u8]) -> Result<Body, MalformedBody> {
    let malformed = MalformedBody { kind };
    match kind {
        kind::APPEND => {
            let body = access::<ArchivedAppendBody>(body).ok_or(malformed)?;
            decode_append(body).map(Body::Append).ok_or(malformed)
        }
        kind::APPEND_ACK => {
            let body = access::<ArchivedAppendAckBody>(body).ok_or(malformed)?;
            decode_ack(body).map(Body::AppendAck).ok_or(malformed)
        }
        kind::VOTE => {
            let body = access::<ArchivedVoteBody>(body).ok_or(malformed)?;
            Ok(Body::Vote(Vote {
                term: Term(body.term.to_native()),
                last: log_id(body.last_term, body.last_index),
                pre: flag(body.pre).ok_or(malformed)?,
                transfer: flag(body.transfer).ok_or(malformed)?,
            }))
        }
        kind::TIMEOUT_NOW => {
            let body = access::<ArchivedTimeoutNowBody>(body).ok_or(malformed)?;
            Ok(Body::TimeoutNow(TimeoutNow { term: Term(body.term.to_native()) }))
        }
        kind::VOTE_REPLY => {
            let body = access::<ArchivedVoteReplyBody>(body).ok_or(malformed)?;
            Ok(Body::VoteReply(VoteReply {
                term: Term(body.term.to_native()),
                granted: flag(body.granted).ok_or(malformed)?,
                pre: flag(body.pre).ok_or(malformed)?,
            }))
        }
        kind::FORMATION => {
            let body = access::<ArchivedFormationBody>(body).ok_or(malformed)?;
            Ok(Body::Formation(FormationMessage {
                incarnation: Incarnation(body.incarnation.to_native()),
                formed: flag(body.formed).ok_or(malformed)?,
                configuration: body.configuration.to_vec(),
            }))
        }
        kind::FETCH => {
            let body = access::<ArchivedFetchBody>(body).ok_or(malformed)?;
            decode_fetch(body).map(Body::Fetch).ok_or(malformed)
        }
        kind::FETCH_REPLY => {
            let body = access::<ArchivedFetchReplyBody>(body).ok_or(malformed)?;
            decode_fetch_reply(body).map(Body::FetchReply).ok_or(malformed)
        }
        kind::READ_INDEX => {
            let body = access::<ArchivedReadIndexBody>(body).ok_or(malformed)?;
            let kind = match body.kind.to_native() {
                READ_LEASE => ReadKind::Lease,
                READ_QUORUM => ReadKind::Quorum,
                _ => return Err(malformed),
            };
            let (term, context) = (Term(body.term.to_native()), body.context.to_native());
            Ok(Body::ReadIndex(ReadIndex { term, context, kind }))
        }
        kind::READ_INDEX_REPLY => {
            let body = access::<ArchivedReadIndexReplyBody>(body).ok_or(malformed)?;
            let ready = flag(body.ready).ok_or(malformed)?;
            Ok(Body::ReadIndexReply(ReadIndexReply {
                term: Term(body.term.to_native()),
                context: body.context.to_native(),
                index: ready.then(|| LogIndex(body.index.to_native())),
            }))
        }
        kind::SNAPSHOT_OFFER => {
            let body = access::<ArchivedOfferBody>(body).ok_or(malformed)?;
            Ok(Body::Offer(OfferMessage {
                last: log_id(body.last_term, body.last_index),
                chain: Chain(body.chain),
                digest: body.digest,
                bytes: body.bytes.to_native(),
            }))
        }
        kind::SNAPSHOT_REQUEST => {
            let body = access::<ArchivedRequestBody>(body).ok_or(malformed)?;
            let what = match body.what.to_native() {
                REQUEST_PIECE => Requested::Piece,
                REQUEST_INSTALLED => Requested::Installed,
                REQUEST_REFUSED => Requested::Refused,
                REQUEST_ANY => Requested::Any,
                _ => return Err(malformed),
            };
            Ok(Body::Request(RequestMessage {
                last: log_id(body.last_term, body.last_index),
                digest: body.digest,
                offset: body.offset.to_native(),
                what,
            }))
        }
        kind::SNAPSHOT_PIECE => {
            let body = access::<ArchivedPieceBody>(body).ok_or(malformed)?;
            Ok(Body::Piece(PieceMessage {
                last: log_id(body.last_term, body.last_index),
                digest: body.digest,
                offset: body.offset.to_native(),
                crc: body.crc.to_native(),
            }))
        }
        _ => Err(malformed),
    }
}

fn access<'a, T>(body: &'a [u8]) -> Option<&'a T>
where
    T: rkyv::Portable
        + for<'b> rkyv::bytecheck::CheckBytes<rkyv::api::high::HighValidator<'b, rancor::Failure>>,
{
    rkyv::access::<T, rancor::Failure>(body).ok()
}

fn log_id(term: u64_le, index: u64_le) -> LogId {
    LogId { term: Term(term.to_native()), index: LogIndex(index.to_native()) }
}

fn flag(value: u32_le) -> Option<bool> {
    match value.to_native() {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

fn decode_append(body: &ArchivedAppendBody) -> Option<AppendMessage> {
    let flags = body.flags.to_native();
    if flags & !(APPEND_HAS_BATCH | APPEND_REPLY_NOW) != 0 {
        return None;
    }
    let previous = log_id(body.previous_term, body.previous_index);
    let batch = (flags & APPEND_HAS_BATCH != 0).then(|| BatchRun {
        first: LogIndex(body.batch_first.to_native()),
        last: LogIndex(body.batch_last.to_native()),
        term: Term(body.batch_term.to_native()),
        bytes: body.batch_bytes.to_native(),
    });
    let term = Term(body.term.to_native());
    if let Some(batch) = batch {
        let follows = previous.index.get().checked_add(1) == Some(batch.first.get());
        let ordered = batch.first <= batch.last && previous.term <= batch.term && batch.term <= term;
        if !follows || !ordered {
            return None;
        }
    }
    let append = Append {
        term,
        previous,
        batch,
        commit: LogIndex(body.commit.to_native()),
        round: Round(body.round.to_native()),
        reply_now: flags & APPEND_REPLY_NOW != 0,
        configuration: None,
    };
    Some(AppendMessage { append, previous_chain: Chain(body.previous_chain), chain: Chain(body.chain) })
}

fn decode_ack(body: &ArchivedAppendAckBody) -> Option<AckMessage> {
    let flags = body.flags.to_native();
    if flags & !ACK_NO_SPACE != 0 {
        return None;
    }
    let position = log_id(body.index_term, body.index);
    let outcome = match body.outcome.to_native() {
        ACK_MATCHED => AppendOutcome::Matched { matched: position },
        ACK_REJECTED => {
            AppendOutcome::Rejected { refused: LogIndex(body.refused.to_native()), hint: position }
        }
        ACK_STALE_TERM => AppendOutcome::StaleTerm,
        _ => return None,
    };
    Some(AckMessage {
        ack: AppendAck { term: Term(body.term.to_native()), round: Round(body.round.to_native()), outcome },
        chain: Chain(body.chain),
        stages: AckStages { durable_us: body.durable_us.to_native(), queued_us: body.queued_us.to_native() },
        no_space: flags & ACK_NO_SPACE != 0,
    })
}

fn decode_fetch(body: &ArchivedFetchBody) -> Option<FetchMessage> {
    let flags = body.flags.to_native();
    let first = LogIndex(body.first.to_native());
    if flags & !(FETCH_IMAGE | FETCH_ONLY_PROVED) != 0 || first.get() == 0 {
        return None;
    }
    let proof_last = LogIndex(body.proof_last.to_native());
    Some(FetchMessage {
        token: body.token.to_native(),
        first,
        previous_chain: Chain(body.previous_chain),
        proof: (proof_last.get() > 0).then_some((proof_last, Chain(body.proof_chain))),
        image: flags & FETCH_IMAGE != 0,
        only_proved: flags & FETCH_ONLY_PROVED != 0,
    })
}

fn decode_fetch_reply(body: &ArchivedFetchReplyBody) -> Option<FetchReplyMessage> {
    let flags = body.flags.to_native();
    let highest = log_id(body.end_term, body.end_index);
    if flags & !(FETCHED_PROVES | FETCHED_LEADS | FETCHED_IN_DOUBT | FETCHED_CLAIMS) != 0 {
        return None;
    }
    let outcome = match body.outcome.to_native() {
        FETCHED_BATCH => {
            Fetched::Batch { end: log_id(body.batch_term, body.batch_last), chain: Chain(body.chain) }
        }
        FETCHED_NOT_SENT => Fetched::NotSent,
        FETCHED_HAD => Fetched::Had,
        FETCHED_NONE => Fetched::None,
        FETCHED_BUSY => Fetched::Busy,
        FETCHED_UNCLEAR => Fetched::Unclear,
        _ => return None,
    };
    Some(FetchReplyMessage {
        token: body.token.to_native(),
        outcome,
        proves: flags & FETCHED_PROVES != 0,
        term: Term(body.term.to_native()),
        leads: flags & FETCHED_LEADS != 0,
        reach: Reach {
            highest,
            in_doubt: flags & FETCHED_IN_DOUBT != 0,
            claims: flags & FETCHED_CLAIMS != 0,
        },
    })
}

/// The base configuration of a formed cluster, as hard state keeps it and formation messages carry it.
pub(crate) mod configuration {
    use super::{Incarnation, NodeId, rancor};
    use crate::raft::{Configuration, LeaseSettings, Member, MemberRole, Settings};
    use rkyv::rend::{u32_le, u64_le, u128_le};
    use rkyv::{Archive, Serialize};

    #[derive(Archive, Serialize)]
    struct Record {
        members: Vec<MemberRecord>,
        outgoing: Vec<u64_le>,
        /// 0: no leases.
        lease_election_timeout_min_ns: u64_le,
        lease_drift_ppm: u32_le,
        planned: Vec<PlannedRecord>,
        next_id: u64_le,
    }

    #[derive(Archive, Serialize)]
    struct PlannedRecord {
        id: u64_le,
        role: u32_le,
    }

    #[derive(Archive, Serialize)]
    struct MemberRecord {
        incarnation: u128_le,
        id: u64_le,
        role: u32_le,
        address: String,
    }

    const VOTER: u32 = 1;
    const LEARNER: u32 = 2;

    pub(crate) fn encode(configuration: &Configuration) -> Vec<u8> {
        let members = configuration.members().iter().map(|member| MemberRecord {
            incarnation: member.incarnation.0.into(),
            id: member.id.get().into(),
            role: code(member.role).into(),
            address: member.address.clone(),
        });
        let outgoing = configuration.outgoing().iter().map(|id| id.get().into());
        let planned = configuration.planned().iter();
        let planned =
            planned.map(|(id, role)| PlannedRecord { id: id.get().into(), role: code(*role).into() });
        let lease = configuration.settings().lease;
        let record = Record {
            members: members.collect(),
            outgoing: outgoing.collect(),
            lease_election_timeout_min_ns: lease.map_or(0, |lease| lease.election_timeout_min_ns).into(),
            lease_drift_ppm: lease.map_or(0, |lease| lease.drift_ppm).into(),
            planned: planned.collect(),
            next_id: configuration.next_id().get().into(),
        };
        let Ok(bytes) = rkyv::to_bytes::<rancor::Panic>(&record);
        bytes.into_vec()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Configuration> {
        let mut aligned = rkyv::util::AlignedVec::<16>::with_capacity(bytes.len());
        aligned.extend_from_slice(bytes);
        let record = super::access::<ArchivedRecord>(&aligned)?;
        let members = record.members.iter().map(|member| {
            Some(Member {
                id: NodeId(member.id.to_native()),
                incarnation: Incarnation(member.incarnation.to_native()),
                address: member.address.as_str().to_owned(),
                role: role(member.role)?,
            })
        });
        let outgoing = record.outgoing.iter().map(|id| NodeId(id.to_native()));
        let planned =
            record.planned.iter().map(|planned| Some((NodeId(planned.id.to_native()), role(planned.role)?)));
        let election_timeout_min_ns = record.lease_election_timeout_min_ns.to_native();
        let drift_ppm = record.lease_drift_ppm.to_native();
        let lease = LeaseSettings { election_timeout_min_ns, drift_ppm };
        let settings = Settings { lease: (election_timeout_min_ns > 0).then_some(lease) };
        let configuration =
            Configuration::joint(members.collect::<Option<Vec<_>>>()?, outgoing.collect()).ok()?;
        let configuration = configuration.with_settings(settings);
        let next_id = NodeId(record.next_id.to_native());
        configuration.with_plan(planned.collect::<Option<Vec<_>>>()?, next_id).ok()
    }

    fn code(role: MemberRole) -> u32 {
        match role {
            MemberRole::Voter => VOTER,
            MemberRole::Learner => LEARNER,
        }
    }

    fn role(code: u32_le) -> Option<MemberRole> {
        match code.to_native() {
            VOTER => Some(MemberRole::Voter),
            LEARNER => Some(MemberRole::Learner),
            _ => None,
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn every_step_of_a_change_decodes_to_what_was_encoded_and_cut_or_changed_bytes_never_panic() {
            let member = |id: u64, role| Member {
                id: NodeId(id),
                incarnation: Incarnation(u128::from(id) << 64),
                address: format!("10.0.0.{id}:7000"),
                role,
            };
            use MemberRole::{Learner, Voter};
            let settled = Configuration::new(vec![member(1, Voter), member(4, Learner)]).expect("valid");
            let reserved = settled.clone().with_plan(Vec::new(), NodeId(9)).expect("valid");
            let planned = settled.clone().with_plan(vec![(NodeId(4), Voter)], NodeId(5)).expect("valid");
            let joint = Configuration::joint(vec![member(1, Learner), member(4, Voter)], vec![NodeId(1)]);
            let joint = joint.and_then(|joint| joint.with_plan(vec![(NodeId(4), Voter)], NodeId(5)));
            let lease = LeaseSettings { election_timeout_min_ns: 1 << 40, drift_ppm: 200 };
            let leased = planned.clone().with_settings(Settings { lease: Some(lease) });
            for configuration in [settled, reserved, planned, joint.expect("valid"), leased] {
                let encoded = encode(&configuration);
                assert_eq!(decode(&encoded), Some(configuration));
                for at in 0..encoded.len() {
                    let _ = decode(&encoded[..at]);
                    let mut changed = encoded.clone();
                    changed[at] ^= 0x81;
                    let _ = decode(&changed);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(kind: u16, bytes: &[u8]) -> Body {
        let mut aligned = AlignedVec::<16>::new();
        aligned.extend_from_slice(bytes);
        decode(kind, &aligned).expect("well formed")
    }

    fn append() -> AppendMessage {
        AppendMessage {
            append: Append {
                term: Term(7),
                previous: LogId { term: Term(6), index: LogIndex(41) },
                batch: Some(BatchRun { first: LogIndex(42), last: LogIndex(50), term: Term(7), bytes: 4000 }),
                commit: LogIndex(40),
                round: Round(9),
                reply_now: true,
                configuration: None,
            },
            previous_chain: Chain([1; 16]),
            chain: Chain([2; 16]),
        }
    }

    #[test]
    fn every_body_decodes_to_what_was_encoded() {
        let mut encoder = Encoder::default();
        let message = append();
        assert_eq!(round_trip(kind::APPEND, encoder.append(&message)), Body::Append(message));
        for outcome in [
            AppendOutcome::Matched { matched: LogId { term: Term(3), index: LogIndex(8) } },
            AppendOutcome::Rejected {
                refused: LogIndex(9),
                hint: LogId { term: Term(2), index: LogIndex(4) },
            },
            AppendOutcome::StaleTerm,
        ] {
            let ack = AckMessage {
                ack: AppendAck { term: Term(7), round: Round(3), outcome },
                chain: Chain([5; 16]),
                stages: AckStages { durable_us: 40, queued_us: 2 },
                no_space: true,
            };
            assert_eq!(round_trip(kind::APPEND_ACK, encoder.ack(&ack)), Body::AppendAck(ack));
        }
        for (pre, transfer) in [(true, false), (false, true)] {
            let last = LogId { term: Term(1), index: LogIndex(5) };
            let vote = Vote { term: Term(2), last, pre, transfer };
            assert_eq!(round_trip(kind::VOTE, encoder.vote(&vote)), Body::Vote(vote));
        }
        let now = TimeoutNow { term: Term(9) };
        assert_eq!(round_trip(kind::TIMEOUT_NOW, encoder.timeout_now(&now)), Body::TimeoutNow(now));
        let reply = VoteReply { term: Term(2), granted: true, pre: false };
        assert_eq!(round_trip(kind::VOTE_REPLY, encoder.vote_reply(&reply)), Body::VoteReply(reply));
        for (proof, image, only_proved) in
            [(None, true, false), (Some((LogIndex(7), Chain([7; 16]))), false, true)]
        {
            let fetch = FetchMessage {
                token: 3,
                first: LogIndex(5),
                previous_chain: Chain([4; 16]),
                proof,
                image,
                only_proved,
            };
            assert_eq!(round_trip(kind::FETCH, encoder.fetch(&fetch)), Body::Fetch(fetch));
        }
        let end = LogId { term: Term(2), index: LogIndex(6) };
        for outcome in [
            Fetched::Batch { end, chain: Chain([6; 16]) },
            Fetched::NotSent,
            Fetched::Had,
            Fetched::None,
            Fetched::Unclear,
            Fetched::Busy,
        ] {
            let (proves, leads) = (outcome == Fetched::NotSent, outcome == Fetched::None);
            let (in_doubt, claims) = (outcome == Fetched::Unclear, outcome == Fetched::Had);
            let reach = Reach { highest: end, in_doubt, claims };
            let reply = FetchReplyMessage { token: 9, outcome, proves, term: Term(8), leads, reach };
            assert_eq!(round_trip(kind::FETCH_REPLY, encoder.fetch_reply(&reply)), Body::FetchReply(reply));
        }
        for (kind, index) in [(ReadKind::Lease, None), (ReadKind::Quorum, Some(LogIndex(12)))] {
            let request = ReadIndex { term: Term(4), context: u64::MAX - 1, kind };
            assert_eq!(round_trip(kind::READ_INDEX, encoder.read_index(&request)), Body::ReadIndex(request));
            let reply = ReadIndexReply { term: Term(5), context: 77, index };
            let body = round_trip(kind::READ_INDEX_REPLY, encoder.read_index_reply(&reply));
            assert_eq!(body, Body::ReadIndexReply(reply));
        }
        let (last, digest) = (LogId { term: Term(4), index: LogIndex(70) }, [9; 16]);
        let offer = OfferMessage { last, chain: Chain([3; 16]), digest, bytes: 1 << 30 };
        assert_eq!(round_trip(kind::SNAPSHOT_OFFER, encoder.offer(&offer)), Body::Offer(offer));
        for what in [Requested::Piece, Requested::Installed, Requested::Refused, Requested::Any] {
            let request = RequestMessage { last, digest, offset: 1 << 20, what };
            let body = round_trip(kind::SNAPSHOT_REQUEST, encoder.request(&request));
            assert_eq!(body, Body::Request(request));
        }
        let piece = PieceMessage { last, digest, offset: 1 << 20, crc: 7 };
        assert_eq!(round_trip(kind::SNAPSHOT_PIECE, encoder.piece(&piece)), Body::Piece(piece));
        let formation =
            FormationMessage { incarnation: Incarnation(77), formed: true, configuration: vec![1, 2, 3] };
        assert_eq!(round_trip(kind::FORMATION, encoder.formation(&formation)), Body::Formation(formation));
    }

    #[test]
    fn a_configuration_keeps_what_leases_count_on() {
        use crate::raft::{Configuration, LeaseSettings, Member, MemberRole, Settings};
        let member = |id| Member {
            id: NodeId(id),
            incarnation: Incarnation(7),
            address: "127.0.0.1:1".to_owned(),
            role: MemberRole::Voter,
        };
        let plain = Configuration::new(vec![member(1), member(2)]).expect("valid");
        let lease = Some(LeaseSettings { election_timeout_min_ns: 500_000_000, drift_ppm: 200 });
        for settings in [Settings::default(), Settings { lease }] {
            let configuration = plain.clone().with_settings(settings);
            assert_eq!(configuration::decode(&configuration::encode(&configuration)), Some(configuration));
        }
    }

    #[test]
    fn a_short_body_or_an_unknown_value_is_malformed_and_never_a_panic() {
        let mut encoder = Encoder::default();
        let mut bytes = AlignedVec::<16>::new();
        bytes.extend_from_slice(encoder.append(&append()));
        for kind in 0..32 {
            for length in 0..bytes.len() {
                let mut cut = AlignedVec::<16>::new();
                cut.extend_from_slice(&bytes[..length]);
                let _ = decode(kind, &cut);
            }
        }
        assert!(decode(kind::APPEND, &bytes[..bytes.len() - 16]).is_err());
        let mut unordered = append();
        unordered.append.batch =
            Some(BatchRun { first: LogIndex(44), last: LogIndex(50), term: Term(7), bytes: 1 });
        bytes.clear();
        bytes.extend_from_slice(encoder.append(&unordered));
        assert_eq!(decode(kind::APPEND, &bytes), Err(MalformedBody { kind: kind::APPEND }));
    }
}
