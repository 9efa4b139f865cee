//! The layouts, printed against checked-in files, and every rule that a reader enforces, broken once.

use super::image::{Header, reseal};
use super::*;
use crate::testing::{Rng, golden, hex};
use ringraft_block::{
    AlignedBuf, BLOCK_BYTES, Block, BlockBuf, ClusterId, GroupId, Incarnation, LogIndex, NodeId, Pool, Term,
};
use std::convert::Infallible;
use std::fmt::Write as _;

fn block(bytes: usize) -> Block<AlignedBuf> {
    let mut block = Pool::new(0).take(bytes, |bytes| Ok::<_, Infallible>(AlignedBuf::zeroed(bytes))).unwrap();
    block.fill(0xa5);
    block
}

fn seal(kind: BatchKind) -> Seal {
    Seal {
        group: GroupId(0),
        term: Term(5),
        first: LogIndex(100),
        kind,
        time_ms: 1_700_000_000_123,
        previous_chain: Chain([0x11; 16]),
    }
}

/// Two plain commands around one of a session.
fn sample() -> (Block<AlignedBuf>, BatchInfo) {
    let mut builder = BatchBuilder::new(block(BLOCK_BYTES));
    builder.push(b"first", None).unwrap();
    builder.push(b"second command", Some(SessionRef { session: 0xabcd, sequence: 17 })).unwrap();
    builder.push(b"", None).unwrap();
    builder.seal(seal(BatchKind::Commands))
}

fn image(block: &Block<AlignedBuf>, info: BatchInfo) -> &[u8] {
    &block[ENVELOPE_BYTES..ENVELOPE_BYTES + info.image_bytes as usize]
}

/// An image in aligned memory that can be altered.
fn owned(block: &Block<AlignedBuf>, info: BatchInfo) -> AlignedImage {
    let mut buffer = AlignedBuf::zeroed(info.image_bytes as usize);
    buffer.bytes_mut()[..info.image_bytes as usize].copy_from_slice(image(block, info));
    AlignedImage { buffer, bytes: info.image_bytes as usize }
}

struct AlignedImage {
    buffer: AlignedBuf,
    bytes: usize,
}

impl AlignedImage {
    fn get(&self) -> &[u8] {
        &self.buffer.bytes()[..self.bytes]
    }

    fn get_mut(&mut self) -> &mut [u8] {
        &mut self.buffer.bytes_mut()[..self.bytes]
    }
}

fn envelope() -> Envelope {
    Envelope {
        cluster: ClusterId(0x0123_4567_89ab_cdef_0011_2233_4455_6677),
        nonce: 0xfeed_face_cafe_beef,
        generation: 7,
        group: GroupId(0),
        offset: 528_384,
        epoch: 4,
        boot: 3,
        durable_through: LogIndex(98),
        term: Term(5),
        first: LogIndex(100),
        last: LogIndex(102),
        chain: Chain([0x22; 16]),
        image_bytes: 256,
    }
}

fn segment_header() -> SegmentHeader {
    SegmentHeader {
        cluster: ClusterId(0x0123_4567_89ab_cdef_0011_2233_4455_6677),
        node: NodeId(3),
        incarnation: Incarnation(0x99),
        segment_bytes: 64 << 20,
        nonce: 0xfeed_face_cafe_beef,
        epoch: 4,
        boot: 3,
        generation: 7,
        group: GroupId(0),
        prior_content: PriorContent::Zeros,
        origin: SegmentOrigin::Cut {
            cut: Cut { index: LogIndex(99), generation: 6, offset: 532_480 },
            after: LogStart { index: LogIndex(99), term: Term(4), chain: Chain([0x33; 16]) },
        },
    }
}

