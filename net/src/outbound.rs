//! From frames to bytes.
//!
//! A frame is encoded when it is queued: its header and body behind those queued before it, its attachment as a
//! reference to the block that the log holds too. All that was queued while a send was under way leaves with the
//! next one, in as few parts as the attachments between them allow.

use crate::config::NetLimits;
use crate::error::SendError;
use crate::frame::{HEADER_BYTES, Header, Session};
use crate::link::SendPart;
use ringraft_block::{BlockBuf, GroupId, SharedBlock, crc32c};
use std::collections::VecDeque;
use std::ops::Range;

/// A part that headers and bodies are added to is ended at this size, so that it does not grow by copying.
const PART_BYTES_MAX: usize = 32 << 10;

/// Room in a new part: some ten acknowledgements.
const PART_BYTES_MIN: usize = 2 << 10;

/// Memory kept for later parts, when a backend hands it back.
const SPARE_PARTS_MAX: usize = 4;

/// The sending side of a session.
pub(crate) struct Outbound<B: BlockBuf> {
    version: u16,
    session: Session,
    /// The sequence number of the next frame.
    sequence: u64,
    queue: VecDeque<Queued<B>>,
    /// What is queued and what is under way.
    queued_frames: usize,
    queued_bytes: usize,
    /// What is under way.
    sending: Option<Sending>,
    /// When the last send was completed.
    pub(crate) sent_ns: u64,
    spare_vector: Vec<SendPart<B>>,
    spare_parts: Vec<Vec<u8>>,
}

struct Queued<B: BlockBuf> {
    part: SendPart<B>,
    bytes: usize,
    /// Frames whose last byte is in this part.
    frames: usize,
}

struct Sending {
    since_ns: u64,
    frames: usize,
    bytes: usize,
}

/// A frame to be queued.
pub(crate) struct Outgoing<'a, B: BlockBuf> {
    pub(crate) kind: u16,
    pub(crate) group: GroupId,
    pub(crate) body: &'a [u8],
    pub(crate) attachment: Option<(SharedBlock<B>, Range<usize>)>,
}

impl<B: BlockBuf> Outbound<B> {
    pub(crate) fn new(now: u64, version: u16, session: Session) -> Self {
        Self {
            version,
            session,
            sequence: 0,
            queue: VecDeque::new(),
            queued_frames: 0,
            queued_bytes: 0,
            sending: None,
            sent_ns: now,
            spare_vector: Vec::new(),
            spare_parts: Vec::new(),
        }
    }

    /// Queues a frame within the limits.
    pub(crate) fn queue(&mut self, limits: &NetLimits, frame: Outgoing<'_, B>) -> Result<(), SendError> {
        let bytes = frame_bytes(&frame);
        let full = self.queued_frames >= limits.queue_frames_max
            || self.queued_bytes.saturating_add(bytes) > limits.queue_bytes_max;
        if full {
            return Err(SendError::Full);
        }
        self.encode(frame);
        Ok(())
    }

    /// Queues a frame of the link itself, which no limit holds up: there is never more than one of them queued.
    pub(crate) fn queue_own(&mut self, kind: u16) {
        self.encode(Outgoing { kind, group: GroupId(0), body: &[], attachment: None });
    }

    fn encode(&mut self, frame: Outgoing<'_, B>) {
        let bytes = frame_bytes(&frame);
        let attachment_bytes = frame.attachment.as_ref().map_or(0, |(_, range)| range.len());
        let header = Header {
            version: self.version,
            kind: frame.kind,
            group: frame.group,
            body_bytes: u32::try_from(frame.body.len()).expect("bodies are capped by u32"),
            attachment_bytes: u32::try_from(attachment_bytes).expect("attachments are capped by u32"),
            sequence: self.sequence,
            session: self.session,
            body_crc: crc32c(frame.body),
        };
        self.sequence += 1;
        self.queued_frames += 1;
        self.queued_bytes += bytes;
        let own_bytes = HEADER_BYTES + frame.body.len();
        let frames = usize::from(frame.attachment.is_none());
        match self.queue.back_mut() {
            Some(Queued { part: SendPart::Bytes(part), bytes, frames: ended })
                if part.len() + own_bytes <= PART_BYTES_MAX =>
            {
                part.extend_from_slice(&header.encode());
                part.extend_from_slice(frame.body);
                *bytes += own_bytes;
                *ended += frames;
            }
            _ => {
                let mut part = self.spare_parts.pop().unwrap_or_else(|| Vec::with_capacity(PART_BYTES_MIN));
                part.extend_from_slice(&header.encode());
                part.extend_from_slice(frame.body);
                self.queue.push_back(Queued { part: SendPart::Bytes(part), bytes: own_bytes, frames });
            }
        }
        if let Some((block, range)) = frame.attachment {
            let part = SendPart::Block { block, range };
            self.queue.push_back(Queued { part, bytes: attachment_bytes, frames: 1 });
        }
    }

