//! A node's log as its disk holds it.

use anyhow::{Context as _, ensure};
use ringraft_block::{BLOCK_BYTES, LogIndex, SECTOR_BYTES, Term, round_up_to_block};
use ringraft_wal::format::{
    BatchInfo, BatchKind, Chain, ENVELOPE_BYTES, HARD_STATE_FILE_BYTES, HardState, SegmentHeader,
    SegmentHeaderError, SegmentOrigin, content_checksum, parse_image, prior_checksum_at, read_envelope,
    read_hard_state, read_segment_header, slot_bytes, slots_start,
};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// A segment is read in pieces of this size.
const READ_BYTES: usize = 8 << 20;
/// What the name of a segment in service ends with.
const IN_SERVICE: &str = "wal";

/// A batch and where it is.
#[derive(Clone, Copy)]
pub(super) struct Found {
    pub(super) info: BatchInfo,
    segment: usize,
    offset: u64,
}

/// A node's log as its disk holds it.
pub(super) struct Log {
    segments: Vec<Segment>,
    start: (LogIndex, Term, Chain),
    /// The last index that a snapshot covers, by the files' names.
    pub(super) snapshot: Option<u64>,
    pub(super) batches: Vec<Found>,
    pub(super) problems: Vec<String>,
}

struct Segment {
    path: PathBuf,
    header: SegmentHeader,
}

