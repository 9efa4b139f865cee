//! Crash images, exhaustively: at every moment of a scenario, every subset of what a power cut may take or leave.
//!
//! A *moment* is a state of the disk between two turns of the log. What is *pending* there is each sector of a write in flight
//! or not flushed, each change of the directory that was not synchronised, and each file size that is not durable. Up to
//! [`EXHAUSTIVE_PENDING_MAX`] pending things, all their subsets become images; of more, all prefixes and suffixes, all that lack or
//! have just one, and a random sample.
//!
//! Each image is started on twice. The first start must open, and bring a prefix of what was appended with all that was
//! acknowledged, and term and vote. The second, after another power cut, must bring the same, and all of it is read back.

use super::log::{LogRun, Model, config, quiet, recover};
use super::threads::{Tally, split};
use crate::sim::buffer::SimBuf;
use crate::sim::disk::{DiskConfig, DiskState, Fault, On, Pending, Scheduled};
use crate::sim::rng::Rng;
use ringraft_block::{BLOCK_BYTES, LogIndex, Pool};
use ringraft_wal::format::{PriorContent, read_envelope, read_segment_header};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use xxhash_rust::xxh3::xxh3_64;

/// All subsets of up to so many pending things become images: 65,536.
pub const EXHAUSTIVE_PENDING_MAX: usize = 16;

/// How many images there are.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The seed of the disk's latencies, and so of the order in which operations complete.
    pub seed: u64,
    /// Images of a moment with more than [`EXHAUSTIVE_PENDING_MAX`] pending things.
    pub sample: u64,
    /// At most so many images of any moment, chosen at random; `u64::MAX` for all.
    pub images_max: u64,
    /// Threads.
    pub threads: usize,
    /// A control: after so many others a write is told to be durable and never arrives, which must show.
    pub lost_write: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: 0, sample: 4_096, images_max: u64::MAX, threads: 2, lost_write: None }
    }
}

/// What the log does while it is looked at.
pub struct Scenario {
    /// Its name in reports.
    pub name: &'static str,
    play: fn(&mut Stage<'_>),
}

/// All scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario { name: "format", play: |stage| stage.restart() },
    Scenario { name: "append", play: append },
    Scenario { name: "append-pipelined", play: append_pipelined },
    Scenario { name: "append-first-of-a-start", play: append_first },
    Scenario { name: "rollover", play: rollover },
    Scenario { name: "rollover-under-load", play: rollover_under_load },
    Scenario { name: "cut-by-start", play: cut_by_start },
    Scenario { name: "cut-by-start-behind-a-torn-tail", play: cut_behind_torn_tail },
    Scenario { name: "cut-by-truncation", play: cut_by_truncation },
    Scenario { name: "cut-by-truncation-of-all", play: cut_of_all },
    Scenario { name: "cut-by-truncation-over-segments", play: cut_over_segments },
    Scenario { name: "hard-state", play: hard_state },
    Scenario { name: "formation", play: formation },
    Scenario { name: "close", play: close },
    Scenario { name: "purge", play: purge },
    Scenario { name: "purge-under-load", play: purge_under_load },
    Scenario { name: "append-over-a-former-life", play: append_over_former_life },
    Scenario { name: "append-over-other-slots-of-a-former-life", play: append_over_other_slots },
    Scenario { name: "rollover-into-a-recycled-segment", play: rollover_into_recycled },
    Scenario { name: "start-into-a-recycled-segment", play: start_into_recycled },
    Scenario { name: "cut-in-a-recycled-segment", play: cut_in_recycled },
    Scenario { name: "start-anew", play: start_anew },
    Scenario { name: "start-anew-under-load", play: start_anew_under_load },
    Scenario { name: "start-anew-and-start", play: start_anew_and_start },
];

fn small(stage: &mut Stage<'_>, count: usize) {
    stage.fill(count, BLOCK_BYTES);
}

/// The last write has 16 sectors, and everything before it is acknowledged.
fn append(stage: &mut Stage<'_>) {
    stage.start();
    small(stage, 3);
    assert!(stage.run.append(1, 2 * BLOCK_BYTES, 0), "the log is ready");
    stage.look();
}

