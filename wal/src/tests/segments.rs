//! The life of segments: purge, recycling, another life in service, and the lack of space; each crashed at every step.

use super::{last_segment, slot_at};
use crate::disk::DiskOp;
use crate::format::{
    Chain, IMAGE_HEADER_BYTES, PriorContent, SectorChecksums, content_checksum, prior_checksum_at,
    read_segment_header, slots_start,
};
use crate::testing::{Device, Fate, Harness, Rng, config, golden};
use crate::{Damage, DamageCause, ReadError, Recovered, WalConfig, WalEvent};
use ringraft_block::{BLOCK_BYTES, LogIndex, SECTOR_BYTES};
use std::fmt::Write as _;

fn ends_with(device: &Device, suffix: &str) -> Vec<String> {
    device.names().into_iter().filter(|name| name.ends_with(suffix)).collect()
}

/// The log must open, without damage.
fn open(harness: &mut Harness) -> Recovered {
    let recovered = harness.open();
    assert_eq!(recovered.report.damage, []);
    assert_eq!(recovered.hard_state.claim, None);
    recovered
}

/// The first damage that a start finds.
fn damage_of(harness: &mut Harness) -> Damage {
    harness.open().report.damage.first().cloned().expect("damage is reported")
}

/// Every recycled segment says of each of its sectors what that holds, and its header is blank.
fn used_segments_are_whole(device: &Device) {
    for name in ends_with(device, ".used") {
        let content = device.content(&name);
        assert!(content[..BLOCK_BYTES].iter().all(|byte| *byte == 0), "{name}: the header is blank");
        for offset in (slots_start(content.len() as u64)..content.len() as u64).step_by(SECTOR_BYTES) {
            let at = prior_checksum_at(offset) as usize;
            let stored = u32::from_le_bytes(*content[at..].first_chunk().unwrap());
            let sector = &content[offset as usize..][..SECTOR_BYTES];
            assert_eq!(stored, content_checksum(sector), "{name} at {offset}");
        }
    }
}

/// Appends single-command batches of a size, durably, until the log ends at `last`.
fn fill(harness: &mut Harness, last: u64, bytes: usize) {
    while harness.wal.last_index().get() < last {
        let salt = harness.wal.last_index().get();
        harness.append_durably(1, 1, bytes, salt);
    }
}

/// Recycles segments by purging, until the active one is in another life and holds a batch of it.
pub(super) fn in_a_recycled_segment(bytes: usize) -> Harness {
    let mut harness = Harness::fresh();
    for _ in 0..400 {
        let last = harness.wal.last_index().get() + 1;
        fill(&mut harness, last, bytes);
        if last.is_multiple_of(10) {
            harness.wal.purge_through(&mut harness.disk, LogIndex(last - 2));
            harness.settle();
        }
        if active_prior(&harness) == PriorContent::Checksums {
            let another = harness.wal.last_index().get() + 1;
            fill(&mut harness, another, bytes);
            harness.events.clear();
            return harness;
        }
    }
    panic!("no segment came back: {:?}", harness.wal.stats());
}

fn active_prior(harness: &Harness) -> PriorContent {
    let (name, _) = slot_at(harness, harness.wal.last_info().unwrap().first);
    read_segment_header(harness.disk.device.content(&name)).unwrap().prior_content
}

#[test]
fn a_purge_moves_the_start_and_reads_before_it_find_nothing() {
    let mut harness = Harness::fresh();
    fill(&mut harness, 60, 6000);
    let chains = harness.chains();
    harness.events.clear();
    let end = harness.wal.log_end();
    let at = LogIndex(40);
    let chain = harness.wal.chain_at(at);
    assert_eq!(harness.wal.purge_through(&mut harness.disk, at), at);
    assert_eq!(harness.wal.first_index(), LogIndex(41));
    assert_eq!(harness.wal.chain_at(at), chain, "the chain at the start is known");
    assert_eq!(harness.wal.chain_at(LogIndex(39)), None);
    assert!(harness.events.is_empty(), "not told before it is durable");
    assert_eq!(harness.disk.device.names().iter().filter(|name| name.ends_with(".wal")).count(), 5);
    harness.settle();
    assert!(matches!(harness.events.pop_front(), Some(WalEvent::Purged { through }) if through == at));
    harness.wal.read(&mut harness.disk, 1, LogIndex(40), 4096);
    harness.settle();
    assert!(matches!(
        harness.events.pop_front(),
        Some(WalEvent::Read { result: Err(ReadError::NotFound { first }), .. }) if first == at
    ));
    assert_eq!(harness.read_all().len(), 20);
    assert_eq!(harness.chains(), chains[40..]);
    assert_eq!(harness.wal.purge_through(&mut harness.disk, LogIndex(7)), at, "the start never moves back");
    assert_eq!(harness.wal.stats().segments_recycled, 2);
    used_segments_are_whole(&harness.disk.device);

    let mut harness = Harness::start(harness.crash(|| false));
    let recovered = open(&mut harness);
    assert_eq!(recovered.hard_state.start.index, at);
    assert_eq!((harness.chains(), harness.wal.log_end()), (chains[40..].to_vec(), end));
    // All of it, and on from there.
    assert_eq!(harness.wal.purge_through(&mut harness.disk, LogIndex(60)), LogIndex(60));
    harness.settle();
    assert!(harness.wal.batches().next().is_none());
    assert_eq!(harness.wal.log_end(), end);
    let mut harness = Harness::start(harness.shut_down());
    open(&mut harness);
    assert_eq!(harness.wal.log_end(), end);
    fill(&mut harness, 61, 100);
    let mut harness = Harness::start(harness.crash(|| false));
    open(&mut harness);
    assert_eq!(harness.wal.last_index(), LogIndex(61));
    assert_eq!(harness.read_all().len(), 1);
}

