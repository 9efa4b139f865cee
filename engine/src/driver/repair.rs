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
//! Everything is bounded: one question per member under way, one read per member that asks, a few searches at a time, which
//! take turns when they get nowhere. Whoever does not answer within an election time-out is asked again, and named in the
//! status, as is whoever cannot settle with an answer what is missing; that is asked again after a rest.
//!
//! This file keeps the state and says what is done when; `search` asks, `fetched` takes the answers, `serve` answers others.

mod fetched;
mod search;
mod serve;
#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;

use super::{Driver, GROUP};
use crate::config::Config;
use crate::error::StopError;
use crate::raft::{Claim, Event, Inquiry, LogId, Raft, Reach};
use crate::state_machine::StateMachine;
use crate::wire::{self, Encoder, FetchMessage, FetchReplyMessage};
use ringraft_block::{Block, BlockBuf, LogIndex, NodeId};
use ringraft_net::Network;
use ringraft_net::link::Link;
use ringraft_wal::disk::Disk;
use ringraft_wal::format::{BatchInfo, Chain, ENVELOPE_BYTES};
use ringraft_wal::{Damage, DamagedBatch, RepairError, StoredBatch};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// Tokens of this file's reads of the log. Those of apply and of peers are far from it: node ids are small.
const READ_TOKENS: u64 = 1 << 62;
/// Searches at a time.
const SEARCHES_MAX: usize = 16;
/// So many times the patience with one member, the batches that have their turn may get nowhere.
const TURN_PATIENCES: u64 = 4;
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
    /// What the start found, for people.
    report: Vec<Damage>,
    /// An end of a batch, beyond that of the log, that is proved to have been in it: a batch that was kept aside follows it.
    proved: Option<(LogIndex, Chain)>,
    searches: BTreeMap<LogIndex, Search<B>>,
    /// Of more damaged batches than are searched for at a time, those from here on have their turn, since then.
    turn_of: LogIndex,
    turn_since_ns: u64,
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
    /// Everybody was asked, and it is not settled: whose answers left it in doubt, and when it is asked again.
    doubted: BTreeSet<NodeId>,
    rests_until_ns: u64,
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
    Own { search: LogIndex, previous: Chain },
    /// What was kept aside behind the candidate of this search.
    Between { search: LogIndex, from: NodeId, round: u8, reach: Reach, reached: (LogIndex, Chain) },
    /// The same, behind a batch some way on from the searched one, which ends so.
    Beyond { search: LogIndex, from: NodeId, round: u8, reach: Reach, reached: (LogIndex, Chain) },
}

