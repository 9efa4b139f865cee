//! The buffers of a core: large ones are parts of huge pages.
//!
//! A buffer in pages of 4 KiB is to the kernel as many pieces of memory as it has pages, wherever they lie, and each costs at every
//! write and, in a virtual machine, once more in what serves its disk. In a huge page it is one piece. With 4 KiB and 256
//! commands in flight that was measured as 6 to 16 % more bytes per second and a tenth less processor time (two virtual cores,
//! a disk of 2 GB/s, November 2026).
//!
//! Huge pages are cut into parts of one size, and given back when nobody has any of them. A pool has those that it keeps for later, so
//! that what is mapped may be as much for each size as was in use at once. Where the kernel has no huge page at hand, it may
//! make one while the core waits, the first time that one is touched; or the same memory consists of ordinary pages.

use ringraft_block::{AlignedBuf, BLOCK_BYTES, BlockBuf};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use std::cell::RefCell;
use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::rc::{Rc, Weak};

/// Of a huge page, and what it is aligned to.
const HUGE_BYTES: usize = 2 << 20;
/// Smaller buffers gain nothing.
const PART_BYTES_MIN: usize = 64 << 10;

/// A buffer that the disk and the links of this backend read into and write from.
pub struct UringBuf(Memory);

enum Memory {
    Heap(AlignedBuf),
    Part(Part),
}

impl BlockBuf for UringBuf {
    fn bytes(&self) -> &[u8] {
        match &self.0 {
            Memory::Heap(buffer) => buffer.bytes(),
            Memory::Part(part) => part.bytes(),
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Heap(buffer) => buffer.bytes_mut(),
            Memory::Part(part) => part.bytes_mut(),
        }
    }
}

/// Where the buffers of one disk come from.
#[derive(Default)]
pub(super) struct Buffers {
    /// Those of which a part is in use.
    slabs: Vec<Weak<Slab>>,
}

impl Buffers {
    /// A buffer of so many bytes, a whole number of blocks. Whether there is memory for it has been asked.
    pub(super) fn allocate(&mut self, bytes: usize) -> UringBuf {
        if bytes < PART_BYTES_MIN {
            return UringBuf(Memory::Heap(AlignedBuf::zeroed(bytes)));
        }
        self.slabs.retain(|slab| slab.strong_count() > 0);
        let of_that_size =
            self.slabs.iter().filter_map(Weak::upgrade).filter(|slab| slab.part_bytes == bytes);
        let part = of_that_size.filter_map(Slab::take).next().or_else(|| self.part_of_another_slab(bytes));
        // Aligned it may take more address space than there is left, though the memory is there.
        UringBuf(part.map_or_else(|| Memory::Heap(AlignedBuf::zeroed(bytes)), Memory::Part))
    }

    fn part_of_another_slab(&mut self, part_bytes: usize) -> Option<Part> {
        let slab = Rc::new(Slab::new(part_bytes)?);
        self.slabs.push(Rc::downgrade(&slab));
        Slab::take(slab)
    }
}

/// Whole huge pages, cut into parts of one size. All of its bytes are initialised.
struct Slab {
    start: NonNull<c_void>,
    bytes: usize,
    part_bytes: usize,
    /// The parts that nobody has, by their distance from the start.
    free: RefCell<Vec<usize>>,
}

impl Slab {
    fn new(part_bytes: usize) -> Option<Self> {
        let bytes = part_bytes.checked_next_multiple_of(HUGE_BYTES)?;
        let start = map_aligned(bytes)?;
        // SAFETY: the range has just been mapped, and is ours alone. That it should be of huge pages is a wish.
        let _ = unsafe { madvise(start.as_ptr(), bytes, Advice::LinuxHugepage) };
        let free = (0..bytes / part_bytes).map(|part| part * part_bytes).rev().collect();
        Some(Self { start, bytes, part_bytes, free: RefCell::new(free) })
    }

    fn take(slab: Rc<Self>) -> Option<Part> {
        let at = slab.free.borrow_mut().pop()?;
        // SAFETY: what is free begins a whole part before the end of the mapping.
        let start = unsafe { slab.start.cast::<u8>().add(at) };
        Some(Part { start, at, slab })
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, in which nobody has a part any more, for each has its share of this.
        // A failure leaves the memory mapped, where nobody knows it.
        let _ = unsafe { munmap(self.start.as_ptr(), self.bytes) };
    }
}

