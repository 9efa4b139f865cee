//! Read errors that pass: the claim that they leave is settled once all of the log can be read again, and never too low.

use super::{Outcome, Sick, Whole, certain, outcome, told};
use crate::format::{Claim, ENVELOPE_BYTES, read_hard_state, read_segment_header, slots_start};
use crate::testing::{Device, Fate, Harness};
use crate::tests::{four_batches, last_segment, slot_at};
use ringraft_block::{BLOCK_BYTES, LogIndex, SECTOR_BYTES, Term};

fn not_certain(last: u64) -> Option<Claim> {
    Some(Claim { term: Term(1), last: LogIndex(last), certain: false })
}

/// Four batches, and what a start leaves that cannot read the block at `block` blocks from the first slot.
fn started_blind(closed: bool, block: usize) -> (Device, Outcome) {
    let (device, slots) = four_batches(closed);
    let mut sick = Sick::new(device);
    sick.unreadable.push((slots[0].0.clone(), (slots[0].1 + block * BLOCK_BYTES) as u64));
    let (harness, _) = sick.opens();
    let found = outcome(&harness);
    (harness.crash(|| false), found)
}

/// A place that could not be read and now is blank may have been remapped, or the disk copied to another: an acknowledged batch may have
/// been there.
#[test]
fn a_place_that_could_not_be_read_and_then_is_blank_proves_nothing() {
    for closed in [false, true] {
        let (device, blind) = started_blind(closed, 4);
        assert_eq!((blind.chains.len(), blind.claim), (4, not_certain(8)));
        assert_eq!(outcome(&Sick::new(device).opens().0), blind, "closed {closed}");
    }
    let (mut device, blind) = started_blind(false, 3);
    let (_, slots) = four_batches(false);
    device.corrupt(&slots[3].0, slots[3].1, |bytes| bytes.fill(0), BLOCK_BYTES);
    assert_eq!(blind.claim, not_certain(6));
    assert_eq!(outcome(&Sick::new(device).opens().0), blind, "the fourth batch was acknowledged");
}

/// The batch is there again, but behind it a place is blank that could not be read either.
#[test]
fn a_claim_that_two_places_left_is_not_settled() {
    let (device, slots) = four_batches(false);
    for more in [3, 9] {
        let mut sick = Sick::new(device.clone());
        for block in [2, more] {
            sick.unreadable.push((slots[0].0.clone(), (slots[0].1 + block * BLOCK_BYTES) as u64));
        }
        let blind = outcome(&sick.clone().opens().0);
        let mut device = sick.opens().0.crash(|| false);
        if more == 3 {
            device.corrupt(&slots[3].0, slots[3].1, |bytes| bytes.fill(0), BLOCK_BYTES);
        }
        let found = outcome(&Sick::new(device).opens().0);
        let low = found.claim.is_none_or(|claim| claim.certain && claim.last < LogIndex(8));
        assert!(!low && found.claim == blind.claim, "{:?} {:?}", blind.claim, found.claim);
    }
}

/// A start behind a purge leaves out the segments of the former log, and would find no more of it than what was purged.
#[test]
fn what_settles_a_claim_is_not_purged_before() {
    let (sick, _) = still_blind();
    let mut harness = sick.start();
    harness.open();
    harness.append_durably(1, 2, 400, 3);
    harness.append_durably(1, 2, 400, 9);
    assert_eq!(harness.wal.purge_through(&mut harness.disk, LogIndex(8)), LogIndex(0));
    harness.settle();
    let (harness, _) = Sick::new(harness.crash(|| false)).opens();
    assert_eq!((harness.chains().len(), harness.wal.hard_state().unwrap().claim), (5, None));
}

#[test]
fn a_batch_that_could_not_be_read_makes_the_claim_certain_once_it_can() {
    for closed in [false, true] {
        let (device, blind) = started_blind(closed, 3);
        assert_eq!((blind.chains.len(), blind.claim), (3, not_certain(if closed { 8 } else { 6 })));
        let (harness, _) = Sick::new(device).opens();
        let found = outcome(&harness);
        assert_eq!((found.chains, found.claim), (blind.chains, certain(1, 8)), "closed {closed}");
        assert_eq!(found.salvage.len(), 1);
    }
}

/// The hard state vouched for the batch, and the device answers with prior content where it was.
#[test]
fn what_was_vouched_for_and_reads_blank_keeps_the_claim() {
    let (mut device, blind) = started_blind(true, 3);
    let (_, slots) = four_batches(true);
    device.corrupt(&slots[3].0, slots[3].1, |bytes| bytes.fill(0), BLOCK_BYTES);
    let (harness, _) = Sick::new(device).opens();
    assert_eq!(outcome(&harness), blind);
}

