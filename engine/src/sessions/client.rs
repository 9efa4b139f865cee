//! A client's end of a session: it numbers commands, knows which of them are settled, and acknowledges those.
//!
//! A sequence is *settled* when its outcome is a fact: committed, resolved, or refused before it entered any log and
//! numbered by the session itself, which uses no number twice. Settled sequences at the front of the window are
//! acknowledged by the way, a quarter of a window at a time. One of unknown outcome stays, and with it the floor, until it
//! is proposed again, resolved, or acknowledged as it is; and so does one that its caller has numbered and that was
//! refused, because the caller may use the number again.

use super::{Control, SessionRefusal, WINDOW_MAX};
use crate::error::{ProposeError, Refusal, Refused, UnknownOutcome};
use crate::handle::{Committed, Handle, Outcome, Proposal, lock};
use crate::raft::Role;
use bytes::Bytes;
use ringraft_block::{LogIndex, Term};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// A session of a client: each of its commands is applied at most once, however often it is proposed. Cheap to clone;
/// all clones number commands together. From any thread.
///
/// Dropping it leaves the session as it is; it expires when it has been silent for its time-out.
#[derive(Clone)]
pub struct Session {
    handle: Handle,
    shared: Arc<Shared>,
}

struct Shared {
    id: u64,
    book: Mutex<Book>,
}

/// All that a client must keep to go on with its session after a restart of its own, or elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionPosition {
    /// The session.
    pub id: u64,
    /// How many sequences the cluster remembers of it.
    pub window: u32,
    /// The lowest sequence whose outcome is not settled.
    pub floor: u64,
    /// The floor that the cluster is known to have: all sequences below it were acknowledged to it. Too low a number costs
    /// an acknowledgement; too high a one has the cluster refuse what lies beyond its window.
    pub confirmed: u64,
    /// The lowest sequence that was never used. Too high a number is safe; too low a one gives a new command the
    /// outcome of an old one.
    pub next: u64,
}

/// What a fence has found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// The command was applied, once, with this reply.
    Committed(Committed),
    /// The command was applied, once; its reply is no longer kept.
    ReplyGone {
        /// Where it was applied.
        index: LogIndex,
        /// The term of the leader that sealed it there.
        term: Term,
    },
    /// The command was not applied and never will be.
    NeverApplied,
}

impl Handle {
    /// Opens a session, by the limits of this node's configuration. Only a leader can, as it can propose.
    ///
    /// When the outcome is unknown, a session may have been opened that nobody uses; it expires.
    pub fn open_session(&self) -> SessionOpening {
        let control = Control::Register(self.shared.session_limits);
        let window = self.shared.session_limits.window;
        SessionOpening { handle: self.clone(), window, proposal: self.propose_control(control) }
    }

    /// Goes on with a session from where [`Session::position`] said it was. Sequences from `floor` on that were used
    /// count as being of unknown outcome.
    #[must_use]
    pub fn resume_session(&self, position: SessionPosition) -> Session {
        Session::new(self.clone(), position)
    }
}

impl Session {
    fn new(handle: Handle, position: SessionPosition) -> Self {
        Self { handle, shared: Arc::new(Shared { id: position.id, book: Mutex::new(Book::new(position)) }) }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        lock(&self.shared.book)
    }

