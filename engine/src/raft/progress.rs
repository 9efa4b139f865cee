//! What a leader knows of one peer.
//!
//! A peer is in one of three states, with etcd's names:
//!
//! - **Probe**: where the logs agree is not known. One append is outstanding, with one batch; the next leaves when
//!   it is answered, or as an empty one with the next heartbeat.
//! - **Replicate**: appends are pipelined, `next` runs ahead of the acks, as far as the window allows.
//! - **Snapshot**: the leader's log no longer begins at what the peer needs.
//!
//! Invariants, checked by [`Progress::check`] after every event in debug builds:
//!
//! 1. `next > matched`: what is acknowledged is never sent again in earnest.
//! 2. `matched` is a batch end of the leader's log, durable at the peer, and never falls within a session.
//! 3. Probe: at most one batch is in flight, and it starts at `next`.
//! 4. Replicate: the batches in flight end at `next - 1` and lie above `matched`; their number and bytes are
//!    within the window, but that one batch is always let through.
//! 5. Snapshot: nothing is in flight.

use super::{BatchRun, Nanos, RaftConfig, Round};
use crate::mutants::{self, Mutant};
use ringraft_block::{LogIndex, NodeId};
use std::collections::VecDeque;

/// How a leader replicates to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReplicationState {
    /// Looking for the position at which the logs agree.
    Probe,
    /// Sending ahead of the acks.
    Replicate,
    /// The log no longer holds what the peer needs.
    Snapshot,
}

/// What a leader knows of a peer, to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgressView {
    /// The peer.
    pub id: NodeId,
    /// How it is being replicated to.
    pub state: ReplicationState,
    /// The highest index acknowledged as durable.
    pub matched: LogIndex,
    /// The next index to send.
    pub next: LogIndex,
    /// Batches sent and not acknowledged.
    pub inflight_batches: usize,
    /// Their image bytes.
    pub inflight_bytes: u64,
    /// The highest round returned.
    pub round: Round,
    /// When that round was sent, at the latest; at first, when this node became leader.
    pub contact: Nanos,
    /// Transfers of snapshots that have failed since the last one that did not.
    pub snapshots_failed: u32,
}

/// What a leader knows of a peer.
#[derive(Clone, Debug)]
pub(super) struct Progress {
    id: NodeId,
    state: ReplicationState,
    matched: LogIndex,
    next: LogIndex,
    /// Only in Probe: an append is outstanding, so the next waits for its answer or the next heartbeat.
    waiting: bool,
    inflight: VecDeque<Sent>,
    inflight_bytes: u64,
    /// Where the pipeline stood at the last heartbeat: the peer should have it by the next one, and is asked.
    mark: LogIndex,
    round: Round,
    contact: Nanos,
    /// When an answer was last asked for.
    asked_at: Nanos,
    /// When the commit index has to be sent alone.
    notice_due: Option<Nanos>,
    /// Only in Snapshot: whether one has been asked for, and otherwise from when on it may be.
    snapshot_asked: bool,
    snapshot_at: Nanos,
    snapshots_failed: u32,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    first: LogIndex,
    last: LogIndex,
    bytes: u32,
}

impl Progress {
    /// A new leader's view: nothing is known, and the end of its log (`last`) is the first guess.
    pub(super) fn new(id: NodeId, last: LogIndex, now: Nanos) -> Self {
        Self {
            id,
            state: ReplicationState::Probe,
            matched: LogIndex(0),
            next: last.next(),
            waiting: false,
            inflight: VecDeque::new(),
            inflight_bytes: 0,
            mark: LogIndex(0),
            round: Round(0),
            contact: now,
            asked_at: now,
            notice_due: None,
            snapshot_asked: false,
            snapshot_at: Nanos(0),
            snapshots_failed: 0,
        }
    }

    pub(super) fn id(&self) -> NodeId {
        self.id
    }

    pub(super) fn matched(&self) -> LogIndex {
        self.matched
    }

    pub(super) fn next(&self) -> LogIndex {
        self.next
    }

    pub(super) fn contact(&self) -> Nanos {
        self.contact
    }

    pub(super) fn round(&self) -> Round {
        self.round
    }

    pub(super) fn view(&self) -> ProgressView {
        ProgressView {
            id: self.id,
            state: self.state,
            matched: self.matched,
            next: self.next,
            inflight_batches: self.inflight.len(),
            inflight_bytes: self.inflight_bytes,
            round: self.round,
            contact: self.contact,
            snapshots_failed: self.snapshots_failed,
        }
    }

    // What is sent.