fn hard_state() -> HardState {
    HardState {
        cluster: ClusterId(0x0123_4567_89ab_cdef_0011_2233_4455_6677),
        node: NodeId(3),
        incarnation: Incarnation(0x99),
        boot: 3,
        sequence: 21,
        group: GroupId(0),
        term: Term(5),
        vote: Some(NodeId(2)),
        epoch: 4,
        cut: Cut { index: LogIndex(99), generation: 6, offset: 532_480 },
        generation: 7,
        start: LogStart { index: LogIndex(50), term: Term(2), chain: Chain([0x44; 16]) },
        start_generation: 4,
        witness: LogIndex(99),
        claim: None,
        claim_epoch: 0,
        claim_cut: LogIndex(0),
        claim_may_settle: false,
        configuration: b"three members".to_vec(),
    }
}

#[test]
fn the_layouts_and_the_fingerprint_are_what_they_were() {
    let mut text = format!("format version {FORMAT_VERSION}, fingerprint {FINGERPRINT:016x}\n");
    for (name, fields) in LAYOUTS {
        let bytes = fields.last().map_or(0, |field| field.at + field.bytes);
        writeln!(text, "\n{name}, {bytes} bytes").unwrap();
        for field in *fields {
            writeln!(text, "{:6} {:4}  {}", field.at, field.bytes, field.name).unwrap();
        }
    }
    writeln!(text, "\nlimits").unwrap();
    for (name, value) in [
        ("count max", COUNT_MAX),
        ("payload bytes max", PAYLOAD_BYTES_MAX),
        ("image bytes min", IMAGE_BYTES_MIN),
        ("image bytes max", IMAGE_BYTES_MAX),
        ("slot bytes max", SLOT_BYTES_MAX),
        ("slots start of a 64 MiB segment", slots_start(64 << 20) as usize),
        ("hard state file bytes", HARD_STATE_FILE_BYTES),
    ] {
        writeln!(text, "{value:9}  {name}").unwrap();
    }
    golden("layouts.txt", &text);
}

#[test]
fn an_image_and_its_entry_table_have_the_bytes_they_had() {
    let (commands, info) = sample();
    let mut text = format!("commands: {info:?}\n{}", hex(image(&commands, info)));
    let table_at = (IMAGE_HEADER_BYTES + info.payload_bytes as usize).next_multiple_of(8);
    writeln!(text, "\nits entry table, from {table_at:06x}\n{}", hex(&image(&commands, info)[table_at..]))
        .unwrap();
    let (empty, info) = BatchBuilder::new(block(BLOCK_BYTES)).seal(seal(BatchKind::Empty));
    writeln!(text, "empty: {info:?}\n{}", hex(image(&empty, info))).unwrap();
    golden("image.txt", &text);
}

#[test]
fn envelope_segment_header_and_hard_state_have_the_bytes_they_had() {
    let mut bytes = vec![0; ENVELOPE_BYTES];
    write_envelope(&mut bytes, &envelope());
    let mut text = format!("{:#?}\n{}\n", envelope(), hex(&bytes));
    let mut bytes = vec![0; SEGMENT_HEADER_BYTES];
    write_segment_header(&mut bytes, &segment_header());
    writeln!(text, "{:#?}\n{}", segment_header(), hex(&bytes)).unwrap();
    let mut bytes = vec![0; HARD_STATE_FILE_BYTES];
    assert_eq!(write_hard_state(&mut bytes, &hard_state()), BLOCK_BYTES);
    writeln!(text, "{:#?}\n{}", hard_state(), hex(&bytes)).unwrap();
    golden("local.txt", &text);
}

