//! What a data directory holds, read file by file and slot by slot. Changes nothing and takes no lock, so it may look at
//! the directory of a running node; what that node is writing meanwhile then shows as a torn end.

use super::dry_run::{open_direct, read_up_to};
use anyhow::Context as _;
use ringraft_block::{AlignedBuf, BLOCK_BYTES, BlockBuf as _, LogIndex, SECTOR_BYTES, Term};
use ringraft_wal::format::{
    BatchInfo, BatchKind, Chain, ENVELOPE_BYTES, Envelope, HARD_STATE_FILE_BYTES, HardState, PriorContent,
    SLOT_BYTES_MAX, SectorChecksums, SegmentHeader, SegmentHeaderError, SegmentOrigin, parse_image,
    read_envelope, read_hard_state, read_segment_header, slot_bytes, slots_start,
};
use serde::Serialize;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// A window of a file that is read at once.
const WINDOW_BYTES: usize = 4 << 20;

/// One copy of the hard state.
#[derive(Debug, Serialize)]
pub(super) struct CopyReport {
    pub(super) file: &'static str,
    /// `valid`, or what is wrong with it.
    pub(super) state: String,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub(super) values: Option<HardStateValues>,
    #[serde(skip)]
    pub(super) hard_state: Option<HardState>,
}

/// What a copy says.
#[derive(Debug, Serialize)]
pub(super) struct HardStateValues {
    pub(super) cluster: String,
    pub(super) node: u64,
    pub(super) incarnation: String,
    pub(super) sequence: u64,
    pub(super) boot: u64,
    pub(super) term: u64,
    pub(super) vote: Option<u64>,
    pub(super) epoch: u64,
    pub(super) cut: CutReport,
    pub(super) start_index: u64,
    pub(super) start_term: u64,
    pub(super) start_chain: String,
    pub(super) witness: u64,
    pub(super) formed: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct CutReport {
    pub(super) index: u64,
    pub(super) generation: u32,
    pub(super) offset: u64,
}

/// A segment file.
#[derive(Debug, Serialize)]
pub(super) struct SegmentReport {
    pub(super) file: String,
    pub(super) bytes: u64,
    /// By its name: `in service`, `free`, `half made` and the like.
    pub(super) stage: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) header: Option<HeaderReport>,
    /// Why there is no header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) header_problem: Option<String>,
    pub(super) slots: Vec<SlotReport>,
    /// What lies between or behind the slots and is neither blank nor of a former life.
    pub(super) other_content: Vec<Extent>,
    /// Bytes of former lives of a recycled segment.
    pub(super) former_life_bytes: u64,
    /// Bytes that were never written.
    pub(super) blank_bytes: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct HeaderReport {
    pub(super) generation: u32,
    pub(super) epoch: u64,
    pub(super) boot: u64,
    pub(super) nonce: String,
    /// `zeros`, or `checksums` of a former life.
    pub(super) prior_content: &'static str,
    /// How it follows what came before it.
    pub(super) origin: String,
}

/// A range of a file.
#[derive(Debug, Serialize)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) what: &'static str,
}

/// An intact envelope and what follows it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct SlotReport {
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) term: u64,
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) chain: String,
    pub(super) image_bytes: u32,
    pub(super) durable_through: u64,
    /// `intact`, or what is wrong with the image.
    pub(super) image: String,
    /// Sectors of the image whose checksums do not fit, of so many.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) bad_sectors: Vec<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) commands: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) payload_bytes: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) time_ms: Option<u64>,
    /// `log`: a part of it. `void`: superseded, behind a cut or below the start. `not accepted`: see recovery.
    pub(super) fate: &'static str,
    #[serde(skip)]
    pub(super) identity: (LogIndex, Chain),
}

impl SlotReport {
    pub(super) fn is_intact(&self) -> bool {
        self.image == "intact"
    }
}

/// All of it.
pub(super) struct Survey {
    pub(super) copies: Vec<CopyReport>,
    pub(super) segments: Vec<SegmentReport>,
    pub(super) segment_bytes: Option<u64>,
    /// The process that holds the directory's lock.
    pub(super) held_by: Option<i32>,
}