    /// The session's id.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.shared.id
    }

    /// What to keep for [`Handle::resume_session`].
    #[must_use]
    pub fn position(&self) -> SessionPosition {
        let book = self.book();
        let Book { window, floor, confirmed, next, .. } = *book;
        SessionPosition { id: self.id(), window, floor, confirmed, next }
    }

    /// The same session through another node, where a leader is one now.
    #[must_use]
    pub fn through(&self, handle: &Handle) -> Self {
        Self { handle: handle.clone(), shared: Arc::clone(&self.shared) }
    }

    /// Proposes `command` under the next sequence. When the outcome is unknown, propose the same command again by
    /// [`Session::propose_with_sequence`] under the same sequence, here or through the leader's node, or ask by
    /// [`Session::resolve`].
    ///
    /// Refused with [`SessionRefusal::BeyondWindow`] while too many sequences are unsettled. When it is refused, its number
    /// is spent: propose the command anew, not under that number.
    pub fn propose(&self, command: impl Into<Bytes>) -> SessionProposal {
        let command = command.into();
        match self.issue() {
            Ok(sequence) => self.attempt(sequence, command),
            Err(reason) => SessionProposal::refused(self, Refused { reason, command }),
        }
    }

    /// Proposes `command` under `sequence`: again, or as numbered by the caller, from 1 on and one number for each
    /// command. A sequence that was applied before answers with the outcome of then, whatever `command` is. One that is
    /// refused stays unsettled, and can be proposed again; who does not want to acknowledges or resolves it.
    ///
    /// Of a sequence below [`SessionPosition::floor`], which is not kept track of, no refusal is a fact but
    /// [`SessionRefusal::Fenced`]: it comes as [`UnknownOutcome::EarlierAttempt`].
    pub fn propose_with_sequence(&self, sequence: u64, command: impl Into<Bytes>) -> SessionProposal {
        self.book().begin(sequence);
        self.attempt(sequence, command.into())
    }

    /// The sequence was begun in the book.
    fn attempt(&self, sequence: u64, command: Bytes) -> SessionProposal {
        let proposal = self.handle.propose_in_session(self.id(), sequence, command);
        SessionProposal { session: Some(self.clone()), sequence, proposal }
    }

    fn issue(&self) -> Result<u64, Refusal> {
        let mut book = self.book();
        book.confirm();
        if let Some(through) = book.begin_acknowledgement() {
            // Not under the lock: if the node is just stopping, all who wait are answered and woken here, and may ask the
            // book at once.
            drop(book);
            let proposal = self.handle.propose_control(Control::Acknowledge { session: self.id(), through });
            book = self.book();
            book.acknowledging = Some((through, Some(proposal)));
        }
        book.issue()
    }

    /// Proposes `command` under the next sequence, again and again until its outcome is a fact or `deadline` has come.
    /// Blocks the calling thread. Goes through this session's node only: it bridges an election that this node
    /// wins, and times of [`Refusal::Busy`] or [`Refusal::NoSpace`].
    ///
    /// # Errors
    /// Refused: the command was not applied and will not be. Unknown, with the sequence: at the deadline, or when the
    /// node stopped; go on with [`Session::retry_until`], or resolve it.
    pub fn propose_until(&self, command: impl Into<Bytes>, deadline: Instant) -> Outcome {
        let command = command.into();
        let sequence = loop {
            match self.issue() {
                Ok(sequence) => break sequence,
                Err(reason) => {
                    if !is_passing(&reason, true) || !self.pause(&reason, deadline) {
                        return Err(Refused { reason, command }.into());
                    }
                }
            }
        };
        let outcome = self.retry(sequence, &command, deadline);
        self.book().end(sequence, outcome)
    }

    /// As [`Session::propose_until`], under a sequence that this command was proposed with before.
    ///
    /// # Errors
    /// As there.
    pub fn retry_until(&self, sequence: u64, command: impl Into<Bytes>, deadline: Instant) -> Outcome {
        self.book().begin(sequence);
        let outcome = self.retry(sequence, &command.into(), deadline);
        self.book().end(sequence, outcome)
    }

    /// One attempt after the other; the book holds them for a single one.
    fn retry(&self, sequence: u64, command: &Bytes, deadline: Instant) -> Outcome {
        // Whether an attempt may yet be applied.
        let mut doubtful = false;
        loop {
            let mut proposal = self.handle.propose_in_session(self.id(), sequence, command.clone());
            let Some(outcome) = proposal.wait_until(deadline) else {
                return Err(UnknownOutcome::Deadline { sequence }.into());
            };
            let reason = match outcome {
                Err(ProposeError::Refused(refused)) => refused.reason,
                Err(ProposeError::Unknown(UnknownOutcome::LeadershipLost { .. })) => {
                    doubtful = true;
                    Refusal::NotLeader { leader: None }
                }
                Err(ProposeError::Unknown(UnknownOutcome::Stopped(cause))) => {
                    doubtful = true;
                    Refusal::Stopped(cause)
                }
                outcome => return outcome,
            };
            if is_passing(&reason, false) && self.pause(&reason, deadline) {
                continue;
            }
            let fenced = reason == Refusal::Session(SessionRefusal::Fenced);
            if doubtful && !fenced {
                return Err(UnknownOutcome::EarlierAttempt { sequence, reason: Box::new(reason) }.into());
            }
            return Err(Refused { reason, command: command.clone() }.into());
        }
    }

    /// Waits a little for what refused to pass. False when the deadline has come: nothing is begun that could only end in
    /// doubt.
    fn pause(&self, reason: &Refusal, deadline: Instant) -> bool {
        const SLICE: Duration = Duration::from_millis(2);
        const ELECTION_SLICE: Duration = Duration::from_millis(50);
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        if matches!(reason, Refusal::NotLeader { .. }) {
            let over =
                |status: &crate::handle::Status| status.role == Role::Leader || status.stopped.is_some();
            self.handle.wait_status(left.min(ELECTION_SLICE), over);
        }
        // Also a leader takes a moment until it admits commands.
        let left = deadline.saturating_duration_since(Instant::now());
        std::thread::sleep(left.min(SLICE));
        Instant::now() < deadline
    }

    /// Tells the cluster that nobody will ask for sequences up to `through`, inclusive: their replies are forgotten, and
    /// none of them is applied from then on. A number that was acknowledged before changes nothing.
    pub fn acknowledge(&self, through: u64) -> SessionControl {
        self.book().settle_through(through);
        let control = Control::Acknowledge { session: self.id(), through };
        SessionControl {
            session: self.clone(),
            confirms: through.saturating_add(1),
            proposal: self.handle.propose_control(control),
        }
    }

    /// Keeps an idle session alive, without acknowledging anything: to be called well within `session_timeout`.
    pub fn keep_alive(&self) -> SessionControl {
        let confirmed = self.book().confirmed;
        self.acknowledge(confirmed - 1)
    }

    /// Finds out what became of `sequence`, by a fence in the log: from then on it was applied, or never will be. Can be
    /// repeated, also when its own outcome is unknown. A sequence that was never used counts as used from then on.
    pub fn resolve(&self, sequence: u64) -> Resolution {
        self.book().extend_through(sequence);
        let control = Control::Resolve { session: self.id(), sequence };
        Resolution { session: self.clone(), sequence, proposal: self.handle.propose_control(control) }
    }

    /// Ends the session: the cluster forgets it, and nothing of it is applied from then on.
    pub fn close(&self) -> SessionControl {
        let control = Control::Close { session: self.id() };
        SessionControl { session: self.clone(), confirms: 0, proposal: self.handle.propose_control(control) }
    }
}

