//! Changing the members, by joint consensus (Raft, section 6; thesis, sections 4.2 and 4.3).
//!
//! Happy path at the leader: new voters come in as learners, with the plan in the configuration → they catch up, in rounds
//! → a joint configuration of the old and the new voters → the new configuration → whoever is not in it is no longer sent
//! to. Each step is an entry of the log and begins when the one before is committed. A leader finishes what it finds,
//! whoever began it. A leader that is not in the new configuration leads, without counting itself, until that is
//! committed, and then steps down.
//!
//! A change is refused before an entry of the leader's own term is committed: until then a change of an earlier term may be
//! under way that this leader does not know to be committed.
//!
//! Failures: a future voter that gets nowhere, or stays behind, ends the change; it stays a learner. A leader that falls
//! leaves the change to the next one, or it is truncated with the entry.

use super::change::{Change, ChangeError, Changed, Plan};
use super::role::{Leader, RoleState};
use super::{Action, BatchRun, Configuration, MemberRole, Nanos, Quorum, Raft, ReplicationState, Violation};
use crate::mutants::{self, Mutant};
use ringraft_block::{LogIndex, NodeId};

/// Thesis, section 4.2.1: "the algorithm waits a fixed number of rounds (such as 10)".
const ROUNDS_MAX: u32 = 10;

/// A future voter that acknowledges nothing more for this many election time-outs is stuck.
const STUCK_TIMEOUTS: u64 = 10;

/// So is one to which so many transfers of a snapshot in a row have come to nothing: it has no space, say.
const SNAPSHOTS_FAILED_MAX: u32 = 5;

/// What a leader knows of the change that it leads.
#[derive(Clone, Debug, Default)]
pub(super) struct Changing {
    /// Whom to tell: none if another leader was asked.
    ticket: Option<u64>,
    reserved: Option<NodeId>,
    /// Why it is being given up.
    failed: Option<ChangeError>,
    rounds: Vec<CatchUp>,
    /// Given to the driver to be sealed.
    sealing: Option<Configuration>,
    /// To be given to it at the end of the event.
    to_seal: bool,
    /// Who has left the configuration, since which index, and until when it is sent to at the latest, once that is committed.
    leaving: Vec<(NodeId, LogIndex, Option<Nanos>)>,
}

impl Changing {
    pub(super) fn is_leaving(&self, id: NodeId) -> bool {
        self.leaving.iter().any(|(leaving, ..)| *leaving == id)
    }

    /// What makes two of them behave alike, times aside.
    #[cfg(test)]
    pub(super) fn fingerprint(&self, into: &mut impl std::hash::Hasher) {
        use std::hash::Hash;
        let Self { ticket, reserved, failed, rounds, sealing, to_seal, leaving } = self;
        (ticket, reserved, failed.is_some(), sealing, to_seal).hash(into);
        rounds.len().hash(into);
        for CatchUp { id, number, target, since: _, matched, moved_at: _, done } in rounds {
            (id, number, target, matched, done).hash(into);
        }
        leaving.len().hash(into);
        leaving.iter().for_each(|(id, index, until)| (id, index, until.is_some()).hash(into));
    }
}

/// A future voter on its way to the end of the log: "a round consists of replicating all the log entries present in the
/// leader's log at the start of the round" (thesis, section 4.2.1).
#[derive(Clone, Debug)]
struct CatchUp {
    id: NodeId,
    number: u32,
    target: LogIndex,
    since: Nanos,
    matched: LogIndex,
    moved_at: Nanos,
    done: bool,
}

enum CaughtUp {
    Yes,
    NotYet,
    Never(ChangeError),
}

// What a leader is asked.

