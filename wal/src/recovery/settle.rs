//! A claim that turns out to be answered by the disk itself: what could not be read when it was made can be read now.
//!
//! A read error that passes leaves a claim that is not certain: nobody could tell whether the log went on there. The segments that the log
//! had then are kept as long as the claim is in force, so a later start reads them once more, and folds them as if there
//! were no claim ([`former`]). When that gives a log without any damage, which reaches as far as anything vouched for when the
//! claim was made, the log of that time is known, and where it ended ([`settle`]). When the present log holds all of that, the
//! claim ends; otherwise it becomes certain.
//!
//! A claim that is too low would let the node vote away what it acknowledged, so it stays as it is unless all of these hold:
//! - It stands for one log: no earlier claim was in force when it was made, or nothing had been appended under that one
//!   ([`HardState::claim_may_settle`] says so).
//! - `claim.last` is no guess: it is the highest index that hard state, cuts and envelopes vouched for or named. The fold takes it
//!   for the witness.
//! - Nothing of what the claim left was cut off since, and what was appended is the former log's own: by the chain, one of the two logs
//!   begins with all of the other.
//! - This start has found no damage, neither in the log as it is nor in the former one: no sector that cannot be read, no file without a
//!   place, no missing segment, no slot that is neither whole nor exactly what a torn write leaves.
//! - The epoch that the claim ended has left its segment, which tells where it cut the log. A process that died before it headed one
//!   leaves none, and has appended nothing: then its cut is part of what vouched for `claim.last`, so a former log that ends just
//!   there holds no less than was left of it. And where the present log has all of the former one, no cut could have left more.
//!
//! What stays are the residuals of the contract: a device that answers with prior content where it held an acknowledged batch, and a
//! last segment whose very name is gone.

use super::scan::{LogScan, ScanOutcome};
use crate::format::{Claim, Cut, HardState};
use ringraft_block::LogIndex;

/// The fold of the log as it was when the claim was made, if the claim is one that may be settled.
pub(super) fn former(hard_state: &HardState) -> Option<LogScan> {
    let claim = hard_state.claim.filter(|_| hard_state.claim_may_settle)?;
    Some(LogScan::new(HardState {
        // Its cut is no longer known, but for what the segments tell.
        epoch: 0,
        cut: Cut::default(),
        witness: claim.last,
        claim: None,
        claim_epoch: 0,
        claim_cut: LogIndex(0),
        claim_may_settle: false,
        ..hard_state.clone()
    }))
}

/// The claim that is in force from now on, given what the present log and the former one turned out to be.
pub(super) fn settle(hard_state: &HardState, now: &ScanOutcome, former: ScanOutcome) -> Option<Claim> {
    let claim = now.claim;
    let (end, was) = (now.index.end(), former.index.end());
    let is_sound = now.damage.is_empty() && former.damage.is_empty() && claim == hard_state.claim;
    if !is_sound || end.index < hard_state.claim_cut {
        return claim;
    }
    let ended = |segment: &super::Scanned| segment.header.epoch + 1 == hard_state.claim_epoch;
    let knows_its_cut =
        || former.segments.iter().any(ended) || claim.is_some_and(|claim| claim.last == was.index);
    if now.index.chain_at(was.index) == Some(was.chain) {
        None
    } else if former.index.chain_at(end.index) == Some(end.chain) && knows_its_cut() {
        Some(Claim { term: was.term, last: was.index, certain: true })
    } else {
        claim
    }
}
