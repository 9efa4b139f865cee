//! What goes wrong, and when: drawn from the seed.
//!
//! Each run has its own character (swarm testing): it leaves some kinds of trouble out altogether, so that the
//! others meet in combinations that a uniform mixture would hardly ever produce.

use super::context::{MILLISECOND, Time};
use super::node::Tuning;
use super::rng::Rng;

/// A kind of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trouble {
    /// kill -9 of one process.
    Kill,
    /// kill -9 of the leader.
    KillLeader,
    /// A machine loses power right after its node has entered a term, when its vote may not be durable yet. Not in the table:
    /// it comes with the term.
    KillVoter,
    /// One machine loses power.
    PowerCut,
    /// All machines lose power.
    PowerCutOfAll,
    /// One process is asked to stop in good order.
    Shutdown,
    /// The leader is asked to stop in good order.
    ShutdownLeader,
    /// One node loses all its links.
    Isolate,
    /// The leader loses all its links.
    IsolateLeader,
    /// The nodes fall into two groups.
    Split,
    /// One directed link is cut.
    OneWay,
    /// Each directed link is cut or not.
    Partial,
    /// One process stands still.
    Pause,
    /// The leader is asked to hand over, to a chosen node or to the best one.
    Transfer,
    /// Some node is.
    TransferAnywhere,
    /// The leader is, and loses all its links while it does so.
    TransferAndCut,
    /// The schedule of figure 8 of the Raft paper.
    Figure8,
    /// What followers answer the leader is long under way when they cannot hear it any more.
    SlowAnswers,
    /// A vote of an earlier term reaches a candidate of a later one.
    LateVote,
    /// A voter is started anew while another node cannot hear the leader.
    ForgetfulVoter,
    /// What a leader answered a follower is long under way when another node leads.
    StaleAnswer,
    /// A leader that was cut off comes back when the log of its successor begins behind what it knows to be committed, and it
    /// holds more of its own.
    Overtaken,
    /// A write of a leader that is cut off is under way for so long that what another leader puts in its place is written first.
    CutOffWrite,
    /// One write takes far longer than the others.
    StallWrite,
    /// A disk stands still right after its node has entered a term. Not in the table: it comes with the term.
    StallVoter,
    /// The leader is asked for a change of the members.
    ChangeMembers,
    /// A leader that has just been elected, or has just gone on to other members, is. Not in the table: it comes with that.
    ChangeAtOnce,
    /// A leader that has just gone on to other members loses all its links, before anybody else hears of it. Not in the table: it
    /// comes with that.
    CutOffAtStep,
    /// The nodes fall into two groups, one of which has a quorum of the old or of the new voters of a transition. Not in the
    /// table: it comes with the transition.
    DivideJoint,
    /// Whoever is the only voter now is started anew, and whoever made it so does not hear of it. Not in the table: it comes
    /// with that.
    LastVoterRestarts,
    /// The core of one process stands still between reading its clock and taking its turn; other threads go on.
    StopCore,
    /// The leader's core does.
    StopLeadersCore,
    /// One wall clock jumps.
    ClockJump,
    /// One disk is slow.
    SlowDisk,
    /// The leader's is so slow, and for so long, that it had better not lead.
    SlowLeadersDisk,
    /// One disk stands still.
    StallDisk,
    /// A connection breaks at a random byte.
    Break,
    /// Dials fail at random.
    DialFailures,
    /// A directed link is slow.
    SlowLink,
    /// A node's links are slow, both ways.
    SlowPeer,
    /// One machine's clocks run fast or slow.
    ClockDrift,
    /// An operation of one disk fails, and perhaps all after it; the node stops and is started again.
    FailDisk,
    /// Some writes of one disk stop short.
    ShortWrites,
    /// One disk is full.
    NoSpace,
    /// Content of the log rots, on the one disk of the run to which that happens.
    Rot,
    /// A batch that is written to that disk goes to another place of it.
    Misdirect,
    /// Bits are flipped on their way from one node to another.
    FlipBits,
}

/// What a run must allow for a trouble to be in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Any run may have it.
    Nothing,
    /// Disks may fail: nodes stop for it.
    FailingDisks,
    /// Content may rot.
    RottingDisk,
    /// Members may join and leave.
    Changes,
}

/// A kind of trouble in the table.
pub struct Entry {
    /// What it is.
    pub trouble: Trouble,
    /// How often it comes, against the others.
    pub weight: u64,
    /// What the run must allow.
    pub needs: Needs,
}

