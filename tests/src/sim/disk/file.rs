//! A file's content: pages that are durable, completed writes that are not, and sectors that cannot be read.

use ringraft_block::{BLOCK_BYTES, SECTOR_BYTES};
use std::collections::BTreeSet;
use std::rc::Rc;

/// Of [`BLOCK_BYTES`].
type Page = [u8];

#[derive(Clone, Default)]
pub(super) struct Inode {
    pub(super) bytes: u64,
    /// The size that a power cut leaves.
    pub(super) durable_bytes: u64,
    /// By position; absent pages are zeros.
    pub(super) pages: Vec<Option<Rc<Page>>>,
    /// Completed, not flushed, in the order of completion.
    pub(super) unflushed: Vec<Unflushed>,
    /// Numbers of sectors whose reads fail until they are written again.
    pub(super) unreadable: BTreeSet<u64>,
}

#[derive(Clone)]
pub(super) struct Unflushed {
    pub(super) sequence: u64,
    pub(super) offset: u64,
    pub(super) data: Vec<u8>,
}

impl Inode {
    fn page_of(offset: u64) -> (usize, usize) {
        ((offset / BLOCK_BYTES as u64) as usize, (offset % BLOCK_BYTES as u64) as usize)
    }

    pub(super) fn write_durable(&mut self, offset: u64, data: &[u8]) {
        self.readable_again(offset, data.len());
        let mut written = 0;
        while written < data.len() {
            let (page, start) = Self::page_of(offset + written as u64);
            let count = (BLOCK_BYTES - start).min(data.len() - written);
            let bytes = &data[written..written + count];
            written += count;
            let present = self.pages.get(page).is_some_and(Option::is_some);
            if all_zero(bytes) && (!present || count == BLOCK_BYTES) {
                if present {
                    self.pages[page] = None;
                }
                continue;
            }
            if self.pages.len() <= page {
                self.pages.resize(page + 1, None);
            }
            if count == BLOCK_BYTES {
                match self.pages[page].as_mut().and_then(Rc::get_mut) {
                    Some(present) => present.copy_from_slice(bytes),
                    None => self.pages[page] = Some(Rc::from(bytes)),
                }
                continue;
            }
            let page = self.pages[page].get_or_insert_with(|| Rc::from([0; BLOCK_BYTES]));
            Rc::make_mut(page)[start..start + count].copy_from_slice(bytes);
        }
    }

    pub(super) fn read_durable(&self, offset: u64, into: &mut [u8]) {
        let mut read = 0;
        while read < into.len() {
            let (page, start) = Self::page_of(offset + read as u64);
            let count = (BLOCK_BYTES - start).min(into.len() - read);
            match self.pages.get(page) {
                Some(Some(page)) => {
                    into[read..read + count].copy_from_slice(&page[start..start + count]);
                }
                _ => into[read..read + count].fill(0),
            }
            read += count;
        }
    }

    pub(super) fn read(&self, offset: u64, into: &mut [u8]) {
        self.read_durable(offset, into);
        let end = offset + into.len() as u64;
        for write in &self.unflushed {
            let from = write.offset.max(offset);
            let to = (write.offset + write.data.len() as u64).min(end);
            if from < to {
                let source = (from - write.offset) as usize..(to - write.offset) as usize;
                into[(from - offset) as usize..(to - offset) as usize].copy_from_slice(&write.data[source]);
            }
        }
    }

    /// How many of so many bytes at `offset` come before those behind which there are only zeros.
    pub(super) fn content_bytes(&self, offset: u64, bytes: usize) -> usize {
        let written = self.unflushed.iter().map(|write| write.offset + write.data.len() as u64);
        let end = written.chain([(self.pages.len() * BLOCK_BYTES) as u64]).max().unwrap_or(0);
        (end.saturating_sub(offset) as usize).min(bytes)
    }

    pub(super) fn flush(&mut self, covers: u64) {
        let unflushed = std::mem::take(&mut self.unflushed);
        for write in unflushed {
            if write.sequence <= covers {
                self.write_durable(write.offset, &write.data);
            } else {
                self.unflushed.push(write);
            }
        }
        self.durable_bytes = self.bytes;
    }

    /// A durable write replaces what older writes left unflushed in its range.
    pub(super) fn supersede(&mut self, offset: u64, bytes: usize) {
        let end = offset + bytes as u64;
        let overlaps =
            |write: &Unflushed| write.offset < end && offset < write.offset + write.data.len() as u64;
        if !self.unflushed.iter().any(overlaps) {
            return;
        }
        let unflushed = std::mem::take(&mut self.unflushed);
        for write in unflushed {
            if !overlaps(&write) {
                self.unflushed.push(write);
                continue;
            }
            let write_end = write.offset + write.data.len() as u64;
            if write.offset < offset {
                let head = write.data[..(offset - write.offset) as usize].to_vec();
                self.unflushed.push(Unflushed { sequence: write.sequence, offset: write.offset, data: head });
            }
            if end < write_end {
                let tail = write.data[(end - write.offset) as usize..].to_vec();
                self.unflushed.push(Unflushed { sequence: write.sequence, offset: end, data: tail });
            }
        }
    }

    /// A write that completed and is not durable yet.
    pub(super) fn write_unflushed(&mut self, sequence: u64, offset: u64, data: Vec<u8>) {
        self.readable_again(offset, data.len());
        self.unflushed.push(Unflushed { sequence, offset, data });
    }

    /// Whether the device can read all of a range.
    pub(super) fn is_readable(&self, offset: u64, bytes: usize) -> bool {
        let end = (offset + bytes as u64).div_ceil(SECTOR_BYTES as u64);
        self.unreadable.range(offset / SECTOR_BYTES as u64..end).next().is_none()
    }

    /// A write gives a bad sector new content.
    fn readable_again(&mut self, offset: u64, bytes: usize) {
        if !self.unreadable.is_empty() {
            let end = (offset + bytes as u64).div_ceil(SECTOR_BYTES as u64);
            self.unreadable.retain(|sector| *sector < offset / SECTOR_BYTES as u64 || *sector >= end);
        }
    }

    /// Whether writing `data` would only put zeros where there are zeros, durably.
    pub(super) fn is_zero(&self, offset: u64, data: &[u8]) -> bool {
        let (first, _) = Self::page_of(offset);
        let last = first + data.len() / BLOCK_BYTES;
        let absent = (first..last).all(|page| !self.pages.get(page).is_some_and(Option::is_some));
        absent && self.unflushed.is_empty() && self.unreadable.is_empty() && all_zero(data)
    }
}

pub(super) fn all_zero(bytes: &[u8]) -> bool {
    let (parts, rest) = bytes.as_chunks::<256>();
    let any = |part: &[u8; 256]| {
        let (words, _) = part.as_chunks::<8>();
        words.iter().fold(0, |any, word| any | u64::from_ne_bytes(*word))
    };
    parts.iter().all(|part| any(part) == 0) && rest.iter().all(|byte| *byte == 0)
}
