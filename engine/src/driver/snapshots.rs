//! Snapshots of this node: taken while commits go on, restored at a start, and the log purged behind them.
//!
//! Happy path: so much log has been applied since the last one that the state machine is asked for a picture; it is written
//! out a slot at a time, read back, and renamed once the log is durable up to where it ends; then the log's start moves
//! there, but for what is retained, and the third newest file goes.
//!
//! At a start the newest snapshot whose every byte is right is restored, before the core begins. One that ends where the log
//! does not reach, or has something else, is what an interrupted install has left: the log begins anew behind it. When none
//! is right that the log still reaches, nothing can be applied, and the node asks the leader for one. One that another build has
//! written is no damage: the node stops, and says which.
//!
//! Nothing here is the log's: what fails is tried again later, loudly, and commits do not wait for any of it.

use super::{Driver, Life, invariant};
use crate::config::Config;
use crate::error::StopError;
use crate::formation;
use crate::handle::{SnapshotError, SnapshotStatus, SnapshotTaken};
use crate::mutants::{self, Mutant};
use crate::raft::{Configuration, Event, LogId, Raft};
use crate::requests::{REQUESTS_MAX, SnapshotSlot};
use crate::sessions::{SessionTable, SessionTableError};
use crate::snapshots::files::{FileFailure, Ops, Part, PartStep, ReadStep, Reading, Tools};
use crate::snapshots::{
    Encoder, SLOT_BYTES, SLOT_PAYLOAD_BYTES, SnapshotDamage, SnapshotFile, SnapshotMeta, file_bytes_max,
    parse_name, parse_partial_name, partial_name_of,
};
use crate::state_machine::{Restore, SnapshotReader, StateMachine};
use crate::wire;
use ringraft_block::{BLOCK_BYTES, BlockBuf, LogIndex};
use ringraft_net::link::Link;
use ringraft_wal::disk::{Disk, DiskDone, DiskErrorKind, DiskOp, DiskOpId, DiskOutput};
use ringraft_wal::format::LogStart;
use std::collections::VecDeque;

/// The file that is being taken.
const TAKING: &str = "snapshot-taking.part";
/// Snapshots that are kept.
const KEPT: usize = 2;
/// After one that failed; twice as long after each further one, up to the other.
const RETRY_NS: u64 = 1_000_000_000;
const RETRY_NS_MAX: u64 = 60_000_000_000;
/// How often what is retained is looked at.
const PURGE_INTERVAL_NS: u64 = 250_000_000;

/// All that a driver has to do with snapshots of its own.
pub(super) struct Snapshots<B: BlockBuf> {
    pub(super) ops: Ops,
    /// Durable and whole, by index.
    pub(super) files: Vec<SnapshotFile>,
    /// Found damaged: removed when there is another one.
    damaged: Vec<String>,
    /// Files that nobody needs, to be removed.
    pub(super) leftovers: VecDeque<String>,
    cleaning: Option<DiskOpId>,
    unsynced: bool,
    start: Option<Start>,
    taking: Option<Taking>,
    pub(super) restoring: Option<Restoring>,
    pub(super) installs: super::installs::Installs<B>,
    throttle: Throttle,
    /// The machine makes none.
    unsupported: bool,
    retry_at_ns: u64,
    retry_ns: u64,
    /// What the last one needed and there was no space for; 0 if it was not that.
    short_of: u64,
    /// Space for the next one, of so many bytes, before the machine is asked for it.
    reserving: Option<(Part, u64)>,
    purge_at_ns: u64,
    waiting: Vec<SnapshotSlot>,
    /// One is to be taken, however little has been applied.
    needed: bool,
}

/// A start, until the core begins.
struct Start {
    configuration: Configuration,
    listing: Option<DiskOpId>,
    /// Not looked at yet, the newest last.
    names: Vec<String>,
    verifying: Option<(String, Reading)>,
}

/// A snapshot file on its way into the machine.
pub(super) struct Restoring {
    pub(super) reading: Reading,
    file: SnapshotFile,
    begun: bool,
}

struct Taking {
    part: Part,
    /// Reserved for it.
    bytes: u64,
    meta: SnapshotMeta,
    reader: Box<dyn SnapshotReader>,
    /// Who has asked for it.
    askers: Vec<SnapshotSlot>,
    /// How many bytes of the configuration and of the sessions behind it have been written.
    prefix_at: usize,
    encoder: Option<Encoder>,
    offset: u64,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Slots,
    Trailer,
    Finishing,
}

