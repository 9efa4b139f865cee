//! What a node says of itself, and how threads wait for it to say something else.

use super::lock;
use crate::driver::HandedOver;
use crate::error::{LeaderHint, StopCause};
use crate::membership::Membership;
use crate::raft::{Claim, Role};
use crate::wire::AckStages;
use ringraft_block::{LogIndex, NodeId, Term};
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a node is and knows, at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// This node.
    pub node: NodeId,
    /// Whether the cluster has been formed, as far as this node knows.
    pub formed: bool,
    /// Its role. A node that is not yet part of a formed cluster is a follower.
    pub role: Role,
    /// Its term.
    pub term: Term,
    /// The leader of the term, where known.
    pub leader: Option<LeaderHint>,
    /// The end of its log.
    pub last: LogIndex,
    /// How far its own log is durable.
    pub durable: LogIndex,
    /// How far the log is known to be committed.
    pub commit: LogIndex,
    /// How far it has been applied here; 0 while the state is lost ([`SnapshotStatus::state_lost`]).
    pub applied: LogIndex,
    /// The chain of the log at `applied`.
    pub applied_chain: [u8; 16],
    /// What is wrong with its disk or its log, and what it waits for.
    pub damage: DamageStatus,
    /// Its snapshots, and those under way.
    pub snapshot: SnapshotStatus,
    /// What a leader knows of the other members, by id; empty while this node does not lead.
    pub peers: Vec<PeerStatus>,
    /// Frames of other members that arrived damaged since the start. On a sound network there are none.
    pub frames_damaged: u64,
    /// How this node last handed leadership over to another since its start, if it has.
    pub handed_over: Option<HandedOver>,
    /// The address that it listens on, once it does.
    pub listening: Option<SocketAddr>,
    /// Why the node has stopped, if it has.
    pub stopped: Option<StopCause>,
    /// Who is in the cluster.
    pub membership: Arc<Membership>,
}

/// What is wrong with a node's disk or log, and what it waits for. All of it is empty on a healthy node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DamageStatus {
    /// Batches of the log that cannot be read and are being fetched from the others.
    pub batches: usize,
    /// The first index of the first of them: nothing from there on is applied here.
    pub first: Option<LogIndex>,
    /// More was in the log than can be read: until that is settled the node does not lead, and may not vote.
    pub claim: Option<Claim>,
    /// Members without whom it stays open for a while now what the log lacks: they do not answer, or what they answer leaves
    /// it in doubt. Without a leader nothing goes on before that is settled: bring back those that are down, and look at the
    /// status of the others, which may lack something themselves.
    pub waiting_for: Vec<NodeId>,
    /// Batches repaired since the start.
    pub repaired: u64,
    /// For how many milliseconds the oldest write has been under way, once the disk counts as stalled.
    pub disk_stalled_ms: Option<u64>,
}

/// The snapshots of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotStatus {
    /// The last index that its newest snapshot covers.
    pub last: Option<LogIndex>,
    /// What that takes on its disk.
    pub bytes: u64,
    /// One is being taken.
    pub taking: bool,
    /// One is being read into the state machine, which applies nothing meanwhile.
    pub restoring: bool,
    /// What was applied before the log's start cannot be read here, and is fetched from the leader: meanwhile nothing is
    /// applied, reads wait or are refused, and the node does not lead.
    pub state_lost: bool,
    /// Snapshots on their way to other members, or from one.
    pub installs: Vec<InstallStatus>,
}

/// A snapshot on its way from one member to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InstallStatus {
    /// The other member.
    pub peer: NodeId,
    /// Whether it comes from there.
    pub incoming: bool,
    /// The last index that it covers.
    pub last: LogIndex,
    /// How far it has come, in bytes.
    pub bytes_done: u64,
    /// Its size.
    pub bytes: u64,
}

/// What a leader knows of another member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    /// The member.
    pub id: NodeId,
    /// Whether there is a session with it.
    pub connected: bool,
    /// The highest index that it has acknowledged as durable.
    pub matched: LogIndex,
    /// Where it spent its time on the newest batch that it made durable, as it said last in this session and term. A large
    /// `durable_us` is a slow disk or a busy core there; what a command waits beyond it is the network, or this leader.
    pub stages: Option<AckStages>,
    /// Its log has no space for more.
    pub no_space: bool,
    /// How long ago something of it last arrived here, in the present session or the last one. `None`: there has been none
    /// since this node started, or since that one became a member. What has waited unread here does not count.
    ///
    /// This and [`PeerStatus::sent_age`] are by the node's clock, to a millisecond, as of the leader's last turn; it takes one
    /// with each heartbeat at least.
    pub heard_age: Option<Duration>,
    /// How long ago the transport last took something for it, whether or not that has arrived; `None` as with
    /// [`PeerStatus::heard_age`]. Large beside a session: the transport is full, the peer does not read.
    pub sent_age: Option<Duration>,
}

impl Status {
    pub(super) fn unstarted(node: NodeId) -> Self {
        Self {
            node,
            formed: false,
            role: Role::Follower,
            term: Term(0),
            leader: None,
            last: LogIndex(0),
            durable: LogIndex(0),
            commit: LogIndex(0),
            applied: LogIndex(0),
            applied_chain: [0; 16],
            damage: DamageStatus::default(),
            snapshot: SnapshotStatus::default(),
            peers: Vec::new(),
            frames_damaged: 0,
            handed_over: None,
            listening: None,
            stopped: None,
            membership: Arc::default(),
        }
    }
}

/// The status, and those who wait for it to change. A change that nobody waits for costs no system call.
pub(crate) struct StatusCell {
    state: Mutex<(Status, usize)>,
    changed: Condvar,
}

impl StatusCell {
    pub(crate) fn new(status: Status) -> Self {
        Self { state: Mutex::new((status, 0)), changed: Condvar::new() }
    }

    pub(crate) fn get(&self) -> Status {
        lock(&self.state).0.clone()
    }

    pub(crate) fn publish(&self, change: impl FnOnce(&mut Status)) {
        let watched = {
            let mut state = lock(&self.state);
            change(&mut state.0);
            state.1 > 0
        };
        if watched {
            self.changed.notify_all();
        }
    }

    /// Waits until `condition` holds or `deadline` has come, if there is one; tells which.
    pub(crate) fn wait(
        &self,
        deadline: Option<Instant>,
        mut condition: impl FnMut(&Status) -> bool,
    ) -> (Status, bool) {
        let mut state = lock(&self.state);
        loop {
            let held = condition(&state.0);
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if held || left.is_some_and(|left| left.is_zero()) {
                return (state.0.clone(), held);
            }
            state.1 += 1;
            state = match left {
                Some(left) => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
            state.1 -= 1;
        }
    }
}
