//! Known bugs that can be put back, so that the tests prove that they would notice.
//!
//! Each [`Mutant`] stands at the branch of the code that it breaks. Without the feature `mutants` (and outside
//! this crate's own unit tests) [`active`] is the constant `false` and nothing remains of them.

/// A known bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mutant {
    /// A follower acknowledges, and a leader counts for itself, what is not durable yet.
    AckBeforeDurable,
    /// A leader commits an entry of an older term by counting replicas (Raft, figure 8).
    CommitOlderTermByCounting,
    /// A candidate counts its own vote before the vote is durable.
    OwnVoteBeforeDurable,
    /// A vote's reply leaves before the vote is durable.
    VoteReplyBeforeSave,
    /// A vote is granted and not remembered.
    VoteForgotten,
    /// A completion from before a truncation counts for what was written after it.
    LateCompletionCounted,
    /// A node campaigns without asking first whether it could succeed.
    PreVoteIgnored,
    /// A leader follows a rejection of a position that was acknowledged since.
    StaleRejectionTaken,
    /// A leader takes what it sent for what was acknowledged.
    MatchFromSent,
    /// A claim ends with what is committed in a term that the node knew before.
    ClaimEndsInItsTerm,
    /// A batch that cannot be read is acknowledged as if it could.
    DamageAcknowledged,
}

impl Mutant {
    /// Those that only damaged logs show.
    pub const REPAIR: [Self; 2] = [Self::ClaimEndsInItsTerm, Self::DamageAcknowledged];

    /// All others.
    pub const ALL: [Self; 9] = [
        Self::AckBeforeDurable,
        Self::CommitOlderTermByCounting,
        Self::OwnVoteBeforeDurable,
        Self::VoteReplyBeforeSave,
        Self::VoteForgotten,
        Self::LateCompletionCounted,
        Self::PreVoteIgnored,
        Self::StaleRejectionTaken,
        Self::MatchFromSent,
    ];
}

#[cfg(any(test, feature = "mutants"))]
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

    /// Whether any bug is put back for this thread.
    #[must_use]
    pub fn any() -> bool {
        ACTIVE.get().is_some()
    }
}

#[cfg(any(test, feature = "mutants"))]
pub use switch::{active, any, set};

/// Whether `mutant` is put back: never, without the feature `mutants`.
#[cfg(not(any(test, feature = "mutants")))]
#[must_use]
#[inline(always)]
pub const fn active(_mutant: Mutant) -> bool {
    false
}

/// Whether any bug is put back: never, without the feature `mutants`.
#[cfg(not(any(test, feature = "mutants")))]
#[must_use]
#[inline(always)]
pub const fn any() -> bool {
    false
}