/// Two writes of 8 sectors are in flight.
fn append_pipelined(stage: &mut Stage<'_>) {
    stage.start();
    small(stage, 2);
    for _ in 0..2 {
        assert!(stage.run.append(1, BLOCK_BYTES, 0), "the log is ready");
    }
    stage.look();
    stage.watch();
}

/// The segment was begun by this start, behind a log of an earlier one.
fn append_first(stage: &mut Stage<'_>) {
    stage.start();
    small(stage, 3);
    stage.power_cut(|_| false);
    stage.start();
    assert!(stage.run.append(1, 2 * BLOCK_BYTES, 0), "the log is ready");
    stage.look();
}

/// The last write goes to the next segment, while the one after it is made.
fn rollover(stage: &mut Stage<'_>) {
    stage.start();
    stage.fill_segment();
    assert!(stage.run.append(1, 2 * BLOCK_BYTES, 0), "the log is ready");
    assert_eq!(stage.run.wal.stats().rollovers, 1, "this is the rollover");
    stage.look();
    stage.watch();
    small(stage, 1);
    stage.look();
}

/// The last write of a segment and the first of the next are in flight at once.
fn rollover_under_load(stage: &mut Stage<'_>) {
    stage.start();
    while stage.run.wal.stats().rollovers == 0 {
        let slots = stage.run.wal.stats().written_bytes / BLOCK_BYTES as u64;
        stage.run.append(1, BLOCK_BYTES, slots);
        if stage.run.wal.stats().rollovers == 0 && slots < 30 {
            stage.run.settle();
        } else if stage.run.wal.stats().writes_in_flight >= 2 {
            stage.run.step();
        }
    }
    stage.look();
    stage.watch();
}

/// A start after a clean end. The copies of the hard state, made anew, have 16 sectors each.
fn cut_by_start(stage: &mut Stage<'_>) {
    stage.start_with(|run| run.form(7_000));
    stage.start();
    small(stage, 3);
    stage.power_cut(|_| false);
    stage.restart();
}

/// A start after a crash that tore the last write: a crash during recovery itself.
fn cut_behind_torn_tail(stage: &mut Stage<'_>) {
    for torn in [0x0001_u32, 0x00ff, 0x7fff, 0xfffe, 0xa5a5, 0xffff] {
        stage.begin();
        stage.start();
        small(stage, 2);
        assert!(stage.run.append(1, 2 * BLOCK_BYTES, 0), "the log is ready");
        stage.power_cut(|position| torn >> position & 1 == 1);
        stage.restart();
        // And once more: the cut is there, the segment perhaps not.
        stage.power_cut(|_| false);
        stage.restart();
    }
}

/// A suffix is cut off of which a part is still in flight.
fn cut_by_truncation(stage: &mut Stage<'_>) {
    stage.start();
    small(stage, 4);
    stage.run.append(1, BLOCK_BYTES, 0);
    let keep = stage.run.model.log.batches[1].info.last;
    stage.run.save(2, None);
    stage.run.truncate_after(keep);
    stage.look();
    stage.watch();
    assert!(stage.run.append(2, 2 * BLOCK_BYTES, 1), "the log is ready");
    stage.look();
}

/// Nothing is kept.
fn cut_of_all(stage: &mut Stage<'_>) {
    stage.start();
    small(stage, 2);
    stage.run.truncate_after(LogIndex(0));
    stage.look();
    stage.watch();
    assert!(stage.run.append(1, 2 * BLOCK_BYTES, 1), "the log is ready");
    stage.look();
}

/// The cut lies some segments back; they are removed one after the other. Then another cut.
fn cut_over_segments(stage: &mut Stage<'_>) {
    stage.start();
    small(stage, 2);
    stage.fill_segment();
    stage.fill_segment();
    for (term, keep) in [(2, 5), (3, 1)] {
        let keep = stage.run.model.log.batches[keep].info.last;
        stage.run.save(term, Some(1));
        stage.run.truncate_after(keep);
        stage.look();
        stage.watch();
        stage.run.append(term, BLOCK_BYTES, term);
        stage.look();
        stage.run.settle();
    }
}

