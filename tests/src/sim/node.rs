//! What the world asks of a node: the seam at which the engine's driver plugs in.

use super::check::Recorder;
use super::disk::SimDisk;
use super::link::SimLink;
use super::rng::Rng;

/// What a turn came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turned {
    /// Another turn at the same moment would do more; otherwise it does nothing.
    pub more: bool,
    /// When the node wants a turn at the latest, by its monotonic clock.
    pub next_deadline_ns: u64,
    /// The node has stopped for good.
    pub stopped: bool,
    /// It stopped applying because it had applied as much as it may in a turn.
    pub apply_paused: bool,
}

/// What a node is and knows after a turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// The cluster is formed, as far as the node knows.
    pub formed: bool,
    /// Its role: 0 follower, 1 pre-candidate, 2 candidate, 3 leader.
    pub role: u8,
    /// Its term.
    pub term: u64,
    /// Whom it takes for the leader, by position from 0.
    pub leader: Option<usize>,
    /// Whom it has voted for in the term.
    pub vote: Option<usize>,
    /// The end of its log.
    pub last: u64,
    /// The end of what it has handed to the disk. Beyond it, chains cannot be asked for.
    pub written: u64,
    /// How far its log is durable.
    pub durable: u64,
    /// Its commit index.
    pub commit: u64,
    /// How far it has applied.
    pub applied: u64,
    /// Truncations of its log.
    pub epoch: u64,
    /// Times that its log went on in another segment, in this life.
    pub rollovers: u64,
    /// Times that it took up with somebody whom no configuration names, in this life.
    pub met: u64,
}

/// What a node whose disk has lost something knows of that.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lack {
    /// The term of the node.
    pub term: u64,
    /// Up to here its log was acknowledged to the leader of the term in this session, or is counted by the node itself.
    pub acked: u64,
    /// Where the batches begin that it cannot read.
    pub unread: Vec<u64>,
    /// It had more, nobody knows how much: up to this term.
    pub claim: Option<u64>,
}

/// Where all nodes listen at first.
pub const PORT: u16 = 7_000;

/// The role of a node that asks whether it could win in [`View::role`].
pub const PRE_CANDIDATE: u8 = 1;

/// The role of a candidate in [`View::role`].
pub const CANDIDATE: u8 = 2;

/// The role of a leader in [`View::role`].
pub const LEADER: u8 = 3;

/// What became of a proposal that a node had accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Committed and applied, at this index and term.
    Committed {
        /// The index.
        index: u64,
        /// The term.
        term: u64,
        /// What the state machine replied.
        reply: u64,
    },
    /// Definitely not in the log, with a hint where the leader is.
    Refused {
        /// The leader, by position.
        leader: Option<usize>,
    },
    /// Anything may have become of it.
    Unknown,
    /// A key was read.
    Read {
        /// Exactly everything up to here was applied when it was.
        applied: u64,
        /// What the state machine answered.
        reply: u64,
    },
    /// A session was opened.
    Opened {
        /// Its id.
        session: u64,
    },
    /// What was asked of a session, beside commands, was done.
    Done,
    /// The command of a session was not applied and never will be.
    NeverApplied,
    /// By the rules of its session it was not done now.
    InSession(SessionRefusal),
    /// What was waited for has come, at this index.
    Reached {
        /// The index.
        index: u64,
    },
}

/// Why something of a session was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionRefusal {
    /// There is no such session any more.
    Expired,
    /// The sequence was acknowledged.
    BelowFloor,
    /// Too much is not acknowledged.
    BeyondWindow,
    /// The sequence was resolved as never applied.
    Fenced,
    /// There is no room for another session.
    TableFull,
    /// It was applied at this index, and the reply is gone.
    ReplyGone {
        /// The index.
        index: u64,
    },
}

/// A client's place in its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The session.
    pub session: u64,
    /// The lowest sequence that is not settled.
    pub floor: u64,
    /// The sequence that is asked about.
    pub sequence: u64,
    /// Whether an earlier attempt at it may be applied yet.
    pub doubtful: bool,
}

/// What is asked of a node by a client that has a session, or wants one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionAsk {
    /// Another session.
    Open,
    /// The command, under the sequence.
    Propose(Place),
    /// What has become of the sequence.
    Resolve(Place),
    /// The client knows all up to the sequence.
    Acknowledge(Place),
}

