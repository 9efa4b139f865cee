//! Recovery over a directory that was tampered with: a valid log of one of several shapes, then a few alterations of a kind that devices
//! (and worse) produce. Random files alone would never get past the first magic.
//!
//! What must hold whatever the alterations were:
//! 1. The start ends, with an open log or with a typed error, and asks for no more memory than the files can account for.
//! 2. What an open log holds is a prefix of what was appended, byte for byte, each batch whole and chained to the one before, but for
//!    those that it lists as damaged; and those are.
//! 3. The log is never shortened in silence. Without a claim that covers the missing batches, the first of them must look like a
//!    write that was torn (one of its sectors is blank now), and nothing intact may say that the log was durable through it.
//! 4. What is intact is not lost: under a claim, an intact batch is in the log or in the salvage.
//! 5. A start changes nothing for the next: it finds the same log, damage, salvage and claim, or stops for the same reason.
//! 6. An open log can be appended to, and a later start does not lose that.

use crate::alloc::allocated;
use crate::memory::{Directory, Unreadable};
use crate::scenario::{Expected, Known, Scenario, Slot, Start, scenarios, start};
use crate::sweep::{corpus, input, sweep_one};
use bolero::TypeGenerator;
use ringraft_block::{BLOCK_BYTES, LogIndex, SECTOR_BYTES};
use ringraft_wal::format::{
    BatchInfo, Claim, Cut, ENVELOPE_BYTES, SegmentOrigin, read_envelope, read_hard_state,
    read_segment_header, write_envelope, write_segment_header,
};
use ringraft_wal::{Recovered, WalError};
use std::collections::BTreeMap;
use std::ops::Range;

#[derive(Debug, TypeGenerator)]
struct Tampering {
    scenario: u8,
    first: Alteration,
    second: Option<Alteration>,
    third: Option<Alteration>,
}

/// A place in the directory.
#[derive(Clone, Debug, TypeGenerator)]
enum Spot {
    /// In a written slot: envelope, start of the image, anywhere.
    Envelope(u8, u16),
    Image(u8, u16),
    /// In a segment's header block.
    Header(u8, u16),
    /// Anywhere in a file, the hard state's included.
    File(u8, u32),
}

#[derive(Clone, Debug, TypeGenerator)]
enum Alteration {
    /// Bits rot.
    Flip(Spot, u8),
    /// Sectors hold something else: never written, or garbage.
    Blank(Spot, u8),
    Garbage(Spot, u8, u8),
    Bytes(Spot, Vec<u8>),
    /// A block, or a slot, is written to another place as well (or there instead).
    Copy(Spot, Spot, u8),
    CopySlot(u8, u8),
    /// The device cannot read a block.
    Unreadable(Spot),
    /// Both copies of the hard state rot.
    HardState(u16, u8),
    /// A file has lost its end.
    Truncate(u8, u32),
    /// A file has got a tail.
    Extend(u8, u8),
    /// An intact envelope says something else.
    Forge(u8, Forgery),
    /// An intact segment header says something else.
    ForgeHeader(u8, Forgery),
}

#[derive(Clone, Debug, TypeGenerator)]
enum Forgery {
    Nonce(u64),
    Generation(u8),
    Epoch(u8),
    Boot(u8),
    Offset(u8),
    DurableThrough(u16),
    Term(u8),
    First(u16),
    Last(u16),
    ImageBytes(u32),
    SegmentBytes(u32),
}

/// What an outcome is called in the corpus.
type Outcome = String;

/// The directory after the alterations.
struct Altered<'a> {
    scenario: &'a Scenario,
    directory: Directory,
    unreadable: Unreadable,
    /// A checksum was made to fit by hand, which no device does.
    forged: bool,
}

impl<'a> Altered<'a> {
    fn new(scenario: &'a Scenario) -> Self {
        let directory = scenario.directory.clone();
        Self { scenario, directory, unreadable: Unreadable::new(), forged: false }
    }

