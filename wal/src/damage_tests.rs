//! Damage: what a start does about it, what it claims and keeps, and how batches are repaired.

use crate::error::DamageCause;
use crate::format::{BatchInfo, Chain, Claim, ENVELOPE_BYTES, read_envelope, slots_start};
use crate::testing::{Device, Harness, Rng};
use crate::tests::{four_batches, last_segment, slot_at};
use crate::{DamagedBatch, ReadError, Recovered};
use ringraft_block::{BLOCK_BYTES, LogIndex, SECTOR_BYTES, Term};

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
                    assert_eq!(claim.last, LogIndex(if closed { 8 } else { 6 }));
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
        // When it can be read again, the batch is salvage: the claim stays until it is released.
        let mut well = Harness::start(harness.crash(|| false));
        well.open();
        assert_eq!(well.chains().len(), ordinal);
        assert_eq!(well.wal.hard_state().unwrap().claim, recovered.claim);
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
        let Seen { known, certain, uncertain, salvaged, whole } = seen;
        assert!([known, certain, uncertain, salvaged, whole].iter().all(|count| *count > 2), "{seen:?}");
    }
}

/// How often the cases came up.
#[derive(Debug, Default)]
struct Seen {
    known: usize,
    certain: usize,
    uncertain: usize,
    salvaged: usize,
    whole: usize,
}

impl Seen {
    fn add(&mut self, more: &Seen) {
        self.known += more.known;
        self.certain += more.certain;
        self.uncertain += more.uncertain;
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

/// A log of several starts, the last process crashed, with all that it appended and how many of them were acknowledged.
fn random_log(rng: &mut Rng) -> (Device, Vec<Appended>, usize, LogIndex) {
    let mut device = Device::default();
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
            let slot = names.iter().filter(|name| name.ends_with(".wal")).find_map(|name| {
                let content = device.content(name);
                let slots = (slots_start(content.len() as u64) as usize..content.len()).step_by(BLOCK_BYTES);
                slots.map(|at| (name, at)).find(|(_, at)| {
                    read_envelope(&content[*at..]).is_ok_and(|envelope| envelope.chain == info.chain)
                })
            });
            let Some((name, at)) = slot else { continue };
            let end = at + ENVELOPE_BYTES + info.image_bytes as usize;
            let bytes = device.content(name)[at..end].to_vec();
            appended.push(Appended { info, name: name.clone(), at, bytes });
        }
        return (device, appended, acknowledged, witness);
    }
    unreachable!()
}

fn random_damage(seed: u64) -> Seen {
    let mut rng = Rng(seed);
    let (device, appended, acknowledged, witness) = random_log(&mut rng);
    let mut sick = Sick::new(device);
    let last_segment = appended[acknowledged - 1].name.clone();
    for _ in 0..1 + rng.below(4) {
        let victim = &appended[rng.below(acknowledged)];
        let (name, at, length) = (&victim.name, victim.at, victim.bytes.len());
        if !sick.device.names().contains(name) {
            continue;
        }
        let sector = at + rng.below(length.div_ceil(SECTOR_BYTES)) * SECTOR_BYTES;
        match rng.below(12) {
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
                sick.device.corrupt(name, at, |bytes| bytes.copy_from_slice(&block), BLOCK_BYTES);
            }
            9 | 10 => sick.unreadable.push((name.clone(), (sector - sector % BLOCK_BYTES) as u64)),
            11 if *name != last_segment => match rng.below(3) {
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
        let previous = before.map_or(Chain::default(), |before| before.info.chain);
        harness.wal.read_salvage(&mut harness.disk, 2, salvaged.first, previous);
        harness.settle();
        let read = harness.take_read().expect("salvage is readable");
        assert_eq!(read[0].image(), &batch.bytes[ENVELOPE_BYTES..]);
        harness.wal.read_salvage(&mut harness.disk, 3, salvaged.first, Chain([9; 16]));
        harness.settle();
        assert_eq!(harness.take_read().err(), Some(ReadError::NotFound { first: salvaged.first }));
    }
    Seen {
        known: damaged.len(),
        certain: usize::from(claim.is_some_and(|claim| claim.certain)),
        uncertain: usize::from(claim.is_some_and(|claim| !claim.certain)),
        salvaged: salvage.len(),
        whole: usize::from(claim.is_none() && damaged.is_empty()),
    }
}