/// Term and vote, in place, in files of two blocks: 16 sectors each.
fn hard_state(stage: &mut Stage<'_>) {
    stage.start_with(|run| run.form(7_000));
    small(stage, 1);
    stage.run.save(2, Some(3));
    stage.look();
    stage.watch();
    // While one save is under way, two more are asked for.
    stage.run.save(3, None);
    stage.run.save(3, Some(2));
    stage.run.save(4, None);
    stage.look();
    stage.watch();
}

/// The configuration that the cluster was formed with.
fn formation(stage: &mut Stage<'_>) {
    stage.start_with(|_| {});
    stage.run.form(7_000);
    stage.look();
    stage.watch();
}

/// The end in good order.
fn close(stage: &mut Stage<'_>) {
    stage.start();
    small(stage, 3);
    stage.run.close();
    stage.look();
    stage.watch();
    assert!(stage.run.closed, "nothing keeps it open");
}

/// The start moves within a segment, and over segments, which are made ready for another life one after the other.
fn purge(stage: &mut Stage<'_>) {
    stage.start();
    stage.fill_segment();
    stage.fill_segment();
    small(stage, 2);
    let batches = stage.run.batches();
    let last = batches.len() - 1;
    for through in [2, last - 1, last].map(|at| batches[at].info.last) {
        stage.run.purge(through);
        stage.look();
        stage.watch();
    }
    assert!(stage.run.wal.stats().segments_recycled > 0, "a segment is recycled");
    assert_eq!(stage.run.wal.batches().count(), 0);
    small(stage, 1);
    stage.look();
}

/// Appends, a save and a purge are in flight at once.
fn purge_under_load(stage: &mut Stage<'_>) {
    stage.start();
    stage.fill_segment();
    small(stage, 2);
    let through = stage.run.batches().last().expect("batches").info.last;
    assert!(stage.run.append(1, BLOCK_BYTES, 0), "the log is ready");
    stage.run.purge(through);
    stage.look();
    assert!(stage.run.append(1, BLOCK_BYTES, 1), "the log is ready");
    stage.run.save(2, Some(2));
    stage.look();
    stage.watch();
    stage.run.truncate_after(through);
    stage.look();
    stage.watch();
    assert!(stage.run.wal.stats().segments_recycled > 0, "a segment is recycled");
}

/// The last write has 16 sectors, and under it lies a whole old batch of the same size.
fn append_over_former_life(stage: &mut Stage<'_>) {
    stage.enter_recycled(2 * BLOCK_BYTES);
    assert!(stage.run.append(1, 2 * BLOCK_BYTES, 0), "the log is ready");
    stage.look();
}

/// Two writes of 8 sectors are in flight, over the two halves of one old batch, and then one over halves of two.
fn append_over_other_slots(stage: &mut Stage<'_>) {
    stage.enter_recycled(2 * BLOCK_BYTES);
    for _ in 0..2 {
        assert!(stage.run.append(1, BLOCK_BYTES, 0), "the log is ready");
    }
    stage.look();
    stage.watch();
    small(stage, 1);
    assert!(stage.run.append(1, 2 * BLOCK_BYTES, 0), "the log is ready");
    stage.look();
    stage.watch();
}

/// The next segment has had another life. The one after it enters service meanwhile.
fn rollover_into_recycled(stage: &mut Stage<'_>) {
    stage.enter_recycled(2 * BLOCK_BYTES);
    let rollovers = stage.run.wal.stats().rollovers;
    while stage.run.wal.stats().rollovers == rollovers {
        assert!(stage.run.append(1, 2 * BLOCK_BYTES, 0), "the log is ready");
        if stage.run.wal.stats().rollovers == rollovers {
            stage.run.settle();
        }
    }
    stage.look();
    stage.watch();
    assert!(stage.is_in_recycled(), "the next segment was a recycled one");
    assert!(stage.run.append(1, 2 * BLOCK_BYTES, 0), "the log is ready");
    stage.look();
}

/// A start goes on in a recycled segment, behind a log whose last write was torn over a former life.
fn start_into_recycled(stage: &mut Stage<'_>) {
    for torn in [0x0001_u32, 0x7fff, 0xfffe, 0xa5a5, 0xffff] {
        stage.begin();
        stage.enter_recycled(2 * BLOCK_BYTES);
        assert!(stage.run.append(1, 2 * BLOCK_BYTES, 0), "the log is ready");
        stage.power_cut(|position| torn >> position & 1 == 1);
        stage.restart();
        assert!(stage.run.append(1, BLOCK_BYTES, 0), "the log is ready");
        stage.look();
    }
}