    /// Whether an append may leave in this state: in Probe with or without a batch, in Replicate only with one.
    pub(super) fn may_send(&self, batch: Option<&BatchRun>, config: &RaftConfig) -> bool {
        match self.state {
            ReplicationState::Probe => !self.waiting,
            ReplicationState::Replicate => batch.is_some_and(|batch| {
                self.inflight.is_empty()
                    || (self.inflight.len() < config.window_batches
                        && self.inflight_bytes + u64::from(batch.bytes) <= config.window_bytes)
            }),
            ReplicationState::Snapshot => false,
        }
    }

    /// An append after `next - 1` leaves.
    pub(super) fn sent(&mut self, batch: Option<&BatchRun>) {
        debug_assert!(batch.is_none_or(|batch| batch.first == self.next));
        match self.state {
            ReplicationState::Probe => {
                self.waiting = true;
                self.clear_inflight();
            }
            ReplicationState::Replicate => {}
            ReplicationState::Snapshot => return,
        }
        if let Some(batch) = batch {
            self.inflight.push_back(Sent { first: batch.first, last: batch.last, bytes: batch.bytes });
            self.inflight_bytes += u64::from(batch.bytes);
            if self.state == ReplicationState::Replicate {
                self.next = batch.last.next();
            }
        }
    }

    /// The position that a heartbeat asks about. In Probe the batch sent along with the unanswered probe is taken
    /// for lost: its answer does not wait for the disk. In Replicate it is where the pipeline stood at the
    /// previous heartbeat: a peer that misses it lost something without the session being lost.
    pub(super) fn heartbeat_position(&mut self, start: LogIndex) -> LogIndex {
        match self.state {
            ReplicationState::Probe => {
                self.waiting = true;
                self.clear_inflight();
                self.next.previous()
            }
            ReplicationState::Replicate => {
                let position = self.mark.max(self.matched);
                self.mark = self.next.previous();
                position
            }
            ReplicationState::Snapshot => start,
        }
    }

    /// Whether an append that leaves now asks for an answer. Half an interval early, so that traffic asks before
    /// a heartbeat would have to.
    pub(super) fn should_ask(&self, now: Nanos, config: &RaftConfig) -> bool {
        self.state != ReplicationState::Replicate
            || now.since(self.asked_at).0 >= config.heartbeat_interval.0 / 2
    }

    /// An append leaves with the current commit index, and asks for an answer or not.
    pub(super) fn told(&mut self, asked: bool, now: Nanos) {
        self.notice_due = None;
        if asked {
            self.asked_at = now;
        }
    }

    pub(super) fn heartbeat_due(&self, config: &RaftConfig) -> Nanos {
        self.asked_at.plus(config.heartbeat_interval)
    }

    pub(super) fn notice_due(&self) -> Option<Nanos> {
        self.notice_due
    }

    /// The commit index rose: it has to be told by `due`, with an append or alone. A peer that is not in
    /// Replicate learns it with what it is sent anyway.
    pub(super) fn owe_notice(&mut self, due: Nanos) {
        if self.state == ReplicationState::Replicate {
            self.notice_due.get_or_insert(due);
        }
    }

    // What is answered.

    /// A round came back that was sent at `sent_at` or later.
    pub(super) fn returned(&mut self, round: Round, sent_at: Option<Nanos>) {
        if round > self.round {
            self.round = round;
            self.contact = self.contact.max(sent_at.unwrap_or_default());
        }
    }

    /// The peer is durable and equal up to `matched`.
    pub(super) fn acked(&mut self, matched: LogIndex) {
        let answered_position = self.next.previous();
        let matched = if mutants::active(Mutant::MatchFromSent) {
            self.inflight.back().map_or(matched, |sent| sent.last)
        } else {
            matched
        };
        self.matched = self.matched.max(matched);
        if mutants::active(Mutant::HeartbeatAckCountedAsMatch) {
            self.matched = self.matched.max(self.mark);
        }
        while self.inflight.front().is_some_and(|sent| sent.last <= self.matched) {
            if let Some(sent) = self.inflight.pop_front() {
                self.inflight_bytes -= u64::from(sent.bytes);
            }
        }
        match self.state {
            // An older ack says nothing about the position that is being probed.
            ReplicationState::Probe if matched < answered_position => {}
            ReplicationState::Probe | ReplicationState::Snapshot => {
                self.state = ReplicationState::Replicate;
                self.waiting = false;
                self.mark = self.matched;
                self.next = self.inflight.back().map_or(self.matched, |sent| sent.last).next();
            }
            ReplicationState::Replicate => self.next = self.next.max(self.matched.next()),
        }
    }

