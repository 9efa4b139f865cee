//! Every limit and knob, with its unit, its default and the arithmetic behind it.
//!
//! A [`Config`] is plain data with public fields: start from [`Config::new`], change what you need, and
//! [`Node::start`](crate::Node::start) checks the whole with [`Config::validate`].

use crate::raft::{LeaseSettings, Nanos, RaftConfig, Settings, SlowDiskLimits};
use crate::runtime::{Backend, IdlePolicy};
use crate::sessions::{self, SessionLimits};
use crate::wire::{self, kind};
use ringraft_block::{BLOCK_BYTES, ClusterId, Incarnation, NodeId, SECTOR_BYTES, round_up_to_block};
use ringraft_net::{FrameCap, NetConfig, NetLimits, PeerConfig};
use ringraft_wal::{WalConfig, format};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// What segments are measured in.
const SEGMENT_UNIT: u64 = 64 << 10;

/// A member of the cluster as this node is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberConfig {
    /// Its id, unique in the cluster, not 0.
    pub id: NodeId,
    /// Where its peers reach it.
    pub address: SocketAddr,
}

/// The configuration of a node.
#[derive(Clone, Debug)]
pub struct Config {
    /// The cluster. All members carry the same id; a connection from another cluster is refused.
    pub cluster: ClusterId,
    /// This node.
    pub node: NodeId,
    /// All initial members, this node included. The cluster forms when all of them have met once.
    pub members: Vec<MemberConfig>,
    /// This node is to be added to a cluster that exists ([`Handle::change_membership`](crate::Handle::change_membership)):
    /// `members` are then this node and those of the cluster by which it finds that: any one will do, since a member refers
    /// it to the leader. A blank directory waits until it is added, and has no say before. Stays true for the life of the directory. Default: false.
    ///
    /// Once members have been changed, the configuration in the log says who they are and where; `members` no longer
    /// counts, but as where a node that is in no configuration yet looks for the others.
    pub join: bool,
    /// The local address to listen on. Default: this node's address in `members`.
    pub listen: Option<SocketAddr>,
    /// The directory of the log, on a local disk with direct I/O; created if missing. One process at a time.
    pub data_dir: PathBuf,
    /// Peers talk in plain text in this version, so addresses beyond loopback must be allowed in so many words.
    /// Default: false.
    pub insecure: bool,

    /// What runs the core. Default: none, [`Backend::of_this_machine`]. It says nothing of what is on disk or on the wire:
    /// members may differ in it, and a restart may change it. A node whose tasks use glommio must say [`Backend::Glommio`].
    pub backend: Option<Backend>,
    /// The processor that consensus is pinned to. Default: none, the scheduler places it.
    pub core: Option<usize>,
    /// What the core does when there is nothing to do. Default: [`IdlePolicy::ADAPTIVE`], which looks for work for a while after each
    /// bit of work, and lets other threads of the processor go first. Under a limit on processor time, as containers have,
    /// choose [`IdlePolicy::Park`].
    pub idle: IdlePolicy,

    /// A follower that hears no leader for this long and a heartbeat interval, up to half as long again, campaigns:
    /// a dead leader is replaced within two election time-outs. Default: 500 ms, ten heartbeats, far above a
    /// stalled disk flush of some 100 ms.
    pub election_timeout: Duration,
    /// An idle leader reminds its followers this often. Default: 50 ms.
    pub heartbeat_interval: Duration,
    /// The commit index rides on the next append, and goes alone after this long without one. Default: 1 ms.
    pub commit_notice_delay: Duration,

    /// The largest command. The same on all members. Default: 1 MiB.
    ///
    /// Members that take over a cluster one by one with a larger limit are fine as long as the others' segments hold 16
    /// of the largest batches.
    pub command_bytes_max: usize,
    /// A batch of many commands takes at most this much in the log, envelope and tables included. The same on all
    /// members. Default: 256 KiB, where a durable write
    /// costs about three times one of 4 KiB, and larger ones gain little.
    pub batch_bytes_max: usize,
    /// Durable writes in flight at once. Default: 4. A batch that might still grow is sealed only while fewer than half of
    /// them are in flight, so that the next batch is under way while one is being acknowledged, and small ones are not made
    /// smaller; a full one goes as soon as there is room.
    pub writes_in_flight_max: usize,
    /// Bytes of durable writes in flight. Default: 1 MiB; a larger batch goes alone.
    pub write_bytes_in_flight_max: usize,
    /// Appends in flight to one follower. Default: 64.
    pub window_batches: usize,
    /// Bytes of appends in flight to one follower. Default: 8 MiB: 16 ms at 500 MB/s.
    pub window_bytes: usize,
    /// Bytes of commands that the core has taken and not yet applied, each with 64 B for what is kept of it beside; and as
    /// many again in the queue between other threads and the core. Beyond it [`Busy`](crate::error::Refusal::Busy). One
    /// command is always admitted. Default: 64 MiB.
    pub uncommitted_bytes_max: usize,
    /// Proposals in the queue between other threads and the core; their bytes are bounded by `uncommitted_bytes_max`.
    /// Default: 65,536.
    pub ingress_capacity: usize,
    /// Bytes of recent batches kept in memory for apply and for followers that are a little behind. Default: 32 MiB.
    pub recent_bytes_max: usize,
    /// Bytes of payload applied in one turn, so that a long replay does not starve heartbeats. Default: 1 MiB.
    pub apply_bytes_per_turn: usize,

