//! Fuzz targets of everything that is read back from disk or wire: envelope, image, entry table, segment header, hard state, and the
//! recovery of a whole directory.
//!
//! `cargo test -p ringraft-wal --test fuzz` replays the committed corpus (`__fuzz__/<target>/corpus`), then a fixed number of inputs
//! that are the same on every machine: a few seconds in all, and a failure fails again. To search for long:
//!
//! ```text
//! cargo install cargo-bolero
//! cargo bolero list --package ringraft-wal --profile release --sanitizer NONE
//! cargo bolero test --package ringraft-wal --profile release --sanitizer NONE --time 1h scan::recovery_of_a_mutated_directory
//! BOLERO_RANDOM_ITERATIONS=1000000 cargo test --release -p ringraft-wal --test fuzz scan     # without that tool, and without coverage
//! ```
//!
//! What an engine finds goes to `__fuzz__/<target>/crashes`, from where it is replayed; keep it in `corpus` with the fix.
//! `UPDATE_CORPUS=1` writes the corpus anew, after a change of the format.

mod alloc;
mod envelope;
mod hard_state;
mod image;
mod memory;
mod scan;
mod scenario;
mod seal;
mod segment_header;
mod sweep;
