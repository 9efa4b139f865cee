//! A node whose log is damaged, and what it may still do (see the crate's log for what is found, and how).
//!
//! Two kinds. **Known**: a batch whose identity is intact and whose bytes are not. The log is complete as far as
//! votes go; but nothing at or behind the batch is acknowledged, and the node does not campaign, until its bytes are
//! there again. Only what was acknowledged before the damage was found stays so, in that term and session: the leader
//! counts it already, and to take what lies behind out as well would stop its commits and make no copy whole. The next
//! leader, or the same one over a new session, begins to count anew, and is told what can be read. **A claim**: the log was
//! cut before the damage, and more was there. What of it was acknowledged is known (a *certain* claim: the end of the log
//! that was) or is not.
//!
//! What a claim forbids follows from what was forgotten: the node may have acknowledged, and a leader may have
//! counted, entries that its log no longer shows. So it must not help to elect anyone who lacks them.
//!
//! - Certain: it votes as if its log ended at the claim, and is free when it does again, or in a later term.
//! - Not certain: it does not vote at all, until one of these holds:
//!   1. it is durable through a committed entry of a term above any that it knew: whoever leads such a term was
//!      elected without it, and holds all that was committed;
//!   2. it is durable through all that the leader of its present term held at some moment after this start: what it
//!      ever acknowledged to that leader is in that, and an older leader can commit nothing more without its
//!      being there ([`Event::LeaderHolds`](super::Event::LeaderHolds));
//!   3. every voter has been asked ([`Inquiry`]): then it votes as if its log ended at the highest end that any other of
//!      them can show, and is free when it does. What is committed lies intact at one of them (the contract's bound),
//!      so whoever reaches that end holds it (Raft, section 5.4.1: the later log is the more complete one). That end is
//!      believed when a voter reaches it that is sure of its own log, or when fewer than a quorum are in doubt about
//!      theirs: a batch behind it would then be in the logs of no quorum. Otherwise the highest end is that of voters
//!      which may have had more: all copies of one more batch may be gone, against the bound, and there is nothing to be
//!      done but to wait, and to say so. (Who knows of a change of the voters that this node's log lacks is in doubt, too:
//!      others than those who are asked may have more.)
//! - Either: every voter has been asked and none holds any batch behind the end of this log: what was there has been
//!   lost everywhere, or was never acknowledged ([`Event::NothingBehind`](super::Event::NothingBehind)). Unless another voter
//!   reaches a higher term than this log's last: then the end of this log may be void itself, by a cut that is forgotten
//!   too, and what the node forgot may be what that voter has. So it is as in 3, a certain claim goes on, and a batch that
//!   cannot be read is not cut off: with it would go what is kept aside, which may be what replaced it. A lower or equal
//!   term is no such sign: who cut this log did so for a leader of a term above that of all that he cut off, what that one
//!   committed with this node's word ends in his term, and batches of one term are those of one log.
//!
//! In 3 and in the last rule, where a voter's log ends counts, whoever else has that: a leader commits what is in his own. What
//! a voter only kept aside, or claims, was acknowledged once, and counts if a quorum may have done so.
//!
//! Who has forgotten a change of the members asks the voters of before it. That is noticed if one of them knows of the
//! change. If those that had it all have forgotten it, too, it is not: so one intact copy of a change has to be at a voter of the
//! configuration before it.
//!
//! What it forgot it may only take from elsewhere when it is proved to be the same: a leader's log, or a batch over
//! which one that it kept itself verifies ([`Event::Adopt`](super::Event::Adopt)). The highest term among the batches
//! that others hold at a position proves nothing: a lower one may be committed under a later term's entries.

use super::role::RoleState;
use super::{Action, BatchRun, Configuration, LogId, Quorum, Raft, Violation};
use crate::mutants::{self, Mutant};
use ringraft_block::{LogIndex, NodeId, Term};
use std::collections::{BTreeMap, BTreeSet};

