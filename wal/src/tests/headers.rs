//! Headers of segments that are lost, cut short, or stand in another file; of files in their first life and in a later one.

use super::segments::in_a_recycled_segment;
use super::slot_at;
use crate::format::{BatchInfo, Claim, read_segment_header};
use crate::testing::{Device, Harness};
use ringraft_block::{BLOCK_BYTES, LogIndex, SECTOR_BYTES};

/// What a start makes of a device; the next one must find the same.
fn open_twice(device: Device) -> (Vec<BatchInfo>, Vec<BatchInfo>, Option<Claim>) {
    let mut harness = Harness::start(device);
    harness.open();
    let found = |harness: &Harness| {
        let claim = harness.wal.hard_state().unwrap().claim;
        (harness.wal.batches().collect(), harness.wal.salvage().collect(), claim)
    };
    let first = found(&harness);
    let mut again = Harness::start(harness.crash(|| false));
    again.open();
    assert_eq!(found(&again), first, "the next start finds the same");
    first
}

fn blank(device: &mut Device, name: &str, at: usize) {
    device.corrupt(name, at, |bytes| bytes.fill(0), SECTOR_BYTES);
}

/// A recycled segment with a single batch of its present life and otherwise full of its former one, where `more` says whether the log went on
/// in another; with the place of that batch.
fn one_batch_over_a_former_life(more: bool) -> (Device, BatchInfo, (String, usize)) {
    let mut harness = in_a_recycled_segment(6000);
    // The first batch of the next segment, which was recycled as well.
    let (name, _) = slot_at(&harness, harness.wal.last_info().unwrap().first);
    while slot_at(&harness, harness.wal.last_info().unwrap().first).0 == name {
        let salt = harness.wal.last_index().get();
        harness.append_durably(1, 1, 6000, salt);
    }
    let info = harness.wal.last_info().unwrap();
    let place = slot_at(&harness, info.first);
    if more {
        // The next start cuts, and goes on in a segment of its own.
        harness = Harness::start(harness.crash(|| false));
        harness.open();
        harness.append_durably(1, 1, 6000, 7);
    }
    (harness.crash(|| false), info, place)
}

#[test]
fn the_lost_header_of_a_recycled_segment_never_hides_the_one_batch_of_its_present_life() {
    for more in [false, true] {
        let (device, info, (name, at)) = one_batch_over_a_former_life(more);
        let content = device.content(&name);
        let generation = read_segment_header(content).unwrap().generation;
        let older = (at + BLOCK_BYTES..content.len()).step_by(BLOCK_BYTES).filter(|at| {
            crate::format::read_envelope(&content[*at..])
                .is_ok_and(|envelope| envelope.offset == *at as u64 && envelope.generation < generation)
        });
        assert!(older.count() > 5, "the former life left more than the present one");
        for rotten in [false, true] {
            let mut device = device.clone();
            if rotten {
                device.corrupt(&name, 9, |bytes| bytes[0] ^= 0x10, 1);
            } else {
                blank(&mut device, &name, 0);
            }
            // The envelope tells where the batch belongs.
            let (held, salvage, claim) = open_twice(device.clone());
            assert!(held.contains(&info) || salvage.contains(&info), "{claim:?}");
            if !held.contains(&info) {
                let claim = claim.expect("what is not in the log is claimed");
                assert!(!claim.certain || (claim.term, claim.last) >= (info.term, info.last), "{claim:?}");
            }
            // It is lost too: nobody can tell what was there, and nothing of the former life stands for it.
            for garbage in [false, true] {
                let mut device = device.clone();
                let change = |bytes: &mut [u8]| if garbage { bytes.fill(0xa5) } else { bytes[100] ^= 1 };
                device.corrupt(&name, at, change, SECTOR_BYTES);
                let (held, salvage, claim) = open_twice(device);
                assert!(held.iter().all(|held| held.last < info.first));
                let claim = claim.expect("no silent loss");
                assert!(!claim.certain || more && claim.last > info.last, "{claim:?}");
                assert!(
                    salvage.iter().all(|batch| batch.first > info.first),
                    "more {more} info {} held {:?} {claim:?} {salvage:?}",
                    info.first,
                    held.iter().map(|batch| batch.first).collect::<Vec<_>>()
                );
            }
        }
    }
}

#[test]
fn a_file_that_lost_its_end_or_got_a_tail_is_the_segment_that_its_header_names() {
    let mut harness = Harness::fresh();
    for salt in 0..20 {
        harness.append_durably(1, 1, 6000, salt);
    }
    let infos: Vec<BatchInfo> = harness.wal.batches().collect();
    let (name, _) = slot_at(&harness, LogIndex(1));
    let (in_next, at_next) = slot_at(&harness, LogIndex(20));
    assert_ne!(name, in_next);
    let in_first = infos.iter().filter(|info| slot_at(&harness, info.first).0 == name).count();
    let places: Vec<usize> = infos[..in_first].iter().map(|info| slot_at(&harness, info.first).1).collect();
    let device = harness.crash(|| false);

    // Cut within a batch: that one awaits repair, the envelopes of those behind are gone.
    let mut short = device.clone();
    short.shorten(&name, places[3] + BLOCK_BYTES);
    let (held, salvage, claim) = open_twice(short);
    assert_eq!(
        held,
        infos[..4]
            .iter()
            .map(|info| BatchInfo { ..*info })
            .enumerate()
            .map(|(at, info)| if at == 3 { held[3] } else { info })
            .collect::<Vec<_>>()
    );
    assert_eq!((held[3].first, held[3].chain), (infos[3].first, infos[3].chain));
    assert_eq!(salvage, infos[in_first..]);
    assert_eq!(claim.map(|claim| (claim.last, claim.certain)), Some((LogIndex(20), true)));

    // The last segment, at the end of its last batch: more may have followed. With its header lost as well, too.
    for header_lost in [false, true] {
        let mut short = device.clone();
        short.shorten(&in_next, at_next + 2 * BLOCK_BYTES);
        if header_lost {
            blank(&mut short, &in_next, 0);
        }
        let (held, salvage, claim) = open_twice(short);
        assert_eq!(held.len() + salvage.len(), 20);
        assert!(claim.is_some_and(|claim| !claim.certain), "{claim:?}");
    }
}

#[test]
fn a_header_that_was_written_to_another_file_hides_neither_segment() {
    let mut harness = Harness::fresh();
    for salt in 0..60 {
        harness.append_durably(1, 1, 6000, salt);
    }
    let infos: Vec<BatchInfo> = harness.wal.batches().collect();
    let (victim, _) = slot_at(&harness, LogIndex(1));
    let mut names = harness.disk.device.names();
    names.retain(|name| name.ends_with(".wal") && *name != victim);
    let device = harness.crash(|| false);
    for name in names {
        let content = device.content(&name);
        let Ok(header) = read_segment_header(content) else { continue };
        let block = content[..BLOCK_BYTES].to_vec();
        for original_lost in [false, true] {
            let mut device = device.clone();
            device.corrupt(&victim, 0, |bytes| bytes.copy_from_slice(&block), BLOCK_BYTES);
            if original_lost {
                blank(&mut device, &name, 0);
            }
            let (held, salvage, claim) = open_twice(device);
            assert!(held.is_empty());
            assert_eq!(salvage, infos, "generation {}, lost {original_lost}", header.generation);
            assert!(claim.is_some_and(|claim| claim.last >= LogIndex(60)), "{claim:?}");
        }
    }
}
