//! Members that write directly to the fault volume, with no file system of the kernel between: O_DIRECT and O_DSYNC
//! arrive as the members mean them, and one member's disk can fail while those of the others do not.
//!
//! ```text
//! three members of a cluster        processes, each with its own directory
//! a FUSE file system                [`fuse`], served by a process of its own
//! the fault volume                  [`volume`]: durable files and names, and a cache that survives in part
//! ```
//!
//! [`trial`](super::trial) cuts the power under all of them at once. [`member`] lets the disk of one fail, and looks what
//! that one does.

pub mod fuse;
pub mod member;
pub mod rig;
pub mod volume;
