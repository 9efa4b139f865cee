//! A log on a simulated disk, driven step by step, and the model of what it owes its user.

use crate::sim::buffer::SimBuf;
use crate::sim::context::Context;
use crate::sim::disk::{DiskState, SimDisk};
use crate::sim::trace::Trace;
use ringraft_block::{ClusterId, GroupId, LogIndex, NodeId, Pool, Term};
use ringraft_wal::disk::{Disk, DiskDone};
use ringraft_wal::format::{
    BatchBuilder, BatchInfo, BatchKind, Chain, ENVELOPE_BYTES, HardState, LogStart, Seal, image_bytes_for,
    slot_bytes,
};
use ringraft_wal::{HardStateUpdate, Recovered, Wal, WalConfig, WalError, WalEvent};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use xxhash_rust::xxh3::xxh3_64;

/// A small log: slots of up to 8 KiB, 16 sectors; sixteen of them to a segment.
#[must_use]
pub fn config(seed: u64) -> WalConfig {
    WalConfig {
        segment_bytes: 140 * 1024,
        segments_ahead: 1,
        batch_bytes_max: 8192 - 512,
        writes_in_flight_max: 4,
        bytes_in_flight_max: 64 * 1024,
        ..WalConfig::new(ClusterId(0xfa), NodeId(1), seed)
    }
}

/// A batch as it was appended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Its identity.
    pub info: BatchInfo,
    /// Hash of its image.
    pub content: u64,
}

/// A log that recovery may bring back.
#[derive(Clone, Debug, Default)]
pub struct Promise {
    /// All that was appended.
    pub batches: Vec<Appended>,
    /// It was told to be durable through here.
    pub acknowledged: LogIndex,
}

impl Promise {
    /// The batches behind `start`, a batch end.
    fn behind(&self, start: LogIndex) -> &[Appended] {
        &self.batches[self.batches.partition_point(|batch| batch.info.last <= start)..]
    }

    /// Whether a log is a part of this one, from its start on.
    fn begins_with(&self, recovered: &[BatchInfo], start: LogIndex) -> bool {
        let own = self.behind(start);
        recovered.len() <= own.len()
            && recovered.iter().zip(own).all(|(found, appended)| *found == appended.info)
    }

    /// Whether a recovered log that begins behind `start` keeps the promise.
    fn keeps(&self, recovered: &[BatchInfo], start: LogIndex) -> bool {
        self.begins_with(recovered, start)
            && recovered.last().map_or(start, |info| info.last) >= self.acknowledged
    }
}

/// What the log owes its user.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// The log as it is.
    pub log: Promise,
    /// The logs before truncations that are not durable yet.
    before: Vec<Promise>,
    /// Where the log was told to begin durably, then where it was asked to begin since, in order.
    starts: Vec<LogIndex>,
    /// Term and vote that were told to be durable, then those that were asked to be saved since, in order.
    hard: Vec<(u64, (Term, Option<NodeId>))>,
    /// Where the log was asked to begin anew, until that is durable.
    anew: Option<LogIndex>,
    /// Length of the configuration that was told to be durable.
    pub configuration_bytes: usize,
}

impl Model {
    /// Compares what a start found with what it owes.
    ///
    /// # Errors
    /// What is missing or wrong.
    pub fn judge(&self, recovered: &[BatchInfo], hard_state: &HardState) -> Result<(), String> {
        let start = hard_state.start.index;
        if !self.starts.contains(&start) && (start != LogIndex(0) || !self.starts.is_empty()) {
            return Err(format!(
                "the log begins behind {start}; it was to begin behind one of {:?}",
                self.starts
            ));
        }
        if !self.before.iter().chain([&self.log]).any(|promise| promise.keeps(recovered, start)) {
            let found: Vec<_> = recovered.iter().map(|info| (info.term.get(), info.last.get())).collect();
            let owed: Vec<_> =
                self.log.batches.iter().map(|batch| (batch.info.term.get(), batch.info.last.get())).collect();
            return Err(format!(
                "recovered {found:?} behind {start}; appended were {owed:?}, acknowledged through {}, with {} truncations under way",
                self.log.acknowledged,
                self.before.len()
            ));
        }
        let found = (hard_state.term, hard_state.vote);
        // A batch of a term is proof of the term.
        let proof = recovered.last().map_or(Term(0), |info| info.term);
        let allowed =
            self.hard.iter().any(|(_, saved)| found == *saved || (proof > saved.0 && found == (proof, None)));
        if !(allowed || self.hard.is_empty() && found.1.is_none() && found.0 == proof) {
            return Err(format!("term and vote are {found:?}; saved were {:?}", self.hard));
        }
        if hard_state.configuration.len() < self.configuration_bytes {
            return Err("the formation is lost".to_owned());
        }
        Ok(())
    }

