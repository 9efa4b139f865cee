//! Changing members in the model: leaders are asked for anything at any time, nodes that have left come back, some of them
//! with an empty directory and so as somebody else.
//!
//! The harness keeps what every sealed configuration was, and computes what must be in force at a node from its log alone.

use super::*;

impl Ledger {
    /// The configurations among the batches of a log.
    pub(super) fn changes_in(&self, log: &[BatchRun]) -> Vec<(LogIndex, Option<Configuration>)> {
        let of = |batch: &BatchRun| self.configurations.get(&(batch.term, batch.first)).cloned();
        log.iter().filter_map(|batch| Some((batch.first, Some(of(batch)?)))).collect()
    }

    /// The newest one that is committed up to `index`, with its place; none if that is the one of the start.
    fn configuration_as_of(&self, index: LogIndex) -> Option<(LogIndex, &Configuration)> {
        let upto = self.committed.partition_point(|(batch, _)| batch.last <= index);
        self.newest_in(self.committed[..upto].iter().map(|(batch, _)| batch))
    }

    fn newest_in<'a>(
        &self,
        batches: impl DoubleEndedIterator<Item = &'a BatchRun>,
    ) -> Option<(LogIndex, &Configuration)> {
        let of = |batch: &BatchRun| Some((batch.first, self.configurations.get(&(batch.term, batch.first))?));
        batches.rev().filter_map(of).next()
    }
}

impl Simulation {
    /// A cluster of up to three with spare machines that may join it.
    pub(super) fn churning(seed: u64) -> Self {
        let mut simulation = Self::new(seed);
        let size = 1 + simulation.random.below(4);
        let member = |id: u64| Member {
            id: NodeId(id),
            incarnation: Incarnation(u128::from(id)),
            address: String::new(),
            role: MemberRole::Voter,
        };
        simulation.configuration = Configuration::new((1..=size).map(member).collect()).expect("valid");
        let node = |id| Node { id: NodeId(id), boots: 0, disk: Disk::default(), life: None };
        simulation.nodes = (1..=size + 3).map(node).collect();
        simulation.churn = 5 + simulation.random.below(25);
        for at in 0..simulation.nodes.len() {
            simulation.boot(at);
        }
        simulation
    }

    pub(super) fn incarnation_of(&self, id: NodeId) -> Incarnation {
        Incarnation(u128::from(id.get()) + 100 * u128::from(self.wipes.get(&id).copied().unwrap_or_default()))
    }

    /// What must be in force at a node: the newest configuration of its log, or before that.
    pub(super) fn in_force_at(&self, at: usize) -> (LogIndex, Configuration) {
        let log = self.nodes[at].life.as_ref().map(|life| life.raft.log());
        let batches: Vec<BatchRun> = log.into_iter().flat_map(LogIds::iter).collect();
        let start = self.nodes[at].life.as_ref().map_or(LogIndex(0), |life| life.raft.log_start().index);
        match self.ledger.newest_in(batches.iter()) {
            Some((index, newest)) => (index, newest.clone()),
            None => self.configuration_as_of(start),
        }
    }

    /// The one that is committed up to `index`, and where it stands.
    pub(super) fn configuration_as_of(&self, index: LogIndex) -> (LogIndex, Configuration) {
        let newest = self.ledger.configuration_as_of(index);
        let (index, configuration) = newest.unwrap_or((LogIndex(0), &self.configuration));
        (index, configuration.clone())
    }

    pub(super) fn seal(&mut self, at: usize, configuration: Configuration) -> Outcome {
        let Some(life) = &self.nodes[at].life else { return Ok(()) };
        let Some((term, first)) = life.raft.next_position() else { return Ok(()) };
        self.cover.mark(match &configuration {
            sealed if sealed.is_joint() => "joint",
            sealed if !sealed.planned().is_empty() => "planned",
            _ => "settled",
        });
        self.ledger.configurations.insert((term, first), configuration.clone());
        let batch = BatchRun { first, last: first, term, bytes: 60 };
        self.feed(at, Event::ProposedConfiguration { batch, configuration: Box::new(configuration) })
    }

    /// What holds of a node's configurations after every event.
    pub(super) fn check_configuration(&mut self, at: usize) -> Outcome {
        if self.churn == 0 || !self.strict {
            return Ok(());
        }
        let Some(life) = &self.nodes[at].life else { return Ok(()) };
        let (id, expected) = (life.raft.id(), self.in_force_at(at));
        let found = (life.raft.configuration_index(), life.raft.configuration().clone());
        if found != expected {
            return Err(format!("node {id} goes by {found:?}, its log says {expected:?}"));
        }
        let committed = self.ledger.committed.last().map_or(LogIndex(0), |(batch, _)| batch.last);
        let sealed = |batch: &BatchRun| self.ledger.configurations.contains_key(&(batch.term, batch.first));
        let open = life.raft.log().iter().filter(|batch| batch.first > committed && sealed(batch)).count();
        if open > 1 {
            return Err(format!("node {id} has {open} configurations that are not committed"));
        }
        Ok(())
    }

