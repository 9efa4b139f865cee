//! One run: machines, network, clients and trouble, stepped through virtual time.
//!
//! A run has two phases. In the first everything may go wrong, and nothing wrong may come of it. In the second all
//! faults end, and within a bound of virtual time there must be a leader, new commands must be acknowledged, and
//! all nodes must have applied the same log to its end.

use super::check::{CommandId, Fate, History, Recorder};
use super::clock::NodeClock;
use super::context::{Context, MICROSECOND, MILLISECOND, SECOND, Time};
use super::coverage::{Coverage, Mark};
use super::disk::{Crash, DiskConfig, DiskFaults, DiskState, SimDisk};
use super::link::{Fabric, LinkConfig, SimLink};
use super::nemesis::{Nemesis, Trouble};
use super::node::{Answer, Boot, CANDIDATE, Cluster, LEADER, SimNode, Tuning, View};
use super::rng::Rng;
use super::trace::{Trace, What};
use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Once;

/// How a run is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// Machines; without it the seed decides.
    pub nodes: Option<usize>,
    /// Steps of the first phase.
    pub steps: u64,
    /// Whether every event is printed.
    pub trace: bool,
    /// About one in so many advances of the commit index is checked against recovered disk images, fewer in a long
    /// log; 0 for none.
    pub image_check_every: u64,
    /// Disks fail, run full and write short. Nodes may stop for it.
    pub disk_faults: bool,
    /// Writes of a killed process may arrive when the next one is running.
    pub late_writes: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: None,
            steps: 20_000,
            trace: false,
            image_check_every: 64,
            disk_faults: false,
            late_writes: false,
        }
    }
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its seed.
    pub seed: u64,
    /// Traced events.
    pub events: u64,
    /// Steps of the event loop: turns, arrivals, and what the schedule held.
    pub steps: u64,
    /// Virtual time at its end.
    pub virtual_ns: Time,
    /// Hash of the trace.
    pub hash: u64,
    /// What it came by.
    pub coverage: Coverage,
    /// What went wrong, with the tail of the trace.
    pub failure: Option<Failure>,
}

/// A failed run.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The step at which it was noticed.
    pub step: u64,
    /// What is wrong.
    pub message: String,
    /// The last events before.
    pub tail: String,
}

thread_local! {
    /// The message of a panic inside a run, instead of its print-out.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
    static RUNNING: Cell<bool> = const { Cell::new(false) };
}

/// Runs `seed`.
pub fn run<C: Cluster>(cluster: &C, seed: u64, options: &Options) -> Report {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if RUNNING.get() {
                PANIC.with_borrow_mut(|panic| *panic = Some(info.to_string()));
            } else {
                before(info);
            }
        }));
    });

    let context = Context::new(Trace::new(options.trace));
    let steps = Rc::new(Cell::new(0));
    RUNNING.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(cluster, seed, options, Rc::clone(&context), Rc::clone(&steps));
        world.run();
        let history = world.history.borrow();
        history.failure().map(str::to_owned)
    }));
    RUNNING.set(false);
    let message = match outcome {
        Ok(failure) => failure,
        Err(_) => Some(PANIC.take().unwrap_or_else(|| "a panic without a message".to_owned())),
    };
    let trace = context.trace().borrow();
    let failure = message.map(|message| Failure { step: steps.get(), message, tail: trace.tail() });
    Report {
        seed,
        events: trace.events(),
        steps: steps.get(),
        virtual_ns: context.now(),
        hash: trace.hash(),
        coverage: context.coverage(),
        failure,
    }
}

