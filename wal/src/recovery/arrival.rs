//! Images are verified as they arrive, while the rest of their segment is still being read.
//!
//! The happy path: pieces of a segment arrive, and each extends what has arrived without a gap; the slots in that stretch follow one
//! another, and the image of each is verified while it is still in the processor's cache. The fold, which runs when the
//! whole segment is there, then only looks up that it has been.
//!
//! Nothing is decided here. Where an envelope or an image is not intact, or a piece could not be read, this stops, and the fold
//! verifies for itself what lies behind.

use crate::format::{ENVELOPE_BYTES, parse_image, read_envelope, slot_bytes};
use std::ops::Range;

/// What has arrived of a segment.
pub(super) struct Arrival {
    /// All bytes before this have arrived.
    through: usize,
    /// Pieces behind a gap.
    ahead: Vec<Range<usize>>,
    /// The next slot; `None` once the slots can no longer be followed.
    slot: Option<usize>,
    verified: Verified,
}

/// The places of the images that are verified, in ascending order.
#[derive(Default)]
pub(crate) struct Verified(Vec<Range<usize>>);

impl Verified {
    /// Whether the image that lies exactly here was verified.
    pub(super) fn has(&self, image: &Range<usize>) -> bool {
        self.0
            .binary_search_by_key(&image.start, |verified| verified.start)
            .is_ok_and(|at| self.0[at] == *image)
    }
}

impl Arrival {
    /// The slots begin at `slots_start`. `None` when nobody knows yet where they do.
    pub(super) fn new(slots_start: Option<usize>) -> Self {
        Self { through: 0, ahead: Vec::new(), slot: slots_start, verified: Verified::default() }
    }

    /// A piece has arrived.
    pub(super) fn add(&mut self, piece: Range<usize>) {
        if self.slot.is_some() {
            self.ahead.push(piece);
        }
        while let Some(at) = self.ahead.iter().position(|piece| piece.start == self.through) {
            self.through = self.ahead.swap_remove(at).end;
        }
    }

    /// A piece could not be read.
    pub(super) fn stop(&mut self) {
        self.slot = None;
        self.ahead.clear();
    }

    /// Verifies the images that have arrived. `segment` is the memory that the pieces were copied to.
    pub(super) fn verify(&mut self, segment: &[u8]) {
        let Some(arrived) = segment.get(..self.through) else { return };
        while let Some(slot) = self.slot {
            let start = slot.saturating_add(ENVELOPE_BYTES);
            let Some(sector) = arrived.get(slot..start) else { return };
            let Ok(envelope) = read_envelope(sector) else { return self.stop() };
            let image_bytes = envelope.image_bytes as usize;
            let place = start..start.saturating_add(image_bytes);
            let Some(image) = arrived.get(place.clone()) else { return };
            if parse_image(image).is_err() {
                return self.stop();
            }
            self.verified.0.push(place);
            self.slot = slot.checked_add(slot_bytes(image_bytes));
        }
    }