    /// Whether all that was acknowledged is in a log that was cut, or was kept aside, and the former is a prefix.
    fn is_there(&self, log: &[BatchInfo], aside: &[BatchInfo], start: LogIndex) -> bool {
        self.before.iter().chain([&self.log]).any(|promise| {
            let owed = promise.behind(start).iter().filter(|batch| batch.info.last <= promise.acknowledged);
            promise.begins_with(log, start) && owed.skip(log.len()).all(|batch| aside.contains(&batch.info))
        })
    }

    /// The model after a start that found `recovered`: it is what counts from now on.
    pub fn restarted(&mut self, recovered: &[BatchInfo], hard_state: &HardState) {
        let start = hard_state.start.index;
        let known = self.before.iter().chain([&self.log]).find(|promise| promise.keeps(recovered, start));
        let mut batches = known.map(|promise| promise.behind(start).to_vec()).unwrap_or_default();
        batches.truncate(recovered.len());
        let acknowledged = recovered.last().map_or(start, |info| info.last);
        self.starts = vec![start];
        self.log = Promise { batches, acknowledged };
        self.before.clear();
        self.anew = None;
        self.hard = vec![(hard_state.sequence, (hard_state.term, hard_state.vote))];
        self.configuration_bytes = hard_state.configuration.len();
    }
}

/// A log, its disk, and what it has told.
pub struct LogRun {
    /// Time and trace.
    pub context: Rc<Context>,
    /// The machine's disk.
    pub state: Rc<RefCell<DiskState>>,
    disk: SimDisk,
    /// The log.
    pub wal: Wal<SimDisk>,
    pool: Pool<SimBuf>,
    builder: Option<BatchBuilder<SimBuf>>,
    done: Vec<DiskDone<SimBuf>>,
    events: VecDeque<WalEvent<SimBuf>>,
    /// What it owes.
    pub model: Model,
    /// What the start found, once it is through.
    pub opened: Option<Recovered>,
    /// Why it stopped.
    pub poisoned: Option<WalError>,
    /// It has closed.
    pub closed: bool,
    /// It ran short of space and has not said that it is over.
    pub short_of_space: bool,
    /// Batches that were read, and reads that were refused for damage or an error.
    pub read: (u64, u64),
    /// Batches that turned out to be damaged while the log was open.
    pub found: u64,
    reads_waiting: u64,
    configuration: Option<(u64, usize)>,
    /// The start found damage, or a claim of an earlier start. The model is as it was before.
    pub damaged: bool,
    /// The first thing that went wrong.
    pub violation: Option<String>,
}

impl LogRun {
    /// Starts a log on `state`, of which `model` says what it holds.
    #[must_use]
    pub fn start(
        context: &Rc<Context>,
        state: &Rc<RefCell<DiskState>>,
        config: WalConfig,
        pool: &Pool<SimBuf>,
        model: Model,
    ) -> Self {
        Self {
            context: Rc::clone(context),
            state: Rc::clone(state),
            disk: SimDisk::new(state),
            wal: Wal::open(config, pool.clone()),
            pool: pool.clone(),
            builder: None,
            done: Vec::new(),
            events: VecDeque::new(),
            model,
            opened: None,
            poisoned: None,
            closed: false,
            short_of_space: false,
            read: (0, 0),
            found: 0,
            reads_waiting: 0,
            configuration: None,
            damaged: false,
            violation: None,
        }
    }

