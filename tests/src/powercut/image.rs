//! The contents of a disk: sparse, cheap to copy.

use super::disk::SECTOR_BYTES;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

const CHUNK_BYTES: usize = 64 << 10;

const _: () = assert!(CHUNK_BYTES.is_multiple_of(SECTOR_BYTES));

/// The contents of a disk of a fixed size. A copy shares what neither side has changed since.
#[derive(Clone, Debug, Default)]
pub struct Image {
    bytes: u64,
    /// By chunk number; a chunk that is not there is zero.
    chunks: HashMap<u64, Arc<Vec<u8>>>,
}

impl Image {
    /// Zeros.
    #[must_use]
    pub fn zeroed(bytes: u64) -> Self {
        Self { bytes, chunks: HashMap::new() }
    }

    /// The contents of a file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn load(path: &Path) -> std::io::Result<Self> {
        let mut file = File::open(path)?;
        let mut image = Self::zeroed(file.metadata()?.len());
        for number in 0..image.bytes.div_ceil(CHUNK_BYTES as u64) {
            let left = image.bytes - number * CHUNK_BYTES as u64;
            let mut chunk = vec![0; CHUNK_BYTES];
            file.read_exact(&mut chunk[..left.min(CHUNK_BYTES as u64) as usize])?;
            if chunk.iter().any(|byte| *byte != 0) {
                image.chunks.insert(number, Arc::new(chunk));
            }
        }
        Ok(image)
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes it `bytes` long, which is no less than it is: the new bytes are zeros.
    pub(super) fn grow(&mut self, bytes: u64) {
        debug_assert!(bytes >= self.bytes);
        self.bytes = bytes;
    }

    /// Cuts it off at `bytes`, which is no more than it is.
    pub(super) fn cut_off(&mut self, bytes: u64) {
        debug_assert!(bytes <= self.bytes);
        self.bytes = bytes;
        self.chunks.retain(|number, _| number * (CHUNK_BYTES as u64) < bytes);
        let within = (bytes % CHUNK_BYTES as u64) as usize;
        if let Some(last) = self.chunks.get_mut(&(bytes / CHUNK_BYTES as u64)) {
            Arc::make_mut(last)[within..].fill(0);
        }
    }

    /// Whether `len` bytes at `offset` are within it.
    #[must_use]
    pub fn contains(&self, offset: u64, len: usize) -> bool {
        offset.checked_add(len as u64).is_some_and(|end| end <= self.bytes)
    }

    /// Fills `into` with the bytes at `offset`, which are within the image.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        debug_assert!(self.contains(offset, into.len()));
        let mut done = 0;
        for (number, within, len) in pieces(offset, into.len(), CHUNK_BYTES) {
            let part = &mut into[done..done + len];
            match self.chunks.get(&number) {
                Some(chunk) => part.copy_from_slice(&chunk[within..within + len]),
                None => part.fill(0),
            }
            done += len;
        }
    }

    /// Replaces the bytes at `offset`, which are within the image.
    pub fn write(&mut self, offset: u64, from: &[u8]) {
        debug_assert!(self.contains(offset, from.len()));
        let mut done = 0;
        for (number, within, len) in pieces(offset, from.len(), CHUNK_BYTES) {
            let chunk = self.chunks.entry(number).or_insert_with(|| Arc::new(vec![0; CHUNK_BYTES]));
            Arc::make_mut(chunk)[within..within + len].copy_from_slice(&from[done..done + len]);
            done += len;
        }
    }
}

/// `len` bytes at `offset`, cut at multiples of `unit`: for each piece the number of its unit, where in that it
/// begins, and its length.
pub(super) fn pieces(offset: u64, len: usize, unit: usize) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let within = (at % unit as u64) as usize;
        let piece = (unit - within).min(len - done);
        done += piece;
        Some((at / unit as u64, within, piece))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_across_chunks_is_read_back_and_the_rest_is_zero() {
        let mut image = Image::zeroed(4 * CHUNK_BYTES as u64);
        let text: Vec<u8> = (0..CHUNK_BYTES + 1000).map(|at| (at % 251) as u8 + 1).collect();
        let offset = CHUNK_BYTES as u64 - 500;
        image.write(offset, &text);
        let mut back = vec![7; text.len() + 2];
        image.read(offset - 1, &mut back);
        assert_eq!((back[0], back[text.len() + 1]), (0, 0));
        assert!(back[1..=text.len()] == text);
    }

    #[test]
    fn a_copy_does_not_change_with_the_original() {
        let mut image = Image::zeroed(CHUNK_BYTES as u64);
        image.write(0, b"old");
        let copy = image.clone();
        image.write(0, b"new");
        let mut back = [0; 3];
        copy.read(0, &mut back);
        assert_eq!(&back, b"old");
    }

    #[test]
    fn what_was_cut_off_is_zero_when_the_image_grows_again() {
        let mut image = Image::zeroed(3 * CHUNK_BYTES as u64);
        image.write(0, &vec![1; 3 * CHUNK_BYTES]);
        image.cut_off(CHUNK_BYTES as u64 + 7);
        image.grow(3 * CHUNK_BYTES as u64);
        let mut back = vec![9; 3 * CHUNK_BYTES];
        image.read(0, &mut back);
        assert!(back[..CHUNK_BYTES + 7].iter().all(|byte| *byte == 1));
        assert!(back[CHUNK_BYTES + 7..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn ranges_beyond_the_end_are_not_within_the_image() {
        let image = Image::zeroed(1000);
        assert!(image.contains(0, 1000) && image.contains(1000, 0));
        assert!(!image.contains(1, 1000) && !image.contains(u64::MAX, 1));
    }
}