    /// Half of the time one of the last that were written, where a torn write and damage look alike.
    fn slot(&self, number: u8) -> &'a Slot {
        let slots = &self.scenario.slots;
        let (half, number) = (number % 2, usize::from(number / 2));
        if half == 0 { &slots[number % slots.len()] } else { self.scenario.slot_from_end(number % 3) }
    }

    /// The name of a file, and for segments only, of a segment.
    fn file(&self, number: u8, segments_only: bool) -> String {
        let names: Vec<_> =
            self.directory.keys().filter(|name| !segments_only || name.starts_with("segment")).collect();
        names[usize::from(number) % names.len()].clone()
    }

    fn spot(&self, spot: &Spot) -> (String, usize) {
        match spot {
            Spot::Envelope(slot, at) => {
                let slot = self.slot(*slot);
                (slot.file.clone(), slot.offset + usize::from(*at) % ENVELOPE_BYTES)
            }
            Spot::Image(slot, at) => {
                let slot = self.slot(*slot);
                let room = slot.bytes - ENVELOPE_BYTES;
                (slot.file.clone(), slot.offset + ENVELOPE_BYTES + usize::from(*at) % room)
            }
            Spot::Header(file, at) => (self.file(*file, true), usize::from(*at) % SECTOR_BYTES),
            Spot::File(file, at) => {
                let file = self.file(*file, false);
                let at = *at as usize % self.directory[&file].len().max(1);
                (file, at)
            }
        }
    }

    /// The bytes from a spot on, at most `count`.
    fn bytes_at(&mut self, file: &str, at: usize, count: usize) -> &mut [u8] {
        let content = self.directory.get_mut(file).expect("the file is there");
        let end = content.len().min(at + count);
        &mut content[at.min(end)..end]
    }

    fn sectors_at(&mut self, spot: &Spot, count: u8) -> &mut [u8] {
        let (file, at) = self.spot(spot);
        let at = at - at % SECTOR_BYTES;
        self.bytes_at(&file, at, (usize::from(count) % 9 + 1) * SECTOR_BYTES)
    }

    fn apply(&mut self, alteration: &Alteration) {
        match alteration {
            Alteration::Flip(spot, bit) => {
                let (file, at) = self.spot(spot);
                if let Some(byte) = self.bytes_at(&file, at, 1).first_mut() {
                    *byte ^= 1 << (bit % 8);
                }
            }
            Alteration::Blank(spot, sectors) => self.sectors_at(spot, *sectors).fill(0),
            Alteration::Garbage(spot, sectors, salt) => {
                for (at, byte) in self.sectors_at(spot, *sectors).iter_mut().enumerate() {
                    *byte = (at as u8).wrapping_mul(31) ^ salt | 1;
                }
            }
            Alteration::Bytes(spot, bytes) => {
                let (file, at) = self.spot(spot);
                let place = self.bytes_at(&file, at, bytes.len());
                place.copy_from_slice(&bytes[..place.len()]);
            }
            Alteration::Copy(from, to, blocks) => {
                let ((from, from_at), (to, to_at)) = (self.spot(from), self.spot(to));
                let count = (usize::from(*blocks) % 3 + 1) * BLOCK_BYTES;
                let bytes = self.bytes_at(&from, from_at - from_at % BLOCK_BYTES, count).to_vec();
                let place = self.bytes_at(&to, to_at - to_at % BLOCK_BYTES, bytes.len());
                place.copy_from_slice(&bytes[..place.len()]);
            }
            Alteration::CopySlot(from, to) => {
                let (from, to) = (self.slot(*from), self.slot(*to));
                let bytes = self.bytes_at(&from.file, from.offset, from.bytes).to_vec();
                let place = self.bytes_at(&to.file, to.offset, bytes.len());
                place.copy_from_slice(&bytes[..place.len()]);
            }
            Alteration::Unreadable(spot) => {
                let (file, at) = self.spot(spot);
                self.unreadable.insert((file, at - at % BLOCK_BYTES));
            }
            Alteration::HardState(at, bit) => {
                for name in ["hard-a", "hard-b"] {
                    if let Some(byte) = self.bytes_at(name, usize::from(*at) % 300, 1).first_mut() {
                        *byte ^= 1 << (bit % 8);
                    }
                }
            }
            Alteration::Truncate(file, length) => {
                let file = self.file(*file, false);
                let content = self.directory.get_mut(&file).expect("the file is there");
                content.truncate(*length as usize % (content.len() + 1));
            }
            Alteration::Extend(file, blocks) => {
                let file = self.file(*file, false);
                let content = self.directory.get_mut(&file).expect("the file is there");
                content.resize(content.len() + usize::from(*blocks) * SECTOR_BYTES, 0);
            }
            Alteration::Forge(slot, forgery) => {
                let slot = self.slot(*slot);
                let place = self.bytes_at(&slot.file, slot.offset, ENVELOPE_BYTES);
                if let Ok(mut envelope) = read_envelope(place) {
                    match forgery {
                        Forgery::Nonce(value) => envelope.nonce = *value,
                        Forgery::Generation(value) => envelope.generation = u32::from(*value),
                        Forgery::Epoch(value) => envelope.epoch = u64::from(*value),
                        Forgery::Boot(value) => envelope.boot = u64::from(*value),
                        Forgery::Offset(value) => envelope.offset = u64::from(*value) * BLOCK_BYTES as u64,
                        Forgery::DurableThrough(value) => envelope.durable_through.0 = u64::from(*value),
                        Forgery::Term(value) => envelope.term.0 = u64::from(*value),
                        Forgery::First(value) => envelope.first.0 = u64::from(*value),
                        Forgery::Last(value) => envelope.last.0 = u64::from(*value),
                        Forgery::ImageBytes(value) | Forgery::SegmentBytes(value) => {
                            envelope.image_bytes = *value
                        }
                    }
                    write_envelope(place, &envelope);
                    self.forged = true;
                }
            }
            Alteration::ForgeHeader(file, forgery) => {
                let file = self.file(*file, true);
                let place = self.bytes_at(&file, 0, SECTOR_BYTES);
                if let Ok(mut header) = read_segment_header(place) {
                    match forgery {
                        Forgery::Nonce(value) => header.nonce = *value,
                        Forgery::Generation(value) | Forgery::Offset(value) | Forgery::Term(value) => {
                            header.generation = u32::from(*value);
                        }
                        Forgery::Epoch(value) => header.epoch = u64::from(*value),
                        Forgery::Boot(value) => header.boot = u64::from(*value),
                        Forgery::SegmentBytes(value) | Forgery::ImageBytes(value) => {
                            header.segment_bytes = u64::from(*value);
                        }
                        Forgery::DurableThrough(value) | Forgery::First(value) | Forgery::Last(value) => {
                            if let SegmentOrigin::Cut { cut, after } = &mut header.origin {
                                cut.index.0 = u64::from(*value);
                                after.index = cut.index;
                            } else {
                                header.origin = SegmentOrigin::Rollover { previous: u32::from(*value) };
                            }
                        }
                    }
                    write_segment_header(place, &header);
                    self.forged = true;
                }
            }
        }
    }

    /// Whether the bytes of a range are as they were, in blocks that can be read: a block in which a file was cut short cannot.
    fn intact(&self, file: &str, range: Range<usize>) -> bool {
        let length = self.directory.get(file).map_or(0, Vec::len);
        if range.end > length - length % BLOCK_BYTES {
            return false;
        }
        let same = self.directory.get(file).and_then(|content| content.get(range.clone()))
            == self.scenario.directory.get(file).and_then(|content| content.get(range.clone()));
        let lost =
            |(name, at): &(String, usize)| name == file && *at < range.end && range.start < *at + BLOCK_BYTES;
        same && !self.unreadable.iter().any(lost)
    }

    /// Whether a segment that waits for its turn has been altered, or a name that may be used again has blocks that cannot be read.
    fn free_segment_is_dirty(&self) -> bool {
        let dirty = |(name, content): (&String, &Vec<u8>)| {
            name.ends_with(".free") && content.iter().any(|byte| *byte != 0)
        };
        !self.unreadable.is_empty() || self.directory.iter().any(dirty)
    }

    /// Whether something intact says that the log was durable through `missing`: the hard state, the cut in a segment header, or a later
    /// envelope of its epoch or a newer one.
    fn vouched(&self, missing: &Expected) -> bool {
        let at_least = |index: LogIndex| index >= missing.info.last;
        let copies: Vec<_> = ["hard-a", "hard-b"]
            .iter()
            .filter_map(|name| read_hard_state(self.directory.get(*name)?).ok())
            .collect();
        let newest = copies.iter().max_by_key(|state| state.sequence);
        let vouched_by_hard_state = newest.is_some_and(|state| at_least(state.witness.max(state.cut.index)));
        let headed = |slot: &Slot| self.intact(&slot.file, 0..SECTOR_BYTES);
        let vouched_by_envelope = self.scenario.slots.iter().any(|slot| {
            slot.envelope.epoch >= missing.epoch
                && at_least(slot.envelope.durable_through)
                && headed(slot)
                && self.intact(&slot.file, slot.offset..slot.offset + ENVELOPE_BYTES)
        });
        vouched_by_hard_state || vouched_by_envelope
    }

    /// Whether a batch is as it was written, envelope and image.
    fn has(&self, batch: &Expected) -> bool {
        self.slot_of(batch).is_some_and(|slot| {
            let end = slot.offset + ENVELOPE_BYTES + batch.info.image_bytes as usize;
            self.intact(&slot.file, slot.offset..end)
        })
    }

    /// Whether a batch of a damaged log that is not flagged is there: where it was written last, or where an epoch that was cut off
    /// held the very same, byte for byte, and nothing tells of the cut any more.
    fn has_somewhere(&self, batch: &Expected) -> bool {
        let slots = self.scenario.slots.iter().filter(|slot| slot.envelope.chain == batch.info.chain);
        self.has(batch)
            || slots.into_iter().any(|slot| {
                let end = slot.offset + ENVELOPE_BYTES + batch.info.image_bytes as usize;
                self.intact(&slot.file, slot.offset..end)
            })
    }

    /// Whether the log may hold a batch where it stood before a cut, since the header that told of the cut is gone: the contract's
    /// residual. The same batch may have been appended again behind that cut.
    fn has_a_damaged_void_copy(&self, batch: &Expected) -> bool {
        let cut_is_lost = self.slot_of(batch).is_some_and(|slot| !self.intact(&slot.file, 0..SECTOR_BYTES));
        let damaged = |slot: &Slot| {
            let end = slot.offset + ENVELOPE_BYTES + batch.info.image_bytes as usize;
            slot.envelope.epoch < batch.epoch && !self.intact(&slot.file, slot.offset..end)
        };
        let mut copies = self.scenario.slots.iter().filter(|slot| slot.envelope.chain == batch.info.chain);
        cut_is_lost && copies.any(damaged)
    }

    /// Whether a batch was made void by a cut of which the only header that told is gone. A start that knew the cut from the hard state
    /// has put its own cut in that one's place, so a later start cannot tell these from what damage cut off: the
    /// contract's residual.
    fn made_void_by_a_lost_cut(&self, info: &BatchInfo) -> bool {
        let lost_cuts = self.scenario.directory.iter().filter_map(|(file, content)| {
            let header = read_segment_header(content.get(..SECTOR_BYTES)?).ok()?;
            let SegmentOrigin::Cut { cut, .. } = header.origin else { return None };
            (file.starts_with("segment") && !self.intact(file, 0..SECTOR_BYTES))
                .then_some((header.epoch, cut))
        });
        let mut slots = self.scenario.slots.iter().filter(|slot| slot.envelope.chain == info.chain);
        let lost_cuts: Vec<_> = lost_cuts.collect();
        slots.any(|slot| {
            let place = (slot.envelope.generation, slot.offset as u64);
            let is_void = |(epoch, cut): &(u64, Cut)| {
                slot.envelope.epoch < *epoch && place >= (cut.generation, cut.offset)
            };
            lost_cuts.iter().any(is_void)
        })
    }

    fn slot_of(&self, batch: &Expected) -> Option<&Slot> {
        let is_it =
            |slot: &&Slot| slot.envelope.epoch == batch.epoch && slot.envelope.chain == batch.info.chain;
        self.scenario.slots.iter().find(is_it)
    }

    /// Whether the slot of a batch has a sector that is blank now and was not.
    fn looks_torn(&self, missing: &Expected) -> bool {
        let slot = self.slot_of(missing).expect("an appended batch has a slot");
        let Some(content) = self.directory.get(&slot.file) else { return false };
        let before = &self.scenario.directory[&slot.file];
        (slot.offset..slot.offset + slot.bytes).step_by(SECTOR_BYTES).any(|at| {
            let blank = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
            content.get(at..at + SECTOR_BYTES).is_none_or(blank) && !blank(&before[at..at + SECTOR_BYTES])
        })
    }
}

