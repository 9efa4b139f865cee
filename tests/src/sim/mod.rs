//! The simulator: one seed is one run.

pub mod buffer;
pub mod check;
pub mod clock;
pub mod cluster;
pub mod context;
pub mod coverage;
pub mod disk;
pub mod kv;
pub mod linearizable;
pub mod link;
pub mod mutants;
pub mod nemesis;
pub mod node;
pub mod range;
pub mod rng;
pub mod shrink;
pub mod trace;
pub mod world;
