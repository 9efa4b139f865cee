//! Machines that join, leave, and come back with an empty disk; and whose word counts where the members change.

use super::*;
use crate::sim::node::{Members, Wish};

impl Members {
    /// All of so many nodes are voters.
    pub(super) fn all(nodes: usize) -> Self {
        Self { index: 0, incoming: (1 << nodes) - 1, outgoing: 0, learners: 0, settled: true }
    }

    /// Whether those who hold are a quorum: in a transition of the old voters and of the new ones.
    pub(super) fn reached(self, holds: impl Fn(usize) -> bool) -> bool {
        [self.incoming, self.outgoing].into_iter().filter(|voters| *voters != 0).all(|voters| {
            let held = (0..32).filter(|node| voters >> node & 1 == 1 && holds(*node)).count();
            held * 2 > voters.count_ones() as usize
        })
    }

    pub(super) fn is_voter(self, node: usize) -> bool {
        (self.incoming | self.outgoing) >> node & 1 == 1
    }

    pub(super) fn is_member(self, node: usize) -> bool {
        self.is_voter(node) || self.learners >> node & 1 == 1
    }
}

impl<C: Cluster> World<'_, C> {
    /// Who counts, as a node sees it.
    pub(super) fn members_of(&self, node: usize) -> Members {
        let machine = &self.machines[node];
        if self.changes { machine.members } else { Members::all(self.machines.len()) }
    }

    /// The members of a node have changed, or its commit index has.
    pub(super) fn check_members(&mut self, node: usize, before: &View, after: &View) {
        let Some(process) = self.machines[node].process.as_ref().filter(|_| self.changes) else { return };
        let (was, now) = (self.machines[node].members, process.members());
        self.machines[node].members_before = was;
        if now != was {
            self.machines[node].members_changed = (was, self.context.now());
        }
        self.machines[node].members = now;
        if now == was && before.commit == after.commit {
            return;
        }
        let fail = |why: String| self.history.borrow_mut().fail(|| why);
        // "A server always uses the latest configuration in its log": in it.
        if now.index > after.last {
            fail(format!(
                "node {node} goes by the members of index {}, and its log ends at {}",
                now.index, after.last
            ));
        }
        let leads = (before.role, before.term) == (LEADER, after.term) && after.role == LEADER;
        if leads && now.index > was.index {
            self.context.cover(if now.outgoing != 0 { Mark::JointEntered } else { Mark::MembersChanged });
            if now.learners & !was.learners != 0 {
                self.context.cover(Mark::LearnerAdded);
            }
            // One step after the other; and only once something of the own term is committed.
            if after.commit < was.index {
                fail(format!(
                    "leader {node} went from the members of index {} to those of {}, with {} committed",
                    was.index, now.index, after.commit
                ));
            }
            if !self.history.borrow().has_committed_in(after.term) {
                fail(format!(
                    "leader {node} changed the members before it had committed anything in its term"
                ));
            }
        }
        if after.role == LEADER && now.settled && now.index <= after.commit && !now.is_voter(node) {
            fail(format!("node {node} leads although it has left with index {}", now.index));
        }
    }

    /// Asks the leader for some change of the members.
    pub(super) fn change_members(&mut self, node: usize) {
        let nodes = self.machines.len();
        let Some(process) = &self.machines[node].process else { return };
        if !self.changes || self.operator.waits_for_change() {
            return;
        }
        let members = process.members();
        let rng = self.nemesis.rng();
        let others: Vec<usize> = (0..nodes).filter(|other| !members.is_member(*other)).collect();
        let voters: Vec<usize> = (0..nodes).filter(|other| members.incoming >> other & 1 == 1).collect();
        let learners: Vec<usize> = (0..nodes).filter(|other| members.learners >> other & 1 == 1).collect();
        let mut pick = |of: &[usize]| (!of.is_empty()).then(|| of[rng.index(of.len())]);
        let (other, voter, learner) = (pick(&others), pick(&voters), pick(&learners));
        let none = Wish::default();
        let bit = |node: Option<usize>| node.map_or(0, |node| 1 << node);
        let wish = match self.nemesis.rng().index(9) {
            0 => Wish { learn: bit(other), ..none },
            1 | 2 => Wish { vote: bit(other), ..none },
            3 => Wish { promote: bit(learner), ..none },
            4 => Wish { demote: bit(voter), ..none },
            5 => Wish { remove: bit(voter), ..none },
            6 => Wish { remove: bit(learner), ..none },
            7 => Wish { remove: bit(Some(node)), ..none },
            _ => Wish { vote: bit(other), remove: bit(voter), ..none },
        };
        if wish != none {
            self.change(node, wish);
        }
    }

    /// What an operator does once a change is committed: who has left is sometimes wiped, to come back with an empty disk.
    pub(super) fn has_changed(&mut self, node: usize, index: u64, wish: Wish) {
        let Some(process) = &self.machines[node].process else { return };
        let members = process.members();
        if members.index != index || !members.settled {
            return;
        }
        for left in 0..self.machines.len() {
            if wish.remove >> left & 1 == 1 && !members.is_member(left) {
                self.context.cover(Mark::MemberLeft);
                if left == node {
                    self.context.cover(Mark::LeaderLeft);
                }
                if self.nemesis.rng().chance(500_000) {
                    self.plan(0, Plan::Wipe { node: left });
                }
            }
        }
    }

    /// Gives a machine that has left an empty disk. It will join anew.
    pub(super) fn wipe(&mut self, node: usize) {
        self.context.cover(Mark::Wiped);
        self.crash(node, Crash::Kill);
        let machine = &mut self.machines[node];
        let rng = machine.rng.fork(machine.lives);
        machine.disk = DiskState::new(&self.context, node, rng, DiskConfig::default());
        let late = if self.allowed.late_writes { 300_000 } else { 0 };
        machine.disk.borrow_mut().faults_mut().late_write_ppm = late;
        machine.known = View::default();
        (machine.joins, machine.wiped) = (true, true);
    }
}