    fn violate(&mut self, what: impl FnOnce() -> String) {
        if self.violation.is_none() {
            self.violation = Some(what());
        }
    }

    /// Takes what has completed, and lets the log start what can be started.
    pub fn turn(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        self.disk.poll(&mut done);
        for completion in done.drain(..) {
            self.wal.handle(&mut self.disk, completion, &mut self.events);
        }
        self.done = done;
        self.wal.advance(&mut self.disk, &mut self.events);
        while let Some(event) = self.events.pop_front() {
            self.take(event);
        }
    }

    fn take(&mut self, event: WalEvent<SimBuf>) {
        if self.poisoned.is_some() && !matches!(event, WalEvent::Read { .. } | WalEvent::Closed) {
            self.violate(|| format!("the log stopped and then said {event:?}"));
        }
        match event {
            WalEvent::Opened(recovered) => {
                let found: Vec<_> = self.wal.batches().collect();
                let claim = self.wal.hard_state().and_then(|state| state.claim);
                if recovered.report.damage.is_empty() && claim.is_none() {
                    if let Err(wrong) = self.model.judge(&found, &recovered.hard_state) {
                        self.violate(|| wrong);
                    }
                    self.model.restarted(&found, &recovered.hard_state);
                } else {
                    // What is not in the log was kept aside.
                    self.damaged = true;
                    let aside: Vec<_> = self.wal.salvage().collect();
                    if !self.model.is_there(&found, &aside, recovered.hard_state.start.index) {
                        self.violate(|| {
                            format!("acknowledged batches are neither in {found:?} nor in {aside:?}")
                        });
                    }
                }
                self.opened = Some(recovered);
            }
            WalEvent::Persisted { epoch, last } => {
                if epoch != self.wal.epoch() || last > self.wal.last_index() {
                    self.violate(|| {
                        format!("durable through {last} in epoch {epoch}, which the log has left")
                    });
                }
                self.model.log.acknowledged = self.model.log.acknowledged.max(last);
            }
            WalEvent::Purged { through } => self.model.starts.retain(|start| *start >= through),
            WalEvent::TruncateDone { epoch } => {
                if epoch == self.wal.epoch() {
                    self.model.before.clear();
                    if let Some(anew) = self.model.anew.take() {
                        self.model.starts.retain(|start| *start >= anew);
                    }
                }
            }
            WalEvent::HardStateSaved { sequence } => {
                let saved = self.model.hard.partition_point(|(asked, _)| *asked <= sequence);
                self.model.hard.drain(..saved.saturating_sub(1));
                if let Some((asked, bytes)) = self.configuration
                    && asked <= sequence
                {
                    self.model.configuration_bytes = bytes;
                    self.configuration = None;
                }
            }
            WalEvent::Read { token, result } => {
                self.reads_waiting -= 1;
                match result {
                    Ok(batches) => {
                        for batch in batches {
                            self.read.0 += 1;
                            let content = xxh3_64(batch.image());
                            let wanted =
                                self.model.log.batches.iter().find(|wanted| wanted.info == batch.info);
                            if wanted.is_none_or(|wanted| wanted.content != content) {
                                self.violate(|| format!("read {token} brought what nobody appended"));
                            }
                        }
                    }
                    Err(_) => self.read.1 += 1,
                }
            }
            WalEvent::Poisoned(error) => self.poisoned = Some(error),
            WalEvent::NoSpace { .. } => self.short_of_space = true,
            WalEvent::SpaceAgain => self.short_of_space = false,
            WalEvent::Closed => self.closed = true,
            WalEvent::DamageFound(_) => self.found += 1,
            WalEvent::Repaired { first, .. } => {
                self.violate(|| format!("repaired {first}, which nobody asked for"))
            }
        }
    }

    /// Lets the next operation complete, and takes a turn. Whether there was one.
    pub fn step(&mut self) -> bool {
        let Some(due) = self.state.borrow().next_due() else { return false };
        self.context.advance_to(due.max(self.context.now()));
        self.turn();
        true
    }

