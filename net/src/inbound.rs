//! From bytes to frames.
//!
//! Bytes land in a staging buffer of constant size. A frame whose header and body are there is checked and its body
//! copied out; if it has an attachment, a block is taken for it, what of it is in the staging buffer is copied, and
//! the rest is received straight into the block. So the first few KiB of a batch may be copied once, and the bulk
//! of it never.
//!
//! Nothing is allocated for a length that the caps of its frame type do not allow, and a stream that was wrong once
//! is never read on: the caller closes the connection at the first error.

use crate::body::{AlignedBytes, BodyPool};
use crate::config::FrameCaps;
use crate::error::FrameError;
use crate::frame::{
    ATTACHMENT_OFFSET, Attachment, Frame, HEADER_BYTES, Header, KIND_GOODBYE, KIND_KEEPALIVE, Session,
};
use crate::link::RecvInto;
use ringraft_block::{Block, BlockBuf, GroupId, crc32c, round_up_to_block};

/// Where the blocks of attachments come from.
pub trait BlockSource<B: BlockBuf> {
    /// A block of at least `bytes` capacity, or none for now: the frame waits, its connection is not read, and the
    /// question is asked again in the next turn.
    fn block(&mut self, bytes: usize) -> Option<Block<B>>;
}

impl<B: BlockBuf, F: FnMut(usize) -> Option<Block<B>>> BlockSource<B> for F {
    fn block(&mut self, bytes: usize) -> Option<Block<B>> {
        self(bytes)
    }
}

/// The receiving side of a session.
pub(crate) struct Inbound<B: BlockBuf> {
    version: u16,
    session: Session,
    /// The sequence number of the next frame.
    sequence: u64,
    /// Absent while a receive fills it.
    staging: Option<Box<[u8]>>,
    /// Received and not yet taken: `start..end` of the staging buffer.
    start: usize,
    end: usize,
    /// A frame that lacks (some of) its attachment.
    partial: Option<Partial<B>>,
    /// When the first byte of the frame that is arriving came.
    frame_started_ns: u64,
    /// When the last byte came, or the peer was excused.
    pub(crate) received_ns: u64,
    /// When the last byte came.
    pub(crate) heard_ns: u64,
}

struct Partial<B: BlockBuf> {
    kind: u16,
    group: GroupId,
    body: AlignedBytes,
    /// Absent before one could be had, and while a receive fills it.
    block: Option<Block<B>>,
    filled: usize,
    bytes: usize,
}

/// What became of the received bytes.
pub(crate) enum Step<B: BlockBuf> {
    /// A frame for the engine.
    Frame(Frame<B>),
    /// The peer lives.
    Keepalive,
    /// The peer closes.
    Goodbye,
    /// Receive more, by [`Inbound::target`].
    NeedBytes,
    /// No block could be had: try again later.
    NeedBlock,
}

impl<B: BlockBuf> Inbound<B> {
    pub(crate) fn new(now: u64, version: u16, session: Session, staging_bytes: usize) -> Self {
        Self {
            version,
            session,
            sequence: 0,
            staging: Some(vec![0; staging_bytes].into_boxed_slice()),
            start: 0,
            end: 0,
            partial: None,
            frame_started_ns: now,
            received_ns: now,
            heard_ns: now,
        }
    }

    /// When the first byte of the frame that is arriving came; none between frames.
    pub(crate) fn frame_started_ns(&self) -> Option<u64> {
        (self.partial.is_some() || self.start < self.end).then_some(self.frame_started_ns)
    }

    /// Nothing was read for a while by this side's own choice: the peer is not to blame for the time.
    pub(crate) fn excuse(&mut self, now: u64) {
        (self.frame_started_ns, self.received_ns) = (now, now);
    }

