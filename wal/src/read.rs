//! Reading batches back: for a follower that is behind, and for applying what has left memory.
//!
//! The happy path: a request is resolved to its batches by the index; each is read into a block of its own, so that it can be
//! sent and applied without a copy; each is verified as recovery would: envelope, every checksum, chain.
//!
//! Failures are values of the request. A batch that is damaged on disk can be fetched from a peer; the log goes on.

use crate::disk::{Access, Disk, DiskDone, DiskErrorKind, DiskOp, DiskOpId, DiskOutput, FileId};
use crate::error::ReadError;
use crate::format::{BatchInfo, Chain, ENVELOPE_BYTES, parse_image, read_envelope};
use crate::index::{Index, Place};
use crate::ops::{Ops, Owner, take};
use crate::recovery::belongs;
use crate::salvage::Salvaged;
use crate::segment::{Descriptor, Segment, SegmentTable};
use ringraft_block::{BlockBuf, LogIndex, Pool, SharedBlock};
use std::collections::VecDeque;
use std::fmt;

/// So many reads of batches are on their way at once for the log's user.
pub(crate) const READS_IN_FLIGHT: usize = 8;
/// So many requests may wait.
pub(crate) const REQUESTS_MAX: usize = 64;
/// A request returns at most so many batches.
const BATCHES_MAX: usize = 64;
/// So many segments that are not appended to are kept open.
const DESCRIPTORS_MAX: usize = 64;

/// A batch read from the log. Its image stands at `block[512..512 + info.image_bytes]`.
pub struct StoredBatch<B: BlockBuf> {
    /// What the log knows of it.
    pub info: BatchInfo,
    /// Envelope, image and padding.
    pub block: SharedBlock<B>,
}

impl<B: BlockBuf> StoredBatch<B> {
    /// The verified image.
    #[must_use]
    pub fn image(&self) -> &[u8] {
        &self.block[ENVELOPE_BYTES..ENVELOPE_BYTES + self.info.image_bytes as usize]
    }
}

impl<B: BlockBuf> fmt::Debug for StoredBatch<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoredBatch").field("info", &self.info).finish_non_exhaustive()
    }
}

impl<B: BlockBuf> Clone for StoredBatch<B> {
    fn clone(&self) -> Self {
        Self { info: self.info, block: self.block.clone() }
    }
}

struct Item<B: BlockBuf> {
    info: BatchInfo,
    place: Place,
    previous: Chain,
    state: ItemState<B>,
}

enum ItemState<B: BlockBuf> {
    Waiting,
    Reading(DiskOpId),
    Here(SharedBlock<B>),
    /// It is not what was asked for. Only of salvage, of which that is not known before.
    Failed,
}

struct Request<B: BlockBuf> {
    token: u64,
    items: Vec<Item<B>>,
    /// The item is not of the log, so what happens to the log does not concern it; it begins at this index.
    salvage: Option<LogIndex>,
    /// The first failure; nothing more is started, and what is in flight is awaited.
    error: Option<ReadError>,
}

impl<B: BlockBuf> Request<B> {
    fn is_finished(&self) -> bool {
        let reading = self.items.iter().any(|item| matches!(item.state, ItemState::Reading(_)));
        let done = |item: &Item<B>| matches!(item.state, ItemState::Here(_) | ItemState::Failed);
        let whole = self.items.iter().all(done);
        whole || self.error.is_some() && !reading
    }

    fn into_result(self) -> Result<Vec<StoredBatch<B>>, ReadError> {
        if let Some(error) = self.error {
            return Err(error);
        }
        let blocks = self.items.into_iter().filter_map(|item| match item.state {
            ItemState::Here(block) => Some(StoredBatch { info: item.info, block }),
            _ => None,
        });
        if let Some(first) = self.salvage {
            let batches: Vec<_> = blocks.collect();
            return if batches.is_empty() { Err(ReadError::NotFound { first }) } else { Ok(batches) };
        }
        Ok(blocks.collect())
    }
}

/// What came of a request.
pub(crate) type ReadResult<B> = (u64, Result<Vec<StoredBatch<B>>, ReadError>);

