//! What applying costs in allocations: nothing, with sessions or without.

use super::{Applied, BatchKind, Control, Rig};
use crate::allocations::allocations;

/// Applies batch after batch of 20 commands, as a follower does: how often the later ones allocate.
fn allocations_of_later_batches(in_session: bool) -> u64 {
    let mut rig = Rig::new();
    rig.applier.machine.seen.reserve(10_000);
    let id = rig.register();
    let mut counted = 0;
    for batch in 0..20 {
        let session = |at: u64| in_session.then_some((id, batch * 20 + at + 1));
        let commands: Vec<_> = (0..20).map(|at| ("x", session(at))).collect();
        rig.commands(&commands);
        let before = allocations();
        assert_eq!(rig.apply(), Ok(Applied::Current));
        if batch > 2 {
            counted += allocations() - before;
        }
        let acknowledge = Control::Acknowledge { session: id, through: batch * 20 + 20 };
        rig.received(BatchKind::SessionControl, &[(&acknowledge.encode(), None)]);
        assert_eq!(rig.apply(), Ok(Applied::Current));
    }
    assert_eq!(rig.seen().len(), 400);
    counted
}

#[test]
fn a_batch_is_applied_without_an_allocation_with_sessions_or_without() {
    assert_eq!(allocations_of_later_batches(false), 0);
    assert_eq!(allocations_of_later_batches(true), 0);
    let before = allocations();
    drop(std::hint::black_box(Box::new(7_u8)));
    assert_eq!(allocations() - before, 1, "they are counted");
}
