//! The load generator of a node: closed loop or open loop, from a thread through a [`Pipeline`] or on the core
//! through a [`LocalPipeline`].
//!
//! A generator has a number of streams. Each has one command outstanding at most, (stream, sequence), and goes on
//! to the next sequence when the outcome is known: so acknowledgements of a stream come in order, and a log that
//! holds a stream's sequences in rising order holds none of them twice. In the closed loop a stream sends at once;
//! in the open loop a command is due at a fixed time, takes a free stream, and its latency counts from when it was
//! due, however long it waited for one (no coordinated omission). The timetable goes on across a failover: what fell
//! due without a leader is sent late by the next one, as fast as its streams allow, and counts from when it was due.
//! What waits is not a queue but one time on the clock, so it takes no memory however long the gap.
//!
//! A refused command is definitely not in the log: it is sent again under the same sequence. One of unknown outcome
//! is noted as such and the stream goes on. When the node no longer leads, the generator ends and says so.
//!
//! [`Generator`] decides and keeps the ledger; it neither waits nor reads a clock unless told. The two `run`
//! functions below it wait.

mod alarm;

use self::alarm::Alarm;
use crate::bench::control::Plan;
use crate::bench::ledger::{Ending, Figure, Ledger, Phase};
use bytes::Bytes;
use ringraft::LocalHandle;
use ringraft::error::{ProposeError, Refusal, Refused, UnknownOutcome};
use ringraft::handle::{Completion, Handle, LocalPipeline, Pipeline};
use ringraft::state_machine::{CommittedBatch, Replies, Restore, SnapshotReader, StateMachine};
use rustix::time::{ClockId, clock_gettime};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

/// A command begins with its stream and its sequence, little-endian.
pub(crate) const COMMAND_BYTES_MIN: usize = 16;
/// After the end, or after the leadership, outcomes are awaited for so long.
const DRAIN_NS: u64 = 5_000_000_000;
/// A command refused as busy is tried again after so long, unless a completion comes first.
const BACKOFF_NS: u64 = 200_000;
/// What a killed process must not lose is brought to the ledger this often.
const CHECKPOINT_NS: u64 = 20_000_000;
/// The clock is read once for so many commands.
const COMMANDS_PER_CLOCK: usize = 32;

/// The monotonic clock in nanoseconds.
pub(crate) fn now_ns() -> u64 {
    clock_ns(ClockId::Monotonic)
}

fn clock_ns(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The command of (`stream`, `sequence`) begins with these bytes.
fn head(stream: u64, sequence: u64) -> [u8; COMMAND_BYTES_MIN] {
    let mut head = [0; COMMAND_BYTES_MIN];
    head[..8].copy_from_slice(&stream.to_le_bytes());
    head[8..].copy_from_slice(&sequence.to_le_bytes());
    head
}

/// A command of so many bytes whose head is to be written.
fn command_of(payload_bytes: usize) -> Vec<u8> {
    let mut command = vec![0; COMMAND_BYTES_MIN];
    command.extend(filler(payload_bytes));
    command
}

/// The stream and the sequence of a command, and what follows them.
pub(crate) fn parse(command: &[u8]) -> Option<(u64, u64, &[u8])> {
    let (stream, rest) = command.split_first_chunk()?;
    let (sequence, rest) = rest.split_first_chunk()?;
    Some((u64::from_le_bytes(*stream), u64::from_le_bytes(*sequence), rest))
}

/// What follows stream and sequence in every command: bytes that do not compress.
pub(crate) fn filler(payload_bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(payload_bytes.saturating_sub(COMMAND_BYTES_MIN)).collect()
}

/// What the node's state machine has applied.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    batches: AtomicU64,
    entries: AtomicU64,
    bytes: AtomicU64,
}

impl Applied {
    /// Commands.
    pub(crate) fn entries(&self) -> u64 {
        self.entries.load(Ordering::Relaxed)
    }
}