    pub(super) fn members_changed(&mut self, at: usize) {
        let Some(life) = &self.nodes[at].life else { return };
        if life.raft.role() == Role::Leader && life.raft.restraint().vote_bar.is_some() {
            let id = life.raft.id();
            if !life.raft.configuration().is_voter(id) {
                self.cover.mark("a leader that is no voter");
            }
        } else if life.raft.role() != Role::Leader {
            self.cover.mark("followed");
        }
    }

    pub(super) fn change_ended(&mut self, at: usize, outcome: &Result<Changed, ChangeError>) -> Outcome {
        if let (Ok(changed), Some(life)) = (outcome, &self.nodes[at].life) {
            let raft = &life.raft;
            if changed.index > raft.commit() || !raft.configuration().is_settled() {
                return Err(format!(
                    "node {} ends a change at {} that is not over",
                    raft.id(),
                    changed.index
                ));
            }
        }
        self.cover.mark(match outcome {
            Ok(_) => "changed",
            Err(ChangeError::LeadershipLost) => "change lost with the leader",
            Err(ChangeError::InProgress { .. }) => "refused: in progress",
            Err(ChangeError::NotReady) => "refused: not ready",
            Err(ChangeError::QuorumLost { .. }) => "refused: quorum",
            Err(ChangeError::OtherIncarnation { .. }) => "refused: other incarnation",
            Err(ChangeError::Stuck { .. }) => "stuck",
            Err(_) => "refused",
        });
        Ok(())
    }

    /// As the driver hands it to the core: with the configuration that is in the image, and nothing that counts from
    /// somebody whom the configuration knows as another.
    pub(super) fn as_received(&mut self, at: usize, from: NodeId, mut message: Message) -> Option<Message> {
        if let Message::Append(append) = &mut message
            && let Some(batch) = &append.batch
        {
            let configuration = self.ledger.configurations.get(&(batch.term, batch.first));
            append.configuration = configuration.cloned().map(Box::new);
        }
        if self.is_foreign(at, from) && matches!(message, Message::AppendAck(_) | Message::VoteReply(_)) {
            self.cover.mark("an answer of somebody else");
            return None;
        }
        Some(message)
    }

    /// Whether node `at` knows that id as somebody else.
    pub(super) fn is_foreign(&self, at: usize, from: NodeId) -> bool {
        let life = self.nodes[at].life.as_ref();
        let known = life.and_then(|life| life.raft.configuration().member(from));
        known.is_some_and(|member| member.incarnation != self.incarnation_of(from))
    }

    /// Somebody asks node `at`, or better a leader, for other members; or wipes a node that has left.
    pub(super) fn some_change(&mut self, at: usize) -> Outcome {
        if self.random.below(16) == 0 {
            return self.wipe(at);
        }
        let leads = |node: &Node| node.life.as_ref().is_some_and(|life| life.raft.role() == Role::Leader);
        let leaders: Vec<usize> = (0..self.nodes.len()).filter(|at| leads(&self.nodes[*at])).collect();
        let chosen = self.random.below(leaders.len().max(1) as u64) as usize;
        let at = match leaders.get(chosen) {
            Some(leader) => *leader,
            None if self.random.below(8) > 0 => return Ok(()),
            None => at,
        };
        let Some(life) = &self.nodes[at].life else { return Ok(()) };
        let configuration = life.raft.configuration().clone();
        let index = life.raft.configuration_index();
        let mut change = Change {
            even_if_quorum_is_lost: self.random.below(6) == 0,
            reserve_id: self.random.below(10) == 0,
            expected: (self.random.below(3) == 0).then_some(index),
            ..Change::default()
        };
        for id in self.nodes.iter().map(|node| node.id).collect::<Vec<_>>() {
            let dice = self.random.below(20);
            match configuration.member(id) {
                None if dice < 5 => change.add.push(Member {
                    id,
                    incarnation: self.incarnation_of(id),
                    address: String::new(),
                    role: if dice < 4 { MemberRole::Voter } else { MemberRole::Learner },
                }),
                Some(_) if dice < 2 => change.remove.push(id),
                Some(member) if dice == 2 && member.role == MemberRole::Voter => change.demote.push(id),
                Some(member) if dice < 9 && member.role == MemberRole::Learner => change.promote.push(id),
                _ => {}
            }
        }
        self.tickets += 1;
        self.feed(at, Event::Change { ticket: self.tickets, change: Box::new(change) })
    }

