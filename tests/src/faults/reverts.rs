//! Sectors that revert, at rest, to what a former life of their segment left there: writes that were lost although they were
//! told to be durable.
//!
//! Each looks like a write that never happened, and the envelopes behind it prove that it had: so a start must report damage,
//! and bring every other batch, in the log or beside it.

use super::images::{Options, recycled};
use super::log::{LogRun, config, quiet};
use super::threads::Tally;
use crate::sim::buffer::SimBuf;
use crate::sim::disk::{DiskConfig, Rot};
use crate::sim::rng::Rng;
use ringraft_block::{BLOCK_BYTES, Pool, SECTOR_BYTES};
use ringraft_wal::format::{BatchInfo, ENVELOPE_BYTES, read_envelope};

/// So many batches are written over the former life.
const BATCHES: u64 = 8;

/// Reverts every run of sectors of every batch but the last.
///
/// # Panics
/// When the log does not get as far as this needs.
#[must_use]
pub fn run(seed: u64) -> Tally {
    let pool: Pool<SimBuf> = Pool::new(4 << 20);
    let options = Options { seed, ..Options::default() };
    let (mut run, file) = recycled(&options);
    let content = |run: &LogRun| run.state.borrow().content(&file).expect("it is in service");
    let former = content(&run);
    let mut rng = Rng::new(seed);
    for salt in 0..BATCHES {
        assert!(run.append(1, BLOCK_BYTES << rng.below(2), salt), "the log is ready");
        run.settle();
    }
    let present = content(&run);
    let written: Vec<_> = run.batches().iter().map(|batch| batch.info).collect();
    let mut tally = Tally::default();
    for at in (0..present.len()).step_by(BLOCK_BYTES) {
        let Ok(envelope) = read_envelope(&present[at..]) else { continue };
        let last = written.last().is_some_and(|last| last.chain == envelope.chain);
        if last || !written.iter().any(|info| info.chain == envelope.chain) {
            continue;
        }
        let counts = ENVELOPE_BYTES + envelope.image_bytes as usize;
        let sectors = counts.div_ceil(SECTOR_BYTES);
        for (from, to) in (0..sectors).flat_map(|from| (from + 1..=sectors).map(move |to| (from, to))) {
            let range = at + from * SECTOR_BYTES..at + to * SECTOR_BYTES;
            let within = range.start..range.end.min(at + counts);
            if former[within.clone()] == present[within] {
                continue;
            }
            let context = quiet();
            let image = run.state.borrow().with_config(&context, Rng::new(seed), DiskConfig::instant());
            let rot = Rot::Content(former[range.clone()].to_vec());
            image.borrow_mut().damage(&file, range.start as u64, range.len(), &rot);
            let mut start = LogRun::start(&context, &image, config(seed), &pool, run.model.clone());
            start.settle();
            let there: Vec<_> = start.wal.batches().chain(start.wal.salvage()).collect();
            let lost = |info: &&BatchInfo| {
                info.chain != envelope.chain && !there.iter().any(|found| found.chain == info.chain)
            };
            let wrong = if let Some(error) = &start.poisoned {
                Some(format!("the log does not open: {error}"))
            } else if !start.damaged {
                Some("it is taken for a write that never happened".to_owned())
            } else {
                written.iter().find(lost).map(|info| format!("{info:?} is lost with it"))
            };
            let name = || format!("reverts, seed {seed}, {file} {range:?}, index {}", envelope.first);
            tally.count(wrong.map(|wrong| format!("{}: {wrong}", name())));
        }
    }
    tally
}
