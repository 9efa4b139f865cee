//! Commands that go into the core together, and who waits for commands by tag.
//!
//! On its way between two threads a command costs counters, a place in the queue, a fence and a reference to whoever waits: a
//! group costs that once. Its commands are copied into one piece of memory, which goes back to its pipeline as soon as the core
//! has copied them on, and serves the next group: so it stays warm, and nobody allocates.

use crate::error::{Refusal, Refused};
use crate::handle::{BatchSlot, Completion, PipelineShared};
use crate::proposals::COMMAND_OVERHEAD_BYTES;
use bytes::Bytes;
use std::sync::Arc;

/// When a group goes to the core before another command is added. One command it takes, however large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupLimits {
    commands: usize,
    bytes: usize,
}

impl GroupLimits {
    /// The core copies the first of many commands while the next are being put together.
    const COMMANDS: usize = 256;
    const BYTES: usize = 64 << 10;

    /// For a queue with these bounds: it takes or refuses a group as a whole, so several have to fit.
    pub(crate) fn of_queue(commands_max: usize, bytes_max: usize) -> Self {
        let part = |whole: usize, most: usize| (whole / 8).clamp(1, most);
        Self { commands: part(commands_max, Self::COMMANDS), bytes: part(bytes_max, Self::BYTES) }
    }
}

/// Who waits for outcomes that are told apart by a tag.
#[derive(Clone)]
pub(crate) enum Target {
    /// A [`Pipeline`](crate::handle::Pipeline), whose user chose the tags.
    Pipeline(Arc<PipelineShared>),
    /// A [`ProposalBatch`](crate::handle::ProposalBatch), where they are positions.
    Batch(Arc<BatchSlot>),
}

impl Target {
    pub(crate) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Pipeline(one), Self::Pipeline(other)) => Arc::ptr_eq(one, other),
            (Self::Batch(one), Self::Batch(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }

    /// Tells outcomes, and leaves an empty vector, maybe another one.
    pub(crate) fn complete(&self, run: &mut Vec<Completion>) {
        match self {
            Self::Pipeline(pipeline) => pipeline.complete(run),
            Self::Batch(slot) => slot.complete(run),
        }
    }
}

/// Commands, one behind the other, each with its tag.
#[derive(Default)]
pub(crate) struct Commands {
    bytes: Vec<u8>,
    tags: Vec<u64>,
    lengths: Vec<u32>,
}

impl Commands {
    /// Adds a command of less than 4 GiB, as all are.
    pub(crate) fn push(&mut self, tag: u64, command: &[u8]) {
        self.bytes.extend_from_slice(command);
        self.tags.push(tag);
        self.lengths.push(command.len() as u32);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tags.is_empty()
    }

    /// Whether it goes to the core before another command is added.
    pub(crate) fn is_full(&self, limits: GroupLimits) -> bool {
        self.tags.len() >= limits.commands || self.cost() >= limits.bytes
    }

    /// What they count for against bounds in bytes.
    fn cost(&self) -> usize {
        self.bytes.len() + self.tags.len() * COMMAND_OVERHEAD_BYTES
    }

    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.tags.clear();
        self.lengths.clear();
    }

    /// Memory that it holds for its commands.
    pub(crate) fn capacity_bytes(&self) -> usize {
        self.bytes.capacity()
    }
}

/// Commands on their way into the core, the same who waits for all.
pub(crate) struct Group {
    target: Target,
    commands: Commands,
    /// So many of the first have been taken out, and their bytes.
    taken: usize,
    taken_bytes: usize,
}

/// What is left of a group, in order: tags, lengths, and the commands one behind the other.
#[derive(Clone, Copy)]
pub(crate) struct Rest<'a> {
    pub(crate) tags: &'a [u64],
    pub(crate) lengths: &'a [u32],
    pub(crate) payload: &'a [u8],
}

