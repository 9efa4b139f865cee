//! Damage: what a start does about it, what it claims and keeps, and how batches are repaired.

mod placement;
mod settle;

use crate::disk::{DiskErrorKind, DiskOp};
use crate::error::DamageCause;
use crate::format::{
    BatchInfo, Chain, Claim, ENVELOPE_BYTES, HARD_STATE_FILE_BYTES, HardState, LAYOUTS, LogStart,
    read_envelope, read_hard_state, slots_start, write_hard_state,
};
use crate::testing::{Device, Fate, Harness, Rng};
use crate::tests::{four_batches, last_segment, slot_at};
use crate::{DamagedBatch, ReadError, Recovered, RepairError, WalError, WalEvent};
use ringraft_block::{AlignedBuf, BLOCK_BYTES, Block, LogIndex, SECTOR_BYTES, Term};
use std::collections::BTreeSet;

/// What a start made of a device.
#[derive(Debug, PartialEq)]
struct Outcome {
    chains: Vec<Chain>,
    damaged: Vec<DamagedBatch>,
    claim: Option<Claim>,
    salvage: Vec<BatchInfo>,
}

fn outcome(harness: &Harness) -> Outcome {
    // A start vouches for what it found, so the next one calls lost what this one called rotten.
    let without_cause = |batch| DamagedBatch { cause: DamageCause::Lost, ..batch };
    Outcome {
        chains: harness.chains(),
        damaged: harness.wal.damaged().map(without_cause).collect(),
        claim: harness.wal.hard_state().unwrap().claim,
        salvage: harness.wal.salvage().collect(),
    }
}

/// A device, and the blocks of it that cannot be read.
#[derive(Clone)]
struct Sick {
    device: Device,
    unreadable: Vec<(String, u64)>,
}

impl Sick {
    fn new(device: Device) -> Self {
        Self { device, unreadable: Vec::new() }
    }

    fn start(self) -> Harness {
        let mut harness = Harness::start(self.device);
        harness.disk.unreadable = self.unreadable;
        harness
    }

    /// Opens the log, twice; both must find the same.
    fn opens(self) -> (Harness, Recovered) {
        let unreadable = self.unreadable.clone();
        let mut harness = self.start();
        let recovered = harness.open();
        assert_eq!(recovered.claim, recovered.hard_state.claim);
        assert_eq!(recovered.hard_state.claim, harness.wal.hard_state().unwrap().claim);
        let first = outcome(&harness);
        let mut again = Self { device: harness.crash(|| false), unreadable }.start();
        again.open();
        assert_eq!(outcome(&again), first, "the next start finds the same");
        (again, recovered)
    }

    fn flip(&mut self, name: &str, at: usize) {
        self.device.corrupt(name, at, |bytes| bytes[0] ^= 0x10, 1);
    }
}

fn certain(term: u64, last: u64) -> Option<Claim> {
    Some(Claim { term: Term(term), last: LogIndex(last), certain: true })
}

#[test]
fn a_batch_with_a_rotten_image_stays_in_the_log_and_one_with_a_rotten_envelope_cuts_it() {
    for closed in [true, false] {
        let (device, slots) = four_batches(closed);
        for (ordinal, (name, at)) in slots.iter().enumerate() {
            // Envelope, image header, payload; a flipped bit, or a lost sector.
            for (sector, zeroed) in [(0, false), (1, false), (2, false), (2, true), (0, true)] {
                let mut sick = Sick::new(device.clone());
                let change = |bytes: &mut [u8]| if zeroed { bytes.fill(0) } else { bytes[100] ^= 0x10 };
                sick.device.corrupt(name, at + sector * SECTOR_BYTES, change, SECTOR_BYTES);
                let acknowledged = closed || ordinal < 3;
                let (harness, recovered) = sick.opens();
                if zeroed && !acknowledged {
                    // The residual that the contract states: the last write, lost by the device, nothing behind it.
                    assert_eq!(harness.chains().len(), ordinal);
                    assert_eq!((recovered.claim, recovered.report.damage), (None, Vec::new()));
                    continue;
                }
                let [damage] = &recovered.report.damage[..] else { panic!("{recovered:?}") };
                let first = LogIndex(ordinal as u64 * 2 + 1);
                assert_eq!((damage.first, &damage.segment, damage.offset), (first, name, *at as u64));
                // The last batch has nothing behind it that proves it complete, so what it looks like decides.
                let expected = match (acknowledged, sector) {
                    (true, _) => DamageCause::Lost,
                    (false, 0) => DamageCause::EnvelopeRotten,
                    (false, _) => DamageCause::ImageRotten,
                };
                assert_eq!(damage.cause, expected, "batch {ordinal}, sector {sector}");
                assert_eq!(damage.identity.is_some(), sector > 0);
                if sector > 0 {
                    assert_eq!(harness.chains().len(), 4, "the log goes on behind it");
                    assert_eq!(recovered.claim, None);
                    let damaged: Vec<_> = harness.wal.damaged().map(|batch| batch.info.first).collect();
                    assert_eq!(damaged, [first]);
                    assert_eq!(harness.wal.first_damaged(), Some(first));
                    continue;
                }
                assert_eq!(harness.chains().len(), ordinal, "nobody can tell what it was");
                assert_eq!(harness.wal.first_damaged(), None);
                let salvage: Vec<_> = harness.wal.salvage().map(|info| info.first.get()).collect();
                assert_eq!(salvage, (ordinal as u64 + 1..4).map(|at| at * 2 + 1).collect::<Vec<_>>());
                if ordinal < 3 {
                    assert_eq!(recovered.claim, certain(1, 8), "the batches behind it tell the end");
                } else {
                    let claim = recovered.claim.unwrap();
                    assert!(!claim.certain && claim.term == Term(1), "{claim:?}");
                    assert_eq!(claim.last, LogIndex(if closed { 8 } else { 7 }));
                }
            }
        }
    }
}

#[test]
fn an_unreadable_slot_is_as_good_as_a_rotten_one() {
    let (device, slots) = four_batches(true);
    for (ordinal, (name, at)) in slots.iter().enumerate() {
        let mut sick = Sick::new(device.clone());
        sick.unreadable.push((name.clone(), *at as u64));
        let (harness, recovered) = sick.clone().opens();
        assert_eq!(harness.chains().len(), ordinal);
        assert_eq!(recovered.claim.unwrap().certain, ordinal < 3);
        // When it can be read again, the batch is salvage, and the claim, which is certain then, stays until it is released.
        let mut well = Harness::start(harness.crash(|| false));
        well.open();
        assert_eq!(well.chains().len(), ordinal);
        assert_eq!(well.wal.hard_state().unwrap().claim, certain(1, 8));
        assert_eq!(well.wal.salvage().count(), 4 - ordinal);
    }
}

#[test]
fn a_batch_whose_slot_another_batch_was_written_over_cuts_the_log() {
    let (device, slots) = four_batches(true);
    let (from, to) = (&slots[1], &slots[2]);
    let mut sick = Sick::new(device.clone());
    let slot = device.content(&from.0)[from.1..from.1 + BLOCK_BYTES].to_vec();
    sick.device.corrupt(&to.0, to.1, |bytes| bytes.copy_from_slice(&slot), BLOCK_BYTES);
    let (harness, recovered) = sick.opens();
    assert_eq!((harness.chains().len(), recovered.claim), (2, certain(1, 8)));

    // The image alone: the envelope still tells which batch belongs here.
    let mut sick = Sick::new(device.clone());
    let image = slot[ENVELOPE_BYTES..].to_vec();
    sick.device.corrupt(&to.0, to.1 + ENVELOPE_BYTES, |bytes| bytes.copy_from_slice(&image), image.len());
    let (harness, recovered) = sick.opens();
    assert_eq!((harness.chains().len(), recovered.claim), (4, None));
    assert_eq!(harness.wal.first_damaged(), Some(LogIndex(5)));
}

#[test]
fn a_batch_that_is_intact_but_continues_another_log_cuts_the_log() {
    // One seed, so both lives have the same segment identity; only the first command differs.
    let life = |salt| {
        let mut harness = Harness::fresh();
        harness.append_durably(1, 1, 100, salt);
        harness.append_durably(1, 1, 100, 7);
        let slot = slot_at(&harness, LogIndex(2));
        (harness.crash(|| false), slot)
    };
    let (device, (name, at)) = life(1);
    let (other, other_slot) = life(2);
    assert_eq!(other_slot, (name.clone(), at));
    let foreign = other.content(&name)[at..at + BLOCK_BYTES].to_vec();
    assert_ne!(device.content(&name)[at..at + BLOCK_BYTES], foreign);
    let mut sick = Sick::new(device);
    sick.device.corrupt(&name, at, |bytes| bytes.copy_from_slice(&foreign), BLOCK_BYTES);
    let (harness, recovered) = sick.opens();
    let [damage] = &recovered.report.damage[..] else { panic!("{recovered:?}") };
    assert_eq!((damage.cause, damage.first), (DamageCause::Misplaced, LogIndex(2)));
    assert_eq!(harness.chains().len(), 1);
    assert!(recovered.claim.is_some());
}

#[test]
fn rot_in_the_first_slot_behind_a_blank_segment_end_is_damage_not_a_torn_tail() {
    let mut harness = Harness::fresh();
    let mut salt = 0;
    // Up to the batch that did not fit and opened the next segment.
    while harness.wal.stats().rollovers == 0 {
        harness.append_durably(1, 1, 6000, salt);
        salt += 1;
    }
    let last = harness.wal.last_index();
    let (name, at) = slot_at(&harness, last);
    let device = harness.crash(|| false);
    let content = device.content(&name);
    assert_eq!(at as u64, slots_start(content.len() as u64), "the first slot of its segment");
    for (sector, cause) in [(0, DamageCause::EnvelopeRotten), (1, DamageCause::ImageRotten)] {
        let mut sick = Sick::new(device.clone());
        sick.flip(&name, at + sector * SECTOR_BYTES + 60);
        let (harness, recovered) = sick.opens();
        let [damage] = &recovered.report.damage[..] else { panic!("{recovered:?}") };
        assert_eq!((damage.cause, damage.first), (cause, last));
        assert_eq!((damage.segment.as_str(), damage.offset), (name.as_str(), at as u64));
        assert_eq!(harness.wal.last_index() == last, sector == 1);
        assert_eq!(recovered.claim.map(|claim| claim.certain), (sector == 0).then_some(false));
    }
}

/// Sixty batches of one index in at least four segments, with the names of those that are written.
fn sixty_batches() -> (Device, Vec<String>) {
    let mut harness = Harness::fresh();
    for salt in 0..60 {
        harness.append_durably(1 + salt / 20, 1, 6000, salt);
    }
    let mut names = harness.disk.device.names();
    names.retain(|name| name.ends_with(".wal"));
    let written = names.iter().position(|name| *name == last_segment(&harness)).unwrap() + 1;
    assert!(written >= 4);
    names.truncate(written);
    (harness.crash(|| false), names)
}