/// So many bytes per second, on average, one piece at a time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Throttle {
    bytes_per_second: u64,
    next_at_ns: u64,
}

impl Throttle {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, next_at_ns: 0 }
    }

    /// Whether a piece may go now.
    pub(super) fn is_open(&self, now_ns: u64) -> bool {
        now_ns >= self.next_at_ns
    }

    /// A piece of so many bytes goes.
    pub(super) fn spend(&mut self, bytes: u64, now_ns: u64) {
        // Without a limit nothing is waited for.
        if let Some(span) = bytes.saturating_mul(1_000_000_000).checked_div(self.bytes_per_second) {
            self.next_at_ns = self.next_at_ns.max(now_ns).saturating_add(span);
        }
    }

    pub(super) fn next_at_ns(&self) -> u64 {
        self.next_at_ns
    }
}

impl<B: BlockBuf> Snapshots<B> {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            ops: Ops::default(),
            files: Vec::new(),
            damaged: Vec::new(),
            leftovers: VecDeque::new(),
            cleaning: None,
            unsynced: false,
            start: None,
            taking: None,
            restoring: None,
            installs: super::installs::Installs::new(config),
            throttle: Throttle::new(config.snapshot_bytes_per_second),
            unsupported: false,
            retry_at_ns: 0,
            retry_ns: RETRY_NS,
            short_of: 0,
            reserving: None,
            purge_at_ns: u64::MAX,
            waiting: Vec::new(),
            needed: false,
        }
    }

    pub(super) fn newest(&self) -> Option<&SnapshotFile> {
        self.files.last()
    }

    pub(super) fn newest_index(&self) -> LogIndex {
        self.newest().map_or(LogIndex(0), |file| file.meta.last.index)
    }

    /// When something is due without news.
    pub(super) fn next_deadline(&self, now_ns: u64) -> u64 {
        let taking = self.taking.as_ref().is_some_and(|taking| taking.part.is_ready());
        let throttled = if taking { self.throttle.next_at_ns().max(now_ns) } else { u64::MAX };
        let waits = self.taking.is_none() && (self.needed || !self.waiting.is_empty());
        let retry = if waits && self.retry_at_ns > now_ns { self.retry_at_ns } else { u64::MAX };
        throttled.min(retry).min(self.installs.next_deadline(now_ns))
    }

    /// Whether there is nothing to do as long as nothing more is applied and nobody asks for anything.
    pub(super) fn is_at_rest(&self, now_ns: u64) -> bool {
        let begun = self.taking.is_some() || self.reserving.is_some() || self.restoring.is_some();
        let cleans = self.cleaning.is_some() || self.unsynced || !self.leftovers.is_empty();
        let asked = self.needed || !self.waiting.is_empty();
        let due = now_ns >= self.purge_at_ns || now_ns < self.retry_at_ns;
        !(begun || cleans || asked || due) && self.installs.is_at_rest()
    }

    pub(super) fn status(&self, state_lost: bool) -> SnapshotStatus {
        let newest = self.newest();
        SnapshotStatus {
            last: newest.map(|file| file.meta.last.index),
            bytes: newest.map_or(0, |file| file.file_bytes),
            taking: self.taking.is_some(),
            restoring: self.restoring.is_some(),
            state_lost,
            installs: self.installs.status(),
        }
    }

    /// Somebody asks for one.
    pub(super) fn ask(&mut self, slot: SnapshotSlot) {
        match self.waiting.len() < REQUESTS_MAX {
            true => self.waiting.push(slot),
            false => slot.complete(Err(SnapshotError::Busy)),
        }
    }

    /// Another member needs more than the newest has, or this one does.
    pub(super) fn take_soon(&mut self) {
        self.needed = true;
    }

    /// The snapshot that ends at `last` cannot be read any more: another one is to take its place.
    pub(super) fn found_damaged(&mut self, last: LogIndex) {
        self.files.retain(|file| file.meta.last.index != last);
        self.damaged.push(crate::snapshots::name_of(last));
        self.needed = true;
    }

    /// Whether it is to be known before long which snapshot there is for others.
    pub(super) fn is_soon_another(&self) -> bool {
        self.taking.is_some() || self.installs.is_in_doubt()
    }

    /// Nobody will be answered any more.
    pub(super) fn refuse_all(&mut self, error: &SnapshotError) {
        let taking = self.taking.as_mut().map(|taking| std::mem::take(&mut taking.askers));
        let all = self.waiting.drain(..).chain(taking.into_iter().flatten());
        all.for_each(|asker| asker.complete(Err(error.clone())));
    }
}