/// What it holds is not what it is counted to hold: after a crash, a sector that a torn write left alone would look like damage.
#[test]
fn a_segment_in_which_damage_was_found_has_no_other_life() {
    let mut harness = Harness::fresh();
    fill(&mut harness, 60, 6000);
    let (name, at) = slot_at(&harness, LogIndex(3));
    harness.disk.device.corrupt(&name, at + 3 * SECTOR_BYTES, |bytes| bytes[0] ^= 1, 1);
    harness.events.clear();
    harness.wal.read(&mut harness.disk, 1, LogIndex(3), 1);
    harness.settle();
    assert!(matches!(harness.take_read(), Err(ReadError::Damaged { .. })));
    harness.wal.purge_through(&mut harness.disk, LogIndex(40));
    harness.settle();
    assert_eq!((harness.wal.stats().segments_recycled, harness.wal.stats().segments_removed), (1, 1));
    used_segments_are_whole(&harness.disk.device);
}

#[test]
fn a_read_that_a_purge_overtakes_is_answered_and_its_file_stays_until_then() {
    let mut harness = Harness::fresh();
    fill(&mut harness, 40, 6000);
    harness.events.clear();
    harness.wal.read(&mut harness.disk, 5, LogIndex(1), 64 * 1024);
    while !harness.disk.queue.iter().any(|(_, op)| matches!(op, DiskOp::Read { .. })) {
        assert!(harness.step());
    }
    harness.wal.purge_through(&mut harness.disk, LogIndex(30));
    // The test disk asserts that no file is closed under a read.
    while !harness.disk.queue.is_empty() {
        let last = harness.disk.queue.len() - 1;
        harness.disk.complete(last, Fate::Happen);
        harness.turn();
    }
    harness.settle();
    let answer = harness.events.iter().find_map(|event| match event {
        WalEvent::Read { token: 5, result } => Some(result.as_ref().map(Vec::len)),
        _ => None,
    });
    assert_eq!(answer, Some(Err(&ReadError::NotFound { first: LogIndex(1) })));
    assert_eq!(harness.wal.stats().segments_recycled, 1);
}

#[test]
fn retention_by_bytes_keeps_log_for_followers_that_are_behind() {
    let retain_bytes = 10 * 8192;
    let config = WalConfig { retain_bytes, ..config() };
    let mut harness = Harness::start_with(Device::default(), config);
    open(&mut harness);
    fill(&mut harness, 60, 6000);
    assert_eq!(harness.wal.purge_through(&mut harness.disk, LogIndex(30)), LogIndex(30));
    assert_eq!(harness.wal.purge_through(&mut harness.disk, LogIndex(59)), LogIndex(50));
    harness.settle();
    let told: Vec<u64> = harness.events.iter().filter_map(purged).collect();
    assert_eq!(told.last(), Some(&50), "{told:?}");
    assert_eq!(harness.read_all().len(), 10);
}

fn purged(event: &WalEvent<ringraft_block::AlignedBuf>) -> Option<u64> {
    match event {
        WalEvent::Purged { through } => Some(through.get()),
        _ => None,
    }
}