struct Machine<N> {
    disk: Rc<RefCell<DiskState>>,
    clock: NodeClock,
    process: Option<N>,
    rng: Rng,
    lives: u64,
    /// The processor is busy until then.
    busy_until: Time,
    paused_until: Time,
    /// When the process asked for a turn; 0 for at once.
    wake_at: Time,
    /// A client has proposed something since the last turn.
    called: bool,
    view: View,
    /// It was asked to stop in good order.
    closing: bool,
    /// Turns until it ends, and how.
    doomed: Option<(u64, Doom)>,
    /// Consecutive turns that nothing from outside called for, and when the first of them was.
    idle_turns: u64,
    idle_since: Time,
    /// When each of the others could last be heard.
    heard_at: Vec<Time>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doom {
    One(Crash),
    /// It is asked to stop in good order.
    Shutdown,
    /// All machines lose power with it.
    All,
    /// It loses all its links.
    Isolated,
}

/// A node that takes so many turns in [`SPIN_TIME`] with nothing from outside spins.
const SPIN_TURNS: u64 = 1_000;
const SPIN_TIME: Time = 100 * MILLISECOND;

struct Client {
    rng: Rng,
    believed: usize,
    next: usize,
    /// The command that waits for an answer, or for another attempt.
    current: Option<CommandId>,
    in_flight: bool,
    think: Time,
    /// How many election time-outs it waits for an answer.
    patience: u64,
    padding_max: u64,
    /// First command of the second phase.
    fresh_from: usize,
    fresh_acknowledged: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Plan {
    Trouble,
    Restart {
        node: usize,
    },
    Heal {
        from: usize,
        to: usize,
    },
    DiskNormal {
        node: usize,
    },
    DialNormal,
    Client {
        client: usize,
    },
    GiveUp {
        client: usize,
        sequence: usize,
    },
    /// Look whether all nodes have converged.
    Look,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Trouble,
    /// No faults; clients go on.
    Calm,
    /// Clients have stopped.
    Quiet,
    Over,
}

struct World<'a, C: Cluster> {
    cluster: &'a C,
    options: &'a Options,
    context: Rc<Context>,
    steps: Rc<Cell<u64>>,
    rng: Rng,
    tuning: Tuning,
    fabric: Rc<RefCell<Fabric>>,
    machines: Vec<Machine<C::Node>>,
    clients: Vec<Client>,
    nemesis: Nemesis,
    history: Rc<RefCell<History>>,
    schedule: BinaryHeap<Reverse<(Time, u64, Plan)>>,
    scheduled: u64,
    phase: Phase,
    phase_ends: Time,
    phase_steps_end: u64,
    commits_seen: u64,
    image_check_at: u64,
    answers: Vec<(u64, Answer)>,
}

impl<'a, C: Cluster> World<'a, C> {
    fn new(
        cluster: &'a C,
        seed: u64,
        options: &'a Options,
        context: Rc<Context>,
        steps: Rc<Cell<u64>>,
    ) -> Self {
        let mut rng = Rng::new(seed);
        let nodes = options.nodes.unwrap_or([3, 3, 3, 3, 5, 5, 1, 2][rng.index(8)]);
        let tuning = Tuning::draw(&mut rng.fork(1));
        let fabric = Fabric::new(&context, nodes, rng.fork(2), LinkConfig::default());
        let clients = 1 + rng.index(8);
        // Most runs spend their steps on trouble, not on commands.
        let think = tuning.election_timeout_ms * MILLISECOND / [5_000, 200, 20, 20, 5, 5][rng.index(6)];
        let history = History::new(&context, clients);
        let machine = |node: usize, rng: &mut Rng| {
            let mut own = rng.fork(100 + node as u64);
            let disk = DiskState::new(&context, node, own.fork(1), DiskConfig::default());
            disk.borrow_mut().faults_mut().late_write_ppm = if options.late_writes { 300_000 } else { 0 };
            let drift_ppm = own.between(0, 2_000) as i64 - 1_000;
            Machine {
                disk,
                clock: NodeClock::new(0, own.below(SECOND), drift_ppm),
                process: None,
                rng: own,
                lives: 0,
                busy_until: 0,
                paused_until: 0,
                wake_at: Time::MAX,
                called: false,
                view: View::default(),
                closing: false,
                doomed: None,
                idle_turns: 0,
                idle_since: 0,
                heard_at: vec![0; nodes],
            }
        };
        let client = |client: usize, rng: &mut Rng| {
            let mut own = rng.fork(1_000 + client as u64);
            Client {
                believed: own.index(nodes),
                next: 0,
                current: None,
                in_flight: false,
                think: think * own.between(1, 4),
                patience: own.between(1, 10),
                padding_max: [100, 1_000, 5_000, 40_000][own.index(4)],
                fresh_from: usize::MAX,
                fresh_acknowledged: false,
                rng: own,
            }
        };
        let machines = (0..nodes).map(|node| machine(node, &mut rng)).collect();
        let clients = (0..clients).map(|number| client(number, &mut rng)).collect();
        let nemesis = Nemesis::new(rng.fork(3), &tuning, options.disk_faults);
        Self {
            cluster,
            options,
            context,
            steps,
            rng,
            tuning,
            fabric,
            machines,
            clients,
            nemesis,
            history,
            schedule: BinaryHeap::new(),
            scheduled: 0,
            phase: Phase::Trouble,
            phase_ends: Time::MAX,
            phase_steps_end: options.steps,
            commits_seen: 0,
            image_check_at: seed % options.image_check_every.max(1),
            answers: Vec::new(),
        }
    }

