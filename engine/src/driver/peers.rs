//! The driver and the peers: frames that arrive, messages that leave.

use super::membership::configuration_in;
use super::{ACTIVITY_INTERVAL_NS, Blocks, Driver, GROUP, Life, READ_BYTES, invariant, run_of};
use crate::error::StopError;
use crate::formation::FormationError;
use crate::outbox::{Head, Outgoing};
use crate::raft::{AppendOutcome, Event, Message, Raft, Role};
use crate::state_machine::StateMachine;
use crate::wire::{self, AckMessage, AppendMessage, Body, Encoder, FormationMessage};
use ringraft_block::{Block, LogIndex, NodeId, crc32c};
use ringraft_net::link::{Link, LinkDone, LinkError, LinkOutput};
use ringraft_net::{Frame, NetEvent, RejectReason, Rejection};
use ringraft_wal::disk::Disk;
use ringraft_wal::format::{BatchKind, Chain, ENVELOPE_BYTES, parse_image};
use std::io::ErrorKind;

/// How long an address may be in use at a start.
const VACATED_WITHIN_NS: u64 = 2_000_000_000;
/// Why a peer's batch is refused that is intact.
pub(super) const ANOTHER_FORMAT: &str = "a batch of a format that this node does not know: upgrade it";

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    pub(super) fn on_network(&mut self) -> Result<bool, StopError> {
        let Some(network) = &mut self.network else { return Ok(false) };
        let now = self.now.monotonic_ns;
        let mut done = std::mem::take(&mut self.link_done);
        let mut events = std::mem::take(&mut self.net_events);
        let mut blocks = Blocks { disk: &mut self.disk, pool: &self.pool };
        self.link.poll(&mut done);
        for completion in done.drain(..) {
            network.handle(now, &mut self.link, completion, &mut blocks, &mut events);
        }
        network.advance(now, &mut self.link, &mut blocks, &mut events);
        let news = !events.is_empty();
        let mut outcome = Ok(());
        while let Some(event) = events.pop_front() {
            outcome = outcome.and_then(|()| self.on_net_event(event));
        }
        (self.link_done, self.net_events) = (done, events);
        outcome.map(|()| news)
    }

    fn on_net_event(&mut self, event: NetEvent<D::Buf>) -> Result<(), StopError> {
        match event {
            NetEvent::Listening { address } => {
                self.address_in_use_since_ns = None;
                self.shared.status.publish(|status| status.listening = Some(address));
                Ok(())
            }
            NetEvent::ListenFailed { error } if self.may_be_vacated(&error) => Ok(()),
            NetEvent::ListenFailed { error } => {
                Err(StopError::Listen { address: self.config.listen_address()?, error })
            }
            NetEvent::PeerConnected { peer, incarnation, session, .. } => {
                let Some(state) = self.peers.get_mut(&peer) else { return Ok(()) };
                (state.session, state.number) = (Some(incarnation), Some(session));
                state.outbox.clear();
                self.repair.session_changed(peer);
                self.referrals.begin_anew(self.now.monotonic_ns);
                let leads = self.raft().and_then(Raft::leader) == Some(peer);
                self.snapshots.installs.session_changed(peer, leads);
                tracing::info!(node = %self.config.node, %peer, "session begins");
                let at = self.network.as_ref().and_then(|network| network.dialed_at(peer));
                self.met_at(peer, at);
                self.announce(peer);
                self.step(Event::PeerConnected { peer })
            }
            NetEvent::PeerDisconnected { peer, cause, session } => {
                let Some(state) = self.peers.get_mut(&peer) else { return Ok(()) };
                // Of a peer that was forgotten and is back: its new session goes on.
                if state.number.is_some_and(|current| current != session) {
                    return Ok(());
                }
                (state.session, state.number, state.stages, state.no_space) = (None, None, None, false);
                state.moved_to = None;
                state.outbox.clear();
                self.repair.session_changed(peer);
                let leads = self.raft().and_then(Raft::leader) == Some(peer);
                self.snapshots.installs.session_changed(peer, leads);
                tracing::info!(node = %self.config.node, %peer, %cause, "session ended");
                if let Life::Forming(formation) = &mut self.life {
                    formation.lost(peer);
                }
                self.step(Event::PeerDisconnected { peer })
            }
            NetEvent::Referred { by, to } => self.referred(by, to),
            NetEvent::Asked { by, address } => {
                self.introduced(by, address);
                Ok(())
            }
            NetEvent::Rejected { remote, reason } => {
                tracing::warn!(node = %self.config.node, ?remote, %reason, "connection rejected");
                let Rejection::RefusedByPeer { reason: RejectReason::WrongIncarnation { known }, .. } =
                    reason
                else {
                    return Ok(());
                };
                // One that joins waits until the cluster has removed the other.
                if matches!(self.life, Life::Forming(_)) && !self.config.join {
                    let (node, own) = (self.config.node, self.incarnation);
                    return Err(FormationError::Replaced { node, known, own }.into());
                }
                Ok(())
            }
            NetEvent::Frame { peer, frame, .. } => self.on_frame(peer, frame),
        }
    }

    fn on_frame(&mut self, peer: NodeId, frame: Frame<D::Buf>) -> Result<(), StopError> {
        let Ok(body) = wire::decode(frame.kind, frame.body()) else {
            return self.refuse(peer, "malformed body");
        };
        let attachment = frame.attachment;
        match body {
            Body::Formation(message) => self.on_formation(peer, &message),
            other if !matches!(self.life, Life::Running(_)) => {
                let piece_crc = if let Body::Piece(piece) = other { Some(piece.crc) } else { None };
                self.pass_over(peer, piece_crc, attachment.map(|a| (a.block, a.bytes)))
            }
            // Of somebody whom the configuration knows as another.
            Body::AppendAck(_) | Body::FetchReply(_) | Body::VoteReply(_) | Body::Request(_)
                if self.is_foreign(peer) =>
            {
                self.pass_over(peer, None, attachment.map(|a| (a.block, a.bytes)))
            }
            Body::Append(message) => self.on_append(peer, message, attachment.map(|a| (a.block, a.bytes))),
            Body::AppendAck(message) => self.on_ack(peer, message),
            Body::Fetch(message) => self.on_fetch(peer, message),
            Body::FetchReply(message) => {
                self.on_fetch_reply(peer, message, attachment.map(|a| (a.block, a.bytes)))
            }
            Body::Vote(vote) => self.step(Event::Received { from: peer, message: Message::Vote(vote) }),
            Body::VoteReply(reply) => {
                self.step(Event::Received { from: peer, message: Message::VoteReply(reply) })
            }
            Body::TimeoutNow(message) => {
                self.step(Event::Received { from: peer, message: Message::TimeoutNow(message) })
            }
            Body::ReadIndex(request) => {
                self.read_worked = true;
                self.step(Event::Received { from: peer, message: Message::ReadIndex(request) })
            }
            Body::ReadIndexReply(reply) => {
                self.read_worked = true;
                self.step(Event::Received { from: peer, message: Message::ReadIndexReply(reply) })
            }
            Body::Offer(offer) => self.on_snapshot_offer(peer, offer),
            Body::Request(request) => self.on_snapshot_request(peer, request),
            Body::Piece(piece) => self.on_snapshot_piece(peer, piece, attachment.map(|a| (a.block, a.bytes))),
        }
    }

    /// Looks when the peers were last heard and sent to, now and then: the network knows, and only a leader's status tells.
    pub(super) fn note_activity(&mut self) {
        let (now_ns, leads) = (self.now.monotonic_ns, self.raft().map(Raft::role) == Some(Role::Leader));
        let Some(network) = self.network.as_ref().filter(|_| leads && now_ns >= self.activity_at_ns) else {
            return;
        };
        self.activity_at_ns = now_ns.saturating_add(ACTIVITY_INTERVAL_NS);
        for (id, peer) in &mut self.peers {
            peer.active_ns =
                network.peer_status(*id).map_or((None, None), |status| (status.heard_ns, status.sent_ns));
        }
    }

    pub(super) fn refuse(&mut self, peer: NodeId, why: &'static str) -> Result<(), StopError> {
        tracing::error!(node = %self.config.node, %peer, why, "peer disconnected");
        if let Some(network) = &mut self.network {
            network.disconnect(peer, &mut self.link);
        }
        Ok(())
    }

    /// Whether the address to listen at is in use for a short time only: the kernel may close the sockets of a process that was
    /// killed some time after it has gone, when it had operations on a ring.
    fn may_be_vacated(&mut self, error: &LinkError) -> bool {
        let in_use = |number| std::io::Error::from_raw_os_error(number).kind() == ErrorKind::AddrInUse;
        if !error.os_error.is_some_and(in_use) {
            return false;
        }
        let now_ns = self.now.monotonic_ns;
        let since_ns = *self.address_in_use_since_ns.get_or_insert_with(|| {
            tracing::warn!(node = %self.config.node, %error, "the address may be vacated in a moment");
            now_ns
        });
        now_ns.saturating_sub(since_ns) < VACATED_WITHIN_NS
    }

    /// What was attached to a peer's frame was damaged on its way.
    pub(super) fn refuse_attachment(&mut self, peer: NodeId, why: &'static str) -> Result<(), StopError> {
        tracing::error!(node = %self.config.node, %peer, why, "peer disconnected");
        if let Some(network) = &mut self.network {
            network.refuse_attachment(peer, &mut self.link);
        }
        Ok(())
    }

    /// Does nothing with what came too early or too late, but to look whether what is attached came whole, a batch's image or a piece of
    /// a snapshot with its checksum: over a connection that garbles nothing more is to come, whatever it brought.
    pub(super) fn pass_over(
        &mut self,
        peer: NodeId,
        piece_crc: Option<u32>,
        attachment: Option<(Block<D::Buf>, usize)>,
    ) -> Result<(), StopError> {
        let Some((block, bytes)) = attachment else { return Ok(()) };
        let Some(data) = block.get(ENVELOPE_BYTES..ENVELOPE_BYTES + bytes) else { return Ok(()) };
        let is_whole = match piece_crc {
            Some(crc) => crc32c(data) == crc,
            None => parse_image(data).map_or_else(|error| error.is_foreign(), |_| true),
        };
        if is_whole {
            Ok(())
        } else {
            self.refuse_attachment(peer, "damaged, in a frame that is not for now")
        }
    }

    fn on_formation(&mut self, peer: NodeId, message: &FormationMessage) -> Result<(), StopError> {
        let Some(session) = self.peers.get(&peer).and_then(|peer| peer.session) else { return Ok(()) };
        let Life::Forming(formation) = &mut self.life else { return Ok(()) };
        let step = formation.heard(peer, session, message)?;
        self.form(step)
    }

    pub(super) fn on_append(
        &mut self,
        from: NodeId,
        message: AppendMessage,
        attachment: Option<(Block<D::Buf>, usize)>,
    ) -> Result<(), StopError> {
        let AppendMessage { mut append, previous_chain, chain } = message;
        // The body promises a batch exactly when one is attached.
        let incoming = match (append.batch, attachment) {
            (None, None) => None,
            (Some(run), Some((block, bytes))) => {
                let image = block.get(ENVELOPE_BYTES..ENVELOPE_BYTES + bytes);
                let view = match image.map(parse_image) {
                    Some(Ok(view)) => view,
                    Some(Err(error)) if error.is_foreign() => return self.refuse(from, ANOTHER_FORMAT),
                    _ => return self.refuse_attachment(from, "damaged batch image"),
                };
                let info = view.info();
                if info.image_bytes as usize > self.config.image_bytes_max() {
                    return self
                        .refuse(from, "a batch too large for this node's segments: make limits equal");
                }
                let named = run_of(&info) == run && info.chain == chain && info.group == GROUP;
                if !named || !view.verify_chain(previous_chain) {
                    return self.refuse(from, "a batch image that is not the one announced");
                }
                if info.kind == BatchKind::Membership {
                    let Some(configuration) = configuration_in(view) else {
                        return self.refuse(from, "a configuration that this node cannot decode: upgrade it");
                    };
                    append.configuration = Some(Box::new(configuration));
                }
                Some((block, info))
            }
            _ => return self.refuse(from, "an append without its batch image"),
        };
        let incoming = incoming.filter(|(_, info)| self.has_room_for(info));
        if incoming.is_none() {
            // As if it had been lost: the leader sends it again when this node has not got it.
            (append.batch, append.configuration) = (None, None);
        }
        let previous = append.previous;
        let known = self.raft().is_some_and(|raft| raft.term_at(previous.index) == Some(previous.term));
        if known && append.term >= self.raft().map_or(append.term, Raft::term) {
            let own = self.chain_at(previous.index);
            invariant(own == Some(previous_chain), || {
                format!(
                    "node {from}'s log and this one differ at {previous:?}: {previous_chain:?}, here {own:?}"
                )
            })?;
        }
        self.incoming = incoming;
        let outcome = self.step(Event::Received { from, message: Message::Append(append) });
        if let Some((block, info)) = self.incoming.take() {
            // It was here already. A resend of what cannot be read is a repair.
            self.offer_repair(info, block);
        }
        outcome
    }

    fn on_ack(&mut self, from: NodeId, message: AckMessage) -> Result<(), StopError> {
        let AckMessage { ack, chain, stages, no_space } = message;
        if let Some(peer) = self.peers.get_mut(&from) {
            peer.no_space = no_space;
        }
        if let AppendOutcome::Matched { matched } = ack.outcome {
            let leads =
                self.raft().is_some_and(|raft| raft.role() == Role::Leader && raft.term() == ack.term);
            // A match before the log's start is not counted, and nobody can tell its chain: whoever cannot read what
            // it has there acknowledges no more until a snapshot covers it.
            let is_held = self.raft().is_some_and(|raft| matched.index >= raft.log_start().index);
            if leads && is_held && self.chain_at(matched.index) != Some(chain) {
                return self.refuse(from, "an ack that names another chain than this leader's log");
            }
            if let Some(peer) = self.peers.get_mut(&from).filter(|_| leads && stages.durable_us > 0) {
                peer.stages = Some(stages);
            }
        }
        self.step(Event::Received { from, message: Message::AppendAck(ack) })
    }

    /// Adds what only the driver knows to a message of the core and queues it for the peer.
    pub(super) fn send(&mut self, to: NodeId, message: Message) -> Result<(), StopError> {
        let outgoing = self.complete(message)?;
        self.queue(to, outgoing);
        Ok(())
    }

    /// Adds what only the driver knows to a message of the core: now, since what it speaks of may have left the log later.
    pub(super) fn complete(&self, message: Message) -> Result<Outgoing, StopError> {
        let chain_at = |index: LogIndex| {
            let chain = self.chain_at(index);
            chain.ok_or_else(|| StopError::Invariant(format!("index {index} is no batch end of this log")))
        };
        Ok(match message {
            Message::Append(append) => {
                let previous_chain = chain_at(append.previous.index)?;
                let chain = append.batch.map_or(Ok(previous_chain), |batch| chain_at(batch.last))?;
                Outgoing::Append(AppendMessage { append, previous_chain, chain })
            }
            Message::AppendAck(ack) => {
                let chain = match ack.outcome {
                    AppendOutcome::Matched { matched } => chain_at(matched.index)?,
                    _ => Chain::default(),
                };
                Outgoing::Ack(AckMessage {
                    ack,
                    chain,
                    stages: self.stages.newest(),
                    no_space: self.no_space,
                })
            }
            Message::Vote(vote) => Outgoing::Vote(vote),
            Message::VoteReply(reply) => Outgoing::VoteReply(reply),
            Message::TimeoutNow(message) => Outgoing::TimeoutNow(message),
            Message::ReadIndex(request) => Outgoing::ReadIndex(request),
            Message::ReadIndexReply(reply) => Outgoing::ReadIndexReply(reply),
        })
    }

    /// Queues a message for the peer, if there is a session with it.
    pub(super) fn queue(&mut self, to: NodeId, outgoing: Outgoing) {
        if let Some(peer) = self.peers.get_mut(&to).filter(|peer| peer.session.is_some()) {
            peer.outbox.push(outgoing);
        }
    }

    /// Moves what the outboxes can send to the network, and that to the sockets.
    pub(super) fn send_queued(&mut self) {
        let Some(network) = &mut self.network else { return };
        let refused_before = network.stats().sends_refused;
        let durable = self.wal.durable_through();
        for (id, peer) in &mut self.peers {
            loop {
                let (kind, body, attachment) = match peer.outbox.head(&self.recent, durable) {
                    Head::Empty | Head::Waiting => break,
                    // Purged since: the peer's next answer tells what it needs.
                    Head::Fetch(first) if first <= self.wal.log_start().index => {
                        peer.outbox.fetched(Vec::new());
                        peer.outbox.pop();
                        continue;
                    }
                    // What cannot be read is waited for.
                    Head::Fetch(first) if self.wal.is_damaged(first) => {
                        peer.outbox.fetched(Vec::new());
                        break;
                    }
                    Head::Fetch(first) => {
                        self.wal.read(&mut self.disk, id.get(), first, READ_BYTES);
                        break;
                    }
                    Head::Batch(message, batch) => {
                        let image = ENVELOPE_BYTES..ENVELOPE_BYTES + batch.info.image_bytes as usize;
                        let attachment = Some((batch.block.clone(), image));
                        (wire::kind::APPEND, self.encoder.append(message), attachment)
                    }
                    Head::Light(message) => {
                        let (kind, body) = encoded(&mut self.encoder, message);
                        (kind, body, None)
                    }
                };
                match network.send(*id, kind, GROUP, body, attachment) {
                    Ok(()) => peer.outbox.pop(),
                    Err(ringraft_net::SendError::Full) => break,
                    Err(ringraft_net::SendError::NotConnected) => {
                        peer.outbox.clear();
                        break;
                    }
                }
            }
        }
        self.repair.send(network, &mut self.encoder);
        self.snapshots.installs.send(network, &mut self.encoder);
        network.flush(&mut self.link);
        let refused = network.stats().sends_refused > refused_before;
        self.take_sent(refused);
    }

    /// Takes what the sockets took while it was submitted to them, as they mostly do, so that it does not cost a turn. Other
    /// completions are for the next one, which reads the clock after them. `refused` says that there was more to send than the
    /// network has room for.
    fn take_sent(&mut self, refused: bool) {
        let Some(network) = &mut self.network else { return };
        self.link.poll(&mut self.link_done);
        let is_sent = |done: &&LinkDone<D::Buf>| matches!(done.result, Ok(LinkOutput::Sent { .. }));
        let sent = self.link_done.iter().take_while(is_sent).count();
        let mut blocks = Blocks { disk: &mut self.disk, pool: &self.pool };
        for completion in self.link_done.drain(..sent) {
            let now = self.now.monotonic_ns;
            network.handle(now, &mut self.link, completion, &mut blocks, &mut self.net_events);
        }
        self.sends_on = sent > 0 && (refused || network.has_unsent());
    }

    /// Whether the network has something that only another turn takes, or has room again for what it had to refuse.
    pub(super) fn network_has_more(&self) -> bool {
        self.sends_on || !self.link_done.is_empty() || !self.net_events.is_empty()
    }
}

