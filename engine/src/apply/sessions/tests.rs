//! What the state machine sees of batches with duplicates, who is told what, and what it costs.

use super::super::Applier;
use crate::apply::Applied;
use crate::error::{ProposeError, Refusal, Refused};
use crate::handle::{Outcome, ProposalSlot};
use crate::ingress::{Arrival, Submission};
use crate::proposals::{ProposalLimits, Proposals};
use crate::recent::Recent;
use crate::sessions::{Control, SessionLimits, SessionRefusal};
use crate::state_machine::{CommittedBatch, Replies, StateMachine};
use crate::tickets::{Deliveries, Ticket};
use bytes::Bytes;
use ringraft_block::{AlignedBuf, Block, GroupId, LogIndex, Pool, Term};
use ringraft_wal::format::{BatchBuilder, BatchInfo, BatchKind, Chain, Seal, SessionRef};
use std::convert::Infallible;
use std::sync::Arc;

mod allocations;

const LIMITS: SessionLimits =
    SessionLimits { timeout_ms: 1_000, window: 64, reply_bytes_max: 200, table_bytes_max: 1 << 20 };

/// Takes note of what it sees, and replies with the command. Nothing is allocated for a command of one letter.
#[derive(Default)]
struct Echo {
    seen: String,
    calls: usize,
    wanted: bool,
}

impl StateMachine for Echo {
    fn apply(&mut self, batch: &CommittedBatch<'_>, replies: &mut Replies) {
        self.calls += 1;
        self.wanted = replies.wanted();
        assert_eq!(batch.command_count(), batch.commands().count());
        for command in batch.commands() {
            self.seen.push_str(std::str::from_utf8(command.bytes).expect("text"));
            let letter = b"abcdefghijklmnopqrstuvwxyz".iter().position(|letter| command.bytes == [*letter]);
            match letter {
                Some(at) => replies.push(Bytes::from_static(&b"abcdefghijklmnopqrstuvwxyz"[at..=at])),
                None => replies.push(command.bytes.to_vec()),
            }
        }
    }
}

