//! Answers to this node: a batch that was given is verified and goes to the log, or is proved to be the one that is missing.

use super::{Asked, BUSY_RETRY_NS, Outgoing, Own, ReadFor};
use crate::driver::membership::configuration_in;
use crate::driver::peers::ANOTHER_FORMAT;
use crate::driver::{Driver, GROUP, invariant, run_of, take_block};
use crate::error::StopError;
use crate::raft::{Answer, Event, Reach, Role};
use crate::state_machine::StateMachine;
use crate::wire::{FetchMessage, FetchReplyMessage, Fetched};
use ringraft_block::{Block, LogIndex, NodeId};
use ringraft_net::link::Link;
use ringraft_wal::disk::Disk;
use ringraft_wal::format::{BatchInfo, BatchKind, BatchView, ENVELOPE_BYTES, parse_image};
use ringraft_wal::{ReadError, StoredBatch};

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    pub(in crate::driver) fn on_fetch_reply(
        &mut self,
        from: NodeId,
        reply: FetchReplyMessage,
        attachment: Option<(Block<D::Buf>, usize)>,
    ) -> Result<(), StopError> {
        // An answer that came too late, or to nothing.
        if self.repair.asked.get(&from).is_none_or(|asked| asked.token != reply.token) {
            return self.pass_over(from, None, attachment);
        }
        let Some(asked) = self.repair.asked.remove(&from) else { return Ok(()) };
        self.repair.due_at_ns = self.now.monotonic_ns;
        if reply.leads {
            self.step(Event::LeaderHolds { leader: from, term: reply.term, last: reply.reach.highest })?;
        }
        let search = asked.search.and_then(|first| Some((first, self.repair.searches.get_mut(&first)?)));
        let Some((first, search)) = search else { return self.pass_over(from, None, attachment) };
        let answer = match reply.outcome {
            Fetched::Busy => {
                // Another member may be asked at once.
                let retry_at_ns = self.now.monotonic_ns.saturating_add(BUSY_RETRY_NS);
                search.retry_at_ns.insert(from, retry_at_ns);
                return Ok(());
            }
            Fetched::Batch { end, chain } => {
                let Some((block, bytes)) = attachment else {
                    return self.refuse(from, "a fetched batch without its image");
                };
                let image = block.get(ENVELOPE_BYTES..ENVELOPE_BYTES + bytes);
                let view = match image.map(parse_image) {
                    Some(Ok(view)) => view,
                    Some(Err(error)) if error.is_foreign() => return self.refuse(from, ANOTHER_FORMAT),
                    _ => return self.refuse_attachment(from, "a fetched batch whose image is damaged"),
                };
                let info = view.info();
                let (wanted, previous) = asked.on_the_way.unwrap_or((first, search.previous));
                let named = info.first == wanted && info.last == end.index && info.term == end.term;
                let whole = info.chain == chain && info.group == GROUP && view.verify_chain(previous);
                if !named || !whole || info.image_bytes as usize > self.config.image_bytes_max() {
                    return self.refuse(from, "a fetched batch that is not the one announced");
                }
                // Terms never fall along a log; one that lies on the way lies further on.
                if self.raft().and_then(|raft| raft.term_at(first.previous())) > Some(info.term) {
                    return self.refuse(from, "a fetched batch of an earlier term than what it follows");
                }
                match self.take_fetched(from, &asked, &reply, block, info)? {
                    Some(answer) => answer,
                    None => return Ok(()),
                }
            }
            // It has the searched one, and what follows does not lead to what was kept aside.
            _ if asked.on_the_way.is_some() => Answer::Other,
            Fetched::NotSent => Answer::Other,
            Fetched::Had => Answer::Had,
            Fetched::Unclear => Answer::Unclear,
            Fetched::None => Answer::None,
        };
        self.answered(first, from, asked.round, answer, reply.reach);
        Ok(())
    }

    fn answered(&mut self, first: LogIndex, from: NodeId, round: u8, answer: Answer, reach: Reach) {
        if let Some(search) = self.repair.searches.get_mut(&first) {
            search.inquiry.answered(from, round, answer, reach);
            if search.inquiry.round() != round || search.inquiry.open().next().is_none() {
                // Another round: everybody may be asked at once.
                search.retry_at_ns.clear();
            }
        }
    }

    /// A batch was given. What it means for the search, unless it ends it or has to be looked at further.
    fn take_fetched(
        &mut self,
        from: NodeId,
        asked: &Asked,
        reply: &FetchReplyMessage,
        block: Block<D::Buf>,
        info: BatchInfo,
    ) -> Result<Option<Answer>, StopError> {
        let Some(first) = asked.search else { return Ok(None) };
        let Some(search) = self.repair.searches.get_mut(&first) else { return Ok(None) };
        if let Some((_, chain)) = search.want {
            let taken = chain == info.chain && self.offer_repair(info, block);
            return Ok(if taken { None } else { Some(Answer::None) });
        }
        if reply.proves && asked.on_the_way.is_none() {
            self.adopt(info, block)?;
            return Ok(None);
        }
        let next = self.wal.salvage().filter(|kept| kept.first > first).min_by_key(|kept| kept.first);
        let reached = (info.last, info.chain);
        match next {
            Some(next) if next.first == info.last.next() && asked.on_the_way.is_some() => {
                let token = self.repair.token();
                let (round, reach) = (asked.round, reply.reach);
                let read = ReadFor::Beyond { search: first, from, round, reach, reached };
                self.repair.reads.insert(token, read);
                self.wal.read_salvage(&mut self.disk, token, next.first, info.chain);
                Ok(None)
            }
            Some(next) if next.first == info.last.next() => {
                search.candidate = Some((block, info));
                let token = self.repair.token();
                let (search, round, reach) = (info.first, asked.round, reply.reach);
                self.repair.reads.insert(token, ReadFor::Between { search, from, round, reach, reached });
                self.wal.read_salvage(&mut self.disk, token, next.first, info.chain);
                Ok(None)
            }
            // What cannot precede the next batch that was kept is certainly another one. Of the searched one that says nothing
            // when it is only on the way.
            Some(next) if info.last >= next.first || info.term > next.term => {
                Ok(Some(if asked.on_the_way.is_some() { Answer::Other } else { Answer::None }))
            }
            // Several are missing in a row: the way to the next one that was kept is followed, and forgotten but for its end.
            Some(_) => {
                let until_ns = self.now.monotonic_ns.saturating_add(self.repair.patience_ns);
                let (token, position) = (self.repair.token(), (info.last.next(), info.chain));
                let asked = Asked { token, until_ns, on_the_way: Some(position), ..*asked };
                self.repair.asked.insert(from, asked);
                let message = FetchMessage {
                    token,
                    first: position.0,
                    previous_chain: position.1,
                    proof: None,
                    image: true,
                    only_proved: false,
                };
                self.repair.outgoing.push_back((from, Outgoing::Fetch(message)));
                Ok(None)
            }
            None => Ok(Some(Answer::Other)),
        }
    }

    /// A batch that is proved to have been behind the end of this log is there again.
    fn adopt(&mut self, info: BatchInfo, block: Block<D::Buf>) -> Result<(), StopError> {
        self.repair.searches.remove(&info.first);
        self.repair.due_at_ns = self.now.monotonic_ns;
        let Some(raft) = self.raft() else { return Ok(()) };
        let last = raft.last();
        let restrained = raft.restraint().claim.is_some() && raft.leader().is_none();
        let idle = raft.role() == Role::Follower && !self.closing;
        // A leader may have been quicker.
        let follows = last.index.next() == info.first && (last.term..=raft.term()).contains(&info.term);
        if !restrained || !idle || !follows {
            return Ok(());
        }
        if !self.has_room_for(&info) {
            // Read, or asked for, again when the log has taken what waits.
            self.repair.due_at_ns = self.now.monotonic_ns.saturating_add(BUSY_RETRY_NS);
            return Ok(());
        }
        let batch = run_of(&info);
        let image = block.get(ENVELOPE_BYTES..ENVELOPE_BYTES + info.image_bytes as usize);
        let view = image.and_then(|image| BatchView::trusted(image).ok());
        let view = view.filter(|view| view.info().kind == BatchKind::Membership);
        let configuration = view.and_then(configuration_in).map(Box::new);
        invariant(configuration.is_some() || info.kind != BatchKind::Membership, || {
            format!("the configuration in {info:?} cannot be decoded: upgrade this node")
        })?;
        self.incoming = Some((block, info));
        let outcome = self.step(Event::Adopt { batch, configuration });
        self.incoming = None;
        outcome
    }

    pub(in crate::driver) fn read_for_repair(
        &mut self,
        token: u64,
        result: Result<Vec<StoredBatch<D::Buf>>, ReadError>,
    ) -> Result<(), StopError> {
        self.repair.due_at_ns = self.now.monotonic_ns;
        match self.repair.reads.remove(&token) {
            Some(ReadFor::Member { to, message }) => {
                self.repair.serving.remove(&to);
                self.answer_read(to, &message, result);
                Ok(())
            }
            Some(ReadFor::Own { search: first, previous }) => {
                let Some(search) = self.repair.searches.get_mut(&first) else { return Ok(()) };
                if search.previous != previous {
                    return Ok(());
                }
                search.own = Own::Other;
                match result.ok().and_then(|batches| batches.into_iter().next()) {
                    Some(batch) => self.adopt_stored(batch),
                    None => Ok(()),
                }
            }
            Some(ReadFor::Between { search: first, from, round, reach, reached }) => {
                let Some(search) = self.repair.searches.get_mut(&first) else { return Ok(()) };
                // The search may be another one by now, with a candidate of its own.
                let candidate = |(_, info): &mut (_, BatchInfo)| (info.last, info.chain) == reached;
                let Some((block, info)) = search.candidate.take_if(candidate) else { return Ok(()) };
                match result {
                    Ok(_) => self.adopt(info, block),
                    Err(ReadError::NotFound { .. }) => {
                        self.answered(first, from, round, Answer::None, reach);
                        Ok(())
                    }
                    // The proof can no longer be read.
                    Err(_) => {
                        self.answered(first, from, round, Answer::Other, reach);
                        Ok(())
                    }
                }
            }
            Some(ReadFor::Beyond { search: first, from, round, reach, reached }) => {
                if result.is_ok() {
                    self.repair.proved = Some(reached);
                    // Now any member that has it is believed.
                    if let Some(search) = self.repair.searches.get_mut(&first) {
                        search.retry_at_ns.clear();
                    }
                } else {
                    self.answered(first, from, round, Answer::Other, reach);
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn adopt_stored(&mut self, batch: StoredBatch<D::Buf>) -> Result<(), StopError> {
        let info = batch.info;
        let block = self.own_block(batch)?;
        self.adopt(info, block)
    }

    /// The batch in a block of its own: nobody else may write to one that is shared.
    pub(super) fn own_block(&mut self, batch: StoredBatch<D::Buf>) -> Result<Block<D::Buf>, StopError> {
        let StoredBatch { info, block } = batch;
        match block.try_into_block() {
            Ok(block) => Ok(block),
            Err(shared) => {
                let bytes = info.slot_bytes();
                let mut own = take_block(&self.pool, &mut self.disk, bytes).map_err(StopError::Memory)?;
                own[..bytes].copy_from_slice(&shared[..bytes]);
                Ok(own)
            }
        }
    }
}