thread_local! {
    static SCENARIOS: &'static [Scenario] = Box::leak(scenarios().into_boxed_slice());
}

fn tampered(tampering: &Tampering) -> Outcome {
    let scenarios = SCENARIOS.with(|scenarios| *scenarios);
    let scenario = &scenarios[usize::from(tampering.scenario) % scenarios.len()];
    let mut altered = Altered::new(scenario);
    altered.apply(&tampering.first);
    for alteration in [&tampering.second, &tampering.third].into_iter().flatten() {
        altered.apply(alteration);
    }
    let files = altered.directory.clone();
    let largest_file = files.values().map(Vec::len).max().unwrap_or(0);
    let (started, memory) = allocated(|| start(files, altered.unreadable.clone()));
    // Reads are done in pieces of 1 MiB at most; a segment is held in memory once.
    let bound = largest_file.max(140 * 1024).max(1 << 20) + BLOCK_BYTES;
    assert!(memory.largest <= bound, "{} bytes were asked for at once", memory.largest);
    match started {
        Start::Stopped(error, after) => {
            stopped(&altered, &error, after);
            name_of(&error)
        }
        Start::Opened(mut node, recovered) => {
            let known = node.known();
            let read = node.read_all();
            assert_eq!(recovered.claim, known.claim, "the claim is saved before the log opens");
            for batch in &read {
                let expected = scenario.log.iter().find(|expected| expected.info == batch.info);
                let expected = expected.expect("what is handed out was appended and not cut off");
                assert!(batch.image() == expected.image, "{} is what was appended", batch.info.first);
            }
            let listed = known.damaged.len() + usize::from(known.claim.is_some());
            assert!(listed == 0 || !recovered.report.damage.is_empty(), "damage is reported");
            // What an envelope with a good checksum says is believed, so a forged one may give a batch a wrong identity.
            if !altered.forged {
                not_in_silence(&altered, &known);
            }
            let shorter = known.batches.len() < scenario.log.len();
            let outcome = outcome_of(&recovered, &known, shorter);
            opened_again(node.kill(), &altered, &known);
            outcome
        }
    }
}