/// Memory of zeros, of so many bytes, that begins where a huge page does.
fn map_aligned(bytes: usize) -> Option<NonNull<c_void>> {
    let mapped_bytes = bytes.checked_add(HUGE_BYTES)?;
    let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    // SAFETY: a new private mapping where the kernel likes touches no memory of ours.
    let mapped = unsafe { mmap_anonymous(ptr::null_mut(), mapped_bytes, access, flags) }.ok()?;
    let before = mapped.addr().wrapping_neg() % HUGE_BYTES;
    let after = HUGE_BYTES - before;
    let (start, end) = (mapped.wrapping_byte_add(before), mapped.wrapping_byte_add(before + bytes));
    for (rest, bytes) in [(mapped, before), (end, after)] {
        if bytes > 0 {
            // SAFETY: the mapping's pages before and behind what is kept. They stay mapped where that fails.
            let _ = unsafe { munmap(rest, bytes) };
        }
    }
    NonNull::new(start)
}

/// A part of a slab, which nobody else has.
struct Part {
    start: NonNull<u8>,
    at: usize,
    slab: Rc<Slab>,
}

impl Part {
    fn bytes(&self) -> &[u8] {
        // SAFETY: so many initialised bytes from `start` on belong to this part, and are mapped for as long as it has its slab.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.slab.part_bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.slab.part_bytes) }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.slab.free.borrow_mut().push(self.at);
    }
}

const _: () = assert!(HUGE_BYTES.is_multiple_of(BLOCK_BYTES));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_apart_and_large_ones_share_huge_pages() {
        let mut buffers = Buffers::default();
        let sizes =
            [BLOCK_BYTES, 3 * BLOCK_BYTES, PART_BYTES_MIN, 3 * PART_BYTES_MIN, HUGE_BYTES, 2 * HUGE_BYTES];
        let mut taken = Vec::new();
        for (number, bytes) in (0..120_u8).zip(sizes.into_iter().cycle()) {
            let mut buffer = buffers.allocate(bytes);
            assert!(buffer.bytes().as_ptr().addr().is_multiple_of(BLOCK_BYTES));
            assert_eq!(buffer.bytes().len(), bytes);
            buffer.bytes_mut().fill(number);
            taken.push((number, buffer));
        }
        for (number, buffer) in &taken {
            assert!(buffer.bytes().iter().all(|byte| byte == number), "{number}");
        }
        // Twenty of each size: of parts as many to a slab as fit into its huge pages.
        let slabs = |bytes| {
            buffers.slabs.iter().filter_map(Weak::upgrade).filter(move |slab| slab.part_bytes == bytes)
        };
        assert_eq!(sizes.map(|bytes| slabs(bytes).count()), [0, 0, 1, 2, 20, 20]);
        for slab in buffers.slabs.iter().filter_map(Weak::upgrade) {
            assert!(
                slab.start.addr().get().is_multiple_of(HUGE_BYTES) && slab.bytes.is_multiple_of(HUGE_BYTES)
            );
        }
    }

    #[test]
    fn a_part_is_used_again_and_a_slab_without_any_in_use_is_given_back() {
        let mut buffers = Buffers::default();
        let parts = HUGE_BYTES / PART_BYTES_MIN;
        let mut taken: Vec<_> = (0..=parts).map(|_| buffers.allocate(PART_BYTES_MIN)).collect();
        assert_eq!(buffers.slabs.len(), 2);
        let place = taken[3].bytes().as_ptr();
        drop(taken.remove(3));
        let again = buffers.allocate(PART_BYTES_MIN);
        assert_eq!((again.bytes().as_ptr(), buffers.slabs.len()), (place, 2));
        drop(taken);
        assert_eq!(buffers.slabs.iter().filter(|slab| slab.strong_count() > 0).count(), 1);
        // A buffer may outlive where it came from.
        drop(buffers);
        assert_eq!(again.bytes().len(), PART_BYTES_MIN);
    }

    #[test]
    fn more_memory_than_there_can_be_makes_no_slab() {
        assert!(Slab::new(usize::MAX - HUGE_BYTES + 1).is_none());
        assert!(Slab::new(1 << 60).is_none());
    }
}