    /// What was verified.
    pub(super) fn verified(&self) -> &Verified {
        &self.verified
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{BatchBuilder, BatchKind, Chain, Envelope, Seal, image_bytes_for, write_envelope};
    use ringraft_block::{AlignedBuf, BLOCK_BYTES, ClusterId, GroupId, LogIndex, Pool, Term};
    use std::convert::Infallible;

    /// Two blocks without slots, then so many slots of two blocks, then a blank block.
    fn segment(slots: usize) -> Vec<u8> {
        let pool: Pool<AlignedBuf> = Pool::new(1 << 20);
        let mut segment = vec![0; 2 * BLOCK_BYTES];
        for number in 0..slots {
            let bytes = slot_bytes(image_bytes_for(1, 0, 6000));
            let block = pool.take(bytes, |bytes| Ok::<_, Infallible>(AlignedBuf::zeroed(bytes)));
            let mut builder = BatchBuilder::new(block.unwrap());
            builder.push(&[number as u8 + 1; 6000], None).unwrap();
            let first = LogIndex(number as u64 + 1);
            let (mut block, info) = builder.seal(Seal {
                group: GroupId(0),
                term: Term(1),
                first,
                kind: BatchKind::Commands,
                time_ms: 1,
                previous_chain: Chain::default(),
            });
            let envelope = Envelope {
                cluster: ClusterId(1),
                nonce: 1,
                generation: 1,
                group: GroupId(0),
                offset: segment.len() as u64,
                epoch: 1,
                boot: 1,
                durable_through: LogIndex(0),
                term: info.term,
                first,
                last: info.last,
                chain: info.chain,
                image_bytes: info.image_bytes,
            };
            write_envelope(&mut block[..ENVELOPE_BYTES], &envelope);
            segment.extend_from_slice(&block[..bytes]);
        }
        segment.extend_from_slice(&[0; BLOCK_BYTES]);
        segment
    }

    const NONE: [usize; 0] = [];
    const IMAGE_BYTES: usize = image_bytes_for(1, 0, 6000);

    fn place(slot: usize) -> Range<usize> {
        let start = (2 + 2 * slot) * BLOCK_BYTES + ENVELOPE_BYTES;
        start..start + IMAGE_BYTES
    }

    fn verified_of(arrival: &Arrival) -> Vec<usize> {
        (0..9).filter(|slot| arrival.verified().has(&place(*slot))).collect()
    }

    /// Only what has been copied in is looked at: the rest of the memory holds what an earlier segment left there.
    #[test]
    fn an_image_is_verified_once_it_has_arrived_without_a_gap() {
        let whole = segment(4);
        let mut memory = vec![0xa5; whole.len()];
        let mut arrival = Arrival::new(Some(2 * BLOCK_BYTES));
        let mut arrive = |blocks: Range<usize>| {
            let piece = blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES;
            memory[piece.clone()].copy_from_slice(&whole[piece.clone()]);
            arrival.add(piece);
            arrival.verify(&memory);
            verified_of(&arrival)
        };
        assert_eq!(arrive(3..5), NONE);
        assert_eq!(arrive(0..2), NONE);
        assert_eq!(arrive(2..3), [0]);
        assert_eq!(arrive(8..11), [0]);
        assert_eq!(arrive(5..8), [0, 1, 2, 3]);
    }

    #[test]
    fn nothing_counts_as_verified_behind_what_is_not_intact_or_not_there() {
        let whole = segment(4);
        let arrive = |alter: fn(&mut Vec<u8>, &mut Arrival)| {
            let mut memory = whole.clone();
            let mut arrival = Arrival::new(Some(2 * BLOCK_BYTES));
            arrival.add(0..4 * BLOCK_BYTES);
            alter(&mut memory, &mut arrival);
            arrival.verify(&memory);
            arrival.add(4 * BLOCK_BYTES..memory.len());
            arrival.verify(&memory);
            verified_of(&arrival)
        };
        assert_eq!(arrive(|_, _| ()), [0, 1, 2, 3]);
        assert_eq!(arrive(|memory, _| memory[place(1).start + 3000] ^= 1), [0], "a rotten image");
        assert_eq!(arrive(|memory, _| memory[place(2).start - 500] ^= 1), [0, 1], "a rotten envelope");
        assert_eq!(
            arrive(|memory, arrival| {
                arrival.verify(memory);
                arrival.stop();
            }),
            [0],
            "a lost piece"
        );
        assert_eq!(arrive(|_, arrival| *arrival = Arrival::new(None)), NONE, "a segment without a header");
    }

    #[test]
    fn another_length_at_the_same_place_is_another_image() {
        let whole = segment(1);
        let mut arrival = Arrival::new(Some(2 * BLOCK_BYTES));
        arrival.add(0..whole.len());
        arrival.verify(&whole);
        let Range { start, end } = place(0);
        assert!(arrival.verified().has(&(start..end)));
        assert!(!arrival.verified().has(&(start..end + 1)) && !arrival.verified().has(&(start + 1..end)));
    }
}