#[test]
fn what_is_written_is_read() {
    let mut bytes = vec![0; HARD_STATE_FILE_BYTES];
    write_envelope(&mut bytes, &envelope());
    assert_eq!(read_envelope(&bytes), Ok(envelope()));
    let rollover = SegmentOrigin::Rollover { previous: 6 };
    for header in [segment_header(), SegmentHeader { origin: rollover, ..segment_header() }] {
        write_segment_header(&mut bytes, &header);
        assert_eq!(read_segment_header(&bytes), Ok(header));
    }
    let long = vec![9; CONFIGURATION_BYTES_MAX];
    for state in [
        hard_state(),
        HardState { vote: None, configuration: Vec::new(), ..hard_state() },
        HardState { configuration: long, ..hard_state() },
        HardState { claim: Some(claim(true)), claim_epoch: 4, claim_cut: LogIndex(98), ..hard_state() },
        HardState { claim: Some(claim(false)), claim_epoch: 1, ..hard_state() },
        HardState { claim: Some(claim(false)), claim_epoch: 1, claim_may_settle: true, ..hard_state() },
    ] {
        write_hard_state(&mut bytes, &state);
        assert_eq!(read_hard_state(&bytes), Ok(state));
    }
}

fn claim(certain: bool) -> Claim {
    Claim { term: Term(5), last: LogIndex(120), certain }
}

#[test]
fn a_claim_of_no_known_kind_or_of_an_epoch_to_come_is_refused() {
    for epoch in [0, 5] {
        let mut bytes = AlignedBuf::zeroed(HARD_STATE_FILE_BYTES);
        let state = HardState { claim: Some(claim(true)), claim_epoch: epoch, ..hard_state() };
        write_hard_state(bytes.bytes_mut(), &state);
        assert_eq!(read_hard_state(bytes.bytes()), Err(HardStateError::Range("claim")));
    }
}

#[test]
fn commands_are_read_in_place_as_they_were_pushed() {
    let (block, info) = sample();
    assert_eq!((info.first, info.last, info.payload_bytes), (LogIndex(100), LogIndex(102), 19));
    for view in [parse_image(image(&block, info)).unwrap(), BatchView::trusted(image(&block, info)).unwrap()]
    {
        assert_eq!(view.info(), info);
        let commands: Vec<_> =
            view.commands().map(|command| (command.index, command.session, command.bytes)).collect();
        let session = SessionRef { session: 0xabcd, sequence: 17 };
        assert_eq!(
            commands,
            [
                (LogIndex(100), None, &b"first"[..]),
                (LogIndex(101), Some(session), b"second command"),
                (LogIndex(102), None, b""),
            ]
        );
        assert!(view.verify_chain(Chain([0x11; 16])));
        assert!(!view.verify_chain(Chain([0x12; 16])));
    }
    let end = slot_bytes(info.image_bytes as usize);
    assert!(block[ENVELOPE_BYTES + info.image_bytes as usize..end].iter().all(|byte| *byte == 0));
}

#[test]
fn a_run_of_commands_is_taken_as_if_they_came_one_by_one() {
    let mut rng = Rng(11);
    let (mut whole, mut parts) = (0, 0);
    for round in 0..400 {
        let [mut one_by_one, mut at_once] = [(); 2].map(|()| BatchBuilder::new(block(32 * 1024)));
        for builder in [&mut one_by_one, &mut at_once] {
            let mut rng = Rng(round);
            for _ in 0..rng.below(4) {
                let session = (rng.below(2) == 0).then_some(SessionRef { session: 1, sequence: 2 });
                builder.push(&vec![5; rng.below(300)], session).unwrap();
            }
        }
        let longest = [1, 30, 300, 3000][rng.below(4)];
        let lengths: Vec<u32> = (0..rng.below(300)).map(|_| rng.below(longest) as u32).collect();
        let payload: Vec<u8> = (0..lengths.iter().sum::<u32>()).map(|_| rng.next() as u8).collect();
        let slot_bytes_max = BLOCK_BYTES * (1 + rng.below(10));

        let mut start = 0;
        let taken = lengths.iter().take_while(|length| {
            let command = &payload[start..start + **length as usize];
            start += command.len();
            one_by_one.push_within(slot_bytes_max, command, None).is_ok()
        });
        let taken = taken.count();
        assert_eq!(at_once.push_run(slot_bytes_max, &payload, &lengths), taken);
        *(if taken == lengths.len() { &mut whole } else { &mut parts }) += 1;
        if !one_by_one.is_empty() {
            let (expected, info) = one_by_one.seal(seal(BatchKind::Commands));
            let (block, same) = at_once.seal(seal(BatchKind::Commands));
            assert_eq!(info, same);
            assert_eq!(image(&block, info), image(&expected, info));
        }
    }
    assert!(whole > 50 && parts > 50, "{whole} went in whole, {parts} in part");
}