#[test]
fn a_lost_segment_or_header_cuts_the_log_and_what_lies_behind_is_claimed_and_kept() {
    let (device, names) = sixty_batches();
    let per_segment = |name: &str| -> Vec<u64> {
        let content = device.content(name);
        let slots = (slots_start(content.len() as u64) as usize..content.len()).step_by(BLOCK_BYTES);
        slots
            .filter_map(|at| read_envelope(&content[at..]).ok())
            .map(|envelope| envelope.first.get())
            .collect()
    };
    for (ordinal, name) in names.iter().enumerate() {
        let held = per_segment(name);
        let is_last = ordinal + 1 == names.len();
        for kind in 0..5 {
            let mut sick = Sick::new(device.clone());
            match kind {
                0 => sick.device.remove(name),
                1 => sick.flip(name, 9),
                2 => sick.device.corrupt(name, 0, |bytes| bytes.fill(0), SECTOR_BYTES),
                3 => sick.device.shorten(name, 0),
                _ => sick.unreadable.push((name.clone(), 0)),
            }
            let (harness, recovered) = sick.opens();
            if kind == 0 && is_last {
                // The residual: its name is gone, and nothing later refers to it.
                assert_eq!(harness.chains().len() as u64, held[0] - 1);
                continue;
            }
            assert_eq!(harness.chains().len() as u64, held[0] - 1, "segment {ordinal}, kind {kind}");
            assert!(!recovered.report.damage.is_empty());
            let salvage: Vec<u64> = harness.wal.salvage().map(|info| info.first.get()).collect();
            let behind = held[0]..=60;
            let lost = |first: &u64| matches!(kind, 0 | 3) && held.contains(first);
            assert_eq!(salvage, behind.filter(|first| !lost(first)).collect::<Vec<_>>());
            match kind {
                // A file that cannot be placed may have held the end.
                3 => assert!(!recovered.claim.unwrap().certain),
                _ => assert_eq!(recovered.claim, certain(3, 60), "segment {ordinal}, kind {kind}"),
            }
        }
    }
}

#[test]
fn a_header_that_was_written_over_another_never_hides_what_the_log_held() {
    let (device, names) = sixty_batches();
    for from in &names {
        for to in &names {
            if from == to {
                continue;
            }
            let header = device.content(from)[..BLOCK_BYTES].to_vec();
            let mut sick = Sick::new(device.clone());
            sick.device.corrupt(to, 0, |bytes| bytes.copy_from_slice(&header), BLOCK_BYTES);
            let (harness, recovered) = sick.opens();
            assert_eq!(recovered.claim, certain(3, 60), "the envelopes tell which is which");
            assert_eq!(harness.chains().len() + harness.wal.salvage().count(), 60);
            // The other one gone, the header looks right where it is.
            let mut sick = Sick::new(device.clone());
            sick.device.corrupt(to, 0, |bytes| bytes.copy_from_slice(&header), BLOCK_BYTES);
            sick.device.remove(from);
            let (_, recovered) = sick.opens();
            let claim = recovered.claim.expect("the log is not whole");
            assert!(!claim.certain || claim.last == LogIndex(60), "{claim:?}");
        }
    }
}

#[test]
fn damage_that_a_cut_has_made_void_is_no_damage() {
    let mut harness = Harness::fresh();
    for salt in 0..6 {
        harness.append_durably(1, 1, 400, salt);
    }
    let slots: Vec<_> = (1..=6).map(|at| slot_at(&harness, LogIndex(at))).collect();
    harness.wal.truncate_after(&mut harness.disk, LogIndex(3));
    harness.settle();
    harness.append_durably(2, 1, 400, 9);
    let chains = harness.chains();
    let device = harness.crash(|| false);
    for (name, at) in &slots[3..] {
        for sector in [0, 1] {
            let mut sick = Sick::new(device.clone());
            sick.flip(name, at + sector * SECTOR_BYTES + 80);
            let (harness, recovered) = sick.opens();
            assert_eq!(harness.chains(), chains);
            assert_eq!((recovered.claim, recovered.report.damage), (None, Vec::new()));
        }
    }
    // Before the cut it counts, and what was cut off is no salvage.
    let (name, at) = &slots[1];
    let mut sick = Sick::new(device);
    sick.flip(name, *at);
    let (harness, recovered) = sick.opens();
    assert_eq!(harness.chains(), chains[..1]);
    assert_eq!(recovered.claim, certain(2, 4));
    let salvage: Vec<_> = harness.wal.salvage().map(|info| (info.first.get(), info.chain)).collect();
    assert_eq!(salvage, [(3, chains[2]), (4, chains[3])]);
}

#[test]
fn a_read_that_fails_for_want_of_memory_is_no_damage() {
    let (device, _) = sixty_batches();
    for nth in 0.. {
        let mut harness = Harness::start(device.clone());
        harness.turn();
        let mut reads = 0;
        let mut failed = false;
        while let Some((_, op)) = harness.disk.queue.front() {
            reads += usize::from(matches!(op, DiskOp::Read { .. }));
            let fails = !failed && reads == nth + 1 && matches!(op, DiskOp::Read { .. });
            failed |= fails;
            let fate = if fails { Fate::Fail(DiskErrorKind::OutOfMemory) } else { Fate::Happen };
            harness.disk.complete(0, fate);
            harness.turn();
        }
        if !failed {
            assert!(nth > 8, "both copies, and headers and content of several segments are read");
            break;
        }
        let stopped = harness.events.iter().any(|event| {
            matches!(event, WalEvent::Poisoned(WalError::Disk { error, .. })
                if error.kind == DiskErrorKind::OutOfMemory)
        });
        assert!(stopped, "read {nth}: {:?}", harness.events);
        let (harness, recovered) = Sick::new(harness.crash(|| false)).opens();
        assert_eq!((recovered.report.damage, recovered.claim), (Vec::new(), None));
        assert_eq!(harness.chains().len(), 60);
    }
}

#[test]
fn damage_and_a_lost_copy_of_the_hard_state_at_once() {
    let (device, slots) = four_batches(true);
    for copy in ["hard-a", "hard-b"] {
        let mut sick = Sick::new(device.clone());
        sick.flip(copy, 90);
        sick.flip(&slots[1].0, slots[1].1);
        let (harness, recovered) = sick.opens();
        assert!(recovered.report.hard_state_repaired);
        assert_eq!((harness.chains().len(), recovered.claim), (1, certain(1, 8)));
        // The claim survives the loss of either copy.
        let device = harness.crash(|| false);
        for copy in ["hard-a", "hard-b"] {
            let mut sick = Sick::new(device.clone());
            sick.flip(copy, 90);
            assert_eq!(sick.opens().1.claim, certain(1, 8));
        }
    }
}

#[test]
fn a_start_with_damage_that_crashes_after_any_operation_is_begun_or_finished_by_the_next() {
    let (device, names) = sixty_batches();
    let mut sick = Sick::new(device);
    let content = sick.device.content(&names[1]);
    let start = slots_start(content.len() as u64) as usize;
    sick.flip(&names[1], start + 3 * 8192);
    sick.flip(&names[2], start + 2 * 8192 + 700);
    sick.unreadable.push((names[3].clone(), start as u64));
    let (harness, _) = sick.clone().opens();
    let expected = outcome(&harness);
    assert!(expected.claim.is_some() && !expected.salvage.is_empty());
    for survives in [false, true] {
        for operations in (0..).step_by(3) {
            let mut harness = sick.clone().start();
            harness.turn();
            let finished = !(0..operations).all(|_| harness.step());
            let unreadable = sick.unreadable.clone();
            let (harness, _) = Sick { device: harness.crash(|| survives), unreadable }.opens();
            assert_eq!(outcome(&harness), expected, "after {operations} operations");
            if finished {
                assert!(operations > 60, "the start was exercised: {operations}");
                break;
            }
        }
    }
}

