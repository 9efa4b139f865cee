//! Operation ids: whose they are, and for which part of the log.

use crate::disk::{Disk, DiskOp, DiskOpId};
use ringraft_block::{Block, BlockBuf, Pool, SharedBlock};

/// The top byte of every id that the log submits; other users of the same disk choose another.
const TAG: u64 = 0x57;

/// Which part of the log submitted an operation; the second byte of its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Owner {
    Recovery = 1,
    HardState = 2,
    Maker = 3,
    Standby = 4,
    Append = 5,
    Read = 6,
    /// Opening and closing of segments in service.
    Descriptor = 7,
    /// Removing segments that have left service.
    Removal = 8,
    /// Writing repaired batches into a new copy of their segment.
    Repair = 9,
    /// Making segments that have left service ready again.
    Recycle = 10,
    /// Looking at what is no batch: headers, and the hard state.
    Scrub = 11,
}

impl Owner {
    fn of(id: DiskOpId) -> Option<Self> {
        const ALL: [Owner; 11] = [
            Owner::Recovery,
            Owner::HardState,
            Owner::Maker,
            Owner::Standby,
            Owner::Append,
            Owner::Read,
            Owner::Descriptor,
            Owner::Removal,
            Owner::Repair,
            Owner::Recycle,
            Owner::Scrub,
        ];
        ALL.into_iter().find(|owner| *owner as u64 == id.0 >> 48 & 0xff)
    }
}

/// Whether an id is the log's, and whose.
pub(crate) fn owner_of(id: DiskOpId) -> Option<Owner> {
    (id.0 >> 56 == TAG).then(|| Owner::of(id)).flatten()
}

/// Names and counts the operations in flight.
#[derive(Default)]
pub(crate) struct Ops {
    next: u64,
    pub(crate) in_flight: usize,
    /// What the service waits for, in flight, oldest first: appends, saves of the hard state, and the making of the segment
    /// that appends go to next.
    durable: Vec<DiskOpId>,
}

impl Ops {
    pub(crate) fn submit<D: Disk>(&mut self, disk: &mut D, owner: Owner, op: DiskOp<D::Buf>) -> DiskOpId {
        // 48 bits: at a million operations per second they last for nine years.
        let id = DiskOpId(TAG << 56 | (owner as u64) << 48 | (self.next & 0xffff_ffff_ffff));
        self.next = self.next.wrapping_add(1);
        self.in_flight += 1;
        if matches!(owner, Owner::Append | Owner::HardState | Owner::Standby) {
            self.durable.push(id);
        }
        disk.submit(id, op);
        id
    }

    /// An operation has ended, well or not.
    pub(crate) fn ended(&mut self, id: DiskOpId) {
        self.in_flight = self.in_flight.saturating_sub(1);
        // A handful at most.
        self.durable.retain(|durable| *durable != id);
    }

    /// Names the oldest operation in flight that the service waits for.
    pub(crate) fn oldest_durable(&self) -> Option<u64> {
        self.durable.first().map(|id| id.0)
    }
}

/// A block from the pool.
pub(crate) fn take<D: Disk>(
    pool: &Pool<D::Buf>,
    disk: &mut D,
    bytes: usize,
) -> Result<Block<D::Buf>, crate::disk::DiskError> {
    pool.take(bytes, |bytes| disk.allocate(bytes))
}

/// A block of zeros, to be shared.
pub(crate) fn zeros<B: BlockBuf>(mut block: Block<B>, bytes: usize) -> SharedBlock<B> {
    block[..bytes].fill(0);
    block.share()
}

/// SplitMix64: nonces and incarnations need to differ from life to life, not to resist anyone.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Mixes in what else distinguishes this life, so that a reused seed does not repeat its numbers.
    pub(crate) fn stir(&mut self, number: u64) {
        self.0 = self.next() ^ number;
    }
}