#[test]
fn a_run_stops_at_the_most_commands_of_a_batch() {
    let mut builder = BatchBuilder::new(block(4 << 20));
    let lengths = vec![0; COUNT_MAX];
    builder.push(b"", None).unwrap();
    assert_eq!(builder.push_run(usize::MAX, b"", &lengths), COUNT_MAX - 1);
    assert_eq!(builder.push_run(usize::MAX, b"", &lengths), 0);
}

#[test]
fn the_computed_size_is_the_size_for_every_mix_of_commands() {
    let mut rng = Rng(3);
    for _ in 0..300 {
        let mut builder = BatchBuilder::new(block(64 * 1024));
        for _ in 0..1 + rng.below(40) {
            let command = vec![7; rng.below(1500)];
            let session = (rng.below(2) == 0).then_some(SessionRef { session: 1, sequence: rng.next() });
            if builder.push(&command, session).is_err() {
                break;
            }
        }
        let expected = builder.image_bytes_if_sealed();
        let (block, info) = builder.seal(seal(BatchKind::Commands));
        assert_eq!(info.image_bytes as usize, expected);
        let view = parse_image(image(&block, info)).unwrap();
        assert_eq!(view.commands().count() as u64, info.count());
        assert!(!builder.is_armed() && builder.is_empty());
    }
}

#[test]
fn a_batch_at_every_cap_is_sealed_and_read_and_one_more_is_refused() {
    let mut builder = BatchBuilder::new(block(SLOT_BYTES_MAX));
    let command = vec![1; PAYLOAD_BYTES_MAX / COUNT_MAX];
    for sequence in 0..COUNT_MAX as u64 {
        builder.push(&command, Some(SessionRef { session: 1, sequence })).unwrap();
    }
    assert_eq!(builder.push(b"", None), Err(BatchFull::Cap));
    assert_eq!(builder.push(b"x", None), Err(BatchFull::Cap));
    let (large, info) = builder.seal(seal(BatchKind::Commands));
    assert_eq!(info.image_bytes as usize, IMAGE_BYTES_MAX);
    assert_eq!(parse_image(image(&large, info)).unwrap().len(), COUNT_MAX);

    builder.rearm(block(SLOT_BYTES_MAX));
    builder.push(&vec![1; PAYLOAD_BYTES_MAX], None).unwrap();
    assert_eq!(builder.push(b"x", None), Err(BatchFull::Cap));
}

#[test]
fn a_full_block_says_what_it_needs_and_growing_keeps_the_commands() {
    let mut builder = BatchBuilder::new(block(BLOCK_BYTES));
    builder.push(&[1; 2000], None).unwrap();
    let Err(BatchFull::Block { slot_bytes }) = builder.push(&[2; 3000], None) else {
        panic!("it does not fit")
    };
    assert_eq!(slot_bytes, 8192);
    assert_eq!(builder.len(), 1);
    builder.grow(block(slot_bytes));
    builder.push(&[2; 3000], None).unwrap();
    let (block, info) = builder.seal(seal(BatchKind::Commands));
    let view = parse_image(image(&block, info)).unwrap();
    assert_eq!(view.commands().map(|command| command.bytes.len()).collect::<Vec<_>>(), [2000, 3000]);
    assert!(view.commands().zip([1, 2]).all(|(command, byte)| command.bytes.iter().all(|b| *b == byte)));
}

