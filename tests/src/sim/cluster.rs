//! The engine's own driver, core, log and network code as nodes of the simulated world.

use super::buffer::SimBuf;
use super::check::Recorder;
use super::disk::SimDisk;
use super::link::{SimLink, address_of};
use super::node::{
    Answer, Ask, Boot, CANDIDATE, Cluster, ImageLog, LEADER, Lack, Members, Outcome, PORT, RefusedAtOnce,
    SessionAsk, SimNode, StopReason, Tuning, Turned, View, Wish, is_remote,
};
use bytes::Bytes;
use ringraft::config::{Config, MemberConfig};
use ringraft::driver::Driver;
use ringraft::error::{LeaderHint, Refusal, StopError};
use ringraft::handle::{Completion, Handle, HandoverCause, LocalPipeline, Pipeline};
use ringraft::membership::MemberRole;
use ringraft::raft::{Raft, Role, invariants};
use ringraft::runtime::{LocalWakeup, Now, Turn, Wakeup};
use ringraft::state_machine::{CommittedBatch, Replies, Restore, SnapshotReader, StateMachine};
use ringraft_block::{ClusterId, LogIndex, NodeId, Pool};
use ringraft_wal::disk::Disk;
use ringraft_wal::{CopyState, ReadError, Wal, WalError, WalEvent};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

mod operator;
mod reads;
mod sessions;

use operator::Errands;
use reads::Reads;
use sessions::Sessions;

/// Nodes that run the engine.
#[derive(Default)]
pub struct Engine;

/// A process that runs the engine.
pub struct EngineNode {
    driver: Driver<SimDisk, SimLink, Applied>,
    handle: Handle,
    /// One client goes through the queue that other threads use, the next straight into the open batch.
    remote: Pipeline,
    local: LocalPipeline,
    completions: Vec<Completion>,
    reads: Reads,
    errands: Errands,
    sessions: Sessions,
    /// As configured.
    apply_bytes_per_turn: usize,
}

/// The recorder as a state machine.
pub struct Applied {
    recorder: Recorder,
    /// What it was given, in bytes of commands.
    bytes: usize,
    /// Between the begin and the end of a snapshot that it is given.
    restoring: Option<Vec<u8>>,
    /// It has got beyond the start.
    runs: bool,
}

impl StateMachine for Applied {
    fn apply(&mut self, batch: &CommittedBatch<'_>, replies: &mut Replies) {
        assert!(self.restoring.is_none(), "nothing is applied while it is restored");
        for command in batch.commands() {
            let reply = self.recorder.apply(command.index.get(), command.term.get(), command.bytes);
            self.bytes += command.bytes.len();
            self.runs = true;
            if replies.wanted() {
                replies.push(reply.to_le_bytes().to_vec());
            }
        }
    }

    fn snapshot(&mut self) -> Option<Box<dyn SnapshotReader>> {
        assert!(self.restoring.is_none(), "no picture is taken while it is restored");
        let mut bytes = self.recorder.picture();
        // Now and then of some slots and pieces.
        let more = [0, 70_000, 0, 200_000, 0, 3_000, 0][self.bytes % 7];
        bytes.resize(bytes.len() + more, 0x5a);
        Some(Box::new(Bytes::from(bytes)))
    }

    fn query(&self, query: &[u8]) -> Bytes {
        let value = self.recorder.read(query);
        value.map_or_else(Bytes::new, |value| Bytes::copy_from_slice(&value.to_le_bytes()))
    }

    fn restore(&mut self, step: Restore<'_>) -> Result<(), String> {
        match step {
            Restore::Begin { .. } => self.restoring = Some(Vec::new()),
            Restore::Piece(piece) => self.restoring.as_mut().ok_or("no begin")?.extend_from_slice(piece),
            Restore::End => {
                let picture = self.restoring.take().ok_or("no begin")?;
                self.recorder.restore(&picture, self.runs)?;
            }
        }
        Ok(())
    }
}

fn id_of(node: usize) -> NodeId {
    NodeId(node as u64 + 1)
}

fn node_of(id: NodeId) -> usize {
    id.get() as usize - 1
}

fn peer_address(node: usize, port: u16) -> SocketAddr {
    SocketAddr::new(address_of(node), port)
}