fn log_start(file: &SnapshotFile) -> LogStart {
    let SnapshotMeta { last, chain, .. } = file.meta;
    LogStart { index: last.index, term: last.term, chain }
}

/// Borrows of a driver what operations on files need.
macro_rules! tools {
    ($driver:expr) => {
        &mut Tools { disk: &mut $driver.disk, pool: &$driver.pool, ops: &mut $driver.snapshots.ops }
    };
}
pub(super) use tools;

// A start.

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// The cluster is formed: what snapshots are there is looked at before the core begins.
    pub(super) fn start(&mut self, configuration: Configuration) -> Result<(), StopError> {
        let listing = Some(tools!(self).submit(DiskOp::List));
        self.life = Life::Restoring;
        self.snapshots.start = Some(Start { configuration, listing, names: Vec::new(), verifying: None });
        Ok(())
    }

    fn listed(&mut self, names: impl Iterator<Item = String>) -> Result<(), StopError> {
        let (mut found, mut partial) = (Vec::new(), Vec::new());
        for name in names {
            if parse_name(&name).is_some() {
                found.push(name);
            } else if let Some(arrived) = parse_partial_name(&name) {
                partial.push(arrived);
            } else if name.starts_with("snapshot-") && name.ends_with(".part") {
                self.snapshots.leftovers.push_back(name);
            }
        }
        // Of several the removal of all but one was not durable; another one may be offered as well as this one.
        partial.sort_unstable();
        self.snapshots.installs.partial = partial.pop();
        let stale = partial.into_iter().map(|(last, digest)| partial_name_of(last, digest));
        self.snapshots.leftovers.extend(stale);
        found.sort();
        if let Some(start) = &mut self.snapshots.start {
            start.names = found;
        }
        self.verify_next()
    }

    /// Verifies the newest file that has not been looked at; with none left, the core begins on what was found.
    fn verify_next(&mut self) -> Result<(), StopError> {
        let next = self.snapshots.start.as_mut().and_then(|start| start.names.pop());
        // Two that are right are enough; older ones are let go.
        if let Some(name) = next {
            if self.snapshots.files.len() >= KEPT {
                self.snapshots.leftovers.push_back(name);
                return self.verify_next();
            }
            let reading = Reading::open(tools!(self), self.config.cluster, name.clone());
            if let Some(start) = &mut self.snapshots.start {
                start.verifying = Some((name, reading));
            }
            return Ok(());
        }
        self.snapshots.files.sort_by_key(|file| file.meta.last.index);
        let start = self.wal.log_start();
        match self.snapshots.newest().filter(|file| file.meta.last.index >= start.index).cloned() {
            Some(file) => {
                let last = file.meta.last.index;
                if self.wal.chain_at(last) != Some(file.meta.chain) {
                    invariant(last > start.index, || {
                        format!(
                            "the snapshot that ends at {last} is of another log than this, which starts there"
                        )
                    })?;
                    tracing::warn!(node = %self.config.node, %last, "the log begins anew behind a snapshot that was being installed");
                    self.wal.start_anew(&mut self.disk, log_start(&file));
                }
                self.restore(file);
                Ok(())
            }
            None => self.begin(None),
        }
    }

    /// The machine is given what is in a file that has been verified.
    pub(super) fn restore(&mut self, file: SnapshotFile) {
        self.applier.suspend_until(file.meta.time_ms);
        let name = crate::snapshots::name_of(file.meta.last.index);
        let reading = Reading::open(tools!(self), self.config.cluster, name);
        self.snapshots.restoring = Some(Restoring { reading, file, begun: false });
    }

    fn on_restoring(&mut self, done: DiskDone<D::Buf>) -> Result<(), StopError> {
        let Some(restoring) = &mut self.snapshots.restoring else { return Ok(()) };
        let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops: &mut self.snapshots.ops };
        let machine = self.applier.machine_mut();
        let refused = |error| StopError::Restore { last: restoring.file.meta.last.index, error };
        match restoring.reading.handle(tools, done) {
            ReadStep::Pending => Ok(()),
            ReadStep::State(block, range) => {
                if !std::mem::replace(&mut restoring.begun, true) {
                    let SnapshotMeta { last, time_ms, .. } = restoring.file.meta;
                    let begin = Restore::Begin { last: last.index, term: last.term, time_ms };
                    machine.restore(begin).map_err(refused)?;
                }
                match block.get(range).filter(|piece| !piece.is_empty()) {
                    Some(piece) => machine.restore(Restore::Piece(piece)).map_err(refused),
                    None => Ok(()),
                }
            }
            // It was right a moment ago: what the machine has now is nothing, and a restart looks again.
            ReadStep::Ended(Err(error)) => Err(refused(error.to_string())),
            ReadStep::Ended(Ok(file)) => {
                // The digest is over all that the file holds.
                let changed = file.digest != restoring.file.digest;
                if changed {
                    return Err(refused(FileFailure::Other.to_string()));
                }
                machine.restore(Restore::End).map_err(refused)?;
                self.snapshots.restoring = None;
                self.restored(file)
            }
        }
    }

    fn restored(&mut self, file: SnapshotFile) -> Result<(), StopError> {
        let SnapshotMeta { last, chain, time_ms, .. } = file.meta;
        tracing::info!(node = %self.config.node, last = %last.index, bytes = file.state_bytes, "snapshot restored");
        self.applier.start_after(last.index, chain, time_ms);
        self.restore_sessions(last.index, &file.meta.sessions)?;
        self.proposals.borrow_mut().overtaken(last.index, &mut self.deliveries);
        if self.snapshots.start.is_some() {
            return self.begin(Some(file));
        }
        if self.raft().is_some_and(|raft| raft.restraint().state_lost) {
            self.step(Event::StateLost { lost: false })?;
        }
        self.snapshot_installed(last)
    }

    /// Goes on behind the snapshot that was restored.
    fn begin(&mut self, restored: Option<SnapshotFile>) -> Result<(), StopError> {
        let Some(Start { configuration, .. }) = self.snapshots.start.take() else { return Ok(()) };
        self.snapshots.purge_at_ns = self.now.monotonic_ns;
        let log_start = self.wal.log_start();
        let members = match &restored {
            Some(file) => {
                let decoded = wire::configuration::decode(&file.meta.configuration);
                let decoded = decoded.ok_or_else(|| StopError::Restore {
                    last: file.meta.last.index,
                    error: "its members cannot be decoded: another version?".to_owned(),
                })?;
                (file.meta.configuration_index, decoded)
            }
            None => {
                self.applier.start_after(log_start.index, log_start.chain, 0);
                (log_start.index, configuration)
            }
        };
        let lost = restored.is_none() && log_start.index > LogIndex(0);
        self.read_changes(members, self.applier.applied(), lost)
    }

    /// The core begins with `members`, a configuration with its place in the log, as of `commit`, and with the later ones
    /// that the log holds. `lost`: what was applied up to there cannot be read.
    pub(super) fn begin_core(
        &mut self,
        members: (LogIndex, Configuration),
        changes: Vec<(LogIndex, Option<Configuration>)>,
        commit: LogIndex,
        lost: bool,
    ) -> Result<(), StopError> {
        // Once they have been changed, the members that this node was started with are only where it begins to look.
        let formed = self.wal.hard_state().map(|state| state.configuration.as_slice());
        let unchanged = changes.is_empty() && formed == Some(&wire::configuration::encode(&members.1));
        if unchanged && !lost && !self.config.join {
            formation::check_members(self.config.node, &self.config.members, &members.1)?;
        }
        self.start_core(members, changes, commit)?;
        if lost {
            let log_start = self.wal.log_start();
            tracing::error!(
                node = %self.config.node, behind = %log_start.index,
                "no snapshot that the log continues can be read: the state is fetched from the leader"
            );
            self.applier.suspend();
            self.step(Event::StateLost { lost })?;
        }
        Ok(())
    }
}

