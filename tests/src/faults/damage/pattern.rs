//! What is on a stored disk, and random damage to it that the contract says must be healed.
//!
//! The contract's bounds, which [`judge`] checks against the damaged disks themselves:
//!
//! - every committed batch keeps one copy that is intact and can be told to be: its sectors, its envelope, its segment's header;
//! - a copy that is lost in a way that looks like a write that never happened (sectors that read as zeros, or as the segment's
//!   former life left them) is one that something else on that disk proves to have been durable: the hard state, a later cut,
//!   a later envelope of its epoch;
//! - one copy of the hard state is intact on every disk, and no older than the newest.

use crate::sim::disk::{DiskState, Rot};
use crate::sim::rng::Rng;
use ringraft_block::{BLOCK_BYTES, SECTOR_BYTES};
use ringraft_wal::format::{
    ENVELOPE_BYTES, HardState, PriorContent, SegmentHeader, SegmentOrigin, content_checksum, parse_image,
    prior_checksum_at, read_envelope, read_hard_state, read_segment_header, slots_start,
};
use std::collections::BTreeMap;
use std::rc::Rc;

/// A batch's place on a disk.
#[derive(Clone, Debug)]
pub struct Slot {
    /// The file.
    pub file: String,
    /// Where in it.
    pub offset: u64,
    /// How long.
    pub bytes: usize,
    /// The batch's last index.
    pub last: u64,
    /// Its identity.
    pub chain: [u8; 16],
    generation: u32,
    epoch: u64,
    durable_through: u64,
    /// Its image is intact, too.
    intact: bool,
}

/// What the files of a disk hold.
pub type Files = BTreeMap<String, Vec<u8>>;

/// The log and the hard state of a disk.
#[must_use]
pub fn files_of(disk: &DiskState) -> Files {
    let names = disk.listing().into_iter().map(|entry| entry.name);
    let kept = names.filter(|name| name.starts_with("hard") || name.ends_with(".wal"));
    kept.filter_map(|name| disk.content(&name).map(|content| (name, content))).collect()
}

/// What is on a disk.
#[derive(Clone, Default)]
pub struct Survey {
    files: Files,
    /// What was there at some moments before.
    earlier: Vec<Files>,
    /// Valid envelopes that belong to their place, in segments whose header is intact, in the order of the log.
    pub slots: Vec<Slot>,
    headers: Vec<SegmentHeader>,
    hard_states: Vec<HardState>,
}

impl Survey {
    /// Looks at a disk.
    #[must_use]
    pub fn of(disk: &DiskState) -> Self {
        let mut survey = Self::default();
        for entry in disk.listing() {
            let content = disk.content(&entry.name).unwrap_or_default();
            survey.take(disk, &entry.name, &content);
            survey.files.insert(entry.name, content);
        }
        survey.slots.sort_by_key(|slot| (slot.generation, slot.offset));
        survey
    }

    /// The same, with what the files held at some moments before.
    #[must_use]
    pub fn with_earlier(self, earlier: Vec<Files>) -> Self {
        Self { earlier, ..self }
    }

    fn take(&mut self, disk: &DiskState, name: &str, content: &[u8]) {
        if name == "hard-a" || name == "hard-b" {
            if disk.can_read(name, 0, content.len())
                && let Ok(state) = read_hard_state(content)
            {
                self.hard_states.push(state);
            }
            return;
        }
        if !name.ends_with(".wal") || !disk.can_read(name, 0, BLOCK_BYTES) {
            return;
        }
        let Ok(header) = read_segment_header(content) else { return };
        if self.hard_states.iter().all(|state| state.node != header.node) {
            return;
        }
        self.headers.push(header);
        for at in (slots_start(header.segment_bytes) as usize..content.len()).step_by(BLOCK_BYTES) {
            if !disk.can_read(name, at as u64, BLOCK_BYTES) {
                continue;
            }
            let Ok(envelope) = read_envelope(&content[at..]) else { continue };
            let belongs = envelope.nonce == header.nonce
                && envelope.generation == header.generation
                && envelope.epoch == header.epoch
                && envelope.offset == at as u64;
            let end = at + ENVELOPE_BYTES + envelope.image_bytes as usize;
            if !belongs || end > content.len() {
                continue;
            }
            let bytes = (end - at).next_multiple_of(BLOCK_BYTES);
            let image = parse_image(&content[at + ENVELOPE_BYTES..end]);
            self.slots.push(Slot {
                file: name.to_owned(),
                offset: at as u64,
                bytes,
                last: envelope.last.get(),
                chain: envelope.chain.0,
                generation: header.generation,
                epoch: header.epoch,
                durable_through: envelope.durable_through.get(),
                intact: disk.can_read(name, at as u64, bytes)
                    && image.is_ok_and(|view| view.info().chain == envelope.chain),
            });
        }
    }