impl Log {
    pub(super) fn read(dir: &Path) -> anyhow::Result<Self> {
        let (mut segments, mut hard_state, mut problems) = (Vec::new(), None, Vec::new());
        let mut snapshot = None;
        for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
            let path = entry?.path();
            let name = path.file_name().and_then(OsStr::to_str).and_then(ringraft::snapshots::parse_name);
            snapshot = snapshot.max(name.map(LogIndex::get));
            if path.is_file() {
                look_into(path, &mut segments, &mut hard_state, &mut problems)?;
            }
        }
        segments.sort_by_key(|segment| segment.header.generation);
        let start = (LogIndex(0), Term(0), Chain::default());
        let mut log = Self { segments, start, snapshot, batches: Vec::new(), problems };
        let Some(hard_state) = hard_state else {
            log.problems.push("there is no valid hard state".to_owned());
            return Ok(log);
        };
        log.start = (hard_state.start.index, hard_state.start.term, hard_state.start.chain);
        for number in 0..log.segments.len() {
            let header = log.segments[number].header;
            if header.node != hard_state.node || header.incarnation != hard_state.incarnation {
                log.problems.push(format!("{} is of another node", log.segments[number].path.display()));
                continue;
            }
            if let SegmentOrigin::Cut { cut, after } = header.origin {
                log.cut_after(cut.index);
                let (index, _, chain) = log.end();
                // Before the cluster is formed there is no chain to agree on, nor behind what was purged since.
                let is_there = after.index >= log.start();
                if is_there && (index != after.index || (index.get() > 0 && chain != after.chain)) {
                    log.problems.push(format!(
                        "segment {} says that the log ended at {} with chain {}; it ends at {index} with {chain}",
                        header.generation, after.index, after.chain
                    ));
                }
            }
            log.read_segment(number)?;
            let next = log.segments.get(number + 1).map(|next| next.header.generation);
            let newest_before_cut = header.generation <= hard_state.generation
                && next.is_none_or(|generation| generation > hard_state.generation);
            if newest_before_cut && header.epoch < hard_state.epoch {
                // The cut is recorded, though perhaps no segment after it was begun.
                log.cut_after(hard_state.cut.index);
            }
        }
        Ok(log)
    }

    /// Where the log begins: behind what was purged, if anything was.
    pub(super) fn start(&self) -> LogIndex {
        self.start.0
    }

    /// The term of what comes before that, if that is anything.
    pub(super) fn start_term(&self) -> Option<u64> {
        let (index, term, _) = self.start;
        (index > LogIndex(0)).then_some(term.get())
    }

    /// Whether there is an index of which this log and `other` both know the chain.
    pub(super) fn meets(&self, other: &Self) -> bool {
        self.start().max(other.start()) <= self.last().min(other.last())
    }

    /// The chain at `index`, which is where the log begins or a batch ends.
    fn chain_at(&self, index: LogIndex) -> Option<Chain> {
        let found = self.batches.binary_search_by_key(&index, |found| found.info.last).ok();
        let start = (index == self.start()).then_some(self.start.2);
        found.map(|at| self.batches[at].info.chain).or(start)
    }

    /// The position and chain at the log's end.
    fn end(&self) -> (LogIndex, Term, Chain) {
        self.batches.last().map_or(self.start, |found| (found.info.last, found.info.term, found.info.chain))
    }

    pub(super) fn last(&self) -> LogIndex {
        self.end().0
    }

    pub(super) fn last_term(&self) -> Term {
        self.end().1
    }

    fn cut_after(&mut self, index: LogIndex) {
        while self.batches.last().is_some_and(|found| found.info.last > index) {
            self.batches.pop();
        }
    }

    fn read_segment(&mut self, number: usize) -> anyhow::Result<()> {
        let Segment { path, header } = &self.segments[number];
        let header = *header;
        let mut file = Pieces::open(path)?;
        let mut offset = slots_start(header.segment_bytes);
        while let Some(bytes) = file.at(offset, BLOCK_BYTES)? {
            let Ok(envelope) = read_envelope(bytes) else { break };
            let here = envelope.nonce == header.nonce
                && envelope.generation == header.generation
                && envelope.offset == offset
                && envelope.cluster == header.cluster;
            let image_bytes = envelope.image_bytes as usize;
            if !here {
                break;
            }
            let Some(slot) = file.at(offset, slot_bytes(image_bytes))? else { break };
            let Some(Ok(view)) = slot.get(ENVELOPE_BYTES..ENVELOPE_BYTES + image_bytes).map(parse_image)
            else {
                break;
            };
            let info = view.info();
            if info.last <= self.start.0 {
                // Purged, in a segment that holds more.
                offset += slot_bytes(image_bytes) as u64;
                continue;
            }
            let (end, _, chain) = self.end();
            // A later write of a batch may be there though an earlier one was lost in a crash.
            if info.first != end.next() || !view.verify_chain(chain) || info.chain != envelope.chain {
                break;
            }
            self.batches.push(Found { info, segment: number, offset });
            offset += slot_bytes(image_bytes) as u64;
        }
        Ok(())
    }

    /// The first index, up to `end`, at which this log is another than `other`, as far as both go. What one of them has purged says
    /// nothing; but a chain is of all that came before.
    pub(super) fn differs_from(&self, other: &Self, end: u64) -> Option<LogIndex> {
        let shorter = self.last().min(other.last()).get().min(end);
        let later = self.start().max(other.start());
        // Before the cluster is formed there is no chain to agree on.
        if later > LogIndex(0) && self.meets(other) && self.chain_at(later) != other.chain_at(later) {
            return Some(later);
        }
        let behind = |log: &Self| log.batches.partition_point(|found| found.info.last <= later);
        let pairs = self.batches[behind(self)..].iter().zip(&other.batches[behind(other)..]);
        let mut pairs = pairs.take_while(|(a, b)| a.info.last.min(b.info.last).get() <= shorter);
        let differs = |(a, b): &(&Found, &Found)| a.info.last != b.info.last || a.info.chain != b.info.chain;
        pairs.find(differs).map(|(a, _)| a.info.last)
    }

    /// Reads the commands again, in order, up to `end`.
    pub(super) fn for_each_command(&self, end: LogIndex, mut each: impl FnMut(&[u8])) -> anyhow::Result<()> {
        let mut file: Option<(usize, Pieces)> = None;
        let batches = self.batches.iter().take_while(|found| found.info.last <= end);
        for found in batches.filter(|found| found.info.kind == BatchKind::Commands) {
            if file.as_ref().is_none_or(|(segment, _)| *segment != found.segment) {
                file = Some((found.segment, Pieces::open(&self.segments[found.segment].path)?));
            }
            let Some((_, file)) = &mut file else { continue };
            let image_bytes = found.info.image_bytes as usize;
            let slot = file.at(found.offset, slot_bytes(image_bytes))?.context("the file became shorter")?;
            let image =
                slot.get(ENVELOPE_BYTES..ENVELOPE_BYTES + image_bytes).context("the file became shorter")?;
            let view = parse_image(image).context("a batch changed between two reads")?;
            ensure!(view.info() == found.info, "a batch changed between two reads");
            view.commands().for_each(|command| each(command.bytes));
        }
        Ok(())
    }
}

