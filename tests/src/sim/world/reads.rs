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
            Ask::Stale { age_ms, .. } => self.check_age(node, age_ms),
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

    /// A read that may be so old was answered by a node that could hear another one so long ago, and a little more: what was
    /// said may have been under way, or waiting for the node to wake.
    fn check_age(&self, node: usize, age_ms: u64) {
        let patience = self.tuning.election_timeout_ms * MILLISECOND * 2;
        let since = self.context.now().saturating_sub(age_ms * MILLISECOND * 5 / 4 + patience);
        let woke_at = self.machines[node].woke_at;
        let fabric = self.fabric.borrow();
        let mut others = (0..self.machines.len()).filter(|other| *other != node);
        let alone = self.machines.len() == 1;
        let heard = others.any(|other| fabric.audible_until(other, node).max(woke_at) >= since);
        if !alone && !heard {
            self.history
                .borrow_mut()
                .fail(|| format!("node {node} reads what is at most {age_ms} ms old, and hears nobody"));
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