/// A suffix is cut off, some of it in flight over a former life, and the same place is written again.
fn cut_in_recycled(stage: &mut Stage<'_>) {
    stage.enter_recycled(2 * BLOCK_BYTES);
    small(stage, 1);
    let keep = stage.run.batches().last().expect("batches").info.last;
    assert!(stage.run.append(1, 2 * BLOCK_BYTES, 0), "the log is ready");
    stage.run.save(2, None);
    stage.run.truncate_after(keep);
    stage.look();
    stage.watch();
    assert!(stage.run.append(2, 2 * BLOCK_BYTES, 1), "the log is ready");
    stage.look();
    stage.run.settle();
    assert!(stage.run.append(2, 2 * BLOCK_BYTES, 2), "the log is ready");
    stage.look();
}

/// The log goes, of several segments, which are left one after the other; and goes on behind the snapshot.
fn start_anew(stage: &mut Stage<'_>) {
    stage.start();
    stage.fill_segment();
    small(stage, 2);
    stage.run.start_anew(3, 1);
    stage.look();
    stage.watch();
    assert!(stage.run.append(1, 2 * BLOCK_BYTES, 1), "the log is ready");
    stage.look();
    stage.watch();
    small(stage, 1);
    let through = stage.run.batches().last().expect("batches").info.last;
    stage.run.purge(through);
    stage.run.start_anew(1, 1);
    stage.look();
    stage.watch();
    assert!(stage.run.wal.stats().segments_recycled > 0, "a segment is recycled");
}

/// Appends, a save and a purge are in flight when the log begins anew, and then a truncation of what it went on with.
fn start_anew_under_load(stage: &mut Stage<'_>) {
    stage.start();
    small(stage, 3);
    let through = stage.run.batches()[1].info.last;
    assert!(stage.run.append(1, BLOCK_BYTES, 0), "the log is ready");
    stage.run.purge(through);
    stage.run.save(2, Some(2));
    assert!(stage.run.append(2, BLOCK_BYTES, 1), "the log is ready");
    stage.run.start_anew(0, 2);
    stage.look();
    stage.watch();
    let start = stage.run.wal.last_index();
    assert!(stage.run.append(2, BLOCK_BYTES, 2), "the log is ready");
    stage.run.save(3, None);
    stage.run.truncate_after(start);
    stage.look();
    stage.watch();
    assert!(stage.run.append(3, BLOCK_BYTES, 3), "the log is ready");
    stage.look();
    stage.watch();
}

/// The process dies in the middle of it, with the second copy of the hard state unwritten, torn, and written; and the next
/// start is looked at.
fn start_anew_and_start(stage: &mut Stage<'_>) {
    for (steps, survivors) in
        [(0, 0x0000_u32), (0, 0x00ff), (0, 0xffff), (1, 0), (1, 0xa5a5), (2, 0), (4, 0xffff)]
    {
        stage.begin();
        stage.start();
        small(stage, 3);
        stage.run.start_anew(2, 1);
        for _ in 0..steps {
            stage.run.step();
        }
        stage.power_cut(|position| survivors >> (position % 32) & 1 == 1);
        stage.restart();
        stage.power_cut(|_| false);
        stage.restart();
        assert!(stage.run.append(1, BLOCK_BYTES, 3), "the log is ready");
        stage.look();
    }
}

/// Plays scenarios: each of `threads` judges its share of each moment's images.
struct Stage<'a> {
    run: LogRun,
    pool: Pool<SimBuf>,
    options: &'a Options,
    scenario: &'static str,
    thread: usize,
    moment: u64,
    seen: BTreeSet<u64>,
    tally: Tally,
}

fn blank(options: &Options, pool: &Pool<SimBuf>) -> LogRun {
    let context = quiet();
    let state = DiskState::new(&context, 0, Rng::new(options.seed), DiskConfig::default());
    if let Some(skip) = options.lost_write {
        state.borrow_mut().faults_mut().scheduled.push(Scheduled { on: On::Write, skip, fault: Fault::Lost });
    }
    LogRun::start(&context, &state, config(options.seed), pool, Model::default())
}

