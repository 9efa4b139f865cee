//! Leadership handed over because somebody asks for it.

use super::*;
use crate::sim::node::Outcome;

/// What an operator has asked for and not been answered yet.
#[derive(Default)]
pub(super) struct Operator {
    tag: u64,
    errands: Vec<Errand>,
    outcomes: Vec<(u64, Outcome)>,
    /// How a cluster that had converged was asked to hand over, and what came of it.
    parting: Option<Parting>,
}

#[derive(Clone, Copy)]
struct Errand {
    tag: u64,
    node: usize,
    to: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Parting {
    Asked { tag: u64 },
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
        self.operator.errands.push(Errand { tag, node, to });
        Some(tag)
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
        let Errand { node, to, .. } = self.operator.errands.swap_remove(at);
        let parts = self.operator.parting == Some(Parting::Asked { tag });
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
            Outcome::NotTransferred { why } => {
                self.context.record(node, What::Transferred, u64::MAX, tag);
                self.context.note(|| why.clone());
                self.context.cover(Mark::TransferFailed);
                if parts {
                    let why = why.clone();
                    self.history
                        .borrow_mut()
                        .fail(|| format!("node {node}, left alone, does not hand over to {to:?}: {why}"));
                }
            }
        }
    }

    /// A cluster that has converged is asked to hand over once; true when that is done. It has to succeed.
    pub(super) fn has_parted(&mut self) -> bool {
        match self.operator.parting {
            Some(Parting::Done) => return true,
            Some(Parting::Asked { .. }) => return false,
            None => {}
        }
        let leader = self.machines.iter().position(|machine| machine.view.role == LEADER);
        let nodes = self.machines.len();
        let to = self.rng.index(nodes);
        let asked = match leader {
            Some(leader) if nodes > 1 && self.rng.chance(300_000) => {
                self.transfer(leader, Some(to).filter(|to| *to != leader))
            }
            _ => None,
        };
        self.operator.parting = Some(asked.map_or(Parting::Done, |tag| Parting::Asked { tag }));
        asked.is_none()
    }

    /// Whether an operator was answered all that a living node was asked.
    pub(super) fn all_errands_done(&self) -> bool {
        self.operator.errands.is_empty()
    }
}
