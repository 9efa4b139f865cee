//! Getting back what damage took: batches that cannot be read are fetched from the other members, by index and
//! chain, while commits go on; and what a claim stands for is settled.
//!
//! Happy path of a known batch: ask one member after the other for the batch behind its chain; the image goes to the
//! log, which rebuilds the segment around it; when that is durable the core may acknowledge it and apply goes on.
//!
//! Happy path of a claim: a leader is there, replicates what is missing, and is asked how far its log reaches. Without
//! one, what this node's log kept aside behind the damage is put back as soon as it verifies, the missing batches in
//! between are asked for, and if nobody leads in the end because nobody knows what was there, everybody is asked twice
//! ([`Inquiry`]).
//!
//! Everything is bounded: one question per member under way, one read per member that asks, a few searches at a time.
//! Whoever does not answer within an election time-out is asked again, and named in the status.

use super::membership::configuration_in;
use super::{Driver, GROUP, invariant, run_of, take_block};
use crate::config::Config;
use crate::error::{LostExtent, StopError};
use crate::raft::{Answer, Claim, Event, Inquiry, LogId, Raft, Role, Verdict};
use crate::state_machine::StateMachine;
use crate::wire::{self, Encoder, FetchMessage, FetchReplyMessage, Fetched};
use ringraft_block::{Block, BlockBuf, LogIndex, NodeId};
use ringraft_net::Network;
use ringraft_net::link::Link;
use ringraft_wal::disk::Disk;
use ringraft_wal::format::{BatchInfo, BatchKind, BatchView, Chain, ENVELOPE_BYTES, parse_image};
use ringraft_wal::{Damage, DamagedBatch, ReadError, RepairError, StoredBatch};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::time::Duration;

/// Tokens of this file's reads of the log. Those of apply and of peers are far from it: node ids are small.
const READ_TOKENS: u64 = 1 << 62;
/// Searches at a time.
const SEARCHES_MAX: usize = 16;
/// How often the scrubber gets its share.
const SCRUB_INTERVAL_NS: u64 = 250_000_000;
/// How often the log of the node repeats what it waits for.
const WARN_INTERVAL_NS: u64 = 10_000_000_000;
/// After an answer that is none.
const BUSY_RETRY_NS: u64 = 50_000_000;

/// What a damaged node does to be whole again, and what every node does for others.
pub(super) struct Repairer<B: BlockBuf> {
    patience_ns: u64,
    scrub_bytes_per_second: u64,
    scrub_at_ns: u64,
    /// What the start found unreadable and is not repaired: not acknowledged in this life.
    clamped: BTreeSet<LogIndex>,
    /// What the start found, for people.
    report: Vec<Damage>,
    /// An end of a batch, beyond that of the log, that is proved to have been in it: a batch that was kept aside follows it.
    proved: Option<(LogIndex, Chain)>,
    /// Batches whose image the log has, and is writing.
    offered: BTreeSet<LogIndex>,
    searches: BTreeMap<LogIndex, Search<B>>,
    asked: BTreeMap<NodeId, Asked>,
    tokens: u64,
    reads: BTreeMap<u64, ReadFor>,
    /// Members that this node reads a batch for.
    serving: BTreeSet<NodeId>,
    outgoing: VecDeque<(NodeId, Outgoing<B>)>,
    leaderless_since_ns: Option<u64>,
    /// When the leader may be asked again how far its log reaches.
    leader_retry_at_ns: u64,
    /// When there is something to be done without news.
    due_at_ns: u64,
    warned_at_ns: Option<u64>,
    waiting_for: Vec<NodeId>,
    repaired: u64,
}

enum Outgoing<B: BlockBuf> {
    Fetch(FetchMessage),
    Reply(FetchReplyMessage, Option<StoredBatch<B>>),
}