/// More was in this node's log than can be read: it was cut before the damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Certain: the term of the last entry that was there. Otherwise the highest term that this node knew.
    pub term: Term,
    /// Certain: the index of that entry. Otherwise the highest index of which anything proves that it was there.
    pub last: LogIndex,
    /// Whether the end of the log that was there is known.
    pub certain: bool,
}

impl Claim {
    /// The end of the log that was there, where known.
    #[must_use]
    pub fn end(&self) -> Option<LogId> {
        self.certain.then_some(LogId { term: self.term, index: self.last })
    }
}

/// What restrains this node.
#[derive(Clone, Debug, Default)]
pub(super) struct Repair {
    /// First indexes of the batches that are known and cannot be read. Of those that were found at the start only the first
    /// one, before the log has told of a change.
    damaged: BTreeSet<LogIndex>,
    claim: Option<Claim>,
    /// What stands for the end of the log that was there while the claim is not certain.
    floor: Option<LogId>,
    /// All that the leader of that term held at some moment of this life.
    leader_held: Option<(Term, LogId)>,
    /// The disk does not answer.
    stalled: bool,
    /// What was applied before the log's start cannot be read.
    state_lost: bool,
}

impl Repair {
    pub(super) fn new(damaged_from: Option<LogIndex>, claim: Option<Claim>) -> Self {
        Self { damaged: damaged_from.into_iter().collect(), claim, ..Self::default() }
    }

    pub(super) fn claim(&self) -> Option<Claim> {
        self.claim
    }

    pub(super) fn damaged_from(&self) -> Option<LogIndex> {
        self.damaged.first().copied()
    }

    pub(super) fn damaged(&self) -> &BTreeSet<LogIndex> {
        &self.damaged
    }

    pub(super) fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// How far `index` may be acknowledged to whom `acked` was acknowledged before: a batch that cannot be read ends it, unless
    /// it lies in that.
    pub(super) fn countable(&self, index: LogIndex, acked: LogIndex) -> LogIndex {
        if mutants::active(Mutant::DamageAcknowledged) {
            return index;
        }
        self.damaged.range(acked.next()..).next().map_or(index, |first| index.min(first.previous()))
    }

    /// Whether nothing keeps this node from leading.
    pub(super) fn is_whole(&self) -> bool {
        self.damaged.is_empty() && self.claim.is_none() && !self.stalled && !self.state_lost
    }

    pub(super) fn is_state_lost(&self) -> bool {
        self.state_lost
    }

    pub(super) fn lose_state(&mut self, lost: bool) {
        self.state_lost = lost;
    }

    /// What cannot be read up to `start` is not missed any more.
    pub(super) fn start_behind(&mut self, start: LogIndex) {
        self.damaged.retain(|first| *first > start);
    }

    /// Where the log of a candidate must end at least, when this node's own ends at `last`; none while it may not
    /// vote.
    pub(super) fn vote_bar(&self, last: LogId) -> Option<LogId> {
        let was = match self.claim {
            _ if self.stalled => return None,
            None => last,
            Some(claim) => claim.end().or(self.floor)?,
        };
        Some(was.max(last))
    }

    fn cut_after(&mut self, after: LogIndex) {
        self.damaged.retain(|first| *first <= after);
    }
}

impl Raft {
    /// The batches that cannot be read are these now.
    pub(super) fn damage_changed(
        &mut self,
        damaged: BTreeSet<LogIndex>,
        actions: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        if let Some(first) = damaged.iter().find(|first| self.log.batch_starting_at(**first).is_none()) {
            return Err(Violation::DamageUnknown { first: *first });
        }
        let was_whole = self.repair.is_whole();
        self.repair.damaged = damaged;
        self.restraint_changed(was_whole, actions);
        self.acknowledge_news(actions);
        Ok(())
    }

