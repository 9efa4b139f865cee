//! The table against a model that forgets nothing and knows no windows, rings or slots.

use super::*;
use crate::mutants;
use std::collections::BTreeMap;

const LIMITS: SessionLimits =
    SessionLimits { timeout_ms: 1_000, window: 4, reply_bytes_max: 20, table_bytes_max: 10_000 };

fn register(table: &mut SessionTable, id: u64, limits: SessionLimits, time_ms: u64) {
    let control = Control::Register(limits);
    assert_eq!(table.control(control, LogIndex(id), time_ms), Ok(Controlled::Done));
}

/// Applies a command if it is to be: `Ok(true)`; or else the answer that it gets.
fn apply(
    table: &mut SessionTable,
    session: (u64, u64),
    index: u64,
    reply: &[u8],
    time_ms: u64,
) -> Result<Option<Answer>, SessionRefusal> {
    match table.admit(session, LogIndex(index), Term(1), time_ms) {
        Verdict::Fresh(place) => {
            table.remember(place, reply);
            Ok(None)
        }
        Verdict::Duplicate(place) => Ok(Some(table.answer(place))),
        Verdict::Refused(refusal) => Err(refusal),
    }
}

fn answer(index: u64, reply: Option<&[u8]>) -> Option<Answer> {
    Some(Answer { index: LogIndex(index), term: Term(1), reply: reply.map(<[u8]>::to_vec) })
}

fn acknowledge(
    table: &mut SessionTable,
    session: u64,
    through: u64,
    time_ms: u64,
) -> Result<(), SessionRefusal> {
    table.control(Control::Acknowledge { session, through }, LogIndex(99), time_ms).map(|_| ())
}

/// The answer, if the sequence was applied.
fn resolve(
    table: &mut SessionTable,
    session: u64,
    sequence: u64,
    time_ms: u64,
) -> Result<Option<Answer>, SessionRefusal> {
    match table.control(Control::Resolve { session, sequence }, LogIndex(99), time_ms)? {
        Controlled::Applied(place) => Ok(Some(table.answer(place))),
        Controlled::Done => Ok(None),
    }
}

#[test]
fn a_duplicate_gets_the_reply_of_the_command_that_was_applied() {
    let mut table = SessionTable::default();
    register(&mut table, 5, LIMITS, 0);
    assert_eq!(apply(&mut table, (5, 1), 6, b"first", 0), Ok(None));
    assert_eq!(apply(&mut table, (5, 3), 7, b"", 0), Ok(None));
    assert_eq!(apply(&mut table, (5, 1), 8, b"other", 0), Ok(answer(6, Some(b"first"))));
    assert_eq!(apply(&mut table, (5, 3), 9, b"other", 0), Ok(answer(7, Some(b""))));
    assert_eq!(apply(&mut table, (6, 1), 9, b"", 0), Err(SessionRefusal::Expired), "another session");
}

#[test]
fn what_is_acknowledged_or_too_far_ahead_is_refused_by_name() {
    let mut table = SessionTable::default();
    register(&mut table, 5, LIMITS, 0);
    let beyond = |floor| Err(SessionRefusal::BeyondWindow { floor, window: 4 });
    assert_eq!(apply(&mut table, (5, 0), 6, b"", 0), Err(SessionRefusal::BelowFloor { floor: 1 }));
    assert_eq!(apply(&mut table, (5, 5), 6, b"", 0), beyond(1));
    for sequence in 1..=4 {
        assert_eq!(apply(&mut table, (5, sequence), 6 + sequence, b"", 0), Ok(None));
    }
    assert_eq!(acknowledge(&mut table, 5, 2, 0), Ok(()));
    assert_eq!(acknowledge(&mut table, 5, 1, 0), Ok(()), "a late one takes nothing back");
    assert_eq!(apply(&mut table, (5, 2), 20, b"", 0), Err(SessionRefusal::BelowFloor { floor: 3 }));
    assert_eq!(apply(&mut table, (5, 3), 20, b"", 0), Ok(answer(9, Some(b""))));
    assert_eq!(apply(&mut table, (5, 6), 20, b"", 0), Ok(None), "in the slot that sequence 2 had");
    assert_eq!(apply(&mut table, (5, 7), 20, b"", 0), beyond(3));
    assert_eq!(acknowledge(&mut table, 5, u64::MAX, 0), Ok(()));
    assert_eq!(apply(&mut table, (5, 7), 20, b"", 0), Err(SessionRefusal::BelowFloor { floor: u64::MAX }));
    assert_eq!(apply(&mut table, (5, u64::MAX), 20, b"", 0), Ok(None));
    let mut bytes = Vec::new();
    table.encode(&mut bytes);
    assert_eq!(SessionTable::decode(&bytes).as_ref(), Ok(&table));
}

