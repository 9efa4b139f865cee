//! ringraft's write-ahead log: preallocated direct-I/O segments, one write per batch, and a written crash contract.
//!
//! This crate owns bytes and durability. It does not know what a leader, a vote count or a command means; it stores the
//! term and the vote that it is told to, and batches in the order in which they come. It starts no thread, waits for
//! nothing, has no clock, and takes every random number from a seed: [`Wal`] is a state machine over the completions of a
//! [`disk::Disk`], so the same code runs on io_uring and in a simulator.
//!
//! # What the device may do
//!
//! The contract holds under these assumptions, and the tests play a device that uses all of them:
//!
//! 1. A sector of 512 B is written whole or not at all.
//! 2. A write may be torn at any sector boundary, and its sectors may become durable in any order.
//! 3. What was not flushed may be lost, even when later writes survived. A durable write (O_DSYNC) that completed is not.
//! 4. Bits rot, sectors become unreadable, and reads and writes may be misdirected.
//! 5. After a failed write or flush, what the device holds of the file is unknown for ever; a later success proves nothing.
//! 6. Names that were created, renamed or removed since the directory was synced may or may not survive a power failure, in the order
//!    in which they were changed.
//! 7. Operations of a process that was killed may reach the device while the next one is running, on the files (not the names)
//!    that they were meant for.
//!
//! # What the log promises
//!
//! 1. **Acknowledged is durable.** [`WalEvent::Persisted`] comes only after the batches up to its index, and all that is needed to
//!    find them again, are durable without a gap. Likewise [`WalEvent::HardStateSaved`] and [`WalEvent::TruncateDone`].
//! 2. **A prefix.** After any crash the log is a prefix of what was appended, and contains all that was acknowledged and not
//!    truncated since.
//! 3. **Torn is not damaged.** A torn tail that was never acknowledged is dropped silently. Damage to what was, or may have been,
//!    acknowledged is recognised as damage, reported with segment and offset ([`Damage`]), never dropped silently and never handed
//!    out. Stated residual: one of the last `writes_in_flight_max` acknowledged writes that the device lost entirely, with
//!    nothing later that vouches for it, looks like a write that was never made. The witness in the hard state narrows that window: it is recorded with every save, at a
//!    start, at [`Wal::close`] and by [`Wal::save_witness`].
//! 4. **The first failure is the last word.** The first failed or short durable operation poisons the log
//!    ([`WalEvent::Poisoned`]): nothing is acknowledged afterwards, nothing is retried on that file. Lack of space is judged by operation:
//!    when a segment cannot be made, or a start has no room for its copy of the hard state, the log says so
//!    ([`WalEvent::NoSpace`]), lives on and goes on when there is space; when a write fails, it stops.
//! 5. **Recovery is total and idempotent.** What a start finds is judged by an exhaustive table (`recovery/table.rs`). A crash during
//!    recovery changes nothing that was acknowledged, and the next start finds the same log.
//! 6. **Damage stays contained.** A log with damage opens, and says what it lacks. A batch whose envelope is intact is *known*: it
//!    stays in the log, which goes on behind it, until its image has come from a peer ([`Wal::damaged`], [`Wal::repair`]). Where not
//!    even that is known, the log is cut before the damage, and what it held there is *claimed* ([`format::Claim`]), durably, before
//!    [`WalEvent::Opened`]; what is intact behind the cut is *salvage* ([`Wal::salvage`]). A claim is certain only when the end of the
//!    log that was there is proved; it is in force at every start until [`Wal::release_claim`], or until it is *settled*: when nothing
//!    but one block behind the log could not be read, and a later start reads there the intact batch that continues the log, finds
//!    no damage, and follows the log to its end, the claim becomes certain, or ends when the log holds all of that again. A place
//!    that could not be read and then is blank settles nothing: it may have been remapped. No file that may hold a batch of
//!    the log is removed on a checksum's word: not before its intact replacement is durable, or the claim is released.
//!
//! What a claim cannot know is the residual of promise 3 once more, and a last segment whose very name is gone. A segment that began
//! with a cut and is lost together with that cut may let void batches of an older epoch stand at the end of the log; the
//! claim covers what replaced them.
//!
//! # How
//!
//! - **A segment belongs to one process and one epoch.** Every start and every truncation first makes a *cut* durable in the hard
//!   state: epoch + 1, and the position where the log ends. Then a fresh segment is begun. Nothing inside a segment is ever
//!   overwritten, and no segment of an earlier process is ever appended to; what lies behind a cut with an older epoch is
//!   void. So neither an old suffix nor a late write of a dead process can be taken for the log.
//! - **Prior content is known.** A segment is filled with zeros before it enters service, or comes from a former life of which it holds a
//!   checksum per sector. So after a crash each sector either holds its prior content or what was written, and anything
//!   else is damage. This tells a torn tail from a damaged batch with one write per batch and no second flush, and without
//!   writing every byte of the log twice.
//! - **Everything names its place.** An envelope names cluster, segment (by nonce and generation), offset, epoch, boot and
//!   batch; every sector's checksum is seeded with the batch; the chain ties a batch to all before it.
//! - **Later writes are witnesses.** Each envelope says how far the log was durable when it was submitted.
//!
//! # Each operation, and a crash after each of its steps
//!
//! **Format** (the first start on a blank directory)
//! 1. `hard-a.new` is made, written, renamed to `hard-a`, the directory synced. *Crash before:* the directory is blank, the next
//!    start formats it with another incarnation. *After:* it is formatted; the missing copy is made by the next start.
//! 2. The same for `hard-b`. From here on it is a start like any other. Segments are made only after this, so a directory with
//!    segments and without a hard state has lost it, and is refused.
//!
//! **Start**
//! 1. Both copies of the hard state are read; the valid one with the highest sequence counts. Half-made files are removed, and
//!    segments that were on their way to another life (`.old`). All segments from the log's start on are read and folded into the
//!    log. Those of the newest epoch are flushed, since what was read may have been in the
//!    device's cache only. *Crash:* nothing has changed.
//! 2. The cut (epoch + 1, boot + 1, the end of the log, which is also the witness) is saved by making both copies anew, first
//!    `hard-a`, then `hard-b`, each under a temporary name. *Crash between:* the next start finds the first copy, which names the same
//!    end. A late write of a dead process goes to files without a name. [`WalEvent::Opened`]. *No space for a copy:* nothing has changed;
//!    a segment that is ready is given up for it, and when there is none the start waits ([`WalEvent::NoSpace`],
//!    [`Wal::retry_space`]).
//! 3. Segments without a batch of the log are removed, those of a purge that was not finished among them, a segment of the new epoch is headed. *Crash:* the cut without a segment is
//!    applied by the next start.
//!
//! With damage that nobody can tell, the cut lies before it and the claim is saved with the cut, in one. *Crash before:* the next start
//! finds the damage again, and comes to the same. *After:* it finds the cut and the claim, and what is behind the cut as
//! salvage again. Under a claim, step 3 leaves all segments that are older than the claim.
//!
//! **Rebuilding a segment** (in the background)
//! 1. The segment is left, if it is the one that is appended to. `segment-N.new` is created; every block of `segment-N.wal` is copied
//!    to it, with the repaired slots in their places; it is flushed and closed. *Crash:* removed by the next start, which finds the
//!    damage as it was.
//! 2. It is renamed to `segment-N.wal`, the directory synced. *Crash between:* either file has the name; nothing but the repaired slots
//!    differs, and blocks that could not be read. [`WalEvent::Repaired`].
//!
//! A block among the slots that still cannot be read is filled with the byte 0xdb, since zeros would pass for a write that never was.
//! If it holds a batch of the log, the rebuild waits for that batch first, unless too many wait already.
//!
//! **Releasing a claim**: the hard state is saved without it. *Crash before:* the claim is in force. Then the segments that hold no
//! batch of the log are removed. *Crash:* removed by the next start.
//!
//! **Making a segment** (in the background)
//! 1. `segment-N.new` is created, filled with zeros, flushed, closed. While the log appends and has a segment to go on in, zeros
//!    follow what is appended, at most two bytes for each ([`Wal::fill_step`]). *Crash:* removed by the next start.
//! 2. Renamed to `.free`, directory synced. *Crash:* the next start finds either name.
//! 3. To enter service it (or a `.used` one, which goes first) is renamed to `.wal` and the directory synced, before its header is
//!    written. *Crash:* a `.wal` file with a blank header and nothing but prior content is removed rather than used, since
//!    the header write of the dead process may be on its way; a `.free` or `.used` file is safe to use.
//! 4. The header is written durably. *Crash:* a segment without batches; void, and removed.
//!
//! **Append**
//! 1. One durable write of envelope, image and padding. *Crash:* any subset of its sectors survives. All: the batch is kept. Else, if
//!    nothing proves that it was complete: torn, dropped, together with what was in flight behind it.
//! 2. When it and all before it have completed, [`WalEvent::Persisted`].
//!
//! **Rollover**: the next segment has its header already; the next append goes to its first slot. It names the segment that it
//! continues; its first batch proves by index and chain that it follows.
//!
//! **Truncation**
//! 1. What is kept becomes durable: the cut vouches for it. *Crash:* the log as it was.
//! 2. The cut is saved to both copies in place. *Crash between:* the old end or the new one, as the copy with the higher sequence
//!    says. [`WalEvent::TruncateDone`].
//! 3. Segments behind the cut are removed, a segment of the new epoch is headed; its header repeats the cut, for the time when the
//!    hard state has a newer one. *Crash:* the cut is applied by the next start.
//!
//! **Purge**: the log's start moves to the end of a durable batch.
//! 1. The new start (index, term, chain, and the segment that holds the batch) is saved to both copies in place. *Crash between:* the
//!    old start or the new one, as the copy with the higher sequence says. [`WalEvent::Purged`].
//! 2. Segments that lie wholly before the start leave service, oldest first, each once nothing is in flight on it. *Crash:* the next start
//!    does not read what is left of them, and removes it when it has saved its cut. Damage before the start no longer matters; a
//!    segment that is missing behind it is noticed, since its successor names it.
//!
//! Under a claim the start stays before the segment in which the log was cut, or, unless a later start may settle the claim, lies in
//! what was appended since. In the latter case the
//! older segments stay from the one on that may hold a batch behind the start; what older segments hold is then none of the log, and
//! when the claim is released, all of them lie before the start. Purging is what makes room on a full disk for the log to reach what
//! releases the claim.
//!
//! **Starting anew** behind a snapshot that is durable: the whole log goes.
//! 1. Epoch + 1, the new start and a cut at it are saved to both copies in place, in one. *Crash between:* the log as it was, or an empty
//!    one behind the snapshot, as the copy with the higher sequence says. [`WalEvent::TruncateDone`].
//! 2. All older segments leave service as after a purge, a segment of the new epoch is headed. *Crash:* their generations lie before
//!    the start, so the next start does not read them, and removes them. Under a claim they are kept and read, from the one on
//!    in which the log was cut, and void behind the cut.
//!
//! **Recycling** a segment that left service by a purge or a truncation, if this process wrote it; any other is removed, since a write of
//! a dead process may be on its way to it.
//! 1. Renamed to `.old`, directory synced. *Crash before:* it is `.wal`, and void. *After:* removed by the next start.
//! 2. The checksums of what its sectors hold are written behind its header block, which is blanked; flushed; closed. *Crash:* as before:
//!    nobody reads an `.old` file.
//! 3. Renamed to `.used`, directory synced. *Crash:* removed, or ready for any process: every write to it has completed.
//!
//! **Close**: appends, cut and saves are finished, the witness is saved. A segment that is being made is removed; one that is being
//! recycled stays `.old`.
//!
//! **Saving term and vote**: `hard-a` durably, then `hard-b`, then [`WalEvent::HardStateSaved`]. *Crash:* the old values or the new,
//! whole in either case. Nothing may act on them before the event.

mod commit;
#[cfg(test)]
mod damage_tests;
pub mod directory;
pub mod disk;
mod error;
pub mod format;
mod hard_state;
mod index;
mod log;
pub mod mutants;
mod ops;
mod read;
mod recovery;
mod recycle;
mod repair;
mod reserve;
mod salvage;
mod scrub;
mod segment;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use directory::{DataDirectory, DirectoryError};
pub use error::{ConfigError, CopyState, Damage, DamageCause, ReadError, RepairError, WalError};
pub use log::{HardStateUpdate, Recovered, Wal, WalConfig, WalEvent, WalStats};
pub use read::StoredBatch;
pub use recovery::RecoveryReport;
pub use repair::DamagedBatch;
pub use reserve::{FILL_INTERVAL, FILL_STEP_BYTES};
pub use scrub::ScrubStatus;