    /// Size of a log segment. Default: 64 MiB. At least 16 times [`Config::slot_bytes_max`], in
    /// whole 64 KiB.
    pub segment_bytes: u64,
    /// Segments prepared when the directory is formatted, and kept ready ahead. Default: 4.
    pub segments_ahead: usize,

    /// A snapshot is taken when so many bytes of log have been applied since the last one, if the state machine makes any
    /// ([`StateMachine::snapshot`](crate::StateMachine::snapshot)); 0: never by that. A restart applies up to as much again.
    /// Default: 256 MiB, half a second of writing at full speed, a fraction of a second of replaying.
    pub snapshot_log_bytes: u64,
    /// The same, by the number of log indexes. Default: 0, never by that.
    pub snapshot_log_entries: u64,
    /// Bytes of snapshots written, and sent, per second: each of the two. 0: no bound. Default: 64 MiB, an eighth of what the
    /// log may take of a disk of 500 MB/s; 1 GiB in 16 s.
    pub snapshot_bytes_per_second: u64,
    /// So much of the log is kept when it is purged behind a snapshot, for members that are behind: less than that is sent
    /// to them as log. Segments are kept whole. Default: 64 MiB.
    pub log_retention_bytes: u64,

    /// What the scrubber reads of closed segments to find rot before the copy is needed; 0 turns it off. Default: 1 MiB
    /// per second, 10 GiB in three hours, at a fraction of a percent of what a disk reads.
    pub scrub_bytes_per_second: u64,
    /// A disk that leaves a durable operation unanswered for this long has stalled: a leader gives up its office, and
    /// the node neither votes nor campaigns until the disk answers. Default: none, one `election_timeout`: as
    /// long as its followers would have waited for it.
    pub disk_stall_timeout: Option<Duration>,
    /// A disk that does so for this long stops the node, so that whoever watches over it restarts it, or moves
    /// it. Default: 30 s, the time-out after which the block layer resets a device.
    pub disk_stall_stop: Duration,
    /// A leader hands leadership over when its own disk takes so many times as long to make a batch durable as a quorum takes
    /// without it, network included: from when the batch is sealed, over `disk_slow_timeout`. Commits do not wait for that
    /// disk, but what is to be sealed does. Where all disks are slow, or no quorum does without this one (one voter, or two),
    /// nobody hands over; after an attempt, successful or not, there is none for eight times `disk_slow_timeout` on this node.
    /// 0 turns it off. Default: 10, far above what disks of one kind differ by.
    pub disk_slow_factor: u32,
    /// What its disk takes at least, for that. Default: 20 ms: below it, an election costs more than it gains.
    pub disk_slow_floor: Duration,
    /// For how long most batches must have been so slow; without traffic nothing is found out. Default: none, four
    /// `election_timeout`.
    pub disk_slow_timeout: Option<Duration>,

