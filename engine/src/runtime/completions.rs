//! What has completed on a disk or a link, until a turn takes it.

use super::LocalWakeup;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

/// The completions of one disk or link, in order. As long as one is here that no turn has taken, the core runs turns.
pub(super) struct Completions<T> {
    queue: RefCell<VecDeque<T>>,
    closed: Cell<bool>,
    wakeup: LocalWakeup,
}

impl<T> Completions<T> {
    pub(super) fn new(wakeup: LocalWakeup) -> Self {
        Self { queue: RefCell::default(), closed: Cell::new(false), wakeup }
    }

    pub(super) fn push(&self, completion: T) {
        if !self.closed.get() {
            self.queue.borrow_mut().push_back(completion);
            self.wakeup.completed();
        }
    }

    /// A turn takes them.
    pub(super) fn take(&self, taken: &mut Vec<T>) {
        let mut queue = self.queue.borrow_mut();
        self.wakeup.taken(queue.len());
        taken.extend(queue.drain(..));
    }

    /// Nobody takes any from now on.
    pub(super) fn close(&self) {
        self.closed.set(true);
        let left = self.queue.take();
        self.wakeup.taken(left.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_core_has_something_to_do_until_all_is_taken_and_nothing_once_nobody_takes_it() {
        let wakeup = LocalWakeup::default();
        let (disk, link) = (Completions::new(wakeup.clone()), Completions::new(wakeup.clone()));
        let mut taken = Vec::new();
        disk.push(1);
        link.push(2);
        link.push(3);
        wakeup.begin_turn();
        link.take(&mut taken);
        assert!(wakeup.is_pending() && taken == [2, 3], "the disk's is left");
        disk.take(&mut taken);
        assert!(!wakeup.is_pending());
        link.push(4);
        assert!(wakeup.is_pending());
        link.close();
        link.push(5);
        assert!(!wakeup.is_pending());
        wakeup.wake();
        disk.take(&mut taken);
        assert!(wakeup.is_pending(), "that was asked for besides");
        wakeup.begin_turn();
        assert!(!wakeup.is_pending());
    }
}