/// Sorts a file: a segment in service, a copy of the hard state, or something else. What a segment's name promises and
/// its content does not keep is a problem: the batches in it are not read.
fn look_into(
    path: PathBuf,
    segments: &mut Vec<Segment>,
    hard_state: &mut Option<HardState>,
    problems: &mut Vec<String>,
) -> anyhow::Result<()> {
    let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    let read =
        |offset, bytes| read_at(&file, offset, bytes).with_context(|| format!("reading {}", path.display()));
    let bytes = read(0, HARD_STATE_FILE_BYTES)?;
    if path.extension().is_none_or(|extension| extension != IN_SERVICE) {
        if let Ok(read) = read_hard_state(&bytes)
            && hard_state.as_ref().is_none_or(|known| known.sequence < read.sequence)
        {
            *hard_state = Some(read);
        }
        return Ok(());
    }
    let length = file.metadata().with_context(|| format!("looking at {}", path.display()))?.len();
    let problem = match read_segment_header(&bytes) {
        Ok(header) if header.segment_bytes == length => {
            segments.push(Segment { path, header });
            return Ok(());
        }
        Ok(header) => format!("its header speaks of {} bytes, but it has {length}", header.segment_bytes),
        // Taken into service, its header not yet written. Slots come after the header, never before: there are zeros, or what
        // the file held in its former life, of which it has the checksums.
        Err(SegmentHeaderError::Blank) => {
            let start = slots_start(length);
            let slot = read(start, BLOCK_BYTES)?;
            let known = read(prior_checksum_at(start), BLOCK_BYTES / SECTOR_BYTES * 4)?;
            let is_known = |(sector, known): (&[u8], &[u8])| content_checksum(sector).to_le_bytes() == *known;
            let is_former =
                slot.len() == BLOCK_BYTES && slot.chunks(SECTOR_BYTES).zip(known.chunks(4)).all(is_known);
            if is_former || slot.iter().all(|byte| *byte == 0) {
                return Ok(());
            }
            "its header is blank, but its slots are not".to_owned()
        }
        Err(error) => error.to_string(),
    };
    problems.push(format!("{}: {problem}", path.display()));
    Ok(())
}

/// A file, read forwards in large pieces.
struct Pieces {
    file: File,
    path: PathBuf,
    start: u64,
    piece: Vec<u8>,
}

impl Pieces {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential);
        Ok(Self { file, path: path.to_owned(), start: 0, piece: Vec::new() })
    }

    /// `bytes` bytes at `offset`; none where the file ends before.
    fn at(&mut self, offset: u64, bytes: usize) -> anyhow::Result<Option<&[u8]>> {
        let end = self.start + self.piece.len() as u64;
        if offset < self.start || offset + bytes as u64 > end {
            let wanted = READ_BYTES.max(round_up_to_block(bytes));
            self.piece = read_at(&self.file, offset, wanted)
                .with_context(|| format!("reading {}", self.path.display()))?;
            self.start = offset;
        }
        let at = (offset - self.start) as usize;
        Ok(self.piece.get(at..at + bytes))
    }
}

/// Up to `bytes` bytes; fewer at the end of the file.
fn read_at(file: &File, offset: u64, bytes: usize) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![0; bytes];
    let mut filled = 0;
    while filled < bytes {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer.truncate(filled);
    Ok(buffer)
}
