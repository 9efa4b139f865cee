//! The ledger: what a load generator sent and what was acknowledged to it, in memory shared through a file, so
//! that it outlives a killed process. One generator writes it, the parent reads it at any time.
//!
//! Everything is a 64-bit word, written by plain atomic stores: an acknowledgement costs no system call and no
//! locked instruction. A stream has at most one command outstanding, so three facts suffice for all of them: the
//! highest sequence sent, the highest whose outcome is known (`settled`), and a list of those among these whose
//! outcome is "unknown". What the next leader's generator must go on with is there, too: how far the timetable of the
//! open loop has been served, and when a command that is still owed was due. Latencies are counted in log-linear buckets, 128 to a doubling: under 0.4 % off.

use anyhow::{Context as _, ensure};
use hdrhistogram::Histogram;
use rustix::mm::{MapFlags, ProtFlags};
use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// `RRledger`
const MAGIC: u64 = u64::from_le_bytes(*b"RRledger");
/// Words of the header, the single figures.
const HEADER_WORDS: usize = 64;
/// Buckets are as fine as 1 / 128 of the value.
const SUB_BITS: u32 = 7;
const SUB_BUCKETS: usize = 1 << SUB_BITS;
/// Longer latencies count as this long: 18 minutes.
const LATENCY_NS_MAX: u64 = (1 << 40) - 1;
/// Words of a stream: sent, settled, owed.
const STREAM_WORDS: usize = 3;
const BUCKETS: usize = (40 - SUB_BITS as usize + 1) * SUB_BUCKETS;

/// The single figures, by word.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub(crate) enum Figure {
    Magic,
    Streams,
    /// A [`Phase`].
    Phase,
    /// An [`Ending`], once the phase is [`Phase::Ended`].
    Ending,
    /// Acknowledgements, warm-up and drain included.
    Acked,
    /// Acknowledgements within the measured window.
    Measured,
    /// Outcomes that are unknown: entries of the list.
    Unknown,
    /// Refusals, each of which was followed by another attempt or by the end.
    Refused,
    /// When the first and the last acknowledgement came, on the monotonic clock; 0 for none.
    FirstAckNs,
    LastAckNs,
    LatencyNsMax,
    /// Up to here, exclusive, the open loop's timetable has been served: every command due before was sent once or
    /// is among those owed.
    ServedNs,
    /// Processor time of the generator's own thread, at the window's begin and most recently within it.
    CpuNsAtBegin,
    CpuNs,
    /// What the state machine had applied at the window's begin, and most recently within it.
    BatchesAtBegin,
    Batches,
    EntriesAtBegin,
    Entries,
    BytesAtBegin,
    Bytes,
}

/// What a generator is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Phase {
    Ordered,
    Running,
    Ended,
}

/// Why a generator ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[repr(u64)]
pub(crate) enum Ending {
    /// Its time was over, and every outcome is known.
    Completed,
    /// Its time was over, or it was told to stop, but some outcomes did not arrive.
    Unsettled,
    /// Its node no longer leads.
    LeadershipLost,
    /// The engine refused for good: no space, too large, stopped.
    Refused,
    /// The list of unknown outcomes is full.
    TooManyUnknown,
    /// It was still running when its process died or when it was given up.
    Killed,
}

/// A ledger in shared memory.
pub(crate) struct Ledger {
    map: Mapping,
    streams: usize,
}