/// The state machine of `ringraft node`: counts what it applies and replies nothing.
pub(crate) struct Counter {
    applied: Arc<Applied>,
    /// Of a snapshot that is being restored, what has come.
    restored: Vec<u8>,
}

impl Counter {
    pub(crate) fn new(applied: Arc<Applied>) -> Self {
        Self { applied, restored: Vec::new() }
    }

    fn counts(&self) -> [&AtomicU64; 3] {
        [&self.applied.batches, &self.applied.entries, &self.applied.bytes]
    }
}

impl StateMachine for Counter {
    fn apply(&mut self, batch: &CommittedBatch<'_>, replies: &mut Replies) {
        let mut bytes = 0;
        for command in batch.commands() {
            bytes += command.bytes.len();
            replies.push_empty();
        }
        // One writer: no locked instruction is needed.
        let add = |word: &AtomicU64, more: usize| {
            word.store(word.load(Ordering::Relaxed) + more as u64, Ordering::Relaxed);
        };
        add(&self.applied.batches, 1);
        add(&self.applied.entries, batch.command_count());
        add(&self.applied.bytes, bytes);
    }

    fn snapshot(&mut self) -> Option<Box<dyn SnapshotReader>> {
        let counts = self.counts().map(|count| count.load(Ordering::Relaxed).to_le_bytes());
        Some(Box::new(Bytes::copy_from_slice(counts.as_flattened())))
    }