    /// Whether it lacks nothing that was readable in `before`.
    #[must_use]
    pub fn is_whole(&self, before: &Self) -> bool {
        let intact = |survey: &Self| survey.slots.iter().filter(|slot| slot.intact).count();
        intact(self) == intact(before)
            && self.headers.len() == before.headers.len()
            && self.hard_states.len() == before.hard_states.len()
    }

    /// Whether it has an intact copy of the batch with this chain at its end.
    #[must_use]
    pub fn holds(&self, chain: &[u8; 16]) -> bool {
        self.slots.iter().any(|slot| slot.intact && slot.chain == *chain)
    }

    /// How new its term and vote are.
    fn newest_hard_state(&self) -> Option<u64> {
        self.hard_states.iter().map(|state| state.sequence).max()
    }

    /// Whether a sector of a slot, read as `found`, looks as if this life of its segment had never written it.
    fn is_prior(&self, slot: &Slot, offset: u64, found: &[u8]) -> bool {
        let header = self.headers.iter().find(|header| header.generation == slot.generation);
        match header.map(|header| header.prior_content) {
            Some(PriorContent::Checksums) => {
                let at = prior_checksum_at(offset) as usize;
                let stored = self.files.get(&slot.file).and_then(|file| file[at..].first_chunk());
                stored.is_some_and(|stored| u32::from_le_bytes(*stored) == content_checksum(found))
            }
            Some(PriorContent::Zeros) | None => found.iter().all(|byte| *byte == 0),
        }
    }

    /// How far something on this disk proves that `slot` and all before it were durable.
    fn proven(&self, slot: &Slot) -> u64 {
        let hard = self.hard_states.iter().max_by_key(|state| state.sequence);
        let hard = hard.map_or(0, |state| state.witness.max(state.cut.index).get());
        let cuts = self.headers.iter().filter(|header| header.epoch > slot.epoch).map(|header| match header
            .origin
        {
            SegmentOrigin::Cut { cut, .. } => cut.index.get(),
            SegmentOrigin::Rollover { .. } => 0,
        });
        let behind = |other: &&Slot| {
            other.epoch == slot.epoch && (other.generation, other.offset) > (slot.generation, slot.offset)
        };
        let later = self.slots.iter().filter(behind).map(|other| other.durable_through);
        cuts.chain(later).fold(hard, u64::max)
    }
}

impl Survey {
    /// Whether after `places` this disk may have held a batch behind the committed ones, as far as it can tell: it lost one that it
    /// had, or its last, or something lies where the next one would; or it cannot tell where a damaged log ended, since the
    /// newest epoch has left no segment.
    ///
    /// That last one: a start records its cut and goes on in a new segment, and this machine died in between. The same
    /// disk, to the bit, is left by one that lived on, acknowledged a batch in the new segment, and lost that file with its name.
    /// While nothing else is wrong the log takes it for the former, since otherwise every such start would end in doubt; that
    /// is the residual of its contract. Where it is damaged elsewhere, so that it was cut before what the newest cut kept, it has no
    /// reason to trust in the names of its files more than in their bytes, and says that its end is not certain (the log's own test:
    /// `a_claim_is_not_certain_when_more_was_vouched_for_or_the_newest_epoch_left_no_segment`). A log that is not cut, since
    /// every envelope is there, is in no such doubt.
    #[must_use]
    pub fn end_in_doubt(&self, after: &Self, places: &[&Place], committed: &[(u64, [u8; 16])]) -> bool {
        let is_committed = |slot: &Slot| committed.iter().any(|(_, chain)| *chain == slot.chain);
        let Some(last) = self.slots.iter().rev().find(|slot| slot.intact && is_committed(slot)) else {
            return true;
        };
        let lost = |slot: &Slot| !after.holds(&slot.chain);
        if lost(last) || self.slots.iter().any(|slot| slot.intact && !is_committed(slot) && lost(slot)) {
            return true;
        }
        let is_cut = || {
            let is_there = |slot: &Slot| after.slots.iter().any(|other| other.chain == slot.chain);
            self.slots.iter().any(|slot| !is_there(slot))
        };
        let epoch = after.hard_states.iter().map(|state| state.epoch).max();
        if epoch > after.headers.iter().map(|header| header.epoch).max() && is_cut() {
            return true;
        }
        let (end, newest) = (last.offset + last.bytes as u64, last.file.as_str());
        let generation_of = |file: &str| {
            let slot = self.slots.iter().find(|slot| slot.file == file);
            slot.map_or(u32::MAX, |slot| slot.generation)
        };
        places.iter().any(|place| {
            let behind = place.file == newest && place.offset + place.bytes as u64 > end;
            let header = place.file.starts_with("segment-") && place.offset < BLOCK_BYTES as u64;
            behind || header || place.file != newest && generation_of(&place.file) > last.generation
        })
    }
}