#[test]
fn every_flipped_bit_and_every_other_length_of_an_image_is_refused() {
    let (block, info) = sample();
    let mut altered = owned(&block, info);
    for bit in 0..altered.bytes * 8 {
        altered.get_mut()[bit / 8] ^= 1 << (bit % 8);
        assert!(parse_image(altered.get()).is_err(), "bit {bit}");
        // Access without checksums may succeed, but never panics.
        if let Ok(view) = BatchView::trusted(altered.get()) {
            view.commands().for_each(drop);
        }
        altered.get_mut()[bit / 8] ^= 1 << (bit % 8);
    }
    for length in 0..block.len() - ENVELOPE_BYTES {
        let accepted = parse_image(&block[ENVELOPE_BYTES..ENVELOPE_BYTES + length]).is_ok();
        assert_eq!(accepted, length == info.image_bytes as usize);
        let _ = BatchView::trusted(&block[ENVELOPE_BYTES..ENVELOPE_BYTES + length]);
    }
}

#[test]
fn a_sector_of_another_batch_or_another_place_does_not_fit() {
    let batch = |first: u64| {
        let mut builder = BatchBuilder::new(block(8192));
        builder.push(&[0; 4000], None).unwrap();
        builder.seal(Seal { first: LogIndex(first), ..seal(BatchKind::Commands) })
    };
    let (block, info) = batch(1);
    let (other, _) = batch(2);
    let mut altered = owned(&block, info);
    // The same bytes in another batch have another checksum, so its header and table do not fit ours.
    altered.get_mut()[..512].copy_from_slice(&image(&other, info)[..512]);
    assert_eq!(parse_image(altered.get()).err(), Some(ImageError::HeaderChecksum));
    let sums = |block: &Block<AlignedBuf>| image(block, info)[info.image_bytes as usize - 32..].to_vec();
    assert_ne!(sums(&block), sums(&other));
    let same = sums(&block);
    assert!(same.chunks(4).all(|sum| sum != [0; 4]));
    assert_ne!(same[..4], same[4..8], "equal sectors have different checksums at different places");
}

/// Alters a sample's header by name, makes the checksums fit again and returns what a reader says.
fn altered_header(change: impl Fn(&mut Header)) -> Option<ImageError> {
    let (block, info) = sample();
    let mut altered = owned(&block, info);
    let mut header = Header::decode(altered.get().first_chunk().unwrap());
    change(&mut header);
    altered.get_mut()[..IMAGE_HEADER_BYTES].copy_from_slice(&header.encode());
    reseal(altered.get_mut());
    parse_image(altered.get()).err()
}

#[test]
fn a_header_that_breaks_a_rule_is_refused_by_that_rule() {
    assert_eq!(altered_header(|_| ()), None);
    assert_eq!(altered_header(|header| header.magic ^= 1), Some(ImageError::Magic));
    assert_eq!(altered_header(|header| header.version = 2), Some(ImageError::Version(2)));
    assert_eq!(altered_header(|header| header.features = 6), Some(ImageError::Features(6)));
    assert_eq!(altered_header(|header| header.kind = 0), Some(ImageError::Kind(0)));
    assert_eq!(altered_header(|header| header.kind = 6), Some(ImageError::Kind(6)));
    assert_eq!(altered_header(|header| header.reserved_a = 1), Some(ImageError::Range("reserved part")));
    assert_eq!(altered_header(|header| header.reserved_b[51] = 1), Some(ImageError::Range("reserved part")));
    assert_eq!(altered_header(|header| header.image_bytes += 1), Some(ImageError::Length));
    for count in [0, COUNT_MAX as u32 + 1, u32::MAX] {
        assert_eq!(altered_header(|header| header.count = count), Some(ImageError::Range("count")));
    }
    for first in [0, u64::MAX, u64::MAX - 2] {
        let error = altered_header(|header| header.first = LogIndex(first));
        assert_eq!(error, Some(ImageError::Range("index")));
    }
    let too_long = PAYLOAD_BYTES_MAX as u32 + 1;
    assert_eq!(
        altered_header(|header| header.payload_bytes = too_long),
        Some(ImageError::Range("payload length"))
    );
    for bytes in [0, 1, 11, 1000, u32::MAX] {
        let error = altered_header(|header| header.table_bytes = bytes);
        assert_eq!(error, Some(ImageError::Range("table length")));
    }
    let error = altered_header(|header| header.kind = BatchKind::Empty as u8);
    assert_eq!(error, Some(ImageError::Range("content of an empty batch")));
    assert_eq!(altered_header(|header| header.count = 2), Some(ImageError::Table));
    assert_eq!(altered_header(|header| header.count = 4), Some(ImageError::Table));
    // Shifting the boundary between payload and table moves the archive's root.
    assert_eq!(altered_header(|header| header.payload_bytes -= 1), Some(ImageError::Table));
}

