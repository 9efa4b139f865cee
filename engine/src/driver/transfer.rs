//! The driver and the end of an office: leadership handed over because somebody asked, because the node shuts down, because
//! its log has no space, or because its disk is far slower than the others'.
//!
//! Asked → the gate closes, so that no command comes in that would have to be given back → what was admitted is sealed →
//! the core replicates it and tells the successor → another leader is heard. If the sealing takes longer than an election
//! time-out, or what follows it, the gate opens again. What a slow disk keeps from being sealed for so long is not waited for: it is
//! given back when another leads.

use super::Driver;
use crate::error::{Refusal, StopError, TransferError};
use crate::raft::{Event, Nanos, Raft, Role, TransferEnd};
use crate::requests::TransferSlot;
use crate::state_machine::StateMachine;
use ringraft_block::{NodeId, Term};
use ringraft_net::link::Link;
use ringraft_wal::disk::Disk;
use std::collections::VecDeque;
use std::time::Duration;

/// A leader without space tries again to find another that has some, after this.
const NO_SPACE_RETRY_NS: u64 = 10_000_000_000;

/// Leadership has been handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transferred {
    /// Who leads now.
    pub leader: NodeId,
    /// In which term.
    pub term: Term,
}

/// How leadership was handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandedOver {
    /// Why.
    pub cause: HandoverCause,
    /// Who took over.
    pub leader: NodeId,
    /// In which term.
    pub term: Term,
}

/// Why leadership is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandoverCause {
    /// [`Handle::transfer_leadership`](crate::Handle::transfer_leadership).
    Asked,
    /// The node was asked to stop.
    Shutdown,
    /// The log had no space for commands.
    NoSpace,
    /// The disk was far slower than the others' ([`Config::disk_slow_factor`](crate::Config::disk_slow_factor)).
    DiskSlow {
        /// What it took to make a batch durable, on average, from when that was sealed.
        own: Duration,
        /// What a quorum of the others took for the same, network included.
        others: Duration,
    },
}

#[derive(Default)]
pub(super) struct Handover {
    /// Asked for in this turn.
    asked: VecDeque<(Option<NodeId>, TransferSlot)>,
    current: Option<Current>,
    /// The node shuts down and has tried, or need not try, to hand over before.
    drained: bool,
    no_space_retry_at_ns: u64,
    /// The core wants it, since the disk is slow.
    slow: Option<Slow>,
    last: Option<HandedOver>,
}

/// A hand-over that begins as soon as it can.
struct Slow {
    cause: HandoverCause,
    /// Who can take over, the best one first.
    able: Vec<NodeId>,
    /// For so long that is taken for true.
    until_ns: Option<u64>,
}

struct Current {
    cause: HandoverCause,
    to: Option<NodeId>,
    /// Who is told; nobody when the node itself wanted it.
    slot: Option<TransferSlot>,
    stage: Stage,
    /// By when what was admitted is to be sealed, and by when all is to be over.
    sealed_by_ns: u64,
    deadline_ns: u64,
}

impl Current {
    fn due_ns(&self) -> u64 {
        if self.stage == Stage::Flushing { self.sealed_by_ns } else { self.deadline_ns }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// What was admitted is being sealed.
    Flushing,
    /// The core is at it.
    UnderWay,
    /// This node does not lead any more; who does is not known yet.
    SteppedDown,
}

impl Handover {
    pub(super) fn is_under_way(&self) -> bool {
        self.current.is_some()
    }

    pub(super) fn next_deadline(&self) -> u64 {
        let slow = self.slow.as_ref().and_then(|slow| slow.until_ns).unwrap_or(u64::MAX);
        self.current.as_ref().map_or(u64::MAX, Current::due_ns).min(slow)
    }

    /// The last one that came to something.
    pub(super) fn last(&self) -> Option<HandedOver> {
        self.last
    }

    /// The core has found out that the own disk is slow.
    pub(super) fn disk_is_slow(&mut self, own: Nanos, others: Nanos, to: Vec<NodeId>) {
        let (own, others) = (Duration::from_nanos(own.0), Duration::from_nanos(others.0));
        let cause = HandoverCause::DiskSlow { own, others };
        self.slow = Some(Slow { cause, able: to, until_ns: None });
    }

