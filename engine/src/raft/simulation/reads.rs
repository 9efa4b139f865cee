//! Reads in the random runs, over clocks that drift apart, processes that stand still with a clock that they have
//! read before, messages that are held up, and leaders that are cut off while others conspire.
//!
//! What is checked: when a read is ready, its index is at least all that had been committed by anybody when it was
//! asked for. Whoever reads what is applied up to there, or later, then reads a state that was current at some
//! moment in between, so that histories are linearizable.

use super::*;

/// How long followers stick to a leader, at the least.
const LEASE_MIN: Nanos = ELECTION_TIMEOUT;
/// How far the rate of a clock may be off.
const DRIFT_PPM: i64 = 30_000;

/// Reads, and what makes them dangerous.
pub(super) struct ReadModel {
    random: Random,
    clocks: Vec<Clock>,
    /// The last id used.
    id: u64,
    /// By id: what the answer has to reach.
    asked: BTreeMap<u64, LogIndex>,
    /// A node that stands still, with the time that it has read.
    still: Option<Still>,
    /// Messages to this node are held up.
    held: Option<(NodeId, Nanos)>,
    plot: Option<Plot>,
    /// The last hand-over that was seen.
    handed: Option<(NodeId, Term)>,
    /// Answered in all.
    ready: u64,
}

/// A node's clock, as a function of true time.
#[derive(Clone, Copy)]
struct Clock {
    offset: u64,
    rate_ppm: i64,
}

#[derive(Clone, Copy)]
struct Still {
    at: usize,
    read: Nanos,
    until: Nanos,
}

/// A voter is kept from hearing the leader until it would campaign; then the leader is kept from everybody.
#[derive(Clone, Copy)]
struct Plot {
    leader: NodeId,
    usurper: NodeId,
    stage: Stage,
    until: Nanos,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Waiting,
    Alone,
    Read,
}

impl Clock {
    fn show(self, now: Nanos) -> Nanos {
        let own = i128::from(now.0) * i128::from(1_000_000 + self.rate_ppm) / 1_000_000;
        Nanos(self.offset + own as u64)
    }

    /// The first moment at which it shows `time`.
    fn when(self, time: Nanos) -> Nanos {
        if time == Nanos::NEVER {
            return time;
        }
        let own = i128::from(time.0.saturating_sub(self.offset));
        let rate = i128::from(1_000_000 + self.rate_ppm);
        Nanos(((own * 1_000_000 + rate - 1) / rate) as u64)
    }
}

impl Simulation {
    /// A run with reads, and with leases if the seed says so.
    pub(super) fn with_reads(seed: u64) -> Self {
        Self::new(seed).reading(seed)
    }

    /// The same while the members change, seldom enough for most changes to come to an end.
    fn with_reads_and_changes(seed: u64) -> Self {
        let mut simulation = Self::churning(seed).reading(seed);
        simulation.churn = 1 + simulation.churn / 8;
        simulation
    }

