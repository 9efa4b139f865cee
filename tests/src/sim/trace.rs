//! The trace of a run: hashed always, kept in part, printed on request.
//!
//! Two runs are the same run if and only if their hashes are. The tail is what a failure prints.

use std::fmt;
use xxhash_rust::xxh3::Xxh3;

/// How many lines the tail keeps.
const TAIL_EVENTS: usize = 160;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident: $text:literal,)*) => {
        /// What happened.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum What {
            $($(#[$doc])* $name,)*
        }

        impl What {
            /// What `a` and `b` of the event mean, with the kind before them.
            const fn text(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

kinds! {
    /// An operation was handed to the disk: kind, bytes.
    DiskSubmit: "disk submit",
    /// A completion was taken from the disk: kind and outcome, bytes.
    DiskDone: "disk done",
    /// The disk of a crashed node settled: writes pending, sectors surviving.
    DiskCrash: "disk crash",
    /// An operation was handed to the network: kind, bytes.
    LinkSubmit: "link submit",
    /// A completion was taken from the network: kind and outcome, bytes.
    LinkDone: "link done",
    /// A chunk arrived at the far end: connection, bytes.
    Arrive: "arrive",
    /// An end of a connection was reset: connection, end.
    Reset: "reset",
    /// A node took a turn: bit 0, whether it has more to do; bit 1, whether only a timer called for it; its deadline.
    Turn: "turn",
    /// The schedule's time for something has come: its number.
    Timer: "timer",
    /// A node was killed: its life.
    Kill: "kill",
    /// A node lost power: its life.
    PowerCut: "power cut",
    /// A node was asked to stop: its life.
    Shutdown: "shutdown",
    /// A node stopped in good order: its life.
    Closed: "closed",
    /// A node was started: its life.
    Boot: "boot",
    /// A node stopped by itself.
    Stopped: "stopped",
    /// A node stands still until: time.
    Pause: "pause",
    /// A directed link was cut: to.
    Cut: "cut",
    /// A directed link was healed: to.
    Heal: "heal",
    /// A directed link changed its speed: to, by how much it is later.
    LinkSpeed: "link speed",
    /// A clock changed its speed: so many millionths faster, as a signed number.
    ClockDrift: "clock drift",
    /// Content at rest was damaged: where in its file, bytes.
    Rot: "rot",
    /// A node's disk changed its speed: factor.
    DiskSpeed: "disk speed",
    /// A node's wall clock jumped: by so many milliseconds, as a signed number.
    ClockJump: "clock jump",
    /// A client proposed: client, sequence.
    Propose: "propose",
    /// A client was answered: client, sequence.
    Answer: "answer",
    /// A client was refused or its outcome is unknown: client, sequence.
    Refused: "refused",
    /// A node's role changed: role, term.
    Role: "role",
    /// A node's commit index advanced: index, term.
    Commit: "commit",
    /// A node applied a command: index, hash of the command.
    Apply: "apply",
    /// A node was asked to hand leadership over: tag, to whom.
    Transfer: "transfer",
    /// What came of it: leader, term.
    Transferred: "transferred",
    /// A node was asked to change the members: tag.
    Change: "change",
    /// What came of it: tag, index or 0.
    Changed: "changed",
    /// The run's phase changed: phase.
    Phase: "phase",
    /// A bit was flipped on its way: connection, where in its part.
    Flip: "flip",
}

impl What {
    /// Whether it counts as an event of the run: a delivered chunk, an I/O completion, a timer or a client's call. The
    /// rest says what came of those. The receive that a delivered chunk completes is not counted a second time.
    fn counts(self, a: u64) -> bool {
        match self {
            Self::Arrive | Self::DiskDone | Self::Timer | Self::Propose => true,
            Self::LinkDone => !super::link::is_receive(a),
            Self::Turn => a & 2 != 0,
            _ => false,
        }
    }
}

/// One line of the trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceEvent {
    /// When, in nanoseconds of virtual time.
    pub time: u64,
    /// Where: the node's position, from 0.
    pub node: u16,
    /// What.
    pub what: What,
    /// Its first number.
    pub a: u64,
    /// Its second number.
    pub b: u64,
}

impl fmt::Display for TraceEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { time, node, what, a, b } = self;
        let (ms, ns) = (time / 1_000_000, time % 1_000_000);
        write!(f, "{ms:>8}.{ns:06} ms  node {node}  {:<12} {a} {b}", what.text())?;
        if let What::DiskSubmit | What::DiskDone = what {
            write!(f, "  ({})", super::disk::name_of_kind(*a))?;
        }
        if let What::LinkSubmit | What::LinkDone = what {
            write!(f, "  ({})", super::link::name_of_kind(*a))?;
        }
        Ok(())
    }
}

/// The hash over all lines, and the last of them.
pub struct Trace {
    hasher: Xxh3,
    /// Lines are hashed some hundred at a time.
    unhashed: Vec<u8>,
    /// A ring; the oldest is at `oldest` once it is full.
    tail: Vec<TraceEvent>,
    oldest: usize,
    lines: u64,
    events: u64,
    print: bool,
}

const LINE_BYTES: usize = 27;
const UNHASHED_BYTES: usize = 303 * LINE_BYTES;

impl Trace {
    /// An empty trace; with `print`, every event goes to standard output too.
    #[must_use]
    pub fn new(print: bool) -> Self {
        Self {
            hasher: Xxh3::new(),
            unhashed: Vec::with_capacity(UNHASHED_BYTES),
            tail: Vec::with_capacity(TAIL_EVENTS),
            oldest: 0,
            lines: 0,
            events: 0,
            print,
        }
    }

    /// Adds a line.
    pub fn record(&mut self, event: TraceEvent) {
        let mut bytes = [0; LINE_BYTES];
        bytes[..8].copy_from_slice(&event.time.to_le_bytes());
        bytes[8..10].copy_from_slice(&event.node.to_le_bytes());
        bytes[10] = event.what as u8;
        bytes[11..19].copy_from_slice(&event.a.to_le_bytes());
        bytes[19..].copy_from_slice(&event.b.to_le_bytes());
        self.unhashed.extend_from_slice(&bytes);
        if self.unhashed.len() == UNHASHED_BYTES {
            self.hasher.update(&self.unhashed);
            self.unhashed.clear();
        }
        if self.tail.len() < TAIL_EVENTS {
            self.tail.push(event);
        } else {
            self.tail[self.oldest] = event;
            self.oldest = if self.oldest + 1 == TAIL_EVENTS { 0 } else { self.oldest + 1 };
        }
        self.lines += 1;
        self.events += u64::from(event.what.counts(event.a));
        if self.print {
            println!("{event}");
        }
    }

    /// Prints what numbers do not say, where lines are printed. Not part of the trace.
    pub fn note(&self, text: impl FnOnce() -> String) {
        if self.print {
            println!("{:>24}{}", "", text());
        }
    }

    /// The hash of all lines so far.
    #[must_use]
    pub fn hash(&self) -> u64 {
        let mut hasher = self.hasher.clone();
        hasher.update(&self.unhashed);
        hasher.digest()
    }

    /// How many lines it has.
    #[must_use]
    pub fn lines(&self) -> u64 {
        self.lines
    }

    /// How many events there were: delivered chunks, I/O completions, timers and clients' calls.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.events
    }

    /// The last lines.
    #[must_use]
    pub fn tail(&self) -> String {
        let (new, old) = self.tail.split_at(self.oldest);
        old.iter().chain(new).map(|event| format!("{event}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_tells_traces_apart_and_does_not_depend_on_how_often_it_is_asked() {
        let event = |time| TraceEvent { time, node: 1, what: What::Timer, a: 2, b: 3 };
        let mut one = Trace::new(false);
        let mut two = Trace::new(false);
        for time in 0..1_000 {
            one.record(event(time));
            two.record(event(time));
            let _ = one.hash();
        }
        assert_eq!(one.hash(), two.hash());
        assert_eq!(one.events(), 1_000);
        one.record(event(1));
        two.record(event(2));
        assert_ne!(one.hash(), two.hash());
    }

    #[test]
    fn the_tail_holds_the_last_lines_in_order() {
        for lines in [1, TAIL_EVENTS - 1, TAIL_EVENTS, TAIL_EVENTS + 7] {
            let mut trace = Trace::new(false);
            for line in 0..lines {
                trace.record(TraceEvent { time: 0, node: 0, what: What::Commit, a: line as u64, b: 0 });
            }
            let first = lines.saturating_sub(TAIL_EVENTS);
            let expected: Vec<String> = (first..lines).map(|line| format!("commit       {line} 0")).collect();
            let tail = trace.tail();
            let found: Vec<&str> = tail.lines().map(|line| &line[line.find("commit").unwrap()..]).collect();
            assert_eq!(found, expected);
        }
        assert_eq!(Trace::new(false).events(), 0);
    }
}