    /// The parts of the next send, if there is something to send and no send is under way.
    pub(crate) fn next_send(&mut self, now: u64, limits: &NetLimits) -> Option<Vec<SendPart<B>>> {
        if self.sending.is_some() || self.queue.is_empty() {
            return None;
        }
        let mut parts = std::mem::take(&mut self.spare_vector);
        let mut sending = Sending { since_ns: now, frames: 0, bytes: 0 };
        while parts.len() < limits.send_parts_max {
            let fits =
                |next: &Queued<B>| sending.bytes == 0 || sending.bytes + next.bytes <= limits.send_bytes_max;
            if !self.queue.front().is_some_and(fits) {
                break;
            }
            let Some(next) = self.queue.pop_front() else { break };
            sending.frames += next.frames;
            sending.bytes += next.bytes;
            parts.push(next.part);
        }
        self.sending = Some(sending);
        Some(parts)
    }

    /// The send completed: `(frames, bytes)` of it.
    pub(crate) fn sent(&mut self, now: u64, mut parts: Vec<SendPart<B>>) -> (u64, u64) {
        for part in parts.drain(..) {
            // Their memory serves again.
            if let SendPart::Bytes(mut part) = part
                && self.spare_parts.len() < SPARE_PARTS_MAX
            {
                part.clear();
                self.spare_parts.push(part);
            }
        }
        self.spare_vector = parts;
        self.sent_ns = now;
        let Some(sending) = self.sending.take() else { return (0, 0) };
        self.queued_frames -= sending.frames;
        self.queued_bytes -= sending.bytes;
        (sending.frames as u64, sending.bytes as u64)
    }

    /// Since when the send under way has been so.
    pub(crate) fn sending_since_ns(&self) -> Option<u64> {
        self.sending.as_ref().map(|sending| sending.since_ns)
    }

    /// Whether nothing is queued or under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.sending.is_none() && self.queue.is_empty()
    }

    /// Whether anything is queued that is not under way.
    pub(crate) fn has_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Frames and bytes queued, those under way included.
    pub(crate) fn depth(&self) -> (usize, usize) {
        (self.queued_frames, self.queued_bytes)
    }
}