    /// How much this node should lead, compared to the others: 255 campaigns without delay, 0 waits up to one more
    /// `election_timeout` before it campaigns. Default: none, no delay. It orders who is first to campaign; it takes
    /// leadership from nobody ([`Handle::transfer_leadership`](crate::Handle::transfer_leadership) does).
    pub election_priority: Option<u8>,
    /// Elections only, for programs that need a leader and no log: term and vote are durable, nothing can be proposed and
    /// nothing is appended. The same on all members. Default: false.
    pub consensus_only: bool,
    /// A session of which nothing has come for longer than this, by the log's clock, is expired. The leaders' clocks must
    /// agree far better than that. This and the three limits below go into the log with each session that is opened on this
    /// node, and count on all members as they stand there. Default: 10 min, far above an election or a
    /// restart, after which the room of a client that died is free again.
    pub session_timeout: Duration,
    /// How many sequences a session remembers, from its lowest unacknowledged one on. A [`Session`](crate::sessions::Session)
    /// acknowledges a quarter at a time, so about three quarters can be in flight. Default: 256, at 40 bytes each.
    pub session_window: u32,
    /// How many bytes of the newest replies a session keeps for commands that are proposed again. Default: 16 KiB, 64
    /// bytes for each sequence of the window.
    pub session_reply_bytes_max: u32,
    /// What all sessions together may take in memory, by their limits, on each member; a session that does not fit is
    /// refused. One takes at most 256 bytes, 40 for each sequence of its window, and its replies:
    /// [`SessionLimits::bytes`](crate::sessions::SessionLimits::bytes). Default: 64 MiB, about 2,490 sessions of the
    /// defaults. What is in use of it is in memory once more, encoded, until a snapshot that is being taken has it written,
    /// and while any snapshot is read, to be verified or restored: with all at once, four times.
    pub session_table_bytes_max: u64,

    /// Seed of the timing of this node (election times, backoff), mixed with its id. Default: none, the system's
    /// entropy. The identity of a new directory is always drawn from the system: a wiped one must not come back as
    /// the same.
    pub seed: Option<u64>,

    /// Whether leaders answer reads by a lease, without hearing anybody, and by how much the rate of any member's clock
    /// may be off, in millionths. It counts when the cluster forms, on the member that has the lowest id, whose
    /// `election_timeout` becomes the least that any member may have; both are kept in the configuration of the
    /// cluster. Default: none, every linearizable read is confirmed by a majority. 200 is several times what a quartz
    /// does: at an election time-out of 500 ms it costs 0.2 ms of lease.
    ///
    /// Leases trust clocks (CLOCK_BOOTTIME) to run evenly. A machine that is suspended is within the bound, its clock goes
    /// on. A virtual machine that is paused or moved with its clock stopped is not: leave leases off there, or
    /// ask with [`Consistency::Quorum`](crate::reads::Consistency::Quorum).
    pub lease_drift_ppm: Option<u32>,
    /// A read that names no time-out is given up after this long. Default: 5 s, several failovers.
    pub read_timeout: Duration,
    /// Reads that wait, and as many again in the queue between other threads and the core; beyond it
    /// [`Busy`](crate::error::ReadError::Busy). Default: 65,536.
    pub reads_max: usize,
}

/// The largest slot of a batch of many commands.
pub const BATCH_BYTES_CAP: usize = 2 << 20;

/// The largest `command_bytes_max`: one command of this size, alone in its batch, stays within
/// [`BATCH_BYTES_CAP`] with envelope, header, entry table and checksums (4 bytes for each sector of 512).
pub const COMMAND_BYTES_CAP: usize = BATCH_BYTES_CAP - BATCH_BYTES_CAP / SECTOR_BYTES * 4 - 4096;

const _: () = assert!(
    format::slot_bytes(format::image_bytes_for(1, 1, COMMAND_BYTES_CAP)) <= BATCH_BYTES_CAP
        && BATCH_BYTES_CAP <= format::SLOT_BYTES_MAX
);

impl Config {
    /// The defaults, for `node` of `cluster` among `members`, with its log in `data_dir`.
    #[must_use]
    pub fn new(
        cluster: ClusterId,
        node: NodeId,
        members: Vec<MemberConfig>,
        data_dir: impl Into<PathBuf>,
    ) -> Self {
        Self {
            cluster,
            node,
            members,
            join: false,
            listen: None,
            data_dir: data_dir.into(),
            insecure: false,
            backend: None,
            core: None,
            idle: IdlePolicy::default(),
            election_timeout: Duration::from_millis(500),
            heartbeat_interval: Duration::from_millis(50),
            commit_notice_delay: Duration::from_millis(1),
            command_bytes_max: 1 << 20,
            batch_bytes_max: 256 << 10,
            writes_in_flight_max: 4,
            write_bytes_in_flight_max: 1 << 20,
            window_batches: 64,
            window_bytes: 8 << 20,
            uncommitted_bytes_max: 64 << 20,
            ingress_capacity: 65_536,
            recent_bytes_max: 32 << 20,
            apply_bytes_per_turn: 1 << 20,
            segment_bytes: 64 << 20,
            segments_ahead: 4,
            snapshot_log_bytes: 256 << 20,
            snapshot_log_entries: 0,
            snapshot_bytes_per_second: 64 << 20,
            log_retention_bytes: 64 << 20,
            scrub_bytes_per_second: 1 << 20,
            disk_stall_timeout: None,
            disk_stall_stop: Duration::from_secs(30),
            disk_slow_factor: 10,
            disk_slow_floor: Duration::from_millis(20),
            disk_slow_timeout: None,
            election_priority: None,
            consensus_only: false,
            session_timeout: Duration::from_secs(600),
            session_window: 256,
            session_reply_bytes_max: 16 << 10,
            session_table_bytes_max: 64 << 20,
            seed: None,
            lease_drift_ppm: None,
            read_timeout: Duration::from_secs(5),
            reads_max: 65_536,
        }
    }