// Taking.

impl<D: Disk, L: Link<Buf = D::Buf>, S: StateMachine> Driver<D, L, S> {
    /// Does what is due, a piece of each.
    pub(super) fn mind_snapshots(&mut self) -> Result<(), StopError> {
        if self.closing {
            return Ok(());
        }
        self.read_on();
        let Life::Running(_) = &self.life else { return Ok(()) };
        self.take_if_due();
        self.write_on();
        self.mind_installs()?;
        if self.now.monotonic_ns >= self.snapshots.purge_at_ns {
            self.snapshots.purge_at_ns = u64::MAX;
            self.purge(self.snapshots.newest_index())?;
        }
        self.clean();
        Ok(())
    }

    fn read_on(&mut self) {
        let Snapshots { ops, start, restoring, .. } = &mut self.snapshots;
        let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
        if let Some(Start { verifying: Some((_, reading)), .. }) = start {
            reading.next(tools);
        }
        if let Some(restoring) = restoring {
            restoring.reading.next(tools);
        }
    }

    fn take_if_due(&mut self) {
        let now = self.now.monotonic_ns;
        let (applied, newest) = (self.applier.applied(), self.snapshots.newest_index());
        if self.snapshots.taking.is_some() || self.applier.is_suspended() {
            return;
        }
        if self.snapshots.unsupported {
            self.snapshots.needed = false;
            return self.snapshots.refuse_all(&SnapshotError::Unsupported);
        }
        if applied <= newest {
            // There is none to be taken that tells more than the last one.
            self.snapshots.needed = false;
            let Snapshots { ops, reserving, .. } = &mut self.snapshots;
            if let Some((part, _)) = reserving.as_mut().filter(|(part, _)| part.is_ready()) {
                let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
                part.fail(tools, FileFailure::Other);
            }
            if let Some(taken) = self.snapshots.newest().map(taken_of) {
                self.snapshots.waiting.drain(..).for_each(|asker| asker.complete(Ok(taken)));
            }
            return;
        }
        let Config { snapshot_log_bytes, snapshot_log_entries, .. } = self.config;
        let bytes = snapshot_log_bytes > 0 && self.applier.log_bytes() >= snapshot_log_bytes;
        let entries = snapshot_log_entries > 0 && applied.get() - newest.get() >= snapshot_log_entries;
        let asked = self.snapshots.needed || !self.snapshots.waiting.is_empty();
        if now < self.snapshots.retry_at_ns || !(bytes || entries || asked) {
            return;
        }
        if !self.has_reserved() {
            return;
        }
        let Some(meta) = self.meta_of_applied() else { return };
        let Some(reader) = self.applier.machine_mut().snapshot() else {
            self.snapshots.unsupported = true;
            return;
        };
        self.applier.forget_log_bytes();
        let prefix_bytes = (meta.configuration.len() + meta.sessions.len()) as u64;
        let bytes = file_bytes_max(reader.bytes_max().saturating_add(prefix_bytes));
        let part = match self.snapshots.reserving.take() {
            Some((part, room)) if room >= bytes => part,
            Some((mut part, _)) => {
                part.fail(tools!(self), FileFailure::Short);
                part
            }
            None => Part::create(tools!(self), self.config.cluster, TAKING, bytes),
        };
        let last = meta.last.index;
        tracing::debug!(node = %self.config.node, %last, "a snapshot is being taken");
        let (encoder, offset, stage) = (None, 0, Stage::Slots);
        let askers = std::mem::take(&mut self.snapshots.waiting);
        self.snapshots.needed = false;
        let prefix_at = 0;
        self.snapshots.taking =
            Some(Taking { part, bytes, meta, reader, askers, prefix_at, encoder, offset, stage });
        if mutants::active(Mutant::PurgeBeforeSnapshotDurable) {
            let _ = self.purge(last);
        }
    }