fn frame_bytes<B: BlockBuf>(frame: &Outgoing<'_, B>) -> usize {
    let attachment_bytes = frame.attachment.as_ref().map_or(0, |(_, range)| range.len());
    HEADER_BYTES + frame.body.len() + attachment_bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringraft_block::{AlignedBuf, Pool};
    use std::convert::Infallible;

    fn block(bytes: usize) -> SharedBlock<AlignedBuf> {
        let pool = Pool::new(1 << 20);
        pool.take(bytes, |bytes| Ok::<_, Infallible>(AlignedBuf::zeroed(bytes))).unwrap().share()
    }

    fn plain(body: &[u8]) -> Outgoing<'_, AlignedBuf> {
        Outgoing { kind: 16, group: GroupId(0), body, attachment: None }
    }

    fn with(block: &SharedBlock<AlignedBuf>, range: Range<usize>) -> Outgoing<'static, AlignedBuf> {
        Outgoing { kind: 16, group: GroupId(0), body: b"append", attachment: Some((block.clone(), range)) }
    }

    fn outbound() -> Outbound<AlignedBuf> {
        Outbound::new(0, 1, Session(1))
    }

    #[test]
    fn frames_without_attachments_leave_in_one_part() {
        let mut outbound = outbound();
        let limits = NetLimits::default();
        for _ in 0..100 {
            outbound.queue(&limits, plain(b"acknowledged")).unwrap();
        }
        let parts = outbound.next_send(5, &limits).unwrap();
        assert_eq!(parts.len(), 1);
        assert_eq!(parts[0].bytes().len(), 100 * (HEADER_BYTES + 12));
        assert_eq!(outbound.sending_since_ns(), Some(5));
        outbound.queue(&limits, plain(b"later")).unwrap();
        assert!(outbound.next_send(6, &limits).is_none(), "one send at a time");
        assert_eq!(outbound.sent(7, parts), (100, 100 * (HEADER_BYTES as u64 + 12)));
        assert_eq!(outbound.depth(), (1, HEADER_BYTES + 5));
        assert!(outbound.next_send(8, &limits).is_some());
    }

    #[test]
    fn attachments_are_shared_not_copied_and_parts_alternate() {
        let mut outbound = outbound();
        let limits = NetLimits::default();
        let block = block(8192);
        outbound.queue(&limits, plain(b"first")).unwrap();
        outbound.queue(&limits, with(&block, 512..1512)).unwrap();
        outbound.queue(&limits, with(&block, 512..600)).unwrap();
        outbound.queue(&limits, plain(b"last")).unwrap();
        let parts = outbound.next_send(0, &limits).unwrap();
        let sizes: Vec<_> = parts.iter().map(|part| part.bytes().len()).collect();
        assert_eq!(sizes, [2 * HEADER_BYTES + 11, 1000, HEADER_BYTES + 6, 88, HEADER_BYTES + 4]);
        assert_eq!(parts[1].bytes().as_ptr(), block[512..].as_ptr());
        assert_eq!(block.holders(), 3);
        drop(parts);
        assert_eq!(block.holders(), 1);
    }

    #[test]
    fn a_send_keeps_to_its_parts_and_bytes_and_the_rest_follows() {
        let mut outbound = outbound();
        let limits = NetLimits { send_parts_max: 3, send_bytes_max: 2000, ..NetLimits::default() };
        let block = block(8192);
        for bytes in [100, 100, 100, 5000] {
            outbound.queue(&limits, with(&block, 512..512 + bytes)).unwrap();
        }
        let header = HEADER_BYTES + 6;
        let expected: [&[usize]; 4] = [&[header, 100, header], &[100, header, 100], &[header], &[5000]];
        let mut frames = 0;
        for sizes in expected {
            let parts = outbound.next_send(0, &limits).unwrap();
            assert_eq!(parts.iter().map(|part| part.bytes().len()).collect::<Vec<_>>(), sizes);
            frames += outbound.sent(0, parts).0;
        }
        assert_eq!(frames, 4);
        assert!(outbound.is_idle());
        assert_eq!(outbound.depth(), (0, 0));
    }

    #[test]
    fn the_queue_is_bounded_in_frames_and_bytes_and_what_is_under_way_counts() {
        let limits = NetLimits { queue_frames_max: 3, queue_bytes_max: 1000, ..NetLimits::default() };
        let mut outbound = outbound();
        for _ in 0..3 {
            outbound.queue(&limits, plain(b"")).unwrap();
        }
        assert_eq!(outbound.queue(&limits, plain(b"")), Err(SendError::Full));
        let parts = outbound.next_send(0, &limits).unwrap();
        assert_eq!(outbound.queue(&limits, plain(b"")), Err(SendError::Full));
        outbound.sent(0, parts);
        let block = block(4096);
        outbound.queue(&limits, with(&block, 512..512 + 800)).unwrap();
        assert_eq!(outbound.queue(&limits, plain(&[0; 200])), Err(SendError::Full));
        outbound.queue(&limits, plain(&[0; 1000 - 854 - HEADER_BYTES])).unwrap();
        assert_eq!(outbound.depth(), (2, 1000));
    }
}