    /// The largest slot that a batch can take in the log: one of many commands, or one with a single command of
    /// `command_bytes_max`.
    #[must_use]
    pub fn slot_bytes_max(&self) -> usize {
        let alone = format::slot_bytes(format::image_bytes_for(1, 1, self.command_bytes_max));
        alone.max(round_up_to_block(self.batch_bytes_max))
    }

    /// The largest slot of which a segment holds 16: what this node can take from a leader, whatever it proposes
    /// itself.
    fn slot_bytes_of_segment(&self) -> usize {
        let usable = self.segment_bytes.saturating_sub(format::slots_start(self.segment_bytes)) / 16;
        let blocks = usize::try_from(usable).unwrap_or(usize::MAX) / BLOCK_BYTES;
        (blocks * BLOCK_BYTES).min(format::SLOT_BYTES_MAX)
    }

    /// The largest image that this node's log can hold.
    pub(crate) fn image_bytes_max(&self) -> usize {
        let image = self.slot_bytes_of_segment().saturating_sub(format::ENVELOPE_BYTES);
        image.min(format::IMAGE_BYTES_MAX)
    }

    /// What the node opens its log with; for tools that open it without the node. `seed` feeds the incarnation of a
    /// directory that is formatted, and the nonces of segments.
    #[must_use]
    pub fn log_config(&self, seed: u64) -> WalConfig {
        WalConfig {
            segment_bytes: self.segment_bytes,
            segments_ahead: self.segments_ahead,
            batch_bytes_max: self.image_bytes_max(),
            writes_in_flight_max: self.writes_in_flight_max,
            bytes_in_flight_max: self.write_bytes_in_flight_max,
            retain_bytes: self.log_retention_bytes,
            ..WalConfig::new(self.cluster, self.node, seed)
        }
    }

    /// What a session that is opened on this node is registered with.
    #[must_use]
    pub fn session_limits(&self) -> SessionLimits {
        SessionLimits {
            timeout_ms: u64::try_from(self.session_timeout.as_millis()).unwrap_or(u64::MAX),
            window: self.session_window,
            reply_bytes_max: self.session_reply_bytes_max,
            table_bytes_max: self.session_table_bytes_max,
        }
    }

    fn validate_sessions(&self) -> Result<(), ConfigError> {
        let limits = self.session_limits();
        let bounded = [
            ("session_timeout", limits.timeout_ms, 1, u64::MAX),
            ("session_window", limits.window.into(), 1, sessions::WINDOW_MAX.into()),
            ("session_reply_bytes_max", limits.reply_bytes_max.into(), 0, sessions::REPLY_BYTES_CAP.into()),
            ("session_table_bytes_max", limits.table_bytes_max, limits.bytes(), sessions::TABLE_BYTES_CAP),
        ];
        let outside = bounded.into_iter().find(|(_, value, min, max)| !(min..=max).contains(&value));
        match outside {
            Some((name, value, min, max)) => Err(ConfigError::OutOfRange { name, value, min, max }),
            None => Ok(()),
        }
    }

    /// When a disk that does not answer counts as stalled.
    pub(crate) fn disk_stall_timeout(&self) -> Duration {
        self.disk_stall_timeout.unwrap_or(self.election_timeout)
    }

    /// For how long a leader's disk is to be slow before it hands over.
    fn disk_slow_timeout(&self) -> Duration {
        self.disk_slow_timeout.unwrap_or(self.election_timeout.saturating_mul(4))
    }

    /// When a leader's disk is too slow for it to lead; never if that is turned off.
    fn slow_disk(&self) -> Option<SlowDiskLimits> {
        (self.disk_slow_factor > 0).then(|| SlowDiskLimits {
            factor: self.disk_slow_factor,
            floor: nanos(self.disk_slow_floor),
            span: nanos(self.disk_slow_timeout()),
        })
    }

