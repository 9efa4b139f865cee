//! Three members of a cluster on one thread, on disks and sockets in memory: the engine's own driver, core, log and network,
//! without a system call, so that what they do for a command can be counted exactly and comes out alike in every run.
//!
//! The members have their turns as cores do: one with news runs turns until one finds nothing, and what its disk is asked for
//! has happened when it comes to have turns again. So with one command in flight a leader wakes for the command, for its
//! own write and for each acknowledgement, as it does where each member has a machine.

mod disk;
mod link;

use bytes::Bytes;
use disk::{Files, MemoryDisk};
use link::{MemoryLink, Wires};
use ringraft::driver::Driver;
use ringraft::handle::{Completion, Handle, Pipeline, Proposal};
use ringraft::runtime::{Now, Turn, Wakeup};
use ringraft::state_machine::{CommittedBatch, Replies, StateMachine};
use ringraft::{ClusterId, Config, MemberConfig, NodeId, Role};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// Commands are of this size.
pub(crate) const PAYLOAD_BYTES: usize = 128;
/// How many commands are in flight, and in one batch: what comes back together is proposed together.
pub(crate) const IN_FLIGHT: [usize; 3] = [1, 64, 1024];
/// Time that passes while a member has its turns.
const VISIT_NS: u64 = 5_000;
/// The port of the first member.
const PORT: u16 = 7_001;
/// Within so much of the members' time they have elected the first of them.
const ELECTED_WITHIN_NS: u64 = 60_000_000_000;

/// How much is run, with some number of commands in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Until queues, pools and tables have their size.
    pub(crate) warm_up_commands: u64,
    /// Then.
    pub(crate) commands: u64,
}

/// Not more than the first segment has room for, and little if this is only a test.
pub(crate) fn steady(in_flight: usize) -> Plan {
    let batches = if is_measuring() { (2_000 / in_flight).max(128) } else { 128 };
    let commands = (batches * in_flight) as u64;
    Plan { warm_up_commands: commands, commands }
}

/// Whether this is a run for figures. `cargo test --benches` runs these programs too, without this flag.
pub(crate) fn is_measuring() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

/// Whose work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Neither: the program itself.
    Program,
    /// Whoever proposes, through a `Handle`.
    Client,
    Leader,
    /// Both of them.
    Followers,
}

/// How commands are proposed and their outcomes come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// [`Handle::pipeline`], by groups.
    Pipeline,
    /// [`Handle::propose`]: a future for each.
    #[allow(dead_code, reason = "not every benchmark proposes both ways")]
    Futures,
}

/// Counts commands, and replies nothing.
#[derive(Default)]
pub(crate) struct Tally(u64);

impl StateMachine for Tally {
    fn apply(&mut self, batch: &CommittedBatch<'_>, replies: &mut Replies) {
        for _command in batch.commands() {
            self.0 += 1;
            replies.push_empty();
        }
    }
}

struct Member {
    driver: Driver<MemoryDisk, MemoryLink, Tally>,
    handle: Handle,
    files: Rc<RefCell<Files>>,
    /// It has been proposed to.
    is_called: bool,
    deadline_ns: u64,
}

/// What was counted since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) commands: u64,
    pub(crate) batches: u64,
    pub(crate) leader_turns: u64,
    pub(crate) followers_turns: u64,
}

/// The cluster. The first member leads.
pub(crate) struct Members {
    members: Vec<Member>,
    wires: Rc<RefCell<Wires>>,
    now_ns: u64,
    counts: Counts,
    /// Told whose work is about to be done.
    enter: fn(Part),
}

impl Members {
    /// Forms a cluster and waits until the first member leads it.
    pub(crate) fn new(enter: fn(Part)) -> Self {
        let wires = Rc::new(RefCell::new(Wires::default()));
        let members = (0..3).map(|at| Member::new(at, &wires)).collect();
        let mut cluster = Self { members, wires, now_ns: 1_000_000_000, counts: Counts::default(), enter };
        while cluster.members[0].handle.status().role != Role::Leader {
            assert!(cluster.now_ns < ELECTED_WITHIN_NS, "the first member has the shortest patience by far");
            cluster.round(|| false);
        }
        cluster
    }

    /// A load for the leader.
    pub(crate) fn load(&self, way: Way, in_flight: usize) -> Load {
        let handle = self.members[0].handle.clone();
        Load {
            way,
            missing: in_flight,
            pipeline: handle.pipeline(),
            handle,
            command: Bytes::from(vec![0x5a; PAYLOAD_BYTES]),
            completions: Vec::new(),
            proposals: VecDeque::new(),
            completed: 0,
        }
    }

    /// Goes on until so many more commands have completed.
    pub(crate) fn run(&mut self, load: &mut Load, commands: u64) {
        let until = load.completed + commands;
        while load.completed < until {
            self.round(|| load.turn());
        }
        self.counts.commands = load.completed;
    }