impl Ledger {
    /// A new ledger for `streams` streams in the file at `path`.
    pub(crate) fn create(path: &Path, streams: usize) -> anyhow::Result<Self> {
        let bytes = Self::words(streams) * size_of::<u64>();
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let file = file.with_context(|| format!("creating {}", path.display()))?;
        // Allocated, not only sized: a full disk must not become a SIGBUS in the middle of a run.
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes as u64)
            .with_context(|| format!("allocating {}", path.display()))?;
        let ledger = Self { map: Mapping::of_file(&file, bytes)?, streams };
        ledger.set(Figure::Streams, streams as u64);
        ledger.set(Figure::Magic, MAGIC);
        Ok(ledger)
    }

    /// The ledger that another process created at `path`.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.with_context(|| format!("opening {}", path.display()))?;
        let bytes = usize::try_from(file.metadata()?.len())?;
        ensure!(bytes >= HEADER_WORDS * size_of::<u64>(), "{} is no ledger", path.display());
        let mut ledger = Self { map: Mapping::of_file(&file, bytes)?, streams: 0 };
        let streams = usize::try_from(ledger.get(Figure::Streams)).unwrap_or(usize::MAX);
        let fits = streams < bytes && Self::words(streams) * size_of::<u64>() == bytes;
        ensure!(ledger.get(Figure::Magic) == MAGIC && fits, "{} is no ledger", path.display());
        ledger.streams = streams;
        Ok(ledger)
    }

    /// A ledger of this process alone.
    pub(crate) fn private(streams: usize) -> anyhow::Result<Self> {
        Ok(Self { map: Mapping::anonymous(Self::words(streams) * size_of::<u64>())?, streams })
    }

    fn words(streams: usize) -> usize {
        HEADER_WORDS + BUCKETS + STREAM_WORDS * streams + 2 * Self::unknown_max(streams)
    }

    /// A generator stops when it loses its leadership, so a stream rarely has more than one unknown outcome.
    const fn unknown_max(streams: usize) -> usize {
        4 * streams + 64
    }

    pub(crate) fn streams(&self) -> usize {
        self.streams
    }

    pub(crate) fn get(&self, figure: Figure) -> u64 {
        self.word(figure as usize).load(Ordering::Acquire)
    }

    pub(crate) fn set(&self, figure: Figure, value: u64) {
        self.word(figure as usize).store(value, Ordering::Release);
    }

    pub(crate) fn add(&self, figure: Figure, more: u64) {
        bump(self.word(figure as usize), more);
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.get(Figure::Phase) {
            0 => Phase::Ordered,
            1 => Phase::Running,
            _ => Phase::Ended,
        }
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.set(Figure::Phase, phase as u64);
    }

    pub(crate) fn end(&self, ending: Ending) {
        self.set(Figure::Ending, ending as u64);
        self.set_phase(Phase::Ended);
    }

    /// How the generator ended; [`Ending::Killed`] for one that has not said so.
    pub(crate) fn ending(&self) -> Ending {
        if self.phase() != Phase::Ended {
            return Ending::Killed;
        }
        match self.get(Figure::Ending) {
            0 => Ending::Completed,
            1 => Ending::Unsettled,
            2 => Ending::LeadershipLost,
            3 => Ending::Refused,
            4 => Ending::TooManyUnknown,
            _ => Ending::Killed,
        }
    }

    /// The highest sequence of `stream` that may have entered the log.
    pub(crate) fn sent(&self, stream: usize) -> u64 {
        self.word(self.sent_at(stream)).load(Ordering::Acquire)
    }

    pub(crate) fn set_sent(&self, stream: usize, sequence: u64) {
        self.word(self.sent_at(stream)).store(sequence, Ordering::Release);
    }

    /// The highest sequence of `stream` whose outcome is known: acknowledged, unless it is listed as unknown.
    pub(crate) fn settled(&self, stream: usize) -> u64 {
        self.word(self.sent_at(stream) + 1).load(Ordering::Acquire)
    }

    pub(crate) fn set_settled(&self, stream: usize, sequence: u64) {
        self.word(self.sent_at(stream) + 1).store(sequence, Ordering::Release);
    }

    /// When the command of `stream` that has no outcome was due: one that is in flight, or one that was refused and is
    /// to be sent again. 0 for none.
    pub(crate) fn owed_ns(&self, stream: usize) -> u64 {
        self.word(self.sent_at(stream) + 2).load(Ordering::Acquire)
    }

    pub(crate) fn set_owed_ns(&self, stream: usize, due_ns: u64) {
        self.word(self.sent_at(stream) + 2).store(due_ns, Ordering::Release);
    }

    /// Takes over from `former`, whose generator goes on no more: how far the timetable has been served, and the
    /// commands that it owes and that are definitely not in the log. Both are for as many streams.
    pub(crate) fn succeed(&self, former: &Self) {
        self.set(Figure::ServedNs, former.get(Figure::ServedNs));
        for stream in 0..self.streams.min(former.streams) {
            // What may be in the log is not sent again: its outcome is unknown.
            if former.sent(stream) == former.settled(stream) {
                self.set_owed_ns(stream, former.owed_ns(stream));
            }
        }
    }

    /// Commands whose outcome is not known: those noted, and those in flight when the generator's process died.
    pub(crate) fn unknown_count(&self) -> u64 {
        let in_flight = (0..self.streams).filter(|stream| self.sent(*stream) > self.settled(*stream)).count();
        self.get(Figure::Unknown) + in_flight as u64
    }

    /// Notes that the command may or may not be in the log. Says whether there was room to note it.
    #[must_use]
    pub(crate) fn note_unknown(&self, stream: usize, sequence: u64) -> bool {
        let count = self.get(Figure::Unknown) as usize;
        if count >= Self::unknown_max(self.streams) {
            return false;
        }
        let at = self.unknown_at() + 2 * count;
        self.word(at).store(stream as u64, Ordering::Release);
        self.word(at + 1).store(sequence, Ordering::Release);
        self.add(Figure::Unknown, 1);
        true
    }

    /// The (stream, sequence) pairs that may or may not be in the log.
    pub(crate) fn unknown(&self) -> Vec<(u64, u64)> {
        let count = (self.get(Figure::Unknown) as usize).min(Self::unknown_max(self.streams));
        let places = (0..count).map(|entry| self.unknown_at() + 2 * entry);
        let load = |at| self.word(at).load(Ordering::Acquire);
        places.map(|at| (load(at), load(at + 1))).collect()
    }

    /// Counts a latency within the window.
    pub(crate) fn record(&self, latency_ns: u64) {
        bump(self.word(HEADER_WORDS + bucket_of(latency_ns)), 1);
        if latency_ns > self.get(Figure::LatencyNsMax) {
            self.set(Figure::LatencyNsMax, latency_ns);
        }
    }

    /// Adds the latencies, in nanoseconds, to `histogram`.
    pub(crate) fn add_latencies_to(&self, histogram: &mut Histogram<u64>) {
        for bucket in 0..BUCKETS {
            let count = self.word(HEADER_WORDS + bucket).load(Ordering::Relaxed);
            if count > 0 {
                histogram.saturating_record_n(middle_of(bucket), count);
            }
        }
    }

    fn sent_at(&self, stream: usize) -> usize {
        HEADER_WORDS + BUCKETS + STREAM_WORDS * stream
    }

    fn unknown_at(&self) -> usize {
        HEADER_WORDS + BUCKETS + STREAM_WORDS * self.streams
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        &self.map.words()[at]
    }
}