    /// Takes turns until nothing is in flight.
    pub fn settle(&mut self) {
        self.turn();
        while self.step() {}
    }

    /// Steps until `until` holds, or nothing is in flight. Whether it holds.
    pub fn step_until(&mut self, until: impl Fn(&Self) -> bool) -> bool {
        self.turn();
        while !until(self) {
            if !self.step() {
                return false;
            }
        }
        true
    }

    /// Whether the log takes orders.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.opened.is_some() && self.poisoned.is_none() && !self.closed && !self.damaged
    }

    /// The batches that were appended and are neither cut off nor purged.
    #[must_use]
    pub fn batches(&self) -> &[Appended] {
        self.model.log.behind(self.wal.first_index().previous())
    }

    /// Appends a batch of one command that fills `slot` bytes, if the log is ready for it. Whether it was.
    pub fn append(&mut self, term: u64, slot: usize, salt: u64) -> bool {
        if !self.is_open() || !self.wal.is_ready_for(slot) {
            return false;
        }
        let fixed = image_bytes_for(1, 0, 0) + ENVELOPE_BYTES;
        let mut payload = slot - fixed - slot / 128;
        while slot_bytes(image_bytes_for(1, 0, payload)) > slot {
            payload -= 8;
        }
        let end = self.wal.log_end();
        let disk = &mut self.disk;
        let block = self.pool.take(slot, |bytes| disk.allocate(bytes)).expect("memory for a block");
        let builder = match self.builder.as_mut() {
            Some(builder) => {
                builder.rearm(block);
                builder
            }
            None => self.builder.insert(BatchBuilder::new(block)),
        };
        let mut command = vec![0; payload];
        crate::sim::rng::Rng::new(salt ^ end.index.get() << 32 ^ term << 16).fill(&mut command);
        builder.push(&command, None).expect("the command fits");
        let (block, info) = builder.seal(Seal {
            group: GroupId(0),
            term: Term(term),
            first: end.index.next(),
            kind: BatchKind::Commands,
            time_ms: 1_000 + end.index.get(),
            previous_chain: end.chain,
        });
        assert_eq!(info.slot_bytes(), slot, "the batch has the size that was asked for");
        let content = xxh3_64(&block[ENVELOPE_BYTES..ENVELOPE_BYTES + info.image_bytes as usize]);
        self.model.log.batches.push(Appended { info, content });
        self.wal.append(&mut self.disk, block, info);
        true
    }

    /// Truncates after the batch that ends at `index`, or the start of the log.
    pub fn truncate_after(&mut self, index: LogIndex) {
        let mut kept = self.model.log.clone();
        kept.batches.retain(|batch| batch.info.last <= index);
        kept.acknowledged = kept.acknowledged.min(index);
        self.model.before.push(std::mem::replace(&mut self.model.log, kept));
        self.wal.truncate_after(&mut self.disk, index);
    }

    /// Moves the log's start to the end of a batch, as far as that is durable.
    pub fn purge(&mut self, through: LogIndex) {
        let before = self.wal.first_index().previous();
        let through = through.min(self.wal.durable_through());
        if through <= before {
            return;
        }
        let start = self.wal.purge_through(&mut self.disk, through);
        if self.model.starts.is_empty() {
            self.model.starts.push(before);
        }
        if start > before {
            self.model.starts.push(start);
        }
    }

    /// Begins the log anew, empty, so far behind its end, as behind a snapshot of a log that is another one.
    pub fn start_anew(&mut self, beyond_end: u64, term: u64) {
        let before = self.wal.first_index().previous();
        let index = LogIndex(self.wal.last_index().get() + beyond_end);
        let start = LogStart { index, term: Term(term), chain: Chain([0xa5; 16]) };
        let anew = Promise { batches: Vec::new(), acknowledged: index };
        self.model.before.push(std::mem::replace(&mut self.model.log, anew));
        if self.model.starts.is_empty() {
            self.model.starts.push(before);
        }
        self.model.starts.push(index);
        self.model.anew = Some(index);
        self.wal.start_anew(&mut self.disk, start);
    }

    /// Saves term and vote.
    pub fn save(&mut self, term: u64, vote: Option<u64>) {
        let update = HardStateUpdate { term: Term(term), vote: vote.map(NodeId) };
        let sequence = self.wal.save_hard_state(&mut self.disk, update);
        self.model.hard.push((sequence, (update.term, update.vote)));
    }

    /// Records a formed configuration of so many bytes.
    pub fn form(&mut self, configuration_bytes: usize) {
        let sequence = self.wal.form(&mut self.disk, vec![0xcf; configuration_bytes], Chain([7; 16]));
        let state = self.wal.hard_state().expect("an open log has its hard state");
        self.model.hard.push((sequence, (state.term, state.vote)));
        self.configuration = Some((sequence, configuration_bytes));
    }

    /// Records how far the log is durable.
    pub fn save_witness(&mut self) {
        self.wal.save_witness(&mut self.disk);
    }

    /// Asks for batches from `first` on.
    pub fn read(&mut self, first: LogIndex, bytes_max: usize) {
        self.reads_waiting += 1;
        self.wal.read(&mut self.disk, self.reads_waiting, first, bytes_max);
    }

    /// Reads the whole log and compares it with what was appended.
    pub fn read_all(&mut self) {
        let (mut next, before) = (self.wal.first_index(), self.read);
        while next <= self.wal.durable_through() && self.violation.is_none() {
            let seen = self.read.0;
            self.read(next, 64 * 1024);
            self.step_until(|run| run.reads_waiting == 0);
            let brought = (self.read.0 - seen) as usize;
            let at = self.model.log.batches.partition_point(|batch| batch.info.first < next);
            match self.model.log.batches.get(at + brought.saturating_sub(1)) {
                Some(last) if brought > 0 => next = last.info.last.next(),
                _ => self.violate(|| format!("the batch at index {next} cannot be read back")),
            }
        }
        if self.read.1 > before.1 {
            self.violate(|| "an intact log was not read".to_owned());
        }
    }

    /// Ends in good order.
    pub fn close(&mut self) {
        self.wal.close(&mut self.disk);
    }

    /// Lets go of the process.
    #[must_use]
    pub fn into_model(self) -> Model {
        self.model
    }
}