    fn restore(&mut self, step: Restore<'_>) -> Result<(), String> {
        match step {
            Restore::Begin { .. } => self.restored.clear(),
            Restore::Piece(bytes) => self.restored.extend_from_slice(bytes),
            Restore::End => {
                let (counts, rest) = self.restored.as_chunks::<8>();
                if counts.len() != self.counts().len() || !rest.is_empty() {
                    return Err(format!("{} bytes are not three counts", self.restored.len()));
                }
                for (into, count) in self.counts().into_iter().zip(counts) {
                    into.store(u64::from_le_bytes(*count), Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }
}

/// Where commands go.
trait Channel {
    fn submit(&mut self, tag: u64, head: [u8; COMMAND_BYTES_MIN]) -> Result<(), Refused>;
}

/// One stream.
#[derive(Clone, Copy)]
struct Stream {
    /// The sequence that is outstanding, or next.
    sequence: u64,
    /// When the command was first sent, or was due.
    started_ns: u64,
    /// It was refused and will be sent again.
    again: bool,
}

struct Generator {
    plan: Plan,
    ledger: Arc<Ledger>,
    applied: Arc<Applied>,
    stop: Arc<AtomicBool>,
    streams: Vec<Stream>,
    /// Streams with nothing outstanding; those that must send again come first.
    free: VecDeque<u32>,
    outstanding: usize,
    /// When the next command of the open loop is due.
    due: Option<Due>,
    /// The engine was busy: nothing is sent before that.
    backs_off_until_ns: u64,
    window: Window,
    checkpoint_ns: u64,
    /// No command is sent any more: why, and since when.
    closed: Option<(Ending, u64)>,
}

/// The open loop's timetable.
struct Due {
    start_ns: u64,
    interval_ns: f64,
    /// Commands that were due so far.
    count: u64,
}

impl Due {
    fn next_ns(&self) -> u64 {
        // Multiplied rather than added up, so that the rate does not drift.
        self.start_ns + (self.count as f64 * self.interval_ns) as u64
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Window {
    Before,
    Within,
    After,
}

impl Generator {
    fn new(job: Job) -> Self {
        let Job { plan, ledger, applied, stop } = job;
        let count = plan.streams.min(u32::try_from(ledger.streams()).unwrap_or(u32::MAX));
        let interval_ns = plan.rate.map(|rate| 1e9 / rate);
        let due = interval_ns.map(|interval_ns| Due { start_ns: plan.due_from_ns, interval_ns, count: 0 });
        let mut streams = vec![Stream { sequence: 1, started_ns: 0, again: false }; count as usize];
        let mut free = VecDeque::with_capacity(count as usize);
        if due.is_some() {
            for (number, stream) in (0..count).zip(&mut streams) {
                // What the generator before this one had taken from the timetable and was refused.
                let due_ns = ledger.owed_ns(number as usize);
                if due_ns > 0 {
                    *stream = Stream { started_ns: due_ns, again: true, ..*stream };
                    free.push_back(number);
                }
            }
        }
        free.extend((0..count).filter(|number| !streams[*number as usize].again));
        ledger.set_phase(Phase::Running);
        Self {
            streams,
            free,
            outstanding: 0,
            due,
            backs_off_until_ns: 0,
            window: Window::Before,
            checkpoint_ns: 0,
            closed: None,
            plan,
            ledger,
            applied,
            stop,
        }
    }

    /// Sends what is to be sent now.
    fn send(&mut self, mut now_ns: u64, channel: &mut impl Channel) {
        self.look_at_clock(now_ns);
        let mut sent = 0;
        while self.closed.is_none()
            && now_ns >= self.backs_off_until_ns
            && let Some(&number) = self.free.front()
        {
            let stream = &mut self.streams[number as usize];
            if !stream.again {
                stream.started_ns = match &mut self.due {
                    None => now_ns,
                    Some(due) => {
                        let due_ns = due.next_ns();
                        if due_ns > now_ns {
                            break;
                        }
                        due.count += 1;
                        // In this order: of a killed generator a command may come twice, but none is left out.
                        self.ledger.set_owed_ns(number as usize, due_ns);
                        self.ledger.set(Figure::ServedNs, due.next_ns());
                        due_ns
                    }
                };
            }
            let sequence = stream.sequence;
            stream.again = true;
            self.ledger.set_sent(number as usize, sequence);
            let id = u64::from(self.plan.run) << 32 | u64::from(number);
            match channel.submit(u64::from(number), head(id, sequence)) {
                Ok(()) => {
                    self.free.pop_front();
                    self.outstanding += 1;
                }
                Err(refused) => {
                    self.refused(number, &refused.reason, now_ns);
                    break;
                }
            }
            sent += 1;
            if sent % COMMANDS_PER_CLOCK == 0 {
                now_ns = self::now_ns();
            }
        }
    }

    /// Takes the outcomes that arrived by `now_ns`.
    fn settle(&mut self, now_ns: u64, completions: &mut Vec<Completion>) {
        if completions.is_empty() {
            return;
        }
        self.look_at_clock(now_ns);
        let (mut acked, mut measured) = (0, 0);
        let backs_off_until_ns = std::mem::take(&mut self.backs_off_until_ns);
        for Completion { tag, outcome } in completions.drain(..) {
            let number = tag as u32;
            let Some(stream) = self.streams.get_mut(number as usize) else { continue };
            self.outstanding -= 1;
            match outcome {
                Ok(_) => {
                    self.ledger.set_owed_ns(number as usize, 0);
                    self.ledger.set_settled(number as usize, stream.sequence);
                    acked += 1;
                    if self.window == Window::Within {
                        measured += 1;
                        self.ledger.record(now_ns.saturating_sub(stream.started_ns));
                    }
                    stream.sequence += 1;
                    stream.again = false;
                    self.free.push_back(number);
                }
                Err(ProposeError::Refused(refused)) => {
                    self.free.push_front(number);
                    self.refused(number, &refused.reason, now_ns);
                }
                Err(ProposeError::Unknown(unknown)) => {
                    let noted = self.ledger.note_unknown(number as usize, stream.sequence);
                    self.ledger.set_owed_ns(number as usize, 0);
                    self.ledger.set_settled(number as usize, stream.sequence);
                    stream.sequence += 1;
                    stream.again = false;
                    self.free.push_back(number);
                    match unknown {
                        UnknownOutcome::LeadershipLost { .. } => self.close(Ending::LeadershipLost, now_ns),
                        // The last two are of sessions, which the load has none of.
                        UnknownOutcome::Stopped(_)
                        | UnknownOutcome::EarlierAttempt { .. }
                        | UnknownOutcome::Deadline { .. } => self.close(Ending::Refused, now_ns),
                    }
                    if !noted {
                        self.close(Ending::TooManyUnknown, now_ns);
                    }
                }
                // Of sessions too.
                Err(ProposeError::ReplyGone { .. }) => self.close(Ending::Refused, now_ns),
            }
        }
        // A completion makes room, unless others were refused with it.
        if acked == 0 {
            self.backs_off_until_ns = self.backs_off_until_ns.max(backs_off_until_ns);
        }
        if acked > 0 {
            if self.ledger.get(Figure::FirstAckNs) == 0 {
                self.ledger.set(Figure::FirstAckNs, now_ns);
            }
            self.ledger.set(Figure::LastAckNs, now_ns);
            self.ledger.add(Figure::Acked, acked);
            self.ledger.add(Figure::Measured, measured);
        }
    }

    fn refused(&mut self, number: u32, reason: &Refusal, now_ns: u64) {
        self.ledger.add(Figure::Refused, 1);
        // A definite refusal: this sequence is not in the log until it is sent again.
        self.ledger.set_sent(number as usize, self.streams[number as usize].sequence - 1);
        match reason {
            Refusal::Busy => self.backs_off_until_ns = now_ns + BACKOFF_NS,
            Refusal::NotLeader { .. } => self.close(Ending::LeadershipLost, now_ns),
            reason => {
                tracing::error!(%reason, "the load ends");
                self.close(Ending::Refused, now_ns);
            }
        }
    }

    fn close(&mut self, ending: Ending, now_ns: u64) {
        self.closed.get_or_insert((ending, now_ns));
    }

    fn look_at_clock(&mut self, now_ns: u64) {
        if self.window == Window::Before && now_ns >= self.plan.begin_ns {
            self.window = Window::Within;
            self.checkpoint(true);
            self.checkpoint_ns = now_ns + CHECKPOINT_NS;
        }
        if self.window == Window::Within && now_ns >= self.checkpoint_ns.min(self.plan.end_ns) {
            self.checkpoint(false);
            self.checkpoint_ns = now_ns + CHECKPOINT_NS;
        }
        if self.window == Window::Within && now_ns >= self.plan.end_ns {
            self.window = Window::After;
        }
        if now_ns >= self.plan.end_ns || self.stop.load(Ordering::Relaxed) {
            self.close(Ending::Completed, now_ns);
        }
    }

    fn checkpoint(&self, begin: bool) {
        let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let figures = [
            (Figure::CpuNsAtBegin, Figure::CpuNs, clock_ns(ClockId::ThreadCPUTime)),
            (Figure::BatchesAtBegin, Figure::Batches, load(&self.applied.batches)),
            (Figure::EntriesAtBegin, Figure::Entries, load(&self.applied.entries)),
            (Figure::BytesAtBegin, Figure::Bytes, load(&self.applied.bytes)),
        ];
        for (at_begin, recent, value) in figures {
            if begin {
                self.ledger.set(at_begin, value);
            }
            self.ledger.set(recent, value);
        }
    }

    /// How it ended, when it has.
    fn ended(&self, now_ns: u64) -> Option<Ending> {
        match self.closed {
            Some((ending, _)) if self.outstanding == 0 => Some(ending),
            Some((Ending::Completed, since_ns)) if now_ns > since_ns + DRAIN_NS => Some(Ending::Unsettled),
            Some((ending, since_ns)) if now_ns > since_ns + DRAIN_NS => Some(ending),
            _ => None,
        }
    }

    /// When to look again although nothing has completed.
    fn wake_ns(&self, now_ns: u64) -> u64 {
        if let Some((_, since_ns)) = self.closed {
            return since_ns + DRAIN_NS + 1;
        }
        let end_ns = match self.window {
            Window::Before => self.plan.begin_ns,
            Window::Within | Window::After => self.plan.end_ns,
        };
        let next_ns = match &self.due {
            // Nothing is sent before that, whatever is due.
            _ if self.backs_off_until_ns > now_ns => self.backs_off_until_ns,
            Some(due) if !self.free.is_empty() => due.next_ns(),
            _ => u64::MAX,
        };
        end_ns.min(next_ns)
    }
}

/// What a generator is started with.
pub(crate) struct Job {
    pub(crate) plan: Plan,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) applied: Arc<Applied>,
    /// Ends the load early.
    pub(crate) stop: Arc<AtomicBool>,
}

/// A pipeline from a thread.
struct FromThread {
    pipeline: Pipeline,
    command: Vec<u8>,
}

impl Channel for FromThread {
    fn submit(&mut self, tag: u64, head: [u8; COMMAND_BYTES_MIN]) -> Result<(), Refused> {
        self.command[..COMMAND_BYTES_MIN].copy_from_slice(&head);
        // A refusal comes as a completion.
        self.pipeline.enqueue(tag, &self.command);
        Ok(())
    }
}

/// Lets the sleeps of the calling thread, as those of the open loop, end when they should: by default the kernel may add 50 µs
/// to each.
fn sleep_precisely() {
    // SAFETY: sets an attribute of the calling thread, no memory is passed.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_000_u64, 0_u64, 0_u64, 0_u64) };
}

/// Generates load from the calling thread until the plan is over; returns after the ledger says so.
pub(crate) fn run_on_thread(handle: &Handle, job: Job) {
    sleep_precisely();
    let mut channel = FromThread { pipeline: handle.pipeline(), command: command_of(job.plan.payload_bytes) };
    let mut generator = Generator::new(job);
    let mut completions = Vec::new();
    let mut now_ns = self::now_ns();
    let ending = loop {
        generator.send(now_ns, &mut channel);
        now_ns = self::now_ns();
        if let Some(ending) = generator.ended(now_ns) {
            break ending;
        }
        let wait_ns = generator.wake_ns(now_ns).saturating_sub(now_ns).min(100_000_000);
        channel.pipeline.wait(&mut completions, Duration::from_nanos(wait_ns));
        now_ns = self::now_ns();
        generator.settle(now_ns, &mut completions);
    };
    generator.ledger.end(ending);
}

/// A pipeline on the core. Commands are copied from one buffer.
struct OnCore {
    pipeline: LocalPipeline,
    command: Vec<u8>,
}

impl Channel for OnCore {
    fn submit(&mut self, tag: u64, head: [u8; COMMAND_BYTES_MIN]) -> Result<(), Refused> {
        self.command[..COMMAND_BYTES_MIN].copy_from_slice(&head);
        self.pipeline.submit(tag, &self.command)
    }
}

/// Generates load from a task on the core. For the open loop a thread wakes it when a command is due, unless a completion
/// does before.
async fn run_on_core(handle: &LocalHandle, job: Job) {
    let mut channel = OnCore { pipeline: handle.pipeline(), command: command_of(job.plan.payload_bytes) };
    let alarm = match job.plan.rate.map(|_| Alarm::new()).transpose() {
        Ok(alarm) => alarm,
        Err(error) => {
            tracing::error!(%error, "no thread for the open loop's clock");
            return job.ledger.end(Ending::Refused);
        }
    };
    let mut generator = Generator::new(job);
    let mut completions = Vec::new();
    let mut now_ns = self::now_ns();
    let ending = loop {
        generator.send(now_ns, &mut channel);
        now_ns = self::now_ns();
        if let Some(ending) = generator.ended(now_ns) {
            break ending;
        }
        match &alarm {
            None if generator.outstanding == 0 => {
                // Refused although nothing is in flight: let the core have its turn.
                yield_now().await;
            }
            None => poll_fn(|context| channel.pipeline.poll_completions(context, &mut completions)).await,
            Some(alarm) => {
                let wake_ns = generator.wake_ns(now_ns);
                poll_fn(|context| {
                    let done = channel.pipeline.poll_completions(context, &mut completions);
                    if done.is_ready() || self::now_ns() >= wake_ns {
                        return Poll::Ready(());
                    }
                    alarm.set(wake_ns, context.waker());
                    Poll::Pending
                })
                .await;
            }
        }
        now_ns = self::now_ns();
        generator.settle(now_ns, &mut completions);
    };
    generator.ledger.end(ending);
}

async fn yield_now() {
    let mut yielded = false;
    poll_fn(|context| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Takes jobs to a task on the core.
#[derive(Default)]
pub(crate) struct Mailbox(Mutex<(VecDeque<Job>, Option<Waker>)>);

impl Mailbox {
    pub(crate) fn put(&self, job: Job) {
        let waker = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            state.0.push_back(job);
            state.1.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    async fn take(&self) -> Job {
        poll_fn(|context| {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match state.0.pop_front() {
                Some(job) => Poll::Ready(job),
                None => {
                    state.1 = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

/// The task that carries out the jobs of `mailbox`, one after another, on the core.
pub(crate) async fn serve_on_core(handle: LocalHandle, mailbox: Arc<Mailbox>) {
    loop {
        let job = mailbox.take().await;
        run_on_core(&handle, job).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringraft::handle::Committed;
    use ringraft::raft::LogId;

    /// Takes up to `room` commands, then is busy.
    struct Fake {
        room: usize,
        taken: Vec<(u64, u64, u64)>,
        refusal: Refusal,
    }

    impl Channel for Fake {
        fn submit(&mut self, tag: u64, head: [u8; COMMAND_BYTES_MIN]) -> Result<(), Refused> {
            if self.room == 0 {
                return Err(Refused { reason: self.refusal.clone(), command: Bytes::new() });
            }
            self.room -= 1;
            let (stream, sequence, _) = parse(&head).unwrap();
            self.taken.push((tag, stream, sequence));
            Ok(())
        }
    }

    fn fake(room: usize) -> Fake {
        Fake { room, taken: Vec::new(), refusal: Refusal::Busy }
    }

    fn generator(streams: u32, rate: Option<f64>) -> Generator {
        let plan = Plan {
            run: 3,
            streams,
            payload_bytes: 32,
            rate,
            due_from_ns: 0,
            begin_ns: 1_000,
            end_ns: 1_000_000,
        };
        let ledger = Arc::new(Ledger::private(streams as usize).unwrap());
        let job = Job { plan, ledger, applied: Arc::default(), stop: Arc::default() };
        Generator::new(job)
    }

    fn done(tag: u64) -> Completion {
        let LogId { term, index } = LogId::default();
        Completion { tag, outcome: Ok(Committed { index, term, reply: Bytes::new() }) }
    }

    #[test]
    fn a_closed_loop_keeps_every_stream_busy_and_counts_only_within_the_window() {
        let mut generator = generator(3, None);
        let mut channel = fake(100);
        generator.send(10, &mut channel);
        let base = 3 << 32;
        assert_eq!(channel.taken, [(0, base, 1), (1, base + 1, 1), (2, base + 2, 1)]);
        generator.settle(500, &mut vec![done(1)]);
        generator.send(500, &mut channel);
        assert_eq!(channel.taken[3], (1, base + 1, 2));
        generator.settle(2_000, &mut vec![done(1), done(0)]);
        let ledger = Arc::clone(&generator.ledger);
        assert_eq!((ledger.get(Figure::Acked), ledger.get(Figure::Measured)), (3, 2));
        assert_eq!(ledger.get(Figure::LatencyNsMax), 1_990);
        assert_eq!((ledger.settled(1), ledger.sent(1), ledger.settled(2), ledger.sent(2)), (2, 2, 0, 1));
        generator.send(1_000_000, &mut channel);
        assert_eq!(channel.taken.len(), 4, "nothing is sent after the end");
        assert_eq!(generator.ended(1_000_000), None, "one is outstanding");
        generator.settle(1_000_001, &mut vec![done(2)]);
        assert_eq!(generator.ended(1_000_002), Some(Ending::Completed));
        assert_eq!((ledger.get(Figure::Acked), ledger.get(Figure::Measured)), (4, 2));
    }

    #[test]
    fn an_open_loop_counts_latency_from_when_a_command_was_due_though_it_waited_for_a_stream() {
        // One command each 100 ns, one stream.
        let mut generator = generator(1, Some(1e7));
        let mut channel = fake(100);
        generator.send(0, &mut channel);
        assert_eq!(channel.taken.len(), 1);
        generator.settle(5_000, &mut vec![done(0)]);
        generator.send(5_000, &mut channel);
        assert_eq!(channel.taken.len(), 2, "the second was due at 100");
        generator.settle(5_100, &mut vec![done(0)]);
        assert_eq!(generator.ledger.get(Figure::LatencyNsMax), 5_000);
        let mut histogram = crate::bench::ledger::latency_histogram();
        generator.ledger.add_latencies_to(&mut histogram);
        assert_eq!(histogram.len(), 2);
        assert_eq!(generator.wake_ns(5_100), 200, "the third was due long ago");
    }

    #[test]
    fn what_fell_due_without_a_leader_is_sent_by_the_next_and_counts_from_when_it_was_due() {
        // One command each 1000 ns from 0 on; the first leader dies at 10 000, the next is ordered at 500 000.
        let (streams, rate) = (4, Some(1e6));
        let mut first = generator(streams, rate);
        let mut channel = fake(100);
        first.send(1_500, &mut channel);
        assert_eq!(channel.taken.len(), 2, "due at 0 and at 1000");
        first.settle(1_600, &mut vec![done(0)]);
        first.send(3_000, &mut channel);
        // Due at 1000, 2000 and 3000 are in flight. That of 2000 is refused, and nothing is taken any more.
        let refused = Refused { reason: Refusal::Busy, command: Bytes::new() };
        first.settle(3_100, &mut vec![Completion { tag: 2, outcome: Err(refused.into()) }]);
        first.send(10_000, &mut fake(0));
        assert_eq!(first.ledger.get(Figure::ServedNs), 4_000);
        assert_eq!(first.ledger.unknown_count(), 2);

        let ledger = Ledger::private(streams as usize).unwrap();
        ledger.succeed(&first.ledger);
        let plan = Plan { run: 4, due_from_ns: ledger.get(Figure::ServedNs), ..first.plan.clone() };
        let job = Job { plan, ledger: Arc::new(ledger), applied: Arc::default(), stop: Arc::default() };
        let mut next = Generator::new(job);
        let mut channel = fake(1_000);
        let mut tags = 0;
        let mut now_ns = 500_000;
        // As many in flight as there are streams, however much is due.
        loop {
            next.send(now_ns, &mut channel);
            let sent = &channel.taken[tags..];
            assert!(sent.len() <= streams as usize);
            let mut completions: Vec<_> = sent.iter().map(|(tag, ..)| done(*tag)).collect();
            tags = channel.taken.len();
            now_ns += 1;
            if completions.is_empty() {
                break;
            }
            next.settle(now_ns, &mut completions);
        }
        // 2000, and 4000 to 500 000: each once.
        assert_eq!(channel.taken.len(), 1 + 497);
        let ledger = &next.ledger;
        assert_eq!(ledger.get(Figure::LatencyNsMax), 500_001 - 2_000);
        assert_eq!(ledger.get(Figure::ServedNs), 501_000);
        let mut histogram = crate::bench::ledger::latency_histogram();
        ledger.add_latencies_to(&mut histogram);
        assert_eq!(histogram.len(), 498);
        let median = histogram.value_at_quantile(0.5);
        assert!(
            median.abs_diff(250_000) < 5_000,
            "those due in the middle of the gap waited half of it: {median}"
        );
    }

    #[test]
    fn a_busy_engine_is_asked_again_with_the_same_sequence_and_the_first_time() {
        let mut generator = generator(2, None);
        let mut channel = fake(1);
        generator.send(10, &mut channel);
        assert_eq!(generator.outstanding, 1);
        assert_eq!(generator.ledger.sent(1), 0, "a refusal is definite");
        assert_eq!(generator.wake_ns(10), 1_000, "the window begins before the pause is over");
        channel.room = 1;
        generator.send(2_000, &mut channel);
        assert_eq!((channel.taken.len(), generator.wake_ns(2_000)), (1, 10 + BACKOFF_NS));
        generator.send(10 + BACKOFF_NS, &mut channel);
        assert_eq!(channel.taken[1], (1, (3 << 32) + 1, 1));
        generator.settle(202_000, &mut vec![done(1)]);
        assert_eq!(generator.ledger.get(Figure::LatencyNsMax), 201_990);
        // The same when the refusal comes later, as a completion.
        let refused = Refused { reason: Refusal::Busy, command: Bytes::new() };
        let busy = || vec![Completion { tag: 0, outcome: Err(refused.clone().into()) }];
        generator.settle(203_000, &mut busy());
        assert_eq!(generator.ledger.sent(0), 0);
        channel.room = 10;
        generator.send(203_000 + BACKOFF_NS - 1, &mut channel);
        assert_eq!(channel.taken.len(), 2);
        generator.send(203_000 + BACKOFF_NS, &mut channel);
        assert_eq!(channel.taken[2..], [(0, 3 << 32, 1), (1, (3 << 32) + 1, 2)]);
    }

    #[test]
    fn a_lost_leadership_ends_the_load_and_lists_what_may_or_may_not_be_there() {
        let mut generator = generator(2, None);
        let mut channel = fake(100);
        generator.send(10, &mut channel);
        let index = LogId::default().index;
        let unknown = ProposeError::Unknown(UnknownOutcome::LeadershipLost { index });
        let refused = Refused { reason: Refusal::NotLeader { leader: None }, command: Bytes::new() };
        let completions = [(0, unknown), (1, refused.into())];
        let mut completions =
            completions.map(|(tag, error)| Completion { tag, outcome: Err(error) }).to_vec();
        generator.settle(20, &mut completions);
        generator.send(30, &mut channel);
        assert_eq!(channel.taken.len(), 2);
        assert_eq!(generator.ended(30), Some(Ending::LeadershipLost));
        let ledger = &generator.ledger;
        assert_eq!(ledger.unknown(), [(0, 1)]);
        assert_eq!((ledger.sent(0), ledger.settled(0), ledger.sent(1), ledger.settled(1)), (1, 1, 0, 0));
    }

    #[test]
    fn outcomes_that_never_come_are_given_up() {
        let mut generator = generator(1, None);
        generator.send(10, &mut fake(1));
        generator.stop.store(true, Ordering::Relaxed);
        generator.send(20, &mut fake(1));
        assert_eq!(generator.ended(30), None);
        assert_eq!(generator.ended(30 + DRAIN_NS), Some(Ending::Unsettled));
    }

    #[test]
    fn a_command_carries_its_stream_and_sequence() {
        let mut command = head(7, 9).to_vec();
        command.extend(filler(20));
        assert_eq!(command.len(), 20);
        assert_eq!(parse(&command), Some((7, 9, &filler(20)[..])));
        assert_eq!(parse(&command[..15]), None);
    }
}
