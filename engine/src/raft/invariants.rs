//! What must hold of a node in every state, and between any two states of one life.
//!
//! Checked after every event in debug builds, and by the simulator. What must hold *between* nodes (election
//! safety, log matching, leader completeness, commit on a durable quorum) only a simulator can see.

use super::role::RoleState;
use super::{Configuration, Epoch, LogId, Nanos, Quorum, Raft, Restraint, Role, Round};
use ringraft_block::{LogIndex, NodeId, Term};
use std::collections::BTreeSet;
use std::fmt;

/// An invariant that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The rule, in words.
    pub rule: &'static str,
    /// What was found instead.
    pub found: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.found)
    }
}

impl std::error::Error for Broken {}

/// What [`check_step`] compares: a node at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Its time.
    pub now: Nanos,
    /// Its role.
    pub role: Role,
    /// Its term.
    pub term: Term,
    /// Its vote in the term.
    pub vote: Option<NodeId>,
    /// The leader it knows.
    pub leader: Option<NodeId>,
    /// What its log starts after.
    pub start: LogId,
    /// Where its log ends.
    pub last: LogId,
    /// What is committed, with its term.
    pub commit: LogId,
    /// What is durable.
    pub durable: LogIndex,
    /// The epoch of its log.
    pub epoch: Epoch,
    /// A leader's round.
    pub round: Round,
    /// Whether its own vote is a quorum.
    pub alone: bool,
    /// The last save asked for, and the last that is durable.
    pub saves: (u64, u64),
    /// What a leader knows its peers to hold, by id.
    pub matches: Vec<(NodeId, LogIndex)>,
    /// Whether this is a candidate that the leader of the term before asked to campaign.
    pub transfer: bool,
    /// What was acknowledged to the leader of the term in this session, or is counted by this one.
    pub acked: LogIndex,
    /// First indexes of the batches that cannot be read.
    pub damaged: BTreeSet<LogIndex>,
    /// What damage, or a disk that does not answer, keeps the node from.
    pub restraint: Restraint,
    /// The configuration in force, and where it stands.
    pub configuration: (LogIndex, Configuration),
}

impl State {
    /// The state of `raft`.
    #[must_use]
    pub fn of(raft: &Raft) -> Self {
        let (round, matches) = match &raft.role {
            RoleState::Leader(leader) => (
                leader.rounds.current(),
                leader.peers.iter().map(|progress| (progress.id(), progress.matched())).collect(),
            ),
            _ => (Round(0), Vec::new()),
        };
        Self {
            now: raft.now,
            role: raft.role(),
            term: raft.term(),
            vote: raft.vote(),
            leader: raft.leader(),
            start: raft.log_start(),
            last: raft.last(),
            commit: LogId { index: raft.commit, term: raft.term_at(raft.commit).unwrap_or_default() },
            durable: raft.durable.last(),
            epoch: raft.durable.epoch(),
            round,
            alone: raft.quorum.is_only(raft.config.id),
            saves: (raft.hard.asked(), raft.hard.saved()),
            matches,
            transfer: matches!(raft.role, RoleState::Candidate { transfer: true, .. }),
            acked: raft.hearing.acked,
            damaged: raft.repair.damaged().clone(),
            restraint: raft.restraint(),
            configuration: (raft.configuration_index(), raft.configuration().clone()),
        }
    }
}

/// Returns early when `$holds` does not.
macro_rules! ensure {
    ($holds:expr, $rule:literal, $($found:tt)+) => {
        if !$holds {
            return Err(Broken { rule: $rule, found: format!($($found)+) });
        }
    };
}

