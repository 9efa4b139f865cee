//! Reads: what a program may ask for without writing, and what it is told.
//!
//! [`Handle::query`](crate::Handle::query) has the state machine answer on the node's own core,
//! [`Handle::read`](crate::Handle::read) says from which index on a state of the program's own may be read. How current
//! that is, is chosen per read ([`Consistency`]); whatever goes wrong is a [`ReadError`], and a read can always be
//! repeated.

use crate::answer::{Answer, AnswerSlot};
use crate::error::{ReadError, StopCause};
use crate::handle::{Handle, LocalHandle, Shared};
use bytes::Bytes;
use crossbeam_queue::SegQueue;
use ringraft_block::LogIndex;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// How current a read is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Consistency {
    /// Linearizable: it sees every command whose outcome anybody knew before the read was asked for, on the leader or on a
    /// follower, which asks the leader. Costs a round trip of the leader to a majority, shared by all reads that wait,
    /// and no write; nothing at all on a leader whose lease is in force (`Config::lease_drift_ppm`).
    #[default]
    Linearizable,
    /// Linearizable, and always confirmed by a majority: whatever clocks do, as on virtual machines that are paused or
    /// moved with their clocks stopped.
    Quorum,
    /// Linearizable through the log: an entry without a command is committed and applied. The dearest, and the
    /// only one that also proves that the cluster can still write. Only on the leader.
    Log,
    /// Whatever is applied here, if this node heard of a leader at most `age_max` ago, and knows of at most `lag_max` entries
    /// that are committed and not applied here. It asks nobody. What the leader did while its last message
    /// was on its way is not seen. Refused with [`ReadError::Restoring`] while a snapshot replaces the state.
    Stale {
        /// The longest time since the leader was heard; on the leader, since a majority certainly followed it.
        age_max: Duration,
        /// The most entries committed, as far as this node knows, and not applied.
        lag_max: u64,
    },
}

/// How a read is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// How current it is.
    pub consistency: Consistency,
    /// After this long it is given up with [`ReadError::TimedOut`]. Default: none, `Config::read_timeout`.
    pub timeout: Option<Duration>,
}

impl ReadOptions {
    /// With the default time-out.
    #[must_use]
    pub const fn new(consistency: Consistency) -> Self {
        Self { consistency, timeout: None }
    }
}

impl From<Consistency> for ReadOptions {
    fn from(consistency: Consistency) -> Self {
        Self::new(consistency)
    }
}

/// From where on a state may be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadPoint {
    /// Everything up to here is applied on this node: a state that has applied this much, or more, is current enough.
    pub index: LogIndex,
}

/// What the state machine answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueryReply {
    /// Exactly everything up to here was applied when it answered.
    pub applied: LogIndex,
    /// The answer.
    pub reply: Bytes,
}

/// The answer to a read. Cancel safe: dropping it abandons the read.
pub type Read<T> = Answer<Result<T, ReadError>>;

/// A read on its way into the core.
pub(crate) struct ReadRequest {
    pub(crate) wanted: Wanted,
    pub(crate) timeout: Option<Duration>,
    pub(crate) ticket: ReadTicket,
}

/// What a read waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    Read(Consistency),
    Round,
    Committed(LogIndex),
    Applied(LogIndex),
}

type Slot<T> = Arc<AnswerSlot<Result<T, ReadError>>>;

/// Where the answer to a read goes.
pub(crate) enum ReadTicket {
    Point(Slot<ReadPoint>),
    Index(Slot<LogIndex>),
    Query { query: Bytes, slot: Slot<QueryReply> },
}

impl ReadTicket {
    pub(crate) fn refuse(self, error: ReadError) {
        match self {
            Self::Point(slot) => slot.complete(Err(error)),
            Self::Index(slot) => slot.complete(Err(error)),
            Self::Query { slot, .. } => slot.complete(Err(error)),
        }
    }