/// Whether it is worth asking again soon. `local`: the refusal is this session's own, for want of acknowledgement.
fn is_passing(reason: &Refusal, local: bool) -> bool {
    match reason {
        Refusal::TooLarge { .. } | Refusal::Stopped(_) | Refusal::ConsensusOnly => false,
        Refusal::Session(SessionRefusal::BeyondWindow { .. }) => local,
        Refusal::Session(_) => false,
        _ => true,
    }
}

/// The opening of a session. Cancel safe; dropping it may leave a session that nobody uses, until it expires.
#[must_use = "a session is opened to be used"]
pub struct SessionOpening {
    handle: Handle,
    window: u32,
    proposal: Proposal,
}

impl SessionOpening {
    /// Blocks until the session is open.
    ///
    /// # Errors
    /// Those of a proposal, and [`SessionRefusal::TableFull`].
    ///
    /// # Panics
    /// When it was polled before and was ready.
    pub fn wait(self) -> Result<Session, ProposeError> {
        let Self { handle, window, proposal } = self;
        proposal.wait().map(|committed| opened(&handle, window, &committed))
    }
}

fn opened(handle: &Handle, window: u32, committed: &Committed) -> Session {
    let position = SessionPosition { id: committed.index.get(), window, floor: 1, confirmed: 1, next: 1 };
    Session::new(handle.clone(), position)
}

impl Future for SessionOpening {
    type Output = Result<Session, ProposeError>;

    /// # Panics
    /// When polled again after it was ready.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let outcome = std::task::ready!(Pin::new(&mut self.proposal).poll(context));
        Poll::Ready(outcome.map(|committed| opened(&self.handle, self.window, &committed)))
    }
}

/// The outcome of a command of a session. Cancel safe: dropping it abandons the answer, not the command, whose sequence
/// then counts as being of unknown outcome.
///
/// [`Refused`] means here that the command was not applied under its sequence and will not be, by this attempt or an
/// earlier one; a refusal of this attempt alone comes as [`UnknownOutcome::EarlierAttempt`].
#[must_use = "the outcome of a proposal is worth knowing"]
pub struct SessionProposal {
    /// `None` once the outcome was told.
    session: Option<Session>,
    sequence: u64,
    proposal: Proposal,
}

impl SessionProposal {
    /// Without a sequence.
    fn refused(session: &Session, refused: Refused) -> Self {
        let proposal = session.handle.refused_proposal(refused);
        Self { session: None, sequence: 0, proposal }
    }

