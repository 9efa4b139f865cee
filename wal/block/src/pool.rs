//! Buffers are used again: a batch in steady state allocates nothing.

use crate::{BLOCK_BYTES, BlockBuf};
use std::cell::RefCell;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

/// Free buffers by size class (powers of two from one block), for one core.
///
/// `take` hands out the smallest class that fits, asking `allocate` when none is free. A dropped [`Block`]
/// comes back as long as the pool holds no more than `free_bytes_max`; beyond that it is released.
pub struct Pool<B: BlockBuf> {
    shelves: Rc<RefCell<Shelves<B>>>,
}

/// What a pool has handed out and keeps, in bytes of capacity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Capacity of the blocks that are in use.
    pub used_bytes: usize,
    /// Capacity of the buffers that wait to be used again.
    pub free_bytes: usize,
}

struct Shelves<B: BlockBuf> {
    /// `free[c]` holds buffers of `BLOCK_BYTES << c` bytes.
    free: Vec<Vec<B>>,
    free_bytes_max: usize,
    /// Empty: what is shared next is put there.
    shares: Vec<Rc<Option<Block<B>>>>,
    stats: PoolStats,
}

/// A pool keeps the memory of so many shares.
const SHARES_MAX: usize = 1024;

impl<B: BlockBuf> Pool<B> {
    /// A pool that keeps at most `free_bytes_max` of unused capacity.
    #[must_use]
    pub fn new(free_bytes_max: usize) -> Self {
        let stats = PoolStats::default();
        let shelves = Shelves { free: Vec::new(), free_bytes_max, shares: Vec::new(), stats };
        Self { shelves: Rc::new(RefCell::new(shelves)) }
    }

    /// A block of at least `bytes` capacity. Its content is whatever an earlier life left in it.
    ///
    /// # Errors
    /// Those of `allocate`, which is asked for a buffer of the size class when none is free.
    pub fn take<E>(&self, bytes: usize, allocate: impl FnOnce(usize) -> Result<B, E>) -> Result<Block<B>, E> {
        let class = class_of(bytes);
        let capacity = BLOCK_BYTES << class;
        let reused = {
            let mut shelves = self.shelves.borrow_mut();
            let reused = shelves.free.get_mut(class).and_then(Vec::pop);
            if reused.is_some() {
                shelves.stats.free_bytes -= capacity;
            }
            reused
        };
        let buffer = match reused {
            Some(buffer) => buffer,
            None => allocate(capacity)?,
        };
        assert!(buffer.bytes().len() >= capacity, "the backend allocated what was asked for");
        self.shelves.borrow_mut().stats.used_bytes += capacity;
        Ok(Block { buffer: Some(buffer), class, home: Rc::clone(&self.shelves) })
    }

    /// What is in use and what is kept.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        self.shelves.borrow().stats
    }
}

impl<B: BlockBuf> Clone for Pool<B> {
    fn clone(&self) -> Self {
        Self { shelves: Rc::clone(&self.shelves) }
    }
}

fn class_of(bytes: usize) -> usize {
    bytes.max(1).div_ceil(BLOCK_BYTES).next_power_of_two().trailing_zeros() as usize
}

/// One buffer of a [`Pool`], owned by one holder, to be filled and then shared ([`Block::share`]). It returns to its pool when
/// the last holder drops it.
pub struct Block<B: BlockBuf> {
    /// Always present until `drop`.
    buffer: Option<B>,
    class: usize,
    home: Rc<RefCell<Shelves<B>>>,
}

impl<B: BlockBuf> Block<B> {
    /// The capacity in bytes.
    #[must_use]
    pub fn capacity(&self) -> usize {
        BLOCK_BYTES << self.class
    }

    /// Shares the block, which does not change any more from now on.
    #[must_use]
    pub fn share(self) -> SharedBlock<B> {
        let spare = self.home.borrow_mut().shares.pop();
        let mut shared = spare.unwrap_or_default();
        let place = Rc::get_mut(&mut shared).expect("nobody else has an empty share");
        *place = Some(self);
        SharedBlock { shared }
    }

    /// The backend's own buffer, for the backend to hand to the kernel.
    #[must_use]
    pub fn buffer(&self) -> &B {
        self.buffer.as_ref().expect("a block holds its buffer until it is dropped")
    }

    /// The backend's own buffer, to be read into.
    #[must_use]
    pub fn buffer_mut(&mut self) -> &mut B {
        self.buffer.as_mut().expect("a block holds its buffer until it is dropped")
    }
}

impl<B: BlockBuf> Deref for Block<B> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer().bytes()[..self.capacity()]
    }
}

impl<B: BlockBuf> DerefMut for Block<B> {
    fn deref_mut(&mut self) -> &mut [u8] {
        let capacity = self.capacity();
        &mut self.buffer_mut().bytes_mut()[..capacity]
    }
}

impl<B: BlockBuf> fmt::Debug for Block<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block").field("capacity", &self.capacity()).finish_non_exhaustive()
    }
}