impl Raft {
    /// Somebody wants the members changed.
    pub(super) fn change(&mut self, ticket: u64, change: &Change, actions: &mut Vec<Action>) {
        let outcome = match self.first_step(change) {
            Ok(Some(first)) => {
                let reserved = change.reserve_id.then(|| self.configuration().next_id());
                let RoleState::Leader(leader) = &mut self.role else { return };
                leader.changing.ticket = Some(ticket);
                leader.changing.reserved = reserved;
                leader.changing.failed = None;
                return self.seal_configuration(first);
            }
            Ok(None) => Ok(Changed { index: self.configurations.index(), reserved: None }),
            Err(error) => Err(error),
        };
        actions.push(Action::ChangeEnded { ticket, outcome });
    }

    /// What `change` would do now, at this node.
    #[must_use]
    pub fn plan(&self, change: &Change) -> Plan {
        let faults = |configuration: &Configuration| (configuration.incoming_voters().count() - 1) / 2;
        let now = faults(self.configuration());
        match self.first_step(change) {
            Ok(None) => {
                Plan { steps: Vec::new(), to_catch_up: Vec::new(), refused: None, tolerates: (now, now) }
            }
            Ok(Some(first)) => {
                let to_catch_up = first.to_catch_up().collect();
                let mut steps = vec![first];
                while let Some(next) =
                    steps.last().filter(|last| !last.is_settled()).map(Configuration::next_step)
                {
                    steps.push(next);
                }
                let then = steps.last().map_or(now, faults);
                Plan { steps, to_catch_up, refused: None, tolerates: (now, then) }
            }
            Err(error) => Plan {
                steps: Vec::new(),
                to_catch_up: Vec::new(),
                refused: Some(error),
                tolerates: (now, now),
            },
        }
    }

    /// Whether this leader knows what is committed, so that it may change the members: it has committed in its own term. In a
    /// cluster that only elects nothing has to be known to refuse it.
    #[must_use]
    pub fn is_ready_for_changes(&self) -> bool {
        let knows = |leader: &Leader| leader.first_own.is_some_and(|first| first <= self.commit);
        matches!(&self.role, RoleState::Leader(leader) if knows(leader) || self.config.consensus_only)
    }

    fn first_step(&self, change: &Change) -> Result<Option<Configuration>, ChangeError> {
        let RoleState::Leader(leader) = &self.role else { return Err(ChangeError::NotLeader) };
        if self.config.consensus_only {
            return Err(ChangeError::ConsensusOnly);
        }
        if let Some(to) = self.transfer_target() {
            return Err(ChangeError::Transferring { to });
        }
        let own_term = leader.first_own.is_some_and(|first| first <= self.commit);
        if !own_term && !mutants::active(Mutant::ChangeBeforeOwnTermCommit) || leader.first_own.is_none() {
            return Err(ChangeError::NotReady);
        }
        let index = self.configurations.index();
        let busy = index > self.commit || !self.configuration().is_settled();
        if busy
            && !mutants::active(Mutant::TwoChangesAtOnce)
            && !mutants::active(Mutant::ChangeBeforeOwnTermCommit)
        {
            return Err(ChangeError::InProgress { index });
        }
        if leader.changing.ticket.is_some() {
            return Err(ChangeError::InProgress { index });
        }
        if let Some(expected) = change.expected.filter(|expected| *expected != index) {
            return Err(ChangeError::Expected { expected, current: index });
        }
        let Some(first) = self.configuration().changed(change)? else { return Ok(None) };
        let mut last = first.clone();
        while !last.is_settled() {
            last = last.next_step();
        }
        let (silent, voters) = self.silent_voters(leader, &last);
        if silent.len() > (voters - 1) / 2 && !change.even_if_quorum_is_lost {
            return Err(ChangeError::QuorumLost { silent, voters });
        }
        Ok(Some(first))
    }

    /// The voters of `configuration` that this leader has not heard lately, and how many voters there are. Who is no voter yet
    /// has to catch up before it counts, so that it need not be asked now.
    fn silent_voters(&self, leader: &Leader, configuration: &Configuration) -> (Vec<NodeId>, usize) {
        let hears = |id: NodeId| {
            id == self.config.id
                || !self.configuration().is_voter(id)
                || leader
                    .peer(id)
                    .is_some_and(|peer| self.now < peer.contact().plus(self.config.election_timeout))
        };
        let silent = configuration.incoming_voters().filter(|id| !hears(*id)).collect();
        (silent, configuration.incoming_voters().count())
    }
}