/// Commands with the session and sequence of each.
type Commands<'a, T> = &'a [(&'a T, Option<(u64, u64)>)];

struct Rig {
    pool: Pool<AlignedBuf>,
    applier: Applier<Echo, AlignedBuf>,
    recent: Recent<AlignedBuf>,
    proposals: Proposals<AlignedBuf>,
    deliveries: Deliveries,
    last: LogIndex,
    time_ms: u64,
}

impl Rig {
    fn new() -> Self {
        let limits =
            ProposalLimits { command_bytes_max: 100, uncommitted_bytes_max: 100_000, slot_bytes: 4096 };
        let mut proposals = Proposals::new(limits);
        proposals.set_gate(Ok(()));
        Self {
            pool: Pool::new(1 << 20),
            applier: Applier::new(Echo::default()),
            recent: Recent::new(1 << 20),
            proposals,
            deliveries: Deliveries::default(),
            last: LogIndex(0),
            time_ms: 0,
        }
    }

    fn block(&self) -> Block<AlignedBuf> {
        self.pool.take(4096, |bytes| Ok::<_, Infallible>(AlignedBuf::zeroed(bytes))).expect("infallible")
    }

    fn sealing(&self, kind: BatchKind) -> Seal {
        Seal {
            group: GroupId(0),
            term: Term(1),
            first: self.last.next(),
            kind,
            time_ms: self.time_ms,
            previous_chain: Chain::default(),
        }
    }

    fn append(&mut self, (block, info): (Block<AlignedBuf>, BatchInfo)) {
        self.last = info.last;
        self.recent.push(info, block.share());
    }

    /// A batch that another member sealed.
    fn received(&mut self, kind: BatchKind, commands: Commands<'_, [u8]>) {
        let mut builder = BatchBuilder::new(self.block());
        for (bytes, session) in commands {
            let session = session.map(|(session, sequence)| SessionRef { session, sequence });
            builder.push(bytes, session).expect("there is room");
        }
        let sealed = builder.seal(self.sealing(kind));
        self.append(sealed);
    }

    fn register(&mut self) -> u64 {
        self.received(BatchKind::SessionControl, &[(&Control::Register(LIMITS).encode(), None)]);
        self.apply().expect("known");
        self.last.get()
    }

    fn commands(&mut self, commands: Commands<'_, str>) {
        let commands: Vec<_> = commands.iter().map(|(text, session)| (text.as_bytes(), *session)).collect();
        self.received(BatchKind::Commands, &commands);
    }

    /// A command that is proposed here.
    fn propose(&mut self, command: &[u8], session: Option<(u64, u64)>) -> Arc<ProposalSlot> {
        let slot = Arc::new(ProposalSlot::default());
        let ticket = Ticket::Proposal(Arc::clone(&slot));
        self.submit(command, session, ticket);
        slot
    }

    fn request(&mut self, control: Control) -> Arc<ProposalSlot> {
        let slot = Arc::new(ProposalSlot::default());
        let ticket = Ticket::Control(Arc::clone(&slot));
        self.submit(&control.encode(), None, ticket);
        slot
    }

    fn submit(&mut self, command: &[u8], session: Option<(u64, u64)>, ticket: Ticket) {
        if self.proposals.wants_block().is_some() {
            let block = self.block();
            self.proposals.open(block);
        }
        let command = Bytes::copy_from_slice(command);
        let arrival = Arrival::Command(Submission { command, session, ticket });
        self.proposals.take(arrival, &mut self.deliveries);
    }

    /// Seals what was proposed here, as the driver would.
    fn seal(&mut self) -> Option<BatchKind> {
        let kind = match self.proposals.control_slot_bytes() {
            Some(_) => BatchKind::SessionControl,
            None => BatchKind::Commands,
        };
        let sealed = match kind {
            BatchKind::SessionControl => {
                let block = self.block();
                self.proposals.seal_control(block, self.sealing(kind))
            }
            _ => self.proposals.seal(self.sealing(kind))?,
        };
        self.append(sealed);
        Some(kind)
    }

    fn apply(&mut self) -> Result<Applied, String> {
        self.applier.advance(
            self.last,
            self.last,
            usize::MAX,
            &self.recent,
            &mut self.proposals,
            &mut self.deliveries,
        )
    }

    fn seen(&self) -> &str {
        &self.applier.machine().seen
    }
}

fn outcome(slot: &ProposalSlot) -> Outcome {
    slot.take().expect("it is told")
}

fn reply(slot: &ProposalSlot) -> (u64, Bytes) {
    let committed = outcome(slot).unwrap_or_else(|error| panic!("{error}"));
    (committed.index.get(), committed.reply)
}

fn refusal(slot: &ProposalSlot) -> (SessionRefusal, Bytes) {
    match outcome(slot) {
        Err(ProposeError::Refused(Refused { reason: Refusal::Session(refusal), command })) => {
            (refusal, command)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_state_machine_sees_each_command_once_and_in_its_place() {
    let mut rig = Rig::new();
    let id = rig.register();
    rig.commands(&[
        ("a", Some((id, 1))),
        ("b", None),
        ("A", Some((id, 1))),
        ("c", Some((id, 2))),
        ("X", Some((9, 1))),
        ("d", None),
    ]);
    assert_eq!(rig.apply(), Ok(Applied::Current));
    assert_eq!(rig.seen(), "abcd");
    assert!(rig.applier.machine().wanted, "what is kept is computed by all, though nobody waits");
    let calls = rig.applier.machine().calls;
    rig.commands(&[("C", Some((id, 2)))]);
    assert_eq!(rig.apply(), Ok(Applied::Current));
    assert_eq!(rig.applier.machine().calls, calls, "there is nothing to see");
    rig.commands(&[("e", None)]);
    assert_eq!(rig.apply(), Ok(Applied::Current));
    assert_eq!(rig.seen(), "abcde");
    assert!(!rig.applier.machine().wanted, "nothing of it is kept");
}

#[test]
fn each_who_waits_is_told_of_its_own_command_whatever_stands_between() {
    let mut rig = Rig::new();
    let id = rig.register();
    // By an earlier leader, not applied yet when it is proposed here again.
    rig.commands(&[("first", Some((id, 1)))]);
    let again = rig.propose(b"other", Some((id, 1)));
    let fresh = rig.propose(b"fresh", Some((id, 2)));
    let plain = rig.propose(b"plain", None);
    let twice = rig.propose(b"fresh", Some((id, 2)));
    let beyond = rig.propose(b"beyond", Some((id, 99)));
    let last = rig.propose(b"last", None);
    assert_eq!(rig.seal(), Some(BatchKind::Commands));
    assert_eq!(rig.apply(), Ok(Applied::Current));
    assert_eq!(rig.seen(), "firstfreshplainlast");
    assert_eq!(reply(&again), (2, Bytes::from("first")), "where it was applied, and as then");
    assert_eq!(reply(&fresh), (4, Bytes::from("fresh")));
    assert_eq!(reply(&plain), (5, Bytes::from("plain")));
    assert_eq!(reply(&twice), (4, Bytes::from("fresh")));
    let far = SessionRefusal::BeyondWindow { floor: 1, window: 64 };
    assert_eq!(refusal(&beyond), (far, Bytes::from("beyond")), "given back");
    assert_eq!(reply(&last), (8, Bytes::from("last")));
    assert!(rig.proposals.is_idle());
}

#[test]
fn requests_and_commands_take_turns_and_requests_go_as_many_as_fit_at_a_time() {
    let mut rig = Rig::new();
    let id = rig.register();
    let mut fences: Vec<_> =
        (0..120).map(|_| rig.request(Control::Resolve { session: id, sequence: 1 })).collect();
    let command = rig.propose(b"x", Some((id, 1)));
    assert_eq!(rig.seal(), Some(BatchKind::SessionControl));
    assert_eq!(rig.seal(), Some(BatchKind::Commands), "although there are more requests");
    assert_eq!(rig.seal(), Some(BatchKind::SessionControl));
    assert_eq!(rig.seal(), None);
    assert_eq!(rig.apply(), Ok(Applied::Current));
    assert_eq!(refusal(&command).0, SessionRefusal::Fenced);
    for fence in fences.drain(..) {
        assert_eq!(refusal(&fence).0, SessionRefusal::Fenced);
    }
    assert!(rig.proposals.is_idle() && rig.seen().is_empty());
}

#[test]
fn requests_that_were_never_sealed_are_given_back_when_leadership_ends() {
    let mut rig = Rig::new();
    let request = rig.request(Control::Register(LIMITS));
    let unknown = |index| crate::error::UnknownOutcome::LeadershipLost { index };
    rig.proposals.abandon(LogIndex(0), unknown, &Refusal::NotLeader { leader: None }, &mut rig.deliveries);
    assert!(matches!(outcome(&request), Err(ProposeError::Refused(_))));
    assert!(rig.proposals.is_idle());
    assert_eq!(rig.seal(), None);
}

#[test]
fn a_request_of_a_later_version_stops_the_node() {
    let mut rig = Rig::new();
    rig.received(BatchKind::SessionControl, &[(&[9; 16], None)]);
    let error = rig.apply().expect_err("unknown");
    assert!(error.contains("index 1") && error.contains("upgrade"), "{error}");
    assert_eq!(rig.applier.applied(), LogIndex(0));
}
