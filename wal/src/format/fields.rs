//! Fixed little-endian structs, each declared once: the declaration gives the encoder, the decoder, the field
//! table that the golden tests print, and the numbers that enter the format fingerprint.
//!
//! Decoding a fixed array never fails and never panics; what the values mean is checked by the callers.

use super::Chain;
use ringraft_block::{ClusterId, GroupId, Incarnation, LogIndex, NodeId, Term};

/// Where a field lies in its struct.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldAt {
    /// The field's name.
    pub name: &'static str,
    /// Offset of its first byte.
    pub at: usize,
    /// Its width.
    pub bytes: usize,
}

/// A value of fixed width, little-endian.
pub(super) trait Field: Sized {
    const BYTES: usize;
    fn put(&self, out: &mut [u8]);
    fn get(bytes: &[u8]) -> Self;
}

macro_rules! integer_field {
    ($($integer:ty),*) => {$(
        impl Field for $integer {
            const BYTES: usize = size_of::<$integer>();
            fn put(&self, out: &mut [u8]) {
                out.copy_from_slice(&self.to_le_bytes());
            }
            fn get(bytes: &[u8]) -> Self {
                let mut array = [0; size_of::<$integer>()];
                array.copy_from_slice(bytes);
                Self::from_le_bytes(array)
            }
        }
    )*};
}

integer_field!(u8, u16, u32, u64, u128);

macro_rules! newtype_field {
    ($($newtype:ident($inner:ty)),*) => {$(
        impl Field for $newtype {
            const BYTES: usize = size_of::<$inner>();
            fn put(&self, out: &mut [u8]) {
                self.0.put(out);
            }
            fn get(bytes: &[u8]) -> Self {
                Self(<$inner>::get(bytes))
            }
        }
    )*};
}

newtype_field!(
    ClusterId(u128),
    Incarnation(u128),
    NodeId(u64),
    Term(u64),
    LogIndex(u64),
    GroupId(u32),
    Chain([u8; 16])
);

impl<const N: usize> Field for [u8; N] {
    const BYTES: usize = N;
    fn put(&self, out: &mut [u8]) {
        out.copy_from_slice(self);
    }
    fn get(bytes: &[u8]) -> Self {
        let mut array = [0; N];
        array.copy_from_slice(bytes);
        array
    }
}

/// Declares a struct of exactly so many bytes, its fields one behind the other.
macro_rules! layout {
    ($(#[$doc:meta])* $name:ident: $bytes:literal { $($field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) struct $name {
            $(pub(super) $field: $type,)*
        }

        impl $name {
            pub(super) const BYTES: usize = $bytes;
            pub(super) const FIELDS: &'static [FieldAt] = &{
                const WIDTHS: &[usize] = &[$(<$type as Field>::BYTES),*];
                let mut fields = [$(FieldAt {
                    name: stringify!($field),
                    at: 0,
                    bytes: <$type as Field>::BYTES,
                }),*];
                let mut ordinal = 0;
                let mut at = 0;
                while ordinal < WIDTHS.len() {
                    fields[ordinal].at = at;
                    at += WIDTHS[ordinal];
                    ordinal += 1;
                }
                assert!(at == $bytes, "the fields fill the struct exactly");
                fields
            };

            pub(super) fn encode(&self) -> [u8; $bytes] {
                let mut out = [0; $bytes];
                let mut rest = &mut out[..];
                $(
                    let (field, behind) = rest.split_at_mut(<$type as Field>::BYTES);
                    self.$field.put(field);
                    rest = behind;
                )*
                debug_assert!(rest.is_empty());
                out
            }

            pub(super) fn decode(bytes: &[u8; $bytes]) -> Self {
                let mut rest = &bytes[..];
                $(
                    let (field, behind) = rest.split_at(<$type as Field>::BYTES);
                    let $field = <$type as Field>::get(field);
                    rest = behind;
                )*
                debug_assert!(rest.is_empty());
                Self { $($field,)* }
            }
        }
    };
}
pub(super) use layout;
