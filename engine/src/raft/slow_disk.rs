//! A leader whose own disk is far slower than the others'.
//!
//! The own disk is one vote among equals, so commits do not wait for it; but what is proposed waits until the own log has room
//! for it, which under any other leader it would not.
//!
//! One batch at a time is timed: from when it is proposed until the own log has it, and until a quorum has it without this
//! node → most batches of several spans in a row took far longer here → [`Action::OwnDiskSlow`] says so, and names who was
//! quick → leadership is handed over as if somebody had asked for it.
//!
//! The measure compares, so nobody hands over where all disks are slow, nor where no quorum does without this one; and whoever
//! takes over was quicker. After an attempt there is none for a while, whatever became of it; one that could not begin was none.
//! Everything counts by the moments that the driver hands in.

use super::progress::Progress;
use super::role::RoleState;
use super::{Action, Nanos, Raft};
use ringraft_block::{LogIndex, NodeId};
use std::cmp::Reverse;

/// When a leader's own disk is too slow for it to lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlowDiskLimits {
    /// It takes so many times as long as a quorum does without it; at least 2.
    pub factor: u32,
    /// And at least this long; more than 0.
    pub floor: Nanos,
    /// Over so long; more than 0.
    pub span: Nanos,
}

/// So many spans in a row make up [`SlowDiskLimits::span`], and most batches of each must have been slow: a single stall spoils
/// one or two of them.
const PARTS: u64 = 4;
/// After an attempt there is none for so many times [`SlowDiskLimits::span`].
const REST: u64 = 8;

/// What a leader finds out about its own disk. Nothing is allocated for a batch.
#[derive(Clone, Debug, Default)]
pub(super) struct SlowDisk {
    timed: Option<Timed>,
    /// The first quorum of the others that had the timed batch.
    first_quorum: Vec<NodeId>,
    /// When the present part began, and what its batches were.
    part_from: Option<Nanos>,
    batches: u64,
    slow_batches: u64,
    /// Parts in a row, up to the present one, most batches of which were slow.
    slow_parts: u64,
    /// The slow batches of those parts and of the present one: how many, and what they took together.
    count: u64,
    own: Nanos,
    others: Nanos,
    /// How often each of the others belonged to the first quorum that had one of them.
    quick: Vec<(NodeId, u64)>,
}

/// A batch that is being timed.
#[derive(Clone, Copy, Debug)]
struct Timed {
    last: LogIndex,
    from: Nanos,
    /// What it took until it was durable here, and at a quorum of the others.
    own: Option<Nanos>,
    others: Option<Nanos>,
}

impl SlowDisk {
    /// Takes in what a batch has taken that was proposed at `from`. True when the disk has been slow for long enough.
    fn add(&mut self, from: Nanos, own: Nanos, others: Nanos, limits: &SlowDiskLimits, now: Nanos) -> bool {
        self.batches += 1;
        if own >= limits.floor && own.0 >= others.0.saturating_mul(limits.factor.into()) {
            self.slow_batches += 1;
            self.count += 1;
            (self.own, self.others) = (self.own.plus(own), self.others.plus(others));
            for id in &self.first_quorum {
                match self.quick.iter_mut().find(|(known, _)| known == id) {
                    Some((_, times)) => *times += 1,
                    None => self.quick.push((*id, 1)),
                }
            }
        }
        let part_from = *self.part_from.get_or_insert(from);
        if now.since(part_from).0 < limits.span.0 / PARTS {
            return false;
        }
        let slow = 2 * self.slow_batches > self.batches;
        (self.part_from, self.batches, self.slow_batches) = (Some(now), 0, 0);
        if slow {
            self.slow_parts += 1;
        } else {
            self.forget();
        }
        self.slow_parts >= PARTS
    }

    /// What was slow counts no more.
    fn forget(&mut self) {
        (self.slow_parts, self.count, self.own, self.others) = (0, 0, Nanos(0), Nanos(0));
        self.quick.clear();
    }

    fn times_quick(&self, id: NodeId) -> u64 {
        self.quick.iter().find(|(known, _)| *known == id).map_or(0, |(_, times)| *times)
    }
}

impl Raft {
    /// The batch that ends at `last` is proposed. It is timed, if none is.
    pub(super) fn time_batch(&mut self, last: LogIndex) {
        let RoleState::Leader(leader) = &mut self.role else { return };
        if self.config.slow_disk.is_some() && leader.slow_disk.timed.is_none() {
            leader.slow_disk.timed = Some(Timed { last, from: self.now, own: None, others: None });
        }
    }

    /// More is durable, here or elsewhere.
    pub(super) fn look_at_timed_batch(&mut self, actions: &mut Vec<Action>) {
        let (id, now) = (self.config.id, self.now);
        let RoleState::Leader(leader) = &mut self.role else { return };
        let Some(limits) = self.config.slow_disk else { return };
        let Some(mut timed) = leader.slow_disk.timed.take() else { return };
        if timed.own.is_none() && self.durable.last() >= timed.last {
            timed.own = Some(now.since(timed.from));
        }
        if timed.others.is_none() {
            let has_it = |peer: &Progress| peer.matched() >= timed.last;
            if self.quorum.reached(|voter| voter != id && leader.peer(voter).is_some_and(has_it)) {
                timed.others = Some(now.since(timed.from));
                let mut first_quorum = std::mem::take(&mut leader.slow_disk.first_quorum);
                first_quorum.clear();
                first_quorum
                    .extend(self.quorum.voters().filter(|voter| leader.peer(*voter).is_some_and(has_it)));
                leader.slow_disk.first_quorum = first_quorum;
            }
        }
        let (Some(own), Some(others)) = (timed.own, timed.others) else {
            leader.slow_disk.timed = Some(timed);
            return;
        };
        let may_hand_over = leader.transfer.is_none() && now >= self.slow_disk_rests_until;
        if leader.slow_disk.add(timed.from, own, others, &limits, now) && may_hand_over {
            self.own_disk_is_slow(limits, actions);
        }
    }

    /// Says that leadership is to be handed over, if there is anybody to take it.
    fn own_disk_is_slow(&mut self, limits: SlowDiskLimits, actions: &mut Vec<Action>) {
        let RoleState::Leader(leader) = &self.role else { return };
        let slow_disk = &leader.slow_disk;
        let mut quick: Vec<_> = self
            .able_to_take_over()
            .map(|peer| {
                (slow_disk.times_quick(peer.id()), peer.matched(), peer.contact(), Reverse(peer.id()))
            })
            .filter(|(times, ..)| *times > 0)
            .collect();
        if quick.is_empty() {
            return;
        }
        quick.sort_unstable();
        let to = quick.into_iter().rev().map(|(.., Reverse(id))| id).collect();
        let mean = |total: Nanos| Nanos(total.0 / slow_disk.count.max(1));
        actions.push(Action::OwnDiskSlow { own: mean(slow_disk.own), others: mean(slow_disk.others), to });
        self.slow_disk_rests_until = self.now.plus(Nanos(limits.span.0.saturating_mul(REST)));
    }

    /// The hand-over that was asked for could not begin: there is nothing to rest from. What has been slow for long enough, and has
    /// not been quick since, still is.
    pub(super) fn handover_put_off(&mut self, actions: &mut Vec<Action>) {
        self.slow_disk_rests_until = self.now;
        let RoleState::Leader(leader) = &self.role else { return };
        let Some(limits) = self.config.slow_disk else { return };
        if leader.transfer.is_none() && leader.slow_disk.slow_parts >= PARTS {
            self.own_disk_is_slow(limits, actions);
        }
    }
}
