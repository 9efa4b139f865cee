//! The table as bytes, for snapshots: little-endian, versioned, equal for equal tables. Whoever stores them adds a
//! checksum.
//!
//! A head of 16 bytes: magic, version (u32 each), number of sessions (u64). Of each session, by id: id, time-out, time
//! of the last activity, floor, end of replies (u64 each); window, bound of replies, bytes of replies, number of slots
//! (u32 each). Then its slots that are not empty, by sequence: sequence, index, term, where the reply begins (u64
//! each), bytes of the reply (u32), state (u32). Then the bytes of replies.

use super::{
    Entry, Quiet, REPLY_BYTES_CAP, ReplyRing, SessionTable, Slot, SlotState, TABLE_BYTES_CAP, WINDOW_MAX,
};
use ringraft_block::{LogIndex, Term};

const MAGIC: u32 = u32::from_le_bytes(*b"RRse");
const VERSION: u32 = 1;

/// Why bytes are no session table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionTableError {
    /// They end too early, or go on where they should end.
    #[error("the session table has a length that its content contradicts")]
    Length,
    /// Something else is here.
    #[error("no session table")]
    Magic,
    /// Written by another version.
    #[error("session table of version {0}; this build reads version {VERSION}: upgrade this node")]
    Version(u32),
    /// A value that no table of this version holds.
    #[error("the session table's {0} is out of range")]
    Range(&'static str),
}

impl SlotState {
    fn code(self) -> u32 {
        match self {
            Self::Empty => 0,
            Self::Applied => 1,
            Self::Unkept => 2,
            Self::Fenced => 3,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        [Self::Applied, Self::Unkept, Self::Fenced].into_iter().find(|state| state.code() == code)
    }
}

impl SessionTable {
    /// Appends the table to `out`. Equal tables give equal bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend(MAGIC.to_le_bytes());
        out.extend(VERSION.to_le_bytes());
        out.extend((self.sessions.len() as u64).to_le_bytes());
        for (id, entry) in &self.sessions {
            for field in [*id, entry.timeout_ms, entry.active_ms, entry.floor, entry.replies.end] {
                out.extend(field.to_le_bytes());
            }
            let seen = entry.slots.iter().filter(|slot| slot.state != SlotState::Empty).count();
            let kept = entry.replies.bytes.len();
            for field in [entry.window(), entry.replies.bytes_max, kept as u32, seen as u32] {
                out.extend(field.to_le_bytes());
            }
            for distance in 0..entry.slots.len() as u64 {
                let Some(sequence) = entry.floor.checked_add(distance) else { break };
                let slot = &entry.slots[entry.slot_of(sequence) as usize];
                if slot.state == SlotState::Empty {
                    continue;
                }
                for field in [sequence, slot.index.get(), slot.term.get(), slot.reply_at] {
                    out.extend(field.to_le_bytes());
                }
                out.extend(slot.reply_bytes.to_le_bytes());
                out.extend(slot.state.code().to_le_bytes());
            }
            let (front, back) = entry.replies.bytes.as_slices();
            out.extend(front);
            out.extend(back);
        }
    }

    /// Reads what [`SessionTable::encode`] wrote. Allocates no more than the table of these bytes may take, which is at
    /// most [`TABLE_BYTES_CAP`] in all.
    ///
    /// # Errors
    /// The first rule that the bytes break.
    pub fn decode(bytes: &[u8]) -> Result<Self, SessionTableError> {
        let mut reader = Reader(bytes);
        if reader.u32()? != MAGIC {
            return Err(SessionTableError::Magic);
        }
        let version = reader.u32()?;
        if version != VERSION {
            return Err(SessionTableError::Version(version));
        }
        let count = reader.u64()?;
        let mut table = Self { sessions: Vec::new(), reserved_bytes: 0, quiet: Quiet::default() };
        let mut last = 0;
        for _ in 0..count {
            let id = reader.u64()?;
            if id <= last {
                return Err(SessionTableError::Range("session id"));
            }
            last = id;
            let entry = Entry::decode(&mut reader, &mut table.reserved_bytes)?;
            table.sessions.push((id, Box::new(entry)));
        }
        if reader.0.is_empty() { Ok(table) } else { Err(SessionTableError::Length) }
    }
}

impl Entry {
    fn decode(reader: &mut Reader<'_>, reserved_bytes: &mut u64) -> Result<Self, SessionTableError> {
        let range = SessionTableError::Range;
        let (timeout_ms, active_ms) = (reader.u64()?, reader.u64()?);
        let (floor, end) = (reader.u64()?, reader.u64()?);
        let (window, bytes_max) = (reader.u32()?, reader.u32()?);
        let (kept, seen) = (reader.u32()?, reader.u32()?);
        if !(1..=WINDOW_MAX).contains(&window) {
            return Err(range("window"));
        }
        if bytes_max > REPLY_BYTES_CAP || kept > bytes_max || u64::from(kept) > end {
            return Err(range("bytes of replies"));
        }
        if floor == 0 {
            return Err(range("floor"));
        }
        if seen > window {
            return Err(range("number of sequences"));
        }
        let slots_bytes = seen as usize * ENCODED_SLOT_BYTES;
        if reader.0.len() < slots_bytes + kept as usize {
            return Err(SessionTableError::Length);
        }
        let limits =
            super::SessionLimits { timeout_ms, window, reply_bytes_max: bytes_max, table_bytes_max: 0 };
        *reserved_bytes += limits.bytes();
        if *reserved_bytes > TABLE_BYTES_CAP {
            return Err(range("size"));
        }
        let mut entry = Self {
            timeout_ms,
            active_ms,
            floor,
            slots: vec![Slot::default(); window as usize].into(),
            seen,
            kept: 0,
            replies: ReplyRing { end, bytes_max, ..ReplyRing::default() },
        };
        let mut last = None;
        for _ in 0..seen {
            let sequence = reader.u64()?;
            let ahead = sequence.checked_sub(floor).ok_or(range("sequence"))?;
            if ahead >= u64::from(window) || last.is_some_and(|last| sequence <= last) {
                return Err(range("sequence"));
            }
            last = Some(sequence);
            let (index, term) = (LogIndex(reader.u64()?), Term(reader.u64()?));
            let (reply_at, reply_bytes) = (reader.u64()?, reader.u32()?);
            let state = SlotState::from_code(reader.u32()?).ok_or(range("state"))?;
            let reply_end = reply_at.checked_add(u64::from(reply_bytes)).ok_or(range("reply"))?;
            if reply_end > end || state != SlotState::Applied && reply_end != 0 {
                return Err(range("reply"));
            }
            entry.kept += u32::from(reply_bytes > 0);
            let at = entry.slot_of(sequence) as usize;
            entry.slots[at] = Slot { state, reply_bytes, reply_at, index, term };
        }
        let replies = reader.take(kept as usize)?;
        if !replies.is_empty() {
            entry.replies.bytes.reserve_exact(bytes_max as usize);
            entry.replies.bytes.extend(replies);
        }
        Ok(entry)
    }
}

const ENCODED_SLOT_BYTES: usize = 40;

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], SessionTableError> {
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or(SessionTableError::Length)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, SessionTableError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(SessionTableError::Length)?;
        self.0 = rest;
        Ok(u32::from_le_bytes(*taken))
    }

    fn u64(&mut self) -> Result<u64, SessionTableError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(SessionTableError::Length)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*taken))
    }
}