fn outcome_of(recovered: &Recovered, known: &Known, shorter: bool) -> Outcome {
    match (known.claim, recovered.report.damage.first()) {
        (Some(claim), _) if claim.certain => "opened-claim-certain".to_owned(),
        (Some(_), Some(damage)) => format!("opened-claim-{:?}", damage.cause).to_lowercase(),
        (None, Some(damage)) => format!("opened-damaged-{:?}", damage.cause).to_lowercase(),
        _ if shorter => "opened-shorter".to_owned(),
        _ => "opened-whole".to_owned(),
    }
}

fn stopped(altered: &Altered<'_>, error: &WalError, after: Directory) {
    assert!(!matches!(error, WalError::Protocol { .. } | WalError::Config(_)), "{error}");
    match start(after, altered.unreadable.clone()) {
        Start::Stopped(again, _) => assert_eq!(again, *error, "the next start says the same"),
        Start::Opened(..) => panic!("a start that stopped with {error} mended something"),
    }
}

/// Every batch that was appended is in the log, or listed as damaged, or covered by a claim, or was torn as far as anyone can tell.
fn not_in_silence(altered: &Altered<'_>, known: &Known) {
    let log = &altered.scenario.log;
    assert!(known.batches.len() <= log.len(), "nothing comes back that was cut off");
    let (held, missing) = log.split_at(known.batches.len());
    for (info, Expected { info: expected, .. }) in known.batches.iter().zip(held) {
        // Of a damaged batch, the envelope may be all that is known.
        let same = (info.term, info.first, info.last, info.chain, info.image_bytes);
        assert_eq!(
            same,
            (expected.term, expected.first, expected.last, expected.chain, expected.image_bytes)
        );
    }
    for expected in held {
        let first = expected.info.first;
        let flagged = known.damaged.contains(&first);
        if flagged {
            assert!(
                !altered.has(expected) || altered.has_a_damaged_void_copy(expected),
                "the batch at {first} is intact and listed as damaged"
            );
        } else {
            assert!(
                altered.has_somewhere(expected),
                "the batch at {first} is damaged and not listed as such"
            );
        }
    }
    let Some(first_missing) = missing.first() else { return };
    let Some(claim) = known.claim else {
        let first = first_missing.info.first;
        assert!(altered.looks_torn(first_missing), "the batch at {first} is gone and was not torn");
        assert!(!altered.vouched(first_missing), "the batch at {first} is gone and was known to be durable");
        return;
    };
    // A certain claim names an end that is torn as far as anyone can tell.
    let covers = |info: &BatchInfo| !claim.certain || (claim.term, claim.last) >= (info.term, info.last);
    let beyond = missing.iter().position(|expected| !covers(&expected.info)).unwrap_or(missing.len());
    let (covered, torn) = missing.split_at(beyond);
    if let Some(batch) = torn.first() {
        let first = batch.info.first;
        assert!(
            altered.looks_torn(batch),
            "{claim:?} does not cover the batch at {first}, which was not torn"
        );
        assert!(!altered.vouched(batch), "{claim:?} does not cover the batch at {first}, which was durable");
    }
    for expected in covered.iter().filter(|expected| altered.has(expected)) {
        assert!(known.salvage.contains(&expected.info), "{} is intact and lost", expected.info.first);
    }
}

