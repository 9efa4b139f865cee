//! What the user brings: a state machine that applies committed commands.
//!
//! Happy path: the engine calls [`StateMachine::apply`] with each committed batch, in log order, once per life of
//! the process, on every member. After a restart the engine applies the log again from its start or, if the machine makes
//! snapshots, from the latest one on, so a state machine in memory needs no durability of its own.
//!
//! From time to time the engine asks for a picture of the state ([`StateMachine::snapshot`]), which it reads piece by piece
//! while commits go on, and behind which it lets go of the log. A machine that is started, or that has fallen far behind the
//! others, is given such a picture back ([`StateMachine::restore`]).
//!
//! A panic in any of its methods, or of its [`SnapshotReader`]'s, aborts the process: they run on the consensus core, and to
//! go on after half an apply would be to serve a state that no other member has.

use bytes::Bytes;
use ringraft_block::{LogIndex, Term};
use ringraft_wal::format::{BatchKind, BatchView};

/// A replicated state machine. Its state must depend on the commands and what accompanies them
/// ([`Command`]) alone: no clock, no random source, no iteration order that differs between processes.
pub trait StateMachine: 'static {
    /// Applies the commands of `batch`, in order, and pushes one reply for each of them. Missing replies count as
    /// empty. Runs on the consensus core: what it spends, every commit waits for.
    ///
    /// Called on every member; `replies` is only sent anywhere on the member where the command was proposed, and
    /// [`Replies::wanted`] says if anybody waits. Replies to commands of a [session](crate::sessions) are kept on every
    /// member for commands that are proposed again, and so they are part of the replicated state: they must depend on
    /// nothing else.
    fn apply(&mut self, batch: &CommittedBatch<'_>, replies: &mut Replies);

    /// Answers `query` from what has been applied, and changes nothing. Called for
    /// [`Handle::query`](crate::Handle::query) once the state is as current as was asked for. Runs on the consensus
    /// core, like [`StateMachine::apply`]. A machine that leaves this out answers everything with nothing: programs that
    /// read a state of their own use [`Handle::read`](crate::Handle::read).
    fn query(&self, query: &[u8]) -> Bytes {
        let _ = query;
        Bytes::new()
    }

    /// A picture of the state as it is now, after the last batch that was applied. It is read later, in pieces, while
    /// [`apply`](Self::apply) goes on, and must not change by that: clone, or share and copy on write. This call itself runs on
    /// the consensus core and holds up commits, so it should only take the picture and write nothing.
    ///
    /// Default: `None`, this machine makes no snapshots. Then the log is kept for ever, and a member whose log is lost
    /// can only come back if the others hold all of theirs.
    fn snapshot(&mut self) -> Option<Box<dyn SnapshotReader>> {
        None
    }

    /// Replaces the whole state by what a snapshot holds, which comes in pieces, in order. After a [`Restore::Begin`] another one
    /// may follow when what came so far turned out to be damaged. Between `Begin` and `End` nothing else is called.
    ///
    /// # Errors
    /// When the bytes are not those of a snapshot of this machine, in its own words; the node stops. Default: always, since
    /// a machine that makes none can read none.
    fn restore(&mut self, step: Restore<'_>) -> Result<(), String> {
        let _ = step;
        Err("this state machine does not restore snapshots".to_owned())
    }
}

/// A picture of a state machine's state, to be written out. Two members with the same state need not write the same bytes;
/// when they do, a transfer that one of them began can be finished by the other.
pub trait SnapshotReader: 'static {
    /// At most so many bytes come from here on. Asked once, before the first is read: so much space is reserved on the disk.
    fn bytes_max(&self) -> u64;

    /// Writes the next bytes into `into`, at least one unless there are no more, and returns how many. Called on the consensus
    /// core with 64 KiB at a time: commits wait meanwhile.
    ///
    /// # Errors
    /// In the machine's own words; this snapshot is given up, and another one tried later.
    fn read(&mut self, into: &mut [u8]) -> Result<usize, String>;
}

/// A picture that was written out at once.
impl SnapshotReader for Bytes {
    fn bytes_max(&self) -> u64 {
        self.len() as u64
    }

    fn read(&mut self, into: &mut [u8]) -> Result<usize, String> {
        let taken = self.split_to(self.len().min(into.len()));
        into[..taken.len()].copy_from_slice(&taken);
        Ok(taken.len())
    }
}

