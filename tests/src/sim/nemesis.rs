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
    /// One wall clock jumps.
    ClockJump,
    /// One disk is slow.
    SlowDisk,
    /// One disk stands still.
    StallDisk,
    /// A connection breaks at a random byte.
    Break,
    /// Dials fail at random.
    DialFailures,
    /// An operation of one disk fails, and perhaps all after it; the node stops and is started again.
    FailDisk,
    /// Some writes of one disk stop short.
    ShortWrites,
    /// One disk is full.
    NoSpace,
}

/// Kinds with their weights. Failing disks only on request.
const TROUBLES: [(Trouble, u64); 17] = [
    (Trouble::Kill, 5),
    (Trouble::KillLeader, 4),
    (Trouble::PowerCut, 3),
    (Trouble::PowerCutOfAll, 2),
    (Trouble::Shutdown, 3),
    (Trouble::ShutdownLeader, 2),
    (Trouble::Isolate, 2),
    (Trouble::IsolateLeader, 5),
    (Trouble::Split, 2),
    (Trouble::OneWay, 2),
    (Trouble::Partial, 2),
    (Trouble::Pause, 3),
    (Trouble::ClockJump, 1),
    (Trouble::SlowDisk, 2),
    (Trouble::StallDisk, 2),
    (Trouble::Break, 4),
    (Trouble::DialFailures, 1),
];

const DISK_TROUBLES: [(Trouble, u64); 3] =
    [(Trouble::FailDisk, 4), (Trouble::ShortWrites, 2), (Trouble::NoSpace, 3)];

/// A run's character.
pub struct Nemesis {
    rng: Rng,
    weights: Vec<(Trouble, u64)>,
    /// Typical time between two troubles.
    pause: Time,
    /// Typical time that a trouble lasts.
    length: Time,
    /// How often, in a million, trouble befalls a leader that has just been elected: the entries of several terms
    /// are then spread over few nodes, as in figure 8 of the Raft paper.
    regicide_ppm: u32,
}

impl Nemesis {
    /// The character of a run with this stream.
    #[must_use]
    pub fn new(mut rng: Rng, tuning: &Tuning, disk_faults: bool) -> Self {
        let election = tuning.election_timeout_ms * MILLISECOND;
        let pause = election / 10 * [3, 8, 20, 40][rng.index(4)];
        let length = election / 10 * [1, 5, 15, 40][rng.index(4)];
        let mut weights = Vec::new();
        while weights.is_empty() {
            let disk = if disk_faults { &DISK_TROUBLES[..] } else { &[] };
            for (trouble, weight) in TROUBLES.iter().chain(disk) {
                if rng.chance(600_000) {
                    weights.push((*trouble, weight * rng.between(1, 4)));
                }
            }
        }
        let regicide_ppm = [0, 0, 0, 500_000, 900_000][rng.index(5)];
        Self { rng, weights, pause, length, regicide_ppm }
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