/// Runs `act` on a log over `device` and crashes after every number of operations, in several ways; then the log must open
/// with all that was in it, from a start that is `before` or `after`.
fn crash_at_every_step(
    device: &Device,
    chains: &[Chain],
    (before, after): (u64, u64),
    act: impl Fn(&mut Harness),
) -> u64 {
    let mut longest = 0;
    for way in 0..5u64 {
        for operations in 0.. {
            let mut harness = Harness::start(device.clone());
            open(&mut harness);
            act(&mut harness);
            harness.turn();
            let finished = !(0..operations).all(|_| harness.step());
            let told = harness.events.iter().filter_map(purged).max().unwrap_or(before);
            let mut rng = Rng(way << 32 | operations);
            let survived = match way {
                0 => harness.crash(|| false),
                1 => harness.crash(|| true),
                2 => harness.crash(|| rng.below(2) == 0),
                3 => harness.disk.kill(|| rng.below(3)),
                _ => harness.disk.kill(|| 2),
            };
            used_segments_are_whole(&survived);
            let mut harness = Harness::start(survived);
            let recovered = open(&mut harness);
            let start = recovered.hard_state.start.index.get();
            assert!(start == before || start == after, "{start}");
            assert!(start >= told, "what was told is durable");
            assert_eq!(harness.chains(), chains[start as usize..], "way {way}, {operations} operations");
            assert_eq!(harness.read_all().len(), chains.len() - start as usize);
            assert!(ends_with(&harness.disk.device, ".old").is_empty(), "the next start removes them");
            while harness.disk.device.land_late() {}
            used_segments_are_whole(&harness.disk.device);
            let end = chains.len() as u64;
            fill(&mut harness, end + 20, 6000);
            let more = harness.chains();
            let mut harness = Harness::start(harness.crash(|| false));
            open(&mut harness);
            assert_eq!(harness.chains(), more);
            longest = longest.max(operations);
            if finished {
                break;
            }
        }
    }
    longest
}

#[test]
fn a_purge_that_crashes_at_any_step_loses_nothing_behind_the_start() {
    let mut base = Harness::fresh();
    fill(&mut base, 50, 6000);
    let chains = base.chains();
    let device = base.shut_down();
    for through in [1, 15, 16, 31, 40, 50] {
        // Segments of an earlier process: they are removed.
        let steps = crash_at_every_step(&device, &chains, (0, through), |harness| {
            harness.wal.purge_through(&mut harness.disk, LogIndex(through));
        });
        assert!(steps >= 2);
    }
}

#[test]
fn recycling_that_crashes_at_any_step_loses_nothing_and_keeps_no_half_made_segment() {
    let mut base = Harness::fresh();
    fill(&mut base, 5, 6000);
    let mut chains = base.chains();
    let device = base.shut_down();
    // The batches that each run appends again are the same.
    let mut run = Harness::start(device.clone());
    open(&mut run);
    fill(&mut run, 40, 6000);
    chains.extend_from_slice(&run.chains()[5..]);
    let steps = crash_at_every_step(&device, &chains, (0, 38), |harness| {
        fill(harness, 40, 6000);
        harness.wal.purge_through(&mut harness.disk, LogIndex(38));
    });
    assert!(steps >= 20, "recycling was exercised: {steps}");
}

#[test]
fn a_start_that_finds_the_new_start_removes_what_the_purge_left() {
    let mut harness = Harness::fresh();
    fill(&mut harness, 50, 6000);
    let chains = harness.chains();
    harness.wal.purge_through(&mut harness.disk, LogIndex(40));
    // The save of both copies, and nothing more.
    assert!(harness.step() && harness.step());
    let device = harness.crash(|| false);
    let before = ends_with(&device, ".wal").len();
    let mut harness = Harness::start(device);
    assert_eq!(open(&mut harness).hard_state.start.index, LogIndex(40));
    assert_eq!(harness.chains(), chains[40..]);
    assert!(ends_with(&harness.disk.device, ".wal").len() < before);
    assert!(harness.wal.stats().segments_removed >= 2, "{:?}", harness.wal.stats());
    // The segment that holds the last purged batch holds the first that was kept: its loss is noticed.
    let name = slot_at(&harness, LogIndex(45)).0;
    let mut device = harness.crash(|| false);
    device.remove(&name);
    let damage = damage_of(&mut Harness::start(device));
    assert_eq!(damage.first, LogIndex(41));
}

#[test]
fn damage_before_the_start_does_not_matter_and_damage_behind_it_does() {
    let mut harness = Harness::fresh();
    fill(&mut harness, 12, 6000);
    harness.wal.purge_through(&mut harness.disk, LogIndex(8));
    harness.settle();
    let chains = harness.chains();
    let slots: Vec<_> = (1..=12).map(|index| slot_at(&harness, LogIndex(index))).collect();
    let device = harness.shut_down();
    for (ordinal, (name, at)) in slots.iter().enumerate() {
        for sector in [0, 1, 5] {
            let mut damaged = device.clone();
            damaged.corrupt(name, at + sector * SECTOR_BYTES, |bytes| bytes[40] ^= 8, SECTOR_BYTES);
            let mut harness = Harness::start(damaged);
            if ordinal < 8 {
                open(&mut harness);
                assert_eq!(harness.chains(), chains);
            } else {
                let damage = damage_of(&mut harness);
                assert_eq!(damage.first, LogIndex(ordinal as u64 + 1));
            }
        }
    }
}

