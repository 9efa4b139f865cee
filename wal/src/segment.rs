//! Segment files: their names, and those in service with their descriptors.
//!
//! A segment's name says how far it has come, since a header alone cannot: a header write of a process that died may
//! still be on its way. `segment-0000002a.new` is being made and is removed at the next start;
//! `segment-0000002a.free` is filled with zeros and has never been written to since, so any process may take it into
//! service; `segment-0000002a.wal` is in service (or about to be) and belongs to the process that renamed it;
//! `segment-0000002a.old` has left service and is removed at the next start; `segment-0000002a.used` is ready for another
//! life: the checksums of what it holds are durable in it and no write to it is on its way, so any process may take it.

use crate::disk::{DiskOpId, FileId};
use crate::format::{BatchInfo, SegmentHeader, slot_content_checksums, slots_start};
use crate::recovery::Scanned;
use ringraft_block::SECTOR_BYTES;
use std::collections::VecDeque;
use std::fmt;

/// How far a segment file has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub(crate) enum Stage {
    #[default]
    New,
    Free,
    InService,
    Old,
    Used,
}

/// The name of a segment file. Serial numbers are unique among the files present; the order of the log is in the
/// headers' generations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub(crate) struct SegmentName {
    pub(crate) serial: u32,
    pub(crate) stage: Stage,
}

impl SegmentName {
    pub(crate) fn new(serial: u32, stage: Stage) -> Self {
        Self { serial, stage }
    }

    /// The segment that a file of this name would be; `None` for any other name.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let (stem, suffix) = name.strip_prefix("segment-")?.split_once('.')?;
        let stage = match suffix {
            "new" => Stage::New,
            "free" => Stage::Free,
            "wal" => Stage::InService,
            "old" => Stage::Old,
            "used" => Stage::Used,
            _ => return None,
        };
        let serial = u32::from_str_radix(stem, 16).ok()?;
        let name_of = Self { serial, stage };
        (name_of.to_string() == name).then_some(name_of)
    }

    pub(crate) fn at(self, stage: Stage) -> Self {
        Self { stage, ..self }
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = match self.stage {
            Stage::New => "new",
            Stage::Free => "free",
            Stage::InService => "wal",
            Stage::Old => "old",
            Stage::Used => "used",
        };
        write!(f, "segment-{:08x}.{suffix}", self.serial)
    }
}

/// A segment in service.
pub(crate) struct Segment {
    pub(crate) name: SegmentName,
    pub(crate) header: SegmentHeader,
    pub(crate) descriptor: Descriptor,
    /// Reads and writes in flight on the descriptor; it is not closed before they end.
    pub(crate) operations: u32,
    /// The turn of the log's use counter when it was last read.
    pub(crate) used: u64,
    /// The name means another file than the descriptor: it is closed before the next read.
    pub(crate) is_replaced: bool,
    /// What its sectors hold, when this process has written them and keeps count.
    pub(crate) sums: Option<SectorSums>,
}

/// The checksums of what this life has written to a segment's slots, sector by sector from the first slot on: 4 B per
/// 512 B, so 512 KiB for a full segment of 64 MiB.
pub(crate) struct SectorSums {
    next: u64,
    sums: Vec<u32>,
}

impl SectorSums {
    /// Room for all sectors of a segment at once, so that no append pays for growing it.
    pub(crate) fn new(segment_bytes: u64) -> Self {
        let start = slots_start(segment_bytes);
        let sectors = (segment_bytes - start) as usize / SECTOR_BYTES;
        Self { next: start, sums: Vec::with_capacity(sectors) }
    }

    /// Takes the slot that is written at `offset`, behind what was written before.
    pub(crate) fn add(&mut self, offset: u64, slot: &[u8], info: &BatchInfo) {
        assert_eq!(offset, self.next, "a segment is written without gaps");
        let identity = (info.group, info.term, info.first);
        self.sums.extend(slot_content_checksums(slot, info.image_bytes as usize, identity));
        self.next += slot.len() as u64;
    }

    /// The first offset that was never written.
    pub(crate) fn end(&self) -> u64 {
        self.next
    }

    /// The checksum of the sector at `offset`, if it was written.
    pub(crate) fn at(&self, offset: u64) -> Option<u32> {
        let sectors = self.sums.len() as u64;
        let first = self.next - sectors * SECTOR_BYTES as u64;
        let ordinal = offset.checked_sub(first)? / SECTOR_BYTES as u64;
        self.sums.get(usize::try_from(ordinal).ok()?).copied()
    }
}

/// The state of a segment's open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Descriptor {
    Closed,
    Opening,
    Open(FileId),
    Closing(DiskOpId),
}

impl Segment {
    /// One that an earlier process has written.
    pub(crate) fn found(segment: Scanned) -> Self {
        let Scanned { name, header, .. } = segment;
        Self {
            name,
            header,
            descriptor: Descriptor::Closed,
            operations: 0,
            used: 0,
            is_replaced: false,
            sums: None,
        }
    }

    pub(crate) fn generation(&self) -> u32 {
        self.header.generation
    }

    pub(crate) fn file(&self) -> Option<FileId> {
        match self.descriptor {
            Descriptor::Open(file) => Some(file),
            _ => None,
        }
    }
}

/// The segments in service in the order of their generations; the last is the one that is appended to, once the log is
/// open.
#[derive(Default)]
pub(crate) struct SegmentTable {
    segments: VecDeque<Segment>,
}

impl SegmentTable {
    pub(crate) fn push(&mut self, segment: Segment) {
        let last = self.segments.back().map_or(0, Segment::generation);
        assert!(segment.generation() > last, "generations rise along the log");
        self.segments.push_back(segment);
    }

    pub(crate) fn len(&self) -> usize {
        self.segments.len()
    }

    pub(crate) fn get(&self, generation: u32) -> Option<&Segment> {
        self.segments.get(self.position(generation)?)
    }

    pub(crate) fn get_mut(&mut self, generation: u32) -> Option<&mut Segment> {
        let position = self.position(generation)?;
        self.segments.get_mut(position)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Segment> {
        self.segments.iter_mut()
    }

    /// Takes out every segment behind `generation`.
    pub(crate) fn take_after(&mut self, generation: u32) -> VecDeque<Segment> {
        let kept = self.segments.partition_point(|segment| segment.generation() <= generation);
        self.segments.split_off(kept)
    }

    /// Takes out the segments that `leaves` says.
    pub(crate) fn take_if(&mut self, mut leaves: impl FnMut(&Segment) -> bool) -> VecDeque<Segment> {
        let (left, kept) = self.segments.drain(..).partition(|segment| leaves(segment));
        self.segments = kept;
        left
    }

    fn position(&self, generation: u32) -> Option<usize> {
        self.segments.binary_search_by_key(&generation, Segment::generation).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_as_it_is_written_and_no_other_is() {
        for stage in [Stage::New, Stage::Free, Stage::InService, Stage::Old, Stage::Used] {
            for serial in [0, 1, 0x2a, u32::MAX] {
                let name = SegmentName::new(serial, stage);
                assert_eq!(SegmentName::parse(&name.to_string()), Some(name));
            }
        }
        assert_eq!(SegmentName::new(42, Stage::InService).to_string(), "segment-0000002a.wal");
        for other in
            ["segment-2a.wal", "segment-0000002A.wal", "segment-0000002a", "segment-+000002a.wal", "hard-a"]
        {
            assert_eq!(SegmentName::parse(other), None, "{other}");
        }
    }
}
