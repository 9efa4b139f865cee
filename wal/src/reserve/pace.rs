//! How fast zeros are written while the log appends.
//!
//! At full speed they take the device from the appends, and lie in its cache when it makes an append durable. So while the log
//! appends and has a segment to go on in, they follow what is appended: the log needs one byte of them for each of its own, and the
//! fewer segments are ready, the more of them it gets beyond that, at most two. A segment is thus filled before as much as it
//! holds is appended, however fast that goes.
//!
//! Nothing is held back while there is no segment to go on in, nor while nothing is appended. The log has no clock: that time passes
//! it learns from [`Pace::pass`], and takes itself for idle when it has appended nothing between two of them.

use std::time::Duration;

/// How often a node calls [`Wal::fill_step`](crate::Wal::fill_step) while a segment is being filled: however little is appended, it
/// goes on. A log that has appended nothing for so long fills it at full speed.
pub const FILL_INTERVAL: Duration = Duration::from_millis(50);

/// The budget of such a call: 5 MiB/s.
pub const FILL_STEP_BYTES: u64 = 256 << 10;

/// Zeros are written in pieces of at most so much: larger ones delay the log's own writes behind them.
pub(super) const FILL_BYTES: u64 = 256 * 1024;
/// Pieces that follow what is appended have at least so much, but for the last.
const FOLLOWING_BYTES: u64 = 64 * 1024;

/// How much may be written now.
pub(super) struct Pace {
    /// So much has been allowed and not been written yet.
    credit: u64,
    /// Nothing was appended for a while, or since the start.
    idle: bool,
    /// Something was appended since time passed.
    appended: bool,
    /// There is no segment to go on in.
    urgent: bool,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { credit: 0, idle: true, appended: false, urgent: true }
    }

    /// Another segment is begun.
    pub(super) fn begin(&mut self) {
        self.credit = 0;
    }

    /// Whether there is no segment to go on in.
    pub(super) fn set_urgent(&mut self, urgent: bool) {
        self.urgent = urgent;
    }

    /// The log has appended `bytes`, while `ready` segments were ready besides the next one.
    pub(super) fn follow(&mut self, bytes: u64, ready: usize) {
        self.credit = self.credit.saturating_add(bytes).saturating_add(bytes / (1 + ready as u64));
        (self.appended, self.idle) = (true, false);
    }

    /// Time has passed: `bytes` more may be written whatever is appended.
    pub(super) fn pass(&mut self, bytes: u64) {
        self.credit = self.credit.saturating_add(bytes);
        self.idle = !self.appended;
        self.appended = false;
    }

    /// The size of the next piece, when so many bytes are left to be filled; 0 when it is to wait.
    pub(super) fn piece(&self, left: u64) -> u64 {
        let most = FILL_BYTES.min(left);
        if self.urgent || self.idle || self.credit >= most {
            most
        } else {
            self.credit / FOLLOWING_BYTES * FOLLOWING_BYTES
        }
    }

    /// A piece was submitted.
    pub(super) fn spend(&mut self, bytes: u64) {
        self.credit = self.credit.saturating_sub(bytes);
    }
}