#[test]
fn a_segment_missing_behind_a_purge_is_damage() {
    let mut harness = Harness::fresh();
    fill(&mut harness, 60, 6000);
    // The end of a segment: nothing of it is needed, and the next one says that it follows.
    let (second, at) = slot_at(&harness, LogIndex(17));
    assert_eq!(at as u64, slots_start(config().segment_bytes), "17 begins a segment");
    harness.wal.purge_through(&mut harness.disk, LogIndex(16));
    harness.settle();
    let (third, _) = slot_at(&harness, LogIndex(33));
    let device = harness.crash(|| false);
    let mut harness = Harness::start(device.clone());
    open(&mut harness);
    assert_eq!(harness.chains().len(), 44);
    for name in [second, third] {
        let mut missing = device.clone();
        missing.remove(&name);
        damage_of(&mut Harness::start(missing));
    }
}

#[test]
fn in_steady_state_segments_are_recycled_and_none_is_made() {
    let mut harness = Harness::fresh();
    fill(&mut harness, 64, 6000);
    harness.wal.purge_through(&mut harness.disk, LogIndex(60));
    harness.settle();
    let before = harness.wal.stats();
    for round in 0..40 {
        fill(&mut harness, 64 + round * 16, 6000);
        harness.wal.purge_through(&mut harness.disk, LogIndex(60 + round * 16));
        harness.settle();
        used_segments_are_whole(&harness.disk.device);
    }
    let after = harness.wal.stats();
    assert_eq!(after.segments_made, before.segments_made, "nothing is filled with zeros");
    assert_eq!(after.segments_removed, before.segments_removed);
    assert!(after.segments_recycled >= before.segments_recycled + 38, "{after:?}");
    let files = harness.disk.device.names().len();
    assert!(files <= 4 + 8, "the directory does not grow: {:?}", harness.disk.device.names());
    let chains = harness.chains();
    // The next process goes on with the recycled ones, and recycles them again.
    assert!(!ends_with(&harness.disk.device, ".used").is_empty());
    let mut harness = Harness::start(harness.shut_down());
    open(&mut harness);
    assert_eq!(harness.chains(), chains);
    let last = harness.wal.last_index().get();
    fill(&mut harness, last + 1, 100);
    assert_eq!(active_prior(&harness), PriorContent::Checksums);
    harness.wal.truncate_after(&mut harness.disk, LogIndex(last));
    harness.settle();
    assert_eq!(harness.wal.stats().segments_recycled, 1);
    used_segments_are_whole(&harness.disk.device);
}

#[test]
fn no_more_than_the_configured_number_of_segments_is_kept_for_another_life() {
    for recycled_segments_max in [0, 2] {
        let config = WalConfig { recycled_segments_max, ..config() };
        let mut harness = Harness::start_with(Device::default(), config);
        open(&mut harness);
        fill(&mut harness, 100, 6000);
        harness.wal.purge_through(&mut harness.disk, LogIndex(99));
        harness.settle();
        assert_eq!(harness.wal.stats().segments_recycled, recycled_segments_max as u64);
        assert_eq!(harness.wal.stats().segments_removed, 6 - recycled_segments_max as u64);
        assert_eq!(ends_with(&harness.disk.device, ".used").len(), recycled_segments_max);
    }
}

#[test]
fn the_region_of_former_checksums_has_the_bytes_it_had() {
    let mut harness = Harness::fresh();
    fill(&mut harness, 20, 6000);
    harness.wal.purge_through(&mut harness.disk, LogIndex(16));
    harness.settle();
    let name = ends_with(&harness.disk.device, ".used").pop().unwrap();
    let content = harness.disk.device.content(&name);
    let mut text =
        String::from("one crc32c per sector, from byte 4096 on; of the blocks before the slots: zero\n");
    for (ordinal, line) in
        content[BLOCK_BYTES..slots_start(content.len() as u64) as usize].chunks(32).enumerate()
    {
        write!(text, "{:06x} ", BLOCK_BYTES + ordinal * 32).unwrap();
        for entry in line.as_chunks::<4>().0 {
            write!(text, " {:08x}", u32::from_le_bytes(*entry)).unwrap();
        }
        text.push('\n');
    }
    golden("recycled.txt", &text);
}