/// The requests, oldest first.
pub(crate) struct Reads<B: BlockBuf> {
    requests: VecDeque<Request<B>>,
    in_flight: usize,
    in_flight_max: usize,
    /// Segments being opened.
    opening: Vec<(DiskOpId, u32)>,
    /// Counts up with every use of a segment.
    clock: u64,
    /// Batches of the log that were found damaged, to be taken note of.
    damaged: Vec<LogIndex>,
}

impl<B: BlockBuf> Reads<B> {
    pub(crate) fn new(in_flight_max: usize) -> Self {
        Self {
            requests: VecDeque::new(),
            in_flight: 0,
            in_flight_max,
            opening: Vec::new(),
            clock: 0,
            damaged: Vec::new(),
        }
    }

    pub(crate) fn is_reading(&self, id: DiskOpId) -> bool {
        let reads = |item: &Item<B>| matches!(item.state, ItemState::Reading(other) if other == id);
        self.requests.iter().any(|request| request.items.iter().any(reads))
    }

    /// The first indices of the batches that were found damaged since the last call.
    pub(crate) fn take_damaged(&mut self) -> Vec<LogIndex> {
        std::mem::take(&mut self.damaged)
    }

    pub(crate) fn len(&self) -> usize {
        self.requests.len()
    }

    /// Queues a request for the durable batches from `first` on, as many as fit `bytes_max`, at least one. It ends before a batch
    /// that is known to be damaged. Returns the bytes that will be read.
    pub(crate) fn request(
        &mut self,
        index: &Index,
        segments: &SegmentTable,
        durable_through: LogIndex,
        token: u64,
        first: LogIndex,
        bytes_max: usize,
    ) -> usize {
        let mut items = Vec::new();
        let mut damaged = None;
        let mut bytes = 0usize;
        let mut asked = 0;
        let mut ordinal = index.ordinal_starting_at(first);
        while let Some((info, place)) = ordinal.and_then(|ordinal| index.at(ordinal)) {
            bytes = bytes.saturating_add(info.slot_bytes());
            let enough = !items.is_empty() && bytes > bytes_max || items.len() == BATCHES_MAX;
            let Some(previous) = index.chain_at(info.first.previous()) else { break };
            if enough || info.last > durable_through {
                break;
            }
            if index.damage_of(info.first).is_some() {
                let segment = segments.get(place.generation).map(|segment| segment.name).unwrap_or_default();
                let (first, offset) = (info.first, place.offset);
                damaged = Some(ReadError::Damaged { first, segment: segment.to_string(), offset });
                break;
            }
            asked = bytes;
            items.push(Item { info, place, previous, state: ItemState::Waiting });
            ordinal = ordinal.map(|ordinal| ordinal + 1);
        }
        let error = items.is_empty().then(|| damaged.unwrap_or(ReadError::NotFound { first }));
        self.requests.push_back(Request { token, items, salvage: None, error });
        asked
    }

    /// Queues a request for a batch that begins at `first` and is not of the log. It is answered only when its chain continues
    /// `previous`.
    pub(crate) fn request_salvage(
        &mut self,
        batch: Option<&Salvaged>,
        token: u64,
        first: LogIndex,
        previous: Chain,
    ) {
        let item = |batch: &Salvaged| Item {
            info: batch.info,
            place: batch.place,
            previous,
            state: ItemState::Waiting,
        };
        let items = batch.map(item).into_iter().collect();
        self.requests.push_back(Request { token, items, salvage: Some(first), error: None });
    }

    /// Answers a request at once.
    pub(crate) fn refuse(&mut self, token: u64, error: ReadError) {
        self.requests.push_back(Request { token, items: Vec::new(), salvage: None, error: Some(error) });
    }

    /// The log is cut after `index`: a request that reaches behind it would answer with what is void.
    pub(crate) fn cut_after(&mut self, index: LogIndex) {
        for request in &mut self.requests {
            if request.salvage.is_none() && request.items.last().is_some_and(|item| item.info.last > index) {
                request.error.get_or_insert(ReadError::Truncated);
            }
        }
    }

