//! One run: machines, network, clients and trouble, stepped through virtual time.
//!
//! A run has two phases. In the first everything may go wrong, and nothing wrong may come of it. In the second all
//! faults end, and within a bound of virtual time there must be a leader, new commands must be acknowledged, and
//! all nodes must have applied the same log to its end.

use super::buffer;
use super::check::{History, Recorder};
use super::clock::NodeClock;
use super::context::{Context, MICROSECOND, MILLISECOND, SECOND, Time};
use super::coverage::{Coverage, Mark, Need};
use super::disk::{Crash, DiskConfig, DiskFaults, DiskState, SimDisk};
use super::kv::{Command, CommandId, KEYS};
use super::link::{Fabric, LinkConfig, SimLink};
use super::nemesis::{Allowed, Nemesis, Trouble};
use super::node::{
    Answer, Boot, CANDIDATE, Cluster, LEADER, Lack, Members, PORT, SimNode, Tuning, Turned, View,
};
use super::rng::Rng;
use super::trace::{Trace, What};
use clients::Client;
use plots::Plot;
use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Once;
use transfers::Operator;

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
    /// After about one in so many turns that leave nothing to do, another one is taken at once, which must do nothing; 0 for none.
    pub rest_check_every: u64,
    /// Whether every turn looks at everything, also one after which a turn without news need only let the log and the network go on.
    pub whole_turns: bool,
    /// Whether disks fail, run full, write short and rot; without it the seed decides.
    pub disk_faults: Option<bool>,
    /// Whether writes of a killed process may arrive when the next one is running; without it the seed decides.
    pub late_writes: Option<bool>,
    /// Whether members join and leave, where disks do not fail; without it the seed decides.
    pub changes: Option<bool>,
    /// What of the run is left out.
    pub keep: Keep,
    /// Whether clients' calls are listed in the report.
    pub list_calls: bool,
}

/// What a run keeps of its troubles and calls; by default all. The rest of it goes on as well as it can without.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// Troubles of these numbers.
    pub troubles: Option<BTreeSet<u64>>,
    /// Calls of the phase with faults: client and sequence.
    pub calls: Option<BTreeSet<(usize, usize)>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: None,
            steps: 20_000,
            trace: false,
            image_check_every: 256,
            rest_check_every: 512,
            whole_turns: false,
            disk_faults: None,
            late_writes: None,
            changes: None,
            keep: Keep::default(),
            list_calls: false,
        }
    }
}

impl Options {
    /// Whether runs that are made like this may come by what needs that.
    #[must_use]
    pub fn allow(&self, need: Need) -> bool {
        let three = self.nodes.is_none_or(|nodes| nodes >= 3);
        match need {
            Need::Nothing => true,
            Need::Changes => self.changes != Some(false) && self.disk_faults != Some(true),
            Need::RottingDisk => self.disk_faults != Some(false) && three,
            Need::LateWrites => self.late_writes != Some(false),
            Need::ImageChecks => self.image_check_every > 0,
            Need::Three => three,
        }
    }
}

/// A trouble that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Struck {
    /// Its number.
    pub number: u64,
    /// When.
    pub time: Time,
    /// What it was.
    pub trouble: Trouble,
    /// Whom it befell.
    pub node: usize,
}

/// A call that a client made, for the first time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Called {
    /// When.
    pub time: Time,
    /// What was asked.
    pub command: Command,
    /// Whom.
    pub node: usize,
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its seed.
    pub seed: u64,
    /// Machines.
    pub nodes: usize,
    /// Delivered chunks, I/O completions, timers and clients' calls.
    pub events: u64,
    /// Steps of the event loop: turns, arrivals, and what the schedule held.
    pub steps: u64,
    /// Virtual time at its end.
    pub virtual_ns: Time,
    /// Hash of the trace.
    pub hash: u64,
    /// What it came by.
    pub coverage: Coverage,
    /// Troubles, in order.
    pub struck: Vec<Struck>,
    /// Calls of the phase with faults, in order, where [`Options::list_calls`] asks for them.
    pub calls: Vec<Called>,
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
    /// The last lines of the trace before.
    pub tail: String,
}

/// What a run tells, also when it ends in a panic.
#[derive(Default)]
struct Progress {
    steps: Cell<u64>,
    nodes: Cell<usize>,
    struck: RefCell<Vec<Struck>>,
    calls: RefCell<Vec<Called>>,
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

