//! crc32c (Castagnoli), by the processor's instruction where there is one.

use crate::SECTOR_BYTES;

/// The crc32c of `bytes`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}

/// The crc32c of what `crc` covered, followed by `bytes`.
#[must_use]
pub fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc, bytes)
}

/// Hands the number and the checksum of every sector of `bytes` to `each`, in order. The sectors are numbered from `first`, and
/// the last may be shorter. A sector's checksum is the crc32c of what `seed` covered, followed by the sector's number
/// (little-endian) and its bytes.
///
/// Within one checksum every step waits for the one before it. Those of several sectors do not wait for each other, so
/// they are computed side by side, which takes a third of the time.
pub fn crc32c_sectors(seed: u32, first: u32, bytes: &[u8], mut each: impl FnMut(u32, u32)) {
    let (sectors, rest) = bytes.as_chunks::<SECTOR_BYTES>();
    let (fours, left) = sectors.as_chunks::<4>();
    let mut number = first;
    let mut hand_on = |checksums: &[u32]| {
        for checksum in checksums {
            each(number, *checksum);
            number = number.wrapping_add(1);
        }
        number
    };
    let mut next = first;
    for four in fours {
        next = hand_on(&side_by_side(seed, next, four.each_ref()));
    }
    match left {
        [a, b, c] => next = hand_on(&side_by_side(seed, next, [a, b, c])),
        [a, b] => next = hand_on(&side_by_side(seed, next, [a, b])),
        [a] => next = hand_on(&side_by_side(seed, next, [a])),
        _ => {}
    }
    if !rest.is_empty() {
        hand_on(&[numbered(seed, next, rest)]);
    }
}

/// The checksum of one sector or a part of one.
fn numbered(seed: u32, number: u32, bytes: &[u8]) -> u32 {
    crc32c_append(crc32c_append(seed, &number.to_le_bytes()), bytes)
}

/// The checksums of `N` sectors.
fn side_by_side<const N: usize>(seed: u32, first: u32, sectors: [&[u8; SECTOR_BYTES]; N]) -> [u32; N] {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor has the one feature that the function needs.
        return unsafe { sse42::side_by_side(seed, first, sectors) };
    }
    one_by_one(seed, first, sectors)
}

/// The same on any processor.
fn one_by_one<const N: usize>(seed: u32, first: u32, sectors: [&[u8; SECTOR_BYTES]; N]) -> [u32; N] {
    let mut number = first;
    sectors.map(|sector| {
        let checksum = numbered(seed, number, sector);
        number = number.wrapping_add(1);
        checksum
    })
}

#[cfg(target_arch = "x86_64")]
mod sse42 {
    use crate::SECTOR_BYTES;
    use std::arch::x86_64::{_mm_crc32_u32, _mm_crc32_u64};

    /// The instruction takes a new operand in every cycle and has its result three cycles later, so three or four sectors keep
    /// it busy.
    #[target_feature(enable = "sse4.2")]
    pub(super) fn side_by_side<const N: usize>(
        seed: u32,
        first: u32,
        sectors: [&[u8; SECTOR_BYTES]; N],
    ) -> [u32; N] {
        // The instruction works on the checksum's complement.
        let mut states = [0; N];
        for (at, state) in states.iter_mut().enumerate() {
            *state = u64::from(_mm_crc32_u32(!seed, first.wrapping_add(at as u32)));
        }
        let words = sectors.map(|sector| sector.as_chunks::<8>().0);
        for at in 0..SECTOR_BYTES / 8 {
            for (state, words) in states.iter_mut().zip(&words) {
                *state = _mm_crc32_u64(*state, u64::from_le_bytes(words[at]));
            }
        }
        states.map(|state| !(state as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_of_the_castagnoli_polynomial() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn appending_equals_one_pass() {
        assert_eq!(crc32c_append(crc32c(b"1234"), b"56789"), crc32c(b"123456789"));
    }

    fn noise(bytes: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..bytes).map(|_| next()).collect()
    }

    /// Every number of whole sectors and every length of the last, at every alignment.
    #[test]
    fn sectors_side_by_side_have_the_checksums_that_each_has_by_itself() {
        let bytes = noise(10 * SECTOR_BYTES);
        let lengths = (0..bytes.len() - 16).filter(|length| {
            let rest = length % SECTOR_BYTES;
            *length < 2 * SECTOR_BYTES || !(17..SECTOR_BYTES - 17).contains(&rest)
        });
        for length in lengths {
            for at in [0, 1, 2, 3, 4, 5, 6, 7, 8, 15] {
                let bytes = &bytes[at..at + length];
                let (seed, first) = (0x1234_5678 ^ length as u32, at as u32);
                let mut found = Vec::new();
                crc32c_sectors(seed, first, bytes, |number, checksum| found.push((number, checksum)));
                let expected: Vec<_> = bytes
                    .chunks(SECTOR_BYTES)
                    .zip(first..)
                    .map(|(sector, number)| (number, numbered(seed, number, sector)))
                    .collect();
                assert_eq!(found, expected, "{length} bytes at {at}");
            }
        }
    }

    #[test]
    fn a_processor_without_the_instruction_computes_the_same() {
        let bytes = noise(4 * SECTOR_BYTES + 3);
        let (sectors, _) = bytes[3..].as_chunks::<SECTOR_BYTES>();
        let [a, b, c, d] = sectors else { panic!("four sectors") };
        for (seed, first) in [(0, 0), (!0, 7), (0x8000_0001, u32::MAX - 1)] {
            assert_eq!(side_by_side(seed, first, [a, b, c, d]), one_by_one(seed, first, [a, b, c, d]));
            assert_eq!(side_by_side(seed, first, [d, b, a]), one_by_one(seed, first, [d, b, a]));
            assert_eq!(side_by_side(seed, first, [c]), one_by_one(seed, first, [c]));
        }
    }
}