/// The invariants of one state.
///
/// # Errors
/// The first one that does not hold.
pub fn check(raft: &Raft) -> Result<(), Broken> {
    let (role, term, vote, leader) = (raft.role(), raft.term(), raft.vote(), raft.leader());
    let (start, last, durable) = (raft.log_start(), raft.last(), raft.durable.last());
    let commit = LogId { index: raft.commit, term: raft.term_at(raft.commit).unwrap_or_default() };
    let saves = (raft.hard.asked(), raft.hard.saved());
    let alone = raft.quorum.is_only(raft.config.id);
    let id = raft.config.id;
    let log = &raft.log;
    ensure!(last.term <= term, "no entry is of a later term than the node", "{last:?} in term {term}");
    ensure!(
        start.index <= commit.index,
        "what precedes the log is committed",
        "{start:?}, commit {commit:?}"
    );
    let first = log.term_at(start.index.next());
    ensure!(
        first.is_none_or(|first| first >= start.term),
        "terms do not fall behind a snapshot",
        "{start:?}, {first:?}"
    );
    ensure!(commit.index <= last.index, "what is committed is in the log", "{commit:?} above {last:?}");
    ensure!(start.index <= durable, "what precedes the log is durable", "{durable} below {start:?}");
    ensure!(durable <= last.index, "what is durable is in the log", "{durable} above {last:?}");
    for (what, index) in [("commit", commit.index), ("durable", durable), ("matched", raft.hearing.matched)] {
        let ends_batch = log.batch_end_at(index).is_some();
        ensure!(ends_batch, "positions are batch ends", "{what} {index} in {:?}", log.batch_at(index));
    }
    ensure!(saves.1 <= saves.0, "only what was asked for is saved", "{saves:?}");
    let reads = raft.check_reads();
    ensure!(reads.is_ok(), "reads wait for what will come", "{reads:?}");
    let leads = matches!(raft.role, RoleState::Leader(_));
    ensure!(
        !leads || raft.repair.claim().is_none(),
        "who forgot something does not lead",
        "{:?}",
        raft.repair
    );
    check_configurations(raft)?;
    match &raft.role {
        RoleState::Follower => ensure!(leader != Some(id), "only a leader follows itself", "a follower does"),
        RoleState::PreCandidate(_) | RoleState::Candidate { .. } => {
            ensure!(leader.is_none(), "a candidate knows no leader", "{role:?} with leader {leader:?}");
            ensure!(raft.may_campaign(), "only voters campaign", "{role:?}");
        }
        RoleState::Leader(leader_state) => {
            ensure!(leader == Some(id), "a leader follows itself", "leader {leader:?}");
            if let Some(first_own) = leader_state.first_own {
                ensure!(last.term == term, "a leader's log ends in its own term", "{last:?} in term {term}");
                let own = first_own <= start.index || log.term_at(first_own) == Some(term);
                ensure!(own, "a leader's first batch is of its own term", "{first_own}");
            }
            for progress in &leader_state.peers {
                let view = progress.view();
                if let Err(found) = progress.check(&raft.config) {
                    return Err(Broken {
                        rule: "progress is consistent",
                        found: format!("{found}: {view:?}"),
                    });
                }
                ensure!(view.next <= last.index.next(), "next is in the log or at its end", "{view:?}");
                ensure!(
                    view.round <= leader_state.rounds.current(),
                    "rounds return after they left",
                    "{view:?}"
                );
                let ends_batch = view.matched < start.index || log.batch_end_at(view.matched).is_some();
                ensure!(ends_batch, "a match is a batch end", "{view:?}");
                let starts_batch =
                    view.next <= start.index || log.batch_end_at(view.next.previous()).is_some();
                ensure!(starts_batch, "next starts a batch", "{view:?}");
            }
        }
    }
    if matches!(role, Role::Candidate | Role::Leader) {
        ensure!(vote == Some(id), "a candidate has voted for itself", "vote {vote:?}");
        // The requests for votes, and hence all answers, come after the save.
        ensure!(
            role != Role::Leader || raft.hard.is_saved(),
            "a leader's vote is durable",
            "saves {saves:?}, alone {alone}"
        );
    }
    Ok(())
}

fn check_configurations(raft: &Raft) -> Result<(), Broken> {
    let (start, last, commit) = (raft.log.start().index, raft.log.last().index, raft.commit);
    let mut above = start;
    for index in raft.configurations.indexes() {
        let single = raft.log.batch_starting_at(index).is_some_and(|batch| batch.last == index);
        ensure!(single && index > above, "a configuration is a batch of the log", "{index} of {last}");
        above = index;
    }
    let (quorum, configuration) = (&raft.quorum, raft.configuration());
    ensure!(
        quorum.is_of(configuration),
        "the newest configuration decides",
        "{quorum:?} not {:?}",
        Quorum::of(configuration)
    );
    let RoleState::Leader(leader) = &raft.role else { return Ok(()) };
    let own_term = leader.first_own.is_some_and(|first| first <= commit);
    let open = raft.configurations.indexes().filter(|index| *index > commit).count();
    ensure!(!own_term || open <= 1, "one change at a time", "{open} configurations above {commit}");
    let removed = raft.configuration().is_settled() && !raft.votes && raft.configuration_index() <= commit;
    ensure!(!(own_term && removed), "a leader whose removal is committed steps down", "{commit}");
    let id = raft.config.id;
    let sent_to = |peer: NodeId| peer == id || leader.peer(peer).is_some();
    let missed = raft.configuration().members().iter().find(|member| !sent_to(member.id));
    ensure!(missed.is_none(), "a leader sends to every member", "{missed:?}");
    let stranger = leader.peers.iter().map(super::progress::Progress::id);
    let mut stranger = stranger.filter(|id| raft.configuration().member(*id).is_none());
    let stranger = stranger.find(|id| !leader.changing.is_leaving(*id));
    ensure!(stranger.is_none(), "a leader sends to members and to who has just left", "{stranger:?}");
    Ok(())
}

/// A leader may put `after` behind `before`.
fn check_change(before: &State, after: &State) -> Result<(), Broken> {
    let ((at, old), (_, new)) = (&before.configuration, &after.configuration);
    let own_term = before.commit.term == before.term;
    ensure!(own_term, "changes wait for a commit of the leader's term", "{:?}", before.commit);
    ensure!(*at <= before.commit.index, "changes wait for the one before", "{at}, {:?}", before.commit);
    let same = old.incoming_voters().eq(new.incoming_voters());
    let enters =
        !old.is_joint() && new.is_joint() && old.incoming_voters().eq(new.outgoing().iter().copied());
    let leaves = old.is_joint() && !new.is_joint() && same;
    let keeps = !old.is_joint() && !new.is_joint() && same;
    ensure!(old.settings() == new.settings(), "a change of members keeps the settings", "{old:?} to {new:?}");
    ensure!(enters || leaves || keeps, "voters change through a joint configuration", "{old:?} to {new:?}");
    Ok(())
}