/// The search for the batch behind a position.
struct Search<B: BlockBuf> {
    previous: Chain,
    /// The batch, where it is known; otherwise it is one that a claim stands for.
    want: Option<(LogIndex, Chain)>,
    inquiry: Inquiry,
    began_at_ns: u64,
    retry_at_ns: BTreeMap<NodeId, u64>,
    /// An intact batch that may be the one: whether what was kept aside follows it is being looked up.
    candidate: Option<(Block<B>, BatchInfo)>,
    /// What was kept aside at the position itself is being read, or was no use.
    own: Own,
    /// Which of the batches kept aside is named as proof.
    proof: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Own {
    Unread,
    Reading,
    Other,
}

/// A question under way.
struct Asked {
    token: u64,
    /// The search that it is for; none if only the member's state is of interest.
    search: Option<LogIndex>,
    round: u8,
    until_ns: u64,
    /// Which batch was asked for, by its first index and the chain before it, when it is not the searched one but lies on the
    /// way from there to the next one that was kept aside.
    on_the_way: Option<(LogIndex, Chain)>,
}

enum ReadFor {
    /// For a member that asked.
    Member { to: NodeId, message: FetchMessage },
    /// What was kept aside at the position of this search.
    Own { search: LogIndex },
    /// What was kept aside behind the candidate of this search.
    Between { search: LogIndex, from: NodeId, round: u8, end: LogId },
    /// The same, behind a batch some way on from the searched one, which ends so.
    Beyond { search: LogIndex, from: NodeId, round: u8, end: LogId, reached: (LogIndex, Chain) },
}

impl<B: BlockBuf> Repairer<B> {
    pub(super) fn new(config: &Config) -> Self {
        let patience_ns = u64::try_from(config.election_timeout.max(Duration::from_millis(1)).as_nanos());
        Self {
            patience_ns: patience_ns.unwrap_or(u64::MAX),
            scrub_bytes_per_second: config.scrub_bytes_per_second,
            scrub_at_ns: u64::MAX,
            clamped: BTreeSet::new(),
            report: Vec::new(),
            proved: None,
            offered: BTreeSet::new(),
            searches: BTreeMap::new(),
            asked: BTreeMap::new(),
            tokens: 0,
            reads: BTreeMap::new(),
            serving: BTreeSet::new(),
            outgoing: VecDeque::new(),
            leaderless_since_ns: None,
            leader_retry_at_ns: 0,
            due_at_ns: u64::MAX,
            warned_at_ns: None,
            waiting_for: Vec::new(),
            repaired: 0,
        }
    }

    pub(super) fn found_at_start(&mut self, damage: &[Damage]) {
        self.report = damage.to_vec();
        for damage in damage {
            tracing::warn!(%damage, "found at the start");
        }
    }

    /// The core begins; `damaged` is what it was told.
    pub(super) fn start(&mut self, damaged: impl Iterator<Item = LogIndex>, now_ns: u64) {
        self.clamped = damaged.collect();
        self.due_at_ns = now_ns;
        if self.scrub_bytes_per_second > 0 {
            self.scrub_at_ns = now_ns.saturating_add(SCRUB_INTERVAL_NS);
        }
    }

    pub(super) fn truncate_after(&mut self, after: LogIndex) {
        self.clamped.retain(|first| *first <= after);
        self.offered.retain(|first| *first <= after);
        self.proved = self.proved.filter(|(last, _)| *last <= after);
        self.searches.clear();
        self.due_at_ns = 0;
    }

    pub(super) fn session_changed(&mut self, peer: NodeId) {
        self.asked.remove(&peer);
        self.outgoing.retain(|(to, _)| *to != peer);
        // What is being read for it would answer a question of the session before, whose numbers begin anew with each
        // process.
        self.reads.retain(|_, read| !matches!(read, ReadFor::Member { to, .. } if *to == peer));
        self.serving.remove(&peer);
        if self.due_at_ns != u64::MAX {
            self.due_at_ns = 0;
        }
    }

    pub(super) fn next_deadline(&self) -> u64 {
        self.due_at_ns.min(self.scrub_at_ns)
    }

    /// Whether a read with that token is this file's.
    pub(super) fn reads(&self, token: u64) -> bool {
        self.reads.contains_key(&token)
    }

    /// Whoever has not answered in time lets the others have their turn.
    fn give_up_waiting(&mut self, now_ns: u64) {
        self.asked.retain(|peer, asked| {
            let waits = asked.until_ns > now_ns;
            if !waits && let Some(search) = asked.search.and_then(|first| self.searches.get_mut(&first)) {
                search.retry_at_ns.insert(*peer, now_ns.saturating_add(BUSY_RETRY_NS));
            }
            waits
        });
    }

    /// When a member may be asked again.
    fn next_retry(&self, now_ns: u64) -> u64 {
        let retries = self.searches.values().flat_map(|search| search.retry_at_ns.values());
        retries.copied().filter(|at| *at > now_ns).min().unwrap_or(u64::MAX)
    }