/// Opens what survived and says how many batches behind `start` there are; a second start says the same.
fn opens_with(device: Device) -> Vec<Chain> {
    let mut harness = Harness::start(device);
    open(&mut harness);
    let chains = harness.chains();
    let mut again = Harness::start(harness.crash(|| false));
    open(&mut again);
    assert_eq!(again.chains(), chains, "the next start finds the same");
    chains
}

#[test]
fn every_sector_subset_of_the_last_write_over_a_former_life_is_the_whole_batch_or_none() {
    // Slots of one block, 3 sectors of it written. The former life held batches of that size at the same offsets.
    let base = in_a_recycled_segment(920);
    let chains = base.chains();
    let before = base.disk.device.image();
    drop(base);
    for subset in 0..1u32 << (BLOCK_BYTES / SECTOR_BYTES) {
        // Every sector of the block, so the padding too.
        let mut harness = in_a_recycled_segment(920);
        assert!(harness.disk.device.image() == before, "every run is the same");
        let last = harness.wal.last_info().unwrap();
        let info = harness.append(1, 1, 920, 7);
        assert_eq!((last.slot_bytes(), info.slot_bytes()), (BLOCK_BYTES, BLOCK_BYTES));
        let (name, at) = slot_at(&harness, last.first);
        let former = &harness.disk.device.content(&name)[at + BLOCK_BYTES..];
        assert!(crate::format::read_envelope(former).is_ok(), "an old batch lies here");
        let mut sector = 0;
        let survived = harness.crash(|| {
            sector += 1;
            subset >> (sector - 1) & 1 == 1
        });
        let found = opens_with(survived);
        let sectors = (crate::format::ENVELOPE_BYTES + info.image_bytes as usize).div_ceil(SECTOR_BYTES);
        assert!((3..8).contains(&sectors));
        let whole = subset & ((1 << sectors) - 1) == (1 << sectors) - 1;
        assert_eq!(found.len(), chains.len() + usize::from(whole), "subset {subset:b}");
        assert_eq!(found[..chains.len()], chains);
    }
}

#[test]
fn rot_over_prior_content_of_a_former_life_is_damage() {
    let harness = in_a_recycled_segment(920);
    let batches: Vec<_> = harness.wal.batches().collect();
    let last = *batches.last().unwrap();
    let (name, at) = slot_at(&harness, last.first);
    let device = harness.crash(|| false);
    let sectors = (crate::format::ENVELOPE_BYTES + last.image_bytes as usize).div_ceil(SECTOR_BYTES);
    for sector in 0..sectors {
        let offset = at + sector * SECTOR_BYTES;
        for zeroed in [false, true] {
            let mut rotten = device.clone();
            let change = |bytes: &mut [u8]| if zeroed { bytes.fill(0) } else { bytes[0] ^= 2 };
            rotten.corrupt(&name, offset, change, SECTOR_BYTES);
            let damage = damage_of(&mut Harness::start(rotten));
            let cause = if sector == 0 { DamageCause::EnvelopeRotten } else { DamageCause::ImageRotten };
            assert_eq!((damage.cause, damage.first), (cause, last.first), "sector {sector}, {zeroed}");
            assert_eq!((damage.segment, damage.offset), (name.clone(), at as u64));
        }
    }
    // A region that cannot be believed makes nothing prior: a clean end behind the last batch is a doubt then.
    let entry = prior_checksum_at(at as u64 + last.slot_bytes() as u64) as usize;
    let mut doubtful = device.clone();
    doubtful.corrupt(&name, entry, |bytes| bytes[0] ^= 1, 4);
    let damage = damage_of(&mut Harness::start(doubtful));
    assert_eq!(damage.first, last.last.next());
    let mut unreadable = Harness::start(device.clone());
    unreadable.disk.unreadable.push((name.clone(), BLOCK_BYTES as u64));
    damage_of(&mut unreadable);
    assert_eq!(opens_with(device).len(), batches.len());
}

/// A leader sends a batch again that was cut off, and it comes to lie where it lay: envelope apart, all is as it was.
fn the_same_batch_in_the_same_place(bytes: usize) -> Harness {
    let mut harness = Harness::fresh();
    for _ in 0..20 {
        harness.append_durably(1, 1, bytes, 1);
        harness.append_durably(1, 1, bytes, 2);
        let (name, at) = slot_at(&harness, LogIndex(2));
        if active_prior(&harness) == PriorContent::Checksums && harness.wal.stats().segments_recycled > 8 {
            assert_eq!(name, last_segment(&harness));
            assert!(at as u64 > slots_start(config().segment_bytes));
            return harness;
        }
        harness.wal.truncate_after(&mut harness.disk, LogIndex(0));
        harness.settle();
        harness.persisted = LogIndex(0);
    }
    panic!("no segment came back");
}