    /// Somebody asks for a transfer.
    pub(super) fn ask(&mut self, to: Option<NodeId>, slot: TransferSlot) {
        self.asked.push_back((to, slot));
    }

    /// The node stops: whoever waits is told.
    pub(super) fn stopped(&mut self, error: impl Fn() -> TransferError) {
        let current = self.current.take().and_then(|current| current.slot);
        let asked = self.asked.drain(..).map(|(_, slot)| slot);
        asked.chain(current).for_each(|slot| slot.complete(Err(error())));
    }
}

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    fn leads(&self) -> bool {
        self.raft().is_some_and(|raft| raft.role() == Role::Leader)
    }

    /// Begins what was asked for in this turn, once the commands from before have been taken in.
    pub(super) fn begin_transfers(&mut self) -> Result<(), StopError> {
        while let Some((to, slot)) = self.handover.asked.pop_front() {
            self.transfer_asked(to, slot)?;
        }
        Ok(())
    }

    fn transfer_asked(&mut self, to: Option<NodeId>, slot: TransferSlot) -> Result<(), StopError> {
        let raft = self.raft();
        let refused = match (&self.handover.current, raft) {
            _ if !self.leads() => TransferEnd::NotLeader,
            (Some(current), _) => TransferEnd::UnderWay { to: current.to },
            (None, Some(raft)) if to.is_some_and(|to| to == raft.id()) => {
                // It leads already.
                let done = Transferred { leader: raft.id(), term: raft.term() };
                slot.complete(Ok(done));
                return Ok(());
            }
            (None, _) => return self.begin_handover(HandoverCause::Asked, to, Some(slot), Stage::Flushing),
        };
        slot.complete(Err(refused.into()));
        Ok(())
    }

    fn begin_handover(
        &mut self,
        cause: HandoverCause,
        to: Option<NodeId>,
        slot: Option<TransferSlot>,
        stage: Stage,
    ) -> Result<(), StopError> {
        let timeout = u64::try_from(self.config.election_timeout.as_nanos()).unwrap_or(u64::MAX);
        let sealed_by_ns = self.now.monotonic_ns.saturating_add(timeout);
        let deadline_ns = sealed_by_ns.saturating_add(timeout);
        self.handover.current = Some(Current { cause, to, slot, stage, sealed_by_ns, deadline_ns });
        self.set_gate();
        if stage == Stage::UnderWay { self.step(Event::Transfer { to }) } else { Ok(()) }
    }

    /// Moves a handover on. To be called when what was admitted has been sealed as far as the log takes it.
    pub(super) fn advance_handover(&mut self) -> Result<(), StopError> {
        self.hand_over_when_full()?;
        self.hand_over_when_slow()?;
        let now_ns = self.now.monotonic_ns;
        let Some(current) = &mut self.handover.current else { return Ok(()) };
        let is_sealed = !self.proposals.borrow().has_unsealed();
        // A disk that is slow may have no room for it before long.
        let is_waived =
            matches!(current.cause, HandoverCause::DiskSlow { .. }) && now_ns >= current.sealed_by_ns;
        if current.stage == Stage::Flushing && (is_sealed && now_ns < current.due_ns() || is_waived) {
            current.stage = Stage::UnderWay;
            let to = current.to;
            self.step(Event::Transfer { to })?;
            let target = self.raft().and_then(Raft::transfer_target);
            if let Some(current) = &mut self.handover.current {
                current.to = current.to.or(target);
            }
        } else if now_ns >= current.due_ns() {
            let error = match (current.stage, current.to) {
                (Stage::SteppedDown, _) => TransferError::NoLeaderYet,
                (Stage::UnderWay, Some(to)) => TransferEnd::TimedOut { to }.into(),
                (Stage::UnderWay, None) | (Stage::Flushing, _) => TransferEnd::NotSealed.into(),
            };
            self.end_handover(Err(error));
        }
        Ok(())
    }