/// Alters bytes of a sample's entry table and returns what a reader says.
fn altered_table(at: usize, value: &[u8]) -> Option<ImageError> {
    let (block, info) = sample();
    let mut altered = owned(&block, info);
    let table_at = (IMAGE_HEADER_BYTES + info.payload_bytes as usize).next_multiple_of(8);
    altered.get_mut()[table_at + at..table_at + at + value.len()].copy_from_slice(value);
    reseal(altered.get_mut());
    parse_image(altered.get()).err()
}

#[test]
fn an_entry_table_that_breaks_a_rule_is_refused() {
    // Entries of 12 bytes: offset, length, flags, slot. The second has the session.
    assert_eq!(altered_table(0, &[0]), None);
    assert_eq!(altered_table(0, &[1]), Some(ImageError::Entry(0)), "a gap before the first");
    assert_eq!(altered_table(4, &[4]), Some(ImageError::Entry(1)), "a gap before the second");
    assert_eq!(altered_table(12, &[4]), Some(ImageError::Entry(1)), "an overlap");
    assert_eq!(altered_table(4, &[0xff; 4]), Some(ImageError::Entry(1)), "a length beyond everything");
    assert_eq!(altered_table(28, &[1]), Some(ImageError::Table), "more than the payload");
    assert_eq!(altered_table(8, &[2]), Some(ImageError::Entry(0)), "an unknown flag");
    assert_eq!(altered_table(10, &[1]), Some(ImageError::Entry(0)), "a slot without the flag");
    assert_eq!(altered_table(22, &[1]), Some(ImageError::Entry(1)), "a slot out of turn");
    assert_eq!(altered_table(20, &[0]), Some(ImageError::Table), "a session that no entry refers to");
    assert_eq!(altered_table(8, &[1]), Some(ImageError::Entry(1)), "a session used twice");
    // The vectors: relative pointer and length. Entries 36 bytes, padded to 40, sessions 16, root at 56.
    for at in [56, 60, 64, 68] {
        for value in [[0xff; 4], [0, 0, 0, 0x80], [1, 0, 0, 0], [0xff, 0xff, 0xff, 0x7f]] {
            if at == 68 && value == [1, 0, 0, 0] {
                continue;
            }
            assert!(altered_table(at, &value).is_some(), "{value:?} at {at}");
        }
    }
}

#[test]
fn random_bytes_behind_fitting_checksums_never_panic() {
    let (block, info) = sample();
    let mut rng = Rng(11);
    for _ in 0..20_000 {
        let mut altered = owned(&block, info);
        for _ in 0..1 + rng.below(6) {
            let at = rng.below(altered.bytes);
            altered.get_mut()[at] = rng.next() as u8;
        }
        reseal(altered.get_mut());
        if let Ok(view) = parse_image(altered.get()) {
            assert_eq!(view.commands().count(), view.len());
        }
        if let Ok(view) = BatchView::trusted(altered.get()) {
            view.commands().for_each(drop);
        }
    }
}