/// The invariants between two states of one life of a node, before and after one event.
///
/// # Errors
/// The first one that does not hold.
pub fn check_step(before: &State, after: &State) -> Result<(), Broken> {
    let (from, to) = (before.term, after.term);
    ensure!(after.now >= before.now, "time does not go back", "{:?} after {:?}", after.now, before.now);
    ensure!(to >= from, "terms do not go back", "{to} after {from}");
    let same_vote = before.vote.is_none() || before.vote == after.vote;
    ensure!(to > from || same_vote, "one vote per term", "{:?} after {:?}", after.vote, before.vote);
    let votes = after.vote.is_some() && (to > from || before.vote != after.vote);
    let may_vote = before.restraint.vote_bar.is_some();
    ensure!(!votes || may_vote, "no vote while what was lost is unknown", "{:?}", before.restraint);
    let Restraint { damaged_from, claim, state_lost, .. } = before.restraint;
    let damage = damaged_from.is_some() || claim.is_some() || state_lost;
    let campaigns = after.role == Role::Candidate && before.role != Role::Candidate;
    ensure!(!(campaigns && damage), "no campaign while the log is damaged", "{:?}", before.restraint);
    let counted = if to > from { LogIndex(0) } else { before.acked.min(after.acked) };
    let mut both = before.damaged.intersection(&after.damaged);
    let unread = both.find(|first| **first > counted && **first <= after.acked);
    ensure!(
        unread.is_none(),
        "what cannot be read is not acknowledged anew",
        "{unread:?} in {}",
        after.acked
    );
    let (old, new) = (before.restraint.claim, after.restraint.claim);
    ensure!(new.is_none() || new == old, "a claim only ends", "{new:?} after {old:?}");
    let (old, new) = (before.leader, after.leader);
    let same_leader = old.is_none() || new.is_none() || old == new;
    ensure!(to > from || same_leader, "one leader per term", "{new:?} after {old:?} in term {to}");
    let (old, new) = (before.commit, after.commit);
    ensure!(new.index >= old.index, "what is committed stays committed", "{new:?} after {old:?}");
    let (old, new) = (before.epoch, after.epoch);
    let step = new == old || new.0 == old.0 + 1;
    ensure!(step, "at most one truncation per event", "{new:?} after {old:?}");
    let (old, new) = (before.durable, after.durable);
    let kept = new >= old || after.epoch > before.epoch;
    ensure!(kept, "only a truncation takes back what is durable", "{new} after {old}");
    let (old, new) = (before.last, after.last);
    let grew = new.index >= old.index || after.epoch > before.epoch;
    ensure!(grew, "only a truncation shortens the log", "{new:?} after {old:?}");
    let (old, new) = (before.start, after.start);
    ensure!(new.index >= old.index, "the log's start does not go back", "{new:?} after {old:?}");
    let moved = new != old && new.index > before.commit.index;
    let installed = moved && after.commit == new;
    ensure!(!moved || installed, "the log's start passes the commit index only with it", "{after:?}");
    ensure!(after.saves.0 <= before.saves.0 + 1, "at most one save per event", "{:?}", after.saves);

    let entered = after.role != before.role || to > from;
    match after.role {
        Role::Candidate if entered => {
            let asked = before.role == Role::PreCandidate
                || after.alone
                || (after.transfer && before.leader.is_some());
            ensure!(asked && to.0 == from.0 + 1, "a campaign follows a pre-vote", "{:?} {from}", before.role);
        }
        Role::Leader if entered => {
            let elected = before.role == Role::Candidate && to == from;
            ensure!(elected, "a leader was a candidate", "{:?} in {from}, leader in {to}", before.role);
        }
        Role::PreCandidate => ensure!(to == from, "asking changes no term", "{to} after {from}"),
        _ => {}
    }
    if before.role == Role::Leader && after.role == Role::Leader && to == from {
        ensure!(after.epoch == before.epoch, "a leader does not truncate", "{:?}", after.epoch);
        ensure!(after.round >= before.round, "rounds do not go back", "{:?}", after.round);
        let moved = after.commit != before.commit;
        let (commit, term) = (after.commit, to);
        ensure!(
            !moved || commit.term == term,
            "a leader commits only entries of its own term by counting",
            "{commit:?} in term {term}"
        );
        if after.configuration.0 != before.configuration.0 {
            check_change(before, after)?;
        }
        for (id, old) in &before.matches {
            let Some((_, new)) = after.matches.iter().find(|(other, _)| other == id) else { continue };
            // A new session begins with no match.
            let kept = new >= old || *new == LogIndex(0);
            ensure!(kept, "a match does not go back within a session", "{new} after {old} of {id}");
        }
    }
    Ok(())
}