/// One of those who listen at the ports, or who joins them.
fn config(node: usize, ports: &[u16], tuning: &Tuning) -> Config {
    let member =
        |(node, port): (usize, &u16)| MemberConfig { id: id_of(node), address: peer_address(node, *port) };
    let members = ports.iter().enumerate().map(member).collect();
    Config {
        insecure: true,
        election_timeout: Duration::from_millis(tuning.election_timeout_ms),
        heartbeat_interval: Duration::from_millis(tuning.heartbeat_ms),
        segment_bytes: tuning.segment_bytes,
        segments_ahead: tuning.segments_ahead,
        batch_bytes_max: tuning.batch_bytes_max,
        command_bytes_max: tuning.command_bytes_max,
        writes_in_flight_max: tuning.writes_in_flight_max,
        window_batches: tuning.window_batches,
        window_bytes: tuning.window_bytes,
        write_bytes_in_flight_max: tuning.write_bytes_in_flight_max,
        uncommitted_bytes_max: tuning.uncommitted_bytes_max,
        ingress_capacity: tuning.ingress_capacity,
        recent_bytes_max: tuning.recent_bytes_max,
        apply_bytes_per_turn: tuning.apply_bytes_per_turn,
        commit_notice_delay: Duration::from_micros(tuning.commit_notice_us),
        snapshot_log_bytes: 0,
        snapshot_log_entries: tuning.snapshot_log_entries,
        log_retention_bytes: tuning.log_retention_bytes,
        reads_max: 256,
        lease_drift_ppm: tuning.lease_drift_ppm,
        session_timeout: Duration::from_millis(tuning.session_timeout_ms),
        session_window: tuning.session_window,
        session_reply_bytes_max: 64,
        session_table_bytes_max: tuning.sessions_max * (256 + 40 * u64::from(tuning.session_window) + 64),
        read_timeout: Duration::from_millis(tuning.election_timeout_ms * tuning.read_timeouts),
        // A disk here takes some 60 microseconds, and is up to a hundred times as slow, never for long.
        disk_slow_floor: Duration::from_millis(1),
        disk_slow_timeout: Some(Duration::from_millis(tuning.election_timeout_ms)),
        ..Config::new(ClusterId(0x5eed), id_of(node), members, "simulated")
    }
}

impl Cluster for Engine {
    type Node = EngineNode;

    fn boot(&self, boot: Boot) -> EngineNode {
        let Boot { node, founders, ports, joins, disk, link, recorder, seed, tuning } = boot;
        // Who joins tries everybody: members may be anywhere by then.
        let known = if joins { ports.len() } else { founders };
        let config = Config { join: joins, ..config(node, &ports[..known], &tuning) };
        let wakeup = Arc::new(Wakeup::new());
        let machine = Applied { recorder, bytes: 0, restoring: None, runs: false };
        let (driver, handle) = Driver::with_backend(config, seed, wakeup, disk, link, machine)
            .unwrap_or_else(|error| panic!("{error}"));
        let local = driver.local_handle(LocalWakeup::default()).pipeline();
        let (remote, completions) = (handle.pipeline(), Vec::new());
        let apply_bytes_per_turn = tuning.apply_bytes_per_turn;
        let (reads, errands) = (Reads::default(), Errands::default());
        let sessions = Sessions::new(tuning.session_window);
        EngineNode {
            driver,
            remote,
            local,
            handle,
            completions,
            reads,
            errands,
            sessions,
            apply_bytes_per_turn,
        }
    }

    fn recover(
        &self,
        node: usize,
        nodes: usize,
        tuning: &Tuning,
        mut image: SimDisk,
    ) -> Result<ImageLog, String> {
        let config = config(node, &vec![PORT; nodes.max(node + 1)], tuning).log_config(0);
        let mut wal: Wal<SimDisk> = Wal::open(config, Pool::<SimBuf>::new(16 << 20));
        let (mut done, mut events) = (Vec::new(), VecDeque::new());
        // Without latency, each poll brings all that was submitted before it.
        for _ in 0..100_000 {
            wal.advance(&mut image, &mut events);
            image.poll(&mut done);
            for completion in done.drain(..) {
                wal.handle(&mut image, completion, &mut events);
            }
            while let Some(event) = events.pop_front() {
                match event {
                    WalEvent::Opened(_) => {
                        let chains = wal.batches().map(|info| (info.last.get(), info.chain.0)).collect();
                        let start = wal.log_start().index.get();
                        return Ok(ImageLog { last: wal.last_index().get(), start, chains });
                    }
                    WalEvent::Poisoned(error) => return Err(error.to_string()),
                    _ => {}
                }
            }
        }
        Err("recovery does not end".to_owned())
    }
}

impl SimNode for EngineNode {
    fn turn(&mut self, monotonic_ns: u64, wall_ms: u64) -> Turned {
        self.remote.flush();
        let before = self.driver.machine().bytes;
        let outcome = self.driver.turn(Now { monotonic_ns, wall_ms });
        let full = self.driver.machine().bytes - before >= self.apply_bytes_per_turn;
        let behind = self.driver.raft().is_some_and(|raft| raft.commit() > self.driver.applied().0);
        Turned {
            more: outcome.more,
            next_deadline_ns: outcome.next_deadline_ns,
            stopped: outcome.stop,
            apply_paused: full && behind,
        }
    }

