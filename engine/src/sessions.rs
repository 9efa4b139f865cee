//! Sessions: what makes a command that is proposed more than once be applied exactly once.
//!
//! Happy path: [`Handle::open_session`](crate::Handle::open_session) registers a session through the log; its id is the
//! index of the registration. Each command of it carries the id and a sequence number. Before the state machine sees a
//! command, every member looks it up in its [`SessionTable`]: a sequence that is new is applied and its reply kept, one
//! that was applied before is answered with the kept reply. The table is changed by the log alone, by its order, its
//! bytes and its clock (`time_ms`, which the leader's clock sets and which never goes back), so that it is equal on all
//! members at the same applied index.
//!
//! # What is bounded, and how
//!
//! A session remembers the sequences of its *window*: from its *floor*, the lowest one that its client has not
//! acknowledged, on. Below the floor and beyond the window nothing is applied, by name ([`SessionRefusal`]). Of replies
//! a session keeps the newest `reply_bytes_max` bytes; of an older one only that and where the command was applied is
//! known ([`ProposeError::ReplyGone`](crate::error::ProposeError::ReplyGone)). All memory of a session is reserved when
//! it is registered, by the limits that its registration carries through the log, not by those of each member; without
//! room the registration is refused, and no other session is dropped for it. A session that has been silent for longer
//! than its time-out, by the log's clock, is expired: from then on nothing of it is applied, and the next registration
//! frees its memory.
//!
//! # Failures
//!
//! A client whose proposal has an unknown outcome may propose the same sequence again, on any member, or ask for the
//! outcome by [`Session::resolve`], which commits a *fence*: either the command had been applied, or it never will be.
//!
//! ```
//! use ringraft::sessions::Resolved;
//! # use ringraft::{ClusterId, Config, MemberConfig, Node, NodeId, StateMachine};
//! # use ringraft::state_machine::{CommittedBatch, Replies};
//! # use std::time::{Duration, Instant};
//! # #[derive(Default)]
//! # struct Count(u8);
//! # impl StateMachine for Count {
//! #     fn apply(&mut self, batch: &CommittedBatch<'_>, replies: &mut Replies) {
//! #         for _ in batch.commands() {
//! #             self.0 += 1;
//! #             replies.push(vec![self.0]);
//! #         }
//! #     }
//! # }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir_in(std::env::current_dir()?)?;
//! # let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
//! # let members = vec![MemberConfig { id: NodeId(1), address }];
//! # let node = Node::start(Config::new(ClusterId(0xc0ffee), NodeId(1), members, directory.path()), Count::default)?;
//! # let handle = node.handle();
//! # handle.wait_status(Duration::from_secs(60), |status| status.role == ringraft::Role::Leader);
//! let session = handle.open_session().wait()?;
//! let in_a_minute = Instant::now() + Duration::from_secs(60);
//! let committed = session.propose_until("deposit 10", in_a_minute)?; // through elections and times of Busy
//!
//! // After a restart of the client, from what it kept: the command is not applied a second time.
//! let session = handle.resume_session(session.position());
//! let again = session.propose_with_sequence(1, "deposit 10").wait()?;
//! assert_eq!(again, committed);
//!
//! // What became of a command whose answer was lost? From now on, nothing else can become of it.
//! assert_eq!(session.resolve(1).wait()?, Resolved::Committed(committed));
//! assert_eq!(session.resolve(2).wait()?, Resolved::NeverApplied);
//! session.close().wait()?;
//! # handle.shutdown();
//! # assert!(node.join().is_orderly());
//! # Ok(())
//! # }
//! ```
//!
//! The scheme is that of section 6.3 of the Raft thesis, with a window instead of one outstanding command.

mod client;
mod control;
mod encoding;
#[cfg(test)]
mod tests;

pub use client::{
    Resolution, Resolved, Session, SessionControl, SessionOpening, SessionPosition, SessionProposal,
};
pub(crate) use control::Control;
pub use encoding::SessionTableError;

use crate::mutants::{self, Mutant};
use ringraft_block::{LogIndex, Term};
use std::collections::VecDeque;

/// The most sequences that a session's window may have: 640 KiB of memory. An acknowledgement may have to look at each of
/// them, and a batch may hold 7,000 acknowledgements.
pub const WINDOW_MAX: u32 = 16_384;

/// The most bytes of replies that a session may keep.
pub const REPLY_BYTES_CAP: u32 = 2 << 20;

/// The largest `session_table_bytes_max`: a snapshot carries the table, in memory while it is restored.
pub const TABLE_BYTES_CAP: u64 = 192 << 20;

/// What a session takes besides its window and its replies.
pub const SESSION_BYTES: u64 = 256;

/// What a session takes for each sequence of its window.
pub const SLOT_BYTES: u64 = 40;

