//! The log as its user sees it: [`Wal`] owns the parts and the transitions between them.
//!
//! The happy path of a batch: [`Wal::is_ready_for`] says that a position and room in flight are there; [`Wal::append`] fills in
//! the envelope and submits one write; its completion comes through [`Wal::handle`]; the next [`Wal::advance`] reports how
//! far the log is durable without a gap.
//!
//! Failures: the first failed or short durable operation stops the log for good ([`WalEvent::Poisoned`]).

mod purge;

use crate::commit::Window;
use crate::disk::{Disk, DiskDone, DiskOp, DiskOpId, DiskOutput, FileId};
use crate::error::{ConfigError, DamageCause, ReadError, RepairError, WalError};
use crate::format::{
    BatchInfo, BatchView, Chain, Claim, Cut, ENVELOPE_BYTES, Envelope, HardState, IMAGE_BYTES_MAX,
    IMAGE_BYTES_MIN, LogStart, SegmentHeader, SegmentOrigin, slot_bytes, slots_start, write_envelope,
};
use crate::hard_state::HardStateStore;
use crate::index::{Index, Place};
use crate::mutants::{self, Mutant};
use crate::ops::{Ops, Owner, Random, owner_of};
use crate::read::{READS_IN_FLIGHT, REQUESTS_MAX, Reads, StoredBatch};
use crate::recovery::{Found, Recovery, RecoveryReport};
use crate::recycle::Recycler;
use crate::repair::{self, DamagedBatch, Repairs};
use crate::reserve::{Maker, Standby};
use crate::salvage::Salvage;
use crate::scrub::{self, Scrub, ScrubStatus};
use crate::segment::{Descriptor, SectorSums, Segment, SegmentTable};
use purge::{Purges, Removal};
use ringraft_block::{
    BLOCK_BYTES, Block, BlockBuf, ClusterId, GroupId, LogIndex, NodeId, Pool, SharedBlock, Term,
};
use std::collections::VecDeque;
use std::fmt;

/// Whose log it is, and its limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalConfig {
    /// The cluster. A directory of another one is refused.
    pub cluster: ClusterId,
    /// The node. A directory of another one is refused.
    pub node: NodeId,
    /// The log within the directory.
    pub group: GroupId,
    /// Size of a segment file in bytes, a multiple of 4 KiB. Holds at least 16 of the largest batches. Applies to segments made from
    /// now on. Default 64 MiB: at 500 MB/s a rollover every 130 ms, prepared ahead.
    pub segment_bytes: u64,
    /// Segments kept ready beyond the active one. Default 4: half a second of writing at full speed.
    pub segments_ahead: usize,
    /// Segments that have left service are kept for another life, at most so many, and the checksums of what they hold are kept in memory
    /// for at most so many in service: 4 B per 512 B, 512 KiB for a full segment of 64 MiB. Others are removed, and their
    /// successors filled with zeros. Default 64: 4 GiB of log, for at most 32 MiB of memory.
    pub recycled_segments_max: usize,
    /// [`Wal::purge_through`] leaves at least so many bytes of log, envelopes and padding included, for followers that are behind:
    /// sending them log is cheaper than a snapshot. Default 0.
    pub retain_bytes: u64,
    /// The largest image, at most (and by default) [`IMAGE_BYTES_MAX`].
    pub batch_bytes_max: usize,
    /// Appends in flight. Default 4; more only adds latency.
    pub writes_in_flight_max: usize,
    /// Bytes of appends in flight, padding included; one larger batch may go alone. Default 1 MiB: more was measured to add latency
    /// and no throughput.
    pub bytes_in_flight_max: usize,
    /// Source of the incarnation and the segment nonces. Hand in fresh random bits in production.
    pub seed: u64,
}

impl WalConfig {
    /// The defaults for a node.
    #[must_use]
    pub fn new(cluster: ClusterId, node: NodeId, seed: u64) -> Self {
        Self {
            cluster,
            node,
            group: GroupId(0),
            segment_bytes: 64 * 1024 * 1024,
            segments_ahead: 4,
            recycled_segments_max: 64,
            retain_bytes: 0,
            batch_bytes_max: IMAGE_BYTES_MAX,
            writes_in_flight_max: 4,
            bytes_in_flight_max: 1024 * 1024,
            seed,
        }
    }

    /// Checks the limits against each other.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(IMAGE_BYTES_MIN..=IMAGE_BYTES_MAX).contains(&self.batch_bytes_max) {
            return Err(ConfigError::BatchBytes { given: self.batch_bytes_max });
        }
        let needed = 16 * slot_bytes(self.batch_bytes_max) as u64;
        let usable = self.segment_bytes.saturating_sub(slots_start(self.segment_bytes));
        let blocks = self.segment_bytes / BLOCK_BYTES as u64;
        if !self.segment_bytes.is_multiple_of(BLOCK_BYTES as u64) || usable < needed || blocks > 1 << 20 {
            return Err(ConfigError::SegmentBytes { given: self.segment_bytes, usable, needed });
        }
        if self.segments_ahead == 0 || self.writes_in_flight_max == 0 || self.bytes_in_flight_max == 0 {
            return Err(ConfigError::Zero);
        }
        Ok(())
    }
}

/// What the log tells its user.
#[expect(clippy::large_enum_variant, reason = "the large one comes once, and the queue is short")]
pub enum WalEvent<B: BlockBuf> {
    /// The log is recovered and open. The first event, but for `Poisoned`.
    Opened(Recovered),
    /// The log is durable through `last`, without a gap. At most one per [`Wal::advance`].
    Persisted {
        /// The epoch that the log is in.
        epoch: u64,
        /// The end of the last durable batch.
        last: LogIndex,
    },
    /// The truncation that opened `epoch` is durable, and so is every earlier one.
    TruncateDone {
        /// As [`Wal::truncate_after`] returned it.
        epoch: u64,
    },
    /// Every save up to this number is durable in both copies.
    HardStateSaved {
        /// As [`Wal::save_hard_state`] or [`Wal::form`] returned it, or a later one.
        sequence: u64,
    },
    /// The answer to [`Wal::read`].
    Read {
        /// The token of the request.
        token: u64,
        /// Whole batches in order, at least one.
        result: Result<Vec<StoredBatch<B>>, ReadError>,
    },
    /// The log has stopped for good. Nothing more will be acknowledged.
    Poisoned(WalError),
    /// The start of the log was moved and that is durable: the log begins behind `through`.
    Purged {
        /// As [`Wal::purge_through`] returned it, or a later one.
        through: LogIndex,
    },
    /// No further segment can be made, and at most one is left. Refuse proposals, keep the rest for control batches, and call
    /// [`Wal::retry_space`] from time to time. Before `Opened`: there is no space even for the hard state, and the start
    /// goes on when there is.
    NoSpace {
        /// Segments that are ready beyond the active one.
        segments_left: usize,
    },
    /// Segments are ready again.
    SpaceAgain,
    /// A batch was found damaged while running; comes once for each. Fetch its image from a peer and hand it to
    /// [`Wal::repair`]. Those that a start found are listed by [`Wal::damaged`] and come without an event.
    DamageFound(DamagedBatch),
    /// A damaged batch is intact again, durably.
    Repaired {
        /// Its first index.
        first: LogIndex,
        /// Its last index.
        last: LogIndex,
    },
    /// [`Wal::close`] has finished: nothing is in flight, all files are closed.
    Closed,
}

