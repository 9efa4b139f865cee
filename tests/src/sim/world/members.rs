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
            let (mut left, mut held) = (voters, 0);
            while left != 0 {
                held += u32::from(holds(left.trailing_zeros() as usize));
                left &= left - 1;
            }
            held * 2 > voters.count_ones()
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
        self.history.borrow_mut().goes_by(node, now, after.commit);
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
        if leads && self.history.borrow().has_committed_in(after.term) {
            self.follow_moves(node);
        }
        let fail = |why: String| self.history.borrow_mut().fail(|| why);
        if after.role == LEADER && now.settled && now.index <= after.commit && !now.is_voter(node) {
            fail(format!("node {node} leads although it has left with index {}", now.index));
        }
    }

    /// What comes with a step of a change of the members.
    pub(super) fn members_trouble(&mut self, node: usize, before: &View, after: &View) {
        if !self.changes || self.phase != Phase::Trouble || self.plot.is_some() {
            return;
        }
        let (was, now) = (self.machines[node].members_before, self.machines[node].members);
        let leads = after.role == LEADER;
        let elected = leads && before.role != LEADER;
        let steps = now.index != was.index && was != Members::default();
        let saved = after.durable >= now.index && (steps || before.durable < now.index);
        let alone = now.settled && now.incoming == 1 << node && saved && after.commit < now.index;
        let means: &[Trouble] = if elected {
            &[Trouble::ChangeAtOnce]
        } else if leads && steps {
            // Those of before may never hear of it, and somebody else has to go on from there, or does not know it.
            &[Trouble::ChangeAtOnce, Trouble::CutOffAtStep, Trouble::IsolateLeader, Trouble::KillLeader]
        } else if !leads && alone {
            &[Trouble::LastVoterRestarts]
        } else if !leads && steps && now.outgoing != 0 {
            &[Trouble::DivideJoint]
        } else {
            return;
        };
        let number = self.number(1);
        if self.nemesis.unrest() {
            let trouble = means[self.nemesis.rng().index(means.len())];
            self.strike(number, trouble, node, node);
        }
    }

    /// The nodes fall into two groups, and one of them has a quorum of the old or of the new voters, and not of both.
    pub(super) fn divide_joint(&mut self, node: usize) {
        let Members { incoming, outgoing, .. } = self.machines[node].members;
        let led = |machine: &Machine<C::Node>| machine.view.role == LEADER;
        let leader = self.machines.iter().position(led);
        let quorum = |of: u32, side: u32| (of & side).count_ones() * 2 > of.count_ones();
        let sides: Vec<u32> = (1..1 << self.machines.len())
            .filter(|side| side >> node & 1 == 1 && leader.is_none_or(|leader| side >> leader & 1 == 0))
            .filter(|side| quorum(incoming, *side) != quorum(outgoing, *side))
            .collect();
        if sides.is_empty() {
            return;
        }
        let rng = self.nemesis.rng();
        let (side, timeouts) = (sides[rng.index(sides.len())], rng.between(2, 6));
        let length = timeouts * self.tuning.election_timeout_ms * MILLISECOND;
        self.cut_where(length, |from, to| side >> from & 1 != side >> to & 1);
    }

    /// Asks the leader for some change of the members.
    pub(super) fn change_members(&mut self, node: usize) {
        if !self.operator.waits_for_change() {
            self.change_at_once(node);
        }
    }

    /// Asks a node for some change of the members, whatever it was asked for before.
    pub(super) fn change_at_once(&mut self, node: usize) {
        let nodes = self.machines.len();
        let Some(process) = &self.machines[node].process else { return };
        if !self.changes {
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
        let all = |of: &[usize]| of.iter().fold(0, |all, node| all | 1 << node);
        let but_one = all(&voters) & !bit(voter);
        let wish = match self.nemesis.rng().index(13) {
            0 => Wish { learn: bit(other), ..none },
            1 | 2 => Wish { vote: bit(other), ..none },
            3 => Wish { promote: bit(learner), ..none },
            4 => Wish { demote: bit(voter), ..none },
            5 => Wish { remove: bit(voter), ..none },
            6 => Wish { remove: bit(learner), ..none },
            7 => Wish { remove: bit(Some(node)), ..none },
            // All others for all but one.
            8 => Wish { vote: all(&others), remove: but_one, ..none },
            9 => Wish { remove: but_one, ..none },
            10 => Wish { moves: bit(voter), ..none },
            11 => Wish { moves: bit(learner), ..none },
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

    /// Where each machine is to listen.
    pub(super) fn ports(&self) -> Vec<u16> {
        self.machines.iter().map(|machine| machine.port).collect()
    }

    /// Who is to be met at another port, by what a leader has committed, is brought there by its operator: by then it is decided,
    /// whatever became of the one who was asked for it. A leader that has been replaced may commit something older still.
    fn follow_moves(&mut self, leader: usize) {
        let Some(process) = &self.machines[leader].process else { return };
        let Some((index, ports)) = process.ports(self.machines.len()) else { return };
        if index <= self.operator.followed {
            return;
        }
        self.operator.followed = index;
        for (node, port) in ports.into_iter().enumerate() {
            if let Some(port) = port.filter(|port| *port != self.machines[node].port) {
                self.machines[node].port = port;
                let delay = self.nemesis.length();
                self.plan(delay, Plan::Move { node });
            }
        }
    }

    fn moves(&self, node: usize) -> bool {
        let machine = &self.machines[node];
        machine.process.is_some() && machine.listens != machine.port
    }

    /// Whether a process is about to end because it is to listen elsewhere.
    pub(super) fn somebody_moves(&self) -> bool {
        (0..self.machines.len()).any(|node| self.moves(node))
    }

    /// A machine's process ends, and the next one listens where it is to be met.
    pub(super) fn move_to_port(&mut self, node: usize) {
        if self.moves(node) {
            self.context.cover(Mark::MemberMoved);
            self.crash(node, Crash::Kill);
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
