//! The world around a node that is not the engine: a cluster of one that writes each command to a file. What the
//! simulator must notice is easy to do wrong here on purpose.

use super::*;
use crate::sim::buffer::SimBuf;
use crate::sim::disk::{Fault, On, Scheduled};
use crate::sim::node::{ImageLog, RefusedAtOnce, StopReason, Turned};
use ringraft_block::{BLOCK_BYTES, Block, Pool, crc32c, round_up_to_block};
use ringraft_wal::disk::{Access, Disk, DiskDone, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId};
use std::convert::Infallible;

const FILE_BYTES: u64 = 64 << 20;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wrong {
    Nothing,
    /// Answers before the write has completed.
    AckEarly,
    /// Opens its file without O_DSYNC and never flushes.
    NeverFlush,
    /// Forgets to apply one command in some.
    Skip,
    /// Stops at once when asked to, whatever it has begun.
    CloseEarly,
}

struct Scribes(Wrong);

/// Opens its file, reads it to its end, then appends.
struct Scribe {
    wrong: Wrong,
    disk: SimDisk,
    recorder: Recorder,
    pool: Pool<SimBuf>,
    file: Option<FileId>,
    stage: Stage,
    /// Where the next record goes.
    end: u64,
    last: u64,
    applied: u64,
    writing: bool,
    closing: bool,
    /// Says that it was told to campaign, and that it has told somebody.
    told: bool,
    lack: Lack,
    waiting: Vec<(u64, Vec<u8>)>,
    answers: Vec<(u64, Answer)>,
    done: Vec<DiskDone<SimBuf>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Start,
    Opening,
    Creating,
    Flushing,
    Syncing,
    Reading,
    Ready,
}

impl Scribe {
    fn block(&self, bytes: usize) -> Block<SimBuf> {
        let block = self.pool.take(bytes, |bytes| Ok::<_, Infallible>(SimBuf::take(bytes)));
        block.expect("infallible")
    }

    fn submit(&mut self, op: DiskOp<SimBuf>) {
        self.disk.submit(DiskOpId(0), op);
    }

    fn access(&self) -> Access {
        if self.wrong == Wrong::NeverFlush { Access::Write } else { Access::DurableWrite }
    }

    fn read(&mut self) {
        self.stage = Stage::Reading;
        let (file, offset) = (self.file.unwrap(), self.end);
        let block = self.block(16 * BLOCK_BYTES);
        self.submit(DiskOp::Read { file, offset, block, bytes: 16 * BLOCK_BYTES });
    }

    fn proceed(&mut self, done: DiskDone<SimBuf>) {
        let name = || "scribe".to_owned();
        match (self.stage, done.result) {
            (Stage::Opening, Err(error)) if error.kind == DiskErrorKind::NotFound => {
                self.stage = Stage::Creating;
                let access = self.access();
                self.submit(DiskOp::Create { name: name(), bytes: FILE_BYTES, access });
            }
            (Stage::Opening | Stage::Creating, Ok(DiskOutput::Opened { file, .. })) => {
                // Also a file that was there: its name may not be durable.
                self.file = Some(file);
                self.stage = Stage::Flushing;
                self.submit(DiskOp::Flush { file });
            }
            (Stage::Flushing, Ok(_)) => {
                self.stage = Stage::Syncing;
                self.submit(DiskOp::SyncDirectory);
            }
            (Stage::Syncing, Ok(_)) => self.read(),
            (Stage::Reading, Ok(DiskOutput::Read { block, .. })) => {
                let Some(command) = unframe(&block) else {
                    self.stage = Stage::Ready;
                    return;
                };
                self.last += 1;
                self.applied = self.last;
                self.recorder.apply(self.last, 1, command);
                self.end += round_up_to_block(command.len() + 8) as u64;
                self.read();
            }
            (Stage::Ready, Ok(DiskOutput::Written { .. })) => {
                self.writing = false;
                if self.wrong != Wrong::AckEarly {
                    self.finish();
                }
            }
            (_, Ok(_)) => unreachable!("each stage knows its completion"),
            (_, Err(error)) => panic!("{error}"),
        }
    }

    /// The first waiting command is done.
    fn finish(&mut self) {
        let (tag, command) = self.waiting.remove(0);
        self.applied = self.last;
        if self.wrong != Wrong::Skip || !self.last.is_multiple_of(50) {
            let reply = self.recorder.apply(self.last, 1, &command);
            self.answers.push((tag, Answer::Committed { index: self.last, term: 1, reply }));
        } else {
            self.answers.push((tag, Answer::Committed { index: self.last, term: 1, reply: 0 }));
        }
    }
}