impl<B: BlockBuf> fmt::Debug for WalEvent<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Opened(recovered) => f.debug_tuple("Opened").field(recovered).finish(),
            Self::Persisted { epoch, last } => {
                f.debug_struct("Persisted").field("epoch", epoch).field("last", last).finish()
            }
            Self::TruncateDone { epoch } => f.debug_struct("TruncateDone").field("epoch", epoch).finish(),
            Self::HardStateSaved { sequence } => {
                f.debug_struct("HardStateSaved").field("sequence", sequence).finish()
            }
            Self::Read { token, result } => {
                f.debug_struct("Read").field("token", token).field("result", result).finish()
            }
            Self::Poisoned(error) => f.debug_tuple("Poisoned").field(error).finish(),
            Self::Purged { through } => f.debug_struct("Purged").field("through", through).finish(),
            Self::NoSpace { segments_left } => {
                f.debug_struct("NoSpace").field("segments_left", segments_left).finish()
            }
            Self::SpaceAgain => f.write_str("SpaceAgain"),
            Self::DamageFound(batch) => f.debug_tuple("DamageFound").field(batch).finish(),
            Self::Repaired { first, last } => {
                f.debug_struct("Repaired").field("first", first).field("last", last).finish()
            }
            Self::Closed => f.write_str("Closed"),
        }
    }
}

/// What a start found. The batches are in the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The hard state as this start has saved it: its term is at least that of the last batch.
    pub hard_state: HardState,
    /// The directory was blank and has been formatted by this start.
    pub fresh: bool,
    /// What recovery saw and did.
    pub report: RecoveryReport,
    /// What the log held before damage cut it short, now or at an earlier start; [`Wal::release_claim`] ends it.
    pub claim: Option<Claim>,
}

/// A change of term and vote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HardStateUpdate {
    /// The current term; never decreases.
    pub term: Term,
    /// The vote in it; never changes within a term once given.
    pub vote: Option<NodeId>,
}

/// Counters since the start, and levels now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WalStats {
    /// Appends submitted.
    pub writes: u64,
    /// Bytes of appends, envelopes and padding included.
    pub written_bytes: u64,
    /// Bytes of images in them.
    pub image_bytes: u64,
    /// Appends in flight now.
    pub writes_in_flight: usize,
    /// Their bytes.
    pub bytes_in_flight: usize,
    /// Saves of the hard state that became durable.
    pub hard_state_saves: u64,
    /// Times that the log went on in the next segment.
    pub rollovers: u64,
    /// Segments that were made: filled with zeros.
    pub segments_made: u64,
    /// Segments that left service and were made ready for another life.
    pub segments_recycled: u64,
    /// Segments that left service, or were given up for their space, and were removed.
    pub segments_removed: u64,
    /// Segments in service now.
    pub segments: usize,
    /// Segments ready beyond the active one now.
    pub segments_ahead: usize,
    /// Batches in the index now.
    pub batches: usize,
    /// Read requests that wait for their answer now.
    pub reads_waiting: usize,
}

/// Where the life of the log stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Recovering,
    Open,
    /// Draining; then the files are closed.
    Closing,
    ClosingFiles,
    Closed,
}

/// A cut on its way: appends wait until it is through.
struct PendingCut {
    phase: CutPhase,
    cut: Cut,
    after: LogStart,
    /// What to tell once the cut is durable.
    announce: Announce,
}

enum CutPhase {
    /// What is kept is not durable yet. The cut vouches for it, so it waits.
    Draining,
    /// The hard state with the cut is being saved.
    Saving { sequence: u64 },
    /// The cut is durable; a segment of the new epoch is being headed.
    Fresh,
}

enum Announce {
    Opened(Box<Recovered>),
    TruncateDone,
    Nothing,
}

/// The segment that is appended to.
#[derive(Clone, Copy)]
struct Active {
    generation: u32,
    file: FileId,
    nonce: u64,
    /// Where the next slot goes.
    offset: u64,
    /// The size of the segment.
    bytes: u64,
}

/// A write-ahead log over a [`Disk`].
pub struct Wal<D: Disk> {
    config: WalConfig,
    pool: Pool<D::Buf>,
    ops: Ops,
    random: Random,
    stage: Stage,
    close_asked: bool,
    poison: Option<WalError>,
    poison_told: bool,
    recovery: Option<Recovery<D::Buf>>,
    /// `Some` from the end of recovery on.
    hard_state: Option<HardStateStore<D::Buf>>,
    /// Saves that the user waits for, in order.
    saves_asked: VecDeque<u64>,
    /// The save that makes the formation durable.
    forming: Option<u64>,
    index: Index,
    segments: SegmentTable,
    removal: Removal,
    salvage: Salvage,
    recycler: Recycler,
    purges: Purges,
    /// Something was removed, or the user says so: what was short of space tries again.
    space_freed: bool,
    maker: Option<Maker<D::Buf>>,
    standby: Standby,
    active: Option<Active>,
    window: Window,
    /// What the last `Persisted` said.
    persisted_told: LogIndex,
    cut: Option<PendingCut>,
    epoch: u64,
    boot: u64,
    next_generation: u32,
    reads: Reads<D::Buf>,
    repairs: Repairs<D::Buf>,
    scrub: Scrub<D::Buf>,
    short_of_space: bool,
    /// The next [`Wal::advance`] has something to do without news.
    unfinished: bool,
    stats: WalStats,
}

impl<D: Disk> Wal<D> {
    /// A log over the directory of the disk that later calls hand in. Nothing happens before the first
    /// [`Self::advance`]; [`WalEvent::Opened`] says when it may be used. Blocks are taken from `pool`.
    #[must_use]
    pub fn open(config: WalConfig, pool: Pool<D::Buf>) -> Self {
        let poison = config.validate().err().map(WalError::Config);
        Self {
            recovery: Some(Recovery::new(config.clone(), pool.clone())),
            random: Random::new(config.seed),
            window: Window::new(config.writes_in_flight_max, config.bytes_in_flight_max),
            index: Index::new(config.group, LogStart::default()),
            config,
            pool,
            ops: Ops::default(),
            stage: Stage::Recovering,
            close_asked: false,
            poison,
            poison_told: false,
            hard_state: None,
            saves_asked: VecDeque::new(),
            forming: None,
            segments: SegmentTable::default(),
            removal: Removal::default(),
            salvage: Salvage::default(),
            recycler: Recycler::new(),
            purges: Purges::new(),
            space_freed: false,
            maker: None,
            standby: Standby::new(),
            active: None,
            persisted_told: LogIndex(0),
            cut: None,
            epoch: 0,
            boot: 0,
            next_generation: 1,
            reads: Reads::new(READS_IN_FLIGHT),
            repairs: Repairs::new(),
            scrub: Scrub::new(),
            short_of_space: false,
            unfinished: true,
            stats: WalStats::default(),
        }
    }

    /// Whether the completion of `id` is for [`Self::handle`]. Every id of the log has `0x57` in its top byte.
    #[must_use]
    pub fn owns(id: DiskOpId) -> bool {
        owner_of(id).is_some()
    }

    // What is in the log.

    /// The first index of the log; one behind [`Self::last_index`] in an empty log.
    #[must_use]
    pub fn first_index(&self) -> LogIndex {
        self.index.start().index.next()
    }

    /// The last index that was appended, durable or not.
    #[must_use]
    pub fn last_index(&self) -> LogIndex {
        self.index.end().index
    }

    /// The last batch.
    #[must_use]
    pub fn last_info(&self) -> Option<BatchInfo> {
        self.index.at(self.index.len().checked_sub(1)?).map(|(info, _)| info)
    }

    /// The position before the first batch.
    #[must_use]
    pub fn log_start(&self) -> LogStart {
        self.index.start()
    }

    /// The end of the log: index, term and chain of the last batch, or of the log's start.
    #[must_use]
    pub fn log_end(&self) -> LogStart {
        self.index.end()
    }

    /// The log is durable through here, without a gap. Runs ahead of [`WalEvent::Persisted`] only within a turn.
    #[must_use]
    pub fn durable_through(&self) -> LogIndex {
        self.window.durable_through()
    }