    fn rouse(&mut self) {
        self.driver.rouse();
    }

    fn propose(&mut self, tag: u64, command: &[u8]) -> Result<(), RefusedAtOnce> {
        let submitted = match tag {
            _ if !is_remote(tag) => self.local.submit(tag, command),
            // With whatever else comes before the next turn.
            _ if tag % 2 == 1 => {
                self.remote.enqueue(tag, command);
                Ok(())
            }
            _ => self.remote.submit(tag, command.to_vec()),
        };
        submitted.map_err(|refused| RefusedAtOnce { leader: leader_in(&refused.reason) })
    }

    fn ask(&mut self, tag: u64, ask: Ask, read: &[u8]) -> Result<(), RefusedAtOnce> {
        self.reads.ask(&self.handle, tag, ask, read);
        Ok(())
    }

    fn in_session(&mut self, tag: u64, ask: SessionAsk, command: &[u8]) -> bool {
        match ask {
            SessionAsk::Propose(place) if !is_remote(tag) => {
                // The client keeps the books itself.
                let under = (place.session, place.sequence);
                if let Err(refused) = self.local.submit_in_session(tag, under, command) {
                    self.completions.push(Completion { tag, outcome: Err(refused.into()) });
                }
            }
            ask => self.sessions.ask(&self.handle, tag, ask, command),
        }
        true
    }

    fn transfer(&mut self, tag: u64, to: Option<usize>) -> bool {
        self.errands.transfer(&self.handle, tag, to);
        true
    }

    fn change(&mut self, tag: u64, wish: Wish, ports: &[u16]) -> bool {
        self.errands.change(&self.handle, tag, wish, ports);
        true
    }

    fn ports(&self, nodes: usize) -> Option<(u64, Vec<Option<u16>>)> {
        let raft = self.driver.raft()?;
        let (index, configuration) = raft.configuration_at(raft.commit())?;
        let port = |node| {
            let address: SocketAddr = configuration.member(id_of(node))?.address.parse().ok()?;
            Some(address.port())
        };
        Some((index.get(), (0..nodes).map(port).collect()))
    }

    fn snapshot(&mut self) -> bool {
        // Nobody waits for the answer.
        drop(self.handle.snapshot());
        true
    }

    fn members(&self) -> Members {
        let Some(raft) = self.driver.raft() else { return Members::default() };
        let configuration = raft.configuration();
        let mut members = Members {
            index: raft.configuration_index().get(),
            settled: configuration.is_settled(),
            ..Members::default()
        };
        for member in configuration.members() {
            let set = match member.role {
                MemberRole::Voter => &mut members.incoming,
                MemberRole::Learner => &mut members.learners,
            };
            *set |= 1 << node_of(member.id);
        }
        for id in configuration.outgoing() {
            members.outgoing |= 1 << node_of(*id);
        }
        members
    }

    fn outcomes(&mut self, out: &mut Vec<(u64, Outcome)>) {
        self.errands.outcomes(out);
    }

    fn shutdown(&mut self) {
        self.handle.shutdown();
    }

    fn answers(&mut self, out: &mut Vec<(u64, Answer)>) {
        self.local.completions(&mut self.completions);
        self.remote.completions(&mut self.completions);
        out.extend(self.completions.drain(..).map(|done| (done.tag, sessions::answer(done.outcome))));
        self.sessions.answers(out);
        self.reads.answers(out);
    }

    fn view(&self) -> View {
        let Some(raft) = self.driver.raft() else { return View::default() };
        View {
            formed: true,
            role: match raft.role() {
                Role::Follower => 0,
                Role::PreCandidate => 1,
                Role::Candidate => CANDIDATE,
                Role::Leader => LEADER,
            },
            term: raft.term().get(),
            leader: raft.leader().map(node_of),
            vote: raft.vote().map(node_of),
            last: raft.last().index.get(),
            written: self.driver.wal().last_index().get(),
            durable: raft.durable().get(),
            commit: raft.commit().get(),
            applied: self.driver.applied().0.get(),
            epoch: raft.epoch().0,
            rollovers: self.driver.wal().rollovers(),
            met: self.driver.acquaintances_met(),
        }
    }

    fn was_told_to_campaign(&self) -> bool {
        self.driver.raft().is_some_and(Raft::was_told_to_campaign)
    }

    fn has_session_with(&self, other: usize) -> bool {
        self.driver.has_session_with(id_of(other))
    }

    fn is_closing(&self) -> bool {
        self.driver.is_closing()
    }

    fn hands_over(&self) -> bool {
        self.driver.raft().is_some_and(|raft| raft.role() == Role::Leader && !raft.may_lease())
    }

