//! crc32c (Castagnoli), by the processor's instruction where there is one.

use crate::SECTOR_BYTES;

/// From so many bytes on the crate's way is quicker, which works on three parts of them side by side. Fewer are most of what is
/// checked here, but for the sectors of images.
const LONG_BYTES_MIN: usize = 768;

/// The crc32c of `bytes`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c_append(0, bytes)
}

/// The crc32c of what `crc` covered, followed by `bytes`.
#[must_use]
pub fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if bytes.len() < LONG_BYTES_MIN && std::arch::is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor has the one feature that the function needs.
        return unsafe { sse42::append(crc, bytes) };
    }
    crc32c::crc32c_append(crc, bytes)
}

/// Hands the number and the checksum of every sector of `bytes` to `each`, in order. The sectors are numbered from `first`, and
/// the last may be shorter. A sector's checksum is the crc32c of what `seed` covered, followed by the sector's number
/// (little-endian) and its bytes.
///
/// Within one checksum every step waits for the one before it. Those of several sectors do not wait for each other, so
/// they are computed side by side, which takes a third of the time.
pub fn crc32c_sectors(seed: u32, first: u32, bytes: &[u8], mut each: impl FnMut(u32, u32)) {
    let mut number = first;
    let mut hand_on = |checksum| {
        each(number, checksum);
        number = number.wrapping_add(1);
    };
    let (sectors, _) = bytes.as_chunks::<SECTOR_BYTES>();
    let (threes, _) = sectors.as_chunks::<3>();
    let mut next = first;
    for three in threes {
        side_by_side(seed, next, three).into_iter().for_each(&mut hand_on);
        next = next.wrapping_add(3);
    }
    let rest = bytes.get(threes.len() * 3 * SECTOR_BYTES..).unwrap_or_default();
    for part in rest.chunks(SECTOR_BYTES) {
        hand_on(crc32c_numbered(seed, next, part));
        next = next.wrapping_add(1);
    }
}

/// The crc32c of what `seed` covered, followed by `number` (little-endian) and `bytes`.
#[must_use]
pub fn crc32c_numbered(seed: u32, number: u32, bytes: &[u8]) -> u32 {
    crc32c_append(crc32c_append(seed, &number.to_le_bytes()), bytes)
}

/// The checksums of three sectors, numbered from `first`.
fn side_by_side(seed: u32, first: u32, sectors: &[[u8; SECTOR_BYTES]; 3]) -> [u32; 3] {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor has the one feature that the function needs.
        return unsafe { sse42::side_by_side(seed, first, sectors) };
    }
    one_by_one(seed, first, sectors)
}

/// The same on any processor.
fn one_by_one(seed: u32, first: u32, sectors: &[[u8; SECTOR_BYTES]; 3]) -> [u32; 3] {
    let [a, b, c] = sectors;
    let of = |at, sector: &[u8]| crc32c_numbered(seed, first.wrapping_add(at), sector);
    [of(0, a), of(1, b), of(2, c)]
}

#[cfg(target_arch = "x86_64")]
mod sse42 {
    use crate::SECTOR_BYTES;
    use std::arch::x86_64::{_mm_crc32_u8, _mm_crc32_u32, _mm_crc32_u64};

    /// One instruction after the other: without the preparations that pay for long pieces.
    #[target_feature(enable = "sse4.2")]
    pub(super) fn append(crc: u32, bytes: &[u8]) -> u32 {
        let (words, rest) = bytes.as_chunks::<8>();
        // The instruction works on the complement of the checksum.
        let mut state = u64::from(!crc);
        for word in words {
            state = _mm_crc32_u64(state, u64::from_le_bytes(*word));
        }
        let (halves, rest) = rest.as_chunks::<4>();
        let mut state = state as u32;
        for half in halves {
            state = _mm_crc32_u32(state, u32::from_le_bytes(*half));
        }
        for byte in rest {
            state = _mm_crc32_u8(state, *byte);
        }
        !state
    }

    /// The instruction takes a new operand in every cycle and has its result three cycles later, so three chains keep it busy.
    /// They are written out, so that each stays in a register whatever the optimiser makes of loops over them.
    #[target_feature(enable = "sse4.2")]
    pub(super) fn side_by_side(seed: u32, first: u32, sectors: &[[u8; SECTOR_BYTES]; 3]) -> [u32; 3] {
        let [a, b, c] = sectors;
        let (a, b, c) = (a.as_chunks::<8>().0, b.as_chunks::<8>().0, c.as_chunks::<8>().0);
        // The instruction works on the complement of the checksum.
        let mut state_a = u64::from(_mm_crc32_u32(!seed, first));
        let mut state_b = u64::from(_mm_crc32_u32(!seed, first.wrapping_add(1)));
        let mut state_c = u64::from(_mm_crc32_u32(!seed, first.wrapping_add(2)));
        for ((a, b), c) in a.iter().zip(b).zip(c) {
            state_a = _mm_crc32_u64(state_a, u64::from_le_bytes(*a));
            state_b = _mm_crc32_u64(state_b, u64::from_le_bytes(*b));
            state_c = _mm_crc32_u64(state_c, u64::from_le_bytes(*c));
        }
        [!(state_a as u32), !(state_b as u32), !(state_c as u32)]
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

    #[test]
    fn a_checksum_is_that_of_the_crate_at_every_length_and_alignment() {
        let bytes = noise(2 * LONG_BYTES_MIN);
        for length in (0..100).chain(LONG_BYTES_MIN - 20..LONG_BYTES_MIN + 20) {
            for at in 0..16 {
                let bytes = &bytes[at..at + length];
                let crc = 0x1234_5678 ^ length as u32;
                assert_eq!(crc32c(bytes), crc32c::crc32c(bytes), "{length} bytes at {at}");
                assert_eq!(
                    crc32c_append(crc, bytes),
                    crc32c::crc32c_append(crc, bytes),
                    "{length} bytes at {at}"
                );
            }
        }
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
                    .map(|(sector, number)| (number, crc32c_numbered(seed, number, sector)))
                    .collect();
                assert_eq!(found, expected, "{length} bytes at {at}");
            }
        }
    }

    #[test]
    fn a_processor_without_the_instruction_computes_the_same() {
        let bytes = noise(3 * SECTOR_BYTES + 5);
        let (sectors, _) = bytes[5..].as_chunks::<SECTOR_BYTES>();
        let (threes, _) = sectors.as_chunks::<3>();
        for (seed, first) in [(0, 0), (!0, 7), (0x8000_0001, u32::MAX - 1)] {
            assert_eq!(side_by_side(seed, first, &threes[0]), one_by_one(seed, first, &threes[0]));
        }
    }
}