#[test]
fn old_replies_make_room_for_new_ones_and_a_larger_one_than_all_is_not_kept() {
    let mut table = SessionTable::default();
    register(&mut table, 5, LIMITS, 0);
    assert_eq!(apply(&mut table, (5, 1), 6, &[1; 10], 0), Ok(None));
    assert_eq!(apply(&mut table, (5, 2), 7, &[2; 10], 0), Ok(None));
    assert_eq!(apply(&mut table, (5, 1), 8, b"", 0), Ok(answer(6, Some(&[1; 10]))));
    assert_eq!(apply(&mut table, (5, 3), 9, &[3; 1], 0), Ok(None));
    assert_eq!(apply(&mut table, (5, 1), 10, b"", 0), Ok(answer(6, None)), "applied, and no more is known");
    assert_eq!(apply(&mut table, (5, 2), 11, b"", 0), Ok(answer(7, Some(&[2; 10]))));
    assert_eq!(apply(&mut table, (5, 4), 12, &[4; 21], 0), Ok(None));
    assert_eq!(apply(&mut table, (5, 4), 13, b"", 0), Ok(answer(12, None)));
    assert_eq!(apply(&mut table, (5, 3), 14, b"", 0), Ok(answer(9, Some(&[3; 1]))), "it took no room");
}

#[test]
fn a_fence_answers_what_was_applied_and_keeps_away_what_was_not() {
    let mut table = SessionTable::default();
    register(&mut table, 5, LIMITS, 0);
    assert_eq!(apply(&mut table, (5, 1), 6, b"done", 0), Ok(None));
    assert_eq!(resolve(&mut table, 5, 1, 0), Ok(answer(6, Some(b"done"))));
    assert_eq!(resolve(&mut table, 5, 2, 0), Err(SessionRefusal::Fenced));
    assert_eq!(apply(&mut table, (5, 2), 7, b"late", 0), Err(SessionRefusal::Fenced));
    assert_eq!(resolve(&mut table, 5, 2, 0), Err(SessionRefusal::Fenced), "the answer stays");
    assert_eq!(resolve(&mut table, 5, 9, 0), Err(SessionRefusal::BeyondWindow { floor: 1, window: 4 }));
    assert_eq!(acknowledge(&mut table, 5, 1, 0), Ok(()));
    assert_eq!(resolve(&mut table, 5, 1, 0), Err(SessionRefusal::BelowFloor { floor: 2 }));
}

#[test]
fn a_silent_session_expires_by_the_logs_clock_and_its_room_is_free_at_the_next_registration() {
    let mut table = SessionTable::default();
    register(&mut table, 5, LIMITS, 100);
    register(&mut table, 6, LIMITS, 100);
    assert_eq!(apply(&mut table, (5, 1), 7, b"", 1_100), Ok(None), "at the last moment");
    assert_eq!(apply(&mut table, (6, 1), 8, b"", 1_101), Err(SessionRefusal::Expired));
    assert_eq!(resolve(&mut table, 6, 1, 1_101), Err(SessionRefusal::Expired));
    assert_eq!(acknowledge(&mut table, 6, 1, 1_101), Err(SessionRefusal::Expired), "nothing revives it");
    assert_eq!((table.len(), table.reserved_bytes()), (2, 2 * LIMITS.bytes()));
    register(&mut table, 9, LIMITS, 1_102);
    assert_eq!((table.len(), table.reserved_bytes()), (2, 2 * LIMITS.bytes()));
    assert_eq!(apply(&mut table, (5, 1), 10, b"", 2_100), Ok(answer(7, Some(b""))));
    let close = Control::Close { session: 5 };
    assert_eq!(table.control(close, LogIndex(11), 2_100), Ok(Controlled::Done));
    assert_eq!(table.control(close, LogIndex(12), 2_100), Err(SessionRefusal::Expired));
    assert_eq!(apply(&mut table, (5, 2), 12, b"", 2_100), Err(SessionRefusal::Expired));
    assert_eq!((table.len(), table.reserved_bytes()), (1, LIMITS.bytes()));
}