    /// Its sequence; 0 when it was refused for want of one.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Blocks until the outcome is known.
    ///
    /// # Errors
    /// Those of the proposal.
    ///
    /// # Panics
    /// When it was polled before and was ready: the outcome was told then.
    pub fn wait(mut self) -> Outcome {
        let outcome = self.proposal.wait_blocking();
        self.told(outcome)
    }

    fn told(&mut self, outcome: Outcome) -> Outcome {
        match self.session.take() {
            Some(session) => session.book().end(self.sequence, outcome),
            None => outcome,
        }
    }
}

impl Future for SessionProposal {
    type Output = Outcome;

    /// # Panics
    /// When polled again after it was ready.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        let outcome = std::task::ready!(Pin::new(&mut self.proposal).poll(context));
        Poll::Ready(self.told(outcome))
    }
}

impl Drop for SessionProposal {
    fn drop(&mut self) {
        if let Some(session) = &self.session {
            session.book().abandon(self.sequence);
        }
    }
}

/// An acknowledgement or a closing on its way. Cancel safe: dropping it abandons the answer, not the request.
#[must_use = "whether it has been done is worth knowing"]
pub struct SessionControl {
    session: Session,
    /// The floor of the session when it has been done.
    confirms: u64,
    proposal: Proposal,
}

impl SessionControl {
    /// Blocks until it has been done.
    ///
    /// # Errors
    /// Those of a proposal. It can be repeated whatever they say.
    ///
    /// # Panics
    /// When it was polled before and was ready.
    pub fn wait(mut self) -> Result<(), ProposeError> {
        let outcome = self.proposal.wait_blocking();
        self.told(outcome)
    }

    fn told(&self, outcome: Outcome) -> Result<(), ProposeError> {
        outcome.map(|_| {
            let mut book = self.session.book();
            book.confirmed = book.confirmed.max(self.confirms);
        })
    }
}

impl Future for SessionControl {
    type Output = Result<(), ProposeError>;

    /// # Panics
    /// When polled again after it was ready.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let outcome = std::task::ready!(Pin::new(&mut self.proposal).poll(context));
        Poll::Ready(self.told(outcome))
    }
}

/// A fence on its way. Cancel safe: dropping it abandons the answer, not the fence.
#[must_use = "the answer is what a fence is for"]
pub struct Resolution {
    session: Session,
    sequence: u64,
    proposal: Proposal,
}

impl Resolution {
    /// Blocks until the answer is known.
    ///
    /// # Errors
    /// Those of a proposal; a sequence below the floor or beyond the window, and an expired session, cannot be resolved.
    ///
    /// # Panics
    /// When it was polled before and was ready.
    pub fn wait(mut self) -> Result<Resolved, ProposeError> {
        let outcome = self.proposal.wait_blocking();
        self.told(outcome)
    }

    fn told(&self, outcome: Outcome) -> Result<Resolved, ProposeError> {
        let resolved = match outcome {
            Ok(committed) => Resolved::Committed(committed),
            Err(ProposeError::ReplyGone { index, term }) => Resolved::ReplyGone { index, term },
            Err(ProposeError::Refused(Refused {
                reason: Refusal::Session(SessionRefusal::Fenced), ..
            })) => Resolved::NeverApplied,
            Err(error) => return Err(error),
        };
        self.session.book().settle(self.sequence);
        Ok(resolved)
    }
}

impl Future for Resolution {
    type Output = Result<Resolved, ProposeError>;

    /// # Panics
    /// When polled again after it was ready.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let outcome = std::task::ready!(Pin::new(&mut self.proposal).poll(context));
        Poll::Ready(self.told(outcome))
    }
}

/// What a client knows of its sequences.
struct Book {
    window: u32,
    /// The lowest sequence that was never used.
    next: u64,
    /// The lowest sequence that is not settled; at most `next`.
    floor: u64,
    /// The floor that the cluster is known to have.
    confirmed: u64,
    /// From `floor` on, to `next`, exclusive.
    used: VecDeque<Used>,
    /// Through which sequence an acknowledgement is under way; without a proposal while that is being made.
    acknowledging: Option<(u64, Option<Proposal>)>,
    /// Why the last acknowledgement was refused.
    refusal: Option<Refusal>,
}