impl<B: BlockBuf> Drop for Block<B> {
    fn drop(&mut self) {
        let capacity = self.capacity();
        let Some(buffer) = self.buffer.take() else { return };
        let mut shelves = self.home.borrow_mut();
        shelves.stats.used_bytes -= capacity;
        if shelves.stats.free_bytes + capacity > shelves.free_bytes_max {
            drop(shelves);
            return;
        }
        shelves.stats.free_bytes += capacity;
        if shelves.free.len() <= self.class {
            shelves.free.resize_with(self.class + 1, Vec::new);
        }
        shelves.free[self.class].push(buffer);
    }
}

/// A filled block, shared between the log's write, the links' sends and the state machine. Its clones are the same block.
pub struct SharedBlock<B: BlockBuf> {
    /// Always holds a block until the last one is dropped.
    shared: Rc<Option<Block<B>>>,
}

impl<B: BlockBuf> SharedBlock<B> {
    /// The block, if nobody else shares it.
    ///
    /// # Errors
    /// With itself, if somebody does.
    pub fn try_into_block(mut self) -> Result<Block<B>, Self> {
        let block = Rc::get_mut(&mut self.shared).and_then(Option::take);
        block.ok_or(self)
    }

    /// How many share the block, this one included.
    #[must_use]
    pub fn holders(&self) -> usize {
        Rc::strong_count(&self.shared)
    }
}

impl<B: BlockBuf> Clone for SharedBlock<B> {
    fn clone(&self) -> Self {
        Self { shared: Rc::clone(&self.shared) }
    }
}

impl<B: BlockBuf> Deref for SharedBlock<B> {
    type Target = Block<B>;

    fn deref(&self) -> &Block<B> {
        Option::as_ref(&self.shared).expect("a share holds its block until the last one is dropped")
    }
}

impl<B: BlockBuf> fmt::Debug for SharedBlock<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SharedBlock").field(&**self).finish()
    }
}

impl<B: BlockBuf> Drop for SharedBlock<B> {
    fn drop(&mut self) {
        let Some(block) = Rc::get_mut(&mut self.shared).and_then(Option::take) else { return };
        let home = Rc::clone(&block.home);
        drop(block);
        let shares = &mut home.borrow_mut().shares;
        if shares.len() < SHARES_MAX {
            shares.push(Rc::clone(&self.shared));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AlignedBuf;
    use std::convert::Infallible;

    fn take(pool: &Pool<AlignedBuf>, bytes: usize) -> Block<AlignedBuf> {
        pool.take(bytes, |bytes| Ok::<_, Infallible>(AlignedBuf::zeroed(bytes))).unwrap()
    }

    #[test]
    fn a_dropped_block_is_handed_out_again_within_its_class() {
        let pool = Pool::new(1 << 20);
        let block = take(&pool, 5000);
        assert_eq!(block.capacity(), 8192);
        let address = block.as_ptr();
        let shared = block.share();
        let other = shared.clone();
        assert_eq!(other.holders(), 2);
        drop(shared);
        assert_eq!(pool.stats(), PoolStats { used_bytes: 8192, free_bytes: 0 });
        drop(other);
        assert_eq!(pool.stats(), PoolStats { used_bytes: 0, free_bytes: 8192 });
        assert_ne!(take(&pool, 4096).as_ptr(), address);
        assert_eq!(take(&pool, 8192).as_ptr(), address);
    }

    #[test]
    fn a_share_is_used_again_once_the_last_holder_has_dropped_it() {
        let pool = Pool::new(1 << 20);
        let shares = || pool.shelves.borrow().shares.len();
        let first = take(&pool, 4096).share();
        let (place, other) = (Rc::as_ptr(&first.shared), first.clone());
        drop(first);
        assert_eq!(shares(), 0);
        drop(other);
        assert_eq!(shares(), 1);
        let mut block = take(&pool, 4096);
        block.fill(7);
        let second = block.share();
        assert_eq!((Rc::as_ptr(&second.shared), shares()), (place, 0));
        assert!(second.iter().all(|byte| *byte == 7));
        let other = second.clone();
        let second = second.try_into_block().expect_err("it is shared");
        drop(other);
        let block = second.try_into_block().expect("it is not any more");
        assert_eq!((block[0], pool.stats().used_bytes), (7, 4096));
    }

    #[test]
    fn the_pool_keeps_no_more_than_its_bound() {
        let pool = Pool::new(8192);
        let blocks: Vec<_> = (0..4).map(|_| take(&pool, 4096)).collect();
        drop(blocks);
        assert_eq!(pool.stats(), PoolStats { used_bytes: 0, free_bytes: 8192 });
    }

    #[test]
    fn a_failed_allocation_leaves_the_counts_as_they_were() {
        let pool = Pool::<AlignedBuf>::new(8192);
        assert_eq!(pool.take(4096, |_| Err("full")).unwrap_err(), "full");
        assert_eq!(pool.stats(), PoolStats::default());
    }
}