    buffer::begin_run();
    let context = Context::new(Trace::new(options.trace));
    let progress = Rc::new(Progress::default());
    RUNNING.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(cluster, seed, options, Rc::clone(&context), Rc::clone(&progress));
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
    let failure = message.map(|message| Failure { step: progress.steps.get(), message, tail: trace.tail() });
    Report {
        seed,
        nodes: progress.nodes.get(),
        events: trace.events(),
        steps: progress.steps.get(),
        virtual_ns: context.now(),
        hash: trace.hash(),
        coverage: context.coverage(),
        struck: progress.struck.take(),
        calls: progress.calls.take(),
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
    /// What its clocks showed when its core stopped between reading them and taking its turn.
    core_reading: Option<(u64, u64)>,
    /// When the process asked for a turn; 0 for at once.
    wake_at: Time,
    /// A client has proposed something since the last turn.
    called: bool,
    view: View,
    /// It was asked to stop in good order.
    closing: bool,
    /// The term that it led when it was asked to, or 0.
    asked_in_term: u64,
    /// It ended last because nobody can read a part of its log.
    copies_gone: bool,
    /// Turns until it ends, and how.
    doomed: Option<(u64, Doom)>,
    /// Consecutive turns that nothing from outside called for, and when the first of them was.
    idle_turns: u64,
    idle_since: Time,
    /// When it last woke from a pause, or was started: it may have found what was said before.
    woke_at: Time,
    /// When its process ended, while there is none.
    down_since: Time,
    /// What is known of its log, also while it is down.
    known: View,
    /// Its disk has lost content by rot in this run.
    rotten: bool,
    /// What it knew of that at its last turn.
    lack: Lack,
    /// What was committed when it was started.
    committed_at_boot: u64,
    /// Who counts, by its log, where members change; and at the turn before.
    members: Members,
    members_before: Members,
    /// The members before the present ones, and when those gave way.
    members_changed: (Members, Time),
    /// It joins, if it starts with an empty disk.
    joins: bool,
    /// Where it is to listen, and where its process does.
    port: u16,
    listens: u16,
    /// It has lost its disk in this run, after it had left the cluster.
    wiped: bool,
    /// So many durabilities are yet to be looked at.
    suspect: u64,
    /// Frames that its process has refused as damaged.
    frames_damaged: u64,
    /// The term to which it last handed over for its slow disk.
    left_to: u64,
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

/// Everything is checked after so many events; what a single turn can break, after each.
const SWEEP_EVENTS: u64 = 1_000;

/// A node that takes so many turns in [`SPIN_TIME`] with nothing from outside spins.
const SPIN_TURNS: u64 = 1_000;
const SPIN_TIME: Time = 100 * MILLISECOND;

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
    WireNormal,
    LinkNormal {
        from: usize,
        to: usize,
    },
    ClockNormal {
        node: usize,
    },
    Wipe {
        node: usize,
    },
    Move {
        node: usize,
    },
    RestartNow {
        node: usize,
    },
    EndPlot {
        number: u64,
    },
    CutOff {
        number: u64,
    },
    Rescue,
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
    progress: Rc<Progress>,
    rng: Rng,
    tuning: Tuning,
    fabric: Rc<RefCell<Fabric>>,
    machines: Vec<Machine<C::Node>>,
    clients: Vec<Client>,
    nemesis: Nemesis,
    allowed: Allowed,
    /// The machines that the cluster is formed of, the first ones.
    founders: usize,
    /// What is under way, and how many there have been.
    plot: Option<Plot>,
    plots: u64,
    /// A node that odd clients read from until then, wherever the leader is.
    watched: Option<(usize, Time)>,
    /// How many more truncations may be followed by a look at the disk.
    truncation_checks: u64,
    /// Members join and leave.
    changes: bool,
    /// Numbers of the next trouble of the schedule, and of the next that an election brings.
    next_trouble: [u64; 2],
    history: Rc<RefCell<History>>,
    schedule: BinaryHeap<Reverse<(Time, u64, Plan)>>,
    scheduled: u64,
    phase: Phase,
    phase_ends: Time,
    phase_steps_end: u64,
    commits_seen: u64,
    image_check_at: u64,
    /// Turns that left nothing to do.
    rests: u64,
    swept_at: u64,
    /// The term of the converged cluster, and until when it must stay.
    stable: Option<(u64, Time)>,
    answers: Vec<(u64, Answer)>,
    bytes: Vec<u8>,
    operator: Operator,
}

impl<'a, C: Cluster> World<'a, C> {
    fn new(
        cluster: &'a C,
        seed: u64,
        options: &'a Options,
        context: Rc<Context>,
        progress: Rc<Progress>,
    ) -> Self {
        let mut rng = Rng::new(seed);
        let founders = options.nodes.unwrap_or([3, 3, 3, 3, 5, 5, 1, 2][rng.index(8)]);
        progress.nodes.set(founders);
        let allowed = Allowed::draw(&mut rng.fork(4), founders, options.disk_faults, options.late_writes);
        // Where disks fail, too, nobody could say whether what is left may still decide.
        let mut changing = rng.fork(8);
        let drawn = changing.chance(350_000);
        let changes = C::CHANGES
            && options.changes.unwrap_or(drawn)
            && !allowed.failing_disks
            && allowed.rotting_disk.is_none();
        let nodes = if changes { founders + 1 + changing.index(2) } else { founders };
        let tuning = Tuning::draw(&mut rng.fork(1));
        let fabric = Fabric::new(&context, nodes, rng.fork(2), LinkConfig::default());
        let clients = 1 + rng.index(8);
        // Most runs spend their steps on trouble, not on commands.
        let think = tuning.election_timeout_ms * MILLISECOND / [5_000, 200, 20, 20, 5, 5][rng.index(6)];
        let keys = 1 + rng.index(KEYS);
        let history = History::new(&context, clients);
        let machine = |node: usize, rng: &mut Rng| {
            let mut own = rng.fork(100 + node as u64);
            let disk = DiskState::new(&context, node, own.fork(1), DiskConfig::default());
            disk.borrow_mut().faults_mut().late_write_ppm = if allowed.late_writes { 300_000 } else { 0 };
            let drift_ppm = own.between(0, 2_000) as i64 - 1_000;
            Machine {
                disk,
                clock: NodeClock::new(0, own.below(SECOND), drift_ppm),
                process: None,
                rng: own,
                lives: 0,
                busy_until: 0,
                paused_until: 0,
                core_reading: None,
                wake_at: Time::MAX,
                called: false,
                view: View::default(),
                closing: false,
                asked_in_term: 0,
                copies_gone: false,
                doomed: None,
                idle_turns: 0,
                idle_since: 0,
                woke_at: 0,
                down_since: 0,
                known: View::default(),
                rotten: false,
                lack: Lack::default(),
                committed_at_boot: 0,
                members: Members::default(),
                members_before: Members::default(),
                members_changed: (Members::default(), 0),
                joins: node >= founders,
                port: PORT,
                listens: PORT,
                wiped: false,
                suspect: 0,
                frames_damaged: 0,
                left_to: 0,
            }
        };
        let machines = (0..nodes).map(|node| machine(node, &mut rng)).collect();
        let clients = (0..clients)
            .map(|number| {
                Client::draw(rng.fork(1_000 + number as u64), nodes, keys, think, tuning.command_bytes_max)
            })
            .collect();
        let nemesis = Nemesis::new(rng.fork(3), &tuning, allowed, changes);
        Self {
            cluster,
            options,
            context,
            progress,
            rng,
            tuning,
            fabric,
            machines,
            clients,
            nemesis,
            allowed,
            founders,
            plot: None,
            plots: 0,
            watched: None,
            truncation_checks: 3,
            changes,
            next_trouble: [0, 1 << 32],
            history,
            schedule: BinaryHeap::new(),
            scheduled: 0,
            phase: Phase::Trouble,
            phase_ends: Time::MAX,
            phase_steps_end: options.steps,
            commits_seen: 0,
            image_check_at: seed % options.image_check_every.max(1),
            rests: seed,
            swept_at: 0,
            stable: None,
            answers: Vec::new(),
            bytes: Vec::new(),
            operator: Operator::default(),
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
            let steps = self.progress.steps.get() + 1;
            self.progress.steps.set(steps);
            let events = self.context.trace().borrow().events();
            if events >= self.swept_at + SWEEP_EVENTS {
                self.swept_at = events;
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
            let free_at = machine.busy_until.max(machine.paused_until);
            if free_at >= at || machine.process.is_none() {
                continue;
            }
            let mut due = machine.wake_at;
            if due > free_at {
                if fabric.has_done(node) {
                    due = 0;
                } else if let Some(disk) = machine.disk.borrow().next_due() {
                    due = due.min(disk);
                }
            }
            let due = due.max(free_at);
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
        let Some(Reverse((_, number, plan))) = self.schedule.pop() else { return };
        match plan {
            // A call is an event by itself, and a client that was answered has no timer.
            Plan::Client { .. } => {}
            Plan::GiveUp { client, sequence } if !self.waits(client, sequence) => return,
            _ => self.context.record(0, What::Timer, number, 0),
        }
        match plan {
            Plan::Trouble => {
                if self.phase == Phase::Trouble {
                    self.scheduled_trouble();
                }
            }
            Plan::Restart { node } => self.boot(node),
            Plan::Heal { from, to } => self.fabric.borrow_mut().heal(from, to),
            Plan::DiskNormal { node } => {
                self.context.record(node, What::DiskSpeed, 1, 0);
                self.mend_disk(node);
            }
            Plan::LinkNormal { from, to } => self.fabric.borrow_mut().slow_down(from, to, 0),
            Plan::ClockNormal { node } => {
                let drift = self.machines[node].rng.between(0, 2_000) as i64 - 1_000;
                self.drift(node, drift);
            }
            Plan::RestartNow { node } => self.restart_now(node),
            Plan::Rescue => self.rescue(),
            Plan::CutOff { number } => self.cut_off(number),
            Plan::EndPlot { number } => self.end_plot(number),
            Plan::Wipe { node } => self.wipe(node),
            Plan::WireNormal => self.fabric.borrow_mut().config_mut().flip_ppm = 0,
            Plan::Move { node } => self.move_to_port(node),
            Plan::DialNormal => self.fabric.borrow_mut().config_mut().dial_failure_ppm = 0,
            Plan::Client { client } => self.client_acts(client),
            Plan::Look => self.look(),
            Plan::GiveUp { client, sequence } => self.unknown(CommandId { client, sequence }),
        }
    }

    // ---- Nodes

    fn boot(&mut self, node: usize) {
        let now = self.context.now();
        let mut ports = self.ports();
        let machine = &mut self.machines[node];
        if machine.process.is_some() {
            return;
        }
        machine.listens = machine.port;
        machine.lives += 1;
        if machine.lives.is_multiple_of(2) && !machine.joins {
            // What the machine's operator knows of the others is from the beginning.
            ports.fill(PORT);
            ports[node] = machine.port;
        }
        self.context.record(node, What::Boot, machine.lives, 0);
        if machine.lives > 1 {
            self.context.cover(Mark::Restart);
        }
        self.fabric.borrow_mut().boot(node);
        let boot = Boot {
            node,
            founders: self.founders,
            ports,
            joins: machine.joins,
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
        machine.core_reading = None;
        machine.closing = false;
        machine.doomed = None;
        (machine.frames_damaged, machine.left_to) = (0, 0);
        machine.woke_at = now;
        machine.lack = Lack::default();
        machine.committed_at_boot = self.history.borrow().committed_end();
    }

    fn turn(&mut self, node: usize) {
        let now = self.context.now();
        let machine = &mut self.machines[node];
        let Some(process) = &mut machine.process else { return };
        if machine.paused_until > machine.busy_until {
            machine.woke_at = now;
        }
        let called = self.fabric.borrow().has_done(node)
            || machine.disk.borrow().next_due().is_some_and(|due| due <= now)
            || std::mem::take(&mut machine.called);
        let clocks = (machine.clock.monotonic_ns(now), machine.clock.wall_ms(now));
        let (monotonic_ns, wall_ms) = machine.core_reading.take().unwrap_or(clocks);
        if self.options.whole_turns {
            process.rouse();
        }
        let turned = process.turn(monotonic_ns, wall_ms);
        machine.busy_until = now + machine.rng.around(2 * MICROSECOND);
        let timer = !called && machine.wake_at != 0;
        machine.wake_at = if turned.more { 0 } else { machine.clock.time_of(turned.next_deadline_ns) };
        let flags = u64::from(turned.more) | u64::from(timer) << 1;
        self.context.record(node, What::Turn, flags, machine.wake_at);
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
        let left_to = process.left_for_slow_disk();
        if left_to > std::mem::replace(&mut machine.left_to, left_to) {
            self.context.cover(Mark::SlowLeaderLeft);
        }
        let damaged = process.frames_damaged();
        if damaged > std::mem::replace(&mut machine.frames_damaged, damaged) {
            self.context.cover(Mark::FlipRefused);
            if self.fabric.borrow().flips() == 0 {
                self.history
                    .borrow_mut()
                    .fail(|| format!("node {node} refuses a frame that nothing has damaged"));
            }
        }
        if turned.stopped {
            self.context.record(node, What::Stopped, 0, 0);
            let reason = process.stop_reason();
            self.context.note(|| format!("{reason:?}"));
            let orderly = machine.closing && reason.as_ref().is_some_and(|reason| reason.orderly);
            machine.copies_gone = reason.as_ref().is_some_and(|reason| reason.copies_gone);
            // Its last answers count like any other: a node that acknowledges while it stops is believed.
            let mut answers = std::mem::take(&mut self.answers);
            process.answers(&mut answers);
            for (tag, answer) in answers.drain(..) {
                self.answered(node, tag, &answer);
            }
            self.answers = answers;
            if orderly {
                self.closed(node);
            } else if self.allowed.failing_disks && reason.as_ref().is_some_and(|reason| reason.disk) {
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
        if after != View::default() {
            machine.known = after;
        }
        let mut answers = std::mem::take(&mut self.answers);
        process.answers(&mut answers);
        if before != after {
            self.changed(node, &before, &after);
        }
        self.check_lack(node);
        if after.role == LEADER {
            self.check_leader_is_heard(node);
        }
        for (tag, answer) in answers.drain(..) {
            self.answered(node, tag, &answer);
        }
        self.answers = answers;
        self.take_outcomes(node);
        self.check_rest(node, &turned, (monotonic_ns, wall_ms));

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
        machine.down_since = now;
        machine.view = View::default();
        machine.wake_at = Time::MAX;
        machine.disk.borrow_mut().crash(how);
        if how == Crash::PowerCut {
            let origin = machine.rng.below(SECOND);
            machine.clock.reboot(now, origin);
        }
        self.fabric.borrow_mut().crash(node, how);
        self.errands_lost(node);
        self.plot_crashed(node);
        // Whoever waited for this process will never hear.
        for client in 0..self.clients.len() {
            let this = &self.clients[client];
            if let Some(asked) = this.current.filter(|_| this.in_flight && this.asked == node) {
                self.unknown(asked.command.id);
            }
        }
        if running {
            let absence = self.nemesis.absence();
            if self.fabric.borrow().is_partitioned() {
                self.context.cover(Mark::CrashUnderPartition);
            }
            self.plan(absence, Plan::Restart { node });
        }
    }

    // ---- Phases

    fn change_phase(&mut self, steps: u64) {
        let now = self.context.now();
        let late = now >= self.phase_ends || steps >= self.phase_steps_end;
        match self.phase {
            Phase::Trouble if late => self.begin_calm(),
            Phase::Calm if late && self.is_undecided() => {
                self.context.cover(Mark::Undecided);
                self.context.record(0, What::Phase, 5, 0);
                self.history.borrow_mut().abandon_open();
                self.phase = Phase::Over;
            }
            Phase::Calm | Phase::Quiet if late => {
                let phase = self.phase;
                let mut told = self.describe_nodes();
                for (number, client) in self.clients.iter().enumerate() {
                    told += &format!(
                        "\n  client {number}: answered {} {}, {:?}, in flight {}, at node {}",
                        client.fresh_acknowledged,
                        client.fresh_read,
                        client.current.map(|wanted| (wanted.command, wanted.ask)),
                        client.in_flight,
                        client.asked
                    );
                }
                self.history.borrow_mut().fail(|| format!("no progress without faults ({phase:?}){told}"));
            }
            Phase::Calm
                if self.clients.iter().all(|client| client.fresh_acknowledged && client.fresh_read) =>
            {
                self.context.record(0, What::Phase, 2, 0);
                self.phase = Phase::Quiet;
                self.set_phase_end(steps);
                self.plan(0, Plan::Look);
            }
            _ => {}
        }
    }

    /// What the nodes say of themselves, for the report of a failure.
    fn describe_nodes(&self) -> String {
        let mut told = String::new();
        for (node, machine) in self.machines.iter().enumerate() {
            let state = machine.process.as_ref().map_or_else(|| "down".to_owned(), SimNode::describe);
            told += &format!("\n  node {node}: {:?}\n    {state}", machine.view);
        }
        told
    }

    /// 100 election time-outs, and far more steps than they should take.
    fn set_phase_end(&mut self, steps: u64) {
        self.phase_ends =
            self.context.now() + 100 * self.tuning.election_timeout_ms * MILLISECOND + 10 * SECOND;
        self.phase_steps_end = steps + 1_000_000;
    }

    /// Whether disks failed in this run, and no quorum is left whose logs are whole: what is missing may have been
    /// committed or not, and nobody can tell.
    fn is_undecided(&self) -> bool {
        let whole = |machine: &&Machine<C::Node>| match &machine.process {
            Some(process) => process.is_whole(),
            None => !machine.copies_gone,
        };
        let whole = self.machines.iter().filter(whole).count();
        self.allowed.failing_disks && whole * 2 <= self.machines.len()
    }

    fn begin_calm(&mut self) {
        self.context.record(0, What::Phase, 1, 0);
        self.phase = Phase::Calm;
        (self.plot, self.watched) = (None, None);
        self.set_phase_end(self.progress.steps.get());
        self.fabric.borrow_mut().heal_all();
        self.fabric.borrow_mut().config_mut().dial_failure_ppm = 0;
        self.fabric.borrow_mut().config_mut().flip_ppm = 0;
        for node in 0..self.machines.len() {
            let machine = &mut self.machines[node];
            machine.paused_until = 0;
            machine.doomed = None;
            // Also of what is in flight: a write that hangs far into the calm makes a leader give up its office, and rightly.
            machine.disk.borrow_mut().end_stalls();
            self.mend_disk(node);
            let drift = self.machines[node].rng.between(0, 2_000) as i64 - 1_000;
            self.drift(node, drift);
            self.boot(node);
        }
        for client in &mut self.clients {
            client.fresh_from = client.next;
        }
    }

    /// Waits until all have converged; then, for some election time-outs, that nothing happens to the leader of a cluster that
    /// is left alone.
    fn look(&mut self) {
        let now = self.context.now();
        let election = self.tuning.election_timeout_ms * MILLISECOND;
        if self.has_converged() {
            if !self.has_parted() {
                return self.plan(5 * MILLISECOND, Plan::Look);
            }
            let led = self.machines.iter().filter(|machine| machine.view.role == LEADER);
            let term = led.map(|machine| machine.view.term).max().unwrap_or(0);
            match self.stable {
                Some((stable, until)) if stable == term => {
                    if now >= until {
                        if !self.all_errands_done() {
                            let told = "an operator was not answered".to_owned();
                            return self.history.borrow_mut().fail(|| told);
                        }
                        if self.fabric.borrow().goes_on_after_a_flip() {
                            let told = "a connection goes on over which a flipped bit came".to_owned();
                            return self.history.borrow_mut().fail(|| told);
                        }
                        self.context.cover(Mark::Stable);
                        self.context.record(0, What::Phase, 3, 0);
                        self.phase = Phase::Over;
                        return;
                    }
                }
                Some((stable, _)) => {
                    let told = format!("left alone, the cluster went from term {stable} to {term}");
                    return self.history.borrow_mut().fail(|| told);
                }
                None => {
                    self.context.record(0, What::Phase, 4, 0);
                    self.stable = Some((term, now + 5 * election));
                }
            }
        } else if let Some((stable, _)) = self.stable {
            let told = format!("left alone, the cluster that had converged in term {stable} fell apart");
            return self.history.borrow_mut().fail(|| told);
        }
        let wait = if self.stable.is_some() { election / 2 } else { 5 * MILLISECOND };
        self.plan(wait, Plan::Look);
    }

    fn has_converged(&self) -> bool {
        let Some(leader) = self.machines.iter().position(|machine| machine.view.role == LEADER) else {
            return false;
        };
        let members = self.members_of(leader);
        if !members.settled || self.changes && (!self.all_errands_done() || self.somebody_moves()) {
            return false;
        }
        let first = &self.machines[leader];
        let Some(process) = &first.process else { return false };
        let (index, chain) = (first.view.applied, process.chain_at(first.view.applied));
        let equal = |machine: &Machine<C::Node>| {
            let Some(process) = &machine.process else { return false };
            let view = machine.view;
            // One of a later term unseats the leader as soon as that hears of it.
            [view.applied, view.commit, view.last, view.durable] == [index; 4]
                && view.term == first.view.term
                && process.chain_at(index) == chain
        };
        self.history.borrow().all_answered()
            && (0..self.machines.len()).all(|node| !members.is_member(node) || equal(&self.machines[node]))
    }
}

mod checks;
mod clients;
mod closing;
mod members;
mod plots;
mod reads;
mod sessions;
#[cfg(test)]
mod tests;
mod transfers;
mod trouble;