    fn run(&mut self) {
        for node in 0..self.machines.len() {
            let delay = self.rng.below(20 * MILLISECOND);
            self.plan(delay, Plan::Restart { node });
        }
        for client in 0..self.clients.len() {
            let delay = self.rng.below(200 * MILLISECOND);
            self.plan(delay, Plan::Client { client });
        }
        let quiet_start = self.rng.below(300 * MILLISECOND);
        self.plan(quiet_start, Plan::Trouble);
        while self.phase != Phase::Over {
            self.step();
            let steps = self.steps.get() + 1;
            self.steps.set(steps);
            if steps.is_multiple_of(1_000) {
                self.sweep();
            }
            if self.history.borrow().failure().is_some() {
                return;
            }
            self.change_phase(steps);
        }
        self.sweep();
        self.history.borrow_mut().finish();
    }

    /// Lets the earliest thing happen. What happens at the same time happens in the order network, schedule, nodes.
    fn step(&mut self) {
        enum Next {
            Network,
            Schedule,
            Node(usize),
        }
        let mut next = None;
        let mut at = Time::MAX;
        let fabric = self.fabric.borrow();
        if let Some(due) = fabric.next_due() {
            (at, next) = (due, Some(Next::Network));
        }
        if let Some(Reverse((due, ..))) = self.schedule.peek()
            && *due < at
        {
            (at, next) = (*due, Some(Next::Schedule));
        }
        for (node, machine) in self.machines.iter().enumerate() {
            if machine.process.is_none() {
                continue;
            }
            let mut due = machine.wake_at;
            if due > machine.busy_until {
                if fabric.has_done(node) {
                    due = 0;
                } else if let Some(disk) = machine.disk.borrow().next_due() {
                    due = due.min(disk);
                }
            }
            let due = due.max(machine.busy_until).max(machine.paused_until);
            if due < at {
                (at, next) = (due, Some(Next::Node(node)));
            }
        }
        drop(fabric);
        self.context.advance_to(at.max(self.context.now()));
        match next {
            Some(Next::Network) => self.fabric.borrow_mut().step(),
            Some(Next::Schedule) => self.follow_plan(),
            Some(Next::Node(node)) => self.turn(node),
            None => self.history.borrow_mut().fail(|| "nothing will ever happen again".to_owned()),
        }
    }

    fn plan(&mut self, delay: Time, plan: Plan) {
        self.scheduled += 1;
        self.schedule.push(Reverse((self.context.now() + delay, self.scheduled, plan)));
    }

    fn follow_plan(&mut self) {
        let Some(Reverse((_, _, plan))) = self.schedule.pop() else { return };
        match plan {
            Plan::Trouble => {
                if self.phase == Phase::Trouble {
                    let trouble = self.nemesis.choose();
                    self.make(trouble);
                    let pause = self.nemesis.pause();
                    self.plan(pause, Plan::Trouble);
                }
            }
            Plan::Restart { node } => self.boot(node),
            Plan::Heal { from, to } => self.fabric.borrow_mut().heal(from, to),
            Plan::DiskNormal { node } => {
                self.context.record(node, What::DiskSpeed, 1, 0);
                self.mend_disk(node);
            }
            Plan::DialNormal => self.fabric.borrow_mut().config_mut().dial_failure_ppm = 0,
            Plan::Client { client } => self.client_acts(client),
            Plan::Look if self.has_converged() => {
                self.context.record(0, What::Phase, 3, 0);
                self.phase = Phase::Over;
            }
            Plan::Look => self.plan(5 * MILLISECOND, Plan::Look),
            Plan::GiveUp { client, sequence } => {
                let id = CommandId { client, sequence };
                if self.clients[client].in_flight && self.clients[client].current == Some(id) {
                    self.unknown(id);
                }
            }
        }
    }

    // ---- Nodes