    /// The disk stopped answering, or answers again.
    pub(super) fn stalled(&mut self, stalled: bool, actions: &mut Vec<Action>) {
        let was_whole = self.repair.is_whole();
        self.repair.stalled = stalled;
        if stalled && matches!(self.role, RoleState::Leader(_)) {
            // A leader that cannot make its own term durable, nor anything after it, keeps others from leading.
            self.hand_over_now(actions);
            return self.become_follower(self.hard.term(), None, actions);
        }
        self.restraint_changed(was_whole, actions);
    }

    pub(super) fn restraint_changed(&mut self, was_whole: bool, actions: &mut Vec<Action>) {
        match (was_whole, self.repair.is_whole()) {
            (false, true) if !matches!(self.role, RoleState::Leader(_)) => self.restart_election_timer(),
            (true, false)
                if matches!(self.role, RoleState::PreCandidate(_) | RoleState::Candidate { .. }) =>
            {
                self.become_follower(self.hard.term(), None, actions);
            }
            _ => {}
        }
    }

    /// A batch that is proved to have been in this log, behind its end, is there again.
    pub(super) fn adopt(
        &mut self,
        batch: BatchRun,
        configuration: Option<Box<Configuration>>,
        actions: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        let allowed = self.repair.claim.is_some()
            && self.leader.is_none()
            && matches!(self.role, RoleState::Follower)
            && batch.term <= self.hard.term();
        if !allowed || !self.log.continues_with(&batch) {
            return Err(Violation::AdoptedElsewhere { batch, last: self.log.last() });
        }
        self.log.push(batch);
        actions.push(Action::Persist { batch });
        self.take_configuration(&batch, configuration.map(|configuration| *configuration), actions);
        Ok(())
    }

    /// `leader` held a log that ended at `last` after this start, in `term`.
    pub(super) fn leader_holds(&mut self, leader: NodeId, term: Term, last: LogId) {
        let known = self.repair.leader_held.is_some_and(|(known, _)| known == term);
        // The first answer is the easiest to reach, and as good as any.
        if self.leader == Some(leader) && term == self.hard.term() && last.term <= term && !known {
            self.repair.leader_held = Some((term, last));
        }
    }

    /// Every voter has been asked twice: none reaches beyond what is said of `elsewhere`.
    pub(super) fn all_asked(&mut self, elsewhere: Elsewhere) {
        // Nobody knows who all of them are while the members are not known.
        let members_known = !self.configurations.is_uncertain();
        if elsewhere.believed && members_known && self.repair.claim.is_some_and(|claim| !claim.certain) {
            self.repair.floor = Some(elsewhere.highest);
        }
    }

    /// Every voter has been asked twice, and none holds a batch behind `after`, the last good batch of this log: what
    /// was there was not committed.
    pub(super) fn nothing_behind(
        &mut self,
        after: LogIndex,
        elsewhere: Elsewhere,
        actions: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        let idle = matches!(self.role, RoleState::Follower) && self.leader.is_none();
        let damaged = self.repair.damaged_from().is_some_and(|from| from.previous() == after);
        if damaged && after >= self.commit && matches!(self.role, RoleState::Leader(_)) {
            // Nobody can be sent what follows either: only a leader without that batch gets on.
            self.become_follower(self.hard.term(), None, actions);
            return Ok(());
        }
        let at_end = after == self.log.last().index && self.repair.claim.is_some();
        // What was taken back from what the log kept aside: with the claim, the only other copy of it goes.
        let durable = self.durable.last() >= after;
        // A leader settles it otherwise; a log that has changed makes it another question.
        let known = !self.configurations.is_uncertain();
        if !idle || !known || !(damaged || at_end) || !durable || after < self.commit {
            return Ok(());
        }
        let may_be_void =
            self.end_may_be_void(elsewhere.highest) && !mutants::active(Mutant::ClaimEndsAtVoidEnd);
        if may_be_void {
            // With it would go what is kept aside, and that may be what replaced it.
            self.all_asked(elsewhere);
        } else if damaged {
            self.cut(after, actions);
            // A certain claim stands for what followed the damaged batch, and goes with it. An uncertain one may stand for
            // others in their place, which were written after a cut that is forgotten too: nobody has been asked about those.
            let goes = self.repair.claim.is_some_and(|claim| claim.certain);
            if goes { self.release(actions) } else { self.restart_election_timer() }
        } else {
            self.release(actions);
        }
        Ok(())
    }