impl<'a> Stage<'a> {
    fn new(scenario: &'static str, options: &'a Options, thread: usize) -> Self {
        let pool = Pool::new(4 << 20);
        let run = blank(options, &pool);
        Self {
            run,
            pool,
            options,
            scenario,
            thread,
            moment: 0,
            seen: BTreeSet::new(),
            tally: Tally::default(),
        }
    }

    /// A blank disk.
    fn begin(&mut self) {
        self.run = blank(self.options, &self.pool);
    }

    /// Opens the log in term 1, at least, without looking.
    fn start(&mut self) {
        self.start_with(|_| {});
        if self.run.wal.hard_state().is_some_and(|state| state.term.get() == 0) {
            self.run.save(1, Some(1));
        }
        self.run.settle();
    }

    fn start_with(&mut self, first: impl Fn(&mut LogRun)) {
        self.run.settle();
        assert!(self.run.is_open(), "{}: {:?}, {:?}", self.scenario, self.run.poisoned, self.run.violation);
        first(&mut self.run);
        self.run.settle();
    }

    /// Opens the log, looking.
    fn restart(&mut self) {
        self.run.turn();
        self.look();
        self.watch();
    }

    /// Appends batches one after the other, without looking.
    fn fill(&mut self, count: usize, slot: usize) {
        for salt in 0..count {
            let term = self.run.wal.hard_state().map_or(1, |state| state.term.get());
            assert!(self.run.append(term, slot, salt as u64), "the log is ready");
            self.run.settle();
        }
    }

    /// Appends until the next slot of two blocks goes to the next segment.
    fn fill_segment(&mut self) {
        let rollovers = self.run.wal.stats().rollovers;
        let slots = |run: &LogRun| run.wal.stats().written_bytes;
        let start = slots(&self.run);
        while self.run.wal.stats().rollovers == rollovers
            && slots(&self.run) - start < 16 * 2 * BLOCK_BYTES as u64
        {
            self.fill(1, 2 * BLOCK_BYTES);
        }
    }

    /// Opens the log, and purges and appends until it goes on in a segment that has had another life, and holds some batches of
    /// this one; what comes next is written over an old batch.
    fn enter_recycled(&mut self, slot: usize) {
        self.start();
        for _ in 0..8 {
            self.fill_segment();
            self.fill(2, slot);
            let last = self.run.batches().len() - 1;
            let through = self.run.batches()[last - 1].info.last;
            self.run.purge(through);
            self.run.settle();
            if self.is_in_recycled() {
                self.fill(1, slot);
                return;
            }
        }
        panic!("no segment comes back: {:?}", self.run.wal.stats());
    }

    fn is_in_recycled(&self) -> bool {
        self.recycled_file().is_some()
    }

    /// The segment that the last batch lies in, if it has had another life and holds batches of that.
    fn recycled_file(&self) -> Option<String> {
        let last = self.run.wal.batches().last()?;
        let state = self.run.state.borrow();
        let names = state.listing().into_iter().map(|entry| entry.name);
        names.filter(|name| name.ends_with(".wal")).find(|name| {
            let content = state.content(name).unwrap_or_default();
            let Ok(header) = read_segment_header(&content) else { return false };
            let envelopes = content.chunks(BLOCK_BYTES).filter_map(|block| read_envelope(block).ok());
            let (own, former): (Vec<_>, Vec<_>) =
                envelopes.partition(|envelope| envelope.nonce == header.nonce);
            header.prior_content == PriorContent::Checksums
                && own.iter().any(|envelope| envelope.chain == last.chain)
                && !former.is_empty()
        })
    }

    /// The machine loses power; of what is pending that survives which `survives` picks. The next process begins.
    fn power_cut(&mut self, survives: impl Fn(usize) -> bool) {
        let pending = self.run.state.borrow().pending();
        let image = self.run.state.borrow().crash_image(&quiet(), &pending, survives);
        let context = quiet();
        let state = image.borrow().with_config(&context, Rng::new(self.options.seed), DiskConfig::default());
        let model = std::mem::take(&mut self.run.model);
        self.run = LogRun::start(&context, &state, config(self.options.seed), &self.pool, model);
    }