    /// The log now starts behind `start`: a request that begins before it is for a snapshot to answer.
    pub(crate) fn start_behind(&mut self, start: LogIndex) {
        for request in &mut self.requests {
            if let Some(first) = request.items.first().map(|item| item.info.first)
                && first <= start
            {
                request.error.get_or_insert(ReadError::NotFound { first });
            }
        }
    }

    /// Fails everything that waits.
    pub(crate) fn stop(&mut self) {
        for request in &mut self.requests {
            request.error.get_or_insert(ReadError::Stopped);
        }
    }

    /// Whether [`Self::finished`] has one.
    pub(crate) fn has_finished(&self) -> bool {
        self.requests.front().is_some_and(Request::is_finished)
    }

    /// The next request that is finished, in the order of the requests.
    pub(crate) fn finished(&mut self) -> Option<ReadResult<B>> {
        if !self.has_finished() {
            return None;
        }
        let request = self.requests.pop_front()?;
        Some((request.token, request.into_result()))
    }

    /// Starts reads as far as the bounds allow, oldest request first.
    pub(crate) fn advance<D: Disk<Buf = B>>(
        &mut self,
        disk: &mut D,
        ops: &mut Ops,
        pool: &Pool<B>,
        segments: &mut SegmentTable,
        active: Option<u32>,
    ) {
        if self.requests.is_empty() {
            return;
        }
        let mut requests = std::mem::take(&mut self.requests);
        for request in &mut requests {
            for item in &mut request.items {
                if request.error.is_some() || self.in_flight == self.in_flight_max {
                    break;
                }
                if !matches!(item.state, ItemState::Waiting) {
                    continue;
                }
                self.clock += 1;
                let Some(segment) = segments.get_mut(item.place.generation) else {
                    if request.salvage.is_some() {
                        item.state = ItemState::Failed;
                        continue;
                    }
                    request.error = Some(ReadError::Truncated);
                    break;
                };
                segment.used = self.clock;
                // The segment was rebuilt: its name means another file than the one that is open.
                segment.is_replaced &= segment.descriptor != Descriptor::Closed;
                if segment.is_replaced {
                    if segment.operations == 0 && close(disk, ops, segment).is_some() {
                        segment.is_replaced = false;
                    }
                    break;
                }
                let Some(file) = segment.file() else {
                    if segment.descriptor == Descriptor::Closed {
                        self.open(disk, ops, segment);
                        close_idle(disk, ops, segments, active);
                    }
                    break;
                };
                let bytes = item.info.slot_bytes();
                let block = match take(pool, disk, bytes) {
                    Ok(block) => block,
                    Err(error) => {
                        request.error = Some(ReadError::Disk(error));
                        break;
                    }
                };
                let op = DiskOp::Read { file, offset: item.place.offset, block, bytes };
                item.state = ItemState::Reading(ops.submit(disk, Owner::Read, op));
                segment.operations += 1;
                self.in_flight += 1;
            }
        }
        self.requests = requests;
    }

    fn open<D: Disk<Buf = B>>(&mut self, disk: &mut D, ops: &mut Ops, segment: &mut Segment) {
        let op = DiskOp::Open { name: segment.name.to_string(), access: Access::Read };
        let id = ops.submit(disk, Owner::Descriptor, op);
        segment.descriptor = Descriptor::Opening;
        self.opening.push((id, segment.generation()));
    }

    /// The generation whose opening has ended, when `id` was one.
    pub(crate) fn opened(&mut self, id: DiskOpId) -> Option<u32> {
        let at = self.opening.iter().position(|(opening, _)| *opening == id)?;
        Some(self.opening.swap_remove(at).1)
    }

    /// A segment could not be opened: its waiting reads fail.
    pub(crate) fn fail_segment(&mut self, generation: u32, error: &crate::disk::DiskError) {
        for request in &mut self.requests {
            let waits = |item: &Item<B>| {
                item.place.generation == generation && matches!(item.state, ItemState::Waiting)
            };
            if request.items.iter().any(waits) {
                request.error.get_or_insert(ReadError::Disk(error.clone()));
            }
        }
    }

