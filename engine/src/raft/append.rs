//! AppendEntries (Raft, section 5.3), from both ends.
//!
//! Leader: a sealed batch goes to the own log and to every peer whose window has room, at once and side by side;
//! acks, and the own disk as one vote among equals, move the commit index. Without traffic there are heartbeats,
//! and a commit index that no append carried is sent alone after a while.
//!
//! Follower: previous position equal → take the batch (already here: acknowledge; conflict: truncate first) →
//! acknowledge what is durable *and* verified to be equal to this leader's log. Previous position missing or
//! different → reject with a hint that skips whole terms.

use super::role::RoleState;
use super::{
    Action, Append, AppendAck, AppendOutcome, BatchRun, Configuration, Epoch, INDEX_MAX, LogId, Message,
    Nanos, Raft, Violation,
};
use crate::mutants::{self, Mutant};
use ringraft_block::{LogIndex, NodeId, Term};

// The leader.

impl Raft {
    /// The driver sealed `batch` at [`Raft::next_position`].
    pub(super) fn propose(
        &mut self,
        batch: BatchRun,
        configuration: Option<Configuration>,
        actions: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        let expected = self.next_position();
        let RoleState::Leader(leader) = &mut self.role else {
            return Err(Violation::ProposedElsewhere { batch, expected });
        };
        if batch.term != self.hard.term() || !self.log.continues_with(&batch) {
            return Err(Violation::ProposedElsewhere { batch, expected });
        }
        self.log.push(batch);
        leader.first_own.get_or_insert(batch.first);
        actions.push(Action::Persist { batch });
        self.take_configuration(&batch, configuration, actions);
        self.time_batch(batch.last);
        self.replicate(actions);
        Ok(())
    }

    /// Sends every peer what its window has room for.
    fn replicate(&mut self, actions: &mut Vec<Action>) {
        let RoleState::Leader(leader) = &self.role else { return };
        for at in 0..leader.peers.len() {
            self.replicate_to(at, actions);
        }
        self.advance_commit(actions);
    }

    /// Sends the peer at `at` what its window has room for; to a peer in Probe, one append.
    pub(super) fn replicate_to(&mut self, at: usize, actions: &mut Vec<Action>) {
        let RoleState::Leader(leader) = &mut self.role else { return };
        // Until its own empty batch is appended, a leader has nothing to send but what the batch will carry along.
        let (Some(_), Some(progress)) = (leader.first_own, leader.peers.get_mut(at)) else { return };
        let mut outbox = self.hard.outbox(actions);
        loop {
            let batch = self.log.batch_starting_at(progress.next());
            if !progress.may_send(batch.as_ref(), &self.config) {
                return;
            }
            let Some(previous) = self.log.batch_end_at(progress.next().previous()) else {
                return progress.needs_snapshot();
            };
            let reply_now = progress.should_ask(self.now, &self.config);
            let round = leader.rounds.stamp(self.now);
            progress.sent(batch.as_ref());
            progress.told(reply_now, self.now);
            leader.changing.told(progress.id(), self.commit);
            let (term, commit, configuration) = (self.hard.term(), self.commit, None);
            let append = Append { term, previous, batch, commit, round, reply_now, configuration };
            outbox.send(progress.id(), Message::Append(append));
        }
    }

    /// A tick while leading.
    pub(super) fn tick_leader(&mut self, actions: &mut Vec<Action>) {
        if self.now >= self.check_quorum_deadline() {
            // Thesis, section 6.2: a leader that a quorum no longer follows must not keep clients waiting.
            return self.become_follower(self.hard.term(), None, actions);
        }
        self.expire_transfer(actions);
        let RoleState::Leader(leader) = &self.role else { return };
        for at in 0..leader.peers.len() {
            let RoleState::Leader(leader) = &self.role else { return };
            let Some(progress) = leader.peers.get(at) else { return };
            let heartbeat = progress.heartbeat_due(&self.config) <= self.now;
            if heartbeat || progress.notice_due().is_some_and(|due| due <= self.now) {
                self.tell(at, heartbeat, actions);
            }
        }
    }

    /// Sends the peer at `at` an append without a batch: a heartbeat, or only the commit index.
    pub(super) fn tell(&mut self, at: usize, heartbeat: bool, actions: &mut Vec<Action>) {
        let RoleState::Leader(leader) = &mut self.role else { return };
        let Some(progress) = leader.peers.get_mut(at) else { return };
        let start = self.log.start().index;
        let position = if heartbeat { progress.heartbeat_position(start) } else { progress.matched() };
        // What was in flight when the log was purged is on its way all the same.
        let position = if progress.next() > start { position.max(start) } else { position };
        let previous = self.log.batch_end_at(position).unwrap_or_else(|| {
            progress.needs_snapshot();
            self.log.start()
        });
        let round = leader.rounds.stamp(self.now);
        progress.told(heartbeat, self.now);
        leader.changing.told(progress.id(), self.commit);
        let append = Append {
            term: self.hard.term(),
            previous,
            batch: None,
            commit: self.commit,
            round,
            reply_now: heartbeat,
            configuration: None,
        };
        self.hard.outbox(actions).send(progress.id(), Message::Append(append));
    }