    /// What a snapshot of the present state is of.
    fn meta_of_applied(&self) -> Option<SnapshotMeta> {
        let raft = self.raft()?;
        let index = self.applier.applied();
        // Not the newest, which may be taken back.
        let (configuration_index, as_of_applied) = raft.configuration_at(index)?;
        let mut configuration = wire::configuration::encode(as_of_applied);
        if mutants::active(Mutant::SnapshotForgetsConfiguration) {
            let own = raft.configuration().member(raft.id()).cloned().into_iter().collect();
            configuration = wire::configuration::encode(&Configuration::new(own).unwrap_or_default());
        }
        let mut sessions = self.encode_sessions();
        if mutants::active(Mutant::SnapshotForgetsSessions) {
            sessions.clear();
        }
        let last = LogId { term: raft.term_at(index)?, index };
        let (chain, time_ms) = (self.applier.chain(), self.applier.time_ms());
        Some(SnapshotMeta { last, chain, time_ms, configuration, configuration_index, sessions })
    }

    /// The seam to the client sessions: their table as of what is applied.
    fn encode_sessions(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.applier.sessions().encode(&mut out);
        out
    }

    /// The other half of [`Self::encode_sessions`]: the table is as the snapshot has it.
    fn restore_sessions(&mut self, last: LogIndex, sessions: &[u8]) -> Result<(), StopError> {
        let table =
            if sessions.is_empty() { Ok(SessionTable::default()) } else { SessionTable::decode(sessions) };
        let refused = |error: SessionTableError| StopError::Restore { last, error: error.to_string() };
        self.applier.restore_sessions(table.map_err(refused)?);
        Ok(())
    }