const _: () = assert!(
    size_of::<Slot>() as u64 <= SLOT_BYTES
        && (size_of::<Entry>() + size_of::<(u64, Box<Entry>)>()) as u64 <= SESSION_BYTES
);

/// The bounds of a session, as its registration carries them through the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionLimits {
    /// It expires when nothing of it has come for longer than this by the log's clock, in milliseconds.
    pub timeout_ms: u64,
    /// How many sequences it remembers, from the lowest unacknowledged one on: 1 to [`WINDOW_MAX`].
    pub window: u32,
    /// How many bytes of replies it keeps; at most [`REPLY_BYTES_CAP`].
    pub reply_bytes_max: u32,
    /// It is refused when all sessions together, with it, would take more than so many bytes.
    pub table_bytes_max: u64,
}

impl SessionLimits {
    /// What a session of these limits takes at the most, in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        SESSION_BYTES + self.window as u64 * SLOT_BYTES + self.reply_bytes_max as u64
    }

    /// Within what every member can hold. What a registration asks for beyond it is cut down, equally on all.
    fn clamped(self) -> Self {
        Self {
            window: self.window.clamp(1, WINDOW_MAX),
            reply_bytes_max: self.reply_bytes_max.min(REPLY_BYTES_CAP),
            table_bytes_max: self.table_bytes_max.min(TABLE_BYTES_CAP),
            ..self
        }
    }
}

/// Why a command or a request of a session was not applied, although it is in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionRefusal {
    /// The session has expired, or was closed, or was never registered.
    #[error("the session has expired or was closed: open another one")]
    Expired,
    /// The client has acknowledged this sequence: whether it was applied is no longer known, and it is not applied now.
    #[error("the session's client has acknowledged all sequences below {floor}")]
    BelowFloor {
        /// The lowest sequence that is not acknowledged.
        floor: u64,
    },
    /// The sequence is too far ahead of the lowest unacknowledged one: acknowledge, then propose again.
    #[error(
        "the session remembers {window} sequences from {floor} on, and this one lies beyond: acknowledge first"
    )]
    BeyondWindow {
        /// The lowest sequence that is not acknowledged.
        floor: u64,
        /// How many sequences from there on can be used.
        window: u32,
    },
    /// The sequence was resolved as never applied, and so it never will be.
    #[error("the sequence was resolved as never applied")]
    Fenced,
    /// There is no room for another session: close some, or wait until some expire.
    #[error("no room for another session: {reserved_bytes} of {table_bytes_max} bytes are reserved")]
    TableFull {
        /// What the sessions that there are may take.
        reserved_bytes: u64,
        /// The limit, which the leader's configuration sets.
        table_bytes_max: u64,
    },
}

/// Where the table remembers a sequence. Valid until a session is registered or closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    session: u32,
    slot: u32,
}

/// What becomes of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is to be applied, and its reply to be kept at this place.
    Fresh(Place),
    /// It was applied before: the answer is at this place.
    Duplicate(Place),
    /// It is not applied.
    Refused(SessionRefusal),
}

/// What is known of an applied sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) index: LogIndex,
    pub(crate) term: Term,
    /// `None` when it is no longer kept.
    pub(crate) reply: Option<Vec<u8>>,
}

/// What became of a request about sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Controlled {
    /// Registered, acknowledged or closed.
    Done,
    /// A resolved sequence had been applied: the answer is at this place.
    Applied(Place),
}

/// The sessions of the cluster and what they remember; a function of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionTable {
    /// By id, which grows along the log.
    sessions: Vec<(u64, Box<Entry>)>,
    /// What they may take, by their limits.
    reserved_bytes: u64,
    quiet: Quiet,
}

/// No session expires before this time. Saves looking at each; says nothing that the sessions do not say.
#[derive(Clone, Copy, Debug, Default)]
struct Quiet {
    until_ms: u64,
}

impl PartialEq for Quiet {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Quiet {}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    timeout_ms: u64,
    /// The log's time of the last command or request.
    active_ms: u64,
    /// The lowest sequence that is not acknowledged.
    floor: u64,
    /// The window; a sequence has the place of its remainder.
    slots: Box<[Slot]>,
    /// Slots that are not empty.
    seen: u32,
    /// Slots of sequences whose reply has bytes and was kept at first.
    kept: u32,
    replies: ReplyRing,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Slot {
    state: SlotState,
    reply_bytes: u32,
    /// Where the reply begins, in all bytes of replies that the session ever kept.
    reply_at: u64,
    index: LogIndex,
    term: Term,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum SlotState {
    /// Not seen.
    #[default]
    Empty,
    Applied,
    /// Applied, with a reply that is larger than all that may be kept.
    Unkept,
    Fenced,
}

/// The newest replies of a session, one behind the other. The oldest bytes make room for new ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct ReplyRing {
    /// Allocated for `bytes_max` with the first byte, and never larger.
    bytes: VecDeque<u8>,
    /// Of all bytes that were ever pushed, where the next will be.
    end: u64,
    bytes_max: u32,
}

impl ReplyRing {
    fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// Where it begins; `None` when it is larger than the ring.
    fn push(&mut self, reply: &[u8]) -> Option<u64> {
        let bytes_max = self.bytes_max as usize;
        if reply.len() > bytes_max {
            return None;
        }
        let over = (self.bytes.len() + reply.len()).saturating_sub(bytes_max);
        self.bytes.drain(..over);
        if self.bytes.capacity() < bytes_max && !reply.is_empty() {
            self.bytes.reserve_exact(bytes_max - self.bytes.len());
        }
        self.bytes.extend(reply);
        let at = self.end;
        self.end += reply.len() as u64;
        Some(at)
    }

