//! What breaks ringraft on purpose: the seeded simulator, and power cuts under real processes.
//!
//! [`sim`] runs the real driver, core, log and network code on a simulated disk, network and clock. One seed is one
//! run. The binary `simulate` runs ranges of seeds; `tests/simulation.rs` runs some in the test suite.
//! [`powercut`] runs a cluster of real processes on a disk whose power is cut; the binary of that name runs many such
//! trials, and `tests/powercut.rs` some.

pub mod powercut;
pub mod process;
pub mod sim;
