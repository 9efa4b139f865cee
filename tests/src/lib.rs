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

/// Makes a test of each function named, for each backend: `fn(Backend) -> anyhow::Result<()>` in the scope around it.
#[macro_export]
macro_rules! on_each_backend {
    ($($test:ident)*) => {
        mod on_glommio {
            $(#[test]
            fn $test() -> ::anyhow::Result<()> {
                super::$test(::ringraft::runtime::Backend::Glommio)
            })*
        }

        mod on_uring {
            $(#[test]
            fn $test() -> ::anyhow::Result<()> {
                super::$test(::ringraft::runtime::Backend::Uring)
            })*
        }
    };
}
