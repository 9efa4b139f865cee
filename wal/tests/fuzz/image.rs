//! The image: every byte is covered exactly once, so no altered byte passes; behind the checksums stands the entry table, an archive that
//! is accessed in place.

use crate::alloc::{Allocated, allocated};
use crate::seal::{checksums_at, field, number, reseal_image};
use crate::sweep::{corpus, sweep, sweep_bytes};
use bolero::TypeGenerator;
use ringraft_block::{AlignedBuf, BlockBuf, GroupId, LogIndex, Pool, SECTOR_BYTES, Term};
use ringraft_wal::format::{
    BatchBuilder, BatchFull, BatchInfo, BatchKind, BatchView, COUNT_MAX, Chain, ENVELOPE_BYTES,
    IMAGE_BYTES_MIN, IMAGE_HEADER_BYTES, ImageError, Seal, SectorChecksums, SessionRef, image_bytes_for,
    parse_image,
};
use std::convert::Infallible;

#[derive(Clone, Debug, TypeGenerator)]
struct CommandParts {
    bytes: u16,
    fill: u8,
    session: Option<(u64, u64)>,
}

impl CommandParts {
    /// Mostly short, sometimes several sectors.
    fn command(&self) -> Vec<u8> {
        let bytes = if self.bytes.is_multiple_of(8) { self.bytes / 8 } else { self.bytes % 100 };
        (0..bytes).map(|at| self.fill.wrapping_add(at as u8)).collect()
    }

    fn session(&self) -> Option<SessionRef> {
        self.session.map(|(session, sequence)| SessionRef { session, sequence })
    }
}

#[derive(Debug, TypeGenerator)]
struct Parts {
    commands: Vec<CommandParts>,
    kind: u8,
    group: u32,
    term: u64,
    first: u64,
    time_ms: u64,
    previous_chain: [u8; 16],
    altered_at: u32,
    altered_by: u8,
    length: u16,
}

impl Parts {
    fn seal(&self) -> Seal {
        let kinds =
            [BatchKind::Commands, BatchKind::Membership, BatchKind::SessionControl, BatchKind::Barrier];
        let kind = kinds[usize::from(self.kind) % kinds.len()];
        Seal {
            group: GroupId(self.group),
            term: Term(self.term),
            first: LogIndex(self.first.clamp(1, u64::MAX - COUNT_MAX as u64)),
            kind: if self.commands.is_empty() { BatchKind::Empty } else { kind },
            time_ms: self.time_ms,
            previous_chain: Chain(self.previous_chain),
        }
    }
}

/// A command and its session, as pushed.
type Pushed = (Vec<u8>, Option<SessionRef>);

fn sealed(commands: &[Pushed], seal: Seal) -> (AlignedBuf, BatchInfo) {
    let pool = Pool::new(0);
    let take = |bytes| pool.take(bytes, |bytes| Ok::<_, Infallible>(AlignedBuf::zeroed(bytes))).unwrap();
    let mut builder = BatchBuilder::new(take(4096));
    for (command, session) in commands {
        loop {
            match builder.push(command, *session) {
                Ok(()) => break,
                Err(BatchFull::Block { slot_bytes }) => builder.grow(take(slot_bytes)),
                Err(BatchFull::Cap) => panic!("the generator stays below the caps"),
            }
        }
    }
    let expected = builder.image_bytes_if_sealed();
    let (block, info) = builder.seal(seal);
    assert_eq!(expected, info.image_bytes as usize);
    (aligned(&block[ENVELOPE_BYTES..ENVELOPE_BYTES + expected]), info)
}

/// A copy whose address is that of a block.
fn aligned(bytes: &[u8]) -> AlignedBuf {
    let mut buffer = AlignedBuf::zeroed(bytes.len());
    buffer.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
    buffer
}

