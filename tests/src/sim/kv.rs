//! The service that the simulated clients use: a few keys, each holding a number.
//!
//! A list that is appended to is held as the hash of its items in order: it tells as much as the list does, and is as cheap
//! to copy as a number.

use super::linearizable::Model;
use super::rng::Rng;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// How many keys there are. Few, so that clients meet.
pub const KEYS: usize = 5;

/// What is asked of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Answers the value.
    Get,
    /// Sets it. Answers 0.
    Put {
        /// The value.
        value: u64,
    },
    /// Sets it if it is as expected. Answers the value found.
    Cas {
        /// The value that must be there.
        expected: u64,
        /// The value to set.
        new: u64,
    },
    /// Appends an item to the list. Answers the list.
    Append {
        /// The item.
        item: u64,
    },
}

/// The list `value` with `item` appended.
#[must_use]
pub fn appended(value: u64, item: u64) -> u64 {
    (value ^ item.wrapping_mul(0x9e37_79b9_7f4a_7c15)).rotate_left(29).wrapping_mul(0xd134_2543_de82_ef95) | 1
}

impl Operation {
    /// The value after it, and its answer.
    #[must_use]
    pub fn apply(self, value: u64) -> (u64, u64) {
        match self {
            Self::Get => (value, value),
            Self::Put { value } => (value, 0),
            Self::Cas { expected, new } => (if value == expected { new } else { value }, value),
            Self::Append { item } => {
                let list = appended(value, item);
                (list, list)
            }
        }
    }

    /// Whether it changes nothing.
    #[must_use]
    pub fn reads(self) -> bool {
        matches!(self, Self::Get)
    }

    fn encode(self) -> (u8, u64, u64) {
        match self {
            Self::Get => (0, 0, 0),
            Self::Put { value } => (1, value, 0),
            Self::Cas { expected, new } => (2, expected, new),
            Self::Append { item } => (3, item, 0),
        }
    }

    fn decode(kind: u8, a: u64, b: u64) -> Option<Self> {
        Some(match kind {
            0 => Self::Get,
            1 => Self::Put { value: a },
            2 => Self::Cas { expected: a, new: b },
            3 => Self::Append { item: a },
            _ => return None,
        })
    }
}

/// One key, for the checker.
pub struct Register;

impl Model for Register {
    type State = u64;
    type Operation = Operation;
    type Reply = u64;

    fn initial() -> u64 {
        0
    }

    fn step(state: &u64, operation: &Operation, reply: Option<&u64>) -> Option<u64> {
        let (after, answer) = operation.apply(*state);
        reply.is_none_or(|reply| *reply == answer).then_some(after)
    }

    fn fingerprint(state: &u64) -> u64 {
        *state
    }
}

/// A client's command: its number and the client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CommandId {
    /// The client, from 0.
    pub client: usize,
    /// Its command, from 0.
    pub sequence: usize,
}

/// What a command of the log says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// Whose.
    pub id: CommandId,
    /// Which key, below [`KEYS`].
    pub key: u8,
    /// What is to be done with it.
    pub operation: Operation,
}

/// Bytes of a command before its padding.
pub const HEAD_BYTES: usize = 40;

impl Command {
    /// The command's bytes, into `out`: the id, a checksum, what is to be done, and padding that follows from the id.
    pub fn encode(&self, padding: usize, out: &mut Vec<u8>) {
        let (kind, a, b) = self.operation.encode();
        out.clear();
        out.extend_from_slice(&(self.id.client as u32).to_le_bytes());
        out.extend_from_slice(&(self.id.sequence as u32).to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(&[kind, self.key, 0, 0, 0, 0, 0, 0]);
        out.extend_from_slice(&a.to_le_bytes());
        out.extend_from_slice(&b.to_le_bytes());
        let pattern = Rng::new(self.id.client as u64 ^ (self.id.sequence as u64) << 20).bits() | 1;
        let words = padding / 8;
        out.resize(HEAD_BYTES + padding, pattern as u8);
        let (tail, _) = out[HEAD_BYTES..].as_chunks_mut::<8>();
        let mut word = pattern;
        for chunk in &mut tail[..words] {
            *chunk = word.to_le_bytes();
            word = word.wrapping_add(pattern);
        }
        let sum = checksum(out);
        out[8..16].copy_from_slice(&sum.to_le_bytes());
    }

    /// The command, if its bytes are whole.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (head, _) = bytes.split_at_checked(HEAD_BYTES)?;
        let word = |at: usize| Some(u64::from_le_bytes(head.get(at..at + 8)?.try_into().ok()?));
        let id = word(0)?;
        if checksum(bytes) != word(8)? {
            return None;
        }
        let id = CommandId { client: (id & 0xffff_ffff) as usize, sequence: (id >> 32) as usize };
        let operation = Operation::decode(head[16], word(24)?, word(32)?)?;
        (usize::from(head[17]) < KEYS).then_some(Self { id, key: head[17], operation })
    }
}

fn checksum(bytes: &[u8]) -> u64 {
    let id = bytes.first_chunk().map_or(0, |id| u64::from_le_bytes(*id));
    xxh3_64_with_seed(&bytes[16..], id ^ (bytes.len() as u64) << 40)
}

/// The values of all keys: a node's state machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Store {
    values: [u64; KEYS],
}

impl Store {
    /// The values of all keys, in order.
    pub fn values(&self) -> impl Iterator<Item = u64> + '_ {
        self.values.iter().copied()
    }

    /// The value of a key.
    #[must_use]
    pub fn value(&self, key: u8) -> u64 {
        self.values.get(usize::from(key)).copied().unwrap_or(0)
    }

    /// A store of these values; what follows them is left. None if there are too few.
    pub fn of_values(mut values: impl Iterator<Item = u64>) -> Option<Self> {
        let mut store = Self::default();
        for value in &mut store.values {
            *value = values.next()?;
        }
        Some(store)
    }

    /// Carries out a command.
    pub fn apply(&mut self, command: &Command) -> u64 {
        let value = &mut self.values[usize::from(command.key)];
        let (after, reply) = command.operation.apply(*value);
        *value = after;
        reply
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_recognised_and_a_damaged_one_is_not() {
        let id = CommandId { client: 3, sequence: 70_000 };
        let operations = [
            Operation::Get,
            Operation::Put { value: 9 },
            Operation::Cas { expected: 1, new: u64::MAX },
            Operation::Append { item: 4 },
        ];
        for (operation, padding) in operations.into_iter().zip([0, 1, 100, 4001]) {
            let command = Command { id, key: 2, operation };
            let mut bytes = Vec::new();
            command.encode(padding, &mut bytes);
            assert_eq!(bytes.len(), HEAD_BYTES + padding);
            assert_eq!(Command::decode(&bytes), Some(command));
            for at in [0, 9, 17, 24, bytes.len() - 1] {
                bytes[at] ^= 1;
                assert_eq!(Command::decode(&bytes), None, "byte {at}");
                bytes[at] ^= 1;
            }
        }
        assert_eq!(Command::decode(&[]), None);
    }

    #[test]
    fn lists_with_other_items_or_another_order_differ() {
        let list = |items: &[u64]| items.iter().fold(0, |list, item| appended(list, *item));
        assert_ne!(list(&[1, 2]), list(&[2, 1]));
        assert_ne!(list(&[1]), list(&[1, 1]));
        assert_ne!(list(&[0]), list(&[]));
    }
}