#[test]
fn a_batch_that_its_place_held_before_is_accepted_and_its_rot_is_damage() {
    // Tables within the header's sector, in a sector of their own, and of several sectors.
    for bytes in [30, 920, 3000, 7000] {
        let harness = the_same_batch_in_the_same_place(bytes);
        let info = harness.wal.last_info().unwrap();
        let (name, at) = slot_at(&harness, LogIndex(2));
        let image = info.image_bytes as usize;
        assert!(image > IMAGE_HEADER_BYTES && SectorChecksums::table_sectors(image).end > 0);
        let device = harness.crash(|| false);
        assert_eq!(opens_with(device.clone()).len(), 2, "nothing of it is taken for a torn write");
        for sector in 0..(crate::format::ENVELOPE_BYTES + image).div_ceil(SECTOR_BYTES) {
            // The first bytes, some within, the last that count.
            for byte in [8, 100, 300] {
                let offset = at + sector * SECTOR_BYTES + byte;
                if offset >= at + crate::format::ENVELOPE_BYTES + image {
                    continue;
                }
                let mut rotten = device.clone();
                rotten.corrupt(&name, offset, |bytes| bytes[0] ^= 0x40, 1);
                let found = Harness::start(rotten).open().report.damage;
                let damage = found.first().unwrap_or_else(|| {
                    panic!("damage is reported: {bytes} bytes, sector {sector}, byte {byte}")
                });
                assert_eq!(damage.first, LogIndex(2));
            }
        }
    }
}

#[test]
fn a_lack_of_space_ends_when_a_purge_gives_segments_back() {
    let mut harness = Harness::fresh();
    let used: u64 = harness.disk.device.image().values().map(|content| content.len() as u64).sum();
    harness.disk.space = Some(used);
    let mut salt = 0;
    while harness.wal.is_ready_for(8192) {
        harness.append_durably(1, 1, 6000, salt);
        salt += 1;
    }
    let told = harness.events.iter().filter(|event| matches!(event, WalEvent::NoSpace { segments_left: 1 }));
    assert_eq!(told.count(), 1);
    harness.events.clear();
    harness.wal.purge_through(&mut harness.disk, LogIndex(40));
    harness.settle();
    let again = harness.events.iter().filter(|event| matches!(event, WalEvent::SpaceAgain)).count();
    assert_eq!(again, 1, "{:?}", harness.events);
    for _ in 0..20 {
        harness.append_durably(1, 1, 6000, salt);
    }
    assert!(harness.wal.poisoned().is_none());
}

#[test]
fn a_start_on_a_full_disk_gives_up_a_ready_segment_for_the_hard_state() {
    let mut base = Harness::fresh();
    fill(&mut base, 3, 100);
    let chains = base.chains();
    let device = base.shut_down();
    let free = ends_with(&device, ".free").len();
    assert!(free > 0);
    let mut harness = Harness::start(device);
    let used: u64 = harness.disk.device.image().values().map(|content| content.len() as u64).sum();
    harness.disk.space = Some(used);
    open(&mut harness);
    assert_eq!(harness.chains(), chains);
    assert_eq!(harness.wal.stats().segments_removed, 2, "the one that was given up, and the unused standby");
    fill(&mut harness, 4, 100);
}

#[test]
fn a_start_without_any_space_waits_and_goes_on_when_there_is_some() {
    let mut base = Harness::fresh();
    fill(&mut base, 3, 100);
    let (chains, written) = (base.chains(), last_segment(&base));
    let mut device = base.shut_down();
    for name in device.names() {
        if name.starts_with("segment") && name != written {
            device.remove(&name);
        }
    }
    for copy in ["hard-a.new", "hard-b.new"] {
        // The last space goes before this copy is made.
        let until_full = |harness: &mut Harness| {
            harness.turn();
            while !harness.disk.trace.iter().any(|line| *line == format!("create {copy}")) {
                assert!(harness.step());
            }
            harness.disk.space = Some(0);
            harness.settle();
        };
        let mut harness = Harness::start(device.clone());
        until_full(&mut harness);
        assert!(matches!(harness.events.pop_front(), Some(WalEvent::NoSpace { segments_left: 0 })));
        assert!(harness.events.is_empty() && harness.wal.poisoned().is_none());
        harness.wal.retry_space();
        harness.settle();
        assert!(harness.events.is_empty(), "told once");
        // It can be ended while it waits.
        let waiting = harness.disk.device.clone();
        harness.wal.close(&mut harness.disk);
        harness.settle();
        assert!(matches!(harness.events.pop_front(), Some(WalEvent::Closed)));
        assert_eq!(harness.disk.open_files(), 0);
        // Or killed, in which case nothing is lost.
        for device in [waiting, harness.crash(|| false)] {
            let mut harness = Harness::start(device);
            until_full(&mut harness);
            assert!(matches!(harness.events.pop_front(), Some(WalEvent::NoSpace { .. })));
            harness.disk.space = None;
            harness.wal.retry_space();
            open(&mut harness);
            assert_eq!(harness.chains(), chains);
            assert!(harness.events.iter().any(|event| matches!(event, WalEvent::SpaceAgain)));
            fill(&mut harness, 4, 100);
        }
    }
}