fn frame(command: &[u8], block: &mut [u8]) {
    block.fill(0);
    block[..4].copy_from_slice(&(command.len() as u32).to_le_bytes());
    block[4..8].copy_from_slice(&crc32c(command).to_le_bytes());
    block[8..8 + command.len()].copy_from_slice(command);
}

fn unframe(block: &[u8]) -> Option<&[u8]> {
    let bytes = u32::from_le_bytes(block[..4].try_into().ok()?) as usize;
    let sum = u32::from_le_bytes(block[4..8].try_into().ok()?);
    let command = block.get(8..8 + bytes)?;
    (bytes > 0 && crc32c(command) == sum).then_some(command)
}

fn chain_of(index: u64) -> [u8; 16] {
    u128::from(index).to_le_bytes()
}

impl SimNode for Scribe {
    fn turn(&mut self, _monotonic_ns: u64, _wall_ms: u64) -> Turned {
        let mut done = std::mem::take(&mut self.done);
        self.disk.poll(&mut done);
        let mut progressed = !done.is_empty();
        for completion in done.drain(..) {
            self.proceed(completion);
        }
        self.done = done;
        if self.stage == Stage::Start {
            self.stage = Stage::Opening;
            let access = self.access();
            self.submit(DiskOp::Open { name: "scribe".to_owned(), access });
        }
        let quiet = self.stage == Stage::Ready && !self.writing;
        let stopped = self.closing && (quiet || self.wrong == Wrong::CloseEarly);
        if quiet && !stopped && !self.waiting.is_empty() {
            progressed = true;
            self.writing = true;
            self.last += 1;
            let bytes = round_up_to_block(self.waiting[0].1.len() + 8);
            let mut block = self.block(bytes);
            frame(&self.waiting[0].1, &mut block);
            let (file, offset) = (self.file.unwrap(), self.end);
            self.end += bytes as u64;
            self.submit(DiskOp::Write { file, offset, block: Rc::new(block), bytes });
            if self.wrong == Wrong::AckEarly {
                self.finish();
            }
        }
        Turned { progressed, next_deadline_ns: u64::MAX, stopped, apply_paused: false }
    }

    fn propose(&mut self, tag: u64, command: &[u8]) -> Result<(), RefusedAtOnce> {
        if self.stage != Stage::Ready {
            return Err(RefusedAtOnce { leader: None });
        }
        self.waiting.push((tag, command.to_vec()));
        Ok(())
    }

    fn shutdown(&mut self) {
        self.closing = true;
    }

    fn answers(&mut self, out: &mut Vec<(u64, Answer)>) {
        out.append(&mut self.answers);
    }

    fn view(&self) -> View {
        let (last, applied) = (self.last, self.applied);
        let role = if self.stage == Stage::Ready { LEADER } else { 0 };
        let formed = role == LEADER;
        View {
            formed,
            role,
            term: 1,
            leader: Some(0),
            vote: Some(0),
            last,
            written: last,
            durable: applied,
            commit: applied,
            applied,
            epoch: 0,
            rollovers: 0,
            met: 0,
        }
    }

    fn was_told_to_campaign(&self) -> bool {
        self.told
    }

    fn is_closing(&self) -> bool {
        self.closing
    }

    fn hands_over(&self) -> bool {
        self.told
    }

    fn lack(&self) -> Lack {
        self.lack.clone()
    }

    fn matched(&self, _peer: usize) -> Option<u64> {
        None
    }

    fn chain_at(&self, index: u64) -> Option<[u8; 16]> {
        Some(chain_of(index))
    }

    fn log_start(&self) -> u64 {
        0
    }

    fn describe(&self) -> String {
        format!("{} applied", self.applied)
    }

    fn stop_reason(&self) -> Option<StopReason> {
        self.closing.then(|| StopReason {
            text: String::new(),
            orderly: true,
            copies_gone: false,
            disk: false,
        })
    }

    fn check(&self) -> Result<(), String> {
        Ok(())
    }
}

impl Cluster for Scribes {
    type Node = Scribe;
    const CHANGES: bool = false;

    fn boot(&self, boot: Boot) -> Scribe {
        Scribe {
            wrong: self.0,
            disk: boot.disk,
            recorder: boot.recorder,
            pool: Pool::new(1 << 20),
            file: None,
            stage: Stage::Start,
            end: 0,
            last: 0,
            applied: 0,
            writing: false,
            closing: false,
            told: false,
            lack: Lack::default(),
            waiting: Vec::new(),
            answers: Vec::new(),
            done: Vec::new(),
        }
    }

