//! The memory that simulated disks and links work with.
//!
//! Buffers of hundreds of kilobytes come and go by the thousand in a run, and most are filled at once: they are used again
//! rather than released, and are not zeroed for it. What an earlier use left in one is as good as what a pool's
//! block holds. It comes from the same run ([`begin_run`]), so the same seed finds the same there.

use ringraft_block::{AlignedBuf, BLOCK_BYTES, BlockBuf};
use std::cell::RefCell;

thread_local! {
    /// `[c]` holds buffers of `BLOCK_BYTES << c` bytes.
    static SPARE: RefCell<Vec<Vec<AlignedBuf>>> = const { RefCell::new(Vec::new()) };
}

/// A run begins: it finds nothing of an earlier one.
pub fn begin_run() {
    SPARE.with_borrow_mut(Vec::clear);
}

/// A buffer that goes back to where it came from.
pub struct SimBuf {
    /// Always present until `drop`.
    memory: Option<AlignedBuf>,
}

impl SimBuf {
    /// A buffer of at least `bytes`. Its content is whatever an earlier use in this run left in it.
    #[must_use]
    pub fn take(bytes: usize) -> Self {
        let class = class_of(bytes);
        let spare = SPARE.with_borrow_mut(|spare| spare.get_mut(class).and_then(Vec::pop));
        Self { memory: Some(spare.unwrap_or_else(|| AlignedBuf::zeroed(BLOCK_BYTES << class))) }
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
        self.memory.as_mut().expect("a buffer has its memory until it is dropped").bytes_mut()
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
            spare[class].push(memory);
        });
    }
}

#[cfg(test)]
mod tests {
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
}