    /// The batch that `index` lies in.
    #[must_use]
    pub fn batch_containing(&self, index: LogIndex) -> Option<BatchInfo> {
        self.index.containing(index).map(|(info, _)| info)
    }

    /// The batch whose first index is `first`.
    #[must_use]
    pub fn batch_starting_at(&self, first: LogIndex) -> Option<BatchInfo> {
        self.index.at(self.index.ordinal_starting_at(first)?).map(|(info, _)| info)
    }

    /// The chain at `end`, when that is the end of a batch or the log's start.
    #[must_use]
    pub fn chain_at(&self, end: LogIndex) -> Option<Chain> {
        self.index.chain_at(end)
    }

    /// All batches in order.
    pub fn batches(&self) -> impl Iterator<Item = BatchInfo> + '_ {
        self.index.iter().map(|(info, _)| info)
    }

    /// The epoch: counts starts and truncations.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The hard state as last asked to be saved; `None` before the log is recovered.
    #[must_use]
    pub fn hard_state(&self) -> Option<&HardState> {
        self.hard_state.as_ref().map(|store| &store.state)
    }

    /// Why the log has stopped.
    #[must_use]
    pub fn poisoned(&self) -> Option<&WalError> {
        self.poison.as_ref()
    }

    /// Counters and levels.
    #[must_use]
    pub fn stats(&self) -> WalStats {
        WalStats {
            writes_in_flight: self.window.in_flight(),
            bytes_in_flight: self.window.bytes_in_flight(),
            segments: self.segments.len(),
            segments_ahead: self.segments_ahead(),
            segments_made: self.maker.as_ref().map_or(0, Maker::made),
            batches: self.index.len(),
            reads_waiting: self.reads.len(),
            ..self.stats
        }
    }

    /// [`WalStats::writes_in_flight`] alone.
    #[must_use]
    pub fn writes_in_flight(&self) -> usize {
        self.window.in_flight()
    }

    /// [`WalStats::rollovers`] alone.
    #[must_use]
    pub fn rollovers(&self) -> u64 {
        self.stats.rollovers
    }

    /// Names the oldest operation in flight that the service waits for (an append, a save of the hard state, or a step in the
    /// making of the segment that is appended to next), so that its age can be taken: the number stays the same until
    /// that operation ends, and no later operation has it.
    #[must_use]
    pub fn oldest_operation(&self) -> Option<u64> {
        self.ops.oldest_durable()
    }

    // Damage.

    /// The damaged batches of the log, by index. The log goes on behind them; each awaits [`Self::repair`].
    pub fn damaged(&self) -> impl Iterator<Item = DamagedBatch> + '_ {
        self.index.damaged().filter_map(|(first, cause)| self.damaged_batch(first, cause))
    }

    /// The first indexes of the damaged batches, in order.
    pub fn damaged_firsts(&self) -> impl Iterator<Item = LogIndex> + '_ {
        self.index.damaged().map(|(first, _)| first)
    }

    /// What is known of the damaged batch that begins at `first`.
    #[must_use]
    pub fn damaged_at(&self, first: LogIndex) -> Option<DamagedBatch> {
        self.damaged_batch(first, self.index.damage_of(first)?)
    }

    /// The first index of the first damaged batch.
    #[must_use]
    pub fn first_damaged(&self) -> Option<LogIndex> {
        self.index.damaged().next().map(|(first, _)| first)
    }

    /// Whether the batch that begins at `first` is damaged.
    #[must_use]
    pub fn is_damaged(&self, first: LogIndex) -> bool {
        self.index.damage_of(first).is_some()
    }

    fn with_scrub<T>(
        &mut self,
        disk: &mut D,
        work: impl FnOnce(&mut Scrub<D::Buf>, &mut scrub::Tools<'_, D>) -> T,
    ) -> T {
        let mut tools = scrub::Tools {
            disk,
            ops: &mut self.ops,
            pool: &self.pool,
            index: &self.index,
            segments: &mut self.segments,
            active: self.active.map(|active| active.generation),
            durable_through: self.window.durable_through(),
            hard_state: self.hard_state.as_ref().and_then(HardStateStore::at_rest),
        };
        work(&mut self.scrub, &mut tools)
    }

    /// Begins to rebuild the next segment that has repaired batches waiting. One that is still appended to is left first: the log goes
    /// on in the next.
    fn advance_repairs(&mut self, disk: &mut D) {
        self.repairs.forget_void(&self.index);
        let Some(generation) = self.repairs.next_generation() else { return };
        if self.active.is_some_and(|active| active.generation == generation) {
            if self.cut.is_some() || !self.standby_fits() {
                return;
            }
            self.stats.rollovers += 1;
            self.activate();
        }
        if self.window.writes_to(generation) {
            return;
        }
        let Some(segment) = self.segments.get_mut(generation) else {
            self.repairs.forget_segment(generation);
            return;
        };
        // Held, so that the file is not removed while a new one takes its place.
        segment.operations += 1;
        let mut tools = repair::Tools {
            disk,
            ops: &mut self.ops,
            pool: &self.pool,
            index: &self.index,
            segments: &self.segments,
        };
        if let Some(segment) = self.segments.get(generation) {
            self.repairs.begin(&mut tools, segment);
        }
    }

    fn repair_done(
        &mut self,
        disk: &mut D,
        done: DiskDone<D::Buf>,
        events: &mut VecDeque<WalEvent<D::Buf>>,
    ) -> Result<(), WalError> {
        if self.stage != Stage::Open {
            self.repairs.stop();
        }
        let tools = repair::Tools {
            disk,
            ops: &mut self.ops,
            pool: &self.pool,
            index: &self.index,
            segments: &self.segments,
        };
        let progress = self.repairs.handle(tools, done)?;
        if let Some(generation) = progress.ended {
            self.release(generation);
        }
        if let Some(segment) = progress.replaced.and_then(|generation| self.segments.get_mut(generation)) {
            segment.is_replaced = segment.descriptor != Descriptor::Closed;
            // The new file's envelopes are not those that were counted: it is not recycled later.
            segment.sums = None;
        }
        for info in progress.repaired {
            if self.index.damage_of(info.first).is_some()
                && self.index.chain_at(info.last) == Some(info.chain)
            {
                self.index.repaired(&info);
                let (first, last) = (info.first, info.last);
                events.push_back(WalEvent::Repaired { first, last });
            }
        }
        for first in progress.found {
            self.found_damaged(first, events);
        }
        Ok(())
    }

    /// A read has found a batch damaged that was intact when the log was opened, or written since.
    fn found_damaged(&mut self, first: LogIndex, events: &mut VecDeque<WalEvent<D::Buf>>) -> bool {
        let cause = DamageCause::ImageRotten;
        let is_new = self.index.damage(first, cause);
        if is_new && let Some(batch) = self.damaged_batch(first, cause) {
            // It holds something else than what was counted: it is not recycled later.
            if let Some(segment) = self.segments.get_mut(batch.generation) {
                segment.sums = None;
            }
            events.push_back(WalEvent::DamageFound(batch));
        }
        is_new
    }

    /// The scrubber has looked at something that is no batch.
    fn checked(&mut self, disk: &mut D, done: DiskDone<D::Buf>) -> Result<(), WalError> {
        let generation = self.scrub.checks(done.id);
        let found = self.with_scrub(disk, |scrub, tools| scrub.checked(tools, done));
        if let Some(generation) = generation {
            self.release(generation);
        }
        if self.stage != Stage::Open {
            return Ok(());
        }
        match found {
            scrub::Found::Nothing => {}
            scrub::Found::Header(generation) => self.repairs.rebuild(generation),
            scrub::Found::HardState(copy) => {
                if let Some(store) = self.hard_state.as_mut() {
                    store.request_from(copy);
                }
                self.advance_hard_state(disk)?;
            }
        }
        Ok(())
    }

    fn damaged_batch(&self, first: LogIndex, cause: DamageCause) -> Option<DamagedBatch> {
        let (info, place) = self.index.containing(first)?;
        let segment = self.segments.get(place.generation).map(|segment| segment.name);
        Some(DamagedBatch {
            info,
            previous: self.index.chain_at(first.previous())?,
            segment: segment.unwrap_or_default().to_string(),
            generation: place.generation,
            offset: place.offset,
            cause,
        })
    }

    /// Takes the image of a damaged batch, at byte 512 of `block`, verifies it against the index, and queues it to be written
    /// into a new copy of its segment. [`WalEvent::Repaired`] tells when that is durable.
    ///
    /// # Errors
    /// When no such batch is damaged, the image is not its image, or too much is queued ([`RepairError::Busy`]).
    pub fn repair(&mut self, disk: &mut D, first: LogIndex, block: Block<D::Buf>) -> Result<(), RepairError> {
        if self.stage != Stage::Open || self.poison.is_some() {
            return Err(RepairError::Stopped);
        }
        self.repairs.queue(&self.index, &self.segments, first, block)?;
        self.advance_repairs(disk);
        Ok(())
    }

    /// Whether the image of the damaged batch that begins at `first` is being written, or waits for that. One that was taken by
    /// [`Self::repair`] and is not awaited any more has made room for others, since its segment could not be rebuilt: it may be
    /// handed in again.
    #[must_use]
    pub fn awaits_repair(&self, first: LogIndex) -> bool {
        self.repairs.awaits(&self.index, first)
    }

    /// Intact batches behind the place where damage cut the log, by first index, one for each: the log held them before, and some may
    /// belong to it again. Empty without a claim, and once a truncation has cut off what they continued.
    pub fn salvage(&self) -> impl Iterator<Item = BatchInfo> + '_ {
        self.salvage.iter()
    }

    /// Asks for the batch of the salvage that begins at `first` and continues a log whose chain is `previous`. The answer comes
    /// as [`WalEvent::Read`]; [`ReadError::NotFound`] when there is none.
    pub fn read_salvage(&mut self, disk: &mut D, token: u64, first: LogIndex, previous: Chain) {
        if self.stage != Stage::Open || self.poison.is_some() {
            self.reads.refuse(token, ReadError::Stopped);
        } else if self.reads.len() >= REQUESTS_MAX {
            self.reads.refuse(token, ReadError::Busy);
        } else {
            self.reads.request_salvage(self.salvage.starting_at(first), token, first, previous);
            let active = self.active.map(|active| active.generation);
            self.reads.advance(disk, &mut self.ops, &self.pool, &mut self.segments, active);
        }
    }

    /// Ends the claim. Returns the number that [`WalEvent::HardStateSaved`] will reach; then the segments that hold nothing but
    /// salvage are removed.
    ///
    /// # Panics
    /// When the log is not open.
    pub fn release_claim(&mut self, disk: &mut D) -> u64 {
        // When the log's start has come to lie in what was appended since, all that is older lies before it from now on.
        let first = self.index.first_generation().or(self.active.map(|active| active.generation));
        let first = first.filter(|_| self.salvage.is_passed_by(self.index.start().index));
        let state = &mut self.open_hard_state().state;
        state.start_generation = state.start_generation.max(first.unwrap_or_default());
        state.claim = None;
        state.claim_epoch = 0;
        state.claim_cut = LogIndex(0);
        state.claim_may_settle = false;
        let sequence = self.ask_save(disk);
        self.salvage.release(sequence);
        sequence
    }

    /// Lets the scrubber read about `budget_bytes` of closed segments.
    pub fn scrub_step(&mut self, disk: &mut D, budget_bytes: u64) {
        if self.stage == Stage::Open && self.poison.is_none() {
            self.with_scrub(disk, |scrub, tools| scrub.grant(tools, budget_bytes));
        }
    }

    /// How far the scrubber has come.
    #[must_use]
    pub fn scrub_status(&self) -> ScrubStatus {
        self.scrub.status
    }

    // What is asked of the log.

    /// Whether a batch of `slot_bytes` ([`BatchInfo::slot_bytes`]) can be appended at once: a position is there, the limits of
    /// what is in flight allow it, and no cut or formation is under way.
    ///
    /// It knows no kinds of batches. After [`WalEvent::NoSpace`] it stays true until the last segment is full: that the rest is
    /// kept for batches that lead out of the lack (an election's first, a change of members) is up to the caller, who
    /// stops proposing. A follower takes what it has room for; from then on this is false and nothing is lost.
    #[must_use]
    pub fn is_ready_for(&self, slot_bytes: usize) -> bool {
        let open = self.stage == Stage::Open && self.poison.is_none() && self.cut.is_none();
        let fits = |active: &Active| active.offset + slot_bytes as u64 <= active.bytes;
        let position = self.active.as_ref().is_some_and(fits) || self.standby_fits();
        open && self.forming.is_none() && position && self.window.has_room(slot_bytes)
    }

    /// Appends a batch: submits one durable write of its slot. The block holds the image at byte 512; the envelope in front of it
    /// and the padding behind it are written here. The block is handed back shared, to be sent and applied while it is
    /// being written.
    ///
    /// # Panics
    /// When the log is not ready for it, or `info` does not follow the last batch.
    pub fn append(&mut self, disk: &mut D, mut block: Block<D::Buf>, info: BatchInfo) -> SharedBlock<D::Buf> {
        let bytes = info.slot_bytes();
        assert!(self.is_ready_for(bytes), "appends wait until the log is ready");
        let end = self.index.end();
        assert_eq!(info.group, self.config.group, "the batch belongs to this log");
        assert_eq!(info.first, end.index.next(), "the batch follows the log");
        assert!(info.last >= info.first && info.term >= end.term, "terms and indices rise along the log");
        assert!(info.image_bytes as usize <= self.config.batch_bytes_max, "the batch is within the cap");
        let image_end = ENVELOPE_BYTES + info.image_bytes as usize;
        debug_assert_eq!(
            BatchView::trusted(&block[ENVELOPE_BYTES..image_end]).map(|view| view.info()),
            Ok(info),
            "the block holds the image that is announced"
        );

        let active = self.position_for(bytes as u64);
        let envelope = Envelope {
            cluster: self.config.cluster,
            nonce: active.nonce,
            generation: active.generation,
            group: info.group,
            offset: active.offset,
            epoch: self.epoch,
            boot: self.boot,
            durable_through: self.window.durable_through(),
            term: info.term,
            first: info.first,
            last: info.last,
            chain: info.chain,
            image_bytes: info.image_bytes,
        };
        write_envelope(&mut block, &envelope);
        block[image_end..bytes].fill(0);
        let (file, offset) = (active.file, active.offset);
        if let Some(segment) = self.segments.get_mut(active.generation) {
            segment.operations += 1;
            if let Some(sums) = segment.sums.as_mut() {
                sums.add(offset, &block[..bytes], &info);
            }
        }
        let block = block.share();
        let op = DiskOp::Write { file, offset, block: block.clone(), bytes };
        let id = self.ops.submit(disk, Owner::Append, op);

        self.window.begin(id, active.generation, info.last, bytes);
        self.index.push(&info, Place { generation: active.generation, offset });
        self.active = Some(Active { offset: offset + bytes as u64, ..active });
        self.stats.writes += 1;
        self.stats.written_bytes += bytes as u64;
        self.stats.image_bytes += u64::from(info.image_bytes);
        if let Some(maker) = self.maker.as_mut() {
            maker.follow(bytes as u64);
        }
        block
    }

    /// Cuts off everything after `index` and returns the new epoch. The index shows the cut at once; appends wait until
    /// it is durable and a fresh segment is there. [`WalEvent::TruncateDone`] tells the former.
    ///
    /// # Panics
    /// When the log is not open, or `index` is neither the end of a batch nor the log's start.
    pub fn truncate_after(&mut self, disk: &mut D, index: LogIndex) -> u64 {
        assert_eq!(self.stage, Stage::Open, "an open log is truncated");
        assert!(self.index.chain_at(index).is_some(), "the log is cut at the end of a batch");
        self.unfinished = true;
        self.epoch += 1;
        self.salvage.cut_after(index);
        self.index.truncate_after(index);
        self.window.cut_after(index);
        self.reads.cut_after(index);
        self.scrub.reads.cut_after(index);
        self.persisted_told = self.persisted_told.min(index);
        self.active = None;
        let place = self.index.end_place();
        let cut = place.map_or(Cut { index, ..Cut::default() }, |place| Cut {
            index,
            generation: place.generation,
            offset: place.offset,
        });
        for segment in self.segments.take_after(cut.generation) {
            self.let_go(segment);
        }
        if mutants::active(Mutant::OverwriteInPlaceAfterTruncation) && self.go_on_at(cut) {
            return self.epoch;
        }
        // A cut that is still on its way is contained in this one.
        let (phase, after) = (CutPhase::Draining, self.index.end());
        self.cut = Some(PendingCut { phase, cut, after, announce: Announce::TruncateDone });
        self.try_advance_cut(disk);
        self.epoch
    }

    /// Saves term and vote; returns the number that [`WalEvent::HardStateSaved`] will reach. The vote may be acted on only then.
    ///
    /// # Panics
    /// When the log is not open, the term decreases, or a vote of the same term changes.
    pub fn save_hard_state(&mut self, disk: &mut D, update: HardStateUpdate) -> u64 {
        let state = &mut self.open_hard_state().state;
        assert!(update.term >= state.term, "terms never decrease");
        assert!(
            update.term > state.term || state.vote.is_none() || state.vote == update.vote,
            "a vote is given once in a term"
        );
        state.term = update.term;
        state.vote = update.vote;
        self.ask_save(disk)
    }

    /// Records the formed configuration, and the genesis as the chain before the first batch. Appends wait until it is durable.
    /// Returns the number that [`WalEvent::HardStateSaved`] will reach.
    ///
    /// # Panics
    /// When the log is not open, is formed already, or has batches; when the configuration is empty or too long.
    pub fn form(&mut self, disk: &mut D, configuration: Vec<u8>, genesis: Chain) -> u64 {
        assert!(
            self.index.is_empty() && self.index.start().index.get() == 0,
            "formation precedes every batch"
        );
        assert!(
            (1..=crate::format::CONFIGURATION_BYTES_MAX).contains(&configuration.len()),
            "the configuration has a length that can be stored"
        );
        let state = &mut self.open_hard_state().state;
        assert!(state.configuration.is_empty(), "a cluster is formed once");
        state.configuration = configuration;
        state.start.chain = genesis;
        self.index.set_genesis(genesis);
        let sequence = self.ask_save(disk);
        self.forming = Some(sequence);
        sequence
    }

    /// Records how far the log is durable, so that a later loss of its last write is recognised. For idle moments: it costs a save of
    /// the hard state. Does nothing when that is known already.
    pub fn save_witness(&mut self, disk: &mut D) {
        let durable_through = self.window.durable_through();
        if self.stage == Stage::Open
            && self.poison.is_none()
            && let Some(store) = self.hard_state.as_mut()
            && store.state.witness < durable_through
            && store.is_quiet()
        {
            store.state.witness = durable_through;
            store.request();
            self.try_advance_hard_state(disk);
        }
    }

    /// Asks for whole durable batches from the one that begins at `first`, as many as fit `bytes_max` (at least one, at most 64). The
    /// answers come as [`WalEvent::Read`] in the order of the requests.
    pub fn read(&mut self, disk: &mut D, token: u64, first: LogIndex, bytes_max: usize) {
        if self.stage != Stage::Open || self.poison.is_some() {
            self.reads.refuse(token, ReadError::Stopped);
        } else if self.reads.len() >= REQUESTS_MAX {
            self.reads.refuse(token, ReadError::Busy);
        } else {
            self.reads.request(
                &self.index,
                &self.segments,
                self.window.durable_through(),
                token,
                first,
                bytes_max,
            );
            let active = self.active.map(|active| active.generation);
            self.reads.advance(disk, &mut self.ops, &self.pool, &mut self.segments, active);
        }
    }

    /// Space may have come back: the next [`Self::advance`] tries again to make segments, or to start.
    pub fn retry_space(&mut self) {
        (self.space_freed, self.unfinished) = (true, true);
        self.repairs.retry();
    }

    /// Whether a segment is being filled with zeros: call [`Self::fill_step`] from time to time while it is.
    #[must_use]
    pub fn is_filling(&self) -> bool {
        self.stage == Stage::Open
            && self.poison.is_none()
            && self.maker.as_ref().is_some_and(Maker::is_filling)
    }

    /// Says that time has passed: [`FILL_INTERVAL`](crate::FILL_INTERVAL), with a budget of
    /// [`FILL_STEP_BYTES`](crate::FILL_STEP_BYTES), in a node. While the log appends and has a segment to go on in, zeros
    /// are written only as it appends, a little faster; a call lets about `budget_bytes` of them be written besides. When nothing was appended since the last call,
    /// they are written at full speed until something is. The log's progress does not depend on these calls: without them,
    /// an idle log's pool stays as full as it is.
    pub fn fill_step(&mut self, disk: &mut D, budget_bytes: u64) {
        if self.is_filling()
            && let Some(maker) = self.maker.as_mut()
        {
            maker.pass(disk, &mut self.ops, budget_bytes);
        }
    }

    /// Finishes what is in flight, records how far the log is durable, and closes the files. [`WalEvent::Closed`] is the last event. A
    /// start that is under way is finished first; reads that wait are refused.
    pub fn close(&mut self, disk: &mut D) {
        (self.close_asked, self.unfinished) = (true, true);
        if self.stage == Stage::Open && self.poison.is_none() {
            self.begin_closing(disk);
            self.has_drained(disk);
        }
    }

    // The turns.

    /// Takes a completion whose id the log owns.
    pub fn handle(&mut self, disk: &mut D, done: DiskDone<D::Buf>, events: &mut VecDeque<WalEvent<D::Buf>>) {
        let Some(owner) = owner_of(done.id) else { return };
        self.ops.ended(done.id);
        self.unfinished = true;
        if self.poison.is_some() || self.stage >= Stage::ClosingFiles {
            // Nothing is acknowledged any more; what comes back is only let go.
            return;
        }
        if let Err(error) = self.dispatch(disk, owner, done, events) {
            self.stop(error);
        }
    }

    /// Whether [`Self::advance`] has something to do: something has completed since the last one, or what was asked of the log,
    /// or that one itself, has left it a part.
    #[must_use]
    pub fn is_due(&self) -> bool {
        let scrubs = self.stage == Stage::Open && self.poison.is_none();
        self.unfinished
            || self.poison.is_some() && !self.poison_told
            || self.reads.has_finished()
            || scrubs && self.scrub.reads.has_finished()
    }

    /// Starts what can be started, and reports how far the log is durable. Called once per turn, after the completions; without
    /// any it does nothing, unless [`Self::is_due`].
    pub fn advance(&mut self, disk: &mut D, events: &mut VecDeque<WalEvent<D::Buf>>) {
        if !self.is_due() {
            return;
        }
        self.unfinished = false;
        if self.poison.is_none()
            && self.stage < Stage::ClosingFiles
            && let Err(error) = self.advance_parts(disk, events)
        {
            self.stop(error);
        }
        if let Some(error) = &self.poison
            && !self.poison_told
        {
            self.poison_told = true;
            events.push_back(WalEvent::Poisoned(error.clone()));
        }
        while let Some((token, result)) = self.reads.finished() {
            events.push_back(WalEvent::Read { token, result });
        }
        if self.close_asked {
            self.advance_close(disk, events);
        }
    }

    fn advance_parts(
        &mut self,
        disk: &mut D,
        events: &mut VecDeque<WalEvent<D::Buf>>,
    ) -> Result<(), WalError> {
        if let Some(recovery) = self.recovery.as_mut() {
            recovery.start(disk, &mut self.ops);
            return Ok(());
        }
        self.window.settle();
        let durable_through = self.window.durable_through();
        if durable_through > self.persisted_told {
            self.persisted_told = durable_through;
            events.push_back(WalEvent::Persisted { epoch: self.epoch, last: durable_through });
        }
        self.tell_saves(events);
        self.end_claim();
        self.advance_purges(events);
        self.advance_cut(disk, events)?;
        self.advance_hard_state(disk)?;
        self.advance_blocked_start(disk, events);
        self.advance_segments(disk, events)?;
        self.advance_removal(disk);
        let active = self.active.map(|active| active.generation);
        self.reads.advance(disk, &mut self.ops, &self.pool, &mut self.segments, active);
        if self.stage == Stage::Open {
            self.with_scrub(disk, |scrub, tools| scrub.advance(tools));
            self.advance_repairs(disk);
        }
        Ok(())
    }

    fn dispatch(
        &mut self,
        disk: &mut D,
        owner: Owner,
        done: DiskDone<D::Buf>,
        events: &mut VecDeque<WalEvent<D::Buf>>,
    ) -> Result<(), WalError> {
        let stray = WalError::Protocol { what: "taking a completion" };
        match owner {
            Owner::Recovery => {
                let Some(recovery) = self.recovery.as_mut() else { return Err(stray) };
                if let Some(found) = recovery.handle(disk, &mut self.ops, &mut self.random, done)? {
                    self.recovery = None;
                    self.take_over(found)?;
                }
            }
            Owner::HardState => {
                let Some(store) = self.hard_state.as_mut() else { return Err(stray) };
                let before = store.durable_sequence();
                store.handle(disk, &mut self.ops, done)?;
                self.stats.hard_state_saves += u64::from(store.durable_sequence() > before);
            }
            Owner::Maker => {
                let Some(maker) = self.maker.as_mut() else { return Err(stray) };
                maker.handle(disk, &mut self.ops, &self.pool, done)?;
            }
            Owner::Standby => self.standby.handle(disk, &mut self.ops, done)?,
            Owner::Append => {
                let Some(landed) = self.window.landed(done.id) else { return Err(stray) };
                self.release(landed.generation);
                let what = "writing a batch";
                match done.result {
                    Ok(DiskOutput::Written { bytes }) if bytes == landed.bytes => {}
                    Ok(DiskOutput::Written { .. }) if mutants::active(Mutant::ShortWriteTaken) => {}
                    Err(_) if mutants::active(Mutant::FailedWriteIgnored) => {}
                    Ok(DiskOutput::Written { bytes }) => {
                        return Err(WalError::ShortWrite { what, asked: landed.bytes, written: bytes });
                    }
                    Ok(_) => return Err(WalError::Protocol { what }),
                    Err(error) => return Err(WalError::Disk { what, error }),
                }
            }
            Owner::Read => {
                let is_scrub = self.scrub.reads.is_reading(done.id);
                let reads = if is_scrub { &mut self.scrub.reads } else { &mut self.reads };
                let Some(generation) = reads.handle(&self.index, &self.segments, done) else {
                    return Err(stray);
                };
                let damaged = reads.take_damaged();
                self.release(generation);
                for first in damaged {
                    let found = self.found_damaged(first, events);
                    self.scrub.status.found += u64::from(is_scrub && found);
                }
            }
            Owner::Descriptor => self.descriptor_done(done)?,
            Owner::Repair => self.repair_done(disk, done, events)?,
            Owner::Removal => self.removal_done(done)?,
            Owner::Recycle => self.recycle_done(disk, done)?,
            Owner::Scrub => self.checked(disk, done)?,
        }
        Ok(())
    }

    /// Recovery is through: what it found becomes the log, and the cut that separates it from what this process will
    /// write is begun.
    fn take_over(&mut self, found: Found) -> Result<(), WalError> {
        let Found {
            mut hard_state,
            fresh,
            index,
            claim,
            claim_epoch,
            claim_cut,
            claim_may_settle,
            salvage,
            unplaced,
            segments,
            purged,
            free,
            next_serial,
            report,
        } = found;
        self.index = index;
        self.epoch = hard_state.epoch + 1;
        self.boot = hard_state.boot + 1;
        // The claim becomes durable with the cut, before anyone learns that the log is open.
        hard_state.claim = claim;
        hard_state.claim_epoch = match (claim, claim_epoch) {
            (None, _) => 0,
            (Some(_), 0) => self.epoch,
            (Some(_), epoch) => epoch,
        };
        hard_state.claim_cut = claim_cut;
        hard_state.claim_may_settle = claim_may_settle;
        self.salvage = Salvage::new(salvage, unplaced, hard_state.claim_epoch, claim_cut, claim_may_settle);
        let end = self.index.end();
        let place = self.index.end_place();
        let generation = place.map_or(0, |place| place.generation);
        let newest = segments.last().map_or(0, |segment| segment.header.generation);
        let newest = newest.max(hard_state.generation).max(hard_state.start_generation);
        self.removal.segments.extend(purged.into_iter().map(Segment::found));
        for segment in segments {
            let generation = segment.header.generation;
            let twin = self
                .segments
                .iter()
                .chain(&self.removal.segments)
                .any(|other| other.generation() == generation);
            if twin {
                // Recovery has doubted it and taken nothing from it.
                self.salvage.keep_file(segment.name);
                continue;
            }
            let segment = Segment::found(segment);
            // A segment without a batch of the log is never needed again: its cut, if it began with one, is contained in
            // the new one.
            if self.index.uses(generation) {
                self.segments.push(segment);
            } else {
                self.let_go(segment);
            }
        }

        self.next_generation = newest.checked_add(1).ok_or(WalError::GenerationsExhausted)?;
        self.random.stir(self.boot);
        self.random.stir(self.epoch);
        self.random.stir(hard_state.incarnation.0 as u64);
        self.window.set_durable_through(end.index);
        self.persisted_told = end.index;
        let term = end.term.max(claim.map_or(Term(0), |claim| claim.term));
        if term > hard_state.term {
            // A batch of a term is proof of the term, though not of a vote in it.
            hard_state.term = term;
            hard_state.vote = None;
        }
        let offset = place.map_or(0, |place| place.offset);
        let cut = Cut { index: end.index, generation, offset };
        self.maker = Some(Maker::new(self.config.segment_bytes, next_serial, free));
        let recovered = Recovered { hard_state: hard_state.clone(), fresh, report, claim };
        self.hard_state = Some(HardStateStore::new(hard_state));
        let announce = Announce::Opened(Box::new(recovered));
        self.cut = Some(PendingCut { phase: CutPhase::Draining, cut, after: end, announce });
        Ok(())
    }

    /// The log no longer needs a segment: it is removed, or kept for what it holds under a claim.
    fn let_go(&mut self, segment: Segment) {
        if self.salvage.keeps(&segment) {
            self.segments.push(segment);
        } else {
            self.removal.segments.push_back(segment);
        }
    }

    // Cutting.

    fn try_advance_cut(&mut self, disk: &mut D) {
        if self.poison.is_none()
            && let Err(error) = self.begin_cut_save(disk)
        {
            self.stop(error);
        }
    }

    /// Once everything before the cut is durable, saves the cut.
    fn begin_cut_save(&mut self, disk: &mut D) -> Result<(), WalError> {
        self.window.settle();
        let durable_through = self.window.durable_through();
        let (Some(pending), Some(store)) = (self.cut.as_mut(), self.hard_state.as_mut()) else {
            return Ok(());
        };
        if !matches!(pending.phase, CutPhase::Draining) || durable_through < pending.cut.index {
            return Ok(());
        }
        store.state.epoch = self.epoch;
        store.state.boot = self.boot;
        store.state.cut = pending.cut;
        store.state.generation = self.next_generation - 1;
        // Everything before the cut is durable, nothing behind it counts.
        store.state.witness = pending.cut.index;
        pending.phase = CutPhase::Saving { sequence: store.request() };
        self.advance_hard_state(disk)
    }

    fn advance_cut(&mut self, disk: &mut D, events: &mut VecDeque<WalEvent<D::Buf>>) -> Result<(), WalError> {
        self.begin_cut_save(disk)?;
        let (Some(pending), Some(store)) = (self.cut.as_mut(), self.hard_state.as_ref()) else {
            return Ok(());
        };
        if let CutPhase::Saving { sequence } = pending.phase
            && (store.durable_sequence() >= sequence || mutants::active(Mutant::CutNotAwaited))
        {
            pending.phase = CutPhase::Fresh;
            match std::mem::replace(&mut pending.announce, Announce::Nothing) {
                Announce::Opened(mut recovered) => {
                    recovered.hard_state = store.state.clone();
                    if self.stage == Stage::Recovering {
                        self.stage = Stage::Open;
                    }
                    events.push_back(WalEvent::Opened(*recovered));
                }
                Announce::TruncateDone => events.push_back(WalEvent::TruncateDone { epoch: self.epoch }),
                Announce::Nothing => {}
            }
        }
        Ok(())
    }

    // The hard state.

    fn open_hard_state(&mut self) -> &mut HardStateStore<D::Buf> {
        assert_eq!(self.stage, Stage::Open, "the hard state of an open log is changed");
        self.hard_state.as_mut().expect("an open log has its hard state")
    }

    fn ask_save(&mut self, disk: &mut D) -> u64 {
        let durable_through = self.window.durable_through();
        let store = self.open_hard_state();
        // A witness costs nothing when something is saved anyway.
        store.state.witness = store.state.witness.max(durable_through);
        let sequence = store.request();
        self.saves_asked.push_back(sequence);
        self.try_advance_hard_state(disk);
        sequence
    }

    fn try_advance_hard_state(&mut self, disk: &mut D) {
        if self.poison.is_none()
            && let Err(error) = self.advance_hard_state(disk)
        {
            self.stop(error);
        }
    }

    fn advance_hard_state(&mut self, disk: &mut D) -> Result<(), WalError> {
        match self.hard_state.as_mut() {
            Some(store) => store.advance(disk, &mut self.ops, &self.pool),
            None => Ok(()),
        }
    }

    fn tell_saves(&mut self, events: &mut VecDeque<WalEvent<D::Buf>>) {
        let Some(store) = self.hard_state.as_ref() else { return };
        let durable = store.durable_sequence();
        self.forming = self.forming.filter(|sequence| *sequence > durable);
        let answered = self.saves_asked.partition_point(|sequence| *sequence <= durable);
        if answered > 0 {
            self.saves_asked.drain(..answered);
            events.push_back(WalEvent::HardStateSaved { sequence: durable });
        }
    }

    /// Once the release of the claim is durable, what was kept under it goes.
    fn end_claim(&mut self) {
        let Some(store) = self.hard_state.as_ref() else { return };
        let Some(unplaced) = self.salvage.released(store.durable_sequence()) else { return };
        self.removal.files.extend(unplaced);
        let active = self.active.map(|active| active.generation);
        let index = &self.index;
        let unused = self
            .segments
            .take_if(|segment| Some(segment.generation()) != active && !index.uses(segment.generation()));
        self.removal.segments.extend(unused);
    }

    // The segments.

    /// What the next segment follows, if that is known.
    fn next_origin(&self) -> Option<SegmentOrigin> {
        match &self.cut {
            Some(PendingCut { phase: CutPhase::Fresh, cut, after, .. }) => {
                Some(SegmentOrigin::Cut { cut: *cut, after: *after })
            }
            Some(_) => None,
            None => {
                let active = self.active.as_ref()?;
                Some(SegmentOrigin::Rollover { previous: active.generation })
            }
        }
    }

    /// With that bug put back: the log goes on at the cut, in the segment that it lies in.
    fn go_on_at(&mut self, cut: Cut) -> bool {
        let Some(segment) = self.segments.get_mut(cut.generation).filter(|_| self.cut.is_none()) else {
            return false;
        };
        // Only what this process has made can be written to.
        let Some(file) = segment.file().filter(|_| segment.header.boot == self.boot) else { return false };
        segment.sums = None;
        let SegmentHeader { generation, nonce, segment_bytes: bytes, .. } = segment.header;
        self.active = Some(Active { generation, file, nonce, offset: cut.offset, bytes });
        true
    }

    /// With that bug put back: the segment that the last process appended to, once it is open for writing.
    fn go_on_after_start(&mut self, disk: &mut D) -> bool {
        let Some(place) = self.index.end_place().filter(|_| self.active.is_none()) else { return false };
        let Some(segment) = self.segments.get_mut(place.generation) else { return false };
        let header = segment.header;
        if self.standby.is_idle() {
            self.standby.reuse(disk, &mut self.ops, segment.name, header);
        } else if self.standby.header().is_some_and(|ready| ready.generation == header.generation)
            && let Some((_, file, _)) = self.standby.take()
        {
            segment.descriptor = Descriptor::Open(file);
            let SegmentHeader { generation, nonce, segment_bytes: bytes, .. } = header;
            self.active = Some(Active { generation, file, nonce, offset: place.offset, bytes });
            self.cut = None;
        }
        true
    }

    /// Whether the standby's durable header is the one that is needed next.
    fn standby_fits(&self) -> bool {
        self.standby.header().is_some_and(|header| {
            header.epoch == self.epoch && self.next_origin().is_some_and(|origin| origin == header.origin)
        })
    }

    fn segments_ahead(&self) -> usize {
        let ready = self.maker.as_ref().map_or(0, Maker::ready);
        ready + usize::from(!self.standby.is_idle())
    }

    /// The position of a slot of `bytes`: in the active segment, or at the start of the standby, which becomes active.
    fn position_for(&mut self, bytes: u64) -> Active {
        match self.active {
            Some(active) if active.offset + bytes <= active.bytes => active,
            _ => {
                self.stats.rollovers += 1;
                self.activate().expect("a log that is ready has a position")
            }
        }
    }

    /// Makes the standby the active segment.
    fn activate(&mut self) -> Option<Active> {
        let (name, file, header) = self.standby.take()?;
        let counted = self.segments.iter().filter(|segment| segment.sums.is_some()).count();
        let counts =
            counted < self.config.recycled_segments_max && header.segment_bytes == self.config.segment_bytes;
        let active = Active {
            generation: header.generation,
            file,
            nonce: header.nonce,
            offset: slots_start(header.segment_bytes),
            bytes: header.segment_bytes,
        };
        self.segments.push(Segment {
            name,
            header,
            descriptor: Descriptor::Open(file),
            operations: 0,
            used: 0,
            is_replaced: false,
            sums: counts.then(|| SectorSums::new(header.segment_bytes)),
        });
        self.active = Some(active);
        // Another one is to be made ready.
        self.unfinished = true;
        if let Some(maker) = self.maker.as_mut() {
            // One attempt per segment used up, besides those that the user asks for.
            maker.retry();
        }
        self.active
    }

    fn advance_segments(
        &mut self,
        disk: &mut D,
        events: &mut VecDeque<WalEvent<D::Buf>>,
    ) -> Result<(), WalError> {
        if mutants::active(Mutant::AppendToSegmentOfEarlierBoot)
            && matches!(self.cut, Some(PendingCut { phase: CutPhase::Fresh, .. }))
            && self.go_on_after_start(disk)
        {
            return Ok(());
        }
        if matches!(self.cut, Some(PendingCut { phase: CutPhase::Fresh, .. })) && self.standby_fits() {
            self.activate();
            self.cut = None;
        }
        // Not before the hard state is there: a directory with segments and without it has lost it. Not at the end.
        if self.stage != Stage::Open {
            return Ok(());
        }
        let wanted = self.config.segments_ahead.saturating_sub(usize::from(!self.standby.is_idle()));
        let Some(maker) = self.maker.as_mut() else { return Ok(()) };
        if self.standby.is_idle()
            && let Some(ready) = maker.take_ready()
        {
            self.standby.begin(disk, &mut self.ops, ready);
        }
        if std::mem::take(&mut self.space_freed) {
            maker.retry();
        }
        let urgent = self.standby.is_idle();
        maker.advance(disk, &mut self.ops, wanted, urgent);
        self.head_standby(disk)?;
        self.tell_space(events);
        Ok(())
    }

    /// Gives the standby the header that is needed next, when it has another or none.
    fn head_standby(&mut self, disk: &mut D) -> Result<(), WalError> {
        if !self.standby.takes_header() || self.standby_fits() {
            return Ok(());
        }
        let Some(origin) = self.next_origin() else { return Ok(()) };
        let Some(store) = self.hard_state.as_ref() else { return Ok(()) };
        let generation = self.next_generation;
        self.next_generation = generation.checked_add(1).ok_or(WalError::GenerationsExhausted)?;
        let header = SegmentHeader {
            cluster: self.config.cluster,
            node: self.config.node,
            incarnation: store.state.incarnation,
            segment_bytes: self.config.segment_bytes,
            nonce: self.random.next(),
            epoch: self.epoch,
            boot: self.boot,
            generation,
            group: self.config.group,
            prior_content: self.standby.prior(),
            origin,
        };
        self.standby.write_header(disk, &mut self.ops, &self.pool, header)
    }

    fn tell_space(&mut self, events: &mut VecDeque<WalEvent<D::Buf>>) {
        let segments_left = self.segments_ahead();
        let blocked = self.maker.as_ref().is_some_and(|maker| maker.blocked().is_some());
        let enough = segments_left >= 2.min(self.config.segments_ahead);
        if !self.short_of_space && blocked && !enough {
            self.short_of_space = true;
            events.push_back(WalEvent::NoSpace { segments_left });
        } else if self.short_of_space && enough {
            self.short_of_space = false;
            events.push_back(WalEvent::SpaceAgain);
        }
    }

    /// An operation on a segment's file has ended.
    fn release(&mut self, generation: u32) {
        let segment = match self.segments.get_mut(generation) {
            Some(segment) => Some(segment),
            None => self.removal.segments.iter_mut().find(|segment| segment.generation() == generation),
        };
        if let Some(segment) = segment {
            segment.operations = segment.operations.saturating_sub(1);
        }
    }

    fn descriptor_done(&mut self, done: DiskDone<D::Buf>) -> Result<(), WalError> {
        let what = "opening a segment";
        let opened = self.reads.opened(done.id).or_else(|| self.scrub.reads.opened(done.id));
        if let Some(generation) = opened {
            let descriptor = match done.result {
                Ok(DiskOutput::Opened { file, .. }) => Descriptor::Open(file),
                Ok(_) => return Err(WalError::Protocol { what }),
                Err(error) => {
                    self.reads.fail_segment(generation, &error);
                    self.scrub.reads.fail_segment(generation, &error);
                    Descriptor::Closed
                }
            };
            let removed = self.removal.segments.iter_mut();
            if let Some(segment) =
                self.segments.iter_mut().chain(removed).find(|segment| segment.generation() == generation)
            {
                segment.descriptor = descriptor;
            }
            return Ok(());
        }
        let closing = Descriptor::Closing(done.id);
        let removed = self.removal.segments.iter_mut();
        let segment = self.segments.iter_mut().chain(removed).find(|segment| segment.descriptor == closing);
        match (segment, done.result) {
            (Some(segment), Ok(DiskOutput::Done)) => segment.descriptor = Descriptor::Closed,
            (_, Err(error)) => return Err(WalError::Disk { what: "closing a segment", error }),
            _ => return Err(WalError::Protocol { what: "closing a segment" }),
        }
        Ok(())
    }

    // The end.

    /// The first failure stops the log; later ones add nothing.
    fn stop(&mut self, error: WalError) {
        if self.poison.is_none() {
            tracing::error!(%error, "the log has stopped");
            self.poison = Some(error);
            self.recovery = None;
            self.reads.stop();
            self.scrub.reads.stop();
        }
    }

    /// What is made ready for later is given up; what the log has promised is finished.
    fn begin_closing(&mut self, disk: &mut D) {
        self.stage = Stage::Closing;
        self.reads.stop();
        self.scrub.reads.stop();
        self.recycler.stop();
        if let Some(maker) = self.maker.as_mut() {
            maker.stop(disk, &mut self.ops);
        }
    }

    fn advance_close(&mut self, disk: &mut D, events: &mut VecDeque<WalEvent<D::Buf>>) {
        if self.close_asked && self.stage == Stage::Open {
            self.begin_closing(disk);
        }
        // A start that waits for space has changed nothing and has nothing to finish.
        let waits = self.hard_state.as_ref().is_some_and(HardStateStore::is_blocked);
        if self.close_asked && waits && self.ops.in_flight == 0 && self.stage < Stage::ClosingFiles {
            self.stage = Stage::ClosingFiles;
            self.close_files(disk);
        }
        if self.stage == Stage::Closing && self.poison.is_none() && !self.has_drained(disk) {
            return;
        }
        let stopped = self.stage == Stage::Closing || self.poison.is_some();
        if self.close_asked && stopped && self.stage < Stage::ClosingFiles && self.ops.in_flight == 0 {
            self.stage = Stage::ClosingFiles;
            self.close_files(disk);
        }
        if self.stage == Stage::ClosingFiles && self.ops.in_flight == 0 {
            self.stage = Stage::Closed;
            events.push_back(WalEvent::Closed);
        }
    }

    /// Whether appends, cut and saves are through, the save of the witness included.
    fn has_drained(&mut self, disk: &mut D) -> bool {
        let cutting =
            matches!(self.cut, Some(PendingCut { phase: CutPhase::Draining | CutPhase::Saving { .. }, .. }));
        let durable_through = self.window.durable_through();
        let Some(store) = self.hard_state.as_mut() else { return true };
        if cutting || self.window.in_flight() > 0 || !store.is_quiet() {
            return false;
        }
        if store.state.witness < durable_through {
            store.state.witness = durable_through;
            store.request();
            self.try_advance_hard_state(disk);
            return false;
        }
        true
    }

    fn close_files(&mut self, disk: &mut D) {
        let hard_state = self.hard_state.iter_mut().flat_map(HardStateStore::take_files);
        let removed = self.removal.segments.iter();
        let segments = self.segments.iter().chain(removed).filter_map(Segment::file);
        let files = hard_state.chain(segments).chain(self.standby.take_file());
        let files: Vec<FileId> = files.chain(self.repairs.take_files()).collect();
        for file in files {
            self.ops.submit(disk, Owner::Descriptor, DiskOp::Close { file });
        }
    }
}