#[test]
fn a_full_table_refuses_and_drops_nobody() {
    let mut table = SessionTable::default();
    let room = 3 * LIMITS.bytes() + LIMITS.bytes() / 2;
    let limits = SessionLimits { table_bytes_max: room, ..LIMITS };
    for id in 1..=3 {
        register(&mut table, id, limits, 0);
    }
    let full = SessionRefusal::TableFull { reserved_bytes: 3 * LIMITS.bytes(), table_bytes_max: room };
    assert_eq!(table.control(Control::Register(limits), LogIndex(4), 1_000), Err(full));
    for id in 1..=3 {
        assert_eq!(apply(&mut table, (id, 1), 5, b"", 1_000), Ok(None), "session {id} is untouched");
    }
    assert_eq!(table.control(Control::Close { session: 2 }, LogIndex(6), 1_000), Ok(Controlled::Done));
    register(&mut table, 7, limits, 1_000);
    assert_eq!(table.control(Control::Register(limits), LogIndex(8), 1_000), Err(full));
}

#[test]
fn a_registration_that_asks_for_too_much_is_cut_down_to_what_every_member_holds() {
    let mut table = SessionTable::default();
    let limits = SessionLimits { window: 0, reply_bytes_max: u32::MAX, table_bytes_max: u64::MAX, ..LIMITS };
    register(&mut table, 1, limits, 0);
    assert_eq!(table.reserved_bytes(), SESSION_BYTES + SLOT_BYTES + u64::from(REPLY_BYTES_CAP));
    let limits = SessionLimits { window: u32::MAX, reply_bytes_max: 0, table_bytes_max: u64::MAX, ..LIMITS };
    register(&mut table, 2, limits, 0);
    assert_eq!(table.sessions[1].1.window(), WINDOW_MAX);
}

// ---- Against a model

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// A session as one would write down what it has to do.
struct Model {
    limits: SessionLimits,
    active_ms: u64,
    floor: u64,
    /// Everything that was ever applied: where, and the reply.
    applied: BTreeMap<u64, (u64, Vec<u8>)>,
    /// In the order of the log, those that were kept at first.
    kept: Vec<u64>,
    fenced: Vec<u64>,
}

impl Model {
    fn refusal(&self, sequence: u64) -> Option<SessionRefusal> {
        let (floor, window) = (self.floor, self.limits.window);
        if sequence < floor {
            Some(SessionRefusal::BelowFloor { floor })
        } else if sequence >= floor + u64::from(window) {
            Some(SessionRefusal::BeyondWindow { floor, window })
        } else {
            None
        }
    }

    fn answer(&self, sequence: u64) -> Option<Answer> {
        let (index, reply) = self.applied.get(&sequence)?;
        let since = self.kept.iter().rev().take_while(|kept| **kept != sequence);
        let behind: usize = since.map(|kept| self.applied[kept].1.len()).sum();
        let fits = behind + reply.len() <= self.limits.reply_bytes_max as usize || reply.is_empty();
        answer(*index, (fits && self.kept.contains(&sequence)).then_some(reply))
    }
}