fn round_trip(parts: &Parts) {
    let seal = parts.seal();
    let commands: Vec<Pushed> =
        parts.commands.iter().map(|parts| (parts.command(), parts.session())).collect();
    let (mut buffer, info) = sealed(&commands, seal);
    let length = info.image_bytes as usize;
    {
        let image = &buffer.bytes()[..length];
        let (view, memory) = allocated(|| parse_image(image));
        assert_eq!(memory, Allocated::default());
        let view = view.expect("what was sealed is read");
        assert_eq!(view.info(), info);
        let count = commands.len().max(1);
        assert_eq!((info.first, info.last.get()), (seal.first, seal.first.get() + count as u64 - 1));
        assert_eq!((info.term, info.group, info.time_ms), (seal.term, seal.group, seal.time_ms));
        let read: Vec<Pushed> =
            view.commands().map(|command| (command.bytes.to_vec(), command.session)).collect();
        if seal.kind == BatchKind::Empty {
            assert_eq!(read, [(Vec::new(), None)]);
        } else {
            assert_eq!(read, commands);
        }
        assert!(view.verify_chain(seal.previous_chain));
        let mut other = seal.previous_chain;
        other.0[usize::from(parts.altered_by) % 16] ^= 1;
        assert!(!view.verify_chain(other));

        // The same commands, the same bytes; and the checksums are those that the format describes.
        assert_eq!(sealed(&commands, seal).0.bytes()[..length], *image);
        let mut again = image.to_vec();
        reseal_image(&mut again);
        assert_eq!(again, image);

        // No other length.
        let shorter = usize::from(parts.length) % length;
        assert!(parse_image(&image[..shorter]).is_err());
        let mut longer = aligned(&[image, &vec![0; 1 + usize::from(parts.length)]].concat());
        assert!(parse_image(&longer.bytes()[..length + 1 + usize::from(parts.length)]).is_err());
        // Nor another alignment in memory.
        longer.bytes_mut()[4..4 + length].copy_from_slice(image);
        let misaligned = parse_image(&longer.bytes()[4..4 + length]).map(|view| view.info());
        assert_eq!(misaligned, Err(ImageError::Misaligned));
    }
    if parts.altered_by != 0 {
        let at = parts.altered_at as usize % length;
        buffer.bytes_mut()[at] ^= parts.altered_by;
        let image = &buffer.bytes()[..length];
        parse_image(image).err().expect("an altered byte is noticed");
        // In header or checksum table nothing can be judged; elsewhere it costs its own sector and no other.
        match SectorChecksums::of(image) {
            Err(_) => assert!(at < IMAGE_HEADER_BYTES || at >= checksums_at(length)),
            Ok(sectors) => {
                for ordinal in 0..sectors.count() {
                    assert_eq!(sectors.is_good(ordinal), ordinal != at / SECTOR_BYTES);
                }
            }
        }
    }
}

/// Whatever passes makes sense: its commands fill the payload, and sealing them again says the same.
fn sensible(bytes: &[u8]) {
    let buffer = aligned(bytes);
    let image = &buffer.bytes()[..bytes.len()];
    let (parsed, memory) = allocated(|| {
        let _ = SectorChecksums::of(image).map(|sectors| (0..sectors.count()).all(|at| sectors.is_good(at)));
        // Without the checksums, so that the archive is reached by whatever the bytes are.
        if let Ok(view) = BatchView::trusted(image) {
            assert!((1..=COUNT_MAX).contains(&view.len()));
            for at in 0..=view.len() {
                let command = view.command(at);
                assert!(
                    command.is_none_or(|command| command.bytes.len() <= view.info().payload_bytes as usize)
                );
                assert!(at < view.len() || command.is_none());
            }
            assert!(view.commands().count() <= view.len());
        }
        parse_image(image)
    });
    assert_eq!(memory, Allocated::default(), "nothing is allocated, whatever the lengths claim");
    let Ok(view) = parsed else { return };
    let info = view.info();
    assert_eq!(info.image_bytes as usize, bytes.len());
    assert_eq!(info.count(), view.len() as u64);
    let commands: Vec<_> = view.commands().collect();
    assert_eq!(commands.len(), view.len());
    let payload: Vec<u8> = commands.iter().flat_map(|command| command.bytes).copied().collect();
    assert_eq!(payload, image[IMAGE_HEADER_BYTES..IMAGE_HEADER_BYTES + info.payload_bytes as usize]);
    for (ordinal, command) in commands.iter().enumerate() {
        assert_eq!((command.index.get(), command.time_ms), (info.first.get() + ordinal as u64, info.time_ms));
    }
    let pushed: Vec<Pushed> = match info.kind {
        BatchKind::Empty if commands[0].session.is_none() => Vec::new(),
        // A session on an empty batch's entry cannot be pushed; it is read as any other.
        BatchKind::Empty => return,
        _ => commands.iter().map(|command| (command.bytes.to_vec(), command.session)).collect(),
    };
    let seal = Seal {
        group: info.group,
        term: info.term,
        first: info.first,
        kind: info.kind,
        time_ms: info.time_ms,
        previous_chain: Chain::default(),
    };
    let (again, sealed_info) = sealed(&pushed, seal);
    assert_eq!(BatchInfo { chain: info.chain, ..sealed_info }, info);
    let again = parse_image(&again.bytes()[..bytes.len()]).expect("what was sealed is read");
    assert!(again.commands().eq(commands));
}

/// A valid image whose entry table was altered in places, with checksums that fit.
#[derive(Debug, TypeGenerator)]
struct TableParts {
    commands: Vec<CommandParts>,
    alterations: Vec<(u16, TableValue)>,
}

#[derive(Debug, TypeGenerator)]
enum TableValue {
    Any(u32),
    Small(u8),
    Negative(u8),
    Flip(u8),
    High(u16),
}

