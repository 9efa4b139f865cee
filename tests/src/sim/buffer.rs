//! The memory that simulated disks and links work with.
//!
//! Buffers of hundreds of kilobytes come and go by the thousand in a run, and most are filled at once: they are used again
//! rather than released, and are not zeroed for it. What an earlier use left in one is as good as what a pool's
//! block holds. It comes from the same run ([`begin_run`]), so the same seed finds the same there.
//!
//! Most of what is read from a disk are segments that are blank behind some batches: a buffer knows where its zeros begin, so
//! that they are not written over and over again ([`SimBuf::read_into`]).

use ringraft_block::{AlignedBuf, BLOCK_BYTES, BlockBuf};
use std::cell::RefCell;

thread_local! {
    /// `[c]` holds buffers of `BLOCK_BYTES << c` bytes, each with where its zeros begin.
    static SPARE: RefCell<Vec<Vec<(AlignedBuf, usize)>>> = const { RefCell::new(Vec::new()) };
}

/// A run begins: it finds nothing of an earlier one.
pub fn begin_run() {
    SPARE.with_borrow_mut(Vec::clear);
}

/// A buffer that goes back to where it came from.
pub struct SimBuf {
    /// Always present until `drop`.
    memory: Option<AlignedBuf>,
    /// From here on there are only zeros.
    blank_from: usize,
}

impl SimBuf {
    /// A buffer of at least `bytes`. Its content is whatever an earlier use in this run left in it.
    #[must_use]
    pub fn take(bytes: usize) -> Self {
        let class = class_of(bytes);
        let spare = SPARE.with_borrow_mut(|spare| spare.get_mut(class).and_then(Vec::pop));
        let (memory, blank_from) = spare.unwrap_or_else(|| (AlignedBuf::zeroed(BLOCK_BYTES << class), 0));
        Self { memory: Some(memory), blank_from }
    }

    /// Puts `bytes` at the start of the buffer: those that `content` fills, `content_bytes` of them, and zeros. What is behind
    /// stays.
    pub fn read_into(&mut self, bytes: usize, content_bytes: usize, content: impl FnOnce(&mut [u8])) {
        let blank_from = self.blank_from;
        let memory = self.memory.as_mut().expect("a buffer has its memory until it is dropped").bytes_mut();
        content(&mut memory[..content_bytes]);
        if let Some(stale) = memory.get_mut(content_bytes..blank_from.min(bytes)) {
            stale.fill(0);
        }
        self.blank_from = if blank_from > bytes { blank_from } else { content_bytes };
    }
}

/// The smallest class that holds `bytes`.
fn class_of(bytes: usize) -> usize {
    bytes.max(1).div_ceil(BLOCK_BYTES).next_power_of_two().trailing_zeros() as usize
}

impl BlockBuf for SimBuf {
    fn bytes(&self) -> &[u8] {
        self.memory.as_ref().expect("a buffer has its memory until it is dropped").bytes()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let bytes = self.memory.as_mut().expect("a buffer has its memory until it is dropped").bytes_mut();
        self.blank_from = bytes.len();
        bytes
    }
}

impl Drop for SimBuf {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        let class = class_of(memory.bytes().len());
        // When the thread ends, the spares may be gone already.
        let _ = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() <= class {
                spare.resize_with(class + 1, Vec::new);
            }
            spare[class].push((memory, self.blank_from));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::rng::Rng;
    use super::*;

    #[test]
    fn a_buffer_is_used_again_in_its_run_and_a_new_run_finds_zeros() {
        begin_run();
        let mut buffer = SimBuf::take(3 * BLOCK_BYTES);
        assert_eq!(buffer.bytes().len(), 4 * BLOCK_BYTES);
        buffer.bytes_mut().fill(7);
        drop(buffer);
        assert!(SimBuf::take(BLOCK_BYTES).bytes().iter().all(|byte| *byte == 0), "of another size");
        assert!(SimBuf::take(4 * BLOCK_BYTES).bytes().iter().all(|byte| *byte == 7));
        begin_run();
        assert!(SimBuf::take(4 * BLOCK_BYTES).bytes().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_is_read_into_a_buffer_is_all_that_is_there_whatever_was_before() {
        begin_run();
        let random = |rng: &mut Rng, most: usize| rng.index(most + 1);
        let mut rng = Rng::new(7);
        let mut expected = vec![0; 4 * BLOCK_BYTES];
        for round in 1..=2_000_u32 {
            // It goes back and is taken again each time.
            let mut buffer = SimBuf::take(expected.len());
            assert!(buffer.bytes() == expected, "round {round}");
            if rng.chance(200_000) {
                let at = rng.index(expected.len());
                (buffer.bytes_mut()[at], expected[at]) = (round as u8, round as u8);
                continue;
            }
            let bytes = random(&mut rng, expected.len());
            let content_bytes = random(&mut rng, bytes);
            buffer.read_into(bytes, content_bytes, |content| {
                assert_eq!(content.len(), content_bytes);
                content.fill(round as u8 | 1);
            });
            expected[..content_bytes].fill(round as u8 | 1);
            expected[content_bytes..bytes].fill(0);
        }
    }
}
