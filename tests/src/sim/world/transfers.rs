//! Leadership handed over because somebody asks for it.

use super::*;
use crate::sim::node::{Outcome, Wish};

/// What an operator has asked for and not been answered yet.
#[derive(Default)]
pub(super) struct Operator {
    tag: u64,
    errands: Vec<Errand>,
    outcomes: Vec<(u64, Outcome)>,
    /// Where the configuration stands that it has last moved members by.
    pub(super) followed: u64,
    /// How a cluster that had converged was asked to hand over, and what came of it.
    parting: Option<Parting>,
}

#[derive(Clone, Copy)]
struct Errand {
    tag: u64,
    node: usize,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Transfer(Option<usize>),
    Change(Wish),
}

impl Operator {
    /// Whether the members are being changed, as far as it knows.
    pub(super) fn waits_for_change(&self) -> bool {
        self.errands.iter().any(|errand| matches!(errand.kind, Kind::Change(_)))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Parting {
    Asked {
        tag: u64,
    },
    /// As soon as this one campaigns, it is cut off, and comes back with a later term.
    Stranding {
        tag: u64,
        to: usize,
    },
    Stranded,
    Done,
}

impl<C: Cluster> World<'_, C> {
    /// Asks a node to hand leadership to another one, or to the best one.
    pub(super) fn transfer(&mut self, node: usize, to: Option<usize>) -> Option<u64> {
        let machine = &mut self.machines[node];
        if machine.closing || machine.paused_until > self.context.now() {
            return None;
        }
        let process = machine.process.as_mut()?;
        self.operator.tag += 1;
        let tag = self.operator.tag;
        if !process.transfer(tag, to) {
            return None;
        }
        machine.wake_at = 0;
        machine.called = true;
        self.context.cover(Mark::TransferAsked);
        self.context.record(node, What::Transfer, tag, to.map_or(u64::MAX, |to| to as u64));
        self.operator.errands.push(Errand { tag, node, kind: Kind::Transfer(to) });
        Some(tag)
    }

    /// Asks a node to change the members.
    pub(super) fn change(&mut self, node: usize, wish: Wish) {
        let ports = self.ports();
        let machine = &mut self.machines[node];
        if machine.closing || machine.paused_until > self.context.now() {
            return;
        }
        let Some(process) = &mut machine.process else { return };
        self.operator.tag += 1;
        let tag = self.operator.tag;
        if process.change(tag, wish, &ports) {
            machine.wake_at = 0;
            machine.called = true;
            self.context.cover(Mark::ChangeAsked);
            self.context.record(node, What::Change, tag, 0);
            self.context.note(|| format!("{wish:x?}"));
            self.operator.errands.push(Errand { tag, node, kind: Kind::Change(wish) });
        }
    }

    /// The process of a node is gone: nobody will answer.
    pub(super) fn errands_lost(&mut self, node: usize) {
        self.operator.errands.retain(|errand| errand.node != node);
    }

    /// Takes what an operator is told by a node.
    pub(super) fn take_outcomes(&mut self, node: usize) {
        if self.operator.errands.is_empty() {
            return;
        }
        let Some(process) = &mut self.machines[node].process else { return };
        let mut outcomes = std::mem::take(&mut self.operator.outcomes);
        process.outcomes(&mut outcomes);
        for (tag, outcome) in outcomes.drain(..) {
            self.told(tag, &outcome);
        }
        self.operator.outcomes = outcomes;
    }

    fn told(&mut self, tag: u64, outcome: &Outcome) {
        let Some(at) = self.operator.errands.iter().position(|errand| errand.tag == tag) else { return };
        let Errand { node, kind, .. } = self.operator.errands.swap_remove(at);
        let to = if let Kind::Transfer(to) = kind { to } else { None };
        let parts = self.operator.parting == Some(Parting::Asked { tag });
        if matches!(self.operator.parting, Some(Parting::Stranding { tag: asked, .. }) if asked == tag) {
            self.operator.parting = Some(Parting::Done);
        }
        match outcome {
            Outcome::Transferred { leader, term } => {
                let (leader, term) = (*leader, *term);
                self.context.record(node, What::Transferred, leader as u64, term);
                self.context.cover(Mark::Transferred);
                let known = self.history.borrow().leader_of(term);
                if known.is_some_and(|known| known != leader) || to.is_some_and(|to| to != leader) {
                    self.history.borrow_mut().fail(|| {
                        format!(
                            "node {node} handed over to {to:?} and says that {leader} leads term {term}: {known:?} does"
                        )
                    });
                }
                if parts {
                    self.operator.parting = Some(Parting::Done);
                }
            }
            Outcome::Changed { index } => {
                self.context.record(node, What::Changed, tag, *index);
                self.context.cover(Mark::Changed);
                if let Kind::Change(wish) = kind {
                    self.has_changed(node, *index, wish);
                }
            }
            Outcome::NotChanged { why } => {
                self.context.record(node, What::Changed, tag, 0);
                self.context.note(|| why.clone());
                self.context.cover(Mark::ChangeFailed);
            }
            Outcome::NotTransferred { why } => {
                self.context.record(node, What::Transferred, u64::MAX, tag);
                self.context.note(|| why.clone());
                self.context.cover(Mark::TransferFailed);
                if parts {
                    let why = why.clone();
                    let nodes = self.describe_nodes();
                    self.history.borrow_mut().fail(|| {
                        format!("node {node}, left alone, does not hand over to {to:?}: {why}{nodes}")
                    });
                }
            }
        }
    }

    /// A cluster that has converged is asked to hand over once; true when that is done. It has to succeed.
    pub(super) fn has_parted(&mut self) -> bool {
        match self.operator.parting {
            Some(Parting::Done) => return true,
            Some(Parting::Asked { .. } | Parting::Stranding { .. } | Parting::Stranded) => return false,
            None => {}
        }
        let leader = self.machines.iter().position(|machine| machine.view.role == LEADER);
        if leader.is_some_and(|leader| !self.have_met(self.members_of(leader).incoming)) {
            return false;
        }
        let nodes = self.machines.len();
        let mut to = self.rng.index(nodes);
        if let Some(leader) = leader {
            let voters = self.members_of(leader).incoming;
            to = (0..nodes).map(|at| (to + at) % nodes).find(|to| voters >> to & 1 == 1).unwrap_or(to);
            if voters & !(1 << leader) == 0 {
                self.operator.parting = Some(Parting::Done);
                return true;
            }
        }
        let asked = match leader {
            Some(leader) if nodes > 1 && self.rng.chance(400_000) => {
                let to = Some(to).filter(|to| *to != leader);
                self.transfer(leader, to).map(|tag| (tag, to))
            }
            _ => None,
        };
        let strands = nodes > 2 && self.rng.chance(300_000);
        self.operator.parting = Some(match asked {
            Some((tag, Some(to))) if strands => Parting::Stranding { tag, to },
            Some((tag, _)) => Parting::Asked { tag },
            None => Parting::Done,
        });
        asked.is_none()
    }

    /// Whether each of these nodes has a session with each other one. A leader knows its own sessions only: where others have
    /// not met again after the trouble, whom it chooses may not reach a quorum.
    fn have_met(&self, nodes: u32) -> bool {
        let nodes: Vec<usize> = (0..self.machines.len()).filter(|node| nodes >> node & 1 == 1).collect();
        nodes.iter().all(|node| {
            let process = self.machines[*node].process.as_ref();
            process.is_some_and(|process| {
                nodes.iter().all(|other| other == node || process.has_session_with(*other))
            })
        })
    }

    /// A node that was asked to take over from a leader of a cluster left alone campaigns, and nobody hears it any more. When
    /// they hear it again, it knows a later term than a leader that everybody else follows.
    pub(super) fn strand(&mut self, node: usize, role: u8) {
        if role != CANDIDATE
            || !matches!(self.operator.parting, Some(Parting::Stranding { to, .. }) if to == node)
        {
            return;
        }
        self.context.cover(Mark::Stranded);
        self.operator.parting = Some(Parting::Stranded);
        let nodes = self.machines.len();
        for other in (0..nodes).filter(|other| *other != node) {
            self.fabric.borrow_mut().cut(node, other);
            self.fabric.borrow_mut().cut(other, node);
        }
        let length = 15 * self.tuning.election_timeout_ms * MILLISECOND;
        self.plan(length, Plan::Rescue);
    }

    pub(super) fn rescue(&mut self) {
        self.fabric.borrow_mut().heal_all();
        self.operator.parting = Some(Parting::Done);
    }

    /// Whether an operator was answered all that a living node was asked.
    pub(super) fn all_errands_done(&self) -> bool {
        self.operator.errands.is_empty()
    }
}