    /// The peer refused an append after `refused`; where the logs may agree is at `agree` at the most. False if
    /// that is old news.
    pub(super) fn rejected(&mut self, refused: LogIndex, agree: Option<LogIndex>) -> bool {
        let current = match self.state {
            ReplicationState::Probe => refused == self.next.previous() && refused > self.matched,
            ReplicationState::Replicate => refused > self.matched && refused < self.next,
            ReplicationState::Snapshot => false,
        };
        if !current && !mutants::active(Mutant::StaleRejectionTaken) {
            return false;
        }
        self.clear_inflight();
        match agree {
            Some(agree) if mutants::active(Mutant::StaleRejectionTaken) => self.probe_after(agree),
            Some(agree) => self.probe_after(agree.max(self.matched)),
            None => self.needs_snapshot(),
        }
        true
    }

    /// The session began anew, or ended: what was in flight is lost. Until there is a session again nothing but
    /// heartbeats is tried. What was matched has to be said again: the peer may have restarted, and damage to its log may
    /// have taken what it had.
    pub(super) fn new_session(&mut self, connected: bool) {
        self.clear_inflight();
        self.notice_due = None;
        if self.state != ReplicationState::Snapshot {
            // In Probe the position being asked about stays: it may be far above a match that is not known yet.
            let position =
                if self.state == ReplicationState::Probe { self.next.previous() } else { self.matched };
            self.probe_after(position);
            self.waiting = !connected;
        }
        // A transfer ends with the session, and the next begins with the next one.
        self.snapshot_asked = !connected;
        self.snapshot_at = Nanos(0);
        self.matched = LogIndex(0);
    }

    /// The leader's log no longer begins at `next`.
    pub(super) fn needs_snapshot(&mut self) {
        if self.state != ReplicationState::Snapshot {
            (self.snapshot_asked, self.snapshot_at) = (false, Nanos(0));
        }
        self.clear_inflight();
        self.waiting = false;
        self.notice_due = None;
        self.state = ReplicationState::Snapshot;
    }

    /// Whether a snapshot is to be sent now. True once for each.
    pub(super) fn asks_for_snapshot(&mut self, now: Nanos) -> bool {
        let asks =
            self.state == ReplicationState::Snapshot && !self.snapshot_asked && now >= self.snapshot_at;
        self.snapshot_asked |= asks;
        asks
    }

    /// A transfer has ended, with the peer's log at `reached`, if the leader's log holds that, or has failed.
    pub(super) fn snapshot_ended(&mut self, reached: Option<LogIndex>, failed: bool, retry_at: Nanos) {
        if self.state != ReplicationState::Snapshot {
            return;
        }
        self.snapshots_failed = if failed { self.snapshots_failed.saturating_add(1) } else { 0 };
        (self.snapshot_asked, self.snapshot_at) = (false, retry_at);
        if let Some(reached) = reached {
            self.probe_after(reached.max(self.matched));
        }
    }

    fn probe_after(&mut self, position: LogIndex) {
        self.state = ReplicationState::Probe;
        self.waiting = false;
        self.notice_due = None;
        self.next = if mutants::active(Mutant::NextBelowOne) { position } else { position.next() };
    }

    fn clear_inflight(&mut self) {
        if mutants::active(Mutant::WindowNotResetOnReconnect) {
            return;
        }
        self.inflight.clear();
        self.inflight_bytes = 0;
    }

    /// What makes two of them behave alike, times and rounds aside.
    #[cfg(test)]
    pub(super) fn fingerprint(&self, into: &mut impl std::hash::Hasher) {
        use std::hash::Hash;
        let Self { id, state, matched, next, waiting, inflight, mark, notice_due, round, .. } = self;
        // Whether it was heard at all in this term decides who may take over.
        (id, state, matched, next, waiting, mark, notice_due.is_some(), *round > Round(0)).hash(into);
        inflight.len().hash(into);
        inflight.iter().for_each(|sent| (sent.first, sent.last).hash(into));
    }