struct World {
    table: SessionTable,
    models: BTreeMap<u64, Model>,
    random: Random,
    index: u64,
    time_ms: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let (table, models) = (SessionTable::default(), BTreeMap::new());
        Self { table, models, random: Random(seed), index: 0, time_ms: 0 }
    }

    fn live(&mut self, id: u64) -> Option<&mut Model> {
        let time_ms = self.time_ms;
        let model =
            self.models.get_mut(&id).filter(|model| time_ms <= model.active_ms + model.limits.timeout_ms)?;
        model.active_ms = time_ms;
        Some(model)
    }

    fn some_id(&mut self) -> u64 {
        let known: Vec<u64> = self.models.keys().copied().collect();
        match self.random.below(20) {
            0 => self.random.below(self.index + 1),
            _ if known.is_empty() => 1,
            pick => known[(pick * 7) as usize % known.len()],
        }
    }

    fn some_sequence(&mut self, id: u64) -> u64 {
        let (floor, window) = self.models.get(&id).map_or((1, 4), |model| (model.floor, model.limits.window));
        (floor + self.random.below(u64::from(window) + 3)).saturating_sub(2)
    }

    /// One entry of the log.
    fn step(&mut self) -> Result<(), String> {
        self.index += 1;
        self.time_ms += [0, 0, 1, 30, 300][self.random.below(5) as usize];
        let id = self.some_id();
        let sequence = self.some_sequence(id);
        match self.random.below(20) {
            0 => self.register(),
            1 => self.close(id),
            2..=4 => self.acknowledge(id, sequence),
            5..=6 => self.resolve(id, sequence),
            _ => self.command(id, sequence),
        }
    }

    fn told<T: PartialEq + std::fmt::Debug>(
        &self,
        what: &str,
        found: &T,
        expected: &T,
    ) -> Result<(), String> {
        if found == expected {
            return Ok(());
        }
        Err(format!("index {}: {what}: {found:?} instead of {expected:?}", self.index))
    }

    fn register(&mut self) -> Result<(), String> {
        let limits = SessionLimits {
            timeout_ms: 100 + self.random.below(3_000),
            window: 1 + self.random.below(6) as u32,
            reply_bytes_max: self.random.below(40) as u32,
            table_bytes_max: 2_500,
        };
        let time_ms = self.time_ms;
        self.models.retain(|_, model| time_ms <= model.active_ms + model.limits.timeout_ms);
        let reserved_bytes: u64 = self.models.values().map(|model| model.limits.bytes()).sum();
        let fits = reserved_bytes + limits.bytes() <= 2_500;
        let expected = if fits {
            let (floor, active_ms) = (1, time_ms);
            let (applied, kept, fenced) = Default::default();
            self.models.insert(self.index, Model { limits, active_ms, floor, applied, kept, fenced });
            Ok(Controlled::Done)
        } else {
            Err(SessionRefusal::TableFull { reserved_bytes, table_bytes_max: 2_500 })
        };
        let found = self.table.control(Control::Register(limits), LogIndex(self.index), time_ms);
        self.told("register", &found, &expected)
    }

    fn close(&mut self, id: u64) -> Result<(), String> {
        let expected = match self.live(id) {
            Some(_) => {
                self.models.remove(&id);
                Ok(Controlled::Done)
            }
            None => Err(SessionRefusal::Expired),
        };
        let found = self.table.control(Control::Close { session: id }, LogIndex(self.index), self.time_ms);
        self.told("close", &found, &expected)
    }

    fn acknowledge(&mut self, id: u64, through: u64) -> Result<(), String> {
        let expected = match self.live(id) {
            Some(model) => {
                model.floor = model.floor.max(through + 1);
                Ok(())
            }
            None => Err(SessionRefusal::Expired),
        };
        let found = acknowledge(&mut self.table, id, through, self.time_ms);
        self.told("acknowledge", &found, &expected)
    }

    fn resolve(&mut self, id: u64, sequence: u64) -> Result<(), String> {
        let expected = match self.live(id) {
            None => Err(SessionRefusal::Expired),
            Some(model) => match (model.refusal(sequence), model.answer(sequence)) {
                (Some(refusal), _) => Err(refusal),
                (None, Some(answer)) => Ok(Some(answer)),
                (None, None) => {
                    model.fenced.push(sequence);
                    Err(SessionRefusal::Fenced)
                }
            },
        };
        let found = resolve(&mut self.table, id, sequence, self.time_ms);
        self.told("resolve", &found, &expected)
    }

    fn command(&mut self, id: u64, sequence: u64) -> Result<(), String> {
        let bytes = self.random.below(16) * self.random.below(4);
        let index = self.index;
        let reply = vec![index as u8; bytes as usize];
        let expected = match self.live(id) {
            None => Err(SessionRefusal::Expired),
            Some(model) => match (model.refusal(sequence), model.answer(sequence)) {
                (Some(refusal), _) => Err(refusal),
                (None, Some(answer)) => Ok(Some(answer)),
                (None, None) if model.fenced.contains(&sequence) => Err(SessionRefusal::Fenced),
                (None, None) => {
                    if reply.len() <= model.limits.reply_bytes_max as usize {
                        model.kept.push(sequence);
                    }
                    model.applied.insert(sequence, (index, reply.clone()));
                    Ok(None)
                }
            },
        };
        let found = apply(&mut self.table, (id, sequence), index, &reply, self.time_ms);
        self.told("command", &found, &expected)
    }

    /// What must hold of the table by itself.
    fn check(&self) -> Result<(), String> {
        let mut bytes = Vec::new();
        self.table.encode(&mut bytes);
        let back = SessionTable::decode(&bytes).map_err(|error| error.to_string())?;
        self.told("decoded", &back, &self.table)?;
        let mut again = Vec::new();
        back.encode(&mut again);
        self.told("encoded again", &again, &bytes)?;
        let reserved: u64 = self.table.sessions.iter().map(|(_, entry)| entry.limits_bytes()).sum();
        self.told("reserved", &self.table.reserved_bytes(), &reserved)?;
        for (_, entry) in &self.table.sessions {
            let room = entry.replies.bytes.capacity();
            if room > entry.replies.bytes_max as usize {
                return Err(format!("replies take {room} of {} bytes", entry.replies.bytes_max));
            }
            let seen = entry.slots.iter().filter(|slot| slot.state != SlotState::Empty).count();
            self.told("seen", &(entry.seen as usize), &seen)?;
            let kept = entry.slots.iter().filter(|slot| slot.reply_bytes > 0).count();
            self.told("kept", &(entry.kept as usize), &kept)?;
        }
        Ok(())
    }
}