    /// When a leader has something to do, if nothing happens before.
    pub(super) fn leader_deadline(&self) -> Nanos {
        let RoleState::Leader(leader) = &self.role else { return Nanos::NEVER };
        let per_peer = leader.peers.iter().map(|progress| {
            let heartbeat = progress.heartbeat_due(&self.config);
            progress.notice_due().map_or(heartbeat, |notice| notice.min(heartbeat))
        });
        let others = self.check_quorum_deadline().min(self.transfer_deadline()).min(self.reads_deadline());
        per_peer.min().unwrap_or(Nanos::NEVER).min(others)
    }

    /// When a leader gives up, if it hears nobody any more.
    fn check_quorum_deadline(&self) -> Nanos {
        if mutants::active(Mutant::CheckQuorumIgnored) {
            return Nanos::NEVER;
        }
        self.quorum_contact().map_or(Nanos::NEVER, |contact| contact.plus(self.config.election_timeout))
    }

    /// The answer to an append, or a report of durability.
    pub(super) fn handle_append_ack(&mut self, from: NodeId, ack: AppendAck, actions: &mut Vec<Action>) {
        let RoleState::Leader(leader) = &mut self.role else { return };
        if ack.term > self.hard.term() {
            if mutants::active(Mutant::TermNotAdoptedFromRejection) {
                return;
            }
            return self.become_follower(ack.term, None, actions);
        }
        if ack.term < self.hard.term() {
            return;
        }
        let Some(at) = leader.position(from) else { return self.ignore() };
        let Some(progress) = leader.peers.get_mut(at) else { return };
        if ack.round > leader.rounds.current() {
            return self.ignore();
        }
        let sent_at = if mutants::active(Mutant::LeaseFromReceiveTime) {
            Some(self.now)
        } else {
            leader.rounds.sent_at(ack.round)
        };
        match ack.outcome {
            AppendOutcome::Matched { matched } => {
                progress.returned(ack.round, sent_at);
                if matched.index >= self.log.start().index
                    && self.log.batch_end_at(matched.index) != Some(matched)
                {
                    // Nothing of this term's leader has been matched there. Not counting it is always safe.
                    return self.ignore();
                }
                if matched.index >= self.log.start().index {
                    progress.acked(matched.index);
                    self.advance_commit(actions);
                    self.replicate_to(at, actions);
                    self.advance_transfer(actions);
                }
            }
            AppendOutcome::Rejected { refused, hint } => {
                progress.returned(ack.round, sent_at);
                // Our own terms resolve the hint: what we have there of later terms cannot be in its log.
                let bound = hint.index.min(refused.previous());
                let agree = self.log.floor_within_term(bound, hint.term).map(|agree| agree.index);
                if progress.rejected(refused, agree) {
                    self.replicate_to(at, actions);
                }
            }
            // Of a term that is not later: nobody says that.
            AppendOutcome::StaleTerm => self.ignore(),
        }
    }

    /// Commits what a quorum holds durably, the own disk being one vote among equals.
    fn advance_commit(&mut self, actions: &mut Vec<Action>) {
        self.look_at_timed_batch(actions);
        let RoleState::Leader(leader) = &self.role else { return };
        let own = if mutants::active(Mutant::AckBeforeDurable) {
            self.log.last().index
        } else {
            self.repair.countable(self.durable.last(), self.hearing.acked)
        };
        self.hearing.acked = own;
        let id = self.config.id;
        let of = |voter| {
            if voter == id {
                own
            } else {
                leader.peer(voter).map_or(LogIndex(0), |progress| progress.matched())
            }
        };
        let agreed = if mutants::active(Mutant::LearnerAckCounted) {
            self.agreed_with_learners(of)
        } else {
            self.quorum.agreed(of)
        };
        // Only entries of the own term are committed by counting; all before them with them (Raft, section 5.4.2).
        let own_term = self.log.term_at(agreed) == Some(self.hard.term());
        if agreed <= self.commit || !(own_term || mutants::active(Mutant::CommitOlderTermByCounting)) {
            return;
        }
        self.commit = agreed;
        actions.push(Action::Commit { up_to: agreed });
        let RoleState::Leader(leader) = &mut self.role else { return };
        for progress in &mut leader.peers {
            progress.owe_notice(self.now.plus(self.config.commit_notice_delay));
        }
        self.advance_transfer(actions);
    }