    /// Lets everything complete, looking at each moment.
    fn watch(&mut self) {
        while self.run.step() {
            self.look();
        }
    }

    /// Judges all images of this moment.
    fn look(&mut self) {
        self.moment += 1;
        if let Some(violation) = self.run.violation.take() {
            self.tally.violations.push(format!("{}, moment {}: {violation}", self.scenario, self.moment));
        }
        let run = &self.run;
        let pending = run.state.borrow().pending();
        let told = format!("{pending:?} {:?} {:?}", run.model, run.state.borrow().durable_hash());
        if !self.seen.insert(xxh3_64(told.as_bytes())) {
            return;
        }
        let mut rng = Rng::new(self.options.seed ^ self.moment);
        let count = pending.len();
        if count <= EXHAUSTIVE_PENDING_MAX && 1 << count <= self.options.images_max {
            for mask in 0..1_u128 << count {
                self.judge(&pending, mask);
            }
            return;
        }
        let mut masks = BTreeSet::new();
        for position in 0..=count {
            let prefix = (1_u128 << position) - 1;
            let all = (1_u128 << count) - 1;
            let one = if position < count { 1 << position } else { 0 };
            masks.extend([prefix, all & !prefix, one, all & !one]);
        }
        let wanted = self.options.sample.min(self.options.images_max) as usize;
        while masks.len() < wanted {
            masks.insert((u128::from(rng.bits()) << 64 | u128::from(rng.bits())) & ((1 << count) - 1));
        }
        for mask in masks {
            self.judge(&pending, mask);
        }
    }

    fn judge(&mut self, pending: &[Pending], mask: u128) {
        if (mask ^ mask >> 7) as usize % self.options.threads != self.thread {
            return;
        }
        let context = quiet();
        let image =
            self.run.state.borrow().crash_image(&context, pending, |position| mask >> position & 1 == 1);
        let outcome = twice(&image, &self.pool, &self.run.model);
        let violation = outcome.err().map(|wrong| {
            let (scenario, moment, seed) = (self.scenario, self.moment, self.options.seed);
            format!("{scenario}, seed {seed}, moment {moment}, survivors {mask:#x} of {pending:?}: {wrong}")
        });
        self.tally.count(violation);
    }
}

/// A log that goes on in a segment that has had another life, and the name of that.
///
/// # Panics
/// When no segment comes back.
#[must_use]
pub fn recycled(options: &Options) -> (LogRun, String) {
    let mut stage = Stage::new("recycled", options, 0);
    stage.enter_recycled(2 * BLOCK_BYTES);
    let file = stage.recycled_file().expect("it goes on there");
    (stage.run, file)
}

/// Starts on an image, and once more on what the first start made durable.
fn twice(image: &Rc<RefCell<DiskState>>, pool: &Pool<SimBuf>, model: &Model) -> Result<(), String> {
    let context = quiet();
    let first = recover(&context, image, pool, model, false)?;
    let again = image.borrow().durable_image(&context);
    let second =
        recover(&context, &again, pool, model, true).map_err(|wrong| format!("second start: {wrong}"))?;
    if first != second {
        return Err(format!("the first start brought {first:?}, the second {second:?}"));
    }
    Ok(())
}

/// What came of a scenario.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its name.
    pub scenario: &'static str,
    /// Its images and what is wrong with them.
    pub tally: Tally,
}

/// Plays the scenarios whose name contains `only`, or all.
pub fn run(options: &Options, only: Option<&str>, mut progress: impl FnMut(&Report)) -> Vec<Report> {
    let mut reports = Vec::new();
    for scenario in SCENARIOS.iter().filter(|scenario| only.is_none_or(|only| scenario.name.contains(only))) {
        let tally = split(options.threads, |thread| {
            let mut stage = Stage::new(scenario.name, options, thread);
            (scenario.play)(&mut stage);
            stage.tally
        });
        let report = Report { scenario: scenario.name, tally };
        progress(&report);
        reports.push(report);
    }
    reports
}
