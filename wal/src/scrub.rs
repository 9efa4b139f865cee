//! The scrubber.

/// How far the scrubber has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubStatus {
    /// The first index that it has not looked at in this pass.
    pub position: ringraft_block::LogIndex,
    /// Passes over all closed segments that were completed.
    pub passes: u64,
    /// Bytes read since the start.
    pub bytes: u64,
    /// Damaged batches that it has found since the start.
    pub found: u64,
}
