//! What a newer build has written is no damage: a start says which build to run, and leaves every byte as it is.

use super::four_batches;
use crate::WalError;
use crate::format::{
    EnvelopeError, FORMAT_VERSION, HARD_STATE_FILE_BYTES, HardStateError, ImageError, LAYOUTS,
    SegmentHeaderError, read_envelope, reseal,
};
use crate::testing::{Device, Harness};
use ringraft_block::{BLOCK_BYTES, SECTOR_BYTES, crc32c};
use std::ops::Range;

const NEWER: u16 = FORMAT_VERSION + 1;

fn field(layout: &str, name: &str) -> Range<usize> {
    let (_, fields) = LAYOUTS.iter().find(|(other, _)| *other == layout).unwrap();
    let field = fields.iter().find(|field| field.name == name).unwrap();
    field.at..field.at + field.bytes
}

/// Makes `bytes` one of a newer build, all of which the checksum covers.
fn make_newer(layout: &str, bytes: &mut [u8]) {
    bytes[field(layout, "version")].copy_from_slice(&NEWER.to_le_bytes());
    bytes[field(layout, "crc")].fill(0);
    let crc = crc32c(bytes);
    bytes[field(layout, "crc")].copy_from_slice(&crc.to_le_bytes());
}

/// Starts on the device twice; each time it must be refused, and all files must stay as they are.
fn refused(device: &Device) -> WalError {
    let mut harness = Harness::start(device.clone());
    let error = harness.stopped();
    assert!(
        error.to_string().contains("use the build that wrote it") || error.to_string().contains("upgrade")
    );
    let left = harness.crash(|| true);
    assert!(left.image() == device.image(), "{error}: nothing is touched");
    assert_eq!(Harness::start(left).stopped(), error);
    error
}

/// Taken for rot, such a batch cut the log: a claim, and in the end another batch in its place.
#[test]
fn a_batch_in_an_envelope_of_a_newer_version_refuses_the_start() {
    for closed in [true, false] {
        let (device, slots) = four_batches(closed);
        for (ordinal, (name, at)) in slots.iter().enumerate() {
            let mut newer = device.clone();
            newer.corrupt(name, *at, |bytes| make_newer("envelope", bytes), SECTOR_BYTES);
            let expected = WalError::EnvelopeForeign {
                file: name.clone(),
                offset: *at as u64,
                error: EnvelopeError::Version(NEWER),
            };
            assert_eq!(refused(&newer), expected);
            // Also behind damage, and where the segment's own header is lost.
            let mut damaged = newer.clone();
            damaged.corrupt(name, 20, |bytes| bytes[0] ^= 1, 1);
            assert_eq!(refused(&damaged), expected);
            if ordinal > 0 {
                newer.corrupt(&slots[0].0, slots[0].1 + 60, |bytes| bytes[0] ^= 1, 1);
                assert_eq!(refused(&newer), expected);
            }
        }
    }
}

/// A command may hold the bytes of another segment, of whatever build. When the rest of its slot was torn, or the header of its segment
/// is lost, it was taken for a batch of that build.
#[test]
fn what_a_command_holds_is_no_batch_of_a_newer_build() {
    let (device, slots) = four_batches(false);
    let (name, at) = &slots[3];
    for (generation, offset) in [(0, 0), (1, 0), (0, BLOCK_BYTES)] {
        let mut device = device.clone();
        let mut held = device.content(name)[*at..at + SECTOR_BYTES].to_vec();
        held[field("envelope", "generation")][0] ^= generation;
        let stands_at = (at + BLOCK_BYTES) as u64;
        let says = stands_at - offset as u64;
        held[field("envelope", "offset")].copy_from_slice(&says.to_le_bytes());
        make_newer("envelope", &mut held);
        device.corrupt(name, stands_at as usize, |bytes| bytes.copy_from_slice(&held), SECTOR_BYTES);
        device.corrupt(name, *at, |bytes| bytes.fill(0), SECTOR_BYTES);
        match generation == 0 && offset == 0 {
            // Nothing tells it from one that such a build has written.
            true => drop(refused(&device)),
            false => assert_eq!(Harness::start(device).open().report.damage.len(), 0),
        }
    }
}

