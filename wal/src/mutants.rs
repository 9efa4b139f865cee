//! Known bugs that can be put back, so that the tests prove that they would notice.
//!
//! Each [`Mutant`] stands at the branch of the code that it breaks. Without the feature `mutants` [`active`] is the constant
//! `false` and nothing remains of them.

/// A known bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mutant {
    /// A start goes on in the segment that the process before it appended to.
    AppendToSegmentOfEarlierBoot,
    /// What follows a truncation is written over what was cut off.
    OverwriteInPlaceAfterTruncation,
    /// Term and vote are saved in one copy.
    HardStateInOneCopy,
    /// A write that was cut off while it was in flight counts for what was written in its place since.
    CutOffWriteCounted,
    /// A completed write counts although one before it is still in flight.
    DurableOverGap,
    /// Appends go on before the cut is recorded.
    CutNotAwaited,
    /// A segment enters service before its name is durable.
    DirectoryNotSynced,
    /// Batches are written without making them durable.
    WriteNotFlushed,
    /// A failed write is taken for a good one.
    FailedWriteIgnored,
    /// A short write is taken for a whole one.
    ShortWriteTaken,
}

impl Mutant {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::AppendToSegmentOfEarlierBoot,
        Self::OverwriteInPlaceAfterTruncation,
        Self::HardStateInOneCopy,
        Self::CutOffWriteCounted,
        Self::DurableOverGap,
        Self::CutNotAwaited,
        Self::DirectoryNotSynced,
        Self::WriteNotFlushed,
        Self::FailedWriteIgnored,
        Self::ShortWriteTaken,
    ];
}

#[cfg(feature = "mutants")]
mod switch {
    use super::Mutant;
    use std::cell::Cell;

    thread_local! {
        static ACTIVE: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Puts one bug back for this thread, or none.
    pub fn set(mutant: Option<Mutant>) {
        ACTIVE.set(mutant);
    }

    /// Whether `mutant` is put back for this thread.
    #[must_use]
    pub fn active(mutant: Mutant) -> bool {
        ACTIVE.get() == Some(mutant)
    }
}

#[cfg(feature = "mutants")]
pub use switch::{active, set};

/// Whether `mutant` is put back: never, without the feature `mutants`.
#[cfg(not(feature = "mutants"))]
#[must_use]
#[inline(always)]
pub const fn active(_mutant: Mutant) -> bool {
    false
}
