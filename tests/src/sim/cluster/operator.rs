//! What an operator asks of the engine's nodes.

use super::reads::poll;
use super::{id_of, node_of};
use crate::sim::node::Outcome;
use ringraft::Answer;
use ringraft::Handle;
use ringraft::error::TransferError;
use ringraft::handle::Transferred;

/// What is to be answered, by tag.
#[derive(Default)]
pub(super) struct Errands(Vec<(u64, Errand)>);

enum Errand {
    Transfer(Answer<Result<Transferred, TransferError>>),
}

impl Errands {
    pub(super) fn transfer(&mut self, handle: &Handle, tag: u64, to: Option<usize>) {
        self.0.push((tag, Errand::Transfer(handle.transfer_leadership(to.map(id_of)))));
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
            };
            let Some(outcome) = outcome else { return true };
            out.push((*tag, outcome));
            false
        });
    }
}