    fn get(&self, at: u64, bytes: u32) -> Option<Vec<u8>> {
        if bytes == 0 {
            return Some(Vec::new());
        }
        let skip = usize::try_from(at.checked_sub(self.start())?).ok()?;
        Some(self.bytes.range(skip..skip + bytes as usize).copied().collect())
    }
}

impl Entry {
    fn window(&self) -> u32 {
        self.slots.len() as u32
    }

    fn limits_bytes(&self) -> u64 {
        SESSION_BYTES + self.slots.len() as u64 * SLOT_BYTES + u64::from(self.replies.bytes_max)
    }

    fn is_expired(&self, time_ms: u64) -> bool {
        time_ms.saturating_sub(self.active_ms) > self.timeout_ms
    }

    fn slot_of(&self, sequence: u64) -> u32 {
        (sequence % self.slots.len() as u64) as u32
    }

    /// The slot that remembers the sequence, or why none does.
    fn find(&self, sequence: u64) -> Result<u32, SessionRefusal> {
        let (floor, window) = (self.floor, self.window());
        if sequence < floor && !mutants::active(Mutant::SessionFloorIgnored) {
            return Err(SessionRefusal::BelowFloor { floor });
        }
        if sequence.saturating_sub(floor) >= u64::from(window) {
            return Err(SessionRefusal::BeyondWindow { floor, window });
        }
        Ok(self.slot_of(sequence))
    }

    fn acknowledge(&mut self, through: u64) {
        let floor = self.floor.max(through.saturating_add(1));
        let cleared = (floor - self.floor).min(self.slots.len() as u64);
        for sequence in self.floor..self.floor.saturating_add(cleared) {
            if self.seen == 0 {
                break;
            }
            let slot = std::mem::take(&mut self.slots[self.slot_of(sequence) as usize]);
            self.seen -= u32::from(slot.state != SlotState::Empty);
            self.kept -= u32::from(slot.reply_bytes > 0);
        }
        self.floor = floor;
        if self.kept == 0 {
            self.replies.bytes.clear();
        }
    }
}

impl SessionTable {
    /// How many sessions it holds, those included that have expired since the last registration.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Whether there is no session.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// What its sessions may take, by their limits.
    #[must_use]
    pub fn reserved_bytes(&self) -> u64 {
        self.reserved_bytes
    }

    fn position(&self, session: u64) -> Option<usize> {
        self.sessions.binary_search_by_key(&session, |(id, _)| *id).ok()
    }

    /// The session, if it has not expired. What addresses it keeps it alive.
    fn live(&mut self, session: u64, time_ms: u64) -> Result<(usize, &mut Entry), SessionRefusal> {
        let position = self.position(session).ok_or(SessionRefusal::Expired)?;
        let entry = &mut self.sessions[position].1;
        if entry.is_expired(time_ms) {
            return Err(SessionRefusal::Expired);
        }
        entry.active_ms = entry.active_ms.max(time_ms);
        Ok((position, entry))
    }

    /// Decides what becomes of the command at `index`, and remembers that it was applied if it is to be. One look-up,
    /// nothing allocated.
    pub(crate) fn admit(
        &mut self,
        (session, sequence): (u64, u64),
        index: LogIndex,
        term: Term,
        time_ms: u64,
    ) -> Verdict {
        let (position, entry) = match self.live(session, time_ms) {
            Ok(found) => found,
            Err(refusal) => return Verdict::Refused(refusal),
        };
        let at = match entry.find(sequence) {
            Ok(at) => at,
            Err(refusal) => return Verdict::Refused(refusal),
        };
        let slot = &mut entry.slots[at as usize];
        let place = Place { session: position as u32, slot: at };
        match slot.state {
            SlotState::Empty => {
                let state = if mutants::active(Mutant::ReplyNotCached) {
                    SlotState::Empty
                } else {
                    SlotState::Applied
                };
                // A reply without bytes, until it is known.
                *slot = Slot { state, reply_bytes: 0, reply_at: 0, index, term };
                entry.seen += u32::from(state != SlotState::Empty);
                Verdict::Fresh(place)
            }
            SlotState::Applied | SlotState::Unkept => Verdict::Duplicate(place),
            SlotState::Fenced => Verdict::Refused(SessionRefusal::Fenced),
        }
    }