    /// Writes the next piece of the snapshot that is being taken.
    fn write_on(&mut self) {
        let now = self.now.monotonic_ns;
        let durable = self.wal.durable_through();
        let Snapshots { ops, taking: Some(taking), throttle, .. } = &mut self.snapshots else { return };
        let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
        taking.part.verify_on(tools);
        // A file that the log does not reach durably would be more than this node has acknowledged.
        if taking.part.verified().is_some_and(|file| file.meta.last.index <= durable) {
            return taking.part.publish(tools);
        }
        if !taking.part.is_ready() || !throttle.is_open(now) {
            return;
        }
        if let Err(failure) = taking.write(tools, throttle, now, self.config.cluster) {
            taking.part.fail(tools, failure);
        }
    }

    fn on_taking(&mut self, done: DiskDone<D::Buf>) -> Result<(), StopError> {
        let Snapshots { ops, taking: Some(taking), .. } = &mut self.snapshots else { return Ok(()) };
        let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
        match taking.part.handle(tools, done) {
            PartStep::Pending | PartStep::Ready => Ok(()),
            PartStep::Verified => {
                // The digest is over all that was written.
                let (found, written) = (taking.part.verified(), taking.encoder.as_ref());
                if found.map(|file| file.digest) != written.map(Encoder::digest) {
                    taking.part.fail(tools, FileFailure::Other);
                }
                Ok(())
            }
            PartStep::Failed(failure) => {
                let (askers, bytes) = (std::mem::take(&mut taking.askers), taking.bytes);
                self.snapshots.taking = None;
                self.taking_failed(&failure, askers, bytes);
                Ok(())
            }
            PartStep::Published(file) => {
                let askers = std::mem::take(&mut taking.askers);
                self.snapshots.taking = None;
                (self.snapshots.retry_ns, self.snapshots.short_of) = (RETRY_NS, 0);
                tracing::info!(node = %self.config.node, last = %file.meta.last.index, bytes = file.file_bytes, "snapshot taken");
                let taken = taken_of(&file);
                askers.into_iter().for_each(|asker| asker.complete(Ok(taken)));
                self.published(file)
            }
        }
    }

    /// After one that had no space the machine is not asked for another before there is some: what that costs is the
    /// machine's affair, and it may be much. True if there is, or the last one did not fail for that reason.
    fn has_reserved(&mut self) -> bool {
        let Snapshots { ops, reserving, short_of, .. } = &mut self.snapshots;
        let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
        match reserving {
            Some((part, _)) => part.is_ready(),
            None if *short_of == 0 => true,
            None => {
                let part = Part::create(tools, self.config.cluster, TAKING, *short_of);
                *reserving = Some((part, *short_of));
                false
            }
        }
    }

    fn on_reserving(&mut self, done: DiskDone<D::Buf>) {
        let Snapshots { ops, reserving: Some((part, bytes)), .. } = &mut self.snapshots else { return };
        let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
        let PartStep::Failed(failure) = part.handle(tools, done) else { return };
        let bytes = *bytes;
        self.snapshots.reserving = None;
        // Unless it was let go because none is to be taken.
        if failure != FileFailure::Other {
            let askers = std::mem::take(&mut self.snapshots.waiting);
            self.taking_failed(&failure, askers, bytes);
        }
    }

    /// One that needed so many bytes came to nothing.
    fn taking_failed(&mut self, failure: &FileFailure, askers: Vec<SnapshotSlot>, bytes: u64) {
        let no_space = matches!(failure, FileFailure::Disk(error) if error.kind == DiskErrorKind::NoSpace);
        let Snapshots { retry_at_ns, retry_ns, short_of, needed, .. } = &mut self.snapshots;
        // One that the space reserved for it was too small for tries with more.
        *short_of = if no_space || *failure == FileFailure::Short { bytes } else { 0 };
        *retry_at_ns = self.now.monotonic_ns.saturating_add(*retry_ns);
        *retry_ns = retry_ns.saturating_mul(2).min(RETRY_NS_MAX);
        // What was due is still due.
        *needed = true;
        tracing::warn!(node = %self.config.node, %failure, "no snapshot was taken: tried again later");
        let failed = SnapshotError::Failed(failure.to_string());
        askers.into_iter().for_each(|asker| asker.complete(Err(failed.clone())));
    }

