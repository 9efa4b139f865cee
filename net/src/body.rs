//! The storage of a frame's body: aligned, so that an archive in it can be read in place, and used again.

use std::cell::RefCell;
use std::fmt;
use std::ops::Deref;
use std::rc::Rc;

/// The alignment of every delivered body, in bytes: that of the strictest archive of the engine.
pub const BODY_ALIGNMENT: usize = 16;

/// Bytes that start at a multiple of [`BODY_ALIGNMENT`]. Their storage returns to the network when dropped.
pub struct AlignedBytes {
    storage: Box<[u8]>,
    start: usize,
    bytes: usize,
    home: Option<Rc<RefCell<Shelf>>>,
}

impl AlignedBytes {
    /// A copy of `bytes` in storage of its own.
    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Self {
        Self::fill(vec![0; bytes.len() + BODY_ALIGNMENT].into_boxed_slice(), bytes, None)
    }

    fn fill(mut storage: Box<[u8]>, bytes: &[u8], home: Option<Rc<RefCell<Shelf>>>) -> Self {
        let start = (storage.as_ptr() as usize).wrapping_neg() % BODY_ALIGNMENT;
        storage[start..start + bytes.len()].copy_from_slice(bytes);
        Self { storage, start, bytes: bytes.len(), home }
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.storage[self.start..self.start + self.bytes]
    }
}

impl fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        let Some(home) = self.home.take() else { return };
        let storage = std::mem::take(&mut self.storage);
        let mut shelf = home.borrow_mut();
        if shelf.free.len() < shelf.free_max && storage.len() == shelf.storage_bytes {
            shelf.free.push(storage);
        }
    }
}

/// Storage for bodies of at most `body_bytes_max`.
pub(crate) struct BodyPool {
    shelf: Rc<RefCell<Shelf>>,
}

struct Shelf {
    free: Vec<Box<[u8]>>,
    free_max: usize,
    storage_bytes: usize,
}

impl BodyPool {
    pub(crate) fn new(body_bytes_max: usize, free_max: usize) -> Self {
        let storage_bytes = body_bytes_max + BODY_ALIGNMENT;
        Self { shelf: Rc::new(RefCell::new(Shelf { free: Vec::new(), free_max, storage_bytes })) }
    }

    /// A copy of `bytes`, which are no more than the pool's bodies may be.
    pub(crate) fn copy(&self, bytes: &[u8]) -> AlignedBytes {
        let (free, storage_bytes) = {
            let mut shelf = self.shelf.borrow_mut();
            (shelf.free.pop(), shelf.storage_bytes)
        };
        let storage = free.unwrap_or_else(|| vec![0; storage_bytes].into_boxed_slice());
        AlignedBytes::fill(storage, bytes, Some(Rc::clone(&self.shelf)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_aligned_exact_and_their_storage_is_used_again() {
        let pool = BodyPool::new(100, 1);
        let first = pool.copy(b"first");
        let second = pool.copy(&[7; 100]);
        assert_eq!(&*first, b"first");
        assert_eq!(&*second, &[7; 100]);
        for body in [&first, &second] {
            assert_eq!(body.as_ptr() as usize % BODY_ALIGNMENT, 0);
        }
        let address = first.as_ptr();
        drop(first);
        drop(second);
        assert_eq!(pool.shelf.borrow().free.len(), 1, "the pool keeps no more than its bound");
        assert_eq!(pool.copy(b"third").as_ptr(), address);
        assert_eq!(&*AlignedBytes::copy_of(b""), b"");
    }
}