    /// What was waited for has come: `index` is reached, and `applied` is. A query is put to the machine.
    pub(crate) fn complete(self, index: LogIndex, applied: LogIndex, ask: impl FnOnce(&[u8]) -> Bytes) {
        match self {
            Self::Point(slot) => slot.complete(Ok(ReadPoint { index })),
            Self::Index(slot) => slot.complete(Ok(index)),
            Self::Query { query, slot } => slot.complete(Ok(QueryReply { applied, reply: ask(&query) })),
        }
    }

    /// Whether nobody waits any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        match self {
            Self::Point(slot) => Arc::strong_count(slot) == 1,
            Self::Index(slot) => Arc::strong_count(slot) == 1,
            Self::Query { slot, .. } => Arc::strong_count(slot) == 1,
        }
    }
}

/// Reads between any thread and the core: so many at the most, and memory for those that are there. (All places at once would
/// be megabytes, whose pages the first reads would have to wait for.)
pub(crate) struct ReadQueue {
    capacity: usize,
    /// Those in the queue, or about to be.
    count: AtomicUsize,
    queue: SegQueue<ReadRequest>,
}

impl ReadQueue {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, count: AtomicUsize::new(0), queue: SegQueue::new() }
    }

    /// Queues a read, or refuses it. `stopped` is looked at after it is in the queue: see [`Ingress`](crate::ingress::Ingress).
    pub(crate) fn push(&self, request: ReadRequest) {
        // Counted before it is there, so that it is never taken before it is counted.
        if self.count.fetch_add(1, Ordering::Relaxed) < self.capacity {
            return self.queue.push(request);
        }
        self.count.fetch_sub(1, Ordering::Relaxed);
        request.ticket.refuse(ReadError::Busy);
    }

    /// The next read. As with commands, nothing is fenced when there is none.
    pub(crate) fn pop(&self) -> Option<ReadRequest> {
        if self.queue.is_empty() {
            return None;
        }
        let request = self.queue.pop()?;
        self.count.fetch_sub(1, Ordering::Relaxed);
        Some(request)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(crate) fn refuse_all(&self, cause: &StopCause) {
        while let Some(request) = self.pop() {
            request.ticket.refuse(ReadError::Stopped(cause.clone()));
        }
    }
}

fn submit(shared: &Shared, wanted: Wanted, timeout: Option<Duration>, ticket: ReadTicket) {
    shared.ingress.push_read(ReadRequest { wanted, timeout, ticket });
}

/// For how long a thread looks for the answer before it sleeps: for what waits for the log, as for commands.
fn patience(shared: &Shared, wanted: Wanted) -> Duration {
    match wanted {
        Wanted::Read(Consistency::Log) | Wanted::Committed(_) | Wanted::Applied(_) => shared.patience.span(),
        Wanted::Read(_) | Wanted::Round => shared.patience.span_of_reads(),
    }
}

fn read(shared: &Shared, options: ReadOptions) -> Read<ReadPoint> {
    let (answer, slot) = Answer::looked_for(patience(shared, Wanted::Read(options.consistency)));
    submit(shared, Wanted::Read(options.consistency), options.timeout, ReadTicket::Point(slot));
    answer
}

fn query(shared: &Shared, query: Bytes, options: ReadOptions) -> Read<QueryReply> {
    let (answer, slot) = Answer::looked_for(patience(shared, Wanted::Read(options.consistency)));
    let ticket = ReadTicket::Query { query, slot };
    submit(shared, Wanted::Read(options.consistency), options.timeout, ticket);
    answer
}

fn index(shared: &Shared, wanted: Wanted, timeout: Option<Duration>) -> Read<LogIndex> {
    let (answer, slot) = Answer::looked_for(patience(shared, wanted));
    submit(shared, wanted, timeout, ReadTicket::Index(slot));
    answer
}

/// Reads.
impl Handle {
    /// Waits until what is applied on this node is as current as `options` ask for. The program may then read what its state
    /// machine has made of the log up to the [`ReadPoint`], or further.
    ///
    /// # Errors
    /// The answer is an error when that cannot be had now: see [`ReadError`].
    pub fn read(&self, options: impl Into<ReadOptions>) -> Read<ReadPoint> {
        let answer = read(&self.shared, options.into());
        self.shared.wakeup.signal();
        answer
    }