#[test]
fn damage_of_any_kind_in_the_log_that_was_keeps_the_claim() {
    let (device, blind) = started_blind(false, 3);
    let (_, slots) = four_batches(false);
    let (name, end) = (slots[0].0.clone(), slots[3].1 + BLOCK_BYTES);
    for damage in 0..5 {
        let mut sick = Sick::new(device.clone());
        match damage {
            // The place reads as something else, or cannot be read again.
            0 => sick.device.corrupt(&name, end, |bytes| bytes.fill(0x3c), SECTOR_BYTES),
            1 => sick.unreadable.push((name.clone(), end as u64)),
            2 => sick.unreadable.push((name.clone(), slots[3].1 as u64)),
            // A batch that the log holds, or what tells where its epoch began.
            3 => sick.flip(&name, slots[1].1 + ENVELOPE_BYTES + 600),
            _ => sick.flip(&name, 9),
        }
        let (harness, _) = sick.opens();
        let claim = outcome(&harness).claim.expect("the claim stays");
        assert!(!claim.certain && claim.last >= blind.claim.unwrap().last, "damage {damage}: {claim:?}");
    }
}

#[test]
fn a_claim_under_which_other_batches_were_appended_or_some_were_cut_off_is_not_settled() {
    for cut in [false, true] {
        let (sick, slots) = still_blind();
        let (mut harness, _) = sick.opens();
        if cut {
            harness.wal.truncate_after(&mut harness.disk, LogIndex(4));
            harness.settle();
        } else {
            // Not what stood there.
            harness.append_durably(2, 1, 100, 7);
        }
        let (harness, _) = Sick::new(harness.crash(|| false)).opens();
        let found = outcome(&harness);
        assert_eq!(found.claim.map(|claim| claim.certain), Some(false), "cut {cut} {slots:?}");
    }
}

/// Under the claim, the log was given back what it had held; and what came after.
#[test]
fn a_claim_under_which_the_log_got_its_own_batches_back_ends_with_what_it_holds() {
    for salts in [&[3][..], &[3, 9]] {
        let (sick, _) = still_blind();
        let mut harness = sick.start();
        harness.open();
        for salt in salts {
            harness.append_durably(1, 2, 400, *salt);
        }
        let chains = harness.chains();
        let (harness, _) = Sick::new(harness.crash(|| false)).opens();
        let found = outcome(&harness);
        assert_eq!((found.chains, found.claim), (chains, None), "{salts:?}");
    }
}

/// The process before the blind one died when it had saved its cut and not begun a segment.
#[test]
fn a_claim_that_follows_an_epoch_without_a_segment_is_not_settled() {
    let (device, slots) = four_batches(false);
    let mut found = 0;
    for operations in 0..200 {
        let mut harness = Harness::start(device.clone());
        harness.turn();
        if !(0..operations).all(|_| harness.step()) {
            break;
        }
        let cut = harness.crash(|| true);
        let copies = ["hard-a", "hard-b"].map(|name| read_hard_state(cut.content(name)).unwrap().epoch);
        let mut segments = cut.names();
        segments.retain(|name| name.ends_with(".wal"));
        let headed =
            |name: &String| read_segment_header(cut.content(name)).is_ok_and(|header| header.epoch == 2);
        if copies != [2, 2] || segments.iter().any(headed) {
            continue;
        }
        found += 1;
        for lost in [false, true] {
            let mut sick = Sick::new(cut.clone());
            sick.unreadable.push((slots[3].0.clone(), slots[3].1 as u64));
            let (harness, _) = sick.opens();
            assert_eq!(outcome(&harness).claim, not_certain(8));
            let mut device = harness.crash(|| false);
            if lost {
                device.corrupt(&slots[3].0, slots[3].1, |bytes| bytes.fill(0), BLOCK_BYTES);
            }
            let (harness, _) = Sick::new(device).opens();
            assert_eq!(outcome(&harness).claim, not_certain(8));
        }
    }
    assert!(found > 0);
}

fn still_blind() -> (Sick, Vec<(String, usize)>) {
    let (device, slots) = four_batches(false);
    let mut sick = Sick::new(device);
    sick.unreadable.push((slots[3].0.clone(), slots[3].1 as u64));
    let (harness, _) = sick.clone().opens();
    assert_eq!(outcome(&harness).claim, not_certain(6));
    sick.device = harness.crash(|| false);
    (sick, slots)
}

