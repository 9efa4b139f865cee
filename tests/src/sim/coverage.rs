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

            /// A range of so many seeds must come by it; 0 for none.
            #[must_use]
            pub const fn required_from(self) -> u64 {
                match self {
                    $(Self::$name => $required,)*
                }
            }
        }
    };
}

marks! {
    /// A node became leader.
    Leader = "leaders", 50;
    /// A node became leader after another had been.
    LeaderChange = "leader_changes", 50;
    /// A node's log lost a suffix.
    Truncation = "truncations", 50;
    /// A process was killed.
    Kill = "kills", 50;
    /// A machine lost power.
    PowerCut = "power_cuts", 50;
    /// All machines lost power at once.
    PowerCutOfAll = "power_cuts_of_all", 50;
    /// A node was asked to stop, and did so in good order.
    OrderlyStop = "orderly_stops", 50;
    /// A node that was to stop in good order crashed first.
    CrashWhileClosing = "crashes_while_closing", 500;
    /// Failing disks left so many logs in doubt that no quorum is sure of its own: the cluster waits, or halts, loudly.
    Undecided = "undecided", 0;
    /// A node was started again.
    Restart = "restarts", 50;
    /// A node took its state over from a snapshot, at a start or from another node.
    SnapshotRestored = "snapshots_restored", 200;
    /// A node that was running was given a snapshot, since it had fallen behind the log of the leader.
    SnapshotInstalled = "snapshots_installed", 200;
    /// A crash met writes in flight.
    CrashWithPendingWrites = "crashes_with_pending_writes", 50;
    /// Of a write that was in flight, some sectors survived and some did not.
    TornWrite = "torn_writes", 50;
    /// A completed write that nobody had flushed was lost, at least in part.
    UnflushedWriteLost = "unflushed_writes_lost", 50;
    /// A directory operation that nobody had synchronised was lost.
    DirectoryOpLost = "directory_ops_lost", 500;
    /// A created file came back shorter than it was made.
    FileSizeLost = "file_sizes_lost", 500;
    /// A write completed before one that was submitted earlier.
    WriteOvertook = "writes_overtook", 50;
    /// A directed link was cut.
    LinkCut = "links_cut", 50;
    /// Some, but not all, of a node's links were cut, or in one direction only.
    PartialPartition = "partial_partitions", 50;
    /// Bytes were held up by a cut link.
    BytesStalled = "bytes_stalled", 50;
    /// A connection was reset.
    ConnectionReset = "connection_resets", 50;
    /// A connection was made.
    Connected = "connections", 50;
    /// An attempt to connect failed.
    DialFailed = "dials_failed", 50;
    /// A connection was cut in the middle of its bytes.
    CutAtByte = "cuts_at_a_byte", 50;
    /// A send waited for space in the pipe.
    SendWaited = "sends_waited", 0;
    /// A node stood still for a while.
    Pause = "pauses", 50;
    /// A wall clock jumped.
    ClockJump = "clock_jumps", 50;
    /// A disk was slow for a while.
    SlowDisk = "slow_disks", 50;
    /// A leader handed over since its disk was far slower than the others'.
    SlowLeaderLeft = "slow_leaders_left", 300;
    /// A disk stood still for a while.
    StalledDisk = "stalled_disks", 50;
    /// A disk operation failed by request of the fault schedule.
    DiskFault = "disk_faults", 50;
    /// A write was reported and never arrived.
    LostWrite = "lost_writes", 0;
    /// An operation went to another place.
    Misdirected = "misdirected_operations", 200;
    /// A bit was flipped on its way in the header or body of a frame, or in a handshake.
    FrameFlipped = "frames_flipped", 200;
    /// The same in the image of a batch.
    ImageFlipped = "images_flipped", 200;
    /// The same in a piece of a snapshot.
    PieceFlipped = "snapshot_pieces_flipped", 600;
    /// A node refused a frame for that, and counted it.
    FlipRefused = "flips_refused", 200;
    /// Content at rest was damaged.
    Rot = "rot", 200;
    /// A node had more to apply than it may in one turn.
    ApplyPaused = "apply_pauses", 50;
    /// A log went on in another segment.
    Rollover = "rollovers", 50;
    /// A command was acknowledged.
    Acknowledged = "acknowledged", 50;
    /// A node refused a proposal.
    Refused = "refused", 50;
    /// A client does not know what became of its proposal.
    UnknownOutcome = "unknown_outcomes", 50;
    /// A command of unknown outcome turned out to be committed.
    UnknownCommitted = "unknown_committed", 50;
    /// A command of unknown outcome was never committed.
    UnknownLost = "unknown_lost", 50;
    /// A disk image was recovered to check that what is committed is durable.
    ImageChecked = "images_checked", 50;
    /// A link was slow for a while.
    SlowLink = "slow_links", 50;
    /// A clock ran fast or slow for a while.
    ClockDrift = "clock_drifts", 50;
    /// A write of a killed process arrived when the next one may have been running.
    LateWrite = "late_writes", 200;
    /// A node crashed while others could not reach one another.
    CrashUnderPartition = "crashes_under_partition", 50;
    /// A client read a key.
    Got = "gets", 50;
    /// A client set a key.
    Put = "puts", 50;
    /// A client appended to a key.
    Appended = "appends", 50;
    /// A conditional change found what it expected.
    CasHit = "cas_hits", 50;
    /// A conditional change found something else.
    CasMissed = "cas_misses", 50;
    /// The history of a key was checked for linearizability.
    HistoryChecked = "histories_checked", 50;
    /// One of them needed more memory than it may take.
    HistoryUndecided = "histories_undecided", 0;
    /// A key was read without a command, by whatever proves it current.
    LinearizableRead = "reads_linearizable", 50;
    /// The same, on a leader that may rely on a lease.
    LeaderReadWithLeases = "reads_led_with_leases", 50;
    /// The same, on a node that does not lead.
    FollowerRead = "reads_on_followers", 50;
    /// The same, confirmed by a quorum.
    QuorumRead = "reads_by_quorum", 50;
    /// The same, by a barrier in the log.
    BarrierRead = "reads_by_barrier", 50;
    /// A key was read on a node that may have been behind, within bounds.
    StaleRead = "reads_stale", 50;
    /// A leader heard a quorum because it was asked to.
    RoundForced = "rounds_forced", 50;
    /// Somebody waited until an index was committed.
    CommitAwaited = "commits_awaited", 50;
    /// Somebody waited until an index was applied.
    ApplyAwaited = "applies_awaited", 50;
    /// A read was not answered.
    ReadRefused = "reads_refused", 50;
    /// The core of a node stood still between reading its clock and taking its turn.
    CoreStopped = "cores_stopped", 50;
    /// A node was asked to hand leadership over.
    TransferAsked = "transfers_asked", 50;
    /// Leadership was handed over as asked.
    Transferred = "transfers", 50;
    /// It was not.
    TransferFailed = "transfers_failed", 50;
    /// A leader that was asked to stop handed over first.
    HandedOverAtStop = "transfers_at_a_stop", 50;
    /// A client opened a session.
    SessionOpened = "sessions_opened", 50;
    /// A command of a session was proposed again, since its outcome was not known.
    ProposedAgain = "session_retries", 50;
    /// A command of a session was proposed again after it had been answered, and answered as before.
    AnsweredAgain = "answered_again", 50;
    /// A command of a session was resolved as never applied.
    ResolvedNever = "resolved_as_never", 200;
    /// Such a command was proposed again, and refused.
    FenceHeld = "fences_held", 200;
    /// A command that its client had acknowledged was proposed again, and refused.
    BelowFloor = "below_the_floor", 50;
    /// A session had expired.
    SessionExpired = "sessions_expired", 200;
    /// There was no room for another session.
    SessionTableFull = "session_tables_full", 200;
    /// A leader was asked to change the members.
    ChangeAsked = "changes_asked", 50;
    /// It did.
    Changed = "changes", 50;
    /// It did not, or nobody knows.
    ChangeFailed = "changes_failed", 50;
    /// A transition between two sets of voters was entered.
    JointEntered = "transitions", 50;
    /// A leader went on with other members, and no transition.
    MembersChanged = "settlements", 50;
    /// A node became a learner.
    LearnerAdded = "learners", 50;
    /// A member has left.
    MemberLeft = "departures", 50;
    /// The leader was among those.
    LeaderLeft = "departures_of_leaders", 200;
    /// A member began to listen elsewhere, as the others had been told.
    MemberMoved = "moved_members", 200;
    /// A machine that had left lost its disk, to come back without.
    Wiped = "wiped_disks", 200;
    /// Somebody asked a node whom to turn to.
    Asked = "questions", 50;
    /// And said where it is to be met.
    Introduced = "introductions", 50;
    /// Somebody was referred to a leader.
    Referred = "referrals", 50;
    /// A member that heard no leader took up with one that no configuration names, or names elsewhere.
    Met = "acquaintances", 500;
    /// A plot was begun.
    PlotBegun = "plots", 50;
    /// A leader with entries of an older term was elected again, as in figure 8 of the Raft paper.
    Figure8 = "figure_8", 200;
    /// A leader that had been cut off came back when the log of its successor no longer reached to what it had.
    Overtaken = "overtaken_leaders", 200;
    /// A candidate campaigned again while a vote of the term before was on its way to it.
    LateVote = "late_votes", 0;
    /// A node came back to a cluster that was left alone with a later term than the leader's.
    Stranded = "stranded_candidates", 200;
    /// One write took far longer than the others.
    StalledWrite = "stalled_writes", 50;
    /// A cluster that was left alone kept its leader.
    Stable = "stable_endings", 50;
}