    /// A leader whose disk is far slower than the others' lets one lead whose disk is not. If that cannot begin, it waits until it can;
    /// whether the disk is still slow, and who can take over, the core is asked again now and then.
    fn hand_over_when_slow(&mut self) -> Result<(), StopError> {
        let Some(mut slow) = self.handover.slow.take() else { return Ok(()) };
        if self.closing || self.is_draining() {
            return Ok(());
        }
        if !self.leads() {
            return self.step(Event::HandoverPutOff);
        }
        let takes =
            |id: &NodeId| self.peers.get(id).is_some_and(|peer| peer.session.is_some() && !peer.no_space);
        let able = slow.able.iter().copied().find(takes).filter(|_| self.handover.current.is_none());
        let Some(to) = able else {
            let timeout = u64::try_from(self.config.election_timeout.as_nanos()).unwrap_or(u64::MAX);
            let now_ns = self.now.monotonic_ns;
            if now_ns >= *slow.until_ns.get_or_insert_with(|| now_ns.saturating_add(timeout)) {
                return self.step(Event::HandoverPutOff);
            }
            self.handover.slow = Some(slow);
            return Ok(());
        };
        let cause = slow.cause;
        tracing::warn!(node = %self.config.node, %to, ?cause, "the disk is slow: leadership is handed over");
        self.begin_handover(cause, Some(to), None, Stage::Flushing)
    }

    /// A leader that cannot take commands lets one lead that can.
    fn hand_over_when_full(&mut self) -> Result<(), StopError> {
        let now_ns = self.now.monotonic_ns;
        let wanted = self.no_space && !self.closing && self.handover.current.is_none() && self.leads();
        if !wanted || now_ns < self.handover.no_space_retry_at_ns {
            return Ok(());
        }
        self.handover.no_space_retry_at_ns = now_ns.saturating_add(NO_SPACE_RETRY_NS);
        let Some(raft) = self.raft() else { return Ok(()) };
        let able = self.peers.iter().filter(|(id, peer)| {
            peer.session.is_some() && !peer.no_space && raft.configuration().is_incoming_voter(**id)
        });
        let best = able.filter_map(|(id, _)| raft.progress(*id).map(|view| (view.matched, *id))).max();
        let Some((_, to)) = best else { return Ok(()) };
        tracing::warn!(node = %self.config.node, %to, "the log has no space: leadership is handed over");
        // What was admitted and is not sealed has no place here: it is given back.
        self.begin_handover(HandoverCause::NoSpace, Some(to), None, Stage::UnderWay)
    }

    /// The core gave up, or refused.
    pub(super) fn transfer_ended(&mut self, end: TransferEnd) -> Result<(), StopError> {
        tracing::info!(node = %self.config.node, %end, "leadership was not handed over");
        let cause = self.handover.current.as_ref().map(|current| current.cause);
        let was_refused = match end {
            TransferEnd::NotLeader
            | TransferEnd::UnderWay { .. }
            | TransferEnd::NotAVoter { .. }
            | TransferEnd::NoCandidate => true,
            TransferEnd::TimedOut { .. } | TransferEnd::NotSealed | TransferEnd::Lost { .. } => false,
        };
        self.end_handover(Err(end.into()));
        if was_refused && matches!(cause, Some(HandoverCause::DiskSlow { .. })) {
            return self.step(Event::HandoverPutOff);
        }
        Ok(())
    }

    /// The role changed, or another leader was heard.
    pub(super) fn handover_role_changed(&mut self) {
        let Some((leads, leader, term)) =
            self.raft().map(|raft| (raft.role() == Role::Leader, raft.leader(), raft.term()))
        else {
            return;
        };
        let Some(current) = &mut self.handover.current else { return };
        match leader {
            // Elected again.
            Some(leader) if leads && current.stage == Stage::SteppedDown => {
                self.end_handover(Err(TransferError::OtherLeader { leader, term }));
            }
            _ if leads => {}
            Some(leader) if current.to.is_none_or(|to| to == leader) => {
                self.end_handover(Ok(Transferred { leader, term }));
            }
            Some(leader) => self.end_handover(Err(TransferError::OtherLeader { leader, term })),
            None => current.stage = Stage::SteppedDown,
        }
    }

    fn end_handover(&mut self, outcome: Result<Transferred, TransferError>) {
        if let Some(Current { cause, slot, .. }) = self.handover.current.take() {
            if let Ok(Transferred { leader, term }) = outcome {
                self.handover.last = Some(HandedOver { cause, leader, term });
            }
            if let Some(slot) = slot {
                slot.complete(outcome);
            }
        }
        self.set_gate();
    }

