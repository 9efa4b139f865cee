//! A disk with a volatile write cache, whose power can be cut and which can be told to fail.
//!
//! A write is in the cache when it completes, and durable when a later flush completes. What the cache holds when the
//! power goes survives in part: of each write any subset of its sectors, so that writes are lost, kept, torn, and kept
//! although an earlier one to the same place is lost. So does a write that is under way at that moment. A sector is
//! atomic.

use super::image::{Image, pieces};
use crate::sim::rng::Rng;
use serde::{Deserialize, Serialize};

/// What the disk writes or does not write, but never in part.
pub const SECTOR_BYTES: usize = 512;

/// The disk.
#[derive(Debug)]
pub struct FaultDisk {
    formatted: Image,
    durable: Image,
    /// What reads see: `durable` with all of `cached` on top.
    current: Image,
    /// Completed writes that no flush has covered, in order.
    cached: Vec<CachedWrite>,
    triggers: Vec<Trigger>,
    mode: Mode,
    /// A write or flush has failed.
    failed: bool,
    stats: Stats,
}

#[derive(Debug)]
struct CachedWrite {
    offset: u64,
    data: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Good,
    /// Writes find no space.
    Full,
    /// Nothing is ever answered.
    Hung,
    /// Flushes are acknowledged and do nothing.
    Lying,
    Off,
}

/// Which operations a trigger counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum On {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Writes and flushes.
    Any,
}

impl On {
    /// Whether a trigger of this counts `operation`.
    pub(super) fn counts(self, operation: On) -> bool {
        self == operation || self == On::Any && operation != On::Read
    }
}

/// What happens to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// The power goes: this operation and everything after it fails, until [`FaultDisk::power_on`]. A write is under
    /// way then, and counts as cached.
    Cut,
    /// This one operation fails with EIO: a read, a write that does not happen, or a flush after which all that was in
    /// the cache still is. The next one succeeds.
    Error,
    /// From here on writes fail with ENOSPC, as those of a thinly provisioned disk may.
    Full,
    /// There is space again.
    Free,
    /// From here on nothing is answered.
    Hang,
    /// From here on flushes are acknowledged, and nothing becomes durable.
    Lie,
}

/// An effect that comes with one of the next operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trigger {
    /// What is counted.
    pub on: On,
    /// How many of them still pass; 0 hits the next one.
    pub after: u64,
    /// It then still waits until the cache holds so many writes: most flushes follow their write at once, and a cut at
    /// any moment finds hardly more than one.
    pub cached_min: u64,
    /// What then happens.
    pub effect: Effect,
}

/// What survives of the cache when the power is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Survival {
    /// Nothing.
    None,
    /// A random part.
    Random,
}

/// What became of the cached writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Survived {
    /// Writes of which all sectors survived.
    pub kept: u64,
    /// Writes of which some did.
    pub torn: u64,
    /// Writes of which none did.
    pub lost: u64,
}

/// What the disk has done since it was last [reset](FaultDisk::reset).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Whether the power is on.
    pub powered: bool,
    /// Writes.
    pub writes: u64,
    /// Bytes of them.
    pub write_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Flushes that were acknowledged and did nothing.
    pub lies: u64,
    /// Triggers that have come to pass.
    pub triggered: u64,
    /// Operations that a fault has failed, or left without an answer, while the power was on.
    pub refused: u64,
    /// Times the power went.
    pub cuts: u64,
    /// Writes and flushes that came after one had failed by [`Effect::Error`].
    pub after_error: u64,
}

/// Why the disk refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// EIO.
    Io,
    /// ENOSPC.
    Full,
    /// It does not even refuse: there is never an answer.
    Hung,
}

impl FaultDisk {
    /// A disk that is on and holds `formatted`.
    #[must_use]
    pub fn new(formatted: Image) -> Self {
        Self {
            durable: formatted.clone(),
            current: formatted.clone(),
            formatted,
            cached: Vec::new(),
            triggers: Vec::new(),
            mode: Mode::Good,
            failed: false,
            stats: Stats { powered: true, ..Stats::default() },
        }
    }

    /// Puts back what it held at first, and forgets all faults.
    pub fn reset(&mut self) {
        let cuts = self.stats.cuts;
        *self = Self::new(std::mem::take(&mut self.formatted));
        self.stats.cuts = cuts;
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.current.bytes()
    }

    /// How often the power has gone. Who opened the disk before the last time is not connected to it any more.
    #[must_use]
    pub fn cuts(&self) -> u64 {
        self.stats.cuts
    }

