//! The write-ahead log.
mod commit;
pub mod directory;
pub mod disk;
mod error;
pub mod format;
mod hard_state;
mod index;
mod log;
mod ops;
mod read;
mod recovery;
mod reserve;
mod segment;
#[cfg(test)]
mod testing;

pub use error::{ConfigError, CopyState, Damage, DamageCause, ReadError, WalError};
pub use log::{HardStateUpdate, Recovered, Wal, WalConfig, WalEvent, WalStats};
pub use read::StoredBatch;
pub use recovery::RecoveryReport;
#[cfg(test)]
mod tests;