#[test]
fn closing_does_not_wait_for_a_segment_to_be_filled() {
    // Large enough for many pieces of zeros.
    let config = WalConfig { segment_bytes: 8 << 20, ..config() };
    let mut harness = Harness::start_with(Device::default(), config);
    harness.turn();
    let filling = |harness: &Harness| harness.disk.trace.last().is_some_and(|line| line.ends_with("+262144"));
    while !filling(&harness) {
        assert!(harness.step());
    }
    let before = harness.disk.trace.len();
    harness.wal.close(&mut harness.disk);
    harness.settle();
    assert!(matches!(harness.events.back(), Some(WalEvent::Closed)), "{:?}", harness.events);
    let after = &harness.disk.trace[before..];
    assert!(!after.iter().any(|line| line.ends_with("+262144")), "{after:?}");
    assert!(ends_with(&harness.disk.device, ".new").is_empty(), "the half-made file is removed");
    assert_eq!(harness.disk.open_files(), 0);
}

#[test]
fn closing_while_a_segment_is_recycled_leaves_nothing_that_a_start_would_trust() {
    for operations in 0..30 {
        let mut harness = Harness::fresh();
        fill(&mut harness, 40, 6000);
        harness.wal.purge_through(&mut harness.disk, LogIndex(38));
        for _ in 0..operations {
            harness.step();
        }
        let chains = harness.chains();
        let device = harness.shut_down();
        used_segments_are_whole(&device);
        let mut harness = Harness::start(device);
        open(&mut harness);
        assert_eq!(harness.chains(), chains);
        assert!(ends_with(&harness.disk.device, ".old").is_empty());
    }
}

#[test]
fn the_next_segment_is_ready_before_it_is_needed_while_others_are_recycled() {
    // The harness completes the oldest operation first, so recycling runs between appends.
    let mut harness = Harness::fresh();
    fill(&mut harness, 40, 6000);
    for last in 41..400u64 {
        assert!(harness.wal.is_ready_for(8192), "an append never waits for a segment");
        harness.append(1, 1, 6000, last);
        // One append takes as long as four other operations.
        for _ in 0..5 {
            harness.step();
        }
        let durable = harness.wal.durable_through().get();
        if last.is_multiple_of(16) {
            harness.wal.purge_through(&mut harness.disk, LogIndex(durable - 8));
        }
        harness.turn();
    }
    assert!(harness.wal.stats().segments_recycled > 15, "{:?}", harness.wal.stats());
}

/// Random appends, truncations, purges and completions, over many lives that end in every way, with segments that come back
/// again and again. The model: what was acknowledged and neither truncated nor purged is there; what is there was
/// appended; the start is one that was asked for and at least the last that was told.
#[test]
fn random_lives_with_purges_and_recycling_keep_the_promises() {
    let seeds = std::env::var("WAL_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    let base = std::env::var("WAL_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1u64);
    let mut recycled = 0;
    for seed in base..base + seeds {
        match std::panic::catch_unwind(|| random_life(seed)) {
            Ok(count) => recycled += count,
            Err(panic) => {
                eprintln!("WAL_SEED={seed} WAL_SEEDS=1 replays this");
                std::panic::resume_unwind(panic);
            }
        }
    }
    assert!(seeds < 10 || recycled > 5 * seeds, "recycling was exercised: {recycled}");
}

