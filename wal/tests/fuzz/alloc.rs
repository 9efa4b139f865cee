//! Counts what a thread allocates, so that a target can say that a length was bounded before memory was asked for.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// What was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Allocated {
    /// Bytes in all.
    pub(crate) bytes: usize,
    /// The largest single request.
    pub(crate) largest: usize,
}

thread_local! {
    static ALLOCATED: Cell<Allocated> = const { Cell::new(Allocated { bytes: 0, largest: 0 }) };
}

/// What `work` allocates, besides what it returns.
pub(crate) fn allocated<T>(work: impl FnOnce() -> T) -> (T, Allocated) {
    ALLOCATED.set(Allocated::default());
    let result = work();
    (result, ALLOCATED.get())
}

struct Counting;

fn count(bytes: usize) {
    // A thread that is ending has no counter any more.
    let _ = ALLOCATED.try_with(|allocated| {
        let Allocated { bytes: before, largest } = allocated.get();
        allocated.set(Allocated { bytes: before.wrapping_add(bytes), largest: largest.max(bytes) });
    });
}

// SAFETY: every call is handed on unchanged to the system's allocator; counting touches a constant-initialised
// thread-local without a destructor, so it does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as promised by the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(bytes);
        // SAFETY: as promised by the caller.
        unsafe { System.realloc(memory, layout, bytes) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn an_allocation_is_counted() {
    let (_, allocated) = allocated(|| (vec![0u8; 4096], vec![1u8; 100]));
    assert_eq!(allocated, Allocated { bytes: 4196, largest: 4096 });
}