    fn matched(&self, peer: usize) -> Option<u64> {
        Some(self.driver.raft()?.progress(id_of(peer))?.matched.get())
    }

    fn chain_at(&self, index: u64) -> Option<[u8; 16]> {
        self.driver.wal().chain_at(LogIndex(index)).map(|chain| chain.0)
    }

    fn chains(&self) -> Box<dyn Iterator<Item = (u64, [u8; 16])> + '_> {
        Box::new(self.driver.wal().batches().map(|info| (info.last.get(), info.chain.0)))
    }

    fn log_start(&self) -> u64 {
        self.driver.raft().map_or(0, |raft| raft.log_start().index.get())
    }

    fn describe(&self) -> String {
        let raft = self.driver.raft().map(Raft::status);
        let damage = self.handle.status().damage;
        format!("{raft:?}, {damage:?}, {:?}, applied {:?}", self.driver.wal().stats(), self.driver.applied())
    }

    fn stop_reason(&self) -> Option<StopReason> {
        let cause = self.handle.status().stopped?;
        let copies_gone = matches!(cause.error(), StopError::CopiesGone { .. });
        let disk = is_of_disk(cause.error());
        Some(StopReason { text: cause.to_string(), orderly: cause.is_orderly(), copies_gone, disk })
    }

    fn is_whole(&self) -> bool {
        self.driver.raft().is_some_and(|raft| {
            let restraint = raft.restraint();
            restraint.damaged_from.is_none() && restraint.claim.is_none() && !restraint.state_lost
        })
    }

    fn frames_damaged(&self) -> u64 {
        self.driver.frames_damaged()
    }

    fn left_for_slow_disk(&self) -> u64 {
        let last = self.driver.handed_over();
        let slow = last.filter(|last| matches!(last.cause, HandoverCause::DiskSlow { .. }));
        slow.map_or(0, |last| last.term.get())
    }

    fn lack(&self) -> Lack {
        let Some(raft) = self.driver.raft() else { return Lack::default() };
        let state = invariants::State::of(raft);
        Lack {
            term: state.term.get(),
            acked: state.acked.get(),
            unread: state.damaged.iter().map(|first| first.get()).collect(),
            claim: state.restraint.claim.filter(|claim| !claim.certain).map(|claim| claim.term.get()),
        }
    }

    fn check(&self) -> Result<(), String> {
        match self.driver.raft() {
            Some(raft) => invariants::check(raft).map_err(|broken| format!("{broken:?}")),
            None => Ok(()),
        }
    }
}

fn leader_in(refusal: &Refusal) -> Option<usize> {
    match refusal {
        Refusal::NotLeader { leader: Some(LeaderHint { id, .. }) } => Some(node_of(*id)),
        _ => None,
    }
}

/// Whether a disk that fails operations, or leaves them unanswered, may make a node stop for this reason. Everything else that
/// stops one is a defect, whatever its disk does.
fn is_of_disk(error: &StopError) -> bool {
    match error {
        StopError::Log(error) => match error {
            WalError::Disk { .. } | WalError::ShortWrite { .. } => true,
            WalError::HardStateLost { a, b } => {
                [a, b].iter().any(|copy| matches!(copy, CopyState::Unreadable(_)))
            }
            _ => false,
        },
        StopError::Read(error) => matches!(error, ReadError::Disk(_) | ReadError::Damaged { .. }),
        StopError::CopiesGone { .. } | StopError::DiskStalled { .. } | StopError::Restore { .. } => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringraft_wal::disk::{DiskError, DiskErrorKind};

    #[test]
    fn a_failing_disk_excuses_only_what_a_disk_can_do() {
        let io = || DiskError { kind: DiskErrorKind::Io, operation: "write", os_error: None };
        let what = "writing a batch";
        let lost = |a| StopError::Log(WalError::HardStateLost { a, b: CopyState::Missing });
        for error in [
            StopError::Log(WalError::Disk { what, error: io() }),
            StopError::Log(WalError::ShortWrite { what, asked: 2, written: 1 }),
            lost(CopyState::Unreadable(io())),
            StopError::Read(ReadError::Disk(io())),
            StopError::DiskStalled { millis: 9 },
        ] {
            assert!(is_of_disk(&error), "{error}");
        }
        for error in [
            StopError::Requested,
            StopError::Log(WalError::Protocol { what }),
            StopError::Log(WalError::HardStateBehind { log_epoch: 2, hard_state_epoch: 1 }),
            lost(CopyState::Missing),
            StopError::Read(ReadError::Busy),
            StopError::Invariant(String::new()),
        ] {
            assert!(!is_of_disk(&error), "{error}");
        }
    }
}
