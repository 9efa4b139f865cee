//! A claim that turns out to be answered by the disk itself: the one block that could not be read when it was made holds a batch.
//!
//! A read error that passes leaves a claim that is not certain: nobody could tell whether the log went on there. The segments that the log
//! had then are kept as long as the claim is in force, so a later start reads them once more, and folds them as if there
//! were no claim ([`former`]). When that gives a log without any damage, which reaches as far as anything vouched for when the
//! claim was made, the log of that time is known, and where it ended ([`settle`]). When the present log holds all of that, the
//! claim ends; otherwise it becomes certain.
//!
//! A claim that is too low would let the node vote away what it acknowledged, so this is done in one case only, in which nothing is believed
//! that an ordinary start would not believe. When the claim was made ([`HardState::claim_may_settle`] says so):
//! - no other claim was in force;
//! - one block could not be read, that of the envelope directly behind the last batch of the log, and nothing else was damaged or
//!   doubtful. So every other block was seen, blank ones too, and `claim.last` is the highest index that they, hard state or cuts named
//!   or vouched for. The fold takes it for the witness.
//!
//! And now:
//! - This start has found no damage, neither in the log as it is nor in the former one: no sector that cannot be read, no file without a
//!   place, no missing segment, no slot that is neither whole nor exactly what a torn write leaves.
//! - The block holds the intact batch that continues the log. That it reads blank proves nothing: what could not be read is often
//!   blank when it was remapped, or when the disk was copied to another. The end of the log is then blank in places that could be read
//!   both times.
//! - Nothing of what the claim left was purged or cut off for good, and what was appended is the former log's own: by the chain, one of
//!   the two logs begins with all of the other.
//! - The epoch that the claim ended has left its segment, which tells where it cut the log.
//!
//! What stays are the residuals of the contract: a device that answers with prior content where it held an acknowledged batch, and a
//! last segment whose very name is gone.

use super::Scanned;
use super::scan::{LogScan, ScanOutcome};
use crate::format::{Claim, Cut, HardState};
use crate::index::Place;
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
    let is_whole = |outcome: &ScanOutcome| outcome.damage.is_empty() && outcome.unread_blocks == 0;
    let is_sound = is_whole(now) && is_whole(&former) && claim == hard_state.claim;
    if !is_sound || end.index < hard_state.claim_cut || !holds_what_was_unread(&former, hard_state.claim_cut)
    {
        return claim;
    }
    let ended =
        |segment: &Scanned| !segment.header_lost && segment.header.epoch + 1 == hard_state.claim_epoch;
    if !former.segments.iter().any(ended) {
        return claim;
    }
    if now.index.chain_at(was.index) == Some(was.chain) {
        None
    } else if former.index.chain_at(end.index) == Some(end.chain) {
        Some(Claim { term: was.term, last: was.index, certain: true })
    } else {
        claim
    }
}

/// Whether a batch stands in the slot directly behind the one that ends with `claim_cut`. False as well when that one was purged: then the
/// segments of the former log may have been left out.
fn holds_what_was_unread(former: &ScanOutcome, claim_cut: LogIndex) -> bool {
    let index = &former.index;
    let behind = index.ordinal_starting_at(claim_cut.next());
    let two = behind.and_then(|behind| Some((index.at(behind.checked_sub(1)?)?, index.at(behind)?)));
    two.is_some_and(|((last, at), (_, place))| {
        let behind = at.offset + last.slot_bytes() as u64;
        last.last == claim_cut && place == Place { generation: at.generation, offset: behind }
    })
}
