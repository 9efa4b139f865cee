//! The decision table: what the slot behind the last good batch says about how the log ended.
//!
//! A sector is *prior* when it holds what it held before the segment entered service (zeros, or what a former life left), and *new* when
//! it holds what the write put there. The device writes a sector whole or not at all, so a write that never finished
//! leaves a mixture of prior and new sectors and nothing else; and a write that was acknowledged leaves new sectors
//! only. Everything else is damage. [`classify`] says which; [`dispose`] says whether the log goes on behind it.

use crate::error::DamageCause;

/// What the first sector of the slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum EnvelopeEvidence {
    /// An intact envelope that was written for this place, of the batch that follows the last good one.
    Valid,
    /// Prior content.
    Prior,
    /// An intact envelope, but of another place or another batch.
    Misplaced,
    /// Neither an intact envelope nor prior content.
    Rotten,
    /// The device returned an error.
    Unreadable,
}

/// What the image's sectors hold, judged by the length in the envelope. Meaningless unless that is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ImageEvidence {
    /// Every checksum fits, the image is the one that the envelope names, and its chain continues the log.
    Good,
    /// Every checksum fits and it is the image that the envelope names, but it does not continue the log.
    Misplaced,
    /// At least one sector is prior content where the new content differs.
    PriorRemains,
    /// Sectors are bad, and none of the bad ones is prior content; or it is intact, but another image.
    Rotten,
    /// The device returned an error for a sector, and none of the others is prior where it should not be.
    Unreadable,
}

/// What becomes of the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Disposition {
    /// The batch is a part of the log, and the log goes on behind it.
    Keep,
    /// So it is, though its bytes have to be fetched from a peer: an intact envelope tells which batch it is, how long, and what
    /// the chain is behind it.
    KeepDamaged(DamageCause),
    /// The log ends before the slot, as it did when the process died.
    End,
    /// The log has to be cut before the slot: nobody can tell what belongs here. What is intact behind it is salvage.
    Cut(DamageCause),
}

/// All that the verdict depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Evidence {
    pub(crate) envelope: EnvelopeEvidence,
    pub(crate) image: ImageEvidence,
    /// The hard state's witness, or an intact envelope further on in the same epoch, says that the log was durable
    /// through this batch.
    pub(crate) acknowledged: bool,
}

/// What recovery does about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Verdict {
    /// The batch belongs to the log.
    Accept,
    /// The log ends before this slot. Nothing from here on was acknowledged.
    Torn,
    /// Row 2: an acknowledged batch is not there. The identity is known when the envelope is.
    Lost,
    /// Row 5: which batch it was is known, but not what it says.
    ImageRotten,
    /// Row 6: what was here cannot be told.
    EnvelopeRotten,
    /// Row 6: what is here is intact and does not belong here.
    Misplaced,
}

/// What a verdict means for the log. Idempotent: what is kept is found again by the next start from the same bytes, and
/// where the log ends or is cut, the cut that is recorded makes the next start end there.
pub(crate) fn dispose(evidence: Evidence) -> Disposition {
    let known = evidence.envelope == EnvelopeEvidence::Valid && evidence.image != ImageEvidence::Misplaced;
    let damaged = |cause| if known { Disposition::KeepDamaged(cause) } else { Disposition::Cut(cause) };
    match classify(evidence) {
        Verdict::Accept => Disposition::Keep,
        Verdict::Torn => Disposition::End,
        // With a valid envelope, the slot is that of the batch which follows, and all but its bytes is known. A batch behind it
        // that continues its chain proves it once more.
        Verdict::Lost => damaged(DamageCause::Lost),
        Verdict::ImageRotten => damaged(DamageCause::ImageRotten),
        Verdict::EnvelopeRotten => damaged(DamageCause::EnvelopeRotten),
        Verdict::Misplaced => damaged(DamageCause::Misplaced),
    }
}

