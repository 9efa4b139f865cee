//! Makes the checksums of altered bytes fit again, so that a target reaches the rules behind them. Written from the description of the
//! layouts, not from the code that it is used to test; the targets check that on valid encodings it changes nothing.

use ringraft_block::{crc32c, crc32c_append};
use ringraft_wal::format::{IMAGE_HEADER_BYTES, LAYOUTS};
use std::ops::Range;

const SECTOR: usize = 512;

/// Where a field of a layout lies.
pub(crate) fn field(layout: &str, field: &str) -> Range<usize> {
    let (_, fields) = LAYOUTS.iter().find(|(name, _)| *name == layout).expect("the layout has a name");
    let field = fields.iter().find(|at| at.name == field).expect("the layout has the field");
    field.at..field.at + field.bytes
}

/// The number in a field of up to 8 bytes.
pub(crate) fn number(bytes: &[u8], range: Range<usize>) -> u64 {
    bytes[range].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Sets the checksum of a struct that is covered as a whole, its own field taken as zero.
pub(crate) fn reseal_struct(bytes: &mut [u8], layout: &str) {
    let crc = field(layout, "crc");
    if bytes.len() < crc.end {
        return;
    }
    bytes[crc.clone()].fill(0);
    let sum = crc32c(bytes);
    bytes[crc].copy_from_slice(&sum.to_le_bytes());
}

/// Where an image's checksum table begins: one checksum for each sector of what comes before it.
pub(crate) fn checksums_at(image_bytes: usize) -> usize {
    image_bytes - 4 * image_bytes.div_ceil(SECTOR + 4)
}

/// Sets all checksums of an image.
pub(crate) fn reseal_image(image: &mut [u8]) {
    if image.len() < IMAGE_HEADER_BYTES + 8 {
        return;
    }
    let mut identity = Vec::new();
    for name in ["group", "term", "first"] {
        identity.extend_from_slice(&image[field("image header", name)]);
    }
    let seed = crc32c(&identity);
    let at = checksums_at(image.len());
    let (content, table) = image.split_at_mut(at);
    let mut start = IMAGE_HEADER_BYTES.min(at);
    for (ordinal, checksum) in (0u32..).zip(table.chunks_exact_mut(4)) {
        let end = at.min((ordinal as usize + 1) * SECTOR);
        let sum = crc32c_append(crc32c_append(seed, &ordinal.to_le_bytes()), &content[start..end]);
        checksum.copy_from_slice(&(if sum == 0 { !0 } else { sum }).to_le_bytes());
        start = end;
    }
    let crc = field("image header", "header_crc");
    content[crc.clone()].fill(0);
    let sum = crc32c_append(seed, &u32::MAX.to_le_bytes());
    let sum = crc32c_append(crc32c_append(sum, &content[..IMAGE_HEADER_BYTES]), table);
    content[crc].copy_from_slice(&sum.to_le_bytes());
}