    /// What the configuration of the cluster says if this node composes it.
    pub(crate) fn settings(&self) -> Settings {
        let election_timeout_min_ns = nanos(self.election_timeout).0;
        let lease = |drift_ppm| LeaseSettings { election_timeout_min_ns, drift_ppm };
        Settings { lease: self.lease_drift_ppm.map(lease) }
    }

    /// The address to listen on.
    pub(crate) fn listen_address(&self) -> Result<SocketAddr, ConfigError> {
        self.listen
            .or_else(|| self.members.iter().find(|member| member.id == self.node).map(|m| m.address))
            .ok_or(ConfigError::NotAMember { node: self.node })
    }

    /// Checks the whole.
    ///
    /// # Errors
    /// The first contradiction, with its cure.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_members()?;
        let bounded: [(&'static str, usize, usize, usize); 11] = [
            ("command_bytes_max", self.command_bytes_max, 1, COMMAND_BYTES_CAP),
            ("batch_bytes_max", self.batch_bytes_max, 4096, BATCH_BYTES_CAP),
            ("writes_in_flight_max", self.writes_in_flight_max, 1, 64),
            ("window_batches", self.window_batches, 1, 65_536),
            ("window_bytes", self.window_bytes, 4096, 1 << 30),
            ("ingress_capacity", self.ingress_capacity, 1, 1 << 24),
            ("apply_bytes_per_turn", self.apply_bytes_per_turn, 1, 1 << 30),
            ("segments_ahead", self.segments_ahead, 1, 1024),
            ("uncommitted_bytes_max", self.uncommitted_bytes_max, self.command_bytes_max, 1 << 34),
            ("reads_max", self.reads_max, 1, 1 << 24),
            ("lease_drift_ppm", self.lease_drift_ppm.unwrap_or(0) as usize, 0, LEASE_DRIFT_PPM_MAX),
        ];
        for (name, value, min, max) in bounded {
            if !(min..=max).contains(&value) {
                return Err(ConfigError::OutOfRange {
                    name,
                    value: value as u64,
                    min: min as u64,
                    max: max as u64,
                });
            }
        }
        let min = (16 * self.slot_bytes_max() as u64).next_multiple_of(SEGMENT_UNIT);
        if self.segment_bytes < min
            || self.segment_bytes > 1 << 30
            || !self.segment_bytes.is_multiple_of(SEGMENT_UNIT)
        {
            return Err(ConfigError::Segment { bytes: self.segment_bytes, min });
        }
        if self.heartbeat_interval.is_zero() || self.election_timeout < self.heartbeat_interval * 3 {
            return Err(ConfigError::Timeouts {
                election_ms: self.election_timeout.as_millis(),
                heartbeat_ms: self.heartbeat_interval.as_millis(),
            });
        }
        let (timeout, stop) = (self.disk_stall_timeout(), self.disk_stall_stop);
        if timeout.is_zero() || stop < timeout {
            return Err(ConfigError::DiskStall {
                timeout_ms: timeout.as_millis(),
                stop_ms: stop.as_millis(),
            });
        }
        let (timeout, floor) = (self.disk_slow_timeout(), self.disk_slow_floor);
        let slow = self.disk_slow_factor != 1 && !floor.is_zero() && timeout >= self.election_timeout;
        if self.disk_slow_factor > 0 && !slow {
            return Err(ConfigError::DiskSlow {
                factor: self.disk_slow_factor,
                floor_ms: floor.as_millis(),
                timeout_ms: timeout.as_millis(),
                election_ms: self.election_timeout.as_millis(),
            });
        }
        self.validate_sessions()?;
        self.log_config(0).validate().map_err(|error| ConfigError::Log(error.to_string()))?;
        raft_config(self, 0, None).validate().map_err(|error| ConfigError::Raft(error.to_string()))?;
        if let Some(core) = self.core {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let known = core_affinity::get_core_ids().unwrap_or_default();
            if !known.iter().any(|id| id.id == core) {
                return Err(ConfigError::NoSuchCore { core, cores });
            }
        }
        Ok(())
    }