/// One piece of damage.
#[derive(Clone, Debug)]
pub struct Place {
    /// The machine.
    pub node: usize,
    /// The file.
    pub file: String,
    /// Where in it.
    pub offset: u64,
    /// How long.
    pub bytes: usize,
    /// What happens there.
    pub rot: Rot,
}

impl Place {
    /// One line for a report.
    #[must_use]
    pub fn describe(&self) -> String {
        let Self { node, file, offset, bytes, .. } = self;
        let rot = match &self.rot {
            Rot::Content(_) => "misdirected or reverted".to_owned(),
            rot => format!("{rot:?}"),
        };
        format!("node {node} {file} {offset}+{bytes}: {rot}")
    }
}

/// Draws damage of one disk: `count` places.
pub fn draw(rng: &mut Rng, node: usize, surveys: &[Rc<Survey>], count: usize) -> Vec<Place> {
    (0..count).filter_map(|_| draw_place(rng, node, surveys)).collect()
}

fn draw_place(rng: &mut Rng, node: usize, surveys: &[Rc<Survey>]) -> Option<Place> {
    let survey = &surveys[node];
    let slots = &survey.slots;
    let sector = SECTOR_BYTES as u64;
    let some_slot = |rng: &mut Rng| (!slots.is_empty()).then(|| &slots[rng.index(slots.len())]);
    let (file, offset, bytes) = match rng.below(100) {
        // One of the last batches.
        0..25 => {
            let last = slots.len().checked_sub(1 + rng.index(3.min(slots.len().max(1))))?;
            within(rng, &slots[last])
        }
        // An envelope.
        25..45 => {
            let slot = some_slot(rng)?;
            (slot.file.clone(), slot.offset + rng.below(128), 1)
        }
        // A whole slot.
        45..55 => {
            let slot = some_slot(rng)?;
            (slot.file.clone(), slot.offset, slot.bytes)
        }
        // Anywhere in the log.
        55..85 => {
            let slot = some_slot(rng)?;
            within(rng, slot)
        }
        // The header of a segment, the blank ones included.
        85..91 => {
            let names: Vec<_> = survey.files.keys().filter(|name| name.starts_with("segment-")).collect();
            (names.get(rng.index(names.len().max(1)))?.to_string(), rng.below(512), 1)
        }
        // Between the last slot and the end of its file, or the table of prior checksums.
        91..95 => {
            let slot = slots.last()?;
            let at = rng.below(survey.files[&slot.file].len() as u64 / sector) * sector;
            (slot.file.clone(), at, SECTOR_BYTES)
        }
        _ => (["hard-a", "hard-b"][rng.index(2)].to_owned(), rng.below(256), 1),
    };
    let size = survey.files.get(&file).map(|content| content.len() as u64).filter(|size| *size > 0)?;
    // From one byte to some blocks, sectors or blocks whole.
    let start = offset - offset % sector;
    let sectors = |rng: &mut Rng, at: u64| {
        let most = ((size - at) / sector).min(16);
        (rng.between(1, most.max(1)) as usize) * SECTOR_BYTES
    };
    let whole = bytes >= BLOCK_BYTES;
    let (offset, bytes, rot) = match rng.below(7) {
        0 => (offset, 1, Rot::Flip(rng.below(8) as u8)),
        1 => (
            offset,
            if whole { bytes } else { sectors(rng, start).min((size - offset) as usize) },
            Rot::Garbage(rng.bits()),
        ),
        2 => (start, if whole { bytes } else { sectors(rng, start) }, Rot::Unreadable),
        3 => (start, if whole { bytes } else { sectors(rng, start) }, Rot::Zero),
        // What was there at an earlier moment: writes that were lost though they were told to be durable.
        6 => {
            let files = survey.earlier.get(rng.index(survey.earlier.len().max(1)))?;
            let bytes = if whole { bytes } else { sectors(rng, start) };
            let range = start as usize..start as usize + bytes;
            (start, bytes, Rot::Content(files.get(&file)?.get(range)?.to_vec()))
        }
        // A misdirected write: what belongs to another place of this disk, by blocks.
        4 => {
            let from = some_slot(rng)?;
            let bytes = from.bytes.min(BLOCK_BYTES << rng.below(2));
            let content =
                survey.files[&from.file][from.offset as usize..from.offset as usize + bytes].to_vec();
            let at = offset - offset % BLOCK_BYTES as u64;
            (at, bytes.min((size - at) as usize), Rot::Content(content))
        }
        // A disk of another node was restored here, in part: the same place of the file with the same name.
        _ if file.starts_with("hard") => return None,
        _ => {
            let other = &surveys[rng.index(surveys.len())];
            let at = (offset - offset % BLOCK_BYTES as u64) as usize;
            let content = other.files.get(&file)?.get(at..at + BLOCK_BYTES)?.to_vec();
            (at as u64, BLOCK_BYTES, Rot::Content(content))
        }
    };
    Some(Place { node, file, offset, bytes, rot })
}

