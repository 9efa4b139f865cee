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
    /// A leader changes the members before an entry of its own term is committed (the bug of single-server changes that
    /// was announced on raft-dev in 2015).
    ChangeBeforeOwnTermCommit,
    /// A truncation leaves the configuration in force that it cuts off.
    ConfigurationNotReverted,
    /// A leader leaves a joint configuration that is not committed.
    JointLeftEarly,
    /// A learner's disk counts for commits.
    LearnerAckCounted,
    /// A leader that has been removed goes on.
    RemovedLeaderKeepsLeading,
    /// A candidate in a joint configuration needs the votes of the new voters only.
    QuorumOfIncomingOnly,
    /// A leader begins a change while another one is not committed.
    TwoChangesAtOnce,
}

impl Mutant {
    /// Those that only damaged logs show.
    pub const REPAIR: [Self; 1] = [Self::ClaimEndsInItsTerm];

    /// Those that only changes of the members show.
    pub const MEMBERSHIP: [Self; 7] = [
        Self::ChangeBeforeOwnTermCommit,
        Self::ConfigurationNotReverted,
        Self::JointLeftEarly,
        Self::LearnerAckCounted,
        Self::RemovedLeaderKeepsLeading,
        Self::QuorumOfIncomingOnly,
        Self::TwoChangesAtOnce,
    ];

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