    /// Figures.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats { powered: self.mode != Mode::Off, ..self.stats }
    }

    /// Adds a fault to come.
    pub fn arm(&mut self, trigger: Trigger) {
        self.triggers.push(trigger);
    }

    /// Lets it happen now.
    pub fn strike(&mut self, effect: Effect) {
        self.mode = match effect {
            Effect::Cut => {
                if self.mode != Mode::Off {
                    self.stats.cuts += 1;
                }
                Mode::Off
            }
            _ if self.mode == Mode::Off => Mode::Off,
            Effect::Error => self.mode,
            Effect::Full => Mode::Full,
            Effect::Free if self.mode == Mode::Full => Mode::Good,
            Effect::Free => self.mode,
            Effect::Hang => Mode::Hung,
            Effect::Lie => Mode::Lying,
        };
    }

    /// Reads into all of `into`.
    ///
    /// # Errors
    /// When the range is beyond the end, and by the faults.
    pub fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.count(On::Read)?;
        if !self.current.contains(offset, into.len()) {
            return Err(DiskError::Io);
        }
        self.current.read(offset, into);
        Ok(())
    }

    /// Writes into the cache.
    ///
    /// # Errors
    /// When the range is beyond the end, and by the faults.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let powered = self.mode != Mode::Off;
        let outcome = self.count(On::Write);
        if !self.current.contains(offset, data.len()) {
            return Err(DiskError::Io);
        }
        if powered && self.mode == Mode::Off {
            self.cached.push(CachedWrite { offset, data: data.to_vec() });
        }
        outcome?;
        if self.mode == Mode::Full {
            self.stats.refused += 1;
            return Err(DiskError::Full);
        }
        self.stats.writes += 1;
        self.stats.write_bytes += data.len() as u64;
        self.current.write(offset, data);
        self.cached.push(CachedWrite { offset, data: data.to_vec() });
        Ok(())
    }

    /// Makes all writes that have completed durable.
    ///
    /// # Errors
    /// By the faults.
    pub fn flush(&mut self) -> Result<(), DiskError> {
        self.count(On::Flush)?;
        self.stats.flushes += 1;
        if self.mode == Mode::Lying {
            self.stats.lies += 1;
            return Ok(());
        }
        for write in self.cached.drain(..) {
            self.durable.write(write.offset, &write.data);
        }
        Ok(())
    }

    /// Lets triggers count an operation; whether it may go on.
    fn count(&mut self, operation: On) -> Result<(), DiskError> {
        self.stats.after_error += u64::from(self.failed && operation != On::Read);
        let mut struck = Vec::new();
        self.triggers.retain_mut(|trigger| {
            if !trigger.on.counts(operation) {
                return true;
            }
            if trigger.after == 0 && self.cached.len() as u64 >= trigger.cached_min {
                struck.push(trigger.effect);
                return false;
            }
            trigger.after = trigger.after.saturating_sub(1);
            true
        });
        self.stats.triggered += struck.len() as u64;
        for effect in &struck {
            self.strike(*effect);
        }
        match self.mode {
            Mode::Off => Err(DiskError::Io),
            Mode::Hung => {
                self.stats.refused += 1;
                Err(DiskError::Hung)
            }
            _ if struck.contains(&Effect::Error) => {
                self.stats.refused += 1;
                self.failed |= operation != On::Read;
                Err(DiskError::Io)
            }
            Mode::Good | Mode::Full | Mode::Lying => Ok(()),
        }
    }

    /// Cuts the power if it is on, and puts it on again, without any fault: of the cache that survives which `seed`
    /// and `survival` let.
    pub fn power_on(&mut self, seed: u64, survival: Survival) -> Survived {
        self.strike(Effect::Cut);
        let mut luck = Luck::new(seed, survival);
        let mut survived = Survived::default();
        for write in std::mem::take(&mut self.cached) {
            let sectors: Vec<_> = pieces(write.offset, write.data.len(), SECTOR_BYTES).collect();
            let kept = luck.sectors(sectors.len());
            let mut done = 0;
            for ((_, _, len), kept) in sectors.iter().zip(&kept) {
                if *kept {
                    self.durable.write(write.offset + done as u64, &write.data[done..done + len]);
                }
                done += len;
            }
            match kept.iter().filter(|kept| **kept).count() {
                0 => survived.lost += 1,
                count if count == kept.len() => survived.kept += 1,
                _ => survived.torn += 1,
            }
        }
        self.current = self.durable.clone();
        self.triggers.clear();
        self.mode = Mode::Good;
        self.failed = false;
        survived
    }
}

/// Decides what survives. Some cuts lose nearly everything and some nearly nothing: with even odds for each sector, a
/// cut with many writes would always look the same.
pub(super) struct Luck {
    rng: Rng,
    lose_ppm: u32,
    keep_ppm: u32,
}

impl Luck {
    pub(super) fn new(seed: u64, survival: Survival) -> Self {
        let mut rng = Rng::new(seed);
        let (lose_ppm, keep_ppm) = match (survival, rng.below(4)) {
            (Survival::None, _) => (1_000_000, 0),
            (Survival::Random, 0) => (850_000, 50_000),
            (Survival::Random, 1) => (50_000, 850_000),
            (Survival::Random, _) => (150_000, 150_000),
        };
        Self { rng, lose_ppm, keep_ppm }
    }

    pub(super) fn sectors(&mut self, count: usize) -> Vec<bool> {
        let draw = self.rng.below(1_000_000) as u32;
        if draw < self.lose_ppm {
            vec![false; count]
        } else if draw - self.lose_ppm < self.keep_ppm {
            vec![true; count]
        } else if self.rng.chance(500_000) {
            let prefix = self.rng.index(count + 1);
            (0..count).map(|sector| sector < prefix).collect()
        } else {
            (0..count).map(|_| self.rng.chance(500_000)).collect()
        }
    }
}

#[cfg(test)]
mod tests;