    fn token(&mut self) -> u64 {
        self.tokens += 1;
        READ_TOKENS + self.tokens
    }

    /// Moves questions and answers to the network, as far as that has room.
    pub(super) fn send<L: Link<Buf = B>>(&mut self, network: &mut Network<L>, encoder: &mut Encoder) {
        let mut kept = VecDeque::new();
        while let Some((to, message)) = self.outgoing.pop_front() {
            let (kind, body, attachment) = match &message {
                Outgoing::Fetch(fetch) => (wire::kind::FETCH, encoder.fetch(fetch), None),
                Outgoing::Reply(reply, batch) => {
                    let attachment = batch.as_ref().map(|batch| {
                        let image = ENVELOPE_BYTES..ENVELOPE_BYTES + batch.info.image_bytes as usize;
                        (Rc::clone(&batch.block), image)
                    });
                    (wire::kind::FETCH_REPLY, encoder.fetch_reply(reply), attachment)
                }
            };
            // At most one of each kind per member waits here. Without a session there is nobody to tell.
            if let Err(ringraft_net::SendError::Full) = network.send(to, kind, GROUP, body, attachment) {
                kept.push_back((to, message));
            }
        }
        self.outgoing = kept;
    }
}

// What the log reports, and what it is given.

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// More was in the log than is.
    pub(super) fn claim(&self) -> Option<Claim> {
        let claim = self.wal.hard_state()?.claim?;
        Some(Claim { term: claim.term, last: claim.last, certain: claim.certain })
    }

    pub(super) fn damage_found(&mut self, batch: &DamagedBatch) -> Result<(), StopError> {
        let DamagedBatch { info, segment, offset, cause, .. } = batch;
        let (first, last) = (info.first, info.last);
        tracing::warn!(node = %self.config.node, %first, %last, segment, offset, ?cause, "a batch cannot be read");
        self.damage_changed()
    }

    pub(super) fn repaired(&mut self, first: LogIndex, last: LogIndex) -> Result<(), StopError> {
        tracing::info!(node = %self.config.node, %first, %last, "repaired");
        self.repair.repaired += 1;
        self.repair.clamped.remove(&first);
        self.repair.offered.remove(&first);
        self.configuration_repaired(first)?;
        self.damage_changed()
    }

    fn damage_changed(&mut self) -> Result<(), StopError> {
        self.repair.due_at_ns = self.now.monotonic_ns;
        let (from, clamp) = (self.wal.first_damaged(), self.repair.clamped.first().copied());
        self.step(Event::DamageChanged { from, clamp })
    }

    /// An intact image of `info` is there; if that batch cannot be read, the log is given it. False if it is refused for good.
    pub(super) fn offer_repair(&mut self, info: BatchInfo, block: Block<D::Buf>) -> bool {
        let chain = self.wal.chain_at(info.last);
        if !self.wal.is_damaged(info.first) || chain != Some(info.chain) {
            return false;
        }
        match self.wal.repair(&mut self.disk, info.first, block) {
            Ok(()) => {
                self.repair.offered.insert(info.first);
                self.repair.searches.remove(&info.first);
                self.repair.due_at_ns = self.now.monotonic_ns;
                true
            }
            // Asked for again later.
            Err(RepairError::Busy | RepairError::NotDamaged { .. } | RepairError::Stopped) => true,
            Err(error) => {
                tracing::warn!(node = %self.config.node, %error, "not repaired");
                false
            }
        }
    }

    pub(super) fn damage_status(&self, raft: &Raft) -> crate::handle::DamageStatus {
        crate::handle::DamageStatus {
            batches: self.wal.damaged().count(),
            first: self.wal.first_damaged(),
            claim: raft.restraint().claim,
            waiting_for: self.repair.waiting_for.clone(),
            repaired: self.repair.repaired,
            disk_stalled_ms: self.stall.stalled_ms(self.now.monotonic_ns),
        }
    }

    /// The end of all that this node holds: its log, what it kept aside, and what it is certain to have had. Of a
    /// leader, its log.
    fn end_of_all(&self, raft: &Raft) -> LogId {
        let Some(claim) = raft.restraint().claim else { return raft.last() };
        let kept = self.wal.salvage().map(|info| LogId { term: info.term, index: info.last }).max();
        raft.last().max(kept.unwrap_or_default()).max(claim.end().unwrap_or_default())
    }
}