    /// The invariants above, as far as they can be seen from here.
    pub(super) fn check(&self, config: &RaftConfig) -> Result<(), &'static str> {
        if self.next <= self.matched {
            return Err("next is not above match");
        }
        if self.inflight_bytes != self.inflight.iter().map(|sent| u64::from(sent.bytes)).sum::<u64>() {
            return Err("the bytes in flight do not add up");
        }
        let window = self.inflight.len() <= 1
            || (self.inflight.len() <= config.window_batches && self.inflight_bytes <= config.window_bytes);
        if !window {
            return Err("the window is exceeded");
        }
        let shape = match self.state {
            ReplicationState::Probe => {
                self.inflight.len() <= 1 && self.inflight.iter().all(|sent| sent.first == self.next)
            }
            ReplicationState::Replicate => {
                self.inflight.front().is_none_or(|sent| sent.first > self.matched)
                    && self.inflight.back().is_none_or(|sent| sent.last.next() == self.next)
            }
            ReplicationState::Snapshot => self.inflight.is_empty(),
        };
        if shape { Ok(()) } else { Err("what is in flight does not fit the state") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> RaftConfig {
        RaftConfig { window_batches: 3, window_bytes: 1_000, ..RaftConfig::new(NodeId(1), 0) }
    }

    fn run(first: u64, last: u64, bytes: u32) -> BatchRun {
        BatchRun { first: LogIndex(first), last: LogIndex(last), term: ringraft_block::Term(1), bytes }
    }

    fn replicating() -> Progress {
        let mut progress = Progress::new(NodeId(2), LogIndex(0), Nanos(0));
        progress.sent(None);
        progress.acked(LogIndex(0));
        assert_eq!(progress.state, ReplicationState::Replicate);
        progress
    }

    #[test]
    fn a_probe_lets_one_append_out_until_it_is_answered() {
        let mut progress = Progress::new(NodeId(2), LogIndex(4), Nanos(0));
        let batch = run(5, 6, 10);
        assert!(progress.may_send(Some(&batch), &config()));
        progress.sent(Some(&batch));
        assert!(!progress.may_send(Some(&batch), &config()));
        progress.acked(LogIndex(3));
        assert_eq!(progress.state, ReplicationState::Probe, "an older ack says nothing about the position");
        progress.acked(LogIndex(4));
        assert_eq!((progress.state, progress.next()), (ReplicationState::Replicate, LogIndex(7)));
        assert_eq!(progress.view().inflight_batches, 1);
        assert_eq!(progress.check(&config()), Ok(()));
    }

    #[test]
    fn a_heartbeat_takes_an_unanswered_probes_batch_for_lost() {
        let mut progress = Progress::new(NodeId(2), LogIndex(4), Nanos(0));
        progress.sent(Some(&run(5, 6, 10)));
        assert_eq!(progress.heartbeat_position(LogIndex(0)), LogIndex(4));
        progress.acked(LogIndex(4));
        assert_eq!((progress.state, progress.next()), (ReplicationState::Replicate, LogIndex(5)));
    }

    #[test]
    fn the_window_is_bounded_in_batches_and_in_bytes_and_always_lets_one_through() {
        let mut progress = replicating();
        let large = run(1, 1, 5_000);
        assert!(progress.may_send(Some(&large), &config()));
        progress.sent(Some(&large));
        assert!(!progress.may_send(Some(&run(2, 2, 1)), &config()), "bytes");
        progress.acked(LogIndex(1));
        for index in 2..=4 {
            assert!(progress.may_send(Some(&run(index, index, 10)), &config()));
            progress.sent(Some(&run(index, index, 10)));
        }
        assert!(!progress.may_send(Some(&run(5, 5, 10)), &config()), "batches");
        progress.acked(LogIndex(3));
        assert_eq!((progress.view().inflight_batches, progress.view().inflight_bytes), (1, 10));
        assert_eq!(progress.check(&config()), Ok(()));
    }

    #[test]
    fn old_rejections_are_ignored() {
        let mut progress = replicating();
        for index in 1..=3 {
            progress.sent(Some(&run(index, index, 10)));
        }
        progress.acked(LogIndex(1));
        assert!(!progress.rejected(LogIndex(1), Some(LogIndex(0))), "acknowledged since");
        assert!(!progress.rejected(LogIndex(4), Some(LogIndex(0))), "never sent");
        assert!(progress.rejected(LogIndex(3), Some(LogIndex(2))));
        assert_eq!((progress.state, progress.next()), (ReplicationState::Probe, LogIndex(3)));
        assert!(!progress.rejected(LogIndex(3), Some(LogIndex(1))), "not the position being probed");
        assert!(progress.rejected(LogIndex(2), Some(LogIndex(0))));
        assert_eq!(progress.next(), LogIndex(2), "not below what was acknowledged");
    }

    #[test]
    fn a_new_session_goes_back_to_what_was_acknowledged() {
        let mut progress = replicating();
        for index in 1..=3 {
            progress.sent(Some(&run(index, index, 10)));
        }
        progress.acked(LogIndex(1));
        progress.new_session(false);
        assert_eq!((progress.state, progress.next()), (ReplicationState::Probe, LogIndex(2)));
        assert!(!progress.may_send(None, &config()), "nobody is there");
        progress.new_session(true);
        assert!(progress.may_send(Some(&run(2, 2, 10)), &config()));
        assert_eq!(progress.view().inflight_bytes, 0);
    }
}