    /// Whether what ends this log may have been cut off once by a leader of a higher term, of which this node and its log no
    /// longer know, when other voters reach to `highest`.
    fn end_may_be_void(&self, highest: LogId) -> bool {
        let (last, start) = (self.log.last(), self.log.start());
        // What is committed, or in a snapshot, is cut off by nobody, and the claim names the highest term that was there.
        let settled = last.index <= self.commit.max(start.index);
        let newer = self.repair.claim.is_some_and(|claim| claim.term > last.term);
        !settled && newer && highest.term > last.term
    }

    /// Whether this log has a change of the voters that one which ends before `first` lacks.
    #[must_use]
    pub fn has_other_voters_from(&self, first: LogIndex) -> bool {
        let before = self.configuration_at(first.previous()).map(|(_, before)| Quorum::of(before));
        let differs = |configuration| before.as_ref().is_none_or(|before| !before.is_of(configuration));
        self.configurations().any(|(index, configuration)| index >= first && differs(configuration))
    }

    /// Drops everything after `after`, a batch end.
    pub(super) fn cut(&mut self, after: LogIndex, actions: &mut Vec<Action>) {
        self.log.truncate_after(after);
        if !mutants::active(Mutant::ConfigurationNotReverted) && self.configurations.truncate_after(after) {
            self.configuration_changed(actions);
        }
        self.hearing.matched = self.hearing.matched.min(after);
        self.hearing.acked = self.hearing.acked.min(after);
        self.repair.cut_after(after);
        let epoch = self.durable.truncate(after);
        actions.push(Action::Truncate { after, epoch });
    }

    /// Gives the claim up when nothing is left of what it stands for.
    pub(super) fn release_if_due(&mut self, actions: &mut Vec<Action>) {
        let Some(claim) = self.repair.claim else { return };
        let durable = self.durable.last();
        let Some(end) = self.log.batch_end_at(durable) else { return };
        let reached = claim.end().or(self.repair.floor).is_some_and(|was| end >= was);
        let later_term = !claim.certain
            && self.commit <= durable
            && self.log.term_at(self.commit).is_some_and(|term| {
                term > claim.term || (term == claim.term && mutants::active(Mutant::ClaimEndsInItsTerm))
            });
        let as_leader = !claim.certain
            && self.repair.leader_held.is_some_and(|(term, last)| {
                term == self.hard.term()
                    && self.leader.is_some()
                    && last.index <= durable.min(self.hearing.matched)
                    && self.log.batch_end_at(last.index) == Some(last)
            });
        if reached || later_term || as_leader {
            self.release(actions);
        }
    }

    fn release(&mut self, actions: &mut Vec<Action>) {
        self.repair.claim = None;
        self.repair.floor = None;
        actions.push(Action::ReleaseClaim);
        if matches!(self.role, RoleState::Follower) {
            self.restart_election_timer();
        }
    }
}

/// What restrains a node, to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Restraint {
    /// First index of the first batch that cannot be read.
    pub damaged_from: Option<LogIndex>,
    /// More was in the log than is.
    pub claim: Option<Claim>,
    /// Where a candidate's log must end at least; none while this node votes for nobody.
    pub vote_bar: Option<LogId>,
    /// The disk does not answer.
    pub stalled: bool,
    /// What was applied before the log's start cannot be read.
    pub state_lost: bool,
    /// The newest configuration of the log cannot be read: who decides is not known.
    pub members_unknown: bool,
}

