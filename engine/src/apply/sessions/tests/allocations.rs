//! What applying costs in allocations: nothing, with sessions or without.

use super::{Applied, BatchKind, Control, Rig};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // A thread that is ending has no counter any more.
    let _ = ALLOCATIONS.try_with(|allocations| allocations.set(allocations.get() + 1));
}

struct Counting;

// SAFETY: every call is handed on unchanged to the system's allocator; counting touches a constant-initialised
// thread-local without a destructor, so it does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count();
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

/// Applies batch after batch of 20 commands, as a follower does: how often the later ones allocate.
fn allocations_of_later_batches(in_session: bool) -> u64 {
    let mut rig = Rig::new();
    rig.applier.machine.seen.reserve(10_000);
    let id = rig.register();
    let mut allocations = 0;
    for batch in 0..20 {
        let session = |at: u64| in_session.then_some((id, batch * 20 + at + 1));
        let commands: Vec<_> = (0..20).map(|at| ("x", session(at))).collect();
        rig.commands(&commands);
        let before = ALLOCATIONS.get();
        assert_eq!(rig.apply(), Ok(Applied::Current));
        if batch > 2 {
            allocations += ALLOCATIONS.get() - before;
        }
        let acknowledge = Control::Acknowledge { session: id, through: batch * 20 + 20 };
        rig.received(BatchKind::SessionControl, &[(&acknowledge.encode(), None)]);
        assert_eq!(rig.apply(), Ok(Applied::Current));
    }
    assert_eq!(rig.seen().len(), 400);
    allocations
}

#[test]
fn a_batch_is_applied_without_an_allocation_with_sessions_or_without() {
    assert_eq!(allocations_of_later_batches(false), 0);
    assert_eq!(allocations_of_later_batches(true), 0);
    let before = ALLOCATIONS.get();
    drop(Box::new(7_u8));
    assert_eq!(ALLOCATIONS.get() - before, 1, "they are counted");
}