    fn boot(&mut self, node: usize) {
        let now = self.context.now();
        let machine = &mut self.machines[node];
        if machine.process.is_some() {
            return;
        }
        machine.lives += 1;
        self.context.record(node, What::Boot, machine.lives, 0);
        if machine.lives > 1 {
            self.context.cover(Mark::Restart);
        }
        self.fabric.borrow_mut().boot(node);
        let boot = Boot {
            node,
            nodes: self.fabric.borrow().hosts(),
            disk: SimDisk::new(&machine.disk),
            link: SimLink::new(&self.fabric, node),
            recorder: Recorder::new(&self.history, node),
            seed: machine.rng.bits(),
            tuning: self.tuning,
        };
        machine.process = Some(self.cluster.boot(boot));
        machine.view = View::default();
        machine.wake_at = 0;
        machine.busy_until = now;
        machine.paused_until = 0;
        machine.closing = false;
        machine.doomed = None;
        machine.heard_at.fill(now);
    }

    fn turn(&mut self, node: usize) {
        let now = self.context.now();
        let machine = &mut self.machines[node];
        let Some(process) = &mut machine.process else { return };
        // A process that slept may find what was said before.
        let slept = machine.paused_until > machine.busy_until;
        let fabric = self.fabric.borrow();
        for (other, heard_at) in machine.heard_at.iter_mut().enumerate() {
            if slept || !fabric.is_cut(other, node) {
                *heard_at = now;
            }
        }
        drop(fabric);
        let called = self.fabric.borrow().has_done(node)
            || machine.disk.borrow().next_due().is_some_and(|due| due <= now)
            || std::mem::take(&mut machine.called);
        let turned = process.turn(machine.clock.monotonic_ns(now), machine.clock.wall_ms(now));
        machine.busy_until = now + machine.rng.around(2 * MICROSECOND);
        machine.wake_at = if turned.progressed { 0 } else { machine.clock.time_of(turned.next_deadline_ns) };
        self.context.record(node, What::Turn, u64::from(turned.progressed), machine.wake_at);
        if called {
            (machine.idle_turns, machine.idle_since) = (0, now);
        } else {
            machine.idle_turns += 1;
            if machine.idle_turns == SPIN_TURNS && now - machine.idle_since < SPIN_TIME {
                let until = machine.wake_at;
                self.history
                    .borrow_mut()
                    .fail(|| format!("node {node} spins: {turned:?}, to wake at {until}"));
            }
        }
        if turned.apply_paused {
            self.context.cover(Mark::ApplyPaused);
        }
        if turned.stopped {
            self.context.record(node, What::Stopped, 0, 0);
            let reason = process.stop_reason();
            self.context.note(|| reason.as_ref().map_or_else(String::new, |reason| reason.text.clone()));
            let orderly = machine.closing && reason.as_ref().is_some_and(|reason| reason.orderly);
            // Its last answers count like any other: a node that acknowledges while it stops is believed.
            let mut answers = std::mem::take(&mut self.answers);
            process.answers(&mut answers);
            for (tag, answer) in answers.drain(..) {
                self.answered(node, tag, &answer);
            }
            self.answers = answers;
            if orderly {
                self.closed(node);
            } else if self.options.disk_faults {
                // Whoever runs it mends the disk and starts it again.
                self.crash(node, Crash::Kill);
                self.mend_disk(node);
            } else {
                self.history.borrow_mut().fail(|| format!("node {node} stopped: {reason:?}"));
            }
            return;
        }

        let before = std::mem::replace(&mut machine.view, process.view());
        let after = machine.view;
        let mut answers = std::mem::take(&mut self.answers);
        process.answers(&mut answers);
        if before != after {
            self.changed(node, &before, &after);
        }
        for (tag, answer) in answers.drain(..) {
            self.answered(node, tag, &answer);
        }
        self.answers = answers;

        let doomed = &mut self.machines[node].doomed;
        match doomed {
            Some((0, Doom::One(how))) => {
                let how = *how;
                self.crash(node, how);
            }
            Some((0, Doom::Shutdown)) => {
                *doomed = None;
                self.shut_down(node);
            }
            Some((0, Doom::All)) => {
                self.context.cover(Mark::PowerCutOfAll);
                for node in 0..self.machines.len() {
                    self.crash(node, Crash::PowerCut);
                }
            }
            Some((0, Doom::Isolated)) => {
                *doomed = None;
                let length = self.nemesis.length();
                self.cut_where(length, |from, to| (from == node) != (to == node));
            }
            Some((left, _)) => *left -= 1,
            None => {}
        }
    }