// What follows, event by event.

impl Raft {
    /// Takes the next step of a change that is under way, if it is time for it.
    pub(super) fn advance_change(&mut self, actions: &mut Vec<Action>) {
        let RoleState::Leader(leader) = &self.role else { return };
        if !leader.changing.leaving.is_empty() {
            self.forget_the_removed(actions);
        }
        let RoleState::Leader(leader) = &mut self.role else { return };
        let changing = &mut leader.changing;
        let settled = self.configurations.current().is_settled();
        let votes = self.votes;
        if settled && changing.ticket.is_none() && votes || changing.sealing.is_some() {
            return;
        }
        let own_term = leader.first_own.is_some_and(|first| first <= self.commit);
        let committed = own_term && self.configurations.index() <= self.commit;
        let early = mutants::active(Mutant::JointLeftEarly) && self.configuration().is_joint();
        if !(committed || early) {
            return;
        }
        // The transfer waits until all is committed: what would come behind it, its end decides.
        if !settled && self.transfer_target().is_some() {
            return;
        }
        if settled {
            self.change_ended(actions);
            if !votes && !mutants::active(Mutant::RemovedLeaderKeepsLeading) {
                self.leave_office(actions);
            }
            return;
        }
        let next = match self.caught_up() {
            CaughtUp::NotYet => return,
            CaughtUp::Yes => self.configuration().next_step(),
            CaughtUp::Never(error) => {
                if let RoleState::Leader(leader) = &mut self.role {
                    leader.changing.failed = Some(error);
                }
                self.configuration().without_plan()
            }
        };
        self.seal_configuration(next);
    }

    fn seal_configuration(&mut self, next: Configuration) {
        let RoleState::Leader(leader) = &mut self.role else { return };
        if leader.changing.sealing.is_none() {
            leader.changing.sealing = Some(next);
            leader.changing.to_seal = true;
        }
    }

    /// Gives the driver what is to be sealed, when all else of the event is done: what it makes of it is the next event.
    pub(super) fn seal_if_due(&mut self, actions: &mut Vec<Action>) {
        let RoleState::Leader(leader) = &mut self.role else { return };
        if std::mem::take(&mut leader.changing.to_seal)
            && let Some(next) = leader.changing.sealing.clone()
        {
            actions.push(Action::SealConfiguration { configuration: Box::new(next) });
        }
    }

    /// The driver sealed the configuration that it was given.
    pub(super) fn propose_configuration(
        &mut self,
        batch: BatchRun,
        configuration: Configuration,
        actions: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        let expected = self.next_position();
        let sealing = match &mut self.role {
            RoleState::Leader(leader) => leader.changing.sealing.take(),
            _ => None,
        };
        if sealing.as_ref() != Some(&configuration) || batch.first != batch.last {
            return Err(Violation::ProposedElsewhere { batch, expected });
        }
        self.propose(batch, Some(configuration), actions)
    }

