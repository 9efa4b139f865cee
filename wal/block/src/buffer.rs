//! The memory that direct I/O reads and writes.

use crate::BLOCK_BYTES;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Memory that a disk backend can read into and write from: aligned to [`BLOCK_BYTES`], a whole number of
/// blocks long, of fixed size.
///
/// A backend may need memory of its own making (registered with the kernel, huge pages, an executor's
/// buffers), so the log and the links are generic over this trait and ask the backend for every buffer.
pub trait BlockBuf: 'static {
    /// The whole buffer.
    fn bytes(&self) -> &[u8];
    /// The whole buffer, to be filled.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// A [`BlockBuf`] of ordinary heap memory, zeroed when allocated.
pub struct AlignedBuf {
    start: NonNull<u8>,
    bytes: usize,
}

impl AlignedBuf {
    /// A zeroed buffer of `bytes`, rounded up to whole blocks, at least one.
    ///
    /// # Panics
    /// When `bytes` exceeds `isize::MAX`. Runs the allocation error handler when memory is exhausted.
    #[must_use]
    pub fn zeroed(bytes: usize) -> Self {
        let layout = Self::layout(crate::round_up_to_block(bytes.max(1)));
        // SAFETY: the layout has a size of at least one block.
        let start = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout));
        Self { start, bytes: layout.size() }
    }

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, BLOCK_BYTES).expect("a buffer is smaller than the address space")
    }
}

impl BlockBuf for AlignedBuf {
    fn bytes(&self) -> &[u8] {
        // SAFETY: `start` points to `bytes` initialised bytes that this value owns.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with the same layout, and not freed before.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.bytes)) }
    }
}

// SAFETY: the buffer owns its memory as a `Box<[u8]>` does; nothing in it refers to a thread.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuf {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_whole_blocks() {
        for bytes in [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES] {
            let mut buffer = AlignedBuf::zeroed(bytes);
            assert_eq!(buffer.bytes().as_ptr() as usize % BLOCK_BYTES, 0);
            assert_eq!(buffer.bytes().len() % BLOCK_BYTES, 0);
            assert!(buffer.bytes().len() >= bytes.max(1));
            assert!(buffer.bytes().iter().all(|byte| *byte == 0));
            buffer.bytes_mut().fill(0xa5);
            assert!(buffer.bytes().iter().all(|byte| *byte == 0xa5));
        }
    }
}
