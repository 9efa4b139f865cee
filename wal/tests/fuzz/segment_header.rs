//! The segment header: 512 bytes, all of them covered by its checksum, so no altered byte passes.

use crate::alloc::{Allocated, allocated};
use crate::seal::reseal_struct;
use crate::sweep::{corpus, sweep, sweep_bytes};
use bolero::TypeGenerator;
use ringraft_block::{ClusterId, GroupId, Incarnation, LogIndex, NodeId, Term};
use ringraft_wal::format::{
    Chain, Cut, LogStart, PriorContent, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentOrigin,
    read_segment_header, write_segment_header,
};

#[derive(Debug, TypeGenerator)]
struct Parts {
    cluster: u128,
    node: u64,
    incarnation: u128,
    segment_bytes: u64,
    nonce: u64,
    epoch: u64,
    boot: u64,
    generation: u32,
    previous: u32,
    group: u32,
    checksums: bool,
    cut: Option<(u64, u64, u64, [u8; 16])>,
    altered_at: u16,
    altered_by: u8,
}

impl Parts {
    fn header(&self) -> SegmentHeader {
        let generation = self.generation.max(1);
        let previous = self.previous % generation;
        SegmentHeader {
            cluster: ClusterId(self.cluster),
            node: NodeId(self.node),
            incarnation: Incarnation(self.incarnation),
            segment_bytes: self.segment_bytes,
            nonce: self.nonce,
            epoch: self.epoch,
            boot: self.boot,
            generation,
            group: GroupId(self.group),
            prior_content: if self.checksums { PriorContent::Checksums } else { PriorContent::Zeros },
            origin: match self.cut {
                None => SegmentOrigin::Rollover { previous },
                Some((index, offset, term, chain)) => SegmentOrigin::Cut {
                    cut: Cut { index: LogIndex(index), generation: previous, offset },
                    after: LogStart { index: LogIndex(index), term: Term(term), chain: Chain(chain) },
                },
            },
        }
    }
}

fn written(header: &SegmentHeader) -> Vec<u8> {
    let mut bytes = vec![0xa5; SEGMENT_HEADER_BYTES];
    write_segment_header(&mut bytes, header);
    bytes
}

fn round_trip(parts: &Parts) {
    let header = parts.header();
    let mut bytes = written(&header);
    assert_eq!(read_segment_header(&bytes), Ok(header));
    let mut again = bytes.clone();
    reseal_struct(&mut again, "segment header");
    assert_eq!(again, bytes, "the checksum covers all bytes");
    if parts.altered_by != 0 {
        bytes[usize::from(parts.altered_at) % SEGMENT_HEADER_BYTES] ^= parts.altered_by;
        read_segment_header(&bytes).expect_err("an altered byte is noticed");
    }
}

/// What is read survives being written. Not byte for byte: a rollover has fields for the cut that nobody reads.
fn stable(bytes: &[u8]) {
    let (read, memory) = allocated(|| read_segment_header(bytes));
    assert_eq!(memory, Allocated::default());
    if let Ok(header) = read {
        let again = written(&header);
        assert_eq!(read_segment_header(&again), Ok(header));
        if matches!(header.origin, SegmentOrigin::Cut { .. }) {
            assert_eq!(again, bytes[..SEGMENT_HEADER_BYTES]);
        }
        assert!(header.generation > 0);
    }
}

fn valid() -> [Vec<u8>; 2] {
    let header = SegmentHeader {
        cluster: ClusterId(0xc1),
        node: NodeId(3),
        incarnation: Incarnation(0x99),
        segment_bytes: 64 << 20,
        nonce: 0xfeed_face,
        epoch: 4,
        boot: 3,
        generation: 7,
        group: GroupId(0),
        prior_content: PriorContent::Zeros,
        origin: SegmentOrigin::Rollover { previous: 6 },
    };
    let origin = SegmentOrigin::Cut {
        cut: Cut { index: LogIndex(99), generation: 6, offset: 532_480 },
        after: LogStart { index: LogIndex(99), term: Term(4), chain: Chain([0x33; 16]) },
    };
    [written(&header), written(&SegmentHeader { origin, ..header })]
}

#[test]
fn what_is_written_is_read_and_an_altered_byte_is_refused() {
    bolero::check!().with_iterations(0).with_type::<Parts>().for_each(round_trip);
    sweep(4000, round_trip);
}

#[test]
fn what_is_read_survives_being_written() {
    let [rollover, cut] = valid();
    let files = [("rollover".to_owned(), rollover), ("cut".to_owned(), cut)];
    corpus("segment_header__what_is_read_survives_being_written", &files);
    bolero::check!().with_iterations(0).for_each(stable);
    sweep_bytes(20_000, &valid(), |bytes| reseal_struct(bytes, "segment header"), stable);
}

#[test]
fn every_altered_byte_of_a_header_is_refused() {
    for valid in valid() {
        for at in 0..SEGMENT_HEADER_BYTES {
            for by in 1..=u8::MAX {
                let mut bytes = valid.clone();
                bytes[at] ^= by;
                assert!(read_segment_header(&bytes).is_err(), "byte {at} altered by {by:#x}");
            }
        }
    }
}