/// A histogram that takes every latency of a ledger.
pub(crate) fn latency_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3).expect("the bounds are in order")
}

/// There is one writer, so this needs no locked instruction.
fn bump(word: &AtomicU64, more: u64) {
    word.store(word.load(Ordering::Relaxed).wrapping_add(more), Ordering::Release);
}

fn bucket_of(latency_ns: u64) -> usize {
    let latency_ns = latency_ns.min(LATENCY_NS_MAX);
    if latency_ns < 2 * SUB_BUCKETS as u64 {
        return latency_ns as usize;
    }
    let shift = latency_ns.ilog2() - SUB_BITS;
    shift as usize * SUB_BUCKETS + (latency_ns >> shift) as usize
}

fn middle_of(bucket: usize) -> u64 {
    if bucket < 2 * SUB_BUCKETS {
        return bucket as u64;
    }
    let shift = bucket / SUB_BUCKETS - 1;
    let low = ((bucket - shift * SUB_BUCKETS) as u64) << shift;
    low + (1 << shift) / 2
}

/// Shared memory as 64-bit words, zero at first.
struct Mapping {
    start: *mut AtomicU64,
    words: usize,
}

impl Mapping {
    fn of_file(file: &File, bytes: usize) -> anyhow::Result<Self> {
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory in use.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
                file,
                0,
            )
        };
        Ok(Self { start: start.context("mapping a ledger")?.cast(), words: bytes / size_of::<u64>() })
    }

    fn anonymous(bytes: usize) -> anyhow::Result<Self> {
        // SAFETY: as above.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
            )
        };
        Ok(Self { start: start.context("mapping a ledger")?.cast(), words: bytes / size_of::<u64>() })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `words` words from the page-aligned `start` stay mapped, readable and writable as long as `self`
        // lives; any bits are a valid word, and every access, in any process, is atomic.
        unsafe { std::slice::from_raw_parts(self.start, self.words) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this size, and no reference to it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.words * size_of::<u64>()) };
    }
}