    fn changed(&mut self, node: usize, before: &View, after: &View) {
        if (before.role, before.term) != (after.role, after.term) {
            self.context.record(node, What::Role, u64::from(after.role), after.term);
        }
        self.history.borrow_mut().see(node, before, after);
        if after.role >= CANDIDATE && before.role < CANDIDATE {
            // A pre-vote needs a quorum's answers, and lasts two election time-outs at the most.
            let asked = self.context.now().saturating_sub(4 * self.tuning.election_timeout_ms * MILLISECOND);
            let heard = self.machines[node].heard_at.iter().filter(|heard_at| **heard_at >= asked).count();
            if heard * 2 <= self.machines.len() {
                self.history
                    .borrow_mut()
                    .fail(|| format!("node {node} campaigns without a quorum's pre-votes"));
            }
        }
        if after.role == LEADER && before.role != LEADER {
            let Some(process) = &self.machines[node].process else { return };
            let start = process.log_start();
            self.history.borrow_mut().elected(node, after, start, |index| process.chain_at(index));
            if self.phase == Phase::Trouble
                && let Some((trouble, another)) = self.nemesis.regicide()
            {
                self.strike(trouble, node, node);
                if another {
                    let other = self.nemesis.rng().index(self.machines.len());
                    self.strike(Trouble::Kill, other, node);
                }
            }
        }
        if before.commit != after.commit {
            self.context.record(node, What::Commit, after.commit, after.term);
        }
        let news = before.commit.min(before.written) != after.commit.min(after.written);
        if news && after.commit <= after.written {
            let Some(process) = &self.machines[node].process else { return };
            let chain = process.chain_at(after.commit);
            let news = after.commit > process.log_start()
                && self.history.borrow_mut().committed(node, after.term, after.commit, chain);
            if news {
                self.commits_seen += 1;
                if self.options.image_check_every > 0 && self.commits_seen >= self.image_check_at {
                    // Recovery reads the whole log, so the checks become rarer as it grows.
                    self.image_check_at += self.options.image_check_every + self.commits_seen / 8;
                    self.check_images(after.commit, chain);
                }
            }
        }
    }

    fn crash(&mut self, node: usize, how: Crash) {
        let machine = &mut self.machines[node];
        if machine.process.is_none() && how == Crash::Kill {
            return;
        }
        let (what, mark) = match how {
            Crash::Kill => (What::Kill, Mark::Kill),
            Crash::PowerCut => (What::PowerCut, Mark::PowerCut),
        };
        self.context.record(node, what, machine.lives, 0);
        self.context.cover(mark);
        if machine.process.is_some() && machine.closing {
            self.context.cover(Mark::CrashWhileClosing);
        }
        self.take_down(node, how);
    }

    /// The process is gone, and whatever it had not finished with it.
    fn take_down(&mut self, node: usize, how: Crash) {
        let now = self.context.now();
        let machine = &mut self.machines[node];
        let running = machine.process.take().is_some();
        machine.view = View::default();
        machine.wake_at = Time::MAX;
        machine.disk.borrow_mut().crash(how);
        if how == Crash::PowerCut {
            let origin = machine.rng.below(SECOND);
            machine.clock.reboot(now, origin);
        }
        self.fabric.borrow_mut().crash(node, how);
        // Whoever waited for this process will never hear.
        for client in 0..self.clients.len() {
            let this = &self.clients[client];
            if let Some(id) = this.current.filter(|_| this.in_flight && this.believed == node) {
                self.unknown(id);
            }
        }
        if running {
            let absence = self.nemesis.absence();
            self.plan(absence, Plan::Restart { node });
        }
    }

    // ---- Clients