    fn recover(&self, _: usize, _: usize, _: &Tuning, mut image: SimDisk) -> Result<ImageLog, String> {
        let pool = Pool::new(1 << 20);
        let mut run = |op| {
            let mut done = Vec::new();
            image.submit(DiskOpId(0), op);
            image.poll(&mut done);
            done.remove(0).result.map_err(|error| error.to_string())
        };
        let Ok(DiskOutput::Opened { file, .. }) =
            run(DiskOp::Open { name: "scribe".into(), access: Access::Read })
        else {
            return Err("no file".to_owned());
        };
        let (mut offset, mut chains) = (0, Vec::new());
        loop {
            let bytes = 16 * BLOCK_BYTES;
            let block =
                pool.take(bytes, |bytes| Ok::<_, Infallible>(SimBuf::take(bytes))).expect("infallible");
            let DiskOutput::Read { block, .. } = run(DiskOp::Read { file, offset, block, bytes })? else {
                return Err("not a read".to_owned());
            };
            let Some(command) = unframe(&block) else { break };
            offset += round_up_to_block(command.len() + 8) as u64;
            let index = chains.len() as u64 + 1;
            chains.push((index, chain_of(index)));
        }
        Ok(ImageLog { last: chains.len() as u64, start: 0, chains })
    }
}

fn options(image_check_every: u64) -> Options {
    Options {
        nodes: Some(1),
        steps: 2_000,
        image_check_every,
        disk_faults: Some(false),
        late_writes: Some(false),
        ..Options::default()
    }
}

fn first_failure(wrong: Wrong, options: &Options) -> Option<String> {
    (0..40).find_map(|seed| run(&Scribes(wrong), seed, options).failure.map(|failure| failure.message))
}