    /// A session with `peer` began or ended.
    pub(super) fn session_changed(&mut self, peer: NodeId, connected: bool, actions: &mut Vec<Action>) {
        match &mut self.role {
            RoleState::Leader(leader) => {
                let Some(at) = leader.position(peer) else { return };
                if let Some(progress) = leader.peers.get_mut(at) {
                    progress.new_session(connected);
                    leader.changing.untold(peer);
                }
                self.transfer_lost(peer, actions);
                self.replicate_to(at, actions);
            }
            RoleState::PreCandidate(_) | RoleState::Candidate { .. } if connected => {
                self.ask_voter(peer, actions);
            }
            _ if self.leader == Some(peer) => {
                self.hearing.acked = LogIndex(0);
                self.leaders_session_changed(actions);
            }
            _ => {}
        }
    }
}

// Both.

impl Raft {
    /// The log reports everything up to `last` as durable, in the life of `epoch`.
    pub(super) fn persisted(
        &mut self,
        epoch: Epoch,
        last: LogIndex,
        actions: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        let end = self.log.last().index;
        let unknown = Violation::PersistedUnknown { epoch, last, log_epoch: self.durable.epoch(), end };
        if epoch == self.durable.epoch() && last > end {
            return Err(unknown);
        }
        let means = self.durable.means(epoch, last).map_err(|_| unknown)?;
        let Some(last) = self.log.floor(means.min(end)) else { return Ok(()) };
        if !self.durable.advance(last) {
            return Ok(());
        }
        self.acknowledge_news(actions);
        Ok(())
    }

    /// More of the log can be counted than before.
    pub(super) fn acknowledge_news(&mut self, actions: &mut Vec<Action>) {
        match (&self.role, self.leader) {
            (RoleState::Leader(_), _) => self.advance_commit(actions),
            (RoleState::Follower, Some(leader)) if self.acknowledged().index > self.hearing.acked => {
                self.acknowledge(leader, actions);
            }
            _ => {}
        }
    }
}

// The follower.

impl Raft {
    /// AppendEntries (Raft, figure 2).
    pub(super) fn handle_append(
        &mut self,
        from: NodeId,
        append: Append,
        actions: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        if !well_formed(&append) {
            self.ignore();
            return Ok(());
        }
        let term = self.hard.term();
        if append.term < term && !mutants::active(Mutant::StaleTermAppendTaken) {
            self.answer(from, AppendOutcome::StaleTerm, actions);
            return Ok(());
        }
        if append.term == term
            && let Some(known) = self.leader
            && known != from
        {
            return Err(Violation::TwoLeaders { term, known, other: from });
        }
        self.become_follower(append.term, Some(from), actions);
        self.hard.flush(actions);
        self.hearing.round = self.hearing.round.max(append.round);
        self.hearing.heard_at = Some(self.now);
        self.hearing.commit = self.hearing.commit.max(append.commit);
        if !mutants::active(Mutant::ElectionTimerNotReset) {
            self.timer.from = self.now;
        }

        if !self.continues_from(&append)? {
            let outcome = AppendOutcome::Rejected {
                refused: append.previous.index,
                hint: self.hint_below(append.previous),
            };
            self.answer(from, outcome, actions);
            return Ok(());
        }
        let mut repeated = false;
        if let Some(batch) = append.batch {
            repeated = self.take(batch, append.configuration, append.previous, actions)?;
        }
        let verified = append.batch.map_or(append.previous.index, |batch| batch.last);
        self.hearing.matched = self.hearing.matched.max(verified);
        self.follow_commit(append.commit, actions);

        // What is not durable yet is acknowledged when it is. A batch that was here already may have been
        // acknowledged to a session that is gone.
        let acknowledged = self.acknowledged().index;
        let news = acknowledged > self.hearing.acked;
        let again = repeated && verified <= acknowledged;
        if append.reply_now || news || again {
            self.acknowledge(from, actions);
        }
        Ok(())
    }

    /// The consistency check: whether `previous` is in this log.
    fn continues_from(&self, append: &Append) -> Result<bool, Violation> {
        let previous = append.previous;
        if previous.index < self.log.start().index {
            // Long committed here, hence equal (leader completeness), and not held any more.
            return Ok(true);
        }
        if self.log.term_at(previous.index) == Some(previous.term) {
            return match self.log.batch_end_at(previous.index) {
                Some(_) => Ok(true),
                // A batch is sealed once: one that ends at this index in this term ends there everywhere.
                None => Err(self.sealed_twice(previous)),
            };
        }
        if previous.index <= self.commit {
            return Err(self.committed_differs(append.term, previous));
        }
        if previous.index <= self.hearing.matched {
            return Err(self.leader_rewrote(append.term, previous));
        }
        Ok(false)
    }