    fn client_acts(&mut self, client: usize) {
        if matches!(self.phase, Phase::Quiet | Phase::Over) {
            self.abandon(client);
            return;
        }
        let nodes = self.machines.len();
        let this = &mut self.clients[client];
        if this.in_flight {
            return;
        }
        let id = this.current.unwrap_or_else(|| {
            let id = CommandId { client, sequence: this.next };
            this.next += 1;
            id
        });
        let node = this.believed;
        let padding = Rng::new(id.sequence as u64 ^ (client as u64) << 32).below(this.padding_max) as usize;
        self.history.borrow_mut().proposed(id);
        self.context.record(node, What::Propose, client as u64, id.sequence as u64);
        let now = self.context.now();
        let machine = &mut self.machines[node];
        let outcome = match &mut machine.process {
            Some(process) if machine.paused_until <= now => {
                process.propose(tag_of(id), &id.encode(padding)).map_err(|refused| refused.leader)
            }
            _ => Err(None),
        };
        let this = &mut self.clients[client];
        this.current = Some(id);
        match outcome {
            Ok(()) => {
                this.in_flight = true;
                self.machines[node].wake_at = 0;
                self.machines[node].called = true;
                let patience = self.tuning.election_timeout_ms * MILLISECOND * this.patience;
                self.plan(patience, Plan::GiveUp { client, sequence: id.sequence });
            }
            Err(leader) => {
                this.believed = leader.unwrap_or_else(|| this.rng.index(nodes));
                self.refused(id);
            }
        }
    }

    /// A definite refusal: the client tries again elsewhere, or sometimes lets go of the command.
    fn refused(&mut self, id: CommandId) {
        self.context.cover(Mark::Refused);
        self.context.record(0, What::Refused, id.client as u64, id.sequence as u64);
        self.history.borrow_mut().answered(id, Fate::Refused);
        let this = &mut self.clients[id.client];
        this.in_flight = false;
        if this.rng.chance(50_000) {
            this.current = None;
        }
        let delay = this.rng.between(MILLISECOND, 20 * MILLISECOND);
        self.plan(delay, Plan::Client { client: id.client });
    }

    fn unknown(&mut self, id: CommandId) {
        self.context.cover(Mark::UnknownOutcome);
        self.context.record(0, What::Refused, id.client as u64, id.sequence as u64);
        self.history.borrow_mut().answered(id, Fate::Unknown);
        let nodes = self.machines.len();
        let this = &mut self.clients[id.client];
        this.in_flight = false;
        this.current = None;
        this.believed = this.rng.index(nodes);
        let delay = this.rng.between(MILLISECOND, 20 * MILLISECOND);
        self.plan(delay, Plan::Client { client: id.client });
    }

    fn answered(&mut self, node: usize, tag: u64, answer: &Answer) {
        let id = id_of(tag);
        let nodes = self.machines.len();
        let this = &mut self.clients[id.client];
        let awaited = this.in_flight && this.current == Some(id);
        match *answer {
            Answer::Committed { index, term } => {
                self.context.record(node, What::Answer, tag, index ^ term << 48);
                self.history.borrow_mut().answered(id, Fate::Acknowledged(index));
                if id.sequence >= this.fresh_from {
                    this.fresh_acknowledged = true;
                }
                if awaited {
                    this.in_flight = false;
                    this.current = None;
                    let delay = this.rng.around(this.think);
                    self.plan(delay, Plan::Client { client: id.client });
                }
            }
            Answer::Refused { leader } if awaited => {
                this.believed = leader.unwrap_or_else(|| this.rng.index(nodes));
                self.refused(id);
            }
            Answer::Refused { .. } => self.history.borrow_mut().answered(id, Fate::Refused),
            Answer::Unknown if awaited => self.unknown(id),
            Answer::Unknown => {}
        }
    }

    /// The client stops: a command that was refused last stays refused.
    fn abandon(&mut self, client: usize) {
        let this = &mut self.clients[client];
        if !this.in_flight {
            this.current = None;
        }
    }

    // ---- Trouble

    fn make(&mut self, trouble: Trouble) {
        let nodes = self.machines.len();
        let node = self.nemesis.rng().index(nodes);
        let leader = self.machines.iter().position(|machine| machine.view.role == LEADER).unwrap_or(node);
        self.strike(trouble, node, leader);
    }