/// A start under the claim meets damage again, behind what it appended: what the claim is about is no longer one log.
#[test]
fn a_claim_that_is_two_in_one_is_not_settled() {
    let (device, _) = started_blind(false, 3);
    let (_, slots) = four_batches(false);
    let mut sick = Sick::new(device);
    sick.unreadable.push((slots[3].0.clone(), slots[3].1 as u64));
    let (mut harness, _) = sick.clone().opens();
    harness.append_durably(2, 1, 100, 7);
    let name = last_segment(&harness);
    assert_ne!(name, slots[0].0);
    let at = slots_start(harness.disk.device.content(&name).len() as u64) as usize;
    sick.device = harness.crash(|| false);
    sick.unreadable.push((name, (at + BLOCK_BYTES) as u64));
    let (harness, _) = sick.opens();
    assert!(!harness.wal.hard_state().unwrap().claim_may_settle);
    // All can be read again, and the log of both epochs has an end; what the first claim stood for is not known from it.
    let (harness, _) = Sick::new(harness.crash(|| false)).opens();
    assert_eq!(outcome(&harness).claim.map(|claim| claim.certain), Some(false));
}

#[test]
fn a_start_that_settles_a_claim_and_crashes_after_any_operation_is_begun_or_finished_by_the_next() {
    for expected in [None, certain(1, 8)] {
        let (sick, _) = still_blind();
        let mut device = sick.device.clone();
        if expected.is_none() {
            let mut harness = sick.start();
            harness.open();
            harness.append_durably(1, 2, 400, 3);
            device = harness.crash(|| false);
        }
        for survives in [false, true] {
            for operations in 0.. {
                let mut harness = Harness::start(device.clone());
                harness.turn();
                let finished = !(0..operations).all(|_| harness.step());
                let (harness, _) = Sick::new(harness.crash(|| survives)).opens();
                assert_eq!(outcome(&harness).claim, expected, "after {operations} operations");
                if finished {
                    assert!(operations > 20, "the start was exercised: {operations}");
                    break;
                }
            }
        }
    }
}

/// A rebuild copies what it can read. What it cannot must not become blank, or the next start would take it for the end.
#[test]
fn a_rebuild_of_a_segment_with_an_unreadable_place_destroys_no_evidence() {
    let whole = Whole::new();
    let mut sick = whole.rotten(&[59]);
    let last = whole.batch(60);
    let (damaged, end) = (whole.batch(59), last.at + last.info.slot_bytes());
    assert_eq!(damaged.name, last.name);
    assert!(end + BLOCK_BYTES <= sick.device.content(&last.name).len());
    sick.unreadable.push((last.name.clone(), end as u64));
    let (mut harness, recovered) = sick.opens();
    assert!(!recovered.claim.unwrap().certain);
    told(&mut harness);
    whole.repair(&mut harness, 59);
    harness.settle();
    assert_eq!(told(&mut harness), [(true, 59)]);
    let device = harness.crash(|| false);
    let unread = &device.content(&last.name)[end..end + BLOCK_BYTES];
    assert!(unread.iter().all(|byte| *byte == 0xdb), "what could not be read is damage to every reader");
    assert!(read_segment_header(device.content(&last.name)).is_ok());
    let (mut harness, _) = Sick::new(device).opens();
    assert!(harness.wal.hard_state().unwrap().claim.is_some_and(|claim| !claim.certain));
    whole.reads_back(&mut harness, &[]);
}

/// A write of the dead process lands after the start that could not read its place: it was appended, so it may count.
#[test]
fn a_late_write_to_the_place_makes_the_claim_certain() {
    let mut harness = Harness::fresh();
    harness.append_durably(1, 2, 400, 0);
    let (name, at) = slot_at(&harness, LogIndex(1));
    let info = harness.append(1, 2, 400, 1);
    let before = harness.disk.device.clone();
    let last = harness.disk.queue.len() - 1;
    harness.disk.complete(last, Fate::Happen);
    let slot = at + BLOCK_BYTES;
    let after = harness.disk.device.content(&name)[slot..slot + BLOCK_BYTES].to_vec();
    let mut sick = Sick::new(before);
    sick.unreadable.push((name.clone(), slot as u64));
    let (harness, _) = sick.opens();
    assert_eq!(outcome(&harness).claim, not_certain(2));
    let mut device = harness.crash(|| false);
    device.corrupt(&name, slot, |bytes| bytes.copy_from_slice(&after), BLOCK_BYTES);
    let (harness, _) = Sick::new(device).opens();
    let found = outcome(&harness);
    assert_eq!((found.claim, found.salvage), (certain(1, 4), vec![info]));
}