    /// Takes the outcome of a receive.
    pub(crate) fn received(&mut self, now: u64, into: RecvInto<B>, count: usize) {
        if self.frame_started_ns().is_none() {
            self.frame_started_ns = now;
        }
        (self.received_ns, self.heard_ns) = (now, now);
        match into {
            RecvInto::Bytes { bytes, range } => {
                assert!(count <= range.len(), "the link filled no more than was asked for");
                self.end = range.start + count;
                self.staging = Some(bytes);
            }
            RecvInto::Block { block, range } => {
                assert!(count <= range.len(), "the link filled no more than was asked for");
                let partial = self.partial.as_mut().expect("a block was receiving for a frame");
                partial.filled += count;
                partial.block = Some(block);
            }
        }
    }

    /// Where the next bytes go. Call after [`Step::NeedBytes`], and give the outcome to [`Inbound::received`].
    pub(crate) fn target(&mut self) -> RecvInto<B> {
        if let Some(partial) = &mut self.partial {
            let block = partial.block.take().expect("a frame that needs bytes has its block");
            return RecvInto::Block {
                block,
                range: ATTACHMENT_OFFSET + partial.filled..ATTACHMENT_OFFSET + partial.bytes,
            };
        }
        let mut bytes = self.staging.take().expect("one receive at a time");
        // What is left is less than a header and a body, a few KiB at most.
        bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let range = self.end..bytes.len();
        assert!(!range.is_empty(), "the staging buffer holds any header with its body");
        RecvInto::Bytes { bytes, range }
    }

    /// Takes the next frame out of what was received. No receive is in flight.
    pub(crate) fn step(
        &mut self,
        caps: &FrameCaps,
        bodies: &BodyPool,
        blocks: &mut impl BlockSource<B>,
    ) -> Result<Step<B>, FrameError> {
        let staging = self.staging.as_deref().unwrap_or_default();
        let unread = staging.get(self.start..self.end).unwrap_or_default();
        let Some(partial) = &mut self.partial else {
            let Some(header) = unread.first_chunk::<HEADER_BYTES>() else { return Ok(Step::NeedBytes) };
            let header = Header::decode(header)?;
            self.check(&header, caps)?;
            let frame_end = HEADER_BYTES + header.body_bytes as usize;
            let Some(body) = unread.get(HEADER_BYTES..frame_end) else { return Ok(Step::NeedBytes) };
            if crc32c(body) != header.body_crc {
                return Err(FrameError::BodyChecksum);
            }
            let body = bodies.copy(body);
            self.sequence += 1;
            self.start += frame_end;
            // The first byte of the next frame may have come with this one's last.
            self.frame_started_ns = self.received_ns;
            let Header { kind, group, .. } = header;
            return match header.attachment_bytes as usize {
                0 if kind == KIND_KEEPALIVE => Ok(Step::Keepalive),
                0 if kind == KIND_GOODBYE => Ok(Step::Goodbye),
                0 => Ok(Step::Frame(Frame { kind, group, body, attachment: None })),
                bytes => {
                    self.partial = Some(Partial { kind, group, body, block: None, filled: 0, bytes });
                    self.step(caps, bodies, blocks)
                }
            };
        };
        if partial.block.is_none() {
            let capacity = round_up_to_block(ATTACHMENT_OFFSET + partial.bytes);
            let Some(block) = blocks.block(capacity) else { return Ok(Step::NeedBlock) };
            assert!(block.capacity() >= capacity, "the block source gave what was asked for");
            partial.block = Some(block);
        }
        let block = partial.block.as_mut().expect("just taken");
        let count = unread.len().min(partial.bytes - partial.filled);
        let at = ATTACHMENT_OFFSET + partial.filled;
        block[at..at + count].copy_from_slice(&unread[..count]);
        partial.filled += count;
        self.start += count;
        if partial.filled < partial.bytes {
            return Ok(Step::NeedBytes);
        }
        self.frame_started_ns = self.received_ns;
        let Partial { kind, group, body, block, bytes, .. } = self.partial.take().expect("looked at above");
        let attachment = block.map(|block| Attachment { block, bytes });
        Ok(Step::Frame(Frame { kind, group, body, attachment }))
    }

