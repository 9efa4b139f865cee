//! What an operator asks of the engine's nodes.

use super::reads::poll;
use super::{id_of, node_of, peer_address};
use crate::sim::node::{Outcome, Wish};
use ringraft::Answer;
use ringraft::Handle;
use ringraft::error::TransferError;
use ringraft::handle::Transferred;
use ringraft::membership::{Changed, MemberRole, MembershipChange, MembershipError, NewMember};

/// What is to be answered, by tag.
#[derive(Default)]
pub(super) struct Errands(Vec<(u64, Errand)>);

enum Errand {
    Transfer(Answer<Result<Transferred, TransferError>>),
    Change(Answer<Result<Changed, MembershipError>>),
}

impl Errands {
    pub(super) fn transfer(&mut self, handle: &Handle, tag: u64, to: Option<usize>) {
        self.0.push((tag, Errand::Transfer(handle.transfer_leadership(to.map(id_of)))));
    }

    pub(super) fn change(&mut self, handle: &Handle, tag: u64, wish: Wish, ports: &[u16]) {
        let of = |set: u32| (0..32).filter(move |node| set >> node & 1 == 1);
        let now = |node: usize| peer_address(node, ports[node]);
        let learners = of(wish.learn).map(|node| NewMember::learner(id_of(node), now(node)));
        let voters = of(wish.vote).map(|node| NewMember::voter(id_of(node), now(node)));
        // A member that is added again, as what it is, moves.
        let configuration = handle.status().membership.configuration.clone();
        let moves = of(wish.moves).map(|node| NewMember {
            role: configuration.member(id_of(node)).map_or(MemberRole::Voter, |member| member.role),
            ..NewMember::voter(id_of(node), peer_address(node, ports[node] + 1))
        });
        let change = MembershipChange {
            add: learners.chain(voters).chain(moves).collect(),
            promote: of(wish.promote).map(id_of).collect(),
            demote: of(wish.demote).map(id_of).collect(),
            remove: of(wish.remove).map(id_of).collect(),
            ..MembershipChange::default()
        };
        self.0.push((tag, Errand::Change(handle.change_membership(change))));
    }

    /// Moves the answers that have arrived to `out`.
    pub(super) fn outcomes(&mut self, out: &mut Vec<(u64, Outcome)>) {
        self.0.retain_mut(|(tag, errand)| {
            let outcome = match errand {
                Errand::Transfer(answer) => poll(answer).map(|outcome| match outcome {
                    Ok(Transferred { leader, term }) => {
                        Outcome::Transferred { leader: node_of(leader), term: term.get() }
                    }
                    Err(error) => Outcome::NotTransferred { why: error.to_string() },
                }),
                Errand::Change(answer) => answer.try_take().map(|outcome| match outcome {
                    Ok(changed) => Outcome::Changed { index: changed.index.get() },
                    Err(error) => Outcome::NotChanged { why: error.to_string() },
                }),
            };
            let Some(outcome) = outcome else { return true };
            out.push((*tag, outcome));
            false
        });
    }
}