/// The table. Total by construction: the `match` has no wildcard on the evidence it has not decided yet.
pub(crate) fn classify(evidence: Evidence) -> Verdict {
    use EnvelopeEvidence as E;
    use ImageEvidence as I;
    match (evidence.envelope, evidence.image, evidence.acknowledged) {
        // Row 1. Envelope, image and chain are valid: the batch was written completely. Whether it was acknowledged
        // does not matter: keeping it is allowed, since it was appended, and required if it was.
        (E::Valid, I::Good, _) => Verdict::Accept,

        // Row 2. Something durable says that the log was durable through this batch, and it is not here. A write that
        // was torn by a crash cannot be the cause: it would not have been counted. The device lost it, or returned
        // old content. This row comes before those for torn writes, since a lost write looks like one.
        (_, _, true) => Verdict::Lost,

        // Row 3. The envelope's sector was never written. It belongs to the same write as the image, so that write did
        // not finish, so it was not acknowledged. What the image's sectors hold does not matter. This is also how
        // a log looks that ended cleanly. (Stated residual: a device that lost a whole acknowledged write, with
        // nothing durable after it, leaves the same picture.)
        (E::Prior, _, false) => Verdict::Torn,

        // Row 4. The envelope was written and some sector of the image was not: the same write, so it did not finish.
        (E::Valid, I::PriorRemains, false) => Verdict::Torn,

        // Row 5. The envelope is valid and the bad sectors hold neither prior nor new content: no unfinished write
        // leaves that. The batch may have been acknowledged; the envelope says which it was. A read error on a
        // sector of the image is the same: the sector may hold anything.
        (E::Valid, I::Rotten | I::Unreadable, false) => Verdict::ImageRotten,

        // Row 6. Nothing here says which batch it was: the envelope's sector holds neither prior content nor an
        // intact envelope, or the device refuses to return it.
        (E::Rotten | E::Unreadable, _, false) => Verdict::EnvelopeRotten,

        // Row 6 again. What is here is intact but was written for another place, or is another batch than the one that
        // follows, or does not continue the chain: a misdirected write overwrote the slot, or the batches before
        // it are not those that were there. What belongs here cannot be told. (Another image behind a valid envelope is
        // row 5: the envelope tells what belongs here.)
        (E::Misplaced, _, false) | (E::Valid, I::Misplaced, false) => Verdict::Misplaced,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENVELOPES: [EnvelopeEvidence; 5] = [
        EnvelopeEvidence::Valid,
        EnvelopeEvidence::Prior,
        EnvelopeEvidence::Misplaced,
        EnvelopeEvidence::Rotten,
        EnvelopeEvidence::Unreadable,
    ];
    const IMAGES: [ImageEvidence; 5] = [
        ImageEvidence::Good,
        ImageEvidence::Misplaced,
        ImageEvidence::PriorRemains,
        ImageEvidence::Rotten,
        ImageEvidence::Unreadable,
    ];

    /// The whole table, printed: a change of any verdict shows here.
    #[test]
    fn the_table_is_total_and_says_what_it_said() {
        let mut lines = String::new();
        for envelope in ENVELOPES {
            for image in IMAGES {
                for acknowledged in [false, true] {
                    let verdict = classify(Evidence { envelope, image, acknowledged });
                    let line = format!("{envelope:?} {image:?} acknowledged={acknowledged}: {verdict:?}\n");
                    lines.push_str(&line);
                }
            }
        }
        crate::testing::golden("recovery-table.txt", &lines);
    }

    /// What becomes of every slot, printed. Before all evidence is in, an unfinished look must not decide otherwise than the
    /// finished one, but for the two that wait for it.
    #[test]
    fn what_becomes_of_a_slot_is_what_it_was_and_only_two_wait_for_evidence() {
        let mut lines = String::new();
        for envelope in ENVELOPES {
            for image in IMAGES {
                let [early, late] =
                    [false, true].map(|acknowledged| dispose(Evidence { envelope, image, acknowledged }));
                lines.push_str(&format!("{envelope:?} {image:?}: {early:?}; acknowledged: {late:?}\n"));
                match (early, late) {
                    (Disposition::Keep, Disposition::Keep)
                    | (Disposition::KeepDamaged(_), Disposition::KeepDamaged(_))
                    | (Disposition::Cut(_), Disposition::Cut(_)) => {}
                    (Disposition::End, Disposition::KeepDamaged(DamageCause::Lost)) => {
                        assert_eq!((envelope, image), (EnvelopeEvidence::Valid, ImageEvidence::PriorRemains));
                    }
                    (Disposition::End, Disposition::Cut(DamageCause::Lost)) => {
                        assert_eq!(envelope, EnvelopeEvidence::Prior);
                    }
                    other => panic!("{envelope:?} {image:?}: {other:?}"),
                }
            }
        }
        crate::testing::golden("recovery-dispositions.txt", &lines);
    }

    #[test]
    fn nothing_acknowledged_is_ever_torn_and_only_the_whole_is_accepted() {
        for envelope in ENVELOPES {
            for image in IMAGES {
                assert_ne!(classify(Evidence { envelope, image, acknowledged: true }), Verdict::Torn);
                let accepted = classify(Evidence { envelope, image, acknowledged: false }) == Verdict::Accept;
                let whole = envelope == EnvelopeEvidence::Valid && image == ImageEvidence::Good;
                assert_eq!(accepted, whole);
            }
        }
    }
}