/// What is asked of a node besides commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// A key is read, on any node: everything that was committed before counts. A lease will do.
    Linearizable,
    /// The same, confirmed by a quorum.
    Quorum,
    /// The same, through the log.
    Barrier,
    /// A key is read from what is applied there.
    Stale {
        /// If a leader was heard so many milliseconds ago at the most,
        age_ms: u64,
        /// and so many entries at the most are known to be committed and not applied.
        lag: u64,
    },
    /// The leader is to hear a quorum anew.
    Round,
    /// Everything up to the index is to be known to be committed.
    Committed(u64),
    /// Everything up to the index is to be applied.
    Applied(u64),
}

impl Ask {
    /// Whether the answer has to show everything that was committed before it was asked for.
    #[must_use]
    pub fn is_linearizable(self) -> bool {
        matches!(self, Self::Linearizable | Self::Quorum | Self::Barrier)
    }
}

/// What became of something that an operator had asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Leadership was handed over.
    Transferred {
        /// To whom, by position.
        leader: usize,
        /// In which term it leads.
        term: u64,
    },
    /// It was not, or not to whom it was to be.
    NotTransferred {
        /// For people.
        why: String,
    },
    /// The members were changed; the configuration stands at this index.
    Changed {
        /// The index.
        index: u64,
    },
    /// They were not, or nobody knows.
    NotChanged {
        /// For people.
        why: String,
    },
}

/// Who counts in a cluster, by a node's log. Bit n of a set is node n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Members {
    /// Where that stands in its log.
    pub index: u64,
    /// The voters.
    pub incoming: u32,
    /// In a transition, those of before.
    pub outgoing: u32,
    /// Who is sent the log and has no vote.
    pub learners: u32,
    /// No change is under way.
    pub settled: bool,
}

/// A change of the members. Bit n of a set is node n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Who joins as a learner.
    pub learn: u32,
    /// Who joins as a voter.
    pub vote: u32,
    /// Learners that become voters.
    pub promote: u32,
    /// Voters that become learners.
    pub demote: u32,
    /// Who leaves.
    pub remove: u32,
    /// Members that are to be met at the next port from now on.
    pub moves: u32,
}

/// Whether what comes under `tag` goes through the queue that other threads use; the rest goes straight into the core.
#[must_use]
pub fn is_remote(tag: u64) -> bool {
    tag >> 32 & 1 == 1
}

/// A definite refusal, with a hint where the leader is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefusedAtOnce {
    /// The leader, by position.
    pub leader: Option<usize>,
}

/// Why a node stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopReason {
    /// For people.
    pub text: String,
    /// It was asked to, and did so in good order.
    pub orderly: bool,
    /// No copy of a part of its log is left that anybody can read.
    pub copies_gone: bool,
    /// A disk that fails, or has failed, may be the cause.
    pub disk: bool,
}

/// One process.
pub trait SimNode {
    /// Takes a turn.
    fn turn(&mut self, monotonic_ns: u64, wall_ms: u64) -> Turned;

    /// The next turn looks at everything, whatever the last one knew to be left.
    fn rouse(&mut self) {}

    /// Proposes a command under a tag of the caller's.
    ///
    /// # Errors
    /// A refusal that is known at once; no answer follows.
    fn propose(&mut self, tag: u64, command: &[u8]) -> Result<(), RefusedAtOnce>;

    /// Asks for something else than a command, under a tag of the caller's. `read` is the command that reads the key, for a
    /// node that knows no other way than the log.
    ///
    /// # Errors
    /// A refusal that is known at once; no answer follows.
    fn ask(&mut self, tag: u64, ask: Ask, read: &[u8]) -> Result<(), RefusedAtOnce> {
        let _ = ask;
        self.propose(tag, read)
    }

    /// Asks for something in a session, under a tag of the caller's. False if nodes of its kind know no sessions.
    fn in_session(&mut self, tag: u64, ask: SessionAsk, command: &[u8]) -> bool {
        let _ = (tag, ask, command);
        false
    }

    /// Asks it to hand leadership to another node, or to the best one. False if nodes of its kind cannot.
    fn transfer(&mut self, tag: u64, to: Option<usize>) -> bool {
        let _ = (tag, to);
        false
    }

