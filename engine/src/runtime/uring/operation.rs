//! What is in flight on a core's ring, and whose it is.

use super::disk::{DiskOperation, DiskShared};
use super::link::{LinkOperation, LinkShared};
use super::ring::{Completion, Owner, Ring};
use io_uring::squeue;
use std::cell::RefCell;
use std::rc::Rc;

/// A core's ring.
pub(super) type Io = RefCell<Ring<Operation>>;

pub(super) enum Operation {
    Disk(Rc<DiskShared>, DiskOperation),
    Link(Rc<LinkShared>, LinkOperation),
}

// SAFETY: each of the two says at its `entry` why.
unsafe impl Owner for Operation {
    fn entry(&mut self) -> squeue::Entry {
        match self {
            Self::Disk(_, operation) => operation.entry(),
            Self::Link(_, operation) => operation.entry(),
        }
    }

    fn is_urgent(&self) -> bool {
        matches!(self, Self::Disk(..))
    }
}

/// Takes the completions at hand to the disks and links. Says whether there were any.
pub(super) fn reap(io: &Io) -> bool {
    let mut any = false;
    loop {
        // Who takes a completion may start the next operation.
        let next = io.borrow_mut().next();
        let Some(Completion { owner, result }) = next else { return any };
        any = true;
        match owner {
            Operation::Disk(disk, operation) => disk.completed(operation, result),
            Operation::Link(link, operation) => link.completed(operation, result),
        }
    }
}