// SAFETY: the mapping is memory that belongs to no thread; it is only accessed through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_continuous_and_off_by_less_than_half_a_percent() {
        let mut previous = 0;
        for exponent in 0..42 {
            for latency_ns in [(1_u64 << exponent) - 1, 1 << exponent, (1 << exponent) + (1 << exponent) / 3]
            {
                let bucket = bucket_of(latency_ns);
                assert!(bucket < BUCKETS, "{latency_ns}");
                assert!(bucket >= previous || latency_ns < 2, "{latency_ns}");
                previous = previous.max(bucket);
                let shown = middle_of(bucket);
                let off = shown.abs_diff(latency_ns.min(LATENCY_NS_MAX)) as f64;
                assert!(off <= 0.004 * latency_ns as f64, "{latency_ns} is shown as {shown}");
            }
        }
        for bucket in 1..BUCKETS {
            assert_eq!(bucket_of(middle_of(bucket)), bucket);
        }
    }

    #[test]
    fn another_mapping_of_the_file_sees_what_was_written_after_the_writer_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let parent = Ledger::create(&path, 3).unwrap();
        assert_eq!((parent.phase(), parent.ending()), (Phase::Ordered, Ending::Killed));
        let child = Ledger::open(&path).unwrap();
        assert_eq!(child.streams(), 3);
        child.set_phase(Phase::Running);
        child.set_sent(2, 7);
        child.set_settled(2, 6);
        assert!(child.note_unknown(1, 5));
        child.record(1_000_000);
        child.end(Ending::LeadershipLost);
        drop(child);
        assert_eq!((parent.sent(2), parent.settled(2), parent.sent(0)), (7, 6, 0));
        assert_eq!(parent.unknown(), [(1, 5)]);
        assert_eq!(parent.ending(), Ending::LeadershipLost);
        let mut histogram = latency_histogram();
        parent.add_latencies_to(&mut histogram);
        assert_eq!(histogram.len(), 1);
        assert!(histogram.max().abs_diff(1_000_000) < 5_000);
    }

    #[test]
    fn a_full_list_of_unknown_outcomes_says_so() {
        let ledger = Ledger::private(1).unwrap();
        for sequence in 0..Ledger::unknown_max(1) as u64 {
            assert!(ledger.note_unknown(0, sequence));
        }
        assert!(!ledger.note_unknown(0, 99));
        assert_eq!(ledger.unknown().len(), Ledger::unknown_max(1));
    }

    #[test]
    fn a_file_that_is_no_ledger_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for bytes in [0, 100, 4096, 100_000] {
            let path = dir.path().join(bytes.to_string());
            std::fs::write(&path, vec![0xff; bytes]).unwrap();
            assert!(Ledger::open(&path).is_err(), "{bytes}");
        }
    }
}