    /// Takes a completed read; returns the generation that it was of.
    pub(crate) fn handle(
        &mut self,
        index: &Index,
        segments: &SegmentTable,
        done: DiskDone<B>,
    ) -> Option<u32> {
        let (item, error, is_salvage) = self.requests.iter_mut().find_map(|request| {
            let is_it = |item: &&mut Item<B>| matches!(item.state, ItemState::Reading(id) if id == done.id);
            Some((request.items.iter_mut().find(is_it)?, &mut request.error, request.salvage.is_some()))
        })?;
        self.in_flight -= 1;
        let generation = item.place.generation;
        item.state = ItemState::Waiting;
        let outcome = match done.result {
            // The log may have been cut while the read was under way, and its place written anew.
            _ if !is_salvage && index.chain_at(item.info.last) != Some(item.info.chain) => {
                Err(ReadError::Truncated)
            }
            Ok(DiskOutput::Read { block, bytes }) => match segments.get(generation) {
                Some(segment) if bytes == item.info.slot_bytes() && verify(item, segment, &block) => {
                    Ok(block)
                }
                Some(segment) => Err(damaged(item, segment)),
                None => Err(ReadError::Truncated),
            },
            Ok(_) => Err(ReadError::Stopped),
            // A sector that cannot be read is as good as a rotten one.
            Err(error) if error.kind == DiskErrorKind::Io => match segments.get(generation) {
                Some(segment) => Err(damaged(item, segment)),
                None => Err(ReadError::Truncated),
            },
            Err(error) => Err(ReadError::Disk(error)),
        };
        if let (Err(ReadError::Damaged { .. }), false) = (&outcome, is_salvage) {
            self.damaged.push(item.info.first);
        }
        match outcome {
            Err(ReadError::Damaged { .. } | ReadError::Truncated) if is_salvage => {
                item.state = ItemState::Failed
            }
            Ok(block) => item.state = ItemState::Here(block.share()),
            Err(failure) => *error = error.take().or(Some(failure)),
        }
        Some(generation)
    }
}

fn damaged<B: BlockBuf>(item: &Item<B>, segment: &Segment) -> ReadError {
    let (first, offset) = (item.info.first, item.place.offset);
    ReadError::Damaged { first, segment: segment.name.to_string(), offset }
}

fn verify<B: BlockBuf>(item: &Item<B>, segment: &Segment, block: &[u8]) -> bool {
    let Ok(envelope) = read_envelope(block) else { return false };
    let offset = usize::try_from(item.place.offset).unwrap_or(usize::MAX);
    let end = ENVELOPE_BYTES + item.info.image_bytes as usize;
    let Some(Ok(view)) = block.get(ENVELOPE_BYTES..end).map(parse_image) else { return false };
    belongs(&envelope, &segment.header, offset)
        && envelope.chain == item.info.chain
        && view.info() == item.info
        && view.verify_chain(item.previous)
}

/// Closes the longest unused segments when too many are open.
fn close_idle<D: Disk>(disk: &mut D, ops: &mut Ops, segments: &mut SegmentTable, active: Option<u32>) {
    let open = segments.iter().filter(|segment| segment.descriptor != Descriptor::Closed).count();
    if open <= DESCRIPTORS_MAX {
        return;
    }
    let idle = segments
        .iter_mut()
        .filter(|segment| segment.operations == 0 && Some(segment.generation()) != active)
        .filter(|segment| segment.file().is_some())
        .min_by_key(|segment| segment.used);
    if let Some(segment) = idle {
        close(disk, ops, segment);
    }
}

/// Closes a segment on which nothing is in flight.
pub(crate) fn close<D: Disk>(
    disk: &mut D,
    ops: &mut Ops,
    segment: &mut Segment,
) -> Option<(DiskOpId, FileId)> {
    let file = segment.file()?;
    debug_assert_eq!(segment.operations, 0, "nothing is in flight on a file that is closed");
    let id = ops.submit(disk, Owner::Descriptor, DiskOp::Close { file });
    segment.descriptor = Descriptor::Closing(id);
    Some((id, file))
}