    /// Asks it to change the members, as the leader; all nodes listen at these ports now. False if nodes of its kind cannot.
    fn change(&mut self, tag: u64, wish: Wish, ports: &[u16]) -> bool {
        let _ = (tag, wish, ports);
        false
    }

    /// At which port each of so many nodes is to be met, by what is committed in its log, and at which index that stands.
    fn ports(&self, nodes: usize) -> Option<(u64, Vec<Option<u16>>)> {
        let _ = nodes;
        None
    }

    /// Who counts, by its log. Only asked where members change.
    fn members(&self) -> Members {
        Members::default()
    }

    /// Asks it for a snapshot of all that it has applied. False if nodes of its kind make none.
    fn snapshot(&mut self) -> bool {
        false
    }

    /// Moves what has become of an operator's requests to `out`.
    fn outcomes(&mut self, out: &mut Vec<(u64, Outcome)>) {
        let _ = out;
    }

    /// Frames that it has refused as damaged.
    fn frames_damaged(&self) -> u64 {
        0
    }

    /// The term to which it handed over last, if that was for its slow disk.
    fn left_for_slow_disk(&self) -> u64 {
        0
    }

    /// Asks it to stop in good order.
    fn shutdown(&mut self);

    /// Moves the answers that have arrived to `out`.
    fn answers(&mut self, out: &mut Vec<(u64, Answer)>);

    /// What the node is and knows.
    fn view(&self) -> View;

    /// Whether it campaigns because the leader of the term before told it to.
    fn was_told_to_campaign(&self) -> bool {
        false
    }

    /// Whether it has a session with another node.
    fn has_session_with(&self, _other: usize) -> bool {
        true
    }

    /// Whether it takes nothing up any more and only waits for what it has begun to end.
    fn is_closing(&self) -> bool {
        false
    }

    /// Whether, as a leader, it has told somebody to campaign in its term, or is about to.
    fn hands_over(&self) -> bool {
        false
    }

    /// How far another node's log is known to this leader to be durable and equal to its own.
    fn matched(&self, peer: usize) -> Option<u64>;

    /// The chain of its log at `index`, if that is a batch end that it holds.
    fn chain_at(&self, index: u64) -> Option<[u8; 16]>;

    /// The ends of all batches that its log holds, in order, with the chains there.
    fn chains(&self) -> Box<dyn Iterator<Item = (u64, [u8; 16])> + '_>;

    /// The first index that its log may hold, less one.
    fn log_start(&self) -> u64;

    /// Its inner state, for people.
    fn describe(&self) -> String;

    /// Why it stopped.
    fn stop_reason(&self) -> Option<StopReason>;

    /// Whether its log lacks nothing, and nothing is in doubt about it.
    fn is_whole(&self) -> bool {
        true
    }

    /// What it knows to lack of its log.
    fn lack(&self) -> Lack {
        Lack::default()
    }

    /// Checks what must hold of its state.
    ///
    /// # Errors
    /// What does not.
    fn check(&self) -> Result<(), String>;
}

/// A log as it was recovered from a disk image.
pub struct ImageLog {
    /// The last index.
    pub last: u64,
    /// What precedes the log, covered by a snapshot.
    pub start: u64,
    /// Batch ends with their chains, in order.
    pub chains: Vec<(u64, [u8; 16])>,
}

/// What a process starts with.
pub struct Boot {
    /// Which machine, from 0.
    pub node: usize,
    /// How many machines the cluster is formed of, the first ones.
    pub founders: usize,
    /// At which port each machine listens.
    pub ports: Vec<u16>,
    /// It is to join a cluster that is there.
    pub joins: bool,
    /// Its disk.
    pub disk: SimDisk,
    /// Its network.
    pub link: SimLink,
    /// Its state machine.
    pub recorder: Recorder,
    /// Whatever is random in it.
    pub seed: u64,
    /// Its limits and knobs.
    pub tuning: Tuning,
}

