//! What an entry of a batch of kind session control says. Fixed width, little-endian; the layout is pinned by a test.

use super::SessionLimits;
use bytes::Bytes;

/// A request about sessions, in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Control {
    /// Opens a session, whose id is the index of this entry.
    Register(SessionLimits),
    /// The client will not ask for sequences up to this one, inclusive. Also what keeps an idle session alive.
    Acknowledge { session: u64, through: u64 },
    /// Answers what became of the sequence, and keeps it from being applied later.
    Resolve { session: u64, sequence: u64 },
    /// Forgets the session.
    Close { session: u64 },
}

const REGISTER: u8 = 1;
const ACKNOWLEDGE: u8 = 2;
const RESOLVE: u8 = 3;
const CLOSE: u8 = 4;

/// Of each kind by itself; the first byte is the kind, the second the version, six are reserved.
const VERSION: u8 = 1;

/// The most that a request takes.
pub(crate) const CONTROL_BYTES_MAX: usize = 32;

impl Control {
    pub(crate) fn encode(self) -> Bytes {
        let mut out = Vec::with_capacity(CONTROL_BYTES_MAX);
        let mut put = |kind: u8, fields: &[u64]| {
            out.extend([kind, VERSION, 0, 0, 0, 0, 0, 0]);
            fields.iter().for_each(|field| out.extend(field.to_le_bytes()));
        };
        match self {
            Self::Register(limits) => {
                let sizes = u64::from(limits.window) | u64::from(limits.reply_bytes_max) << 32;
                put(REGISTER, &[limits.timeout_ms, limits.table_bytes_max, sizes]);
            }
            Self::Acknowledge { session, through } => put(ACKNOWLEDGE, &[session, through]),
            Self::Resolve { session, sequence } => put(RESOLVE, &[session, sequence]),
            Self::Close { session } => put(CLOSE, &[session]),
        }
        out.into()
    }

    /// `None` when this version does not know it.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (head, fields) = bytes.split_first_chunk::<8>()?;
        if head[1..] != [VERSION, 0, 0, 0, 0, 0, 0] {
            return None;
        }
        let (fields, rest) = fields.as_chunks::<8>();
        if !rest.is_empty() {
            return None;
        }
        let field = |at: usize| fields.get(at).map_or(0, |bytes| u64::from_le_bytes(*bytes));
        match (head[0], fields.len()) {
            (REGISTER, 3) => Some(Self::Register(SessionLimits {
                timeout_ms: field(0),
                table_bytes_max: field(1),
                window: field(2) as u32,
                reply_bytes_max: (field(2) >> 32) as u32,
            })),
            (ACKNOWLEDGE, 2) => Some(Self::Acknowledge { session: field(0), through: field(1) }),
            (RESOLVE, 2) => Some(Self::Resolve { session: field(0), sequence: field(1) }),
            (CLOSE, 1) => Some(Self::Close { session: field(0) }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        let groups: Vec<String> =
            bytes.chunks(8).map(|group| group.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
        groups.join(" ")
    }

    /// These bytes are in logs: another layout needs another version.
    #[test]
    fn the_layout_of_each_request_is_this() {
        let limits = SessionLimits {
            timeout_ms: 600_000,
            window: 256,
            reply_bytes_max: 16_384,
            table_bytes_max: 64 << 20,
        };
        let cases = [
            (
                Control::Register(limits),
                "0101000000000000 c027090000000000 0000000400000000 0001000000400000",
            ),
            (
                Control::Acknowledge { session: 0xabcd, through: 17 },
                "0201000000000000 cdab000000000000 1100000000000000",
            ),
            (
                Control::Resolve { session: 0xabcd, sequence: 18 },
                "0301000000000000 cdab000000000000 1200000000000000",
            ),
            (Control::Close { session: 0xabcd }, "0401000000000000 cdab000000000000"),
        ];
        for (control, expected) in cases {
            let encoded = control.encode();
            assert_eq!(hex(&encoded), expected, "{control:?}");
            assert!(encoded.len() <= CONTROL_BYTES_MAX);
            assert_eq!(Control::decode(&encoded), Some(control));
        }
    }

    #[test]
    fn what_this_version_does_not_know_is_not_guessed_at() {
        let good = Control::Resolve { session: 1, sequence: 2 }.encode();
        for length in 0..good.len() {
            assert_eq!(Control::decode(&good[..length]), None, "{length} bytes");
        }
        for at in 0..8 {
            let mut other = good.to_vec();
            other[at] ^= 0x40;
            assert_eq!(Control::decode(&other), None, "byte {at}");
        }
        let longer = [&good[..], &[0; 8]].concat();
        assert_eq!(Control::decode(&longer), None);
    }
}
