//! What makes two states the same: everything that a node, a disk or a message may yet do, but no times, no rounds and no draws.
//! Epochs count from a node's present one: only their differences mean anything.

use super::*;
use crate::raft::role::RoleState;
use std::hash::{DefaultHasher, Hash, Hasher};

impl World {
    pub(super) fn print(&mut self) -> u64 {
        let mut into = DefaultHasher::new();
        // In order within a session, without order between them.
        let mut messages: Vec<(NodeId, NodeId, u64)> =
            self.network.iter().map(|sent| (sent.from, sent.to, sent.print)).collect();
        messages.sort_by_key(|(from, to, _)| (*from, *to));
        messages.hash(&mut into);
        for at in 0..self.nodes.len() {
            self.print_of(at).hash(&mut into);
        }
        let Self { nodes: _, network: _, ledger, proposals, changes, breaks, fragile } = self;
        (proposals, changes, breaks, fragile, &ledger.leaders, &ledger.committed).hash(&mut into);
        into.finish()
    }

    pub(super) fn print_of(&mut self, at: usize) -> u64 {
        if let Some(print) = self.nodes[at].print {
            return print;
        }
        let mut into = DefaultHasher::new();
        hash_node(&self.nodes[at], &mut into);
        let print = into.finish();
        Rc::make_mut(&mut self.nodes[at]).print = Some(print);
        print
    }
}

impl Sent {
    pub(super) fn new(from: NodeId, to: NodeId, message: Message) -> Self {
        let mut into = DefaultHasher::new();
        hash_message(&message, &mut into);
        Self { from, to, print: into.finish(), message }
    }
}

fn hash_message(message: &Message, into: &mut impl Hasher) {
    match message {
        Message::Append(append) => {
            // What the batch holds its size tells.
            let Append { term, previous, batch, commit, round: _, reply_now, configuration: _ } = append;
            (1, term, previous, batch, commit, reply_now).hash(into);
        }
        Message::AppendAck(AppendAck { term, round: _, outcome }) => match outcome {
            AppendOutcome::Matched { matched } => (2, term, matched).hash(into),
            AppendOutcome::Rejected { refused, hint } => (3, term, refused, hint).hash(into),
            AppendOutcome::StaleTerm => (4, term).hash(into),
        },
        Message::Vote(vote) => (5, vote.term, vote.last, vote.pre, vote.transfer).hash(into),
        Message::VoteReply(reply) => (6, reply.term, reply.granted, reply.pre).hash(into),
        Message::TimeoutNow(message) => (7, message.term).hash(into),
        // Nobody reads here.
        Message::ReadIndex(_) | Message::ReadIndexReply(_) => 8.hash(into),
    }
}

fn hash_node(node: &Node, into: &mut impl Hasher) {
    let Node { disk, raft, clock: _, writes, saves, deferred, print: _ } = node;
    let since = |epoch: &Epoch| raft.epoch().0 - epoch.0;
    (disk.term, disk.vote, &disk.log, since(&disk.epoch)).hash(into);
    writes.len().hash(into);
    for write in writes {
        match write {
            Write::Append(epoch, batch) => (1, since(epoch), batch).hash(into),
            Write::Truncate(after, epoch) => (2, since(epoch), after).hash(into),
        }
    }
    saves.len().hash(into);
    for (_, term, vote) in saves {
        (term, vote).hash(into);
    }
    let last_save = saves.back().map_or(0, |save| save.0);
    deferred.len().hash(into);
    for (after, sent) in deferred {
        (last_save.saturating_sub(*after), sent.to, sent.print).hash(into);
    }
    (raft.role(), raft.term(), raft.vote(), raft.leader(), raft.commit(), raft.durable()).hash(into);
    raft.hard.is_saved().hash(into);
    raft.log().batch_count().hash(into);
    for batch in raft.log().iter() {
        batch.hash(into);
    }
    (raft.hearing.matched, raft.hearing.acked).hash(into);
    let ids = || (1..=raft.configuration().next_id().get()).map(NodeId);
    match &raft.role {
        RoleState::Follower => {}
        RoleState::PreCandidate(votes) => ids().for_each(|id| votes.has(id).hash(into)),
        RoleState::Candidate { votes, own_vote, transfer } => {
            ids().for_each(|id| votes.has(id).hash(into));
            (raft.hard.saved() >= *own_vote, transfer).hash(into);
        }
        RoleState::Leader(leader) => {
            (leader.first_own, leader.transfer.is_some()).hash(into);
            leader.changing.fingerprint(into);
            for progress in &leader.peers {
                progress.fingerprint(into);
            }
        }
    }
}