    fn validate_members(&self) -> Result<(), ConfigError> {
        if self.cluster == ClusterId(0) {
            return Err(ConfigError::NoClusterId);
        }
        for (position, member) in self.members.iter().enumerate() {
            if member.id == NodeId(0) {
                return Err(ConfigError::ZeroId);
            }
            if self.members[..position].iter().any(|other| other.id == member.id) {
                return Err(ConfigError::DuplicateId { id: member.id });
            }
            if self.members[..position].iter().any(|other| other.address == member.address) {
                return Err(ConfigError::DuplicateAddress { address: member.address });
            }
            if !member.address.ip().is_loopback() && !self.insecure {
                return Err(ConfigError::Insecure { address: member.address });
            }
        }
        let listen = self.listen_address()?;
        if !listen.ip().is_loopback() && !self.insecure {
            return Err(ConfigError::Insecure { address: listen });
        }
        if !self.members.iter().any(|member| member.id == self.node) {
            return Err(ConfigError::NotAMember { node: self.node });
        }
        if self.members.len() > MEMBERS_MAX {
            return Err(ConfigError::TooManyMembers { members: self.members.len() });
        }
        if self.join && self.members.len() == 1 {
            return Err(ConfigError::NobodyToJoin);
        }
        Ok(())
    }
}

/// A clock that is off by more is broken: a tenth.
const LEASE_DRIFT_PPM_MAX: usize = 100_000;

/// Whether this node sticks to a leader for as long as leases in the cluster count on.
pub(crate) fn check_lease(config: &Config, settings: &Settings) -> Result<(), ConfigError> {
    let min = settings.lease.map_or(Nanos(0), |lease| lease.election_timeout_min());
    let got = nanos(config.election_timeout);
    if got < min {
        return Err(ConfigError::ElectionTimeoutBelowLease { got_ns: got.0, min_ns: min.0 });
    }
    Ok(())
}

/// The seed of election times and backoff in this boot: `entropy`, or a configured one, which is then another for each
/// node and boot.
pub(crate) fn timing_seed(config: &Config, boot: u64, entropy: u64) -> u64 {
    config.seed.map_or(entropy, |seed| seed ^ config.node.get().rotate_left(32) ^ boot)
}

/// The core's part. `seed` is another one for each node and boot.
pub(crate) fn raft_config(config: &Config, seed: u64, incarnation: Option<Incarnation>) -> RaftConfig {
    RaftConfig {
        election_timeout: nanos(config.election_timeout),
        heartbeat_interval: nanos(config.heartbeat_interval),
        commit_notice_delay: nanos(config.commit_notice_delay),
        window_batches: config.window_batches,
        window_bytes: config.window_bytes as u64,
        priority: config.election_priority,
        consensus_only: config.consensus_only,
        slow_disk: config.slow_disk(),
        incarnation,
        ..RaftConfig::new(config.node, seed)
    }
}

