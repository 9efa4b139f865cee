//! Which segment a file is whose header was written over by another's, together with a batch.

use super::{Sick, certain, sixty_batches};
use crate::format::slots_start;
use ringraft_block::{BLOCK_BYTES, LogIndex};

/// The older file looks like the younger segment as far as its header and its first batch go. What else it holds tells which it is.
#[test]
fn a_header_and_a_slot_of_a_younger_segment_over_an_older_file_do_not_make_it_that_segment() {
    let (device, names) = sixty_batches();
    for (younger, from) in names.iter().enumerate() {
        for to in &names[..younger] {
            let first = slots_start(device.content(from).len() as u64) as usize;
            let block = |at: usize| device.content(from)[at..at + BLOCK_BYTES].to_vec();
            let mut sick = Sick::new(device.clone());
            for (at, copied) in [(0, block(0)), (first, block(first))] {
                sick.device.corrupt(to, at, |bytes| bytes.copy_from_slice(&copied), BLOCK_BYTES);
            }
            let (harness, recovered) = sick.opens();
            let claim = recovered.claim.expect("the first batch of the older segment is gone");
            assert!(!claim.certain || Some(claim) == certain(3, 60), "{from} over {to}: {claim:?}");
            // All is there but the batch that was written over.
            let kept = harness.chains().len() + harness.wal.salvage().count();
            assert!(kept >= 59, "{from} over {to}: {kept} of 60 batches are found");
            assert!(harness.wal.salvage().any(|info| info.last == LogIndex(60)), "{from} over {to}");
        }
    }
}