    pub(crate) fn counts(&self) -> Counts {
        let batches = self.members[0].driver.wal().stats().writes;
        Counts { batches, ..self.counts }
    }

    /// Each member in turn, the client and the leader around each follower; then on to the next deadline, if nobody had anything
    /// to do.
    fn round(&mut self, mut client: impl FnMut() -> bool) {
        let mut any = false;
        for follower in [1, 2] {
            (self.enter)(Part::Client);
            self.members[0].is_called |= client();
            any |= self.visit(0);
            any |= self.visit(follower);
        }
        if !any {
            let next_ns = self.members.iter().map(|member| member.deadline_ns).min().unwrap_or(self.now_ns);
            self.now_ns = self.now_ns.max(next_ns);
        }
    }

    /// Runs the member's turns if it has anything to do.
    fn visit(&mut self, at: usize) -> bool {
        (self.enter)(Part::Program);
        let member = &mut self.members[at];
        let mut news = member.files.borrow_mut().work();
        news |= self.wires.borrow().has_news(at);
        news |= std::mem::take(&mut member.is_called);
        if !news && self.now_ns < member.deadline_ns {
            return false;
        }
        self.now_ns += VISIT_NS;
        let now = Now { monotonic_ns: self.now_ns, wall_ms: self.now_ns / 1_000_000 };
        (self.enter)(if at == 0 { Part::Leader } else { Part::Followers });
        if at == 0 {
            leader(member, now, &mut self.counts)
        } else {
            follower(member, now, &mut self.counts)
        }
        (self.enter)(Part::Program);
        true
    }
}

/// The turns of the leader: a function of its own, by which they are told from those of the others.
#[inline(never)]
fn leader(member: &mut Member, now: Now, counts: &mut Counts) {
    counts.leader_turns += member.turns(now);
}

/// Those of a follower.
#[inline(never)]
fn follower(member: &mut Member, now: Now, counts: &mut Counts) {
    counts.followers_turns += member.turns(now);
}

impl Member {
    fn new(at: u16, wires: &Rc<RefCell<Wires>>) -> Self {
        let member = |at: u16| MemberConfig {
            id: NodeId(u64::from(at) + 1),
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, PORT + at)),
        };
        let id = member(at).id;
        let mut config = Config::new(ClusterId(1), id, (0..3).map(member).collect(), "memory");
        // One segment is enough for a run: what is done when it is full is no matter of the single command.
        (config.segments_ahead, config.scrub_bytes_per_second) = (1, 0);
        if at > 0 {
            config.election_timeout = Duration::from_secs(10);
        }
        let files = Rc::new(RefCell::new(Files::default()));
        let disk = MemoryDisk::new(Rc::clone(&files));
        let link = MemoryLink::new(usize::from(at), Rc::clone(wires));
        let seed = id.get();
        let made = Driver::with_backend(config, seed, Arc::new(Wakeup::new()), disk, link, Tally(0));
        let (driver, handle) = made.expect("the configuration is valid");
        Self { driver, handle, files, is_called: false, deadline_ns: 0 }
    }

    /// Turns until there is no more to do; how many.
    fn turns(&mut self, now: Now) -> u64 {
        for turns in 1.. {
            let outcome = self.driver.turn(now);
            assert!(!outcome.stop, "nothing fails here");
            self.deadline_ns = outcome.next_deadline_ns;
            if !outcome.more {
                return turns;
            }
        }
        unreachable!("a member comes to rest")
    }
}

/// A closed loop of commands.
pub(crate) struct Load {
    way: Way,
    handle: Handle,
    pipeline: Pipeline,
    command: Bytes,
    completions: Vec<Completion>,
    proposals: VecDeque<Proposal>,
    /// Commands to be proposed.
    missing: usize,
    completed: u64,
}

impl Load {
    /// Takes what has completed, and proposes as much again. Says whether it has proposed anything.
    #[inline(never)]
    fn turn(&mut self) -> bool {
        match self.way {
            Way::Pipeline => self.turn_of_pipeline(),
            Way::Futures => self.turn_of_futures(),
        }
        std::mem::take(&mut self.missing) > 0
    }

    fn turn_of_pipeline(&mut self) {
        self.pipeline.completions(&mut self.completions);
        for completion in self.completions.drain(..) {
            completion.outcome.expect("nothing fails here");
            self.completed += 1;
            self.missing += 1;
        }
        for tag in 0..self.missing as u64 {
            self.pipeline.enqueue(tag, &self.command);
        }
        self.pipeline.flush();
    }

    fn turn_of_futures(&mut self) {
        let mut context = Context::from_waker(Waker::noop());
        // They complete in order.
        while let Some(first) = self.proposals.front_mut()
            && let Poll::Ready(outcome) = Pin::new(first).poll(&mut context)
        {
            outcome.expect("nothing fails here");
            self.proposals.pop_front();
            self.completed += 1;
            self.missing += 1;
        }
        for _ in 0..self.missing {
            self.proposals.push_back(self.handle.propose(self.command.clone()));
        }
    }
}