// Searching.

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// Does what is due for the repair of this node, and lets the scrubber read its share.
    pub(super) fn mend(&mut self) -> Result<(), StopError> {
        let now = self.now.monotonic_ns;
        if now >= self.repair.scrub_at_ns && !self.closing {
            self.repair.scrub_at_ns = now.saturating_add(SCRUB_INTERVAL_NS);
            let share = self.repair.scrub_bytes_per_second / (1_000_000_000 / SCRUB_INTERVAL_NS);
            self.wal.scrub_step(&mut self.disk, share.max(1));
        }
        if now < self.repair.due_at_ns || self.closing {
            return Ok(());
        }
        let Some(raft) = self.raft() else { return Ok(()) };
        let claim = raft.restraint().claim;
        let leader = raft.leader();
        if claim.is_none() && self.wal.first_damaged().is_none() {
            self.repair.searches.clear();
            self.repair.proved = None;
            self.repair.asked.clear();
            self.repair.waiting_for.clear();
            self.repair.due_at_ns = u64::MAX;
            return Ok(());
        }
        self.repair.due_at_ns = now.saturating_add(self.repair.patience_ns / 4);
        self.repair.give_up_waiting(now);
        self.repair.leaderless_since_ns = match (leader, self.repair.leaderless_since_ns) {
            (Some(_), _) => None,
            (None, since) => since.or(Some(now)),
        };
        self.begin_searches(claim);
        self.read_own();
        self.conclude()?;
        self.ask_members(claim, leader);
        self.repair.due_at_ns = self.repair.due_at_ns.min(self.repair.next_retry(now));
        self.say_what_is_waited_for();
        Ok(())
    }

    /// Where the log ends, if what was behind it has to be found without a leader.
    fn claimed_position(&self, claim: Option<Claim>) -> Option<(LogIndex, Chain)> {
        let claim = claim?;
        let since = self.repair.leaderless_since_ns?;
        let last = self.raft()?.last().index;
        if claim.certain && last >= claim.last {
            // All of it is back, and only has to become durable.
            return None;
        }
        let waited = self.now.monotonic_ns.saturating_sub(since) >= self.repair.patience_ns;
        if waited { Some((last.next(), self.chain_at(last)?)) } else { None }
    }

    /// One search for each batch that is missing, as far as the bound allows; those that have become void end.
    fn begin_searches(&mut self, claim: Option<Claim>) {
        let Some(raft) = self.raft() else { return };
        let claimed = self.claimed_position(claim);
        let known = self.wal.damaged().filter(|batch| !self.repair.offered.contains(&batch.info.first));
        let known = known.map(|batch| {
            let DamagedBatch { info, previous, .. } = batch;
            (info.first, previous, Some((info.last, info.chain)))
        });
        let claimed = claimed.map(|(first, previous)| (first, previous, None));
        let wanted: Vec<_> = claimed.into_iter().chain(known).take(SEARCHES_MAX).collect();
        let (id, quorum, end) = (self.config.node, raft.quorum().clone(), self.end_of_all(raft));
        let now = self.now.monotonic_ns;
        let is_wanted = |first: &LogIndex, search: &Search<D::Buf>| {
            wanted.contains(&(*first, search.previous, search.want))
        };
        self.repair.searches.retain(|first, search| is_wanted(first, search));
        for (first, previous, want) in wanted {
            self.repair.searches.entry(first).or_insert_with(|| Search {
                previous,
                want,
                inquiry: Inquiry::new(id, &quorum, end),
                began_at_ns: now,
                retry_at_ns: BTreeMap::new(),
                candidate: None,
                own: Own::Unread,
                proof: 0,
            });
        }
    }

    /// What was kept aside may follow the log as it is.
    fn read_own(&mut self) {
        let unread = |(_, search): &(&LogIndex, &mut Search<D::Buf>)| {
            search.want.is_none() && search.own == Own::Unread
        };
        let Some((first, search)) = self.repair.searches.iter_mut().find(unread) else { return };
        let (first, previous) = (*first, search.previous);
        let kept = self.wal.salvage().any(|info| info.first == first);
        search.own = if kept { Own::Reading } else { Own::Other };
        if kept {
            let token = self.repair.token();
            self.repair.reads.insert(token, ReadFor::Own { search: first });
            self.wal.read_salvage(&mut self.disk, token, first, previous);
        }
    }

    /// Puts the open questions to those who have none to answer.
    fn ask_members(&mut self, claim: Option<Claim>, leader: Option<NodeId>) {
        let now = self.now.monotonic_ns;
        let until_ns = now.saturating_add(self.repair.patience_ns);
        let kept: Vec<(LogIndex, Chain)> = self.wal.salvage().map(|info| (info.last, info.chain)).collect();
        let connected: Vec<NodeId> =
            self.peers.iter().filter(|(_, peer)| peer.session.is_some()).map(|(id, _)| *id).collect();
        // A known batch is asked of one member at a time: all would send it.
        let mut busy: BTreeSet<LogIndex> =
            self.repair.asked.values().filter_map(|asked| asked.search).collect();
        for peer in connected {
            if self.repair.asked.contains_key(&peer) {
                continue;
            }
            let open = |(first, search): &(&LogIndex, &mut Search<D::Buf>)| {
                let due = search.retry_at_ns.get(&peer).is_none_or(|at| *at <= now);
                let one_at_a_time = search.want.is_some() && busy.contains(first);
                let idle = search.own != Own::Reading && search.candidate.is_none();
                due && !one_at_a_time && idle && search.inquiry.open().any(|voter| voter == peer)
            };
            let search = self.repair.searches.iter_mut().find(open);
            let (message, asked) = if let Some((first, search)) = search {
                let ahead: Vec<_> = kept.iter().copied().filter(|(last, _)| last >= first).collect();
                let proved = self.repair.proved.filter(|(last, _)| last >= first);
                // The nearest batch that was kept, then the farthest, then those in between.
                let turn = search.proof;
                search.proof += 1;
                let proof = match turn % 3 {
                    _ if proved.is_some() => proved,
                    _ if ahead.is_empty() => None,
                    0 => ahead.first().copied(),
                    1 => ahead.last().copied(),
                    _ => ahead.get(turn % ahead.len()).copied(),
                };
                search.retry_at_ns.insert(peer, until_ns);
                let message = FetchMessage {
                    token: 0,
                    first: *first,
                    previous_chain: search.previous,
                    proof: search.want.or(proof),
                    // Without anything behind it there is nothing to prove a batch by.
                    image: search.want.is_some() || proof.is_some(),
                    only_proved: search.want.is_some(),
                };
                let round = search.inquiry.round();
                (message, Asked { token: 0, search: Some(*first), round, until_ns, on_the_way: None })
            } else if leader == Some(peer)
                && claim.is_some_and(|claim| !claim.certain)
                && now >= self.repair.leader_retry_at_ns
            {
                self.repair.leader_retry_at_ns = now.saturating_add(self.repair.patience_ns / 4);
                let Some(last) = self.raft().map(|raft| raft.last().index) else { return };
                let previous_chain = self.chain_at(last).unwrap_or_default();
                let (proof, image, only_proved) = (None, false, false);
                let first = last.next();
                let message = FetchMessage { token: 0, first, previous_chain, proof, image, only_proved };
                (message, Asked { token: 0, search: None, round: 0, until_ns, on_the_way: None })
            } else {
                continue;
            };
            let token = self.repair.token();
            busy.extend(asked.search);
            self.repair.asked.insert(peer, Asked { token, ..asked });
            self.repair
                .outgoing
                .retain(|(to, waiting)| *to != peer || matches!(waiting, Outgoing::Reply(..)));
            self.repair.outgoing.push_back((peer, Outgoing::Fetch(FetchMessage { token, ..message })));
        }
    }

    /// Follows the verdicts.
    fn conclude(&mut self) -> Result<(), StopError> {
        let Some(raft) = self.raft() else { return Ok(()) };
        let quorum = raft.quorum().clone();
        let mut verdicts = Vec::new();
        for (first, search) in &mut self.repair.searches {
            if search.own != Own::Reading
                && search.candidate.is_none()
                && let Some(verdict) = search.inquiry.verdict(&quorum)
            {
                verdicts.push((*first, search.want, verdict));
            }
        }
        for (first, want, verdict) in verdicts {
            self.repair.searches.remove(&first);
            let Some(raft) = self.raft() else { return Ok(()) };
            let committed = first <= raft.commit();
            // While somebody leads, his log decides about what is not committed. But a leader that cannot read a batch that
            // nobody else holds will never commit anything again.
            let leads = raft.leader().is_some();
            let in_office = raft.role() == Role::Leader && want.is_some();
            match verdict {
                Verdict::AllCopiesGone | Verdict::Nowhere { .. } if committed => {
                    return Err(self.copies_gone(first, want));
                }
                Verdict::AllCopiesGone | Verdict::Nowhere { .. } if in_office => {
                    self.step(Event::NothingBehind { after: first.previous() })?;
                }
                Verdict::AllCopiesGone if !leads => return Err(self.copies_gone(first, want)),
                Verdict::Nowhere { .. } if !leads => {
                    tracing::warn!(
                        node = %self.config.node, %first,
                        "no voter has what was here: it was never committed, and is given up"
                    );
                    self.step(Event::NothingBehind { after: first.previous() })?;
                }
                Verdict::Unproved { highest } if want.is_none() => self.step(Event::AllAsked { highest })?,
                Verdict::AllCopiesGone | Verdict::Nowhere { .. } | Verdict::Unproved { .. } => {}
            }
        }
        Ok(())
    }

    fn copies_gone(&self, first: LogIndex, want: Option<(LogIndex, Chain)>) -> StopError {
        let batch = self.wal.damaged().find(|batch| batch.info.first == first);
        let report = self.repair.report.iter().find(|damage| damage.first == first);
        let (segment, offset) = match (&batch, report.or(self.repair.report.first())) {
            (Some(batch), _) => (batch.segment.clone(), batch.offset),
            (None, Some(damage)) => (damage.segment.clone(), damage.offset),
            // An earlier start found it and named the place.
            (None, None) => ("found at an earlier start".to_owned(), 0),
        };
        let claimed = self.claim().map_or(first, |claim| claim.last.max(first));
        let known = want.map_or(LostExtent::AtLeast(claimed), |(last, _)| LostExtent::Batch(last));
        StopError::CopiesGone { first, known, segment, offset }
    }

    fn say_what_is_waited_for(&mut self) {
        let now = self.now.monotonic_ns;
        let long = 2 * self.repair.patience_ns;
        let mut silent = BTreeSet::new();
        for search in self.repair.searches.values() {
            if now.saturating_sub(search.began_at_ns) >= long {
                silent.extend(search.inquiry.open());
            }
        }
        self.repair.waiting_for = silent.into_iter().collect();
        let quiet = self.repair.warned_at_ns.is_some_and(|at| now.saturating_sub(at) < WARN_INTERVAL_NS);
        if !self.repair.waiting_for.is_empty() && !quiet {
            self.repair.warned_at_ns = Some(now);
            let indexes: Vec<u64> = self.repair.searches.keys().map(|first| first.get()).collect();
            tracing::warn!(
                node = %self.config.node, ?indexes, members = ?self.repair.waiting_for,
                "what the log lacks may be only with members that do not answer: bring them back"
            );
        }
    }
}