impl Survey {
    /// Reads the directory. `on_batch` sees every intact batch with its image and the segment it stands in.
    pub(super) fn take(
        dir: &Path,
        mut on_batch: impl FnMut(&str, &SlotReport, &[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let reading = || format!("reading {}", dir.display());
        let mut names = Vec::new();
        for entry in std::fs::read_dir(dir).with_context(reading)? {
            if let Ok(name) = entry.with_context(reading)?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        let copies = ["hard-a", "hard-b"].map(|file| read_copy(dir, file)).into();
        let mut segments = Vec::new();
        for name in names {
            let Some(stage) = stage_of(&name) else { continue };
            if let Some(report) = read_segment(dir, name, stage, &mut on_batch)? {
                segments.push(report);
            }
        }
        segments.sort_by_key(|segment: &SegmentReport| {
            segment.header.as_ref().map_or(u32::MAX, |header| header.generation)
        });
        let segment_bytes = segments.iter().rev().map(|segment| segment.bytes).find(|bytes| *bytes > 0);
        Ok(Self { copies, segments, segment_bytes, held_by: held_by(dir) })
    }

    /// The copy of the hard state that counts.
    pub(super) fn hard_state(&self) -> Option<&HardState> {
        self.copies.iter().filter_map(|copy| copy.hard_state.as_ref()).max_by_key(|state| state.sequence)
    }

    /// Says of each slot whether it is a part of the log that recovery found.
    pub(super) fn judge_slots(&mut self, log: &[BatchInfo], start: LogIndex) {
        for slot in self.segments.iter_mut().flat_map(|segment| &mut segment.slots) {
            let (first, chain) = slot.identity;
            let at = log.binary_search_by_key(&first, |info| info.first);
            slot.fate = match at {
                Ok(at) if log[at].chain == chain => "log",
                _ if first <= start || slot.is_intact() => "void",
                _ => "not accepted",
            };
        }
    }
}

fn stage_of(name: &str) -> Option<&'static str> {
    let (_, suffix) = name.strip_prefix("segment-")?.split_once('.')?;
    Some(match suffix {
        "wal" => "in service",
        "free" => "free",
        "used" => "free, recycled",
        "new" => "half made",
        "old" => "half recycled",
        _ => "unknown",
    })
}

fn read_copy(dir: &Path, file: &'static str) -> CopyReport {
    let failed = |state: String| CopyReport { file, state, values: None, hard_state: None };
    let mut buffer = AlignedBuf::zeroed(HARD_STATE_FILE_BYTES);
    let read = open_direct(&dir.join(file)).and_then(|file| read_up_to(&file, 0, buffer.bytes_mut()));
    let got = match read {
        Ok(got) => got,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return failed("missing".to_owned()),
        Err(error) => return failed(format!("unreadable: {error}")),
    };
    match read_hard_state(&buffer.bytes()[..got]) {
        Err(error) => failed(error.to_string()),
        Ok(state) => CopyReport {
            file,
            state: "valid".to_owned(),
            values: Some(HardStateValues {
                cluster: state.cluster.to_string(),
                node: state.node.get(),
                incarnation: state.incarnation.to_string(),
                sequence: state.sequence,
                boot: state.boot,
                term: state.term.get(),
                vote: state.vote.map(|vote| vote.get()),
                epoch: state.epoch,
                cut: CutReport {
                    index: state.cut.index.get(),
                    generation: state.cut.generation,
                    offset: state.cut.offset,
                },
                start_index: state.start.index.get(),
                start_term: state.start.term.get(),
                start_chain: state.start.chain.to_string(),
                witness: state.witness.get(),
                formed: !state.configuration.is_empty(),
            }),
            hard_state: Some(state),
        },
    }
}

/// A file read through a window that moves.
struct Windowed<'a> {
    file: &'a File,
    bytes: u64,
    buffer: AlignedBuf,
    start: u64,
    filled: usize,
    /// Blocks that the device did not return, as offsets.
    unreadable: Vec<u64>,
}

impl<'a> Windowed<'a> {
    fn new(file: &'a File, bytes: u64) -> Self {
        let buffer = AlignedBuf::zeroed(WINDOW_BYTES + SLOT_BYTES_MAX);
        Self { file, bytes, buffer, start: 0, filled: 0, unreadable: Vec::new() }
    }

    /// So many bytes from `offset`, fewer at the file's end. Blocks that cannot be read are zeros and noted.
    fn at(&mut self, offset: u64, bytes: usize) -> &[u8] {
        let bytes = bytes.min(self.bytes.saturating_sub(offset) as usize).min(SLOT_BYTES_MAX);
        let end = offset + bytes as u64;
        if offset < self.start || end > self.start + self.filled as u64 {
            self.start = offset - offset % BLOCK_BYTES as u64;
            self.fill();
        }
        let at = (offset - self.start) as usize;
        &self.buffer.bytes()[at..(at + bytes).min(self.filled)]
    }

