//! What breaks ringraft on purpose: the seeded simulator, and power cuts under real processes.
//!
//! [`sim`] runs the real driver, core, log and network code on a simulated disk, network and clock. One seed is one
//! run. The binary `simulate` runs ranges of seeds; `tests/simulation.rs` runs some in the test suite.
//! [`faults`] breaks the log's disk in every way there is: the binary of that name has three modes.
//! [`powercut`] runs a cluster of real processes on a disk whose power is cut; the binary of that name runs many such
//! trials, and `tests/powercut.rs` some.

pub mod faults;
pub mod powercut;
pub mod process;
pub mod sim;