#[test]
fn a_node_that_does_everything_right_survives_every_seed() {
    let mut coverage = Coverage::default();
    for seed in 0..100 {
        let report = run(&Scribes(Wrong::Nothing), seed, &options(200));
        if let Some(failure) = report.failure {
            panic!("seed {seed}, step {}: {}\n{}", failure.step, failure.message, failure.tail);
        }
        coverage.merge(&report.coverage);
    }
    for mark in [
        Mark::Kill,
        Mark::PowerCut,
        Mark::OrderlyStop,
        Mark::TornWrite,
        Mark::UnknownLost,
        Mark::UnknownCommitted,
    ] {
        assert!(coverage.of(mark) > 0, "{}", mark.name());
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let hash = |seed| run(&Scribes(Wrong::Nothing), seed, &options(200)).hash;
    assert_eq!(hash(5), hash(5));
    assert_ne!(hash(5), hash(6));
}

#[test]
fn a_node_that_acknowledges_before_durability_is_caught_by_its_image_and_by_its_history() {
    let by_image = first_failure(Wrong::AckEarly, &options(1)).unwrap();
    assert!(by_image.contains("durable on 0 of 1"), "{by_image}");
    let by_history = first_failure(Wrong::AckEarly, &options(0)).unwrap();
    // What was acknowledged is missing from a log later, or from that of the next leader.
    let consequences = ["CommandId", "elected without the committed index"];
    assert!(consequences.iter().any(|words| by_history.contains(words)), "{by_history}");
}

#[test]
fn a_node_that_never_flushes_is_caught() {
    assert!(first_failure(Wrong::NeverFlush, &options(0)).is_some());
}

#[test]
fn a_node_that_stops_before_its_writes_have_ended_is_caught() {
    let message = first_failure(Wrong::CloseEarly, &options(0)).unwrap();
    assert!(message.contains("stopped in good order"), "{message}");
}

#[test]
fn a_node_that_skips_a_command_is_caught() {
    let message = first_failure(Wrong::Skip, &options(0)).unwrap();
    assert!(message.contains("acknowledged") || message.contains("applied"), "{message}");
}

/// Seed 1231: a write had hung since before the calm, the node led a cluster that had converged meanwhile, and gave up its
/// office when the write had taken an election time-out.
#[test]
fn an_operation_that_hangs_in_the_trouble_does_not_hang_in_the_calm() {
    buffer::begin_run();
    let context = Context::new(Trace::new(false));
    let options = options(0);
    let mut world =
        World::new(&Scribes(Wrong::Nothing), 1, &options, Rc::clone(&context), Rc::new(Progress::default()));
    let disk = Rc::clone(&world.machines[0].disk);
    let stall = Scheduled { on: On::Any, skip: 0, fault: Fault::Stall(SECOND) };
    disk.borrow_mut().faults_mut().scheduled.push(stall);
    world.boot(0);
    while disk.borrow().faults_struck() == 0 {
        world.step();
    }
    let takes = || disk.borrow().next_due().expect("in flight") - context.now();
    assert!(takes() >= SECOND);
    world.begin_calm();
    assert!(takes() < 10 * MILLISECOND);
}

#[test]
fn a_panic_in_a_node_is_a_failure_of_its_run() {
    struct Panics;
    impl Cluster for Panics {
        type Node = Scribe;
        fn boot(&self, _boot: Boot) -> Scribe {
            panic!("cannot boot");
        }
        fn recover(&self, _: usize, _: usize, _: &Tuning, _: SimDisk) -> Result<ImageLog, String> {
            Err(String::new())
        }
    }
    let failure = run(&Panics, 1, &options(0)).failure.unwrap();
    assert!(failure.message.contains("cannot boot"));
}

/// What the checks say of a world in which nothing has happened for long but what `make` does. The last link to node 0 that
/// is cut was cut long ago.
fn judged(nodes: usize, make: impl FnOnce(&mut World<'_, Scribes>)) -> Option<String> {
    let options = Options { nodes: Some(nodes), ..options(0) };
    let context = Context::new(Trace::new(false));
    let mut world = World::new(&Scribes(Wrong::Nothing), 1, &options, Rc::clone(&context), Rc::default());
    (0..nodes).for_each(|node| world.boot(node));
    context.advance_to(SECOND);
    make(&mut world);
    world.history.borrow().failure().map(str::to_owned)
}

fn cut_off(world: &World<'_, Scribes>, from: impl IntoIterator<Item = usize>) {
    from.into_iter().for_each(|from| world.fabric.borrow_mut().cut(from, 0));
    world.context.advance_to(10 * SECOND);
}

/// A leader that hears a quorum told a node to campaign that hears nobody but it, and was taken for one that had skipped
/// its pre-votes.
#[test]
fn a_campaign_needs_a_quorums_pre_votes_or_the_word_of_the_leader_of_the_term_before() {
    let leader = View { role: LEADER, term: 6, ..View::default() };
    // Whether node 0 says that it was told, in which term node 3 has told it, what node 3 is, whether it hands over, and whom
    // node 0 cannot hear.
    let campaign = |says: bool, told: Option<u64>, view: View, hands_over: bool, silent: &[usize]| {
        judged(5, |world| {
            world.history.borrow_mut().see(3, &View::default(), &leader);
            if let Some(term) = told {
                world.fabric.borrow_mut().tell_to_campaign(3, 0, term);
            }
            world.machines[3].view = view;
            for (node, told) in [(0, says), (3, hands_over)] {
                world.machines[node].process.as_mut().unwrap().told = told;
            }
            cut_off(world, silent.iter().copied());
            world.check_campaign(0, 7);
        })
    };
    let left = View { role: 0, ..leader };
    let dead = View::default();
    assert_eq!(campaign(true, Some(6), left, false, &[1, 2, 4]), None, "it has left its office");
    assert_eq!(campaign(true, Some(6), dead, false, &[1, 2, 3, 4]), None, "it has died since");
    assert_eq!(campaign(true, Some(6), leader, true, &[1, 2, 4]), None, "it hands over");
    assert_eq!(campaign(false, None, leader, false, &[1, 2]), None, "a quorum is heard");
    let failure = campaign(false, None, left, false, &[1, 2, 4]).expect("it was not told");
    assert!(failure.contains("without a quorum's pre-votes"), "{failure}");
    for (why, failure) in [
        ("nobody has told it", campaign(true, None, left, false, &[])),
        ("the leader has died, and did not tell it", campaign(true, None, dead, false, &[1, 2, 4])),
        ("it was told in another term", campaign(true, Some(5), left, false, &[])),
        ("the leader goes on", campaign(true, Some(6), leader, false, &[])),
    ] {
        let failure = failure.unwrap_or_else(|| panic!("{why}"));
        assert!(failure.contains("as one that was told to"), "{failure}");
    }
}

/// A leader that had just taken up members of whom it hears no quorum was to have heard them for long.
#[test]
fn a_leader_has_as_long_to_hear_the_members_that_it_was_just_given_as_those_before() {
    let of = |index, incoming| Members { index, incoming, ..Members::default() };
    // What gave way how long ago to nodes 0, 1 and 2, of whom nodes 1 and 2 are not heard.
    let leads = |before: Members, ago: Time, silent: &[usize]| {
        judged(4, |world| {
            world.changes = true;
            cut_off(world, silent.iter().copied());
            world.machines[0].members = of(2, 0b0111);
            world.machines[0].members_changed = (before, world.context.now() - ago);
            world.check_leader_is_heard(0);
        })
    };
    assert_eq!(leads(of(1, 0b1001), MILLISECOND, &[1, 2]), None, "node 3 was heard");
    assert_eq!(leads(of(1, 0b1001), 5 * SECOND, &[2]), None, "a quorum is heard");
    let stops = judged(4, |world| {
        cut_off(world, [1, 2, 3]);
        world.machines[0].process.as_mut().expect("it runs").closing = true;
        world.check_leader_is_heard(0);
    });
    assert_eq!(stops, None, "it only waits for its disk");
    for (why, failure) in [
        ("it was long ago", leads(of(1, 0b1001), 5 * SECOND, &[1, 2])),
        ("node 3 was not heard either", leads(of(1, 0b1001), MILLISECOND, &[1, 2, 3])),
        ("no one was there before", leads(Members::default(), 5 * SECOND, &[1, 2])),
    ] {
        let failure = failure.unwrap_or_else(|| panic!("{why}"));
        assert!(failure.contains("has not heard a quorum"), "{failure}");
    }
}

/// The only voter of several machines was to hear another one for what it read to be fresh.
#[test]
fn a_read_of_bounded_age_needs_a_quorum_where_the_node_leads_and_a_neighbour_where_it_does_not() {
    let read = |members: u32, before: u32, leads: bool, silent: &[usize]| {
        judged(3, |world| {
            world.changes = true;
            let of = |index, incoming| Members { index, incoming, ..Members::default() };
            world.machines[0].members = of(2, members);
            world.machines[0].members_before = if before == 0 { Members::default() } else { of(1, before) };
            cut_off(world, silent.iter().copied());
            world.check_age(0, 300, leads);
        })
    };
    assert_eq!(read(0b001, 0, true, &[1, 2]), None, "the only voter");
    assert_eq!(read(0b011, 0b001, true, &[1, 2]), None, "it was, when it read");
    assert_eq!(read(0b011, 0, true, &[2]), None, "a quorum");
    assert_eq!(read(0b011, 0, false, &[2]), None, "a neighbour");
    let message = |failure: Option<String>| failure.unwrap_or_default();
    assert!(message(read(0b011, 0, true, &[1, 2])).contains("hears no quorum"));
    assert!(message(read(0b011, 0, true, &[1])).contains("hears no quorum"), "a learner is no quorum");
    assert!(message(read(0b011, 0b111, true, &[1, 2])).contains("hears no quorum"));
    assert!(message(read(0b110, 0, false, &[1, 2])).contains("hears nobody"));
}

/// A batch that is lost counts again only for whom it was acknowledged to before; and a log of which an unknown part was lost is
/// whole again when it holds what was committed before the start.
#[test]
fn what_a_disk_has_lost_is_not_acknowledged_anew_and_not_forgotten() {
    let lack = |term, acked, unread: &[u64], claim| Lack { term, acked, unread: unread.to_vec(), claim };
    let after = |was: Lack, now: Lack| {
        judged(1, |world| {
            world.machines[0].rotten = true;
            world.machines[0].lack = was;
            world.machines[0].process.as_mut().expect("it runs").lack = now;
            // Of another log than the node's.
            world.history.borrow_mut().committed(0, 1, 5, Some([9; 16]));
            world.machines[0].committed_at_boot = 5;
            world.check_lack(0);
        })
    };
    assert_eq!(after(lack(1, 9, &[7], None), lack(1, 10, &[7], None)), None, "it had been acknowledged");
    assert_eq!(after(lack(1, 0, &[7], None), lack(1, 6, &[7], None)), None, "it is not acknowledged");
    assert_eq!(after(lack(1, 0, &[7], None), lack(1, 9, &[], None)), None, "it can be read again");
    assert_eq!(after(lack(2, 0, &[], Some(0)), lack(2, 0, &[], None)), None, "committed in a later term");
    let told = |was, now| after(was, now).unwrap_or_default();
    assert!(told(lack(1, 0, &[7], None), lack(1, 7, &[7], None)).contains("cannot read"));
    assert!(
        told(lack(1, 9, &[7], None), lack(2, 9, &[7], None)).contains("cannot read"),
        "to another leader"
    );
    assert!(told(lack(2, 0, &[], Some(1)), lack(2, 0, &[], None)).contains("sure of its log"));
}
