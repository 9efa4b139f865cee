//! The window of appends: what is in flight, and what has become durable without a gap.
//!
//! Writes complete in any order; the log is durable through the last batch before the first write that has not completed. A
//! truncation takes writes out of the window: they are still awaited, since they own their file, but never count.

use crate::disk::DiskOpId;
use crate::mutants::{self, Mutant};
use ringraft_block::LogIndex;
use std::collections::VecDeque;

/// A write in flight.
struct Write {
    id: DiskOpId,
    generation: u32,
    last: LogIndex,
    bytes: usize,
    done: bool,
}

/// A completed write, told by its id.
pub(crate) struct Landed {
    pub(crate) generation: u32,
    pub(crate) bytes: usize,
}

/// The writes in flight, in the order of the log.
pub(crate) struct Window {
    writes_max: usize,
    bytes_max: usize,
    writes: VecDeque<Write>,
    /// Writes of batches that have been cut off since.
    void: Vec<Write>,
    bytes: usize,
    durable_through: LogIndex,
}

impl Window {
    pub(crate) fn new(writes_max: usize, bytes_max: usize) -> Self {
        let writes = VecDeque::with_capacity(writes_max);
        Self { writes_max, bytes_max, writes, void: Vec::new(), bytes: 0, durable_through: LogIndex(0) }
    }

    /// Whether a write of `bytes` may join. One alone always may.
    pub(crate) fn has_room(&self, bytes: usize) -> bool {
        let count = self.in_flight();
        count == 0 || count < self.writes_max && self.bytes + bytes <= self.bytes_max
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.writes.len() + self.void.len()
    }

    /// Whether a write to the segment is in flight.
    pub(crate) fn writes_to(&self, generation: u32) -> bool {
        self.writes.iter().chain(&self.void).any(|write| write.generation == generation && !write.done)
    }

    pub(crate) fn bytes_in_flight(&self) -> usize {
        self.bytes
    }

    pub(crate) fn durable_through(&self) -> LogIndex {
        self.durable_through
    }

    pub(crate) fn set_durable_through(&mut self, index: LogIndex) {
        debug_assert!(self.writes.is_empty());
        self.durable_through = index;
    }

    pub(crate) fn begin(&mut self, id: DiskOpId, generation: u32, last: LogIndex, bytes: usize) {
        debug_assert!(self.writes.back().is_none_or(|write| write.last < last));
        self.bytes += bytes;
        self.writes.push_back(Write { id, generation, last, bytes, done: false });
    }

    /// A write came back, well or not. `None` when the id is unknown.
    pub(crate) fn landed(&mut self, id: DiskOpId) -> Option<Landed> {
        if let Some(at) = self.void.iter().position(|write| write.id == id) {
            let write = self.void.swap_remove(at);
            if mutants::active(Mutant::CutOffWriteCounted)
                && let Some(newest) = self.writes.iter().rev().find(|newer| newer.last <= write.last)
            {
                self.durable_through = self.durable_through.max(newest.last);
            }
            self.bytes -= write.bytes;
            return Some(Landed { generation: write.generation, bytes: write.bytes });
        }
        let write = self.writes.iter_mut().find(|write| write.id == id && !write.done)?;
        write.done = true;
        Some(Landed { generation: write.generation, bytes: write.bytes })
    }

    /// Moves the durable end over the completed writes at the front.
    pub(crate) fn settle(&mut self) {
        if mutants::active(Mutant::DurableOverGap)
            && let Some(write) = self.writes.iter().rev().find(|write| write.done)
        {
            self.durable_through = self.durable_through.max(write.last);
        }
        while let Some(write) = self.writes.front()
            && write.done
        {
            self.bytes -= write.bytes;
            self.durable_through = self.durable_through.max(write.last);
            self.writes.pop_front();
        }
    }

    /// The log is cut after `index`: writes behind it no longer count.
    pub(crate) fn cut_after(&mut self, index: LogIndex) {
        let kept = self.writes.partition_point(|write| write.last <= index);
        for write in self.writes.drain(kept..) {
            if write.done {
                self.bytes -= write.bytes;
            } else {
                self.void.push(write);
            }
        }
        self.durable_through = self.durable_through.min(index);
    }

    /// The log begins anew behind `index`: no write in flight counts.
    pub(crate) fn start_behind(&mut self, index: LogIndex) {
        self.cut_after(LogIndex(0));
        self.durable_through = index;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(writes: u64) -> Window {
        let mut window = Window::new(4, 100);
        for at in 1..=writes {
            window.begin(DiskOpId(at), 1, LogIndex(at * 10), 30);
        }
        window
    }

    #[test]
    fn the_durable_end_moves_only_over_completed_writes_without_a_gap() {
        let mut window = window(3);
        assert!(window.landed(DiskOpId(2)).is_some());
        window.settle();
        assert_eq!(window.durable_through(), LogIndex(0));
        assert!(window.landed(DiskOpId(1)).is_some());
        window.settle();
        assert_eq!(window.durable_through(), LogIndex(20));
        assert!(window.landed(DiskOpId(1)).is_none(), "each write lands once");
        assert_eq!(window.in_flight(), 1);
        assert_eq!(window.bytes_in_flight(), 30);
    }

    #[test]
    fn a_write_that_was_cut_off_lands_without_counting() {
        let mut window = window(3);
        window.cut_after(LogIndex(10));
        assert!(window.landed(DiskOpId(3)).is_some());
        window.settle();
        assert_eq!(window.durable_through(), LogIndex(0));
        assert!(window.landed(DiskOpId(1)).is_some());
        window.settle();
        assert_eq!(window.durable_through(), LogIndex(10));
        window.begin(DiskOpId(9), 2, LogIndex(15), 30);
        assert!(window.landed(DiskOpId(2)).is_some());
        window.settle();
        assert_eq!(window.durable_through(), LogIndex(10));
        assert!(window.landed(DiskOpId(9)).is_some());
        window.settle();
        assert_eq!(window.durable_through(), LogIndex(15));
        assert_eq!(window.bytes_in_flight(), 0);
    }

    #[test]
    fn a_batch_larger_than_the_bound_goes_alone() {
        let mut empty = window(0);
        assert!(empty.has_room(1000));
        empty.begin(DiskOpId(1), 1, LogIndex(1), 1000);
        assert!(!empty.has_room(1));
        let busy = window(3);
        assert!(busy.has_room(10) && !busy.has_room(11));
    }
}