/// What a voter says about the batch behind a position, from all that it has: its log, and what it kept aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It holds one that follows the position, intact; whether it is the one that is missing is not proved.
    Other,
    /// It had one, or something that may have been one, and cannot read it.
    Had,
    /// It holds none, and may have had one: it cannot tell before it has got back what its log lacks before the position.
    Unclear,
    /// It has none.
    None,
}

/// What became of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody holds the batch, and too few had it for it to be committed: it can be given up.
    Nowhere(Elsewhere),
    /// Nobody holds the batch, and a quorum had it: it may have been committed, and all copies of it are gone.
    AllCopiesGone,
    /// Batches that may be others lie behind the position, or too many cannot tell whether they had one.
    Unproved(Elsewhere),
}

/// Where the others' logs end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elsewhere {
    /// The highest end that another voter reported: of its log, or of what it kept aside or had if a quorum may have had that.
    /// When a quorum, the asking one included, may have had more than they can show, its own is among them: of what it
    /// kept aside there may be no other copy. Otherwise somebody else acknowledged that too and did not lose it without
    /// knowing, and has reported it.
    pub highest: LogId,
    /// Whether it is reached by one that is sure of its log, or too few are in doubt for there to have been more.
    pub believed: bool,
}

/// How far all that a voter holds reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// The end of its log, of what it kept aside, or of what it is certain to have had: the highest.
    pub highest: LogId,
    /// It may have had more, and cannot tell: it makes a claim that is not certain. Or it knows of a change of the members
    /// that whoever asks does not, so that others than those who are asked may have more.
    pub in_doubt: bool,
    /// It makes a claim: not all of it is its log.
    pub claims: bool,
}

/// One question to all other voters: who holds the batch behind this position?
///
/// Answers are not given at one moment. A batch that a leader still holds can reach a voter after that one has said no,
/// be committed there with an acknowledgement that this node has forgotten, and be lost with the leader's
/// memory before the leader is asked. So everybody is asked twice, the second time after all have answered once:
/// a leader who counts on this node's word held the batch before the question was first put and answers with it;
/// and what was committed before the second round began lies intact at somebody who is asked in it.
#[derive(Clone, Debug)]
pub struct Inquiry {
    /// Who asks.
    own: NodeId,
    quorum: Quorum,
    /// Everyone to be asked.
    voters: BTreeSet<NodeId>,
    second: bool,
    /// Who has not answered in this round.
    open: BTreeSet<NodeId>,
    had: BTreeSet<NodeId>,
    unclear: BTreeSet<NodeId>,
    other: BTreeSet<NodeId>,
    /// Of whom it is in doubt, by their last answers, where their logs ended.
    in_doubt: BTreeSet<NodeId>,
    /// How far all that each holds reached at most.
    reaches: BTreeMap<NodeId, LogId>,
    /// The same by answers without a claim: where logs ended.
    ends: BTreeMap<NodeId, LogId>,
}

impl Inquiry {
    /// A question of `own`, which had such a batch, to all other voters of `quorum`. `reach` says how far all that it
    /// holds itself reaches.
    #[must_use]
    pub fn new(own: NodeId, quorum: &Quorum, reach: Reach) -> Self {
        let voters: BTreeSet<NodeId> = quorum.voters().filter(|voter| *voter != own).collect();
        let (had, unclear, other) = ([own].into(), BTreeSet::new(), BTreeSet::new());
        let in_doubt = reach.in_doubt.then_some(own).into_iter().collect();
        let reaches = [(own, reach.highest)].into();
        let ends = (!reach.claims).then_some((own, reach.highest)).into_iter().collect();
        Self {
            own,
            quorum: quorum.clone(),
            open: voters.clone(),
            voters,
            second: false,
            had,
            unclear,
            other,
            in_doubt,
            reaches,
            ends,
        }
    }