    /// There is another snapshot, durable and whole.
    pub(super) fn published(&mut self, file: SnapshotFile) -> Result<(), StopError> {
        let name = crate::snapshots::name_of(file.meta.last.index);
        let Snapshots { files, damaged, leftovers, .. } = &mut self.snapshots;
        files.retain(|other| other.meta.last.index != file.meta.last.index);
        files.push(file.without_sessions());
        files.sort_by_key(|file| file.meta.last.index);
        damaged.retain(|damaged| *damaged != name);
        leftovers.extend(damaged.drain(..));
        leftovers.retain(|leftover| *leftover != name);
        self.purge(self.snapshots.newest_index())
    }

    /// What is retained is looked at again, in this turn or the next.
    pub(super) fn purge_soon(&mut self) {
        self.snapshots.purge_at_ns = self.now.monotonic_ns;
    }

    /// Moves the log's start to the newest snapshot, or as near as is retained.
    fn purge(&mut self, through: LogIndex) -> Result<(), StopError> {
        let Some(start) = self.raft().map(Raft::log_start) else { return Ok(()) };
        let applied = self.applier.applied().min(self.wal.durable_through());
        if self.closing || through <= start.index || self.applier.is_suspended() {
            return Ok(());
        }
        self.snapshots.purge_at_ns = self.now.monotonic_ns.saturating_add(PURGE_INTERVAL_NS);
        let kept = self.config.log_retention_bytes.saturating_add(2 * self.config.snapshot_log_bytes);
        let floor =
            self.snapshots.installs.floor().map_or(through, |floor| floor.max(self.wal.last_droppable(kept)));
        let through = through.min(floor);
        if through <= start.index || through > applied {
            return Ok(());
        }
        let reached = self.wal.purge_through(&mut self.disk, through);
        if reached <= start.index {
            return Ok(());
        }
        self.forget_damage_before(reached)?;
        self.step(Event::Purged { through: reached })
    }

    /// Removes what is not needed any more, a file at a time.
    fn clean(&mut self) {
        let Snapshots { files, leftovers, cleaning, unsynced, installs, restoring, ops, .. } =
            &mut self.snapshots;
        if cleaning.is_some() {
            return;
        }
        if files.len() > KEPT && restoring.is_none() && !installs.is_serving(files[0].meta.last.index) {
            leftovers.push_back(crate::snapshots::name_of(files.remove(0).meta.last.index));
        }
        let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
        if let Some(name) = leftovers.pop_front() {
            *unsynced = true;
            *cleaning = Some(tools.submit(DiskOp::Remove { name }));
        } else if std::mem::take(unsynced) {
            *cleaning = Some(tools.submit(DiskOp::SyncDirectory));
        }
    }

    /// Takes a completion of an operation on snapshots.
    pub(super) fn on_snapshot_disk(&mut self, done: DiskDone<D::Buf>) -> Result<(), StopError> {
        self.snapshots.ops.ended();
        if self.closing {
            return Ok(());
        }
        let id = done.id;
        let is_list = |start: &Start| start.listing == Some(id);
        let is_verified =
            |start: &Start| start.verifying.as_ref().is_some_and(|(_, reading)| reading.awaits(id));
        let Snapshots { start, taking, reserving, restoring, cleaning, .. } = &mut self.snapshots;
        if start.as_ref().is_some_and(is_list) {
            return match done.result {
                Ok(DiskOutput::Listed(entries)) => self.listed(entries.into_iter().map(|entry| entry.name)),
                Ok(_) => Ok(()),
                Err(error) => Err(StopError::Restore { last: LogIndex(0), error: error.to_string() }),
            };
        }
        if start.as_ref().is_some_and(is_verified) {
            return self.on_verifying(done);
        }
        if taking.as_ref().is_some_and(|taking| taking.part.awaits(id)) {
            return self.on_taking(done);
        }
        if reserving.as_ref().is_some_and(|(part, _)| part.awaits(id)) {
            self.on_reserving(done);
            return Ok(());
        }
        if restoring.as_ref().is_some_and(|restoring| restoring.reading.awaits(id)) {
            return self.on_restoring(done);
        }
        if *cleaning == Some(id) {
            *cleaning = None;
            if let Err(error) = done.result
                && error.kind != DiskErrorKind::NotFound
            {
                tracing::warn!(node = %self.config.node, %error, "a snapshot file that is not needed was not removed");
            }
            return Ok(());
        }
        self.on_install_disk(done)
    }

