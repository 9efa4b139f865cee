//! Reads: what is checked of them beside what the history knows, and the troubles that are theirs.

use super::*;
use crate::sim::node::Ask;

impl Ask {
    /// Whether any node can be asked.
    pub(super) fn may_wander(self) -> bool {
        !matches!(self, Self::Barrier | Self::Round)
    }
}

impl<C: Cluster> World<'_, C> {
    /// A node answered a client's read in time.
    pub(super) fn was_read(&mut self, node: usize, id: CommandId, ask: Option<Ask>) {
        let leads = self.machines[node].view.role == LEADER;
        let Some(ask) = ask else { return };
        match ask {
            Ask::Stale { age_ms, .. } => self.check_age(node, age_ms, leads),
            Ask::Linearizable if leads && self.tuning.lease_drift_ppm.is_some() => {
                self.context.cover(Mark::LeaderReadWithLeases);
            }
            _ => {}
        }
        if !leads {
            self.context.cover(Mark::FollowerRead);
        }
        let this = &mut self.clients[id.client];
        if ask.is_linearizable() && id.sequence >= this.fresh_from {
            this.fresh_read = true;
        }
    }

    /// A read that may be so old was answered by a node that could hear another one so long ago, or a quorum if it leads,
    /// and a little more: what was said may have been under way, or waiting for the node to wake.
    ///
    /// A leader knows that it led when a quorum followed it, itself among that: the only voter leads for as long as it says
    /// so, whatever other machines there are, since nobody else can be elected without it. The members may have changed in
    /// the turn of the answer.
    pub(super) fn check_age(&self, node: usize, age_ms: u64, leads: bool) {
        let patience = self.tuning.election_timeout_ms * MILLISECOND * 2;
        let time = age_ms * MILLISECOND * 5 / 4 + patience;
        let heard = if leads {
            let (now, before) = (self.members_of(node), self.machines[node].members_before);
            self.could_hear_quorum(node, now, time)
                || self.changes && before != Members::default() && self.could_hear_quorum(node, before, time)
        } else {
            (0..self.machines.len()).any(|other| other != node && self.could_hear(node, other, time))
        };
        let whom = if leads { "no quorum" } else { "nobody" };
        if !heard {
            self.history
                .borrow_mut()
                .fail(|| format!("node {node} reads what is at most {age_ms} ms old, and hears {whom}"));
        }
    }

    /// The core stands still after reading its clock; the process' other threads go on.
    pub(super) fn stop_core(&mut self, node: usize, until: Time) {
        let now = self.context.now();
        let machine = &mut self.machines[node];
        if machine.process.is_none() || machine.busy_until > now || machine.paused_until > now {
            return;
        }
        self.context.cover(Mark::CoreStopped);
        self.context.record(node, What::Pause, until, 1);
        machine.core_reading = Some((machine.clock.monotonic_ns(now), machine.clock.wall_ms(now)));
        machine.paused_until = until;
        machine.wake_at = 0;
    }

    /// What clocks may be off by in this run: leases rely on it.
    pub(super) fn drift_max_ppm(&self) -> i64 {
        self.tuning.lease_drift_ppm.map_or(i64::MAX, i64::from)
    }
}