const fn entry(trouble: Trouble, weight: u64, needs: Needs) -> Entry {
    Entry { trouble, weight, needs }
}

/// All kinds. A new one is an entry here and an arm in `world/trouble.rs`.
pub const TROUBLES: &[Entry] = &[
    entry(Trouble::Kill, 5, Needs::Nothing),
    entry(Trouble::KillLeader, 4, Needs::Nothing),
    entry(Trouble::PowerCut, 3, Needs::Nothing),
    entry(Trouble::PowerCutOfAll, 2, Needs::Nothing),
    entry(Trouble::Shutdown, 3, Needs::Nothing),
    entry(Trouble::ShutdownLeader, 2, Needs::Nothing),
    entry(Trouble::Isolate, 2, Needs::Nothing),
    entry(Trouble::IsolateLeader, 5, Needs::Nothing),
    entry(Trouble::Split, 2, Needs::Nothing),
    entry(Trouble::OneWay, 2, Needs::Nothing),
    entry(Trouble::Partial, 2, Needs::Nothing),
    entry(Trouble::Pause, 3, Needs::Nothing),
    entry(Trouble::Transfer, 4, Needs::Nothing),
    entry(Trouble::TransferAnywhere, 1, Needs::Nothing),
    entry(Trouble::TransferAndCut, 2, Needs::Nothing),
    entry(Trouble::Figure8, 2, Needs::Nothing),
    entry(Trouble::SlowAnswers, 2, Needs::Nothing),
    entry(Trouble::LateVote, 3, Needs::Nothing),
    entry(Trouble::ForgetfulVoter, 2, Needs::Nothing),
    entry(Trouble::StallWrite, 2, Needs::Nothing),
    entry(Trouble::ChangeMembers, 24, Needs::Changes),
    entry(Trouble::StopCore, 1, Needs::Nothing),
    entry(Trouble::StopLeadersCore, 3, Needs::Nothing),
    entry(Trouble::ClockJump, 1, Needs::Nothing),
    entry(Trouble::SlowDisk, 2, Needs::Nothing),
    entry(Trouble::StallDisk, 2, Needs::Nothing),
    entry(Trouble::Break, 4, Needs::Nothing),
    entry(Trouble::DialFailures, 1, Needs::Nothing),
    entry(Trouble::SlowLink, 2, Needs::Nothing),
    entry(Trouble::SlowPeer, 2, Needs::Nothing),
    entry(Trouble::ClockDrift, 1, Needs::Nothing),
    entry(Trouble::FailDisk, 4, Needs::FailingDisks),
    entry(Trouble::ShortWrites, 2, Needs::FailingDisks),
    entry(Trouble::NoSpace, 3, Needs::FailingDisks),
    entry(Trouble::Rot, 4, Needs::RottingDisk),
];

/// Kinds that are drawn apart from the others.
pub const SCHEMES: &[Entry] = &[
    entry(Trouble::StaleAnswer, 6, Needs::Nothing),
    entry(Trouble::CutOffWrite, 6, Needs::Nothing),
    entry(Trouble::Overtaken, 6, Needs::Nothing),
];

/// Kinds that are drawn apart from those.
pub const FLAWS: &[Entry] =
    &[entry(Trouble::Misdirect, 6, Needs::RottingDisk), entry(Trouble::FlipBits, 8, Needs::Nothing)];

/// Kinds that are drawn apart from all of those.
pub const BURDENS: &[Entry] = &[entry(Trouble::SlowLeadersDisk, 8, Needs::Nothing)];

/// What a run allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// Disks may fail, run full and write short. Nodes stop for it.
    pub failing_disks: bool,
    /// The one node whose disk may rot: the others hold one good copy of all that is committed.
    pub rotting_disk: Option<usize>,
    /// Writes of a killed process may arrive when the next one is running.
    pub late_writes: bool,
}

impl Allowed {
    /// What the seed allows, where it was not decided.
    #[must_use]
    pub fn draw(rng: &mut Rng, nodes: usize, disk_faults: Option<bool>, late_writes: Option<bool>) -> Self {
        let [failing, rotting, late] = [rng.chance(300_000), rng.chance(250_000), rng.chance(300_000)];
        let victim = rng.index(nodes);
        Self {
            failing_disks: disk_faults.unwrap_or(failing),
            rotting_disk: (nodes >= 3 && disk_faults.unwrap_or(rotting)).then_some(victim),
            late_writes: late_writes.unwrap_or(late),
        }
    }

