//! Snapshots (Raft, section 7), as far as they are the protocol's: when the log no longer holds what a peer needs, and what
//! a log is behind a snapshot that came from elsewhere. What is in one, and how it travels, is the driver's.
//!
//! Leader: a peer in the state Snapshot is named once ([`Action::SendSnapshot`]);
//! [`Event::SnapshotEnded`](super::Event::SnapshotEnded) tells how that went. Replication goes on behind the snapshot if the
//! log still reaches there, otherwise with a newer one.
//!
//! Follower: a snapshot that is whole and durable is committed state, whoever sent it. Nothing is done if all of it is known
//! to be committed here. A log that holds its last entry keeps what follows (Raft, figure 13, step 6); any other log goes
//! as a whole: it ends before that entry, or contradicts what is committed. Nothing of it is missed by anyone: what this
//! node has acknowledged beyond that entry contradicts what is committed, and what it has acknowledged up to there the
//! snapshot covers.

use super::configurations::Configurations;
use super::role::RoleState;
use super::{Action, Configuration, LogId, LogIds, Nanos, Raft, Violation};
use crate::mutants::{self, Mutant};
use ringraft_block::{LogIndex, NodeId};

impl Raft {
    /// The log's start has moved to `through`.
    pub(super) fn purged(&mut self, through: LogIndex) -> Result<(), Violation> {
        let allowed = through <= self.commit && through <= self.durable.last();
        let Some(start) = self.log.batch_end_at(through).filter(|_| allowed) else {
            return Err(Violation::PurgedUnknown { through, commit: self.commit });
        };
        self.log.start_behind(start);
        self.repair.start_behind(through);
        self.configurations.start_behind(through);
        // Committed, hence in the log of whoever leads (Raft, figure 3: leader completeness).
        self.hearing.matched = self.hearing.matched.max(through);
        Ok(())
    }

    /// The transfer that [`Action::SendSnapshot`] asked for has ended.
    pub(super) fn snapshot_ended(&mut self, to: NodeId, installed: Option<LogId>, actions: &mut Vec<Action>) {
        let RoleState::Leader(leader) = &mut self.role else { return };
        let Some(at) = leader.position(to) else { return };
        let Some(progress) = leader.peers.get_mut(at) else { return };
        let reached = installed.filter(|last| self.log.batch_end_at(last.index) == Some(*last));
        // A peer that has no space for it, say, is not asked again at once.
        let patience = if installed.is_none() { self.config.election_timeout } else { Nanos(0) };
        let retry_at = self.now.plus(patience);
        progress.snapshot_ended(reached.map(|last| last.index), installed.is_none(), retry_at);
        self.replicate_to(at, actions);
    }

    /// Asks for a snapshot for each peer that needs one.
    pub(super) fn send_snapshots(&mut self, actions: &mut Vec<Action>) {
        let RoleState::Leader(leader) = &mut self.role else { return };
        for progress in &mut leader.peers {
            if progress.asks_for_snapshot(self.now) {
                actions.push(Action::SendSnapshot { to: progress.id() });
            }
        }
    }

    /// A snapshot up to `last` is durable here, `members` the configuration as of then, with its place in the log.
    pub(super) fn snapshot_received(
        &mut self,
        last: LogId,
        members: (LogIndex, Configuration),
        actions: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        let stale = last.index <= self.commit;
        let regresses = stale && mutants::active(Mutant::SnapshotInstallRegressesApplied);
        // A leader's log holds all that is committed: it needs none (Raft, figure 3).
        if stale && !regresses || matches!(self.role, RoleState::Leader(_)) {
            if stale {
                // What this node holds up to there it may be unable to read.
                self.members_told(last.index, members, actions);
            }
            return Ok(());
        }
        if last.term > self.hard.term() {
            // An entry of a term is proof of the term.
            self.become_follower(last.term, None, actions);
        } else if !matches!(self.role, RoleState::Follower) {
            // It has asked for votes in the name of a log that is another one from now on.
            self.become_follower(self.hard.term(), None, actions);
        }
        let was_whole = self.repair.is_whole();
        let here = self.log.batch_end_at(last.index);
        let conflicting = here.is_some() && mutants::active(Mutant::InstallKeepsConflictingLog);
        let holds = here == Some(last) || conflicting;
        let epoch = if self.durable.last() >= last.index && holds && !regresses {
            None
        } else {
            self.log = LogIds::new(last);
            Some(self.durable.start_behind(last.index))
        };
        if epoch.is_some() {
            self.repair.start_behind(LogIndex(u64::MAX));
        }
        self.hearing.matched =
            if epoch.is_some() { last.index } else { self.hearing.matched.max(last.index) };
        self.hearing.acked = LogIndex(0);
        self.commit = last.index;
        let forgets = mutants::active(Mutant::SnapshotForgetsConfiguration);
        let (index, members) = members;
        let members = if forgets { self.configuration().clone() } else { members };
        if epoch.is_some() {
            self.configurations = Configurations::new(index.min(last.index), members);
            self.configuration_changed(actions);
        } else {
            self.members_told(last.index, (index, members), actions);
        }
        actions.push(Action::InstallSnapshot { last, epoch });
        self.restraint_changed(was_whole, actions);
        self.acknowledge_news(actions);
        Ok(())
    }

    /// The state before the log's start is missing here, or is there again: a snapshot was lost.
    pub(super) fn state_lost(&mut self, lost: bool, actions: &mut Vec<Action>) {
        let was_whole = self.repair.is_whole();
        self.repair.lose_state(lost);
        if lost {
            // The members as of then were part of it.
            self.configurations.guess();
        }
        self.restraint_changed(was_whole, actions);
    }
}
