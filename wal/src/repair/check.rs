//! What was copied is read back before it takes the place of what it was copied from: a read that went astray, or a
//! write that was lost, would otherwise end in the loss of batches that were intact.
//!
//! The happy path: after the flush, each batch of the log that the segment holds is read from the new file and
//! verified as any reader would; what is known to be damaged, and is not among the repaired, is left out.
//!
//! Failures: a batch that is not right in the new file is read from the old one once more. If it is right there, the copy
//! failed, and the rebuild begins anew, a few times; then other segments have their turn. If it is not, it is damaged as well, and awaited.

use super::{Progress, Rebuild, Repairs, Step, Tools, WHAT, is_same};
use crate::disk::{Disk, DiskError, DiskOp, DiskOutput};
use crate::error::WalError;
use crate::format::{BatchInfo, Chain, ENVELOPE_BYTES, SegmentHeader, parse_image, read_envelope};
use crate::index::Place;
use crate::ops::take;
use crate::recovery::belongs;
use ringraft_block::BlockBuf;

/// So many times in a row a copy may fail before somebody has to ask for the next attempt.
const ATTEMPTS_MAX: u8 = 3;

/// A batch that is being verified.
#[derive(Clone, Copy)]
pub(super) struct Checked {
    info: BatchInfo,
    place: Place,
    previous: Chain,
}

impl Checked {
    /// Whether the slot is that of the batch, in all that is known of it.
    fn is_intact(&self, header: &SegmentHeader, slot: &[u8]) -> bool {
        let Ok(envelope) = read_envelope(slot) else { return false };
        let offset = usize::try_from(self.place.offset).unwrap_or(usize::MAX);
        let end = ENVELOPE_BYTES + self.info.image_bytes as usize;
        let Some(Ok(view)) = slot.get(ENVELOPE_BYTES..end).map(parse_image) else { return false };
        belongs(&envelope, header, offset)
            && envelope.chain == self.info.chain
            && is_same(&view.info(), &self.info)
            && view.verify_chain(self.previous)
    }
}

impl<B: BlockBuf> Repairs<B> {
    /// Reads the next batch from the new file, or goes on to put that in the old one's place.
    pub(super) fn check_next<D: Disk<Buf = B>>(
        &mut self,
        tools: &mut Tools<'_, D>,
        work: &mut Rebuild,
    ) -> Result<(), WalError> {
        let index = tools.index;
        let mut ordinal =
            index.ordinal_at_place(Place { generation: work.generation, offset: work.checked_to });
        while !work.given_up
            && let Some((info, place)) = index.at(ordinal)
            && place.generation == work.generation
        {
            work.checked_to = place.offset + info.slot_bytes() as u64;
            ordinal += 1;
            let known_damage = index.damage_of(info.first).is_some() && !work.firsts.contains(&info.first);
            let Some(previous) = index.chain_at(info.first.previous()).filter(|_| !known_damage) else {
                continue;
            };
            work.checked = Some(Checked { info, place, previous });
            work.step = Step::Checking;
            return self.read_checked(tools, work);
        }
        if !work.given_up {
            self.failed_copies = 0;
        }
        self.close_next(tools, work);
        Ok(())
    }

    fn read_checked<D: Disk<Buf = B>>(
        &mut self,
        tools: &mut Tools<'_, D>,
        work: &mut Rebuild,
    ) -> Result<(), WalError> {
        let file = if work.step == Step::Comparing { work.old } else { work.new };
        let (Some(checked), Some(file)) = (work.checked, file) else {
            return Err(WalError::Protocol { what: WHAT });
        };
        let bytes = checked.info.slot_bytes();
        let block = take(tools.pool, tools.disk, bytes);
        let block = block.map_err(|error| WalError::Disk { what: WHAT, error })?;
        tools.submit(DiskOp::Read { file, offset: checked.place.offset, block, bytes });
        Ok(())
    }

    /// A slot has been read from the new file, or from the old one.
    pub(super) fn was_read<D: Disk<Buf = B>>(
        &mut self,
        tools: &mut Tools<'_, D>,
        work: &mut Rebuild,
        result: Result<DiskOutput<B>, DiskError>,
        progress: &mut Progress,
    ) -> Result<(), WalError> {
        let Some(checked) = work.checked else { return Err(WalError::Protocol { what: WHAT }) };
        let intact = match result {
            Ok(DiskOutput::Read { block, bytes }) => {
                block.get(..bytes).is_some_and(|slot| checked.is_intact(&work.header, slot))
            }
            Ok(_) => return Err(WalError::Protocol { what: WHAT }),
            Err(_) => false,
        };
        let first = checked.info.first;
        match work.step {
            Step::Checking if intact => return self.check_next(tools, work),
            Step::Checking if !work.given_up && !work.firsts.contains(&first) => {
                work.step = Step::Comparing;
                return self.read_checked(tools, work);
            }
            Step::Comparing if !intact => {
                progress.found.push(first);
                if self.fix_of(first, work.generation).is_none() {
                    self.missing.insert((work.generation, first));
                }
            }
            // Right in the old file, or in memory.
            _ => {
                self.failed_copies += 1;
                if self.failed_copies >= ATTEMPTS_MAX {
                    self.failed_copies = 0;
                    self.pass_over(work.generation);
                }
            }
        }
        work.given_up = true;
        self.close_next(tools, work);
        Ok(())
    }
}