impl Rest<'_> {
    /// What it counts for against bounds in bytes.
    pub(crate) fn cost(&self) -> usize {
        self.payload.len() + self.tags.len() * COMMAND_OVERHEAD_BYTES
    }
}

impl Group {
    pub(crate) fn new(target: Target, commands: Commands) -> Self {
        Self { target, commands, taken: 0, taken_bytes: 0 }
    }

    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    pub(crate) fn rest(&self) -> Rest<'_> {
        let Commands { bytes, tags, lengths } = &self.commands;
        let payload = &bytes[self.taken_bytes..];
        Rest { tags: &tags[self.taken..], lengths: &lengths[self.taken..], payload }
    }

    /// The command that comes next, with its tag.
    pub(crate) fn next(&self) -> Option<(u64, &[u8])> {
        let Rest { tags, lengths, payload } = self.rest();
        Some((*tags.first()?, payload.get(..*lengths.first()? as usize)?))
    }

    /// So many more of the first have been taken.
    pub(crate) fn advance(&mut self, commands: usize) {
        let lengths = self.commands.lengths.iter().skip(self.taken).take(commands);
        self.taken_bytes += lengths.map(|length| *length as usize).sum::<usize>();
        self.taken = self.commands.tags.len().min(self.taken + commands);
    }

    /// How many commands are left in it.
    pub(crate) fn left(&self) -> usize {
        self.commands.tags.len() - self.taken
    }

    /// What it counts for, as a whole, against bounds in bytes.
    pub(crate) fn cost(&self) -> usize {
        self.commands.cost()
    }

    /// Refuses what is left of it.
    pub(crate) fn refuse(&mut self, reason: &Refusal) {
        let mut refused = Vec::with_capacity(self.left());
        while let Some((tag, command)) = self.next() {
            let command = Bytes::copy_from_slice(command);
            let outcome = Err(Refused { reason: reason.clone(), command }.into());
            refused.push(Completion { tag, outcome });
            self.advance(1);
        }
        self.target.complete(&mut refused);
    }

    /// All of it has been taken: its memory goes back.
    pub(crate) fn give_back(self) {
        if let Target::Pipeline(pipeline) = &self.target {
            pipeline.take_back(self.commands);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_come_out_as_they_went_in() {
        let mut commands = Commands::default();
        let all = [(7, &b"one"[..]), (9, b""), (8, b"three")];
        all.iter().for_each(|(tag, command)| commands.push(*tag, command));
        let pipeline = Arc::new(PipelineShared::default());
        let mut group = Group::new(Target::Pipeline(Arc::clone(&pipeline)), commands);
        assert_eq!(group.cost(), 8 + 3 * COMMAND_OVERHEAD_BYTES);
        for (left, expected) in (1..=3).rev().zip(all) {
            assert_eq!((group.left(), group.next()), (left, Some(expected)));
            group.advance(1);
        }
        assert_eq!((group.left(), group.next()), (0, None));
    }

    #[test]
    fn a_group_is_full_by_number_or_by_bytes() {
        let limits = GroupLimits::of_queue(65_536, 64 << 20);
        assert_eq!(limits, GroupLimits { commands: 256, bytes: 64 << 10 });
        let mut commands = Commands::default();
        (0..255).for_each(|_| commands.push(1, b""));
        assert!(!commands.is_full(limits));
        commands.push(1, b"");
        assert!(commands.is_full(limits));
        commands.clear();
        assert!(commands.is_empty() && !commands.is_full(limits));
        commands.push(1, &vec![0; (64 << 10) - COMMAND_OVERHEAD_BYTES - 1]);
        assert!(!commands.is_full(limits));
        commands.push(2, &[]);
        assert!(commands.is_full(limits));
    }

    #[test]
    fn several_groups_fit_into_a_small_queue() {
        assert_eq!(GroupLimits::of_queue(80, 8000), GroupLimits { commands: 10, bytes: 1000 });
        assert_eq!(GroupLimits::of_queue(1, 1), GroupLimits { commands: 1, bytes: 1 });
    }
}
