//! Zeros for segments ahead, while the log appends: no more than it bears, and no fewer than it needs.

use crate::WalConfig;
use crate::WalEvent;
use crate::disk::{DiskOp, DiskOpId};
use crate::ops::{Owner, owner_of};
use crate::testing::{Device, Fate, Harness, config};
use std::collections::BTreeMap;

const SEGMENT_BYTES: u64 = 1 << 20;
const SLOT_BYTES: u64 = 8192;

/// A log with its pool full, in its first segment.
fn at_rest(segments_ahead: usize) -> Harness {
    // What leaves service is not used again, so that every other segment is made.
    let recycled_segments_max = 0;
    let config =
        WalConfig { segment_bytes: SEGMENT_BYTES, segments_ahead, recycled_segments_max, ..config() };
    let mut harness = Harness::start_with(Device::default(), config);
    assert!(harness.open().fresh);
    assert_eq!(harness.wal.stats().segments_ahead, segments_ahead);
    harness
}

/// Appends a slot of [`SLOT_BYTES`].
fn append(harness: &mut Harness) {
    assert!(harness.wal.is_ready_for(SLOT_BYTES as usize), "an append never waits");
    let salt = harness.wal.last_index().get();
    assert_eq!(harness.append(1, 1, 6000, salt).slot_bytes() as u64, SLOT_BYTES);
}

/// Lets everything happen that was submitted, while no time passes.
fn drain(harness: &mut Harness) {
    harness.turn();
    while harness.step() {}
    harness.turn();
}

/// Appends, letting everything happen in between, until the log has gone on in another segment, whose successor is made.
fn roll_over(harness: &mut Harness) {
    let before = harness.wal.rollovers();
    while harness.wal.rollovers() == before {
        append(harness);
        drain(harness);
    }
}

/// The pieces of zeros that were submitted while somebody looked.
#[derive(Default)]
struct Zeros(BTreeMap<DiskOpId, u64>);

impl Zeros {
    fn look(&mut self, harness: &Harness) {
        for (id, op) in &harness.disk.queue {
            if let DiskOp::Write { bytes, .. } = op
                && owner_of(*id) == Some(Owner::Maker)
            {
                self.0.insert(*id, *bytes as u64);
            }
        }
    }

    fn drain(&mut self, harness: &mut Harness) {
        harness.turn();
        self.look(harness);
        while harness.step() {
            self.look(harness);
        }
    }

    fn bytes(&self) -> u64 {
        self.0.values().sum()
    }

    fn largest(&self) -> u64 {
        self.0.values().copied().max().unwrap_or(0)
    }
}

#[test]
fn while_the_log_appends_at_most_two_bytes_of_zeros_follow_each_of_its_own() {
    for segments_ahead in 2..5 {
        let mut harness = at_rest(segments_ahead);
        let mut zeros = Zeros::default();
        while harness.wal.rollovers() == 0 {
            append(&mut harness);
            zeros.drain(&mut harness);
        }
        assert_eq!(zeros.bytes(), 0, "the pool was full");
        // The append that rolled over came before the file was there.
        let before = harness.wal.stats();
        for _ in 0..6 * SEGMENT_BYTES / SLOT_BYTES {
            append(&mut harness);
            zeros.drain(&mut harness);
            let appended = harness.wal.stats().written_bytes - before.written_bytes;
            assert!(zeros.bytes() <= 2 * appended, "{} for {appended}", zeros.bytes());
        }
        let after = harness.wal.stats();
        assert!(zeros.largest() <= 64 << 10, "in small pieces: {}", zeros.largest());
        assert!(after.rollovers >= 6 && after.segments_made >= before.segments_made + after.rollovers - 1);
        assert!(after.segments_ahead + 1 >= segments_ahead, "{after:?}");
    }
}

/// The device prefers appends: of what is made ahead, it does one operation for eight of them. The pieces grow.
#[test]
fn an_append_never_waits_for_zeros_that_were_held_back() {
    for (segments_ahead, appends) in [(2, 1), (2, 8), (3, 8), (4, 8)] {
        let mut harness = at_rest(segments_ahead);
        let mut zeros = Zeros::default();
        for round in 0..20 * SEGMENT_BYTES / SLOT_BYTES {
            append(&mut harness);
            harness.turn();
            zeros.look(&harness);
            let of_maker = |id: DiskOpId| owner_of(id) == Some(Owner::Maker);
            while let Some(at) = harness.disk.queue.iter().position(|(id, _)| !of_maker(*id)) {
                harness.disk.complete(at, Fate::Happen);
                harness.turn();
                zeros.look(&harness);
            }
            if round % appends == 0 {
                harness.step();
                zeros.look(&harness);
            }
        }
        assert!(harness.wal.rollovers() >= 19);
        assert!(appends == 1 || zeros.largest() > 64 << 10, "{}", zeros.largest());
    }
}

/// Each truncation takes a segment, and appends nothing that zeros could follow.
#[test]
fn without_a_segment_to_go_on_in_nothing_is_held_back() {
    let mut harness = at_rest(2);
    append(&mut harness);
    drain(&mut harness);
    let made = harness.wal.stats().segments_made;
    for truncations in 1..=6 {
        let start = harness.wal.log_start().index;
        harness.wal.truncate_after(&mut harness.disk, start);
        drain(&mut harness);
        append(&mut harness);
        drain(&mut harness);
        // What it goes on in came from the pool, or was filled at once.
        assert!(harness.wal.stats().segments_made + 2 >= made + truncations);
    }
    assert!(harness.wal.is_filling(), "the one after the next waits");
}

#[test]
fn a_log_that_appends_little_fills_its_pool_in_steps_and_an_idle_one_at_full_speed() {
    let mut harness = at_rest(3);
    let made = harness.wal.stats().segments_made;
    roll_over(&mut harness);
    let mut zeros = Zeros::default();
    for step in 1..=4 {
        append(&mut harness);
        zeros.drain(&mut harness);
        assert!(harness.wal.is_filling() && harness.disk.queue.is_empty(), "it waits");
        harness.wal.fill_step(&mut harness.disk, 128 << 10);
        zeros.drain(&mut harness);
        assert_eq!(zeros.bytes(), step * (128 << 10));
    }
    harness.wal.fill_step(&mut harness.disk, 0);
    zeros.drain(&mut harness);
    assert_eq!(zeros.bytes(), SEGMENT_BYTES, "to the end, without another step");
    assert_eq!((zeros.largest(), harness.wal.stats().segments_made), (256 << 10, made + 1));
    assert!(!harness.wal.is_filling());
    assert_eq!(harness.wal.stats().segments_ahead, 3);
}

#[test]
fn closing_gives_up_a_segment_whose_zeros_wait() {
    let mut harness = at_rest(3);
    roll_over(&mut harness);
    append(&mut harness);
    drain(&mut harness);
    assert!(harness.wal.is_filling() && harness.disk.queue.is_empty(), "it waits");
    let waiting = |harness: &Harness| harness.disk.device.names().iter().any(|name| name.ends_with(".new"));
    assert!(waiting(&harness));
    harness.wal.close(&mut harness.disk);
    drain(&mut harness);
    assert!(matches!(harness.events.back(), Some(WalEvent::Closed)), "{:?}", harness.events);
    assert!(!waiting(&harness), "the half-made file is removed");
    assert_eq!(harness.disk.open_files(), 0);
}