fn random_life(seed: u64) -> u64 {
    let mut rng = Rng(seed ^ 0x5e9);
    let mut device = Device::default();
    // All batches that were ever part of the log, oldest first, from index 1 on.
    let mut appended: Vec<(Chain, LogIndex)> = Vec::new();
    let (mut acknowledged, mut start_told, mut recycled) = (0, LogIndex(0), 0);
    // Starts that were asked for in this life or may have become durable in an earlier one.
    let mut starts = vec![LogIndex(0)];
    let (mut term, mut salt) = (1, seed << 8);
    let config = WalConfig {
        retain_bytes: [0, 0, 40_000][rng.below(3)],
        recycled_segments_max: [64, 64, 3][rng.below(3)],
        ..config()
    };
    for _life in 0..8 {
        if rng.below(2) == 0 {
            device.land_late();
        }
        let mut harness = Harness::start_with(device, config.clone());
        if rng.below(4) == 0 {
            // The start is interrupted.
            harness.turn();
            for _ in 0..rng.below(80) {
                harness.step();
            }
            device = match rng.below(3) {
                0 => harness.disk.kill(|| rng.below(3)),
                1 => harness.crash(|| rng.below(2) == 0),
                _ => harness.crash(|| true),
            };
            continue;
        }
        let start = open(&mut harness).hard_state.start.index;
        assert!(start >= start_told && starts.contains(&start), "{start} of {starts:?}, told {start_told}");
        let before = appended.iter().take_while(|(_, end)| *end <= start).count();
        let chains = harness.chains();
        assert!(before + chains.len() >= acknowledged, "acknowledged batches are there");
        assert!(chains.iter().zip(&appended[before..]).all(|(found, (known, _))| found == known), "a prefix");
        assert!(before + chains.len() <= appended.len());
        appended.truncate(before + chains.len());
        acknowledged = appended.len();
        (start_told, starts) = (start, vec![start]);
        term += rng.below(2) as u64;

        for _ in 0..200 + rng.below(600) {
            match rng.below(16) {
                0..=6 if harness.wal.is_ready_for(8192) => {
                    // Few sizes and contents, so that lives resemble one another.
                    let bytes = [100, 920, 3000, 6000][rng.below(4)];
                    salt = if rng.below(2) == 0 { salt + 1 } else { salt };
                    let info = harness.append(term, 1, bytes, salt);
                    appended.push((info.chain, info.last));
                }
                7..=12 if !harness.disk.queue.is_empty() => {
                    let at = rng.below(harness.disk.queue.len());
                    harness.disk.complete(at, Fate::Happen);
                }
                13 if rng.below(12) == 0 => {
                    let start = harness.wal.log_start().index;
                    let first = appended.iter().take_while(|(_, end)| *end <= start).count();
                    let kept = first + rng.below(appended.len() - first + 1);
                    let index = if kept == first { start } else { appended[kept - 1].1 };
                    harness.wal.truncate_after(&mut harness.disk, index);
                    acknowledged = acknowledged.min(kept);
                    // Let the cut become durable, so that the model needs one history only.
                    while harness.step() {}
                    harness.turn();
                    appended.truncate(kept);
                    if rng.below(2) == 0 {
                        term += 1;
                    }
                }
                14 if rng.below(8) == 0 => {
                    let durable = harness.wal.durable_through();
                    let ends: Vec<LogIndex> = harness
                        .wal
                        .batches()
                        .map(|info| info.last)
                        .take_while(|last| *last <= durable)
                        .collect();
                    if !ends.is_empty() {
                        let asked = ends[rng.below(ends.len())];
                        let start = harness.wal.purge_through(&mut harness.disk, asked);
                        assert!(start <= asked.max(harness.wal.log_start().index));
                        starts.push(start);
                    }
                }
                15 if rng.below(6) == 0 => {
                    let first = harness.wal.first_index();
                    harness.wal.read(&mut harness.disk, 1, first, 16 * 1024);
                }
                _ => {}
            }
            harness.turn();
            assert!(harness.wal.poisoned().is_none(), "{:?}", harness.wal.poisoned());
            while let Some(event) = harness.events.pop_front() {
                match event {
                    WalEvent::Persisted { last, .. } => {
                        let count = appended.iter().take_while(|(_, end)| *end <= last).count();
                        acknowledged = acknowledged.max(count);
                    }
                    WalEvent::Purged { through } => {
                        assert!(through > start_told && starts.contains(&through));
                        start_told = through;
                    }
                    WalEvent::Read { result: Ok(batches), .. } => {
                        for batch in batches {
                            assert!(appended.iter().any(|(chain, _)| *chain == batch.info.chain));
                        }
                    }
                    WalEvent::Read { result: Err(error), .. } => {
                        assert!(matches!(error, ReadError::Truncated | ReadError::NotFound { .. }), "{error}")
                    }
                    WalEvent::TruncateDone { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
            let start = harness.wal.log_start().index;
            let listed = appended.iter().filter(|(_, end)| *end > start).map(|(chain, _)| *chain);
            assert!(harness.wal.batches().map(|info| info.chain).eq(listed));
        }
        recycled += harness.wal.stats().segments_recycled;
        device = match rng.below(6) {
            4 | 5 => harness.disk.kill(|| rng.below(3)),
            0 => harness.shut_down(),
            1 => harness.crash(|| true),
            2 => harness.crash(|| false),
            _ => harness.crash(|| rng.below(2) == 0),
        };
        used_segments_are_whole(&device);
    }
    recycled
}