/// The kind and the body of a message.
fn encoded<'a>(encoder: &'a mut Encoder, message: &Outgoing) -> (u16, &'a [u8]) {
    match message {
        Outgoing::Append(message) => (wire::kind::APPEND, encoder.append(message)),
        Outgoing::Ack(message) => (wire::kind::APPEND_ACK, encoder.ack(message)),
        Outgoing::Vote(vote) => (wire::kind::VOTE, encoder.vote(vote)),
        Outgoing::VoteReply(reply) => (wire::kind::VOTE_REPLY, encoder.vote_reply(reply)),
        Outgoing::TimeoutNow(message) => (wire::kind::TIMEOUT_NOW, encoder.timeout_now(message)),
        Outgoing::ReadIndex(request) => (wire::kind::READ_INDEX, encoder.read_index(request)),
        Outgoing::ReadIndexReply(reply) => (wire::kind::READ_INDEX_REPLY, encoder.read_index_reply(reply)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::repair::testing::{Bench, Errors, TERM};
    use super::*;
    use crate::raft::{Append, LogId, Round};
    use crate::wire::PieceMessage;
    use ringraft_net::{AlignedBytes, Attachment};

    /// What is attached to what came too early was thrown away unseen: nobody ever learnt that the connection garbles.
    #[test]
    fn what_comes_to_a_node_that_does_not_run_yet_is_looked_at_as_any_other() {
        for (is_piece, is_garbled) in [(false, false), (false, true), (true, false), (true, true)] {
            let mut bench = Bench::unformed();
            let (mut block, info) = bench.batch(TERM.get(), 1, Chain::default(), 700);
            let bytes = info.image_bytes as usize;
            let image = ENVELOPE_BYTES..ENVELOPE_BYTES + bytes;
            let crc = crc32c(&block[image.clone()]);
            if is_garbled {
                let at = image.start + bytes / 2;
                block[at] ^= 1;
            }
            let encoder = &mut bench.driver.encoder;
            let (kind, body) = if is_piece {
                let last = LogId { term: TERM, index: LogIndex(9) };
                (
                    wire::kind::SNAPSHOT_PIECE,
                    encoder.piece(&PieceMessage { last, digest: [7; 16], offset: 0, crc }),
                )
            } else {
                let append = Append {
                    term: TERM,
                    previous: LogId::default(),
                    batch: Some(run_of(&info)),
                    commit: LogIndex(0),
                    round: Round(1),
                    reply_now: false,
                    configuration: None,
                };
                let chain = info.chain;
                (
                    wire::kind::APPEND,
                    encoder.append(&AppendMessage { append, previous_chain: Chain::default(), chain }),
                )
            };
            let body = AlignedBytes::copy_of(body);
            let attachment = Some(Attachment { block, bytes });
            let frame = Frame { kind, group: GROUP, body, attachment };
            let errors = Errors::default();
            tracing::subscriber::with_default(errors.clone(), || {
                bench.driver.on_frame(NodeId(2), frame).expect("the node goes on");
            });
            let told = errors.told();
            let is_refused = told.contains("peer disconnected") && told.contains("not for now");
            assert_eq!(is_refused, is_garbled, "a piece: {is_piece}; {told}");
            assert_eq!(told.is_empty(), !is_garbled, "{told}");
        }
    }
}