/// Another start finds the same, and the log can be appended to. What a free segment holds is looked at only once it is in service, so one
/// that was altered is told by the next start, as damage behind the end of the log.
fn opened_again(directory: Directory, altered: &Altered<'_>, known: &Known) {
    let found = |directory| match start(directory, altered.unreadable.clone()) {
        Start::Opened(node, _) => *node,
        Start::Stopped(error, _) => panic!("a log that opened does not open again: {error}"),
    };
    let same = |again: &Known| {
        if altered.free_segment_is_dirty() {
            assert!(again.batches.starts_with(&known.batches), "the next start finds the same log");
            assert!(again.claim.is_some() || known.claim.is_none(), "a claim is not forgotten");
        } else {
            assert_eq!(again.batches, known.batches, "the next start finds the same log");
            assert_eq!(again.damaged, known.damaged, "the next start finds the same damage");
            assert!(same_claim(again.claim, known.claim), "{:?} and {:?}", known.claim, again.claim);
            let more = again.salvage.iter().filter(|info| !known.salvage.contains(info));
            let same = known.salvage.iter().all(|info| again.salvage.contains(info))
                && more.into_iter().all(|info| altered.made_void_by_a_lost_cut(info));
            // A forged checksum passes for what no device leaves behind.
            assert!(altered.forged || same, "the next start finds the same salvage");
        }
    };
    let mut node = found(directory);
    same(&node.known());
    let appended: Vec<_> = (0..3).map(|_| node.append(2, 100).info).collect();
    let mut again = found(node.kill()).known();
    let kept = again.batches.len().min(known.batches.len());
    let more = again.batches.split_off(kept);
    // What was appended may stand where the salvage did.
    again.salvage.clone_from(&known.salvage);
    same(&again);
    assert!(more == appended || altered.free_segment_is_dirty(), "what was appended is found");
}

