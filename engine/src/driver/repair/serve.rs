//! Answers of this node, to members that lack something: one read for each of them at a time, and one answer.

use super::{Outgoing, ReadFor};
use crate::driver::Driver;
use crate::error::StopError;
use crate::raft::{Claim, LogId, Role};
use crate::state_machine::StateMachine;
use crate::wire::{FetchMessage, FetchReplyMessage, Fetched};
use ringraft_block::NodeId;
use ringraft_net::link::Link;
use ringraft_wal::disk::Disk;
use ringraft_wal::format::BatchInfo;
use ringraft_wal::{ReadError, StoredBatch};

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    pub(in crate::driver) fn on_fetch(
        &mut self,
        from: NodeId,
        message: FetchMessage,
    ) -> Result<(), StopError> {
        if self.repair.serving.contains(&from) {
            // One at a time; whoever asks again has given the first up.
            self.reply(from, &message, Fetched::Busy, None);
            return Ok(());
        }
        let first = message.first;
        let Some(raft) = self.raft() else { return Ok(()) };
        let in_log = self.chain_at(first.previous()) == Some(message.previous_chain);
        let run = raft.batch_starting_at(first).filter(|_| in_log);
        let behind_the_end = in_log && raft.last().index == first.previous();
        if first <= raft.log_start().index {
            // Committed, and not held any more: never "none".
            self.reply(from, &message, Fetched::Busy, None);
            return Ok(());
        }
        let Some(run) = run else {
            if raft.restraint().claim.is_some() && self.wal.salvage().any(|info| info.first == first) {
                self.read_for(from, message, |wal, disk, token| {
                    wal.read_salvage(disk, token, first, message.previous_chain);
                });
                return Ok(());
            }
            let claim = raft.restraint().claim;
            // A log that was cut before the position, with more behind the cut: what was here cannot be told before this
            // node has got back what lies between. There may be one, and how far all logs reach can be said all the same.
            let reaches = |claim: Claim| !claim.certain || claim.last >= first;
            let cannot_tell = raft.last().index < first.previous() && claim.is_some_and(reaches);
            let outcome = match claim {
                _ if cannot_tell => Fetched::Unclear,
                Some(claim) if behind_the_end && reaches(claim) => Fetched::Had,
                _ => Fetched::None,
            };
            self.reply(from, &message, outcome, None);
            return Ok(());
        };
        if message.only_proved && !self.proves(&message) {
            self.reply(from, &message, Fetched::None, None);
        } else if let Some(batch) = self.recent.starting_at(first).cloned() {
            // Whatever its copy on the disk is like: that is mended from this one.
            match message.image {
                true => self.reply(from, &message, batch_of(&batch.info), Some(batch)),
                false => self.reply(from, &message, Fetched::NotSent, None),
            }
        } else if self.wal.is_damaged(first) {
            self.reply(from, &message, Fetched::Had, None);
        } else if !message.image {
            self.reply(from, &message, Fetched::NotSent, None);
        } else if run.last > self.wal.durable_through() {
            self.reply(from, &message, Fetched::Busy, None);
        } else {
            self.read_for(from, message, |wal, disk, token| wal.read(disk, token, first, 1));
        }
        Ok(())
    }

    fn read_for(
        &mut self,
        to: NodeId,
        message: FetchMessage,
        read: impl FnOnce(&mut ringraft_wal::Wal<D>, &mut D, u64),
    ) {
        let token = self.repair.token();
        self.repair.serving.insert(to);
        self.repair.reads.insert(token, ReadFor::Member { to, message });
        read(&mut self.wal, &mut self.disk, token);
    }

    pub(super) fn answer_read(
        &mut self,
        to: NodeId,
        message: &FetchMessage,
        result: Result<Vec<StoredBatch<D::Buf>>, ReadError>,
    ) {
        match result.map(|batches| batches.into_iter().find(|batch| batch.info.first == message.first)) {
            Ok(Some(batch)) if message.image => self.reply(to, message, batch_of(&batch.info), Some(batch)),
            Ok(Some(_)) => self.reply(to, message, Fetched::NotSent, None),
            Err(ReadError::Damaged { .. }) => self.reply(to, message, Fetched::Had, None),
            // Of what was kept aside: it does not continue the log that was named.
            Err(ReadError::NotFound { .. }) => self.reply(to, message, Fetched::None, None),
            Ok(None) | Err(_) => self.reply(to, message, Fetched::Busy, None),
        }
    }

    /// Whether this node's log, or what it kept aside, has the batch that is named as proof.
    fn proves(&self, message: &FetchMessage) -> bool {
        message.proof.is_some_and(|(last, chain)| {
            let kept = || self.wal.salvage().any(|info| info.last == last && info.chain == chain);
            self.chain_at(last) == Some(chain) || kept()
        })
    }

    fn reply(
        &mut self,
        to: NodeId,
        message: &FetchMessage,
        outcome: Fetched,
        batch: Option<StoredBatch<D::Buf>>,
    ) {
        let Some(raft) = self.raft() else { return };
        let leads = raft.role() == Role::Leader;
        let mut reach = self.reach(raft);
        // Whoever lacks a change of the voters may ask the wrong ones: how far those reach proves nothing then.
        reach.in_doubt |= raft.has_other_voters_from(message.first);
        let reply = FetchReplyMessage {
            token: message.token,
            outcome,
            proves: self.proves(message),
            term: raft.term(),
            leads,
            reach,
        };
        // Whoever asks again has given the first question up.
        self.repair.outgoing.retain(|(peer, waiting)| *peer != to || matches!(waiting, Outgoing::Fetch(_)));
        self.repair.outgoing.push_back((to, Outgoing::Reply(reply, batch)));
    }
}

fn batch_of(info: &BatchInfo) -> Fetched {
    Fetched::Batch { end: LogId { term: info.term, index: info.last }, chain: info.chain }
}