    fn has(self, needs: Needs, changes: bool) -> bool {
        match needs {
            Needs::Changes => changes,
            Needs::Nothing => true,
            Needs::FailingDisks => self.failing_disks,
            Needs::RottingDisk => self.rotting_disk.is_some(),
        }
    }
}

/// A run's character.
pub struct Nemesis {
    seed: u64,
    rng: Rng,
    weights: Vec<(Trouble, u64)>,
    /// Typical time between two troubles.
    pause: Time,
    /// Typical time that a trouble lasts.
    length: Time,
    /// How often, in a million, trouble befalls a leader that has just been elected: the entries of several terms
    /// are then spread over few nodes, as in figure 8 of the Raft paper.
    regicide_ppm: u32,
    /// How often, in a million, a node loses power that has just entered a term.
    perjury_ppm: u32,
    /// How often, in a million, trouble comes with a step of a change of the members.
    unrest_ppm: u32,
}

impl Nemesis {
    /// The character of a run with this stream.
    #[must_use]
    pub fn new(mut rng: Rng, tuning: &Tuning, allowed: Allowed, changes: bool) -> Self {
        let election = tuning.election_timeout_ms * MILLISECOND;
        let pause = election / 10 * [3, 8, 20, 40][rng.index(4)];
        let length = election / 10 * [1, 5, 15, 40][rng.index(4)];
        let mut weights = Vec::new();
        while weights.is_empty() {
            for entry in TROUBLES.iter().filter(|entry| allowed.has(entry.needs, changes)) {
                if rng.chance(600_000) || entry.needs == Needs::Changes {
                    weights.push((entry.trouble, entry.weight * rng.between(1, 4)));
                }
            }
        }
        let regicide_ppm = [0, 0, 0, 500_000, 900_000][rng.index(5)];
        let perjury_ppm = [0, 0, 0, 300_000][rng.index(4)];
        let seed = rng.bits();
        let mut apart = Rng::new(!seed);
        let mut draw = |entries: &[Entry]| {
            for entry in entries.iter().filter(|entry| allowed.has(entry.needs, changes)) {
                if apart.chance(250_000) {
                    weights.push((entry.trouble, entry.weight * apart.between(1, 4)));
                }
            }
            apart.index(3)
        };
        let unrest_ppm = [0, 150_000, 500_000][draw(SCHEMES)];
        draw(FLAWS);
        draw(BURDENS);
        Self { seed, rng, weights, pause, length, regicide_ppm, perjury_ppm, unrest_ppm }
    }

    /// From now on, until the next call, luck is that of the trouble of this number: one that is left out takes nothing from
    /// the others' luck.
    pub fn begin(&mut self, number: u64) {
        self.rng = Rng::new(self.seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }

    /// The next trouble.
    pub fn choose(&mut self) -> Trouble {
        let total = self.weights.iter().map(|(_, weight)| weight).sum();
        let mut draw = self.rng.below(total);
        for (trouble, weight) in &self.weights {
            match draw.checked_sub(*weight) {
                Some(left) => draw = left,
                None => return *trouble,
            }
        }
        unreachable!("the draw is below the sum of the weights")
    }

    /// What befalls a leader that has just been elected, and perhaps one other node.
    pub fn regicide(&mut self) -> Option<(Trouble, bool)> {
        let struck = self.rng.chance(self.regicide_ppm);
        let means = [Trouble::KillLeader, Trouble::IsolateLeader, Trouble::PowerCut, Trouble::Kill];
        struck.then(|| (means[self.rng.index(4)], self.rng.chance(400_000)))
    }

    /// What befalls a node that has just entered a term, in some runs.
    pub fn perjury(&mut self) -> Option<Trouble> {
        let struck = self.rng.chance(self.perjury_ppm);
        let means = [Trouble::KillVoter, Trouble::KillVoter, Trouble::StallVoter];
        struck.then(|| means[self.rng.index(3)])
    }

    /// Whether trouble comes with a step of a change of the members, in some runs.
    pub fn unrest(&mut self) -> bool {
        self.rng.chance(self.unrest_ppm)
    }

    /// How long until the next one.
    pub fn pause(&mut self) -> Time {
        self.rng.between(self.pause / 20, self.pause * 2)
    }

    /// How long it lasts.
    pub fn length(&mut self) -> Time {
        self.rng.between(self.length / 50, self.length * 2)
    }

    /// How long a crashed node stays away: often hardly at all.
    pub fn absence(&mut self) -> Time {
        if self.rng.chance(300_000) { self.rng.between(0, 2 * MILLISECOND) } else { self.length() }
    }

    /// Its random stream.
    pub fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }
}