    /// Puts `query` to the state machine ([`StateMachine::query`](crate::StateMachine::query)), on the node's own core,
    /// once what is applied is as current as `options` ask for.
    ///
    /// # Errors
    /// As [`Handle::read`].
    pub fn query(&self, bytes: impl Into<Bytes>, options: impl Into<ReadOptions>) -> Read<QueryReply> {
        let answer = query(&self.shared, bytes.into(), options.into());
        self.shared.wakeup.signal();
        answer
    }

    /// A barrier in the log: an entry without a command. When it answers, every entry before it is committed and applied
    /// here, and the last committed entry is of this leader's term. It is [`Handle::read`] with [`Consistency::Log`].
    ///
    /// # Errors
    /// As there; [`ReadError::NotLeader`] on any node but the leader.
    pub fn barrier(&self) -> Read<ReadPoint> {
        self.read(Consistency::Log)
    }

    /// Has the leader hear a majority anew, now, and answers with its commit index: proof that it still led after
    /// this call. Nothing is written, and nothing need be applied.
    ///
    /// # Errors
    /// As [`Handle::read`]; [`ReadError::NotLeader`] on any node but the leader.
    pub fn force_round(&self) -> Read<LogIndex> {
        let answer = index(&self.shared, Wanted::Round, None);
        self.shared.wakeup.signal();
        answer
    }

    /// Waits until this node knows everything up to `at` to be committed; answers with its commit index then. Without a
    /// `timeout`, `Config::read_timeout`.
    ///
    /// # Errors
    /// [`ReadError::TimedOut`], [`ReadError::Busy`] and [`ReadError::Stopped`].
    pub fn wait_committed(&self, at: LogIndex, timeout: Option<Duration>) -> Read<LogIndex> {
        let answer = index(&self.shared, Wanted::Committed(at), timeout);
        self.shared.wakeup.signal();
        answer
    }

    /// Waits until everything up to `at` is applied on this node; answers with what is applied then.
    ///
    /// # Errors
    /// As [`Handle::wait_committed`].
    pub fn wait_applied(&self, at: LogIndex, timeout: Option<Duration>) -> Read<LogIndex> {
        let answer = index(&self.shared, Wanted::Applied(at), timeout);
        self.shared.wakeup.signal();
        answer
    }
}

/// Reads, from tasks on the core.
impl LocalHandle {
    /// As [`Handle::read`].
    pub fn read(&self, options: impl Into<ReadOptions>) -> Read<ReadPoint> {
        let answer = read(&self.shared, options.into());
        self.wakeup.wake();
        answer
    }

    /// As [`Handle::query`].
    pub fn query(&self, bytes: impl Into<Bytes>, options: impl Into<ReadOptions>) -> Read<QueryReply> {
        let answer = query(&self.shared, bytes.into(), options.into());
        self.wakeup.wake();
        answer
    }

    /// As [`Handle::barrier`].
    pub fn barrier(&self) -> Read<ReadPoint> {
        self.read(Consistency::Log)
    }

    /// As [`Handle::force_round`].
    pub fn force_round(&self) -> Read<LogIndex> {
        let answer = index(&self.shared, Wanted::Round, None);
        self.wakeup.wake();
        answer
    }

    /// As [`Handle::wait_committed`].
    pub fn wait_committed(&self, at: LogIndex, timeout: Option<Duration>) -> Read<LogIndex> {
        let answer = index(&self.shared, Wanted::Committed(at), timeout);
        self.wakeup.wake();
        answer
    }