fn altered_table(parts: &TableParts) {
    let commands: Vec<Pushed> =
        parts.commands.iter().take(16).map(|parts| (parts.command(), parts.session())).collect();
    let (buffer, info) = sealed(&commands, seal_sample(commands.is_empty()));
    let mut image = buffer.bytes()[..info.image_bytes as usize].to_vec();
    let end = checksums_at(image.len());
    let start = end - number(&image, field("image header", "table_bytes")) as usize;
    for (at, value) in parts.alterations.iter().take(3) {
        let at = start + usize::from(*at) * 4 % (end - start);
        let word = image[at..].first_chunk_mut::<4>().expect("a table is whole words");
        let old = u32::from_le_bytes(*word);
        let new = match value {
            TableValue::Any(value) => *value,
            TableValue::Small(value) => u32::from(*value),
            TableValue::Negative(value) => u32::from(*value).wrapping_neg(),
            TableValue::Flip(bit) => old ^ 1 << (bit % 32),
            TableValue::High(value) => old ^ u32::from(*value) << 16,
        };
        *word = new.to_le_bytes();
    }
    sensible(&image);
    reseal_image(&mut image);
    sensible(&image);
}

fn seal_sample(empty: bool) -> Seal {
    Seal {
        group: GroupId(0),
        term: Term(5),
        first: LogIndex(100),
        kind: if empty { BatchKind::Empty } else { BatchKind::Commands },
        time_ms: 1_700_000_000_123,
        previous_chain: Chain([0x11; 16]),
    }
}

/// The images of the golden file, one of several sectors, and one whose every length claims 4 GiB.
fn valid() -> Vec<(String, Vec<u8>)> {
    let session = Some(SessionRef { session: 0xabcd, sequence: 17 });
    let commands: [Pushed; 3] =
        [(b"first".to_vec(), None), (b"second command".to_vec(), session), (Vec::new(), None)];
    let long: [Pushed; 2] = [(vec![0x5a; 1500], session), (vec![1; 100], None)];
    let image = |commands: &[Pushed]| {
        let (buffer, info) = sealed(commands, seal_sample(commands.is_empty()));
        buffer.bytes()[..info.image_bytes as usize].to_vec()
    };
    vec![
        ("commands".to_owned(), image(&commands)),
        ("empty".to_owned(), image(&[])),
        ("sectors".to_owned(), image(&long)),
    ]
}

/// The bytes of the checked-in hex table, up to the blank line, with its left-out zero lines.
fn golden(length: usize, after: &str) -> Vec<u8> {
    let text = include_str!("../golden/image.txt");
    let mut image = vec![0; length];
    let lines = text.lines().skip_while(|line| !line.starts_with(after)).skip(1);
    for line in lines.take_while(|line| !line.is_empty()) {
        let mut words = line.split_whitespace();
        let at = usize::from_str_radix(words.next().unwrap(), 16).unwrap();
        for (byte, word) in image[at..].iter_mut().zip(words) {
            *byte = u8::from_str_radix(word, 16).unwrap();
        }
    }
    image
}

#[test]
fn what_is_sealed_is_read_and_an_altered_byte_is_refused() {
    bolero::check!().with_iterations(0).with_type::<Parts>().for_each(round_trip);
    sweep(1500, round_trip);
}

#[test]
fn what_is_read_makes_sense() {
    let mut files = valid();
    assert_eq!(files[0].1, golden(files[0].1.len(), "commands:"), "the corpus begins with the golden image");
    assert_eq!(files[1].1, golden(files[1].1.len(), "empty:"));
    let mut huge = files[0].1.clone();
    for name in ["count", "payload_bytes", "table_bytes", "image_bytes"] {
        huge[field("image header", name)].fill(0xff);
    }
    reseal_image(&mut huge);
    files.push(("claims-4-gib".to_owned(), huge.clone()));
    corpus("image__what_is_read_makes_sense", &files);
    bolero::check!().with_iterations(0).for_each(sensible);
    assert!(parse_image(aligned(&huge).bytes().get(..huge.len()).unwrap()).is_err());
    let valid: Vec<_> = valid().into_iter().map(|(_, bytes)| bytes).collect();
    sweep_bytes(20_000, &valid, reseal_image, sensible);
}

#[test]
fn an_entry_table_that_passes_makes_sense() {
    bolero::check!().with_iterations(0).with_type::<TableParts>().for_each(altered_table);
    sweep(4000, altered_table);
}

#[test]
fn every_altered_byte_of_an_image_is_refused() {
    for (name, image) in valid() {
        let mut buffer = aligned(&image);
        for at in 0..image.len() {
            for by in [0x01, 0x80, 0xff] {
                buffer.bytes_mut()[at] ^= by;
                assert!(
                    parse_image(&buffer.bytes()[..image.len()]).is_err(),
                    "{name}: byte {at} altered by {by:#x}"
                );
                buffer.bytes_mut()[at] ^= by;
            }
        }
        assert!(parse_image(&buffer.bytes()[..image.len()]).is_ok());
    }
}

#[test]
fn the_smallest_image_is_that_of_an_empty_batch_by_one_command() {
    assert_eq!(IMAGE_BYTES_MIN, image_bytes_for(1, 0, 0));
    let (_, info) = sealed(&[], seal_sample(true));
    assert_eq!(info.image_bytes as usize, IMAGE_BYTES_MIN);
}
