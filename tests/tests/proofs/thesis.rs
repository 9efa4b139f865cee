//! The rules of Diego Ongaro's "Consensus: Bridging Theory and Practice" (2014) by section, in its order. What this engine does
//! in another way than a section says is told with the rule.

use super::Entry;

pub(super) const RULES: &[Entry] = &[
    // Chapter 3: the basic algorithm.
    (
        "3.2",
        "the five properties of figure 3.2 hold in every run of a small cluster",
        &[
            "engine/src/raft/simulation/model/search.rs: no_run_of_a_small_cluster_breaks_an_invariant",
            "engine/src/raft/simulation/model/search.rs: bugs_that_are_put_back_are_found_by_the_search",
        ],
    ),
    (
        "3.2",
        "and in random runs of larger ones, in any weather",
        &[
            "engine/src/raft/simulation.rs: random_runs_keep_the_invariants_and_progress_after_healing",
            "engine/src/raft/simulation.rs: every_known_bug_is_caught_when_it_is_put_back",
        ],
    ),
    (
        "3.2",
        "what honest members cannot do to each other stops a node",
        &["engine/tests/scripts/violations.txt"],
    ),
    (
        "3.3",
        "a larger term is adopted, a stale leader or candidate steps down, a stale request is refused",
        &["engine/tests/scripts/thesis_3_3_terms.txt", "engine/tests/scripts/stale_leader.txt"],
    ),
    (
        "3.4",
        "a follower that hears nothing campaigns, and leads with the votes of a majority",
        &["engine/tests/scripts/election.txt", "engine/tests/scripts/election_single.txt"],
    ),
    (
        "3.4",
        "one vote in a term, first come, first served; a split vote is followed by another term",
        &["engine/tests/scripts/election_split_vote.txt"],
    ),
    (
        "3.4",
        "a candidate follows a leader of its term, and refuses one of an earlier term",
        &["engine/tests/scripts/thesis_3_4_candidates.txt"],
    ),
    (
        "3.4",
        "time-outs are drawn, so that split votes are rare and resolved quickly",
        &[
            "engine/src/raft/mod.rs: a_wait_outlasts_what_others_stick_to_and_is_well_within_two_time_outs_and_priority_delays_it",
            "tests/tests/driver.rs: a_dead_leader_is_replaced_within_two_election_time_outs_unless_votes_split_which_is_rare",
        ],
    ),
    (
        "3.4",
        "a leader sends heartbeats, unless other appends show that it is there",
        &["engine/tests/scripts/heartbeat_suppressed.txt"],
    ),
    (
        "3.5",
        "an entry on a majority is committed, and followers learn of it with the next append",
        &[
            "engine/tests/scripts/replication_slow_leader_disk.txt",
            "engine/tests/scripts/replication_acks.txt",
        ],
    ),
    (
        "3.5",
        "appends are sent again until all followers have all entries",
        &[
            "engine/tests/scripts/replication_lost_message.txt",
            "engine/tests/scripts/replication_session.txt",
        ],
    ),
    (
        "3.5",
        "the consistency check: a follower refuses what does not continue its log, and cuts off what contradicts the leader's",
        &[
            "engine/tests/scripts/conflict_backtracking.txt",
            "engine/tests/scripts/conflict_hint_by_follower.txt",
        ],
    ),
    (
        "3.5",
        "what is cut off says nothing any more, also if its disk reports it late",
        &["engine/tests/scripts/conflict_late_completion.txt"],
    ),
    (
        "3.6.1",
        "only a log at least as up-to-date is voted for: the last term first, then the length",
        &["engine/tests/scripts/election_stale_log.txt"],
    ),
    (
        "3.6.2",
        "an entry of an earlier term is not committed by counting (figure 3.7)",
        &["engine/tests/scripts/commit_figure_8.txt", "engine/tests/scripts/commit_figure_8e.txt"],
    ),
    (
        "3.6.3",
        "whoever leads a later term has what was committed (figure 3.8)",
        &[
            "engine/src/raft/simulation/model/search.rs: no_run_of_a_small_cluster_breaks_an_invariant",
            "engine/src/raft/simulation.rs: unsafe_bugs_end_in_a_disagreement_between_nodes",
        ],
    ),
    (
        "3.7",
        "a follower that crashed is sent what it lacks; what is repeated changes nothing",
        &["engine/tests/scripts/restart_follower.txt", "engine/tests/scripts/replication_acks.txt"],
    ),
    (
        "3.7",
        "a leader that crashed follows, and what nobody else has is cut off",
        &["engine/tests/scripts/restart_leader.txt"],
    ),
    (
        "3.8",
        "term and vote are durable before anything is said in their name",
        &["engine/tests/scripts/election.txt", "engine/tests/scripts/election_restart.txt"],
    ),
    (
        "3.8",
        "entries are durable before they are acknowledged",
        &["engine/tests/scripts/restart_follower.txt"],
    ),
    (
        "3.8",
        "the commit index need not be kept: it is found again",
        &["engine/tests/scripts/election_single.txt"],
    ),
    (
        "3.8",
        "a member that has lost its disk comes back as another one",
        &[
            "tests/tests/driver/membership.rs: k12_a_wiped_disk_under_an_old_id_is_refused_and_comes_back_as_a_learner_after_the_old_one_was_removed",
        ],
    ),
    (
        "3.8",
        "where a part of the log is lost, what may have been promised is minded until it is settled",
        &[
            "engine/tests/scripts/damage_certain.txt",
            "engine/tests/scripts/damage_known.txt",
            "engine/tests/scripts/damage_running.txt",
            "engine/tests/scripts/damage_uncertain.txt",
            "engine/src/raft/simulation/damage.rs: damaged_logs_lose_nothing_that_was_committed_and_heal",
        ],
    ),
    (
        "3.9",
        "safety depends on no timing",
        &["engine/src/raft/simulation/model/search.rs: no_run_of_a_small_cluster_breaks_an_invariant"],
    ),
    (
        "3.9",
        "the time-outs keep their distance",
        &["engine/src/raft/config.rs: limits_that_contradict_each_other_are_refused"],
    ),
    ("3.9", "a leader whose disk does not answer makes way", &["engine/tests/scripts/disk_stalled.txt"]),
    (
        "3.10",
        "a leader whose disk is far slower than the others' makes way",
        &["engine/tests/scripts/slow_disk.txt"],
    ),
    (
        "3.10",
        "leadership is transferred: no proposals, caught up, told to campaign, given up after an election time-out",
        &[
            "engine/tests/scripts/transfer.txt",
            "tests/tests/driver.rs: leadership_goes_where_it_is_asked_to_and_no_command_is_lost_on_the_way",
            "tests/tests/driver.rs: commands_are_refused_while_leadership_is_on_its_way_and_taken_again_when_it_stays",
        ],
    ),
    // Chapter 4: members. Every change goes by joint consensus (4.3), also that of a single server (4.1).
    (
        "4.1",
        "a configuration is in force when it is appended, and is taken back with its entry",
        &[
            "engine/tests/scripts/membership_truncated.txt",
            "engine/src/raft/configurations.rs: the_newest_is_in_force_and_a_truncation_takes_it_back",
        ],
    ),
    (
        "4.1",
        "one change at a time, none before a commit of the leader's own term, none that leaves no quorum",
        &[
            "engine/tests/scripts/membership_refused.txt",
            "engine/src/raft/simulation/membership.rs: every_known_bug_of_membership_is_caught_when_it_is_put_back",
        ],
    ),
    (
        "4.1",
        "voters and candidates need not be members of what they know, the log decides",
        &[
            "tests/tests/driver/membership.rs: a_member_with_an_old_configuration_follows_a_leader_that_it_knows_by_another_directory",
            "engine/tests/scripts/membership_unread.txt",
        ],
    ),
    (
        "4.2.1",
        "a new server is no voter before it has caught up",
        &["engine/tests/scripts/membership_grow.txt", "engine/tests/scripts/replication_learner.txt"],
    ),
    (
        "4.2.1",
        "it catches up in rounds, the last of less than an election time-out, and in no more than ten",
        &["engine/tests/scripts/thesis_4_2_1_rounds.txt"],
    ),
    (
        "4.2.1",
        "one that is not there, or gets nowhere, is given up",
        &["engine/tests/scripts/membership_stuck.txt"],
    ),
    (
        "4.2.2",
        "a leader that is removed leads until that is committed, without counting itself",
        &[
            "engine/tests/scripts/membership_leader_removed.txt",
            "tests/tests/driver/membership.rs: k6_a_leader_removes_itself_leads_until_that_is_committed_and_another_one_follows",
        ],
    ),
    (
        "4.2.2",
        "a server that its newest configuration leaves out may have to campaign",
        &["engine/tests/scripts/membership_left_out.txt"],
    ),
    (
        "4.2.3",
        "a removed server that does not know it disturbs nobody",
        &["engine/tests/scripts/thesis_4_2_3_removed.txt"],
    ),
    (
        "4.2.3",
        "whoever has heard a leader lately minds no request for votes, and adopts no term from it",
        &["engine/tests/scripts/election_stickiness.txt"],
    ),
    (
        "4.2.4",
        "commands are committed while members change",
        &[
            "tests/tests/driver/membership.rs: k6_a_member_is_replaced_in_one_call_while_commands_commit",
            "tests/tests/cluster.rs: a_cluster_grows_from_one_process_to_three_and_replaces_a_lost_one_under_load",
        ],
    ),
    (
        "4.3",
        "joint consensus: elections and commits need a majority of both",
        &[
            "engine/tests/scripts/membership_joint.txt",
            "engine/src/raft/quorum.rs: a_transition_needs_both_majorities",
        ],
    ),
    (
        "4.3",
        "whoever leads next finishes what was begun",
        &[
            "tests/tests/driver/membership.rs: k6_whoever_leads_next_finishes_a_change_wherever_the_leader_dies",
            "engine/tests/scripts/membership_transfer.txt",
        ],
    ),
    // Chapter 5: log compaction.
    (
        "5",
        "a snapshot has the last index and term that it covers, and the members as of then",
        &[
            "engine/tests/scripts/membership_snapshot.txt",
            "tests/tests/driver/snapshots.rs: a_restart_begins_with_the_newest_snapshot_and_the_log_behind_it",
        ],
    ),
    (
        "5.1",
        "a follower behind the log's start is sent the snapshot, and the log behind it",
        &[
            "engine/tests/scripts/snapshot_install.txt",
            "engine/tests/scripts/snapshot_failed.txt",
            "tests/tests/driver/snapshots.rs: a_transfer_goes_on_where_it_stopped_when_the_connection_was_cut",
        ],
    ),
    (
        "5.1",
        "what contradicts a snapshot goes as a whole, what follows it stays",
        &[
            "engine/tests/scripts/snapshot_conflict.txt",
            "engine/src/raft/simulation/snapshots.rs: logs_that_are_purged_behind_snapshots_lose_nothing_and_heal",
        ],
    ),
    (
        "5.1",
        "a crash at any moment of an install costs nothing",
        &[
            "tests/tests/driver/snapshots.rs: a_crash_at_any_moment_of_an_install_costs_nothing_but_time",
            "engine/tests/scripts/snapshot_state_lost.txt",
        ],
    ),
    (
        "5.1.1",
        "snapshots are taken and sent while commits go on",
        &[
            "tests/tests/driver/snapshots.rs: a_follower_behind_the_logs_start_is_caught_up_by_a_snapshot_while_commits_go_on",
        ],
    ),
    (
        "5.1.2",
        "the log is bounded",
        &["tests/tests/driver/snapshots.rs: the_log_is_bounded_under_constant_load"],
    ),
    // Chapter 6: clients.
    (
        "6.1",
        "a server that joins finds the cluster by those that it is told of",
        &[
            "tests/tests/driver/membership.rs: k7_a_single_node_runs_and_commits_alone_and_later_joiners_are_caught_up_and_vote",
        ],
    ),
    (
        "6.2",
        "a leader that hears no majority for an election time-out steps down",
        &["engine/tests/scripts/election_check_quorum.txt", "engine/tests/scripts/rounds_slow_disk.txt"],
    ),
    (
        "6.2",
        "who does not lead says who does",
        &[
            "tests/tests/driver/reads.rs: a_read_through_the_log_commits_an_entry_without_a_command_and_only_the_leader_can",
        ],
    ),
    (
        "6.3",
        "a command that is sent again is applied once and answered as before, also across a failover",
        &[
            "tests/tests/driver/sessions.rs: a_command_that_is_proposed_again_is_answered_as_before_and_applied_once",
            "tests/tests/driver/sessions.rs: a_command_that_is_proposed_again_across_a_failover_is_applied_exactly_once",
        ],
    ),
    (
        "6.3",
        "sessions expire by the log's clock, on all members equally",
        &[
            "tests/tests/driver/sessions.rs: a_silent_session_expires_by_the_logs_clock_and_so_equally_on_members_with_any_clock",
        ],
    ),
    (
        "6.3",
        "histories of clients are linearizable",
        &["tests/tests/simulation.rs: sixty_seeds_end_well_and_come_by_their_faults"],
    ),
    (
        "6.4",
        "a read needs a commit of the leader's term, a round after the request, and all applied up to its index",
        &[
            "engine/tests/scripts/read_index.txt",
            "engine/tests/scripts/read_new_leader.txt",
            "engine/src/raft/simulation/reads.rs: reads_see_all_that_was_committed_before_they_were_asked_for",
            "tests/tests/driver/reads.rs: a_read_that_is_answered_before_it_is_applied_is_noticed",
        ],
    ),
    ("6.4", "a follower asks the leader for the index", &["engine/tests/scripts/read_follower.txt"]),
    (
        "6.4.1",
        "a lease counts from when a round was sent, within bounds of the clocks, and ends with a transfer",
        &[
            "engine/tests/scripts/read_lease.txt",
            "engine/tests/scripts/read_lease_last_voter.txt",
            "engine/src/raft/members.rs: a_lease_ends_before_the_fastest_clock_has_waited_for_the_minimum",
            "engine/src/raft/simulation/reads.rs: known_bugs_of_reads_are_caught_when_they_are_put_back",
        ],
    ),
    // Chapters 9 and 10: elections and performance.
    (
        "9.3",
        "a failed leader is replaced within two election time-outs",
        &[
            "tests/tests/driver.rs: a_dead_leader_is_replaced_within_two_election_time_outs_unless_votes_split_which_is_rare",
        ],
    ),
    (
        "9.6",
        "a server that cannot win does not raise its term",
        &["engine/tests/scripts/election_stickiness.txt", "engine/tests/scripts/election_stale_log.txt"],
    ),
    (
        "10.2.1",
        "the leader's disk writes while followers replicate, and is one vote among equals",
        &["engine/tests/scripts/replication_slow_leader_disk.txt"],
    ),
    (
        "10.2.2",
        "appends are pipelined, as far as a window allows",
        &["engine/tests/scripts/replication_window.txt"],
    ),
    (
        "10.2.2",
        "what is lost of a pipeline is found and sent again",
        &["engine/tests/scripts/replication_lost_message.txt"],
    ),
];