    /// Whether it is put to the voters of this quorum: to others it would be another question.
    #[must_use]
    pub fn is_of(&self, quorum: &Quorum) -> bool {
        self.quorum == *quorum
    }

    /// Who has to be asked now, in a round of this number.
    pub fn open(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.open.iter().copied()
    }

    /// Whose answers leave open what was there. Of a claim these are also those that reach a higher term than the `end` of
    /// the log, and those in doubt, who may have had more than they say.
    pub fn doubted(&self, end: Option<LogId>) -> BTreeSet<NodeId> {
        let told = self.other.union(&self.unclear).copied();
        let Some(end) = end else { return told.collect() };
        let above = self.reaches.iter().filter(|(_, reach)| reach.term > end.term).map(|(id, _)| *id);
        told.chain(above).chain(self.in_doubt.iter().copied()).filter(|id| *id != self.own).collect()
    }

    /// The round, which answers must name: one of an earlier round is void.
    #[must_use]
    pub fn round(&self) -> u8 {
        u8::from(self.second)
    }

    /// `voter` answers in `round`; `reach` says how far all that it holds reaches.
    pub fn answered(&mut self, voter: NodeId, round: u8, answer: Answer, reach: Reach) {
        if round != self.round() || !self.open.remove(&voter) {
            return;
        }
        let raise = |most: &mut BTreeMap<NodeId, LogId>| {
            let highest = most.entry(voter).or_default();
            *highest = reach.highest.max(*highest);
        };
        raise(&mut self.reaches);
        if !reach.claims {
            raise(&mut self.ends);
        }
        if reach.in_doubt {
            self.in_doubt.insert(voter);
        } else {
            // In the meantime it may have been settled.
            self.in_doubt.remove(&voter);
        }
        match answer {
            Answer::Other => drop(self.other.insert(voter)),
            Answer::Had => drop(self.had.insert(voter)),
            Answer::Unclear => drop(self.unclear.insert(voter)),
            Answer::None => {}
        }
    }