/// A sequence that was used.
#[derive(Clone, Copy, Debug, Default)]
struct Used {
    /// Attempts under way.
    attempts: u32,
    /// An attempt ended without a fact.
    doubtful: bool,
    /// The caller has proposed it by its number, and may again.
    callers: bool,
    settled: Settled,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Settled {
    #[default]
    No,
    /// It entered no log.
    Refused,
    /// Committed, or fenced.
    Known,
}

/// What the outcome of an attempt says of a sequence of which nothing else is known: an attempt before may have been
/// applied, or may be yet. Only a fence is stronger than that; and beyond the window nothing was applied before either.
fn untracked(outcome: Outcome, earlier: impl FnOnce(Refusal) -> Outcome) -> Outcome {
    match outcome {
        Err(ProposeError::Refused(Refused {
            reason: Refusal::Session(SessionRefusal::Fenced | SessionRefusal::BeyondWindow { .. }),
            ..
        })) => outcome,
        Err(ProposeError::Refused(Refused { reason, .. })) => earlier(reason),
        outcome => outcome,
    }
}

impl Book {
    fn new(position: SessionPosition) -> Self {
        let SessionPosition { window, floor: told, confirmed, next, .. } = position;
        // What this client would not have used itself is not kept track of.
        let window = window.clamp(1, WINDOW_MAX);
        let floor = told.max(1).max(next.saturating_sub(2 * u64::from(window)));
        // Nor is it acknowledged unasked.
        let confirmed = if floor > told.max(1) { floor } else { confirmed.clamp(1, floor) };
        let mut book = Self {
            window,
            next: floor,
            floor,
            confirmed,
            used: VecDeque::new(),
            acknowledging: None,
            refusal: None,
        };
        book.extend_to(next, true);
        book
    }

    fn extend_to(&mut self, next: u64, doubtful: bool) {
        while self.next < next {
            self.used.push_back(Used { doubtful, ..Used::default() });
            self.next += 1;
        }
    }

    fn used(&mut self, sequence: u64) -> Option<&mut Used> {
        let position = usize::try_from(sequence.checked_sub(self.floor)?).ok()?;
        self.used.get_mut(position)
    }

    fn issue(&mut self) -> Result<u64, Refusal> {
        let (floor, window) = (self.confirmed, self.window);
        if self.next >= floor.saturating_add(u64::from(window)) {
            let full = Refusal::Session(SessionRefusal::BeyondWindow { floor, window });
            return Err(self.refusal.take().unwrap_or(full));
        }
        let sequence = self.next;
        self.extend_through(sequence);
        if let Some(used) = self.used(sequence) {
            used.attempts = 1;
        }
        Ok(sequence)
    }

    /// An attempt begins at a sequence that the caller names.
    fn begin(&mut self, sequence: u64) {
        self.extend_through(sequence);
        if let Some(used) = self.used(sequence) {
            used.attempts += 1;
            used.callers = true;
            if used.settled == Settled::Refused {
                used.settled = Settled::No;
            }
        }
    }

    /// The sequence is used, and so will not be issued. Those that the caller leaves out before it are not settled until it
    /// says so. One that lies beyond any window is not kept track of: it will be refused.
    fn extend_through(&mut self, sequence: u64) {
        if sequence.saturating_sub(self.floor) < 2 * u64::from(self.window) {
            self.extend_to(sequence.saturating_add(1), false);
        }
    }

    /// An attempt ended; what its outcome says of the sequence.
    fn end(&mut self, sequence: u64, outcome: Outcome) -> Outcome {
        let earlier =
            |reason| Err(UnknownOutcome::EarlierAttempt { sequence, reason: Box::new(reason) }.into());
        let Some(used) = self.used(sequence) else { return untracked(outcome, earlier) };
        used.attempts = used.attempts.saturating_sub(1);
        let outcome = match outcome {
            Err(ProposeError::Refused(Refused {
                reason: Refusal::Session(SessionRefusal::Fenced), ..
            }))
            | Err(ProposeError::ReplyGone { .. })
            | Ok(_) => {
                used.settled = Settled::Known;
                outcome
            }
            Err(ProposeError::Refused(Refused { reason, .. }))
                if used.doubtful || used.attempts > 0 || used.settled == Settled::Known =>
            {
                earlier(reason)
            }
            Err(ProposeError::Refused(_)) => {
                if !used.callers {
                    used.settled = Settled::Refused;
                }
                outcome
            }
            Err(ProposeError::Unknown(_)) => {
                used.doubtful = true;
                outcome
            }
        };
        self.advance();
        outcome
    }

    fn abandon(&mut self, sequence: u64) {
        if let Some(used) = self.used(sequence) {
            used.attempts = used.attempts.saturating_sub(1);
            used.doubtful = true;
        }
    }

    fn settle(&mut self, sequence: u64) {
        if let Some(used) = self.used(sequence) {
            used.settled = Settled::Known;
        }
        self.advance();
    }