/// A step of [`StateMachine::restore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restore<'a> {
    /// Forget the state: another one follows.
    Begin {
        /// The last index that it covers.
        last: LogIndex,
        /// The term of that entry.
        term: Term,
        /// The log's time there, in milliseconds since 1970.
        time_ms: u64,
    },
    /// The next bytes of it, in pieces of any length.
    Piece(&'a [u8]),
    /// That was all.
    End,
}

/// A command as it reaches the state machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command<'a> {
    /// Its position in the log, without gaps over all batches except for the engine's own entries.
    pub index: LogIndex,
    /// The term of the leader that sealed it.
    pub term: Term,
    /// That leader's clock when it sealed the batch, in milliseconds since 1970, never decreasing along the log: behind a
    /// batch of a later time it goes on from there, more slowly, until that clock has caught up. The only clock that a
    /// state machine may use.
    pub time_ms: u64,
    /// The client session and the sequence in it, where the command was proposed with them.
    pub session: Option<(u64, u64)>,
    /// The command as it was proposed. It borrows the log's buffer.
    pub bytes: &'a [u8],
}

/// Consecutive committed commands that were sealed into one batch.
pub struct CommittedBatch<'a> {
    view: BatchView<'a>,
    /// By position in the batch, what is not to be applied: duplicates, and what sessions refuse. Empty when there is
    /// nothing of that kind.
    skipped: &'a [bool],
    count: usize,
}

impl<'a> CommittedBatch<'a> {
    pub(crate) fn new(view: BatchView<'a>) -> Self {
        debug_assert_eq!(
            view.info().kind,
            BatchKind::Commands,
            "the engine's own batches stay in the engine"
        );
        Self { view, skipped: &[], count: view.len() }
    }

    /// Without those of the commands that are `skipped`, by position; `count` others.
    pub(crate) fn without(view: BatchView<'a>, skipped: &'a [bool], count: usize) -> Self {
        Self { skipped, count, ..Self::new(view) }
    }

    /// The commands in order.
    pub fn commands(&self) -> impl Iterator<Item = Command<'a>> + '_ {
        let info = self.view.info();
        let skipped = self.skipped;
        let seen = move |index: LogIndex| {
            skipped.is_empty() || skipped.get((index.get() - info.first.get()) as usize) == Some(&false)
        };
        self.view.commands().filter(move |command| seen(command.index)).map(move |command| Command {
            index: command.index,
            term: info.term,
            time_ms: info.time_ms,
            session: command.session.map(|session| (session.session, session.sequence)),
            bytes: command.bytes,
        })
    }

    /// How many commands there are; at least one.
    #[must_use]
    pub fn command_count(&self) -> usize {
        self.count
    }

    /// Index of the first command, also when that is one that was applied before and is not seen again.
    #[must_use]
    pub fn first(&self) -> LogIndex {
        self.view.info().first
    }

    /// Index of the last command, in the same way.
    #[must_use]
    pub fn last(&self) -> LogIndex {
        self.view.info().last
    }

    /// The chain of the log at the end of this batch: two members with the same chain here have the same log up
    /// to here.
    #[must_use]
    pub fn chain(&self) -> [u8; 16] {
        self.view.info().chain.0
    }
}

/// Collects the replies of one batch.
#[derive(Default)]
pub struct Replies {
    replies: Vec<Bytes>,
    wanted: bool,
}

impl Replies {
    /// The reply to the next command of the batch.
    pub fn push(&mut self, reply: impl Into<Bytes>) {
        if self.wanted {
            self.replies.push(reply.into());
        }
    }

    /// An empty reply to the next command.
    pub fn push_empty(&mut self) {
        if self.wanted {
            self.replies.push(Bytes::new());
        }
    }

    /// Whether anybody waits for the replies or they are to be kept: if not, they need not be computed.
    #[must_use]
    pub fn wanted(&self) -> bool {
        self.wanted
    }

    pub(crate) fn rearm(&mut self, wanted: bool) {
        self.replies.clear();
        self.wanted = wanted;
    }

    /// The reply to the command at `position` among those that were applied.
    pub(crate) fn get(&self, position: usize) -> &[u8] {
        self.replies.get(position).map_or(&[], |reply| reply)
    }

    /// Takes the reply to the command at `position` among those that were applied.
    pub(crate) fn take(&mut self, position: usize) -> Bytes {
        self.replies.get_mut(position).map(std::mem::take).unwrap_or_default()
    }
}