fn nanos(duration: Duration) -> Nanos {
    Nanos(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
}

/// The network's part, once the log has told incarnation and boot counter.
pub(crate) fn net_config(
    config: &Config,
    listen: SocketAddr,
    incarnation: Incarnation,
    boot: u64,
    seed: u64,
) -> NetConfig {
    let body = |kind, body_bytes_max| FrameCap { kind, body_bytes_max, attachment_bytes_max: 0 };
    let append = FrameCap { attachment_bytes_max: format::IMAGE_BYTES_MAX as u32, ..body(kind::APPEND, 256) };
    let frame_caps = vec![
        append,
        body(kind::APPEND_ACK, 256),
        body(kind::VOTE, 256),
        body(kind::VOTE_REPLY, 256),
        body(kind::FORMATION, wire::BODY_BYTES_MAX as u32),
        body(kind::TIMEOUT_NOW, 256),
        body(kind::FETCH, 256),
        FrameCap { kind: kind::FETCH_REPLY, ..append },
        body(kind::READ_INDEX, 256),
        body(kind::READ_INDEX_REPLY, 256),
        body(kind::SNAPSHOT_OFFER, 256),
        body(kind::SNAPSHOT_REQUEST, 256),
        FrameCap {
            attachment_bytes_max: crate::driver::PIECE_BYTES as u32,
            ..body(kind::SNAPSHOT_PIECE, 256)
        },
    ];
    let limits = NetLimits {
        // A full window of appends, and as much again for what the core does not count.
        queue_frames_max: 2 * config.window_batches + 256,
        queue_bytes_max: config.window_bytes + 2 * format::SLOT_BYTES_MAX,
        ..NetLimits::default()
    };
    NetConfig {
        node: config.node,
        cluster: config.cluster,
        incarnation,
        format_fingerprint: format::FINGERPRINT ^ wire::FINGERPRINT.rotate_left(1),
        features: 0,
        listen,
        session_epoch_start: boot << 32 | 1,
        seed,
        limits,
        frame_caps,
    }
}

pub(crate) fn net_peers(config: &Config) -> Vec<PeerConfig> {
    let others = config.members.iter().filter(|member| member.id != config.node);
    others.map(|member| PeerConfig { id: member.id, address: member.address, incarnation: None }).collect()
}

/// The most members that a configuration may name: its encoding must fit into the hard state.
pub const MEMBERS_MAX: usize = crate::raft::MEMBERS_MAX;

/// A configuration that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The cluster id is 0.
    #[error("the cluster id is 0: choose a random one, the same for all members")]
    NoClusterId,
    /// A node id is 0.
    #[error("a member's id is 0: ids start at 1")]
    ZeroId,
    /// Two members with one id.
    #[error("two members have the id {id}: give each its own")]
    DuplicateId {
        /// The id.
        id: NodeId,
    },
    /// Two members with one address.
    #[error("two members have the address {address}: give each its own")]
    DuplicateAddress {
        /// The address.
        address: SocketAddr,
    },
    /// This node is not among the members.
    #[error("node {node} is not among the members: add it to `members`, or correct `node`")]
    NotAMember {
        /// This node.
        node: NodeId,
    },
    /// Too many members.
    #[error("{members} members are more than {MEMBERS_MAX}")]
    TooManyMembers {
        /// How many.
        members: usize,
    },
    /// A node that joins, and knows nobody.
    #[error(
        "`join` is set and `members` names only this node: name members of the cluster that it is to join"
    )]
    NobodyToJoin,
    /// Plain text beyond loopback.
    #[error(
        "{address} is not a loopback address, and peers talk in plain text: set `insecure` if the network is yours"
    )]
    Insecure {
        /// The address.
        address: SocketAddr,
    },
    /// A number out of its range.
    #[error("{name} = {value} is out of range: {min} to {max}")]
    OutOfRange {
        /// The field.
        name: &'static str,
        /// Its value.
        value: u64,
        /// The least that works, inclusive.
        min: u64,
        /// The most that works, inclusive.
        max: u64,
    },
    /// A segment that is too small or of an odd size.
    #[error(
        "segment_bytes = {bytes}: at least {min} (16 of the largest batches), in whole 64 KiB, at most 1 GiB"
    )]
    Segment {
        /// The value.
        bytes: u64,
        /// The least that works.
        min: u64,
    },
    /// Time-outs that cannot hold a leader.
    #[error(
        "election_timeout {election_ms} ms must be at least three heartbeats of {heartbeat_ms} ms, and those more than 0"
    )]
    Timeouts {
        /// Election time-out.
        election_ms: u128,
        /// Heartbeat.
        heartbeat_ms: u128,
    },
    /// A disk that would never, or at once, count as stalled.
    #[error(
        "disk_stall_timeout = {timeout_ms} ms must be more than 0, and disk_stall_stop = {stop_ms} ms at least as long"
    )]
    DiskStall {
        /// When it counts as stalled.
        timeout_ms: u128,
        /// When the node stops.
        stop_ms: u128,
    },
    /// A leader that would hand over for a disk that is no slower than others, or at once.
    #[error(
        "disk_slow_factor = {factor} must be 0 (off) or at least 2, disk_slow_floor = {floor_ms} ms more than 0, and \
         disk_slow_timeout = {timeout_ms} ms at least an election_timeout, {election_ms} ms"
    )]
    DiskSlow {
        /// By how much its disk is to be slower.
        factor: u32,
        /// What it takes at least.
        floor_ms: u128,
        /// For how long.
        timeout_ms: u128,
        /// The election time-out.
        election_ms: u128,
    },
    /// A node that might elect another leader while one relies on its lease.
    #[error(
        "election_timeout is {got_ns} ns, and leases in this cluster count on at least {min_ns} ns on every member: raise it"
    )]
    ElectionTimeoutBelowLease {
        /// This node's, in nanoseconds.
        got_ns: u64,
        /// The least, as the configuration of the cluster has it.
        min_ns: u64,
    },
    /// No such processor.
    #[error("core {core} is not one of the {cores} that this process may run on")]
    NoSuchCore {
        /// The core asked for.
        core: usize,
        /// How many there are.
        cores: usize,
    },
    /// Refused by the log.
    #[error("{0}")]
    Log(String),
    /// Refused by the core of the protocol.
    #[error("{0}")]
    Raft(String),
    /// Refused by the network.
    #[error("{0}")]
    Network(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> Config {
        let members = (1..=3)
            .map(|id| MemberConfig {
                id: NodeId(id),
                address: SocketAddr::from(([127, 0, 0, 1], 7000 + id as u16)),
            })
            .collect();
        Config::new(ClusterId(7), NodeId(1), members, "/nowhere")
    }

    #[test]
    fn the_defaults_are_valid() {
        assert_eq!(valid().validate(), Ok(()));
    }

    #[test]
    fn a_slow_disk_can_be_put_up_with() {
        let mut config = valid();
        let limits = config.slow_disk().expect("on by default");
        assert_eq!(
            (limits.factor, limits.floor, limits.span),
            (10, Nanos::from_millis(20), Nanos::from_millis(2_000))
        );
        config.disk_slow_factor = 0;
        (config.disk_slow_floor, config.disk_slow_timeout) = (Duration::ZERO, Some(Duration::ZERO));
        assert_eq!((config.slow_disk(), config.validate()), (None, Ok(())));
    }

    #[test]
    fn a_configured_seed_is_another_for_each_node_and_boot() {
        let mut config = valid();
        assert_eq!(timing_seed(&config, 1, 99), 99);
        config.seed = Some(7);
        let first = timing_seed(&config, 1, 99);
        assert_eq!(first, timing_seed(&config, 1, 100), "entropy no longer counts");
        assert_ne!(first, timing_seed(&config, 2, 99));
        config.node = NodeId(2);
        assert_ne!(first, timing_seed(&config, 1, 99));
    }

    #[test]
    fn each_contradiction_is_named() {
        type Case = (fn(&mut Config), fn(&ConfigError) -> bool);
        let cases: [Case; 18] = [
            (|c| c.cluster = ClusterId(0), |e| matches!(e, ConfigError::NoClusterId)),
            (|c| c.members[0].id = NodeId(0), |e| matches!(e, ConfigError::ZeroId)),
            (|c| c.members[1].id = NodeId(1), |e| matches!(e, ConfigError::DuplicateId { .. })),
            (
                |c| c.members[1].address = c.members[0].address,
                |e| matches!(e, ConfigError::DuplicateAddress { .. }),
            ),
            (|c| c.node = NodeId(9), |e| matches!(e, ConfigError::NotAMember { .. })),
            (
                |c| c.members[2].address = "10.0.0.1:1".parse().unwrap(),
                |e| matches!(e, ConfigError::Insecure { .. }),
            ),
            (
                |c| c.command_bytes_max = 1 << 30,
                |e| matches!(e, ConfigError::OutOfRange { name: "command_bytes_max", .. }),
            ),
            (|c| c.reads_max = 0, |e| matches!(e, ConfigError::OutOfRange { name: "reads_max", .. })),
            (
                |c| c.lease_drift_ppm = Some(100_001),
                |e| matches!(e, ConfigError::OutOfRange { name: "lease_drift_ppm", .. }),
            ),
            (|c| c.segment_bytes = 1 << 20, |e| matches!(e, ConfigError::Segment { .. })),
            (|c| c.election_timeout = c.heartbeat_interval, |e| matches!(e, ConfigError::Timeouts { .. })),
            (|c| c.disk_stall_stop = Duration::ZERO, |e| matches!(e, ConfigError::DiskStall { .. })),
            (|c| c.disk_slow_factor = 1, |e| matches!(e, ConfigError::DiskSlow { factor: 1, .. })),
            (
                |c| c.disk_slow_floor = Duration::ZERO,
                |e| matches!(e, ConfigError::DiskSlow { floor_ms: 0, .. }),
            ),
            (
                |c| c.disk_slow_timeout = Some(c.election_timeout / 2),
                |e| matches!(e, ConfigError::DiskSlow { timeout_ms: 250, election_ms: 500, .. }),
            ),
            (
                |c| c.session_table_bytes_max = 1000,
                |e| matches!(e, ConfigError::OutOfRange { name: "session_table_bytes_max", min: 26_880, .. }),
            ),
            (
                |c| {
                    c.join = true;
                    c.members.truncate(1);
                },
                |e| matches!(e, ConfigError::NobodyToJoin),
            ),
            (|c| c.core = Some(100_000), |e| matches!(e, ConfigError::NoSuchCore { .. })),
        ];
        for (position, (change, expected)) in cases.into_iter().enumerate() {
            let mut config = valid();
            change(&mut config);
            let error = config.validate().expect_err("refused");
            assert!(expected(&error), "case {position}: {error}");
        }
    }
}