    fn settle_through(&mut self, through: u64) {
        while self.floor <= through && self.used.pop_front().is_some() {
            self.floor += 1;
        }
        let floor = through.saturating_add(1);
        if self.used.is_empty() && self.floor < floor {
            self.floor = floor;
            self.next = self.next.max(floor);
        }
        self.advance();
    }

    fn advance(&mut self) {
        while self.used.front().is_some_and(|used| used.settled != Settled::No) {
            self.used.pop_front();
            self.floor += 1;
        }
    }

    /// Takes note of an acknowledgement that has ended.
    fn confirm(&mut self) {
        let Some((through, Some(proposal))) = &mut self.acknowledging else { return };
        let Some(outcome) = proposal.try_outcome() else { return };
        let floor = through.saturating_add(1);
        self.acknowledging = None;
        match outcome {
            Ok(_) => (self.confirmed, self.refusal) = (self.confirmed.max(floor), None),
            Err(ProposeError::Refused(refused)) => self.refusal = Some(refused.reason),
            Err(ProposeError::Unknown(_) | ProposeError::ReplyGone { .. }) => {}
        }
    }

    /// Through which sequence an acknowledgement is due.
    fn wants_acknowledgement(&self) -> Option<u64> {
        let settled = self.floor.saturating_sub(self.confirmed);
        let due = settled >= u64::from((self.window / 4).max(1));
        (due && self.acknowledging.is_none()).then(|| self.floor - 1)
    }