    fn reading(mut self, seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x5ead);
        let simulation = &mut self;
        let lease = LeaseSettings { election_timeout_min_ns: LEASE_MIN.0, drift_ppm: DRIFT_PPM as u32 };
        let settings = Settings { lease: (random.below(4) > 0).then_some(lease) };
        simulation.configuration = simulation.configuration.clone().with_settings(settings);
        let clock = |_| {
            let rate_ppm = random.below(2 * DRIFT_PPM as u64 + 1) as i64 - DRIFT_PPM;
            Clock { offset: random.below(1 << 40), rate_ppm }
        };
        let clocks = (0..simulation.nodes.len()).map(clock).collect();
        simulation.reads = Some(Box::new(ReadModel {
            random,
            clocks,
            id: 0,
            asked: BTreeMap::new(),
            still: None,
            held: None,
            plot: None,
            handed: None,
            ready: 0,
        }));
        (0..simulation.nodes.len()).for_each(|at| simulation.boot(at));
        self
    }

    /// What the clock of that node shows.
    pub(super) fn local_time(&self, at: usize) -> Nanos {
        self.reads.as_ref().map_or(self.now, |reads| reads.clocks[at].show(self.now))
    }

    /// When that node wants a tick, in true time.
    pub(super) fn deadline_of(&self, at: usize) -> Nanos {
        let deadline = self.nodes[at].life.as_ref().map_or(Nanos::NEVER, |life| life.raft.next_deadline());
        self.reads.as_ref().map_or(deadline, |reads| reads.clocks[at].when(deadline))
    }

    /// Whether that node does nothing at the moment.
    pub(super) fn is_still(&self, at: usize) -> bool {
        self.reads.as_ref().is_some_and(|reads| reads.still.is_some_and(|still| still.at == at))
    }

    /// Whether nothing is proposed, so that the usurper's log stays as good as the others'.
    pub(super) fn is_plotting(&self) -> bool {
        self.reads.as_ref().is_some_and(|reads| reads.plot.is_some_and(|plot| plot.stage != Stage::Read))
    }

    /// Whether messages to `to` have to wait.
    pub(super) fn is_held_up(&self, to: NodeId) -> bool {
        let Some(reads) = &self.reads else { return false };
        let still = reads.still.is_some_and(|still| self.nodes[still.at].id == to);
        still || reads.held.is_some_and(|(held, until)| held == to && self.now < until)
    }

    /// Something about reads happens; false if it is something else's turn.
    pub(super) fn step_reads(&mut self) -> Result<bool, String> {
        let Some(reads) = &mut self.reads else { return Ok(false) };
        if let Some(still) = reads.still.filter(|still| self.now >= still.until) {
            self.rush(self.nodes[still.at].id)?;
            if let Some(reads) = &mut self.reads {
                reads.still = None;
            }
            // It goes on where it was: it has read its clock, and takes what has come meanwhile.
            for kind in [ReadKind::Lease, ReadKind::Quorum] {
                self.ask(still.at, kind, Some(still.read))?;
            }
            return Ok(true);
        }
        if reads.handed != self.handed_to {
            // A member has been told to campaign: in many runs its leader is the last to hear what comes of it.
            reads.handed = self.handed_to;
            let leader = self.nodes.iter().find(|node| node.leads()).map(|node| node.id);
            if let Some(leader) = leader.filter(|_| reads.random.below(4) > 0) {
                self.cover.mark("held up while it hands over");
                reads.held = Some((leader, self.now.plus(Nanos(ELECTION_TIMEOUT.0 / 2))));
                self.rush(leader)?;
                return Ok(true);
            }
        }
        if self.leave_alone()? {
            return Ok(true);
        }
        let Some(reads) = &mut self.reads else { return Ok(false) };
        let count = self.nodes.len() as u64;
        let dice = reads.random.below(1_000);
        let at = reads.random.below(count) as usize;
        let span = Nanos(reads.random.below(3 * ELECTION_TIMEOUT.0));
        self.advance_plot()?;
        let Some(reads) = &mut self.reads else { return Ok(false) };
        let leads = |node: &Node| node.life.as_ref().is_some_and(|life| life.raft.role() == Role::Leader);
        let leaders: Vec<usize> = (0..self.nodes.len()).filter(|at| leads(&self.nodes[*at])).collect();
        match (dice, leaders.as_slice()) {
            (0..120, [first, ..]) => {
                // Of several, also the one that does not know yet that its time is over.
                let chosen = *leaders.get(reads.random.below(2) as usize).unwrap_or(first);
                let kind = if reads.random.below(4) > 0 { ReadKind::Lease } else { ReadKind::Quorum };
                self.ask(chosen, kind, None)?;
            }
            (120..150, _) => {
                let kind =
                    [ReadKind::Round, ReadKind::Lease, ReadKind::Quorum][reads.random.below(3) as usize];
                self.ask(at, kind, None)?;
            }
            (150..160, [first, ..]) if reads.still.is_none() => {
                // Best when every answer has come back: then nothing tells that time has passed.
                let raft = self.nodes[*first].life.as_ref().map(|life| &life.raft);
                let answered = raft.is_some_and(|raft| raft.quorum_round() == Some(raft.status().round));
                if answered || dice < 152 {
                    self.cover.mark("stands still");
                    let read = reads.clocks[*first].show(self.now);
                    let until = self.now.plus(Nanos(ELECTION_TIMEOUT.0 + span.0));
                    reads.still = Some(Still { at: *first, read, until });
                }
            }
            (160..162, _) => {
                self.cover.mark("held up");
                reads.held = Some((self.nodes[at].id, self.now.plus(Nanos(span.0 / 2))));
            }
            (162..163, _) => {
                self.crash(at);
                self.boot(at);
            }
            (163..167, [first, ..]) if reads.plot.is_none() && count > 2 => {
                let (leader, usurper) = (self.nodes[*first].id, self.nodes[at].id);
                if leader != usurper {
                    let until = self.now.plus(Nanos(ELECTION_TIMEOUT.0 * 3 / 2 + span.0 / 4));
                    reads.plot = Some(Plot { leader, usurper, stage: Stage::Waiting, until });
                    self.blocked.extend([(leader, usurper), (usurper, leader)]);
                }
            }
            (167..173, [first, ..]) if !self.is_still(*first) => {
                self.feed(*first, Event::Transfer { to: None })?;
            }
            (173..180, [first, ..]) if self.churn > 0 && !self.is_still(*first) => {
                return self.leave_to_another(*first).map(|()| true);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// A leader is asked to leave all to one other voter, and everything goes well, until that one has it and the leader does
    /// not know; or one that is alone is asked to take the others in.
    fn leave_to_another(&mut self, at: usize) -> Outcome {
        let Some(life) = &self.nodes[at].life else { return Ok(()) };
        let (id, configuration) = (life.raft.id(), life.raft.configuration());
        let members = configuration.members().iter().map(|member| member.id);
        let change = match configuration.incoming_voters().find(|voter| *voter != id) {
            Some(heir) => Change { remove: members.filter(|id| *id != heir).collect(), ..Change::default() },
            None => {
                let others = self.nodes.iter().map(|node| node.id).filter(|other| *other != id);
                let add = others.map(|id| Member {
                    id,
                    incarnation: self.incarnation_of(id),
                    address: String::new(),
                    role: MemberRole::Voter,
                });
                Change { add: add.collect(), ..Change::default() }
            }
        };
        self.tickets += 1;
        self.feed(at, Event::Change { ticket: self.tickets, change: Box::new(change) })?;
        for _ in 0..12 {
            self.now = self.now.plus(Nanos::from_millis(1));
            self.work(None)?;
            if self.leave_alone()? {
                return Ok(());
            }
            self.arrive(None)?;
        }
        Ok(())
    }

    /// The only voter that a leader has left restarts before the leader knows it to be the only one; then neither hears of the
    /// other for a while. True if that has happened.
    fn leave_alone(&mut self) -> Result<bool, String> {
        if self.churn == 0 || self.reads.as_ref().is_none_or(|reads| reads.plot.is_some()) {
            return Ok(false);
        }
        let heir_of = |at: usize| {
            let raft = self.nodes[at].life.as_ref().map(|life| &life.raft)?;
            let leased = raft.lease_end().is_some_and(|end| self.local_time(at) < end);
            let open = raft.configuration_index() > raft.commit();
            let heir = self.nodes.iter().position(|node| raft.quorum().is_only(node.id))?;
            let sealed = raft.log().batch_starting_at(raft.configuration_index())?;
            let has_it = self.nodes[heir].life.is_some() && self.nodes[heir].disk.log.contains(&sealed);
            (leased && open && has_it && heir != at && !self.is_still(at)).then_some((at, heir))
        };
        let Some((leader, heir)) = (0..self.nodes.len()).find_map(heir_of) else { return Ok(false) };
        self.cover.mark("the last voter restarts within a lease");
        let (leader_id, heir_id) = (self.nodes[leader].id, self.nodes[heir].id);
        self.crash(heir);
        self.boot(heir);
        self.network.retain(|(from, to, _)| *from != heir_id && *to != heir_id);
        self.blocked.extend([(leader_id, heir_id), (heir_id, leader_id)]);
        let until = self.now.plus(Nanos(ELECTION_TIMEOUT.0 / 2));
        if let Some(reads) = &mut self.reads {
            reads.plot = Some(Plot { leader: leader_id, usurper: heir_id, stage: Stage::Read, until });
        }
        self.rush(leader_id)?;
        Ok(true)
    }

    fn advance_plot(&mut self) -> Outcome {
        let Some(reads) = &mut self.reads else { return Ok(()) };
        let Some(plot) = reads.plot.take_if(|plot| self.now >= plot.until) else { return Ok(()) };
        match plot.stage {
            Stage::Waiting => {}
            Stage::Alone => {
                let until = self.now.plus(Nanos(ELECTION_TIMEOUT.0 / 5));
                reads.plot = Some(Plot { stage: Stage::Read, until, ..plot });
                return self.rush(plot.leader);
            }
            Stage::Read => {
                self.blocked.clear();
                return Ok(());
            }
        }
        self.cover.mark("plot");
        let until = self.now.plus(ELECTION_TIMEOUT).plus(Nanos(reads.random.below(ELECTION_TIMEOUT.0 / 2)));
        reads.plot = Some(Plot { stage: Stage::Alone, until, ..plot });
        let trick = reads.random.below(4);
        let held = Nanos(ELECTION_TIMEOUT.0 / 2 + reads.random.below(ELECTION_TIMEOUT.0 / 2));
        if trick < 2 {
            reads.held = Some((plot.leader, self.now.plus(held)));
        }
        let others: Vec<NodeId> =
            self.nodes.iter().map(|node| node.id).filter(|id| *id != plot.leader).collect();
        for other in &others {
            self.blocked.extend([(plot.leader, *other), (*other, plot.leader)]);
        }
        for at in 0..self.nodes.len() {
            let id = self.nodes[at].id;
            if trick >= 2 && id != plot.leader && id != plot.usurper && self.nodes[at].life.is_some() {
                self.cover.mark("restarts within a lease");
                self.crash(at);
                self.boot(at);
                let lost = |(from, to, _): &(NodeId, NodeId, Message)| (*from, *to) == (plot.leader, id);
                self.network.retain(|message| !lost(message));
                if let Some(usurper) = self.nodes.iter().position(|node| node.id == plot.usurper) {
                    self.break_session(at, usurper)?;
                }
            }
        }
        if trick >= 2 { self.rush(plot.leader) } else { Ok(()) }
    }

    /// All that the others have to do is done within some milliseconds; what is said to `without` waits.
    fn rush(&mut self, without: NodeId) -> Outcome {
        for _ in 0..16 {
            self.now = self.now.plus(Nanos::from_millis(1));
            self.work(Some(without))?;
            self.arrive(Some(without))?;
        }
        Ok(())
    }

    /// Disks do all that they were asked for, and time-outs fire.
    fn work(&mut self, without: Option<NodeId>) -> Outcome {
        for at in 0..self.nodes.len() {
            if Some(self.nodes[at].id) == without || self.is_still(at) {
                continue;
            }
            let busy = |life: &Life| {
                !(life.writes.is_empty() && life.completions.is_empty() && life.saves.is_empty())
            };
            while self.nodes[at].life.as_ref().is_some_and(busy) {
                self.write(at);
                self.complete(at)?;
                self.save(at)?;
            }
            if self.deadline_of(at) <= self.now {
                self.feed(at, Event::Tick)?;
            }
        }
        Ok(())
    }

    /// What is under way arrives.
    fn arrive(&mut self, without: Option<NodeId>) -> Outcome {
        let (keep, arrive): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.network).into_iter().partition(|(_, to, _)| Some(*to) == without);
        self.network = keep;
        arrive.into_iter().try_for_each(|(from, to, message)| self.deliver(from, to, message))
    }

    fn ask(&mut self, at: usize, kind: ReadKind, clock: Option<Nanos>) -> Outcome {
        let committed = self.ledger.committed.last().map_or(LogIndex(0), |(batch, _)| batch.last);
        let Some(life) = &self.nodes[at].life else { return Ok(()) };
        if clock.is_none() && self.is_still(at) {
            return Ok(());
        }
        let now = clock.unwrap_or_else(|| self.local_time(at));
        if life.raft.lease_end().is_some_and(|end| now < end) {
            self.cover.mark("read while a lease is in force");
        }
        let Some(reads) = &mut self.reads else { return Ok(()) };
        reads.id += 1;
        let id = reads.id;
        reads.asked.insert(id, if kind == ReadKind::Round { LogIndex(0) } else { committed });
        self.feed_at(at, now, Event::Read { id, kind })
    }

    pub(super) fn read_ready(&mut self, at: usize, id: u64, index: LogIndex) -> Outcome {
        let node = self.nodes[at].id;
        let Some(reads) = &mut self.reads else { return Err(format!("node {node} answers read {id}")) };
        reads.ready += 1;
        let needed = reads.asked.remove(&id).ok_or(format!("node {node} answers read {id} twice"))?;
        let leads = self.nodes[at].life.as_ref().is_some_and(|life| life.raft.role() == Role::Leader);
        self.cover.mark(if leads { "read on a leader" } else { "read on a follower" });
        if index < needed {
            return Err(format!(
                "linearizability: node {node} may read at {index} what was asked for when {needed} had committed"
            ));
        }
        Ok(())
    }

    pub(super) fn read_refused(&mut self, _at: usize, id: u64) {
        self.cover.mark("read refused");
        if let Some(reads) = &mut self.reads {
            reads.asked.remove(&id);
        }
    }

    /// Faults end.
    pub(super) fn heal_reads(&mut self) {
        if let Some(reads) = &mut self.reads {
            (reads.still, reads.held, reads.plot) = (None, None, None);
        }
    }

    /// After healing, every node can be read from.
    pub(super) fn read_everywhere(&mut self) -> Outcome {
        if self.reads.is_none() {
            return Ok(());
        }
        (0..self.nodes.len()).try_for_each(|at| self.reconnect(at))?;
        while !self.settle()? {}
        let Some(leader) = self.nodes.iter().position(Node::leads) else {
            return Err("nobody leads after healing".to_owned());
        };
        // Who is no member has nobody to ask.
        let members: Vec<usize> =
            (0..self.nodes.len()).filter(|at| self.must_converge(leader, *at)).collect();
        for kind in [ReadKind::Lease, ReadKind::Quorum] {
            let before = self.reads.as_ref().map_or(0, |reads| reads.ready);
            for at in &members {
                self.ask(*at, kind, None)?;
            }
            while !self.settle()? {}
            // What a lease decides is decided at a later moment; the request of a follower is on its way meanwhile.
            for _ in 0..2 {
                self.now = self.now.plus(Nanos(2));
                (0..self.nodes.len()).try_for_each(|at| self.feed(at, Event::Tick))?;
                while !self.settle()? {}
            }
            let ready = self.reads.as_ref().map_or(0, |reads| reads.ready) - before;
            if ready < members.len() as u64 {
                return Err(format!("{ready} of {} reads are answered after healing", members.len()));
            }
        }
        Ok(())
    }
}

/// `SEED=n` replays one run, `TRACE=1` with all its events; `SEEDS=n` runs more of them.
#[test]
fn reads_see_all_that_was_committed_before_they_were_asked_for() {
    let mut cover = Cover::default();
    let (first, count) = match env("SEED", u64::MAX) {
        u64::MAX => (0, env("SEEDS", 1_500)),
        seed => (seed, 1),
    };
    for seed in first..first + count {
        if let Err(found) = observe(Simulation::with_reads(seed), &mut cover) {
            panic!("seed {seed}: {found}\nreplay: SEED={seed} TRACE=1");
        }
    }
    println!("{cover:?}");
    if count < 1_000 {
        return;
    }
    for what in [
        "held up",
        "held up while it hands over",
        "plot",
        "read on a follower",
        "read on a leader",
        "read refused",
        "read while a lease is in force",
        "restarts within a lease",
        "stands still",
    ] {
        let count = cover.0.get(what).copied().unwrap_or_default();
        assert!(count >= 200, "{what:?} was exercised {count} times: {cover:?}");
    }
}

/// `SEED=n` replays one run, `TRACE=1` with all its events; `SEEDS=n` runs more of them.
#[test]
fn reads_see_all_that_was_committed_before_while_the_members_change() {
    let mut cover = Cover::default();
    let (first, count) = match env("SEED", u64::MAX) {
        u64::MAX => (0, env("SEEDS", 1_000)),
        seed => (seed, 1),
    };
    for seed in first..first + count {
        if let Err(found) = observe(Simulation::with_reads_and_changes(seed), &mut cover) {
            panic!("seed {seed}: {found}\nreplay: SEED={seed} TRACE=1");
        }
    }
    println!("{cover:?}");
    if count < 1_000 {
        return;
    }
    for what in [
        "changed",
        "read on a follower",
        "read on a leader",
        "read while a lease is in force",
        "the last voter restarts within a lease",
    ] {
        let count = cover.0.get(what).copied().unwrap_or_default();
        assert!(count >= 100, "{what:?} was exercised {count} times: {cover:?}");
    }
}

#[test]
fn known_bugs_of_reads_are_caught_when_they_are_put_back() {
    for mutant in Mutant::READS.into_iter().filter(|mutant| *mutant != Mutant::FollowerReadWithoutApply) {
        mutants::set(Some(mutant));
        let found = (0..3_000).find_map(|seed| {
            let mut simulation = match mutant {
                Mutant::LastVoterElectsItselfWithinLease => Simulation::with_reads_and_changes(seed),
                _ => Simulation::with_reads(seed),
            };
            simulation.strict = false;
            simulation.run(4_000).err().map(|found| (seed, found))
        });
        mutants::set(None);
        let line = found.as_ref().map(|(seed, found)| (seed, found.lines().next().unwrap_or_default()));
        println!("{mutant:?}: {line:?}");
        let line = line.map(|(_, line)| line).unwrap_or_default();
        assert!(line.starts_with("linearizability"), "{mutant:?} was not noticed: {line:?}");
    }
}