impl<B: BlockBuf> Repairer<B> {
    pub(super) fn new(config: &Config) -> Self {
        let patience_ns = u64::try_from(config.election_timeout.max(Duration::from_millis(1)).as_nanos());
        Self {
            patience_ns: patience_ns.unwrap_or(u64::MAX),
            scrub_bytes_per_second: config.scrub_bytes_per_second,
            scrub_at_ns: u64::MAX,
            report: Vec::new(),
            proved: None,
            searches: BTreeMap::new(),
            turn_of: LogIndex(0),
            turn_since_ns: 0,
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

    /// The core begins.
    pub(super) fn start(&mut self, now_ns: u64) {
        self.due_at_ns = now_ns;
        if self.scrub_bytes_per_second > 0 {
            self.scrub_at_ns = now_ns.saturating_add(SCRUB_INTERVAL_NS);
        }
    }

    pub(super) fn truncate_after(&mut self, after: LogIndex) {
        self.proved = self.proved.filter(|(last, _)| *last <= after);
        self.searches.clear();
        self.due_at_ns = 0;
    }

    pub(super) fn session_changed(&mut self, peer: NodeId) {
        self.asked.remove(&peer);
        // What it was asked in the session before, it may be asked at once in the next.
        for search in self.searches.values_mut() {
            search.retry_at_ns.remove(&peer);
        }
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
        let retries = self.searches.values().flat_map(|search| search.retry_at_ns.values().copied());
        let rests = self.searches.values().map(|search| search.rests_until_ns);
        retries.chain(rests).filter(|at| *at > now_ns).min().unwrap_or(u64::MAX)
    }

    fn token(&mut self) -> u64 {
        self.tokens += 1;
        READ_TOKENS + self.tokens
    }

    /// Moves questions and answers to the network, as far as that has room.
    pub(super) fn send<L: Link<Buf = B>>(&mut self, network: &mut Network<L>, encoder: &mut Encoder) {
        if self.outgoing.is_empty() {
            return;
        }
        let mut kept = VecDeque::new();
        while let Some((to, message)) = self.outgoing.pop_front() {
            let (kind, body, attachment) = match &message {
                Outgoing::Fetch(fetch) => (wire::kind::FETCH, encoder.fetch(fetch), None),
                Outgoing::Reply(reply, batch) => {
                    let attachment = batch.as_ref().map(|batch| {
                        let image = ENVELOPE_BYTES..ENVELOPE_BYTES + batch.info.image_bytes as usize;
                        (batch.block.clone(), image)
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
        self.configuration_repaired(first)?;
        self.damage_changed()
    }

    /// The log starts behind `start`: what cannot be read before is not missed any more.
    pub(super) fn forget_damage_before(&mut self, start: LogIndex) -> Result<(), StopError> {
        let gone = |first: &LogIndex| *first <= start;
        let any = self.repair.searches.keys().any(gone);
        self.repair.searches.retain(|first, _| !gone(first));
        let told = self.raft().and_then(|raft| raft.restraint().damaged_from);
        if any || told != self.wal.first_damaged() { self.damage_changed() } else { Ok(()) }
    }

    fn damage_changed(&mut self) -> Result<(), StopError> {
        self.repair.due_at_ns = self.now.monotonic_ns;
        let damaged = self.wal.damaged_firsts().collect();
        self.step(Event::DamageChanged { damaged })
    }

    /// An intact image of `info` is there; if that batch cannot be read, the log is given it. False if it is refused for good.
    pub(super) fn offer_repair(&mut self, info: BatchInfo, block: Block<D::Buf>) -> bool {
        let chain = self.wal.chain_at(info.last);
        if !self.wal.is_damaged(info.first) || chain != Some(info.chain) {
            return false;
        }
        match self.wal.repair(&mut self.disk, info.first, block) {
            Ok(()) => {
                self.repair.turn_since_ns = self.now.monotonic_ns;
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
            batches: self.wal.damaged_firsts().count(),
            first: self.wal.first_damaged(),
            claim: raft.claim(),
            waiting_for: self.repair.waiting_for.clone(),
            repaired: self.repair.repaired,
            disk_stalled_ms: self.stall.stalled_ms(self.now.monotonic_ns),
        }
    }

    /// How far all that this node holds reaches: its log, what it kept aside, and what it is certain to have had. Of a
    /// leader, its log.
    fn reach(&self, raft: &Raft) -> Reach {
        let Some(claim) = raft.restraint().claim else {
            return Reach { highest: raft.last(), in_doubt: false, claims: false };
        };
        let kept = self.wal.salvage().map(|info| LogId { term: info.term, index: info.last }).max();
        let highest = raft.last().max(kept.unwrap_or_default()).max(claim.end().unwrap_or_default());
        Reach { highest, in_doubt: !claim.certain, claims: true }
    }
}

// What is done when.

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
            self.repair.turn_of = LogIndex(0);
            self.repair.due_at_ns = u64::MAX;
            return Ok(());
        }
        self.repair.due_at_ns = now.saturating_add(self.repair.patience_ns / 4);
        self.repair.give_up_waiting(now);
        self.repair.leaderless_since_ns = match (leader, self.repair.leaderless_since_ns) {
            (Some(_), _) => None,
            (None, since) => since.or(Some(now)),
        };
        self.mend_from_memory()?;
        self.begin_searches(claim);
        self.read_own();
        self.conclude()?;
        self.ask_members(claim, leader);
        self.repair.due_at_ns = self.repair.due_at_ns.min(self.repair.next_retry(now));
        self.say_what_is_waited_for();
        Ok(())
    }
}