#[test]
fn an_image_in_misaligned_memory_is_refused_not_misread() {
    let (block, info) = sample();
    let mut shifted = vec![0; info.image_bytes as usize + 16];
    let misaligned = (1..16).find(|at| !(shifted.as_ptr() as usize + at).is_multiple_of(8)).unwrap();
    let range = misaligned..misaligned + info.image_bytes as usize;
    shifted[range.clone()].copy_from_slice(image(&block, info));
    let error = parse_image(&shifted[range]).err();
    // 8-byte alignment of the image decides, since the table lies at a multiple of 8.
    assert_eq!(error, Some(ImageError::Misaligned));
}

#[test]
fn every_flipped_bit_of_the_local_structs_is_refused() {
    let mut bytes = vec![0; HARD_STATE_FILE_BYTES];
    write_envelope(&mut bytes, &envelope());
    for bit in 0..ENVELOPE_BYTES * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(read_envelope(&bytes).is_err(), "bit {bit}");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    write_segment_header(&mut bytes, &segment_header());
    for bit in 0..SEGMENT_HEADER_BYTES * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(read_segment_header(&bytes).is_err(), "bit {bit}");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    write_hard_state(&mut bytes, &hard_state());
    for bit in 0..(256 + hard_state().configuration.len()) * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(read_hard_state(&bytes).is_err(), "bit {bit}");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    for length in 0..ENVELOPE_BYTES {
        assert_eq!(read_envelope(&bytes[..length]).err(), Some(EnvelopeError::TooShort));
        assert_eq!(read_segment_header(&bytes[..length]).err(), Some(SegmentHeaderError::TooShort));
    }
    for length in 0..256 + hard_state().configuration.len() {
        assert!(read_hard_state(&bytes[..length]).is_err());
    }
}