    /// What follows from the answers, once all are there; the second round begins by itself.
    pub fn verdict(&mut self) -> Option<Verdict> {
        if !self.open.is_empty() {
            return None;
        }
        if !std::mem::replace(&mut self.second, true) {
            self.open.clone_from(&self.voters);
            // A cluster of one has nobody to ask.
            if !self.open.is_empty() {
                return None;
            }
        }
        let lost_more = self.quorum.reached(|id| self.in_doubt.contains(&id));
        let lost_with_own = self.quorum.reached(|id| id == self.own || self.in_doubt.contains(&id));
        let may_have = |end: LogId| {
            let reaches = |id| self.reaches.get(&id).is_some_and(|reach| *reach >= end);
            self.quorum.reached(|id| id == self.own || self.in_doubt.contains(&id) || reaches(id))
        };
        let reaches = self.reaches.iter().filter(|(_, end)| may_have(**end)).chain(&self.ends);
        let reaches = reaches.filter(|(id, _)| lost_with_own || **id != self.own);
        let highest = reaches.map(|(_, end)| *end).max().unwrap_or_default();
        let sure = self.reaches.iter().filter(|(id, _)| !self.in_doubt.contains(id));
        let sure = sure.map(|(_, end)| *end).max().unwrap_or_default();
        let elsewhere = Elsewhere { highest, believed: !lost_more || sure >= highest };
        Some(match self.other.is_empty() {
            false => Verdict::Unproved(elsewhere),
            true if self.quorum.reached(|id| self.had.contains(&id)) => Verdict::AllCopiesGone,
            true if self.quorum.reached(|id| self.had.contains(&id) || self.unclear.contains(&id)) => {
                Verdict::Unproved(elsewhere)
            }
            true => Verdict::Nowhere(elsewhere),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::{Configuration, Member, MemberRole};
    use ringraft_block::Incarnation;

    fn quorum(voters: u64) -> Quorum {
        let members = (1..=voters).map(|id| Member {
            id: NodeId(id),
            incarnation: Incarnation(1),
            address: String::new(),
            role: MemberRole::Voter,
        });
        Quorum::of(&Configuration::new(members.collect()).expect("valid"))
    }

    fn end(term: u64, index: u64) -> LogId {
        LogId { term: Term(term), index: LogIndex(index) }
    }

    fn nowhere(highest: LogId) -> Verdict {
        Verdict::Nowhere(Elsewhere { highest, believed: true })
    }

    fn sure(term: u64, index: u64) -> Reach {
        Reach { highest: end(term, index), in_doubt: false, claims: false }
    }

    fn doubted(term: u64, index: u64) -> Reach {
        Reach { highest: end(term, index), in_doubt: true, claims: true }
    }

    #[test]
    fn a_question_is_put_to_everyone_twice_and_a_late_answer_of_the_first_round_is_void() {
        let quorum = quorum(3);
        let mut inquiry = Inquiry::new(NodeId(1), &quorum, sure(1, 4));
        inquiry.answered(NodeId(2), 0, Answer::None, sure(2, 9));
        assert_eq!(inquiry.verdict(), None, "3 has not answered");
        inquiry.answered(NodeId(3), 0, Answer::None, sure(1, 3));
        assert_eq!(inquiry.verdict(), None, "a second round");
        assert_eq!(inquiry.open().collect::<Vec<_>>(), [NodeId(2), NodeId(3)]);
        inquiry.answered(NodeId(2), 0, Answer::None, sure(2, 9));
        assert_eq!(inquiry.open().count(), 2);
        inquiry.answered(NodeId(2), 1, Answer::None, sure(2, 3));
        inquiry.answered(NodeId(3), 1, Answer::None, sure(1, 3));
        assert_eq!(inquiry.verdict(), Some(nowhere(end(2, 9))));
    }

    #[test]
    fn what_a_quorum_had_and_nobody_holds_may_have_been_committed() {
        let ask = |voters, answers: &[Answer]| {
            let quorum = quorum(voters);
            let mut inquiry = Inquiry::new(NodeId(1), &quorum, sure(1, 1));
            for _ in 0..2 {
                for (voter, answer) in (2..).zip(answers) {
                    inquiry.answered(NodeId(voter), inquiry.round(), *answer, sure(1, 1));
                }
                if let Some(verdict) = inquiry.verdict() {
                    return verdict;
                }
            }
            panic!("no verdict");
        };
        let highest = end(1, 1);
        let unproved = Verdict::Unproved(Elsewhere { highest, believed: true });
        use Answer::{Had, None, Other, Unclear};
        assert_eq!(ask(1, &[]), Verdict::AllCopiesGone);
        assert_eq!(ask(3, &[None, None]), nowhere(highest));
        assert_eq!(ask(3, &[None, Had]), Verdict::AllCopiesGone);
        assert_eq!(ask(3, &[Other, Had]), unproved);
        assert_eq!(ask(3, &[None, Unclear]), unproved);
        assert_eq!(ask(5, &[None, None, None, Unclear]), nowhere(highest));
        assert_eq!(ask(5, &[None, None, Had, Unclear]), unproved);
        assert_eq!(ask(5, &[None, None, None, Had]), nowhere(highest));
        assert_eq!(ask(5, &[None, None, Had, Had]), Verdict::AllCopiesGone);
    }

    #[test]
    fn what_only_the_asking_one_kept_aside_says_where_logs_end_when_a_quorum_is_in_doubt() {
        let ask = |answer: Answer, reach: Reach| {
            let quorum = quorum(3);
            let mut inquiry = Inquiry::new(NodeId(1), &quorum, doubted(2, 9));
            for _ in 0..2 {
                inquiry.answered(NodeId(2), inquiry.round(), answer, reach);
                inquiry.answered(NodeId(3), inquiry.round(), Answer::None, sure(1, 4));
                if let Some(verdict) = inquiry.verdict() {
                    return (verdict, inquiry.doubted(Some(end(1, 7))));
                }
            }
            panic!("no verdict");
        };
        assert_eq!(ask(Answer::None, sure(1, 8)), (nowhere(end(1, 8)), [].into()), "of the same term");
        assert_eq!(ask(Answer::None, sure(2, 2)), (nowhere(end(2, 2)), [NodeId(2)].into()));
        let elsewhere = Elsewhere { highest: end(2, 9), believed: false };
        assert_eq!(
            ask(Answer::None, doubted(1, 8)),
            (Verdict::Nowhere(elsewhere), [NodeId(2)].into()),
            "in doubt"
        );
    }

    #[test]
    fn what_is_only_claimed_counts_if_a_quorum_may_have_had_it() {
        let claimed = |term, index| Reach { claims: true, ..sure(term, index) };
        let ask = |voters: u64, answers: &[(Answer, Reach)]| {
            let quorum = quorum(voters);
            let mut inquiry = Inquiry::new(NodeId(1), &quorum, claimed(5, 9));
            for _ in 0..2 {
                for (voter, (answer, reach)) in (2..).zip(answers) {
                    inquiry.answered(NodeId(voter), inquiry.round(), *answer, *reach);
                }
                if let Some(verdict) = inquiry.verdict() {
                    return verdict;
                }
            }
            panic!("no verdict");
        };
        use Answer::{Had, None, Unclear};
        let low = (None, sure(4, 7));
        assert_eq!(
            ask(4, &[(Had, claimed(5, 9)), low, low]),
            nowhere(end(4, 7)),
            "two of four, and never a third"
        );
        assert_eq!(ask(4, &[(Had, claimed(5, 9)), (None, sure(5, 8)), low]), nowhere(end(5, 8)));
        assert_eq!(ask(4, &[(None, claimed(5, 8)), (None, claimed(5, 9)), low]), nowhere(end(5, 8)));
        let doubted = Reach { in_doubt: true, ..claimed(4, 9) };
        let verdict = Verdict::Unproved(Elsewhere { highest: end(5, 9), believed: true });
        assert_eq!(ask(4, &[(Unclear, doubted), (Had, claimed(5, 9)), low]), verdict);
    }

    #[test]
    fn the_highest_end_says_nothing_when_a_quorum_may_have_had_more() {
        let ask = |own: Reach, first: [Reach; 2], second: [Reach; 2]| {
            let quorum = quorum(3);
            let mut inquiry = Inquiry::new(NodeId(1), &quorum, own);
            for reaches in [first, second] {
                for (voter, reach) in (2..).zip(reaches) {
                    inquiry.answered(NodeId(voter), inquiry.round(), Answer::Other, reach);
                }
                if let Some(verdict) = inquiry.verdict() {
                    return verdict;
                }
            }
            panic!("no verdict");
        };
        let reached = |highest: Option<LogId>| {
            let believed = highest.is_some();
            Verdict::Unproved(Elsewhere { highest: highest.unwrap_or(end(1, 9)), believed })
        };
        let one = [sure(1, 9), sure(1, 7)];
        assert_eq!(ask(doubted(1, 4), one, one), reached(Some(end(1, 9))));
        let two = [doubted(1, 9), sure(1, 7)];
        assert_eq!(ask(doubted(1, 4), two, two), reached(None));
        assert_eq!(ask(sure(1, 4), two, two), reached(Some(end(1, 9))), "a known batch is missing here");
        assert_eq!(ask(doubted(1, 4), two, one), reached(Some(end(1, 9))), "settled in between");
        let all_but_one = [sure(1, 9), doubted(1, 7)];
        assert_eq!(ask(doubted(1, 4), all_but_one, all_but_one), reached(Some(end(1, 9))), "one is sure");
    }
}