    /// Takes the batch that follows `previous`, which is in this log. True if it was here already.
    fn take(
        &mut self,
        batch: BatchRun,
        configuration: Option<Box<Configuration>>,
        previous: LogId,
        actions: &mut Vec<Action>,
    ) -> Result<bool, Violation> {
        let start = self.log.start();
        if batch.first <= start.index {
            // Not held any more. One that reaches above the start would have been cut by it.
            return if batch.last <= start.index { Ok(true) } else { Err(self.sealed_twice(start)) };
        }
        if let Some(here) = self.log.batch_starting_at(batch.first) {
            if here == batch {
                if mutants::active(Mutant::TruncatesWithoutConflict) && self.log.last().index > batch.last {
                    self.truncate_after(batch.last, batch, actions)?;
                }
                return Ok(true);
            }
            if mutants::active(Mutant::ConflictKept) {
                return Ok(true);
            }
            if here.term == batch.term {
                return Err(self.sealed_twice(batch.end()));
            }
            self.truncate_after(previous.index, batch, actions)?;
        }
        self.log.push(batch);
        actions.push(Action::Persist { batch });
        self.take_configuration(&batch, configuration.map(|configuration| *configuration), actions);
        Ok(false)
    }

    /// Drops what contradicts the leader's `batch`.
    fn truncate_after(
        &mut self,
        after: LogIndex,
        batch: BatchRun,
        actions: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        if after < self.commit {
            return Err(self.committed_differs(self.hard.term(), batch.end()));
        }
        if after < self.hearing.matched {
            return Err(self.leader_rewrote(self.hard.term(), batch.end()));
        }
        self.cut(after, actions);
        Ok(())
    }

    /// Commits what the leader has committed, as far as the logs are verified to be equal.
    fn follow_commit(&mut self, commit: LogIndex, actions: &mut Vec<Action>) {
        let matched = if mutants::active(Mutant::CommitBeyondMatch) {
            self.log.last().index
        } else {
            self.hearing.matched
        };
        if let Some(up_to) = self.log.floor(commit.min(matched))
            && up_to > self.commit
        {
            self.commit = up_to;
            actions.push(Action::Commit { up_to });
        }
    }

    /// What this node may acknowledge: durable, and verified to be equal to the leader's log.
    fn acknowledged(&self) -> LogId {
        let index = if mutants::active(Mutant::AckBeforeDurable) {
            self.hearing.matched
        } else {
            self.repair.countable(self.durable.last().min(self.hearing.matched), self.hearing.acked)
        };
        // Both are batch ends of this log.
        self.log.batch_end_at(index).unwrap_or(self.log.start())
    }

    fn acknowledge(&mut self, leader: NodeId, actions: &mut Vec<Action>) {
        let matched = self.acknowledged();
        self.hearing.acked = matched.index;
        self.answer(leader, AppendOutcome::Matched { matched }, actions);
    }

    /// Where this log may agree with one that has `refused`: the last batch end at or below it whose term is not
    /// later. Whole terms are skipped, so that a leader finds the fork in as many steps as there are terms.
    fn hint_below(&self, refused: LogId) -> LogId {
        // At least the commit index: the refused position is above it and the leader's log holds it.
        self.log.floor_within_term(refused.index, refused.term).unwrap_or(self.log.start())
    }

    fn answer(&mut self, to: NodeId, outcome: AppendOutcome, actions: &mut Vec<Action>) {
        let ack = AppendAck { term: self.hard.term(), round: self.hearing.round, outcome };
        self.hard.outbox(actions).send(to, Message::AppendAck(ack));
    }

    fn committed_differs(&self, term: Term, at: LogId) -> Violation {
        Violation::CommittedDiffers { term, commit: self.commit, at }
    }

    fn leader_rewrote(&self, term: Term, at: LogId) -> Violation {
        Violation::LeaderRewrote { term, matched: self.hearing.matched, at }
    }

    fn sealed_twice(&self, at: LogId) -> Violation {
        Violation::SealedTwice { index: at.index, term: at.term, here: self.log.batch_at(at.index) }
    }
}

/// Whether the numbers of an append can be of one log at all.
fn well_formed(append: &Append) -> bool {
    let Append { term, previous, batch, .. } = append;
    let position = (previous.index.get() == 0) == (previous.term.get() == 0);
    let follows = batch.as_ref().is_none_or(|batch| {
        batch.first > previous.index
            && batch.first == previous.index.next()
            && batch.last >= batch.first
            && batch.last <= INDEX_MAX
            && batch.last.get() - batch.first.get() < u64::from(u32::MAX)
            && batch.term >= previous.term
            && batch.term <= *term
    });
    position && follows && previous.term <= *term && term.get() > 0
}