/// What runs must allow to come by a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Any run may.
    Nothing,
    /// Members join and leave, which they do only where no disk fails.
    Changes,
    /// One disk rots, and there are two others at least.
    RottingDisk,
    /// Writes of killed processes may arrive late.
    LateWrites,
    /// What is committed is looked for in recovered disk images.
    ImageChecks,
    /// The cluster is formed of three nodes at least: one can be outvoted.
    Three,
}

impl Mark {
    /// What runs must allow to come by it.
    #[must_use]
    pub const fn need(self) -> Need {
        match self {
            Self::ChangeAsked
            | Self::Changed
            | Self::ChangeFailed
            | Self::JointEntered
            | Self::MembersChanged
            | Self::LearnerAdded
            | Self::MemberLeft
            | Self::MemberMoved
            | Self::Met
            | Self::LeaderLeft
            | Self::Wiped => Need::Changes,
            Self::Rot | Self::Misdirected => Need::RottingDisk,
            Self::LateWrite => Need::LateWrites,
            Self::ImageChecked => Need::ImageChecks,
            Self::Figure8 | Self::Overtaken | Self::Stranded => Need::Three,
            _ => Need::Nothing,
        }
    }
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

    /// The marks that a range of so many seeds must come by and this one did not.
    #[must_use]
    pub fn missing(&self, seeds: u64) -> Vec<Mark> {
        let required = |mark: &Mark| (1..=seeds).contains(&mark.required_from());
        Mark::ALL.iter().copied().filter(|mark| required(mark) && self.of(*mark) == 0).collect()
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