    /// Whether all future voters have caught up: "if the last round lasts less than an election timeout, then the leader adds
    /// the new server, under the assumption that there are not enough unreplicated entries to create a significant
    /// availability gap" (thesis, section 4.2.1).
    fn caught_up(&mut self) -> CaughtUp {
        let awaited: Vec<NodeId> = self.configurations.current().to_catch_up().collect();
        let (now, last, timeout) = (self.now, self.log.last().index, self.config.election_timeout);
        let RoleState::Leader(leader) = &mut self.role else { return CaughtUp::NotYet };
        if self.configurations.current().is_joint() {
            return CaughtUp::Yes;
        }
        leader.changing.rounds.retain(|round| awaited.contains(&round.id));
        let mut all = true;
        for id in awaited {
            // A leader that was no voter is at the end of its own log.
            let Some(at) = leader.position(id) else { continue };
            let Some(peer) = leader.peers.get(at) else { continue };
            let (matched, view) = (peer.matched(), peer.view());
            let rounds = &mut leader.changing.rounds;
            let at = rounds.iter().position(|round| round.id == id).unwrap_or_else(|| {
                let (since, moved_at) = (now, now);
                rounds.push(CatchUp { id, number: 1, target: last, since, matched, moved_at, done: false });
                rounds.len() - 1
            });
            let Some(round) = rounds.get_mut(at) else { continue };
            if matched > round.matched {
                (round.matched, round.moved_at) = (matched, now);
            }
            if !round.done && matched >= round.target {
                if now.since(round.since) < timeout {
                    round.done = true;
                } else if round.number >= ROUNDS_MAX {
                    return CaughtUp::Never(ChangeError::Slow { id, rounds: round.number });
                } else {
                    (round.number, round.target, round.since) = (round.number + 1, last, now);
                }
            }
            // One that is being sent a snapshot acknowledges nothing until it has all of it, however long that takes.
            let is_sent_a_snapshot =
                view.state == ReplicationState::Snapshot && view.snapshots_failed < SNAPSHOTS_FAILED_MAX;
            let silent = now.since(view.contact).0 >= timeout.0.saturating_mul(STUCK_TIMEOUTS);
            let stands = now.since(round.moved_at).0 >= timeout.0.saturating_mul(STUCK_TIMEOUTS);
            if stands && (silent || (!round.done && !is_sent_a_snapshot)) {
                return CaughtUp::Never(ChangeError::Stuck { id });
            }
            all &= round.done && now.since(view.contact) < timeout;
        }
        if all { CaughtUp::Yes } else { CaughtUp::NotYet }
    }

    /// Tells whoever asked for the change what has become of it.
    fn change_ended(&mut self, actions: &mut Vec<Action>) {
        let index = self.configurations.index();
        let RoleState::Leader(leader) = &mut self.role else { return };
        leader.changing.rounds.clear();
        let (reserved, failed) = (leader.changing.reserved.take(), leader.changing.failed.take());
        if let Some(ticket) = leader.changing.ticket.take() {
            let outcome = failed.map_or(Ok(Changed { index, reserved }), Err);
            actions.push(Action::ChangeEnded { ticket, outcome });
        }
    }

    /// A leader falls: what it was asked for is another's business now.
    pub(super) fn abandon_change(&mut self, actions: &mut Vec<Action>) {
        if let RoleState::Leader(leader) = &mut self.role
            && let Some(ticket) = leader.changing.ticket.take()
        {
            actions.push(Action::ChangeEnded { ticket, outcome: Err(ChangeError::LeadershipLost) });
        }
    }

    /// The configuration without this leader is committed: it says so to everybody, asks the voter that holds the most to
    /// take over, and steps down.
    fn leave_office(&mut self, actions: &mut Vec<Action>) {
        let RoleState::Leader(leader) = &self.role else { return };
        for at in 0..leader.peers.len() {
            self.tell(at, false, actions);
        }
        self.hand_over_now(actions);
        self.become_follower(self.hard.term(), None, actions);
    }

    /// Stops sending to those who have left, once they know it, or have had time to learn it.
    fn forget_the_removed(&mut self, actions: &mut Vec<Action>) {
        let (commit, now, timeout) = (self.commit, self.now, self.config.election_timeout);
        let RoleState::Leader(leader) = &mut self.role else { return };
        let peers = &leader.peers;
        let mut gone = Vec::new();
        leader.changing.leaving.retain_mut(|(id, index, until)| {
            if *index > commit {
                return true;
            }
            let until = *until.get_or_insert(now.plus(timeout));
            let peer = peers.iter().find(|peer| peer.id() == *id);
            let knows = peer.is_none_or(|peer| peer.matched() >= *index && peer.notice_due().is_none());
            let stays = !knows && now < until;
            if !stays {
                gone.push(*id);
            }
            stays
        });
        if !gone.is_empty() {
            leader.peers.retain(|peer| !gone.contains(&peer.id()));
            actions.push(Action::MembersChanged);
        }
    }
}

