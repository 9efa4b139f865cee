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
    /// A claim ends since nobody has anything behind an end of the log that may be void, whatever others have in its place.
    ClaimEndsAtVoidEnd,
    /// A session's command below the acknowledged floor is looked up as if it were not.
    SessionFloorIgnored,
    /// Sessions expire by each member's own clock.
    DedupeByLocalClock,
    /// A session does not remember what it applied.
    ReplyNotCached,
    /// A resolved sequence can be applied later.
    FenceNotRemembered,
    /// A new leader takes its commit index for all that is committed (Raft, section 8).
    ReadIndexBeforeOwnTermCommit,
    /// Requests of followers for a read index all look the same, so that an old answer passes for a new one.
    ReadContextReused,
    /// A read is taken for confirmed by a round that was begun before it was asked for.
    ReadRoundFromBeforeRequest,
    /// A lease counts from when an answer arrived, not from when the round was sent.
    LeaseFromReceiveTime,
    /// A lease is looked at with a clock that was read before the request came.
    LeaseKeptThroughPause,
    /// A leader keeps its lease when it tells another member to campaign.
    LeaseKeptThroughTransfer,
    /// A node forgets over a restart that it promised a leader to elect nobody else.
    RestartedVoterVotesWithinLease,
    /// A node that restarts as the only voter elects itself although it may have promised a leader to elect nobody else.
    LastVoterElectsItselfWithinLease,
    /// A read is answered before everything up to its index is applied.
    FollowerReadWithoutApply,
    /// A snapshot that covers less than what is committed here is installed.
    SnapshotInstallRegressesApplied,
    /// Whoever takes or installs a snapshot does not mind the members in it.
    SnapshotForgetsConfiguration,
    /// Whoever takes a snapshot leaves the client sessions out.
    SnapshotForgetsSessions,
    /// A log that has another entry where a snapshot ends keeps what follows.
    InstallKeepsConflictingLog,
    /// The log is purged when a snapshot is begun.
    PurgeBeforeSnapshotDurable,
    /// A batch that cannot be read is acknowledged as if it could.
    DamageAcknowledged,
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
    /// After a rejection a leader goes on at the position that was rejected, one below the next.
    NextBelowOne,
    /// What was in flight in a lost session still counts against the window, and is never sent again.
    WindowNotResetOnReconnect,
    /// A candidate counts a vote that was given to it in an earlier term.
    StaleReplyTakenForNewTerm,
    /// A vote goes to a candidate whose log lacks what the voter's holds.
    VoteForShorterLog,
    /// A voter votes for whoever asks last.
    SecondVoteInTerm,
    /// A follower commits what the leader has committed although its own log may hold something else there.
    CommitBeyondMatch,
    /// A follower's election timer runs on while its leader is heard.
    ElectionTimerNotReset,
    /// A leader goes on in its term although a follower's refusal tells of a later one.
    TermNotAdoptedFromRejection,
    /// The answer to a heartbeat counts for all that was sent before it.
    HeartbeatAckCountedAsMatch,
    /// An append that repeats what a follower holds cuts off what the follower holds behind it.
    TruncatesWithoutConflict,
    /// A follower keeps what contradicts the leader's log.
    ConflictKept,
    /// A follower takes appends of leaders of earlier terms.
    StaleTermAppendTaken,
    /// A leader that no quorum follows any more leads on.
    CheckQuorumIgnored,
    /// A node that loses its leadership says of commands in its log that they are not.
    RefusedAlthoughInLog,
    /// Whoever waits for a command at an index is answered when another one is committed there.
    WaitersKeptAfterDeposition,
    /// What is appended is applied before it is committed.
    AppliedBeforeCommit,
    /// A turn that has applied as much as it may does not say that there is more.
    TurnLeavesWork,
}

impl Mutant {
    /// Those that only damaged logs show.
    pub const REPAIR: [Self; 3] =
        [Self::ClaimEndsInItsTerm, Self::ClaimEndsAtVoidEnd, Self::DamageAcknowledged];

    /// Those that only commands of sessions show.
    pub const SESSIONS: [Self; 4] =
        [Self::SessionFloorIgnored, Self::DedupeByLocalClock, Self::ReplyNotCached, Self::FenceNotRemembered];

    /// Those that only reads show, and of them the last only a state machine.
    pub const READS: [Self; 9] = [
        Self::ReadIndexBeforeOwnTermCommit,
        Self::ReadContextReused,
        Self::ReadRoundFromBeforeRequest,
        Self::LeaseFromReceiveTime,
        Self::LeaseKeptThroughPause,
        Self::LeaseKeptThroughTransfer,
        Self::RestartedVoterVotesWithinLease,
        Self::LastVoterElectsItselfWithinLease,
        Self::FollowerReadWithoutApply,
    ];

    /// Those of snapshots in the core.
    pub const SNAPSHOT: [Self; 2] = [Self::SnapshotInstallRegressesApplied, Self::InstallKeepsConflictingLog];

    /// Those of snapshots in the driver.
    pub const SNAPSHOT_DRIVER: [Self; 3] =
        [Self::SnapshotForgetsConfiguration, Self::SnapshotForgetsSessions, Self::PurgeBeforeSnapshotDurable];

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

    /// Those that the simulation of the core alone cannot show, or does not.
    pub const CLUSTER: [Self; 17] = [
        Self::NextBelowOne,
        Self::WindowNotResetOnReconnect,
        Self::StaleReplyTakenForNewTerm,
        Self::VoteForShorterLog,
        Self::SecondVoteInTerm,
        Self::CommitBeyondMatch,
        Self::ElectionTimerNotReset,
        Self::TermNotAdoptedFromRejection,
        Self::HeartbeatAckCountedAsMatch,
        Self::TruncatesWithoutConflict,
        Self::ConflictKept,
        Self::StaleTermAppendTaken,
        Self::CheckQuorumIgnored,
        Self::RefusedAlthoughInLog,
        Self::WaitersKeptAfterDeposition,
        Self::AppliedBeforeCommit,
        Self::TurnLeavesWork,
    ];

    /// All others but those that only a driver can have.
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
