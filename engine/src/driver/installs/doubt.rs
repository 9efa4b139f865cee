//! A snapshot of this node may have rotted since it was published: it was right then, and is not looked at while it is sent.
//!
//! What tells so is a read of it that failed, or a member that got all of it and found it to be another one. Then it is read
//! once more, as at a start. If it is right, the trouble was the other's, or has passed, and it is offered again. If not, it
//! counts no more: the one before is offered, if the log still reaches it, and another one is taken at once, which
//! may end where this one ended. Until that is there the damaged file keeps its name, as one that is found damaged at a start.

use super::super::Driver;
use super::super::snapshots::tools;
use super::Installs;
use crate::error::StopError;
use crate::raft::Event;
use crate::snapshots::files::{ReadStep, Reading, Tools};
use crate::snapshots::name_of;
use crate::state_machine::StateMachine;
use ringraft_block::{BlockBuf, LogIndex};
use ringraft_net::link::Link;
use ringraft_wal::disk::{Disk, DiskDone, DiskOpId};

/// A snapshot that is read once more.
pub(super) struct Doubt {
    last: LogIndex,
    digest: [u8; 16],
    reading: Reading,
}

impl Doubt {
    pub(super) fn awaits(&self, id: DiskOpId) -> bool {
        self.reading.awaits(id)
    }
}

impl<B: BlockBuf> Installs<B> {
    /// Whether the snapshot that ends there is not to be offered for the moment.
    pub(super) fn doubts(&self, last: LogIndex) -> bool {
        self.doubt.as_ref().is_some_and(|doubt| doubt.last == last)
    }

    /// Whether it is not known at the moment what can be offered.
    pub(in super::super) fn is_in_doubt(&self) -> bool {
        self.doubt.is_some()
    }
}

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// The snapshot that ends at `last` may be damaged. One at a time: what is wrong with another one shows again.
    pub(super) fn doubt(&mut self, last: LogIndex) {
        let file = self.snapshots.files.iter().find(|file| file.meta.last.index == last);
        let Some(digest) = file.map(|file| file.digest).filter(|_| !self.snapshots.installs.is_in_doubt())
        else {
            return;
        };
        tracing::warn!(node = %self.config.node, %last, "a snapshot is read once more: it may be damaged");
        let reading = Reading::open(tools!(self), self.config.cluster, name_of(last));
        self.snapshots.installs.doubt = Some(Doubt { last, digest, reading });
    }

    /// Reads the next slot.
    pub(super) fn doubt_on(&mut self) {
        let super::super::snapshots::Snapshots { ops, installs, .. } = &mut self.snapshots;
        if let Some(doubt) = &mut installs.doubt {
            doubt.reading.next(&mut Tools { disk: &mut self.disk, pool: &self.pool, ops });
        }
    }

    pub(super) fn on_doubted(&mut self, done: DiskDone<D::Buf>) -> Result<(), StopError> {
        let super::super::snapshots::Snapshots { ops, installs, .. } = &mut self.snapshots;
        let Some(doubt) = &mut installs.doubt else { return Ok(()) };
        let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
        let ReadStep::Ended(outcome) = doubt.reading.handle(tools, done) else { return Ok(()) };
        let (last, digest) = (doubt.last, doubt.digest);
        installs.doubt = None;
        match outcome {
            Ok(file) if file.digest == digest => Ok(()),
            outcome => {
                let failure = outcome.err();
                tracing::error!(
                    node = %self.config.node, %last, ?failure, "a snapshot is damaged: another one is taken"
                );
                self.snapshots.found_damaged(last);
                self.stop_serving_from(last)
            }
        }
    }

    /// What is left of transfers of that snapshot is not sent.
    fn stop_serving_from(&mut self, last: LogIndex) -> Result<(), StopError> {
        let serving = self.snapshots.installs.serving.iter_mut();
        let theirs = serving.filter(|serving| serving.file.meta.last.index == last);
        let ended: Vec<_> = theirs.filter_map(|serving| serving.to.take()).collect();
        for to in ended {
            self.step(Event::SnapshotEnded { to, installed: None })?;
        }
        Ok(())
    }
}