/// A certain claim stays what it is. One that is not covers everything; what it names may only grow.
fn same_claim(again: Option<Claim>, known: Option<Claim>) -> bool {
    let uncertain = |claim: &Claim| !claim.certain;
    match (again.filter(uncertain), known.filter(uncertain)) {
        (Some(again), Some(known)) => again.term >= known.term && again.last >= known.last,
        _ => again == known,
    }
}

fn name_of(error: &WalError) -> Outcome {
    let debug = format!("{error:?}").to_lowercase();
    debug.chars().take_while(char::is_ascii_alphanumeric).collect()
}

#[test]
fn an_untouched_directory_has_its_whole_log() {
    for scenario in scenarios() {
        let Start::Opened(mut node, recovered) = start(scenario.directory, Unreadable::new()) else {
            panic!("the log opens");
        };
        let Recovered { report, claim, .. } = *recovered;
        assert_eq!((report.damage, report.torn_bytes, claim), (Vec::new(), 0, None));
        let read = node.read_all();
        assert_eq!(read.len(), scenario.log.len());
        assert!(read.iter().zip(&scenario.log).all(|(batch, expected)| batch.image() == expected.image));
    }
}

/// Inputs of the sweep. They reach every outcome.
const INPUTS: u64 = 4000;

/// How a start can end after tampering, but for what only a real device reports.
const OUTCOMES: [&str; 13] = [
    "hardstatebehind",
    "hardstatelost",
    "opened-claim-certain",
    "opened-claim-enveloperotten",
    "opened-claim-imagerotten",
    "opened-claim-lost",
    "opened-claim-misplaced",
    "opened-claim-segmentheader",
    "opened-claim-segmentmissing",
    "opened-damaged-imagerotten",
    "opened-damaged-lost",
    "opened-shorter",
    "opened-whole",
];