fn run(seed: u64) -> Result<(), String> {
    let mut world = World::new(seed);
    for step in 0..600 {
        world.step()?;
        if step % 20 == 0 {
            world.check()?;
            // A member that starts from a snapshot goes on as the others do.
            let mut bytes = Vec::new();
            world.table.encode(&mut bytes);
            if world.random.below(2) == 0 {
                world.table = SessionTable::decode(&bytes).map_err(|error| error.to_string())?;
            }
        }
    }
    Ok(())
}

#[test]
fn three_hundred_random_logs_leave_what_a_model_that_forgets_nothing_expects() {
    for seed in 0..300 {
        run(seed).unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
    }
}

/// The fourth of the bugs of sessions is in the clock that the table is told, not in the table.
#[test]
fn each_bug_of_the_table_that_is_put_back_is_noticed() {
    for mutant in [Mutant::SessionFloorIgnored, Mutant::ReplyNotCached, Mutant::FenceNotRemembered] {
        mutants::set(Some(mutant));
        let noticed = (0..20).filter(|seed| run(*seed).is_err()).count();
        mutants::set(None);
        assert!(noticed >= 10, "{mutant:?} was noticed by {noticed} of 20 seeds");
    }
}

#[test]
fn a_damaged_table_is_refused_or_another_table_and_never_a_panic() {
    let mut world = World::new(7);
    let mut bytes = Vec::new();
    while world.table.len() < 4 || bytes.len() < 600 {
        world.step().expect("as the model says");
        bytes.clear();
        world.table.encode(&mut bytes);
    }
    for length in 0..bytes.len() {
        assert!(SessionTable::decode(&bytes[..length]).is_err(), "cut to {length}");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert_eq!(SessionTable::decode(&longer), Err(SessionTableError::Length));
    let mut refused = 0;
    for at in 0..bytes.len() {
        for flip in [1, 0x80, 0xff] {
            let mut other = bytes.clone();
            other[at] ^= flip;
            match SessionTable::decode(&other) {
                Ok(table) => {
                    let mut again = Vec::new();
                    table.encode(&mut again);
                    assert_eq!(again.len(), other.len(), "byte {at} changed by {flip:#x}");
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 100, "{refused} changes were refused");
}

#[test]
fn the_bytes_of_a_table_are_these() {
    let mut table = SessionTable::default();
    register(&mut table, 5, LIMITS, 7);
    assert_eq!(apply(&mut table, (5, 2), 6, b"ok", 8), Ok(None));
    assert_eq!(resolve(&mut table, 5, 1, 9), Err(SessionRefusal::Fenced));
    let mut bytes = Vec::new();
    table.encode(&mut bytes);
    let words: Vec<String> = bytes
        .chunks(8)
        .map(|word| word.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
        .collect();
    let expected = [
        "5252736501000000", // magic, version
        "0100000000000000", // sessions
        "0500000000000000", // id
        "e803000000000000", // time-out
        "0900000000000000", // last activity
        "0100000000000000", // floor
        "0200000000000000", // end of replies
        "0400000014000000", // window, bound of replies
        "0200000002000000", // bytes of replies, slots
        "0100000000000000", // sequence 1
        "0000000000000000",
        "0000000000000000",
        "0000000000000000",
        "0000000003000000", // fenced
        "0200000000000000", // sequence 2
        "0600000000000000", // index
        "0100000000000000", // term
        "0000000000000000", // where the reply begins
        "0200000001000000", // its bytes; applied
        "6f6b",
    ];
    assert_eq!(words, expected);
}
