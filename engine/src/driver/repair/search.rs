//! Which batches are searched for, who is asked for them, and what follows from what everybody said.

use super::{Asked, Outgoing, Own, ReadFor, SEARCHES_MAX, Search, TURN_PATIENCES, WARN_INTERVAL_NS};
use crate::driver::Driver;
use crate::error::{LostExtent, StopError};
use crate::raft::{Claim, Elsewhere, Event, Inquiry, LogId, Raft, Role, Verdict};
use crate::state_machine::StateMachine;
use crate::wire::FetchMessage;
use ringraft_block::{LogIndex, NodeId};
use ringraft_net::link::Link;
use ringraft_wal::DamagedBatch;
use ringraft_wal::disk::Disk;
use ringraft_wal::format::Chain;
use std::collections::{BTreeMap, BTreeSet};

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// What cannot be read and is still held in memory needs nobody else.
    pub(super) fn mend_from_memory(&mut self) -> Result<(), StopError> {
        let here = self.wal.damaged_firsts().filter(|first| !self.wal.awaits_repair(*first));
        let here: Vec<_> = here.filter_map(|first| self.recent.starting_at(first).cloned()).collect();
        for batch in here {
            let info = batch.info;
            let block = self.own_block(batch)?;
            self.offer_repair(info, block);
        }
        Ok(())
    }

    /// Where the log ends, if what was behind it has to be found without a leader.
    fn claimed_position(&self, claim: Option<Claim>) -> Option<(LogIndex, Chain)> {
        let claim = claim?;
        let since = self.repair.leaderless_since_ns?;
        let end = self.raft()?.last();
        if claim.end().is_some_and(|was| end >= was) {
            // All of it is back, and only has to become durable.
            return None;
        }
        let last = end.index;
        let waited = self.now.monotonic_ns.saturating_sub(since) >= self.repair.patience_ns;
        if waited { Some((last.next(), self.chain_at(last)?)) } else { None }
    }

    /// One search for each batch that is missing, as far as the bound allows; those that have become void end.
    pub(super) fn begin_searches(&mut self, claim: Option<Claim>) {
        let Some(raft) = self.raft() else { return };
        let claimed = self.claimed_position(claim);
        let (id, quorum, reach) = (self.config.node, raft.quorum().clone(), self.reach(raft));
        let now = self.now.monotonic_ns;
        let claimed = claimed.map(|(first, previous)| (first, previous, None));
        let room = SEARCHES_MAX - usize::from(claimed.is_some());
        let known = self.next_known(room).into_iter().filter_map(|first| self.wal.damaged_at(first));
        let known = known.map(|batch| {
            let DamagedBatch { info, previous, .. } = batch;
            (info.first, previous, Some((info.last, info.chain)))
        });
        let wanted: Vec<_> = claimed.into_iter().chain(known).collect();
        let is_wanted = |first: &LogIndex, search: &Search<D::Buf>| {
            search.inquiry.is_of(&quorum) && wanted.contains(&(*first, search.previous, search.want))
        };
        self.repair.searches.retain(|first, search| is_wanted(first, search));
        for (first, previous, want) in wanted {
            self.repair.searches.entry(first).or_insert_with(|| Search {
                previous,
                want,
                inquiry: Inquiry::new(id, &quorum, reach),
                began_at_ns: now,
                doubted: BTreeSet::new(),
                rests_until_ns: now,
                retry_at_ns: BTreeMap::new(),
                candidate: None,
                own: Own::Unread,
                proof: 0,
            });
        }
    }

    /// The damaged batches to be searched for: not all at once, and when those that have their turn get nowhere, the next ones
    /// get theirs.
    fn next_known(&mut self, room: usize) -> Vec<LogIndex> {
        // The log forgets images that it cannot write when others come that it can: those are searched for again.
        let unrepaired = |first: &LogIndex| !self.wal.awaits_repair(*first);
        let mut known: Vec<LogIndex> = self.wal.damaged_firsts().filter(unrepaired).collect();
        let now = self.now.monotonic_ns;
        if known.len() <= room {
            self.repair.turn_since_ns = now;
        } else {
            let from = known.partition_point(|first| *first < self.repair.turn_of) % known.len();
            known.rotate_left(from);
            if now.saturating_sub(self.repair.turn_since_ns) >= TURN_PATIENCES * self.repair.patience_ns {
                known.rotate_left(room);
                self.repair.turn_since_ns = now;
            }
            self.repair.turn_of = known[0];
            known.truncate(room);
        }
        known
    }

    /// What was kept aside may follow the log as it is.
    pub(super) fn read_own(&mut self) {
        let unread = |(_, search): &(&LogIndex, &mut Search<D::Buf>)| {
            search.want.is_none() && search.own == Own::Unread
        };
        let Some((first, search)) = self.repair.searches.iter_mut().find(unread) else { return };
        let (first, previous) = (*first, search.previous);
        let kept = self.wal.salvage().any(|info| info.first == first);
        search.own = if kept { Own::Reading } else { Own::Other };
        if kept {
            let token = self.repair.token();
            self.repair.reads.insert(token, ReadFor::Own { search: first, previous });
            self.wal.read_salvage(&mut self.disk, token, first, previous);
        }
    }

    /// Puts the open questions to those who have none to answer.
    pub(super) fn ask_members(&mut self, claim: Option<Claim>, leader: Option<NodeId>) {
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
                let due =
                    search.rests_until_ns <= now && search.retry_at_ns.get(&peer).is_none_or(|at| *at <= now);
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
    pub(super) fn conclude(&mut self) -> Result<(), StopError> {
        let Some(raft) = self.raft() else { return Ok(()) };
        let (id, quorum, reach) = (self.config.node, raft.quorum().clone(), self.reach(raft));
        let last = raft.last();
        // What is not settled is asked again, and not at once: somebody else has to do something first.
        let rests_until_ns = self.now.monotonic_ns.saturating_add(self.repair.patience_ns / 4);
        let mut verdicts = Vec::new();
        for (first, search) in &mut self.repair.searches {
            if search.own != Own::Reading
                && search.candidate.is_none()
                && let Some(verdict) = search.inquiry.verdict()
            {
                verdicts.push((*first, search.want, verdict));
                search.doubted = search.inquiry.doubted(search.want.is_none().then_some(last));
                search.inquiry = Inquiry::new(id, &quorum, reach);
                search.retry_at_ns.clear();
                search.rests_until_ns = rests_until_ns;
                search.own = Own::Unread;
            }
        }
        for (first, want, verdict) in verdicts {
            let Some(raft) = self.raft() else { return Ok(()) };
            let committed = first <= raft.commit();
            // While somebody leads, his log decides about what is not committed. But a leader that cannot read a batch that
            // nobody else holds will never commit anything again.
            let leads = raft.leader().is_some();
            let in_office = raft.role() == Role::Leader && want.is_some();
            match verdict {
                Verdict::AllCopiesGone | Verdict::Nowhere(_) if committed => {
                    return Err(self.copies_gone(first, want));
                }
                Verdict::AllCopiesGone | Verdict::Nowhere(_) if in_office => {
                    // The highest end of all decides about a claim only, and who leads makes none.
                    let elsewhere = Elsewhere { highest: LogId::default(), believed: false };
                    self.step(Event::NothingBehind { after: first.previous(), elsewhere })?;
                }
                Verdict::AllCopiesGone if !leads => return Err(self.copies_gone(first, want)),
                Verdict::Nowhere(elsewhere) if !leads => {
                    let restrained = |raft: &Raft| (raft.claim(), raft.last());
                    let before = restrained(raft);
                    self.step(Event::NothingBehind { after: first.previous(), elsewhere })?;
                    if self.raft().is_some_and(|raft| restrained(raft) != before) {
                        tracing::warn!(
                            node = %self.config.node, %first,
                            "no voter has what was here: it was never committed, and is given up"
                        );
                    }
                }
                Verdict::Unproved(elsewhere) if want.is_none() => {
                    self.step(Event::AllAsked { elsewhere })?;
                }
                Verdict::AllCopiesGone | Verdict::Nowhere(_) | Verdict::Unproved(_) => {}
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

    pub(super) fn say_what_is_waited_for(&mut self) {
        let now = self.now.monotonic_ns;
        let long = 2 * self.repair.patience_ns;
        let mut awaited = BTreeSet::new();
        let is_young = |search: &Search<D::Buf>| now.saturating_sub(search.began_at_ns) < long;
        for search in self.repair.searches.values().filter(|search| !is_young(search)) {
            if search.rests_until_ns <= now {
                awaited.extend(search.inquiry.open());
            }
            awaited.extend(&search.doubted);
        }
        // When others have just got their turn, there is nothing new yet.
        let young = !self.repair.searches.is_empty() && self.repair.searches.values().all(is_young);
        if !young || self.repair.turn_of == LogIndex(0) {
            self.repair.waiting_for = awaited.into_iter().collect();
        }
        // What is applied here, and nobody gives, the others may have purged: behind a snapshot of its own this node needs it
        // no more.
        let applied = self.applier.applied();
        let needless = |first: &LogIndex| *first <= applied && *first > self.snapshots.newest_index();
        if self.repair.searches.iter().any(|(first, search)| !is_young(search) && needless(first)) {
            self.snapshots.take_soon();
        }
        let quiet = self.repair.warned_at_ns.is_some_and(|at| now.saturating_sub(at) < WARN_INTERVAL_NS);
        if !self.repair.waiting_for.is_empty() && !quiet {
            self.repair.warned_at_ns = Some(now);
            let indexes: Vec<u64> = self.repair.searches.keys().map(|first| first.get()).collect();
            tracing::warn!(
                node = %self.config.node, ?indexes, members = ?self.repair.waiting_for,
                "what the log lacks may be only with members that do not answer, or cannot tell: bring them back"
            );
        }
    }
}