    fn fill(&mut self) {
        let wanted = (self.bytes - self.start).min((WINDOW_BYTES + SLOT_BYTES_MAX) as u64) as usize;
        let wanted_blocks = wanted.next_multiple_of(BLOCK_BYTES).min(self.buffer.bytes().len());
        match read_up_to(self.file, self.start, &mut self.buffer.bytes_mut()[..wanted_blocks]) {
            Ok(got) => self.filled = got,
            // Once more block by block, to find out which.
            Err(_) => {
                for at in (0..wanted_blocks).step_by(BLOCK_BYTES) {
                    let offset = self.start + at as u64;
                    let block = &mut self.buffer.bytes_mut()[at..at + BLOCK_BYTES];
                    if read_up_to(self.file, offset, block).is_err() {
                        block.fill(0);
                        self.unreadable.push(offset);
                    }
                }
                self.filled = wanted;
            }
        }
    }

    fn is_unreadable(&self, offset: u64, bytes: u64) -> bool {
        self.unreadable.iter().any(|at| *at < offset + bytes && offset < at + BLOCK_BYTES as u64)
    }
}

fn read_segment(
    dir: &Path,
    name: String,
    stage: &'static str,
    on_batch: &mut impl FnMut(&str, &SlotReport, &[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<Option<SegmentReport>> {
    let path = dir.join(&name);
    let file = match open_direct(&path) {
        Ok(file) => file,
        // A live node has removed or renamed it meanwhile.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("opening {}", path.display())),
    };
    let bytes = file.metadata().with_context(|| format!("opening {}", path.display()))?.len();
    let mut report = SegmentReport {
        file: name,
        bytes,
        stage,
        header: None,
        header_problem: None,
        slots: Vec::new(),
        other_content: Vec::new(),
        former_life_bytes: 0,
        blank_bytes: 0,
    };
    if stage != "in service" {
        return Ok(Some(report));
    }
    let mut window = Windowed::new(&file, bytes);
    let header = read_segment_header(window.at(0, BLOCK_BYTES));
    let header = match header {
        _ if window.is_unreadable(0, BLOCK_BYTES as u64) => {
            report.header_problem = Some("the device does not return it".to_owned());
            return Ok(Some(report));
        }
        Ok(header) => header,
        Err(error) => {
            let blank = error == SegmentHeaderError::Blank;
            let problem = if blank { "blank: never used".to_owned() } else { error.to_string() };
            report.header_problem = Some(problem);
            return Ok(Some(report));
        }
    };
    report.header = Some(HeaderReport {
        generation: header.generation,
        epoch: header.epoch,
        boot: header.boot,
        nonce: format!("{:016x}", header.nonce),
        prior_content: match header.prior_content {
            PriorContent::Zeros => "zeros",
            PriorContent::Checksums => "checksums",
        },
        origin: match header.origin {
            SegmentOrigin::Rollover { previous } => format!("continues generation {previous}"),
            SegmentOrigin::Cut { cut, .. } => {
                format!(
                    "begins behind a cut at index {} (generation {}, offset {})",
                    cut.index, cut.generation, cut.offset
                )
            }
        },
    });
    walk_slots(&mut window, &header, &mut report, on_batch)?;
    Ok(Some(report))
}

fn walk_slots(
    window: &mut Windowed<'_>,
    header: &SegmentHeader,
    report: &mut SegmentReport,
    on_batch: &mut impl FnMut(&str, &SlotReport, &[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut offset = slots_start(header.segment_bytes);
    while offset + BLOCK_BYTES as u64 <= report.bytes {
        let block = window.at(offset, BLOCK_BYTES);
        if block.len() < BLOCK_BYTES {
            break;
        }
        let envelope = read_envelope(block).ok();
        if let Some(envelope) = envelope.filter(|envelope| belongs(envelope, header, offset)) {
            let bytes = slot_bytes(envelope.image_bytes as usize) as u64;
            let slot = judge_slot(window, &envelope, offset);
            if slot.is_intact() {
                let image = window.at(offset, bytes as usize);
                let image = &image[ENVELOPE_BYTES..ENVELOPE_BYTES + envelope.image_bytes as usize];
                on_batch(&report.file, &slot, image)?;
                report.slots.push(slot);
                offset += bytes;
                continue;
            }
            // The length is the envelope's, but what lies under it may be anything: gone through block by block.
            report.slots.push(slot);
            offset += BLOCK_BYTES as u64;
            continue;
        }
        let blank = block.iter().all(|byte| *byte == 0);
        let former = envelope.is_some_and(|envelope| envelope.nonce != header.nonce);
        let covered = report.slots.last().is_some_and(|slot| offset < slot.offset + slot.bytes);
        let bytes = BLOCK_BYTES as u64;
        if window.is_unreadable(offset, bytes) {
            extend(&mut report.other_content, offset, bytes, "unreadable");
        } else if blank {
            report.blank_bytes += bytes;
        } else if covered {
            // Reported with its slot.
        } else if former || header.prior_content == PriorContent::Checksums {
            report.former_life_bytes += bytes;
        } else {
            extend(&mut report.other_content, offset, bytes, "neither blank nor a batch of this place");
        }
        offset += bytes;
    }
    Ok(())
}

fn extend(extents: &mut Vec<Extent>, offset: u64, bytes: u64, what: &'static str) {
    match extents.last_mut() {
        Some(last) if last.offset + last.bytes == offset && last.what == what => last.bytes += bytes,
        _ => extents.push(Extent { offset, bytes, what }),
    }
}

fn belongs(envelope: &Envelope, header: &SegmentHeader, offset: u64) -> bool {
    envelope.cluster == header.cluster
        && envelope.group == header.group
        && envelope.nonce == header.nonce
        && envelope.generation == header.generation
        && envelope.epoch == header.epoch
        && envelope.boot == header.boot
        && envelope.offset == offset
}

fn judge_slot(window: &mut Windowed<'_>, envelope: &Envelope, offset: u64) -> SlotReport {
    let image_bytes = envelope.image_bytes as usize;
    let bytes = slot_bytes(image_bytes);
    let mut slot = SlotReport {
        offset,
        bytes: bytes as u64,
        term: envelope.term.get(),
        first: envelope.first.get(),
        last: envelope.last.get(),
        chain: envelope.chain.to_string(),
        image_bytes: envelope.image_bytes,
        durable_through: envelope.durable_through.get(),
        image: "intact".to_owned(),
        bad_sectors: Vec::new(),
        kind: None,
        commands: None,
        payload_bytes: None,
        time_ms: None,
        fate: "log",
        identity: (envelope.first, envelope.chain),
    };
    let held = window.at(offset, bytes);
    let Some(image) = held.get(ENVELOPE_BYTES..ENVELOPE_BYTES + image_bytes) else {
        "reaches beyond the end of the file".clone_into(&mut slot.image);
        return slot;
    };
    match parse_image(image) {
        Ok(view) => {
            let info = view.info();
            let named = (info.group, info.term, info.first, info.last, info.chain, info.image_bytes)
                == (
                    envelope.group,
                    envelope.term,
                    envelope.first,
                    envelope.last,
                    envelope.chain,
                    envelope.image_bytes,
                );
            if !named {
                "is another batch than its envelope names".clone_into(&mut slot.image);
            }
            slot.kind = Some(kind_name(info.kind));
            slot.commands = Some(if info.kind == BatchKind::Empty { 0 } else { info.count() });
            slot.payload_bytes = Some(info.payload_bytes);
            slot.time_ms = Some(info.time_ms);
        }
        Err(error) => {
            slot.bad_sectors = match SectorChecksums::of(image) {
                Ok(sectors) => (0..sectors.count()).filter(|ordinal| !sectors.is_good(*ordinal)).collect(),
                Err(_) => Vec::new(),
            };
            let blank =
                image.chunks(SECTOR_BYTES).filter(|sector| sector.iter().all(|byte| *byte == 0)).count();
            slot.image =
                format!("{error}; {blank} of its {} sectors are blank", image_bytes.div_ceil(SECTOR_BYTES));
        }
    }
    if window.is_unreadable(offset, bytes as u64) {
        "the device does not return all of it".clone_into(&mut slot.image);
    }
    slot
}

fn kind_name(kind: BatchKind) -> &'static str {
    match kind {
        BatchKind::Commands => "commands",
        BatchKind::Membership => "membership",
        BatchKind::Empty => "empty",
        BatchKind::SessionControl => "session control",
        BatchKind::Barrier => "barrier",
    }
}

/// Who holds the directory's lock, as the kernel lists it: asking by trying to lock could keep a node from starting.
fn held_by(dir: &Path) -> Option<i32> {
    let metadata = std::fs::metadata(dir.join("LOCK")).ok()?;
    let (major, minor) = (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
    let inode = format!("{major:02x}:{minor:02x}:{}", metadata.ino());
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| *word != "FLOCK").skip(3);
        let (pid, at) = (words.next()?, words.next()?);
        (at == inode).then(|| pid.parse().ok()).flatten()
    })
}

/// The term and index of the log's end, for people.
pub(super) fn position(term: Term, index: LogIndex) -> String {
    format!("index {index} of term {term}")
}
