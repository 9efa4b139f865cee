//! ringraft's tools: `bench` and `limit` measure, `node` runs one member, `wal` looks into a data directory.
//!
//! `bench` starts a cluster of `ringraft node` processes on loopback, has the leader's own load generator drive
//! it, and says what a durable commit costs here: beside it stands what the machine could do at best ([`limit`]),
//! measured in the same run. Then it reads all logs back from disk and checks that every acknowledged command is
//! there once. It leaves no process and no file behind, also when it is interrupted; only SIGKILL keeps it from
//! removing its directory (its nodes still die with it).
//!
//! What the benchmarks of this package share is here too: [`conducted`] runs the replicas that they compare, [`runs`] keeps
//! what was measured and makes the tables.
//!
//! The files: `cli.rs` the command line, `node.rs` a member, `load.rs` the load generator, `bench/` the
//! measurement (`cluster.rs` the processes, `control.rs` what is said to them, `ledger.rs` what was acknowledged,
//! `verify.rs` the check, `report.rs` the figures), `machine.rs` facts about the machine, `wal/` the reader of data
//! directories, `cleanup.rs` signals,
//! `exit.rs` exit codes.

mod bench;
mod cleanup;
pub mod cli;
pub mod conducted;
mod exit;
pub mod limit;
mod load;
mod machine;
mod node;
pub mod runs;
mod wal;
