//! The decision table: what the slot behind the last good batch says about how the log ended.
//!
//! A sector is *prior* when it holds what it held before the segment entered service (zeros, or what a former life left), and *new* when
//! it holds what the write put there. The device writes a sector whole or not at all, so a write that never finished
//! leaves a mixture of prior and new sectors and nothing else; and a write that was acknowledged leaves new sectors
//! only. Everything else is damage: it is reported and nothing is cut off.

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
    /// Every checksum fits, but it is another image, or it does not continue the log.
    Misplaced,
    /// At least one sector is prior content where the new content differs.
    PriorRemains,
    /// Sectors are bad, and none of the bad ones is prior content.
    Rotten,
    /// The device returned an error for a sector, and none of the others is prior where it should not be.
    Unreadable,
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
        // it are not those that were there. What belongs here cannot be told.
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