/// What a start made of an image.
#[derive(PartialEq, Eq, Debug)]
pub struct Outcome {
    /// Where the log begins.
    pub start: LogIndex,
    /// The log.
    pub batches: Vec<BatchInfo>,
    /// What of the hard state does not change from start to start.
    pub hard: (Term, Option<NodeId>, usize),
}

/// Starts on an image without latency, and reads all back.
///
/// # Errors
/// What it owes and does not bring.
pub fn recover(
    context: &Rc<Context>,
    image: &Rc<RefCell<DiskState>>,
    pool: &Pool<SimBuf>,
    model: &Model,
    read_back: bool,
) -> Result<Outcome, String> {
    let mut run = LogRun::start(context, image, config(1), pool, model.clone());
    run.step_until(|run| run.opened.is_some() || run.poisoned.is_some());
    if let Some(error) = &run.poisoned {
        return Err(format!("the log did not open: {error}"));
    }
    if run.damaged {
        return Err(format!(
            "the log takes the crash for damage: {:?}",
            run.opened.map(|opened| opened.report)
        ));
    }
    let Some(opened) = &run.opened else { return Err("recovery does not end".to_owned()) };
    let state = &opened.hard_state;
    let hard = (state.term, state.vote, state.configuration.len());
    let (start, batches) = (state.start.index, run.wal.batches().collect());
    if read_back {
        run.read_all();
    }
    match run.violation {
        Some(violation) => Err(violation),
        None if run.found > 0 => Err("an intact batch was taken for damaged".to_owned()),
        None => Ok(Outcome { start, batches, hard }),
    }
}

/// A context that nobody looks at.
#[must_use]
pub fn quiet() -> Rc<Context> {
    Context::new(Trace::new(false))
}