/// All of the sweep, or those that SCAN_INPUT (and SCAN_INPUTS, how many) name.
fn inputs() -> Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let Some(first) = number("SCAN_INPUT") else { return 0..INPUTS };
    first..first + number("SCAN_INPUTS").unwrap_or(1)
}

#[test]
fn recovery_of_a_mutated_directory() {
    let target = "scan__recovery_of_a_mutated_directory";
    bolero::check!().with_iterations(0).with_type::<Tampering>().for_each(|tampering: &Tampering| {
        tampered(tampering);
    });
    // The first input of each outcome is a part of the corpus.
    let mut found = BTreeMap::new();
    let mut failed = Vec::new();
    for number in inputs() {
        match std::panic::catch_unwind(|| sweep_one(number, tampered)) {
            Ok(Some(outcome)) => _ = found.entry(outcome).or_insert(number),
            Ok(None) => {}
            Err(_) => failed.push(number),
        }
    }
    assert!(
        failed.is_empty(),
        "{} inputs break the contract: {failed:?}; SCAN_INPUT=n replays one",
        failed.len()
    );
    if inputs() != (0..INPUTS) {
        return;
    }
    let reached: Vec<_> = found.keys().map(String::as_str).collect();
    assert_eq!(reached, OUTCOMES, "the inputs reach every outcome");
    let files: Vec<_> = found.into_iter().map(|(outcome, number)| (outcome, input(number))).collect();
    corpus(target, &files);
}
