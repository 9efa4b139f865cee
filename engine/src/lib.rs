//! An embeddable replication engine: hand it commands, and it makes them durable on a majority of machines, in one
//! order, and applies them to your state machine on every one of them.
//!
//! ```
//! use bytes::Bytes;
//! use ringraft::{ClusterId, Config, MemberConfig, Node, NodeId, StateMachine};
//! use ringraft::state_machine::{CommittedBatch, Replies};
//!
//! /// Adds up the commands, which are little-endian numbers, and replies with the sum.
//! #[derive(Default)]
//! struct Sum(u64);
//!
//! impl StateMachine for Sum {
//!     fn apply(&mut self, batch: &CommittedBatch<'_>, replies: &mut Replies) {
//!         for command in batch.commands() {
//!             self.0 += command.bytes.try_into().map_or(0, u64::from_le_bytes);
//!             replies.push(Bytes::copy_from_slice(&self.0.to_le_bytes()));
//!         }
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir_in(std::env::current_dir()?)?;
//! # let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
//! // One member here; with three, each process starts its own `NodeId` with the same list.
//! let members = vec![MemberConfig { id: NodeId(1), address }];
//! let config = Config::new(ClusterId(0xc0ffee), NodeId(1), members, directory.path());
//! let node = Node::start(config, Sum::default)?;
//!
//! let handle = node.handle();
//! # handle.wait_status(std::time::Duration::from_secs(60), |status| status.role == ringraft::Role::Leader);
//! handle.propose(40_u64.to_le_bytes().to_vec()).wait()?;
//! let committed = handle.propose(2_u64.to_le_bytes().to_vec()).wait()?;
//! assert_eq!(committed.reply[..], 42_u64.to_le_bytes());
//!
//! handle.shutdown();
//! assert!(node.join().is_orderly());
//! # Ok(())
//! # }
//! ```
//!
//! # What it promises
//!
//! 1. **An outcome is a fact.** `Ok` means that the command is durable on a majority of the members and was applied
//!    here. [`Refused`](error::Refused) means that it is not applied and never will be by this call.
//!    [`UnknownOutcome`](error::UnknownOutcome) means that it may be: use a [session](sessions), ask your state machine, or
//!    make the command idempotent, before you repeat it.
//! 2. **One order.** Every member applies the same commands at the same indexes, each once in the life of a process. A
//!    command of a [session](sessions) is applied once however often it is proposed.
//! 3. **A crash loses nothing that was acknowledged**, of any member or of all of them, within the device assumptions
//!    that `ringraft_wal` states.
//! 4. **It stops rather than guess.** A failed write, a disk that does not answer or a broken invariant ends the node
//!    with a [`StopError`](error::StopError) that says what to do.
//! 5. **A damaged log is mended, not cut short.** A node that finds a batch unreadable, at its start, in use or by the
//!    background scrubber, fetches it from the other members while commits go on. Until it is whole again it does not lead,
//!    and neither votes nor acknowledges as if it still had what it may have lost. What it waits for is in
//!    [`DamageStatus`](handle::DamageStatus). Only when all copies of what may have been committed are gone
//!    does it stop, and names the place.
//!
//! # What it needs
//!
//! Linux with io_uring, and for the log a local disk that does direct I/O. One thread runs everything of a node.
//!
//! # Where things are
//!
//! [`Config`] has every limit. [`Handle`] is for all threads and executors, [`LocalHandle`] for tasks on the node's
//! own core; [`reads`] says how to read without writing. [`raft`] is the protocol as a pure function, [`runtime`] what drives it.

#[cfg(test)]
mod allocations;
mod answer;
mod apply;
pub mod config;
pub mod driver;
pub mod error;
pub mod formation;
mod group;
pub mod handle;
mod ingress;
pub mod membership;
#[doc(hidden)]
pub mod mutants;
mod node;
mod outbox;
mod proposals;
pub mod raft;
pub mod reads;
mod recent;
mod requests;
pub mod runtime;
pub mod sessions;
pub mod snapshots;
pub mod state_machine;
mod tickets;
mod waiting;
mod wire;

pub use answer::Answer;
pub use config::{Config, MemberConfig};
pub use handle::{Handle, LocalHandle};
pub use membership::{MembershipChange, NewMember};
pub use node::{LocalTask, Node};
pub use raft::Role;
pub use reads::{Consistency, ReadOptions};
pub use ringraft_block::{ClusterId, Incarnation, LogIndex, NodeId, Term};
pub use state_machine::StateMachine;
#[doc(hidden)]
pub use wire::{TOLD_TO_CAMPAIGN, told_to_campaign};

/// The example in the README, compiled with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