#[test]
fn random_damage_never_passes_for_the_log_and_nothing_intact_is_lost() {
    let seeds = std::env::var("WAL_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(150);
    let base = std::env::var("WAL_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1u64);
    let mut seen = Seen::default();
    for seed in base..base + seeds {
        let outcome = std::panic::catch_unwind(|| random_damage(seed));
        match outcome {
            Ok(more) => seen.add(&more),
            Err(panic) => {
                eprintln!("WAL_SEED={seed} WAL_SEEDS=1 replays this");
                std::panic::resume_unwind(panic);
            }
        }
    }
    if seeds >= 100 {
        let Seen { known, certain, uncertain, settled, salvaged, whole } = seen;
        let all = [known, certain, uncertain, settled, salvaged, whole];
        assert!(all.iter().all(|count| *count > 0), "{seen:?}");
    }
}

/// How often the cases came up.
#[derive(Debug, Default)]
struct Seen {
    known: usize,
    certain: usize,
    uncertain: usize,
    settled: usize,
    salvaged: usize,
    whole: usize,
}

impl Seen {
    fn add(&mut self, more: &Seen) {
        self.known += more.known;
        self.certain += more.certain;
        self.uncertain += more.uncertain;
        self.settled += more.settled;
        self.salvaged += more.salvaged;
        self.whole += more.whole;
    }
}

struct Appended {
    info: BatchInfo,
    name: String,
    at: usize,
    bytes: Vec<u8>,
}

impl Appended {
    fn is_intact(&self, sick: &Sick) -> bool {
        let end = self.at + self.bytes.len();
        let unreadable = sick.unreadable.iter().any(|(name, at)| {
            let at = *at as usize;
            *name == self.name && self.at < at + BLOCK_BYTES && at < end
        });
        let there = sick.device.names().contains(&self.name);
        !unreadable && there && sick.device.content(&self.name).get(self.at..end) == Some(&self.bytes[..])
    }
}

/// A log of several starts, the last process crashed.
struct RandomLog {
    device: Device,
    /// What it holds.
    appended: Vec<Appended>,
    /// So many of them were acknowledged.
    acknowledged: usize,
    witness: LogIndex,
    /// Some of what was appended was cut off again.
    truncated: bool,
}

/// Half of them with truncations, purges and recycled segments.
fn random_log(rng: &mut Rng) -> RandomLog {
    let mut device = Device::default();
    let (shrinks, mut truncated) = (rng.below(2) == 0, false);
    let mut term = 1;
    let lives = 1 + rng.below(3);
    for life in 0.. {
        let mut harness = Harness::start(device);
        harness.open();
        let batches = 8 + rng.below(30);
        for salt in 0..batches as u64 {
            term += u64::from(rng.below(8) == 0);
            let bytes = 8 + rng.below(3400);
            harness.append_durably(term, 1 + rng.below(2), bytes, salt);
            if rng.below(10) == 0 {
                harness.wal.save_witness(&mut harness.disk);
                harness.settle();
            }
            let ends: Vec<LogIndex> = harness.wal.batches().map(|info| info.last).collect();
            if shrinks && ends.len() > 6 && rng.below(12) == 0 {
                harness.wal.truncate_after(&mut harness.disk, ends[ends.len() - 1 - rng.below(4)]);
                harness.settle();
                truncated = true;
                term += 1;
            } else if shrinks && ends.len() > 12 && rng.below(10) == 0 {
                harness.wal.purge_through(&mut harness.disk, ends[ends.len() / 2]);
                harness.settle();
            }
        }
        if life + 1 < lives {
            device = if rng.below(2) == 0 { harness.shut_down() } else { harness.crash(|| false) };
            continue;
        }
        let acknowledged = harness.chains().len();
        let witness = harness.wal.hard_state().unwrap().witness;
        let mut infos: Vec<BatchInfo> = harness.wal.batches().collect();
        for salt in 0..rng.below(3) as u64 {
            if harness.wal.is_ready_for(8192) {
                infos.push(harness.append(term, 1, 500 + rng.below(2000), salt));
            }
        }
        let odds = rng.below(3);
        let device = harness.crash(|| odds == 0 || odds == 1 && rng.below(2) == 0);
        let mut appended = Vec::new();
        for info in infos {
            let names = device.names();
            // The same batch may have been cut off before.
            let slots = names.iter().filter(|name| name.ends_with(".wal")).flat_map(|name| {
                let content = device.content(name);
                let slots = (slots_start(content.len() as u64) as usize..content.len()).step_by(BLOCK_BYTES);
                slots.filter_map(move |at| {
                    let envelope = read_envelope(&content[at..]).ok()?;
                    (envelope.chain == info.chain).then_some((envelope.epoch, name, at))
                })
            });
            let Some((_, name, at)) = slots.max_by_key(|(epoch, ..)| *epoch) else { continue };
            let end = at + ENVELOPE_BYTES + info.image_bytes as usize;
            let bytes = device.content(name)[at..end].to_vec();
            appended.push(Appended { info, name: name.clone(), at, bytes });
        }
        return RandomLog { device, appended, acknowledged, witness, truncated };
    }
    unreachable!()
}

fn random_damage(seed: u64) -> Seen {
    let mut rng = Rng(seed);
    let RandomLog { device, appended, acknowledged, witness, truncated } = random_log(&mut rng);
    let mut sick = Sick::new(device);
    let last_segment = appended[acknowledged - 1].name.clone();
    // Nothing is wrong but that some places cannot be read, where the log ends more often than elsewhere.
    let blind = rng.below(4) == 0;
    for _ in 0..1 + rng.below(4) {
        let at_the_end = blind && rng.below(2) == 0;
        let victim = &appended[if at_the_end { acknowledged - 1 } else { rng.below(acknowledged) }];
        let (name, at, length) = (&victim.name, victim.at, victim.bytes.len());
        if !sick.device.names().contains(name) {
            continue;
        }
        let sector = at + rng.below(length.div_ceil(SECTOR_BYTES)) * SECTOR_BYTES;
        match if blind { 9 } else { rng.below(12) } {
            0..=2 => sick.flip(name, at + rng.below(length)),
            3 => sick.flip(name, at + rng.below(ENVELOPE_BYTES)),
            4 | 5 => {
                let seed = rng.next();
                let garbage = |bytes: &mut [u8]| {
                    let mut rng = Rng(seed);
                    bytes.iter_mut().for_each(|byte| *byte = rng.next() as u8 | 1);
                };
                sick.device.corrupt(name, sector, garbage, SECTOR_BYTES);
            }
            // What is blank was never written, unless the hard state knows better.
            6 if victim.info.last <= witness => {
                sick.device.corrupt(name, sector, |bytes| bytes.fill(0), SECTOR_BYTES);
            }
            7 if victim.info.last <= witness => {
                let bytes = length.next_multiple_of(BLOCK_BYTES);
                sick.device.corrupt(name, at, |bytes| bytes.fill(0), bytes);
            }
            8 => {
                let from = &appended[rng.below(appended.len())];
                if !sick.device.names().contains(&from.name) {
                    continue;
                }
                let block = sick.device.content(&from.name)[from.at..from.at + BLOCK_BYTES].to_vec();
                if victim.info.last > witness && block[..ENVELOPE_BYTES].iter().all(|byte| *byte == 0) {
                    // It was made blank above: a copy of it would make this one a write that never was.
                    continue;
                }
                sick.device.corrupt(name, at, |bytes| bytes.copy_from_slice(&block), BLOCK_BYTES);
            }
            9 | 10 => {
                let behind = at + length.next_multiple_of(BLOCK_BYTES);
                let may_be_behind = at_the_end && behind < sick.device.content(name).len();
                let block = if may_be_behind && rng.below(2) == 0 { behind } else { sector };
                sick.unreadable.push((name.clone(), (block - block % BLOCK_BYTES) as u64));
            }
            // A cut that is lost with its segment may let what it made void stand: the contract's residual.
            11 if *name != last_segment && !truncated => match rng.below(3) {
                0 => sick.device.remove(name),
                1 => sick.flip(name, rng.below(SECTOR_BYTES)),
                _ => sick.device.corrupt(name, 0, |bytes| bytes.fill(0), SECTOR_BYTES),
            },
            _ => {}
        }
    }

    // Some starts are interrupted; the next one finds the same.
    let (mut harness, recovered) = sick.clone().opens();
    let expected = outcome(&harness);
    let mut interrupted = sick.clone().start();
    interrupted.turn();
    for _ in 0..rng.below(140) {
        interrupted.step();
    }
    let odds = rng.below(3);
    let survived = interrupted.crash(|| odds == 0 || odds == 1 && rng.below(2) == 0);
    let (after, _) = Sick { device: survived, unreadable: sick.unreadable.clone() }.opens();
    assert_eq!(outcome(&after), expected, "an interrupted start changes nothing");

    let Outcome { chains, damaged, claim, salvage } = expected;
    assert!(chains.len() <= appended.len());
    assert!(chains.iter().zip(&appended).all(|(found, batch)| *found == batch.info.chain), "no wrong batch");
    let end = harness.wal.last_index();
    for (ordinal, batch) in appended.iter().enumerate() {
        let info = batch.info;
        let flagged = damaged.iter().any(|damaged| damaged.info.chain == info.chain);
        let intact = batch.is_intact(&sick);
        let held = info.last <= end;
        if flagged {
            assert!(held && !intact, "{info:?}");
        }
        if ordinal >= acknowledged {
            continue;
        }
        if intact {
            let kept = held || salvage.iter().any(|salvaged| salvaged.chain == info.chain);
            assert!(kept, "no intact batch is lost: {info:?} {recovered:?}");
        }
        if held {
            assert_eq!(flagged, !intact, "{info:?} {recovered:?}");
        } else {
            let claim = claim.unwrap_or_else(|| panic!("{info:?} was acknowledged: {recovered:?}"));
            let covers = !claim.certain || (claim.term, claim.last) >= (info.term, info.last);
            assert!(covers, "{claim:?} is too low for {info:?}: {recovered:?}");
        }
    }
    // The read errors pass.
    let well = Sick::new(after.crash(|| false));
    let found = outcome(&well.clone().opens().0);
    assert!(found.chains == chains, "a claim that is settled leaves the log as it is");
    for (ordinal, batch) in appended[..acknowledged].iter().enumerate().skip(chains.len()) {
        let info = batch.info;
        let claim =
            found.claim.unwrap_or_else(|| panic!("{info:?} was acknowledged: {claim:?} {recovered:?}"));
        let covers = !claim.certain || (claim.term, claim.last) >= (info.term, info.last);
        assert!(covers, "{ordinal}: {claim:?} is settled too low for {info:?}: {recovered:?}");
        let salvaged = found.salvage.iter().any(|salvaged| salvaged.chain == info.chain);
        assert!(salvaged || !batch.is_intact(&well), "no intact batch is lost: {info:?} {recovered:?}");
    }
    let was_uncertain = claim.is_some_and(|claim| !claim.certain);
    let settled = usize::from(was_uncertain && found.claim.is_none_or(|claim| claim.certain));
    // What is read back is what was appended, and what is damaged says so.
    for batch in &appended[..chains.len()] {
        harness.wal.read(&mut harness.disk, 1, batch.info.first, 1);
        harness.settle();
        let flagged = damaged.iter().any(|damaged| damaged.info.chain == batch.info.chain);
        match harness.take_read() {
            Ok(read) => {
                assert!(!flagged);
                assert_eq!(read[0].image(), &batch.bytes[ENVELOPE_BYTES..]);
            }
            Err(ReadError::Damaged { first, .. }) => assert!(flagged && first == batch.info.first),
            Err(error) => panic!("{error}"),
        }
    }
    for salvaged in &salvage {
        let batch = appended.iter().find(|batch| batch.info.chain == salvaged.chain).expect("no wrong batch");
        let before = appended.iter().find(|before| before.info.last == salvaged.first.previous());
        if before.is_none() && salvaged.first > LogIndex(1) {
            // Nothing is left of the one before, which was in flight.
            continue;
        }
        let previous = before.map_or(Chain::default(), |before| before.info.chain);
        harness.wal.read_salvage(&mut harness.disk, 2, salvaged.first, previous);
        harness.settle();
        let read = harness.take_read().unwrap_or_else(|error| panic!("{error} {salvaged:?} {recovered:?}"));
        assert_eq!(read[0].image(), &batch.bytes[ENVELOPE_BYTES..]);
        harness.wal.read_salvage(&mut harness.disk, 3, salvaged.first, Chain([9; 16]));
        harness.settle();
        assert_eq!(harness.take_read().err(), Some(ReadError::NotFound { first: salvaged.first }));
    }
    Seen {
        known: damaged.len(),
        certain: usize::from(claim.is_some_and(|claim| claim.certain)),
        uncertain: usize::from(was_uncertain),
        settled,
        salvaged: salvage.len(),
        whole: usize::from(claim.is_none() && damaged.is_empty()),
    }
}

/// The hard state on disk, changed.
fn change_hard_state(device: &mut Device, change: impl Fn(&mut HardState)) {
    for name in ["hard-a", "hard-b"] {
        let mut state = read_hard_state(device.content(name)).unwrap();
        change(&mut state);
        let mut block = vec![0; HARD_STATE_FILE_BYTES];
        write_hard_state(&mut block, &state);
        device.corrupt(name, 0, |bytes| bytes.copy_from_slice(&block), HARD_STATE_FILE_BYTES);
    }
}

#[test]
fn damage_before_the_start_of_the_log_is_no_damage() {
    let whole = Whole::new();
    let names: Vec<&String> = whole.batches.iter().map(|batch| &batch.name).collect();
    // The start lies within the second segment.
    let second = names.iter().position(|name| *name != names[0]).unwrap();
    let start = whole.batches[second + 4].info;
    let mut device = whole.device.clone();
    change_hard_state(&mut device, |state| {
        state.start = LogStart { index: start.last, term: start.term, chain: start.chain };
    });
    let expected: Vec<Chain> = whole.batches[second + 5..].iter().map(|batch| batch.info.chain).collect();
    let (harness, _) = Sick::new(device.clone()).opens();
    assert_eq!(harness.chains(), expected);
    for ordinal in 0..second + 5 {
        for offset in [0, 700] {
            let batch = &whole.batches[ordinal];
            let mut sick = Sick::new(device.clone());
            sick.flip(&batch.name, batch.at + offset);
            let (harness, recovered) = sick.opens();
            assert_eq!(harness.chains(), expected, "batch {ordinal}");
            assert_eq!((recovered.report.damage, recovered.claim), (Vec::new(), None), "batch {ordinal}");
        }
    }
    // The segments before it are gone.
    let mut sick = Sick::new(device.clone());
    sick.device.remove(names[0]);
    let (harness, recovered) = sick.opens();
    assert_eq!((harness.chains(), recovered.claim), (expected.clone(), None));
    // The first batch behind the start counts.
    let batch = &whole.batches[second + 5];
    let mut sick = Sick::new(device);
    sick.flip(&batch.name, batch.at);
    let (harness, recovered) = sick.opens();
    assert_eq!((harness.chains().len(), recovered.claim), (0, certain(3, 60)));
}

/// Sets four bytes at `at` so that the crc32c field at `crc` comes out as zero: the checksum is linear in the bits.
fn with_crc_zero(bytes: &mut [u8], at: usize, crc: usize) {
    bytes[crc..crc + 4].fill(0);
    let sum = |bytes: &[u8]| ringraft_block::crc32c(bytes);
    let wanted = sum(bytes);
    let mut basis: Vec<(u32, u32)> = Vec::new();
    for bit in 0..32 {
        bytes[at + bit / 8] ^= 1 << (bit % 8);
        let (mut effect, mut bits) = (sum(bytes) ^ wanted, 1u32 << bit);
        bytes[at + bit / 8] ^= 1 << (bit % 8);
        for (other, other_bits) in &basis {
            if effect ^ other < effect {
                (effect, bits) = (effect ^ other, bits ^ other_bits);
            }
        }
        assert_ne!(effect, 0);
        basis.push((effect, bits));
        basis.sort_by_key(|(effect, _)| std::cmp::Reverse(*effect));
    }
    let (mut rest, mut flips) = (wanted, 0);
    for (effect, bits) in &basis {
        if rest ^ effect < rest {
            (rest, flips) = (rest ^ effect, flips ^ bits);
        }
    }
    assert_eq!(rest, 0);
    for bit in 0..32 {
        bytes[at + bit / 8] ^= ((flips >> bit & 1) as u8) << (bit % 8);
    }
    assert_eq!(sum(bytes), 0);
}

#[test]
fn an_envelope_whose_checksum_is_zero_is_an_envelope_as_any_other() {
    let (device, slots) = four_batches(true);
    let (name, at) = &slots[0];
    let field = |name: &str| {
        let (_, fields) = LAYOUTS.iter().find(|(layout, _)| *layout == "envelope").unwrap();
        fields.iter().find(|field| field.name == name).unwrap().at
    };
    // Its nonce is what may vary, so it must come out as misplaced, and not as torn or rotten.
    let mut sector = device.content(name)[*at..at + ENVELOPE_BYTES].to_vec();
    with_crc_zero(&mut sector, field("nonce"), field("crc"));
    assert!(read_envelope(&sector).is_ok());
    // Blank sectors have no such luck: an envelope has a magic number.
    assert!(read_envelope(&[0; ENVELOPE_BYTES]).is_err());
    let mut sick = Sick::new(device);
    sick.device.corrupt(name, *at, |bytes| bytes.copy_from_slice(&sector), ENVELOPE_BYTES);
    let (_, recovered) = sick.opens();
    assert_eq!(recovered.claim, certain(1, 8));
}

// Repair.

/// A log in several segments, the last bytes of every batch, and where each lies.
struct Whole {
    device: Device,
    batches: Vec<Appended>,
}

impl Whole {
    fn new() -> Self {
        let (device, names) = sixty_batches();
        let mut batches = Vec::new();
        let mut harness = Harness::start(device.clone());
        harness.open();
        for info in harness.wal.batches() {
            let (name, at) = slot_at(&harness, info.first);
            let end = at + ENVELOPE_BYTES + info.image_bytes as usize;
            let bytes = device.content(&name)[at..end].to_vec();
            assert!(names.contains(&name));
            batches.push(Appended { info, name, at, bytes });
        }
        Self { device, batches }
    }

    /// The images of these batches are rotten.
    fn rotten(&self, firsts: &[u64]) -> Sick {
        let mut sick = Sick::new(self.device.clone());
        for first in firsts {
            let batch = self.batch(*first);
            sick.flip(&batch.name, batch.at + 3 * SECTOR_BYTES);
        }
        sick
    }

    fn batch(&self, first: u64) -> &Appended {
        self.batches.iter().find(|batch| batch.info.first == LogIndex(first)).unwrap()
    }

    /// The image of a batch as it comes from a peer.
    fn fetched(&self, harness: &mut Harness, first: u64) -> Block<AlignedBuf> {
        let batch = self.batch(first);
        let pool = harness.pool.clone();
        let mut block = crate::ops::take(&pool, &mut harness.disk, batch.info.slot_bytes()).unwrap();
        block[ENVELOPE_BYTES..batch.bytes.len()].copy_from_slice(&batch.bytes[ENVELOPE_BYTES..]);
        block
    }

    fn repair(&self, harness: &mut Harness, first: u64) {
        let block = self.fetched(harness, first);
        harness.wal.repair(&mut harness.disk, LogIndex(first), block).unwrap();
    }

    /// Everything that is not listed as damaged reads back as it was written.
    fn reads_back(&self, harness: &mut Harness, damaged: &[u64]) {
        let listed: Vec<u64> = harness.wal.damaged().map(|batch| batch.info.first.get()).collect();
        assert_eq!(listed, damaged);
        for batch in &self.batches {
            if batch.info.first > harness.wal.last_index() {
                break;
            }
            harness.wal.read(&mut harness.disk, 1, batch.info.first, 1);
            harness.settle();
            let read = harness.take_read();
            if damaged.contains(&batch.info.first.get()) {
                assert!(matches!(read, Err(ReadError::Damaged { .. })), "{read:?}");
            } else {
                assert_eq!(read.unwrap()[0].image(), &batch.bytes[ENVELOPE_BYTES..]);
            }
        }
    }
}

fn told(harness: &mut Harness) -> Vec<(bool, u64)> {
    let events = std::mem::take(&mut harness.events);
    let tell = |event| match event {
        WalEvent::Repaired { first, .. } => Some((true, first.get())),
        WalEvent::DamageFound(batch) => Some((false, batch.info.first.get())),
        WalEvent::Poisoned(error) => panic!("{error}"),
        _ => None,
    };
    events.into_iter().filter_map(tell).collect()
}

#[test]
fn repaired_batches_are_whole_again_in_an_ordinary_segment() {
    let whole = Whole::new();
    // Two in one segment, one in another; one whose header is intact, so that all but the bytes is known of it.
    let mut sick = whole.rotten(&[20, 22, 40]);
    let batch = whole.batch(22);
    sick.flip(&batch.name, batch.at + ENVELOPE_BYTES + 8);
    sick.unreadable.push((whole.batch(21).name.clone(), 130 * 1024 - 2048));
    sick.unreadable.clear();
    let (mut harness, _) = sick.opens();
    whole.reads_back(&mut harness, &[20, 22, 40]);
    assert_eq!(harness.wal.batch_starting_at(LogIndex(20)).unwrap(), whole.batch(20).info);
    assert_eq!(harness.wal.batch_starting_at(LogIndex(22)).unwrap().time_ms, 0, "its envelope does not say");
    told(&mut harness);
    for first in [40, 22, 20] {
        whole.repair(&mut harness, first);
        whole.repair(&mut harness, first);
    }
    harness.settle();
    let mut repaired = told(&mut harness);
    repaired.sort();
    assert_eq!(repaired, [(true, 20), (true, 22), (true, 40)]);
    assert_eq!(harness.wal.batch_starting_at(LogIndex(22)).unwrap(), whole.batch(22).info);
    assert_eq!(harness.wal.first_damaged(), None);
    whole.reads_back(&mut harness, &[]);
    assert!(harness.disk.device.names().iter().all(|name| !name.ends_with(".new")));
    for batch in &whole.batches {
        let content = harness.disk.device.content(&batch.name);
        let end = batch.at + batch.bytes.len();
        assert_eq!(content[batch.at + ENVELOPE_BYTES..end], batch.bytes[ENVELOPE_BYTES..]);
        assert!(content[end..end.next_multiple_of(BLOCK_BYTES)].iter().all(|byte| *byte == 0));
    }
    let (mut harness, recovered) = Sick::new(harness.crash(|| false)).opens();
    assert_eq!((recovered.report.damage, recovered.claim), (Vec::new(), None));
    whole.reads_back(&mut harness, &[]);
}

#[test]
fn a_repair_behind_a_purged_front_leaves_every_other_batch_as_it_was() {
    let whole = Whole::new();
    let (mut harness, _) = whole.rotten(&[40]).opens();
    assert_eq!(harness.wal.purge_through(&mut harness.disk, LogIndex(10)), LogIndex(10));
    harness.settle();
    whole.repair(&mut harness, 40);
    harness.settle();
    assert_eq!(told(&mut harness), [(true, 40)]);
    for batch in &whole.batches[10..] {
        let first = batch.info.first;
        assert_eq!(harness.wal.batch_starting_at(first).unwrap(), batch.info);
        harness.wal.read(&mut harness.disk, 1, first, 1);
        harness.settle();
        assert_eq!(harness.take_read().unwrap()[0].image(), &batch.bytes[ENVELOPE_BYTES..], "{first}");
    }
    assert_eq!(harness.wal.first_damaged(), None);
}

#[test]
fn an_image_that_is_not_the_batchs_is_refused() {
    let whole = Whole::new();
    let (mut harness, _) = whole.rotten(&[20, 22]).opens();
    let mut offer = |first: u64, of: u64, change: fn(&mut [u8])| {
        let mut block = whole.fetched(&mut harness, of);
        change(&mut block);
        harness.wal.repair(&mut harness.disk, LogIndex(first), block)
    };
    let first = LogIndex(20);
    assert_eq!(offer(20, 22, |_| ()), Err(RepairError::Other { first }));
    assert!(matches!(offer(20, 20, |block| block[2000] ^= 1), Err(RepairError::Image { .. })));
    assert_eq!(offer(21, 21, |_| ()), Err(RepairError::NotDamaged { first: LogIndex(21) }));
    assert_eq!(offer(20, 20, |block| block[..ENVELOPE_BYTES].fill(7)), Ok(()));
    harness.settle();
    assert_eq!(told(&mut harness).last(), Some(&(true, 20)));
    // What waits is bounded.
    let firsts: Vec<u64> = (2..60).collect();
    let (mut harness, _) = whole.rotten(&firsts).opens();
    let mut taken = 0;
    for first in firsts {
        let block = whole.fetched(&mut harness, first);
        match harness.wal.repair(&mut harness.disk, LogIndex(first), block) {
            Ok(()) => taken += 1,
            Err(error) => assert_eq!((error, taken > 10), (RepairError::Busy, true)),
        }
    }
    harness.settle();
    let repaired = told(&mut harness).into_iter().filter(|(repaired, _)| *repaired).count();
    assert_eq!(repaired, taken);
}

#[test]
fn a_rebuild_that_crashes_after_any_operation_loses_nothing() {
    let whole = Whole::new();
    let sick = whole.rotten(&[20, 22]);
    let mut outcomes = [0; 2];
    for survives in 0..3 {
        let mut rng = Rng(survives);
        for operations in 0.. {
            let mut harness = sick.clone().start();
            harness.open();
            whole.repair(&mut harness, 20);
            let finished = !(0..operations).all(|_| harness.step());
            let repaired = told(&mut harness).contains(&(true, 20));
            let device = harness.crash(|| survives == 1 || survives == 2 && rng.below(2) == 0);
            let (mut harness, recovered) = Sick::new(device).opens();
            assert_eq!(recovered.claim, None);
            assert_eq!(harness.chains().len(), 60);
            let still = harness.wal.damaged().any(|batch| batch.info.first == LogIndex(20));
            assert!(!(still && repaired), "what was told is durable");
            outcomes[usize::from(still)] += 1;
            whole.reads_back(&mut harness, if still { &[20, 22] } else { &[22] });
            if finished {
                assert!(repaired && operations > 8);
                break;
            }
        }
    }
    assert!(outcomes.iter().all(|count| *count > 2), "{outcomes:?}");
}

/// Lets everything happen but the `nth` operation of the rebuild, which fails.
fn fail_rebuild(harness: &mut Harness, nth: usize, kind: DiskErrorKind) -> Option<String> {
    let mut seen = 0;
    let mut failed = None;
    while let Some((id, op)) = harness.disk.queue.front() {
        let ours = id.0 >> 48 & 0xff == 9;
        let what = crate::testing::describe(op);
        let is_read = matches!(op, DiskOp::Read { .. });
        seen += usize::from(ours);
        if ours && seen == nth + 1 {
            failed = Some(what);
            if is_read && kind == DiskErrorKind::NoSpace {
                harness.disk.complete(0, Fate::Happen);
            } else {
                harness.disk.complete(0, Fate::Fail(kind));
            }
        } else {
            harness.disk.complete(0, Fate::Happen);
        }
        harness.turn();
    }
    failed
}

#[test]
fn no_space_for_a_rebuild_is_tried_again_and_any_other_failed_write_stops_the_log() {
    let whole = Whole::new();
    let sick = whole.rotten(&[20, 22]);
    for kind in [DiskErrorKind::NoSpace, DiskErrorKind::Io] {
        for nth in 0.. {
            let mut harness = sick.clone().start();
            harness.open();
            whole.repair(&mut harness, 20);
            let Some(failed) = fail_rebuild(&mut harness, nth, kind) else {
                assert!(nth > 8, "{nth}");
                break;
            };
            let survives = kind == DiskErrorKind::NoSpace
                && ["create", "write", "flush", "rename"].iter().any(|what| failed.starts_with(what))
                || failed.starts_with("read")
                || failed.starts_with("open");
            assert_eq!(harness.wal.poisoned().is_none(), survives, "{failed}: {:?}", harness.wal.poisoned());
            if survives {
                harness.wal.retry_space();
                harness.settle();
                let told = told(&mut harness);
                assert!(told.contains(&(true, 20)), "{failed}");
                whole.reads_back(&mut harness, &[22]);
                let names = harness.disk.device.names();
                assert!(names.iter().all(|name| !name.ends_with(".new")), "{failed}");
                Sick::new(harness.shut_down()).opens();
            } else {
                let (mut harness, _) = Sick::new(harness.crash(|| false)).opens();
                let still = harness.wal.damaged().any(|batch| batch.info.first == LogIndex(20));
                whole.reads_back(&mut harness, if still { &[20, 22] } else { &[22] });
            }
        }
    }
}

/// The device failed to open one segment, and no other was rebuilt before somebody asked again, and then not before that one.
#[test]
fn a_segment_that_cannot_be_opened_for_a_rebuild_is_passed_over_and_tried_again() {
    let whole = Whole::new();
    let (mut harness, _) = whole.rotten(&[2, 20, 40]).opens();
    let closed = whole.batch(2).name.clone();
    assert!([20, 40].iter().all(|first| whole.batch(*first).name != closed));
    harness.disk.unopenable.push((closed.clone(), 2));
    let opened = |harness: &Harness| {
        let opening = format!("open {closed}");
        harness.disk.trace.iter().filter(|what| **what == opening).count()
    };
    let before = opened(&harness);
    for first in [2, 20, 40] {
        whole.repair(&mut harness, first);
    }
    harness.settle();
    assert_eq!(told(&mut harness), [(true, 20), (true, 40)], "the others are rebuilt");
    assert_eq!(opened(&harness), before + 1, "it is not asked for again and again");
    for attempts in [2, 3] {
        harness.wal.retry_space();
        harness.settle();
        assert_eq!(opened(&harness), before + attempts);
    }
    assert_eq!(told(&mut harness), [(true, 2)], "it can be opened again");
    whole.reads_back(&mut harness, &[]);
    Sick::new(harness.shut_down()).opens();
}

#[test]
fn a_truncation_that_overtakes_a_rebuild_stays_a_truncation() {
    let whole = Whole::new();
    let sick = whole.rotten(&[20, 22]);
    // Before the segment; within it, before and behind the repaired batch.
    for keep in [3, 19, 21] {
        for operations in 0.. {
            let mut harness = sick.clone().start();
            harness.open();
            whole.repair(&mut harness, 20);
            let finished = !(0..operations).all(|_| harness.step());
            harness.wal.truncate_after(&mut harness.disk, LogIndex(keep));
            harness.settle();
            assert!(harness.wal.poisoned().is_none());
            assert_eq!(harness.wal.last_index(), LogIndex(keep));
            let damaged = harness.wal.first_damaged();
            assert_eq!(damaged, None, "repaired, or cut off");
            whole.reads_back(&mut harness, &[]);
            harness.append_durably(9, 1, 100, 1);
            let names = harness.disk.device.names();
            assert!(names.iter().all(|name| !name.ends_with(".new")));
            let gone = names.iter().all(|name| *name != whole.batch(20).name);
            assert_eq!(gone, keep == 3, "nothing comes back: {names:?}");
            let (harness, recovered) = Sick::new(harness.shut_down()).opens();
            assert_eq!((recovered.claim, harness.chains().len() as u64), (None, keep + 1));
            if finished {
                break;
            }
        }
    }
}

#[test]
fn a_purge_that_overtakes_a_rebuild_leaves_nothing_of_the_segment() {
    let whole = Whole::new();
    let sick = whole.rotten(&[20, 22]);
    let of_segment = |first: u64| whole.batch(first).name == whole.batch(20).name;
    let last = (20..60).rev().find(|first| of_segment(*first)).unwrap();
    // Within the segment, before and behind the repaired batch; through its end, and further.
    for through in [19, 21, last, last + 1] {
        // The disk may do first what it was asked for last.
        for (operations, backwards) in (0..).flat_map(|operations| [(operations, false), (operations, true)])
        {
            let mut harness = sick.clone().start();
            harness.open();
            whole.repair(&mut harness, 20);
            let finished = !(0..operations).all(|_| harness.step());
            assert_eq!(harness.wal.purge_through(&mut harness.disk, LogIndex(through)), LogIndex(through));
            while backwards && let Some(last) = harness.disk.queue.len().checked_sub(1) {
                harness.disk.complete(last, Fate::Happen);
                harness.turn();
            }
            harness.settle();
            assert!(harness.wal.poisoned().is_none());
            let damaged: Vec<u64> = harness.wal.damaged().map(|batch| batch.info.first.get()).collect();
            assert_eq!(damaged, if through < 22 { &[22][..] } else { &[] }, "repaired, or purged");
            let names = harness.disk.device.names();
            assert!(names.iter().all(|name| !name.ends_with(".new")), "{names:?}");
            let gone = names.iter().all(|name| *name != whole.batch(20).name);
            assert_eq!(gone, through >= last, "through {through} after {operations}: {names:?}");
            assert_eq!(harness.disk.open_files(), open_files(&whole), "no descriptor is left over");
            harness.append_durably(9, 1, 100, 1);
            let (harness, recovered) = Sick::new(harness.shut_down()).opens();
            assert_eq!((recovered.claim, harness.wal.last_index()), (None, LogIndex(61)));
            assert_eq!(harness.wal.log_start().index, LogIndex(through));
            if finished {
                break;
            }
        }
    }
}

/// How many files a log has open that nothing happens to.
fn open_files(whole: &Whole) -> usize {
    let mut harness = Harness::start(whole.device.clone());
    harness.open();
    harness.settle();
    harness.disk.open_files()
}

#[test]
fn a_segment_whose_file_is_too_short_is_rebuilt_in_its_whole_length() {
    let whole = Whole::new();
    let of_segment = |first: &u64| whole.batch(*first).name == whole.batch(20).name;
    let last = (20..60).rev().find(of_segment).unwrap();
    let batch = whole.batch(last);
    // A part of the last batch is missing with what is behind it; the file ends in the midst of a block, or of a piece.
    for missing_from in [BLOCK_BYTES, BLOCK_BYTES + SECTOR_BYTES] {
        let mut sick = whole.rotten(&[20]);
        sick.device.shorten(&batch.name, batch.at + missing_from);
        let (mut harness, recovered) = sick.opens();
        assert_eq!(recovered.claim, None);
        whole.reads_back(&mut harness, &[20, last]);
        told(&mut harness);
        // Memory that was in use before.
        let pool = harness.pool.clone();
        let dirty: Vec<_> =
            (0..3).map(|_| crate::ops::take(&pool, &mut harness.disk, 140 * 1024).unwrap()).collect();
        dirty.into_iter().for_each(|mut block| block.fill(0x55));
        for first in [20, last] {
            whole.repair(&mut harness, first);
        }
        harness.settle();
        let mut repaired = told(&mut harness);
        repaired.sort();
        assert_eq!(repaired, [(true, 20), (true, last)]);
        let content = harness.disk.device.content(&batch.name);
        assert_eq!(content.len(), whole.device.content(&batch.name).len());
        let end = (batch.at + batch.bytes.len()).next_multiple_of(BLOCK_BYTES);
        // Zeros, or what a rebuild puts where it could not read: nothing of what the memory held before.
        let harmless = |byte: &u8| [0, 0xdb].contains(byte);
        assert!(content[end..].iter().all(harmless), "nothing else comes into the log");
        whole.reads_back(&mut harness, &[]);
        let (mut harness, recovered) = Sick::new(harness.crash(|| false)).opens();
        assert_eq!((recovered.report.damage, recovered.claim), (Vec::new(), None));
        whole.reads_back(&mut harness, &[]);
    }
}

/// What lies behind the end of a log that was cut has to stay behind it.
#[test]
fn a_segment_within_which_the_log_was_cut_is_rebuilt_and_stays_cut() {
    let whole = Whole::new();
    for keep in [20, 21, 24] {
        let (mut harness, _) = whole.rotten(&[20]).opens();
        harness.wal.truncate_after(&mut harness.disk, LogIndex(keep));
        harness.settle();
        let appended = harness.append_durably(9, 1, 100, 1);
        let (mut harness, _) = Sick::new(harness.crash(|| false)).opens();
        whole.repair(&mut harness, 20);
        harness.settle();
        let (mut harness, recovered) = Sick::new(harness.crash(|| false)).opens();
        assert_eq!((recovered.report.damage, recovered.claim), (Vec::new(), None));
        assert_eq!(harness.wal.last_info(), Some(appended));
        harness.wal.truncate_after(&mut harness.disk, LogIndex(keep));
        harness.settle();
        whole.reads_back(&mut harness, &[]);
    }
}

#[test]
fn damage_found_by_a_read_is_told_once_and_the_log_rolls_over_to_repair_what_it_appends_to() {
    let mut harness = Harness::fresh();
    for salt in 0..4 {
        harness.append_durably(1, 2, 400, salt);
    }
    let (name, at) = slot_at(&harness, LogIndex(3));
    let info = harness.wal.batch_starting_at(LogIndex(3)).unwrap();
    let original = harness.disk.device.content(&name)[at..at + BLOCK_BYTES].to_vec();
    harness.disk.device.corrupt(&name, at + 700, |bytes| bytes[0] ^= 1, 1);
    for first in [1, 3, 3] {
        harness.wal.read(&mut harness.disk, 1, LogIndex(first), 1 << 20);
    }
    harness.settle();
    let reads = [(); 3].map(|()| harness.take_read());
    assert!(matches!(reads[0], Err(ReadError::Damaged { first: LogIndex(3), .. })));
    assert!(matches!(reads[2], Err(ReadError::Damaged { first: LogIndex(3), .. })));
    assert_eq!(told(&mut harness), [(false, 3)]);
    // A read ends before what is known to be damaged.
    harness.wal.read(&mut harness.disk, 1, LogIndex(1), 1 << 20);
    harness.settle();
    assert_eq!(harness.take_read().unwrap().len(), 1);
    let [damaged] = &harness.wal.damaged().collect::<Vec<_>>()[..] else { panic!() };
    assert_eq!((damaged.info, damaged.offset), (info, at as u64));
    assert_eq!(harness.wal.chain_at(LogIndex(2)), Some(damaged.previous));
    // With an append in flight on the same segment.
    harness.append(1, 1, 100, 9);
    let pool = harness.pool.clone();
    let mut block = crate::ops::take(&pool, &mut harness.disk, BLOCK_BYTES).unwrap();
    block.copy_from_slice(&original);
    harness.wal.repair(&mut harness.disk, LogIndex(3), block).unwrap();
    assert!(harness.disk.queue.iter().all(|(id, _)| id.0 >> 48 & 0xff != 9), "it waits for the append");
    harness.settle();
    assert_eq!(harness.wal.stats().rollovers, 1);
    assert_eq!(told(&mut harness), [(true, 3)]);
    harness.append_durably(1, 1, 100, 10);
    assert_eq!(harness.read_all().len(), 6);
    let chains = harness.chains();
    let (harness, recovered) = Sick::new(harness.crash(|| false)).opens();
    assert_eq!((harness.chains(), recovered.report.damage), (chains, Vec::new()));
}

#[test]
fn a_rebuild_that_meets_an_unreadable_batch_waits_for_its_repair_too() {
    let whole = Whole::new();
    let (mut harness, _) = whole.rotten(&[20]).opens();
    let other = whole.batch(22);
    harness.disk.unreadable.push((other.name.clone(), other.at as u64));
    told(&mut harness);
    whole.repair(&mut harness, 20);
    // Until both are there, the old file stays: what cannot be read now may be readable another time.
    harness.settle();
    assert_eq!(told(&mut harness), [(false, 22)]);
    assert_eq!(harness.wal.damaged().count(), 2);
    whole.repair(&mut harness, 22);
    harness.settle();
    let mut repaired = told(&mut harness);
    repaired.sort();
    assert_eq!(repaired, [(true, 20), (true, 22)]);
    harness.disk.unreadable.clear();
    whole.reads_back(&mut harness, &[]);
}

/// The start of the block of a batch's slot that holds most of its image, or of its first one.
fn block_of(batch: &Appended) -> u64 {
    (batch.at - batch.at % BLOCK_BYTES) as u64
}

#[test]
fn a_rebuild_whose_copy_is_not_what_was_read_leaves_the_intact_batches_where_they_are() {
    let whole = Whole::new();
    let other = whole.batch(22);
    // Once: the next attempt is right. For ever: nothing is replaced.
    for times in [1, usize::MAX] {
        let (mut harness, _) = whole.rotten(&[20]).opens();
        assert_eq!(other.name, whole.batch(20).name);
        told(&mut harness);
        // The start has read it already, the rebuild reads it next.
        harness.disk.misread.push((other.name.clone(), block_of(other), times));
        whole.repair(&mut harness, 20);
        harness.settle();
        let told = told(&mut harness);
        if times == 1 {
            assert_eq!(told, [(true, 20)]);
        } else {
            // As if it was rotten: nobody can read it.
            assert_eq!(told, [(false, 22)]);
            harness.disk.misread.clear();
            whole.repair(&mut harness, 22);
            harness.settle();
        }
        whole.reads_back(&mut harness, &[]);
        let (mut harness, recovered) = Sick::new(harness.crash(|| false)).opens();
        assert_eq!((recovered.report.damage, recovered.claim), (Vec::new(), None));
        whole.reads_back(&mut harness, &[]);
    }
}

#[test]
fn a_rebuild_that_reads_another_header_writes_the_right_one() {
    let whole = Whole::new();
    for unreadable in [false, true] {
        let (mut harness, _) = whole.rotten(&[20]).opens();
        told(&mut harness);
        let name = whole.batch(20).name.clone();
        if unreadable {
            harness.disk.unreadable.push((name, 0));
        } else {
            harness.disk.misread.push((name, 0, 1));
        }
        whole.repair(&mut harness, 20);
        harness.settle();
        assert_eq!(told(&mut harness), [(true, 20)]);
        harness.disk.unreadable.clear();
        let (mut harness, recovered) = Sick::new(harness.crash(|| false)).opens();
        assert_eq!((recovered.report.damage, recovered.claim), (Vec::new(), None));
        whole.reads_back(&mut harness, &[]);
    }
}

#[test]
fn the_scrubber_finds_all_damage_once_within_its_budget() {
    let whole = Whole::new();
    let mut harness = Harness::start(whole.device.clone());
    harness.open();
    for salt in 0..3 {
        harness.append_durably(9, 1, 3000, salt);
    }
    let active = slot_at(&harness, LogIndex(62));
    for (first, offset) in [(7, 0), (20, 700), (60, 3000)] {
        let batch = whole.batch(first);
        harness.disk.device.corrupt(&batch.name, batch.at + offset, |bytes| bytes[0] ^= 1, 1);
    }
    let unreadable = whole.batch(33);
    harness.disk.unreadable.push((unreadable.name.clone(), unreadable.at as u64 + 4096));
    harness.disk.device.corrupt(&active.0, active.1 + 700, |bytes| bytes[0] ^= 1, 1);
    told(&mut harness);
    let (mut found, mut granted) = (Vec::new(), 0);
    while harness.wal.scrub_status().passes == 0 {
        harness.wal.scrub_step(&mut harness.disk, 20_000);
        granted += 20_000;
        loop {
            let reads = harness.disk.queue.iter().filter(|(_, op)| matches!(op, DiskOp::Read { .. })).count();
            assert!(reads <= 2);
            if !harness.step() {
                break;
            }
        }
        let status = harness.wal.scrub_status();
        assert!(status.bytes <= granted + 8192, "{status:?} {granted}");
        found.extend(told(&mut harness));
        assert!(granted < 2_000_000, "it comes to an end: {status:?}");
    }
    assert_eq!(found, [(false, 7), (false, 20), (false, 33), (false, 60)]);
    assert_eq!(harness.wal.scrub_status().found, 4);
    assert!(harness.wal.scrub_status().bytes >= 60 * 8192);
    for _ in 0..100 {
        harness.wal.scrub_step(&mut harness.disk, 20_000);
        harness.settle();
    }
    assert!(harness.wal.scrub_status().passes >= 2);
    assert_eq!(told(&mut harness), [], "each is told once");
    let bytes = harness.wal.scrub_status().bytes;
    harness.settle();
    assert_eq!(harness.wal.scrub_status().bytes, bytes, "nothing is read without a budget");
    harness.shut_down();
}

/// Lets the scrubber read until it has completed so many more passes.
fn scrub(harness: &mut Harness, passes: u64) {
    let wanted = harness.wal.scrub_status().passes + passes;
    for _ in 0..10_000 {
        if harness.wal.scrub_status().passes >= wanted {
            return;
        }
        harness.wal.scrub_step(&mut harness.disk, 1 << 20);
        harness.settle();
    }
    panic!("the scrubber is stuck: {:?}", harness.wal.scrub_status());
}

/// The device failed to open one segment, and the scrubber asked for that one for ever: the rest of the log rotted unseen.
#[test]
fn the_scrubber_goes_on_behind_a_segment_that_cannot_be_opened_and_comes_back_to_it() {
    let whole = Whole::new();
    let mut harness = Harness::start(whole.device.clone());
    harness.open();
    let (closed, behind) = (whole.batch(1).name.clone(), whole.batch(60));
    assert_ne!(closed, behind.name);
    for first in [1, 60] {
        let batch = whole.batch(first);
        harness.disk.device.corrupt(&batch.name, batch.at + 700, |bytes| bytes[0] ^= 1, 1);
    }
    harness.disk.unopenable.push((closed, 2));
    scrub(&mut harness, 1);
    assert_eq!(told(&mut harness), [(false, 60)], "what lies behind is looked at");
    assert_eq!(harness.wal.scrub_status().segments_skipped, 1);
    scrub(&mut harness, 1);
    assert_eq!((told(&mut harness), harness.wal.scrub_status().segments_skipped), (Vec::new(), 2));
    scrub(&mut harness, 1);
    assert_eq!(told(&mut harness), [(false, 1)], "it can be opened again");
    harness.shut_down();
}

/// Nothing reads a segment's header but a start, and a start that finds it rotten has to cut the log there.
#[test]
fn the_scrubber_finds_a_rotten_header_and_has_its_segment_rebuilt() {
    let whole = Whole::new();
    for unreadable in [false, true] {
        let mut harness = Harness::start(whole.device.clone());
        harness.open();
        let name = whole.batch(33).name.clone();
        let header = harness.disk.device.content(&name)[..SECTOR_BYTES].to_vec();
        harness.disk.device.corrupt(&name, 9, |bytes| bytes[0] ^= 1, 1);
        if unreadable {
            harness.disk.unreadable.push((name.clone(), 0));
        }
        scrub(&mut harness, 1);
        harness.settle();
        assert_eq!(harness.wal.scrub_status().headers_found, 1);
        assert_eq!(harness.disk.device.content(&name)[..SECTOR_BYTES], header);
        // The device has put the new file elsewhere.
        harness.disk.unreadable.clear();
        scrub(&mut harness, 2);
        assert_eq!(harness.wal.scrub_status().headers_found, 1, "it is right again");
        assert_eq!(told(&mut harness), []);
        whole.reads_back(&mut harness, &[]);
        let mut harness = Harness::start(harness.crash(|| false));
        let recovered = harness.open();
        assert_eq!((recovered.report.damage, recovered.claim), (Vec::new(), None));
    }
}

/// A copy of the hard state that rots while the process runs was noticed by the next start only, when the other may be gone as
/// well. The rotten copy is written first: power may fail at any moment of it, and the intact one must still be there.
#[test]
fn the_scrubber_writes_a_rotten_copy_of_the_hard_state_anew_before_it_touches_the_other() {
    for (rotten, intact) in [("hard-a", "hard-b"), ("hard-b", "hard-a")] {
        let mut harness = Harness::fresh();
        harness.append_durably(3, 1, 400, 1);
        harness.settle();
        let before = harness.disk.device.content(intact).to_vec();
        harness.disk.device.corrupt(rotten, 40, |bytes| bytes[0] ^= 1, 1);
        harness.wal.scrub_step(&mut harness.disk, crate::scrub::HARD_STATE_EVERY_BYTES);
        while read_hard_state(harness.disk.device.content(rotten)).is_err() {
            assert_eq!(harness.disk.device.content(intact), before, "{rotten} first");
            assert!(harness.step(), "{rotten} is written anew");
        }
        harness.settle();
        assert_eq!(harness.wal.scrub_status().hard_states_found, 1);
        let copies = ["hard-a", "hard-b"].map(|name| read_hard_state(harness.disk.device.content(name)));
        assert_eq!(copies[0], copies[1]);
        assert_eq!(copies[0].as_ref(), Ok(harness.wal.hard_state().unwrap()));
        harness.wal.scrub_step(&mut harness.disk, crate::scrub::HARD_STATE_EVERY_BYTES);
        harness.settle();
        assert_eq!(harness.wal.scrub_status().hard_states_found, 1);
        harness.shut_down();
    }
}

/// A start was refused when the device failed to open one segment, though the others held their batches, and peers those of this one.
#[test]
fn a_segment_that_cannot_be_opened_at_a_start_is_as_good_as_one_that_cannot_be_read() {
    let (device, names) = sixty_batches();
    let open = |name: &str, times: usize| {
        let mut harness = Harness::start(device.clone());
        harness.disk.unopenable.push((name.to_owned(), times));
        let recovered = harness.open();
        (harness, recovered)
    };
    for (ordinal, name) in names.iter().enumerate() {
        // Asked again, the device does it.
        let (harness, recovered) = open(name, 1);
        assert_eq!((harness.chains().len(), recovered.report.damage), (60, Vec::new()));
        let whole = device.content(name).to_vec();
        let held: Vec<u64> = (slots_start(whole.len() as u64) as usize..whole.len())
            .step_by(BLOCK_BYTES)
            .filter_map(|at| read_envelope(&whole[at..]).ok())
            .map(|envelope| envelope.first.get())
            .collect();
        // From the beginning, or from when its header had been read.
        for times in [usize::MAX, 0] {
            let (mut harness, recovered) = if times == 0 {
                let mut harness = Harness::start(device.clone());
                let opening = format!("open {name}");
                harness.turn();
                while !harness.disk.trace.contains(&opening) {
                    assert!(harness.step());
                }
                assert!(harness.step(), "for its header");
                harness.disk.unopenable.push((name.clone(), usize::MAX));
                let recovered = harness.open();
                (harness, recovered)
            } else {
                open(name, times)
            };
            assert_eq!(harness.chains().len() as u64, held[0] - 1, "segment {ordinal}");
            assert!(!recovered.report.damage.is_empty());
            let claim = recovered.claim.expect("the log is not whole");
            assert!(claim.last >= LogIndex(held[0] - 1));
            let salvage: Vec<u64> = harness.wal.salvage().map(|info| info.first.get()).collect();
            assert_eq!(salvage, (held[0]..=60).filter(|first| !held.contains(first)).collect::<Vec<_>>());
            // The file stays: it may be opened another time.
            harness.settle();
            assert_eq!(harness.disk.device.content(name), whole);
            harness.append_durably(9, 1, 400, 1);
            harness.shut_down();
        }
    }
    // One that was never used is left alone.
    let unused = device.names().into_iter().find(|name| name.ends_with(".free"));
    if let Some(unused) = unused {
        let (harness, recovered) = open(&unused, usize::MAX);
        assert_eq!((harness.chains().len(), recovered.report.damage), (60, Vec::new()));
        assert_eq!(recovered.claim, None);
    }
}

/// What the suspects are was settled once more when an open was tried again: a segment with a rotten header was in the log and, by
/// the same file, something that could not be placed, to be removed one day.
#[test]
fn an_open_that_is_tried_again_settles_nothing_twice() {
    let (device, names) = sixty_batches();
    for times in [1, usize::MAX] {
        let mut device = device.clone();
        device.corrupt(&names[2], 20, |bytes| bytes[0] ^= 1, 1);
        let (plain, _) = Sick::new(device.clone()).opens();
        let mut harness = Harness::start(device);
        let opening = format!("open {}", names[0]);
        harness.turn();
        while !harness.disk.trace.contains(&opening) {
            assert!(harness.step());
        }
        assert!(harness.step(), "for its header");
        harness.disk.unopenable.push((names[0].clone(), times));
        harness.open();
        if times == 1 {
            assert_eq!(outcome(&harness), outcome(&plain));
        }
        harness.settle();
        let left = harness.disk.device.names();
        assert!(names.iter().all(|name| left.contains(name)), "{left:?}");
        harness.shut_down();
    }
}

#[test]
fn a_claim_and_what_is_kept_under_it_last_until_its_release_is_durable() {
    let (device, names) = sixty_batches();
    let content = device.content(&names[1]);
    let mut sick = Sick::new(device.clone());
    sick.flip(&names[1], slots_start(content.len() as u64) as usize + 2 * 8192);
    let (mut harness, _) = sick.opens();
    let expected = outcome(&harness);
    assert!(expected.claim.is_some());
    // Appends, a truncation and further starts go on under it.
    harness.append_durably(9, 1, 100, 1);
    let end = LogIndex(harness.wal.last_index().get() - 1);
    harness.wal.truncate_after(&mut harness.disk, end);
    harness.settle();
    harness.append_durably(9, 1, 100, 2);
    let chains = harness.chains();
    let (harness, recovered) = Sick::new(harness.crash(|| false)).opens();
    assert_eq!((harness.chains(), recovered.claim), (chains.clone(), expected.claim));
    assert_eq!(harness.wal.salvage().collect::<Vec<_>>(), expected.salvage, "what was kept is kept");
    // A truncation into what the salvage continued makes it void; the claim and the files stay.
    {
        let mut harness = Harness::start(harness.disk.device.clone());
        harness.open();
        let end = LogIndex(end.get() - 2);
        harness.wal.truncate_after(&mut harness.disk, end);
        harness.settle();
        assert_eq!(harness.wal.salvage().count(), 0);
        assert!(names[2..].iter().all(|name| harness.disk.device.names().contains(name)));
        for salt in 0..6 {
            harness.append_durably(9, 1, 100, salt);
        }
        let (harness, recovered) = Sick::new(harness.crash(|| false)).opens();
        assert_eq!((recovered.claim, harness.wal.salvage().count()), (expected.claim, 0));
    }
    for operations in 0.. {
        let mut released = Harness::start(harness.disk.device.clone());
        released.open();
        let sequence = released.wal.release_claim(&mut released.disk);
        assert_eq!(released.wal.salvage().count(), 0);
        let finished = !(0..operations).all(|_| released.step());
        let saved = released
            .events
            .iter()
            .any(|event| matches!(event, WalEvent::HardStateSaved { sequence: saved } if *saved >= sequence));
        let gone = names[2..].iter().filter(|name| !released.disk.device.names().contains(name)).count();
        assert!(saved || gone == 0, "nothing goes before the release is durable");
        let (after, recovered) = Sick::new(released.crash(|| true)).opens();
        assert_eq!(after.chains(), chains);
        assert!(recovered.claim.is_none() || !saved);
        assert_eq!(recovered.claim.is_some(), after.wal.salvage().count() > 0);
        if finished {
            assert!(gone == names.len() - 2 && operations > 2);
            break;
        }
    }
}

/// Nothing at all was purged under a claim. On a full disk the log could not go on, so it never reached what would have released
/// the claim, and all the while held segments that a snapshot had long covered.
#[test]
fn a_full_disk_under_a_claim_is_freed_of_what_lies_before_the_cut_so_that_the_log_goes_on() {
    let whole = Whole::new();
    let cut_at = whole.batch(50);
    let mut sick = Sick::new(whole.device.clone());
    for name in sick.device.names().into_iter().filter(|name| name.ends_with(".free")) {
        sick.device.remove(&name);
    }
    sick.flip(&cut_at.name, cut_at.at + 60);
    let used: usize = sick.device.image().values().map(Vec::len).sum();
    for anew in [false, true] {
        let (mut harness, recovered) = {
            let mut harness = sick.clone().start();
            // For one more copy of the hard state, while both are made anew; not for a segment.
            harness.disk.space = Some((used + HARD_STATE_FILE_BYTES) as u64);
            let recovered = harness.open();
            (harness, recovered)
        };
        assert_eq!((recovered.claim, harness.chains().len()), (certain(3, 60), 49));
        let salvage: Vec<BatchInfo> = harness.wal.salvage().collect();
        assert_eq!(salvage.len(), 10);
        assert!(harness.events.iter().any(|event| matches!(event, WalEvent::NoSpace { .. })));
        let (_, next) = harness.batch(9, 1, 100, 1);
        assert!(!harness.wal.is_ready_for(next.slot_bytes()), "nothing can be appended");
        // All that the log holds is covered by a snapshot, or a leader has sent one that lies far ahead.
        let end = harness.wal.log_end();
        let before =
            whole.batches.iter().rfind(|batch| batch.name != cut_at.name && batch.info.last < end.index);
        let before = before.expect("several segments").info.last;
        if anew {
            let start =
                LogStart { index: LogIndex(end.index.get() + 5), term: Term(3), chain: Chain([7; 16]) };
            harness.wal.start_anew(&mut harness.disk, start);
        } else {
            assert_eq!(harness.wal.purge_through(&mut harness.disk, end.index), before);
        }
        harness.settle();
        // What lies in the segment of the cut, or behind, is there.
        let names = harness.disk.device.names();
        for batch in &whole.batches {
            assert_eq!(names.contains(&batch.name), batch.info.last > before, "{}", batch.info.first);
        }
        assert_eq!(harness.wal.salvage().collect::<Vec<_>>(), salvage);
        assert!(harness.wal.is_ready_for(next.slot_bytes()), "there is room again");
        harness.append_durably(9, 1, 400, 1);
        let mut expected = outcome(&harness);
        let log_starts = harness.wal.log_start().index;
        // What the snapshot covers is not looked at any more.
        expected.salvage.retain(|batch| batch.first > log_starts);
        let (mut harness, recovered) = Sick::new(harness.crash(|| false)).opens();
        assert_eq!((outcome(&harness), recovered.claim), (expected, certain(3, 60)));
        // The salvage is read as ever.
        let batch = whole.batch(58);
        harness.wal.read_salvage(&mut harness.disk, 5, batch.info.first, whole.batch(57).info.chain);
        harness.settle();
        assert_eq!(harness.take_read().unwrap()[0].image(), &batch.bytes[ENVELOPE_BYTES..]);
        harness.wal.release_claim(&mut harness.disk);
        harness.settle();
        let (harness, recovered) = Sick::new(harness.crash(|| false)).opens();
        assert_eq!((recovered.claim, harness.wal.log_start().index), (None, log_starts));
    }
}

/// Where nothing was left of the log, there was no segment in which it had been cut: nothing that was appended since could be purged,
/// and nothing of what a snapshot of that covers, so a full disk kept the log from ever reaching what would release the claim.
#[test]
fn a_log_that_was_cut_at_its_very_beginning_is_purged_under_its_claim_and_keeps_what_may_follow() {
    let whole = Whole::new();
    let cut_at = whole.batch(1);
    let mut sick = Sick::new(whole.device.clone());
    sick.flip(&cut_at.name, cut_at.at + 60);
    // What comes from the leader is the log that was there, as far as that went, or another.
    for (same, appended, through) in
        [(true, 40, 20), (true, 80, 58), (true, 80, 70), (false, 40, 20), (false, 80, 70)]
    {
        let mut harness = sick.clone().start();
        let recovered = harness.open();
        assert_eq!((recovered.claim, harness.chains().len()), (certain(3, 60), 0));
        for index in 1..=appended {
            if same && index <= 60 {
                let block = whole.fetched(&mut harness, index);
                let info = whole.batch(index).info;
                harness.wal.append(&mut harness.disk, block, info);
                harness.settle();
            } else {
                harness.append_durably(9, 1, 6000, index);
            }
        }
        let salvage: Vec<BatchInfo> = harness.wal.salvage().collect();
        assert_eq!(salvage.len(), 59);
        let device = harness.crash(|| false);
        // All but what lies behind the new start, and what cannot be told from it.
        let last_of =
            |name: &String| whole.batches.iter().rfind(|batch| batch.name == *name).unwrap().info.last.get();
        let newest = &whole.batches.last().unwrap().name;
        for operations in 0.. {
            let mut harness = Harness::start(device.clone());
            harness.open();
            let (chains, segments) = (harness.chains(), harness.wal.stats().segments);
            let reached = harness.wal.purge_through(&mut harness.disk, LogIndex(through));
            assert_eq!(reached, LogIndex(through));
            let finished = !(0..operations).all(|_| harness.step());
            if finished {
                let names = harness.disk.device.names();
                for batch in &whole.batches {
                    let stays = last_of(&batch.name) > through || batch.name == *newest;
                    assert_eq!(names.contains(&batch.name), stays, "{through}: {}", batch.info.first);
                }
                let gone: BTreeSet<&String> = whole
                    .batches
                    .iter()
                    .map(|batch| &batch.name)
                    .filter(|name| !names.contains(name))
                    .collect();
                // Of what was appended since, a segment at least.
                let left = harness.wal.stats().segments;
                assert!(left + gone.len() < segments, "{through}: {left} of {segments}, {gone:?}");
                assert_eq!(harness.wal.salvage().collect::<Vec<_>>(), salvage);
            }
            let (mut harness, recovered) = Sick::new(harness.crash(|| true)).opens();
            let start = harness.wal.log_start().index;
            assert!(start == LogIndex(through) || !finished && start == LogIndex(0), "{start}");
            assert_eq!(harness.chains(), chains[start.get() as usize..]);
            assert_eq!((recovered.claim, recovered.report.damage), (certain(3, 60), Vec::new()));
            let expected: Vec<_> = salvage.iter().filter(|batch| batch.first > start).copied().collect();
            assert_eq!(harness.wal.salvage().collect::<Vec<_>>(), expected);
            if finished {
                if through < 58 {
                    let batch = whole.batch(59);
                    let previous = whole.batch(58).info.chain;
                    harness.wal.read_salvage(&mut harness.disk, 5, batch.info.first, previous);
                    harness.settle();
                    assert_eq!(harness.take_read().unwrap()[0].image(), &batch.bytes[ENVELOPE_BYTES..]);
                }
                break;
            }
        }
        // The release takes the rest, at whatever point the power fails.
        let mut harness = Harness::start(device);
        harness.open();
        harness.wal.purge_through(&mut harness.disk, LogIndex(through));
        harness.settle();
        let device = harness.crash(|| false);
        for operations in 0.. {
            let mut harness = Harness::start(device.clone());
            harness.open();
            let chains = harness.chains();
            harness.wal.release_claim(&mut harness.disk);
            let finished = !(0..operations).all(|_| harness.step());
            let (mut harness, recovered) = Sick::new(harness.crash(|| true)).opens();
            assert_eq!((harness.chains(), recovered.report.damage), (chains, Vec::new()), "{operations}");
            assert!(recovered.claim.is_none() || !finished);
            if recovered.claim.is_none() {
                harness.settle();
                let names = harness.disk.device.names();
                assert!(whole.batches.iter().all(|batch| !names.contains(&batch.name)), "{names:?}");
            }
            if finished {
                break;
            }
        }
    }
}

/// The same where nothing that could be told is left of the former log, but that there was one.
#[test]
fn a_log_of_which_nothing_is_left_is_purged_under_its_claim() {
    for gone in [true, false] {
        let mut harness = Harness::fresh();
        for salt in 0..60 {
            harness.append_durably(1, 1, 6000, salt);
        }
        let mut device = harness.shut_down();
        let mut names = device.names();
        names.retain(|name| name.ends_with(".wal"));
        for name in &names {
            let bytes = device.content(name).len();
            match gone {
                true => device.remove(name),
                false => device.corrupt(name, 0, |bytes| bytes.fill(0xab), bytes),
            }
        }
        let (mut harness, recovered) = Sick::new(device).opens();
        let claim = recovered.claim.unwrap();
        assert!(!claim.certain && harness.chains().is_empty(), "{claim:?}");
        for salt in 0..40 {
            harness.append_durably(9, 1, 6000, salt);
        }
        let segments = harness.wal.stats().segments;
        assert_eq!(harness.wal.purge_through(&mut harness.disk, LogIndex(30)), LogIndex(30));
        harness.settle();
        assert!(harness.wal.stats().segments < segments);
        let chains = harness.chains();
        assert_eq!(chains.len(), 10);
        let (harness, recovered) = Sick::new(harness.crash(|| false)).opens();
        assert_eq!((harness.chains(), recovered.claim.is_some()), (chains, true));
        // What cannot be told stays as long as the claim.
        let left = harness.disk.device.names();
        assert!(gone || names.iter().all(|name| left.contains(name)), "{left:?}");
    }
}

#[test]
fn more_unreadable_batches_than_may_wait_are_repaired_in_several_rebuilds() {
    repaired_in_several_rebuilds(0);
}

/// Once it had been found not to open, its batches that came and found no room no longer made it be written without those that could
/// not be read, and those found no room: it was never rebuilt.
#[test]
fn a_segment_that_opens_when_tried_again_is_repaired_in_several_rebuilds_like_any_other() {
    repaired_in_several_rebuilds(1);
}

/// Repairs a segment of which no batch can be read and whose file cannot be opened for that so many times at first, trying again
/// in each round.
fn repaired_in_several_rebuilds(unopenable: usize) {
    let config =
        crate::WalConfig { segment_bytes: 36 << 20, batch_bytes_max: 2 << 20, ..crate::testing::config() };
    let mut harness = Harness::start_with(Device::default(), config.clone());
    harness.open();
    for salt in 0..6 {
        harness.append_durably(1, 1, 1 << 20, salt);
    }
    let device = harness.shut_down();
    let mut harness = Harness::start_with(device, config);
    harness.open();
    let originals: Vec<_> = harness.read_all();
    assert_eq!(originals.len(), 6);
    for batch in &originals {
        let (name, at) = slot_at(&harness, batch.info.first);
        harness.disk.unreadable.push((name, at as u64 + 65536));
        harness.wal.read(&mut harness.disk, 1, batch.info.first, 1);
        harness.settle();
        assert!(harness.take_read().is_err());
    }
    told(&mut harness);
    let (segment, _) = slot_at(&harness, originals[0].info.first);
    harness.disk.unopenable.push((segment, unopenable));
    let hand_in = |harness: &mut Harness, first: LogIndex| {
        let batch = originals.iter().find(|batch| batch.info.first == first).unwrap();
        let pool = harness.pool.clone();
        let mut block = crate::ops::take(&pool, &mut harness.disk, batch.info.slot_bytes()).unwrap();
        let image = batch.image();
        block[ENVELOPE_BYTES..ENVELOPE_BYTES + image.len()].copy_from_slice(image);
        match harness.wal.repair(&mut harness.disk, first, block) {
            Ok(()) | Err(RepairError::Busy) => {}
            Err(error) => panic!("{error}"),
        }
    };
    if unopenable > 0 {
        // One for which there is room.
        hand_in(&mut harness, originals[0].info.first);
        harness.settle();
        assert_eq!(told(&mut harness), []);
    }
    let (mut repaired, mut rounds) = (Vec::new(), 0);
    while repaired.len() < 6 {
        rounds += 1;
        assert!(rounds < 6, "it comes to an end: {repaired:?}");
        if unopenable > 0 {
            harness.wal.retry_space();
        }
        let damaged: Vec<LogIndex> = harness.wal.damaged().map(|batch| batch.info.first).collect();
        damaged.into_iter().for_each(|first| hand_in(&mut harness, first));
        harness.settle();
        repaired.extend(told(&mut harness).into_iter().filter(|(is_repaired, _)| *is_repaired));
        if !repaired.is_empty() {
            // The segment is another file now.
            harness.disk.unreadable.clear();
        }
    }
    assert!(rounds > 1, "they did not fit at once");
    assert!(harness.disk.unopenable.iter().all(|(_, times)| *times == 0));
    let again: Vec<Vec<u8>> = harness.read_all().iter().map(|batch| batch.image().to_vec()).collect();
    assert!(again.iter().zip(&originals).all(|(again, original)| again == original.image()));
}

/// What waited for a segment that could not be opened kept its room, and where that was all there is, no other segment was ever
/// repaired: each of its batches was refused as one too many.
#[test]
fn what_waits_for_a_segment_that_never_opens_gives_way_to_what_can_be_repaired() {
    let config =
        crate::WalConfig { segment_bytes: 36 << 20, batch_bytes_max: 2 << 20, ..crate::testing::config() };
    let mut device = Device::default();
    // One segment for each process.
    for first in [0, 6] {
        let mut harness = Harness::start_with(device, config.clone());
        harness.open();
        for salt in first..first + 6 {
            harness.append_durably(1, 1, 1 << 20, salt);
        }
        device = harness.shut_down();
    }
    let mut harness = Harness::start_with(device.clone(), config.clone());
    harness.open();
    let originals: Vec<_> = harness.read_all();
    let places: Vec<_> = originals.iter().map(|batch| slot_at(&harness, batch.info.first)).collect();
    let (closed, other) = (places[0].0.clone(), places[6].0.clone());
    assert!(places[..6].iter().all(|(name, _)| *name == closed) && closed != other);
    for (name, at) in &places {
        device.corrupt(name, at + 65536, |bytes| bytes[0] ^= 1, 1);
    }
    let mut harness = Harness::start_with(device, config);
    harness.open();
    assert_eq!(harness.wal.damaged().count(), 12);
    harness.disk.unopenable.push((closed.clone(), usize::MAX));
    let offer = |harness: &mut Harness, at: usize| {
        let (info, image) = (originals[at].info, originals[at].image());
        let pool = harness.pool.clone();
        let mut block = crate::ops::take(&pool, &mut harness.disk, info.slot_bytes()).unwrap();
        block[ENVELOPE_BYTES..ENVELOPE_BYTES + image.len()].copy_from_slice(image);
        let taken = harness.wal.repair(&mut harness.disk, info.first, block);
        harness.settle();
        assert!(matches!(taken, Ok(()) | Err(RepairError::Busy)), "{taken:?}");
        taken.is_ok()
    };
    let awaited = |harness: &Harness| -> usize {
        originals.iter().filter(|batch| harness.wal.awaits_repair(batch.info.first)).count()
    };
    let taken = (0..6).filter(|at| offer(&mut harness, *at)).count();
    assert!((2..6).contains(&taken), "{taken} fill the room");
    assert_eq!(awaited(&harness), taken);
    assert_eq!(told(&mut harness), [] as [(bool, u64); 0], "nothing can be written");
    // Meanwhile the first ones are offered again and again, as they come.
    let mut repaired = Vec::new();
    for at in 6..12 {
        assert!(offer(&mut harness, at), "it has room: {at}");
        repaired.extend(told(&mut harness));
        for again in 0..6 {
            offer(&mut harness, again);
        }
        assert!(awaited(&harness) <= taken, "and no more than there is");
    }
    let expected: Vec<_> = originals[6..].iter().map(|batch| (true, batch.info.first.get())).collect();
    assert_eq!(repaired, expected);
    // When it opens, it is repaired as any other.
    harness.disk.unopenable.clear();
    harness.wal.retry_space();
    for at in (0..6).cycle().take(36) {
        if harness.wal.is_damaged(originals[at].info.first) {
            offer(&mut harness, at);
        }
    }
    assert_eq!((harness.wal.damaged().count(), awaited(&harness)), (0, 0));
    let again: Vec<Vec<u8>> = harness.read_all().iter().map(|batch| batch.image().to_vec()).collect();
    assert!(again.iter().zip(&originals).all(|(again, original)| again == original.image()));
}

#[test]
fn damage_to_what_was_appended_under_a_claim_drops_the_older_salvage_and_leaves_no_certainty() {
    let (device, slots) = four_batches(true);
    let mut sick = Sick::new(device);
    sick.flip(&slots[1].0, slots[1].1);
    let (mut harness, recovered) = sick.opens();
    assert_eq!((recovered.claim, harness.wal.salvage().count()), (certain(1, 8), 2));
    // A leader appends over the positions of the salvage.
    for salt in 0..3 {
        harness.append_durably(5, 2, 400, 90 + salt);
    }
    let chains = harness.chains();
    let (name, at) = slot_at_chain(&harness, chains[2]);
    let mut sick = Sick::new(harness.crash(|| false));
    sick.flip(&name, at);
    let (harness, recovered) = sick.opens();
    assert_eq!(harness.chains(), chains[..2]);
    let salvage: Vec<Chain> = harness.wal.salvage().map(|info| info.chain).collect();
    assert_eq!(salvage, chains[3..], "only what lay behind this cut");
    assert_eq!(recovered.claim, Some(Claim { term: Term(5), last: LogIndex(8), certain: false }));
}

fn slot_at_chain(harness: &Harness, chain: Chain) -> (String, usize) {
    for name in harness.disk.device.names().iter().filter(|name| name.ends_with(".wal")) {
        let content = harness.disk.device.content(name);
        for at in (slots_start(content.len() as u64) as usize..content.len()).step_by(BLOCK_BYTES) {
            if read_envelope(&content[at..]).is_ok_and(|envelope| envelope.chain == chain) {
                return (name.clone(), at);
            }
        }
    }
    panic!("no slot has chain {chain}")
}

#[test]
fn a_claim_is_not_certain_when_more_was_vouched_for_or_the_newest_epoch_left_no_segment() {
    // The last batch is lost, and only the hard state knows of it.
    let (device, slots) = four_batches(true);
    let mut sick = Sick::new(device);
    sick.flip(&slots[0].0, slots[0].1);
    sick.device.corrupt(&slots[3].0, slots[3].1, |bytes| bytes.fill(0), BLOCK_BYTES);
    let (_, recovered) = sick.opens();
    assert_eq!(recovered.claim, Some(Claim { term: Term(1), last: LogIndex(8), certain: false }));
    // The segment that a later process appended to is gone.
    let (device, slots) = four_batches(true);
    let mut harness = Harness::start(device);
    harness.open();
    harness.append_durably(2, 1, 400, 9);
    let newest = slot_at(&harness, LogIndex(9)).0;
    let mut sick = Sick::new(harness.crash(|| false));
    sick.flip(&slots[1].0, slots[1].1);
    sick.device.remove(&newest);
    let (_, recovered) = sick.opens();
    assert!(!recovered.claim.unwrap().certain);
}

/// The log is followed behind damage, and then a segment is missing that only the header of the next one tells of, before its
/// first batch: what was in it, nobody knows, and the end that was seen is not the end.
#[test]
fn a_claim_is_not_certain_when_the_last_segment_is_missing_and_the_next_one_is_still_empty() {
    let (device, names) = sixty_batches();
    let all = device.names();
    let next = all.iter().filter(|name| name.ends_with(".wal")).find(|name| *name > names.last().unwrap());
    let next = next.expect("one is ready");
    let header = device.content(next);
    assert!(header[..SECTOR_BYTES].iter().any(|byte| *byte != 0), "and has its header");
    let (name, at) = {
        let mut harness = Harness::start(device.clone());
        harness.open();
        slot_at(&harness, LogIndex(2))
    };
    let mut sick = Sick::new(device);
    sick.flip(&name, at);
    sick.device.remove(names.last().unwrap());
    let (harness, recovered) = sick.opens();
    assert_eq!(harness.wal.last_index(), LogIndex(1));
    let claim = recovered.claim.unwrap();
    assert!(!claim.certain, "{claim:?}");
}