fn within(rng: &mut Rng, slot: &Slot) -> (String, u64, usize) {
    (slot.file.clone(), slot.offset + rng.below(slot.bytes as u64), 1)
}

/// Damage of every copy of a batch, as rot or as an unreadable sector.
pub fn draw_loss(rng: &mut Rng, surveys: &[Rc<Survey>], chain: &[u8; 16]) -> Vec<Place> {
    let mut places = Vec::new();
    // Of the envelope as well, of the image only, or either on each.
    let style = rng.below(3);
    for (node, survey) in surveys.iter().enumerate() {
        for slot in survey.slots.iter().filter(|slot| slot.chain == *chain) {
            let envelope = style == 0 || style == 2 && rng.chance(500_000);
            let offset = if envelope { slot.offset } else { slot.offset + ENVELOPE_BYTES as u64 };
            let rot = match rng.below(3) {
                0 => Rot::Flip(rng.below(8) as u8),
                1 => Rot::Garbage(rng.bits()),
                _ => Rot::Unreadable,
            };
            let bytes = if matches!(rot, Rot::Flip(_)) { 1 } else { SECTOR_BYTES };
            places.push(Place { node, file: slot.file.clone(), offset, bytes, rot });
        }
    }
    places
}

/// What of the committed batches a pattern leaves.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// One intact copy of each, and all else can be seen to be damaged.
    Bound,
    /// Of these there is none, and every loss can be seen.
    Gone(Vec<usize>),
    /// Outside the contract.
    Outside,
}

/// Judges a pattern by the disks before and after it. `committed` are the chains at the ends of the committed batches.
#[must_use]
pub fn judge(before: &[Rc<Survey>], after: &[Rc<Survey>], committed: &[(u64, [u8; 16])]) -> Verdict {
    for (before, after) in before.iter().zip(after) {
        if after.newest_hard_state() < before.newest_hard_state() {
            return Verdict::Outside;
        }
        for slot in before.slots.iter().filter(|slot| slot.intact && !after.holds(&slot.chain)) {
            if !committed.iter().any(|(_, chain)| *chain == slot.chain) || after.proven(slot) >= slot.last {
                continue;
            }
            let range = slot.offset as usize..slot.offset as usize + slot.bytes;
            let old = before.files.get(&slot.file).and_then(|file| file.get(range.clone()));
            let new = after.files.get(&slot.file).and_then(|file| file.get(range));
            let (Some(old), Some(new)) = (old, new) else { return Verdict::Outside };
            let offsets = (slot.offset..).step_by(SECTOR_BYTES);
            let mut sectors = offsets.zip(old.chunks(SECTOR_BYTES).zip(new.chunks(SECTOR_BYTES)));
            if sectors.any(|(offset, (old, new))| old != new && before.is_prior(slot, offset, new)) {
                return Verdict::Outside;
            }
        }
    }
    let gone = |(_, chain): &&(u64, [u8; 16])| !after.iter().any(|survey| survey.holds(chain));
    let gone: Vec<_> =
        committed.iter().enumerate().filter(|(_, batch)| gone(batch)).map(|(at, _)| at).collect();
    if gone.is_empty() { Verdict::Bound } else { Verdict::Gone(gone) }
}