    /// The command that was admitted to `place` was applied, with this reply.
    pub(crate) fn remember(&mut self, place: Place, reply: &[u8]) {
        let entry = &mut self.sessions[place.session as usize].1;
        let slot = &mut entry.slots[place.slot as usize];
        match entry.replies.push(reply) {
            Some(at) if slot.state == SlotState::Applied => {
                (slot.reply_at, slot.reply_bytes) = (at, reply.len() as u32);
                entry.kept += u32::from(slot.reply_bytes > 0);
            }
            Some(_) => {}
            None => slot.state = SlotState::Unkept,
        }
    }

    /// What is known of the applied sequence at `place`.
    pub(crate) fn answer(&self, place: Place) -> Answer {
        let entry = &self.sessions[place.session as usize].1;
        let slot = &entry.slots[place.slot as usize];
        let kept = slot.state == SlotState::Applied;
        let reply = if kept { entry.replies.get(slot.reply_at, slot.reply_bytes) } else { None };
        Answer { index: slot.index, term: slot.term, reply }
    }

    /// Applies the request at `index`.
    pub(crate) fn control(
        &mut self,
        control: Control,
        index: LogIndex,
        time_ms: u64,
    ) -> Result<Controlled, SessionRefusal> {
        match control {
            Control::Register(limits) => self.register(index.get(), limits, time_ms),
            Control::Acknowledge { session, through } => {
                self.live(session, time_ms)?.1.acknowledge(through);
                Ok(Controlled::Done)
            }
            Control::Resolve { session, sequence } => self.resolve(session, sequence, time_ms),
            Control::Close { session } => {
                let (position, _) = self.live(session, time_ms)?;
                let (_, entry) = self.sessions.remove(position);
                self.reserved_bytes -= entry.limits_bytes();
                Ok(Controlled::Done)
            }
        }
    }

    fn register(
        &mut self,
        id: u64,
        limits: SessionLimits,
        time_ms: u64,
    ) -> Result<Controlled, SessionRefusal> {
        let limits = limits.clamped();
        self.drop_expired(time_ms);
        let (reserved_bytes, table_bytes_max) = (self.reserved_bytes, limits.table_bytes_max);
        if reserved_bytes.saturating_add(limits.bytes()) > table_bytes_max {
            return Err(SessionRefusal::TableFull { reserved_bytes, table_bytes_max });
        }
        debug_assert!(self.sessions.last().is_none_or(|(last, _)| *last < id), "ids grow along the log");
        self.reserved_bytes += limits.bytes();
        self.quiet.until_ms = self.quiet.until_ms.min(time_ms.saturating_add(limits.timeout_ms));
        let entry = Entry {
            timeout_ms: limits.timeout_ms,
            active_ms: time_ms,
            floor: 1,
            slots: vec![Slot::default(); limits.window as usize].into(),
            seen: 0,
            kept: 0,
            replies: ReplyRing { bytes_max: limits.reply_bytes_max, ..ReplyRing::default() },
        };
        self.sessions.push((id, Box::new(entry)));
        Ok(Controlled::Done)
    }

    fn drop_expired(&mut self, time_ms: u64) {
        if time_ms <= self.quiet.until_ms {
            return;
        }
        let mut reserved_bytes = 0;
        let mut until_ms = u64::MAX;
        self.sessions.retain(|(_, entry)| {
            let kept = !entry.is_expired(time_ms);
            if kept {
                reserved_bytes += entry.limits_bytes();
                until_ms = until_ms.min(entry.active_ms.saturating_add(entry.timeout_ms));
            }
            kept
        });
        (self.reserved_bytes, self.quiet.until_ms) = (reserved_bytes, until_ms);
    }

    fn resolve(&mut self, session: u64, sequence: u64, time_ms: u64) -> Result<Controlled, SessionRefusal> {
        let (position, entry) = self.live(session, time_ms)?;
        let at = entry.find(sequence)?;
        let slot = &mut entry.slots[at as usize];
        match slot.state {
            SlotState::Empty => {
                if !mutants::active(Mutant::FenceNotRemembered) {
                    slot.state = SlotState::Fenced;
                    entry.seen += 1;
                }
                Err(SessionRefusal::Fenced)
            }
            SlotState::Fenced => Err(SessionRefusal::Fenced),
            SlotState::Applied | SlotState::Unkept => {
                Ok(Controlled::Applied(Place { session: position as u32, slot: at }))
            }
        }
    }
}