    fn strike(&mut self, trouble: Trouble, node: usize, leader: usize) {
        let nodes = self.machines.len();
        let length = self.nemesis.length();
        let now = self.context.now();
        match trouble {
            Trouble::Kill => self.doom(node, Doom::One(Crash::Kill)),
            Trouble::KillLeader => self.doom(leader, Doom::One(Crash::Kill)),
            Trouble::PowerCut => self.doom(node, Doom::One(Crash::PowerCut)),
            Trouble::PowerCutOfAll => self.doom(node, Doom::All),
            Trouble::Shutdown => self.doom(node, Doom::Shutdown),
            Trouble::ShutdownLeader => self.doom(leader, Doom::Shutdown),
            Trouble::Isolate => self.cut_where(length, |from, to| (from == node) != (to == node)),
            Trouble::IsolateLeader => self.doom(leader, Doom::Isolated),
            Trouble::Split => {
                let side = self.nemesis.rng().bits();
                self.cut_where(length, |from, to| (side >> from & 1) != (side >> to & 1));
            }
            Trouble::OneWay => {
                let to = self.nemesis.rng().index(nodes);
                self.context.cover(Mark::PartialPartition);
                self.cut_where(length, |a, b| (a, b) == (node, to));
            }
            Trouble::Partial => {
                let bits = self.nemesis.rng().bits() & self.nemesis.rng().bits();
                self.context.cover(Mark::PartialPartition);
                self.cut_where(length, |from, to| bits >> ((from * nodes + to) & 63) & 1 == 1);
            }
            Trouble::Pause => {
                self.context.cover(Mark::Pause);
                self.context.record(node, What::Pause, now + length, 0);
                self.machines[node].paused_until = now + length;
            }
            Trouble::ClockJump => {
                let by = self.nemesis.rng().between(0, 7_200_000) as i64 - 3_600_000;
                self.context.cover(Mark::ClockJump);
                self.context.record(node, What::ClockJump, by as u64, 0);
                self.machines[node].clock.jump_ms(by);
            }
            Trouble::SlowDisk => {
                let factor = [3, 10, 100][self.nemesis.rng().index(3)];
                self.context.cover(Mark::SlowDisk);
                self.context.record(node, What::DiskSpeed, factor, 0);
                self.machines[node].disk.borrow_mut().faults_mut().slow_factor = factor;
                self.plan(length, Plan::DiskNormal { node });
            }
            Trouble::StallDisk => {
                self.context.cover(Mark::StalledDisk);
                self.context.record(node, What::DiskSpeed, 0, now + length);
                self.machines[node].disk.borrow_mut().faults_mut().stalled_until = now + length;
            }
            Trouble::Break => {
                let connections = self.fabric.borrow().connections();
                if connections > 0 {
                    let position = self.nemesis.rng().index(connections);
                    self.fabric.borrow_mut().break_connection(position);
                }
            }
            Trouble::DialFailures => {
                self.fabric.borrow_mut().config_mut().dial_failure_ppm = 500_000;
                self.plan(length, Plan::DialNormal);
            }
            Trouble::FailDisk => {
                let (after, for_ever) = (self.nemesis.rng().below(50), self.nemesis.rng().chance(500_000));
                let mut disk = self.machines[node].disk.borrow_mut();
                disk.faults_mut().fail_after_ops = Some(after);
                disk.faults_mut().fail_for_ever = for_ever;
            }
            Trouble::ShortWrites => {
                self.machines[node].disk.borrow_mut().faults_mut().short_write_ppm = 50_000;
                self.plan(length, Plan::DiskNormal { node });
            }
            Trouble::NoSpace => {
                self.context.cover(Mark::DiskFault);
                self.machines[node].disk.borrow_mut().faults_mut().no_space = true;
                self.plan(length, Plan::DiskNormal { node });
            }
        }
    }

    fn mend_disk(&mut self, node: usize) {
        let mut disk = self.machines[node].disk.borrow_mut();
        let faults = disk.faults_mut();
        *faults = DiskFaults { late_write_ppm: faults.late_write_ppm, ..DiskFaults::default() };
    }

    /// Ends a node after some more turns: they are close together when there is much going on, so that crashes fall
    /// between two effects more often than a moment chosen by the clock would.
    fn doom(&mut self, node: usize, doom: Doom) {
        let turns = self.nemesis.rng().below(40);
        self.machines[node].doomed = Some((turns, doom));
    }

    fn cut_where(&mut self, length: Time, cut: impl Fn(usize, usize) -> bool) {
        let nodes = self.machines.len();
        for from in 0..nodes {
            for to in 0..nodes {
                if from != to && cut(from, to) {
                    self.fabric.borrow_mut().cut(from, to);
                    self.plan(length, Plan::Heal { from, to });
                }
            }
        }
    }

    // ---- Phases

