//! What is read without a command, against what was committed and applied.

use super::{Asked, Fate, History};
use crate::sim::coverage::Mark;
use crate::sim::kv::CommandId;
use crate::sim::node::Ask;

impl History {
    /// The first node has applied `index`, after which the key holds this. Others come later to the same.
    pub(super) fn note_value(&mut self, index: u64, key: u8, value: u64) {
        let values = &mut self.values[usize::from(key)];
        let last = values.last().copied().unwrap_or_default();
        if index > last.0 && value != last.1 {
            values.push((index, value));
        }
    }

    /// What the key held when everything up to `applied`, and nothing else, was applied.
    fn value_at(&self, key: u8, applied: u64) -> u64 {
        let values = &self.values[usize::from(key)];
        let behind = values.partition_point(|(index, _)| *index <= applied);
        behind.checked_sub(1).map_or(0, |at| values[at].1)
    }

    /// A node answered a read, saying that exactly everything up to `applied` counted.
    pub(super) fn check_read(&mut self, id: CommandId, applied: u64, reply: u64) {
        let Asked { command, ask, known, .. } = self.asked[id.client][id.sequence];
        let held = self.value_at(command.key, applied);
        if held != reply {
            self.fail(|| {
                format!(
                    "{id:?} read {reply:x} of key {} at index {applied}, which held {held:x}",
                    command.key
                )
            });
        }
        // Linearizability, by the order of the log: whatever some node knew to be committed before is seen.
        let linearizable = ask.is_some_and(Ask::is_linearizable);
        if linearizable && applied < known.committed {
            self.fail(|| {
                format!(
                    "{id:?} asked {ask:?} and read at index {applied}; index {} had been committed before",
                    known.committed
                )
            });
        }
        self.context.cover(match ask {
            Some(Ask::Quorum) => Mark::QuorumRead,
            Some(Ask::Barrier) => Mark::BarrierRead,
            Some(Ask::Stale { .. }) => Mark::StaleRead,
            _ => Mark::LinearizableRead,
        });
    }

    /// What was waited for has come at `index`.
    pub(super) fn check_reached(&mut self, id: CommandId, index: u64) {
        let Asked { ask, .. } = self.asked[id.client][id.sequence];
        if let Some(Ask::Committed(at) | Ask::Applied(at)) = ask
            && index < at
        {
            self.fail(|| format!("{id:?} waited for index {at} and was answered at {index}"));
        }
        self.context.cover(match ask {
            Some(Ask::Round) => Mark::RoundForced,
            Some(Ask::Committed(_)) => Mark::CommitAwaited,
            _ => Mark::ApplyAwaited,
        });
    }

    /// A leader of `term` was followed by a quorum after the call was made: in no later term can anything have been committed
    /// before.
    pub fn round_forced(&mut self, id: CommandId, term: u64) {
        let Asked { fate, known, .. } = self.asked[id.client][id.sequence];
        if matches!(fate, Fate::Reached { .. }) && known.term > term {
            self.fail(|| {
                format!(
                    "{id:?} forced a round in term {term}, and in term {} something had been committed before",
                    known.term
                )
            });
        }
    }

    /// Whether something of `term` itself was committed.
    pub fn has_committed_in(&self, term: u64) -> bool {
        self.known.term >= term
    }

    /// Something of `term` itself was committed by its leader.
    pub fn committed_in(&mut self, term: u64) {
        self.known.term = self.known.term.max(term);
    }
}