    fn on_verifying(&mut self, done: DiskDone<D::Buf>) -> Result<(), StopError> {
        let Snapshots { ops, start: Some(start), files, damaged, .. } = &mut self.snapshots else {
            return Ok(());
        };
        let tools = &mut Tools { disk: &mut self.disk, pool: &self.pool, ops };
        let Some((name, reading)) = &mut start.verifying else { return Ok(()) };
        let ReadStep::Ended(outcome) = reading.handle(tools, done) else { return Ok(()) };
        let named = parse_name(name);
        match outcome {
            Ok(file) if Some(file.meta.last.index) == named => files.push(file.without_sessions()),
            Ok(_) => damaged.push(std::mem::take(name)),
            // It says itself that it is this file.
            Err(FileFailure::Damaged(damage @ SnapshotDamage::Version { last, .. }))
                if Some(last) == named =>
            {
                return Err(StopError::SnapshotForeign { file: std::mem::take(name), damage });
            }
            Err(failure) => {
                tracing::error!(node = %self.config.node, name, %failure, "a snapshot cannot be read: an older one is looked for");
                damaged.push(std::mem::take(name));
            }
        }
        start.verifying = None;
        self.verify_next()
    }
}

fn taken_of(file: &SnapshotFile) -> SnapshotTaken {
    SnapshotTaken { last: file.meta.last.index, term: file.meta.last.term, bytes: file.file_bytes }
}

impl Taking {
    /// Writes the header, a slot, or the trailer.
    fn write<D: Disk>(
        &mut self,
        tools: &mut Tools<'_, D>,
        throttle: &mut Throttle,
        now_ns: u64,
        cluster: ringraft_block::ClusterId,
    ) -> Result<(), FileFailure> {
        let (block, bytes) = match (&mut self.encoder, self.stage) {
            (None, _) => {
                let mut block = tools.block(BLOCK_BYTES)?;
                self.encoder = Some(Encoder::new(cluster, &self.meta, &mut block));
                (block, BLOCK_BYTES)
            }
            (Some(encoder), Stage::Slots) => {
                let mut block = tools.block(SLOT_BYTES)?;
                let payload = Encoder::payload(&mut block);
                let mut filled = 0;
                let SnapshotMeta { configuration, sessions, .. } = &mut self.meta;
                let behind = self.prefix_at.saturating_sub(configuration.len());
                for part in
                    [configuration.get(self.prefix_at..), sessions.get(behind..)].into_iter().flatten()
                {
                    let part = &part[..part.len().min(SLOT_PAYLOAD_BYTES - filled)];
                    payload[filled..filled + part.len()].copy_from_slice(part);
                    filled += part.len();
                }
                self.prefix_at += filled;
                if filled < SLOT_PAYLOAD_BYTES {
                    // All of them are written.
                    sessions.clear();
                    sessions.shrink_to_fit();
                }
                let mut is_last = false;
                while filled < SLOT_PAYLOAD_BYTES && !is_last {
                    let read = self.reader.read(&mut payload[filled..]).map_err(FileFailure::Machine)?;
                    is_last = read == 0;
                    filled = (filled + read).min(SLOT_PAYLOAD_BYTES);
                }
                let bytes = encoder.seal(&mut block, filled, is_last);
                self.stage = if is_last { Stage::Trailer } else { Stage::Slots };
                (block, bytes)
            }
            (Some(encoder), Stage::Trailer) => {
                let mut block = tools.block(BLOCK_BYTES)?;
                encoder.trailer(&mut block);
                self.stage = Stage::Finishing;
                (block, BLOCK_BYTES)
            }
            (Some(_), Stage::Finishing) => {
                self.part.finish(tools);
                return Ok(());
            }
        };
        throttle.spend(bytes as u64, now_ns);
        self.part.write(tools, self.offset, block.share(), bytes);
        self.offset += bytes as u64;
        Ok(())
    }
}