// Both ends.

impl Raft {
    /// The log has got, or lost, a configuration: from now on another one is in force.
    pub(super) fn configuration_changed(&mut self, actions: &mut Vec<Action>) {
        let configuration = self.configurations.current();
        self.quorum = Quorum::of(configuration);
        self.votes = self.config.counts_in(configuration);
        let (id, now, last) = (self.config.id, self.now, self.log.last().index);
        if let RoleState::Leader(leader) = &mut self.role {
            let index = self.configurations.index();
            let Leader { peers, changing, .. } = leader;
            for member in configuration.members().iter().filter(|member| member.id != id) {
                let new = super::progress::Progress::new(member.id, last, now);
                match peers.binary_search_by_key(&member.id, super::progress::Progress::id) {
                    Err(at) => peers.insert(at, new),
                    // It had left, and is back, perhaps with another directory: what the old one had counts for nothing.
                    Ok(at) if changing.is_leaving(member.id) => {
                        if let Some(peer) = peers.get_mut(at) {
                            *peer = new;
                        }
                    }
                    Ok(_) => {}
                }
                changing.leaving.retain(|(leaving, ..)| *leaving != member.id);
            }
            for peer in peers.iter().filter(|peer| configuration.member(peer.id()).is_none()) {
                if !changing.is_leaving(peer.id()) {
                    changing.leaving.push((peer.id(), index, None));
                }
            }
        }
        actions.push(Action::MembersChanged);
    }

    /// A membership batch that could not be read is there again.
    pub(super) fn configuration_found(
        &mut self,
        index: LogIndex,
        configuration: Configuration,
        actions: &mut Vec<Action>,
    ) {
        let was_unknown = self.configurations.is_unknown();
        if self.configurations.found(index, configuration) {
            self.missing_found(was_unknown, actions);
        }
    }

    /// A snapshot up to `last` tells what was in force there, and where that stands.
    pub(super) fn members_told(
        &mut self,
        last: LogIndex,
        (index, configuration): (LogIndex, Configuration),
        actions: &mut Vec<Action>,
    ) {
        let was_unknown = self.configurations.is_unknown();
        if self.configurations.known_at(last, index, configuration) {
            self.missing_found(was_unknown, actions);
        }
    }

    fn missing_found(&mut self, was_unknown: bool, actions: &mut Vec<Action>) {
        self.configuration_changed(actions);
        if was_unknown && !self.configurations.is_unknown() && !matches!(self.role, RoleState::Leader(_)) {
            self.restart_election_timer();
        }
    }

    /// Takes a configuration that the batch which was just appended holds.
    pub(super) fn take_configuration(
        &mut self,
        batch: &BatchRun,
        configuration: Option<Configuration>,
        actions: &mut Vec<Action>,
    ) {
        if let Some(configuration) = configuration {
            self.configurations.push(batch.last, Some(configuration));
            self.configuration_changed(actions);
        }
    }

    /// Whether a candidate with these votes has won, by the configuration in force here.
    pub(super) fn is_elected(&self, voted: impl Fn(NodeId) -> bool) -> bool {
        if mutants::active(Mutant::QuorumOfIncomingOnly) {
            let incoming: Vec<NodeId> = self.configuration().incoming_voters().collect();
            return incoming.iter().filter(|id| voted(**id)).count() > incoming.len() / 2;
        }
        self.quorum.reached(voted)
    }

    /// What a quorum has, when learners count too.
    pub(super) fn agreed_with_learners(&self, of: impl Fn(NodeId) -> LogIndex) -> LogIndex {
        let members = self.configuration().members();
        let mut all: Vec<LogIndex> = members.iter().map(|member| of(member.id)).collect();
        all.sort_unstable();
        let voters = members.iter().filter(|member| member.role == MemberRole::Voter).count();
        all.iter().rev().nth(voters / 2).copied().unwrap_or_default()
    }
}