    /// A node that nobody's newest configuration knows by its present directory loses that.
    fn wipe(&mut self, at: usize) -> Outcome {
        let id = self.nodes[at].id;
        let incarnation = self.incarnation_of(id);
        let names = |configuration: &Configuration| {
            configuration.member(id).is_some_and(|member| member.incarnation == incarnation)
        };
        let committed = self.ledger.committed.iter().rev();
        let mut committed = committed
            .filter_map(|(batch, _)| self.ledger.configurations.get(&(batch.term, batch.first)))
            .chain(std::iter::once(&self.configuration));
        let is_member = committed.next().is_some_and(names);
        let floor = self.ledger.committed.last().map_or(LogIndex(0), |(batch, _)| batch.last);
        // One that may still be committed, on a disk or in a memory.
        let pending =
            self.ledger.configurations.iter().any(|((_, index), sealed)| *index > floor && names(sealed));
        if is_member || pending {
            return Ok(());
        }
        self.cover.mark("wiped");
        self.crash(at);
        self.nodes[at].disk = Disk::default();
        *self.wipes.entry(id).or_default() += 1;
        self.network.retain(|(from, to, _)| *from != id && *to != id);
        self.transfers.retain(|transfer| !transfer.is_of(id));
        self.boot(at);
        self.reconnect(at)
    }

    /// Whether that node must end up with the leader's log.
    pub(super) fn must_converge(&self, leader: usize, at: usize) -> bool {
        let Some(life) = &self.nodes[leader].life else { return false };
        let id = self.nodes[at].id;
        let member = life.raft.configuration().member(id);
        self.churn == 0 || member.is_some_and(|member| member.incarnation == self.incarnation_of(id))
    }
}

fn run(seed: u64, cover: &mut Cover) -> Outcome {
    observe(Simulation::churning(seed), cover)
}

/// `SEED=n` replays one run, `TRACE=1` with all its events; `SEEDS=n` runs more of them.
#[test]
fn random_changes_of_the_members_keep_the_invariants_and_come_to_an_end() {
    let mut cover = Cover::default();
    let (first, count) = match env("SEED", u64::MAX) {
        u64::MAX => (0, env("SEEDS", 1_500)),
        seed => (seed, 1),
    };
    for seed in first..first + count {
        if let Err(found) = run(seed, &mut cover) {
            panic!("seed {seed}: {found}\nreplay: SEED={seed} TRACE=1");
        }
    }
    println!("{cover:?}");
    if count < 1_000 {
        return;
    }
    for what in [
        "a leader that is no voter",
        "change lost with the leader",
        "changed",
        "commit before the leader's own disk",
        "crash with pending writes",
        "followed",
        "install",
        "joint",
        "leader",
        "planned",
        "refused: in progress",
        "refused: not ready",
        "refused: quorum",
        "settled",
        "transferred",
        "truncate",
        "truncated a configuration",
        "wiped",
    ] {
        let count = cover.0.get(what).copied().unwrap_or_default();
        assert!(count >= 10, "{what:?} was exercised {count} times: {cover:?}");
    }
}

#[test]
fn every_known_bug_of_membership_is_caught_when_it_is_put_back() {
    let mut unnoticed = Vec::new();
    for mutant in Mutant::MEMBERSHIP {
        if caught(mutant, true).is_none() {
            unnoticed.push(mutant);
        }
    }
    assert_eq!(unnoticed, []);
}

/// Without the invariants of one node, it is noticed by what goes wrong between nodes.
#[test]
fn a_learner_that_is_counted_ends_in_a_commit_without_a_quorum() {
    assert!(caught(Mutant::LearnerAckCounted, false).is_some());
}

/// Whoever installs a snapshot goes by the members in it.
#[test]
fn a_snapshot_that_does_not_tell_the_members_is_noticed() {
    assert!(caught(Mutant::SnapshotForgetsConfiguration, true).is_some());
}

/// Runs seeds with the bug put back until one fails.
fn caught(mutant: Mutant, strict: bool) -> Option<(u64, String)> {
    mutants::set(Some(mutant));
    let found = (0..env("SEEDS", 2_000)).find_map(|seed| {
        let mut simulation = Simulation::churning(seed);
        simulation.strict = strict;
        if mutant == Mutant::SnapshotForgetsConfiguration {
            simulation.snapshots = 60;
        }
        let found = simulation.run(4_000).err()?;
        Some((seed, found.lines().next().unwrap_or_default().to_owned()))
    });
    mutants::set(None);
    println!("{mutant:?}, strict {strict}: {found:?}");
    found
}