// Answers to this node.

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    pub(super) fn on_fetch_reply(
        &mut self,
        from: NodeId,
        reply: FetchReplyMessage,
        attachment: Option<(Block<D::Buf>, usize)>,
    ) -> Result<(), StopError> {
        // An answer that came too late, or to nothing.
        if self.repair.asked.get(&from).is_none_or(|asked| asked.token != reply.token) {
            return Ok(());
        }
        let Some(asked) = self.repair.asked.remove(&from) else { return Ok(()) };
        self.repair.due_at_ns = self.now.monotonic_ns;
        if reply.leads {
            self.step(Event::LeaderHolds { leader: from, term: reply.term, last: reply.end })?;
        }
        let Some(first) = asked.search else { return Ok(()) };
        let Some(search) = self.repair.searches.get_mut(&first) else { return Ok(()) };
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
                let Some(Ok(view)) = image.map(parse_image) else {
                    return self.refuse(from, "a fetched batch whose image is damaged");
                };
                let info = view.info();
                let (wanted, previous) = asked.on_the_way.unwrap_or((first, search.previous));
                let named = info.first == wanted && info.last == end.index && info.term == end.term;
                let whole = info.chain == chain && info.group == GROUP && view.verify_chain(previous);
                if !named || !whole || info.image_bytes as usize > self.config.image_bytes_max() {
                    return self.refuse(from, "a fetched batch that is not the one announced");
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
        self.answered(first, from, asked.round, answer, reply.end);
        Ok(())
    }

    fn answered(&mut self, first: LogIndex, from: NodeId, round: u8, answer: Answer, end: LogId) {
        if let Some(search) = self.repair.searches.get_mut(&first) {
            search.inquiry.answered(from, round, answer, end);
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
                let (round, end) = (asked.round, reply.end);
                let read = ReadFor::Beyond { search: first, from, round, end, reached };
                self.repair.reads.insert(token, read);
                self.wal.read_salvage(&mut self.disk, token, next.first, info.chain);
                Ok(None)
            }
            Some(next) if next.first == info.last.next() => {
                search.candidate = Some((block, info));
                let token = self.repair.token();
                let (search, round, end) = (info.first, asked.round, reply.end);
                self.repair.reads.insert(token, ReadFor::Between { search, from, round, end });
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
        if !restrained || !idle || last.index.next() != info.first || info.term > raft.term() {
            return Ok(());
        }
        if !self.has_room_for(&info) {
            // Read, or asked for, again when the log has taken what waits.
            self.repair.due_at_ns = self.now.monotonic_ns.saturating_add(BUSY_RETRY_NS);
            return Ok(());
        }
        invariant(info.term >= last.term, || format!("{info:?} was kept behind {last:?}"))?;
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

    pub(super) fn read_for_repair(
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
            Some(ReadFor::Own { search: first }) => {
                let Some(search) = self.repair.searches.get_mut(&first) else { return Ok(()) };
                search.own = Own::Other;
                match result.ok().and_then(|batches| batches.into_iter().next()) {
                    Some(batch) => self.adopt_stored(batch),
                    None => Ok(()),
                }
            }
            Some(ReadFor::Between { search: first, from, round, end }) => {
                let Some(search) = self.repair.searches.get_mut(&first) else { return Ok(()) };
                let Some((block, info)) = search.candidate.take() else { return Ok(()) };
                match result {
                    Ok(_) => self.adopt(info, block),
                    Err(ReadError::NotFound { .. }) => {
                        self.answered(first, from, round, Answer::None, end);
                        Ok(())
                    }
                    // The proof can no longer be read.
                    Err(_) => {
                        self.answered(first, from, round, Answer::Other, end);
                        Ok(())
                    }
                }
            }
            Some(ReadFor::Beyond { search: first, from, round, end, reached }) => {
                if result.is_ok() {
                    self.repair.proved = Some(reached);
                    // Now any member that has it is believed.
                    if let Some(search) = self.repair.searches.get_mut(&first) {
                        search.retry_at_ns.clear();
                    }
                } else {
                    self.answered(first, from, round, Answer::Other, end);
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn adopt_stored(&mut self, batch: StoredBatch<D::Buf>) -> Result<(), StopError> {
        let StoredBatch { info, block } = batch;
        let block = match Rc::try_unwrap(block) {
            Ok(block) => block,
            Err(shared) => {
                let mut own = take_block(&self.pool, &mut self.disk, info.slot_bytes());
                if let Ok(own) = &mut own {
                    let bytes = info.slot_bytes();
                    own[..bytes].copy_from_slice(&shared[..bytes]);
                }
                own.map_err(StopError::Memory)?
            }
        };
        self.adopt(info, block)
    }
}

// Answers of this node.

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    pub(super) fn on_fetch(&mut self, from: NodeId, message: FetchMessage) -> Result<(), StopError> {
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
        } else if self.wal.is_damaged(first) {
            self.reply(from, &message, Fetched::Had, None);
        } else if !message.image {
            self.reply(from, &message, Fetched::NotSent, None);
        } else if let Some(batch) = self.recent.starting_at(first).cloned() {
            self.reply(from, &message, batch_of(&batch.info), Some(batch));
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

    fn answer_read(
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
        let reply = FetchReplyMessage {
            token: message.token,
            outcome,
            proves: self.proves(message),
            term: raft.term(),
            leads,
            end: self.end_of_all(raft),
        };
        // Whoever asks again has given the first question up.
        self.repair.outgoing.retain(|(peer, waiting)| *peer != to || matches!(waiting, Outgoing::Fetch(_)));
        self.repair.outgoing.push_back((to, Outgoing::Reply(reply, batch)));
    }
}

fn batch_of(info: &BatchInfo) -> Fetched {
    Fetched::Batch { end: LogId { term: info.term, index: info.last }, chain: info.chain }
}
