//! What the region of former checksums holds of a slot: the plain crc32c of each of its sectors, as cheaply as an append can have it.
//!
//! A full sector of an image has a checksum already: the crc32c of the batch's identity and its ordinal, continued over the
//! sector. A crc is linear, so the identity's part, moved on by 512 bytes, can be taken out again without a look at the bytes.

use super::image::{prefix_checksum, seed_for, stored_checksums};
use super::{ENVELOPE_BYTES, content_checksum};
use ringraft_block::{GroupId, LogIndex, SECTOR_BYTES, Term};

/// Castagnoli's polynomial, the lowest power in the highest bit.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// What becomes of each byte of a crc when a sector of zeros is put through.
static SHIFT: [[u32; 256]; 4] = {
    let mut bits = [0; 32];
    let mut bit = 0;
    while bit < 32 {
        let mut state = 1u32 << bit;
        let mut step = 0;
        while step < SECTOR_BYTES * 8 {
            state = if state & 1 == 1 { state >> 1 ^ POLYNOMIAL } else { state >> 1 };
            step += 1;
        }
        bits[bit] = state;
        bit += 1;
    }
    let mut table = [[0; 256]; 4];
    let mut at = 0;
    while at < 4 * 256 {
        let mut bit = 0;
        while bit < 8 {
            if ((at % 256) >> bit) & 1 == 1 {
                table[at / 256][at % 256] ^= bits[at / 256 * 8 + bit];
            }
            bit += 1;
        }
        at += 1;
    }
    table
};

/// Of a sector of zeros, such as the padding of a slot.
const BLANK: u32 = {
    let mut state = !0u32;
    let mut step = 0;
    while step < SECTOR_BYTES * 8 {
        state = if state & 1 == 1 { state >> 1 ^ POLYNOMIAL } else { state >> 1 };
        step += 1;
    }
    !state
};

fn shift(crc: u32) -> u32 {
    let bytes = crc.to_le_bytes();
    SHIFT[0][usize::from(bytes[0])]
        ^ SHIFT[1][usize::from(bytes[1])]
        ^ SHIFT[2][usize::from(bytes[2])]
        ^ SHIFT[3][usize::from(bytes[3])]
}

/// The [`content_checksum`] of every sector of a slot: envelope, image, padding, which is zeros. The image's own checksums are taken
/// for true; a slot of which one is wrong only gets a checksum that fits nothing.
pub(crate) fn slot_content_checksums(
    slot: &[u8],
    image_bytes: usize,
    (group, term, first): (GroupId, Term, LogIndex),
) -> impl Iterator<Item = u32> {
    let image = slot.get(ENVELOPE_BYTES..ENVELOPE_BYTES + image_bytes).unwrap_or_default();
    let (full, stored) = stored_checksums(image);
    let seed = seed_for(group, term, first);
    let padding = (ENVELOPE_BYTES + image_bytes).div_ceil(SECTOR_BYTES);
    slot.chunks_exact(SECTOR_BYTES).enumerate().map(move |(at, sector)| {
        if at >= padding {
            return BLANK;
        }
        // The first sector of the image holds its header, which that sector's checksum leaves out.
        let ordinal = at.wrapping_sub(ENVELOPE_BYTES / SECTOR_BYTES);
        let known = (1..full).contains(&ordinal).then(|| stored.get(ordinal)).flatten();
        match known.map(|stored| u32::from_le_bytes(*stored)) {
            // A checksum of 0 is stored as !0, so this is one of two.
            None | Some(u32::MAX) => content_checksum(sector),
            Some(stored) => stored ^ shift(prefix_checksum(seed, ordinal)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_of_padding_has_the_checksum_of_zeros() {
        assert_eq!(BLANK, content_checksum(&[0; SECTOR_BYTES]));
    }

    #[test]
    fn taking_a_prefix_out_of_a_checksum_leaves_that_of_the_rest() {
        for seed in [0u32, 1, 0x8000_0000, 0xdead_beef, u32::MAX] {
            let sector: Vec<u8> =
                (0..SECTOR_BYTES as u32).map(|at| (at.wrapping_mul(seed | 7) >> 3) as u8).collect();
            let prefix = ringraft_block::crc32c(&seed.to_le_bytes());
            let both = ringraft_block::crc32c_append(prefix, &sector);
            assert_eq!(both ^ shift(prefix), content_checksum(&sector));
        }
    }
}