    /// Whether a frame with this header may come now. Its lengths are safe to allocate afterwards.
    fn check(&self, header: &Header, caps: &FrameCaps) -> Result<(), FrameError> {
        let kind = header.kind;
        if header.version != self.version {
            return Err(FrameError::Version(header.version));
        }
        if header.session != self.session {
            return Err(FrameError::Session);
        }
        if header.sequence != self.sequence {
            return Err(FrameError::Sequence { expected: self.sequence, got: header.sequence });
        }
        let (body_bytes_max, attachment_bytes_max) = match (kind, caps.get(kind)) {
            (KIND_GOODBYE | KIND_KEEPALIVE, _) => (0, 0),
            (_, Some(cap)) => (cap.body_bytes_max, cap.attachment_bytes_max),
            (_, None) => return Err(FrameError::UnknownKind(kind)),
        };
        if header.body_bytes > body_bytes_max {
            return Err(FrameError::BodyTooLarge { kind, bytes: header.body_bytes });
        }
        if header.attachment_bytes > attachment_bytes_max {
            return Err(FrameError::AttachmentTooLarge { kind, bytes: header.attachment_bytes });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::FrameCap;
    use crate::frame::Header;
    use ringraft_block::{AlignedBuf, Pool};
    use std::convert::Infallible;

    const SESSION: Session = Session((1 << 32) | 1);

    struct Blocks(Pool<AlignedBuf>);

    impl BlockSource<AlignedBuf> for Blocks {
        fn block(&mut self, bytes: usize) -> Option<Block<AlignedBuf>> {
            self.0.take(bytes, |bytes| Ok::<_, Infallible>(AlignedBuf::zeroed(bytes))).ok()
        }
    }

    struct Reader {
        inbound: Inbound<AlignedBuf>,
        caps: FrameCaps,
        bodies: BodyPool,
        blocks: Blocks,
        got: Vec<(u16, Vec<u8>, Vec<u8>)>,
        /// The bytes that landed in a block without passing through the staging buffer.
        direct_bytes: usize,
    }

    impl Reader {
        fn new(staging_bytes: usize) -> Self {
            let caps = FrameCaps::new(vec![
                FrameCap { kind: 16, body_bytes_max: 100, attachment_bytes_max: 5000 },
                FrameCap { kind: 17, body_bytes_max: 40, attachment_bytes_max: 0 },
            ]);
            Self {
                inbound: Inbound::new(0, 1, SESSION, staging_bytes),
                bodies: BodyPool::new(caps.body_bytes_max(), 4),
                caps,
                blocks: Blocks(Pool::new(1 << 20)),
                got: Vec::new(),
                direct_bytes: 0,
            }
        }

        /// Receives all of `stream`, at most `chunk` bytes at a time.
        fn feed(&mut self, mut stream: &[u8], chunk: usize) -> Result<(), FrameError> {
            loop {
                self.drain()?;
                if stream.is_empty() {
                    return Ok(());
                }
                let mut into = self.inbound.target();
                let target = into.target();
                let count = target.len().min(chunk).min(stream.len());
                target[..count].copy_from_slice(&stream[..count]);
                if matches!(into, RecvInto::Block { .. }) {
                    self.direct_bytes += count;
                }
                stream = &stream[count..];
                self.inbound.received(0, into, count);
            }
        }

        fn drain(&mut self) -> Result<(), FrameError> {
            loop {
                match self.inbound.step(&self.caps, &self.bodies, &mut self.blocks)? {
                    Step::Frame(frame) => {
                        let attachment = frame.attachment.map_or(Vec::new(), |attachment| {
                            attachment.block[ATTACHMENT_OFFSET..ATTACHMENT_OFFSET + attachment.bytes].to_vec()
                        });
                        self.got.push((frame.kind, frame.body.to_vec(), attachment));
                    }
                    Step::Keepalive => self.got.push((KIND_KEEPALIVE, Vec::new(), Vec::new())),
                    Step::Goodbye => self.got.push((KIND_GOODBYE, Vec::new(), Vec::new())),
                    Step::NeedBytes => return Ok(()),
                    Step::NeedBlock => unreachable!("the pool gives every block"),
                }
            }
        }
    }

    fn header(kind: u16, sequence: u64, body: &[u8], attachment_bytes: usize) -> Header {
        Header {
            version: 1,
            kind,
            group: GroupId(0),
            body_bytes: body.len() as u32,
            attachment_bytes: attachment_bytes as u32,
            sequence,
            session: SESSION,
            body_crc: crc32c(body),
        }
    }

    fn encode(frames: &[(u16, Vec<u8>, Vec<u8>)]) -> Vec<u8> {
        let mut stream = Vec::new();
        for (sequence, (kind, body, attachment)) in frames.iter().enumerate() {
            stream.extend(header(*kind, sequence as u64, body, attachment.len()).encode());
            stream.extend(body);
            stream.extend(attachment);
        }
        stream
    }

    fn bytes(count: usize, start: u8) -> Vec<u8> {
        (0..count).map(|at| (at as u8).wrapping_mul(31).wrapping_add(start)).collect()
    }

    fn frames() -> Vec<(u16, Vec<u8>, Vec<u8>)> {
        vec![
            (17, bytes(40, 1), Vec::new()),
            (16, bytes(100, 2), bytes(700, 3)),
            (KIND_KEEPALIVE, Vec::new(), Vec::new()),
            (16, Vec::new(), bytes(1, 4)),
            (16, bytes(3, 5), bytes(513, 6)),
            (17, Vec::new(), Vec::new()),
            (KIND_GOODBYE, Vec::new(), Vec::new()),
        ]
    }

    #[test]
    fn a_stream_cut_anywhere_gives_the_same_frames() {
        let stream = encode(&frames());
        for staging_bytes in [HEADER_BYTES + 100, 256, 4096] {
            for split in 0..=stream.len() {
                let mut reader = Reader::new(staging_bytes);
                reader.feed(&stream[..split], usize::MAX).unwrap();
                reader.feed(&stream[split..], usize::MAX).unwrap();
                assert_eq!(reader.got, frames(), "split at {split}, staging of {staging_bytes}");
                assert_eq!(reader.inbound.frame_started_ns(), None);
            }
            for chunk in 1..300 {
                let mut reader = Reader::new(staging_bytes);
                reader.feed(&stream, chunk).unwrap();
                assert_eq!(reader.got, frames(), "chunks of {chunk}, staging of {staging_bytes}");
            }
        }
    }

    #[test]
    fn the_bulk_of_an_attachment_is_received_into_its_block() {
        let frames = vec![(16, bytes(10, 1), bytes(5000, 2))];
        let mut reader = Reader::new(200);
        reader.feed(&encode(&frames), usize::MAX).unwrap();
        assert_eq!(reader.got, frames);
        assert_eq!(reader.direct_bytes, 5000 - (200 - HEADER_BYTES - 10));
    }

    #[test]
    fn every_changed_byte_of_header_and_body_ends_the_stream_and_of_an_attachment_is_the_engines_to_find() {
        let good = [(16, bytes(20, 1), bytes(30, 2))];
        let stream = encode(&good);
        for at in 0..stream.len() {
            for change in [1, 0x10, 0x80, 0xff] {
                let mut bad = stream.clone();
                bad[at] ^= change;
                let mut reader = Reader::new(4096);
                let outcome = reader.feed(&bad, usize::MAX);
                if at < HEADER_BYTES + 20 {
                    assert!(outcome.is_err(), "byte {at}");
                    assert!(reader.got.is_empty(), "byte {at}");
                } else {
                    assert_eq!(outcome, Ok(()));
                    assert_ne!(reader.got, good);
                }
            }
        }
    }

    #[test]
    fn lengths_beyond_their_caps_are_refused_by_the_header_alone() {
        let cases = [
            (17, 41, 0, FrameError::BodyTooLarge { kind: 17, bytes: 41 }),
            (17, u32::MAX, 0, FrameError::BodyTooLarge { kind: 17, bytes: u32::MAX }),
            (17, 0, 1, FrameError::AttachmentTooLarge { kind: 17, bytes: 1 }),
            (16, 100, 5001, FrameError::AttachmentTooLarge { kind: 16, bytes: 5001 }),
            (16, 0, u32::MAX, FrameError::AttachmentTooLarge { kind: 16, bytes: u32::MAX }),
            (KIND_KEEPALIVE, 1, 0, FrameError::BodyTooLarge { kind: KIND_KEEPALIVE, bytes: 1 }),
            (KIND_GOODBYE, 0, 1, FrameError::AttachmentTooLarge { kind: KIND_GOODBYE, bytes: 1 }),
            (18, 0, 0, FrameError::UnknownKind(18)),
            (0, 0, 0, FrameError::UnknownKind(0)),
            (15, 0, 0, FrameError::UnknownKind(15)),
        ];
        for (kind, body_bytes, attachment_bytes, error) in cases {
            let header = Header { body_bytes, attachment_bytes, ..header(kind, 0, b"", 0) };
            assert_eq!(Reader::new(4096).feed(&header.encode(), usize::MAX), Err(error));
        }
    }

    #[test]
    fn only_the_next_frame_of_this_session_and_version_is_taken() {
        let good = header(17, 0, b"", 0);
        let cases = [
            (Header { sequence: 1, ..good }, FrameError::Sequence { expected: 0, got: 1 }),
            (Header { sequence: u64::MAX, ..good }, FrameError::Sequence { expected: 0, got: u64::MAX }),
            (Header { session: Session(SESSION.0 - 1), ..good }, FrameError::Session),
            (Header { session: Session(SESSION.0 + 1), ..good }, FrameError::Session),
            (Header { version: 2, ..good }, FrameError::Version(2)),
        ];
        for (header, error) in cases {
            assert_eq!(Reader::new(4096).feed(&header.encode(), usize::MAX), Err(error));
        }
        let mut twice = good.encode().to_vec();
        twice.extend(good.encode());
        let replayed = Reader::new(4096).feed(&twice, usize::MAX);
        assert_eq!(replayed, Err(FrameError::Sequence { expected: 1, got: 0 }));
    }

    #[test]
    fn no_bytes_whatever_bring_the_reader_down() {
        let mut state = 0x1234_5678_9abc_def1u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for round in 0..3000 {
            let mut stream = encode(&frames());
            for _ in 0..1 + random() % 4 {
                let at = random() as usize % stream.len();
                match random() % 4 {
                    0 => stream[at] = random() as u8,
                    1 => stream.truncate(at.max(1)),
                    2 => drop(stream.drain(at..(at + random() as usize % 50).min(stream.len()))),
                    _ => {
                        // A header that is right in itself, with wild fields.
                        let wild = Header {
                            version: 1 + (random() % 8 == 0) as u16,
                            kind: (random() % 20) as u16,
                            body_bytes: random() as u32 >> (random() % 32),
                            attachment_bytes: random() as u32 >> (random() % 32),
                            sequence: random() % 8,
                            ..header(17, 0, b"", 0)
                        };
                        stream.splice(at..at, wild.encode());
                    }
                }
                if stream.is_empty() {
                    break;
                }
            }
            let chunk = 1 + random() as usize % 400;
            let mut reader = Reader::new(HEADER_BYTES + 100 + random() as usize % 300);
            let _ = reader.feed(&stream, chunk);
            assert!(reader.blocks.0.stats().used_bytes <= 8192, "round {round}");
        }
    }
}