/// Limits and knobs that differ from run to run, equal on all nodes of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Election time-out, in milliseconds.
    pub election_timeout_ms: u64,
    /// Heartbeat interval, in milliseconds.
    pub heartbeat_ms: u64,
    /// Size of a log segment.
    pub segment_bytes: u64,
    /// The largest command.
    pub command_bytes_max: usize,
    /// Segments kept ready.
    pub segments_ahead: usize,
    /// Bytes at which a batch of many commands is sealed at the latest.
    pub batch_bytes_max: usize,
    /// Durable writes in flight.
    pub writes_in_flight_max: usize,
    /// Appends in flight to one follower.
    pub window_batches: usize,
    /// Their bytes.
    pub window_bytes: usize,
    /// Bytes of durable writes in flight.
    pub write_bytes_in_flight_max: usize,
    /// Bytes of uncommitted commands.
    pub uncommitted_bytes_max: usize,
    /// Commands that wait to be taken by the core.
    pub ingress_capacity: usize,
    /// Bytes of batches kept in memory.
    pub recent_bytes_max: usize,
    /// Bytes of commands that are applied in one turn.
    pub apply_bytes_per_turn: usize,
    /// How long a commit index waits for an append to ride on, in microseconds.
    pub commit_notice_us: u64,
    /// A snapshot is taken after so many log indexes; 0: none is.
    pub snapshot_log_entries: u64,
    /// So many bytes of log are left behind it.
    pub log_retention_bytes: u64,
    /// Leaders may read by a lease, and clocks' rates are off by at most so many millionths.
    pub lease_drift_ppm: Option<u32>,
    /// A session expires after so many milliseconds.
    pub session_timeout_ms: u64,
    /// So many sequences are remembered of it.
    pub session_window: u32,
    /// So many sessions have room.
    pub sessions_max: u64,
    /// A read that is not ready is given up after so many election time-outs.
    pub read_timeouts: u64,
}

impl Tuning {
    /// Small limits, so that a short run meets them.
    #[must_use]
    pub fn draw(rng: &mut Rng) -> Self {
        let election_timeout_ms = rng.between(60, 300);
        // A start reads all segments, and begins another: in small ones it costs little, and the log goes on in the next one
        // often. A segment holds sixteen of the largest batches.
        let small = rng.chance(800_000);
        let (segment_bytes, command_bytes_max) =
            if small { (256 << 10, 10 << 10) } else { (1 << 20, 40 << 10) };
        // Apart, so that what is drawn behind stays as it was.
        let mut snapshots = Rng::new(election_timeout_ms);
        let mut reads = rng.clone().fork(7);
        Self {
            election_timeout_ms,
            heartbeat_ms: election_timeout_ms / rng.between(5, 10),
            segment_bytes,
            command_bytes_max,
            segments_ahead: rng.between(1, 3) as usize,
            batch_bytes_max: 4096 << rng.below(if small { 2 } else { 4 }),
            writes_in_flight_max: rng.between(1, 4) as usize,
            window_batches: rng.between(1, 16) as usize,
            window_bytes: 4096 << rng.below(8),
            write_bytes_in_flight_max: 4096 << rng.below(8),
            // The largest command fits.
            uncommitted_bytes_max: (40 << 10) << rng.below(6),
            ingress_capacity: 1 << rng.below(6),
            recent_bytes_max: [0, 16 << 10, 256 << 10, 32 << 20][rng.index(4)],
            apply_bytes_per_turn: [1, 100, 2_000, 50_000, 1 << 20][rng.index(5)],
            commit_notice_us: [0, 100, 1_000, 5_000][rng.index(4)],
            snapshot_log_entries: [0, 10, 50, 200][snapshots.index(4)],
            log_retention_bytes: [0, 32 << 10, 1 << 20][snapshots.index(3)],
            lease_drift_ppm: [None, None, Some(2_000), Some(2_000), Some(100_000)][reads.index(5)],
            read_timeouts: reads.between(1, 8),
            session_timeout_ms: [1_000, 10_000, 600_000][reads.index(3)],
            session_window: [3, 8, 64][reads.index(3)],
            sessions_max: [3, 100, 100][reads.index(3)],
        }
    }
}

/// How nodes are made.
pub trait Cluster {
    /// The nodes.
    type Node: SimNode;

    /// Whether the members can be changed.
    const CHANGES: bool = true;

    /// Starts a process.
    fn boot(&self, boot: Boot) -> Self::Node;

    /// Recovers the log of `node`, one of `nodes`, from an image of its disk. The image has no latency: whatever is
    /// submitted to it has completed by the next poll.
    ///
    /// # Errors
    /// Why the log cannot be recovered.
    fn recover(&self, node: usize, nodes: usize, tuning: &Tuning, image: SimDisk)
    -> Result<ImageLog, String>;
}
