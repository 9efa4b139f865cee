//! Bits that are flipped on their way where no checksum of the transport sees it (FAULTS 23).

use super::*;
use ringraft_tests::sim::link::Sent;
use std::time::Duration;

/// In a header, where it begins and in the middle of it; in the payload; in what ends it, which are checksums of an image.
const PLACES: [fn(usize) -> usize; 7] =
    [|_| 0, |_| 5, |_| 60, |_| 127, |bytes| bytes / 2, |bytes| bytes - 5, |bytes| bytes - 1];

/// The session over which it came ends, which is counted; what it should have brought comes over a later one.
#[test]
fn a_flipped_bit_anywhere_in_a_batchs_image_is_refused_and_counted_and_the_batch_comes_by_a_later_session() {
    for (ordinal, at) in PLACES.into_iter().enumerate() {
        let (mut rig, leader) = Rig::started(3);
        let first = rig.commit(leader, 20_000);
        rig.run_until("all have it", |rig| (0..3).all(|node| rig.status(node).durable >= first));
        rig.fabric.borrow_mut().flip_next(Sent::Image, at);
        let index = rig.commit(leader, 20_000);
        assert_eq!(rig.fabric.borrow().flips(), 1);
        rig.run_until("all have it", |rig| (0..3).all(|node| rig.status(node).applied >= index));
        let damaged: Vec<u64> = (0..3).map(|node| rig.status(node).frames_damaged).collect();
        assert_eq!(damaged.iter().sum::<u64>(), 1, "place {ordinal}: {damaged:?}");
        assert_eq!(damaged[leader], 0, "whoever received it counts it");
        assert!(!rig.fabric.borrow().goes_on_after_a_flip());
        let states: Vec<_> = (0..3).map(|node| rig.process(node).driver.machine().hash).collect();
        assert!(states.windows(2).all(|pair| pair[0] == pair[1]), "nothing damaged is applied");
        assert_eq!(rig.leader(), Some(leader));
    }
}

#[test]
fn a_flipped_bit_anywhere_in_a_frames_header_or_body_is_refused_and_counted() {
    let places: [fn(usize) -> usize; 6] =
        [|_| 0, |_| 4, |_| 20, |_| 47, |bytes| bytes / 2, |bytes| bytes - 1];
    for (ordinal, at) in places.into_iter().enumerate() {
        let (mut rig, leader) = Rig::started(3);
        let first = rig.commit(leader, 100);
        rig.run_until("all have it", |rig| (0..3).all(|node| rig.status(node).durable >= first));
        rig.fabric.borrow_mut().flip_next(Sent::Frame, at);
        rig.run_until("it is sent", |rig| rig.fabric.borrow().flips() == 1);
        rig.run_until("it is counted", |rig| {
            (0..3).map(|node| rig.status(node).frames_damaged).sum::<u64>() == 1
        });
        let leader = rig.run_until_led();
        let index = rig.commit(leader, 100);
        rig.run_until("all have it", |rig| (0..3).all(|node| rig.status(node).applied >= index));
        assert!(!rig.fabric.borrow().goes_on_after_a_flip(), "place {ordinal}");
        let damaged: u64 = (0..3).map(|node| rig.status(node).frames_damaged).sum();
        assert_eq!(damaged, 1, "place {ordinal}");
    }
}

#[test]
fn a_flipped_bit_anywhere_in_a_piece_of_a_snapshot_is_refused_and_counted_and_the_transfer_goes_on() {
    for (ordinal, at) in PLACES.into_iter().enumerate() {
        let mut rig = Rig::seeded(3, 3);
        rig.ballast = 400_000;
        let config = |node| Config {
            log_retention_bytes: 0,
            snapshot_bytes_per_second: 0,
            election_timeout: Duration::from_secs(1),
            ..config(node, 3)
        };
        (0..3).for_each(|node| rig.boot(config(node)));
        let leader = rig.run_until_led();
        let away = (leader + 1) % 3;
        rig.kill(away);
        for _ in 0..20 {
            rig.commit(leader, 300);
        }
        let last = rig.snapshot(leader);
        rig.fabric.borrow_mut().flip_next(Sent::Piece, at);
        rig.boot(config(away));
        rig.run_until("it has been given it", |rig| rig.status(away).applied >= last);
        assert_eq!(rig.fabric.borrow().flips(), 1, "place {ordinal}");
        assert_eq!(rig.status(away).frames_damaged, 1, "place {ordinal}");
        let state = |rig: &mut Rig, node: usize| {
            let machine = rig.process(node).driver.machine();
            (machine.count, machine.hash, machine.restored)
        };
        let (count, hash, _) = state(&mut rig, leader);
        assert_eq!(state(&mut rig, away), (count, hash, 1), "place {ordinal}");
        assert!(!rig.fabric.borrow().goes_on_after_a_flip());
    }
}