/// Alters a struct's bytes at `field` and makes its checksum fit again.
fn patch(bytes: &mut [u8], total: usize, fields: &[FieldAt], field: &str, value: &[u8]) {
    let at = field_range(fields, field).start;
    bytes[at..at + value.len()].copy_from_slice(value);
    let crc = field_range(fields, "crc");
    bytes[crc.clone()].fill(0);
    let sum = ringraft_block::crc32c(&bytes[..total]);
    bytes[crc].copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn an_envelope_that_breaks_a_rule_is_refused_by_that_rule() {
    let altered = |field: &str, value: &[u8]| {
        let mut bytes = vec![0; ENVELOPE_BYTES];
        write_envelope(&mut bytes, &envelope());
        patch(&mut bytes, ENVELOPE_BYTES, envelope::Layout::FIELDS, field, value);
        read_envelope(&bytes).err()
    };
    assert_eq!(altered("boot", &[9]), None);
    assert_eq!(altered("magic", &[0]), Some(EnvelopeError::Magic));
    assert_eq!(altered("version", &[2]), Some(EnvelopeError::Version(2)));
    assert_eq!(altered("reserved_a", &[1]), Some(EnvelopeError::Range("reserved part")));
    assert_eq!(altered("reserved_b", &[1]), Some(EnvelopeError::Range("reserved part")));
    assert_eq!(altered("image_bytes", &[1, 0, 0, 0]), Some(EnvelopeError::Range("image length")));
    assert_eq!(altered("image_bytes", &[0xff; 4]), Some(EnvelopeError::Range("image length")));
    assert_eq!(altered("first", &[0; 8]), Some(EnvelopeError::Range("index")));
    assert_eq!(altered("last", &[0; 8]), Some(EnvelopeError::Range("index")));
    assert_eq!(altered("durable_through", &[100]), Some(EnvelopeError::Range("index")));
}

#[test]
fn a_segment_header_that_breaks_a_rule_is_refused_by_that_rule() {
    let altered = |field: &str, value: &[u8]| {
        let mut bytes = vec![0; SEGMENT_HEADER_BYTES];
        write_segment_header(&mut bytes, &segment_header());
        patch(&mut bytes, SEGMENT_HEADER_BYTES, segment_header::Layout::FIELDS, field, value);
        read_segment_header(&bytes).err()
    };
    assert_eq!(read_segment_header(&[0; 512]).err(), Some(SegmentHeaderError::Blank));
    assert_eq!(altered("boot", &[9]), None);
    assert_eq!(altered("magic", &[0]), Some(SegmentHeaderError::Magic));
    assert_eq!(altered("version", &[2]), Some(SegmentHeaderError::Version(2)));
    assert_eq!(altered("fingerprint", &[1; 8]), Some(SegmentHeaderError::Fingerprint(0x0101_0101_0101_0101)));
    assert_eq!(altered("prior_content", &[2]), Some(SegmentHeaderError::Range("prior content")));
    assert_eq!(altered("prior_content", &[1]), None);
    assert_eq!(altered("origin", &[2]), Some(SegmentHeaderError::Range("origin")));
    assert_eq!(altered("generation", &[0; 4]), Some(SegmentHeaderError::Range("generation")));
    assert_eq!(altered("previous_generation", &[7]), Some(SegmentHeaderError::Range("generation")));
    assert_eq!(altered("reserved_a", &[1]), Some(SegmentHeaderError::Range("reserved part")));
    assert_eq!(altered("reserved_b", &[1]), Some(SegmentHeaderError::Range("reserved part")));
}

#[test]
fn a_hard_state_that_breaks_a_rule_is_refused_by_that_rule() {
    let total = 256 + hard_state().configuration.len();
    let alter = |field: &str, value: &[u8], total: usize| {
        let mut bytes = vec![0; HARD_STATE_FILE_BYTES];
        write_hard_state(&mut bytes, &hard_state());
        patch(&mut bytes, total, hard_state_file::FileHeader::FIELDS, field, value);
        read_hard_state(&bytes).err()
    };
    let altered = |field: &str, value: &[u8]| alter(field, value, total);
    assert_eq!(altered("boot", &[9]), None);
    assert_eq!(altered("magic", &[0]), Some(HardStateError::Magic));
    assert_eq!(altered("version", &[2]), Some(HardStateError::Version(2)));
    assert_eq!(altered("fingerprint", &[1; 8]), Some(HardStateError::Fingerprint(0x0101_0101_0101_0101)));
    assert!(altered("version", &[2]).unwrap().is_foreign() && !altered("magic", &[0]).unwrap().is_foreign());
    assert_eq!(altered("group_count", &[0]), Some(HardStateError::Range("group count")));
    assert_eq!(altered("group_count", &[2]), Some(HardStateError::Range("group count")));
    assert_eq!(altered("reserved_a", &[1]), Some(HardStateError::Range("reserved part")));
    assert_eq!(altered("reserved_b", &[1]), Some(HardStateError::Range("reserved part")));
    assert_eq!(altered("total_bytes", &[0; 4]), Some(HardStateError::Range("length")));
    assert_eq!(altered("total_bytes", &[0xff; 4]), Some(HardStateError::Range("length")));
    let one_less = (total - 1) as u8;
    let error = alter("total_bytes", &[one_less, 1 - u8::from(total <= 256)], total - 1);
    assert_eq!(error, Some(HardStateError::Range("configuration length")));
    let record = |field: &str, value: &[u8]| {
        let mut bytes = vec![0; HARD_STATE_FILE_BYTES];
        write_hard_state(&mut bytes, &hard_state());
        let at = 128 + field_range(hard_state_file::GroupRecord::FIELDS, field).start;
        bytes[at..at + value.len()].copy_from_slice(value);
        patch(&mut bytes, total, hard_state_file::FileHeader::FIELDS, "boot", &[3]);
        read_hard_state(&bytes).err()
    };
    assert_eq!(record("witness", &[1]), None);
    assert_eq!(record("reserved", &[1]), Some(HardStateError::Range("claim")));
    assert_eq!(record("configuration_bytes", &[1]), Some(HardStateError::Range("configuration length")));
    assert_eq!(record("cut_generation", &[8]), Some(HardStateError::Range("generation")));
}
