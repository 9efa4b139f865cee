//! Faults of disks, exhaustively: crash images, failing operations, damage at rest.
//!
//! [`images`], [`errors`] and [`reverts`] work on the log alone, [`damage`] on a simulated cluster. The binary `faults` runs them in
//! full, `tests/faults.rs` in part.

pub mod damage;
pub mod errors;
pub mod images;
pub mod log;
pub mod reverts;
pub mod threads;