    /// A leader that is asked to shut down hands over first. True once nothing is left to wait for.
    pub(super) fn is_drained(&mut self) -> Result<bool, StopError> {
        if !self.handover.drained {
            self.handover.drained = true;
            let others = self.raft().is_some_and(|raft| {
                let configuration = raft.configuration();
                let mut connected = self.peers.iter().filter(|(_, peer)| peer.session.is_some());
                connected.any(|(id, _)| configuration.is_incoming_voter(*id))
            });
            let stopped = Refusal::Stopped(StopError::Requested.into());
            self.proposals.borrow_mut().set_gate(Err(stopped));
            if self.leads() && others && self.handover.current.is_none() {
                self.begin_handover(HandoverCause::Shutdown, None, None, Stage::Flushing)?;
            }
        }
        Ok(self.handover.current.is_none())
    }

    /// Whether the node is on its way out, though not closing yet.
    pub(super) fn is_draining(&self) -> bool {
        self.handover.drained
    }
}

#[cfg(test)]
mod tests {
    use super::super::repair::testing::{Bench, PATIENCE_NS};
    use super::*;
    use crate::raft::{Message, VoteReply};

    /// Node 1 wins an election, by the vote of node 2.
    fn led() -> Bench {
        let mut bench = Bench::new();
        bench.append(1, 1);
        bench.lose_leader();
        let term = |bench: &Bench| bench.driver.raft().expect("it runs").term();
        for pre in [true, false] {
            let term = if pre { Term(term(&bench).get() + 1) } else { term(&bench) };
            let reply = Message::VoteReply(VoteReply { term, granted: true, pre });
            bench.driver.step(Event::Received { from: NodeId(2), message: reply }).expect("it goes on");
            bench.settle();
        }
        assert!(bench.driver.leads());
        bench
    }

    /// It was forgotten, and the core rested as if leadership had gone to somebody and come to nothing: for eight times as long as the disk
    /// must be slow.
    #[test]
    fn a_handover_for_a_slow_disk_that_nobody_can_take_up_begins_as_soon_as_somebody_can() {
        let mut bench = led();
        let (own, others) = (Nanos(50_000_000), Nanos(1_000_000));
        for node in [2, 3] {
            bench.driver.peers.get_mut(&NodeId(node)).expect("a member").no_space = true;
        }
        let to = |bench: &Bench| bench.driver.handover.current.as_ref().map(|current| current.to);
        bench.driver.handover.disk_is_slow(own, others, vec![NodeId(3), NodeId(2)]);
        bench.driver.advance_handover().expect("it goes on");
        assert_eq!(to(&bench), None);
        bench.driver.now.monotonic_ns += PATIENCE_NS / 2;
        bench.driver.advance_handover().expect("it goes on");
        assert_eq!(to(&bench), None);
        bench.driver.peers.get_mut(&NodeId(2)).expect("a member").no_space = false;
        bench.driver.advance_handover().expect("it goes on");
        assert_eq!(to(&bench), Some(Some(NodeId(2))));
        // It ends with the session.
        let lose = |bench: &mut Bench| {
            bench.disconnect(2);
            bench.connect(2);
        };
        lose(&mut bench);
        assert_eq!(to(&bench), None);
        // Nor while another one is under way, but not for ever: the core is asked then whether the disk is slow still.
        for (span_ns, begins) in [(PATIENCE_NS / 2, true), (PATIENCE_NS, false)] {
            let driver = &mut bench.driver;
            let begun = driver.begin_handover(HandoverCause::Asked, None, None, Stage::SteppedDown);
            begun.expect("it goes on");
            driver.handover.disk_is_slow(own, others, vec![NodeId(2)]);
            driver.advance_handover().expect("it goes on");
            assert!(driver.handover.slow.is_some());
            driver.now.monotonic_ns += span_ns;
            driver.advance_handover().expect("it goes on");
            driver.end_handover(Err(TransferError::NoLeaderYet));
            driver.advance_handover().expect("it goes on");
            assert_eq!(to(&bench), begins.then_some(Some(NodeId(2))));
            lose(&mut bench);
        }
    }
}