    /// The same, and nobody else is told so.
    fn begin_acknowledgement(&mut self) -> Option<u64> {
        let through = self.wants_acknowledgement()?;
        self.acknowledging = Some((through, None));
        Some(through)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book(window: u32) -> Book {
        Book::new(SessionPosition { id: 9, window, floor: 1, confirmed: 1, next: 1 })
    }

    fn committed() -> Outcome {
        Ok(Committed { index: LogIndex(3), term: Term(1), reply: Bytes::new() })
    }

    fn refused(reason: Refusal) -> Outcome {
        Err(Refused { reason, command: Bytes::new() }.into())
    }

    fn lost() -> Outcome {
        Err(UnknownOutcome::LeadershipLost { index: LogIndex(3) }.into())
    }

    #[test]
    fn a_quarter_of_a_window_of_settled_sequences_is_acknowledged_at_once() {
        let mut book = book(8);
        let sequences: Vec<u64> = (0..4).map(|_| book.issue().expect("room")).collect();
        assert_eq!(sequences, [1, 2, 3, 4]);
        assert!(book.end(2, committed()).is_ok());
        assert_eq!(book.wants_acknowledgement(), None, "the first is still open");
        assert!(book.end(1, committed()).is_ok());
        assert_eq!(book.wants_acknowledgement(), Some(2));
    }

    #[test]
    fn the_window_is_never_left_and_an_unknown_outcome_holds_it_until_it_is_settled() {
        let mut book = book(4);
        for sequence in 1..=4 {
            assert_eq!(book.issue(), Ok(sequence));
        }
        let full = Refusal::Session(SessionRefusal::BeyondWindow { floor: 1, window: 4 });
        assert_eq!(book.issue(), Err(full));
        assert!(book.end(1, lost()).is_err());
        for sequence in 2..=4 {
            assert!(book.end(sequence, committed()).is_ok());
        }
        assert_eq!((book.floor, book.wants_acknowledgement()), (1, None));
        book.settle(1);
        assert_eq!((book.floor, book.wants_acknowledgement()), (5, Some(4)));
        book.confirmed = 5;
        assert_eq!(book.issue(), Ok(5));
    }

    #[test]
    fn a_refusal_is_no_fact_about_a_sequence_with_another_attempt() {
        let not_leader = || Refusal::NotLeader { leader: None };
        let earlier = |outcome| {
            matches!(outcome, Err(ProposeError::Unknown(UnknownOutcome::EarlierAttempt { sequence: 1, .. })))
        };
        let mut book = book(4);
        assert_eq!(book.issue(), Ok(1));
        assert!(book.end(1, lost()).is_err());
        book.begin(1);
        assert!(earlier(book.end(1, refused(not_leader()))), "the first may still be applied");
        book.begin(1);
        book.begin(1);
        assert!(earlier(book.end(1, refused(Refusal::Busy))));
        assert!(book.end(1, committed()).is_ok());
        assert_eq!(book.floor, 2);

        assert_eq!(book.issue(), Ok(2));
        assert!(matches!(book.end(2, refused(not_leader())), Err(ProposeError::Refused(_))));
        assert_eq!(book.floor, 3, "it never left");
        assert_eq!(book.issue(), Ok(3));
        book.abandon(3);
        book.begin(3);
        assert!(!matches!(book.end(3, refused(not_leader())), Err(ProposeError::Refused(_))));
        book.begin(3);
        let fenced = refused(Refusal::Session(SessionRefusal::Fenced));
        assert!(matches!(book.end(3, fenced), Err(ProposeError::Refused(_))), "nothing overcomes a fence");
        assert_eq!(book.floor, 4);
    }

    fn is_earlier(outcome: &Outcome) -> bool {
        matches!(outcome, Err(ProposeError::Unknown(UnknownOutcome::EarlierAttempt { sequence: 1, .. })))
    }

    /// A caller's number that was refused counted as settled, and with that nothing was known of it any more. A second attempt
    /// was lost with its leader, a third one refused, and that passed for a fact: the command was applied a second time
    /// under the number that came next.
    #[test]
    fn a_number_that_was_refused_and_is_used_again_is_kept_track_of() {
        let mut book = book(4);
        book.begin(1);
        assert!(
            matches!(book.end(1, refused(Refusal::Busy)), Err(ProposeError::Refused(_))),
            "it is in no log"
        );
        assert_eq!((book.floor, book.next), (1, 2), "it may be used again");
        book.begin(1);
        assert!(book.end(1, lost()).is_err());
        book.begin(1);
        let outcome = book.end(1, refused(Refusal::NotLeader { leader: None }));
        assert!(is_earlier(&outcome), "{outcome:?}");
        assert_eq!(book.floor, 1);
        book.begin(1);
        assert!(book.end(1, committed()).is_ok());
        assert_eq!(book.floor, 2);
    }

    #[test]
    fn of_a_number_that_is_not_kept_track_of_no_refusal_is_a_fact_but_a_fence() {
        let mut book = book(4);
        assert_eq!(book.issue(), Ok(1));
        assert!(matches!(book.end(1, refused(Refusal::Busy)), Err(ProposeError::Refused(_))));
        assert_eq!(book.floor, 2, "the session itself uses no number again");
        for reason in [Refusal::NotLeader { leader: None }, Refusal::Busy] {
            book.begin(1);
            assert!(book.end(1, lost()).is_err());
            book.begin(1);
            let outcome = book.end(1, refused(reason));
            assert!(is_earlier(&outcome), "{outcome:?}");
        }
        for fact in [SessionRefusal::Fenced, SessionRefusal::BeyondWindow { floor: 2, window: 4 }] {
            book.begin(1);
            let outcome = book.end(1, refused(Refusal::Session(fact)));
            assert!(matches!(outcome, Err(ProposeError::Refused(_))), "{outcome:?}");
        }
    }

    #[test]
    fn a_refusal_says_nothing_of_a_number_that_was_committed_before() {
        let mut book = book(4);
        assert_eq!((book.issue(), book.issue()), (Ok(1), Ok(2)));
        assert!(book.end(2, committed()).is_ok());
        book.begin(2);
        let outcome = book.end(2, refused(Refusal::NotLeader { leader: None }));
        assert!(matches!(
            outcome,
            Err(ProposeError::Unknown(UnknownOutcome::EarlierAttempt { sequence: 2, .. }))
        ));
        // Refused behind one that is open, and then used by its number: it is not settled any more.
        assert_eq!(book.issue(), Ok(3));
        assert!(book.end(3, refused(Refusal::Busy)).is_err());
        book.begin(3);
        assert!(book.end(3, lost()).is_err());
        assert!(book.end(1, committed()).is_ok());
        assert_eq!(book.floor, 3);
    }

    #[test]
    fn what_was_used_before_a_resumption_is_doubtful() {
        let mut book = Book::new(SessionPosition { id: 9, window: 8, floor: 4, confirmed: 4, next: 6 });
        book.begin(5);
        let outcome = book.end(5, refused(Refusal::Busy));
        assert!(matches!(outcome, Err(ProposeError::Unknown(UnknownOutcome::EarlierAttempt { .. }))));
        assert_eq!(book.issue(), Ok(6));
        book.settle_through(5);
        assert_eq!(book.floor, 6);
        book.settle_through(90);
        assert_eq!((book.floor, book.next), (91, 91));
        let book =
            Book::new(SessionPosition { id: 9, window: u32::MAX, floor: 0, confirmed: 0, next: u64::MAX });
        assert_eq!((book.next, book.used.len()), (u64::MAX, 2 * WINDOW_MAX as usize), "bounded");
        assert_eq!(book.wants_acknowledgement(), None, "what was made up is acknowledged by nobody");
    }

    #[test]
    fn a_resumed_session_first_acknowledges_what_the_cluster_does_not_know_to_be_settled() {
        let mut book = book(8);
        for sequence in 1..=7 {
            assert_eq!(book.issue(), Ok(sequence));
            assert!(book.end(sequence, committed()).is_ok());
        }
        let Book { window, floor, confirmed, next, .. } = book;
        assert_eq!((floor, confirmed, next), (8, 1, 8));
        let mut book = Book::new(SessionPosition { id: 9, window, floor, confirmed, next });
        assert_eq!(book.begin_acknowledgement(), Some(7));
        assert_eq!(book.begin_acknowledgement(), None, "one at a time");
        assert_eq!(book.issue(), Ok(8), "the last one of the cluster's window");
        let full = Refusal::Session(SessionRefusal::BeyondWindow { floor: 1, window: 8 });
        assert_eq!(book.issue(), Err(full), "the cluster would refuse it");
        book.acknowledging = None;
        book.confirmed = 8;
        assert_eq!(book.issue(), Ok(9));
    }

    #[test]
    fn a_number_that_was_resolved_unused_is_not_issued_any_more() {
        let mut book = book(8);
        book.extend_through(1);
        assert_eq!(book.issue(), Ok(2), "also while the answer is on its way");
        book.settle(1);
        assert_eq!(book.floor, 2);
        book.extend_through(2);
        assert_eq!((book.floor, book.next), (2, 3), "one that was used stays what it is");
    }

    /// Reads the book when it is woken, and notes when it cannot on the thread that is proposing.
    struct Reader {
        session: Session,
        proposer: std::thread::ThreadId,
        blocked: std::sync::atomic::AtomicBool,
        here: std::sync::atomic::AtomicBool,
    }

    impl std::task::Wake for Reader {
        fn wake(self: Arc<Self>) {
            use std::sync::atomic::Ordering::Relaxed;
            if std::thread::current().id() == self.proposer {
                self.here.store(true, Relaxed);
                self.blocked.fetch_or(self.session.shared.book.try_lock().is_err(), Relaxed);
            }
        }
    }

    /// A node that stops while an acknowledgement is being proposed has its proposer answer all that wait: an executor that
    /// polls where it is woken asked for the book there while the proposer held it, and waited for itself.
    #[test]
    fn whoever_is_woken_while_an_acknowledgement_is_proposed_can_ask_the_book() {
        use crate::config::{Config, MemberConfig};
        use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
        let member = MemberConfig { id: ringraft_block::NodeId(1), address: ([127, 0, 0, 1], 7000).into() };
        let config = Config {
            ingress_capacity: 4,
            reads_max: 4,
            ..Config::new(ringraft_block::ClusterId(1), member.id, vec![member], "nowhere")
        };
        let position = SessionPosition { id: 9, window: 4, floor: 3, confirmed: 1, next: 3 };
        let mut woken = 0;
        for round in 0..2_000 {
            let wakeup = Arc::new(crate::runtime::Wakeup::new());
            let shared = Arc::new(crate::handle::Shared::new(&config, wakeup));
            let handle = Handle { shared: Arc::clone(&shared) };
            let session = handle.resume_session(position);
            let reader = Arc::new(Reader {
                session: session.clone(),
                proposer: std::thread::current().id(),
                blocked: AtomicBool::new(false),
                here: AtomicBool::new(false),
            });
            let waker = Arc::clone(&reader).into();
            let mut context = Context::from_waker(&waker);
            let mut waiting = std::pin::pin!(handle.propose("command"));
            assert!(waiting.as_mut().poll(&mut context).is_pending());
            // What keeps the thread that stops it busy for a moment before it answers proposals itself.
            let asked: Vec<_> = (0..100).map(|_| handle.transfer_leadership(None)).collect();
            let ready = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let ready = &ready;
                scope.spawn(move || {
                    ready.store(true, Relaxed);
                    (0..round % 128).for_each(|_| std::hint::spin_loop());
                    shared.ingress.stop(crate::error::StopError::Requested.into());
                });
                while !ready.load(Relaxed) {
                    std::hint::spin_loop();
                }
                drop(session.propose("another"));
            });
            drop(asked);
            assert!(!reader.blocked.load(Relaxed), "woken under the lock");
            woken += u32::from(reader.here.load(Relaxed));
            if woken >= 3 {
                return;
            }
        }
        println!("the stop came between in {woken} runs");
    }
}