    /// As [`Handle::wait_applied`].
    pub fn wait_applied(&self, at: LogIndex, timeout: Option<Duration>) -> Read<LogIndex> {
        let answer = index(&self.shared, Wanted::Applied(at), timeout);
        self.wakeup.wake();
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocations::bytes_allocated_by;
    use crate::config::Config;
    use crate::error::StopError;
    use crate::waiting::asked;
    use ringraft_block::NodeId;

    fn request() -> (Read<LogIndex>, ReadRequest) {
        let (answer, slot) = Answer::new();
        (answer, ReadRequest { wanted: Wanted::Round, timeout: None, ticket: ReadTicket::Index(slot) })
    }

    #[test]
    fn a_full_queue_refuses_and_takes_again_once_one_has_left() {
        let queue = ReadQueue::new(3);
        let push = || {
            let (answer, request) = request();
            queue.push(request);
            answer
        };
        let mut answers: Vec<_> = (0..5).map(|_| push()).collect();
        let told: Vec<_> = answers.iter_mut().map(Answer::try_take).collect();
        assert_eq!(told, [None, None, None, Some(Err(ReadError::Busy)), Some(Err(ReadError::Busy))]);
        assert!(queue.pop().is_some());
        answers.push(push());
        assert_eq!(push().wait(), Err(ReadError::Busy));
        let cause = StopCause::from(StopError::Requested);
        queue.refuse_all(&cause);
        assert!(queue.pop().is_none());
        assert_eq!(answers.pop().map(Answer::wait), Some(Err(ReadError::Stopped(cause))));
        (0..3).for_each(|_| drop(push()));
        assert_eq!(push().wait(), Err(ReadError::Busy), "as many places as before");
    }

    #[test]
    fn a_thread_looks_for_what_waits_for_the_log_as_for_commands_and_always_for_other_reads() {
        let member = crate::config::MemberConfig { id: NodeId(1), address: ([127, 0, 0, 1], 1).into() };
        let config = Config::new(ringraft_block::ClusterId(1), NodeId(1), vec![member], "");
        let handle = Handle { shared: Arc::new(Shared::new(&config, Arc::default())) };
        let told = || handle.shared.ingress.pop_read().expect("a read").ticket.refuse(ReadError::Busy);
        for is_over in [false, true] {
            handle.shared.patience.set_over(is_over);
            let looks = |ask: &dyn Fn()| {
                let before = asked();
                ask();
                asked() - before
            };
            for (consistency, of_the_log) in
                [(Consistency::Linearizable, false), (Consistency::Quorum, false), (Consistency::Log, true)]
            {
                let expected = usize::from(!is_over || !of_the_log);
                let read = looks(&|| {
                    let answer = handle.read(consistency);
                    told();
                    assert_eq!(answer.wait(), Err(ReadError::Busy));
                });
                let query = looks(&|| {
                    let answer = handle.query(Bytes::new(), consistency);
                    told();
                    assert_eq!(answer.wait(), Err(ReadError::Busy));
                });
                assert_eq!((read, query), (expected, expected), "{consistency:?}, over: {is_over}");
            }
            let asks: [(&dyn Fn() -> Read<LogIndex>, bool); 3] = [
                (&|| handle.force_round(), false),
                (&|| handle.wait_committed(LogIndex(1), None), true),
                (&|| handle.wait_applied(LogIndex(1), None), true),
            ];
            for (number, (ask, of_the_log)) in asks.into_iter().enumerate() {
                let count = looks(&|| {
                    let answer = ask();
                    told();
                    assert_eq!(answer.wait(), Err(ReadError::Busy));
                });
                assert_eq!(count, usize::from(!is_over || !of_the_log), "{number}, over: {is_over}");
            }
        }
    }

    /// All its places were made by the first read: 6 MB with the default bound, on the core if the read came from there.
    #[test]
    fn reads_take_memory_for_themselves_and_not_for_those_that_might_come() {
        let queue = ReadQueue::new(65_536);
        let requests: Vec<_> = (0..100).map(|_| request()).collect();
        let bytes = bytes_allocated_by(|| {
            for (_, request) in requests {
                queue.push(request);
            }
        });
        let own = 100 * size_of::<ReadRequest>();
        assert!((own..3 * own).contains(&bytes), "{bytes} bytes for {own}");
    }
}
