//! What a run came by. A range of seeds that never met its faults proves nothing, so it counts as failed.

use std::fmt::Write as _;

macro_rules! marks {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $required:literal;)*) => {
        /// Something that a run may come by.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Mark {
            $($(#[$doc])* $name,)*
        }

        impl Mark {
            /// All marks.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Its name in reports.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// Whether a range of seeds must come by it.
            #[must_use]
            pub const fn required(self) -> bool {
                match self {
                    $(Self::$name => $required,)*
                }
            }
        }
    };
}

marks! {
    /// A node became leader.
    Leader = "leaders", true;
    /// A node became leader after another had been.
    LeaderChange = "leader_changes", true;
    /// A node's log lost a suffix.
    Truncation = "truncations", true;
    /// A process was killed.
    Kill = "kills", true;
    /// A machine lost power.
    PowerCut = "power_cuts", true;
    /// All machines lost power at once.
    PowerCutOfAll = "power_cuts_of_all", true;
    /// A node was asked to stop, and did so in good order.
    OrderlyStop = "orderly_stops", true;
    /// A node that was to stop in good order crashed first.
    CrashWhileClosing = "crashes_while_closing", false;
    /// A node was started again.
    Restart = "restarts", true;
    /// A node took its state over from a snapshot, at a start or from another node.
    SnapshotRestored = "snapshots_restored", true;
    /// A node that was running was given a snapshot, since it had fallen behind the log of the leader.
    SnapshotInstalled = "snapshots_installed", true;
    /// A crash met writes in flight.
    CrashWithPendingWrites = "crashes_with_pending_writes", true;
    /// Of a write that was in flight, some sectors survived and some did not.
    TornWrite = "torn_writes", true;
    /// A completed write that nobody had flushed was lost, at least in part.
    UnflushedWriteLost = "unflushed_writes_lost", true;
    /// A directory operation that nobody had synchronised was lost.
    DirectoryOpLost = "directory_ops_lost", false;
    /// A created file came back shorter than it was made.
    FileSizeLost = "file_sizes_lost", false;
    /// A write completed before one that was submitted earlier.
    WriteOvertook = "writes_overtook", true;
    /// A directed link was cut.
    LinkCut = "links_cut", true;
    /// Some, but not all, of a node's links were cut, or in one direction only.
    PartialPartition = "partial_partitions", true;
    /// Bytes were held up by a cut link.
    BytesStalled = "bytes_stalled", true;
    /// A connection was reset.
    ConnectionReset = "connection_resets", true;
    /// A connection was made.
    Connected = "connections", true;
    /// An attempt to connect failed.
    DialFailed = "dials_failed", true;
    /// A connection was cut in the middle of its bytes.
    CutAtByte = "cuts_at_a_byte", true;
    /// A send waited for space in the pipe.
    SendWaited = "sends_waited", false;
    /// A node stood still for a while.
    Pause = "pauses", true;
    /// A wall clock jumped.
    ClockJump = "clock_jumps", true;
    /// A disk was slow for a while.
    SlowDisk = "slow_disks", true;
    /// A disk stood still for a while.
    StalledDisk = "stalled_disks", true;
    /// A disk operation failed by request of the fault schedule.
    DiskFault = "disk_faults", false;
    /// A write was reported and never arrived.
    LostWrite = "lost_writes", false;
    /// An operation went to another place.
    Misdirected = "misdirected_operations", false;
    /// Content at rest was damaged.
    Rot = "rot", false;
    /// A node had more to apply than it may in one turn.
    ApplyPaused = "apply_pauses", true;
    /// A log went on in another segment.
    Rollover = "rollovers", false;
    /// A command was acknowledged.
    Acknowledged = "acknowledged", true;
    /// A node refused a proposal.
    Refused = "refused", true;
    /// A client does not know what became of its proposal.
    UnknownOutcome = "unknown_outcomes", true;
    /// A command of unknown outcome turned out to be committed.
    UnknownCommitted = "unknown_committed", true;
    /// A command of unknown outcome was never committed.
    UnknownLost = "unknown_lost", true;
    /// A disk image was recovered to check that what is committed is durable.
    ImageChecked = "images_checked", true;
}

/// A counter for each mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Coverage {
    counts: Vec<u64>,
}

impl Default for Coverage {
    fn default() -> Self {
        Self { counts: vec![0; Mark::ALL.len()] }
    }
}

impl Coverage {
    /// Adds `times` to the counter of `mark`.
    pub fn count(&mut self, mark: Mark, times: u64) {
        self.counts[mark as usize] += times;
    }

    /// The counter of `mark`.
    #[must_use]
    pub fn of(&self, mark: Mark) -> u64 {
        self.counts[mark as usize]
    }

    /// Adds the counters of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
    }

    /// The marks that a range of seeds must come by and this one did not.
    #[must_use]
    pub fn missing(&self) -> Vec<Mark> {
        Mark::ALL.iter().copied().filter(|mark| mark.required() && self.of(*mark) == 0).collect()
    }

    /// Names and counters.
    pub fn entries(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        Mark::ALL.iter().map(|mark| (mark.name(), self.of(*mark)))
    }

    /// Three counters a line, for people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut out = String::new();
        for (position, (name, count)) in self.entries().enumerate() {
            let end = if position % 3 == 2 { "\n" } else { "" };
            let _ = write!(out, "  {name:<28}{count:>9}{end}");
        }
        out.truncate(out.trim_end().len());
        out
    }
}