#[test]
fn a_batch_whose_image_says_what_this_build_does_not_know_refuses_the_start() {
    let (device, slots) = four_batches(true);
    for (name, at) in &slots {
        let bytes = read_envelope(&device.content(name)[*at..]).unwrap().image_bytes as usize;
        for (what, value, error) in [
            ("version", NEWER as u8, ImageError::Version(NEWER)),
            ("features", 4, ImageError::Features(4)),
            ("kind", 77, ImageError::Kind(77)),
        ] {
            let mut newer = device.clone();
            let change = |image: &mut [u8]| {
                image[field("image header", what).start] = value;
                reseal(image);
            };
            newer.corrupt(name, at + SECTOR_BYTES, change, bytes);
            let expected = WalError::ImageForeign { file: name.clone(), offset: *at as u64, error };
            assert_eq!(refused(&newer), expected);
        }
    }
}

#[test]
fn a_segment_of_a_newer_version_refuses_the_start() {
    let (device, slots) = four_batches(true);
    let (name, _) = &slots[0];
    let mut newer = device.clone();
    newer.corrupt(name, 0, |bytes| make_newer("segment header", bytes), SECTOR_BYTES);
    let error = SegmentHeaderError::Version(NEWER);
    assert_eq!(refused(&newer), WalError::SegmentForeign { file: name.clone(), error });
}

/// One that was longer than this build's was said to be lost, and the node to be wiped.
#[test]
fn a_hard_state_of_a_newer_version_is_neither_repaired_from_the_other_copy_nor_lost() {
    let (device, _) = four_batches(true);
    let total_bytes = field("hard state file header", "total_bytes");
    let total = |bytes: &[u8]| u32::from_le_bytes(bytes[total_bytes.clone()].try_into().unwrap()) as usize;
    for copies in [&["hard-a"][..], &["hard-b"], &["hard-a", "hard-b"]] {
        for longer in [false, true] {
            let mut newer = device.clone();
            for name in copies {
                let change = |bytes: &mut [u8]| {
                    let covered = total(bytes);
                    make_newer("hard state file header", &mut bytes[..covered]);
                    if longer {
                        let bytes = &mut bytes[total_bytes.clone()];
                        bytes.copy_from_slice(&(HARD_STATE_FILE_BYTES as u32 + 1).to_le_bytes());
                    }
                };
                newer.corrupt(name, 0, change, HARD_STATE_FILE_BYTES);
            }
            let error = refused(&newer);
            let expected = HardStateError::Version(NEWER);
            assert!(
                matches!(&error, WalError::HardStateForeign { file, error }
                    if copies.contains(file) && *error == expected),
                "{error}"
            );
        }
    }
}

/// It was taken for a newer and longer one, which no checksum proves, and kept a node with another, intact copy from starting.
#[test]
fn garbage_behind_the_magic_of_a_hard_state_is_no_newer_version() {
    let (device, _) = four_batches(true);
    let mut harness = Harness::start(device.clone());
    harness.open();
    let last = harness.wal.last_index();
    let (version, total) =
        (field("hard state file header", "version"), field("hard state file header", "total_bytes"));
    for name in ["hard-a", "hard-b"] {
        for (version_of, total_of) in [(14_593_u16, 3_000_000_000_u32), (14_593, 40_000), (2, 3_000_000_000)]
        {
            let mut damaged = device.clone();
            let change = |bytes: &mut [u8]| {
                bytes[version.clone()].copy_from_slice(&version_of.to_le_bytes());
                bytes[total.clone()].copy_from_slice(&total_of.to_le_bytes());
            };
            damaged.corrupt(name, 0, change, HARD_STATE_FILE_BYTES);
            let mut harness = Harness::start(damaged);
            harness.open();
            assert_eq!(harness.wal.last_index(), last, "{name} of {version_of}, {total_of} bytes");
        }
    }
}
