//! What breaks ringraft on purpose: the seeded simulator.
//!
//! [`sim`] runs the real driver, core, log and network code on a simulated disk, network and clock. One seed is one
//! run. The binary `simulate` runs ranges of seeds; `tests/simulation.rs` runs some in the test suite.

pub mod faults;
pub mod process;
pub mod sim;
