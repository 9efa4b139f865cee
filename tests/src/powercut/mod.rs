//! Power cuts: real processes on a real file system on a disk that loses what was not flushed.
//!
//! ```text
//! three members of a cluster        processes, killed when the power is cut
//! ext4 or XFS                       the kernel's; replays its journal afterwards
//! a loop device with direct I/O     turns a flush into fsync(2) of its file
//! a FUSE file system with one file  [`fuse`], served by a process of its own, [`server`]
//! the fault disk                    [`disk`]: durable contents, and a cache that survives in part
//! ```
//!
//! All members are on one disk, so that the power fails for all replicas at once: what was acknowledged is then on
//! that disk or nowhere. The acknowledgements are recorded outside of it. A [`trial`] ends with a check that none of
//! them is lost. That the check can fail is shown by a disk that acknowledges flushes and does nothing.
//!
//! [`direct`] is the same without a loop device and a file system between.
//!
//! It needs root, `/dev/fuse`, a loop device, and the file system with its mkfs; [`mounts::missing`] says what is not
//! there.

pub mod direct;
pub mod disk;
pub mod fuse;
pub mod image;
pub mod mounts;
pub mod rig;
pub mod server;
pub mod trial;