    fn change_phase(&mut self, steps: u64) {
        let now = self.context.now();
        let late = now >= self.phase_ends || steps >= self.phase_steps_end;
        match self.phase {
            Phase::Trouble if late => self.begin_calm(),
            Phase::Calm | Phase::Quiet if late => {
                let phase = self.phase;
                let mut told = String::new();
                for (node, machine) in self.machines.iter().enumerate() {
                    let state = machine.process.as_ref().map_or_else(|| "down".to_owned(), SimNode::describe);
                    told += &format!("\n  node {node}: {:?}\n    {state}", machine.view);
                }
                for (number, client) in self.clients.iter().enumerate() {
                    told += &format!(
                        "\n  client {number}: answered {}, {:?}, in flight {}, at node {}",
                        client.fresh_acknowledged, client.current, client.in_flight, client.believed
                    );
                }
                self.history.borrow_mut().fail(|| format!("no progress without faults ({phase:?}){told}"));
            }
            Phase::Calm if self.clients.iter().all(|client| client.fresh_acknowledged) => {
                self.context.record(0, What::Phase, 2, 0);
                self.phase = Phase::Quiet;
                self.set_phase_end(steps);
                self.plan(0, Plan::Look);
            }
            _ => {}
        }
    }

    /// 100 election time-outs, and far more steps than they should take.
    fn set_phase_end(&mut self, steps: u64) {
        self.phase_ends =
            self.context.now() + 100 * self.tuning.election_timeout_ms * MILLISECOND + 10 * SECOND;
        self.phase_steps_end = steps + 3_000_000;
    }

    fn begin_calm(&mut self) {
        self.context.record(0, What::Phase, 1, 0);
        self.phase = Phase::Calm;
        self.set_phase_end(self.steps.get());
        self.fabric.borrow_mut().heal_all();
        self.fabric.borrow_mut().config_mut().dial_failure_ppm = 0;
        for node in 0..self.machines.len() {
            let machine = &mut self.machines[node];
            machine.paused_until = 0;
            machine.doomed = None;
            self.mend_disk(node);
            self.boot(node);
        }
        for client in &mut self.clients {
            client.fresh_from = client.next;
        }
    }

    fn has_converged(&self) -> bool {
        let first = &self.machines[0];
        let Some(process) = &first.process else { return false };
        let (index, chain) = (first.view.applied, process.chain_at(first.view.applied));
        let equal = |machine: &Machine<C::Node>| {
            let Some(process) = &machine.process else { return false };
            let view = machine.view;
            [view.applied, view.commit, view.last, view.durable] == [index; 4]
                && process.chain_at(index) == chain
        };
        self.history.borrow().all_answered()
            && self.machines.iter().all(equal)
            && self.machines.iter().any(|machine| machine.view.role == LEADER)
    }

    // ---- Checks

    fn sweep(&mut self) {
        let mut history = self.history.borrow_mut();
        for (node, machine) in self.machines.iter().enumerate() {
            let Some(process) = &machine.process else { continue };
            history.sweep(node, &machine.view, process.log_start(), |index| process.chain_at(index));
            if let Err(broken) = process.check() {
                history.fail(|| format!("node {node}: {broken}"));
            }
        }
    }

    /// What is committed is on a quorum of disks, in a form that recovery finds.
    fn check_images(&mut self, index: u64, chain: Option<[u8; 16]>) {
        self.context.cover(Mark::ImageChecked);
        let mut holders = 0;
        let mut told = String::new();
        // What the images are asked must not show in the run's own trace and counters.
        let aside = Context::new(Trace::new(false));
        for (node, machine) in self.machines.iter().enumerate() {
            let image = machine.disk.borrow().durable_image(&aside);
            match self.cluster.recover(node, self.machines.len(), &self.tuning, SimDisk::new(&image)) {
                Ok(log) => {
                    let held = log.chains.iter().find(|(end, _)| *end == index).map(|(_, chain)| *chain);
                    if held.is_some() && held == chain || index <= log.start {
                        holders += 1;
                    } else {
                        told += &format!("; node {node} holds up to {}", log.last);
                    }
                }
                Err(error) => told += &format!("; node {node}: {error}"),
            }
        }
        if holders * 2 <= self.machines.len() {
            self.history.borrow_mut().fail(|| {
                format!(
                    "index {index} is committed and durable on {holders} of {} nodes{told}",
                    self.machines.len()
                )
            });
        }
    }
}

fn tag_of(id: CommandId) -> u64 {
    (id.client as u64) << 32 | id.sequence as u64
}

fn id_of(tag: u64) -> CommandId {
    CommandId { client: (tag >> 32) as usize, sequence: (tag & 0xffff_ffff) as usize }
}

mod closing;
#[cfg(test)]
mod tests;
