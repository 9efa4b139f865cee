//! The engine's reads, as calls of simulated clients.

use super::node_of;
use crate::sim::node::{Answer, Ask};
use bytes::Bytes;
use ringraft::Handle;
use ringraft::error::ReadError;
use ringraft::reads::{Consistency, QueryReply, Read};
use ringraft_block::LogIndex;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// Reads that are to be answered, by tag.
#[derive(Default)]
pub(super) struct Reads(Vec<(u64, Asked)>);

enum Asked {
    Query(Read<QueryReply>),
    Index(Read<LogIndex>),
}

impl Reads {
    pub(super) fn ask(&mut self, handle: &Handle, tag: u64, ask: Ask, read: &[u8]) {
        let query = |consistency| Asked::Query(handle.query(Bytes::copy_from_slice(read), consistency));
        let asked = match ask {
            Ask::Linearizable => query(Consistency::Linearizable),
            Ask::Quorum => query(Consistency::Quorum),
            Ask::Barrier => query(Consistency::Log),
            Ask::Stale { age_ms, lag } => {
                query(Consistency::Stale { age_max: Duration::from_millis(age_ms), lag_max: lag })
            }
            Ask::Round => Asked::Index(handle.force_round()),
            Ask::Committed(at) => Asked::Index(handle.wait_committed(LogIndex(at), None)),
            Ask::Applied(at) => Asked::Index(handle.wait_applied(LogIndex(at), None)),
        };
        self.0.push((tag, asked));
    }

    /// Moves the answers that have arrived to `out`.
    pub(super) fn answers(&mut self, out: &mut Vec<(u64, Answer)>) {
        self.0.retain_mut(|(tag, asked)| {
            let answer = match asked {
                Asked::Query(read) => poll(read).map(|outcome| {
                    outcome.map(|QueryReply { applied, reply }| {
                        let reply = reply.first_chunk().map_or(0, |reply| u64::from_le_bytes(*reply));
                        Answer::Read { applied: applied.get(), reply }
                    })
                }),
                Asked::Index(read) => {
                    poll(read).map(|outcome| outcome.map(|index| Answer::Reached { index: index.get() }))
                }
            };
            let Some(answer) = answer else { return true };
            out.push((*tag, answer.unwrap_or_else(|error| refused(&error))));
            false
        });
    }
}

/// A read that was not answered can always be repeated.
fn refused(error: &ReadError) -> Answer {
    let leader = match error {
        ReadError::NotLeader { leader: Some(leader) } => Some(node_of(leader.id)),
        _ => None,
    };
    Answer::Refused { leader }
}

/// What a future has come to, if it has. Nobody is woken: the world looks after each turn.
pub(super) fn poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    match Pin::new(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}
